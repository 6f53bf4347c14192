"""Auto-recharge over HTTP against the Stripe stand-in. Numbers in docstrings are rows of FAULTS.md."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from importlib import import_module
from typing import Any
from urllib.parse import quote

import pytest
import time_machine
from django.apps import apps
from django.conf import settings as project_settings
from django.core.cache import cache
from django.core.exceptions import ValidationError
from django.db import connection
from django.test import Client
from django.urls import reverse
from django.utils import timezone

from accounts.models import User
from billing import ledger, tasks
from billing.catalogue import packages
from billing.forms import package_choice
from billing.models import Drift, Notification, Purchase, TokenAccount, TokenPricing, TokenTransaction
from billing.notifications import inbox
from billing.payments import gateway, recharge, recharge_settings, reconcile
from billing.pricing import TokenPools
from billing.upkeep import own_data
from kit import database
from tests.conftest import PASSWORD, MakeUser, show_password
from tests.environment import BILLING_SECRET
from tests.payments import (
    BONUS_TOKENS,
    ONE_STARTER,
    STARTER_TOKENS,
    begin_checkout,
    buy,
    changed,
    credits_of,
    deliver,
    event_of,
    events_of,
    purchase_state,
    verify_books,
)
from tests.servers import PROJECT, StripeStandIn

pytestmark = [pytest.mark.django_db, pytest.mark.usefixtures("events_wait")]

FAILING_LATER, NEEDS_OWNER, GOOD = "4000000000000341", "4000002760003184", "4242424242424242"
INTENTS = "/v1/payment_intents"
CHAT = ledger.Operation("chat", "openai", "gpt-6-luna", multiplier=Decimal(1))
ONE_RECHARGE = ONE_STARTER * 2  # the Checkout that saved the card, and the recharge
THRESHOLD_TOKENS = 1_000


@pytest.fixture(autouse=True)
def _books_stay_in_order(db: None, stripe: StripeStandIn) -> Iterator[None]:
    """After each test the laws hold, and there are as many credits as charges: nobody paid twice, or for nothing."""
    yield
    verify_books()
    credits = TokenTransaction.objects.filter(type__in=TokenTransaction.CREDITS_FOR_MONEY)
    assert credits.count() == stripe.state()["succeeded_charges"]


Prepare = Callable[..., User]


@pytest.fixture
def prepare(stripe: StripeStandIn, client: Client, alice: User) -> Prepare:
    """Alice, signed in, has bought a package with a card that is kept, and has switched auto-recharge on."""

    def prepare(card: str = GOOD, *, cap_cents: int | None = None, spend: bool = True) -> User:
        client.force_login(alice)
        show_password(client)
        purchase = begin_checkout(client)
        stripe.pay(purchase.checkout_url, card)
        if card == NEEDS_OWNER:
            confirm_at_bank(stripe)
        deliver(event_of(stripe, "checkout.session.completed"))
        tasks.remember_card(purchase.pk)
        switch_on(alice, cap_cents=cap_cents)
        if spend:
            spend_down(alice)
        return alice

    return prepare


def confirm_at_bank(stripe: StripeStandIn, outcome: str = "complete") -> Any:
    """What the card's owner does on the bank's page for the payment that waits for them; the answer leads back."""
    (intent,) = [each for each in stripe.state()["payment_intents"] if each["status"] == "requires_action"]
    return stripe.post(f"/authenticate/{intent['id']}", data={"outcome": outcome}, follow_redirects=False)


def switch_on(user: User, *, cap_cents: int | None = None) -> None:
    recharge_settings.update_auto_recharge(
        user_id=user.pk,
        enabled=True,
        threshold_tokens=THRESHOLD_TOKENS,
        package_id=starter().pk,
        monthly_cap_cents=cap_cents,
    )


def spend_down(user: User, *, left: int = 500) -> ledger.Posting:
    tokens = max(1, account_of(user).available - left)
    return ledger.deduct_tokens(
        user_id=user.pk, tokens=tokens, operation=CHAT, pools=TokenPools(input_tokens=tokens), idempotency_key=None
    )


def starter() -> TokenPricing:
    return TokenPricing.objects.get(name="Starter")


def account_of(user: User) -> TokenAccount:
    return TokenAccount.objects.get(user=user)


def attempts() -> list[str]:
    """The states of the attempts, in their order."""
    recharges = Purchase.objects.filter(kind="auto_recharge").order_by("pk")
    return list(recharges.values_list("state", flat=True))


def attempt() -> Purchase:
    return Purchase.objects.filter(kind="auto_recharge").latest("pk")


def told(kind: str) -> int:
    """How often a user was told."""
    return Notification.objects.filter(kind=kind).count()


def recharge_intents(stripe: StripeStandIn) -> list[dict[str, Any]]:
    """Stripe's payments of attempts."""
    checkouts = {str(pk) for pk in Purchase.objects.filter(kind="checkout").values_list("pk", flat=True)}
    return [each for each in stripe.state()["payment_intents"] if each["metadata"]["purchase_id"] not in checkouts]


@contextmanager
def at(moment: datetime) -> Iterator[None]:
    """Our clock and the database's are set."""
    with time_machine.travel(moment, tick=True), pytest.MonkeyPatch.context() as patch:
        patch.setattr(database, "now", timezone.now)
        yield


def later(**delta: float) -> AbstractContextManager[None]:
    return at(datetime.now(UTC) + timedelta(**delta))


# --- It works -------------------------------------------------------------------------------------------------------


def test_recharge_below_the_threshold(prepare: Prepare, stripe: StripeStandIn) -> None:
    alice = prepare(spend=False)
    tasks.auto_recharge(alice.pk)
    assert attempts() == []  # there is enough
    assert spend_down(alice).needs_recharge
    tasks.auto_recharge(alice.pk)
    assert attempts() == ["paid"]
    assert credits_of(alice) == ONE_RECHARGE
    assert TokenTransaction.objects.get(type="auto_recharge").purchase == attempt()
    account = account_of(alice)
    assert (account.balance, account.auto_recharge_failures) == (500 + STARTER_TOKENS, 0)
    assert account.auto_recharge_last_outcome == "150,000 tokens were bought for $15.00."
    assert told("auto_recharge_succeeded") == 1
    # Both of Stripe's events come after it and change nothing.
    for event in events_of(stripe, "payment_intent.succeeded"):
        assert deliver(event).status_code == 200
    tasks.auto_recharge(alice.pk)
    assert credits_of(alice) == ONE_RECHARGE


