"""Text and images from OpenAI: the only importer of `openai`."""

from base64 import b64decode
from collections.abc import Sequence
from datetime import date
from typing import Any, Literal

import openai
from django.conf import settings
from openai.types import ImagesResponse
from openai.types.chat import ChatCompletionMessageParam

from ai_ops.providers import (
    LIST_TIMEOUT_SECONDS,
    FinishReason,
    Image,
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
    each,
    image_file,
    only_text,
    part,
    tls_context,
    to_error,
)
from ai_ops.providers.counts import MOST_IMAGE_TOKENS, Said, count_call
from billing.pricing import TokenPools

NAME = "OpenAI"
QUALITIES: dict[str, Literal["low", "medium", "high"]] = {"low": "low", "medium": "medium", "high": "high"}
FINISH_REASONS: dict[str, FinishReason] = {"stop": "stop", "length": "length", "content_filter": "refused"}

OUR_PARAMETER = "a parameter that is not the text"
ERRORS = (
    KnownError(
        ProviderMisconfigured,
        {
            *("insufficient_quota", "credit_balance_exhausted", "billing_hard_limit_reached", "billing_not_active"),
            *("organization_spend_limit_exceeded", "organization_usage_limit_exceeded", "project_spend_limit_exceeded"),
            *("quota_exceeded", "payment_required"),
        },
        why="Our credit there is used up, or a limit on what we may spend is reached.",
    ),
    KnownError(
        ProviderMisconfigured,
        {"account_deactivated", "organization_deactivated", "access_terminated"},
        why="Our account there is closed.",
    ),
    KnownError(
        ProviderMisconfigured,
        {
            *("invalid_api_key", "authentication_error", "invalid_authentication", "invalid_organization"),
            *("mismatched_organization", "mismatched_project", "ip_not_authorized", "missing_scope"),
            *("permission_error", "permission_denied", "insufficient_permissions"),
            *("unsupported_country_region_territory", "request_forbidden"),
        },
        why="Our key is not valid there, or may not do this from here.",
    ),
    KnownError(
        ProviderMisconfigured,
        {"model_not_found", "model_not_available", "deprecated_model", "invalid_model"},
        why="The model has ended, or our key may not use it.",
    ),
    KnownError(
        ProviderRefused,
        {
            *("content_policy_violation", "moderation_blocked", "content_filter", "invalid_prompt"),
            *("image_generation_user_error", "cyber_policy_violation", "bio_policy", "cyber_policy"),
            *("context_length_exceeded", "string_above_max_length", "request_too_large"),
        },
    ),
    KnownError(
        ProviderRefused,
        says=r"safety system|usage polic|content polic|content management policy|maximum context length"
        r"|context window|reduce the length|(request|prompt|input) (is )?too (long|large)",
    ),
    # Before the words about billing: a limit of a minute comes with advice to add a means of payment.
    KnownError(ProviderBusy, {"rate_limit_exceeded", "rate_limit_error", "slow_down", "engine_overloaded"}),
    KnownError(
        ProviderMisconfigured,
        says=r"exceeded your current quota|billing|credit balance|insufficient (balance|funds|credits?)"
        r"|organization must be verified|account is not active|deactivated",
        why="Our credit there is used up, or our account is not in order.",
    ),
    KnownError(ProviderTimedOut, {"timeout", "request_timeout"}),
    KnownError(
        ProviderMisconfigured,
        {
            *(OUR_PARAMETER, "unknown_parameter", "unsupported_parameter", "unsupported_value"),
            *("missing_required_parameter", "integer_above_max_value", "integer_below_min_value"),
        },
        why="The model does not take what we ask of it: see its limits in the catalogue.",
    ),
)


async def stream_text(*, model: str, system: str, messages: Sequence[Message], max_output_tokens: int) -> TextStream:
    """See `ai_ops.providers.stream_text`. OpenAI reports usage at the very end: a broken stream has none."""
    finish_reason: FinishReason | None = None
    first: Any = None
    has_begun = False
    client, turns = _client(settings.AI_TIMEOUT_SECONDS), _turns(system, messages)
    try:
        async with (
            client,
            await client.chat.completions.create(
                model=model,
                messages=turns,
                max_completion_tokens=max_output_tokens,
                stream=True,
                stream_options={"include_usage": True},
            ) as stream,
        ):
            # The SDK builds its objects unchecked: anything may stand in any field.
            async for chunk in stream:
                text = thought = ""
                for choice in each(chunk.choices):
                    # We ask for one. Of several the first that speaks is the answer, and all are counted.
                    number = part(choice, "index") or 0
                    first = number if first is None else first
                    if number != first:
                        continue
                    text += only_text(part(choice, "delta", "content")) or only_text(part(choice, "delta", "refusal"))
                    thought += _thought(choice)
                    if reason := part(choice, "finish_reason"):
                        finish_reason = FINISH_REASONS.get(reason, "other")
                # The first chunk says that our text was read, whatever else it says.
                said = _said(chunk.usage) if chunk.usage or not has_begun else None
                has_begun = True
                if text or said or thought:
                    yield TextDelta(text, said, thought)
    except Exception as error:
        # When its end has been said, a connection that breaks takes nothing away from the answer.
        if finish_reason is None or not isinstance(error, openai.APIConnectionError):
            raise _translate(error) from error
    if finish_reason is None:
        raise ProviderUnavailable(NAME)
    yield TextEnd(finish_reason)


