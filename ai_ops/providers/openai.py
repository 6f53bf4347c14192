"""Text and images from OpenAI: the only importer of `openai`."""

from base64 import b64decode
from collections.abc import Sequence
from datetime import date
from typing import Literal

import openai
from django.conf import settings
from openai.types import CompletionUsage, ImagesResponse
from openai.types.chat import ChatCompletionMessageParam

from ai_ops.providers import (
    LIST_TIMEOUT_SECONDS,
    FinishReason,
    Image,
    Images,
    Message,
    ProviderError,
    ProviderMisconfigured,
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

NAME = "OpenAI"
QUALITIES: dict[str, Literal["low", "medium", "high"]] = {"low": "low", "medium": "medium", "high": "high"}
FINISH_REASONS: dict[str, FinishReason] = {"stop": "stop", "length": "length", "content_filter": "refused"}


async def stream_text(*, model: str, system: str, messages: Sequence[Message], max_output_tokens: int) -> TextStream:
    """See `ai_ops.providers.stream_text`. OpenAI reports usage at the very end: a broken stream has none."""
    usage: TokenPools | None = None
    finish_reason: FinishReason | None = None
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
            async for chunk in stream:
                if chunk.usage:
                    usage = _pools(chunk.usage)
                for choice in chunk.choices:
                    if text := choice.delta.content or choice.delta.refusal:
                        yield TextDelta(text)
                    if choice.finish_reason:
                        finish_reason = FINISH_REASONS.get(choice.finish_reason, "other")
    except Exception as error:
        raise _translate(error, usage) from error
    if finish_reason is None:
        raise ProviderUnavailable(NAME, usage=usage)
    yield TextEnd(usage, finish_reason)


async def generate_images(*, model: str, prompt: str, size: str, quality: str, count: int) -> Images:
    """See `ai_ops.providers.generate_images`. One request makes all images."""
    usage: TokenPools | None = None
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
        usage = _image_pools(response)
        images = _images(response)
    except Exception as error:
        raise _translate(error, usage) from error
    if not images:
        raise ProviderUnavailable(NAME, usage=usage)
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
        raise _translate(error, None) from error


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


def _pools(usage: CompletionUsage) -> TokenPools:
    """OpenAI's prompt tokens include what was read from and written to its cache; ours exclude both."""
    prompt, completion = usage.prompt_tokens_details, usage.completion_tokens_details
    cached = (prompt and prompt.cached_tokens) or 0
    written = min((prompt and prompt.cache_write_tokens) or 0, usage.prompt_tokens - cached)
    return TokenPools(
        input_tokens=usage.prompt_tokens - cached - written,
        cached_input_tokens=cached,
        cache_write_tokens=written,
        output_tokens=usage.completion_tokens,
        reasoning_tokens=(completion and completion.reasoning_tokens) or 0,
    )


def _images(response: ImagesResponse) -> tuple[Image, ...]:
    """The usable images of an answer: one that is spoilt does not spoil the others, which are paid for."""
    files = []
    for item in response.data or ():
        try:
            files.append(image_file(b64decode(item.b64_json or "", validate=True)))
        except ValueError:
            continue
    return tuple(file for file in files if file)


def _image_pools(response: ImagesResponse) -> TokenPools | None:
    """The prompt is the input and the images are the output; this endpoint knows no cache and no reasoning."""
    if response.usage is None:
        return None
    return TokenPools(input_tokens=response.usage.input_tokens, output_tokens=response.usage.output_tokens)


def _translate(error: Exception, usage: TokenPools | None) -> ProviderError:
    """The SDK builds its objects unchecked, so a garbled answer surfaces as almost any exception."""
    if isinstance(error, openai.APIStatusError):
        if error.code in ("insufficient_quota", "billing_hard_limit_reached"):
            return ProviderMisconfigured(NAME, usage=usage)  # our credit is used up: waiting does not help
        if error.param == "model":
            return ProviderMisconfigured(NAME, usage=usage)  # an unknown image model comes as 400
        return error_class_for_status(error.status_code)(NAME, usage=usage)
    if isinstance(error, openai.APITimeoutError):
        return ProviderTimedOut(NAME, usage=usage)
    return ProviderUnavailable(NAME, usage=usage)
