"""Who gets in, and what ends with it: factors, guesses, proof of an address, keys, mails and what a browser keeps."""

import re
from io import StringIO
from typing import Any

import pytest
from allauth.account.models import EmailAddress
from allauth.mfa.models import Authenticator
from allauth.mfa.recovery_codes.internal.auth import RecoveryCodes
from allauth.mfa.totp.internal.auth import (
    TOTP,
    format_hotp_value,
    generate_totp_secret,
    hotp_value,
    yield_hotp_counters_from_time,
)
from django.conf import settings as django_settings
from django.contrib.auth import hashers
from django.core import mail
from django.core.management import call_command
from django.test import Client
from django.urls import reverse
from pytest_django.fixtures import Settings

from accounts import access, api_keys, roles
from accounts.models import ApiKey, AuditEntry, User
from billing import ledger
from billing.models import TokenTransaction
from tests.conftest import PASSWORD, MakeUser, prove_address, show_password

pytestmark = [pytest.mark.django_db, pytest.mark.usefixtures("fresh_limits")]

LOGIN, SIGN_UP, RESET = "account_login", "account_signup", "account_reset_password"
STRANGERS_PASSWORD = "what a stranger chose"  # noqa: S105 – of the tests alone
NEW_PASSWORD = "chosen by the owner 7"  # noqa: S105


def sign_in(
    user_or_email: User | str, password: str = PASSWORD, *, client: Client | None = None, ip: str = ""
) -> Client:
    client = client or Client()
    email = user_or_email.email if isinstance(user_or_email, User) else user_or_email
    extra: dict[str, Any] = {"REMOTE_ADDR": ip} if ip else {}
    client.post(reverse(LOGIN), {"login": email, "password": password}, **extra)
    return client


def is_in(client: Client) -> bool:
    return client.get(reverse("studio:home")).status_code == 200


def code_of(secret: str) -> str:
    return format_hotp_value(hotp_value(secret, next(yield_hotp_counters_from_time())))


def set_up_app(client: Client) -> str:
    """The client's person sets an authenticator app up, on the pages; returns its secret."""
    show_password(client)
    page = client.get(reverse("mfa_activate_totp"))
    secret = page.context["form"].secret
    assert client.post(reverse("mfa_activate_totp"), {"code": code_of(secret)}).status_code == 302
    return str(secret)


def links_in_mails() -> list[str]:
    """All that the mails lead to, newest last."""
    return re.findall(r"https?://\S+", "\n".join(str(each.body) for each in mail.outbox))


def follow(client: Client, link: str) -> Any:
    """Open a link that a mail leads to, and press its button."""
    path = "/" + link.split("/", 3)[3]
    client.get(path)
    return client.post(path, follow=True)


# --- Second factors -------------------------------------------------------------------------------------------------

ADMIN_PAGES = [
    "/admin/",
    "/admin/billing/purchase/",
    "/admin/tokens/",
    "/admin/tokens/audit/",
    "/admin/tokens/grants/new/",
]


def statuses(client: Client) -> set[int]:
    return {client.get(page).status_code for page in ADMIN_PAGES}


@pytest.mark.usefixtures("stopped_clock")
def test_the_session_itself_has_shown_the_factor(susan: User, settings: Settings) -> None:
    """That the account has one opens nothing; a code does, and a recovery code; a factor that is gone does not."""
    settings.ADMIN_MFA_REQUIRED = True
    prove_address(susan)
    without = sign_in(susan)
    assert without.get("/admin/tokens/", follow=True).redirect_chain[-1] == (reverse("mfa_index"), 302)
    secret = generate_totp_secret()
    TOTP.activate(susan, secret)  # past the pages: no session ends by it, and none has shown it
    assert statuses(without) == {302}
    leads_to = without.get("/admin/tokens/?page=2")["Location"]
    assert leads_to == f"{reverse('mfa_reauthenticate')}?next=%2Fadmin%2Ftokens%2F%3Fpage%3D2"
    # The password again is no second factor, neither here nor before the factor is switched off.
    show_password(without)
    assert statuses(without) == {302}
    assert without.post(reverse("mfa_deactivate_totp"))["Location"].startswith(reverse("mfa_reauthenticate"))
    assert without.post(leads_to, {"code": code_of(secret)})["Location"] == "/admin/tokens/?page=2"
    assert statuses(without) == {200}
    # A session that signed in with a recovery code, until these codes are gone.
    codes = RecoveryCodes.activate(susan)
    by_recovery = sign_in(susan)
    by_recovery.post(reverse("mfa_authenticate"), {"code": codes.get_unused_codes()[0]})
    assert statuses(by_recovery) == {200}
    codes.instance.delete()
    assert statuses(by_recovery) == {302}


