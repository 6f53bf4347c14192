"""Our books beside Stripe's, the command, its page, and events handled again. Numbers are rows of FAULTS.md."""

from datetime import timedelta
from io import StringIO
from typing import Any

import pytest
from django.core.management import CommandError, call_command
from django.db import connection
from django.test import Client
from django.urls import reverse
from django.utils import timezone
from pytest_django.fixtures import Settings

from accounts.models import User
from ai_ops.own_data import anonymize_user
from billing import tasks
from billing.models import Drift, PaymentReversal, Purchase, StripeEvent, TokenAccount, TokenTransaction
from billing.payments import gateway, reconcile
from billing.upkeep import own_data
from tests.payments import (
    BONUS_TOKENS,
    ONE_STARTER,
    STARTER_TOKENS,
    begin_checkout,
    changed,
    credits_of,
    deliver,
    event_of,
    purchase_state,
    state_of,
)
from tests.servers import StripeStandIn

pytestmark = [pytest.mark.django_db, pytest.mark.usefixtures("books_stay_in_order", "events_wait")]

COMPLETED = "checkout.session.completed"


def run(since: str = "3d") -> str:
    """What `manage.py reconcile_stripe` prints. Raises CommandError while something differs."""
    output = StringIO()
    call_command("reconcile_stripe", since=since, stdout=output)
    return output.getvalue()


def differences() -> list[str]:
    """The kinds of the open drifts, after a run that must fail for them."""
    with pytest.raises(CommandError, match="unresolved") as failed:
        run()
    assert failed.value.returncode == 1
    return list(Drift.objects.filter(resolved_at=None).order_by("kind").values_list("kind", flat=True))


def charge(customer_id: str | None, amount_cents: int = 1_500, **metadata: str) -> str:
    """Somebody charges a card on our Stripe account, and not through us."""
    customer = {"customer": customer_id} if customer_id else {}
    payment = gateway._client().v1.payment_intents.create(
        {
            "amount": amount_cents,
            "currency": "usd",
            "payment_method": "pm_card_visa",
            "confirm": True,
            "metadata": metadata,
            **customer,  # type: ignore[typeddict-item]
        }
    )
    assert payment.status == "succeeded"
    return payment.id


def movements(purchase: Purchase) -> list[int]:
    rows = TokenTransaction.objects.filter(purchase=purchase, type="refund").order_by("sequence")
    return list(rows.values_list("amount", flat=True))


def test_nothing_to_find(stripe: StripeStandIn, bought: Purchase) -> None:
    output = run()
    assert "Compared 1 payments, 0 refunds, 0 disputes." in output
    assert "Our books and Stripe's agree." in output
    assert not Drift.objects.exists()


def test_the_credit_that_no_event_told_of(stripe: StripeStandIn, paid: Purchase, alice: User) -> None:
    """29: credited, noted as healed, once."""
    output = run()
    assert "healed: missing_credit" in output
    assert credits_of(alice) == ONE_STARTER
    assert purchase_state(paid) == "paid"
    drift = Drift.objects.get()
    assert (drift.purchase, drift.resolution, drift.resolved_at is None) == (paid, reconcile.HEALED, False)
    assert "healed" not in run()
    assert credits_of(alice) == ONE_STARTER
    assert Drift.objects.count() == 1


@pytest.mark.parametrize("state", ["expired", "failed", "created"])
def test_the_credit_of_a_purchase_given_up(stripe: StripeStandIn, paid: Purchase, alice: User, state: str) -> None:
    """8, 29: paid wins."""
    Purchase.objects.update(state=state)
    assert "healed: missing_credit" in run()
    assert credits_of(alice) == ONE_STARTER


def test_the_credit_where_amounts_may_differ(
    stripe: StripeStandIn, paid: Purchase, alice: User, settings: Settings
) -> None:
    """29: with tax or promotions only the session tells the price."""
    Purchase.objects.update(checkout_options=["promotion_codes"])
    settings.STRIPE_PROMOTION_CODES = False  # switched off meanwhile
    assert "healed: missing_credit" in run()
    assert credits_of(alice) == ONE_STARTER


