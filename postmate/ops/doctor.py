"""Whether an installation is as it must be, in plain words, and what to do where it is not.

Each check is a function that yields what it found. What lies on this machine comes first, then what must be asked for
over the network; whatever needs something that does not answer is not looked at, and says so. Nothing is changed.
"""

import asyncio
import ipaddress
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from importlib import metadata
from pathlib import Path
from time import monotonic, time
from typing import Any
from urllib.parse import urlsplit

import httpx2
import pgtrigger
import psycopg
import redis
from allauth.mfa.models import Authenticator
from celery import current_app
from django.conf import settings
from django.core import checks
from django.core.mail import EmailMessage, get_connection
from django.db import connection
from django.db.migrations.loader import MigrationLoader
from django.db.models import Min, Q
from django.urls import reverse
from django.utils import timezone
from packaging.requirements import Requirement

from accounts.models import User
from ai_ops import providers
from billing.figures import finance
from billing.ledger import welcome
from billing.models import (
    Drift,
    ModelPrice,
    Notification,
    Purchase,
    RollUp,
    StripeEvent,
    SystemSettings,
    TokenAccount,
    TokenPricing,
    TokenUsage,
)
from billing.models.account import WithheldBonus
from billing.models.fields import Provider
from billing.payments import gateway, webhooks
from billing.upkeep.verification import verify
from kit import redis_client
from kit.database import now
from postmate.ops import backup
from postmate.ops.checks import existing, is_writable
from postmate.web import metrics

TIMEOUT_SECONDS = 5.0  # of a question over the network, where nothing else says so
OLDEST_POSTGRESQL = 15  # docs/TOKEN_BILLING_SETUP.md says with which ones the tests were run
OLDEST_REDIS = (6, 2)
CLOCK_WARNING_SECONDS, CLOCK_PROBLEM_SECONDS = 3, 30  # a webhook's signature is good for 300, and 60 ahead
LOW_DISK, LOW_DISK_BYTES = 0.10, 1 << 30
LONG_QUEUE = 500
WORKER_SECONDS = 2.0  # for the answers of all workers
BEAT_SILENT_SECONDS = 120  # it hands over e-mails every ten
RETIRING_DAYS = 30
OLDER_NAMES = frozenset({"charge.refund.updated"})  # of events that newer API versions send under another one


class Level(StrEnum):
    OK = "ok"
    WARNING = "warning"
    PROBLEM = "problem"
    SKIPPED = "skipped"


@dataclass(frozen=True, slots=True)
class Outcome:
    level: Level
    message: str
    advice: str = ""


@dataclass(frozen=True, slots=True)
class Line:
    """One line of the report."""

    subject: str
    level: Level
    message: str
    advice: str


Outcomes = Iterator[Outcome]


@dataclass(frozen=True, slots=True)
class Check:
    """`gives` names what others need: with a problem here, they are not looked at."""

    subject: str
    run: Callable[[], Outcomes]
    needs: frozenset[str] = frozenset()
    gives: str = ""
    is_slow: bool = False


def examine(*, is_quick: bool = False, test_address: str = "") -> Iterator[Line]:
    """Look at everything, and report each at once. `is_quick` leaves the books out. A test mail goes to an address."""
    away: set[str] = set()
    for check in (*CHECKS, Check("Test mail", lambda: _send_test_mail(test_address))):
        if (check.is_slow and is_quick) or (check.subject == "Test mail" and not test_address):
            continue
        if missing := check.needs & away:
            yield Line(check.subject, Level.SKIPPED, f"Not looked at, for lack of {' and '.join(sorted(missing))}.", "")
            continue
        found = []
        try:
            for outcome in check.run():
                found.append(outcome.level)
                yield Line(check.subject, outcome.level, outcome.message, outcome.advice)
        except Exception as error:  # one that fails must not hide what the others find
            found.append(Level.PROBLEM)
            yield Line(
                check.subject,
                Level.PROBLEM,
                f"This could not be looked at: {_short(error)}",
                "Mend what is reported above first; if it stays, report it as a bug.",
            )
        if check.gives and Level.PROBLEM in found:
            away.add(check.gives)
            if check.gives == SITE and settings.DEBUG:
                away.add(RUNNING)


def ok(message: str) -> Outcome:
    return Outcome(Level.OK, message)


def warning(message: str, advice: str) -> Outcome:
    return Outcome(Level.WARNING, message, advice)


