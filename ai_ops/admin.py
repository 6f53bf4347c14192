"""What people made, in Django admin, for superadmins: to be looked at, not to be edited."""

from django.contrib import admin
from django.db import models
from django.http import HttpRequest

from accounts.admin import ReadOnlyAdmin
from ai_ops.models import Chat, ChatTurn, ContentPiece, ContentVersion, GeneratedImage, ImageBatch, ImagePrompt, Project


class AuthorsOwnAdmin(ReadOnlyAdmin):
    view_on_site = False  # the pages in the Studio open for their author alone


@admin.register(Project)
class ProjectAdmin(AuthorsOwnAdmin):
    list_display = ("name", "workspace", "created_at")
    list_select_related = ("workspace",)
    search_fields = ("name", "workspace__owner__email")
    ordering = ("-id",)


@admin.register(ContentPiece)
class ContentPieceAdmin(AuthorsOwnAdmin):
    list_display = ("title", "project", "author", "state", "updated_at")
    list_filter = ("state",)
    list_select_related = ("project", "author")
    search_fields = ("title", "author__email")
    ordering = ("-id",)


@admin.register(ContentVersion)
class ContentVersionAdmin(AuthorsOwnAdmin):
    list_display = ("piece", "number", "origin", "note", "is_used", "usage_id", "created_at")
    list_filter = ("origin", "is_used")
    list_select_related = ("piece",)
    search_fields = ("piece__title", "piece__author__email", "usage_id__exact")
    ordering = ("-id",)


@admin.register(Chat)
class ChatAdmin(AuthorsOwnAdmin):
    list_display = ("title", "project", "author", "updated_at")
    list_select_related = ("project", "author")
    search_fields = ("title", "author__email")
    ordering = ("-id",)


@admin.register(ChatTurn)
class ChatTurnAdmin(AuthorsOwnAdmin):
    list_display = ("__str__", "state", "usage_id", "created_at")
    list_filter = ("state",)
    list_select_related = ("chat",)
    search_fields = ("chat__title", "chat__author__email", "usage_id__exact")
    ordering = ("-id",)


@admin.register(ImagePrompt)
class ImagePromptAdmin(AuthorsOwnAdmin):
    list_display = ("__str__", "project", "author", "state", "usage_id", "created_at")
    list_filter = ("state", "style")
    list_select_related = ("project", "author")
    search_fields = ("author__email", "usage_id__exact")
    ordering = ("-id",)


@admin.register(GeneratedImage)
class GeneratedImageAdmin(AuthorsOwnAdmin):
    """Named, not shown: an image is served to its author alone."""

    list_display = ("__str__", "author", "media_type")
    list_filter = ("media_type",)
    list_select_related = ("batch__author",)
    search_fields = ("batch__author__email", "batch__usage_id__exact")
    fields = ("batch", "position", "media_type")
    ordering = ("-id",)

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
class ImageBatchAdmin(AuthorsOwnAdmin):
    list_display = ("__str__", "project", "author", "size", "quality", "count", "state", "usage_id", "created_at")
    list_filter = ("state", "size", "style")
    list_select_related = ("project", "author")
    search_fields = ("author__email", "usage_id__exact")
    ordering = ("-id",)
    inlines = (GeneratedImageInline,)
