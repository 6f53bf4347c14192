"""The balance in the header of every open window follows what happens elsewhere."""

import re

from django.test import Client
from playwright.sync_api import expect

from accounts.models import User
from billing import tasks
from billing.models import TokenTransaction
from tests import servers
from tests.journeys.conftest import PHONE, OpenContext, sign_in
from tests.payments import STARTER_TOKENS, buy, deliver, event_of
from tests.servers import StripeStandIn


def test_a_debit_by_a_worker_shows_in_every_window(
    alice: User, client: Client, stripe: StripeStandIn, open_context: OpenContext
) -> None:
    """Money went back at Stripe and no event of it came: a worker reconciles, and takes the tokens back."""
    client.force_login(alice)
    stripe.control("deliveries/hold")
    purchase = buy(stripe, client)
    deliver(event_of(stripe, "checkout.session.completed"))
    purchase.refresh_from_db()

    context = open_context()
    first, second = sign_in(context.new_page(), "alice"), context.new_page()
    second.goto("/tokens/")
    phone = sign_in(open_context().new_page(), "alice")
    phone.set_viewport_size(PHONE)
    windows = (first, second, phone)
    for window in windows:
        expect(window.locator("#balance .balance-number")).to_have_text(f"{10_000 + STARTER_TOKENS:,}")

    stripe.control(f"payments/{purchase.stripe_payment_intent_id}/refund")
    with servers.running_worker():
        tasks.reconcile_stripe.delay(1)
        for window in windows:
            # The fallback asks once a minute; whoever sees it sooner was told.
            expect(window.locator("#balance .balance-number")).to_have_text("10,000", timeout=30_000)
    debit = TokenTransaction.objects.get(user=alice, type="refund")
    assert debit.amount == -STARTER_TOKENS
    expect(phone.locator("#balance .balance")).to_have_attribute("title", re.compile("10,000 tokens"))
