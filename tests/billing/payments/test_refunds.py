"""Money that goes back, and the tokens with it. Numbers in docstrings are rows of FAULTS.md."""

import random
from datetime import timedelta
from decimal import Decimal
from typing import Any
from uuid import uuid4

import pytest
from django.db.models import F
from django.test import Client
from django.urls import reverse
from django.utils import timezone
from pytest_django.fixtures import Settings

from accounts.models import User
from billing import ledger, tasks
from billing.ledger import Operation
from billing.models import (
    Notification,
    PaymentReversal,
    Purchase,
    StripeEvent,
    TokenAccount,
    TokenPricing,
    TokenTransaction,
)
from billing.payments import cards, gateway, recharge, reconcile, refund_requests, webhooks
from billing.pricing import TokenPools
from tests.conftest import MakeUser
from tests.payments import (
    BONUS_TOKENS,
    STARTER_CENTS,
    STARTER_TOKENS,
    buy,
    changed,
    deliver,
    event_of,
    events_of,
    purchase_state,
    state_of,
    verify_books,
)
from tests.servers import Server, StripeStandIn

pytestmark = [pytest.mark.django_db, pytest.mark.usefixtures("books_stay_in_order", "events_wait")]

COMPLETED = "checkout.session.completed"


def payment_of(stripe: StripeStandIn) -> str:
    (payment,) = stripe.state()["payment_intents"]
    return str(payment["id"])


def refund(stripe: StripeStandIn, amount: int | None = None) -> dict[str, Any]:
    """Refund at Stripe, as its dashboard does."""
    return stripe.control(f"payments/{payment_of(stripe)}/refund", **({"amount": amount} if amount else {}))


def dispute(
    stripe: StripeStandIn, status: str = "needs_response", amount: int | None = None, **options: Any
) -> dict[str, Any]:
    given = options | ({"amount": amount} if amount else {})
    return stripe.control(f"payments/{payment_of(stripe)}/dispute", status=status, **given)


def reversal_events(stripe: StripeStandIn) -> list[dict[str, Any]]:
    """What the stand-in has told of refunds and disputes, oldest first."""
    told = [
        {name: event[name] for name in event if name != "deliveries"}
        for event in stripe.state()["events"]
        if event["type"].startswith(("refund.", "charge.refund", "charge.dispute."))
    ]
    return told[::-1]


def deliver_all(events: list[dict[str, Any]]) -> None:
    for event in events:
        assert deliver(event).status_code == 200


def balance_of(user: User) -> int:
    return TokenAccount.objects.get(user=user).balance


def movements(purchase: Purchase) -> list[tuple[int, int | None]]:
    """Tokens and cents of each row of the ledger that took or gave back."""
    rows = TokenTransaction.objects.filter(purchase=purchase, type="refund").order_by("sequence")
    return list(rows.values_list("amount", "paid_cents"))


def spend(user: User, tokens: int) -> None:
    operation = Operation("chat", "openai", "gpt-6-luna", multiplier=Decimal(1))
    ledger.deduct_tokens(user_id=user.pk, tokens=tokens, operation=operation, pools=TokenPools(input_tokens=tokens))


def notices(user: User) -> list[str]:
    return list(Notification.objects.filter(user=user).order_by("id").values_list("kind", flat=True))


# --- Refunds --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("first", ["refund.created", "charge.refunded", "charge.dispute.created"])
def test_refund_or_dispute_before_the_credit(stripe: StripeStandIn, paid: Purchase, alice: User, first: str) -> None:
    """4: parked, applied after the credit, same end state."""
    if first.startswith("charge.dispute"):
        dispute(stripe, amount=500)
    else:
        refund(stripe, 500)
    deliver_all([event_of(stripe, first)])
    parked = PaymentReversal.objects.get()
    assert (parked.purchase_id, parked.amount_cents) == (None, 500)
    assert balance_of(alice) == BONUS_TOKENS
    deliver_all([event_of(stripe, COMPLETED)])
    assert movements(paid) == [(-50_000, -500)]
    parked.refresh_from_db()
    assert parked.purchase_id == paid.pk
    deliver_all(reversal_events(stripe) * 2)
    assert movements(paid) == [(-50_000, -500)]
    assert balance_of(alice) == BONUS_TOKENS + 100_000


@pytest.mark.parametrize(
    ("cents", "tokens"), [(None, 150_000), (1_500, 150_000), (500, 50_000), (1, 100), (1_499, 149_900)]
)
def test_full_and_partial_refunds(
    stripe: StripeStandIn, bought: Purchase, alice: User, cents: int | None, tokens: int
) -> None:
    """41: a proportional debit, once per refund id."""
    refund(stripe, cents)
    for _ in range(3):
        deliver_all(reversal_events(stripe))
    assert movements(bought) == [(-tokens, -(cents or STARTER_CENTS))]
    assert balance_of(alice) == BONUS_TOKENS + STARTER_TOKENS - tokens
    account = TokenAccount.objects.get(user=alice)
    assert account.lifetime_spent_cents == STARTER_CENTS - (cents or STARTER_CENTS)
    assert (account.status, account.lifetime_purchased_tokens) == ("active", STARTER_TOKENS)
    assert notices(alice).count("refund_applied") == 1


def test_refund_of_spent_tokens(stripe: StripeStandIn, buyer: Client, bought: Purchase, alice: User) -> None:
    """42: a debt, never clamped; the account is suspended; the next purchase pays it and reactivates."""
    spend(alice, 155_000)
    refund(stripe)
    deliver_all(reversal_events(stripe))
    account = TokenAccount.objects.get(user=alice)
    assert (account.balance, account.status, account.status_reason) == (-145_000, "suspended", "debt")
    with pytest.raises(ledger.AccountNotActive):
        ledger.reserve_tokens(
            user_id=alice.pk,
            tokens=1,
            operation=Operation("chat", "openai", "gpt-6-luna", multiplier=Decimal(1)),
            idempotency_key="one",
            lifetime_seconds=60,
        )
    verify_books()
    again = buy(stripe, buyer)
    deliver_all(events_of(stripe, COMPLETED))
    assert purchase_state(again) == "paid"
    account.refresh_from_db()
    assert (account.balance, account.status, account.status_reason) == (5_000, "active", "")


