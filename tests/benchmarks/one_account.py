"""How many debits one account takes, whose row they all wait for, beside the same over many accounts.

    .venv/bin/python -m tests.benchmarks.one_account

Eight clients, two processes of four threads, in turns and alternating order, as in tests/benchmarks/debit.py.
"""

# ruff: noqa: T201  (its output is what it is for)

import multiprocessing
import statistics
from concurrent.futures import ProcessPoolExecutor
from multiprocessing.synchronize import Barrier

from django.db import connection

from tests.benchmarks import debit, scratch_database

REPETITIONS = 3


def _share(barrier: Barrier, accounts: int) -> None:
    debit._share(barrier)
    debit.ACCOUNTS = accounts


def measure(accounts: int) -> tuple[float, list[float]]:
    """Debits per second over so many accounts, and the milliseconds of each."""
    context = multiprocessing.get_context("spawn")
    barrier = context.Barrier(debit.PROCESSES * debit.THREADS)
    with ProcessPoolExecutor(
        debit.PROCESSES, mp_context=context, initializer=_share, initargs=(barrier, accounts)
    ) as executor:
        return debit.measure_ledger(executor)


def main() -> None:
    with scratch_database():
        with connection.cursor() as cursor:
            cursor.execute(debit.SEED)
            cursor.execute("VACUUM ANALYZE")
        print(f"{'accounts':>8}{'debits/s':>10}{'p50 ms':>8}{'p99 ms':>8}   {debit.PROCESSES * debit.THREADS} clients")
        for repetition in range(REPETITIONS):
            for accounts in (1, debit.ACCOUNTS) if repetition % 2 else (debit.ACCOUNTS, 1):
                rate, latencies_ms = measure(accounts)
                percentiles = statistics.quantiles(latencies_ms, n=100)
                print(f"{accounts:>8,}{rate:10,.0f}{percentiles[49]:8.1f}{percentiles[98]:8.1f}", flush=True)


if __name__ == "__main__":
    main()
