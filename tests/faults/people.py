"""Somebody at a browser and somebody at the API, over real HTTP, to a product that may have lost its servers."""

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from typing import Any

import httpx2

from billing.demo import DEMO_PASSWORD
from tests.environment import BILLING_SECRET
from tests.servers import Server

USER = "user@postmate.example"
_keys = count(1)


def new_key() -> str:
    return f"faults-key-{next(_keys):06}"


class Person:
    """At a browser: a session, and the token of its forms."""

    def __init__(self, server: Server) -> None:
        # A request that hangs fails the test; the product's own time-outs are far shorter.
        self.http = httpx2.Client(base_url=server.url, timeout=30, follow_redirects=False)

    def post(self, path: str, **fields: Any) -> httpx2.Response:
        return self.http.post(path, data=fields, headers={"X-CSRFToken": self.http.cookies["csrftoken"]})

    def get(self, path: str) -> httpx2.Response:
        return self.http.get(path)

    def sign_in(self, email: str = USER, password: str = DEMO_PASSWORD) -> httpx2.Response:
        self.http.get("/accounts/login/")
        return self.post("/accounts/login/", login=email, password=password)

    def draft(self, key: str, title: str = "Green tea") -> httpx2.Response:
        """A draft, run to its end as by a form without a script: the answer leads to the text's page."""
        return self.post("/live/draft/", **_draft(key, title, "short"))

    @contextmanager
    def stream_draft(self, key: str) -> Iterator[Iterator[str]]:
        """The lines of the events of a long draft, as a script reads them."""
        headers = {"X-CSRFToken": self.http.cookies["csrftoken"], "Accept": "text/event-stream"}
        form = _draft(key, "Green tea", "long")
        with self.http.stream("POST", "/live/draft/", data=form, headers=headers) as answer:
            assert answer.status_code == 200
            yield answer.iter_lines()


def _draft(key: str, title: str, length: str) -> dict[str, str]:
    about = {"title": title, "topic": "A letter about green tea.", "project": "Tea shop"}
    return about | {"model": "openai:gpt-6-luna", "tone": "friendly", "length": length, "idempotency_key": key}


def call(server: Server, path: str, body: dict[str, Any], key: str) -> httpx2.Response:
    """A call of the API by another server of the platform."""
    headers = {"authorization": f"Bearer {BILLING_SECRET}", "idempotency-key": key}
    return server.post(f"/api/v1/{path}", json=body, headers=headers, timeout=30)


def usage_of(user_id: int, *, output_tokens: int = 1) -> dict[str, Any]:
    about = {"user_id": user_id, "operation_type": "chat", "provider": "openai", "model": "gpt-6-luna"}
    return about | {"input_tokens": 1, "output_tokens": output_tokens}