@pytest.mark.parametrize("seed", range(3))
def test_several_partial_refunds(stripe: StripeStandIn, bought: Purchase, alice: User, seed: int) -> None:
    """43: cumulative sums, in any order: what is taken never exceeds the credit, and in the end it is all of it."""
    for cents in (333, 333, 333, 501):
        refund(stripe, cents)
    events = reversal_events(stripe) * 2
    random.Random(seed).shuffle(events)  # noqa: S311 – chance, no secret
    for event in events:
        deliver_all([event])
        taken = -sum(tokens for tokens, _ in movements(bought))
        assert 0 <= taken <= STARTER_TOKENS
        verify_books()
    assert balance_of(alice) == BONUS_TOKENS
    assert sum(cents or 0 for _, cents in movements(bought)) == -STARTER_CENTS


def test_rounding_is_down_and_exact_at_the_end(stripe: StripeStandIn, buyer: Client, alice: User) -> None:
    """43: tokens that do not divide by cents."""
    TokenPricing.objects.filter(name="Starter").update(tokens=100_001)
    purchase = buy(stripe, buyer)
    deliver_all([event_of(stripe, COMPLETED)])
    for cents in (7, 700, 793):
        refund(stripe, cents)
    deliver_all(reversal_events(stripe))
    assert [tokens for tokens, _ in movements(purchase)] != []
    assert sum(tokens for tokens, _ in movements(purchase)) == -100_001
    assert balance_of(alice) == BONUS_TOKENS


def test_failed_refund(stripe: StripeStandIn, bought: Purchase, alice: User) -> None:
    """44: the debit is reversed once, whatever comes again or late."""
    made = refund(stripe, 600)
    before = reversal_events(stripe)
    deliver_all(before)
    stripe.control(f"refunds/{made['id']}/fail")
    deliver_all(reversal_events(stripe) * 2)
    deliver_all([changed(event) for event in before])  # late, under other ids: the failure is final
    assert movements(bought) == [(-60_000, -600), (60_000, 600)]
    assert balance_of(alice) == BONUS_TOKENS + STARTER_TOKENS
    assert TokenAccount.objects.get(user=alice).lifetime_spent_cents == STARTER_CENTS
    assert notices(alice).count("refund_failed") == 1


def test_refund_switches_auto_recharge_off(stripe: StripeStandIn, bought: Purchase, alice: User) -> None:
    """Whoever gets money back is not charged for the same again a minute later."""
    TokenAccount.objects.filter(user=alice).update(auto_recharge_enabled=True, auto_recharge_package=bought.package)
    refund(stripe, STARTER_CENTS)
    deliver_all(reversal_events(stripe))
    assert not TokenAccount.objects.get(user=alice).auto_recharge_enabled
    assert notices(alice).count("auto_recharge_switched_off") == 1


def test_refund_that_fails_before_we_hear_of_it(stripe: StripeStandIn, bought: Purchase) -> None:
    """44: no movement at all."""
    made = refund(stripe, 600)
    stripe.control(f"refunds/{made['id']}/fail")
    deliver_all(reversal_events(stripe)[::-1])
    assert movements(bought) == []


@pytest.mark.parametrize("order", [["refund.created", "charge.refunded"], ["charge.refunded", "refund.created"]])
def test_one_refund_by_two_events(stripe: StripeStandIn, bought: Purchase, order: list[str]) -> None:
    """45: one debit."""
    refund(stripe, 500)
    deliver_all([event_of(stripe, type) for type in order])
    assert movements(bought) == [(-50_000, -500)]
    assert [state_of(event_of(stripe, type)) for type in order] == ["processed"] * 2


def test_charge_refunded_alone(stripe: StripeStandIn, bought: Purchase) -> None:
    """45: it carries no refunds any more; Stripe is asked for them, and each counts once."""
    refund(stripe, 500)
    refund(stripe, 300)
    newest, oldest = events_of(stripe, "charge.refunded")
    assert "refunds" not in newest["data"]["object"]
    deliver_all([oldest, newest])
    assert sum(tokens for tokens, _ in movements(bought)) == -80_000
    assert PaymentReversal.objects.count() == 2


def test_charge_refunded_while_stripe_is_away(stripe: StripeStandIn, bought: Purchase) -> None:
    """45: not lost: refused, kept, and handled when it comes again or is replayed."""
    refund(stripe, 500)
    event = event_of(stripe, "charge.refunded")
    stripe.control("faults", kind="429", path_prefix="/v1/refunds", count=1)
    assert deliver(event).status_code == 500
    assert (state_of(event), movements(bought)) == ("failed", [])
    webhooks.handle_again(StripeEvent.objects.get(event_id=event["id"]))
    assert (state_of(event), movements(bought)) == ("processed", [(-50_000, -500)])


@pytest.mark.parametrize("version", ["2024-06-20", "2025-03-31.basil"])
def test_refund_and_dispute_events_of_other_api_versions(stripe: StripeStandIn, bought: Purchase, version: str) -> None:
    """19: asked for anew in our version, whatever the event says."""
    refund(stripe, 500)
    stripe.control(f"payments/{payment_of(stripe)}/dispute", amount=200)
    misleading = {"amount": 1_500, "status": "lost"}
    for type in ("refund.created", "charge.refund.updated", "refund.updated"):
        deliver_all([changed(event_of(stripe, "refund.created"), misleading, type=type, api_version=version)])
    # Before 2022-11-15 a charge carried its refunds.
    embedded = {"refunds": {"object": "list", "data": [{"id": "re_other", "amount": 1_500}]}}
    deliver_all([changed(event_of(stripe, "charge.refunded"), embedded, api_version=version)])
    deliver_all([changed(event_of(stripe, "charge.dispute.created"), misleading, api_version=version)])
    assert sum(tokens for tokens, _ in movements(bought)) == -70_000
    assert set(StripeEvent.objects.values_list("state", flat=True)) == {"processed"}


# --- Disputes -------------------------------------------------------------------------------------------------------


def switch_auto_recharge_on(user: User) -> None:
    TokenAccount.objects.filter(user=user).update(
        auto_recharge_enabled=True, auto_recharge_package=TokenPricing.objects.get(name="Starter")
    )