def problem(message: str, advice: str) -> Outcome:
    return Outcome(Level.PROBLEM, message, advice)


# --- This machine ---------------------------------------------------------------------------------------------------


def python_and_packages() -> Outcomes:
    """The interpreter, and each package in the version that was locked and tested."""
    lock = settings.BASE_DIR / "requirements" / "production.txt"
    wanted = [
        Requirement(line.rstrip("\\ "))
        for line in lock.read_text().splitlines()
        if line and line[0] not in "# " and "==" in line
    ]
    other = []
    for requirement in wanted:
        if requirement.marker is None or requirement.marker.evaluate():
            version = next(iter(requirement.specifier)).version
            installed = _installed_version(requirement.name)
            if installed != version:
                other.append(f"{requirement.name} {installed or 'missing'} instead of {version}")
    if other:
        yield warning(
            f"Not the locked versions: {', '.join(other[:5])}{' …' if other[5:] else ''}.",
            "pip install --require-hashes -r requirements/production.txt, then restart.",
        )
    else:
        yield ok(f"Python {sys.version.split()[0]}, {len(wanted)} packages as locked.")


def _installed_version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def mode() -> Outcomes:
    if settings.DEBUG:
        yield ok("Development (DEBUG=true).")
    elif settings.REHEARSAL:
        yield ok("Rehearsal: production's rules, no real money.")
    else:
        yield ok("Production.")


def settings_are_sound() -> Outcomes:
    """What `manage.py check --deploy` says; in development without the rules of production."""
    found = checks.run_checks(include_deployment_checks=not settings.DEBUG)
    for message in found:
        if message.level >= checks.WARNING and not message.is_silenced():
            make = problem if message.level >= checks.ERROR else warning
            yield make(f"{message.msg} ({message.id})", message.hint or "docs/SECURITY.md says more.")
    if not any(message.level >= checks.WARNING and not message.is_silenced() for message in found):
        yield ok("The checks of settings find nothing." if settings.DEBUG else "check --deploy finds nothing.")


def disks() -> Outcomes:
    """Space where we write: data, images, backups."""
    seen = set()
    for folder in (settings.DATA_DIR, Path(settings.MEDIA_ROOT), settings.BACKUP_DIR):
        there = existing(folder)
        if there.stat().st_dev in seen:
            continue
        seen.add(there.stat().st_dev)
        usage = shutil.disk_usage(there)
        text = f"{usage.free / (1 << 30):.1f} GiB of {usage.total / (1 << 30):.1f} are free under {there}."
        if usage.free < LOW_DISK_BYTES:
            yield problem(text, "Make room now: without it images, exports and backups fail.")
        elif usage.free < LOW_DISK * usage.total:
            yield warning(text, "Make room, or give it a larger disk.")
        else:
            yield ok(text)


def images_can_be_written() -> Outcomes:
    folder = Path(settings.MEDIA_ROOT)
    if is_writable(folder):
        yield ok(f"{folder} can be written.")
    else:
        yield problem(f"{folder} cannot be written by this user.", "Give it to the user that the servers run as.")


def last_backup() -> Outcomes:
    if settings.BACKUP_MAX_AGE_HOURS == 0:
        yield ok("Backups are made by other means (BACKUP_MAX_AGE_HOURS=0).")
        return
    backups = backup.list_backups(settings.BACKUP_DIR)
    hours = (timezone.now().timestamp() - backups[-1].stat().st_mtime) / 3_600 if backups else None
    if hours is not None and hours <= settings.BACKUP_MAX_AGE_HOURS:
        yield ok(f"{backups[-1].name} is {hours:.0f} hours old.")
        return
    text = f"The newest backup is {hours:.0f} hours old." if hours is not None else "There is no backup."
    if settings.DEBUG:
        yield ok(f"{text} Development needs none.")
    else:
        yield warning(
            f"{text} ({settings.BACKUP_DIR})",
            "Run `manage.py backup --keep 14` every night, and rehearse a restore (docs/OPERATIONS.md).",
        )


# --- The database ---------------------------------------------------------------------------------------------------


