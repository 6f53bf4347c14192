"""Stripe's events at /stripe/webhook/. Numbers in docstrings are rows of FAULTS.md."""

import json
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any
from unittest.mock import patch
from uuid import uuid4

import pytest
from django.conf import settings as project_settings
from django.test import Client
from django.utils import timezone
from pytest_django.fixtures import Settings

from accounts.models import User
from billing import ledger
from billing.models import Purchase, StripeEvent, TokenAccount, TokenTransaction
from billing.payments import gateway, webhooks
from tests.environment import WEBHOOK_SECRET
from tests.payments import (
    BONUS_TOKENS,
    ONE_STARTER,
    STARTER_TOKENS,
    begin_checkout,
    buy,
    changed,
    checkout_form,
    credits_of,
    deliver,
    deliver_bytes,
    event_of,
    events_of,
    purchase_state,
    sign,
    state_of,
)
from tests.servers import Server, StripeStandIn

pytestmark = [pytest.mark.django_db, pytest.mark.usefixtures("books_stay_in_order", "events_wait")]

COMPLETED = "checkout.session.completed"
SUCCEEDED = "payment_intent.succeeded"


@pytest.fixture
def completed(stripe: StripeStandIn, paid: Purchase) -> dict[str, Any]:
    return event_of(stripe, COMPLETED)


# --- What is credited -----------------------------------------------------------------------------------------------


def test_other_event_ids_for_one_payment(completed: dict[str, Any], alice: User) -> None:
    """2: one credit."""
    for _ in range(5):
        assert deliver(changed(completed)).status_code == 200
    assert credits_of(alice) == ONE_STARTER


@pytest.mark.parametrize("order", [[SUCCEEDED, COMPLETED], [COMPLETED, SUCCEEDED], [SUCCEEDED], [COMPLETED]])
def test_payment_and_session_events_in_any_order(
    stripe: StripeStandIn, paid: Purchase, alice: User, order: list[str]
) -> None:
    """3: credited once, whichever came, and the credit names the payment."""
    for type in order:
        assert deliver(event_of(stripe, type)).status_code == 200
    assert credits_of(alice) == ONE_STARTER
    intent_id = event_of(stripe, SUCCEEDED)["data"]["object"]["id"]
    assert TokenTransaction.objects.get(purchase=paid).stripe_payment_intent_id == intent_id
    assert Purchase.objects.get().stripe_payment_intent_id == intent_id


def test_completed_but_unpaid(stripe: StripeStandIn, completed: dict[str, Any], paid: Purchase, alice: User) -> None:
    """5: no credit."""
    assert deliver(changed(completed, {"payment_status": "unpaid"})).status_code == 200
    assert credits_of(alice) == []
    assert purchase_state(paid) == "processing"


@pytest.mark.parametrize("outcome", ["succeeded", "failed"])
def test_delayed_payment(stripe: StripeStandIn, buyer: Client, alice: User, outcome: str) -> None:
    """6: nothing until the bank has paid; then one credit, or the purchase has failed."""
    purchase = buy(stripe, buyer, "bank_debit")
    completed = event_of(stripe, COMPLETED)
    assert deliver(completed).status_code == 200
    assert purchase_state(purchase) == "processing"
    assert credits_of(alice) == []

    stripe.control(f"payments/{completed['data']['object']['payment_intent']}/settle", outcome=outcome)
    for type in (f"checkout.session.async_payment_{outcome}", SUCCEEDED, COMPLETED):
        for event in events_of(stripe, type):
            assert deliver(event).status_code == 200
    assert purchase_state(purchase) == ("paid" if outcome == "succeeded" else "failed")
    assert credits_of(alice) == (ONE_STARTER if outcome == "succeeded" else [])


