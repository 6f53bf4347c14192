import pgtrigger
from django.conf import settings
from django.db import models
from django.db.models import Q, Value

from .fields import Provider, choices_constraint, created_at_field


def _usd_per_million() -> models.DecimalField:
    return models.DecimalField(max_digits=12, decimal_places=6, default=0)


class ModelKind(models.TextChoices):
    TEXT = "text", "Text"
    IMAGE = "image", "Images"


class ModelPrice(models.Model):
    """The catalogue: an AI model, what its provider charges us, and what is special about selling it.

    Prices are USD per million tokens, which is the same number as micro-dollars per token. Rows are written through
    `catalogue.create_model_price` and `catalogue.update_model_price`, which keep what each price was before.
    """

    Kind = ModelKind

    provider = models.CharField(max_length=20, choices=Provider)
    model = models.CharField("model, as the provider's API names it", max_length=100)
    display_name = models.CharField(max_length=100)
    kind = models.CharField(max_length=5, choices=Kind)

    input_usd_per_million = _usd_per_million()
    cached_input_usd_per_million = _usd_per_million()
    cache_write_usd_per_million = _usd_per_million()
    output_usd_per_million = _usd_per_million()
    reasoning_usd_per_million = models.DecimalField(
        "reasoning usd per million, where it differs from output",
        max_digits=12,
        decimal_places=6,
        null=True,
        blank=True,
        help_text="Image models think in text, which is cheaper than the tokens of an image.",
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
                    cached_input_usd_per_million__gte=0,
                    cache_write_usd_per_million__gte=0,
                    output_usd_per_million__gte=0,
                    image_usd__gte=0,
                    max_output_tokens__gt=0,
                )
                & (Q(multiplier=None) | Q(multiplier__gt=0))
                & (Q(reasoning_usd_per_million=None) | Q(reasoning_usd_per_million__gte=0)),
                name="model_price_numbers_sane",
            ),
            models.CheckConstraint(
                condition=Q(max_input_tokens__gt=0, thinking_tokens__gte=0), name="model_price_limits_sane"
            ),
            choices_constraint("provider", Provider, "model_price_provider_known"),
            choices_constraint("kind", ModelKind, "model_price_kind_known"),
        ]

    def __str__(self) -> str:
        return self.display_name


class PriceChangeSource(models.TextChoices):
    ADMIN = "admin", "Django admin"
    IMPORT = "import", "Import of a price list"


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