def database_answers() -> Outcomes:
    # Past the pool, which would only say that it waited in vain.
    parameters = {**connection.get_connection_params(), "connect_timeout": int(TIMEOUT_SECONDS)}
    began = monotonic()
    try:
        with psycopg.connect(**parameters) as direct:
            major = direct.info.server_version // 10_000
    except psycopg.Error as error:
        yield problem(
            f"The database does not answer: {_short(error)}",
            "Is PostgreSQL running, and is DATABASE_URL right (host, name, user, password)?",
        )
        return
    text = f"PostgreSQL {major} answers in {(monotonic() - began) * 1_000:.0f} ms."
    if major < OLDEST_POSTGRESQL:
        yield problem(text, f"Upgrade it: {OLDEST_POSTGRESQL} is the oldest that this is tested with.")
    else:
        yield ok(text)


def migrations_are_applied() -> Outcomes:
    pending = backup.pending_migrations()
    if pending:
        yield problem(
            f"{_count(len(pending), 'migration')} not applied, the first is {pending[0]}.",
            "Run `manage.py migrate`, then restart the servers.",
        )
        return
    loader = MigrationLoader(connection)
    unknown = sorted(
        f"{app}.{name}"
        for app, name in loader.applied_migrations
        if app in loader.migrated_apps and (app, name) not in loader.disk_migrations
        if not any((app, name) in migration.replaces for migration in loader.disk_migrations.values())
    )
    if unknown:
        yield warning(
            f"The database is ahead of this code: {', '.join(unknown[:3])}.",
            "This is an older release than the one that migrated it. Install that one.",
        )
    else:
        yield ok("All migrations are applied.")


def triggers_are_there() -> Outcomes:
    """Those that refuse changes of the ledger first of all (law 3)."""
    missing = []
    for model, trigger in pgtrigger.registered():
        status, enabled = trigger.get_installation_status(model)
        if status != "INSTALLED" or enabled is False:
            missing.append(f"{model._meta.label}:{trigger.name}")
    if missing:
        yield problem(
            f"Triggers are missing or switched off: {', '.join(missing)}. What they guard could be changed.",
            "Find out who did that; then `manage.py pgtrigger install`, `manage.py pgtrigger enable` and "
            "`manage.py verify_ledger`.",
        )
    else:
        yield ok(f"{len(pgtrigger.registered())} triggers guard the books and the audit log.")


def database_connections() -> Outcomes:
    with connection.cursor() as cursor:
        cursor.execute(
            """SELECT current_setting('max_connections')::int - current_setting('superuser_reserved_connections')::int,
                      (SELECT count(*) FROM pg_stat_activity WHERE backend_type = 'client backend')"""
        )
        allowed, used = cursor.fetchone()
    processes = allowed // settings.DATABASE_POOL_SIZE
    text = (
        f"{used} of {allowed} connections are in use; there is room for {processes} processes of up to "
        f"{settings.DATABASE_POOL_SIZE} each."
    )
    advice = (
        "Raise max_connections, put a pooler in between, or lower DATABASE_POOL_SIZE (not below a process's threads)."
    )
    if used > 0.9 * allowed:
        yield problem(text, advice)
    elif processes < 4:  # web, live, worker, beat
        yield warning(text, advice)
    else:
        yield ok(text)


def database_clock() -> Outcomes:
    """Expiry is decided by the database's clock, signatures of webhooks by ours."""
    before = datetime.now(UTC)
    with connection.cursor() as cursor:
        cursor.execute("SELECT clock_timestamp()")
        there = cursor.fetchone()[0]
    here = before + (datetime.now(UTC) - before) / 2
    yield _clock("the database", there - here)


def _clock(whose: str, ahead: timedelta, precision_seconds: float = 0) -> Outcome:
    seconds = ahead.total_seconds()
    off = max(0.0, abs(seconds) - precision_seconds)
    if off < CLOCK_WARNING_SECONDS:
        return ok(f"This machine and {whose} agree to {max(off, 0.1):.1f} s.")
    text = f"The clock of {whose} is {abs(seconds):.0f} s {'ahead of' if seconds > 0 else 'behind'} this machine's."
    advice = "Let all machines keep time with NTP. Stripe's webhooks are refused when the clocks are minutes apart."
    return (problem if off >= CLOCK_PROBLEM_SECONDS else warning)(text, advice)


