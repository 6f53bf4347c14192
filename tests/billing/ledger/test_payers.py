"""Who pays and who acts: personal accounts and those of teams, in the ledger and all that follows it. Numbers in
docstrings are rows of FAULTS.md."""

import json
import subprocess
from collections.abc import Callable
from decimal import Decimal
from typing import Any

import pytest
from django.db import IntegrityError, transaction
from django.test import Client
from pytest_django import DjangoAssertNumQueries

from accounts.models import ApiKey, Membership, User, Workspace
from billing import history, ledger, tasks, usage
from billing.catalogue import packages
from billing.history import receipts, statements
from billing.ledger import ActorRequired, IdempotencyConflict, InsufficientTokens, Operation
from billing.models import Notification, Purchase, TokenAccount, TokenTransaction, TokenUsage
from billing.payments import cards, checkout, recharge, recharge_settings
from billing.pricing import TokenPools
from billing.staff import accounts, grants
from billing.usage import after_debit, stats
from kit.periods import midnight
from tests.conftest import MakeUser
from tests.environment import BILLING_SECRET
from tests.payments import deliver, event_of
from tests.servers import StripeStandIn

pytestmark = [pytest.mark.django_db, pytest.mark.usefixtures("books_stay_in_order")]

Named = dict[str, Any]

CHAT = Operation("chat", "openai", "gpt-6-luna", multiplier=Decimal(1))


@pytest.fixture
def acme(alice: User, bob: User) -> TokenAccount:
    """A team's account with 5,000 tokens: Alice owns the team, Bob is a member."""
    workspace = Workspace.objects.create(kind="team", name="Acme")
    for user, role in ((alice, "owner"), (bob, "member")):
        Membership.objects.create(workspace=workspace, user=user, role=role)
    account = ledger.open_team_account(workspace_id=workspace.pk)
    ledger.add_tokens(account_id=account.pk, tokens=5_000, type="bonus", description="Test", idempotency_key="test")
    return TokenAccount.objects.get(pk=account.pk)


def hold(account: TokenAccount, actor: User, tokens: int = 100, key: str = "hold", **options: Any) -> ledger.Posting:
    return ledger.reserve_tokens(
        account_id=account.pk, actor_id=actor.pk, tokens=tokens, operation=CHAT, idempotency_key=key,
        lifetime_seconds=600, **options,
    )  # fmt: skip


def test_the_payer_is_named_one_way_and_rows_say_who_acted(acme: TokenAccount, alice: User, bob: User) -> None:
    key = ApiKey.objects.create(user=bob, name="bot", scopes=["usage:read"], token_start="pm", token_hash="h")
    payers: list[Named] = [{}, {"user_id": alice.pk, "account_id": acme.pk}]
    for payer in payers:
        with pytest.raises(TypeError, match="either"):
            ledger.add_tokens(**payer, tokens=1, type="bonus", description="", idempotency_key="x")

    posting = hold(acme, bob, api_key_id=key.pk)
    ledger.extend_reservation(usage_id=posting.usage_id or 0, tokens=20)
    settled = ledger.settle_usage(usage_id=posting.usage_id or 0, pools=TokenPools(output_tokens=70))
    assert (settled.account_id, settled.user_id, settled.available_tokens) == (acme.pk, None, 4_930)
    entry = TokenTransaction.objects.get(usage_id=posting.usage_id)
    assert (entry.account_id, entry.user_id, entry.api_key_id, entry.workspace_id) == (
        acme.pk, bob.pk, key.pk, acme.workspace_id,
    )  # fmt: skip
    ledger.release_usage(usage_id=hold(acme, alice, key="given back").usage_id or 0)
    ledger.deduct_tokens(account_id=acme.pk, actor_id=bob.pk, tokens=30, operation=CHAT, pools=TokenPools(3))
    assert ledger.check_balance(account_id=acme.pk, tokens=4_901).missing_tokens == 1
    # Nothing of it is anybody's own.
    assert {TokenAccount.objects.get(user=user).balance for user in (alice, bob)} == {10_000}


def test_an_operation_has_its_actor(acme: TokenAccount, alice: User, bob: User) -> None:
    """With a team's account somebody must be named, with a personal one it can be its owner alone."""
    own = TokenAccount.objects.get(user=alice)
    payers: list[Named] = [
        {"account_id": acme.pk},
        {"user_id": alice.pk, "actor_id": bob.pk},
        {"account_id": own.pk, "actor_id": bob.pk},
    ]
    for payer in payers:
        options: Named = {"tokens": 10, "operation": CHAT, "idempotency_key": "nobody"}
        with pytest.raises(ActorRequired):
            ledger.reserve_tokens(**payer, **options, lifetime_seconds=9)
        with pytest.raises(ActorRequired):
            ledger.deduct_tokens(**payer, **options, pools=TokenPools(1))
    assert not TokenUsage.objects.exists()
    ledger.reserve_tokens(account_id=own.pk, tokens=10, operation=CHAT, idempotency_key="own", lifetime_seconds=9)
    assert TokenUsage.objects.get().user_id == alice.pk


