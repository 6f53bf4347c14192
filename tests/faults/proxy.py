"""Between the product and PostgreSQL: cuts a connection right before or right after a statement was carried out."""

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Literal
from urllib.parse import quote

from django.db import connection

READY = b"Z\x00\x00\x00\x05"  # the end of each answer of PostgreSQL: ReadyForQuery
CHUNK = 65_536

When = Literal["before", "after"]


@dataclass
class Proxy:
    """`cut` is armed for one statement: the next one whose bytes hold the marker. `cuts` counts what it did."""

    listener: socket.socket
    cuts: int = 0
    _marker: bytes = b""
    _when: When = "after"
    _lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def database_url(self) -> str:
        settings = connection.settings_dict
        password = f":{quote(settings['PASSWORD'], safe='')}" if settings["PASSWORD"] else ""
        port = self.listener.getsockname()[1]
        return f"postgresql://{settings['USER']}{password}@127.0.0.1:{port}/{settings['NAME']}"

    def cut(self, marker: bytes, when: When) -> None:
        """Lose the connection that carries the next statement with `marker`: before PostgreSQL gets it, or after
        PostgreSQL has carried it out, in place of its answer."""
        with self._lock:
            self._marker, self._when = marker, when

    def serve(self) -> None:
        with suppress(OSError):
            while True:
                client, _ = self.listener.accept()
                threading.Thread(target=self._carry, args=(client, _connect()), daemon=True).start()

    def _carry(self, client: socket.socket, server: socket.socket) -> None:
        back = threading.Thread(target=_copy, args=(server, client, swallow := threading.Event()), daemon=True)
        back.start()
        with client, server, suppress(OSError):
            while chunk := client.recv(CHUNK):
                when = self._take(chunk)
                if when == "after":
                    swallow.set()
                    server.sendall(chunk)
                    back.join()
                if when is not None:
                    break
                server.sendall(chunk)
            # Or PostgreSQL would keep the transaction open, with its locks, for a client that is gone.
            server.shutdown(socket.SHUT_RDWR)

    def _take(self, chunk: bytes) -> When | None:
        with self._lock:
            if not self._marker or self._marker not in chunk:
                return None
            self._marker = b""
            self.cuts += 1
            return self._when


def _connect() -> socket.socket:
    settings = connection.settings_dict
    host, port = settings["HOST"] or "/var/run/postgresql", int(settings["PORT"] or 5432)
    if not host.startswith("/"):
        return socket.create_connection((host, port))
    server = socket.socket(socket.AF_UNIX)
    server.connect(f"{host}/.s.PGSQL.{port}")
    return server


def _copy(server: socket.socket, client: socket.socket, swallow: threading.Event) -> None:
    """Carry answers until the end; once `swallow` is set, read one whole answer, carry nothing and end."""
    answer = b""
    with suppress(OSError):
        while chunk := server.recv(CHUNK):
            if not swallow.is_set():
                client.sendall(chunk)
                continue
            answer += chunk
            if READY in answer:
                break
    with suppress(OSError):
        client.shutdown(socket.SHUT_RDWR)


@contextmanager
def running() -> Iterator[Proxy]:
    """A proxy to the test database, on a port of its own."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        proxy = Proxy(listener)
        threading.Thread(target=proxy.serve, daemon=True).start()
        yield proxy
        listener.shutdown(socket.SHUT_RDWR)
