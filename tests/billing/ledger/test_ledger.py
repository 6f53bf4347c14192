"""The ledger through its public functions. Numbers in docstrings are rows of FAULTS.md."""

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from datetime import timedelta
from decimal import Decimal
from functools import partial
from itertools import count
from typing import Any

import pytest
import time_machine
from allauth.account.models import EmailAddress
from django.core.management import call_command
from django.db import DatabaseError, IntegrityError, connection, transaction
from django.db.models import F, ProtectedError
from django.utils import timezone
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from pytest_django.fixtures import Settings

from accounts.models import User, Workspace
from billing import ledger
from billing.catalogue import system_settings
from billing.ledger import Operation, Posting
from billing.models import (
    PaymentReversal,
    Purchase,
    SystemSettings,
    TokenAccount,
    TokenTransaction,
    TokenUsage,
)
from billing.pricing import TokenPools
from tests.conftest import MakeUser

pytestmark = pytest.mark.django_db

DRAFT = Operation("generation", "openai", "gpt-6.1-terra", multiplier=Decimal("1.5"))
IMAGES = Operation("image", "openai", "gpt-image-2", fixed_cost_tokens=400, image_count=2)

_keys = count(1)


@pytest.fixture
def payer(make_user: MakeUser) -> User:
    """Owns 10,000 tokens, the welcome bonus."""
    return make_user("payer")


def reserve(user: User, tokens: int, *, key: str | None = None, operation: Operation = DRAFT) -> Posting:
    return ledger.reserve_tokens(
        user_id=user.pk,
        tokens=tokens,
        operation=operation,
        idempotency_key=key or f"key-{next(_keys)}",
        lifetime_seconds=600,
    )


def settle(posting: Posting, output_tokens: int, **options: Any) -> Posting:
    assert posting.usage_id is not None
    return ledger.settle_usage(usage_id=posting.usage_id, pools=TokenPools(output_tokens=output_tokens), **options)


def release(posting: Posting, **options: Any) -> Posting:
    assert posting.usage_id is not None
    return ledger.release_usage(usage_id=posting.usage_id, **options)


def record(user: User, tokens: int, *, key: str | None = None, may_leave_debt: bool = False) -> Posting:
    """An operation that has already run elsewhere."""
    return ledger.deduct_tokens(
        user_id=user.pk,
        tokens=tokens,
        operation=DRAFT,
        pools=TokenPools(input_tokens=tokens),
        idempotency_key=key,
        may_leave_debt=may_leave_debt,
    )


def buy(user: User, tokens: int) -> Purchase:
    """A paid purchase and its credit."""
    account = TokenAccount.objects.get(user=user)
    number = next(_keys)
    purchase = Purchase.objects.create(
        account=account,
        user=user,
        workspace_id=account.workspace_id,
        kind="checkout",
        state="paid",
        paid_at=timezone.now(),
        package_name="Test",
        tokens=tokens,
        amount_cents=500,
        charged_cents=tokens,  # a cent a token, so that a refund takes back any number of them
        currency="usd",
        stripe_payment_intent_id=f"pi_{number}",
    )
    credit(purchase)
    return purchase


def credit(purchase: Purchase, **changes: Any) -> Posting:
    return ledger.add_tokens(
        **{
            "user_id": purchase.user_id,
            "tokens": purchase.tokens,
            "type": "purchase",
            "description": "Test",
            "idempotency_key": f"purchase-{purchase.pk}",
            "purchase_id": purchase.pk,
            "paid_cents": purchase.amount_cents,
            "currency": purchase.currency,
            "stripe_payment_intent_id": purchase.stripe_payment_intent_id,
            **changes,
        }
    )


