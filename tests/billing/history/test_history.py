"""The person's own view of the ledger: filters, pages, totals, export."""

import csv
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from io import StringIO
from typing import Any
from zoneinfo import ZoneInfo

import pytest
import time_machine
from django.db import connection
from django.test import Client
from django.test.utils import CaptureQueriesContext
from django.utils import timezone

from accounts.models import User, Workspace
from billing import history, ledger
from billing.history import Cursor, exports, get_page, get_totals, select_transactions
from billing.models import TokenAccount, TokenTransaction
from billing.pricing import TokenPools

NEW_YORK = "America/New_York"


def use(user: User, tokens: int, model: str = "gpt-6-luna") -> None:
    ledger.deduct_tokens(
        user_id=user.pk,
        tokens=tokens,
        operation=ledger.Operation("chat", "openai", model, multiplier=Decimal(1)),
        pools=TokenPools(input_tokens=tokens),
    )


def grant(user: User, by: User, tokens: int, reason: str = "Sorry") -> None:
    ledger.add_tokens(
        user_id=user.pk,
        tokens=tokens,
        type="admin_grant",
        description=reason,
        admin_id=by.pk,
        idempotency_key=f"grant-{tokens}-{reason}",
    )


def at(user: User, *moments: datetime) -> None:
    """The user's ledger, written at these moments. The database's clock is not ours to set."""
    account = TokenAccount.objects.get(user=user)
    sequence, balance = account.sequence, account.balance
    for moment in moments:
        sequence, balance = sequence + 1, balance + 100
        TokenTransaction.objects.create(
            account=account,
            user=user,
            workspace=account.workspace,
            sequence=sequence,
            type="bonus",
            amount=100,
            balance_before=balance - 100,
            balance_after=balance,
            description=moment.isoformat(),
            created_at=moment,
        )
    TokenAccount.objects.filter(pk=account.pk).update(sequence=sequence, balance=balance)


@pytest.fixture
def nina(db: None) -> User:
    """Her ledger is empty: rows that are made at once bring no bonus."""
    [nina] = User.objects.bulk_create([User(email="nina@example.com", time_zone="UTC")])
    TokenAccount.objects.create(user=nina, workspace=Workspace.objects.create(name="Personal", owner=nina))
    return nina


@pytest.fixture
def busy(alice: User, susan: User) -> User:
    """Alice with 31 entries: a bonus, 20 operations of ten amounts, ten grants."""
    for number in range(20):
        use(alice, 10 + number % 10)
        if number % 2:
            grant(alice, susan, 1_000 + number)
    return alice


def sequences(entries: list[TokenTransaction]) -> list[int]:
    return [entry.sequence for entry in entries]


def walk(selection: history.Selection, order: str, limit: int) -> list[list[int]]:
    """All pages, forwards; then backwards, which must be the same ones."""
    pages, cursor = [], None
    while True:
        page = get_page(selection, order=order, cursor=cursor, limit=limit)
        pages.append(page)
        if page.next is None:
            break
        cursor = Cursor.parse(str(page.next))
    back, cursor = [pages[-1]], pages[-1].previous
    while cursor is not None:
        back.append(get_page(selection, order=order, cursor=cursor, limit=limit))
        cursor = back[-1].previous
    forwards = [sequences(page.entries) for page in pages]
    assert [sequences(page.entries) for page in reversed(back)] == forwards
    return forwards


@pytest.mark.parametrize("order", history.ORDERS)
@pytest.mark.parametrize(
    "wanted", [{}, {"types": ["usage"]}, {"types": ["admin_grant", "bonus"]}, {"search": "LUNA"}], ids=str
)
def test_pages_are_the_sorted_selection_cut_in_pieces(busy: User, order: str, wanted: dict[str, Any]) -> None:
    selection = select_transactions(user_id=busy.pk, **wanted)
    field = order.lstrip("-")
    labels = dict(TokenTransaction.Type.choices)

    def key(entry: TokenTransaction) -> Any:
        return labels[entry.type] if field == "type" else getattr(entry, field)

    newest_first = sorted(selection.entries, key=lambda entry: -entry.sequence)
    expected = sequences(sorted(newest_first, key=key, reverse=order.startswith("-")))
    assert len(expected) > 4
    pages = walk(selection, order, limit=4)
    assert [sequence for page in pages for sequence in page] == expected
    assert {len(page) for page in pages[:-1]} == {4}


def test_totals_are_what_the_entries_add_up_to(busy: User) -> None:
    """However they are computed: from balances, from the few entries that are not usage, or from what was found."""
    moments = list(TokenTransaction.objects.filter(user=busy).order_by("sequence").values_list("created_at", flat=True))
    for types in [], ["usage"], ["usage", "bonus"], ["admin_grant"], ["bonus", "admin_grant"], ["refund"]:
        for since, until in (None, None), (moments[3], moments[17]), (moments[17], moments[3]):
            for search in "", "luna", "nowhere":
                selection = select_transactions(user_id=busy.pk, types=types, since=since, until=until, search=search)
                amounts = [entry.amount for entry in selection.entries]
                assert get_totals(selection) == history.Totals(
                    entries=len(amounts),
                    tokens_in=sum(amount for amount in amounts if amount > 0),
                    tokens_out=-sum(amount for amount in amounts if amount < 0),
                )
    assert get_totals(select_transactions(user_id=busy.pk)).net_tokens == TokenAccount.objects.get(user=busy).balance


