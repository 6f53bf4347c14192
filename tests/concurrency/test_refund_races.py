"""Money that comes and goes back at the same moment. Each race has its control, without the lock.

Numbers in docstrings are rows of FAULTS.md.
"""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from threading import Barrier, BrokenBarrierError
from typing import TYPE_CHECKING, Any
from uuid import uuid4

import pytest
from django.core.management import CommandError
from django.db import connection
from django.test import Client
from django.urls import reverse

from accounts.models import User
from billing import ledger
from billing.models import PaymentReversal, Purchase, TokenAccount, TokenTransaction
from billing.payments import refunds
from tests.payments import (
    BONUS_TOKENS,
    STARTER_TOKENS,
    buy,
    changed,
    deliver,
    event_of,
    events_of,
    verify_books,
)
from tests.servers import StripeStandIn

if TYPE_CHECKING:
    from django.test.client import _MonkeyPatchedWSGIResponse as Answer

pytestmark = [pytest.mark.django_db(transaction=True), pytest.mark.usefixtures("events_wait")]

COMPLETED = "checkout.session.completed"
RACE_SECONDS = 20  # a barrier that is not full by then gives up


@pytest.fixture
def books(alice: User) -> Iterator[None]:
    """For the races that must end well."""
    yield
    verify_books()


def in_parallel(calls: Sequence[Callable[[], "Answer"]]) -> "list[Answer]":
    """Call all at once, each thread with a database connection of its own."""
    together = Barrier(len(calls), timeout=RACE_SECONDS)

    def call(each: Callable[[], "Answer"]) -> "Answer":
        try:
            together.wait()
            return each()
        finally:
            connection.close()

    with ThreadPoolExecutor(len(calls)) as threads:
        return list(threads.map(call, calls))


def deliver_at_once(events: Sequence[dict[str, Any]]) -> None:
    answers = in_parallel([partial(deliver, event) for event in events])
    assert {answer.status_code for answer in answers} == {200}


def movements(purchase: Purchase) -> list[int]:
    rows = TokenTransaction.objects.filter(purchase=purchase, type="refund").order_by("sequence")
    return list(rows.values_list("amount", flat=True))


def pay_and_send_back(stripe: StripeStandIn, buyer: Client) -> Purchase:
    """Bought for $15, $5 of it refunded, $8 disputed; nothing has told us yet."""
    purchase = buy(stripe, buyer)
    payment_id = stripe.state()["payment_intents"][0]["id"]
    stripe.control(f"payments/{payment_id}/refund", amount=500)
    stripe.control(f"payments/{payment_id}/dispute", amount=800)
    return purchase


@pytest.mark.parametrize("attempt", range(5))
def test_refund_dispute_and_credit_at_once(
    stripe: StripeStandIn, buyer: Client, alice: User, books: None, attempt: int
) -> None:
    """4, 45, 47: each several times and by all its events: credited once, and what went back is taken once."""
    purchase = pay_and_send_back(stripe, buyer)
    once = [
        event_of(stripe, type)
        for type in (
            COMPLETED,
            "payment_intent.succeeded",
            "refund.created",
            "charge.refunded",
            "charge.dispute.created",
            "charge.dispute.funds_withdrawn",
        )
    ]
    deliver_at_once([*once, *once, *(changed(event) for event in once)])
    assert sum(movements(purchase)) == -130_000
    assert TokenAccount.objects.get(user=alice).balance == BONUS_TOKENS + STARTER_TOKENS - 130_000
    assert PaymentReversal.objects.filter(purchase=purchase).count() == 2


def _credit_beside_a_refund(
    stripe: StripeStandIn, buyer: Client, monkeypatch: pytest.MonkeyPatch, *, lock: bool
) -> Purchase:
    """Bring the credit and a refund to the moment before the payment's lock together; then both go on."""
    purchase = pay_and_send_back(stripe, buyer)
    both_are_there = Barrier(2, timeout=RACE_SECONDS)
    lock_payment = refunds._lock_payment

    def lock_together(payment_intent_id: str) -> None:
        both_are_there.wait()
        if lock:
            lock_payment(payment_intent_id)

    monkeypatch.setattr(refunds, "_lock_payment", lock_together)
    deliver_at_once([event_of(stripe, COMPLETED), event_of(stripe, "refund.created")])
    monkeypatch.undo()
    return purchase


