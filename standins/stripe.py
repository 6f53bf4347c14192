"""A local, stateful and strict stand-in for Stripe.

It speaks Stripe's wire protocol to the unmodified stripe-python SDK, so the application cannot tell the
difference: API, hosted Checkout and billing portal, signed webhooks with retries, plus a control page
(`/control`) for what a real account cannot be told to do on demand. Run it with

    python -m standins.stripe --port 8010 --data FILE --webhook-url URL --webhook-secret whsec_...

Everything runs on one event loop and every change happens inside `Store.transaction`, so an operation, its
events and its idempotency record are committed together or not at all. Fields whose names begin with an
underscore are ours and never leave the server.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import hashlib
import hmac
import json
import random
import re
import signal
import sqlite3
import string
import sys
import threading
import time
import types
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from decimal import Decimal, InvalidOperation
from functools import cache
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints
from urllib.parse import parse_qsl, urlencode, urlsplit

import stripe.params as p
import stripe.params.billing_portal as portal
import stripe.params.checkout as checkout
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, RedirectResponse, Response
from starlette.routing import Route
from stripe import RequestOptions
from stripe._api_version import _ApiVersion
from typing_extensions import is_typeddict

from standins import stripe_pages as pages

API_VERSION = _ApiVersion.CURRENT
DAY_SECONDS = 86_400
SHORTEST_SESSION_SECONDS = 1_800
SMALLEST_AMOUNT_CENTS, LARGEST_AMOUNT_CENTS = 50, 99_999_999
WEBHOOK_TIMEOUT_SECONDS = 20
WEBHOOK_ATTEMPTS = 15
WEBHOOK_BACKOFF_CAP_SECONDS = 60
WEBHOOK_CONCURRENCY = 8
# code → per cent off, where a session allows promotion codes
PROMOTION_CODES = {"FREE100": 100, "SAVE20": 20}

Object = dict[str, Any]
Params = dict[str, Any]


def now() -> int:
    """Stripe's clock: whole seconds."""
    return int(time.time())


# ----------------------------------------------------------------------------------------------------
# Errors


class StripeError(Exception):
    """An answer other than 2xx, in Stripe's shape. `keep_changes`: what it did stands (declines)."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        type: str = "invalid_request_error",
        code: str | None = None,
        param: str | None = None,
        keep_changes: bool = False,
        **extra: Any,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.keep_changes = status, message, keep_changes
        shape = {"code": code, "message": message, "param": param, "type": type, **extra}
        self.error = {name: value for name, value in shape.items() if value is not None}


def invalid(message: str, param: str | None = None, code: str | None = None) -> StripeError:
    """A 400 about one parameter."""
    return StripeError(400, message, param=param, code=code)


def unsupported(param: str) -> StripeError:
    """Real Stripe could do it, we cannot: say so instead of pretending."""
    return invalid(f"The local Stripe stand-in does not support this use of `{param}`.", param)


# ----------------------------------------------------------------------------------------------------
# Parameters: parsed from forms as Stripe does, then checked against the types the SDK itself publishes


def parse_form(encoded: str) -> Params:
    """`a[b][0][c]=x` → {"a": {"b": {"0": {"c": "x"}}}}; lists keep their indexes until checked."""
    root: Params = {}
    for key, value in parse_qsl(encoded, keep_blank_values=True, encoding="utf-8", errors="strict"):
        if not re.fullmatch(r"[^\[\]]+(\[[^\[\]]*\])*", key):
            raise invalid(f"Received unknown parameter: {key}", key, "parameter_unknown")
        *parents, last = [part.rstrip("]") for part in key.split("[")]
        node = root
        for name in parents:
            node = node.setdefault(name or str(len(node)), {})
            if not isinstance(node, dict):
                raise invalid(f"Invalid parameter: {key}", key)
        node[last or str(len(node))] = value
    return root


@cache
def fields_of(typed_dict: type) -> dict[str, Any]:
    """The parameters a TypedDict of the SDK knows, with their types; the SDK's own call options are none."""
    names = {"StripeContext": object, "Mapping": Mapping}
    hints = get_type_hints(typed_dict, localns=names)
    return {name: hint for name, hint in hints.items() if name not in RequestOptions.__annotations__}


def check_fields(given: Any, typed_dict: type, path: str = "") -> Params:
    """Refuse unknown and missing parameters, convert the others; recursive through nested TypedDicts."""
    if not isinstance(given, dict):
        raise invalid("Invalid object", path)
    known = fields_of(typed_dict)
    at = (lambda name: f"{path}[{name}]") if path else (lambda name: name)
    for name in given:
        if name not in known:
            raise invalid(f"Received unknown parameter: {at(name)}", at(name), "parameter_unknown")
    for name in sorted(typed_dict.__required_keys__ & known.keys()):  # type: ignore[attr-defined]
        if name not in given:
            raise invalid(f"Missing required param: {at(name)}.", at(name), "parameter_missing")
    return {name: check(value, known[name], at(name)) for name, value in given.items()}


def check(value: Any, hint: Any, path: str) -> Any:
    """One parameter, converted to the Python type its hint names, or a 400."""
    origin = get_origin(hint)
    if origin in (Union, types.UnionType):
        return check_union(value, get_args(hint), path)
    if is_typeddict(hint):
        return check_fields(value, hint, path)
    if origin is list:
        return check_list(value, get_args(hint)[0], path)
    if origin is dict:
        return check_dict(value, get_args(hint)[1], path)
    if not isinstance(value, str):
        raise invalid(f"Invalid string: {value}", path)
    if origin is Literal:
        return check_choice(value, get_args(hint), path)
    return check_scalar(value, hint, path)


def check_union(value: Any, members: tuple[Any, ...], path: str) -> Any:
    """An enumeration that the SDK leaves open (`Literal[…] | str`) is closed here, to catch slips."""
    if isinstance(value, dict):
        nested = [m for m in members if is_typeddict(m) or get_origin(m) in (list, dict)]
        return check(value, nested[0] if nested else str, path)
    choices = [choice for m in members if get_origin(m) is Literal for choice in get_args(m)]
    if value in choices:
        return value
    if any(choices) and bool in members and value in ("true", "false"):
        return value == "true"
    if any(choices):
        return check_choice(value, tuple(filter(None, choices)), path)
    scalars = [m for m in members if m in (int, bool, Decimal, str)]
    if not scalars:
        raise invalid("Invalid object", path)
    return check(value, scalars[0], path)


def check_list(value: Any, hint: Any, path: str) -> list[Any]:
    """`a[0]`, `a[1]`, … or `a[]`."""
    if not isinstance(value, dict) or not all(index.isdecimal() for index in value):
        raise invalid("Invalid array", path)
    in_order = sorted(value.items(), key=lambda item: int(item[0]))
    return [check(item, hint, f"{path}[{index}]") for index, item in in_order]


def check_dict(value: Any, hint: Any, path: str) -> Params:
    """Free keys: metadata, with the sizes Stripe allows."""
    if not isinstance(value, dict):
        raise invalid("Invalid object", path)
    checked = {name: check(item, hint, f"{path}[{name}]") for name, item in value.items()}
    if path.endswith(("metadata", "metadata]")):
        if len(checked) > 50:
            raise invalid("Metadata can have up to 50 keys.", path)
        for name, text in checked.items():
            if len(name) > 40 or len(text) > 500:
                message = "Metadata keys can have up to 40 characters, values up to 500."
                raise invalid(message, f"{path}[{name}]", "parameter_invalid_string_too_long")
    return checked


def check_choice(value: str, choices: tuple[str, ...], path: str) -> str:
    """A closed enumeration."""
    if value not in choices:
        raise invalid(f"Invalid {path}: must be one of {', '.join(choices)}", path)
    return value


def check_scalar(value: str, hint: Any, path: str) -> Any:
    """int, bool, Decimal or text from its form encoding; nothing is rounded or guessed."""
    if hint is int:
        if not re.fullmatch(r"-?[0-9]{1,18}", value):
            raise invalid(f"Invalid integer: {value}", path, "parameter_invalid_integer")
        return int(value)
    if hint is bool:
        if value not in ("true", "false"):
            raise invalid(f"Invalid boolean: {value}", path)
        return value == "true"
    if hint is Decimal:
        with contextlib.suppress(InvalidOperation):
            if (number := Decimal(value)).is_finite():
                return str(number)
        raise invalid(f"Invalid decimal: {value}", path)
    return value


def need(params: Params, name: str) -> Any:
    """A parameter that Stripe requires although the SDK's types (which serve several modes) do not."""
    if params.get(name) in (None, "", []):
        raise invalid(f"Missing required param: {name}.", name, "parameter_missing")
    return params[name]


# ----------------------------------------------------------------------------------------------------
# Test cards


@dataclass(frozen=True)
class TestCard:
    """How a card behaves: `ok`, `processing`, `authenticate`, or the name of a decline."""

    number: str
    brand: str
    label: str
    token: str
    on_session: str
    off_session: str
    remembers_authentication: bool

    def outcome(self, *, off_session: bool, set_up: bool) -> str:
        """What confirming a payment with this card leads to."""
        if self.remembers_authentication and set_up:
            return "ok"
        return self.off_session if off_session else self.on_session


BANK_DEBIT, LINK = "bank_debit", "link"
_NO, _POOR, _SCA = "generic_decline", "insufficient_funds", "authentication_required"
_CARD_ROWS = (  # number, brand, label, Stripe's test name, on and off session, remembers authentication
    ("4242424242424242", "visa", "Succeeds", "pm_card_visa", "ok", "ok", False),
    ("5555555555554444", "mastercard", "Succeeds", "pm_card_mastercard", "ok", "ok", False),
    ("4000000000000002", "visa", "Declined", "pm_card_chargeDeclined", _NO, _NO, False),
    (
        "4000000000009995",
        "visa",
        "Insufficient funds",
        "pm_card_chargeDeclinedInsufficientFunds",
        _POOR,
        _POOR,
        False,
    ),
    (
        "4000002500003155",
        "visa",
        "3-D Secure once",
        "pm_card_authenticationRequiredOnSetup",
        "authenticate",
        _SCA,
        True,
    ),
    (
        "4000002760003184",
        "visa",
        "3-D Secure always",
        "pm_card_authenticationRequired",
        "authenticate",
        _SCA,
        False,
    ),
    ("4000000000000341", "visa", "Saved, later declined", "pm_card_chargeCustomerFail", "ok", _NO, False),
    (LINK, "", "Link", "pm_link", "ok", "ok", False),
    (BANK_DEBIT, "", "Delayed bank debit", "pm_usBankAccount_success", "processing", "processing", False),
)
CARDS = {row[0]: TestCard(*row) for row in _CARD_ROWS}
CARDS_BY_TOKEN = {card.token: card for card in CARDS.values()}

DECLINES = {  # decline code → error code and what the buyer reads
    _NO: ("card_declined", "Your card was declined."),
    _POOR: ("card_declined", "Your card has insufficient funds."),
    "stolen_card": ("card_declined", "Your card was declined."),
    _SCA: (_SCA, "Your card was declined. This transaction requires authentication."),
    "authentication_failed": (
        "payment_intent_authentication_failure",
        "We are unable to authenticate your payment method. Please choose a different payment method and try again.",
    ),
    "debit_not_authorized": ("payment_intent_payment_attempt_failed", "The bank debit was returned unpaid."),
}


def card_problem(number: str, expiry: str, cvc: str) -> StripeError | None:
    """What the card form itself would complain about, before any bank is asked."""
    month, _, year = expiry.replace(" ", "").partition("/")
    dated = month.isdecimal() and year.isdecimal() and 1 <= int(month) <= 12
    problem = None
    if number not in CARDS:
        problem = "card_declined", "Your card was declined: only the test cards listed below work here."
    elif not dated:
        problem = "invalid_expiry_year", "Your card's expiration date is invalid."
    elif f"20{int(year) % 100:02}{int(month):02}" < time.strftime("%Y%m"):
        problem = "invalid_expiry_year", "Your card's expiration date is in the past."
    elif not re.fullmatch("[0-9]{3,4}", cvc):
        problem = "invalid_cvc", "Your card's security code is invalid."
    return StripeError(402, problem[1], type="card_error", code=problem[0]) if problem else None


# ----------------------------------------------------------------------------------------------------
# State


