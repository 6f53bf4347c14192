"""Whose account a request is about: that of the workspace it works in."""

from django.http import HttpRequest

from accounts.workspaces import Place, place_of
from billing import ledger
from billing.models import TokenAccount


def account_of_place(place: Place) -> TokenAccount:
    """The account of a workspace; opened now if there is none yet."""
    if place.workspace.owner_id is not None:
        return ledger.get_account(user_id=place.workspace.owner_id)
    account = TokenAccount.objects.filter(workspace=place.workspace).first()
    return account or ledger.open_team_account(workspace_id=place.workspace.pk)


def account_of(request: HttpRequest) -> TokenAccount:
    """The account that pays for what a signed-in person's request asks for, read now. Raises Http404."""
    return account_of_place(place_of(request))
