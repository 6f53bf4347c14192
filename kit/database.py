"""The ORM from async code, several queries that look at one moment, the database's clock, and what to repeat."""

from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from datetime import datetime
from functools import wraps
from typing import ParamSpec, TypeVar

import structlog
from asgiref.sync import sync_to_async
from django.db import InterfaceError, OperationalError, close_old_connections, connection, transaction
from psycopg.errors import DeadlockDetected, SerializationFailure

logger = structlog.get_logger(__name__)

Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")

# What Django raises when the database is away, or went away in the middle. Then nobody knows whether what was under
# way was committed.
DATABASE_AWAY = (OperationalError, InterfaceError)

CONFLICT_TRIES = 4


def in_thread(function: Callable[Parameters, Result]) -> Callable[Parameters, Awaitable[Result]]:
    """`function`, to be awaited: it runs in a worker thread and gives its connection back to the pool at its end.

    A stream lives for minutes; holding a connection all that time would let a few readers use up the pool.
    """

    @wraps(function)
    def call(*args: Parameters.args, **kwargs: Parameters.kwargs) -> Result:
        try:
            return function(*args, **kwargs)
        finally:
            close_old_connections()

    return sync_to_async(call, thread_sensitive=False)


@contextmanager
def one_snapshot() -> Iterator[None]:
    """All queries inside see the database as it is at the first of them. Nothing can be written.

    Inside a transaction it changes nothing: the caller sees what they wrote.
    """
    if connection.in_atomic_block:
        yield
        return
    with transaction.atomic():
        with connection.cursor() as cursor:
            cursor.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ, READ ONLY")
        yield


def now() -> datetime:
    """The database's clock, which all processes share; it decides what is too old, wherever money hangs on it."""
    with connection.cursor() as cursor:
        cursor.execute("SELECT clock_timestamp()")
        (moment,) = cursor.fetchone()
    return moment


def repeated_after_conflicts(function: Callable[Parameters, Result]) -> Callable[Parameters, Result]:
    """`function` from its beginning again when PostgreSQL ended its transaction for a deadlock or as not serializable.

    For functions that do nothing outside of one transaction of their own: it was rolled back, so nothing happens
    twice. Inside a caller's transaction the error goes on to the caller, whose transaction it ended, too. After
    `CONFLICT_TRIES` in all it is raised.
    """

    @wraps(function)
    def repeated(*args: Parameters.args, **kwargs: Parameters.kwargs) -> Result:
        for tries_left in reversed(range(CONFLICT_TRIES)):
            try:
                return function(*args, **kwargs)
            except OperationalError as error:
                is_conflict = isinstance(error.__cause__, DeadlockDetected | SerializationFailure)
                if not is_conflict or connection.in_atomic_block or not tries_left:
                    raise
                logger.warning("A transaction is tried again", function=function.__qualname__, error=error.__cause__)
        raise AssertionError

    return repeated
