"""Quote → reserve → run → settle or release: the one way an AI operation is paid for.

The hold is committed before the provider is called, no transaction is open while it answers, and the result is kept in
the same transaction that charges for it. Killed anywhere in between, the hold expires and nothing is charged; what the
provider has read by then was noted with the hold, so that what it cost us is not lost.
"""

import asyncio
import time
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from decimal import Decimal
from functools import partial
from typing import Any, Literal, TypeAlias

import structlog
from django.conf import settings
from django.db import DatabaseError, connection, transaction

from ai_ops import counting, providers
from ai_ops.prompts import Prompt
from ai_ops.providers import (
    REFUSED,
    FinishReason,
    Images,
    ProviderError,
    ProviderMisconfigured,
    ProviderRefused,
    ProviderTimedOut,
    TextDelta,
    TextEnd,
)
from ai_ops.providers.counts import Counted, Said, count_call
from billing import catalogue, ledger, pricing, usage
from billing.catalogue import CatalogueError
from billing.figures import roll_ups
from billing.ledger import AccountNotActive, InsufficientTokens, Operation, Posting, UsageAlreadyClosed, statements
from billing.models import ModelPrice, TokenAccount, TokenUsage
from billing.notifications import messages
from billing.pricing import TokenPools
from billing.usage import after_debit
from kit import counters
from kit.database import DATABASE_AWAY, in_thread
from kit.text import storable

logger = structlog.get_logger(__name__)

# A quote is a ceiling, and our count is not quite the provider's. The benchmark of the tokens holds it to both.
QUOTE_MARGIN = Decimal("1.14")
MESSAGE_OVERHEAD_TOKENS = 16  # of what stands around each message, and around the system prompt
MIN_OUTPUT_TOKENS = 100  # less is no text: refuse rather than write half a sentence

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
class Ask:
    """An operation before it is paid for: what the model is asked, and what the usage row says of it."""

    operation_type: str
    provider: str
    model: str
    prompt: Prompt
    wanted_output_tokens: int = 0  # text, without what the model thinks
    least_output_tokens: int = 0  # text: less of it is of no use, as of a revision that is cut short
    image_count: int = 0  # images
    image_size: str = ""
    image_quality: str = ""
    project_id: int | None = None
    content_id: int | None = None
    chat_id: int | None = None
    metadata: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Quote:
    """The most an operation can cost, and what is held for it at first.

    The hold is smaller than the quote when the balance is small (`is_reduced`): then less text is asked for, and when
    that is written and more has become available, the hold is extended, up to the quote.
    """

    user_id: int
    ask: Ask
    price: ModelPrice
    multiplier: Decimal | None  # text; None for images
    fixed_cost_tokens: int | None  # images, for each; None for text
    is_free: bool  # billing is switched off
    read_tokens: int  # what is asked, by our bare count
    input_tokens: int  # the same as a ceiling; 0 for images, which are priced by the image
    thinking_tokens: int  # room for it, on top of the text
    wanted_output_tokens: int  # the text and the room for thinking
    output_limit_tokens: int  # what is affordable of it now
    max_billable_tokens: int
    held_tokens: int
    available_tokens: int

    @property
    def is_reduced(self) -> bool:
        return self.held_tokens < self.max_billable_tokens

    @property
    def unit(self) -> str:
        """What `unit_price` is the price of: a token of the model, or an image of its size and quality."""
        return " ".join((self.ask.provider, self.ask.model, self.ask.image_size, self.ask.image_quality)).rstrip()

    @property
    def unit_price(self) -> Decimal:
        """In tokens."""
        return Decimal(0) if self.is_free else self.multiplier or Decimal(self.fixed_cost_tokens or 0)

    @property
    def text_tokens(self) -> int:
        """The most that is written, thinking apart."""
        return self.wanted_output_tokens - self.thinking_tokens


@dataclass(frozen=True, slots=True)
class Finished:
    """The operation ended and was charged. It is the last item of a stream."""

    usage_id: int
    stopped_by: StoppedBy = ""


class TooLongForModel(CatalogueError):
    """The model could not do it, whatever is paid: it reads or writes less at once than this takes."""