def test_a_checkout_saves_its_card(prepare: Prepare) -> None:
    account = account_of(prepare(spend=False))
    assert (account.card_brand, account.card_last4) == ("visa", "4242")
    assert account.stripe_payment_method_id.startswith("pm_")


def test_a_lost_card_is_remembered_by_the_sweep(stripe: StripeStandIn, client: Client, alice: User) -> None:
    client.force_login(alice)
    purchase = buy(stripe, client)
    deliver(event_of(stripe, "checkout.session.completed"))
    Purchase.objects.filter(pk=purchase.pk).update(checked_at=None)
    tasks.sweep_auto_recharges()
    assert account_of(alice).card_last4 == ""  # the task has its time first
    with later(minutes=3):
        tasks.sweep_auto_recharges()
    assert account_of(alice).card_last4 == "4242"


def test_nothing_comes_back_of_who_is_anonymised(stripe: StripeStandIn, client: Client, alice: User) -> None:
    """70: neither receipt nor card, by a task that was late."""
    client.force_login(alice)
    purchase = buy(stripe, client)
    deliver(event_of(stripe, "checkout.session.completed"))
    own_data.anonymize_account(account_of(alice))
    tasks.remember_card(purchase.pk)
    tasks.refresh_card(alice.pk)
    purchase.refresh_from_db()
    assert (purchase.receipt_url, account_of(alice).card_last4) == ("", "")


def test_a_debt_is_recharged_a_block_is_not(prepare: Prepare) -> None:
    """60: a person's block or suspension stops it; a debt is what it is for."""
    alice = prepare()
    ledger.deduct_tokens(
        user_id=alice.pk, tokens=2_000, operation=CHAT, pools=TokenPools(input_tokens=2_000), may_leave_debt=True
    )
    for status, reason in (("blocked", "Fraud"), ("suspended", "Asked to wait")):
        TokenAccount.objects.update(status=status, status_reason=reason)
        tasks.auto_recharge(alice.pk)
        assert attempts() == []
    TokenAccount.objects.update(status="suspended", status_reason=TokenAccount.DEBT)
    tasks.auto_recharge(alice.pk)
    account = account_of(alice)
    assert (account.status, account.balance) == ("active", 500 - 2_000 + STARTER_TOKENS)


# --- Unknown outcomes -----------------------------------------------------------------------------------------------


def test_time_out_after_the_charge(prepare: Prepare, stripe: StripeStandIn, impatient: None) -> None:
    """30: the same key again, one charge, one credit."""
    alice = prepare()
    stripe.control("faults", kind="timeout_after", path_prefix=INTENTS, method="POST", count=3, seconds=5)
    tasks.auto_recharge(alice.pk)
    assert attempts() == ["created"]
    assert stripe.state()["succeeded_charges"] == 2  # the money has moved
    tasks.auto_recharge(alice.pk)
    tasks.sweep_auto_recharges()
    assert attempts() == ["created"]  # not asked again while the first call may still run
    with later(minutes=2):
        assert tasks.sweep_auto_recharges() == 1
    assert attempts() == ["paid"]
    assert credits_of(alice) == ONE_RECHARGE
    assert len(recharge_intents(stripe)) == 1


def test_time_out_and_the_webhook_is_quicker(prepare: Prepare, stripe: StripeStandIn, impatient: None) -> None:
    """30"""
    alice = prepare()
    stripe.control("faults", kind="timeout_after", path_prefix=INTENTS, method="POST", count=3, seconds=5)
    tasks.auto_recharge(alice.pk)
    for event in events_of(stripe, "payment_intent.succeeded"):
        assert deliver(event).status_code == 200
    assert attempts() == ["paid"]
    with later(minutes=2):
        tasks.sweep_auto_recharges()
    assert credits_of(alice) == ONE_RECHARGE


def test_too_many_requests(prepare: Prepare, stripe: StripeStandIn) -> None:
    """30: 429 says nothing about the charge; the same key later."""
    alice = prepare()
    stripe.control("faults", kind="429", path_prefix=INTENTS, method="POST", count=1)
    tasks.auto_recharge(alice.pk)
    assert attempts() == ["created"]
    with later(minutes=2):
        tasks.sweep_auto_recharges()
    assert (attempts(), credits_of(alice)) == (["paid"], ONE_RECHARGE)


def test_fault_of_stripe_after_the_charge(prepare: Prepare, stripe: StripeStandIn) -> None:
    """30: Stripe gives its 500 again for the same key, so the payment is looked up."""
    alice = prepare()
    stripe.control("faults", kind="500_after", path_prefix=INTENTS, method="POST", count=1)
    tasks.auto_recharge(alice.pk)
    assert (attempts(), credits_of(alice)) == (["paid"], ONE_RECHARGE)


def test_fault_of_stripe_before_the_charge(prepare: Prepare, stripe: StripeStandIn) -> None:
    """30: nothing is found, so the attempt failed. It is no decline, and the next one has a new key."""
    alice = prepare()
    stripe.control("faults", kind="500", path_prefix=INTENTS, method="POST", count=1)
    tasks.auto_recharge(alice.pk)
    assert (attempts(), account_of(alice).auto_recharge_failures) == (["failed"], 0)
    tasks.sweep_auto_recharges()
    assert attempts() == ["failed"]
    with later(minutes=11):
        tasks.sweep_auto_recharges()
    assert (attempts(), credits_of(alice)) == (["failed", "paid"], ONE_RECHARGE)


def test_fault_while_it_is_looked_up(prepare: Prepare, stripe: StripeStandIn) -> None:
    """30: as long as nobody knows, the attempt stays and there is no other one."""
    alice = prepare()
    stripe.control("faults", kind="500_after", path_prefix=INTENTS, method="POST", count=1)
    stripe.control("faults", kind="429", path_prefix=INTENTS, method="GET", count=1)
    tasks.auto_recharge(alice.pk)
    tasks.auto_recharge(alice.pk)
    assert attempts() == ["created"]
    with later(minutes=2):
        tasks.sweep_auto_recharges()
    assert (attempts(), credits_of(alice)) == (["paid"], ONE_RECHARGE)


