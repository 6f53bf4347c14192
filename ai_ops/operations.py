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
from dataclasses import dataclass, field
from datetime import timedelta
from decimal import Decimal
from functools import partial
from typing import Any, TypeAlias, cast

from django.conf import settings
from django.core.files.base import ContentFile
from django.db import transaction
from django.db.models import Q

from accounts.models import Workspace
from ai_ops import counting, metering, prompts
from ai_ops.metering import Ask, Finished, Quote
from ai_ops.models import (
    Chat,
    ChatTurn,
    ContentPiece,
    ContentVersion,
    GeneratedImage,
    ImageBatch,
    ImagePrompt,
    Project,
    ResultState,
)
from ai_ops.providers import Images, Message, TextDelta
from billing import catalogue, ledger
from billing.models import TokenUsage
from kit import database
from kit.database import in_thread, repeated_after_conflicts
from kit.refusal import Refusal

CHAT_ANSWER_TOKENS = 1_200
CHAT_HISTORY_TOKENS = 3_000  # of what was said before, so that the welcome bonus pays for a turn; the rest is left out
CHAT_PROMPT_TOKENS = 200  # what stands around the question and the history
CONTINUATION_TOKENS = 1_200
REPURPOSED_TOKENS = 1_200
IMAGE_PROMPT_TOKENS = 300
MIN_REVISION_TOKENS = 300
LEFT_AT_MOST, LEFT_WITHIN = 5, timedelta(minutes=10)  # operations that ended before anything had come
FILE_ENDINGS = {"image/png": "png", "image/jpeg": "jpg", "image/webp": "webp"}

Type = TokenUsage.OperationType
Origin = ContentVersion.Origin
Result: TypeAlias = ContentPiece | ChatTurn | ImagePrompt | ImageBatch


class OperationError(Refusal):
    """Refused; nothing was written and nobody was asked. `message` is for the person."""


class NotYours(OperationError):
    """There is no such thing among what the user has made."""

    http_status = 404


class TextChanged(OperationError):
    """The text that a request is about is not the one that is stored."""

    http_status = 409


class PriceChanged(OperationError):
    """It costs more than the person was shown."""

    http_status = 409


class LeftTooOften(OperationError):
    """Who starts operations of which nothing comes, again and again, waits for a while: because they leave each, or
    because the model thinks until its limit, refuses or writes nothing each time."""

    http_status = 429


class NothingToDo(OperationError):
    """A text is needed and there is none."""

    http_status = 422


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


# --- Requests ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class ShownPrice:
    """`Quote.unit` and `Quote.unit_price` of the quote that a person had before them."""

    unit: str
    unit_price: Decimal


@dataclass(frozen=True, slots=True)
class Request:
    """What a person asks for in the Studio: the fields of each kind are what they entered.

    With `shown_price` it is refused when that costs more by now. It is no part of what is asked for.
    """

    shown_price: ShownPrice | None = field(default=None, kw_only=True)

    def ask(self, user_id: int) -> Ask:
        """What the model is asked. Reads, writes nothing; raises OperationError."""
        raise NotImplementedError


@dataclass(frozen=True, slots=True)
class DraftRequest(Request):
    title: str
    topic: str
    project: str
    provider: str
    model: str
    tone: str
    length: str

    def ask(self, user_id: int) -> Ask:
        return Ask(
            operation_type=Type.GENERATION,
            provider=self.provider,
            model=self.model,
            prompt=prompts.draft_prompt(title=self.title, topic=self.topic, tone=self.tone, length=self.length),
            wanted_output_tokens=prompts.LENGTHS[self.length].output_limit_tokens,
            metadata={"operation": "generate_draft", "tone": self.tone, "length": self.length},
        )


@dataclass(frozen=True, slots=True)
class ContinuationRequest(Request):
    """The rest of a text that was cut short."""

    content_id: int
    provider: str
    model: str

    def ask(self, user_id: int) -> Ask:
        piece = get_piece(user_id=user_id, content_id=self.content_id)
        if not piece.body:
            raise NothingToDo("There is no text to continue yet.")
        return Ask(
            operation_type=Type.GENERATION,
            provider=self.provider,
            model=self.model,
            prompt=prompts.continuation_prompt(title=piece.title, topic=piece.topic, written=piece.body),
            wanted_output_tokens=CONTINUATION_TOKENS,
            project_id=piece.project_id,
            content_id=piece.pk,
            metadata={"operation": "generate_draft", "continues": True},
        )


