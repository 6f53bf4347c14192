"""A database with a past: a year of people who sign up, work, pay and stop, in which every law of the books holds.

The ledger writes the present: at the database's clock, a statement for each entry. A past is written with COPY, in
the order of time, and is kept only when `verify_ledger` finds every law kept by it: until then nothing is committed.
For development databases alone. Long, since its people, what they do and the rows of it are read together.
"""

# ruff: noqa: S311, SIM905  (random numbers that are no secrets; names read better in a line)

import math
import random
from bisect import bisect
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from functools import partial
from heapq import heappop, heappush
from itertools import accumulate
from typing import Any

from django.conf import settings
from django.core.exceptions import ImproperlyConfigured
from django.core.management.color import no_style
from django.db import connection
from django.db.models import Max, Model
from django.utils import timezone
from psycopg.types.json import Jsonb

from accounts.models import AuditEntry, User, Workspace
from billing import catalogue
from billing.catalogue import system_settings
from billing.figures import roll_ups
from billing.ledger import WELCOME_BONUS_KEY, welcome
from billing.models import (
    GrantRequest,
    ModelPrice,
    PaymentReversal,
    Purchase,
    StripeEvent,
    TokenAccount,
    TokenPricing,
    TokenTransaction,
    TokenUsage,
)
from billing.pricing import TokenPools, calculate_llm_billable_tokens
from billing.upkeep import verification

DAYS_IN_MONTH = 30.44
CARD = {"card_brand": "visa", "card_last4": "4242"}
UNUSABLE = "!demo"  # nobody can sign in with it
CHUNK = 50_000  # operations that are written at once
SIZE = "1024x1024"

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

# In the order in which they refer to one another.
MODELS: tuple[type[Model], ...] = (
    User, Workspace, TokenAccount, Purchase, TokenUsage, TokenTransaction, GrantRequest, AuditEntry, PaymentReversal,
    StripeEvent,
)  # fmt: skip


@dataclass(slots=True)
class Person:
    owner: dict[str, int]  # their account, themselves and their workspace, as rows name them
    email: str
    joined_at: datetime
    weight: float  # how much they work; 0 once they have stopped
    pays: bool
    auto_recharges: bool
    currency: str
    package: TokenPricing
    last_at: datetime  # of their newest ledger row
    stays: bool  # and buys whenever tokens are missing
    balance: int = 0
    sequence: int = 0


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
    """An operation that somebody may run."""

    columns: dict[str, Any]
    description: str
    billable_tokens: int  # 0: it fails
    needed_tokens: int
    duration: timedelta


class Rows:
    """New rows with ids that are nobody else's until the transaction's end. Each is written as a row of its model: what
    is not said has the model's default."""

    def __init__(self) -> None:
        with connection.cursor() as cursor:
            tables = ", ".join(model._meta.db_table for model in MODELS)
            cursor.execute(f"LOCK TABLE {tables} IN SHARE ROW EXCLUSIVE MODE")
            cursor.execute("SET CONSTRAINTS ALL IMMEDIATE")  # else millions of checks wait in memory for the commit
        self.waiting: dict[type[Model], dict[tuple[str, ...], list[Any]]] = {model: {} for model in MODELS}
        self.counts: Counter[type[Model]] = Counter()
        self.next_ids = {model: (model._base_manager.aggregate(id=Max("pk"))["id"] or 0) + 1 for model in MODELS}
        self.defaults = {
            model: {
                field.attname: field.get_default()
                for field in model._meta.concrete_fields
                if not field.primary_key and not field.null and not field.has_db_default()
            }
            for model in MODELS
        }

    def add(self, model: type[Model], /, **values: Any) -> int:
        """Returns its id. The log's are given by the database, since a trigger writes some, too."""
        id = self.next_ids[model]
        row = self.defaults[model] | values | ({} if model is AuditEntry else {"id": id})
        self.waiting[model].setdefault(tuple(row), []).append(row.values())
        self.next_ids[model] += 1
        self.counts[model] += 1
        return id

    def write(self) -> None:
        with connection.cursor() as cursor:
            for model, kinds in self.waiting.items():
                for columns, rows in kinds.items():
                    with cursor.copy(f"COPY {model._meta.db_table} ({', '.join(columns)}) FROM STDIN") as copy:
                        for row in rows:
                            copy.write_row(tuple(row))
                kinds.clear()

    def finish(self) -> None:
        """All are written: ids go on behind them, and PostgreSQL knows how many there are."""
        with connection.cursor() as cursor:
            for statement in connection.ops.sequence_reset_sql(no_style(), MODELS):
                cursor.execute(statement)
            cursor.execute(f"ANALYZE {', '.join(model._meta.db_table for model in MODELS)}")


