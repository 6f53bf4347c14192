"""A storm of payments: many people buy, spend, refund and dispute at once while everything fails.

    make storm                                                            (SEED=… repeats one)
    .venv/bin/python -m tests.storms.payments --seed 7 --users 30 --operations 200

On a scratch database of the configured server it runs the Stripe stand-in, the web process and workers. The stand-in
loses, doubles and reorders webhooks and fails calls, all drawn from the seed; a killer ends the web process and the
workers with kill -9. Then the storm is over: the sweeps and the reconciliation run until nothing moves any more, every
event is delivered twice more in random order, and the books must agree with what the stand-in has.

The same seed gives the same people, operations, cards and faults. Which of two threads is quicker it cannot give.
"""

# ruff: noqa: T201, S311  (its output is what it is for; random numbers that are no secrets)

import argparse
import os
import re
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import timedelta
from random import Random, SystemRandom
from urllib.parse import urlsplit

import tests.environment  # noqa: F401  (servers, keys and free ports; before Django reads its settings)

SCRATCH = "storm_postmate"
REDIS_DATABASE = 15
STRIPE_TIMEOUT_SECONDS = 2
SERVER_URL = urlsplit(os.environ["DATABASE_URL"])._replace(path="/postgres").geturl()
os.environ |= {
    "DATABASE_URL": urlsplit(os.environ["DATABASE_URL"])._replace(path=f"/{SCRATCH}").geturl(),
    "REDIS_URL": re.sub(r"\d+$", str(REDIS_DATABASE), os.environ["REDIS_URL"]),
    "DATABASE_POOL_SIZE": "30",
    "STRIPE_TIMEOUT_SECONDS": str(STRIPE_TIMEOUT_SECONDS),
    "DJANGO_SETTINGS_MODULE": "postmate.settings",
}

import django  # noqa: E402

django.setup()

import logging  # noqa: E402

import httpx2  # noqa: E402
import psycopg  # noqa: E402
import redis  # noqa: E402
from celery import current_app  # noqa: E402
from django.conf import settings  # noqa: E402
from django.core.management import call_command  # noqa: E402
from django.db import connection  # noqa: E402
from django.utils import timezone  # noqa: E402

from billing import catalogue, ledger  # noqa: E402
from billing.catalogue import packages  # noqa: E402
from billing.models import Drift, PaymentReversal, Purchase, StripeEvent, TokenTransaction  # noqa: E402
from billing.payments import purchases, recharge, reconcile, refund_requests  # noqa: E402
from tests.payments import sign  # noqa: E402
from tests.storms import books, buyers, programs  # noqa: E402
from tests.storms.buyers import Buyers  # noqa: E402
from tests.storms.programs import STRIPE_URL, WEB_URL, Program  # noqa: E402

CHAOS = {"lose": 0.2, "duplicate": 0.2, "reorder": 0.5, "fail": 0.1}
WORKERS, THREADS = 2, 8
STORM_SECONDS = 240  # at most; what is then left of the list is not begun
KILL_EVERY_SECONDS = (3, 9)
SWEEP_EVERY_SECONDS, RECONCILE_EVERY_SECONDS = 2, 30
SETTLE_ROUNDS = 40
# As beat does, but quicker.
SWEEPS = ("sweep_purchases", "sweep_auto_recharges", "resume_refunds")

# What the sweeps wait minutes for is made to look old once it has waited for longer than any call to Stripe can last:
# three tries of STRIPE_TIMEOUT_SECONDS and the pauses between them. So they meet what they meet in real life: rows
# that nobody is at work on.
LONGEST_CALL_SECONDS = 3 * STRIPE_TIMEOUT_SECONDS + 5
AGE = (
    """UPDATE billing_purchase SET created_at = now() - interval '5 minutes'
        WHERE created_at BETWEEN now() - interval '5 minutes' AND now() - %(seconds)s * interval '1 second'""",
    """UPDATE billing_purchase SET checked_at = now() - interval '15 minutes'
        WHERE state IN ('created', 'open', 'processing', 'action_required')
          AND checked_at BETWEEN now() - interval '15 minutes' AND now() - %(seconds)s * interval '1 second'""",
    """UPDATE billing_purchase
          SET paid_at = paid_at - interval '5 minutes', checked_at = checked_at - interval '5 minutes'
        WHERE state = 'paid' AND (checked_at IS NULL OR checked_at < paid_at)
          AND paid_at BETWEEN now() - interval '5 minutes' AND now() - %(seconds)s * interval '1 second'""",
    """UPDATE billing_paymentreversal SET created_at = now() - interval '2 minutes'
        WHERE status = 'requested'
          AND created_at BETWEEN now() - interval '2 minutes' AND now() - %(seconds)s * interval '1 second'""",
    """UPDATE billing_tokenaccount SET auto_recharge_retry_at = now() WHERE auto_recharge_retry_at > now()""",
)
# A day later: nobody comes back to a payment page or to confirm any more.
AGE_A_DAY = (
    """UPDATE billing_purchase SET created_at = created_at - interval '26 hours', checked_at = NULL
        WHERE state = 'action_required' AND created_at > now() - interval '1 day'""",
    """UPDATE billing_purchase SET created_at = created_at - interval '26 hours'
        WHERE state = 'created' AND kind = 'checkout' AND stripe_session_id IS NULL
          AND created_at > now() - interval '1 day'""",
)


