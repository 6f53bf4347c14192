"""Tables in templates, all of the same markup (templates/_table.html): cards on phones, with roles that these keep.

    {% load tables %}
    {% table purchase in purchases labelledby="purchases-title" %}
      {% column "Date" %}{% include "_time.html" with at=purchase.created_at %}
      {% column "Tokens" class="num" %}{{ purchase.tokens|intcomma }}
      {% column "Resolution" if=user.is_superadmin %}…
    {% endtable %}

`{% numbers %}` writes one whose columns are data: what a chart shows, or a price list.
"""

from collections.abc import Sequence
from typing import Any, Protocol

from django import template
from django.template.base import FilterExpression, NodeList, Parser, Token, token_kwargs
from django.template.loader import get_template

register = template.Library()

TEMPLATE = "_table.html"


class Node(template.Node):
    def __init__(
        self,
        names: list[str],
        rows: FilterExpression,
        options: dict[str, FilterExpression],
        columns: list[tuple[FilterExpression, dict[str, FilterExpression], NodeList]],
    ) -> None:
        self.names, self.rows, self.options, self.columns = names, rows, options, columns

    def render(self, context: template.Context) -> str:
        options = {name: value.resolve(context) for name, value in self.options.items()}
        columns = []
        for header, values, cell in self.columns:
            column = {name: value.resolve(context) for name, value in values.items()}
            if column.get("if", True):
                classes = f"{column.get('class', '')} {column.get('cell', '')}".strip()
                columns.append(column | {"header": header.resolve(context), "content": cell, "cell": classes})
                if options.get("order") and "sort" in column:
                    columns[-1] |= _sorting(column["sort"], options["order"])
        rows = []
        for row in self.rows.resolve(context):
            parts = zip(self.names, row, strict=True) if len(self.names) > 1 else [(self.names[0], row)]
            with context.push(**dict(parts)):
                rows.append((row, [(column, column["content"].render(context)) for column in columns]))
        with context.push(table=options | {"stacks": True, "columns": columns, "rows": rows}):
            return get_template(TEMPLATE).template.render(context)  # type: ignore[attr-defined]


def _sorting(sort: str, order: str) -> dict[str, str]:
    """Which way a column is sorted now ("" if by another), and what a click on its header asks for."""
    name, way = sort.lstrip("-"), ""
    if order.lstrip("-") == name:
        way, sort = ("descending", name) if order.startswith("-") else ("ascending", f"-{name}")
    return {"name": name, "way": way, "next_order": sort}


@register.tag
def table(parser: Parser, token: Token) -> Node:
    """`{% table row in rows … %}`, with names for the parts of a row as in `for`; then its columns.

    Of the table: `label` or `labelledby` (an id) says what it is. `row_class` is of each row; `anchor` gives each one
    the id "anchor-pk". With `order` (how it is sorted) and `target` (the id of the region that a click exchanges)
    headers sort.

    Of a column: `class` is of its header and its cells, `cell` of the cells alone; `label` stands before the cell on
    phones, in place of the header; `hidden` headers are heard alone; `if` says whether the column is there; `sort` is
    the order that a first click asks for.
    """
    bits = token.split_contents()[1:]
    at = bits.index("in")
    names = "".join(bits[:at]).split(",")
    rows, options = parser.compile_filter(bits[at + 1]), token_kwargs(bits[at + 2 :], parser)
    columns = []
    parser.parse(("column",))
    while (part := parser.next_token()).contents != "endtable":
        header, *values = part.split_contents()[1:]
        content = parser.parse(("column", "endtable"))
        columns.append((parser.compile_filter(header), token_kwargs(values, parser), content))
    return Node(names, rows, options, columns)


class Numbers(Protocol):
    """Rows of text with a header for each column; the first cell of a row is its head."""

    @property
    def headers(self) -> Sequence[str]: ...
    @property
    def rows(self) -> Sequence[Sequence[str]]: ...


@register.inclusion_tag(TEMPLATE)
def numbers(table: Numbers, *, caption: str, scrolls: bool = False, wide: bool = False) -> dict[str, Any]:
    """A long one `scrolls` within a height of its own, a `wide` one sideways on phones; others become cards there."""
    columns = [
        {"header": header, "class": "num" if place else "", "cell": "num", "heads": not place}
        for place, header in enumerate(table.headers)
    ]
    rows = [(row, list(zip(columns, row, strict=True))) for row in table.rows]
    options = {"label": f"{caption}: numbers", "caption": caption, "stacks": not (scrolls or wide), "scrolls": scrolls}
    return {"table": options | {"columns": columns, "rows": rows}}
