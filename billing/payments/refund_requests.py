"""Refunds that a superadmin asks for: how much can be sent back, and one refund for each request.

The request is committed before Stripe is called, with the key of its own row (law 7). What Stripe then says is applied
as any refund is (`refunds.py`), whoever hears of it first.
"""

from datetime import timedelta

import structlog
from django.db import transaction
from django.utils import timezone

from accounts import audit, roles
from accounts.models import User
from billing.models import Installation, PaymentReversal, Purchase, TokenAccount
from billing.models.installation import stripe_key
from billing.notifications import messages
from billing.payments import gateway
from billing.payments.refunds import apply_refund, returned_cents_of, taken_cents_of, taken_tokens
from kit import database
from kit.database import repeated_after_conflicts
from kit.refusal import Refusal

logger = structlog.get_logger(__name__)

REQUESTED, REFUSED = PaymentReversal.REQUESTED, PaymentReversal.REFUSED

# The process that asked Stripe gets this long before the sweep asks with the same key.
RESUME_AFTER = timedelta(minutes=1)
# Stripe keeps an idempotency key for at least 24 hours; after that the same key could refund a second time.
RETRY_WITHIN = timedelta(hours=20)


class RefundError(Refusal):
    """Nothing was refunded, unless `RefundUnanswered`. `message` is for the superadmin."""


class RefundNotPossible(RefundError):
    """The purchase, the amount or the reason does not allow it."""


class RefundNotAllowed(RefundError):
    http_status = 403


class RefundKeyConflict(RefundError):
    http_status = 409


class RefundRefused(RefundError):
    """Stripe said no."""

    http_status = 502


class RefundUnanswered(RefundError):
    """Stripe did not answer. The request is kept and the sweep finishes it; it must not be made again."""

    http_status = 503


def refundable_cents(purchase: Purchase) -> int:
    """What of a purchase's money is neither gone nor asked for, in cents."""
    if purchase.state != Purchase.State.PAID or not purchase.stripe_payment_intent_id:
        return 0
    gone_cents = sum(
        each.amount_cents if each.status == REQUESTED else taken_cents_of(purchase, each)
        for each in purchase.reversals.all()
    )
    return max(0, purchase.paid_total_cents - gone_cents)


def unused_cents(purchase: Purchase) -> int:
    """The price of what of a purchase's tokens is still there, in cents, rounded down; at most what can be refunded.

    Tokens carry no name: those of this purchase count as unused as far as the account has any available.
    """
    available_tokens = TokenAccount.objects.get(pk=purchase.account_id).available
    unused_tokens = min(available_tokens, purchase.tokens - taken_tokens(purchase))
    price_cents = max(0, unused_tokens) * purchase.paid_total_cents // purchase.tokens
    return min(price_cents, refundable_cents(purchase))


def clawback_tokens(purchase: Purchase, *, amount_cents: int) -> int:
    """What a refund of `amount_cents` more would take back now."""
    returned_cents = min(returned_cents_of(purchase) + amount_cents, purchase.paid_total_cents)
    return purchase.tokens * returned_cents // purchase.paid_total_cents - taken_tokens(purchase)


def request_refund(
    *, purchase_id: int, amount_cents: int, reason: str, requested_by_id: int, request_key: str
) -> PaymentReversal:
    """Send money of a purchase back to the buyer, and take the tokens back.

    `request_key` is the form's: sent twice, it refunds once. The request is committed before Stripe is called, and
    its row makes the idempotency key. Raises RefundNotAllowed, RefundNotPossible, RefundKeyConflict, RefundRefused;
    RefundUnanswered when Stripe did not answer: then the sweep goes on with it.
    """
    reversal = _open_request(
        purchase_id=purchase_id,
        amount_cents=amount_cents,
        reason=" ".join(reason.split())[:500],
        requested_by_id=requested_by_id,
        request_key=request_key,
    )
    if reversal.status == REQUESTED:
        return _send_request(reversal)
    if reversal.status == REFUSED:
        raise RefundRefused("Stripe has refused this refund. Reload the page to ask again.")
    return reversal


def resume_requests(*, limit: int = 50) -> int:
    """Finish the refunds that Stripe did not answer, with the same key. Returns how many came to an end."""
    now = database.now()
    waiting = PaymentReversal.objects.filter(status=REQUESTED, created_at__lt=now - RESUME_AFTER).order_by("pk")
    ended = 0
    for reversal in waiting[:limit]:
        try:
            if reversal.created_at > now - RETRY_WITHIN:
                _send_request(reversal)
            else:
                _look_up(reversal)
            ended += 1
        except RefundRefused as error:
            ended += 1
            logger.error(
                "A refund was refused after its superadmin had gone",
                reversal_id=reversal.pk,
                purchase_id=reversal.purchase_id,
                user_id=reversal.requested_by_id,
                error=error.__cause__ or error,
            )
        except (RefundUnanswered, gateway.GatewayError) as error:
            logger.warning(
                "A refund was not finished",
                reversal_id=reversal.pk,
                purchase_id=reversal.purchase_id,
                error=error.__cause__ or error,
            )
    return ended


