"""Changes that one superadmin alone may not make: they ask, and another one approves.

Who gets a role, and the settings that say what one person may grant, are changed like this: else one person makes
themselves a second one, or switches the rule off and on again. Where there is one superadmin alone, whoever has the
server approves: `manage.py approve_change`.
"""

from collections.abc import Callable, Mapping
from datetime import timedelta
from typing import Any

from django.db import transaction
from django.db.models import QuerySet
from django.db.models.functions import Now

from accounts import audit, roles
from accounts.models import ChangeRequest, User
from kit.locks import lock_until_commit
from kit.refusal import Refusal

State = ChangeRequest.State
LIFETIME = timedelta(days=14)

CarryOut = Callable[[ChangeRequest], None]
_carry_out: dict[str, tuple[audit.Action, CarryOut]] = {}


class ChangeNotDecided(Refusal):
    """Refused; nothing was changed. `message` is for the person."""

    http_status = 403


class ChangeAlreadyDecided(ChangeNotDecided):
    http_status = 409


def register(kind: str, action: audit.Action, carry_out: CarryOut) -> None:
    """Say how an approved change of the kind is made: in the transaction that approves it, writing its own entry."""
    _carry_out[kind] = action, carry_out


def ask(*, kind: str, subject_id: int | None, changes: Mapping[str, Any], by: User, reason: str = "") -> ChangeRequest:
    """Keep the change until another superadmin decides. What was asked before about the same is replaced; the same
    again changes nothing. `changes` go into JSON: names to new values."""
    with transaction.atomic():
        lock_until_commit(f"change-{kind}-{subject_id}")
        before = ChangeRequest.objects.filter(kind=kind, subject_id=subject_id, state=State.REQUESTED)
        if same := before.filter(changes=changes, requested_by=by, expires_at__gt=Now()).first():
            return same
        before.update(state=State.LAPSED, decided_at=Now())
        request = ChangeRequest.objects.create(
            kind=kind,
            subject_id=subject_id,
            changes=dict(changes),
            reason=reason,
            requested_by=by,
            expires_at=Now() + LIFETIME,
        )
        _write(request, "asked for", actor=by, outcome=audit.Outcome.REQUESTED)
        return request


def list_open() -> QuerySet[ChangeRequest]:
    """What waits, oldest first."""
    waiting = ChangeRequest.objects.filter(state=State.REQUESTED, expires_at__gt=Now())
    return waiting.select_related("subject", "requested_by").order_by("pk")


def may_decide(request: ChangeRequest, user: User) -> bool:
    """Whether to show somebody the buttons; `approve` and `decline` decide."""
    return user.is_superadmin and user.pk not in (request.requested_by_id, request.subject_id)


def approve(*, request_id: int, by: User | None) -> ChangeRequest:
    """Make the change. `by` None is whoever has the server. Twice is once. Raises ChangeNotDecided, and whatever the
    change itself is refused with."""
    decider = _require_decider(request_id, by)
    with transaction.atomic():
        request = _lock_open(request_id)
        if roles.find_superadmin(request.requested_by_id) is None:  # else it is one person's word
            raise ChangeNotDecided("Whoever asked for this is no longer a superadmin: another one has to ask for it.")
        _close(request, State.DONE, decider)
        _write(request, "approved", actor=decider)
        _carry_out[request.kind][1](request)
    return request


def decline(*, request_id: int, by: User) -> ChangeRequest:
    """Close it without a change. Also one's own, which takes it back. Raises ChangeNotDecided."""
    with transaction.atomic():
        superadmin = roles.find_superadmin(by.pk)
        if superadmin is None:
            raise ChangeNotDecided("Only superadmins decide on this.")
        request = _lock_open(request_id)
        _close(request, State.DECLINED, superadmin)
        _write(request, "declined", actor=superadmin)
    return request


def _require_decider(request_id: int, by: User | None) -> User | None:
    request = ChangeRequest.objects.filter(pk=request_id).first()
    if request is None:
        raise ChangeNotDecided("There is no such request.")
    if by is None:
        return None
    decider = roles.find_superadmin(by.pk)
    concerned = [user for user in (request.requested_by, request.subject) if user is not None]
    if decider is not None and not any(roles.are_one_person(decider, user) for user in concerned):
        return decider
    audit.write_refusal(
        action=_carry_out[request.kind][0],
        summary="Was refused to approve a change",
        actor=by,
        subject_id=request.subject_id,
        about=("change_request", request.pk),
    )
    if decider is None:
        raise ChangeNotDecided("Only superadmins decide on this.")
    raise ChangeNotDecided("Nobody approves what they asked for, or what is for themselves: ask another superadmin.")


def _lock_open(request_id: int) -> ChangeRequest:
    # The lock decides between two who decide at once: the second finds it decided.
    request = ChangeRequest.objects.select_for_update().filter(pk=request_id).first()
    if request is None:
        raise ChangeNotDecided("There is no such request.")
    is_open = ChangeRequest.objects.filter(pk=request_id, state=State.REQUESTED, expires_at__gt=Now()).exists()
    if not is_open:
        raise ChangeAlreadyDecided("This is closed already, or nobody decided in time. It can be asked for again.")
    return request


def _close(request: ChangeRequest, state: State, decider: User | None) -> None:
    request.state, request.decided_by = state, decider
    request.save(update_fields=["state", "decided_by"])
    ChangeRequest.objects.filter(pk=request.pk).update(decided_at=Now())


def _write(request: ChangeRequest, words: str, *, actor: User | None, outcome: str = audit.Outcome.DONE) -> None:
    audit.write(
        action=_carry_out[request.kind][0],
        summary=f"Change {words}: {', '.join(request.changes)}",
        actor=actor,
        subject_id=request.subject_id,
        about=("change_request", request.pk),
        after=request.changes,
        reason=request.reason,
        outcome=outcome,
    )