def test_refunds_and_disputes_that_no_event_told_of(stripe: StripeStandIn, paid: Purchase, alice: User) -> None:
    """29, 41, 46: of a payment whose credit was lost, too; and what becomes of them later."""
    payment_id = stripe.state()["payment_intents"][0]["id"]
    made = stripe.control(f"payments/{payment_id}/refund", amount=500)
    opened = stripe.control(f"payments/{payment_id}/dispute", amount=300)
    output = run()
    for kind in ("missing_credit", "refund_succeeded", "dispute_needs_response"):
        assert f"healed: {kind}" in output
    assert sum(movements(paid)) == -80_000
    stripe.control(f"refunds/{made['id']}/fail")
    stripe.control(f"disputes/{opened['id']}/close", outcome="won")
    output = run()
    for kind in ("refund_failed", "dispute_won"):
        assert f"healed: {kind}" in output
    assert sum(movements(paid)) == 0
    assert TokenAccount.objects.get(user=alice).balance == BONUS_TOKENS + STARTER_TOKENS
    assert "healed" not in run()
    assert not Drift.objects.filter(resolved_at=None).exists()


def test_a_dispute_older_than_the_walk(stripe: StripeStandIn, bought: Purchase) -> None:
    """46: Stripe lists disputes by when they began; those still open here are asked for one by one."""
    payment_id = str(bought.stripe_payment_intent_id)
    opened = stripe.control(f"payments/{payment_id}/dispute")
    run()
    stripe.control(f"disputes/{opened['id']}/close", outcome="won")
    reconcile.reconcile(since=timezone.now() + timedelta(hours=1))
    assert movements(bought) == [-STARTER_TOKENS, STARTER_TOKENS]


def test_amount_that_differs(stripe: StripeStandIn, bought: Purchase) -> None:
    """21: a drift, once however often it is found; it closes itself when it does not differ any more."""
    Purchase.objects.update(charged_cents=1_400)
    assert differences() == ["amount_differs"]
    assert differences() == ["amount_differs"]
    drift = Drift.objects.get()
    assert (drift.purchase, drift.description) == (bought, "$15.00 were paid, $14.00 were agreed.")
    Purchase.objects.update(charged_cents=None)
    assert "mended: amount_differs" in run()
    drift.refresh_from_db()
    assert drift.resolution == reconcile.GONE


def test_purchase_under_review(stripe: StripeStandIn, paid: Purchase, alice: User) -> None:
    """21: paid something else than agreed: for a person; all of it sent back, it is over, for as long as it is back."""
    event = event_of(stripe, COMPLETED)
    deliver(changed(event, {"amount_subtotal": 1_400}))
    assert purchase_state(paid) == "review"
    Purchase.objects.update(amount_cents=1_400)
    assert differences() == ["amount_differs"]
    assert credits_of(alice) == []
    made = stripe.control(f"payments/{event['data']['object']['payment_intent']}/refund")
    assert "mended" in run()
    for _ in range(2):
        purchase = Purchase.objects.get()
        assert (purchase.state, purchase.message) == ("failed", reconcile.RETURNED)
        assert "agree" in run()
    stripe.control(f"refunds/{made['id']}/fail")
    assert differences() == ["amount_differs"]
    assert purchase_state(paid) == "review"
    assert credits_of(alice) == []


def test_purchase_under_review_that_a_person_settled(
    stripe: StripeStandIn, paid: Purchase, buyer: Client, alice: User, susan: User
) -> None:
    """21: credited by a grant and resolved, it leaves the review, and no late event brings it back."""
    event = event_of(stripe, COMPLETED)
    deliver(changed(event, {"amount_subtotal": 1_400}))
    Purchase.objects.update(amount_cents=1_400)
    assert differences() == ["amount_differs"]
    assert reconcile.resolve_drift(Drift.objects.get(), resolution="Granted 150,000 tokens", by=susan)
    assert purchase_state(paid) == "failed"
    assert "agree" in run()
    assert purchase_state(paid) == "failed"
    page = buyer.get(reverse("tokens:success", args=[paid.pk])).content.decode()
    assert reconcile.SETTLED in page
    assert "is not charged" not in page
    deliver(changed(event_of(stripe, "payment_intent.succeeded")))
    assert purchase_state(paid) == "failed"
    assert "agree" in run()
    assert (purchase_state(paid), credits_of(alice)) == ("failed", [])
    own_data.anonymize_account(TokenAccount.objects.get(user=alice))


