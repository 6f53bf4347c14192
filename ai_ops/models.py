"""What people make in the Studio. What it cost is on the usage row that each result names.

Usage rows are named by their number: billing lies below this code, and its rows outlive these.
"""

from typing import Any

from django.conf import settings
from django.db import models
from django.urls import reverse


class Project(models.Model):
    """A folder for pieces, chats and images."""

    workspace = models.ForeignKey("accounts.Workspace", on_delete=models.CASCADE, related_name="projects")
    name = models.CharField(max_length=150)
    created_at = models.DateTimeField(auto_now_add=True)

    class Meta:
        ordering = ("name",)
        constraints = [models.UniqueConstraint(fields=["workspace", "name"], name="project_name_once_per_workspace")]

    def __str__(self) -> str:
        return self.name

    def get_absolute_url(self) -> str:
        return reverse("studio:project", args=[self.pk])


class ResultState(models.TextChoices):
    WRITING = "writing", "In progress"
    READY = "ready", "Ready"
    CUT_SHORT = "cut_short", "Cut short"  # stopped, broken off by the provider, or out of tokens
    FAILED = "failed", "Failed"


def _state_field() -> Any:
    return models.CharField(max_length=10, choices=ResultState, default=ResultState.WRITING)


def _author_field(related_name: str) -> Any:
    return models.ForeignKey(settings.AUTH_USER_MODEL, on_delete=models.CASCADE, related_name=related_name)


class ContentPiece(models.Model):
    """A text. `body` is its newest version that is used; each operation and each edit adds a version."""

    State = ResultState

    project = models.ForeignKey(Project, on_delete=models.CASCADE, related_name="pieces")
    author = _author_field("pieces")
    source = models.ForeignKey("self", on_delete=models.SET_NULL, null=True, blank=True, related_name="derived")
    title = models.CharField(max_length=200)
    topic = models.TextField(blank=True)
    body = models.TextField(blank=True, default="")
    state = _state_field()
    created_at = models.DateTimeField(auto_now_add=True)
    updated_at = models.DateTimeField(auto_now=True)

    class Meta:
        indexes = [models.Index(fields=["author", "-updated_at"], name="piece_by_author_and_time")]

    def __str__(self) -> str:
        return self.title

    def get_absolute_url(self) -> str:
        return reverse("studio:content", args=[self.pk])


class VersionOrigin(models.TextChoices):
    DRAFT = "draft", "Draft"
    EDIT = "edit", "Edited by hand"
    REFINEMENT = "refinement", "Refined"
    SELECTION = "selection", "Passage refined"
    REPURPOSE = "repurpose", "Repurposed"
    CONTINUATION = "continuation", "Continued"
    RESTORED = "restored", "Restored"


class ContentVersion(models.Model):
    """A text as it stood, and where it came from. Never changed."""

    Origin = VersionOrigin

    piece = models.ForeignKey(ContentPiece, on_delete=models.CASCADE, related_name="versions")
    number = models.IntegerField()  # 1, 2, 3 … within the piece
    body = models.TextField(blank=True)
    origin = models.CharField(max_length=12, choices=VersionOrigin)
    note = models.CharField(max_length=300, blank=True)  # what was asked for
    # False: an unfinished text, or one whose base was changed meanwhile. It is kept beside the piece's body.
    is_used = models.BooleanField(default=True)
    usage_id = models.BigIntegerField(null=True, blank=True)
    # Who wrote it, or had it written; those of before versions said so were the piece's author's.
    author = models.ForeignKey(
        settings.AUTH_USER_MODEL, on_delete=models.SET_NULL, null=True, blank=True, related_name="+", db_index=False
    )
    created_at = models.DateTimeField(auto_now_add=True)

    class Meta:
        ordering = ("-number",)
        constraints = [models.UniqueConstraint(fields=["piece", "number"], name="version_number_once_per_piece")]

    def __str__(self) -> str:
        return f"{self.piece} (version {self.number})"


class Chat(models.Model):
    """A conversation with a model."""

    project = models.ForeignKey(Project, on_delete=models.CASCADE, related_name="chats")
    author = _author_field("chats")
    title = models.CharField(max_length=200)
    created_at = models.DateTimeField(auto_now_add=True)
    updated_at = models.DateTimeField(auto_now=True)

    class Meta:
        indexes = [models.Index(fields=["author", "-updated_at"], name="chat_by_author_and_time")]

    def __str__(self) -> str:
        return self.title

    def get_absolute_url(self) -> str:
        return reverse("studio:chat", args=[self.pk])


class ChatTurn(models.Model):
    """A question and its answer."""

    chat = models.ForeignKey(Chat, on_delete=models.CASCADE, related_name="turns")
    question = models.TextField()
    answer = models.TextField(blank=True, default="")
    state = _state_field()
    usage_id = models.BigIntegerField(null=True, blank=True, unique=True)
    created_at = models.DateTimeField(auto_now_add=True)
    updated_at = models.DateTimeField(auto_now=True)

    class Meta:
        ordering = ("id",)

    def __str__(self) -> str:
        return f"{self.chat} #{self.pk}"

    def get_absolute_url(self) -> str:
        return f"{self.chat.get_absolute_url()}#turn-{self.pk}"


class ImagePrompt(models.Model):
    """A description of an image, written by a model from an idea."""

    project = models.ForeignKey(Project, on_delete=models.CASCADE, related_name="image_prompts")
    author = _author_field("image_prompts")
    idea = models.TextField()
    style = models.CharField(max_length=20, blank=True)
    text = models.TextField(blank=True, default="")
    state = _state_field()
    usage_id = models.BigIntegerField(null=True, blank=True, unique=True)
    created_at = models.DateTimeField(auto_now_add=True)
    updated_at = models.DateTimeField(auto_now=True)

    class Meta:
        indexes = [models.Index(fields=["author", "-created_at"], name="image_prompt_by_author")]

    def __str__(self) -> str:
        return self.idea[:80]

    def get_absolute_url(self) -> str:
        return f"{reverse('studio:images')}?prompt={self.pk}"


class ImageBatch(models.Model):
    """The images of one operation."""

    project = models.ForeignKey(Project, on_delete=models.CASCADE, related_name="image_batches")
    author = _author_field("image_batches")
    prompt = models.TextField()
    style = models.CharField(max_length=20, blank=True)
    size = models.CharField(max_length=20)
    quality = models.CharField(max_length=20, blank=True)
    count = models.IntegerField()  # asked for; those that came are in `images`
    state = _state_field()
    usage_id = models.BigIntegerField(null=True, blank=True, unique=True)
    created_at = models.DateTimeField(auto_now_add=True)
    updated_at = models.DateTimeField(auto_now=True)

    class Meta:
        verbose_name_plural = "image batches"
        indexes = [models.Index(fields=["author", "-created_at"], name="image_batch_by_author")]

    def __str__(self) -> str:
        return self.prompt[:80]

    def get_absolute_url(self) -> str:
        return reverse("studio:image-batch", args=[self.pk])


class GeneratedImage(models.Model):
    """One image. Its file is served to its author alone."""

    batch = models.ForeignKey(ImageBatch, on_delete=models.CASCADE, related_name="images")
    position = models.IntegerField()
    file = models.FileField(upload_to="images/%Y/%m")
    media_type = models.CharField(max_length=20)

    class Meta:
        ordering = ("position",)
        constraints = [models.UniqueConstraint(fields=["batch", "position"], name="image_position_once_per_batch")]

    def __str__(self) -> str:
        return f"{self.batch} #{self.position}"

    def get_absolute_url(self) -> str:
        return reverse("studio:image-file", args=[self.pk])
