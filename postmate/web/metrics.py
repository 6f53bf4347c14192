"""What /metrics tells Prometheus, read from the database and Redis when it is asked for.

What matters is in the books already, so it is counted nowhere else: every process gives the same answer, a crash loses
no count, and a counter falls only if the books do. Whole hours come from the roll-ups, what is newer from the raw
rows, and all of it from one snapshot: see billing/figures/roll_ups.py. What no table knows, requests and errors of the
AI providers, all processes add up in Redis: see kit/counters.py.

On a new installation everything is there, at zero: a panel without a line says nothing, and Prometheus does not see the
first of anything in a counter that begins with it. What has never happened is as old as what would remember it.
"""

import platform
import shutil
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from datetime import datetime
from functools import cache
from itertools import accumulate
from pathlib import Path
from typing import Any

import django
import redis
from celery import current_app
from django.conf import settings
from django.db import DatabaseError, InterfaceError, connection
from django.db.models import Count, Min, Q, Sum
from django.urls import URLResolver, get_resolver
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector
from psycopg_pool import PoolTimeout

from ai_ops.providers import ProviderError
from billing import catalogue
from billing.figures.roll_ups import OTHER_THAN_USAGE, RAW_USAGE_SUMS, USAGE_DIMENSIONS
from billing.models import (
    Drift,
    ModelPrice,
    Notification,
    Purchase,
    StripeEvent,
    TokenAccount,
    TokenTransaction,
    TokenUsage,
)
from billing.models.fields import Currency, Provider
from billing.upkeep.verification import BOOKS_KEY
from kit import counters, redis_client
from kit.database import now, one_snapshot
from postmate.ops import backup
from postmate.ops.checks import existing
from postmate.web.logs import NO_ROUTE, QUIET_ROUTES

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
DATABASE_PATIENCE_MS = 5_000  # of one query; Prometheus itself gives up after 10 seconds

TASKS_KEY = "postmate:tasks"  # a hash: when a task of this name last came to a good end
BEAT_KEY = "postmate:beat"  # when beat last handed a task over
SINCE_KEY = "postmate:since"  # since when Redis remembers the others

PROVIDER_ERROR_KINDS = sorted({ProviderError.kind, *(each.kind for each in ProviderError.__subclasses__())})
CREDITS = ("purchase", "auto_recharge", "admin_grant", "bonus")  # types of which each entry raises the balance
Row = tuple[Any, ...]

_USAGE_SUMS = "operations, actual_tokens, billable_tokens, unbilled_tokens, provider_cost_microusd"

# `day` is when the day of the roll-ups' end began: whole days, the hours after them, and what is in none of them yet.
_USAGE = f"""
SELECT {USAGE_DIMENSIONS}, {", ".join(f"sum({name})::bigint" for name in _USAGE_SUMS.split(", "))}
  FROM (
    SELECT {USAGE_DIMENSIONS}, {_USAGE_SUMS} FROM billing_usageday WHERE day < %(day)s
     UNION ALL
    SELECT {USAGE_DIMENSIONS}, {_USAGE_SUMS} FROM billing_usagehour WHERE hour >= %(day)s AND hour < %(until)s
     UNION ALL
    SELECT {USAGE_DIMENSIONS}, {_USAGE_SUMS} FROM (
      SELECT {USAGE_DIMENSIONS}, {RAW_USAGE_SUMS}
        FROM billing_tokenusage WHERE completed_at >= %(until)s GROUP BY {USAGE_DIMENSIONS}
    ) AS newest
  ) AS part
 GROUP BY {USAGE_DIMENSIONS} ORDER BY {USAGE_DIMENSIONS}"""  # noqa: S608 – our own names and constants, no input

