"""The dashboard's figures: each equals a plain sum over the raw rows, wherever the roll-ups end."""

from collections import defaultdict
from datetime import datetime, timedelta
from itertools import pairwise
from statistics import median_low
from zoneinfo import ZoneInfo

import pytest
from django.db.models import F, Min
from django.utils import timezone
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from billing import ledger
from billing.figures import business, customers, liability
from billing.figures.liability import LiabilityDoesNotBalance
from billing.figures.sums import BEGINNING, LedgerSums, UsageSums, change_permille, sum_ledger, sum_usage
from billing.models import (
    PaymentReversal,
    Purchase,
    RollUp,
    StripeEvent,
    TokenAccount,
    TokenPricing,
    TokenTransaction,
    TokenUsage,
)
from kit.periods import add_months, midnight
from tests.billing.figures.test_rollups import HOUR, invent_history, operation, roll_up_until
from tests.conftest import MakeUser

DAYS = 61
ZONES = [ZoneInfo(name) for name in ("UTC", "Europe/Berlin", "Asia/Kathmandu", "America/New_York")]
Moments = st.integers(0, DAYS * 24 * 60).map(lambda minutes: timedelta(minutes=minutes))


@pytest.fixture
def history(make_user: MakeUser) -> datetime:
    """Two months of an invented past, with operations that were free and one that runs. Returns when it begins."""
    invent_history(transactions=500, users=15, months=2, seed=3)
    alice = make_user("alice")
    now = timezone.now()
    for hours in range(0, 1_000, 37):
        operation(alice, ended_at=now - hours * HOUR, status="succeeded", is_free=True, actual_tokens=11, duration_ms=5)
    operation(alice, ended_at=None)
    TokenAccount.objects.filter(user=alice).update(reserved=F("reserved") + 1)
    return now - timedelta(days=DAYS)


def plain_usage(since: datetime, until: datetime, **only: str) -> UsageSums:
    total = UsageSums()
    for usage in TokenUsage.objects.filter(completed_at__gte=since, completed_at__lt=until, **only):
        good = usage.status == "succeeded"
        charged = good and not usage.is_free
        timed = good and usage.duration_ms is not None
        total += UsageSums(
            1, good, usage.status == "expired", charged, usage.actual_tokens, usage.actual_tokens * charged,
            usage.billable_tokens, usage.unbilled_tokens, usage.provider_cost_microusd, timed,
            (usage.duration_ms or 0) * timed,
        )  # fmt: skip
    return total


def plain_ledger(since: datetime, until: datetime) -> dict[tuple[str, str], LedgerSums]:
    found: dict[tuple[str, str], LedgerSums] = defaultdict(LedgerSums)
    for entry in TokenTransaction.objects.select_related("usage", "purchase"):
        at = entry.usage.completed_at if entry.usage else entry.created_at
        assert at is not None
        if since <= at < until:
            is_sale = entry.type in TokenTransaction.CREDITS_FOR_MONEY
            discount_cents = entry.purchase.discount_cents if entry.purchase and is_sale else 0
            found[entry.type, entry.currency] += LedgerSums(1, entry.amount, entry.paid_cents or 0, discount_cents)
    return dict(found)


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rolled=st.none() | Moments, moments=st.lists(Moments, min_size=2, max_size=5, unique=True), days=st.booleans())
def test_sums_are_those_of_the_raw_rows(
    history: datetime, rolled: timedelta | None, moments: list[timedelta], days: bool
) -> None:
    """Wherever the roll-ups end, and wherever the spans begin and end."""
    RollUp.objects.all().delete()
    if rolled is not None:
        roll_up_until(history + rolled)
    edges = sorted(history + moment for moment in moments)
    if days:  # where whole days of the roll-up are read
        edges = sorted({midnight(edge.date()) for edge in edges} | {edges[-1] + timedelta(days=1)})
    usage = sum_usage(edges=edges)
    by_model = sum_usage(edges=edges, by="model")
    by_operation = sum_usage(edges=edges, by="operation")
    entries = sum_ledger(edges=edges)
    for number, (since, until) in enumerate(pairwise(edges)):
        assert usage.get((number, ()), UsageSums()) == plain_usage(since, until)
        for (_, (type,)), sums in ((key, value) for key, value in by_operation.items() if key[0] == number):
            assert sums == plain_usage(since, until, operation_type=type)
        assert sum((sums for key, sums in by_operation.items() if key[0] == number), UsageSums()) == plain_usage(
            since, until
        )
        for (_, (provider, model)), sums in ((key, value) for key, value in by_model.items() if key[0] == number):
            assert sums == plain_usage(since, until, provider=provider, model=model)
        assert {key[1:]: sums for key, sums in entries.items() if key[0] == number} == plain_ledger(since, until)


