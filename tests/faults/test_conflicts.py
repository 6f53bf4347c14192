"""Deadlocks and serialization failures, provoked with real locks. Row 77 of FAULTS.md."""

import json
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from decimal import Decimal
from typing import Any

import psycopg
import pytest
from django.db import OperationalError, connection
from django.test import Client

from accounts.models import User
from billing import ledger
from billing.ledger import Operation, Posting
from billing.models import StripeEvent, TokenAccount, TokenTransaction
from billing.payments import webhooks
from billing.pricing import TokenPools
from kit import database
from tests.ai_ops.studio import until
from tests.payments import BONUS_TOKENS, ONE_STARTER, buy, credits_of, event_of, purchase_state, sign, verify_books
from tests.servers import StripeStandIn

pytestmark = pytest.mark.django_db(transaction=True)

DRAFT = Operation("generation", "openai", "gpt-6.1-terra", multiplier=Decimal(1))


@pytest.fixture
def other() -> Iterator[psycopg.Connection]:
    """A connection that takes locks in the wrong order. It waits for ever, so that the product's is the one to die."""
    settings = connection.settings_dict
    with psycopg.connect(
        host=settings["HOST"], port=settings["PORT"] or None, user=settings["USER"], password=settings["PASSWORD"],
        dbname=settings["NAME"],
    ) as other:  # fmt: skip
        other.execute("SET deadlock_timeout = '10min'")
        other.commit()
        yield other
        other.rollback()


@contextmanager
def beside(work: Callable[[], Any], *settings: str) -> Iterator[Future]:
    """`work` in a thread, on a connection of its own with these settings; when the context begins it waits for a
    lock."""

    def run() -> Any:
        try:
            with connection.cursor() as cursor:
                for setting in settings:
                    cursor.execute(f"SET {setting}")
                cursor.execute("SELECT pg_backend_pid()")
                pids.append(cursor.fetchone()[0])
            return work()
        finally:
            # The next one to get it from the pool shall find it as it was.
            with connection.cursor() as cursor:
                for setting in settings:
                    cursor.execute(f"RESET {setting.split()[0]}")
            connection.close()

    pids: list[int] = []
    with ThreadPoolExecutor(1) as threads:
        future = threads.submit(run)
        until(lambda: pids and (future.done() or _waits(pids[0])))
        yield future


def _waits(pid: int) -> bool:
    with connection.cursor() as cursor:
        cursor.execute("SELECT wait_event_type = 'Lock' FROM pg_stat_activity WHERE pid = %s", [pid])
        row = cursor.fetchone()
    return bool(row and row[0])


# It looks for a deadlock once, that long after it began to wait; by then there must be one.
PATIENT = "deadlock_timeout = '4s'"


def reserve(user: User, tokens: int = 1_000) -> Posting:
    return ledger.reserve_tokens(
        user_id=user.pk, tokens=tokens, operation=DRAFT, idempotency_key="hold", lifetime_seconds=600
    )


def deadlock_with_settlement(other: psycopg.Connection, alice: User) -> Future:
    """The product has the account's lock and waits for the operation's; the other has it and wants the account's."""
    usage_id = reserve(alice).usage_id
    other.execute("SELECT 1 FROM billing_tokenusage WHERE id = %s FOR UPDATE", [usage_id])

    def settle() -> Posting:
        return ledger.settle_usage(usage_id=usage_id or 0, pools=TokenPools(input_tokens=700))

    with beside(settle, PATIENT) as future:
        other.execute("SELECT 1 FROM billing_tokenaccount WHERE user_id = %s FOR UPDATE", [alice.pk])
        other.commit()
    return future


def test_settlement_in_a_deadlock(alice: User, other: psycopg.Connection) -> None:
    """Row 77: PostgreSQL ends one of the two; the product's statement is tried again and succeeds."""
    assert deadlock_with_settlement(other, alice).result().amount_tokens == -700
    account = TokenAccount.objects.get(user=alice)
    assert (account.balance, account.reserved) == (BONUS_TOKENS - 700, 0)
    verify_books()


