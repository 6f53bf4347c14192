"""Benchmarks, on a scratch database of the configured server. Importing the package sets Django up on it."""

# ruff: noqa: T201  (their output is what they are for)

import os
from collections.abc import Iterator
from contextlib import contextmanager
from io import StringIO
from urllib.parse import urlsplit

import django
import psycopg

from postmate.local import embedded

SCRATCH = "bench_postmate"

# Also in processes that are spawned: they import the package again.
embedded.configure_environment()
SERVER_URL = urlsplit(os.environ["DATABASE_URL"])._replace(path="/postgres").geturl()
os.environ |= {
    "DATABASE_URL": urlsplit(os.environ["DATABASE_URL"])._replace(path=f"/{SCRATCH}").geturl(),
    "DJANGO_SETTINGS_MODULE": "postmate.settings",
    "LOG_LEVEL": "WARNING",  # a line for each operation would hide the table
}
django.setup()

from django.conf import settings  # noqa: E402
from django.core.management import call_command  # noqa: E402
from django.db import connection  # noqa: E402

settings.DEBUG = False  # which would keep every query in a list


@contextmanager
def scratch_database() -> Iterator[None]:
    """Make the database, with its tables; after the measurement check its books, and drop it."""
    with psycopg.connect(SERVER_URL, autocommit=True) as server:
        server.execute(f"DROP DATABASE IF EXISTS {SCRATCH} WITH (FORCE)")
        server.execute(f"CREATE DATABASE {SCRATCH}")
        try:
            call_command("migrate", verbosity=0)
            yield
            report = StringIO()
            call_command("verify_ledger", stdout=report)
            print(report.getvalue().splitlines()[-1])
        finally:
            connection.close()
            server.execute(f"DROP DATABASE {SCRATCH} WITH (FORCE)")
