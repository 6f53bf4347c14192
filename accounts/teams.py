"""Teams: workspaces that people share. Who is in one, what they may do there, and how that changes.

Every change locks the team's row first, so two at once see each other: whoever is the last owner stays it. Each is in
the audit log, which names people by reference alone.
"""

import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from hashlib import sha256

import structlog
from allauth.account.adapter import get_adapter
from django.core import signing
from django.db import transaction
from django.db.models import Exists, OuterRef, Q
from django.db.models.functions import Now
from django.urls import reverse

from accounts import audit
from accounts.models import AuditEntry, Invitation, Membership, TeamRole, User, Workspace
from kit.on_commit import enqueue_on_commit
from kit.refusal import Refusal
from kit.text import one_line

logger = structlog.get_logger(__name__)

MAX_NAME_LENGTH = 100
MAX_OWNED_TEAMS = 20  # of one person, open ones
MAX_OPEN_INVITATIONS = 50
INVITATIONS_A_DAY = 100  # by one person: each is a mail
INVITATIONS_TO_ONE_A_DAY = 5
INVITATION_LIFETIME = timedelta(days=7)
_signer = signing.Signer(salt="accounts.invitation")


class TeamError(Refusal):
    """Nothing was changed. `message` is for the person, and says what to do first."""

    http_status = 409


class NotAllowed(TeamError):
    """Not with this role in the team, or not in it any more."""

    http_status = 403


class NotInvited(TeamError):
    """There is no such invitation, it was used or taken back, it is over, or it is for another address."""

    http_status = 404


# --- Who is in a team -----------------------------------------------------------------------------------------------


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


def list_open_invitations(workspace: Workspace) -> list[Invitation]:
    """Those whose link opens something still, the newest first."""
    open_ones = Invitation.objects.filter(_OPEN, workspace=workspace, expires_at__gt=Now())
    return list(open_ones.select_related("invited_by").order_by("-pk"))


def list_last_owned(*, user_id: int) -> list[Workspace]:
    """The open teams that nobody but this person owns: they would be left without an owner."""
    others = Membership.objects.filter(workspace=OuterRef("pk"), role=TeamRole.OWNER, user__is_active=True)
    return list(
        Workspace.objects.filter(
            ~Exists(others.exclude(user_id=user_id)),
            closed_at=None,
            memberships__user_id=user_id,
            memberships__role=TeamRole.OWNER,
        ).order_by("pk")
    )


def require_no_last_owner(*, user_id: int, who: str = "You are") -> None:
    """Raises TeamError with what to do first, when a team would be left without an owner."""
    if left := list_last_owned(user_id=user_id):
        names = ", ".join(team.name for team in left)
        raise TeamError(
            f"{who} the last owner of {names}. A team is handed over to another member, or closed, under Team first."
        )


# --- Changes --------------------------------------------------------------------------------------------------------


def found_team(*, founder: User, name: str) -> Workspace:
    """Make a team, with the founder as its owner. A name that they gave an open team of theirs within the last minute
    is the same click twice. Raises TeamError."""
    name = clean_name(name)
    with transaction.atomic():
        founder = User.objects.select_for_update().get(pk=founder.pk)
        owned = Workspace.objects.filter(memberships__user=founder, memberships__role=TeamRole.OWNER, closed_at=None)
        same = owned.filter(name=name, created_at__gt=Now() - timedelta(minutes=1)).first()
        if same is not None:
            return same
        if owned.count() >= MAX_OWNED_TEAMS:
            raise TeamError(f"You own {MAX_OWNED_TEAMS} teams. Close one that nobody needs, then found another.")
        team = Workspace.objects.create(kind=Workspace.Kind.TEAM, name=name)
        Membership.objects.create(workspace=team, user=founder, role=TeamRole.OWNER)
        _write(team, f"Team {team.pk} founded", founder)
    return team


def rename_team(*, by: User, workspace_id: int, name: str) -> Workspace:
    """Raises NotAllowed but for owners and admins, TeamError."""
    name = clean_name(name)
    with _locked(workspace_id, by) as (team, actor):
        _require(actor.manages)
        if team.name != name:
            team.name = name
            team.save(update_fields=["name"])
            _write(team, "Team renamed", by)
    return team


