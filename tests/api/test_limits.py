"""How often the API may be called, and what it answers where it has no calls. Row numbers are FAULTS.md's."""

from collections.abc import Iterator
from typing import Any
from uuid import uuid4

import pytest
import time_machine
from django.test import Client
from pytest_django.fixtures import Settings

from accounts.models import User
from tests.billing.api.test_api import refused, reservation, used
from tests.billing.api.test_user_api import Program
from tests.environment import free_port

pytestmark = pytest.mark.django_db

MINUTE = "2026-11-21T09:30:10Z"
NEXT_MINUTE = "2026-11-21T09:31:00Z"


@pytest.fixture(autouse=True)
def clock() -> Iterator[time_machine.Traveller]:
    """Ten seconds into a minute, standing still."""
    with time_machine.travel(MINUTE, tick=False) as traveller:
        yield traveller


@pytest.fixture
def secret(settings: Settings) -> str:
    """A secret that nobody has called with."""
    settings.BILLING_SECRETS = [uuid4().hex]
    return str(settings.BILLING_SECRETS[0])


def new_address() -> str:
    """An address that nobody has called from."""
    return f"2001:db8:{uuid4().hex[:4]}:{uuid4().hex[:4]}::1"


@pytest.fixture
def address() -> str:
    return new_address()


def call(path: str, credential: str | None = None, *, address: str = "192.0.2.1", **options: Any) -> Any:
    headers = {} if credential is None else {"authorization": f"Bearer {credential}"}
    return Client(headers=headers, REMOTE_ADDR=address).get(f"/api/v1{path}", **options)


def told(response: Any) -> tuple[int, int, int]:
    names = ("RateLimit-Limit", "RateLimit-Remaining", "RateLimit-Reset")
    return tuple(int(response[name]) for name in names)  # type: ignore[return-value]


def test_calls_of_a_secret(alice: User, secret: str, settings: Settings, clock: time_machine.Traveller) -> None:
    """Row 69: every answer says what is left; beyond that 429, until the next minute; another secret goes on."""
    settings.API_SERVICE_CALLS_PER_MINUTE = 3
    settings.BILLING_SECRETS.append(other := uuid4().hex)
    path = f"/accounts/{alice.pk}/balance"
    assert [told(call(path, secret)) for _ in range(3)] == [(3, 2, 50), (3, 1, 50), (3, 0, 50)]
    response = call(path, secret)
    refused(response, 429, "too_many_requests")
    assert (told(response), response["Retry-After"]) == ((3, 0, 50), "50")
    assert call(path, other).status_code == 200
    clock.move_to(NEXT_MINUTE)
    assert told(call(path, secret)) == (3, 2, 60)


def test_refused_call_changes_nothing(alice: User, secret: str, settings: Settings) -> None:
    """Row 69."""
    settings.API_SERVICE_CALLS_PER_MINUTE = 0
    client = Client(headers={"authorization": f"Bearer {secret}", "idempotency-key": "k"})
    for path, body in (("usage", used(alice)), ("reservations", reservation(alice))):
        response = client.post(f"/api/v1/{path}", body, content_type="application/json")
        refused(response, 429, "too_many_requests")
    assert alice.token_account.balance == 10_000
    assert alice.token_account.reserved == 0


def test_calls_of_a_key(alice: User, bob: User, settings: Settings) -> None:
    """Row 69: each key has its own count, over all calls, refused ones included."""
    settings.API_USER_CALLS_PER_MINUTE = 3
    alices, bobs = Program(alice, ["balance:read"]), Program(bob)
    assert alices.get("/me/balance").status_code == 200
    response = alices.get("/me/usage")
    refused(response, 403, "missing_scope")
    assert told(response) == (3, 1, 50)
    assert told(alices.get("/me/balance", nothing="1")) == (3, 0, 50)
    refused(alices.get("/me/balance"), 429, "too_many_requests")
    assert bobs.get("/me/balance").status_code == 200


def test_guessing_is_slowed(alice: User, secret: str, address: str, settings: Settings) -> None:
    """Rows 66 and 69: beyond the limit of an address, a right guess is answered like a wrong one."""
    settings.API_ANONYMOUS_CALLS_PER_MINUTE = 5
    path = f"/accounts/{alice.pk}/balance"
    for guess in range(5):
        response = call(path, f"guess-{guess}", address=address)
        refused(response, 401, "unauthorized")
        assert told(response) == (5, 4 - guess, 50)
    wrong, right = call(path, "guess-5", address=address), call(path, secret, address=address)
    refused(wrong, 429, "too_many_requests")
    refused(right, 429, "too_many_requests")
    assert wrong.content == right.content
    assert told(wrong) == told(right)
    assert call(path, secret).status_code == 200  # from elsewhere