def claw_back(purchase: Purchase, tokens: int) -> Posting:
    number = next(_keys)
    PaymentReversal.objects.create(
        kind="refund",
        stripe_id=f"re_{number}",
        stripe_payment_intent_id=str(purchase.stripe_payment_intent_id),
        purchase=purchase,
        amount_cents=tokens,
        currency=purchase.currency,
        status="succeeded",
    )
    return ledger.deduct_tokens(
        user_id=purchase.user_id,
        tokens=tokens,
        type="refund",
        purchase_id=purchase.pk,
        may_leave_debt=True,
        idempotency_key=f"refund-{number}",
    )


def give(user: User, tokens: int, *, key: str | None = None) -> Posting:
    return ledger.add_tokens(
        user_id=user.pk,
        tokens=tokens,
        type="bonus",
        description="Test",
        idempotency_key=key or f"key-{next(_keys)}",
    )


def usage_of(posting: Posting) -> TokenUsage:
    assert posting.usage_id is not None
    return TokenUsage.objects.get(pk=posting.usage_id)


def state(user: User) -> tuple[int, int, str]:
    account = TokenAccount.objects.get(user=user)
    return account.balance, account.reserved, account.status


def written() -> tuple[int, int]:
    return TokenUsage.objects.count(), TokenTransaction.objects.count()


# --- Reserve, settle, release -------------------------------------------------------------------------------


def test_a_reservation_holds_and_settling_charges_the_cost_and_gives_the_rest_back(payer: User) -> None:
    held = reserve(payer, 3_000)
    assert (held.balance_tokens, held.reserved_tokens, held.available_tokens) == (10_000, 3_000, 7_000)
    assert (held.amount_tokens, held.transaction_id) == (0, None)

    pools = TokenPools(input_tokens=100, cached_input_tokens=50, output_tokens=851, reasoning_tokens=800)
    assert held.usage_id is not None
    paid = ledger.settle_usage(
        usage_id=held.usage_id, pools=pools, provider_cost_microusd=77, duration_ms=1_200, is_estimated=True
    )

    assert (paid.amount_tokens, paid.balance_tokens, paid.reserved_tokens) == (-1_502, 8_498, 0)
    usage = usage_of(held)
    assert usage.status == "succeeded"
    assert usage.pools == pools
    assert (usage.actual_tokens, usage.billable_tokens, usage.unbilled_tokens) == (1_001, 1_502, 0)
    assert (usage.provider_cost_microusd, usage.duration_ms, usage.is_estimated) == (77, 1_200, True)
    assert usage.completed_at is not None
    entry = TokenTransaction.objects.get(usage=usage)
    assert entry.pk == paid.transaction_id
    assert (entry.sequence, entry.balance_before, entry.amount, entry.balance_after) == (
        2,
        10_000,
        -1_502,
        8_498,
    )
    assert entry.description == "Draft · gpt-6.1-terra"
    call_command("verify_ledger")


def test_an_operation_never_costs_more_than_its_quote(payer: User) -> None:
    """49: the quote is charged, the rest is kept as unbilled."""
    paid = settle(reserve(payer, 1_000), 900)
    assert (paid.amount_tokens, paid.balance_tokens) == (-1_000, 9_000)
    usage = usage_of(paid)
    assert (usage.actual_tokens, usage.billable_tokens, usage.unbilled_tokens) == (900, 1_000, 350)
    call_command("verify_ledger")


def test_what_was_used_up_for_nothing_costs_nothing(payer: User) -> None:
    paid = settle(reserve(payer, 1_000), 0)
    assert (paid.amount_tokens, paid.transaction_id, paid.balance_tokens, paid.reserved_tokens) == (
        0,
        None,
        10_000,
        0,
    )
    call_command("verify_ledger")


def test_images_cost_their_fixed_price(payer: User) -> None:
    paid = settle(reserve(payer, 800, operation=IMAGES), 0)
    assert paid.amount_tokens == -800
    call_command("verify_ledger")


