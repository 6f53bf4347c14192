"""Personal API keys: made and revoked by their owner, presented by a program."""

import secrets
from collections.abc import Sequence
from datetime import datetime, timedelta
from hashlib import sha256

from django.db import transaction
from django.db.models import Q, QuerySet
from django.db.models.functions import Now
from django.utils import timezone

from accounts.models import ApiKey, User

TOKEN_PREFIX = "pm_"  # noqa: S105 - so that a key in a log or a repository is recognised
TOKEN_BYTES = 32  # of randomness: nobody guesses it, hence a plain hash will do
SHOWN_START = len(TOKEN_PREFIX) + 6
MAX_LIVE_KEYS = 20
LAST_USED_STEP = timedelta(minutes=1)


class TooManyKeys(Exception):
    """The person has as many live keys as there may be; nothing was made."""

    message = f"You have {MAX_LIVE_KEYS} keys, the most there may be. Revoke one that is no longer used."

    def __init__(self) -> None:
        super().__init__(self.message)


def make_key(
    *, user_id: int, name: str, scopes: Sequence[str], expires_at: datetime | None = None
) -> tuple[ApiKey, str]:
    """Make a key and return it with its token, which is kept nowhere. Raises TooManyKeys."""
    token = TOKEN_PREFIX + secrets.token_urlsafe(TOKEN_BYTES)
    with transaction.atomic():
        User.objects.select_for_update().get(pk=user_id)  # two requests at once must not both be the last one
        if _live_keys().filter(user_id=user_id).count() >= MAX_LIVE_KEYS:
            raise TooManyKeys
        key = ApiKey.objects.create(
            user_id=user_id,
            name=name,
            scopes=list(scopes),
            token_start=token[:SHOWN_START],
            token_hash=_hash(token),
            expires_at=expires_at,
        )
    return key, token


def list_keys(*, user_id: int) -> list[ApiKey]:
    """All of the person's keys, newest first: live, expired and revoked ones."""
    return list(ApiKey.objects.filter(user_id=user_id).order_by("-pk"))


def revoke_key(key: ApiKey) -> None:
    """Close the key for ever. Twice changes nothing."""
    ApiKey.objects.filter(pk=key.pk, revoked_at=None).update(revoked_at=Now())


def revoke_all(*, user_id: int) -> int:
    """Close all keys of the person for ever. Returns how many were open."""
    return ApiKey.objects.filter(user_id=user_id, revoked_at=None).update(revoked_at=Now())


def find_live_key(token: str) -> ApiKey | None:
    """The key, with its user, that `token` opens; None when it is unknown, revoked or expired, or its user is gone.

    It is looked up by its hash, so the time taken tells nothing about how much of a wrong token was right.
    """
    if not token.startswith(TOKEN_PREFIX) or not token.isascii():
        return None
    return _live_keys().select_related("user").filter(token_hash=_hash(token), user__is_active=True).first()


def note_use(key: ApiKey) -> None:
    """Remember that the key was used just now. At most one write a minute, so that reads stay reads."""
    if key.last_used_at is None or timezone.now() - key.last_used_at >= LAST_USED_STEP:
        ApiKey.objects.filter(pk=key.pk, last_used_at=key.last_used_at).update(last_used_at=Now())


def _live_keys() -> QuerySet[ApiKey]:
    return ApiKey.objects.filter(Q(expires_at=None) | Q(expires_at__gt=Now()), revoked_at=None)


def _hash(token: str) -> str:
    return sha256(token.encode()).hexdigest()
