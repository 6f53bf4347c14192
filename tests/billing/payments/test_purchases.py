"""Buying a package: the form, Stripe's faults, the success page, the sweeper. Numbers are rows of FAULTS.md."""

from collections.abc import Callable
from datetime import timedelta
from decimal import Decimal
from typing import TYPE_CHECKING
from unittest.mock import patch

import pytest
from django.db.models import F
from django.test import Client
from django.urls import reverse
from pytest_django.fixtures import Settings

from accounts.models import User
from billing import ledger, tasks
from billing.catalogue import packages
from billing.models import Purchase, TokenAccount, TokenPricing
from billing.payments import purchases
from billing.pricing import TokenPools
from tests.payments import (
    BONUS_TOKENS,
    ONE_STARTER,
    STARTER_TOKENS,
    begin_checkout,
    buy,
    checkout_form,
    credits_of,
    deliver,
    event_of,
    events_of,
    purchase_state,
    state_of,
)
from tests.servers import Server, StripeStandIn

if TYPE_CHECKING:
    from django.test.client import _MonkeyPatchedWSGIResponse as Answer

pytestmark = [pytest.mark.django_db, pytest.mark.usefixtures("books_stay_in_order", "events_wait")]

COMPLETED = "checkout.session.completed"
CHAT = ledger.Operation("chat", "openai", "gpt-6-luna", multiplier=Decimal(1))


def success_page(client: Client, purchase: Purchase) -> "Answer":
    return client.get(reverse("tokens:success", args=[purchase.pk]))


def make_older(**age: float) -> None:
    """As if that much time had passed since the purchases were made and last looked up."""
    Purchase.objects.update(created_at=F("created_at") - timedelta(**age), checked_at=None)


def sessions_of(stripe: StripeStandIn, purchase: Purchase) -> list[str]:
    return [each["id"] for each in stripe.state()["sessions"] if each["client_reference_id"] == str(purchase.pk)]


# --- Buying ---------------------------------------------------------------------------------------------------------


@pytest.mark.django_db(transaction=True)
@pytest.mark.parametrize("order", ["forward", "reverse"])
def test_buying_a_package(stripe: StripeStandIn, web: Server, buyer: Client, alice: User, order: str) -> None:
    """3: from the click to the tokens, with Stripe's own deliveries to the running product, in either order."""
    purchase = buy(stripe, buyer)
    assert credits_of(alice) == []
    stripe.control("deliveries/release", order=order)
    assert credits_of(alice) == ONE_STARTER
    purchase.refresh_from_db()
    assert purchase.state == "paid"
    account = ledger.get_account(user_id=alice.pk)
    assert account.balance == BONUS_TOKENS + STARTER_TOKENS
    assert (account.lifetime_purchased_tokens, account.lifetime_spent_cents) == (STARTER_TOKENS, 1_500)
    assert b"150,000 tokens were added" in success_page(buyer, purchase).content


@pytest.mark.django_db(transaction=True)
def test_duplicated_and_resent_deliveries(stripe: StripeStandIn, web: Server, buyer: Client, alice: User) -> None:
    """2, 26: Stripe delivers each event several times."""
    buy(stripe, buyer)
    for event in events_of(stripe, COMPLETED) + events_of(stripe, "payment_intent.succeeded"):
        stripe.control(f"events/{event['id']}/duplicate", count=5)
    stripe.control("deliveries/release", order="random", seed=4)
    assert credits_of(alice) == ONE_STARTER
    assert set(stripe.state()["deliveries"]) == {"delivered"}


def test_price_and_tokens_sent_by_the_browser(stripe: StripeStandIn, buyer: Client, alice: User) -> None:
    """23: ignored."""
    wishes = {"price": "1", "price_cents": "1", "unit_amount": "1", "tokens": "7500000", "stripe_price_id": "price_1"}
    purchase = begin_checkout(buyer, checkout_form(**wishes))
    assert (purchase.tokens, purchase.amount_cents, purchase.currency) == (STARTER_TOKENS, 1_500, "usd")
    (session,) = stripe.state()["sessions"]
    assert (session["amount_total"], session["currency"]) == (1_500, "usd")