def test_nothing_to_pay(stripe: StripeStandIn, completed: dict[str, Any], alice: User) -> None:
    """7: a promotion of 100 % has no payment intent; credited once, by the session."""
    free = {"payment_status": "no_payment_required", "payment_intent": None, "amount_total": 0}
    for _ in range(3):
        assert deliver(changed(completed, free)).status_code == 200
    assert [tokens for tokens, _ in credits_of(alice)] == [STARTER_TOKENS]


def test_the_payment_of_a_checkout_leaves_auto_recharge_alone(
    stripe: StripeStandIn, paid: Purchase, alice: User
) -> None:
    """3, 34: its page lets the buyer try again whatever became of a try; auto-recharge waits for what it waited for."""
    waits = {
        "auto_recharge_failures": 2,
        "auto_recharge_retry_at": timezone.now() + timedelta(hours=5),
        "auto_recharge_last_outcome": "The card was declined.",
    }
    TokenAccount.objects.filter(user=alice).update(**waits)
    succeeded = event_of(stripe, SUCCEEDED)
    for status in ("requires_payment_method", "requires_action", "processing", "canceled"):
        tried = changed(succeeded, {"status": status, "amount_received": 0}, type="payment_intent.payment_failed")
        assert deliver(tried).status_code == 200
        assert (state_of(tried), purchase_state(paid), credits_of(alice)) == ("processed", "open", [])
    assert deliver(succeeded).status_code == 200
    assert credits_of(alice) == ONE_STARTER
    assert TokenAccount.objects.values(*waits).get(user=alice) == waits


def test_expired_then_paid(completed: dict[str, Any], paid: Purchase, alice: User) -> None:
    """8: paid wins, and an expiry that comes late changes nothing."""
    expired = changed(completed, {"status": "expired", "payment_status": "unpaid"}, type="checkout.session.expired")
    assert deliver(expired).status_code == 200
    assert purchase_state(paid) == "expired"
    assert deliver(completed).status_code == 200
    assert deliver(changed(expired)).status_code == 200
    assert purchase_state(paid) == "paid"
    assert credits_of(alice) == ONE_STARTER


# --- Who may say so -------------------------------------------------------------------------------------------------


def _event(**fields: Any) -> bytes:
    event = {"id": "evt_1", "type": COMPLETED, "api_version": gateway.API_VERSION, "livemode": False}
    return json.dumps(event | {"data": {"object": {}}} | fields).encode()


@pytest.mark.parametrize(
    "signature",
    [
        pytest.param(lambda payload: "", id="9: none"),
        pytest.param(lambda payload: sign(payload, secret="whsec_guess"), id="9: another secret"),
        pytest.param(lambda payload: sign(payload + b" "), id="9: of another body"),
        pytest.param(lambda payload: sign(payload, scheme="v0"), id="9: v0"),
        pytest.param(lambda payload: f"t={int(time.time())},v1=", id="9: empty"),
        pytest.param(lambda payload: sign(payload).partition(",")[2], id="9: no time"),
        pytest.param(lambda payload: "t=soon,v1=1", id="9: no number"),
        pytest.param(lambda payload: sign(payload, secret=""), id="9: empty secret"),
        pytest.param(lambda payload: sign(payload, at=time.time() - 310), id="10: old"),
        pytest.param(lambda payload: sign(payload, at=time.time() + 310), id="11: from the future"),
        pytest.param(lambda payload: sign(payload, at=10**12), id="11: from the far future"),
        pytest.param(lambda payload: f"t={int(time.time())},v1=\u20ac\u00fc", id="14: not ASCII"),
        pytest.param(lambda payload: f"t={'9' * 5_000},v1=1", id="14: endless number"),
    ],
)
def test_bad_signatures(signature: Callable[[bytes], str]) -> None:
    """9, 10, 11, 14: 400, and nothing is written, though the event is a good one."""
    payload = _event(type="customer.created")
    answer = deliver_bytes(payload, signature(payload))
    assert (answer.status_code, answer.content) == (400, b"The signature does not match.")
    assert not StripeEvent.objects.exists()
    assert deliver_bytes(payload, sign(payload, at=time.time() - 290)).status_code == 200


