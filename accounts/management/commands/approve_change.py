from typing import Any

from django.core.exceptions import ValidationError
from django.core.management.base import BaseCommand, CommandError, CommandParser

from accounts import two_persons
from kit.refusal import Refusal


class Command(BaseCommand):
    help = (
        "Approve a role or a change of settings that waits for another superadmin, where there is one alone: whoever "
        "has the server is the second person. Without an id it lists what waits."
    )

    def add_arguments(self, parser: CommandParser) -> None:
        parser.add_argument("id", nargs="?", type=int, help="as the list, and Requests on the dashboard, name it")

    def handle(self, *args: Any, id: int | None, **options: Any) -> None:
        if id is None:
            for each in two_persons.list_open():
                whose = f" of {each.subject}" if each.subject else ""
                self.stdout.write(f"{each.pk}  {each.get_kind_display()}{whose}: {each}, by {each.requested_by}")
            return
        try:
            done = two_persons.approve(request_id=id, by=None)
        except Refusal as error:
            raise CommandError(error.message) from None
        except ValidationError as error:
            raise CommandError("; ".join(error.messages)) from None
        self.stdout.write(f"Approved: {done}.")
