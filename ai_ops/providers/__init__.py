"""The one way this project asks an AI model for text or images, whoever runs the model.

Each provider has a file of its own here, the only importer of its SDK, with a `stream_text`, a `list_models` and a
`generate_images` that speak the types below; the last one refuses where the provider makes no images. Nothing in this
package knows about balances, and nothing in it opens a database transaction.
"""

import importlib
import re
import ssl
from collections.abc import AsyncGenerator, Iterable, Sequence, Set
from dataclasses import dataclass
from datetime import date
from functools import cache
from typing import Any, ClassVar, Literal, TypeAlias

import httpx2
from django.conf import settings

from ai_ops.providers.counts import Said
from billing.pricing import TokenPools

LIST_TIMEOUT_SECONDS = 10.0  # for the list of models, which nobody waits for with a text

REFUSED = "refused this request"

FinishReason: TypeAlias = Literal["stop", "length", "refused", "other"]

# Imported when first used: the SDKs together take two seconds to import, which the web process need not pay. The live
# one does beforehand, so that nobody waits for it.
_MODULES = {
    "openai": "ai_ops.providers.openai",
    "anthropic": "ai_ops.providers.anthropic",
    "google": "ai_ops.providers.google",
}


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a conversation. The system prompt is not a turn, it has an argument of its own."""

    role: Literal["user", "assistant"]
    text: str


@dataclass(frozen=True, slots=True)
class TextDelta:
    """The next piece of the answer, and what the provider says has been used up to its end, where it says so.

    `text` is "" where the provider spoke of the usage alone, or told its thoughts, which nobody is shown: `thought` is
    there to be counted when the reader leaves meanwhile. The reader has heard all of it, also when the stream breaks or
    is left.
    """

    text: str
    said: Said | None = None
    thought: str = ""


@dataclass(frozen=True, slots=True)
class TextEnd:
    """The last item of a stream that ended by itself."""

    finish_reason: FinishReason


TextStream: TypeAlias = AsyncGenerator[TextDelta | TextEnd, None]


@dataclass(frozen=True, slots=True)
class Image:
    """One image as a file: `media_type` is image/png, image/jpeg or image/webp, and true of the bytes."""

    data: bytes
    media_type: str


@dataclass(frozen=True, slots=True)
class Images:
    """What an image call delivered: at least one image, fewer than asked for when the provider made fewer.

    `usage` is what the provider counted (the prompt as input, the images as output), or None when it reported none.
    """

    images: tuple[Image, ...]
    usage: TokenPools | None


class ProviderError(Exception):
    """A call that failed, before or after some text had come.

    `message` is for the user: what happened and what to do. What the SDK said is in `__cause__`, for the log.
    `usage` is what a call for images used that brought none, or None where that is not known, and `spoilt_images` how
    many it made that cannot be shown. `why` tells the operator what to mend, where only they can. `kind` is what
    /metrics counts it under.
    """

    kind: ClassVar[str] = "unavailable"
    http_status: ClassVar[int] = 502
    template: ClassVar[str] = "{name} failed. Please try again in a moment, or choose another model."

    def __init__(self, name: str, *, usage: TokenPools | None = None, spoilt_images: int = 0, why: str = "") -> None:
        super().__init__(name)
        self.name = name
        self.message = self.template.format(name=name)
        self.usage = usage
        self.spoilt_images = spoilt_images
        self.why = why

    def __str__(self) -> str:
        return self.message


class ProviderMisconfigured(ProviderError):
    """Our key, our contract, our credit or what we ask is wrong: the operator has to mend it, nobody else can."""

    kind = "misconfigured"
    template = (
        "{name} did not accept our access to this model. That is not your fault, and you were not charged. "
        "Please choose another model; the operator of this site is told."
    )


class ProviderBusy(ProviderError):
    """The provider limits how much we may ask of it: time mends it."""

    kind = "busy"
    http_status = 503
    template = "{name} has too many requests right now. Please try again in a minute, or choose another model."


class ProviderRefused(ProviderError):
    """The provider does not take this text: too long or against its policy. Its author alone can mend it."""

    kind = "refused"
    http_status = 422
    template = f"{{name}} {REFUSED}. Please shorten or change the text, or choose another model."


class ProviderUnavailable(ProviderError):
    """An error on the provider's side, no connection, a stream that broke off, a broken image, or nonsense."""

    template = "{name} is not answering properly. Please try again in a moment, or choose another model."


class ProviderTimedOut(ProviderError):
    """No connection, or no further piece of the answer, within `AI_TIMEOUT_SECONDS`.

    Images come in one piece, and within `AI_IMAGE_TIMEOUT_SECONDS`.
    """

    kind = "timed_out"
    http_status = 504
    template = "{name} took too long to answer. Please try again in a moment, or choose another model."


def is_configured(provider: str) -> bool:
    """Whether there is a key for the provider: models of others are not offered."""
    return bool(getattr(settings, f"{provider.upper()}_API_KEY"))


