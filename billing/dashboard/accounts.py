"""/admin/tokens/: people's accounts, what is given to them, who did what, and the settings. Admins look and ask;
superadmins act."""

from itertools import pairwise
from typing import Any
from uuid import uuid4

from django.contrib import messages
from django.core.exceptions import ValidationError
from django.core.paginator import Paginator
from django.db.models import Q, QuerySet
from django.http import HttpRequest, HttpResponse
from django.shortcuts import get_object_or_404, redirect, render
from django.utils.crypto import salted_hmac
from django.views.decorators.http import require_GET, require_http_methods, require_POST

from accounts import audit, teams, two_persons
from accounts.models import AuditEntry, ChangeRequest
from accounts.permissions import SignedInRequest, admin_required, superadmin_required
from billing import history
from billing.catalogue import system_settings
from billing.dashboard.lists import newest_first
from billing.figures import settings_preview
from billing.forms import AccountStatusForm, GrantForm, SystemSettingsForm
from billing.models import GrantRequest, Notification, Purchase, SettingChange, SystemSettings, TokenAccount, TokenUsage
from billing.models.account import AccountStatus, WithheldBonus
from billing.models.grant_request import GrantKind
from billing.pricing import display_price
from billing.staff import accounts, grants
from kit import periods
from kit.refusal import Refusal
from kit.text import read_id

ROWS_PER_PAGE = 25
ENTRIES_PER_PAGE = 15
NEWEST = 10  # of each kind of thing on a page of one account
MAX_OPEN_REQUESTS = 100

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


# --- Accounts -------------------------------------------------------------------------------------------------------


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
    return _render_account(request, _get_account(user_id, account_id))


@require_POST
@superadmin_required
def account_status(request: SignedInRequest, user_id: int | None = None, account_id: int | None = None) -> HttpResponse:
    """Suspend, block or reactivate an account, with a reason."""
    account = _get_account(user_id, account_id)
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
        account = _get_account(user_id, account_id)
        return _render_account(request, account, status_form=form, status=error.http_status)
    words = "suspended until the debt is paid" if changed.has_debt else changed.get_status_display().lower()
    messages.success(request, f"The account of {changed.holder} is now {words}.")
    return _to_account(account)


@require_POST
@admin_required
def give_bonus(request: SignedInRequest, user_id: int) -> HttpResponse:
    """Give the welcome bonus that waits for an admin."""
    person = _get_account(user_id).holder
    try:
        grants.give_waiting_bonus(admin=request.user, user_id=user_id)
    except grants.GrantError as error:
        messages.error(request, error.message)
    else:
        messages.success(request, f"{person} has the welcome bonus now.")
    return redirect("dashboard:account", user_id)


def _get_account(user_id: int | None, account_id: int | None = None) -> TokenAccount:
    """A person's account by their id, or a team's by its own: each has one address."""
    found = TokenAccount.objects.select_related("user", "workspace", "auto_recharge_package")
    if account_id is not None:
        return get_object_or_404(found, pk=account_id, user=None)
    return get_object_or_404(found, user_id=user_id or 0)


def _to_account(account: TokenAccount) -> HttpResponse:
    if account.user_id is None:
        return redirect("dashboard:team-account", account.pk)
    return redirect("dashboard:account", account.user_id)


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
        "audit_entries": _with_changes(_audit_entries(account)),
        "open_requests": open_requests.select_related("requested_by").order_by("id"),
        "status_form": status_form,
        "grant_form": None if is_anonymised else _new_grant_form(account),
    }
    return render(request, "dashboard/account.html", context, status=status)


def _notices_about(account: TokenAccount) -> QuerySet[Notification]:
    """What its person was told; of a team's members nothing, for it is theirs, not the team's."""
    return Notification.objects.filter(user=account.user) if account.user else Notification.objects.none()


def _audit_entries(account: TokenAccount) -> list[AuditEntry]:
    if account.user_id is not None:
        return audit.find_entries(subject=str(account.user_id), limit=NEWEST).entries
    return audit.find_entries(about=("workspace", account.workspace_id), limit=NEWEST).entries


