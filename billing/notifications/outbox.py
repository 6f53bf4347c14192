"""The e-mails of messages that wait to be sent."""

import smtplib
from datetime import timedelta
from urllib.parse import urlsplit

import structlog
from django.conf import settings
from django.core.mail import EmailMultiAlternatives, get_connection
from django.db import transaction
from django.template.loader import render_to_string
from django.urls import reverse
from django.utils import timezone

from billing.models import (
    Notification,
)
from billing.notifications.inbox import may_be_muted
from kit.text import one_line

logger = structlog.get_logger(__name__)

# The waits triple: 2, 6, 18 minutes … a day. A mail server may be away for a night.
MAX_EMAIL_ATTEMPTS = 8
FIRST_EMAIL_WAIT = timedelta(minutes=2)  # longer than any attempt takes, so it is the claim of the one under way, too
# The server refused this one mail and goes on serving.
REFUSALS = (
    smtplib.SMTPRecipientsRefused,
    smtplib.SMTPSenderRefused,
    smtplib.SMTPDataError,
    smtplib.SMTPNotSupportedError,
)


def send_pending_emails(limit: int = 100) -> int:
    """Send the e-mails that are due, at most `limit`. Returns how many were sent.

    Each is claimed in a transaction of its own, which is over before the mail server is spoken to (law 7). Any number
    of workers may do this at once. A crash between sending and noting it brings that mail a second time, with the
    same Message-ID.
    """
    connection = get_connection()
    sent = 0
    try:
        for _ in range(limit):
            notification = _claim_email()
            if notification is None:
                break
            try:
                connection.open()  # nothing happens when it is open
                connection.send_messages([render_email(notification)])
            except Exception as error:
                logger.warning(
                    "An e-mail was not sent",
                    notification_id=notification.pk,
                    user_id=notification.user_id,
                    error=error,
                )
                Notification.objects.filter(pk=notification.pk).update(email_error=one_line(repr(error))[:500])
                if isinstance(error, OSError) and not isinstance(error, REFUSALS):
                    break  # the server is away: the others need not find that out one by one
            else:
                sent += Notification.objects.filter(pk=notification.pk).update(
                    email_sent_at=timezone.now(), email_next_at=None, email_error=""
                )
    finally:
        connection.close()
    return sent


def render_email(notification: Notification) -> EmailMultiAlternatives:
    """The e-mail of a notification, as text and HTML that say the same."""
    context = {
        "notification": notification,
        "name": one_line(notification.user.display_name),
        "site_url": settings.SITE_URL,
        "url": f"{settings.SITE_URL}{notification.link}",
        "facts": notification.context.get("facts", []),
        "action": notification.context.get("action") or "Open Postmate",
        "second_link": notification.context.get("second_link"),
        "settings_url": f"{settings.SITE_URL}{reverse('tokens:notification_settings')}",
        "may_be_muted": may_be_muted(notification.kind),
    }
    email = EmailMultiAlternatives(
        subject=notification.title,
        body=render_to_string("emails/notification.txt", context),
        to=[notification.user.email],
        headers={
            # The same in each attempt, so that mail programs can tell a repetition.
            "Message-ID": f"<notification-{notification.pk}@{urlsplit(settings.SITE_URL).hostname}>",
            "Auto-Submitted": "auto-generated",  # no answers from autoresponders
        },
    )
    email.attach_alternative(render_to_string("emails/notification.html", context), "text/html")
    return email


def _claim_email() -> Notification | None:
    """Take the next e-mail that is due. Until its next attempt is due, nobody else takes it."""
    with transaction.atomic(durable=True):
        now = timezone.now()
        notification = (
            Notification.objects.select_for_update(skip_locked=True, of=("self",))
            .select_related("user")
            .filter(email_next_at__lte=now)
            .order_by("email_next_at", "id")
            .first()
        )
        if notification is None:
            return None
        notification.email_attempts += 1
        is_last = notification.email_attempts >= MAX_EMAIL_ATTEMPTS
        wait = FIRST_EMAIL_WAIT * 3 ** (notification.email_attempts - 1)
        notification.email_next_at = None if is_last else now + wait
        notification.save(update_fields=["email_attempts", "email_next_at"])
    return notification
