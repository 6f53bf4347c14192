"""What stands between a stranger and the product: secrets, sessions, headers, limits. docs/SECURITY.md names it.

Hostile forms, addresses and floods are in test_hostile_requests.py, roles in test_permissions.py.
"""

import json
import os
import runpy
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2
import pytest
from allauth.account.models import EmailAddress
from allauth.mfa.models import Authenticator
from allauth.mfa.totp.internal.auth import (
    TOTP,
    format_hotp_value,
    generate_totp_secret,
    hotp_value,
    yield_hotp_counters_from_time,
)
from allauth.usersessions.models import UserSession
from django.contrib import admin
from django.contrib.sessions.models import Session
from django.core.exceptions import ImproperlyConfigured
from django.http import HttpRequest
from django.test import Client
from django.urls import reverse
from pytest_django.fixtures import Settings

from accounts import api_keys
from accounts.models import ApiKey, AuditEntry, User
from billing.models import Purchase
from billing.payments import checkout
from tests.conftest import PASSWORD
from tests.environment import free_port
from tests.payments import checkout_form, sign
from tests.servers import PROJECT, Server, running_web
from tests.test_permissions import missing_headers

pytestmark = [pytest.mark.django_db, pytest.mark.usefixtures("fresh_limits")]


def sign_in(client: Client, user: User, password: str = PASSWORD) -> Any:
    return client.post(reverse("account_login"), {"login": user.email, "password": password})


def is_signed_in(client: Client) -> bool:
    return client.get(reverse("studio:home")).status_code == 200


# --- Secrets from files ---------------------------------------------------------------------------------------------

FROM_FILES = {
    "SECRET_KEY": ("SECRET_KEY", "marker-0"),
    "DATABASE_URL": ("DATABASE_URL", "postgresql://marker-1@db/postmate"),
    "REDIS_URL": ("REDIS_URL", "redis://marker-2"),
    "EMAIL_URL": ("EMAIL_URL", "smtp://marker-3"),
    "STRIPE_SECRET_KEY": ("STRIPE_SECRET_KEY", "marker-4"),
    "STRIPE_WEBHOOK_SECRET": ("STRIPE_WEBHOOK_SECRETS", ["marker-5", "marker-6"]),
    "BILLING_SECRET": ("BILLING_SECRETS", ["marker-7", "marker-8"]),
    "OPENAI_API_KEY": ("OPENAI_API_KEY", "marker-9"),
    "ANTHROPIC_API_KEY": ("ANTHROPIC_API_KEY", "marker-10"),
    "GOOGLE_API_KEY": ("GOOGLE_API_KEY", "marker-11"),
    "METRICS_TOKEN": ("METRICS_TOKENS", ["marker-12"]),
    "SENTRY_DSN": ("SENTRY_DSN", "https://marker-13@sentry.test/1"),
}


def test_every_secret_may_come_from_a_file(tmp_path: Path) -> None:
    environment = dict(os.environ)
    for name, (_, value) in FROM_FILES.items():
        file = tmp_path / name
        file.write_text((", ".join([*value, " "]) if isinstance(value, list) else str(value)) + "\n")
        environment |= {name: "", f"{name}_FILE": str(file)}  # empty, as an unused line of .env leaves it
    wanted = dict(FROM_FILES.values())
    program = (
        "import json, sys; from postmate import settings\n"
        "print(json.dumps({name: getattr(settings, name) for name in sys.argv[1:]}))"
    )
    answer = subprocess.run(
        [sys.executable, "-c", program, *wanted], cwd=PROJECT, env=environment, capture_output=True, check=True
    )
    assert json.loads(answer.stdout) == wanted


def read_settings() -> None:
    """As a process does that starts now."""
    runpy.run_path(str(PROJECT / "postmate" / "settings.py"))


