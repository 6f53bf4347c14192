"""Django's PostgreSQL backend, with a pool that outlives a restart of the server.

Django's own check asks the pool's idle connections one after another, with pauses that double: after a restart, a
process that has many of them would answer with errors for seconds. Here a dead connection is known by what the server
has left on its socket, which costs no round trip, and all idle ones of its time go with it.
"""

import select
from typing import Any

import psycopg
from django.db.backends.postgresql import base


class DatabaseWrapper(base.DatabaseWrapper):
    def get_new_connection(self, conn_params: dict[str, Any]) -> Any:
        connection = super().get_new_connection(conn_params)
        if self.pool is None or not _was_ended(connection):
            return connection
        self.pool.drain()
        self.pool.putconn(connection)
        return super().get_new_connection(conn_params)


def _was_ended(connection: psycopg.Connection[Any]) -> bool:
    # Nobody writes to an idle connection but a server that says good-bye, or a system that says it is gone.
    poll = select.poll()
    poll.register(connection.fileno(), select.POLLIN | select.POLLHUP)
    return bool(poll.poll(0))
