"""Text and images from Google's Gemini API: the only importer of `google.genai`."""

import asyncio
from collections.abc import Sequence
from datetime import date
from fractions import Fraction
from typing import Any

import httpx2
from django.conf import settings
from google import genai
from google.genai import errors, types
from google.genai.client import AsyncClient

from ai_ops.providers import (
    LIST_TIMEOUT_SECONDS,
    FinishReason,
    Image,
    Images,
    Message,
    ProviderError,
    ProviderMisconfigured,
    ProviderRefused,
    ProviderTimedOut,
    ProviderUnavailable,
    TextDelta,
    TextEnd,
    TextStream,
    error_class_for_status,
    image_file,
    tls_context,
)
from billing.pricing import TokenPools

NAME = "Google"
# The SDK announces its timeout, which for us is the wait for one chunk, as the deadline of the whole answer.
WHOLE_ANSWER_SECONDS = 600
FINISH_REASONS: dict[str, FinishReason] = {
    "STOP": "stop",
    "MAX_TOKENS": "length",
    "CONTINUATION": "length",
    **dict.fromkeys(("SAFETY", "RECITATION", "BLOCKLIST", "PROHIBITED_CONTENT", "SPII", "ESCALATION"), "refused"),
    **dict.fromkeys(("IMAGE_SAFETY", "IMAGE_PROHIBITED_CONTENT", "IMAGE_RECITATION"), "refused"),
}


async def stream_text(*, model: str, system: str, messages: Sequence[Message], max_output_tokens: int) -> TextStream:
    """See `ai_ops.providers.stream_text`. Every chunk has the usage so far: a broken stream has it too."""
    usage: TokenPools | None = None
    finish_reason: FinishReason | None = None
    blocked = False
    client, contents = _client(settings.AI_TIMEOUT_SECONDS), _contents(messages)
    config = _config(system_instruction=system or None, max_output_tokens=max_output_tokens)
    try:
        # The SDK's stream cannot be closed, its client can: that closes the connection at once.
        async with client.aio as aio:
            stream = await aio.models.generate_content_stream(model=model, contents=contents, config=config)
            async for chunk in stream:
                usage = _pools(chunk.usage_metadata) or usage
                blocked = blocked or _is_blocked(chunk)
                for candidate in chunk.candidates or ():
                    if text := _text(candidate):
                        yield TextDelta(text)
                    if candidate.finish_reason:
                        finish_reason = FINISH_REASONS.get(candidate.finish_reason.value, "other")
    except Exception as error:
        raise _translate(error, usage) from error
    if blocked:
        raise ProviderRefused(NAME, usage=usage)
    if finish_reason is None:
        raise ProviderUnavailable(NAME, usage=usage)
    yield TextEnd(usage, finish_reason)


async def generate_images(*, model: str, prompt: str, size: str, quality: str, count: int) -> Images:
    """See `ai_ops.providers.generate_images`. Gemini makes one image for each request, so `count` run at once.

    It knows the shape of an image and no levels of quality: `quality` has no effect.
    """
    width, height = map(int, size.split("x"))
    shape = Fraction(width, height)
    client = _client(settings.AI_IMAGE_TIMEOUT_SECONDS)
    config = _config(
        response_modalities=["IMAGE"],
        image_config=types.ImageConfig(aspect_ratio=f"{shape.numerator}:{shape.denominator}"),
    )
    async with client.aio as aio:
        # One failure must not cost the user the images of the other requests, so all are waited for.
        outcomes = await asyncio.gather(
            *(_generate_image(aio, model, prompt, config) for _ in range(count)), return_exceptions=True
        )
    delivered = [outcome for outcome in outcomes if isinstance(outcome, Images)]
    failures = [outcome for outcome in outcomes if isinstance(outcome, ProviderError)]
    if not delivered:
        failures[0].usage = _sum([failure.usage for failure in failures if failure.usage])
        raise failures[0]
    # Of a failure that was not counted nothing is known to be charged. An image that was not counted has a cost, and
    # a sum without it would pass for the whole.
    counted = [outcome.usage for outcome in delivered if outcome.usage]
    complete = len(counted) == len(delivered)
    usage = _sum(counted + [failure.usage for failure in failures if failure.usage]) if complete else None
    return Images(tuple(image for outcome in delivered for image in outcome.images), usage)