@pytest.mark.parametrize("name", FROM_FILES)
@pytest.mark.parametrize(
    ("content", "words"),
    [
        pytest.param(None, "cannot be read", id="missing"),
        pytest.param("a directory", "cannot be read", id="directory"),
        pytest.param(b"marker-1\nmarker-2\n", "one line", id="two lines"),
        pytest.param(b"marker\xff", "not text", id="not text"),
    ],
)
def test_a_file_that_holds_no_secret_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, content: bytes | str | None, words: str
) -> None:
    """By its variable: neither what is in it nor where it is, for that may be the secret, put in the wrong place."""
    file = tmp_path / "marker-path"
    if isinstance(content, bytes):
        file.write_bytes(content)
    elif content:
        file.mkdir()
    monkeypatch.setenv(name, "")
    monkeypatch.setenv(f"{name}_FILE", str(file))
    with pytest.raises(ImproperlyConfigured, match=f"{name}_FILE.*{words}") as raised:
        read_settings()
    assert "marker" not in str(raised.value)


@pytest.mark.parametrize("content", ["", "\n"])
def test_an_empty_file_is_no_secret_and_production_asks_for_those_it_needs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: str
) -> None:
    (tmp_path / "file").write_text(content)
    for name in FROM_FILES:
        monkeypatch.setenv(name, "")
        monkeypatch.setenv(f"{name}_FILE", str(tmp_path / "file"))
    values = runpy.run_path(str(PROJECT / "postmate" / "settings.py"))
    assert (values["BILLING_SECRETS"], values["METRICS_TOKENS"], values["OPENAI_API_KEY"]) == ([], [], "")
    monkeypatch.setenv("DEBUG", "false")
    with pytest.raises(ImproperlyConfigured) as raised:
        read_settings()
    for needed in ("SECRET_KEY", "DATABASE_URL", "STRIPE_SECRET_KEY", "STRIPE_WEBHOOK_SECRET", "OPENAI_API_KEY"):
        assert needed in str(raised.value)


@pytest.mark.parametrize("name", FROM_FILES)
def test_a_secret_comes_from_one_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    (tmp_path / "file").write_text("marker-1")
    monkeypatch.setenv(name, "marker-2")
    monkeypatch.setenv(f"{name}_FILE", str(tmp_path / "file"))
    with pytest.raises(ImproperlyConfigured, match=f"Both {name} and {name}_FILE are set") as raised:
        read_settings()
    assert "marker" not in str(raised.value)


# --- A production process -------------------------------------------------------------------------------------------

OLD_SECRETS = {
    "SECRET_KEY": "old-key-Wk3Rz8TnQv5Lb2Xc7Jm4Hp9Gd6Fs1Ya0UeBtNoKiMlZxCvAs",
    "BILLING_SECRET": "old-billing-Vb6Nm3Kj8Hg5Fd2Sa9Qw7Er4",
    "STRIPE_WEBHOOK_SECRET": "whsec_old_Zx4Cv7Bn2Mk9Lj6Hg3Fd8",
}
NEW_SECRETS = {
    "SECRET_KEY": "new-key-Pq8Ws5Ed2Rf9Tg6Yh3Uj7Ik4Ol1ZaXsCdVfBgNhMjKlQwErTy",
    "BILLING_SECRET": "new-billing-Yt5Re8Wq2Lk6Jh9Gf3Ds7Az4",
    "STRIPE_WEBHOOK_SECRET": "whsec_new_Ui9Op3As6Df2Gh8Jk5Lz7",
}
HTTPS = {"X-Forwarded-Proto": "https", "X-Forwarded-For": "203.0.113.7"}  # what the proxy in front says