@pytest.mark.django_db(transaction=True)
@pytest.mark.usefixtures("stopped_clock")
def test_setting_a_factor_up_ends_the_other_sessions(susan: User, settings: Settings) -> None:
    settings.ADMIN_MFA_REQUIRED = True
    prove_address(susan)
    stolen, unlisted, here = sign_in(susan), Client(), sign_in(susan)
    unlisted.force_login(susan)  # one that the list of sessions does not know
    set_up_app(here)
    assert (is_in(stolen), is_in(unlisted), is_in(here)) == (False, False, True)
    assert statuses(here) == {200}  # it showed a code to set it up
    assert "Authenticator App Activated" in [each.subject for each in mail.outbox]


# --- Guesses --------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("stopped_clock")
def test_nobody_locks_anybody_else_out(alice: User, bob: User) -> None:
    """Row 69: wrong passwords use up the attempts of who gave them."""
    for _ in range(6):
        sign_in(alice, "wrong horse", ip="203.0.113.1")
    assert not is_in(sign_in(alice, ip="203.0.113.1"))
    page = Client().post(reverse(LOGIN), {"login": alice.email, "password": PASSWORD}, REMOTE_ADDR="203.0.113.1")
    assert "Too many failed login attempts" in page.content.decode()
    assert is_in(sign_in(bob, ip="203.0.113.1"))  # another person, behind the same router
    hers = sign_in(alice, ip="198.51.100.7")
    assert is_in(hers)
    # A browser that she signed in with is let through also where the stranger is.
    hers.post(reverse("account_logout"))
    assert is_in(sign_in(alice, client=hers, ip="203.0.113.1"))
    # It does not help with another's account, nor for ever.
    hers.post(reverse("account_logout"))
    for _ in range(5):
        sign_in(bob, "wrong horse", ip="203.0.113.1")
    assert not is_in(sign_in(bob, client=hers, ip="203.0.113.1"))
    for _ in range(5):
        sign_in(alice, "wrong horse", client=hers, ip="203.0.113.1")
    assert not is_in(sign_in(alice, client=hers, ip="203.0.113.1"))


@pytest.mark.usefixtures("stopped_clock")
def test_guesses_from_everywhere_are_slowed(alice: User) -> None:
    """One attempt is left to each place, also to those of the same network in IPv6."""
    for number in range(20):
        sign_in(alice, "wrong horse", ip=f"203.0.113.{number}")
    sign_in(alice, "wrong horse", ip="2001:db8::1")
    assert not is_in(sign_in(alice, ip="2001:db8::2"))
    assert is_in(sign_in(alice, ip="198.51.100.7"))


@pytest.mark.usefixtures("stopped_clock")
def test_a_reset_gives_the_attempts_back(alice: User) -> None:
    prove_address(alice)
    for _ in range(6):
        sign_in(alice, "wrong horse")
    client = Client()
    client.post(reverse(RESET), {"email": alice.email})
    form = client.get("/" + links_in_mails()[0].split("/", 3)[3], follow=True).redirect_chain[-1][0]
    client.post(form, {"password1": NEW_PASSWORD, "password2": NEW_PASSWORD})
    assert is_in(sign_in(alice, NEW_PASSWORD))


