"""Answers as the three providers, and servers that resemble them, send them: byte for byte, over HTTP, to the SDKs.

Rows 52, 53 and 109. Who can mend an error decides what it means; a count that cannot be true never stops anything.
"""

import asyncio
import json
from collections.abc import Callable, Iterator
from contextlib import aclosing
from typing import Any

import pytest
from pytest_django.fixtures import Settings

from ai_ops import providers
from ai_ops.providers import Message, TextDelta, TextEnd
from ai_ops.providers import ProviderBusy as Busy
from ai_ops.providers import ProviderMisconfigured as Ours
from ai_ops.providers import ProviderRefused as Refused
from ai_ops.providers import ProviderTimedOut as TimedOut
from ai_ops.providers import ProviderUnavailable as Nonsense
from ai_ops.providers.counts import COUNTS, Said, count_call
from billing.pricing import TokenPools
from tests.standins.ai_server import AiServer, running_ai_standin

MODELS = {"openai": "gpt-6-luna", "anthropic": "claude-haiku-5-5", "google": "gemini-3.8-flash"}
IMAGE_MODELS = {"openai": "gpt-image-2", "google": "gemini-3-pro-image"}
PROMPT, TEXT = 51, 7  # what we would count
NO_TEXT: tuple[Any, ...] = ([{"type": "text", "text": "x"}], 5, {}, [5], True, 0, [])


@pytest.fixture(scope="module")
def server() -> Iterator[AiServer]:
    with running_ai_standin() as running:
        yield running


@pytest.fixture(autouse=True)
def standin_settings(settings: Settings, server: AiServer) -> None:
    settings.OPENAI_API_KEY = settings.ANTHROPIC_API_KEY = settings.GOOGLE_API_KEY = "any"
    settings.OPENAI_BASE_URL = f"{server.address}/openai/v1"
    settings.ANTHROPIC_BASE_URL = f"{server.address}/anthropic"
    settings.GOOGLE_GEMINI_BASE_URL = f"{server.address}/google"
    settings.AI_TIMEOUT_SECONDS = settings.AI_IMAGE_TIMEOUT_SECONDS = 10.0


def sse(*events: Any, named: bool = False) -> str:
    """Server-sent events; with `named`, each under its type, as Anthropic sends them. Text is sent as it is."""
    lines = []
    for event in events:
        data = event if isinstance(event, str) else json.dumps(event)
        lines.append(f"event: {event['type']}\ndata: {data}\n\n" if named else f"data: {data}\n\n")
    return "".join(lines)


def run(server: AiServer, provider: str, body: str | bytes, **options: Any) -> tuple[str, Any, Said | None]:
    """The text that came, how it ended (a finish reason or the class of an error), and what was said of the usage."""
    marker = server.play(f"{provider}-text", body, **options)
    text, message = "", ""
    said: Said | None = None
    end: Any = None

    async def read() -> None:
        nonlocal text, said, end, message
        stream = providers.stream_text(
            provider=provider,
            model=MODELS[provider],
            system="",
            messages=[Message("user", f"Tea. {marker}")],
            max_output_tokens=1_000,
        )
        try:
            async with aclosing(stream):
                async for item in stream:
                    if isinstance(item, TextEnd):
                        end = item.finish_reason
                    elif isinstance(item, TextDelta):
                        text += item.text
                        if item.said:
                            said = said.updated(item.said) if said else item.said
        except providers.ProviderError as error:
            end, message = type(error), error.message

    asyncio.run(read())
    assert ("not your fault, and you were not charged" in message) is (end is Ours)
    return text, end, said


def paint(server: AiServer, provider: str, body: str, **options: Any) -> TokenPools | type[Exception] | None:
    """What was used for the image, or the class of the error."""
    marker = server.play(f"{provider}-image", body, type="application/json", **options)
    try:
        return asyncio.run(
            providers.generate_images(
                provider=provider,
                model=IMAGE_MODELS[provider],
                prompt=f"Tea. {marker}",
                size="1024x1024",
                quality="",
                count=1,
            )
        ).usage
    except providers.ProviderError as error:
        return type(error)


# --- Errors -------------------------------------------------------------------------------------------------------


def openai_error(message: str, type: str | None = None, code: Any = None, param: Any = None) -> dict[str, Any]:
    return {"error": {"message": message, "type": type, "param": param, "code": code}}


QUOTA = "You exceeded your current quota, please check your plan and billing details."
INVALID, LIMITED = "invalid_request_error", "rate_limit_exceeded"
BILLING = "https://platform.openai.com/account/billing"


