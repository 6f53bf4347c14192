from typing import Any

from django.core.management.base import BaseCommand, CommandError, CommandParser

from billing.models import StripeEvent
from billing.payments import webhooks


class Command(BaseCommand):
    help = (
        "Handles Stripe's events that failed or were kept aside once more, oldest first, and prints what became of "
        "each. Exits with 1 when one fails again."
    )

    def add_arguments(self, parser: CommandParser) -> None:
        parser.add_argument("event_ids", nargs="*", metavar="evt_…", help="these alone; default: all that are open")

    def handle(self, *args: Any, event_ids: list[str], **options: Any) -> None:
        events = StripeEvent.objects.filter(state__in=webhooks.OPEN).order_by("id")
        if event_ids:
            events = events.filter(event_id__in=event_ids)
        failed = 0
        for event in events:
            try:
                event = webhooks.handle_again(event)
            except webhooks.EventNotHandled as error:
                failed += 1
                self.stdout.write(f"{event.event_id} {event.type}: failed again: {error.__cause__!r}")
            else:
                self.stdout.write(f"{event.event_id} {event.type}: {event.state} {event.message}".rstrip())
        if failed:
            raise CommandError(f"{failed:,} of {len(events):,} events failed again.")
        self.stdout.write(f"{len(events):,} events were handled again.")