@pytest.mark.usefixtures("stopped_clock")
def test_guessing_codes_is_limited(alice: User) -> None:
    """By place; from everywhere together, since codes are few; and not for who is known."""
    secret = generate_totp_secret()
    TOTP.activate(alice, secret)

    def try_code(client: Client, code: str, ip: str) -> None:
        sign_in(alice, client=client, ip=ip)
        client.post(reverse("mfa_authenticate"), {"code": code}, REMOTE_ADDR=ip)

    known = Client()
    try_code(known, code_of(secret), "198.51.100.7")
    assert is_in(known)
    known.post(reverse("account_logout"))
    for number in range(20):
        try_code(Client(), "000000", f"203.0.113.{number // 5}")
    Authenticator.objects.update(last_used_at=None)
    unknown = Client()
    try_code(unknown, RecoveryCodes.activate(alice).get_unused_codes()[0], "198.51.100.9")
    assert not is_in(unknown)
    try_code(known, Authenticator.objects.get(type="recovery_codes").wrap().get_unused_codes()[0], "203.0.113.1")
    assert is_in(known)


@pytest.mark.usefixtures("stopped_clock")
def test_mails_to_one_address_are_limited_and_nobody_is_refused(alice: User, settings: Settings) -> None:
    """By who asks, then by the address; for an unknown address the same. What is left out is left out silently: the
    mails that came do what it would have done."""
    settings.ACCOUNT_EMAIL_VERIFICATION = "mandatory"
    prove_address(alice)
    asks = {
        alice.email: (RESET, {"email": alice.email}),
        "nobody@example.com": (RESET, {"email": "nobody@example.com"}),
        "new@example.com": (SIGN_UP, {"email": "new@example.com", "password1": PASSWORD}),
    }
    for page, fields in asks.values():
        mail.outbox.clear()
        for ip, wanted in (("203.0.113.1", 5), ("198.51.100.7", 10)):
            codes = {Client().post(reverse(page), fields, REMOTE_ADDR=ip).status_code for _ in range(8)}
            assert (codes, len(mail.outbox)) == ({302}, wanted)
        for number in range(20):
            Client().post(reverse(page), fields, REMOTE_ADDR=f"192.0.2.{number}")
        assert len(mail.outbox) == 20


@pytest.mark.usefixtures("stopped_clock")
def test_mails_of_one_kind_keep_no_other_from_the_owner(alice: User, settings: Settings) -> None:
    """133: that somebody signs an address up sends its owner no link that opens the account."""
    settings.ACCOUNT_EMAIL_VERIFICATION = "mandatory"
    prove_address(alice)
    for number in range(25):
        Client().post(reverse(SIGN_UP), {"email": alice.email, "password1": PASSWORD}, REMOTE_ADDR=f"192.0.2.{number}")
    assert len(mail.outbox) == 20
    Client().post(reverse(RESET), {"email": alice.email}, REMOTE_ADDR="198.51.100.7")
    assert "/reset/key/" in links_in_mails()[-1]


# --- Proof of an address --------------------------------------------------------------------------------------------


@pytest.fixture
def mandatory(seeded: None, settings: Settings) -> None:
    settings.ACCOUNT_EMAIL_VERIFICATION = "mandatory"


def sign_up(password: str, *, email: str = "owner@example.com") -> Client:
    client = Client()
    assert client.post(reverse(SIGN_UP), {"email": email, "password1": password}).status_code == 302
    return client


def set_new_password(page: Any, client: Client) -> None:
    """On the page that a confirmation led to."""
    form = page.redirect_chain[-1][0]
    assert form.endswith("-set-password/"), page.redirect_chain
    client.post(form, {"password1": NEW_PASSWORD, "password2": NEW_PASSWORD})


@pytest.mark.usefixtures("mandatory")
@pytest.mark.parametrize("signs_up", [False, True])
def test_the_account_is_whose_the_address_is(signs_up: bool, django_capture_on_commit_callbacks: Any) -> None:
    """A stranger signs it up first. Whether or not the owner signs up as well, before or after the stranger tries
    again: no password but the one that the owner sets after the proof is worth anything."""
    with django_capture_on_commit_callbacks(execute=True):
        sign_up(STRANGERS_PASSWORD)
    owners = sign_up(PASSWORD) if signs_up else Client()
    sign_up(STRANGERS_PASSWORD)
    assert User.objects.count() == 1
    for link in reversed(links_in_mails()):
        with django_capture_on_commit_callbacks(execute=True):
            page = follow(owners, link) if "confirm-email" in link else None
        if page is not None:
            break
    for password in (STRANGERS_PASSWORD, PASSWORD):
        assert not is_in(sign_in("owner@example.com", password))
    set_new_password(page, owners)
    assert is_in(sign_in("owner@example.com", NEW_PASSWORD))
    user = User.objects.get()
    assert ledger.get_account(user_id=user.pk).balance == 10_000
    assert TokenTransaction.objects.count() == 1
    assert AuditEntry.objects.get(subject=user).actor is None
    # The link is used up, and is no way to another new password.
    assert "set-password" not in str(follow(Client(), links_in_mails()[0]).redirect_chain)


