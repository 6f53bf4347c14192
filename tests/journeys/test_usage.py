"""The usage pages: what a person sees of what their operations cost, with and without scripts."""

import re
from datetime import datetime, timedelta
from decimal import Decimal
from typing import Any

import pytest
from django.utils import timezone
from playwright.sync_api import Page, expect

from accounts.models import User, Workspace
from ai_ops.models import Project
from billing import ledger
from billing.models import TokenUsage
from billing.pricing import TokenPools
from billing.usage import record_usage
from tests.conftest import MakeUser
from tests.journeys.conftest import OpenContext, shoot, sign_in
from tests.journeys.test_drafting import fill, write

LONG_MODEL = "an-experimental-model-whose-name-is-longer-than-any-column-2026-11-21-preview"
LONG_PROJECT = "Spring campaign of the whole northern region, with everything that was not finished last year"
MODELS = [
    ("openai", "gpt-6-luna"),
    ("anthropic", "claude-haiku-5-5"),
    ("google", "gemini-3.8-flash"),
    ("openai", LONG_MODEL),
]
TYPES = ["generation", "chat", "refinement", "repurpose", "prompt"]


def use(user: User, at: datetime, number: int, **fields: Any) -> TokenUsage:
    """An operation that succeeded at that moment, by way of the ledger, so that the books stay in order."""
    provider, model = MODELS[number % len(MODELS)]
    pools = TokenPools(input_tokens=812 + number, output_tokens=1_204 + 37 * number % 900)
    operation = ledger.Operation(
        **{"operation_type": TYPES[number % len(TYPES)], "provider": provider, "model": model} | fields,
        multiplier=Decimal("1.5"),
    )
    posting = ledger.deduct_tokens(
        user_id=user.pk, tokens=operation.billable_tokens(pools), operation=operation, pools=pools, duration_ms=2_345
    )
    usage = TokenUsage.objects.get(pk=posting.usage_id or 0)
    usage.created_at = at
    usage.save(update_fields=["created_at"])
    return usage


@pytest.fixture
def vera(make_user: MakeUser) -> User:
    """Has used a lot for half a year."""
    user = make_user("vera", tokens=2_000_000)
    workspace = Workspace.objects.get(owner=user)
    projects = [Project.objects.create(workspace=workspace, name=name).pk for name in ("Letters", LONG_PROJECT)]
    now = timezone.now()
    for number in range(90):
        project_id = [None, *projects, 999_999][number % 4 if number % 3 else 1]
        use(user, now - timedelta(hours=number * number / 2), number, project_id=project_id)
    for number in range(4):
        record_usage(
            user_id=user.pk, operation_type="chat", provider="openai", model="gpt-6-luna", input_tokens=10,
            output_tokens=0, success=False, error_message="OpenAI did not answer.", idempotency_key=f"failed-{number}",
        )  # fmt: skip
    return user


IS_PAINTED = """chart => {
    const canvas = document.querySelector(`[data-chart=${chart}]`);
    const copy = document.createElement("canvas");
    [copy.width, copy.height] = [canvas.width, canvas.height];
    const context = copy.getContext("2d", { willReadFrequently: true });
    context.drawImage(canvas, 0, 0);
    const { data } = context.getImageData(0, 0, copy.width, copy.height);
    for (let i = 0; i < data.length; i += 4) {
        const rgb = [data[i], data[i + 1], data[i + 2]];
        if (data[i + 3] === 255 && Math.max(...rgb) - Math.min(...rgb) > 60) return true;
    }
    return false;
}"""


def expect_painted(page: Page, theme: str) -> None:
    """Each canvas is drawn for the theme, and some pixel has a colour that is none of the text and the lines."""
    for name in ("tokens", "outcomes", "cost", "by-operation", "by-model", "by-project"):
        expect(page.locator(f"[data-chart=chart-{name}-data]")).to_have_attribute("data-painted", theme)
        page.wait_for_function(IS_PAINTED, arg=f"chart-{name}-data")


def test_nothing_used_yet(alice: User, page: Page) -> None:
    sign_in(page, "alice", "/tokens/")
    page.get_by_role("link", name="Usage", exact=True).click()
    expect(page.get_by_role("heading", name="Nothing used yet")).to_be_visible()
    shoot(page, "usage-empty")
    page.goto("/tokens/usage/log/")
    expect(page.get_by_role("heading", name="No operations yet")).to_be_visible()
    shoot(page, "usage-log-empty")


def test_from_one_draft_to_its_price_and_back(alice: User, page: Page) -> None:
    sign_in(page, "alice")
    fill(page)
    write(page)
    expect(page.locator("#draft-panel [data-operation-status]")).to_have_text(re.compile(r"^Done\. "))
    usage = TokenUsage.objects.get(user=alice)
    page.goto("/tokens/usage/")
    expect(page.locator(".figures")).to_contain_text(f"{usage.billable_tokens:,}")
    expect(page.locator(".figures")).to_contain_text("100 %")
    expect_painted(page, "light")
    shoot(page, "usage-one")

    page.get_by_role("link", name="Every operation").click()
    page.get_by_role("link", name="Draft").click()
    arithmetic = f"({usage.input_tokens:,} + {usage.output_tokens:,}) × 1.5 = {usage.billable_tokens:,}"
    expect(page.locator(".price-sum")).to_have_text(arithmetic)
    expect(page.locator(".price-steps")).to_contain_text(f"{usage.billable_tokens:,} tokens")
    shoot(page, "usage-entry")
    page.get_by_role("link", name="Open the piece").click()
    page.wait_for_url("**/studio/content/*/")


