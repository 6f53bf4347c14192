"""Figures about usage and money. Pure reads.

All of an account's figures walk the index (account, created_at, user), so they cost what the operations in their span
cost, however many there are before it. Spans have a beginning (included) and an end (not included).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from typing import Any, Literal, TypeAlias

from django.contrib.postgres.fields import ArrayField
from django.db.models import Avg, Count, DateTimeField, F, Func, IntegerField, Max, Q, Sum, Value
from django.utils import timezone

from accounts.models import User
from billing import usage
from billing.models import TokenAccount, TokenUsage
from kit.periods import add_months, midnight

RECENT_OPERATIONS = 100

# What one page adds up at most; a person has so many in a year at one every five minutes.
MAX_OPERATIONS = 100_000

# Averages and the pace of spending are of the newest operations; these are enough for a steady figure.
MAX_AVERAGED_OPERATIONS = 1_000
MIN_AVERAGED_OPERATIONS = 3
MAX_PACE_OPERATIONS = 50_000
PACE_DAYS = 30
ACTIVE_DAYS = 90

# Where hardly anybody has run such an operation yet: rough figures, to be shown as such.
DEFAULT_TOKENS = {
    TokenUsage.OperationType.GENERATION: 1_500,
    TokenUsage.OperationType.REFINEMENT: 2_000,
    TokenUsage.OperationType.REPURPOSE: 1_500,
    TokenUsage.OperationType.CHAT: 1_000,
    TokenUsage.OperationType.IMAGE: 4_500,
    TokenUsage.OperationType.PROMPT: 400,
}

BucketName: TypeAlias = Literal["hour", "day", "week", "month"]
Dimension: TypeAlias = Literal["operation", "model", "project", "member"]

# How long a span each bucket is offered for, in days: from where it tells something to where bars become hairs.
BUCKET_DAYS: dict[BucketName, tuple[int, int]] = {
    "hour": (1, 14),
    "day": (2, 400),
    "week": (14, 2_800),
    "month": (45, 36_600),
}

_DIMENSION_FIELDS: dict[Dimension, tuple[str, ...]] = {
    "operation": ("operation_type",),
    "model": ("provider", "model"),
    "project": ("project_id",),
    "member": ("user_id",),
}
_Status = TokenUsage.Status
_CHARGED = Q(status=_Status.SUCCEEDED, is_free=False)


# --- Sums over operations -------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Figures:
    """Sums over some operations."""

    operations: int = 0  # all that were begun
    running: int = 0
    succeeded: int = 0
    charged: int = 0  # those that succeeded while billing was on
    billable_tokens: int = 0

    def __add__(self, other: "Figures") -> "Figures":
        return Figures(
            self.operations + other.operations,
            self.running + other.running,
            self.succeeded + other.succeeded,
            self.charged + other.charged,
            self.billable_tokens + other.billable_tokens,
        )

    @property
    def failed(self) -> int:
        return self.operations - self.running - self.succeeded

    @property
    def tokens_per_operation(self) -> int | None:
        """Billable tokens of an operation that was charged, rounded up; None when none was."""
        return -(-self.billable_tokens // self.charged) if self.charged else None

    @property
    def success_permille(self) -> int | None:
        """Of 1,000 operations that ended, those that succeeded, rounded down: 1,000 means all. None when none ended."""
        ended = self.succeeded + self.failed
        return self.succeeded * 1_000 // ended if ended else None


_SUMS = {
    "operations": Count("pk"),
    "running": Count("pk", filter=Q(status=_Status.RESERVED)),
    "succeeded": Count("pk", filter=Q(status=_Status.SUCCEEDED)),
    "charged": Count("pk", filter=_CHARGED),
    "billable_sum": Sum("billable_tokens", default=0),
}


def _figures(row: dict[str, Any]) -> Figures:
    return Figures(row["operations"], row["running"], row["succeeded"], row["charged"], int(row["billable_sum"]))


def _operations(account_id: int, actor_id: int | None, since: datetime, until: datetime) -> Any:
    return usage.operations_of(account_id, actor_id).filter(created_at__gte=since, created_at__lt=until)


def usage_totals(*, account_id: int, actor_id: int | None = None, since: datetime, until: datetime) -> Figures:
    """The sums over what the account paid for in the span; with `actor_id` over what one person did of it."""
    return _figures(_operations(account_id, actor_id, since, until).aggregate(**_SUMS))


@dataclass(frozen=True, slots=True)
class UsageGroup:
    """The sums over the operations of one kind, model and project (None: those without one)."""

    operation_type: str
    provider: str
    model: str
    project_id: int | None
    user_id: int
    figures: Figures

    def key(self, dimension: Dimension) -> Any:
        """What it is by that dimension: an operation type, (provider, model), or the id of a project or a person."""
        return _key(dimension, {name: getattr(self, name) for name in _DIMENSION_FIELDS[dimension]})


def usage_groups(*, account_id: int, actor_id: int | None = None, since: datetime, until: datetime) -> list[UsageGroup]:
    """The sums of `usage_totals`, for each combination of operation, model, project and person."""
    fields = ("operation_type", "provider", "model", "project_id", "user_id")
    rows = _operations(account_id, actor_id, since, until).order_by().values(*fields).annotate(**_SUMS)
    return [UsageGroup(**{name: row[name] for name in fields}, figures=_figures(row)) for row in rows]


def usage_over_time(
    *, account_id: int, actor_id: int | None = None, edges: Sequence[datetime], dimension: Dimension
) -> dict[tuple[int, Any], Figures]:
    """The sums in each of the spans between two neighbouring edges, by the dimension; what has none is left out.

    The key is (number of the span, from 0; an operation type, (provider, model), or a project's id). The database is
    told the edges, not the time zone: what a day is then has one definition, that of `time_edges`.
    """
    starts = Value(list(edges[:-1]), output_field=ArrayField(DateTimeField()))
    number = Func(F("created_at"), starts, function="width_bucket", output_field=IntegerField())
    rows = (
        _operations(account_id, actor_id, edges[0], edges[-1])
        .order_by()
        .annotate(number=number)
        .values("number", *_DIMENSION_FIELDS[dimension])
        .annotate(**_SUMS)
    )
    return {(row["number"] - 1, _key(dimension, row)): _figures(row) for row in rows}


def _key(dimension: Dimension, row: dict[str, Any]) -> Any:
    values = tuple(row[name] for name in _DIMENSION_FIELDS[dimension])
    return values if len(values) > 1 else values[0]


@dataclass(frozen=True, slots=True)
class MemberUse:
    """What somebody did of what a team paid for."""

    user: User
    month_tokens: int  # since the first of the month, in the current time zone; holds that run count as nothing yet
    last_active_at: datetime  # within the last 90 days


def use_by_member(*, account_id: int) -> dict[int, MemberUse]:
    """By their id, each person who used the account within the last 90 days, also who is in the team no more."""
    month_began_at = midnight(timezone.localdate().replace(day=1))
    rows = (
        usage.operations_of(account_id)
        .filter(created_at__gt=timezone.now() - timedelta(days=ACTIVE_DAYS))
        .order_by()
        .values("user_id")
        .annotate(
            month_tokens=Sum("billable_tokens", filter=Q(created_at__gte=month_began_at), default=0),
            last_active_at=Max("created_at"),
        )
    )
    found = {row["user_id"]: row for row in rows}
    return {
        pk: MemberUse(user, int(found[pk]["month_tokens"]), found[pk]["last_active_at"])
        for pk, user in User.objects.in_bulk(list(found)).items()
    }


# --- Spans ----------------------------------------------------------------------------------------------------------


def first_used_at(*, account_id: int, actor_id: int | None = None) -> datetime | None:
    """When the first operation began that the account paid for; None when there is none."""
    rows = usage.operations_of(account_id, actor_id).order_by("created_at")
    return rows.values_list("created_at", flat=True).first()


def newest_operations_since(
    *, account_id: int, actor_id: int | None = None, since: datetime, until: datetime, limit: int = MAX_OPERATIONS
) -> datetime:
    """From when on the span has no more than `limit` operations: its beginning, or later. Reads the index alone."""
    rows = _operations(account_id, actor_id, since, until).order_by("-created_at").values_list("created_at", flat=True)
    beyond = rows[limit : limit + 1].first()
    return since if beyond is None else (beyond + timedelta(microseconds=1)).astimezone(since.tzinfo)


def list_buckets(*, since: datetime, until: datetime) -> list[BucketName]:
    """The buckets that a chart of the span offers, the smallest first. There is always one."""
    days = _day_count(since, until)
    return [name for name, (least, most) in BUCKET_DAYS.items() if least <= days <= most]


def default_bucket(*, since: datetime, until: datetime) -> BucketName:
    """The one that reads best: 24 to 62 bars."""
    days = _day_count(since, until)
    if days <= 2:
        return "hour"
    return "day" if days <= 62 else "week" if days <= 400 else "month"


def _day_count(since: datetime, until: datetime) -> int:
    return max(1, (until.date() - since.date()).days)


def time_edges(*, since: datetime, until: datetime, bucket: BucketName) -> list[datetime]:
    """Where the buckets of a span begin, and its end, in the time zone of `since`.

    A day begins at midnight by the clock there, so it has 23 or 25 hours when the clock is changed. Weeks begin on
    Monday. The first and the last bucket are as long as the span leaves them.
    """
    zone = since.tzinfo
    # In UTC: between times of one zone Python calculates with wall-clock times, as if it were never changed.
    first, last = since.astimezone(UTC), until.astimezone(UTC)
    edges = []
    day = since.date()
    while (start := midnight(day, zone).astimezone(UTC)) < last:
        edges.append(start)
        if bucket == "hour":
            hours = midnight(day + timedelta(days=1), zone).astimezone(UTC) - start
            # Two hours of the same name are two.
            edges += [start + timedelta(hours=hour) for hour in range(1, -(-hours // timedelta(hours=1)))]
        day = _next_day(day, bucket)
    edges = [first, *(edge for edge in edges if first < edge < last), last]
    return [edge.astimezone(zone) for edge in edges]


def _next_day(day: date, bucket: BucketName) -> date:
    """The next day on which a bucket begins."""
    if bucket == "month":
        return add_months(day, 1)
    return day + timedelta(days=7 - day.weekday() if bucket == "week" else 1)


# --- Averages and pace ----------------------------------------------------------------------------------------------


def average_tokens_per_operation(account: TokenAccount) -> int | None:
    """Billable tokens of an operation, averaged over the last 100 that were charged; None when there was none."""
    charged = TokenUsage.objects.filter(_CHARGED, account=account)
    recent = charged.order_by("-created_at")[:RECENT_OPERATIONS]
    average = TokenUsage.objects.filter(pk__in=recent.values("pk")).aggregate(average=Avg("billable_tokens"))
    return None if average["average"] is None else round(average["average"])


@dataclass(frozen=True, slots=True)
class Average:
    """What an operation costs, in billable tokens, rounded up; for images, one image. `basis` says who it is from."""

    tokens: int
    basis: Literal["own", "everyone", "default"]
    operations: int  # that it is the average of; 0 for a default


def average_tokens_by_operation(account: TokenAccount) -> dict[str, Average]:
    """What each type of operation costs this account, on average: for every type, one image for images.

    From their own newest 1,000 operations where they have three of the type; else from the newest 1,000 of everyone;
    else a rough figure (DEFAULT_TOKENS). Free operations do not count.
    """
    own = _averages(TokenUsage.objects.filter(account=account), "own")
    missing = set(DEFAULT_TOKENS) - set(own)
    everyone = _averages(TokenUsage.objects.all(), "everyone") if missing else {}
    return {
        type: own.get(type) or everyone.get(type) or Average(tokens, "default", 0)
        for type, tokens in DEFAULT_TOKENS.items()
    }


def _averages(operations: Any, basis: Literal["own", "everyone"]) -> dict[str, Average]:
    newest = operations.filter(_CHARGED, billable_tokens__gt=0).order_by("-created_at")[:MAX_AVERAGED_OPERATIONS]
    rows = (
        TokenUsage.objects.filter(pk__in=newest.values("pk"))
        .order_by()
        .values("operation_type")
        .annotate(operations=Count("pk"), tokens=Sum("billable_tokens"), images=Sum("image_count"))
    )
    averages = {}
    for row in rows:
        is_image = row["operation_type"] == TokenUsage.OperationType.IMAGE
        number = row["images"] if is_image else row["operations"]
        if row["operations"] >= MIN_AVERAGED_OPERATIONS and number:
            averages[row["operation_type"]] = Average(-(-int(row["tokens"]) // int(number)), basis, row["operations"])
    return averages


@dataclass(frozen=True, slots=True)
class Runway:
    """How long the available tokens last at the pace of the last days."""

    days: int  # rounded down
    tokens_per_day: int  # rounded up
    days_looked_at: int  # 30; fewer for a new account, and for one with more than 50,000 operations in them
    used_tokens: int  # in those days


def runway(account: TokenAccount) -> Runway | None:
    """How long the available tokens last; None when nothing was paid for in the last 30 days."""
    now = timezone.now()
    began_at = account.created_at
    if (first_at := first_used_at(account_id=account.pk)) is not None:
        began_at = min(began_at, first_at)
    since = newest_operations_since(
        account_id=account.pk,
        since=max(began_at, now - timedelta(days=PACE_DAYS)),
        until=now + timedelta(days=1),  # the database's clock may be ahead of ours
        limit=MAX_PACE_OPERATIONS,
    )
    used_tokens = _operations(account.pk, None, since, now + timedelta(days=1)).aggregate(
        tokens=Sum("billable_tokens", default=0)
    )["tokens"]
    used_tokens = int(used_tokens)
    if not used_tokens:
        return None
    days_looked_at = max(1, -(-(now - since) // timedelta(days=1)))
    tokens_per_day = -(-used_tokens // days_looked_at)
    return Runway(
        days=max(0, account.available) * days_looked_at // used_tokens,
        tokens_per_day=tokens_per_day,
        days_looked_at=days_looked_at,
        used_tokens=used_tokens,
    )
