"""The tables in Django admin, for superadmins. What moved tokens or money can be read and nothing else.

Long, since each table has a class of its own, of a few lines.
"""

import json
import re
from collections.abc import Iterable
from datetime import datetime
from typing import Any, cast

from django import forms
from django.contrib import admin, messages
from django.core.exceptions import ValidationError
from django.db import models
from django.forms.fields import InvalidJSONInput
from django.http import HttpRequest
from django.urls import reverse
from django.utils.formats import date_format
from django.utils.html import format_html, format_html_join
from django.utils.timezone import localtime

from accounts.admin import ContentAdmin, GuardedAdmin, ReadOnlyAdmin
from accounts.models import User
from billing import catalogue, ledger
from billing.catalogue import packages, system_settings
from billing.forms import PlainDecimalField, WholeNumberField
from billing.models import (
    BonusKey,
    BonusMark,
    BulkJob,
    BulkJobRow,
    Drift,
    GrantRequest,
    Installation,
    LedgerHour,
    ModelPrice,
    ModelPriceChange,
    Notification,
    NotificationPreference,
    PaymentReversal,
    Purchase,
    RollUp,
    SettingChange,
    StripeEvent,
    SystemSettings,
    TokenAccount,
    TokenLot,
    TokenPricing,
    TokenTransaction,
    TokenUsage,
    UsageDay,
    UsageHour,
)
from billing.models.fields import Currency
from billing.models.model_price import is_usd
from billing.payments import webhooks

# --- What can be read ---------------------------------------------------------------------------------------


@admin.register(TokenAccount)
class TokenAccountAdmin(ReadOnlyAdmin):
    list_display = (
        "workspace",
        "user",
        "balance",
        "reserved",
        "status",
        "status_reason",
        "bonus_withheld",
        "lifetime_used_tokens",
        "created_at",
    )
    list_filter = ("status", "bonus_withheld", "auto_recharge_enabled", "currency")
    search_fields = ("user__email", "workspace__name", "stripe_customer_id__exact")


@admin.register(TokenLot)
class TokenLotAdmin(ReadOnlyAdmin):
    list_display = ("id", "created_at", "account", "kind", "tokens", "expires_at")
    list_filter = ("kind",)
    search_fields = ("account__user__email", "account__workspace__name")
    ordering = ("-id",)


@admin.register(TokenTransaction)
class TokenTransactionAdmin(ReadOnlyAdmin):
    # No date hierarchy: it would read the whole ledger, which has no index by time alone.
    list_display = (
        "id",
        "created_at",
        "workspace",
        "user",
        "sequence",
        "type",
        "amount",
        "balance_after",
        "description",
    )
    list_filter = ("type",)
    search_fields = ("user__email", "stripe_payment_intent_id__exact", "idempotency_key__exact")
    ordering = ("-id",)


@admin.register(TokenUsage)
class TokenUsageAdmin(ContentAdmin):
    """What other servers wrote beside an operation, and providers about its failure, may repeat what a person wrote."""

    author_id = "user_id"
    list_display = (
        "id",
        "created_at",
        "workspace",
        "user",
        "operation_type",
        "model",
        "status",
        "actual_tokens",
        "billable_tokens",
        "unbilled_tokens",
    )
    list_filter = ("status", "operation_type", "provider", "is_estimated")
    search_fields = ("user__email", "model__exact", "idempotency_key__exact")
    date_hierarchy = "created_at"
    ordering = ("-id",)


@admin.register(Purchase)
class PurchaseAdmin(ReadOnlyAdmin):
    list_display = ("id", "created_at", "user", "kind", "package_name", "tokens", "price_display", "state", "paid_at")
    list_filter = ("state", "kind", "currency")
    search_fields = ("user__email", "stripe_session_id__exact", "stripe_payment_intent_id__exact")
    date_hierarchy = "created_at"
    ordering = ("-id",)

    def view_on_site(self, obj: Purchase) -> str:
        return reverse("dashboard:purchase", args=[obj.pk])


