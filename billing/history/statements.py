"""The statement of a month: the balance it began with, what moved it, the balance it ended with.

A month is one in the reader's time zone, and a part of the ledger between two entries: each entry is in exactly one
statement, and one month ends with the balance that the next begins with.
"""

from dataclasses import dataclass, replace
from datetime import date, datetime, timedelta
from typing import TYPE_CHECKING

from django.db import connection
from django.db.models import Count, Max, Sum
from django.db.models.functions import TruncDate
from django.utils import timezone
from django.utils.formats import date_format

from billing import history, ledger
from billing.models import TokenAccount, TokenTransaction
from kit.periods import add_months, midnight

if TYPE_CHECKING:
    from kit.pdf import Document

Type = TokenTransaction.Type

# More than these, and each day's are one line.
MAX_SINGLE_OPERATIONS = 60
MAX_SINGLE_OTHERS = 1_000


class NoSuchStatement(Exception):
    """The month is before the account's first entry, or has not begun."""


class StatementDoesNotAddUp(Exception):
    """Opening balance and movements do not make the closing balance. It must not be shown to anyone."""


@dataclass(frozen=True, slots=True)
class Line:
    """One entry, or a day's entries of one type."""

    day: date
    type: str
    description: str
    tokens: int  # signed
    entries: int
    last_sequence: int


@dataclass(frozen=True, slots=True)
class Statement:
    first_day: date
    last_day: date
    is_complete: bool  # the month is over
    opening_tokens: int
    closing_tokens: int
    totals: history.Totals
    lines: list[Line]

    @property
    def title(self) -> str:
        return f"Statement for {self.first_day:%B %Y}"


@dataclass(frozen=True, slots=True)
class Month:
    """A month in the list of statements."""

    first_day: date
    opening_tokens: int
    closing_tokens: int
    entries: int

    @property
    def last_day(self) -> date:
        return add_months(self.first_day, 1) - timedelta(days=1)

    @property
    def change_tokens(self) -> int:
        return self.closing_tokens - self.opening_tokens


_BALANCES_AT = """
SELECT coalesce(entry.sequence, 0), coalesce(entry.balance_after, 0)
  FROM unnest(%(moments)s::timestamptz[]) WITH ORDINALITY AS at (moment, number)
  LEFT JOIN LATERAL (
       SELECT sequence, balance_after FROM billing_tokentransaction
        WHERE account_id = %(account_id)s AND created_at < at.moment
        ORDER BY created_at DESC, id DESC LIMIT 1
  ) AS entry ON true
 ORDER BY at.number
"""


def list_months(*, user_id: int | None = None, account_id: int | None = None) -> list[Month]:
    """The months in which the account, or the user's own, has entries, newest first. Costs one look into an index for
    each month since the first entry."""
    account = ledger.get_account(user_id=user_id, account_id=account_id)
    first_entry = TokenTransaction.objects.filter(account=account, sequence=1).first()
    if first_entry is None:
        return []
    month = timezone.localdate(first_entry.created_at).replace(day=1)
    beginnings = [month]
    while month <= timezone.localdate():
        beginnings.append(month := add_months(month, 1))
    with connection.cursor() as cursor:
        cursor.execute(
            _BALANCES_AT,
            {"moments": [midnight(day) for day in beginnings], "account_id": account.pk},
        )
        marks: list[tuple[int, int]] = cursor.fetchall()
    months = [
        Month(first_day, opening_tokens, closing_tokens, last - before)
        for first_day, (before, opening_tokens), (last, closing_tokens) in zip(
            beginnings[:-1], marks[:-1], marks[1:], strict=True
        )
    ]
    return [month for month in reversed(months) if month.entries]


def get_statement(*, user_id: int | None = None, account_id: int | None = None, year: int, month: int) -> Statement:
    """Of an account, or of the user's own. Raises NoSuchStatement; StatementDoesNotAddUp rather than returning a wrong
    one."""
    today = timezone.localdate()
    if not (2000 <= year <= today.year and 1 <= month <= 12) or date(year, month, 1) > today:
        raise NoSuchStatement
    first_day = date(year, month, 1)
    next_month = add_months(first_day, 1)
    selection = history.select_transactions(
        user_id=user_id, account_id=account_id, since=midnight(first_day), until=midnight(next_month)
    )
    if selection.upto == 0:
        raise NoSuchStatement
    totals = history.get_totals(selection)
    statement = Statement(
        first_day=first_day,
        last_day=next_month - timedelta(days=1),
        is_complete=next_month <= today,
        opening_tokens=history.balance_at(selection.account_id, selection.after),
        closing_tokens=history.balance_at(selection.account_id, selection.upto),
        totals=totals,
        lines=_lines(selection),
    )
    moved_tokens = sum(line.tokens for line in statement.lines)
    is_whole = sum(line.entries for line in statement.lines) == totals.entries == selection.upto - selection.after
    if not is_whole or statement.opening_tokens + moved_tokens != statement.closing_tokens:
        raise StatementDoesNotAddUp(f"account {selection.account_id}, {year}-{month:02}")
    if moved_tokens != totals.net_tokens:
        raise StatementDoesNotAddUp(f"account {selection.account_id}, {year}-{month:02}: totals")
    return statement


