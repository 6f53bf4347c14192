"""What people and programs are told while the database is away: 503 and to try again, never a 500 or a stack trace."""

import sys
from typing import Any

from django.core.signals import got_request_exception
from django.dispatch import receiver
from django.http import HttpRequest, HttpResponse
from django.template.loader import render_to_string
from django.utils.safestring import SafeString
from django.views.debug import ExceptionReporter

from billing.api.problems import unavailable_problem
from kit.database import DATABASE_AWAY
from postmate.web.middleware import middleware


class _NoReport(ExceptionReporter):
    """With DEBUG, Django's page about an exception asks for the user again and again, and waits each time."""

    def get_traceback_html(self) -> SafeString:
        return SafeString()

    get_traceback_text = get_traceback_html


@receiver(got_request_exception)
def _note_outage(request: HttpRequest | None = None, **kwargs: Any) -> None:
    # Django turns an exception into a 500 after each middleware, so none of them ever sees one of another.
    if request is not None and isinstance(sys.exc_info()[1], DATABASE_AWAY):
        request.met_outage = True  # type: ignore[attr-defined]
        request.exception_reporter_class = _NoReport


def _or_unavailable(request: HttpRequest, response: HttpResponse) -> HttpResponse:
    if not getattr(request, "met_outage", False):
        return response
    response.close()
    if request.path.startswith("/api/v1/"):
        answer = unavailable_problem()
    elif request.path.startswith("/stripe/"):
        answer = HttpResponse("Not handled; send it again.", status=503, content_type="text/plain")
    else:
        answer = HttpResponse(render_to_string("503.html"), status=503)
    answer["Retry-After"] = "1"
    answer["Cache-Control"] = "no-store"
    return answer


# Answers 503 in place of the 500 of a request that lost the database, or got no connection to it.
outage_middleware = middleware(after=_or_unavailable)
