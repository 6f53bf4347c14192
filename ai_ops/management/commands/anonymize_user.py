from typing import Any

from django.core.management.base import BaseCommand, CommandError, CommandParser

from accounts.models import User
from ai_ops import own_data
from billing.upkeep.own_data import NotNow


class Command(BaseCommand):
    help = (
        "Take a person out of everything that is kept, as they can do themselves under Settings, Your data: their "
        "name, addresses, content and card go, the ledger stays. It cannot be undone. Refused, with nothing changed, "
        "while an operation of theirs runs or a payment is under way."
    )

    def add_arguments(self, parser: CommandParser) -> None:
        parser.add_argument("email", help="the address they sign in with")
        parser.add_argument("--yes", action="store_true", help="do it without asking")

    def handle(self, *args: Any, email: str, yes: bool, **options: Any) -> None:
        try:
            user = User.objects.get_by_natural_key(email)
        except User.DoesNotExist:
            raise CommandError(f"Nobody signs in with {email}.") from None
        if not yes and input(f"Anonymise {user.email} for ever? Type their address to go on: ") != user.email:
            raise CommandError("Nothing was changed.")
        try:
            own_data.anonymize_user(user_id=user.pk)
        except NotNow as error:
            raise CommandError(f"Nothing was changed. {error.message}") from None
        self.stdout.write(f"User {user.pk} is anonymised. The ledger stays; manage.py verify_ledger still holds.")
