"""The programs of a storm: started as processes of their own, killed without warning, started again."""

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import httpx2

from tests.environment import STRIPE_PORT, WEB_PORT, WEBHOOK_SECRET

PROJECT = Path(__file__).parents[2]
START_TIMEOUT_SECONDS = 60
STRIPE_URL, WEB_URL = f"http://127.0.0.1:{STRIPE_PORT}", f"http://127.0.0.1:{WEB_PORT}"


class Program:
    """One of our own processes. What it says goes to its log."""

    def __init__(self, name: str, *arguments: str, logs: Path) -> None:
        self.name, self.arguments, self.log = name, arguments, logs / f"{name}.log"
        self.kills = 0
        self.log.write_text("")
        self.start()

    def start(self) -> None:
        with self.log.open("a") as log:
            self.process = subprocess.Popen(
                [sys.executable, *self.arguments], cwd=PROJECT, env=os.environ, stdout=log, stderr=log
            )

    def kill_and_restart(self) -> None:
        """kill -9 in the middle of whatever it does."""
        self.process.kill()
        self.process.wait()
        self.kills += 1
        self.start()

    def stop(self) -> None:
        self.process.terminate()
        try:
            self.process.wait(5)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


@contextmanager
def running(logs: Path, *, workers: int) -> Iterator[list[Program]]:
    """The stand-in, the web process and the workers, which are yielded but for the stand-in; all are stopped."""
    logs.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:

        def run(name: str, *arguments: str) -> Program:
            program = Program(name, *arguments, logs=logs)
            stack.callback(program.stop)
            return program

        run(
            *("stripe", "-m", "standins.stripe", "--port", str(STRIPE_PORT), "--data", ":memory:"),
            *("--webhook-url", f"{WEB_URL}/stripe/webhook/", "--webhook-secret", WEBHOOK_SECRET),
        )
        web = run(
            *("web", "-m", "uvicorn", "postmate.asgi:application", "--port", str(WEB_PORT), "--lifespan", "off"),
            *("--log-level", "warning", "--timeout-graceful-shutdown", "2"),
        )
        worker_command = ("-m", "celery", "--quiet", "-A", "postmate", "worker", "--pool", "threads")
        worker_options = ("--concurrency", "4", "--loglevel", "WARNING", "--without-gossip", "--without-mingle")
        crew = [
            run(f"worker{number}", *worker_command, *worker_options, "--hostname", f"storm{number}@%h")
            for number in range(1, workers + 1)
        ]
        for address in (f"{STRIPE_URL}/control/state", f"{WEB_URL}/readyz"):
            wait_until_ready(address)
        yield [web, *crew]


def wait_until_ready(address: str) -> None:
    """Raises TimeoutError when it does not answer."""
    deadline = time.monotonic() + START_TIMEOUT_SECONDS
    while time.monotonic() < deadline:
        try:
            if httpx2.get(address, timeout=5).status_code == 200:
                return
        except httpx2.TransportError:
            pass
        time.sleep(0.1)
    raise TimeoutError(f"{address} does not answer.")
