"""The AI operations, one function each. A request says what the model is asked; the function, where the answer goes.

Each yields `Started`, for texts their text as it comes, then `Finished`; or only `Replayed` when the key was used for
the same request before. Each raises, before anything is yielded or written, OperationError, CatalogueError,
InvalidUsage, InsufficientTokens, AccountNotActive or IdempotencyConflict; after `Started`, ProviderError (nothing is
charged). Close the generator to stop the provider: what was written is kept and charged.
"""

import asyncio
import dataclasses
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from typing import Any, TypeAlias, cast

from django.conf import settings
from django.core.files.base import ContentFile
from django.db import transaction
from django.db.models import Q

from ai_ops import metering, prompts
from ai_ops.metering import Finished, Quote
from ai_ops.models import (
    Chat,
    ChatTurn,
    ContentPiece,
    ContentVersion,
    GeneratedImage,
    ImageBatch,
    ImagePrompt,
    ResultState,
)
from ai_ops.pieces import (
    OperationError,
    add_version,
    get_chat,
    get_piece,
    get_project,
    get_workspace,
    keep_new_piece,
    keep_revision,
    save_edit,
    state_of,
)
from ai_ops.providers import Images, TextDelta
from ai_ops.requests import (
    ChatRequest,
    ContinuationRequest,
    DraftRequest,
    ImagePromptRequest,
    ImageRequest,
    RefinementRequest,
    RepurposeRequest,
    Request,
    SelectionRequest,
    ShownPrice,
)
from billing import ledger, payer
from billing.models import TokenUsage
from kit import database
from kit.database import in_thread, repeated_after_conflicts

LEFT_AT_MOST, LEFT_WITHIN = 5, timedelta(minutes=10)  # operations that ended before anything had come
FILE_ENDINGS = {"image/png": "png", "image/jpeg": "jpg", "image/webp": "webp"}

Type = TokenUsage.OperationType
Origin = ContentVersion.Origin
Result: TypeAlias = ContentPiece | ChatTurn | ImagePrompt | ImageBatch


class PriceChanged(OperationError):
    """It costs more than the person was shown."""

    http_status = 409


class LeftTooOften(OperationError):
    """Who starts operations of which nothing comes, again and again, waits for a while: because they leave each, or
    because the model thinks until its limit, refuses or writes nothing each time."""

    http_status = 429


@dataclass(frozen=True, slots=True)
class Started:
    """The hold is there and the provider is about to be asked."""

    usage_id: int
    result: Result
    held_tokens: int


@dataclass(frozen=True, slots=True)
class Replayed:
    """The same request came before: here is what became of it. Nothing was run."""

    usage: TokenUsage
    result: Result | None


Event: TypeAlias = Started | Replayed | TextDelta | Finished
Events: TypeAlias = AsyncGenerator[Event, None]


# --- The operations ---------------------------------------------------------------------------------------------------


def generate_draft(*, user_id: int, request: DraftRequest, idempotency_key: str) -> Events:
    """Write a draft into a new content piece of the user's project."""

    def open_piece() -> ContentPiece:
        return ContentPiece.objects.create(
            project=get_project(user_id=user_id, team_id=request.team_id, name=request.project),
            author_id=user_id,
            title=request.title,
            topic=request.topic,
        )

    return _run_text(user_id, request, idempotency_key, open_piece, partial(keep_new_piece, Origin.DRAFT, ""))


def continue_draft(*, user_id: int, request: ContinuationRequest, idempotency_key: str) -> Events:
    """Write on where a text was cut short, for instance because the balance had run out."""

    def open_piece() -> ContentPiece:
        return get_piece(user_id=user_id, content_id=request.content_id)

    def keep(piece: ContentPiece, usage_id: int, text: str, is_complete: bool) -> None:
        base = piece.body  # what the model went on from
        piece = ContentPiece.objects.select_for_update().get(pk=piece.pk)
        if text:
            is_used = piece.body == base  # else it is kept aside
            state = state_of(text, is_complete)
            add_version(
                piece, base + text, Origin.CONTINUATION, author_id=user_id, usage_id=usage_id, is_used=is_used,
                state=state,
            )  # fmt: skip

    return _run_text(user_id, request, idempotency_key, open_piece, keep)


