"""OpenAI's protocols: chat completions, responses and image generations."""

import re
import time
from collections.abc import Iterator, Sequence
from typing import ClassVar

from starlette.requests import Request

from standins.ai.protocols import (
    DELTA_TOKENS,
    Answer,
    Call,
    FinishReason,
    Json,
    Painting,
    Protocol,
    Rejected,
    Usage,
    event,
    named_event,
    names,
    positive,
    require_list,
    system_of,
    text_of,
    turns_of,
)
from standins.ai.writing import Turn

SERVER_ERROR = "The server had an error while processing your request. Sorry about that!"


class OpenAI(Protocol):
    """Chat completions."""

    name = "openai"
    families = re.compile(r"(?:chat)?gpt-(?!image)|o\d")
    parameters = names(
        "audio frequency_penalty function_call functions logit_bias logprobs max_completion_tokens "
        "max_tokens messages metadata modalities model moderation n parallel_tool_calls prediction "
        "presence_penalty prompt_cache_key prompt_cache_options prompt_cache_retention reasoning_effort "
        "response_format safety_identifier seed service_tier stop store stream stream_options temperature "
        "tool_choice tools top_logprobs top_p user verbosity web_search_options"
    )
    finish_reasons: ClassVar[dict[FinishReason, str]] = {
        "stop": "stop",
        "length": "length",
        "refused": "content_filter",
    }
    error_types: ClassVar[dict[int, tuple[str, str]]] = {
        401: ("invalid_request_error", "invalid_api_key"),
        403: ("invalid_request_error", "unsupported_country_region_territory"),
        404: ("invalid_request_error", "model_not_found"),
        429: ("requests", "rate_limit_exceeded"),
    }

    def has_key(self, request: Request) -> bool:
        return bool(re.fullmatch(r"Bearer \S+", request.headers.get("authorization", "")))

    def read(self, request: Request, body: Json) -> Call:
        for key in body.keys() - self.parameters:
            raise Rejected(400, f"Unknown parameter: '{key}'.", key)
        messages = require_list(body, "messages")
        for message in messages:
            if message.get("role") not in ("developer", "system", "user", "assistant", "tool"):
                raise Rejected(400, f"Invalid value: '{message.get('role')}'.", "messages[0].role")
        if "max_tokens" in body and "max_completion_tokens" in body:
            raise Rejected(400, "'max_tokens' and 'max_completion_tokens' exclude each other.", "max_tokens")
        if body.get("stream_options") and not body.get("stream"):
            message_text = "The 'stream_options' parameter is only allowed when 'stream' is enabled."
            raise Rejected(400, message_text, "stream_options")
        return Call(
            model=self.check_model(body.get("model")),
            system=system_of(messages),
            turns=turns_of(messages, "content"),
            max_tokens=positive(body, "max_completion_tokens") or positive(body, "max_tokens"),
            stream=bool(body.get("stream")),
            include_usage=not body.get("stream") or bool((body.get("stream_options") or {}).get("include_usage")),
        )

    def error(self, error: Rejected) -> Json:
        default = ("server_error", None) if error.status >= 500 else ("invalid_request_error", None)
        kind, code = self.error_types.get(error.status, default)
        return {"error": {"message": error.message, "type": kind, "param": error.param, "code": error.code or code}}

    def model_list(self, models: Sequence[str]) -> Json:
        data = [{"id": name, "object": "model", "created": 1_700_000_000, "owned_by": "openai"} for name in models]
        return {"object": "list", "data": data}

    def whole(self, call: Call, answer: Answer) -> Json:
        message: Json = {"role": "assistant", "content": answer.text, "refusal": None, "annotations": []}
        finish_reason = self.finish_reasons[answer.finish_reason]
        choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": finish_reason}
        whole = {**self._head(call, answer, "chat.completion"), "choices": [choice]}
        return {**whole, "usage": self._usage(answer.usage)} if answer.usage else whole

    def opening(self, call: Call, answer: Answer) -> Iterator[bytes]:
        yield self._chunk(call, answer, {"role": "assistant", "content": "", "refusal": None})

    def delta(self, call: Call, answer: Answer, tokens: list[str], sent: int) -> bytes:
        return self._chunk(call, answer, {"content": "".join(tokens)})

    def closing(self, call: Call, answer: Answer) -> Iterator[bytes]:
        yield self._chunk(call, answer, {}, self.finish_reasons[answer.finish_reason])
        if call.include_usage and answer.usage:
            head = self._head(call, answer, "chat.completion.chunk")
            yield event({**head, "choices": [], "usage": self._usage(answer.usage)})
        yield b"data: [DONE]\n\n"

    def stream_error(self) -> bytes:
        return event(self.error(Rejected(500, SERVER_ERROR)))

    def _head(self, call: Call, answer: Answer, kind: str) -> Json:
        head = {
            "id": f"chatcmpl-{answer.id}",
            "object": kind,
            "created": int(time.time()),
            "model": call.model,
        }
        return {**head, "service_tier": "default", "system_fingerprint": "fp_standin"}

    def _chunk(self, call: Call, answer: Answer, delta: Json, finish_reason: str | None = None) -> bytes:
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish_reason}
        chunk = {**self._head(call, answer, "chat.completion.chunk"), "choices": [choice]}
        return event({**chunk, "usage": None} if call.include_usage else chunk)

    def _usage(self, usage: Usage) -> Json:
        prompt = usage.input + usage.cached + usage.cache_write
        completion = usage.written + usage.hidden
        prompt_details = {
            "cached_tokens": usage.cached,
            "cache_write_tokens": usage.cache_write,
            "audio_tokens": 0,
        }
        return {
            "prompt_tokens": prompt,
            "completion_tokens": completion,
            "total_tokens": prompt + completion,
            "prompt_tokens_details": prompt_details,
            "completion_tokens_details": {"reasoning_tokens": usage.hidden, "audio_tokens": 0},
        }