def test_charts_follow_period_bucket_split_and_theme(vera: User, page: Page) -> None:
    sign_in(page, "vera", "/tokens/usage/")
    expect_painted(page, "light")
    shoot(page, "usage-many")

    page.get_by_role("link", name="Last 7 days").click()
    page.wait_for_url("**/tokens/usage/?period=7d")
    expect(page.locator("#usage-total-title")).to_have_text("Last 7 days")
    expect_painted(page, "light")
    page.get_by_role("link", name="Hours", exact=True).click()
    page.wait_for_url("**/tokens/usage/?period=7d&by=hour")
    expect(page.locator("#by-hour")).to_have_attribute("aria-current", "true")
    page.get_by_role("link", name="Model", exact=True).click()
    page.wait_for_url("**by=hour&split=model")
    expect_painted(page, "light")
    page.get_by_text("Numbers as a table").first.click()
    rows = page.get_by_role("table", name="Tokens over time").locator("tbody tr")
    expect(rows).to_have_count(7 * 24)
    page.get_by_text("Numbers as a table").first.click()
    page.emulate_media(color_scheme="dark")
    expect_painted(page, "dark")
    shoot(page, "usage-hours")
    page.emulate_media(color_scheme="light")
    expect_painted(page, "light")

    page.go_back()
    expect(page.locator("#split-operation")).to_have_attribute("aria-current", "true")
    expect_painted(page, "light")
    page.get_by_label("From").fill("2026-01-01")
    page.get_by_label("To", exact=True).fill("2025-01-01")
    page.get_by_role("button", name="Show").click()
    expect(page.locator("#period-error")).to_have_text("The first day comes after the last one.")
    page.get_by_label("To", exact=True).fill("2026-01-02")
    page.get_by_role("button", name="Show").click()
    expect(page.get_by_role("heading", name="Nothing used in this period")).to_be_visible()
    shoot(page, "usage-period-empty")
    page.get_by_role("link", name="Last 12 months").click()
    page.get_by_role("link", name="Months", exact=True).click()
    expect_painted(page, "light")
    shoot(page, "usage-months")


def test_usage_without_scripts(vera: User, open_context: OpenContext) -> None:
    page = sign_in(open_context(java_script_enabled=False).new_page(), "vera", "/tokens/usage/")
    page.get_by_role("link", name="Last 12 months").click()
    page.wait_for_url("**/tokens/usage/?period=12m")
    page.get_by_role("link", name="Months", exact=True).click()
    page.wait_for_url("**/tokens/usage/?period=12m&by=month")
    expect(page.get_by_role("table", name="By model")).to_contain_text(LONG_MODEL)
    page.get_by_text("Numbers as a table").first.click()
    total = sum(TokenUsage.objects.filter(user=vera).values_list("billable_tokens", flat=True))
    shown = page.get_by_role("table", name="Tokens over time").locator("tbody tr td:last-child").all_inner_texts()
    assert sum(int(text.replace(",", "")) for text in shown) == total
    shoot(page, "usage-nojs")
    page.get_by_role("link", name="Every operation").click()
    page.get_by_label("Status").select_option("failed")
    page.get_by_role("button", name="Filter").click()
    expect(page.locator("#usage-log tbody tr")).to_have_count(4)
    shoot(page, "usage-log-nojs")


def test_log_pages_and_filters(vera: User, page: Page) -> None:
    sign_in(page, "vera", "/tokens/usage/log/?period=all")
    rows = page.locator("#usage-log tbody tr")
    expect(rows).to_have_count(25)
    newest = rows.first.get_by_role("link").get_attribute("href") or ""
    shoot(page, "usage-log")
    page.get_by_role("link", name="Older").click()
    page.wait_for_url("**before=*")
    expect(page.get_by_role("link", name="Newer")).to_be_visible()
    expect(rows.first.get_by_role("link")).not_to_have_attribute("href", newest)
    page.get_by_role("link", name="Newer").click()
    page.wait_for_url("**after=*")
    expect(page.get_by_role("link", name="Newer")).to_have_count(0)
    expect(rows.first.get_by_role("link")).to_have_attribute("href", newest)
    page.get_by_label("Operation").select_option("repurpose")
    page.wait_for_url("**type=repurpose**")
    expect(rows).to_have_count(18)
    page.get_by_label("Status").select_option("expired")
    expect(page.get_by_role("heading", name="No operations match")).to_be_visible()
    page.get_by_role("link", name="Remove the filters").click()
    expect(rows).to_have_count(25)

    # A choice that is made before the scripts are there is not lost.
    page.route("**/htmx-2*", lambda route: (page.get_by_label("Status").select_option("failed"), route.continue_()))
    page.goto("/tokens/usage/log/?period=all")
    page.wait_for_url("**status=failed")
    expect(rows).to_have_count(4)
    page.unroute_all()
    rows.first.get_by_role("link").click()
    expect(page.locator(".entry-grid")).to_contain_text("OpenAI did not answer.")
    shoot(page, "usage-entry-failed")
