"""Text from Anthropic: the only importer of `anthropic`."""

from collections.abc import Sequence
from datetime import date
from typing import Any

import anthropic
import httpx2
from anthropic.types import MessageParam
from django.conf import settings

from ai_ops.providers import (
    LIST_TIMEOUT_SECONDS,
    FinishReason,
    Images,
    KnownError,
    Message,
    ProviderBusy,
    ProviderError,
    ProviderMisconfigured,
    ProviderRefused,
    ProviderTimedOut,
    ProviderUnavailable,
    TextDelta,
    TextEnd,
    TextStream,
    only_text,
    part,
    tls_context,
    to_error,
)
from ai_ops.providers.counts import Said

NAME = "Anthropic"
FINISH_REASONS: dict[str | None, FinishReason] = {
    "end_turn": "stop",
    "stop_sequence": "stop",
    "max_tokens": "length",
    "model_context_window_exceeded": "length",
    "refusal": "refused",
}

# Anthropic calls most faults of the operator's `invalid_request_error`: the message alone tells them from the author's.
# Newer ones have an error code as well.
ERRORS = (
    KnownError(
        ProviderMisconfigured,
        {
            *("billing_error", "enforced_spend_limit_reached", "contract_spend_limit_reached"),
            *("linked_organization_spend_limit_reached", "linked_organization_billing_unavailable"),
            *("user_profile_billing_not_authorized", "user_profile_not_billable"),
        },
        why="Our credit there is used up, or a limit on what we may spend is reached.",
    ),
    KnownError(
        ProviderMisconfigured,
        says=r"credit balance is too low|reached your specified (\w+ )?API usage limits|purchase credits"
        r"|plans? & billing|regain access on|(spend(ing)?|usage) limit",
        why="Our credit there is used up, or a limit on what we may spend is reached.",
    ),
    KnownError(
        ProviderMisconfigured,
        {"organization_on_hold", "organization_type_not_supported", "cmek_key_disabled", "cmek_key_network_blocked"},
        why="Our organization there is disabled or on hold.",
    ),
    KnownError(
        ProviderMisconfigured,
        says=r"(organization|workspace|account|key)\b.{0,40}\b(disabled|suspended|on hold|archived|revoked)",
        why="Our organization or workspace there is disabled.",
    ),
    KnownError(
        ProviderMisconfigured,
        {"authentication_error", "permission_error"},
        why="Our key is not valid there, or may not do this.",
    ),
    KnownError(ProviderMisconfigured, {"not_found_error"}, why="The model has ended, or our key may not use it."),
    KnownError(ProviderRefused, {"request_too_large", "request_body_too_large_after_decoding"}),
    KnownError(
        ProviderRefused,
        says=r"content filter|usage polic|prompt is too long|exceeds? context limit|context window|too many total text",
    ),
    KnownError(ProviderBusy, {"rate_limit_error", "overloaded_error", "ramp_limit_exceeded"}),
    KnownError(ProviderTimedOut, {"timeout_error"}),
    KnownError(
        ProviderMisconfigured,
        {"invalid_request_error"},
        # Which field is wrong stands first. `messages` and `system` are the text, all others are ours.
        says=r"^\W*(?!messages|system|prompt|input|text|request)[a-z_][\w.-]*\W?(:| must | is (deprecated|not ))"
        r"|does not support|not supported|extra inputs",
        why="The model does not take what we ask of it: see its limits in the catalogue.",
    ),
    KnownError(ProviderRefused, {"invalid_request_error"}),
)


async def stream_text(*, model: str, system: str, messages: Sequence[Message], max_output_tokens: int) -> TextStream:
    """See `ai_ops.providers.stream_text`. The input is counted first, and the output at the end."""
    finish_reason: FinishReason | None = None
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
            # The SDK builds its objects unchecked: anything may stand in any field.
            async for event in stream:
                if event.type == "message_start":
                    yield TextDelta("", _said(part(event, "message", "usage")))
                elif event.type == "content_block_start" and part(event, "content_block", "type") == "text":
                    if text := only_text(part(event, "content_block", "text")):
                        yield TextDelta(text)
                elif event.type == "content_block_delta" and part(event, "delta", "type") == "text_delta":
                    if text := only_text(part(event, "delta", "text")):
                        yield TextDelta(text)
                elif event.type == "content_block_delta" and part(event, "delta", "type") == "thinking_delta":
                    thought = part(event, "delta", "thinking")
                    if thought and isinstance(thought, str):  # for our count alone: no reason to fail
                        yield TextDelta("", thought=thought)
                elif event.type == "message_delta":
                    yield TextDelta("", _said(event.usage))
                    finish_reason = FINISH_REASONS.get(part(event, "delta", "stop_reason"), "other")
    except Exception as error:
        # When its end has been said, a connection that breaks takes nothing away from the answer.
        if finish_reason is None or not isinstance(error, (anthropic.APIConnectionError, httpx2.TransportError)):
            raise _translate(error) from error
    if finish_reason is None:
        raise ProviderUnavailable(NAME)
    yield TextEnd(finish_reason)


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
        raise _translate(error) from error


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


def _said(usage: Any) -> Said:
    """Anthropic's pools exclude one another as ours do. Its numbers are cumulative."""
    return Said(
        input=part(usage, "input_tokens"),
        cached_input=part(usage, "cache_read_input_tokens"),
        cache_write=part(usage, "cache_creation_input_tokens"),
        cache_write_5m=part(usage, "cache_creation", "ephemeral_5m_input_tokens"),
        cache_write_1h=part(usage, "cache_creation", "ephemeral_1h_input_tokens"),
        output=part(usage, "output_tokens"),
        reasoning=part(usage, "output_tokens_details", "thinking_tokens"),
    )


def _translate(error: Exception) -> ProviderError:
    """What an exception means. Inside a stream the SDK lets errors of its HTTP library and of JSON through."""
    if isinstance(error, anthropic.APIStatusError):
        # Inside a stream the HTTP status stays 200.
        return to_error(
            NAME,
            ERRORS,
            status=error.status_code,
            words=(error.type, error.error_code),
            message=error.api_message,
        )
    if isinstance(error, (anthropic.APITimeoutError, httpx2.TimeoutException)):
        return ProviderTimedOut(NAME)
    return ProviderUnavailable(NAME)