def sale() -> Outcomes:
    """System settings, packages and models: what people can buy, and spend it on."""
    if not SystemSettings.objects.filter(key="global").exists():
        yield problem("The system settings are missing.", "Run `manage.py seed_billing`.")
    elif not SystemSettings.objects.get(key="global").billing_enabled:
        yield warning(
            "Billing is switched off: AI operations cost nothing.", "Switch it on under /admin/tokens/settings/."
        )
    on_sale = TokenPricing.objects.filter(is_active=True).count()
    if on_sale == 0:
        yield problem("No package is on sale.", "Make one active on the dashboard, or run `manage.py seed_billing`.")
    else:
        yield ok(f"{_count(on_sale, 'package')} on sale.")


def models_on_offer() -> Outcomes:
    today = timezone.now().date()
    active = list(ModelPrice.objects.filter(is_active=True).order_by("provider", "model"))
    offered = [price for price in active if price.retired_on is None or price.retired_on > today]
    if not any(price.kind == "text" for price in offered):
        yield problem(
            "No model for texts is on offer.", "Run `manage.py seed_billing`, or make one active in Django admin."
        )
    for price in offered:
        if price.retired_on and price.retired_on <= today + timedelta(days=RETIRING_DAYS):
            replacement = f" Its replacement is {price.replacement}." if price.replacement else ""
            yield warning(
                f"{price.model} is refused from {price.retired_on} on.{replacement}",
                "See that the replacement is on offer, and tell people who use the model.",
            )
    for price in ModelPrice.objects.filter(Q(retired_on=None) | Q(retired_on__gt=today)).order_by("provider", "model"):
        if price.missing_prices:
            yield warning(
                f"{price.model} has no price, so it is not sold.",
                "Enter its provider's prices in Django admin, or run `manage.py import_model_prices`.",
            )
    yield ok(f"{_count(len(offered), 'model')} on offer.")


def superadmins() -> Outcomes:
    people = User.objects.filter(role=User.Role.SUPERADMIN, is_active=True)
    number = people.count()
    if number == 0:
        yield problem("There is no superadmin.", "Run `manage.py createsuperuser`.")
        return
    secured = (
        Authenticator.objects.filter(user__in=people, type=Authenticator.Type.TOTP).values("user").distinct().count()
    )
    text = f"{_count(number, 'superadmin')}, {secured} of them with a second factor."
    if secured == number or not settings.ADMIN_MFA_REQUIRED:
        yield ok(text)
    else:
        make = problem if secured == 0 else warning
        yield make(text, "Without one they cannot open the admin side. They set it up under /accounts/2fa/.")


def welcome_bonus() -> Outcomes:
    try:
        welcome.read_key()
    except welcome.KeyLost:
        yield problem(
            "Nobody can tell who had the welcome bonus, so nobody gets it: the key of these marks is encrypted with a "
            "SECRET_KEY that is not set any more.",
            "Run `SECRET_KEY=new,old manage.py seed_billing` once, then `manage.py initialize_accounts`.",
        )
        return
    waiting = TokenAccount.objects.filter(bonus_withheld=WithheldBonus.WAITS).count()
    yield ok(f"It comes once for a mailbox. {_count(waiting, 'account')} of disposable addresses waiting for an admin.")


def holds() -> Outcomes:
    held = TokenUsage.objects.filter(status=TokenUsage.Status.RESERVED)
    if overdue := held.filter(expires_at__lt=now() - timedelta(minutes=5)).count():
        yield problem(
            f"{_count(overdue, 'hold')} past expiry and not released: these tokens cannot be spent.",
            "Worker and beat release them every 30 s: see that both run.",
        )
    else:
        yield ok(f"{_count(held.count(), 'running operation')}, none beyond its time.")


def events() -> Outcomes:
    state = StripeEvent.State
    failed = StripeEvent.objects.filter(state__in=(state.FAILED, state.RECEIVED)).count()
    aside = StripeEvent.objects.filter(state=state.ASIDE).count()
    last_at = StripeEvent.objects.order_by("-id").values_list("received_at", flat=True).first()
    if failed:
        yield problem(
            f"{_count(failed, 'event')} of Stripe could not be handled.",
            "Django admin (Stripe events) says why; then `manage.py replay_stripe_events`.",
        )
    if aside:
        yield warning(
            f"{_count(aside, 'event')} kept aside for a person.",
            "Read why in Django admin (Stripe events), act, and mark them as dealt with.",
        )
    if not (failed or aside):
        yield ok(f"None waits; the last one came {_ago(last_at)}." if last_at else "None has come yet.")


