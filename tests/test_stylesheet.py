"""Tabler's rules that the pages are sent."""

import re

from postmate import stylesheet


def test_has_every_rule_that_the_pages_use() -> None:
    assert stylesheet.USED.read_text() == stylesheet.build(), "The pages use other classes now: run `make css`."


def test_every_property_it_names_is_defined() -> None:
    """What the whole style sheet defines, nobody misses in the part."""
    whole, part = stylesheet.WHOLE.read_text(), stylesheet.USED.read_text()
    named = set(re.findall(r"var\((--[\w-]+)", part + stylesheet.OWN.read_text()))
    defined_in_whole = set(re.findall(r"(--[\w-]+)\s*:", whole))
    defined = set(re.findall(r"(--[\w-]+)\s*:", part))
    assert named & defined_in_whole <= defined
    assert named & defined  # something was looked at
