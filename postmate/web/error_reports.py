"""Errors to Sentry, when SENTRY_DSN is set: where it happened and for whom by number, and nothing that people wrote.

No bodies, headers, cookies, addresses, local variables, breadcrumbs or e-mail addresses, and of an exception's words
no more than in the log (postmate/web/logs.py).
"""

from typing import Any

import sentry_sdk
from sentry_sdk.integrations.argv import ArgvIntegration
from sentry_sdk.integrations.celery import CeleryIntegration
from sentry_sdk.integrations.django import DjangoIntegration
from sentry_sdk.integrations.logging import LoggingIntegration
from sentry_sdk.integrations.modules import ModulesIntegration
from sentry_sdk.types import Event, Hint
from structlog.types import EventDict

from postmate.web import logs

KEPT = (
    *("event_id", "timestamp", "start_timestamp", "platform", "level", "environment", "release", "sdk", "type"),
    *("exception", "threads", "logentry", "message", "logger", "fingerprint", "spans", "transaction_info"),
)
KEPT_OF_TRACE = ("trace_id", "span_id", "parent_span_id", "op", "status", "origin")


def start(*, dsn: str, environment: str, release: str, traces_sample_rate: float) -> None:
    """Report what nobody caught, in views and tasks, and what we log as an error. Call it before logs.configure."""
    sentry_sdk.init(
        dsn=dsn,
        environment=environment,
        release=release,
        traces_sample_rate=traces_sample_rate,
        send_default_pii=False,
        max_request_body_size="never",
        include_local_variables=False,
        max_breadcrumbs=0,
        auto_session_tracking=False,
        before_send=_without_content,
        before_send_transaction=_without_content,
        # None of those that would come by themselves: the AI SDKs' see prompts and answers.
        auto_enabling_integrations=False,
        integrations=[DjangoIntegration(), CeleryIntegration()],
        disabled_integrations=[ArgvIntegration(), LoggingIntegration(), ModulesIntegration()],
    )
    logs.LISTENERS.append(report_logged_error)


def report_logged_error(_: Any, __: str, event: EventDict) -> EventDict:
    """Report what we caught ourselves and logged as an error. The SDK drops an exception that it has just reported."""
    if event["level"] == "error" and event["logger"].startswith(logs.OURS) and event["logger"] != logs.__name__:
        error = logs.exception_of(event)
        with sentry_sdk.new_scope() as scope:
            scope.set_tags({name: value for name, value in event.items() if name.endswith("_id")})
            if error is not None:
                scope.capture_exception(error)
            else:
                scope.capture_message(event["event"], level="error")
    return event


def _without_content(event: Event, hint: Hint) -> Event:
    raw: dict[str, Any] = dict(event)
    kept = {name: raw[name] for name in KEPT if name in raw}
    context = logs.current_context()
    if where := context.pop("route", None) or context.get("task"):
        kept["transaction"] = where
    kept["tags"] = {**dict(raw.get("tags") or {}), **{name: str(value) for name, value in context.items() if value}}
    contexts = raw.get("contexts") or {}
    trace = contexts.get("trace") or {}
    kept["contexts"] = {
        "runtime": contexts.get("runtime", {}),
        "trace": {name: trace[name] for name in KEPT_OF_TRACE if name in trace},
    }
    kept["spans"] = [
        # Of a query the statement, whose values stand elsewhere; of a call not even the address.
        {name: span[name] for name in span if name != "data" and (name != "description" or span.get("op") == "db")}
        for span in raw.get("spans") or ()
    ]
    chain = logs.chain_of(hint["exc_info"][1]) if hint.get("exc_info") else []
    for value in (raw.get("exception") or {}).get("values", ()):
        words = next((logs.words_of(error) for error in chain if type(error).__name__ == value.get("type")), "")
        value["value"] = words or logs.WITHHELD
    return kept  # type: ignore[return-value]
