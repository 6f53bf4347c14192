"""Text and images from Google's Gemini API: the only importer of `google.genai`."""

import asyncio
import re
from collections.abc import Sequence
from dataclasses import replace
from datetime import date
from fractions import Fraction
from typing import Any

import httpx2
from django.conf import settings
from google import genai
from google.genai import errors, types
from google.genai.client import AsyncClient
from pydantic import BaseModel, ValidationError, ValidatorFunctionWrapHandler, WrapValidator

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
    part,
    tls_context,
    to_error,
)
from ai_ops.providers.counts import MOST_IMAGE_TOKENS, Said, count_call
from billing.pricing import TokenPools

NAME = "Google"
# The SDK announces its timeout, which for us is the wait for one chunk, as the deadline of the whole answer.
WHOLE_ANSWER_SECONDS = 600
FINISH_REASONS: dict[str, FinishReason] = {"STOP": "stop", "MAX_TOKENS": "length", "CONTINUATION": "length"}
# Of what was asked for or written. New ones come every few months, and their names say it.
REFUSALS = re.compile(r"SAFETY|PROHIBITED|RECITATION|BLOCK|LANGUAGE|SPII|ARMOR|ESCALATION|JAILBREAK|POLICY|FILTER|HARM")
# The account is limited for what it was used for before: nobody's text of now mends that.
ACCOUNT_LIMITED = "PUP_LIMITED_DISABLED"

OVER_QUOTA = "Our credit there is used up, or a limit on what we may use in a day or spend is reached."


def _let_pass(model: type[BaseModel], *names: str) -> None:
    """The SDK throws a whole answer away for a count of the wrong type: such a one stays as it came, for `counts` to
    judge. What is of the right type is as the SDK makes it."""
    for name in names:
        model.model_fields[name].metadata.append(WrapValidator(_checked_or_raw))
    model.model_rebuild(force=True)


def _checked_or_raw(value: Any, check: ValidatorFunctionWrapHandler) -> Any:
    try:
        return check(value)
    except ValidationError:
        return value


_let_pass(types.Candidate, "token_count", "avg_logprobs")
_let_pass(types.GenerateContentResponse, "usage_metadata")

ERRORS = (
    KnownError(
        ProviderMisconfigured,
        {
            *("API_KEY_INVALID", "API_KEY_EXPIRED", "API_KEY_SERVICE_BLOCKED", "API_KEY_HTTP_REFERRER_BLOCKED"),
            *("API_KEY_IP_ADDRESS_BLOCKED", "API_KEY_ANDROID_APP_BLOCKED", "API_KEY_IOS_APP_BLOCKED"),
            *("SERVICE_DISABLED", "BILLING_DISABLED", "CONSUMER_SUSPENDED", "CONSUMER_INVALID", "USER_PROJECT_DENIED"),
            *("ACCESS_TOKEN_EXPIRED", "ACCESS_TOKEN_TYPE_UNSUPPORTED", "ACCESS_TOKEN_SCOPE_INSUFFICIENT"),
            *("ACCOUNT_STATE_INVALID", "UNAUTHENTICATED", "PERMISSION_DENIED"),
        },
        why="Our key is not valid there, may not do this, or its project has no billing.",
    ),
    KnownError(ProviderMisconfigured, says=r"api[ _]key", why="Our key is not valid there."),
    KnownError(
        ProviderMisconfigured,
        {"FAILED_PRECONDITION"},
        why="Our project there has no billing, or Google does not serve the place that we call from.",
    ),
    KnownError(ProviderMisconfigured, {"NOT_FOUND"}, why="The model has ended, or our key may not use it."),
    # A limit that a minute mends and one that only the operator mends come with the same status and the same words:
    # the name of the limit alone tells. One of a day is the operator's to raise.
    KnownError(
        ProviderMisconfigured,
        says=r"per ?day|limit: 0\b|prepay|depleted|spend(ing)? (cap|limit)|dunning|billing.{0,9} not enabled",
        why=OVER_QUOTA,
    ),
    KnownError(ProviderBusy, {"RETRY_INFO", "RATE_LIMIT_EXCEEDED"}),
    KnownError(ProviderBusy, says=r"per ?(minute|second)|retry in"),
    KnownError(
        ProviderMisconfigured, {"RESOURCE_EXHAUSTED"}, says=r"exceeded your current quota|billing", why=OVER_QUOTA
    ),
    KnownError(ProviderBusy, {"RESOURCE_EXHAUSTED"}),
    KnownError(ProviderTimedOut, {"DEADLINE_EXCEEDED"}),
    KnownError(
        ProviderRefused,
        says=r"token count.*exceeds|maximum number of tokens|payload size|too (long|large)|safety|blocked|polic",
    ),
    KnownError(
        ProviderMisconfigured,
        {"INVALID_ARGUMENT", "OUT_OF_RANGE", "UNIMPLEMENTED"},
        says=r"unknown name|generation_?config|response modalit|valid role|aspect ratio|image size|thinking|budget"
        r"|not (supported|enabled|allowed)|does not support|request contains an invalid argument",
        why="The model does not take what we ask of it: see its limits in the catalogue.",
    ),
    KnownError(ProviderRefused, {"INVALID_ARGUMENT", "OUT_OF_RANGE"}),
)


