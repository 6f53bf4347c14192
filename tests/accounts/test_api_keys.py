"""The page where people make and revoke their API keys. Row numbers are FAULTS.md's."""

import html
import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import Any

import pytest
from django.db import IntegrityError, connection, transaction
from django.test import Client
from django.utils import timezone

from accounts import api_keys
from accounts.models import ApiKey, User
from tests.conftest import show_password

pytestmark = [pytest.mark.django_db, pytest.mark.usefixtures("fresh_limits")]

PAGE = "/accounts/api-keys/"
NEW = {"name": "My notebook", "scopes": ["balance:read", "usage:read"], "valid_days": "90"}


@pytest.fixture
def alices(client: Client, alice: User) -> Client:
    client.force_login(alice)
    show_password(client)
    return client


def shown_token(response: Any) -> str:
    found = re.search(r"<code[^>]*data-token>([^<]*)</code>", response.content.decode())
    assert found is not None
    return html.unescape(found[1])


def balance_status(token: str) -> int:
    return Client(headers={"authorization": f"Bearer {token}"}).get("/api/v1/me/balance").status_code


def test_key_is_shown_once_and_kept_as_a_hash(alices: Client, alice: User) -> None:
    response = alices.post(PAGE, NEW)
    assert response.status_code == 200
    assert "no-store" in response["Cache-Control"]
    token = shown_token(response)
    assert re.fullmatch(r"pm_[A-Za-z0-9_-]{43}", token)
    assert balance_status(token) == 200

    key = ApiKey.objects.get()
    assert (key.user, key.name, key.scopes) == (alice, "My notebook", ["balance:read", "usage:read"])
    assert key.expires_at is not None
    assert timedelta(days=89) < key.expires_at - timezone.now() <= timedelta(days=90)
    assert token not in str(ApiKey.objects.values().get())
    page = alices.get(PAGE).content.decode()
    assert token not in page
    assert key.token_hash not in page
    assert f"{token[:9]}…" in page
    assert "My notebook" in page


def test_two_keys_are_never_alike(alices: Client) -> None:
    tokens = {shown_token(alices.post(PAGE, NEW)) for _ in range(5)}
    assert len(tokens) == 5


@pytest.mark.parametrize(
    ("fields", "field", "message"),
    [
        ({"name": ""}, "name", "Give the key a name."),
        ({"name": "   "}, "name", "Give the key a name."),
        ({"name": "x" * 61}, "name", "at most 60 characters"),
        ({"name": "a\x00b"}, "name", "Null characters"),
        ({"scopes": []}, "scopes", "Choose at least one"),
        ({"scopes": ["balance:write"]}, "scopes", "not one of the available choices"),
        ({"scopes": ["balance:read", "*"]}, "scopes", "not one of the available choices"),
        ({"valid_days": "36500"}, "valid_days", "not one of the available choices"),
        ({"valid_days": ""}, "valid_days", "This field is required"),
        ({"valid_days": "-1"}, "valid_days", "not one of the available choices"),
    ],
)
def test_error_stands_at_its_field(alices: Client, fields: dict[str, Any], field: str, message: str) -> None:
    """Row 57 and forged choices: nothing is made, and the page says why, where."""
    response = alices.post(PAGE, NEW | fields)
    assert response.status_code == 400
    page = html.unescape(response.content.decode())
    error = page.partition(f'id="id_{field}_error"')[2].partition("</div>")[0]
    assert message in error
    assert not ApiKey.objects.exists()


def test_name_is_escaped(alices: Client) -> None:
    """Row 72."""
    response = alices.post(PAGE, NEW | {"name": "<script>alert(1)</script>"})
    assert "<script>alert(1)" not in response.content.decode()
    assert "&lt;script&gt;alert(1)" in response.content.decode()


def test_key_without_an_end(alices: Client) -> None:
    alices.post(PAGE, NEW | {"valid_days": "0"})
    assert ApiKey.objects.get().expires_at is None


def test_revoked_key_opens_nothing_and_stays_for_the_record(alices: Client) -> None:
    token = shown_token(alices.post(PAGE, NEW))
    key = ApiKey.objects.get()
    assert alices.get(f"{PAGE}{key.pk}/revoke/").status_code == 405
    assert balance_status(token) == 200
    response = alices.post(f"{PAGE}{key.pk}/revoke/", follow=True)
    assert "is revoked" in response.content.decode()
    assert balance_status(token) == 401
    revoked_at = ApiKey.objects.get().revoked_at
    assert revoked_at is not None
    alices.post(f"{PAGE}{key.pk}/revoke/")
    assert ApiKey.objects.get().revoked_at == revoked_at
    page = alices.get(PAGE).content.decode()
    assert "Keys of the past" in page
    assert "Keys in use" not in page


