"""What a section of the dashboard shows: figures, tables and charts. Page and files are written from it."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from decimal import Decimal

from billing import pricing
from billing.figures import sums
from billing.history.exports import Cell
from billing.usage.charts import Chart, Table, percent
from billing.usage.stats import BucketName

MAX_CHANGE_PERMILLE = 10_000  # beyond that a percentage tells nobody anything


@dataclass(frozen=True, slots=True)
class Unit:
    """How figures of a kind are written: as text for people, and as a number in a file."""

    name: str  # "" where the label says it
    text: Callable[[int], str]
    number: Callable[[int], Cell] = int


def _signed(value: int, text: Callable[[int], str]) -> str:
    return f"−{text(-value)}" if value < 0 else text(value)


def _micros_text(micros: int, currency: str) -> str:
    """To the cent, towards zero; less than one whole to four digits, so that small costs do not look like none."""
    symbol = pricing.display_price(0, currency).removesuffix("0.00")
    if 0 < micros < 1_000_000:
        return f"{symbol}0.{micros // 100:04d}" if micros >= 100 else f"< {symbol}0.0001"
    return pricing.display_price(micros // 10_000, currency)


def _duration_text(milliseconds: int) -> str:
    tenths = -(-milliseconds // 100)
    return f"{milliseconds} ms" if milliseconds < 1_000 else f"{tenths // 10:,}.{tenths % 10} s"


def cents_of(currency: str) -> Unit:
    return Unit(
        currency.upper(),
        lambda value: _signed(value, lambda cents: pricing.display_price(cents, currency)),
        lambda value: Decimal(value) / 100,
    )


def micros_of(currency: str) -> Unit:
    return Unit(
        currency.upper(),
        lambda value: _signed(value, lambda micros: _micros_text(micros, currency)),
        lambda value: Decimal(value) / 1_000_000,
    )


COUNT = Unit("", lambda value: _signed(value, "{:,}".format))
TOKENS = Unit("tokens", COUNT.text)
PERCENT = Unit("%", lambda value: _signed(value, percent), lambda permille: Decimal(permille) / 10)
MILLISECONDS = Unit("ms", _duration_text)
DAYS = Unit("days", COUNT.text)
USD_MICROS = micros_of("usd")


@dataclass(frozen=True, slots=True)
class Amount:
    """A number of a unit; None where there is none."""

    value: int | None
    unit: Unit

    @property
    def text(self) -> str:
        return "–" if self.value is None else self.unit.text(self.value)

    @property
    def number(self) -> Cell:
        return None if self.value is None else self.unit.number(self.value)


@dataclass(frozen=True, slots=True)
class Figure:
    """A number with its name, and what it was before."""

    label: str
    now: Amount
    before: Amount | None = None
    tone: str = ""  # bad or warn, where somebody has to look
    url: str = ""  # where what it counts is listed

    @property
    def change(self) -> str:
        if self.before is None or self.before.value is None or self.now.value is None:
            return ""
        return change_text(self.now.value, self.before.value, self.now.unit)


def change_text(now: int, before: int, unit: Unit) -> str:
    """In words: by how much a figure rose or fell. A rate, what changed its sign, and what is many times what it was,
    are named as they were."""
    if now == before:
        return "as before"
    if unit is PERCENT or before <= 0 or now < 0:
        return f"{unit.text(before)} before"
    permille = abs(sums.change_permille(now, before) or 0)
    if permille >= MAX_CHANGE_PERMILLE:
        return f"{unit.text(before)} before"
    if not permille:
        return "about as before"
    # Whole percentages are enough, except for small changes.
    amount = f"{permille // 10:,} %" if permille >= 100 else percent(permille)
    return f"{amount} {'more' if now > before else 'less'}"


@dataclass(frozen=True, slots=True)
class DataTable:
    """Numbers in rows; the first cell of each is its head. The page and the file are written from the same cells."""

    title: str
    headers: Sequence[str]
    rows: Sequence[Sequence[str | Amount]]
    note: str = ""
    is_wide: bool = False  # scrolls on phones instead of standing in cards

    @property
    def table(self) -> Table:
        return Table(self.headers, [[_text(cell) for cell in row] for row in self.rows])


def _text(cell: str | Amount) -> str:
    return cell if isinstance(cell, str) else cell.text


@dataclass(frozen=True, slots=True)
class Drawing:
    """A chart, and the cells of its table where no other table of the section has them."""

    chart: Chart
    data: DataTable | None = None


@dataclass(frozen=True, slots=True)
class Content:
    """What a section shows."""

    figures: Sequence[Figure] = ()
    drawings: Sequence[Drawing] = ()
    tables: Sequence[DataTable] = ()
    newest_event_at: datetime | None = None  # of Stripe's
    problem: str = ""
    empty: str = ""  # says so where there is nothing to show
    buckets: Sequence[tuple[BucketName, str]] = field(default=())  # that can be chosen
    bucket: BucketName | None = None

    @property
    def data_tables(self) -> list[DataTable]:
        return [*self.tables, *(drawing.data for drawing in self.drawings if drawing.data)]

    def lines(self) -> Iterator[list[Cell]]:
        """All its numbers, table after table, with a blank line between two of them."""
        if self.problem:
            yield [self.problem]
        if self.figures:
            yield ["Figure", "Value", "Unit", "Before"]
            for figure in self.figures:
                before = figure.before.number if figure.before else None
                yield [figure.label, figure.now.number, figure.now.unit.name, before]
        for data in self.data_tables:
            columns = zip(*data.rows, strict=True) if data.rows else ((),) * len(data.headers)
            units = [{cell.unit.name for cell in column if isinstance(cell, Amount)} for column in columns]
            yield []
            yield [data.title]
            yield [
                f"{header} ({min(names)})" if len(names) == 1 and min(names) not in ("", header) else header
                for header, names in zip(data.headers, units, strict=True)
            ]
            for row in data.rows:
                yield [cell if isinstance(cell, str) else cell.number for cell in row]
