"""Google's protocol: the Gemini API, with image models."""

import base64
import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import ClassVar

from starlette.requests import Request

from standins.ai.painting import paint
from standins.ai.protocols import (
    Answer,
    Call,
    FinishReason,
    Json,
    Painting,
    Protocol,
    Rejected,
    Usage,
    event,
    names,
    positive,
    require_list,
    text_of,
    turns_of,
)


class Google(Protocol):
    """The Gemini API, v1 (the SDK's default) and v1beta: model and method stand in the address."""

    name = "google"
    families = re.compile(r"gemini-")
    parameters = names(
        "cachedContent contents continuationToken generationConfig labels safetySettings serviceTier store "
        "systemInstruction toolConfig tools"
    )
    generation_parameters = names(
        "audioTranscriptionConfig candidateCount enableEnhancedCivicAnswers frequencyPenalty imageConfig "
        "logprobs maxOutputTokens mediaResolution presencePenalty responseJsonSchema responseLogprobs "
        "responseMimeType responseModalities responseSchema seed speechConfig stopSequences temperature "
        "thinkingConfig topK topP"
    )
    finish_reasons: ClassVar[dict[FinishReason, str]] = {
        "stop": "STOP",
        "length": "MAX_TOKENS",
        "refused": "SAFETY",
    }
    # Retired on 2026-10-02, and Imagen before it.
    retired = re.compile(r"gemini-2\.5-flash-image")
    # Those of the Gemini 3 image models at 1K, in pixels.
    image_sizes: ClassVar[dict[str, tuple[int, int]]] = {
        "1:1": (1024, 1024),
        "2:3": (848, 1264),
        "3:2": (1264, 848),
        "3:4": (896, 1200),
        "4:3": (1200, 896),
        "4:5": (928, 1152),
        "5:4": (1152, 928),
        "9:16": (768, 1376),
        "16:9": (1376, 768),
        "21:9": (1584, 672),
    }
    # How many times as wide and as high, and what is counted for an image of any shape.
    image_scales: ClassVar[dict[str, tuple[int, int]]] = {"1K": (1, 1120), "2K": (2, 1680), "4K": (4, 2520)}
    error_types: ClassVar[dict[int, str]] = {
        400: "INVALID_ARGUMENT",
        401: "UNAUTHENTICATED",
        403: "PERMISSION_DENIED",
        404: "NOT_FOUND",
        429: "RESOURCE_EXHAUSTED",
        500: "INTERNAL",
        503: "UNAVAILABLE",
        504: "DEADLINE_EXCEEDED",
    }

    def has_key(self, request: Request) -> bool:
        return bool(request.headers.get("x-goog-api-key") or request.query_params.get("key"))

    def read(self, request: Request, body: Json) -> Call:
        self._check_names(body, self.parameters, "")
        config = body.get("generationConfig") or {}
        self._check_names(config, self.generation_parameters, " at 'generation_config'")
        contents = require_list(body, "contents")
        for content in contents:
            if content.get("role", "user") not in ("user", "model"):
                raise Rejected(400, "Please use a valid role: user, model.", "contents")
        model, stream = (
            self.check_model(request.path_params["model"]),
            request.path_params["method"].startswith("stream"),
        )
        return Call(
            model=model,
            system=text_of((body.get("systemInstruction") or {}).get("parts")),
            turns=turns_of(contents, "parts"),
            max_tokens=positive(config, "maxOutputTokens"),
            stream=stream,
            painting=self._read_painting(model, config, stream=stream),
        )

    def _read_painting(self, model: str, config: Json, *, stream: bool) -> Painting | None:
        """Image models paint unless they are asked for text alone; the others never do."""
        modalities = config.get("responseModalities")
        if not isinstance(modalities, list | None) or not set(modalities or ()) <= {"TEXT", "IMAGE", "AUDIO"}:
            raise Rejected(400, "Invalid value at 'generation_config.response_modalities'.")
        paints = "-image" in model
        wanted = set(modalities or (("TEXT", "IMAGE") if paints else ("TEXT",)))
        if not wanted <= ({"TEXT", "IMAGE"} if paints else {"TEXT"}):
            raise Rejected(
                400, f"Model does not support the requested response modalities: {', '.join(wanted).lower()}"
            )
        if "IMAGE" not in wanted:
            return None
        if stream:
            raise Rejected(400, "The stand-in does not stream images.")
        shape = config.get("imageConfig") or {}
        self._check_names(shape, names("aspectRatio imageSize"), " at 'generation_config.image_config'")
        ratio, size = shape.get("aspectRatio", "1:1"), shape.get("imageSize", "1K")
        if ratio not in self.image_sizes:
            raise Rejected(400, f"Invalid aspect ratio: {ratio}. Supported are {', '.join(self.image_sizes)}.")
        if size not in self.image_scales:
            raise Rejected(400, f"Invalid image size: {size}. Supported are {', '.join(self.image_scales)}.")
        (width, height), (scale, image_tokens) = self.image_sizes[ratio], self.image_scales[size]
        return Painting(width * scale, height * scale, 1, image_tokens, with_text="TEXT" in wanted)

    def _check_names(self, given: Json, known: frozenset[str], place: str) -> None:
        for key in given.keys() - known:
            message = f'Invalid JSON payload received. Unknown name "{key}"{place}: Cannot find field.'
            raise Rejected(400, message, key)

    def check_model(self, model: object) -> str:
        if isinstance(model, str) and self.retired.match(model):
            raise Rejected(404, self.unknown_model(model), "model")
        return super().check_model(model)

    def unknown_model(self, model: str) -> str:
        return f"models/{model} is not found for this API version, or is not supported for generateContent."

    def error(self, error: Rejected) -> Json:
        kind = self.error_types.get(error.status, "INTERNAL" if error.status >= 500 else "INVALID_ARGUMENT")
        return {"error": {"code": error.status, "message": error.message, "status": kind}}

    def model_list(self, models: Sequence[str]) -> Json:
        return {"models": [{"name": f"models/{name}", "displayName": name} for name in models]}

    def whole(self, call: Call, answer: Answer) -> Json:
        if call.painting:
            return self._painted(call, call.painting, answer)
        return self._chunk(call, answer, answer.text, len(answer.tokens), answer.finish_reason)

    def opening(self, call: Call, answer: Answer) -> Iterator[bytes]:
        """A chunk may carry usage only."""
        if answer.usage:
            head = self._chunk(call, answer, "", 0)
            if answer.thoughts:
                head["usageMetadata"] = self._usage(replace(answer.usage, hidden=0), 0)  # nothing is thought yet
            yield event({key: value for key, value in head.items() if key != "candidates"})

    def delta(self, call: Call, answer: Answer, tokens: list[str], sent: int) -> bytes:
        return event(self._chunk(call, answer, "".join(tokens), sent))

    def closing(self, call: Call, answer: Answer) -> Iterator[bytes]:
        yield event(self._chunk(call, answer, "", len(answer.tokens), answer.finish_reason))

    def stream_error(self) -> bytes:
        return event(self.error(Rejected(503, "The model is overloaded. Please try again later.")))

    def _painted(self, call: Call, painting: Painting, answer: Answer) -> Json:
        parts: list[Json] = [{"inlineData": {"mimeType": "image/png", "data": image}} for image in answer.images]
        if call.fault == "pools":
            sketch = base64.b64encode(paint(call.prompt, 0, 64, 64)).decode()
            parts.insert(0, {"inlineData": {"mimeType": "image/png", "data": sketch}, "thought": True})
        if painting.with_text and parts:
            parts.insert(0, {"text": "Here is your image."})
        reason = "IMAGE_SAFETY" if answer.finish_reason == "refused" else "STOP" if answer.images else "NO_IMAGE"
        candidate: Json = {"finishReason": reason, "index": 0}
        if parts:
            candidate["content"] = {"parts": parts, "role": "model"}
        whole = {"candidates": [candidate], "modelVersion": call.model, "responseId": answer.id}
        if answer.usage is None:
            return whole
        usage = self._usage(answer.usage, answer.usage.written)
        if answer.usage.written:
            usage["candidatesTokensDetails"] = [{"modality": "IMAGE", "tokenCount": answer.usage.written}]
        return {**whole, "usageMetadata": usage}

    def _chunk(
        self, call: Call, answer: Answer, text: str, sent: int, finish_reason: FinishReason | None = None
    ) -> Json:
        candidate: Json = {"content": {"parts": [{"text": text}], "role": "model"}, "index": 0}
        if answer.thoughts and not answer.tokens:
            del candidate["content"]["parts"]  # where all of it was thought
        if finish_reason:
            candidate["finishReason"] = self.finish_reasons[finish_reason]
        usage = {"usageMetadata": self._usage(answer.usage, sent)} if answer.usage else {}
        return {"candidates": [candidate], **usage, "modelVersion": call.model, "responseId": answer.id}

    def _usage(self, usage: Usage, sent: int) -> Json:
        """Running totals. Google has no pool for cache writes, and keeps thoughts out of the candidates."""
        prompt = usage.input + usage.cached + usage.cache_write
        counts = {"promptTokenCount": prompt, "totalTokenCount": prompt + sent + usage.hidden}
        details = {"promptTokensDetails": [{"modality": "TEXT", "tokenCount": prompt}]}
        optional = {
            "candidatesTokenCount": sent,
            "cachedContentTokenCount": usage.cached,
            "thoughtsTokenCount": usage.hidden,
        }
        return {**counts, **details, **{key: count for key, count in optional.items() if count}}
