"""What a page of the history costs its owner when the ledger has a million entries.

    .venv/bin/python -m tests.benchmarks.history

One account with 1,000,000 entries over three years, on a scratch database of the configured server: nearly all usage,
200 purchases, a bonus. Each line is one look as the view of /tokens/history/ takes it, the page's entries and the
totals of the selection, with the database's memory warm. At the end `verify_ledger` goes over all of it.
"""

# ruff: noqa: T201  (its output is what it is for)

import statistics
import time
import tracemalloc
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

from django.conf import settings
from django.db import connection
from django.test import Client

from accounts.models import User, Workspace
from billing import history
from billing.history import exports, statements
from billing.models import TokenAccount
from kit import periods
from tests.benchmarks import scratch_database

ENTRIES, PURCHASE_EVERY, YEARS = 1_000_000, 5_000, 3
REPETITIONS = 15

SEED = f"""
CREATE TEMPORARY TABLE entry AS
SELECT n, type, amount, sum(amount) OVER (ORDER BY n)::bigint AS balance,
       now() - interval '{YEARS * 365 * 24} hours' * (1 - n / {ENTRIES}::float) AS at
  FROM (SELECT n,
               CASE WHEN n = 1 THEN 'bonus' WHEN n % {PURCHASE_EVERY} = 0 THEN 'purchase' ELSE 'usage' END AS type,
               CASE WHEN n = 1 THEN 20000000 WHEN n % {PURCHASE_EVERY} = 0 THEN 15000000
                    ELSE -1 - n::bigint * 7919 % 4000 END AS amount
          FROM generate_series(1, {ENTRIES}) AS n) AS step;

INSERT INTO billing_purchase (id, account_id, user_id, workspace_id, kind, state, package_name, tokens, amount_cents,
       currency, discount_cents, stripe_price_id, checkout_url, receipt_url, failure_code, message, created_at, paid_at)
SELECT n, account.id, user_id, workspace_id, 'checkout', 'paid', 'Bench', amount, 150000,
       'usd', 0, '', '', '', '', '', at, at
  FROM entry, billing_tokenaccount AS account WHERE type = 'purchase';

INSERT INTO billing_tokenusage (id, account_id, user_id, workspace_id, status, operation_type, provider, model,
       input_tokens, actual_tokens, billable_tokens, charge_type, multiplier, created_at, completed_at)
SELECT n, account.id, user_id, workspace_id, 'succeeded', 'chat', 'openai', 'gpt-6-luna',
       -amount, -amount, -amount, 'multiplier', 1, at, at
  FROM entry, billing_tokenaccount AS account WHERE type = 'usage' ORDER BY n;

INSERT INTO billing_tokentransaction (account_id, user_id, workspace_id, sequence, type, amount, balance_before,
       balance_after, usage_id, purchase_id, paid_cents, currency, description, created_at)
SELECT account.id, user_id, workspace_id, n, type, amount, entry.balance - amount,
       entry.balance, CASE WHEN type = 'usage' THEN n END, CASE WHEN type = 'purchase' THEN n END,
       CASE WHEN type = 'purchase' THEN 150000 END, CASE WHEN type = 'purchase' THEN 'usd' ELSE '' END,
       CASE type WHEN 'usage'
                 THEN (ARRAY['Chat · gpt-6-luna', 'Draft · gpt-6.1-terra', 'Image · gpt-image-2'])[1 + n % 3]
                 WHEN 'purchase' THEN 'Bench package' ELSE 'Welcome bonus' END, at
  FROM entry, billing_tokenaccount AS account ORDER BY n;

UPDATE billing_tokenaccount
   SET sequence = {ENTRIES}, balance = (SELECT sum(amount) FROM entry),
       lifetime_granted_tokens = (SELECT sum(amount) FROM entry WHERE type = 'bonus'),
       lifetime_purchased_tokens = (SELECT sum(amount) FROM entry WHERE type = 'purchase'),
       lifetime_spent_cents = (SELECT sum(150000) FROM entry WHERE type = 'purchase'),
       lifetime_used_tokens = -(SELECT sum(amount) FROM entry WHERE type = 'usage');
"""  # noqa: S608 – our own names and constants, no input


