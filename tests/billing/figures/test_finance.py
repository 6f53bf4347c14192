"""The nightly finance export: it balances, whole or not at all."""

import csv
import os
import random
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from datetime import UTC, date, timedelta
from decimal import Decimal
from io import StringIO, TextIOWrapper
from pathlib import Path
from typing import Any
from zipfile import ZipFile

import pytest
from django.core.management import CommandError, call_command
from django.db import connection, transaction
from django.db.models import F, Sum
from django.test import Client
from django.utils import timezone
from pytest_django.fixtures import Settings

from accounts.models import AuditEntry, User
from billing import tasks
from billing.figures import finance, sums
from billing.figures.liability import LiabilityDoesNotBalance, liability_entries
from billing.models import LedgerHour, PaymentReversal, Purchase, TokenAccount, TokenTransaction, TokenUsage
from kit.periods import midnight
from tests.billing.figures.test_rollups import invent_history, roll_up_until
from tests.billing.ledger.test_initialize_accounts import DEADLINE_SECONDS, database_url, is_somebody_waiting_for_a_lock
from tests.servers import PROJECT

DAY = timedelta(days=1)
FILES = ["ledger.csv", "purchases.csv", "refunds.csv", "reversals.csv", "liability.csv"]


@pytest.fixture(autouse=True)
def media(settings: Settings, tmp_path: Path) -> Path:
    settings.MEDIA_ROOT = str(tmp_path)
    return tmp_path / "finance"


@pytest.fixture
def yesterday() -> date:
    return timezone.now().astimezone(UTC).date() - DAY


def read(path: Path) -> dict[str, list[dict[str, str]]]:
    with ZipFile(path) as archive:
        assert archive.testzip() is None
        assert archive.namelist() == FILES
        return {
            name.removesuffix(".csv"): list(csv.DictReader(TextIOWrapper(archive.open(name), "utf-8-sig")))
            for name in FILES
        }


def tokens(rows: list[dict[str, str]], *types: str) -> int:
    return sum(int(row["Tokens"]) for row in rows if not types or row["Type"] in types)


def refund_yesterday() -> None:
    """One that is certain: an invented history may have none."""
    sale = TokenTransaction.objects.filter(type="purchase").latest("pk")
    account = TokenAccount.objects.get(pk=sale.account_id)
    TokenTransaction.objects.create(
        account=account, user_id=sale.user_id, workspace_id=sale.workspace_id, sequence=account.sequence + 1,
        type="refund", amount=-7, balance_before=account.balance, balance_after=account.balance - 7,
        purchase_id=sale.purchase_id, paid_cents=-100, currency=sale.currency, created_at=timezone.now() - DAY,
    )  # fmt: skip
    TokenAccount.objects.filter(pk=account.pk).update(balance=F("balance") - 7, sequence=F("sequence") + 1)


def debit_over_midnight(day: date) -> None:
    """An operation that began before the day and ended in it: it counts on the day, whenever its entry was written."""
    begun_at, ended_at = midnight(day, UTC) - timedelta(seconds=10), midnight(day, UTC) + timedelta(seconds=5)
    earlier = TokenTransaction.objects.filter(type="usage").select_related("account").latest("pk")
    account = earlier.account
    usage = TokenUsage.objects.create(
        account=account, user_id=earlier.user_id or 0, workspace_id=earlier.workspace_id, operation_type="chat",
        provider="openai", model="gpt-6-luna", status="succeeded", charge_type="multiplier", multiplier=1,
        input_tokens=9, actual_tokens=9, billable_tokens=9, reserved_tokens=9, created_at=begun_at,
        completed_at=ended_at,
    )  # fmt: skip
    TokenTransaction.objects.create(
        account=account, user_id=earlier.user_id or 0, workspace_id=earlier.workspace_id, sequence=account.sequence + 1,
        type="usage", amount=-9, balance_before=account.balance, balance_after=account.balance - 9, usage=usage,
        created_at=begun_at,
    )  # fmt: skip
    TokenAccount.objects.filter(pk=account.pk).update(balance=F("balance") - 9, sequence=F("sequence") + 1)


