"""The HTTP API for people with a personal key. Row numbers are FAULTS.md's."""

from collections.abc import Callable
from datetime import timedelta
from itertools import pairwise
from typing import Any

import pytest
from django.db import connection
from django.test import Client
from django.test.utils import CaptureQueriesContext
from django.utils import timezone
from pytest_django.fixtures import Settings

from accounts import api_keys
from accounts.models import ApiKey, User
from billing import ledger
from billing.catalogue import packages
from billing.models import TokenAccount, TokenPricing, TokenTransaction
from tests.billing.api.test_api import Service, refused, used
from tests.environment import BILLING_SECRET

pytestmark = pytest.mark.django_db

PATHS = {
    "/me/balance": "balance:read",
    "/me/transactions": "transactions:read",
    "/me/usage": "usage:read",
    "/me/packages": "packages:read",
}


class Program:
    """A person's own program, with a key."""

    def __init__(self, user: User, scopes: list[str] | None = None, **options: Any) -> None:
        self.key, self.token = api_keys.make_key(
            user_id=user.pk, name="Program", scopes=scopes or ApiKey.Scope.values, **options
        )
        self.client = Client(headers={"authorization": f"Bearer {self.token}"}, enforce_csrf_checks=True)

    def get(self, path: str, **query: Any) -> Any:
        return self.client.get(f"/api/v1{path}", query)


@pytest.fixture(autouse=True)
def _many_may_call(settings: Settings) -> None:
    settings.API_USER_CALLS_PER_MINUTE = 10**6


@pytest.fixture
def program(alice: User) -> Program:
    return Program(alice)


def grant(user: User, susan: User, number: int) -> None:
    ledger.add_tokens(
        user_id=user.pk,
        tokens=100 + number,
        type="admin_grant",
        admin_id=susan.pk,
        description="Thanks",
        idempotency_key=f"grant-{number}",
    )


# --- Who may call ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", PATHS)
def test_key_opens_what_its_scopes_name(alice: User, path: str) -> None:
    for scope in ApiKey.Scope.values:
        response = Program(alice, [scope]).get(path)
        if scope == PATHS[path]:
            assert response.status_code == 200
        else:
            problem = refused(response, 403, "missing_scope")
            assert problem["scope"] == PATHS[path]
            assert PATHS[path] in problem["detail"]


def revoke(program: Program) -> None:
    api_keys.revoke_key(program.key)


def expire(program: Program) -> None:
    ApiKey.objects.filter(pk=program.key.pk).update(expires_at=timezone.now() - timedelta(seconds=1))


def close_account(program: Program) -> None:
    User.objects.filter(pk=program.key.user_id).update(is_active=False)


@pytest.mark.parametrize("close", [revoke, expire, close_account])
def test_key_that_is_no_longer_good(program: Program, close: Callable[[Program], None]) -> None:
    for path in PATHS:
        assert program.get(path).status_code == 200
    close(program)
    for path in PATHS:
        refused(program.get(path), 401, "unauthorized")


def test_one_credential_does_not_open_the_others_door(program: Program, alice: User) -> None:
    """Row 66: the secret reads nobody's own data, a key is no secret, and neither is a session."""
    signed_in = Client()
    signed_in.force_login(alice)
    for path in PATHS:
        response = refused(Service().get(path), 401, "unauthorized")
        assert "API key" in response["detail"]
        refused(signed_in.get(f"/api/v1{path}"), 401, "unauthorized")
    refused(program.get(f"/accounts/{alice.pk}/balance"), 401, "unauthorized")


def test_wrong_keys(client: Client, program: Program) -> None:
    """Row 66, for keys: nearly right is wrong, and so is the hash that the database holds."""
    token = program.token
    wrong = ["", "pm_", token[:-1], token + "A", token.swapcase(), f" {token}", program.key.token_hash,
             f"pm_{program.key.token_hash}", f"{token}é", token.removeprefix("pm_"), BILLING_SECRET]  # fmt: skip
    for value in wrong:
        response = client.get("/api/v1/me/balance", HTTP_AUTHORIZATION=f"Bearer {value}")
        refused(response, 401, "unauthorized")
        assert response["WWW-Authenticate"].startswith("Bearer")
    assert program.get("/me/balance").status_code == 200


