"""/team/: the teams somebody is in: who is in them, what they use, and how that changes."""

from typing import Any

from django.contrib import messages
from django.contrib.auth.decorators import login_required
from django.core.exceptions import PermissionDenied
from django.http import Http404, HttpResponse
from django.shortcuts import redirect, render
from django.urls import reverse
from django.utils.http import url_has_allowed_host_and_scheme
from django.views.decorators.cache import never_cache
from django.views.decorators.http import require_GET, require_http_methods, require_POST

from accounts import teams
from accounts.models import Membership, TeamRole
from accounts.permissions import SignedInRequest
from accounts.workspaces import Place, enter, places_of
from billing import payer
from billing.forms import CloseTeamForm, HandOverForm, InvitationForm, TeamForm, TeamReceiptsForm
from billing.models import TokenAccount
from billing.payments import recharge_settings
from billing.usage import stats

# --- Choosing -------------------------------------------------------------------------------------------------------


@require_POST
@login_required
def switch(request: SignedInRequest) -> HttpResponse:
    """The switcher in the header: work in the `workspace` of the form from now on."""
    place = enter(request, _number(request.POST.get("workspace", "")))
    messages.info(
        request, f"You work in {place.workspace.name} now." if place.is_team else "You work for yourself now."
    )
    return redirect("studio:home")


@require_GET
@login_required
def enter_team(request: SignedInRequest, workspace_id: int) -> HttpResponse:
    """Where notices lead: into the workspace, and there to `next`."""
    enter(request, workspace_id)
    target = request.GET.get("next", "")
    is_ours = url_has_allowed_host_and_scheme(target, allowed_hosts=None) and target.startswith("/")
    return redirect(target if is_ours else reverse("tokens:home"))


def _number(text: str) -> int:
    return int(text) if text.isascii() and text.isdigit() and len(text) < 19 else 0


# --- Pages ----------------------------------------------------------------------------------------------------------


@require_GET
@login_required
def home(request: SignedInRequest) -> HttpResponse:
    """The person's teams, and how to found one."""
    return render(request, "team/teams.html", {"teams": [each for each in places_of(request) if each.is_team]})


@require_http_methods(["GET", "POST"])
@login_required
def found(request: SignedInRequest) -> HttpResponse:
    form = TeamForm(request.POST or None)
    if request.method == "POST" and form.is_valid():
        try:
            team = payer.found_team(founder=request.user, name=form.cleaned_data["name"])
        except teams.TeamError as error:
            form.add_error("name", error.message)
        else:
            enter(request, team.pk)
            messages.success(
                request, f"{team.name} is ready, and you are working in it now. Buy its first tokens and invite people."
            )
            return redirect("team:members", team.pk)
    return render(request, "team/found.html", {"form": form}, status=400 if form.errors else 200)


@require_GET
@login_required
def members(request: SignedInRequest, workspace_id: int) -> HttpResponse:
    """Who is in the team, who is invited, and what they used this month."""
    return _render_members(request, _enter(request, workspace_id))


def _render_members(
    request: SignedInRequest, place: Place, *, invitation_form: InvitationForm | None = None, status: int = 200
) -> HttpResponse:
    account = payer.account_of(request)
    spent = stats.use_by_member(account_id=account.pk)
    rows = Membership.objects.filter(workspace=place.workspace).select_related("user").order_by("pk")
    open_ones = teams.list_open_invitations(place.workspace) if place.manages else []
    context: dict[str, Any] = {
        "account": account,
        "members": [(row, spent.get(row.user_id)) for row in rows],
        "former": [spent[user_id] for user_id in spent.keys() - {row.user_id for row in rows}],
        "invitations": open_ones,
        "invitation_form": invitation_form or InvitationForm(may_invite_admins=place.is_owner),
        "hand_over_form": HandOverForm(workspace=place.workspace, owner=request.user) if place.is_owner else None,
        "roles": [TeamRole.ADMIN, TeamRole.MEMBER],
    }
    return render(request, "team/members.html", context, status=status)


def _enter(request: SignedInRequest, workspace_id: int, *, may: str = "") -> Place:
    """Work in the team of the address. `may` is what the person must be: "manages", "is_owner". Raises
    PermissionDenied, also where there is no such team: which numbers are taken is nobody's to know."""
    place = enter(request, workspace_id)
    if not place.is_team or (may and not getattr(place, may)):
        raise PermissionDenied
    return place


# --- Members --------------------------------------------------------------------------------------------------------


@require_POST
@login_required
def invite(request: SignedInRequest, workspace_id: int) -> HttpResponse:
    place = _enter(request, workspace_id, may="manages")
    form = InvitationForm(request.POST, may_invite_admins=place.is_owner)
    if form.is_valid():
        try:
            invitation = teams.invite(by=request.user, workspace_id=workspace_id, **form.cleaned_data)
        except teams.TeamError as error:
            form.add_error("email", error.message)
        else:
            messages.success(request, f"{invitation.email} is invited. The link in the mail works for seven days.")
            return redirect("team:members", workspace_id)
    return _render_members(request, place, invitation_form=form, status=400)


@require_POST
@login_required
def revoke(request: SignedInRequest, workspace_id: int, pk: int) -> HttpResponse:
    _enter(request, workspace_id, may="manages")
    try:
        teams.revoke_invitation(by=request.user, workspace_id=workspace_id, invitation_id=pk)
    except teams.NotInvited as error:
        raise Http404 from error
    except teams.TeamError as error:
        messages.error(request, error.message)
    else:
        messages.success(request, "The invitation is taken back. Its link opens nothing any more.")
    return redirect("team:members", workspace_id)


