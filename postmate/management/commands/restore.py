from pathlib import Path
from typing import Any

from django.core.management.base import BaseCommand, CommandError, CommandParser

from postmate.ops import backup


class Command(BaseCommand):
    help = (
        "Fills an empty database, and MEDIA_ROOT, from a file of `backup`, and checks the books. It overwrites nothing "
        "and speaks to nobody, Stripe included."
    )

    def add_arguments(self, parser: CommandParser) -> None:
        parser.add_argument("file", type=Path)
        parser.add_argument("--without-media", action="store_true", help="the database alone")

    def handle(self, *args: Any, file: Path, without_media: bool, **options: Any) -> None:
        try:
            restored = backup.restore(file, with_media=not without_media)
        except (backup.BackupError, OSError) as error:
            raise CommandError(str(error)) from error
        rows = restored.manifest.rows
        self.stdout.write(
            f"Restored to {restored.manifest.made_at}: {sum(rows.values()):,} rows in {len(rows)} tables, as many and "
            "the same ledger as in the backup."
        )
        if restored.is_migrated:
            self.stdout.write("It was of an older release: the migrations since then are applied.")
        if restored.expired_holds:
            self.stdout.write(f"Holds that were over, and are released: {restored.expired_holds:,}.")
        broken = 0
        for finding in restored.findings:
            waits = finding.check.waits_for_stripe
            broken += not waits
            self.stdout.write(
                f"{finding.check.name}: {finding.violations:,} {'wait for Stripe' if waits else 'VIOLATIONS'}"
            )
        if broken:
            raise CommandError("The books are broken; `manage.py verify_ledger` shows where.")
        self.stdout.write(
            "The books are in order. If this takes the place of a lost database, run `manage.py reconcile_stripe "
            "--since 35d` before anybody signs in; docs/OPERATIONS.md says what else."
        )