def make_older(*, patience_seconds: float, by_a_day: bool = False) -> None:
    with connection.cursor() as cursor:
        for statement in AGE + (AGE_A_DAY if by_a_day else ()):
            cursor.execute(statement, {"seconds": patience_seconds})


class Storm:
    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.began = time.monotonic()
        self.http = httpx2.Client(timeout=60, verify=False)
        self.over = threading.Event()
        self.chaos_done: Counter[str] = Counter()
        self.deliveries: Counter[str] = Counter()
        self.programs: list[Program] = []
        self.background_errors: list[str] = []

    def say(self, text: str) -> None:
        print(f"{time.monotonic() - self.began:6.1f} s  {text}", flush=True)

    def random(self, *about: object) -> Random:
        """Random numbers of their own for each purpose, so that one use more or less changes no other."""
        return Random("|".join(map(str, (self.options.seed, *about))))

    def control(self, path: str, **parameters: object) -> None:
        self.http.post(f"{STRIPE_URL}/control/{path}", json=parameters).raise_for_status()

    # --- 1. The storm ---

    def rage(self, crowd: Buyers, operations: list[tuple[str, int]]) -> None:
        self.control("chaos", seed=self.options.seed, **CHAOS)
        helpers = [threading.Thread(target=self._in_background, args=[job]) for job in (self.sweep, self.kill)]
        for helper in helpers:
            helper.start()
        deadline = time.monotonic() + self.options.seconds
        try:
            with ThreadPoolExecutor(THREADS) as executor:
                parts = executor.map(lambda part: self.act(crowd, operations, part, deadline), range(THREADS))
                done = sum(parts)
        finally:
            self.over.set()
            for helper in helpers:
                helper.join()
        self.say(f"{done:,} of {len(operations):,} operations done, the storm is over")
        state = self.http.get(f"{STRIPE_URL}/control/state", params={"limit": 1}).json()
        self.chaos_done.update(state["chaos"]["done"])
        self.control("chaos")

    def act(self, crowd: Buyers, operations: list[tuple[str, int]], part: int, deadline: float) -> int:
        """The operations of every eighth user, in the order of the list. Returns how many were carried out."""
        done = 0
        try:
            for number, (kind, user) in enumerate(operations):
                if user % THREADS == part and time.monotonic() < deadline:
                    crowd.perform(kind, crowd.people[user], self.random("operation", number))
                    done += 1
            crowd.finish()
        finally:
            connection.close()
        return done

    def _in_background(self, job: Callable[[], None]) -> None:
        try:
            job()
        except Exception as error:
            self.background_errors.append(f"{getattr(job, '__name__', job)}: {error!r}")
        finally:
            connection.close()

    def sweep(self) -> None:
        """Beat: the workers are handed the sweeps, and are killed in the middle of them like of all else."""
        reconciled_at = time.monotonic()
        while not self.over.wait(SWEEP_EVERY_SECONDS):
            make_older(patience_seconds=LONGEST_CALL_SECONDS)
            names = list(SWEEPS)
            if time.monotonic() - reconciled_at > RECONCILE_EVERY_SECONDS:
                reconciled_at = time.monotonic()
                current_app.send_task("billing.tasks.reconcile_stripe", args=[3])
            for name in names:
                current_app.send_task(f"billing.tasks.{name}", expires=SWEEP_EVERY_SECONDS * 2)

    def kill(self) -> None:
        """kill -9, each program once and then at random."""
        random = self.random("killer")
        turns = random.sample(self.programs, len(self.programs))
        while not self.over.wait(random.uniform(*KILL_EVERY_SECONDS)) or turns:
            (turns.pop() if turns else random.choice(self.programs)).kill_and_restart()

    # --- 2. The calm after it ---

    def settle(self) -> None:
        """Deliver what is on its way, close what people left lying, and run the sweeps until nothing moves."""
        random = self.random("settle")
        programs.wait_until_ready(f"{WEB_URL}/readyz")
        for session in buyers.read_all(self.http, "checkout/sessions"):
            if session["status"] == "open":
                self.control(f"sessions/{session['id']}/expire")
        for payment in buyers.read_all(self.http, "payment_intents"):
            if payment["status"] == "processing":
                self.control(f"payments/{payment['id']}/settle", outcome=random.choice(("succeeded", "failed")))
        before: object = None
        for number in range(1, SETTLE_ROUNDS + 1):
            self.await_quiet()
            make_older(patience_seconds=1, by_a_day=True)
            ended = purchases.sweep_purchases(limit=10_000)
            moved = recharge.sweep_auto_recharges(limit=10_000)
            resumed = refund_requests.resume_requests(limit=10_000)
            ledger.expire_reservations()
            report = reconcile.reconcile(since=timezone.now() - timedelta(days=2))
            after = self.picture()
            self.say(
                f"round {number}: {ended} purchases, {moved} auto-recharges, {resumed} refund requests, "
                f"{len(report.healed)} healed, {len(report.differing)} differ"
            )
            if after == before and not (ended or moved or resumed or report.healed):
                return
            before = after
        self.background_errors.append(f"not quiet after {SETTLE_ROUNDS} rounds")

    def await_quiet(self) -> None:
        """Until the queue of the workers is empty and Stripe has delivered all it has; not for ever."""
        broker = redis.Redis.from_url(settings.REDIS_URL)
        deadline = time.monotonic() + 60
        self.control("deliveries/retry")
        while time.monotonic() < deadline:
            state = self.http.get(f"{STRIPE_URL}/control/state", params={"limit": 1}).json()
            self.deliveries = Counter(state["deliveries"])
            if not broker.llen("celery") and not self.deliveries["pending"]:
                return
            time.sleep(0.2)

    def picture(self) -> object:
        """All that may still move."""
        return (
            sorted(Purchase.objects.values_list("pk", "state")),
            sorted(PaymentReversal.objects.values_list("pk", "status")),
            TokenTransaction.objects.count(),
            StripeEvent.objects.count(),
            Drift.objects.filter(resolved_at=None).count(),
        )

    # --- 3. All of it once more ---

    def replay(self) -> int:
        """Every event of Stripe twice more, in random order, to the web process. Returns how many deliveries."""
        events = sorted(buyers.read_all(self.http, "events"), key=lambda event: str(event["id"]))
        queue = events * 2
        self.random("replay").shuffle(queue)

        def deliver(part: int) -> None:
            with httpx2.Client(timeout=60, verify=False) as http:
                for event in queue[part::THREADS]:
                    body = httpx2.Request("POST", WEB_URL, json=event).read()
                    answer = http.post(
                        f"{WEB_URL}/stripe/webhook/", content=body, headers={"Stripe-Signature": sign(body)}
                    )
                    if answer.status_code != 200:
                        self.background_errors.append(f"replay of {event['id']} answered {answer.status_code}")

        with ThreadPoolExecutor(THREADS) as executor:
            list(executor.map(deliver, range(THREADS)))
        return len(queue)

    # --- All together ---

    def run(self) -> list[str]:
        """Returns what broke."""
        options = self.options
        logs = settings.DATA_DIR / "storm"
        with programs.running(logs, workers=WORKERS) as self.programs:
            packages.seed_default_packages()
            catalogue.seed_default_models()
            crowd = buyers.make_people(options.users)
            savers = crowd.people[::2]
            for person in savers:
                buyers.save_card(self.http, person, self.random("card", person.email))
            self.say(f"{options.users} users, {len(savers)} of them with auto-recharge; logs in {logs}")
            operations = buyers.list_operations(
                self.random("list"), users=options.users, operations=options.operations - len(savers)
            )
            operations = [("switch_auto_recharge_on", user) for user in range(0, options.users, 2)] + operations
            self.rage(crowd, operations)
            earlier = books.ledger_rows()
            self.settle()
            broken = [*books.breaks(self.http), *self._changed(earlier, "the settling")]
            self.say(books.sums())
            settled = books.ledger_rows()
            replays = self.replay()
            self.await_quiet()
            self.say(f"{replays:,} events delivered once more")
            broken += [f"after the replays: {each}" for each in books.breaks(self.http)]
            broken += self._changed(settled, "the replays")
            if books.ledger_rows() != settled:
                broken.append("the replays added ledger rows")
            broken += self.tell(crowd)
        return broken + crowd.errors + self.background_errors

    def _changed(self, earlier: dict[int, str], by: str) -> Iterator[str]:
        now = books.ledger_rows()
        if changed := [row for row, digest in earlier.items() if now.get(row) != digest]:
            yield f"{len(changed)} earlier ledger rows were changed by {by}"

    def tell(self, crowd: Buyers) -> Iterator[str]:
        """Print what was accepted, refused and broken on purpose; yield what should have happened and did not."""
        credits = Counter(TokenTransaction.objects.values_list("type", flat=True))
        reversals = Counter(PaymentReversal.objects.values_list("kind", flat=True))
        kills = Counter({program.name: program.kills for program in self.programs})
        tables = {
            "accepted": crowd.accepted,
            "refused": crowd.refused,
            "purchases": Counter(" ".join(row) for row in Purchase.objects.values_list("kind", "state")),
            "ledger rows": credits,
            "reversals": reversals,
            "drifts healed": Counter(Drift.objects.values_list("kind", flat=True)),
            "events": Counter(StripeEvent.objects.values_list("state", flat=True)),
            "deliveries": self.deliveries,
            "faults": self.chaos_done,
            "kill -9": kills,
        }
        for name, counts in tables.items():
            print(f"{name:>14}  " + ", ".join(f"{what} {count:,}" for what, count in sorted(counts.items())))
        wanted = {
            "accepted": (
                *("checkouts opened", "checkouts paid", "cards declined", "debits", "auto-recharges switched on"),
                *("refunds at Stripe", "refunds requested", "refunds failed", "disputes won", "disputes lost"),
            ),
            "ledger rows": ("purchase", "auto_recharge", "refund", "usage"),
            "reversals": ("refund", "dispute"),
            "faults": ("lost", "duplicated", "delayed", "500", "500_after", "429", "timeout_after"),
            "kill -9": tuple(kills),
        }
        for name, whats in wanted.items():
            for what in whats:
                if not tables[name][what]:
                    yield f"nothing counted as {name}: {what}"


