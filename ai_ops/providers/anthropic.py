"""Text from Anthropic: the only importer of `anthropic`."""

from collections.abc import Sequence
from dataclasses import replace
from datetime import date

import anthropic
import httpx2
from anthropic.types import MessageDeltaUsage, MessageParam, Usage
from django.conf import settings

from ai_ops.providers import (
    LIST_TIMEOUT_SECONDS,
    FinishReason,
    Images,
    Message,
    ProviderBusy,
    ProviderError,
    ProviderMisconfigured,
    ProviderTimedOut,
    ProviderUnavailable,
    TextDelta,
    TextEnd,
    TextStream,
    error_class_for_status,
    tls_context,
)
from billing.pricing import TokenPools

NAME = "Anthropic"
FINISH_REASONS: dict[str | None, FinishReason] = {
    "end_turn": "stop",
    "stop_sequence": "stop",
    "max_tokens": "length",
    "model_context_window_exceeded": "length",
    "refusal": "refused",
}


async def stream_text(*, model: str, system: str, messages: Sequence[Message], max_output_tokens: int) -> TextStream:
    """See `ai_ops.providers.stream_text`. The input is reported first, so a broken stream has it."""
    usage: TokenPools | None = None
    finish_reason: FinishReason | None = None
    complete = False
    client, turns = _client(), [_turn(message) for message in messages]
    try:
        async with (
            client,
            await client.messages.create(
                model=model,
                system=system or anthropic.omit,
                messages=turns,
                max_tokens=max_output_tokens,
                stream=True,
            ) as stream,
        ):
            async for event in stream:
                if event.type == "message_start":
                    usage = _pools(event.message.usage, usage)
                elif event.type == "content_block_delta" and event.delta.type == "text_delta" and event.delta.text:
                    yield TextDelta(event.delta.text)
                elif event.type == "message_delta":
                    usage = _pools(event.usage, usage)
                    finish_reason = FINISH_REASONS.get(event.delta.stop_reason, "other")
                elif event.type == "message_stop":
                    complete = True
    except Exception as error:
        raise _translate(error, usage) from error
    if not complete or finish_reason is None:
        raise ProviderUnavailable(NAME, usage=usage)
    yield TextEnd(usage, finish_reason)


async def generate_images(*, model: str, prompt: str, size: str, quality: str, count: int) -> Images:
    """Anthropic has no image models."""
    raise ProviderMisconfigured(NAME)


async def list_models() -> dict[str, date | None]:
    """See `ai_ops.providers.list_models`."""
    try:
        async with _client() as client:
            return {
                model.id: model.retires_at.date() if model.retires_at else None
                async for model in client.models.list(limit=1_000, timeout=LIST_TIMEOUT_SECONDS)
            }
    except Exception as error:
        raise _translate(error, None) from error


def _client() -> anthropic.AsyncAnthropic:
    if not settings.ANTHROPIC_API_KEY:
        raise ProviderMisconfigured(NAME)
    return anthropic.AsyncAnthropic(
        api_key=settings.ANTHROPIC_API_KEY,
        base_url=settings.ANTHROPIC_BASE_URL or None,
        timeout=settings.AI_TIMEOUT_SECONDS,  # to connect, and between two chunks
        max_retries=0,  # a retry is the user's decision: see `ai_ops.providers.stream_text`
        http_client=anthropic.DefaultAsyncHttpxClient(verify=tls_context(), timeout=settings.AI_TIMEOUT_SECONDS),
    )


def _turn(message: Message) -> MessageParam:
    if message.role == "user":
        return {"role": "user", "content": message.text}
    return {"role": "assistant", "content": message.text}


def _pools(reported: Usage | MessageDeltaUsage | None, known: TokenPools | None) -> TokenPools | None:
    """Anthropic's pools exclude one another as ours do. Its numbers are cumulative: the last one counts."""
    if reported is None:
        return known
    details = reported.output_tokens_details
    named: dict[str, int | None] = {
        "input_tokens": reported.input_tokens,
        "cached_input_tokens": reported.cache_read_input_tokens,
        "cache_write_tokens": reported.cache_creation_input_tokens,
        "output_tokens": reported.output_tokens,
        "reasoning_tokens": details.thinking_tokens if details else None,
    }
    return replace(known or TokenPools(), **{pool: tokens for pool, tokens in named.items() if tokens is not None})


def _translate(error: Exception, usage: TokenPools | None) -> ProviderError:
    """Inside a stream the SDK lets errors of its HTTP library and of JSON through."""
    if isinstance(error, anthropic.APIStatusError):
        if error.type in (
            "rate_limit_error",
            "overloaded_error",
        ):  # inside a stream the HTTP status stays 200
            return ProviderBusy(NAME, usage=usage)
        return error_class_for_status(error.status_code)(NAME, usage=usage)
    if isinstance(error, (anthropic.APITimeoutError, httpx2.TimeoutException)):
        return ProviderTimedOut(NAME, usage=usage)
    return ProviderUnavailable(NAME, usage=usage)