@contextmanager
def running_production(directory: Path, secrets: dict[str, str]) -> Iterator[tuple[Server, Path]]:
    """The product with production's settings and secrets from files, as behind a proxy; and the file it logs to.

    It serves static files as in development, since none are collected here, and /boom/, which fails. Balance streams
    are short.
    """
    directory.mkdir()
    (directory / "served_settings.py").write_text(
        "from postmate.settings import *\n"
        "ROOT_URLCONF = 'served_urls'\n"
        "STORAGES['staticfiles']['BACKEND'] = 'django.contrib.staticfiles.storage.StaticFilesStorage'\n"
    )
    (directory / "served_urls.py").write_text(
        "from django.conf import settings\n"
        "from postmate.urls import *\n"
        "billing.views.live.STREAM_SECONDS = billing.views.live.KEEP_ALIVE_SECONDS = 0.5\n"
        "def boom(request):\n"
        "    key, secrets = settings.SECRET_KEY, settings.BILLING_SECRETS\n"
        "    raise RuntimeError('This went wrong.')\n"
        "urlpatterns += [path('boom/', boom)]\n"
    )
    files: dict[str, str] = {}
    for name, value in secrets.items():
        (directory / name).write_text(f"{value}\n")
        files |= {name: "", f"{name}_FILE": str(directory / name)}
    log = directory / "log"
    with (
        log.open("w") as log_file,
        running_web(
            port=free_port(),
            log=log_file,
            PYTHONPATH=f"{directory}:{PROJECT}",
            DJANGO_SETTINGS_MODULE="served_settings",
            DEBUG="false",
            SITE_URL="https://tokens.postmate.test",
            EMAIL_URL=f"filemail:///{directory}/mails",
            **files,
        ) as server,
    ):
        yield server, log


@pytest.fixture(scope="module")
def _production(
    django_db_setup: None, django_db_blocker: Any, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Server, Path]]:
    both = {name: f"{new}, {OLD_SECRETS[name]}" for name, new in NEW_SECRETS.items()}
    with (
        django_db_blocker.unblock(),
        running_production(tmp_path_factory.mktemp("production") / "both", both) as running,
    ):
        yield running


@pytest.fixture
def production(transactional_db: None, _production: tuple[Server, Path]) -> Server:
    """In the middle of a rotation: each secret is a new one and an old one."""
    return _production[0]


@pytest.fixture
def production_log(request: pytest.FixtureRequest) -> Path:
    """What it has logged."""
    return request.getfixturevalue("_production")[1]


@pytest.fixture
def rotated(transactional_db: None, tmp_path: Path) -> Iterator[Server]:
    """After it: the new secrets alone."""
    with running_production(tmp_path / "rotated", NEW_SECRETS) as (server, _):
        yield server


def https(server: Server) -> str:
    return server.url.replace("http:", "https:")


def post_event(server: Server, secret: str) -> int:
    event = b'{"id": "evt_1", "object": "event", "type": "unknown", "livemode": false, "data": {"object": {}}}'
    headers = {**HTTPS, "Stripe-Signature": sign(event, secret=secret)}
    return server.post("/stripe/webhook/", content=event, headers=headers).status_code


def ask_api(server: Server, secret: str, user: User) -> int:
    headers = {**HTTPS, "Authorization": f"Bearer {secret}"}
    return server.get(f"/api/v1/accounts/{user.pk}/balance", headers=headers).status_code


def opens_studio(server: Server, session_key: str) -> bool:
    headers = {**HTTPS, "Cookie": f"sessionid={session_key}"}
    return server.get("/studio/", headers=headers).status_code == 200


