"""`manage.py make_demo_history`: a development database with a past of any size."""

from typing import Any

from django.conf import settings
from django.core.management.base import BaseCommand, CommandError, CommandParser
from django.db import transaction
from tqdm import tqdm

from accounts.models import User
from billing import catalogue
from billing.catalogue import packages, system_settings
from billing.demo import DEMO_PEOPLE
from billing.models import Purchase, TokenTransaction, TokenUsage

OPERATIONS_PER_USER = 50


class Command(BaseCommand):
    help = (
        "Fill a development database with a realistic past: people, operations, purchases, refunds, grants. It takes "
        "some three minutes for a million ledger entries. Everybody is at example.com and nobody can sign in."
    )

    def add_arguments(self, parser: CommandParser) -> None:
        parser.add_argument("--transactions", type=int, default=100_000, help="ledger entries, about")
        parser.add_argument("--users", type=int, help=f"default: one for every {OPERATIONS_PER_USER} entries")
        parser.add_argument("--months", type=int, default=12)
        parser.add_argument("--seed", type=int, default=1, help="the same seed makes the same people and choices")
        parser.add_argument("--force", action="store_true", help="also where people other than the demo's have entries")

    def handle(
        self, *args: Any, transactions: int, users: int | None, months: int, seed: int, force: bool, **options: Any
    ) -> None:
        if not settings.DEBUG:
            raise CommandError("An invented past is for development only.")
        from postmate.local import invented_past  # beside what is installed for development alone

        users = users or max(transactions // OPERATIONS_PER_USER, 5)
        if transactions < users * 2 or months < 1:
            raise CommandError("Ask for one month at least, and for two entries at least for each user.")
        others = TokenTransaction.objects.exclude(user__email__in=DEMO_PEOPLE)
        if not force and others.exists():
            raise CommandError("This database has a past of its own. Use another one, or --force.")
        system_settings.initialize_default_settings()
        packages.seed_default_packages()
        catalogue.seed_default_models()
        with transaction.atomic():
            history = invented_past.History(transactions=transactions, users=users, months=months, seed=seed)
            with tqdm(total=transactions, unit=" entries", unit_scale=True, disable=None, file=self.stderr) as bar:
                for made in history.make():
                    bar.update(made - bar.n)
            invented_past.prove()
        reached = invented_past.roll_up()
        made_rows = history.rows.counts
        self.stdout.write(
            f"{made_rows[User]:,} people, {made_rows[TokenUsage]:,} operations, {made_rows[Purchase]:,} purchases, "
            f"{made_rows[TokenTransaction]:,} ledger entries."
        )
        if reached:
            self.stdout.write(f"Roll-ups until {reached:%Y-%m-%d %H:%M} UTC.")
        else:
            self.stdout.write("Another transaction holds the roll-ups up. Run `manage.py roll_up_usage` later.")
