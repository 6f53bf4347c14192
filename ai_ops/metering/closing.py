"""How an operation ends: charged or released, its result kept in the same transaction, whatever goes wrong."""

import asyncio
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, TypeAlias

import structlog
from django.db import DatabaseError, connection, transaction

from ai_ops.metering.quotes import Quote
from ai_ops.providers import REFUSED, ProviderError, ProviderMisconfigured
from billing import ledger
from billing.figures import roll_ups
from billing.ledger import Posting, UsageAlreadyClosed
from billing.models import TokenUsage
from billing.notifications import messages
from billing.usage import after_debit
from kit import counters
from kit.database import DATABASE_AWAY, in_thread

logger = structlog.get_logger(__name__)

# How long an operation that has ended waits for a database that is away. Far below what is left of its hold.
CLOSE_PATIENCE_SECONDS = 60
CLOSE_AGAIN_SECONDS = 1
StoppedBy: TypeAlias = Literal["", "reader", "length", "balance", "provider"]
"""What ended a text before the model had finished it: "balance" when no more tokens could be held."""
STOP_NOTES: Mapping[StoppedBy, str] = {
    "reader": "It was stopped before the text was finished.",
    "balance": "The balance ran out before the text was finished.",
    "provider": "The provider broke off before the text was finished.",
}
NOTHING_WRITTEN = "It was stopped before anything was written."
SETTLEMENT_FAILED = "What this used could not be booked. Nothing was charged."
ENDED_TOO_LATE = "Its reservation had expired before it ended. What came is kept, and nothing was charged."
# What has been asked of a provider is read and paid for by us, whoever leaves then (law 9).
LEFT_BEFORE_A_WORD = "It was stopped before anything was written. What the model had read and thought is charged."
LEFT_BEFORE_AN_IMAGE = "It was stopped when the provider had begun to make the images, which is charged."
LEFT_EARLY = (LEFT_BEFORE_A_WORD, LEFT_BEFORE_AN_IMAGE)
ONLY_THOUGHT = "thought until nothing was left to write with"
NOTHING_TO_READ = "answered with nothing to read"
CAME_TO_NOTHING = (ONLY_THOUGHT, NOTHING_TO_READ, REFUSED)  # it was read, and costs us; the user pays nothing


@dataclass(frozen=True, slots=True)
class Finished:
    """The operation ended and was charged. It is the last item of a stream."""

    usage_id: int
    stopped_by: StoppedBy = ""


def ids_of(quote: Quote, usage_id: int) -> dict[str, Any]:
    """What a line of the log about an operation names."""
    operation = quote.operation
    return {
        "usage_id": usage_id,
        "user_id": quote.user_id,
        "operation": operation.operation_type,
        "provider": operation.provider,
        "model": operation.model,
    }


def note_failure(what: str, ids: Mapping[str, Any], failure: Exception) -> None:
    """Log it, and count it for /metrics where it is the provider's. What the operator alone can mend is an error."""
    if isinstance(failure, ProviderMisconfigured):
        logger.error("A provider does not accept our access", **ids, why=failure.why, error=failure.__cause__)
    else:
        logger.warning(what, **ids, error=failure.__cause__ or failure)
    if isinstance(failure, ProviderError):
        counters.count_provider_error(provider=ids["provider"], kind=failure.kind)


def log_end(ids: Mapping[str, Any], posting: Posting, duration_ms: int) -> None:
    """Log what was charged for an operation that has ended well."""
    logger.info(
        "An operation ended",
        **ids,
        account_id=posting.account_id,
        transaction_id=posting.transaction_id,
        billed_tokens=-posting.amount_tokens,
        duration_ms=duration_ms,
    )


def _close_for_sure(close: Callable[[], Posting]) -> Posting:
    """`close`, again and again while the database is away: what the provider made exists nowhere else yet.

    A try whose outcome nobody knows is no harm: the ledger closes a hold once (law 8), and says so to the next try,
    which then keeps nothing.
    """
    deadline = time.monotonic() + CLOSE_PATIENCE_SECONDS
    while True:
        try:
            return close()
        except DATABASE_AWAY as error:
            if time.monotonic() > deadline:
                raise
            logger.warning("An operation waits for the database to be closed", error=error.__cause__ or error)
            connection.close()
            time.sleep(CLOSE_AGAIN_SECONDS)