@pytest.mark.parametrize(
    ("status", "body", "means"),
    [
        (429, openai_error(QUOTA, "insufficient_quota", "insufficient_quota"), Ours),
        (429, openai_error(QUOTA, "insufficient_quota", "credit_balance_exhausted"), Ours),
        (429, openai_error("Project limit.", "insufficient_quota", "project_spend_limit_exceeded"), Ours),
        (429, openai_error(QUOTA), Ours),
        (400, openai_error("Billing hard limit has been reached", INVALID, "billing_hard_limit_reached"), Ours),
        (429, openai_error("Your account is not active, please check your billing.", code="billing_not_active"), Ours),
        (401, openai_error("Incorrect API key provided: sk-a***z.", INVALID, "invalid_api_key"), Ours),
        (401, openai_error("You must be a member of an organization to use the API", INVALID), Ours),
        (403, openai_error("Your account was deactivated.", INVALID, "account_deactivated"), Ours),
        (400, openai_error("Your account was deactivated.", INVALID, "account_deactivated"), Ours),
        (403, openai_error("Country, region, or territory not supported", "request_forbidden", "x"), Ours),
        (404, openai_error("The model `gpt-9` does not exist", INVALID, "model_not_found"), Ours),
        (400, openai_error("The requested model 'gpt-9' does not exist.", INVALID, "model_not_found", "model"), Ours),
        (403, openai_error("Your organization must be verified to use the model `gpt-6`.", INVALID), Ours),
        (400, openai_error("Unsupported value: 'temperature' …", INVALID, "unsupported_value", "temperature"), Ours),
        (400, openai_error("max_tokens is too large: 99999.", INVALID, "invalid_value", "max_completion_tokens"), Ours),
        (400, openai_error("Maximum context length is 128000 tokens", INVALID, "context_length_exceeded"), Refused),
        (400, openai_error("This model's maximum context length is 8192 tokens.", INVALID, None, "messages"), Refused),
        (400, openai_error("string too long", INVALID, "string_above_max_length", "messages[1].content"), Refused),
        (
            400,
            openai_error("Invalid prompt: flagged as violating our usage policy.", INVALID, "invalid_prompt"),
            Refused,
        ),
        (400, openai_error("The response was filtered", None, "content_filter", "prompt"), Refused),
        (
            429,
            openai_error("Request too large for gpt-6 on tokens per min (TPM)", "tokens", LIMITED),
            Refused,
        ),
        (
            429,
            openai_error("Rate limit reached for gpt-6 on requests per min", "requests", LIMITED),
            Busy,
        ),
        (429, openai_error(f"Rate limit reached. Add a payment method at {BILLING}.", "tokens", LIMITED), Busy),
        (429, {"detail": "Slow down"}, Busy),
        (500, openai_error("The server had an error", "server_error"), Nonsense),
        (503, openai_error("The engine is currently overloaded", "server_error"), Nonsense),
        (400, {"error": "no object"}, Refused),
        (400, {"error": {"message": ["no text"], "code": {"no": "word"}, "type": 5, "param": []}}, Refused),
        (402, {"error": {"message": "Insufficient Balance", "code": "invalid_request_error"}}, Ours),
        (502, "<html><body><h1>502 Bad Gateway</h1></body></html>", Nonsense),
    ],
)
def test_openais_errors_say_who_can_mend_them(server: AiServer, status: int, body: Any, means: type) -> None:
    text = body if isinstance(body, str) else json.dumps(body)
    assert run(server, "openai", text, status=status, type="application/json")[1] is means


def anthropic_error(type: str, message: str, **details: Any) -> dict[str, Any]:
    error = {"type": type, "message": message} | ({"details": details} if details else {})
    return {"type": "error", "error": error, "request_id": "req_1"}


CREDIT = "Your credit balance is too low to access the Anthropic API. Please go to Plans & Billing to purchase credits."
LIMITS = "You have reached your specified API usage limits. You will regain access on 2027-01-01 at 00:00 UTC."
BLOCKED = "Output blocked by content filtering policy"


