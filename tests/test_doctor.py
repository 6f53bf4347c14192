"""`manage.py doctor` on real parts: nothing to say when all is well, and the right line when one thing is broken."""

import json
import os
import socketserver
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from decimal import Decimal
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from django.core.management import CommandError, call_command
from django.db import connection
from django.db.migrations.recorder import MigrationRecorder
from django.db.models import F
from django.utils import timezone
from pytest_django.fixtures import Settings

from accounts.models import User
from billing import ledger
from billing.models import ModelPrice, StripeEvent, TokenAccount, TokenPricing, TokenUsage
from billing.payments import gateway
from kit import redis_client
from postmate.ops import doctor
from postmate.ops.doctor import database, processes
from postmate.web import metrics
from tests.environment import free_port
from tests.servers import PROJECT, Server, StripeStandIn, running_worker

pytestmark = pytest.mark.django_db(transaction=True)

Lines = dict[str, list[dict[str, str]]]


@pytest.fixture
def installation(
    settings: Settings, monkeypatch: pytest.MonkeyPatch, web: Server, ai: Server, stripe: StripeStandIn, susan: User
) -> Iterator[None]:
    """All that `make run` starts, but for the worker: nobody needs to wait for one where it is not asked for."""
    monkeypatch.setattr(processes, "WORKER_SECONDS", 0.1)
    settings.DEBUG = True  # tests run without it, and on stand-ins
    metrics.note_beat()
    gateway._client.cache_clear()
    yield
    gateway._client.cache_clear()


def examine(*arguments: str) -> tuple[Lines, int]:
    """The report's lines by their subject, and the exit code."""
    output = StringIO()
    exit_code = 0
    try:
        call_command("doctor", "--json", *arguments, stdout=output)
    except CommandError as error:
        exit_code = error.returncode
    return _lines(output.getvalue()), exit_code


def _lines(report: str) -> Lines:
    lines: Lines = {}
    for line in json.loads(report)["lines"]:
        lines.setdefault(line["subject"], []).append(line)
    return lines


def problems(lines: Lines) -> dict[str, dict[str, str]]:
    """The lines that tell of a problem, but for the worker, which runs in one test only."""
    found = {
        subject: line
        for subject, each in lines.items()
        for line in each
        if line["level"] == "problem" and subject != "Worker"
    }
    assert all(line["advice"] for line in found.values()), "A problem comes with what to do."
    return found


@pytest.mark.usefixtures("installation")
def test_a_healthy_installation_has_no_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    # They are sold as ending soon, and their replacements are named; in a while they will have ended.
    ending = ModelPrice.objects.filter(model__in=("gemini-2.5-pro", "gemini-2.5-flash"))
    assert ending.update(retired_on=timezone.now().date() + timedelta(days=9)) == 2
    with running_worker():
        monkeypatch.setattr(processes, "WORKER_SECONDS", 1)
        deadline = timezone.now() + timedelta(seconds=60)
        while next(processes.worker_lives()).level != "ok":
            assert timezone.now() < deadline
        monkeypatch.setattr(processes, "WORKER_SECONDS", 6)
        lines, exit_code = examine()
    assert (problems(lines), exit_code) == ({}, 0)
    assert lines["Worker"][0]["level"] == "ok"
    assert {line["level"] for each in lines.values() for line in each} <= {"ok", "warning"}, "Everything was looked at."
    assert "no violation" in lines["Books"][0]["message"]
    assert sum("Its replacement is" in line["message"] for line in lines["Models"]) == 2


def _wrong_stripe_key(settings: Settings, stripe: StripeStandIn) -> None:
    settings.STRIPE_SECRET_KEY = "sk_live_of_somebody_else"  # noqa: S105 – of nobody


def _redis_gone(settings: Settings, stripe: StripeStandIn) -> None:
    settings.REDIS_URL = "unix:///nowhere/redis.sock"


def _beat_silent(settings: Settings, stripe: StripeStandIn) -> None:
    redis_client.client().delete(metrics.BEAT_KEY)


def _site_down(settings: Settings, stripe: StripeStandIn) -> None:
    settings.DEBUG = False
    settings.REHEARSAL = True
    settings.SITE_URL = f"http://127.0.0.1:{free_port()}"


def _webhook_elsewhere(settings: Settings, stripe: StripeStandIn) -> None:
    stripe.control("webhook_endpoint", url="https://elsewhere.example.com/stripe/webhook/")


def _webhook_disabled(settings: Settings, stripe: StripeStandIn) -> None:
    stripe.control("webhook_endpoint", status="disabled")