def test_rotated_secret(completed: dict[str, Any], alice: User, settings: Settings) -> None:
    """12: while two secrets are valid, Stripe signs with both; either of ours will do."""
    payload = json.dumps(completed).encode()
    old = sign(payload, secret="whsec_old")
    both = f"{old},{sign(payload, secret='whsec_new').partition(',')[2]}"
    for ours in (["whsec_old"], ["whsec_new"], ["whsec_other", "whsec_new"]):
        settings.STRIPE_WEBHOOK_SECRETS = ours
        assert deliver_bytes(payload, both).status_code == 200
    assert deliver_bytes(payload, old).status_code == 400
    assert credits_of(alice) == ONE_STARTER


def test_no_secret(completed: dict[str, Any], alice: User, settings: Settings) -> None:
    """13: the address does not exist."""
    settings.STRIPE_WEBHOOK_SECRETS = []
    payload = json.dumps(completed).encode()
    for signature in (sign(payload), sign(payload, secret=""), ""):
        assert deliver_bytes(payload, signature).status_code == 404
    assert not StripeEvent.objects.exists()


@pytest.mark.parametrize(
    "payload",
    [
        pytest.param(b"\xff\xfe{}", id="14: not UTF-8"),
        pytest.param(b"", id="15: empty"),
        pytest.param(b"[]", id="15: list"),
        pytest.param(b"null", id="15: null"),
        pytest.param(b"{}", id="15: nothing in it"),
        pytest.param(b"{", id="15: cut off"),
        pytest.param(b"[" * 200_000, id="15: 200,000 deep"),
        pytest.param(_event(data={"object": json.loads("[" * 900 + "]" * 900)}), id="15: deep for a database"),
        pytest.param(_event(id=7), id="15: id of another type"),
        pytest.param(_event(id=None), id="15: no id"),
        pytest.param(_event(data=[]), id="15: data of another type"),
        pytest.param(_event(data={"object": None}), id="15: no object"),
        pytest.param(_event(extra="\0"), id="15: NUL"),
        pytest.param(_event(data={"object": {"\0": 1}}), id="15: NUL in a name"),
        pytest.param(_event(extra="\ud800"), id="15: half a surrogate pair"),
        pytest.param(_event(extra=[float("nan")]), id="15: NaN"),
        pytest.param(_event().replace(b"{}", b'{"amount_subtotal": 1e400}'), id="15: infinity"),
        pytest.param(_event().replace(b"{}", b'{"amount_subtotal": %s}' % (b"9" * 5_000)), id="15: endless number"),
    ],
)
def test_hostile_bodies(payload: bytes) -> None:
    """14, 15: signed with our secret and yet no event: 400, and nothing is written."""
    answer = deliver_bytes(payload, sign(payload))
    assert (answer.status_code, answer.content) in (
        (400, b"The body is no event."),
        (400, b"The signature does not match."),  # the signature is made over text
    )
    assert not StripeEvent.objects.exists()


def test_huge_body() -> None:
    """16: 413 before anything is hashed."""
    payload = b"x" * (project_settings.DATA_UPLOAD_MAX_MEMORY_SIZE + 1)
    with patch("hmac.new", side_effect=AssertionError("hashed")):
        assert deliver_bytes(payload, "t=1,v1=1").status_code == 413


@pytest.mark.django_db(transaction=True)
def test_huge_body_without_a_length(web: Server) -> None:
    """16: sent in chunks, so that no header tells its length."""
    chunks = (b"x" * 65_536 for _ in range(32))
    answer = web.post("/stripe/webhook/", content=chunks, headers={"Stripe-Signature": "t=1,v1=1"})
    assert answer.status_code == 413