class OnlyThought(ProviderError):
    """The model used up all that it may write by thinking, before the first word."""

    template = (
        f"{{name}} {ONLY_THOUGHT}. You were not charged. Please try again with a shorter or simpler text, or choose "
        "another model."
    )


class NothingToRead(ProviderError):
    """The model ended its answer before the first word, or wrote no character that can be seen."""

    template = f"{{name}} {NOTHING_TO_READ}. You were not charged. Please change the text, or choose another model."


class BalanceTooSmallToThink(OnlyThought):
    """The same, where the balance had set the limit."""

    http_status = 402
    template = (
        f"Your balance is too small for this model: it {ONLY_THOUGHT}. You were not charged. "
        "Buy tokens, or choose another model."
    )


KeepText = Callable[[str, bool], None]
"""Keeps the text of an operation; told whether it is complete. Runs in the transaction that closes the hold."""

KeepImages = Callable[[Images | None], None]
"""Keeps the images of an operation, None when there are none. Runs in the transaction that closes the hold."""


# --- Quotes -----------------------------------------------------------------------------------------------------------


def quote_text(*, user_id: int, ask: Ask) -> Quote:
    """What the text costs at most, and how much of it the user can afford now.

    Reserves nothing. Raises CatalogueError for a model that cannot be used, or not for so long a text
    (TooLongForModel), AccountNotActive, and InsufficientTokens when not even the least that is of use is affordable.
    """
    priced, account = _price(user_id, ask)
    price, operation = priced.price, priced.operation
    ask = replace(ask, model=price.model)  # it may have been asked for by another name
    read_tokens = _count_tokens(ask, ask.prompt.text)
    _require_fit(price, ask, read_tokens)
    multiplier = operation.multiplier or Decimal(1)
    input_tokens = _quoted_input_tokens(ask.prompt, read_tokens)
    text_tokens = min(ask.wanted_output_tokens, price.max_output_tokens)
    wanted_tokens = min(text_tokens + price.thinking_tokens, price.max_output_tokens)
    most = pricing.calculate_llm_billable_tokens(input_tokens, wanted_tokens, multiplier)
    output_limit_tokens, held_tokens = wanted_tokens, most.billable_tokens
    if operation.is_free:
        held_tokens = 0
    elif most.billable_tokens > account.available:
        output_limit_tokens = pricing.affordable_output_tokens(
            available_tokens=account.available, input_tokens=input_tokens, multiplier=multiplier
        )
        least_tokens = min(_least_output_tokens(price, ask), wanted_tokens)
        if output_limit_tokens < least_tokens:
            least = pricing.calculate_llm_billable_tokens(input_tokens, least_tokens, multiplier)
            raise InsufficientTokens(needed_tokens=least.billable_tokens, available_tokens=account.available)
        held_tokens = pricing.calculate_llm_billable_tokens(
            input_tokens, output_limit_tokens, multiplier
        ).billable_tokens
    return Quote(
        user_id=user_id,
        ask=ask,
        price=price,
        multiplier=multiplier,
        fixed_cost_tokens=None,
        is_free=operation.is_free,
        read_tokens=read_tokens,
        input_tokens=input_tokens,
        thinking_tokens=wanted_tokens - text_tokens,
        wanted_output_tokens=wanted_tokens,
        output_limit_tokens=output_limit_tokens,
        max_billable_tokens=0 if operation.is_free else most.billable_tokens,
        held_tokens=held_tokens,
        available_tokens=account.available,
    )


def quote_images(*, user_id: int, ask: Ask) -> Quote:
    """What the images cost. Reserves nothing. Raises CatalogueError, InvalidUsage, AccountNotActive,
    InsufficientTokens."""
    priced, account = _price(user_id, ask)
    operation = priced.operation
    ask = replace(ask, model=priced.price.model)
    tokens = operation.billable_tokens(TokenPools())
    if tokens > account.available and not operation.is_free:
        raise InsufficientTokens(needed_tokens=tokens, available_tokens=account.available)
    return Quote(
        user_id=user_id,
        ask=ask,
        price=priced.price,
        multiplier=None,
        fixed_cost_tokens=operation.fixed_cost_tokens,
        is_free=operation.is_free,
        read_tokens=_count_tokens(ask, ask.prompt.text),
        input_tokens=0,
        thinking_tokens=0,
        wanted_output_tokens=0,
        output_limit_tokens=0,
        max_billable_tokens=tokens,
        held_tokens=tokens,
        available_tokens=account.available,
    )


