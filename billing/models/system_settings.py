from decimal import Decimal

from django.conf import settings
from django.db import models
from django.db.models import Q

from .fields import choices_constraint, created_at_field

MAX_BONUS_DAYS = 3_650


class DisposableBonus(models.TextChoices):
    """What becomes of the welcome bonus of somebody whose addresses are all disposable."""

    WAIT = "wait", "An admin gives it"
    NONE = "none", "There is none"
    GIVE = "give", "It is given"


class SystemSettings(models.Model):
    """What applies to the whole installation: one row, `key="global"`. The defaults are the product's."""

    key = models.CharField(max_length=20, unique=True, default="global", editable=False)
    billing_enabled = models.BooleanField(
        "charge for operations",
        default=True,
        help_text="Switched off, AI operations run and are recorded, and cost nothing.",
    )
    token_multiplier = models.DecimalField(max_digits=8, decimal_places=4, default=Decimal("1.5"))
    dalle3_cost_tokens = models.BigIntegerField("DALL-E 3 (tokens per image)", default=6_000)
    dalle2_cost_tokens = models.BigIntegerField("DALL-E 2 (tokens per image)", default=3_000)
    imagen_cost_tokens = models.BigIntegerField("Imagen (tokens per image)", default=4_500)
    tokens_per_usd = models.DecimalField(max_digits=14, decimal_places=4, default=Decimal(10_000))
    minimum_purchase_cents = models.BigIntegerField("minimum purchase (cents)", default=500)
    welcome_bonus_tokens = models.BigIntegerField(default=10_000)
    welcome_bonus_disposable = models.CharField(
        "the bonus for disposable addresses", max_length=4, choices=DisposableBonus, default=DisposableBonus.WAIT
    )
    welcome_bonus_days = models.IntegerField(
        "the welcome bonus ends after (days)", null=True, blank=True, default=None, help_text="Empty: it never ends."
    )
    low_balance_tokens = models.BigIntegerField("low balance up to (tokens)", default=1_000)
    critical_balance_tokens = models.BigIntegerField("critical balance below (tokens)", default=100)
    admin_grant_limit_tokens = models.BigIntegerField(
        "grants of an admin without approval (tokens)",
        default=0,
        help_text="Together in 24 hours, for each admin. 0: every grant of an admin waits for a superadmin.",
    )
    grant_approval_tokens = models.BigIntegerField(
        "a second superadmin approves above (tokens)",
        null=True,
        blank=True,
        default=None,
        help_text="More tokens in 24 hours, by one superadmin or for one person, need two. Empty: one is enough.",
    )
    updated_at = models.DateTimeField(auto_now=True)

    class Meta:
        verbose_name = verbose_name_plural = "system settings"
        constraints = [
            models.CheckConstraint(condition=Q(key="global"), name="settings_one_row"),
            choices_constraint("welcome_bonus_disposable", DisposableBonus, "settings_disposable_bonus_known"),
            models.CheckConstraint(
                condition=Q(welcome_bonus_days=None) | Q(welcome_bonus_days__range=(1, MAX_BONUS_DAYS)),
                name="settings_bonus_days_sane",
            ),
            models.CheckConstraint(
                condition=Q(
                    token_multiplier__gt=0,
                    dalle3_cost_tokens__gte=0,
                    dalle2_cost_tokens__gte=0,
                    imagen_cost_tokens__gte=0,
                    tokens_per_usd__gt=0,
                    minimum_purchase_cents__gt=0,
                    welcome_bonus_tokens__gte=0,
                    critical_balance_tokens__gte=0,
                    low_balance_tokens__gte=models.F("critical_balance_tokens"),
                    admin_grant_limit_tokens__gte=0,
                )
                & (Q(grant_approval_tokens=None) | Q(grant_approval_tokens__gte=0)),
                name="settings_numbers_sane",
            ),
        ]

    def __str__(self) -> str:
        return "System settings"


class SettingChange(models.Model):
    """Who changed which setting, from which value to which, and when."""

    field = models.CharField(max_length=50)
    old_value = models.CharField(max_length=100)
    new_value = models.CharField(max_length=100)
    changed_by = models.ForeignKey(settings.AUTH_USER_MODEL, on_delete=models.PROTECT, related_name="+")
    changed_at = created_at_field()

    class Meta:
        ordering = ("-id",)

    def __str__(self) -> str:
        return f"{self.field}: {self.old_value} → {self.new_value}"