def money_to_look_at() -> Outcomes:
    drifts = Drift.objects.filter(resolved_at=None).count()
    review = Purchase.objects.filter(state=Purchase.State.REVIEW).count()
    if drifts:
        yield warning(f"{_count(drifts, 'open drift')} between Stripe and the books.", "Look at /admin/tokens/drifts/.")
    if review:
        yield warning(
            f"{_count(review, 'payment')} under review: not what was agreed, and not credited.",
            "Look at them under /admin/tokens/drifts/ and in Django admin (purchases).",
        )
    if not (drifts or review):
        yield ok("No drift is open, no payment waits for review.")


def roll_ups() -> Outcomes:
    until = RollUp.objects.values_list("rolled_until", flat=True).first()
    oldest = TokenUsage.objects.order_by("id").values_list("created_at", flat=True).first()
    late_from = timezone.now() - timedelta(hours=3)
    if oldest is None or oldest > late_from:
        yield ok("There is no finished hour to add up yet.")
    elif until is None or until < late_from:
        yield warning(
            f"The dashboard's figures are added up until {until or 'never'} only, and get slow.",
            "See that worker and beat run; a transaction open for hours in the database also holds them up.",
        )
    else:
        yield ok(f"Figures are added up until {until:%Y-%m-%d %H:%M} UTC.")


def outbox() -> Outcomes:
    late = Notification.objects.filter(email_next_at__lt=timezone.now() - timedelta(minutes=15)).count()
    given_up = Notification.objects.filter(
        email_wanted=True, email_sent_at=None, email_next_at=None, created_at__gt=timezone.now() - timedelta(days=7)
    ).count()
    if late:
        yield warning(
            f"{_count(late, 'e-mail')} waiting for more than a quarter of an hour.", "See that worker and beat run."
        )
    if given_up:
        yield warning(
            f"{_count(given_up, 'e-mail')} given up this week.",
            "Django admin (notifications, e-mail: given up) says why; mend EMAIL_URL.",
        )
    if not (late or given_up):
        yield ok("No e-mail waits for long.")


def finance_exports() -> Outcomes:
    first_at = TokenAccount.objects.aggregate(at=Min("created_at"))["at"]
    due = (timezone.now() - timedelta(hours=3)).date() - timedelta(days=1)  # written at 01:23
    if first_at is None or first_at.astimezone(UTC).date() > due:
        yield ok("None is due yet.")
    elif finance.path_of(due).exists():
        yield ok(f"That of {due} is there.")
    else:
        yield warning(
            f"That of {due} is not in {finance.folder()}.",
            f"Run `manage.py export_finance --day {due}`; where the books do not balance, it says so.",
        )


def books() -> Outcomes:
    number = 0
    violations = []
    for finding in verify():
        number += 1
        if finding.violations:
            violations.append(f"{finding.check.name} (law {finding.check.law}): {finding.violations:,}")
    if violations:
        yield problem(
            f"The books are broken. {'; '.join(violations)}.",
            "Run `manage.py verify_ledger` for the rows. docs/OPERATIONS.md says what to do.",
        )
    else:
        yield ok(f"In order: {number} checks over all rows, no violation.")


# --- Redis, workers -------------------------------------------------------------------------------------------------


def redis_answers() -> Outcomes:
    try:
        facts: dict[str, Any] = redis_client.client().info()
    except redis.RedisError as error:
        yield problem(
            f"Redis does not answer: {_short(error)}",
            "Is it running, and is REDIS_URL right? Until then: no e-mails, no auto-recharge, no sweeps; payments and "
            "debits go on.",
        )
        return
    # Valkey names the Redis whose protocol it speaks, too.
    name = f"Valkey {facts['valkey_version']}" if "valkey_version" in facts else f"Redis {facts['redis_version']}"
    version = tuple(int(part) for part in facts["redis_version"].split(".")[:2])
    if version < OLDEST_REDIS:
        yield problem(f"{name} is too old.", f"Upgrade to {'.'.join(map(str, OLDEST_REDIS))}, or to Valkey.")
    elif facts.get("maxmemory") and facts.get("maxmemory_policy") != "noeviction":
        yield problem(
            f"Redis throws entries away when its memory is full ({facts['maxmemory_policy']}): tasks would be lost.",
            "Set maxmemory-policy noeviction, and give it memory enough.",
        )
    elif not facts.get("aof_enabled") and not settings.DEBUG:
        yield warning(
            f"{name} keeps no append-only file: its restart loses the tasks in the queue.",
            "Set appendonly yes. Sweeps do again what is lost, minutes later.",
        )
    else:
        yield ok(f"{name} answers and evicts nothing.")


