"""Lots, tokens with an end, through the ledger's public functions. Numbers in docstrings are rows of FAULTS.md."""

from collections.abc import Callable
from datetime import datetime, timedelta
from itertools import count
from typing import Any

import pgtrigger
import pytest
from django.core.management import call_command
from django.db import DatabaseError, connection, transaction
from django.utils import timezone
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from accounts.models import User
from billing import ledger, tasks
from billing.ledger import Posting
from billing.models import Notification, Purchase, TokenAccount, TokenLot, TokenTransaction
from billing.models.lot import LotKind
from billing.payments import refunds
from kit import database
from tests.billing.ledger.test_ledger import buy, claw_back, give, record, release, reserve, settle
from tests.conftest import MakeUser

pytestmark = pytest.mark.django_db

_keys = count(1)


@pytest.fixture
def payer(make_user: MakeUser) -> User:
    """Owns 10,000 plain tokens, the welcome bonus."""
    return make_user("payer")


def give_lot(
    user: User, tokens: int, *, days: float = 10, kind: LotKind = LotKind.PROMOTION, **options: Any
) -> TokenLot:
    key = options.pop("key", None) or f"lot-{next(_keys)}"
    ledger.add_tokens(
        user_id=user.pk, tokens=tokens, type="bonus", description="A promotion", idempotency_key=key,
        expires_at=options.pop("expires_at", None) or timezone.now() + timedelta(days=days), lot_kind=kind,
    )  # fmt: skip
    return TokenLot.objects.get(source=f"{TokenAccount.objects.get(user=user).pk}:{key}")


def end(*lots: TokenLot) -> None:
    """Let time go on until the lots are over, for them alone: nobody could wait for it."""
    for lot in lots:
        ended_at = database.now()
        with pgtrigger.ignore("billing.TokenLot:lot_append_only"):
            TokenLot.objects.filter(source=lot.source).update(
                expires_at=ended_at, created_at=ended_at - timedelta(days=lot.pk % 7 + 1)
            )
        account = TokenAccount.objects.get(pk=lot.account_id)
        for each in account.lots or []:
            if each["id"] == lot.pk:
                each["ends"] = ended_at.isoformat()
                account.next_lot_ends_at = ended_at
        account.lots = account.lots and sorted(account.lots, key=lambda each: datetime.fromisoformat(each["ends"]))
        account.save(update_fields=["lots", "next_lot_ends_at"])


def left(user: User) -> list[tuple[int, int]]:
    """What the user's lots have left, and how much of that is held, in the order of spending."""
    return [(lot.remaining_tokens, lot.held_tokens) for lot in TokenAccount.objects.get(user=user).lot_balances]


def plain(user: User) -> int:
    return TokenAccount.objects.get(user=user).plain_tokens


def available(user: User) -> int:
    return TokenAccount.objects.get(user=user).available


def moves(posting: Posting) -> dict[str, int] | None:
    assert posting.transaction_id is not None
    return TokenTransaction.objects.get(pk=posting.transaction_id).lot_amounts


def expiries(user: User) -> list[int]:
    rows = TokenTransaction.objects.filter(account__user=user, type="expiry").order_by("sequence")
    return [-row.amount for row in rows]


# --- The order of spending ------------------------------------------------------------------------------------------


def test_what_ends_soonest_is_spent_first_and_plain_tokens_last(payer: User) -> None:
    late = give_lot(payer, 100, days=30)
    soon = give_lot(payer, 50, days=3)
    at = timezone.now() + timedelta(days=10)
    same_end = {
        kind: give_lot(payer, 10, kind=kind, expires_at=at) for kind in reversed(LotKind)
    }  # made in the wrong order
    younger = give_lot(payer, 10, kind=LotKind.GRANT, expires_at=at)

    paid = record(payer, 50 + 60 + 10 + 100 + 5)

    order = [soon, *(same_end[kind] for kind in LotKind), younger, late]
    assert moves(paid) == {str(lot.pk): -lot.tokens for lot in order}
    assert (left(payer), plain(payer)) == ([], 9_995)
    assert [kind.value for kind in LotKind] == ["rollover", "allowance", "promotion", "referral", "bonus", "grant"]
    call_command("verify_ledger")


