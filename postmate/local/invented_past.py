"""A database with a past: a year of people who sign up, work, pay and stop, in which every law of the books holds.

The ledger writes the present: at the database's clock, a statement for each entry. A past is written with COPY instead,
in the order of time, and is kept only when `verify_ledger` finds every law kept by it: until then nothing is committed.
For development databases alone.
"""

# ruff: noqa: S311, SIM905  (random numbers that are no secrets; names read better in a line)

import json
import math
import random
from bisect import bisect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from functools import partial
from heapq import heappop, heappush
from itertools import accumulate
from typing import Any

from django.conf import settings
from django.core.exceptions import ImproperlyConfigured
from django.db import connection
from django.db.models import Max
from django.utils import timezone

from accounts.models import User
from billing import catalogue
from billing.catalogue import system_settings
from billing.figures import roll_ups
from billing.ledger import WELCOME_BONUS_KEY, welcome
from billing.models import ModelPrice, Purchase, TokenPricing, TokenUsage
from billing.pricing import TokenPools, calculate_llm_billable_tokens
from billing.upkeep import verification

DAYS_IN_MONTH = 30.44
CARD = "visa\t4242"
UNUSABLE = "!demo"  # nobody can sign in with it
CHUNK = 50_000  # rows between two COPYs
NULL = r"\N"

# What people do, with shares and the tokens of a typical operation (in, out).
OPERATIONS = {
    "chat": (36, 900, 350),
    "generation": (28, 500, 900),
    "refinement": (16, 1_100, 700),
    "repurpose": (8, 1_300, 600),
    "image": (8, 60, 1_000),
    "prompt": (4, 150, 120),
}
SLOW_OPERATIONS = ("image", "generation", "repurpose")
WEEKDAYS = (1.1, 1.15, 1.15, 1.1, 1.0, 0.5, 0.45)
HOURS = (2, 1, 1, 1, 2, 3, 5, 8, 11, 13, 13, 12, 10, 11, 13, 13, 12, 10, 8, 7, 7, 6, 5, 3)
PACKAGE_SHARES = (45, 35, 15, 5)
PER_USD = {"usd": 1, "eur": 0.92, "gbp": 0.79}  # where a package has no price in that currency
GRANT_REASONS = (
    "Lost an afternoon to the provider's outage", "Beta tester of the chat", "Speaker at our spring meetup",
    "For the detailed bug report", "Pilot project, agreed with sales", "Goodwill after a billing question",
)  # fmt: skip
FIRST_NAMES = (
    "Ada Alan Amara Anna Ben Carla Chen Clara Daniel Diego Elena Emil Fatima Felix Grace Hana Hugo Ines Ivan Jana "
    "Jonas Kofi Lars Lea Leon Lina Luca Maja Marco Maria Mei Mila Nadia Noah Nora Olga Omar Oscar Paul Pia Priya "
    "Rosa Ruth Sam Sara Sofia Tariq Theo Vera Yusuf"
).split()
LAST_NAMES = (
    "Adler Bauer Becker Brandt Cohen Costa Diaz Dupont Eriksen Fischer Fontana Garcia Haddad Hansen Huber Ito Jansen "
    "Kaya Keller Kim Kovacs Kumar Lang Lindberg Lopez Marino Meier Mensah Moreau Mueller Nagy Novak Okafor Olsen Park "
    "Patel Pereira Petrov Reyes Rossi Santos Sato Schmidt Silva Singh Smith Tanaka Vogel Weber Yilmaz"
).split()