async def stream_text(*, model: str, system: str, messages: Sequence[Message], max_output_tokens: int) -> TextStream:
    """See `ai_ops.providers.stream_text`. Every chunk has the usage so far."""
    finish_reason: str | None = None
    first: int | None = None
    blocked = False
    client, contents = _client(settings.AI_TIMEOUT_SECONDS), _contents(messages)
    config = _config(system_instruction=system or None, max_output_tokens=max_output_tokens)
    try:
        # The SDK's stream cannot be closed, its client can: that closes the connection at once.
        async with client.aio as aio:
            stream = await aio.models.generate_content_stream(model=model, contents=contents, config=config)
            async for chunk in stream:
                blocked = blocked or _is_blocked(chunk)
                text = thought = ""
                for candidate in chunk.candidates or ():
                    # We ask for one. Of several the first that speaks is the answer, and all are counted.
                    number = candidate.index or 0
                    first = number if first is None else first
                    if number != first:
                        continue
                    text += _text(candidate)
                    thought += _text(candidate, is_thought=True)
                    if candidate.finish_reason:
                        finish_reason = candidate.finish_reason.value
                said = _said(chunk.usage_metadata) if chunk.usage_metadata else None
                if text or said or thought:
                    yield TextDelta(text, said, thought)
    except Exception as error:
        # When its end has been said, a connection that breaks takes nothing away from the answer.
        if finish_reason is None or not isinstance(error, httpx2.TransportError):
            raise _translate(error) from error
    if blocked:
        raise ProviderRefused(NAME)
    if finish_reason is None:
        raise ProviderUnavailable(NAME)
    if finish_reason == ACCOUNT_LIMITED:
        raise _account_limited()
    yield TextEnd(_meaning(finish_reason))


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
    # Of a failure that was not counted nothing is known to be charged. An image that was not counted costs its price,
    # and a sum of the others would pass for the whole: then that of the words alone is told.
    usages = [outcome.usage for outcome in delivered] + [failure.usage for failure in failures]
    counted = [usage for usage in usages if usage]
    if not all(outcome.usage and outcome.usage.picture_tokens for outcome in delivered):
        counted = [replace(it, output_tokens=it.output_tokens - it.picture_tokens) for it in counted]
    return Images(tuple(image for outcome in delivered for image in outcome.images), _sum(counted))


async def _generate_image(aio: AsyncClient, model: str, prompt: str, config: types.GenerateContentConfig) -> Images:
    usage: TokenPools | None = None
    try:
        answer = await aio.models.generate_content(model=model, contents=prompt, config=config)
        image, reasons = _image(answer), _reasons(answer)
        if answer.usage_metadata:
            said = _said(answer.usage_metadata)
            if not _has_files(answer):  # then all that it wrote are words, whether or not they have a name
                said = replace(said, text_output=said.output)
            usage = count_call(said, prompt_tokens=0, text_tokens=0, most_written_tokens=MOST_IMAGE_TOKENS).pools
    except Exception as error:
        raise _translate(error) from error
    if image is None:
        if ACCOUNT_LIMITED in reasons:
            raise _account_limited()
        refused = _is_blocked(answer) or any(_meaning(reason) == "refused" for reason in reasons)
        raise (ProviderRefused if refused else ProviderUnavailable)(NAME, usage=usage)
    return Images((image,), usage)


async def list_models() -> dict[str, date | None]:
    """See `ai_ops.providers.list_models`. Google does not say here when a model ends."""
    try:
        async with _client(LIST_TIMEOUT_SECONDS).aio as aio:
            models = await aio.models.list()
            return {(model.name or "").removeprefix("models/"): None async for model in models}
    except Exception as error:
        raise _translate(error) from error


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


