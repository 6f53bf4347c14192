"""Keeping the roll-ups: hours of raw rows, added up once they cannot change any more.

An operation belongs to the hour of its `completed_at`, every other ledger row to that of its `created_at`. The
database's clock stamps both before the commit that shows them, so an hour that is over may still get rows, and one
that was added up too early would lack them for ever. Hence an hour is rolled up only once it is *sealed*:

- Everything that stamps a row has an account's row lock first, and PostgreSQL gives a transaction its id (xid) before
  it gives it a row lock. So a transaction that stamped something before the hour's end had its xid by then.
- After the end of the hour (and a lag, should the clock be set back) this code takes an xid of its own and writes it
  down. All xids given earlier are lower.
- A later look finds that the oldest transaction still running, `pg_snapshot_xmin`, is no older than that. Then all who
  could have stamped something in the hour have committed or are gone, and the next statement sees what they wrote.

One long transaction anywhere in the database server delays the roll-ups, and nothing else: what is newer than they are
is read from the raw rows.
"""

from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any

from django.db import connection, transaction
from django.db.models import F

from billing.models import LedgerHour, RollUp, TokenTransaction, TokenUsage, UsageDay, UsageHour

LAG = timedelta(minutes=1)  # far more than clocks are set back by
BATCH = timedelta(days=7)  # of hours in one transaction: whoever is killed loses no more than that
HOUR = timedelta(hours=1)

# With both conditions PostgreSQL takes the partial index over the few rows that are no usage.
OTHER_THAN_USAGE = "type <> 'usage' AND type IN ({})".format(
    ", ".join(f"'{type}'" for type in TokenTransaction.Type.values if type != TokenTransaction.Type.USAGE)
)

USAGE_DIMENSIONS = "provider, model, operation_type, status, is_free"
USAGE_SUMS = (
    "operations", "actual_tokens", "billable_tokens", "unbilled_tokens", "provider_cost_microusd", "timed_operations",
    "duration_ms",
)  # fmt: skip

# The one place that says what each sum is of the raw rows.
RAW_USAGE_SUMS = """count(*) AS operations, sum(actual_tokens) AS actual_tokens,
       sum(billable_tokens) AS billable_tokens, sum(unbilled_tokens) AS unbilled_tokens,
       sum(provider_cost_microusd) AS provider_cost_microusd, count(duration_ms) AS timed_operations,
       coalesce(sum(duration_ms), 0) AS duration_ms"""

_ROLL_USAGE_HOURS = f"""
INSERT INTO billing_usagehour (hour, {USAGE_DIMENSIONS}, {", ".join(USAGE_SUMS)})
SELECT date_trunc('hour', completed_at, 'UTC'), {USAGE_DIMENSIONS}, {RAW_USAGE_SUMS}
  FROM billing_tokenusage
 WHERE completed_at >= %(since)s AND completed_at < %(until)s
 GROUP BY 1, {USAGE_DIMENSIONS} ORDER BY 1
"""  # noqa: S608 – our own names and constants, no input

_ROLL_USAGE_DAYS = f"""
INSERT INTO billing_usageday (day, {USAGE_DIMENSIONS}, {", ".join(USAGE_SUMS)})
SELECT date_trunc('day', hour, 'UTC'), {USAGE_DIMENSIONS}, {", ".join(f"sum({name})" for name in USAGE_SUMS)}
  FROM billing_usagehour
 WHERE hour >= %(since)s AND hour < %(until)s
 GROUP BY 1, {USAGE_DIMENSIONS} ORDER BY 1
"""  # noqa: S608 – our own names and constants, no input

_ROLL_LEDGER_HOURS = f"""
INSERT INTO billing_ledgerhour (hour, type, currency, transactions, tokens, paid_cents, discount_cents)
SELECT date_trunc('hour', entry.created_at, 'UTC') AS hour, type, entry.currency, count(*), sum(amount),
       coalesce(sum(paid_cents), 0),
       coalesce(sum(purchase.discount_cents) FILTER (WHERE type IN ('purchase', 'auto_recharge')), 0)
  FROM billing_tokentransaction AS entry
  LEFT JOIN billing_purchase AS purchase ON purchase.id = entry.purchase_id
 WHERE {OTHER_THAN_USAGE} AND entry.created_at >= %(since)s AND entry.created_at < %(until)s
 GROUP BY 1, type, entry.currency
UNION ALL
-- A debit is what its operation cost, and an operation that cost nothing has none (law 9).
SELECT date_trunc('hour', completed_at, 'UTC'), 'usage', '', count(*), -sum(billable_tokens), 0, 0
  FROM billing_tokenusage
 WHERE completed_at >= %(since)s AND completed_at < %(until)s AND billable_tokens > 0
 GROUP BY 1
 ORDER BY hour
"""  # noqa: S608 – our own names and constants, no input

_FIRST_HOUR = """
SELECT date_trunc('hour', least(
         (SELECT min(completed_at) FROM billing_tokenusage WHERE completed_at IS NOT NULL),
         (SELECT min(created_at) FROM billing_tokentransaction WHERE type <> 'usage')), 'UTC')
"""

Progress = Callable[[int, int], None]
"""Told after each batch: how many hours are done, of how many."""