def test_secrets_are_rotated_without_a_gap(
    production: Server, rotated: Server, alice: User, settings: Settings
) -> None:
    """Old and new ones open the door until the old ones are taken away; then these open nothing."""
    EmailAddress.objects.create(user=alice, email=alice.email, verified=True, primary=True)
    sessions = {}
    for name, key in (("old", OLD_SECRETS["SECRET_KEY"]), ("new", NEW_SECRETS["SECRET_KEY"])):
        settings.SECRET_KEY = key
        for server in (production, rotated):
            client = Client()
            client.force_login(alice)
            sessions[name, server.url] = str(client.session.session_key)

    for server, old_is_good in ((production, True), (rotated, False)):
        for name, secrets, is_good in (("new", NEW_SECRETS, True), ("old", OLD_SECRETS, old_is_good)):
            assert ask_api(server, secrets["BILLING_SECRET"], alice) == (200 if is_good else 401)
            assert post_event(server, secrets["STRIPE_WEBHOOK_SECRET"]) == (200 if is_good else 400)
            assert opens_studio(server, sessions[name, server.url]) == is_good
        assert ask_api(server, f"{NEW_SECRETS['BILLING_SECRET']}, {OLD_SECRETS['BILLING_SECRET']}", alice) == 401


def test_plain_http_is_led_to_https(production: Server) -> None:
    """The proxy says which it was; without its word nothing is secure."""
    for headers in ({}, {"X-Forwarded-Proto": "http"}):
        answer = production.get("/accounts/login/?next=/tokens/", headers=headers)
        assert answer.status_code == 301
        assert (
            answer.headers["Location"] == f"{production.url.replace('http:', 'https:')}/accounts/login/?next=/tokens/"
        )
    answer = production.get("/accounts/login/", headers=HTTPS)
    assert answer.status_code == 200
    assert answer.headers["Strict-Transport-Security"] == "max-age=31536000"
    assert production.get("/healthz").status_code == 200  # asked from beside it


def test_development_believes_no_proxy(client: Client) -> None:
    """There is none that would take the header off before it adds its own."""
    assert not client.get(reverse("account_login"), headers=HTTPS).wsgi_request.is_secure()


def test_cookies_in_production(production: Server, alice: User) -> None:
    EmailAddress.objects.create(user=alice, email=alice.email, verified=True, primary=True)
    page = production.get("/accounts/login/", headers=HTTPS)
    token = page.cookies["csrftoken"]
    answer = production.post(
        "/accounts/login/",
        data={"login": alice.email, "password": PASSWORD, "csrfmiddlewaretoken": token},
        headers={
            **HTTPS,
            "Cookie": f"csrftoken={token}",
            "Origin": https(production),
        },
    )
    assert answer.status_code == 302
    cookies = {line.partition("=")[0]: line for line in answer.headers.get_list("Set-Cookie")}
    assert {"sessionid", "csrftoken"} <= set(cookies)
    for line in cookies.values():
        assert "; Secure" in line
        assert "; SameSite=Lax" in line
        assert "; HttpOnly" in line
        assert "Domain=" not in line
    session_key = answer.cookies["sessionid"]
    assert opens_studio(production, session_key)
    # The session is of no use without HTTPS, where it is not even looked at.
    assert production.get("/studio/", headers={"Cookie": f"sessionid={session_key}"}).status_code == 301


def test_errors_show_no_secret(production: Server, production_log: Path, alice: User) -> None:
    """Neither to who asks nor in the log, which says what went wrong all the same."""
    answers = [
        production.get("/boom/", headers=HTTPS),
        production.get("/nothing/", headers=HTTPS),
        production.get("/", headers={**HTTPS, "Host": "evil.example"}),
        production.post("/accounts/login/", headers=HTTPS),
        production.get("/api/v1/nothing", headers=HTTPS),
    ]
    assert [answer.status_code for answer in answers] == [500, 404, 400, 403, 404]
    deadline = time.monotonic() + 60
    while "RuntimeError" not in production_log.read_text():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    shown = [*(answer.text + str(answer.headers) for answer in answers), production_log.read_text()]
    for text in shown:
        for secret in (*OLD_SECRETS.values(), *NEW_SECRETS.values(), "sk_test_tests", "sk-tests", "sk-ant-tests"):
            assert secret not in text
    for answer in answers:
        assert "Traceback" not in answer.text
        assert "went wrong." not in answer.text