def test_a_failed_operation_costs_nothing(payer: User) -> None:
    """53: what it cost us is kept, the user pays nothing."""
    back = release(reserve(payer, 1_000), error_message="429", provider_cost_microusd=5, duration_ms=9)
    assert (back.amount_tokens, back.balance_tokens, back.reserved_tokens) == (0, 10_000, 0)
    usage = usage_of(back)
    assert (usage.status, usage.billable_tokens, usage.error_message, usage.provider_cost_microusd) == (
        "failed",
        0,
        "429",
        5,
    )
    assert not TokenTransaction.objects.filter(usage=usage).exists()
    call_command("verify_ledger")


def test_the_last_token_can_be_reserved_and_not_one_more(payer: User) -> None:
    """48"""
    reserve(payer, 9_999)
    with pytest.raises(ledger.InsufficientTokens) as refused:
        reserve(payer, 2)
    assert (refused.value.needed_tokens, refused.value.available_tokens, refused.value.missing_tokens) == (
        2,
        1,
        1,
    )
    assert reserve(payer, 1).available_tokens == 0
    assert not ledger.check_balance(user_id=payer.pk, tokens=1).has_enough
    call_command("verify_ledger")


@pytest.mark.parametrize("first", ["settled", "failed", "expired"])
@pytest.mark.parametrize("second", ["settled", "failed", "expired"])
def test_a_reservation_is_resolved_once(payer: User, first: str, second: str) -> None:
    """54: the same again gives the first outcome, another one is refused; never a second debit."""
    close: dict[str, Callable[[Posting], Posting]] = {
        "settled": lambda held: settle(held, 200),
        "failed": release,
        "expired": partial(release, status="expired"),
    }
    held = reserve(payer, 1_000)
    outcome = close[first](held)
    before = state(payer), written()
    if first == second:
        again = close[second](held)
        assert again.is_replay
        assert (again.amount_tokens, again.transaction_id) == (outcome.amount_tokens, outcome.transaction_id)
    else:
        with pytest.raises(ledger.UsageAlreadyClosed):
            close[second](held)
    assert (state(payer), written()) == before
    call_command("verify_ledger")


def test_the_databases_clock_decides_what_has_expired(payer: User) -> None:
    """76: an application server with a wrong clock expires nothing; 50: what has expired costs nothing."""
    held = reserve(payer, 1_000)
    with time_machine.travel(timezone.now() + timedelta(days=30)):
        assert ledger.expire_reservations() == 0
    TokenUsage.objects.filter(user=payer).update(expires_at=F("created_at") - timedelta(seconds=1))
    with time_machine.travel(timezone.now() - timedelta(days=30)):
        assert ledger.expire_reservations() == 1
    assert ledger.expire_reservations() == 0
    assert state(payer) == (10_000, 0, "active")
    assert usage_of(held).status == "expired"
    call_command("verify_ledger")


def test_prices_are_those_of_the_beginning(payer: User, susan: User) -> None:
    """59"""
    held = reserve(payer, 3_000)
    system_settings.update_system_settings(
        changes={"token_multiplier": Decimal(3), "dalle3_cost_tokens": 1}, changed_by_id=susan.pk
    )
    assert settle(held, 1_000).amount_tokens == -1_500
    call_command("verify_ledger")


def test_unknown_users_and_operations() -> None:
    with pytest.raises(ledger.AccountNotFound):
        ledger.add_tokens(user_id=0, tokens=1, type="bonus", description="x", idempotency_key="x")
    with pytest.raises(ledger.AccountNotFound):
        ledger.get_account(user_id=0)
    with pytest.raises(ledger.UsageNotFound):
        ledger.settle_usage(usage_id=0, pools=TokenPools())
    with pytest.raises(ledger.UsageNotFound):
        ledger.release_usage(usage_id=0)


# --- Retries ------------------------------------------------------------------------------------------------

KEYED: dict[str, Callable[[User, int, str], Posting]] = {
    "reserve": lambda user, tokens, key: reserve(user, tokens, key=key),
    "after-the-fact usage": lambda user, tokens, key: record(user, tokens, key=key),
    "deduction": lambda user, tokens, key: ledger.deduct_tokens(
        user_id=user.pk,
        tokens=tokens,
        type="admin_deduction",
        admin_id=User.objects.get(role="superadmin").pk,
        description="Test",
        idempotency_key=key,
    ),
    "credit": lambda user, tokens, key: give(user, tokens, key=key),
}
keyed = pytest.mark.parametrize("post", KEYED.values(), ids=KEYED)


