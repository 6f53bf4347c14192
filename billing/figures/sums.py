"""The sums of usage and of the ledger that all figures are made of.

What lies below the roll-ups' end comes from them, what is newer from the raw rows, so a figure is exact at any moment
and costs what the calendar costs, not what the history does. Spans have a beginning (included) and an end (not
included); months and days are those of the time zone of `since`. An operation counts when it ended (`completed_at`),
every other ledger entry when it was written.
"""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from typing import Any, Literal, TypeAlias

from django.db import connection, transaction

from billing.figures import roll_ups
from billing.models import TokenUsage

BEGINNING = datetime(1990, 1, 1, tzinfo=UTC)  # of everything there is to count
UsageDimension: TypeAlias = Literal["model", "operation"]
_COLUMNS: dict[UsageDimension, tuple[str, ...]] = {"model": ("provider", "model"), "operation": ("operation_type",)}
Piece: TypeAlias = tuple[datetime, datetime]
FEW_PIECES = 4


@dataclass(slots=True)
class _Pieces:
    """The parts of a row of spans that are read from the roll-up by day, from that by hour, and from the raw rows.

    A day of the roll-up is UTC's and an hour begins on the hour: what of a span is neither is read from finer rows.
    """

    days: list[Piece] = field(default_factory=list)
    hours: list[Piece] = field(default_factory=list)
    raw: list[Piece] = field(default_factory=list)
    parameters: dict[str, Any] = field(default_factory=dict)  # of the SQL below

    @classmethod
    def of(cls, edges: Sequence[datetime], *, has_days: bool) -> "_Pieces":
        pieces = cls()
        rolled_until = roll_ups.rolled_until() or BEGINNING
        for since, until in pairwise(edges):
            first = _ceiling(since, roll_ups.hour_of, timedelta(hours=1))
            last = roll_ups.hour_of(min(until, rolled_until))
            if first >= last:
                _append(pieces.raw, since, until)
                continue
            _append(pieces.raw, since, first)
            first_day, last_day = _ceiling(first, roll_ups.day_of, timedelta(days=1)), roll_ups.day_of(last)
            if has_days and first_day < last_day:
                _append(pieces.hours, first, first_day)
                _append(pieces.days, first_day, last_day)
                _append(pieces.hours, last_day, last)
            else:
                _append(pieces.hours, first, last)
            _append(pieces.raw, last, until)
        return pieces

    def rows_of_days(self) -> str:
        return self._rows("billing_usageday", "day", "day", self.days)

    def rows_of_hours(self, table: str) -> str:
        return self._rows(table, "hour", "hour", self.hours)

    def raw_rows(self, table: str, at: str) -> str:
        return self._rows(table, at, "raw", self.raw)

    def _rows(self, table: str, at: str, name: str, pieces: list[Piece]) -> str:
        """SQL in brackets: the rows of the table whose moment is in one of the pieces, its parameters given."""
        if len(pieces) > FEW_PIECES:
            self.parameters |= {
                f"{name}_since": [each[0] for each in pieces],
                f"{name}_until": [each[1] for each in pieces],
            }
            piece = f"unnest(%({name}_since)s::timestamptz[], %({name}_until)s::timestamptz[]) AS piece (since, until)"
            return f"(SELECT {table}.* FROM {piece} JOIN {table} ON {at} >= piece.since AND {at} < piece.until)"  # noqa: S608 – our own names and constants, no input
        # Written out, so that PostgreSQL knows how many rows they hold and chooses a plan for as many.
        ranges = []
        for number, (since, until) in enumerate(pieces):
            self.parameters |= {f"{name}_since_{number}": since, f"{name}_until_{number}": until}
            ranges.append(f"{at} >= %({name}_since_{number})s AND {at} < %({name}_until_{number})s")
        return f"(SELECT * FROM {table} WHERE {' OR '.join(ranges) or 'false'})"  # noqa: S608 – our own names and constants, no input


def _ceiling(moment: datetime, floor: Callable[[datetime], datetime], step: timedelta) -> datetime:
    below = floor(moment)
    return below if below == moment else below + step