_LEDGER = f"""
SELECT type, currency, sum(transactions)::bigint, sum(tokens)::bigint, sum(paid_cents)::bigint
  FROM (
    SELECT type, currency, transactions, tokens, paid_cents FROM billing_ledgerhour WHERE hour < %(until)s
     UNION ALL
    SELECT type, currency, count(*), sum(amount), coalesce(sum(paid_cents), 0)
      FROM billing_tokentransaction WHERE {OTHER_THAN_USAGE} AND created_at >= %(until)s GROUP BY type, currency
     UNION ALL
    SELECT 'usage', '', count(*), -sum(billable_tokens), 0
      FROM billing_tokenusage WHERE completed_at >= %(until)s AND billable_tokens > 0
  ) AS part
 GROUP BY type, currency ORDER BY type, currency"""  # noqa: S608 – our own names and constants, no input

# As text: Python's datetime has no infinity, which is where everything is newer than the roll-ups.
_ROLL_UPS_END = """
SELECT until::text, date_trunc('day', until, 'UTC')::text,
       extract(epoch FROM clock_timestamp() - coalesce(rolled_until, (SELECT min(applied) FROM django_migrations)))
  FROM (SELECT max(rolled_until) AS rolled_until FROM billing_rollup) AS state
 CROSS JOIN LATERAL (SELECT coalesce(rolled_until, '-infinity') AS until) AS reach"""

_LAST_EVENT = """
SELECT extract(epoch FROM processed_at - received_at), extract(epoch FROM clock_timestamp() - received_at)
  FROM billing_stripeevent
 WHERE state = 'processed' AND processed_at IS NOT NULL ORDER BY received_at DESC LIMIT 1"""

_INSTALLED = "SELECT extract(epoch FROM clock_timestamp() - min(applied)) FROM django_migrations"


def render() -> bytes:
    """All metrics in Prometheus' text format. Where the database or Redis is away, its metrics are missing."""
    return generate_latest(_registry())


@cache
def _registry() -> CollectorRegistry:
    registry = CollectorRegistry()
    registry.register(_Everything())
    return registry


class _Everything(Collector):
    def collect(self) -> Iterable[Metric]:
        began = time.perf_counter()
        build = {"version": settings.VERSION, "python": platform.python_version(), "django": django.get_version()}
        yield _gauge("postmate_build_info", "1; the labels say what runs.", {tuple(build.values()): 1}, tuple(build))
        # Read to the end before the first is told: half of a snapshot would look like fallen counters.
        for name, read in (("database", _read_database), ("redis", _read_redis)):
            try:
                metrics = list(read())
            except (DatabaseError, InterfaceError, PoolTimeout, redis.RedisError):
                metrics = []
            yield from metrics
            yield _gauge(f"postmate_{name}_up", f"Whether the {name} gave its values.", {(): bool(metrics)})
        yield from _disk_metrics()
        seconds = time.perf_counter() - began
        yield _gauge("postmate_scrape_seconds", "How long it took to read all of this.", {(): seconds})


# --- The database ---------------------------------------------------------------------------------------------------


def _read_database() -> Iterator[Metric]:
    with one_snapshot(), connection.cursor() as cursor:
        cursor.execute(f"SET LOCAL statement_timeout = {DATABASE_PATIENCE_MS}")

        def rows(sql: str, **parameters: Any) -> list[Row]:
            cursor.execute(sql, parameters)
            return cursor.fetchall()

        [(until, day, roll_up_age_seconds)] = rows(_ROLL_UPS_END)
        [(installed_age_seconds,)] = rows(_INSTALLED)
        yield from _usage_metrics(rows(_USAGE, until=until, day=day))
        ledger = rows(_LEDGER, until=until)
        yield from _ledger_metrics(ledger)
        yield from _account_metrics()
        help = "How long ago the hours ended that the dashboard's roll-ups reach to."
        yield _gauge("postmate_rollup_age_seconds", help, {(): roll_up_age_seconds})
        at = now()
        yield from _reservation_metrics(at)
        yield from _event_metrics(at, rows(_LAST_EVENT) or [(0, installed_age_seconds)])
        yield from _purchase_metrics(ledger)
        drifts = Drift.objects.filter(resolved_at=None).count()
        yield _gauge("postmate_drifts_open", "Differences with Stripe that nobody resolved.", {(): drifts})
        waiting = Notification.objects.filter(email_next_at__isnull=False)
        mails = waiting.aggregate(count=Count("pk"), oldest_at=Min("created_at"))
        yield _gauge("postmate_outbox_mails", "E-mails that wait to be sent.", {(): mails["count"]})
        age_seconds = _age_seconds(at, mails["oldest_at"])
        yield _gauge("postmate_outbox_oldest_age_seconds", "Age of the oldest of them.", {(): age_seconds})
        yield from _backup_metrics(installed_age_seconds)


