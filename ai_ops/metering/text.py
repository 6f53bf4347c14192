"""Runs a reserved text: as it streams, what was counted and by whom, and going on when more has become available."""

import asyncio
import time
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import aclosing
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from django.conf import settings

from ai_ops import providers
from ai_ops.metering.closing import (
    LEFT_BEFORE_A_WORD,
    NOTHING_TO_READ,
    NOTHING_WRITTEN,
    ONLY_THOUGHT,
    STOP_NOTES,
    Finished,
    StoppedBy,
    close_shielded,
    close_somehow,
    close_with,
    failure_words,
    ids_of,
    keep_too_late,
    log_end,
    note_failure,
    release_unsettled,
    tell_failure,
)
from ai_ops.metering.quotes import MIN_OUTPUT_TOKENS, Quote, count_tokens, quoted_input_tokens
from ai_ops.prompts import Prompt
from ai_ops.providers import (
    FinishReason,
    ProviderError,
    ProviderRefused,
    ProviderTimedOut,
    TextDelta,
    TextEnd,
)
from ai_ops.providers.counts import Counted, Said, count_call
from billing import catalogue, ledger, pricing
from billing.ledger import AccountNotActive, InsufficientTokens, Posting, UsageAlreadyClosed, statements
from billing.pricing import TokenPools
from kit.database import DATABASE_AWAY, in_thread
from kit.text import storable

