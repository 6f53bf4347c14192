"""A process whose clock is an hour ahead or behind. Row 76 of FAULTS.md: the database's clock decides."""

import json
from datetime import UTC, datetime, timedelta
from decimal import Decimal

import pytest
import time_machine
from django.db import connection
from django.test import Client
from django.utils import timezone
from pytest_django.fixtures import Settings

import ai_ops.tasks
from accounts.models import User
from ai_ops.models import ContentPiece, Project
from billing import ledger, tasks
from billing.ledger import Operation, Posting
from billing.models import Purchase, TokenAccount, TokenPricing, TokenUsage
from billing.pricing import TokenPools
from kit import database
from tests.environment import BILLING_SECRET
from tests.payments import (
    ONE_STARTER,
    STARTER_CENTS,
    STARTER_TOKENS,
    buy,
    checkout_form,
    credits_of,
    deliver,
    deliver_bytes,
    event_of,
    purchase_state,
    sign,
    verify_books,
)
from tests.servers import StripeStandIn

pytestmark = pytest.mark.django_db(transaction=True)

DRAFT = Operation("generation", "openai", "gpt-6.1-terra", multiplier=Decimal(1))
HOUR = timedelta(hours=1)
LIFETIME_SECONDS = 600


@pytest.fixture(params=[HOUR, -HOUR], ids=["ahead", "behind"])
def skew(request: pytest.FixtureRequest) -> timedelta:
    return request.param


def skewed(skew: timedelta) -> time_machine.travel:
    return time_machine.travel(datetime.now(UTC) + skew, tick=True)


def reserve(user: User, key: str = "hold") -> Posting:
    return ledger.reserve_tokens(
        user_id=user.pk, tokens=1_000, operation=DRAFT, idempotency_key=key, lifetime_seconds=LIFETIME_SECONDS
    )


def usage_of(posting: Posting) -> TokenUsage:
    return TokenUsage.objects.get(pk=posting.usage_id or 0)


def change(sql: str, *parameters: int | None) -> None:
    with connection.cursor() as cursor:
        cursor.execute(sql, parameters)


def test_the_process_is_wrong_and_the_database_right(skew: timedelta) -> None:
    """Control of row 76."""
    with skewed(skew):
        assert abs(timezone.now() - database.now() - skew) < timedelta(minutes=5)


def test_holds(alice: User, skew: timedelta) -> None:
    """Row 76: no live hold expires, and no dead one stays, whoever sweeps; a hold made there lives as long as any."""
    live, dead = reserve(alice, "live"), reserve(alice, "dead")
    change("UPDATE billing_tokenusage SET expires_at = clock_timestamp() - interval '1 s' WHERE id = %s", dead.usage_id)
    with skewed(skew):
        assert tasks.expire_reservations() == 1
        made_there = usage_of(reserve(alice, "made there"))
        assert ledger.settle_usage(usage_id=live.usage_id or 0, pools=TokenPools(input_tokens=10)).amount_tokens == -10
    assert made_there.expires_at is not None
    left = made_there.expires_at - database.now()
    assert timedelta(seconds=LIFETIME_SECONDS / 2) < left <= timedelta(seconds=LIFETIME_SECONDS)
    assert usage_of(dead).status == "expired"
    verify_books()


def test_results_that_are_being_written(alice: User, skew: timedelta) -> None:
    """Row 76: the sweep takes no running operation for one whose process died."""
    project = Project.objects.create(workspace=alice.workspaces.get(), name="Tea shop")
    pieces = [
        ContentPiece.objects.create(project=project, author=alice, title=title, topic="") for title in ("live", "dead")
    ]
    change("UPDATE ai_ops_contentpiece SET updated_at = clock_timestamp() - interval '11 min' WHERE title = 'dead'")
    with skewed(skew):
        assert ai_ops.tasks.close_abandoned_results() == 1
    assert [ContentPiece.objects.get(pk=piece.pk).state for piece in pieces] == ["writing", "failed"]


def test_checkout_that_is_open(buyer: Client, stripe: StripeStandIn, skew: timedelta) -> None:
    """Row 76: a second click leads to the same page at Stripe, and no second one is opened beside it."""
    buyer.post("/tokens/checkout/", checkout_form())
    change("UPDATE billing_purchase SET expires_at = clock_timestamp() + interval '30 min'")
    with skewed(skew):
        buyer.post("/tokens/checkout/", checkout_form())
    assert Purchase.objects.get().state == "open"
    assert len(stripe.state()["sessions"]) == 1


def test_wait_after_a_declined_recharge(alice: User, stripe: StripeStandIn, skew: timedelta) -> None:
    """Row 76: the next attempt comes when it is due, not an hour before or after."""
    TokenAccount.objects.filter(user=alice).update(
        auto_recharge_enabled=True,
        auto_recharge_threshold_tokens=50_000,
        auto_recharge_package=TokenPricing.objects.get(name="Starter"),
        auto_recharge_price_cents=STARTER_CENTS,
        auto_recharge_package_tokens=STARTER_TOKENS,
        stripe_customer_id="cus_test",
        stripe_payment_method_id="pm_test",
    )
    for minutes, is_due in ((30, False), (-30, True)):
        at = database.now() + timedelta(minutes=minutes)
        TokenAccount.objects.filter(user=alice).update(auto_recharge_retry_at=at)
        with skewed(skew):
            tasks.sweep_auto_recharges()
        assert Purchase.objects.exists() == is_due


def test_webhooks(alice: User, buyer: Client, stripe: StripeStandIn, events_wait: None, skew: timedelta) -> None:
    """Row 76: a signature's age is told by our clock alone, so an event is refused there, and Stripe sends it again.
    Whoever comes first credits it: a process with the right time, or the comparison with Stripe, even there."""
    first = buy(stripe, buyer)
    event = event_of(stripe, "checkout.session.completed")
    payload = json.dumps(event).encode()
    header = sign(payload)  # by Stripe's clock
    with skewed(skew):
        assert deliver_bytes(payload, header).status_code == 400
    assert purchase_state(first) == "open"
    assert credits_of(alice) == []
    with skewed(skew):
        tasks.reconcile_stripe(1)
    assert credits_of(alice) == ONE_STARTER
    assert deliver(event).status_code == 200
    assert credits_of(alice) == ONE_STARTER
    verify_books()


def test_limits_of_the_api(alice: User, settings: Settings, skew: timedelta) -> None:
    """Row 76: its minute is another one, and as long: it counts by itself, and refuses by itself."""
    settings.API_SERVICE_CALLS_PER_MINUTE = 1
    headers = {"authorization": f"Bearer {BILLING_SECRET}"}
    moment = datetime.now(UTC).replace(second=10) + skew
    with time_machine.travel(moment, tick=False):
        statuses = [Client(headers=headers).get(f"/api/v1/accounts/{alice.pk}/balance").status_code for _ in range(2)]
    assert statuses[-1] == 429
