from datetime import timedelta

from django.conf import settings
from django.db import models
from django.db.models import F, Q, Value
from django.db.models.expressions import Case, Func, When
from django.db.models.functions import Coalesce
from django.utils import timezone

from billing.pricing import display_price
from kit import database

from .fields import ClockTimestamp, Currency, choices_constraint, created_at_field
from .lot import LotBalance

ENDING_SOON = timedelta(days=7)


class AccountStatus(models.TextChoices):
    ACTIVE = "active", "Active"
    SUSPENDED = "suspended", "Suspended"  # by a debt, or by a superadmin
    BLOCKED = "blocked", "Blocked"


class WithheldBonus(models.TextChoices):
    """Why an account got no welcome bonus when it was asked for."""

    GIVEN_BEFORE = "given_before", "Given before to this mailbox"  # for good
    WAITS = "waits", "Waits for an admin: a disposable address"
    DISPOSABLE = "disposable", "None for a disposable address"


CLOCKS_DIFFER_AT_MOST = timedelta(hours=1)

# `TokenAccount.available`, for queries.
AVAILABLE_TOKENS = (
    F("balance")
    - F("reserved")
    - Coalesce(
        Case(
            When(
                next_lot_ends_at__lte=ClockTimestamp(),
                then=Func(
                    F("lots"), ClockTimestamp(), function="billing_ended_tokens", output_field=models.BigIntegerField()
                ),
            )
        ),
        0,
    )
)


