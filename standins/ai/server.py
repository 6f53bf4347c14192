"""The endpoints of the stand-in, the pace of its answers and its log."""

import asyncio
import json
import time
from collections import Counter, deque
from dataclasses import asdict, dataclass, field

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from standins.ai.anthropic import Anthropic
from standins.ai.google import Google
from standins.ai.openai import OpenAI, OpenAIImages, OpenAIResponses
from standins.ai.protocols import (
    DELTA_TOKENS,
    FAULT_NAMES,
    RECORDED,
    THOUGHT_TOKENS,
    Call,
    Json,
    Protocol,
    Rejected,
    compose,
)

LOG_LENGTH = 200
# The providers send bursts: a group of deltas in one write, then a pause.
GROUP_TOKENS = 32
# Images of one call take as long as so much text.
IMAGE_PACE_TOKENS = 400

# What the lists of models name; any other of the same families is served, too.
MODELS = {
    "openai": (
        *("gpt-6.1-terra", "gpt-6.1-sol", "gpt-6-luna", "gpt-5-mini", "gpt-image-2", "gpt-image-2.5-flare"),
        "gpt-image-2.5-sunburst",
    ),
    "anthropic": ("claude-opus-5-5", "claude-sonnet-5-5", "claude-haiku-5-5"),
    "google": (
        *("gemini-3.8-flash", "gemini-3.5-flash-lite", "gemini-2.5-pro", "gemini-2.5-flash"),
        *("gemini-3.1-flash-image", "gemini-3-pro-image", "gemini-3.1-flash-lite-image"),
    ),
}


@dataclass(slots=True)
class Record:
    """One line of the request log. Times are Unix seconds; `finished` is None while the request runs."""

    provider: str
    model: str = ""
    prompt: str = ""
    fault: str = ""
    stream: bool = False
    status: int = 200
    started: float = field(default_factory=time.time)
    finished: float | None = None
    disconnected: bool = False
    input_tokens: int = 0
    output_tokens_sent: int = 0
    thought_tokens: int = 0
    images_sent: int = 0


@dataclass(frozen=True, slots=True)
class Recording:
    """An answer as somebody recorded it; then the connection ends, is cut, or stays silent until the reader leaves."""

    body: bytes
    status: int
    media_type: str
    then: str  # "end", "cut" or "stall"


