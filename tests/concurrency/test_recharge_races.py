"""Auto-recharge in parallel. Each race has its control: with the protection taken away, it goes wrong.

Two things protect it, and each is shown to do alone: the account's lock and the unique index over attempts under way.
Numbers in docstrings are rows of FAULTS.md.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from decimal import Decimal
from threading import Barrier, BrokenBarrierError, Thread, local
from typing import Any

import pytest
from django.db import connection, transaction
from django.db.models import QuerySet
from django.test import Client

from accounts.models import User
from billing import ledger, tasks
from billing.ledger import Party
from billing.models import Purchase, TokenAccount, TokenPricing, TokenTransaction
from billing.payments import cards, confirmation, customers, recharge, recharge_settings
from billing.pricing import TokenPools
from tests.ai_ops.studio import until
from tests.payments import STARTER_CENTS, STARTER_TOKENS, buy, deliver, event_of, verify_books
from tests.servers import StripeStandIn

pytestmark = [pytest.mark.django_db(transaction=True), pytest.mark.usefixtures("events_wait")]

RACERS = 16
RACE_SECONDS = 20  # a barrier that is not full by then gives up
INDEX = "purchase_one_auto_recharge_under_way"
CHAT = ledger.Operation("chat", "openai", "gpt-6-luna", multiplier=Decimal(1))


@pytest.fixture
def low(stripe: StripeStandIn, client: Client, alice: User) -> User:
    """Alice, with a saved card and auto-recharge on, and 2,000 tokens above the threshold."""
    client.force_login(alice)
    purchase = buy(stripe, client)
    deliver(event_of(stripe, "checkout.session.completed"))
    tasks.remember_card(purchase.pk)
    set_cap(alice, None)
    debit(alice, TokenAccount.objects.get(user=alice).available - 3_000)
    return alice


def set_cap(user: User, cap_cents: int | None) -> None:
    recharge_settings.update_auto_recharge(
        user_id=user.pk,
        enabled=True,
        threshold_tokens=1_000,
        package_id=TokenPricing.objects.get(name="Starter").pk,
        monthly_cap_cents=cap_cents,
    )


def debit(user: User, tokens: int) -> ledger.Posting:
    return ledger.deduct_tokens(
        user_id=user.pk,
        tokens=tokens,
        operation=CHAT,
        pools=TokenPools(input_tokens=tokens),
        may_leave_debt=True,
    )


def at_once(calls: Sequence[Callable[[], object]]) -> None:
    """Run each in a thread with a database connection of its own; they start together. An error is raised again."""
    start, errors = Barrier(len(calls)), []

    def run(call: Callable[[], object]) -> None:
        try:
            start.wait()
            call()
        except Exception as error:
            errors.append(error)
        finally:
            connection.close()

    threads = [Thread(target=run, args=[call]) for call in calls]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for error in errors:
        raise error


def verify_charges(stripe: StripeStandIn) -> None:
    verify_books()
    credits = TokenTransaction.objects.filter(type__in=TokenTransaction.CREDITS_FOR_MONEY).count()
    assert credits == stripe.state()["succeeded_charges"]


def recharged() -> int:
    return Purchase.objects.filter(kind="auto_recharge", state="paid").count()


@contextmanager
def without_the_index() -> Iterator[None]:
    constraint = next(each for each in Purchase._meta.constraints if each.name == INDEX)
    with connection.schema_editor() as editor:
        editor.remove_constraint(Purchase, constraint)
    try:
        yield
    finally:
        with connection.schema_editor() as editor:
            editor.add_constraint(Purchase, constraint)


def take_the_lock_away(monkeypatch: pytest.MonkeyPatch) -> None:
    """No FOR UPDATE on the account in auto-recharge; the ledger's is its own."""
    lock = QuerySet.select_for_update

    def unlocked(self: QuerySet, **options: Any) -> QuerySet:
        return self if self.model is TokenAccount else lock(self, **options)

    monkeypatch.setattr(QuerySet, "select_for_update", unlocked)


def meet_before_the_attempt(monkeypatch: pytest.MonkeyPatch, *, seconds: float = 0.5) -> None:
    """Everybody who has found the account to be due waits for the others, if they can come: the widest window."""
    everyone_has_looked, met = Barrier(RACERS, timeout=seconds), local()
    new_attempt = recharge._new_attempt

    def meet(*arguments: Any) -> Purchase | None:
        if not getattr(met, "once", False):
            met.once = True
            with suppress(BrokenBarrierError):  # where a lock keeps the others out
                everyone_has_looked.wait()
        return new_attempt(*arguments)

    monkeypatch.setattr(recharge, "_new_attempt", meet)


def cross_the_threshold(user: User) -> None:
    """32: each thread debits, and each debit that is below the threshold asks for a recharge."""

    def debit_and_trigger() -> None:
        if debit(user, 200).needs_recharge:
            tasks.auto_recharge(user.pk)

    at_once([debit_and_trigger] * RACERS)


def test_many_debits_cross_at_once(low: User, stripe: StripeStandIn) -> None:
    """32: one attempt, one charge, one credit."""
    cross_the_threshold(low)
    assert Purchase.objects.filter(kind="auto_recharge").count() == recharged() == 1
    assert TokenAccount.objects.get(user=low).balance == 3_000 - 200 * RACERS + STARTER_TOKENS
    verify_charges(stripe)


