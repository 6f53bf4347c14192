"""The saved card: kept after a Checkout, looked up at Stripe. Which one is distrusted, `customers.py` knows."""

from datetime import datetime, timedelta

import structlog
from django.db import transaction
from django.db.models import F, Q

from billing import ledger
from billing.models import Purchase, TokenAccount
from billing.notifications import messages
from billing.payments import customers, gateway
from billing.payments.gateway import GatewayError, GatewayMissing, GatewayRefused
from billing.payments.objects import PaymentIntent, SavedCard
from billing.payments.purchases import WEBHOOK_GRACE
from billing.payments.recharge_settings import forget_declines
from kit import database
from kit.database import repeated_after_conflicts
from kit.on_commit import enqueue_on_commit

logger = structlog.get_logger(__name__)

State = Purchase.State

# How long the sweep looks for the card and the receipt of a payment.
DETAILS_WITHIN = timedelta(days=7)


def remember_card(*, purchase_id: int) -> None:
    """Fetch a paid purchase's receipt, and keep the card of a Checkout for later, if Stripe has saved it.

    Calls Stripe. Raises GatewayError; the sweep comes back to it.
    """
    purchase = Purchase.objects.filter(pk=purchase_id, state=State.PAID, stripe_payment_intent_id__isnull=False).first()
    if purchase is None:
        return
    _keep_details(purchase, gateway.retrieve_payment_intent(str(purchase.stripe_payment_intent_id)))


@repeated_after_conflicts
def _keep_details(purchase: Purchase, payment: PaymentIntent) -> None:
    with transaction.atomic():
        # Its row first: whoever anonymises the account meanwhile clears it before this, or after it.
        purchase = Purchase.objects.select_for_update().get(pk=purchase.pk)
        is_anonymised = TokenAccount.objects.filter(
            pk=purchase.account_id, status_reason=TokenAccount.ANONYMISED
        ).exists()
        Purchase.objects.filter(pk=purchase.pk).update(
            checked_at=database.now(),
            payment_method_type=payment.payment_method_type,
            # Of a card that is not trusted it stays: nobody is to charge it again.
            card_fingerprint="" if is_anonymised and not purchase.is_card_distrusted else payment.card_fingerprint,
            **dict.fromkeys(("receipt_url", "card_brand", "card_last4"), "")
            if is_anonymised
            else {
                "receipt_url": payment.receipt_url,
                "card_brand": payment.card_brand,
                "card_last4": payment.card_last4,
            },
        )
        if purchase.is_card_distrusted:
            customers.drop_distrusted(
                account_id=purchase.account_id, fingerprint=payment.card_fingerprint, key=str(purchase.pk)
            )
        bought_again = Purchase.objects.filter(
            account=purchase.account_id, kind=Purchase.Kind.CHECKOUT, paid_at__gt=purchase.paid_at
        )
        is_theirs = TokenAccount.objects.filter(
            pk=purchase.account_id, stripe_customer_id__isnull=False, stripe_customer_id=payment.customer_id
        )
        if (
            purchase.kind == Purchase.Kind.CHECKOUT
            and payment.is_card_saved
            and payment.card_last4  # a bank account is no card
            and is_theirs.exists()
            and not bought_again.exists()
        ):
            card = SavedCard(
                payment.payment_method_id, payment.card_brand, payment.card_last4, payment.card_fingerprint
            )
            _keep_card(purchase.account_id, card)


