"""Payments in parallel. Each race has its control: with the protection taken away, it goes wrong.

Numbers in docstrings are rows of FAULTS.md.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import timedelta
from itertools import count
from threading import Barrier
from typing import TYPE_CHECKING, Any

import pgtrigger
import pytest
from django.db import connection
from django.db.models import F
from django.test import Client

from accounts.models import User
from billing import ledger, tasks
from billing.models import Purchase, StripeEvent
from billing.payments import checkout, purchases, webhooks
from billing.payments.objects import Event
from kit.locks import lock_until_commit
from tests.payments import (
    ONE_STARTER,
    buy,
    changed,
    checkout_form,
    credits_of,
    deliver,
    event_of,
    purchase_state,
)
from tests.servers import StripeStandIn

if TYPE_CHECKING:
    from django.test.client import _MonkeyPatchedWSGIResponse as Answer

pytestmark = [pytest.mark.django_db(transaction=True), pytest.mark.usefixtures("books_stay_in_order", "events_wait")]

COMPLETED = "checkout.session.completed"
AT_A_TIME = 32
RACE_SECONDS = 20  # a barrier that is not full by then gives up


@pytest.fixture
def completed(stripe: StripeStandIn, buyer: Client) -> dict[str, Any]:
    """The event of a payment that nothing has told us of yet."""
    buy(stripe, buyer)
    return event_of(stripe, COMPLETED)


def in_parallel(calls: Sequence[Callable[[], "Answer"]]) -> "list[Answer]":
    """Call all, 32 at a time, each thread with a database connection of its own."""

    def call(each: Callable[[], "Answer"]) -> "Answer":
        try:
            return each()
        finally:
            connection.close()

    with ThreadPoolExecutor(AT_A_TIME) as threads:
        return list(threads.map(call, calls))


def statuses(answers: Sequence["Answer"]) -> Counter[int]:
    return Counter(answer.status_code for answer in answers)


# --- Credits --------------------------------------------------------------------------------------------------------


def test_same_event_1000_times(completed: dict[str, Any], alice: User) -> None:
    """1: 32 at a time: one ledger row, one inbox row, only 2xx."""
    answers = in_parallel([lambda: deliver(completed)] * 1_000)
    assert statuses(answers) == {200: 1_000}
    assert credits_of(alice) == ONE_STARTER
    kept = StripeEvent.objects.get(event_id=completed["id"])
    assert (kept.state, kept.attempts) == ("processed", 1)


def test_different_events_of_one_payment_at_once(
    stripe: StripeStandIn, completed: dict[str, Any], alice: User, monkeypatch: pytest.MonkeyPatch
) -> None:
    """2, 3: other event ids, so that the inbox does not help: of 32 that come to the purchase together one credits."""
    everyone_is_there = Barrier(AT_A_TIME, timeout=RACE_SECONDS)
    lock = purchases._lock

    def lock_together(purchase_id: int | str) -> Purchase:
        everyone_is_there.wait()
        return lock(purchase_id)

    monkeypatch.setattr(purchases, "_lock", lock_together)
    succeeded = event_of(stripe, "payment_intent.succeeded")
    events = [changed(event) for event in (completed, succeeded) for _ in range(AT_A_TIME)]
    answers = in_parallel([lambda event=event: deliver(event) for event in events])  # type: ignore[misc]
    assert statuses(answers) == {200: len(events)}
    assert credits_of(alice) == ONE_STARTER


def test_webhook_success_page_and_sweeper_at_once(
    stripe: StripeStandIn, completed: dict[str, Any], buyer: Client, alice: User
) -> None:
    """29: all three learn of the payment in the same moment; one credit."""
    purchase = Purchase.objects.get()
    Purchase.objects.update(created_at=F("created_at") - timedelta(minutes=5))

    def success_page() -> "Answer":
        Purchase.objects.update(checked_at=None)
        return buyer.get(f"/tokens/success/{purchase.pk}/")

    def sweep() -> "Answer":
        tasks.sweep_purchases()
        return success_page()

    events = [lambda: deliver(changed(completed)) for _ in range(14)]
    answers = in_parallel([success_page, sweep, *events])
    assert statuses(answers) == {200: 16}
    assert credits_of(alice) == ONE_STARTER


@contextmanager
def no_locks(monkeypatch: pytest.MonkeyPatch, *, racers: int) -> Iterator[None]:
    """No inbox, no lock on the purchase, no key of the ledger: only what every racer read before any of them wrote."""
    everyone_has_read = Barrier(racers, timeout=RACE_SECONDS)
    numbers = count()
    add_tokens = ledger.add_tokens

    def unlocked(purchase_id: int | str) -> Purchase:
        purchase = Purchase.objects.get(pk=int(purchase_id))
        everyone_has_read.wait()
        return purchase

    def without_key(**arguments: Any) -> ledger.Posting:
        return add_tokens(**arguments | {"idempotency_key": f"control-{next(numbers)}"})

    def without_inbox(row: StripeEvent, event: Event, *, unknown: str = "") -> StripeEvent:
        row.state, row.message = webhooks._handle(event)
        return row

    with monkeypatch.context() as patch:
        patch.setattr(purchases, "_lock", unlocked)
        patch.setattr(ledger, "add_tokens", without_key)
        patch.setattr(webhooks, "_handle_once", without_inbox)
        yield


def test_control_same_event_without_inbox_and_locks(
    completed: dict[str, Any], alice: User, monkeypatch: pytest.MonkeyPatch
) -> None:
    """1, 2, control: the race happens. The unique indexes, the last defence, turn it into errors."""
    with no_locks(monkeypatch, racers=8):
        answers = in_parallel([lambda: deliver(completed)] * 8)
    assert statuses(answers) == {200: 1, 500: 7}
    assert credits_of(alice) == ONE_STARTER


def test_control_same_event_without_any_protection(
    completed: dict[str, Any], alice: User, monkeypatch: pytest.MonkeyPatch
) -> None:
    """1, 2, control: without the indexes of the ledger as well, one payment credits many times."""
    unique = ("ledger_one_credit_per_payment_intent", "ledger_one_credit_per_purchase")
    with connection.cursor() as cursor:
        cursor.execute("SELECT indexdef FROM pg_indexes WHERE indexname = ANY(%s)", [list(unique)])
        definitions = [definition for (definition,) in cursor.fetchall()]
        assert len(definitions) == len(unique)
        try:
            for name in unique:
                cursor.execute(f"DROP INDEX {name}")
            with no_locks(monkeypatch, racers=8):
                answers = in_parallel([lambda: deliver(completed)] * 8)
            assert statuses(answers) == {200: 8}
            assert credits_of(alice) == ONE_STARTER * 8
        finally:
            _empty_ledger(cursor)
            for definition in definitions:
                cursor.execute(definition)


def _empty_ledger(cursor: Any) -> None:
    """The control has broken the books beyond repair."""
    with pgtrigger.ignore("billing.TokenTransaction:never_truncated"):
        cursor.execute("TRUNCATE billing_tokentransaction, billing_tokenaccount, billing_purchase CASCADE")


# --- Checkouts ------------------------------------------------------------------------------------------------------

CLICKS = 8


@pytest.fixture
def clickers(alice: User) -> list[Client]:
    """Alice's browser, once for each click: a test client is not made for threads."""
    clients = [Client() for _ in range(CLICKS)]
    for client in clients:
        client.force_login(alice)
    return clients