@dataclass(frozen=True, slots=True)
class ChatRequest(Request):
    """`chat_id` None opens a chat in the project."""

    chat_id: int | None
    project: str
    question: str
    provider: str
    model: str

    def ask(self, user_id: int) -> Ask:
        chat = None if self.chat_id is None else get_chat(user_id=user_id, chat_id=self.chat_id)
        history = _history(chat, self) if chat else []
        return Ask(
            operation_type=Type.CHAT,
            provider=self.provider,
            model=self.model,
            prompt=prompts.chat_prompt(history=history, question=self.question),
            wanted_output_tokens=CHAT_ANSWER_TOKENS,
            project_id=chat.project_id if chat else None,
            chat_id=chat.pk if chat else None,
            metadata={"operation": "generate_chat_response", "history_turns": len(history)},
        )


@dataclass(frozen=True, slots=True)
class RefinementRequest(Request):
    """`body` is the text as it stands in the editor, written over version `base_number`."""

    content_id: int
    base_number: int
    body: str
    refinement: str
    wishes: str
    provider: str
    model: str

    def ask(self, user_id: int) -> Ask:
        piece = get_piece(user_id=user_id, content_id=self.content_id)
        _require_text(self.body)
        _require_newest(piece, self.base_number)
        return Ask(
            operation_type=Type.REFINEMENT,
            provider=self.provider,
            model=self.model,
            prompt=prompts.refinement_prompt(text=self.body, refinement=self.refinement, wishes=self.wishes),
            wanted_output_tokens=_revision_tokens(self, self.body),
            least_output_tokens=_least_revision_tokens(
                self, self.body, prompts.REFINEMENTS[self.refinement].length_percent
            ),
            project_id=piece.project_id,
            content_id=piece.pk,
            metadata={"operation": "refine_content", "refinement": self.refinement},
        )


@dataclass(frozen=True, slots=True)
class SelectionRequest(Request):
    """A passage of `body`, from its character `start` on; without `start` it must occur once."""

    content_id: int
    base_number: int
    body: str
    selection: str
    start: int | None
    instruction: str
    provider: str
    model: str

    @property
    def begins_at(self) -> int:
        """Where the passage begins. Raises TextChanged when it is not there, or not known which one is meant."""
        if self.start is not None and self.body.startswith(self.selection, self.start):
            return self.start
        if self.body.count(self.selection) == 1:
            return self.body.index(self.selection)
        if self.selection in self.body:
            raise TextChanged("This passage occurs more than once. Add a few words, so that it is clear which one.")
        raise TextChanged("This passage is not in the text any more. Select it again.")

    def ask(self, user_id: int) -> Ask:
        piece = get_piece(user_id=user_id, content_id=self.content_id)
        _require_text(self.selection)
        _require_newest(piece, self.base_number)
        before, after = self.around
        return Ask(
            operation_type=Type.REFINEMENT,
            provider=self.provider,
            model=self.model,
            prompt=prompts.selection_prompt(
                before=before, selection=self.selection, after=after, instruction=self.instruction
            ),
            wanted_output_tokens=_revision_tokens(self, self.selection),
            least_output_tokens=_least_revision_tokens(self, self.selection),
            project_id=piece.project_id,
            content_id=piece.pk,
            metadata={
                "operation": "refine_selection",
                "selection_characters": len(self.selection),
                "text_characters": len(self.body),
            },
        )

    @property
    def around(self) -> tuple[str, str]:
        """What stands before and after the passage."""
        start = self.begins_at
        return self.body[:start], self.body[start + len(self.selection) :]


