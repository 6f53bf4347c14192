"""A header that some addresses do not heed, and one that keeps pages out of caches."""

from collections.abc import Awaitable, Callable
from typing import Any, cast
from urllib.parse import urlsplit

from asgiref.sync import iscoroutinefunction
from django.conf import settings
from django.http import HttpRequest, HttpResponse
from django.utils.decorators import sync_and_async_middleware

# Balancers and Prometheus ask a process for these by its address or its container's name, whatever they may be.
ASKED_BY_ADDRESS = frozenset({"/healthz", "/readyz", "/metrics"})


@sync_and_async_middleware
def asked_by_address_middleware(get_response: Callable[[HttpRequest], Any]) -> Callable[[HttpRequest], Any]:
    """Lets ASKED_BY_ADDRESS answer whatever Host says. They make no links, so a forged one leads nobody astray; all
    other addresses refuse it."""
    if iscoroutinefunction(get_response):

        async def answer_async(request: HttpRequest) -> HttpResponse:
            _name_ourselves(request)
            return await cast(Awaitable[HttpResponse], get_response(request))

        return answer_async

    def answer(request: HttpRequest) -> HttpResponse:
        _name_ourselves(request)
        return cast(HttpResponse, get_response(request))

    return answer


def _name_ourselves(request: HttpRequest) -> None:
    if request.path in ASKED_BY_ADDRESS:
        request.get_host = lambda: urlsplit(settings.SITE_URL).netloc  # type: ignore[method-assign]


@sync_and_async_middleware
def no_store_middleware(get_response: Callable[[HttpRequest], Any]) -> Callable[[HttpRequest], Any]:
    """Whatever is answered to somebody who may be signed in, or shows a key, is kept by no browser and no proxy: after
    signing out, Back shows nothing. Pages, parts of pages, files and refusals alike; static files are served before."""
    if iscoroutinefunction(get_response):

        async def answer_async(request: HttpRequest) -> HttpResponse:
            return _not_stored(request, await cast(Awaitable[HttpResponse], get_response(request)))

        return answer_async

    def answer(request: HttpRequest) -> HttpResponse:
        return _not_stored(request, cast(HttpResponse, get_response(request)))

    return answer


def _not_stored(request: HttpRequest, response: HttpResponse) -> HttpResponse:
    session = settings.SESSION_COOKIE_NAME
    if session in request.COOKIES or session in response.cookies or "Authorization" in request.headers:
        response["Cache-Control"] = "no-store, private"
    return response