@pytest.mark.parametrize("zone", ZONES, ids=str)
def test_operations_by_hour_day_and_week(history: datetime, zone: ZoneInfo) -> None:
    """In a time zone whose days begin between two hours of the roll-up, too."""
    roll_up_until(timezone.now() - timedelta(days=3))
    until = timezone.now().astimezone(zone)
    for bucket, days in (("hour", 6), ("day", 40), ("week", 60)):
        since = midnight((until - timedelta(days=days)).date(), zone)
        found = business.get_operation_stats(since=since, until=until, bucket=bucket)  # type: ignore[arg-type]
        for number, (begin, end) in enumerate(pairwise(found.edges)):
            parts = [sums for (of, _), sums in found.trend.items() if of == number]
            assert sum(parts, UsageSums()) == plain_usage(begin, end)
        for type, sums in found.totals.items():
            assert sums == plain_usage(since, until, operation_type=type)
            durations = list(
                TokenUsage.objects.filter(
                    operation_type=type, status="succeeded", completed_at__gte=since, completed_at__lt=until
                ).values_list("duration_ms", flat=True)
            )
            if durations:
                assert found.latency[type].operations == len(durations)
                assert found.latency[type].median_ms == median_low([each or 0 for each in durations])


def test_buckets_on_offer() -> None:
    """The day for as long as its bars can be calculated in time; some bucket always."""
    until = midnight(timezone.now().date())
    offers = {
        days: business.trend_buckets(since=midnight(until.date() - timedelta(days=days)), until=until)
        for days in (1, 7, 190, 365, 3_000)
    }
    assert offers == {
        1: ["hour"], 7: ["hour", "day"], 190: ["day", "week", "month"], 365: ["week", "month"], 3_000: ["month"],
    }  # fmt: skip


def test_system_figures(history: datetime) -> None:
    """Revenue by currency, what was given and taken back, and the real margin, calculated by hand."""
    roll_up_until(timezone.now() - timedelta(days=9))
    since, until = history + timedelta(days=20), timezone.now()
    found = business.get_token_stats(since=since, until=until)
    entries = plain_ledger(since, until)
    ever = plain_ledger(BEGINNING, until)
    assert found.usage == plain_usage(since, until)
    sold_in = {currency for type, currency in entries if type in TokenTransaction.CREDITS_FOR_MONEY}
    assert {each.currency for each in found.revenue} == sold_in > {"usd"}
    for each in found.revenue:
        sales = [entries.get((type, each.currency), LedgerSums()) for type in TokenTransaction.CREDITS_FOR_MONEY]
        assert each.sales == sum(sale.transactions for sale in sales) > 0
        assert each.sales_cents == sum(sale.paid_cents for sale in sales)
        assert each.discount_cents == sum(sale.discount_cents for sale in sales)
        assert each.refunded_cents == -entries.get(("refund", each.currency), LedgerSums()).paid_cents
    granted = [sums.tokens for (type, _), sums in entries.items() if type in ("bonus", "admin_grant")]
    assert found.granted_tokens == sum(granted)
    span = {"created_at__gte": since, "created_at__lt": until}
    assert found.new_accounts == TokenAccount.objects.filter(**span).count()
    assert found.failed_payments == Purchase.objects.filter(**span, state="failed").count()

    circulated = sum(sums.tokens for (type, _), sums in ever.items() if type != "usage")
    usd = [sums for (type, currency), sums in ever.items() if currency == "usd"]
    sold = sum(sums.tokens for (_, currency), sums in ever.items() if currency)
    recognised = sum(sums.paid_cents for sums in usd) * 10_000 * found.usage.billable_tokens // circulated
    cost = -(-found.usage.provider_cost_microusd * sum(sums.tokens for sums in usd) // sold)
    assert found.recognised_micros["usd"] == recognised
    assert found.real_margin_microusd == recognised - cost
    charged = plain_usage(since, until)
    margin = (charged.billable_tokens - charged.charged_actual_tokens) * 1_000 // charged.billable_tokens
    assert found.usage.multiplier_margin_permille == margin


def test_models_now_and_before(history: datetime) -> None:
    roll_up_until(timezone.now() - timedelta(days=2))
    zone = ZoneInfo("Europe/Berlin")
    until = midnight(timezone.now().astimezone(zone).date() + timedelta(days=1), zone)
    since = midnight(until.date() - timedelta(days=20), zone)
    before = midnight(until.date() - timedelta(days=40), zone)
    found = business.get_model_usage_stats(since=since, until=until, before=(before, since))
    assert len(found) > 3
    for each in found:
        assert each.now == plain_usage(since, until, provider=each.provider, model=each.model)
        assert each.before == plain_usage(before, since, provider=each.provider, model=each.model)
    rate = business.get_token_stats(since=since, until=until).rate
    assert [each.real_margin_microusd for each in found] == [rate.real_margin_microusd(each.now) for each in found]


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rolled=Moments, moments=st.lists(Moments, min_size=2, max_size=5, unique=True))
def test_liability_rolls_forward_to_the_token(history: datetime, rolled: timedelta, moments: list[timedelta]) -> None:
    """opening + sold + granted − used − refunded − deducted − ended = closing, and the rows listed come to the same."""
    roll_up_until(history + rolled)
    edges = sorted(history + moment for moment in moments)
    rows = liability.liability_roll_forward(edges=edges)
    for row in rows:
        lost = row.used_tokens + row.refunded_tokens + row.deducted_tokens + row.ended_tokens
        changes = row.sold_tokens + row.granted_tokens - lost
        assert row.opening_tokens + changes == row.closing_tokens
        before = plain_ledger(BEGINNING, row.since).values()
        assert row.opening_tokens == sum(sums.tokens for sums in before)
        entries = liability.liability_entries(since=row.since, until=row.until)
        assert sum(entry.amount for entry in entries) == changes
        assert all(row.since <= entry.booked_at < row.until for entry in entries)
    assert [row.opening_tokens for row in rows[1:]] == [row.closing_tokens for row in rows[:-1]]


