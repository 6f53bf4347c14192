"""Signing up and finding the way about."""

import re

import pytest
from playwright.sync_api import Page, expect
from pytest_django.live_server_helper import LiveServer

from accounts.models import User
from billing import ledger
from tests.conftest import PASSWORD, MakeUser
from tests.journeys.conftest import PHONE, WIDE, OpenContext, shoot, sign_in


def test_sign_up_brings_the_bonus(seeded: None, page: Page) -> None:
    page.goto("/")
    expect(page.get_by_role("heading", name="Starter")).to_be_visible()
    shoot(page, "home")
    page.get_by_role("link", name="Sign up and get 10,000 tokens").click()
    page.get_by_label("Email").fill("nora@example.com")
    page.get_by_label("Password", exact=True).fill("short")
    shoot(page, "sign-up")
    page.get_by_role("button", name="Create account").click()
    expect(page.locator(".field-error")).to_contain_text("too short")
    shoot(page, "sign-up-error")

    page.get_by_label("Password", exact=True).fill(PASSWORD)
    page.get_by_role("button", name="Create account").click()
    page.wait_for_url("**/studio/")
    expect(page.locator("#balance .balance-number")).to_have_text("10,000")
    expect(page.locator("#quote")).to_contain_text("At most")
    shoot(page, "studio-empty")

    page.goto("/tokens/")
    rows = page.locator("#transactions tbody tr")
    expect(rows).to_have_count(1)
    expect(rows).to_contain_text("Bonus")
    expect(rows).to_contain_text("+10,000")
    expect(page.locator(".overview-balance")).to_contain_text("10,000")
    shoot(page, "tokens-new")


def test_sign_in_and_out(alice: User, page: Page) -> None:
    page.goto("/tokens/")
    assert page.url.endswith("/accounts/login/?next=/tokens/")
    page.get_by_label("Email").fill("Alice@Example.com")
    page.get_by_label("Password").fill("wrong horse battery")
    page.get_by_role("button", name="Sign in", exact=True).click()
    expect(page.get_by_role("alert")).to_contain_text("not correct")
    shoot(page, "sign-in-error")
    page.get_by_label("Password").fill(PASSWORD)
    page.get_by_role("button", name="Sign in", exact=True).click()
    page.wait_for_url("**/tokens/")
    page.locator("details.menu summary").click()
    shoot(page, "menu", whole=False)
    page.get_by_role("button", name="Sign out").click()
    page.wait_for_url("**/")
    expect(page.get_by_role("link", name="Sign in")).to_be_visible()
    page.goto("/accounts/login/")
    shoot(page, "sign-in")


def test_page_that_is_not_there(page: Page, live_server: LiveServer) -> None:
    """As production shows it: the web process of the tests has Django's own page, for developers."""
    response = page.goto(f"{live_server.url}/nothing/")
    assert response is not None
    assert response.status == 404
    expect(page.get_by_role("heading", level=1)).to_have_text("There is no such page")
    shoot(page, "404")


def test_settings_pages(alice: User, page: Page) -> None:
    sign_in(page, "alice")
    for path, heading in (
        ("/accounts/email/", "Email"),
        ("/accounts/password/change/", "Change Password"),
        ("/accounts/2fa/", "Two-factor"),
    ):
        page.goto(path)
        expect(page.get_by_role("heading", level=1)).to_contain_text(heading)
        shoot(page, f"settings-{path.strip('/').replace('/', '-')}")


@pytest.mark.parametrize(
    ("tokens", "tone", "words"),
    [
        (1_001, "tone-ok", None),
        (1_000, "tone-warn", "Running low"),
        (100, "tone-warn", "Running low"),
        (99, "tone-bad", "Almost used up"),
    ],
)
def test_badge_shows_how_the_balance_stands(
    make_user: MakeUser, page: Page, tokens: int, tone: str, words: str | None
) -> None:
    make_user("nora", tokens=tokens)
    sign_in(page, "nora")
    badge = page.locator("#balance .balance")
    for size in (WIDE, PHONE):
        page.set_viewport_size(size)
        expect(badge).to_be_in_viewport(ratio=1)
        expect(badge.locator(".balance-number")).to_have_text(f"{tokens:,}")
        expect(badge).to_have_class(re.compile(rf"\b{tone}\b"))
        expect(badge.locator(".visually-hidden")).to_contain_text(words or "available")
    expect(page.locator("#quote")).not_to_be_empty()
    shoot(page, f"badge-{tokens}", whole=False)


def test_change_from_outside_appears_in_every_tab(alice: User, susan: User, open_context: OpenContext) -> None:
    """Law 2's other half: a change that commits is seen, without a reload and by nobody else."""
    context = open_context()
    tabs = [sign_in(context.new_page(), "alice"), context.new_page()]
    tabs[1].goto("/tokens/")
    for tab in tabs:
        expect(tab.locator("#balance .balance-number")).to_have_text("10,000")
    ledger.add_tokens(user_id=alice.pk, tokens=777, type="bonus", description="From outside", idempotency_key="outside")
    for tab in tabs:
        expect(tab.locator("#balance .balance-number")).to_have_text("10,777")
    ledger.deduct_tokens(
        user_id=alice.pk, tokens=9_800, type="admin_deduction", admin_id=susan.pk, description="From outside"
    )
    for tab in tabs:
        expect(tab.locator("#balance .balance-number")).to_have_text("977")
        expect(tab.locator("#balance .balance")).to_have_class(re.compile("tone-warn"))


def test_back_after_signing_out_shows_nothing(alice: User, page: Page) -> None:
    """Neither a whole page nor one that a link inside it had changed."""
    sign_in(page, "alice")
    for path in ("/tokens/history/", "/studio/chats/"):
        page.goto(path)
    page.locator("details.menu summary").click()
    page.get_by_role("button", name="Sign out").click()
    expect(page.get_by_role("link", name="Sign in").first).to_be_visible()
    for _ in range(2):
        page.go_back()
        expect(page.get_by_role("heading", level=1)).to_have_text("Sign in")