KeepText = Callable[[str, bool], None]
"""Keeps the text of an operation; told whether it is complete. Runs in the transaction that closes the hold."""
# Where a text ends that the provider did not end as finished.
_STOPPED_BY: Mapping[FinishReason, StoppedBy] = {
    "stop": "",
    "length": "length",
    "refused": "provider",
    "other": "provider",
}


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
    has_count_fallen: bool = False  # a running total of the output was followed by a smaller one
    thought: list[str] = field(default_factory=list)  # by the call under way, as far as the provider tells
    thought_counted_to: int = 0  # in `thought`, likewise
    is_asked: bool = False  # the request has gone to the provider
    is_call_under_way: bool = True
    ended_calls: list[TokenPools] = field(default_factory=list)
    vain_calls: list[TokenPools] = field(default_factory=list)  # extensions that brought nothing: our cost alone
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
        """By the calls that ended and brought something."""
        return sum(self.ended_calls, TokenPools())

    @property
    def calls(self) -> list[TokenPools]:
        """What each call has used: by the provider's count as far as it went, and by ours for the rest."""
        under_way = [self._count_call(has_ended=False).pools] if self.is_call_under_way else []
        return [*self.ended_calls, *under_way]

    @property
    def log_ids(self) -> dict[str, Any]:
        return ids_of(self.quote, self.usage_id)

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
            has_fallen = self.output_counted_to > self.call_begins_at and delta.said.is_below(self.said)
            self.said = self.said.updated(delta.said) if self.said else delta.said
            if delta.said.has_output:
                self.has_count_fallen |= has_fallen
                self.output_counted_to = len(self.written)
                self.thought_counted_to = len(self.thought)

    def end_call(self, end: TextEnd) -> None:
        """Note what the whole call used. A first one with nothing to read counts as empty and fails the operation."""
        self.stopped_by = _STOPPED_BY[end.finish_reason]
        self._note_call(has_ended=True)
        if not self.text:
            self.fail(self._why_nothing(end)(self.quote.price.get_provider_display()))

    def _note_call(self, *, has_ended: bool, error: Exception | None = None) -> None:
        """The call under way is over. Its user pays for it when there is something to read of it (law 9)."""
        call, has_read = self._count_call(has_ended=has_ended), has_ended or self._has_read(error)
        self.is_call_under_way = False
        written = self._text_from(self.call_begins_at)
        if any(character.isprintable() and not character.isspace() for character in written):
            self.ended_calls.append(call.pools)
            self.is_estimated |= call.is_estimated or not has_ended
            return
        del self.written[self.call_begins_at :]
        if has_read:
            self.vain_calls.append(call.pools)

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
        self.has_count_fallen = False
        self.thought = []
        self.thought_counted_to = 0
        self.is_call_under_way = True
        self.stopped_by = "reader"

    def _count_call(self, *, has_ended: bool) -> Counted:
        return count_call(
            self.said,
            prompt_tokens=count_tokens(self.quote.operation, self.prompt.text),
            text_tokens=count_tokens(self.quote.operation, self._text_from(self.call_begins_at)),
            # Of totals that contradict one another the last of a whole answer is right; of one that was cut, none is.
            later_text_tokens=count_tokens(
                self.quote.operation,
                self._text_from(
                    self.call_begins_at if self.has_count_fallen and not has_ended else self.output_counted_to
                ),
            ),
            # A count at the end is of the thoughts, too.
            thought_tokens=0
            if has_ended and self.thought_counted_to == len(self.thought)
            else count_tokens(self.quote.operation, storable("".join(self.thought))),
            most_read_tokens=self.quote.price.max_input_tokens,
            most_written_tokens=self.output_limit_tokens,
        )

    def fail(self, error: Exception) -> None:
        """A first call that fails fails the operation (law 9); what breaks later only ends it."""
        if not self.ended_calls:
            self.failure = error
            return
        note_failure("An operation could not go on", self.log_ids, error)
        if self.is_call_under_way:
            self._note_call(has_ended=False, error=error)
            self.stopped_by = "provider"

    def close(self, keep: KeepText) -> Posting:
        """Keep the text and charge for it, or give the hold back, in one transaction."""
        text = self.text
        keep_text = partial(keep, text, self._is_complete)
        posting = close_somehow(
            self.log_ids,
            partial(close_with, keep_text, partial(self._settle_or_release, text)),
            partial(close_with, keep_text, partial(self._settle_by_our_count, text)),
            partial(close_with, keep_text, self._release_unsettled),
            self._release_unsettled,
            too_late=partial(self._keep_too_late, keep_text, text),
        )
        if self.failure is None:
            log_end(self.log_ids, posting, self.duration_ms)
        return posting

    @property
    def _is_complete(self) -> bool:
        return self.stopped_by == "" and self.failure is None

    def _has_left(self, text: str) -> bool:
        """The reader has, before a word."""
        return self.failure is None and not text and self.is_asked

    def _has_read(self, error: Exception | None) -> bool:
        """Whether the provider has read what the call under way asks, which `error` has ended, or None, its reader."""
        has_begun = self.said or self.thought or len(self.written) > self.call_begins_at
        was_slow = isinstance(error, ProviderTimedOut)  # to answer, not to read
        return bool(has_begun or was_slow or (error is None and self.is_asked))

    def _paid_calls(self) -> list[TokenPools]:
        """What each call used that we have to pay for, whether or not the user does."""
        calls = self.calls if self._has_read(self.failure) else self.ended_calls
        return [*calls, *self.vain_calls]

    def _keep_too_late(self, keep_text: Callable[[], None], text: str) -> Posting:
        calls = self._paid_calls()
        pools = sum(calls, TokenPools())
        return keep_too_late(
            self.usage_id,
            keep_text,
            **{name: getattr(pools, name) for name in statements.COUNTS},
            provider_cost_microusd=catalogue.provider_cost_microusd(self.quote.price, *calls),
            is_estimated=self.is_estimated or self.is_call_under_way,
            duration_ms=self.duration_ms,
        )

    def _settle_or_release(self, text: str) -> Posting:
        # What failed we may have to pay for all the same; the user does not (law 9). Who leaves does: it has been read.
        has_left = self._has_left(text)
        provider_cost_microusd = catalogue.provider_cost_microusd(self.quote.price, *self._paid_calls())
        if self.failure is not None or not (text or has_left):
            return ledger.release_usage(
                usage_id=self.usage_id,
                error_message=NOTHING_WRITTEN if self.failure is None else failure_words(self.failure),
                provider_cost_microusd=provider_cost_microusd,
                duration_ms=self.duration_ms,
            )
        return ledger.settle_usage(
            usage_id=self.usage_id,
            pools=sum(self.calls, TokenPools()),
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
                input_tokens=count_tokens(self.quote.operation, self.quote.ask.prompt.text),
                output_tokens=count_tokens(self.quote.operation, text),
            ),
            is_estimated=True,
            duration_ms=self.duration_ms,
            error_message=STOP_NOTES.get(self.stopped_by, ""),
        )

    def _release_unsettled(self) -> Posting:
        return release_unsettled(self.usage_id, self.failure, self.duration_ms)


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
    quote, multiplier = run.quote, run.quote.multiplier
    wanted_tokens = quote.wanted_output_tokens - run.counted.output_tokens
    wrote_something = len(run.written) > run.call_begins_at
    if run.stopped_by != "length" or not quote.is_reduced or wanted_tokens <= 0 or not wrote_something:
        return run.stopped_by
    prompt = quote.ask.prompt.continued(run.text)
    input_tokens = run.counted.actual_tokens + quoted_input_tokens(prompt, count_tokens(quote.operation, prompt.text))
    account = ledger.get_account(account_id=quote.account_id)
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
    calls = [*run.ended_calls, TokenPools(input_tokens=count_tokens(quote.operation, prompt.text))]
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
                provider=quote.operation.provider,
                model=quote.operation.model,
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
        await close_shielded(partial(run.close, keep))
    if run.failure is not None:
        await tell_failure(run.failure, run.log_ids)
        raise run.failure
    yield Finished(usage_id, run.stopped_by)
