"""A browser, and people who use it. Each page is watched: what goes wrong unseen fails the test, too."""

import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from django.core.cache import cache
from django.test import Client
from playwright.sync_api import (
    Browser,
    BrowserContext,
    ConsoleMessage,
    Page,
    Request,
    Response,
    ViewportSize,
    expect,
    sync_playwright,
)

from billing.upkeep.verification import verify
from tests.conftest import PASSWORD
from tests.environment import SITE_URL
from tests.servers import Server, StripeStandIn

SCREENSHOTS = Path(__file__).parents[2] / "artifacts" / "screenshots"
WIDE, PHONE = ViewportSize(width=1440, height=900), ViewportSize(width=390, height=844)
OWN_HOSTS = ("127.0.0.1", "localhost")
TIMEOUT_MS = 15_000
# The same engine without a browser's windows around it does half the work for each journey.
CHROMIUM = shutil.which("chromium-headless-shell") or "/usr/bin/chromium"
expect.set_options(timeout=TIMEOUT_MS)
ARGUMENTS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


@pytest.fixture(scope="package")
def browser() -> Iterator[Browser]:
    """Chromium. Playwright keeps an event loop in this thread for as long as it runs, to which Django's ORM objects."""
    with pytest.MonkeyPatch.context() as patch, sync_playwright() as playwright:
        patch.setenv("DJANGO_ALLOW_ASYNC_UNSAFE", "true")
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        yield browser
        browser.close()


@dataclass  # without slots: Playwright notes its listeners on their owner
class Watch:
    """What must never happen on a page, whatever else the journey looks at."""

    problems: list[str] = field(default_factory=list)

    def over(self, context: BrowserContext) -> None:
        context.on("console", self._console)
        context.on("weberror", lambda error: self.problems.append(f"script: {error.error}"))
        context.on("request", self._request)
        context.on("response", self._response)

    def _console(self, message: ConsoleMessage) -> None:
        # Chromium's own line about an answer that the journey asked for: 400, 402, 404 (those of 500 and more are seen
        # below), and htmx's two about a request that the person left behind with its page. After one that failed htmx
        # says so in a line of another name.
        is_echo = message.text.startswith(
            (
                "Failed to load resource: the server responded with a status of 4",
                "htmx:afterRequest, ",
                "htmx:sendAbort, ",
            )
        )
        if (message.type in ("error", "warning") and not is_echo) or "Content Security Policy" in message.text:
            self.problems.append(f"console: {message.text}")

    def _request(self, request: Request) -> None:
        address = urlsplit(request.url)
        if address.scheme != "data" and address.hostname not in OWN_HOSTS:
            self.problems.append(f"another host: {request.url}")

    def _response(self, response: Response) -> None:
        if response.status >= 500:
            self.problems.append(f"{response.status}: {response.url}")


OpenContext = Callable[..., BrowserContext]


@pytest.fixture
def open_context(web: Server, stripe: StripeStandIn, ai: Server, browser: Browser) -> Iterator[OpenContext]:
    """Opens a watched browser window, 1440 px wide; `open_context(java_script_enabled=False)` without scripts."""
    cache.clear()  # the limits of sign-ins and sign-ups count over all journeys
    watch, contexts = Watch(), []

    def open_context(**options: Any) -> BrowserContext:
        context = browser.new_context(base_url=web.url, viewport=WIDE, color_scheme="light", **options)
        context.set_default_timeout(TIMEOUT_MS)
        watch.over(context)
        contexts.append(context)
        return context

    yield open_context
    problems = watch.problems.copy()  # to close a page in the middle of a request is none
    for context in contexts:
        context.close()
    assert problems == []
    assert [finding for finding in verify() if finding.violations] == []


@pytest.fixture(scope="package")
def _kept_window(browser: Browser) -> Iterator[tuple[BrowserContext, Watch]]:
    watch = Watch()
    with browser.new_context(base_url=SITE_URL, viewport=WIDE, color_scheme="light") as context:
        context.set_default_timeout(TIMEOUT_MS)
        watch.over(context)
        yield context, watch


@pytest.fixture
def page(open_context: OpenContext, _kept_window: tuple[BrowserContext, Watch]) -> Iterator[Page]:
    """A tab of a window that is kept for all journeys: a new window costs half a second of a core.

    It begins without cookies and storage, as a new one does. What is set for a whole window, such as its clock,
    wants one of its own: `open_context`.
    """
    context, watch = _kept_window
    watch.problems.clear()
    page = context.new_page()
    yield page
    problems = watch.problems.copy()
    context.new_cdp_session(page).send("Storage.clearDataForOrigin", {"origin": SITE_URL, "storageTypes": "all"})
    context.clear_cookies()
    for tab in context.pages:
        tab.close()
    assert problems == []


def sign_in(page: Page, name: str, path: str = "/studio/") -> Page:
    """The page at `path`, signed in as by the form. The form is what test_account.py looks at; here this process fills
    it in, without a server."""
    client = Client()
    form = {"login": f"{name}@example.com", "password": PASSWORD}
    assert client.post("/accounts/login/", form).status_code == 302
    page.context.add_cookies([{"name": key, "value": it.value, "url": SITE_URL} for key, it in client.cookies.items()])
    page.goto(path)
    return page


def shoot(page: Page, name: str, *, whole: bool = True) -> None:
    """For `make screenshots`: keep pictures of the page in both widths and both themes, and leave it as it was.

    A test run takes none.
    """
    if "SCREENSHOTS" not in os.environ:
        return
    SCREENSHOTS.mkdir(parents=True, exist_ok=True)
    page.bring_to_front()  # a tab in the background paints once a second
    page.evaluate("scrollTo(0, 0)")
    for size in (PHONE, WIDE):
        page.set_viewport_size(size)
        for theme in ("light", "dark"):
            page.emulate_media(color_scheme=theme, reduced_motion="reduce")  # no colour half-way to the next one
            path = SCREENSHOTS / f"{name}-{size['width']}-{theme}.png"
            page.screenshot(path=path, full_page=whole, animations="disabled")
    page.set_viewport_size(WIDE)
    page.emulate_media(color_scheme="light", reduced_motion="no-preference")
    # Playwright hides the caret and leaves an empty style on each input, which htmx would copy to the next one.
    page.evaluate("""document.querySelectorAll('[style=""]').forEach(element => element.removeAttribute("style"))""")
