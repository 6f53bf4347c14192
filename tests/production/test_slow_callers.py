"""Who sends or reads slowly, or never to the end, keeps nobody waiting but themselves (rows 130 and 131)."""

import hashlib
import re
import socket
import ssl
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from io import BytesIO
from pathlib import Path
from zipfile import ZipFile

import httpx2
import pytest

from kit import outgoing
from tests.production.conftest import Production, row_of_free_ports, wait_until
from tests.production.test_container_files import tool
from tests.servers import PROJECT

# With a token of anybody's: without one a form is refused before it is read.
BODY = (
    "POST {path} HTTP/1.1\r\nHost: localhost:{port}\r\nCookie: csrftoken=" + "a" * 32 + "\r\n"
    "Content-Type: {type}\r\n{length}\r\n\r\n{beginning}"
)
KINDS = {
    "a form": ("/accounts/login/", "application/x-www-form-urlencoded", "Content-Length: 5000", "login=somebody"),
    "a form without a length": ("/accounts/signup/", "text/plain", "Transfer-Encoding: chunked", "3\r\nabc\r\n"),
    "Stripe": ("/stripe/webhook/", "application/json", "Content-Length: 5000", '{"id": "evt_1", "ob'),
    "the API": ("/api/v1/usage", "application/json", "Content-Length: 5000", '{"user_id": 1, "pro'),
    "a stream": ("/live/draft/", "application/x-www-form-urlencoded", "Content-Length: 5000", "title=Umbrellas"),
}
HALF_A_HEADER = b"POST /accounts/login/ HTTP/1.1\r\nHo"
SENDERS = 40  # for each kind; the processes of `make run-production` have 16 threads in all


def unfinished(kind: str, port: int) -> bytes:
    path, content_type, length, beginning = KINDS[kind]
    return BODY.format(path=path, port=port, type=content_type, length=length, beginning=beginning).encode()


@contextmanager
def senders(production: Production, port: int, *beginnings: bytes) -> Iterator[list[ssl.SSLSocket]]:
    """A connection for each, on which so much is sent and no more."""
    trusted = ssl.create_default_context(cafile=str(certificate(production)))
    with ExitStack() as stack:
        opened = []
        for beginning in beginnings:
            plain = stack.enter_context(socket.create_connection(("127.0.0.1", port), timeout=30))
            connection = stack.enter_context(trusted.wrap_socket(plain, server_hostname="localhost"))
            connection.sendall(beginning)
            opened.append(connection)
        yield opened


def certificate(production: Production) -> Path:
    return production.directory / "caddy" / "pki" / "authorities" / "local" / "root.crt"


def is_hanging(connection: ssl.SSLSocket) -> bool:
    """Neither answered nor ended."""
    connection.settimeout(0.01)
    try:
        connection.recv(1)
    except TimeoutError:
        return True
    except OSError:
        pass
    return False


@pytest.mark.parametrize("kind", KINDS)
def test_a_page_is_answered_while_bodies_do_not_come(production: Production, kind: str) -> None:
    with senders(production, production.port, *[unfinished(kind, production.port)] * SENDERS) as hanging:
        with production.http(timeout=20) as http:
            for path in ("/", "/accounts/login/", "/live/balance/"):
                assert http.get(path).status_code == 200
            assert http.post("/api/v1/usage", json={}).status_code == 401
            assert http.post("/stripe/webhook/", content=b"{}").status_code == 400
        assert all(is_hanging(connection) for connection in hanging)


def test_a_page_is_answered_while_headers_do_not_come(production: Production) -> None:
    with senders(production, production.port, *[HALF_A_HEADER] * SENDERS) as hanging:
        with production.http(timeout=20) as http:
            assert http.get("/accounts/login/").status_code == 200
        assert is_hanging(hanging[-1])


