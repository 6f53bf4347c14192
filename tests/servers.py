"""The servers that tests start as processes of their own: the product and the stand-ins, over real HTTP."""

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any
from urllib.parse import quote

import httpx2
from django.db import connection

from tests.environment import AI_PORT, STRIPE_PORT, WEB_PORT, WEBHOOK_SECRET

PROJECT = Path(__file__).parents[1]
START_TIMEOUT_SECONDS = 60


@dataclass(frozen=True, slots=True)
class Server:
    """A running server. `url` has no slash at its end."""

    url: str
    process: subprocess.Popen[bytes]

    def get(self, path: str, **options: Any) -> httpx2.Response:
        return httpx2.get(self.url + path, **{"timeout": 30, **options})

    def post(self, path: str, **options: Any) -> httpx2.Response:
        return httpx2.post(self.url + path, **{"timeout": 30, **options})


class StripeStandIn(Server):
    """The Stripe stand-in, with what a buyer and its control page do."""

    def pay(self, checkout_url: str, test_card: str = "4242424242424242", **fields: str) -> httpx2.Response:
        """Pay on the Checkout page, as its button does; the answer is the redirect back, or the page with its error."""
        return httpx2.post(checkout_url, data={"test_card": test_card} | fields, timeout=30)

    def control(self, path: str, **parameters: Any) -> Any:
        """Do what a button of the control page does: `control("deliveries/hold")`."""
        response = self.post(f"/control/{path}", json=parameters)
        response.raise_for_status()
        return response.json()

    def state(self) -> Any:
        """What it holds: payment_intents, refunds, disputes, sessions, events, succeeded_charges …"""
        return self.get("/control/state", params={"limit": 1_000}).raise_for_status().json()


@contextmanager
def running(
    command: list[str],
    *,
    url: str,
    ready_path: str,
    server: type[Server] = Server,
    program: str = sys.executable,
    log: IO[str] | None = None,
    **environment: Any,
) -> Iterator[Any]:
    """Run a server until the end of the context; wait until `ready_path` answers. `log` takes what it prints."""
    if _answers(url + ready_path):
        raise RuntimeError(f"Another server answers at {url} already; {command} would not be the one that is tested.")
    process = subprocess.Popen(
        [program, *command], cwd=PROJECT, env={**os.environ, **environment}, stdout=log, stderr=log
    )
    try:
        deadline = time.monotonic() + START_TIMEOUT_SECONDS
        while not _answers(url + ready_path):
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"{command} did not start (exit code {process.poll()}).")
            time.sleep(0.02)
        yield server(url, process)
    finally:
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _answers(url: str) -> bool:
    try:
        return httpx2.get(url, timeout=10).status_code < 500
    except httpx2.TransportError:
        return False


def running_stripe(*, port: int = STRIPE_PORT, web_port: int = WEB_PORT, data: str = ":memory:", **options: Any) -> Any:
    command = ["-m", "standins.stripe", "--port", str(port), "--data", data]
    command += [
        "--webhook-url",
        f"http://127.0.0.1:{web_port}/stripe/webhook/",
        "--webhook-secret",
        WEBHOOK_SECRET,
    ]
    return running(
        command, url=f"http://127.0.0.1:{port}", ready_path="/control/state", server=StripeStandIn, **options
    )


def running_ai(*, port: int = AI_PORT, **options: Any) -> Any:
    command = ["-m", "standins.ai", "--port", str(port), "--tokens-per-second", "1200"]
    return running(command, url=f"http://127.0.0.1:{port}", ready_path="/control/requests", **options)


def _test_database_url() -> str:
    settings = connection.settings_dict
    host, port = quote(settings["HOST"], safe=""), settings["PORT"] or 5432
    password = f":{quote(settings['PASSWORD'], safe='')}" if settings["PASSWORD"] else ""
    return f"postgresql://{settings['USER']}{password}@{host}:{port}/{settings['NAME']}"


@contextmanager
def running_worker(*, log: IO[str] | None = None, **environment: str) -> Iterator[subprocess.Popen[bytes]]:
    """A Celery worker on the test database. What is sent while it starts waits for it in the queue. `log` takes what
    it prints, `environment` changes its settings."""
    command = [sys.executable, "-m", "celery", "--quiet", "-A", "postmate", "worker"]
    command += ["--pool", "threads", "--concurrency", "2"]
    command += ["--loglevel", "WARNING", "--without-gossip", "--without-mingle", "--without-heartbeat"]
    environment = {**os.environ, "DATABASE_URL": _test_database_url(), **environment}
    process = subprocess.Popen(command, cwd=PROJECT, env=environment, stdout=log, stderr=log)
    try:
        yield process
    finally:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def running_live(*, port: int, **environment: Any) -> Any:
    """The process of the streams on the test database, as production serves it; it answers all else, too."""
    return running(
        ["-m", "postmate.serving", "live", "--port", str(port)],
        url=f"http://127.0.0.1:{port}",
        ready_path="/readyz",
        **({"DATABASE_URL": _test_database_url(), "DRAIN_SECONDS": "0.1"} | environment),
    )


def running_web(*, port: int = WEB_PORT, **environment: Any) -> Any:
    """The product on the test database, as `make run` serves it; `environment` changes its settings."""
    command = ["-m", "uvicorn", "postmate.asgi:application", "--port", str(port), "--lifespan", "off"]
    command += ["--log-level", "warning", "--timeout-graceful-shutdown", "2"]
    return running(
        command,
        url=f"http://127.0.0.1:{port}",
        ready_path="/readyz",
        server=Server,
        **({"DATABASE_URL": _test_database_url()} | environment),
    )