def _price(user_id: int, ask: Ask) -> tuple[usage.PricedOperation, TokenAccount]:
    priced = usage.price_operation(
        operation_type=ask.operation_type,
        provider=ask.provider,
        model=ask.model,
        image_count=ask.image_count,
        image_size=ask.image_size,
        image_quality=ask.image_quality,
    )
    account = ledger.get_account(user_id=user_id)
    if not account.may_operate(is_free=priced.operation.is_free):
        raise AccountNotActive(status=account.status, reason=account.status_reason)
    return priced, account


def _least_output_tokens(price: ModelPrice, ask: Ask) -> int:
    """With less it would most likely think and not write, or write what is of no use. Models seldom use their room for
    thinking: to ask for all of it would keep small balances from texts that they can pay."""
    return max(MIN_OUTPUT_TOKENS, ask.least_output_tokens) + price.thinking_tokens // 4


def _require_fit(price: ModelPrice, ask: Ask, read_tokens: int) -> None:
    """Refuse before anything is held what the model cannot do, with its limit and what helps."""
    written_tokens = _least_output_tokens(price, ask)
    if read_tokens > price.max_input_tokens:
        raise TooLongForModel(
            f"{price.display_name} reads at most {price.max_input_tokens:,} tokens at once, and this has about "
            f"{read_tokens:,}. Shorten the text, take a part of it, or choose another model."
        )
    if ask.least_output_tokens and written_tokens > price.max_output_tokens:
        raise TooLongForModel(
            f"{price.display_name} writes at most {price.max_output_tokens:,} tokens at once, and this needs about "
            f"{written_tokens:,}. Work on one passage after the other, or choose another model."
        )


def _quoted_input_tokens(prompt: Prompt, counted_tokens: int) -> int:
    around_tokens = (len(prompt.messages) + bool(prompt.system)) * MESSAGE_OVERHEAD_TOKENS
    return pricing.ceil_multiply(counted_tokens, QUOTE_MARGIN) + around_tokens


def _count_tokens(ask: Ask, text: str) -> int:
    return counting.count_tokens(text, provider=ask.provider, model=ask.model)


def reserve_quote(quote: Quote, *, idempotency_key: str, request: Mapping[str, Any]) -> Posting:
    """Hold what the quote says, and note what the provider will have read. Raises what `ledger.reserve_tokens` raises.

    The provider is asked right after the commit. Noting it here costs no statement of its own.
    """
    ask = quote.ask
    read_pools = TokenPools(input_tokens=quote.read_tokens)
    return ledger.reserve_tokens(
        user_id=quote.user_id,
        tokens=quote.held_tokens,
        operation=Operation(
            operation_type=ask.operation_type,
            provider=ask.provider,
            model=ask.model,
            multiplier=quote.multiplier,
            fixed_cost_tokens=quote.fixed_cost_tokens,
            image_count=ask.image_count,
            image_size=ask.image_size,
            image_quality=ask.image_quality,
            project_id=ask.project_id,
            content_id=ask.content_id,
            chat_id=ask.chat_id,
            metadata={**ask.metadata, "quoted_tokens": quote.max_billable_tokens},
            is_free=quote.is_free,
        ),
        idempotency_key=idempotency_key,
        lifetime_seconds=settings.RESERVATION_SECONDS,
        request=request,
        read_pools=read_pools,
        provider_cost_microusd=_begun_cost_microusd(quote, read_pools),
    )


def _begun_cost_microusd(quote: Quote, read_pools: TokenPools) -> int:
    """What it costs us as soon as the provider has begun: a text, what it reads; images, all of them."""
    if quote.fixed_cost_tokens is None:
        return catalogue.provider_cost_microusd(quote.price, read_pools)
    return _images_cost_microusd(quote, TokenPools(), quote.ask.image_count)


def _log_ids(quote: Quote, usage_id: int) -> dict[str, Any]:
    ask = quote.ask
    return {
        "usage_id": usage_id,
        "user_id": quote.user_id,
        "operation": ask.operation_type,
        "provider": ask.provider,
        "model": ask.model,
    }


