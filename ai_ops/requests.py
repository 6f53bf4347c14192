"""What a person asks for in the Studio, and what the model is asked for it."""

from dataclasses import dataclass, field
from decimal import Decimal

from ai_ops import counting, prompts
from ai_ops.metering import Ask
from ai_ops.models import Chat, ContentPiece
from ai_ops.pieces import OperationError, TextChanged, get_chat, get_piece, require_in, require_newest
from ai_ops.providers import Message
from billing import catalogue
from billing.models import TokenUsage

Type = TokenUsage.OperationType

CHAT_ANSWER_TOKENS = 1_200
CHAT_HISTORY_TOKENS = 3_000  # of what was said before, so that the welcome bonus pays for a turn; the rest is left out
CHAT_PROMPT_TOKENS = 200  # what stands around the question and the history
CONTINUATION_TOKENS = 1_200
REPURPOSED_TOKENS = 1_200
IMAGE_PROMPT_TOKENS = 300
MIN_REVISION_TOKENS = 300


class NothingToDo(OperationError):
    """A text is needed and there is none."""

    http_status = 422


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
    team_id: int | None = field(default=None, kw_only=True)  # whose workspace it is for, and pays; None: one's own

    def ask(self, user_id: int) -> Ask:
        """What the model is asked. Reads, writes nothing; raises OperationError."""
        raise NotImplementedError

    def _get_piece(self, user_id: int, content_id: int) -> ContentPiece:
        piece = get_piece(user_id=user_id, content_id=content_id)
        require_in(piece.project.workspace, self.team_id)
        return piece


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
        piece = self._get_piece(user_id, self.content_id)
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
        if chat:
            require_in(chat.project.workspace, self.team_id)
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
        piece = self._get_piece(user_id, self.content_id)
        _require_text(self.body)
        require_newest(piece, self.base_number)
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
        piece = self._get_piece(user_id, self.content_id)
        _require_text(self.selection)
        require_newest(piece, self.base_number)
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
        piece = self._get_piece(user_id, self.content_id)
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