def invite(*, by: User, workspace_id: int, email: str, role: str, hands_over: bool = False) -> Invitation:
    """Invite an address; the mail goes out after the commit. A newer invitation takes the place of an older one.

    Owners and admins invite members, owners also admins. To become its owner somebody must be in the team: with
    `hands_over` whoever invites is an admin as soon as they accept. Raises NotAllowed, TeamError.
    """
    email = email.lower()
    with _locked(workspace_id, by) as (team, actor):
        _require(actor.is_owner or (actor.manages and role == TeamRole.MEMBER))
        known = Membership.objects.filter(workspace=team, user__in=_people_at(email)).first()
        if role == TeamRole.OWNER:
            if known is None:
                raise TeamError("A team is handed over to somebody who is in it. Invite them as a member first.")
            if known.role == TeamRole.OWNER:
                raise TeamError("They own the team already.")
        elif known is not None:
            raise TeamError("They are in the team already.")
        Invitation.objects.filter(_OPEN, workspace=team, email=email).update(revoked_at=Now())
        open_ones = Invitation.objects.filter(_OPEN, workspace=team, expires_at__gt=Now())
        if open_ones.count() >= MAX_OPEN_INVITATIONS:
            raise TeamError(f"{MAX_OPEN_INVITATIONS} invitations are open. Take one back, or wait for answers.")
        lately = Invitation.objects.filter(created_at__gt=Now() - timedelta(days=1))
        if lately.filter(invited_by=by).count() >= INVITATIONS_A_DAY:
            raise TeamError("You sent very many invitations today. Go on tomorrow.")
        if lately.filter(email=email).count() >= INVITATIONS_TO_ONE_A_DAY:
            raise TeamError("This address was invited very often today. Go on tomorrow.")
        # By the database's clock, as everything that ends.
        invitation = Invitation.objects.create(
            workspace=team, email=email, role=role, hands_over=hands_over, invited_by=by,
            expires_at=Now() + INVITATION_LIFETIME,
        )  # fmt: skip
        what = "Offered to hand the team over" if role == TeamRole.OWNER else f"Somebody invited as {role}"
        _write(team, what, by, subject_id=known.user_id if known else None)
        enqueue_on_commit("accounts.tasks.send_invitations")
    invitation.refresh_from_db()
    return invitation


def revoke_invitation(*, by: User, workspace_id: int, invitation_id: int) -> None:
    """Take an open invitation back; twice is once. Raises NotAllowed, NotInvited."""
    with _locked(workspace_id, by) as (team, actor):
        invitation = Invitation.objects.filter(pk=invitation_id, workspace=team).first()
        if invitation is None:
            raise NotInvited("There is no such invitation.")
        _require(actor.is_owner or (actor.manages and invitation.role == TeamRole.MEMBER))
        if Invitation.objects.filter(_OPEN, pk=invitation.pk).update(revoked_at=Now()):
            _write(team, "Invitation taken back", by)


def accept_invitation(*, user: User, token: str) -> Membership:
    """Join the team, or become its owner, as the invitation of `token` says. Once, and by nobody but a person whose
    proven address it was sent to: whoever it was forwarded to is refused. Raises NotInvited, TeamError."""
    with _locked(find_invitation(user=user, token=token).workspace_id) as (team, _):
        invitation = find_invitation(user=user, token=token)  # anew: somebody may have been quicker
        membership = Membership.objects.filter(workspace=team, user=user).first()
        if invitation.role == TeamRole.OWNER:
            membership = _become_owner(team, invitation, membership)
        elif membership is None:
            membership = Membership.objects.create(workspace=team, user=user, role=invitation.role)
            _write(team, f"Joined as {invitation.role}", user, subject_id=user.pk, after={"role": invitation.role})
        Invitation.objects.filter(pk=invitation.pk).update(accepted_at=Now(), accepted_by=user)
    return membership


