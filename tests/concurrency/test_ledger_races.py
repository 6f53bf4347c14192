"""Many at once on one account, each on a connection of their own. Numbers in docstrings are rows of FAULTS.md."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import timedelta
from decimal import Decimal
from functools import partial
from io import StringIO
from threading import Barrier, Thread
from typing import TypeVar

import pytest
from django.core.management import CommandError, call_command
from django.db import connection
from django.utils import timezone
from pytest_django.fixtures import Settings

from accounts.models import User
from billing import ledger
from billing.catalogue import system_settings
from billing.ledger import Operation, Posting, statements, welcome
from billing.models import TokenAccount, TokenLot, TokenTransaction, TokenUsage
from billing.pricing import TokenPools
from tests.billing.ledger.test_lots import end
from tests.conftest import MakeUser

pytestmark = pytest.mark.django_db(transaction=True)

DRAFT = Operation("generation", "openai", "gpt-6.1-terra", multiplier=Decimal("1.5"))

# In the place of the lock: a moment in which others read the same row, so that a control never depends on luck.
WITHOUT_LOCK = "AND pg_sleep(0.02)::text IS NOT NULL"

Result = TypeVar("Result")


def without_lock(statement: statements.Statement) -> statements.Statement:
    def form(locked: statements.Form) -> statements.Form:
        assert "FOR UPDATE" in locked.sql
        return replace(locked, sql=locked.sql.replace("FOR UPDATE", WITHOUT_LOCK, 1))

    return replace(
        statement,
        without_lots=statement.without_lots and form(statement.without_lots),
        with_lots=form(statement.with_lots),
    )


def all_at_once(calls: Sequence[Callable[[], Result]]) -> list[Result | Exception]:
    """Start the calls together, each in a thread; what each returned or raised, in their order."""
    barrier = Barrier(len(calls))
    outcomes: dict[int, Result | Exception] = {}

    def run(position: int, call: Callable[[], Result]) -> None:
        barrier.wait()
        try:
            outcomes[position] = call()
        except Exception as error:
            outcomes[position] = error
        finally:
            connection.close()

    threads = [Thread(target=run, args=each) for each in enumerate(calls)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [outcomes[position] for position in range(len(calls))]


def kinds(outcomes: Sequence[object]) -> Counter[str]:
    return Counter(type(outcome).__name__ for outcome in outcomes)


def reserve(user: User, tokens: int, key: str) -> Posting:
    return ledger.reserve_tokens(
        user_id=user.pk, tokens=tokens, operation=DRAFT, idempotency_key=key, lifetime_seconds=600
    )


def verify_ledger() -> None:
    call_command("verify_ledger", stdout=StringIO())


@pytest.fixture
def alice(make_user: MakeUser) -> User:
    """Owns 10,000 tokens."""
    return make_user("alice")


def storm_of_reservations(user: User) -> Counter[str]:
    return kinds(
        all_at_once([lambda key=f"key-{number}": reserve(user, 100, key) for number in range(200)])  # type: ignore[misc]
    )


def test_as_many_reservations_succeed_as_fit(alice: User) -> None:
    """48: 200 parallel reservations of 100 tokens on 10,000."""
    assert storm_of_reservations(alice) == {"Posting": 100, "InsufficientTokens": 100}
    account = TokenAccount.objects.get(user=alice)
    assert (account.balance, account.reserved, account.available) == (10_000, 10_000, 0)
    verify_ledger()


def test_without_the_lock_the_same_tokens_are_promised_twice(alice: User, monkeypatch: pytest.MonkeyPatch) -> None:
    """The control of 48: it is the lock that holds, and the storm is strong enough to show it."""
    monkeypatch.setattr(statements, "RESERVE", without_lock(statements.RESERVE))
    assert storm_of_reservations(alice)["Posting"] > 100
    with pytest.raises(CommandError, match="broken"):
        verify_ledger()


def storm_of_extensions(user: User) -> Counter[str]:
    postings = [reserve(user, 50, f"key-{number}") for number in range(100)]
    return kinds(
        all_at_once(
            [partial(ledger.extend_reservation, usage_id=posting.usage_id or 0, tokens=100) for posting in postings]
        )
    )


def test_as_many_extensions_succeed_as_fit(alice: User) -> None:
    """48: 100 running operations of 50 tokens each ask for 100 more at once; half of the 10,000 is left for them."""
    assert storm_of_extensions(alice) == {"Posting": 50, "InsufficientTokens": 50}
    assert TokenAccount.objects.get(user=alice).available == 0
    verify_ledger()


def test_without_the_lock_extensions_promise_the_same_tokens_twice(
    alice: User, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The control of the one above."""
    monkeypatch.setattr(statements, "EXTEND", without_lock(statements.EXTEND))
    assert storm_of_extensions(alice)["Posting"] > 50
    with pytest.raises(CommandError, match="broken"):
        verify_ledger()


