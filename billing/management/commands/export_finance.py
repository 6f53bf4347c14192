from datetime import UTC, date, timedelta
from typing import Any

from django.core.management.base import BaseCommand, CommandError, CommandParser
from django.utils import timezone

from billing.figures import finance
from billing.figures.liability import LiabilityDoesNotBalance


class Command(BaseCommand):
    help = (
        "Writes the finance export of a day (UTC), as the worker does every night: ledger, purchases, refunds and the "
        "roll-forward of what is owed to users. Books that do not balance are not written. Safe to repeat."
    )

    def add_arguments(self, parser: CommandParser) -> None:
        parser.add_argument("--day", help="such as 2026-11-01; default yesterday")

    def handle(self, *args: Any, day: str | None, **options: Any) -> None:
        yesterday = timezone.now().astimezone(UTC).date() - timedelta(days=1)
        try:
            wanted = date.fromisoformat(day) if day else yesterday
        except ValueError:
            raise CommandError(f"{day!r} is no day such as 2026-11-01.") from None
        try:
            path = finance.export_day(wanted)
        except (finance.DayNotOver, LiabilityDoesNotBalance) as error:
            raise CommandError(f"Nothing was written. {error}") from error
        self.stdout.write(f"Written: {path}")