COLUMNS = {
    "accounts_user": "id, password, email, name, role, is_active, time_zone, date_joined",
    "accounts_workspace": "id, owner_id, name, created_at",
    "billing_tokenaccount": "id, user_id, workspace_id, currency, stripe_customer_id, stripe_email, "
    "stripe_name, auto_recharge_enabled, "
    "auto_recharge_threshold_tokens, auto_recharge_package_id, auto_recharge_price_cents, "
    "auto_recharge_package_tokens, card_brand, card_last4, created_at",
    "billing_purchase": "id, account_id, user_id, workspace_id, kind, state, package_id, package_name, tokens, "
    "amount_cents, currency, discount_cents, charged_cents, stripe_session_id, stripe_payment_intent_id, failure_code, "
    "message, created_at, expires_at, paid_at, checked_at, receipt_number, payment_method_type, "
    "card_brand, card_last4, stripe_price_id, checkout_url, receipt_url",
    "billing_tokenusage": "id, account_id, user_id, workspace_id, created_at, completed_at, expires_at, "
    "idempotency_key, status, operation_type, provider, model, input_tokens, cached_input_tokens, cache_write_tokens, "
    "output_tokens, reasoning_tokens, image_count, image_size, image_quality, actual_tokens, billable_tokens, "
    "reserved_tokens, unbilled_tokens, charge_type, multiplier, fixed_cost_tokens, provider_cost_microusd, "
    "error_message, duration_ms",
    "billing_tokentransaction": "id, account_id, user_id, workspace_id, sequence, type, amount, balance_before, "
    "balance_after, usage_id, purchase_id, admin_id, paid_cents, currency, stripe_payment_intent_id, idempotency_key, "
    "description, metadata, created_at",
    "billing_grantrequest": "id, kind, account_id, user_id, tokens, reason, requested_by_id, requested_by_role, "
    "request_key, admin_limit_tokens, needs_two, state, decided_by_id, decided_at, transaction_id, created_at",
    # Numbered by the database: a trigger writes some, too.
    "accounts_auditentry": "created_at, actor_id, actor_role, action, summary, reason, subject_id, object_type, "
    "object_id, before, after",
    "billing_paymentreversal": "id, kind, stripe_id, stripe_payment_intent_id, purchase_id, amount_cents, currency, "
    "status, reason, withdrawn_cents, created_at, updated_at",
    "billing_stripeevent": "id, event_id, type, api_version, livemode, payload, state, message, attempts, received_at, "
    "processed_at",
}


@dataclass(slots=True)
class Person:
    number: int  # of the user, their workspace and their account, counted from each table's first new id
    joined_at: datetime
    weight: float  # how much they work; 0 once they have stopped
    pays: bool
    auto_recharges: bool
    currency: str
    package: TokenPricing
    last_at: datetime  # of their newest ledger row
    balance: int = 0
    sequence: int = 0
    stays: bool = False  # and buys whenever tokens are missing


@dataclass(frozen=True, slots=True)
class Cast:
    """Somebody of a past who is not left to chance: they are there from its first day on, and stay."""

    email: str
    name: str
    role: str
    password: str  # hashed
    weight: float  # how much they work; an ordinary person has 1 to 5
    currency: str = "usd"


@dataclass(slots=True)
class Planned:
    """An operation at a known time by the first of the cast, with sizes to match what they made. Its row's number and
    times are known once it is written."""

    at: datetime
    operation: str
    model: str
    input_tokens: int = 0
    output_tokens: int = 0
    images: int = 0
    usage_id: int = 0
    begun_at: datetime | None = None
    ended_at: datetime | None = None


@dataclass(frozen=True, slots=True)
class Pattern:
    """An operation that somebody may run: its columns from `status` on, as COPY takes them."""

    columns: str
    billable_tokens: int  # 0: it fails
    needed_tokens: int
    is_reserved: bool
    duration: timedelta
    description: str


@dataclass(slots=True)
class Tables:
    """New rows by table, written in the order in which they refer to one another."""

    first_ids: dict[str, int] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)
    lines: dict[str, list[str]] = field(default_factory=dict)

    @classmethod
    def locked(cls) -> "Tables":
        """Their next ids are ours until the transaction's end."""
        tables = cls()
        with connection.cursor() as cursor:
            cursor.execute(f"LOCK TABLE {', '.join(COLUMNS)} IN SHARE ROW EXCLUSIVE MODE")
            cursor.execute("SET CONSTRAINTS ALL IMMEDIATE")  # else millions of checks wait in memory for the commit
            for table in COLUMNS:
                cursor.execute(f"SELECT coalesce(max(id), 0) + 1 FROM {table}")  # noqa: S608 – our own names and constants, no input
                tables.first_ids[table], tables.counts[table], tables.lines[table] = cursor.fetchone()[0], 0, []
        return tables

    def next_id(self, table: str) -> int:
        return self.first_ids[table] + self.counts[table]

    def add(self, table: str, line: str) -> int:
        """Add a row: its columns after the id. Returns the id."""
        id = self.first_ids[table] + self.counts[table]
        self.counts[table] += 1
        self.lines[table].append(f"{id}\t{line}\n" if COLUMNS[table].startswith("id,") else f"{line}\n")
        return id

    def flush(self) -> None:
        with connection.cursor() as cursor:
            for table, columns in COLUMNS.items():
                if lines := self.lines[table]:
                    with cursor.copy(f"COPY {table} ({columns}) FROM STDIN") as copy:
                        copy.write("".join(lines))
                    lines.clear()

    def set_sequences(self) -> None:
        with connection.cursor() as cursor:
            for table in (table for table, columns in COLUMNS.items() if columns.startswith("id,")):
                cursor.execute(
                    f"SELECT setval(pg_get_serial_sequence('{table}', 'id'), greatest(max(id), 1)) FROM {table}"  # noqa: S608 – our own names and constants, no input
                )


