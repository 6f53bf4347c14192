"""`make run-production` as a person starts it, in a data directory of its own."""

import json
import os
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest

from tests import databases
from tests.environment import free_port, given_ports
from tests.servers import PROJECT

START_SECONDS = 180
PORTS = 8  # in a row
# What a shell has; nothing of the test run's own settings.
SHELL = {name: os.environ[name] for name in ("PATH", "HOME", "LANG", "TMPDIR") if name in os.environ}


class Production:
    """One that runs, with the commands that an operator has."""

    def __init__(self, directory: Path, port: int) -> None:
        self.directory, self.port = directory, port
        self.url = f"https://localhost:{port}"
        self.environment = SHELL | {"POSTMATE_DATA_DIR": str(directory), "PORT": str(port), "DRAIN_SECONDS": "2"}
        self.output = directory / "terminal.txt"
        with self.output.open("wb") as output:
            self.process = subprocess.Popen(
                self._command(), cwd=PROJECT, env=self.environment, stdout=output, stderr=output
            )

    def _command(self, *arguments: str) -> list[str]:
        return [sys.executable, "-m", "postmate.local.run_production", *arguments]

    def run(self, *arguments: str, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
        """A command beside it; `env` in the place of what production was started with."""
        command = self._command(*arguments)
        return subprocess.run(
            command, cwd=PROJECT, env=env or self.environment, capture_output=True, text=True, timeout=240
        )

    def in_shell(self, code: str) -> Any:
        """What `manage.py shell` prints last, read as JSON."""
        done = self.run("manage", "shell", "--verbosity=0", "--command", code)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout.splitlines()[-1])

    def processes(self) -> dict[str, int]:
        """Their numbers, by name."""
        return json.loads((self.directory / "running.json").read_text())["processes"]

    def secret(self, name: str) -> str:
        return (self.directory / "secrets" / name).read_text()

    def http(self, **options: Any) -> httpx2.Client:
        """A browser, or a server, that trusts Caddy's certificate and nothing else."""
        trusted = ssl.create_default_context(
            cafile=str(self.directory / "caddy" / "pki" / "authorities" / "local" / "root.crt")
        )
        return httpx2.Client(base_url=self.url, verify=trusted, **({"timeout": 90} | options))

    def stop(self) -> int:
        """Ctrl-C, and its exit code."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGINT)
        try:
            return self.process.wait(120)
        finally:
            self.process.kill()


def wait_until(condition: Callable[[], Any], what: str, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"Not within {seconds} s: {what}"
        time.sleep(0.05)


def row_of_free_ports(length: int) -> int:
    """The first of so many free ports in a row."""
    for _ in range(50):
        first = free_port()
        row = range(first, first + length)
        if all(_is_free(port) for port in row):
            given_ports.update(row)
            return first
    raise RuntimeError("No row of free ports was found.")


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # closed connections that linger are no matter
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


@pytest.fixture(scope="session")
def production() -> Iterator[Production]:
    if not Path(sys.executable).with_name("caddy").exists() and shutil.which("caddy") is None:
        pytest.skip("NOT TESTED: there is no Caddy for this machine, so production is not run here.")
    directory = Path(tempfile.mkdtemp(prefix="postmate-production-"))
    databases.migrate_before_start(directory)
    running = Production(directory, row_of_free_ports(PORTS))
    try:
        wait_until(
            lambda: running.process.poll() is not None or "Ctrl-C stops everything" in running.output.read_text(),
            "production is up",
            START_SECONDS,
        )
        assert running.process.poll() is None, running.output.read_text()
        yield running
        assert running.stop() == 0, running.output.read_text()
        assert all(_is_free(port) for port in range(running.port, running.port + PORTS)), "something was left behind"
    finally:
        running.stop()
        shutil.rmtree(directory, ignore_errors=True)
