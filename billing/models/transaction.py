import pgtrigger
from django.conf import settings
from django.core.serializers.json import DjangoJSONEncoder
from django.db import models
from django.db.models import F, Q, Value

from .fields import Currency, choices_constraint, created_at_field
from .lot import TokenLot


class TransactionType(models.TextChoices):
    PURCHASE = "purchase", "Purchase"
    USAGE = "usage", "Usage"
    ADMIN_GRANT = "admin_grant", "Grant"
    ADMIN_DEDUCTION = "admin_deduction", "Deduction"
    REFUND = "refund", "Refund"
    BONUS = "bonus", "Bonus"
    AUTO_RECHARGE = "auto_recharge", "Auto-recharge"
    EXPIRY = "expiry", "Ended"


class TokenTransaction(models.Model):
    """The ledger: one row for every change of a balance, never changed, never deleted.

    Written by billing/ledger/ alone. Read it in the order of (account, `sequence`), not of time.
    """

    Type = TransactionType

    account = models.ForeignKey("billing.TokenAccount", on_delete=models.PROTECT, db_index=False)
    # Who acted, as its operation or purchase says: nobody where a team's account was charged or changed by itself. An
    # admin of the platform stands in `admin`.
    user = models.ForeignKey(settings.AUTH_USER_MODEL, on_delete=models.PROTECT, null=True, blank=True, db_index=False)
    api_key = models.ForeignKey(
        "accounts.ApiKey", on_delete=models.PROTECT, null=True, blank=True, related_name="+", db_index=False
    )
    workspace = models.ForeignKey("accounts.Workspace", on_delete=models.PROTECT)
    sequence = models.BigIntegerField("number within the account")

    type = models.CharField(max_length=15, choices=Type)
    amount = models.BigIntegerField("amount (tokens, signed)")
    # Which lots it moved and by how much: {lot id: signed tokens}. The rest of `amount` are plain tokens (law 14).
    lot_amounts = models.JSONField(null=True, blank=True)
    lot = models.ForeignKey(  # whose end this is
        "billing.TokenLot", on_delete=models.PROTECT, null=True, blank=True, related_name="expiries", db_index=False
    )
    balance_before = models.BigIntegerField()
    balance_after = models.BigIntegerField()

    usage = models.OneToOneField("billing.TokenUsage", on_delete=models.PROTECT, null=True, blank=True)
    purchase = models.ForeignKey(
        "billing.Purchase",
        on_delete=models.PROTECT,
        null=True,
        blank=True,
        related_name="transactions",
        db_index=False,
    )
    admin = models.ForeignKey(
        settings.AUTH_USER_MODEL,
        on_delete=models.PROTECT,
        null=True,
        blank=True,
        related_name="+",
        db_index=False,
    )
    paid_cents = models.BigIntegerField(null=True, blank=True)
    currency = models.CharField(max_length=3, choices=Currency, blank=True, db_default="")
    stripe_payment_intent_id = models.CharField(max_length=255, null=True, blank=True)

    idempotency_key = models.CharField(max_length=200, null=True, blank=True)
    request_fingerprint = models.CharField(max_length=64, blank=True, db_default="")
    description = models.CharField(max_length=500, blank=True, db_default="")
    metadata = models.JSONField(db_default=Value({}, models.JSONField()), blank=True, encoder=DjangoJSONEncoder)
    created_at = created_at_field()

    # The lots of `lot_amounts`, on entries of `billing.history.get_page`.
    moved_lots: "list[TokenLot]"

    CREDITS_FOR_MONEY = (Type.PURCHASE, Type.AUTO_RECHARGE)

    class Meta:
        indexes = [
            models.Index(fields=["account", "created_at"], name="ledger_by_account_and_time"),
            # Partial: debits, the many rows, name neither a payment nor a purchase and pay nothing for these.
            models.Index(
                fields=["stripe_payment_intent_id"],
                condition=Q(stripe_payment_intent_id__isnull=False),
                name="ledger_by_payment_intent",
            ),
            models.Index(fields=["purchase"], condition=Q(purchase__isnull=False), name="ledger_by_purchase"),
            # The few rows that are not usage: revenue, newest purchases and grants.
            models.Index(fields=["type", "created_at"], condition=~Q(type="usage"), name="ledger_by_type_and_time"),
            # The same few in one account: its history by type, and the totals of any part of it.
            models.Index(
                fields=["account", "type", "sequence"],
                include=["amount"],
                condition=~Q(type="usage"),
                name="ledger_other_than_usage",
            ),
        ]
        constraints = [
            models.UniqueConstraint(fields=["account", "sequence"], name="ledger_sequence_unique"),
            models.UniqueConstraint(
                fields=["account", "idempotency_key"],
                condition=Q(idempotency_key__isnull=False),
                name="ledger_once_per_idempotency_key",
            ),
            # Law 6: one credit per payment, for ever; by purchase too, since a payment of nothing has no intent.
            models.UniqueConstraint(
                fields=["stripe_payment_intent_id"],
                condition=Q(type__in=["purchase", "auto_recharge"], stripe_payment_intent_id__isnull=False),
                name="ledger_one_credit_per_payment_intent",
            ),
            models.UniqueConstraint(
                fields=["purchase"],
                condition=Q(type__in=["purchase", "auto_recharge"]),
                name="ledger_one_credit_per_purchase",
            ),
            models.UniqueConstraint(fields=["lot"], condition=Q(type="expiry"), name="ledger_one_expiry_per_lot"),
            models.CheckConstraint(
                condition=Q(type="expiry", lot__isnull=False) | (~Q(type="expiry") & Q(lot__isnull=True)),
                name="ledger_expiry_names_its_lot",
            ),
            models.CheckConstraint(
                condition=Q(balance_after=F("balance_before") + F("amount")), name="ledger_balance_adds_up"
            ),
            models.CheckConstraint(condition=~Q(amount=0), name="ledger_amount_not_zero"),
            models.CheckConstraint(condition=Q(sequence__gt=0), name="ledger_sequence_positive"),
            models.CheckConstraint(
                condition=Q(type__in=["purchase", "auto_recharge", "admin_grant", "bonus"], amount__gt=0)
                | Q(type__in=["usage", "admin_deduction", "expiry"], amount__lt=0)
                | Q(type="refund"),  # a clawback, or its reversal
                name="ledger_sign_fits_type",
            ),
            models.CheckConstraint(
                condition=~Q(type="usage") | Q(usage__isnull=False), name="ledger_usage_names_its_operation"
            ),
            models.CheckConstraint(condition=~Q(type="usage") | Q(user__isnull=False), name="ledger_usage_names_actor"),
            models.CheckConstraint(
                condition=~Q(type__in=["purchase", "auto_recharge", "refund"]) | Q(purchase__isnull=False),
                name="ledger_money_names_its_purchase",
            ),
            models.CheckConstraint(
                condition=~Q(type__in=["admin_grant", "admin_deduction"])
                | (Q(admin__isnull=False) & ~Q(description="")),
                name="ledger_admin_gives_reason",
            ),
            choices_constraint("type", TransactionType, "ledger_type_known"),
        ]
        triggers = [
            pgtrigger.Protect(name="append_only", operation=pgtrigger.Update | pgtrigger.Delete),
            pgtrigger.Trigger(
                name="never_truncated",
                level=pgtrigger.Statement,
                operation=pgtrigger.Truncate,
                when=pgtrigger.Before,
                func="RAISE EXCEPTION 'The ledger is append-only: cannot truncate %', TG_TABLE_NAME;",
            ),
        ]

    def __str__(self) -> str:
        return f"{self.get_type_display()} {self.amount:+,}"
