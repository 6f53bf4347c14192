"""Refusals, as problem documents (RFC 9457)."""

import json
from collections import defaultdict
from http import HTTPStatus
from typing import Any

import structlog
from django.conf import settings
from django.core.exceptions import RequestDataTooBig
from django.db import InterfaceError, OperationalError
from django.http import HttpRequest, HttpResponse
from django.http.request import RawPostDataException, UnreadablePostError
from ninja import NinjaAPI
from ninja.errors import AuthenticationError, HttpError, ValidationError
from pydantic import BaseModel, Field

from billing import catalogue, ledger

logger = structlog.get_logger(__name__)

CONTENT_TYPE = "application/problem+json"
PEOPLE_PATH = "/api/v1/me/"
MAX_REPORTED_ERRORS = 20

# Every code, with its status and an example of what it says.
CODES = {
    "invalid_request": (400, "The request is not valid: input_tokens."),
    "invalid_json": (400, "The body must be a JSON object in UTF-8."),
    "invalid_usage": (400, "A successful text operation used at least one token."),
    "invalid_amount": (400, "The number of tokens must be a whole number from 1 to 1,000,000,000,000,000."),
    "unknown_cursor": (400, "There is no such page. Start again at the first one."),
    "unauthorized": (401, "Send the billing secret: Authorization: Bearer <secret>."),
    "insufficient_tokens": (
        402,
        "This needs 1,500 tokens and 500 are available: 1,000 are missing. Buy tokens and try again.",
    ),
    "account_not_active": (403, "The balance is below zero. Buy tokens to go on; they pay the debt first."),
    "missing_scope": (403, "This key may not read that: it lacks the scope usage:read."),
    "not_found": (404, "There is no such address. The API is described at /api/docs."),
    "account_not_found": (404, "There is no such token account."),
    "usage_not_found": (404, "There is no such operation."),
    "method_not_allowed": (405, "This address takes GET."),
    "idempotency_conflict": (409, "This idempotency key was used before with other contents. Use a new key."),
    "usage_already_closed": (409, "The reservation has expired; nothing was charged."),
    "body_too_large": (413, "The body is larger than 1,048,576 bytes."),
    "unknown_model": (422, "There is no such model."),
    "retired_model": (422, "DALL·E 3 was retired. Use gpt-image-2 instead."),
    "actor_required": (422, "A team pays for this: say who of its members acted."),
    "unpriced_model": (422, "GPT-7 has no price yet. Choose another one."),
    "too_many_requests": (429, "Too many calls in this minute. Try again when it is over."),
    "unavailable": (503, "Try again in a moment, with the same Idempotency-Key."),
}


class Problem(BaseModel):
    """Why the call was refused (RFC 9457). Nothing was written."""

    type: str = Field("about:blank", description="Always about:blank; `code` says which problem it is.")
    title: str = Field(description="The status in words.")
    status: int
    detail: str = Field(description="For people.")
    code: str = Field(description="For programs.", json_schema_extra={"enum": list(CODES)})
    errors: list[dict[str, str]] | None = Field(None, description="With `invalid_request`: each wrong field.")
    needed_tokens: int | None = Field(None, description="With `insufficient_tokens`: what the operation may cost.")
    available_tokens: int | None = Field(None, description="With `insufficient_tokens`: what there is.")
    missing_tokens: int | None = Field(None, description="With `insufficient_tokens`: by how much.")
    account_status: str | None = Field(None, description="With `account_not_active`: suspended or blocked.")
    scope: str | None = Field(None, description="With `missing_scope`: the scope the key would need.")


class TooManyCalls(Exception):
    """The credential's calls of this minute are used up."""


class MissingScope(Exception):
    """The key is right and may not read this."""

    def __init__(self, scope: str) -> None:
        super().__init__(scope)
        self.scope = scope


def _document(code: str, detail: str) -> dict[str, Any]:
    status = CODES[code][0]
    title = HTTPStatus(status).phrase
    return {"type": "about:blank", "title": title, "status": status, "detail": detail, "code": code}


def _problem(code: str, detail: str = "", **extra: Any) -> HttpResponse:
    document = _document(code, detail or CODES[code][1]) | extra
    return HttpResponse(json.dumps(document), status=document["status"], content_type=CONTENT_TYPE)


def not_found_problem() -> HttpResponse:
    return _problem("not_found")


def method_problem(allowed: str) -> HttpResponse:
    response = _problem("method_not_allowed", f"This address takes {allowed}.")
    response["Allow"] = allowed
    return response


def too_many_problem() -> HttpResponse:
    return _problem("too_many_requests")


def unavailable_problem() -> HttpResponse:
    response = _problem("unavailable")
    response["Retry-After"] = "1"
    return response


def _ledger_problem(request: HttpRequest, error: ledger.LedgerError) -> HttpResponse:
    extra: dict[str, Any] = {}
    if isinstance(error, ledger.InsufficientTokens):
        extra = {
            "needed_tokens": error.needed_tokens,
            "available_tokens": error.available_tokens,
            "missing_tokens": error.missing_tokens,
        }
    elif isinstance(error, ledger.AccountNotActive):
        extra = {"account_status": error.status}
    return _problem(error.code, error.message, **extra)


def _catalogue_problem(request: HttpRequest, error: catalogue.CatalogueError) -> HttpResponse:
    codes = {catalogue.RetiredModel: "retired_model", catalogue.UnpricedModel: "unpriced_model"}
    return _problem(codes.get(type(error), "unknown_model"), error.message)


