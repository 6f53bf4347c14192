"""A header that some addresses do not heed, and one that keeps pages out of caches."""

from urllib.parse import urlsplit

from django.conf import settings
from django.http import HttpRequest, HttpResponse

from postmate.web.middleware import middleware

# Balancers and Prometheus ask a process for these by its address or its container's name, whatever they may be.
ASKED_BY_ADDRESS = frozenset({"/healthz", "/readyz", "/metrics"})


def _name_ourselves(request: HttpRequest) -> None:
    if request.path in ASKED_BY_ADDRESS:
        request.get_host = lambda: urlsplit(settings.SITE_URL).netloc  # type: ignore[method-assign]


def _not_stored(request: HttpRequest, response: HttpResponse) -> HttpResponse:
    session = settings.SESSION_COOKIE_NAME
    if session in request.COOKIES or session in response.cookies or "Authorization" in request.headers:
        response["Cache-Control"] = "no-store, private"
    return response


# Lets ASKED_BY_ADDRESS answer whatever Host says. They make no links, so a forged one leads nobody astray; all other
# addresses refuse it.
asked_by_address_middleware = middleware(before=_name_ourselves)
# Whatever is answered to somebody who may be signed in, or shows a key, is kept by no browser and no proxy: after
# signing out, Back shows nothing. Pages, parts of pages, files and refusals alike; static files are served before.
no_store_middleware = middleware(after=_not_stored)