@pytest.mark.parametrize("outcome", ["won", "lost"])
def test_dispute_opened_and_closed(stripe: StripeStandIn, bought: Purchase, alice: User, outcome: str) -> None:
    """46: clawed back and auto-recharge off; won: given back once; lost: final."""
    switch_auto_recharge_on(alice)
    opened = dispute(stripe)
    deliver_all(reversal_events(stripe) * 2)
    assert movements(bought) == [(-STARTER_TOKENS, -STARTER_CENTS)]
    account = TokenAccount.objects.get(user=alice)
    assert (account.balance, account.auto_recharge_enabled) == (BONUS_TOKENS, False)
    assert "disputed" in account.auto_recharge_last_outcome
    assert [kind for kind in notices(alice) if kind != "purchase_confirmed"] == [
        "auto_recharge_switched_off",
        "dispute_opened",
    ]
    stripe.control(f"disputes/{opened['id']}/close", outcome=outcome)
    events = reversal_events(stripe)
    deliver_all([*events, *(changed(event) for event in events)])
    given_back = [(STARTER_TOKENS, STARTER_CENTS)] if outcome == "won" else []
    assert movements(bought) == [(-STARTER_TOKENS, -STARTER_CENTS), *given_back]
    account.refresh_from_db()
    assert (account.auto_recharge_enabled, account.status) == (False, "active")
    assert notices(alice).count("dispute_closed") == 1


@pytest.mark.parametrize("status", ["warning_needs_response", "prevented"])
def test_dispute_without_money(stripe: StripeStandIn, bought: Purchase, alice: User, status: str) -> None:
    """46: an inquiry or a prevented dispute moves nothing and switches nothing off."""
    switch_auto_recharge_on(alice)
    opened = dispute(stripe, status)
    deliver_all(reversal_events(stripe))
    if status.startswith("warning"):
        stripe.control(f"disputes/{opened['id']}/close")
        deliver_all(reversal_events(stripe))
    assert movements(bought) == []
    assert TokenAccount.objects.get(user=alice).auto_recharge_enabled
    assert notices(alice) == ["purchase_confirmed"]


def test_inquiry_that_becomes_a_dispute(stripe: StripeStandIn, bought: Purchase) -> None:
    """46: an event of the inquiry that comes late gives nothing back."""
    dispute(stripe, "warning_needs_response")
    inquiry = event_of(stripe, "charge.dispute.created")
    deliver_all([inquiry, changed(inquiry, {"status": "needs_response"}, type="charge.dispute.updated")])
    deliver_all([changed(inquiry, {"status": "warning_under_review"}, type="charge.dispute.updated")])
    assert movements(bought) == [(-STARTER_TOKENS, -STARTER_CENTS)]
    deliver_all([changed(inquiry, {"status": "won"}, type="charge.dispute.closed")])
    assert [tokens for tokens, _ in movements(bought)] == [-STARTER_TOKENS, STARTER_TOKENS]


@pytest.mark.parametrize("closed_first", [True, False])
@pytest.mark.parametrize("seed", [None, 1, 2, 3])
def test_what_was_over_begins_anew(
    stripe: StripeStandIn, bought: Purchase, alice: User, *, closed_first: bool, seed: int | None
) -> None:
    """46: an inquiry, closed or not, becomes a dispute and is lost: taken back, whatever comes in which order, doubled
    and late; reconciliation finds nothing more."""
    opened = dispute(stripe, "warning_needs_response")
    if closed_first:
        stripe.control(f"disputes/{opened['id']}/close")
    before = reversal_events(stripe)
    deliver_all(before)
    assert movements(bought) == []
    stripe.control(f"disputes/{opened['id']}/escalate")
    stripe.control(f"disputes/{opened['id']}/close", outcome="lost")
    events = reversal_events(stripe)[len(before) :]
    late = [changed(event) for event in before]
    if seed is not None:
        events = [*events, *late] * 2
        random.Random(seed).shuffle(events)  # noqa: S311 – chance, no secret
    deliver_all([*events, *late])
    assert movements(bought) == [(-STARTER_TOKENS, -STARTER_CENTS)]
    assert PaymentReversal.objects.get().status == "lost"
    report = reconcile.reconcile(since=timezone.now() - timedelta(days=1))
    assert (report.healed, report.differing) == ([], [])


def test_an_old_closed_inquiry_is_looked_at_again(stripe: StripeStandIn, bought: Purchase) -> None:
    """29, 46: its events were lost, and it began before reconciliation's walk."""
    opened = dispute(stripe, "warning_needs_response")
    stripe.control(f"disputes/{opened['id']}/close")
    deliver_all(reversal_events(stripe))
    stripe.control(f"disputes/{opened['id']}/escalate")
    report = reconcile.reconcile(since=timezone.now() + timedelta(days=1))
    assert [drift.kind for drift in report.healed] == ["dispute_needs_response"]
    assert movements(bought) == [(-STARTER_TOKENS, -STARTER_CENTS)]


@pytest.mark.parametrize(
    ("status", "booked", "taken_cents"),
    [
        ("prevented", [-1_500], 1_500),
        ("prevented", [-500], 500),
        ("prevented", [], 0),
        ("warning_closed", [-1_500], 1_500),
        ("warning_needs_response", [], 0),
        ("needs_response", [], 1_500),  # its booking follows
        ("under_review", [-1_500, 1_500], 0),
        ("won", [-1_500], 1_500),  # decided, and not given back yet
        ("won", [-1_500, 1_500], 0),
        ("lost", [-1_500, 500], 1_000),
        ("of_tomorrow", [-1_500], 1_500),
        ("of_tomorrow", [], None),
    ],
)
def test_the_money_decides(
    stripe: StripeStandIn, bought: Purchase, alice: User, status: str, booked: list[int], taken_cents: int | None
) -> None:
    """46: what Stripe has withdrawn and not reinstated, whatever the state is called; any of it ends auto-recharge."""
    switch_auto_recharge_on(alice)
    dispute(stripe, "warning_needs_response")
    lines = [{"object": "balance_transaction", "amount": cents, "currency": "usd"} for cents in booked]
    event = changed(
        event_of(stripe, "charge.dispute.created"), {"status": status, "balance_transactions": lines, "id": "du_other"}
    )
    deliver_all([event, changed(event)])
    assert state_of(event) == ("aside" if taken_cents is None else "processed")
    assert sum(cents or 0 for _, cents in movements(bought)) == -(taken_cents or 0)
    assert balance_of(alice) == BONUS_TOKENS + STARTER_TOKENS - (taken_cents or 0) * 100
    assert TokenAccount.objects.get(user=alice).auto_recharge_enabled == (not taken_cents)