@admin.register(PaymentReversal)
class PaymentReversalAdmin(ReadOnlyAdmin):
    list_display = ("stripe_id", "kind", "amount_display", "status", "purchase", "requested_by", "created_at")
    list_filter = ("kind", "status")
    search_fields = ("stripe_id__exact", "stripe_payment_intent_id__exact")
    date_hierarchy = "created_at"
    ordering = ("-id",)


@admin.register(Drift)
class DriftAdmin(ReadOnlyAdmin):
    list_display = ("found_at", "kind", "stripe_id", "description", "resolved_at", "resolution")
    list_filter = ("kind", ("resolved_at", admin.EmptyFieldListFilter))
    search_fields = ("stripe_id__exact",)
    date_hierarchy = "found_at"


@admin.register(Installation)
class InstallationAdmin(ReadOnlyAdmin):
    list_display = ("name", "created_at")


@admin.register(BonusMark)
class BonusMarkAdmin(ReadOnlyAdmin):
    list_display = ("digest",)


@admin.register(BonusKey)
class BonusKeyAdmin(ReadOnlyAdmin):
    list_display = fields = ("secret_id",)


@admin.register(StripeEvent)
class StripeEventAdmin(ReadOnlyAdmin):
    list_display = ("event_id", "type", "state", "message", "attempts", "received_at", "processed_at")
    list_filter = ("state", "type", "livemode")
    search_fields = ("event_id__exact", "type")
    date_hierarchy = "received_at"
    ordering = ("-id",)
    actions = ("handle_again", "settle_by_hand")

    @admin.action(description="Handle again (what failed or was kept aside)")
    def handle_again(self, request: HttpRequest, queryset: models.QuerySet[StripeEvent]) -> None:
        for event in queryset.filter(state__in=webhooks.OPEN).order_by("id"):
            try:
                outcome = webhooks.handle_again(event, by=cast(User, request.user))
            except webhooks.EventNotHandled as error:
                self.message_user(request, f"{event.event_id} failed again: {error.__cause__!r}", messages.ERROR)
            else:
                text = f"{event.event_id}: {outcome.get_state_display()}. {outcome.message}"
                level = messages.WARNING if outcome.state == StripeEvent.State.ASIDE else messages.SUCCESS
                self.message_user(request, text, level)

    @admin.action(description="Dealt with (what was kept aside)")
    def settle_by_hand(self, request: HttpRequest, queryset: models.QuerySet[StripeEvent]) -> None:
        settled = sum(webhooks.settle_by_hand(event, by=cast(User, request.user)) for event in queryset)
        self.message_user(request, f"{settled} events are noted as dealt with.")


class EmailStateFilter(admin.SimpleListFilter):
    title = "state of the e-mail"
    parameter_name = "email"

    def lookups(self, request: HttpRequest, model_admin: Any) -> list[tuple[str, str]]:
        return [("waiting", "Waiting"), ("given-up", "Given up")]

    def queryset(self, request: HttpRequest, queryset: models.QuerySet) -> models.QuerySet:
        unsent = queryset.filter(email_wanted=True, email_sent_at=None)
        if self.value() == "waiting":
            return unsent.filter(email_next_at__isnull=False)
        return unsent.filter(email_next_at=None) if self.value() == "given-up" else queryset


@admin.register(Notification)
class NotificationAdmin(ReadOnlyAdmin):
    list_display = ("created_at", "user", "kind", "title", "read_at", "email_state", "email_attempts", "email_error")
    list_filter = (EmailStateFilter, "kind")
    search_fields = ("user__email", "title")
    ordering = ("-id",)


@admin.register(NotificationPreference)
class NotificationPreferenceAdmin(ReadOnlyAdmin):
    """Chosen by the people themselves; of who never chose there is no row."""

    list_display = ("user", "kind", "wants_email")
    list_filter = ("wants_email", "kind")
    search_fields = ("user__email",)
    ordering = ("-id",)


@admin.register(UsageHour)
class UsageHourAdmin(ReadOnlyAdmin):
    list_display = ("hour", "provider", "model", "operation_type", "status", "operations", "billable_tokens")
    list_filter = ("provider", "operation_type", "status")
    date_hierarchy = "hour"
    ordering = ("-hour", "-id")