SCHEMA = """
CREATE TABLE IF NOT EXISTS objects (
    seq INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT UNIQUE, type TEXT, created INTEGER, json TEXT);
CREATE INDEX IF NOT EXISTS by_type ON objects (type, seq);
CREATE INDEX IF NOT EXISTS by_customer ON objects (type, json_extract(json, '$.customer'));
CREATE INDEX IF NOT EXISTS by_payment ON objects (type, json_extract(json, '$.payment_intent'));
CREATE INDEX IF NOT EXISTS by_status ON objects (type, json_extract(json, '$.status'));
CREATE TABLE IF NOT EXISTS idempotency (
    key TEXT PRIMARY KEY, fingerprint TEXT, status INTEGER, body TEXT, request_id TEXT);
CREATE TABLE IF NOT EXISTS deliveries (
    id INTEGER PRIMARY KEY AUTOINCREMENT, event TEXT, state TEXT DEFAULT 'pending',
    attempts INTEGER DEFAULT 0, next_attempt_at REAL, answer TEXT DEFAULT '');
CREATE INDEX IF NOT EXISTS by_state ON deliveries (state, next_attempt_at);
CREATE INDEX IF NOT EXISTS by_event ON deliveries (event);
CREATE TABLE IF NOT EXISTS settings (name TEXT PRIMARY KEY, value INTEGER);
"""


class Store:
    """Objects as JSON in one SQLite file, so that they survive a restart of `make run`."""

    def __init__(self, path: str) -> None:
        self.db = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
        self.db.row_factory = sqlite3.Row
        self.db.executescript(f"PRAGMA journal_mode=WAL; PRAGMA synchronous=NORMAL; {SCHEMA}")
        self._lock, self._depth = threading.RLock(), 0

    @contextlib.contextmanager
    def transaction(self) -> Iterator[None]:
        """All or nothing, nestable; a StripeError that keeps its changes (a decline) commits."""
        with self._lock:
            self._depth += 1
            point = f"level_{self._depth}"
            self.db.execute(f"SAVEPOINT {point}")
            try:
                yield
            except BaseException as error:
                if not (isinstance(error, StripeError) and error.keep_changes):
                    self.db.execute(f"ROLLBACK TO {point}")
                raise
            finally:
                self.db.execute(f"RELEASE {point}")
                self._depth -= 1

    def rows(self, sql: str, *values: Any) -> list[sqlite3.Row]:
        """All rows of a query."""
        with self._lock:
            return self.db.execute(sql, values).fetchall()

    def put(self, obj: Object) -> Object:
        """Insert or update."""
        self.rows(
            "INSERT INTO objects (id, type, created, json) VALUES (?, ?, ?, ?)"
            " ON CONFLICT (id) DO UPDATE SET json = excluded.json",
            obj["id"],
            obj["object"],
            obj.get("created", now()),
            json.dumps(obj),
        )
        return obj

    def get(self, object_id: str) -> Object | None:
        """One object by id."""
        found = self.rows("SELECT json FROM objects WHERE id = ?", object_id)
        return json.loads(found[0]["json"]) if found else None

    def find(
        self, kind: str, *conditions: tuple[str, Any], limit: int = -1, oldest_first: bool = False
    ) -> list[Object]:
        """Objects of a kind, newest first. A condition: SQL with one `?`, or a field that must be equal."""
        clauses, values = ["type = ?"], [kind]
        for condition, value in conditions:
            clauses.append(condition if "?" in condition else f"json_extract(json, '$.{condition}') = ?")
            values.append(value)
        order = "ASC" if oldest_first else "DESC"
        where = " AND ".join(clauses)  # built from our own field names only
        sql = f"SELECT json FROM objects WHERE {where} ORDER BY seq {order} LIMIT ?"  # noqa: S608 – our own names and constants, no input
        return [json.loads(row["json"]) for row in self.rows(sql, *values, limit)]

    def setting(self, name: str) -> int:
        """A number that survives restarts; 0 when never set."""
        found = self.rows("SELECT value FROM settings WHERE name = ?", name)
        return int(found[0]["value"]) if found else 0

    def set_setting(self, name: str, value: int) -> None:
        """Write such a number."""
        self.rows("INSERT OR REPLACE INTO settings VALUES (?, ?)", name, value)


def public(value: Any) -> Any:
    """What may leave the server: everything but our own underscored fields."""
    if isinstance(value, dict):
        return {name: public(item) for name, item in value.items() if not name.startswith("_")}
    return [public(item) for item in value] if isinstance(value, list) else value


# ----------------------------------------------------------------------------------------------------
# Chaos: faults drawn by chance, repeatably


CHAOS_FAULTS = ("500", "500_after", "429", "timeout_after")
CHAOS_HOLD_SECONDS = 5  # an answer that comes too late
CHAOS_DELAY_SECONDS = 4.0  # at most, of a delivery that others overtake


@dataclass
class Chaos:
    """How likely a delivery is lost, doubled or late, and a call fails; all 0: never.

    A draw depends on the seed, on whose object and what is done with it, and on how often that was done before. The
    same seed repeats the same faults, whatever else happens meanwhile and in which order.
    """

    seed: int = 0
    lose: float = 0.0
    duplicate: float = 0.0
    reorder: float = 0.0
    fail: float = 0.0
    done: Counter[str] = field(default_factory=Counter, init=False)
    _times: Counter[str] = field(default_factory=Counter, init=False)

    def __bool__(self) -> bool:
        return any((self.lose, self.duplicate, self.reorder, self.fail))

    def draw(self, identity: str, purpose: str) -> float:
        """A number from 0 up to 1, the same for the same seed and arguments."""
        digest = hashlib.sha256(f"{self.seed}|{identity}|{purpose}".encode()).digest()
        return int.from_bytes(digest[:6]) / 2**48

    def happens(self, chance: float, identity: str, purpose: str) -> bool:
        """Whether it happens this time; counted in `done`."""
        is_drawn = self.draw(identity, purpose) < chance
        self.done[purpose] += is_drawn
        return is_drawn

    def occurrence(self, owner: str, what: str) -> str:
        """The identity of this time that `what` is done for its owner: the first, the second …"""
        self._times[f"{owner}|{what}"] += 1
        return f"{owner}|{what}|{self._times[f'{owner}|{what}']}"

    def deliveries(self, identity: str) -> list[tuple[str, float]]:
        """What becomes of an event's delivery: for each copy its state, and how many seconds late it is."""
        if self.happens(self.lose, identity, "lost"):
            return [("dropped", 0.0)]
        copies = 2 if self.happens(self.duplicate, identity, "duplicated") else 1
        late = [self.happens(self.reorder, f"{identity}|{copy}", "delayed") for copy in range(copies)]
        return [
            ("pending", is_late * CHAOS_DELAY_SECONDS * self.draw(f"{identity}|{copy}", "delay"))
            for copy, is_late in enumerate(late)
        ]

    def fault(self, identity: str) -> str:
        """The kind of fault that a call suffers, mostly none."""
        if self.draw(identity, "fails") >= self.fail:
            return ""
        kind = CHAOS_FAULTS[int(self.draw(identity, "kind") * len(CHAOS_FAULTS))]
        self.done[kind] += 1
        return kind

    def summary(self) -> Object:
        """Its settings, and how often each thing was done."""
        names = ("seed", "lose", "duplicate", "reorder", "fail")
        return {name: getattr(self, name) for name in names} | {"done": dict(self.done)}


# ----------------------------------------------------------------------------------------------------
# The account


@dataclass
class Call:
    """The API request being carried out: events name it, and hosted pages live on the host it came to."""

    id: str | None = None
    idempotency_key: str | None = None
    base_url: str = ""
    forced_outcome: str | None = None


EXPANDABLE = {
    "balance_transaction",
    "charge",
    "customer",
    "default_payment_method",
    "latest_charge",
    "line_items",
    "payment_intent",
    "payment_method",
    "price",
    "product",
    "refunds",
    "setup_intent",
}


