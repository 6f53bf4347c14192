"""A section of the dashboard as a PDF, to print or to pass on."""

import re
from html import unescape
from typing import TYPE_CHECKING

from django.template.loader import render_to_string
from django.utils import timezone

from billing.dashboard.content import Content
from billing.figures import business
from billing.usage.charts import Table

if TYPE_CHECKING:
    from kit.pdf import Document

MAX_PRINTED_COLUMNS = 10  # of numbers side by side; the others follow below


def render_report(*, name: str, title: str, about: str, content: Content) -> bytes:
    """The section `name` as a PDF, in the time zone that is current now. `about` is its period in words."""
    from kit.pdf import GREY, Document  # half a second, for those alone who print

    written_at = timezone.localtime()
    title = f"Dashboard: {title}"
    pdf = Document(title=title, subtitle=title, written_at=written_at, orientation="landscape")
    pdf.fact("Period", about)
    pdf.fact("Time zone", timezone.get_current_timezone_name())
    pdf.fact("Written on", f"{written_at:%Y-%m-%d %H:%M}")
    pdf.rule()
    for words in (content.problem, content.empty):
        if words:
            pdf.text_line(words, size=10, height=6)
    if content.figures:
        befores = [figure.before.text if figure.before else "" for figure in content.figures]
        rows = [
            [figure.label, figure.now.text, before] for figure, before in zip(content.figures, befores, strict=True)
        ]
        # Only where something is compared there is a column for it.
        columns = 3 if any(befores) else 2
        pdf.table_of(["Figure", "Value", "Before"][:columns], [row[:columns] for row in rows])
    for data in content.data_tables:
        pdf.ln(6)
        pdf.text_line(data.title, size=11, height=8, style="B")
        if data.note:
            pdf.text_line(data.note, size=9, height=6, colour=GREY)
        if data.rows:
            _print_table(pdf, data.table)
    pdf.ln(8)
    pdf.text_line("How this is calculated", size=11, height=8, style="B")
    for term, words in _definitions(name):
        pdf.text_line(f"{term}: {words}", size=8, height=5, colour=GREY)
    return bytes(pdf.output())


def _print_table(pdf: "Document", table: Table) -> None:
    """Below each other what is too wide for the paper, each part with the names of the rows."""
    for first in range(1, max(len(table.headers), 2), MAX_PRINTED_COLUMNS):
        part = slice(first, first + MAX_PRINTED_COLUMNS)
        if first > 1:
            pdf.ln(3)
        pdf.table_of(
            [table.headers[0], *table.headers[part]], [[str(row[0]), *map(str, row[part])] for row in table.rows]
        )


def _definitions(name: str) -> list[tuple[str, str]]:
    """Each term and its meaning, as the page has them."""
    context = {"section": {"name": name}, "timed_operations": business.MAX_TIMED_OPERATIONS}
    found = re.findall(
        r"<dt>(.*?)</dt>\s*<dd>(.*?)</dd>", render_to_string("dashboard/_definitions.html", context), re.DOTALL
    )
    return [(unescape(term), " ".join(unescape(words).split())) for term, words in found]