@admin.register(UsageDay)
class UsageDayAdmin(UsageHourAdmin):
    list_display = ("day", "provider", "model", "operation_type", "status", "operations", "billable_tokens")
    date_hierarchy = "day"
    ordering = ("-day", "-id")


@admin.register(LedgerHour)
class LedgerHourAdmin(ReadOnlyAdmin):
    list_display = ("hour", "type", "currency", "transactions", "tokens", "paid_cents", "discount_cents")
    list_filter = ("type", "currency")
    date_hierarchy = "hour"
    ordering = ("-hour", "-id")


@admin.register(RollUp)
class RollUpAdmin(ReadOnlyAdmin):
    list_display = ("rolled_until", "sealing_until", "updated_at")


@admin.register(SettingChange)
class SettingChangeAdmin(ReadOnlyAdmin):
    list_display = ("changed_at", "field", "old_value", "new_value", "changed_by")
    list_filter = ("field",)
    date_hierarchy = "changed_at"


@admin.register(ModelPriceChange)
class ModelPriceChangeAdmin(ReadOnlyAdmin):
    list_display = ("changed_at", "price", "field", "old_value", "new_value", "changed_by", "source")
    list_filter = ("source", "price")
    search_fields = ("price__model", "field")
    date_hierarchy = "changed_at"


# --- What can be edited -------------------------------------------------------------------------------------


class PlainJSONField(forms.JSONField):
    """JSON that can be stored, and shown again beside its error: no lone surrogates, no abyss."""

    def to_python(self, value: Any) -> Any:
        if isinstance(value, str) and value and not _is_plain_json(value):
            raise ValidationError(self.error_messages["invalid"], code="invalid", params={"value": value})
        return super().to_python(value)

    def bound_data(self, data: Any, initial: Any) -> Any:
        if isinstance(data, str) and not _is_plain_json(data):
            return InvalidJSONInput(data)
        return super().bound_data(data, initial)


def _is_plain_json(text: str) -> bool:
    try:
        json.dumps(json.loads(text), ensure_ascii=False).encode()
    except (ValueError, RecursionError):
        return False
    return "\\u0000" not in text


# The form carries what it was opened with: saved after another superadmin's, it writes what was changed in it alone.
_PLAIN_FIELDS: dict[type[models.Field], dict[str, Any]] = {
    models.IntegerField: {"form_class": WholeNumberField, "show_hidden_initial": True},
    models.BigIntegerField: {"form_class": WholeNumberField, "show_hidden_initial": True},
    models.DecimalField: {"form_class": PlainDecimalField, "show_hidden_initial": True},
    models.JSONField: {"form_class": PlainJSONField, "show_hidden_initial": True},
    models.BooleanField: {"show_hidden_initial": True},
    models.CharField: {"show_hidden_initial": True},
    models.DateField: {"show_hidden_initial": True},
}


def _is_word(value: Any, *, max_length: int) -> bool:
    return isinstance(value, str) and 0 < len(value) <= max_length


class TokenPricingForm(forms.ModelForm):
    def clean_features(self) -> list[str]:
        features = self.cleaned_data["features"] or []
        if not isinstance(features, list) or not all(_is_word(each, max_length=200) for each in features):
            raise ValidationError('Enter a list of texts: ["One", "Two"].')
        return features

    def clean(self) -> dict[str, Any]:
        cleaned = super().clean() or {}
        for currency in Currency.values:
            price_id = f"stripe_price_id_{currency}"
            is_stale = f"price_{currency}_cents" in self.changed_data and price_id not in self.changed_data
            if self.instance.pk and is_stale and cleaned.get(price_id):
                self.add_error(price_id, "This Stripe price has the old amount: enter the new one's id, or empty it.")
        return cleaned


_SIZE_AND_QUALITY = re.compile(r"[1-9][0-9]{1,4}x[1-9][0-9]{1,4}(/[a-z]{1,20})?")


