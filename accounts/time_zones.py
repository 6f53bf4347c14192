"""Whose clock a time is shown by: the zone of the person's settings, else the browser's, else UTC."""

from collections.abc import Awaitable, Callable
from datetime import UTC, datetime, timedelta, tzinfo
from functools import cache
from typing import cast
from zoneinfo import ZoneInfo, available_timezones

from asgiref.sync import iscoroutinefunction, sync_to_async
from django.conf import settings
from django.db import close_old_connections
from django.http import HttpRequest, HttpResponse
from django.utils import timezone
from django.utils.decorators import sync_and_async_middleware

from accounts.models import User

COOKIE = "time_zone"  # written by static/js/app.js
REGIONS = (
    "Africa", "America", "Antarctica", "Arctic", "Asia", "Atlantic", "Australia", "Europe", "Indian", "Pacific",
)  # fmt: skip

Answer = Callable[[HttpRequest], HttpResponse] | Callable[[HttpRequest], Awaitable[HttpResponse]]


@cache
def names() -> frozenset[str]:
    """The zones there are, by name: "Europe/Berlin"."""
    return frozenset(available_timezones())  # reads a directory tree


def find_zone(name: str) -> ZoneInfo | None:
    """The zone of that name; None when there is none, whatever a browser has sent."""
    return ZoneInfo(name) if name in names() else None


def list_choices(now: datetime) -> list[tuple[str, list[tuple[str, str]]]]:
    """What a person chooses from, by region, each with its distance from UTC at `now`."""
    regions: dict[str, list[tuple[str, str]]] = {region: [] for region in REGIONS}
    for name in sorted(names()):
        region, _, place = name.partition("/")
        if place and region in regions:
            offset = now.astimezone(ZoneInfo(name)).utcoffset() or timedelta()
            regions[region].append((name, f"{place.replace('_', ' ').replace('/', ', ')} ({_offset_words(offset)})"))
    return [("Everywhere", [("UTC", "UTC")]), *((region, places) for region, places in regions.items() if places)]


def zone_of(user: User) -> tzinfo:
    """For what is written while no browser is there, such as e-mails: the person's zone, UTC when they set none."""
    return find_zone(user.time_zone) or UTC


@sync_and_async_middleware
def time_zone_middleware(get_response: Answer) -> Answer:
    """Makes the reader's zone Django's current one for the whole request.

    It is never taken back: each request begins with its own, and a streamed answer is still being written when its
    view has returned.
    """
    if iscoroutinefunction(get_response):

        async def activate_async(request: HttpRequest) -> HttpResponse:
            name = await _read_name(request) if _may_be_signed_in(request) else ""
            _activate(request, name)
            return await cast(Awaitable[HttpResponse], get_response(request))

        return activate_async

    def activate(request: HttpRequest) -> HttpResponse:
        _activate(request, _name_of(request) if _may_be_signed_in(request) else "")
        return cast(HttpResponse, get_response(request))

    return activate


def _may_be_signed_in(request: HttpRequest) -> bool:
    # Without the cookie there is nobody to ask the database about.
    return settings.SESSION_COOKIE_NAME in request.COOKIES


def _name_of(request: HttpRequest) -> str:
    return getattr(request.user, "time_zone", "")


async def _read_name(request: HttpRequest) -> str:
    def read() -> str:
        try:
            return _name_of(request)
        finally:
            close_old_connections()  # a stream lives for minutes; it must not keep a connection from the pool

    return await sync_to_async(read, thread_sensitive=False)()


def _activate(request: HttpRequest, name: str) -> None:
    zone = find_zone(name) or find_zone(request.COOKIES.get(COOKIE, ""))
    if zone is None:
        timezone.deactivate()
    else:
        timezone.activate(zone)


def _offset_words(offset: timedelta) -> str:
    minutes = int(offset.total_seconds()) // 60
    sign, (hours, rest) = "−" if minutes < 0 else "+", divmod(abs(minutes), 60)
    return f"UTC{sign}{hours:02}:{rest:02}"
