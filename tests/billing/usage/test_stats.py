"""Figures about usage: each equals a plain sum over the rows, also where the clock is changed."""

from collections import defaultdict
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from itertools import pairwise
from typing import Any, cast, get_args
from zoneinfo import ZoneInfo

import pytest
from django.test import Client
from django.urls import reverse
from django.utils import timezone
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from accounts.models import User, Workspace
from billing.models import TokenAccount, TokenUsage
from billing.usage import stats
from billing.usage.stats import BucketName, Dimension, Figures, Runway
from kit import periods
from tests.conftest import MakeUser

BERLIN, NEW_YORK, KOLKATA = ZoneInfo("Europe/Berlin"), ZoneInfo("America/New_York"), ZoneInfo("Asia/Kolkata")
LORD_HOWE, HAVANA, ADELAIDE = (
    ZoneInfo("Australia/Lord_Howe"),
    ZoneInfo("America/Havana"),
    ZoneInfo("Australia/Adelaide"),
)
# Each change of the clock in 2026 lies in one of these spans, with days before and after it.
SPANS = [("2026-03-05", "2026-03-12"), ("2026-03-25", "2026-04-08"), ("2026-10-01", "2026-11-05")]
BUCKETS, DIMENSIONS = get_args(BucketName), get_args(Dimension)

every_zone = pytest.mark.parametrize(
    "zone", [BERLIN, NEW_YORK, KOLKATA, LORD_HOWE, HAVANA, ADELAIDE, ZoneInfo("UTC")], ids=str
)


@pytest.fixture(autouse=True)
def _own_time_zone() -> Iterator[None]:
    yield
    timezone.deactivate()


def midnight(day: str, zone: ZoneInfo) -> datetime:
    return periods.midnight(datetime.fromisoformat(day).date(), zone)


def usage_row(user: User, at: datetime, **fields: Any) -> TokenUsage:
    fields = {"status": "succeeded", "operation_type": "chat", "provider": "openai", "model": "gpt-6-luna"} | fields
    if fields["status"] == "reserved":
        fields |= {"reserved_tokens": 500, "expires_at": at}
    if fields["operation_type"] == "image":
        fields |= {"charge_type": "fixed", "fixed_cost_tokens": 10}
    else:
        fields |= {"charge_type": "multiplier", "multiplier": Decimal("1.5")}
    return TokenUsage(
        account=TokenAccount.objects.get(user=user),
        user=user,
        workspace=Workspace.objects.get(owner=user),
        created_at=at,
        **fields,
    )


def add_usage(user: User, at: datetime, **fields: Any) -> TokenUsage:
    row = usage_row(user, at, **fields)
    row.save()
    return row


def plain_figures(rows: list[TokenUsage]) -> Figures:
    return Figures(
        operations=len(rows),
        running=sum(row.status == "reserved" for row in rows),
        succeeded=sum(row.status == "succeeded" for row in rows),
        charged=sum(row.status == "succeeded" and not row.is_free for row in rows),
        billable_tokens=sum(row.billable_tokens for row in rows),
    )


def plain_key(row: TokenUsage, dimension: Dimension) -> Any:
    keys: dict[Dimension, Any] = {
        "operation": row.operation_type,
        "model": (row.provider, row.model),
        "project": row.project_id,
        "member": row.user_id,
    }
    return keys[dimension]


def bucket_name(at: datetime, zone: ZoneInfo, bucket: BucketName) -> Any:
    """By the clock on the wall, which is what a person looks at. Two hours of one name differ in their offset."""
    local = at.astimezone(zone)
    if bucket == "hour":
        return local.date(), local.hour, local.utcoffset()
    if bucket == "week":
        return local.isocalendar()[:2]
    return local.date() if bucket == "day" else (local.year, local.month)