def test_liability_of_all_time_is_what_the_accounts_hold(history: datetime) -> None:
    roll_up_until(timezone.now())
    [row] = liability.liability_roll_forward(edges=[BEGINNING, timezone.now() + timedelta(days=1)])
    assert row.opening_tokens == 0
    assert row.closing_tokens == sum(TokenAccount.objects.values_list("balance", flat=True))


def test_liability_that_does_not_balance_is_no_figure(history: datetime) -> None:
    """A balance that its entries do not explain, or a roll-up that says something else than they do."""
    roll_up_until(timezone.now())
    edges = [history, timezone.now()]
    liability.liability_roll_forward(edges=edges)
    account = TokenAccount.objects.filter(balance__gt=1).first()
    assert account is not None
    TokenAccount.objects.filter(pk=account.pk).update(balance=F("balance") + 1)
    with pytest.raises(LiabilityDoesNotBalance):
        liability.liability_roll_forward(edges=edges)


def test_cohorts(history: datetime) -> None:
    """By the month of signing up: who pays, how soon, and how much in which month."""
    zone = ZoneInfo("Europe/Berlin")
    until = midnight(timezone.now().astimezone(zone).date() + timedelta(days=1), zone)
    since = midnight(add_months(until.date(), -2), zone)
    found = customers.get_cohorts(since=since, until=until)
    assert len(found) >= 2
    for cohort in found:
        accounts = TokenAccount.objects.filter(created_at__gte=cohort.since, created_at__lt=cohort.until)
        ids = set(accounts.values_list("pk", flat=True))
        money = TokenTransaction.objects.filter(account_id__in=ids, paid_cents__isnull=False)
        spent: dict[str, int] = defaultdict(int)
        for entry in money:
            spent[entry.currency] += entry.paid_cents or 0
        first = (
            money.filter(type__in=TokenTransaction.CREDITS_FOR_MONEY).values("account").annotate(at=Min("created_at"))
        )
        delays = [row["at"] - TokenAccount.objects.get(pk=row["account"]).created_at for row in first]
        assert (cohort.accounts, cohort.paying) == (len(ids), len(delays))
        assert cohort.auto_recharging == accounts.filter(auto_recharge_enabled=True).count()
        assert cohort.lifetime_cents == spent
        assert cohort.median_days_to_pay == (median_low(delays).days if delays else None)
        assert cohort.lifetime_value_cents("usd") == spent["usd"] // len(ids)
        for (number, currency), cents in cohort.spent_cents.items():
            begin = found[number].since if number < len(found) else until
            end = found[number].until if number < len(found) else until + timedelta(days=1)
            span = money.filter(created_at__gte=begin, created_at__lt=end, currency=currency)
            assert cents == sum(entry.paid_cents or 0 for entry in span)


def test_packages(history: datetime) -> None:
    since, until = history + timedelta(days=10), timezone.now()
    found = customers.get_package_sales(since=since, until=until)
    assert {each.package_name for each in found} <= set(TokenPricing.objects.values_list("name", flat=True))
    for each in found:
        sales = Purchase.objects.filter(
            package_name=each.package_name,
            currency=each.currency,
            state="paid",
            transactions__type__in=TokenTransaction.CREDITS_FOR_MONEY,
            transactions__created_at__gte=since,
            transactions__created_at__lt=until,
        )
        assert each.sales == len(sales)
        assert each.paid_cents == sum(sale.revenue_cents for sale in sales)
        assert each.tokens == sum(sale.tokens for sale in sales)
        assert each.buyers == len({sale.account_id for sale in sales})
    assert (
        sum(each.sales for each in found)
        == TokenTransaction.objects.filter(
            type__in=TokenTransaction.CREDITS_FOR_MONEY, created_at__gte=since, created_at__lt=until
        ).count()
    )


