"""A person's own record: what they can download, and how it is anonymised."""

from collections.abc import Iterator, Mapping
from typing import Any

from allauth.account.models import EmailAddress
from allauth.mfa.models import Authenticator
from allauth.usersessions.models import UserSession
from django.contrib.admin.models import LogEntry
from django.contrib.contenttypes.models import ContentType
from django.contrib.sessions.models import Session
from django.db.models import CharField, Q, Value
from django.db.models.functions import Cast, Coalesce, Concat, Now
from django.utils import timezone

from accounts.models import ApiKey, Membership, User, Workspace

ANONYMOUS_HOST = "anonymised.invalid"  # a domain that never receives mail (RFC 2606)
Row = dict[str, Any]


def describe_person(user: User) -> Row:
    """What the account knows of its owner, without what opens it: no password, no key, no secret of an app."""
    return {
        "email": user.email,
        "name": user.name,
        "role": user.role,
        "time_zone": user.time_zone,
        "date_joined": user.date_joined,
        "last_login": user.last_login,
        "email_addresses": list(
            EmailAddress.objects.filter(user=user).order_by("pk").values("email", "verified", "primary")
        ),
        "workspaces": list(Workspace.objects.filter(owner=user).order_by("pk").values("id", "name", "created_at")),
        "teams": list(
            Membership.objects.filter(user=user).order_by("pk").values("workspace__name", "role", "created_at")
        ),
        "two_factor": list(
            Authenticator.objects.filter(user=user).order_by("pk").values("type", "created_at", "last_used_at")
        ),
        "sessions": list(UserSession.objects.filter(user=user).order_by("pk").values("created_at", "ip", "user_agent")),
    }


def list_api_keys(user: User) -> Iterator[Mapping[str, Any]]:
    """The person's keys, without the keys themselves, which nobody can read any more."""
    return (
        ApiKey.objects.filter(user=user)
        .order_by("pk")
        .values("name", "token_start", "scopes", "created_at", "expires_at", "last_used_at", "revoked_at")
        .iterator()
    )


def anonymize_person(user: User) -> None:
    """Take the person out of their user row and close it for ever. In the caller's transaction; twice changes nothing.

    The row itself stays, since ledger rows name it.
    """
    logged = Q(object_repr=user.email)
    for model, keys in ((User, [user.pk]), (Workspace, user.workspaces.values_list("pk", flat=True))):
        logged |= Q(content_type=ContentType.objects.get_for_model(model), object_id__in=[str(key) for key in keys])
    # Django admin's own log repeats what the rows were called that a superadmin edited.
    LogEntry.objects.filter(logged).update(object_repr="Anonymised")
    user.email = f"anonymised-{user.pk}@{ANONYMOUS_HOST}"
    user.name = user.time_zone = ""
    user.is_active = False
    user.last_login = None
    user.anonymised_at = user.anonymised_at or timezone.now()
    user.set_unusable_password()
    user.save()
    Workspace.objects.filter(owner=user).update(name="Anonymised")
    EmailAddress.objects.filter(user=user).delete()
    Authenticator.objects.filter(user=user).delete()
    # Rows of the books may name them: what remains opens nothing and says nothing.
    ApiKey.objects.filter(user=user).update(
        name="", token_start="", token_hash=Concat(Value("anonymised-"), Cast("pk", CharField())), last_used_at=None,
        revoked_at=Coalesce("revoked_at", Now()),
    )  # fmt: skip
    sessions = UserSession.objects.filter(user=user)
    Session.objects.filter(session_key__in=sessions.values("session_key")).delete()
    sessions.delete()