def test_keys_of_another(alices: Client, bob: User) -> None:
    """Row 63: not seen, not revoked."""
    key, token = api_keys.make_key(user_id=bob.pk, name="Bob's own", scopes=["balance:read"])
    assert key.token_start not in alices.get(PAGE).content.decode()
    for pk in (key.pk, key.pk + 1, 0, 2**63 - 1, 2**64):
        assert alices.post(f"{PAGE}{pk}/revoke/").status_code == 404
    assert balance_status(token) == 200


def test_not_signed_in(client: Client, alice: User) -> None:
    key, token = api_keys.make_key(user_id=alice.pk, name="Mine", scopes=["balance:read"])
    for response in (client.get(PAGE), client.post(PAGE, NEW), client.post(f"{PAGE}{key.pk}/revoke/")):
        assert response.status_code == 302
        assert response["Location"].startswith("/accounts/login/")
    assert ApiKey.objects.count() == 1
    assert balance_status(token) == 200


def test_forged_form(alice: User) -> None:
    """Row 62."""
    client = Client(enforce_csrf_checks=True)
    client.force_login(alice)
    key, token = api_keys.make_key(user_id=alice.pk, name="Mine", scopes=["balance:read"])
    assert client.post(PAGE, NEW).status_code == 403
    assert client.post(f"{PAGE}{key.pk}/revoke/").status_code == 403
    assert ApiKey.objects.count() == 1
    assert balance_status(token) == 200


def test_number_of_live_keys_is_bounded(alices: Client, alice: User) -> None:
    """Revoked and expired ones do not count."""
    keys = [
        api_keys.make_key(user_id=alice.pk, name=f"Key {n}", scopes=["balance:read"])[0]
        for n in range(api_keys.MAX_LIVE_KEYS)
    ]
    response = alices.post(PAGE, NEW)
    assert response.status_code == 400
    assert f"You have {api_keys.MAX_LIVE_KEYS} keys" in response.content.decode()
    api_keys.revoke_key(keys[0])
    assert alices.post(PAGE, NEW).status_code == 200
    assert alices.post(PAGE, NEW).status_code == 400
    ApiKey.objects.filter(pk=keys[1].pk).update(expires_at=timezone.now() - timedelta(seconds=1))
    assert alices.post(PAGE, NEW).status_code == 200


def test_bound_holds_in_a_race(transactional_db: None, alice: User) -> None:
    for n in range(api_keys.MAX_LIVE_KEYS - 1):
        api_keys.make_key(user_id=alice.pk, name=f"Key {n}", scopes=["balance:read"])

    def make(_: int) -> bool:
        try:
            api_keys.make_key(user_id=alice.pk, name="Last", scopes=["balance:read"])
        except api_keys.TooManyKeys:
            return False
        else:
            return True
        finally:
            connection.close()

    with ThreadPoolExecutor(8) as pool:
        assert sum(pool.map(make, range(8))) == 1
    assert ApiKey.objects.count() == api_keys.MAX_LIVE_KEYS


@pytest.mark.parametrize("scopes", [[], ["everything"], ["balance:read", "everything"]])
def test_database_knows_the_scopes(alice: User, scopes: list[str]) -> None:
    with pytest.raises(IntegrityError), transaction.atomic():
        api_keys.make_key(user_id=alice.pk, name="Forged", scopes=scopes)


def test_last_use_and_expiry_are_shown(alices: Client, alice: User) -> None:
    token = shown_token(alices.post(PAGE, NEW))
    assert "never used" in alices.get(PAGE).content.decode()
    assert balance_status(token) == 200
    page = alices.get(PAGE).content.decode()
    assert "last used" in page
    assert "valid until" in page
    ApiKey.objects.update(expires_at=timezone.now() - timedelta(seconds=1))
    assert "Expired" in alices.get(PAGE).content.decode()


def test_settings_lead_there(alices: Client) -> None:
    assert f'href="{PAGE}"' in alices.get("/accounts/email/").content.decode()


def test_django_admin_shows_no_hash_and_changes_nothing(client: Client, alice: User, susan: User) -> None:
    key, _ = api_keys.make_key(user_id=alice.pk, name="Mine", scopes=["balance:read"])
    client.force_login(susan)
    pages: dict[str, Callable[[], Any]] = {
        "list": lambda: client.get("/admin/accounts/apikey/"),
        "one": lambda: client.get(f"/admin/accounts/apikey/{key.pk}/change/"),
    }
    for page in pages.values():
        response = page()
        assert response.status_code == 200
        assert key.token_start in response.content.decode()
        assert key.token_hash not in response.content.decode()
    assert client.get("/admin/accounts/apikey/add/").status_code == 403
    assert client.post(f"/admin/accounts/apikey/{key.pk}/change/", {"name": "Hers"}).status_code == 403
    assert client.post(f"/admin/accounts/apikey/{key.pk}/delete/", {"post": "yes"}).status_code == 403
    assert ApiKey.objects.get().name == "Mine"