def test_an_open_balance_stream_ends_with_its_session(production: Server, alice: User, settings: Settings) -> None:
    """It ends from time to time, and is not opened again for who was switched off or signed out meanwhile."""
    settings.SECRET_KEY = NEW_SECRETS["SECRET_KEY"]
    client = Client()
    client.force_login(alice)
    headers = {**HTTPS, "Cookie": f"sessionid={client.session.session_key}"}
    deadline = time.monotonic() + 30
    for _ in range(2):
        with httpx2.stream("GET", f"{production.url}/live/balance/", headers=headers, timeout=30) as stream:
            pieces = []
            for piece in stream.iter_text():
                assert time.monotonic() < deadline
                pieces.append(piece)
        assert "event: balance" in "".join(pieces)
    User.objects.filter(pk=alice.pk).update(is_active=False)
    assert "event: closed" in production.get("/live/balance/", headers=headers).text


# --- Headers --------------------------------------------------------------------------------------------------------


def test_streams_and_faults_have_the_headers(production: Server) -> None:
    """All else is asked for them in test_permissions.py."""
    paths = {"/live/balance/": 200, "/boom/": 500, "/nothing/": 404, "/healthz": 200, "/live/draft/": 302}
    for path, status in paths.items():
        answer = production.get(path, headers=HTTPS)
        assert answer.status_code == status
        assert not missing_headers(answer), path


# --- Passwords and sessions -----------------------------------------------------------------------------------------


def test_passwords_are_kept_as_argon2(client: Client, seeded: None) -> None:
    client.post(reverse("account_signup"), {"email": "nora@example.com", "password1": PASSWORD})
    assert User.objects.get().password.startswith("argon2$argon2id$")


def test_a_new_password_ends_all_other_sessions(alice: User) -> None:
    here, elsewhere = Client(), Client()
    for client in (here, elsewhere):
        sign_in(client, alice)
    before = here.session.session_key
    fields = {"oldpassword": PASSWORD, "password1": f"{PASSWORD} 2", "password2": f"{PASSWORD} 2"}
    assert here.post(reverse("account_change_password"), fields | {"oldpassword": "wrong"}).status_code == 200
    assert is_signed_in(elsewhere)
    assert here.post(reverse("account_change_password"), fields).status_code == 302
    assert is_signed_in(here)
    assert here.session.session_key != before
    assert not Session.objects.filter(session_key=before).exists()
    assert not is_signed_in(elsewhere)


def test_who_is_switched_off_is_out_at_once(alice: User, susan: User) -> None:
    """By a superadmin in Django admin: their sessions, their keys and their way back in."""
    theirs, superadmins = Client(), Client()
    sign_in(theirs, alice)
    _, token = api_keys.make_key(user_id=alice.pk, name="Laptop", scopes=["balance:read"])
    headers = {"Authorization": f"Bearer {token}"}
    assert is_signed_in(theirs)
    assert Client().get("/api/v1/me/balance", headers=headers).status_code == 200
    superadmins.force_login(susan)
    page = reverse("admin:accounts_user_change", args=[alice.pk])
    fields = {"email": alice.email, "name": alice.name, "role": "user", "time_zone": ""}
    assert superadmins.post(page, fields).status_code == 302
    assert not is_signed_in(theirs)
    assert Client().get("/api/v1/me/balance", headers=headers).status_code == 401
    again = Client()
    sign_in(again, alice)
    assert not is_signed_in(again)


@pytest.fixture
def totp_secret(alice: User) -> str:
    """Alice has an authenticator app."""
    secret = generate_totp_secret()
    TOTP.activate(alice, secret)
    return secret


