from django.conf import settings
from django.core.serializers.json import DjangoJSONEncoder
from django.db import models
from django.db.models import F, Q, Value

from billing.pricing import TokenPools

from .fields import Provider, choices_constraint, created_at_field


class UsageStatus(models.TextChoices):
    RESERVED = "reserved", "Running"
    SUCCEEDED = "succeeded", "Succeeded"
    FAILED = "failed", "Failed"
    EXPIRED = "expired", "Expired"


class OperationType(models.TextChoices):
    GENERATION = "generation", "Draft"
    REFINEMENT = "refinement", "Refinement"
    REPURPOSE = "repurpose", "Repurposing"
    CHAT = "chat", "Chat"
    IMAGE = "image", "Image"
    PROMPT = "prompt", "Image prompt"


class ChargeType(models.TextChoices):
    MULTIPLIER = "multiplier", "Tokens × multiplier"
    FIXED = "fixed", "Fixed cost per image"


class TokenUsage(models.Model):
    """One AI operation: what was held for it, what the provider counted, what it cost its payer (`account`) and us.
    `user` is the person who acted (law 16): with a personal account its owner, with a team's one of its members."""

    Status = UsageStatus
    OperationType = OperationType
    ChargeType = ChargeType

    account = models.ForeignKey("billing.TokenAccount", on_delete=models.PROTECT, db_index=False)
    user = models.ForeignKey(settings.AUTH_USER_MODEL, on_delete=models.PROTECT, db_index=False)  # who acted
    # The key they acted with. Keys are never deleted once they may stand here.
    api_key = models.ForeignKey(
        "accounts.ApiKey", on_delete=models.PROTECT, null=True, blank=True, related_name="+", db_index=False
    )
    workspace = models.ForeignKey("accounts.Workspace", on_delete=models.PROTECT)

    status = models.CharField(max_length=10, choices=Status)
    operation_type = models.CharField(max_length=10, choices=OperationType)
    provider = models.CharField(max_length=20, choices=Provider)
    model = models.CharField(max_length=100)

    # Pools that do not overlap; reasoning is a part of output.
    input_tokens = models.BigIntegerField(db_default=0)
    cached_input_tokens = models.BigIntegerField(db_default=0)
    cache_write_tokens = models.BigIntegerField(db_default=0)
    output_tokens = models.BigIntegerField(db_default=0)
    reasoning_tokens = models.BigIntegerField(db_default=0)
    image_count = models.IntegerField(db_default=0)
    image_size = models.CharField(max_length=20, blank=True, db_default="")
    image_quality = models.CharField(max_length=20, blank=True, db_default="")

    actual_tokens = models.BigIntegerField("actual tokens (counted by the provider)", db_default=0)
    billable_tokens = models.BigIntegerField("billable tokens (charged to the user)", db_default=0)
    # The hold, which is the quote; empty when the usage was recorded after the fact.
    reserved_tokens = models.BigIntegerField(null=True, blank=True)
    # What of the hold lies on lots, which pay for it also after their end: {lot id: tokens}.
    lot_holds = models.JSONField(null=True, blank=True)
    unbilled_tokens = models.BigIntegerField("unbilled tokens (beyond the quote)", db_default=0)

    # Snapshots (law 11): what applied when the operation began.
    charge_type = models.CharField(max_length=10, choices=ChargeType)
    multiplier = models.DecimalField(max_digits=8, decimal_places=4, null=True, blank=True)
    fixed_cost_tokens = models.BigIntegerField("cost per image (tokens)", null=True, blank=True)

    provider_cost_microusd = models.BigIntegerField(db_default=0)
    is_estimated = models.BooleanField("counted by us, the provider sent no usage", db_default=False)
    is_free = models.BooleanField("billing was switched off, nothing was charged", db_default=False)
    error_message = models.TextField(blank=True, db_default="")
    duration_ms = models.BigIntegerField(null=True, blank=True)

    idempotency_key = models.CharField(max_length=200, null=True, blank=True)
    request_fingerprint = models.CharField(max_length=64, blank=True, db_default="")

    # Plain numbers: billing lies below the code that has projects, and its rows outlive them.
    project_id = models.BigIntegerField(null=True, blank=True)
    content_id = models.BigIntegerField(null=True, blank=True)
    chat_id = models.BigIntegerField(null=True, blank=True)
    metadata = models.JSONField(db_default=Value({}, models.JSONField()), blank=True, encoder=DjangoJSONEncoder)

    created_at = created_at_field()
    completed_at = models.DateTimeField(null=True, blank=True)
    expires_at = models.DateTimeField(null=True, blank=True)

    class Meta:
        verbose_name_plural = "token usage"
        indexes = [
            models.Index(fields=["account", "created_at", "user"], name="usage_by_account_and_time"),
            models.Index(fields=["created_at"], name="usage_by_time"),
            # For the roll-ups and what is newer than they are. Partial: a reservation pays nothing for it.
            models.Index(fields=["completed_at"], condition=Q(completed_at__isnull=False), name="usage_by_completion"),
            models.Index(fields=["project_id"], condition=Q(project_id__isnull=False), name="usage_by_project"),
            models.Index(fields=["content_id"], condition=Q(content_id__isnull=False), name="usage_by_content"),
            # Few rows at any time: the holds that the sweeper and the checks look at.
            models.Index(fields=["account", "expires_at"], condition=Q(status="reserved"), name="usage_open"),
        ]
        constraints = [
            models.UniqueConstraint(
                fields=["account", "idempotency_key"],
                condition=Q(idempotency_key__isnull=False),
                name="usage_once_per_idempotency_key",
            ),
            models.CheckConstraint(
                condition=Q(
                    input_tokens__gte=0,
                    cached_input_tokens__gte=0,
                    cache_write_tokens__gte=0,
                    output_tokens__gte=0,
                    reasoning_tokens__gte=0,
                    reasoning_tokens__lte=F("output_tokens"),
                    image_count__gte=0,
                    actual_tokens__gte=0,
                    billable_tokens__gte=0,
                    unbilled_tokens__gte=0,
                    provider_cost_microusd__gte=0,
                ),
                name="usage_counts_not_negative",
            ),
            models.CheckConstraint(
                condition=Q(reserved_tokens=None)
                | Q(reserved_tokens__gt=0, billable_tokens__lte=F("reserved_tokens"))
                | Q(is_free=True, reserved_tokens=0),
                name="usage_never_above_its_quote",
            ),
            models.CheckConstraint(
                condition=Q(is_free=False) | Q(billable_tokens=0, unbilled_tokens=0), name="usage_free_costs_nothing"
            ),
            models.CheckConstraint(
                condition=Q(status="succeeded") | Q(billable_tokens=0), name="usage_only_success_costs"
            ),
            models.CheckConstraint(
                condition=~Q(status="reserved") | Q(reserved_tokens__isnull=False, expires_at__isnull=False),
                name="usage_reservation_has_hold_and_expiry",
            ),
            models.CheckConstraint(
                condition=Q(charge_type="multiplier", multiplier__gt=0)
                | Q(charge_type="fixed", fixed_cost_tokens__gte=0),
                name="usage_charge_has_its_price",
            ),
            choices_constraint("status", UsageStatus, "usage_status_known"),
            choices_constraint("operation_type", OperationType, "usage_operation_known"),
            choices_constraint("provider", Provider, "usage_provider_known"),
        ]

    def __str__(self) -> str:
        return f"{self.get_operation_type_display()} #{self.pk} ({self.status})"

    @property
    def pools(self) -> TokenPools:
        return TokenPools(
            input_tokens=self.input_tokens,
            cached_input_tokens=self.cached_input_tokens,
            cache_write_tokens=self.cache_write_tokens,
            output_tokens=self.output_tokens,
            reasoning_tokens=self.reasoning_tokens,
        )