@pytest.mark.parametrize(
    ("moves", "told"),
    [
        (
            [{"status": "won", "reinstate": 1_500}],
            ["$15.00 of it have not come", "stands, and 150,000 tokens are back"],
        ),
        ([{"status": "lost"}], ["returned $15.00 to you. The tokens"]),
        (
            [{"status": "lost"}, {"status": "lost", "reinstate": 500}, {"status": "won", "reinstate": 1_000}],
            [
                "returned $15.00 to you. The tokens",
                "returned $10.00 of $15.00 to you, and 50,000 tokens are back",
                "stands, and 100,000 tokens are back",
            ],
        ),
        (
            [
                {"status": "under_review", "reinstate": 1_500},
                {"status": "needs_response", "withdraw": 1_500},
                {"status": "won", "reinstate": 1_500},
            ],
            [
                "Money of it came back to us, and 150,000",
                "150,000 tokens are held back",
                "$15.00 of it have not come",
                "stands, and 150,000 tokens are back",
            ],
        ),
    ],
)
def test_what_is_told_follows_the_money(
    stripe: StripeStandIn, bought: Purchase, alice: User, moves: list[dict[str, Any]], told: list[str]
) -> None:
    """46: of a dispute that is decided by more than one booking, each is told, once; also those that come later."""
    opened = dispute(stripe)
    deliver_all(reversal_events(stripe))
    known = len(reversal_events(stripe))
    for move in moves:
        stripe.control(f"disputes/{opened['id']}/move", **move)
        events = reversal_events(stripe)[known:]
        known += len(events)
        deliver_all([*events, *(changed(event) for event in events)])
    bodies = Notification.objects.filter(user=alice, kind__startswith="dispute").order_by("pk")
    texts = list(bodies.values_list("body", flat=True))[1:]
    assert len(texts) == len(told), texts
    for text, words in zip(texts, told, strict=True):
        assert words in text


def test_an_older_event_of_the_same_state(stripe: StripeStandIn, bought: Purchase) -> None:
    """41, 46: it does not set an amount back, of a refund neither."""
    made, opened = refund(stripe, 300), dispute(stripe, amount=700)
    older = changed(event_of(stripe, "charge.dispute.created"), {"amount": 200})
    older_refund = changed(event_of(stripe, "refund.created"), {"amount": 100})
    deliver_all([older, older_refund])  # as far as we know, this is how they stand
    assert sum(tokens for tokens, _ in movements(bought)) == -30_000
    deliver_all([*reversal_events(stripe), changed(older), changed(older_refund)])
    assert sum(tokens for tokens, _ in movements(bought)) == -100_000
    amounts = dict(PaymentReversal.objects.values_list("stripe_id", "amount_cents"))
    assert amounts == {opened["id"]: 700, made["id"]: 300}


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (("won", 0, 1_500), ("needs_response", 1_500, 0)),  # arbitration
        (("under_review", 0, 1_500), ("needs_response", 1_500, 0)),  # given back for as long as it is looked at
        (("lost", 0, 700), ("under_review", 700, 0)),
    ],
)
@pytest.mark.parametrize("is_told", [True, False])
def test_another_round(
    stripe: StripeStandIn,
    bought: Purchase,
    *,
    first: tuple[str, int, int],
    second: tuple[str, int, int],
    is_told: bool,
) -> None:
    """46: withdrawn, given back and withdrawn again: what comes late of the first round gives nothing back, and
    reconciliation sees the second one where its events were lost."""

    def move(status: str, withdraw: int, reinstate: int) -> list[dict[str, Any]]:
        told = len(reversal_events(stripe))
        stripe.control(f"disputes/{opened['id']}/move", status=status, withdraw=withdraw, reinstate=reinstate)
        return reversal_events(stripe)[told:]

    opened = dispute(stripe)
    before = [*reversal_events(stripe), *move(*first)]
    deliver_all(before)
    assert sum(cents or 0 for _, cents in movements(bought)) == first[2] - STARTER_CENTS
    after = move(*second)
    if is_told:
        deliver_all(after)
    else:
        assert len(reconcile.reconcile(since=timezone.now() - timedelta(days=1)).healed) == 1
    deliver_all([changed(event) for event in before])
    assert sum(cents or 0 for _, cents in movements(bought)) == -STARTER_CENTS


def test_what_was_lost_is_given_back_after_all(stripe: StripeStandIn, bought: Purchase) -> None:
    """29, 46: months later, and the events were lost: reconciliation looks at it again."""
    opened = dispute(stripe)
    stripe.control(f"disputes/{opened['id']}/close", outcome="lost")
    deliver_all(reversal_events(stripe))
    stripe.control(f"disputes/{opened['id']}/move", status="won", reinstate=STARTER_CENTS)
    report = reconcile.reconcile(since=timezone.now() + timedelta(days=1))
    assert [drift.kind for drift in report.healed] == ["dispute_won"]
    assert sum(tokens for tokens, _ in movements(bought)) == 0


@pytest.mark.parametrize(
    ("currency", "booked", "taken_cents"),
    [
        ("eur", [(-1_610, None)], 1_500),
        ("eur", [(-1_610, None), (805, None)], 750),
        ("eur", [(-1_523, 1.0153), (1_498, 0.9987)], 0),  # all of it, at the rate of another day
        ("eur", [(-1_523, 1.0153), (1_550, 1.0333)], 0),
        ("jpy", [(-2_250, 150.0), (1_100, 146.667)], 750),
        ("jpy", [(-2_250, 150.0), (2_200, 146.667), (-2_190, 146.0)], 1_500),
    ],
)
def test_booked_in_the_currency_that_we_are_paid_out_in(
    stripe: StripeStandIn, bought: Purchase, currency: str, booked: list[tuple[int, float | None]], taken_cents: int
) -> None:
    """46: the part of what is disputed that is gone, whatever the rates of the days on which it was booked."""
    lines = [{"amount": amount, "currency": currency, "exchange_rate": rate} for amount, rate in booked]
    dispute(stripe)
    other = {"id": "du_other", "status": "under_review", "balance_transactions": lines}
    deliver_all([changed(event_of(stripe, "charge.dispute.created"), other)])
    assert sum(cents or 0 for _, cents in movements(bought)) == -taken_cents


@pytest.mark.parametrize("is_credited_first", [True, False])
def test_dispute_in_another_currency(
    stripe: StripeStandIn, paid: Purchase, alice: User, *, is_credited_first: bool
) -> None:
    """46: nobody knows which part it is: all tokens go, and a person is told."""
    dispute(stripe, currency="eur", amount=900)
    events = [event_of(stripe, COMPLETED), *reversal_events(stripe)]
    deliver_all(events if is_credited_first else events[::-1])
    deliver_all([changed(event) for event in events])
    assert sum(tokens for tokens, _ in movements(paid)) == -STARTER_TOKENS
    assert StripeEvent.objects.filter(type="charge.dispute.created", state="aside").exists()
    report = reconcile.reconcile(since=timezone.now() - timedelta(days=1))
    assert [drift.kind for drift in report.differing] == ["dispute_in_another_currency"]