def roll_up() -> datetime | None:
    """After the commit: make the roll-ups. Returns how far they reach; None when another transaction holds them up."""
    reached = roll_ups.rebuild()
    with connection.cursor() as cursor:
        cursor.execute("ANALYZE billing_usagehour, billing_usageday, billing_ledgerhour")
    return reached


class LawBroken(Exception):
    """The past that was invented breaks a law, so it must not be committed."""


def prove() -> None:
    """All rows of the past are there: look whether every law holds. Raises LawBroken."""
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
        self.rows = Rows()
        self.settings = system_settings.get_system_settings()
        self.packages = list(TokenPricing.objects.filter(is_active=True).order_by("tokens")[: len(PACKAGE_SHARES)])
        superadmins = User.objects.filter(role=User.Role.SUPERADMIN).order_by("pk")
        superadmin_ids = list(superadmins.values_list("pk", flat=True))
        self.people = self._people(users, cast)
        superadmin_ids += [
            person.owner["user_id"]
            for person, each in zip(self.people, cast, strict=False)
            if each.role == User.Role.SUPERADMIN
        ]
        self.superadmin_id = (superadmin_ids or [self._user("Superadmin", "", "superadmin", self.start)[0]])[0]
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
        return [self._person(at, cast[place] if place < len(cast) else None) for place, at in enumerate(joined)]

    def _person(self, joined_at: datetime, role: Cast | None) -> Person:
        pays = self.random.random() < 0.3 or role is not None
        weight = self.random.lognormvariate(0.8 if pays else 0, 1.1)
        auto_recharges = pays and self.random.random() < 0.25 and not role
        currency = self.random.choices(("usd", "eur", "gbp"), (60, 28, 12))[0]
        package = self.random.choices(self.packages, PACKAGE_SHARES[: len(self.packages)])[0]
        name = f"{self.random.choice(FIRST_NAMES)} {self.random.choice(LAST_NAMES)}"
        if role:
            name, weight, currency, package = role.name, role.weight, role.currency, self.packages[:2][-1]
            user_id, email = self._user(name, role.email, role.role, joined_at, role.password)
        else:
            user_id, email = self._user(name, "", "user", joined_at)
        title = f"{name.partition(' ')[0]}'s workspace"
        workspace_id = self.rows.add(Workspace, owner_id=user_id, name=title, created_at=joined_at)
        account_id = self.rows.next_ids[TokenAccount]
        owner = {"account_id": account_id, "user_id": user_id, "workspace_id": workspace_id}
        person = Person(
            owner, email, joined_at, weight, pays, auto_recharges, currency, package, last_at=joined_at,
            stays=role is not None,
        )  # fmt: skip
        settings: dict[str, Any] = CARD if pays and weight else {}
        if settings and self.has_payments:
            settings = settings | {
                "stripe_customer_id": f"cus_demo{account_id}", "stripe_email": email, "stripe_name": name
            }  # fmt: skip
        if auto_recharges:
            settings = settings | {
                "auto_recharge_enabled": True, "auto_recharge_package_id": package.pk,
                "auto_recharge_price_cents": self._price_cents(person), "auto_recharge_package_tokens": package.tokens,
            }  # fmt: skip
        self.rows.add(
            TokenAccount, user_id=user_id, workspace_id=workspace_id, currency=currency, created_at=joined_at,
            auto_recharge_threshold_tokens=5_000, **settings,
        )  # fmt: skip
        return person

    def _user(self, name: str, email: str, role: str, at: datetime, password: str = UNUSABLE) -> tuple[int, str]:
        id = self.rows.next_ids[User]
        email = email or f"{name.replace(' ', '.')}.{id}@example.com".lower()
        return self.rows.add(User, password=password, email=email, name=name, role=role, date_joined=at), email

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
        output = int(typical_output * size) + 1
        pools = TokenPools(
            input_tokens=int(typical_input * size) + 1,
            cached_input_tokens=int(typical_input * size * 0.5) if operation == "chat" else 0,
            output_tokens=output,
            reasoning_tokens=output // 4 if self.random.random() < 0.3 else 0,
        )
        images = self.random.choice((1, 1, 2, 4)) if operation == "image" else 0
        if planned:
            status, images = "succeeded", planned.images
            pools = TokenPools(input_tokens=planned.input_tokens, output_tokens=planned.output_tokens)
        charge: dict[str, Any]
        if images:
            cost_each = catalogue.image_cost_tokens(price, self.settings, size=SIZE, quality="")
            cost = quote = cost_each * images
            charge = {"charge_type": "fixed", "fixed_cost_tokens": cost_each}
        else:
            multiplier = catalogue.multiplier(price, self.settings)
            cost = calculate_llm_billable_tokens(
                pools.actual_tokens - pools.output_tokens, pools.output_tokens, multiplier
            ).billable_tokens
            charge = {"charge_type": "multiplier", "multiplier": multiplier}
            quote = int(cost * self.random.uniform(1.05, 2.5)) + 1
            if self.random.random() < 0.01:
                quote = max(1, cost * 8 // 10)  # the provider used more than anybody thought
        is_reserved = status != "succeeded" or self.random.random() < 0.97
        billed = (min(cost, quote) if is_reserved else cost) if status == "succeeded" else 0
        cost_microusd = catalogue.provider_cost_microusd(
            price, pools, image_count=images, image_size=SIZE if images else "", image_quality=""
        )
        if status != "succeeded":
            pools, cost_microusd = TokenPools(), 0
        milliseconds = int(1_000 * self.random.lognormvariate(1.4 if operation in SLOW_OPERATIONS else 0.9, 0.5))
        error = {"failed": "The provider is overloaded.", "expired": "The operation did not finish in time."}
        columns = {
            "status": status, "operation_type": operation, "provider": price.provider, "model": price.model,
            "input_tokens": pools.input_tokens, "cached_input_tokens": pools.cached_input_tokens,
            "output_tokens": pools.output_tokens, "reasoning_tokens": pools.reasoning_tokens, "image_count": images,
            "image_size": SIZE if images else "", "actual_tokens": pools.actual_tokens, "billable_tokens": billed,
            "reserved_tokens": quote if is_reserved else None, "provider_cost_microusd": cost_microusd,
            "unbilled_tokens": cost - billed if status == "succeeded" else 0,
            "error_message": error.get(status, ""), "duration_ms": None if status == "expired" else milliseconds,
        }  # fmt: skip
        description = f"{TokenUsage.OperationType(operation).label} · {price.model}"
        duration = timedelta(milliseconds=milliseconds)
        return Pattern(columns | charge, description, billed, max(quote, billed), duration)

    def make(self) -> Iterator[int]:
        """Let it all happen. Yields how many ledger entries there are, now and then."""
        self.rows.write()
        joining = iter(self.people)
        newcomer = next(joining, None)
        working: list[Person] = []
        days = self._days()
        for day, share in zip(days, self._masses(days), strict=True):
            working = [person for person in working if person.weight > 0]
            weights = list(accumulate(person.weight for person in working))
            for moment in self._moments(day, math.ceil(share * self._missing())):
                while newcomer and newcomer.joined_at <= moment:
                    self._welcome(newcomer)
                    working.append(newcomer)
                    weights.append((weights[-1] if weights else 0) + newcomer.weight)
                    newcomer = next(joining, None)
                self._do_what_is_due(moment)
                if working:
                    self._work(working, weights, moment)
                if sum(map(len, self.rows.waiting[TokenUsage].values())) >= CHUNK:
                    self.rows.write()
                    yield self.rows.counts[TokenTransaction]
                if not self._missing():
                    break
        while newcomer:
            self._welcome(newcomer)
            newcomer = next(joining, None)
        self._do_what_is_due(self.end)
        self.rows.write()
        self._write_accounts()
        if self.settings.welcome_bonus_tokens:
            welcome.remember([person.email for person in self.people])
        self.rows.finish()
        yield self.rows.counts[TokenTransaction]

    def _do_what_is_due(self, moment: datetime) -> None:
        while self.agenda and self.agenda[0][0] <= moment:
            at, _, person, event = heappop(self.agenda)
            event(person, at)

    def _missing(self) -> int:
        """Debits that the rest of the time has to bring."""
        made = self.rows.counts[TokenTransaction]
        return max(0, self.transactions - max(len(self.people) - made, 0) - made)

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
        begun_at = at - pattern.duration
        is_reserved = pattern.columns["reserved_tokens"] is not None
        usage_id = self.rows.add(
            TokenUsage, **person.owner, **pattern.columns, created_at=begun_at, completed_at=at,
            idempotency_key=f"demo-{self.rows.next_ids[TokenUsage]}",
            expires_at=begun_at + timedelta(minutes=10) if is_reserved else None,
        )  # fmt: skip
        if pattern.billable_tokens:
            text = pattern.description
            self._post(person, "usage", -pattern.billable_tokens, at, description=text, usage_id=usage_id)
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
        if tokens := self.settings.welcome_bonus_tokens:
            at, key = person.joined_at, WELCOME_BONUS_KEY
            self._post(person, "bonus", tokens, at, description="Welcome bonus", idempotency_key=key)
        # Of the cast everybody who works is given something once.
        if self.random.random() < self.grant_share or (person.stays and person.weight):
            self._plan(person.joined_at + timedelta(days=self.random.uniform(1, 60)), person, self._grant)

    def _plan(self, at: datetime, person: Person, event: Event) -> None:
        if at < self.end:
            self.planned += 1
            heappush(self.agenda, (at, self.planned, person, event))

    def _grant(self, person: Person, at: datetime) -> None:
        """What billing/staff/grants.py writes when a superadmin gives or takes tokens: request, entry and audit log."""
        admin_id, user_id = self.superadmin_id, person.owner["user_id"]
        if user_id == admin_id:  # nobody gives tokens to themselves
            return
        tokens, before, at = self.random.choice((5_000, 10_000, 25_000)), person.balance, max(at, person.last_at)
        kind, reason = "grant", self.random.choice(GRANT_REASONS)
        if before > tokens and self.random.random() < 0.1:
            kind, reason = "deduction", "Granted by mistake"
        request_id = self.rows.next_ids[GrantRequest]
        entry_id = self._post(
            person, f"admin_{kind}", tokens if kind == "grant" else -tokens, at, admin_id=admin_id, description=reason,
            idempotency_key=f"grant-request-{request_id}", metadata=Jsonb({
                "grant_request_id": request_id, "admin_role": "superadmin", "admin_limit_tokens": 0,
                "requested_by_id": admin_id, "first_approved_by_id": None,
            }),
        )  # fmt: skip
        self.rows.add(
            GrantRequest, kind=kind, account_id=person.owner["account_id"], user_id=user_id, tokens=tokens,
            reason=reason, requested_by_id=admin_id, requested_by_role="superadmin", request_key=f"demo-{request_id}",
            admin_limit_tokens=0, needs_two=False, state="done", decided_by_id=admin_id, decided_at=at,
            transaction_id=entry_id, created_at=at,
        )  # fmt: skip
        self.rows.add(
            AuditEntry, created_at=at, actor_id=admin_id, actor_role="superadmin", action=kind, reason=reason,
            summary=f"{kind.title()} of {tokens:,} tokens carried out", subject_id=user_id, object_type="grant_request",
            object_id=str(request_id), before=Jsonb({"balance_tokens": before}),
            after=Jsonb({"balance_tokens": person.balance}),
        )  # fmt: skip

    def _price_cents(self, person: Person) -> int:
        package, currency = person.package, person.currency
        return package.price_cents(currency) or round(package.price_usd_cents * PER_USD[currency])

    def _purchase(self, person: Person, at: datetime, *, kind: str, state: str, **fields: Any) -> int:
        is_checkout, package = kind == "checkout", person.package
        return self.rows.add(
            Purchase, **person.owner, kind=kind, state=state, package_id=package.pk, package_name=package.name,
            tokens=package.tokens, amount_cents=self._price_cents(person), currency=person.currency,
            stripe_session_id=f"cs_demo_{self.rows.next_ids[Purchase]}" if is_checkout else None,
            created_at=at - timedelta(seconds=60 if is_checkout else 1),
            expires_at=at + timedelta(hours=24) if is_checkout else None, **fields,
        )  # fmt: skip

    def _decline(self, person: Person, at: datetime, *, kind: str) -> None:
        failure = {"failure_code": "card_declined", "message": "Your card was declined."}
        self._purchase(person, at, kind=kind, state="failed", **failure)

    def _fail_to_buy(self, person: Person, at: datetime) -> None:
        if self.random.random() < 0.5 and at < self.end - timedelta(days=2):
            self._purchase(person, at, kind="checkout", state="expired")
        else:
            self._decline(person, at, kind="checkout")

    def _buy(self, person: Person, at: datetime, *, is_auto: bool) -> None:
        at = max(at, person.last_at + timedelta(milliseconds=1))
        kind = "auto_recharge" if is_auto else "checkout"
        if is_auto and self.random.random() < 0.05:
            self._decline(person, at, kind=kind)
            at += timedelta(seconds=2)
        price_cents = self._price_cents(person)
        discount_cents = price_cents // 5 if not is_auto and self.random.random() < 0.06 else 0
        paid_cents = price_cents - discount_cents
        self.receipts += 1  # numbered without gaps
        intent = f"pi_demo_{self.rows.next_ids[Purchase]}" if self.has_payments else None
        purchase_id = self._purchase(
            person, at, kind=kind, state="paid", discount_cents=discount_cents, charged_cents=paid_cents, paid_at=at,
            checked_at=at + timedelta(seconds=2), receipt_number=self.receipts, payment_method_type="card",
            stripe_payment_intent_id=intent, **CARD,
        )  # fmt: skip
        tokens = person.package.tokens
        payment = {"purchase_id": purchase_id, "stripe_payment_intent_id": intent}
        self._post(
            person, kind if is_auto else "purchase", tokens, at, **payment, paid_cents=paid_cents,
            idempotency_key=f"purchase-{purchase_id}", description=f"{person.package.name} package",
        )  # fmt: skip
        self.rows.add(
            StripeEvent, type="payment_intent.succeeded" if is_auto else "checkout.session.completed", livemode=False,
            event_id=f"evt_demo_{self.rows.next_ids[StripeEvent]}", api_version="2026-10-28", payload=Jsonb({}),
            state="processed", received_at=at,
            processed_at=at + timedelta(seconds=self.random.lognormvariate(-1, 1)),
        )  # fmt: skip
        self.sales += 1
        cycle, place = divmod(self.sales, self.reversed_every)
        if place == self.reversed_every // 2 and self.has_payments:
            kind, is_whole = (("refund", False), ("refund", True), ("dispute", True))[cycle % 3]
            cents = paid_cents if is_whole else paid_cents // 2
            later, due_tokens = at + timedelta(days=self.random.uniform(0.1, 20)), tokens * cents // paid_cents
            taken: dict[str, Any] = {"payment": payment, "kind": kind, "cents": cents, "due_tokens": due_tokens}
            self._plan(later, person, partial(self._give_back, **taken))

    def _give_back(
        self, person: Person, at: datetime, *, payment: dict[str, Any], kind: str, cents: int, due_tokens: int
    ) -> None:
        """What billing/payments/refunds.py posts for a refund or a lost dispute. A debt ends what they buy."""
        is_refund = kind == "refund"
        self.rows.add(
            PaymentReversal, **payment, kind=kind, amount_cents=cents, currency=person.currency,
            stripe_id=f"{'re' if is_refund else 'du'}_demo_{self.rows.next_ids[PaymentReversal]}",
            status="succeeded" if is_refund else "lost", reason="" if is_refund else "fraudulent",
            withdrawn_cents=None if is_refund else cents, created_at=at, updated_at=at,
        )  # fmt: skip
        self._post(
            person, "refund", -due_tokens, at, **payment, paid_cents=-cents,
            idempotency_key=f"purchase-{payment['purchase_id']}-reversal-1",
            description=f"{kind.title()} of {person.package.name}",
        )  # fmt: skip
        if person.balance < 0:
            person.weight = 0

    def _post(self, person: Person, type: str, tokens: int, at: datetime, **fields: Any) -> int:
        """The ledger row that billing/ledger/ would have written (law 2). Returns its id."""
        before, person.balance = person.balance, person.balance + tokens
        person.sequence, person.last_at = person.sequence + 1, max(at, person.last_at)
        return self.rows.add(
            TokenTransaction, **person.owner, sequence=person.sequence, type=type, amount=tokens, balance_before=before,
            balance_after=person.balance, currency=person.currency if "paid_cents" in fields else "",
            created_at=person.last_at, **fields,
        )  # fmt: skip

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
                {"first": self.people[0].owner["account_id"]},
            )