def roll_up() -> datetime | None:
    """After the commit: make the roll-ups. Returns how far they reach; None when another transaction holds them up."""
    reached = roll_ups.rebuild()
    with connection.cursor() as cursor:
        cursor.execute("ANALYZE billing_usagehour, billing_usageday, billing_ledgerhour")
    return reached


class LawBroken(Exception):
    """The past that was invented breaks a law, so it must not be committed."""


def prove() -> None:
    """All rows of the past are there: tell PostgreSQL how many, and look whether every law holds. Raises LawBroken."""
    with connection.cursor() as cursor:
        cursor.execute(f"ANALYZE {', '.join(COLUMNS)}")
    roll_ups.rebuild()  # what was rolled up before has a past now
    broken = [finding for finding in verification.verify() if finding.violations]
    if broken:
        raise LawBroken("; ".join(f"{finding.check.name}: {finding.examples}" for finding in broken))


Event = Callable[[Person, datetime], None]


class History:
    """The simulation. Whatever happens is written in the order of time, and the books are kept in memory.

    Make it in a transaction, which `prove` ends. It ends ten minutes before now, and is the same for the same seed and
    moment. Without `has_payments` nothing in it can be asked of Stripe: purchases name no payment there, and none is
    given back.
    """

    def __init__(
        self,
        *,
        transactions: int,
        users: int,
        months: int,
        seed: int,
        cast: Sequence[Cast] = (),
        plan: Sequence[Planned] = (),
        has_payments: bool = True,
        reversed_every: int = 50,
        grant_share: float = 0.01,
        size: float = 1,
    ) -> None:
        if not settings.DEBUG:
            raise ImproperlyConfigured("An invented past is for development only.")
        self.random = random.Random(seed)
        self.has_payments = has_payments
        self.reversed_every, self.grant_share = reversed_every, grant_share
        self.size = size  # of operations, beside the typical ones
        self.transactions = transactions
        self.end = timezone.now() - timedelta(minutes=10)
        self.start = self.end - timedelta(days=months * DAYS_IN_MONTH)
        self.tables = Tables.locked()
        self.settings = system_settings.get_system_settings()
        self.packages = list(TokenPricing.objects.filter(is_active=True).order_by("tokens")[: len(PACKAGE_SHARES)])
        superadmin = User.objects.filter(role=User.Role.SUPERADMIN).order_by("pk").first()
        first_id = self.tables.next_id("accounts_user")
        ids = [first_id + number for number, each in enumerate(cast) if each.role == User.Role.SUPERADMIN]
        self.superadmin_id = superadmin.pk if superadmin else ids[0] if ids else first_id + users
        self.people = self._people(users, cast)
        if superadmin is None and not ids:
            self._write_user("Superadmin", f"superadmin-{self.superadmin_id}@example.com", "superadmin", self.start)
        self.patterns = self._patterns(min(10_000, transactions))
        # (when, number to break ties, person, what): refunds, disputes and grants that are to come.
        self.agenda: list[tuple[datetime, int, Person, Event]] = []
        self.planned = self.sales = 0
        self.receipts = Purchase.objects.aggregate(number=Max("receipt_number"))["number"] or 0
        prices = {price.model: price for price in ModelPrice.objects.all()}
        for each in plan:
            pattern = self._pattern(each.operation, prices[each.model], planned=each)
            self._plan(each.at, self.people[0], partial(self._operate_as_planned, planned=each, pattern=pattern))

    # --- People ---

    def _people(self, users: int, cast: Sequence[Cast]) -> list[Person]:
        span = (self.end - self.start).total_seconds()
        # More sign up the longer it exists.
        joined = sorted(self.start + timedelta(seconds=span * self.random.random() ** 0.6) for _ in range(users))
        joined[: len(cast)] = [self.start] * len(cast)
        people = []
        self.addresses: list[str] = []
        for number, joined_at in enumerate(joined):
            role = cast[number] if number < len(cast) else None
            pays = self.random.random() < 0.3 or role is not None
            person = Person(
                number=number,
                joined_at=joined_at,
                weight=role.weight if role else self.random.lognormvariate(0.8 if pays else 0, 1.1),
                pays=pays,
                auto_recharges=pays and self.random.random() < 0.25 and not role,
                currency=role.currency if role else self.random.choices(("usd", "eur", "gbp"), (60, 28, 12))[0],
                package=self.random.choices(self.packages, PACKAGE_SHARES[: len(self.packages)])[0],
                last_at=joined_at,
                stays=role is not None,
            )
            first, last = self.random.choice(FIRST_NAMES), self.random.choice(LAST_NAMES)
            user_id = self.tables.next_id("accounts_user")
            name, email = f"{first} {last}", f"{first}.{last}.{user_id}@example.com".lower()
            if role:
                name, email, person.package = role.name, role.email, self.packages[:2][-1]
                self._write_user(name, email, role.role, joined_at, role.password)
            else:
                self._write_user(name, email, "user", joined_at)
            self.addresses.append(email)
            workspace_id = self.tables.add(
                "accounts_workspace", f"{user_id}\t{name.partition(' ')[0]}'s workspace\t{joined_at}"
            )
            account_id = self.tables.next_id("billing_tokenaccount")
            has_card = pays and (role is None or role.weight > 0)
            card = CARD if has_card else "\t"
            package = (
                f"{person.package.pk}\t{self._price_cents(person)}\t{person.package.tokens}"
                if person.auto_recharges
                else f"{NULL}\t{NULL}\t{NULL}"
            )
            customer = f"cus_demo{account_id}\t{email}\t{name}" if has_card and self.has_payments else f"{NULL}\t\t"
            self.tables.add(
                "billing_tokenaccount",
                f"{user_id}\t{workspace_id}\t{person.currency}\t{customer}\t{person.auto_recharges}\t5000\t{package}"
                f"\t{card}\t{joined_at}",
            )
            people.append(person)
        return people

    def _write_user(self, name: str, email: str, role: str, at: datetime, password: str = UNUSABLE) -> None:
        self.tables.add("accounts_user", f"{password}\t{email}\t{name}\t{role}\ttrue\t\t{at}")

    def _ids(self, person: Person) -> str:
        ids = self.tables.first_ids
        return (
            f"{ids['billing_tokenaccount'] + person.number}\t{ids['accounts_user'] + person.number}"
            f"\t{ids['accounts_workspace'] + person.number}"
        )

    # --- Operations ---

    def _patterns(self, count: int) -> list[Pattern]:
        prices = list(ModelPrice.objects.filter(is_active=True))
        models = {kind: [price for price in prices if price.kind == kind] for kind in ("text", "image")}
        shares = {kind: [1 / (rank + 1) for rank in range(len(models[kind]))] for kind in models}
        names = list(OPERATIONS)
        patterns = []
        for _ in range(count):
            operation = self.random.choices(names, [OPERATIONS[name][0] for name in names])[0]
            kind = "image" if operation == "image" else "text"
            price = self.random.choices(models[kind], shares[kind])[0]
            patterns.append(self._pattern(operation, price))
        return patterns

    def _pattern(self, operation: str, price: ModelPrice, planned: Planned | None = None) -> Pattern:
        _, typical_input, typical_output = OPERATIONS[operation]
        size = self.size * self.random.lognormvariate(0, 0.6)
        outcome = self.random.random()
        status = "expired" if outcome < 0.003 else "failed" if outcome < 0.033 else "succeeded"
        if planned:
            status = "succeeded"
        cached = int(typical_input * size * 0.5) if operation == "chat" else 0
        output = int(typical_output * size) + 1
        pools = TokenPools(
            input_tokens=int(typical_input * size) + 1,
            cached_input_tokens=cached,
            output_tokens=output,
            reasoning_tokens=output // 4 if self.random.random() < 0.3 else 0,
        )
        images = self.random.choice((1, 1, 2, 4)) if operation == "image" else 0
        if planned:
            images = planned.images
            pools = TokenPools(input_tokens=planned.input_tokens, output_tokens=planned.output_tokens)
        if images:
            cost_each = catalogue.image_cost_tokens(price, self.settings, size="1024x1024", quality="")
            cost, charge = cost_each * images, f"fixed\t{NULL}\t{cost_each}"
        else:
            multiplier = catalogue.multiplier(price, self.settings)
            billable = calculate_llm_billable_tokens(
                pools.actual_tokens - pools.output_tokens, pools.output_tokens, multiplier
            )
            cost, charge = billable.billable_tokens, f"multiplier\t{multiplier}\t{NULL}"
        quote = cost if images else int(cost * self.random.uniform(1.05, 2.5)) + 1
        if not images and self.random.random() < 0.01:
            quote = max(1, cost * 8 // 10)  # the provider used more than anybody thought
        is_reserved = status != "succeeded" or self.random.random() < 0.97
        if not is_reserved:
            quote = cost
        billed = min(cost, quote) if status == "succeeded" else 0
        unbilled = cost - billed if status == "succeeded" else 0
        usd_microusd = catalogue.provider_cost_microusd(
            price, pools, image_count=images, image_size="1024x1024" if images else "", image_quality=""
        )
        if status != "succeeded":
            pools, usd_microusd = TokenPools(), 0
        milliseconds = int(1_000 * self.random.lognormvariate(1.4 if operation in SLOW_OPERATIONS else 0.9, 0.5))
        error = {"failed": "The provider is overloaded.", "expired": "The operation did not finish in time."}
        columns = (
            status, operation, price.provider, price.model, pools.input_tokens, pools.cached_input_tokens, 0,
            pools.output_tokens, pools.reasoning_tokens, images, "1024x1024" if images else "", "",
            pools.actual_tokens, billed, quote if is_reserved else NULL, unbilled, charge, usd_microusd,
            error.get(status, ""), milliseconds if status != "expired" else NULL,
        )  # fmt: skip
        label = TokenUsage.OperationType(operation).label
        return Pattern(
            columns="\t".join(map(str, columns)),
            billable_tokens=billed,
            needed_tokens=max(quote, billed),
            is_reserved=is_reserved,
            duration=timedelta(milliseconds=milliseconds),
            description=f"{label} · {price.model}",
        )

    def make(self) -> Iterator[int]:
        """Let it all happen. Yields how many ledger entries there are, now and then."""
        self.tables.flush()
        joining = iter(self.people)
        newcomer = next(joining, None)
        working: list[Person] = []
        days = self._days()
        masses = self._masses(days)
        for day, share in zip(days, masses, strict=True):
            working = [person for person in working if person.weight > 0]
            moments = self._moments(day, math.ceil(share * self._missing()))
            weights = list(accumulate(person.weight for person in working))
            for moment in moments:
                while newcomer and newcomer.joined_at <= moment:
                    self._welcome(newcomer)
                    working.append(newcomer)
                    weights.append((weights[-1] if weights else 0) + newcomer.weight)
                    newcomer = next(joining, None)
                self._do_what_is_due(moment)
                if working:
                    self._work(working, weights, moment)
                if len(self.tables.lines["billing_tokenusage"]) >= CHUNK:
                    self.tables.flush()
                    yield self.tables.counts["billing_tokentransaction"]
                if not self._missing():
                    break
        while newcomer:
            self._welcome(newcomer)
            newcomer = next(joining, None)
        self._do_what_is_due(self.end)
        self.tables.flush()
        self._write_accounts()
        if self.settings.welcome_bonus_tokens:
            welcome.remember(self.addresses)
        self.tables.set_sequences()
        yield self.tables.counts["billing_tokentransaction"]

    def _do_what_is_due(self, moment: datetime) -> None:
        while self.agenda and self.agenda[0][0] <= moment:
            at, _, person, event = heappop(self.agenda)
            event(person, at)

    def _missing(self) -> int:
        """Debits that the rest of the time has to bring."""
        waiting = len(self.people) - self.tables.counts["billing_tokentransaction"]
        return max(0, self.transactions - max(waiting, 0) - self.tables.counts["billing_tokentransaction"])

    def _days(self) -> list[datetime]:
        first = roll_ups.day_of(self.start)
        return [first + timedelta(days=number) for number in range((self.end - first).days + 1)]

    def _masses(self, days: Sequence[datetime]) -> list[float]:
        """Of what is still missing, each day's part: more people make more work, and weekends less."""
        joined = sorted(person.joined_at for person in self.people)
        masses = [bisect(joined, day + timedelta(days=1)) * WEEKDAYS[day.weekday()] for day in days]
        masses[-1] *= (self.end - days[-1]) / timedelta(days=1)
        left = list(accumulate(reversed(masses)))[::-1]
        return [mass / rest * 1.035 if rest else 0 for mass, rest in zip(masses, left, strict=True)]

    def _moments(self, day: datetime, count: int) -> list[datetime]:
        begin = max(day, self.start)
        last = min(day + timedelta(days=1), self.end)
        hours = self.random.choices(range(24), HOURS, k=count)
        moments = [day + timedelta(seconds=3_600 * (hour + self.random.random())) for hour in hours]
        span = (last - begin).total_seconds()
        return sorted(
            each if begin <= each < last else begin + timedelta(seconds=span * self.random.random()) for each in moments
        )

    def _work(self, working: list[Person], weights: list[float], moment: datetime) -> None:
        pattern = self.random.choice(self.patterns)
        for _ in range(20):
            person = working[bisect(weights, self.random.random() * weights[-1], hi=len(weights) - 1)]
            if person.weight and self._can_afford(person, pattern, moment):
                break
        else:
            return
        self._operate(person, pattern, moment)

    def _operate_as_planned(self, person: Person, at: datetime, *, planned: Planned, pattern: Pattern) -> None:
        while person.balance < pattern.needed_tokens:
            self._buy(person, at - timedelta(seconds=30), is_auto=False)
        planned.usage_id, planned.begun_at, planned.ended_at = self._operate(person, pattern, at)

    def _operate(self, person: Person, pattern: Pattern, moment: datetime) -> tuple[int, datetime, datetime]:
        """Write it. Returns its number, and when it began and ended."""
        at = max(moment, person.last_at + timedelta(milliseconds=1))
        ids, begun_at = self._ids(person), at - pattern.duration
        expires_at = begun_at + timedelta(minutes=10) if pattern.is_reserved else NULL
        usage_id = self.tables.next_id("billing_tokenusage")
        self.tables.add(
            "billing_tokenusage", f"{ids}\t{begun_at}\t{at}\t{expires_at}\tdemo-{usage_id}\t{pattern.columns}"
        )
        if pattern.billable_tokens:
            self._post(person, "usage", -pattern.billable_tokens, at, usage_id=usage_id, text=pattern.description)
        if person.auto_recharges and person.balance < 5_000:
            self._buy(person, at + timedelta(seconds=3), is_auto=True)
        return usage_id, begun_at, at

    def _can_afford(self, person: Person, pattern: Pattern, moment: datetime) -> bool:
        """Whether the balance, or what they buy now, covers it. Those who do not pay stop."""
        if person.balance >= pattern.needed_tokens:
            return True
        if not person.pays or (self.random.random() < 0.04 and not person.stays):
            person.weight = 0
            return False
        if self.random.random() < 0.12:
            self._fail_to_buy(person, moment - timedelta(minutes=4))
        self._buy(person, moment - timedelta(seconds=30), is_auto=False)
        return person.balance >= pattern.needed_tokens

    # --- Money ---

    def _welcome(self, person: Person) -> None:
        if bonus_tokens := self.settings.welcome_bonus_tokens:
            self._post(person, "bonus", bonus_tokens, person.joined_at, key=WELCOME_BONUS_KEY, text="Welcome bonus")
        # Of the cast everybody who works is given something once.
        if self.random.random() < self.grant_share or (person.stays and person.weight):
            at = person.joined_at + timedelta(days=self.random.uniform(1, 60))
            self._plan(at, person, self._grant)

    def _plan(self, at: datetime, person: Person, event: Event) -> None:
        if at < self.end:
            self.planned += 1
            heappush(self.agenda, (at, self.planned, person, event))

    def _grant(self, person: Person, at: datetime) -> None:
        """What billing/staff/grants.py writes when a superadmin gives or takes tokens: request, entry and audit log."""
        account_id, user_id, _ = self._ids(person).split("\t")
        if int(user_id) == self.superadmin_id:  # nobody gives tokens to themselves
            return
        tokens = self.random.choice((5_000, 10_000, 25_000))
        is_deduction = person.balance > tokens and self.random.random() < 0.1
        kind, reason = (
            ("deduction", "Granted by mistake") if is_deduction else ("grant", self.random.choice(GRANT_REASONS))
        )
        request_id, admin_id, before = self.tables.next_id("billing_grantrequest"), self.superadmin_id, person.balance
        past = {
            "grant_request_id": request_id, "admin_role": "superadmin", "admin_limit_tokens": 0,
            "requested_by_id": admin_id, "first_approved_by_id": None,
        }  # fmt: skip
        entry_id = self._post(
            person, f"admin_{kind}", -tokens if is_deduction else tokens, at, admin_id=admin_id, text=reason,
            key=f"grant-request-{request_id}", metadata=past,
        )  # fmt: skip
        self.tables.add(
            "billing_grantrequest",
            f"{kind}\t{account_id}\t{user_id}\t{tokens}\t{reason}\t{admin_id}\tsuperadmin\tdemo-{request_id}\t0\tfalse"
            f"\tdone\t{admin_id}\t{person.last_at}\t{entry_id}\t{person.last_at}",
        )
        balances = "\t".join(json.dumps({"balance_tokens": tokens}) for tokens in (before, person.balance))
        self.tables.add(
            "accounts_auditentry",
            f"{person.last_at}\t{admin_id}\tsuperadmin\t{kind}\t{kind.title()} of {tokens:,} tokens carried out"
            f"\t{reason}\t{user_id}\tgrant_request\t{request_id}\t{balances}",
        )

    def _price_cents(self, person: Person) -> int:
        package = person.package
        return package.price_cents(person.currency) or round(package.price_usd_cents * PER_USD[person.currency])

    def _purchase(
        self, person: Person, at: datetime, *, kind: str, state: str, failure: str = "", discount_cents: int = 0
    ) -> int:
        id = self.tables.next_id("billing_purchase")
        package, price_cents = person.package, self._price_cents(person)
        is_paid = state == "paid"
        charged = price_cents - discount_cents if is_paid else NULL
        method = f"card\t{CARD}" if is_paid else "\t\t"
        self.receipts += is_paid  # numbered without gaps
        session = f"cs_demo_{id}" if kind == "checkout" else NULL
        intent = f"pi_demo_{id}" if is_paid and self.has_payments else NULL
        code, message = ("card_declined", "Your card was declined.") if failure else ("", "")
        expires_at = at + timedelta(hours=24) if kind == "checkout" else NULL
        return self.tables.add(
            "billing_purchase",
            f"{self._ids(person)}\t{kind}\t{state}\t{package.pk}\t{package.name}\t{package.tokens}\t{price_cents}"
            f"\t{person.currency}\t{discount_cents}\t{charged}\t{session}\t{intent}\t{code}\t{message}"
            f"\t{at - timedelta(seconds=60 if kind == 'checkout' else 1)}\t{expires_at}"
            f"\t{at if is_paid else NULL}\t{at + timedelta(seconds=2) if is_paid else NULL}"
            f"\t{self.receipts if is_paid else NULL}\t{method}\t\t\t",
        )

    def _fail_to_buy(self, person: Person, at: datetime) -> None:
        is_abandoned = self.random.random() < 0.5 and at < self.end - timedelta(days=2)
        self._purchase(
            person, at, kind="checkout", state="expired" if is_abandoned else "failed",
            failure="" if is_abandoned else "card_declined",
        )  # fmt: skip

    def _buy(self, person: Person, at: datetime, *, is_auto: bool) -> None:
        at = max(at, person.last_at + timedelta(milliseconds=1))
        if is_auto and self.random.random() < 0.05:
            self._purchase(person, at, kind="auto_recharge", state="failed", failure="card_declined")
            at += timedelta(seconds=2)
        price_cents = self._price_cents(person)
        has_discount = not is_auto and self.random.random() < 0.06
        discount_cents = price_cents // 5 if has_discount else 0
        kind = "auto_recharge" if is_auto else "checkout"
        purchase_id = self._purchase(person, at, kind=kind, state="paid", discount_cents=discount_cents)
        revenue_cents, tokens = price_cents - discount_cents, person.package.tokens
        intent = f"pi_demo_{purchase_id}" if self.has_payments else NULL
        self._post(
            person, "auto_recharge" if is_auto else "purchase", tokens, at, purchase_id=purchase_id, intent=intent,
            paid_cents=revenue_cents, key=f"purchase-{purchase_id}", text=f"{person.package.name} package",
        )  # fmt: skip
        seconds = self.random.lognormvariate(-1, 1)
        event_id = self.tables.next_id("billing_stripeevent")
        event_type = "payment_intent.succeeded" if is_auto else "checkout.session.completed"
        self.tables.add(
            "billing_stripeevent",
            f"evt_demo_{event_id}\t{event_type}\t2026-10-28\tfalse\t{{}}\tprocessed\t\t1\t{at}"
            f"\t{at + timedelta(seconds=seconds)}",
        )
        self.sales += 1
        cycle, place = divmod(self.sales, self.reversed_every)
        if place == self.reversed_every // 2 and self.has_payments:
            kind, is_whole = (("refund", False), ("refund", True), ("dispute", True))[cycle % 3]
            paid = (purchase_id, tokens, revenue_cents, kind, is_whole)
            days = self.random.uniform(0.1, 20)
            self._plan(at + timedelta(days=days), person, lambda person, at: self._give_back(person, at, *paid))

    def _give_back(
        self, person: Person, at: datetime, purchase_id: int, tokens: int, paid_cents: int, kind: str, is_whole: bool
    ) -> None:
        """What billing/payments/refunds.py posts for a refund or a lost dispute. A debt ends what they buy."""
        cents = paid_cents if is_whole else paid_cents // 2
        due_tokens = tokens * cents // paid_cents
        intent = f"pi_demo_{purchase_id}"
        id = self.tables.next_id("billing_paymentreversal")
        status, prefix = ("succeeded", "re") if kind == "refund" else ("lost", "du")
        self.tables.add(
            "billing_paymentreversal",
            f"{kind}\t{prefix}_demo_{id}\t{intent}\t{purchase_id}\t{cents}\t{person.currency}\t{status}"
            f"\t{'' if kind == 'refund' else 'fraudulent'}\t{NULL if kind == 'refund' else cents}\t{at}\t{at}",
        )
        self._post(
            person, "refund", -due_tokens, at, purchase_id=purchase_id, intent=intent, paid_cents=-cents,
            key=f"purchase-{purchase_id}-reversal-1", text=f"{kind.title()} of {person.package.name}",
        )  # fmt: skip
        if person.balance < 0:
            person.weight = 0

    def _post(
        self,
        person: Person,
        type: str,
        tokens: int,
        at: datetime,
        *,
        text: str,
        usage_id: int | str = NULL,
        purchase_id: int | str = NULL,
        admin_id: int | str = NULL,
        paid_cents: int | str = NULL,
        intent: str = NULL,
        key: str = NULL,
        metadata: Mapping[str, Any] | None = None,
    ) -> int:
        """The ledger row that billing/ledger/ would have written (law 2). Returns its id."""
        at = max(at, person.last_at)
        before, person.balance = person.balance, person.balance + tokens
        person.sequence += 1
        person.last_at = at
        currency = "" if paid_cents == NULL else person.currency
        return self.tables.add(
            "billing_tokentransaction",
            f"{self._ids(person)}\t{person.sequence}\t{type}\t{tokens}\t{before}\t{person.balance}\t{usage_id}"
            f"\t{purchase_id}\t{admin_id}\t{paid_cents}\t{currency}\t{intent}\t{key}\t{text}"
            f"\t{json.dumps(metadata or {})}\t{at}",
        )

    def _write_accounts(self) -> None:
        """The accounts as their entries leave them; one in 500 was blocked."""
        with connection.cursor() as cursor:
            cursor.execute(
                """WITH total AS (
                     SELECT account_id, sum(amount) AS balance, max(sequence) AS sequence, max(created_at) AS last_at,
                            sum(amount) FILTER (WHERE type IN ('purchase', 'auto_recharge')) AS purchased,
                            sum(amount) FILTER (WHERE type IN ('bonus', 'admin_grant')) AS granted,
                            -sum(amount) FILTER (WHERE type = 'usage') AS used, sum(paid_cents) AS spent
                       FROM billing_tokentransaction WHERE account_id >= %(first)s GROUP BY account_id),
                   outcome AS (
                     SELECT *, CASE WHEN balance < 0 THEN 'suspended'
                                    WHEN account_id %% 500 = 499 THEN 'blocked' ELSE 'active' END AS status FROM total)
                   UPDATE billing_tokenaccount AS account
                      SET balance = outcome.balance, sequence = outcome.sequence, status = outcome.status,
                          lifetime_purchased_tokens = coalesce(purchased, 0),
                          lifetime_granted_tokens = coalesce(granted, 0), lifetime_used_tokens = coalesce(used, 0),
                          lifetime_spent_cents = coalesce(spent, 0),
                          status_reason = CASE outcome.status WHEN 'suspended' THEN 'debt'
                              WHEN 'blocked' THEN 'Abuse of the welcome bonus' ELSE '' END,
                          status_changed_at = CASE WHEN outcome.status <> 'active' THEN last_at END,
                          -- Else the sweep would charge cards that nobody has.
                          auto_recharge_enabled = auto_recharge_enabled AND outcome.status = 'active'
                              AND outcome.balance >= auto_recharge_threshold_tokens
                     FROM outcome WHERE outcome.account_id = account.id""",
                {"first": self.tables.first_ids["billing_tokenaccount"]},
            )