@contextmanager
def another_proxy(production: Production, *changes: tuple[str, str]) -> Iterator[int]:
    """The same Caddyfile with changes, before the same processes; its port."""
    text = (PROJECT / "docker" / "Caddyfile").read_text()
    for old, new in changes:
        assert old in text
        text = text.replace(old, new)
    file, port = production.directory / "Caddyfile", row_of_free_ports(2)
    file.write_text(text)
    first = production.port + 4
    environment = {
        "SITE_ADDRESS": f"https://localhost:{port}",
        "HTTPS_PORT": str(port),
        "HTTP_PORT": str(port + 1),
        "PROXY_BIND": "127.0.0.1",
        "WEB_UPSTREAMS": f"to 127.0.0.1:{first} 127.0.0.1:{first + 1}",
        "LIVE_UPSTREAMS": f"to 127.0.0.1:{first + 2} 127.0.0.1:{first + 3}",
        "MEDIA_ROOT": str(production.directory / "media"),
        "XDG_DATA_HOME": str(production.directory),
        "XDG_CONFIG_HOME": str(production.directory),
    }
    command = [tool("caddy"), "run", "--config", str(file), "--adapter", "caddyfile"]
    with subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        try:
            wait_until(lambda: serves(production, port), "the other proxy serves")
            yield port
        finally:
            process.terminate()


def serves(production: Production, port: int, *, seconds: float = 10) -> bool:
    with production.http(timeout=seconds) as http, suppress(httpx2.TransportError):
        return http.get(f"https://localhost:{port}/accounts/login/").status_code == 200
    return False


def test_a_request_has_to_come_in_time_and_a_stream_goes_on(production: Production) -> None:
    """With two seconds in the place of ten and thirty: the senders are ended, who reads for longer is not."""
    session = production.in_shell(SIGN_IN)
    stream = f"GET /live/balance/ HTTP/1.1\r\nHost: localhost\r\nCookie: sessionid={session}\r\n\r\n"
    with (
        another_proxy(production, ("read_body 30s", "read_body 2s"), ("read_header 10s", "read_header 2s")) as port,
        senders(production, port, stream.encode()) as [reader],
        senders(production, port, HALF_A_HEADER, *(unfinished(kind, port) for kind in KINDS)) as hanging,
    ):
        wait_until(lambda: not any(is_hanging(connection) for connection in hanging), "all of them were ended")
        reader.settimeout(30)
        assert reader.recv(4_000).startswith(b"HTTP/1.1 200")
        with suppress(TimeoutError):
            while reader.recv(4_000):
                reader.settimeout(0.5)
            pytest.fail("the stream was ended, too")


def test_without_the_buffer_they_hold_every_thread(production: Production) -> None:
    """The control: the buffer is what keeps them away."""
    with another_proxy(production, ("request_buffers 3MB", "")) as port:
        with senders(production, port, *[unfinished("a form", port), unfinished("Stripe", port)] * SENDERS):
            assert not all(serves(production, production.port, seconds=3) for _ in range(5))
        wait_until(lambda: serves(production, production.port), "the processes are free again")


@pytest.fixture(scope="module")
def files(production: Production) -> dict[str, str]:
    """Somebody's session, and where files of theirs are: one that lies there, larger than all buffers on the way
    together, one that is written when it is asked for, and one that a form asks for."""
    return dict(production.in_shell(MAKE_FILES))


def taking(files: dict[str, str], port: int, path: str) -> bytes:
    return f"GET {path} HTTP/1.1\r\nHost: localhost:{port}\r\nCookie: sessionid={files['session']}\r\n\r\n".encode()