@dataclass(frozen=True, slots=True)
class RepurposeRequest(Request):
    content_id: int
    transformation: str
    wishes: str
    provider: str
    model: str

    def ask(self, user_id: int) -> Ask:
        piece = get_piece(user_id=user_id, content_id=self.content_id)
        _require_text(piece.body)
        return Ask(
            operation_type=Type.REPURPOSE,
            provider=self.provider,
            model=self.model,
            prompt=prompts.repurpose_prompt(
                title=piece.title, text=piece.body, transformation=self.transformation, wishes=self.wishes
            ),
            wanted_output_tokens=REPURPOSED_TOKENS,
            project_id=piece.project_id,
            metadata={
                "operation": "repurpose_content",
                "transformation": self.transformation,
                "source_content_id": piece.pk,
            },
        )


@dataclass(frozen=True, slots=True)
class ImagePromptRequest(Request):
    idea: str
    style: str
    project: str
    provider: str
    model: str

    def ask(self, user_id: int) -> Ask:
        return Ask(
            operation_type=Type.PROMPT,
            provider=self.provider,
            model=self.model,
            prompt=prompts.image_prompt_prompt(idea=self.idea, style=self.style),
            wanted_output_tokens=IMAGE_PROMPT_TOKENS,
            metadata={
                "operation": "generate_image_prompt",
                "template": self.style or "plain",
                "idea_characters": len(self.idea),
            },
        )


@dataclass(frozen=True, slots=True)
class ImageRequest(Request):
    prompt: str
    style: str
    project: str
    provider: str
    model: str
    size: str
    quality: str
    count: int

    def ask(self, user_id: int) -> Ask:
        text = prompts.image_text(prompt=self.prompt, style=self.style)
        return Ask(
            operation_type=Type.IMAGE,
            provider=self.provider,
            model=self.model,
            prompt=prompts.Prompt(system="", messages=(Message("user", text),)),
            image_count=self.count,
            image_size=self.size,
            image_quality=self.quality,
            metadata={"operation": "generate_images", "style": self.style or "plain"},
        )


# --- The operations ---------------------------------------------------------------------------------------------------


def generate_draft(*, user_id: int, request: DraftRequest, idempotency_key: str) -> Events:
    """Write a draft into a new content piece of the user's project."""

    def open_piece() -> ContentPiece:
        return ContentPiece.objects.create(
            project=get_project(user_id=user_id, name=request.project),
            author_id=user_id,
            title=request.title,
            topic=request.topic,
        )

    return _run_text(user_id, request, idempotency_key, open_piece, partial(_keep_new_piece, Origin.DRAFT, ""))


def continue_draft(*, user_id: int, request: ContinuationRequest, idempotency_key: str) -> Events:
    """Write on where a text was cut short, for instance because the balance had run out."""

    def open_piece() -> ContentPiece:
        return get_piece(user_id=user_id, content_id=request.content_id)

    def keep(piece: ContentPiece, usage_id: int, text: str, is_complete: bool) -> None:
        base = piece.body  # what the model went on from
        piece = ContentPiece.objects.select_for_update().get(pk=piece.pk)
        if text:
            is_used = piece.body == base  # else it is kept aside
            state = _state_of(text, is_complete)
            _add_version(piece, base + text, Origin.CONTINUATION, usage_id=usage_id, is_used=is_used, state=state)

    return _run_text(user_id, request, idempotency_key, open_piece, keep)


def generate_chat_response(*, user_id: int, request: ChatRequest, idempotency_key: str) -> Events:
    """Answer a question, knowing what was said before in the chat; the first one opens it."""

    def open_turn() -> ChatTurn:
        if request.chat_id is None:
            project = get_project(user_id=user_id, name=request.project)
            title = " ".join(request.question.split())
            chat = Chat.objects.create(project=project, author_id=user_id, title=_shortened(title, 80))
        else:
            chat = get_chat(user_id=user_id, chat_id=request.chat_id)
            chat.save(update_fields=["updated_at"])
        return ChatTurn.objects.create(chat=chat, question=request.question)

    def keep(turn: ChatTurn, usage_id: int, text: str, is_complete: bool) -> None:
        turn.answer, turn.state = text, _state_of(text, is_complete)
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
        _keep_revision(piece, request.body, text, is_complete, Origin.REFINEMENT, note, usage_id)

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
        _keep_revision(piece, request.body, revised, is_complete, Origin.SELECTION, note, usage_id)

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

    return _run_text(user_id, request, idempotency_key, open_piece, partial(_keep_new_piece, Origin.REPURPOSE, label))