class Account:
    """One Stripe test account: its objects, and all that can happen to them. Call it inside a transaction."""

    def __init__(self, store: Store, wake_courier: Callable[[], None], *, webhook_url: str, seed: int | None) -> None:
        self.store, self.wake_courier = store, wake_courier
        self.webhook_url, self.deliver = webhook_url, bool(webhook_url)
        made_so_far = store.rows("SELECT coalesce(max(seq), 0) FROM objects")[0][0]
        self.random = random.SystemRandom()
        if seed is not None:
            self.random = random.Random(f"{seed}:{made_so_far}")  # type: ignore[assignment]
        self.call = Call()
        self.chaos = Chaos()
        self.reset_webhook_endpoint()

    def reset_webhook_endpoint(self) -> None:
        """As Stripe tells of one that gets all events. What it says here changes nothing in how events are sent."""
        self.webhook_endpoint: Object = {
            "id": "we_standin",
            "object": "webhook_endpoint",
            "api_version": API_VERSION,
            "created": now(),
            "enabled_events": ["*"],
            "livemode": False,
            "metadata": {},
            "status": "enabled",
            "url": self.webhook_url,
        }

    # -- plumbing

    def new_id(self, prefix: str) -> str:
        """`cus_` and 24 letters or digits."""
        return prefix + "".join(self.random.choices(string.ascii_letters + string.digits, k=24))

    def new(self, kind: str, prefix: str, **fields: Any) -> Object:
        """A stored object with what all of Stripe's have."""
        common: Object = {"id": self.new_id(prefix), "object": kind, "created": now(), "livemode": False}
        return self.store.put({**common, "metadata": {}, **fields})

    def load(self, kind: str, object_id: str, param: str | None = None) -> Object:
        """The object, else 404 (named in the address, `param` None) or 400 (named by a parameter)."""
        found = self.store.get(object_id)
        if found is None or found["object"] != kind or (param and found.get("deleted")):
            raise StripeError(
                400 if param else 404,
                f"No such {kind}: '{object_id}'",
                code="resource_missing",
                param=param or "id",
            )
        return found

    def emit(self, kind: str, obj: Object, previous: Object | None = None) -> Object:
        """Record an event with a snapshot of the object and queue its delivery."""
        data: Object = {"object": public(obj)}
        if previous:
            data["previous_attributes"] = public(previous)
        request = {"id": self.call.id, "idempotency_key": self.call.idempotency_key}
        event: Object = {
            "id": self.new_id("evt_"),
            "object": "event",
            "api_version": API_VERSION,
            "created": now(),
        }
        event |= {"data": data, "livemode": False, "pending_webhooks": int(self.deliver), "request": request}
        self.store.put(event | {"type": kind})
        if self.deliver:
            self.queue(event["id"])
        return event

    def queue(self, event_id: str) -> None:
        """One more delivery of an event, due at once unless chaos has it otherwise."""
        deliveries = [("pending", 0.0)]
        if self.chaos:
            event = self.store.get(event_id) or {}
            owner = self.owner_of(event["data"]["object"])
            deliveries = self.chaos.deliveries(self.chaos.occurrence(owner, event["type"]))
        for state, seconds in deliveries:
            sql = "INSERT INTO deliveries (event, state, next_attempt_at) VALUES (?, ?, ?)"
            self.store.rows(sql, event_id, state, time.time() + seconds)
        self.wake_courier()

    def owner_of(self, *things: Object | str | None) -> str:
        """The email of the customer whose objects these are (objects or their ids): it outlasts ids, which are random.
        Empty for what belongs to nobody."""
        for thing in things:
            found = self.store.get(thing) if isinstance(thing, str) else thing
            if found and found.get("object") in ("refund", "dispute"):  # they name their payment alone
                found = self.store.get(found["charge"])
            if found and found.get("object") != "customer":
                found = self.store.get(found.get("customer") or "")
            if found:
                return str(found.get("email") or found["id"])
        return ""

    def page(self, kind: str, params: Params, filters: Iterable[str] = (), **fixed: Any) -> Object:
        """A Stripe list: newest first, cursor by id, `has_more`."""
        limit = params.get("limit", 10)
        if not 1 <= limit <= 100:
            raise invalid("Invalid limit: must be between 1 and 100.", "limit", "parameter_invalid_integer")
        conditions: list[tuple[str, Any]] = [(name, params[name]) for name in filters if name in params]
        conditions += list(fixed.items())
        created = params.get("created", {})
        signs = {"gt": ">", "gte": ">=", "lt": "<", "lte": "<="}
        ranges = {"": created} if isinstance(created, int) else created
        conditions += [(f"created {signs.get(name, '=')} ?", value) for name, value in ranges.items()]
        if kind == "event":
            conditions += event_conditions(params)
        conditions.append(("coalesce(json_extract(json, '$.deleted'), 0) = ?", 0))
        for cursor, sign in (("starting_after", "<"), ("ending_before", ">")):
            if cursor in params:
                self.load(kind, params[cursor], cursor)
                place = "(SELECT seq FROM objects WHERE id = ?)"
                conditions.append((f"seq {sign} {place}", params[cursor]))
        backwards = "ending_before" in params
        found = self.store.find(kind, *conditions, limit=limit + 1, oldest_first=backwards)
        data = found[:limit][::-1] if backwards else found[:limit]
        return {"object": "list", "data": data, "has_more": len(found) > limit}

    def expand(self, obj: Object, paths: Iterable[str]) -> Object:
        """Replace ids by the objects they name, along paths such as `data.latest_charge.customer`."""
        for path in paths:
            nodes: list[Any] = [obj]
            for name in path.split("."):
                nodes = [child for node in nodes for child in self._expand_field(node, name, path)]
        return obj

    def _expand_field(self, node: Object, name: str, path: str) -> list[Any]:
        if name == "line_items" and node.get("object") == "checkout.session":
            node[name] = {"object": "list", "data": node["_line_items"], "has_more": False}
        elif name == "refunds" and node.get("object") == "charge":
            node[name] = self.page("refund", {"limit": 100}, charge=node["id"])
        value = node.get(name)
        if isinstance(value, str) and name in EXPANDABLE:
            value = node[name] = self.store.get(value)
        if value is None:
            if name not in node:
                raise invalid(f"This property cannot be expanded ({path}).", f"expand[{path}]")
            return []
        if not isinstance(value, dict | list):
            raise invalid(f"This property cannot be expanded ({path}).", f"expand[{path}]")
        return value if isinstance(value, list) else [value]

    # -- customers and their payment methods

    def create_customer(self, params: Params) -> Object:
        """POST /v1/customers."""
        check_email(params)
        method_id = params.pop("payment_method", None)
        params["metadata"] = params.get("metadata") or {}
        blank = dict.fromkeys(("address", "currency", "description", "email", "name", "phone"))
        settings = {"default_payment_method": None} | params.pop("invoice_settings", {})
        customer = self.new(
            "customer",
            "cus_",
            **blank | {name: value or None for name, value in params.items() if name != "metadata"},
            metadata=params["metadata"],
            invoice_settings=settings,
            balance=0,
            delinquent=False,
        )
        self.emit("customer.created", customer)
        if method_id:
            self.attach(self.usable_method(method_id, "payment_method"), customer["id"])
        return customer

    def update_customer(self, params: Params, customer: str) -> Object:
        """POST /v1/customers/{id}; metadata is merged, an empty value unsets."""
        found = self.load("customer", customer)
        if found.get("deleted"):
            raise StripeError(404, f"No such customer: '{customer}'", code="resource_missing", param="id")
        before = dict(found)
        check_email(params)
        if "metadata" in params:
            merged = {**found["metadata"], **params["metadata"]} if params["metadata"] else {}
            params["metadata"] = {name: value for name, value in merged.items() if value != ""}
        if default := (params.get("invoice_settings") or {}).get("default_payment_method"):
            self.owned_method(default, customer)
        if "invoice_settings" in params:
            params["invoice_settings"] = found["invoice_settings"] | params["invoice_settings"]
        found |= {name: None if value == "" else value for name, value in params.items()}
        previous = {name: before.get(name) for name in params if before.get(name) != found[name]}
        self.store.put(found)
        if previous:
            self.emit("customer.updated", found, previous)
        return found

    def delete_customer(self, params: Params, customer: str) -> Object:
        """DELETE /v1/customers/{id}: its payment methods go with it."""
        found = self.load("customer", customer)
        if found.get("deleted"):
            raise StripeError(404, f"No such customer: '{customer}'", code="resource_missing", param="id")
        for method in self.store.find("payment_method", ("customer", customer)):
            self.store.put(method | {"customer": None, "_detached": True})
        self.emit("customer.deleted", found)
        return self.store.put({"id": customer, "object": "customer", "deleted": True})

    def search_customers(self, params: Params) -> Object:
        """GET /v1/customers/search: by metadata that all match exactly, and by nothing else."""
        clauses = [re.fullmatch(r"metadata\['([^']+)'\]:'([^']*)'", each) for each in params["query"].split(" AND ")]
        if not all(clauses):
            raise unsupported("query")
        wanted = {clause[1]: clause[2] for clause in clauses if clause}
        found = [each for each in self.store.find("customer") if wanted.items() <= (each.get("metadata") or {}).items()]
        return {
            "object": "search_result",
            "url": "/v1/customers/search",
            "has_more": False,
            "next_page": None,
            "data": found,
        }

    def list_customer_methods(self, params: Params, customer: str) -> Object:
        """GET /v1/customers/{id}/payment_methods."""
        self.load("customer", customer)
        return self.page("payment_method", params, ("type",), customer=customer)

    def list_methods(self, params: Params) -> Object:
        """GET /v1/payment_methods: those of one customer."""
        return self.page("payment_method", params, ("type",), customer=need(params, "customer"))

    def new_method(self, card: TestCard, name: str | None = None, expiry: str = "12/34") -> Object:
        """A payment method for a test card or the test bank account."""
        billing = {"address": dict.fromkeys(("city", "country", "line1", "line2", "postal_code", "state"))}
        details: Object = {"billing_details": {**billing, "email": None, "name": name, "phone": None}}
        if card.number == BANK_DEBIT:
            bank = {"bank_name": "STRIPE TEST BANK", "last4": "6789", "account_type": "checking"}
            details |= {"type": "us_bank_account", "us_bank_account": bank}
        elif card.number == LINK:
            details |= {"type": "link", "link": {"email": None}}
        else:
            month, _, year = expiry.replace(" ", "").partition("/")
            facts = {
                "brand": card.brand,
                "display_brand": card.brand,
                "last4": card.number[-4:],
                "country": "US",
            }
            dates = {"exp_month": int(month), "exp_year": 2000 + int(year) % 100, "funding": "credit"}
            finger = hashlib.sha256(card.number.encode()).hexdigest()[:16]
            details |= {"type": "card", "card": {**facts, **dates, "fingerprint": finger}}
        return self.new(
            "payment_method",
            "pm_",
            customer=None,
            allow_redisplay="unspecified",
            **details,
            _number=card.number,
        )

    def usable_method(self, method_id: str, param: str) -> Object:
        """A payment method by id or Stripe's test name (`pm_card_visa`); detached ones stay detached."""
        if method_id in CARDS_BY_TOKEN:
            return self.new_method(CARDS_BY_TOKEN[method_id])
        method = self.load("payment_method", method_id, param)
        if method.get("_detached"):
            message = (
                "The provided PaymentMethod was previously used with a PaymentIntent without Customer "
                "attachment, or was detached from a Customer. It may not be used again."
            )
            raise invalid(message, param, "payment_method_unexpected_state")
        return method

    def owned_method(self, method_id: str, customer: str | None) -> Object:
        """A payment method that may be charged in the name of this customer."""
        method = self.usable_method(method_id, "payment_method")
        if method["customer"] and method["customer"] != customer:
            message = (
                f"The PaymentMethod you provided ({method_id}) belongs to the Customer {method['customer']}. "
                "Please include the Customer in the `customer` parameter."
            )
            raise invalid(message, "payment_method")
        return method

    def attach_method(self, params: Params, payment_method: str) -> Object:
        """POST /v1/payment_methods/{id}/attach; Stripe asks the bank first, so a dead card is refused."""
        customer = self.load("customer", need(params, "customer"), "customer")
        method = self.owned_method(payment_method, customer["id"])
        decline = CARDS[method["_number"]].on_session
        if decline in DECLINES:
            raise self.card_error(decline)
        return self.attach(method, customer["id"])

    def attach(self, method: Object, customer_id: str, *, set_up: bool = False) -> Object:
        """Save a payment method with a customer; `set_up`: it was authenticated for later payments."""
        known = method["customer"] == customer_id
        method |= {"customer": customer_id, "_set_up": set_up or method.get("_set_up", False)}
        self.store.put(method)
        if not known:
            self.emit("payment_method.attached", method)
        return method

    def detach_method(self, params: Params, payment_method: str) -> Object:
        """POST /v1/payment_methods/{id}/detach: for good."""
        method = self.load("payment_method", payment_method)
        if not method["customer"]:
            message = "The payment method you provided is not attached to a customer so detachment is impossible."
            raise invalid(message, None, "payment_method_not_available")
        customer = self.load("customer", method["customer"])
        previous = {"customer": method["customer"]}
        method |= {"customer": None, "_detached": True}
        self.emit("payment_method.detached", self.store.put(method), previous)
        if customer["invoice_settings"]["default_payment_method"] == method["id"]:
            customer["invoice_settings"]["default_payment_method"] = None
            self.store.put(customer)
        return method

    # -- payment intents

    def create_intent(self, params: Params) -> Object:
        """POST /v1/payment_intents, confirmed at once with `confirm=true`."""
        for name in ("payment_method_data", "confirmation_token"):
            if name in params:
                raise unsupported(name)
        if params.get("capture_method") == "manual":
            raise unsupported("capture_method")
        check_amount(params["amount"], "amount")
        customer = params.get("customer")
        if customer is not None:
            self.load("customer", customer, "customer")
        confirm, off_session = params.pop("confirm", False), bool(params.pop("off_session", False))
        if off_session and not confirm:
            raise invalid("`off_session` may only be set when `confirm` is true.", "off_session")
        method = self.owned_method(params.pop("payment_method"), customer) if params.get("payment_method") else None
        intent = self.new_intent(params, method)
        if confirm:
            return self.confirm(intent, method, off_session=off_session)
        return intent

    def new_intent(self, params: Params, method: Object | None = None) -> Object:
        """A payment intent that waits for its confirmation."""
        echoed = ("customer", "description", "receipt_email", "setup_future_usage", "statement_descriptor")
        fields: Object = {name: params.get(name) for name in echoed}
        fields |= {
            "amount": params["amount"],
            "currency": currency_of(params),
            "metadata": params.get("metadata", {}),
        }
        fields |= {
            "amount_capturable": 0,
            "amount_received": 0,
            "automatic_payment_methods": params.get("automatic_payment_methods"),
            "next_action": None,
        }
        fields |= {"canceled_at": None, "cancellation_reason": None, "capture_method": "automatic_async"}
        fields |= {"confirmation_method": "automatic", "last_payment_error": None, "latest_charge": None}
        fields |= {
            "payment_method": method and method["id"],
            "payment_method_types": params.get("allowed_payment_method_types", ["card", "link", "us_bank_account"]),
        }
        fields |= {
            "status": "requires_confirmation" if method else "requires_payment_method",
            "processing": None,
        }
        intent = self.new("payment_intent", "pi_", **fields, _return_url=params.get("return_url"))
        intent["client_secret"] = self.new_id(f"{intent['id']}_secret_")
        self.emit("payment_intent.created", self.store.put(intent))
        return intent

    def confirm_intent(self, params: Params, intent: str) -> Object:
        """POST /v1/payment_intents/{id}/confirm."""
        found = self.load("payment_intent", intent)
        if found["status"] not in ("requires_confirmation", "requires_payment_method", "requires_action"):
            raise self.unexpected_state(found, "confirm")
        method_id = params.get("payment_method") or found["payment_method"]
        method = self.owned_method(method_id, found["customer"]) if method_id else None
        found["_return_url"] = params.get("return_url") or found["_return_url"]
        return self.confirm(found, method, off_session=bool(params.get("off_session")))

    def confirm(self, intent: Object, method: Object | None, *, off_session: bool = False) -> Object:
        """Ask the bank. Succeeds, waits (`processing`, `requires_action`) or raises the card error."""
        if method is None:
            message = "You cannot confirm this PaymentIntent because it's missing a payment method."
            raise invalid(message, None, "payment_intent_unexpected_state")
        if method["type"] not in intent["payment_method_types"]:
            raise invalid(
                f"The payment method type {method['type']} is not allowed for this payment.", "payment_method"
            )
        if off_session and not method["customer"]:
            raise invalid("An off-session payment needs a PaymentMethod that is attached to a Customer.", "off_session")
        card = CARDS[method["_number"]]
        forced = self.call.forced_outcome
        outcome = forced or card.outcome(off_session=off_session, set_up=method.get("_set_up", False))
        intent |= {"payment_method": method["id"], "last_payment_error": None, "next_action": None}
        if outcome == "ok":
            return self.succeed(intent, method)
        if outcome == "processing":
            self.new_charge(intent, method, "pending")
            return self.move(intent, "processing")
        if outcome == "authenticate":
            url = f"{self.call.base_url}/authenticate/{intent['id']}"
            redirect = {"url": url, "return_url": intent["_return_url"]}
            intent["next_action"] = {"type": "redirect_to_url", "redirect_to_url": redirect}
            return self.move(intent, "requires_action")
        raise self.decline(intent, method, outcome)

    def move(self, intent: Object, status: str, event: str | None = None) -> Object:
        """Give the intent its new status and tell so."""
        self.emit(f"payment_intent.{event or status}", self.store.put(intent | {"status": status}))
        intent["status"] = status
        return intent

    def succeed(self, intent: Object, method: Object, *, authenticated: bool = False) -> Object:
        """Money arrives: charge, saved card, succeeded intent."""
        if intent["setup_future_usage"] and intent["customer"]:
            set_up = authenticated and intent["setup_future_usage"] == "off_session"
            self.attach(method, intent["customer"], set_up=set_up)
        pending = self.store.get(intent["latest_charge"]) if intent["status"] == "processing" else None
        self.new_charge(intent, method, "succeeded", replaces=pending)
        intent |= {"amount_received": intent["amount"], "next_action": None}
        return self.move(intent, "succeeded")

    def decline(self, intent: Object, method: Object, decline_code: str, *, charged: bool = True) -> StripeError:
        """The bank says no: the intent waits for another payment method. Returns the error to raise."""
        charge: Object | None = None
        if charged:
            pending = self.store.get(intent["latest_charge"]) if intent["status"] == "processing" else None
            charge = self.new_charge(intent, method, "failed", decline_code, replaces=pending)
        error = self.card_error(decline_code, charge=charge and charge["id"], payment_method=public(method))
        intent |= {"last_payment_error": dict(error.error), "payment_method": None, "next_action": None}
        self.move(intent, "requires_payment_method", "payment_failed")
        error.error["payment_intent"] = public(intent)
        return error

    def card_error(self, decline_code: str, **extra: Any) -> StripeError:
        """402, with what the buyer may read."""
        code, message = DECLINES[decline_code]
        extra |= {"decline_code": decline_code} if code in ("card_declined", _SCA) else {}
        return StripeError(402, message, type="card_error", code=code, keep_changes=True, **extra)

    def unexpected_state(self, intent: Object, verb: str) -> StripeError:
        """400 for a step that the intent's status does not allow."""
        message = f"You cannot {verb} this PaymentIntent because it has a status of {intent['status']}."
        extra = {"payment_intent": public(intent)}
        return StripeError(400, message, code="payment_intent_unexpected_state", **extra)

    def cancel_intent(self, params: Params, intent: str) -> Object:
        """POST /v1/payment_intents/{id}/cancel."""
        found = self.load("payment_intent", intent)
        if found["status"] in ("succeeded", "canceled", "processing"):
            raise self.unexpected_state(found, "cancel")
        reason = params.get("cancellation_reason")
        found |= {"canceled_at": now(), "cancellation_reason": reason, "next_action": None}
        return self.move(found, "canceled")

    def new_charge(
        self,
        intent: Object,
        method: Object,
        status: str,
        decline_code: str | None = None,
        *,
        replaces: Object | None = None,
    ) -> Object:
        """The charge of one attempt (`replaces`: the pending one that now has its outcome), and its event."""
        paid = status == "succeeded"
        code, message = DECLINES[decline_code] if decline_code else (None, None)
        kind = method["type"]
        fields: Object = {name: intent[name] for name in ("amount", "currency", "customer", "description", "metadata")}
        fields |= {"amount_captured": intent["amount"] if paid else 0, "amount_refunded": 0, "captured": paid}
        fields |= {
            "payment_intent": intent["id"],
            "payment_method": method["id"],
            "paid": paid,
            "status": status,
        }
        fields |= {
            "payment_method_details": {"type": kind, kind: method[kind]},
            "refunded": False,
            "disputed": False,
        }
        fields |= {"billing_details": method["billing_details"], "receipt_email": intent["receipt_email"]}
        fields |= {"failure_code": code, "failure_message": message, "balance_transaction": None}
        charge = self.store.put(replaces | fields) if replaces else self.new("charge", "ch_", **fields)
        charge["outcome"] = {"type": "authorized" if paid else "issuer_declined", "reason": decline_code}
        if paid:
            charge["receipt_url"] = f"{self.call.base_url}/receipts/{charge['id']}"
            fee_cents = (intent["amount"] * 29 + 999) // 1000 + 30
            charge["balance_transaction"] = self.book("charge", charge, intent["amount"], fee_cents)["id"]
        intent["latest_charge"] = charge["id"]
        self.emit(f"charge.{status}", self.store.put(charge))
        return charge

    def book(self, kind: str, source: Object, amount_cents: int, fee_cents: int = 0) -> Object:
        """A line in the account's own balance."""
        net = {"amount": amount_cents, "fee": fee_cents, "net": amount_cents - fee_cents}
        common = {"currency": source["currency"], "source": source["id"], "status": "available", "type": kind}
        return self.new("balance_transaction", "txn_", **net, **common)

    def balance(self, params: Params) -> Object:
        """GET /v1/balance: the sum of all bookings."""
        totals: dict[str, int] = {}
        for line in self.store.find("balance_transaction"):
            totals[line["currency"]] = totals.get(line["currency"], 0) + line["net"]
        available = [{"amount": cents, "currency": name} for name, cents in totals.items()] or [
            {"amount": 0, "currency": "usd"}
        ]
        return {"object": "balance", "available": available, "pending": [], "livemode": False}

    def list_webhook_endpoints(self, params: Params) -> Object:
        """GET /v1/webhook_endpoints: the one of the command line, if there is one."""
        data = [self.webhook_endpoint] if self.deliver else []
        return {"object": "list", "data": data, "has_more": False, "url": "/v1/webhook_endpoints"}

    def settle_delayed(self, intent_id: str, *, succeeded: bool, decline: str) -> Object:
        """The bank debit that was `processing` is paid or returned, perhaps days later."""
        intent = self.load("payment_intent", intent_id)
        if intent["status"] != "processing":
            raise self.unexpected_state(intent, "settle")
        method = self.load("payment_method", intent["payment_method"])
        if succeeded:
            self.succeed(intent, method)
        else:
            self.decline(intent, method, decline)
        for session in self.store.find("checkout.session", ("payment_intent", intent_id)):
            session["payment_status"] = "paid" if succeeded else "unpaid"
            outcome = "succeeded" if succeeded else "failed"
            self.emit(f"checkout.session.async_payment_{outcome}", self.store.put(session))
        return intent

    # -- checkout

    def create_session(self, params: Params) -> Object:
        """POST /v1/checkout/sessions, modes payment and setup, hosted page only."""
        mode = need(params, "mode")
        if mode == "subscription" or params.get("ui_mode", "hosted_page") != "hosted_page":
            raise unsupported("mode" if mode == "subscription" else "ui_mode")
        for name in ("discounts", "shipping_options", "optional_items", "payment_method_data"):
            if name in params:
                raise unsupported(name)
        for name in ("success_url", "cancel_url"):
            url = need(params, name) if name == "success_url" else params.get(name)
            if url and not (url.startswith(("http://", "https://")) and urlsplit(url).netloc):
                raise invalid("Not a valid URL", name, "url_invalid")
        if "customer" in params and "customer_email" in params:
            message = "You may only specify one of these parameters: customer, customer_email."
            raise invalid(message, "customer")
        if "customer" in params:
            self.load("customer", params["customer"], "customer")
        asks_for_tax_id = params.get("tax_id_collection", {}).get("enabled") and "customer" in params
        if asks_for_tax_id and params.get("customer_update", {}).get("name") != "auto":
            # As Stripe: whose customer is given must let it keep the name.
            message = "Tax ID collection requires updating the customer's name: set `customer_update[name]` to `auto`."
            raise invalid(message, "customer_update[name]")
        expires_at = params.get("expires_at", now() + DAY_SECONDS)
        if not now() + SHORTEST_SESSION_SECONDS - 60 <= expires_at <= now() + DAY_SECONDS + 60:
            raise invalid("`expires_at` must be between 30 minutes and 24 hours from now.", "expires_at")
        items = self.line_items(params) if mode == "payment" else []
        return self.new_session(params, items, expires_at)

    def new_session(self, params: Params, items: list[Object], expires_at: int) -> Object:
        """The open session; its payment intent is made when somebody pays, as with Stripe."""
        total = sum(item["amount_subtotal"] for item in items) if items else None
        if total:
            check_amount(total, "line_items")
        hidden = {"_line_items": items, "_intent": params.pop("payment_intent_data", {})}
        hidden["_setup_intent_data"] = params.pop("setup_intent_data", {})
        params.pop("line_items", None)
        currency = items[0]["currency"] if items else params.get("currency")
        nulls = "cancel_url client_reference_id customer customer_email customer_details invoice locale"
        fields: Object = dict.fromkeys((*nulls.split(), "payment_intent", "setup_intent", "subscription"))
        fields |= {"amount_subtotal": total, "amount_total": total, "currency": currency, "discounts": []}
        fields |= {"automatic_tax": {"enabled": False}, "custom_fields": [], "ui_mode": "hosted_page"}
        fields |= {"payment_method_types": params.get("allowed_payment_method_types", ["card", "us_bank_account"])}
        fields |= {"total_details": {"amount_discount": 0, "amount_shipping": 0, "amount_tax": 0}}
        fields |= params | {"expires_at": expires_at, "status": "open"}
        fields |= {"payment_status": "unpaid" if params["mode"] == "payment" else "no_payment_required"}
        session = self.new("checkout.session", "cs_test_", **fields, **hidden)
        session["url"] = f"{self.call.base_url}/c/pay/{session['id']}"
        return self.store.put(session)

    def line_items(self, params: Params) -> list[Object]:
        """What is bought, from price ids or `price_data`, all in one currency."""
        items = []
        for index, given in enumerate(need(params, "line_items")):
            path, quantity = f"line_items[{index}]", given.get("quantity", 1)
            if "price" in given:
                price = self.load("price", given["price"], f"{path}[price]")
                if not price["active"]:
                    message = "The price specified is inactive. This field only accepts active prices."
                    raise invalid(message, f"{path}[price]")
            elif "price_data" in given:
                price = self.create_price(given["price_data"] | {"active": False}, f"{path}[price_data]")
            else:
                raise invalid(f"Missing required param: {path}[price].", f"{path}[price]", "parameter_missing")
            product = self.load("product", price["product"], f"{path}[price]")
            if quantity < 1:
                raise invalid("Invalid positive integer", f"{path}[quantity]", "parameter_invalid_integer")
            if price["recurring"]:
                raise invalid("You specified `payment` mode but passed a recurring price.", path)
            amount = price["unit_amount"] * quantity
            amounts = {
                "amount_discount": 0,
                "amount_subtotal": amount,
                "amount_tax": 0,
                "amount_total": amount,
            }
            facts = {"currency": price["currency"], "description": product["name"], "quantity": quantity}
            items.append({"id": self.new_id("li_"), "object": "item", **amounts, **facts, "price": public(price)})
            items[-1]["_note"] = product["description"]
        if len({item["currency"] for item in items}) != 1:
            raise invalid("All line items must have the same currency.", "line_items")
        return items

    def list_line_items(self, params: Params, session: str) -> Object:
        """GET /v1/checkout/sessions/{id}/line_items."""
        items = self.load("checkout.session", session)["_line_items"]
        return {"object": "list", "data": items, "has_more": False}

    def list_sessions(self, params: Params) -> Object:
        """GET /v1/checkout/sessions."""
        return self.page("checkout.session", params, ("customer", "payment_intent", "status"))

    def expire_session(self, params: Params, session: str) -> Object:
        """POST /v1/checkout/sessions/{id}/expire; also done by the clock."""
        found = self.load("checkout.session", session)
        if found["status"] != "open":
            message = f"Only open Checkout Sessions can be expired. This one is {found['status']}."
            raise invalid(message)
        found |= {"status": "expired", "url": None}
        self.emit("checkout.session.expired", self.store.put(found))
        return found

    def expire_due_sessions(self) -> None:
        """What Stripe does by itself when `expires_at` has come."""
        conditions = (("status", "open"), ("json_extract(json, '$.expires_at') <= ?", now()))
        for session in self.store.find("checkout.session", *conditions):
            self.expire_session({}, session["id"])

    def pay_session(self, session: Object, form: Mapping[str, str]) -> str:
        """The buyer pressed Pay. Returns where the browser goes next; a StripeError is shown on the page."""
        if session["status"] != "open":
            raise StripeError(409, "This Checkout Session is no longer open.", code="checkout_session_closed")
        self.apply_promotion(session, form.get("promotion_code", "").strip().upper())
        details = {"email": form.get("email") or None, "name": form.get("name") or None, "phone": None}
        session["customer_details"] = details | {"address": None, "tax_exempt": "none", "tax_ids": []}
        if session.get("billing_address_collection") == "required":
            names = ("line1", "line2", "postal_code", "city", "state", "country")
            session["customer_details"]["address"] = {name: form.get(name) or None for name in names}
        if session.get("tax_id_collection", {}).get("enabled"):
            company, number = form.get("company", "").strip(), form.get("tax_id", "").strip()
            session["customer_details"]["business_name"] = company or None
            session["customer_details"]["tax_ids"] = [{"type": "eu_vat", "value": number}] if number else []
        if session["mode"] == "payment" and session["amount_total"] == 0:
            return self.complete_session(session, "no_payment_required")
        method = self.method_from_form(form)
        self.store.put(session)
        if session["mode"] == "setup":
            return self.set_up_session(session, method)
        intent = self.confirm(self.session_intent(session), method)
        if intent["status"] == "requires_action":
            return f"/authenticate/{intent['id']}"
        return self.complete_session(session, "paid" if intent["status"] == "succeeded" else "unpaid")

    def method_from_form(self, form: Mapping[str, str]) -> Object:
        """The card typed in, or the one-click test card."""
        number = form.get("test_card") or re.sub(r"\D", "", form.get("card_number", ""))
        expiry, cvc = form.get("expiry", "12/34"), form.get("cvc", "123")
        if problem := card_problem(number, expiry, cvc):
            raise problem
        return self.new_method(CARDS[number], form.get("name") or None, expiry)

    def apply_promotion(self, session: Object, code: str) -> None:
        """Take off what a promotion code gives, where the session allows codes."""
        if not code:
            return
        if not session.get("allow_promotion_codes") or code not in PROMOTION_CODES:
            raise invalid("This code is invalid.", "promotion_code")
        discount_cents = session["amount_subtotal"] * PROMOTION_CODES[code] // 100
        session["total_details"]["amount_discount"] = discount_cents
        session["amount_total"] = session["amount_subtotal"] - discount_cents
        session["discounts"] = [{"coupon": code.lower(), "promotion_code": f"promo_{code.lower()}"}]

    def tax_session(self, session_id: str, tax_cents: int, is_included: bool) -> Object:
        """What automatic tax comes to for the buyer's address: in the prices or on top of them."""
        session = self.load("checkout.session", session_id)
        session["total_details"]["amount_tax"] = tax_cents
        session["amount_total"] = session["amount_subtotal"] + (0 if is_included else tax_cents)
        return self.store.put(session)

    def session_intent(self, session: Object) -> Object:
        """The session's intent, made at the first attempt to pay; a customer too, to save a card."""
        if session["payment_intent"]:
            intent = self.load("payment_intent", session["payment_intent"])
            return intent | {"amount": session["amount_total"]}
        data = session["_intent"]
        wanted = session.get("customer_creation") == "always" or data.get("setup_future_usage")
        if wanted and not session["customer"]:
            contact = {name: session["customer_details"][name] for name in ("email", "name")}
            session["customer"] = self.create_customer(contact)["id"]
        amount = {
            "amount": session["amount_total"],
            "currency": session["currency"],
            "customer": session["customer"],
        }
        intent = self.new_intent({**data, **amount})
        session["payment_intent"] = intent["id"]
        self.store.put(session)
        return intent

    def set_up_session(self, session: Object, method: Object) -> str:
        """mode=setup: save a card without a payment."""
        card = CARDS[method["_number"]]
        if card.on_session in DECLINES:
            raise self.card_error(card.on_session)
        fields = {"customer": session["customer"], "payment_method": method["id"], "usage": "off_session"}
        status = "requires_action" if card.on_session == "authenticate" else "succeeded"
        setup_data = session["_setup_intent_data"]
        metadata, description = setup_data.get("metadata", {}), setup_data.get("description")
        fields |= {"status": status, "latest_attempt": None, "metadata": metadata, "description": description}
        intent = self.new("setup_intent", "seti_", **fields, payment_method_types=["card"])
        self.emit("setup_intent.created", intent)
        session["setup_intent"] = intent["id"]
        self.store.put(session)
        if status == "requires_action":
            return f"/authenticate/{intent['id']}"
        return self.finish_setup(session, intent, method)

    def finish_setup(self, session: Object, intent: Object, method: Object) -> str:
        """The card is saved; Stripe has seen its owner."""
        if session["customer"]:
            self.attach(method, session["customer"], set_up=True)
        self.emit("setup_intent.succeeded", self.store.put(intent | {"status": "succeeded"}))
        return self.complete_session(session, "no_payment_required")

    def complete_session(self, session: Object, payment_status: str) -> str:
        """The session is done (`unpaid`: a delayed payment is under way). Returns the success address."""
        session |= {"status": "complete", "payment_status": payment_status, "url": None}
        self.emit("checkout.session.completed", self.store.put(session))
        return success_url(session)

    def authenticate(self, intent_id: str, *, passed: bool) -> str:
        """The buyer's bank has answered on the 3-D Secure page. Returns where the browser goes next."""
        intent = self.store.get(intent_id)
        if intent is None or intent["status"] != "requires_action":
            raise StripeError(409, "There is nothing to authenticate.", code="payment_intent_unexpected_state")
        sessions = self.store.find("checkout.session", (intent["object"], intent_id), ("status", "open"))
        session = sessions[0] if sessions else None
        method = self.load("payment_method", intent["payment_method"])
        if intent["object"] == "setup_intent":
            if session and passed:
                return self.finish_setup(session, intent, method)
            self.store.put(intent | {"status": "requires_payment_method"})
        elif passed:
            self.succeed(intent, method, authenticated=True)
            if session:
                return self.complete_session(session, "paid")
        else:
            self.decline(intent, method, "authentication_failed", charged=False)
        if session:
            return f"/c/pay/{session['id']}"
        outcome = {"payment_intent": intent_id, "redirect_status": "succeeded" if passed else "failed"}
        back = intent.get("_return_url") or "/control"
        return f"{back}{'&' if '?' in back else '?'}{urlencode(outcome)}"

    # -- refunds and disputes

    def charge_of(self, params: Params) -> Object:
        """The charge that `charge` or `payment_intent` names."""
        if "charge" in params:
            return self.load("charge", params["charge"], "charge")
        if "payment_intent" not in params:
            message = "One of the following params should be provided for this request: payment_intent or charge."
            raise invalid(message, "payment_intent", "parameter_missing")
        intent = self.load("payment_intent", params["payment_intent"], "payment_intent")
        if not intent["latest_charge"] or intent["status"] != "succeeded":
            raise invalid("This PaymentIntent does not have a successful charge to refund.", "payment_intent")
        return self.load("charge", intent["latest_charge"])

    def create_refund(self, params: Params) -> Object:
        """POST /v1/refunds: never more than is left of the charge."""
        charge = self.charge_of(params)
        left_cents = charge["amount"] - charge["amount_refunded"]
        amount = params.get("amount", left_cents)
        if charge["status"] != "succeeded":
            raise invalid(f"Charge {charge['id']} was not successful and cannot be refunded.", "charge")
        if charge["refunded"]:
            message = f"Charge {charge['id']} has already been refunded."
            raise invalid(message, "charge", "charge_already_refunded")
        if any(d["status"] in ("needs_response", "lost") for d in self.store.find("dispute", ("charge", charge["id"]))):
            message = f"Charge {charge['id']} has been charged back; cannot issue a refund."
            raise invalid(message, "charge", "charge_disputed")
        if amount < 1:
            raise invalid("Invalid positive integer", "amount", "parameter_invalid_integer")
        if amount > left_cents:
            message = f"Refund amount ({amount}) is greater than unrefunded amount on charge ({left_cents})"
            raise invalid(message, "amount")
        common = {name: charge[name] for name in ("currency", "payment_intent")}
        fields = {
            "amount": amount,
            "charge": charge["id"],
            "status": "succeeded",
            "reason": params.get("reason"),
        }
        fields |= {"metadata": params.get("metadata") or {}, "failure_reason": None, "receipt_number": None}
        refund = self.new("refund", "re_", **common, **fields)
        refund["balance_transaction"] = self.book("refund", refund, -amount)["id"]
        self.emit("refund.created", self.store.put(refund))
        self.change_refunded(charge, amount, "charge.refunded")
        return refund

    def change_refunded(self, charge: Object, by_cents: int, event: str) -> None:
        """Keep the charge's running total of refunds."""
        previous = {name: charge[name] for name in ("amount_refunded", "refunded")}
        charge["amount_refunded"] += by_cents
        charge["refunded"] = charge["amount_refunded"] == charge["amount"]
        self.emit(event, self.store.put(charge), previous)

    def fail_refund(self, refund_id: str) -> Object:
        """The buyer's bank sends a refund back."""
        refund = self.load("refund", refund_id)
        if refund["status"] == "failed":
            raise invalid("This refund has failed already.")
        refund |= {"status": "failed", "failure_reason": "lost_or_stolen_card"}
        refund["failure_balance_transaction"] = self.book("refund_failure", refund, refund["amount"])["id"]
        self.store.put(refund)
        self.change_refunded(self.load("charge", refund["charge"]), -refund["amount"], "charge.updated")
        for event in ("refund.updated", "charge.refund.updated", "refund.failed"):
            self.emit(event, refund, {"status": "succeeded"} if event.endswith("updated") else None)
        return refund

    def open_dispute(
        self,
        intent_id: str,
        *,
        status: str,
        amount: int | None,
        reason: str,
        currency: str,
        withdraws: bool,
        bare: bool,
    ) -> Object:
        """The buyer disputes a payment. Inquiries (`warning_…`) move no money, prevented ones may. `bare`: it names its
        charge alone; `currency`: the bank's, where it is another one."""
        charge = self.charge_of({"payment_intent": intent_id})
        amount = amount or charge["amount"] - charge["amount_refunded"]
        known = {dispute["status"] for dispute in self.store.find("dispute", ("charge", charge["id"]))}
        if known & {"needs_response", "won", "lost"}:
            raise invalid("This payment has been disputed already.", "payment_intent")
        if not 0 < amount <= charge["amount"]:
            raise invalid("Nothing is left of this payment to dispute.", "amount")
        common = {name: charge[name] for name in ("currency", "payment_intent", "payment_method_details")}
        fields = {
            "amount": amount,
            "charge": charge["id"],
            "reason": reason,
            "status": status,
            "evidence": {},
        }
        common |= ({"payment_intent": None} if bare else {}) | ({"currency": currency} if currency else {})
        fields |= {"is_charge_refundable": status != "needs_response", "balance_transactions": []}
        due = {
            "due_by": now() + 7 * DAY_SECONDS,
            "has_evidence": False,
            "past_due": False,
            "submission_count": 0,
        }
        dispute = self.new("dispute", "du_", **common, **fields, evidence_details=due, enhanced_eligibility_types=[])
        self.store.put(charge | {"disputed": True})
        self.emit("charge.dispute.created", dispute)
        if status == "needs_response" or withdraws:
            self.withdraw(dispute)
        return dispute

    def withdraw(self, dispute: Object) -> None:
        """Take what is disputed out of the account's balance."""
        dispute["balance_transactions"].append(public(self.book("adjustment", dispute, -dispute["amount"], 1_500)))
        self.emit("charge.dispute.funds_withdrawn", self.store.put(dispute))

    def escalate_dispute(self, dispute: str) -> Object:
        """An inquiry, also one that was closed, becomes a dispute under the same id."""
        found = self.load("dispute", dispute)
        if not found["status"].startswith("warning"):
            raise invalid(f"This dispute is no inquiry ({found['status']}).")
        previous, found["status"] = {"status": found["status"]}, "needs_response"
        self.emit("charge.dispute.updated", self.store.put(found), previous)
        self.withdraw(found)
        return found

    def move_dispute(self, dispute: str, *, status: str, withdrawn_cents: int, reinstated_cents: int) -> Object:
        """What else a dispute may come to: another round, a part of its money back, a state without money."""
        found = self.load("dispute", dispute)
        previous, found["status"] = {"status": found["status"]}, status
        self.emit("charge.dispute.updated", self.store.put(found), previous)
        for event, amount in (("funds_withdrawn", -withdrawn_cents), ("funds_reinstated", reinstated_cents)):
            if amount:
                found["balance_transactions"].append(public(self.book("adjustment", found, amount)))
                self.emit(f"charge.dispute.{event}", self.store.put(found))
        return found

    def warn_of_fraud(self, intent_id: str) -> Object:
        """The card's bank suspects fraud. No money moves; a seller may refund before a dispute comes."""
        charge = self.charge_of({"payment_intent": intent_id})
        fields = {"charge": charge["id"], "payment_intent": intent_id}
        warning = self.new(
            "radar.early_fraud_warning", "issfr_", **fields, actionable=True, fraud_type="made_with_stolen_card"
        )
        self.emit("radar.early_fraud_warning.created", warning)
        return warning

    def close_dispute(self, params: Params, dispute: str, outcome: str = "lost") -> Object:
        """POST /v1/disputes/{id}/close accepts it as lost; the control page may also win it."""
        found = self.load("dispute", dispute)
        if found["status"] not in ("needs_response", "under_review", "warning_needs_response"):
            raise invalid(f"This dispute is already closed ({found['status']}).")
        previous = {"status": found["status"]}
        found["status"] = "warning_closed" if found["status"].startswith("warning") else outcome
        if found["status"] == "won":
            found["balance_transactions"].append(public(self.book("adjustment", found, found["amount"])))
        self.emit("charge.dispute.updated", self.store.put(found), previous)
        self.emit("charge.dispute.closed", found, previous)
        if found["status"] == "won":
            self.emit("charge.dispute.funds_reinstated", found)
        return found

    # -- products, prices, portal, events

    def create_product(self, params: Params) -> Object:
        """POST /v1/products."""
        blank: Object = {
            "active": True,
            "description": None,
            "images": [],
            "type": "service",
            "default_price": None,
        }
        product = blank | params | {"updated": now()}
        return self.new("product", "prod_", **product)

    def create_price(self, params: Params, path: str = "") -> Object:
        """POST /v1/prices, and prices given inline in a checkout."""
        at = (lambda name: f"{path}[{name}]") if path else (lambda name: name)
        if "unit_amount" not in params:
            raise invalid(f"Missing required param: {at('unit_amount')}.", at("unit_amount"), "parameter_missing")
        if params["unit_amount"] < 0:
            raise invalid("Invalid non-negative integer", at("unit_amount"), "parameter_invalid_integer")
        if "product_data" in params:
            product = self.create_product(params["product_data"])
        elif "product" in params:
            product = self.load("product", params["product"], at("product"))
        else:
            raise invalid(f"Missing required param: {at('product')}.", at("product"), "parameter_missing")
        fields: Object = {
            "active": params.get("active", True),
            "billing_scheme": "per_unit",
            "product": product["id"],
        }
        fields |= {"currency": currency_of(params), "unit_amount": params["unit_amount"]}
        fields |= {"unit_amount_decimal": str(params["unit_amount"]), "recurring": params.get("recurring")}
        fields |= {name: params.get(name) for name in ("lookup_key", "nickname")}
        fields |= {
            "type": "recurring" if params.get("recurring") else "one_time",
            "tax_behavior": "unspecified",
        }
        return self.new("price", "price_", **fields, metadata=params.get("metadata", {}))

    def create_portal_session(self, params: Params) -> Object:
        """POST /v1/billing_portal/sessions."""
        customer = self.load("customer", need(params, "customer"), "customer")
        fields = {
            "customer": customer["id"],
            "return_url": params.get("return_url"),
            "configuration": "bpc_standin",
        }
        portal = self.new("billing_portal.session", "bps_", **fields, flow=params.get("flow_data"))
        portal["url"] = f"{self.call.base_url}/p/session/{portal['id']}"
        return self.store.put(portal)

    def replace_card(self, customer_id: str, form: Mapping[str, str]) -> None:
        """What the billing portal does: remove a card, or add one and make it the default."""
        if form.get("action") == "remove":
            method = self.load("payment_method", form.get("payment_method", ""))
            if method["customer"] == customer_id:
                self.detach_method({}, method["id"])
            return
        method = self.method_from_form(form)
        if (outcome := CARDS[method["_number"]].on_session) in DECLINES:
            raise self.card_error(outcome)
        self.attach(method, customer_id, set_up=True)
        self.update_customer({"invoice_settings": {"default_payment_method": method["id"]}}, customer_id)

    def pending_webhooks(self, event: Object) -> Object:
        """An event as it is now: how many deliveries have not arrived yet."""
        sql = "SELECT count(*) FROM deliveries WHERE event = ? AND state = 'pending'"
        return event | {"pending_webhooks": self.store.rows(sql, event["id"])[0][0]}