@contextmanager
def all_look_before_any_writes(monkeypatch: pytest.MonkeyPatch, *, racers: int) -> Iterator[None]:
    """The worst moment: each click has found no purchase to go on with before any has made one."""
    everyone_has_looked = Barrier(racers, timeout=RACE_SECONDS)

    def lock_together(name: str) -> None:
        everyone_has_looked.wait()
        lock_until_commit(name)

    with monkeypatch.context() as patch:
        patch.setattr("billing.payments.checkout.lock_until_commit", lock_together)
        yield


def click(clients: Sequence[Client], form: Callable[[], dict[str, Any]]) -> "list[Answer]":
    forms = [form() for _ in clients]
    return in_parallel(
        [
            lambda client=client, form=form: client.post("/tokens/checkout/", form)  # type: ignore[misc]
            for client, form in zip(clients, forms, strict=True)
        ]
    )


@pytest.mark.parametrize("same_page", [True, False], ids=["one page", "several tabs"])
def test_double_click(
    stripe: StripeStandIn, clickers: list[Client], monkeypatch: pytest.MonkeyPatch, same_page: bool
) -> None:
    """28: one purchase, one session, one customer; every click leads to the same page to pay on."""
    form = checkout_form()
    with all_look_before_any_writes(monkeypatch, racers=CLICKS):
        answers = click(clickers, lambda: form if same_page else checkout_form())
    purchase = Purchase.objects.get()
    assert {(answer.status_code, answer["Location"]) for answer in answers} == {(302, purchase.checkout_url)}
    assert [each["id"] for each in stripe.state()["sessions"]] == [purchase.stripe_session_id]
    assert [event["type"] for event in stripe.state()["events"]] == ["customer.created"]


