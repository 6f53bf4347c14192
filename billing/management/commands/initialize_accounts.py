from collections.abc import Iterator
from typing import Any

from allauth.account.models import EmailAddress
from django.conf import settings
from django.core.management.base import BaseCommand, CommandError, CommandParser
from django.db import transaction
from django.db.models import BooleanField, Exists, ExpressionWrapper, OuterRef, Q, QuerySet, Value
from tqdm import tqdm

from accounts.models import User, Workspace
from billing import ledger
from billing.catalogue import system_settings
from billing.ledger import welcome
from billing.models import TokenAccount, TokenTransaction
from billing.models.account import WithheldBonus

BATCH_USERS = 1_000


class Command(BaseCommand):
    help = (
        "Open a token account for every user who has none, with the welcome bonus; whoever has an account without the "
        "bonus gets it too, unless their mailbox had it before. Interrupted, run it again: it goes on where it "
        "stopped, and nobody gets the bonus twice."
    )

    def add_arguments(self, parser: CommandParser) -> None:
        parser.add_argument("--dry-run", action="store_true", help="tell how many there are, and change nothing")

    def handle(self, *args: Any, dry_run: bool, **options: Any) -> None:
        try:
            with transaction.atomic():
                welcome.read_key()  # makes one at the first call
                transaction.set_rollback(dry_run)
        except welcome.KeyLost as error:
            raise CommandError(str(error)) from error
        bonus_tokens = system_settings.get_system_settings().welcome_bonus_tokens
        users = _with_state(is_bonus_given=bonus_tokens > 0)
        to_do = users.filter(Q(has_account=False) | Q(needs_bonus=True))
        if dry_run:
            opened, given = users.filter(has_account=False).count(), users.filter(needs_bonus=True).count()
            accounts, bonuses = "Accounts to open", "to give at most"  # of some the mailbox may have had it
        else:
            opened, given = self._initialize(to_do)
            accounts, bonuses = "Accounts opened", "given"
        self.stdout.write(
            f"{accounts}: {opened:,}. Welcome bonuses of {bonus_tokens:,} tokens {bonuses}: {given:,}. "
            f"Bonuses that wait until the e-mail address is verified: {users.filter(waits_for_email=True).count():,}. "
            f"Users: {users.count():,}."
        )

    def _initialize(self, users: QuerySet[Any]) -> tuple[int, int]:
        opened = given = 0
        # disable=None: no bar where nobody watches, in a log or a pipe.
        for user in tqdm(_in_batches(users), total=users.count(), unit=" users", disable=None):
            if not user.has_workspace:
                # Brought in from elsewhere: only saving a new `User` makes one.
                Workspace.objects.create(owner=user, name=f"{user.display_name}'s workspace"[:150])
            account = ledger.initialize_account(user_id=user.pk)
            opened += not user.has_account
            given += user.needs_bonus and not account.bonus_withheld
        return opened, given


def _with_state(*, is_bonus_given: bool) -> QuerySet[Any]:
    """All users, with what they have and lack. A bonus waits for the e-mail address where that must be verified."""
    bonus = TokenTransaction.objects.filter(account__user_id=OuterRef("pk"), idempotency_key=ledger.WELCOME_BONUS_KEY)
    refused = TokenAccount.objects.filter(user_id=OuterRef("pk"), bonus_withheld=WithheldBonus.GIVEN_BEFORE)
    lacks_bonus = ~Exists(bonus) & ~Exists(refused) & Q(Value(is_bonus_given), anonymised_at=None)
    verified = Q(Value(True))
    if settings.ACCOUNT_EMAIL_VERIFICATION == "mandatory":
        verified = Q(Exists(EmailAddress.objects.filter(user_id=OuterRef("pk"), verified=True)))
    return User.objects.annotate(
        has_workspace=Exists(Workspace.objects.filter(owner_id=OuterRef("pk"))),
        has_account=Exists(TokenAccount.objects.filter(user_id=OuterRef("pk"))),
        needs_bonus=ExpressionWrapper(lacks_bonus & verified, BooleanField()),
        waits_for_email=ExpressionWrapper(lacks_bonus & ~verified, BooleanField()),
    )


def _in_batches(users: QuerySet[Any]) -> Iterator[Any]:
    """In the order of their ids, a batch in memory at a time."""
    last_id = 0
    while batch := list(users.filter(pk__gt=last_id).order_by("pk")[:BATCH_USERS]):
        yield from batch
        last_id = batch[-1].pk