@pytest.mark.parametrize("package_id", ["", "0", "-1", "1.5", "x", "999999", str(2**63), "\0"])
def test_packages_that_are_not_sold(stripe: StripeStandIn, buyer: Client, package_id: str) -> None:
    """56: said so, and nothing is begun."""
    answer = buyer.post("/tokens/checkout/", checkout_form() | {"package_id": package_id}, follow=True)
    assert answer.status_code == 400 or b"not on sale any more" in answer.content
    assert not Purchase.objects.exists()
    assert stripe.state()["sessions"] == []


def test_package_taken_off_sale(stripe: StripeStandIn, buyer: Client) -> None:
    """24: between the page and the click."""
    form = checkout_form()
    TokenPricing.objects.update(is_active=False)
    answer = buyer.post("/tokens/checkout/", form, follow=True)
    assert b"not on sale any more" in answer.content
    assert not Purchase.objects.exists()


def test_package_changed_during_the_checkout(stripe: StripeStandIn, buyer: Client, alice: User) -> None:
    """24: the snapshot is honoured."""
    purchase = buy(stripe, buyer)
    TokenPricing.objects.update(name="Changed", tokens=1, price_usd_cents=99_999, is_active=False)
    assert deliver(event_of(stripe, COMPLETED)).status_code == 200
    assert credits_of(alice) == ONE_STARTER
    assert purchase_state(purchase) == "paid"


def test_old_checkout_paid_after_a_change_of_price(stripe: StripeStandIn, buyer: Client, alice: User) -> None:
    """24: a click after the change begins a checkout on the new terms; the old one, if paid, is credited as agreed."""
    old = buy(stripe, buyer)
    TokenPricing.objects.filter(name="Starter").update(tokens=200_000, price_usd_cents=1_900)
    new = begin_checkout(buyer)
    assert (new.tokens, new.amount_cents) == (200_000, 1_900)
    for _ in range(2):
        assert credits_of(alice) == ONE_STARTER
        assert (purchase_state(old), purchase_state(new)) == ("paid", "open")
        assert deliver(event_of(stripe, COMPLETED)).status_code == 200


def test_old_checkout_that_could_not_be_closed(stripe: StripeStandIn, buyer: Client, alice: User) -> None:
    """24, 29: given up here and open at Stripe, it can still be paid: no page denies that, and the currency waits."""
    old = begin_checkout(buyer)
    packages.update_package(old.package_id or 0, price_usd_cents=1_900, price_eur_cents=1_700)
    stripe.control("faults", kind="429", path_prefix="/v1/checkout/sessions/", method="POST", count=1)
    purchases.close_checkout(begin_checkout(buyer))
    assert purchase_state(old) == "expired"
    answer = buyer.post("/tokens/checkout/", checkout_form(currency="eur"), follow=True)
    assert b"A payment page of yours is open." in answer.content

    assert stripe.pay(old.checkout_url).status_code == 303
    stripe.control("faults", kind="429", path_prefix="/v1/checkout/sessions", count=1)
    assert b"Waiting for Stripe" in success_page(buyer, old).content
    stripe.control("faults/clear")
    make_older(minutes=1)
    assert b"150,000 tokens were added" in success_page(buyer, old).content
    assert credits_of(alice) == ONE_STARTER


@pytest.mark.parametrize(
    ("status", "reason", "may_buy"),
    [("blocked", "Fraud", False), ("suspended", "Asked to wait", False), ("suspended", "debt", True)],
)
def test_who_may_buy(
    stripe: StripeStandIn, buyer: Client, alice: User, status: str, reason: str, may_buy: bool
) -> None:
    """60: a person's block or suspension ends it. What is paid on a page that was open is credited: test_webhooks."""
    if may_buy:
        ledger.deduct_tokens(
            user_id=alice.pk, tokens=BONUS_TOKENS + 1, operation=CHAT, pools=TokenPools(), may_leave_debt=True
        )
    else:
        TokenAccount.objects.filter(user=alice).update(status=status, status_reason=reason)
    account = ledger.get_account(user_id=alice.pk)
    assert (account.status, account.status_reason) == (status, reason)
    for form in (checkout_form(), {"amount": "25", "checkout_key": "an-amount"}):
        buyer.post("/tokens/checkout/", form)
    assert Purchase.objects.count() == (2 if may_buy else 0)
    page = buyer.get("/tokens/").content.decode()
    assert ("it cannot buy tokens. Please contact support" in page) is not may_buy
    assert ('action="/tokens/checkout/"' in page) is may_buy