def test_attempt_older_than_its_key(prepare: Prepare, stripe: StripeStandIn) -> None:
    """30: Stripe forgets a key after a day, so an old attempt is only looked up."""
    alice = prepare()
    stripe.control("faults", kind="429", path_prefix=INTENTS, method="POST", count=1)
    tasks.auto_recharge(alice.pk)
    with later(hours=21):
        tasks.sweep_auto_recharges()
        assert attempts() == ["failed"]
    assert recharge_intents(stripe) == []


KILLED_WORKER = """
import os, signal, sys
import django
django.setup()
from billing import tasks
from billing.payments import gateway, recharge
point, user_id = sys.argv[1], int(sys.argv[2])
charge = gateway.charge_saved_card

def die(*arguments, **options):
    os.kill(os.getpid(), signal.SIGKILL)

def charge_and_die(**options):
    charge(**options)
    die()

if point == "before the call":
    gateway.charge_saved_card = die
elif point == "after the charge":
    gateway.charge_saved_card = charge_and_die
elif point == "inside the credit":
    recharge._after_credit = die
tasks.auto_recharge(user_id)
die()
"""


def kill_a_worker(user: User, point: str) -> None:
    """Run the task in a process of its own, which is killed with -9 at a point."""
    database = connection.settings_dict
    password = f":{quote(database['PASSWORD'], safe='')}" if database["PASSWORD"] else ""
    address = f"{database['USER']}{password}@{quote(database['HOST'], safe='')}:{database['PORT'] or 5432}"
    environment = os.environ | {
        "DATABASE_URL": f"postgresql://{address}/{database['NAME']}",
        "DJANGO_SETTINGS_MODULE": "postmate.settings",
    }
    command = [sys.executable, "-c", KILLED_WORKER, point, str(user.pk)]
    assert subprocess.run(command, cwd=PROJECT, env=environment, check=False).returncode == -signal.SIGKILL


@pytest.mark.django_db(transaction=True)
@pytest.mark.parametrize(
    ("point", "state", "charges"),
    [
        ("before the call", "created", 1),
        ("after the charge", "created", 2),
        ("inside the credit", "created", 2),
        ("after the commit", "paid", 2),
    ],
)
def test_killed_worker(prepare: Prepare, stripe: StripeStandIn, point: str, state: str, charges: int) -> None:
    """31: kill -9 wherever it hurts; the redelivered task and the sweep bring one charge and one credit."""
    alice = prepare()
    kill_a_worker(alice, point)
    assert attempts() == [state]
    assert stripe.state()["succeeded_charges"] == charges
    tasks.auto_recharge(alice.pk)
    assert attempts() == [state]
    with later(minutes=2):
        tasks.sweep_auto_recharges()
        tasks.sweep_auto_recharges()
    assert (attempts(), credits_of(alice)) == (["paid"], ONE_RECHARGE)
    assert len(recharge_intents(stripe)) == 1
    assert told("auto_recharge_succeeded") == 1


def test_task_delivered_twice(prepare: Prepare, stripe: StripeStandIn) -> None:
    """33: also while the first delivery still waits for the bank, and after it."""
    alice = prepare()
    stripe.control("faults", kind="processing", path_prefix=INTENTS, method="POST", count=1)
    for _ in range(3):
        tasks.auto_recharge(alice.pk)
    assert attempts() == ["processing"]
    (intent,) = recharge_intents(stripe)
    stripe.control(f"payments/{intent['id']}/settle", outcome="succeeded")
    deliver(events_of(stripe, "payment_intent.succeeded")[0])
    tasks.auto_recharge(alice.pk)
    assert (attempts(), credits_of(alice)) == (["paid"], ONE_RECHARGE)


# --- No money -------------------------------------------------------------------------------------------------------


def test_declined(prepare: Prepare, stripe: StripeStandIn, client: Client) -> None:
    """34: after one hour, after one day, then off; each time a new key, each time the user is told."""
    alice = prepare(FAILING_LATER)
    tasks.auto_recharge(alice.pk)
    for _ in range(3):
        tasks.sweep_auto_recharges()
    assert attempts() == ["failed"]
    assert (attempt().failure_code, attempt().message) == ("generic_decline", "Your card was declined.")
    assert (account_of(alice).auto_recharge_failures, told("auto_recharge_failed")) == (1, 1)
    page = client.get("/tokens/").content.decode()
    assert "The last recharge failed." in page
    with later(minutes=61):
        tasks.sweep_auto_recharges()
        tasks.sweep_auto_recharges()
        assert attempts() == ["failed"] * 2
    with later(hours=24):
        tasks.sweep_auto_recharges()
        assert attempts() == ["failed"] * 2
    with later(hours=26):
        tasks.sweep_auto_recharges()
        tasks.sweep_auto_recharges()
    with later(days=30):
        tasks.sweep_auto_recharges()
        tasks.auto_recharge(alice.pk)
    assert attempts() == ["failed"] * 3
    account = account_of(alice)
    assert not account.auto_recharge_enabled
    assert (told("auto_recharge_failed"), told("auto_recharge_switched_off")) == (2, 1)
    assert "Auto-recharge was switched off." in client.get("/tokens/").content.decode()
    # What Stripe says of it in its events was counted already.
    for event in events_of(stripe, "payment_intent.payment_failed"):
        assert deliver(event).status_code == 200
    assert account_of(alice).auto_recharge_failures == 3
    assert credits_of(alice) == ONE_STARTER


def test_success_forgets_earlier_declines(prepare: Prepare, stripe: StripeStandIn) -> None:
    """34: three in a row switch off, not three in a lifetime."""
    alice = prepare(FAILING_LATER)
    tasks.auto_recharge(alice.pk)
    replace_card(stripe, alice)
    tasks.refresh_card(alice.pk)
    tasks.sweep_auto_recharges()  # another card need not wait
    assert attempts() == ["failed", "paid"]
    account = account_of(alice)
    assert (account.auto_recharge_failures, account.auto_recharge_retry_at) == (0, None)


def test_hopeless_card(prepare: Prepare, stripe: StripeStandIn) -> None:
    """34: a stolen card gets no second try."""
    alice = prepare()
    stripe.control("faults", kind="processing", path_prefix=INTENTS, method="POST", count=1)
    tasks.auto_recharge(alice.pk)
    (intent,) = recharge_intents(stripe)
    stripe.control(f"payments/{intent['id']}/settle", outcome="failed", decline="stolen_card")
    assert deliver(event_of(stripe, "payment_intent.payment_failed")).status_code == 200
    assert attempts() == ["failed"]
    assert not account_of(alice).auto_recharge_enabled
    assert told("auto_recharge_switched_off") == 1


