"""Users, roles, workspaces, and the pages that let people in."""

import re
from typing import Any

import pytest
from django.contrib.auth.hashers import make_password
from django.core import mail
from django.core.cache import cache
from django.core.management import call_command
from django.db import IntegrityError, transaction
from django.test import Client
from django.urls import reverse
from pytest_django.fixtures import Settings

from accounts.models import User, Workspace
from billing import ledger
from billing.models import TokenAccount, TokenTransaction
from tests.conftest import PASSWORD, prove_address

pytestmark = [pytest.mark.django_db, pytest.mark.usefixtures("fresh_limits")]


@pytest.fixture
def run_on_commit(django_capture_on_commit_callbacks: Any) -> Any:
    """A context at whose end the things to do after a commit are done."""
    return lambda: django_capture_on_commit_callbacks(execute=True)


def sign_up(client: Client, email: str = "nora@example.com", **fields: str) -> Any:
    return client.post(reverse("account_signup"), {"email": email, "password1": PASSWORD} | fields)


def link_in(body: object) -> str:
    """The path of the link in a mail."""
    found = re.search(r"https?://[^/\s]+(/\S+)", str(body))
    assert found
    return found[1]


# --- Roles and workspaces -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("role", "is_admin", "is_superadmin"),
    [("user", False, False), ("admin", True, False), ("superadmin", True, True)],
)
def test_rights_follow_from_the_role(role: str, is_admin: bool, is_superadmin: bool) -> None:
    user = User.objects.create_user("nora@example.com", PASSWORD, role=role)
    assert (user.is_admin, user.is_superadmin) == (is_admin, is_superadmin)
    assert user.is_staff == user.has_perm("billing.change_tokenpricing") == is_superadmin
    assert user.has_module_perms("billing") == is_superadmin
    user.is_active = False
    assert not user.has_perm("billing.change_tokenpricing")


def test_unknown_role_is_refused_by_the_database() -> None:
    with pytest.raises(IntegrityError), transaction.atomic():
        User.objects.create_user("nora@example.com", PASSWORD, role="owner")


def test_superuser_is_a_superadmin() -> None:
    assert User.objects.create_superuser("nora@example.com", PASSWORD).is_superadmin