def test_lots_of_one_end_are_spent_one_by_one_in_the_order_of_their_kinds(payer: User) -> None:
    at = timezone.now() + timedelta(days=10)
    lots = [give_lot(payer, 10, kind=kind, expires_at=at) for kind in reversed(LotKind)]
    lots = [*reversed(lots), give_lot(payer, 10, kind=LotKind.GRANT, expires_at=at)]
    spent = [moves(record(payer, 10)) for _ in lots]
    assert spent == [{str(lot.pk): -10} for lot in lots]


def test_an_end_in_the_past_is_refused_and_a_retry_answers_as_before(payer: User) -> None:
    with pytest.raises(ledger.InvalidExpiry):
        give_lot(payer, 10, expires_at=timezone.now() - timedelta(seconds=1))
    assert not TokenLot.objects.exists()
    at = timezone.now() + timedelta(days=1)
    lot = give_lot(payer, 10, key="once", expires_at=at)
    assert give_lot(payer, 10, key="once", expires_at=at) == lot
    with pytest.raises(ledger.IdempotencyConflict):
        give_lot(payer, 10, key="once", expires_at=at + timedelta(days=1))
    with pytest.raises(ledger.IdempotencyConflict):
        give(payer, 10, key="once")
    assert TokenLot.objects.count() == 1


def test_a_debt_is_paid_by_a_lot_before_it_has_anything(payer: User) -> None:
    record(payer, 10_030, may_leave_debt=True)
    give_lot(payer, 100)
    assert (left(payer), plain(payer), available(payer)) == ([(70, 0)], 0, 70)
    record(payer, 80, may_leave_debt=True)
    assert (left(payer), plain(payer)) == ([], -10)
    give_lot(payer, 10)
    assert (left(payer), plain(payer)) == ([], 0)
    assert TokenAccount.objects.get(user=payer).status == "suspended"  # nothing is there yet
    call_command("verify_ledger")


# --- The end ----------------------------------------------------------------------------------------------------------


def test_an_ended_lot_is_not_available_before_and_after_it_is_booked(payer: User) -> None:
    """80, 81, 83: the worker is dead; every answer is right all the same."""
    first, second = give_lot(payer, 500, days=1), give_lot(payer, 300, days=2)
    assert available(payer) == 10_800
    end(first)
    assert available(payer) == 10_300
    assert TokenAccount.objects.filter(user=payer).values_list("balance", flat=True)[0] == 10_800
    assert ledger.check_balance(user_id=payer.pk, tokens=10_301).missing_tokens == 1
    with pytest.raises(ledger.InsufficientTokens) as refused:
        reserve(payer, 10_301)
    assert refused.value.available_tokens == 10_300
    with pytest.raises(ledger.InsufficientTokens):
        record(payer, 10_301)

    assert len(ledger.expire_lots()) == 1
    assert expiries(payer) == [500]
    assert len(ledger.expire_lots()) == 0
    assert (left(payer), available(payer)) == ([(300, 0)], 10_300)
    end(second)
    paid = record(payer, 40)  # any posting books what it finds ended
    assert (moves(paid), expiries(payer), plain(payer)) == (None, [500, 300], 9_960)
    assert TokenAccount.objects.get(user=payer).lots is None
    call_command("verify_ledger")


def test_a_hold_made_before_the_end_is_paid_by_the_lot_and_what_comes_back_ends_at_once(payer: User) -> None:
    """82, 86"""
    lot = give_lot(payer, 500)
    held, other = reserve(payer, 300), reserve(payer, 100)
    assert left(payer) == [(500, 400)]
    end(lot)
    assert len(ledger.expire_lots()) == 0  # what runs may still need it
    assert available(payer) == 10_000
    paid = settle(held, 40)  # × 1.5
    assert (moves(paid), expiries(payer)) == ({str(lot.pk): -60}, [])
    assert available(payer) == 10_000
    release(other)
    assert (expiries(payer), left(payer), plain(payer)) == ([440], [], 10_000)
    assert len(ledger.expire_lots()) == 0
    call_command("verify_ledger")