@keyed
def test_the_same_key_and_body_give_the_same_result(payer: User, susan: User, post: Any) -> None:
    """55, also when the first one has spent the whole balance."""
    first = post(payer, 10_000, "one")
    before = state(payer), written()
    again = post(payer, 10_000, "one")
    assert again.is_replay
    assert not first.is_replay
    assert (again.usage_id, again.transaction_id, again.amount_tokens, again.balance_tokens) == (
        first.usage_id,
        first.transaction_id,
        first.amount_tokens,
        first.balance_tokens,
    )
    assert (state(payer), written()) == before
    call_command("verify_ledger")


@keyed
@pytest.mark.parametrize("other_tokens", [200, 20_000], ids=["affordable", "too much"])
def test_the_same_key_and_another_body_conflict(payer: User, susan: User, post: Any, other_tokens: int) -> None:
    """55"""
    post(payer, 100, "one")
    before = state(payer), written()
    with pytest.raises(ledger.IdempotencyConflict):
        post(payer, other_tokens, "one")
    assert (state(payer), written()) == before


def test_a_key_stands_for_its_request_whatever_is_posted_for_it(payer: User) -> None:
    """55, law 8: a request is the same at another price, also at none; and a hold is no debit."""

    def unpaid(tokens: int, **named: Any) -> Posting:
        return ledger.record_unpaid(pools=TokenPools(input_tokens=tokens), status="failed", **named)

    def held(tokens: int, **named: Any) -> Posting:
        return ledger.reserve_tokens(tokens=tokens, lifetime_seconds=60, **named)

    def debited(tokens: int, **named: Any) -> Posting:
        return ledger.deduct_tokens(tokens=tokens, pools=TokenPools(input_tokens=tokens), **named)

    posts = {unpaid: ledger.find_recorded, held: ledger.find_reservation, debited: ledger.find_recorded}
    dearer = replace(DRAFT, multiplier=Decimal(9))
    for post, find in posts.items():
        key: dict[str, Any] = {"user_id": payer.pk, "idempotency_key": f"{post.__name__}-1"}
        asked = key | {"request": {"wish": "a draft"}}
        assert find(**asked) is None
        first = post(100, operation=DRAFT, **asked)
        before = state(payer), written()
        for other_post, other_find in posts.items():
            for request in ({"wish": "a draft"}, {"wish": "a draft", "words": 2}):
                other = key | {"request": request}
                if other_find is find and request == asked["request"]:
                    for again in (other_post(900, operation=dearer, **other), other_find(**other)):
                        assert again is not None
                        assert (again.usage_id, again.amount_tokens) == (first.usage_id, first.amount_tokens)
                        assert again.is_replay
                else:
                    with pytest.raises(ledger.IdempotencyConflict):
                        other_post(900, operation=dearer, **other)
                    with pytest.raises(ledger.IdempotencyConflict):
                        other_find(**other)
        assert (state(payer), written()) == before
    call_command("verify_ledger")


@keyed
def test_another_users_key_is_another_key(payer: User, bob: User, susan: User, post: Any) -> None:
    """55: nothing leaks from one user to the other."""
    first, other = post(payer, 100, "one"), post(bob, 300, "one")
    assert not other.is_replay
    assert (other.user_id, other.account_id) == (bob.pk, bob.token_account.pk)
    assert (other.usage_id, other.transaction_id) != (first.usage_id, first.transaction_id)
    call_command("verify_ledger")


