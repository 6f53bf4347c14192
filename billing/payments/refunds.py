"""Money that goes back: refunds and disputes, and the tokens they take back.

Each refund and dispute is a picture of what Stripe says of it (`PaymentReversal`). What is taken from the balance
follows from all pictures of a payment at once: the money that is gone, at most what was paid, decides how many tokens
are due; the ledger says how many were taken; the difference is posted. So neither order nor repetition of Stripe's
events matters, and a refund and a dispute of the same money take it once.

A picture that comes before the credit is parked: it has no purchase until `apply_parked` finds it. Locks are taken in
the order purchase, payment, account.
"""

from collections import Counter
from collections.abc import Callable
from typing import TypeVar

import structlog
from django.db import transaction
from django.db.models import Count, Sum

from billing import ledger
from billing.models import PaymentReversal, Purchase, TokenLot, TokenTransaction
from billing.notifications import messages
from billing.payments import customers, gateway
from billing.payments.objects import AskAgain, Asked, Dispute, Held, Refund
from billing.payments.recharge_settings import switch_off
from kit.database import repeated_after_conflicts
from kit.locks import lock_until_commit
from kit.text import read_id

logger = structlog.get_logger(__name__)

Kind = PaymentReversal.Kind
Picture = TypeVar("Picture", Refund, Dispute)
REQUESTED, REFUSED = PaymentReversal.REQUESTED, PaymentReversal.REFUSED

# Stripe's events come in any order. A dispute's bookings only become more, so they tell which picture is the newer one,
# whatever its status; among equals a status never gives way to an earlier one. What was over may begin anew (an inquiry
# that was closed becomes a dispute): what contradicts the end of a thing is neither believed nor passed over, Stripe is
# asked how it stands.
RANKS = {
    Kind.REFUND: {"pending": 0, "requires_action": 0, "succeeded": 1, "failed": 2, "canceled": 2},
    Kind.DISPUTE: {
        "warning_needs_response": 0,
        "warning_under_review": 1,
        "warning_closed": 2,
        "needs_response": 3,
        "under_review": 4,
        "prevented": 5,
        "won": 5,
        "lost": 5,
    },
}
ASK_TRIES = 4  # while others change the same row

# Reasons of a dispute that say: the card's owner knows nothing of the payment.
WITHOUT_CONSENT = ("fraudulent", "unrecognized", "debit_not_authorized")
# Whoever takes money back is not charged again by itself.
SWITCHES_OFF = {Kind.REFUND: "A payment of yours was refunded.", Kind.DISPUTE: "A payment of yours is disputed."}


class NotOurReversal(Exception):
    """It names no payment intent, so it cannot be about one of our payments."""


class ReversalNotUnderstood(Exception):
    """A status, an amount or a currency that we cannot turn into tokens. Nothing was written; a person decides."""


class TakenForReview(Exception):
    """A dispute in another currency than its purchase was paid in: all of the purchase's tokens were taken, and a
    person decides what is right."""


# --- What Stripe says -----------------------------------------------------------------------------------------------


def apply_reversal(picture: Refund | Dispute, *, asked: Asked) -> PaymentReversal:
    """Keep what Stripe says of a refund or dispute, and take or give back what follows from it. Any order, any number
    of times. A dispute that takes money also switches auto-recharge off.

    Raises AskAgain when the picture contradicts what is known, unless it is Stripe's answer to having been `asked`;
    NotOurReversal, ReversalNotUnderstood; TakenForReview, after the tokens were taken.
    """
    reversal = _apply(picture, asked.get(picture.id))
    purchase = reversal.purchase
    if purchase is not None and reversal.takes_money and reversal.currency != purchase.currency:
        raise TakenForReview(
            f"{picture.id} is about {reversal.amount_display}, but purchase {purchase.pk} was paid in "
            f"{purchase.currency}. All of its tokens were taken back: give back what is too much."
        )
    return reversal


def apply_refund(refund: Refund) -> PaymentReversal:
    """`apply_reversal` for what Stripe has answered: it is asked again for what contradicts what is known.

    Calls Stripe: never inside a transaction (law 7). Raises GatewayError, NotOurReversal, ReversalNotUnderstood.
    """
    return _apply_asking(refund, gateway.retrieve_refund)


def apply_dispute(dispute: Dispute) -> PaymentReversal:
    """The same of a dispute. Raises as `apply_refund`, and TakenForReview."""
    return _apply_asking(dispute, gateway.retrieve_dispute)


