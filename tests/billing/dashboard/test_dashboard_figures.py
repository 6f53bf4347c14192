"""The pages with the figures of the whole business: what they say is what was calculated, and files say the same."""

import csv
import re
import shutil
import subprocess
from datetime import timedelta
from decimal import Decimal
from html import unescape
from io import StringIO

import pytest
from django.db import connection
from django.test import Client
from django.utils import timezone

from accounts.models import AuditEntry, User
from billing.dashboard.content import COUNT, MILLISECONDS, PERCENT, USD_MICROS, Amount, Figure, cents_of, change_text
from billing.dashboard.sections import SECTIONS
from billing.figures import business, sums
from billing.models import LedgerHour, TokenAccount
from kit import periods
from tests.billing.figures.test_rollups import invent_history, roll_up_until

pytestmark = pytest.mark.django_db


@pytest.fixture
def admin(adam: User, client: Client) -> Client:
    client.force_login(adam)
    return client


@pytest.fixture
def history(db: None) -> None:
    """Three months of an invented past."""
    invent_history(transactions=400, users=20, months=3, seed=3)
    roll_up_until(timezone.now() - timedelta(days=1))


def section(client: Client, name: str, query: str = "") -> str:
    response = client.get(f"/admin/tokens/sections/{name}/?{query}", headers={"HX-Request": "true"})
    assert response.status_code == 200
    return " ".join(unescape(response.content.decode()).split())


def figures(text: str) -> dict[str, str]:
    """The figures on top of a section, by their names."""
    return dict(re.findall(r"<dt>([^<]+)</dt> <dd> (?:<a [^>]+>)?([^<]+?)(?:</a>)? <", text[: text.index("</dl>")]))


def rows(client: Client, name: str, query: str = "") -> list[list[str]]:
    response = client.get(f"/admin/tokens/sections/{name}.csv?{query}")
    assert response.status_code == 200
    assert response["Content-Type"] == "text/csv; charset=utf-8"
    assert f"postmate-{name}-" in response["Content-Disposition"]
    return list(csv.reader(StringIO(response.content.decode("utf-8-sig"))))


def test_page_opens_without_calculating_anything(history: None, admin: Client) -> None:
    text = admin.get("/admin/tokens/").content.decode()
    for name in SECTIONS:
        assert f'hx-get="/admin/tokens/sections/{name}/?"' in text
    assert "Owed to users" in text
    assert "<dt>" not in text


def test_plain_page_has_every_section(history: None, admin: Client) -> None:
    text = admin.get("/admin/tokens/?all=1&period=12m").content.decode()
    for name, each in SECTIONS.items():
        assert f'id="figures-{name}"' in text
        assert each.title in text
    assert text.count("How this is calculated") == text.count('<dl class="facts">') == len(SECTIONS)


def test_section_opened_in_a_window_leads_to_the_page(admin: Client) -> None:
    response = admin.get("/admin/tokens/sections/models/?period=7d&by=hour&evil=1")
    assert response["Location"] == "/admin/tokens/?period=7d&by=hour&all=1#figures-models"
    assert admin.get("/admin/tokens/sections/nothing/").status_code == 404
    assert admin.get("/admin/tokens/sections/nothing.csv").status_code == 404


@pytest.mark.parametrize("name", SECTIONS)
@pytest.mark.parametrize("query", ["", "period=today", "period=all", "period=12m", "from=2001-01-01&to=2001-02-01"])
def test_sections_of_an_empty_database(admin: Client, name: str, query: str) -> None:
    TokenAccount.objects.all().update(balance=0)
    assert "How this is calculated" in section(admin, name, query)
    assert rows(admin, name, query)


def test_system_section_says_what_was_calculated(history: None, admin: Client) -> None:
    today = timezone.localdate()
    since = periods.midnight(today - timedelta(days=29))
    stats = business.get_token_stats(since=since, until=periods.midnight(today + timedelta(days=1)))
    shown = figures(section(admin, "system", "period=30d"))
    assert stats.usage.billable_tokens > 0
    assert shown["Billable tokens"] == f"{stats.usage.billable_tokens:,}"
    assert shown["Actual tokens"] == f"{stats.usage.actual_tokens:,}"
    assert shown["Operations"] == f"{stats.usage.operations:,}"
    assert shown["New accounts"] == f"{stats.new_accounts:,}"
    found = {row[0]: row for row in rows(admin, "system", "period=30d") if len(row) == 4}
    assert found["Billable tokens"][1:3] == [str(stats.usage.billable_tokens), "tokens"]
    assert Decimal(found["Real margin"][1]) == Decimal(stats.real_margin_microusd) / 1_000_000
    revenue = [row for row in rows(admin, "system", "period=30d") if row and row[0] in ("USD", "EUR", "GBP")]
    assert {row[0].lower(): Decimal(row[6]) * 100 for row in revenue} == {
        each.currency: each.net_cents for each in stats.revenue
    }


