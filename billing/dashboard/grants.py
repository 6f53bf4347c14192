"""/admin/tokens/: tokens that are given and taken, and what waits for a second person. Admins ask; superadmins act."""

from typing import Any
from uuid import uuid4

from django.contrib import messages
from django.core.exceptions import ValidationError
from django.http import HttpResponse
from django.shortcuts import get_object_or_404, redirect, render
from django.views.decorators.http import require_GET, require_http_methods, require_POST

from accounts import two_persons
from accounts.models import ChangeRequest
from accounts.permissions import SignedInRequest, admin_required, superadmin_required
from billing.dashboard.lists import ROWS_PER_PAGE, account_or_404, to_account
from billing.forms import GrantForm
from billing.models import GrantRequest, TokenAccount
from billing.models.account import WithheldBonus
from billing.models.grant_request import GrantKind
from billing.staff import accounts, grants
from kit.refusal import Refusal
from kit.text import read_id

MAX_OPEN_REQUESTS = 100
FOUND = 10  # people that a search offers


@require_http_methods(["GET", "HEAD", "POST"])
@admin_required
def new_grant(request: SignedInRequest) -> HttpResponse:
    """Give or take tokens: find the person, say how many and why, see the new balance, confirm."""
    if request.method == "POST":
        return _grant(request)
    user_id, account_id = (read_id(request.GET.get(name, "")) for name in ("user", "team"))
    if user_id is not None or account_id is not None:
        account = account_or_404(user_id, account_id)
        return _render_grant(request, new_grant_form(account), account=account)
    search = request.GET.get("search", "")
    context: dict[str, Any] = {"search": search}
    if search.strip():
        context["found"] = accounts.get_user_accounts(search=search, limit=FOUND)
    return render(request, "dashboard/grant_person.html", context)


def _grant(request: SignedInRequest) -> HttpResponse:
    account = get_object_or_404(
        TokenAccount.objects.select_related("user", "workspace"), pk=read_id(request.POST.get("account_id", "")) or 0
    )
    form = GrantForm(request.POST)
    if not form.is_valid() or "change" in request.POST:
        return _render_grant(request, form, account=account, status=400 if form.errors else 200)
    asked = {name: form.cleaned_data[name] for name in ("account_id", "tokens")}
    kind = form.cleaned_data["kind"]
    try:
        if "confirmed" not in request.POST:
            preview = grants.preview(admin=request.user, **asked, kind=kind)
            return _render_grant(request, form, account=account, preview=preview)
        asked |= {name: form.cleaned_data[name] for name in ("reason", "request_key")}
        if kind == GrantKind.GRANT:
            outcome = grants.grant_tokens(admin=request.user, **asked, expires_at=form.expires_at)
        else:
            outcome = grants.deduct_granted_tokens(admin=request.user, **asked)
    except grants.GrantKeyConflict as error:
        # What was typed stays; the key of the earlier form goes, so that sending it again can succeed.
        data = request.POST.copy()
        data["request_key"] = uuid4().hex
        form = GrantForm(data)
        form.is_valid()
        form.add_error(None, error.message)
        return _render_grant(request, form, account=account, status=error.http_status)
    except grants.GrantError as error:
        form.add_error("tokens" if isinstance(error, grants.GrantNotPossible) else None, error.message)
        return _render_grant(request, form, account=account, status=error.http_status)
    if outcome.is_open:
        messages.info(
            request,
            f"Your request is made: {_what(outcome)}. No token moves until a superadmin has approved it.",
        )
    elif outcome.state == GrantRequest.State.DONE:
        messages.success(request, f"Done: {_what(outcome)}.")
    else:
        messages.warning(request, f"This was sent before: {outcome.get_state_display().lower()}. No token moved.")
    return to_account(account)


def _what(request: GrantRequest) -> str:
    way = "for" if request.kind == GrantKind.GRANT else "taken from"
    return f"{request.tokens:,} tokens {way} {request.account.holder}"


def new_grant_form(account: TokenAccount) -> GrantForm:
    return GrantForm(initial={"account_id": account.pk, "kind": GrantKind.GRANT, "request_key": uuid4().hex})


def _render_grant(
    request: SignedInRequest,
    form: GrantForm,
    *,
    account: TokenAccount,
    preview: grants.GrantPreview | None = None,
    status: int = 200,
) -> HttpResponse:
    context = {"form": form, "account": account, "person": account.user, "preview": preview}
    return render(request, "dashboard/grant.html", context, status=status)


