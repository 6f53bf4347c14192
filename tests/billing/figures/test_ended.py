"""Tokens that ended unspent: every place that adds the ledger up knows them, and comes to the same."""

from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from django.core.management import call_command
from django.test import Client
from django.utils import timezone
from pytest_django.fixtures import Settings

from accounts.models import User
from billing import history, ledger
from billing.figures import business, finance
from billing.figures.liability import liability_roll_forward
from billing.figures.sums import BEGINNING
from billing.history import exports, statements
from billing.models import LedgerHour, TokenAccount, TokenTransaction
from kit import database
from tests.billing.figures.test_finance import read as read_books
from tests.billing.figures.test_finance import tokens
from tests.billing.figures.test_rollups import roll_up_until
from tests.billing.ledger.test_ledger import record
from tests.billing.ledger.test_lots import end, give_lot
from tests.conftest import MakeUser
from tests.test_metrics import read as read_metrics
from tests.test_metrics import value

pytestmark = pytest.mark.django_db
DAY = timedelta(days=1)


def test_what_ended_is_in_every_sum(
    make_user: MakeUser,
    susan: User,
    client: Client,
    settings: Settings,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Two lots end, one of them spent in part: 450 of 600 tokens ended unspent, before a roll-up and after it."""
    settings.MEDIA_ROOT = str(tmp_path)
    payer = make_user("payer")
    used, unused = give_lot(payer, 500, days=1), give_lot(payer, 100, days=2)
    record(payer, 150)
    end(used, unused)
    assert len(ledger.expire_lots()) == 1
    account = TokenAccount.objects.get(user=payer)
    booked_at = timezone.now()
    owed = sum(TokenAccount.objects.values_list("balance", flat=True))

    for rolled in (False, True):
        if rolled:
            roll_up_until(booked_at + 2 * timedelta(hours=1))
            assert LedgerHour.objects.get(type="expiry").tokens == -450
        since, until = booked_at - DAY, booked_at + DAY
        [row] = liability_roll_forward(edges=[BEGINNING, until])
        assert (row.ended_tokens, row.used_tokens, row.closing_tokens) == (450, 150, owed)
        came = row.opening_tokens + row.sold_tokens + row.granted_tokens
        went = row.used_tokens + row.refunded_tokens + row.deducted_tokens + row.ended_tokens
        assert came - went == row.closing_tokens
        figures = business.get_token_stats(since=since, until=until)
        assert (figures.ended_tokens, figures.deducted_tokens) == (450, 0)
        assert figures.rate.circulated_tokens == came - 450  # those are in nobody's balance, and nobody used them
        samples = read_metrics()
        assert value("postmate_ended_tokens_total", samples) == 450
        assert value("postmate_balance_tokens", samples) == value("postmate_ledger_tokens", samples) == owed
    call_command("verify_ledger")

    client.force_login(susan)
    page = client.get("/admin/tokens/sections/liability.csv?period=7d").content.decode("utf-8-sig").splitlines()
    heads = next(line for line in page if "Ended" in line and "Closing" in line).split(",")
    assert page[-1].split(",")[heads.index("− Ended (tokens)")] == "450"

    monkeypatch.setattr(database, "now", lambda: datetime.now(UTC) + DAY)
    books = read_books(finance.export_day(booked_at.astimezone(UTC).date()))
    [liability] = books["liability"]
    assert int(liability["Ended"]) == -tokens(books["ledger"], "expiry") == 450

    today = timezone.localdate()
    statement = statements.get_statement(user_id=payer.pk, year=today.year, month=today.month)
    assert statement.closing_tokens == account.balance == 9_000 + 1_000
    assert sorted(line.tokens for line in statement.lines if line.type == "Ended") == [-350, -100]
    selection = history.select_transactions(user_id=payer.pk, types=["expiry"])
    assert history.get_totals(selection).tokens_out == 450
    lines = "".join(exports.export_transactions(selection)).splitlines()
    assert sorted(line.split(",")[2:5:2] for line in lines[1:]) == [["Ended", "-100"], ["Ended", "-350"]]

    client.force_login(payer)
    shown = client.get("/tokens/history/?type=expiry").content.decode()
    assert shown.count("tone-warn") == TokenTransaction.objects.filter(type="expiry").count() == 2
