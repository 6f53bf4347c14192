"""Monthly statements: each entry in exactly one, and each adds up."""

import re
import shutil
import subprocess
from dataclasses import replace
from datetime import UTC, datetime
from itertools import pairwise
from zoneinfo import ZoneInfo

import pytest
import time_machine
from django.test import Client
from django.utils import timezone

from accounts.models import User, Workspace
from billing import history
from billing.history import statements
from billing.history.statements import (
    NoSuchStatement,
    StatementDoesNotAddUp,
    get_statement,
    list_months,
    render_statement,
)
from billing.models import TokenAccount, TokenTransaction, TokenUsage

TODAY = datetime(2026, 5, 20, 12, tzinfo=UTC)


@pytest.fixture
def nina(db: None) -> User:
    """Her ledger is empty: rows that are made at once bring no bonus."""
    [nina] = User.objects.bulk_create([User(email="nina@example.com", name="Nina Ōe", time_zone="Asia/Tokyo")])
    TokenAccount.objects.create(user=nina, workspace=Workspace.objects.create(name="Personal", owner=nina))
    return nina


def write(user: User, amount: int, *moments: datetime) -> None:
    """Entries at moments of our choice: a bonus when positive, else an operation."""
    account = TokenAccount.objects.get(user=user)
    sequence, balance = account.sequence, account.balance
    for moment in moments:
        usage = None
        if amount < 0:
            usage = TokenUsage.objects.create(
                account=account,
                user=user,
                workspace=account.workspace,
                status="succeeded",
                operation_type="chat",
                provider="openai",
                model="gpt-6-luna",
                billable_tokens=-amount,
                charge_type="multiplier",
                multiplier=1,
                completed_at=moment,
            )
        sequence, balance = sequence + 1, balance + amount
        TokenTransaction.objects.create(
            account=account,
            user=user,
            workspace=account.workspace,
            sequence=sequence,
            type="usage" if usage else "bonus",
            usage=usage,
            amount=amount,
            balance_before=balance - amount,
            balance_after=balance,
            description="Chat · gpt-6-luna" if usage else "Bonus",
            created_at=moment,
        )
    TokenAccount.objects.filter(pk=account.pk).update(sequence=sequence, balance=balance)


@pytest.fixture
def spring(nina: User) -> User:
    """February: a bonus. March: nothing. April: a bonus at each end, 61 operations on the 3rd and one on the 4th."""
    write(nina, 10_000, datetime(2026, 2, 14, tzinfo=UTC))
    write(nina, 500, datetime(2026, 4, 1, tzinfo=UTC))
    write(nina, -7, *[datetime(2026, 4, 3, 10, minute, tzinfo=UTC) for minute in range(60)])
    write(nina, -7, datetime(2026, 4, 3, 11, tzinfo=UTC))
    write(nina, -9, datetime(2026, 4, 4, tzinfo=UTC))
    write(nina, 300, datetime(2026, 4, 30, 16, tzinfo=UTC))  # in Tokyo it is May
    return nina


def test_months_chain(spring: User) -> None:
    """One ends with the balance that the next begins with, whatever the time zone parts."""
    for zone, april, may in ("UTC", 10_364, None), ("Asia/Tokyo", 10_064, 10_364):
        with timezone.override(zone), time_machine.travel(TODAY, tick=False):
            months = list_months(user_id=spring.pk)
            assert [month.first_day.month for month in months] == ([4, 2] if may is None else [5, 4, 2])
            assert sum(month.entries for month in months) == TokenAccount.objects.get(user=spring).sequence
            for newer, older in pairwise(months):
                assert newer.opening_tokens == older.closing_tokens
            assert {month.first_day.month: month.closing_tokens for month in months}[4] == april
            for month in months:
                statement = get_statement(user_id=spring.pk, year=2026, month=month.first_day.month)
                assert (statement.opening_tokens, statement.closing_tokens) == (
                    month.opening_tokens,
                    month.closing_tokens,
                )
                assert statement.totals.net_tokens == month.change_tokens


def test_many_operations_are_one_line_a_day(spring: User) -> None:
    with time_machine.travel(TODAY, tick=False):
        statement = get_statement(user_id=spring.pk, year=2026, month=4)
        assert [(line.day.day, line.type, line.description, line.tokens) for line in statement.lines] == [
            (1, "Bonus", "Bonus", 500),
            (3, "Usage", "61 operations", -427),
            (4, "Usage", "1 operation", -9),
            (30, "Bonus", "Bonus", 300),
        ]
        assert statement.is_complete
        march = get_statement(user_id=spring.pk, year=2026, month=3)
    assert (march.opening_tokens, march.closing_tokens, march.lines) == (10_000, 10_000, [])