@pytest.mark.usefixtures("stopped_clock")
def test_a_password_alone_is_half_of_two_factors(client: Client, alice: User, totp_secret: str) -> None:
    answer = sign_in(client, alice)
    assert answer["Location"] == reverse("mfa_authenticate")
    assert not is_signed_in(client)
    assert client.post(answer["Location"], {"code": "000000"}).status_code == 200
    assert not is_signed_in(client)
    code = format_hotp_value(hotp_value(totp_secret, next(yield_hotp_counters_from_time())))
    assert client.post(answer["Location"], {"code": code}).status_code == 302
    assert is_signed_in(client)
    # A code that somebody has looked at is worth nothing any more.
    second = Client()
    sign_in(second, alice)
    second.post(answer["Location"], {"code": code})
    assert not is_signed_in(second)


def test_a_stolen_session_takes_over_no_account(alice: User) -> None:
    """What decides who gets in asks for the password again, five minutes after it was last given."""
    EmailAddress.objects.create(user=alice, email=alice.email, verified=True, primary=True)
    stolen = Client()
    stolen.force_login(alice)  # no password was given in it
    attempts = {
        reverse("account_email"): {"email": "thief@example.com", "action_add": ""},
        reverse("mfa_activate_totp"): {"code": "000000"},
    }
    for page, fields in attempts.items():
        answer = stolen.post(page, fields)
        assert answer.status_code == 302, page
        assert answer["Location"].startswith(reverse("account_reauthenticate")), page
    fields = {"oldpassword": "guess", "password1": "new words here", "password2": "new words here"}
    assert stolen.post(reverse("account_change_password"), fields).status_code == 200
    assert not EmailAddress.objects.exclude(email=alice.email).exists()
    assert not Authenticator.objects.exists()
    alice.refresh_from_db()
    assert alice.check_password(PASSWORD)


# --- What Django admin shows ----------------------------------------------------------------------------------------


def test_django_admin_shows_nothing_that_opens_a_door(
    alice: User, susan: User, totp_secret: str, settings: Settings
) -> None:
    """To superadmins neither: no page of any table has a password, a session, a key or a secret in it."""
    _, token = api_keys.make_key(user_id=alice.pk, name="Laptop", scopes=["balance:read"])
    theirs, superadmins = Client(), Client()
    for client, person in ((theirs, alice), (superadmins, susan)):
        client.force_login(person)
        UserSession.objects.create(user=person, session_key=client.session.session_key, ip="203.0.113.7")
    hidden = [
        *(totp_secret, token, ApiKey.objects.get().token_hash, alice.password),
        *Session.objects.values_list("session_key", flat=True),
        *(*settings.BILLING_SECRETS, *settings.STRIPE_WEBHOOK_SECRETS),
        *(settings.STRIPE_SECRET_KEY, settings.OPENAI_API_KEY),
    ]
    pages = 0
    for model in admin.site._registry:
        name = f"admin:{model._meta.app_label}_{model._meta.model_name}"
        addresses = [reverse(f"{name}_changelist")]
        addresses += [reverse(f"{name}_change", args=[row.pk]) for row in model._default_manager.all()[:5]]
        for address in addresses:
            response = superadmins.get(address)
            assert response.status_code == 200, address
            shown = response.content.decode()
            assert not [each for each in hidden if each in shown], address
            pages += 1
    assert pages > 40


def test_django_admin_answers_no_questions_about_what_it_does_not_show(
    alice: User, susan: User, totp_secret: str
) -> None:
    """134: its lists filter by what they offer; what something begins with would tell a key letter by letter."""
    client = Client()
    client.force_login(susan)
    questions = {
        "accounts_user": "password__startswith=argon2",
        "mfa_authenticator": f"data__secret__startswith={totp_secret[:4]}",
        "usersessions_usersession": "session_key__gt=a",
        "ai_ops_contentpiece": "title__icontains=merger",
    }
    for table, question in questions.items():
        assert client.get(f"{reverse(f'admin:{table}_changelist')}?{question}").status_code == 400, table
    assert client.get(f"{reverse('admin:billing_purchase_changelist')}?state__exact=paid").status_code == 200
    assert client.get(f"{reverse('admin:billing_notification_changelist')}?email=waiting").status_code == 200
    assert client.get(f"{reverse('admin:billing_drift_changelist')}?resolved_at__isempty=1").status_code == 200
    for model, pages in admin.site._registry.items():
        offered = {each[0] if isinstance(each, tuple) else each for each in pages.list_filter} | {pages.date_hierarchy}
        for field in model._meta.concrete_fields:
            is_allowed = pages.lookup_allowed(f"{field.name}__gt", "a", HttpRequest())
            assert is_allowed == (field.name in offered), field