@pytest.mark.usefixtures("mandatory")
def test_who_signed_up_keeps_their_password() -> None:
    """In the browser that signed up, and in one that gave the same password later."""
    for email, client in (("one@example.com", None), ("two@example.com", Client())):
        mail.outbox.clear()
        first = sign_up(PASSWORD, email=email)
        client = client or first
        if client is not first:
            sign_in(email, client=client)
        page = follow(client, next(link for link in links_in_mails() if "confirm-email" in link))
        assert "set-password" not in str(page.redirect_chain)
        assert is_in(sign_in(email))


def test_what_a_stranger_set_ends_with_the_proof(seeded: None) -> None:
    """Where people get in unproven: sessions, keys, second factors and other addresses of before, too; a reset of a
    password that asks for an unproven address is such a proof."""
    strangers = sign_up(STRANGERS_PASSWORD)
    user = User.objects.get()
    assert is_in(strangers)
    _, token = api_keys.make_key(user_id=user.pk, name="Strange", scopes=["balance:read"])
    TOTP.activate(user, generate_totp_secret())
    EmailAddress.objects.create(user=user, email="stranger@example.com", verified=False)
    show_password_of_stranger = {"password": STRANGERS_PASSWORD}
    strangers.post(reverse("account_reauthenticate"), show_password_of_stranger)
    strangers.post(reverse("account_email"), {"email": "third@example.com", "action_add": ""})
    assert not EmailAddress.objects.filter(email="third@example.com").exists()

    mail.outbox.clear()
    owners = Client()
    owners.post(reverse(RESET), {"email": "owner@example.com"})
    set_new_password(follow(owners, links_in_mails()[0]), owners)
    assert not is_in(strangers)
    assert Client(headers={"Authorization": f"Bearer {token}"}).get("/api/v1/me/balance").status_code == 401
    assert not Authenticator.objects.exists()
    assert list(EmailAddress.objects.values_list("email", "verified")) == [("owner@example.com", True)]
    assert is_in(sign_in("owner@example.com", NEW_PASSWORD))


@pytest.mark.django_db(transaction=True)
def test_a_further_address_is_added_by_its_accounts_owner(alice: User) -> None:
    """Who gets the mail of a stranger's account and presses the button does not give their address away; and the first
    address is told of a second one."""
    prove_address(alice)
    hers = sign_in(alice)
    show_password(hers)
    hers.post(reverse("account_email"), {"email": "victim@example.com", "action_add": ""})
    link = next(each for each in links_in_mails() if "confirm-email" in each)
    page = follow(Client(), link)
    assert "set-password" not in str(page.redirect_chain)
    assert not EmailAddress.objects.get(email="victim@example.com").verified
    follow(hers, link)
    assert EmailAddress.objects.get(email="victim@example.com").verified
    assert (mail.outbox[-1].to, mail.outbox[-1].subject) == ([alice.email], "Another address was added to your account")


