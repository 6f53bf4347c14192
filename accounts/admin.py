from collections.abc import Iterable
from functools import partial
from operator import attrgetter
from typing import Any, ClassVar, cast

from allauth.account.adapter import get_adapter
from allauth.account.models import EmailAddress
from allauth.mfa.models import Authenticator
from allauth.usersessions.models import UserSession
from django import forms
from django.contrib import admin, messages
from django.contrib.admin.utils import unquote
from django.contrib.auth import admin as _auth_admin  # noqa: F401 – registers Group, which is taken out below
from django.contrib.auth.models import Group
from django.core.exceptions import PermissionDenied
from django.core.paginator import Paginator
from django.core.validators import ProhibitNullCharactersValidator
from django.db import models, transaction
from django.http import HttpRequest, HttpResponse
from django.shortcuts import redirect, render
from django.utils.functional import cached_property

from accounts import access, audit, roles, teams
from accounts.models import ApiKey, AuditEntry, ChangeRequest, Invitation, Membership, User, UserKept, Workspace


class BoundedPaginator(Paginator):
    """Counts no further than anyone turns pages: an exact count of ten million rows takes seconds."""

    MAX_ROWS = 10_000

    @cached_property
    def count(self) -> int:
        return cast(models.QuerySet, self.object_list)[: self.MAX_ROWS].count()


class GuardedAdmin(admin.ModelAdmin):
    """Its list is filtered by what `list_filter` names, and by nothing else."""

    def lookup_allowed(self, lookup: str, value: str, request: HttpRequest) -> bool:
        """Django allows every column of the table, also those that no page shows: "begins with" tells a session's key,
        an app's secret or a text letter by letter."""
        filters = self.get_list_filter(request)
        names = [each[0] if isinstance(each, tuple) else getattr(each, "parameter_name", each) for each in filters]
        first = lookup.partition("__")[0]
        return first in {*names, self.date_hierarchy} and super().lookup_allowed(lookup, value, request)


class ReadOnlyAdmin(GuardedAdmin):
    """Superadmins look; rows are written by the code that keeps the laws."""

    show_full_result_count = False
    paginator = BoundedPaginator
    list_per_page = 50

    def get_list_select_related(self, request: HttpRequest) -> tuple[str, ...]:
        """The rows that the list names, so that they are not asked for one by one."""
        shown = self.get_list_display(request)
        named = (each.name for each in self.opts.fields if each.is_relation and each.name in shown)
        others = self.list_select_related
        return (*named, *(() if isinstance(others, bool) else others))

    def has_add_permission(self, request: HttpRequest) -> bool:
        return False

    def has_change_permission(self, request: HttpRequest, obj: models.Model | None = None) -> bool:
        return False

    def has_delete_permission(self, request: HttpRequest, obj: models.Model | None = None) -> bool:
        return False


class ReasonForm(forms.Form):
    reason = forms.CharField(
        max_length=500,
        label="Why do you read it?",
        help_text="Kept in the audit log, with your name and whose it is.",
        validators=[ProhibitNullCharactersValidator()],
    )


class ContentAdmin(ReadOnlyAdmin):
    """What people wrote or had made, or what may repeat it: a row's page asks why it is opened, and the answer is in
    the audit log before anything is shown."""

    view_on_site = False  # the pages in the Studio open for their author alone
    ordering = ("-id",)
    author_id: ClassVar[str] = "author_id"  # where a row says whose it is

    def change_view(
        self, request: HttpRequest, object_id: str, form_url: str = "", extra_context: dict[str, Any] | None = None
    ) -> HttpResponse:
        """A GET asks for the reason, a POST with one shows the row."""
        row = self.get_object(request, unquote(object_id))
        if row is None or not self.has_view_permission(request, row):
            return super().change_view(request, object_id, form_url, extra_context)
        form = ReasonForm(request.POST or None)
        if request.method == "POST" and form.is_valid():
            audit.write(
                action=audit.Action.CONTENT_READ,
                summary=f"Read in Django admin: {self.opts.verbose_name} {row.pk}",
                actor=cast(User, request.user),
                subject_id=attrgetter(self.author_id)(row),
                about=(str(self.opts.model_name), row.pk),
                reason=form.cleaned_data["reason"],
            )
            request.method = "GET"
            return super().change_view(request, object_id, form_url, extra_context)
        context = {
            **self.admin_site.each_context(request),
            "title": f"{str(self.opts.verbose_name).capitalize()} {row.pk}",
            "opts": self.opts,
            "form": form,
        }
        return render(request, "admin/reason.html", context, status=400 if form.errors else 200)

    def history_view(
        self, request: HttpRequest, object_id: str, extra_context: dict[str, Any] | None = None
    ) -> HttpResponse:
        """Nothing is ever changed here, and its title would be the row's."""
        raise PermissionDenied