# --- Grants ---------------------------------------------------------------------------------------------------------


@require_http_methods(["GET", "HEAD", "POST"])
@admin_required
def new_grant(request: SignedInRequest) -> HttpResponse:
    """Give or take tokens: find the person, say how many and why, see the new balance, confirm."""
    if request.method == "POST":
        return _grant(request)
    user_id, account_id = (read_id(request.GET.get(name, "")) for name in ("user", "team"))
    if user_id is not None or account_id is not None:
        account = _get_account(user_id, account_id)
        return _render_grant(request, _new_grant_form(account), account=account)
    search = request.GET.get("search", "")
    context: dict[str, Any] = {"search": search}
    if search.strip():
        context["found"] = accounts.get_user_accounts(search=search, limit=NEWEST)
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
        give_or_take = grants.grant_tokens if kind == GrantKind.GRANT else grants.deduct_granted_tokens
        outcome = give_or_take(
            admin=request.user,
            **asked,
            reason=form.cleaned_data["reason"],
            request_key=form.cleaned_data["request_key"],
        )
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
    return _to_account(account)


def _what(request: GrantRequest) -> str:
    way = "for" if request.kind == GrantKind.GRANT else "taken from"
    return f"{request.tokens:,} tokens {way} {request.account.holder}"


def _new_grant_form(account: TokenAccount) -> GrantForm:
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


# --- Requests -------------------------------------------------------------------------------------------------------


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


# --- Audit log ------------------------------------------------------------------------------------------------------


@require_GET
@admin_required
def audit_log(request: SignedInRequest) -> HttpResponse:
    """Search the audit log, as the query says."""
    asked = {name: request.GET.get(name, "").strip() for name in ("actor", "subject", "action", "outcome")}
    actions, outcomes = dict(audit.Action.choices), dict(AuditEntry.Outcome.choices)
    for name, known in (("action", actions), ("outcome", outcomes)):
        asked[name] = asked[name] if asked[name] in known else ""
    context: dict[str, Any] = {
        "asked": asked,
        "actions": actions,
        "outcomes": outcomes,
        "presets": periods.PRESETS,
        "period": periods.preset_period("all"),
    }
    try:
        period = periods.read_period(request.GET, default="all")
    except periods.InvalidPeriod as error:
        return render(request, "dashboard/audit.html", context | {"period_error": error.message}, status=422)
    before_id = read_id(request.GET.get("before", ""))
    found = audit.find_entries(
        actor=asked["actor"],
        subject=asked["subject"],
        action=asked["action"],
        outcome=asked["outcome"],
        since=period.since,
        until=period.until,
        before_id=before_id,
        limit=ROWS_PER_PAGE,
    )
    context |= {
        "period": period,
        "entries": _with_changes(found.entries),
        "next_before_id": found.next_before_id,
        "before_id": before_id,
        "is_narrowed": any(asked.values()) or period.preset != "all",
    }
    return render(request, "dashboard/audit.html", context)


def _with_changes(entries: list[AuditEntry]) -> list[dict[str, Any]]:
    """Entries with their action in words and what they changed: (name, from, to)."""
    rows = []
    for entry in entries:
        before, after = entry.before or {}, entry.after or {}
        changes = [
            (name.replace("_", " ").capitalize(), _in_words(before.get(name)), _in_words(after.get(name)))
            for name in dict.fromkeys([*before, *after])
        ]
        rows.append({"entry": entry, "action": audit.action_label(entry), "changes": changes})
    return rows


def _in_words(value: Any) -> str:
    if value is None or value == "":
        return "–"
    return f"{value:,}" if type(value) is int else str(value)


# --- Settings -------------------------------------------------------------------------------------------------------


@require_http_methods(["GET", "HEAD", "POST"])
@admin_required
def settings(request: SignedInRequest) -> HttpResponse:
    """The settings of the installation and who changed them. Superadmins change them: previewed first, then saved."""
    if request.method == "POST":
        return _change_settings(request)
    return _render_settings(request, SystemSettingsForm(settings=system_settings.get_system_settings()))


