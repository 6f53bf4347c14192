"""What the protocols have in common: calls, answers, faults and the reading of requests.

The files named after the providers say how each of them speaks, and are as strict as the real services.
"""

import base64
import hashlib
import itertools
import json
import re
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from starlette.requests import Request

from standins.ai import count_tokens, split_tokens
from standins.ai.painting import paint
from standins.ai.writing import FAULT_MARKER, Turn, last_prompt, write

Json: TypeAlias = dict[str, Any]
FinishReason: TypeAlias = Literal["stop", "length", "refused"]

# So many tokens go into one event of a stream.
DELTA_TOKENS = 4
# What `pools` and `overrun` report as thought of and not written.
HIDDEN_TOKENS = 64
# What it thinks that has no limit, and what of it `think-on` thinks aloud.
THOUGHT_TOKENS = 256

FAULTS = {
    "400, 401, 403, 404, 413, 429, 500, 502, 503, 504, 529": "the provider's own error with this HTTP status",
    "timeout": "no answer at all, until the caller leaves",
    "stall": "a few deltas, then nothing more until the caller leaves",
    "slow": "a tenth of the usual speed",
    "cut": "the connection is closed half-way through the answer",
    "stream-error": "half the answer, then an error event inside the stream",
    "garbage": "status 200 and a body that cannot be parsed",
    "no-usage": "a complete answer without token counts",
    "refused": "the model stops with a refusal",
    "half-refused": "half the answer, then the model stops with a refusal",
    "think": "the model thinks until nothing is left of its limit, and writes not a word",
    "think-on": "the model thinks, and goes on with that until the caller leaves",
    "pools": "counts that use every pool: cache reads and writes, reasoning; Gemini shows a sketch, too",
    "overrun": "counts more output than was allowed, as hidden reasoning",
    "fewer": "the first image of this prompt never comes",
    "first-no-usage": "the answer with the first image of this prompt has no token counts",
    "not-an-image": "files that are no images",
    "not-base64": "image data that cannot be decoded",
    "recorded NAME": "the bytes that a test has put to `/control/recordings/NAME`",
}
RECORDED = "recorded "
THINKING = ("think", "think-on")
FAULT_NAMES = frozenset(name for names in FAULTS for name in names.split(", "))


def names(text: str) -> frozenset[str]:
    return frozenset(text.split())


# Calls and answers, in words of our own


class Rejected(Exception):
    """A request that the real service would not take.

    `param` is the field at fault, where there is one; `code` says more than the status, where OpenAI has such a word.
    """

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code


@dataclass(frozen=True, slots=True)
class Painting:
    """The images that a call asks for. `tokens_per_image` is what the provider counts for one."""

    width: int
    height: int
    count: int
    tokens_per_image: int
    with_text: bool = False


@dataclass(frozen=True, slots=True)
class Call:
    """One request for text, or for images if there is a `painting`."""

    model: str
    system: str
    turns: list[Turn]
    max_tokens: int | None
    stream: bool
    include_usage: bool = True
    painting: Painting | None = None

    @property
    def prompt(self) -> str:
        return last_prompt(self.turns)

    @property
    def fault(self) -> str:
        """The fault that the prompt asks for, or ''. A recording that was asked for before goes on being played."""
        match = FAULT_MARKER.search(self.prompt)
        if match:
            return match[1]
        earlier = (it[1] for turn in reversed(self.turns) for it in FAULT_MARKER.finditer(turn.text))
        return next((fault for fault in earlier if fault.startswith(RECORDED)), "")

    @property
    def input_tokens(self) -> int:
        return count_tokens(self.system) + sum(count_tokens(turn.text) for turn in self.turns)


@dataclass(frozen=True, slots=True)
class Usage:
    """Token counts in pools that exclude one another; each protocol reports them in its own way."""

    input: int
    cached: int = 0
    cache_write: int = 0
    written: int = 0
    hidden: int = 0


@dataclass(frozen=True, slots=True)
class Answer:
    """What the model says, the tokens apart, and what it costs (None: the provider keeps that to itself).

    `images` are base64, as all protocols send them.
    """

    id: str
    tokens: list[str]
    finish_reason: FinishReason
    usage: Usage | None
    images: tuple[str, ...] = ()
    thoughts: tuple[str, ...] = ()  # tokens, of what is thought before or in the place of the text

    @property
    def text(self) -> str:
        return "".join(self.tokens)

    @property
    def thought(self) -> str:
        return "".join(self.thoughts)