def generate_image_prompt(*, user_id: int, request: ImagePromptRequest, idempotency_key: str) -> Events:
    """Turn an idea into a description that a model can make an image of."""

    def open_prompt() -> ImagePrompt:
        project = get_project(user_id=user_id, name=request.project)
        return ImagePrompt.objects.create(project=project, author_id=user_id, idea=request.idea, style=request.style)

    def keep(prompt: ImagePrompt, usage_id: int, text: str, is_complete: bool) -> None:
        prompt.text, prompt.state = text, _state_of(text, is_complete)
        prompt.save(update_fields=["text", "state", "updated_at"])

    return _run_text(user_id, request, idempotency_key, open_prompt, keep)


async def generate_images(*, user_id: int, request: ImageRequest, idempotency_key: str) -> Events:
    """Make images, with a model of OpenAI's or Google's. Those that come are charged for, each at the same price."""

    def open_batch() -> ImageBatch:
        return ImageBatch.objects.create(
            project=get_project(user_id=user_id, name=request.project),
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
    # First of all: a retry must not fail because its first time spent the balance or changed the text.
    replay = ledger.find_reservation(user_id=user_id, idempotency_key=idempotency_key, request=asked_for)
    if replay is not None:
        return _replayed(replay)
    _require_patience(user_id)
    quote = quote_operation(user_id=user_id, ask=request.ask(user_id))
    _require_shown_price(quote, request.shown_price)
    with transaction.atomic(durable=True):
        result = open_result()
        ask = dataclasses.replace(quote.ask, **_links(result))
        posting = metering.reserve_quote(
            dataclasses.replace(quote, ask=ask), idempotency_key=idempotency_key, request=asked_for
        )
        if posting.is_replay:
            transaction.set_rollback(True)
        elif not isinstance(result, ContentPiece):
            result.usage_id = posting.usage_id
            result.save(update_fields=["usage_id"])
    if posting.is_replay:
        return _replayed(posting)
    return Started(cast(int, posting.usage_id), result, quote.held_tokens), quote  # a reservation always has one


def _require_patience(user_id: int) -> None:
    # Each of them cost us more than it brought: providers think, and paint, on the way to what nobody waits for.
    come_to_nothing = Q(*(("error_message__contains", words) for words in metering.CAME_TO_NOTHING), _connector=Q.OR)
    left = TokenUsage.objects.filter(
        Q(error_message__in=metering.LEFT_EARLY) | come_to_nothing,
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


# --- Texts and their versions -----------------------------------------------------------------------------------------


def get_project(*, user_id: int, name: str) -> Project:
    """The user's project of that name; made if there is none."""
    workspace = Workspace.objects.filter(owner_id=user_id).earliest("id")
    return Project.objects.get_or_create(workspace=workspace, name=name)[0]


def get_piece(*, user_id: int, content_id: int, is_locked: bool = False) -> ContentPiece:
    """The author's piece, `is_locked` until the end of the transaction. Raises NotYours."""
    pieces = ContentPiece.objects.select_for_update() if is_locked else ContentPiece.objects
    piece = pieces.filter(pk=content_id, author_id=user_id).first()
    if piece is None:
        raise NotYours("There is no such piece. It may have been deleted.")
    return piece


def get_chat(*, user_id: int, chat_id: int) -> Chat:
    """Raises NotYours."""
    chat = Chat.objects.filter(pk=chat_id, author_id=user_id).first()
    if chat is None:
        raise NotYours("There is no such chat. It may have been deleted.")
    return chat


def newest_number(piece: ContentPiece) -> int:
    """The number of the piece's newest version, 0 when there is none."""
    return piece.versions.values_list("number", flat=True).first() or 0


@transaction.atomic
def save_edit(*, user_id: int, content_id: int, base_number: int, body: str) -> ContentPiece:
    """Keep what the author typed as the piece's next version. Raises NotYours, TextChanged."""
    piece = get_piece(user_id=user_id, content_id=content_id, is_locked=True)
    if body != piece.body:
        _require_newest(piece, base_number)
        _add_version(piece, body, Origin.EDIT)
    return piece


@transaction.atomic
def restore_version(*, user_id: int, content_id: int, number: int) -> ContentPiece:
    """Make an older version, or one that was kept aside, the piece's text again, as a new version."""
    piece = get_piece(user_id=user_id, content_id=content_id, is_locked=True)
    version = piece.versions.filter(number=number).first()
    if version is None:
        raise NotYours("There is no such version.")
    if version.body != piece.body:
        _add_version(piece, version.body, Origin.RESTORED, note=f"Version {number}")
    return piece


def _keep_new_piece(origin: str, note: str, piece: ContentPiece, usage_id: int, text: str, is_complete: bool) -> None:
    piece = ContentPiece.objects.select_for_update().get(pk=piece.pk)
    state = _state_of(text, is_complete)
    if text:
        _add_version(piece, text, origin, note=note, usage_id=usage_id, state=state)
    else:
        piece.state = state
        piece.save(update_fields=["state", "updated_at"])


def _keep_revision(
    piece: ContentPiece, base: str, text: str, is_complete: bool, origin: str, note: str, usage_id: int
) -> None:
    """A revision becomes the text, unless it is unfinished or its base was changed meanwhile: then it is kept aside."""
    piece = ContentPiece.objects.select_for_update().get(pk=piece.pk)
    if text:
        is_used = is_complete and piece.body == base
        _add_version(piece, text, origin, note=note, usage_id=usage_id, is_used=is_used)


def _add_version(
    piece: ContentPiece,
    body: str,
    origin: str,
    *,
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
        note=note,
        is_used=is_used,
        usage_id=usage_id,
    )
    if is_used:
        piece.body, piece.state = body, state
        piece.save(update_fields=["body", "state", "updated_at"])


def _require_newest(piece: ContentPiece, base_number: int) -> None:
    # What was kept aside has changed nothing of the text.
    if piece.versions.filter(is_used=True, number__gt=base_number).exists():
        raise TextChanged(
            "This text was changed in another window or by another operation. Press Save to see both; "
            "nothing you typed is lost."
        )


def _require_text(text: str) -> None:
    if not text.strip():
        raise NothingToDo("There is no text to work on yet.")


def _count_tokens(request: ChatRequest | RefinementRequest | SelectionRequest, text: str) -> int:
    return counting.count_tokens(text, provider=request.provider, model=request.model)


def _revision_tokens(request: ChatRequest | RefinementRequest | SelectionRequest, text: str) -> int:
    # Twice the text: "make it longer" asks for half as much again, and our count is not the provider's.
    return max(MIN_REVISION_TOKENS, 2 * _count_tokens(request, text))


def _least_revision_tokens(
    request: ChatRequest | RefinementRequest | SelectionRequest, text: str, length_percent: int = 100
) -> int:
    """A revision that ends earlier is kept aside and of no use: whoever cannot have all of it is told before."""
    return _count_tokens(request, text) * length_percent // 100


def _history(chat: Chat, request: ChatRequest) -> list[tuple[str, str]]:
    """The newest answered turns that fit, oldest first."""
    history: list[tuple[str, str]] = []
    tokens = 0
    price = catalogue.get_active_model(provider=request.provider, model=request.model)
    # A model that reads little gets less of what was said before, rather than nothing at all.
    left_tokens = price.max_input_tokens - _count_tokens(request, request.question) - CHAT_PROMPT_TOKENS
    most_tokens = min(CHAT_HISTORY_TOKENS, left_tokens)
    for turn in chat.turns.exclude(answer__regex=r"^\s*$").order_by("-id")[:100]:  # no provider takes a blank one
        tokens += _count_tokens(request, turn.question) + _count_tokens(request, turn.answer)
        if tokens > most_tokens:
            break
        history.append((turn.question, turn.answer))
    return history[::-1]


def _state_of(text: str, is_complete: bool) -> str:
    if not text:
        return ResultState.FAILED
    return ResultState.READY if is_complete else ResultState.CUT_SHORT


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