def _become_owner(team: Workspace, invitation: Invitation, membership: Membership | None) -> Membership:
    giver = Membership.objects.filter(workspace=team, user=invitation.invited_by_id, role=TeamRole.OWNER).first()
    if membership is None or giver is None:
        raise NotInvited("This offer is void: you are not in the team any more, or who made it does not own it now.")
    _set_role(team, membership, TeamRole.OWNER, by=membership.user)
    if invitation.hands_over:
        _set_role(team, giver, TeamRole.ADMIN, by=membership.user)
    return membership


def find_invitation(*, user: User, token: str) -> Invitation:
    """The open invitation of a link, for the person it was sent to. Raises NotInvited."""
    try:
        _signer.unsign(token)
    except signing.BadSignature:
        raise NotInvited("This is no invitation of ours. Open the link of the mail as it stands there.") from None
    invitation = (
        Invitation.objects.select_related("workspace", "invited_by")
        .filter(_OPEN, token_hash=_hash(token), expires_at__gt=Now(), workspace__closed_at=None)
        .first()
    )
    if invitation is None:
        raise NotInvited("This invitation was used, taken back or is over. Ask for a new one.")
    if invitation.email not in {address.lower() for address in user.proven_addresses}:
        raise NotInvited("This invitation is for another address. Sign in with the one that the mail was sent to.")
    return invitation


def send_invitations(*, limit: int = 50) -> int:
    """Mail the invitations that wait for it. Returns how many went out. May run twice at once.

    The token is made here, so that it lies in no queue, and only its hash stays. Killed between the commit and the
    mail, the invitation is open and unknown to who is invited: inviting them again sends another one.
    """
    waiting = Invitation.objects.filter(_OPEN, sent_at=None, expires_at__gt=Now(), workspace__closed_at=None)
    sent = 0
    for invitation in waiting.select_related("workspace", "invited_by").order_by("pk")[:limit]:
        token = _signer.sign(secrets.token_urlsafe(24))
        mine = Invitation.objects.filter(_OPEN, pk=invitation.pk, sent_at=None)
        if not mine.update(token_hash=_hash(token), sent_at=Now()):
            continue
        url = reverse("team:join", args=[token])
        try:
            get_adapter().send_mail(
                "account/email/invitation", invitation.email, {"invitation": invitation, "invitation_url": url}
            )
        except OSError:
            logger.exception("An invitation was not sent yet", invitation_id=invitation.pk)
            Invitation.objects.filter(pk=invitation.pk).update(sent_at=None)
        else:
            sent += 1
    return sent


def change_role(*, by: User, workspace_id: int, user_id: int, role: str) -> Membership:
    """Make a member an admin or the other way round, or an owner an admin or a member, by an owner. Somebody becomes
    owner by accepting that. Raises NotAllowed, TeamError for the last owner."""
    with _locked(workspace_id, by) as (team, actor):
        membership = _get(team, user_id)
        _require(actor.is_owner)
        if role == TeamRole.OWNER:
            raise TeamError("Offer them the team: they become its owner when they accept.")
        _require_not_last_owner(team, membership)
        _set_role(team, membership, TeamRole(role), by=by)
    return membership


def remove_member(*, by: User, workspace_id: int, user_id: int) -> None:
    """Take somebody out of the team, or leave it oneself. They are refused from the next request on; what runs comes to
    its end, and rows go on naming them. Admins remove members, owners anybody. Raises NotAllowed, TeamError."""
    with _locked(workspace_id, by) as (team, actor):
        membership = _get(team, user_id)
        is_self = user_id == by.pk
        _require(is_self or actor.is_owner or (actor.manages and membership.role == TeamRole.MEMBER))
        _require_not_last_owner(team, membership)
        _remove(team, membership, by, "Left the team" if is_self else "Removed from the team")


def leave_all(*, user: User) -> None:
    """Whoever is anonymised is in no team any more. In the caller's transaction. Raises TeamError for a last owner."""
    team_ids = Membership.objects.filter(user=user).order_by("workspace_id").values_list("workspace_id", flat=True)
    for team in Workspace.objects.select_for_update().filter(pk__in=list(team_ids)).order_by("pk"):
        membership = Membership.objects.filter(workspace=team, user=user).first()
        if membership is not None:
            if team.closed_at is None:
                _require_not_last_owner(team, membership)
            _remove(team, membership, None, "Left the team, anonymised")


