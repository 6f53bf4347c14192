"""The customer at Stripe behind an account, and the ids and keys that Stripe and we share. Numbers in docstrings are
rows of FAULTS.md."""

from datetime import timedelta
from typing import Any

import pytest
from django.db import connection
from django.test import Client
from django.utils import timezone

from accounts.models import User
from ai_ops import own_data
from billing import tasks
from billing.models import Installation, Purchase, TokenAccount, TokenPricing
from billing.payments import cards, customers, gateway, purchases, recharge, reconcile
from billing.upkeep import own_data as billing_data
from tests.conftest import MakeUser, show_password
from tests.payments import (
    ONE_STARTER,
    begin_checkout,
    buy,
    changed,
    checkout_form,
    credits_of,
    deliver,
    event_of,
    events_of,
    purchase_state,
    state_of,
)
from tests.servers import StripeStandIn

pytestmark = [pytest.mark.django_db, pytest.mark.usefixtures("books_stay_in_order", "events_wait")]

COMPLETED = "checkout.session.completed"


def account_of(user: User) -> TokenAccount:
    return TokenAccount.objects.select_related("user").get(user=user)


def at_stripe(email: str = "alice@example.com") -> list[str]:
    return [customer.id for customer in gateway.list_customers(email=email)]


def claim_key(what: str, *, number: int) -> None:
    """A second installation has used the key of a row that we are about to make."""
    key = "-".join(("postmate", Installation.read_name(), what, str(number)))
    gateway._client().v1.customers.create({"description": "Of another"}, {"idempotency_key": key})


def next_purchase_id() -> int:
    with connection.cursor() as cursor:
        cursor.execute("SELECT last_value + is_called::int FROM billing_purchase_id_seq")
        return int(cursor.fetchone()[0])


def saved_card(user: User, **fields: Any) -> None:
    """Auto-recharge is on, and due."""
    on = {
        "auto_recharge_enabled": True,
        "auto_recharge_package": TokenPricing.objects.get(name="Starter"),
        "auto_recharge_price_cents": 1_500,
        "auto_recharge_package_tokens": 150_000,
        "auto_recharge_threshold_tokens": 200_000,
    }
    TokenAccount.objects.filter(user=user).update(**on | fields)


# --- An id that Stripe has forgotten --------------------------------------------------------------------------------


@pytest.mark.parametrize("forgotten", ["deleted", "of the other mode", "price", "both"])
def test_what_stripe_has_forgotten(
    stripe: StripeStandIn, bought: Purchase, buyer: Client, alice: User, forgotten: str
) -> None:
    """37: the event was lost, or the id never was of this mode: forgotten at the same click, which opens a page."""
    if forgotten in ("deleted", "both"):
        gateway.delete_customer(str(account_of(alice).stripe_customer_id))
    if forgotten == "of the other mode":
        TokenAccount.objects.filter(user=alice).update(stripe_customer_id="cus_live")
    if forgotten in ("price", "both"):
        TokenPricing.objects.filter(name="Starter").update(stripe_price_id_usd="price_gone")
    saved_card(alice, stripe_payment_method_id="pm_old")
    again = buy(stripe, buyer)
    assert deliver(events_of(stripe, COMPLETED)[0]).status_code == 200
    assert purchase_state(again) == "paid"
    assert credits_of(alice) == ONE_STARTER * 2
    assert TokenPricing.objects.get(name="Starter").stripe_price_id_usd == ""
    if forgotten != "price":
        account = account_of(alice)
        assert account.stripe_customer_id in at_stripe()
        assert (account.stripe_payment_method_id, account.auto_recharge_enabled) == ("", False)
    # What was paid by the forgotten customer is still this account's.
    assert deliver(events_of(stripe, "payment_intent.succeeded")[-1]).status_code == 200
    assert reconcile.reconcile(since=timezone.now() - timedelta(days=1)).differing == []


@pytest.mark.parametrize(
    "other",
    [
        {"active": False},
        {"recurring": {"interval": "month"}},
        {"unit_amount": 1_900},
        {"currency": "eur"},
    ],
    ids=str,
)
def test_a_price_that_stripe_has_otherwise(
    stripe: StripeStandIn, buyer: Client, alice: User, other: dict[str, Any]
) -> None:
    """21, 37: archived, for subscriptions, or edited on one side alone: the same click opens a page at our price, so
    that nobody pays something else than they were shown, for which nothing would be credited."""
    made = {"unit_amount": 1_500, "currency": "usd", "product_data": {"name": "Starter"}} | other
    price = gateway._client().v1.prices.create(made)  # type: ignore[arg-type]
    TokenPricing.objects.filter(name="Starter").update(stripe_price_id_usd=price.id)
    buy(stripe, buyer)
    assert deliver(event_of(stripe, COMPLETED)).status_code == 200
    assert credits_of(alice) == ONE_STARTER
    assert TokenPricing.objects.get(name="Starter").stripe_price_id_usd == ""
    assert [each["status"] for each in stripe.state()["sessions"]].count("open") == 0


