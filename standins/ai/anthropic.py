"""Anthropic's protocol: messages, and counting their tokens."""

import re
from collections.abc import Iterator, Sequence
from typing import ClassVar

from starlette.requests import Request

from standins.ai.protocols import (
    Answer,
    Call,
    FinishReason,
    Json,
    Protocol,
    Rejected,
    Usage,
    named_event,
    names,
    positive,
    require_list,
    system_of,
    text_of,
    turns_of,
)

SIGNATURE = "c3RhbmQtaW4="  # opaque to everybody


class Anthropic(Protocol):
    """Messages."""

    name = "anthropic"
    families = re.compile(r"claude-")
    count_parameters = names(
        "cache_control messages model output_config speed system thinking tool_choice tools user_profile_id "
        "workspace_id"
    )
    parameters = count_parameters | names(
        "container diagnostics inference_geo max_tokens metadata service_tier stop_sequences stream "
        "temperature top_k top_p"
    )
    finish_reasons: ClassVar[dict[FinishReason, str]] = {
        "stop": "end_turn",
        "length": "max_tokens",
        "refused": "refusal",
    }
    error_types: ClassVar[dict[int, str]] = {
        400: "invalid_request_error",
        401: "authentication_error",
        403: "permission_error",
        404: "not_found_error",
        413: "request_too_large",
        429: "rate_limit_error",
        504: "timeout_error",
        529: "overloaded_error",
    }

    def has_key(self, request: Request) -> bool:
        return bool(request.headers.get("x-api-key") or request.headers.get("authorization"))

    def read(self, request: Request, body: Json) -> Call:
        counting = request.url.path.endswith("/count_tokens")
        if "anthropic-version" not in request.headers:
            raise Rejected(400, "anthropic-version: header is required")
        for key in body.keys() - (self.count_parameters if counting else self.parameters):
            raise Rejected(400, f"{key}: Extra inputs are not permitted", key)
        max_tokens = positive(body, "max_tokens")
        if max_tokens is None and not counting:
            raise Rejected(400, "max_tokens: Field required", "max_tokens")
        messages = require_list(body, "messages")
        for message in messages:
            if message.get("role") not in ("user", "assistant", "system") or not text_of(message.get("content")):
                raise Rejected(400, "messages: a known role and non-empty content are required")
        return Call(
            model=self.check_model(body.get("model")),
            system="\n".join((text_of(body.get("system")), system_of(messages))),
            turns=turns_of(messages, "content"),
            max_tokens=max_tokens,
            stream=bool(body.get("stream")),
        )

    def unknown_model(self, model: str) -> str:
        return f"model: {model}"

    def error(self, error: Rejected) -> Json:
        kind = self.error_types.get(error.status, "api_error" if error.status >= 500 else "invalid_request_error")
        return {"type": "error", "error": {"type": kind, "message": error.message}, "request_id": "req_standin"}

    def model_list(self, models: Sequence[str]) -> Json:
        of_all = {"type": "model", "created_at": "2026-01-01T00:00:00Z", "lifecycle": "active"}
        data = [{"id": name, "display_name": name, **of_all} for name in models]
        return {"data": data, "first_id": models[0], "last_id": models[-1], "has_more": False}

    def whole(self, call: Call, answer: Answer) -> Json:
        stop_reason = self.finish_reasons[answer.finish_reason]
        content: list[Json] = [{"type": "text", "text": answer.text}] if answer.tokens else []
        if answer.thoughts:
            content.insert(0, {"type": "thinking", "thinking": answer.thought, "signature": SIGNATURE})
        message = {**self._message(call, answer), "content": content, "stop_reason": stop_reason}
        return {**message, "usage": self._usage(answer.usage)} if answer.usage else message

    def opening(self, call: Call, answer: Answer) -> Iterator[bytes]:
        message = self._message(call, answer)
        if answer.usage:
            # The output so far counts one token, as with the real service.
            message["usage"] = {
                **self._usage(answer.usage),
                "output_tokens": 1,
                "output_tokens_details": None,
            }
        yield named_event({"type": "message_start", "message": message})
        block = {"type": "text", "text": ""}
        if answer.thoughts:
            block = {"type": "thinking", "thinking": "", "signature": ""}
        yield named_event({"type": "content_block_start", "index": 0, "content_block": block})
        yield named_event({"type": "ping"})

    def thinking(self, call: Call, answer: Answer, tokens: Sequence[str]) -> bytes:
        delta = {"type": "thinking_delta", "thinking": "".join(tokens)}
        return named_event({"type": "content_block_delta", "index": 0, "delta": delta})

    def delta(self, call: Call, answer: Answer, tokens: list[str], sent: int) -> bytes:
        delta = {"type": "text_delta", "text": "".join(tokens)}
        return named_event({"type": "content_block_delta", "index": 0, "delta": delta})

    def closing(self, call: Call, answer: Answer) -> Iterator[bytes]:
        if answer.thoughts:
            delta = {"type": "signature_delta", "signature": SIGNATURE}
            yield named_event({"type": "content_block_delta", "index": 0, "delta": delta})
        yield named_event({"type": "content_block_stop", "index": 0})
        end = {"stop_reason": self.finish_reasons[answer.finish_reason], "stop_sequence": None}
        usage = {"usage": self._usage(answer.usage)} if answer.usage else {}
        yield named_event({"type": "message_delta", "delta": end, **usage})
        yield named_event({"type": "message_stop"})

    def stream_error(self) -> bytes:
        return named_event(self.error(Rejected(529, "Overloaded")))

    def _message(self, call: Call, answer: Answer) -> Json:
        message = {"id": f"msg_{answer.id}", "type": "message", "role": "assistant", "model": call.model}
        return {**message, "content": [], "stop_reason": None, "stop_sequence": None}

    def _usage(self, usage: Usage) -> Json:
        return {
            "input_tokens": usage.input,
            "cache_read_input_tokens": usage.cached,
            "cache_creation_input_tokens": usage.cache_write,
            "output_tokens": usage.written + usage.hidden,
            "output_tokens_details": {"thinking_tokens": usage.hidden},
        }