def test_a_hold_reaches_beyond_the_lots_and_an_extension_takes_live_ones_alone(payer: User) -> None:
    first = give_lot(payer, 100, days=1)
    held = reserve(payer, 10_050)
    assert left(payer) == [(100, 100)]
    give_lot(payer, 500, days=20)
    end(first)
    assert held.usage_id is not None
    ledger.extend_reservation(usage_id=held.usage_id, tokens=200)
    assert left(payer) == [(100, 100), (500, 200)]
    paid = settle(held, 6_800)  # 10,200
    assert paid.amount_tokens == -10_200
    assert (left(payer), plain(payer), expiries(payer)) == ([(300, 0)], 100, [])
    call_command("verify_ledger")


# --- Money that goes back ---------------------------------------------------------------------------------------------


def test_a_refund_takes_plain_tokens_then_lots_and_gives_back_to_what_has_not_ended(payer: User) -> None:
    """84"""
    purchase = buy(payer, 5_000)
    record(payer, 14_800)
    short, long = give_lot(payer, 300, days=2), give_lot(payer, 600, days=9)
    taken = claw_back(purchase, 1_000)
    assert moves(taken) == {str(short.pk): -300, str(long.pk): -500}
    assert (left(payer), plain(payer)) == ([(100, 0)], 0)
    end(short)
    back = ledger.add_tokens(
        user_id=payer.pk, tokens=1_000, type="refund", description="Refund failed", purchase_id=purchase.pk,
        idempotency_key="back", from_lots={short.pk: 300, long.pk: 500},
    )  # fmt: skip
    assert moves(back) == {str(long.pk): 500}
    assert (left(payer), plain(payer), available(payer)) == ([(600, 0)], 500, 1_100)


def test_a_debt_takes_what_operations_hold_of_lots_before_plain_tokens_go_below_zero(payer: User) -> None:
    give_lot(payer, 500)
    held = reserve(payer, 400)
    record(payer, 10_450, may_leave_debt=True)
    assert (left(payer), plain(payer)) == ([(50, 400)], 0)  # the hold stays, should the tokens come back
    paid = settle(held, 200)  # 300: 50 are there
    assert (paid.amount_tokens, left(payer), plain(payer)) == (-300, [], -250)
    assert TokenAccount.objects.get(user=payer).has_debt
    call_command("verify_ledger")


def fail_back(purchase: Purchase, tokens: int) -> Posting:
    """A refund of so many tokens that did not go through."""
    return ledger.add_tokens(
        user_id=purchase.user_id, tokens=tokens, type="refund", description="Refund failed", purchase_id=purchase.pk,
        idempotency_key=f"back-{next(_keys)}", from_lots=refunds._taken_last(purchase, tokens),
    )  # fmt: skip


def test_a_hold_keeps_its_lot_though_a_refund_took_it_and_failed(payer: User) -> None:
    """82, 84"""
    purchase = buy(payer, 100)
    record(payer, 10_100)
    lot = give_lot(payer, 100)
    held = reserve(payer, 60)
    claw_back(purchase, 100)
    fail_back(purchase, 100)
    assert left(payer) == [(100, 60)]
    end(lot)
    assert ledger.expire_lots() == []
    paid = settle(held, 40)
    assert (moves(paid), expiries(payer)) == ({str(lot.pk): -60}, [40])
    account = TokenAccount.objects.get(user=payer)
    assert (account.balance, account.status, account.lots) == (0, "active", None)


def test_what_comes_back_goes_where_the_last_of_it_was_taken(payer: User) -> None:
    """84: rounds of refunds that fail, with lots and a debt between them."""
    purchase = buy(payer, 5_000)
    record(payer, 14_800)
    give_lot(payer, 300, days=2)
    give_lot(payer, 600, days=9)
    claw_back(purchase, 700)  # 200 plain, 300 of the first, 200 of the second
    claw_back(purchase, 300)
    assert left(payer) == [(100, 0)]
    fail_back(purchase, 300)
    assert (left(payer), plain(payer)) == ([(400, 0)], 0)
    record(payer, 800, may_leave_debt=True)
    fail_back(purchase, 700)  # 400 of it pay the debt
    assert (left(payer), plain(payer)) == ([(100, 0), (200, 0)], 0)
    give(payer, 1_000)
    claw_back(purchase, 200)
    fail_back(purchase, 200)
    assert (left(payer), plain(payer)) == ([(100, 0), (200, 0)], 1_000)