@pytest.mark.parametrize(
    ("status", "body", "means"),
    [
        (400, anthropic_error(INVALID, CREDIT), Ours),
        (400, anthropic_error(INVALID, LIMITS), Ours),
        (400, anthropic_error(INVALID, LIMITS.replace("specified", "specified workspace")), Ours),
        (400, anthropic_error(INVALID, "This organization has been disabled."), Ours),
        (400, anthropic_error(INVALID, "…", error_code="organization_on_hold"), Ours),
        (429, anthropic_error("rate_limit_error", "…", error_code="enforced_spend_limit_reached"), Ours),
        (402, anthropic_error("billing_error", "There is an issue with your payment."), Ours),
        (401, anthropic_error("authentication_error", "invalid x-api-key"), Ours),
        (403, anthropic_error("permission_error", "Your API key does not have permission."), Ours),
        (404, anthropic_error("not_found_error", "model: claude-0"), Ours),
        (400, anthropic_error(INVALID, "max_tokens: 99000 > 64000, which is the maximum allowed number"), Ours),
        (400, anthropic_error(INVALID, "`temperature` is deprecated for this model."), Ours),
        (400, anthropic_error(INVALID, "thinking.budget_tokens: Field required"), Ours),
        (400, anthropic_error(INVALID, "prompt is too long: 208310 tokens > 200000 maximum"), Refused),
        (400, anthropic_error(INVALID, "input length and `max_tokens` exceed context limit: 190000 + 20000"), Refused),
        (400, anthropic_error(INVALID, "messages.0.content.0.text: text content must be non-empty"), Refused),
        (413, anthropic_error("request_too_large", "Request exceeds the maximum size"), Refused),
        (400, anthropic_error(INVALID, BLOCKED), Refused),
        (429, anthropic_error("rate_limit_error", "This request would exceed your per-minute rate limit"), Busy),
        (529, anthropic_error("overloaded_error", "Overloaded"), Busy),
        (500, anthropic_error("api_error", "Internal server error"), Nonsense),
        (504, anthropic_error("timeout_error", "Request timed out"), TimedOut),
        (400, {"error": ["no object"]}, Refused),
        (503, "upstream connect error or disconnect/reset before headers", Nonsense),
    ],
)
def test_anthropics_errors_say_who_can_mend_them(server: AiServer, status: int, body: Any, means: type) -> None:
    text = body if isinstance(body, str) else json.dumps(body)
    assert run(server, "anthropic", text, status=status, type="application/json")[1] is means


def google_error(code: int, status: str, message: str, *details: dict[str, Any]) -> dict[str, Any]:
    return {"error": {"code": code, "message": message, "status": status, "details": list(details)}}


def reason(reason: str) -> dict[str, Any]:
    return {"@type": "type.googleapis.com/google.rpc.ErrorInfo", "reason": reason, "domain": "googleapis.com"}


def over(quota_id: str) -> dict[str, Any]:
    violation = {"quotaMetric": "generativelanguage.googleapis.com/requests", "quotaId": quota_id, "quotaValue": "20"}
    return {"@type": "type.googleapis.com/google.rpc.QuotaFailure", "violations": [violation]}


RETRY = {"@type": "type.googleapis.com/google.rpc.RetryInfo", "retryDelay": "18s"}
EXHAUSTED = "RESOURCE_EXHAUSTED"


@pytest.mark.parametrize(
    ("body", "means"),
    [
        (google_error(400, "INVALID_ARGUMENT", "API key not valid.", reason("API_KEY_INVALID")), Ours),
        (google_error(400, "INVALID_ARGUMENT", "API key expired. Please renew the API key."), Ours),
        (google_error(400, "FAILED_PRECONDITION", "User location is not supported for the API use."), Ours),
        (google_error(400, "FAILED_PRECONDITION", "Please enable billing on project 7."), Ours),
        (google_error(403, "PERMISSION_DENIED", "Not used in project 7 before.", reason("SERVICE_DISABLED")), Ours),
        (google_error(403, "PERMISSION_DENIED", "Your API key was reported as leaked."), Ours),
        (google_error(403, "PERMISSION_DENIED", "…", reason("API_KEY_SERVICE_BLOCKED")), Ours),
        (google_error(404, "NOT_FOUND", "models/gemini-9 is not found for API version v1beta"), Ours),
        (google_error(429, EXHAUSTED, QUOTA, over("GenerateRequestsPerDayPerProjectPerModel"), RETRY), Ours),
        (google_error(429, EXHAUSTED, f"{QUOTA}\n* Quota exceeded for metric: x, limit: 0"), Ours),
        (google_error(429, EXHAUSTED, "Your prepayment credits are depleted."), Ours),
        (google_error(429, EXHAUSTED, "Your project has exceeded its monthly spending cap."), Ours),
        (google_error(429, EXHAUSTED, QUOTA), Ours),
        (google_error(400, "INVALID_ARGUMENT", 'Invalid JSON payload received. Unknown name "x": no field.'), Ours),
        (google_error(400, "INVALID_ARGUMENT", "Model does not support the requested response modalities"), Ours),
        (google_error(429, EXHAUSTED, QUOTA, over("GenerateRequestsPerMinutePerProjectPerModel"), RETRY), Busy),
        (google_error(429, EXHAUSTED, QUOTA, RETRY), Busy),
        (google_error(429, EXHAUSTED, "Resource has been exhausted (e.g. check quota)."), Busy),
        (
            google_error(400, "INVALID_ARGUMENT", "The input token count (9) exceeds the maximum number of tokens"),
            Refused,
        ),
        (google_error(400, "INVALID_ARGUMENT", "Request payload size exceeds the limit: 20971520 bytes."), Refused),
        (google_error(503, "UNAVAILABLE", "The model is overloaded. Please try again later."), Nonsense),
        (google_error(500, "INTERNAL", "An internal error has occurred."), Nonsense),
        (google_error(504, "DEADLINE_EXCEEDED", "Deadline expired before operation could complete."), TimedOut),
    ],
)
def test_googles_errors_say_who_can_mend_them(server: AiServer, body: dict[str, Any], means: type) -> None:
    status = body["error"]["code"]
    assert run(server, "google", json.dumps(body, indent=2), status=status, type="application/json")[1] is means


