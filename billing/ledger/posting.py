"""Runs a statement of the ledger: its outcome, what refused it, and what a key already has when it is repeated."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import psycopg
from django.db import IntegrityError, connection, transaction
from psycopg.rows import namedtuple_row

from billing import announcements
from billing.ledger import statements
from billing.ledger.types import AccountNotActive, AccountNotFound, ActorRequired, InsufficientTokens, Posting
from billing.models import TokenAccount
from kit.database import DATABASE_AWAY, repeated_after_conflicts


@repeated_after_conflicts
def execute(statement: statements.Form, parameters: Mapping[str, Any]) -> Any:
    """Run one statement, bound on the server (so that PostgreSQL prepares it), and return its only row or None.

    Inside the caller's transaction it gets a savepoint: a refused key must not cost the caller their work.
    """
    if connection.in_atomic_block:
        with transaction.atomic():
            return execute_bare(statement, parameters)
    return execute_bare(statement, parameters)


def execute_bare(statement: statements.Form, parameters: Mapping[str, Any]) -> Any:
    connection.ensure_connection()
    with (
        connection.wrap_database_errors,
        psycopg.RawCursor(connection.connection, row_factory=namedtuple_row) as cursor,
    ):
        return cursor.execute(statement.sql, [parameters[name] for name in statement.names]).fetchone()


def post(statement: statements.Statement, parameters: Mapping[str, Any], *, needed_tokens: int = 0) -> Posting:
    """Run the statement; raise what refused it, or say after the commit that the balance changed."""
    row = statement.without_lots and execute(statement.without_lots, parameters)
    row = row or execute(statement.with_lots, parameters)
    if row is None:
        raise AccountNotFound("There is no such token account.")
    if row.new_balance is None:
        if statement.needs_actor and (row.user_id is None) == (parameters["actor_id"] in (None, row.user_id)):
            raise ActorRequired(is_team=row.user_id is None)
        if row.status != TokenAccount.Status.ACTIVE:
            raise AccountNotActive(status=row.status, reason=row.status_reason)
        raise InsufficientTokens(needed_tokens=needed_tokens, available_tokens=row.available)
    transaction.on_commit(partial(announcements.announce_balance_change, row.account_id))
    return Posting(
        account_id=row.account_id,
        user_id=row.user_id,
        amount_tokens=row.amount,
        balance_tokens=row.new_balance,
        reserved_tokens=row.new_reserved,
        available_tokens=row.new_available,
        status=row.new_status,
        expired_tokens=row.expired_tokens,
        usage_id=row.usage_id,
        transaction_id=row.transaction_id,
        needs_recharge=row.needs_recharge,
    )


def post_once(
    statement: statements.Statement,
    parameters: Mapping[str, Any],
    replay: Callable[[], Posting | None],
    *,
    needed_tokens: int = 0,
) -> Posting:
    """Post; when a unique key refuses it, `replay` the outcome which that key already has (law 8).

    A retry may also be refused for what its first time did: it spent the balance, or left a debt. And when the
    connection was lost, only what stands under the key says whether it was committed. Nothing there: the error goes
    on, and the caller may repeat it with the same key, also while the lost statement still waits for a lock.
    """
    try:
        return post(statement, parameters, needed_tokens=needed_tokens)
    except (IntegrityError, InsufficientTokens, AccountNotActive, *DATABASE_AWAY) as error:
        leave_lost_connection(error)
        outcome = replay()
        if outcome is None:
            raise
        return outcome


def leave_lost_connection(error: Exception) -> None:
    """After an error that says the connection was lost, have the next query open another one. Inside a transaction
    the error goes on: all of that is lost or committed, and its caller knows what to ask for."""
    if isinstance(error, DATABASE_AWAY):
        if connection.in_atomic_block:
            raise error
        connection.close()