def test_a_retry_is_answered_when_the_account_was_suspended_meanwhile(payer: User) -> None:
    """55 with 60: the first one left a debt."""
    first = record(payer, 15_000, key="one", may_leave_debt=True)
    assert state(payer) == (-5_000, 0, "suspended")
    assert record(payer, 15_000, key="one", may_leave_debt=True).transaction_id == first.transaction_id
    held = "held before"
    give(payer, 6_000)
    reservation = reserve(payer, 100, key=held)
    TokenAccount.objects.filter(user=payer).update(status="blocked", status_reason="Fraud")
    assert reserve(payer, 100, key=held).usage_id == reservation.usage_id


def test_without_a_key_every_call_counts(payer: User) -> None:
    assert record(payer, 4_000).usage_id != record(payer, 4_000).usage_id
    with pytest.raises(ledger.InsufficientTokens):
        record(payer, 4_000)
    assert state(payer) == (2_000, 0, "active")


def test_a_refused_key_does_not_cost_the_caller_their_transaction(payer: User) -> None:
    give(payer, 100, key="one")
    with transaction.atomic():
        payer.name = "Kept"
        payer.save()
        with pytest.raises(ledger.IdempotencyConflict):
            give(payer, 200, key="one")
        give(payer, 300)
    payer.refresh_from_db()
    assert payer.name == "Kept"
    assert state(payer) == (10_400, 0, "active")


def test_one_payment_credits_once(payer: User) -> None:
    """2: neither another key, nor another purchase, nor another account gets a second credit out of it."""
    purchase = buy(payer, 5_000)
    assert credit(purchase).is_replay
    with pytest.raises(IntegrityError), transaction.atomic():
        credit(purchase, idempotency_key="other")
    with pytest.raises(IntegrityError), transaction.atomic():
        credit(purchase, idempotency_key="other", stripe_payment_intent_id=None)  # 7: no payment intent
    other = buy(payer, 1_000)
    with pytest.raises(IntegrityError), transaction.atomic():
        credit(other, idempotency_key="x", stripe_payment_intent_id=purchase.stripe_payment_intent_id)
    assert state(payer) == (16_000, 0, "active")
    call_command("verify_ledger")


# --- Amounts ------------------------------------------------------------------------------------------------

NO_AMOUNTS = [
    -1,
    0,
    True,
    False,
    1.5,
    1.0,
    math.nan,
    math.inf,
    1e30,
    "１２",
    "12",
    "",
    None,
    Decimal(5),
    b"5",
]


@pytest.mark.parametrize("tokens", [*NO_AMOUNTS, ledger.MAX_TOKENS + 1, 2**63, 10**400], ids=repr)
def test_no_amount(payer: User, tokens: Any) -> None:
    """56"""
    before = state(payer), written()
    for post in (reserve, record, give):
        with pytest.raises(ledger.InvalidAmount):
            post(payer, tokens)
    with pytest.raises(ledger.InvalidAmount):
        ledger.check_balance(user_id=payer.pk, tokens=tokens)
    assert (state(payer), written()) == before


def test_the_largest_amount_fits(payer: User) -> None:
    """56"""
    give(payer, ledger.MAX_TOKENS)
    assert settle(reserve(payer, ledger.MAX_TOKENS), 10**15).amount_tokens == -ledger.MAX_TOKENS
    call_command("verify_ledger")


# --- Debt and status ----------------------------------------------------------------------------------------


def test_a_clawback_of_spent_tokens_leaves_a_debt_that_money_lifts(payer: User) -> None:
    """42: the debt is never clamped; no new operation until it is paid."""
    purchase = buy(payer, 5_000)
    record(payer, 14_000)
    assert claw_back(purchase, 5_000).balance_tokens == -4_000
    account = TokenAccount.objects.get(user=payer)
    assert (account.status, account.status_reason, account.has_debt) == ("suspended", "debt", True)
    assert account.status_changed_at is not None
    with pytest.raises(ledger.AccountNotActive, match="below zero"):
        reserve(payer, 1)
    buy(payer, 3_000)
    assert state(payer) == (-1_000, 0, "suspended")
    buy(payer, 1_000)
    assert state(payer) == (0, 0, "suspended")  # paid, but not positive
    buy(payer, 1)
    account.refresh_from_db()
    assert (account.balance, account.status, account.status_reason) == (1, "active", "")
    assert reserve(payer, 1).available_tokens == 0
    call_command("verify_ledger")