class OpenAIResponses(OpenAI):
    """Responses: the newer way to ask OpenAI's models for text."""

    parameters = names(
        "access_programs background context_management conversation image include input instructions "
        "max_output_tokens max_tool_calls metadata model moderation parallel_tool_calls previous_response_id prompt "
        "prompt_cache_key prompt_cache_options prompt_cache_retention reasoning safety_identifier service_tier store "
        "stream stream_options temperature text tool_choice tools top_logprobs top_p truncation user"
    )
    incomplete_reasons: ClassVar[dict[FinishReason, str]] = {
        "length": "max_output_tokens",
        "refused": "content_filter",
    }
    least_output_tokens = 16
    opening_events = 4

    def read(self, request: Request, body: Json) -> Call:
        for key in body.keys() - self.parameters:
            raise Rejected(400, f"Unknown parameter: '{key}'.", key, "unknown_parameter")
        given = body.get("input")
        messages = [{"role": "user", "content": given}] if isinstance(given, str) else require_list(body, "input")
        for message in messages:
            if message.get("role") not in ("developer", "system", "user", "assistant", None):
                raise Rejected(400, f"Invalid value: '{message['role']}'.", "input[0].role", "invalid_value")
            if "role" not in message and "type" not in message:
                raise Rejected(400, "Missing required parameter: 'input[0].role'.", "input[0].role")
        max_tokens = positive(body, "max_output_tokens")
        if max_tokens is not None and max_tokens < self.least_output_tokens:
            text = (
                f"Invalid 'max_output_tokens': integer below minimum value. Expected a value >= 16, got {max_tokens}."
            )
            raise Rejected(400, text, "max_output_tokens", "integer_below_min_value")
        return Call(
            model=self.check_model(body.get("model")),
            system="\n".join((text_of(body.get("instructions")), system_of(messages))),
            turns=turns_of([message for message in messages if "role" in message], "content"),
            max_tokens=max_tokens,
            stream=bool(body.get("stream")),
        )

    def whole(self, call: Call, answer: Answer) -> Json:
        reason = self.incomplete_reasons.get(answer.finish_reason)
        return {
            **self._response(call, answer, "incomplete" if reason else "completed"),
            "incomplete_details": {"reason": reason} if reason else None,
            "output": [self._item(answer, answer.text)] if answer.tokens else [],
            "usage": self._usage(answer.usage) if answer.usage else None,
        }

    def opening(self, call: Call, answer: Answer) -> Iterator[bytes]:
        response = self._response(call, answer, "in_progress")
        yield named_event({"type": "response.created", "sequence_number": 0, "response": response})
        yield named_event({"type": "response.in_progress", "sequence_number": 1, "response": response})
        if answer.thoughts:
            item: Json = {"id": f"rs_{answer.id}", "type": "reasoning", "summary": []}
            added = {"type": "response.output_item.added", "sequence_number": 2, "output_index": 0, "item": item}
            yield named_event(added)
            return
        item = {**self._item(answer, ""), "status": "in_progress", "content": []}
        yield named_event({"type": "response.output_item.added", "sequence_number": 2, "output_index": 0, "item": item})
        yield named_event(self._part_event("content_part.added", answer, 3, part=_output_text("")))

    def delta(self, call: Call, answer: Answer, tokens: list[str], sent: int) -> bytes:
        number = self.opening_events + _ceil_div(sent, DELTA_TOKENS) - 1
        return named_event(self._part_event("output_text.delta", answer, number, delta="".join(tokens), logprobs=[]))

    def closing(self, call: Call, answer: Answer) -> Iterator[bytes]:
        number = self.opening_events + _ceil_div(len(answer.tokens), DELTA_TOKENS)
        if answer.thoughts:
            incomplete = {"type": "response.incomplete", "sequence_number": number}
            yield named_event({**incomplete, "response": self.whole(call, answer)})
            return
        yield named_event(self._part_event("output_text.done", answer, number, text=answer.text, logprobs=[]))
        yield named_event(self._part_event("content_part.done", answer, number + 1, part=_output_text(answer.text)))
        item = self._item(answer, answer.text)
        done = {"type": "response.output_item.done", "sequence_number": number + 2, "output_index": 0, "item": item}
        yield named_event(done)
        whole = self.whole(call, answer)
        yield named_event({"type": f"response.{whole['status']}", "sequence_number": number + 3, "response": whole})

    def stream_error(self) -> bytes:
        error = {"type": "error", "code": "server_error", "message": SERVER_ERROR, "param": None}
        return named_event({**error, "sequence_number": self.opening_events})

    def _response(self, call: Call, answer: Answer, status: str) -> Json:
        return {
            "id": f"resp_{answer.id}",
            "object": "response",
            "created_at": int(time.time()),
            "status": status,
            "error": None,
            "incomplete_details": None,
            "instructions": None,
            "max_output_tokens": call.max_tokens,
            "metadata": {},
            "model": call.model,
            "output": [],
            "parallel_tool_calls": True,
            "previous_response_id": None,
            "reasoning": {"effort": None, "summary": None},
            "service_tier": "default",
            "store": True,
            "temperature": 1.0,
            "text": {"format": {"type": "text"}},
            "tool_choice": "auto",
            "tools": [],
            "top_p": 1.0,
            "truncation": "disabled",
            "usage": None,
            "user": None,
        }

    def _item(self, answer: Answer, text: str) -> Json:
        status = "completed" if answer.finish_reason == "stop" else "incomplete"
        item = {"id": f"msg_{answer.id}", "type": "message", "role": "assistant", "status": status}
        return {**item, "content": [_output_text(text)]}

    def _part_event(self, name: str, answer: Answer, number: int, **fields: object) -> Json:
        place = {"item_id": f"msg_{answer.id}", "output_index": 0, "content_index": 0}
        return {"type": f"response.{name}", "sequence_number": number, **place, **fields}

    def _usage(self, usage: Usage) -> Json:
        read, written = usage.input + usage.cached + usage.cache_write, usage.written + usage.hidden
        return {
            "input_tokens": read,
            "input_tokens_details": {"cached_tokens": usage.cached, "cache_write_tokens": usage.cache_write},
            "output_tokens": written,
            "output_tokens_details": {"reasoning_tokens": usage.hidden},
            "total_tokens": read + written,
        }