def _scope_problem(request: HttpRequest, error: MissingScope) -> HttpResponse:
    return _problem(
        "missing_scope", f"This key may not read that: it lacks the scope {error.scope}.", scope=error.scope
    )


def _too_many_problem(request: HttpRequest, error: TooManyCalls) -> HttpResponse:
    return too_many_problem()


def _validation_problem(request: HttpRequest, error: ValidationError) -> HttpResponse:
    errors = [
        {"field": _field_name(each["loc"]), "message": each["msg"]} for each in error.errors[:MAX_REPORTED_ERRORS]
    ]
    fields = ", ".join(each["field"] for each in errors)
    return _problem("invalid_request", f"The request is not valid: {fields}.", errors=errors)


def _field_name(location: tuple[str | int, ...]) -> str:
    # ("body", "body", "tokens") → "tokens": ninja names the source, then the argument that holds the body.
    parts = location[2:] if location[:2] == ("body", "body") else location[1:]
    name = ".".join(str(part) for part in parts) or str(location[0])
    return name[:100].encode("ascii", "backslashreplace").decode()


def _http_problem(request: HttpRequest, error: HttpError) -> HttpResponse:
    if isinstance(error, AuthenticationError):
        # The keys of people and the secret of servers open different doors.
        if request.path.startswith(PEOPLE_PATH):
            detail = "Send an API key that is neither revoked nor expired: Authorization: Bearer <key>."
        else:
            detail = ""
        response = _problem("unauthorized", detail)
        response["WWW-Authenticate"] = 'Bearer realm="billing"'
        return response
    return _problem("invalid_json")  # ninja raises no other


def _too_big_problem(request: HttpRequest, error: RequestDataTooBig) -> HttpResponse:
    limit = f"{settings.DATA_UPLOAD_MAX_MEMORY_SIZE:,}"
    return _problem("body_too_large", f"The body is larger than {limit} bytes.")


def _unreadable_problem(request: HttpRequest, error: Exception) -> HttpResponse:
    return _problem("invalid_json", "The body could not be read.")


def _database_problem(request: HttpRequest, error: Exception) -> HttpResponse:
    logger.error("The database did not answer", error=error.__cause__ or error)
    return unavailable_problem()


def add_problem_handlers(api: NinjaAPI) -> None:
    """Make `api` answer every refusal with a problem document."""
    handlers: dict[type[Exception], Any] = {
        ledger.LedgerError: _ledger_problem,
        catalogue.CatalogueError: _catalogue_problem,
        MissingScope: _scope_problem,
        TooManyCalls: _too_many_problem,
        ValidationError: _validation_problem,
        HttpError: _http_problem,
        RequestDataTooBig: _too_big_problem,
        UnreadablePostError: _unreadable_problem,
        RawPostDataException: _unreadable_problem,
        OperationalError: _database_problem,
        InterfaceError: _database_problem,
    }
    for error_class, handler in handlers.items():
        api.add_exception_handler(error_class, handler)


# --- In the OpenAPI document ------------------------------------------------------------------------------------------

EVERY_CALL = ("unauthorized", "too_many_requests", "unavailable")
EVERY_BODY = ("invalid_request", "invalid_json", "body_too_large")


def refusals(*codes: str) -> dict[str, Any]:
    """OpenAPI's description of the problems a call answers with, beside those of every call."""
    examples: dict[int, dict[str, Any]] = defaultdict(dict)
    for code in (*EVERY_CALL, *codes):
        status, detail = CODES[code]
        examples[status][code] = {"value": _document(code, detail)}
    return {
        "responses": {
            status: {
                "description": HTTPStatus(status).phrase,
                "content": {
                    CONTENT_TYPE: {"schema": {"$ref": "#/components/schemas/Problem"}, "examples": examples[status]}
                },
            }
            for status in sorted(examples)
        }
    }


_HEADERS = {
    "RateLimit-Limit": "How many calls a minute may have. The headers are missing while calls cannot be counted.",
    "RateLimit-Remaining": "How many are left in this minute.",
    "RateLimit-Reset": "Seconds until the next minute.",
    "Retry-After": "Seconds to wait.",
}


def complete_document(document: dict[str, Any]) -> None:
    """Add to the OpenAPI document what its calls share: the problem's schema and the headers."""
    components = document["components"]
    components["schemas"]["Problem"] = Problem.model_json_schema()
    components["headers"] = {
        name: {"description": description, "schema": {"type": "integer", "minimum": 0}}
        for name, description in _HEADERS.items()
    } | {"WWW-Authenticate": {"description": "What to send.", "schema": {"type": "string"}}}
    for methods in document["paths"].values():
        for operation in methods.values():
            _describe_body(operation)
            for status, response in operation["responses"].items():
                names = ["RateLimit-Limit", "RateLimit-Remaining", "RateLimit-Reset"]
                names += {401: ["WWW-Authenticate"], 429: ["Retry-After"], 503: ["Retry-After"]}.get(int(status), [])
                response["headers"] = {name: {"$ref": f"#/components/headers/{name}"} for name in names}


def _describe_body(operation: dict[str, Any]) -> None:
    """A body that may be left out says so by `required`. That its fields then have their defaults is clear; written
    down as a default object, with the reference wrapped for it, generators of clients leave the whole call out."""
    for content in operation.get("requestBody", {}).get("content", {}).values():
        content["schema"].pop("default", None)
        match content["schema"]:
            case {"allOf": [only]}:
                content["schema"] = only
