"""Figures of the whole business, for the dashboard and the finance export. Pure reads.

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
from django.db.models import Case, Count, F, Q, Sum, When

from billing.catalogue import system_settings
from billing.figures import roll_ups
from billing.models import PaymentReversal, Purchase, StripeEvent, TokenAccount, TokenTransaction, TokenUsage
from billing.usage import stats
from billing.usage.stats import BucketName
from kit.database import one_snapshot

BEGINNING = datetime(1990, 1, 1, tzinfo=UTC)  # of everything there is to count
MAX_TIMED_OPERATIONS = 20_000  # whose durations are sorted: measured at 30 ms
MAX_TIMED_EVENTS = 1_000
MAX_SPAN_BY_DAY = timedelta(days=200)

UsageDimension: TypeAlias = Literal["model", "operation"]
_COLUMNS: dict[UsageDimension, tuple[str, ...]] = {"model": ("provider", "model"), "operation": ("operation_type",)}

Type = TokenTransaction.Type


def change_permille(now: int, before: int) -> int | None:
    """How much more it is than before, in thousandths, towards zero; None where there was nothing before."""
    return int((now - before) * 1_000 / abs(before)) if before else None


# --- Where the sums are -----------------------------------------------------------------------------------------

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


def _rows(sql: str, parameters: Mapping[str, Any]) -> list[tuple[Any, ...]]:
    with transaction.atomic(savepoint=False), connection.cursor() as cursor:
        # A year by the day is half a million sums: sorted on disk, as PostgreSQL's own 4 MB make it, they take twice as
        # long as hashed in memory. A second core would gain little and be missing elsewhere.
        cursor.execute("SET LOCAL work_mem = '32MB'; SET LOCAL max_parallel_workers_per_gather = 0")
        cursor.execute(sql, parameters)
        return cursor.fetchall()


# --- Usage ------------------------------------------------------------------------------------------------------


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
    for number, *values in _rows(sql, parameters):
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


# --- The ledger -------------------------------------------------------------------------------------------------


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
    return {tuple(row[:3]): LedgerSums(*row[3:]) for row in _rows(sql, parameters)}


class LiabilityDoesNotBalance(Exception):
    """The roll-forward and the balances differ: the books are broken. `manage.py verify_ledger` says where."""


@dataclass(frozen=True, slots=True)
class LiabilityRow:
    """Tokens owed to users over one span: opening + sold + granted − used − refunded − deducted = closing."""

    since: datetime
    until: datetime
    opening_tokens: int
    sold_tokens: int  # purchases and auto-recharges
    granted_tokens: int  # grants and bonuses
    used_tokens: int
    refunded_tokens: int  # taken back by refunds and disputes, less what was given back
    deducted_tokens: int
    closing_tokens: int


def liability_roll_forward(*, edges: Sequence[datetime]) -> list[LiabilityRow]:
    """What is owed to users at the beginning and the end of each span between two neighbouring edges, and what
    changed it.

    The openings are added up from the first entry on, the last closing is calculated back from the balances that the
    accounts have now: the two ways meet to the token, or LiabilityDoesNotBalance is raised. A debit counts when its
    operation ended; `liability_entries` lists the very rows.
    """
    with one_snapshot():
        sums = sum_ledger(edges=[BEGINNING, *edges, datetime.max.replace(tzinfo=UTC) - timedelta(days=1)])
        balances_tokens = TokenAccount.objects.aggregate(tokens=Sum("balance", default=0))["tokens"]

    tokens: dict[tuple[int, str], int] = defaultdict(int)
    for (number, type, _), each in sums.items():
        tokens[number, type] += each.tokens
    opening = sum(tokens[0, type] for type in Type.values)
    rows = []
    for number, (since, until) in enumerate(pairwise(edges), start=1):
        row = LiabilityRow(
            since=since,
            until=until,
            opening_tokens=opening,
            sold_tokens=tokens[number, Type.PURCHASE] + tokens[number, Type.AUTO_RECHARGE],
            granted_tokens=tokens[number, Type.ADMIN_GRANT] + tokens[number, Type.BONUS],
            used_tokens=-tokens[number, Type.USAGE],
            refunded_tokens=-tokens[number, Type.REFUND],
            deducted_tokens=-tokens[number, Type.ADMIN_DEDUCTION],
            closing_tokens=opening + sum(tokens[number, type] for type in Type.values),
        )
        rows.append(row)
        opening = row.closing_tokens
    later = sum(tokens[len(edges), type] for type in Type.values)
    if opening != int(balances_tokens) - later:
        raise LiabilityDoesNotBalance(
            f"The entries come to {opening:,} tokens at the end of {edges[-1]:%Y-%m-%d %H:%M}, the balances to "
            f"{int(balances_tokens) - later:,}. Run manage.py verify_ledger."
        )
    return rows


def liability_entries(*, since: datetime, until: datetime) -> Any:
    """The ledger's rows that the roll-forward of a span is made of; `booked_at` is the moment it counts them at."""
    booked_at = Case(When(type=Type.USAGE, then=F("usage__completed_at")), default=F("created_at"))
    usage = TokenTransaction.objects.filter(
        type=Type.USAGE, usage__completed_at__gte=since, usage__completed_at__lt=until
    )
    others = TokenTransaction.objects.exclude(type=Type.USAGE).filter(created_at__gte=since, created_at__lt=until)
    # Each by its own index. With OR between them, PostgreSQL reads the whole history beside all of its operations.
    booked = usage.values("pk").union(others.values("pk"), all=True)
    return TokenTransaction.objects.filter(pk__in=booked).annotate(booked_at=booked_at)


