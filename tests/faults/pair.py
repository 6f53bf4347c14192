"""A PostgreSQL and a Redis of their own, to be stopped under load, and the product's processes on them."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import psycopg
import redis
from psycopg.rows import dict_row

from postmate.local import embedded, keeper
from tests import databases, servers
from tests.environment import free_port
from tests.servers import PROJECT, Server, StripeStandIn


@dataclass
class Postgres:
    directory: Path
    url: str = ""

    def start(self) -> None:
        self.url = embedded.start_postgres(self.directory)

    def stop(self, mode: str) -> None:
        """`fast` ends every connection; `immediate` is a crash."""
        with (self.directory / "postgresql.lock").open() as lock:
            keeper.end(lock, signal.SIGINT if mode == "fast" else signal.SIGQUIT)

    def restart(self, mode: str) -> None:
        self.stop(mode)
        self.start()

    def ask(self, query: str, *parameters: Any) -> list[dict[str, Any]]:
        with psycopg.connect(self.url, row_factory=dict_row, autocommit=True) as connection:
            cursor = connection.execute(query, parameters)
            return cursor.fetchall() if cursor.description else []


@dataclass
class Redis:
    directory: Path
    process: subprocess.Popen[bytes] | None = None

    @property
    def socket(self) -> Path:
        return embedded.redis_socket(self.directory)

    @property
    def url(self) -> str:
        return f"unix://{self.socket}?db=0"

    def start(self) -> None:
        """Empty: what it knew is lost, the worst that a restart does."""
        self.process = subprocess.Popen(
            [embedded.redis_program(), "--port", "0", "--unixsocket", str(self.socket), "--save", ""],
            cwd=self.directory, stdout=subprocess.DEVNULL,
        )  # fmt: skip
        with redis.Redis.from_url(self.url) as client:
            until(lambda: _answers(client))

    def kill(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None
            self.socket.unlink(missing_ok=True)

    def hang(self) -> None:
        """It takes connections and answers nobody."""
        assert self.process is not None
        self.process.send_signal(signal.SIGSTOP)

    def go_on(self) -> None:
        assert self.process is not None
        self.process.send_signal(signal.SIGCONT)


def _answers(client: redis.Redis) -> bool:
    try:
        return bool(client.ping())
    except redis.RedisError:
        return False


def until(condition: Any, *, seconds: float = 40) -> Any:
    """The first true value of `condition`; fails when there is none in time."""
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < deadline, "It did not happen in time."
        time.sleep(0.05)
    return value


@dataclass
class Pair:
    """The two servers, the product on them, and the stand-ins. `web` is WSGI, `live` ASGI: it serves all of it."""

    postgres: Postgres
    redis: Redis
    log: IO[str]
    environment: dict[str, Any] = field(default_factory=dict)
    web: Server = None  # type: ignore[assignment]
    live: Server = None  # type: ignore[assignment]
    stripe: StripeStandIn = None  # type: ignore[assignment]
    crew: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    def manage(self, *arguments: str) -> str:
        """What a management command prints. Raises when it fails."""
        done = subprocess.run(
            [sys.executable, "manage.py", *arguments], cwd=PROJECT, env=os.environ | self.environment,
            capture_output=True, text=True, timeout=120, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def count(self, query: str, *parameters: Any) -> int:
        (row,) = self.postgres.ask(f"SELECT count(*) AS n FROM {query}", *parameters)  # noqa: S608
        return int(row["n"])

    def logged(self) -> str:
        return Path(self.log.name).read_text(errors="replace")


PREPARE = """
from django.core.management import call_command
call_command("seed_billing")
call_command("seed_demo")
"""


@contextmanager
def running(directory: Path) -> Iterator[Pair]:
    """All of it, on a database with packages, models and the demo people, until the end of the context."""
    with ExitStack() as stack:
        postgres, memory = Postgres(directory), Redis(directory)
        databases.migrate_before_start(directory)
        postgres.start()
        stack.callback(lambda: postgres.stop("immediate"))
        memory.start()
        stack.callback(memory.kill)
        log = stack.enter_context((directory / "product.log").open("w"))
        pair = Pair(postgres, memory, log)
        # Ports of its own: the servers of other tests may still run.
        live_port, stripe_port, ai_port = free_port(), free_port(), free_port()
        pair.environment = {
            "PORT": str(live_port),
            "SITE_URL": f"http://127.0.0.1:{live_port}",
            "STRIPE_API_BASE": f"http://127.0.0.1:{stripe_port}",
            "OPENAI_BASE_URL": f"http://127.0.0.1:{ai_port}/openai/v1",
            "ANTHROPIC_BASE_URL": f"http://127.0.0.1:{ai_port}/anthropic",
            "GOOGLE_GEMINI_BASE_URL": f"http://127.0.0.1:{ai_port}/google",
            "POSTMATE_DATA_DIR": str(directory),
            "DATABASE_URL": postgres.url,
            "REDIS_URL": memory.url,
            "DATABASE_POOL_SIZE": "20",
            "DATABASE_TIMEOUT_SECONDS": "3",
            "LOG_FORMAT": "json",
        }
        pair.manage("shell", "-c", PREPARE)
        live = "-m uvicorn postmate.asgi:application --lifespan off --log-level warning --timeout-graceful-shutdown 2"
        web = "-m granian postmate.wsgi:application --interface wsgi --blocking-threads 8 --log-level warning"
        worker = "worker --pool threads --concurrency 2 --loglevel WARNING --without-gossip --without-mingle"
        for name, command in (("worker", worker), ("beat", f"beat --loglevel WARNING -s {directory}/beat")):
            pair.crew[name] = stack.enter_context(_celery(pair, command))
        starting = (
            servers.running_stripe(port=stripe_port, web_port=live_port, log=log),
            servers.running_ai(port=ai_port, log=log),
            _serving(pair, live, live_port),
            _serving(pair, web, free_port()),
        )
        with ThreadPoolExecutor() as threads:
            pair.stripe, _, pair.live, pair.web = threads.map(lambda context: context.__enter__(), starting)
        for context in starting:
            stack.push(context)
        pair.stripe.control("deliveries/hold")
        yield pair


def _serving(pair: Pair, command: str, port: int) -> Any:
    return servers.running(
        [*command.split(), "--host", "127.0.0.1", "--port", str(port)],
        url=f"http://127.0.0.1:{port}", ready_path="/readyz", log=pair.log, **pair.environment,
    )  # fmt: skip


@contextmanager
def _celery(pair: Pair, command: str) -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen(
        [sys.executable, "-m", "celery", "-A", "postmate", *command.split()],
        cwd=PROJECT, env=os.environ | pair.environment, stdout=pair.log, stderr=pair.log,
    )  # fmt: skip
    try:
        yield process
    finally:
        process.kill()  # nothing of its is needed any more, and both servers may be gone
        process.wait()
