"""The messages of each person: written once, read, muted."""

from collections.abc import Iterable, Sequence
from typing import Any

from django.utils import timezone

from accounts.models import User
from billing.models import (
    Notification,
    NotificationPreference,
)
from billing.models.notification import NotificationKind as Kind
from kit.text import one_line

# The account does not work as its owner set it up, or somebody set it up, and only they can mend it.
ALWAYS_EMAILED = (
    Kind.AUTO_RECHARGE_NEEDS_CONFIRMATION,
    Kind.AUTO_RECHARGE_SWITCHED_OFF,
    Kind.ACCOUNT_STATUS_CHANGED,
    # Whoever sits in a stolen session is not to be able to keep it from them.
    Kind.AUTO_RECHARGE_SWITCHED_ON,
    Kind.SAVED_CARD_CHANGED,
)
FOR_ADMINS = (Kind.WEEKLY_SUMMARY, Kind.REFUND_REFUSED, Kind.PROVIDER_REFUSES_US)


MAX_COUNTED_UNREAD = 100

Facts = Sequence[tuple[str, str]]


def notify(
    *,
    user_id: int,
    kind: Kind,
    key: str,
    title: str,
    body: str,
    link: str,
    action: str,
    facts: Facts = (),
    second_link: tuple[str, str] | None = None,
) -> None:
    """Write the message unless one with its key has been. `action` is the text on the e-mail's button, which leads to
    `link`; `facts` its table; `second_link` words and path of a link below."""
    if User.objects.filter(pk=user_id, anonymised_at__isnull=False).exists():
        return  # there is nobody any more: a late refund or dispute is the books' matter alone
    is_muted = (
        may_be_muted(kind)
        and NotificationPreference.objects.filter(user_id=user_id, kind=kind, wants_email=False).exists()
    )
    context: dict[str, Any] = {"action": action, "facts": [[name, one_line(value)] for name, value in facts]}
    if second_link:
        context["second_link"] = second_link
    Notification.objects.bulk_create(
        [
            Notification(
                user_id=user_id,
                kind=kind,
                key=f"{kind}:{key}",
                title=one_line(title)[:200],
                body=one_line(body),
                link=link,
                context=context,
                email_wanted=not is_muted,
                email_next_at=None if is_muted else timezone.now(),
            )
        ],
        ignore_conflicts=True,
    )


def count_unread(user_id: int, *, except_ids: Sequence[int] = ()) -> int:
    """How many messages the user has not seen; counted no further than 100."""
    unread = Notification.objects.filter(user_id=user_id, read_at=None).exclude(pk__in=except_ids)
    return unread[:MAX_COUNTED_UNREAD].count()


def list_notifications(*, user_id: int, before_id: int | None = None, limit: int) -> list[Notification]:
    """The user's messages, newest first, from the one before `before_id` on."""
    own = Notification.objects.filter(user_id=user_id).order_by("-id")
    if before_id is not None:
        own = own.filter(pk__lt=before_id)
    return list(own[:limit])


def mark_read(*, user_id: int, notification_ids: Iterable[int] | None = None) -> int:
    """Mark the user's unread messages as read: those named, or all. Returns how many there were."""
    unread = Notification.objects.filter(user_id=user_id, read_at=None)
    if notification_ids is not None:
        unread = unread.filter(pk__in=list(notification_ids))
    return unread.update(read_at=timezone.now())


def may_be_muted(kind: str) -> bool:
    return kind not in ALWAYS_EMAILED


def kinds_for(user: User) -> list[Kind]:
    """What the user can be told about."""
    return [kind for kind in Kind if user.is_admin or kind not in FOR_ADMINS]


def get_emailed_kinds(user: User) -> set[Kind]:
    """What the user gets e-mails about."""
    muted = NotificationPreference.objects.filter(user=user, wants_email=False).values_list("kind", flat=True)
    return {kind for kind in kinds_for(user) if kind not in set(muted) or not may_be_muted(kind)}


def update_emailed_kinds(user: User, *, kinds: Iterable[str]) -> None:
    """Let the user have e-mails about `kinds` and no others, but for those that cannot be muted."""
    wanted = set(kinds)
    NotificationPreference.objects.bulk_create(
        [
            NotificationPreference(user=user, kind=kind, wants_email=kind in wanted)
            for kind in kinds_for(user)
            if may_be_muted(kind)
        ],
        update_conflicts=True,
        unique_fields=["user", "kind"],
        update_fields=["wants_email"],
    )
