"""What people made, in Django admin, for superadmins: to be looked at, not to be edited."""

from django.contrib import admin
from django.db import models
from django.http import HttpRequest

from ai_ops.models import Chat, ChatTurn, ContentPiece, ContentVersion, GeneratedImage, ImageBatch, ImagePrompt, Project
from billing.admin import ReadOnlyAdmin


@admin.register(Project)
class ProjectAdmin(ReadOnlyAdmin):
    list_display = ("name", "workspace", "created_at")
    list_select_related = ("workspace",)
    search_fields = ("name", "workspace__owner__email")
    ordering = ("-id",)


@admin.register(ContentPiece)
class ContentPieceAdmin(ReadOnlyAdmin):
    list_display = ("title", "project", "author", "state", "updated_at")
    list_filter = ("state",)
    list_select_related = ("project", "author")
    search_fields = ("title", "author__email")
    ordering = ("-id",)


@admin.register(ContentVersion)
class ContentVersionAdmin(ReadOnlyAdmin):
    list_display = ("piece", "number", "origin", "note", "is_used", "usage_id", "created_at")
    list_filter = ("origin", "is_used")
    list_select_related = ("piece",)
    search_fields = ("piece__title", "piece__author__email", "usage_id__exact")
    ordering = ("-id",)


@admin.register(Chat)
class ChatAdmin(ReadOnlyAdmin):
    list_display = ("title", "project", "author", "updated_at")
    list_select_related = ("project", "author")
    search_fields = ("title", "author__email")
    ordering = ("-id",)


@admin.register(ChatTurn)
class ChatTurnAdmin(ReadOnlyAdmin):
    list_display = ("__str__", "state", "usage_id", "created_at")
    list_filter = ("state",)
    list_select_related = ("chat",)
    search_fields = ("chat__title", "chat__author__email", "usage_id__exact")
    ordering = ("-id",)


@admin.register(ImagePrompt)
class ImagePromptAdmin(ReadOnlyAdmin):
    list_display = ("__str__", "project", "author", "state", "usage_id", "created_at")
    list_filter = ("state", "style")
    list_select_related = ("project", "author")
    search_fields = ("author__email", "usage_id__exact")
    ordering = ("-id",)


class GeneratedImageInline(admin.TabularInline):
    """Named, not shown: an image is served to its author alone."""

    model = GeneratedImage
    fields = readonly_fields = ("position", "media_type")
    can_delete = False
    extra = 0

    def has_add_permission(self, request: HttpRequest, obj: models.Model | None = None) -> bool:
        return False


@admin.register(ImageBatch)
class ImageBatchAdmin(ReadOnlyAdmin):
    list_display = ("__str__", "project", "author", "size", "quality", "count", "state", "usage_id", "created_at")
    list_filter = ("state", "size", "style")
    list_select_related = ("project", "author")
    search_fields = ("author__email", "usage_id__exact")
    ordering = ("-id",)
    inlines = (GeneratedImageInline,)