def test_one_key_reserves_once(alice: User) -> None:
    """55: a request sent 20 times in parallel holds once, also when it takes the whole balance."""
    outcomes = all_at_once([lambda: reserve(alice, 10_000, "one")] * 20)
    postings = [outcome for outcome in outcomes if isinstance(outcome, Posting)]
    assert len(postings) == 20, kinds(outcomes)
    assert [posting.is_replay for posting in postings].count(False) == 1
    assert {posting.usage_id for posting in postings} == {TokenUsage.objects.get().pk}
    assert TokenAccount.objects.get(user=alice).reserved == 10_000
    verify_ledger()


def test_one_key_with_other_bodies_reserves_one_of_them(alice: User) -> None:
    """55"""
    outcomes = all_at_once([lambda tokens=tokens: reserve(alice, tokens, "one") for tokens in range(1, 21)])  # type: ignore[misc]
    assert kinds(outcomes) == {"Posting": 1, "IdempotencyConflict": 19}
    assert TokenAccount.objects.get(user=alice).reserved == TokenUsage.objects.get().reserved_tokens
    verify_ledger()


def test_one_key_credits_once(alice: User) -> None:
    """55"""
    outcomes = all_at_once(
        [
            lambda: ledger.add_tokens(
                user_id=alice.pk, tokens=500, type="bonus", description="Test", idempotency_key="one"
            )
        ]
        * 20
    )
    assert kinds(outcomes) == {"Posting": 20}
    assert TokenAccount.objects.get(user=alice).balance == 10_500
    verify_ledger()


def test_an_operation_is_closed_once(alice: User) -> None:
    """54: settled, released and expired at the same moment, it has one outcome and one debit at most."""
    settled = 0
    for number in range(15):
        usage_id = reserve(alice, 300, f"key-{number}").usage_id
        assert usage_id is not None

        def settle(usage_id: int = usage_id) -> Posting:
            return ledger.settle_usage(usage_id=usage_id, pools=TokenPools(output_tokens=100))

        def release(usage_id: int = usage_id) -> Posting:
            return ledger.release_usage(usage_id=usage_id)

        def expire(usage_id: int = usage_id) -> Posting:
            return ledger.release_usage(usage_id=usage_id, status="expired")

        outcomes = all_at_once([release, settle, expire] * 2)
        assert kinds(outcomes) == {"Posting": 2, "UsageAlreadyClosed": 4}
        assert sorted(each.is_replay for each in outcomes if isinstance(each, Posting)) == [False, True]
        settled += TokenUsage.objects.get(pk=usage_id).status == "succeeded"
    account = TokenAccount.objects.get(user=alice)
    assert (account.balance, account.reserved) == (10_000 - 150 * settled, 0)
    verify_ledger()


def test_the_welcome_bonus_comes_once(make_user: MakeUser, settings: Settings) -> None:
    """61: twenty sign-ups of one person at the same moment open one account and give one bonus."""
    settings.ACCOUNT_EMAIL_VERIFICATION = "mandatory"
    user = make_user("alice")
    TokenAccount.objects.all().delete()
    settings.ACCOUNT_EMAIL_VERIFICATION = "optional"
    outcomes = all_at_once([lambda: ledger.initialize_account(user_id=user.pk)] * 20)
    assert kinds(outcomes) == {"TokenAccount": 20}
    assert TokenAccount.objects.get().balance == 10_000
    assert TokenTransaction.objects.get().type == "bonus"
    verify_ledger()


def sign_ups_of_one_mailbox(settings: Settings) -> int:
    """Twenty accounts, each with a spelling of one mailbox, ask for the bonus at the same moment; how many get it."""
    # Whoever makes these two rows keeps all others waiting.
    welcome.read_key()
    system_settings.initialize_default_settings()
    settings.ACCOUNT_EMAIL_VERIFICATION = "mandatory"
    users = [User.objects.create_user(f"nora+{number}@example.com") for number in range(20)]
    settings.ACCOUNT_EMAIL_VERIFICATION = "optional"
    calls = [partial(ledger.initialize_account, user_id=user.pk) for user in users]
    assert kinds(all_at_once(calls)) == {"TokenAccount": 20}
    verify_ledger()
    return TokenTransaction.objects.filter(type="bonus").count()


def test_one_mailbox_has_one_bonus(seeded: None, settings: Settings) -> None:
    """132: whichever spelling is first; the other nineteen are told that it was given before."""
    assert sign_ups_of_one_mailbox(settings) == 1
    assert TokenAccount.objects.filter(bonus_withheld="given_before").count() == 19


