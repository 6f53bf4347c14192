"""A person's own part of the books: what they can download, and what of it names them and is erased."""

from collections.abc import Iterator
from typing import Any

import structlog
from django.db.models import Q
from django.utils import timezone

from accounts.models import User
from billing import ledger
from billing.ledger import welcome
from billing.models import (
    Notification,
    NotificationPreference,
    PaymentReversal,
    Purchase,
    TokenAccount,
    TokenLot,
    TokenTransaction,
    TokenUsage,
)
from billing.payments import customers, gateway, purchases
from kit.on_commit import enqueue_on_commit
from kit.refusal import Refusal

logger = structlog.get_logger(__name__)

State = Purchase.State
Row = dict[str, Any]

ACCOUNT_FIELDS = (
    "status", "status_reason", "status_changed_at", "balance", "reserved", "currency", "lifetime_purchased_tokens",
    "lifetime_granted_tokens", "lifetime_used_tokens", "lifetime_spent_cents", "card_brand", "card_last4",
    "stripe_customer_id", "auto_recharge_enabled", "auto_recharge_threshold_tokens", "auto_recharge_package__name",
    "auto_recharge_price_cents", "auto_recharge_package_tokens", "auto_recharge_monthly_cap_cents",
    "auto_recharge_last_outcome", "bonus_withheld", "created_at",
)  # fmt: skip
ENTRY_FIELDS = (
    "sequence", "created_at", "type", "amount", "balance_before", "balance_after", "description", "usage_id",
    "purchase_id", "paid_cents", "currency", "stripe_payment_intent_id", "lot_amounts", "metadata",
)  # fmt: skip
LOT_FIELDS = ("id", "kind", "tokens", "expires_at", "created_at")
USAGE_FIELDS = (
    "id", "created_at", "completed_at", "status", "operation_type", "provider", "model", "input_tokens",
    "cached_input_tokens", "cache_write_tokens", "output_tokens", "reasoning_tokens", "image_count", "image_size",
    "image_quality", "actual_tokens", "billable_tokens", "reserved_tokens", "charge_type", "multiplier",
    "fixed_cost_tokens", "is_estimated", "is_free", "error_message", "duration_ms", "project_id", "content_id",
    "chat_id", "metadata",
)  # fmt: skip
PURCHASE_FIELDS = (
    "id", "created_at", "paid_at", "kind", "state", "package_name", "tokens", "amount_cents", "currency",
    "discount_cents", "charged_cents", "tax_cents", "payment_method_type", "card_brand", "card_last4", "receipt_number",
    "stripe_payment_intent_id", "receipt_url", "message",
)  # fmt: skip
REVERSAL_FIELDS = ("purchase_id", "kind", "status", "amount_cents", "currency", "created_at", "updated_at")
NOTIFICATION_FIELDS = ("created_at", "kind", "title", "body", "link", "read_at", "email_sent_at")


class NotNow(Refusal):
    """Nothing was changed. `message` tells the person what has to end first."""

    http_status = 409


# --- To take along --------------------------------------------------------------------------------------------------


def describe_account(user: User) -> Row:
    """The token account, and which messages its owner wants no e-mail about."""
    return {
        **TokenAccount.objects.filter(user=user).values(*ACCOUNT_FIELDS).get(),
        "muted_emails": list(
            NotificationPreference.objects.filter(user=user, wants_email=False)
            .order_by("kind")
            .values_list("kind", flat=True)
        ),
    }


def list_tables(user: User) -> dict[str, tuple[tuple[str, ...], Iterator[Row]]]:
    """The rows that are the user's: by table, its columns and its rows in order. Never all of them in memory."""
    tables = {
        "ledger": (TokenTransaction.objects.filter(account__user=user).order_by("sequence"), ENTRY_FIELDS),
        "tokens-with-an-end": (TokenLot.objects.filter(account__user=user).order_by("id"), LOT_FIELDS),
        "usage": (TokenUsage.objects.filter(account__user=user).order_by("created_at", "id"), USAGE_FIELDS),
        "team-usage": (
            TokenUsage.objects.filter(user=user, account__workspace__memberships__user=user).order_by("id"),
            USAGE_FIELDS,
        ),
        "purchases": (Purchase.objects.filter(account__user=user).order_by("id"), PURCHASE_FIELDS),
        "refunds-and-disputes": (PaymentReversal.objects.filter(purchase__user=user).order_by("id"), REVERSAL_FIELDS),
        "notifications": (Notification.objects.filter(user=user).order_by("id"), NOTIFICATION_FIELDS),
    }
    return {name: (fields, rows.values(*fields).iterator(2_000)) for name, (rows, fields) in tables.items()}


