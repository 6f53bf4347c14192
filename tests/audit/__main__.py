"""`make audit`: Lighthouse over four pages and axe over all of them; prints a table and fails below the bar.

.venv/bin/python -m tests.audit [lighthouse | axe] [part of a path]
"""

# ruff: noqa: T201  (its output is what it is for)

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

os.environ["DJANGO_ALLOW_ASYNC_UNSAFE"] = "true"  # Playwright keeps an event loop in this thread

from playwright.sync_api import Browser, BrowserContext, Page, sync_playwright

from tests.audit import production
from tests.audit.axe import WIDTHS, Violation, find_violations
from tests.audit.lighthouse import BAR, CATEGORIES, Scores, measure
from tests.audit.pages import addresses, pages_of
from tests.audit.people import make_everyone
from tests.conftest import PASSWORD
from tests.journeys.conftest import ARGUMENTS

LIGHTHOUSE_PAGES = {"home": "/", "tokens": "/tokens/", "studio": "/studio/", "history": "/tokens/history/"}
VISITORS = ("", "newcomer", "writer", "admin", "superadmin")
# Forms sent as they never should be: page and the form in it.
BAD_FORMS = {
    "": [
        ("/accounts/login/", "main form"),
        ("/accounts/signup/", "main form"),
        ("/accounts/password/reset/", "main form"),
    ],
    "writer": [
        ("/studio/", "#draft-form"),
        ("/studio/chats/", "form[data-operation=chat]"),
        ("/studio/images/", "form[data-operation=images]"),
        ("/tokens/", "#auto-recharge form"),
        ("/accounts/api-keys/", "form:has([name=name])"),
    ],
}
State = tuple[str, list[Violation]]
NOT_SEEN = Violation("not seen", "The page was not looked at", (), 0)
THEMES: tuple[Literal["light", "dark"], ...] = ("light", "dark")


def main() -> int:
    only, part = [*sys.argv[1:], "", ""][:2]
    scores: list[Scores] = []
    states: list[State] = []
    began = time.monotonic()
    with production.running() as (server, stripe), sync_playwright() as playwright:
        make_everyone(server, stripe)
        browser = playwright.chromium.launch(executable_path="/usr/bin/chromium", args=ARGUMENTS)
        visitors = Visitors(browser, server.url)
        if only != "axe":
            scores = list(_measure(visitors, part))
        if only != "lighthouse":
            states = list(_look(visitors, part))
        browser.close()
    _print_scores(scores)
    _print_violations(states)
    print(f"{time.monotonic() - began:.0f} seconds")
    return 0 if all(each.passes for each in scores) and not any(found for _, found in states) else 1


class Visitors:
    """Browser windows of people who have signed in, one for each theme; "" is somebody who has not."""

    def __init__(self, browser: Browser, url: str) -> None:
        self.browser, self.url = browser, url
        self._contexts: dict[tuple[str, str], BrowserContext] = {}

    def context(self, name: str, theme: Literal["light", "dark"] = "light") -> BrowserContext:
        if (name, theme) not in self._contexts:
            context = self.browser.new_context(
                base_url=self.url,
                bypass_csp=True,  # axe is a script that our policy rightly forbids
                color_scheme=theme,
                reduced_motion="reduce",  # a colour that is half-way to another one is none that anybody reads
                storage_state=self.context(name).storage_state() if theme == "dark" else None,
            )
            if name and theme == "light":
                _sign_in(context.new_page(), name)
            self._contexts[name, theme] = context
        return self._contexts[name, theme]

    @contextmanager
    def page(self, name: str, theme: Literal["light", "dark"], path: str) -> Iterator[Page]:
        page = self.context(name, theme).new_page()
        page.goto(path)
        _settle(page)
        yield page
        page.close()


def _sign_in(page: Page, name: str) -> None:
    page.goto("/accounts/login/")
    page.get_by_label("Email").fill(f"{name}@example.com")
    page.get_by_label("Password").fill(PASSWORD)
    page.get_by_role("button", name="Sign in", exact=True).click()
    page.wait_for_url("**/studio/")
    page.close()


def _settle(page: Page) -> None:
    """Until what a page loads by itself (quotes, charts) is there; the live stream stays open for ever."""
    page.wait_for_load_state("load")
    page.wait_for_function("() => !document.querySelector('.htmx-request, .htmx-swapping, .htmx-settling')")


