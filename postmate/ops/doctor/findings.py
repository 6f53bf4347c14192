"""What a check finds, and the words it is told in."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import datetime, timedelta
from enum import StrEnum

import httpx2
from django.conf import settings
from django.utils import timezone

TIMEOUT_SECONDS = 5.0  # of a question over the network, where nothing else says so
CLOCK_WARNING_SECONDS, CLOCK_PROBLEM_SECONDS = 3, 30  # a webhook's signature is good for 300, and 60 ahead
RETIRING_DAYS = 30  # of a model


class Level(StrEnum):
    OK = "ok"
    WARNING = "warning"
    PROBLEM = "problem"
    SKIPPED = "skipped"


@dataclass(frozen=True, slots=True)
class Outcome:
    level: Level
    message: str
    advice: str = ""


@dataclass(frozen=True, slots=True)
class Line:
    """One line of the report."""

    subject: str
    level: Level
    message: str
    advice: str


Outcomes = Iterator[Outcome]


@dataclass(frozen=True, slots=True)
class Check:
    """`gives` names what others need: with a problem here, they are not looked at."""

    subject: str
    run: Callable[[], Outcomes]
    needs: frozenset[str] = frozenset()
    gives: str = ""
    is_slow: bool = False


def ok(message: str) -> Outcome:
    return Outcome(Level.OK, message)


def warning(message: str, advice: str) -> Outcome:
    return Outcome(Level.WARNING, message, advice)


def problem(message: str, advice: str) -> Outcome:
    return Outcome(Level.PROBLEM, message, advice)


def http_client() -> httpx2.Client:
    # A rehearsal's certificate is signed by the proxy itself.
    return httpx2.Client(timeout=TIMEOUT_SECONDS, verify=not settings.REHEARSAL)


def get_page(path: str) -> httpx2.Response:
    with http_client() as client:
        return client.get(settings.SITE_URL + path)


def count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def ago(at: datetime) -> str:
    seconds = int((timezone.now() - at).total_seconds())
    for unit, length in (("days", 86_400), ("hours", 3_600), ("minutes", 60)):
        if seconds >= 2 * length:
            return f"{seconds // length} {unit} ago"
    return "just now"


def short(error: BaseException | None) -> str:
    """What an error says, on one line."""
    text = " ".join(str(error).split())
    return f"{text[:200]}{'…' if text[200:] else ''}" or type(error).__name__


def clock(whose: str, ahead: timedelta, precision_seconds: float = 0) -> Outcome:
    seconds = ahead.total_seconds()
    off = max(0.0, abs(seconds) - precision_seconds)
    if off < CLOCK_WARNING_SECONDS:
        return ok(f"This machine and {whose} agree to {max(off, 0.1):.1f} s.")
    text = f"The clock of {whose} is {abs(seconds):.0f} s {'ahead of' if seconds > 0 else 'behind'} this machine's."
    advice = "Let all machines keep time with NTP. Stripe's webhooks are refused when the clocks are minutes apart."
    return (problem if off >= CLOCK_PROBLEM_SECONDS else warning)(text, advice)