def test_unknown_payment_of_our_customer(stripe: StripeStandIn, bought: Purchase, alice: User) -> None:
    """20: a drift, no credit; mended by a refund, and open again when that fails."""
    customer_id = TokenAccount.objects.get(user=alice).stripe_customer_id
    payment_id = charge(customer_id)
    assert differences() == ["unknown_payment"]
    assert credits_of(alice) == ONE_STARTER
    made = stripe.control(f"payments/{payment_id}/refund")
    assert "mended: unknown_payment" in run()
    stripe.control(f"refunds/{made['id']}/fail")
    assert differences() == ["unknown_payment"]
    assert PaymentReversal.objects.count() == 0


def test_purchase_paid_twice(stripe: StripeStandIn, bought: Purchase, alice: User) -> None:
    """2: a second payment that names the same purchase is no credit."""
    customer_id = TokenAccount.objects.get(user=alice).stripe_customer_id
    charge(customer_id, purchase_id=str(bought.pk))
    assert differences() == ["paid_twice"]
    assert credits_of(alice) == ONE_STARTER


def test_payments_of_another_product(stripe: StripeStandIn, buyer: Client, alice: User, bob: User) -> None:
    """18: no customer of ours, whatever number it names: passed over, its refunds and disputes with it.

    Bob has no customer yet, which is not the same as a payment without one.
    """
    purchase = begin_checkout(buyer)
    refunded, disputed = charge(None), charge(None, purchase_id=str(purchase.pk))
    stripe.control(f"payments/{refunded}/refund")
    stripe.control(f"payments/{disputed}/dispute")
    assert "Compared 0 payments, 0 refunds, 0 disputes." in run()
    assert credits_of(alice) == []
    assert not PaymentReversal.objects.exists()


def test_a_payment_that_names_the_purchase_of_another(
    stripe: StripeStandIn, buyer: Client, bought: Purchase, bob: User
) -> None:
    """22: metadata only helps to find the row."""
    other = Client()
    other.force_login(bob)
    purchase_of_bob = begin_checkout(other)
    customer_id = TokenAccount.objects.get(user__email="alice@example.com").stripe_customer_id
    charge(customer_id, purchase_id=str(purchase_of_bob.pk))
    assert differences() == ["unknown_payment"]
    assert credits_of(bob) == []


def test_paid_here_and_not_there(stripe: StripeStandIn, bought: Purchase) -> None:
    """20: Stripe does not know the payment of a purchase that was credited."""
    stripe.control("reset")
    assert differences() == ["paid_here_only"]
    assert Drift.objects.get().purchase == bought


def test_refund_that_cannot_be_read(stripe: StripeStandIn, bought: Purchase, settings: Settings) -> None:
    """21: in another currency than its purchase: for a person."""
    stripe.control(f"payments/{bought.stripe_payment_intent_id}/refund", amount=500)
    Purchase.objects.update(currency="eur")
    assert differences() == ["amount_differs", "refund_not_understood"]
    assert movements(bought) == []
    Purchase.objects.update(currency="usd")
    assert "healed: refund_succeeded" in run()
    assert movements(bought) == [-50_000]


def test_the_hourly_task(stripe: StripeStandIn, paid: Purchase, alice: User) -> None:
    """29"""
    tasks.reconcile_stripe(3)
    assert credits_of(alice) == ONE_STARTER


def test_stripe_is_away(stripe: StripeStandIn, paid: Purchase) -> None:
    """27"""
    stripe.control("faults", kind="429", path_prefix="/v1/payment_intents", count=1)
    with pytest.raises(CommandError, match="could not be read"):
        run()
    assert "healed" in run()


@pytest.mark.parametrize("since", ["12h", "7d", "4w", "2026-01-01"])
def test_how_far_back(stripe: StripeStandIn, since: str) -> None:
    assert "agree" in run(since)


@pytest.mark.parametrize("since", ["", "yesterday", "7", "7m", "-7d", "７d", "2026-13-01", "99999w"])
def test_how_far_back_is_refused(since: str) -> None:
    with pytest.raises(CommandError, match="is no day such as"):
        run(since)


# --- The page -------------------------------------------------------------------------------------------------------


def client_of(user: User) -> Client:
    client = Client()
    client.force_login(user)
    return client


