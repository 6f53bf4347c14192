"""Finding an entry again, and taking the books along."""

import csv
import re
from decimal import Decimal
from pathlib import Path

from playwright.sync_api import Page, expect

from accounts.models import User
from billing import ledger
from billing.pricing import TokenPools
from tests.conftest import MakeUser
from tests.journeys.conftest import OpenContext, shoot, sign_in

LONG = (
    "Compensation for the outage of the third of March, as agreed on the telephone with the customer: " + "very " * 40
)


def fill_ledger(user: User, susan: User) -> None:
    """60 entries: a bonus, 50 operations, 9 grants, one with a long reason."""
    for number in range(50):
        ledger.deduct_tokens(
            user_id=user.pk,
            tokens=20 + number * 7 % 50,
            operation=ledger.Operation("chat", "openai", "gpt-6-luna", multiplier=Decimal(1)),
            pools=TokenPools(input_tokens=20),
        )
    for number in range(9):
        ledger.add_tokens(
            user_id=user.pk,
            tokens=1_000 + number,
            type="admin_grant",
            description=LONG if number == 4 else f"Thanks for report {number}",
            admin_id=susan.pk,
            idempotency_key=f"grant-{number}",
        )


def test_filters_sorts_and_pages(alice: User, susan: User, page: Page) -> None:
    fill_ledger(alice, susan)
    sign_in(page, "alice", "/tokens/")
    expect(page.locator("#transactions tbody tr")).to_have_count(8)
    page.get_by_role("link", name="All entries").click()
    page.wait_for_url("**/tokens/history/")
    entries = page.locator("#entries tbody tr")
    expect(entries).to_have_count(25)
    expect(page.locator(".history-totals")).to_contain_text("60")
    shoot(page, "history")

    page.get_by_role("link", name="Next").click()
    expect(page).to_have_url(re.compile(r"page=after-36"))
    expect(page.get_by_role("link", name="Previous")).to_be_visible()
    page.get_by_role("link", name="Next").click()
    expect(entries).to_have_count(10)
    page.go_back()
    expect(page).to_have_url(re.compile(r"page=after-36"))
    expect(entries).to_have_count(25)
    page.wait_for_load_state()  # going back loads the page anew, and its scripts carry the way forward
    page.go_forward()
    expect(entries).to_have_count(10)
    page.wait_for_load_state()  # and so does going forward: a click before that would be lost

    page.get_by_text("Grant", exact=True).first.click()
    expect(page).to_have_url(re.compile(r"type=admin_grant"))
    expect(entries).to_have_count(9)
    expect(page).not_to_have_url(re.compile(r"page="))
    page.get_by_role("link", name="Tokens", exact=True).and_(page.locator("#entries-by-amount")).click()
    expect(page).to_have_url(re.compile(r"sort=-amount"))
    expect(entries.first).to_contain_text("+1,008")
    page.locator("#entries-by-amount").click()
    expect(entries.first).to_contain_text("+1,000")
    page.get_by_label("Search in the description").press_sequentially("report 7")
    expect(entries).to_have_count(1)
    expect(page).to_have_url(re.compile(r"(?=.*[?&]sort=amount)(?=.*type=admin_grant)"))
    expect(page.get_by_label("Search in the description")).to_be_focused()
    shoot(page, "history-filtered")
    page.reload()
    expect(entries).to_have_count(1)
    expect(page.get_by_label("Search in the description")).to_have_value("report 7")

    page.get_by_label("Search in the description").fill("no such words")
    expect(page.get_by_role("heading", name="Nothing matches")).to_be_visible()
    shoot(page, "history-nothing-matches")
    page.get_by_role("link", name="Clear filters").click()
    expect(entries).to_have_count(25)
    expect(page).to_have_url(re.compile(r"/tokens/history/$"))


def test_dates_that_are_none(alice: User, page: Page) -> None:
    sign_in(page, "alice", "/tokens/history/")
    page.get_by_label("From", exact=True).fill("2026-11-30")
    page.get_by_label("To", exact=True).fill("2026-11-01")
    page.get_by_role("button", name="Show").click()
    expect(page.get_by_text("The first day comes after the last one.")).to_be_visible()
    expect(page.get_by_label("From", exact=True)).to_have_value("2026-11-30")
    expect(page.get_by_label("To", exact=True)).to_have_value("2026-11-01")
    shoot(page, "history-wrong-dates")
    page.get_by_role("link", name="Today").click()
    expect(page.locator("#entries tbody tr")).to_have_count(1)


def test_export_has_what_is_selected(alice: User, susan: User, page: Page) -> None:
    fill_ledger(alice, susan)
    sign_in(page, "alice", "/tokens/history/?type=admin_grant")
    page.get_by_text("Export 9 entries").click()
    shoot(page, "history-export")
    with page.expect_download() as download:
        page.get_by_role("link", name="Download CSV").click()
    text = Path(download.value.path()).read_text("utf-8-sig")
    assert [int(row["Tokens"]) for row in csv.DictReader(text.splitlines())] == list(range(1_008, 999, -1))
    assert download.value.suggested_filename.startswith("postmate-history-")


def test_history_on_paper(alice: User, susan: User, page: Page) -> None:
    fill_ledger(alice, susan)
    sign_in(page, "alice", "/tokens/history/")
    page.emulate_media(media="print")
    expect(page.get_by_text("alice@example.com. All time")).to_be_visible()
    expect(page.get_by_role("navigation", name="Tokens")).to_be_hidden()
    expect(page.locator("#history-filter")).to_be_hidden()
    expect(page.locator("#entries tbody tr").last).to_be_visible()


def test_nothing_of_that_kind(make_user: MakeUser, page: Page) -> None:
    make_user("nina")
    sign_in(page, "nina", "/tokens/history/?type=purchase")
    expect(page.get_by_role("heading", name="Nothing matches")).to_be_visible()
    page.goto("/tokens/statements/")
    expect(page.get_by_role("table")).to_contain_text("so far")
    shoot(page, "statements")


def test_without_javascript(alice: User, susan: User, open_context: OpenContext) -> None:
    fill_ledger(alice, susan)
    page = sign_in(open_context(java_script_enabled=False).new_page(), "alice", "/tokens/history/")
    entries = page.locator("#entries tbody tr")
    page.get_by_role("link", name="Next").click()
    page.wait_for_url("**page=after-36*")
    page.get_by_text("Grant", exact=True).first.click()
    page.get_by_label("Search in the description").fill("thanks")
    page.get_by_role("button", name="Search").click()
    page.wait_for_url("**type=admin_grant*")
    expect(entries).to_have_count(8)
    page.get_by_role("link", name="Tokens", exact=True).and_(page.locator("#entries-by-amount")).click()
    expect(entries.first).to_contain_text("+1,008")
    page.get_by_role("link", name="Last month").click()
    expect(page.get_by_role("heading", name="Nothing matches")).to_be_visible()
    page.get_by_label("From", exact=True).fill("2026-11-30")
    page.get_by_label("To", exact=True).fill("2026-11-01")
    page.get_by_role("button", name="Show").click()
    expect(page.get_by_text("The first day comes after the last one.")).to_be_visible()
    expect(page.get_by_label("Search in the description")).to_have_value("thanks")
    page.get_by_role("link", name="Clear filters").click()
    expect(entries).to_have_count(25)
