"""The sections of the figures: what each says of a span, as numbers, tables and drawings.

Long, since all six are here, each a function and the tables that it is made of.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import date, timedelta
from operator import itemgetter
from urllib.parse import urlencode

from django.template.defaultfilters import date as date_text
from django.urls import reverse
from django.utils.text import capfirst

from accounts.permissions import SignedInRequest
from billing.dashboard.content import (
    COUNT,
    DAYS,
    MILLISECONDS,
    PERCENT,
    TOKENS,
    USD_MICROS,
    Amount,
    Content,
    DataTable,
    Drawing,
    Figure,
    Unit,
    cents_of,
    change_text,
    micros_of,
)
from billing.dashboard.span import Span
from billing.figures import business
from billing.figures.business import TokenStats
from billing.figures.customers import Cohort, PackageSales, get_cohorts, get_package_sales
from billing.figures.liability import LiabilityDoesNotBalance, LiabilityRow, liability_roll_forward
from billing.figures.sums import UsageSums
from billing.models import ModelPrice, TokenUsage
from billing.usage import charts, stats
from billing.usage.charts import BUCKET_LABELS, Chart, Table
from billing.usage.stats import BucketName
from kit import periods

MAX_BARS = 10
COHORT_MONTHS = 12
MAX_COHORT_MONTHS = 36  # beyond that the table is wider than anybody reads


def _buckets(span: Span, wanted: str) -> tuple[list[tuple[BucketName, str]], BucketName]:
    """The buckets that are offered, and the one that is wanted where it is among them."""
    offered = business.trend_buckets(since=span.since, until=span.until)
    default = stats.default_bucket(since=span.since, until=span.until)
    chosen = next((name for name in offered if name == wanted), default)
    return [(name, BUCKET_LABELS[name]) for name in offered], chosen


def live(span: Span, request: SignedInRequest) -> Content:
    """How things stand now; the period does not matter."""
    now = business.get_live_stats()
    webhooks = now.webhooks
    accounts_url, events_url = reverse("dashboard:accounts"), reverse("dashboard:events")

    def listed(label: str, number: int, url: str, *, tone: str = "", **query: str) -> Figure:
        if not number:
            return Figure(label, Amount(number, COUNT))
        return Figure(label, Amount(number, COUNT), tone=tone, url=f"{url}?{urlencode(query)}")

    return Content(
        figures=[
            Figure("Owed to users", Amount(now.balance_tokens, TOKENS)),
            Figure("Average balance", Amount(now.average_balance_tokens, TOKENS)),
            Figure("Reserved", Amount(now.reserved_tokens, TOKENS)),
            Figure("Running operations", Amount(now.running_operations, COUNT)),
            listed("Accounts", now.accounts, accounts_url),
            listed("Active accounts", now.active_accounts, accounts_url, status="active"),
            listed("Suspended accounts", now.suspended_accounts, accounts_url, status="suspended"),
            listed("Blocked accounts", now.blocked_accounts, accounts_url, status="blocked"),
            listed("Accounts in debt", now.indebted_accounts, accounts_url, tone="warn", band="debt"),
            listed("Low balances", now.low_accounts, accounts_url, band="low"),
            listed("Critical balances", now.critical_accounts, accounts_url, band="critical"),
            Figure("Auto-recharge on", Amount(now.auto_recharging_accounts, COUNT)),
            listed("Stripe events waiting", webhooks.waiting, events_url, state="received"),
            listed("Stripe events to repeat", webhooks.failed, events_url, tone="warn", state="failed"),
            listed("Stripe events set aside", webhooks.aside, events_url, tone="bad", state="aside"),
            Figure("Typical delay of an event", Amount(webhooks.median_lag_ms, MILLISECONDS)),
        ],
        newest_event_at=webhooks.newest_received_at,
    )


def system(span: Span, request: SignedInRequest) -> Content:
    now = business.get_token_stats(since=span.since, until=span.until)
    before = business.get_token_stats(since=span.before[0], until=span.before[1]) if span.before else None

    def figure(label: str, unit: Unit, value: Callable[[TokenStats], int | None]) -> Figure:
        return Figure(label, Amount(value(now), unit), Amount(value(before), unit) if before else None)

    figures = [
        figure("Billable tokens", TOKENS, lambda each: each.usage.billable_tokens),
        figure("Actual tokens", TOKENS, lambda each: each.usage.actual_tokens),
        figure("Multiplier margin", PERCENT, lambda each: each.usage.multiplier_margin_permille),
        figure("Unbilled tokens", TOKENS, lambda each: each.usage.unbilled_tokens),
        figure("Operations", COUNT, lambda each: each.usage.operations),
        figure("Success rate", PERCENT, lambda each: each.usage.success_permille),
        figure("Provider cost", USD_MICROS, lambda each: each.usage.provider_cost_microusd),
        figure("Real margin", USD_MICROS, lambda each: each.real_margin_microusd),
        figure("Real margin, of revenue", PERCENT, lambda each: each.real_margin_permille),
        figure("Tokens granted", TOKENS, lambda each: each.granted_tokens),
        figure("Tokens taken back", TOKENS, lambda each: each.refunded_tokens),
        figure("Tokens deducted", TOKENS, lambda each: each.deducted_tokens),
        figure("Tokens ended", TOKENS, lambda each: each.ended_tokens),
        figure("New accounts", COUNT, lambda each: each.new_accounts),
        figure("Failed payments", COUNT, lambda each: each.failed_payments),
        figure("Refunds", COUNT, lambda each: each.refunds),
        figure("Disputes", COUNT, lambda each: each.disputes),
    ]
    net_before = {each.currency: each.net_cents for each in before.revenue} if before else {}
    rows: list[list[str | Amount]] = []
    for each in now.revenue:
        cents = cents_of(each.currency)
        rows.append(
            [
                each.currency.upper(),
                Amount(each.sales, COUNT),
                Amount(each.sold_tokens, TOKENS),
                Amount(each.sales_cents, cents),
                Amount(each.discount_cents, cents),
                Amount(each.refunded_cents, cents),
                Amount(each.net_cents, cents),
                Amount(net_before.get(each.currency, 0) if before else None, cents),
                Amount(now.recognised_micros.get(each.currency, 0), micros_of(each.currency)),
            ]
        )
    return Content(
        figures=figures,
        tables=[
            DataTable(
                "Revenue by currency",
                ["Currency", "Sales", "Tokens sold", "Sold for", "Discounts", "Refunded", "Net", "Net before",
                 "Recognised"],
                rows,
                note="" if rows else "Nothing was sold or refunded in this period.",
            )
        ],
    )  # fmt: skip


def models(span: Span, request: SignedInRequest) -> Content:
    found = business.get_model_usage_stats(since=span.since, until=span.until, before=span.before)
    names = {(price.provider, price.model): price.display_name for price in ModelPrice.objects.all()}
    if not found:
        return Content(empty="No operation ended in this period.")
    rows: list[list[str | Amount]] = []
    for each in found:
        now = each.now
        rows.append(
            [
                names.get((each.provider, each.model), each.model),
                Amount(now.operations, COUNT),
                Amount(now.billable_tokens, TOKENS),
                _trend(now.billable_tokens, each.before.billable_tokens) if span.before else "–",
                Amount(now.actual_tokens, TOKENS),
                Amount(now.multiplier_margin_permille, PERCENT),
                Amount(now.provider_cost_microusd, USD_MICROS),
                Amount(each.real_margin_microusd, USD_MICROS),
                Amount(now.unbilled_tokens, TOKENS),
                Amount(now.success_permille, PERCENT),
            ]
        )
    data = DataTable(
        "By model",
        ["Model", "Operations", "Billable", "Trend", "Actual", "Multiplier margin", "Provider cost", "Real margin",
         "Unbilled", "Success rate"],
        rows,
        is_wide=True,
    )  # fmt: skip
    bars = [each for each in found if each.now.billable_tokens][:MAX_BARS]
    labels = [names.get((each.provider, each.model), each.model) for each in bars]
    tokens = [each.now.billable_tokens for each in bars]
    pairs = list(zip(labels, tokens, strict=True))
    chart = Chart(
        id="models",
        title="Billable tokens by model",
        summary="Bars of the billable tokens: " + "; ".join(f"{label} {value:,}" for label, value in pairs) + ".",
        kind="bars",
        labels=labels,
        series=[("Billable tokens", tokens)],
        note=f"The first {MAX_BARS}." if len(found) > MAX_BARS else "",
        table=Table(["Model", "Billable tokens"], [[label, f"{value:,}"] for label, value in pairs]),
    )
    return Content(tables=[data], drawings=[Drawing(chart)] if bars else [])


def _trend(now: int, before: int) -> str:
    return "new" if now and not before else capfirst(change_text(now, before, TOKENS))


TYPES = dict(TokenUsage.OperationType.choices)


def operations(span: Span, request: SignedInRequest) -> Content:
    buckets, bucket = _buckets(span, request.GET.get("by", ""))
    found = business.get_operation_stats(since=span.since, until=span.until, bucket=bucket)
    if not found.totals:
        return Content(empty="No operation ended in this period.", buckets=buckets, bucket=bucket)
    labels = charts.bucket_labels(found.edges, bucket)
    trend = [
        {type: found.trend.get((number, type), UsageSums()) for type in found.totals} for number in range(len(labels))
    ]
    total = sum(found.totals.values(), UsageSums())
    return Content(
        tables=[_by_type(found, total)],
        drawings=[
            _operations_over_time(charts.bucket_head(bucket), labels, trend, total),
            _time_taken(charts.bucket_head(bucket), labels, trend, total),
        ],
        buckets=buckets,
        bucket=bucket,
    )


def _by_type(found: business.OperationStats, total: UsageSums) -> DataTable:
    rows: list[list[str | Amount]] = []
    for type, each in [*found.totals.items(), ("", total)]:
        latency = found.latency.get(type)
        rows.append(
            [
                str(TYPES.get(type, type or "All")),
                Amount(each.operations, COUNT),
                Amount(each.operations * 1_000 // total.operations, PERCENT),
                Amount(each.tokens_per_operation, TOKENS),
                Amount(each.success_permille, PERCENT),
                Amount(None if each.success_permille is None else 1_000 - each.success_permille, PERCENT),
                Amount(each.failed - each.expired, COUNT),
                Amount(each.expired, COUNT),
                Amount(each.mean_duration_ms, MILLISECONDS),
                Amount(latency.median_ms if latency else None, MILLISECONDS),
                Amount(latency.p95_ms if latency else None, MILLISECONDS),
            ]
        )
    return DataTable(
        "By operation",
        ["Operation", "Ended", "Share", "Tokens each", "Success rate", "Failure rate", "Failed", "Expired",
         "Mean time", "Median time", "95 % within"],
        rows,
        is_wide=True,
    )  # fmt: skip


def _operations_over_time(
    head: str, labels: Sequence[str], trend: Sequence[Mapping[str, UsageSums]], total: UsageSums
) -> Drawing:
    """Bars of each bucket's operations, one colour for each type."""
    types = list(trend[0])
    names = [str(TYPES.get(type, type)) for type in types]
    sums = [sum(row.values(), UsageSums()) for row in trend]
    data = DataTable(
        "Operations over time",
        [head, *names, "All", "Succeeded", "Failed", "Success rate"],
        [
            [
                label,
                *(Amount(row[type].operations, COUNT) for type in types),
                Amount(each.operations, COUNT),
                Amount(each.succeeded, COUNT),
                Amount(each.failed, COUNT),
                Amount(each.success_permille, PERCENT),
            ]
            for label, row, each in zip(labels, trend, sums, strict=True)
        ],
        is_wide=True,
    )
    most, label = max(((each.operations, label) for each, label in zip(sums, labels, strict=True)), key=itemgetter(0))
    chart = Chart(
        id="operations",
        title=data.title,
        summary=f"Bars of the operations that ended: {total.operations:,} in all, the most in {label}: {most:,}.",
        kind="stacked",
        labels=labels,
        series=[(name, [row[type].operations for row in trend]) for name, type in zip(names, types, strict=True)],
        table=data.table,
    )
    return Drawing(chart, data)