def test_clicks_one_after_another(stripe: StripeStandIn, buyer: Client, alice: User) -> None:
    """28: the same form, or another tab: one open checkout. After it is paid, a click is a new purchase."""
    form = checkout_form()
    first = begin_checkout(buyer, form)
    assert begin_checkout(buyer, form) == first
    assert begin_checkout(buyer, checkout_form()) == first
    assert sessions_of(stripe, first) == [first.stripe_session_id]
    assert stripe.pay(first.checkout_url).status_code == 303
    assert deliver(event_of(stripe, COMPLETED)).status_code == 200
    assert begin_checkout(buyer, form) != first
    assert Purchase.objects.count() == 2
    assert credits_of(alice) == ONE_STARTER


def test_one_form_for_two_packages(stripe: StripeStandIn, buyer: Client) -> None:
    """55: the key of a form belongs to what it was sent for."""
    form = checkout_form()
    begin_checkout(buyer, form)
    answer = buyer.post("/tokens/checkout/", checkout_form("Pro") | {"checkout_key": form["checkout_key"]}, follow=True)
    assert b"already sent for" in answer.content
    assert Purchase.objects.count() == 1


# --- Stripe at fault ------------------------------------------------------------------------------------------------

Click = Callable[[], "Answer"]


@pytest.fixture
def click(buyer: Client) -> Click:
    """Click on Buy on one page, as often as wanted."""
    form = checkout_form()
    return lambda: buyer.post("/tokens/checkout/", form, follow=False)


def is_told(buyer: Client, answer: "Answer") -> bool:
    """Whether the click led back to the packages, with a message that nothing was charged."""
    assert (answer.status_code, answer["Location"]) == (302, "/tokens/")
    return b"You were not charged." in buyer.get("/tokens/").content


def pay_and_credit(stripe: StripeStandIn, answer: "Answer", alice: User) -> None:
    """The checkout works in the end: it is the only one that was paid, and credited once."""
    assert stripe.pay(answer["Location"]).status_code == 303
    for type in (COMPLETED, "payment_intent.succeeded"):
        assert deliver(event_of(stripe, type)).status_code == 200
    assert stripe.state()["succeeded_charges"] == 1
    assert credits_of(alice) == ONE_STARTER


@pytest.mark.parametrize("path", ["/v1/customers", "/v1/checkout/sessions"])
@pytest.mark.parametrize(("kind", "count"), [("timeout_after", 3), ("429", 1)])
def test_stripe_does_not_answer(
    stripe: StripeStandIn, buyer: Client, click: Click, alice: User, impatient: None, path: str, kind: str, count: int
) -> None:
    """27: a clear page; the next click retries with the same key and finds what Stripe had made meanwhile."""
    stripe.control("faults", kind=kind, path_prefix=path, count=count)
    assert is_told(buyer, click())
    purchase = Purchase.objects.get()
    assert purchase.state == "created"

    answer = click()
    assert Purchase.objects.get().checkout_url == answer["Location"]
    assert sessions_of(stripe, purchase) == [Purchase.objects.get().stripe_session_id]
    assert len(events_of(stripe, "customer.created")) == 1
    pay_and_credit(stripe, answer, alice)


@pytest.mark.parametrize("path", ["/v1/customers", "/v1/checkout/sessions"])
@pytest.mark.parametrize("kind", ["500", "500_after"])
def test_stripe_answers_with_a_fault(
    stripe: StripeStandIn, buyer: Client, click: Click, alice: User, path: str, kind: str
) -> None:
    """27: Stripe gives a 500 again under its key for a day, so the next click has a new one."""
    stripe.control("faults", kind=kind, path_prefix=path, count=1)
    assert is_told(buyer, click())
    failed = Purchase.objects.get()
    assert failed.state == "failed"

    answer = click()
    purchase = Purchase.objects.get(state="open")
    assert sessions_of(stripe, purchase) == [purchase.stripe_session_id]
    pay_and_credit(stripe, answer, alice)
    assert purchase_state(failed) == "failed"