def _apply_asking(picture: Picture, retrieve: Callable[[str], Picture]) -> PaymentReversal:
    asked: dict[str, Held] = {}
    for _ in range(ASK_TRIES):
        try:
            return apply_reversal(picture, asked=asked)
        except AskAgain as question:
            asked[picture.id] = question.held
            picture = retrieve(picture.id)
    return apply_reversal(picture, asked=asked)


def apply_parked(purchase: Purchase) -> None:
    """Apply what came before the credit, in the credit's transaction. The purchase is locked, paid and saved."""
    if not purchase.stripe_payment_intent_id:
        return
    _lock_payment(purchase.stripe_payment_intent_id)
    parked = PaymentReversal.objects.select_for_update().filter(
        stripe_payment_intent_id=purchase.stripe_payment_intent_id, purchase=None
    )
    for reversal in parked.order_by("pk"):
        if reversal.currency != purchase.currency:
            logger.error(
                "A refund or dispute is in another currency than its purchase and is kept for review",
                reversal_id=reversal.pk,
                purchase_id=purchase.pk,
                user_id=purchase.user_id,
                account_id=purchase.account_id,
            )
            if reversal.kind == Kind.REFUND:
                continue
        reversal.purchase = purchase
        reversal.save(update_fields=["purchase", "updated_at"])
        _settle(purchase, reversal, was_taking=False)


@repeated_after_conflicts
def _apply(picture: Refund | Dispute, asked_of: Held | None) -> PaymentReversal:
    kind, request_id = (Kind.REFUND, picture.reversal_id) if isinstance(picture, Refund) else (Kind.DISPUTE, "")
    if not picture.payment_intent_id:
        raise NotOurReversal(f"{picture.id} names no payment intent; all our payments have one.")
    if picture.status not in RANKS[kind] and _seen(picture)[-1] is None:
        raise ReversalNotUnderstood(f"{picture.id} has the status {picture.status!r}, which we do not know.")
    if picture.amount_cents <= 0:
        raise ReversalNotUnderstood(f"{picture.id} is about an amount of {picture.amount_cents}.")
    with transaction.atomic():
        purchase = _locked_paid_purchase(picture.payment_intent_id)
        if purchase is not None and kind == Kind.REFUND and picture.currency != purchase.currency:
            raise ReversalNotUnderstood(
                f"{picture.id} is in {picture.currency}, but purchase {purchase.pk} was paid in {purchase.currency}."
            )
        reversal = _locked_reversal(kind, picture, request_id)
        was_taking = reversal.takes_money and reversal.purchase_id is not None
        is_current = asked_of == _held(reversal)
        if not is_current and _contradicts(reversal, picture):
            raise AskAgain(picture.id, _held(reversal))
        is_news = _advance(reversal, picture, is_current=is_current)
        is_found = purchase is not None and reversal.purchase_id is None
        if is_found:
            reversal.purchase = purchase
        if is_news or is_found:
            reversal.save()
            if purchase is not None:
                _settle(purchase, reversal, was_taking=was_taking)
    return reversal


def _locked_paid_purchase(payment_intent_id: str) -> Purchase | None:
    """The purchase that the payment was credited to, locked. Without one, no credit of it commits before we do."""
    by_payment = Purchase.objects.select_for_update().filter(stripe_payment_intent_id=payment_intent_id)
    purchase = by_payment.first()
    if purchase is None:
        _lock_payment(payment_intent_id)
        # A credit that was quicker has committed by now. One that is under way takes this lock before it looks for
        # parked rows, and holds no purchase that is paid already: waiting for a paid one cannot deadlock.
        purchase = by_payment.filter(state=Purchase.State.PAID).first()
    return purchase if purchase is not None and purchase.state == Purchase.State.PAID else None


def _lock_payment(payment_intent_id: str) -> None:
    """Hold a payment that may have no row yet, until the end of the transaction."""
    lock_until_commit(payment_intent_id)


def _locked_reversal(kind: str, picture: Refund | Dispute, request_id: str) -> PaymentReversal:
    """Our row of it, locked: the one of its id, else the request that it answers, else a new one without a status."""
    rows = PaymentReversal.objects.select_for_update()
    request_pk = read_id(request_id)
    if request_pk is not None and not rows.filter(stripe_id=picture.id).exists():
        # Metadata can be edited at Stripe. It only helps to find our row; payment and amount must be the row's.
        request = rows.filter(
            pk=request_pk,
            kind=kind,
            stripe_id__startswith=PaymentReversal.REQUEST_PREFIX,
            stripe_payment_intent_id=picture.payment_intent_id,
            amount_cents=picture.amount_cents,
        ).first()
        if request is not None:
            request.stripe_id = picture.id
            return request
    PaymentReversal.objects.bulk_create(
        [
            PaymentReversal(
                kind=kind,
                stripe_id=picture.id,
                stripe_payment_intent_id=picture.payment_intent_id,
                amount_cents=picture.amount_cents,
                currency=picture.currency,
                status="",
                reason=picture.reason[:500],
            )
        ],
        ignore_conflicts=True,
    )
    return rows.get(stripe_id=picture.id)