def _lines(selection: history.Selection) -> list[Line]:
    """Usage and all else apart: each entry a line, or one for each day and type where there are many."""
    lines: list[Line] = []
    others = replace(selection, types=frozenset(Type) - {Type.USAGE})
    usage = replace(selection, types=frozenset([Type.USAGE]))
    for part, max_single in ((others, MAX_SINGLE_OTHERS), (usage, MAX_SINGLE_OPERATIONS)):
        lines += _single_lines(part) if history.get_totals(part).entries <= max_single else _daily_lines(part)
    # What stands for a whole day closes it.
    return sorted(lines, key=lambda line: (line.day, line.entries > 1, line.last_sequence))


def _single_lines(selection: history.Selection) -> list[Line]:
    return [
        Line(
            day=timezone.localdate(entry.created_at),
            type=entry.get_type_display(),
            description=entry.description,
            tokens=entry.amount,
            entries=1,
            last_sequence=entry.sequence,
        )
        for entry in history.iterate(selection)
    ]


def _daily_lines(selection: history.Selection) -> list[Line]:
    days = (
        selection.entries.annotate(day=TruncDate("created_at", tzinfo=timezone.get_current_timezone()))
        .values("day", "type")
        .annotate(tokens=Sum("amount"), entries=Count("pk"), last_sequence=Max("sequence"))
    )
    return [
        Line(
            day=row["day"],
            type=Type(row["type"]).label,
            description=count_of(row["entries"], "operation" if row["type"] == Type.USAGE else "entry"),
            tokens=int(row["tokens"]),
            entries=row["entries"],
            last_sequence=row["last_sequence"],
        )
        for row in days
    ]


def render_statement(statement: Statement, *, account: TokenAccount, written_at: datetime) -> bytes:
    """The statement as a PDF."""
    from kit.pdf import GREY, Document  # half a second, for those alone who print

    zone = timezone.get_current_timezone_name()
    pdf = Document(title=statement.title, subtitle=statement.title, written_at=written_at)
    pdf.fact("Account", f"{account.name}, {account.user.email}" if account.user and account.name else account.holder)
    pdf.fact("Period", f"{_day(statement.first_day)} to {_day(statement.last_day)}, time zone {zone}")
    written = timezone.localtime(written_at)
    if statement.is_complete:
        pdf.fact("Written on", f"{_day(written.date())}, {written:%H:%M}")
    else:
        pdf.fact("Written on", f"{_day(written.date())}, {written:%H:%M}: the month is not over yet", style="B")
    pdf.rule()
    for label, tokens, style in (
        ("Opening balance", f"{statement.opening_tokens:,}", ""),
        ("Tokens in", signed(statement.totals.tokens_in), ""),
        ("Tokens out", signed(-statement.totals.tokens_out), ""),
        ("Closing balance", f"{statement.closing_tokens:,}", "B"),
    ):
        pdf.fact(label, f"{tokens} tokens", style=style, align="R")
    pdf.ln(6)
    if statement.lines:
        _render_lines(pdf, statement)
    else:
        pdf.text_line("Nothing moved in this month.", size=10, height=8, colour=GREY)
    pdf.small_print(
        f"{count_of(statement.totals.entries, 'entry')} of your ledger. "
        "Where a day had many operations they are one line; your history on Postmate lists each of them. "
        "Opening balance and all lines together make the closing balance."
    )
    return bytes(pdf.output())


def _render_lines(pdf: "Document", statement: Statement) -> None:
    from kit.pdf import RULE

    pdf.set_font("DejaVu", "", 9)
    pdf.set_draw_color(*RULE)
    balance_tokens = statement.opening_tokens
    with pdf.table(
        col_widths=(24, 26, 60, 28, 32),
        text_align=("LEFT", "LEFT", "LEFT", "RIGHT", "RIGHT"),
        borders_layout="HORIZONTAL_LINES",
        line_height=5,
        padding=(1.2, 1),
    ) as table:
        table.row(["Date", "Type", "Description", "Tokens", "Balance"])
        for line in statement.lines:
            balance_tokens += line.tokens
            table.row([_day(line.day), line.type, line.description, signed(line.tokens), f"{balance_tokens:,}"])


def signed(tokens: int) -> str:
    """ "+1,500", "−20", "0"."""
    return f"{tokens:+,}".replace("-", "−") if tokens else "0"


def count_of(count: int, noun: str) -> str:
    """ "1 entry", "2,000 entries"."""
    plural = f"{noun.removesuffix('y')}ies" if noun.endswith("y") else f"{noun}s"
    return f"{count:,} {noun if count == 1 else plural}"


def _day(day: date) -> str:
    return date_format(day, "j M Y")
