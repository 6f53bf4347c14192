"""The week, as admins are told of it."""

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from django.db.models import Count, Q, Sum
from django.urls import reverse
from django.utils import timezone

from billing.models import (
    PaymentReversal,
    Purchase,
    TokenAccount,
    TokenTransaction,
    TokenUsage,
)
from billing.models.notification import NotificationKind as Kind
from billing.notifications.inbox import notify
from billing.notifications.messages import admin_ids, count_words, token_words
from billing.pricing import display_price


@dataclass(frozen=True, slots=True)
class WeeklyFigures:
    """What happened from `since` to before `until`, and how things stand now."""

    since: datetime
    until: datetime
    operations: int
    billable_tokens: int
    revenue_cents: dict[str, int]  # by currency; refunds are not taken off
    failed_payments: int
    open_disputes: int
    accounts_in_debt: int

    @classmethod
    def of_week_before(cls, now: datetime) -> "WeeklyFigures":
        """The seven whole days (UTC) before the day of `now`."""
        until = now.astimezone(UTC).replace(hour=0, minute=0, second=0, microsecond=0)
        since = until - timedelta(days=7)
        in_week = Q(created_at__gte=since, created_at__lt=until)
        used = TokenUsage.objects.filter(in_week, status=TokenUsage.Status.SUCCEEDED).aggregate(
            operations=Count("id"), billable_tokens=Sum("billable_tokens", default=0)
        )
        revenue = (
            TokenTransaction.objects.filter(in_week, type__in=TokenTransaction.CREDITS_FOR_MONEY)
            .order_by("currency")
            .values_list("currency")
            .annotate(Sum("paid_cents", default=0))
        )
        return cls(
            since=since,
            until=until,
            operations=used["operations"],
            billable_tokens=used["billable_tokens"],
            revenue_cents=dict(revenue),
            failed_payments=Purchase.objects.filter(in_week, state=Purchase.State.FAILED).count(),
            # Without a purchase they are of another product on the same Stripe account.
            open_disputes=PaymentReversal.objects.filter(kind=PaymentReversal.Kind.DISPUTE, purchase__isnull=False)
            .exclude(status__in=PaymentReversal.FINAL_STATUSES)
            .count(),
            # An account in debt is never active; its status has an index, the balance has none.
            accounts_in_debt=TokenAccount.objects.filter(
                balance__lt=0, status__in=(TokenAccount.Status.SUSPENDED, TokenAccount.Status.BLOCKED)
            ).count(),
        )


def weekly_summary(*, now: datetime | None = None) -> int:
    """Tell every admin how the last seven days went, once per day of sending. Returns how many are told."""
    figures = WeeklyFigures.of_week_before(now or timezone.now())
    prices = [display_price(cents, currency) for currency, cents in figures.revenue_cents.items() if cents]
    revenue = " and ".join([", ".join(prices[:-1]), prices[-1]] if len(prices) > 1 else prices)
    last_day = figures.until - timedelta(days=1)
    period = f"{figures.since:%-d %b} to {last_day:%-d %b %Y}"
    told = 0
    for user_id in admin_ids():
        told += 1
        notify(
            user_id=user_id,
            kind=Kind.WEEKLY_SUMMARY,
            key=f"{figures.until:%Y-%m-%d}",
            title=f"The week from {period}",
            body=(
                f"{count_words(figures.operations, 'operation')} used {token_words(figures.billable_tokens)}. "
                f"{f'Payments brought {revenue}' if revenue else 'No payments came in'}, and "
                f"{count_words(figures.failed_payments, 'payment')} failed. Open disputes: {figures.open_disputes:,}. "
                f"Accounts in debt: {figures.accounts_in_debt:,}."
            ),
            link=reverse("tokens:notifications"),
            action="Open it in Postmate",
            facts=[
                ("Period (UTC)", period),
                ("Operations", f"{figures.operations:,}"),
                ("Billable tokens", f"{figures.billable_tokens:,}"),
                *(
                    (f"Revenue in {currency.upper()}, before refunds", display_price(cents, currency))
                    for currency, cents in figures.revenue_cents.items()
                ),
                ("Failed payments", f"{figures.failed_payments:,}"),
                ("Open disputes", f"{figures.open_disputes:,}"),
                ("Accounts in debt", f"{figures.accounts_in_debt:,}"),
            ],
        )
    return told
