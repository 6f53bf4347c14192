"""What opens an account besides its password, and how all of it is ended."""

from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from allauth.account.internal.flows.login import record_authentication
from allauth.account.models import EmailAddress
from allauth.account.signals import authentication_step_completed, user_signed_up
from allauth.mfa.models import Authenticator
from allauth.mfa.signals import authenticator_added
from allauth.mfa.utils import is_mfa_enabled
from allauth.usersessions.models import UserSession
from django.contrib.auth import get_user, update_session_auth_hash
from django.contrib.sessions.backends.db import SessionStore
from django.contrib.sessions.models import Session
from django.core import signing
from django.db import transaction
from django.db.models import F
from django.dispatch import receiver
from django.http import HttpRequest
from django.utils.crypto import constant_time_compare

from accounts import api_keys, audit
from accounts.models import User
from accounts.own_data import ANONYMOUS_HOST

PASSWORD_KNOWN = "password_known"  # noqa: S105 – in a session: the password that was given in it


@contextmanager
def lock(user_id: int) -> Iterator[User]:
    """The person, to be changed by nobody else until the transaction, which this opens, has ended."""
    with transaction.atomic():
        yield User.objects.select_for_update().get(pk=user_id)


# --- Sessions -------------------------------------------------------------------------------------------------------


def end_sessions(user: User, *, but: HttpRequest | None = None) -> None:
    """Sign the person out everywhere, except in the session of the request `but`. Twice is once.

    The mark that every session carries stops fitting, so no session is left out, whoever made it.
    """
    with transaction.atomic():
        User.objects.filter(pk=user.pk).update(session_epoch=F("session_epoch") + 1)
        user.refresh_from_db(fields=["session_epoch"])
        sessions = UserSession.objects.filter(user=user)
        Session.objects.filter(session_key__in=sessions.values("session_key")).delete()
        sessions.delete()
    if but is not None:
        update_session_auth_hash(but, user)
        UserSession.objects.create_from_request(but)


def is_still_signed_in(request: HttpRequest, user_id: int) -> bool:
    """Whether the session of a request that goes on for minutes is the person's at this moment, too: it was not signed
    out, here or from elsewhere, no new password has ended it, and its owner is not switched off."""
    now = HttpRequest()
    now.session = SessionStore(request.session.session_key)
    return get_user(now).pk == user_id


@receiver(authenticator_added)
def trust_no_older_session(request: HttpRequest, user: User, authenticator: Authenticator, **kwargs: Any) -> None:
    """A session that never showed the new factor ends. The one that set it up has shown a code of it."""
    if authenticator.type == Authenticator.Type.RECOVERY_CODES:
        return
    end_sessions(user, but=request)
    record_authentication(request, user, "mfa", id=authenticator.pk, type=authenticator.type)


# --- Whose account it is --------------------------------------------------------------------------------------------


def knows_password(request: HttpRequest, user: User) -> bool:
    """Whether the password that the account has now was given in this session, at sign-up or at a sign-in."""
    return constant_time_compare(request.session.get(PASSWORD_KNOWN, ""), user.get_session_auth_hash())


@receiver(user_signed_up)
def note_password_of_sign_up(request: HttpRequest, user: User, **kwargs: Any) -> None:
    request.session[PASSWORD_KNOWN] = user.get_session_auth_hash()


@receiver(authentication_step_completed)
def note_password_of_sign_in(request: HttpRequest, user: User, method: str, **kwargs: Any) -> None:
    if method == "password":
        request.session[PASSWORD_KNOWN] = user.get_session_auth_hash()


def only_owners(users: Iterable[User], address: str) -> list[User]:
    """Those whose address it is: whoever signs in with it or has proven it. Whoever only wants to add it to an account
    of their own has no part in it, and stands in nobody's way."""
    owners = set(EmailAddress.objects.filter(email=address.lower(), verified=True).values_list("user_id", flat=True))
    return [user for user in users if user.pk in owners or user.email.lower() == address.lower()]


def free_address(proven: EmailAddress) -> None:
    """Take the address from an account that somebody else signed up with it and never proved, which is nobody's now.
    In the caller's transaction."""
    for user in User.objects.select_for_update().filter(email=proven.email).exclude(pk=proven.user_id):
        EmailAddress.objects.filter(user=user).delete()
        user.email = f"unproven-{user.pk}@{ANONYMOUS_HOST}"
        user.set_unusable_password()
        user.save(update_fields=["email", "password"])
        end_sessions(user)
        api_keys.revoke_all(user_id=user.pk)
        audit.write(
            action=audit.Action.PERSON_CHANGED,
            summary="The address that was never proven here was proven by somebody else",
            actor=None,
            subject_id=user.pk,
        )


SENT_TO = "sent-to"  # in the link of a reset and in the session: the address that it was sent to


def sign_address(address: EmailAddress) -> str:
    return signing.dumps(address.pk, salt=SENT_TO)


def find_removable_addresses(user: User, *, sent_to: str) -> tuple[EmailAddress | None, list[EmailAddress]]:
    """Which addresses may be removed by whoever had a reset sent to the signed one, which comes first.

    Those alone that were added after it: the newer one may be a thief's, who must not remove the owner's with it. With
    a second factor none: a mailbox alone does not open that account, so it takes nothing out of it.
    """
    try:
        address = EmailAddress.objects.filter(pk=signing.loads(sent_to, salt=SENT_TO), user=user, verified=True).first()
    except signing.BadSignature:
        return None, []
    if address is None or is_mfa_enabled(user):
        return None, []
    return address, list(EmailAddress.objects.filter(user=user, pk__gt=address.pk).order_by("pk"))


def remove_addresses(user: User, *, sent_to: str, addresses: Collection[str]) -> None:
    """Take those of the removable addresses out. If the first is among them, the one of the reset takes its place."""
    with lock(user.pk) as locked:
        address, removable = find_removable_addresses(locked, sent_to=sent_to)
        removed = [each for each in removable if each.email in addresses]
        if address is None or not removed:
            return
        if any(each.primary for each in removed):
            address.set_as_primary()
        EmailAddress.objects.filter(pk__in=[each.pk for each in removed]).delete()
        audit.write(
            action=audit.Action.PERSON_CHANGED,
            summary=f"Removed {len(removed)} further addresses with a new password",
            actor=None,
            subject_id=user.pk,
        )
    user.refresh_from_db(fields=["email"])


def list_openers(user: User) -> list[str]:
    """What opens the account beside the password, in words: addresses and second factors."""
    addresses = EmailAddress.objects.filter(user=user).order_by("pk").values_list("email", flat=True)
    factors = Authenticator.objects.filter(user=user).order_by("pk")
    return [*addresses, *(f"{each.get_type_display()}, set up {each.created_at:%d %B %Y}" for each in factors)]


def hand_over(user: User, *, proven: EmailAddress) -> None:
    """Take away all that a stranger may have set before the address was proven: password, sessions, keys, second
    factors, other addresses. In the caller's transaction, with the person's row locked."""
    user.set_unusable_password()
    user.save(update_fields=["password"])
    end_sessions(user)
    EmailAddress.objects.filter(user=user).exclude(pk=proven.pk).delete()
    Authenticator.objects.filter(user=user).delete()
    api_keys.revoke_all(user_id=user.pk)
    audit.write(
        action=audit.Action.PERSON_CHANGED,
        summary="Handed over to whoever proved the address: earlier password, sessions, keys and second factors ended",
        actor=None,
        subject_id=user.pk,
    )
