"""In which workspace somebody works: their personal one, or that of a team."""

from dataclasses import dataclass

from django.core.exceptions import PermissionDenied
from django.db.models import Q, QuerySet
from django.http import HttpRequest

from accounts.models import Membership, TeamRole, User, Workspace
from kit.text import read_id


@dataclass(frozen=True, slots=True)
class Place:
    """A workspace, and what the person is in its team; in their personal one they are alone."""

    workspace: Workspace
    role: TeamRole | None = None

    @property
    def is_team(self) -> bool:
        return self.role is not None

    @property
    def is_owner(self) -> bool:
        return self.role in (None, TeamRole.OWNER)

    @property
    def manages(self) -> bool:
        """May buy, and see everything that the account paid for."""
        return self.role is None or self.role in (TeamRole.OWNER, TeamRole.ADMIN)

    @property
    def team_id(self) -> int | None:
        """The team's workspace; None for the personal one."""
        return self.workspace.pk if self.is_team else None


def visible_to(user_id: int) -> QuerySet[Workspace]:
    """Where the person may work at this moment: their own workspace, and those of the open teams they are in."""
    return Workspace.objects.filter(Q(owner_id=user_id) | Q(memberships__user_id=user_id), closed_at=None)


def list_places(user: User) -> list[Place]:
    """The same as places: the personal one first, then teams by name."""
    memberships = Membership.objects.filter(user=user, workspace__closed_at=None).select_related("workspace")
    return [
        Place(Workspace.objects.filter(owner=user).earliest("id")),
        *(Place(each.workspace, TeamRole(each.role)) for each in memberships.order_by("workspace__name", "pk")),
    ]


def places_of(request: HttpRequest) -> list[Place]:
    """Where a signed-in person may work, looked up once for a request."""
    known: list[Place] | None = getattr(request, "_places", None)
    if known is None:
        assert isinstance(request.user, User)  # noqa: S101 – for the type checker
        known = list_places(request.user)
        request._places = known  # type: ignore[attr-defined]
    return known


def find_place(request: HttpRequest, workspace_id: int) -> Place | None:
    """The workspace, if the person may work in it at this moment."""
    return next((place for place in places_of(request) if place.workspace.pk == workspace_id), None)


def place_of(request: HttpRequest) -> Place:
    """Where a signed-in person's request works: in the workspace that its address or form names, else in the one they
    chose last, else in the personal one.

    Raises PermissionDenied when the one that is named is none of theirs, or not any more.
    """
    known: Place | None = getattr(request, "_place", None)
    if known is None:
        named = request.POST.get("workspace") or request.GET.get("workspace")
        if named is None:
            chosen_id = getattr(request.user, "chosen_workspace_id", None)
            known = (find_place(request, chosen_id) if chosen_id else None) or places_of(request)[0]
        else:
            known = find_place(request, read_id(named) or 0)
        if known is None:
            raise PermissionDenied("You are not in this workspace, or not any more.")
        request._place = known  # type: ignore[attr-defined]
    return known


def enter(request: HttpRequest, workspace_id: int) -> Place:
    """Work in this workspace from now on: in this request, and in those that name none. Raises PermissionDenied."""
    place = find_place(request, workspace_id)
    if place is None:
        raise PermissionDenied("You are not in this workspace, or not any more.")
    request._place = place  # type: ignore[attr-defined]
    user = request.user
    if isinstance(user, User) and user.chosen_workspace_id != place.team_id:
        User.objects.filter(pk=user.pk).update(chosen_workspace_id=place.team_id)
        user.chosen_workspace_id = place.team_id
    return place