def _age_seconds(at: datetime, begun_at: datetime | None) -> float:
    return (at - begun_at).total_seconds() if begun_at else 0


def _usage_metrics(found: list[Row]) -> Iterator[Metric]:
    # Each model on offer, with one operation for all.
    for kind, operation in ((ModelPrice.Kind.TEXT, "generation"), (ModelPrice.Kind.IMAGE, "image")):
        for price in catalogue.list_active_models(kind):
            for status in ("succeeded", "failed", "expired"):
                found.append((price.provider, price.model, operation, status, False, 0, 0, 0, 0, 0))
    operations: dict[Row, int] = {}
    billed: dict[Row, int] = defaultdict(int)
    actual: dict[Row, int] = defaultdict(int)
    unbilled: dict[Row, int] = defaultdict(int)
    cost_microusd: dict[Row, int] = defaultdict(int)
    for provider, model, operation, status, is_free, count, *sums in found:
        of = (provider, model, operation)
        actual_tokens, billable_tokens, unbilled_tokens, provider_cost_microusd = sums
        is_charged = status == "succeeded" and not is_free
        operations[*of, status] = operations.get((*of, status), 0) + count
        billed[of] += billable_tokens
        actual[*of, "yes" if is_charged else "no"] += actual_tokens
        unbilled[of] += unbilled_tokens
        cost_microusd[of] += provider_cost_microusd
    of_what = ("provider", "model", "operation")
    yield _counter("postmate_operations", "Operations that ended.", operations, (*of_what, "status"))
    yield _counter("postmate_billed_tokens", "Tokens charged to users.", billed, of_what)
    help = "Tokens that providers counted; `charged`: in operations that were charged."
    yield _counter("postmate_actual_tokens", help, actual, (*of_what, "charged"))
    yield _counter("postmate_unbilled_tokens", "Tokens used beyond quotes, which nobody pays.", unbilled, of_what)
    help = "What providers charge us (millionths of a US dollar)."
    yield _counter("postmate_provider_cost_microusd", help, cost_microusd, of_what)
    all_billed = sum(billed.values())
    charged_tokens = sum(tokens for of, tokens in actual.items() if of[-1] == "yes")
    help = "(Billed − actual) / billed tokens of all that was ever charged; 0 until something was."
    yield _gauge("postmate_multiplier_margin_ratio", help, {(): 1 - charged_tokens / all_billed if all_billed else 0})