def test_stripe_refuses(stripe: StripeStandIn, buyer: Client, click: Click, alice: User, settings: Settings) -> None:
    """27: what we sent was wrong (an address that Stripe does not take): told, and the next click starts afresh."""
    right = settings.SITE_URL
    settings.SITE_URL = "ftp://nowhere"
    assert is_told(buyer, click())
    settings.SITE_URL = right
    pay_and_credit(stripe, click(), alice)


@pytest.mark.parametrize("card", ["4000000000000002", "4000000000009995"])
def test_declined_then_paid(stripe: StripeStandIn, buyer: Client, alice: User, card: str) -> None:
    """A decline on Stripe's page leaves the checkout open; another card pays it, once."""
    purchase = begin_checkout(buyer)
    assert stripe.pay(purchase.checkout_url, card).status_code == 402
    assert deliver(event_of(stripe, "payment_intent.payment_failed")).status_code == 200
    assert purchase_state(purchase) == "open"
    assert credits_of(alice) == []
    assert stripe.pay(purchase.checkout_url).status_code == 303
    for type in ("payment_intent.succeeded", COMPLETED):
        assert deliver(event_of(stripe, type)).status_code == 200
    assert credits_of(alice) == ONE_STARTER


# --- The webhook never comes ----------------------------------------------------------------------------------------


@pytest.mark.django_db(transaction=True)
def test_success_page_credits(stripe: StripeStandIn, web: Server, buyer: Client, alice: User) -> None:
    """29: the deliveries are lost; the page asks Stripe, tells the truth before and after, and credits once."""
    stripe.control("deliveries/drop", count=1_000)
    purchase = begin_checkout(buyer)
    assert b"Waiting for Stripe" in success_page(buyer, purchase).content
    assert stripe.pay(purchase.checkout_url).status_code == 303
    stripe.control("deliveries/release")
    assert set(stripe.state()["deliveries"]) == {"dropped"}
    assert credits_of(alice) == []

    make_older(minutes=1)
    for _ in range(2):
        assert b"150,000 tokens were added" in success_page(buyer, purchase).content
    assert credits_of(alice) == ONE_STARTER


def test_success_page_alone_is_no_payment(stripe: StripeStandIn, buyer: Client, alice: User) -> None:
    """29: whoever opens its address without having paid gets nothing."""
    purchase = begin_checkout(buyer)
    assert b"Waiting for Stripe" in success_page(buyer, purchase).content
    assert purchase_state(purchase) == "open"
    assert credits_of(alice) == []


def test_success_page_while_stripe_is_away(stripe: StripeStandIn, buyer: Client, alice: User, impatient: None) -> None:
    """27, 29: it goes on waiting, and asks Stripe no more than every two seconds."""
    purchase = buy(stripe, buyer)
    stripe.control("faults", kind="429", path_prefix="/v1/checkout/sessions", count=2)  # a slow machine may ask twice
    for _ in range(2):
        assert b"Waiting for Stripe" in success_page(buyer, purchase).content
    assert credits_of(alice) == []
    stripe.control("faults/clear")
    make_older(minutes=1)
    assert b"150,000 tokens were added" in success_page(buyer, purchase).content


def test_webhook_after_the_success_page(stripe: StripeStandIn, buyer: Client, alice: User) -> None:
    """29: both tell of the same payment; one credit."""
    purchase = buy(stripe, buyer)
    success_page(buyer, purchase)
    for type in (COMPLETED, "payment_intent.succeeded"):
        assert deliver(event_of(stripe, type)).status_code == 200
        assert state_of(event_of(stripe, type)) == "processed"
    assert credits_of(alice) == ONE_STARTER


def test_sweeper_credits(stripe: StripeStandIn, buyer: Client, alice: User) -> None:
    """29: nobody came back to the page; the sweeper asks Stripe once the webhook has had its time."""
    purchase = buy(stripe, buyer)
    assert tasks.sweep_purchases() == 0  # too early
    make_older(minutes=5)
    assert tasks.sweep_purchases() == 1
    assert tasks.sweep_purchases() == 0
    assert purchase_state(purchase) == "paid"
    assert credits_of(alice) == ONE_STARTER


