from typing import Any

from django.core.management.base import BaseCommand, CommandParser
from tqdm import tqdm

from billing.figures import roll_ups


class Command(BaseCommand):
    help = (
        "Bring the dashboard's roll-ups up to date, as the worker does every two minutes. With --rebuild they are made "
        "anew from the raw rows. Safe to repeat and to interrupt."
    )

    def add_arguments(self, parser: CommandParser) -> None:
        parser.add_argument("--rebuild", action="store_true", help="delete them first; pages go on with the old ones")

    def handle(self, *args: Any, rebuild: bool, **options: Any) -> None:
        work = roll_ups.rebuild if rebuild else roll_ups.roll_up
        with tqdm(unit=" hours", desc="Rolled up", disable=None, file=self.stderr) as bar:

            def progress(hours_done: int, hours_total: int) -> None:
                bar.total = hours_total
                bar.update(hours_done - bar.n)

            until = work(progress=progress)
        if until is None:
            self.stdout.write("Nothing could be rolled up yet: an older transaction is still open. Try again later.")
        else:
            self.stdout.write(f"The roll-ups reach until {until:%Y-%m-%d %H:%M} UTC.")