def test_models_and_operations_add_up(history: None, admin: Client) -> None:
    today = timezone.localdate()
    since, until = periods.midnight(today - timedelta(days=29)), periods.midnight(today + timedelta(days=1))
    total = sums.sum_usage(edges=[since, until])[0, ()]
    models = rows(admin, "models")
    head = models.index(next(row for row in models if row and row[0] == "Model"))
    assert sum(int(row[1]) for row in models[head + 1 :]) == total.operations
    assert sum(int(row[2]) for row in models[head + 1 :]) == total.billable_tokens
    operations = rows(admin, "operations", "by=week")
    all_types = next(row for row in operations if row and row[0] == "All")
    assert int(all_types[1]) == total.operations
    begin = operations.index(next(row for row in operations if row and row[0] == "Week"))
    weeks = operations[begin + 1 : operations.index([], begin)]
    head_row = operations[begin]
    assert sum(int(week[head_row.index("All")]) for week in weeks) == total.operations
    assert sum(int(week[head_row.index("Failed")]) for week in weeks) == total.failed


def test_liability_balances_in_the_file(history: None, admin: Client) -> None:
    found = rows(admin, "liability", "period=12m")
    begin = found.index(next(row for row in found if row and row[0] == "Month"))
    table = [[int(cell) for cell in row[1:]] for row in found[begin + 1 :]]
    assert len(table) == 13
    for opening, sold, granted, used, refunded, deducted, ended, closing in table:
        assert opening + sold + granted - used - refunded - deducted - ended == closing
    owed = int(next(row for row in rows(admin, "live") if row[:1] == ["Owed to users"])[1])
    assert table[-1][-1] == owed


def test_liability_that_does_not_balance_is_said(history: None, admin: Client) -> None:
    with connection.cursor() as cursor:
        cursor.execute("UPDATE billing_ledgerhour SET tokens = tokens + 1")
    assert LedgerHour.objects.exists()
    text = section(admin, "liability", "period=12m")
    assert 'role="alert"' in text
    assert "Run manage.py verify_ledger" in text


def test_cohorts_spend_what_they_spent(history: None, admin: Client) -> None:
    """Each row's months come to its sum, and none is shown that is yet to come."""
    found = rows(admin, "customers", "period=month")
    for begin, row in enumerate(found):
        if row[1:2] and row[1].startswith("Until now"):
            for cohort in found[begin + 1 :]:
                if len(cohort) != len(row):
                    break
                cells = [Decimal(cell) for cell in cohort[2:] if cell]
                assert sum(cells) == Decimal(cohort[1])
            break
    else:
        pytest.fail("there is no table of what cohorts spent")
    months = {row[0] for row in found if row and re.fullmatch("[A-Z][a-z]{2} 20[0-9]{2}", row[0])}
    assert timezone.localdate().strftime("%b %Y") in months


def test_comparison_ends_where_this_period_has_come_to(admin: Client) -> None:
    assert "Compared with the 7 days before, up to the same time." in section_text(admin, "period=7d")
    assert "Compared with the day before, up to the same time." in section_text(admin, "period=today")
    assert "Compared with the 3 days before." in section_text(admin, "from=2026-03-01&to=2026-03-03")
    assert "Compared with" not in section_text(admin, "period=all")


def section_text(client: Client, query: str) -> str:
    text = re.sub(r"<[^>]*>", "", client.get(f"/admin/tokens/?{query}").content.decode())
    return re.sub(r"\s+([.,])", r"\1", " ".join(text.split()))


@pytest.mark.parametrize(
    "query", ["period=never", "from=2026-03-02&to=2026-03-01", "from=2026-02-30", "from=%00", "from=2099-01-01"]
)
def test_wrong_periods_are_told_apart_from_the_figures(admin: Client, query: str) -> None:
    text = admin.get(f"/admin/tokens/?{query}&all=1").content.decode()
    assert 'id="period-error"' in text
    assert "Last 30 days" in text


def test_exports_are_noted(admin: Client, adam: User) -> None:
    for name, about in [("system", "2026-03-01 to 2026-03-31"), ("live", "now")]:
        rows(admin, name, "from=2026-03-01&to=2026-03-31")
        entry = AuditEntry.objects.latest("pk")
        assert (entry.action, entry.outcome, entry.actor) == ("export", "done", adam)
        assert about in entry.summary


