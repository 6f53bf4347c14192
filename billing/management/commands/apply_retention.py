from typing import Any

from django.core.management.base import BaseCommand, CommandParser

from billing.upkeep import retention


class Command(BaseCommand):
    help = "Deletes what is older than the RETENTION_… settings keep it, as the worker does every night."

    def add_arguments(self, parser: CommandParser) -> None:
        parser.add_argument("--dry-run", action="store_true", help="print what would go, delete nothing")

    def handle(self, *args: Any, dry_run: bool, **options: Any) -> None:
        if not dry_run:
            for what, number in retention.apply_retention().items():
                self.stdout.write(f"{number:,} {what}: gone")
            return
        for rule, rows in retention.find_expired():
            outcome = "kept for ever" if rows is None else f"{rows.count():,} would go"
            self.stdout.write(f"{rule.what} ({rule.days or 'at once'}): {outcome}")