def _held(reversal: PaymentReversal) -> Held:
    return (reversal.status, reversal.amount_cents, reversal.withdrawn_cents, reversal.bookings)


def _seen(picture: Refund | Dispute) -> tuple[str, int, int | None]:
    return (
        picture.status[:30],
        picture.amount_cents,
        picture.withdrawn_cents if isinstance(picture, Dispute) else None,
    )


def _contradicts(reversal: PaymentReversal, picture: Refund | Dispute) -> bool:
    """Whether the picture may be older or newer than our row, and only Stripe knows: it changes what was over, or the
    money in one and the same state."""
    shown = PaymentReversal(kind=reversal.kind)
    shown.status, shown.amount_cents, shown.withdrawn_cents = _seen(picture)
    if shown.status == reversal.status:
        return (shown.amount_cents, shown.taken_cents) != (reversal.amount_cents, reversal.taken_cents)
    if not reversal.status:  # a new row
        return False
    # Of a state that we do not know nobody can say what comes after it.
    known = {*RANKS[Kind(reversal.kind)], REQUESTED, REFUSED}
    return reversal.status in PaymentReversal.FINAL_STATUSES or not {shown.status, reversal.status} <= known


def _advance(reversal: PaymentReversal, picture: Refund | Dispute, *, is_current: bool) -> bool:
    """Bring our row up to the picture, unless it is older than what we know. Returns whether anything changed."""
    before = (_held(reversal), reversal.reason)
    ranks = RANKS[Kind(reversal.kind)]
    bookings = picture.bookings if isinstance(picture, Dispute) else 0
    is_earlier = ranks.get(picture.status, 0) < ranks.get(reversal.status, -1)
    # Without any booking it says nothing of them: an inquiry, or a dispute that was opened this moment.
    is_older = is_earlier if bookings in (0, reversal.bookings) else bookings < reversal.bookings
    says_less = picture.status == reversal.status and _seen(picture)[-1] is None
    if is_current or not (is_older or says_less):
        reversal.status, reversal.amount_cents, reversal.withdrawn_cents = _seen(picture)
        reversal.currency, reversal.bookings = picture.currency, bookings
        if isinstance(picture, Dispute):  # a refund's is ours
            reversal.reason = picture.reason[:500]
    return before != (_held(reversal), reversal.reason)


# --- What follows for the balance -----------------------------------------------------------------------------------


def _settle(purchase: Purchase, reversal: PaymentReversal, *, was_taking: bool) -> None:
    """Post what the change of one reversal makes due, and tell the buyer."""
    change_tokens = _settle_reversals(purchase, reversal)
    is_new = reversal.takes_money and not was_taking
    if is_new:
        # It stays off, also when the money comes back to us.
        reason = SWITCHES_OFF[Kind(reversal.kind)]
        switch_off(account_id=purchase.account_id, reason=reason, key=reversal.stripe_id)
    if reversal.kind == Kind.DISPUTE and reversal.takes_money and reversal.reason in WITHOUT_CONSENT:
        customers.distrust_card(purchase, key=reversal.stripe_id)
    if reversal.kind == Kind.REFUND:
        if is_new:
            messages.refund_applied(reversal, tokens=-change_tokens)
        elif was_taking and not reversal.takes_money:
            messages.refund_failed(reversal, tokens=max(change_tokens, 0))
        return
    if is_new:
        messages.dispute_opened(reversal, tokens=-change_tokens)
    is_decided = reversal.status in PaymentReversal.DECIDED_STATUSES
    if (is_decided and (was_taking or is_new)) or change_tokens > 0:
        messages.dispute_moved(reversal, tokens=max(change_tokens, 0))


