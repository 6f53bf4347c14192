"""/admin/tokens/audit/: who did what."""

from typing import Any

from django.http import HttpResponse
from django.shortcuts import render
from django.views.decorators.http import require_GET

from accounts import audit
from accounts.models import AuditEntry
from accounts.permissions import SignedInRequest, admin_required
from billing.dashboard.lists import ROWS_PER_PAGE
from kit import periods
from kit.text import read_id


@require_GET
@admin_required
def audit_log(request: SignedInRequest) -> HttpResponse:
    """Search the audit log, as the query says."""
    asked = {name: request.GET.get(name, "").strip() for name in ("actor", "subject", "action", "outcome")}
    actions, outcomes = dict(audit.Action.choices), dict(AuditEntry.Outcome.choices)
    for name, known in (("action", actions), ("outcome", outcomes)):
        asked[name] = asked[name] if asked[name] in known else ""
    context: dict[str, Any] = {
        "asked": asked,
        "actions": actions,
        "outcomes": outcomes,
        "presets": periods.PRESETS,
        "period": periods.preset_period("all"),
    }
    try:
        period = periods.read_period(request.GET, default="all")
    except periods.InvalidPeriod as error:
        return render(request, "dashboard/audit.html", context | {"period_error": error.message}, status=422)
    before_id = read_id(request.GET.get("before", ""))
    found = audit.find_entries(
        actor=asked["actor"],
        subject=asked["subject"],
        action=asked["action"],
        outcome=asked["outcome"],
        since=period.since,
        until=period.until,
        before_id=before_id,
        limit=ROWS_PER_PAGE,
    )
    context |= {
        "period": period,
        "entries": with_changes(found.entries),
        "next_before_id": found.next_before_id,
        "before_id": before_id,
        "is_narrowed": any(asked.values()) or period.preset != "all",
    }
    return render(request, "dashboard/audit.html", context)


def with_changes(entries: list[AuditEntry]) -> list[dict[str, Any]]:
    """Entries with their action in words and what they changed: (name, from, to)."""
    rows = []
    for entry in entries:
        before, after = entry.before or {}, entry.after or {}
        changes = [
            (name.replace("_", " ").capitalize(), _in_words(before.get(name)), _in_words(after.get(name)))
            for name in dict.fromkeys([*before, *after])
        ]
        rows.append({"entry": entry, "action": audit.action_label(entry), "changes": changes})
    return rows


def _in_words(value: Any) -> str:
    if value is None or value == "":
        return "–"
    return f"{value:,}" if type(value) is int else str(value)