@contextmanager
def scratch_database() -> Iterator[None]:
    with psycopg.connect(SERVER_URL, autocommit=True) as server:
        server.execute(f"DROP DATABASE IF EXISTS {SCRATCH} WITH (FORCE)")
        server.execute(f"CREATE DATABASE {SCRATCH}")
        redis.Redis.from_url(settings.REDIS_URL).flushdb()
        try:
            call_command("migrate", verbosity=0)
            yield
        finally:
            connection.close()
            server.execute(f"DROP DATABASE {SCRATCH} WITH (FORCE)")


def main() -> None:
    parser = argparse.ArgumentParser(description="A storm of payments.")
    parser.add_argument("--seed", type=int, help="repeats a storm; default: a new one")
    parser.add_argument("--users", type=int, default=200)
    parser.add_argument("--operations", type=int, default=2_000)
    parser.add_argument("--seconds", type=int, default=STORM_SECONDS, help="how long the storm may last")
    options = parser.parse_args()
    if options.seed is None:
        options.seed = SystemRandom().randrange(1_000_000)
    print(
        f"storm {options.seed}: {options.users} users, {options.operations:,} operations; the stand-in loses "
        f"{CHAOS['lose']:.0%}, duplicates {CHAOS['duplicate']:.0%} and delays {CHAOS['reorder']:.0%} of all webhooks "
        f"and fails {CHAOS['fail']:.0%} of all calls (Stripe time-out {STRIPE_TIMEOUT_SECONDS} s)",
        flush=True,
    )
    for name in ("billing", "django.request", "celery"):  # what fails on purpose is counted, not listed
        logging.getLogger(name).setLevel(logging.CRITICAL)
    storm = Storm(options)
    with scratch_database():
        broken = storm.run()
    for each in broken:
        print(f"BROKEN: {each}")
    minutes = (time.monotonic() - storm.began) / 60
    outcome = f"{len(broken)} things broke" if broken else "passed"
    print(f"storm {options.seed}: {outcome} ({minutes:.1f} minutes)")
    sys.exit(1 if broken else 0)


if __name__ == "__main__":
    main()
