"""What people made, in Django admin, for superadmins: never edited, and read for a reason that is kept.

Lists tell whose it is and when it was made. Names, titles, prompts and texts are on a row's own page alone, which asks
why it is opened; the answer is in the audit log before anything is shown. Nothing can be searched by its words.
"""

from operator import attrgetter
from typing import Any, ClassVar, cast

from django import forms
from django.contrib import admin
from django.contrib.admin.utils import unquote
from django.core.exceptions import PermissionDenied
from django.core.validators import ProhibitNullCharactersValidator
from django.db import models
from django.http import HttpRequest, HttpResponse
from django.shortcuts import render

from accounts import audit
from accounts.admin import ReadOnlyAdmin
from accounts.models import User
from ai_ops.models import Chat, ChatTurn, ContentPiece, ContentVersion, GeneratedImage, ImageBatch, ImagePrompt, Project


class ReasonForm(forms.Form):
    reason = forms.CharField(
        max_length=500,
        label="Why do you read it?",
        help_text="Kept in the audit log, with your name and whose it is.",
        validators=[ProhibitNullCharactersValidator()],
    )


class ContentAdmin(ReadOnlyAdmin):
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


@admin.register(Project)
class ProjectAdmin(ContentAdmin):
    author_id = "workspace.owner_id"
    list_display = ("id", "workspace", "created_at")
    search_fields = ("workspace__owner__email",)


@admin.register(ContentPiece)
class ContentPieceAdmin(ContentAdmin):
    list_display = ("id", "author", "state", "updated_at")
    list_filter = ("state",)
    search_fields = ("author__email",)


@admin.register(ContentVersion)
class ContentVersionAdmin(ContentAdmin):
    author_id = "piece.author_id"
    list_display = ("id", "piece_id", "number", "origin", "is_used", "usage_id", "created_at")
    list_filter = ("origin", "is_used")
    search_fields = ("piece__author__email", "usage_id__exact")


@admin.register(Chat)
class ChatAdmin(ContentAdmin):
    list_display = ("id", "author", "updated_at")
    search_fields = ("author__email",)


@admin.register(ChatTurn)
class ChatTurnAdmin(ContentAdmin):
    author_id = "chat.author_id"
    list_display = ("id", "chat_id", "state", "usage_id", "created_at")
    list_filter = ("state",)
    search_fields = ("chat__author__email", "usage_id__exact")


@admin.register(ImagePrompt)
class ImagePromptAdmin(ContentAdmin):
    list_display = ("id", "author", "state", "usage_id", "created_at")
    list_filter = ("state", "style")
    search_fields = ("author__email", "usage_id__exact")


@admin.register(GeneratedImage)
class GeneratedImageAdmin(ContentAdmin):
    """Named, not shown: an image is served to its author alone."""

    author_id = "batch.author_id"
    list_display = ("id", "batch_id", "position", "author", "media_type")
    list_filter = ("media_type",)
    list_select_related = ("batch__author",)
    search_fields = ("batch__author__email", "batch__usage_id__exact")
    fields = ("batch", "position", "media_type")

    @admin.display(ordering="batch__author__email")
    def author(self, image: GeneratedImage) -> str:
        return str(image.batch.author)


class GeneratedImageInline(admin.TabularInline):
    model = GeneratedImage
    fields = readonly_fields = ("position", "media_type")
    can_delete = False
    extra = 0

    def has_add_permission(self, request: HttpRequest, obj: models.Model | None = None) -> bool:
        return False


@admin.register(ImageBatch)
class ImageBatchAdmin(ContentAdmin):
    list_display = ("id", "author", "size", "quality", "count", "state", "usage_id", "created_at")
    list_filter = ("state", "size", "style")
    search_fields = ("author__email", "usage_id__exact")
    inlines = (GeneratedImageInline,)
