from dataclasses import dataclass
from functools import partial
from typing import Any

from django.core.exceptions import PermissionDenied
from django.http import HttpRequest

from accounts.workspaces import place_of, places_of
from billing import payer
from billing.catalogue import system_settings
from billing.models import TokenAccount
from billing.notifications import inbox


@dataclass(frozen=True, slots=True)
class BalanceBadge:
    """The balance as the header of every page shows it."""

    available_tokens: int
    balance_tokens: int
    reserved_tokens: int
    status: str
    state: str  # healthy, low, critical
    mark: str
    account_id: int
    ending_soon_tokens: int  # of the available ones, within a week

    @classmethod
    def of(cls, account: TokenAccount) -> "BalanceBadge":
        settings = system_settings.get_system_settings()
        if account.available < settings.critical_balance_tokens:
            state = "critical"
        elif account.available <= settings.low_balance_tokens:
            state = "low"
        else:
            state = "healthy"
        return cls(
            available_tokens=account.available,
            balance_tokens=account.balance,
            reserved_tokens=account.reserved,
            status=account.status,
            state=state,
            mark=account.mark,
            account_id=account.pk,
            ending_soon_tokens=account.ending_soon_tokens,
        )


def balance(request: HttpRequest) -> dict[str, Any]:
    """For signed-in people, in every template: `place`, where the page works, its `balance`, and `places`, where they
    may work."""
    if not getattr(request, "user", None) or not request.user.is_authenticated:
        return {}
    try:
        place = place_of(request)
    except PermissionDenied:  # the page that says so has a header, too
        place = places_of(request)[0]
    return {
        "balance": BalanceBadge.of(payer.account_of_workspace(place.workspace)),
        "place": place,
        "places": places_of(request),
    }


def unread_notifications(request: HttpRequest) -> dict[str, Any]:
    """`unread_notifications` for signed-in people: their number, asked for where a template shows it."""
    if not getattr(request, "user", None) or not request.user.is_authenticated:
        return {}
    return {"unread_notifications": partial(inbox.count_unread, request.user.pk)}
