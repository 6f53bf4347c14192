"""Who is admin and superadmin: changed here, and every change is in the audit log."""

from django.db import connection, transaction

from accounts import audit
from accounts.models import ROLE_CHANGE_IS_WRITTEN, User
from accounts.refusal import Refusal


class RoleNotChanged(Refusal):
    """Refused; nothing was changed. `message` is for the person."""

    http_status = 403


def find_superadmin(user_id: int) -> User | None:
    """The person, if they are an active superadmin at this moment, whatever they were when they signed in."""
    return User.objects.filter(pk=user_id, role=User.Role.SUPERADMIN, is_active=True).first()


def change_role(*, user_id: int, role: str, changed_by: User, reason: str = "") -> User:
    """Give somebody a role. Nobody changes their own, so the last superadmin stays one. Raises RoleNotChanged."""
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
        before, user.role = user.role, User.Role(role)
        if before == user.role:
            return user
        _role_change_is_written("yes")
        user.save(update_fields=["role"])
        _role_change_is_written("")
        audit.write(
            action=audit.Action.ROLE_CHANGED,
            summary=f"Role changed from {before} to {user.role}",
            actor=superadmin,
            subject_id=user.pk,
            before={"role": before},
            after={"role": user.role},
            reason=reason,
        )
    return user


def _role_change_is_written(value: str) -> None:
    """Tell the database's trigger, until the end of the transaction, whether an entry with all details follows."""
    with connection.cursor() as cursor:
        cursor.execute("SELECT set_config(%s, %s, true)", [ROLE_CHANGE_IS_WRITTEN, value])