@pytest.mark.django_db
def test_live_figures(make_user: MakeUser) -> None:
    """Accounts by status and balance, what is owed and held, the inbox of Stripe's events."""
    for name, tokens in (("rich", 50_000), ("low", 1_000), ("critical", 99), ("suspended", 5_000), ("blocked", 5_000)):
        make_user(name, tokens=tokens)
    for status in ("suspended", "blocked"):
        TokenAccount.objects.filter(user__email=f"{status}@example.com").update(status=status)
    ledger.reserve_tokens(
        user_id=TokenAccount.objects.get(balance=50_000).user_id,
        tokens=700,
        operation=ledger.Operation("chat", "openai", "gpt-6-luna", multiplier=1),  # type: ignore[arg-type]
        idempotency_key="one",
        lifetime_seconds=600,
    )
    now = timezone.now()
    for number, state in enumerate(("processed", "processed", "processed", "aside", "failed", "received", "ignored")):
        event = StripeEvent.objects.create(event_id=f"evt_{number}", type="x", livemode=False, payload={}, state=state)
        StripeEvent.objects.filter(pk=event.pk).update(
            received_at=now - number * HOUR, processed_at=now - number * HOUR + timedelta(milliseconds=10 * number)
        )
    found = business.get_live_stats()
    assert (found.accounts, found.active_accounts, found.suspended_accounts, found.blocked_accounts) == (5, 3, 1, 1)
    assert (found.low_accounts, found.critical_accounts, found.indebted_accounts) == (1, 1, 0)
    assert (found.balance_tokens, found.average_balance_tokens) == (61_099, 12_219)
    assert (found.reserved_tokens, found.running_operations) == (700, 1)
    hooks = found.webhooks
    assert (hooks.waiting, hooks.failed, hooks.aside) == (1, 1, 1)
    assert (hooks.newest_received_at, hooks.median_lag_ms) == (now, 10)


@pytest.mark.django_db
def test_an_empty_database_has_figures_too() -> None:
    span = {"since": timezone.now() - timedelta(days=30), "until": timezone.now()}
    found = business.get_token_stats(**span)
    assert (found.usage, found.revenue, found.real_margin_microusd) == (UsageSums(), [], 0)
    assert found.usage.success_permille is None
    assert business.get_model_usage_stats(since=span["since"], until=span["until"]) == []
    assert business.get_operation_stats(since=span["since"], until=span["until"]).totals == {}
    assert customers.get_cohorts(since=span["since"], until=span["until"]) == []
    assert customers.get_package_sales(**span) == []
    assert business.get_live_stats().average_balance_tokens is None
    [row] = liability.liability_roll_forward(edges=list(span.values()))
    assert row.closing_tokens == 0


@pytest.mark.parametrize(
    ("now", "before", "change"), [(150, 100, 500), (50, 100, -500), (1, 3, -666), (5, 0, None), (-50, -100, 500)]
)
def test_change_in_thousandths(now: int, before: int, change: int | None) -> None:
    assert change_permille(now, before) == change


def test_refunds_and_disputes_of_a_span(history: datetime) -> None:
    """Those whose money is, or may be, gone; not those of another product on the same Stripe account (row 18)."""
    purchase = Purchase.objects.filter(state="paid").first()
    assert purchase is not None
    intent = purchase.stripe_payment_intent_id
    assert intent is not None
    before = business.get_token_stats(since=timezone.now() - HOUR, until=timezone.now() + HOUR)
    for number, (kind, status) in enumerate(
        (("refund", "pending"), ("refund", "failed"), ("dispute", "needs_response"), ("dispute", "won"))
    ):
        PaymentReversal.objects.create(
            kind=kind, status=status, stripe_id=f"x{number}", stripe_payment_intent_id=intent, purchase=purchase,
            amount_cents=1, currency=purchase.currency,
        )  # fmt: skip
    for kind, status in (("refund", "succeeded"), ("dispute", "lost")):
        PaymentReversal.objects.create(
            kind=kind, status=status, stripe_id=f"other-{kind}", stripe_payment_intent_id="pi_other", amount_cents=1,
            currency="usd",
        )  # fmt: skip
    after = business.get_token_stats(since=timezone.now() - HOUR, until=timezone.now() + HOUR)
    assert (after.refunds - before.refunds, after.disputes - before.disputes) == (1, 1)
