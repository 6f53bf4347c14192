"""Each link of the documentation leads somewhere."""

import re
from functools import cache

import pytest

from tests.docs.pages import PROJECT, anchors, pages, without_blocks

LINK = re.compile(r"\]\(([^)\s]+)\)")


@pytest.mark.parametrize("page", pages())
def test_links_resolve(page: str) -> None:
    """Files are there, pictures too, and so is the heading that an anchor names."""
    broken = []
    for target in LINK.findall(without_blocks(pages()[page])):
        if re.match(r"https?://|mailto:", target):
            continue
        path, _, anchor = target.partition("#")
        file = (PROJECT / page).parent / path if path else PROJECT / page
        if not file.exists() or (anchor and anchor not in anchors(file.read_text())):
            broken.append(target)
    assert broken == []


def test_pages_are_reachable() -> None:
    """Every page of docs/ is linked from the README."""
    linked = {target.partition("#")[0] for target in LINK.findall(pages()["README.md"])}
    assert {page for page in pages() if page.startswith("docs/")} <= linked


@pytest.mark.parametrize("page", pages())
def test_named_files_and_tests_exist(page: str) -> None:
    """What stands as code and looks like a file of ours, or like one of our tests, is there."""
    text = without_blocks(pages()[page])
    named = set(re.findall(r"`((?!\.postmate)[\w.-]+(?:/[\w.-]+)+/?|test_\w+(?:\.py)?)`", text))
    files = {name for name in named if "/" in name and re.search(r"\.(py|md|html|json|sh|ts|yml)$|^tests/", name)}
    missing = {name for name in files if not any((PROJECT / folder / name).exists() for folder in ("", "tests"))}
    tests = {name.removesuffix(".py") for name in named if "/" not in name}
    missing |= {name for name in tests if name not in _tests()}
    assert missing == set()


@cache
def _tests() -> set[str]:
    """The names of all our tests and of their files."""
    files = [file for file in (PROJECT / "tests").rglob("test_*.py") if "node_modules" not in file.parts]
    return {file.stem for file in files} | {
        name for file in files for name in re.findall(r"^ *(?:async )?def (test_\w+)", file.read_text(), re.MULTILINE)
    }