def test_few_operations_are_listed_each(nina: User) -> None:
    write(nina, 1_000, datetime(2026, 4, 1, tzinfo=UTC))
    write(nina, -7, datetime(2026, 4, 3, 10, tzinfo=UTC), datetime(2026, 4, 3, 11, tzinfo=UTC))
    with time_machine.travel(TODAY, tick=False):
        statement = get_statement(user_id=nina.pk, year=2026, month=4)
    assert [line.description for line in statement.lines] == ["Bonus", *["Chat · gpt-6-luna"] * 2]


@pytest.mark.parametrize(
    ("year", "month"), [(2026, 1), (2026, 6), (2027, 1), (2026, 0), (2026, 13), (1, 1), (9999, 12)]
)
def test_no_statement_before_the_first_entry_or_of_the_future(spring: User, year: int, month: int) -> None:
    with time_machine.travel(TODAY, tick=False), pytest.raises(NoSuchStatement):
        get_statement(user_id=spring.pk, year=year, month=month)


def test_a_statement_that_does_not_add_up_is_not_made(spring: User, monkeypatch: pytest.MonkeyPatch) -> None:
    lines_of = statements._lines

    def one_is_missing(selection: history.Selection) -> list[statements.Line]:
        return lines_of(selection)[1:]

    def one_is_wrong(selection: history.Selection) -> list[statements.Line]:
        first, *others = lines_of(selection)
        return [replace(first, tokens=first.tokens + 1), *others]

    for wrong in one_is_missing, one_is_wrong:
        monkeypatch.setattr(statements, "_lines", wrong)
        with time_machine.travel(TODAY, tick=False), pytest.raises(StatementDoesNotAddUp):
            get_statement(user_id=spring.pk, year=2026, month=4)


def test_statements_are_shown_and_downloaded(client: Client, spring: User, alice: User) -> None:
    """Row 63: another's months are not found."""
    client.force_login(spring)
    with time_machine.travel(TODAY, tick=False):
        html = client.get("/tokens/statements/").content.decode()
        assert "May 2026" in html  # in Tokyo
        assert "so far" in html
        assert "March 2026" not in html
        answer = client.get("/tokens/statements/2026-04.pdf")
        assert answer.status_code == 200
        assert answer["Content-Type"] == "application/pdf"
        assert answer.content.startswith(b"%PDF-")
        assert client.get("/tokens/statements/2026-13.pdf").status_code == 404
        client.force_login(alice)
        assert client.get("/tokens/statements/2026-04.pdf").status_code == 404


def test_time_zones_part_the_same_ledger(spring: User) -> None:
    with time_machine.travel(TODAY, tick=False), timezone.override(ZoneInfo("Asia/Tokyo")):
        statement = get_statement(user_id=spring.pk, year=2026, month=5)
        assert [line.day.isoformat() for line in statement.lines] == ["2026-05-01"]
        assert not statement.is_complete


@pytest.mark.skipif(not shutil.which("pdftotext"), reason="reads PDFs with pdftotext")
def test_whatever_people_are_called_can_be_read(alice: User, caplog: pytest.LogCaptureFixture) -> None:
    """In any script and direction, with marks and emoji, however long."""
    # What is printed where it is not what was given; scripts that run from right to left come back in reading order.
    names = {
        "李明 Wang": "LiMing Wang",
        "김민수": "GimMinSu",
        "สมชาย ใจดี": "สมชาย ใจดี",
        "राहुल शर्मा": "राहुल शर्मा",
        "தமிழ் ሰላም": "தமிழ் ሰላም",
        "محمد علي": "محمد علي",
        "Zoë דוד כהן": "דוד כהן",
        "e\u0301a \U0001f469\u200d\U0001f467 \U0001f44d\U0001f3fd": "éa👩\u200d👧👍\U0001f3fd",
        "\u202egro.live\ue000": "gro.live[U+E000]",
        "W" * 300: "W" * 300,
        "김" * 300: "Gim" * 300,
    }
    today = timezone.localdate()
    statement = get_statement(user_id=alice.pk, year=today.year, month=today.month)
    account = TokenAccount.objects.get(user=alice)
    for name, printed in names.items():
        assert account.user is not None
        account.user.name = name
        pdf = render_statement(statement, account=account, written_at=timezone.now())
        command = ["pdftotext", "-layout", "-", "-"]
        text = subprocess.run(command, input=pdf, capture_output=True, check=True).stdout.decode()
        # Where lines break is the page's affair; marks of direction are pdftotext's.
        text = re.sub("[\\s\u202a-\u202e]", "", text)
        assert "".join(printed.split()) in text, name
    assert "missing the following glyphs" not in caplog.text
    # Nothing was used, and nothing is not less than nothing.
    assert statement.totals.tokens_out == 0
    assert "Tokensout0tokens" in text
