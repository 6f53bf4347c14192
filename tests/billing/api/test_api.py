"""The HTTP API for services, through real requests on the real database. Row numbers are FAULTS.md's."""

import json
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

import pytest
from django.contrib.staticfiles import finders
from django.core.management import call_command, get_commands
from django.db import connection
from django.test import Client
from pytest_django.fixtures import Settings

from accounts.models import User
from billing import ledger
from billing.catalogue import system_settings
from billing.models import ModelPrice, TokenAccount, TokenTransaction, TokenUsage
from tests.environment import BILLING_SECRET

pytestmark = pytest.mark.django_db

LUNA = {"provider": "openai", "model": "gpt-6-luna"}  # text, multiplier 1.5
IMAGES = {"provider": "openai", "model": "gpt-image-2"}  # 6,000 tokens for 1024x1024
RETIRED = {"provider": "openai", "model": "dall-e-3"}


class Service:
    """Another server of the platform, as a client of the API."""

    def __init__(self, secret: str = BILLING_SECRET) -> None:
        self.client = Client(headers={"authorization": f"Bearer {secret}"}, enforce_csrf_checks=True)

    def get(self, path: str, **query: Any) -> Any:
        return self.client.get(f"/api/v1{path}", query)

    def post(self, path: str, body: Any = None, *, key: str | None = "key-1") -> Any:
        data = body if isinstance(body, bytes) else json.dumps({} if body is None else body)
        headers = {} if key is None else {"idempotency-key": key}
        return self.client.post(f"/api/v1{path}", data, content_type="application/json", headers=headers)


@pytest.fixture
def service() -> Service:
    return Service()


@pytest.fixture(autouse=True)
def _books_are_whole(request: pytest.FixtureRequest) -> Iterator[None]:
    """Whatever a test does, the laws hold after it."""
    request.getfixturevalue("transactional_db" if "transactional_db" in request.fixturenames else "db")
    yield
    for account in TokenAccount.objects.all():
        entries = list(TokenTransaction.objects.filter(account=account).order_by("sequence"))
        holds = TokenUsage.objects.filter(account=account, status="reserved").values_list("reserved_tokens", flat=True)
        assert account.balance == sum(entry.amount for entry in entries)
        assert account.sequence == len(entries)
        assert account.reserved == sum(hold or 0 for hold in holds)
    if "verify_ledger" in get_commands():
        call_command("verify_ledger")


MakePoor = Callable[[int], User]


@pytest.fixture
def make_poor(make_user: Callable[..., User], susan: User) -> MakePoor:
    """Makes a user who owns so many tokens, fewer than the welcome bonus."""

    def make(tokens: int) -> User:
        eve = make_user("eve")
        ledger.deduct_tokens(
            user_id=eve.pk,
            tokens=10_000 - tokens,
            type="admin_deduction",
            admin_id=susan.pk,
            description="Test",
        )
        return eve

    return make


def everything() -> list[Any]:
    """All that a call could have changed."""
    tables = (TokenAccount, TokenTransaction, TokenUsage)
    return [list(table._default_manager.order_by("pk").values()) for table in tables]


def refused(response: Any, status: int, code: str) -> dict[str, Any]:
    """The problem document of a refusal."""
    assert response.status_code == status, response.content
    assert response["Content-Type"] == "application/problem+json"
    problem: dict[str, Any] = response.json()
    assert {"type", "title", "status", "detail", "code"} <= set(problem)
    assert (problem["status"], problem["code"]) == (status, code)
    return problem


def reservation(user: User, **fields: Any) -> dict[str, Any]:
    return {
        "user_id": user.pk,
        "operation_type": "chat",
        **LUNA,
        "input_tokens": 400,
        "max_output_tokens": 600,
    } | fields


def used(user: User, **fields: Any) -> dict[str, Any]:
    return {
        "user_id": user.pk,
        "operation_type": "chat",
        **LUNA,
        "input_tokens": 1_000,
        "output_tokens": 500,
    } | fields


# --- Who may call -------------------------------------------------------------------------------------------


WRONG_HEADERS = (
    None,
    "",
    "Bearer",
    "Bearer ",
    "Bearer  ",
    "Bearer wrong",
    f"Bearer {BILLING_SECRET}x",
    f"Bearer {BILLING_SECRET[:-1]}",
    f"Basic {BILLING_SECRET}",
    BILLING_SECRET,
    "Bearer sécret",
    "Bearer \udcff\udcfe",
    f"Bearer {BILLING_SECRET}é",
    "Bearer None",
    "Bearer []",
)


@pytest.mark.parametrize("secrets", [[BILLING_SECRET], [], ["sécret"]])
def test_secret_closed(client: Client, alice: User, settings: Settings, secrets: list[str]) -> None:
    """Row 66: missing, empty, wrong, non-ASCII or not configured is closed."""
    settings.BILLING_SECRETS = secrets
    before = everything()
    right = f"Bearer {BILLING_SECRET}"
    for header in WRONG_HEADERS if BILLING_SECRET in secrets else (*WRONG_HEADERS, right):
        extra: dict[str, Any] = {} if header is None else {"HTTP_AUTHORIZATION": header}
        for path in ("balance", "usage"):
            response = client.get(f"/api/v1/accounts/{alice.pk}/{path}", **extra)
            refused(response, 401, "unauthorized")
            assert response["WWW-Authenticate"].startswith("Bearer")
        for path in ("quotes", "reservations", "reservations/1/settle", "reservations/1/release", "usage"):
            response = client.post(f"/api/v1/{path}", used(alice), content_type="application/json", **extra)
            refused(response, 401, "unauthorized")
    assert everything() == before