def _note_failure(what: str, ids: Mapping[str, Any], failure: Exception) -> None:
    """Log it, and count it for /metrics where it is the provider's. What the operator alone can mend is an error."""
    if isinstance(failure, ProviderMisconfigured):
        logger.error("A provider does not accept our access", **ids, why=failure.why, error=failure.__cause__)
    else:
        logger.warning(what, **ids, error=failure.__cause__ or failure)
    if isinstance(failure, ProviderError):
        counters.count_provider_error(provider=ids["provider"], kind=failure.kind)


def _log_end(ids: Mapping[str, Any], posting: Posting, duration_ms: int) -> None:
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


def _take_back_if_closed_before(posting: Posting) -> None:
    """The result of that time was kept with it."""
    if posting.is_replay:
        transaction.set_rollback(True)


def _close_somehow(
    log_ids: Mapping[str, Any], *ways: Callable[[], Posting], too_late: Callable[[], Posting]
) -> Posting:
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


def _keep_too_late(usage_id: int, keep: Callable[[], None], **used: Any) -> Posting:
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


def _release_unsettled(usage_id: int, failure: Exception | None, duration_ms: int) -> Posting:
    words = SETTLEMENT_FAILED if failure is None else _failure_words(failure)
    return ledger.release_usage(usage_id=usage_id, error_message=words, duration_ms=duration_ms)


async def _tell_failure(failure: Exception, log_ids: Mapping[str, Any]) -> None:
    """Note it; and tell all admins what they alone can mend."""
    _note_failure("An operation failed", log_ids, failure)
    if not isinstance(failure, ProviderMisconfigured):
        return
    try:
        await in_thread(messages.provider_refuses_us)(provider=failure.name, model=log_ids["model"], why=failure.why)
    except DatabaseError:  # the operation is closed; its answer must not depend on a message
        logger.exception("Admins could not be told of a provider", **log_ids)


def _failure_words(failure: Exception) -> str:
    return failure.message if isinstance(failure, ProviderError) else "The operation failed."


async def abandon(*, usage_id: int, keep_nothing: Callable[[], None]) -> None:
    """The reader left before the provider was asked: close the result and give the hold back, in one transaction."""

    def close() -> Posting:
        with transaction.atomic(durable=True):
            keep_nothing()
            posting = ledger.release_usage(usage_id=usage_id, error_message=NOTHING_WRITTEN, provider_cost_microusd=0)
            _take_back_if_closed_before(posting)
        return posting

    await asyncio.shield(asyncio.ensure_future(in_thread(_close_for_sure)(close)))


# --- Text -------------------------------------------------------------------------------------------------------------

# Where a text ends that the provider did not end as finished.
_STOPPED_BY: Mapping[FinishReason, StoppedBy] = {
    "stop": "",
    "length": "length",
    "refused": "provider",
    "other": "provider",
}


