"""The laws and the faults, as the documentation tells of them: what it says keeps them is there."""

import re
from pathlib import Path

import pytest
from django.apps import apps

from postmate.web.logs import OURS
from tests.docs.pages import PROJECT, pages, table_rows

ARCHITECTURE, FAULTS = "docs/ARCHITECTURE.md", "docs/FAULTS.md"
LAST_ROW = 135  # the highest number that was ever given

# The columns that law 1 is about, and who may write them: the ledger, and the invented past of development databases,
# which is committed only when `verify_ledger` finds every law kept (tests/local/test_make_demo_history.py).
LAW_1 = re.compile(
    r"UPDATE\s+billing_tokenaccount\b[^;]*?\bSET\s+(?:balance|reserved)\b|INSERT\s+INTO\s+billing_tokentransaction\b"
    r"|\bTokenTransaction\.objects\.(?:create|bulk_create|update_or_create|get_or_create)\b|\bTokenTransaction\(\w+="
    r"|\.(?:update|create)\([^)]*\b(?:balance|reserved)=|\baccount\.(?:balance|reserved) (?:[+-]?=) ",
    re.IGNORECASE,
)
MAY_WRITE = {"billing/ledger/statements.py", "postmate/local/invented_past.py"}


def names_in_the_database() -> set[str]:
    """The constraints and triggers that our models declare."""
    found: set[str] = set()
    for label in ("accounts", "billing", "ai_ops"):
        for model in apps.get_app_config(label).get_models():
            found |= {constraint.name for constraint in model._meta.constraints}
            found |= {trigger.name for trigger in getattr(model._meta, "triggers", ())}
    return found


def test_laws() -> None:
    """Each with code, constraints and tests that are there."""
    rows = table_rows(ARCHITECTURE, "## The laws")[1:]
    assert [row[0] for row in rows] == [str(number) for number in range(1, 17)]
    known = names_in_the_database()
    for number, _, code, database, tests in rows:
        files = re.findall(r"`([\w/]+\.py)`", code + tests)
        assert files or "`" in code, number
        assert [file for file in files if not (PROJECT / file).exists()] == []
        assert set(re.findall(r"`([a-z_0-9]+)`", database)) - known == set()
        assert re.findall(r"`tests/[\w/]+\.py`", tests), number


def test_ledger_alone_writes_balances() -> None:
    """Law 1: no other file of ours has a statement that writes a balance, a hold or a ledger row."""
    writers = set()
    for folder in OURS:
        for file in (PROJECT / folder).rglob("*.py"):
            if "migrations" not in file.parts and LAW_1.search(file.read_text()):
                writers.add(str(file.relative_to(PROJECT)))
    assert writers == MAY_WRITE


def test_faults() -> None:
    """Every row is there once, and the tests that it names speak of it by its number."""
    rows = re.findall(r"^\| (\d+) \|.*\| ([^|]*) \|$", pages()[FAULTS], re.MULTILINE)
    # Numbers are given once and for all, so there are gaps.
    numbers = [int(number) for number, _ in rows]
    assert numbers == sorted(set(numbers))
    silent = []
    for number, tests in rows:
        files = re.findall(r"`([\w/]+\.py)`", tests)
        assert files, f"row {number} has no test"
        silent += [(number, file) for file in files if int(number) not in rows_named_in(PROJECT / "tests" / file)]
    assert silent == []


NUMBERS = r"((?:\d+(?: \([^)]*\))?(?:, | and | with |–| to )?)+)"


def rows_named_in(file: Path) -> set[int]:
    """The rows that a file of tests is about: "rows 9 and 10" anywhere, or numbers at the head of a docstring."""
    source = file.read_text()
    lists = re.findall(rf"\b[Rr]ows?(?: of [\w ]+:)? {NUMBERS}", source)
    lists += re.findall(rf'^ *"""{NUMBERS}(?=[:,"])', source, re.MULTILINE)
    named: set[int] = set()
    for text in lists:
        text = re.sub(r"\([^)]*\)", "", text)
        named |= {int(number) for number in re.findall(r"\d+", text)}
        for first, last in re.findall(r"(\d+)(?:–| to )(\d+)", text):
            named |= set(range(int(first), int(last)))
    return named


@pytest.mark.parametrize("folder", OURS)
def test_numbers_are_explained(folder: str) -> None:
    """What the code calls a law or a row has a number that the documentation knows."""
    for file in (PROJECT / folder).rglob("*.py"):
        text = file.read_text()
        assert all(int(number) <= 17 for number in re.findall(r"\blaws? (\d+)\b", text)), file
        assert all(int(number) <= LAST_ROW for number in re.findall(r"\brows? (\d+)\b", text)), file