# --- Streams ------------------------------------------------------------------------------------------------------


def openai_chunk(content: Any = None, finish_reason: Any = None, usage: Any = None, **delta: Any) -> dict[str, Any]:
    delta = {"content": content, **delta}
    choice = {"index": 0, "delta": delta, "finish_reason": finish_reason}
    return {"id": "c1", "object": "chat.completion.chunk", "model": "m", "choices": [choice], "usage": usage}


def openai_usage(prompt: Any, completion: Any, total: Any = None, **details: Any) -> dict[str, Any]:
    usage = {"prompt_tokens": prompt, "completion_tokens": completion, "completion_tokens_details": details}
    return {"choices": [], "usage": usage | ({} if total is None else {"total_tokens": total})}


def choice(content: Any, index: Any, finish_reason: Any = None) -> dict[str, Any]:
    return {"index": index, "delta": {"content": content}, "finish_reason": finish_reason}


TEA = openai_chunk("Tea.")
STOP = openai_chunk(None, "stop")
ERROR_FIRST = [TEA, openai_error("Rate limit reached", "requests", LIMITED)]


@pytest.mark.parametrize(
    ("events", "text", "end", "pools"),
    [
        ([TEA, STOP, openai_usage(100, 280, 1_180, reasoning_tokens=800), "[DONE]"], "Tea.", "stop", (100, 1_080, 800)),
        (
            # As xAI, Groq and vLLM do: usage in several chunks, also before the last words.
            [openai_chunk("Te", usage={"prompt_tokens": 100, "completion_tokens": 1}), TEA, openai_usage(100, 3), STOP],
            *("TeTea.", "stop", (100, 3, 0)),
        ),
        ([TEA, STOP, openai_usage(100, 7), openai_usage(0, 0), {"choices": None, "usage": {}}],
         *("Tea.", "stop", (100, 7, 0))),
        ([TEA, STOP, openai_usage(100, 90, accepted_prediction_tokens=2, rejected_prediction_tokens=4)],
         *("Tea.", "stop", (100, 90, 0))),
        ([TEA, STOP, {"choices": [], "usage": 5}], "Tea.", "stop", (PROMPT, TEXT, 0)),
        ([TEA, STOP, {"choices": [], "usage": [1]}], "Tea.", "stop", (PROMPT, TEXT, 0)),
        ([TEA, STOP, openai_usage("100", [280])], "Tea.", "stop", (PROMPT, TEXT, 0)),
        ([TEA, STOP, openai_usage(-100, 2**63)], "Tea.", "stop", (PROMPT, TEXT, 0)),
        ([{"choices": []}, {"choices": None}, TEA, {"choices": [{"delta": None}]}, STOP], "Tea.", "stop", None),
        ([openai_chunk(refusal="I cannot."), openai_chunk(None, "content_filter")], "I cannot.", "refused", None),
        ([TEA, openai_chunk(None, "something_new")], "Tea.", "other", None),
        # Several answers where one was asked for: the first is shown, all of them are counted.
        ([{"choices": [choice("Te", 0), choice("Co", 1)]}, {"choices": [choice("ffee.", 1, "content_filter")]},
          {"choices": [choice("a.", 0, "stop")]}, openai_usage(100, 6)], "Tea.", "stop", (100, 6, 0)),
        ([{"choices": [choice("Tea.", "1", "stop")]}], "Tea.", "stop", None),
        # Inside a stream the status is 200.
        (ERROR_FIRST, "Tea.", Busy, None),
        ([TEA, openai_error("The server had an error", "server_error")], "Tea.", Nonsense, None),
        ([TEA, openai_error("…", "insufficient_quota", "insufficient_quota")], "Tea.", Ours, None),
        ([TEA, openai_error("…", INVALID, "context_length_exceeded")], "Tea.", Refused, None),
        ([TEA, openai_error("flagged", INVALID)], "Tea.", Refused, None),
        ([TEA, openai_error("Provider returned error", code=429)], "Tea.", Busy, None),
        ([{"error": "boom"}], "", Nonsense, None),
        # Only text passes.
        *([[TEA, openai_chunk(content)], "Tea.", Nonsense, None]
          for content in NO_TEXT),
        *([[TEA, chunk], "Tea.", Nonsense, None]
          for chunk in ({"choices": "x"}, {"choices": {"0": TEA}}, "[]", "5", '"x"', '{"choices": [{"delta": {"cont')),
        ([TEA, {"choices": [5]}, STOP], "Tea.", "stop", None),
        ([TEA, openai_chunk(None, ["stop"])], "Tea.", Nonsense, None),
        ([TEA], "Tea.", Nonsense, None),  # it ends without a word why
        ([], "", Nonsense, None),
    ],
)  # fmt: skip
def test_streams_of_openai_and_of_what_resembles_it(
    server: AiServer, events: list[Any], text: str, end: Any, pools: tuple[int, ...] | None
) -> None:
    came, ended, said = run(server, "openai", sse(*events))
    assert (came, ended) == (text, end)
    if pools:
        made = count_call(said, prompt_tokens=PROMPT, text_tokens=TEXT).pools
        assert (made.input_tokens, made.output_tokens, made.reasoning_tokens) == pools
    else:
        assert said is None or {getattr(said, name) for name in COUNTS} == {None}