@dataclass(slots=True)
class _TextRun:
    """What a text operation has asked, read and held so far. One call of the provider, or several when extended."""

    quote: Quote
    usage_id: int
    prompt: Prompt  # of the call under way
    held_tokens: int
    output_limit_tokens: int  # of the call under way
    started_at: float = field(default_factory=time.monotonic)
    written: list[str] = field(default_factory=list)
    call_begins_at: int = 0  # in `written`
    said: Said | None = None  # by the provider, of the call under way
    output_counted_to: int = 0  # in `written`: how far it had come when the provider last counted its output
    thought: list[str] = field(default_factory=list)  # by the call under way, as far as the provider tells
    thought_counted_to: int = 0  # in `thought`, likewise
    is_asked: bool = False  # the request has gone to the provider
    is_call_under_way: bool = True
    ended_calls: list[TokenPools] = field(default_factory=list)
    is_estimated: bool = False
    stopped_by: StoppedBy = "reader"  # until it is known better
    failure: Exception | None = None

    @property
    def text(self) -> str:
        return self._text_from(0)

    def _text_from(self, start: int) -> str:
        return storable("".join(self.written[start:]))  # a text that cannot be kept would keep the hold open

    @property
    def counted(self) -> TokenPools:
        """By the calls that ended."""
        return sum(self.ended_calls, TokenPools())

    @property
    def calls(self) -> list[TokenPools]:
        """What each call has used: by the provider's count as far as it went, and by ours for the rest."""
        under_way = [self._count_call(has_ended=False).pools] if self.is_call_under_way else []
        return [*self.ended_calls, *under_way]

    @property
    def log_ids(self) -> dict[str, Any]:
        return _log_ids(self.quote, self.usage_id)

    @property
    def duration_ms(self) -> int:
        return int((time.monotonic() - self.started_at) * 1_000)

    def hear(self, delta: TextDelta) -> None:
        """Note the text and what the provider counted with it, before anybody else may stop us."""
        if delta.text:
            self.written.append(delta.text)
        if delta.thought:
            self.thought.append(delta.thought)
        if delta.said:
            self.said = self.said.updated(delta.said) if self.said else delta.said
            if delta.said.has_output:
                self.output_counted_to = len(self.written)
                self.thought_counted_to = len(self.thought)

    def end_call(self, end: TextEnd) -> None:
        """Note what the whole call used. An answer with nothing to read counts as empty and fails the operation."""
        call = self._count_call(has_ended=True)
        self.ended_calls.append(call.pools)
        self.is_estimated |= call.is_estimated
        self.is_call_under_way = False
        self.stopped_by = _STOPPED_BY[end.finish_reason]
        if not any(character.isprintable() and not character.isspace() for character in self.text):
            self.written.clear()
            self.fail(self._why_nothing(end)(self.quote.price.get_provider_display()))

    def _why_nothing(self, end: TextEnd) -> type[ProviderError]:
        if end.finish_reason == "length":
            return BalanceTooSmallToThink if self.quote.is_reduced else OnlyThought
        return ProviderRefused if end.finish_reason == "refused" else NothingToRead

    def begin_call(self, call: "_NextCall") -> None:
        self.prompt, self.output_limit_tokens, self.held_tokens = (
            call.prompt,
            call.output_limit_tokens,
            call.held_tokens,
        )
        self.call_begins_at = self.output_counted_to = len(self.written)
        self.said = None
        self.thought = []
        self.thought_counted_to = 0
        self.is_call_under_way = True
        self.stopped_by = "reader"

    def _count_call(self, *, has_ended: bool) -> Counted:
        return count_call(
            self.said,
            prompt_tokens=_count_tokens(self.quote.ask, self.prompt.text),
            text_tokens=_count_tokens(self.quote.ask, self._text_from(self.call_begins_at)),
            later_text_tokens=_count_tokens(self.quote.ask, self._text_from(self.output_counted_to)),
            # A count at the end is of the thoughts, too.
            thought_tokens=0
            if has_ended and self.thought_counted_to == len(self.thought)
            else _count_tokens(self.quote.ask, storable("".join(self.thought))),
            # The catalogue may be behind by some, but not by so much.
            most_tokens=2 * (self.quote.price.max_input_tokens + self.quote.price.max_output_tokens),
        )

    def fail(self, error: Exception) -> None:
        """A first call that fails fails the operation (law 9); a later one only ends it."""
        if self.call_begins_at == 0:
            self.failure = error
            return
        _note_failure("An operation could not go on", self.log_ids, error)
        self.is_call_under_way = False
        self.stopped_by = "provider"

    def close(self, keep: KeepText) -> Posting:
        """Keep the text and charge for it, or give the hold back, in one transaction."""
        text = self.text
        posting = _close_somehow(
            self.log_ids,
            partial(self._close, keep, text, partial(self._settle_or_release, text)),
            partial(self._close, keep, text, partial(self._settle_by_our_count, text)),
            partial(self._close, keep, text, self._release_unsettled),
            self._release_unsettled,
            too_late=partial(self._keep_too_late, keep, text),
        )
        if self.failure is None:
            _log_end(self.log_ids, posting, self.duration_ms)
        return posting

    def _close(self, keep: KeepText, text: str, settle: Callable[[], Posting]) -> Posting:
        with transaction.atomic(durable=True):
            keep(text, self._is_complete)
            posting = settle()
            _take_back_if_closed_before(posting)
            after_debit.follow_debit(posting)
        return posting

    @property
    def _is_complete(self) -> bool:
        return self.stopped_by == "" and self.failure is None

    def _has_left(self, text: str) -> bool:
        """The reader has, before a word."""
        return self.failure is None and not text and self.is_asked

    def _paid_calls(self, text: str) -> list[TokenPools]:
        """What each call used that we have to pay for, whether or not the user does."""
        was_slow = isinstance(self.failure, ProviderTimedOut)  # to answer, not to read
        has_read = self.said or text or self.thought or not self.is_call_under_way or self._has_left(text) or was_slow
        return self.calls if has_read else []

    def _keep_too_late(self, keep: KeepText, text: str) -> Posting:
        calls = self._paid_calls(text)
        pools = sum(calls, TokenPools())
        return _keep_too_late(
            self.usage_id,
            partial(keep, text, self._is_complete),
            **{name: getattr(pools, name) for name in statements.COUNTS},
            provider_cost_microusd=catalogue.provider_cost_microusd(self.quote.price, *calls),
            is_estimated=self.is_estimated or self.is_call_under_way,
            duration_ms=self.duration_ms,
        )

    def _settle_or_release(self, text: str) -> Posting:
        # What failed we may have to pay for all the same; the user does not (law 9). Who leaves does: it has been read.
        has_left, calls = self._has_left(text), self._paid_calls(text)
        provider_cost_microusd = catalogue.provider_cost_microusd(self.quote.price, *calls)
        if self.failure is not None or not (text or has_left):
            return ledger.release_usage(
                usage_id=self.usage_id,
                error_message=NOTHING_WRITTEN if self.failure is None else _failure_words(self.failure),
                provider_cost_microusd=provider_cost_microusd,
                duration_ms=self.duration_ms,
            )
        return ledger.settle_usage(
            usage_id=self.usage_id,
            pools=sum(calls, TokenPools()),
            is_estimated=self.is_estimated or self.is_call_under_way,
            provider_cost_microusd=provider_cost_microusd,
            duration_ms=self.duration_ms,
            error_message=STOP_NOTES.get(self.stopped_by, "") if text else LEFT_BEFORE_A_WORD,
        )

    def _settle_by_our_count(self, text: str) -> Posting:
        if self.failure is not None or not text:
            return self._release_unsettled()
        return ledger.settle_usage(
            usage_id=self.usage_id,
            pools=TokenPools(
                input_tokens=_count_tokens(self.quote.ask, self.quote.ask.prompt.text),
                output_tokens=_count_tokens(self.quote.ask, text),
            ),
            is_estimated=True,
            duration_ms=self.duration_ms,
            error_message=STOP_NOTES.get(self.stopped_by, ""),
        )

    def _release_unsettled(self) -> Posting:
        return _release_unsettled(self.usage_id, self.failure, self.duration_ms)