def test_secret_rotation(alice: User, settings: Settings) -> None:
    """Row 66: both secrets open the door while one replaces the other."""
    settings.BILLING_SECRETS = ["old-secret", "new-secret"]
    path = f"/accounts/{alice.pk}/balance"
    assert Service("old-secret").get(path).status_code == 200
    assert Service("new-secret").get(path).status_code == 200
    settings.BILLING_SECRETS = ["new-secret"]
    refused(Service("old-secret").get(path), 401, "unauthorized")


def test_session_is_no_secret(client: Client, susan: User) -> None:
    """Row 66: nobody who is signed in gets in by that, a superadmin neither."""
    client.force_login(susan)
    refused(client.get(f"/api/v1/accounts/{susan.pk}/balance"), 401, "unauthorized")


# --- Balance and quote --------------------------------------------------------------------------------------


def test_balance(service: Service, alice: User) -> None:
    service.post("/reservations", reservation(alice))
    response = service.get(f"/accounts/{alice.pk}/balance")
    assert response.status_code == 200
    assert response.json() == {
        "account_id": TokenAccount.objects.get(user=alice).pk,
        "user_id": alice.pk,
        "balance_tokens": 10_000,
        "reserved_tokens": 1_500,
        "available_tokens": 8_500,
        "status": "active",
        "lots": [],
    }


@pytest.mark.parametrize("user_id", [10**9, 2**63 - 1])
def test_unknown_account(service: Service, alice: User, user_id: int) -> None:
    before = everything()
    refused(service.get(f"/accounts/{user_id}/balance"), 404, "account_not_found")
    refused(service.get(f"/accounts/{user_id}/usage"), 404, "account_not_found")
    body: dict[str, Any] = {"user_id": user_id, **LUNA, "input_tokens": 1}
    refused(service.post("/quotes", body), 404, "account_not_found")
    refused(service.post("/reservations", body | {"operation_type": "chat"}), 404, "account_not_found")
    refused(service.post("/usage", used(alice, user_id=user_id)), 404, "account_not_found")
    assert everything() == before


def test_account_number_of_a_wrong_kind(service: Service, alice: User) -> None:
    """Row 56, in the address."""
    for number in ("0", "-1", "+1", "1.0", "1_0", "true", "１２", "NaN", "1e400", str(2**63), "1%00"):
        for path in (f"/accounts/{number}/balance", f"/accounts/{number}/usage"):
            refused(service.get(path), 400, "invalid_request")
        for path in (f"/reservations/{number}/settle", f"/reservations/{number}/release"):
            refused(service.post(path), 400, "invalid_request")


@pytest.mark.parametrize(
    ("work", "tokens"),
    [
        ({**LUNA, "input_tokens": 1_000, "max_output_tokens": 500}, 2_250),
        ({**LUNA, "input_tokens": 1, "max_output_tokens": 0}, 2),  # rounded up
        ({**IMAGES, "image_count": 1, "image_size": "1024x1024"}, 6_000),
    ],
)
def test_quote(service: Service, alice: User, work: dict[str, Any], tokens: int) -> None:
    before = everything()
    response = service.post("/quotes", {"user_id": alice.pk, **work}, key=None)
    assert response.status_code == 200
    assert response.json() == {
        "max_billable_tokens": tokens,
        "available_tokens": 10_000,
        "missing_tokens": 0,
        "fits": True,
    }
    assert everything() == before


def test_quote_that_does_not_fit(service: Service, alice: User) -> None:
    body = {"user_id": alice.pk, **IMAGES, "image_count": 2, "image_size": "1024x1024"}
    quote = service.post("/quotes", body, key=None).json()
    assert (quote["max_billable_tokens"], quote["missing_tokens"], quote["fits"]) == (12_000, 2_000, False)


@pytest.mark.parametrize("path", ["/quotes", "/reservations"])
def test_retired_model_is_refused(service: Service, alice: User, path: str) -> None:
    """Row 58: refused, and the replacement is named."""
    before = everything()
    body = {"user_id": alice.pk, **RETIRED, "image_count": 1}
    if path == "/reservations":
        body["operation_type"] = "image"
    assert "gpt-image-2" in refused(service.post(path, body), 422, "retired_model")["detail"]
    refused(service.post(path, body | {"model": "gpt-0"}), 422, "unknown_model")
    assert everything() == before


# --- Reserve, settle, release -------------------------------------------------------------------------------


def test_reserve_and_settle(service: Service, alice: User) -> None:
    """Row 54: what was used is charged once, the rest of the hold is given back."""
    response = service.post("/reservations", reservation(alice, chat_id=7, metadata={"trace": "t-1", "ok": True}))
    assert response.status_code == 201
    held = response.json()
    assert (held["usage"]["status"], held["usage"]["reserved_tokens"]) == ("reserved", 1_500)
    assert (held["usage"]["chat_id"], held["usage"]["metadata"]) == (7, {"trace": "t-1", "ok": True})
    assert held["account"]["available_tokens"] == 8_500

    path = f"/reservations/{held['usage']['usage_id']}/settle"
    used_tokens = {
        "input_tokens": 100,
        "cached_input_tokens": 300,
        "output_tokens": 200,
        "reasoning_tokens": 50,
    }
    for nothing_used in ({}, {"duration_ms": 5}, used_tokens | {"image_count": 1}):
        refused(service.post(path, nothing_used, key=None), 400, "invalid_usage")
    settled = service.post(path, used_tokens, key=None)
    assert settled.status_code == 200
    outcome = settled.json()
    assert (outcome["usage"]["status"], outcome["usage"]["billable_tokens"]) == ("succeeded", 900)
    assert outcome["account"] == {
        "account_id": TokenAccount.objects.get(user=alice).pk,
        "user_id": alice.pk,
        "balance_tokens": 9_100,
        "reserved_tokens": 0,
        "available_tokens": 9_100,
        "status": "active",
    }
    # 100 × 0.10 + 300 × 0.01 + 200 × 0.50 micro-dollars
    assert TokenUsage.objects.get().provider_cost_microusd == 113

    assert service.post(path, {"input_tokens": 400, "output_tokens": 600}).json() == outcome
    refused(service.post(path.replace("settle", "release")), 409, "usage_already_closed")
    assert TokenTransaction.objects.filter(type="usage").count() == 1