@repeated_after_conflicts
def _open_request(
    *, purchase_id: int, amount_cents: int, reason: str, requested_by_id: int, request_key: str
) -> PaymentReversal:
    if roles.find_superadmin(requested_by_id) is None:
        logger.warning("A refund was refused to no superadmin", user_id=requested_by_id, purchase_id=purchase_id)
        audit.write_refusal(
            action=audit.Action.REFUND,
            summary="Was refused a refund",
            actor=User.objects.get(pk=requested_by_id),
            about=("purchase", purchase_id),
        )
        raise RefundNotAllowed("Only superadmins can refund a purchase.")
    installation = Installation.read_name()
    with transaction.atomic():
        purchase = Purchase.objects.select_for_update().filter(pk=purchase_id).first()
        if purchase is None:
            raise RefundNotPossible("There is no such purchase.")
        sent_before = PaymentReversal.objects.filter(request_key=request_key).first()
        if sent_before is not None:
            if (sent_before.purchase_id, sent_before.amount_cents) != (purchase_id, amount_cents):
                raise RefundKeyConflict("This form was already sent for another refund. Reload the page.")
            return sent_before
        if not reason:
            raise RefundNotPossible("Enter a reason.")
        left_cents = refundable_cents(purchase)
        if not 0 < amount_cents <= left_cents:
            raise RefundNotPossible(
                f"The amount must be at most {purchase.money(left_cents)}, which is left of this purchase."
                if left_cents
                else "Nothing is left of this purchase to refund."
            )
        reversal = PaymentReversal.objects.create(
            kind=PaymentReversal.Kind.REFUND,
            stripe_id=f"{PaymentReversal.REQUEST_PREFIX}{request_key}",
            request_key=request_key,
            stripe_payment_intent_id=str(purchase.stripe_payment_intent_id),
            purchase=purchase,
            amount_cents=amount_cents,
            currency=purchase.currency,
            status=REQUESTED,
            reason=reason,
            requested_by_id=requested_by_id,
            installation=installation,
        )
        audit.write(
            action=audit.Action.REFUND,
            summary=f"Refund of {purchase.money(amount_cents)}, of {purchase.money(left_cents)} left, sent to Stripe",
            actor=User.objects.get(pk=requested_by_id),
            subject_id=purchase.user_id,
            about=("purchase", purchase.pk),
            before={"refundable_cents": left_cents},
            after={"refundable_cents": left_cents - amount_cents},
            reason=reason,
        )
        return reversal


def _send_request(reversal: PaymentReversal) -> PaymentReversal:
    """Ask Stripe for the refund, and apply its answer. Raises RefundRefused, RefundUnanswered."""
    try:
        refund = gateway.create_refund(
            payment_intent_id=reversal.stripe_payment_intent_id,
            amount_cents=reversal.amount_cents,
            purchase_id=int(reversal.purchase_id or 0),
            reversal_id=reversal.pk,
            idempotency_key=stripe_key(reversal.installation, "refund", reversal.pk),
        )
    except gateway.GatewayRefused as error:
        raise _refuse(reversal, f"Stripe refused the refund: {error.__cause__}") from error
    except (gateway.GatewayBroken, gateway.GatewayKeyConflict) as error:
        # Stripe gives this answer again under this key; whether it refunded, only its list tells.
        logger.warning(
            "A refund met a fault of Stripe's",
            reversal_id=reversal.pk,
            purchase_id=reversal.purchase_id,
            error=error.__cause__,
        )
        try:
            return _look_up(reversal)
        except gateway.GatewayError as second_error:
            raise _unanswered() from second_error
    except gateway.GatewayError as error:
        raise _unanswered() from error
    return apply_refund(refund)


def _look_up(reversal: PaymentReversal) -> PaymentReversal:
    """Apply the refund that answers a request, if Stripe has one; else the request is over. Raises RefundRefused."""
    for refund in gateway.list_refunds_of(reversal.stripe_payment_intent_id):
        if refund.reversal_id == str(reversal.pk):
            return apply_refund(refund)
    raise _refuse(reversal, "Stripe had a problem and has not refunded anything. Ask again on the purchase's page.")


def _refuse(reversal: PaymentReversal, message: str) -> RefundRefused:
    """Close a request, and tell who made it: they need not be at the page any more."""
    with transaction.atomic():
        request = PaymentReversal.objects.filter(pk=reversal.pk, status=REQUESTED)
        if request.update(status=REFUSED, updated_at=timezone.now()):
            messages.refund_refused(reversal, reason=message)
    return RefundRefused(message)


def _unanswered() -> RefundUnanswered:
    return RefundUnanswered(
        "Stripe did not answer. The refund is kept and finished by itself within minutes, and this page shows how it "
        "ended. Do not ask for it again."
    )