@pytest.mark.parametrize("outcome", ["succeeded", "failed"])
def test_sweeper_ends_a_delayed_payment(stripe: StripeStandIn, buyer: Client, alice: User, outcome: str) -> None:
    """6, 29: a bank debit whose events are lost ends, too: paid, or failed, which only the payment itself says."""
    purchase = buy(stripe, buyer, "bank_debit")
    make_older(minutes=5)
    assert tasks.sweep_purchases() == 0
    assert purchase_state(purchase) == "processing"
    assert b"under way" in success_page(buyer, purchase).content
    (payment,) = stripe.state()["payment_intents"]
    stripe.control(f"payments/{payment['id']}/settle", outcome=outcome)
    make_older(minutes=15)
    assert tasks.sweep_purchases() == 1
    assert purchase_state(purchase) == ("paid" if outcome == "succeeded" else "failed")
    assert credits_of(alice) == (ONE_STARTER if outcome == "succeeded" else [])


def test_sweeper_ends_what_was_not_paid(stripe: StripeStandIn, buyer: Client, alice: User) -> None:
    """8, 29: an expired session, and a checkout that Stripe never answered, come to an end without tokens."""
    expired = begin_checkout(buyer)
    stripe.control(f"sessions/{expired.stripe_session_id}/expire")
    stripe.control("faults", kind="429", path_prefix="/v1/checkout/sessions", count=1)
    buyer.post("/tokens/checkout/", checkout_form("Pro"))
    unanswered = Purchase.objects.get(package_name="Pro")
    make_older(hours=21)
    assert tasks.sweep_purchases() == 1
    assert purchase_state(expired) == purchase_state(unanswered) == "expired"
    assert credits_of(alice) == []


def test_sweeper_goes_on_after_a_failure(stripe: StripeStandIn, buyer: Client, alice: User) -> None:
    """29: one purchase that cannot be looked up holds up none of the others."""
    lost = begin_checkout(buyer, checkout_form("Pro"))
    stripe.control("faults", kind="429", path_prefix=f"/v1/checkout/sessions/{lost.stripe_session_id}", count=1)
    paid = buy(stripe, buyer)
    make_older(minutes=5)
    assert tasks.sweep_purchases() == 1
    assert (purchase_state(lost), purchase_state(paid)) == ("open", "paid")
    assert credits_of(alice) == ONE_STARTER


def test_crash_before_the_session_is_stored(stripe: StripeStandIn, buyer: Client, alice: User) -> None:
    """25, 27: we crashed after Stripe's answer; the next click gets the same session by the same key."""
    form = checkout_form()
    crash = RuntimeError("The power is gone.")
    with patch("billing.payments.gateway.read_checkout_session", side_effect=crash), pytest.raises(RuntimeError):
        buyer.post("/tokens/checkout/", form)
    purchase = begin_checkout(buyer, form)
    assert sessions_of(stripe, purchase) == [purchase.stripe_session_id]
    assert Purchase.objects.count() == 1


# --- Whose purchase it is -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", ["tokens:success", "tokens:cancelled"])
def test_purchase_of_somebody_else(stripe: StripeStandIn, buyer: Client, alice: User, bob: User, page: str) -> None:
    """63: 404, as for one that does not exist, and opening it finishes nothing."""
    purchase = buy(stripe, buyer)
    other = Client()
    other.force_login(bob)
    for number in (purchase.pk, purchase.pk + 1_000):
        assert other.get(reverse(page, args=[number])).status_code == 404
    assert purchase_state(purchase) == "open"
    assert credits_of(alice) == credits_of(bob) == []


def test_signed_out(stripe: StripeStandIn, alice: User) -> None:
    """63: every address asks for a sign-in and comes back; nothing is begun."""
    stranger = Client()
    for address in ("/tokens/", "/tokens/success/1/", "/tokens/cancelled/1/"):
        answer = stranger.get(address)
        assert (answer.status_code, answer["Location"].partition("?")[0]) == (302, reverse("account_login"))
    answer = stranger.post("/tokens/checkout/", checkout_form())
    assert answer["Location"].startswith(reverse("account_login"))
    assert not Purchase.objects.exists()


def test_checkout_needs_its_token(stripe: StripeStandIn, alice: User) -> None:
    """62: another site's form buys nothing."""
    strict = Client(enforce_csrf_checks=True)
    strict.force_login(alice)
    assert strict.post("/tokens/checkout/", checkout_form()).status_code == 403
    assert strict.get("/tokens/checkout/").status_code == 405
    assert not Purchase.objects.exists()
