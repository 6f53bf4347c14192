"""The test database of each process: a copy of one that the first to come has migrated. And the same of a server."""

import fcntl
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from hashlib import sha256
from pathlib import Path
from typing import Any

from django.conf import settings
from django.core.management import call_command
from django.db import OperationalError, connection

from postmate.local import embedded, keeper
from tests.servers import PROJECT

ONE_AT_A_TIME = 7_265_901  # an advisory lock of the server


@contextmanager
def copied() -> Iterator[None]:
    """Until the end of the context `connection` leads to an empty database with all tables.

    The database that is copied stays on the server for later runs, until a migration or a dependency is another.
    """
    template = f"{_PREFIX}{_fingerprint()}"
    copy = connection.settings_dict["TEST"]["NAME"] or f"test_{connection.settings_dict['NAME']}"
    with connection._nodb_cursor() as server:
        server.execute("SET lock_timeout = 0")
        server.execute("SELECT pg_advisory_lock(%s)", [ONE_AT_A_TIME])  # until the connection is closed
        server.execute("SELECT datname FROM pg_database WHERE starts_with(datname, %s)", [_PREFIX])
        there = [name for (name,) in server.fetchall()]
        if template not in there:
            for name in there:
                server.execute(f'DROP DATABASE "{name}"')
            unfinished = f"{template}_unfinished"
            server.execute(f'CREATE DATABASE "{unfinished}"')
            with connected_to(unfinished):
                call_command("migrate", verbosity=0, interactive=False)
            server.execute(f'ALTER DATABASE "{unfinished}" RENAME TO "{template}"')
        server.execute(f'DROP DATABASE IF EXISTS "{copy}" WITH (FORCE)')
        server.execute(f'CREATE DATABASE "{copy}" TEMPLATE "{template}"')
        # Nothing crashes this server (tests/faults has one of its own), so a commit need not wait for the disk.
        server.execute(f'ALTER DATABASE "{copy}" SET synchronous_commit = off')
    with connected_to(copy):
        yield
    with suppress(OperationalError), connection._nodb_cursor() as server:  # in use still: the next run takes it away
        server.execute(f'DROP DATABASE "{copy}"')


_PREFIX = "test_migrated_"


def _fingerprint() -> str:
    digest = sha256()
    for file in (*sorted(PROJECT.glob("*/migrations/*.py")), PROJECT / "requirements" / "dev.txt"):
        digest.update(file.read_bytes())
    return digest.hexdigest()[:16]


@contextmanager
def connected_to(database: str, **server: Any) -> Iterator[None]:
    """Until the end of the context `connection` leads there; `server`, in Django's words, when it is another."""
    there = {"NAME": database, **server}
    usual = {key: connection.settings_dict[key] for key in there}
    _lead_to(there)
    try:
        yield
    finally:
        _lead_to(usual)


def _lead_to(place: dict[str, Any]) -> None:
    connection.close()
    connection.close_pool()  # type: ignore[attr-defined]
    settings.DATABASES["default"].update(place)
    connection.settings_dict.update(place)


def migrate_before_start(directory: Path) -> None:
    """Put an embedded PostgreSQL into the data directory as it is at every start but the first: with all tables.

    What is copied stays in the data directory of the tests until a migration or a dependency is another.
    """
    home = embedded.data_dir()
    migrated = home / f"migrated-{_fingerprint()}"
    with (home / "migrated.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not migrated.exists():
            for older in home.glob("migrated-*"):
                shutil.rmtree(older)
            unfinished = home / "migrated-unfinished"
            unfinished.mkdir(mode=0o700)
            url = embedded.start_postgres(unfinished)
            migrate = [sys.executable, "manage.py", "migrate", "--verbosity=0"]
            try:
                subprocess.run(migrate, cwd=PROJECT, env=os.environ | {"DATABASE_URL": url}, check=True)
            finally:
                with (unfinished / "postgresql.lock").open() as server:
                    keeper.end(server, signal.SIGINT)
            unfinished.rename(migrated)
        shutil.copytree(migrated / "postgresql", directory / "postgresql")
