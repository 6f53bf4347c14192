import signal
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import structlog
from django.conf import settings
from django.core.management.base import BaseCommand, CommandError, CommandParser
from django.db import DatabaseError, InterfaceError, connection
from psycopg_pool import PoolTimeout

from postmate.ops import backup

logger = structlog.get_logger(__name__)

LOOK_SECONDS = 60
AGAIN_SECONDS = 600  # after one that failed


class Command(BaseCommand):
    help = (
        "Writes the database and the files of images into one file, while everything runs. Prints its path. "
        "Whoever has that file has everything: keep it encrypted, and a copy of it elsewhere."
    )

    def add_arguments(self, parser: CommandParser) -> None:
        parser.add_argument("--to", type=Path, default=settings.BACKUP_DIR, help="the folder (default: BACKUP_DIR)")
        parser.add_argument("--keep", type=int, metavar="N", help="afterwards delete all but the newest N there")
        parser.add_argument(
            "--every-night",
            metavar="HH:MM",
            help="stay, and make one each day at this time (UTC); at once where the last is missing",
        )
        parser.add_argument("--without-media", action="store_true", help="the database alone")

    def handle(
        self, *args: Any, to: Path, keep: int | None, every_night: str | None, without_media: bool, **options: Any
    ) -> None:
        if keep is not None and keep < 1:
            raise CommandError("--keep needs a number above 0.")
        if every_night is None:
            self._make(to, keep, without_media)
            return
        try:
            at = datetime.strptime(every_night, "%H:%M").time()  # noqa: DTZ007 – a time of day
        except ValueError:
            raise CommandError("--every-night needs a time such as 02:07.") from None
        # The first process of a container hears no signal that it does not ask for.
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
        while True:
            wait_seconds = LOOK_SECONDS
            if backup.is_due(to, at=at, now=datetime.now(UTC)):
                try:
                    self._make(to, keep, without_media)
                except (CommandError, DatabaseError, InterfaceError, PoolTimeout) as error:
                    logger.error("A backup was not made", error=error)
                    wait_seconds = AGAIN_SECONDS
                connection.close()
            time.sleep(wait_seconds)

    def _make(self, to: Path, keep: int | None, without_media: bool) -> None:
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