class UserForm(forms.ModelForm):
    def clean_is_active(self) -> bool:
        """Else somebody who had a role is switched on again by one person, past the rule for roles."""
        is_active: bool = self.cleaned_data["is_active"]
        if is_active and not self.instance.is_active and self.instance.role != User.Role.USER:
            raise forms.ValidationError("Take the role away first: another superadmin approves giving it back.")
        return is_active


@admin.register(User)
class UserAdmin(GuardedAdmin):
    """People sign up by themselves, and change their address by themselves: it is what opens the account."""

    form = UserForm
    list_display = ("email", "name", "role", "is_active", "date_joined", "last_login")
    list_filter = ("role", "is_active")
    search_fields = ("email", "name")
    fields = ("email", "name", "role", "time_zone", "is_active", "date_joined", "last_login", "anonymised_at")
    readonly_fields = ("email", "date_joined", "last_login", "anonymised_at")

    def has_add_permission(self, request: HttpRequest) -> bool:
        return False

    def get_readonly_fields(self, request: HttpRequest, obj: User | None = None) -> tuple[str, ...]:
        """Nobody gives themselves a role."""
        has_fixed_role = obj is None or obj.pk == request.user.pk
        return (*self.readonly_fields, "role") if has_fixed_role else self.readonly_fields

    def save_model(self, request: HttpRequest, obj: User, form: forms.ModelForm, change: bool) -> None:
        """Kept in the audit log, by the names of the fields: who somebody was must not stand in it for ever."""
        superadmin = cast(User, request.user)
        with transaction.atomic():
            others = [name for name in form.changed_data if name != "role"]
            if "is_active" in others and not obj.is_active and teams.list_last_owned(user_id=obj.pk):
                others.remove("is_active")
                messages.error(
                    request,
                    "They are the last owner of a team, so they were not switched off: have them hand it over or "
                    "close it first.",
                )
            if others:
                obj.save(update_fields=others)
                audit.write(
                    action=audit.Action.PERSON_CHANGED,
                    summary=f"Edited in Django admin: {', '.join(others)}",
                    actor=superadmin,
                    subject_id=obj.pk,
                    after={"is_active": obj.is_active} if "is_active" in others else None,
                )
            if "role" in form.changed_data and roles.change_role(user_id=obj.pk, role=obj.role, changed_by=superadmin):
                messages.warning(request, "The role is given when another superadmin approves it, under Requests.")

    def has_delete_permission(self, request: HttpRequest, obj: User | None = None) -> bool:
        """People with a ledger are never deleted: the rows must keep naming who paid."""
        return False

    def delete_view(self, request: HttpRequest, object_id: str, extra_context: Any = None) -> HttpResponse:
        """Says what to do instead."""
        if not self.has_change_permission(request):
            raise PermissionDenied
        messages.error(request, UserKept.message)
        return redirect("admin:accounts_user_change", object_id)


@admin.register(Workspace)
class WorkspaceAdmin(ReadOnlyAdmin):
    """Read-only: rows of the books name it."""

    list_display = ("name", "kind", "owner", "created_at", "closed_at")
    list_filter = ("kind",)
    search_fields = ("name", "owner__email")