def queue() -> Outcomes:
    client = redis_client.client()
    number = sum(int(client.llen(name)) for name in current_app.amqp.queues)
    text = f"{_count(number, 'task')} waiting."
    if number > LONG_QUEUE:
        yield warning(text, "Start more workers, or find out in their log what keeps them.")
    else:
        yield ok(text)


def worker_lives() -> Outcomes:
    """Some worker answers for each queue."""
    answers = current_app.control.inspect(timeout=WORKER_SECONDS).active_queues() or {}
    served = {queue["name"] for queues in answers.values() for queue in queues}
    unserved = sorted(current_app.amqp.queues.keys() - served)
    if not answers:
        yield problem(
            "No worker answers.",
            "Start it: `celery -A postmate worker`. Until then: no e-mails, no auto-recharge, no sweeps.",
        )
    elif unserved:
        yield problem(
            f"No worker serves the queue {' or '.join(unserved)}: its tasks wait for ever.",
            "Start a worker for it, or one without `--queues`, which serves all.",
        )
    else:
        yield ok(f"{_count(len(answers), 'worker')} answered, and all queues are served.")


def beat_lives() -> Outcomes:
    stamp = redis_client.client().get(metrics.BEAT_KEY)
    seconds = time() - float(stamp) if stamp else None
    if seconds is not None and seconds < BEAT_SILENT_SECONDS:
        yield ok(f"Beat handed a task over {max(seconds, 0):.0f} s ago.")
    else:
        since = f"for {seconds:.0f} s" if seconds is not None else "since Redis began"
        yield problem(
            f"Beat has handed nothing over {since}.",
            "Start it, once: `celery -A postmate beat`. Without it holds are not released and no e-mail goes out. Just "
            "started? Then ask again in half a minute.",
        )


def site_answers() -> Outcomes:
    try:
        answer = _get("/readyz")
    except httpx2.TransportError as error:
        if settings.DEBUG:
            yield problem(f"Nothing answers at {settings.SITE_URL}.", "`make run` starts everything.")
        else:
            yield problem(
                f"{settings.SITE_URL} cannot be reached from here: {_short(error)}",
                "Are proxy and web running, does the name lead here, is the certificate good?",
            )
        return
    if answer.status_code == 200:
        yield ok(f"{settings.SITE_URL} answers and is ready.")
    else:
        yield problem(
            f"{settings.SITE_URL}/readyz answers {answer.status_code}.",
            "A redirect, 400 or 404: SITE_URL, ALLOWED_HOSTS and the proxy do not fit together. 503: see the database.",
        )


# --- Stripe ---------------------------------------------------------------------------------------------------------


def stripe_lets_us_in() -> Outcomes:
    try:
        access = gateway.check_access()
    except gateway.GatewayError as error:
        if getattr(error.__cause__, "http_status", None) in (401, 403):
            yield problem(
                f"Stripe does not accept our key: {_short(error.__cause__)}",
                "Take the secret key from Stripe's dashboard (Developers, API keys) and set STRIPE_SECRET_KEY.",
            )
        else:
            yield problem(
                f"Stripe does not answer: {_short(error.__cause__)}",
                "Look at Stripe's status page, and whether this machine may reach Stripe.",
            )
        return
    if access.is_live != gateway.is_live_mode():
        yield problem("Stripe's mode is not the one that the key names.", "Set the key of the mode that is meant.")
    else:
        yield ok("Live mode: real money." if access.is_live else "Test mode: no real money.")
    yield _clock("Stripe", access.answered_at + timedelta(seconds=0.5) - datetime.now(UTC), precision_seconds=1.5)