class Server:
    """The endpoints, their pace and their log."""

    def __init__(self, tokens_per_second: float) -> None:
        self.tokens_per_second = tokens_per_second
        self.records: deque[Record] = deque(maxlen=LOG_LENGTH)
        self.recordings: dict[str, Recording] = {}
        self.painted: Counter[str] = Counter()  # images by prompt: the next one of a prompt is another one

    def app(self) -> Starlette:
        openai, anthropic, google = OpenAI(), Anthropic(), Google()
        return Starlette(
            routes=[
                Route("/control/requests", self.show_requests),
                Route("/control/recordings/{name}", self.keep_recording, methods=["PUT"]),
                self._post("/openai/v1/chat/completions", openai),
                self._post("/openai/v1/responses", OpenAIResponses()),
                self._post("/openai/v1/images/generations", OpenAIImages()),
                self._models("/openai/v1/models", openai),
                self._post("/anthropic/v1/messages", anthropic),
                self._post("/anthropic/v1/messages/count_tokens", anthropic),
                self._models("/anthropic/v1/models", anthropic),
                self._models("/google/v1/models", google),
                self._models("/google/v1beta/models", google),
                self._post("/google/v1/models/{model}:{method}", google),
                self._post("/google/v1beta/models/{model}:{method}", google),
            ]
        )

    def _post(self, path: str, protocol: Protocol) -> Route:
        async def endpoint(request: Request) -> Response:
            return await self.answer(protocol, request)

        return Route(path, endpoint, methods=["POST"])

    async def show_requests(self, request: Request) -> Response:
        return _json({"requests": [asdict(record) for record in self.records]})

    async def keep_recording(self, request: Request) -> Response:
        """What the fault `recorded NAME` plays from now on. Query: `status`, `type` and `then`."""
        query = request.query_params
        self.recordings[request.path_params["name"]] = Recording(
            await request.body(),
            int(query.get("status", 200)),
            query.get("type", "text/event-stream"),
            query.get("then", "end"),
        )
        return _json({})

    def _models(self, path: str, protocol: Protocol) -> Route:
        async def endpoint(request: Request) -> Response:
            if not protocol.has_key(request):
                return _json(protocol.error(Rejected(401, "No API key was provided, or it is not valid.")), 401)
            return _json(protocol.model_list(MODELS[protocol.name]))

        return Route(path, endpoint)

    async def answer(self, protocol: Protocol, request: Request) -> Response:
        record = Record(protocol.name)
        self.records.append(record)
        try:
            call = await self._read(protocol, request)
            record.model, record.prompt, record.fault = call.model, call.prompt[:120], call.fault
            record.stream, record.input_tokens = call.stream, call.input_tokens
            if call.fault.startswith(RECORDED):
                return Replay(self.recordings[call.fault.removeprefix(RECORDED)], record)
            if "count" in request.url.path.rpartition("/")[2]:
                response: Response = _json(_count(protocol, call))
            else:
                _raise_status_fault(call.fault)
                return await self._generate(protocol, request, call, record)
        except Rejected as error:
            record.status = error.status
            headers = {"retry-after": "1"} if error.status == 429 else None
            response = _json(protocol.error(error), error.status, headers)
        record.finished = time.time()
        return response

    async def _read(self, protocol: Protocol, request: Request) -> Call:
        body = await request.body()
        if not protocol.has_key(request):
            raise Rejected(401, "No API key was provided, or it is not valid.")
        if request.path_params.get("method", "countTokens") not in (
            "generateContent",
            "streamGenerateContent",
            "countTokens",
        ):
            raise Rejected(404, f"Method not found: {request.path_params['method']}")
        try:
            parsed = json.loads(body)
        except (ValueError, RecursionError):
            parsed = None
        if not isinstance(parsed, dict):
            raise Rejected(400, "We could not parse the JSON body of your request.")
        call = protocol.read(request, parsed)
        is_recorded = call.fault.startswith(RECORDED) and call.fault.removeprefix(RECORDED) in self.recordings
        if call.fault and call.fault not in FAULT_NAMES and not is_recorded:
            raise Rejected(400, f"Unknown fault {call.fault!r}; known are {', '.join(sorted(FAULT_NAMES))}.")
        return call

    async def _generate(self, protocol: Protocol, request: Request, call: Call, record: Record) -> Response:
        pace = self.tokens_per_second / (10 if call.fault == "slow" else 1)
        if call.stream and call.fault != "timeout":
            return Performance(protocol, call, record, pace)
        gone = asyncio.ensure_future(_until_gone(request.receive))
        painted = self.painted[call.prompt]
        self.painted[call.prompt] += call.painting.count if call.painting else 0
        answer = await asyncio.to_thread(compose, call, painted)  # painting may take a second
        work_tokens = IMAGE_PACE_TOKENS if call.painting else len(answer.tokens) + len(answer.thoughts)
        hangs = call.fault in ("timeout", "stall", "think-on")
        await asyncio.wait({gone}, timeout=None if hangs else work_tokens / pace)
        record.disconnected, record.finished = gone.done(), time.time()
        gone.cancel()
        if record.disconnected:
            return Response(status_code=499)
        body = json.dumps(protocol.whole(call, answer)).encode()
        record.output_tokens_sent = len(answer.tokens)
        record.images_sent = len(answer.images)
        if call.fault in ("garbage", "stream-error"):
            body = body[: len(body) // 2]
        return (Torn if call.fault == "cut" else Response)(body, media_type="application/json")


class Replay(Response):
    """A recording, byte for byte."""

    def __init__(self, recording: Recording, record: Record) -> None:
        super().__init__(recording.body, recording.status, media_type=recording.media_type)
        if recording.then != "end":
            del self.headers["content-length"]
        self.recording, self.record = recording, record

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        await send({"type": "http.response.body", "body": self.body, "more_body": self.recording.then != "end"})
        if self.recording.then == "stall":
            await _until_gone(receive)
            self.record.disconnected = True
        self.record.status, self.record.finished = self.status_code, time.time()


class Torn(Response):
    """A response whose connection closes half-way through the body."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        half = self.body[: len(self.body) // 2]
        await send({"type": "http.response.body", "body": half, "more_body": True})


class Performance(Response):
    """One streamed answer, played at a pace and stopped as soon as the reader leaves.

    To return without having sent the end makes uvicorn close the connection, which is how a stream is cut.
    """

    def __init__(self, protocol: Protocol, call: Call, record: Record, tokens_per_second: float) -> None:
        super().__init__(media_type="text/event-stream", headers={"cache-control": "no-cache"})
        del self.headers["content-length"]
        self.protocol, self.call, self.record = protocol, call, record
        self.tokens_per_second = tokens_per_second
        self.answer = compose(call)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.send = send
        self.gone = asyncio.ensure_future(_until_gone(receive))
        try:
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            await self._play()
        finally:
            self.gone.cancel()
            self.record.finished = time.time()

    async def _play(self) -> None:
        protocol, call, answer = self.protocol, self.call, self.answer
        if call.fault == "garbage":
            return await self._write(b'event: message_start\ndata: {"choices": [{"delta": {"cont\n\n', last=True)
        await self._write(b"".join(protocol.opening(call, answer)))
        if answer.thoughts and not await self._think():
            return None
        half = len(answer.tokens) // 2
        for start in range(0, len(answer.tokens), GROUP_TOKENS):
            if await self._left_within(min(GROUP_TOKENS, len(answer.tokens) - start) / self.tokens_per_second):
                return None
            if call.fault in ("cut", "stream-error") and start >= half:
                return await self._break_off()
            await self._write_group(start)
            if call.fault == "stall":
                await self._left_within(None)
                return None
        if call.fault in ("cut", "stream-error"):
            return await self._break_off()
        return await self._write(b"".join(protocol.closing(call, answer)), last=True)

    async def _think(self) -> bool:
        """Think at the pace of writing; says whether the reader is still there at the end of it."""
        thoughts = self.answer.thoughts[: THOUGHT_TOKENS if self.call.fault == "think-on" else None]
        for start in range(0, len(thoughts), GROUP_TOKENS):
            group = thoughts[start : start + GROUP_TOKENS]
            if await self._left_within(len(group) / self.tokens_per_second):
                return False
            await self._write(self.protocol.thinking(self.call, self.answer, group))
            self.record.thought_tokens = start + len(group)
        return not (self.call.fault == "think-on" and await self._left_within(None))

    async def _write_group(self, start: int) -> None:
        group = self.answer.tokens[start : start + GROUP_TOKENS]
        events = [
            self.protocol.delta(
                self.call, self.answer, group[at : at + DELTA_TOKENS], start + len(group[: at + DELTA_TOKENS])
            )
            for at in range(0, len(group), DELTA_TOKENS)
        ]
        await self._write(b"".join(events))
        self.record.output_tokens_sent = start + len(group)

    async def _break_off(self) -> None:
        if self.call.fault == "stream-error":
            await self._write(self.protocol.stream_error(), last=True)

    async def _write(self, body: bytes, *, last: bool = False) -> None:
        await self.send({"type": "http.response.body", "body": body, "more_body": not last})

    async def _left_within(self, seconds: float | None) -> bool:
        """Wait so long, or until the reader has left (None: for ever); says whether the reader has."""
        await asyncio.wait({self.gone}, timeout=seconds)
        self.record.disconnected = self.gone.done()
        return self.record.disconnected


def _json(data: Json, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    """Escaped to ASCII: what a caller sent may hold half a character, which has no UTF-8."""
    return Response(json.dumps(data), status, headers, media_type="application/json")


async def _until_gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def _count(protocol: Protocol, call: Call) -> Json:
    if protocol.name == "google":
        details = [{"modality": "TEXT", "tokenCount": call.input_tokens}]
        return {"totalTokens": call.input_tokens, "promptTokensDetails": details}
    return {"input_tokens": call.input_tokens}


def _raise_status_fault(fault: str) -> None:
    if fault.isdigit():
        raise Rejected(int(fault), f"The stand-in was asked to fail with {fault}.")