def generate_chat_response(*, user_id: int, request: ChatRequest, idempotency_key: str) -> Events:
    """Answer a question, knowing what was said before in the chat; the first one opens it."""

    def open_turn() -> ChatTurn:
        if request.chat_id is None:
            project = get_project(user_id=user_id, team_id=request.team_id, name=request.project)
            title = " ".join(request.question.split())
            chat = Chat.objects.create(project=project, author_id=user_id, title=_shortened(title, 80))
        else:
            chat = get_chat(user_id=user_id, chat_id=request.chat_id)
            chat.save(update_fields=["updated_at"])
        return ChatTurn.objects.create(chat=chat, question=request.question)

    def keep(turn: ChatTurn, usage_id: int, text: str, is_complete: bool) -> None:
        turn.answer, turn.state = text, state_of(text, is_complete)
        turn.save(update_fields=["answer", "state", "updated_at"])

    return _run_text(user_id, request, idempotency_key, open_turn, keep)


def refine_content(*, user_id: int, request: RefinementRequest, idempotency_key: str) -> Events:
    """Rewrite a piece as the refinement says; the result is its next version."""
    note = prompts.REFINEMENTS[request.refinement].label

    def open_piece() -> ContentPiece:
        return save_edit(
            user_id=user_id, content_id=request.content_id, base_number=request.base_number, body=request.body
        )

    def keep(piece: ContentPiece, usage_id: int, text: str, is_complete: bool) -> None:
        keep_revision(
            piece, request.body, text, is_complete, Origin.REFINEMENT, note, author_id=user_id, usage_id=usage_id
        )

    return _run_text(user_id, request, idempotency_key, open_piece, keep)


def refine_selection(*, user_id: int, request: SelectionRequest, idempotency_key: str) -> Events:
    """Rewrite one passage of a piece as the instruction says; the piece with the new passage is its next version."""

    def open_piece() -> ContentPiece:
        return save_edit(
            user_id=user_id, content_id=request.content_id, base_number=request.base_number, body=request.body
        )

    def keep(piece: ContentPiece, usage_id: int, text: str, is_complete: bool) -> None:
        before, after = request.around
        leading, trailing = _outer_space(request.selection)
        revised = f"{before}{leading}{text.strip()}{trailing}{after}" if text else ""
        note = _shortened(request.instruction, 300)
        keep_revision(
            piece, request.body, revised, is_complete, Origin.SELECTION, note, author_id=user_id, usage_id=usage_id
        )

    return _run_text(user_id, request, idempotency_key, open_piece, keep)


def repurpose_content(*, user_id: int, request: RepurposeRequest, idempotency_key: str) -> Events:
    """Turn a piece into another format, as a new piece that names its source."""
    label = prompts.TRANSFORMATIONS[request.transformation].label

    def open_piece() -> ContentPiece:
        source = get_piece(user_id=user_id, content_id=request.content_id)
        return ContentPiece.objects.create(
            project_id=source.project_id,
            author_id=user_id,
            source=source,
            title=_shortened(f"{label}: {source.title}", 200),
            topic=source.topic,
        )

    return _run_text(user_id, request, idempotency_key, open_piece, partial(keep_new_piece, Origin.REPURPOSE, label))


def generate_image_prompt(*, user_id: int, request: ImagePromptRequest, idempotency_key: str) -> Events:
    """Turn an idea into a description that a model can make an image of."""

    def open_prompt() -> ImagePrompt:
        project = get_project(user_id=user_id, team_id=request.team_id, name=request.project)
        return ImagePrompt.objects.create(project=project, author_id=user_id, idea=request.idea, style=request.style)

    def keep(prompt: ImagePrompt, usage_id: int, text: str, is_complete: bool) -> None:
        prompt.text, prompt.state = text, state_of(text, is_complete)
        prompt.save(update_fields=["text", "state", "updated_at"])

    return _run_text(user_id, request, idempotency_key, open_prompt, keep)