def compose(call: Call, number: int = 0) -> Answer:
    """The answer to a call. `number` says how many images of this prompt have been painted before."""
    digest = hashlib.sha256(json.dumps([call.model, call.system, call.turns, number]).encode()).hexdigest()[:24]
    refused = call.fault == "refused"
    if call.painting:
        images = () if refused else _paint(call, call.painting, number)
        counted = call.fault != "first-no-usage" or number > 0
        usage = _usage(call, call.painting.tokens_per_image * len(images)) if counted else None
        return Answer(digest, [], "refused" if refused else "stop", usage, images)
    if call.fault in THINKING:
        number_of_thoughts = call.max_tokens or THOUGHT_TOKENS
        musings = split_tokens(write(call.system, call.turns))
        thoughts = tuple(itertools.islice(itertools.cycle(musings), number_of_thoughts))
        usage = Usage(call.input_tokens, hidden=number_of_thoughts)
        return Answer(digest, [], "length", usage, thoughts=thoughts)
    tokens = [] if refused else split_tokens(write(call.system, call.turns))
    finish_reason: FinishReason = "refused" if refused else "stop"
    if call.fault == "half-refused":
        tokens, finish_reason = tokens[: len(tokens) // 2], "refused"
    if call.max_tokens is not None and call.max_tokens < len(tokens):
        tokens, finish_reason = tokens[: call.max_tokens], "length"
    return Answer(digest, tokens, finish_reason, _usage(call, len(tokens)))


def _paint(call: Call, painting: Painting, number: int) -> tuple[str, ...]:
    numbers = range(number, number + painting.count)
    if call.fault == "not-base64":
        return tuple("=?" for _ in numbers)
    if call.fault == "not-an-image":
        files = [b"Not an image." for _ in numbers]
    else:
        missing = 0 if call.fault == "fewer" else None
        files = [paint(call.prompt, n, painting.width, painting.height) for n in numbers if n != missing]
    return tuple(base64.b64encode(file).decode() for file in files)


def _usage(call: Call, written: int) -> Usage | None:
    if call.fault == "no-usage":
        return None
    if call.fault == "overrun":
        return Usage(input=call.input_tokens, written=written, hidden=(call.max_tokens or 0) + HIDDEN_TOKENS)
    if call.fault == "pools":
        cached, cache_write = call.input_tokens // 2, call.input_tokens // 4
        fresh = call.input_tokens - cached - cache_write
        return Usage(fresh, cached, cache_write, written, HIDDEN_TOKENS)
    return Usage(input=call.input_tokens, written=written)


# The protocols


class Protocol(ABC):
    """How one provider speaks: reading its requests, and writing its answers, events and errors."""

    name: str
    families: re.Pattern[str]

    @abstractmethod
    def has_key(self, request: Request) -> bool: ...

    @abstractmethod
    def read(self, request: Request, body: Json) -> Call:
        """Check the request as the real service does; raises `Rejected`."""

    @abstractmethod
    def error(self, error: Rejected) -> Json: ...

    @abstractmethod
    def model_list(self, models: Sequence[str]) -> Json:
        """The answer of the list of models."""

    @abstractmethod
    def whole(self, call: Call, answer: Answer) -> Json: ...

    @abstractmethod
    def opening(self, call: Call, answer: Answer) -> Iterator[bytes]: ...

    def thinking(self, call: Call, answer: Answer, tokens: Sequence[str]) -> bytes:
        """The event for a few tokens of thought. Most providers keep silent while their models think."""
        return b""

    @abstractmethod
    def delta(self, call: Call, answer: Answer, tokens: list[str], sent: int) -> bytes:
        """The event for the next few tokens, after which `sent` have been sent."""

    @abstractmethod
    def closing(self, call: Call, answer: Answer) -> Iterator[bytes]: ...

    @abstractmethod
    def stream_error(self) -> bytes:
        """An error inside a stream whose status was 200."""

    def unknown_model(self, model: str) -> str:
        return f"The model `{model}` does not exist or you do not have access to it."

    def check_model(self, model: object) -> str:
        if not isinstance(model, str) or not model:
            raise Rejected(400, "you must provide a model parameter", "model")
        if not self.families.match(model):
            raise Rejected(404, self.unknown_model(model), "model")
        return model


def event(data: Json, name: str = "") -> bytes:
    head = f"event: {name}\n" if name else ""
    return f"{head}data: {json.dumps(data, ensure_ascii=False)}\n\n".encode("utf-8", "replace")


def named_event(data: Json) -> bytes:
    """An event that is named after its type."""
    return event(data, data["type"])


def require_list(body: Json, key: str) -> list[Json]:
    items = body.get(key)
    if not isinstance(items, list) or not items or not all(isinstance(item, dict) for item in items):
        raise Rejected(400, f"'{key}' must be a list with at least one entry", key)
    return items


def positive(body: Json, key: str) -> int | None:
    value = body.get(key)
    if value is None:
        return None
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise Rejected(400, f"'{key}' must be an integer of at least 1", key)
    return value


def text_of(content: object) -> str:
    """The text of a message, given as one string or as a list of parts."""
    if isinstance(content, str):
        return content
    parts = content if isinstance(content, list) else []
    return "\n".join(part["text"] for part in parts if isinstance(part, dict) and isinstance(part.get("text"), str))


def system_of(messages: list[Json]) -> str:
    return "\n".join(text_of(item.get("content")) for item in messages if item.get("role") in ("system", "developer"))


def turns_of(messages: list[Json], key: str) -> list[Turn]:
    """The messages of the two who talk; Google calls the assistant "model", and leaves out the role of the user."""
    roles: dict[object, Literal["user", "assistant"]] = {"user": "user", "assistant": "assistant", "model": "assistant"}
    return [
        Turn(roles[message.get("role", "user")], text_of(message.get(key)))
        for message in messages
        if message.get("role", "user") in roles
    ]