def test_an_address_has_no_capitals_whoever_writes_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Row 139: who was made on the server signs in, resets and is found, in any case; nobody signs up beside them."""
    monkeypatch.setenv("DJANGO_SUPERUSER_PASSWORD", PASSWORD)
    call_command("createsuperuser", email="Boss@Firm.Example", interactive=False, verbosity=0)
    User.objects.create_user("CARL@firm.example", PASSWORD)
    User(email="Dora@Firm.Example", password=make_password(PASSWORD)).save()
    bulk = User.objects.create_user("ed@firm.example", PASSWORD)
    User.objects.filter(pk=bulk.pk).update(email="ED@Firm.example")
    for name in ("boss", "carl", "dora", "ed"):
        address = f"{name}@firm.example"
        for spelled in (address, address.upper()):
            cache.clear()
            client, mail.outbox = Client(), []
            client.post(reverse("account_login"), {"login": spelled, "password": PASSWORD})
            assert "_auth_user_id" in client.session, spelled
            Client().post(reverse("account_reset_password"), {"email": spelled})
            assert mail.outbox[-1].to == [address], spelled
            assert User.objects.get(email=spelled).email == address
        Client().post(reverse("account_signup"), {"email": address, "password1": "another long one 33"})
        assert User.objects.filter(email__iexact=address).count() == 1


def test_workspace_is_made_with_the_user() -> None:
    user = User.objects.create_user("nora@example.com", PASSWORD)
    assert Workspace.objects.get(owner=user).name == "nora's workspace"
    user.name = "Nora"
    user.save()
    assert Workspace.objects.filter(owner=user).count() == 1


def test_address_is_unique_in_any_case() -> None:
    User.objects.create_user("nora@example.com", PASSWORD)
    with pytest.raises(IntegrityError), transaction.atomic():
        User.objects.create_user("NORA@example.com", PASSWORD)
    assert User.objects.get_by_natural_key("Nora@Example.com").email == "nora@example.com"


# --- Signing up -----------------------------------------------------------------------------------------------------


def test_sign_up_opens_everything(client: Client, seeded: None, run_on_commit: Any) -> None:
    with run_on_commit():
        response = sign_up(client)
    assert response.status_code == 302
    assert response["Location"] == reverse("studio:home")
    user = User.objects.get()
    assert Workspace.objects.get().owner == user
    assert TokenAccount.objects.get(user=user).balance == 10_000
    assert client.get(reverse("studio:home")).status_code == 200


def test_sign_up_twice_gives_one_bonus(client: Client, seeded: None, run_on_commit: Any) -> None:
    """Row 61: the same address in another case is the same person, who is told so by mail."""
    with run_on_commit():
        sign_up(client)
    with run_on_commit():
        sign_up(Client(), "NORA@example.com")
    assert User.objects.count() == TokenAccount.objects.count() == TokenTransaction.objects.count() == 1


def test_role_cannot_be_forged(client: Client, seeded: None, run_on_commit: Any) -> None:
    """Row 64: what a browser adds to the form is not read."""
    with run_on_commit():
        sign_up(client, role="superadmin", is_staff="on", is_superuser="on", is_active="")
    user = User.objects.get()
    assert (user.role, user.is_staff, user.is_active) == ("user", False, True)
    assert client.get(reverse("admin:index")).status_code == 302


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("email", ""),
        ("email", "nora"),
        ("email", "nora\x00@example.com"),
        ("email", "nora@example.com, bob@example.com"),
        ("email", f"nora@{'example.' * 31}com"),
        ("password1", ""),
        ("password1", "short"),
        ("password1", "password"),
        ("password1", "nora@example.com"),
        ("password1", "correct\x00horse battery"),
    ],
)
def test_wrong_sign_up_writes_nothing(client: Client, name: str, value: str) -> None:
    """Rows 56 and 57: an error at the field."""
    response = sign_up(client, **{name: value})
    assert response.status_code == 200
    assert list(response.context["form"].errors) == [name]
    assert not User.objects.exists()


def test_bonus_waits_for_the_verified_address(
    client: Client, seeded: None, settings: Settings, run_on_commit: Any
) -> None:
    """Where verification is required, the link brings the bonus, and following it again brings nothing."""
    settings.ACCOUNT_EMAIL_VERIFICATION = "mandatory"
    with run_on_commit():
        response = sign_up(client)
    assert response["Location"] == reverse("account_email_verification_sent")
    user = User.objects.get()
    assert not user.proven_addresses
    assert ledger.get_account(user_id=user.pk).balance == 0
    assert client.get(reverse("studio:home")).status_code == 302

    (message,) = mail.outbox
    assert message.to == [user.email]
    link = link_in(message.body)
    assert client.get(link).status_code == 200
    assert ledger.get_account(user_id=user.pk).balance == 0  # looking at it is not following it
    for _ in range(2):
        with run_on_commit():
            client.post(link)
    assert user.proven_addresses == {user.email}
    assert ledger.get_account(user_id=user.pk).balance == 10_000
    assert TokenTransaction.objects.count() == 1


# --- Signing in and out ---------------------------------------------------------------------------------------------


def sign_in(client: Client, email: str, password: str = PASSWORD, **fields: str) -> Any:
    return client.post(reverse("account_login"), {"login": email, "password": password} | fields)


def test_sign_in_by_address_in_any_case(client: Client, alice: User) -> None:
    assert sign_in(client, "Alice@Example.com")["Location"] == reverse("studio:home")


@pytest.mark.parametrize(
    ("email", "password"), [("alice@example.com", "wrong horse"), ("nobody@example.com", PASSWORD)]
)
def test_wrong_sign_in_says_the_same(client: Client, alice: User, email: str, password: str) -> None:
    response = sign_in(client, email, password)
    assert response.status_code == 200
    assert "The email address and/or password you specified are not correct." in response.content.decode()
    assert "_auth_user_id" not in client.session


def test_session_key_rotates(client: Client, alice: User) -> None:
    """Row 69: a session from before the sign-in is worth nothing after it."""
    session = client.session
    session["planted"] = True
    session.save()
    before = session.session_key
    sign_in(client, alice.email)
    assert client.session.session_key != before


@pytest.mark.parametrize("address", ["https://evil.example/", "//evil.example/", "javascript:alert(1)"])
def test_sign_in_leads_to_no_other_host(client: Client, alice: User, address: str) -> None:
    """Row 68."""
    assert sign_in(client, alice.email, next=address)["Location"] == reverse("studio:home")


def test_sign_out_is_posted(client: Client, alice: User) -> None:
    client.force_login(alice)
    client.get(reverse("account_logout"))
    assert "_auth_user_id" in client.session
    client.post(reverse("account_logout"))
    assert "_auth_user_id" not in client.session


def test_password_reset(client: Client, alice: User) -> None:
    prove_address(alice)
    response = client.post(reverse("account_reset_password"), {"email": alice.email}, follow=True)
    assert response.status_code == 200
    (message,) = mail.outbox
    page = client.get(link_in(message.body), follow=True)
    new_password = f"{PASSWORD}, another"
    action = page.redirect_chain[-1][0]
    response = client.post(action, {"password1": new_password, "password2": new_password}, follow=True)
    assert response.status_code == 200
    assert sign_in(Client(), alice.email).status_code == 200  # the old one is gone
    assert sign_in(Client(), alice.email, new_password).status_code == 302
    assert client.get(link_in(message.body), follow=True).context["token_fail"]  # the link works once


def test_password_reset_of_a_stranger_tells_nothing(client: Client, alice: User) -> None:
    known = client.post(reverse("account_reset_password"), {"email": alice.email})
    unknown = client.post(reverse("account_reset_password"), {"email": "nobody@example.com"})
    assert (known.status_code, known["Location"]) == (unknown.status_code, unknown["Location"])


def test_authenticator_can_be_set_up(client: Client, seeded: None, run_on_commit: Any, settings: Settings) -> None:
    """The page opens for somebody whose address is verified, with a code to scan that is no other host's picture."""
    settings.ACCOUNT_EMAIL_VERIFICATION = "mandatory"
    with run_on_commit():
        sign_up(client)
    with run_on_commit():
        client.post(link_in(mail.outbox[0].body))
    sign_in(client, "nora@example.com")
    # It asks for the password once more, then leads on.
    ask_again = client.get(reverse("mfa_activate_totp"))["Location"]
    page = client.post(ask_again, {"password": PASSWORD}, follow=True)
    assert page.request["PATH_INFO"] == reverse("mfa_activate_totp")
    assert page.status_code == 200
    assert b'src="data:image/svg+xml' in page.content
    assert client.get(reverse("mfa_index")).status_code == 200