def test_a_repetition_answers_as_the_first_time_when_a_lot_ended_beside_it(payer: User) -> None:
    """55, 83"""
    repeated: tuple[Callable[[], Posting], ...] = (
        lambda: record(payer, 100, key="debit"),
        lambda: ledger.add_tokens(
            user_id=payer.pk, tokens=50, type="bonus", description="Test", idempotency_key="credit"
        ),
    )
    for first_of in repeated:
        end(give_lot(payer, 500))
        first, again = first_of(), first_of()
        assert (first.expired_tokens, again.is_replay) == (500, True)
        assert (first.balance_tokens, first.available_tokens) == (again.balance_tokens, again.available_tokens)
    call_command("verify_ledger")


def test_the_sweep_goes_on_behind_what_cannot_be_booked_and_what_is_held(make_user: MakeUser) -> None:
    """83"""
    people = [make_user(f"sweep-{number}") for number in range(4)]
    lots = [give_lot(user, 100, days=1) for user in people]
    for user in people[:2]:
        reserve(user, 50)
    end(*lots)
    broken = TokenAccount.objects.get(user=people[2])
    assert broken.lots
    with connection.cursor() as cursor:
        cursor.execute("SET CONSTRAINTS ALL IMMEDIATE")
        cursor.execute("ALTER TABLE billing_tokenaccount DROP CONSTRAINT account_lots_are_sound")
    TokenAccount.objects.filter(pk=broken.pk).update(lots=[{"id": broken.lots[0]["id"]}])
    assert [posting.user_id for posting in ledger.expire_lots(limit=1)] == [people[3].pk]


def test_the_end_of_a_lot_can_be_what_makes_the_balance_low(
    payer: User, django_capture_on_commit_callbacks: Any
) -> None:
    record(payer, 9_400)  # 600 are left; low is 1,000
    with django_capture_on_commit_callbacks(execute=True):
        lot = give_lot(payer, 1_000)
        end(lot)
        tasks.expire_lots()
    assert Notification.objects.filter(user=payer, kind="low_balance").count() == 1


def test_the_database_refuses_lots_that_cannot_be(payer: User) -> None:
    """Law 14, whoever writes."""
    lot = give_lot(payer, 100)
    account = TokenAccount.objects.get(user=payer)
    assert account.lots
    for changes in ({"remaining": 101}, {"remaining": -1}, {"held": -1}, {"remaining": 0}):
        with pytest.raises(DatabaseError), transaction.atomic():
            TokenAccount.objects.filter(pk=account.pk).update(lots=[account.lots[0] | changes])
    with pytest.raises(DatabaseError), transaction.atomic():
        TokenAccount.objects.filter(pk=account.pk).update(balance=99)  # less than its lots
    for sql in ("UPDATE billing_tokenlot SET tokens = 5", "DELETE FROM billing_tokenlot"):
        with pytest.raises(DatabaseError), transaction.atomic(), connection.cursor() as cursor:
            cursor.execute(sql)
    assert TokenLot.objects.get() == lot


# --- Against a model ------------------------------------------------------------------------------------------------