moments = st.sampled_from(SPANS).flatmap(
    lambda span: st.datetimes(datetime.fromisoformat(span[0]), datetime.fromisoformat(span[1]), timezones=st.just(UTC))
)
rows_of_usage = st.lists(
    st.fixed_dictionaries(
        {
            "at": moments,
            "status": st.sampled_from(["succeeded", "succeeded", "succeeded", "failed", "expired", "reserved"]),
            "operation_type": st.sampled_from(["chat", "generation", "image"]),
            "model": st.sampled_from(["gpt-6-luna", "gpt-6-sol"]),
            "project_id": st.sampled_from([None, 1, 2]),
            "is_free": st.booleans(),
            "tokens": st.integers(0, 10**12),
        }
    ),
    max_size=25,
)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=rows_of_usage, span=st.sampled_from(SPANS), bucket=st.sampled_from(BUCKETS))
@every_zone
def test_figures_are_plain_sums(
    alice: User, bob: User, zone: ZoneInfo, rows: list[dict[str, Any]], span: tuple[str, str], bucket: BucketName
) -> None:
    TokenUsage.objects.all().delete()
    for row in rows:
        is_paid = row["status"] == "succeeded" and not row["is_free"]
        fields = {key: value for key, value in row.items() if key not in ("at", "tokens")}
        add_usage(alice, row["at"], billable_tokens=row["tokens"] if is_paid else 0, **fields)
        add_usage(bob, row["at"], billable_tokens=7)  # none of hers
    since, until = midnight(span[0], zone), midnight(span[1], zone)
    expected = [row for row in TokenUsage.objects.filter(user=alice) if since <= row.created_at < until]

    account_id = TokenAccount.objects.get(user=alice).pk
    totals = stats.usage_totals(account_id=account_id, since=since, until=until)
    assert totals == plain_figures(expected)
    groups = stats.usage_groups(account_id=account_id, since=since, until=until)
    assert sum((group.figures for group in groups), Figures()) == totals
    edges = stats.time_edges(since=since, until=until, bucket=bucket)
    for dimension in DIMENSIONS:
        for key in {group.key(dimension) for group in groups}:
            of_key = [group.figures for group in groups if group.key(dimension) == key]
            assert sum(of_key, Figures()) == plain_figures([r for r in expected if plain_key(r, dimension) == key])

        over_time = stats.usage_over_time(account_id=account_id, edges=edges, dimension=dimension)
        by_name: dict[Any, list[TokenUsage]] = defaultdict(list)
        for usage in expected:
            by_name[bucket_name(usage.created_at, zone, bucket), plain_key(usage, dimension)].append(usage)
        if zone is LORD_HOWE and bucket == "hour":
            continue  # its clock is moved by half an hour: see below
        assert {
            (bucket_name(edges[number], zone, bucket), key): figures for (number, key), figures in over_time.items()
        } == {name: plain_figures(usages) for name, usages in by_name.items()}


@every_zone
@pytest.mark.parametrize("span", SPANS)
@pytest.mark.parametrize("bucket", BUCKETS)
def test_buckets_cover_the_span_without_gap_or_overlap(
    zone: ZoneInfo, span: tuple[str, str], bucket: BucketName
) -> None:
    since, until = midnight(span[0], zone), midnight(span[1], zone)
    edges = stats.time_edges(since=since, until=until, bucket=bucket)
    moments = [edge.astimezone(UTC) for edge in edges]
    assert moments == sorted(set(moments))
    assert (moments[0], moments[-1]) == (since.astimezone(UTC), until.astimezone(UTC))
    if bucket == "hour":
        hours = (moments[-1] - moments[0]) / timedelta(hours=1)
        assert hours <= len(edges) - 1 <= hours + 1
        assert all(edge.minute == 0 for edge in edges) or zone is LORD_HOWE
    else:
        assert all(edge == periods.midnight(edge.date(), zone) for edge in edges)


@pytest.mark.parametrize(
    ("zone", "day", "hours"),
    [
        (BERLIN, "2026-03-29", 23),
        (BERLIN, "2026-10-25", 25),
        (NEW_YORK, "2026-03-08", 23),
        (NEW_YORK, "2026-11-01", 25),
        (ADELAIDE, "2026-10-04", 23),
        (KOLKATA, "2026-03-29", 24),
        (HAVANA, "2026-03-08", 23),  # midnight itself is skipped
    ],
    ids=str,
)
def test_day_of_the_clock_change_has_its_hours(zone: ZoneInfo, day: str, hours: int) -> None:
    first = datetime.fromisoformat(day).date()
    since, until = periods.midnight(first, zone), periods.midnight(first + timedelta(days=1), zone)
    assert len(stats.time_edges(since=since, until=until, bucket="hour")) - 1 == hours
    assert len(stats.time_edges(since=since, until=until, bucket="day")) - 1 == 1