# --- Who may open what ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["/tokens/balance/", "/tokens/notifications/bell/"])
def test_signed_out_header_asks_in_vain(client: Client, path: str) -> None:
    """What the header polls is not redirected: the sign-in page would be put into it."""
    assert client.get(path).status_code == 401


def test_signed_out_live_channel_is_told_to_stop(client: Client, db: None) -> None:
    """A page asks again and again, but not after this event."""
    assert client.get("/live/balance/").content.startswith(b"event: closed\n")


@pytest.mark.parametrize(
    "path",
    [
        "/studio/",
        "/studio/content/1/",
        "/tokens/",
        "/tokens/success/1/",
        "/tokens/cancelled/1/",
        "/accounts/email/",
        "/accounts/password/change/",
        "/accounts/2fa/",
    ],
)
def test_signed_out_people_are_sent_to_sign_in(client: Client, path: str) -> None:
    response = client.get(path)
    assert response.status_code == 302
    assert response["Location"].startswith(f"{reverse('account_login')}?next=/")


@pytest.mark.parametrize("path", ["/studio/quote/draft/", "/tokens/checkout/", "/live/draft/"])
def test_signed_out_people_post_nothing(client: Client, path: str) -> None:
    response = client.post(path)
    assert response.status_code == 302
    assert response["Location"].startswith(reverse("account_login"))


@pytest.mark.parametrize(
    "path", ["/", "/accounts/login/", "/accounts/signup/", "/accounts/password/reset/", "/healthz"]
)
def test_everybody_may_open(client: Client, seeded: None, path: str) -> None:
    assert client.get(path).status_code == 200


def test_start_page_leads_on_to_the_studio(client: Client, alice: User) -> None:
    client.force_login(alice)
    assert client.get("/")["Location"] == reverse("studio:home")
