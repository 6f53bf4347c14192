from django.db import models

from .fields import choices_constraint, created_at_field


class StripeEventState(models.TextChoices):
    RECEIVED = "received", "Received"
    PROCESSED = "processed", "Processed"
    IGNORED = "ignored", "Of no concern to us"
    ASIDE = "aside", "Kept aside for a person"
    FAILED = "failed", "Failed, to be handled again"


class StripeEvent(models.Model):
    """The inbox: each of Stripe's events once, with what became of it."""

    State = StripeEventState

    event_id = models.CharField(max_length=255, unique=True)
    type = models.CharField(max_length=100)
    api_version = models.CharField(max_length=50, blank=True, default="")
    livemode = models.BooleanField()
    payload = models.JSONField()
    state = models.CharField(max_length=10, choices=State)
    message = models.TextField("what became of it", blank=True, default="")
    attempts = models.IntegerField(default=1)
    received_at = created_at_field()
    processed_at = models.DateTimeField(null=True, blank=True)

    class Meta:
        indexes = [models.Index(fields=["state", "received_at"], name="stripe_event_by_state")]
        constraints = [choices_constraint("state", StripeEventState, "stripe_event_state_known")]

    def __str__(self) -> str:
        return f"{self.type} {self.event_id}"
