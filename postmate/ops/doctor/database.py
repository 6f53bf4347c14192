"""The database, and what must be in it before anything else."""

from datetime import UTC, datetime
from time import monotonic

import pgtrigger
import psycopg
from django.conf import settings
from django.db import connection
from django.db.migrations.loader import MigrationLoader

from postmate.ops import backup
from postmate.ops.doctor.findings import TIMEOUT_SECONDS, Outcomes, clock, count, ok, problem, short, warning

OLDEST_POSTGRESQL = 15  # docs/TOKEN_BILLING_SETUP.md says with which ones the tests were run


def database_answers() -> Outcomes:
    # Past the pool, which would only say that it waited in vain.
    parameters = {**connection.get_connection_params(), "connect_timeout": int(TIMEOUT_SECONDS)}
    began = monotonic()
    try:
        with psycopg.connect(**parameters) as direct:
            major = direct.info.server_version // 10_000
    except psycopg.Error as error:
        yield problem(
            f"The database does not answer: {short(error)}",
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
            f"{count(len(pending), 'migration')} not applied, the first is {pending[0]}.",
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
    yield clock("the database", there - here)