def test_the_page_of_drifts(stripe: StripeStandIn, bought: Purchase, buyer: Client, adam: User, susan: User) -> None:
    """63, 64, 72: admins look, superadmins say what was done; users see nothing."""
    Purchase.objects.update(charged_cents=1_400)
    differences()
    drift = Drift.objects.get()
    page, resolve = reverse("dashboard:drifts"), reverse("dashboard:resolve-drift", args=[drift.pk])
    admin, superadmin = client_of(adam), client_of(susan)
    shown = admin.get(page).content.decode()
    assert "$15.00 were paid, $14.00 were agreed." in shown
    assert reverse("dashboard:purchase", args=[bought.pk]) in shown
    assert resolve not in shown
    assert buyer.get(page).status_code == 403
    assert Client().get(page).status_code == 302
    done = {"resolution": "Sent <b>$1</b> back"}
    for refused in (admin, buyer):
        assert refused.post(resolve, done).status_code == 403
    superadmin.post(resolve, {"resolution": " "})
    drift.refresh_from_db()
    assert drift.resolved_at is None
    for _ in range(2):
        assert superadmin.post(resolve, done).status_code == 302
    drift.refresh_from_db()
    assert drift.resolution == "Sent <b>$1</b> back"  # who said so, the audit log knows
    shown = admin.get(page).content.decode()
    assert "Sent &lt;b&gt;$1&lt;/b&gt; back" in shown
    assert "agree" in run()  # it is found again, and stays resolved
    Purchase.objects.update(charged_cents=None)


# --- Events handled again -------------------------------------------------------------------------------------------


def replay(*event_ids: str) -> str:
    output = StringIO()
    call_command("replay_stripe_events", *event_ids, stdout=output)
    return output.getvalue()


def test_failed_events_are_handled_again(stripe: StripeStandIn, paid: Purchase, alice: User) -> None:
    """25: with Stripe's patience at an end, by ours."""
    event = changed(event_of(stripe, COMPLETED), api_version="2024-06-20")
    stripe.control("faults", kind="429", path_prefix="/v1/checkout/sessions", count=2)
    assert deliver(event).status_code == 500
    with pytest.raises(CommandError, match="1 of 1 events failed again"):
        replay()
    assert state_of(event) == "failed"
    assert StripeEvent.objects.get().attempts == 2
    assert "processed" in replay(event["id"])
    assert credits_of(alice) == ONE_STARTER
    assert "0 events were handled again." in replay()


def test_events_kept_aside_are_handled_again_in_django_admin(
    stripe: StripeStandIn, paid: Purchase, alice: User, susan: User
) -> None:
    """20: the reason is gone, so the event is done; one that is done already stays as it is."""
    event = event_of(stripe, COMPLETED)
    Purchase.objects.update(stripe_session_id="cs_test_other")
    deliver(event)
    assert state_of(event) == "aside"
    inbox = reverse("admin:billing_stripeevent_changelist")
    action: dict[str, Any] = {"action": "handle_again", "_selected_action": [StripeEvent.objects.get().pk]}
    superadmin = client_of(susan)
    superadmin.post(inbox, action)
    assert state_of(event) == "aside"
    Purchase.objects.update(stripe_session_id=event["data"]["object"]["id"])
    for _ in range(2):
        assert superadmin.post(inbox, action).status_code == 302
        assert state_of(event) == "processed"
    assert credits_of(alice) == ONE_STARTER


def test_events_that_a_person_dealt_with(stripe: StripeStandIn, bought: Purchase, susan: User) -> None:
    """17: noted with who did; only what was kept aside."""
    event = changed(event_of(stripe, COMPLETED), livemode=True)
    deliver(event)
    inbox = reverse("admin:billing_stripeevent_changelist")
    rows = list(StripeEvent.objects.values_list("pk", flat=True))
    client_of(susan).post(inbox, {"action": "settle_by_hand", "_selected_action": rows})
    assert state_of(event) == "processed"
    assert "Dealt with by hand." in StripeEvent.objects.get(event_id=event["id"]).message
    assert StripeEvent.objects.exclude(event_id=event["id"]).get().message == ""
    assert "0 events were handled again." in replay()

    # Who did stays in the audit log by number: anonymised, no text of any table holds their address.
    assert "susan" in texts_of_all_tables()
    User.objects.filter(pk=susan.pk).update(role=User.Role.USER)
    anonymize_user(user_id=susan.pk)
    assert "susan" not in texts_of_all_tables()


def texts_of_all_tables() -> str:
    with connection.cursor() as cursor:
        texts = []
        for table in connection.introspection.table_names(cursor):
            cursor.execute(f"SELECT string_agg(each::text, E'\\n') FROM \"{table}\" AS each")  # noqa: S608
            texts.append(cursor.fetchone()[0] or "")
    return "\n".join(texts)