class TokenAccount(models.Model):
    """The prepaid tokens of a workspace: a person's own, or a team's.

    `balance`, `reserved`, `sequence`, the lifetime totals and a debt's status are written by billing/ledger/ alone
    (law 1).
    """

    Status = AccountStatus

    # The `status_reason` of a suspension that lifts itself once the debt is paid (law 12).
    DEBT = "debt"
    # The `status_reason` of an account that is blocked for ever, since nobody knows any more whose it was.
    ANONYMISED = "anonymised"
    # Of a team's account that was closed with it.
    CLOSED = "closed with its team"

    # Who may buy, themselves or by auto-recharge: a person's block or suspension ends it, a debt is paid by it.
    MAY_BUY = Q(status=AccountStatus.ACTIVE) | Q(status=AccountStatus.SUSPENDED, status_reason=DEBT)

    # Whose personal one it is; a team's is nobody's.
    user = models.OneToOneField(
        settings.AUTH_USER_MODEL, on_delete=models.PROTECT, null=True, blank=True, related_name="token_account"
    )
    workspace = models.ForeignKey(
        "accounts.Workspace", on_delete=models.PROTECT, related_name="token_accounts", db_index=False
    )

    balance = models.BigIntegerField("balance (tokens)", db_default=0)
    reserved = models.BigIntegerField("reserved (tokens)", db_default=0)
    sequence = models.BigIntegerField("number of ledger rows", db_default=0)

    # Lots that have something left, in the order of spending (see migration 0026), and when the first of them ends.
    # They stand here since a debit, which has locked this row, can trust nothing else to be of this moment.
    lots = models.JSONField(null=True, blank=True, editable=False)
    next_lot_ends_at = models.DateTimeField(null=True, blank=True, editable=False)

    lifetime_purchased_tokens = models.BigIntegerField(db_default=0)
    lifetime_granted_tokens = models.BigIntegerField("lifetime granted tokens (grants and bonuses)", db_default=0)
    lifetime_used_tokens = models.BigIntegerField(db_default=0)
    lifetime_spent_cents = models.BigIntegerField(db_default=0)
    currency = models.CharField(max_length=3, choices=Currency, db_default=Currency.USD)

    status = models.CharField(max_length=10, choices=Status, db_default=Status.ACTIVE)
    status_reason = models.CharField(max_length=200, blank=True, db_default="")
    status_changed_at = models.DateTimeField(null=True, blank=True)

    stripe_customer_id = models.CharField(max_length=255, unique=True, null=True, blank=True)
    # How often the key under which the customer is made was given up, and what Stripe was last told of its owner.
    stripe_customer_tries = models.SmallIntegerField(db_default=0)
    stripe_email = models.CharField("e-mail address that Stripe knows", max_length=254, blank=True, db_default="")
    stripe_name = models.CharField("name that Stripe knows", max_length=150, blank=True, db_default="")
    billing_email = models.EmailField("where a team's receipts go", blank=True, db_default="", default="")
    # All that were ever made for it, once its owner has gone and until Stripe has deleted them.
    stripe_customers_left = models.JSONField(db_default=Value([], models.JSONField()), blank=True, default=list)
    stripe_payment_method_id = models.CharField(max_length=255, blank=True, db_default="")
    card_brand = models.CharField(max_length=30, blank=True, db_default="")
    card_last4 = models.CharField(max_length=4, blank=True, db_default="")
    # The same for the same number, under whatever id it is saved; empty: kept by an earlier release.
    card_fingerprint = models.CharField(max_length=64, blank=True, db_default="")

    auto_recharge_enabled = models.BooleanField(db_default=False)
    auto_recharge_threshold_tokens = models.BigIntegerField(db_default=1_000)
    auto_recharge_package = models.ForeignKey(
        "billing.TokenPricing", on_delete=models.PROTECT, null=True, blank=True, related_name="+"
    )
    # What the owner agreed to when they saved the settings: it is never bought for more, nor with fewer tokens.
    auto_recharge_price_cents = models.BigIntegerField(null=True, blank=True)
    auto_recharge_package_tokens = models.BigIntegerField(null=True, blank=True)
    auto_recharge_monthly_cap_cents = models.BigIntegerField(null=True, blank=True)
    # Declines in a row, and when the next attempt may be made after one.
    auto_recharge_failures = models.SmallIntegerField(db_default=0)
    auto_recharge_retry_at = models.DateTimeField(null=True, blank=True)
    auto_recharge_last_outcome = models.CharField(max_length=200, blank=True, db_default="")

    # Empty: the bonus was given, or nothing has been decided; the ledger knows which.
    bonus_withheld = models.CharField(
        "no welcome bonus", max_length=12, choices=WithheldBonus, blank=True, db_default=""
    )

    created_at = created_at_field()

    class Meta:
        indexes = [
            models.Index(fields=["status"], name="account_by_status"),
            # The few accounts that the auto-recharge sweep looks at.
            models.Index(fields=["id"], condition=Q(auto_recharge_enabled=True), name="account_auto_recharging"),
            models.Index(
                fields=["next_lot_ends_at"],
                condition=Q(next_lot_ends_at__isnull=False),
                name="account_by_next_lot_end",
            ),
            models.Index(fields=["id"], condition=Q(bonus_withheld=WithheldBonus.WAITS), name="account_bonus_waits"),
        ]
        constraints = [
            models.UniqueConstraint(fields=["workspace"], name="account_one_per_workspace"),
            models.CheckConstraint(condition=Q(reserved__gte=0), name="account_reserved_not_negative"),
            models.CheckConstraint(
                # A debt suspends the account: an active one can never have promised more than it owns.
                condition=Q(balance__gte=F("reserved")) | ~Q(status="active"),
                name="account_active_without_debt",
            ),
            models.CheckConstraint(
                condition=Q(sequence__gte=0, auto_recharge_threshold_tokens__gte=0)
                & (Q(auto_recharge_monthly_cap_cents=None) | Q(auto_recharge_monthly_cap_cents__gt=0)),
                name="account_numbers_sane",
            ),
            models.CheckConstraint(
                condition=Q(auto_recharge_enabled=False) | Q(auto_recharge_package__isnull=False),
                name="account_auto_recharge_names_package",
            ),
            models.CheckConstraint(  # law 14
                condition=Func(
                    F("lots"), F("balance"), function="billing_lots_are_sound", output_field=models.BooleanField()
                ),
                name="account_lots_are_sound",
            ),
            models.CheckConstraint(
                condition=Q(lots__isnull=True, next_lot_ends_at__isnull=True)
                | Q(lots__isnull=False, next_lot_ends_at__isnull=False),
                name="account_lots_have_an_end",
            ),
            choices_constraint("status", AccountStatus, "account_status_known"),
            choices_constraint("currency", Currency, "account_currency_known"),
            models.CheckConstraint(
                condition=Q(bonus_withheld__in=["", *WithheldBonus.values]), name="account_bonus_withheld_known"
            ),
        ]

    def __str__(self) -> str:
        return f"{self.holder}: {self.balance:,} tokens"

    @property
    def holder(self) -> str:
        """Whose it is, for people: the person's address, or the team's name."""
        return str(self.user or self.workspace)

    @property
    def receipts_email(self) -> str:
        """Where Stripe sends its receipts; empty: its page asks for an address."""
        return self.user.email if self.user else self.billing_email

    @property
    def name(self) -> str:
        """What its holder is called, where an address has no place."""
        return self.user.name if self.user else self.workspace.name

    def may_operate(self, *, is_free: bool = False) -> bool:
        """Whether a new operation may start. A debt holds up only what costs something."""
        return self.status == self.Status.ACTIVE or (is_free and self.has_debt)

    @property
    def may_buy(self) -> bool:
        """The same as `MAY_BUY`, of this row."""
        return self.status == self.Status.ACTIVE or self.has_debt

    @property
    def available(self) -> int:
        """Tokens that a new operation may reserve; negative while there is a debt.

        Those of a lot that has ended are none of them, also before that is booked (law 15). Whose lots may have ended
        costs a look at the database's clock.
        """
        return self.balance - self.reserved - self.ended_tokens

    @property
    def ended_tokens(self) -> int:
        """What is left of ended lots and nothing held can claim: still in the balance until the sweep books it."""
        if self.next_lot_ends_at is None or self.next_lot_ends_at > timezone.now() + CLOCKS_DIFFER_AT_MOST:
            return 0
        now = database.now()
        ended = (lot for lot in self.lot_balances if lot.expires_at <= now)
        return sum(max(0, lot.remaining_tokens - lot.held_tokens) for lot in ended)

    @property
    def lot_balances(self) -> list[LotBalance]:
        """The lots with something left, in the order of spending; ended ones, too, until that is booked."""
        return [LotBalance.of(lot) for lot in self.lots or []]

    @property
    def live_lots(self) -> list[LotBalance]:
        """The lots that can still be spent, in the order of spending. Costs a look at the clock where there are any."""
        lots = self.lot_balances
        now = database.now() if lots else None
        return [lot for lot in lots if now and lot.expires_at > now]

    @property
    def ending_soon_tokens(self) -> int:
        """What is left of lots that end within a week, and nothing holds."""
        lots = self.live_lots
        soon = database.now() + ENDING_SOON if lots else None
        return sum(lot.remaining_tokens - lot.held_tokens for lot in lots if soon and lot.expires_at <= soon)

    @property
    def plain_tokens(self) -> int:
        """Tokens of the balance that are in no lot; negative while there is a debt."""
        return self.balance - sum(lot.remaining_tokens for lot in self.lot_balances)

    @property
    def mark(self) -> str:
        """Another one whenever a page that shows the balance, or the ledger's end, is out of date."""
        return f"{self.sequence}/{self.reserved}/{self.status}"

    @property
    def auto_recharge_terms(self) -> str:
        """What auto-recharge may buy for how much, for people; empty when nothing was agreed."""
        if self.auto_recharge_price_cents is None or self.auto_recharge_package_tokens is None:
            return ""
        price = display_price(self.auto_recharge_price_cents, self.currency)
        return f"{self.auto_recharge_package_tokens:,} tokens for {price}"

    @property
    def has_debt(self) -> bool:
        return self.status == self.Status.SUSPENDED and self.status_reason == self.DEBT
