"""Charts and the numbers beside them, as templates/billing/_chart.html and static/js/charts.js take them."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from typing import Any

from django.utils import timezone
from django.utils.formats import date_format

from billing.usage.stats import BucketName

BUCKET_LABELS: dict[BucketName, str] = {"hour": "Hours", "day": "Days", "week": "Weeks", "month": "Months"}


@dataclass(frozen=True, slots=True)
class Table:
    """The numbers of a chart as text; the first cell of a row is its head."""

    headers: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True, slots=True)
class Chart:
    """What static/js/charts.js draws, and the same as a table. `summary` is read to people who cannot see it."""

    id: str
    title: str
    summary: str
    kind: str  # stacked, line or bars
    labels: Sequence[str]
    series: Sequence[tuple[str, Sequence[int | None]]]
    table: Table
    note: str = ""
    is_table_folded: bool = True
    tones: Sequence[str] = field(default=())  # of the series; else the colours of the palette in their order

    @property
    def data_id(self) -> str:
        return f"chart-{self.id}-data"

    @property
    def data(self) -> dict[str, Any]:
        return {
            "kind": self.kind,
            "labels": self.labels,
            "series": [{"label": label, "values": values} for label, values in self.series],
            "tones": self.tones,
        }


def bucket_head(bucket: BucketName) -> str:
    return BUCKET_LABELS[bucket].removesuffix("s")


def bucket_labels(edges: Sequence[datetime], bucket: BucketName) -> list[str]:
    is_one_day = (edges[-1].date() - edges[0].date()).days <= 1
    is_one_year = edges[0].year == edges[-2].year == timezone.localtime().year
    day = "j M" if is_one_year else "j M Y"

    def label(start: datetime, end: datetime) -> str:
        if bucket == "hour":
            return date_format(start, "H:i" if is_one_day else f"{day}, H:i")
        if bucket == "day":
            return date_format(start, f"D {day}")
        if bucket == "month":
            return date_format(start, "M Y")
        last = (end.astimezone(UTC) - timedelta(seconds=1)).astimezone(start.tzinfo)
        return f"{date_format(start, 'j M')} – {date_format(last, day)}"

    labels = [label(start, end) for start, end in pairwise(edges)]
    # When the clock is put back an hour comes twice, and only the zone tells the two apart.
    twice = {text for text in labels if bucket == "hour" and labels.count(text) > 1}
    return [f"{text} {start.tzname()}" if text in twice else text for text, start in zip(labels, edges, strict=False)]


def percent(permille: int | None) -> str:
    """One decimal, rounded down: only all is 100 %. A dash for None."""
    if permille is None:
        return "–"
    return f"{permille // 10} %" if permille % 10 == 0 else f"{permille // 10}.{permille % 10} %"


def number_or_dash(number: int | None) -> str:
    return "–" if number is None else f"{number:,}"
