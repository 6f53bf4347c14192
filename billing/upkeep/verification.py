"""Asks the whole database whether the laws hold (`laws.py`), and notes what came of it.

`manage.py verify_ledger` runs it in one snapshot, so that a running system does not look broken.
"""

import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import redis
import structlog
from django.db import connection

from billing.upkeep.laws import Check, checks
from kit import redis_client
from kit.database import one_snapshot

logger = structlog.get_logger(__name__)

BOOKS_KEY = "postmate:books"  # a hash in Redis: what the last check of all books found, and when
EXAMPLES = 5  # violations of each check that are shown


@dataclass(frozen=True, slots=True)
class Finding:
    """What one check found: how many rows break the law, and the first of them."""

    check: Check
    rows: int
    violations: int
    examples: list[dict[str, Any]]


def verify() -> Iterator[Finding]:
    """Run every check over the whole database, in one snapshot that writes nothing."""
    with one_snapshot(), connection.cursor() as cursor:
        counted: dict[str, int] = {}
        for check in checks():
            if check.rows not in counted:
                cursor.execute(f"SELECT count(*) FROM {check.rows}")  # noqa: S608 – our own names and constants, no input
                counted[check.rows] = cursor.fetchone()[0]
            cursor.execute(
                f"SELECT count(*) OVER () AS violations, violation.* FROM ({check.sql}) AS violation "  # noqa: S608 – our own names and constants, no input
                f"LIMIT {EXAMPLES}"
            )
            columns = [column.name for column in cursor.description]
            examples = [dict(zip(columns, row, strict=True)) for row in cursor.fetchall()]
            violations = examples[0]["violations"] if examples else 0
            for example in examples:
                del example["violations"]
            yield Finding(check, counted[check.rows], violations, examples)


def check_books() -> int:
    """Run every check, log what each that fails has found, and note the outcome. Returns the violations."""
    violations = 0
    for finding in verify():
        violations += finding.violations
        if finding.violations:
            logger.error(
                "The books are broken",
                check=finding.check.name,
                law=finding.check.law,
                violations=finding.violations,
                examples=finding.examples,
            )
    note_outcome(violations)
    return violations


def note_outcome(violations: int) -> None:
    """Keep for /metrics that all books were checked just now, and what was found. It is a note in Redis: without Redis
    nothing is noted, and when it is lost an alert asks to check again."""
    with suppress(redis.RedisError):
        redis_client.client().hset(BOOKS_KEY, mapping={"checked_at": time.time(), "violations": violations})
