"""Which mailboxes had the welcome bonus, so that it comes once for a person, not once for a row.

What is kept is a keyed hash of the mailbox's address. It outlives the account: who is anonymised and signs up again has
had it. Without the key nobody can tell whether an address is among them. The key is random and never changes; it lies
in the database encrypted with SECRET_KEY, so a stolen copy of the database is no list to try addresses on. A SECRET_KEY
that is replaced as docs/SECURITY.md says (`new,old`, then `new`) finds it encrypted with the new one by then.
"""

import hmac
import secrets
from base64 import urlsafe_b64encode
from collections.abc import Iterable
from typing import Any

import structlog
from cryptography.fernet import Fernet
from django.conf import settings
from django.db import connection, models, transaction

from accounts import mailboxes
from billing.models import BonusKey, BonusMark
from kit.locks import lock_until_commit

logger = structlog.get_logger(__name__)


class KeyLost(Exception):
    """None of this installation's secrets opens the key: nobody knows who had the bonus, so nobody is given one."""


def had_bonus(addresses: Iterable[str]) -> bool:
    """Whether the bonus was given to one of the mailboxes before. Raises KeyLost."""
    key = read_key()
    return BonusMark.objects.filter(digest__in=[digest(key, address) for address in addresses]).exists()


def claim(addresses: Iterable[str]) -> bool:
    """Remember the mailboxes, and say whether all of them are new. In the caller's transaction. Raises KeyLost.

    Of several that claim one mailbox at once the unique digest lets one through: the others wait for its commit.
    """
    key = read_key()
    digests = sorted({digest(key, address) for address in addresses})  # one order for all: no deadlock
    with connection.cursor() as cursor:
        cursor.execute(
            "INSERT INTO billing_bonusmark (digest) SELECT unnest(%s::text[]) ON CONFLICT DO NOTHING", [digests]
        )
        return cursor.rowcount == len(digests)


def remember(addresses: Iterable[str]) -> None:
    """Remember further mailboxes of somebody who had the bonus. In the caller's transaction; twice is once."""
    try:
        claim(addresses)
    except KeyLost:
        logger.exception("Mailboxes that had the welcome bonus are not remembered")


# --- The key --------------------------------------------------------------------------------------------------------


def read_key(keys: "models.Manager[Any]" = BonusKey.objects) -> bytes:
    """The key of the digests; made at the first call, and encrypted with each secret that cannot open it yet. Raises
    KeyLost."""
    known = _encrypted_keys(keys)
    if len(known) < len(_secrets()):
        with transaction.atomic():
            lock_until_commit("the welcome bonus's key")
            known = _encrypted_keys(keys)
            key = _decrypted(known)
            if key is None:
                if keys.exists():
                    raise KeyLost(
                        "SECRET_KEY was replaced without the old one beside it. Set SECRET_KEY=new,old and restart; "
                        "docs/SECURITY.md says more."
                    )
                key = secrets.token_bytes(32)
            new = [secret for secret in _secrets() if secret_id(secret) not in known]
            keys.bulk_create(keys.model(secret_id=secret_id(secret), encrypted=encrypt(key, secret)) for secret in new)
            return key
    key = _decrypted(known)
    assert key is not None  # noqa: S101 – for the type checker: it is encrypted with each secret
    return key


def _secrets() -> list[str]:
    return list(dict.fromkeys([settings.SECRET_KEY, *settings.SECRET_KEY_FALLBACKS]))


def _encrypted_keys(keys: "models.Manager[Any]") -> dict[str, str]:
    ids = [secret_id(secret) for secret in _secrets()]
    return dict(keys.filter(secret_id__in=ids).values_list("secret_id", "encrypted"))


def _decrypted(encrypted: dict[str, str]) -> bytes | None:
    for secret in _secrets():
        if found := encrypted.get(secret_id(secret)):
            return _box(secret).decrypt(found)
    return None


def digest(key: bytes, address: str) -> str:
    """What is kept of an address, the same for each spelling of its mailbox: 128 bits of an HMAC, in hex."""
    return hmac.digest(key, mailboxes.canonical(address).encode("utf-8", "replace"), "sha256").hex()[:32]


def secret_id(secret: str) -> str:
    """Tells secrets apart without giving them away."""
    return hmac.digest(secret.encode(), b"postmate: id for the welcome bonus", "sha256").hex()[:16]


def encrypt(key: bytes, secret: str) -> str:
    """The key, to be opened with the secret alone."""
    return _box(secret).encrypt(key).decode()


def _box(secret: str) -> Fernet:
    return Fernet(urlsafe_b64encode(hmac.digest(secret.encode(), b"postmate: key of the welcome bonus", "sha256")))
