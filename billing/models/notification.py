from django.conf import settings
from django.db import models
from django.db.models import Q, Value

from .fields import created_at_field


class NotificationKind(models.TextChoices):
    PURCHASE_CONFIRMED = "purchase_confirmed", "A purchase was paid"
    REFUND_APPLIED = "refund_applied", "A payment was refunded"
    REFUND_FAILED = "refund_failed", "A refund did not go through"
    REFUND_REFUSED = "refund_refused", "A refund that you asked for was refused"
    DISPUTE_OPENED = "dispute_opened", "A payment was disputed"
    DISPUTE_CLOSED = "dispute_closed", "A dispute was decided"
    AUTO_RECHARGE_SUCCEEDED = "auto_recharge_succeeded", "Auto-recharge bought tokens"
    AUTO_RECHARGE_FAILED = "auto_recharge_failed", "An auto-recharge payment failed"
    AUTO_RECHARGE_NEEDS_CONFIRMATION = "auto_recharge_needs_confirmation", "The bank wants a payment confirmed"
    AUTO_RECHARGE_SWITCHED_OFF = "auto_recharge_switched_off", "Auto-recharge was switched off"
    AUTO_RECHARGE_SWITCHED_ON = "auto_recharge_switched_on", "Auto-recharge was switched on or changed"
    SAVED_CARD_CHANGED = "saved_card_changed", "Your saved card was replaced"
    LOW_BALANCE = "low_balance", "The balance is running low"
    CRITICAL_BALANCE = "critical_balance", "The balance is almost used up"
    GRANT_RECEIVED = "grant_received", "Somebody gave you tokens"
    TOKENS_DEDUCTED = "tokens_deducted", "Tokens were taken from your balance"
    ACCOUNT_STATUS_CHANGED = "account_status_changed", "Your account was suspended, blocked or reopened"
    PROVIDER_REFUSES_US = "provider_refuses_us", "An AI provider does not accept our access"
    WEEKLY_SUMMARY = "weekly_summary", "The weekly summary of the whole product"


Kind = NotificationKind

GOOD_NEWS = (Kind.PURCHASE_CONFIRMED, Kind.AUTO_RECHARGE_SUCCEEDED, Kind.GRANT_RECEIVED)
WARNINGS = (
    Kind.AUTO_RECHARGE_FAILED,
    Kind.AUTO_RECHARGE_SWITCHED_OFF,
    Kind.AUTO_RECHARGE_NEEDS_CONFIRMATION,
    Kind.LOW_BALANCE,
    Kind.REFUND_REFUSED,
    Kind.PROVIDER_REFUSES_US,
    Kind.DISPUTE_OPENED,
    Kind.TOKENS_DEDUCTED,
    Kind.ACCOUNT_STATUS_CHANGED,
)


class NotificationPreference(models.Model):
    """That a user wants no e-mail of a kind. Without a row they get it; in the product it is always shown."""

    user = models.ForeignKey(
        settings.AUTH_USER_MODEL, on_delete=models.CASCADE, related_name="notification_preferences"
    )
    kind = models.CharField(max_length=50, choices=NotificationKind)
    wants_email = models.BooleanField()

    class Meta:
        constraints = [models.UniqueConstraint(fields=["user", "kind"], name="notification_preference_once")]

    def __str__(self) -> str:
        return f"{self.kind}: {self.wants_email}"


class Notification(models.Model):
    """A message to a user: shown in the product, and the outbox of its e-mail. The key says it only once.

    An e-mail waits for as long as `email_next_at` is set. Wanted, not sent and no longer waiting: given up.
    """

    Kind = NotificationKind

    user = models.ForeignKey(settings.AUTH_USER_MODEL, on_delete=models.CASCADE, related_name="notifications")
    kind = models.CharField(max_length=50, choices=NotificationKind)
    key = models.CharField("unique per user: the event it tells of", max_length=200)
    title = models.CharField(max_length=200)
    body = models.TextField(blank=True, default="")
    link = models.CharField(max_length=300, blank=True, default="")
    # What the e-mail says beyond title and body: facts, the words on its button, a second link.
    context = models.JSONField(db_default=Value({}, models.JSONField()), default=dict, blank=True)
    created_at = created_at_field()
    read_at = models.DateTimeField(null=True, blank=True)
    email_wanted = models.BooleanField(default=True)
    email_sent_at = models.DateTimeField(null=True, blank=True)
    email_attempts = models.IntegerField(default=0)
    email_next_at = models.DateTimeField("when the e-mail is tried next", null=True, blank=True)
    email_error = models.CharField("why the last attempt failed", max_length=500, blank=True, db_default="")

    class Meta:
        indexes = [
            models.Index(fields=["user", "-id"], name="notification_by_user"),
            # The few rows that the header of every page counts, and that the outbox looks for every ten seconds.
            models.Index(fields=["user"], condition=Q(read_at=None), name="notification_unread"),
            models.Index(
                fields=["email_next_at"], condition=Q(email_next_at__isnull=False), name="notification_outbox"
            ),
        ]
        constraints = [models.UniqueConstraint(fields=["user", "key"], name="notification_said_once")]

    def __str__(self) -> str:
        return self.title

    @property
    def tone(self) -> str:
        """How it looks on a page: ok, warn, bad or info."""
        if self.kind == Kind.CRITICAL_BALANCE:
            return "bad"
        if self.kind in GOOD_NEWS:
            return "ok"
        return "warn" if self.kind in WARNINGS else "info"

    @property
    def email_state(self) -> str:
        if self.email_sent_at:
            return "sent"
        if not self.email_wanted:
            return "not wanted"
        return "waiting" if self.email_next_at else "given up"
