"""What the processes write: the ids of what happened, and nothing that people wrote or that opens a door."""

import gzip
import json
import os
import re
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any
from uuid import uuid4

import httpx2
import pytest
from allauth.account.models import EmailAddress
from django.db import connection
from django.test import Client

from accounts import api_keys, audit
from accounts.models import AuditEntry, User
from billing import ledger
from billing.models import Purchase, TokenAccount, TokenUsage
from tests.ai_ops.studio import Writer, until
from tests.conftest import MakeUser
from tests.environment import free_port
from tests.payments import changed, checkout_form, event_of, sign
from tests.servers import PROJECT, Server, StripeStandIn, running_web, running_worker


class Secret:
    """Texts that must be in no log, one for each place where something could leak."""

    prompt = "marker-prompt-tiger"
    title = "marker-title-otter"
    password = "marker-password-heron"  # noqa: S105 – of the tests alone
    email = "marker-mail-badger"
    query = "marker-query-weasel"
    stripe = "marker-stripe-falcon"
    event = "marker-event-lynx"
    bearer = "marker-bearer-mole"


@dataclass(frozen=True)
class Log:
    """What processes printed so far."""

    path: Path

    @property
    def text(self) -> str:
        return self.path.read_text()

    def find(self, **fields: Any) -> list[dict[str, Any]]:
        # A worker that is told to stop says so in two lines of its own.
        # The last line may be half written.
        whole = [line.rstrip("\n") for line in self.text.splitlines(keepends=True) if line.endswith("\n")]
        lines = [json.loads(line) for line in whole if line and not line.startswith("worker: ")]
        return [line for line in lines if fields.items() <= line.items()]

    def one(self, **fields: Any) -> dict[str, Any]:
        """The line with these fields, as soon as it is there."""
        found = until(lambda: self.find(**fields))
        assert len(found) == 1, found
        return dict(found[0])


@pytest.fixture
def log(tmp_path: Path) -> Log:
    return Log(tmp_path / "log")


@contextmanager
def logging_web(log: Log, **environment: str) -> Iterator[Server]:
    with log.path.open("w") as file, running_web(port=free_port(), log=file, LOG_FORMAT="json", **environment) as web:
        yield web


@pytest.fixture
def web(transactional_db: None, log: Log) -> Iterator[Server]:
    """The product as a process of its own that logs as in production."""
    mails = log.path.with_name("mails")
    with logging_web(log, EMAIL_URL=f"filemail:///{mails}") as web:
        yield web


def post_form(session: httpx2.Client, path: str, **fields: str) -> httpx2.Response:
    page = session.get(path)
    return session.post(path, data={"csrfmiddlewaretoken": page.cookies.get("csrftoken", ""), **fields})