def _webhook_without_disputes(settings: Settings, stripe: StripeStandIn) -> None:
    stripe.control("webhook_endpoint", enabled_events="checkout.session.completed,payment_intent.succeeded")


def _model_gone(settings: Settings, stripe: StripeStandIn) -> None:
    ModelPrice.objects.filter(model="gpt-6-luna").update(model="gpt-of-yesterday")


def _ai_key_missing(settings: Settings, stripe: StripeStandIn) -> None:
    settings.OPENAI_API_KEY = settings.ANTHROPIC_API_KEY = settings.GOOGLE_API_KEY = ""


def _nothing_on_sale(settings: Settings, stripe: StripeStandIn) -> None:
    TokenPricing.objects.update(is_active=False)


def _no_second_factor(settings: Settings, stripe: StripeStandIn) -> None:
    settings.ADMIN_MFA_REQUIRED = True


def _hold_beyond_its_time(settings: Settings, stripe: StripeStandIn) -> None:
    posting = ledger.reserve_tokens(
        user_id=User.objects.get(email="susan@example.com").pk,
        tokens=100,
        operation=ledger.Operation("chat", "openai", "gpt-6-luna", multiplier=Decimal(1)),
        idempotency_key="overdue",
        lifetime_seconds=600,
    )
    assert posting.usage_id
    TokenUsage.objects.filter(pk=posting.usage_id).update(expires_at=timezone.now() - timedelta(minutes=10))


def _secret_key_replaced_at_once(settings: Settings, stripe: StripeStandIn) -> None:
    settings.SECRET_KEY += "another"


def _event_failed(settings: Settings, stripe: StripeStandIn) -> None:
    StripeEvent.objects.create(event_id="evt_1", type="refund.created", livemode=False, payload={}, state="failed")


def _mail_server_away(settings: Settings, stripe: StripeStandIn) -> None:
    settings.EMAIL_BACKEND = "django.core.mail.backends.smtp.EmailBackend"
    settings.EMAIL_HOST, settings.EMAIL_PORT = "127.0.0.1", free_port()


def _lock_file_missing(settings: Settings, stripe: StripeStandIn) -> None:
    """A check that fails itself."""
    settings.BASE_DIR = Path("/nowhere")


@pytest.mark.parametrize(
    ("break_it", "subject", "message", "advice"),
    [
        (_wrong_stripe_key, "Stripe", "does not accept our key", "STRIPE_SECRET_KEY"),
        (_redis_gone, "Redis", "does not answer", "REDIS_URL"),
        (_beat_silent, "Beat", "handed nothing over", "celery -A postmate beat"),
        (_site_down, "Site", "cannot be reached", "proxy"),
        (_webhook_elsewhere, "Webhook", "sends no events", "STRIPE_WEBHOOK_SECRET"),
        (_webhook_disabled, "Webhook", "is disabled", "enable it"),
        (_webhook_without_disputes, "Webhook", "charge.dispute.created", "add these events"),
        (_model_gone, "AI", "does not serve gpt-of-yesterday", "retirement"),
        (_ai_key_missing, "AI", "no key", "OPENAI_API_KEY"),
        (_nothing_on_sale, "Sale", "No package", "seed_billing"),
        (_no_second_factor, "Superadmins", "0 of them", "/accounts/2fa/"),
        (_hold_beyond_its_time, "Holds", "1 hold past expiry", "beat"),
        (_secret_key_replaced_at_once, "Welcome bonus", "Nobody can tell", "SECRET_KEY=new,old"),
        (_event_failed, "Events", "could not be handled", "replay_stripe_events"),
        (_mail_server_away, "E-mail", "does not let us in", "EMAIL_URL"),
        (_lock_file_missing, "Python", "could not be looked at", "bug"),
    ],
)
@pytest.mark.usefixtures("installation")
def test_one_thing_broken_is_one_line_with_advice(
    break_it: Any,
    subject: str,
    message: str,
    advice: str,
    settings: Settings,
    stripe: StripeStandIn,
) -> None:
    break_it(settings, stripe)
    lines, exit_code = examine("--quick")
    assert exit_code == 1
    found = problems(lines)
    # Of another address Stripe knows nothing, and of a rehearsal in the middle of a test production's rules say more.
    assert found.keys() - ({"Settings", "Webhook"} if break_it is _site_down else set()) == {subject}
    assert message in found[subject]["message"]
    assert advice in found[subject]["advice"]