def webhook_is_registered() -> Outcomes:
    """Stripe knows our address, and sends all that we handle in the version that we read."""
    ours = settings.SITE_URL + reverse("stripe-webhook")
    here = [each for each in gateway.list_webhook_endpoints() if _same_address(each.url, ours)]
    how = "In Stripe's dashboard (Developers, Webhooks)"
    if not here:
        yield problem(
            f"Stripe sends no events to {ours}: payments are credited minutes late, refunds hours late.",
            f"{how} add it with the events of docs/TOKEN_BILLING_SETUP.md and set STRIPE_WEBHOOK_SECRET.",
        )
        return
    enabled = [each for each in here if each.is_enabled]
    if not enabled:
        yield problem(
            f"The webhook to {ours} is disabled.", f"{how} enable it; Stripe switches it off after days of errors."
        )
        return
    types = frozenset[str]().union(*(each.event_types for each in enabled))
    missing = sorted(webhooks.HANDLERS.keys() - types - OLDER_NAMES)
    if missing and "*" not in types:
        yield problem(f"Stripe does not send {', '.join(missing)}.", f"{how} add these events to the endpoint.")
    elif others := {each.api_version or "the account's default" for each in enabled} - {gateway.API_VERSION}:
        yield warning(
            f"Events come in API version {', '.join(sorted(others))}; this release reads {gateway.API_VERSION}.",
            f"{how} make an endpoint in that version and remove the old one. Till then each costs a call to Stripe.",
        )
    else:
        yield ok(f"Stripe sends its events to {ours}.")


def webhook_answers() -> Outcomes:
    path = reverse("stripe-webhook")
    with _client() as client:
        status = client.post(settings.SITE_URL + path, content=b"{}").status_code
    text = f"Without a signature it answers {status}"
    if status == 400:
        yield ok(f"{text}, as it must.")
    elif status == 404:
        yield problem(f"{text}.", "STRIPE_WEBHOOK_SECRET is not set where `web` runs, or the proxy leads elsewhere.")
    elif 300 <= status < 400:
        yield problem(f"{text}, a redirect, which Stripe does not follow.", "Set SITE_URL to the address it leads to.")
    elif status in (401, 403, 405):
        yield problem(f"{text}.", f"Something in front refuses it: let POST {path} through.")
    else:
        yield problem(f"{text} instead of 400.", "See the log of `web`.")


# --- AI providers, e-mail -------------------------------------------------------------------------------------------


def ai_providers() -> Outcomes:
    """Each key opens its provider, and the models on offer are still served there."""
    configured = [provider for provider in Provider.values if providers.is_configured(provider)]
    if not configured:
        yield problem("There is no key of an AI provider.", "Set OPENAI_API_KEY, ANTHROPIC_API_KEY or GOOGLE_API_KEY.")
    today = timezone.now().date()
    for provider in configured:
        name = Provider(provider).label
        try:
            served = asyncio.run(providers.list_models(provider))
        except providers.ProviderMisconfigured:
            yield problem(
                f"{name} does not accept our key.", f"Make a new one there and set {provider.upper()}_API_KEY."
            )
            continue
        except providers.ProviderError as error:
            yield warning(
                f"{name}: {_short(error)}", "Look at its status page. Its models fail meanwhile; nobody pays."
            )
            continue
        offered = ModelPrice.objects.filter(provider=provider, is_active=True).order_by("model")
        gone = []
        for price in offered:
            if price.retired_on and price.retired_on <= today:
                continue
            # Some lists name the dated version behind a name alone.
            ends = [end for id, end in served.items() if re.fullmatch(rf"{re.escape(price.model)}(-\d{{8}})?", id)]
            if not ends:
                gone.append(price.model)
            elif (end := ends[-1]) and end <= today + timedelta(days=RETIRING_DAYS):
                yield warning(
                    f"{name} ends {price.model} on {end}.",
                    "Enter the day and a replacement in Django admin (model prices).",
                )
        if gone:
            yield problem(
                f"{name} does not serve {', '.join(gone)}, on offer here: operations with it fail.",
                "Enter its retirement and a replacement in Django admin (model prices), or make it inactive.",
            )
        else:
            yield ok(f"{name} accepts our key and serves what is on offer here ({_count(len(offered), 'model')}).")


def mail_server() -> Outcomes:
    """It lets us in. Nothing is sent."""
    if settings.EMAIL_BACKEND.rpartition(".")[0].endswith(("filebased", "console", "dummy", "locmem")):
        text = "E-mails are not sent, but written to files or nowhere."
        if settings.DEBUG or settings.REHEARSAL:
            yield ok(text)
        else:
            yield problem(text, "Set EMAIL_URL to a mail server.")
        return
    try:
        mails = get_connection(timeout=TIMEOUT_SECONDS)
        mails.open()
        mails.close()
    except (OSError, ValueError) as error:  # what smtplib raises is an OSError
        yield problem(
            f"The mail server does not let us in: {_short(error)}", "Mend EMAIL_URL: host, port, user, password."
        )
    else:
        yield ok("The mail server lets us in.")