def test_authentication_required(prepare: Prepare, stripe: StripeStandIn, client: Client) -> None:
    """35: not credited; the user gets a link, confirms at the bank, and then it is credited once."""
    alice = prepare(NEEDS_OWNER)
    tasks.auto_recharge(alice.pk)
    assert attempts() == ["action_required"]
    assert credits_of(alice) == ONE_STARTER
    assert account_of(alice).auto_recharge_failures == 0
    link = reverse("tokens:confirm", args=[attempt().pk])
    assert Notification.objects.get(kind="auto_recharge_needs_confirmation").link == link
    assert link in client.get("/tokens/").content.decode()
    # The decline's own event says nothing new.
    deliver(event_of(stripe, "payment_intent.payment_failed"))
    assert attempts() == ["action_required"]

    assert "Confirm with your bank" in client.get(link).content.decode()
    answer = client.post(link, {"confirm_key": "first-try"})
    assert answer["Location"].startswith(f"{project_settings.STRIPE_API_BASE}/authenticate/")
    back = confirm_at_bank(stripe)
    assert back.headers["Location"].startswith(f"{project_settings.SITE_URL}{link}?")
    assert "150,000 tokens were added" in client.get(link).content.decode()
    deliver(events_of(stripe, "payment_intent.succeeded")[0])
    assert (attempts(), credits_of(alice)) == (["paid"], ONE_RECHARGE)


def test_authentication_failed_then_passed(prepare: Prepare, stripe: StripeStandIn, client: Client) -> None:
    """35: who is not recognised may try again; it is no decline of the card."""
    alice = prepare(NEEDS_OWNER)
    tasks.auto_recharge(alice.pk)
    link = reverse("tokens:confirm", args=[attempt().pk])
    for number, outcome in enumerate(("fail", "complete")):
        client.post(link, {"confirm_key": f"try-number-{number}"})
        confirm_at_bank(stripe, outcome)
        for event in events_of(stripe, "payment_intent.payment_failed"):
            deliver(event)
        page = client.get(link).content.decode()
        assert ("Confirm with your bank" in page) is (outcome == "fail")
    assert (attempts(), account_of(alice).auto_recharge_failures) == (["paid"], 0)
    assert credits_of(alice) == ONE_RECHARGE


def test_confirmed_without_an_answer(prepare: Prepare, stripe: StripeStandIn, client: Client) -> None:
    """30, 35: Stripe took the money and answered with a fault. The next click finds it paid, and says nothing else."""
    alice = prepare(NEEDS_OWNER)
    tasks.auto_recharge(alice.pk)
    purchase = buy(stripe, client)  # saves a card that needs no bank's page
    deliver(events_of(stripe, "checkout.session.completed")[0])
    tasks.remember_card(purchase.pk)
    link = reverse("tokens:confirm", args=[attempt().pk])
    stripe.control("faults", kind="500_after", path_prefix=f"{INTENTS}/", method="POST")
    client.post(link, {"confirm_key": "first-click"})
    assert attempts() == ["action_required"]
    assert Purchase.objects.get(pk=attempt().pk).checked_at is None  # the page that follows asks
    stripe.control("faults", kind="429", path_prefix=f"{INTENTS}/", method="GET")
    # It claims nothing that it does not know.
    assert "were not charged" not in client.get(link).content.decode()
    answer = client.post(link, {"confirm_key": "second-click"}, follow=True)
    assert (attempts(), credits_of(alice)) == (["paid"], ONE_STARTER * 3)
    assert "not charged" not in answer.content.decode()


def test_never_confirmed(prepare: Prepare, stripe: StripeStandIn) -> None:
    """35: given up after a day, at Stripe first; then the next attempt waits as after a decline."""
    alice = prepare(NEEDS_OWNER)
    tasks.auto_recharge(alice.pk)
    with later(hours=23):
        tasks.sweep_auto_recharges()
        assert attempts() == ["action_required"]
    with later(hours=25):
        tasks.sweep_auto_recharges()
        tasks.sweep_auto_recharges()
    assert attempts() == ["expired"]
    assert recharge_intents(stripe)[0]["status"] == "canceled"
    assert (account_of(alice).auto_recharge_failures, told("auto_recharge_failed")) == (1, 1)


def test_confirmed_in_the_last_moment(prepare: Prepare, stripe: StripeStandIn, client: Client) -> None:
    """35: what was paid while it was given up is credited."""
    alice = prepare(NEEDS_OWNER)
    tasks.auto_recharge(alice.pk)
    client.post(reverse("tokens:confirm", args=[attempt().pk]), {"confirm_key": "in-the-end"})
    confirm_at_bank(stripe)
    with later(hours=25):
        tasks.sweep_auto_recharges()
    assert (attempts(), credits_of(alice)) == (["paid"], ONE_RECHARGE)


@pytest.mark.parametrize(("kind", "state"), [("processing", "processing"), ("requires_action", "action_required")])
def test_answered_200_and_not_paid(prepare: Prepare, stripe: StripeStandIn, kind: str, state: str) -> None:
    """36: not credited until it succeeds; the sweep learns of it when no event comes."""
    alice = prepare()
    stripe.control("faults", kind=kind, path_prefix=INTENTS, method="POST", count=1)
    tasks.auto_recharge(alice.pk)
    assert (attempts(), credits_of(alice)) == ([state], ONE_STARTER)
    assert told("auto_recharge_needs_confirmation") == (kind == "requires_action")
    (intent,) = recharge_intents(stripe)
    if kind == "processing":
        stripe.control(f"payments/{intent['id']}/settle", outcome="succeeded")
    else:
        confirm_at_bank(stripe)
    with later(minutes=11):
        tasks.sweep_auto_recharges()
    assert (attempts(), credits_of(alice)) == (["paid"], ONE_RECHARGE)