def _settle_reversals(purchase: Purchase, cause: PaymentReversal) -> int:
    """Bring the ledger to what all reversals of a locked purchase take. Returns the signed change of the balance."""
    returned_cents = returned_cents_of(purchase)
    posted = TokenTransaction.objects.filter(purchase=purchase, type=TokenTransaction.Type.REFUND).aggregate(
        rows=Count("id"), tokens=Sum("amount", default=0), cents=Sum("paid_cents", default=0)
    )
    # Rounded down, exact when all of it went back.
    due_tokens = purchase.tokens * returned_cents // purchase.paid_total_cents
    due_cents = purchase.revenue_cents * returned_cents // purchase.paid_total_cents
    change_tokens = -due_tokens - posted["tokens"]
    if not change_tokens:
        return 0
    number = posted["rows"] + 1
    common = {
        "account_id": purchase.account_id,
        "actor_id": purchase.user_id,
        "type": TokenTransaction.Type.REFUND,
        "purchase_id": purchase.pk,
        # The ledger's sum of these is what the buyer has spent, all in all.
        "paid_cents": -due_cents - posted["cents"],
        "currency": purchase.currency,
        "stripe_payment_intent_id": purchase.stripe_payment_intent_id,
        "idempotency_key": f"purchase-{purchase.pk}-reversal-{number}",
        "description": _description(purchase, cause),
        "metadata": {"reversal_id": cause.pk, "stripe_id": cause.stripe_id, "returned_cents": returned_cents},
    }
    if change_tokens < 0:
        # The money is gone, spent tokens or not: it may leave a debt.
        ledger.deduct_tokens(tokens=-change_tokens, may_leave_debt=True, **common)
    else:
        ledger.add_tokens(tokens=change_tokens, from_lots=_taken_last(purchase, change_tokens), **common)
    return change_tokens


def _taken_last(purchase: Purchase, tokens: int) -> dict[int, int]:
    """What of the last `tokens` that reversals of a purchase took, and that were not given back, came from which lot:
    {lot id: tokens}. Each took plain tokens first, then lots in the order of their ends, then left a debt."""
    taken: list[tuple[int | None, int]] = []  # the last one taken at the end; None: plain tokens, or a debt
    rows = TokenTransaction.objects.filter(purchase=purchase, type=TokenTransaction.Type.REFUND).order_by("sequence")
    ends = dict(TokenLot.objects.filter(account_id=purchase.account_id).values_list("pk", "expires_at"))
    for row in rows:
        if row.amount > 0:
            _take_back(taken, row.amount)
            continue
        of_lots = {int(lot_id): -amount for lot_id, amount in (row.lot_amounts or {}).items()}
        debt = max(0, -row.balance_after) - max(0, -row.balance_before)
        taken.append((None, -row.amount - sum(of_lots.values()) - debt))
        taken += [(lot_id, of_lots[lot_id]) for lot_id in sorted(of_lots, key=lambda lot_id: (ends[lot_id], lot_id))]
        taken.append((None, debt))
    came_from: Counter[int] = Counter()
    for lot_id, amount in _take_back(taken, tokens):
        if lot_id is not None:
            came_from[lot_id] += amount
    return dict(came_from)


def _take_back(taken: list[tuple[int | None, int]], tokens: int) -> list[tuple[int | None, int]]:
    """Take the last `tokens` off `taken`, and return them."""
    returned = []
    while tokens and taken:
        lot_id, amount = taken.pop()
        part = min(amount, tokens)
        if part < amount:
            taken.append((lot_id, amount - part))
        returned.append((lot_id, part))
        tokens -= part
    return returned


def returned_cents_of(purchase: Purchase) -> int:
    """What of a purchase's money is gone by all its refunds and disputes, at most what was paid."""
    taken_cents = sum(taken_cents_of(purchase, each) for each in purchase.reversals.all())
    return min(taken_cents, purchase.paid_total_cents)


def taken_cents_of(purchase: Purchase, reversal: PaymentReversal) -> int:
    """What of a purchase's money is gone by a reversal. Of one in another currency nobody knows the part: all of it,
    until a person has looked at it."""
    if reversal.currency == purchase.currency:
        return reversal.taken_cents
    return purchase.paid_total_cents if reversal.takes_money else 0


def _description(purchase: Purchase, cause: PaymentReversal) -> str:
    what = f"{purchase.package_name} package" if purchase.package_id else purchase.package_name
    if cause.takes_money:
        return f"Payment disputed: {what}" if cause.kind == Kind.DISPUTE else f"Refund: {what}"
    return f"Dispute won: {what}" if cause.kind == Kind.DISPUTE else f"Refund did not go through: {what}"


def taken_tokens(purchase: Purchase) -> int:
    """What refunds and disputes have taken back of a purchase so far."""
    rows = TokenTransaction.objects.filter(purchase=purchase, type=TokenTransaction.Type.REFUND)
    return -rows.aggregate(tokens=Sum("amount", default=0))["tokens"]