def test_nothing_is_held_or_charged_while_billing_is_switched_off(
    service: Service, make_poor: MakePoor, susan: User
) -> None:
    poor = make_poor(1)
    system_settings.update_system_settings(changes={"billing_enabled": False}, changed_by_id=susan.pk)
    quote = {"user_id": poor.pk, **LUNA, "input_tokens": 400, "max_output_tokens": 600}
    assert service.post("/quotes", quote, key=None).json() == {
        "max_billable_tokens": 0,
        "available_tokens": 1,
        "missing_tokens": 0,
        "fits": True,
    }
    held = service.post("/reservations", reservation(poor)).json()["usage"]
    assert (held["reserved_tokens"], held["is_free"]) == (0, True)
    settled = service.post(f"/reservations/{held['usage_id']}/settle", {"output_tokens": 600}, key=None).json()
    assert (settled["usage"]["billable_tokens"], settled["usage"]["unbilled_tokens"]) == (0, 0)
    recorded = service.post("/usage", used(poor), key="recorded").json()
    assert (recorded["usage"]["billable_tokens"], recorded["usage"]["is_free"]) == (0, True)
    assert recorded["account"]["balance_tokens"] == 1
    assert not TokenTransaction.objects.filter(type="usage").exists()
    assert TokenUsage.objects.filter(provider_cost_microusd__gt=0).count() == 2


def test_reserve_and_release(service: Service, alice: User) -> None:
    """Row 54: a failed operation gives everything back, and is not charged afterwards."""
    usage_id = service.post("/reservations", reservation(alice)).json()["usage"]["usage_id"]
    path = f"/reservations/{usage_id}/release"
    released = service.post(path, {"error_message": "The provider\nfailed."}).json()
    assert (released["usage"]["status"], released["usage"]["error_message"]) == (
        "failed",
        "The provider\nfailed.",
    )
    assert (released["account"]["available_tokens"], released["account"]["reserved_tokens"]) == (10_000, 0)
    assert service.post(path, b"").status_code == 200  # again, and without a body
    refused(service.post(path.replace("release", "settle")), 409, "usage_already_closed")
    assert not TokenTransaction.objects.filter(type="usage").exists()


def test_use_beyond_the_hold_is_not_charged(service: Service, alice: User) -> None:
    """Row 49: the quote is charged, the rest is kept as unbilled."""
    usage_id = service.post(
        "/reservations", reservation(alice, input_tokens=0, max_output_tokens=0, tokens=100)
    ).json()["usage"]["usage_id"]
    item = service.post(f"/reservations/{usage_id}/settle", {"input_tokens": 200}).json()["usage"]
    assert (item["billable_tokens"], item["unbilled_tokens"]) == (100, 200)


def test_images_are_reserved_and_settled(service: Service, alice: User) -> None:
    body = {
        "user_id": alice.pk,
        "operation_type": "image",
        **IMAGES,
        "image_count": 1,
        "image_size": "1024x1024",
    }
    held = service.post("/reservations", body).json()["usage"]
    assert (held["reserved_tokens"], held["fixed_cost_tokens"], held["multiplier"]) == (6_000, 6_000, None)
    settled = service.post(f"/reservations/{held['usage_id']}/settle").json()
    assert (settled["usage"]["billable_tokens"], settled["account"]["balance_tokens"]) == (6_000, 4_000)
    assert TokenUsage.objects.get().provider_cost_microusd == 53_000


def test_only_the_images_that_came_are_paid(service: Service, alice: User) -> None:
    images = {"user_id": alice.pk, "operation_type": "image", **IMAGES, "image_count": 3, "image_size": "1024x1024"}
    images |= {"image_quality": "low"}
    held = service.post("/reservations", images).json()["usage"]
    assert held["reserved_tokens"] == 4_500
    path = f"/reservations/{held['usage_id']}/settle"
    for wrong, code in (
        (0, "invalid_request"),
        ("2", "invalid_request"),
        (4, "invalid_usage"),
        (1_001, "invalid_request"),
    ):
        refused(service.post(path, {"image_count": wrong}), 400, code)
    settled = service.post(path, {"image_count": 2}).json()
    assert (settled["usage"]["image_count"], settled["usage"]["billable_tokens"]) == (2, 3_000)
    assert settled["account"]["available_tokens"] == 7_000
    whole = TokenUsage.objects.get().provider_cost_microusd
    assert service.post(path, {"image_count": 3}).json() == settled
    one = service.post("/usage", images | {"image_count": 1}, key="one").json()["usage"]
    assert whole == 2 * TokenUsage.objects.get(pk=one["usage_id"]).provider_cost_microusd