def _keep_card(account_id: int, *cards: SavedCard) -> tuple[str, TokenAccount] | None:
    """Store the first of the cards that nobody distrusts, unless its owner is nobody by now. Another one than before
    starts without the declines of the one before. Returns the id of the one before, and the account as it is now; None
    where no card can be trusted.

    In the caller's transaction, with the account locked first: a warning that came meanwhile is seen by what follows.
    """
    was = TokenAccount.objects.select_for_update().get(pk=account_id).stripe_payment_method_id
    accounts = TokenAccount.objects.filter(pk=account_id)
    for card in cards:
        if accounts.filter(customers.is_distrusted(card.fingerprint, card.payment_method_id)).exists():
            continue
        accounts = accounts.exclude(status_reason=TokenAccount.ANONYMISED)
        forget_declines(accounts.exclude(stripe_payment_method_id=card.payment_method_id))
        accounts.update(
            stripe_payment_method_id=card.payment_method_id,
            card_brand=card.brand,
            card_last4=card.last4,
            card_fingerprint=card.fingerprint,
        )
        return was, TokenAccount.objects.get(pk=account_id)
    return None


def sweep_details(now: datetime, *, limit: int) -> None:
    """Fetch the receipts and cards whose task was lost: `checked_at` tells whether Stripe was asked since."""
    missing = Purchase.objects.filter(
        Q(checked_at=None) | Q(checked_at__lt=F("paid_at")),
        Q(created_at__gt=now - DETAILS_WITHIN) | Q(is_card_distrusted=True),
        state=State.PAID,
        stripe_payment_intent_id__isnull=False,
        paid_at__lt=now - WEBHOOK_GRACE,
    )
    for purchase_id in missing.values_list("pk", flat=True)[:limit]:
        try:
            remember_card(purchase_id=purchase_id)
        except GatewayError as error:
            logger.warning("A card was not fetched", purchase_id=purchase_id, error=error.__cause__ or error)
            return


def refresh_card(*, user_id: int | None = None, account_id: int | None = None) -> None:
    """Ask Stripe which card the customer has now: after their visit to its page, or when a charge was refused.

    Without one that can be trusted, auto-recharge is switched off with a notice. Stripe out of reach is no error: what
    we know stays.
    """
    account = TokenAccount.objects.get(**ledger.Party(user_id, account_id).of_account)
    if not account.stripe_customer_id:
        return
    try:
        cards = gateway.list_saved_cards(account.stripe_customer_id, preferred_id=account.stripe_payment_method_id)
    except GatewayMissing:
        customers.forget_customer(customer_id=account.stripe_customer_id)
        return
    except GatewayError as error:
        logger.warning("A card could not be looked up", account_id=account.pk, error=error.__cause__ or error)
        return
    with transaction.atomic():
        kept = _keep_card(account.pk, *cards)
        if kept is not None and kept[0] not in ("", kept[1].stripe_payment_method_id):
            messages.saved_card_changed(kept[1], key=database.now().isoformat())
    if kept is None:
        customers.forget_card(payment_method_id=account.stripe_payment_method_id)


def open_card_page(*, user_id: int | None = None, account_id: int | None = None, return_url: str) -> str:
    """The address of Stripe's page where the account's card is changed or removed, "" when they have none to change.

    Raises GatewayError.
    """
    account = TokenAccount.objects.get(**ledger.Party(user_id, account_id).of_account)
    if not account.stripe_customer_id:
        return ""
    try:
        return gateway.create_portal_session(customer_id=account.stripe_customer_id, return_url=return_url)
    except GatewayMissing:
        customers.forget_customer(customer_id=account.stripe_customer_id)
        return ""
    except GatewayRefused as error:  # the operator has not set the page up at Stripe
        logger.error("Stripe's page for cards was refused", account_id=account.pk, error=error.__cause__ or error)
        raise


def update_card(card: SavedCard) -> None:
    """The bank has sent its owner a new card under the same contract: only what is shown of it changes."""
    TokenAccount.objects.filter(stripe_payment_method_id=card.payment_method_id).update(
        card_brand=card.brand, card_last4=card.last4, card_fingerprint=card.fingerprint
    )


def refresh_card_of(*, customer_id: str) -> None:
    """Have a worker look up the customer's card after the commit."""
    account_id = TokenAccount.objects.filter(stripe_customer_id=customer_id).values_list("pk", flat=True).first()
    if account_id is not None:
        enqueue_on_commit("billing.tasks.refresh_card", None, account_id)
