"""The ORM from async code, and several queries that look at one moment."""

from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import ParamSpec, TypeVar

from asgiref.sync import sync_to_async
from django.db import close_old_connections, connection, transaction

Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")


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