def test_too_few_tokens(service: Service, make_poor: MakePoor) -> None:
    """402 says how many are missing, and nothing is held."""
    eve = make_poor(500)
    before = everything()
    problem = refused(service.post("/reservations", reservation(eve)), 402, "insufficient_tokens")
    assert (problem["needed_tokens"], problem["available_tokens"], problem["missing_tokens"]) == (
        1_500,
        500,
        1_000,
    )
    assert everything() == before


def test_retry_of_the_reservation_that_took_the_last_token(service: Service, make_poor: MakePoor) -> None:
    """Row 55: the retry gets the first result, although a second such hold would not fit."""
    eve = make_poor(1_500)
    first = service.post("/reservations", reservation(eve))
    again = service.post("/reservations", reservation(eve))
    assert (first.status_code, again.status_code) == (201, 200)
    assert first.json() == again.json()


@pytest.mark.parametrize("status", ["suspended", "blocked"])
def test_account_that_is_not_active(service: Service, alice: User, status: str) -> None:
    """Row 60: no new reservation, the running one settles, and what was used elsewhere is recorded."""
    usage_id = service.post("/reservations", reservation(alice)).json()["usage"]["usage_id"]
    TokenAccount.objects.filter(user=alice).update(status=status, status_reason="By hand")
    problem = refused(service.post("/reservations", reservation(alice), key="key-2"), 403, "account_not_active")
    assert problem["account_status"] == status
    quote = service.post("/quotes", {"user_id": alice.pk, **LUNA, "input_tokens": 1}).json()
    assert quote["fits"] is False
    assert service.post(f"/reservations/{usage_id}/settle", {"input_tokens": 10}).status_code == 200
    assert service.post("/usage", used(alice), key="key-3").status_code == 201
    assert TokenAccount.objects.get(user=alice).balance == 10_000 - 15 - 2_250


def test_expired_reservation(service: Service, alice: User) -> None:
    """Row 54: after its expiry a hold is inert."""
    usage_id = service.post("/reservations", reservation(alice, lifetime_seconds=1)).json()["usage"]["usage_id"]
    TokenUsage.objects.filter(pk=usage_id).update(expires_at="2020-01-01T00:00:00Z")
    assert ledger.expire_reservations() == 1
    refused(service.post(f"/reservations/{usage_id}/settle", {"input_tokens": 10}), 409, "usage_already_closed")


def test_unknown_reservation(service: Service, alice: User) -> None:
    for action in ("settle", "release"):
        refused(service.post(f"/reservations/{2**63 - 1}/{action}"), 404, "usage_not_found")


def test_price_change_does_not_touch_a_hold(service: Service, alice: User, susan: User) -> None:
    """Row 59: the snapshot rules, and a retry after the change is still the same request."""
    held = service.post("/reservations", reservation(alice)).json()["usage"]
    system_settings.update_system_settings(changes={"token_multiplier": Decimal(3)}, changed_by_id=susan.pk)
    again = service.post("/reservations", reservation(alice))
    assert (again.status_code, again.json()["usage"]) == (200, held)
    settled = service.post(f"/reservations/{held['usage_id']}/settle", {"input_tokens": 100}).json()
    assert settled["usage"]["billable_tokens"] == 150


# --- Usage after the fact -----------------------------------------------------------------------------------


def test_record_usage(service: Service, alice: User) -> None:
    response = service.post("/usage", used(alice, reasoning_tokens=100, duration_ms=900, project_id=3))
    assert response.status_code == 201
    item = response.json()["usage"]
    assert (item["status"], item["actual_tokens"], item["billable_tokens"]) == ("succeeded", 1_500, 2_250)
    assert (item["reserved_tokens"], item["duration_ms"], item["project_id"]) == (None, 900, 3)
    assert response.json()["account"]["balance_tokens"] == 7_750
    assert TokenUsage.objects.get().provider_cost_microusd == 350  # 1,000 × 0.10 + 500 × 0.50
    assert TokenTransaction.objects.get(type="usage").amount == -2_250


def test_record_usage_leaving_a_debt(service: Service, make_poor: MakePoor) -> None:
    """Law 4: what has been used is charged; the debt suspends the account until it is paid."""
    eve = make_poor(500)
    body = service.post("/usage", used(eve)).json()
    assert (body["account"]["balance_tokens"], body["account"]["status"]) == (-1_750, "suspended")
    problem = refused(service.post("/reservations", reservation(eve), key="key-2"), 403, "account_not_active")
    assert "below zero" in problem["detail"]
    ledger.add_tokens(user_id=eve.pk, tokens=2_000, type="bonus", description="Paid", idempotency_key="paid")
    assert service.get(f"/accounts/{eve.pk}/balance").json()["status"] == "active"


def test_failed_usage_costs_nothing(service: Service, alice: User) -> None:
    """Law 9: recorded, with what it cost us, and free for the user."""
    body = used(alice, success=False, error_message="The provider broke off.")
    first = service.post("/usage", body)
    assert first.status_code == 201
    item = first.json()["usage"]
    assert (item["status"], item["actual_tokens"], item["billable_tokens"]) == ("failed", 1_500, 0)
    assert item["completed_at"] is not None
    assert first.json()["account"]["balance_tokens"] == 10_000
    assert TokenUsage.objects.get().provider_cost_microusd == 350
    assert not TokenTransaction.objects.filter(type="usage").exists()

    again = service.post("/usage", body)
    assert (again.status_code, again.json()) == (200, first.json())
    refused(service.post("/usage", used(alice)), 409, "idempotency_conflict")


