"""Runs the AI stand-in as a process of its own, as it runs in development."""

import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2

PROJECT = Path(__file__).parents[2]
DEADLINE_SECONDS = 60.0


@dataclass(frozen=True, slots=True)
class AiServer:
    """A running stand-in."""

    address: str

    def play(self, name: str, body: str | bytes, **options: Any) -> str:
        """Have the stand-in answer with `body`, and return the prompt's marker that asks for it. `options`: `status`,
        `type` (of the media), `then` ("end", "cut" or "stall")."""
        address = f"{self.address}/control/recordings/{name}"
        content = body.encode() if isinstance(body, str) else body
        httpx2.put(address, content=content, params=options, timeout=30).raise_for_status()
        return f"[[fault:recorded {name}]]"

    def requests(self, prompt: str) -> list[dict[str, Any]]:
        """The log entries of the requests whose last user message begins with `prompt`, oldest first."""
        response = httpx2.get(f"{self.address}/control/requests", timeout=30)
        return [entry for entry in response.json()["requests"] if entry["prompt"].startswith(prompt)]

    def wait_for(self, prompt: str, condition: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
        """The first request with this prompt that meets the condition; waits for it, but not for ever."""
        deadline = time.monotonic() + DEADLINE_SECONDS
        while time.monotonic() < deadline:
            for entry in self.requests(prompt):
                if condition(entry):
                    return entry
            time.sleep(0.01)
        raise AssertionError(f"no such request: {self.requests(prompt)}")


@contextmanager
def running_ai_standin(*, tokens_per_second: int = 20_000) -> Iterator[AiServer]:
    command = [sys.executable, "-m", "standins.ai", "--port", "0"]
    process = subprocess.Popen(
        [*command, "--tokens-per-second", str(tokens_per_second)],
        cwd=PROJECT,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert "http://" in line, f"the stand-in did not start: {line!r}"
        yield AiServer(line.split()[-1])
    finally:
        process.terminate()
        process.wait(DEADLINE_SECONDS)
