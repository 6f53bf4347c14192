"""Tables as CSV for spreadsheets, written while they are read: a million rows need no more memory than ten."""

import csv
import re
from collections.abc import Iterable, Iterator
from decimal import Decimal

from django.utils import timezone

from billing import history

PIECE_LENGTH = 64 * 1024  # in characters, at least
BYTE_ORDER_MARK = "\ufeff"  # tells Excel that the file is UTF-8

# What a spreadsheet takes for the beginning of a formula, in the wide forms of East Asian keyboards too, at the
# beginning of a cell: of ours, or of one that it makes itself where a semicolon, a tab or a line's end separates. A
# German or French Excel does so, to which our quotes are none. Blanks, those without a width too, and quotes are passed
# over.
_FORMULA = re.compile(r"""(^|[;\t\r\n])(?=[\s"\ufeff\u200b-\u200f\u2060]*[=+\-@＝＋－＠])""")

TRANSACTION_COLUMNS = {
    "Entry": "its number in your ledger, counted from 1 without a gap",
    "Date": "when it was written, in your time zone, with the distance from UTC",
    "Type": "purchase, auto-recharge, bonus, grant, usage, refund, deduction or ended",
    "Description": "what it was for",
    "Tokens": "the change: positive came in, negative went out",
    "Balance before": "what you had before it, in tokens",
    "Balance after": "what you had after it, in tokens",
    "Paid": "what a purchase cost after discounts, without tax; negative where money went back",
    "Currency": "that of what was paid",
    "Operation": "the number of the AI operation in your usage log",
    "Purchase": "the number of the purchase, as on its receipt",
}

Cell = str | int | Decimal | None


def neutralise(text: str) -> str:
    """The text as no spreadsheet takes it for a formula. Numbers are cells of their own kind and stay as they are."""
    return _FORMULA.sub(r"\1'", f"'{text}" if text.startswith(("\t", "\r", "\n")) else text)


class _Line:
    """Stands in for a file: the writer's `writerow` returns what it is given to write."""

    def write(self, text: str) -> str:
        return text


def csv_lines(rows: Iterable[Iterable[Cell]]) -> Iterator[str]:
    """The lines of a CSV file, with a byte order mark for Excel and no cell that it would take for a formula."""
    writer = csv.writer(_Line())
    yield BYTE_ORDER_MARK
    for row in rows:
        yield writer.writerow([neutralise(cell) if isinstance(cell, str) else cell for cell in row])


def export_transactions(selection: history.Selection) -> Iterator[str]:
    """All entries of the selection, newest first, in the time zone that is current now."""
    zone = timezone.get_current_timezone()

    def rows() -> Iterator[list[Cell]]:
        yield list(TRANSACTION_COLUMNS)
        for entry in history.iterate(selection):
            yield [
                entry.sequence,
                entry.created_at.astimezone(zone).isoformat(timespec="seconds"),
                entry.get_type_display(),
                entry.description,
                entry.amount,
                entry.balance_before,
                entry.balance_after,
                None if entry.paid_cents is None else Decimal(entry.paid_cents) / 100,
                entry.currency.upper(),
                entry.usage_id,
                entry.purchase_id,
            ]

    # In bigger pieces than lines: the server sends each piece by itself.
    return _in_pieces(csv_lines(rows()))


def _in_pieces(lines: Iterator[str]) -> Iterator[str]:
    piece: list[str] = []
    size = 0
    for line in lines:
        piece.append(line)
        size += len(line)
        if size >= PIECE_LENGTH:
            yield "".join(piece)
            piece, size = [], 0
    if piece:
        yield "".join(piece)