def test_settlement_in_a_deadlock_without_a_second_try(
    alice: User, other: psycopg.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Control of row 77: there was a deadlock, and nothing was written."""
    monkeypatch.setattr(database, "CONFLICT_TRIES", 1)
    with pytest.raises(OperationalError, match="deadlock detected"):
        deadlock_with_settlement(other, alice).result()
    account = TokenAccount.objects.get(user=alice)
    assert (account.balance, account.reserved) == (BONUS_TOKENS, 1_000)
    verify_books()


@pytest.fixture
def deliver_in_a_deadlock(
    alice: User, buyer: Client, stripe: StripeStandIn, events_wait: None, other: psycopg.Connection
) -> Iterator[Callable[[], StripeEvent]]:
    """The event of a payment is handled, which locks the purchase and wants the account; the other has the account's
    lock and wants the purchase's."""
    purchase = buy(stripe, buyer)
    payload = json.dumps(event_of(stripe, "checkout.session.completed")).encode()

    def deliver() -> StripeEvent:
        return webhooks.receive_event(payload=payload, signature_header=sign(payload))

    def deliver_in_a_deadlock() -> StripeEvent:
        other.execute("SELECT 1 FROM billing_tokenaccount WHERE user_id = %s FOR UPDATE", [alice.pk])
        with beside(deliver, PATIENT) as future:
            other.execute("SELECT 1 FROM billing_purchase WHERE id = %s FOR UPDATE", [purchase.pk])
            other.commit()
        return future.result()

    yield deliver_in_a_deadlock
    assert purchase_state(purchase) == "paid"
    verify_books()


def test_credit_in_a_deadlock(alice: User, deliver_in_a_deadlock: Callable[[], StripeEvent]) -> None:
    """Row 77: the whole transaction of the event is tried again, its inbox row included."""
    row = deliver_in_a_deadlock()
    assert (row.state, row.attempts) == ("processed", 1)
    assert credits_of(alice) == ONE_STARTER


def test_credit_in_a_deadlock_without_a_second_try(
    alice: User,
    deliver_in_a_deadlock: Callable[[], StripeEvent],
    monkeypatch: pytest.MonkeyPatch,
    stripe: StripeStandIn,
) -> None:
    """Control of row 77: nothing is left of it, and Stripe's next delivery does all of it."""
    monkeypatch.setattr(database, "CONFLICT_TRIES", 1)
    with pytest.raises(OperationalError, match="deadlock detected"):
        deliver_in_a_deadlock()
    assert not StripeEvent.objects.exists()
    assert credits_of(alice) == []
    payload = json.dumps(event_of(stripe, "checkout.session.completed")).encode()
    webhooks.receive_event(payload=payload, signature_header=sign(payload))
    assert credits_of(alice) == ONE_STARTER


@pytest.mark.parametrize("tries", [4, 1])
def test_debit_that_cannot_be_serialized(
    alice: User, other: psycopg.Connection, monkeypatch: pytest.MonkeyPatch, tries: int
) -> None:
    """Row 77: where transactions are stricter than ours have to be, one that is too late begins again. With one try
    (the control) it is refused and nothing is written."""
    monkeypatch.setattr(database, "CONFLICT_TRIES", tries)
    other.execute("UPDATE billing_tokenaccount SET card_brand = 'visa' WHERE user_id = %s", [alice.pk])

    def debit() -> Posting:
        return ledger.deduct_tokens(
            user_id=alice.pk,
            tokens=300,
            operation=DRAFT,
            pools=TokenPools(input_tokens=300),
            idempotency_key="debit",
        )

    with beside(debit, "default_transaction_isolation = 'repeatable read'") as future:
        other.commit()
    if tries == 1:
        with pytest.raises(OperationalError, match="could not serialize access"):
            future.result()
    else:
        assert future.result().balance_tokens == BONUS_TOKENS - 300
    assert TokenTransaction.objects.filter(user=alice, type="usage").count() == (tries > 1)
    verify_books()