def test_half_an_hour_of_clock_change_is_a_short_bucket() -> None:
    since, until = midnight("2026-10-04", LORD_HOWE), midnight("2026-10-05", LORD_HOWE)
    edges = [edge.astimezone(UTC) for edge in stats.time_edges(since=since, until=until, bucket="hour")]
    lengths = [after - before for before, after in pairwise(edges)]
    assert lengths == [timedelta(hours=1)] * 23 + [timedelta(minutes=30)]


@pytest.mark.parametrize("days", [1, 2, 7, 13, 14, 15, 44, 45, 62, 63, 365, 400, 401, 2_800, 2_801, 36_500])
def test_number_of_bars_is_bounded(days: int) -> None:
    until = midnight("2026-11-05", BERLIN)
    since = periods.midnight(until.date() - timedelta(days=days), BERLIN)
    offered = stats.list_buckets(since=since, until=until)
    assert stats.default_bucket(since=since, until=until) in offered
    for bucket in offered:
        assert (
            1 <= len(stats.time_edges(since=since, until=until, bucket=bucket)) - 1 <= (1_201 if days > 2_800 else 402)
        )


def test_span_is_cut_to_its_newest_operations(alice: User) -> None:
    since, until = midnight("2026-03-25", BERLIN), midnight("2026-04-08", BERLIN)
    for hour in range(10):
        add_usage(alice, since + timedelta(hours=hour), billable_tokens=1)
    account_id = TokenAccount.objects.get(user=alice).pk
    assert stats.newest_operations_since(account_id=account_id, since=since, until=until, limit=10) == since
    cut_at = stats.newest_operations_since(account_id=account_id, since=since, until=until, limit=4)
    assert stats.usage_totals(account_id=account_id, since=cut_at, until=until).operations == 4
    assert cut_at.tzinfo is BERLIN


def test_figures_of_nothing() -> None:
    assert (Figures().tokens_per_operation, Figures().success_permille, Figures().failed) == (None, None, 0)


def test_figures_of_operations() -> None:
    figures = Figures(operations=2_003, running=1, succeeded=2_001, charged=2_000, billable_tokens=4_001)
    assert (figures.failed, figures.tokens_per_operation) == (1, 3)  # rounded up
    assert figures.success_permille == 999  # one failed: never said to be all


# --- Averages and pace ------------------------------------------------------------------------------------------------


def test_average_is_ones_own_then_everyones_then_a_default(alice: User, bob: User, make_user: MakeUser) -> None:
    now = timezone.now()
    for tokens in (100, 101, 101):
        add_usage(alice, now, billable_tokens=tokens)
    for tokens in (1_000, 2_000):
        add_usage(alice, now, billable_tokens=tokens, operation_type="refinement")  # two say little
        add_usage(bob, now, billable_tokens=tokens, operation_type="refinement")
    add_usage(bob, now, billable_tokens=0, is_free=True, operation_type="refinement")
    for images in (1, 2, 3):
        add_usage(bob, now, billable_tokens=10 * images, image_count=images, operation_type="image")
    averages = stats.average_tokens_by_operation(TokenAccount.objects.get(user=alice))
    assert (averages["chat"].tokens, averages["chat"].basis) == (101, "own")  # 100.67, rounded up
    assert (averages["refinement"].tokens, averages["refinement"].basis) == (1_500, "everyone")
    assert (averages["image"].tokens, averages["image"].basis) == (10, "everyone")  # an image, not an operation
    assert (averages["repurpose"].tokens, averages["repurpose"].basis) == (
        stats.DEFAULT_TOKENS[TokenUsage.OperationType.REPURPOSE],
        "default",
    )
    assert set(averages) == set(TokenUsage.OperationType.values)


def test_average_of_all_operations_is_of_those_that_were_charged(alice: User, client: Client) -> None:
    now, account = timezone.now(), TokenAccount.objects.get(user=alice)
    add_usage(alice, now, billable_tokens=0, is_free=True)
    client.force_login(alice)
    assert stats.average_tokens_per_operation(account) is None
    assert "Nothing charged yet" in client.get(reverse("tokens:home")).content.decode()
    add_usage(alice, now, billable_tokens=300)
    assert stats.average_tokens_per_operation(account) == 300


def test_average_is_of_the_newest_operations(alice: User, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stats, "MAX_AVERAGED_OPERATIONS", 3)
    now = timezone.now()
    for age, tokens in enumerate((10, 10, 10, 9_000)):
        add_usage(alice, now - timedelta(hours=age), billable_tokens=tokens)
    assert stats.average_tokens_by_operation(TokenAccount.objects.get(user=alice))["chat"].tokens == 10