def _append(pieces: list[Piece], since: datetime, until: datetime) -> None:
    """Add a piece, or make the last one longer where it goes on."""
    if since >= until:
        return
    if pieces and pieces[-1][1] == since:
        since = pieces.pop()[0]
    pieces.append((since, until))


def rows_of(sql: str, parameters: Mapping[str, Any]) -> list[tuple[Any, ...]]:
    """What a statement that adds a history up finds, with the memory that it needs."""
    with transaction.atomic(savepoint=False), connection.cursor() as cursor:
        # A year by the day is half a million sums: sorted on disk, as PostgreSQL's own 4 MB make it, they take twice as
        # long as hashed in memory. A second core would gain little and be missing elsewhere.
        cursor.execute("SET LOCAL work_mem = '32MB'; SET LOCAL max_parallel_workers_per_gather = 0")
        cursor.execute(sql, parameters)
        return cursor.fetchall()


@dataclass(frozen=True, slots=True)
class UsageSums:
    """Sums over operations that ended."""

    operations: int = 0
    succeeded: int = 0
    expired: int = 0
    charged: int = 0  # succeeded while billing was on
    actual_tokens: int = 0  # counted by providers, in all operations
    charged_actual_tokens: int = 0  # of them, in those that were charged
    billable_tokens: int = 0
    unbilled_tokens: int = 0  # used beyond the quotes: nobody paid for them
    provider_cost_microusd: int = 0
    timed: int = 0  # succeeded, and how long it took is known
    duration_ms: int = 0  # of those, all in all

    def __add__(self, other: "UsageSums") -> "UsageSums":
        return UsageSums(*(getattr(self, name) + getattr(other, name) for name in UsageSums.__slots__))

    @property
    def failed(self) -> int:
        """Those that ended without success, expired ones included."""
        return self.operations - self.succeeded

    @property
    def success_permille(self) -> int | None:
        """Of 1,000 operations that ended, those that succeeded, rounded down; None when none ended."""
        return self.succeeded * 1_000 // self.operations if self.operations else None

    @property
    def multiplier_margin_permille(self) -> int | None:
        """(billable − actual) / billable tokens of what was charged, in thousandths; None when nothing was."""
        if not self.billable_tokens:
            return None
        return (self.billable_tokens - self.charged_actual_tokens) * 1_000 // self.billable_tokens

    @property
    def tokens_per_operation(self) -> int | None:
        """Billable tokens of an operation that was charged, rounded up."""
        return -(-self.billable_tokens // self.charged) if self.charged else None

    @property
    def mean_duration_ms(self) -> int | None:
        """Of the operations that succeeded."""
        return self.duration_ms // self.timed if self.timed else None


_SUM_COLUMNS = f"status, is_free, {', '.join(roll_ups.USAGE_SUMS)}"
_RAW_COLUMNS = (
    "status, is_free, 1::bigint AS operations, actual_tokens, billable_tokens, unbilled_tokens, "
    "provider_cost_microusd, (duration_ms IS NOT NULL)::int::bigint AS timed_operations, "
    "coalesce(duration_ms, 0) AS duration_ms"
)


def sum_usage(
    *, edges: Sequence[datetime], by: UsageDimension | None = None
) -> dict[tuple[int, tuple[str, ...]], UsageSums]:
    """The sums over the operations that ended in each of the spans between two neighbouring edges.

    The key is (number of the span, from 0; what `by` tells apart: (provider, model), (operation type,), or ()). What
    has no operation is left out.
    """
    columns = _COLUMNS[by] if by else ()
    listed = "".join(f"{column}, " for column in columns)
    pieces = _Pieces.of(edges, has_days=True)
    sql = f"""
        SELECT width_bucket(at, %(edges)s::timestamptz[]) - 1, {listed}status, is_free,
               {", ".join(f"sum({column})::bigint" for column in roll_ups.USAGE_SUMS)}
          FROM (
            SELECT day AS at, {listed}{_SUM_COLUMNS} FROM {pieces.rows_of_days()} AS days
            UNION ALL
            SELECT hour, {listed}{_SUM_COLUMNS} FROM {pieces.rows_of_hours("billing_usagehour")} AS hours
            UNION ALL
            SELECT completed_at, {listed}{_RAW_COLUMNS}
              FROM {pieces.raw_rows("billing_tokenusage", "completed_at")} AS usage
          ) AS summed
         GROUP BY 1, {listed}status, is_free"""  # noqa: S608 – our own names and constants, no input
    parameters = {"edges": list(edges), **pieces.parameters}
    found: dict[tuple[int, tuple[str, ...]], UsageSums] = defaultdict(UsageSums)
    for number, *values in rows_of(sql, parameters):
        key, sums = tuple(values[: len(columns)]), values[len(columns) :]
        found[number, key] += _usage_sums(*sums)
    return dict(found)


def _usage_sums(
    status: str,
    is_free: bool,
    operations: int,
    actual: int,
    billable: int,
    unbilled: int,
    cost: int,
    timed: int,
    ms: int,
) -> UsageSums:
    """Of operations that all ended in the same way."""
    has_succeeded = status == TokenUsage.Status.SUCCEEDED
    is_charged = has_succeeded and not is_free
    return UsageSums(
        operations=operations,
        succeeded=operations if has_succeeded else 0,
        expired=operations if status == TokenUsage.Status.EXPIRED else 0,
        charged=operations if is_charged else 0,
        actual_tokens=actual,
        charged_actual_tokens=actual if is_charged else 0,
        billable_tokens=billable,
        unbilled_tokens=unbilled,
        provider_cost_microusd=cost,
        timed=timed if has_succeeded else 0,
        duration_ms=ms if has_succeeded else 0,
    )


@dataclass(frozen=True, slots=True)
class LedgerSums:
    """Sums over ledger entries of one type and currency ("" where no money changed hands)."""

    transactions: int = 0
    tokens: int = 0  # signed
    paid_cents: int = 0  # signed, after discounts, without tax
    discount_cents: int = 0

    def __add__(self, other: "LedgerSums") -> "LedgerSums":
        return LedgerSums(*(getattr(self, name) + getattr(other, name) for name in LedgerSums.__slots__))


def sum_ledger(*, edges: Sequence[datetime]) -> dict[tuple[int, str, str], LedgerSums]:
    """The sums over the ledger entries of each span between two neighbouring edges.

    The key is (number of the span, from 0; type; currency). A debit for usage counts when its operation ended.
    """
    pieces = _Pieces.of(edges, has_days=False)
    sql = f"""
        SELECT width_bucket(at, %(edges)s::timestamptz[]) - 1, type, currency, sum(transactions)::bigint,
               sum(tokens)::bigint, sum(paid_cents)::bigint, sum(discount_cents)::bigint
          FROM (
            SELECT hour AS at, type, currency, transactions, tokens, paid_cents, discount_cents
              FROM {pieces.rows_of_hours("billing_ledgerhour")} AS hours
            UNION ALL
            SELECT entry.created_at, type, entry.currency, 1, amount, coalesce(paid_cents, 0),
                   CASE WHEN type IN ('purchase', 'auto_recharge') THEN coalesce(discount_cents, 0) ELSE 0 END
              FROM {pieces.raw_rows("billing_tokentransaction", "created_at")} AS entry
              LEFT JOIN billing_purchase AS purchase ON purchase.id = entry.purchase_id
             WHERE {roll_ups.OTHER_THAN_USAGE}
            UNION ALL
            SELECT completed_at, 'usage', '', 1, -billable_tokens, 0, 0
              FROM {pieces.raw_rows("billing_tokenusage", "completed_at")} AS usage
             WHERE billable_tokens > 0
          ) AS summed
         GROUP BY 1, 2, 3"""  # noqa: S608 – our own names and constants, no input
    parameters = {"edges": list(edges), **pieces.parameters}
    return {tuple(row[:3]): LedgerSums(*row[3:]) for row in rows_of(sql, parameters)}


def change_permille(now: int, before: int) -> int | None:
    """How much more it is than before, in thousandths, towards zero; None where there was nothing before."""
    return int((now - before) * 1_000 / abs(before)) if before else None
