"""Who sends slowly, or never to the end, keeps nobody waiting but themselves (row 130)."""

import socket
import ssl
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import httpx2
import pytest

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


SIGN_IN = """
import json
from django.conf import settings
from django.test import Client
from accounts.models import User
client = Client()
client.force_login(User.objects.get_or_create(email="reader@example.com")[0])
print(json.dumps(client.session.session_key))
"""