def _text(candidate: types.Candidate, *, is_thought: bool = False) -> str:
    parts = (candidate.content and candidate.content.parts) or ()
    return "".join(part.text for part in parts if part.text and bool(part.thought) == is_thought)


def _image(answer: types.GenerateContentResponse) -> Image | None:
    """The first usable image of an answer that is not a sketch made while thinking."""
    candidates = answer.candidates or ()
    parts = (part for candidate in candidates for part in (candidate.content and candidate.content.parts) or ())
    files = (image_file(part.inline_data.data) for part in parts if part.inline_data and not part.thought)
    return next((file for file in files if file), None)


def _has_files(answer: types.GenerateContentResponse) -> bool:
    """Whether there is any in it, usable or not."""
    contents = [candidate.content for candidate in answer.candidates or () if candidate.content]
    return any(part.inline_data for content in contents for part in content.parts or ())


def _reasons(answer: types.GenerateContentResponse) -> list[str]:
    return [candidate.finish_reason.value for candidate in answer.candidates or () if candidate.finish_reason]


def _meaning(reason: str) -> FinishReason:
    return FINISH_REASONS.get(reason) or ("refused" if REFUSALS.search(reason) else "other")


def _is_blocked(answer: types.GenerateContentResponse) -> bool:
    """The prompt itself was refused, so there are no candidates."""
    return bool(answer.prompt_feedback and answer.prompt_feedback.block_reason)


def _said(usage: Any) -> Said:
    """Google counts what came from its cache as prompt, and thoughts apart from the candidates; what tools brought is
    in neither. Of the candidates it names some modalities: what has no name is words beside images that have one, and
    images beside words."""
    if isinstance(usage, BaseModel):
        usage = usage.model_dump(mode="json", by_alias=True)
    written = _by_modality(part(usage, "candidatesTokensDetails"))
    read = _by_modality(part(usage, "promptTokensDetails"))
    others = sum(tokens for modality, tokens in written.items() if modality not in ("TEXT", "MODALITY_UNSPECIFIED"))
    candidates = part(usage, "candidatesTokenCount") or sum(written.values()) or part(usage, "candidatesTokenCount")
    words = max(0, candidates - others) if others and type(candidates) is int else written.get("TEXT")
    return Said(
        input=part(usage, "promptTokenCount"),
        tool_input=part(usage, "toolUsePromptTokenCount"),
        cached_input=part(usage, "cachedContentTokenCount"),
        image_input=read.get("IMAGE"),
        audio_input=read.get("AUDIO"),
        output=candidates,
        text_output=words,
        audio_output=written.get("AUDIO"),
        reasoning=part(usage, "thoughtsTokenCount"),
        total=part(usage, "totalTokenCount"),
        is_cache_in_input=True,
        is_reasoning_in_output=False,
    )


def _by_modality(details: Any) -> dict[str, int]:
    """The tokens of each kind that has a name and a number."""
    tokens: dict[str, int] = {}
    for detail in details if isinstance(details, list) else ():
        modality, count = part(detail, "modality") or "TEXT", part(detail, "tokenCount")
        if isinstance(modality, str) and type(count) is int and count > 0:
            tokens[modality] = tokens.get(modality, 0) + count
    return tokens


def _sum(pools: list[TokenPools]) -> TokenPools | None:
    """All pools together, None when nothing was counted."""
    return sum(pools, TokenPools()) if pools else None


def _account_limited() -> ProviderError:
    return ProviderMisconfigured(NAME, why="Google has limited our account for what it was used for.")


def _translate(error: Exception) -> ProviderError:
    """What an exception means. The SDK lets errors of its HTTP library and of JSON through."""
    if isinstance(error, errors.APIError):
        said = part(error.details, "error") or error.details
        try:
            details = [it for it in each(part(said, "details")) if isinstance(it, dict)]
        except TypeError:
            details = []
        words = [error.status, *(part(it, "reason") for it in details)]
        words += ["RETRY_INFO" for it in details if "retryDelay" in it]
        return to_error(
            NAME,
            ERRORS,
            status=error.code if isinstance(error.code, int) else 0,
            words=words,
            # The limits that were passed stand beside the message.
            message=f"{error.message} {[it.get('violations') for it in details if it.get('violations')]}",
        )
    if isinstance(error, httpx2.TimeoutException):
        return ProviderTimedOut(NAME)
    return ProviderUnavailable(NAME)