@superadmin_required
def _change_settings(request: SignedInRequest) -> HttpResponse:
    current = system_settings.get_system_settings()
    form = SystemSettingsForm(request.POST, settings=current)
    if not form.is_valid():
        return _render_settings(request, form, status=400)
    changes = form.changes
    if not changes:
        messages.info(request, "Nothing is different: these are the settings that apply now.")
        return redirect("dashboard:settings")
    fingerprint = _fingerprint(current, changes)
    try:
        if "save" in request.POST and request.POST.get("previewed") == fingerprint:
            saved = system_settings.update_system_settings(changes=changes, changed_by_id=request.user.pk)
            if any(getattr(saved, name) != value for name, value in changes.items()):
                messages.warning(
                    request, "What lets one person grant more waits for another superadmin, under Requests."
                )
            else:
                messages.success(request, "Saved. Operations that are running keep their prices.")
            return redirect("dashboard:settings")
        preview = settings_preview.preview_settings(changes)
    except ValidationError as error:
        form.add_error(None, error)
        return _render_settings(request, form, status=400)
    if "save" in request.POST:
        messages.warning(request, "Not saved yet: this is not what the last preview showed. Look at the new one.")
    return _render_settings(request, form, preview=preview, fingerprint=fingerprint)


def _fingerprint(current: SystemSettings, changes: dict[str, Any]) -> str:
    """Names one change, from which values to which. Another one needs a preview of its own: also when somebody else
    saved something meanwhile, which the form of before would silently take back."""
    text = repr([(name, str(getattr(current, name)), str(value)) for name, value in sorted(changes.items())])
    return salted_hmac("billing.settings-preview", text).hexdigest()


def _render_settings(
    request: HttpRequest,
    form: SystemSettingsForm,
    *,
    preview: settings_preview.SettingsPreview | None = None,
    fingerprint: str = "",
    status: int = 200,
) -> HttpResponse:
    changes = SettingChange.objects.select_related("changed_by")
    page = Paginator(changes, ROWS_PER_PAGE).get_page(request.GET.get("page"))
    context = {
        "form": form,
        "preview": preview,
        "preview_rows": _preview_rows(preview),
        "fingerprint": fingerprint,
        "page": page,
        "history": [
            (
                change,
                form.label_of(change.field),
                form.kept_in_words(change.field, change.old_value),
                form.kept_in_words(change.field, change.new_value),
            )
            for change in page
        ],
    }
    return render(request, "dashboard/settings.html", context, status=status)


def _preview_rows(preview: settings_preview.SettingsPreview | None) -> list[tuple[str, str, str]]:
    """The preview for people: figure, as it was, as it would have been."""
    if preview is None:
        return []

    def percent(outcome: settings_preview.Outcome) -> str:
        return "–" if outcome.margin_percent is None else f"{outcome.margin_percent} %"

    now, then = preview.now, preview.then
    return [
        ("Billed tokens", f"{now.billed_tokens:,}", f"{then.billed_tokens:,}"),
        ("Their value at the exchange rate", _dollars(now.value_microusd), _dollars(then.value_microusd)),
        ("What the providers cost", _dollars(now.provider_cost_microusd), _dollars(then.provider_cost_microusd)),
        ("Margin", _dollars(now.margin_microusd), _dollars(then.margin_microusd)),
        ("Margin, of the value", percent(now), percent(then)),
        ("Welcome bonuses (tokens)", f"{now.bonus_tokens:,}", f"{then.bonus_tokens:,}"),
        ("Accounts with a low balance now", f"{now.low_accounts:,}", f"{then.low_accounts:,}"),
        ("Accounts with a critical balance now", f"{now.critical_accounts:,}", f"{then.critical_accounts:,}"),
    ]


def _dollars(microusd: int) -> str:
    """To the nearest cent."""
    return ("−" if microusd < 0 else "") + display_price((abs(microusd) + 5_000) // 10_000)
