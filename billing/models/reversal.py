from django.conf import settings
from django.db import models
from django.db.models import Q

from billing.pricing import display_price

from .fields import Currency, choices_constraint, created_at_field


class ReversalKind(models.TextChoices):
    REFUND = "refund", "Refund"
    DISPUTE = "dispute", "Dispute"


class PaymentReversal(models.Model):
    """Money of a payment that went back to the buyer, or that their bank disputes: one row per refund or dispute.

    It is a picture of what Stripe says. What is taken back from the balance follows from all rows of a payment at
    once (billing/payments/refunds.py), so neither order nor repetition of Stripe's events matters.
    """

    Kind = ReversalKind

    # Stripe's own words for the state in which the money is, or may be, gone from us; they count where Stripe does not
    # say what it has moved (`withdrawn_cents`).
    TAKING_STATUSES = {
        ReversalKind.REFUND: ("pending", "requires_action", "succeeded"),
        ReversalKind.DISPUTE: ("needs_response", "under_review", "lost"),
    }
    # Our own words for a refund that a superadmin asked for and Stripe has not confirmed, or has refused. Until Stripe
    # gives it an id, the row has one of ours.
    REQUESTED, REFUSED = "requested", "refused"
    REQUEST_PREFIX = "requested-"
    # What is over, as far as anybody knows. Stripe may open it again: then it is asked how it stands now.
    FINAL_STATUSES = ("failed", "canceled", "won", "lost", "warning_closed", "prevented")
    DECIDED_STATUSES = ("won", "lost")  # of a dispute; the money may move later

    kind = models.CharField(max_length=10, choices=Kind)
    stripe_id = models.CharField(max_length=255, unique=True)
    stripe_payment_intent_id = models.CharField(max_length=255, db_index=True)
    # Empty while the credit has not come yet: a refund's event can be quicker than the payment's.
    purchase = models.ForeignKey(
        "billing.Purchase", on_delete=models.PROTECT, null=True, blank=True, related_name="reversals"
    )
    amount_cents = models.BigIntegerField()
    withdrawn_cents = models.BigIntegerField(
        "withdrawn by Stripe and not reinstated (cents); empty: its status tells", null=True, blank=True
    )
    bookings = models.SmallIntegerField("bookings at Stripe that say so", default=0, db_default=0)
    currency = models.CharField(max_length=3, choices=Currency)
    status = models.CharField("status at Stripe", max_length=30)
    reason = models.CharField(max_length=500, blank=True, default="")
    requested_by = models.ForeignKey(
        settings.AUTH_USER_MODEL, on_delete=models.PROTECT, null=True, blank=True, related_name="+"
    )
    request_key = models.CharField(
        "key of the form that asked for it", max_length=100, unique=True, null=True, blank=True
    )
    installation = models.CharField("whose key it has at Stripe", max_length=20, blank=True, default="", db_default="")
    created_at = created_at_field()
    updated_at = models.DateTimeField(auto_now=True)

    class Meta:
        constraints = [
            models.CheckConstraint(condition=Q(amount_cents__gt=0), name="reversal_amount_positive"),
            models.CheckConstraint(
                condition=Q(withdrawn_cents=None) | Q(withdrawn_cents__gte=0), name="reversal_withdrawn_not_negative"
            ),
            choices_constraint("kind", ReversalKind, "reversal_kind_known"),
        ]

    def __str__(self) -> str:
        return f"{self.get_kind_display()} {self.stripe_id}: {self.status}"

    @property
    def amount_display(self) -> str:
        return display_price(self.amount_cents, self.currency)

    @property
    def taken_display(self) -> str:
        return display_price(self.taken_cents, self.currency)

    @property
    def status_display(self) -> str:
        return self.status.replace("_", " ").capitalize()

    @property
    def taken_cents(self) -> int:
        """What of the payment is gone from us by it, in its own currency: the money decides, not the state's name."""
        if self.withdrawn_cents is not None:
            return self.withdrawn_cents
        return self.amount_cents if self.status in self.TAKING_STATUSES[ReversalKind(self.kind)] else 0

    @property
    def takes_money(self) -> bool:
        return self.taken_cents > 0

    @classmethod
    def which_take_money(cls) -> Q:
        """The same as `takes_money`, for queries."""
        by_status = Q()
        for kind, statuses in cls.TAKING_STATUSES.items():
            by_status |= Q(kind=kind, status__in=statuses)
        return Q(withdrawn_cents__gt=0) | (Q(withdrawn_cents=None) & by_status)
