"""/admin/tokens/accounts/: accounts, as lists and one by one. Admins look, superadmins act."""

from itertools import pairwise
from typing import Any

from django.contrib import messages
from django.db.models import Q, QuerySet
from django.http import HttpResponse
from django.shortcuts import redirect, render
from django.views.decorators.http import require_GET, require_POST

from accounts import audit, teams
from accounts.models import AuditEntry
from accounts.permissions import SignedInRequest, admin_required, superadmin_required
from billing import history
from billing.dashboard.audit_log import with_changes
from billing.dashboard.grants import new_grant_form
from billing.dashboard.lists import ROWS_PER_PAGE, account_or_404, newest_first, to_account
from billing.forms import AccountStatusForm
from billing.models import GrantRequest, Notification, Purchase, TokenAccount, TokenUsage
from billing.models.account import AccountStatus, WithheldBonus
from billing.staff import accounts, grants

ENTRIES_PER_PAGE = 15
NEWEST = 10  # of each kind of thing on a page of one account

BANDS = {
    "debt": "In debt",
    "critical": "Critical",
    "low": "Low",
    "healthy": "Healthy",
    "high": "High",
}
SORTS = {
    "-balance": "Largest balance first",
    "balance": "Smallest balance first",
    "-usage": "Most used first",
    "usage": "Least used first",
    "-last_purchase": "Newest purchase first",
    "last_purchase": "Oldest purchase first",
    "-joined": "Newest account first",
    "joined": "Oldest account first",
}

USAGE_FILTERS = {"": ("All", Q())} | {status.value: (status.label, Q(status=status)) for status in TokenUsage.Status}
PURCHASE_FILTERS = {
    "": ("All", Q()),
    "paid": ("Paid", Q(state=Purchase.State.PAID)),
    "open": ("Under way", Q(state__in=Purchase.PENDING_STATES)),
    "failed": ("Failed or expired", Q(state__in=[Purchase.State.FAILED, Purchase.State.EXPIRED])),
    "review": ("Under review", Q(state=Purchase.State.REVIEW)),
}
NOTICE_FILTERS = {
    "": ("All", Q()),
    "unread": ("Not read yet", Q(read_at=None)),
    "unsent": ("Email not sent", Q(email_wanted=True, email_sent_at=None)),
}


@require_GET
@admin_required
def account_list(request: SignedInRequest) -> HttpResponse:
    """Find accounts. The query says which, in which order and from where on."""
    asked = {name: request.GET.get(name, "") for name in ("search", "status", "band")}
    sort = request.GET.get("sort") or "-balance"
    context: dict[str, Any] = {
        "asked": asked,
        "is_narrowed": any(asked.values()),
        "sort": sort,
        "sorts": SORTS,
        "bands": BANDS,
        "statuses": dict(AccountStatus.choices),
        "cursor": request.GET.get("page", ""),
    }
    try:
        context["found"] = accounts.get_user_accounts(
            **asked, sort=sort, cursor=request.GET.get("page", ""), limit=ROWS_PER_PAGE
        )
    except accounts.InvalidSearch as error:
        return render(request, "dashboard/accounts.html", context | {"search_error": error.message}, status=422)
    return render(request, "dashboard/accounts.html", context)


@require_GET
@admin_required
def account(request: SignedInRequest, user_id: int | None = None, account_id: int | None = None) -> HttpResponse:
    """One account, a person's or a team's, with everything that is known about it."""
    return _render_account(request, account_or_404(user_id, account_id))


@require_POST
@superadmin_required
def account_status(request: SignedInRequest, user_id: int | None = None, account_id: int | None = None) -> HttpResponse:
    """Suspend, block or reactivate an account, with a reason."""
    account = account_or_404(user_id, account_id)
    form = AccountStatusForm(request.POST, account=account)
    if not form.is_valid():
        return _render_account(request, account, status_form=form, status=400)
    change = {
        AccountStatus.SUSPENDED: accounts.suspend_account,
        AccountStatus.BLOCKED: accounts.block_account,
        AccountStatus.ACTIVE: accounts.reactivate_account,
    }[form.cleaned_data["status"]]
    try:
        changed = change(superadmin=request.user, account_id=account.pk, reason=form.cleaned_data["reason"])
    except accounts.AccountError as error:
        form.add_error(None, error.message)
        account = account_or_404(user_id, account_id)
        return _render_account(request, account, status_form=form, status=error.http_status)
    words = "suspended until the debt is paid" if changed.has_debt else changed.get_status_display().lower()
    messages.success(request, f"The account of {changed.holder} is now {words}.")
    return to_account(account)


@require_POST
@admin_required
def give_bonus(request: SignedInRequest, user_id: int) -> HttpResponse:
    """Give the welcome bonus that waits for an admin."""
    person = account_or_404(user_id).holder
    try:
        grants.give_waiting_bonus(admin=request.user, user_id=user_id)
    except grants.GrantError as error:
        messages.error(request, error.message)
    else:
        messages.success(request, f"{person} has the welcome bonus now.")
    return redirect("dashboard:account", user_id)


def _render_account(
    request: SignedInRequest,
    account: TokenAccount,
    *,
    status_form: AccountStatusForm | None = None,
    status: int = 200,
) -> HttpResponse:
    person = account.user
    is_anonymised = account.status_reason == TokenAccount.ANONYMISED
    is_own = request.user.pk in teams.member_ids(account.workspace)
    if status_form is None and request.user.is_superadmin and not is_own and not is_anonymised:
        status_form = AccountStatusForm(account=account)
    page = history.get_page(
        history.select_transactions(account_id=account.pk),
        cursor=history.Cursor.parse(request.GET.get("page", "")),
        limit=ENTRIES_PER_PAGE,
    )
    last_balance = history.balance_at(account.pk, account.sequence)
    open_requests = GrantRequest.objects.filter(account=account, state__in=GrantRequest.OPEN_STATES)
    context = {
        "account": account,
        "lots": account.live_lots,
        "bonus_waits": account.bonus_withheld == WithheldBonus.WAITS,
        "person": person,
        "is_anonymised": is_anonymised,
        "page": page,
        "last_balance": last_balance,
        "is_chain_broken": last_balance != account.balance
        or any(newer.balance_before != older.balance_after for newer, older in pairwise(page.entries)),
        "usage": newest_first(
            request, TokenUsage.objects.filter(account=account), name="usage", filters=USAGE_FILTERS, limit=NEWEST
        ),
        "purchases": newest_first(
            request, Purchase.objects.filter(account=account), name="purchases", filters=PURCHASE_FILTERS, limit=NEWEST
        ),
        "notices": newest_first(request, _notices_about(account), name="notices", filters=NOTICE_FILTERS, limit=NEWEST),
        "members": [] if person else account.workspace.memberships.select_related("user").order_by("pk"),
        "audit_entries": with_changes(_audit_entries(account)),
        "open_requests": open_requests.select_related("requested_by").order_by("id"),
        "status_form": status_form,
        "grant_form": None if is_anonymised else new_grant_form(account),
    }
    return render(request, "dashboard/account.html", context, status=status)


def _notices_about(account: TokenAccount) -> QuerySet[Notification]:
    """What its person was told; of a team's members nothing, for it is theirs, not the team's."""
    return Notification.objects.filter(user=account.user) if account.user else Notification.objects.none()


def _audit_entries(account: TokenAccount) -> list[AuditEntry]:
    if account.user_id is not None:
        return audit.find_entries(subject=str(account.user_id), limit=NEWEST).entries
    return audit.find_entries(about=("workspace", account.workspace_id), limit=NEWEST).entries
