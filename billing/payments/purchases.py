"""A purchase, from its page at Stripe to the one credit. `checkout.py` opens the page.

What is credited comes from our own row (law 6). A crash after any line leaves a purchase that the webhook, the success
page or the sweeper takes up where it stands.
"""

from collections.abc import Callable
from contextlib import suppress
from datetime import datetime, timedelta
from functools import partial

import structlog
from django.db import transaction
from django.db.models import Max, Q

from billing import ledger
from billing.models import Installation, Purchase, TokenAccount, TokenTransaction
from billing.notifications import messages
from billing.payments import gateway, refunds
from billing.payments.objects import AskAgain, Asked, CheckoutSession, PaymentIntent
from kit import database
from kit.database import repeated_after_conflicts
from kit.locks import lock_until_commit
from kit.on_commit import enqueue_on_commit
from kit.refusal import Refusal

logger = structlog.get_logger(__name__)

State = Purchase.State

# Stripe keeps an idempotency key for at least 24 hours. After that the same key could make a second session, so an
# unanswered purchase is given up before.
RETRY_WITHIN = timedelta(hours=20)
# The webhook gets this long before the sweeper asks Stripe, and this long again between two questions.
WEBHOOK_GRACE = timedelta(minutes=2)
ASK_AGAIN_AFTER = timedelta(minutes=10)
PAGE_ASKS_AGAIN_AFTER = timedelta(seconds=2)


def log_ids(purchase: Purchase) -> dict[str, int | None]:
    """What a line of the log about a purchase names."""
    return {"purchase_id": purchase.pk, "account_id": purchase.account_id, "user_id": purchase.user_id}


class PurchaseError(Refusal):
    """Nothing was charged. `message` is for the person."""


class AccountMayNotBuy(PurchaseError):
    """A person's block or suspension ends buying; a debt alone is paid by buying."""

    http_status = 403


class PurchaseNotFound(PurchaseError):
    """An event or a page names a purchase that is not ours, or not this one."""

    http_status = 404


class NotOurPayment(PurchaseNotFound):
    """It carries no reference like ours: another product sells on the same Stripe account."""


def require_may_buy(account: TokenAccount) -> None:
    """Raises AccountMayNotBuy. Of a payment that is under way nothing is refused: it is credited (law 12)."""
    if not account.may_buy:
        raise AccountMayNotBuy(
            f"Your account is {account.get_status_display().lower()}: it cannot buy tokens. Please contact support."
        )


def close_checkout(purchase: Purchase) -> Purchase:
    """Close a purchase's payment page at Stripe, and take over how it ended: closed, or paid a moment ago.

    Calls Stripe. Raises GatewayError, PurchaseNotFound.
    """
    with suppress(gateway.GatewayRefused):  # it is paid or closed already
        gateway.expire_checkout_session(str(purchase.stripe_session_id))
    return _ask_stripe(str(purchase.stripe_session_id))


# --- What Stripe says about it --------------------------------------------------------------------------------------


@repeated_after_conflicts
def apply_checkout_session(session: CheckoutSession, *, asked: Asked | None = None) -> Purchase:
    """Bring our purchase up to what Stripe says of its session: credit it, fail it, or note that it runs.

    Raises PurchaseNotFound when no purchase of ours is behind it; AskAgain when an event (`asked`: what Stripe was
    asked about since) closes the page of a purchase whose payment is under way.
    """
    with transaction.atomic():
        purchase = _locked_purchase_of(session)
        if asked is not None and is_settled(purchase):
            return purchase
        if session.is_paid:
            if session.buyer and purchase.state != State.PAID and purchase.account.user_id is None:
                purchase.buyer_name, purchase.buyer_address = session.buyer.name, session.buyer.address
                purchase.buyer_tax_ids = session.buyer.tax_ids
                purchase.save(update_fields=["buyer_name", "buyer_address", "buyer_tax_ids"])
            credit(
                purchase,
                amount_cents=session.amount_subtotal_cents,
                currency=session.currency,
                payment_intent_id=session.payment_intent_id,
                charged_cents=session.amount_total_cents,
                discount_cents=session.discount_cents,
                tax_cents=session.tax_cents,
                after=messages.purchase_confirmed,
            )
        elif session.status == "expired" and purchase.may_be_paid:
            if purchase.state == State.PROCESSING:
                require_asked(purchase, session.id, asked)
            if purchase.is_pending:
                set_state(purchase, State.EXPIRED, "The payment page was not used in time.")
            purchase.expires_at = database.now()  # its page is closed, perhaps before its time
            purchase.save(update_fields=["expires_at"])
        elif session.status == "complete" and purchase.state in (*Purchase.UNPAID_STATES, State.EXPIRED):
            set_state(purchase, State.PROCESSING, "Your bank needs a while to confirm the payment.")
    return purchase


