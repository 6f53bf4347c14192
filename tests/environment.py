"""Loaded before Django reads its settings (`-p tests.environment`): servers, keys and addresses of the test run.

PostgreSQL and Redis are the embedded ones unless DATABASE_URL and REDIS_URL name others; the stand-ins for Stripe and
the AI providers get free ports of the loopback interface and are started by the fixtures that need them.
"""

import atexit
import os
import secrets
import shutil
import socket
import tempfile
from contextlib import suppress
from pathlib import Path
from urllib.parse import urlsplit

from postmate.local import embedded

# The number of this process in a parallel run.
worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
given_ports: set[int] = set()


def free_port() -> int:
    """Below those that the system gives to outgoing connections: none of them takes it before its server does. Nor
    does another process of the run, for each has a range of its own; and none is given twice."""
    while True:
        port = 12_000 + worker % 4 * 4_900 + secrets.randbelow(4_900)
        if port in given_ports:
            continue
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            given_ports.add(port)
            return port


def redis_database(url: str, number: int) -> str:
    parts = urlsplit(url)
    return f"unix://{parts.path}?db={number}" if parts.scheme == "unix" else parts._replace(path=f"/{number}").geturl()


embedded.configure_environment()

# Each process of a parallel run has a Redis database of its own, and none the one of a `make run` beside them.
os.environ["REDIS_URL"] = redis_database(os.environ["REDIS_URL"], 1 + worker)

STRIPE_PORT, AI_PORT, WEB_PORT = free_port(), free_port(), free_port()
SITE_URL = f"http://127.0.0.1:{WEB_PORT}"
WEBHOOK_SECRET = "whsec_tests"  # noqa: S105 – of the tests alone
BILLING_SECRET = "tests-billing-secret-0123456789abcdef0123456789abcdef"  # noqa: S105 – of the tests alone

# Images that tests make are gone after them.
MEDIA_ROOT = tempfile.mkdtemp(prefix="postmate-tests-")
atexit.register(shutil.rmtree, MEDIA_ROOT, ignore_errors=True)

# Nothing here speaks TLS to strangers, and to read the machine's certificates costs each new client 22 ms.
NO_CERTIFICATES = Path(MEDIA_ROOT) / "no-certificates"
NO_CERTIFICATES.mkdir()
os.environ.pop("SSL_CERT_FILE", None)

os.environ |= {
    "DEBUG": "true",
    "SSL_CERT_DIR": str(NO_CERTIFICATES),
    "MEDIA_ROOT": MEDIA_ROOT,
    "SECRET_KEY": "tests",
    "PORT": str(WEB_PORT),
    "SITE_URL": SITE_URL,
    "ALLOWED_HOSTS": "127.0.0.1,localhost,testserver",
    "DATABASE_POOL_SIZE": "40",
    "BILLING_SECRET": BILLING_SECRET,
    "API_ANONYMOUS_CALLS_PER_MINUTE": "1000000",  # all tests come from one address; those of the limits set their own
    "STRIPE_SECRET_KEY": "sk_test_tests",
    "STRIPE_PUBLISHABLE_KEY": "pk_test_tests",
    "STRIPE_WEBHOOK_SECRET": WEBHOOK_SECRET,
    "STRIPE_API_BASE": f"http://127.0.0.1:{STRIPE_PORT}",
    "OPENAI_API_KEY": "sk-tests",
    "OPENAI_BASE_URL": f"http://127.0.0.1:{AI_PORT}/openai/v1",
    "ANTHROPIC_API_KEY": "sk-ant-tests",
    "ANTHROPIC_BASE_URL": f"http://127.0.0.1:{AI_PORT}/anthropic",
    "GOOGLE_API_KEY": "tests",
    "GOOGLE_GEMINI_BASE_URL": f"http://127.0.0.1:{AI_PORT}/google",
}