@require_GET
@admin_required
def request_list(request: SignedInRequest) -> HttpResponse:
    """What waits for superadmins, and what became of the rest."""
    return _render_requests(request)


@require_POST
@superadmin_required
def decide_request(request: SignedInRequest, pk: int) -> HttpResponse:
    """Approve a request, which moves the tokens, or decline it with a reason."""
    get_object_or_404(GrantRequest, pk=pk)
    reason = request.POST.get("reason", "")
    try:
        if request.POST.get("decision") == "approve":
            decided = grants.approve_request(superadmin=request.user, request_id=pk)
        elif request.POST.get("decision") == "decline":
            decided = grants.decline_request(superadmin=request.user, request_id=pk, reason=reason)
        else:
            raise grants.GrantNotPossible("Choose whether to approve or to decline.")
    except grants.GrantError as error:
        return _render_requests(
            request, refused={"pk": pk, "message": error.message, "reason": reason}, status=error.http_status
        )
    if decided.is_open:
        messages.info(request, f"Approved: {_what(decided)}. It waits for a second superadmin now.")
    elif decided.state == GrantRequest.State.DONE:
        messages.success(request, f"Approved and done: {_what(decided)}.")
    else:
        messages.success(request, f"Declined: {_what(decided)}. No token moved.")
    return redirect("dashboard:requests")


@require_POST
@superadmin_required
def decide_change(request: SignedInRequest, pk: int) -> HttpResponse:
    """Approve a role, or a setting that guards grants, that another superadmin asked for; or decline it."""
    get_object_or_404(ChangeRequest, pk=pk)
    try:
        if request.POST.get("decision") == "approve":
            decided = two_persons.approve(request_id=pk, by=request.user)
        elif request.POST.get("decision") == "decline":
            decided = two_persons.decline(request_id=pk, by=request.user)
        else:
            return _render_requests(request, change_refused="Choose whether to approve or to decline.", status=400)
    except Refusal as error:
        return _render_requests(request, change_refused=error.message, status=error.http_status)
    except ValidationError as error:
        return _render_requests(request, change_refused=" ".join(error.messages), status=400)
    messages.success(request, f"{decided.get_state_display()}: {decided}.")
    return redirect("dashboard:requests")


def _render_requests(
    request: SignedInRequest,
    *,
    refused: dict[str, Any] | None = None,
    change_refused: str = "",
    status: int = 200,
) -> HttpResponse:
    before_id, only_id = read_id(request.GET.get("before", "")), read_id(request.GET.get("request", ""))
    closed = GrantRequest.objects.exclude(state__in=GrantRequest.OPEN_STATES)
    waiting_requests = grants.list_open_requests()
    if only_id is not None:
        closed, waiting_requests = closed.filter(pk=only_id), waiting_requests.filter(pk=only_id)
    if before_id is not None:
        closed = closed.filter(pk__lt=before_id)
    rows = list(
        closed.select_related("account__user", "account__workspace", "requested_by", "decided_by").order_by("-id")[
            : ROWS_PER_PAGE + 1
        ]
    )
    open_requests = list(waiting_requests[: MAX_OPEN_REQUESTS + 1])
    waiting = [
        {
            "request": each,
            "may_decide": grants.may_decide(each, request.user),
            "new_balance_tokens": each.account.balance
            + (each.tokens if each.kind == GrantKind.GRANT else -each.tokens),
        }
        for each in open_requests[:MAX_OPEN_REQUESTS]
    ]
    bonuses = TokenAccount.objects.filter(bonus_withheld=WithheldBonus.WAITS).select_related("user").order_by("id")
    context = {
        "waiting": waiting,
        "waiting_bonuses": bonuses[:ROWS_PER_PAGE],
        "changes": [(each, two_persons.may_decide(each, request.user)) for each in two_persons.list_open()],
        "change_refused": change_refused,
        "refused": refused,
        "is_refused_shown": refused is not None and refused["pk"] in [each.pk for each in open_requests],
        "closed": rows[:ROWS_PER_PAGE],
        "next_before_id": rows[ROWS_PER_PAGE - 1].pk if len(rows) > ROWS_PER_PAGE else None,
        "before_id": before_id,
        "only_id": only_id,
        "has_more_waiting": len(open_requests) > MAX_OPEN_REQUESTS,
    }
    return render(request, "dashboard/requests.html", context, status=status)