def test_a_forgotten_customer_has_no_card(bought: Purchase, buyer: Client, alice: User) -> None:
    """37: Stripe's page for the card, and looking the card up, forget them, too."""
    show_password(buyer)
    for ask in (
        lambda: buyer.post("/tokens/card/", follow=True),
        lambda: cards.refresh_card(user_id=alice.pk),
        lambda: recharge.trigger_auto_recharge(user_id=alice.pk),
    ):
        saved_card(alice, stripe_customer_id="cus_gone", stripe_payment_method_id="pm_gone")
        ask()
        account = account_of(alice)
        assert (account.stripe_customer_id, account.stripe_payment_method_id) == (None, "")
        assert not account.auto_recharge_enabled


def test_a_page_that_stripe_does_not_know(stripe: StripeStandIn, buyer: Client, alice: User) -> None:
    """29: begun in the other mode: closed, not asked about for ever."""
    purchase = begin_checkout(buyer)
    Purchase.objects.filter(pk=purchase.pk).update(
        stripe_session_id="cs_live_1", created_at=timezone.now() - timedelta(hours=1)
    )
    assert purchases.sweep_purchases() == 1
    assert purchase_state(purchase) == "expired"
    # The next click asks, and opens one that is there; Stripe out of reach, it leads to the page that we know.
    lost = begin_checkout(buyer)
    Purchase.objects.filter(pk=lost.pk).update(stripe_session_id="cs_live_2")
    opened = begin_checkout(buyer)
    assert (purchase_state(lost), opened.pk != lost.pk) == ("expired", True)
    stripe.control("faults", kind="429", path_prefix="/v1/checkout", count=3)
    assert begin_checkout(buyer).pk == opened.pk


def test_a_sale_of_another_installation(stripe: StripeStandIn, bought: Purchase) -> None:
    """17: on the same Stripe account, with a number that is also one of ours: passed over."""
    theirs = {"metadata": {"purchase_id": str(bought.pk), "installation": "theirs"}, "customer": "cus_theirs"}
    session = {"id": "cs_theirs", "payment_intent": "pi_theirs", "client_reference_id": str(bought.pk)}
    events = [
        changed(event_of(stripe, COMPLETED), theirs | session),
        changed(event_of(stripe, "payment_intent.succeeded"), theirs | {"id": "pi_theirs"}),
    ]
    for event in events:
        assert event["data"]["object"]["metadata"]["installation"] == "theirs"
        assert deliver(event).status_code == 200
        assert state_of(event) == "ignored"
        ours = changed(event, {"metadata": {"purchase_id": str(bought.pk), "installation": Installation.read_name()}})
        assert deliver(ours).status_code == 200
        assert state_of(ours) == "aside"


# --- Idempotency keys -----------------------------------------------------------------------------------------------


def test_keys_name_the_installation(stripe: StripeStandIn, bought: Purchase, alice: User) -> None:
    """8: made once; a row of before keeps the key it began with."""
    name = Installation.read_name()
    assert name == Installation.read_name()
    keys = {event["request"]["idempotency_key"] for event in stripe.state()["events"]} - {None}
    assert f"postmate-{name}-customer-{account_of(alice).pk}-0" in keys
    assert all(key.startswith(f"postmate-{name}-") for key in keys)
    assert bought.stripe_key("checkout") == f"postmate-{name}-checkout-{bought.pk}"
    bought.installation = ""
    assert bought.stripe_key("checkout") == f"postmate-checkout-{bought.pk}"


def test_a_key_that_another_installation_has_used(
    stripe: StripeStandIn, buyer: Client, bought: Purchase, alice: User
) -> None:
    """30, 34: never told as a decline. A page opens under another key; auto-recharge stays on and tries again."""
    claim_key("checkout", number=next_purchase_id())
    again = buy(stripe, buyer)
    assert deliver(events_of(stripe, COMPLETED)[0]).status_code == 200
    assert purchase_state(again) == "paid"

    tasks.remember_card(again.pk)
    saved_card(alice, auto_recharge_threshold_tokens=400_000)
    claim_key("recharge", number=next_purchase_id())
    attempt = recharge.trigger_auto_recharge(user_id=alice.pk)
    assert attempt is not None
    assert (attempt.state, attempt.failure_code) == ("failed", "")
    account = account_of(alice)
    assert (account.auto_recharge_enabled, account.auto_recharge_failures) == (True, 0)
    assert account.auto_recharge_retry_at is not None
    TokenAccount.objects.filter(user=alice).update(auto_recharge_retry_at=None)
    attempt = recharge.trigger_auto_recharge(user_id=alice.pk)
    assert attempt is not None
    assert attempt.state == "paid"
    assert credits_of(alice) == ONE_STARTER * 3