def test_a_clawback_below_what_is_held_suspends_until_the_hold_is_given_back(payer: User) -> None:
    purchase = buy(payer, 5_000)
    held, running = reserve(payer, 9_000), reserve(payer, 6_000)
    claw_back(purchase, 4_000)
    assert state(payer) == (11_000, 15_000, "suspended")
    settle(running, 4_000)  # what runs goes on, and pays
    assert state(payer) == (5_000, 9_000, "suspended")
    release(held)
    assert state(payer) == (5_000, 0, "active")
    call_command("verify_ledger")


def test_only_what_has_run_already_may_leave_a_debt(payer: User) -> None:
    with pytest.raises(ledger.InsufficientTokens):
        record(payer, 10_001)
    assert state(payer) == (10_000, 0, "active")
    assert record(payer, 10_001, may_leave_debt=True).status == "suspended"
    assert state(payer) == (-1, 0, "suspended")
    call_command("verify_ledger")


@pytest.mark.parametrize("status", ["suspended", "blocked"])
def test_a_closed_account_starts_nothing_and_records_everything(payer: User, status: str) -> None:
    """60: running operations settle, money is recorded, an administrator's decision does not lift itself."""
    running, failing = reserve(payer, 1_000), reserve(payer, 1_000)
    TokenAccount.objects.filter(user=payer).update(status=status, status_reason="Fraud")
    with pytest.raises(ledger.AccountNotActive, match=f"is {status}"):
        reserve(payer, 1)
    settle(running, 100)
    release(failing)
    purchase = buy(payer, 5_000)
    record(payer, 20_000, may_leave_debt=True)
    claw_back(purchase, 1_000)
    buy(payer, 50_000)
    assert state(payer) == (43_850, 0, status)
    assert TokenAccount.objects.get(user=payer).status_reason == "Fraud"
    call_command("verify_ledger")


# --- The account --------------------------------------------------------------------------------------------


def test_the_welcome_bonus_comes_once(make_user: MakeUser) -> None:
    """61: however often the account is opened, and whatever the bonus has become since."""
    user = make_user("alice")
    SystemSettings.objects.update(welcome_bonus_tokens=500)
    for _ in range(3):
        assert ledger.initialize_account(user_id=user.pk).balance == 10_000
    assert ledger.get_account(user_id=user.pk).sequence == 1


def test_the_welcome_bonus_waits_for_the_verified_address(make_user: MakeUser, settings: Settings) -> None:
    """61"""
    settings.ACCOUNT_EMAIL_VERIFICATION = "mandatory"
    user = make_user("alice")
    assert state(user) == (0, 0, "active")
    address = EmailAddress.objects.create(user=user, email=user.email, primary=True)
    ledger.initialize_account(user_id=user.pk)
    assert state(user) == (0, 0, "active")
    address.verified = True
    address.save()
    for _ in range(2):
        ledger.initialize_account(user_id=user.pk)
    assert state(user) == (10_000, 0, "active")
    call_command("verify_ledger")


def test_no_bonus_is_no_ledger_row(make_user: MakeUser) -> None:
    SystemSettings.objects.create(welcome_bonus_tokens=0)
    assert state(make_user("alice")) == (0, 0, "active")
    assert not TokenTransaction.objects.exists()


def test_an_account_is_opened_at_the_first_visit_when_sign_up_did_not_get_there(db: None) -> None:
    user = User.objects.create_user("late@example.com")
    assert not TokenAccount.objects.filter(user=user).exists()
    assert ledger.get_account(user_id=user.pk).balance == 10_000