def test_names_in_files_are_no_formulas(history: None, admin: Client) -> None:
    """Row 67: a package may be called anything."""
    with connection.cursor() as cursor:
        cursor.execute("UPDATE billing_purchase SET package_name = '=1+1'")
    names = {row[0] for row in rows(admin, "customers", "period=12m") if row}
    assert "'=1+1" in names
    assert "=1+1" not in names


@pytest.mark.parametrize("path", ["", "sections/live/", "sections/live.csv"])
def test_figures_are_for_admins(client: Client, alice: User, susan: User, path: str) -> None:
    address = f"/admin/tokens/{path}"
    assert client.get(address).status_code == 302
    client.force_login(alice)
    assert client.get(address).status_code == 403
    client.force_login(susan)
    assert client.get(address, headers={"HX-Request": "true"}).status_code == 200


@pytest.mark.parametrize(
    ("amount", "text", "number"),
    [
        (Amount(None, COUNT), "–", None),
        (Amount(-1_234, COUNT), "−1,234", -1_234),
        (Amount(-150, cents_of("usd")), "−$1.50", Decimal("-1.5")),
        (Amount(123_456_789, cents_of("eur")), "€1,234,567.89", Decimal("1234567.89")),
        (Amount(0, USD_MICROS), "$0.00", Decimal(0)),
        (Amount(3_456, USD_MICROS), "$0.0034", Decimal("0.003456")),
        (Amount(99, USD_MICROS), "< $0.0001", Decimal("0.000099")),
        (Amount(-1_239_999, USD_MICROS), "−$1.23", Decimal("-1.239999")),
        (Amount(333, PERCENT), "33.3 %", Decimal("33.3")),
        (Amount(-5, PERCENT), "−0.5 %", Decimal("-0.5")),
        (Amount(999, MILLISECONDS), "999 ms", 999),
        (Amount(1_201, MILLISECONDS), "1.3 s", 1_201),
    ],
)
def test_amounts_are_written_for_people_and_for_files(amount: Amount, text: str, number: object) -> None:
    assert (amount.text, amount.number) == (text, number)


def test_changes_are_told_in_words() -> None:
    assert change_text(150, 100, COUNT) == "50 % more"
    assert change_text(100, 150, COUNT) == "33 % less"
    assert change_text(1_011, 1_000, COUNT) == "1.1 % more"
    assert change_text(7, 7, COUNT) == "as before"
    assert change_text(100_001, 100_000, COUNT) == "about as before"
    assert change_text(5, 0, COUNT) == "0 before"
    assert change_text(1_099, 100, COUNT) == "999 % more"
    assert change_text(996_724, 77, COUNT) == "77 before"
    assert change_text(-5, 100, cents_of("usd")) == "$1.00 before"
    assert change_text(100, 200, PERCENT) == "20 % before"
    assert Figure("x", Amount(5, COUNT), Amount(None, COUNT)).change == ""


@pytest.mark.parametrize("name", SECTIONS)
def test_report_of_an_empty_database(admin: Client, name: str) -> None:
    TokenAccount.objects.all().update(balance=0)
    for query in ("", "period=today", "period=all"):
        response = admin.get(f"/admin/tokens/sections/{name}.pdf?{query}")
        assert response["Content-Type"] == "application/pdf"
        assert response.content.startswith(b"%PDF-")


@pytest.mark.skipif(not shutil.which("pdftotext"), reason="reads PDFs with pdftotext")
def test_report_says_what_the_page_and_the_file_say(history: None, admin: Client) -> None:
    """Every table, however wide, with what it means; and the audit log knows."""
    for name, each in SECTIONS.items():
        report = admin.get(f"/admin/tokens/sections/{name}.pdf?period=12m")
        assert f"postmate-{name}-" in report["Content-Disposition"]
        command = ["pdftotext", "-layout", "-", "-"]
        text = subprocess.run(command, input=report.content, capture_output=True, check=True).stdout.decode()
        words = " ".join(text.split())
        assert f"Dashboard: {each.title}" in words
        assert timezone.get_current_timezone_name() in words
        assert "How this is calculated" in words
        # The page's numbers, but for how things stand now, which go on while one looks.
        if not each.polls:
            shown = figures(section(admin, name, "period=12m")) if name in ("system", "customers", "liability") else {}
            for label, value in shown.items():
                assert re.search(rf"{re.escape(label)} +{re.escape(value)}", text), (name, label, value)
        titles = [row[0] for row in rows(admin, name, "period=12m") if len(row) == 1]
        assert all(title in words for title in titles), name
    entries = AuditEntry.objects.filter(action="export", summary__endswith="as PDF")
    assert entries.count() == len(SECTIONS)