def test_a_caller_with_many_addresses_is_one(secret: str, address: str, settings: Settings) -> None:
    """Row 69: one machine has a whole /64 of IPv6, and its neighbour another."""
    settings.API_ANONYMOUS_CALLS_PER_MINUTE = 5
    statuses = [call("/me/balance", "wrong", address=f"{address}{number}").status_code for number in range(6)]
    assert statuses == [401] * 5 + [429]
    assert call("/me/balance", "wrong", address=new_address()).status_code == 401


def test_guessing_locks_no_neighbour_out(alice: User, secret: str, address: str, settings: Settings) -> None:
    """Row 69: who has called from this address before goes on, whatever another program there gets wrong."""
    settings.API_ANONYMOUS_CALLS_PER_MINUTE = 2
    path = f"/accounts/{alice.pk}/balance"
    key = Program(alice).token
    assert call(path, secret, address=address).status_code == 200
    assert call("/me/balance", key, address=address).status_code == 200
    for _ in range(5):
        call(path, "wrong", address=address)
    refused(call(path, "wrong", address=address), 429, "too_many_requests")
    assert call(path, secret, address=address).status_code == 200
    assert call("/me/balance", key, address=address).status_code == 200


def test_caller_behind_a_proxy(settings: Settings) -> None:
    """Row 69: one caller's failures are not the proxy's; and nobody names an address where no proxy is trusted."""
    settings.API_ANONYMOUS_CALLS_PER_MINUTE = 1

    def status(proxy: str, forwarded_for: str) -> int:
        headers = {"x-forwarded-for": forwarded_for, "authorization": "Bearer wrong"}
        return int(Client(REMOTE_ADDR=proxy, headers=headers).get("/api/v1/me/balance").status_code)

    settings.ALLAUTH_TRUSTED_PROXY_COUNT = 1
    proxy, one, another = new_address(), new_address(), new_address()
    assert status(proxy, f"203.0.113.9, {one}") == 401
    assert status(proxy, f"203.0.113.8, {one}") == 429
    assert status(proxy, another) == 401
    settings.ALLAUTH_TRUSTED_PROXY_COUNT = 0
    caller = new_address()
    assert status(caller, new_address()) == 401
    assert status(caller, new_address()) == 429


@pytest.fixture
def _redis_is_down(settings: Settings) -> None:
    settings.REDIS_URL = f"redis://127.0.0.1:{free_port()}/0"


@pytest.mark.usefixtures("_redis_is_down")
def test_redis_is_down(alice: User, secret: str, settings: Settings) -> None:
    """Row 73: what comes with a right credential is done, debits above all; the rest stays outside."""
    settings.API_SERVICE_CALLS_PER_MINUTE = settings.API_USER_CALLS_PER_MINUTE = 0
    settings.API_ANONYMOUS_CALLS_PER_MINUTE = 0
    service = Client(headers={"authorization": f"Bearer {secret}", "idempotency-key": "k"})
    response = service.post("/api/v1/usage", used(alice), content_type="application/json")
    assert response.status_code == 201
    assert response.json()["account"]["balance_tokens"] == 7_750
    assert "RateLimit-Limit" not in response
    assert Program(alice).get("/me/balance").json()["balance_tokens"] == 7_750
    refused(call("/me/balance", "wrong"), 401, "unauthorized")
    refused(call(f"/accounts/{alice.pk}/balance"), 401, "unauthorized")


@pytest.mark.parametrize("path", ["", "nothing", "me", "me/", "accounts/1", "accounts/1/balance/", "a/b/c", "quotes/"])
@pytest.mark.parametrize("method", ["get", "post", "put", "delete", "options"])
def test_address_that_is_none(method: str, path: str, address: str, secret: str) -> None:
    """A problem, whatever the method, and no page; also for those who show a right credential."""
    client = Client(REMOTE_ADDR=address, enforce_csrf_checks=True, headers={"authorization": f"Bearer {secret}"})
    response = getattr(client, method)(f"/api/v1/{path}")
    refused(response, 404, "not_found")
    assert told(response)[2] == 50


def test_method_that_is_not_taken(address: str, alice: User) -> None:
    client = Client(REMOTE_ADDR=address, enforce_csrf_checks=True)
    for method, path, allowed in (
        ("get", "usage", "POST"),
        ("delete", f"accounts/{alice.pk}/balance", "GET"),
        ("options", "quotes", "POST"),
        ("post", "me/balance", "GET"),
        ("post", "openapi.json", "GET"),
    ):
        response = getattr(client, method)(f"/api/v1/{path}")
        refused(response, 405, "method_not_allowed")
        assert response["Allow"] == allowed
        assert "RateLimit-Limit" in response


def test_document_tells_the_limit(client: Client, address: str, settings: Settings) -> None:
    """It needs no credential: it counts for its address."""
    settings.API_ANONYMOUS_CALLS_PER_MINUTE = 1
    assert told(call("/openapi.json", address=address)) == (1, 0, 50)
    refused(call("/openapi.json", address=address), 429, "too_many_requests")