@pytest.mark.parametrize(
    ("provider", "before", "last"),
    [
        ("openai", lambda: sse(TEA), lambda: sse(STOP)),
        ("anthropic", lambda: sse(start(), words("Tea."), named=True), lambda: sse(delta(), named=True)),
        ("google", lambda: sse(gemini("Tea.")), lambda: sse(gemini(None, "STOP"))),
    ],
)
def test_a_connection_that_breaks_after_the_end_was_said_takes_nothing_away(
    server: AiServer, provider: str, before: Callable[[], str], last: Callable[[], str]
) -> None:
    assert run(server, provider, before(), then="cut")[:2] == ("Tea.", Nonsense)
    assert run(server, provider, before() + last(), then="cut")[:2] == ("Tea.", "stop")


@pytest.mark.parametrize("body", ["<html>Gateway</html>", '{"error": {"message": "x"}}', "", "\xff\x00", "data: \n\n"])
@pytest.mark.parametrize("provider", MODELS)
def test_what_is_no_stream_is_nonsense(server: AiServer, provider: str, body: str) -> None:
    for media_type in ("text/html", "text/event-stream"):
        assert run(server, provider, body, type=media_type)[:2] == ("", Nonsense)


def start(**usage: Any) -> dict[str, Any]:
    return {"type": "message_start", "message": {"id": "m1", "role": "assistant", "content": [], "usage": usage}}


def words(text: Any, type: str = "text_delta") -> dict[str, Any]:
    return {"type": "content_block_delta", "index": 0, "delta": {"type": type, "text": text}}


def delta(stop_reason: Any = "end_turn", **usage: Any) -> dict[str, Any]:
    return {"type": "message_delta", "delta": {"stop_reason": stop_reason}, "usage": usage}


END = {"type": "message_stop"}


@pytest.mark.parametrize(
    ("events", "text", "end", "pools"),
    [
        (
            [start(input_tokens=9_000, output_tokens=1), words("Tea."), delta(output_tokens=50), END],
            *("Tea.", "stop", (9_000, 0, 0, 50, 0)),
        ),
        (
            [
                start(
                    input_tokens=3,
                    cache_read_input_tokens=200,
                    cache_creation_input_tokens=30,
                    cache_creation={"ephemeral_5m_input_tokens": 20, "ephemeral_1h_input_tokens": 10},
                ),
                words("Tea."),
                delta(input_tokens=3, cache_read_input_tokens=200, output_tokens=80,
                      output_tokens_details={"thinking_tokens": 60}),
                END,
            ],
            *("Tea.", "stop", (3, 200, 30, 80, 60)),
        ),
        (
            [start(input_tokens=400, output_tokens=1), words("Tea."), delta(input_tokens=0, output_tokens=0), END],
            *("Tea.", "stop", (400, 0, 0, TEXT, 0)),
        ),
        ([start(), words("Tea."), delta(), END], "Tea.", "stop", (PROMPT, 0, 0, TEXT, 0)),
        ([start(input_tokens=None), words("Tea."), delta(output_tokens=[9]), END],
         *("Tea.", "stop", (PROMPT, 0, 0, TEXT, 0))),
        ([start(), words("Tea."), delta("refusal"), END], "Tea.", "refused", (PROMPT, 0, 0, TEXT, 0)),
        ([start(), words("x", "thinking_delta"), words("Tea."), delta("pause_turn"), END], "Tea.", "other", None),
        ([start(), words("Tea."), delta("model_context_window_exceeded"), END], "Tea.", "length", None),
        ([start(), {"type": "new_event"}, words("Tea."), delta(), END], "Tea.", "stop", None),
        # Inside a stream the status is 200.
        ([start(input_tokens=9), words("Tea."), anthropic_error(INVALID, BLOCKED)],
         *("Tea.", Refused, (9, 0, 0, TEXT, 0))),
        ([start(), words("Tea."), anthropic_error("api_error", BLOCKED)], "Tea.", Refused, None),
        ([start(), words("Tea."), anthropic_error("overloaded_error", "Overloaded")], "Tea.", Busy, None),
        ([start(), words("Tea."), anthropic_error("rate_limit_error", "…")], "Tea.", Busy, None),
        ([start(), words("Tea."), anthropic_error("api_error", "Internal server error")], "Tea.", Nonsense, None),
        ([start(), anthropic_error(INVALID, CREDIT)], "", Ours, None),
        ([start(), anthropic_error("authentication_error", "…")], "", Ours, None),
        ([start(), anthropic_error(INVALID, "prompt is too long: 5 > 4")], "", Refused, None),
        ([{"type": "error", "error": "boom"}], "", Nonsense, None),
        # Only text passes.
        *([[start(), words("Tea."), words(text)], "Tea.", Nonsense, None] for text in NO_TEXT),
        ([start(), words("Tea."), {"type": "content_block_delta", "delta": None}, delta(), END], "Tea.", "stop", None),
        ([{"type": "message_start", "message": None}, words("Tea."), delta(), END], "Tea.", "stop", None),
        ([start(), words("Tea."), delta(output_tokens=9)], "Tea.", "stop", (PROMPT, 0, 0, 9, 0)),  # all was said
        ([start(), words("Tea."), words("")], "Tea.", Nonsense, None),
        ([start(), words("Tea."), END], "Tea.", Nonsense, None),
    ],
)  # fmt: skip
def test_streams_of_anthropic(
    server: AiServer, events: list[Any], text: str, end: Any, pools: tuple[int, ...] | None
) -> None:
    came, ended, said = run(server, "anthropic", sse(*events, named=True))
    assert (came, ended) == (text, end)
    if pools:
        made = count_call(said, prompt_tokens=PROMPT, text_tokens=TEXT).pools
        assert (
            made.input_tokens,
            made.cached_input_tokens,
            made.cache_write_tokens,
            made.output_tokens,
            made.reasoning_tokens,
        ) == pools