def test_retired_model_is_recorded_after_the_fact(service: Service, alice: User) -> None:
    """The work has been done, at the price that the catalogue still has."""
    body = {
        "user_id": alice.pk,
        "operation_type": "image",
        **RETIRED,
        "image_count": 1,
        "image_size": "1024x1024",
    }
    item = service.post("/usage", body).json()["usage"]
    assert (item["billable_tokens"], item["charge_type"]) == (6_000, "fixed")
    refused(service.post("/usage", used(alice, model="gpt-0"), key="key-2"), 422, "unknown_model")


@pytest.mark.parametrize("success", [True, False])
def test_usage_of_a_model_by_another_name(service: Service, alice: User, success: bool) -> None:
    """Row 119: the row has the catalogue's name, a retry by either name is the same request, a guess is refused."""
    body = used(alice, model="openai/gpt-6-luna-2026-09-01", success=success)
    first = service.post("/usage", body)
    row = TokenUsage.objects.get()
    assert (row.model, row.provider_cost_microusd, row.billable_tokens) == ("gpt-6-luna", 350, 2_250 if success else 0)
    for name in (body["model"], "gpt-6-luna", "gpt-6-luna-latest"):
        again = service.post("/usage", body | {"model": name})
        assert (again.status_code, again.json()) == (200, first.json()), name
    refused(service.post("/usage", body | {"model": "gpt-6.1-sol"}), 409, "idempotency_conflict")
    held = service.post("/reservations", reservation(alice, model="gpt-6-luna-2026-09-01"), key="key-2")
    assert TokenUsage.objects.get(pk=held.json()["usage"]["usage_id"]).model == "gpt-6-luna"
    refused(service.post("/usage", used(alice, model="azure/gpt-6-luna"), key="key-3"), 422, "unknown_model")
    assert TokenUsage.objects.count() == 2


def test_usage_of_a_model_without_a_price_is_refused(service: Service, alice: User) -> None:
    """Row 117."""
    ModelPrice.objects.filter(model="gpt-6-luna").update(is_active=False, input_usd_per_million=0)
    before = everything()
    refused(service.post("/usage", used(alice)), 422, "unpriced_model")
    refused(service.post("/reservations", reservation(alice)), 422, "unpriced_model")
    assert everything() == before


def test_free_image_is_recorded(service: Service, alice: User, susan: User) -> None:
    system_settings.update_system_settings(changes={"dalle3_cost_tokens": 0}, changed_by_id=susan.pk)
    body = {"user_id": alice.pk, "operation_type": "image", **RETIRED, "image_count": 1}
    response = service.post("/usage", body)
    assert response.status_code == 201
    assert (response.json()["usage"]["status"], response.json()["usage"]["billable_tokens"]) == (
        "succeeded",
        0,
    )


@pytest.mark.parametrize(
    "fields",
    [
        {"input_tokens": 0, "output_tokens": 0},
        {"image_count": 1},
        {**IMAGES, "image_count": 0},
        {"error_message": "But it succeeded."},
    ],
)
def test_usage_that_contradicts_itself(service: Service, alice: User, fields: dict[str, Any]) -> None:
    before = everything()
    refused(service.post("/usage", used(alice, **fields)), 400, "invalid_usage")
    assert everything() == before


# --- Idempotency --------------------------------------------------------------------------------------------


def test_reservation_once_per_key(service: Service, alice: User, bob: User) -> None:
    """Row 55: same body, same result; other body, 409; other user, apart."""
    first = service.post("/reservations", reservation(alice))
    again = service.post("/reservations", reservation(alice))
    assert (first.status_code, again.status_code) == (201, 200)
    assert first.json() == again.json()
    before = everything()
    for other in ({"max_output_tokens": 601}, {"metadata": {"a": 1}}, {"operation_type": "prompt"}):
        refused(service.post("/reservations", reservation(alice, **other)), 409, "idempotency_conflict")
    refused(service.post("/usage", used(alice)), 409, "idempotency_conflict")
    assert everything() == before
    others = service.post("/reservations", reservation(bob))
    assert others.status_code == 201
    assert others.json()["usage"]["usage_id"] != first.json()["usage"]["usage_id"]
    assert others.json()["account"]["user_id"] == bob.pk


@pytest.mark.parametrize("work", ["text", "image"])
def test_retry_after_the_model_was_retired(service: Service, make_user: Callable[..., User], work: str) -> None:
    """Rows 55 and 58: the first outcome stands, also when the model is no longer sold, or is gone, or the price is."""
    eve = make_user("eve", tokens=7_000)
    images = {"operation_type": "image", "image_count": 1, "image_size": "1024x1024"}
    body = reservation(eve) if work == "text" else {"user_id": eve.pk, **IMAGES, **images}
    first = service.post("/reservations", body)
    assert first.status_code == 201
    models = ModelPrice.objects.filter(provider=body["provider"], model=body["model"])
    before = everything()
    for change in (lambda: models.update(is_active=False), models.delete):
        change()
        again = service.post("/reservations", body)
        assert (again.status_code, again.json()) == (200, first.json())
        refused(service.post("/reservations", body | {"metadata": {"a": 1}}), 409, "idempotency_conflict")
        assert service.post("/reservations", body, key="another").status_code == 422
    assert everything() == before