def test_what_a_colleague_did_under_a_key_is_a_conflict(acme: TokenAccount, alice: User, bob: User) -> None:
    """Law 8: whatever the key was used for, and whatever asks. The same person finds their own outcome."""
    record: Named = {
        "account_id": acme.pk, "operation_type": "chat", "provider": "openai", "model": "gpt-6-luna",
        "output_tokens": 9, "idempotency_key": "recorded",
    }  # fmt: skip
    for success in (True, False):
        record |= {"success": success, "idempotency_key": f"recorded-{success}"}
        first = usage.record_usage(**record, input_tokens=1, actor_id=alice.pk)
        assert usage.record_usage(**record, input_tokens=1, actor_id=alice.pk).usage_id == first.usage_id
        with pytest.raises(IdempotencyConflict):
            usage.record_usage(**record, input_tokens=1, actor_id=bob.pk)
    debit: Named = {
        "account_id": acme.pk,
        "tokens": 5,
        "operation": CHAT,
        "pools": TokenPools(5),
        "idempotency_key": "debit",
    }
    grant: Named = {"account_id": acme.pk, "tokens": 5, "type": "bonus", "description": "", "idempotency_key": "credit"}
    hold(acme, alice)
    ledger.deduct_tokens(**debit, actor_id=alice.pk)
    ledger.add_tokens(**grant, actor_id=alice.pk)
    sequence = TokenAccount.objects.get(pk=acme.pk).sequence
    assert hold(acme, alice).is_replay
    assert ledger.deduct_tokens(**debit, actor_id=alice.pk).is_replay
    conflicts: list[Callable[[], ledger.Posting]] = [
        lambda: hold(acme, bob),
        lambda: ledger.deduct_tokens(**debit, actor_id=bob.pk),
        lambda: ledger.add_tokens(**grant, actor_id=bob.pk),
    ]
    for again in conflicts:
        with pytest.raises(IdempotencyConflict):
            again()
    assert TokenAccount.objects.get(pk=acme.pk).sequence == sequence
    # In another account the key is another key.
    assert not ledger.reserve_tokens(
        user_id=bob.pk, tokens=1, operation=CHAT, idempotency_key="hold", lifetime_seconds=9
    ).is_replay


def test_the_debit_is_one_statement_by_either_name(
    acme: TokenAccount, bob: User, django_assert_num_queries: DjangoAssertNumQueries
) -> None:
    payers: list[Named] = [{"account_id": acme.pk, "actor_id": bob.pk}, {"user_id": bob.pk}]
    for payer in payers:
        with django_assert_num_queries(
            2
        ):  # the savepoint of the test's transaction; the statement has a cursor of its own
            ledger.deduct_tokens(**payer, tokens=7, operation=CHAT, pools=TokenPools(7))


def test_the_empty_team_is_refused_and_nobody_elses_card_is_charged(
    acme: TokenAccount, alice: User, bob: User, stripe: StripeStandIn, django_capture_on_commit_callbacks: Any
) -> None:
    """90: Bob has a balance and a card with auto-recharge of his own; the team has neither."""
    for account in (TokenAccount.objects.get(user=bob), acme):
        TokenAccount.objects.filter(pk=account.pk).update(auto_recharge_threshold_tokens=1_000_000)
    package = packages.list_active_packages()[0]
    TokenAccount.objects.filter(user=bob).update(
        auto_recharge_enabled=True, auto_recharge_package=package, stripe_customer_id="cus_bob",
        stripe_payment_method_id="pm_bob",
    )  # fmt: skip
    posting = hold(acme, bob, tokens=5_000)
    after_debit.follow_debit(posting)
    with pytest.raises(InsufficientTokens):
        hold(acme, bob, tokens=1, key="more")
    settled = ledger.settle_usage(usage_id=posting.usage_id or 0, pools=TokenPools(output_tokens=5_000))
    after_debit.follow_debit(settled)
    tasks.auto_recharge(None, acme.pk)
    assert not settled.needs_recharge
    assert not Purchase.objects.exists()
    assert TokenAccount.objects.get(user=bob).balance == 10_000