@repeated_after_conflicts
def apply_payment_failure(session: CheckoutSession) -> Purchase:
    """A delayed payment did not come. Raises PurchaseNotFound."""
    with transaction.atomic():
        purchase = _locked_purchase_of(session)
        if purchase.is_pending:
            set_state(purchase, State.FAILED, "The bank did not confirm the payment. You were not charged.")
    return purchase


def apply_payment(purchase: Purchase, payment: PaymentIntent, *, asked: Asked | None = None) -> None:
    """Credit a locked Checkout whose payment succeeded and whose session's event has not come, or will not come.

    With tax or promotion codes its amount is not the price, which only the session tells: it is left to the session's
    event, the success page or the sweeper. Until then the page lets the buyer try again: nothing fails here.
    """
    is_news = asked is None or not is_settled(purchase)
    if is_news and payment.status == "succeeded" and not purchase.amount_may_differ:
        credit(
            purchase,
            amount_cents=payment.amount_received_cents,
            currency=payment.currency,
            payment_intent_id=payment.id,
            after=messages.purchase_confirmed,
        )


def refresh_from_stripe(purchase: Purchase) -> Purchase:
    """Ask Stripe how a purchase stands that may be paid, at most every two seconds, for the page that waits for it.

    Stripe out of reach is no error: the page goes on waiting, and the webhook or the sweeper will come.
    """
    if not purchase.may_be_paid or not purchase.stripe_session_id:
        return purchase
    if not claim(purchase, database.now(), again_after=PAGE_ASKS_AGAIN_AFTER):
        return purchase
    try:
        return _ask_stripe(purchase.stripe_session_id)
    except gateway.GatewayError as error:
        logger.warning("A purchase could not be looked up", **log_ids(purchase), error=error.__cause__ or error)
        return purchase


def sweep_purchases(*, limit: int = 200) -> int:
    """Finish the purchases whose webhook never came, by asking Stripe, and close the pages of those that were given up
    here while Stripe could not be told. Returns how many came to an end."""
    now = database.now()
    Purchase.objects.filter(
        state=State.CREATED,
        kind=Purchase.Kind.CHECKOUT,
        stripe_session_id=None,
        created_at__lt=now - RETRY_WITHIN,
    ).update(state=State.EXPIRED, message="The payment page could not be opened.")
    waiting = Purchase.objects.filter(
        Q(checked_at=None) | Q(checked_at__lt=now - ASK_AGAIN_AFTER),
        Q(state__in=Purchase.PENDING_STATES) | Purchase.which_page_is_left(),
        stripe_session_id__isnull=False,
        created_at__lt=now - WEBHOOK_GRACE,
    ).order_by("checked_at", "id")
    ended = 0
    for purchase in waiting[:limit]:
        Purchase.objects.filter(pk=purchase.pk).update(checked_at=now)
        try:
            if purchase.state == State.EXPIRED:
                ended += not close_checkout(purchase).may_be_paid
            else:
                ended += not _ask_stripe(str(purchase.stripe_session_id)).is_pending
        except (gateway.GatewayError, PurchaseError) as error:
            logger.warning("A purchase was not finished", **log_ids(purchase), error=error.__cause__ or error)
    return ended


def _ask_stripe(session_id: str) -> Purchase:
    try:
        session = gateway.retrieve_checkout_session(session_id)
    except gateway.GatewayMissing:
        return _close_unknown(session_id)
    # A delayed payment: the session never says that it failed, only its payment does.
    is_delayed = session.status == "complete" and not session.is_paid and session.payment_intent_id is not None
    if is_delayed and gateway.retrieve_payment_intent(str(session.payment_intent_id)).has_failed:
        return apply_payment_failure(session)
    return apply_checkout_session(session)


