"""PostgreSQL stopped and started again under load. Row 74 of FAULTS.md."""

import json
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import httpx2
import pytest

from tests.faults.pair import Pair, until
from tests.faults.people import USER, Person, call, new_key, usage_of
from tests.payments import sign

API_TOKENS = 3  # what one call costs: two tokens × 1.5


@dataclass
class Load:
    """Clients that go on until they are told to stop, and note each answer and each key."""

    pair: Pair
    user_id: int
    answers: Counter[tuple[str, int]] = field(default_factory=Counter)
    unclean: list[str] = field(default_factory=list)
    errors: list[BaseException] = field(default_factory=list)
    used: list[str] = field(default_factory=list)
    settled: list[int] = field(default_factory=list)
    drafted: list[str] = field(default_factory=list)
    over: threading.Event = field(default_factory=threading.Event)

    def note(self, who: str, answer: httpx2.Response) -> int:
        self.answers[who, answer.status_code] += 1
        is_html, is_problem = (
            kind in answer.headers.get("content-type", "") for kind in ("text/html", "application/problem+json")
        )
        is_clean = answer.status_code < 500 or (
            answer.status_code == 503
            and int(answer.headers["retry-after"]) > 0
            and "Traceback" not in answer.text
            and {"page": is_html, "draft": is_html, "webhook": not is_html}.get(who, is_problem)
            and (not is_html or "We will be back in a moment" in answer.text)
        )
        if not is_clean:
            self.unclean.append(f"{who}: {answer.status_code} {answer.text[:2_000]}")
        return answer.status_code

    def until_done(self, who: str, ask: Callable[[], httpx2.Response]) -> httpx2.Response:
        """Repeat, as every client is told to, with the same key; but not for ever, should it never be back."""
        deadline = time.monotonic() + 90
        while self.note(who, answer := ask()) == 503 and time.monotonic() < deadline:
            self.over.wait(0.05)
        return answer

    # --- What each of them does once ---

    def record_usage(self) -> None:
        key = new_key()
        answer = self.until_done("usage", lambda: call(self.pair.web, "usage", usage_of(self.user_id), key))
        assert answer.status_code in (200, 201), answer.text
        self.used.append(key)

    def reserve_and_settle(self) -> None:
        key, about = new_key(), usage_of(self.user_id)
        about["max_output_tokens"] = about.pop("output_tokens")
        held = self.until_done("reserve", lambda: call(self.pair.web, "reservations", about, key))
        assert held.status_code in (200, 201), held.text
        usage_id = held.json()["usage"]["usage_id"]
        path, used = f"reservations/{usage_id}/settle", {"input_tokens": 1, "output_tokens": 1}
        settled = self.until_done("settle", lambda: call(self.pair.web, path, used, key))
        assert settled.json()["usage"]["billable_tokens"] == API_TOKENS, settled.text
        self.settled.append(usage_id)

    def visit(self, person: Person) -> None:
        assert self.note("page", person.get("/tokens/")) in (200, 503)

    def draft(self, person: Person) -> None:
        key = new_key()
        self.until_done("draft", lambda: person.draft(key, title=f"Green tea {key}"))
        self.drafted.append(key)

    def deliver(self, event: bytes) -> None:
        headers = {"content-type": "application/json"}

        def ask() -> httpx2.Response:
            return self.pair.web.post(
                "/stripe/webhook/", content=event, headers=headers | {"stripe-signature": sign(event)}, timeout=30
            )

        assert self.until_done("webhook", ask).status_code == 200

    def go_on(self, once: Callable[[], None]) -> threading.Thread:
        def run() -> None:
            try:
                while not self.over.is_set():
                    once()
            except BaseException as error:
                self.errors.append(error)
                raise

        thread = threading.Thread(target=run)
        thread.start()
        return thread

    def wait_for(self, more: int) -> None:
        """Until so many more calls were carried out."""
        done = len(self.used) + more
        until(lambda: len(self.used) >= done or self.errors, seconds=60)
        assert not self.errors

    def wait_for_refusals(self) -> None:
        """Until each kind of client was refused once more."""
        kinds = ("usage", "page", "webhook")
        before = {kind: self.answers[kind, 503] for kind in kinds}
        until(lambda: all(self.answers[kind, 503] > before[kind] for kind in kinds) or self.errors, seconds=60)
        assert not self.errors


@pytest.fixture
def payments(pair: Pair) -> list[bytes]:
    """The events of three purchases that are paid at Stripe and not credited yet."""
    person = Person(pair.web)
    person.sign_in()
    (package,) = pair.postgres.ask("SELECT id FROM billing_tokenpricing WHERE name = 'Starter'")
    for _ in range(3):
        answer = person.post("/tokens/checkout/", package_id=package["id"], checkout_key=new_key())
        pair.stripe.pay(answer.headers["location"])
        # Or the next click would lead to the same page.
        pair.postgres.ask("UPDATE billing_purchase SET state = 'processing' WHERE state = 'open'")
    newest_first = [each for each in pair.stripe.state()["events"] if each["type"] == "checkout.session.completed"]
    return [
        json.dumps({name: each[name] for name in each if name != "deliveries"}).encode() for each in newest_first[:3]
    ]


