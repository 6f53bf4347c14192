"""/admin/tokens/bulk/: one action on all the accounts that a filter finds, carried out by the workers."""

from typing import Any, cast
from uuid import uuid4

from django.contrib import messages
from django.core.paginator import Paginator
from django.http import HttpResponse
from django.shortcuts import get_object_or_404, redirect, render
from django.views.decorators.http import require_GET, require_http_methods

from accounts import audit
from accounts.permissions import SignedInRequest, admin_required
from billing.dashboard.lists import choices_of
from billing.forms import BulkForm
from billing.history import exports
from billing.models import BulkJob, BulkJobRow, GrantRequest
from billing.staff import accounts, bulk
from billing.staff.accounts import AccountFilter
from kit import outgoing

ROWS_PER_PAGE = 25


@require_GET
@admin_required
def job_list(request: SignedInRequest) -> HttpResponse:
    """All jobs: whose they are, what they do, and how far they are."""
    jobs = BulkJob.objects.select_related("requested_by").order_by("-id")
    page = Paginator(jobs, ROWS_PER_PAGE).get_page(request.GET.get("page"))
    progress = bulk.progress_of(page.object_list)
    context = {"page": page, "jobs": [(job, progress[job.pk]) for job in page]}
    return render(request, "dashboard/bulk_jobs.html", context)


@require_http_methods(["GET", "HEAD", "POST"])
@admin_required
def new_job(request: SignedInRequest) -> HttpResponse:
    """Choose what to do with the accounts that the address's filter finds, see how many they are, confirm."""
    asked = request.POST if request.method == "POST" else request.GET
    found = AccountFilter(**{name: asked.get(name, "") for name in ("search", "status", "band")})
    context: dict[str, Any] = {"found": found}
    try:
        context["count"] = accounts.filter_accounts(found).count()
    except accounts.InvalidSearch as error:
        messages.error(request, error.message)
        return redirect("dashboard:accounts")
    if request.method != "POST":
        form = BulkForm(initial={"request_key": uuid4().hex}, person=request.user)
        return render(request, "dashboard/bulk_new.html", context | {"form": form})
    form = BulkForm(request.POST, person=request.user)
    context["form"] = form
    if not form.is_valid() or "change" in request.POST:
        return render(request, "dashboard/bulk_new.html", context, status=400 if form.errors else 200)
    kind, expected_rows = form.cleaned_data["kind"], form.cleaned_data["expected_rows"]
    is_confirmed = "confirmed" in request.POST and (kind == BulkJob.Kind.EXPORT or expected_rows is not None)
    if not is_confirmed and bulk.may_start(request.user, kind):
        return _confirmation(request, context)
    try:
        job = bulk.start_bulk_job(admin=request.user, filter=found, **form.cleaned_data)
    except bulk.BulkCountChanged as error:
        messages.error(request, error.message)
        context["count"] = accounts.filter_accounts(found).count()
        return _confirmation(request, context, status=error.http_status)
    except bulk.BulkError as error:
        form.add_error(None, error.message)
        return render(request, "dashboard/bulk_new.html", context, status=error.http_status)
    return redirect("dashboard:bulk-job", job.pk)


def _confirmation(request: SignedInRequest, context: dict[str, Any], *, status: int = 200) -> HttpResponse:
    """The question, with the number of accounts that goes back with the answer."""
    cleaned = context["form"].cleaned_data
    cleaned["expected_rows"] = context["count"]
    total_tokens = (cleaned.get("tokens") or 0) * context["count"]
    confirmation = {"is_confirmation": True, "total_tokens": total_tokens}
    return render(request, "dashboard/bulk_new.html", context | confirmation, status=status)


@require_http_methods(["GET", "HEAD", "POST"])
@admin_required
def job(request: SignedInRequest, pk: int) -> HttpResponse:
    """How far a job is, and what became of each account. A POST cancels it."""
    job = get_object_or_404(BulkJob.objects.select_related("requested_by"), pk=pk)
    if request.method == "POST":
        try:
            bulk.cancel_bulk_job(admin=request.user, job_id=pk)
        except bulk.BulkError as error:
            messages.error(request, error.message)
        return redirect("dashboard:bulk-job", pk)
    progress = bulk.progress(job)
    counts = [(state, getattr(progress, state)) for state in BulkJobRow.State]
    outcomes = {"": "All"} | {
        state.value: f"{state.label} ({count:,})"
        for state, count in counts
        if count and state != BulkJobRow.State.WAITING
    }
    chosen = request.GET.get("outcome", "")
    chosen = chosen if chosen in BulkJobRow.State.values else ""
    page = Paginator(bulk.find_rows(job, state=chosen), ROWS_PER_PAGE).get_page(request.GET.get("page"))
    requests = GrantRequest.objects.in_bulk(
        [row.data["grant_request_id"] for row in page if row.state == BulkJobRow.State.REQUESTED]
    )
    context = {
        "job": job,
        "progress": progress,
        "counts": [(state.label, count) for state, count in counts if count],
        "choices": choices_of(request, "outcome", outcomes, chosen=chosen),
        "page": page,
        "rows": [(row, requests.get(row.data.get("grant_request_id"))) for row in page],
        "may_cancel": request.user.is_superadmin or request.user.pk == job.requested_by_id,
    }
    return render(request, "dashboard/bulk_job.html", context)


@require_GET
@admin_required
@outgoing.limited
def job_export(request: SignedInRequest, pk: int) -> HttpResponse:
    """The figures that an export has gathered, as a file. Each download is noted: it may be another admin's export."""
    job = get_object_or_404(BulkJob, pk=pk, kind=BulkJob.Kind.EXPORT)
    audit.write(
        action=audit.Action.EXPORT,
        summary=f"Downloaded the accounts that {job} had gathered",
        actor=request.user,
        about=("bulk_job", job.pk),
    )
    rows = exports.csv_lines(bulk.exported_rows(job))
    response = outgoing.send_lines(request, rows, filename=f"postmate-accounts-{job.pk}.csv")
    return cast(HttpResponse, response)