# --- Anonymising ----------------------------------------------------------------------------------------------------


def close_open_checkouts(*, user_id: int) -> None:
    """Close the payment pages that nobody has paid on, at Stripe and here, so that none is paid later: also those that
    were given up here when Stripe could not be told.

    Calls Stripe: never inside a transaction (law 7). Raises NotNow when one may have been paid, or cannot be closed.
    """
    open_ones = Purchase.objects.filter(
        Q(state__in=Purchase.UNPAID_STATES) | Purchase.which_page_is_left(),
        account__user_id=user_id,
        kind=Purchase.Kind.CHECKOUT,
    )
    for purchase in open_ones:
        if purchase.stripe_session_id is None:
            # Nobody was sent to a page that Stripe may have made: nobody can pay on it.
            Purchase.objects.filter(pk=purchase.pk, state=State.CREATED, stripe_session_id=None).update(
                state=State.EXPIRED, message="Given up by the buyer."
            )
            continue
        try:
            purchases.close_checkout(purchase)
        except (gateway.GatewayError, purchases.PurchaseError) as error:
            logger.warning("A checkout was not closed", purchase_id=purchase.pk, error=error.__cause__ or error)
            raise NotNow(
                "A payment page of yours is still open, and Stripe could not be reached to close it. "
                "Try again in a few minutes."
            ) from error


def find_customers(*, user_id: int) -> None:
    """Note which customers at Stripe are theirs, also those that no row names any more: they are deleted after the
    commit. Calls Stripe: never inside a transaction (law 7). Raises NotNow."""
    try:
        customers.find_customers(TokenAccount.objects.select_related("user").get(user_id=user_id))
    except gateway.GatewayError as error:
        logger.warning("Customers were not looked up", user_id=user_id, error=error.__cause__ or error)
        raise NotNow(
            "Stripe could not be reached to look up what it keeps of you. Try again in a few minutes."
        ) from error


def anonymize_account(account: TokenAccount) -> None:
    """Take the person out of the locked account, and close it for ever. In the caller's transaction.

    The ledger stays as it is (law 3), and so does the balance: nobody can spend it any more. What Stripe knows is
    deleted after the commit, by `customers.erase_customers`. Raises NotNow while operations run or a payment is under
    way.
    """
    if TokenUsage.objects.filter(account=account, status=TokenUsage.Status.RESERVED).exists():
        raise NotNow("An operation of yours is still running. Wait until it has ended, ten minutes at the most.")
    unsettled = Q(state__in=(*Purchase.PENDING_STATES, State.REVIEW)) | Purchase.which_page_is_left()
    if Purchase.objects.filter(unsettled, account=account).exists():
        raise NotNow(
            "A payment of yours is under way. Wait until it has come through or failed; Tokens, History shows it."
        )
    if account.user and ledger.has_had_bonus(account):
        welcome.remember(account.user.proven_addresses)  # while somebody still knows them
    # No debt's status is touched by this: a blocked account stays blocked whatever its balance does (law 12).
    TokenAccount.objects.filter(pk=account.pk).update(
        status=TokenAccount.Status.BLOCKED,
        status_reason=TokenAccount.ANONYMISED,
        status_changed_at=timezone.now(),
        stripe_payment_method_id="",
        stripe_email="",
        stripe_name="",
        card_brand="",
        card_last4="",
        card_fingerprint="",
        auto_recharge_enabled=False,
        auto_recharge_package=None,
        auto_recharge_price_cents=None,
        auto_recharge_package_tokens=None,
        auto_recharge_monthly_cap_cents=None,
        auto_recharge_retry_at=None,
        auto_recharge_last_outcome="",
    )
    # What other servers wrote beside an operation, and providers about its failure, may repeat what a person wrote.
    TokenUsage.objects.filter(account=account).update(metadata={}, error_message="", request_fingerprint="")
    Purchase.objects.filter(account=account).update(
        checkout_url="",
        receipt_url="",
        message="",
        card_brand="",
        card_last4="",
        buyer_name="",
        buyer_address="",
        buyer_tax_ids="",
    )
    Purchase.objects.filter(account=account, is_card_distrusted=False).update(card_fingerprint="")
    Notification.objects.filter(user=account.user).delete()
    NotificationPreference.objects.filter(user=account.user).delete()
    enqueue_on_commit("billing.tasks.erase_customer", account.pk)


def lock_account(*, user_id: int) -> TokenAccount:
    """The user's account under its row lock: no operation begins and none ends before the caller's commit."""
    ledger.get_account(user_id=user_id)
    return TokenAccount.objects.select_for_update().get(user_id=user_id)