def is_settled(purchase: Purchase) -> bool:
    """Whether another amount was paid, and a person has settled it or all of it was sent back: events that come late
    change nothing of that, while reconciliation sees what Stripe has now."""
    return purchase.state == State.FAILED and purchase.paid_at is not None


def _close_unknown(session_id: str) -> Purchase:
    """A payment page that Stripe does not know, say of the other mode: nobody pays on it."""
    with transaction.atomic():
        purchase = Purchase.objects.select_for_update().get(stripe_session_id=session_id)
        if purchase.may_be_paid:
            if purchase.is_pending:
                set_state(purchase, State.EXPIRED, "The payment page is not there any more.")
            purchase.expires_at = database.now()
            purchase.save(update_fields=["expires_at"])
    return purchase


def require_asked(purchase: Purchase, stripe_id: str, asked: Asked | None) -> None:
    """Raises AskAgain for what an event tells, until Stripe was asked while the purchase stood as it does. `asked` is
    None for what Stripe has just answered."""
    held = (purchase.state,)
    if asked is not None and asked.get(stripe_id) != held:
        raise AskAgain(stripe_id, held)


def lock_purchase_behind(payment_intent: PaymentIntent) -> Purchase:
    """Our purchase that a payment is for, also before we know its id, locked. Raises PurchaseNotFound."""
    by_intent = Purchase.objects.filter(stripe_payment_intent_id=payment_intent.id).values_list("pk").first()
    if not by_intent:
        _require_ours(payment_intent.installation)
    purchase = _lock(by_intent[0] if by_intent else payment_intent.purchase_id)
    if not by_intent:
        # Metadata can be edited at Stripe. It only helps to find our row; customer and amount must be the row's.
        _require_customer(purchase, payment_intent.customer_id)
    return purchase


def _locked_purchase_of(session: CheckoutSession) -> Purchase:
    """Our purchase behind a session, locked. By the session's id; by our reference only while we do not know the id
    yet (Stripe answered, and we crashed before storing it)."""
    known = Purchase.objects.filter(stripe_session_id=session.id).values_list("pk").first()
    if not known:
        _require_ours(session.installation)
    purchase = _lock(known[0] if known else session.client_reference_id)
    if purchase.stripe_session_id is None:
        # Another product on our Stripe account may count its orders, too, and reach the same number.
        _require_customer(purchase, session.customer_id)
        purchase.stripe_session_id = session.id
        purchase.save(update_fields=["stripe_session_id"])
    if purchase.stripe_session_id != session.id:
        raise PurchaseNotFound(f"Session {session.id} is not the one of purchase {purchase.pk}.")
    return purchase


def _require_ours(installation: str) -> None:
    """Raises NotOurPayment. Payments of before they named it name none."""
    if installation and not Installation.objects.filter(name=installation).exists():
        raise NotOurPayment(f"It is of another installation, {installation!r}.")


def _lock(purchase_id: int | str) -> Purchase:
    try:
        return Purchase.objects.select_for_update().get(pk=int(purchase_id))
    except ValueError:
        raise NotOurPayment(f"{purchase_id!r} is no reference of ours.") from None
    except (OverflowError, Purchase.DoesNotExist):
        raise PurchaseNotFound(f"There is no purchase {purchase_id!r}.") from None


def _require_customer(purchase: Purchase, customer_id: str) -> None:
    ours = TokenAccount.objects.values_list("stripe_customer_id", flat=True).get(pk=purchase.account_id)
    # An auto-recharge keeps whom it charged: the customer may have been deleted since.
    if not customer_id or customer_id not in (ours, purchase.metadata.get("customer_id")):
        raise PurchaseNotFound(f"Customer {customer_id!r} is not the one of purchase {purchase.pk}.")


def claim(purchase: Purchase, now: datetime, *, again_after: timedelta) -> bool:
    """Whether the caller may ask Stripe about it: nobody has done so for `again_after`. It counts as asked then."""
    due = Q(checked_at=None) | Q(checked_at__lt=now - again_after)
    return bool(Purchase.objects.filter(due, pk=purchase.pk).update(checked_at=now))


