import re
from decimal import Decimal
from typing import Any

import pgtrigger
from django.conf import settings
from django.core.exceptions import ValidationError
from django.db import models
from django.db.models import Q, Value

from .fields import Provider, choices_constraint, created_at_field


def _usd_per_million(**options: Any) -> models.DecimalField:
    return models.DecimalField(max_digits=12, decimal_places=6, **options)


# A part of a pool that has a price of its own, or a pool or part above a length of the context.
_SPECIAL = re.compile(
    r"(?:image_input|audio_input|cache_write_1h|audio_output"
    r"|(?:input|cached_input|cache_write|output|reasoning|image_input|audio_input|cache_write_1h|audio_output)"
    r"_above_[1-9][0-9]{2,8})"
)
_NAME = re.compile(r"[!-@\[-~]{1,100}")
_USD = re.compile(r"[0-9]{1,6}([.][0-9]{1,6})?")


def is_usd(value: Any) -> bool:
    """An amount above zero as text, which is exact: a number in JSON is a float."""
    return isinstance(value, str) and _USD.fullmatch(value) is not None and Decimal(value) > 0


def _is_above_zero(value: Any) -> bool:
    """Also of what a form has not accepted."""
    return isinstance(value, Decimal | int) and Decimal(value).is_finite() and value > 0


def validate_special_prices(prices: Any) -> None:
    """Raises ValidationError."""
    if not isinstance(prices, dict) or not all(
        isinstance(name, str) and _SPECIAL.fullmatch(name) and is_usd(usd) for name, usd in prices.items()
    ):
        raise ValidationError(
            'Enter USD per million tokens in quotes, above zero: {"audio_input": "1", "input_above_200000": "2.5"}.'
        )


NOT_FREE = "Enter a price above zero, or mark the model as one whose provider charges nothing."


class ModelKind(models.TextChoices):
    TEXT = "text", "Text"
    IMAGE = "image", "Images"


def validate_other_names(names: Any) -> None:
    """Raises ValidationError."""
    if (
        not isinstance(names, list)
        or not all(isinstance(name, str) and _NAME.fullmatch(name) for name in names)
        or len(set(names)) < len(names)
    ):
        raise ValidationError('Enter names as the API is called with, in small letters: ["luna", "gpt-6-luna-eu"].')