async def generate_images(*, model: str, prompt: str, size: str, quality: str, count: int) -> Images:
    """See `ai_ops.providers.generate_images`. One request makes all images."""
    usage: TokenPools | None = None
    images: tuple[Image, ...] = ()
    client = _client(settings.AI_IMAGE_TIMEOUT_SECONDS)
    try:
        async with client:
            response = await client.images.generate(
                model=model,
                prompt=prompt,
                n=count,
                size=size,
                quality=QUALITIES[quality] if quality else openai.omit,
                output_format="png",
            )
        usage = _image_pools(response, count)
        images = _images(response)
        made = len(each(response.data))
    except Exception as error:
        raise _translate(error) from error
    if not images:
        raise ProviderUnavailable(NAME, usage=usage, spoilt_images=made)
    return Images(images[:count], usage)


async def list_models() -> dict[str, date | None]:
    """See `ai_ops.providers.list_models`."""
    try:
        async with _client(LIST_TIMEOUT_SECONDS) as client:
            return {
                model.id: date.fromisoformat(model.shutdown_date[:10]) if model.shutdown_date else None
                async for model in client.models.list()
            }
    except Exception as error:
        raise _translate(error) from error


def _client(timeout_seconds: float) -> openai.AsyncOpenAI:
    if not settings.OPENAI_API_KEY:
        raise ProviderMisconfigured(NAME)
    return openai.AsyncOpenAI(
        api_key=settings.OPENAI_API_KEY,
        base_url=settings.OPENAI_BASE_URL or None,
        timeout=timeout_seconds,  # to connect, and between two chunks
        max_retries=0,  # a retry is the user's decision: see `ai_ops.providers.stream_text`
        http_client=openai.DefaultAsyncHttpxClient(verify=tls_context(), timeout=timeout_seconds),
    )


def _turns(system: str, messages: Sequence[Message]) -> list[ChatCompletionMessageParam]:
    turns: list[ChatCompletionMessageParam] = [{"role": "system", "content": system}] if system else []
    for message in messages:
        if message.role == "user":
            turns.append({"role": "user", "content": message.text})
        else:
            turns.append({"role": "assistant", "content": message.text})
    return turns


def _thought(choice: Any) -> str:
    """OpenAI keeps its models' thoughts to itself; servers that speak its protocol send them under either name. They
    are for our count alone, so what is no text is no reason to fail."""
    thoughts = (part(choice, "delta", name) for name in ("reasoning_content", "reasoning"))
    return next((thought for thought in thoughts if thought and isinstance(thought, str)), "")


def _said(usage: Any) -> Said:
    """OpenAI's prompt tokens include what was read from and written to its cache, its completion tokens all that the
    model wrote, read aloud, thought, or had predicted wrongly by us."""
    return Said(
        input=part(usage, "prompt_tokens"),
        cached_input=part(usage, "prompt_tokens_details", "cached_tokens"),
        cache_write=part(usage, "prompt_tokens_details", "cache_write_tokens"),
        image_input=part(usage, "prompt_tokens_details", "image_tokens"),
        audio_input=part(usage, "prompt_tokens_details", "audio_tokens"),
        output=part(usage, "completion_tokens"),
        reasoning=part(usage, "completion_tokens_details", "reasoning_tokens"),
        audio_output=part(usage, "completion_tokens_details", "audio_tokens"),
        total=part(usage, "total_tokens"),
        is_cache_in_input=True,
    )


def _images(response: ImagesResponse) -> tuple[Image, ...]:
    """The usable images of an answer: one that is spoilt does not spoil the others, which are paid for."""
    files = []
    for item in each(response.data):
        try:
            files.append(image_file(b64decode(only_text(part(item, "b64_json")), validate=True)))
        except (TypeError, ValueError):
            continue
    return tuple(file for file in files if file)


def _image_pools(response: ImagesResponse, count: int) -> TokenPools | None:
    """What was read and painted; this endpoint knows no cache and no reasoning."""
    usage = part(response, "usage")
    if not usage:
        return None
    said = Said(
        input=part(usage, "input_tokens"),
        image_input=part(usage, "input_tokens_details", "image_tokens"),
        output=part(usage, "output_tokens"),
        text_output=part(usage, "output_tokens_details", "text_tokens"),
        total=part(usage, "total_tokens"),
    )
    return count_call(said, prompt_tokens=0, text_tokens=0, most_written_tokens=count * MOST_IMAGE_TOKENS).pools


def _translate(error: Exception) -> ProviderError:
    """What an exception of the SDK means. A garbled answer surfaces as almost any."""
    if isinstance(error, openai.APITimeoutError):
        return ProviderTimedOut(NAME)
    if not isinstance(error, openai.APIError) or isinstance(error, openai.APIConnectionError):
        return ProviderUnavailable(NAME)
    words = [error.type, error.code]
    if isinstance(error.param, str) and not error.param.startswith(("messages", "prompt", "input")):
        words.append(OUR_PARAMETER)
    # Inside a stream there is no status; some put it where the code belongs.
    code = error.code or ""
    status = getattr(error, "status_code", 0) or (int(code) if code.isdecimal() else 0)
    if not status and error.type == "invalid_request_error":
        status = 400
    return to_error(NAME, ERRORS, status=status, words=words, message=error.message)
