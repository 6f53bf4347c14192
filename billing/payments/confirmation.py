"""An auto-recharge that the bank wants its card's owner to confirm: the page where they do, and how it went."""

import structlog

from billing.models import Purchase, TokenAccount
from billing.payments import gateway, purchases
from billing.payments.cards import refresh_card
from billing.payments.gateway import CardDeclined, GatewayError, GatewayMissing, GatewayRefused
from billing.payments.objects import PaymentIntent
from billing.payments.recharge import apply_answer
from kit import database

logger = structlog.get_logger(__name__)

State = Purchase.State


def start_confirmation(purchase: Purchase, *, return_url: str, confirm_key: str) -> str:
    """Try the payment again with the card's owner present. Returns the address of the bank's page, "" when there is
    none to visit (it was paid at once, or nothing waits for a confirmation).

    `confirm_key` is the form's: sent twice, it is one try. A card declined now ends the attempt. Raises GatewayError,
    AccountMayNotBuy.
    """
    if purchase.state != State.ACTION_REQUIRED:
        return ""
    account = TokenAccount.objects.get(pk=purchase.account_id)
    purchases.require_may_buy(account)
    try:
        payment = _confirm(purchase, account, return_url, confirm_key)
    except CardDeclined as error:
        if error.payment_intent is not None:
            apply_answer(error.payment_intent)
        raise
    except GatewayRefused:
        # An earlier try may have paid it without an answer that reached us.
        payment = gateway.retrieve_payment_intent(str(purchase.stripe_payment_intent_id))
        if payment.status != "succeeded":
            raise
    finally:
        # The page that follows asks anew, however quick its owner is and whatever came of this.
        Purchase.objects.filter(pk=purchase.pk).update(checked_at=None)
    apply_answer(payment)
    return payment.action_url


def _confirm(purchase: Purchase, account: TokenAccount, return_url: str, confirm_key: str) -> PaymentIntent:
    """Confirm with the card that is saved now. One that Stripe does not have any more makes room for the one it has."""

    def confirm(payment_method_id: str, key: str) -> PaymentIntent:
        return gateway.confirm_payment_intent(
            str(purchase.stripe_payment_intent_id),
            payment_method_id=payment_method_id,
            return_url=return_url,
            idempotency_key=purchase.stripe_key("confirm", key),
        )

    tried_id = account.stripe_payment_method_id or purchase.metadata["payment_method_id"]
    try:
        return confirm(tried_id, confirm_key)
    except GatewayMissing as error:
        if error.parameter != "payment_method":
            raise
        refresh_card(account_id=account.pk)
        account.refresh_from_db()
        if account.stripe_payment_method_id in ("", tried_id):
            raise
    return confirm(account.stripe_payment_method_id, f"{confirm_key}-2")


def refresh_from_stripe(purchase: Purchase) -> Purchase:
    """Ask Stripe how an attempt stands, at most every two seconds, for the page that waits for it.

    Stripe out of reach is no error: the page goes on waiting, and the webhook or the sweep will come.
    """
    if not purchase.is_pending or not purchase.stripe_payment_intent_id:
        return purchase
    if not purchases.claim(purchase, database.now(), again_after=purchases.PAGE_ASKS_AGAIN_AFTER):
        return purchase
    try:
        return apply_answer(gateway.retrieve_payment_intent(purchase.stripe_payment_intent_id))
    except GatewayError as error:
        ids, cause = purchases.log_ids(purchase), error.__cause__ or error
        logger.warning("An auto-recharge could not be looked up", **ids, error=cause)
        return purchase