def test_a_late_failure_ends_nothing(prepare: Prepare, stripe: StripeStandIn) -> None:
    """13, 36: an event of an earlier try, while the payment is under way: Stripe is asked, and no second one begins."""
    alice = prepare()
    stripe.control("faults", kind="processing", path_prefix=INTENTS, method="POST", count=1)
    tasks.auto_recharge(alice.pk)
    (intent,) = recharge_intents(stripe)
    created = next(
        event for event in events_of(stripe, "payment_intent.created") if event["data"]["object"]["id"] == intent["id"]
    )
    failed = {"status": "requires_payment_method", "last_payment_error": {"code": "card_declined", "message": "No."}}
    late = changed(created, failed, type="payment_intent.payment_failed")
    assert deliver(late).status_code == 200
    assert (attempts(), account_of(alice).auto_recharge_failures) == (["processing"], 0)
    tasks.auto_recharge(alice.pk)
    stripe.control(f"payments/{intent['id']}/settle", outcome="succeeded")
    assert deliver(changed(late)).status_code == 200  # late once more: it is paid by now
    assert (attempts(), credits_of(alice)) == (["paid"], ONE_RECHARGE)


def test_delayed_payment_fails(prepare: Prepare, stripe: StripeStandIn) -> None:
    """36: the bank sends it back: a failure like a decline."""
    alice = prepare()
    stripe.control("faults", kind="processing", path_prefix=INTENTS, method="POST", count=1)
    tasks.auto_recharge(alice.pk)
    (intent,) = recharge_intents(stripe)
    stripe.control(f"payments/{intent['id']}/settle", outcome="failed")
    assert deliver(event_of(stripe, "payment_intent.payment_failed")).status_code == 200
    assert (attempts(), account_of(alice).auto_recharge_failures) == (["failed"], 1)


# --- The card goes, the user changes their mind ---------------------------------------------------------------------


def portal(stripe: StripeStandIn, client: Client) -> str:
    """The path of Stripe's page for the card."""
    return client.post(reverse("tokens:card"))["Location"].removeprefix(stripe.url)


def replace_card(stripe: StripeStandIn, user: User) -> None:
    client = Client()
    client.force_login(user)
    show_password(client)
    stripe.post(portal(stripe, client), data={"test_card": GOOD}, follow_redirects=False)


def test_card_removed(prepare: Prepare, stripe: StripeStandIn, client: Client) -> None:
    """37: on Stripe's page: off with a notice; no attempt any more."""
    alice = prepare()
    form = {"action": "remove", "payment_method": account_of(alice).stripe_payment_method_id}
    stripe.post(portal(stripe, client), data=form, follow_redirects=False)
    for _ in range(2):
        assert deliver(event_of(stripe, "payment_method.detached")).status_code == 200
    account = account_of(alice)
    assert (account.stripe_payment_method_id, account.card_last4, account.auto_recharge_enabled) == ("", "", False)
    assert told("auto_recharge_switched_off") == 1
    tasks.auto_recharge(alice.pk)
    tasks.sweep_auto_recharges()
    assert attempts() == []


def test_card_removed_and_the_event_is_lost(prepare: Prepare, stripe: StripeStandIn, client: Client) -> None:
    """37: the first attempt is refused; then off, no loop."""
    alice = prepare()
    form = {"action": "remove", "payment_method": account_of(alice).stripe_payment_method_id}
    stripe.post(portal(stripe, client), data=form, follow_redirects=False)
    for _ in range(3):
        tasks.auto_recharge(alice.pk)
        tasks.sweep_auto_recharges()
    assert attempts() == ["failed"]
    account = account_of(alice)
    assert (account.stripe_payment_method_id, account.auto_recharge_enabled) == ("", False)
    assert told("auto_recharge_switched_off") == 1


def test_card_changed(prepare: Prepare, stripe: StripeStandIn, client: Client) -> None:
    """37: another card on Stripe's page; the way back from there takes it over, and so does the event."""
    alice = prepare(FAILING_LATER)
    before = account_of(alice)
    stripe.post(portal(stripe, client), data={"test_card": "5555555555554444"}, follow_redirects=False)
    assert client.get(reverse("tokens:card"))["Location"] == "/tokens/#auto-recharge"
    account = account_of(alice)
    assert (account.card_brand, account.card_last4, account.auto_recharge_enabled) == ("mastercard", "4444", True)
    assert told("saved_card_changed") == 1
    for number, card in ((2, before.stripe_payment_method_id), (3, account.stripe_payment_method_id)):  # there and back
        answer = stripe.post(
            f"/v1/customers/{before.stripe_customer_id}",
            data={"invoice_settings[default_payment_method]": card},
            headers={"Authorization": "Bearer sk_test_tests"},
        )
        assert answer.status_code == 200
        for _ in range(2):
            tasks.refresh_card(alice.pk)
        assert told("saved_card_changed") == number
    form = {"action": "remove", "payment_method": before.stripe_payment_method_id}
    stripe.post(portal(stripe, client), data=form, follow_redirects=False)
    deliver(event_of(stripe, "payment_method.detached"))
    assert account_of(alice).auto_recharge_enabled
    tasks.auto_recharge(alice.pk)
    assert attempts() == ["paid"]


def customer_deleted(stripe: StripeStandIn, user: User) -> None:
    customer_id = account_of(user).stripe_customer_id
    gateway._client().v1.customers.delete(str(customer_id))


def test_customer_deleted(prepare: Prepare, stripe: StripeStandIn, client: Client) -> None:
    """37: off with a notice; the next Checkout makes a new customer."""
    alice = prepare()
    customer_deleted(stripe, alice)
    assert deliver(event_of(stripe, "customer.deleted")).status_code == 200
    account = account_of(alice)
    assert (account.stripe_customer_id, account.auto_recharge_enabled) == (None, False)
    assert told("auto_recharge_switched_off") == 1
    tasks.auto_recharge(alice.pk)
    assert attempts() == []
    purchase = buy(stripe, client)
    for event in events_of(stripe, "checkout.session.completed"):
        deliver(event)
    assert purchase_state(purchase) == "paid"


def test_customer_deleted_and_the_event_is_lost(prepare: Prepare, stripe: StripeStandIn) -> None:
    """37"""
    alice = prepare()
    customer_deleted(stripe, alice)
    for _ in range(3):
        tasks.auto_recharge(alice.pk)
        tasks.sweep_auto_recharges()
    assert attempts() == ["failed"]
    assert not account_of(alice).auto_recharge_enabled
    assert told("auto_recharge_switched_off") == 1


def test_new_card_under_the_same_contract(prepare: Prepare, stripe: StripeStandIn) -> None:
    """37: the bank sent its owner a new card: only what is shown changes."""
    alice = prepare(spend=False)
    event = event_of(stripe, "payment_method.attached")
    card = event["data"]["object"]["card"] | {"last4": "1881"}
    assert deliver(changed(event, {"card": card}, type="payment_method.automatically_updated")).status_code == 200
    account = account_of(alice)
    assert (account.card_last4, account.auto_recharge_enabled) == ("1881", True)


