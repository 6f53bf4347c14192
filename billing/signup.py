"""Opens a token account at sign-up: by signals, since accounts/ knows nothing of billing."""

from functools import partial
from typing import Any

from allauth.account.models import EmailAddress
from allauth.account.signals import email_confirmed
from django.db import transaction
from django.db.models.signals import post_save
from django.dispatch import receiver

from accounts.models import User
from billing import ledger


@receiver(post_save, sender=User)
def open_account(instance: User, created: bool, **kwargs: Any) -> None:
    # After the commit: the ledger commits for itself. Interrupted here, `get_account` opens it at the first visit.
    if created:
        transaction.on_commit(partial(ledger.initialize_account, user_id=instance.pk))


@receiver(email_confirmed)
def give_bonus_after_verification(email_address: EmailAddress, **kwargs: Any) -> None:
    transaction.on_commit(partial(ledger.initialize_account, user_id=email_address.user_id))
