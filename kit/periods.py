"""The span of time that a page is about, in the reader's own time zone: read from its address, shown by its control.

The control is templates/billing/_date_range.html: `?period=30d`, or `?from=2026-03-01&to=2026-03-31`, both days in it.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, date, datetime, time, timedelta, tzinfo

from django.utils import timezone
from django.utils.formats import date_format

from kit.refusal import Refusal

PRESETS = {
    "today": "Today",
    "7d": "Last 7 days",
    "30d": "Last 30 days",
    "month": "This month",
    "last-month": "Last month",
    "year": "This year",
    "12m": "Last 12 months",
    "all": "All time",
}
CUSTOM = "custom"
FIRST_YEAR, LAST_YEAR = 2000, 2100  # far from the ends of what a datetime holds in every zone


class InvalidPeriod(Refusal):
    """The address does not name a valid period. `message` is for the person."""


@dataclass(frozen=True, slots=True)
class Period:
    """From `since` (included) to `until` (not included), midnights of the reader's time zone; None means unbounded."""

    since: datetime | None
    until: datetime | None
    preset: str  # a key of PRESETS, or CUSTOM
    label: str

    @property
    def first_day(self) -> date | None:
        return self.since.date() if self.since else None

    @property
    def last_day(self) -> date | None:
        return self.until.date() - timedelta(days=1) if self.until else None

    @property
    def query(self) -> str:
        """The part of an address that names it."""
        if self.preset != CUSTOM:
            return f"period={self.preset}"
        days = {"from": self.first_day, "to": self.last_day}
        return "&".join(f"{name}={day.isoformat()}" for name, day in days.items() if day)


def read_period(query: Mapping[str, str], *, default: str) -> Period:
    """The span that an address asks for, `default` (a key of PRESETS) when it names none. Raises InvalidPeriod."""
    first_text, last_text = query.get("from", "").strip(), query.get("to", "").strip()
    if first_text or last_text:
        return _custom(_day(first_text), _day(last_text))
    return preset_period(query.get("period") or default)


def preset_period(preset: str) -> Period:
    """Raises InvalidPeriod."""
    if preset not in PRESETS:
        raise InvalidPeriod("There is no such period. Choose one of those below.")
    today = timezone.localdate()
    month = today.replace(day=1)
    spans: dict[str, tuple[date | None, date | None]] = {
        "today": (today, today + timedelta(days=1)),
        "7d": (today - timedelta(days=6), today + timedelta(days=1)),
        "30d": (today - timedelta(days=29), today + timedelta(days=1)),
        "month": (month, today + timedelta(days=1)),
        "last-month": ((month - timedelta(days=1)).replace(day=1), month),
        "year": (today.replace(month=1, day=1), today + timedelta(days=1)),
        "12m": (add_months(month, -11), today + timedelta(days=1)),
        "all": (None, None),
    }
    first, end = spans[preset]
    return _period(first, end, preset, PRESETS[preset])


def midnight(day: date, zone: tzinfo | None = None) -> datetime:
    """When the day begins in the zone (default: the reader's), also on a day whose clock skips midnight."""
    zone = zone or timezone.get_current_timezone()
    # By way of UTC: a midnight that is skipped becomes the moment at which the clock goes on.
    return datetime.combine(day, time.min, zone).astimezone(UTC).astimezone(zone)


def add_months(day: date, months: int) -> date:
    """The first of the month, that many months after the day's."""
    year, month = divmod(day.year * 12 + day.month - 1 + months, 12)
    return date(year, month + 1, 1)


def _custom(first: date | None, last: date | None) -> Period:
    if first and last and first > last:
        raise InvalidPeriod("The first day comes after the last one.")
    if first and last:
        label = day_label(first) if first == last else f"{day_label(first)} – {day_label(last)}"
    else:
        label = f"Since {day_label(first)}" if first else f"Until {day_label(last)}" if last else ""
    end = last + timedelta(days=1) if last else None
    return _period(first, end, CUSTOM, label)


def _period(first: date | None, end: date | None, preset: str, label: str) -> Period:
    return Period(midnight(first) if first else None, midnight(end) if end else None, preset, label)


def _day(text: str) -> date | None:
    if not text:
        return None
    try:
        text.encode("ascii")  # digits of other scripts do not count
        day = datetime.strptime(text, "%Y-%m-%d").date()  # noqa: DTZ007
    except ValueError as error:
        raise InvalidPeriod("Enter days as year-month-day, as in 2026-03-31.") from error
    if not FIRST_YEAR <= day.year <= LAST_YEAR:
        raise InvalidPeriod(f"Choose days from {FIRST_YEAR} to {LAST_YEAR}.")
    return day


def day_label(day: date) -> str:
    """As dates are written throughout: 1 Mar 2026."""
    return date_format(day, "j M Y")
