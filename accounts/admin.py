from typing import Any

from django.contrib import admin, messages
from django.core.exceptions import PermissionDenied
from django.http import HttpRequest, HttpResponse
from django.shortcuts import redirect

from accounts.models import ApiKey, User, UserKept, Workspace


@admin.register(User)
class UserAdmin(admin.ModelAdmin):
    list_display = ("email", "name", "role", "is_active", "date_joined", "last_login")
    list_filter = ("role", "is_active")
    search_fields = ("email", "name")
    fields = ("email", "name", "role", "time_zone", "is_active", "date_joined", "last_login", "anonymised_at")
    readonly_fields = ("date_joined", "last_login", "anonymised_at")

    def has_delete_permission(self, request: HttpRequest, obj: User | None = None) -> bool:
        """People with a ledger are never deleted: the rows must keep naming who paid."""
        return False

    def delete_view(self, request: HttpRequest, object_id: str, extra_context: Any = None) -> HttpResponse:
        """Says what to do instead (row 70)."""
        if not self.has_change_permission(request):
            raise PermissionDenied
        messages.error(request, UserKept.message)
        return redirect("admin:accounts_user_change", object_id)


@admin.register(Workspace)
class WorkspaceAdmin(admin.ModelAdmin):
    list_display = ("name", "owner", "created_at")
    search_fields = ("name", "owner__email")
    autocomplete_fields = ("owner",)


@admin.register(ApiKey)
class ApiKeyAdmin(admin.ModelAdmin):
    """To be looked at: a key belongs to its owner, and its hash concerns nobody."""

    list_display = ("name", "user", "token_start", "scopes", "created_at", "last_used_at", "expires_at", "revoked_at")
    list_filter = (("revoked_at", admin.EmptyFieldListFilter),)
    list_select_related = ("user",)
    search_fields = ("user__email", "name", "token_start")
    fields = ("user", "name", "token_start", "scopes", "created_at", "last_used_at", "expires_at", "revoked_at")
    readonly_fields = fields

    def has_add_permission(self, request: HttpRequest) -> bool:
        return False

    def has_change_permission(self, request: HttpRequest, obj: ApiKey | None = None) -> bool:
        return False

    def has_delete_permission(self, request: HttpRequest, obj: ApiKey | None = None) -> bool:
        return False