def test_switched_off_while_a_charge_runs(prepare: Prepare, stripe: StripeStandIn) -> None:
    """38: the completed charge still credits, and there is no other one."""
    alice = prepare()
    stripe.control("faults", kind="processing", path_prefix=INTENTS, method="POST", count=1)
    tasks.auto_recharge(alice.pk)
    recharge_settings.update_auto_recharge(
        user_id=alice.pk, enabled=False, threshold_tokens=1_000, package_id=starter().pk
    )
    (intent,) = recharge_intents(stripe)
    stripe.control(f"payments/{intent['id']}/settle", outcome="succeeded")
    deliver(events_of(stripe, "payment_intent.succeeded")[0])
    assert (attempts(), credits_of(alice)) == (["paid"], ONE_RECHARGE)
    spend_down(alice)
    tasks.auto_recharge(alice.pk)
    assert attempts() == ["paid"]
    assert recharge_settings.get_overview(account_of(alice)).state == "off"


@pytest.mark.parametrize("charged", [True, False])
def test_switched_off_before_the_answer(
    prepare: Prepare, stripe: StripeStandIn, impatient: None, charged: bool
) -> None:
    """38: what Stripe has done counts; what it has not done is not asked for any more."""
    alice = prepare()
    kind = "timeout_after" if charged else "429"
    stripe.control("faults", kind=kind, path_prefix=INTENTS, method="POST", count=3 if charged else 1, seconds=5)
    tasks.auto_recharge(alice.pk)
    recharge_settings.update_auto_recharge(
        user_id=alice.pk, enabled=False, threshold_tokens=1_000, package_id=starter().pk
    )
    with later(minutes=2):
        tasks.sweep_auto_recharges()
    assert attempts() == (["paid"] if charged else ["failed"])
    assert credits_of(alice) == (ONE_RECHARGE if charged else ONE_STARTER)


@pytest.mark.parametrize("status", ["blocked", "suspended"])
def test_stopped_before_the_answer(prepare: Prepare, stripe: StripeStandIn, status: str) -> None:
    """60: who may not buy any more is not charged by the second try either."""
    alice = prepare()
    stripe.control("faults", kind="429", path_prefix=INTENTS, method="POST", count=1)
    tasks.auto_recharge(alice.pk)
    TokenAccount.objects.filter(user=alice).update(status=status, status_reason="Fraud")
    with later(minutes=2):
        tasks.sweep_auto_recharges()
    assert (attempts(), recharge_intents(stripe)) == (["failed"], [])


def test_stopped_before_the_confirmation(prepare: Prepare, stripe: StripeStandIn, client: Client) -> None:
    """60: nor by their bank's page, and the payment is given up at Stripe."""
    alice = prepare(NEEDS_OWNER)
    tasks.auto_recharge(alice.pk)
    TokenAccount.objects.filter(user=alice).update(status="blocked", status_reason="Fraud")
    link = reverse("tokens:confirm", args=[attempt().pk])
    assert "cannot buy tokens" in client.post(link, {"confirm_key": "first-try"}, follow=True).content.decode()
    with later(minutes=11):
        tasks.sweep_auto_recharges()
    assert (attempts(), recharge_intents(stripe)[0]["status"]) == (["expired"], "canceled")


def test_switched_off_before_the_confirmation(prepare: Prepare, stripe: StripeStandIn) -> None:
    """38: a payment that waits for its owner is given up at Stripe."""
    alice = prepare(NEEDS_OWNER)
    tasks.auto_recharge(alice.pk)
    recharge_settings.update_auto_recharge(
        user_id=alice.pk, enabled=False, threshold_tokens=1_000, package_id=starter().pk
    )
    with later(minutes=11):
        tasks.sweep_auto_recharges()
    assert attempts() == ["expired"]
    assert recharge_intents(stripe)[0]["status"] == "canceled"


def test_package_off_sale(prepare: Prepare) -> None:
    """24: what is not sold is not bought."""
    alice = prepare()
    TokenPricing.objects.update(is_active=False)
    tasks.auto_recharge(alice.pk)
    assert attempts() == []
    assert not account_of(alice).auto_recharge_enabled
    assert told("auto_recharge_switched_off") == 1


@pytest.mark.parametrize(
    ("changes", "is_bought"),
    [
        ({"price_usd_cents": 1_501}, False),
        ({"tokens": 149_999}, False),
        ({"price_usd_cents": 1_499, "tokens": 150_001}, True),
    ],
)
def test_package_on_other_terms(prepare: Prepare, changes: dict[str, int], is_bought: bool) -> None:
    """24: dearer or smaller than agreed, it is not bought before its owner has chosen again."""
    alice = prepare()
    packages.update_package(starter().pk, **changes)
    tasks.auto_recharge(alice.pk)
    assert (attempts(), account_of(alice).auto_recharge_enabled) == (["paid"] if is_bought else [], is_bought)
    if not is_bought:
        notice = Notification.objects.get(kind="auto_recharge_switched_off").body
        assert f"The package is now {starter().tokens:,} tokens for $" in notice
        assert "You agreed to 150,000 tokens for $15.00. Choose again" in notice
        switch_on(alice)
        tasks.auto_recharge(alice.pk)
        assert attempts() == ["paid"]


def test_terms_of_who_switched_it_on_before_they_were_kept(prepare: Prepare) -> None:
    """24: the migration takes the price of its day for agreed, in the account's currency."""
    alice = prepare()
    packages.update_package(starter().pk, price_eur_cents=1_400)
    TokenAccount.objects.filter(user=alice).update(
        auto_recharge_price_cents=None, auto_recharge_package_tokens=None, currency="eur"
    )
    migration = import_module("billing.migrations.0008_auto_recharge_terms")
    migration.agree_to_prices_of_today(apps, connection.schema_editor())
    assert account_of(alice).auto_recharge_terms == "150,000 tokens for €14.00"
    TokenAccount.objects.filter(user=alice).update(currency="usd")


def test_package_changed_during_the_charge(prepare: Prepare, stripe: StripeStandIn) -> None:
    """24: the snapshot counts, and the same key is sent with the same contents."""
    alice = prepare()
    stripe.control("faults", kind="429", path_prefix=INTENTS, method="POST", count=1)
    tasks.auto_recharge(alice.pk)
    TokenPricing.objects.update(tokens=1, price_usd_cents=99, name="Other")
    with later(minutes=2):
        tasks.sweep_auto_recharges()
    assert credits_of(alice) == ONE_RECHARGE


