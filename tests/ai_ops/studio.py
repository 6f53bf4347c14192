"""Somebody at the Studio, over real HTTP, and what the AI stand-in was asked meanwhile."""

import json
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from itertools import count
from typing import Any

import httpx2
import pytest
from django.test import Client

from accounts.models import User
from ai_ops.models import ContentPiece
from billing import ledger
from billing.models import TokenAccount, TokenTransaction, TokenUsage
from tests.servers import Server

OPENAI, ANTHROPIC, GOOGLE = "openai:gpt-6-luna", "anthropic:claude-haiku-5-5", "google:gemini-3.8-flash"
each_provider = pytest.mark.parametrize("model", [OPENAI, ANTHROPIC, GOOGLE])

# What has no length yet: the stand-in tells a request by its title, the keys of one run differ.
_numbers = count(1)


def until(condition: Callable[[], Any], *, seconds: float = 30) -> Any:
    """The first true value of `condition`; fails when there is none in time."""
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < deadline, "It did not happen in time."
        time.sleep(0.02)
    return value


@dataclass(frozen=True, slots=True)
class Event:
    name: str
    data: dict[str, Any]


def events_of(lines: Iterator[str]) -> Iterator[Event]:
    """The server-sent events in the lines of an answer."""
    name = ""
    for line in lines:
        key, _, value = line.partition(": ")
        if key == "event":
            name = value
        elif key == "data":
            yield Event(name, json.loads(value))


@dataclass(slots=True)
class Answer:
    status_code: int
    events: list[Event] = field(default_factory=list)
    refusal: dict[str, Any] = field(default_factory=dict)

    @property
    def names(self) -> list[str]:
        """The events in their order, a run of texts named once."""
        return list(dict.fromkeys(event.name for event in self.events))

    @property
    def text(self) -> str:
        return "".join(event.data["text"] for event in self.events if event.name == "text")

    @property
    def last(self) -> Event:
        return self.events[-1]


class Writer:
    """Somebody at the Studio's form, signed in, with a script in front of it."""

    def __init__(self, user: User, server: Server) -> None:
        self.user = user
        session = Client()
        session.force_login(user)
        self.http = httpx2.Client(
            base_url=server.url, cookies={"sessionid": session.cookies["sessionid"].value}, timeout=30
        )
        page = self.http.get("/tokens/")
        assert page.status_code == 200
        self.http.headers["X-CSRFToken"] = self.http.cookies["csrftoken"]

    @staticmethod
    def form(**changes: Any) -> dict[str, Any]:
        """The fields of a draft's form."""
        number = next(_numbers)
        return {
            "idempotency_key": f"tests-key-{number:08}",
            "title": f"Green tea {number}",
            "topic": "A letter about green tea to people who drink coffee.",
            "project": "Tea shop",
            "model": OPENAI,
            "tone": "friendly",
            "length": "medium",
        } | changes

    def open_draft(self, **form: Any) -> AbstractContextManager[httpx2.Response]:
        return self.open("draft", **self.form(**form))

    def draft(self, **form: Any) -> Answer:
        return self.run("draft", **self.form(**form))

    @contextmanager
    def open(self, operation: str, **form: Any) -> Iterator[httpx2.Response]:
        data = {"idempotency_key": f"tests-key-{next(_numbers):08}", "model": OPENAI} | form
        headers = {"Accept": "text/event-stream"}
        with self.http.stream("POST", f"/live/{operation}/", data=data, headers=headers) as response:
            yield response

    def run(self, operation: str, **form: Any) -> Answer:
        """Run an operation to its end, as a script does."""
        with self.open(operation, **form) as response:
            if response.headers["Content-Type"].startswith("text/event-stream"):
                return Answer(response.status_code, list(events_of(response.iter_lines())))
            response.read()
            return Answer(response.status_code, refusal=response.json())

    def quote(self, operation: str, **form: Any) -> str:
        """The quote's partial."""
        response = self.http.post(f"/studio/quote/{operation}/", data={"model": OPENAI} | form)
        assert response.status_code == 200
        return response.text

    @property
    def account(self) -> TokenAccount:
        return ledger.get_account(user_id=self.user.pk)

    @property
    def usage(self) -> TokenUsage:
        """The newest operation."""
        return TokenUsage.objects.filter(user=self.user).latest("id")

    @property
    def piece(self) -> ContentPiece:
        return ContentPiece.objects.filter(author=self.user).latest("id")

    @property
    def entry(self) -> TokenTransaction:
        """The newest ledger row."""
        return TokenTransaction.objects.filter(user=self.user).latest("id")


def asked(ai: Server, title: str) -> list[dict[str, Any]]:
    """What the providers were asked for under this title."""
    requests = ai.get("/control/requests").raise_for_status().json()["requests"]
    return [request for request in requests if f"Title: {title}\n" in request["prompt"]]
