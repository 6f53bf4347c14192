"""/admin/tokens/finance/: the files of the nightly finance export."""

from datetime import date
from typing import cast

from django.core.paginator import Paginator
from django.http import Http404, HttpResponse
from django.shortcuts import render
from django.views.decorators.http import require_GET

from accounts import audit
from accounts.permissions import SignedInRequest, admin_required
from billing.figures import finance
from kit import outgoing

DAYS_PER_PAGE = 31


@require_GET
@admin_required
def home(request: SignedInRequest) -> HttpResponse:
    page = Paginator(finance.list_files(), DAYS_PER_PAGE).get_page(request.GET.get("page"))
    return render(request, "dashboard/finance.html", {"page": page})


@require_GET
@admin_required
def file(request: SignedInRequest, day: str) -> HttpResponse:
    """A day's file. Each download is noted in the audit log before anything is sent."""
    try:
        response = outgoing.send(
            request,
            finance.path_of(date.fromisoformat(day)),
            filename=f"postmate-{day}.zip",
            content_type="application/zip",
        )
    except (ValueError, FileNotFoundError):
        raise Http404 from None
    audit.write(action=audit.Action.EXPORT, summary=f"Downloaded the finance export of {day}", actor=request.user)
    return cast(HttpResponse, response)
