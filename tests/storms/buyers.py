"""What the people of a storm do. Each operation has random numbers of its own, which the storm's seed gives."""

import json
import re
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from decimal import Decimal
from random import Random
from typing import Any
from urllib.parse import urljoin
from uuid import UUID

import httpx2
from django.conf import settings
from django.test import Client
from django.urls import reverse

from accounts.models import User
from billing import ledger
from billing.models import Purchase, TokenAccount, TokenPricing
from billing.payments import cards, customers, purchases, recharge_settings, refund_requests
from billing.pricing import TokenPools
from billing.usage import after_debit
from tests.storms.programs import STRIPE_URL, WEB_URL

GOOD, DECLINED, POOR, BANK_DEBIT = "4242424242424242", "4000000000000002", "4000000000009995", "bank_debit"
SECURE_CARD = "4000002760003184"  # 3-D Secure each time
# Cards for auto-recharge, with their shares.
SAVED_CARDS = {"pm_card_visa": 6, "pm_card_chargeCustomerFail": 2, "pm_card_authenticationRequired": 2}

# What happens how often, in parts of a hundred.
SHARES = {
    "buy": 40,
    "spend": 28,
    "refund_at_stripe": 8,
    "request_refund": 6,
    "refund_that_fails": 2,
    "dispute": 9,
    "confirm": 3,
    "visit_success_page": 2,
    "change_card": 2,
}
PATIENCE_SECONDS = 60  # of a person who reloads a page that does not come


class Refused(Exception):
    """The product or Stripe said no, as they may. It is counted."""


@dataclass
class Person:
    """A user with their browser."""

    user_id: int
    email: str
    cookie: str
    csrf_token: str