def test_a_team_buys_with_its_own_card(
    acme: TokenAccount, alice: User, bob: User, stripe: StripeStandIn, django_capture_on_commit_callbacks: Any
) -> None:
    """The payer's account is credited, the buyer is named; auto-recharge charges the team's card, and nobody acted."""
    package = packages.list_active_packages()[0]
    with pytest.raises(ActorRequired):
        checkout.create_checkout_session(
            account_id=acme.pk, terms=checkout.terms_of_package(package.pk, currency="usd"), checkout_key="1"
        )
    purchase = checkout.create_checkout_session(
        account_id=acme.pk, actor_id=alice.pk, terms=checkout.terms_of_package(package.pk, currency="usd"),
        checkout_key="2",
    )  # fmt: skip
    company = {"company": "Acme GmbH", "line1": "Am Markt 1", "postal_code": "10115", "city": "Berlin", "country": "DE"}
    stripe.pay(purchase.checkout_url, **company, tax_id="DE123456789")
    with django_capture_on_commit_callbacks(execute=True):
        deliver(event_of(stripe, "checkout.session.completed"))
    cards.remember_card(purchase_id=purchase.pk)
    entry = TokenTransaction.objects.get(purchase=purchase)
    assert (entry.account_id, entry.user_id, entry.balance_after) == (acme.pk, alice.pk, 5_000 + package.tokens)
    # The company stands on the receipt.
    purchase.refresh_from_db()
    command = ["pdftotext", "-layout", "-", "-"]
    receipt = subprocess.run(
        command, input=receipts.render_receipt(purchase), capture_output=True, check=True
    ).stdout.decode()
    for words in ("Acme GmbH", "Am Markt 1", "10115 Berlin", "DE123456789", alice.email):
        assert words in receipt
    # Those are told who look after the team, with its name and the way into it.
    told = Notification.objects.get(kind="purchase_confirmed")
    assert (told.user_id, told.title.partition(":")[0]) == (alice.pk, "Acme")
    assert told.link.startswith(f"/team/{acme.workspace_id}/enter/?next=%2Ftokens%2F")

    recharge_settings.update_auto_recharge(
        account_id=acme.pk, enabled=True, threshold_tokens=package.tokens, package_id=package.pk
    )
    hold(acme, bob, tokens=6_000)
    bought = recharge.trigger_auto_recharge(account_id=acme.pk)
    assert bought is not None
    entry = TokenTransaction.objects.get(purchase=bought)
    assert (bought.state, bought.user_id, entry.account_id, entry.user_id) == ("paid", None, acme.pk, None)
    # What is refunded leaves the account that it had come to.
    before_tokens = TokenAccount.objects.get(pk=acme.pk).balance
    stripe.control(f"payments/{purchase.stripe_payment_intent_id}/refund")
    deliver(event_of(stripe, "charge.refunded"))
    entry = TokenTransaction.objects.get(type="refund")
    assert (entry.account_id, entry.user_id, entry.amount) == (acme.pk, alice.pk, -package.tokens)
    assert TokenAccount.objects.get(pk=acme.pk).balance == before_tokens - package.tokens
    assert {TokenAccount.objects.get(user=user).balance for user in (alice, bob)} == {10_000}


def test_reads_are_by_account(acme: TokenAccount, alice: User, bob: User) -> None:
    """History, statements and figures of a team have all that it paid for, and personal ones nothing of it."""
    for number, actor in enumerate((alice, bob, bob)):
        posting = hold(acme, actor, key=f"read-{number}")
        ledger.settle_usage(usage_id=posting.usage_id or 0, pools=TokenPools(output_tokens=10))
    assert len(history.get_transactions(account_id=acme.pk)) == 4
    assert len(history.get_transactions(user_id=bob.pk)) == 1  # the welcome bonus
    assert [month.entries for month in statements.list_months(account_id=acme.pk)] == [4]
    assert len(usage.get_user_usage(account_id=acme.pk)) == 3
    own = usage.get_user_usage(account_id=acme.pk, actor_id=bob.pk, limit=1)
    assert [row.user_id for row in usage.get_user_usage(account_id=acme.pk, actor_id=bob.pk)] == [bob.pk, bob.pk]
    assert len(usage.get_user_usage(account_id=acme.pk, actor_id=bob.pk, before_id=own[0].pk)) == 1
    with pytest.raises(usage.UnknownCursor):
        usage.get_user_usage(account_id=acme.pk, actor_id=alice.pk, before_id=own[0].pk)
    assert usage.get_user_usage(user_id=bob.pk) == []
    day = TokenUsage.objects.latest("pk").created_at.date()
    span: Named = {"since": midnight(day), "until": midnight(day.replace(year=day.year + 1))}
    assert stats.usage_totals(account_id=acme.pk, **span).billable_tokens == 30
    assert stats.usage_totals(account_id=acme.pk, actor_id=bob.pk, **span).billable_tokens == 20
    assert [each.pk for each in accounts.get_user_accounts(search="acm").accounts] == [acme.pk]