@pytest.mark.django_db
@pytest.mark.parametrize("seed", [1, 2])
def test_days_of_a_random_history_balance(yesterday: date, seed: int) -> None:
    """Each day to the token, and one after the other: nothing is in two files, nothing in none."""
    invent_history(transactions=1_000, users=30, months=3, seed=seed)
    refund_yesterday()
    debit_over_midnight(yesterday)
    roll_up_until(timezone.now() - random.Random(seed).randrange(20) * DAY)  # noqa: S311 – chance, no secret
    first_at = TokenTransaction.objects.earliest("created_at").created_at.astimezone(UTC)
    days = [yesterday - number * DAY for number in range((yesterday - first_at.date()).days, -1, -1)]
    seen: set[str] = set()
    closing = 0
    refunded = sold_for = Decimal(0)
    for day in days:
        found = read(finance.export_day(day))
        ledger, [liability] = found["ledger"], found["liability"]
        opening, sold, granted, used, taken, deducted, ended, closed = map(int, list(liability.values())[1:])
        assert opening == closing
        assert opening + sold + granted - used - taken - deducted - ended == closed
        assert sold == tokens(ledger, "purchase", "auto_recharge") == tokens(found["purchases"])
        assert granted == tokens(ledger, "admin_grant", "bonus")
        assert used == -tokens(ledger, "usage")
        assert taken == -tokens(ledger, "refund") == -tokens(found["refunds"])
        assert deducted == -tokens(ledger, "admin_deduction")
        assert ended == -tokens(ledger, "expiry")
        numbers = {row["Entry"] for row in ledger}
        assert len(numbers) == len(ledger)
        assert not numbers & seen
        assert all(row["Counted at"].startswith(day.isoformat()) for row in ledger)
        seen |= numbers
        closing = closed
        refunded += sum(Decimal(row["Money"]) for row in found["refunds"])
        sold_for += sum(Decimal(row["Revenue"]) for row in found["purchases"])
    end = midnight(yesterday + DAY, UTC)
    booked = liability_entries(since=sums.BEGINNING, until=end)
    assert seen == {str(pk) for pk in booked.values_list("pk", flat=True)}
    assert closing == booked.aggregate(tokens=Sum("amount"))["tokens"]
    money = {row["type"]: row["cents"] for row in booked.values("type").annotate(cents=Sum("paid_cents"))}
    assert refunded * 100 == money["refund"] < 0
    assert sold_for * 100 == money["purchase"] + money.get("auto_recharge", 0)


@pytest.mark.django_db
def test_repetition_gives_the_same_bytes_and_old_days_stay(media: Path, yesterday: date) -> None:
    invent_history(transactions=200, users=10, months=1)
    earlier = finance.export_day(yesterday - DAY).read_bytes()
    first = finance.export_day(yesterday).read_bytes()
    call_command("export_finance", stdout=StringIO())
    assert (media / f"postmate-{yesterday}.zip").read_bytes() == first
    assert (media / f"postmate-{yesterday - DAY}.zip").read_bytes() == earlier
    assert len(list(media.iterdir())) == 2


@pytest.mark.django_db
def test_books_that_do_not_balance_are_not_written(media: Path, yesterday: date) -> None:
    """Nor does a good file of before go away."""
    invent_history(transactions=200, users=10, months=1)
    good = finance.export_day(yesterday - DAY)
    content = good.read_bytes()
    TokenAccount.objects.filter(pk=TokenAccount.objects.earliest("pk").pk).update(balance=F("balance") + 1)
    for day in (yesterday, yesterday - DAY):
        with pytest.raises(LiabilityDoesNotBalance):
            finance.export_day(day)
        with pytest.raises(CommandError, match="Nothing was written"):
            call_command("export_finance", day=day.isoformat())
    assert list(media.iterdir()) == [good]
    assert good.read_bytes() == content


@pytest.mark.django_db
def test_entries_that_the_roll_ups_do_not_know_are_noticed(media: Path, yesterday: date) -> None:
    """The roll-forward is right, but the rows are not what it was made of."""
    invent_history(transactions=1_000, users=30, months=3)
    roll_up_until(timezone.now())
    sale = LedgerHour.objects.filter(type="purchase").earliest("hour")
    same_hour = LedgerHour.objects.filter(hour=sale.hour)
    # As much too little here as too much there: the sum of the day is right.
    same_hour.filter(type="purchase", currency=sale.currency).update(tokens=F("tokens") - 1)
    if not same_hour.filter(type="bonus").update(tokens=F("tokens") + 1):
        LedgerHour.objects.create(
            hour=sale.hour, type="bonus", transactions=1, tokens=1, paid_cents=0, discount_cents=0
        )
    with pytest.raises(LiabilityDoesNotBalance, match="The ledger of"):
        finance.export_day(sale.hour.astimezone(UTC).date())
    assert list(media.iterdir()) == []


@pytest.mark.django_db
def test_full_disk_leaves_no_half_file(media: Path, yesterday: date) -> None:
    invent_history(transactions=400, users=20, months=1)
    _, hard = limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200, hard))
    try:
        with pytest.raises(OSError, match="too large"):
            finance.export_day(yesterday)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert list(media.iterdir()) == []
    assert read(finance.export_day(yesterday))


