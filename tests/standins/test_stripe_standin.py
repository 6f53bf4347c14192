"""The Stripe stand-in driven by the unmodified SDK, as a real process with a real webhook receiver."""

from __future__ import annotations

import itertools
import json
import queue
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.parse import urlencode
from urllib.request import HTTPRedirectHandler, Request, build_opener

import pytest
import stripe

from tests.environment import free_port

SECRET = "whsec_test"  # noqa: S105 – of the tests alone
TIMEOUT_SECONDS = 20
_emails = (f"buyer{number}@example.com" for number in itertools.count())


class Receiver:
    """The application's side: verifies signatures, answers 200 or as told, remembers all it got."""

    def __init__(self) -> None:
        self.answers: list[int] = []
        self.queue: queue.Queue[tuple[int, stripe.Event]] = queue.Queue()
        self.seen: list[stripe.Event] = []
        receiver = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                event = stripe.Webhook.construct_event(body, self.headers["Stripe-Signature"], SECRET)
                status = receiver.answers.pop(0) if receiver.answers else 200
                self.send_response(status)
                self.end_headers()
                receiver.queue.put((status, event))

            def log_message(self, *args: Any) -> None:
                """Quiet."""

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self.server.server_port}/stripe/webhook/"

    def wait_for(self, kind: str, about: str, status: int = 200) -> Any:
        """The next event of this kind that names this object and was answered with this status."""
        deadline = time.monotonic() + TIMEOUT_SECONDS
        while True:
            answered, event = self.queue.get(timeout=max(0.01, deadline - time.monotonic()))
            self.seen.append(event)
            if event.type == kind and answered == status and about in str(event.data.object):
                return event


class _NoRedirects(HTTPRedirectHandler):
    def redirect_request(self, *args: Any) -> None:
        return None