def test_lifetime_totals_follow_the_types(payer: User, susan: User) -> None:
    buy(payer, 5_000)
    ledger.add_tokens(
        user_id=payer.pk,
        tokens=700,
        type="admin_grant",
        admin_id=susan.pk,
        description="Sorry",
        idempotency_key="grant",
    )
    record(payer, 300)
    settle(reserve(payer, 100), 20)
    account = TokenAccount.objects.get(user=payer)
    assert (
        account.lifetime_purchased_tokens,
        account.lifetime_granted_tokens,
        account.lifetime_used_tokens,
        account.lifetime_spent_cents,
    ) == (5_000, 10_700, 330, 500)
    call_command("verify_ledger")


def test_a_user_with_ledger_rows_cannot_be_deleted(payer: User) -> None:
    """70"""
    with pytest.raises(ProtectedError):
        payer.delete()


# --- Append-only --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "sql",
    [
        "UPDATE billing_tokentransaction SET amount = amount",
        "UPDATE billing_tokentransaction SET description = 'nicer'",
        "DELETE FROM billing_tokentransaction",
        "TRUNCATE billing_tokentransaction",
        "TRUNCATE billing_tokentransaction CASCADE",
        "INSERT INTO billing_tokentransaction SELECT * FROM billing_tokentransaction "
        "ON CONFLICT (id) DO UPDATE SET description = ''",
    ],
)
def test_the_database_refuses_to_change_the_ledger(payer: User, sql: str) -> None:
    """71"""
    before = list(TokenTransaction.objects.values())
    connection.check_constraints()  # what is left for the commit would refuse a TRUNCATE by itself
    with (
        pytest.raises(DatabaseError, match=r"Cannot (update|delete)|append-only|foreign key"),
        transaction.atomic(),
        connection.cursor() as cursor,
    ):
        cursor.execute(sql)
    assert list(TokenTransaction.objects.values()) == before


def test_the_orm_is_refused_too(payer: User) -> None:
    """71"""
    entry = TokenTransaction.objects.get()
    for change in (
        entry.save,
        entry.delete,
        TokenTransaction.objects.all().delete,
        partial(TokenTransaction.objects.update, amount=1),
    ):
        with pytest.raises(DatabaseError), transaction.atomic():
            change()
    assert TokenTransaction.objects.get().amount == 10_000


# --- Random operations against a model ----------------------------------------------------------------------

MULTIPLIER = Decimal("1.5")


@dataclass
class Books:
    """What the ledger should do, in a few lines of Python."""

    balance: int = 0
    reserved: int = 0
    has_debt: bool = False
    holds: list[tuple[int, Posting]] = field(default_factory=list)
    outcomes: dict[int, str] = field(default_factory=dict)  # of a closed hold, by its position
    purchases: list[tuple[int, Purchase]] = field(default_factory=list)
    clawed_back: Counter[int] = field(default_factory=Counter)

    def change(self, amount: int, reserved_change: int = 0) -> None:
        self.balance += amount
        self.reserved += reserved_change
        if self.balance < self.reserved:
            self.has_debt = True
        elif self.balance > 0:
            self.has_debt = False

    def can_start(self, tokens: int) -> bool:
        return not self.has_debt and self.balance - self.reserved >= tokens


amounts = st.one_of(st.integers(1, 400), st.integers(1, 3_000))
positions = st.integers(0, 5)
steps = st.lists(
    st.one_of(
        st.tuples(st.just("reserve"), amounts),
        st.tuples(st.just("reserve"), amounts),
        st.tuples(st.just("settle"), positions, st.integers(0, 3_000)),
        st.tuples(st.just("release"), positions),
        st.tuples(st.just("record"), amounts, st.sampled_from([False, False, True])),
        st.tuples(st.just("give"), amounts),
        st.tuples(st.just("buy"), amounts),
        st.tuples(st.just("claw back"), positions, amounts),
        st.tuples(st.just("retry")),
    ),
    min_size=10,
    max_size=30,
)