def test_search_and_sort_say_when_they_are_bounded(busy: User, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not select_transactions(user_id=busy.pk, search="luna").is_search_bounded
    assert not get_page(select_transactions(user_id=busy.pk), order="amount").is_sort_bounded
    monkeypatch.setattr(history, "SEARCHED_ENTRIES", 10)
    monkeypatch.setattr(history, "SORTED_ENTRIES", 5)
    searched = select_transactions(user_id=busy.pk, search="luna")
    assert searched.is_search_bounded
    operations = TokenTransaction.objects.filter(user=busy, type="usage").order_by("sequence")
    assert sequences(list(searched.entries.order_by("sequence"))) == sequences(list(operations.filter(sequence__gt=21)))
    assert searched.oldest_moment() == TokenTransaction.objects.get(user=busy, sequence=22).created_at
    assert not select_transactions(user_id=busy.pk, search="sorry", types=["admin_grant"]).is_search_bounded
    page = get_page(select_transactions(user_id=busy.pk, types=["usage"]), order="amount")
    assert page.is_sort_bounded
    newest = TokenTransaction.objects.filter(user=busy, type="usage").order_by("-sequence")[:5]
    assert sorted(sequences(page.entries)) == sorted(sequences(list(newest)))
    assert [entry.amount for entry in page.entries] == sorted(entry.amount for entry in newest)


# --- The page -------------------------------------------------------------------------------------------------------


@pytest.fixture
def reader(client: Client, busy: User) -> Client:
    client.force_login(busy)
    return client


def test_page_reads_the_state_from_its_address(reader: Client) -> None:
    answer = reader.get("/tokens/history/?type=admin_grant&type=bonus&sort=-amount&search=sorry")
    html = answer.content.decode()
    assert answer.status_code == 200
    assert html.count("<tr ") == 1 + 10
    assert 'aria-sort="descending"' in html
    assert html.index("+1,019") < html.index("+1,001")
    assert 'href="/tokens/export.csv?type=admin_grant&amp;type=bonus&amp;search=sorry"' in html


@pytest.mark.parametrize(
    "query", ["page=nonsense", "page=after-99999999999999999999", "page=before-²", "sort=user", "page=after-0"]
)
def test_a_meddled_address_shows_a_page(reader: Client, query: str) -> None:
    assert reader.get(f"/tokens/history/?{query}").status_code == 200


@pytest.mark.parametrize(
    ("query", "message"),
    [
        ("from=2026-11-30&to=2026-11-01", "The first day comes after the last one."),
        ("from=yesterday", "Enter days as"),
        ("from=0001-01-01", "Choose days from"),
        ("to=9999-12-31", "Choose days from"),
        ("period=century", "There is no such period"),
        ("type=theft", "Select a valid choice"),
        ("search=%00", "Null characters"),
    ],
)
def test_what_cannot_be_asked_is_said_and_kept(reader: Client, query: str, message: str) -> None:
    """Row 57: also text that the database would refuse."""
    answer = reader.get(f"/tokens/history/?{query}")
    assert answer.status_code == 422
    assert message in answer.content.decode()
    if query.startswith("from=2026"):
        assert 'value="2026-11-30"' in answer.content.decode()
    export = reader.get(f"/tokens/export.csv?{query}")
    assert export.status_code == 302
    assert export["Location"].startswith("/tokens/history/?")


def test_days_are_those_of_the_readers_time_zone(client: Client, nina: User) -> None:
    """Both days are included, from midnight to midnight where the reader is."""
    zone = ZoneInfo(NEW_YORK)
    User.objects.filter(pk=nina.pk).update(time_zone=NEW_YORK)
    first, last = datetime(2026, 3, 7, tzinfo=zone), datetime(2026, 3, 9, tzinfo=zone)  # the clock changes between
    microsecond = timedelta(microseconds=1)
    at(nina, *(moment.astimezone(UTC) for moment in (first - microsecond, first, last - microsecond, last)))
    client.force_login(nina)
    answer = client.get("/tokens/export.csv?from=2026-03-07&to=2026-03-08")
    assert [row["Entry"] for row in rows_of(answer)] == ["3", "2"]
    assert [row["Date"] for row in rows_of(client.get("/tokens/export.csv?from=2026-03-07"))] == [
        "2026-03-09T00:00:00-04:00",
        "2026-03-08T23:59:59-04:00",
        "2026-03-07T00:00:00-05:00",
    ]
    with time_machine.travel(datetime(2026, 3, 8, 3, 0, tzinfo=UTC), tick=False):  # still the 7th in New York
        assert [row["Entry"] for row in rows_of(client.get("/tokens/export.csv?period=today"))] == ["2"]
        rows = rows_of(client.get("/tokens/export.csv?period=year"))
        assert [row["Entry"] for row in rows] == ["2", "1"]


def test_nobody_elses_entries(reader: Client, bob: User, busy: User) -> None:
    """Row 63."""
    use(bob, 7, model="gpt-6.1-terra")
    assert "gpt-6.1-terra" not in reader.get("/tokens/history/").content.decode()
    assert "gpt-6.1-terra" not in "".join(row["Description"] for row in rows_of(reader.get("/tokens/export.csv")))
    nobody = Client()
    for path in "/tokens/history/", "/tokens/export.csv", "/tokens/statements/", "/tokens/statements/2026-11.pdf":
        assert nobody.get(path).status_code == 302


def test_history_escapes_what_it_shows(reader: Client, busy: User, susan: User) -> None:
    """Row 72."""
    grant(busy, susan, 5, reason="<script>alert(1)</script>")
    html = reader.get("/tokens/history/?search=<script>").content.decode()
    assert "<script>alert(1)" not in html
    assert html.count("&lt;script&gt;alert(1)") == 1


def test_a_page_costs_the_same_wherever_it_is(reader: Client) -> None:
    def statements(query: str) -> int:
        with CaptureQueriesContext(connection) as queries:
            assert reader.get(f"/tokens/history/?{query}").status_code == 200
        assert not [query["sql"] for query in queries if "OFFSET" in query["sql"]]
        return len(queries)

    statements("")
    assert statements("page=after-28") == statements("")


# --- The export -----------------------------------------------------------------------------------------------------


def text_of(answer: Any) -> str:
    assert answer.status_code == 200
    assert answer.streaming
    return b"".join(answer.streaming_content).decode()


def rows_of(answer: Any) -> list[dict[str, str]]:
    text = text_of(answer)
    assert text.startswith("\ufeffEntry,Date,")
    return list(csv.DictReader(StringIO(text.removeprefix("\ufeff"), newline="")))


def test_export_is_what_the_page_selects(reader: Client, busy: User) -> None:
    for query in "", "type=usage", "type=admin_grant&search=SORRY", "period=today", "from=2000-01-01&to=2000-01-02":
        html = reader.get(f"/tokens/history/?{query}").content.decode()
        rows = rows_of(reader.get(f"/tokens/export.csv?{query}"))
        assert f"<dd>{len(rows):,}</dd>" in html
    whole = rows_of(reader.get("/tokens/export.csv"))
    assert [int(row["Entry"]) for row in whole] == list(range(31, 0, -1))
    assert sum(int(row["Tokens"]) for row in whole) == TokenAccount.objects.get(user=busy).balance
    assert {row["Type"] for row in whole} == {"Bonus", "Usage", "Grant"}
    newest = TokenTransaction.objects.get(user=busy, sequence=31)
    assert whole[0]["Date"] == timezone.localtime(newest.created_at).isoformat(timespec="seconds")


@pytest.mark.parametrize(
    "reason",
    ["=1+1", "+1", "-1", "@SUM(A1)", "\t=1", "\r=1", "\n=1", " =1", "＝1", "-2+3+cmd|' /C calc'!A0", '=HYPERLINK("x")'],
)
def test_no_cell_is_a_formula(reader: Client, busy: User, susan: User, reason: str) -> None:
    """Row 67. Numbers, negative ones too, stay numbers."""
    account = TokenAccount.objects.get(user=busy)
    TokenTransaction.objects.create(
        account=account,
        user=busy,
        workspace=account.workspace,
        sequence=account.sequence + 1,
        type="bonus",
        amount=1,
        balance_before=account.balance,
        balance_after=account.balance + 1,
        description=reason,
    )
    TokenAccount.objects.filter(pk=account.pk).update(sequence=account.sequence + 1, balance=account.balance + 1)
    newest, before = rows_of(reader.get("/tokens/export.csv"))[:2]
    assert newest["Description"] == exports.neutralise(reason) != reason
    assert newest["Description"].startswith("'")
    assert newest["Tokens"] == "1"
    older = rows_of(reader.get("/tokens/export.csv?type=usage"))[0]
    assert older["Tokens"].startswith("-")
    assert int(older["Tokens"]) < 0
    assert not any(cell.startswith(("=", "+", "@", "\t", "\r")) for cell in (newest | before).values())


def test_plain_text_stays_as_it_is() -> None:
    for text in "", "Chat · gpt-6-luna", "5 = 5", "a-b", "'quoted'":
        assert exports.neutralise(text) == text


def test_export_reads_on_while_it_is_written(reader: Client, busy: User, monkeypatch: pytest.MonkeyPatch) -> None:
    """In batches: neither all rows at once nor one by one; what is written meanwhile does not show."""
    monkeypatch.setattr(history, "EXPORT_BATCH", 10)
    selection = select_transactions(user_id=busy.pk)
    with CaptureQueriesContext(connection) as queries:
        entries: Iterator[TokenTransaction] = history.iterate(selection)
        first = next(entries)
        use(busy, 3)
        rest = list(entries)
    assert [first.sequence, *sequences(rest)] == list(range(31, 0, -1))
    assert 4 <= len([query for query in queries if query["sql"].startswith("SELECT")]) <= 8