@pytest.mark.usefixtures("installation")
def test_broken_books_name_their_law() -> None:
    TokenAccount.objects.update(balance=F("balance") + 1)
    lines, exit_code = examine()
    assert exit_code == 1
    assert "(law 4): 1" in problems(lines)["Books"]["message"]
    assert "verify_ledger" in problems(lines)["Books"]["advice"]


@contextmanager
def _trigger_switched_off() -> Iterator[None]:
    call_command("pgtrigger", "disable", "billing.TokenTransaction:append_only")
    try:
        yield
    finally:
        call_command("pgtrigger", "enable", "billing.TokenTransaction:append_only")


@contextmanager
def _migration_missing() -> Iterator[None]:
    recorder = MigrationRecorder(connection)
    last = recorder.migration_qs.filter(app="billing").order_by("-name").first()
    assert last is not None
    recorder.record_unapplied("billing", last.name)
    try:
        yield
    finally:
        recorder.record_applied("billing", last.name)


@pytest.mark.usefixtures("installation")
def test_a_trigger_that_is_off_and_a_migration_that_is_missing() -> None:
    with _trigger_switched_off():
        lines, _ = examine("--quick")
        assert "TokenTransaction:append_only" in problems(lines)["Triggers"]["message"]
        assert "verify_ledger" in problems(lines)["Triggers"]["advice"]
    with _migration_missing():
        lines, _ = examine()
        assert "migrate" in problems(lines)["Migrations"]["advice"]
        assert lines["Books"][0]["level"] == "skipped"
    assert problems(examine("--quick")[0]) == {}


def test_the_report_is_whole_without_a_database() -> None:
    """Also as a program of its own, with nothing running: the exit code, and a line for everything."""
    environment = {**os.environ, "DATABASE_URL": f"postgresql://nobody:hush@127.0.0.1:{free_port()}/postmate"}
    environment["DEBUG"] = "true"
    finished = subprocess.run(
        [sys.executable, "manage.py", "doctor", "--json"],
        cwd=PROJECT, env=environment, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert finished.returncode == 1
    assert "hush" not in finished.stdout + finished.stderr
    lines = _lines(finished.stdout)
    assert lines.keys() == {check.subject for check in doctor.CHECKS}
    assert "Connection refused" in lines["Database"][0]["message"]
    assert {lines[subject][0]["level"] for subject in ("Migrations", "Triggers", "Sale", "Books")} == {"skipped"}
    assert lines["Redis"][0]["level"] == lines["Python"][0]["level"] == "ok"


class _MailServer(socketserver.StreamRequestHandler):
    """Says yes to everything, and keeps what it was sent."""

    mails: list[bytes] = []

    def handle(self) -> None:
        self.wfile.write(b"220 ready\r\n")
        while line := self.rfile.readline():
            if line.upper().startswith(b"DATA"):
                self.wfile.write(b"354 go on\r\n")
                mail = b""
                while (part := self.rfile.readline()) != b".\r\n":
                    mail += part
                self.mails.append(mail)
            self.wfile.write(b"221 bye\r\n" if line.upper().startswith(b"QUIT") else b"250 yes\r\n")


@pytest.mark.usefixtures("installation")
def test_mail_is_sent_only_where_it_is_asked_for(settings: Settings) -> None:
    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), _MailServer) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        settings.EMAIL_BACKEND = "django.core.mail.backends.smtp.EmailBackend"
        settings.EMAIL_HOST, settings.EMAIL_PORT = "127.0.0.1", server.server_address[1]
        lines, _ = examine("--quick")
        assert lines["E-mail"][0]["message"] == "The mail server lets us in."
        assert _MailServer.mails == []
        lines, _ = examine("--quick", "--send-test-mail", "operator@example.com")
        assert lines["Test mail"][0]["level"] == "ok"
        server.shutdown()
    (mail,) = _MailServer.mails
    assert b"To: operator@example.com" in mail


def test_servers_that_are_too_old_are_named_by_their_own_names(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(database, "OLDEST_POSTGRESQL", 99)
    monkeypatch.setattr(processes, "OLDEST_REDIS", (99, 0))
    facts = redis_client.client().info()
    name = f"Valkey {facts['valkey_version']}" if "valkey_version" in facts else f"Redis {facts['redis_version']}"
    for check, words in ((database.database_answers, "PostgreSQL "), (processes.redis_answers, f"{name} is too old")):
        [outcome] = check()
        assert outcome.level == "problem"
        assert words in outcome.message
        assert "Upgrade" in outcome.advice
        assert "99" in outcome.advice
