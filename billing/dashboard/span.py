"""The time that the figures are about, and the one that they are compared with."""

from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta

from django.db.models import Min
from django.utils import timezone

from accounts.permissions import SignedInRequest
from billing.models import TokenAccount
from kit import periods
from kit.periods import InvalidPeriod, Period

DEFAULT_PERIOD = "30d"


@dataclass(frozen=True, slots=True)
class Span:
    """What the page is about, and the time it is compared with: as many days, and only as far as this one has come."""

    period: Period
    since: datetime
    until: datetime
    before: tuple[datetime, datetime] | None  # None for all time
    is_so_far: bool
    error: str = ""

    @property
    def days(self) -> int:
        return (self.until.date() - self.since.date()).days


def read_span(request: SignedInRequest) -> Span:
    try:
        return _span(periods.read_period(request.GET, default=DEFAULT_PERIOD))
    except InvalidPeriod as invalid:
        return _span(periods.preset_period(DEFAULT_PERIOD), error=invalid.message)


def _span(period: Period, *, error: str = "") -> Span:
    """Not beyond today. Raises InvalidPeriod for one that has not begun."""
    today = timezone.localdate()
    last_day = min(period.last_day or today, today)
    first_day = period.first_day or _first_day()
    if first_day > last_day:
        if period.since is not None:
            raise InvalidPeriod("That period has not begun yet.")
        first_day = last_day
    since, until = periods.midnight(first_day), periods.midnight(last_day + timedelta(days=1))
    if period.since is None:
        return Span(period, since, until, None, is_so_far=False, error=error)
    days = (last_day - first_day).days + 1
    before_since = periods.midnight(first_day - timedelta(days=days))
    now = timezone.now()
    is_so_far = now < until
    before_until = min(before_since.astimezone(UTC) + (now - since), since.astimezone(UTC)) if is_so_far else since
    before = (before_since, before_until.astimezone(since.tzinfo))
    return Span(period, since, until, before, is_so_far, error)


def _first_day() -> date:
    first_at = TokenAccount.objects.aggregate(at=Min("created_at"))["at"]
    return timezone.localdate(first_at) if first_at else timezone.localdate()