def test_a_lost_second_factor_is_removed_and_that_is_kept(alice: User, susan: User, totp_secret: str) -> None:
    superadmin = Client()
    superadmin.force_login(susan)
    authenticator = Authenticator.objects.get()
    change = reverse("admin:mfa_authenticator_change", args=[authenticator.pk])
    assert superadmin.post(change, {"data": "{}"}).status_code == 403
    remove = reverse("admin:mfa_authenticator_delete", args=[authenticator.pk])
    assert superadmin.post(remove, {"post": "yes"}).status_code == 302
    assert not Authenticator.objects.exists()
    entry = AuditEntry.objects.get(action="person_changed")
    assert (entry.actor, entry.subject) == (susan, alice)
    assert "second factor" in entry.summary


# --- Limits ---------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("stopped_clock")
def test_sign_ups_from_one_address_are_limited(seeded: None) -> None:
    """Whoever collects welcome bonuses needs an address for each few."""
    fields = {"email": "nora@example.com", "password1": "short"}
    codes = [Client().post(reverse("account_signup"), fields).status_code for _ in range(20)]
    assert codes == [200] * 20
    assert Client().post(reverse("account_signup"), fields | {"password1": PASSWORD}).status_code == 429
    assert not User.objects.exists()


def test_payment_pages_of_one_person_are_limited(
    buyer: Client, alice: User, stripe: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each is a call of Stripe's; a page that is open already is offered again for as long as it is."""
    monkeypatch.setattr(checkout, "CHECKOUTS_PER_HOUR", 3)
    for amount in ("10", "11", "12"):
        answer = buyer.post(reverse("tokens:checkout"), checkout_form(package_id="", amount=amount))
        assert answer["Location"].startswith("http"), answer.content
    refused = buyer.post(reverse("tokens:checkout"), checkout_form(), follow=True)
    assert "You opened very many payment pages." in refused.content.decode()
    assert Purchase.objects.count() == len(stripe.state()["sessions"]) == 3
    Purchase.objects.update(created_at="2026-01-01T00:00:00Z")
    assert buyer.post(reverse("tokens:checkout"), checkout_form())["Location"].startswith("http")


def test_what_development_writes_is_its_owners_alone(tmp_path: Path) -> None:
    """Also beside a database and a Redis of one's own, where no embedded server makes the directory first."""
    data = tmp_path / "data"
    code = (
        "import os; os.umask(0o022); os.environ['DJANGO_SETTINGS_MODULE'] = 'postmate.settings'; import django;"
        "django.setup(); from django.core.mail import send_mail;"
        "from django.core.files.storage import default_storage as store;"
        "from django.core.files.base import ContentFile;"
        "send_mail('A', 'reset', None, ['a@example.com']); store.save('a/b/c.png', ContentFile(b'c'))"
    )
    variables = {"DATABASE_URL": "postgresql:///none", "REDIS_URL": "redis://127.0.0.1:1/0"}
    environment = {"PATH": os.environ["PATH"], "DEBUG": "true", "POSTMATE_DATA_DIR": str(data), **variables}
    subprocess.run([sys.executable, "-c", code], cwd=PROJECT, env=environment, check=True)
    found = [data, *data.rglob("*")]
    assert {path.suffix for path in found if path.is_file()} == {".log", ".png"}
    assert [path for path in found if path.stat().st_mode & 0o077] == []