def _time_taken(
    head: str, labels: Sequence[str], trend: Sequence[Mapping[str, UsageSums]], total: UsageSums
) -> Drawing:
    """A line of how long each bucket's operations took."""
    sums = [sum(row.values(), UsageSums()) for row in trend]
    data = DataTable(
        "Time taken",
        [head, "Mean time", "Tokens each"],
        [
            [label, Amount(each.mean_duration_ms, MILLISECONDS), Amount(each.tokens_per_operation, TOKENS)]
            for label, each in zip(labels, sums, strict=True)
        ],
    )
    chart = Chart(
        id="latency",
        title=data.title,
        summary=f"A line of the mean time: {Amount(total.mean_duration_ms, MILLISECONDS).text} in all.",
        kind="line",
        labels=labels,
        series=[("Milliseconds", [each.mean_duration_ms for each in sums])],
        note="The mean of the operations that succeeded, in milliseconds.",
        table=data.table,
    )
    return Drawing(chart, data)


def customers(span: Span, request: SignedInRequest) -> Content:
    """Cohorts by the month of sign-up: those of the period, but of twelve months at least."""
    last_month = (span.until - timedelta(days=1)).date().replace(day=1)
    first_month = min(span.since.date().replace(day=1), periods.add_months(last_month, 1 - COHORT_MONTHS))
    first_month = max(first_month, periods.add_months(last_month, 1 - MAX_COHORT_MONTHS))
    cohorts = get_cohorts(
        since=periods.midnight(first_month), until=periods.midnight(periods.add_months(last_month, 1))
    )
    sales = get_package_sales(since=span.since, until=span.until)
    now = business.get_live_stats()
    if not cohorts and not sales:
        return Content(empty="Nobody has signed up or bought anything in this time.")

    figures = [
        Figure("Have ever bought", Amount(_permille(now.paying_accounts, now.accounts), PERCENT)),
        Figure("Paying accounts", Amount(now.paying_accounts, COUNT)),
        Figure("Auto-recharge on", Amount(_permille(now.auto_recharging_accounts, now.accounts), PERCENT)),
    ]
    for currency in sorted({each.currency for each in sales}):
        number = sum(each.sales for each in sales if each.currency == currency)
        paid = sum(each.paid_cents for each in sales if each.currency == currency)
        figures.append(Figure(f"Average purchase, {currency.upper()}", Amount(paid // number, cents_of(currency))))
    currencies = sorted({currency for each in cohorts for currency in each.lifetime_cents})
    accounts = sum(each.accounts for each in cohorts)
    for currency in currencies:
        cents = sum(each.lifetime_cents.get(currency, 0) for each in cohorts)
        figures.append(Figure(f"Lifetime value, {currency.upper()}", Amount(cents // accounts, cents_of(currency))))
    return Content(
        figures=figures, tables=[*_package_tables(sales), *_cohort_tables(cohorts, currencies, first_month, last_month)]
    )


def _permille(part: int, whole: int) -> int | None:
    return part * 1_000 // whole if whole else None


def _package_tables(sales: Sequence[PackageSales]) -> Iterator[DataTable]:
    total = sum(each.sales for each in sales)
    yield DataTable(
        "Packages sold in the period",
        ["Package", "Currency", "Sales", "Share of sales", "Tokens", "Sold for", "Discounts", "Average",
         "By auto-recharge", "Buyers"],
        [
            [
                each.package_name,
                each.currency.upper(),
                Amount(each.sales, COUNT),
                Amount(_permille(each.sales, total), PERCENT),
                Amount(each.tokens, TOKENS),
                Amount(each.paid_cents, cents_of(each.currency)),
                Amount(each.discount_cents, cents_of(each.currency)),
                Amount(each.average_cents, cents_of(each.currency)),
                Amount(each.auto_recharges, COUNT),
                Amount(each.buyers, COUNT),
            ]
            for each in sales
        ],
        note="" if sales else "Nothing was sold in this period.",
        is_wide=True,
    )  # fmt: skip


def _cohort_tables(
    cohorts: Sequence[Cohort], currencies: Sequence[str], first_month: date, last_month: date
) -> Iterator[DataTable]:
    if not cohorts:
        return
    month = [date_text(each.since, "M Y") for each in cohorts]
    yield DataTable(
        "By month of sign-up",
        ["Month", "Accounts", "Bought", "Conversion", "Days to buy", "Auto-recharge", "Tokens used",
         *(f"Per account, {currency.upper()}" for currency in currencies)],
        [
            [
                label,
                Amount(each.accounts, COUNT),
                Amount(each.paying, COUNT),
                Amount(each.conversion_permille, PERCENT),
                Amount(each.median_days_to_pay, DAYS),
                Amount(_permille(each.auto_recharging, each.accounts), PERCENT),
                Amount(each.used_tokens, TOKENS),
                *(Amount(each.lifetime_value_cents(currency), cents_of(currency)) for currency in currencies),
            ]
            for label, each in zip(month, cohorts, strict=True)
        ],
        is_wide=True,
    )  # fmt: skip
    for currency in currencies:
        yield _spending_table(cohorts, month, currency, first_month, last_month)


def _spending_table(
    cohorts: Sequence[Cohort], labels: Sequence[str], currency: str, first_month: date, last_month: date
) -> DataTable:
    """What each cohort spent in its first month, its second, and so on; no figure for months that are yet to come."""
    cents = cents_of(currency)
    months = _months_between(cohorts[0].since, last_month) + 1
    rows: list[list[str | Amount]] = []
    for label, each in zip(labels, cohorts, strict=True):
        number = _months_between(first_month, each.since)
        age = _months_between(each.since, last_month)
        spent = [
            each.spent_cents.get((number + month, currency), 0) if month <= age else None for month in range(months)
        ]
        total = Amount(each.lifetime_cents.get(currency, 0), cents)
        rows.append([label, total, *(Amount(value, cents) for value in spent)])
    return DataTable(
        f"Spent by month of sign-up, {currency.upper()}",
        ["Month", "Until now", *(f"Month {number}" for number in range(1, months + 1))],
        rows,
        is_wide=True,
    )


def _months_between(first: date, second: date) -> int:
    return (second.year - first.year) * 12 + second.month - first.month


def liability(span: Span, request: SignedInRequest) -> Content:
    bucket: BucketName = "month" if span.days > 62 else "week" if span.days > 14 else "day"
    edges = stats.time_edges(since=span.since, until=span.until, bucket=bucket)
    try:
        rows = liability_roll_forward(edges=edges)
    except LiabilityDoesNotBalance as error:
        return Content(problem=str(error))
    whole = LiabilityRow(
        since=span.since,
        until=span.until,
        opening_tokens=rows[0].opening_tokens,
        sold_tokens=sum(each.sold_tokens for each in rows),
        granted_tokens=sum(each.granted_tokens for each in rows),
        used_tokens=sum(each.used_tokens for each in rows),
        refunded_tokens=sum(each.refunded_tokens for each in rows),
        deducted_tokens=sum(each.deducted_tokens for each in rows),
        ended_tokens=sum(each.ended_tokens for each in rows),
        closing_tokens=rows[-1].closing_tokens,
    )
    labels = [*charts.bucket_labels(edges, bucket), "Whole period"]
    columns = ("opening", "sold", "granted", "used", "refunded", "deducted", "ended", "closing")
    names = ("Opening", "+ Sold", "+ Granted", "− Used", "− Refunded", "− Deducted", "− Ended", "= Closing")

    def amounts(row: LiabilityRow) -> list[Amount]:
        return [Amount(getattr(row, f"{name}_tokens"), TOKENS) for name in columns]

    return Content(
        figures=[Figure(name, amount) for name, amount in zip(names, amounts(whole), strict=True)],
        tables=[
            DataTable(
                "Roll-forward",
                [charts.bucket_head(bucket), *names],
                [[label, *amounts(row)] for label, row in zip(labels, [*rows, whole], strict=True)],
                is_wide=True,
            )
        ],
    )


@dataclass(frozen=True, slots=True)
class Section:
    name: str
    title: str
    content: Callable[[Span, SignedInRequest], Content]
    polls: bool = False  # shows how things stand now, whatever the period


# templates/dashboard/_definitions.html says how their figures are calculated.
SECTIONS = {
    section.name: section
    for section in (
        Section("live", "Now", live, polls=True),
        Section("system", "The period", system),
        Section("models", "Models", models),
        Section("operations", "Operations", operations),
        Section("customers", "Customers", customers),
        Section("liability", "Owed to users", liability),
    )
}