# --- Lighthouse -------------------------------------------------------------------------------------------------------


def _measure(visitors: Visitors, part: str) -> Iterator[Scores]:
    for name, path in LIGHTHOUSE_PAGES.items():
        if part not in path:
            continue
        visitor = visitors.context("" if path == "/" else "writer")
        status = visitor.request.get(path).status
        if status != 200:
            print(f"{path} answers {status}: not measured")
            continue
        found, lost = measure(name, visitors.url + path, visitor)
        for category in CATEGORIES:
            print(f"{path:<20} {category:<16} {found.runs[category]}", flush=True)
        for line in lost:
            print(f"{'':<20} {line}")
        yield found


def _print_scores(scores: list[Scores]) -> None:
    if not scores:
        return
    print(f"\nLighthouse, mobile, median of {len(scores[0].runs['seo'])} runs; the bar is {BAR}\n")
    print(f"{'':<12}" + "".join(f"{category:>16}" for category in CATEGORIES))
    for each in scores:
        medians = "".join(f"{each.median(category):>16}" for category in CATEGORIES)
        print(f"{each.name:<12}{medians}{'' if each.passes else '   below the bar'}")


# --- axe --------------------------------------------------------------------------------------------------------------


def _look(visitors: Visitors, part: str) -> Iterator[State]:
    paths, unknown = addresses()
    for name in unknown:
        yield f"{name}: tests/audit/people.py has no sample for it", [NOT_SEEN]
    paths = [path for path in paths if part in path]
    seen: set[str] = set()
    for visitor in VISITORS:
        found = pages_of(visitors.context(visitor).request, paths)
        # Staff see the pages of everybody; what is theirs alone is looked at, and what stands in their menu.
        is_staff = visitor in ("admin", "superadmin")
        visited = [path for path in found if path not in seen] if is_staff else found
        seen.update([] if is_staff else found)
        for theme in THEMES:
            for path in visited:
                with visitors.page(visitor, theme, path) as page:
                    yield _examine(visitor, theme, path, page)
            for path, form in BAD_FORMS.get(visitor, []):
                if part in path:
                    with visitors.page(visitor, theme, path) as page:
                        _send_badly(page, form)
                        yield _examine(visitor, theme, f"{path} (refused)", page)
            if visitor and not part:
                with visitors.page(visitor, theme, "/tokens/notifications/") as page:
                    page.locator("details.menu > summary").click()
                    yield _examine(visitor, theme, "the menu", page, within="header")  # what it covers is not used


def _send_badly(page: Page, selector: str) -> None:
    """Empty the form's texts and send it past the browser's own checks."""
    page.locator(selector).first.evaluate(
        """(form) => {
          form.noValidate = true;
          form.querySelectorAll("input:not([type=hidden], [type=checkbox], [type=radio]), textarea")
            .forEach((field) => (field.value = ""));
          form.querySelectorAll("[type=checkbox]").forEach((box) => (box.checked = true));
          form.requestSubmit();
        }"""
    )
    page.locator(".field-error, [role=alert]").filter(visible=True).first.wait_for()
    _settle(page)


def _examine(visitor: str, theme: str, what: str, page: Page, *, within: str = "html") -> State:
    found = find_violations(page, within=within)
    name = f"{visitor or 'signed out'}, {theme}: {what}"
    if found:
        print(f"\n{name}", flush=True)
    for rule, help, places in dict.fromkeys((each.rule, each.help, each.places) for each in found):
        widths = [each.width for each in found if (each.rule, each.places) == (rule, places)]
        print(f"  {rule}: {help} ({', '.join(map(str, widths))} px)")
        for place in places[:5]:
            print("    " + place.replace("\n", "\n    "))
    return name, found


def _print_violations(states: list[State]) -> None:
    if not states:
        return
    print(f"\naxe, {' / '.join(map(str, WIDTHS))} px, {' and '.join(THEMES)}\n")
    print(f"{'violations':>10}  {'pages':>5}  as")
    for visitor in dict.fromkeys(name.partition(":")[0] for name, _ in states):
        own = [found for name, found in states if name.partition(":")[0] == visitor]
        print(f"{sum(map(len, own)):>10}  {len(own):>5}  {visitor}")
    for name, found in states:
        if found:
            print(f"{len(found):>10}  {'':>5}  {name}")


if __name__ == "__main__":
    sys.exit(main())
