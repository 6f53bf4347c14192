from collections.abc import Sequence
from datetime import datetime
from typing import Any

import django_tables2 as tables
from django.template.loader import render_to_string
from django_tables2.data import TableListData

from billing.models import TokenTransaction

RIGHT = {"th": {"class": "text-end"}, "td": {"class": "text-end"}}


class SortedRows(TableListData):
    """Rows that come in the order that the table says they are in."""

    def order_by(self, aliases: Any) -> None:
        pass


class TransactionTable(tables.Table):
    """The ledger as its owner reads it."""

    # Files, not code: a column compiles its own code anew for each cell.
    created_at = tables.Column("Date", attrs={"td": {"class": "text-nowrap"}}, initial_sort_descending=True)
    type = tables.TemplateColumn(template_name="billing/_type_badge.html")
    description = tables.TemplateColumn(template_name="billing/_description.html", orderable=False)
    amount = tables.TemplateColumn(
        template_name="billing/_amount.html", verbose_name="Tokens", attrs=RIGHT, initial_sort_descending=True
    )
    balance_before = tables.Column("Balance before", attrs=RIGHT, orderable=False)
    balance_after = tables.Column("Balance after", attrs=RIGHT, initial_sort_descending=True)

    def __init__(self, entries: Sequence[TokenTransaction], *, caption: str, **options: Any) -> None:
        self.caption = caption
        super().__init__(SortedRows(list(entries)), **options)

    class Meta:
        model = TokenTransaction
        fields = ("created_at", "type", "description", "amount", "balance_before", "balance_after")
        row_attrs = {"class": "entry"}

    def render_created_at(self, value: datetime) -> str:
        return render_to_string("_time.html", {"at": value})

    def render_balance_before(self, value: int) -> str:
        return f"{value:,}"

    def render_balance_after(self, value: int) -> str:
        return f"{value:,}"


class AccountLedgerTable(TransactionTable):
    """Somebody's ledger as admins read it: numbered, and with the way to the purchase."""

    sequence = tables.Column("No.", attrs=RIGHT, orderable=False)
    description = tables.TemplateColumn(template_name="dashboard/_entry_about.html", orderable=False)

    class Meta(TransactionTable.Meta):
        sequence = ("sequence", "...")
        row_attrs = {}  # on a phone, too, each entry has all its numbers with their names