@pytest.mark.django_db(transaction=True)
def test_killed_half_way_leaves_no_half_file(media: Path, yesterday: date) -> None:
    """kill -9 when the ledger and the purchases are written and the reversals are not."""
    invent_history(transactions=200, users=10, months=1)
    with transaction.atomic():
        with connection.cursor() as cursor:
            cursor.execute("LOCK TABLE billing_paymentreversal")  # the process stops in front of it
        process = subprocess.Popen(
            [sys.executable, "manage.py", "export_finance"],
            cwd=PROJECT,
            env={**os.environ, "DATABASE_URL": database_url(), "MEDIA_ROOT": str(media.parent)},
        )
        try:
            deadline = time.monotonic() + DEADLINE_SECONDS
            while not is_somebody_waiting_for_a_lock():
                assert process.poll() is None
                assert time.monotonic() < deadline
                time.sleep(0.02)
        finally:
            process.send_signal(signal.SIGKILL)
            assert process.wait() == -signal.SIGKILL
    assert not finance.path_of(yesterday).exists()
    assert finance.list_files() == []
    [rest] = media.iterdir()
    os.utime(rest, (0, 0))  # a day later
    call_command("export_finance", stdout=StringIO())
    assert list(media.iterdir()) == [finance.path_of(yesterday)]
    assert read(finance.path_of(yesterday))


@pytest.mark.django_db
@pytest.mark.parametrize("sign", ["=", "+", "-", "@", "\t", "\r"])
def test_no_cell_is_a_formula(alice: User, yesterday: date, sign: str) -> None:
    """Row 67. A refund of another product on the same Stripe account is not listed (row 18)."""
    at = timezone.now() - DAY
    account = TokenAccount.objects.get(user=alice)
    purchase = Purchase.objects.create(
        account=account, user=alice, workspace=account.workspace, kind="checkout", package_name="Starter", tokens=1,
        amount_cents=5, currency="usd",
    )  # fmt: skip
    for number, of in enumerate((purchase, None), start=1):
        PaymentReversal.objects.create(
            kind="refund", stripe_id=f"re_{number}", stripe_payment_intent_id=f"pi_{number}", amount_cents=5,
            currency="usd", status="succeeded", reason=f"{sign}1+1", created_at=at, purchase=of,
        )  # fmt: skip
    with ZipFile(finance.export_day(yesterday)) as archive:
        text = archive.read("reversals.csv").decode("utf-8-sig")
    rows = list(csv.DictReader(StringIO(text, newline="")))
    assert [(row["At Stripe"], row["Reason"], row["Amount"]) for row in rows] == [("re_1", f"'{sign}1+1", "0.05")]


@pytest.mark.django_db
def test_day_that_is_not_over_is_refused(media: Path, yesterday: date) -> None:
    for day in ((yesterday + DAY).isoformat(), "2999-01-01", "yesterday"):
        with pytest.raises(CommandError):
            call_command("export_finance", day=day)
    assert finance.list_files() == []


@pytest.mark.django_db
def test_worker_makes_up_for_lost_nights(media: Path, yesterday: date) -> None:
    tasks.export_finance()
    assert finance.list_files() == []  # nobody was there yet
    invent_history(transactions=200, users=10, months=1)
    tasks.export_finance()
    week = [yesterday - number * DAY for number in range(7)]
    assert [file.day for file in finance.list_files()] == week
    finance.path_of(week[3]).unlink()
    written = {file.day: file.written_at for file in finance.list_files()}
    tasks.export_finance()
    again = {file.day: file.written_at for file in finance.list_files()}
    assert list(again) == week
    assert {day: at for day, at in again.items() if day != week[3]} == written


@pytest.mark.django_db
def test_admins_download_the_days(client: Client, adam: User, yesterday: date) -> None:
    """And the audit log knows it; nothing but the days' files can be had there."""
    client.force_login(adam)
    assert "No day has been written yet" in client.get("/admin/tokens/finance/").content.decode()
    path = finance.export_day(yesterday)
    address = f"/admin/tokens/finance/{path.name}"
    assert address in client.get("/admin/tokens/finance/").content.decode()
    response: Any = client.get(address)
    assert response["Content-Type"] == "application/zip"
    assert path.name in response["Content-Disposition"]
    chunks: Iterator[bytes] = response.streaming_content
    assert b"".join(chunks) == path.read_bytes()
    [entry] = AuditEntry.objects.filter(action="export")
    assert (entry.actor, entry.summary) == (adam, f"Downloaded the finance export of {yesterday}")
    for wrong in ("postmate-2000-01-01.zip", "postmate-2026-13-45.zip", "postmate-2026-1-1.zip"):
        assert client.get(f"/admin/tokens/finance/{wrong}").status_code != 200