class Model:
    """What the ledger should do, in the plainest words. A lot: [given, remaining, has ended]; a hold: [of each lot,
    plain]."""

    def __init__(self) -> None:
        self.plain = 0
        self.lots: list[list[Any]] = []
        self.holds: list[tuple[dict[int, int], int]] = []
        self.accepted = 0

    def held(self, lot: int) -> int:
        return sum(of_lots.get(lot, 0) for of_lots, _ in self.holds)

    def free(self, lot: int) -> int:
        return 0 if self.lots[lot][2] else self.lots[lot][1] - self.held(lot)

    def available(self) -> int:
        return sum(map(self.free, range(len(self.lots)))) + self.plain - sum(plain for _, plain in self.holds)

    def order(self) -> list[int]:
        return sorted(range(len(self.lots)), key=lambda lot: (self.lots[lot][3], lot))

    def spend(self, tokens: int) -> None:
        for lot in self.order():
            part = min(tokens, self.free(lot))
            self.lots[lot][1] -= part
            tokens -= part
        self.plain -= tokens

    def hold(self, tokens: int) -> None:
        of_lots = {}
        for lot in self.order():
            if part := min(tokens, self.free(lot)):
                of_lots[lot] = part
                tokens -= part
        self.holds.append((of_lots, tokens))

    def close(self, number: int, tokens: int) -> None:
        of_lots, _ = self.holds.pop(number)
        for lot in self.order():
            part = min(tokens, of_lots.get(lot, 0))
            self.lots[lot][1] -= part
            tokens -= part
        self.plain -= tokens
        self.expire()

    def expire(self) -> None:
        for number, lot in enumerate(self.lots):
            if lot[2] and not self.held(number):
                lot[1] = 0


STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("lot"), st.integers(1, 60), st.integers(1, 5)),
        st.tuples(st.just("plain"), st.integers(1, 60)),
        st.tuples(st.just("spend"), st.integers(1, 80)),
        st.tuples(st.just("hold"), st.integers(1, 80)),
        st.tuples(st.just("settle"), st.integers(0, 5), st.integers(0, 50)),
        st.tuples(st.just("release"), st.integers(0, 5)),
        st.tuples(st.just("end"), st.integers(0, 5)),
        st.tuples(st.just("sweep")),
    ),
    min_size=12,
    max_size=40,
)


def test_the_ledger_does_what_the_model_does(make_user: MakeUser) -> None:
    counts = {"accepted": 0, "refused": 0, "expired": 0}

    @given(STEPS)
    @hypothesis_settings(max_examples=40, deadline=None, derandomize=True, database=None)
    def runs(steps: list[tuple[Any, ...]]) -> None:
        user = make_user(f"model-{next(_keys)}")
        model, lots, holds = Model(), [], []
        model.plain = plain(user)
        record(user, model.plain)
        model.plain = 0
        for verb, *numbers in steps:
            match verb, *numbers:
                case "lot", tokens, days:
                    lots.append(give_lot(user, tokens, days=days))
                    model.lots.append([tokens, tokens, False, lots[-1].expires_at])
                case "plain", tokens:
                    give(user, tokens)
                    model.plain += tokens
                    model.expire()
                case "spend" | "hold", tokens:
                    try:
                        posting = record(user, tokens) if verb == "spend" else reserve(user, tokens)
                    except ledger.InsufficientTokens:
                        assert model.available() < tokens
                        counts["refused"] += 1
                        continue
                    assert model.available() >= tokens
                    counts["accepted"] += 1
                    if verb == "spend":
                        model.spend(tokens)
                    else:
                        model.hold(tokens)
                        holds.append(posting)
                    model.expire()
                case "settle" | "release", number, *used if number < len(holds):
                    posting = holds.pop(number)
                    cost = (
                        -settle(posting, used[0]).amount_tokens if used and used[0] else release(posting).amount_tokens
                    )
                    model.close(number, cost)
                case "end", number if number < len(lots) and not model.lots[number][2]:
                    end(lots[number])
                    model.lots[number][2] = True
                    model.lots[number][3] = TokenLot.objects.get(pk=lots[number].pk).expires_at
                case ("sweep",):
                    ledger.expire_lots()
                    model.expire()
            assert plain(user) == model.plain
            assert left(user) == [(model.lots[lot][1], model.held(lot)) for lot in model.order() if model.lots[lot][1]]
            assert available(user) == model.available()

    runs()
    call_command("verify_ledger")
    counts["expired"] = TokenTransaction.objects.filter(type="expiry").count()
    assert min(counts.values()) > 10, counts
