import time
from pathlib import Path
from typing import Any

from django.conf import settings
from django.core.management.base import BaseCommand, CommandError, CommandParser

from accounts.models import User
from billing import ledger
from billing.demo import DEMO_NAMES, DEMO_PASSWORD, DEMO_PEOPLE
from billing.models import Purchase, TokenTransaction, TokenUsage


class Command(BaseCommand):
    help = "Make the demo people, for development only: their password is known. Safe to repeat."

    def add_arguments(self, parser: CommandParser) -> None:
        parser.add_argument(
            "--past", action="store_true", help="with a year of 140 people, theirs among them, where there is none yet"
        )
        parser.add_argument("--stripe-data", type=Path, help="file of a stand-in, told of the payments of that year")

    def handle(self, *args: Any, past: bool, stripe_data: Path | None, **options: Any) -> None:
        if not settings.DEBUG:
            raise CommandError("Demo people have a known password; they are for development only.")
        if past and not User.objects.exists() and not TokenTransaction.objects.exists():
            from postmate.local.demo import make_past  # needs what is installed for development alone

            began = time.monotonic()
            counts = make_past(stripe_data=stripe_data).rows.counts
            self.stdout.write(
                f"  A year of {counts[User]} people: {counts[TokenUsage]:,} operations, {counts[Purchase]} purchases; "
                f"{time.monotonic() - began:.1f} s"
            )
        for email, role in DEMO_PEOPLE.items():
            user = User.objects.filter(email=email).first()
            user = user or User.objects.create_user(email, DEMO_PASSWORD, name=DEMO_NAMES[email], role=role)
            ledger.initialize_account(user_id=user.pk)