def _ledger_metrics(found: list[Row]) -> Iterator[Metric]:
    debits = refunded_tokens = deducted_tokens = ended_tokens = all_tokens = 0
    credited: dict[Row, int] = dict.fromkeys([(each,) for each in CREDITS], 0)
    revenue_cents: dict[Row, int] = {
        (currency, type): 0 for currency in Currency.values for type in TokenTransaction.CREDITS_FOR_MONEY
    }
    refunded_cents: dict[Row, int] = dict.fromkeys([(each,) for each in Currency.values], 0)
    for type, currency, transactions, tokens, paid_cents in found:
        tokens = tokens or 0  # sum() of no rows
        all_tokens += tokens
        if type == "usage":
            debits += transactions
        elif type == "admin_deduction":
            deducted_tokens -= tokens
        elif type == "expiry":
            ended_tokens -= tokens
        elif type == "refund":
            refunded_tokens -= tokens
            refunded_cents[(currency,)] = -paid_cents
        else:
            credited[(type,)] += tokens
            if type in TokenTransaction.CREDITS_FOR_MONEY:
                revenue_cents[currency, type] = paid_cents
    yield _counter("postmate_debits", "Debits for operations.", {(): debits})
    yield _counter("postmate_credited_tokens", "Tokens bought, granted and given.", credited, ("type",))
    yield _counter("postmate_deducted_tokens", "Tokens that superadmins took away.", {(): deducted_tokens})
    yield _counter("postmate_ended_tokens", "Tokens with an end that nobody had spent by then.", {(): ended_tokens})
    help = "Taken for tokens, after discounts, without tax, before refunds (cents)."
    yield _counter("postmate_revenue_cents", help, revenue_cents, ("currency", "type"))
    # No counters: a dispute that is won gives back what it took.
    help = "Tokens taken back for refunds and disputes, less those given back."
    yield _gauge("postmate_refunded_tokens", help, {(): refunded_tokens})
    help = "Revenue lost by refunds and disputes, less what was won back (cents)."
    yield _gauge("postmate_refunded_cents", help, refunded_cents, ("currency",))
    help = "The sum of all ledger entries. It equals postmate_balance_tokens, or the books are broken."
    yield _gauge("postmate_ledger_tokens", help, {(): all_tokens})


def _account_metrics() -> Iterator[Metric]:
    sums = TokenAccount.objects.order_by().values_list("status").annotate(Count("pk"), Sum("balance"), Sum("reserved"))
    found = list(sums)
    counts: dict[Row, int] = dict.fromkeys([(each,) for each in TokenAccount.Status.values], 0)
    counts |= {(status,): count for status, count, _, _ in found}
    yield _gauge("postmate_accounts", "Accounts.", counts, ("status",))
    help = "The sum of all balances: tokens that we owe."
    yield _gauge("postmate_balance_tokens", help, {(): sum(balance for _, _, balance, _ in found)})
    help = "The sum of what all accounts hold for running operations."
    yield _gauge("postmate_reserved_tokens", help, {(): sum(reserved for _, _, _, reserved in found)})


def _reservation_metrics(at: datetime) -> Iterator[Metric]:
    held = TokenUsage.objects.filter(status=TokenUsage.Status.RESERVED).aggregate(
        count=Count("pk"),
        tokens=Sum("reserved_tokens", default=0),
        oldest_at=Min("created_at"),
        overdue=Count("pk", filter=Q(expires_at__lt=at)),
    )
    yield _gauge("postmate_reservations_open", "Operations that run.", {(): held["count"]})
    help = "What they hold. It equals postmate_reserved_tokens, or the books are broken."
    yield _gauge("postmate_reservations_open_tokens", help, {(): held["tokens"]})
    age_seconds = _age_seconds(at, held["oldest_at"])
    yield _gauge("postmate_reservations_oldest_age_seconds", "Age of the oldest of them.", {(): age_seconds})
    yield _gauge("postmate_reservations_overdue", "Of them, those past their expiry.", {(): held["overdue"]})


def _event_metrics(at: datetime, last: list[Row]) -> Iterator[Metric]:
    state = StripeEvent.State
    counts: dict[Row, int] = {(name,): 0 for name in (state.RECEIVED, state.FAILED, state.ASIDE)}
    ages = dict.fromkeys(counts, 0.0)
    not_done = StripeEvent.objects.filter(state__in=[name for (name,) in counts]).order_by()
    for name, count, oldest_at in not_done.values_list("state").annotate(Count("pk"), Min("received_at")):
        counts[name,], ages[name,] = count, _age_seconds(at, oldest_at)
    help = "Stripe's events that are not done: received, failed (handled again), aside (for a person)."
    yield _gauge("postmate_webhook_events", help, counts, ("state",))
    help = "Age of the oldest of them."
    yield _gauge("postmate_webhook_oldest_age_seconds", help, ages, ("state",))
    [(lag_seconds, age_seconds)] = last
    help = "From receiving to having handled the newest event that is done."
    yield _gauge("postmate_webhook_lag_seconds", help, {(): lag_seconds})
    yield _gauge("postmate_webhook_last_age_seconds", "How long ago it was received.", {(): age_seconds})