# --- Whose it is ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fields", [{"livemode": True}, {"account": "acct_of_another"}])
def test_other_mode_or_account(completed: dict[str, Any], alice: User, fields: dict[str, Any]) -> None:
    """17: kept aside for a person, no credit."""
    event = changed(completed, **fields)
    assert deliver(event).status_code == 200
    assert state_of(event) == "aside"
    assert StripeEvent.objects.get(event_id=event["id"]).message
    assert credits_of(alice) == []


def test_event_types_that_do_not_concern_us(stripe: StripeStandIn, completed: dict[str, Any], alice: User) -> None:
    """18: 200, no effect."""
    (customer_created,) = events_of(stripe, "customer.created")
    for event in (customer_created, changed(completed, type="invoice.finalized"), changed(completed, type="x" * 500)):
        assert deliver(event).status_code == 200
        assert state_of(event) == "ignored"
    assert credits_of(alice) == []


def _sale_of_another_product(stripe: StripeStandIn, *, reference: str) -> None:
    """Somebody pays 15 dollars for something else on the same Stripe account."""
    session = gateway._client().v1.checkout.sessions.create(
        {
            "mode": "payment",
            "line_items": [
                {
                    "quantity": 1,
                    "price_data": {"currency": "usd", "unit_amount": 1_500, "product_data": {"name": "Mug"}},
                }
            ],
            "success_url": "https://shop.example.com/",
            "payment_intent_data": {"setup_future_usage": "off_session"},
            "client_reference_id": reference,
        }
    )
    assert stripe.pay(str(session.url)).status_code == 303


def test_another_product_on_the_same_stripe_account(stripe: StripeStandIn, buyer: Client, alice: User) -> None:
    """18: 200, no effect, and nobody is bothered."""
    purchase = begin_checkout(buyer)
    _sale_of_another_product(stripe, reference="mug-42")
    for type in (COMPLETED, SUCCEEDED):
        assert deliver(event_of(stripe, type)).status_code == 200
        assert state_of(event_of(stripe, type)) == "ignored"
    assert purchase_state(purchase) == "open"
    assert credits_of(alice) == []


def test_another_product_that_numbers_its_orders_as_we_do(stripe: StripeStandIn, buyer: Client, alice: User) -> None:
    """18, 20: their order has the number of a purchase whose session we do not know yet, and the same price."""
    purchase = begin_checkout(buyer)
    Purchase.objects.update(state="created", stripe_session_id=None)
    _sale_of_another_product(stripe, reference=str(purchase.pk))
    event = event_of(stripe, COMPLETED)
    assert deliver(event).status_code == 200
    assert state_of(event) == "aside"
    assert Purchase.objects.get().stripe_session_id is None
    assert credits_of(alice) == []


def test_other_api_version_is_fetched_anew(
    stripe: StripeStandIn, completed: dict[str, Any], paid: Purchase, alice: User
) -> None:
    """19: what the event says in its version is not read; Stripe is asked in ours."""
    misleading = {"payment_status": "unpaid", "amount_subtotal": 1, "client_reference_id": "0"}
    event = changed(completed, misleading, api_version="2024-06-20")
    assert deliver(event).status_code == 200
    assert state_of(event) == "processed"
    assert StripeEvent.objects.get(event_id=event["id"]).api_version == "2024-06-20"
    assert credits_of(alice) == ONE_STARTER
    # A payment whose fields have moved, and one that names no version at all.
    succeeded = event_of(stripe, SUCCEEDED)
    for version in ("2022-11-15", None):
        moved = changed(succeeded, api_version=version)
        del moved["data"]["object"]["amount_received"]
        assert deliver(moved).status_code == 200
        assert state_of(moved) == "processed"
    assert credits_of(alice) == ONE_STARTER