def test_usage_once_per_key(service: Service, alice: User, bob: User, susan: User) -> None:
    """Row 55, and a retry after a change of price is still the same request, of a vanished model even."""
    body = used(alice, metadata={"flag": True})
    first = service.post("/usage", body)
    system_settings.update_system_settings(changes={"token_multiplier": Decimal(3)}, changed_by_id=susan.pk)
    ModelPrice.objects.filter(model="gpt-6-luna").delete()
    again = service.post("/usage", body)
    assert (first.status_code, again.status_code) == (201, 200)
    assert first.json() == again.json()
    before = everything()
    others: list[dict[str, Any]] = [
        {"input_tokens": 1_001},
        {"metadata": {"flag": 1}},
        {"metadata": {}},
        {"duration_ms": 1},
        {"success": False},
        {"chat_id": 1},
    ]
    # Also by rows without this fingerprint: 0.1 kept one of what was charged, and who was anonymised has none.
    for fingerprint in ("0" * 64, "", TokenUsage.objects.get().request_fingerprint):
        TokenUsage.objects.update(request_fingerprint=fingerprint)
        for other in others:
            refused(service.post("/usage", body | other), 409, "idempotency_conflict")
        assert service.post("/usage", body).json() == first.json()
    assert everything() == before
    bobs = service.post("/usage", used(bob, model="gpt-6.1-sol"))
    assert bobs.status_code == 201
    assert bobs.json()["account"] == {
        "account_id": TokenAccount.objects.get(user=bob).pk,
        "user_id": bob.pk,
        "balance_tokens": 5_500,
        "reserved_tokens": 0,
        "available_tokens": 5_500,
        "status": "active",
    }


@pytest.mark.parametrize("success", [True, False])
def test_usage_of_one_key_from_many_servers(transactional_db: None, alice: User, success: bool) -> None:
    """Row 55 under a race: one row, one debit, and everybody gets the same outcome."""
    body = used(alice, success=success)

    def post(_: int) -> tuple[int, Any]:
        try:
            response = Service().post("/usage", body)
            return response.status_code, response.json()["usage"]["usage_id"]
        finally:
            connection.close()

    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(post, range(24)))
    assert sorted(status for status, _ in answers) == [200] * 23 + [201]
    assert len({usage_id for _, usage_id in answers}) == 1
    assert TokenUsage.objects.count() == 1
    assert TokenTransaction.objects.filter(type="usage").count() == int(success)


@pytest.mark.parametrize("path", ["/reservations", "/usage"])
def test_idempotency_key_of_a_wrong_kind(service: Service, alice: User, path: str) -> None:
    body = used(alice) if path == "/usage" else reservation(alice)
    before = everything()
    for key in (None, "", " ", "k" * 201, "kéy", "a\tb", "a\x00b", "a\x7f", "Schlüssel", "\udcff"):
        problem = refused(service.post(path, body, key=key), 400, "invalid_request")
        assert problem["errors"][0]["field"].lower() == "idempotency-key"
    assert everything() == before


def test_longest_idempotency_key(service: Service, alice: User) -> None:
    assert service.post("/usage", used(alice), key="k " * 99 + "kk").status_code == 201


# --- What may be sent ---------------------------------------------------------------------------------------

NOT_NUMBERS: list[Any] = [-1, True, False, 1.5, 1.0, "1", "１２", 2**63, 2**200, None, [], {}, [1]]
RAW_NUMBERS = [
    "NaN",
    "Infinity",
    "-Infinity",
    "1e400",
    "-1e400",
    "1e3",
    "9" * 5_000,
    "0x10",
    "01",
    "１２",
    "1_000",
]
BAD_TEXTS: list[Any] = ["a\x00b", "\x00", "\ud800", "a\udfffb", 1, True, None, [], {}, ["a"]]


@dataclass(frozen=True)
class Target:
    """A call that would succeed as it stands."""

    name: str
    path: str
    body: dict[str, Any]


@pytest.fixture
def target(request: pytest.FixtureRequest, service: Service, alice: User) -> Target:
    hold = service.post("/reservations", reservation(alice), key="hold").json()["usage"]["usage_id"]
    path, body = {
        "quote": ("/quotes", {"user_id": alice.pk, **LUNA, "input_tokens": 1, "max_output_tokens": 1}),
        "reserve": ("/reservations", reservation(alice)),
        "usage": ("/usage", used(alice)),
        "settle": (f"/reservations/{hold}/settle", {"input_tokens": 1, "output_tokens": 1}),
        "release": (f"/reservations/{hold}/release", {"error_message": "It failed."}),
    }[request.param]
    return Target(request.param, path, body)


NUMBERS = {
    "quote": ["user_id", "input_tokens", "max_output_tokens", "image_count"],
    "reserve": ["user_id", "tokens", "input_tokens", "max_output_tokens", "image_count", "lifetime_seconds",
                "project_id", "content_id", "chat_id"],
    "usage": ["user_id", "input_tokens", "cached_input_tokens", "cache_write_tokens", "output_tokens",
              "reasoning_tokens", "image_count", "duration_ms", "project_id", "content_id", "chat_id"],
    "settle": ["input_tokens", "cached_input_tokens", "cache_write_tokens", "output_tokens",
               "reasoning_tokens", "duration_ms"],
    "release": ["duration_ms"],
}  # fmt: skip
MAY_BE_NULL = {"tokens", "lifetime_seconds", "project_id", "content_id", "chat_id", "duration_ms"}
MUST_BE_POSITIVE = {"user_id", "tokens", "lifetime_seconds", "project_id", "content_id", "chat_id"}
TEXTS = {
    "quote": ["provider", "model", "image_size", "image_quality"],
    "reserve": ["operation_type", "provider", "model", "image_size", "image_quality"],
    "usage": ["operation_type", "provider", "model", "image_size", "image_quality", "error_message"],
    "release": ["error_message"],
}


