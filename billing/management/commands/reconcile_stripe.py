import re
from datetime import UTC, datetime, timedelta
from typing import Any

from django.core.management.base import BaseCommand, CommandError, CommandParser
from django.utils import timezone

from billing.models import Drift
from billing.payments import reconcile
from billing.payments.gateway import GatewayError

UNITS = {"h": "hours", "d": "days", "w": "weeks"}


class Command(BaseCommand):
    help = (
        "Compares our books with Stripe's payments, refunds and disputes. Applies what was missed, prints what it "
        "found, and exits with 1 while something differs that a person has to look at."
    )

    def add_arguments(self, parser: CommandParser) -> None:
        parser.add_argument(
            "--since", default="3d", help="how far back: a day (2026-11-01, UTC) or a while (12h, 7d, 4w); default 3d"
        )

    def handle(self, *args: Any, since: str, **options: Any) -> None:
        try:
            report = reconcile.reconcile(since=_moment(since))
        except GatewayError as error:
            raise CommandError(f"Stripe could not be read: {error.__cause__ or error}") from error
        self.stdout.write(
            f"Compared {report.payments:,} payments, {report.refunds:,} refunds, {report.disputes:,} disputes."
        )
        for word, drifts in (("healed", report.healed), ("differs", report.differing), ("mended", report.resolved)):
            for drift in drifts:
                self.stdout.write(f"{word}: {drift.kind} {drift.stripe_id}: {drift.description}")
        unresolved = Drift.objects.filter(resolved_at=None).count()
        if unresolved:
            raise CommandError(f"{unresolved:,} drifts are unresolved; see /admin/tokens/drifts/.")
        self.stdout.write("Our books and Stripe's agree.")


def _moment(text: str) -> datetime:
    """The beginning of a day, or the moment a while ago. Raises CommandError."""
    try:
        if match := re.fullmatch(r"(\d{1,4})([hdw])", text, re.ASCII):
            return timezone.now() - timedelta(**{UNITS[match[2]]: int(match[1])})
        return datetime.strptime(text, "%Y-%m-%d").replace(tzinfo=UTC)
    except (ValueError, OverflowError):
        raise CommandError(f"{text!r} is no day such as 2026-11-01 and no while such as 12h, 7d or 4w.") from None