def test_other_api_version_while_stripe_is_away(stripe: StripeStandIn, completed: dict[str, Any], alice: User) -> None:
    """19: not read and not lost: refused, and the second delivery credits."""
    event = changed(completed, {"payment_status": "unpaid"}, api_version="2024-06-20")
    stripe.control("faults", kind="429", path_prefix="/v1/checkout/sessions", count=1)
    assert deliver(event).status_code == 500
    assert state_of(event) == "failed"
    assert credits_of(alice) == []
    assert deliver(event).status_code == 200
    assert state_of(event) == "processed"
    assert credits_of(alice) == ONE_STARTER


def test_kept_aside_is_not_the_end(
    stripe: StripeStandIn, completed: dict[str, Any], paid: Purchase, alice: User
) -> None:
    """19: first in a shape that cannot be read, then as it can be: the later delivery counts, and so does a replay."""
    unreadable = changed(completed, {"object": "checkout.session.v2"}, api_version="2030-01-01")
    for first in (unreadable | {"livemode": True}, unreadable):
        assert deliver(first).status_code == 200
        assert state_of(first) == "aside"
        assert StripeEvent.objects.get(event_id=first["id"]).livemode == first["livemode"]
    assert deliver(completed | {"id": unreadable["id"]}).status_code == 200
    assert state_of(unreadable) == "processed"
    assert credits_of(alice) == ONE_STARTER
    # Kept by a release that could not read it: asked for anew.
    kept = StripeEvent.objects.get(event_id=unreadable["id"])
    StripeEvent.objects.filter(pk=kept.pk).update(
        state="aside", payload=changed(completed, {"amount_subtotal": 1}, api_version="2024-06-20", id=kept.event_id)
    )
    kept.refresh_from_db()
    assert webhooks.handle_again(kept).state == "processed"
    assert credits_of(alice) == ONE_STARTER


@pytest.mark.parametrize("type", ["payment_method.detached", "customer.deleted"])
def test_kinds_that_have_no_version(stripe: StripeStandIn, completed: dict[str, Any], alice: User, type: str) -> None:
    """19, 37: only their id is read, so that a removed card is not used any more whatever version tells of it."""
    assert deliver(completed).status_code == 200
    customer_id = completed["data"]["object"]["customer"]
    TokenAccount.objects.filter(user=alice).update(
        stripe_customer_id=customer_id, stripe_payment_method_id="pm_old", card_last4="4242"
    )
    kind, id = ("payment_method", "pm_old") if type.startswith("payment") else ("customer", customer_id)
    event = changed(completed, type=type, api_version="2020-08-27")
    event["data"]["object"] = {"object": kind, "id": id}
    assert deliver(event).status_code == 200
    assert state_of(event) == "processed"
    assert TokenAccount.objects.get(user=alice).stripe_payment_method_id == ""


def _thin(type: str, kind: str = "", id: str = "") -> dict[str, Any]:
    """An event as an endpoint for thin ones gets it: no object, no version."""
    return {
        "id": f"evt_{uuid4().hex}",
        "object": "v2.core.event",
        "type": type,
        "created": "2026-11-30T11:00:00.000Z",
        "livemode": False,
        "context": None,
        "reason": None,
        "related_object": {"id": id, "type": kind, "url": f"/v1/{kind}s/{id}"} if kind else None,
    }


def test_thin_events(stripe: StripeStandIn, completed: dict[str, Any], alice: User) -> None:
    """18, 19: their object is asked for, or known by its id alone; what is about nothing of ours has no effect."""
    paid = _thin(f"v1.{COMPLETED}", "checkout.session", completed["data"]["object"]["id"])
    ping = _thin("v2.core.event_destination.ping")
    of_another = paid | {"id": "evt_of_another", "context": "acct_another"}
    for event, state in ((of_another, "aside"), (ping, "ignored"), (paid, "processed"), (completed, "processed")):
        assert deliver(event).status_code == 200
        assert state_of(event) == state
    assert credits_of(alice) == ONE_STARTER
    payment_id = event_of(stripe, SUCCEEDED)["data"]["object"]["id"]
    opened = stripe.control(f"payments/{payment_id}/dispute")
    assert deliver(_thin("v1.charge.dispute.created", "dispute", opened["id"])).status_code == 200
    assert TokenAccount.objects.get(user=alice).balance == BONUS_TOKENS
    TokenAccount.objects.filter(user=alice).update(stripe_payment_method_id="pm_old")
    assert deliver(_thin("v1.payment_method.detached", "payment_method", "pm_old")).status_code == 200
    assert TokenAccount.objects.get(user=alice).stripe_payment_method_id == ""