def test_a_charge_that_was_made_with_other_parameters(stripe: StripeStandIn, bought: Purchase, alice: User) -> None:
    """30: an attempt begun by an older release, charged, and not answered: the conflict does not charge again."""
    tasks.remember_card(bought.pk)
    saved_card(alice)
    stripe.control("faults", kind="429", path_prefix="/v1/payment_intents", count=3)
    attempt = recharge.trigger_auto_recharge(user_id=alice.pk)
    assert attempt is not None
    assert attempt.state == "created"
    account = account_of(alice)
    stripe.control("faults/clear")
    gateway._client().v1.payment_intents.create(
        {
            "amount": 1_500,
            "currency": "usd",
            "customer": str(account.stripe_customer_id),
            "payment_method": account.stripe_payment_method_id,
            "off_session": True,
            "confirm": True,
            "metadata": {"purchase_id": str(attempt.pk)},
        },
        {"idempotency_key": attempt.stripe_key("recharge")},
    )
    Purchase.objects.filter(pk=attempt.pk).update(checked_at=None)
    recharge.sweep_auto_recharges()
    assert purchase_state(attempt) == "paid"
    assert credits_of(alice) == ONE_STARTER * 2
    assert stripe.state()["succeeded_charges"] == 2


def test_what_its_owner_cannot_mend_is_not_told_as_the_cards(
    stripe: StripeStandIn, bought: Purchase, alice: User
) -> None:
    """34, 37: Stripe refuses us, not the card: it stays on, with the card, and is tried again later."""
    tasks.remember_card(bought.pk)
    saved_card(alice)
    stripe.control("faults", kind="refused", path_prefix="/v1/payment_intents", method="POST", count=1)
    attempt = recharge.trigger_auto_recharge(user_id=alice.pk)
    assert attempt is not None
    assert attempt.state == "failed"
    account = account_of(alice)
    assert (account.auto_recharge_enabled, account.auto_recharge_failures, account.card_last4) == (True, 0, "4242")
    assert not any("card cannot" in said for said in (attempt.message, account.auto_recharge_last_outcome))
    assert recharge.trigger_auto_recharge(user_id=alice.pk) is None
    TokenAccount.objects.filter(user=alice).update(auto_recharge_retry_at=None)
    # The same answer, and the card is gone: that is its owner's to mend.
    gateway._client().v1.payment_methods.detach(account.stripe_payment_method_id)
    assert recharge.trigger_auto_recharge(user_id=alice.pk) is not None
    assert not account_of(alice).auto_recharge_enabled


def test_off_session_charges_name_the_card_alone(stripe: StripeStandIn, bought: Purchase, alice: User) -> None:
    """35: Stripe refuses a payment that might lead its owner to another page when nobody is there."""
    tasks.remember_card(bought.pk)
    saved_card(alice)
    recharge.trigger_auto_recharge(user_id=alice.pk)
    payment = stripe.state()["payment_intents"][0]
    assert payment["payment_method_types"] == ["card"]
    assert payment["automatic_payment_methods"] == {"enabled": True, "allow_redirects": "never"}


# --- Made once, told, erased ----------------------------------------------------------------------------------------


def test_two_tabs_make_one_customer(stripe: StripeStandIn, buyer: Client, alice: User) -> None:
    """28: both read an account without one; the second to come back uses the first one's."""
    one, other = account_of(alice), account_of(alice)
    assert customers.ensure_customer(one) == customers.ensure_customer(other)
    assert len(at_stripe()) == 1


