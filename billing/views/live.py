"""/live/balance/: the balance in the header, pushed whenever it changes. Runs in the `live` process."""

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from functools import partial

from django.core.exceptions import PermissionDenied
from django.http import HttpRequest, HttpResponse, StreamingHttpResponse
from django.template.loader import render_to_string
from django.views.decorators.http import require_GET

from accounts import access
from accounts.workspaces import visible_to
from billing import ledger, payer
from billing.announcements import STREAM_SECONDS, listener
from billing.context_processors import BalanceBadge
from kit.database import in_thread

KEEP_ALIVE_SECONDS = 20  # below the idle time-outs of usual proxies
# At this event the page closes its stream; after any other end it would ask again for ever.
CLOSED = "event: closed\ndata: -\n\n"


@require_GET
async def balance(request: HttpRequest) -> HttpResponse | StreamingHttpResponse:
    user_id = await in_thread(lambda: request.user.pk)()
    if user_id is None:
        return HttpResponse(CLOSED, content_type="text/event-stream")
    try:
        account = await in_thread(payer.account_of)(request)
    except PermissionDenied:
        return HttpResponse(CLOSED, content_type="text/event-stream")
    return StreamingHttpResponse(
        _badges(user_id, account.pk, in_thread(partial(_may_still_see, request, user_id, account.workspace_id))),
        content_type="text/event-stream",
        headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"},
    )


async def _badges(user_id: int, account_id: int, may_still_see: Callable[[], Awaitable[bool]]) -> AsyncIterator[str]:
    ends_at = time.monotonic() + STREAM_SECONDS
    with listener.stream_of(user_id, account_id) as stream:
        await listener.count(user_id, stream)
        while not listener.is_closed and time.monotonic() < ends_at:
            yield await listener.read_once(account_id, in_thread(_badge_event))
            while time.monotonic() < ends_at:
                try:
                    async with asyncio.timeout(KEEP_ALIVE_SECONDS):
                        await stream.changed.wait()
                    break
                except TimeoutError:
                    yield ": still here\n\n"
            if stream.is_displaced:
                yield CLOSED
                return
            stream.changed.clear()
            if not listener.is_closed and not await may_still_see():
                return  # the browser asks anew, as whoever it is by now


def _may_still_see(request: HttpRequest, user_id: int, workspace_id: int) -> bool:
    """Whoever was signed out, or is in the team no more, is told nothing more."""
    return access.is_still_signed_in(request, user_id) and visible_to(user_id).filter(pk=workspace_id).exists()


def _badge_event(account_id: int) -> str:
    badge = BalanceBadge.of(ledger.get_account(account_id=account_id))
    html = render_to_string("billing/_balance.html", {"balance": badge})
    return "event: balance\n" + "".join(f"data: {line}\n" for line in html.splitlines()) + "\n"