@pytest.mark.parametrize("target", NUMBERS, indirect=True)
def test_numbers_of_a_wrong_kind(service: Service, target: Target) -> None:
    """Row 56: each number of each call."""
    before = everything()
    for field in NUMBERS[target.name]:
        wrong = [value for value in NOT_NUMBERS if not (value is None and field in MAY_BE_NULL)]
        wrong += [0] if field in MUST_BE_POSITIVE else []
        for value in wrong:
            problem = refused(service.post(target.path, target.body | {field: value}), 400, "invalid_request")
            assert field in {error["field"] for error in problem["errors"]}, value
        for raw in RAW_NUMBERS:
            data = json.dumps(target.body | {field: "RAW"}).replace('"RAW"', raw).encode()
            response = service.post(target.path, data)
            assert response.status_code == 400, raw
            assert response["Content-Type"] == "application/problem+json"
    assert everything() == before


@pytest.mark.parametrize("target", TEXTS, indirect=True)
def test_texts_of_a_wrong_kind(service: Service, target: Target) -> None:
    """Row 57: each text of each call."""
    before = everything()
    for field in TEXTS[target.name]:
        for value in [*BAD_TEXTS, "x" * 100_000]:
            problem = refused(service.post(target.path, target.body | {field: value}), 400, "invalid_request")
            assert field in {error["field"] for error in problem["errors"]}, value
    assert everything() == before


BAD_METADATA: list[Any] = [
    [],
    "text",
    None,
    {"a": 1.5},
    {"a": 2**63},
    {"a": {"b": 1}},
    {"a": [1]},
    {"a": "\x00"},
    {"\x00": 1},
    {"a": "\ud800"},
    {"\ud800": 1},
    {"": 1},
    {"k" * 65: 1},
    {"a": "x" * 501},
    {str(number): number for number in range(51)},
]


@pytest.mark.parametrize("target", ["reserve", "usage"], indirect=True)
def test_metadata_of_a_wrong_kind(service: Service, target: Target) -> None:
    """Rows 56 and 57: flat, bounded, and nothing that PostgreSQL cannot keep."""
    before = everything()
    for metadata in BAD_METADATA:
        refused(service.post(target.path, target.body | {"metadata": metadata}), 400, "invalid_request")
    assert everything() == before


NO_OBJECTS = [
    b"[]",
    b"null",
    b"1",
    b'"text"',
    b"{",
    b"{}{}",
    b"\xff\xfe",
    b'{"model": "\xff"}',
    b'{"error_message": "\xed\xa0\x80"}',
    b"\xef\xbb\xbf{}",
    '{"user_id": 1}'.encode("utf-16"),
    b'{"metadata": ' + b"[" * 100_000,
    b'{"a": ' * 50_000 + b"1" + b"}" * 50_000,
    b"user_id=1&tokens=5",
    b"\x00",
]


@pytest.mark.parametrize("target", NUMBERS, indirect=True)
def test_body_that_is_no_json_object(service: Service, target: Target) -> None:
    before = everything()
    for data in NO_OBJECTS:
        refused(service.post(target.path, data), 400, "invalid_json")
    assert everything() == before


@pytest.mark.parametrize("target", NUMBERS, indirect=True)
def test_unknown_field(service: Service, target: Target) -> None:
    """A misspelled count is an error, not a zero; and the answer to a thousand of them stays short."""
    before = everything()
    problem = refused(service.post(target.path, target.body | {"ouput_tokens": 5}), 400, "invalid_request")
    assert problem["errors"][0]["field"] == "ouput_tokens"
    many = {f"field-{number}": number for number in range(1_000)}
    problem = refused(service.post(target.path, target.body | many), 400, "invalid_request")
    assert len(problem["errors"]) == 20
    assert everything() == before


@pytest.mark.parametrize("target", ["quote", "reserve", "usage"], indirect=True)
def test_empty_body(service: Service, target: Target) -> None:
    refused(service.post(target.path, b""), 400, "invalid_request")
    problem = refused(service.post(target.path, {}), 400, "invalid_request")
    assert {"user_id", "provider", "model"} <= {error["field"] for error in problem["errors"]}


@pytest.mark.parametrize("target", NUMBERS, indirect=True)
def test_body_too_large(service: Service, settings: Settings, target: Target) -> None:
    """413, not Django's 400 and not a 500."""
    before = everything()
    refused(service.post(target.path, b" " * (settings.DATA_UPLOAD_MAX_MEMORY_SIZE + 1)), 413, "body_too_large")
    assert everything() == before


def test_hold_of_nothing(service: Service, alice: User) -> None:
    """Row 56: 0 where a positive number is needed."""
    before = everything()
    nothing = {"input_tokens": 0, "max_output_tokens": 0}
    refused(service.post("/reservations", reservation(alice, **nothing)), 400, "invalid_usage")
    refused(service.post("/quotes", {"user_id": alice.pk, **LUNA}), 400, "invalid_usage")
    refused(service.post("/reservations", reservation(alice, tokens=5)), 400, "invalid_request")  # both ways
    refused(service.post("/usage", used(alice, reasoning_tokens=501)), 400, "invalid_request")
    assert everything() == before


