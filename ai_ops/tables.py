from collections.abc import Mapping, Sequence

import django_tables2 as tables

from billing.models import TokenUsage


class UsageTable(tables.Table):
    """A person's operations, newest first."""

    caption = "Usage log"
    htmx_target = "usage-log"

    created_at = tables.TemplateColumn('{% include "_time.html" with at=value %}', verbose_name="Date")
    operation_type = tables.TemplateColumn(
        """<a href="{% url 'tokens:usage-entry' record.pk %}">{{ record.get_operation_type_display }}</a>""",
        verbose_name="Operation",
    )
    model = tables.Column(attrs={"td": {"class": "usage-model"}})
    status = tables.TemplateColumn('{% include "billing/_usage_status.html" with usage=record %}')
    price = tables.TemplateColumn(
        '{% include "ai_ops/_price_arithmetic.html" with usage=record %}',
        verbose_name="Price",
        empty_values=(),
        attrs={"td": {"class": "usage-price"}},
    )
    billable_tokens = tables.TemplateColumn(
        "{% load humanize %}{{ value|intcomma }}",
        verbose_name="Tokens",
        attrs={"th": {"class": "text-end"}, "td": {"class": "text-end"}},
    )

    class Meta:
        model = TokenUsage
        fields = ("created_at", "operation_type", "model", "status", "price", "billable_tokens")
        orderable = False
        empty_text = "No operations with these filters."

    def __init__(self, rows: Sequence[TokenUsage], *, model_names: Mapping[tuple[str, str], str]) -> None:
        super().__init__(rows)
        self.model_names = model_names

    def render_model(self, record: TokenUsage) -> str:
        return self.model_names.get((record.provider, record.model), record.model)
