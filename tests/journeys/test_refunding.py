"""A superadmin sends money back, and looks at where our books and Stripe's differ."""

from django.test import Client
from playwright.sync_api import Page, expect

from accounts.models import User
from billing.models import Drift, StripeEvent, TokenAccount
from tests.journeys.conftest import shoot, sign_in
from tests.payments import STARTER_TOKENS, buy, deliver, event_of
from tests.servers import StripeStandIn


def test_refunding_a_purchase(page: Page, stripe: StripeStandIn, client: Client, alice: User, susan: User) -> None:
    client.force_login(alice)
    stripe.control("deliveries/hold")
    purchase = buy(stripe, client)
    deliver(event_of(stripe, "checkout.session.completed"))

    sign_in(page, "susan", f"/admin/tokens/purchases/{purchase.pk}/")
    expect(page.get_by_text("$15.00 of it can go back")).to_be_visible()
    page.get_by_label("Another amount").check()
    page.get_by_label("Amount in USD").fill("15.01")
    page.get_by_label("Reason").fill("The buyer changed their mind")
    page.get_by_role("button", name="Go on").click()
    expect(page.get_by_text("That is more than is left of this purchase.")).to_be_visible()
    shoot(page, "purchase-refused")
    page.get_by_label("Amount in USD").fill("5")
    page.get_by_role("button", name="Go on").click()
    expect(page.get_by_role("heading", name="Refund $5.00?")).to_be_visible()
    expect(page.get_by_text("110,000 tokens")).to_be_visible()
    shoot(page, "purchase-confirm")
    page.get_by_role("button", name="Refund $5.00").click()
    expect(page.get_by_text("$5.00 were refunded to alice@example.com.")).to_be_visible()
    expect(page.get_by_role("cell", name="The buyer changed their mind")).to_be_visible()
    shoot(page, "purchase")
    assert TokenAccount.objects.get(user=alice).balance == 10_000 + STARTER_TOKENS - 50_000


def test_resolving_a_drift(page: Page, stripe: StripeStandIn, susan: User) -> None:
    for number, description in enumerate(
        (
            "A customer of ours paid $15.00 for nothing we know of.",
            "Credited here, but the payment is canceled at Stripe.",
        )
    ):
        Drift.objects.create(
            kind="unknown_payment", stripe_id=f"pi_3TestDriftNumber{number}Abcdefgh", description=description
        )
    sign_in(page, "susan", "/admin/tokens/drifts/")
    page.get_by_label("What was done about pi_3TestDriftNumber0Abcdefgh").fill("Refunded by hand")
    page.get_by_role("row", name="A customer of ours").get_by_role("button", name="Resolve").click()
    expect(page.get_by_text("Noted as resolved.")).to_be_visible()
    expect(page.get_by_role("cell", name="Refunded by hand", exact=True)).to_be_visible()
    shoot(page, "drifts")


def test_dealing_with_events_of_stripe(page: Page, stripe: StripeStandIn, susan: User) -> None:
    for number, (state, message) in enumerate(
        (
            ("aside", "The card's bank warns of fraud (made_with_stolen_card) in $15.00 of purchase 4."),
            ("failed", "KeyError('payment_intent')"),
        )
    ):
        StripeEvent.objects.create(
            event_id=f"evt_3TestEventNumber{number}Abcdefgh", type="radar.early_fraud_warning.created",
            livemode=False, payload={}, state=state, message=message, attempts=1 + number,
        )  # fmt: skip
    sign_in(page, "susan", "/admin/tokens/")
    expect(page.locator("[aria-busy]")).to_have_count(0)
    page.get_by_role("link", name="Stripe events set aside: 1").click()
    expect(page.get_by_role("row")).to_have_count(1 + 1)
    page.get_by_role("link", name="All", exact=True).click()
    expect(page.get_by_role("row")).to_have_count(1 + 2)
    shoot(page, "stripe-events")
    page.get_by_role("button", name="Dealt with evt_3TestEventNumber0Abcdefgh").click()
    expect(page.get_by_text("evt_3TestEventNumber0Abcdefgh is noted as dealt with.")).to_be_visible()
    expect(page.get_by_role("row")).to_have_count(1 + 1)
