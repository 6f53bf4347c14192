"""The dashboard's roll-ups: exact, repeatable, never ahead of a transaction that may still add to an hour."""

from collections.abc import Iterator
from datetime import datetime, timedelta
from io import StringIO
from typing import Any

import psycopg
import pytest
from django.core.management import CommandError, call_command
from django.db import DatabaseError, connection
from django.test import override_settings
from django.utils import timezone

from accounts.models import User
from billing import tasks
from billing.figures import roll_ups
from billing.models import LedgerHour, RollUp, TokenUsage, UsageDay, UsageHour
from tests.conftest import MakeUser

HOUR = timedelta(hours=1)
NEVER = 2**62  # a transaction's id that is far away


def roll_up_until(moment: datetime) -> None:
    """Make the roll-ups reach to the hour of `moment` and no further, as if an older transaction were still open."""
    until = roll_ups.hour_of(moment)
    state = {"rolled_until": until, "sealing_until": until + HOUR, "sealing_xid": NEVER}
    RollUp.objects.update_or_create(defaults=state)
    assert roll_ups.rebuild() == until


def invent_history(**options: Any) -> None:
    with override_settings(DEBUG=True):  # without it, it refuses
        call_command("make_demo_history", stdout=StringIO(), stderr=StringIO(), **options)


def verify() -> None:
    call_command("verify_ledger", stdout=StringIO())


def tamper(sql: str) -> None:
    with connection.cursor() as cursor:
        cursor.execute(sql)


def operation(user: User, *, ended_at: datetime | None, **fields: Any) -> TokenUsage:
    """An operation that failed at that time; running when it is None."""
    account = user.token_account
    is_running = {"status": "reserved", "reserved_tokens": 1, "expires_at": timezone.now() + HOUR}
    return TokenUsage.objects.create(
        account=account,
        user=user,
        workspace_id=account.workspace_id,
        operation_type="chat",
        provider="openai",
        model="gpt-6-luna",
        charge_type="multiplier",
        multiplier=1,
        completed_at=ended_at,
        **({"status": "failed"} if ended_at else is_running) | fields,
    )


@pytest.fixture
def history(db: None) -> None:
    """A month of invented operations and payments."""
    invent_history(transactions=300, users=12, months=1)


def test_command_makes_the_roll_ups_anew(history: None) -> None:
    """Whatever was wrong with them before; what they say is what verify_ledger finds in the raw rows."""
    roll_up_until(timezone.now())
    made = UsageHour.objects.count(), UsageDay.objects.count(), LedgerHour.objects.count()
    assert all(made)
    verify()
    tamper("UPDATE billing_usagehour SET operations = operations + 1")
    tamper("DELETE FROM billing_usageday")
    tamper("UPDATE billing_ledgerhour SET tokens = tokens + 1")
    call_command("roll_up_usage", rebuild=True, stdout=StringIO(), stderr=StringIO())
    assert made == (UsageHour.objects.count(), UsageDay.objects.count(), LedgerHour.objects.count())
    verify()


@pytest.mark.parametrize(
    "break_it",
    [
        "UPDATE billing_usagehour SET provider_cost_microusd = provider_cost_microusd + 1 "
        "WHERE id = (SELECT min(id) FROM billing_usagehour)",
        "DELETE FROM billing_usagehour WHERE id = (SELECT min(id) FROM billing_usagehour)",
        "UPDATE billing_usageday SET billable_tokens = billable_tokens + 1 "
        "WHERE id = (SELECT min(id) FROM billing_usageday)",
        "UPDATE billing_ledgerhour SET paid_cents = paid_cents + 1 WHERE id = (SELECT min(id) FROM billing_ledgerhour)",
        "DELETE FROM billing_ledgerhour WHERE type = 'usage'",
        # Rows beyond the end would be counted twice: here, and with the raw rows.
        "UPDATE billing_rollup SET rolled_until = rolled_until - interval '3 days'",
    ],
)
def test_verify_ledger_finds_a_wrong_roll_up(history: None, break_it: str) -> None:
    roll_up_until(timezone.now())
    tamper(break_it)
    with pytest.raises(CommandError, match="broken"):
        verify()