@pytest.mark.parametrize("owner_signs_up", [True, False])
def test_who_only_writes_an_address_down_stands_in_nobodys_way(
    owner_signs_up: bool, alice: User, settings: Settings
) -> None:
    """133: neither in an account's list nor at a sign-up; the other way round Alice is the owner."""
    settings.ACCOUNT_EMAIL_VERIFICATION = "mandatory"
    prove_address(alice)
    hers = sign_in(alice)

    def add() -> str:
        show_password(hers)
        hers.post(reverse("account_email"), {"email": "owner@example.com", "action_add": ""})
        return links_in_mails()[-1]

    if owner_signs_up:
        of_alice = add()
        mail.outbox.clear()
        Client().post(reverse(RESET), {"email": "owner@example.com"})
        assert not [link for link in links_in_mails() if "confirm-email" in link or "/reset/key/" in link]
        owner = sign_up(NEW_PASSWORD)
        Client().post(reverse(RESET), {"email": "owner@example.com"})  # each leads to the owner's account
        for link in [each for each in links_in_mails() if "confirm-email" in each]:
            follow(owner, link)
        follow(hers, of_alice)
    else:
        stranger = sign_up(STRANGERS_PASSWORD)
        follow(hers, add())
        show_password(hers)
        hers.post(reverse("account_email"), {"email": "owner@example.com", "action_primary": ""})
        assert not is_in(sign_in("owner@example.com", STRANGERS_PASSWORD, client=stranger))
        assert AuditEntry.objects.filter(subject__email__endswith=".invalid").count() == 1
    assert is_in(sign_in("owner@example.com", NEW_PASSWORD if owner_signs_up else PASSWORD))
    proven = EmailAddress.objects.get(email="owner@example.com", verified=True)
    alice.refresh_from_db()
    assert (proven.user == alice, alice.email == proven.email) == (not owner_signs_up, not owner_signs_up)


@pytest.mark.parametrize(
    ("asks", "has_factor", "ticked", "left"),
    [
        ("alice", False, ["evil"], ["alice", "hers"]),  # also when it was made the first
        ("alice", False, [], ["alice", "hers", "evil"]),
        ("evil", False, ["alice", "hers"], ["alice", "hers", "evil"]),  # a newer address outranks no older one
        ("alice", True, ["evil"], ["alice", "hers", "evil"]),  # nor a mailbox a second factor
    ],
)
def test_a_reset_names_what_else_opens_the_account(
    alice: User, settings: Settings, asks: str, has_factor: bool, ticked: list[str], left: list[str]
) -> None:
    """Row 138: the page and the notice tell of further addresses and second factors, and those addresses that were
    added after the one that the link went to can be removed with the new password."""
    settings.ACCOUNT_EMAIL_VERIFICATION = "mandatory"
    for name in ("alice", "hers", "evil"):
        EmailAddress.objects.create(user=alice, email=f"{name}@example.com", verified=True)
    EmailAddress.objects.get(email="evil@example.com").set_as_primary()
    if has_factor:
        Authenticator.objects.create(user=alice, type="totp", data={"secret": "x"})
    client, mail.outbox = Client(), []
    client.post(reverse(RESET), {"email": f"{asks}@example.com"})
    page = client.get("/" + links_in_mails()[-1].split("/", 3)[3], follow=True)
    words = page.content.decode()
    assert "evil@example.com" in words
    assert ("Authenticator" in words or "TOTP" in words) == has_factor
    form = {"password1": NEW_PASSWORD, "password2": NEW_PASSWORD, "end_keys": "on"}
    form["remove_addresses"] = [f"{name}@example.com" for name in ticked]  # type: ignore[assignment]
    client.post(page.redirect_chain[-1][0], form)
    names = [email.partition("@")[0] for email in EmailAddress.objects.order_by("pk").values_list("email", flat=True)]
    assert names == left
    alice.refresh_from_db()
    first = "evil@example.com" if "evil" in left else "alice@example.com"
    assert (alice.email, EmailAddress.objects.get(primary=True).email) == (first, first)
    if alice.check_password(NEW_PASSWORD):
        told = str(mail.outbox[-1].body)
        assert all(f"{name}@example.com" in told for name in left)
    else:
        assert asks == "evil"  # what nobody offered is refused


# --- Access that was taken ------------------------------------------------------------------------------------------