def account_of(user: User, *, age_days: float) -> TokenAccount:
    began_at = timezone.now() - timedelta(days=age_days)
    TokenAccount.objects.filter(user=user).update(created_at=began_at)
    return TokenAccount.objects.get(user=user)


def test_runway_at_the_pace_of_thirty_days(alice: User) -> None:
    now = timezone.now()
    account = account_of(alice, age_days=100)
    assert stats.runway(account) is None
    add_usage(alice, now - timedelta(days=31), billable_tokens=50_000)  # too long ago to tell of today's pace
    assert stats.runway(account) is None
    add_usage(alice, now - timedelta(days=29), billable_tokens=2_000)
    add_usage(alice, now, billable_tokens=1_001)
    assert stats.runway(account) == Runway(
        days=99, tokens_per_day=101, days_looked_at=30, used_tokens=3_001
    )  # 10,000 × 30 / 3,001 = 99.97


def test_runway_of_a_new_account_looks_at_the_days_it_has(alice: User) -> None:
    account = account_of(alice, age_days=2.5)
    add_usage(alice, timezone.now(), billable_tokens=3_000)
    assert stats.runway(account) == Runway(days=10, tokens_per_day=1_000, days_looked_at=3, used_tokens=3_000)


def test_runway_counts_what_is_available(alice: User) -> None:
    account = account_of(alice, age_days=100)
    add_usage(alice, timezone.now(), billable_tokens=3_000)
    account.balance, account.reserved = 10_000, 9_950
    assert cast(Runway, stats.runway(account)).days == 0
    account.balance, account.reserved = -500, 0
    assert cast(Runway, stats.runway(account)).days == 0


def test_runway_of_many_operations_looks_at_the_newest(alice: User, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stats, "MAX_PACE_OPERATIONS", 4)
    account = account_of(alice, age_days=100)
    for day in range(20):
        add_usage(alice, timezone.now() - timedelta(days=day, hours=1), billable_tokens=100)
    found = cast(Runway, stats.runway(account))
    assert (found.days_looked_at, found.used_tokens, found.tokens_per_day) == (5, 400, 80)


# --- Periods ----------------------------------------------------------------------------------------------------------


@every_zone
@pytest.mark.parametrize("preset", periods.PRESETS)
def test_preset_has_whole_days_of_the_zone(zone: ZoneInfo, preset: str) -> None:
    timezone.activate(zone)
    period = periods.read_period({"period": preset}, default="30d")
    assert period.query == f"period={preset}"
    if preset == "all":
        assert (period.since, period.until) == (None, None)
        return
    since, until = cast(datetime, period.since), cast(datetime, period.until)
    assert since == periods.midnight(since.date(), zone)
    assert until == periods.midnight(until.date(), zone)
    days = (until.date() - since.date()).days
    assert days == {"today": 1, "7d": 7, "30d": 30}.get(preset, days)
    today = timezone.localdate()
    assert period.last_day == (today.replace(day=1) - timedelta(days=1) if preset == "last-month" else today)
    assert period.first_day == {
        "month": today.replace(day=1),
        "12m": periods.add_months(today, -11),
    }.get(preset, period.first_day)


def test_period_of_days_includes_both() -> None:
    timezone.activate(BERLIN)
    period = periods.read_period({"period": "7d", "from": "2026-03-28", "to": "2026-03-29"}, default="30d")
    assert (period.preset, period.label) == ("custom", "28 Mar 2026 – 29 Mar 2026")
    assert period.query == "from=2026-03-28&to=2026-03-29"
    assert cast(datetime, period.since).isoformat() == "2026-03-28T00:00:00+01:00"
    assert cast(datetime, period.until).isoformat() == "2026-03-30T00:00:00+02:00"


@pytest.mark.parametrize(
    "query",
    [
        {"period": "for ever"},
        {"from": "2026-03-02", "to": "2026-03-01"},
        {"from": "01.03.2026"},
        {"to": "2026-02-30"},
        {"to": "0001-01-01"},
        {"to": "9999-12-31"},
        {"from": "２０２６-03-01"},
        {"from": "2026-03-01\0"},
    ],
)
def test_what_is_no_period_is_refused(query: dict[str, str]) -> None:
    """Row 56, 57."""
    with pytest.raises(periods.InvalidPeriod):
        periods.read_period(query, default="30d")
