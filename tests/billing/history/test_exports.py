"""What a spreadsheet makes of a file of ours, wherever it stands (row 67)."""

import csv
import io
import re

import pytest

from billing.history import exports

SIGNS = tuple("=+-@＝＋－＠")


@pytest.mark.parametrize(
    "text",
    [
        "{}1+1",
        "  {}1",
        "\u3000{}1",
        "\u200b{}1",
        "a;{}1",
        "a; {}1",
        'a;"{}1',
        "a\t{}1",
        "a\n{}1",
        "a\r\n \t{}1",
        ";;{}1",
    ],
)
def test_no_cell_becomes_a_formula(text: str) -> None:
    """Read as it was written, and read as where a semicolon or a tab separates, whose quotes may be none."""
    for sign in SIGNS:
        line = "".join(exports.csv_lines([[1, text.format(sign), -5]]))
        [[first, cell, last]] = csv.reader(io.StringIO(line.removeprefix(exports.BYTE_ORDER_MARK), newline=""))
        assert (first, last) == ("1", "-5")
        pieces = [cell, *re.split(r"[;\t\r\n]", line)]
        assert not [piece for piece in pieces if piece.strip(' "\u3000\u200b').startswith(SIGNS)]


@pytest.mark.parametrize("text", ["a - b", "1;2", "x=1", "mail@example.com", "a;b=c", "", "it's; fine\nreally"])
def test_other_texts_stay_as_they_are(text: str) -> None:
    assert exports.neutralise(text) == text