def close_with(keep: Callable[[], None], settle: Callable[[], Posting]) -> Posting:
    """Keep the result and settle or release, in one transaction. Closed before: the result of that time was kept."""
    with transaction.atomic(durable=True):
        keep()
        posting = settle()
        if posting.is_replay:
            transaction.set_rollback(True)
        after_debit.follow_debit(posting)
    return posting


def close_somehow(log_ids: Mapping[str, Any], *ways: Callable[[], Posting], too_late: Callable[[], Posting]) -> Posting:
    """Close by the first of `ways` that works: no error of ours may leave a hold open, nor lose what was written.

    Each way is a transaction of its own, so one that failed has left nothing. When the hold is closed already, none of
    them can help, and it is `too_late`. Raises what says that the database is away, and what the last way raised.
    """
    try:
        for way in ways[:-1]:
            try:
                return way()
            except (*DATABASE_AWAY, UsageAlreadyClosed):
                raise
            except Exception:
                logger.exception("An operation could not be closed as it should be", **log_ids)
        return ways[-1]()
    except UsageAlreadyClosed:
        logger.warning("An operation ended when its hold had expired", **log_ids)
        return too_late()


def keep_too_late(usage_id: int, keep: Callable[[], None], **used: Any) -> Posting:
    """Keep what came after the hold had expired, and what it cost us, once; charge nothing.

    What is charged is at most what is held (law 5), and nothing is held any more: the tokens may be spent. `used` are
    fields of the usage row. Raises UsageAlreadyClosed when it was closed otherwise.
    """
    with transaction.atomic(durable=True):
        usage = TokenUsage.objects.select_for_update(of=("self",)).select_related("account").get(pk=usage_id)
        if usage.status != TokenUsage.Status.EXPIRED:
            raise UsageAlreadyClosed(f"This operation was already closed as {usage.get_status_display().lower()}.")
        if usage.error_message != ENDED_TOO_LATE:  # else this is done, and only its answer was lost
            keep()
            roll_ups.amend(usage_id, error_message=ENDED_TOO_LATE, **used)
    return ledger.outcome_of(usage.account, None, usage_id, is_replay=False)


def release_unsettled(usage_id: int, failure: Exception | None, duration_ms: int) -> Posting:
    """The last way out, when nothing else could be booked: nothing is charged."""
    words = SETTLEMENT_FAILED if failure is None else failure_words(failure)
    return ledger.release_usage(usage_id=usage_id, error_message=words, duration_ms=duration_ms)


async def tell_failure(failure: Exception, log_ids: Mapping[str, Any]) -> None:
    """Note it; and tell all admins what they alone can mend."""
    note_failure("An operation failed", log_ids, failure)
    if not isinstance(failure, ProviderMisconfigured):
        return
    try:
        await in_thread(messages.provider_refuses_us)(provider=failure.name, model=log_ids["model"], why=failure.why)
    except DatabaseError:  # the operation is closed; its answer must not depend on a message
        logger.exception("Admins could not be told of a provider", **log_ids)


def failure_words(failure: Exception) -> str:
    """What the operation's row and its user read of a failure."""
    return failure.message if isinstance(failure, ProviderError) else "The operation failed."


async def abandon(*, usage_id: int, keep_nothing: Callable[[], None]) -> None:
    """The reader left before the provider was asked: close the result and give the hold back, in one transaction."""
    release = partial(ledger.release_usage, usage_id=usage_id, error_message=NOTHING_WRITTEN, provider_cost_microusd=0)
    await close_shielded(partial(close_with, keep_nothing, release))


async def close_shielded(close: Callable[[], Posting]) -> None:
    """`close` for sure, also when the reader has gone: a second cancellation cannot leave the hold open."""
    await asyncio.shield(asyncio.ensure_future(in_thread(_close_for_sure)(close)))
