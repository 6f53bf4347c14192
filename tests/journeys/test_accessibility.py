"""axe over the main pages, on a phone and in both themes; `make audit` looks at all pages, at three widths."""

from typing import Literal

import pytest

from accounts.models import User
from tests.audit.axe import find_violations
from tests.journeys.conftest import OpenContext, sign_in

PHONE_WIDTH = 390
PAGES = ["/studio/", "/studio/chats/", "/studio/images/", "/tokens/", "/tokens/history/", "/tokens/usage/"]


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_no_violations(alice: User, open_context: OpenContext, theme: Literal["light", "dark"]) -> None:
    page = open_context(bypass_csp=True, reduced_motion="reduce").new_page()
    page.emulate_media(color_scheme=theme)
    found = {}
    for path in ["/", "/accounts/login/", "/accounts/signup/"]:
        page.goto(path)
        found[path] = find_violations(page, widths=(PHONE_WIDTH,))
    sign_in(page, "alice")
    for path in PAGES:
        page.goto(path)
        found[path] = find_violations(page, widths=(PHONE_WIDTH,))
    assert {path: violations for path, violations in found.items() if violations} == {}


def test_a_violation_is_found(open_context: OpenContext) -> None:
    """The control: grey on grey, and a picture without words."""
    page = open_context(bypass_csp=True).new_page()
    page.goto("/")
    page.evaluate("document.querySelector('h1').style.color = '#eee'")
    page.evaluate("document.querySelector('main').append(Object.assign(new Image(), {src: '/static/img/logo.svg'}))")
    assert {each.rule for each in find_violations(page, widths=(PHONE_WIDTH,))} >= {"color-contrast", "image-alt"}
