"""The settings of the installation. Read from the database each time: one row by its key costs what a Redis round
trip costs, and is never stale."""

from collections.abc import Mapping
from copy import copy
from decimal import Decimal
from typing import Any

from django.core.exceptions import ValidationError
from django.db import transaction

from accounts import audit, two_persons
from accounts.models import ChangeRequest, User
from billing.models import SettingChange, SystemSettings

EDITABLE_FIELDS = tuple(
    field.name for field in SystemSettings._meta.concrete_fields if field.name not in ("id", "key", "updated_at")
)
PRICES = ("token_multiplier", "dalle3_cost_tokens", "dalle2_cost_tokens", "imagen_cost_tokens")


def get_system_settings() -> SystemSettings:
    """The settings that apply now, with the product's defaults until somebody changes them."""
    return SystemSettings.objects.filter(key="global").first() or initialize_default_settings()


def initialize_default_settings() -> SystemSettings:
    """Write the default settings unless there are some. Safe to repeat."""
    SystemSettings.objects.bulk_create([SystemSettings()], ignore_conflicts=True)
    return SystemSettings.objects.get(key="global")


def update_system_settings(*, changes: Mapping[str, Any], changed_by_id: int) -> SystemSettings:
    """Change settings and keep who changed what, from which value to which. Running operations keep their prices.

    What would let one person grant more waits for another superadmin (`accounts/two_persons.py`): in the settings that
    are returned it is as it was. Raises ValidationError naming each wrong field; then nothing is changed.
    """
    initialize_default_settings()
    with transaction.atomic():
        current = SystemSettings.objects.select_for_update().get(key="global")
        with_changes(current, changes)  # all of it is right, also what waits
        waiting = {name: _for_json(value) for name, value in changes.items() if _loosens(current, name, value)}
        if waiting:
            by = User.objects.get(pk=changed_by_id)
            two_persons.ask(kind=ChangeRequest.Kind.SETTINGS, subject_id=None, changes=waiting, by=by)
        at_once = {name: value for name, value in changes.items() if name not in waiting}
        return _save(current, at_once, changed_by_id)


def carry_out(request: ChangeRequest) -> None:
    """Make the change that was asked for and approved. In the caller's transaction. Raises ValidationError."""
    current = SystemSettings.objects.select_for_update().get(key="global")
    _save(current, request.changes, request.requested_by_id)


def _loosens(current: SystemSettings, name: str, new: Any) -> bool:
    """Whether the setting guards what one person may give, and would let them give more."""
    old, limit_tokens = getattr(current, name), current.grant_approval_tokens
    if name == "admin_grant_limit_tokens":
        return (new or 0) > (old or 0)
    if limit_tokens is None:  # one person may give anything
        return False
    if name == "grant_approval_tokens":
        return new is None or new > limit_tokens
    if name == "welcome_bonus_tokens":  # else it is a grant to whoever signs up next
        return (new or 0) > max(old, limit_tokens)
    # Tokens, or work, for next to nothing are a grant, too; packages are bounded by the first.
    if name == "tokens_per_usd":
        return (new or 0) > old
    if name == "billing_enabled":
        return bool(old) and not new
    return name in PRICES and new is not None and new < old


def _for_json(value: Any) -> Any:
    return str(value) if isinstance(value, Decimal) else value


def _save(current: SystemSettings, changes: Mapping[str, Any], changed_by_id: int) -> SystemSettings:
    before = {name: getattr(current, name) for name in changes}
    settings = with_changes(current, changes)
    settings.save()
    changed = {name: (before[name], getattr(settings, name)) for name in changes}
    changed = {name: (old, new) for name, (old, new) in changed.items() if old != new}
    SettingChange.objects.bulk_create(
        SettingChange(field=name, old_value=_as_text(old), new_value=_as_text(new), changed_by_id=changed_by_id)
        for name, (old, new) in changed.items()
    )
    if changed:
        audit.write(
            action=audit.Action.SETTING_CHANGED,
            summary=f"Settings changed: {', '.join(changed)}",
            actor=User.objects.get(pk=changed_by_id),
            before={name: _as_text(old) for name, (old, _) in changed.items()},
            after={name: _as_text(new) for name, (_, new) in changed.items()},
        )
    return settings


def with_changes(settings: SystemSettings, changes: Mapping[str, Any]) -> SystemSettings:
    """The settings as they would be, not saved. Raises ValidationError naming each wrong field."""
    if unknown := set(changes) - set(EDITABLE_FIELDS):
        raise ValidationError(dict.fromkeys(sorted(unknown), "There is no such setting."))
    changed = copy(settings)
    for name, value in changes.items():
        setattr(changed, name, value)
    changed.full_clean()
    return changed


def _as_text(value: Any) -> str:
    return "" if value is None else str(value)