def seed() -> User:
    [user] = User.objects.bulk_create([User(email="bench@example.com")])  # which gives no bonus
    workspace = Workspace.objects.create(name="Personal", owner=user)
    TokenAccount.objects.create(user=user, workspace=workspace)
    with connection.cursor() as cursor:
        cursor.execute(SEED)
        cursor.execute("VACUUM ANALYZE")
    return user


def measure(name: str, look: Callable[[], object]) -> None:
    look()
    milliseconds = []
    for _ in range(REPETITIONS):
        began = time.perf_counter()
        look()
        milliseconds.append((time.perf_counter() - began) * 1_000)
    print(f"{name:<58}{statistics.median(milliseconds):10.1f}{max(milliseconds):10.1f}", flush=True)


def measure_history(user: User) -> None:
    def look(*, order: str = history.NEWEST_FIRST, after: int | None = None, **wanted: Any) -> None:
        selection = history.select_transactions(user_id=user.pk, **wanted)
        history.get_page(selection, order=order, cursor=history.Cursor(after) if after else None)
        history.get_totals(selection)

    last_month = periods.preset_period("last-month")
    dates: dict[str, Any] = {"since": last_month.since, "until": last_month.until}
    measure("page 1", look)
    measure("page 36,000", partial(look, after=100_000))
    measure("last month", partial(look, **dates))
    measure("purchases and bonuses", partial(look, types=["purchase", "bonus"]))
    measure("usage", partial(look, types=["usage"]))
    measure("search, many found", partial(look, search="image"))
    measure("search, nothing found", partial(look, search="no such words"))
    measure("search in last month, nothing found", partial(look, search="no such words", **dates))
    measure("by type", partial(look, order="type"))
    measure("by type, page 20,000", partial(look, order="type", after=500_001))
    measure("by amount (the newest 10,000)", partial(look, order="-amount"))
    measure("by balance (the newest 10,000)", partial(look, order="balance_after"))
    measure("purchases, by amount", partial(look, order="-amount", types=["purchase"]))
    client = Client()
    client.force_login(user)
    measure("page 1, the whole request with its HTML", lambda: client.get("/tokens/history/"))
    measure("list of statements", lambda: statements.list_months(user_id=user.pk))
    month = last_month.first_day
    assert month is not None
    measure(
        "statement of last month", lambda: statements.get_statement(user_id=user.pk, year=month.year, month=month.month)
    )


def measure_export(user: User) -> None:
    everything = history.select_transactions(user_id=user.pk)
    began = time.perf_counter()
    size = sum(len(piece) for piece in exports.export_transactions(everything))
    seconds = time.perf_counter() - began
    # Watching its memory slows it down: a tenth of the rows tells whether that grows with them.
    tracemalloc.start()
    peaks = []
    for entries in ENTRIES // 100, ENTRIES // 10:
        tracemalloc.reset_peak()
        for _ in exports.export_transactions(replace(everything, after=everything.upto - entries)):
            pass
        peaks.append(f"{tracemalloc.get_traced_memory()[1] / 1e6:.1f} MB for {entries:,}")
    tracemalloc.stop()
    print(f"export of all entries: {size / 1e6:,.0f} MB in {seconds:.0f} s; memory at most {', '.join(peaks)}")


def main() -> None:
    settings.ALLOWED_HOSTS = ["testserver"]
    with scratch_database():
        user = seed()
        print(f"{ENTRIES:,} entries of one account: milliseconds{'median':>22}{'max':>10}")
        measure_history(user)
        measure_export(user)


if __name__ == "__main__":
    main()