class ModelPriceForm(forms.ModelForm):
    def clean_image_cost_tokens(self) -> dict[str, int]:
        costs = self.cleaned_data["image_cost_tokens"] or {}
        if not isinstance(costs, dict) or not all(
            _SIZE_AND_QUALITY.fullmatch(key) and type(tokens) is int and 0 < tokens <= ledger.MAX_TOKENS
            for key, tokens in costs.items()
        ):
            raise ValidationError('Enter tokens by size and quality: {"1024x1024": 6000, "1024x1024/low": 1500}.')
        return costs

    def clean_other_names(self) -> list[str]:
        return self.cleaned_data["other_names"] or []

    def clean_special_usd_per_million(self) -> dict[str, str]:
        return self.cleaned_data["special_usd_per_million"] or {}

    def clean_image_usd_by_size(self) -> dict[str, str]:
        prices = self.cleaned_data["image_usd_by_size"] or {}
        if not isinstance(prices, dict) or not all(
            _SIZE_AND_QUALITY.fullmatch(key) and is_usd(usd) for key, usd in prices.items()
        ):
            raise ValidationError('Enter USD in quotes, by size and quality: {"1024x1024/low": "0.006"}.')
        return prices


class CatalogueAdmin(GuardedAdmin):
    """Switched off rather than deleted: usage and purchases go on naming it."""

    formfield_overrides = _PLAIN_FIELDS

    def has_delete_permission(self, request: HttpRequest, obj: models.Model | None = None) -> bool:
        return False


def _history_table(changes: Iterable[tuple[datetime, str, Any, Any, Any]]) -> str:
    """When it changed, the field, its value before and after, and who changed it."""
    rows = (
        (
            date_format(localtime(changed_at), "DATETIME_FORMAT"),
            field,
            *("–" if value in (None, "") else value for value in (before, after)),
            changed_by,
        )
        for changed_at, field, before, after, changed_by in changes
    )
    cells = format_html_join("", "<tr><td>{}</td><td>{}</td><td>{} → {}</td><td>{}</td></tr>", rows)
    return format_html("<table>{}</table>", cells)


@admin.register(TokenPricing)
class TokenPricingAdmin(CatalogueAdmin):
    """Saved through billing/catalogue/packages.py, which keeps who changed what."""

    form = TokenPricingForm
    list_display = ("name", "tokens", "price_usd_cents", "is_popular", "is_active", "sort_order")
    list_filter = ("is_active",)
    search_fields = ("name",)
    readonly_fields = ("created_at", "updated_at", "history")

    @admin.display(description="history")
    def history(self, package: TokenPricing) -> str:
        """The newest changes, out of the audit log."""
        if package.pk is None:
            return "–"
        changes = [
            (entry.created_at, field, (entry.before or {}).get(field), value, entry.actor or "An operator")
            for entry in packages.list_changes(package.pk).entries
            for field, value in (entry.after or {}).items()
        ]
        everything = reverse("dashboard:audit", query={"action": "package_changed"})
        return format_html('{}<a href="{}">Changes of all packages</a>', _history_table(changes), everything)

    def save_model(self, request: HttpRequest, obj: TokenPricing, form: forms.ModelForm, change: bool) -> None:
        by = cast(int, request.user.pk)
        if change:
            changes = {name: form.cleaned_data[name] for name in form.changed_data}
            packages.update_package(obj.pk, changed_by_id=by, **changes)
        else:
            obj.pk = packages.create_package(changed_by_id=by, **form.cleaned_data).pk


@admin.register(GrantRequest)
class GrantRequestAdmin(ReadOnlyAdmin):
    """Decided on the dashboard, never here."""

    list_display = ("id", "created_at", "kind", "account", "tokens", "state", "requested_by", "decided_by", "reason")
    list_filter = ("state", "kind")
    list_select_related = ("user", "requested_by", "decided_by")
    search_fields = ("user__email", "requested_by__email")
    date_hierarchy = "created_at"


@admin.register(BulkJob)
class BulkJobAdmin(ReadOnlyAdmin):
    list_display = ("id", "created_at", "kind", "state", "tokens", "reason", "requested_by", "finished_at")
    list_filter = ("state", "kind")
    search_fields = ("requested_by__email",)


@admin.register(BulkJobRow)
class BulkJobRowAdmin(ReadOnlyAdmin):
    list_display = ("id", "job", "account", "state", "message", "finished_at")
    list_filter = ("state",)
    list_select_related = ("job", "account__user")
    search_fields = ("account__user__email", "job__id__exact")
    ordering = ("-id",)


