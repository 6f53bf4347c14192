"""What the history can be narrowed to, from the query of an address."""

from functools import cached_property

from django import forms
from django.http import QueryDict

from billing import history
from billing.models import TokenTransaction
from kit import periods

DEFAULT_PERIOD = "all"


class TransactionFilter(forms.Form):
    """`is_valid()` first. `selection` is then the part of the user's ledger that was asked for."""

    type = forms.MultipleChoiceField(
        choices=TokenTransaction.Type.choices, required=False, widget=forms.CheckboxSelectMultiple
    )
    search = forms.CharField(
        label="Search in the description",
        max_length=100,
        required=False,
        widget=forms.TextInput(attrs={"type": "search", "autocomplete": "off"}),
    )

    def __init__(self, query: QueryDict, *, account_id: int) -> None:
        super().__init__(query)
        self.account_id = account_id
        self.period_error = ""
        self.period = periods.preset_period(DEFAULT_PERIOD)
        try:
            self.period = periods.read_period(query, default=DEFAULT_PERIOD)
        except periods.InvalidPeriod as error:
            self.period_error = error.message

    def is_valid(self) -> bool:
        return super().is_valid() and not self.period_error

    @property
    def is_narrowed(self) -> bool:
        """Whether less than everything was asked for."""
        return self.period.preset != DEFAULT_PERIOD or any(self.cleaned_data.values())

    @cached_property
    def selection(self) -> history.Selection:
        return history.select_transactions(
            account_id=self.account_id,
            types=self.cleaned_data["type"],
            since=self.period.since,
            until=self.period.until,
            search=self.cleaned_data["search"],
        )
