"""The dashboard's figures: what an admin sees of the whole business, with and without scripts."""

import csv
import io
import shutil
from datetime import UTC, timedelta
from pathlib import Path
from typing import Any
from zipfile import ZipFile

import pytest
from django.template.defaultfilters import date as date_text
from django.utils import timezone
from playwright.sync_api import Page, expect

from accounts.models import AuditEntry, User
from billing.dashboard import sections
from billing.figures import finance
from tests.audit.axe import find_violations
from tests.billing.figures.test_rollups import invent_history, roll_up_until
from tests.conftest import MakeUser
from tests.journeys.conftest import PHONE, OpenContext, shoot, sign_in
from tests.journeys.test_usage import IS_PAINTED

SECTIONS = [section.title for section in sections.SECTIONS.values()]


@pytest.fixture
def business(transactional_db: None, make_user: Any) -> None:
    """Ten months of an invented past."""
    invent_history(transactions=3_000, users=60, months=10, seed=7)
    roll_up_until(timezone.now())


@pytest.fixture
def admin(business: None, make_user: MakeUser) -> User:
    return make_user("adam", role="admin")


def test_admin_reads_the_figures(admin: User, page: Page, tmp_path: Path) -> None:
    sign_in(page, "adam")
    page.get_by_role("navigation", name="Main").get_by_role("link", name="Dashboard").click()
    expect(page.get_by_role("heading", name="Dashboard")).to_be_visible()
    for title in SECTIONS:
        expect(page.get_by_role("heading", name=title, exact=True, level=2)).to_be_visible()
    expect(page.locator("[aria-busy]")).to_have_count(0)
    system = page.get_by_role("region", name="The period", exact=True)
    expect(system).to_contain_text("Billable tokens")
    for chart in ("models", "operations", "latency"):
        page.wait_for_function(IS_PAINTED, arg=f"chart-{chart}-data")
    shoot(page, "dashboard-figures")

    page.get_by_role("link", name="Last 12 months").click()
    page.wait_for_url("**period=12m**")
    expect(page.locator("[aria-busy]")).to_have_count(0)
    expect(page.get_by_role("region", name="Owed to users", exact=True)).to_contain_text("Whole period")
    operations = page.locator("#figures-operations")
    operations.get_by_role("link", name="Weeks").click()
    expect(operations.get_by_role("link", name="Weeks")).to_have_attribute("aria-current", "true")
    page.wait_for_function(IS_PAINTED, arg="chart-operations-data")
    shoot(page, "dashboard-figures-year")

    page.locator("#figures-system-calculated").click()
    expect(system.get_by_text("There are no exchange rates.")).to_be_visible()
    with page.expect_download() as download:
        page.get_by_role("link", name="Owed to users: download as CSV").click()
    file = tmp_path / "figures.csv"
    download.value.save_as(file)
    rows = list(csv.reader(io.StringIO(file.read_text("utf-8-sig"))))
    opening, sold, granted, used, refunded, deducted, ended, closing = (int(cell) for cell in rows[-1][1:])
    assert opening + sold + granted - used - refunded - deducted - ended == closing
    assert AuditEntry.objects.get(action="export").actor == admin
    for title in SECTIONS:
        with page.expect_download() as download:
            page.get_by_role("link", name=f"{title}: download as PDF").click()
        file = tmp_path / "figures.pdf"
        download.value.save_as(file)
        assert file.read_bytes().startswith(b"%PDF-"), title