@pytest.mark.parametrize("protection", ["lock", "index"])
def test_one_protection_is_enough_for_one_attempt(
    low: User, stripe: StripeStandIn, monkeypatch: pytest.MonkeyPatch, protection: str
) -> None:
    """32, 33: the task delivered to 16 workers at once, with the lock alone and with the index alone."""
    debit(low, 2_500)
    meet_before_the_attempt(monkeypatch)
    if protection == "index":
        take_the_lock_away(monkeypatch)
        at_once([lambda: recharge._open_attempt(Party(low.pk))] * RACERS)
    else:
        with without_the_index():
            at_once([lambda: recharge._open_attempt(Party(low.pk))] * RACERS)
    assert Purchase.objects.filter(kind="auto_recharge").count() == 1
    Purchase.objects.update(checked_at=None)
    tasks.sweep_auto_recharges()
    assert recharged() == 1
    verify_charges(stripe)


def test_without_lock_and_index_there_are_several_attempts(
    low: User, stripe: StripeStandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The control of 32 and 33."""
    debit(low, 2_500)
    take_the_lock_away(monkeypatch)
    meet_before_the_attempt(monkeypatch, seconds=RACE_SECONDS)
    with without_the_index():
        at_once([lambda: tasks.auto_recharge(low.pk)] * RACERS)
    assert recharged() > 1


def race_for_the_cap(user: User) -> None:
    """39: room for one package more; 16 workers at once."""
    set_cap(user, STARTER_CENTS)
    debit(user, 2_500)
    at_once([lambda: tasks.auto_recharge(user.pk)] * RACERS)


def test_the_cap_holds_in_a_race(low: User, stripe: StripeStandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    """39: by the lock alone, which the unique index helps in vain once the first attempt is paid."""
    meet_before_the_attempt(monkeypatch)
    with without_the_index():
        race_for_the_cap(low)
    assert recharged() == 1
    verify_charges(stripe)


def test_without_the_lock_the_cap_is_exceeded(
    low: User, stripe: StripeStandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The control of 39."""
    take_the_lock_away(monkeypatch)
    meet_before_the_attempt(monkeypatch, seconds=RACE_SECONDS)
    with without_the_index():
        race_for_the_cap(low)
    assert recharged() * STARTER_CENTS > STARTER_CENTS


def test_debits_and_recharges_keep_the_cap(low: User, stripe: StripeStandIn) -> None:
    """39: 16 threads spend and recharge without a pause: three packages and not one more."""
    set_cap(low, 3 * STARTER_CENTS + 1)

    def spend_and_trigger() -> None:
        for _ in range(6):
            debit(low, 10_000)
            tasks.auto_recharge(low.pk)

    at_once([spend_and_trigger] * RACERS)
    for _ in range(3):
        tasks.auto_recharge(low.pk)
    assert recharged() == Purchase.objects.filter(kind="auto_recharge").count() == 3
    verify_charges(stripe)


def test_sweeps_and_events_and_tasks_at_once(low: User, stripe: StripeStandIn) -> None:
    """31, 33: a payment that waits is settled; all who could learn of it do so in the same moment: one credit."""
    stripe.control("faults", kind="processing", path_prefix="/v1/payment_intents", method="POST", count=1)
    debit(low, 2_500)
    tasks.auto_recharge(low.pk)
    attempt = Purchase.objects.get(kind="auto_recharge")
    assert attempt.state == "processing"
    stripe.control(f"payments/{attempt.stripe_payment_intent_id}/settle", outcome="succeeded")
    event = next(each for each in stripe.state()["events"] if each["type"] == "payment_intent.succeeded")
    event.pop("deliveries")
    Purchase.objects.update(checked_at=None)
    calls: list[Callable[[], object]] = [
        tasks.sweep_auto_recharges,
        lambda: deliver(event),
        lambda: tasks.auto_recharge(low.pk),
        lambda: confirmation.refresh_from_stripe(Purchase.objects.get(pk=attempt.pk)),
    ]
    at_once(calls * 4)
    assert recharged() == Purchase.objects.filter(kind="auto_recharge").count() == 1
    verify_charges(stripe)


def test_a_transaction_is_never_open_while_stripe_is_asked(low: User) -> None:
    """Law 7: begun inside a transaction, an attempt is refused."""
    debit(low, 2_500)
    with pytest.raises(RuntimeError, match="durable"), transaction.atomic():
        recharge.trigger_auto_recharge(user_id=low.pk)
    assert recharged() == 0


def warn_while_the_card_is_kept(user: User) -> str:
    """A bank's warning and a look at the same card at Stripe meet. Which card the account has then."""
    purchase = Purchase.objects.get(user=user)
    look = Thread(target=at_once, args=([lambda: cards.refresh_card(user_id=user.pk)],))
    with transaction.atomic():
        purchase = Purchase.objects.select_for_update().get(pk=purchase.pk)
        assert customers.distrust_card(purchase, key="warning")
        look.start()
        until(lambda: waiting_for_a_lock() or not look.is_alive())
    look.join()
    return TokenAccount.objects.get(user=user).stripe_payment_method_id


def waiting_for_a_lock() -> int:
    with connection.cursor() as cursor:
        cursor.execute("SELECT count(*) FROM pg_locks WHERE NOT granted")
        return int(cursor.fetchone()[0])


def test_a_card_that_its_bank_warns_of_is_not_kept_meanwhile(low: User) -> None:
    assert warn_while_the_card_is_kept(low) == ""


def test_without_the_lock_it_is_kept(low: User, monkeypatch: pytest.MonkeyPatch) -> None:
    take_the_lock_away(monkeypatch)
    assert warn_while_the_card_is_kept(low) != ""
