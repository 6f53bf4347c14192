"""Every page of the product, taken from its addresses: a page that is added is looked at without being listed."""

from collections.abc import Iterable, Iterator
from typing import Any

from django.test import Client
from django.urls import NoReverseMatch, URLPattern, URLResolver, get_resolver, reverse
from playwright.sync_api import APIRequestContext

from tests.audit.people import samples

# Not our pages: Django's admin, Swagger's description of the API, and what programs ask for.
LEFT_OUT = ("admin:", "api-1:", "api-docs", "live:", "studio:quote", "stripe-webhook", "healthz", "readyz", "mail")
# These act when they are opened: reading the mail marks it as read, a page of Stripe's is opened.
NOT_VISITED = ("tokens:card",)
MISSING_PAGE = "/no-such-page/"


def addresses() -> tuple[list[str], list[str]]:
    """The paths of all routes, those with parameters with each of their samples; and the routes without a sample."""
    known, paths, unknown = samples(), [MISSING_PAGE], []
    for name, pattern in _routes(get_resolver().url_patterns):
        if name.startswith(LEFT_OUT) or name in NOT_VISITED:
            continue
        parameters = pattern.pattern.regex.groupindex
        if parameters and name not in known and not _only_takes_posts(name, parameters):
            unknown.append(name)
        paths += [reverse(name, kwargs=kwargs) for kwargs in (known.get(name, []) if parameters else [{}])]
    return list(dict.fromkeys(paths)), unknown


def _only_takes_posts(name: str, parameters: Iterable[str]) -> bool:
    try:
        return Client().get(reverse(name, kwargs=dict.fromkeys(parameters, 1))).status_code == 405
    except NoReverseMatch:
        return False


def _routes(patterns: Any, namespace: str = "") -> Iterator[tuple[str, URLPattern]]:
    for pattern in patterns:
        if isinstance(pattern, URLResolver):
            inner = f"{namespace}{pattern.namespace}:" if pattern.namespace else namespace
            yield from _routes(pattern.url_patterns, inner)
        elif pattern.name:
            yield namespace + pattern.name, pattern


def pages_of(session: APIRequestContext, paths: list[str]) -> list[str]:
    """Those of the paths that answer this visitor with a page: no redirect, no partial, no file."""
    found = []
    for path in paths:
        answer = session.get(path, max_redirects=0)
        if answer.status >= 500:
            raise RuntimeError(f"{path} answers {answer.status}.")
        is_html = answer.headers.get("content-type", "").startswith("text/html")
        is_page = is_html and answer.status not in (301, 302, 405) and "<html" in answer.text()
        if is_page and (answer.status == 200 or path == MISSING_PAGE):
            found.append(path)
    return found
