"""The product as it runs in production: settings, collected files and processes as in Dockerfile and compose file.

Importing this sets Django up on production's settings and a scratch database of the configured server. TLS alone is
missing: on a loopback address browsers trust plain HTTP, and SITE_URL says so.
"""

import logging
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from io import StringIO
from pathlib import Path
from typing import IO, Any
from urllib.parse import urlsplit

import django
import psycopg

from tests import environment
from tests.environment import WEB_PORT

SCRATCH = "audit_postmate"
REDIS_DATABASE = 15  # that of no test run
REPORTS = Path(__file__).parents[2] / "artifacts" / "audit"
SERVER_URL = urlsplit(os.environ["DATABASE_URL"])._replace(path="/postgres").geturl()
LIVE_PORT, WSGI_PORT = environment.free_port(), environment.free_port()

# The stand-ins' keys and addresses are set by tests.environment.
os.environ |= {
    "DEBUG": "false",
    "DRAIN_SECONDS": "0.1",
    "LOG_LEVEL": "WARNING",  # addresses are tried out
    "ADMIN_MFA_REQUIRED": "false",  # no page looks different for it, and none would be reached
    "DATABASE_URL": urlsplit(SERVER_URL)._replace(path=f"/{SCRATCH}").geturl(),
    "DATABASE_POOL_SIZE": "20",
    "REDIS_URL": environment.redis_database(os.environ["REDIS_URL"], REDIS_DATABASE),
    "EMAIL_URL": "dummymail://",
    "DJANGO_SETTINGS_MODULE": "postmate.settings",
}
django.setup()
logging.getLogger("django.request").setLevel(logging.ERROR)  # addresses are tried out

from django.core.cache import cache  # noqa: E402
from django.core.management import call_command  # noqa: E402
from django.db import connection  # noqa: E402

from tests import servers  # noqa: E402
from tests.servers import Server, StripeStandIn  # noqa: E402


@contextmanager
def running() -> Iterator[tuple[Server, StripeStandIn]]:
    """Everything, on one address, until the end of the context: the server people see, and the Stripe stand-in."""
    with _scratch_database(), ExitStack() as stack:
        call_command("seed_billing", stdout=StringIO())
        call_command("collectstatic", interactive=False, clear=True, verbosity=0)
        cache.clear()
        REPORTS.mkdir(parents=True, exist_ok=True)
        log = stack.enter_context((REPORTS / "servers.log").open("w"))
        stripe = stack.enter_context(servers.running_stripe(log=log))
        stack.enter_context(servers.running_ai(log=log))
        stack.enter_context(_server("web", WSGI_PORT, log, "--workers", "2"))
        stack.enter_context(_server("live", LIVE_PORT, log))
        yield stack.enter_context(_proxy(log)), stripe


def _server(kind: str, port: int, log: IO[str], *options: str) -> Any:
    command = ["-m", "postmate.serving", kind, "--port", str(port), *options]
    return servers.running(command, url=f"http://127.0.0.1:{port}", ready_path="/readyz", log=log)


def _proxy(log: IO[str]) -> Any:
    """Caddy with production's own Caddyfile."""
    beside_us = Path(sys.executable).with_name("caddy")
    program = str(beside_us) if beside_us.exists() else shutil.which("caddy")
    if program is None:
        raise SystemExit("The audit needs Caddy, which the packages do not bring for this machine (caddyserver.com).")
    url = f"http://127.0.0.1:{WEB_PORT}"
    environment: dict[str, Any] = {
        "SITE_ADDRESS": url,
        "PROXY_BIND": "127.0.0.1",
        "WEB_UPSTREAMS": f"to 127.0.0.1:{WSGI_PORT}",
        "LIVE_UPSTREAMS": f"to 127.0.0.1:{LIVE_PORT}",
        "XDG_DATA_HOME": str(REPORTS),
        "XDG_CONFIG_HOME": str(REPORTS),
    }
    command = ["run", "--config", "docker/Caddyfile", "--adapter", "caddyfile"]
    return servers.running(command, program=program, url=url, ready_path="/readyz", log=log, **environment)


@contextmanager
def _scratch_database() -> Iterator[None]:
    with psycopg.connect(SERVER_URL, autocommit=True) as server:
        server.execute(f"DROP DATABASE IF EXISTS {SCRATCH} WITH (FORCE)")
        server.execute(f"CREATE DATABASE {SCRATCH}")
        try:
            call_command("migrate", verbosity=0)
            yield
        finally:
            connection.close()
            server.execute(f"DROP DATABASE IF EXISTS {SCRATCH} WITH (FORCE)")