def test_credit_and_refund_meet(
    stripe: StripeStandIn, buyer: Client, books: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """4: neither sees the other's row; whoever comes second does."""
    purchase = _credit_beside_a_refund(stripe, buyer, monkeypatch, lock=True)
    assert movements(purchase) == [-50_000]


def test_without_the_payments_lock_the_refund_is_overlooked(
    stripe: StripeStandIn, buyer: Client, alice: User, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The control of 4: parked for ever, and `verify_ledger` says so."""
    purchase = _credit_beside_a_refund(stripe, buyer, monkeypatch, lock=False)
    assert movements(purchase) == []
    assert TokenAccount.objects.get(user=alice).balance == BONUS_TOKENS + STARTER_TOKENS
    with pytest.raises(CommandError, match="broken"):
        verify_books()


def _two_refunds_meet(
    stripe: StripeStandIn, buyer: Client, monkeypatch: pytest.MonkeyPatch, *, seconds: float
) -> list[int]:
    """Two refunds of a credited purchase are applied; each waits so long before it posts for the other to be there."""
    purchase = buy(stripe, buyer)
    deliver(event_of(stripe, COMPLETED))
    payment_id = stripe.state()["payment_intents"][0]["id"]
    for cents in (500, 300):
        stripe.control(f"payments/{payment_id}/refund", amount=cents)
    both_are_there = Barrier(2)
    deduct = ledger.deduct_tokens

    def deduct_together(**arguments: Any) -> ledger.Posting:
        with suppress(BrokenBarrierError):  # the lock keeps the other one away
            both_are_there.wait(timeout=seconds)
        return deduct(**arguments)

    monkeypatch.setattr(ledger, "deduct_tokens", deduct_together)
    answers = in_parallel([partial(deliver, event) for event in events_of(stripe, "refund.created")])
    monkeypatch.undo()
    return [*sorted(answer.status_code for answer in answers), sum(movements(purchase))]


def test_two_refunds_at_once(
    stripe: StripeStandIn, buyer: Client, books: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """43: one after the other."""
    assert _two_refunds_meet(stripe, buyer, monkeypatch, seconds=0.5) == [200, 200, -80_000]


def test_without_the_purchases_lock_two_refunds_collide(
    stripe: StripeStandIn, buyer: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The control of 43: both work out the same next row, and the ledger's key stops the second one."""

    def unlocked(payment_intent_id: str) -> Purchase | None:
        return Purchase.objects.filter(stripe_payment_intent_id=payment_intent_id, state="paid").first()

    monkeypatch.setattr(refunds, "_locked_paid_purchase", unlocked)
    *statuses, taken_tokens = _two_refunds_meet(stripe, buyer, monkeypatch, seconds=RACE_SECONDS)
    assert statuses == [200, 500]
    assert taken_tokens != -80_000


def test_a_superadmin_submits_ten_times(stripe: StripeStandIn, buyer: Client, susan: User, books: None) -> None:
    """41, 65: one refund at Stripe, one debit."""
    purchase = buy(stripe, buyer)
    deliver(event_of(stripe, COMPLETED))
    form = {"confirmed": "yes", "amount_cents": 500, "reason": "Asked", "request_key": uuid4().hex}
    superadmins = [Client() for _ in range(10)]
    for superadmin in superadmins:
        superadmin.force_login(susan)
    page = reverse("dashboard:purchase", args=[purchase.pk])
    in_parallel([partial(superadmin.post, page, form) for superadmin in superadmins])
    assert len(stripe.state()["refunds"]) == 1
    assert movements(purchase) == [-50_000]
    assert PaymentReversal.objects.get().status == "succeeded"


def test_refunds_beyond_the_purchase_at_once(stripe: StripeStandIn, buyer: Client, susan: User, books: None) -> None:
    """43: five superadmins ask for $5 each of $15: three get it."""
    purchase = buy(stripe, buyer)
    deliver(event_of(stripe, COMPLETED))
    page = reverse("dashboard:purchase", args=[purchase.pk])
    superadmins = [Client() for _ in range(5)]
    for superadmin in superadmins:
        superadmin.force_login(susan)

    def ask(superadmin: Client) -> "Answer":
        form = {"confirmed": "yes", "amount_cents": 500, "reason": "Asked", "request_key": uuid4().hex}
        return superadmin.post(page, form)

    in_parallel([partial(ask, superadmin) for superadmin in superadmins])
    assert [each["amount"] for each in stripe.state()["refunds"]] == [500] * 3
    assert sum(movements(purchase)) == -STARTER_TOKENS