def test_any_sequence_of_operations_agrees_with_the_model(seeded: None) -> None:
    """48, 49, 54: after each of the steps, the balance, what is held, the status and the refusals agree."""
    counted: Counter[tuple[str, str]] = Counter()

    @hypothesis_settings(max_examples=60, deadline=None, derandomize=True, database=None)
    @given(steps)
    def run(steps: list[tuple[Any, ...]]) -> None:
        user = User.objects.create(email=f"{next(_keys)}@example.com", password="!")
        TokenAccount.objects.create(user=user, workspace=Workspace.objects.get(owner=user))
        give(user, 1_000)
        books = Books(balance=1_000)
        last: Callable[[], Posting] | None = None
        for name, *arguments in steps:
            with transaction.atomic():
                outcome, call = _step(books, user, name, arguments, last)
            counted[name, outcome] += 1
            last = call or last
            account = TokenAccount.objects.get(user=user)
            assert (account.balance, account.reserved, account.has_debt) == (
                books.balance,
                books.reserved,
                books.has_debt,
            )

    run()
    # Without this, a ledger that refuses everything would pass.
    for name in ("reserve", "settle", "release", "record", "give", "buy", "claw back", "retry"):
        assert counted[name, "accepted"] >= 10, counted
    for name in ("reserve", "settle", "release", "record"):
        assert counted[name, "refused"] >= 1, counted
    call_command("verify_ledger")


def _step(
    books: Books, user: User, name: str, arguments: list[Any], last: Callable[[], Posting] | None
) -> tuple[str, Callable[[], Posting] | None]:
    """Do it in both worlds. What came of it, and a call that repeats it with its key."""
    key = f"key-{next(_keys)}"
    match name, arguments:
        case "reserve", [tokens]:
            call = partial(reserve, user, tokens, key=key)
            if not books.can_start(tokens):
                with pytest.raises(ledger.AccountNotActive if books.has_debt else ledger.InsufficientTokens):
                    call()
                return "refused", None
            books.holds.append((tokens, call()))
            books.change(0, tokens)
            return "accepted", call
        case (("settle" | "release"), [position, *output]):
            if not books.holds:
                return "impossible", None
            position %= len(books.holds)
            tokens, held = books.holds[position]
            call = partial(settle, held, *output) if output else partial(release, held)
            outcome = books.outcomes.get(position)
            if outcome is None:
                cost = min(math.ceil(output[0] * MULTIPLIER), tokens) if output else 0
                assert call().amount_tokens == -cost
                books.change(-cost, -tokens)
                books.outcomes[position] = name
                return "accepted", call
            if outcome == name:
                assert call().is_replay
            else:
                with pytest.raises(ledger.UsageAlreadyClosed):
                    call()
            return "refused", None
        case "record", [tokens, may_leave_debt]:
            call = partial(record, user, tokens, key=key, may_leave_debt=may_leave_debt)
            if not may_leave_debt and books.balance - books.reserved < tokens:
                # Said by the statement's own words: an account in debt is not active.
                with pytest.raises((ledger.InsufficientTokens, ledger.AccountNotActive)):
                    call()
                return "refused", None
            call()
            books.change(-tokens)
            return "accepted", call
        case "give", [tokens]:
            call = partial(give, user, tokens, key=key)
            call()
            books.change(tokens)
            return "accepted", call
        case "buy", [tokens]:
            books.purchases.append((tokens, buy(user, tokens)))
            books.change(tokens)
            return "accepted", partial(credit, books.purchases[-1][1])
        case "claw back", [position, tokens]:
            if not books.purchases:
                return "impossible", None
            position %= len(books.purchases)
            bought, purchase = books.purchases[position]
            tokens = min(tokens, bought - books.clawed_back[position])
            if not tokens:
                return "impossible", None
            claw_back(purchase, tokens)
            books.clawed_back[position] += tokens
            books.change(-tokens)
            return "accepted", None
        case "retry", []:
            if last is None:
                return "impossible", None
            assert last().is_replay
            return "accepted", None
    raise AssertionError(name)