def load_configured() -> None:
    """Import the SDKs of all providers that have a key."""
    for provider, module in _MODULES.items():
        if is_configured(provider):
            importlib.import_module(module)


def _module(provider: str) -> Any:
    if provider not in _MODULES:
        raise ProviderMisconfigured(provider)
    return importlib.import_module(_MODULES[provider])


def stream_text(
    *, provider: str, model: str, system: str, messages: Sequence[Message], max_output_tokens: int
) -> TextStream:
    """Ask `model` to answer `messages` and yield `TextDelta`s as they come, then one `TextEnd`.

    A stream that breaks raises a `ProviderError` after the deltas it has yielded; none ends without either.
    Nothing is retried, since a request that failed late may have produced tokens that nobody counted.

    Closing the generator closes the connection, which stops the provider. Leaving a loop does not close a
    generator, so read it as `async with contextlib.aclosing(stream_text(…)) as stream`.
    """
    stream: TextStream = _module(provider).stream_text(
        model=model, system=system, messages=messages, max_output_tokens=max_output_tokens
    )
    return stream


async def generate_images(*, provider: str, model: str, prompt: str, size: str, quality: str, count: int) -> Images:
    """Ask `model` for `count` images of `prompt`.

    `size` is "1024x1024", "1536x1024" or "1024x1536"; `quality` is "low", "medium", "high" or "" for the model's own
    choice. Raises a `ProviderError` when not a single image came. Nothing is retried, as with `stream_text`.

    Cancelling closes the connection, which stops the provider.
    """
    images: Images = await _module(provider).generate_images(
        model=model, prompt=prompt, size=size, quality=quality, count=count
    )
    return images


async def list_models(provider: str) -> dict[str, date | None]:
    """The models that our key may use, each with the day on which its provider ends it, where it says so.

    Raises ProviderError.
    """
    models: dict[str, date | None] = await _module(provider).list_models()
    return models


def image_file(data: bytes | None) -> Image | None:
    """`data` as an image, by what it is and not by what it was said to be; None when it is no image we can show."""
    if not data:
        return None
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        return Image(data, "image/png")
    if data.startswith(b"\xff\xd8\xff"):
        return Image(data, "image/jpeg")
    if data.startswith(b"RIFF") and data[8:12] == b"WEBP":
        return Image(data, "image/webp")
    return None


@dataclass(frozen=True, slots=True)
class KnownError:
    """A line of a provider's table of errors: who can mend what comes with one of `words`, said like `says`.

    `words` are the provider's own names for what happened: its type, code, reason or status. `says` is a regular
    expression for the message, in which case does not matter. `why` tells the operator what to mend.
    """

    means: type[ProviderError]
    words: Set[str] = frozenset()
    says: str = ""
    why: str = ""

    def fits(self, words: Set[str], message: str) -> bool:
        return (not self.words or not self.words.isdisjoint(words)) and (
            re.search(self.says, message, re.IGNORECASE) is not None
        )


def to_error(
    name: str, table: Sequence[KnownError], *, status: int, words: Iterable[Any] = (), message: Any = ""
) -> ProviderError:
    """What an error of the provider `name` means: the first line of its table that fits, else its HTTP status, which
    says the same with everyone. What only resembles a provider may put anything where a word or a message belongs."""
    said, text = {word for word in words if isinstance(word, str)}, message if isinstance(message, str) else ""
    for known in table:
        if known.fits(said, text):
            return known.means(name, why=known.why)
    return _class_for_status(status)(name)


def _class_for_status(status: int) -> type[ProviderError]:
    if status in (401, 402, 403, 404):
        return ProviderMisconfigured
    if status == 429:
        return ProviderBusy
    if status in (408, 504):
        return ProviderTimedOut
    if 400 <= status < 500:
        return ProviderRefused
    return ProviderUnavailable


def only_text(value: Any) -> str:
    """`value` when it is text, "" when it is absent. Whatever else comes is no answer that can be shown or charged:
    raises TypeError."""
    if value is None or isinstance(value, str):
        return value or ""
    raise TypeError(f"A piece of an answer is no text: {type(value).__name__}")


def each(value: Any) -> Sequence[Any]:
    """The items of a list that may be absent. Raises TypeError for what is no list."""
    if value is None or isinstance(value, list):
        return value or ()
    raise TypeError(f"What should be a list is none: {type(value).__name__}")


def part(value: Any, *names: str) -> Any:
    """What stands under these names, one inside the other; None where one is missing or is no object."""
    for name in names:
        value = value.get(name) if isinstance(value, dict) else getattr(value, name, None)
    return value


@cache
def tls_context() -> ssl.SSLContext:
    """The TLS context that all clients of this process share.

    Every call makes its own client: a client is bound to the event loop that it first ran on, and closing it
    is the surest way to stop the provider. This context alone makes a client dear (25 ms, and Google's SDK
    makes two): with it shared, a client costs less than 1 ms, next to seconds for an answer.
    """
    return httpx2.create_ssl_context()