def test_control_double_click_without_constraints(
    stripe: StripeStandIn, clickers: list[Client], monkeypatch: pytest.MonkeyPatch
) -> None:
    """28, control: without the unique constraints each click opens a checkout of its own."""
    form = checkout_form()
    names = ("purchase_once_per_form", "purchase_one_open_checkout_per_package")
    constraints = [each for each in Purchase._meta.constraints if each.name in names]
    assert len(constraints) == len(names)
    try:
        with connection.schema_editor() as editor:
            for constraint in constraints:
                editor.remove_constraint(Purchase, constraint)
        with all_look_before_any_writes(monkeypatch, racers=CLICKS):
            answers = click(clickers, lambda: form)
        assert len({answer["Location"] for answer in answers}) == CLICKS
        assert Purchase.objects.count() == len(stripe.state()["sessions"]) == CLICKS
    finally:
        Purchase.objects.all().delete()
        with connection.schema_editor() as editor:
            for constraint in constraints:
                editor.add_constraint(Purchase, constraint)


def test_double_click_while_stripe_is_slow(stripe: StripeStandIn, clickers: list[Client], alice: User) -> None:
    """28: Stripe refuses the second call while the first with its key runs. That must not spoil the first."""
    stripe.control("faults", kind="slow", path_prefix="/v1/checkout/sessions", count=1, seconds=6)
    form = checkout_form()
    answers = click(clickers[:2], lambda: form)
    purchase = Purchase.objects.get()
    assert purchase.state == "open"
    # One has waited for the page, the other is told to try again; it finds the same.
    assert {answer["Location"] for answer in answers} == {purchase.checkout_url, "/tokens/"}
    assert clickers[0].post("/tokens/checkout/", form)["Location"] == purchase.checkout_url
    assert [each["id"] for each in stripe.state()["sessions"]] == [purchase.stripe_session_id]
    assert stripe.pay(purchase.checkout_url).status_code == 303
    assert deliver(event_of(stripe, COMPLETED)).status_code == 200
    assert purchase_state(purchase) == "paid"
    assert credits_of(alice) == ONE_STARTER


def test_first_checkouts_of_two_packages_at_once(
    stripe: StripeStandIn, clickers: list[Client], monkeypatch: pytest.MonkeyPatch, alice: User
) -> None:
    """28: a new user's two tabs: two checkouts, one customer of ours, and either payment is known for hers."""
    forms = iter([checkout_form("Starter"), checkout_form("Pro")])
    with all_look_before_any_writes(monkeypatch, racers=2):
        answers = click(clickers[:2], lambda: next(forms))
    assert statuses(answers) == {302: 2}
    customer_id = ledger.get_account(user_id=alice.pk).stripe_customer_id
    assert {session["customer"] for session in stripe.state()["sessions"]} == {customer_id}
    for answer in answers:
        assert stripe.pay(answer["Location"]).status_code == 303
    for event in stripe.state()["events"]:
        if event["type"] == "payment_intent.succeeded":
            assert deliver(event).status_code == 200
    assert sorted(credits_of(alice)) == [*ONE_STARTER, (750_000, 6_500)]


# --- Limits ---------------------------------------------------------------------------------------------------------


def test_limit_of_payment_pages_holds_for_clicks_at_once(alice: User, monkeypatch: pytest.MonkeyPatch) -> None:
    """69: eight windows that all come to the count together."""
    everyone_is_there = Barrier(8, timeout=RACE_SECONDS)

    def lock_together(name: str) -> None:
        everyone_is_there.wait()
        lock_until_commit(name)

    monkeypatch.setattr(checkout, "CHECKOUTS_PER_HOUR", 3)
    monkeypatch.setattr("billing.payments.checkout.lock_until_commit", lock_together)
    ledger.get_account(user_id=alice.pk)

    def click(number: int) -> bool:
        try:
            terms = checkout.terms_of_amount(1_000 + number)
            checkout.create_checkout_session(user_id=alice.pk, terms=terms, checkout_key=f"window-{number}")
        except checkout.TooManyCheckouts:
            return False
        finally:
            connection.close()
        return True

    with ThreadPoolExecutor(8) as threads:
        assert sum(threads.map(click, range(8))) == 3
    assert Purchase.objects.count() == 3
