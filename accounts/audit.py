"""The audit log: what admins did, and what they and others were refused.

An entry is written in the transaction of what it tells of: neither is there without the other. A refusal stands
alone, and is bounded for each person and minute, so that nobody fills the log by trying.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

import structlog
from django.db import models, transaction
from django.db.models.functions import Now

from accounts.models import AuditEntry, User
from kit.locks import lock_until_commit
from kit.text import one_line, read_id

Outcome = AuditEntry.Outcome

REFUSALS_PER_MINUTE = 10  # of one person; what they try beyond that is in the server's log alone
MAX_FOUND_PEOPLE = 1_000


class Action(models.TextChoices):
    """What an entry tells of."""

    GRANT = "grant", "Grant"
    DEDUCTION = "deduction", "Deduction"
    GRANT_APPROVED = "grant_approved", "Request approved"
    GRANT_DECLINED = "grant_declined", "Request declined"
    WELCOME_BONUS = "welcome_bonus", "Welcome bonus given by hand"
    ACCOUNT_STATUS = "account_status", "Account suspended, blocked or reactivated"
    ROLE_CHANGED = "role_changed", "Role changed"
    PERSON_CHANGED = "person_changed", "Person edited"
    SETTING_CHANGED = "setting_changed", "System settings changed"
    PACKAGE_CHANGED = "package_changed", "Package changed"
    PRICE_CHANGED = "price_changed", "Model price changed"
    REFUND = "refund", "Refund"
    EXPORT = "export", "Export"
    DRIFT_RESOLVED = "drift_resolved", "Difference with Stripe resolved"
    EVENT_SETTLED = "event_settled", "Event of Stripe dealt with"
    BULK_JOB = "bulk_job", "Bulk action"
    CONTENT_READ = "content_read", "Content of a person read"
    TEAM = "team", "Team or its members changed"
    ACCESS = "access", "Page opened"  # refused, always


# --- Writing --------------------------------------------------------------------------------------------------------


def write(
    *,
    action: Action,
    summary: str,
    actor: User | None,
    subject_id: int | None = None,
    about: tuple[str, int] | None = None,
    before: Mapping[str, Any] | None = None,
    after: Mapping[str, Any] | None = None,
    reason: str = "",
    outcome: str = Outcome.DONE,
) -> AuditEntry:
    """Append an entry; call it in the transaction of what it tells of. `about` is the kind and id of a row.

    `actor` None is the product itself, or an operator. Write no e-mail address and no name: see AuditEntry.
    """
    origin = structlog.contextvars.get_contextvars()  # of the request, also in a task that it asked for
    object_type, object_id = about or ("", "")
    return AuditEntry.objects.create(
        actor=actor,
        actor_role=actor.role if actor else "",
        ip_address=origin.get("ip"),
        request_id=origin.get("request_id", ""),
        action=action,
        summary=one_line(summary)[:500],
        reason=one_line(reason)[:500],
        outcome=outcome,
        subject_id=subject_id,
        object_type=object_type,
        object_id=str(object_id),
        before=None if before is None else dict(before),
        after=None if after is None else dict(after),
    )


def write_refusal(*, action: Action, summary: str, actor: User, **details: Any) -> bool:
    """Append that somebody was refused something, at most ten times a minute for each person; returns whether it was.

    Call it outside the transaction that the refusal rolls back. `details` as for `write`.
    """
    with transaction.atomic():
        # One at a time for each person: parallel attempts would all count the same rows.
        lock_until_commit(f"audit-refusals-{actor.pk}")
        recent = AuditEntry.objects.filter(
            actor=actor, outcome=Outcome.REFUSED, created_at__gt=Now() - timedelta(minutes=1)
        )
        if recent.count() >= REFUSALS_PER_MINUTE:
            return False
        write(action=action, summary=summary, actor=actor, outcome=Outcome.REFUSED, **details)
        return True


# --- Reading --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class AuditPage:
    """Entries, newest first; `next_before_id` leads to older ones, None when there are none."""

    entries: list[AuditEntry]
    next_before_id: int | None


def find_entries(
    *,
    actor: str = "",
    subject: str = "",
    action: str = "",
    outcome: str = "",
    about: tuple[str, int] | None = None,
    since: datetime | None = None,
    until: datetime | None = None,
    before_id: int | None = None,
    limit: int = 50,
) -> AuditPage:
    """Search the log, newest first. `actor` and `subject` are a part of an e-mail address, or a user's id in digits;
    `since` is included and `until` is not; `before_id` is where the page before this one ended."""
    entries = AuditEntry.objects.select_related("actor", "subject").order_by("-id")
    if actor:
        entries = entries.filter(actor_id__in=_find_people(actor))
    if subject:
        entries = entries.filter(subject_id__in=_find_people(subject))
    if action:
        entries = entries.filter(action=action)
    if outcome:
        entries = entries.filter(outcome=outcome)
    if about:
        entries = entries.filter(object_type=about[0], object_id=str(about[1]))
    if since:
        entries = entries.filter(created_at__gte=since)
    if until:
        entries = entries.filter(created_at__lt=until)
    if before_id is not None:
        entries = entries.filter(pk__lt=before_id)
    found = list(entries[: limit + 1])
    return AuditPage(found[:limit], found[limit - 1].pk if len(found) > limit else None)


def _find_people(text: str) -> list[int]:
    text = text.strip()
    if "\x00" in text or not text.isprintable():
        return []
    user_id = read_id(text)
    people = User.objects.filter(email__icontains=text) if user_id is None else User.objects.filter(pk=user_id)
    return list(people.order_by("pk").values_list("pk", flat=True)[:MAX_FOUND_PEOPLE])


def action_label(entry: AuditEntry) -> str:
    """The action in words, also of one that is not written any more."""
    return dict(Action.choices).get(entry.action, entry.action)