def _purchase_metrics(ledger: list[Row]) -> Iterator[Metric]:
    # Without those that are paid, the many: the ledger counts them.
    unpaid = [state for state in Purchase.State.values if state != Purchase.State.PAID]
    found = Purchase.objects.filter(state__in=unpaid).order_by().values_list("kind", "state").annotate(Count("pk"))
    counts = {(kind, state): 0 for kind in Purchase.Kind.values for state in Purchase.State.values}
    counts |= {(kind, state): count for kind, state, count in found}
    for type, _, transactions, _, _ in ledger:
        if type in TokenTransaction.CREDITS_FOR_MONEY:
            counts["checkout" if type == "purchase" else "auto_recharge", "paid"] += transactions
    # No counters: a payment that failed may be made after all.
    help = "Attempts to pay, by what became of them; kind auto_recharge: the outcomes of auto-recharges."
    yield _gauge("postmate_purchases", help, counts, ("kind", "state"))


def _backup_metrics(installed_age_seconds: float) -> Iterator[Metric]:
    allowed_seconds = settings.BACKUP_MAX_AGE_HOURS * 3_600
    if not allowed_seconds:  # made by other means
        return
    made_at = [path.stat().st_mtime for path in backup.list_backups(settings.BACKUP_DIR)]
    age_seconds = max(0.0, time.time() - max(made_at)) if made_at else installed_age_seconds
    help = "How long ago the newest backup was made; without one, how long ago the database was."
    yield _gauge("postmate_backup_age_seconds", help, {(): age_seconds})
    help = "BACKUP_MAX_AGE_HOURS: from which age on the newest is too old."
    yield _gauge("postmate_backup_allowed_age_seconds", help, {(): allowed_seconds})


# --- Disks ----------------------------------------------------------------------------------------------------------


def _disk_metrics() -> Iterator[Metric]:
    folders = {"data": settings.DATA_DIR, "media": Path(settings.MEDIA_ROOT), "backups": settings.BACKUP_DIR}
    usage = {(name,): shutil.disk_usage(existing(folder)) for name, folder in folders.items()}
    help = "Free where we write: local data, images, backups (bytes)."
    yield _gauge("postmate_disk_free_bytes", help, {of: each.free for of, each in usage.items()}, ("folder",))
    help = "How large those disks are (bytes)."
    yield _gauge("postmate_disk_size_bytes", help, {of: each.total for of, each in usage.items()}, ("folder",))


# --- Redis ----------------------------------------------------------------------------------------------------------


def _read_redis() -> Iterator[Metric]:
    counters.flush()
    queues = list(current_app.amqp.queues)
    with redis_client.client().pipeline(transaction=False) as pipeline:
        for queue in queues:
            pipeline.llen(queue)
        pipeline.hlen("unacked")
        pipeline.hgetall(TASKS_KEY)
        pipeline.get(BEAT_KEY)
        pipeline.hgetall(BOOKS_KEY)
        pipeline.set(SINCE_KEY, str(time.time()), nx=True)
        pipeline.get(SINCE_KEY)
        pipeline.hgetall(counters.KEY)
        *lengths, in_hand, tasks, beat, books, _, since, counts = pipeline.execute()
    now = time.time()
    waiting = {(queue,): length for queue, length in zip(queues, lengths, strict=True)}
    yield _gauge("postmate_queue_length", "Tasks that wait for a worker.", waiting, ("queue",))
    yield _gauge("postmate_queue_in_hand", "Tasks that workers have taken and not finished.", {(): in_hand})
    help = "How long ago a task of this name last came to a good end."
    stamps = {str(each["task"]).encode(): since for each in settings.CELERY_BEAT_SCHEDULE.values()} | tasks
    ages = {(name.decode(),): _age(at, now) for name, at in sorted(stamps.items())}
    yield _gauge("postmate_task_last_success_age_seconds", help, ages, ("task",))
    help = "How long ago beat last handed a task over."
    yield _gauge("postmate_beat_age_seconds", help, {(): _age(beat or since, now)})
    help = "How long ago all books were checked, at night or by hand."
    yield _gauge("postmate_books_checked_age_seconds", help, {(): _age(books.get(b"checked_at", since), now)})
    help = "What that found: rows that break a law of the books."
    yield _gauge("postmate_books_violations", help, {(): books.get(b"violations", 0)})
    yield from _counted_metrics(counters.parse(counts))


