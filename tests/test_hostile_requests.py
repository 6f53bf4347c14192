"""Floods, and addresses that would lead people away (rows 68 and 69)."""

from typing import Any

import pytest
from django.core.cache import cache
from django.test import Client
from django.urls import reverse
from pytest_django.fixtures import Settings

from accounts.models import User
from billing.models import StripeEvent
from tests.conftest import PASSWORD
from tests.payments import sign

pytestmark = [pytest.mark.django_db, pytest.mark.usefixtures("fresh_limits")]

ELSEWHERE = (
    "https://evil.example/",
    "//evil.example/",
    "/\\evil.example/",
    "https:evil.example",
    "javascript:alert(1)",
)


def event(number: int) -> bytes:
    return (
        b'{"id": "evt_%d", "object": "event", "type": "unknown.thing", "livemode": false, "data": {"object": {}}}'
        % (number)
    )


def deliver(client: Client, payload: bytes, signature: str) -> int:
    return client.post(
        reverse("stripe-webhook"), payload, content_type="application/json", headers={"Stripe-Signature": signature}
    ).status_code


@pytest.mark.usefixtures("stopped_clock")
def test_a_flood_locks_no_webhook_out(client: Client, settings: Settings) -> None:
    """Row 69: Stripe's events come from one address, and so may a flood of forged ones and of wrong calls."""
    settings.API_ANONYMOUS_CALLS_PER_MINUTE = 5
    for _ in range(20):
        client.get("/api/v1/me/balance")
    assert client.get("/api/v1/me/balance").status_code == 429
    for number in range(300):
        assert deliver(client, event(number), "t=1,v1=forged") == 400
    assert deliver(client, event(1), sign(event(1))) == 200
    assert StripeEvent.objects.count() == 1


@pytest.mark.parametrize("address", ELSEWHERE)
@pytest.mark.parametrize("page", ["account_login", "account_logout", "account_reauthenticate", "account_signup"])
def test_no_page_leads_to_another_host(alice: User, page: str, address: str) -> None:
    """Row 68: neither by the form nor by the address of the page."""
    client = Client()
    if page in ("account_logout", "account_reauthenticate"):
        client.force_login(alice)
    fields = {"login": alice.email, "password": PASSWORD, "email": "nora@example.com", "password1": PASSWORD}
    for query, extra in (({"next": address}, {}), ({}, {"next": address, "email": "noah@example.com"})):
        response = client.post(reverse(page, query=query), fields | extra)
        assert response.status_code == 302, response.content
        assert response["Location"].startswith("/")
        assert "evil" not in response["Location"]
        assert not response["Location"].startswith(("//", "/\\"))
        if page != "account_reauthenticate":
            client.logout()
        if page == "account_logout":
            client.force_login(alice)
        cache.clear()


@pytest.mark.parametrize("address", ELSEWHERE)
def test_who_is_signed_in_already_is_led_nowhere_else(client: Client, alice: User, address: str) -> None:
    """Row 68."""
    client.force_login(alice)
    for page in ("account_login", "account_signup"):
        location = client.get(reverse(page, query={"next": address}))["Location"]
        assert location.startswith("/")
        assert "evil" not in location


@pytest.mark.parametrize("host", ["evil.example", "testserver.evil.example", "testserver@evil.example"])
def test_another_host_is_no_host_of_ours(client: Client, alice: User, host: str) -> None:
    """Row 68: links that pages and mails build would lead there."""
    for page in ("account_login", "account_reset_password", "tokens:home"):
        response: Any = client.get(reverse(page), headers={"Host": host})
        assert response.status_code == 400


@pytest.mark.usefixtures("stopped_clock")
@pytest.mark.parametrize(
    "host",
    ["10.0.0.7:8000", "[2001:db8::7]", "postmate-web-1:8000", "evil.example", "evil.example@testserver", "a b", ""],
)
def test_what_machines_ask_for_answers_by_any_name_and_nothing_else_does(
    client: Client, settings: Settings, host: str
) -> None:
    settings.METRICS_TOKENS = ["token"]
    headers = {"Host": host, "Authorization": "Bearer token"}
    for path in ("/healthz", "/readyz", "/metrics"):
        response: Any = client.get(path, headers=headers)
        assert response.status_code == 200, path
        assert "evil" not in response.content.decode() + str(response.headers)
    assert client.get("/metrics", headers={"Host": host}).status_code == 404
    for path in ("/", "/healthz/", "/readyzz", "/accounts/login/", "/api/v1/openapi.json", "/live/balance/"):
        assert client.get(path, headers=headers).status_code == 400, path


def test_a_flood_of_sign_ins_is_slowed(alice: User) -> None:
    """Row 69: from one address, whoever they pretend to be."""
    codes = [
        Client().post(reverse("account_login"), {"login": f"nobody-{number}@example.com", "password": "x"}).status_code
        for number in range(40)
    ]
    assert codes[-1] == 429
