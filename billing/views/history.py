"""/tokens/history/ and what leaves it: the export and the monthly statements."""

from typing import Any

from django.contrib.auth.decorators import login_required
from django.http import Http404, HttpResponse, HttpResponseBase
from django.shortcuts import redirect, render
from django.urls import reverse
from django.utils import timezone
from django.views.decorators.http import require_GET

from accounts.permissions import SignedInRequest
from billing import history, payer
from billing.history import exports, statements
from billing.history.filters import TransactionFilter
from kit import outgoing, periods

ENTRIES_PER_PAGE = 25


@require_GET
@login_required
@payer.manager_required
def home(request: SignedInRequest) -> HttpResponse:
    """Any part of the person's ledger. The address says which; an invalid filter is answered with its error."""
    order = request.GET.get("sort", "")
    if order not in history.ORDERS:
        order = history.NEWEST_FIRST
    wanted = TransactionFilter(request.GET, account_id=payer.account_of(request).pk)
    context: dict[str, Any] = {
        "filter": wanted,
        "period": None if wanted.period_error else wanted.period,
        "period_error": wanted.period_error,
        "presets": periods.PRESETS,
        "order": order,
        "columns": exports.TRANSACTION_COLUMNS,
    }
    if not wanted.is_valid():
        return render(request, "billing/history.html", context, status=422)
    page = history.get_page(
        wanted.selection,
        order=order,
        cursor=history.Cursor.parse(request.GET.get("page", "")),
        limit=ENTRIES_PER_PAGE,
    )
    context |= {
        "page": page,
        "totals": history.get_totals(wanted.selection),
        "selection": wanted.selection,
        "oldest_searched": wanted.selection.oldest_moment() if wanted.selection.is_search_bounded else None,
        "searched_entries": history.SEARCHED_ENTRIES,
        "sorted_entries": history.SORTED_ENTRIES,
    }
    return render(request, "billing/history.html", context)


@require_GET
@login_required
@outgoing.limited
@payer.manager_required
def export(request: SignedInRequest) -> HttpResponseBase:
    """What the history shows for the same query, all of it, as a file."""
    wanted = TransactionFilter(request.GET, account_id=payer.account_of(request).pk)
    if not wanted.is_valid():
        return redirect(f"{reverse('tokens:history')}?{request.GET.urlencode()}")  # which says what is wrong
    name = f"postmate-history-{timezone.localdate().isoformat()}.csv"
    return outgoing.send_lines(request, exports.export_transactions(wanted.selection), filename=name)


@require_GET
@login_required
@payer.manager_required
def statement_list(request: SignedInRequest) -> HttpResponse:
    months = statements.list_months(account_id=payer.account_of(request).pk)
    return render(request, "billing/statements.html", {"months": months, "today": timezone.localdate()})


@require_GET
@login_required
@outgoing.limited
@payer.manager_required
def statement(request: SignedInRequest, year: str, month: str) -> HttpResponse:
    try:
        account = payer.account_of(request)
        found = statements.get_statement(account_id=account.pk, year=int(year), month=int(month))
    except statements.NoSuchStatement as error:
        raise Http404 from error
    return HttpResponse(
        statements.render_statement(found, account=account, written_at=timezone.now()),
        content_type="application/pdf",
        headers={"Content-Disposition": f'inline; filename="postmate-statement-{year}-{month}.pdf"'},
    )