def event_conditions(params: Params) -> list[tuple[str, Any]]:
    """Filters that only events have: `type` (also `charge.*`), `types`, `delivery_success`."""
    conditions: list[tuple[str, Any]] = []
    if "type" in params:
        conditions.append(("json_extract(json, '$.type') GLOB ?", params["type"]))
    if "types" in params:
        in_list = "json_extract(json, '$.type') IN (SELECT value FROM json_each(?))"
        conditions.append((in_list, json.dumps(params["types"])))
    if "delivery_success" in params:
        open_ones = "SELECT 1 FROM deliveries d WHERE d.event = objects.id AND d.state <> 'delivered'"
        conditions.append((f"NOT EXISTS ({open_ones}) = ?", int(params["delivery_success"])))
    return conditions


def check_email(params: Params) -> None:
    """Stripe takes fewer addresses than there are, and does not say which; here none with letters beyond ASCII."""
    email = params.get("email") or ""
    if email and not re.fullmatch(r"[!-?A-~]+@[!-?A-~]+", email):
        raise invalid(f"Invalid email address: {email}", "email", "email_invalid")


def check_amount(amount_cents: int, param: str) -> None:
    """What Stripe lets one payment be."""
    if amount_cents < SMALLEST_AMOUNT_CENTS:
        raise invalid("Amount must be at least 50 cents.", param, "amount_too_small")
    if amount_cents > LARGEST_AMOUNT_CENTS:
        raise invalid("Amount must be no more than $999,999.99.", param, "amount_too_large")


