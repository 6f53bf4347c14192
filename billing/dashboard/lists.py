"""Lists on the dashboard's pages: what of a list is shown and from where on, kept in the page's address."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from django.db.models import Q, QuerySet
from django.http import HttpRequest, HttpResponse
from django.shortcuts import get_object_or_404, redirect

from billing.models import TokenAccount
from kit.text import read_id

ROWS_PER_PAGE = 25


@dataclass(frozen=True, slots=True)
class Choice:
    """A part of a list that can be chosen, and the address that shows it."""

    value: str
    label: str
    url: str
    is_chosen: bool


@dataclass(frozen=True, slots=True)
class ListPage:
    """Some rows of a list that is read along its time."""

    rows: list[Any]
    choices: list[Choice]
    is_later: bool  # not the first page
    first_url: str
    next_url: str  # "" on the last page


def choices_of(
    request: HttpRequest, parameter: str, labels: Mapping[str, str], *, chosen: str, page_parameter: str = "page"
) -> list[Choice]:
    """A choice for each of the labels, by the parameter's value; "" is the one without it. Each begins at page one."""
    return [
        Choice(value, label, _url(request, {parameter: value, page_parameter: ""}), value == chosen)
        for value, label in labels.items()
    ]


def newest_first(
    request: HttpRequest, rows: QuerySet[Any], *, name: str, filters: Mapping[str, tuple[str, Q]], limit: int
) -> ListPage:
    """The rows by `created_at` that `name`_show (one of the filters) and `name`_before (the last row before the page)
    ask for. What the address names and does not exist is ignored. Costs the same on every page."""
    show, before = f"{name}_show", f"{name}_before"
    chosen = request.GET.get(show, "")
    chosen = chosen if chosen in filters else ""
    rows = rows.filter(filters[chosen][1])
    last_id = read_id(request.GET.get(before, ""))
    last_at = None
    if last_id is not None:
        last_at = rows.filter(pk=last_id).values_list("created_at", flat=True).first()
    if last_at is not None:
        rows = rows.filter(created_at__lte=last_at).exclude(created_at=last_at, pk__gte=last_id)
    found = list(rows.order_by("-created_at", "-pk")[: limit + 1])
    labels = {value: label for value, (label, _) in filters.items()}
    return ListPage(
        rows=found[:limit],
        # Where there is nothing at all there is nothing to choose either.
        choices=choices_of(request, show, labels, chosen=chosen, page_parameter=before) if found or chosen else [],
        is_later=last_at is not None,
        first_url=_url(request, {before: ""}),
        next_url=_url(request, {before: str(found[limit - 1].pk)}) if len(found) > limit else "",
    )


def _url(request: HttpRequest, changes: Mapping[str, str]) -> str:
    """The address of the page with other parameters; an empty one is left out."""
    query = request.GET.copy()
    for name, value in changes.items():
        query.pop(name, None)
        if value:
            query[name] = value
    return f"{request.path}?{query.urlencode()}" if query else request.path


def account_or_404(user_id: int | None, account_id: int | None = None) -> TokenAccount:
    """A person's account by their id, or a team's by its own: each has one address."""
    found = TokenAccount.objects.select_related("user", "workspace", "auto_recharge_package")
    if account_id is not None:
        return get_object_or_404(found, pk=account_id, user=None)
    return get_object_or_404(found, user_id=user_id or 0)


def to_account(account: TokenAccount) -> HttpResponse:
    """To the page of an account."""
    if account.user_id is None:
        return redirect("dashboard:team-account", account.pk)
    return redirect("dashboard:account", account.user_id)
