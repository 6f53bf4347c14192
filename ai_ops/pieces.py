"""The Studio's texts: projects, pieces with all their versions, chats. An operation's result becomes a version here."""

from django.db import transaction

from accounts.models import Workspace
from accounts.workspaces import visible_to
from ai_ops.models import Chat, ContentPiece, ContentVersion, Project, ResultState
from kit.refusal import Refusal

Origin = ContentVersion.Origin


class OperationError(Refusal):
    """Refused; nothing was written and nobody was asked. `message` is for the person."""


class NotYours(OperationError):
    """There is no such thing among what the user has made."""

    http_status = 404


class TextChanged(OperationError):
    """The text that a request is about is not the one that is stored."""

    http_status = 409


class ElsewhereNow(OperationError):
    """It belongs to another workspace than the one that would pay."""

    http_status = 409


def get_workspace(*, user_id: int, team_id: int | None) -> Workspace:
    """The team's workspace, or without one the user's own. Raises NotYours to who is not in the team any more."""
    own = visible_to(user_id).filter(owner_id=user_id) if team_id is None else visible_to(user_id).filter(pk=team_id)
    workspace = own.order_by("pk").first()
    if workspace is None:
        raise NotYours("You are not in this team any more.")
    return workspace


def get_project(*, user_id: int, team_id: int | None = None, name: str) -> Project:
    """The project of that name in the team's workspace, or in the user's own; made if there is none. Raises
    NotYours."""
    workspace = get_workspace(user_id=user_id, team_id=team_id)
    return Project.objects.get_or_create(workspace=workspace, name=name)[0]


def get_piece(*, user_id: int, content_id: int, is_locked: bool = False) -> ContentPiece:
    """A piece of the user's own or of a team they are in, `is_locked` until the end of the transaction. Raises
    NotYours."""
    pieces = ContentPiece.objects.select_for_update(of=("self",)) if is_locked else ContentPiece.objects
    visible = pieces.filter(pk=content_id, project__workspace__in=visible_to(user_id))
    piece = visible.select_related("project__workspace").first()
    if piece is None:
        raise NotYours("There is no such piece. It may have been deleted.")
    return piece


def get_chat(*, user_id: int, chat_id: int) -> Chat:
    """The user's chat, while they are in the team it was held in. Raises NotYours."""
    own = Chat.objects.filter(pk=chat_id, author_id=user_id, project__workspace__in=visible_to(user_id))
    chat = own.select_related("project__workspace").first()
    if chat is None:
        raise NotYours("There is no such chat. It may have been deleted.")
    return chat


def require_in(workspace: Workspace, team_id: int | None) -> None:
    """Raises ElsewhereNow unless it is the team's workspace, or without one a personal one: what is paid for is never
    paid by another account than the one that was named."""
    if team_id != (workspace.pk if workspace.is_team else None):
        raise ElsewhereNow("This belongs to another workspace than the one you work in. Reload the page.")


def newest_number(piece: ContentPiece) -> int:
    """The number of the piece's newest version, 0 when there is none."""
    return piece.versions.values_list("number", flat=True).first() or 0


@transaction.atomic
def save_edit(*, user_id: int, content_id: int, base_number: int, body: str) -> ContentPiece:
    """Keep what the author typed as the piece's next version. Raises NotYours, TextChanged."""
    piece = get_piece(user_id=user_id, content_id=content_id, is_locked=True)
    if body != piece.body:
        require_newest(piece, base_number)
        add_version(piece, body, Origin.EDIT, author_id=user_id)
    return piece


@transaction.atomic
def restore_version(*, user_id: int, content_id: int, number: int) -> ContentPiece:
    """Make an older version, or one that was kept aside, the piece's text again, as a new version."""
    piece = get_piece(user_id=user_id, content_id=content_id, is_locked=True)
    version = piece.versions.filter(number=number).first()
    if version is None:
        raise NotYours("There is no such version.")
    if version.body != piece.body:
        add_version(piece, version.body, Origin.RESTORED, note=f"Version {number}", author_id=user_id)
    return piece


def keep_new_piece(origin: str, note: str, piece: ContentPiece, usage_id: int, text: str, is_complete: bool) -> None:
    """What was written becomes the first version of a piece that was opened for it; without a text it has failed."""
    piece = ContentPiece.objects.select_for_update().get(pk=piece.pk)
    state = state_of(text, is_complete)
    if text:
        add_version(piece, text, origin, author_id=piece.author_id, note=note, usage_id=usage_id, state=state)
    else:
        piece.state = state
        piece.save(update_fields=["state", "updated_at"])


def keep_revision(
    piece: ContentPiece,
    base: str,
    text: str,
    is_complete: bool,
    origin: str,
    note: str,
    *,
    author_id: int,
    usage_id: int,
) -> None:
    """A revision becomes the text, unless it is unfinished or its base was changed meanwhile: then it is kept aside."""
    piece = ContentPiece.objects.select_for_update().get(pk=piece.pk)
    if text:
        is_used = is_complete and piece.body == base
        add_version(piece, text, origin, author_id=author_id, note=note, usage_id=usage_id, is_used=is_used)


def add_version(
    piece: ContentPiece,
    body: str,
    origin: str,
    *,
    author_id: int,
    note: str = "",
    usage_id: int | None = None,
    is_used: bool = True,
    state: str = ResultState.READY,
) -> None:
    """The piece must be locked: version numbers have no gaps."""
    ContentVersion.objects.create(
        piece=piece,
        number=newest_number(piece) + 1,
        body=body,
        origin=origin,
        author_id=author_id,
        note=note,
        is_used=is_used,
        usage_id=usage_id,
    )
    if is_used:
        piece.body, piece.state = body, state
        piece.save(update_fields=["body", "state", "updated_at"])


def require_newest(piece: ContentPiece, base_number: int) -> None:
    """Raises TextChanged when the text was changed after version `base_number`."""
    # What was kept aside has changed nothing of the text.
    if piece.versions.filter(is_used=True, number__gt=base_number).exists():
        raise TextChanged(
            "This text was changed in another window or by another operation. Press Save to see both; "
            "nothing you typed is lost."
        )


def state_of(text: str, is_complete: bool) -> str:
    """Of a result that an operation has ended with."""
    if not text:
        return ResultState.FAILED
    return ResultState.READY if is_complete else ResultState.CUT_SHORT
