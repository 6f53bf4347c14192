"""What people made, in Django admin, for superadmins: never edited, and read for a reason that is kept.

Lists tell whose it is and when it was made. Names, titles, prompts and texts are on a row's own page alone, which asks
why it is opened (ContentAdmin). Nothing can be searched by its words.
"""

from django.contrib import admin
from django.db import models
from django.http import HttpRequest

from accounts.admin import ContentAdmin
from ai_ops.models import Chat, ChatTurn, ContentPiece, ContentVersion, GeneratedImage, ImageBatch, ImagePrompt, Project


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