@admin.register(ModelPrice)
class ModelPriceAdmin(CatalogueAdmin):
    """Saved through the catalogue, which keeps who changed what."""

    form = ModelPriceForm
    list_display = (
        "display_name",
        "provider",
        "model",
        "kind",
        "input_usd_per_million",
        "output_usd_per_million",
        "image_usd",
        "multiplier",
        "is_active",
        "retired_on",
        "last_price_change",
    )
    list_filter = ("provider", "kind", "is_active")
    search_fields = ("model", "display_name")
    readonly_fields = ("updated_at", "history")

    CHANGES_SHOWN = 50

    def get_queryset(self, request: HttpRequest) -> models.QuerySet[ModelPrice]:
        is_price = models.Q(changes__field__contains="usd") | models.Q(
            changes__field__in=("multiplier", "image_cost_tokens")
        )
        return super().get_queryset(request).annotate(repriced_at=models.Max("changes__changed_at", filter=is_price))

    @admin.display(description="last price change", ordering="repriced_at")
    def last_price_change(self, price: ModelPrice) -> datetime | None:
        return cast(Any, price).repriced_at

    @admin.display(description="history")
    def history(self, price: ModelPrice) -> str:
        """The newest changes. Not an inline, which would send every row back with the form."""
        if price.pk is None:
            return "–"
        changes = [
            (each.changed_at, each.field, each.old_value, each.new_value, each.changed_by or each.get_source_display())
            for each in price.changes.select_related("changed_by")[: self.CHANGES_SHOWN]
        ]
        everything = f"{reverse('admin:billing_modelpricechange_changelist')}?price__id__exact={price.pk}"
        return format_html('{}<a href="{}">All changes</a>', _history_table(changes), everything)

    def get_readonly_fields(self, request: HttpRequest, obj: ModelPrice | None = None) -> tuple[str, ...]:
        return self.readonly_fields if obj is None else (*catalogue.IDENTITY_FIELDS, *self.readonly_fields)

    def save_model(self, request: HttpRequest, obj: ModelPrice, form: forms.ModelForm, change: bool) -> None:
        by: dict[str, Any] = {"changed_by_id": request.user.pk, "source": ModelPriceChange.Source.ADMIN}
        if change:
            changes = {name: form.cleaned_data[name] for name in form.changed_data}
            catalogue.update_model_price(price_id=obj.pk, changes=changes, **by)
        else:
            obj.pk = catalogue.create_model_price(fields=form.cleaned_data, **by).pk


@admin.register(SystemSettings)
class SystemSettingsAdmin(GuardedAdmin):
    """One row. It is saved through `update_system_settings`, which keeps who changed what."""

    formfield_overrides = _PLAIN_FIELDS
    fields = (*system_settings.EDITABLE_FIELDS, "updated_at")
    readonly_fields = ("updated_at",)

    def has_add_permission(self, request: HttpRequest) -> bool:
        return False

    def has_delete_permission(self, request: HttpRequest, obj: models.Model | None = None) -> bool:
        return False

    def formfield_for_dbfield(self, db_field: models.Field, request: HttpRequest, **options: Any) -> Any:
        if db_field.name.endswith("_cost_tokens"):
            options["min_value"] = 1  # no reservation can be made of none
        return super().formfield_for_dbfield(db_field, request, **options)

    def get_queryset(self, request: HttpRequest) -> models.QuerySet[SystemSettings]:
        system_settings.get_system_settings()  # so that there is a row to edit from the first day on
        return super().get_queryset(request)

    def save_model(self, request: HttpRequest, obj: SystemSettings, form: forms.ModelForm, change: bool) -> None:
        changes = {name: form.cleaned_data[name] for name in form.changed_data}
        if changes:
            by = cast(int, request.user.pk)
            saved = system_settings.update_system_settings(changes=changes, changed_by_id=by)
            if any(getattr(saved, name) != value for name, value in changes.items()):
                messages.warning(
                    request, "What lets one person grant more waits for another superadmin, under Requests."
                )
