"""Tabler's rules that the pages are sent."""

import re
from pathlib import Path

import pytest

from postmate.local import stylesheet


def test_has_every_rule_that_the_pages_use() -> None:
    assert stylesheet.USED.read_text() == stylesheet.build(), "The pages use other classes now: run `make css`."


def test_every_table_is_the_same_one() -> None:
    """A table that becomes cards on phones has roles and labels; one template alone knows how."""
    templates = Path(stylesheet.PROJECT / "templates").rglob("*.html")
    assert [file.name for file in templates if 'role="cell"' in file.read_text()] == ["_table.html"]


def root_properties(css: str) -> set[str]:
    blocks = re.findall(r"(?<![\w\]]):root[^{]*{([^}]*)}", css)
    return set(re.findall(r"(--[\w-]+)\s*:", " ".join(blocks)))


def test_every_property_it_names_is_defined() -> None:
    """What the whole style sheet defines for every page, nobody misses in the part."""
    whole, part = stylesheet.WHOLE.read_text(), stylesheet.USED.read_text()
    named = set(re.findall(r"var\((--[\w-]+)", part + stylesheet.OWN.read_text()))
    assert named & root_properties(whole) <= root_properties(part)
    assert len(named & root_properties(part)) > 20  # something was looked at


def test_keeps_what_is_used_and_nothing_else(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Rules in conditions, lists of selectors, negations, animations and properties."""
    monkeypatch.setattr(stylesheet, "PROJECT", tmp_path)
    monkeypatch.setattr(stylesheet, "WHOLE", tmp_path / "whole.css")
    monkeypatch.setattr(stylesheet, "OWN", tmp_path / "own.css")
    (tmp_path / "templates").mkdir()
    (tmp_path / "templates" / "page.html").write_text('<a class="btn {% if big %}btn-lg{% endif %}">Buy</a>')
    stylesheet.OWN.write_text(".mine{color:var(--own)}")
    stylesheet.WHOLE.write_text(
        "/*! licence */:root{--own:red;--used:blue;--unused:green}"
        "@media print{.btn,.card{color:var(--used)}.card{top:0}}@media (x){.card{top:0}}"
        ".btn:not(.active){content:'}';animation:spin 1s}.btn.active{top:0}.btn-lg{top:1px}"
        "@keyframes spin{0%{top:0}to{top:1px}}@keyframes gone{0%{top:0}to{top:1px}}"
    )
    assert stylesheet.build().split("licence */\n")[1].splitlines() == [
        ":root{--own:red;--used:blue}",
        "@media print{.btn{color:var(--used)}}",
        '.btn:not(.active){content:"}";animation:spin 1s}',
        ".btn-lg{top:1px}",
        "@keyframes spin{0%{top:0}to{top:1px}}",
    ]