@pytest.mark.parametrize("is_deleted_at_once", [True, False])
def test_none_is_left_of_who_goes(
    stripe: StripeStandIn, bought: Purchase, alice: User, make_user: MakeUser, *, is_deleted_at_once: bool
) -> None:
    """28: also one that no row names: of another key, or made by a crash. Other people's stay."""
    make_user("alicia")
    elsewhere = gateway._client().v1.customers.create({"email": "alice@example.com"}).id  # another product's
    second = account_of(alice)
    second.stripe_customer_id = None
    second.stripe_customer_tries = 1  # after a fault of Stripe's
    if not is_deleted_at_once:
        stripe.control("faults", kind="429", path_prefix="/v1/customers", method="DELETE", count=3)
    first = account_of(alice).stripe_customer_id
    assert customers.ensure_customer(second) == first
    stripe.control("faults/clear")
    assert len(at_stripe()) == (2 if is_deleted_at_once else 3)
    own_data.anonymize_user(user_id=alice.pk)
    assert tasks.sweep_customers() == 1
    assert at_stripe() == [elsewhere]
    assert (account_of(alice).stripe_customer_id, account_of(alice).stripe_customers_left) == (None, [])
    assert tasks.sweep_customers() == 0


@pytest.mark.parametrize("is_swept", [True, False])
def test_no_page_is_left_of_who_goes(stripe: StripeStandIn, buyer: Client, alice: User, *, is_swept: bool) -> None:
    """28: one that was replaced while Stripe could not be told is closed by the sweep, or before its buyer goes."""
    replaced = begin_checkout(buyer)
    TokenPricing.objects.filter(name="Starter").update(tokens=151_000)
    path = f"/v1/checkout/sessions/{replaced.stripe_session_id}/expire"
    stripe.control("faults", kind="429", path_prefix=path, method="POST", count=3)
    newer = begin_checkout(buyer)
    assert purchase_state(replaced) == "expired"
    if is_swept:
        stripe.control("faults/clear")
        Purchase.objects.update(created_at=timezone.now() - timedelta(minutes=5))
        assert (purchases.sweep_purchases(), purchase_state(newer)) == (1, "open")
    else:
        stripe.control("faults", kind="429", path_prefix=path, method="POST", count=9)
        with pytest.raises(billing_data.NotNow):
            own_data.anonymize_user(user_id=alice.pk)
        stripe.control("faults/clear")
        own_data.anonymize_user(user_id=alice.pk)
    assert gateway.retrieve_checkout_session(str(replaced.stripe_session_id)).status == "expired"
    assert stripe.pay(replaced.checkout_url).status_code != 303


def test_what_changes_here_is_told_to_stripe(
    stripe: StripeStandIn, bought: Purchase, alice: User, django_capture_on_commit_callbacks: Any
) -> None:
    """28: receipts go to the address that its owner has now; a lost task and a save that tells nobody are swept."""
    assert tasks.tell_customers() == 0
    with django_capture_on_commit_callbacks() as callbacks:
        alice.email = "alice@new.example.com"
        alice.save(update_fields=["email"])
    assert len(callbacks) == 1
    User.objects.filter(pk=alice.pk).update(name="Alice of Elsewhere")
    stripe.control("faults", kind="429", path_prefix="/v1/customers", count=3)
    assert tasks.tell_customers() == 0
    stripe.control("faults/clear")
    assert tasks.tell_customers() == 1
    assert tasks.tell_customers() == 0
    (updated,) = events_of(stripe, "customer.updated")
    told = updated["data"]["object"]
    assert (told["email"], told["name"]) == ("alice@new.example.com", "Alice of Elsewhere")
    assert at_stripe("alice@new.example.com") == [account_of(alice).stripe_customer_id]
    # A customer that is not there any more is forgotten, not told for ever.
    gateway.delete_customer(told["id"])
    User.objects.filter(pk=alice.pk).update(name="Alice")
    tasks.tell_customers()
    assert account_of(alice).stripe_customer_id is None
    assert tasks.tell_customers() == 0


@pytest.mark.parametrize("is_made_again", [True, False])
def test_none_is_left_at_an_address_of_before(
    stripe: StripeStandIn, buyer: Client, alice: User, impatient: None, *, is_made_again: bool
) -> None:
    """28: made at Stripe, not answered, and then the address changed."""
    stripe.control("faults", kind="timeout_after", path_prefix="/v1/customers", count=3, seconds=3)
    buyer.post("/tokens/checkout/", checkout_form())
    stripe.control("faults/clear")
    alice.email = "alice@new.example.com"
    alice.save(update_fields=["email"])
    tasks.tell_customers()
    assert (len(at_stripe()), account_of(alice).stripe_customer_id) == (1, None)
    if is_made_again:
        begin_checkout(buyer)
        assert len(at_stripe("alice@new.example.com")) == 1
    own_data.anonymize_user(user_id=alice.pk)
    tasks.sweep_customers()
    assert [*at_stripe(), *at_stripe("alice@new.example.com")] == []