@dataclass
class Standin:
    """A running stand-in, and the browser and SDK that talk to it."""

    url: str
    receiver: Receiver
    command: list[str]
    process: subprocess.Popen[bytes] = field(init=False)
    client: Any = field(init=False)  # StripeClient; the answers' unions would only cost casts here

    def start(self) -> None:
        """Start the process and wait until it answers."""
        self.process = subprocess.Popen(self.command, cwd=Path(__file__).parents[2], start_new_session=True)
        self.client = stripe.StripeClient(
            "sk_test_123",
            base_addresses={"api": self.url},
            max_network_retries=0,
            http_client=stripe.RequestsClient(timeout=TIMEOUT_SECONDS),
        )
        gate, deadline = threading.Event(), time.monotonic() + TIMEOUT_SECONDS
        while True:
            try:
                socket.create_connection(("127.0.0.1", int(self.url.rsplit(":", 1)[1])), 1).close()
                return
            except OSError:
                assert time.monotonic() < deadline
                assert self.process.poll() is None
                gate.wait(0.02)

    def stop(self) -> int:
        """SIGTERM, as `make run` does."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(TIMEOUT_SECONDS)

    def post(self, path: str, **fields: Any) -> tuple[int, str, str]:
        """As a browser does: status, Location, body."""
        url = path if path.startswith("http") else self.url + path
        request = Request(url, urlencode(fields).encode(), {"Accept": "application/json"})
        try:
            with build_opener(_NoRedirects).open(request, timeout=TIMEOUT_SECONDS) as answer:
                return answer.status, "", answer.read().decode()
        except HTTPError as answer:
            return answer.code, answer.headers.get("Location", ""), answer.read().decode()

    def control(self, path: str, **fields: Any) -> Any:
        """A control call that must succeed."""
        status, _, body = self.post(f"/control/{path}", **fields)
        assert status == 200, body
        return json.loads(body)

    def customer(self) -> Any:
        """A new customer."""
        return self.client.v1.customers.create({"email": next(_emails)})

    def session(self, customer: str, cents: int = 6500, **extra: Any) -> Any:
        """An open checkout as the application makes it."""
        product = {"name": "Pro", "description": "750,000 tokens"}
        price = {"currency": "usd", "unit_amount": cents, "product_data": product}
        params: dict[str, Any] = {
            "mode": "payment",
            "customer": customer,
            "line_items": [{"price_data": price, "quantity": 1}],
            "payment_intent_data": {"setup_future_usage": "off_session", "metadata": {"purchase": "7"}},
            "success_url": "http://127.0.0.1:8000/tokens/success/?session={CHECKOUT_SESSION_ID}",
            "cancel_url": "http://127.0.0.1:8000/tokens/",
            "metadata": {"purchase": "7"},
        }
        return self.client.v1.checkout.sessions.create(params | extra)

    def saved_card(self, number: str, *, authenticate: bool = False) -> tuple[str, str]:
        """A customer who paid once with this card; (customer, payment method)."""
        customer = self.customer().id
        session = self.session(customer)
        _, location, _ = self.post(session.url, card_number=number, expiry="12 / 34", cvc="123")
        if authenticate:
            assert location.startswith("/authenticate/pi_")
            _, location, _ = self.post(location, outcome="complete")
        assert location == f"http://127.0.0.1:8000/tokens/success/?session={session.id}"
        (method,) = self.client.v1.customers.payment_methods.list(customer).data
        return customer, method.id

    def charge_saved(self, customer: str, method: str, **options: Any) -> Any:
        """What auto-recharge does."""
        params: Any = {"amount": 1500, "currency": "usd", "customer": customer, "payment_method": method}
        return self.client.v1.payment_intents.create(params | {"off_session": True, "confirm": True}, options or None)


@pytest.fixture(scope="module")
def standin(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Standin]:
    port = str(free_port())
    receiver = Receiver()
    data = str(tmp_path_factory.mktemp("stripe") / "stripe.db")
    command = [sys.executable, "-m", "standins.stripe", "--port", port, "--data", data]
    running = Standin(
        f"http://127.0.0.1:{port}",
        receiver,
        [*command, "--webhook-url", receiver.url, "--webhook-secret", SECRET],
    )
    running.start()
    yield running
    assert running.stop() == 0
    receiver.server.shutdown()


def test_checkout_paid_on_the_page(standin: Standin) -> None:
    """Customer, checkout, payment; the event is signed, and session, intent, charge and card agree."""
    api, customer = standin.client.v1, standin.customer()
    assert standin.receiver.wait_for("customer.created", customer.id).request.idempotency_key
    session = standin.session(customer.id)
    assert session.payment_intent is None
    assert session.url.startswith(f"{standin.url}/c/pay/cs_test_")

    status, location, _ = standin.post(session.url, card_number="4242 4242 4242 4242", expiry="12/34", cvc="123")
    assert (status, location) == (303, f"http://127.0.0.1:8000/tokens/success/?session={session.id}")
    event = standin.receiver.wait_for("checkout.session.completed", session.id)
    assert event.api_version == stripe.api_version
    assert event.data.object["payment_status"] == "paid"
    assert event.data.object["amount_subtotal"] == 6500

    expand: Any = {"expand": ["payment_intent.latest_charge.balance_transaction", "line_items", "customer"]}
    paid = api.checkout.sessions.retrieve(session.id, expand)
    assert paid.status == "complete"
    assert paid.customer.id == customer.id
    assert paid.line_items.data[0].description == "Pro"
    intent = paid.payment_intent
    assert intent.metadata["purchase"] == "7"
    assert intent.status == "succeeded"
    assert intent.amount_received == 6500
    assert intent.latest_charge.payment_method_details.card.last4 == "4242"
    assert intent.latest_charge.balance_transaction.net == 6500 - 189 - 30
    listed = api.payment_intents.list({"customer": customer.id, "created": {"gte": intent.created}})
    assert [found.id for found in listed.data] == [intent.id]
    assert not listed.has_more
    assert standin.post(f"/c/pay/{session.id}", test_card="4242424242424242")[0] == 409  # one session, one payment
    assert not [name for name in paid.to_dict() if name.startswith("_")]  # our own notes stay on the server


def test_strict_about_parameters(standin: Standin) -> None:
    """What the SDK's types do not list is refused with Stripe's own words; so are wrong types and keys."""
    api = standin.client.v1
    create: Callable[[Any], Any] = api.payment_intents.create
    good = {"amount": 1500, "currency": "usd"}
    for params, code, param in (
        (good | {"foo": 1}, "parameter_unknown", "foo"),
        (good | {"payment_method_types": ["card"]}, "parameter_unknown", "payment_method_types"),
        ({"currency": "usd"}, "parameter_missing", "amount"),
        (good | {"amount": "15.00"}, "parameter_invalid_integer", "amount"),
        (good | {"setup_future_usage": "offsession"}, None, "setup_future_usage"),
        (good | {"customer": "cus_nobody"}, "resource_missing", "customer"),
        (good | {"metadata": {"note": "x" * 501}}, "parameter_invalid_string_too_long", "metadata[note]"),
    ):
        with pytest.raises(stripe.InvalidRequestError) as refused:
            create(params)
        assert (refused.value.code, refused.value.param, refused.value.http_status) == (code, param, 400)
    with pytest.raises(stripe.InvalidRequestError) as nested:
        standin.session(standin.customer().id, line_items=[{"price_data": {"currency": "usd", "sum": 1}}])
    assert nested.value.param == "line_items[0][price_data][sum]"
    with pytest.raises(stripe.InvalidRequestError, match="No such customer") as missing:
        api.customers.retrieve("cus_nobody")
    assert missing.value.http_status == 404
    with pytest.raises(stripe.AuthenticationError):
        api.customers.list(options={"api_key": "sk_live_real"})


def test_idempotency_keys(standin: Standin) -> None:
    """Same key: same answer, also after a restart; other parameters: an error; in use: 409."""
    create, options = standin.client.v1.customers.create, {"idempotency_key": "k1"}
    first = create({"email": "same@example.com"}, options)
    again = create({"email": "same@example.com"}, options)
    assert again.id == first.id
    assert again.last_response.headers["idempotent-replayed"] == "true"
    with pytest.raises(stripe.IdempotencyError):
        create({"email": "other@example.com"}, options)
    with pytest.raises(stripe.InvalidRequestError):  # refused before execution: the key stays free
        create({"nonsense": 1}, {"idempotency_key": "k2"})
    assert create({"email": "two@example.com"}, {"idempotency_key": "k2"}).id

    standin.control("faults", kind="500_after", path_prefix="/v1/customers")
    broken: Any = ({"email": "five@example.com"}, {"idempotency_key": "k5"})
    for _ in range(2):  # results of 5xx are kept, although the customer exists
        with pytest.raises(stripe.APIError) as error:
            create(*broken)
        assert error.value.http_status == 500
    assert len(standin.client.v1.customers.list({"email": "five@example.com"}).data) == 1

    standin.control("faults", kind="slow", path_prefix="/v1/customers", seconds=5)
    outcomes: list[Any] = []

    def attempt() -> None:
        try:
            outcomes.append(create({"email": "race@example.com"}, {"idempotency_key": "k3"}).email)
        except stripe.APIError as refused:
            outcomes.append(refused.code or refused.http_status)

    threads = [threading.Thread(target=attempt) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(TIMEOUT_SECONDS)
    assert sorted(map(str, outcomes)) in (
        ["409", "race@example.com"],
        ["idempotency_key_in_use", "race@example.com"],
    )

    assert standin.stop() == 0
    standin.start()
    assert standin.client.v1.customers.create({"email": "same@example.com"}, options).id == first.id


def test_declined_cards_keep_the_checkout_open(standin: Standin) -> None:
    """The page says why; another card pays the same session with the same payment intent."""
    customer = standin.customer().id
    session = standin.session(customer)
    status, _, page = standin.post(session.url, card_number="4000000000009995", expiry="12/34", cvc="123")
    assert status == 402
    assert "insufficient funds" in page
    failed = standin.receiver.wait_for("payment_intent.payment_failed", customer).data.object
    assert failed["last_payment_error"]["decline_code"] == "insufficient_funds"
    assert standin.client.v1.checkout.sessions.retrieve(session.id).status == "open"
    assert standin.post(session.url, card_number="4242424242424242", expiry="01/20", cvc="123")[0] == 402

    _, bank_page, _ = standin.post(session.url, test_card="4000002760003184")
    assert standin.post(bank_page, outcome="fail")[1] == f"/c/pay/{session.id}"
    _, location, _ = standin.post(session.url, test_card="5555555555554444")
    assert location.endswith(session.id)
    paid = standin.client.v1.checkout.sessions.retrieve(session.id)
    assert paid.payment_intent == failed["id"]
    assert paid.payment_status == "paid"
    expired = standin.client.v1.checkout.sessions.expire(standin.session(customer).id)
    assert standin.post(f"/c/pay/{expired.id}", test_card="4242424242424242")[0] == 409


def test_saved_cards_off_session(standin: Standin) -> None:
    """A good card pays; others raise a card error that carries the payment intent, also when replayed."""
    customer, method = standin.saved_card("4242424242424242")
    assert standin.charge_saved(customer, method).status == "succeeded"
    customer, method = standin.saved_card("4000002500003155", authenticate=True)
    assert standin.charge_saved(customer, method).status == "succeeded"

    for number, authenticate, code in (
        ("4000000000000341", False, "card_declined"),
        ("4000002760003184", True, "authentication_required"),
    ):
        customer, method = standin.saved_card(number, authenticate=authenticate)
        intents = set()
        for _ in range(2):
            with pytest.raises(stripe.CardError) as declined:
                standin.charge_saved(customer, method, idempotency_key=f"charge-{method}")
            assert declined.value.code == code
            assert declined.value.http_status == 402
            carried: Any = declined.value.error
            intents.add(carried.payment_intent.id)
        (intent_id,) = intents
        failed = standin.receiver.wait_for("payment_intent.payment_failed", intent_id)
        assert failed.data.object["status"] == "requires_payment_method"

    confirmed = standin.client.v1.payment_intents.confirm(
        intent_id, {"payment_method": method, "return_url": "http://127.0.0.1:8000/tokens/"}
    )
    assert confirmed.status == "requires_action"
    assert standin.post(confirmed.next_action.redirect_to_url.url, outcome="complete")[0] == 303
    assert standin.client.v1.payment_intents.retrieve(intent_id).status == "succeeded"
    standin.client.v1.payment_methods.detach(method)
    with pytest.raises(stripe.InvalidRequestError, match="may not be used again"):
        standin.charge_saved(customer, method)


def test_a_timeout_after_the_charge_leaves_one_charge(standin: Standin) -> None:
    """The caller hears nothing, the money has moved; the same key tells what happened."""
    customer, method = standin.saved_card("4242424242424242")
    standin.control("faults", kind="timeout_after", path_prefix="/v1/payment_intents", method="POST")
    impatient: Any = stripe.StripeClient(
        "sk_test_123", base_addresses={"api": standin.url}, http_client=stripe.RequestsClient(timeout=1)
    )
    params: Any = {
        "amount": 1500,
        "currency": "usd",
        "customer": customer,
        "payment_method": method,
        "confirm": True,
    }
    with pytest.raises(stripe.APIConnectionError):
        impatient.v1.payment_intents.create(params, {"idempotency_key": "lost"})
    found = standin.client.v1.payment_intents.create(params, {"idempotency_key": "lost"})
    assert found.status == "succeeded"
    assert found.last_response.headers["idempotent-replayed"] == "true"
    assert len(standin.client.v1.charges.list({"customer": customer, "limit": 100}).data) == 2  # checkout and this


def test_refunds_and_disputes(standin: Standin) -> None:
    """Refunds up to the charge and no further; a failed one comes back; disputes open and close."""
    api = standin.client.v1
    intent = standin.charge_saved(*standin.saved_card("4242424242424242"))
    api.refunds.create({"payment_intent": intent.id, "amount": 500})
    with pytest.raises(stripe.InvalidRequestError, match="greater than unrefunded"):
        api.refunds.create({"payment_intent": intent.id, "amount": 1001})
    rest = api.refunds.create({"charge": str(intent.latest_charge), "reason": "requested_by_customer"})
    amounts = [standin.receiver.wait_for("charge.refunded", intent.id).data.object["amount_refunded"] for _ in range(2)]
    assert rest.amount == 1000
    assert sorted(amounts) == [500, 1500]
    with pytest.raises(stripe.InvalidRequestError) as over:
        api.refunds.create({"payment_intent": intent.id})
    assert over.value.code == "charge_already_refunded"
    standin.control(f"refunds/{rest.id}/fail")
    standin.receiver.wait_for("refund.failed", rest.id)
    assert api.charges.retrieve(str(intent.latest_charge)).amount_refunded == 500

    dispute = standin.control(f"payments/{intent.id}/dispute")
    assert dispute["status"] == "needs_response"
    assert dispute["amount"] == 1000
    assert standin.control(f"disputes/{dispute['id']}/close", outcome="won")["status"] == "won"
    standin.receiver.wait_for("charge.dispute.funds_reinstated", dispute["id"])
    assert [found.id for found in api.disputes.list({"payment_intent": intent.id}).data] == [dispute["id"]]


def test_delayed_bank_debit(standin: Standin) -> None:
    """Checkout completes unpaid; the money comes, or does not, later."""
    for outcome, status in (("succeeded", "paid"), ("failed", "unpaid")):
        session = standin.session(standin.customer().id)
        assert standin.post(session.url, test_card="bank_debit")[0] == 303
        event = standin.receiver.wait_for("checkout.session.completed", session.id)
        assert event.data.object["payment_status"] == "unpaid"
        standin.control(f"payments/{event.data.object['payment_intent']}/settle", outcome=outcome)
        settled = standin.receiver.wait_for(f"checkout.session.async_payment_{outcome}", session.id)
        assert settled.data.object["payment_status"] == status


def test_webhooks_are_retried_duplicated_and_reordered(standin: Standin) -> None:
    """A 500 is tried again with the same event; held ones come in the order asked for, dropped ones never."""
    standin.receiver.answers = [500]
    name = re.sub("@.*", "@retry.example", next(_emails))
    customer = standin.client.v1.customers.create({"email": name})
    refused = standin.receiver.wait_for("customer.created", customer.id, status=500)
    assert standin.receiver.wait_for("customer.created", customer.id).id == refused.id

    standin.control(f"events/{refused.id}/duplicate", count=3)
    assert {standin.receiver.wait_for("customer.created", customer.id).id for _ in range(3)} == {refused.id}

    standin.control("deliveries/hold")
    made = [standin.customer().id for _ in range(3)]
    released = standin.control("deliveries/release", order="reverse")["released"]
    arrived = [standin.receiver.queue.get(timeout=TIMEOUT_SECONDS)[1] for _ in released]
    assert [event.id for event in arrived] == released
    assert [event.data.object["id"] for event in arrived][:3] == made[::-1]

    standin.control("deliveries/drop", count=1)
    lost, kept = standin.customer().id, standin.customer().id
    standin.receiver.wait_for("customer.created", kept)
    assert not any(lost in str(event.data.object) for event in standin.receiver.seen)
    found = standin.client.v1.events.list({"type": "customer.*", "limit": 2})
    assert found.has_more
    assert [event.data.object["id"] for event in found.data] == [kept, lost]


def test_chaos_repeats_itself(standin: Standin) -> None:
    """The same seed gives the same objects the same faults, in whatever order they come; another seed gives others."""
    emails = [f"storm{number}@example.com" for number in range(24)]

    def storm(seed: int, emails: list[str]) -> tuple[dict[str, str], dict[str, list[str]]]:
        """For each email how its call ended, and what became of the deliveries of its event."""
        standin.control("reset")
        standin.control("deliveries/hold")
        standin.control("chaos", seed=seed, lose=0.3, duplicate=0.3, reorder=0.5, fail=0.4)

        def call(email: str) -> str:
            # The answer that comes too late is given up, as an impatient caller does.
            options = {"Authorization": "Bearer sk_test_1", "Idempotency-Key": f"{seed}-{email}"}
            request = Request(f"{standin.url}/v1/customers", urlencode({"email": email}).encode(), options)
            try:
                with build_opener().open(request, timeout=3) as answer:
                    return str(answer.status)
            except HTTPError as answer:
                return str(answer.code)
            except TimeoutError:
                return "late"

        with ThreadPoolExecutor(len(emails)) as callers:
            answers = dict(zip(emails, callers.map(call, emails), strict=True))
        state = json.loads(build_opener().open(f"{standin.url}/control/state").read())
        deliveries = {
            event["data"]["object"]["email"]: [each["state"] for each in event["deliveries"]]
            for event in state["events"]
        }
        return answers, deliveries

    answers, deliveries = storm(7, emails)
    assert set(answers.values()) == {"200", "429", "500", "late"}
    assert sorted(map(tuple, {*map(tuple, deliveries.values())})) == [
        ("dropped",),
        ("pending",),
        ("pending", "pending"),
    ]
    # Of what failed, some was done all the same.
    assert {answers[email] for email in deliveries} == {"200", "500", "late"}
    assert storm(7, emails[::-1]) == (answers, deliveries)
    assert storm(8, emails)[0] != answers

    assert standin.control("chaos")["fail"] == 0
    assert standin.post("/control/chaos", fail="1.5")[0] == 400
    standin.control("reset")
    assert standin.customer().id