def _output_text(text: str) -> Json:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}


def _ceil_div(number: int, by: int) -> int:
    return -(-number // by)


class OpenAIImages(OpenAI):
    """Image generations of the GPT Image family: base64 in one answer, no streams."""

    families = re.compile(r"(?:chat)?gpt-image-")
    retired = re.compile(r"dall-e-|gpt-image-1$")
    any_size = re.compile(r"gpt-image-2")
    parameters = names(
        "background complexity frame_count frame_duration_ms model moderation n output_compression output_format "
        "partial_images prompt quality response_format safety_identifier size stream style svg user"
    )
    # In the SDK for models that are gone.
    retired_parameters = names("response_format style")
    sizes = ("1024x1024", "1536x1024", "1024x1536", "auto")
    qualities = ("low", "medium", "high", "auto")
    most_images = 10
    most_prompt_characters = 32_000
    # What GPT Image 2 counts for a square image of 1024 × 1024 pixels, and for a wide or tall one of half as many more.
    square_tokens: ClassVar[dict[object, int]] = {"low": 200, "medium": 1767, "auto": 1767, "high": 7033}
    oblong_tokens: ClassVar[dict[object, int]] = {"low": 167, "medium": 1367, "auto": 1367, "high": 5500}

    def check_model(self, model: object) -> str:
        if isinstance(model, str) and self.retired.match(model):
            gone = "has been deprecated, learn more here: https://platform.openai.com/docs/deprecations"
            raise Rejected(404, f"The model `{model}` {gone}", "model")
        if isinstance(model, str) and model and not self.families.match(model):
            raise Rejected(400, f"Invalid value: '{model}'.", "model", "invalid_value")
        return super().check_model(model)

    def read(self, request: Request, body: Json) -> Call:
        for key in body.keys() - (self.parameters - self.retired_parameters):
            raise Rejected(400, f"Unknown parameter: '{key}'.", key, "unknown_parameter")
        model, prompt = self.check_model(body.get("model")), body.get("prompt")
        if not isinstance(prompt, str) or not 0 < len(prompt) <= self.most_prompt_characters:
            raise Rejected(400, "'prompt' must be a string of 1 to 32000 characters.", "prompt")
        for key, known in (("quality", self.qualities), ("output_format", ("png",)), ("stream", (False,))):
            if body.get(key) not in (None, *known):
                text = f"Invalid value: '{body[key]}'. The stand-in supports {', '.join(map(str, known))}."
                raise Rejected(400, text, key, "invalid_value")
        count = positive(body, "n") or 1
        if count > self.most_images:
            raise Rejected(400, f"Invalid 'n': integer above maximum value. Expected a value <= 10, got {count}.", "n")
        width, height = self._size(model, body.get("size") or "auto")
        tokens = (self.square_tokens if width == height else self.oblong_tokens)[body.get("quality") or "auto"]
        painting = Painting(width, height, count, tokens)
        return Call(model, "", [Turn("user", prompt)], None, stream=False, painting=painting)

    def _size(self, model: str, size: object) -> tuple[int, int]:
        """Width and height in pixels."""
        if size == "auto":
            return 1024, 1024
        match = re.fullmatch(r"(\d{1,4})x(\d{1,4})", size) if isinstance(size, str) else None
        width, height = (int(match[1]), int(match[2])) if match else (0, 0)
        free = self.any_size.match(model) and width % 16 == height % 16 == 0 < min(width, height)
        if size not in self.sizes and not (free and max(width, height) <= min(3840, 3 * min(width, height))):
            known = ", ".join(f"'{name}'" for name in self.sizes)
            raise Rejected(400, f"Invalid value: '{size}'. Supported values are: {known}.", "size", "invalid_value")
        return width, height

    def error(self, error: Rejected) -> Json:
        body = super().error(error)
        if error.code == "moderation_blocked":
            body["error"]["type"] = "image_generation_user_error"
        return body

    def whole(self, call: Call, answer: Answer) -> Json:
        if answer.finish_reason == "refused":
            raise Rejected(400, "Your request was rejected by the safety system.", code="moderation_blocked")
        whole: Json = {"created": int(time.time()), "background": "opaque", "output_format": "png"}
        if call.painting:
            whole["size"] = f"{call.painting.width}x{call.painting.height}"
        data = [{"b64_json": image} for image in answer.images]
        return {**whole, "data": data, **({"usage": self._usage(answer.usage)} if answer.usage else {})}

    def _usage(self, usage: Usage) -> Json:
        read, painted = usage.input + usage.cached + usage.cache_write, usage.written + usage.hidden
        return {
            "input_tokens": read,
            "input_tokens_details": {"text_tokens": read, "image_tokens": 0},
            "output_tokens": painted,
            "output_tokens_details": {"text_tokens": 0, "image_tokens": painted},
            "total_tokens": read + painted,
        }
