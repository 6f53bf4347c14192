"""Whose account a request is about: that of the workspace it works in. And what becomes of a team's account."""

from collections.abc import Callable
from functools import partial, wraps
from typing import Any

from django.core.exceptions import PermissionDenied
from django.db import transaction
from django.http import HttpRequest
from django.http.response import HttpResponseBase

from accounts import teams
from accounts.models import Membership, User, Workspace
from accounts.workspaces import place_of
from billing import announcements, ledger
from billing.models import Purchase, TokenAccount, TokenUsage
from billing.models.fields import ClockTimestamp
from billing.payments import recharge_settings
from kit.on_commit import enqueue_on_commit


def account_of_workspace(workspace: Workspace) -> TokenAccount:
    """The account of a workspace; opened now if there is none yet."""
    if workspace.owner_id is not None:
        return ledger.get_account(user_id=workspace.owner_id)
    account = TokenAccount.objects.filter(workspace=workspace).first()
    return account or ledger.open_team_account(workspace_id=workspace.pk)


def account_of(request: HttpRequest) -> TokenAccount:
    """The account that pays for what a signed-in person's request asks for, read now. Raises Http404."""
    return account_of_workspace(place_of(request).workspace)


def manager_required(view: Callable[..., HttpResponseBase]) -> Callable[..., HttpResponseBase]:
    """For pages about money: of the person's own account, or as an owner or admin of the team they work in. Behind
    `login_required`."""

    @wraps(view)
    def guarded(request: HttpRequest, *args: Any, **kwargs: Any) -> HttpResponseBase:
        if not place_of(request).manages:
            raise PermissionDenied
        return view(request, *args, **kwargs)

    return guarded


# --- Teams and their accounts ---------------------------------------------------------------------------------------


class ClosingWaits(teams.TeamError):
    """The team's account is in use: nothing was closed."""


def found_team(*, founder: User, name: str) -> Workspace:
    """A team with its account, whose receipts go to the founder. Raises TeamError."""
    team = teams.found_team(founder=founder, name=name)
    account = ledger.open_team_account(workspace_id=team.pk)
    TokenAccount.objects.filter(pk=account.pk, billing_email="").update(billing_email=founder.email)
    return team


def update_team(*, by: User, workspace_id: int, name: str, billing_email: str) -> None:
    """Rename the team, and have its receipts sent somewhere else; Stripe is told after the commit. Raises TeamError."""
    with transaction.atomic():
        team = teams.rename_team(by=by, workspace_id=workspace_id, name=name)
        account = TokenAccount.objects.select_for_update().get(workspace=team)
        TokenAccount.objects.filter(pk=account.pk).update(billing_email=billing_email)
        enqueue_on_commit("billing.tasks.tell_customer", account.pk)


def close_team(*, by: User, workspace_id: int) -> None:
    """Close the team and its account for ever, by an owner. What is left of the balance stays in the books, and nobody
    spends it; the card is charged no more. Raises TeamError, also while something is running or being paid.

    Law 12: a payment that comes after all is credited. Law 4: holds settle or expire as ever.
    """
    with transaction.atomic():
        team = teams.close_team(by=by, workspace_id=workspace_id)
        account = TokenAccount.objects.select_for_update().get(workspace=team)
        if TokenUsage.objects.filter(account=account, status=TokenUsage.Status.RESERVED).exists():
            raise ClosingWaits(
                "An operation of the team is still running. Wait until it has ended, ten minutes at most."
            )
        if Purchase.objects.filter(
            account=account, state__in=(*Purchase.PENDING_STATES, Purchase.State.REVIEW)
        ).exists():
            raise ClosingWaits("A payment of the team is under way. Wait until it has come through or failed.")
        recharge_settings.switch_off(account_id=account.pk, reason="The team was closed.", key=f"closed-{account.pk}")
        TokenAccount.objects.filter(pk=account.pk).update(
            status=TokenAccount.Status.BLOCKED, status_reason=TokenAccount.CLOSED, status_changed_at=ClockTimestamp()
        )
    announce_members_change(workspace_id)


def announce_members_change(workspace_id: int) -> None:
    """Have every open stream look whether it may go on."""
    for account_id in TokenAccount.objects.filter(workspace_id=workspace_id).values_list("pk", flat=True):
        transaction.on_commit(partial(announcements.announce_balance_change, account_id))


def count_members(workspace_id: int) -> int:
    """How many people are in the team."""
    return Membership.objects.filter(workspace_id=workspace_id).count()