@pytest.mark.parametrize(
    ("type", "kind"),
    [
        ("charge.refunded", "charge"),
        ("charge.dispute.created", "dispute"),
        ("refund.updated", "refund"),
        ("payment_method.automatically_updated", "payment_method"),
        (SUCCEEDED, "payment_intent"),
    ],
)
def test_what_stripe_does_not_know(stripe: StripeStandIn, completed: dict[str, Any], type: str, kind: str) -> None:
    """20: an object that is not there any more: aside with that reason, not an error for days."""
    event = changed(completed, type=type, api_version="2024-06-20")
    event["data"]["object"] = {"object": kind, "id": "xx_gone", "payment_intent": "pi_gone"}
    assert deliver(event).status_code == 200
    assert state_of(event) == "aside"
    assert f"Stripe does not know {kind} xx_gone" in StripeEvent.objects.get(event_id=event["id"]).message


def test_no_purchase_of_ours(completed: dict[str, Any], alice: User) -> None:
    """20: kept aside for a person."""
    event = changed(completed, {"id": "cs_test_unknown", "client_reference_id": str(2**63)})
    assert deliver(event).status_code == 200
    assert state_of(event) == "aside"
    assert credits_of(alice) == []


def test_session_of_another_purchase(completed: dict[str, Any], alice: User) -> None:
    """20: it names a purchase of ours, which has another session."""
    event = changed(completed, {"id": "cs_test_unknown"})
    assert deliver(event).status_code == 200
    assert state_of(event) == "aside"
    assert credits_of(alice) == []


@pytest.mark.parametrize("difference", [{"amount_subtotal": 1_499}, {"currency": "eur"}, {"amount_subtotal": None}])
def test_paid_something_else_than_agreed(
    completed: dict[str, Any], paid: Purchase, alice: User, difference: dict[str, Any]
) -> None:
    """21: no credit, for review."""
    assert deliver(changed(completed, difference)).status_code == 200
    assert purchase_state(paid) == "review"
    assert credits_of(alice) == []


def test_payment_of_another_amount(stripe: StripeStandIn, paid: Purchase, alice: User) -> None:
    """21: the same by the payment's own event."""
    assert deliver(changed(event_of(stripe, SUCCEEDED), {"amount_received": 15})).status_code == 200
    assert purchase_state(paid) == "review"
    assert credits_of(alice) == []


def test_metadata_tampered_with(stripe: StripeStandIn, completed: dict[str, Any], alice: User, bob: User) -> None:
    """22: the purchase row decides, not what anybody wrote at Stripe."""
    other = Client()
    other.force_login(bob)
    purchase_of_bob = begin_checkout(other)
    tampered = {"metadata": {"purchase_id": str(purchase_of_bob.pk), "tokens": "7500000", "user_id": str(bob.pk)}}
    payment = changed(event_of(stripe, SUCCEEDED), tampered)
    assert deliver(payment).status_code == 200
    assert state_of(payment) == "aside"  # the customer who paid is not the purchase's
    assert deliver(changed(completed, tampered)).status_code == 200
    assert deliver(changed(event_of(stripe, SUCCEEDED), {"metadata": {}})).status_code == 200
    assert credits_of(alice) == ONE_STARTER
    assert credits_of(bob) == []
    assert purchase_state(purchase_of_bob) == "open"


