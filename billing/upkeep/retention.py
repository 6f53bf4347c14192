"""What is deleted when nobody needs it any more, and after how many days.

Never here: the ledger, usage and purchases (law 3), the audit log with its addresses (a trigger refuses any change of
it), people's own work, finance exports. An event of Stripe keeps its row, only its payload goes: the unique event id is
what tells an old event that comes again.
"""

from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from allauth.usersessions.models import UserSession
from django.conf import settings
from django.contrib.sessions.models import Session
from django.db.models import Exists, OuterRef, QuerySet
from django.utils import timezone

from billing.models import BulkJob, BulkJobRow, Notification, StripeEvent

BATCH_ROWS = 1_000  # in one transaction: whoever writes beside it waits for no more


@dataclass(frozen=True, slots=True)
class Rule:
    """What goes. `days` names the setting; None: at once, there is nothing to choose."""

    what: str
    days: str | None
    find: Callable[[datetime], QuerySet[Any]]
    remove: Callable[[QuerySet[Any]], object]


def _delete(rows: QuerySet[Any]) -> object:
    return rows.delete()


def _drop_payload(events: QuerySet[StripeEvent]) -> object:
    return events.update(payload={})


RULES = (
    Rule(
        "payloads of Stripe's events that are done",
        "RETENTION_EVENT_PAYLOAD_DAYS",
        lambda before: StripeEvent.objects.filter(
            state__in=(StripeEvent.State.PROCESSED, StripeEvent.State.IGNORED), received_at__lt=before
        ).exclude(payload={}),
        _drop_payload,
    ),
    Rule(
        "notifications that were read",
        "RETENTION_NOTIFICATION_DAYS",
        # Whatever still waits to be mailed stays until it is.
        lambda before: Notification.objects.filter(read_at__lt=before, email_next_at=None),
        _delete,
    ),
    Rule(
        "accounts in bulk exports",
        "RETENTION_BULK_EXPORT_DAYS",
        lambda before: BulkJobRow.objects.filter(job__kind=BulkJob.Kind.EXPORT, job__finished_at__lt=before),
        _delete,
    ),
    Rule(
        "bulk exports",
        "RETENTION_BULK_EXPORT_DAYS",
        lambda before: BulkJob.objects.filter(kind=BulkJob.Kind.EXPORT, finished_at__lt=before, rows=None),
        _delete,
    ),
    Rule("sessions that have ended", None, lambda now: Session.objects.filter(expire_date__lt=now), _delete),
    Rule(
        "addresses and browsers of sessions that have ended",
        None,
        # Noted right after its session is saved: one of today may be ahead of it.
        lambda now: UserSession.objects.filter(
            ~Exists(Session.objects.filter(session_key=OuterRef("session_key"))),
            last_seen_at__lt=now - timedelta(days=1),
        ),
        _delete,
    ),
)


def find_expired(*, now: datetime | None = None) -> list[tuple[Rule, QuerySet[Any] | None]]:
    """What each rule finds to go; None where the setting keeps it for ever."""
    now = now or timezone.now()
    found: list[tuple[Rule, QuerySet[Any] | None]] = []
    for rule in RULES:
        days = getattr(settings, rule.days) if rule.days else 0
        found.append((rule, None if rule.days and not days else rule.find(now - timedelta(days=days))))
    return found


def apply_retention() -> dict[str, int]:
    """Delete what is older than the settings keep it, in small transactions; returns how many of what.

    Killed at any line, the next run goes on. Moves no tokens.
    """
    return {rule.what: _remove(rule, rows) for rule, rows in find_expired() if rows is not None}


def _remove(rule: Rule, rows: QuerySet[Any]) -> int:
    removed = 0
    while ids := list(rows.order_by("pk").values_list("pk", flat=True)[:BATCH_ROWS]):
        rule.remove(rows.model._default_manager.filter(pk__in=ids))
        removed += len(ids)
    return removed
