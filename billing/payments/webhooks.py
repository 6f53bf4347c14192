"""Stripe's events: verified, kept once, handled once.

The inbox row and what the event does are written in one transaction: a crash takes both back and Stripe sends the
event again; a crash after the commit makes that second delivery find it done.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace

import structlog
from django.db import transaction
from django.db.models import F
from django.utils import timezone

from accounts import audit
from accounts.models import User
from billing.models import Purchase, StripeEvent
from billing.payments import cards, customers, gateway, objects, purchases, recharge, refunds
from billing.payments.gateway import GatewayMissing, GatewayRefused
from billing.payments.objects import AskAgain, Asked, Event, PaymentIntent
from kit.database import DATABASE_AWAY, repeated_after_conflicts

logger = structlog.get_logger(__name__)

State = StripeEvent.State
DONE = (State.PROCESSED, State.IGNORED)  # what was kept aside is handled when it comes again, perhaps readable now
OPEN = (State.RECEIVED, State.FAILED, State.ASIDE)  # what a person, or `replay_stripe_events`, handles again


class EventNotHandled(Exception):
    """The handler failed. The event is kept with its error, and Stripe is asked to send it again."""


class NeedsPerson(Exception):
    """Nothing to do by ourselves: the event is kept aside with this message."""


APPLY_PAYMENT = {
    Purchase.Kind.CHECKOUT: purchases.apply_payment,
    Purchase.Kind.AUTO_RECHARGE: recharge.apply_payment,
}


@repeated_after_conflicts
def apply_payment_intent(payment: PaymentIntent, *, asked: Asked | None = None) -> Purchase:
    """Bring the purchase behind a payment up to what Stripe says, in the way of its kind. Raises PurchaseNotFound when
    there is none of ours; AskAgain when an event (`asked`: what Stripe was asked about since) contradicts it."""
    with transaction.atomic():
        purchase = purchases.lock_purchase_behind(payment)
        APPLY_PAYMENT[Purchase.Kind(purchase.kind)](purchase, payment, asked=asked)
    return purchase


def _on_session(event: Event) -> None:
    purchases.apply_checkout_session(objects.read_checkout_session(event.object), asked=event.asked)


def _on_session_payment_failed(event: Event) -> None:
    purchases.apply_payment_failure(objects.read_checkout_session(event.object))


def _on_payment_intent(event: Event) -> None:
    apply_payment_intent(objects.read_payment_intent(event.object), asked=event.asked)


def _on_card_detached(event: Event) -> None:
    customers.forget_card(payment_method_id=event.object["id"])


def _on_card_updated(event: Event) -> None:
    cards.update_card(objects.read_saved_card(event.object))


def _on_customer_updated(event: Event) -> None:
    cards.refresh_card_of(customer_id=event.object["id"])


def _on_customer_deleted(event: Event) -> None:
    customers.forget_customer(customer_id=event.object["id"])


def _on_refund(event: Event) -> None:
    refunds.apply_reversal(objects.read_refund(event.object), asked=event.asked)


def _on_charge_refunded(event: Event) -> None:
    # The sum that the charge tells is not read: each refund is applied by its own id, once, whoever tells of it.
    for refund in (event.object.get("refunds") or {}).get("data", []):
        refunds.apply_reversal(objects.read_refund(refund), asked=event.asked)


def _on_dispute(event: Event) -> None:
    refunds.apply_reversal(objects.read_dispute(event.object), asked=event.asked)


def _on_fraud_warning(event: Event) -> None:
    warning = objects.read_fraud_warning(event.object)
    paid_what = "a payment"
    if warning.payment is not None:
        purchase = purchases.lock_purchase_behind(warning.payment)
        customers.distrust_card(purchase, payment=warning.payment, key=warning.id)
        paid_what = f"{purchase.price_display} of purchase {purchase.pk}"
    raise NeedsPerson(
        f"The card's bank warns of fraud ({warning.fraud_type or 'no reason given'}) in {paid_what}. "
        "A refund now may avert the dispute."
    )


HANDLERS: Mapping[str, Callable[[Event], None]] = {
    "checkout.session.completed": _on_session,
    "checkout.session.async_payment_succeeded": _on_session,
    "checkout.session.async_payment_failed": _on_session_payment_failed,
    "checkout.session.expired": _on_session,
    "payment_intent.succeeded": _on_payment_intent,
    "payment_intent.payment_failed": _on_payment_intent,
    "payment_method.detached": _on_card_detached,
    "payment_method.automatically_updated": _on_card_updated,
    "customer.updated": _on_customer_updated,
    "customer.deleted": _on_customer_deleted,
    "charge.refunded": _on_charge_refunded,
    "charge.refund.updated": _on_refund,  # the older name of `refund.updated`
    "refund.created": _on_refund,
    "refund.updated": _on_refund,
    "refund.failed": _on_refund,
    "charge.dispute.created": _on_dispute,
    "charge.dispute.updated": _on_dispute,
    "charge.dispute.closed": _on_dispute,
    "charge.dispute.funds_withdrawn": _on_dispute,
    "charge.dispute.funds_reinstated": _on_dispute,
    "radar.early_fraud_warning.created": _on_fraud_warning,
}
# Of these only the id is read, which is the same in every version.
WITHOUT_VERSION = ("payment_method.detached", "customer.updated", "customer.deleted")
# Which of them come without a payment intent, though their charge has one.
NAME_A_PAYMENT = (_on_refund, _on_dispute)
ASK_TRIES = 10  # one for each thing that an event contradicts, and for what others change meanwhile


def receive_event(*, payload: bytes, signature_header: str) -> StripeEvent:
    """Take in one delivery: verify, keep, handle.

    Raises InvalidEvent when Stripe did not send it (nothing is written), EventNotHandled when our handling failed
    (the event is kept with the error; Stripe retries).
    """
    event = gateway.verify_event(payload, signature_header)
    return _take_in(_row_of(event), event)


def handle_again(row: StripeEvent, *, by: User | None = None) -> StripeEvent:
    """Handle an event of the inbox that failed or was kept aside once more. One that is done stays as it is.

    `by` asked for it, which the audit log knows before anything is done. Raises EventNotHandled when it fails again;
    its row then says why.
    """
    if by is not None:
        audit.write(
            action=audit.Action.EVENT_SETTLED,
            summary=f"Event {row.event_id} ({row.type}) handled again",
            actor=by,
            about=("stripe_event", row.pk),
            before={"state": row.state},
        )
    return _take_in(row, objects.read_event(row.payload))


def settle_by_hand(row: StripeEvent, *, by: User) -> bool:
    """Note that a person has dealt with an event that was kept aside. Returns whether it was."""
    with transaction.atomic():
        is_settled = bool(
            StripeEvent.objects.filter(pk=row.pk, state=State.ASIDE).update(
                # By whom, the audit log says: a person who is anonymised is not to stay here by their address.
                state=State.PROCESSED,
                message=f"{row.message} Dealt with by hand.",
                processed_at=timezone.now(),
            )
        )
        if is_settled:
            audit.write(
                action=audit.Action.EVENT_SETTLED,
                summary=f"Event {row.event_id} ({row.type}) dealt with by hand",
                actor=by,
                about=("stripe_event", row.pk),
                before={"message": row.message},
            )
    return is_settled


def _take_in(row: StripeEvent, event: Event) -> StripeEvent:
    try:
        row = _handle_asking(row, event)
        logger.info("An event came", event_id=event.id, event_type=event.type, state=row.state)
        return row
    except DATABASE_AWAY:
        raise  # nothing can be kept: Stripe is answered with a 503 and sends it again
    except Exception as error:
        logger.exception("An event was not handled", event_id=event.id, event_type=event.type)
        _keep_failure(row, error)
        raise EventNotHandled from error


def _handle_asking(row: StripeEvent, event: Event) -> StripeEvent:
    """Handle the event; what it lacks, or contradicts, is asked for between two tries (law 7). Raises GatewayError,
    AskAgain."""
    if event.type not in HANDLERS or _foreign(event):
        return _handle_once(row, event)
    try:
        if event.type not in WITHOUT_VERSION:
            event = gateway.in_our_version(event)
        event = _completed(event)
        for _ in range(ASK_TRIES):
            try:
                return _handle_once(row, event)
            except AskAgain as question:
                event = _completed(gateway.as_it_stands(event))
                event = replace(event, asked={**event.asked, question.stripe_id: question.held})
        return _handle_once(row, event)
    except GatewayRefused as error:
        # It will say so each time: what a person can do about it is no use of Stripe's retries.
        name = f"{event.object.get('object', 'object')} {event.object.get('id', '')}".strip()
        unknown = (
            f"Stripe does not know {name}" if isinstance(error, GatewayMissing) else f"Stripe refused to tell {name}"
        )
        return _handle_once(row, event, unknown=f"{unknown}: {error.__cause__}")


def _completed(event: Event) -> Event:
    handler = HANDLERS[event.type]
    if handler is _on_charge_refunded:
        return gateway.with_refunds(event)
    if handler is _on_fraud_warning:
        return gateway.with_warned_payment(event)
    return gateway.with_payment(event) if handler in NAME_A_PAYMENT else event


@repeated_after_conflicts
@transaction.atomic(durable=True)
def _handle_once(row: StripeEvent, event: Event, *, unknown: str = "") -> StripeEvent:
    # A second delivery waits here for the first one's commit, and then finds its row.
    if row.pk is None:
        StripeEvent.objects.bulk_create([row], ignore_conflicts=True)
    delivered = row
    row = StripeEvent.objects.select_for_update().get(event_id=event.id)
    if row.state in DONE:
        return row
    # Sent in several versions, or changed on its way to one that can be read: this delivery counts, also for a replay.
    row.payload, row.api_version, row.livemode = delivered.payload, delivered.api_version, delivered.livemode
    row.state, row.message = _aside(event, unknown) if unknown else _handle(event)
    row.attempts += 1
    row.processed_at = timezone.now()
    row.save(update_fields=["payload", "api_version", "livemode", "state", "message", "attempts", "processed_at"])
    return row


def _handle(event: Event) -> tuple[str, str]:
    handler = HANDLERS.get(event.type)
    if handler is None:
        return State.IGNORED, ""
    if reason := _foreign(event):
        return _aside(event, reason)
    if event.api_version != gateway.API_VERSION and event.type not in WITHOUT_VERSION:
        return _aside(event, f"Sent in API version {event.api_version}; this release reads {gateway.API_VERSION}.")
    try:
        handler(event)
    except (purchases.NotOurPayment, refunds.NotOurReversal) as error:
        return State.IGNORED, str(error)
    except (purchases.PurchaseNotFound, refunds.ReversalNotUnderstood, refunds.TakenForReview, NeedsPerson) as error:
        return _aside(event, str(error))
    return State.PROCESSED, ""


def _foreign(event: Event) -> str:
    """Why an event is none of our own account and mode; empty when it is."""
    if event.livemode != gateway.is_live_mode():
        return "Its mode (live or test) is not the one of our key."
    if event.account:
        return f"It comes from the connected account {event.account}; we sell on our own alone."
    return ""


def _aside(event: Event, message: str) -> tuple[str, str]:
    logger.error("An event is kept aside", event_id=event.id, event_type=event.type, reason=message)
    return State.ASIDE, message


def _row_of(event: Event) -> StripeEvent:
    return StripeEvent(
        event_id=event.id,
        type=event.type[:100],
        api_version=event.api_version[:50],
        livemode=event.livemode,
        # Kept for the books and to be handled again, which needs no names or addresses.
        payload=objects.without_personal_data(event.payload),
        state=State.RECEIVED,
        attempts=0,
    )


def _keep_failure(row: StripeEvent, error: Exception) -> None:
    if row.pk is None:
        StripeEvent.objects.bulk_create([row], ignore_conflicts=True)
    StripeEvent.objects.filter(event_id=row.event_id).exclude(state__in=DONE).update(
        state=State.FAILED, message=repr(error)[:2_000], attempts=F("attempts") + 1
    )