async def _generate_image(aio: AsyncClient, model: str, prompt: str, config: types.GenerateContentConfig) -> Images:
    usage: TokenPools | None = None
    try:
        answer = await aio.models.generate_content(model=model, contents=prompt, config=config)
        usage = _pools(answer.usage_metadata)
        image, refused = _image(answer), _is_refused(answer)
    except Exception as error:
        raise _translate(error, usage) from error
    if image is None:
        raise (ProviderRefused if refused else ProviderUnavailable)(NAME, usage=usage)
    return Images((image,), usage)


async def list_models() -> dict[str, date | None]:
    """See `ai_ops.providers.list_models`. Google does not say here when a model ends."""
    try:
        async with _client(LIST_TIMEOUT_SECONDS).aio as aio:
            models = await aio.models.list()
            return {(model.name or "").removeprefix("models/"): None async for model in models}
    except Exception as error:
        raise _translate(error, None) from error


def _client(timeout_seconds: float) -> genai.Client:
    if not settings.GOOGLE_API_KEY:
        raise ProviderMisconfigured(NAME)
    options = types.HttpOptions(
        base_url=settings.GOOGLE_GEMINI_BASE_URL or None,
        timeout=int(timeout_seconds * 1000),  # to connect, and between two chunks
        headers={"X-Server-Timeout": str(WHOLE_ANSWER_SECONDS)},
        # One attempt: a retry is the user's decision, see `ai_ops.providers.stream_text`.
        retry_options=types.HttpRetryOptions(attempts=1),
        client_args={"verify": tls_context()},
        async_client_args={"verify": tls_context(), "ssl": tls_context()},
    )
    return genai.Client(vertexai=False, api_key=settings.GOOGLE_API_KEY, http_options=options)


def _config(**fields: Any) -> types.GenerateContentConfig:
    return types.GenerateContentConfig(
        **fields,
        # One quote pays for one request: no further ones behind our back.
        automatic_continuation=False,
        automatic_function_calling=types.AutomaticFunctionCallingConfig(disable=True),
    )


def _contents(messages: Sequence[Message]) -> list[types.ContentUnion]:
    roles = {"user": "user", "assistant": "model"}
    return [types.Content(role=roles[message.role], parts=[types.Part(text=message.text)]) for message in messages]


def _text(candidate: types.Candidate) -> str:
    parts = (candidate.content and candidate.content.parts) or ()
    return "".join(part.text for part in parts if part.text and not part.thought)


def _image(answer: types.GenerateContentResponse) -> Image | None:
    """The first usable image of an answer that is not a sketch made while thinking."""
    candidates = answer.candidates or ()
    parts = (part for candidate in candidates for part in (candidate.content and candidate.content.parts) or ())
    files = (image_file(part.inline_data.data) for part in parts if part.inline_data and not part.thought)
    return next((file for file in files if file), None)


def _is_refused(answer: types.GenerateContentResponse) -> bool:
    reasons = (candidate.finish_reason for candidate in answer.candidates or ())
    return _is_blocked(answer) or any(reason and FINISH_REASONS.get(reason.value) == "refused" for reason in reasons)


def _is_blocked(answer: types.GenerateContentResponse) -> bool:
    """The prompt itself was refused, so there are no candidates."""
    return bool(answer.prompt_feedback and answer.prompt_feedback.block_reason)


def _pools(usage: types.GenerateContentResponseUsageMetadata | None) -> TokenPools | None:
    """Google counts what came from its cache as prompt, and thoughts apart from the candidates."""
    if usage is None or usage.prompt_token_count is None:
        return None
    cached, thoughts = usage.cached_content_token_count or 0, usage.thoughts_token_count or 0
    return TokenPools(
        input_tokens=usage.prompt_token_count - cached + (usage.tool_use_prompt_token_count or 0),
        cached_input_tokens=cached,
        output_tokens=(usage.candidates_token_count or 0) + thoughts,
        reasoning_tokens=thoughts,
    )


def _sum(pools: list[TokenPools]) -> TokenPools | None:
    """All pools together, None when nothing was counted."""
    return sum(pools, TokenPools()) if pools else None


def _translate(error: Exception, usage: TokenPools | None) -> ProviderError:
    """The SDK lets errors of its HTTP library and of JSON through."""
    if isinstance(error, errors.APIError):
        if "API_KEY_INVALID" in str(error.details):  # a wrong key comes as 400
            return ProviderMisconfigured(NAME, usage=usage)
        return error_class_for_status(error.code or 0)(NAME, usage=usage)
    if isinstance(error, httpx2.TimeoutException):
        return ProviderTimedOut(NAME, usage=usage)
    return ProviderUnavailable(NAME, usage=usage)