@dataclass(frozen=True, slots=True)
class _NextCall:
    prompt: Prompt
    output_limit_tokens: int
    held_tokens: int


def _hold_more(run: _TextRun) -> _NextCall | StoppedBy:
    """After the provider stopped at a limit that the balance had set: hold more and ask for the rest, if there is any.

    Law 5: never more than the quote. Law 1: the ledger alone decides whether there is more. Killed right after it, the
    larger hold expires as the smaller one would have. Changes nothing of the run, which may be closed meanwhile.
    """
    quote, multiplier = run.quote, run.quote.multiplier or Decimal(1)
    wanted_tokens = quote.wanted_output_tokens - run.counted.output_tokens
    wrote_something = len(run.written) > run.call_begins_at
    if run.stopped_by != "length" or not quote.is_reduced or wanted_tokens <= 0 or not wrote_something:
        return run.stopped_by
    prompt = quote.ask.prompt.continued(run.text)
    input_tokens = run.counted.actual_tokens + _quoted_input_tokens(prompt, _count_tokens(quote.ask, prompt.text))
    account = ledger.get_account(user_id=quote.user_id)
    limit_tokens = min(quote.max_billable_tokens, run.held_tokens + max(0, account.available))
    output_limit_tokens = min(
        wanted_tokens,
        pricing.affordable_output_tokens(
            available_tokens=limit_tokens, input_tokens=input_tokens, multiplier=multiplier
        ),
    )
    if output_limit_tokens < min(MIN_OUTPUT_TOKENS + quote.thinking_tokens // 4, wanted_tokens):
        # Where the quote itself is used up, by what had to be read twice, no top-up would have helped.
        return "balance" if limit_tokens < quote.max_billable_tokens else "length"
    needed_tokens = pricing.calculate_llm_billable_tokens(input_tokens, output_limit_tokens, multiplier).billable_tokens
    if needed_tokens > run.held_tokens:
        try:
            ledger.extend_reservation(usage_id=run.usage_id, tokens=needed_tokens - run.held_tokens)
        except (InsufficientTokens, AccountNotActive, UsageAlreadyClosed):
            return "balance"  # another operation was faster
    # The next call reads all of it anew; should a crash cut it, what both cost us is on the row (law 9).
    calls = [*run.ended_calls, TokenPools(input_tokens=_count_tokens(quote.ask, prompt.text))]
    ledger.note_use(
        usage_id=run.usage_id,
        pools=sum(calls, TokenPools()),
        provider_cost_microusd=catalogue.provider_cost_microusd(quote.price, *calls),
    )
    return _NextCall(prompt, output_limit_tokens, max(needed_tokens, run.held_tokens))


async def stream_text(*, quote: Quote, usage_id: int, keep: KeepText) -> AsyncGenerator[TextDelta | Finished, None]:
    """Run a reserved text operation: yield its text as it comes, then `Finished`.

    - It ended: what the provider counted is charged, and our own count, marked as estimated, where it counted nothing
      or what cannot be.
    - It reached a limit that the balance had set: the hold is extended if more is available by now, and the model
      goes on; else the text ends there.
    - It failed: the hold is released, nothing is charged, and ProviderError is raised.
    - The reader left (the generator was closed or its task cancelled), or kept it waiting for too long: the provider
      is stopped and what it had read and written is charged, by its own count as far as that went; also before a word.
    """
    run = _TextRun(
        quote=quote,
        usage_id=usage_id,
        prompt=quote.ask.prompt,
        held_tokens=quote.held_tokens,
        output_limit_tokens=quote.output_limit_tokens,
    )
    clock = asyncio.get_running_loop().time
    deadline = clock() + settings.AI_MAX_DURATION_SECONDS
    # Who reads so slowly that the hold would expire first is cut off while it can still be charged.
    patience_seconds = (settings.RESERVATION_SECONDS - settings.AI_MAX_DURATION_SECONDS) / 2
    try:
        while run.is_call_under_way and patience_seconds >= 0:
            stream = providers.stream_text(
                provider=quote.ask.provider,
                model=quote.ask.model,
                system=run.prompt.system,
                messages=run.prompt.messages,
                max_output_tokens=run.output_limit_tokens,
            )
            async with aclosing(stream):
                while run.is_call_under_way and patience_seconds >= 0:
                    # Around the provider's time alone: a time-out must not hit whoever is reading us.
                    async with asyncio.timeout_at(deadline):
                        run.is_asked = True
                        item = await anext(stream)
                    if isinstance(item, TextEnd):
                        run.end_call(item)
                        continue
                    run.hear(item)
                    if item.text:
                        handed_over_at = clock()
                        yield item
                        reading_seconds = clock() - handed_over_at
                        deadline += reading_seconds
                        patience_seconds -= reading_seconds
            if not run.is_call_under_way:
                try:
                    more = await in_thread(_hold_more)(run)
                except DATABASE_AWAY:  # then there is no more; what is written shall be kept
                    more = run.stopped_by
                if isinstance(more, _NextCall):
                    run.begin_call(more)
                else:
                    run.stopped_by = more
    except TimeoutError:
        run.fail(ProviderTimedOut(quote.price.get_provider_display()))
    except Exception as error:
        run.fail(error)
    finally:
        # Also when the reader has gone: shielded, so that a second cancellation cannot leave the hold open.
        await asyncio.shield(asyncio.ensure_future(in_thread(_close_for_sure)(partial(run.close, keep))))
    if run.failure is not None:
        await _tell_failure(run.failure, run.log_ids)
        raise run.failure
    yield Finished(usage_id, run.stopped_by)


# --- Images -----------------------------------------------------------------------------------------------------------


async def make_images(*, quote: Quote, usage_id: int, keep: KeepImages) -> Finished:
    """Run a reserved image operation. What came is charged, at the price of an image each.

    It failed: the hold is released, nothing is charged, and ProviderError is raised. Its task is cancelled because
    the reader left: the provider is stopped, and all is charged, for providers charge for what they have begun.
    """
    ask = quote.ask
    started_at = time.monotonic()
    images: Images | None = None
    failure: Exception | None = None

    def duration_ms() -> int:
        return int((time.monotonic() - started_at) * 1_000)

    log_ids = _log_ids(quote, usage_id)

    def used() -> tuple[TokenPools, int, int]:
        """What the provider counted, the images that came, and what it cost us."""
        pools, count = (images.usage or TokenPools(), len(images.images)) if images else (TokenPools(), 0)
        if images is None and isinstance(failure, ProviderError) and failure.usage:
            pools = failure.usage
        # The reader left, or we did: what has been begun is made.
        if images is None and (failure is None or isinstance(failure, ProviderTimedOut)):
            pools = TokenPools(input_tokens=quote.read_tokens)
            return pools, 0, _begun_cost_microusd(quote, pools)
        spoilt = failure.spoilt_images if isinstance(failure, ProviderError) else 0
        is_nothing_used = count + spoilt == 0 and pools == TokenPools()
        return pools, count, 0 if is_nothing_used else _images_cost_microusd(quote, pools, count + spoilt)

    def keep_too_late() -> Posting:
        pools, count, provider_cost_microusd = used()
        return _keep_too_late(
            usage_id,
            partial(keep, images),
            **{name: getattr(pools, name) for name in statements.COUNTS},
            image_count=count,
            provider_cost_microusd=provider_cost_microusd,
            is_estimated=images is None,
            duration_ms=duration_ms(),
        )

    def settle_or_release() -> Posting:
        pools, count, provider_cost_microusd = used()
        if images is None and failure is None:
            return ledger.settle_usage(
                usage_id=usage_id,
                pools=pools,
                is_estimated=True,
                provider_cost_microusd=provider_cost_microusd,
                duration_ms=duration_ms(),
                error_message=LEFT_BEFORE_AN_IMAGE,
            )
        if images is None:
            return ledger.release_usage(
                usage_id=usage_id,
                error_message=_failure_words(failure) if failure else LEFT_BEFORE_AN_IMAGE,
                provider_cost_microusd=provider_cost_microusd,
                duration_ms=duration_ms(),
            )
        return ledger.settle_usage(
            usage_id=usage_id,
            pools=pools,
            image_count=count,
            provider_cost_microusd=provider_cost_microusd,
            duration_ms=duration_ms(),
        )

    def release_unsettled() -> Posting:
        return _release_unsettled(usage_id, failure, duration_ms())

    def close_by(settle: Callable[[], Posting]) -> Posting:
        with transaction.atomic(durable=True):
            keep(images)
            posting = settle()
            _take_back_if_closed_before(posting)
            after_debit.follow_debit(posting)
        return posting

    def close() -> Posting:
        posting = _close_somehow(
            log_ids,
            partial(close_by, settle_or_release),
            partial(close_by, release_unsettled),
            release_unsettled,
            too_late=keep_too_late,
        )
        if failure is None:
            _log_end(log_ids, posting, duration_ms())
        return posting

    try:
        async with asyncio.timeout(settings.AI_MAX_DURATION_SECONDS):
            images = await providers.generate_images(
                provider=ask.provider,
                model=ask.model,
                prompt=ask.prompt.messages[-1].text,
                size=ask.image_size,
                quality=ask.image_quality,
                count=ask.image_count,
            )
    except TimeoutError:
        failure = ProviderTimedOut(quote.price.get_provider_display())
    except Exception as error:
        failure = error
    finally:
        await asyncio.shield(asyncio.ensure_future(in_thread(_close_for_sure)(close)))
    if failure is not None:
        await _tell_failure(failure, log_ids)
        raise failure
    return Finished(usage_id)


def _images_cost_microusd(quote: Quote, pools: TokenPools, image_count: int) -> int:
    return catalogue.provider_cost_microusd(
        quote.price,
        pools,
        image_count=image_count,
        image_size=quote.ask.image_size,
        image_quality=quote.ask.image_quality,
    )