def rolled_until() -> datetime | None:
    """Where the roll-ups end: below it they are complete and stay as they are, above it only raw rows tell.

    None: there are none yet.
    """
    return RollUp.objects.values_list("rolled_until", flat=True).first()


def roll_up(*, progress: Progress | None = None) -> datetime | None:
    """Add up the hours that are sealed and not in the roll-ups yet; seal what is over. Returns how far they reach.

    A batch is one transaction that holds the state's row: killed, it leaves nothing behind; two at a time do nothing
    twice (the second goes away). Repeat it every few minutes.
    """
    first: datetime | None = None
    while True:
        with transaction.atomic():
            RollUp.objects.bulk_create([RollUp()], ignore_conflicts=True)
            state = RollUp.objects.select_for_update(skip_locked=True).first()
            target = _seal(state) if state else None
            if state is None or target is None:
                return rolled_until()
            start = state.rolled_until or _first_hour() or target
            first = first or start
            end = _add_batch(state, start, target)
        if progress and first < target:
            progress((end - first) // HOUR, (target - first) // HOUR)
        if end == target:
            return end


def rebuild(*, progress: Progress | None = None) -> datetime | None:
    """Make the roll-ups anew from the raw rows, in one transaction: readers see the old ones until it commits.

    Returns how far they reach: no less than before.
    """
    with transaction.atomic():
        RollUp.objects.bulk_create([RollUp()], ignore_conflicts=True)
        state = RollUp.objects.select_for_update().get()
        target = _seal(state) or state.rolled_until
        for model in (UsageHour, UsageDay, LedgerHour):
            model.objects.all().delete()
        if target is None:
            return None
        first = end = min(_first_hour() or target, target)
        while True:
            end = _add_batch(state, end, target)
            if progress and first < target:
                progress((end - first) // HOUR, (target - first) // HOUR)
            if end == target:
                return end


def amend(usage_id: int, **changes: Any) -> None:
    """Write `changes` to an operation that has ended, and what they come to into the roll-ups that have it already.

    For what is learned of it too late; its status and its end stay as they are. Waits for a roll-up that is under way.
    """
    with transaction.atomic():
        RollUp.objects.bulk_create([RollUp()], ignore_conflicts=True)
        RollUp.objects.select_for_update().get()  # nobody adds the operation up between our two writes
        operation = TokenUsage.objects.filter(pk=usage_id)
        before = _sums(operation.select_for_update().get())
        operation.update(**changes)
        usage = operation.get()
        more = {name: F(name) + (after - before[name]) for name, after in _sums(usage).items()}
        same = {name: getattr(usage, name) for name in USAGE_DIMENSIONS.split(", ")}
        if usage.completed_at is None:
            raise ValueError("An operation that runs is in no roll-up: it can be closed.")
        UsageHour.objects.filter(hour=hour_of(usage.completed_at), **same).update(**more)
        UsageDay.objects.filter(day=day_of(usage.completed_at), **same).update(**more)


def _sums(usage: TokenUsage) -> dict[str, int]:
    """What one operation adds to a roll-up, but for itself."""
    return {
        "actual_tokens": usage.actual_tokens,
        "provider_cost_microusd": usage.provider_cost_microusd,
        "timed_operations": int(usage.duration_ms is not None),
        "duration_ms": usage.duration_ms or 0,
    }


def _seal(state: RollUp) -> datetime | None:
    """The end of the hours that no transaction can add to any more; None when that is not beyond the state's."""
    with connection.cursor() as cursor:
        # The clock first, the xid after it.
        cursor.execute("SELECT clock_timestamp()")
        over = hour_of(cursor.fetchone()[0] - LAG)
        if state.sealing_until is None and (state.rolled_until is None or over > state.rolled_until):
            cursor.execute("SELECT pg_current_xact_id()::text::bigint")
            state.sealing_until, [state.sealing_xid] = over, cursor.fetchone()
            state.save()
        if state.sealing_until is None:
            return None
        cursor.execute("SELECT pg_snapshot_xmin(pg_current_snapshot())::text::bigint >= %s", [state.sealing_xid])
        is_sealed = cursor.fetchone()[0]
    return state.sealing_until if is_sealed else None


def _add_batch(state: RollUp, start: datetime, target: datetime) -> datetime:
    """Add up some days from `start` on, `target` at most. Returns where they end."""
    end = min(start + BATCH, target)
    with connection.cursor() as cursor:
        cursor.execute(_ROLL_USAGE_HOURS, {"since": start, "until": end})
        cursor.execute(_ROLL_LEDGER_HOURS, {"since": start, "until": end})
        cursor.execute(_ROLL_USAGE_DAYS, {"since": day_of(start), "until": day_of(end)})
    state.rolled_until = end
    if state.sealing_until and end >= state.sealing_until:
        state.sealing_until = state.sealing_xid = None
    state.save()
    return end


def _first_hour() -> datetime | None:
    with connection.cursor() as cursor:
        cursor.execute(_FIRST_HOUR)
        return cursor.fetchone()[0]


def hour_of(moment: datetime) -> datetime:
    """When its hour began, in UTC."""
    return moment.astimezone(UTC).replace(minute=0, second=0, microsecond=0)


def day_of(moment: datetime) -> datetime:
    """When its day began, in UTC."""
    return hour_of(moment).replace(hour=0)