def test_what_is_rolled_up_later_joins_what_was(history: None) -> None:
    """Piece by piece it comes to the same as at once, whole days included."""
    now = timezone.now()
    for model in (RollUp, UsageHour, UsageDay, LedgerHour):
        model.objects.all().delete()
    for days in (25, 11, 10, 0):
        until = roll_ups.hour_of(now - timedelta(days=days, hours=days))
        # Sealed long ago: every transaction's id is higher than this.
        RollUp.objects.update_or_create(defaults={"sealing_until": until, "sealing_xid": 1})
        assert roll_ups.roll_up() == until
        verify()


@pytest.mark.django_db
def test_running_operations_are_in_no_hour(make_user: MakeUser) -> None:
    alice = make_user("alice")
    operation(alice, ended_at=None)
    operation(alice, ended_at=timezone.now() - 30 * HOUR, duration_ms=70)
    roll_up_until(timezone.now())
    row = UsageHour.objects.get()
    assert (row.status, row.operations, row.timed_operations, row.duration_ms) == ("failed", 1, 1, 70)


@pytest.mark.django_db
def test_who_is_killed_leaves_nothing_behind(history: None, monkeypatch: pytest.MonkeyPatch) -> None:
    roll_up_until(timezone.now() - timedelta(days=20))
    before = UsageHour.objects.count(), RollUp.objects.values().get()
    RollUp.objects.update(sealing_xid=1)
    monkeypatch.setattr(roll_ups, "_ROLL_USAGE_DAYS", "SELECT 1 / 0")
    with pytest.raises(DatabaseError):
        roll_ups.roll_up()
    RollUp.objects.update(sealing_xid=NEVER)
    assert before[0] == UsageHour.objects.count()
    assert RollUp.objects.get().rolled_until == before[1]["rolled_until"]
    verify()


# --- With transactions of others ------------------------------------------------------------------------------------


@pytest.fixture
def other(transactional_db: None) -> Iterator[psycopg.Connection]:
    """A connection of somebody else, in a transaction."""
    with psycopg.connect(**connection.get_connection_params() | {"cursor_factory": None}) as other:
        yield other


@pytest.fixture
def ending(other: psycopg.Connection, make_user: MakeUser) -> TokenUsage:
    """An operation that ended two hours ago, says a transaction that is still open."""
    usage = operation(make_user("alice"), ended_at=None)
    other.execute(
        """UPDATE billing_tokenusage SET status = 'failed', completed_at = clock_timestamp() - interval '2 hours'
            WHERE id = %s""",
        [usage.pk],
    )
    return usage


def roll_up_once_others_are_done() -> None:
    """Tests that run beside this one have transactions of their own, which end."""
    deadline = timezone.now() + timedelta(minutes=5)
    while (RollUp.objects.get().sealing_xid or not RollUp.objects.get().rolled_until) and timezone.now() < deadline:
        tasks.roll_up_usage()


def test_an_open_transaction_holds_its_hour_back(other: psycopg.Connection, ending: TokenUsage) -> None:
    tasks.roll_up_usage()
    assert RollUp.objects.get().rolled_until is None
    other.commit()
    roll_up_once_others_are_done()
    row = UsageHour.objects.get()
    ending.refresh_from_db()
    assert ending.completed_at is not None
    assert (row.hour, row.operations) == (roll_ups.hour_of(ending.completed_at), 1)


def test_without_the_seal_its_row_is_missed(
    other: psycopg.Connection, ending: TokenUsage, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The control of the one above: an end that follows the clock alone."""
    monkeypatch.setattr(roll_ups, "_seal", lambda state: roll_ups.hour_of(timezone.now() - roll_ups.LAG))
    roll_ups.roll_up()
    other.commit()
    assert not UsageHour.objects.exists()
    assert ending.__class__.objects.filter(completed_at__lt=roll_ups.rolled_until()).exists()


def test_two_workers_do_not_do_it_twice(other: psycopg.Connection, make_user: MakeUser) -> None:
    """The one that comes second goes away at once."""
    operation(make_user("alice"), ended_at=timezone.now() - 5 * HOUR)
    until = roll_ups.hour_of(timezone.now())
    RollUp.objects.create(sealing_until=until, sealing_xid=1)
    other.execute("SELECT FROM billing_rollup FOR UPDATE")
    assert roll_ups.roll_up() is None
    assert not UsageHour.objects.exists()
    other.commit()
    assert roll_ups.roll_up() == until
    assert UsageHour.objects.get().operations == 1
    roll_ups.roll_up()
    assert UsageHour.objects.get().operations == 1