def currency_of(params: Params) -> str:
    """Lower case, three letters."""
    currency = str(params["currency"]).lower()
    if not re.fullmatch(r"[a-z]{3}", currency):
        raise invalid(f"Invalid currency: {currency}.", "currency")
    return currency


def success_url(session: Object) -> str:
    """Where the buyer goes after paying."""
    return str(session["success_url"]).replace("{CHECKOUT_SESSION_ID}", session["id"])


# ----------------------------------------------------------------------------------------------------
# The API: which method and path mean which operation, and with which parameters


def retrieve(kind: str) -> Callable[..., Object]:
    """GET of one object by id."""

    def handler(account: Account, params: Params, object_id: str) -> Object:
        found = account.load(kind, object_id)
        return account.pending_webhooks(found) if kind == "event" else found

    return handler


def listing(kind: str, *filters: str) -> Callable[..., Object]:
    """GET of a list with its filters."""

    def handler(account: Account, params: Params) -> Object:
        found = account.page(kind, params, filters)
        if kind == "event":
            found["data"] = [account.pending_webhooks(event) for event in found["data"]]
        return found

    return handler


@dataclass(frozen=True)
class Operation:
    """One line of the API's table of routes."""

    method: str
    path: str
    params: type
    run: Callable[..., Object]

    def match(self, method: str, path: str) -> tuple[str, ...] | None:
        """The ids in the path, or None when this is another operation."""
        found = re.fullmatch(self.path.replace("{id}", "([^/]+)"), path) if method == self.method else None
        return found.groups() if found else None