def test_reversals_that_name_their_charge_alone(stripe: StripeStandIn, bought: Purchase, alice: User) -> None:
    """41, 46: the charge tells the payment, in events and in reconciliation."""
    refund(stripe, 400)
    deliver_all([changed(event_of(stripe, "refund.created"), {"payment_intent": None})])
    assert sum(tokens for tokens, _ in movements(bought)) == -40_000
    dispute(stripe, bare=1, amount=500)
    deliver_all([event_of(stripe, "charge.dispute.created")])
    assert sum(tokens for tokens, _ in movements(bought)) == -90_000
    report = reconcile.reconcile(since=timezone.now() - timedelta(days=1))
    assert (report.disputes, report.refunds, report.healed, report.differing) == (1, 1, [], [])


def test_dispute_and_refund_of_one_charge(stripe: StripeStandIn, bought: Purchase, alice: User) -> None:
    """47: never more than was paid; a dispute won gives back no more than the refund leaves."""
    refund(stripe, 500)
    opened = dispute(stripe, amount=STARTER_CENTS)  # of the whole, the refunded part with it
    deliver_all(reversal_events(stripe))
    assert sum(tokens for tokens, _ in movements(bought)) == -STARTER_TOKENS
    assert balance_of(alice) == BONUS_TOKENS
    stripe.control(f"disputes/{opened['id']}/close", outcome="won")
    deliver_all(reversal_events(stripe))
    assert balance_of(alice) == BONUS_TOKENS + 100_000


def test_refunded_inquiry_that_becomes_a_dispute(stripe: StripeStandIn, bought: Purchase, alice: User) -> None:
    """47: all of it refunded, and all of it disputed: taken once."""
    refund(stripe)
    refunded = reversal_events(stripe)
    created = {
        "id": "du_late",
        "object": "dispute",
        "amount": STARTER_CENTS,
        "currency": "usd",
        "status": "needs_response",
        "payment_intent": payment_of(stripe),
        "reason": "fraudulent",
    }
    disputed = changed(refunded[0], type="charge.dispute.created")
    disputed["data"]["object"] = created
    deliver_all([disputed, *refunded])
    assert movements(bought) == [(-STARTER_TOKENS, -STARTER_CENTS)]
    lost = changed(disputed, {"status": "lost"}, type="charge.dispute.closed")
    deliver_all([lost])
    assert movements(bought) == [(-STARTER_TOKENS, -STARTER_CENTS)]
    assert balance_of(alice) == BONUS_TOKENS


# --- Any order ------------------------------------------------------------------------------------------------------


def _random_history(stripe: StripeStandIn, chance: random.Random) -> None:
    """Refunds, failures and a dispute at Stripe, as chance has them."""
    for _ in range(chance.randint(1, 4)):
        made = refund(stripe, chance.randint(1, 300))
        if chance.random() < 0.4:
            stripe.control(f"refunds/{made['id']}/fail")
    if chance.random() < 0.7:
        status = chance.choice(["needs_response", "needs_response", "warning_needs_response", "prevented"])
        opened = dispute(stripe, status, amount=chance.randint(1, STARTER_CENTS))
        if status != "prevented" and chance.random() < 0.7:
            stripe.control(f"disputes/{opened['id']}/close", outcome=chance.choice(["won", "lost"]))