def test_a_page_is_answered_while_files_are_not_taken(production: Production, files: dict[str, str]) -> None:
    """Each has its beginning and takes no more of it. Who does take it gets all of it, with what a browser needs."""
    slow = [taking(files, production.port, files["image"])] * SENDERS + [
        taking(files, production.port, files["export"])
    ] * outgoing.AT_ONCE
    with senders(production, production.port, *slow) as readers:
        for reader in readers:
            assert reader.recv(15).startswith(b"HTTP/1.1 200")
        with production.http(timeout=20, cookies={"sessionid": files["session"]}) as http:
            for path in ("/studio/", "/tokens/", "/live/balance/"):
                with http.stream("GET", path) as answer:
                    assert answer.status_code == 200
            image = http.get(files["image"])
            assert hashlib.sha256(image.content).hexdigest() == files["digest"]
            assert image.headers["Content-Type"] == "image/png"
            assert image.headers["X-Content-Type-Options"] == "nosniff"
            assert image.headers["Cache-Control"] == "no-store, private"
            export = http.get(files["export"])
            assert export.headers["Content-Disposition"].startswith("attachment; filename=")
            assert export.text.count("\n") == int(files["entries"]) + 1
            page = http.get(files["form"]).text
            [token] = re.findall(r'name="csrfmiddlewaretoken" value="(\w+)"', page)[:1]
            archive = http.post(
                files["form"], data={"csrfmiddlewaretoken": token}, headers={"Referer": f"{production.url}/"}
            )
            assert archive.headers["Content-Type"] == "application/zip"
            assert "X-Accel-Redirect" not in archive.headers
            assert f"images/{files['name']}" in ZipFile(BytesIO(archive.content)).namelist()


def test_without_the_proxys_help_they_hold_every_thread(production: Production, files: dict[str, str]) -> None:
    """The control: a process that sends its files itself waits for those who take them."""
    with another_proxy(production, ("header_up X-Sendfile-Type X-Accel-Redirect", "")) as port:
        with senders(production, port, *[taking(files, port, files["image"])] * SENDERS):
            assert not all(serves(production, production.port, seconds=3) for _ in range(5))
        wait_until(lambda: serves(production, production.port), "the processes are free again")


MAKE_FILES = r"""
import hashlib, json, os
from types import SimpleNamespace
from allauth.account.internal.flows.login import record_authentication
from django.core.files.base import ContentFile
from django.db import connection
from django.test import Client
from accounts.models import User
from ai_ops import pieces
from ai_ops.models import GeneratedImage, ImageBatch
from billing import ledger
user = User.objects.get_or_create(email="reader@example.com")[0]
account = ledger.get_account(user_id=user.pk)
entries = 20_000
ledger.add_tokens(user_id=user.pk, tokens=1, type="bonus", description="Test", idempotency_key="test")
account.refresh_from_db()
with connection.cursor() as cursor:
    cursor.execute(
        "INSERT INTO billing_tokentransaction (account_id, user_id, workspace_id, sequence, type, amount,"
        " balance_before, balance_after, description, created_at)"
        " SELECT %s, %s, %s, %s + n, 'bonus', 1, %s + n - 1, %s + n, 'Number ' || n, clock_timestamp()"
        " FROM generate_series(1, %s) AS n",
        [account.pk, user.pk, account.workspace_id, account.sequence, account.balance, account.balance, entries],
    )
    cursor.execute(
        "UPDATE billing_tokenaccount SET balance = balance + %s, sequence = sequence + %s,"
        " lifetime_granted_tokens = lifetime_granted_tokens + %s WHERE id = %s",
        [entries, entries, entries, account.pk],
    )
project = pieces.get_project(user_id=user.pk, name="Slow")
batch = ImageBatch.objects.create(project=project, author=user, prompt="Slow", size="1024x1024", count=1, state="ready")
content = b"\x89PNG\r\n\x1a\n" + os.urandom(32 * 1024 * 1024)
image = GeneratedImage.objects.create(
    batch=batch, position=1, file=ContentFile(content, name="slow.png"), media_type="image/png"
)
client = Client()
client.force_login(user)
session = client.session
record_authentication(SimpleNamespace(session=session), user, method="password", reauthenticated=True)
session.save()
print(json.dumps({
    "session": session.session_key, "image": image.get_absolute_url(), "digest": hashlib.sha256(content).hexdigest(),
    "name": f"{batch.pk}-1.png", "export": "/tokens/export.csv", "entries": str(account.sequence + entries),
    "form": "/accounts/data/download/",
}))
"""

SIGN_IN = """
import json
from django.conf import settings
from django.test import Client
from accounts.models import User
client = Client()
client.force_login(User.objects.get_or_create(email="reader@example.com")[0])
print(json.dumps(client.session.session_key))
"""