OPERATIONS = [
    Operation(*line)
    for line in (
        ("GET", "/v1/balance", p.BalanceRetrieveParams, Account.balance),
        (
            "GET",
            "/v1/balance_transactions/{id}",
            p.BalanceTransactionRetrieveParams,
            retrieve("balance_transaction"),
        ),
        ("POST", "/v1/customers", p.CustomerCreateParams, Account.create_customer),
        ("GET", "/v1/customers", p.CustomerListParams, listing("customer", "email")),
        ("GET", "/v1/customers/search", p.CustomerSearchParams, Account.search_customers),
        ("GET", "/v1/customers/{id}", p.CustomerRetrieveParams, retrieve("customer")),
        ("POST", "/v1/customers/{id}", p.CustomerUpdateParams, Account.update_customer),
        ("DELETE", "/v1/customers/{id}", p.CustomerDeleteParams, Account.delete_customer),
        (
            "GET",
            "/v1/customers/{id}/payment_methods",
            p.CustomerPaymentMethodListParams,
            Account.list_customer_methods,
        ),
        ("GET", "/v1/payment_methods", p.PaymentMethodListParams, Account.list_methods),
        ("GET", "/v1/payment_methods/{id}", p.PaymentMethodRetrieveParams, retrieve("payment_method")),
        ("POST", "/v1/payment_methods/{id}/attach", p.PaymentMethodAttachParams, Account.attach_method),
        ("POST", "/v1/payment_methods/{id}/detach", p.PaymentMethodDetachParams, Account.detach_method),
        ("POST", "/v1/checkout/sessions", checkout.SessionCreateParams, Account.create_session),
        ("GET", "/v1/checkout/sessions", checkout.SessionListParams, Account.list_sessions),
        ("GET", "/v1/checkout/sessions/{id}", checkout.SessionRetrieveParams, retrieve("checkout.session")),
        ("POST", "/v1/checkout/sessions/{id}/expire", checkout.SessionExpireParams, Account.expire_session),
        (
            "GET",
            "/v1/checkout/sessions/{id}/line_items",
            checkout.SessionLineItemListParams,
            Account.list_line_items,
        ),
        ("POST", "/v1/payment_intents", p.PaymentIntentCreateParams, Account.create_intent),
        ("GET", "/v1/payment_intents", p.PaymentIntentListParams, listing("payment_intent", "customer")),
        ("GET", "/v1/payment_intents/{id}", p.PaymentIntentRetrieveParams, retrieve("payment_intent")),
        ("POST", "/v1/payment_intents/{id}/confirm", p.PaymentIntentConfirmParams, Account.confirm_intent),
        ("POST", "/v1/payment_intents/{id}/cancel", p.PaymentIntentCancelParams, Account.cancel_intent),
        ("GET", "/v1/setup_intents/{id}", p.SetupIntentRetrieveParams, retrieve("setup_intent")),
        ("GET", "/v1/charges", p.ChargeListParams, listing("charge", "customer", "payment_intent")),
        ("GET", "/v1/charges/{id}", p.ChargeRetrieveParams, retrieve("charge")),
        ("POST", "/v1/refunds", p.RefundCreateParams, Account.create_refund),
        ("GET", "/v1/refunds", p.RefundListParams, listing("refund", "charge", "payment_intent")),
        ("GET", "/v1/refunds/{id}", p.RefundRetrieveParams, retrieve("refund")),
        ("GET", "/v1/disputes", p.DisputeListParams, listing("dispute", "charge", "payment_intent")),
        ("GET", "/v1/disputes/{id}", p.DisputeRetrieveParams, retrieve("dispute")),
        ("POST", "/v1/disputes/{id}/close", p.DisputeCloseParams, Account.close_dispute),
        (
            "GET",
            "/v1/radar/early_fraud_warnings",
            p.radar.EarlyFraudWarningListParams,
            listing("radar.early_fraud_warning", "charge", "payment_intent"),
        ),
        (
            "GET",
            "/v1/radar/early_fraud_warnings/{id}",
            p.radar.EarlyFraudWarningRetrieveParams,
            retrieve("radar.early_fraud_warning"),
        ),
        ("GET", "/v1/events", p.EventListParams, listing("event")),
        ("GET", "/v1/events/{id}", p.EventRetrieveParams, retrieve("event")),
        ("GET", "/v1/webhook_endpoints", p.WebhookEndpointListParams, Account.list_webhook_endpoints),
        ("POST", "/v1/products", p.ProductCreateParams, Account.create_product),
        ("GET", "/v1/products/{id}", p.ProductRetrieveParams, retrieve("product")),
        ("POST", "/v1/prices", p.PriceCreateParams, Account.create_price),
        ("GET", "/v1/prices/{id}", p.PriceRetrieveParams, retrieve("price")),
        ("POST", "/v1/billing_portal/sessions", portal.SessionCreateParams, Account.create_portal_session),
    )
]


# ----------------------------------------------------------------------------------------------------
# Webhooks


def sign(payload: str, secret: str) -> str:
    """The value of Stripe-Signature; made anew for each attempt, as Stripe does."""
    timestamp = now()
    digest = hmac.new(secret.encode(), f"{timestamp}.{payload}".encode(), hashlib.sha256).hexdigest()
    return f"t={timestamp},v1={digest}"


async def post(url: str, payload: str, headers: Mapping[str, str]) -> int:
    """POST over a connection of its own and return the status; redirects are not followed, as with Stripe."""
    parts = urlsplit(url)
    secure = parts.scheme == "https"
    host, port, body = parts.hostname or "", parts.port or (443 if secure else 80), payload.encode()
    target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
    lines = [
        f"POST {target} HTTP/1.1",
        f"Host: {parts.netloc}",
        f"Content-Length: {len(body)}",
        "Connection: close",
    ]
    lines += [f"{name}: {value}" for name, value in headers.items()]
    async with asyncio.timeout(WEBHOOK_TIMEOUT_SECONDS):
        reader, writer = await asyncio.open_connection(host, port, ssl=secure or None)
        try:
            writer.write("\r\n".join(lines).encode() + b"\r\n\r\n" + body)
            await writer.drain()
            status_line = await reader.readline()
            with contextlib.suppress(TimeoutError):  # let it finish politely; its status is known already
                await asyncio.wait_for(reader.read(), 1)
        finally:
            writer.close()
    return int(status_line.split()[1])


