"""Opens a token account at sign-up, and tells Stripe who changed their address: by signals, since accounts/ knows
nothing of billing."""

from functools import partial
from typing import Any

from allauth.account.models import EmailAddress
from django.db import transaction
from django.db.models import Q
from django.db.models.signals import post_save
from django.dispatch import receiver

from accounts.models import User
from billing import ledger
from billing.models import TokenAccount
from kit.on_commit import enqueue_on_commit


@receiver(post_save, sender=User)
def open_account(instance: User, created: bool, **kwargs: Any) -> None:
    # After the commit: the ledger commits for itself. Interrupted here, `get_account` opens it at the first visit.
    if created:
        transaction.on_commit(partial(ledger.initialize_account, user_id=instance.pk))


@receiver(post_save, sender=User)
def tell_stripe(instance: User, created: bool, update_fields: Any = None, **kwargs: Any) -> None:
    # What a save that runs no receiver changes, and a lost task, the sweep finds.
    if created or not (update_fields is None or {"email", "name"} & set(update_fields)):
        return
    known = Q(stripe_email=instance.email, stripe_name=instance.name)
    stale = TokenAccount.objects.filter(~known, user=instance, stripe_customer_id__isnull=False)
    for account_id in stale.values_list("pk", flat=True):
        enqueue_on_commit("billing.tasks.tell_customer", account_id)


@receiver(post_save, sender=EmailAddress)
def give_bonus_after_verification(instance: EmailAddress, **kwargs: Any) -> None:
    # Whoever confirmed it, and also when it came confirmed: the bonus, or one mailbox more of who had it.
    if instance.verified:
        transaction.on_commit(partial(ledger.initialize_account, user_id=instance.user_id))