@require_http_methods(["GET", "POST"])
@login_required
@never_cache
def join(request: SignedInRequest, token: str) -> HttpResponse:
    """Where the link of an invitation leads."""
    try:
        invitation = teams.find_invitation(user=request.user, token=token)
        if request.method == "GET":
            return render(request, "team/join.html", {"invitation": invitation})
        teams.accept_invitation(user=request.user, token=token)
    except teams.TeamError as error:
        return render(request, "team/join.html", {"refusal": error.message}, status=error.http_status)
    enter(request, invitation.workspace_id)
    payer.announce_members_change(invitation.workspace_id)
    words = (
        "is yours now" if invitation.role == TeamRole.OWNER else "is where you work now; it pays for what you do there"
    )
    messages.success(request, f"{invitation.workspace.name} {words}.")
    return redirect("team:members", invitation.workspace_id)


@require_POST
@login_required
def role(request: SignedInRequest, workspace_id: int, user_id: int) -> HttpResponse:
    _enter(request, workspace_id, may="is_owner")
    wanted = request.POST.get("role", "")
    if wanted not in TeamRole.values:
        return HttpResponse(status=400)
    try:
        changed = teams.change_role(by=request.user, workspace_id=workspace_id, user_id=user_id, role=wanted)
    except teams.TeamError as error:
        messages.error(request, error.message)
    else:
        messages.success(request, f"{changed.user} is {changed.get_role_display().lower()} now.")
    return redirect("team:members", workspace_id)


@require_http_methods(["GET", "POST"])
@login_required
def remove(request: SignedInRequest, workspace_id: int, user_id: int) -> HttpResponse:
    """Take somebody out of the team, or leave it, after a question."""
    place = _enter(request, workspace_id)
    membership = Membership.objects.filter(workspace=place.workspace, user_id=user_id).select_related("user").first()
    is_self = user_id == request.user.pk
    if membership is None or not (is_self or place.manages):
        raise PermissionDenied
    if request.method == "GET":
        return render(request, "team/remove.html", {"membership": membership, "is_self": is_self})
    try:
        teams.remove_member(by=request.user, workspace_id=workspace_id, user_id=user_id)
    except teams.TeamError as error:
        messages.error(request, error.message)
        return redirect("team:members", workspace_id)
    payer.announce_members_change(workspace_id)
    if is_self:
        messages.success(request, f"You left {place.workspace.name}.")
        return redirect("team:home")
    messages.success(request, f"{membership.user} is in {place.workspace.name} no more.")
    return redirect("team:members", workspace_id)


@require_POST
@login_required
def hand_over(request: SignedInRequest, workspace_id: int) -> HttpResponse:
    """Offer the team to another member, who becomes its owner when they accept."""
    place = _enter(request, workspace_id, may="is_owner")
    form = HandOverForm(request.POST, workspace=place.workspace, owner=request.user)
    if not form.is_valid():
        messages.error(request, "Choose one of the members.")
        return redirect("team:members", workspace_id)
    receiver = form.cleaned_data["receiver"]
    try:
        teams.invite(
            by=request.user, workspace_id=workspace_id, email=receiver.email, role=TeamRole.OWNER, hands_over=True
        )
    except teams.TeamError as error:
        messages.error(request, error.message)
    else:
        messages.success(request, f"{receiver} is asked by mail. You stay the owner until they accept.")
    return redirect("team:members", workspace_id)


# --- The team itself ------------------------------------------------------------------------------------------------


@require_http_methods(["GET", "POST"])
@login_required
def settings(request: SignedInRequest, workspace_id: int) -> HttpResponse:
    """What the team is called, and where its receipts go."""
    place = _enter(request, workspace_id, may="manages")
    account = payer.account_of(request)
    initial = {"name": place.workspace.name, "billing_email": account.billing_email}
    form = TeamReceiptsForm(request.POST or None, initial=initial)
    if request.method == "POST" and form.is_valid():
        try:
            payer.update_team(by=request.user, workspace_id=workspace_id, **form.cleaned_data)
        except teams.TeamError as error:
            form.add_error("name", error.message)
        else:
            messages.success(request, "Saved.")
            return redirect("team:settings", workspace_id)
    return render(request, "team/settings.html", {"form": form}, status=400 if form.errors else 200)


@require_http_methods(["GET", "POST"])
@login_required
def close(request: SignedInRequest, workspace_id: int) -> HttpResponse:
    """Close the team for ever, after its name was typed."""
    place = _enter(request, workspace_id, may="is_owner")
    account: TokenAccount = payer.account_of(request)
    form = CloseTeamForm(request.POST or None, name=place.workspace.name)
    if request.method == "POST" and form.is_valid():
        try:
            payer.close_team(by=request.user, workspace_id=workspace_id)
        except teams.TeamError as error:
            form.add_error(None, error.message)
        else:
            messages.success(request, f"{place.workspace.name} is closed.")
            return redirect("team:home")
    context = {
        "form": form,
        "account": account,
        "counts": payer.count_members(workspace_id),
        "recharges": recharge_settings.get_overview(account, attempts=1).state == "on",
    }
    return render(request, "team/close.html", context, status=400 if form.errors else 200)