def test_restarted_and_crashed_under_load(pair: Pair, payments: list[bytes]) -> None:
    """Row 74: while it is away every answer is a clean 503 or a wait that ends well; when it is back the same
    processes go on, and every key was booked exactly once."""
    (user,) = pair.postgres.ask("SELECT id FROM accounts_user WHERE email = %s", USER)
    (before,) = pair.postgres.ask("SELECT balance FROM billing_tokenaccount WHERE user_id = %s", user["id"])
    credits_before = pair.count("billing_tokentransaction WHERE type = 'purchase'")
    load = Load(pair, user["id"])
    person, writer = Person(pair.web), Person(pair.live)
    person.sign_in()
    writer.sign_in()
    undelivered = iter(payments * 1_000)
    clients = [
        *(load.go_on(load.record_usage) for _ in range(3)),
        *(load.go_on(load.reserve_and_settle) for _ in range(2)),
        load.go_on(lambda: load.visit(person)),
        load.go_on(lambda: load.draft(writer)),
        load.go_on(lambda: load.deliver(next(undelivered))),
    ]
    try:
        load.wait_for(30)
        pair.postgres.restart("fast")
        load.wait_for(30)
        pair.postgres.restart("immediate")
        load.wait_for(30)
        pair.postgres.stop("immediate")
        load.wait_for_refusals()
        pair.postgres.start()
        load.wait_for(30)
    finally:
        load.over.set()
        for client in clients:
            client.join(60)
    assert not any(client.is_alive() for client in clients)
    assert not load.errors
    assert not load.unclean
    assert load.answers["page", 200]
    assert len(load.used) >= 120
    assert len(load.settled) > 20
    assert load.drafted

    # Every key once; what was refused or lost was not booked beside.
    rows = pair.postgres.ask("SELECT idempotency_key, count(*) AS n FROM billing_tokenusage GROUP BY 1")
    booked = {row["idempotency_key"]: row["n"] for row in rows}
    assert all(booked[key] == 1 for key in load.used + load.drafted)
    assert pair.count("billing_tokenusage WHERE idempotency_key LIKE 'faults-key-%%' AND status = 'reserved'") == 0
    assert pair.count("billing_tokentransaction WHERE type = 'purchase'") == credits_before + 3
    (after,) = pair.postgres.ask("SELECT balance FROM billing_tokenaccount WHERE user_id = %s", user["id"])
    (drafts,) = pair.postgres.ask(
        "SELECT coalesce(sum(billable_tokens), 0)::bigint AS tokens, count(nullif(billable_tokens, 0)) AS paid"
        " FROM billing_tokenusage WHERE idempotency_key = ANY(%s)",
        load.drafted,
    )
    assert drafts["paid"]
    calls = len(load.used) + len(load.settled)
    assert after["balance"] == before["balance"] + 3 * 150_000 - API_TOKENS * calls - drafts["tokens"]

    # The first outcome, again.
    for key in load.used[:: len(load.used) // 10]:
        assert call(pair.web, "usage", usage_of(user["id"]), key).status_code == 200


def test_a_text_that_ends_while_it_is_away(pair: Pair) -> None:
    """Row 74: the provider has written it, so it is kept and charged as soon as the database is back."""
    writer, key = Person(pair.live), new_key()
    writer.sign_in()
    with writer.stream_draft(key) as lines:
        while next(lines) != "event: text":
            pass
        pair.postgres.stop("immediate")
        try:
            # The control: it ended while nothing could be written.
            until(lambda: "An operation waits for the database to be closed" in pair.logged())
        finally:
            pair.postgres.start()
        assert "event: done" in list(lines)
    (usage,) = pair.postgres.ask("SELECT * FROM billing_tokenusage WHERE idempotency_key = %s", key)
    assert usage["status"] == "succeeded"
    assert usage["billable_tokens"] > 0
    (piece,) = pair.postgres.ask("SELECT * FROM ai_ops_contentpiece WHERE id = %s", usage["content_id"])
    assert piece["state"] == "ready"
    assert piece["body"]
    assert pair.count("ai_ops_contentversion WHERE piece_id = %s", piece["id"]) == 1


def test_idle_connections_of_a_server_that_was_restarted(pair: Pair) -> None:
    """Row 74: nobody gets a connection that died while nobody used it."""
    (user,) = pair.postgres.ask("SELECT id FROM accounts_user WHERE email = %s", USER)

    def use(_: int = 0) -> int:
        return call(pair.web, "usage", usage_of(user["id"]), new_key()).status_code

    with ThreadPoolExecutor(8) as clients:
        assert set(clients.map(use, range(40))) == {201}
        idle = "pg_stat_activity WHERE datname = 'postmate' AND state = 'idle'"
        assert pair.count(idle) > 3
        pair.postgres.restart("fast")
        assert set(clients.map(use, range(40))) == {201}
