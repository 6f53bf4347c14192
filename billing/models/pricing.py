from django.core.exceptions import ValidationError
from django.db import models
from django.db.models import Q, Value

from .fields import created_at_field
from .system_settings import SystemSettings

MOST_TOKENS_FOR_THE_MONEY = 10  # times what the exchange rate gives: beyond a discount, and what a mistyped zero makes


class TokenPricing(models.Model):
    """A package: a number of tokens at a price."""

    name = models.CharField(max_length=100)
    tokens = models.BigIntegerField()
    price_usd_cents = models.BigIntegerField()
    price_eur_cents = models.BigIntegerField(null=True, blank=True)
    price_gbp_cents = models.BigIntegerField(null=True, blank=True)
    description = models.CharField(max_length=300, blank=True, db_default="")
    features = models.JSONField(db_default=Value([], models.JSONField()), blank=True, default=list)
    is_popular = models.BooleanField(db_default=False, default=False)
    is_active = models.BooleanField(db_default=True, default=True)
    sort_order = models.IntegerField(db_default=0, default=0)
    stripe_price_id_usd = models.CharField(max_length=255, blank=True, db_default="", default="")
    stripe_price_id_eur = models.CharField(max_length=255, blank=True, db_default="", default="")
    stripe_price_id_gbp = models.CharField(max_length=255, blank=True, db_default="", default="")
    created_at = created_at_field()
    updated_at = models.DateTimeField(auto_now=True)

    class Meta:
        verbose_name = "package"
        ordering = ("sort_order", "id")
        indexes = [
            models.Index(fields=["is_active"], name="package_by_active"),
            models.Index(fields=["sort_order"], name="package_by_sort_order"),
        ]
        constraints = [
            models.CheckConstraint(
                condition=Q(tokens__gt=0, price_usd_cents__gt=0)
                & (Q(price_eur_cents=None) | Q(price_eur_cents__gt=0))
                & (Q(price_gbp_cents=None) | Q(price_gbp_cents__gt=0)),
                name="package_sells_something_for_something",
            ),
        ]

    def __str__(self) -> str:
        return self.name

    def clean(self) -> None:
        """Where a grant may need two superadmins, one alone puts no grant on sale for next to nothing."""
        numbers = [self.tokens, self.price_usd_cents, self.price_eur_cents, self.price_gbp_cents]
        before = TokenPricing.objects.filter(pk=self.pk)
        if before.values_list("tokens", "price_usd_cents", "price_eur_cents", "price_gbp_cents").first() == (*numbers,):
            return
        settings = SystemSettings.objects.filter(key="global", grant_approval_tokens__isnull=False).first()
        are_numbers = all(type(number) is int for number in numbers if number is not None)
        if settings is None or None in numbers[:2] or not are_numbers:
            return  # what is missing or no number is said of the fields themselves
        cheapest_cents = min(price for price in numbers[1:] if price is not None)
        if self.tokens * 100 > cheapest_cents * settings.tokens_per_usd * MOST_TOKENS_FOR_THE_MONEY:
            words = (
                f"More than {MOST_TOKENS_FOR_THE_MONEY} times what the settings give for that price (tokens per USD)."
            )
            raise ValidationError({"tokens": words})

    def price_cents(self, currency: str) -> int | None:
        """The price in cents of `currency`, None when the package is not sold in it."""
        return {"usd": self.price_usd_cents, "eur": self.price_eur_cents, "gbp": self.price_gbp_cents}.get(currency)

    def stripe_price_id(self, currency: str) -> str:
        """Stripe's own price for `currency`, empty when the price is given inline."""
        return {
            "usd": self.stripe_price_id_usd,
            "eur": self.stripe_price_id_eur,
            "gbp": self.stripe_price_id_gbp,
        }.get(currency, "")