def test_made_while_the_others_are_deleted(
    stripe: StripeStandIn, bought: Purchase, alice: User, monkeypatch: pytest.MonkeyPatch
) -> None:
    """28: a click that was under way when its owner left stores its customer just then."""
    own_data.anonymize_user(user_id=alice.pk)
    delete = gateway.delete_customer

    def delete_while_one_is_made(customer_id: str) -> None:
        delete(customer_id)
        monkeypatch.undo()
        late = gateway.create_customer(
            email="alice@example.com", name="", account_id=1, installation="x", idempotency_key="late"
        )
        TokenAccount.objects.filter(user=alice).update(stripe_customer_id=late)

    monkeypatch.setattr(gateway, "delete_customer", delete_while_one_is_made)
    assert tasks.sweep_customers() == 0
    assert len(at_stripe()) == 1
    assert tasks.sweep_customers() == 1
    assert at_stripe() == []


def test_the_address_that_is_last_here_is_last_at_stripe(
    stripe: StripeStandIn, bought: Purchase, alice: User, monkeypatch: pytest.MonkeyPatch
) -> None:
    """28: changed twice, and the first one arrives at Stripe last and is noted first: it is told anew."""
    pk, tell = account_of(alice).pk, gateway.update_customer

    def tell_and_be_overtaken(customer_id: str, *, email: str, name: str) -> None:
        monkeypatch.undo()
        tell(customer_id, email=email, name=name)
        User.objects.filter(pk=alice.pk).update(email="one@example.com")  # what the first call has read
        customers.tell_changes(account_id=pk)
        User.objects.filter(pk=alice.pk).update(email="two@example.com")

    User.objects.filter(pk=alice.pk).update(email="two@example.com")
    monkeypatch.setattr(gateway, "update_customer", tell_and_be_overtaken)
    customers.tell_changes(account_id=pk)
    assert at_stripe("one@example.com") == [account_of(alice).stripe_customer_id]
    assert tasks.tell_customers() == 1
    assert at_stripe("two@example.com") == [account_of(alice).stripe_customer_id]


@pytest.mark.parametrize("fault", ["timeout_after", "500_after"])
def test_an_address_whose_answer_was_lost(
    stripe: StripeStandIn, bought: Purchase, alice: User, impatient: None, fault: str
) -> None:
    """28: Stripe has taken it all the same. Back at the address of before, Stripe is told that one."""
    User.objects.filter(pk=alice.pk).update(email="wrong@example.com")
    stripe.control("faults", kind=fault, path_prefix="/v1/customers", method="POST", count=3, seconds=2)
    assert tasks.tell_customers() == 0
    stripe.control("faults/clear")
    assert at_stripe("wrong@example.com") == [account_of(alice).stripe_customer_id]
    User.objects.filter(pk=alice.pk).update(email="alice@example.com")
    assert (tasks.tell_customers(), tasks.tell_customers()) == (1, 0)
    assert at_stripe() == [account_of(alice).stripe_customer_id]


def test_an_address_that_stripe_does_not_take(stripe: StripeStandIn, buyer: Client, alice: User) -> None:
    """27, 28: its owner buys all the same, at the same click; nothing is told for ever, and none is left."""
    User.objects.filter(pk=alice.pk).update(email="alice@exämple.com")
    purchase = buy(stripe, buyer)
    assert deliver(event_of(stripe, COMPLETED)).status_code == 200
    assert purchase_state(purchase) == "paid"
    customer_id = str(account_of(alice).stripe_customer_id)
    assert gateway._client().v1.customers.retrieve(customer_id).email is None
    assert tasks.tell_customers() == 0
    for address, at_theirs in (("alice@new.example.com", "alice@new.example.com"), ("alice@nëw.example.com", None)):
        User.objects.filter(pk=alice.pk).update(email=address)
        assert (tasks.tell_customers(), tasks.tell_customers()) == (1, 0)
        assert gateway._client().v1.customers.retrieve(customer_id).email == at_theirs
    own_data.anonymize_user(user_id=alice.pk)
    tasks.sweep_customers()
    assert gateway._client().v1.customers.retrieve(customer_id).to_dict()["deleted"]


def test_a_customer_after_a_fault(stripe: StripeStandIn, buyer: Client) -> None:
    """27: Stripe would repeat its fault for a day: the next click has a new key."""
    stripe.control("faults", kind="500", path_prefix="/v1/customers", count=1)
    buyer.post("/tokens/checkout/", checkout_form())
    begin_checkout(buyer)
    assert len(at_stripe()) == 1
    assert event_of(stripe, "customer.created")