def test_ids_are_in_the_log_and_secrets_are_not(
    web: Server, log: Log, stripe: StripeStandIn, ai: Server, make_user: MakeUser, tmp_path: Path
) -> None:
    """Real operations with faults, each with a marker where something could leak."""
    alice = make_user(Secret.email, tokens=200_000)
    EmailAddress.objects.create(user=alice, email=alice.email, verified=True, primary=True)
    account = ledger.get_account(user_id=alice.pk)
    writer = Writer(alice, web)
    worker_log = Log(tmp_path / "worker")

    # A provider's 400 repeats the prompt; a draft succeeds.
    answer = writer.draft(title=Secret.title, topic=f"Tea. [[fault:{Secret.prompt}]]")
    assert answer.last.name == "failed"
    failed = TokenUsage.objects.get()
    answer = writer.draft(title=Secret.title, topic=Secret.prompt)
    assert answer.last.name == "done"

    # Signing in with the wrong password; a password's reset, whose link has a query string, too.
    guest = httpx2.Client(base_url=web.url, timeout=30)
    assert post_form(guest, "/accounts/login/", login=alice.email, password=Secret.password).status_code == 200
    assert post_form(guest, "/accounts/password/reset/", email=alice.email).status_code == 302
    [mail] = [path.read_text() for path in (tmp_path / "mails").iterdir()]
    link = re.search(r"/accounts/password/reset/key/([0-9a-z]+-[^/\s]+)/", mail)
    assert link
    assert guest.get(f"{link[0]}?next={Secret.query}").status_code == 302
    assert guest.get(f"/nothing/{Secret.query}/").status_code == 404

    # The API, with a key of somebody's and with a wrong secret.
    _, key = api_keys.make_key(user_id=alice.pk, name=Secret.title, scopes=["balance:read"])
    assert web.get("/api/v1/me/balance", headers={"Authorization": f"Bearer {key}"}).status_code == 200
    wrong = {"Authorization": f"Bearer {Secret.bearer}"}
    assert web.get(f"/api/v1/accounts/{alice.pk}/balance", headers=wrong).status_code == 401

    # Stripe does not know a customer and repeats what it was sent; a package is bought after a decline, and a worker
    # does what follows; an event cannot be handled.
    request_id = f"tests-{uuid4().hex}"
    accounts = TokenAccount.objects.filter(pk=account.pk)
    accounts.update(stripe_customer_id=Secret.stripe)
    writer.http.post("/tokens/checkout/", data=checkout_form("Pro"))
    other = Purchase.objects.get()
    page = writer.http.post("/tokens/checkout/", data=checkout_form())
    assert page.status_code == 302
    stripe.pay(page.headers["Location"], "4000000000000002")
    stripe.pay(page.headers["Location"])
    event = event_of(stripe, "checkout.session.completed")
    # The database's error quotes the row.
    Purchase.objects.filter(pk=other.pk).update(stripe_payment_intent_id=Secret.event)
    broken = changed(event, {"payment_intent": Secret.event})
    assert deliver(web, broken, uuid4().hex).status_code == 500
    with worker_log.path.open("w") as file, running_worker(log=file, LOG_FORMAT="json", LOG_LEVEL="DEBUG"):
        assert deliver(web, event, request_id).status_code == 200
        remembered = {"event": "task_succeeded", "task": "billing.tasks.remember_card", "request_id": request_id}
        until(lambda: worker_log.find(**remembered), seconds=30)
    bought = Purchase.objects.get(state="paid")

    # --- The ids are there ---
    ids = {"usage_id": failed.pk, "user_id": alice.pk}
    provider = log.one(event="An operation failed", **ids)
    assert (provider["error"], provider["error_status"]) == ("openai.BadRequestError", 400)
    assert provider["request_id"]
    charged = log.one(event="An operation ended", account_id=account.pk, user_id=alice.pk)
    assert charged["billed_tokens"] > 0
    assert log.one(event="Stripe refused an id of ours", purchase_id=other.pk)["error_request_id"]
    credited = log.one(event="A purchase was credited", purchase_id=bought.pk, account_id=account.pk)
    assert credited["request_id"] == request_id
    done = worker_log.one(event="task_succeeded", task="billing.tasks.remember_card", request_id=request_id)
    assert done["task_id"]
    assert done["duration_ms"] >= 0
    unhandled = log.one(event="An event was not handled", event_id=broken["id"])
    assert unhandled["error"] == "django.db.utils.IntegrityError"
    assert "billing/payments/webhooks.py" in unhandled["exception"]
    assert "psycopg.errors.UniqueViolation code=23505" in unhandled["exception"]
    service = log.one(event="request", route="api/v1/accounts/<user_id>/balance", status=401)
    assert service["route_ids"] == {"user_id": alice.pk}
    api = log.one(event="request", route="api/v1/me/balance", status=200)
    assert api["user_id"] == alice.pk
    reset = log.one(event="request", route=r"accounts/password/reset/key/(?P<uidb36>[0-9A-Za-z]+)-(?P<key>.+)/$")
    assert (reset["status"], reset["method"], reset["ip"]) == (302, "GET", "127.0.0.1")

    # --- What must not be there is not ---
    written = log.text + worker_log.text
    markers = [value for name, value in vars(Secret).items() if not name.startswith("_")]
    assert [marker for marker in (*markers, link[1], key, alice.email) if marker in written] == []
    # What asks for health every few seconds writes nothing.
    assert web.get("/healthz").status_code == 200
    assert log.find(route="healthz") == []


def deliver(web: Server, event: dict[str, Any], request_id: str) -> httpx2.Response:
    payload = json.dumps(event).encode()
    headers = {"Stripe-Signature": sign(payload), "Content-Type": "application/json", "X-Request-ID": request_id}
    return web.post("/stripe/webhook/", content=payload, headers=headers, timeout=30)


def test_all_lines_of_a_server_are_json_and_each_request_has_one(web: Server, log: Log, alice: User) -> None:
    """The server's own lines, too; a request is not written down a second time by the server."""
    assert web.get("/").status_code == 200
    line = log.one(route="", status=200)
    assert line["level"] == "info"
    assert line["duration_ms"] > 0
    session = Client()
    session.force_login(alice)
    refused = web.get("/admin/tokens/", cookies={"sessionid": session.cookies["sessionid"].value})
    assert refused.status_code == 403
    web.process.terminate()
    web.process.wait(60)
    events = [line["event"] for line in log.find()]
    assert events.count("request") == 2
    assert "A request failed" not in events