@dataclass
class Buyers:
    """The users, and what they do. Operations of one user run one after another, in one thread."""

    people: list[Person]
    superadmin_id: int
    accepted: Counter[str] = field(default_factory=Counter)
    refused: Counter[str] = field(default_factory=Counter)
    errors: list[str] = field(default_factory=list)
    later: dict[int, list[Callable[[], None]]] = field(default_factory=dict)  # by thread
    _browsers: threading.local = field(default_factory=threading.local)

    @property
    def http(self) -> httpx2.Client:
        if not hasattr(self._browsers, "http"):
            self._browsers.http = httpx2.Client(timeout=30, verify=False)
        client: httpx2.Client = self._browsers.http
        return client

    # --- Talking to the product and to Stripe's pages ---

    def browse(self, method: str, person: Person, path: str, form: dict[str, Any] | None = None) -> httpx2.Response:
        """Load a page or send a form; again when the server dies over it."""
        deadline = time.monotonic() + PATIENCE_SECONDS
        data = None if form is None else form | {"csrfmiddlewaretoken": person.csrf_token}
        while True:
            try:
                return self.http.request(method, WEB_URL + path, data=data, headers={"Cookie": person.cookie})
            except httpx2.TransportError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.2)

    def control(self, path: str, **parameters: Any) -> Any:
        """A button of the stand-in's control page. Raises Refused."""
        answer = self.http.post(f"{STRIPE_URL}/control/{path}", json=parameters)
        if answer.status_code >= 400:
            raise Refused(answer.json()["error"]["message"])
        return answer.json()

    def ask_stripe(self, path: str, **parameters: Any) -> Any:
        """GET of the stand-in's API, as often as its faults make it necessary."""
        for _ in range(20):
            try:
                headers = {"Authorization": "Bearer sk_test_storm"}
                answer = self.http.get(f"{STRIPE_URL}/v1/{path}", params=parameters, headers=headers, timeout=1)
            except httpx2.TimeoutException:
                continue
            if answer.status_code < 400:
                return answer.json()
            if answer.status_code == 404:
                break
        raise Refused("Stripe does not answer.")

    def payments_of(self, person: Person, status: str) -> list[dict[str, Any]]:
        """The person's payments at Stripe in that state, oldest first."""
        customer_id = TokenAccount.objects.values_list("stripe_customer_id", flat=True).get(user_id=person.user_id)
        if not customer_id:
            return []
        found = self.ask_stripe("payment_intents", customer=customer_id, limit=100)["data"]
        return [payment for payment in reversed(found) if payment["status"] == status]

    def a_payment(self, person: Person, random: Random) -> dict[str, Any]:
        """One of the person's payments that succeeded; without any, they buy first."""
        payments = self.payments_of(person, "succeeded")
        if not payments:
            self.buy(person, random, card=GOOD)
            payments = self.payments_of(person, "succeeded")
        if not payments:
            raise Refused("Nothing was bought yet.")
        return random.choice(payments)

    # --- Running operations ---

    def perform(self, kind: str, person: Person, random: Random) -> None:
        """One operation of the list, and now and then one that was put off."""
        self._counted(kind, lambda: getattr(self, kind)(person, random))
        put_off = self.later.setdefault(threading.get_ident(), [])
        if put_off and random.random() < 0.4:
            self._counted("put_off", put_off.pop(random.randrange(len(put_off))))

    def finish(self) -> None:
        """All that this thread has put off."""
        for action in self.later.pop(threading.get_ident(), []):
            self._counted("put_off", action)

    def _put_off(self, action: Callable[[], None]) -> None:
        self.later.setdefault(threading.get_ident(), []).append(action)

    def _counted(self, kind: str, action: Callable[[], None]) -> None:
        try:
            action()
        except (Refused, refund_requests.RefundError, ledger.LedgerError, purchases.PurchaseError) as refusal:
            without_ids = re.sub(r"[a-z]+_[A-Za-z0-9]{24}|\b[a-z_]*[A-Za-z0-9]*[0-9][A-Za-z0-9,.]*", "#", str(refusal))
            self.refused[f"{kind}: {without_ids[:90]}"] += 1
        except Exception as error:  # the judge prints it, the storm goes on
            self.errors.append(f"{kind}: {error!r}"[:300])

    # --- Money in ---

    def buy(self, person: Person, random: Random, card: str = "") -> None:
        """Click on Buy, perhaps twice, and pay, or not."""
        package = random.choice(list(TokenPricing.objects.filter(name__in=("Starter", "Pro")).order_by("pk")))
        what = {"amount": str(random.randint(5, 90))} if random.random() < 0.1 else {"package_id": package.pk}
        url = ""
        for _ in range(3):  # "Try again", says the page
            form = what | {"checkout_key": _key(random)}
            location = ""
            for _click in range(1 + (random.random() < 0.15)):
                answer = self.browse("POST", person, reverse("tokens:checkout"), form)
                location = answer.headers.get("Location", "")
                if answer.status_code != 302:
                    raise Refused(f"checkout answered with {answer.status_code}")
            if location.startswith(STRIPE_URL):
                url = location
                break
        if not url:
            raise Refused("no payment page was opened")
        self.accepted["checkouts opened"] += 1
        choice = (
            card
            or random.choices(
                (GOOD, "decline, then pay", DECLINED, POOR, SECURE_CARD, BANK_DEBIT, "leave"), (58, 9, 5, 3, 8, 8, 9)
            )[0]
        )
        if choice == "leave":
            return
        if choice == "decline, then pay":
            self._pay(url, DECLINED, random)
            choice = GOOD
        self._pay(url, choice, random)
        if choice == BANK_DEBIT:
            self._put_off(lambda: self._settle_bank_debits(person, random))

    def _pay(self, url: str, card: str, random: Random) -> None:
        answer = self.http.post(url, data={"test_card": card})
        location = answer.headers.get("Location", "")
        if location.startswith("/authenticate/"):
            outcome = "complete" if random.random() < 0.7 else "fail"
            answer = self.http.post(urljoin(url, location), data={"outcome": outcome})
            location = answer.headers.get("Location", "") if outcome == "complete" else ""
        if location.startswith(WEB_URL):
            self.accepted["checkouts paid"] += 1
        elif answer.status_code == 402:
            self.accepted["cards declined"] += 1

    def _settle_bank_debits(self, person: Person, random: Random) -> None:
        for payment in self.payments_of(person, "processing"):
            outcome = "succeeded" if random.random() < 0.7 else "failed"
            self.control(f"payments/{payment['id']}/settle", outcome=outcome)
            self.accepted[f"bank debits {outcome}"] += 1

    def visit_success_page(self, person: Person, random: Random) -> None:
        newest = Purchase.objects.filter(user_id=person.user_id, kind=Purchase.Kind.CHECKOUT).order_by("pk").last()
        if newest is None:
            raise Refused("Nothing was bought yet.")
        if self.browse("GET", person, reverse("tokens:success", args=[newest.pk])).status_code != 200:
            raise Refused("the success page did not come")
        self.accepted["success pages seen"] += 1

    # --- Auto-recharge ---

    def switch_auto_recharge_on(self, person: Person, random: Random) -> None:
        recharge_settings.update_auto_recharge(
            user_id=person.user_id,
            enabled=True,
            threshold_tokens=random.randint(20_000, 140_000),
            package_id=TokenPricing.objects.get(name="Starter").pk,
            monthly_cap_cents=random.choice((None, None, None, 4_500)),
        )
        self.accepted["auto-recharges switched on"] += 1

    def spend(self, person: Person, random: Random) -> None:
        """Most of what is there: auto-recharge is to start."""
        available = TokenAccount.objects.get(user_id=person.user_id).available
        tokens = available * random.randint(50, 97) // 100
        if tokens <= 0:
            raise Refused("nothing left to spend")
        posting = ledger.deduct_tokens(
            user_id=person.user_id,
            tokens=tokens,
            operation=ledger.Operation("chat", "openai", "gpt-6-luna", multiplier=Decimal(1)),
            pools=TokenPools(input_tokens=tokens),
            idempotency_key=_key(random),
        )
        after_debit.follow_debit(posting)
        self.accepted["debits"] += 1

    def confirm(self, person: Person, random: Random) -> None:
        """Somebody whose bank wants to see them comes along: this person if possible, else anybody."""
        waiting = Purchase.objects.filter(state=Purchase.State.ACTION_REQUIRED).order_by("pk")
        purchase = waiting.filter(user_id=person.user_id).first() or waiting.first()
        if purchase is None:
            raise Refused("no payment waits for a confirmation")
        owner = next(each for each in self.people if each.user_id == purchase.user_id)
        path = reverse("tokens:confirm", args=[purchase.pk])
        location = self.browse("POST", owner, path, {"confirm_key": _key(random)}).headers.get("Location", "")
        if not location.startswith(STRIPE_URL):
            purchase.refresh_from_db()
            raise Refused(f"the bank's page was not opened, and the payment is {purchase.state}")
        outcome = "complete" if random.random() < 0.75 else "fail"
        self.http.post(location, data={"outcome": outcome})
        self.accepted[f"confirmations ({outcome})"] += 1
        self.browse("GET", owner, path)

    def change_card(self, person: Person, random: Random) -> None:
        location = self.browse("POST", person, reverse("tokens:card"), {}).headers.get("Location", "")
        if not location.startswith(STRIPE_URL):
            raise Refused("the page of the card was not opened")
        self.http.post(location, data={"test_card": GOOD})
        self.browse("GET", person, reverse("tokens:card"))
        self.accepted["cards changed"] += 1

    # --- Money out ---

    def refund_at_stripe(self, person: Person, random: Random) -> None:
        """On Stripe's own dashboard: all that is left, or a part."""
        payment = self.a_payment(person, random)
        part = {"amount": random.randint(50, payment["amount"])} if random.random() < 0.5 else {}
        self.control(f"payments/{payment['id']}/refund", **part)
        self.accepted["refunds at Stripe"] += 1

    def refund_that_fails(self, person: Person, random: Random) -> None:
        payment = self.a_payment(person, random)
        refund = self.control(f"payments/{payment['id']}/refund", amount=random.randint(50, payment["amount"]))

        def fail() -> None:
            self.control(f"refunds/{refund['id']}/fail")
            self.accepted["refunds failed"] += 1

        self._put_off(fail)

    def request_refund(self, person: Person, random: Random) -> None:
        """A superadmin refunds a purchase, sometimes with a double click."""
        paid = list(Purchase.objects.filter(user_id=person.user_id, state=Purchase.State.PAID).order_by("pk"))
        if not paid:
            raise Refused("Nothing was paid yet.")
        purchase = random.choice(paid)
        left_cents = refund_requests.refundable_cents(purchase)
        amount_cents = left_cents if random.random() < 0.5 else random.randint(1, max(1, left_cents))
        request_key = _key(random)
        for _ in range(1 + (random.random() < 0.3)):
            refund_requests.request_refund(
                purchase_id=purchase.pk,
                amount_cents=amount_cents,
                reason="Asked for in a storm",
                requested_by_id=self.superadmin_id,
                request_key=request_key,
            )
        self.accepted["refunds requested"] += 1

    def dispute(self, person: Person, random: Random) -> None:
        """The bank disputes a payment, wholly or in part; some are won, some lost, some stay open."""
        payment = self.a_payment(person, random)
        outcome = random.choices(("won", "lost", "open", "warning_needs_response", "prevented"), (35, 35, 15, 8, 7))[0]
        status = outcome if outcome in ("warning_needs_response", "prevented") else "needs_response"
        part = {"amount": random.randint(50, payment["amount"])} if random.random() < 0.3 else {}
        dispute = self.control(f"payments/{payment['id']}/dispute", status=status, **part)
        self.accepted["disputes opened"] += 1

        def close() -> None:
            closing = outcome if outcome in ("won", "lost") else "lost"
            self.control(f"disputes/{dispute['id']}/close", outcome=closing)
            self.accepted[f"disputes {outcome}"] += 1

        if outcome in ("won", "lost", "warning_needs_response"):
            self._put_off(close)