@pytest.mark.parametrize("seed", range(12))
def test_any_order_and_any_repetition_end_the_same(
    stripe: StripeStandIn, buyer: Client, alice: User, seed: int
) -> None:
    """4, 41, 43–47: shuffled and doubled, with the credit anywhere among them, as in order and once."""
    chance = random.Random(seed)  # noqa: S311 – chance, no secret
    purchase = buy(stripe, buyer)
    _random_history(stripe, chance)
    events = [*reversal_events(stripe), event_of(stripe, COMPLETED)] * 2
    chance.shuffle(events)
    deliver_all(events)

    state = stripe.state()
    gone_cents = sum(each["amount"] for each in state["refunds"] if each["status"] == "succeeded")
    gone_cents += sum(each["amount"] for each in state["disputes"] if each["status"] in ("needs_response", "lost"))
    returned_cents = min(gone_cents, STARTER_CENTS)
    assert sum(tokens for tokens, _ in movements(purchase)) == -(STARTER_TOKENS * returned_cents // STARTER_CENTS)
    assert sum(cents or 0 for _, cents in movements(purchase)) == -returned_cents
    assert {each.stripe_id: each.status for each in PaymentReversal.objects.all()} == {
        each["id"]: each["status"] for each in state["refunds"] + state["disputes"]
    }


@pytest.mark.django_db(transaction=True)
def test_stripes_own_deliveries(stripe: StripeStandIn, web: Server, buyer: Client, alice: User) -> None:
    """4, 41: over HTTP to the running product, in random order."""
    purchase = buy(stripe, buyer)
    refund(stripe, 500)
    stripe.control("deliveries/release", order="random", seed=7)
    assert movements(purchase) == [(-50_000, -500)]
    assert set(stripe.state()["deliveries"]) == {"delivered"}


# --- What is not understood -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("difference", [{"currency": "eur"}, {"status": "misplaced"}, {"amount": 0}])
def test_refunds_that_cannot_be_read(stripe: StripeStandIn, bought: Purchase, difference: dict[str, Any]) -> None:
    """21: kept aside for a person, and nothing moves."""
    refund(stripe, 500)
    event = changed(event_of(stripe, "refund.created"), difference)
    deliver_all([event])
    assert state_of(event) == "aside"
    assert movements(bought) == []
    assert not PaymentReversal.objects.exists()


def test_refund_of_a_charge_without_payment_intent(stripe: StripeStandIn, bought: Purchase) -> None:
    """18: not one of ours."""
    refund(stripe, 500)
    bare = event_of(stripe, "refund.created")
    event = changed(bare, {"payment_intent": None, "charge": None})
    unknown = changed(bare, {"payment_intent": None, "charge": "ch_of_another"})
    deliver_all([event, unknown])
    assert [state_of(each) for each in (event, unknown)] == ["ignored", "aside"]
    assert movements(bought) == []


def test_early_fraud_warning(stripe: StripeStandIn, bought: Purchase, alice: User) -> None:
    """17, 46: kept aside for a person with what they need to know, and nothing more is charged by itself; of another
    product's payment, ignored."""
    switch_auto_recharge_on(alice)
    mug = gateway._client().v1.payment_intents.create(
        {"amount": 900, "currency": "usd", "payment_method": "pm_card_visa", "confirm": True}
    )
    stripe.control(f"payments/{bought.stripe_payment_intent_id}/warn")
    stripe.control(f"payments/{mug.id}/warn")
    other, event = events_of(stripe, "radar.early_fraud_warning.created")
    bare = changed(event, {"payment_intent": None, "actionable": False})
    deliver_all([event, other, bare])
    assert [state_of(each) for each in (event, other, bare)] == ["aside", "ignored", "aside"]
    message = StripeEvent.objects.get(event_id=event["id"]).message
    assert "made_with_stolen_card" in message
    assert f"$15.00 of purchase {bought.pk}" in message
    assert movements(bought) == []
    account = TokenAccount.objects.get(user=alice)
    assert (account.auto_recharge_enabled, "without your consent" in account.auto_recharge_last_outcome) == (
        False,
        True,
    )
    assert notices(alice).count("auto_recharge_switched_off") == 1


@pytest.mark.parametrize("is_first", [True, False])
def test_a_card_that_its_bank_warned_of(
    stripe: StripeStandIn, bought: Purchase, buyer: Client, alice: User, *, is_first: bool
) -> None:
    """17: the warning may be quicker than the credit. The card is not kept, and nobody switches it on again."""
    tasks.remember_card(bought.pk)
    switch_auto_recharge_on(alice)
    again = buy(stripe, buyer, "5555555555554444")
    stripe.control(f"payments/{stripe.state()['payment_intents'][0]['id']}/warn")
    warning, credit = event_of(stripe, "radar.early_fraud_warning.created"), events_of(stripe, COMPLETED)[0]
    for event in (warning, credit) if is_first else (credit, warning):
        deliver_all([event])
        if event is credit:
            tasks.remember_card(again.pk)
    account = TokenAccount.objects.get(user=alice)
    assert (purchase_state(again), account.auto_recharge_enabled) == ("paid", False)
    assert account.card_last4 == ("4242" if is_first else "")  # the one before is not in doubt
    # Stripe still has both, and names the newest.
    cards.refresh_card(user_id=alice.pk)
    account.refresh_from_db()
    assert account.card_last4 != "4444"


@pytest.mark.parametrize("reason", ["", "fraudulent", "unrecognized", "product_not_received"])
def test_the_number_of_a_card_that_is_not_trusted(
    stripe: StripeStandIn, bought: Purchase, buyer: Client, alice: User, bob: User, reason: str
) -> None:
    """17: a warning, or a dispute of fraud, is about the number: saved anew, or by somebody else, it is not kept; one
    that is kept all the same is not charged. A dispute about the goods says nothing of the card."""

    def kept_after(purchase: Purchase) -> str:
        deliver_all(events_of(stripe, COMPLETED))
        tasks.remember_card(purchase.pk)
        return TokenAccount.objects.get(pk=purchase.account_id).card_last4

    assert kept_after(buy(stripe, buyer)) == "4242"  # under another id than `bought`'s
    switch_auto_recharge_on(alice)
    kept = TokenAccount.objects.filter(user=alice).values("stripe_payment_method_id", "card_fingerprint")[0]
    payment = f"payments/{bought.stripe_payment_intent_id}"
    stripe.control(f"{payment}/dispute", reason=reason, amount=100) if reason else stripe.control(f"{payment}/warn")
    deliver_all(events_of(stripe, "charge.dispute.created" if reason else "radar.early_fraud_warning.created"))
    tasks.remember_card(bought.pk)  # of the dispute's payment only Stripe knows the card: a worker asks
    is_trusted = reason == "product_not_received"
    account = TokenAccount.objects.get(user=alice)
    assert (account.auto_recharge_enabled, account.card_last4) == (False, "4242" if is_trusted else "")
    cards.refresh_card(user_id=alice.pk)
    other = Client()
    other.force_login(bob)
    for client in (buyer, other):
        assert kept_after(buy(stripe, client)) == ("4242" if is_trusted else "")
    agreed = {"auto_recharge_price_cents": STARTER_CENTS, "auto_recharge_package_tokens": STARTER_TOKENS}
    TokenAccount.objects.filter(user=alice).update(
        **kept, **agreed, auto_recharge_threshold_tokens=10**9, auto_recharge_enabled=True
    )
    assert (recharge.trigger_auto_recharge(user_id=alice.pk) is not None) == is_trusted
    # Another number is another card; Stripe still has the others, and prefers the oldest.
    assert kept_after(buy(stripe, buyer, "5555555555554444")) == "4444"
    cards.refresh_card(user_id=alice.pk)
    assert TokenAccount.objects.get(user=alice).card_last4 == "4444"


def test_a_warning_whose_event_was_lost(stripe: StripeStandIn, bought: Purchase, alice: User) -> None:
    """17, 29: reconciliation finds it, once: another card that its owner charges since is not touched."""
    tasks.remember_card(bought.pk)
    switch_auto_recharge_on(alice)
    stripe.control(f"payments/{bought.stripe_payment_intent_id}/warn")
    account = TokenAccount.objects.get(user=alice)
    for kinds in (["fraud_warning"], []):
        report = reconcile.reconcile(since=timezone.now() - timedelta(days=1))
        assert [drift.kind for drift in report.healed] == kinds
        account.refresh_from_db()
        assert (account.auto_recharge_enabled, account.card_last4) == ((False, "") if kinds else (True, "4444"))
        TokenAccount.objects.filter(user=alice).update(stripe_payment_method_id="pm_new", card_last4="4444")
        switch_auto_recharge_on(alice)
    deliver_all([event_of(stripe, "radar.early_fraud_warning.created")])
    account.refresh_from_db()
    assert account.auto_recharge_enabled


def test_promotion_code(stripe: StripeStandIn, buyer: Client, alice: User, settings: Settings) -> None:
    """41: refunds are parts of what was paid, not of the price: all of it back takes all the tokens."""
    purchase = buy(stripe, buyer)
    settings.STRIPE_PROMOTION_CODES = True
    deliver_all([changed(event_of(stripe, COMPLETED), {"amount_total": 1_200})])
    purchase.refresh_from_db()
    assert (purchase.state, purchase.charged_cents, purchase.paid_total_cents) == ("paid", 1_200, 1_200)
    refund(stripe, 600)
    deliver_all(reversal_events(stripe))
    assert movements(purchase) == [(-75_000, -750)]
    refund(stripe, 600)
    deliver_all(reversal_events(stripe))
    assert balance_of(alice) == BONUS_TOKENS
    assert TokenAccount.objects.get(user=alice).lifetime_spent_cents == 0


# --- A superadmin refunds -------------------------------------------------------------------------------------------


@pytest.fixture
def superadmin(susan: User) -> Client:
    client = Client()
    client.force_login(susan)
    return client


def page_of(purchase: Purchase) -> str:
    return reverse("dashboard:purchase", args=[purchase.pk])


def confirmed(amount_cents: int, key: str | None = None, reason: str = "Asked nicely") -> dict[str, Any]:
    return {
        "confirmed": "yes",
        "amount_cents": amount_cents,
        "reason": reason,
        "request_key": key or uuid4().hex,
    }


def test_refund_by_a_superadmin(
    stripe: StripeStandIn, bought: Purchase, alice: User, susan: User, superadmin: Client
) -> None:
    """41: asked for, confirmed with amount and new balance, done once however often it is sent."""
    form = {"what": "amount", "amount": "5.00", "reason": " Asked\tnicely ", "request_key": uuid4().hex}
    answer = superadmin.post(page_of(bought), form)
    assert answer.status_code == 200
    text = answer.content.decode()
    assert "Refund $5.00?" in text
    assert "110,000 tokens" in text  # the new balance
    assert stripe.state()["refunds"] == []

    for _ in range(3):
        answer = superadmin.post(page_of(bought), confirmed(500, form["request_key"]), follow=True)
        assert b"$5.00 were refunded to alice@example.com" in answer.content
    (made,) = stripe.state()["refunds"]
    assert made["amount"] == 500
    assert movements(bought) == [(-50_000, -500)]
    reversal = PaymentReversal.objects.get()
    assert (reversal.stripe_id, reversal.status, reversal.reason) == (made["id"], "succeeded", "Asked nicely")
    assert reversal.requested_by == susan
    deliver_all(reversal_events(stripe))
    assert movements(bought) == [(-50_000, -500)]
    assert PaymentReversal.objects.count() == 1
    page = superadmin.get(page_of(bought)).content.decode()
    for words in ("Asked nicely", "susan@example.com", "$10.00 of it can go back", made["id"]):
        assert words in page


def test_unused_part(stripe: StripeStandIn, bought: Purchase, alice: User, superadmin: Client) -> None:
    """41: what is still there of the purchase's tokens, rounded down; its refund leaves no debt."""
    assert refund_requests.unused_cents(bought) == STARTER_CENTS
    spend(alice, 60_051)  # 99,949 are left
    assert refund_requests.unused_cents(bought) == 999
    form = {"what": "unused", "reason": "Gone", "request_key": uuid4().hex}
    assert b"Refund $9.99?" in superadmin.post(page_of(bought), form).content
    superadmin.post(page_of(bought), confirmed(999))
    assert balance_of(alice) == 49
    assert refund_requests.unused_cents(bought) == 0
    assert refund_requests.refundable_cents(bought) == 501
    assert superadmin.post(page_of(bought), form | {"request_key": uuid4().hex}).status_code == 400


def test_refund_that_leaves_a_debt_says_so(bought: Purchase, alice: User, superadmin: Client) -> None:
    """42"""
    spend(alice, 160_000)
    form = {"what": "full", "reason": "Gone", "request_key": uuid4().hex}
    text = superadmin.post(page_of(bought), form).content.decode()
    assert "-150,000 tokens" in text
    assert "in debt" in text


@pytest.mark.parametrize(
    "fields",
    [
        {"amount": ""},
        {"amount": "0"},
        {"amount": "-1"},
        {"amount": "15.01"},
        {"amount": "1e400"},
        {"amount": "NaN"},
        {"amount": "１２"},
        {"amount": "5", "reason": "  "},
        {"amount": "5", "reason": "\0"},
        {"amount": "5", "what": "everything"},
        {"amount": "5", "request_key": ""},
    ],
)
def test_refund_forms_that_are_refused(
    stripe: StripeStandIn, bought: Purchase, superadmin: Client, fields: dict[str, str]
) -> None:
    """56, 57: a form error, nothing written."""
    form = {"what": "amount", "reason": "Gone", "request_key": uuid4().hex} | fields
    assert superadmin.post(page_of(bought), form).status_code == 400
    assert not PaymentReversal.objects.exists()


@pytest.mark.parametrize("amount_cents", ["0", "-5", "1501", "1.5", "x", str(2**63), "1e4"])
def test_confirmations_that_are_refused(
    stripe: StripeStandIn, bought: Purchase, superadmin: Client, amount_cents: str
) -> None:
    """56: also when the confirmation was tampered with."""
    form = confirmed(1) | {"amount_cents": amount_cents}
    assert superadmin.post(page_of(bought), form).status_code == 302
    assert not PaymentReversal.objects.exists()
    assert stripe.state()["refunds"] == []


def test_same_key_for_another_amount(stripe: StripeStandIn, bought: Purchase, superadmin: Client) -> None:
    """55: a conflict, nothing done."""
    superadmin.post(page_of(bought), confirmed(500, "one-and-the-same"))
    answer = superadmin.post(page_of(bought), confirmed(600, "one-and-the-same"), follow=True)
    assert b"already sent for another refund" in answer.content
    assert len(stripe.state()["refunds"]) == 1


def test_who_may_look_and_who_may_act(stripe: StripeStandIn, bought: Purchase, buyer: Client, adam: User) -> None:
    """63, 64: admins look, users and strangers do not, and nobody but a superadmin moves anything."""
    admin = Client()
    admin.force_login(adam)
    page = admin.get(page_of(bought))
    assert page.status_code == 200
    assert b"Refund this purchase" not in page.content
    for form in (confirmed(500), {"what": "full", "reason": "Mine", "request_key": uuid4().hex}):
        assert admin.post(page_of(bought), form).status_code == 403
        assert buyer.post(page_of(bought), form).status_code == 403
    assert buyer.get(page_of(bought)).status_code == 403
    assert Client().get(page_of(bought)).status_code == 302
    assert admin.get(reverse("dashboard:purchase", args=[10**9])).status_code == 404
    with pytest.raises(refund_requests.RefundNotAllowed):
        refund_requests.request_refund(
            purchase_id=bought.pk, amount_cents=1, reason="x", requested_by_id=adam.pk, request_key="forged-role"
        )
    assert not PaymentReversal.objects.exists()


@pytest.mark.parametrize("state", ["open", "failed"])
def test_purchase_that_was_not_paid(stripe: StripeStandIn, paid: Purchase, superadmin: Client, state: str) -> None:
    """41: there is nothing to refund."""
    Purchase.objects.update(state=state)
    assert b"Refund this purchase" not in superadmin.get(page_of(paid)).content
    answer = superadmin.post(page_of(paid), confirmed(500), follow=True)
    assert b"Nothing is left of this purchase to refund" in answer.content


def test_stripe_refuses_the_refund(stripe: StripeStandIn, bought: Purchase, superadmin: Client) -> None:
    """46: a disputed charge cannot be refunded; the request is closed, the superadmin told."""
    dispute(stripe, amount=100)
    answer = superadmin.post(page_of(bought), confirmed(500), follow=True)
    assert b"Stripe refused the refund" in answer.content
    assert PaymentReversal.objects.get().status == "refused"
    assert movements(bought) == []
    assert refund_requests.refundable_cents(bought) == STARTER_CENTS


@pytest.mark.parametrize("count", [1, 3])
def test_stripe_refunds_and_does_not_answer(
    stripe: StripeStandIn, bought: Purchase, superadmin: Client, impatient: None, count: int
) -> None:
    """30, for refunds: one refund, one debit, whether the SDK's own retries or the sweep get the answer."""
    stripe.control("faults", kind="timeout_after", path_prefix="/v1/refunds", count=count, seconds=5)
    superadmin.post(page_of(bought), confirmed(500))
    PaymentReversal.objects.update(created_at=F("created_at") - refund_requests.RESUME_AFTER)
    tasks.resume_refunds()
    assert len(stripe.state()["refunds"]) == 1
    assert movements(bought) == [(-50_000, -500)]
    assert PaymentReversal.objects.get().status == "succeeded"
    assert tasks.resume_refunds() == 0


def test_stripe_is_away(stripe: StripeStandIn, bought: Purchase, superadmin: Client) -> None:
    """27, for refunds: nothing happened yet; said so, kept, finished by the sweep; the double submit waits, too."""
    stripe.control("faults", kind="429", path_prefix="/v1/refunds", count=2)
    for _ in range(2):
        answer = superadmin.post(page_of(bought), confirmed(500, "one-and-the-same"), follow=True)
        assert b"Stripe did not answer" in answer.content
    assert refund_requests.refundable_cents(bought) == 1_000  # what is asked for cannot be asked for again
    PaymentReversal.objects.update(created_at=F("created_at") - refund_requests.RESUME_AFTER)
    assert tasks.resume_refunds() == 1
    assert len(stripe.state()["refunds"]) == 1
    assert movements(bought) == [(-50_000, -500)]


@pytest.mark.parametrize(("kind", "refunded"), [("500_after", 1), ("500", 0)])
def test_stripe_has_a_fault(
    stripe: StripeStandIn, bought: Purchase, superadmin: Client, kind: str, refunded: int
) -> None:
    """27, for refunds: the fault is its answer under this key for ever; its list tells what it did."""
    stripe.control("faults", kind=kind, path_prefix="/v1/refunds", method="POST", count=3)
    superadmin.post(page_of(bought), confirmed(500))
    assert len(stripe.state()["refunds"]) == refunded
    assert len(movements(bought)) == refunded
    assert PaymentReversal.objects.get().status == ("succeeded" if refunded else "refused")


def test_request_too_old_for_its_key(stripe: StripeStandIn, bought: Purchase, superadmin: Client) -> None:
    """31, for refunds: only what Stripe has done counts; it is not asked to refund again."""
    stripe.control("faults", kind="429", path_prefix="/v1/refunds", count=1)
    superadmin.post(page_of(bought), confirmed(500))
    PaymentReversal.objects.update(created_at=timezone.now() - refund_requests.RETRY_WITHIN)
    assert tasks.resume_refunds() == 1
    assert stripe.state()["refunds"] == []
    assert PaymentReversal.objects.get().status == "refused"


def test_stripe_refuses_what_the_sweep_asks_again(
    stripe: StripeStandIn, bought: Purchase, superadmin: Client, susan: User
) -> None:
    """27, 46: the superadmin, who was told to wait, is told how it ended; once."""
    stripe.control("faults", kind="429", path_prefix="/v1/refunds", method="POST", count=1)
    answer = superadmin.post(page_of(bought), confirmed(500), follow=True)
    assert b"this page shows how it ended" in answer.content
    dispute(stripe, amount=100)
    PaymentReversal.objects.update(created_at=F("created_at") - refund_requests.RESUME_AFTER)
    assert [tasks.resume_refunds(), tasks.resume_refunds()] == [1, 0]
    message = Notification.objects.get(user=susan)
    assert (message.kind, message.link) == ("refund_refused", page_of(bought))
    assert "Stripe refused the refund" in message.body
    assert b"Refused" in superadmin.get(message.link).content


def test_the_event_is_quicker_than_the_answer(
    stripe: StripeStandIn, bought: Purchase, susan: User, superadmin: Client, impatient: None
) -> None:
    """45: the event finds the request that it answers; one row, one debit."""
    stripe.control("faults", kind="timeout_after", path_prefix="/v1/refunds", count=3, seconds=5)
    superadmin.post(page_of(bought), confirmed(500))
    deliver_all(reversal_events(stripe))
    reversal = PaymentReversal.objects.get()
    assert (reversal.status, reversal.requested_by, reversal.reason) == ("succeeded", susan, "Asked nicely")
    superadmin.post(page_of(bought), confirmed(500, str(reversal.request_key)))
    assert len(stripe.state()["refunds"]) == 1
    assert movements(bought) == [(-50_000, -500)]


def test_metadata_of_a_refund_tampered_with(stripe: StripeStandIn, bought: Purchase, superadmin: Client) -> None:
    """22: a refund that names a request of another amount is not that request."""
    stripe.control("faults", kind="429", path_prefix="/v1/refunds", count=1)
    superadmin.post(page_of(bought), confirmed(500))
    request = PaymentReversal.objects.get()
    refund(stripe, 300)
    for value in (str(request.pk), "９", "x", "9" * 40):
        event = changed(event_of(stripe, "refund.created"), {"metadata": {"reversal_id": value}})
        deliver_all([event])
    assert movements(bought) == [(-30_000, -300)]
    request.refresh_from_db()
    assert request.status == "requested"


def test_refunding_html(bought: Purchase, superadmin: Client, make_user: MakeUser) -> None:
    """72: a reason is text."""
    form = {"what": "full", "reason": "<b>x</b>", "request_key": uuid4().hex}
    text = superadmin.post(page_of(bought), form).content.decode()
    assert "&lt;b&gt;x&lt;/b&gt;" in text
    assert "<b>x</b>" not in text