def test_second_payment_of_one_purchase(stripe: StripeStandIn, completed: dict[str, Any], alice: User) -> None:
    """22: a payment made to look like that of a purchase already paid is no credit, and a person is told."""
    assert deliver(completed).status_code == 200
    second = changed(event_of(stripe, SUCCEEDED), {"id": "pi_second"})
    assert deliver(second).status_code == 200
    assert state_of(second) == "aside"
    assert credits_of(alice) == ONE_STARTER


# --- When we fail ---------------------------------------------------------------------------------------------------


def test_crash_after_the_credit(completed: dict[str, Any], paid: Purchase, alice: User) -> None:
    """25: the dedupe row, the credit and all else roll back together; the failure is kept; the retry credits."""
    credit = ledger.add_tokens

    def credit_and_crash(**arguments: Any) -> None:
        credit(**arguments)
        raise RuntimeError("The power is gone.")

    with patch("billing.ledger.add_tokens", credit_and_crash):
        assert deliver(completed).status_code == 500
    assert credits_of(alice) == []
    assert purchase_state(paid) == "open"
    kept = StripeEvent.objects.get(event_id=completed["id"])
    assert (kept.state, kept.attempts, kept.processed_at) == ("failed", 1, None)
    assert "The power is gone." in kept.message

    assert deliver(completed).status_code == 200
    kept.refresh_from_db()
    assert (kept.state, kept.attempts, kept.message) == ("processed", 2, "")
    assert credits_of(alice) == ONE_STARTER


def test_delivered_again_after_the_commit(completed: dict[str, Any], alice: User) -> None:
    """26: we crashed before the 200; the retry does nothing, also when the body was changed under its id."""
    assert deliver(completed).status_code == 200
    kept = StripeEvent.objects.values().get(event_id=completed["id"])
    again = changed(completed, {"amount_subtotal": 1}) | {"id": completed["id"]}
    for event in (completed, again):
        assert deliver(event).status_code == 200
    assert StripeEvent.objects.values().get(event_id=completed["id"]) == kept
    assert credits_of(alice) == ONE_STARTER


def test_credited_by_reference(stripe: StripeStandIn, buyer: Client, alice: User) -> None:
    """25: we crashed after Stripe had made the session and before its id was stored."""
    crash = RuntimeError("The power is gone.")
    with patch("billing.payments.gateway.read_checkout_session", side_effect=crash), pytest.raises(RuntimeError):
        buyer.post("/tokens/checkout/", checkout_form())
    purchase = Purchase.objects.get()
    assert (purchase.state, purchase.stripe_session_id) == ("created", None)
    (session,) = stripe.state()["sessions"]
    assert stripe.pay(session["url"]).status_code == 303
    assert deliver(event_of(stripe, COMPLETED)).status_code == 200
    assert credits_of(alice) == ONE_STARTER
    purchase.refresh_from_db()
    assert (purchase.state, purchase.stripe_session_id) == ("paid", session["id"])


def test_money_arrives_for_a_blocked_account(completed: dict[str, Any], alice: User) -> None:
    """60: a payment is recorded whatever the account's status, and does not lift a block."""
    account = ledger.get_account(user_id=alice.pk)
    type(account).objects.filter(pk=account.pk).update(status="blocked", status_reason="fraud")
    assert deliver(completed).status_code == 200
    assert credits_of(alice) == ONE_STARTER
    account.refresh_from_db()
    assert (account.status, account.status_reason) == ("blocked", "fraud")


def test_only_post_and_no_session(completed: dict[str, Any]) -> None:
    """62: Stripe has no CSRF token; nothing but POST is answered."""
    payload = json.dumps(completed).encode()
    strict = Client(enforce_csrf_checks=True)
    signed = {"stripe-signature": sign(payload, secret=WEBHOOK_SECRET)}
    assert strict.get("/stripe/webhook/", headers=signed).status_code == 405
    answer = strict.post("/stripe/webhook/", payload, content_type="application/json", headers=signed)
    assert answer.status_code == 200
    assert not answer.cookies