@admin.register(Membership)
class MembershipAdmin(ReadOnlyAdmin):
    """Read-only: who is in a team is the team's affair."""

    list_display = ("workspace", "user", "role", "created_at")
    list_filter = ("role",)
    search_fields = ("workspace__name", "user__email")


@admin.register(Invitation)
class InvitationAdmin(ReadOnlyAdmin):
    """Read-only; what opens one is kept as a hash, which concerns nobody."""

    list_display = ("workspace", "email", "role", "invited_by", "created_at", "expires_at", "accepted_at", "revoked_at")
    list_filter = ("role",)
    search_fields = ("workspace__name", "email")
    fields = (
        "workspace", "email", "role", "hands_over", "invited_by", "created_at", "expires_at", "sent_at", "accepted_at",
        "accepted_by", "revoked_at",
    )  # fmt: skip
    readonly_fields = fields


@admin.register(ChangeRequest)
class ChangeRequestAdmin(ReadOnlyAdmin):
    """Decided on the dashboard, never here."""

    list_display = ("created_at", "kind", "subject", "__str__", "state", "requested_by", "decided_by", "decided_at")
    list_filter = ("state", "kind")
    search_fields = ("subject__email", "requested_by__email")


@admin.register(ApiKey)
class ApiKeyAdmin(ReadOnlyAdmin):
    """Read-only: a key belongs to its owner, and its hash concerns nobody."""

    list_display = ("name", "user", "token_start", "scopes", "created_at", "last_used_at", "expires_at", "revoked_at")
    list_filter = (("revoked_at", admin.EmptyFieldListFilter),)
    search_fields = ("user__email", "name", "token_start")
    fields = ("user", "name", "token_start", "scopes", "created_at", "last_used_at", "expires_at", "revoked_at")
    readonly_fields = fields


@admin.register(AuditEntry)
class AuditEntryAdmin(ReadOnlyAdmin):
    """Read-only: the database refuses everything else."""

    list_display = ("created_at", "actor", "actor_role", "action", "summary", "outcome", "subject", "ip_address")
    list_filter = ("outcome", "action")
    search_fields = ("actor__email", "subject__email")
    date_hierarchy = "created_at"


# allauth's own pages show what opens somebody's account: the secret of an authenticator app, the key of a session; a
# verified address added to somebody's account opens it, too. Rights follow from roles: there are no groups.
admin.site.unregister([Authenticator, EmailAddress, Group, UserSession])


@admin.register(Authenticator)
class AuthenticatorAdmin(ReadOnlyAdmin):
    """Read-only, but removed for somebody who has lost their phone and their recovery codes."""

    list_display = ("user", "type", "created_at", "last_used_at")
    list_filter = ("type",)
    search_fields = ("user__email",)
    fields = ("user", "type", "created_at", "last_used_at")
    readonly_fields = fields

    def has_delete_permission(self, request: HttpRequest, obj: models.Model | None = None) -> bool:
        return admin.ModelAdmin.has_delete_permission(self, request, obj)

    def delete_model(self, request: HttpRequest, obj: Authenticator) -> None:
        self._remove(request, [obj])

    def delete_queryset(self, request: HttpRequest, queryset: models.QuerySet) -> None:
        self._remove(request, queryset)

    def _remove(self, request: HttpRequest, authenticators: Iterable[Authenticator]) -> None:
        with transaction.atomic():
            for each in authenticators:
                audit.write(
                    action=audit.Action.PERSON_CHANGED,
                    summary=f"Removed a second factor in Django admin: {each.get_type_display()}",
                    actor=cast(User, request.user),
                    subject_id=each.user_id,
                )
                each.delete()
                access.end_sessions(each.user)
                if each.type == Authenticator.Type.TOTP:
                    tell = partial(get_adapter().send_notification_mail, "mfa/email/totp_deactivated", each.user)
                    transaction.on_commit(tell)


@admin.register(UserSession)
class UserSessionAdmin(ReadOnlyAdmin):
    """Read-only."""

    list_display = ("user", "created_at", "last_seen_at", "ip", "user_agent")
    search_fields = ("user__email", "ip")
    fields = list_display
    readonly_fields = fields
