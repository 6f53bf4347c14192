from django.conf import settings
from django.core.serializers.json import DjangoJSONEncoder
from django.db import models
from django.db.models import F, Q, Value

from billing.pricing import display_price
from kit import database

from .fields import Currency, choices_constraint, created_at_field
from .installation import stripe_key


class PurchaseKind(models.TextChoices):
    CHECKOUT = "checkout", "Checkout"
    AUTO_RECHARGE = "auto_recharge", "Auto-recharge"


class PurchaseState(models.TextChoices):
    CREATED = "created", "Being prepared"  # Stripe has not answered yet
    OPEN = "open", "Waiting for payment"
    PROCESSING = "processing", "Payment under way"  # a delayed method: the money is not there yet
    ACTION_REQUIRED = "action_required", "Needs your confirmation"  # the bank wants to see the card's owner
    PAID = "paid", "Paid"
    FAILED = "failed", "Failed"
    EXPIRED = "expired", "Expired"
    REVIEW = "review", "Under review"  # paid, but not what was agreed: nothing is credited


class Purchase(models.Model):
    """One attempt to pay for tokens.

    The row is committed before Stripe is called. Tokens, amount and currency are a snapshot: they decide what is
    credited, whatever happens to the package meanwhile (laws 6 and 11). The key for Stripe comes from the row.
    """

    Kind = PurchaseKind
    State = PurchaseState

    UNPAID_STATES = (State.CREATED, State.OPEN)
    PENDING_STATES = (*UNPAID_STATES, State.PROCESSING, State.ACTION_REQUIRED)

    account = models.ForeignKey("billing.TokenAccount", on_delete=models.PROTECT, related_name="purchases")
    # Who bought it; nobody where a team's card was charged by auto-recharge.
    user = models.ForeignKey(
        settings.AUTH_USER_MODEL, on_delete=models.PROTECT, null=True, blank=True, related_name="purchases"
    )
    workspace = models.ForeignKey("accounts.Workspace", on_delete=models.PROTECT, related_name="+")
    kind = models.CharField(max_length=15, choices=Kind)
    state = models.CharField(max_length=15, choices=State, default=State.CREATED)

    package = models.ForeignKey("billing.TokenPricing", on_delete=models.PROTECT, null=True, related_name="+")
    package_name = models.CharField(max_length=100)
    tokens = models.BigIntegerField()
    amount_cents = models.BigIntegerField()
    currency = models.CharField(max_length=3, choices=Currency)
    discount_cents = models.BigIntegerField("taken off the price by promotion codes", default=0)
    charged_cents = models.BigIntegerField("what the payment took, with tax and promotions", null=True, blank=True)
    tax_cents = models.BigIntegerField("tax in what the payment took", default=0, db_default=0)
    stripe_price_id = models.CharField(max_length=255, blank=True, default="")
    # How it was paid, as its receipt says: Stripe's word for the kind, and of a card what is shown of it.
    payment_method_type = models.CharField(max_length=50, blank=True, default="", db_default="")
    card_brand = models.CharField(max_length=30, blank=True, default="", db_default="")
    card_last4 = models.CharField(max_length=4, blank=True, default="", db_default="")
    # The number's, whatever id it was saved under. A distrusted one is charged by itself for nobody.
    card_fingerprint = models.CharField(max_length=64, blank=True, default="", db_default="")
    is_card_distrusted = models.BooleanField(
        "its bank or a dispute says that the card's owner knows nothing of it", default=False, db_default=False
    )
    # What a team's buyer wrote at the payment, for its receipt.
    buyer_name = models.CharField("company", max_length=200, blank=True, default="", db_default="")
    buyer_address = models.CharField(max_length=500, blank=True, default="", db_default="")
    buyer_tax_ids = models.CharField("tax numbers", max_length=200, blank=True, default="", db_default="")
    # A series without gaps, in the order of the credits.
    receipt_number = models.BigIntegerField(unique=True, null=True, blank=True)

    # Its idempotency keys at Stripe: whose row it is, and how often they were given up for new ones.
    installation = models.CharField(max_length=20, blank=True, default="", db_default="")
    stripe_tries = models.SmallIntegerField(default=0, db_default=0)
    # What its payment page was made with, a snapshot as the price is; empty: an earlier release did not keep it.
    checkout_options = models.JSONField(null=True, blank=True)

    checkout_key = models.CharField("key of the form that asked for it", max_length=200, null=True, blank=True)
    stripe_session_id = models.CharField(max_length=255, unique=True, null=True, blank=True)
    stripe_payment_intent_id = models.CharField(max_length=255, unique=True, null=True, blank=True)
    checkout_url = models.TextField(blank=True, default="")
    receipt_url = models.TextField(blank=True, default="")
    failure_code = models.CharField("Stripe's code of a decline", max_length=100, blank=True, default="")
    message = models.CharField("why it failed or is under review", max_length=500, blank=True, default="")
    metadata = models.JSONField(db_default=Value({}, models.JSONField()), blank=True, encoder=DjangoJSONEncoder)

    created_at = created_at_field()
    expires_at = models.DateTimeField(null=True, blank=True)
    checked_at = models.DateTimeField("when Stripe was last asked about it", null=True, blank=True)
    paid_at = models.DateTimeField(null=True, blank=True)

    class Meta:
        indexes = [
            models.Index(fields=["state", "created_at"], name="purchase_by_state_and_time"),
            models.Index(fields=["user", "created_at"], name="purchase_by_user_and_time"),
            models.Index(
                fields=["card_fingerprint"], condition=Q(is_card_distrusted=True), name="purchase_distrusted_cards"
            ),
        ]
        constraints = [
            models.CheckConstraint(condition=Q(tokens__gt=0, amount_cents__gt=0), name="purchase_amounts_positive"),
            models.CheckConstraint(
                condition=(Q(charged_cents=None) | Q(charged_cents__gt=0))
                & Q(discount_cents__gte=0, discount_cents__lte=F("amount_cents"), tax_cents__gte=0),
                name="purchase_charged_sane",
            ),
            models.UniqueConstraint(
                fields=["account", "checkout_key"],
                condition=Q(checkout_key__isnull=False),
                name="purchase_once_per_form",
            ),
            # A double click on Buy opens one checkout.
            models.UniqueConstraint(
                fields=["account", "package"],
                condition=Q(kind="checkout", state__in=["created", "open"], package__isnull=False),
                name="purchase_one_open_checkout_per_package",
            ),
            # Law 13.
            models.UniqueConstraint(
                fields=["account"],
                condition=Q(kind="auto_recharge", state__in=["created", "open", "processing", "action_required"]),
                name="purchase_one_auto_recharge_under_way",
            ),
            models.CheckConstraint(
                condition=~Q(state="paid") | Q(paid_at__isnull=False), name="purchase_paid_has_time"
            ),
            models.CheckConstraint(
                condition=Q(kind="auto_recharge") | Q(user__isnull=False), name="purchase_names_its_buyer"
            ),
            choices_constraint("kind", PurchaseKind, "purchase_kind_known"),
            choices_constraint("state", PurchaseState, "purchase_state_known"),
            choices_constraint("currency", Currency, "purchase_currency_known"),
        ]

    def __str__(self) -> str:
        return f"{self.package_name}: {self.tokens:,} tokens for {self.price_display}"

    def stripe_key(self, what: str, *parts: object) -> str:
        """The idempotency key under which `what` is done for it at Stripe."""
        return stripe_key(self.installation, what, self.pk, self.stripe_tries or "", *parts)

    @property
    def price_display(self) -> str:
        return display_price(self.amount_cents, self.currency)

    @property
    def revenue_cents(self) -> int:
        """What the sale brings us: the price less discounts, without tax, in the price or on top of it."""
        return self.price_after_discount_cents - self.included_tax_cents

    @property
    def price_after_discount_cents(self) -> int:
        return self.amount_cents - self.discount_cents

    @property
    def included_tax_cents(self) -> int:
        """The tax that the price includes: what the payment took of it was not added to the price."""
        added_cents = self.paid_total_cents - self.price_after_discount_cents
        return max(0, min(self.tax_cents, self.tax_cents - added_cents))

    @property
    def paid_total_cents(self) -> int:
        """What the buyer paid in the end: refunds and disputes are parts of it."""
        return self.amount_cents if self.charged_cents is None else self.charged_cents

    @property
    def amount_may_differ(self) -> bool:
        """Whether what its payment takes may differ from the price, by tax or a promotion code: then only its session
        tells. Asked of what its page was made with, not of today's settings."""
        if self.kind != self.Kind.CHECKOUT:
            return False
        return self.checkout_options is None or bool({"automatic_tax", "promotion_codes"} & {*self.checkout_options})

    @property
    def returned_display(self) -> str:
        """What became of its money since, in a word or two, for its buyer; empty while all of it is with us."""
        gone = [each for each in self.reversals.all() if each.takes_money]
        if not gone:
            return ""
        if any(each.kind == "dispute" for each in gone):
            return "Disputed"
        is_all = sum(each.taken_cents for each in gone) >= self.paid_total_cents
        return "Refunded" if is_all else "Partly refunded"

    @property
    def paid_display(self) -> str:
        """What the buyer paid in the end, for people; zero where a promotion code took it all."""
        return self.money(self.price_after_discount_cents if self.charged_cents is None else self.charged_cents)

    @property
    def may_be_paid(self) -> bool:
        """Whether Stripe may still take money for it: giving it up here does not close its page there."""
        return self.is_pending or (
            self.state == self.State.EXPIRED and self.expires_at is not None and self.expires_at > database.now()
        )

    @classmethod
    def which_page_is_left(cls) -> Q:
        """Given up here, but not closed at Stripe, as far as we know: it can be paid until it is, or until its end."""
        return Q(state=cls.State.EXPIRED, expires_at__gt=database.now())

    def money(self, cents: int) -> str:
        """An amount in the purchase's currency, for people."""
        return display_price(cents, self.currency)

    @property
    def is_pending(self) -> bool:
        return self.state in self.PENDING_STATES