def test_a_look_before_writing_is_not_enough(seeded: None, settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    """The control: who looks first and writes then, without the unique digest between, gives several."""

    looked = Barrier(20, timeout=30)

    def look_and_write(addresses: set[str]) -> bool:
        is_new = not welcome.had_bonus(addresses)
        looked.wait()
        claim(addresses)
        return is_new

    claim = welcome.claim
    monkeypatch.setattr(welcome, "claim", look_and_write)
    assert sign_ups_of_one_mailbox(settings) > 1


def test_debits_and_credits_in_parallel_keep_the_chain(alice: User, bob: User) -> None:
    """48: what 40 threads do to two accounts is one gapless row after another."""

    def debit(user: User) -> Posting:
        return ledger.deduct_tokens(user_id=user.pk, tokens=30, operation=DRAFT, pools=TokenPools(output_tokens=20))

    def add(user: User, key: str) -> Posting:
        return ledger.add_tokens(user_id=user.pk, tokens=7, type="bonus", description="Test", idempotency_key=key)

    def hold_and_pay(user: User, key: str) -> Posting:
        usage_id = reserve(user, 90, key).usage_id
        assert usage_id is not None
        return ledger.settle_usage(usage_id=usage_id, pools=TokenPools(output_tokens=10))

    def several(user: User, number: int) -> list[Posting]:
        key = f"key-{number}"
        return [debit(user), add(user, key), hold_and_pay(user, key), debit(user), add(user, key + "'")]

    users = (alice, bob)
    outcomes = all_at_once(
        [lambda number=number: several(users[number % 2], number) for number in range(40)]  # type: ignore[misc]
    )
    assert kinds(outcomes) == {"list": 40}
    for user in users:
        account = TokenAccount.objects.get(user=user)
        assert (account.balance, account.reserved) == (10_000 + 20 * (2 * 7 - 2 * 30 - 15), 0)
        sequences = TokenTransaction.objects.filter(account=account).order_by("id").values_list("sequence", flat=True)
        assert sorted(sequences) == list(range(1, 1 + 1 + 20 * 5))
    verify_ledger()


# --- Lots -----------------------------------------------------------------------------------------------------------


def give_lot(user: User, tokens: int, number: int) -> None:
    ledger.add_tokens(
        user_id=user.pk, tokens=tokens, type="bonus", description="A promotion", idempotency_key=f"lot-{number}",
        expires_at=timezone.now() + timedelta(days=number + 1),
    )  # fmt: skip


def storm_over_lots(user: User) -> Counter[str]:
    """200 debits of 60 tokens over three lots of 100, a fourth of 200 that comes meanwhile, and 10,000 plain ones."""
    for number in range(3):
        give_lot(user, 100, number)

    def debit(number: int) -> Posting:
        return ledger.deduct_tokens(
            user_id=user.pk, tokens=60, operation=DRAFT, pools=TokenPools(output_tokens=40),
            idempotency_key=f"debit-{number}",
        )  # fmt: skip

    calls: list[Callable[[], object]] = [partial(debit, number) for number in range(200)]
    calls.insert(100, partial(give_lot, user, 200, 9))
    return kinds(all_at_once(calls))


def test_what_lots_and_plain_tokens_gave_is_what_was_charged(alice: User) -> None:
    """85: 10,500 tokens in all; 175 fit."""
    outcomes = storm_over_lots(alice)
    account = TokenAccount.objects.get(user=alice)
    assert account.balance == 10_500 - 60 * outcomes["Posting"]
    assert outcomes["Posting"] >= 171  # what was refused before the fourth lot came fits no more
    assert outcomes["Posting"] + outcomes["InsufficientTokens"] == 200
    given: Counter[str] = Counter()
    for lot_amounts in TokenTransaction.objects.filter(type="usage").values_list("lot_amounts", flat=True):
        given.subtract(lot_amounts or {})
    left = sum(lot.remaining_tokens for lot in account.lot_balances)
    assert given.total() == 500 - left
    verify_ledger()


def test_without_the_lock_lots_give_what_they_have_not(alice: User, monkeypatch: pytest.MonkeyPatch) -> None:
    """The control of 85: the same lots and the same number of a ledger row are taken twice, which its index refuses."""
    monkeypatch.setattr(statements, "DEBIT_WITH_USAGE", without_lock(statements.DEBIT_WITH_USAGE))
    outcomes = storm_over_lots(alice)
    assert outcomes["IntegrityError"] > 0
    assert outcomes["Posting"] < 171


def test_sweeps_and_settlements_meet_and_a_lot_ends_once(alice: User) -> None:
    """86"""
    give_lot(alice, 500, 1)
    give_lot(alice, 300, 2)
    held = [reserve(alice, 30, f"held-{number}") for number in range(8)]
    end(*TokenLot.objects.all())
    closing: list[Callable[[], object]] = [
        partial(ledger.settle_usage, usage_id=posting.usage_id or 0, pools=TokenPools(output_tokens=number))
        for number, posting in enumerate(held, start=1)
    ]
    outcomes = all_at_once([*closing, *[ledger.expire_lots] * 8])
    assert not [outcome for outcome in outcomes if isinstance(outcome, Exception)]
    ended = TokenTransaction.objects.filter(type="expiry").values_list("lot_id", flat=True)
    assert sorted(ended) == sorted(TokenLot.objects.values_list("pk", flat=True))
    account = TokenAccount.objects.get(user=alice)
    assert (account.lots, account.balance, account.reserved) == (None, 10_000, 0)
    verify_ledger()
