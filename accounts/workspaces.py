"""In which workspace somebody works: their personal one, or that of a team."""

from dataclasses import dataclass

from django.http import Http404, HttpRequest

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
    def manages(self) -> bool:
        """May buy, and see everything that the account paid for."""
        return self.role is None or self.role in (TeamRole.OWNER, TeamRole.ADMIN)


def list_places(user: User) -> list[Place]:
    """Where the person may work at this moment: the personal workspace first, then teams by name."""
    memberships = Membership.objects.filter(user=user, workspace__closed_at=None).select_related("workspace")
    return [
        Place(Workspace.objects.filter(owner=user).earliest("id")),
        *(Place(each.workspace, TeamRole(each.role)) for each in memberships.order_by("workspace__name", "pk")),
    ]


def find_place(user: User, workspace_id: int) -> Place | None:
    """The workspace, if the person may work in it at this moment."""
    return next((place for place in list_places(user) if place.workspace.pk == workspace_id), None)


def place_of(request: HttpRequest) -> Place:
    """Where a signed-in person's request works: in the workspace that its address or form names, else in the one they
    chose last, else in the personal one. A page whose address names one is where they work from then on.

    Raises Http404 when the one that is named is none of theirs, or not any more.
    """
    known: Place | None = getattr(request, "_place", None)
    if known is None:
        known = _find_place(request)
        request._place = known  # type: ignore[attr-defined]
    return known


def _find_place(request: HttpRequest) -> Place:
    user = request.user
    assert isinstance(user, User)  # noqa: S101 – for the type checker
    places = list_places(user)
    named = request.POST.get("workspace") or request.GET.get("workspace")
    if named is None:
        return next((each for each in places if each.workspace.pk == user.chosen_workspace_id), places[0])
    place = next((each for each in places if each.workspace.pk == read_id(named)), None)
    if place is None:
        raise Http404
    if request.method == "GET":
        choose(user, place)
    return place


def choose(user: User, place: Place) -> None:
    """Remember where the person works."""
    chosen_id = place.workspace.pk if place.is_team else None
    if user.chosen_workspace_id != chosen_id:
        User.objects.filter(pk=user.pk).update(chosen_workspace_id=chosen_id)
        user.chosen_workspace_id = chosen_id
