"""What each section of the dashboard costs on a history of a million ledger entries.

    .venv/bin/python -m tests.benchmarks.dashboard [--transactions 1000000]

The target is 200 ms, and 100 ms for the search among accounts. The history is `manage.py make_demo_history`'s, on a
scratch database of the configured server. Each line is the figures of one section, for a week to a year, in two
time zones that are not UTC, with the database's memory warm. At the end `verify_ledger` goes over all of it.
"""

# ruff: noqa: T201  (its output is what it is for)

import argparse
import statistics
import time
from collections.abc import Callable
from datetime import datetime, timedelta
from functools import partial
from typing import Any
from zoneinfo import ZoneInfo

from django.conf import settings
from django.core.management import call_command
from django.utils import timezone

from billing.figures import business, customers, liability, roll_ups
from billing.models import LedgerHour, UsageDay, UsageHour
from billing.staff import accounts
from kit import periods
from tests.benchmarks import scratch_database

ZONE = ZoneInfo("Europe/Berlin")
HALF_HOUR_ZONE = ZoneInfo("Asia/Kolkata")  # its days begin within an hour of the roll-up
REPETITIONS = 7
TARGET_MS, SEARCH_TARGET_MS = 200, 100


def measure(name: str, look: Callable[[], object], target_ms: int = TARGET_MS) -> None:
    look()
    milliseconds = []
    for _ in range(REPETITIONS):
        began = time.perf_counter()
        look()
        milliseconds.append((time.perf_counter() - began) * 1_000)
    median = statistics.median(milliseconds)
    over = "" if median < target_ms else f"   OVER {target_ms}"
    print(f"{name:<62}{median:8.1f}{min(milliseconds):8.1f}{max(milliseconds):8.1f}{over}", flush=True)


def measure_sections() -> None:
    measure("live: accounts, balances, webhooks", business.get_live_stats)
    for zone in (ZONE, HALF_HOUR_ZONE):
        today = timezone.localdate(timezone=zone)
        until = periods.midnight(today + timedelta(days=1), zone)
        for days in (7, 30, 190, 365):
            measure_span(f"{days} days, {zone.key}: ", periods.midnight(today - timedelta(days=days - 1), zone), until)


def measure_search() -> None:
    searches: dict[str, dict[str, str]] = {
        "by e-mail": {"search": "petrov"},
        "by name": {"search": "Ada Petrov"},
        "nothing found": {"search": "nobody of this name"},
        "largest balance first": {"sort": "-balance"},
        "most used first": {"sort": "-usage"},
        "last purchase first": {"sort": "-last_purchase"},
        "critical ones": {"band": "critical"},
        "suspended ones": {"status": "suspended"},
    }
    for name, wanted in searches.items():
        measure(f"accounts, {name}", partial(accounts.get_user_accounts, **wanted), SEARCH_TARGET_MS)  # type: ignore[arg-type]


def measure_span(label: str, since: datetime, until: datetime) -> None:
    span: dict[str, Any] = {"since": since, "until": until}
    measure(label + "system", partial(business.get_token_stats, **span))
    measure(label + "models", partial(business.get_model_usage_stats, **span))
    for bucket in business.trend_buckets(**span):
        measure(f"{label}operations by {bucket}", partial(business.get_operation_stats, **span, bucket=bucket))
    measure(label + "cohorts", partial(customers.get_cohorts, **span))
    measure(label + "packages", partial(customers.get_package_sales, **span))
    measure(label + "liability", partial(liability.liability_roll_forward, edges=[since, until]))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--transactions", type=int, default=1_000_000)
    transactions = parser.parse_args().transactions
    with scratch_database():
        settings.DEBUG = True  # without it the command refuses
        call_command("make_demo_history", transactions=transactions)
        settings.DEBUG = False
        began = time.perf_counter()
        roll_ups.rebuild()
        print(f"rebuilding the roll-ups: {time.perf_counter() - began:.1f} s; rows: ", end="")
        print(", ".join(f"{model.__name__} {model.objects.count():,}" for model in (UsageHour, UsageDay, LedgerHour)))
        print(f"{'milliseconds':<62}{'median':>8}{'min':>8}{'max':>8}")
        measure_sections()
        measure_search()


if __name__ == "__main__":
    main()
