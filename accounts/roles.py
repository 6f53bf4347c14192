"""Who is admin and superadmin: changed here, and every change is in the audit log."""

from typing import cast

from django.db import connection, transaction

from accounts import audit, mailboxes
from accounts.models import ROLE_CHANGE_IS_WRITTEN, ChangeRequest, User
from kit.refusal import Refusal

RANKS = (User.Role.USER, User.Role.ADMIN, User.Role.SUPERADMIN)


class RoleNotChanged(Refusal):
    """Refused; nothing was changed. `message` is for the person."""

    http_status = 403


def find_superadmin(user_id: int) -> User | None:
    """The person, if they are an active superadmin at this moment, whatever they were when they signed in."""
    return User.objects.filter(pk=user_id, role=User.Role.SUPERADMIN, is_active=True).first()


def are_one_person(one: User, other: User) -> bool:
    """Whether they count as one where two are needed: whoever reads a mailbox can open every account that it opens."""
    return one.pk == other.pk or not _mailboxes(one).isdisjoint(_mailboxes(other))


def _mailboxes(user: User) -> set[str]:
    return {mailboxes.canonical(address) for address in (user.email, *user.proven_addresses)}


def change_role(*, user_id: int, role: str, changed_by: User, reason: str = "") -> ChangeRequest | None:
    """Take a role away at once, or ask for a higher one, which another superadmin approves: that request is returned.

    Nobody changes their own, so the last superadmin stays one. Raises RoleNotChanged.
    """
    superadmin = find_superadmin(changed_by.pk)
    if superadmin is None or superadmin.pk == user_id:
        audit.write_refusal(
            action=audit.Action.ROLE_CHANGED,
            summary=f"Was refused to make somebody {role}" if superadmin is None else "Was refused another role",
            actor=changed_by,
            subject_id=user_id,
        )
        words = "Only superadmins give roles." if superadmin is None else "Nobody changes their own role."
        raise RoleNotChanged(words)
    with transaction.atomic():
        user = User.objects.select_for_update().get(pk=user_id)
        if RANKS.index(User.Role(role)) > RANKS.index(User.Role(user.role)):
            from accounts import two_persons  # which asks this module who is a superadmin

            return two_persons.ask(
                kind=ChangeRequest.Kind.ROLE, subject_id=user_id, changes={"role": role}, by=superadmin, reason=reason
            )
        _set_role(user, role, by=superadmin, reason=reason)
    return None


def carry_out(request: ChangeRequest) -> None:
    """Give the role that was asked for and approved. In the caller's transaction. Raises RoleNotChanged."""
    user = User.objects.select_for_update().get(pk=cast(int, request.subject_id))
    if not user.is_active:
        raise RoleNotChanged("This account is switched off: it gets no role.")
    _set_role(user, request.changes["role"], by=request.requested_by, reason=request.reason)


def _set_role(user: User, role: str, *, by: User, reason: str) -> None:
    before, user.role = user.role, User.Role(role)
    if before == user.role:
        return
    _role_change_is_written("yes")
    user.save(update_fields=["role"])
    _role_change_is_written("")
    audit.write(
        action=audit.Action.ROLE_CHANGED,
        summary=f"Role changed from {before} to {user.role}",
        actor=by,
        subject_id=user.pk,
        before={"role": before},
        after={"role": user.role},
        reason=reason,
    )


def _role_change_is_written(value: str) -> None:
    """Tell the database's trigger, until the end of the transaction, whether an entry with all details follows."""
    with connection.cursor() as cursor:
        cursor.execute("SELECT set_config(%s, %s, true)", [ROLE_CHANGE_IS_WRITTEN, value])
