"""Middleware that looks at a request before its answer is made, or changes the answer, in either kind of process."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from asgiref.sync import iscoroutinefunction
from django.utils.decorators import sync_and_async_middleware

if TYPE_CHECKING:
    from django.http import HttpRequest, HttpResponse  # settings read logs.py, which reads this, before there are apps

GetResponse = Callable[["HttpRequest"], Any]


def middleware(
    *,
    before: Callable[["HttpRequest"], None] = lambda request: None,
    after: Callable[["HttpRequest", "HttpResponse"], "HttpResponse"] = lambda request, response: response,
) -> Callable[[GetResponse], GetResponse]:
    """Both run where the request is served, so neither may wait for anything. Django's MiddlewareMixin would take each
    asynchronous request through a thread."""

    def made(get_response: GetResponse) -> GetResponse:
        async def answer_async(request: "HttpRequest") -> "HttpResponse":
            before(request)
            return after(request, await get_response(request))

        def answer(request: "HttpRequest") -> "HttpResponse":
            before(request)
            return after(request, get_response(request))

        return answer_async if iscoroutinefunction(get_response) else answer

    return sync_and_async_middleware(made)