def close_team(*, by: User, workspace_id: int) -> Workspace:
    """Close a team for ever, by an owner; its invitations open nothing any more. In the caller's transaction, which
    closes its account as well. Raises NotAllowed."""
    with _locked(workspace_id, by) as (team, actor):
        _require(actor.is_owner)
        Workspace.objects.filter(pk=team.pk).update(closed_at=Now())
        Invitation.objects.filter(_OPEN, workspace=team).update(revoked_at=Now())
        _write(team, "Team closed", by)
    return team


def clean_name(name: str) -> str:
    """One line of readable text. Raises TeamError."""
    name = one_line(name)
    if not 1 <= len(name) <= MAX_NAME_LENGTH:
        raise TeamError(f"Give the team a name of at most {MAX_NAME_LENGTH} characters.")
    return name


# --- Helpers --------------------------------------------------------------------------------------------------------

_OPEN = Q(accepted_at=None, revoked_at=None)


@contextmanager
def _locked(workspace_id: int, by: User | None = None) -> Iterator[tuple[Workspace, Membership]]:
    """The open team under its lock, and the membership of who acts (without `by`, a blank one). Raises NotAllowed."""
    with transaction.atomic():
        team = (
            Workspace.objects.select_for_update()
            .filter(pk=workspace_id, kind=Workspace.Kind.TEAM, closed_at=None)
            .first()
        )
        actor = Membership() if by is None else Membership.objects.filter(workspace=team, user=by).first()
        if team is None or actor is None:
            raise NotAllowed("You are not in this team, or it is closed.")
        yield team, actor


def _require(is_allowed: bool) -> None:
    if not is_allowed:
        raise NotAllowed("Your role in this team does not allow that. Ask an owner.")


def _get(team: Workspace, user_id: int) -> Membership:
    membership = Membership.objects.select_related("user").filter(workspace=team, user_id=user_id).first()
    if membership is None:
        raise TeamError("They are not in the team any more.")
    return membership


def _require_not_last_owner(team: Workspace, membership: Membership) -> None:
    others = Membership.objects.filter(workspace=team, role=TeamRole.OWNER, user__is_active=True)
    if membership.role == TeamRole.OWNER and not others.exclude(pk=membership.pk).exists():
        raise TeamError(
            f"{team.name} would be left without an owner. Hand it over to another member, or close it, first."
        )


def _set_role(team: Workspace, membership: Membership, role: TeamRole, *, by: User) -> None:
    before = membership.role
    if before != role:
        membership.role = role
        membership.save(update_fields=["role"])
        _write(
            team, f"Role in the team changed from {before} to {role}", by, subject_id=membership.user_id,
            before={"role": before}, after={"role": role},
        )  # fmt: skip


def _remove(team: Workspace, membership: Membership, by: User | None, words: str) -> None:
    before = {"role": membership.role}
    membership.delete()
    # What they offered as an owner, and whatever other invitation of theirs would let them in again.
    addresses = [address.lower() for address in membership.user.proven_addresses]
    void = Q(invited_by=membership.user_id, role=TeamRole.OWNER) | Q(email__in=addresses)
    Invitation.objects.filter(_OPEN, void, workspace=team).update(revoked_at=Now())
    _write(team, words, by, subject_id=membership.user_id, before=before)


def _people_at(email: str) -> list[int]:
    """Whose proven address it is."""
    found = User.objects.filter(
        Q(email__iexact=email) | Q(emailaddress__email__iexact=email, emailaddress__verified=True)
    ).distinct()
    return [user.pk for user in found if email.lower() in {each.lower() for each in user.proven_addresses}]


def _hash(token: str) -> str:
    return sha256(token.encode()).hexdigest()


def _write(team: Workspace, summary: str, by: User | None, **details: object) -> AuditEntry:
    return audit.write(
        action=audit.Action.TEAM, summary=summary, actor=by, about=("workspace", team.pk),
        **details,  # type: ignore[arg-type]
    )  # fmt: skip