def test_use_is_noted_once_a_minute(program: Program) -> None:
    """Reads stay reads: within the minute nothing is written."""

    def writes() -> int:
        with CaptureQueriesContext(
            connection,
        ) as queries:
            assert program.get("/me/balance").status_code == 200
        return sum(query["sql"].startswith("UPDATE") for query in queries)

    assert writes() == 1
    noted = ApiKey.objects.get(pk=program.key.pk).last_used_at
    assert noted is not None
    assert writes() == 0
    earlier = noted - timedelta(minutes=2)
    ApiKey.objects.filter(pk=program.key.pk).update(last_used_at=earlier)
    assert writes() == 1
    assert ApiKey.objects.filter(pk=program.key.pk, last_used_at__gt=earlier).exists()


# --- What they read -------------------------------------------------------------------------------------------------


def test_own_balance(program: Program, alice: User, bob: User) -> None:
    Service().post("/usage", used(bob))
    assert program.get("/me/balance").json() == {
        "account_id": ledger.get_account(user_id=alice.pk).pk,
        "user_id": alice.pk,
        "balance_tokens": 10_000,
        "reserved_tokens": 0,
        "available_tokens": 10_000,
        "status": "active",
        "lots": [],
    }


def test_own_balance_of_a_suspended_account(program: Program, alice: User) -> None:
    """Row 60: who owes may look."""
    TokenAccount.objects.filter(user=alice).update(status="suspended", status_reason="By hand")
    assert program.get("/me/balance").json()["status"] == "suspended"


def read_all(program: Program, path: str, **query: Any) -> list[Any]:
    items: list[Any] = []
    cursor: dict[str, int] = {}
    while True:
        page = program.get(path, **query, **cursor).json()
        items += page["items"]
        if page["next_cursor"] is None:
            return items
        assert len(page["items"]) == query["limit"]
        cursor = {"cursor": page["next_cursor"]}


def test_own_transactions(program: Program, alice: User, bob: User, susan: User) -> None:
    """Newest first, each once, nobody else's; what comes in between two pages moves nothing."""
    for number in range(6):
        grant(alice, susan, number)
        grant(bob, susan, number)
        Service().post("/usage", used(alice), key=f"key-{number}")
    whole = read_all(program, "/me/transactions", limit=4)
    assert [entry["sequence"] for entry in whole] == list(range(13, 0, -1))
    assert {entry["transaction_id"] for entry in whole} == set(
        TokenTransaction.objects.filter(user=alice).values_list("pk", flat=True)
    )
    for newer, older in pairwise(whole):
        assert newer["balance_before_tokens"] == older["balance_after_tokens"]
        assert newer["balance_after_tokens"] - newer["balance_before_tokens"] == newer["amount_tokens"]
    assert whole[0] == {
        "transaction_id": whole[0]["transaction_id"],
        "sequence": 13,
        "type": "usage",
        "amount_tokens": -2_250,
        "balance_before_tokens": whole[0]["balance_after_tokens"] + 2_250,
        "balance_after_tokens": TokenAccount.objects.get(user=alice).balance,
        "description": "Chat · gpt-6-luna",
        "usage_id": whole[0]["usage_id"],
        "purchase_id": None,
        "paid_cents": None,
        "currency": None,
        "created_at": whole[0]["created_at"],
    }

    first = program.get("/me/transactions", limit=4).json()
    grant(alice, susan, 99)
    second = program.get("/me/transactions", limit=4, cursor=first["next_cursor"]).json()
    assert [entry["sequence"] for entry in first["items"] + second["items"]] == list(range(13, 5, -1))


def test_own_transactions_of_a_type(program: Program, alice: User, susan: User) -> None:
    for number in range(5):
        grant(alice, susan, number)
        Service().post("/usage", used(alice), key=f"key-{number}")
    grants = read_all(program, "/me/transactions", type="admin_grant", limit=2)
    assert [entry["amount_tokens"] for entry in grants] == [104, 103, 102, 101, 100]
    assert len(read_all(program, "/me/transactions", type="usage", limit=2)) == 5
    assert read_all(program, "/me/transactions", type="refund", limit=2) == []


def test_own_transactions_of_a_time(program: Program, alice: User, susan: User) -> None:
    """`since` is included, `until` is not, and pages within the range go on where they ended."""
    for number in range(6):
        grant(alice, susan, number)
    moments = [entry["created_at"] for entry in read_all(program, "/me/transactions", limit=100)][::-1]

    def sequences(**query: Any) -> list[int]:
        return [entry["sequence"] for entry in read_all(program, "/me/transactions", limit=2, **query)]

    assert sequences(since=moments[0]) == [7, 6, 5, 4, 3, 2, 1]
    assert sequences(since=moments[2], until=moments[5]) == [5, 4, 3]
    assert sequences(until=moments[0]) == []
    assert sequences(since="2999-01-01T00:00:00Z") == []
    assert sequences(until="2999-01-01T00:00:00+05:30", type="bonus") == [1]
    assert sequences(since=moments[5], until=moments[2]) == []