async def generate_images(*, user_id: int, request: ImageRequest, idempotency_key: str) -> Events:
    """Make images, with a model of OpenAI's or Google's. Those that come are charged for, each at the same price."""

    def open_batch() -> ImageBatch:
        return ImageBatch.objects.create(
            project=get_project(user_id=user_id, team_id=request.team_id, name=request.project),
            author_id=user_id,
            prompt=request.prompt,
            style=request.style,
            size=request.size,
            quality=request.quality,
            count=request.count,
        )

    def keep(batch: ImageBatch, images: Images | None) -> None:
        batch.state = ResultState.READY if images else ResultState.FAILED
        batch.save(update_fields=["state", "updated_at"])
        for position, image in enumerate(images.images if images else (), start=1):
            # A file is written before the commit: a crash leaves a file that nothing names, never a row without one.
            name = f"{batch.pk}-{position}.{FILE_ENDINGS[image.media_type]}"
            file = ContentFile(image.data, name=name)
            GeneratedImage.objects.create(batch=batch, position=position, file=file, media_type=image.media_type)

    def keep_nothing(started: Started) -> None:
        keep(cast(ImageBatch, started.result), None)

    begun = await _begin(user_id, request, idempotency_key, metering.quote_images, open_batch, keep_nothing)
    if isinstance(begun, Replayed):
        yield begun
        return
    started, quote = begun
    async with aclosing(_hand_over(started, keep_nothing)) as hand_over:
        async for item in hand_over:
            yield item
    yield await metering.make_images(
        quote=quote, usage_id=started.usage_id, keep=partial(keep, cast(ImageBatch, started.result))
    )


# --- What they share --------------------------------------------------------------------------------------------------


async def _run_text(
    user_id: int,
    request: Request,
    idempotency_key: str,
    open_result: Callable[[], Any],
    keep: Callable[[Any, int, str, bool], None],
) -> Events:
    """`open_result` makes or finds the row that the text goes to, in the transaction of the hold; `keep(result,
    usage_id, text, is_complete)` puts it there, in the transaction that charges for it."""

    def keep_nothing(started: Started) -> None:
        keep(started.result, started.usage_id, "", False)

    begun = await _begin(user_id, request, idempotency_key, metering.quote_text, open_result, keep_nothing)
    if isinstance(begun, Replayed):
        yield begun
        return
    started, quote = begun
    text = metering.stream_text(
        quote=quote, usage_id=started.usage_id, keep=partial(keep, started.result, started.usage_id)
    )
    for stream in (_hand_over(started, keep_nothing), text):
        async with aclosing(stream):
            async for item in stream:
                yield item


async def _begin(
    user_id: int,
    request: Request,
    idempotency_key: str,
    quote_operation: Callable[..., Quote],
    open_result: Callable[[], Result],
    keep_nothing: Callable[[Started], None],
) -> tuple[Started, Quote] | Replayed:
    """Quote and hold. When the reader leaves meanwhile, what was held is given back: a thread cannot be stopped."""
    begin = asyncio.ensure_future(
        in_thread(_quote_and_hold)(user_id, request, idempotency_key, quote_operation, open_result)
    )
    try:
        return await asyncio.shield(begin)
    except asyncio.CancelledError:
        await asyncio.shield(asyncio.ensure_future(_give_back(begin, keep_nothing)))
        raise


async def _give_back(
    begin: Awaitable[tuple[Started, Quote] | Replayed], keep_nothing: Callable[[Started], None]
) -> None:
    try:
        begun = await begin
    except Exception:  # refused: nothing is held
        return
    if not isinstance(begun, Replayed):
        await _abandon(begun[0], keep_nothing)


async def _hand_over(started: Started, keep_nothing: Callable[[Started], None]) -> AsyncGenerator[Event, None]:
    try:
        yield started
    except BaseException:
        await _abandon(started, keep_nothing)  # the reader left before the provider was asked
        raise


async def _abandon(started: Started, keep_nothing: Callable[[Started], None]) -> None:
    await metering.abandon(usage_id=started.usage_id, keep_nothing=partial(keep_nothing, started))


@repeated_after_conflicts
def _quote_and_hold(
    user_id: int,
    request: Request,
    idempotency_key: str,
    quote_operation: Callable[..., Quote],
    open_result: Callable[[], Result],
) -> tuple[Started, Quote] | Replayed:
    asked_for = {"request": type(request).__name__} | dataclasses.asdict(request)
    del asked_for["shown_price"]
    if request.team_id is None:
        del asked_for["team_id"]  # as requests of before teams were
    account = payer.account_of_workspace(get_workspace(user_id=user_id, team_id=request.team_id))
    # First of all: a retry must not fail because its first time spent the balance or changed the text.
    replay = ledger.find_reservation(
        account_id=account.pk, actor_id=user_id, idempotency_key=idempotency_key, request=asked_for
    )
    if replay is not None:
        return _replayed(replay)
    _require_patience(account.pk, user_id)
    quote = quote_operation(user_id=user_id, account_id=account.pk, ask=request.ask(user_id))
    _require_shown_price(quote, request.shown_price)
    with transaction.atomic(durable=True):
        result = open_result()
        posting = metering.reserve_quote(
            quote, idempotency_key=idempotency_key, request=asked_for, links=_links(result)
        )
        if posting.is_replay:
            transaction.set_rollback(True)
        elif not isinstance(result, ContentPiece):
            result.usage_id = posting.usage_id
            result.save(update_fields=["usage_id"])
    if posting.is_replay:
        return _replayed(posting)
    return Started(cast(int, posting.usage_id), result, quote.held_tokens), quote  # a reservation always has one


