"""Our books beside Stripe's: what is missing is made up for, what differs is written down for a person.

Missed webhooks heal here: everything that is found goes through the same functions as the events do, which do nothing
the second time. Each finding is one `Drift` row, however often it is found.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any

import structlog
from django.db import transaction
from django.db.models import F, Q
from django.utils import timezone

from accounts import audit
from accounts.models import User
from billing.models import Drift, PaymentReversal, Purchase, TokenAccount
from billing.payments import customers, gateway, purchases, refunds, webhooks
from billing.payments.objects import Dispute, PaymentIntent, Refund
from billing.pricing import display_price
from kit.text import read_id

logger = structlog.get_logger(__name__)

State = Purchase.State

AMOUNT_DIFFERS = "amount_differs"

# Networks let a buyer dispute a payment for about four months, after an inquiry or in a second round, too.
DISPUTES_OPEN_AGAIN_WITHIN = timedelta(days=180)

HEALED = "Found at Stripe and applied."
GONE = "Looked at again: it does not differ any more."

# What the buyer reads of a purchase that was under review.
RETURNED = "All of the payment was sent back."
SETTLED = "The amount paid differed from the price. Our team has settled it."


@dataclass
class Report:
    """What one walk saw and found. Only what is ours is counted."""

    payments: int = 0
    refunds: int = 0
    disputes: int = 0
    healed: list[Drift] = field(default_factory=list)
    differing: list[Drift] = field(default_factory=list)
    resolved: list[Drift] = field(default_factory=list)


def reconcile(*, since: datetime) -> Report:
    """Walk Stripe's payments, refunds, disputes and fraud warnings made since, and what of ours is still open, and
    compare.

    Payments of other products on the same Stripe account are passed over. Calls Stripe, so never call it inside a
    transaction. May run twice at once. Raises GatewayError when Stripe cannot be read; what was applied stays.
    """
    walk = _Walk(since)
    walk.payments()
    walk.purchases_paid_here()
    walk.reversals()  # after the credits, which tell whose they are
    walk.warnings()
    walk.close_what_is_mended()
    return walk.report


class _Walk:
    """One comparison, and what it has seen so far."""

    def __init__(self, since: datetime) -> None:
        self.since = since
        self.report = Report()
        self.seen: set[str] = set()  # ids at Stripe that were compared
        self.found: set[str] = set()  # those of them that differ

    # --- Refunds and disputes ---

    def reversals(self) -> None:
        for refund in gateway.list_refunds(since=self.since):
            self.refund(refund)
        for dispute in gateway.list_disputes(since=self.since):
            self.dispute(dispute)
        # Stripe lists them by when they began. An older one that was open when we last heard of it may have ended, and
        # a dispute that has ended may have been opened again, or its money given back all the same.
        is_over = Q(status__in=(*PaymentReversal.FINAL_STATUSES, "succeeded", ""))
        may_open = Q(
            status__in=("warning_closed", "prevented", "won", "lost"),
            created_at__gt=timezone.now() - DISPUTES_OPEN_AGAIN_WITHIN,
        )
        pending = PaymentReversal.objects.filter(~is_over | may_open).exclude(
            Q(stripe_id__in=self.seen) | Q(stripe_id__startswith=PaymentReversal.REQUEST_PREFIX)
        )
        for reversal in pending.filter(purchase__isnull=False).order_by("pk"):
            try:
                if reversal.kind == PaymentReversal.Kind.REFUND:
                    self.refund(gateway.retrieve_refund(reversal.stripe_id))
                else:
                    self.dispute(gateway.retrieve_dispute(reversal.stripe_id))
            except gateway.GatewayRefused as error:
                self.differs(f"{reversal.kind}_unknown_to_stripe", reversal.stripe_id, str(error.__cause__), reversal)

    def refund(self, refund: Refund) -> None:
        if self.is_ours(refund.payment_intent_id):
            self.report.refunds += 1
            self.reversal("refund", refund)

    def dispute(self, dispute: Dispute) -> None:
        if self.is_ours(dispute.payment_intent_id):
            self.report.disputes += 1
            self.reversal("dispute", dispute)

    def is_ours(self, payment_intent_id: str) -> bool:
        return Purchase.objects.filter(stripe_payment_intent_id=payment_intent_id).exists()

    def reversal(self, kind: str, picture: Refund | Dispute) -> None:
        self.seen.add(picture.id)
        before = _picture_of(picture.id)
        try:
            reversal = refunds.apply_refund(picture) if isinstance(picture, Refund) else refunds.apply_dispute(picture)
        except refunds.ReversalNotUnderstood as error:
            self.differs(f"{kind}_not_understood", picture.id, str(error))
            return
        except refunds.TakenForReview as error:
            self.differs(f"{kind}_in_another_currency", picture.id, str(error))
            return
        if before != _picture_of(picture.id):
            amount = display_price(picture.amount_cents, picture.currency)
            description = f"{kind.capitalize()} of {amount} is {picture.status.replace('_', ' ')} at Stripe, not here."
            self.heals(f"{kind}_{picture.status}", picture.id, description, reversal)

    # --- Fraud warnings ---

    def warnings(self) -> None:
        for warning in gateway.list_fraud_warnings(since=self.since):
            if warning.payment is None:
                continue
            try:
                with transaction.atomic():
                    purchase = purchases.lock_purchase_behind(warning.payment)
                    is_news = customers.distrust_card(purchase, payment=warning.payment, key=warning.id)
            except purchases.PurchaseNotFound:
                continue  # another product's
            if is_news:
                description = f"The card's bank warns of fraud in {purchase.price_display} ({warning.fraud_type})."
                self.heals("fraud_warning", warning.id, description, purchase)

    # --- Payments ---

    def payments(self) -> None:
        for payment in gateway.list_payment_intents(since=self.since):
            account = TokenAccount.objects.filter(stripe_customer_id=payment.customer_id).first()
            purchase = _purchase_of(payment, account)
            if account is None and purchase is None:
                continue  # another product's
            self.report.payments += 1
            self.seen.add(payment.id)
            self.payment(payment, purchase)

    def payment(self, payment: PaymentIntent, purchase: Purchase | None) -> None:
        is_paid_there = payment.status == "succeeded"
        is_credited = (
            purchase is not None and purchase.state == State.PAID and purchase.stripe_payment_intent_id == payment.id
        )
        amount = display_price(payment.amount_received_cents, payment.currency)
        if not is_paid_there:
            # It may have been paid, and credited by its event, since it was listed.
            if is_credited and (status := gateway.retrieve_payment_intent(payment.id).status) != "succeeded":
                self.not_paid_there(purchase, payment.id, status)
        elif purchase is None:
            if not _is_returned(payment):
                self.differs("unknown_payment", payment.id, f"A customer of ours paid {amount} for nothing we know of.")
        elif is_credited:
            if payment.amount_received_cents != purchase.paid_total_cents or payment.currency != purchase.currency:
                self.amount_differs(payment, purchase)
        elif purchase.state == State.PAID and purchase.stripe_payment_intent_id:
            if not _is_returned(payment):
                description = f"{amount} were paid a second time for purchase {purchase.pk}."
                self.differs("paid_twice", payment.id, description, purchase)
        elif purchase.state in (State.REVIEW, State.FAILED) and (message := _why_over(payment)):
            # Nothing is credited for it any more, nor may another look set it back under review.
            _end_review(purchase.pk, message)
        else:
            self.credit(payment, purchase)

    def credit(self, payment: PaymentIntent, purchase: Purchase) -> None:
        """A payment that succeeded and was not credited: the event was lost."""
        amount = display_price(payment.amount_received_cents, payment.currency)
        try:
            if purchase.amount_may_differ and purchase.stripe_session_id:
                purchases.apply_checkout_session(gateway.retrieve_checkout_session(purchase.stripe_session_id))
            else:
                webhooks.apply_payment_intent(payment)
        except purchases.PurchaseError as error:
            self.differs("not_credited", payment.id, f"{amount} were paid, not credited: {error.message}", purchase)
            return
        purchase.refresh_from_db()
        if purchase.state == State.PAID:
            self.heals("missing_credit", payment.id, f"{amount} were paid at Stripe, not credited here.", purchase)
        elif purchase.state == State.REVIEW:
            self.amount_differs(payment, purchase)
        else:
            self.differs("not_credited", payment.id, f"{amount} were paid, but not credited.", purchase)

    def purchases_paid_here(self) -> None:
        """Payments begun earlier than the walk goes back, or that Stripe does not list at all."""
        paid = Purchase.objects.filter(
            state=State.PAID, paid_at__gte=self.since, stripe_payment_intent_id__isnull=False
        ).exclude(stripe_payment_intent_id__in=self.seen)
        for purchase in paid.order_by("pk"):
            payment_intent_id = str(purchase.stripe_payment_intent_id)
            self.seen.add(payment_intent_id)
            try:
                payment = gateway.retrieve_payment_intent(payment_intent_id)
            except gateway.GatewayRefused:
                self.not_paid_there(purchase, payment_intent_id, "unknown")
            else:
                self.payment(payment, purchase)

    # --- What it finds ---

    def not_paid_there(self, purchase: Purchase | None, payment_intent_id: str, status: str) -> None:
        description = f"Credited here, but the payment is {status.replace('_', ' ')} at Stripe."
        self.differs("paid_here_only", payment_intent_id, description, purchase)

    def amount_differs(self, payment: PaymentIntent, purchase: Purchase) -> None:
        if _is_returned(payment):
            return
        paid = display_price(payment.amount_received_cents, payment.currency)
        description = f"{paid} were paid, {purchase.money(purchase.paid_total_cents)} were agreed."
        self.differs(AMOUNT_DIFFERS, payment.id, description, purchase)

    def heals(self, kind: str, stripe_id: str, description: str, about: Purchase | PaymentReversal) -> None:
        drift, _ = _note(kind, stripe_id, description, about, resolution=HEALED, resolved_at=timezone.now())
        self.report.healed.append(drift)

    def differs(
        self, kind: str, stripe_id: str, description: str, about: Purchase | PaymentReversal | None = None
    ) -> None:
        self.found.add(stripe_id)
        drift, is_new = _note(kind, stripe_id, description, about)
        if drift.resolution == GONE:  # it was mended, and is not any more: a refund that failed
            drift.resolved_at, drift.resolution, drift.description, is_new = None, "", description[:500], True
            drift.save(update_fields=["resolved_at", "resolution", "description"])
        if is_new:
            logger.error(
                "A difference with Stripe",
                drift_id=drift.pk,
                kind=kind,
                stripe_id=stripe_id,
                purchase_id=drift.purchase_id,
                difference=description,
            )
        if drift.resolved_at is None:
            self.report.differing.append(drift)

    def close_what_is_mended(self) -> None:
        for drift in Drift.objects.filter(resolved_at=None, stripe_id__in=self.seen - self.found):
            drift.resolved_at, drift.resolution = timezone.now(), GONE
            drift.save(update_fields=["resolved_at", "resolution"])
            self.report.resolved.append(drift)


def resolve_drift(drift: Drift, *, resolution: str, by: User) -> bool:
    """Note what a person has done about a drift; the audit log says who. Returns whether it was open.

    A purchase that was under review for it is over: it failed, and no later walk credits it.
    """
    with transaction.atomic():
        is_resolved = bool(
            Drift.objects.filter(pk=drift.pk, resolved_at=None).update(
                resolved_at=timezone.now(), resolution=resolution[:500]
            )
        )
        if is_resolved:
            if drift.kind == AMOUNT_DIFFERS and drift.purchase_id is not None:
                _end_review(drift.purchase_id, SETTLED)
            audit.write(
                action=audit.Action.DRIFT_RESOLVED,
                summary=f"Resolved: {drift.description}",
                actor=by,
                about=("drift", drift.pk),
                reason=resolution,
            )
    return is_resolved


def _note(
    kind: str, stripe_id: str, description: str, about: Purchase | PaymentReversal | None, **resolved: Any
) -> tuple[Drift, bool]:
    purchase_id = about.purchase_id if isinstance(about, PaymentReversal) else about.pk if about else None
    return Drift.objects.get_or_create(
        kind=kind,
        stripe_id=stripe_id,
        defaults={"description": description[:500], "purchase_id": purchase_id, **resolved},
    )


def _purchase_of(payment: PaymentIntent, account: TokenAccount | None) -> Purchase | None:
    """Our purchase behind a payment: the one that has it, else the one that it names, if its customer is the payer."""
    by_payment = Purchase.objects.filter(stripe_payment_intent_id=payment.id).first()
    named = read_id(payment.purchase_id)
    if by_payment or account is None or named is None:
        return by_payment
    return Purchase.objects.filter(pk=named, account=account).first()


def _why_over(payment: PaymentIntent) -> str:
    """Why nobody is owed anything for a payment of another amount than agreed; empty while somebody is."""
    if _is_returned(payment):
        return RETURNED
    resolved = Drift.objects.filter(kind=AMOUNT_DIFFERS, stripe_id=payment.id, resolved_at__isnull=False)
    return SETTLED if resolved.exclude(resolution=GONE).exists() else ""


def _end_review(purchase_id: int, message: str) -> None:
    """Close a purchase without a credit, if it is under review; the buyer reads the message."""
    # `paid_at` keeps that money came: auto-recharge's monthly limit counts it (law 13).
    Purchase.objects.filter(pk=purchase_id, state=State.REVIEW).update(
        state=State.FAILED, message=message, paid_at=F("created_at")
    )


def _is_returned(payment: PaymentIntent) -> bool:
    """Whether all of a payment's money went back: then nobody is owed anything for it."""
    returned = gateway.list_refunds_of(payment.id)
    return _sum_taking(returned) >= payment.amount_received_cents


def _sum_taking(returned: Iterable[Refund]) -> int:
    taking = PaymentReversal.TAKING_STATUSES[PaymentReversal.Kind.REFUND]
    return sum(refund.amount_cents for refund in returned if refund.status in taking)


def _picture_of(stripe_id: str) -> Any:
    reversal = PaymentReversal.objects.filter(stripe_id=stripe_id).first()
    return reversal and (reversal.status, reversal.amount_cents, reversal.taken_cents, reversal.purchase_id)