def test_accountant_takes_the_books_of_a_day(admin: User, page: Page, tmp_path: Path) -> None:
    sign_in(page, "adam", "/admin/tokens/")
    page.get_by_role("navigation", name="Dashboard").get_by_role("link", name="Finance").click()
    expect(page.get_by_text("No day has been written yet.")).to_be_visible()
    shoot(page, "dashboard-finance-empty")
    yesterday = timezone.now().astimezone(UTC).date() - timedelta(days=1)
    for days in range(33):
        finance.export_day(yesterday - timedelta(days=days))
    page.reload()
    shoot(page, "dashboard-finance")
    page.get_by_role("link", name="Next").click()
    expect(page.get_by_text("Page 2 of 2")).to_be_visible()
    expect(page.get_by_role("link", name="download as ZIP")).to_have_count(2)
    page.get_by_role("link", name="Previous").click()
    with page.expect_download() as download:
        page.get_by_role("link", name=f"{date_text(yesterday, 'M j, Y')}: download as ZIP").click()
    file = tmp_path / "books.zip"
    download.value.save_as(file)
    with ZipFile(file) as archive:
        rows = {
            name: list(csv.DictReader(io.StringIO(archive.read(f"{name}.csv").decode("utf-8-sig"))))
            for name in ("ledger", "liability")
        }
    [books] = rows["liability"]
    opening, sold, granted, used, refunded, deducted, ended, closing = (
        int(value) for value in list(books.values())[1:]
    )
    assert books["Day"] == yesterday.isoformat()
    assert closing == opening + sold + granted - used - refunded - deducted - ended
    assert closing - opening == sum(int(row["Tokens"]) for row in rows["ledger"]) != 0
    shutil.rmtree(finance.folder())


def test_live_figures_follow_what_happens(admin: User, open_context: OpenContext, make_user: MakeUser) -> None:
    page = open_context().new_page()
    page.clock.install()
    sign_in(page, "adam", "/admin/tokens/")
    accounts = page.locator("#figures-live dl > div").filter(has=page.get_by_text("Accounts", exact=True)).locator("dd")
    before = int(accounts.inner_text().replace(",", ""))
    page.get_by_role("region", name="Now", exact=True).locator("#figures-live-calculated").click()
    make_user("newcomer")
    page.clock.run_for(31_000)
    expect(accounts).to_have_text(f"{before + 1:,}")
    # What was opened to read stays open.
    expect(page.get_by_text("Held for operations that are running.")).to_be_visible()


def test_figures_without_scripts(admin: User, open_context: OpenContext) -> None:
    page = open_context(java_script_enabled=False).new_page()
    sign_in(page, "adam", "/admin/tokens/?period=12m")
    page.get_by_role("link", name="Show them on one plain page").click()
    expect(page.get_by_role("region", name="Customers", exact=True)).to_contain_text("Conversion")
    page.get_by_role("link", name="Last 7 days").click()
    expect(page.get_by_role("region", name="Owed to users", exact=True)).to_contain_text("Whole period")
    page.get_by_role("region", name="Operations", exact=True).get_by_role("link", name="Hours").first.click()
    expect(
        page.get_by_role("region", name="Operations", exact=True).get_by_role("link", name="Hours")
    ).to_have_attribute("aria-current", "true")


def test_figures_of_an_empty_business_on_a_phone(page: Page, make_user: MakeUser) -> None:
    make_user("adam", role="admin")
    page.set_viewport_size(PHONE)
    sign_in(page, "adam", "/admin/tokens/")
    expect(page.locator("[aria-busy]")).to_have_count(0)
    expect(page.get_by_text("No operation ended in this period.").first).to_be_visible()
    shoot(page, "dashboard-figures-empty")
    page.get_by_label("From", exact=True).fill("2026-03-02")
    page.get_by_label("To", exact=True).fill("2026-03-01")
    page.get_by_role("button", name="Show", exact=True).click()
    expect(page.get_by_text("The first day comes after the last one.")).to_be_visible()


def test_figures_are_accessible(admin: User, open_context: OpenContext) -> None:
    page = open_context(bypass_csp=True, reduced_motion="reduce").new_page()
    sign_in(page, "adam", "/admin/tokens/?period=12m")
    expect(page.locator("[aria-busy]")).to_have_count(0)
    page.locator("#figures-system-calculated").click()
    assert find_violations(page, widths=(390, 1440)) == []