def gemini(text: Any = None, finish_reason: str | None = None, usage: Any = None, **more: Any) -> dict[str, Any]:
    candidate: dict[str, Any] = {"index": 0}
    if text is not None:
        candidate["content"] = {"role": "model", "parts": [{"text": text}]}
    if finish_reason:
        candidate["finishReason"] = finish_reason
    return {"candidates": [candidate], **({"usageMetadata": usage} if usage is not None else {}), **more}


def google_usage(prompt: Any = None, candidates: Any = None, thoughts: Any = None, **more: Any) -> dict[str, Any]:
    return {"promptTokenCount": prompt, "candidatesTokenCount": candidates, "thoughtsTokenCount": thoughts, **more}


REFUSAL_REASONS = (
    *("SAFETY", "RECITATION", "LANGUAGE", "BLOCKLIST", "PROHIBITED_CONTENT", "SPII", "ESCALATION", "MODEL_ARMOR"),
    *("IMAGE_SAFETY", "IMAGE_PROHIBITED_CONTENT", "IMAGE_RECITATION", "MINOR_SAFETY_OF_TOMORROW"),
)
OTHER_REASONS = (
    *("OTHER", "MALFORMED_FUNCTION_CALL", "UNEXPECTED_TOOL_CALL", "TOO_MANY_TOOL_CALLS", "MALFORMED_RESPONSE"),
    *("MISSING_THOUGHT_SIGNATURE", "FINISH_REASON_UNSPECIFIED", "REASON_OF_TOMORROW"),
)