# --- The id of a request --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("named", ["", "short", "x" * 65, "with space inside", "marker\\nforged=1", "ünïcode-request"])
def test_an_ill_formed_request_id_is_replaced(client: Client, db: None, named: str) -> None:
    answer = client.get("/healthz", headers={"x-request-id": named})
    assert re.fullmatch("[0-9a-f]{32}", answer["X-Request-ID"])


def test_audit_entries_carry_the_id_of_the_log(client: Client, bob: User) -> None:
    client.force_login(bob)
    answer = client.get("/admin/tokens/", headers={"x-request-id": "from-the-proxy-1"})
    assert answer.status_code == 403
    assert answer["X-Request-ID"] == "from-the-proxy-1"
    entry = AuditEntry.objects.get(action=audit.Action.ACCESS)
    assert entry.request_id == "from-the-proxy-1"


# --- Sentry ---------------------------------------------------------------------------------------------------------


class _Receiver(BaseHTTPRequestHandler):
    """What Sentry's server does with an envelope, as far as a client sees."""

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.headers.get("Content-Encoding") == "gzip":
            body = gzip.decompress(body)
        envelopes: list[tuple[str, str]] = self.server.envelopes  # type: ignore[attr-defined]
        envelopes.append((self.path, body.decode()))
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b"{}")

    def log_message(self, *args: Any) -> None:
        pass


@pytest.fixture
def envelopes() -> Iterator[tuple[str, list[tuple[str, str]]]]:
    """The DSN of a receiver, and the path and body of each envelope that it was sent."""
    with HTTPServer(("127.0.0.1", 0), _Receiver) as server:
        server.envelopes = []  # type: ignore[attr-defined]
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://public@127.0.0.1:{server.server_port}/7", server.envelopes  # type: ignore[attr-defined]
        server.shutdown()


def test_sentry_hears_of_errors_without_what_people_wrote(
    transactional_db: None, log: Log, envelopes: tuple[str, list[tuple[str, str]]], make_user: MakeUser
) -> None:
    """Over the real protocol: an error that nobody caught, and one that was caught and logged."""
    dsn, received = envelopes
    alice = make_user(Secret.email)
    with logging_web(log, SENTRY_DSN=dsn, SENTRY_ENVIRONMENT="tests") as web:
        writer = Writer(alice, web)
        # A table is away: a view that reads it fails, and so does the handling of an event.
        with connection.cursor() as cursor:
            cursor.execute("ALTER TABLE billing_drift RENAME TO drift_away")
        try:
            User.objects.filter(pk=alice.pk).update(role="admin")
            headers = {"X-Request-ID": "sentry-request-1", "Cookie": f"sessionid={writer.http.cookies['sessionid']}"}
            answer = web.get(f"/admin/tokens/drifts/?q={Secret.query}", headers=headers)
            assert answer.status_code == 500
        finally:
            with connection.cursor() as cursor:
                cursor.execute("ALTER TABLE drift_away RENAME TO billing_drift")
        until(lambda: received, seconds=20)
    path, body = received[0]
    assert path == "/api/7/envelope/"
    _, item_header, item = body.splitlines()[:3]
    assert json.loads(item_header)["type"] == "event"
    event = json.loads(item)
    assert event["transaction"] == "admin/tokens/drifts/"
    assert event["environment"] == "tests"
    assert event["release"].startswith("postmate@")
    assert (event["tags"]["request_id"], event["tags"]["user_id"]) == ("sentry-request-1", str(alice.pk))
    error = event["exception"]["values"][-1]
    assert (error["type"], error["value"]) == ("ProgrammingError", "[withheld]")
    assert any(frame["function"] == "drifts" for frame in error["stacktrace"]["frames"])
    assert not any("vars" in frame for frame in error["stacktrace"]["frames"])
    assert len(received) == 1  # once, although it is logged as well
    everything = "".join(body for _, body in received)
    session_id = writer.http.cookies["sessionid"]
    secrets = [Secret.email, Secret.query, session_id, 'request": {', "breadcrumbs", socket.gethostname()]
    assert [each for each in secrets if each in everything] == []


def test_without_a_dsn_sentry_is_not_even_imported() -> None:
    code = "import django; django.setup(); import sys; print('sentry_sdk' in sys.modules)"
    environment = {**os.environ, "DJANGO_SETTINGS_MODULE": "postmate.settings", "SENTRY_DSN": ""}
    answer = subprocess.run([sys.executable, "-c", code], cwd=PROJECT, env=environment, capture_output=True, text=True)
    assert answer.stdout.strip() == "False", answer.stderr
