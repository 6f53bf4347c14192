"""Figures of the whole business, for the dashboard and the finance export. Pure reads, made of `sums.py`."""

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta

from django.db.models import Count, Q, Sum

from billing.catalogue import system_settings
from billing.figures.sums import BEGINNING, LedgerSums, UsageSums, rows_of, sum_ledger, sum_usage
from billing.models import PaymentReversal, Purchase, StripeEvent, TokenAccount, TokenTransaction, TokenUsage
from billing.models.account import AVAILABLE_TOKENS
from billing.usage import stats
from billing.usage.stats import BucketName

MAX_TIMED_OPERATIONS = 20_000  # whose durations are sorted: measured at 30 ms
MAX_TIMED_EVENTS = 1_000
MAX_SPAN_BY_DAY = timedelta(days=200)


Type = TokenTransaction.Type


# --- Money ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class RevenueRate:
    """What a token that is used has brought in, on average, as of one moment.

    Bought and given tokens lie in one balance, and nobody can say which of them an operation used. So each counts the
    same: what all sales until then brought in (after discounts and refunds, without tax), over all tokens that came
    into circulation (bought, granted, given as a bonus, less those taken back and those that ended unspent). Given
    tokens brought in nothing and so lower the average.

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
    ended_tokens: int  # of lots, unspent at their end
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
        ended_tokens=-tokens(Type.EXPIRY),
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
    row = TokenAccount.objects.annotate(available_tokens=AVAILABLE_TOKENS).aggregate(
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
    [(lag,)] = rows_of(_WEBHOOK_LAG, {"limit": MAX_TIMED_EVENTS})
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
    return {type: Latency(*figures) for type, *figures in rows_of(_LATENCY, parameters)}