@pytest.mark.parametrize(
    ("events", "text", "end", "pools"),
    [
        (
            [gemini("Te", usage=google_usage(100, 2)), gemini("a.", "STOP", usage=google_usage(100, 280, 800))],
            *("Tea.", "stop", (100, 1_080, 800)),
        ),
        # Chunks that carry usage only, and one that takes back what was said.
        (
            [{"usageMetadata": google_usage(100)}, gemini("Tea.", "STOP"), {"usageMetadata": google_usage(100, 9, 4)},
             {"usageMetadata": google_usage(0, 0)}],
            *("Tea.", "stop", (100, 13, 4)),
        ),
        (
            [gemini("Tea.", "STOP", usage=google_usage(10, 5, toolUsePromptTokenCount=30, totalTokenCount=45))],
            *("Tea.", "stop", (40, 5, 0)),
        ),
        ([gemini("Tea.", "STOP", usage=google_usage(10, 12, 12, totalTokenCount=22))], "Tea.", "stop", (10, 24, 12)),
        ([gemini("Tea.", "STOP", usage={})], "Tea.", "stop", None),
        ([gemini("Tea.", "STOP", usage=google_usage(totalTokenCount=331))], "Tea.", "stop", (PROMPT, TEXT, 0)),
        ([gemini("Tea.", "STOP", usage=google_usage(0, 0, 0))], "Tea.", "stop", (PROMPT, TEXT, 0)),
        ([gemini("Tea.", "STOP", usage=google_usage(-1, 2**63))], "Tea.", "stop", (PROMPT, TEXT, 0)),
        ([gemini("Tea.", "MAX_TOKENS")], "Tea.", "length", None),
        (
            [{"candidates": gemini("Tea.", "STOP")["candidates"]
              + [it | {"index": 1} for it in gemini("Coffee.", "SAFETY")["candidates"]],
              "usageMetadata": google_usage(100, 6)}],
            *("Tea.", "stop", (100, 6, 0)),
        ),
        *(([gemini("Tea."), gemini(None, name)], "Tea.", "refused", None) for name in REFUSAL_REASONS),
        *(([gemini("Tea."), gemini(None, name)], "Tea.", "other", None) for name in OTHER_REASONS),
        ([gemini(None, "PUP_LIMITED_DISABLED")], "", Ours, None),
        *(([{"promptFeedback": {"blockReason": name}}], "", Refused, None)
          for name in ("SAFETY", "OTHER", "BLOCKLIST", "PROHIBITED_CONTENT", "MODEL_ARMOR", "JAILBREAK", "NEW")),
        # Inside a stream the status is 200.
        ([gemini("Tea."), google_error(503, "UNAVAILABLE", "Overloaded.")], "Tea.", Nonsense, None),
        ([gemini("Tea."), google_error(429, EXHAUSTED, "Resource has been exhausted.")], "Tea.", Busy, None),
        ([gemini("Tea."), google_error(429, EXHAUSTED, QUOTA, over("TokensPerDay"))], "Tea.", Ours, None),
        ([{"error": "boom"}], "", Nonsense, None),
        # Only text passes.
        *([[gemini("Tea."), gemini(text)], "Tea.", Nonsense, None] for text in NO_TEXT[:4]),
        ([gemini("Tea."), {"candidates": 5}], "Tea.", Nonsense, None),
        ([gemini("Tea."), {"candidates": [{"content": {"parts": [{"inlineData": {"mimeType": "image/png"}}]}}]},
          gemini(None, "STOP")], "Tea.", "stop", None),
        ([gemini("Tea."), '{"candidates": [{"cont'], "Tea.", Nonsense, None),
        ([{"candidates": None}, gemini("Tea.")], "Tea.", Nonsense, None),
    ],
)  # fmt: skip
@pytest.mark.filterwarnings("ignore:.*is not a valid")
def test_streams_of_google(
    server: AiServer, events: list[Any], text: str, end: Any, pools: tuple[int, ...] | None
) -> None:
    came, ended, said = run(server, "google", sse(*events))
    assert (came, ended) == (text, end)
    if pools:
        made = count_call(said, prompt_tokens=PROMPT, text_tokens=TEXT).pools
        assert (made.input_tokens, made.output_tokens, made.reasoning_tokens) == pools


# --- Images -------------------------------------------------------------------------------------------------------

PNG = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="


def google_image(usage: Any, finish_reason: str = "STOP", image: str | None = PNG) -> dict[str, Any]:
    parts = [{"text": "Here it is."}] + ([{"inlineData": {"mimeType": "image/png", "data": image}}] if image else [])
    content = {"role": "model", "parts": parts}
    return {"candidates": [{"content": content, "finishReason": finish_reason}], "usageMetadata": usage}


def modalities(**tokens: int) -> list[dict[str, Any]]:
    return [{"modality": name, "tokenCount": count} for name, count in tokens.items()]


