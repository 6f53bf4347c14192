"""A lock on something that has no row yet."""

from django.db import connection


def lock_until_commit(name: str) -> None:
    """Wait until nobody else holds the lock of this name; hold it until the transaction ends."""
    with connection.cursor() as cursor:
        cursor.execute("SELECT pg_advisory_xact_lock(hashtextextended(%s, 0))", [name])