# --- Money ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class RevenueRate:
    """What a token that is used has brought in, on average, as of one moment.

    Bought and given tokens lie in one balance, and nobody can say which of them an operation used. So each counts the
    same: what all sales until then brought in (after discounts and refunds, without tax), over all tokens that came
    into circulation (bought, granted, given as a bonus, less those taken back). Given tokens brought in nothing and
    so lower the average.

    There are no exchange rates here. Revenue is kept by currency, and the real margin, whose costs are in USD, is
    that of the sales in USD: they bear the part of the costs that they have in the tokens sold.
    """

    net_cents: Mapping[str, int]  # by currency
    circulated_tokens: int
    sold_tokens: Mapping[str, int]  # by currency, less those taken back

    def recognised_micros(self, used_tokens: int, currency: str = "usd") -> int:
        """Revenue recognised from used tokens, in millionths of the currency, rounded down."""
        if self.circulated_tokens <= 0:
            return 0
        return self.net_cents.get(currency, 0) * 10_000 * used_tokens // self.circulated_tokens

    def covered_cost_microusd(self, provider_cost_microusd: int) -> int:
        """The part of the costs that the sales in USD bear, rounded up."""
        total = sum(self.sold_tokens.values())
        if total <= 0:
            return provider_cost_microusd
        return -(-provider_cost_microusd * self.sold_tokens.get("usd", 0) // total)

    def real_margin_microusd(self, usage: UsageSums) -> int:
        """Revenue in USD recognised from the tokens used, less their part of the providers' costs."""
        return self.recognised_micros(usage.billable_tokens) - self.covered_cost_microusd(usage.provider_cost_microusd)


def _rate(sums: Mapping[tuple[int, str, str], LedgerSums]) -> RevenueRate:
    """Of all the spans of `sum_ledger` together."""
    net_cents: dict[str, int] = defaultdict(int)
    sold_tokens: dict[str, int] = defaultdict(int)
    circulated_tokens = 0
    for (_, type, currency), each in sums.items():
        if type == Type.USAGE:
            continue
        circulated_tokens += each.tokens
        if currency:
            net_cents[currency] += each.paid_cents
            sold_tokens[currency] += each.tokens
    return RevenueRate(dict(net_cents), circulated_tokens, dict(sold_tokens))


@dataclass(frozen=True, slots=True)
class Revenue:
    """Money of one currency in a span, in cents, without tax."""

    currency: str
    sales: int = 0
    sold_tokens: int = 0
    sales_cents: int = 0  # after discounts
    discount_cents: int = 0
    refunded_cents: int = 0  # taken back by refunds and disputes in the span, less what was given back

    @property
    def net_cents(self) -> int:
        return self.sales_cents - self.refunded_cents


def _revenue(sums: Mapping[tuple[int, str, str], LedgerSums], number: int) -> list[Revenue]:
    """Of one span of `sum_ledger`, by currency."""
    found = []
    for currency in sorted({key[2] for key in sums if key[0] == number and key[2]}):
        purchases, recharges, refunds = (
            sums.get((number, type, currency), LedgerSums())
            for type in (Type.PURCHASE, Type.AUTO_RECHARGE, Type.REFUND)
        )
        sales = purchases + recharges
        found.append(
            Revenue(
                currency=currency,
                sales=sales.transactions,
                sold_tokens=sales.tokens,
                sales_cents=sales.paid_cents,
                discount_cents=sales.discount_cents,
                refunded_cents=-refunds.paid_cents,
            )
        )
    return found


# --- The system's figures ---------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class TokenStats:
    """What happened in a span. Live figures are in `LiveStats`."""

    usage: UsageSums
    revenue: list[Revenue]  # by currency
    rate: RevenueRate  # at the end of the span
    granted_tokens: int  # grants and bonuses
    refunded_tokens: int  # taken back
    deducted_tokens: int
    new_accounts: int
    failed_payments: int  # begun in the span and failed; unpaid ones that expired are not among them
    refunds: int  # refunds of the span whose money is, or may be, gone
    disputes: int

    @property
    def recognised_micros(self) -> dict[str, int]:
        """Revenue recognised from the tokens used, by currency, in millionths of it."""
        return {
            currency: self.rate.recognised_micros(self.usage.billable_tokens, currency)
            for currency in self.rate.net_cents
        }

    @property
    def real_margin_microusd(self) -> int:
        return self.rate.real_margin_microusd(self.usage)

    @property
    def real_margin_permille(self) -> int | None:
        """Of the revenue recognised in USD; None when there is none."""
        recognised = self.rate.recognised_micros(self.usage.billable_tokens)
        return self.real_margin_microusd * 1_000 // recognised if recognised else None


def get_token_stats(*, since: datetime, until: datetime) -> TokenStats:
    """The system's figures of a span: usage, revenue by currency, margins, what was given and taken back.

    The multiplier margin is that of tokens (`usage.multiplier_margin_permille`), the real margin that of money, see
    RevenueRate.
    """
    sums = sum_ledger(edges=[BEGINNING, since, until])
    # Without a purchase they are of another product on the same Stripe account.
    reversals = PaymentReversal.objects.filter(purchase__isnull=False, created_at__gte=since, created_at__lt=until)
    taken = {
        kind: reversals.filter(PaymentReversal.which_take_money(), kind=kind).count() for kind in PaymentReversal.Kind
    }

    def tokens(*types: str) -> int:
        return sum(each.tokens for (number, type, _), each in sums.items() if number == 1 and type in types)

    return TokenStats(
        usage=sum_usage(edges=[since, until]).get((0, ()), UsageSums()),
        revenue=_revenue(sums, 1),
        rate=_rate(sums),
        granted_tokens=tokens(Type.ADMIN_GRANT, Type.BONUS),
        refunded_tokens=-tokens(Type.REFUND),
        deducted_tokens=-tokens(Type.ADMIN_DEDUCTION),
        new_accounts=TokenAccount.objects.filter(created_at__gte=since, created_at__lt=until).count(),
        failed_payments=Purchase.objects.filter(
            state=Purchase.State.FAILED, created_at__gte=since, created_at__lt=until
        ).count(),
        refunds=taken[PaymentReversal.Kind.REFUND],
        disputes=taken[PaymentReversal.Kind.DISPUTE],
    )


@dataclass(frozen=True, slots=True)
class LiveStats:
    """How things stand now."""

    accounts: int
    active_accounts: int
    suspended_accounts: int  # in debt ones included
    blocked_accounts: int
    # By available tokens, each account in one: the bands of the account search (billing/staff/accounts.py).
    indebted_accounts: int  # less than none
    critical_accounts: int  # below the critical threshold of the settings
    low_accounts: int  # at the low threshold or below it
    balance_tokens: int  # all balances: what is owed to users
    reserved_tokens: int
    running_operations: int
    auto_recharging_accounts: int
    paying_accounts: int  # have ever bought
    webhooks: "WebhookHealth"

    @property
    def average_balance_tokens(self) -> int | None:
        """Rounded down."""
        return self.balance_tokens // self.accounts if self.accounts else None


@dataclass(frozen=True, slots=True)
class WebhookHealth:
    """How the inbox of Stripe's events stands."""

    waiting: int  # received, not handled yet
    failed: int  # to be handled again
    aside: int  # a person has to look
    newest_received_at: datetime | None
    median_lag_ms: int | None  # from receiving to having handled, of the newest 1,000


def get_live_stats() -> LiveStats:
    """Accounts, balances and running operations as they are now: one look at every account, none at the history."""
    settings = system_settings.get_system_settings()
    is_active = Q(status=TokenAccount.Status.ACTIVE)
    critical_tokens, low_tokens = settings.critical_balance_tokens, settings.low_balance_tokens
    row = TokenAccount.objects.annotate(available_tokens=F("balance") - F("reserved")).aggregate(
        accounts=Count("pk"),
        active_accounts=Count("pk", filter=is_active),
        suspended_accounts=Count("pk", filter=Q(status=TokenAccount.Status.SUSPENDED)),
        blocked_accounts=Count("pk", filter=Q(status=TokenAccount.Status.BLOCKED)),
        indebted_accounts=Count("pk", filter=Q(available_tokens__lt=0)),
        critical_accounts=Count("pk", filter=Q(available_tokens__gte=0, available_tokens__lt=critical_tokens)),
        low_accounts=Count("pk", filter=Q(available_tokens__gte=critical_tokens, available_tokens__lte=low_tokens)),
        balance_tokens=Sum("balance", default=0),
        reserved_tokens=Sum("reserved", default=0),
        auto_recharging_accounts=Count("pk", filter=Q(auto_recharge_enabled=True)),
        paying_accounts=Count("pk", filter=Q(lifetime_purchased_tokens__gt=0)),
    )
    return LiveStats(
        **{name: int(value) for name, value in row.items()},
        running_operations=TokenUsage.objects.filter(status=TokenUsage.Status.RESERVED).count(),
        webhooks=_webhook_health(),
    )


_WEBHOOK_LAG = """
SELECT percentile_disc(0.5) WITHIN GROUP (ORDER BY processed_at - received_at)
  FROM (
    SELECT processed_at, received_at FROM billing_stripeevent
     WHERE state = 'processed' AND processed_at IS NOT NULL ORDER BY received_at DESC LIMIT %(limit)s
  ) AS newest"""


def _webhook_health() -> WebhookHealth:
    State = StripeEvent.State  # noqa: N806
    # By state, as the index has them: those that a person or a worker has to do something about are few.
    open_states = (State.RECEIVED, State.FAILED, State.ASIDE)
    counts = dict(
        StripeEvent.objects.filter(state__in=open_states).values_list("state").annotate(Count("pk")).order_by()
    )
    newest = [
        StripeEvent.objects.filter(state=state).order_by("-received_at").values_list("received_at", flat=True).first()
        for state in State.values
    ]
    [(lag,)] = _rows(_WEBHOOK_LAG, {"limit": MAX_TIMED_EVENTS})
    return WebhookHealth(
        waiting=counts.get(State.RECEIVED, 0),
        failed=counts.get(State.FAILED, 0),
        aside=counts.get(State.ASIDE, 0),
        newest_received_at=max((at for at in newest if at), default=None),
        median_lag_ms=None if lag is None else lag // timedelta(milliseconds=1),
    )


# --- Models and operations --------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class ModelStats:
    provider: str
    model: str
    now: UsageSums
    before: UsageSums  # in the span that it is compared with
    real_margin_microusd: int


def get_model_usage_stats(
    *, since: datetime, until: datetime, before: tuple[datetime, datetime] | None = None
) -> list[ModelStats]:
    """Each model that ended an operation in the span, or in the one before it, most billable tokens first.

    `real_margin_microusd` takes the average revenue of a token (RevenueRate) for the model's billable tokens.
    """
    now, earlier = (
        {key: each for (_, key), each in sum_usage(edges=span, by="model").items()} if span else {}
        for span in ((since, until), before)
    )
    rate = _rate(sum_ledger(edges=[BEGINNING, until]))
    found = [
        ModelStats(
            provider=provider,
            model=model,
            now=now.get((provider, model), UsageSums()),
            before=earlier.get((provider, model), UsageSums()),
            real_margin_microusd=rate.real_margin_microusd(now.get((provider, model), UsageSums())),
        )
        for provider, model in now.keys() | earlier.keys()
    ]
    return sorted(found, key=lambda each: (-each.now.billable_tokens, -each.now.operations, each.provider, each.model))


@dataclass(frozen=True, slots=True)
class Latency:
    """How long the newest operations of a type took that succeeded, in milliseconds."""

    operations: int
    median_ms: int
    p95_ms: int


@dataclass(frozen=True, slots=True)
class OperationStats:
    totals: dict[str, UsageSums]  # by operation type
    edges: list[datetime]  # of the buckets
    trend: dict[tuple[int, str], UsageSums]  # by number of the bucket and operation type; what has none is left out
    latency: dict[str, Latency]  # by operation type; of the span's newest 20,000 that succeeded


def trend_buckets(*, since: datetime, until: datetime) -> list[BucketName]:
    """The buckets that `get_operation_stats` offers for a span, the smallest first. There is always one.

    Days of most time zones are made of hours, and a year of those is more than a page should wait for.
    """
    names = stats.list_buckets(since=since, until=until)
    return [name for name in names if name != "day" or until - since < MAX_SPAN_BY_DAY]


def get_operation_stats(*, since: datetime, until: datetime, bucket: BucketName | None = None) -> OperationStats:
    """Operations by type, in the whole span and by hour, day, week or month in the time zone of `since`.

    Sums and mean durations are of all operations. Percentiles cannot be added up, so they are of the newest ones.
    """
    bucket = bucket or stats.default_bucket(since=since, until=until.astimezone(since.tzinfo))
    edges = stats.time_edges(since=since, until=until.astimezone(since.tzinfo), bucket=bucket)
    trend = {(number, type): each for (number, (type,)), each in sum_usage(edges=edges, by="operation").items()}
    totals: dict[str, UsageSums] = defaultdict(UsageSums)
    for (_, type), each in trend.items():
        totals[type] += each
    return OperationStats(
        totals=dict(sorted(totals.items(), key=lambda item: (-item[1].operations, item[0]))),
        edges=edges,
        trend=trend,
        latency=_latency(since, until),
    )


_LATENCY = """
SELECT operation_type, count(*), percentile_disc(0.5) WITHIN GROUP (ORDER BY duration_ms),
       percentile_disc(0.95) WITHIN GROUP (ORDER BY duration_ms)
  FROM (
    SELECT operation_type, duration_ms FROM billing_tokenusage
     WHERE completed_at >= %(since)s AND completed_at < %(until)s AND status = 'succeeded' AND duration_ms IS NOT NULL
     ORDER BY completed_at DESC LIMIT %(limit)s
  ) AS newest
 GROUP BY 1"""


def _latency(since: datetime, until: datetime) -> dict[str, Latency]:
    parameters = {"since": since, "until": until, "limit": MAX_TIMED_OPERATIONS}
    return {type: Latency(*figures) for type, *figures in _rows(_LATENCY, parameters)}


# --- Customers --------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Cohort:
    """The accounts that were opened in one month, or what of it is in the span."""

    since: datetime
    until: datetime
    accounts: int
    paying: int  # bought at least once
    auto_recharging: int  # have it switched on now
    used_tokens: int  # until now
    median_days_to_pay: int | None  # from opening the account to the first purchase, of those that paid
    # (number of the span in which it was paid, from 0; currency): cents after discounts and refunds.
    spent_cents: Mapping[tuple[int, str], int]

    @property
    def lifetime_cents(self) -> dict[str, int]:
        """All that its accounts have spent until now, by currency, in cents."""
        total: dict[str, int] = defaultdict(int)
        for (_, currency), cents in self.spent_cents.items():
            total[currency] += cents
        return dict(total)

    @property
    def conversion_permille(self) -> int | None:
        """Of 1,000 accounts, those that bought at least once."""
        return self.paying * 1_000 // self.accounts if self.accounts else None

    def lifetime_value_cents(self, currency: str) -> int | None:
        """What an account has brought until now, on average, in cents of one currency, rounded down."""
        return self.lifetime_cents.get(currency, 0) // self.accounts if self.accounts else None


_COHORTS = """
SELECT width_bucket(account.created_at, %(edges)s::timestamptz[]) - 1, count(*),
       count(first_paid_at), count(*) FILTER (WHERE auto_recharge_enabled), sum(lifetime_used_tokens)::bigint,
       percentile_disc(0.5) WITHIN GROUP (ORDER BY first_paid_at - account.created_at)
  FROM billing_tokenaccount AS account
  LEFT JOIN (
    SELECT account_id, min(created_at) AS first_paid_at FROM billing_tokentransaction
     WHERE type <> 'usage' AND type IN ('purchase', 'auto_recharge') GROUP BY account_id
  ) AS paid ON paid.account_id = account.id
 WHERE account.created_at >= %(since)s AND account.created_at < %(until)s
 GROUP BY 1 ORDER BY 1"""

_COHORTS_SPENT = """
SELECT width_bucket(account.created_at, %(edges)s::timestamptz[]) - 1,
       width_bucket(entry.created_at, %(edges)s::timestamptz[]) - 1, entry.currency, sum(paid_cents)::bigint
  FROM billing_tokentransaction AS entry
  JOIN billing_tokenaccount AS account ON account.id = entry.account_id
 WHERE entry.type <> 'usage' AND entry.type IN ('purchase', 'auto_recharge', 'refund')
   AND account.created_at >= %(since)s AND account.created_at < %(until)s
 GROUP BY 1, 2, 3"""


def get_cohorts(*, since: datetime, until: datetime) -> list[Cohort]:
    """Accounts by the month they were opened in (in the time zone of `since`), and what they have spent since then.

    What was paid after `until` counts in the span after the last.
    """
    edges = stats.time_edges(since=since, until=until.astimezone(since.tzinfo), bucket="month")
    parameters = {"edges": edges, "since": since, "until": until}
    spent: dict[int, dict[tuple[int, str], int]] = defaultdict(dict)
    for cohort, paid_in, currency, cents in _rows(_COHORTS_SPENT, parameters):
        spent[cohort][paid_in, currency] = cents
    return [
        Cohort(
            since=edges[number],
            until=edges[number + 1],
            accounts=accounts,
            paying=paying,
            auto_recharging=auto_recharging,
            used_tokens=used_tokens,
            median_days_to_pay=None if delay is None else delay.days,
            spent_cents=spent[number],
        )
        for number, accounts, paying, auto_recharging, used_tokens, delay in _rows(_COHORTS, parameters)
    ]


@dataclass(frozen=True, slots=True)
class PackageSales:
    """What a package sold for one currency in a span."""

    package_name: str
    currency: str
    sales: int
    tokens: int
    paid_cents: int  # after discounts, before refunds, without tax
    discount_cents: int
    auto_recharges: int  # of the sales
    buyers: int

    @property
    def average_cents(self) -> int:
        return self.paid_cents // self.sales


_PACKAGE_SALES = """
SELECT package_name, entry.currency, count(*), sum(entry.amount)::bigint, sum(paid_cents)::bigint,
       sum(discount_cents)::bigint, count(*) FILTER (WHERE entry.type = 'auto_recharge'),
       count(DISTINCT entry.account_id)
  FROM billing_tokentransaction AS entry
  JOIN billing_purchase AS purchase ON purchase.id = entry.purchase_id
 WHERE entry.type <> 'usage' AND entry.type IN ('purchase', 'auto_recharge')
   AND entry.created_at >= %(since)s AND entry.created_at < %(until)s
 GROUP BY 1, 2 ORDER BY 5 DESC, 1, 2"""


def get_package_sales(*, since: datetime, until: datetime) -> list[PackageSales]:
    """What was sold in the span, by package (its name when it was bought) and currency, most money first."""
    return [PackageSales(*row) for row in _rows(_PACKAGE_SALES, {"since": since, "until": until})]