class Courier:
    """Brings events to the webhook address until it answers 2xx. Its queue is in the store."""

    def __init__(self, store: Store, url: str, secret: str) -> None:
        self.store, self.url, self.secret = store, url, secret
        self.wake = asyncio.Event()
        self.under_way: set[int] = set()

    async def run(self) -> None:
        """Start what is due, sleep until something else is."""
        async with asyncio.TaskGroup() as attempts:
            while True:
                self.wake.clear()
                for row in self.due():
                    self.under_way.add(row["id"])
                    attempts.create_task(self.attempt(row))
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self.wake.wait(), self.seconds_to_next())

    def due(self) -> list[sqlite3.Row]:
        """Deliveries to start now, within the limit of parallel ones."""
        if self.store.setting("held"):
            return []
        room = WEBHOOK_CONCURRENCY - len(self.under_way)
        sql = "SELECT * FROM deliveries WHERE state = 'pending' AND next_attempt_at <= ? ORDER BY id LIMIT ?"
        rows = self.store.rows(sql, time.time(), WEBHOOK_CONCURRENCY * 2)
        return [row for row in rows if row["id"] not in self.under_way][: max(room, 0)]

    def seconds_to_next(self) -> float:
        """Until the next retry; deliveries under way wake us when they end."""
        busy = len(self.under_way) >= WEBHOOK_CONCURRENCY
        if busy or self.under_way or self.store.setting("held"):
            return 1.0
        row = self.store.rows("SELECT min(next_attempt_at) FROM deliveries WHERE state = 'pending'")[0]
        return 1.0 if row[0] is None else min(1.0, max(0.0, row[0] - time.time()))

    async def attempt(self, row: sqlite3.Row) -> None:
        """One try, and what follows from its answer."""
        self.under_way.add(row["id"])
        try:
            if dropped := self.store.setting("drop"):
                self.store.set_setting("drop", dropped - 1)
                self.record(row, "dropped", "dropped on request")
                return
            event = self.store.get(row["event"])
            if event is None:  # the control page has reset the account meanwhile
                return
            payload = as_json(public(event))
            headers = {
                "Content-Type": "application/json; charset=utf-8",
                "User-Agent": "Stripe/1.0 (stand-in)",
            }
            try:
                status = await post(self.url, payload, headers | {"Stripe-Signature": sign(payload, self.secret)})
            except (OSError, TimeoutError, IndexError, ValueError) as error:
                self.record(row, "retry", type(error).__name__)
            else:
                self.record(row, "delivered" if 200 <= status < 300 else "retry", str(status))
        finally:
            self.under_way.discard(row["id"])
            self.wake.set()

    def record(self, row: sqlite3.Row, state: str, answer: str) -> None:
        """Write down the outcome; a failed try comes again later: 1, 2, 4, … 60 seconds."""
        attempts = row["attempts"] + 1
        delay_seconds = min(WEBHOOK_BACKOFF_CAP_SECONDS, 2 ** (attempts - 1))
        if state == "retry":
            state = "pending" if attempts < WEBHOOK_ATTEMPTS else "failed"
        self.store.rows(
            "UPDATE deliveries SET state = ?, attempts = ?, answer = ?, next_attempt_at = ? WHERE id = ?",
            *(state, attempts, answer, time.time() + delay_seconds, row["id"]),
        )

    async def release(self, order: str, seed: int) -> list[str]:
        """Deliver what was held, one by one in the order asked for, then let new events flow again."""
        rows = self.store.rows("SELECT * FROM deliveries WHERE state = 'pending' ORDER BY id")
        rows = [row for row in rows if row["id"] not in self.under_way]
        if order == "reverse":
            rows.reverse()
        elif order == "random":
            random.Random(seed).shuffle(rows)
        for row in rows:
            await self.attempt(row)
        self.store.set_setting("held", 0)
        self.wake.set()
        return [row["event"] for row in rows]


# ----------------------------------------------------------------------------------------------------
# Faults on demand and the web server


FAULT_KINDS = ("500", "500_after", "429", "refused", "timeout_after", "slow", "processing", "requires_action")


@dataclass
class Fault:
    """What the next `count` API calls under a path suffer."""

    kind: str
    path_prefix: str = "/v1/"
    method: str = ""
    count: int = 1
    seconds: int = 30

    def matches(self, method: str, path: str) -> bool:
        """Whether this call is meant."""
        return self.count > 0 and path.startswith(self.path_prefix) and self.method in ("", method)


@dataclass
class Standin:
    """The web server: API, hosted pages, control page."""

    store: Store
    account: Account
    courier: Courier
    faults: list[Fault] = field(default_factory=list)
    keys_in_use: set[str] = field(default_factory=set)

    # -- API

    async def api(self, request: Request) -> Response:
        """Any call under /v1: who, what, with which parameters; then carry it out."""
        request_id = self.account.new_id("req_")
        key = request.headers.get("idempotency-key") if request.method == "POST" else None
        headers = {"request-id": request_id, "stripe-version": API_VERSION}
        try:
            api_key = authenticate(request)
            body = (await request.body()).decode() if request.method == "POST" else request.url.query
            operation, ids = find_operation(request.method, request.url.path)
            params = check_fields(parse_form(body), operation.params)
            call = Call(request_id, key, str(request.base_url).rstrip("/"))
            scope = key and f"{api_key}:{key}"
            status, answer, replay_of = await self.carry_out(request, operation, ids, params, call, scope)
        except StripeError as error:
            status, answer, replay_of = error.status, as_json({"error": error.error}), None
        except UnicodeDecodeError:
            status, answer, replay_of = (
                400,
                as_json({"error": invalid("Invalid UTF-8 in the request.").error}),
                None,
            )
        if key:
            headers["idempotency-key"] = key.encode("ascii", "replace").decode()
        if replay_of:
            headers |= {"idempotent-replayed": "true", "original-request": replay_of}
        return Response(answer, status, headers, "application/json")

    async def carry_out(
        self,
        request: Request,
        operation: Operation,
        ids: tuple[str, ...],
        params: Params,
        call: Call,
        scope: str | None,
    ) -> tuple[int, str, str | None]:
        """Run once per idempotency key, with the faults asked for. Status, body, request replayed."""
        fault = self.take_fault(request.method, request.url.path) or self.chaos_fault(operation, ids, params)
        if fault and fault.kind == "429":
            raise StripeError(429, "Too many requests.", type="invalid_request_error", code="rate_limit")
        if fault and fault.kind == "refused":  # for a reason of the account, not of the call
            raise invalid("Your account cannot currently make charges.")
        fingerprint = hashlib.sha256(
            json.dumps([request.method, request.url.path, params], sort_keys=True).encode()
        ).hexdigest()
        if scope in self.keys_in_use:
            message = "There is currently another in-progress request using this Idempotent Key."
            raise StripeError(409, message, type="idempotency_error", code="idempotency_key_in_use")
        if scope:
            self.keys_in_use.add(scope)
        try:
            if fault and fault.kind == "slow":
                await asyncio.sleep(fault.seconds)
            result = self.replay(scope, fingerprint, call) or self.run(
                operation, ids, params, call, scope, fault, fingerprint
            )
        finally:
            self.keys_in_use.discard(scope or "")
        if fault and fault.kind == "timeout_after":
            # The caller gives up first, or gets its answer very late; a shutdown ends the wait too.
            with contextlib.suppress(TimeoutError, asyncio.CancelledError):
                await asyncio.wait_for(request.receive(), fault.seconds)
        return result

    def take_fault(self, method: str, path: str) -> Fault | None:
        """The fault for this call, which uses it up once."""
        for fault in self.faults:
            if fault.matches(method, path):
                fault.count -= 1
                return fault
        return None

    def chaos_fault(self, operation: Operation, ids: tuple[str, ...], params: Params) -> Fault | None:
        """The fault that chance has for this call."""
        chaos = self.account.chaos
        if not chaos.fail:
            return None
        owner = params.get("email") or self.account.owner_of(params.get("customer"), params.get("payment_intent"), *ids)
        kind = chaos.fault(chaos.occurrence(owner, f"{operation.method} {operation.path}"))
        return Fault(kind, seconds=CHAOS_HOLD_SECONDS) if kind else None

    def replay(self, scope: str | None, fingerprint: str, call: Call) -> tuple[int, str, str | None] | None:
        """The first result of this key again, whatever it was (5xx too); other parameters are an error."""
        found = self.store.rows("SELECT * FROM idempotency WHERE key = ?", scope) if scope else []
        if not found:
            return None
        if found[0]["fingerprint"] != fingerprint:
            message = (
                "Keys for idempotent requests can only be used with the same endpoint and parameters they "
                f"were first used with. Try another key than '{call.idempotency_key}' for another request."
            )
            raise StripeError(400, message, type="idempotency_error")
        return found[0]["status"], found[0]["body"], found[0]["request_id"]

    def run(
        self,
        operation: Operation,
        ids: tuple[str, ...],
        params: Params,
        call: Call,
        scope: str | None,
        fault: Fault | None,
        fingerprint: str,
    ) -> tuple[int, str, None]:
        """Execute and remember the result under its key in one transaction."""
        kind = fault.kind if fault else ""
        call.forced_outcome = {"processing": "processing", "requires_action": "authenticate"}.get(kind)
        broken = StripeError(500, "An unknown error occurred (asked for on the control page).", type="api_error")
        with self.store.transaction():
            try:
                if kind == "500":
                    raise broken
                status, answer = 200, self.execute(operation, ids, params, call)
                if kind == "500_after":
                    broken.keep_changes = True
                    raise broken
            except StripeError as error:
                status, answer = error.status, {"error": error.error}
            text = as_json(answer)
            if scope:
                sql = "INSERT INTO idempotency VALUES (?, ?, ?, ?, ?)"
                self.store.rows(sql, scope, fingerprint, status, text, call.id)
        return status, text, None

    def execute(self, operation: Operation, ids: tuple[str, ...], params: Params, call: Call) -> Object:
        """The operation itself, then `expand`."""
        expand = params.pop("expand", [])
        with self.store.transaction():
            self.account.call = call
            try:
                result: Object = operation.run(self.account, params, *ids)
            finally:
                self.account.call = Call()
            if result.get("object") == "list":
                result["url"] = operation.path.format(id=ids[0] if ids else "")
            answer: Object = public(self.account.expand(result, expand))
            return answer

    # -- hosted pages

    async def checkout_page(self, request: Request) -> Response:
        """The page to pay on."""
        session = self.store.get(request.path_params["session"])
        if session is None or session["object"] != "checkout.session":
            return HTMLResponse(pages.message("Not found", "There is no such Checkout Session."), 404)
        error, status = "", 200
        if request.method == "POST":
            form = await read_form(request)
            try:
                with self.page_action(request):
                    return RedirectResponse(self.account.pay_session(session, form), 303)
            except StripeError as refusal:
                error, status = refusal.message, refusal.status
            session = self.store.get(session["id"]) or session
        elif session["payment_intent"] and session["status"] == "open":
            failure = (self.store.get(session["payment_intent"]) or {}).get("last_payment_error")
            error = failure["message"] if failure else ""
        if session["status"] != "open":
            return HTMLResponse(pages.closed_checkout(session, success_url(session)), status if status == 409 else 200)
        customer = self.store.get(session["customer"] or "") or {}
        email = session["customer_email"] or customer.get("email") or ""
        return HTMLResponse(pages.checkout(session, session["_line_items"], email, CARDS.values(), error), status)

    async def authenticate_page(self, request: Request) -> Response:
        """The stand-in for the bank's 3-D Secure page."""
        intent_id = request.path_params["intent"]
        intent = self.store.get(intent_id)
        if intent is None or intent.get("status") != "requires_action":
            return HTMLResponse(pages.message("Nothing to do", "There is nothing to authenticate here."), 404)
        if request.method == "GET":
            return HTMLResponse(pages.authenticate(intent))
        passed = (await read_form(request)).get("outcome") == "complete"
        with self.page_action(request):
            return RedirectResponse(self.account.authenticate(intent_id, passed=passed), 303)

    async def portal_page(self, request: Request) -> Response:
        """The billing portal: remove or replace the saved card."""
        portal = self.store.get(request.path_params["session"])
        customer = portal and self.store.get(portal["customer"])
        if not portal or not customer or customer.get("deleted"):
            return HTMLResponse(pages.message("Not found", "There is no such billing portal session."), 404)
        error = ""
        if request.method == "POST":
            form = await read_form(request)
            try:
                with self.page_action(request):
                    self.account.replace_card(customer["id"], form)
                return RedirectResponse(request.url.path, 303)
            except StripeError as refusal:
                error = refusal.message
        methods = self.store.find("payment_method", ("customer", customer["id"]))
        return HTMLResponse(pages.portal(portal, customer, methods, error), 402 if error else 200)

    async def receipt_page(self, request: Request) -> Response:
        """The receipt of a succeeded charge."""
        charge = self.store.get(request.path_params["charge"])
        if not charge or not charge.get("receipt_url"):
            return HTMLResponse(pages.message("Not found", "There is no such receipt."), 404)
        amount = pages.money(charge["amount"], charge["currency"])
        return HTMLResponse(
            pages.message(f"Receipt for {amount}", f"Payment {charge['payment_intent']}, no real money.")
        )

    @contextlib.contextmanager
    def page_action(self, request: Request) -> Iterator[None]:
        """What a person does on a page, in one transaction; its events name no API request."""
        with self.store.transaction():
            self.account.call = Call(base_url=str(request.base_url).rstrip("/"))
            yield

    # -- control

    async def control_page(self, request: Request) -> Response:
        """What happened, with buttons for what else may happen."""
        return HTMLResponse(pages.control(self.state()))

    async def control_state(self, request: Request) -> Response:
        """The same as JSON."""
        return JSONResponse(self.state(int(request.query_params.get("limit", "100"))))

    def state(self, limit: int = 30) -> Object:
        """A summary for people and for tests: counts cover everything, lists the newest."""
        charges = (
            "SELECT count(*), coalesce(sum(json_extract(json, '$.amount')), 0) FROM objects"
            " WHERE type = 'charge' AND json_extract(json, '$.status') = 'succeeded'"
        )
        succeeded = self.store.rows(charges)[0]
        events = self.store.find("event", limit=limit)
        for event in events:
            sql = "SELECT id, state, attempts, answer FROM deliveries WHERE event = ? ORDER BY id"
            event["deliveries"] = [dict(row) for row in self.store.rows(sql, event["id"])]
        states = self.store.rows("SELECT state, count(*) FROM deliveries GROUP BY state")
        lists = {f"{kind}s": self.store.find(kind, limit=limit) for kind in ("payment_intent", "refund", "dispute")}
        return {
            **public(lists),
            "sessions": public(self.store.find("checkout.session", limit=limit)),
            "events": events,
            "succeeded_charges": succeeded[0],
            "succeeded_cents": succeeded[1],
            "deliveries": dict(tuple(row) for row in states),
            "held": bool(self.store.setting("held")),
            "drop": self.store.setting("drop"),
            "faults": [asdict(fault) for fault in self.faults if fault.count > 0],
            "chaos": self.account.chaos.summary(),
        }

    async def control_action(self, request: Request) -> Response:
        """POST /control/…: JSON or form in; JSON out, or back to the page for a browser."""
        wants_page = "text/html" in request.headers.get("accept", "")
        try:
            form = await read_form(request)
            with self.page_action(request):
                result = self.control(request.path_params["path"], form)
            if isinstance(result, str):  # the order in which held deliveries are to be released
                result = {"released": await self.courier.release(result, number(form, "seed", 0))}
        except StripeError as error:
            if wants_page:
                return HTMLResponse(pages.message("Refused", error.message, "/control"), error.status)
            return JSONResponse({"error": error.error}, error.status)
        return RedirectResponse("/control", 303) if wants_page else JSONResponse(public(result))

    def control(self, path: str, form: Mapping[str, str]) -> Object | str:
        """The control page's table of actions."""
        match path.strip("/").split("/"):
            case ["payments", intent, "refund"]:
                given = {"payment_intent": intent, "reason": form.get("reason") or "requested_by_customer"}
                amount = {"amount": number(form, "amount", 0)} if form.get("amount") else {}
                return self.account.create_refund({**given, **amount})
            case ["payments", intent, "dispute"]:
                status, reason = form.get("status") or "needs_response", form.get("reason") or "fraudulent"
                choices = ("needs_response", "warning_needs_response", "prevented")
                check_choice(status, choices, "status")
                amount_cents = number(form, "amount", 0) or None
                return self.account.open_dispute(
                    intent,
                    status=status,
                    amount=amount_cents,
                    reason=reason,
                    currency=form.get("currency", ""),
                    withdraws=bool(number(form, "withdraws", 0)),
                    bare=bool(number(form, "bare", 0)),
                )
            case ["payments", intent, "settle"]:
                outcome = check_choice(form.get("outcome", "succeeded"), ("succeeded", "failed"), "outcome")
                decline = check_choice(form.get("decline") or "debit_not_authorized", tuple(DECLINES), "decline")
                return self.account.settle_delayed(intent, succeeded=outcome == "succeeded", decline=decline)
            case ["payments", intent, "warn"]:
                return self.account.warn_of_fraud(intent)
            case ["disputes", dispute, "escalate"]:
                return self.account.escalate_dispute(dispute)
            case ["disputes", dispute, "close"]:
                outcome = check_choice(form.get("outcome", "lost"), ("won", "lost"), "outcome")
                return self.account.close_dispute({}, dispute, outcome)
            case ["disputes", dispute, "move"]:
                return self.account.move_dispute(
                    dispute,
                    status=form.get("status", "needs_response"),
                    withdrawn_cents=number(form, "withdraw", 0),
                    reinstated_cents=number(form, "reinstate", 0),
                )
            case ["refunds", refund, "fail"]:
                return self.account.fail_refund(refund)
            case ["sessions", session, "tax"]:
                return self.account.tax_session(session, number(form, "amount", 0), bool(number(form, "included", 0)))
            case ["sessions", session, "expire"]:
                return self.account.expire_session({}, session)
            case ["events", event, "resend" | "duplicate" as verb]:
                self.account.load("event", event)
                copies = number(form, "count", 2 if verb == "duplicate" else 1)
                for _ in range(copies):
                    self.account.queue(event)
                return {"queued": copies}
            case ["deliveries", verb]:
                return self.control_deliveries(verb, form)
            case ["faults"]:
                kind = check_choice(form.get("kind", ""), FAULT_KINDS, "kind")
                where = {
                    "path_prefix": form.get("path_prefix") or "/v1/",
                    "method": form.get("method", "").upper(),
                }
                fault = Fault(kind, **where, count=number(form, "count", 1), seconds=number(form, "seconds", 30))
                self.faults.append(fault)
                return asdict(fault)
            case ["faults", "clear"]:
                self.faults.clear()
                return {"faults": []}
            case ["chaos"]:
                chances = {name: fraction(form, name) for name in ("lose", "duplicate", "reorder", "fail")}
                self.account.chaos = Chaos(number(form, "seed", 0), **chances)
                return self.account.chaos.summary()
            case ["webhook_endpoint"]:
                changes: Object = {name: form[name] for name in ("url", "status", "api_version") if name in form}
                if "enabled_events" in form:
                    changes["enabled_events"] = form["enabled_events"].split(",")
                self.account.webhook_endpoint |= changes
                return self.account.webhook_endpoint
            case ["reset"]:
                self.faults.clear()
                self.account.reset_webhook_endpoint()
                self.account.chaos = Chaos()
                for table in ("objects", "idempotency", "deliveries", "settings"):
                    self.store.rows(f"DELETE FROM {table}")  # noqa: S608 – our own names and constants, no input
                return {"reset": True}
        raise StripeError(404, f"Unknown control action: {path}")

    def control_deliveries(self, verb: str, form: Mapping[str, str]) -> Object | str:
        """hold, release (returns the order), drop the next ones, retry all pending ones now."""
        if verb == "hold":
            self.store.set_setting("held", 1)
        elif verb == "drop":
            self.store.set_setting("drop", number(form, "count", 1))
        elif verb == "retry":
            self.store.rows("UPDATE deliveries SET next_attempt_at = 0 WHERE state = 'pending'")
            self.courier.wake.set()
        elif verb == "release":
            return check_choice(form.get("order") or "forward", ("forward", "reverse", "random"), "order")
        else:
            raise StripeError(404, f"Unknown control action: deliveries/{verb}")
        return {"held": bool(self.store.setting("held")), "drop": self.store.setting("drop")}

    async def expire_sessions(self) -> None:
        """Stripe's clock for Checkout Sessions."""
        while True:
            with self.store.transaction():
                self.account.expire_due_sessions()
            await asyncio.sleep(1)