def _counted_metrics(counts: Mapping[Row, int]) -> Iterator[Metric]:
    requests: dict[Row, int] = {(route, "5xx"): 0 for route in _routes()}
    under: dict[str, dict[str, int]] = {"": {}}  # the first page
    microseconds: dict[str, int] = {}
    errors: dict[Row, int] = {(provider, kind): 0 for provider in Provider.values for kind in PROVIDER_ERROR_KINDS}
    for (name, *of), number in counts.items():
        if name == counters.REQUESTS:
            requests[tuple(of)] = number
        elif name == counters.REQUESTS_UNDER:
            under.setdefault(of[0], {})[of[1]] = number
        elif name == counters.REQUEST_MICROSECONDS:
            microseconds[of[0]] = number
        elif name == counters.PROVIDER_ERRORS:
            errors[tuple(of)] = number
    help = "Requests by the route they took and the class of their answer's status, without those for health and files."
    yield _counter("postmate_requests", help, requests, ("route", "status"))
    help = "How long they took; of a stream, until it began."
    durations = HistogramMetricFamily("postmate_request_seconds", help, labels=("route",))
    for route, found in sorted(under.items()):
        up_to = accumulate(found.get(bucket, 0) for bucket in counters.BUCKETS)
        buckets = list(zip(counters.BUCKETS, map(float, up_to), strict=True))
        durations.add_metric((route,), buckets, microseconds.get(route, 0) / 1e6)
    yield durations
    help = "Calls to AI providers that failed, by what was the matter."
    yield _counter("postmate_provider_errors", help, errors, ("provider", "kind"))


@cache
def _routes() -> frozenset[str]:
    """Those of our own pages and addresses; Django's admin counts as one."""

    def below(resolver: URLResolver, prefix: str) -> Iterator[str]:
        for entry in resolver.url_patterns:
            route = prefix + (str(entry.pattern).removeprefix("^") if prefix else str(entry.pattern))  # as Django joins
            if isinstance(entry, URLResolver):
                yield from ["admin/"] if entry.app_name == "admin" else below(entry, route)
            else:
                yield route

    return frozenset((*below(get_resolver(), ""), NO_ROUTE)) - frozenset(QUIET_ROUTES)


def _age(at: bytes, now: float) -> float:
    return max(0.0, now - float(at))  # another machine's clock may be ahead


def note_success(task: str) -> None:
    """Note that a task came to a good end just now. Without Redis nothing is noted."""
    _note(lambda client: client.hset(TASKS_KEY, task, str(time.time())))


def note_beat() -> None:
    """Note that beat handed a task over just now. Without Redis nothing is noted."""
    _note(lambda client: client.set(BEAT_KEY, str(time.time())))


def _note(write: Callable[[redis.Redis], Any]) -> None:
    with suppress(redis.RedisError), redis_client.asking():
        write(redis_client.client())


# --- Prometheus' shapes ---------------------------------------------------------------------------------------------


def _counter(name: str, help: str, values: Mapping[Row, int], labels: Sequence[str] = ()) -> Metric:
    """Its name in the text ends in `_total`."""
    family = CounterMetricFamily(name, help, labels=labels)
    for of, value in values.items():
        family.add_metric(of, value)
    return family


def _gauge(name: str, help: str, values: Mapping[Row, Any], labels: Sequence[str] = ()) -> Metric:
    family = GaugeMetricFamily(name, help, labels=labels)
    for of, value in values.items():
        family.add_metric(of, float(value))
    return family