@pytest.mark.parametrize(
    ("provider", "status", "body", "expected"),
    [
        (
            *("google", 200),
            google_image(google_usage(326, 2_340, 337, candidatesTokensDetails=modalities(IMAGE=2_000))),
            TokenPools(326, output_tokens=2_677, reasoning_tokens=337, text_output_tokens=340),
        ),
        (
            # Recorded: words that no detail names.
            *("google", 200),
            google_image(
                google_usage(
                    *(9, 1_466, 337),
                    totalTokenCount=1_812,
                    promptTokensDetails=modalities(TEXT=9),
                    candidatesTokensDetails=modalities(IMAGE=1_120),
                )
            ),
            TokenPools(9, output_tokens=1_803, reasoning_tokens=337, text_output_tokens=346),
        ),
        (
            *("google", 200),
            google_image(google_usage(300, 1_290, promptTokensDetails=modalities(TEXT=42, IMAGE=258))),
            TokenPools(300, output_tokens=1_290, image_input_tokens=258),
        ),
        (
            *("google", 200),  # the words have a name, the image has none
            google_image(google_usage(9, 1_466, 337, candidatesTokensDetails=modalities(TEXT=346))),
            TokenPools(9, output_tokens=1_803, reasoning_tokens=337, text_output_tokens=346),
        ),
        (
            *("google", 200),  # a sum that was left out
            google_image(google_usage(9, None, 337, candidatesTokensDetails=modalities(TEXT=46, IMAGE=1_120))),
            TokenPools(9, output_tokens=1_503, reasoning_tokens=337, text_output_tokens=46),
        ),
        # An image that was not counted, or as words, costs its price and not less; what was said stays said.
        (
            *("google", 200),
            google_image(google_usage(9, None, 337)),
            TokenPools(9, output_tokens=337, reasoning_tokens=337),
        ),
        (
            *("google", 200),
            google_image(google_usage(9, 1_120, candidatesTokensDetails=modalities(TEXT=1_120))),
            TokenPools(9, output_tokens=1_120, text_output_tokens=1_120),
        ),
        # Counts of the wrong type, and such as no image has, spoil no image.
        ("google", 200, google_image(google_usage("n/a", 1_120.5, "12")), TokenPools()),
        ("google", 200, google_image("n/a"), TokenPools()),
        ("google", 200, google_image(google_usage(9, 900_000_000, {}, candidatesTokensDetails={})), TokenPools(9)),
        ("openai", 200, {"data": [{"b64_json": PNG}], "usage": {"input_tokens": 9, "output_tokens": 2**40}},
         TokenPools(9)),
        (
            *("openai", 200),
            {"data": [{"b64_json": PNG}],
             "usage": {"input_tokens": 9, "output_tokens": 1_120, "output_tokens_details": {"text_tokens": 1_120}}},
            TokenPools(9, output_tokens=1_120, text_output_tokens=1_120),
        ),
        ("google", 200, google_image(google_usage(5, 0)), TokenPools(5)),
        ("google", 200, google_image(google_usage(5, -4)), TokenPools(5)),
        ("google", 200, google_image(None), None),
        ("google", 200, google_image(google_usage(5), "IMAGE_SAFETY", None), Refused),
        ("google", 200, google_image(google_usage(5), "NO_IMAGE", None), Nonsense),
        ("google", 200, google_image(google_usage(5), "PUP_LIMITED_DISABLED", None), Ours),
        ("google", 429, google_error(429, EXHAUSTED, "Your prepayment credits are depleted."), Ours),
        (
            *("openai", 200),
            {
                "created": 1,
                "data": [{"b64_json": PNG}],
                "usage": {
                    "input_tokens": 250,
                    "input_tokens_details": {"text_tokens": 50, "image_tokens": 200},
                    "output_tokens": 1_850,
                    "output_tokens_details": {"text_tokens": 83, "image_tokens": 1_767},
                    "total_tokens": 2_100,
                },
            },
            TokenPools(250, output_tokens=1_850, text_output_tokens=83, image_input_tokens=200),
        ),
        ("openai", 200, {"data": [{"b64_json": PNG}], "usage": {"input_tokens": 9, "output_tokens": None}},
         TokenPools(9)),
        ("openai", 200, {"data": [{"b64_json": PNG}], "usage": [5]}, TokenPools()),
        ("openai", 200, {"data": [{"b64_json": PNG}, {"b64_json": 5}, None, {"url": "x"}]}, None),
        ("openai", 200, {"data": "x"}, Nonsense),
        ("openai", 200, {"data": [{"b64_json": ["x"]}]}, Nonsense),
        ("openai", 200, openai_error("…", code="server_error"), Nonsense),
        ("openai", 400, openai_error("safety", "image_generation_user_error", "moderation_blocked"), Refused),
        ("openai", 400, openai_error("Your request was rejected by our safety system.", None, None), Refused),
        ("openai", 400, openai_error("Billing hard limit has been reached", None, "billing_hard_limit_reached"), Ours),
        ("openai", 400, openai_error("Invalid value: '9x9'.", INVALID, "invalid_value", "size"), Ours),
        ("openai", 400, openai_error("Invalid 'prompt': string too long.", INVALID, None, "prompt"), Refused),
    ],
)  # fmt: skip
def test_images_and_what_they_used(server: AiServer, provider: str, status: int, body: Any, expected: Any) -> None:
    assert paint(server, provider, json.dumps(body), status=status) == expected


def test_words_in_place_of_an_image_are_counted_as_words(server: AiServer) -> None:
    body = json.dumps(google_image(google_usage(326, 200, 337), image=None))
    marker = server.play("google-image", body, type="application/json")
    with pytest.raises(Nonsense) as failure:
        asyncio.run(
            providers.generate_images(
                provider="google",
                model=IMAGE_MODELS["google"],
                prompt=f"Tea. {marker}",
                size="1024x1024",
                quality="",
                count=1,
            )
        )
    assert failure.value.usage == TokenPools(326, output_tokens=537, reasoning_tokens=337, text_output_tokens=200)
