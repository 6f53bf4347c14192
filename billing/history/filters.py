"""What the history can be narrowed to, from the query of an address."""

from functools import cached_property

import django_filters
from django import forms
from django.db.models import QuerySet
from django.http import QueryDict

from billing import history
from billing.models import TokenTransaction
from kit import periods

DEFAULT_PERIOD = "all"


class TransactionFilter(django_filters.FilterSet):
    """`is_valid()` first. `selection` is then the part of the user's ledger that was asked for, `qs` its entries."""

    type = django_filters.MultipleChoiceFilter(
        choices=TokenTransaction.Type.choices, label="Type", widget=forms.CheckboxSelectMultiple
    )
    search = django_filters.CharFilter(
        label="Search in the description",
        max_length=100,
        widget=forms.TextInput(attrs={"type": "search", "autocomplete": "off"}),
    )

    class Meta:
        model = TokenTransaction
        fields: list[str] = []

    def __init__(self, query: QueryDict, *, user_id: int) -> None:
        super().__init__(query, queryset=TokenTransaction.objects.none())
        self.is_bound = True  # also by an address without a query
        self.user_id = user_id
        self.period_error = ""
        self.period = periods.preset_period(DEFAULT_PERIOD)
        try:
            self.period = periods.read_period(query, default=DEFAULT_PERIOD)
        except periods.InvalidPeriod as error:
            self.period_error = error.message

    def is_valid(self) -> bool:
        return bool(super().is_valid()) and not self.period_error

    @property
    def is_narrowed(self) -> bool:
        """Whether anything was asked for but everything."""
        return self.period.preset != DEFAULT_PERIOD or any(self.form.cleaned_data.values())

    @cached_property
    def selection(self) -> history.Selection:
        return history.select_transactions(
            user_id=self.user_id,
            types=self.form.cleaned_data["type"],
            since=self.period.since,
            until=self.period.until,
            search=self.form.cleaned_data["search"],
        )

    def filter_queryset(self, queryset: QuerySet[TokenTransaction]) -> QuerySet[TokenTransaction]:
        return self.selection.entries