def as_json(value: Any) -> str:
    """Indented, as Stripe answers."""
    return json.dumps(value, indent=2)


def authenticate(request: Request) -> str:
    """The test-mode secret key of the call; live keys are refused so that nobody sends one here for long."""
    api_key = request.headers.get("authorization", "").removeprefix("Bearer ").strip()
    if not api_key:
        raise StripeError(401, "You did not provide an API key. Provide it as `Authorization: Bearer YOUR_SECRET_KEY`.")
    if not re.fullmatch(r"(sk|rk)_test_\w+", api_key):
        raise StripeError(401, f"Invalid API Key provided: {api_key[:8]}****", code="api_key_invalid")
    version = request.headers.get("stripe-version", API_VERSION)
    if version != API_VERSION:
        raise invalid(f"Invalid Stripe API version: {version}. This stand-in speaks {API_VERSION} only.")
    return api_key


def find_operation(method: str, path: str) -> tuple[Operation, tuple[str, ...]]:
    """The line of the table of routes for this call."""
    for operation in OPERATIONS:
        ids = operation.match(method, path)
        if ids is not None:
            return operation, ids
    raise StripeError(404, f"Unrecognized request URL ({method}: {path}).")


async def read_form(request: Request) -> dict[str, str]:
    """Flat fields of a page or a control call, form-encoded or JSON."""
    try:
        text = (await request.body()).decode()
        if "json" in request.headers.get("content-type", ""):
            return {name: str(value) for name, value in json.loads(text or "{}").items()}
        return dict(parse_qsl(text, keep_blank_values=True))
    except (ValueError, AttributeError) as error:
        raise invalid("The body is neither a form nor a JSON object.") from error


def number(form: Mapping[str, str], name: str, default: int) -> int:
    """A whole, non-negative number of a control call."""
    text = form.get(name) or str(default)
    if not text.isdecimal():
        raise invalid(f"Invalid integer: {text}", name, "parameter_invalid_integer")
    return int(text)


def fraction(form: Mapping[str, str], name: str) -> float:
    """A chance of a control call, 0 to 1; 0 when it is left out."""
    text = form.get(name) or "0"
    if not re.fullmatch(r"0(\.[0-9]+)?|1(\.0+)?", text):
        raise invalid(f"Invalid fraction: {text}", name)
    return float(text)


def create_app(data: str, webhook_url: str | None, webhook_secret: str, seed: int | None = None) -> Starlette:
    """The stand-in as an ASGI application. `data`: a file or ':memory:'; no webhook address, no webhooks."""
    store = Store(data)
    courier = Courier(store, webhook_url or "", webhook_secret)
    account = Account(store, courier.wake.set, webhook_url=webhook_url or "", seed=seed)
    standin = Standin(store, account, courier)

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        tasks = [asyncio.create_task(job) for job in (courier.run(), standin.expire_sessions())]
        yield
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        store.db.close()

    routes = [
        Route("/", lambda request: RedirectResponse("/control")),
        Route("/v1/{path:path}", standin.api, methods=["GET", "POST", "DELETE"]),
        Route("/c/pay/{session}", standin.checkout_page, methods=["GET", "POST"]),
        Route("/authenticate/{intent}", standin.authenticate_page, methods=["GET", "POST"]),
        Route("/p/session/{session}", standin.portal_page, methods=["GET", "POST"]),
        Route("/receipts/{charge}", standin.receipt_page),
        Route("/control", standin.control_page),
        Route("/control/state", standin.control_state),
        Route("/control/{path:path}", standin.control_action, methods=["POST"]),
    ]
    return Starlette(routes=routes, lifespan=lifespan)


def main() -> None:
    """Serve on the loopback interface until SIGTERM or SIGINT."""
    parser = argparse.ArgumentParser(description="Local stand-in for Stripe: test money only.")
    parser.add_argument("--port", type=int, default=8010)
    parser.add_argument("--data", default=":memory:", help="SQLite file that keeps the state")
    parser.add_argument("--webhook-url", help="where events are sent")
    parser.add_argument("--webhook-secret", default="whsec_standin")
    parser.add_argument("--seed", type=int, help="makes the ids reproducible")
    options = parser.parse_args()
    app = create_app(options.data, options.webhook_url, options.webhook_secret, options.seed)
    for name in (signal.SIGTERM, signal.SIGINT):  # uvicorn raises the signal again when it has shut down
        signal.signal(name, lambda *_: sys.exit(0))
    uvicorn.run(app, host="127.0.0.1", port=options.port, log_level="warning", timeout_graceful_shutdown=1)


if __name__ == "__main__":
    main()