def test_ledgers_pages_cost_the_same(program: Program, alice: User, susan: User) -> None:
    """As many statements for the last page as for the first, and each of them by an index."""
    for number in range(30):
        grant(alice, susan, number)

    def statements(**query: Any) -> list[str]:
        with CaptureQueriesContext(connection) as queries:
            assert program.get("/me/transactions", limit=2, **query).status_code == 200
        return [query["sql"] for query in queries]

    statements()  # the first one notes the key's use
    first, last = statements(), statements(cursor=3)
    assert len(first) == len(last)
    assert not any("OFFSET" in sql or "COUNT(" in sql for sql in first + last)


def test_own_usage(program: Program, alice: User, bob: User) -> None:
    """Row 63: nobody else's operations, and no page of theirs."""
    for number in range(5):
        Service().post("/usage", used(alice, success=number != 2), key=f"key-{number}")
    others = Service().post("/usage", used(bob)).json()["usage"]["usage_id"]
    items = read_all(program, "/me/usage", limit=2)
    assert len({item["usage_id"] for item in items}) == 5
    assert items == Service().get(f"/accounts/{alice.pk}/usage").json()["items"]
    assert [item["status"] for item in read_all(program, "/me/usage", status="failed", limit=2)] == ["failed"]
    assert read_all(program, "/me/usage", operation_type="image", limit=2) == []
    refused(program.get("/me/usage", cursor=others), 400, "unknown_cursor")


def test_packages_in_a_currency(program: Program, alice: User) -> None:
    """In the account's, or in the one asked for; nothing is for sale in a currency without prices."""
    offered = program.get("/me/packages").json()
    assert offered["currency"] == "usd"
    assert [item["price_cents"] for item in offered["items"]] == [1_500, 6_500, 17_500, 50_000]
    assert [item["savings_percent"] for item in offered["items"]] == [
        offer.savings_percent for offer in packages.list_offers()
    ]
    assert program.get("/me/packages", currency="eur").json() == {"currency": "eur", "items": []}

    TokenAccount.objects.filter(user=alice).update(currency="eur")
    assert program.get("/me/packages").json()["currency"] == "usd"  # as on the page: sold in dollars alone
    TokenPricing.objects.filter(name="Starter").update(price_eur_cents=1_400)
    in_euros = program.get("/me/packages").json()
    assert (in_euros["currency"], [item["price_cents"] for item in in_euros["items"]]) == ("eur", [1_400])
    TokenPricing.objects.filter(name="Pro").update(is_active=False)
    assert "Pro" not in [item["name"] for item in program.get("/me/packages", currency="usd").json()["items"]]


def test_questions_of_a_wrong_kind(program: Program) -> None:
    """Rows 56 and 57."""
    numbers = ["0", "-1", "1.5", "true", "NaN", "1e400", "１２", str(2**63), "", "1\x00", "9" * 6_000]
    words = ["", "nothing", "a\x00", "USAGE"]
    moments = ["", "now", "0", "1e400", "2026-11-21", "2026-11-21T09:30:00", "2026-02-30T00:00:00Z", "1700000000",
               "２０２６-11-21T09:30:00Z", "2026-11-21T09:30:00+99:00", "2026-11-21T25:00:00Z", "2026-11-21 09:30:00Z",
               "2026-11-21T09:30:00Z\x00", "10000-01-01T00:00:00Z", "0001-01-01T00:00:00+14:00",
               "9999-12-31T23:59:59-14:00"]  # fmt: skip
    wrong: dict[str, dict[str, list[str]]] = {
        "/me/transactions": {
            "cursor": numbers, "limit": [*numbers, "101"], "type": words, "since": moments, "until": moments,
        },
        "/me/usage": {"cursor": numbers, "limit": [*numbers, "101"], "status": words, "operation_type": words},
        "/me/packages": {"currency": [*words, "chf"]},
    }  # fmt: skip
    for path, fields in wrong.items():
        for name, values in fields.items():
            for value in values:
                problem = refused(program.get(path, **{name: value}), 400, "invalid_request")
                assert problem["errors"][0]["field"] == name, value
    for moment in ("0001-01-01T00:00:00Z", "9999-12-31T23:59:59.999999Z", "2026-11-21T09:30:00+23:59"):
        assert program.get("/me/transactions", since=moment).status_code == 200
        assert program.get("/me/transactions", until=moment).status_code == 200