def _send_test_mail(address: str) -> Outcomes:
    message = EmailMessage(
        "A test from Postmate", f"{settings.SITE_URL} can send e-mails.", to=[address], connection=get_connection()
    )
    try:
        message.send()
    except (OSError, ValueError) as error:
        yield problem(f"It was not sent: {_short(error)}", "Mend EMAIL_URL and DEFAULT_FROM_EMAIL.")
    else:
        yield ok(f"Handed over for {address}. See that it arrives, and not among the spam.")


# --- The list -------------------------------------------------------------------------------------------------------

DATABASE, TABLES, REDIS, SITE, STRIPE, RUNNING = (
    "a database",
    "the migrations",
    "Redis",
    "an answer of the site",
    "Stripe",
    "`make run`",
)


def _on_tables(subject: str, run: Callable[[], Outcomes], *, is_slow: bool = False) -> Check:
    return Check(subject, run, frozenset({DATABASE, TABLES}), is_slow=is_slow)


CHECKS = (
    Check("Python", python_and_packages),
    Check("Mode", mode),
    Check("Settings", settings_are_sound),
    Check("Disks", disks),
    Check("Images", images_can_be_written),
    Check("Backup", last_backup),
    Check("Database", database_answers, gives=DATABASE),
    Check("Migrations", migrations_are_applied, frozenset({DATABASE}), gives=TABLES),
    _on_tables("Triggers", triggers_are_there),
    Check("Connections", database_connections, frozenset({DATABASE})),
    Check("Clock", database_clock, frozenset({DATABASE})),
    _on_tables("Sale", sale),
    _on_tables("Models", models_on_offer),
    _on_tables("Superadmins", superadmins),
    _on_tables("Welcome bonus", welcome_bonus),
    _on_tables("Holds", holds),
    _on_tables("Events", events),
    _on_tables("Money", money_to_look_at),
    _on_tables("Roll-ups", roll_ups),
    _on_tables("Outbox", outbox),
    _on_tables("Finance", finance_exports),
    _on_tables("Books", books, is_slow=True),
    Check("Redis", redis_answers, gives=REDIS),
    Check("Queue", queue, frozenset({REDIS})),
    Check("Site", site_answers, gives=SITE),
    Check("Worker", worker_lives, frozenset({REDIS, RUNNING})),
    Check("Beat", beat_lives, frozenset({REDIS, RUNNING})),
    Check("Stripe", stripe_lets_us_in, frozenset({RUNNING}), gives=STRIPE),
    Check("Webhook", webhook_is_registered, frozenset({STRIPE, RUNNING})),
    Check("Webhook", webhook_answers, frozenset({SITE})),
    Check("AI", ai_providers, frozenset({DATABASE, TABLES, RUNNING})),
    Check("E-mail", mail_server),
)


# --- Helpers --------------------------------------------------------------------------------------------------------


def _client() -> httpx2.Client:
    # A rehearsal's certificate is signed by the proxy itself.
    return httpx2.Client(timeout=TIMEOUT_SECONDS, verify=not settings.REHEARSAL)


def _get(path: str) -> httpx2.Response:
    with _client() as client:
        return client.get(settings.SITE_URL + path)


def _same_address(one: str, other: str) -> bool:
    return _address(one) == _address(other)


def _address(url: str) -> tuple[str, str, int | None, str]:
    """In parts, this machine under one name."""
    parts = urlsplit(url)
    host = parts.hostname or ""
    try:
        is_here = ipaddress.ip_address(host).is_loopback
    except ValueError:
        is_here = host == "localhost"
    return parts.scheme, "localhost" if is_here else host, parts.port, parts.path


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def _ago(at: datetime) -> str:
    seconds = int((timezone.now() - at).total_seconds())
    for unit, length in (("days", 86_400), ("hours", 3_600), ("minutes", 60)):
        if seconds >= 2 * length:
            return f"{seconds // length} {unit} ago"
    return "just now"


def _short(error: BaseException | None) -> str:
    """What an error says, on one line."""
    text = " ".join(str(error).split())
    return f"{text[:200]}{'…' if text[200:] else ''}" or type(error).__name__