def test_a_grant_to_ones_own_team_waits_for_somebody_else(acme: TokenAccount, susan: User, make_user: MakeUser) -> None:
    """96: a superadmin who is in the team gives it nothing alone, nor decides on it, nor opens or closes it."""
    other = make_user("other", role="superadmin")
    grant: Named = {"account_id": acme.pk, "tokens": 50, "reason": "Sorry"}
    assert grants.grant_tokens(admin=susan, **grant, request_key="1").state == "done"
    Membership.objects.create(workspace=acme.workspace, user=susan, role="member")
    waiting = grants.grant_tokens(admin=susan, **grant, request_key="2")
    asked = grants.grant_tokens(admin=make_user("adam2", role="admin"), **grant, request_key="3")
    assert (waiting.state, asked.state) == ("requested", "requested")
    assert not grants.may_decide(asked, susan)
    with pytest.raises(grants.GrantNotAllowed, match="of their own"):
        grants.approve_request(superadmin=susan, request_id=asked.pk)
    with pytest.raises(accounts.StatusNotAllowed):
        accounts.suspend_account(superadmin=susan, account_id=acme.pk, reason="Test")
    assert grants.approve_request(superadmin=other, request_id=asked.pk).state == "done"
    assert accounts.suspend_account(superadmin=other, account_id=acme.pk, reason="Test").status == "suspended"
    assert TokenAccount.objects.get(pk=acme.pk).balance == 5_100


def test_one_account_for_a_workspace_and_owners_of_personal_ones_alone(acme: TokenAccount, alice: User) -> None:
    assert ledger.open_team_account(workspace_id=acme.workspace_id).pk == acme.pk
    personal = Workspace.objects.get(owner=alice)
    with pytest.raises(ledger.AccountNotFound):
        ledger.open_team_account(workspace_id=personal.pk)
    for break_it in (
        lambda: TokenAccount.objects.create(workspace=acme.workspace),
        lambda: Workspace.objects.create(kind="team", owner=alice, name="Mine"),
        lambda: Workspace.objects.create(name="Nobody's"),
        lambda: Workspace.objects.filter(pk=personal.pk).update(closed_at="2026-01-01T00:00Z"),
    ):
        with pytest.raises(IntegrityError), transaction.atomic():
            break_it()


def test_services_name_the_payer_and_the_actor(acme: TokenAccount, alice: User, bob: User) -> None:
    client = Client(headers={"authorization": f"Bearer {BILLING_SECRET}"})

    def post(path: str, key: str = "", **body: Any) -> tuple[int, dict[str, Any]]:
        priced = {"operation_type": "chat", "provider": "openai", "model": "gpt-6-luna"}
        answer = client.post(
            f"/api/v1/{path}", json.dumps(priced | body), content_type="application/json",
            headers={"idempotency-key": key or path},
        )  # fmt: skip
        return answer.status_code, answer.json()

    def get(path: str) -> dict[str, Any]:
        return client.get(f"/api/v1/token-accounts/{acme.pk}/{path}").json()

    assert post("reservations", tokens=10)[0] == 400
    assert post("reservations", tokens=10, user_id=bob.pk, account_id=acme.pk)[0] == 400
    actors: list[Named] = [{}, {"actor_id": 10**9}]
    for actor in actors:
        status, problem = post("reservations", tokens=10, account_id=acme.pk, **actor)
        assert (status, problem["code"]) == (422, "actor_required")
    status, held = post("reservations", tokens=10, account_id=acme.pk, actor_id=bob.pk)
    assert (status, held["account"]["account_id"], held["account"]["user_id"]) == (201, acme.pk, None)
    assert (held["usage"]["account_id"], held["usage"]["user_id"]) == (acme.pk, bob.pk)
    status, recorded = post("usage", input_tokens=5, output_tokens=5, account_id=acme.pk, actor_id=alice.pk)
    assert (status, recorded["usage"]["user_id"]) == (201, alice.pk)
    assert (
        get("balance")["available_tokens"] == held["account"]["available_tokens"] - recorded["usage"]["billable_tokens"]
    )
    assert [row["user_id"] for row in get("usage")["items"]] == [alice.pk, bob.pk]
    assert [row["user_id"] for row in get(f"usage?actor_id={bob.pk}")["items"]] == [bob.pk]
    assert client.get("/api/v1/token-accounts/999/balance").status_code == 404
    # Who is in the team no more begins nothing; what they did before is recorded.
    Membership.objects.filter(user=bob).delete()
    late: Named = {"account_id": acme.pk, "actor_id": bob.pk, "key": "late"}
    assert post("reservations", tokens=10, **late)[1]["code"] == "actor_required"
    assert post("usage", input_tokens=5, output_tokens=5, **late)[0] == 201
