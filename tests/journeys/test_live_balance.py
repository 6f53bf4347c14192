"""The balance in the header of every open window follows what happens elsewhere."""

import re

from django.test import Client
from playwright.sync_api import expect

from accounts.models import User
from billing import ledger, tasks
from billing.models import TokenTransaction
from kit import redis_client
from postmate.celery import app
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
    redis_client.client().delete(*app.amqp.queues)  # the webhooks' tasks need Stripe, and would come first
    with servers.running_worker():
        tasks.reconcile_stripe.delay(1)
        for window in windows:
            # The fallback asks once a minute; whoever sees it sooner was told.
            expect(window.locator("#balance .balance-number")).to_have_text("10,000", timeout=30_000)
    debit = TokenTransaction.objects.get(user=alice, type="refund")
    assert debit.amount == -STARTER_TOKENS
    expect(phone.locator("#balance .balance")).to_have_attribute("title", re.compile("10,000 tokens"))


SEE = "() => { isSeen = true; document.dispatchEvent(new Event('visibilitychange')) }"


def test_window_that_is_not_seen_keeps_no_stream(alice: User, open_context: OpenContext) -> None:
    """A browser has six connections to a server of HTTP/1.1: a seventh window would wait for ever."""
    context = open_context()
    context.add_init_script("Object.defineProperty(document, 'hidden', { get: () => !window.isSeen })")
    windows = [sign_in(context.new_page(), "alice")]
    for _ in range(6):
        windows.append(context.new_page())
        windows[-1].goto("/tokens/")
    ledger.add_tokens(user_id=alice.pk, tokens=5, type="bonus", description="Test", idempotency_key="five")
    for window in windows[:2]:
        window.evaluate(SEE)
        expect(window.locator("#balance .balance-number")).to_have_text("10,005")
    ledger.add_tokens(user_id=alice.pk, tokens=5, type="bonus", description="Test", idempotency_key="ten")
    for window in windows[:2]:
        expect(window.locator("#balance .balance-number")).to_have_text("10,010")

    # Whoever was signed out meanwhile is told to stop, which is no error on the page.
    context.clear_cookies(name="sessionid")
    with windows[2].expect_response("**/live/balance/**"):
        windows[2].evaluate(SEE)
    windows[2].goto("/tokens/")
    expect(windows[2].get_by_role("button", name="Sign in", exact=True)).to_be_visible()
