"""Teams: workspaces that people share. Who is in one, and what they may do there."""

from accounts.models import Membership, TeamRole, Workspace


def manager_ids(workspace: Workspace) -> list[int]:
    """A team's owners and admins: they are told of what concerns its account."""
    managers = Membership.objects.filter(
        workspace=workspace, role__in=(TeamRole.OWNER, TeamRole.ADMIN), user__is_active=True
    )
    return list(managers.order_by("pk").values_list("user_id", flat=True))


def member_ids(workspace: Workspace) -> set[int]:
    """Whose the workspace is: its owner, or everybody in its team."""
    if workspace.owner_id is not None:
        return {workspace.owner_id}
    return set(Membership.objects.filter(workspace=workspace).values_list("user_id", flat=True))