# --- The cap --------------------------------------------------------------------------------------------------------


def test_monthly_cap(prepare: Prepare) -> None:
    """39: $40 a month are two packages of $15; the next calendar month has room again, a refund makes none."""
    with at(datetime(2031, 3, 5, 12, tzinfo=UTC)):
        alice = prepare(cap_cents=4_000)
        for _ in range(4):
            tasks.auto_recharge(alice.pk)
            tasks.sweep_auto_recharges()
            spend_down(alice)
        assert attempts() == ["paid"] * 2
        account = account_of(alice)
        assert account.auto_recharge_retry_at == datetime(2031, 4, 1, tzinfo=UTC)
        assert "limit of $40.00" in account.auto_recharge_last_outcome
        # Raised, the cap makes room at once.
        switch_on(alice, cap_cents=4_500)
        tasks.auto_recharge(alice.pk)
        assert attempts() == ["paid"] * 3
        spend_down(alice)
        tasks.auto_recharge(alice.pk)
    with at(datetime(2031, 3, 31, 23, 59, tzinfo=UTC)):
        tasks.sweep_auto_recharges()
        assert attempts() == ["paid"] * 3
    with at(datetime(2031, 4, 1, 0, 1, tzinfo=UTC)):
        tasks.sweep_auto_recharges()
        assert attempts() == ["paid"] * 4


def test_monthly_cap_counts_what_a_person_settled(prepare: Prepare, susan: User) -> None:
    """39: a charge that left its review without a credit was made all the same."""
    alice = prepare(cap_cents=1_500)
    account = account_of(alice)
    charged = Purchase.objects.create(
        account=account, user=alice, workspace=account.workspace, kind="auto_recharge", state="review",
        package_name="Starter", tokens=1, amount_cents=1_400, currency="usd",
    )  # fmt: skip
    drift = Drift.objects.create(kind=reconcile.AMOUNT_DIFFERS, stripe_id="pi_1", purchase=charged, description="x")
    assert reconcile.resolve_drift(drift, resolution="Granted the tokens", by=susan)
    tasks.auto_recharge(alice.pk)
    assert attempts() == ["failed"]


# --- What follows a debit -------------------------------------------------------------------------------------------


def use_api(user: User, tokens: int, key: str) -> int:
    """POST /api/v1/usage, as another server does."""
    body = {
        "user_id": user.pk,
        "operation_type": "chat",
        "provider": "openai",
        "model": "gpt-6-luna",
        "input_tokens": tokens,
    }
    headers = {"Authorization": f"Bearer {BILLING_SECRET}", "Idempotency-Key": key}
    answer = Client().post("/api/v1/usage", body, content_type="application/json", headers=headers)
    return answer.status_code


@pytest.mark.django_db(transaction=True)
def test_broker_down(prepare: Prepare, monkeypatch: pytest.MonkeyPatch) -> None:
    """40: the debit is unharmed and does not wait; the sweep triggers the recharge."""
    from celery import current_app

    alice = prepare(spend=False)
    lost = "redis+socket:///nowhere/redis.sock"
    with current_app.connection_for_write(lost) as nowhere, current_app.amqp.Producer(nowhere) as producer:
        monkeypatch.setattr(current_app.amqp, "_producer_pool", OnePool(producer))
        started_at = datetime.now(UTC)
        assert use_api(alice, 106_100, "key-1") == 201
        waited = datetime.now(UTC) - started_at
    assert waited < timedelta(seconds=10)
    assert account_of(alice).balance == BONUS_TOKENS + STARTER_TOKENS - 159_150
    assert attempts() == []
    tasks.sweep_auto_recharges()
    assert (attempts(), credits_of(alice)) == (["paid"], ONE_RECHARGE)


class OnePool:
    """A pool of producers that has one, with a broker that is away."""

    def __init__(self, producer: Any) -> None:
        self.producer = producer

    def acquire(self, **options: Any) -> Any:
        return self

    def __enter__(self) -> Any:
        return self.producer

    def __exit__(self, *error: object) -> None: ...


@pytest.mark.django_db(transaction=True)
def test_low_and_critical_balance_are_told_once_per_crossing(make_user: MakeUser) -> None:
    """Low at 1,000, critical below 100, once each time the balance falls through."""
    bob = make_user("bob")

    def balance_after(tokens: int, key: str) -> tuple[int, int]:
        assert use_api(bob, tokens, key) in (200, 201)
        return told("low_balance"), told("critical_balance")

    assert balance_after(5_000, "a") == (0, 0)  # 2,500 are left
    assert balance_after(1_000, "b") == (1, 0)  # 1,000
    assert balance_after(1_000, "b") == (1, 0)  # a retry
    assert balance_after(200, "c") == (1, 0)  # 700
    assert balance_after(420, "d") == (1, 1)  # 70
    assert balance_after(2, "e") == (1, 1)
    ledger.add_tokens(user_id=bob.pk, tokens=5_000, type="bonus", description="Test", idempotency_key="more")
    assert balance_after(3_330, "f") == (1, 2)  # 5,067, then 72


# --- Settings and pages ---------------------------------------------------------------------------------------------


def save(client: Client, **changes: Any) -> Any:
    package = package_choice(starter(), "usd")
    form = {"enabled": "on", "threshold_tokens": "1000", "package_id": package, "monthly_cap_cents": ""}
    return client.post(reverse("tokens:auto-recharge"), form | changes)