def _require_patience(account_id: int, user_id: int) -> None:
    # Each of them cost us more than it brought: providers think, and paint, on the way to what nobody waits for.
    come_to_nothing = Q(*(("error_message__contains", words) for words in metering.CAME_TO_NOTHING), _connector=Q.OR)
    left = TokenUsage.objects.filter(
        Q(error_message__in=metering.LEFT_EARLY) | come_to_nothing,
        account_id=account_id,
        user_id=user_id,
        provider_cost_microusd__gt=0,
        created_at__gt=database.now() - LEFT_WITHIN,
    )
    if left[:LEFT_AT_MOST].count() == LEFT_AT_MOST:
        minutes = LEFT_WITHIN // timedelta(minutes=1)
        raise LeftTooOften(
            f"Within {minutes} minutes {LEFT_AT_MOST} of your operations ended before anything had come: you stopped "
            f"them, or the model only thought, refused or wrote nothing. Please wait for some minutes, then try again."
        )


def _require_shown_price(quote: Quote, shown: ShownPrice | None) -> None:
    # The price alone: by how much a text has grown since the quote, its author knows.
    if shown and shown.unit == quote.unit and shown.unit_price < quote.unit_price:
        tokens = f"{quote.max_billable_tokens:,}"
        raise PriceChanged(f"The price changed: this now costs at most {tokens} tokens. Send it again if you agree.")


def _links(result: Result) -> dict[str, Any]:
    """What the usage row says of where the result is."""
    if isinstance(result, ChatTurn):
        return {"chat_id": result.chat_id, "project_id": result.chat.project_id}
    if isinstance(result, ContentPiece):
        return {"content_id": result.pk, "project_id": result.project_id}
    return {"project_id": result.project_id}


def _replayed(posting: ledger.Posting) -> Replayed:
    usage = TokenUsage.objects.get(pk=cast(int, posting.usage_id))
    return Replayed(usage, find_result(usage))


def find_result(usage: TokenUsage) -> Result | None:
    """What the operation made or changed, if it still exists."""
    if usage.operation_type == Type.CHAT:
        return ChatTurn.objects.select_related("chat").filter(usage_id=usage.pk).first()
    if usage.operation_type == Type.PROMPT:
        return ImagePrompt.objects.filter(usage_id=usage.pk).first()
    if usage.operation_type == Type.IMAGE:
        return ImageBatch.objects.filter(usage_id=usage.pk).first()
    return ContentPiece.objects.filter(pk=usage.content_id or 0).first()


def text_of(result: Result | None) -> str:
    """The text that an operation wrote, '' for images."""
    if isinstance(result, ContentPiece):
        return result.body
    if isinstance(result, ChatTurn):
        return result.answer
    return result.text if isinstance(result, ImagePrompt) else ""


def _outer_space(text: str) -> tuple[str, str]:
    """The white space that a text begins and ends with. The text has other characters as well."""
    return text[: len(text) - len(text.lstrip())], text[len(text.rstrip()) :]


def _shortened(text: str, length: int) -> str:
    return text if len(text) <= length else f"{text[: length - 1].rstrip()}…"


# --- Tidying up -------------------------------------------------------------------------------------------------------


def close_abandoned_results() -> int:
    """Mark as failed what an operation was writing when its process died. Returns how many."""
    abandoned_before = database.now() - timedelta(seconds=settings.RESERVATION_SECONDS)
    return sum(
        model.objects.filter(state=ResultState.WRITING, updated_at__lt=abandoned_before).update(
            state=ResultState.FAILED
        )
        for model in (ContentPiece, ChatTurn, ImagePrompt, ImageBatch)
    )
