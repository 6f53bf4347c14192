"""A crowd that works while production is restarted under it, and writes down whatever fails."""

import json
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import httpx2

from tests.production.conftest import Production, wait_until

PASSWORD = "an umbrella for the crowd"  # noqa: S105  (of people who live as long as the test)
PAUSE_SECONDS = 0.1  # between two requests of one member, so that two cores are enough for both sides
MODEL = {"provider": "openai", "model": "gpt-6-luna", "operation_type": "chat"}

MAKE_PEOPLE = f"""
import json
from allauth.account.models import EmailAddress
from accounts.models import User
from billing import ledger
ids = []
for number in range(4):
    user = User.objects.create_user(email=f"crowd{{number}}@example.com", password={PASSWORD!r})
    EmailAddress.objects.create(user=user, email=user.email, verified=True, primary=True)
    ledger.initialize_account(user_id=user.pk)
    ledger.add_tokens(user_id=user.pk, tokens=50_000_000, type="bonus", description="Crowd", idempotency_key="crowd")
    ids.append(user.pk)
print(json.dumps(ids))
"""


class Crowd:
    """People with browsers, and servers of the platform with the shared secret."""

    def __init__(self, production: Production) -> None:
        self.production = production
        self.user_ids: list[int] = production.in_shell(MAKE_PEOPLE)
        self.done: Counter[str] = Counter()
        self.failures: list[str] = []
        self.usage_keys: dict[str, dict[str, Any]] = {}  # each with the body that was sent under it
        self.settled_keys: list[str] = []
        self.draft_keys: list[str] = []
        self._stop = threading.Event()
        self._lock = threading.Lock()
        self._numbers = iter(range(10**9))
        self.reader, self.writer = self._sign_in(2), self._sign_in(3)

    @contextmanager
    def at_work(self) -> Iterator[None]:
        """Everybody works until the end of the context, which waits for what is under way."""
        self._stop.clear()
        members: list[Callable[[], None]] = [self._record_usage] * 2 + [self._reserve_and_settle] * 2
        members += [self._look_around] * 2 + [self._write_drafts] * 2
        threads = [threading.Thread(target=self._work, args=(member,), daemon=True) for member in members]
        # It has no end of its own, so nobody waits for it.
        watcher = threading.Thread(target=self._work, args=(self._watch_the_balance,), daemon=True)
        for thread in [*threads, watcher]:
            thread.start()
        try:
            yield
        finally:
            self._stop.set()
            for thread in threads:
                thread.join(120)
        assert not any(thread.is_alive() for thread in threads)

    def wait_for_more_of_everything(self, seconds: float = 60) -> None:
        """Until each kind of work has been done some more times."""
        goal = Counter({"usage": 20, "settled": 10, "page": 10, "draft": 2, "balance event": 1}) + self.done
        for kind in ("reconnect", "draft begun"):
            goal.pop(kind, None)
        wait_until(
            lambda: self.failures or all(self.done[kind] >= number for kind, number in goal.items()),
            "everybody got on with their work",
            seconds,
        )
        assert self.failures == [], self.failures[:5]

    def _work(self, member: Callable[[], None]) -> None:
        while not self._stop.is_set():
            try:
                member()
            except Exception as error:
                if not self._stop.is_set() or member != self._watch_the_balance:
                    self._fail(member.__name__, f"{type(error).__name__}: {error}")
                self._stop.wait(0.5)

    def _fail(self, what: str, why: str) -> None:
        with self._lock:
            self.failures.append(f"{what}: {why}")

    def _expect(self, response: httpx2.Response, *statuses: int) -> None:
        if response.status_code not in statuses:
            raise AssertionError(f"{response.request.url.path} answered {response.status_code} {response.text[:200]}")

    def _count(self, kind: str) -> None:
        with self._lock:
            self.done[kind] += 1

    def _next(self) -> int:
        with self._lock:
            return next(self._numbers)

    # --- Servers ------------------------------------------------------------------------------------------------

    def server(self) -> httpx2.Client:
        return self.production.http(headers={"Authorization": f"Bearer {self.production.secret('BILLING_SECRET')}"})

    def _record_usage(self) -> None:
        with self.server() as http:
            while not self._stop.wait(PAUSE_SECONDS):
                number = self._next()
                key, user_id = f"crowd-usage-{number}", self.user_ids[number % 2]
                body = {**MODEL, "user_id": user_id, "input_tokens": 100 + number % 7, "output_tokens": 20}
                self.usage_keys[key] = body
                self._expect(http.post("/api/v1/usage", json=body, headers={"Idempotency-Key": key}), 201)
                self._count("usage")

    def _reserve_and_settle(self) -> None:
        with self.server() as http:
            while not self._stop.wait(PAUSE_SECONDS):
                number = self._next()
                key = f"crowd-hold-{number}"
                body = {**MODEL, "user_id": self.user_ids[number % 2], "tokens": 900}
                held = http.post("/api/v1/reservations", json=body, headers={"Idempotency-Key": key})
                self._expect(held, 201)
                address = f"/api/v1/reservations/{held.json()['usage']['usage_id']}/settle"
                self._expect(http.post(address, json={"input_tokens": 300, "output_tokens": 50}), 200)
                self.settled_keys.append(key)
                self._count("settled")

    # --- People -------------------------------------------------------------------------------------------------

    def _sign_in(self, number: int) -> httpx2.Client:
        """A browser, signed in as one of the crowd through the form."""
        http = self.production.http(headers={"Referer": f"{self.production.url}/"})
        self._expect(http.get("/accounts/login/"), 200)
        form = {
            "login": f"crowd{number}@example.com",
            "password": PASSWORD,
            "csrfmiddlewaretoken": http.cookies["csrftoken"],
        }
        self._expect(http.post("/accounts/login/", data=form), 302)
        http.headers["X-CSRFToken"] = http.cookies["csrftoken"]
        return http

    def _look_around(self) -> None:
        while not self._stop.is_set():
            for path in ("/studio/", "/tokens/", "/tokens/history/", "/tokens/balance/"):
                self._expect(self.reader.get(path), 200)
                self._count("page")
                self._stop.wait(PAUSE_SECONDS)

    def _write_drafts(self) -> None:
        while not self._stop.wait(PAUSE_SECONDS):
            key = f"crowd-draft-{self._next():08}"
            form = {"idempotency_key": key, "title": key, "topic": "Umbrellas, and when to lend them."}
            form |= {"project": "Crowd", "model": "openai:gpt-6-luna", "tone": "friendly", "length": "medium"}
            headers = {"Accept": "text/event-stream"}
            with self.writer.stream("POST", "/live/draft/", data=form, headers=headers) as response:
                self._expect_stream(response)
                names = []
                for line in response.iter_lines():
                    if line.startswith("event: "):
                        names.append(line.removeprefix("event: "))
                        if names[-2:] == ["started", "text"]:
                            self._count("draft begun")
            if names[:1] != ["started"] or names[-1:] != ["done"] or "text" not in names:
                raise AssertionError(f"a draft's events were {dict(Counter(names))}")
            self.draft_keys.append(key)
            self._count("draft")

    def _watch_the_balance(self) -> None:
        """As a browser does: when the stream ends, it opens another."""
        while not self._stop.is_set():
            with self.writer.stream("GET", "/live/balance/") as response:
                self._expect_stream(response)
                for line in response.iter_lines():
                    if line == "event: balance":
                        self._count("balance event")
            self._count("reconnect")

    def _expect_stream(self, response: httpx2.Response) -> None:
        if response.status_code != 200:
            response.read()
        self._expect(response, 200)


def read_books(production: Production, keys: list[str]) -> dict[str, list[Any]]:
    """For each key, the states of its operations and how many ledger entries they made. Fails when a law is broken."""
    file = production.directory / "keys.json"
    file.write_text(json.dumps(keys))
    return production.in_shell(f"""
import json
from collections import defaultdict
from pathlib import Path
from django.core.management import call_command
from django.db.models import Count
from billing.models import TokenUsage
call_command("verify_ledger")
found = defaultdict(list)
wanted = json.loads(Path({str(file)!r}).read_text())
rows = TokenUsage.objects.filter(idempotency_key__in=wanted).annotate(entries=Count("tokentransaction"))
for key, status, entries in rows.values_list("idempotency_key", "status", "entries"):
    found[key].append([status, entries])
print(json.dumps(found))
""")