class ModelPrice(models.Model):
    """The catalogue: an AI model, what its provider charges us, and what is special about selling it.

    Prices are USD per million tokens, which is the same number as micro-dollars per token. Rows are written through
    `catalogue.create_model_price` and `catalogue.update_model_price`, which keep what each price was before.

    A price that is missing is never one of zero: without those that it is sold by, a model is not on offer.
    """

    Kind = ModelKind

    provider = models.CharField(max_length=20, choices=Provider)
    model = models.CharField("model, as the provider's API names it", max_length=100)
    display_name = models.CharField(max_length=100)
    other_names = models.JSONField(
        "other names, as those who record usage send them",
        db_default=Value([], models.JSONField()),
        default=list,
        blank=True,
        validators=[validate_other_names],
        help_text="Dated snapshots, -latest and the provider's own prefixes need none: gpt-6-luna-2026-09-01, "
        'openai/gpt-6-luna. Others: ["luna"].',
    )
    kind = models.CharField(max_length=5, choices=Kind)

    input_usd_per_million = _usd_per_million(default=0)
    cached_input_usd_per_million = _usd_per_million(
        null=True, blank=True, help_text="Empty: what is read from the cache costs what input costs."
    )
    cache_write_usd_per_million = _usd_per_million(
        null=True, blank=True, help_text="Empty: what is written to the cache costs what input costs."
    )
    output_usd_per_million = _usd_per_million(default=0)
    reasoning_usd_per_million = models.DecimalField(
        "reasoning usd per million, where it differs from output",
        max_digits=12,
        decimal_places=6,
        null=True,
        blank=True,
        help_text="Image models think in text, which is cheaper than the tokens of an image.",
    )
    # {"cache_write_1h": "4", "input_above_200000": "2.5"}: USD as text, since JSON's numbers are floats.
    special_usd_per_million = models.JSONField(
        "other usd per million",
        db_default=Value({}, models.JSONField()),
        default=dict,
        blank=True,
        validators=[validate_special_prices],
        help_text='Where the price differs: image_input, audio_input, cache_write_1h, audio_output; and any price "'
        '_above_" so many tokens read, which then counts for the whole call: {"input_above_200000": "2.5"}.',
    )
    request_usd = models.DecimalField(
        "what one call costs us besides (USD)", max_digits=12, decimal_places=6, default=0
    )
    image_usd = models.DecimalField(
        "what one image costs us (USD)",
        max_digits=12,
        decimal_places=6,
        default=0,
        help_text="Counts when the provider does not report the tokens that it used.",
    )
    # {"1024x1024/low": "0.006"}: USD as text, since JSON's numbers are floats.
    image_usd_by_size = models.JSONField(
        "what one image costs us, by size and quality (USD)",
        db_default=Value({}, models.JSONField()),
        default=dict,
        blank=True,
        help_text='Where the price differs: {"1024x1024/low": "0.006", "1536x1024": "0.041"}.',
    )

    max_input_tokens = models.IntegerField("most it reads at once (tokens)", default=128_000)
    max_output_tokens = models.IntegerField("most it writes at once, thinking included (tokens)", default=8_192)
    thinking_tokens = models.IntegerField(
        "room for thinking (tokens)",
        default=2_000,
        help_text="Held on top of the text, charged as far as it is used. 0 for a model that does not think.",
    )
    multiplier = models.DecimalField(
        "multiplier, instead of the settings'", max_digits=8, decimal_places=4, null=True, blank=True
    )
    # Also the sizes and qualities on offer; empty: every size, at the system settings' cost.
    image_cost_tokens = models.JSONField(
        "what one image costs the user (tokens)",
        db_default=Value({}, models.JSONField()),
        default=dict,
        blank=True,
        help_text='By size and quality, or by size alone: {"1024x1024/low": 1500, "1024x1024": 6000}.',
    )

    is_free = models.BooleanField(
        "its provider charges nothing",
        default=False,
        help_text="Without it a price of 0 is a missing one, and the model is not sold. People pay as for any model.",
    )
    is_active = models.BooleanField(default=True)
    sort_order = models.IntegerField(default=0)
    retired_on = models.DateField(null=True, blank=True, help_text="From this day on (UTC) the model is refused.")
    replacement = models.CharField("model to use instead", max_length=100, blank=True, default="")
    updated_at = models.DateTimeField(auto_now=True)

    class Meta:
        ordering = ("sort_order", "provider", "model")
        constraints = [
            models.UniqueConstraint(fields=["provider", "model"], name="model_price_once_per_model"),
            models.CheckConstraint(
                condition=Q(
                    input_usd_per_million__gte=0,
                    output_usd_per_million__gte=0,
                    image_usd__gte=0,
                    request_usd__gte=0,
                    max_output_tokens__gt=0,
                )
                & (Q(multiplier=None) | Q(multiplier__gt=0))
                & (Q(reasoning_usd_per_million=None) | Q(reasoning_usd_per_million__gte=0)),
                name="model_price_numbers_sane",
            ),
            models.CheckConstraint(
                condition=Q(is_active=False)
                | Q(is_free=True)
                | (
                    (
                        Q(kind=ModelKind.TEXT, input_usd_per_million__gt=0, output_usd_per_million__gt=0)
                        | (Q(kind=ModelKind.IMAGE) & (Q(image_usd__gt=0) | ~Q(image_usd_by_size={})))
                    )
                    & (Q(cached_input_usd_per_million=None) | Q(cached_input_usd_per_million__gt=0))
                    & (Q(cache_write_usd_per_million=None) | Q(cache_write_usd_per_million__gt=0))
                    & (Q(reasoning_usd_per_million=None) | Q(reasoning_usd_per_million__gt=0))
                ),
                name="model_price_sold_at_a_price",
                violation_error_message="Enter a price above zero.",
            ),
            models.CheckConstraint(
                condition=(Q(cached_input_usd_per_million=None) | Q(cached_input_usd_per_million__gte=0))
                & (Q(cache_write_usd_per_million=None) | Q(cache_write_usd_per_million__gte=0)),
                name="model_price_cache_sane",
            ),
            models.CheckConstraint(
                condition=Q(max_input_tokens__gt=0, thinking_tokens__gte=0), name="model_price_limits_sane"
            ),
            choices_constraint("provider", Provider, "model_price_provider_known"),
            choices_constraint("kind", ModelKind, "model_price_kind_known"),
        ]

    def __str__(self) -> str:
        return self.display_name

    def clean(self) -> None:
        super().clean()
        if taken := self._taken_names():
            raise ValidationError({"other_names": f"Another model has {', '.join(taken)}."})
        if missing := self.missing_prices:
            raise ValidationError(dict.fromkeys(missing, NOT_FREE))

    def _taken_names(self) -> list[str]:
        own = [self.model, *self.other_names] if isinstance(self.other_names, list) else [self.model]
        others = ModelPrice.objects.filter(provider=self.provider).exclude(pk=self.pk)
        taken = {name for model, names in others.values_list("model", "other_names") for name in (model, *names)}
        return sorted(name for name in taken if name in own)

    @property
    def missing_prices(self) -> list[str]:
        """The fields without which the model would be had for nothing. None for a model that superadmins call free.

        What is zero or below is missing, unless the field may be empty and is.
        """
        if self.is_free:
            return []
        if self.kind == ModelKind.TEXT:
            needed = ["input_usd_per_million", "output_usd_per_million"]
        else:
            needed = [] if self.image_usd_by_size else ["image_usd"]
        optional = ("cached_input_usd_per_million", "cache_write_usd_per_million", "reasoning_usd_per_million")
        needed += [name for name in optional if getattr(self, name) is not None]
        return [name for name in needed if not _is_above_zero(getattr(self, name))]


class PriceChangeSource(models.TextChoices):
    ADMIN = "admin", "Django admin"
    IMPORT = "import", "Import of a price list"
    UPGRADE = "upgrade", "Upgrade of the product"


class ModelPriceChange(models.Model):
    """Which field of a model's prices changed, from which value to which, when and by whom. Never changed or deleted.

    The value at a past moment is the `new_value` of the last change before it, else the `old_value` of the first one
    after it, else the price of today. Values are text: "2.5", "" where there was none, JSON with its keys in order.
    """

    Source = PriceChangeSource

    price = models.ForeignKey(ModelPrice, on_delete=models.PROTECT, related_name="changes")
    field = models.CharField(max_length=50)
    old_value = models.TextField(blank=True)
    new_value = models.TextField(blank=True)
    changed_by = models.ForeignKey(
        settings.AUTH_USER_MODEL, on_delete=models.PROTECT, null=True, blank=True, related_name="+"
    )
    source = models.CharField(max_length=10, choices=PriceChangeSource)
    changed_at = created_at_field()

    class Meta:
        ordering = ("-id",)
        constraints = [choices_constraint("source", PriceChangeSource, "price_change_source_known")]
        triggers = [pgtrigger.Protect(name="append_only", operation=pgtrigger.Update | pgtrigger.Delete)]

    def __str__(self) -> str:
        return f"{self.field}: {self.old_value or '–'} → {self.new_value or '–'}"