def test_largest_numbers(service: Service, alice: User, susan: User) -> None:
    """Row 56: the most that every bound lets through is refused or booked, never a 500."""
    changes = {"token_multiplier": Decimal("9999.9999"), "dalle3_cost_tokens": 2**63 - 1}
    system_settings.update_system_settings(changes=changes, changed_by_id=susan.pk)
    most = dict.fromkeys(("input_tokens", "cached_input_tokens", "cache_write_tokens", "output_tokens"), 10**9)
    refused(
        service.post("/reservations", reservation(alice, input_tokens=10**9, max_output_tokens=10**9)),
        402,
        "insufficient_tokens",
    )
    held = service.post("/reservations", reservation(alice, input_tokens=0, max_output_tokens=0, tokens=100), key="h")
    settled = service.post(f"/reservations/{held.json()['usage']['usage_id']}/settle", most)
    assert settled.json()["usage"]["billable_tokens"] == 100
    images = {"user_id": alice.pk, "operation_type": "image", **RETIRED, "image_count": 1_000}
    refused(service.post("/usage", images, key="i"), 400, "invalid_amount")
    assert service.post("/usage", used(alice, **most), key="u").json()["account"]["status"] == "suspended"


# --- The list -----------------------------------------------------------------------------------------------


def test_usage_list_pages(service: Service, alice: User, bob: User) -> None:
    """Newest first, every row once, and nobody else's."""
    for number in range(5):
        service.post("/usage", used(alice, success=number != 2), key=f"key-{number}")
    service.post("/usage", used(bob), key="bob")
    expected = list(TokenUsage.objects.filter(user=alice).order_by("-id").values_list("pk", flat=True))
    seen: list[int] = []
    cursor: dict[str, int] = {}
    for _ in range(3):
        page = service.get(f"/accounts/{alice.pk}/usage", limit=2, **cursor).json()
        seen += [item["usage_id"] for item in page["items"]]
        cursor = {"cursor": page["next_cursor"]}
    assert seen == expected
    assert page["next_cursor"] is None
    failed = service.get(f"/accounts/{alice.pk}/usage", status="failed", operation_type="chat").json()
    assert [item["usage_id"] for item in failed["items"]] == [expected[2]]


def test_usage_list_shows_rows_of_one_moment_once(service: Service, alice: User) -> None:
    for number in range(4):
        service.post("/usage", used(alice), key=f"key-{number}")
    TokenUsage.objects.update(created_at="2026-01-01T00:00:00Z")
    first = service.get(f"/accounts/{alice.pk}/usage", limit=2).json()
    second = service.get(f"/accounts/{alice.pk}/usage", limit=2, cursor=first["next_cursor"]).json()
    assert len({item["usage_id"] for item in first["items"] + second["items"]}) == 4


def test_cursor_of_another_user(service: Service, alice: User, bob: User) -> None:
    """Row 63: another user's operation opens no page."""
    other = service.post("/usage", used(bob)).json()["usage"]["usage_id"]
    refused(service.get(f"/accounts/{alice.pk}/usage", cursor=other), 400, "unknown_cursor")


def test_page_of_a_wrong_kind(service: Service, alice: User) -> None:
    """Row 56."""
    numbers = ["0", "-1", "1.5", "true", "NaN", "1e400", "１２", str(2**63), "", "1\x00", "9" * 6_000]
    words = ["", "nothing", "a\x00"]
    wrong = {"cursor": numbers, "limit": [*numbers, "101"], "status": words, "operation_type": words}
    for name, values in wrong.items():
        for value in values:
            refused(service.get(f"/accounts/{alice.pk}/usage", **{name: value}), 400, "invalid_request")


# --- The documents ------------------------------------------------------------------------------------------


def test_openapi_document(client: Client, db: None) -> None:
    """What it says of each call; tests/api/test_contract.py holds the calls to it."""
    document = client.get("/api/v1/openapi.json").json()
    assert set(document["paths"]) == {
        "/api/v1/accounts/{user_id}/balance",
        "/api/v1/accounts/{user_id}/usage",
        "/api/v1/token-accounts/{account_id}/balance",
        "/api/v1/token-accounts/{account_id}/usage",
        "/api/v1/quotes",
        "/api/v1/reservations",
        "/api/v1/reservations/{usage_id}/settle",
        "/api/v1/reservations/{usage_id}/release",
        "/api/v1/usage",
        "/api/v1/me/balance",
        "/api/v1/me/transactions",
        "/api/v1/me/usage",
        "/api/v1/me/packages",
    }
    for path, methods in document["paths"].items():
        for operation in methods.values():
            scheme = "PersonalKey" if path.startswith("/api/v1/me/") else "BillingSecret"
            assert operation["security"] == [{scheme: []}]
            assert document["components"]["securitySchemes"][scheme]["description"]
            for status in ("401", "429", "503"):
                answer = operation["responses"][status]
                assert set(answer["content"]) == {"application/problem+json"}
                assert "RateLimit-Remaining" in answer["headers"]


def test_docs_page_is_served_by_ourselves(client: Client, db: None) -> None:
    """No script of another host, and none in the page: the policy would not run it."""
    response = client.get("/api/docs")
    page = response.content.decode()
    assert response.status_code == 200
    assert "default-src 'self'" in response["Content-Security-Policy"]
    assert "http://" not in page
    assert "https://" not in page
    assert page.count("<script") == page.count("<script src=") + page.count('<script type="application/json"')
    assert '"/api/v1/openapi.json"' in page
    for name in ("swagger-ui-bundle.js", "swagger-ui-init.js", "swagger-ui.css"):
        assert f"ninja/{name}" in page
        assert finders.find(f"ninja/{name}")