def test_what_was_taken_comes_back_with_nothing(
    alice: User, adam: User, susan: User, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Row 137: given again, on whichever road it was taken, no session goes on, nor a key of who was switched off.

    Nobody asks with the session or the key in between, which would end it by the way."""
    page = reverse("admin:accounts_user_change", args=[alice.pk])
    superadmin = Client()
    superadmin.force_login(susan)
    monkeypatch.setattr("getpass.getpass", lambda **_: "set on the server 7")

    def edit(**fields: str) -> None:
        assert superadmin.post(page, {"name": "Alice", "role": "user", "time_zone": "", **fields}).status_code == 302

    def save(**fields: Any) -> None:
        user = User.objects.get(pk=alice.pk)
        for name, value in fields.items():
            setattr(user, name, value)
        user.save()

    def edit_off_and_on() -> None:
        edit()
        edit(is_active="on")

    def save_off_and_on() -> None:
        save(is_active=False)
        save(is_active=True)

    def save_older_copy() -> None:
        older = User.objects.get(pk=alice.pk)
        access.end_sessions(User.objects.get(pk=alice.pk))
        older.save()

    quiet = StringIO()
    people, adams = User.objects.filter(pk=alice.pk), User.objects.filter(pk=adam.pk)
    roads: list[tuple[str, User, bool, Any]] = [
        ("in Django admin", alice, True, edit_off_and_on),
        ("in a shell", alice, True, lambda: (people.update(is_active=False), people.update(is_active=True))),
        ("by a row", alice, True, save_off_and_on),
        ("by an older copy of the row", alice, False, save_older_copy),
        ("a role", adam, False, lambda: (roles.change_role(user_id=adam.pk, role="user", changed_by=susan),)),
        ("a role, in a shell", adam, False, lambda: (adams.update(role="user"), adams.update(role="admin"))),
        (
            "a password, on the server",
            alice,
            True,
            lambda: call_command("changepassword", alice.email, stdout=quiet),
        ),
    ]
    for name, person, ends_keys, road in roads:
        User.objects.filter(pk=adam.pk).update(role="admin")
        session = Client()
        session.force_login(User.objects.get(pk=person.pk))
        _, token = api_keys.make_key(user_id=person.pk, name=name, scopes=["balance:read"])
        assert is_in(session), name
        road()
        assert not is_in(session), name
        assert (api_keys.find_live_key(token) is None) == ends_keys, name


# --- Keys -----------------------------------------------------------------------------------------------------------

KEY = {"name": "Laptop", "scopes": ["balance:read"], "valid_days": "90"}


def test_a_stolen_session_makes_no_key(alice: User) -> None:
    """Who signed in some time ago shows the password again, then the key is made, and its owner is told."""
    prove_address(alice)
    stolen = Client()
    stolen.force_login(alice)
    page = reverse("api-keys")
    assert stolen.get(page).status_code == 200
    asked = stolen.post(page, KEY)
    assert (asked.status_code, asked["Location"]) == (
        302,
        f"{reverse('account_reauthenticate')}?next=%2Faccounts%2Fapi-keys%2F",
    )
    assert stolen.post(asked["Location"], {"password": "wrong horse"}).status_code == 200
    assert not ApiKey.objects.exists()
    assert mail.outbox == []
    made = stolen.post(asked["Location"], {"password": PASSWORD, "next": page})
    key = ApiKey.objects.get()
    assert key.token_start in made.content.decode()
    (told,) = mail.outbox
    assert (told.to, "Laptop" in told.body, key.token_start in told.body) == ([alice.email], True, True)
    # With a second factor the password is not enough.
    secret = generate_totp_secret()
    TOTP.activate(alice, secret)
    other = Client()
    other.force_login(alice)
    assert other.post(page, KEY)["Location"].startswith(reverse("mfa_reauthenticate"))


@pytest.mark.parametrize("ends", [True, False])
def test_a_new_password_ends_the_keys_if_wanted(alice: User, ends: bool) -> None:
    """Changed by who knows the old one, and reset by mail: then all sessions are over in any case."""
    prove_address(alice)
    choice = {"end_keys": "on"} if ends else {}
    for number in range(2):
        _, token = api_keys.make_key(user_id=alice.pk, name="Laptop", scopes=["balance:read"])
        new, session = f"{NEW_PASSWORD}{number}", sign_in(alice, PASSWORD if number == 0 else f"{NEW_PASSWORD}0")
        elsewhere = sign_in(alice, PASSWORD if number == 0 else f"{NEW_PASSWORD}0")
        fields = {"password1": new, "password2": new, **choice}
        if number == 0:
            page = session.get(reverse("account_change_password"))
            assert page.context["form"]["end_keys"].initial is True
            session.post(reverse("account_change_password"), fields | {"oldpassword": PASSWORD})
        else:
            Client().post(reverse(RESET), {"email": alice.email})
            link = next(each for each in reversed(links_in_mails()) if "/password/reset/key/" in each)
            stranger = Client()
            form = stranger.get("/" + link.split("/", 3)[3], follow=True).redirect_chain[-1][0]
            stranger.post(form, fields)
        key = Client(headers={"Authorization": f"Bearer {token}"})
        assert key.get("/api/v1/me/balance").status_code == (401 if ends else 200)
        assert not is_in(elsewhere)
        assert is_in(session) == (number == 0)
        assert is_in(sign_in(alice, new))


# --- What a stranger can tell, and where mails lead -----------------------------------------------------------------


def test_sign_up_hashes_a_password_for_every_address(
    seeded: None, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What takes the time is done for an address that has an account, too, and leaves nothing behind."""
    settings.ACCOUNT_EMAIL_VERIFICATION = "mandatory"
    hashed: list[str] = []
    encode = hashers.Argon2PasswordHasher.encode

    def count(hasher: Any, password: str, salt: str) -> str:
        hashed.append(password)
        return encode(hasher, password, salt)

    monkeypatch.setattr(hashers.Argon2PasswordHasher, "encode", count)
    counts = []
    for email in ("new@example.com", "new@example.com", "other@example.com"):
        hashed.clear()
        sign_up(PASSWORD, email=email)
        counts.append(len(hashed))
    assert counts == [1, 1, 1]
    assert User.objects.count() == 2


@pytest.mark.usefixtures("stopped_clock")
def test_mails_lead_to_our_own_address(alice: User, settings: Settings) -> None:
    """Whatever host and port the request named: in every mail that the pages send."""
    settings.ALLOWED_HOSTS = ["shop.test"]
    settings.ACCOUNT_EMAIL_VERIFICATION = "mandatory"
    prove_address(alice)
    forged = {"Host": "shop.test:6666"}
    for email in ("new@example.com", alice.email):
        Client(headers=forged).post(reverse(SIGN_UP), {"email": email, "password1": PASSWORD})
    for email in ("nobody@example.com", "new@example.com", alice.email):
        Client(headers=forged).post(reverse(RESET), {"email": email})
    client = Client(headers=forged)
    sign_in(alice, client=client)
    show_password(client)
    client.post(reverse("account_email"), {"email": "second@example.com", "action_add": ""})
    assert len(mail.outbox) == 6
    for each in mail.outbox:
        assert "6666" not in str(each.message())
        assert "shop.test" not in str(each.message())
    links = links_in_mails()
    assert len(links) >= 6
    assert all(link.startswith(f"{django_settings.SITE_URL}/") for link in links)


def test_a_mail_server_that_is_away_undoes_nothing(alice: User, settings: Settings) -> None:
    """The notice is lost, and logged; what it tells of was done."""
    prove_address(alice)
    client = sign_in(alice)
    settings.EMAIL_BACKEND = "django.core.mail.backends.smtp.EmailBackend"
    settings.EMAIL_HOST, settings.EMAIL_PORT = "127.0.0.1", 9
    fields = {"oldpassword": PASSWORD, "password1": NEW_PASSWORD, "password2": NEW_PASSWORD}
    assert client.post(reverse("account_change_password"), fields).status_code == 302


def test_no_browser_keeps_what_was_shown_to_somebody(alice: User, client: Client, make_user: MakeUser) -> None:
    """After signing out, Back shows nothing: pages, parts of pages, downloads, refusals, and what a key reads."""
    client.force_login(alice)
    _, token = api_keys.make_key(user_id=alice.pk, name="Laptop", scopes=["balance:read"])
    paths = [
        *("/studio/", "/studio/chats/", "/tokens/", "/tokens/balance/", "/tokens/export.csv", "/accounts/email/"),
        *("/accounts/settings/", "/tokens/history/", "/nothing/", "/admin/tokens/", "/studio/content/999/", "/"),
    ]
    for path in paths:
        assert "no-store" in client.get(path).get("Cache-Control", ""), path
    answer = Client(headers={"Authorization": f"Bearer {token}"}).get("/api/v1/me/balance")
    assert (answer.status_code, "no-store" in answer["Cache-Control"]) == (200, True)
    assert "no-store" in sign_in(alice).post(reverse("account_logout"))["Cache-Control"]
    assert "no-store" not in Client().get("/").get("Cache-Control", "")