def set_state(purchase: Purchase, state: str, message: str, *, failure_code: str = "") -> None:
    """Write where a locked purchase stands, and in words why."""
    purchase.state = state
    purchase.message = message[:500]
    purchase.failure_code = failure_code[:100]
    purchase.save(update_fields=["state", "message", "failure_code"])


def credit(
    purchase: Purchase,
    *,
    amount_cents: int,
    currency: str,
    payment_intent_id: str | None,
    after: Callable[[Purchase], None],
    charged_cents: int | None = None,
    discount_cents: int = 0,
    tax_cents: int = 0,
) -> None:
    """Credit a locked purchase once, if what was paid is what was agreed. Paid wins over expired and failed.

    `after` is what its kind of purchase does when it was credited just now, in the same transaction.
    `charged_cents` is what the buyer paid in the end, where that may differ: the whole that refunds are parts of.
    `discount_cents` of it promotion codes took off the price: they lower what we earn, not what is credited. So does
    the part of `tax_cents` that the price includes.
    """
    if purchase.state == State.PAID:
        if payment_intent_id and purchase.stripe_payment_intent_id is None:
            purchase.stripe_payment_intent_id = payment_intent_id
            purchase.save(update_fields=["stripe_payment_intent_id"])
            refunds.apply_parked(purchase)
        if payment_intent_id and purchase.stripe_payment_intent_id != payment_intent_id:
            raise PurchaseNotFound(f"Purchase {purchase.pk} was paid by another payment than {payment_intent_id}.")
        return
    if (amount_cents, currency) != (purchase.amount_cents, purchase.currency):
        logger.error(
            "A purchase was paid with another amount and is kept for review",
            **log_ids(purchase),
            paid_cents=amount_cents,
            paid_currency=currency,
            amount_cents=purchase.amount_cents,
            currency=purchase.currency,
        )
        set_state(purchase, State.REVIEW, "The amount paid differs from the price. We are looking into it.")
        return
    purchase.discount_cents = discount_cents
    purchase.tax_cents = tax_cents
    purchase.charged_cents = charged_cents or None
    ledger.add_tokens(
        account_id=purchase.account_id,
        actor_id=purchase.user_id,
        tokens=purchase.tokens,
        type=(
            TokenTransaction.Type.PURCHASE
            if purchase.kind == Purchase.Kind.CHECKOUT
            else TokenTransaction.Type.AUTO_RECHARGE
        ),
        description=f"{purchase.package_name} package" if purchase.package_id else purchase.package_name,
        idempotency_key=f"purchase-{purchase.pk}",
        purchase_id=purchase.pk,
        paid_cents=purchase.revenue_cents,
        currency=purchase.currency,
        stripe_payment_intent_id=payment_intent_id,
    )
    purchase.state = State.PAID
    purchase.message = ""
    purchase.paid_at = database.now()
    purchase.stripe_payment_intent_id = payment_intent_id
    purchase.save(
        update_fields=[
            "state", "message", "paid_at", "stripe_payment_intent_id", "charged_cents", "discount_cents", "tax_cents",
        ]
    )  # fmt: skip
    after(purchase)
    enqueue_on_commit("billing.tasks.remember_card", purchase.pk)
    refunds.apply_parked(purchase)
    number_receipt(purchase)
    transaction.on_commit(
        partial(logger.info, "A purchase was credited", **log_ids(purchase), tokens=purchase.tokens, kind=purchase.kind)
    )


def number_receipt(purchase: Purchase) -> None:
    """Give a paid purchase the next number of the receipts, in the caller's transaction; one that has one keeps it.

    Whoever numbers waits for the one before to commit, so that the series has no gap; it is the last lock of a credit.
    """
    lock_until_commit("receipt numbers")
    highest = Purchase.objects.aggregate(number=Max("receipt_number"))["number"] or 0
    Purchase.objects.filter(pk=purchase.pk, receipt_number=None).update(receipt_number=highest + 1)
    purchase.refresh_from_db(fields=["receipt_number"])
