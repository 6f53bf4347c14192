"""/admin/tokens/settings/: the system settings, with what a change would have brought before it is saved."""

from typing import Any

from django.contrib import messages
from django.core.exceptions import ValidationError
from django.core.paginator import Paginator
from django.http import HttpRequest, HttpResponse
from django.shortcuts import redirect, render
from django.utils.crypto import salted_hmac
from django.views.decorators.http import require_http_methods

from accounts.permissions import SignedInRequest, admin_required, superadmin_required
from billing.catalogue import system_settings
from billing.dashboard.lists import ROWS_PER_PAGE
from billing.figures import settings_preview
from billing.forms import SystemSettingsForm
from billing.models import SettingChange, SystemSettings
from billing.pricing import display_price


@require_http_methods(["GET", "HEAD", "POST"])
@admin_required
def settings(request: SignedInRequest) -> HttpResponse:
    """The settings of the installation and who changed them. Superadmins change them: previewed first, then saved."""
    if request.method == "POST":
        return _change_settings(request)
    return _render_settings(request, SystemSettingsForm(settings=system_settings.get_system_settings()))


@superadmin_required
def _change_settings(request: SignedInRequest) -> HttpResponse:
    current = system_settings.get_system_settings()
    form = SystemSettingsForm(request.POST, settings=current)
    if not form.is_valid():
        return _render_settings(request, form, status=400)
    changes = form.changes
    if not changes:
        messages.info(request, "Nothing is different: these are the settings that apply now.")
        return redirect("dashboard:settings")
    fingerprint = _fingerprint(current, changes)
    try:
        if "save" in request.POST and request.POST.get("previewed") == fingerprint:
            saved = system_settings.update_system_settings(changes=changes, changed_by_id=request.user.pk)
            if any(getattr(saved, name) != value for name, value in changes.items()):
                messages.warning(
                    request, "What lets one person grant more waits for another superadmin, under Requests."
                )
            else:
                messages.success(request, "Saved. Operations that are running keep their prices.")
            return redirect("dashboard:settings")
        preview = settings_preview.preview_settings(changes)
    except ValidationError as error:
        form.add_error(None, error)
        return _render_settings(request, form, status=400)
    if "save" in request.POST:
        messages.warning(request, "Not saved yet: this is not what the last preview showed. Look at the new one.")
    return _render_settings(request, form, preview=preview, fingerprint=fingerprint)


def _fingerprint(current: SystemSettings, changes: dict[str, Any]) -> str:
    """Names one change, from which values to which. Another one needs a preview of its own: also when somebody else
    saved something meanwhile, which the form of before would silently take back."""
    text = repr([(name, str(getattr(current, name)), str(value)) for name, value in sorted(changes.items())])
    return salted_hmac("billing.settings-preview", text).hexdigest()


def _render_settings(
    request: HttpRequest,
    form: SystemSettingsForm,
    *,
    preview: settings_preview.SettingsPreview | None = None,
    fingerprint: str = "",
    status: int = 200,
) -> HttpResponse:
    changes = SettingChange.objects.select_related("changed_by")
    page = Paginator(changes, ROWS_PER_PAGE).get_page(request.GET.get("page"))
    context = {
        "form": form,
        "preview": preview,
        "preview_rows": _preview_rows(preview),
        "fingerprint": fingerprint,
        "page": page,
        "history": [
            (
                change,
                form.label_of(change.field),
                form.kept_in_words(change.field, change.old_value),
                form.kept_in_words(change.field, change.new_value),
            )
            for change in page
        ],
    }
    return render(request, "dashboard/settings.html", context, status=status)


def _preview_rows(preview: settings_preview.SettingsPreview | None) -> list[tuple[str, str, str]]:
    """The preview for people: figure, as it was, as it would have been."""
    if preview is None:
        return []

    def percent(outcome: settings_preview.Outcome) -> str:
        return "–" if outcome.margin_percent is None else f"{outcome.margin_percent} %"

    now, then = preview.now, preview.then
    return [
        ("Billed tokens", f"{now.billed_tokens:,}", f"{then.billed_tokens:,}"),
        ("Their value at the exchange rate", _dollars(now.value_microusd), _dollars(then.value_microusd)),
        ("What the providers cost", _dollars(now.provider_cost_microusd), _dollars(then.provider_cost_microusd)),
        ("Margin", _dollars(now.margin_microusd), _dollars(then.margin_microusd)),
        ("Margin, of the value", percent(now), percent(then)),
        ("Welcome bonuses (tokens)", f"{now.bonus_tokens:,}", f"{then.bonus_tokens:,}"),
        ("Accounts with a low balance now", f"{now.low_accounts:,}", f"{then.low_accounts:,}"),
        ("Accounts with a critical balance now", f"{now.critical_accounts:,}", f"{then.critical_accounts:,}"),
    ]


def _dollars(microusd: int) -> str:
    """To the nearest cent."""
    return ("−" if microusd < 0 else "") + display_price((abs(microusd) + 5_000) // 10_000)