def _key(random: Random) -> str:
    return UUID(int=random.getrandbits(128), version=4).hex


# --- The cast -------------------------------------------------------------------------------------------------------


def make_people(count: int) -> Buyers:
    """Users with an open account and a session, and a superadmin."""
    superadmin = User.objects.create(email="super@storm.example", password="!", role=User.Role.SUPERADMIN)
    people = []
    for number in range(1, count + 1):
        user = User.objects.create(email=f"user{number}@storm.example", password="!", name=f"User {number}")
        ledger.initialize_account(user_id=user.pk)
        client = Client()
        client.force_login(user)
        session = client.cookies[settings.SESSION_COOKIE_NAME].value
        csrf_token = f"{number:032}"
        cookie = f"{settings.SESSION_COOKIE_NAME}={session}; {settings.CSRF_COOKIE_NAME}={csrf_token}"
        people.append(Person(user.pk, user.email, cookie, csrf_token))
    return Buyers(people, superadmin.pk)


def save_card(http: httpx2.Client, person: Person, random: Random) -> None:
    """Give a person a customer at Stripe with a card to charge, as an earlier checkout would have."""
    headers = {"Authorization": "Bearer sk_test_storm"}
    answer = http.post(f"{STRIPE_URL}/v1/customers", data={"email": person.email}, headers=headers)
    customer_id = answer.raise_for_status().json()["id"]
    card = random.choices(list(SAVED_CARDS), list(SAVED_CARDS.values()))[0]
    url = f"{STRIPE_URL}/v1/payment_methods/{card}/attach"
    http.post(url, data={"customer": customer_id}, headers=headers).raise_for_status()
    customers.update_stripe_customer(user_id=person.user_id, stripe_customer_id=customer_id)
    cards.refresh_card(user_id=person.user_id)


def list_operations(random: Random, *, users: int, operations: int) -> list[tuple[str, int]]:
    """What happens, and to the how-manieth user: the same for the same seed."""
    kinds = [kind for kind, share in SHARES.items() for _ in range(-(-operations * share // 100))]
    random.shuffle(kinds)
    return [(kind, random.randrange(users)) for kind in kinds[:operations]]


def read_all(http: httpx2.Client, kind: str) -> list[dict[str, Any]]:
    """All objects of a kind that the stand-in has, newest first."""
    found: list[dict[str, Any]] = []
    while True:
        parameters = {"limit": 100} | ({"starting_after": found[-1]["id"]} if found else {})
        answer = http.get(
            f"{STRIPE_URL}/v1/{kind}", params=parameters, headers={"Authorization": "Bearer sk_test_storm"}
        )
        page = json.loads(answer.raise_for_status().content)
        found += page["data"]
        if not page["has_more"]:
            return found