def test_settings_are_saved(prepare: Prepare, client: Client) -> None:
    alice = prepare(spend=False)
    pro = TokenPricing.objects.get(name="Pro")
    answer = save(client, threshold_tokens="2500", package_id=package_choice(pro, "usd"), monthly_cap_cents="130.00")
    assert answer["Location"] == "/tokens/#auto-recharge"
    account = account_of(alice)
    assert (account.auto_recharge_threshold_tokens, account.auto_recharge_package) == (2_500, pro)
    assert account.auto_recharge_monthly_cap_cents == 13_000
    page = client.get("/tokens/").content.decode()
    assert 'value="130.00"' in page
    assert "You agreed to Pro: 750,000 tokens for $65.00." in page
    assert save(client, enabled="").status_code == 302
    assert not account_of(alice).auto_recharge_enabled


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"threshold_tokens": "0"}, "greater than or equal to 1"),
        ({"threshold_tokens": "１２"}, "Enter a whole number"),
        ({"threshold_tokens": "1.5"}, "Enter a whole number"),
        ({"threshold_tokens": "150001"}, "the threshold cannot be above that"),
        ({"threshold_tokens": "9" * 30}, "less than or equal to"),
        ({"package_id": "999999"}, "Packages and prices have changed"),
        ({"package_id": "\0"}, "Packages and prices have changed"),
        ({"monthly_cap_cents": "14.99"}, "The package costs $15.00"),
        ({"monthly_cap_cents": "0"}, "above zero"),
        ({"monthly_cap_cents": "1e400"}, "digits"),
        ({"monthly_cap_cents": "-1"}, "greater than or equal to 0"),
    ],
)
def test_wrong_settings(prepare: Prepare, client: Client, changes: dict[str, str], message: str) -> None:
    """56, 57: an error at the field, and nothing is changed."""
    alice = prepare(spend=False)
    before = TokenAccount.objects.filter(user=alice).values().get()
    answer = save(client, **changes)
    assert answer.status_code == 400
    assert message in answer.content.decode()
    assert TokenAccount.objects.filter(user=alice).values().get() == before


def test_nobody_agrees_to_a_price_that_they_have_not_seen(prepare: Prepare, client: Client) -> None:
    """The package was edited while the settings were open."""
    alice = prepare(spend=False)
    shown = package_choice(starter(), "usd")
    packages.update_package(starter().pk, price_usd_cents=9_900)
    assert save(client, package_id=shown).status_code == 400
    assert account_of(alice).auto_recharge_price_cents == 1_500
    assert save(client, package_id=shown, enabled="").status_code == 302
    assert not account_of(alice).auto_recharge_enabled
    assert save(client).status_code == 302  # having seen it
    assert account_of(alice).auto_recharge_price_cents == 9_900


def test_a_stolen_session_charges_no_card(prepare: Prepare, stripe: StripeStandIn) -> None:
    """69: on, changed, or to Stripe's page of the card only after the password; off at once. Its owner reads of it,
    whatever they have muted, and the request goes on where it stopped."""
    alice = prepare(spend=False)
    recharge_settings.update_auto_recharge(
        user_id=alice.pk, enabled=False, threshold_tokens=1_000, package_id=starter().pk
    )
    inbox.update_emailed_kinds(alice, kinds=[])
    was_told = told("auto_recharge_switched_on")
    stolen = Client()
    stolen.force_login(alice)  # no password was given in it
    asked = save(stolen, threshold_tokens="2500")
    assert asked["Location"].startswith(reverse("account_reauthenticate"))
    assert stolen.post(reverse("tokens:card"))["Location"].startswith(reverse("account_reauthenticate"))
    assert not account_of(alice).auto_recharge_enabled
    assert save(stolen, threshold_tokens="0").status_code == 400  # what is wrong is said first

    save(stolen, threshold_tokens="2500")
    answer = stolen.post(asked["Location"], {"password": PASSWORD, "next": reverse("tokens:auto-recharge")})
    assert answer["Location"] == "/tokens/#auto-recharge"
    assert (account_of(alice).auto_recharge_enabled, account_of(alice).auto_recharge_threshold_tokens) == (True, 2_500)
    save(stolen, threshold_tokens="2500")
    assert told("auto_recharge_switched_on") == was_told + 1
    notice = Notification.objects.filter(kind="auto_recharge_switched_on").latest("pk")
    assert notice.email_wanted
    assert "150,000 tokens for $15.00 with your card, Visa ending in 4242, without a limit" in notice.body

    later = Client()
    later.force_login(alice)
    assert save(later, enabled="").status_code == 302
    assert not account_of(alice).auto_recharge_enabled


def test_a_card_is_needed(client: Client, alice: User) -> None:
    client.force_login(alice)
    show_password(client)
    answer = save(client)
    assert answer.status_code == 400
    assert "There is no saved card yet." in answer.content.decode()
    with pytest.raises(ValidationError, match="no saved card"):
        switch_on(alice)
    assert client.post(reverse("tokens:card"))["Location"] == "/tokens/#auto-recharge"
    assert "no saved card yet" in client.get("/tokens/").content.decode()


def test_off_can_be_saved_when_the_package_has_gone(prepare: Prepare, client: Client) -> None:
    alice = prepare(spend=False)
    TokenPricing.objects.filter(pk=starter().pk).update(is_active=False)
    assert "not on sale any more" in client.get("/tokens/").content.decode()
    assert save(client).status_code == 400
    assert save(client, enabled="").status_code == 302
    assert not account_of(alice).auto_recharge_enabled


def test_switched_on_below_the_threshold_starts_at_once(prepare: Prepare) -> None:
    """The worker is asked; what it does is tested above."""
    alice = prepare()
    recharge_settings.update_auto_recharge(
        user_id=alice.pk, enabled=False, threshold_tokens=1_000, package_id=starter().pk
    )
    switch_on(alice)
    assert recharge._due_accounts(timezone.now()).get().user == alice


def test_confirmation_of_another_user(prepare: Prepare, client: Client, bob: User) -> None:
    """63: 404."""
    alice = prepare(NEEDS_OWNER)
    tasks.auto_recharge(alice.pk)
    link = reverse("tokens:confirm", args=[attempt().pk])
    client.force_login(bob)
    assert client.get(link).status_code == 404
    assert client.post(link, {"confirm_key": "something"}).status_code == 404
    assert client.get(reverse("tokens:confirm", args=[Purchase.objects.get(kind="checkout").pk])).status_code == 404


def test_stripe_away_while_the_card_page_opens(prepare: Prepare, stripe: StripeStandIn, client: Client) -> None:
    prepare(spend=False)
    stripe.control("faults", kind="429", path_prefix="/v1/billing_portal", count=1)
    answer = client.post(reverse("tokens:card"), follow=True)
    assert "could not be opened. Try again in a moment, or buy a package" in answer.content.decode()
    # Refused, it is each time: the operator has not set the page up.
    stripe.control("faults", kind="refused", path_prefix="/v1/billing_portal", count=1)
    assert client.post(reverse("tokens:card"))["Location"] == "/tokens/#packages"
    assert "buy a package with another one" in client.get("/tokens/").content.decode()


@pytest.fixture(autouse=True)
def _limits_start_anew() -> None:
    cache.clear()
