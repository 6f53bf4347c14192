"""An operation as server-sent events: what the page that started it hears while it runs, and how it ended."""

import asyncio
import json
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from typing import Any

from django.template.loader import render_to_string

from ai_ops import operations
from ai_ops.metering import STOP_NOTES, Finished, StoppedBy
from ai_ops.models import (
    ContentPiece,
    ImageBatch,
    ResultState,
)
from ai_ops.operations import Event, Events, Replayed, Result, Started
from ai_ops.providers import ProviderError, TextDelta
from billing.models import TokenUsage
from kit.database import in_thread

KEEP_ALIVE_SECONDS = 20  # below the idle time-outs of usual proxies


async def stream(first: Started | Replayed, events: AsyncGenerator[Event, None]) -> AsyncIterator[str]:
    items = _with_silences(events)
    async with aclosing(events), aclosing(items):
        try:
            yield await in_thread(_first_event)(first)
            async for item in items:
                if item is None:
                    yield ": still here\n\n"
                elif isinstance(item, TextDelta):
                    yield _event("text", text=item.text)
                elif isinstance(item, Finished):
                    usage = await in_thread(TokenUsage.objects.get)(pk=item.usage_id)
                    yield await in_thread(_done_event)(usage, first.result, item.stopped_by)
        except ProviderError as error:
            yield await in_thread(_failed_event)(error.message, first)


async def _with_silences(events: Events) -> AsyncGenerator[Event | None, None]:
    """The events, and None whenever there was none for KEEP_ALIVE_SECONDS. Close it to stop the operation."""
    while True:
        item = asyncio.ensure_future(anext(events, None))
        try:
            while not (await asyncio.wait({item}, timeout=KEEP_ALIVE_SECONDS))[0]:
                yield None
        except BaseException:
            # The reader left: so does what waits for the provider, once it has charged for what was written.
            item.cancel()
            await asyncio.wait({item})
            raise
        event = item.result()
        if event is None:
            return
        yield event


def _first_event(first: Started | Replayed) -> str:
    if isinstance(first, Replayed):
        return _replayed_events(first)
    return _event(
        "started",
        usage_id=first.usage_id,
        result_url=first.result.get_absolute_url(),
        held_tokens=first.held_tokens,
    )


def _done_event(usage: TokenUsage, result: Result | None, stopped_by: StoppedBy) -> str:
    return _event("done", stopped_by=stopped_by, **outcome_of(usage, result, stopped_by))


def outcome_of(usage: TokenUsage, result: Result | None, stopped_by: StoppedBy) -> dict[str, Any]:
    """What a script is told of an operation that has ended."""
    return {
        "billable_tokens": usage.billable_tokens,
        "result_url": result.get_absolute_url() if result else "",
        "html": _result(usage, result, stopped_by),
    }


def _failed_event(message: str, first: Started | Replayed) -> str:
    usage_id = first.usage.pk if isinstance(first, Replayed) else first.usage_id
    return _event("failed", message=message, html=_result(TokenUsage.objects.get(pk=usage_id), first.result))


def _replayed_events(item: Replayed) -> str:
    """What a form that was sent twice is answered: the outcome of the first time, or that it is still running."""
    usage, result = item.usage, item.result
    if usage.status == TokenUsage.Status.RESERVED:
        return _event("failed", message="This is already under way. Reload the page in a moment to see the result.")
    text = _event("text", text=operations.text_of(result)) if operations.text_of(result) else ""
    if usage.status == TokenUsage.Status.SUCCEEDED:
        return text + _done_event(usage, result, why_stopped(usage))
    return text + _failed_event(usage.error_message, item)


def why_stopped(usage: TokenUsage) -> StoppedBy:
    """What ended the text early, as its row says it."""
    return next((by for by, note in STOP_NOTES.items() if note == usage.error_message), "")


def _event(name: str, **data: Any) -> str:
    return f"event: {name}\ndata: {json.dumps(data)}\n\n"


def _result(usage: TokenUsage, result: Result | None, stopped_by: StoppedBy = "") -> str:
    """What became of the operation, for the page that it was started from."""
    if result is None:
        return ""
    result.refresh_from_db()
    context = {
        "usage": usage,
        "result": result,
        "stopped_by": stopped_by,
        "version": result.versions.filter(usage_id=usage.pk).first() if isinstance(result, ContentPiece) else None,
        "images": list(result.images.all()) if isinstance(result, ImageBatch) else [],
        "has_text": bool(operations.text_of(result)),
        "is_cut_short": result.state == ResultState.CUT_SHORT,
    }
    return render_to_string("ai_ops/_operation_result.html", context)
