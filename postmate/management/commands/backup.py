from pathlib import Path
from typing import Any

from django.conf import settings
from django.core.management.base import BaseCommand, CommandError, CommandParser

from postmate import backup


class Command(BaseCommand):
    help = (
        "Writes the database and the files of images into one file, while everything runs. Prints its path. "
        "Whoever has that file has everything: keep it encrypted, and a copy of it elsewhere."
    )

    def add_arguments(self, parser: CommandParser) -> None:
        parser.add_argument("--to", type=Path, default=settings.BACKUP_DIR, help="the folder (default: BACKUP_DIR)")
        parser.add_argument("--keep", type=int, metavar="N", help="afterwards delete all but the newest N there")
        parser.add_argument("--without-media", action="store_true", help="the database alone")

    def handle(self, *args: Any, to: Path, keep: int | None, without_media: bool, **options: Any) -> None:
        if keep is not None and keep < 1:
            raise CommandError("--keep needs a number above 0.")
        try:
            path, manifest = backup.write_backup(to, with_media=not without_media)
        except (backup.BackupError, OSError) as error:
            raise CommandError(str(error)) from error
        self.stdout.write(
            f"{path}: {path.stat().st_size:,} bytes, {sum(manifest.rows.values()):,} rows, "
            f"{manifest.rows['billing_tokentransaction']:,} of them ledger entries, {manifest.media_files:,} files."
        )
        for old in backup.remove_old_backups(to, keep=keep) if keep else []:
            self.stdout.write(f"{old}: deleted, {keep} newer ones are there.")
