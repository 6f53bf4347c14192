"""What the models are asked. One function per operation; nothing here knows about providers or prices."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ai_ops.providers import Message

TONES: Mapping[str, str] = {
    "neutral": "Neutral",
    "friendly": "Friendly",
    "professional": "Professional",
    "playful": "Playful",
}


@dataclass(frozen=True, slots=True)
class Length:
    label: str
    words: int
    output_limit_tokens: int


LENGTHS: Mapping[str, Length] = {
    "short": Length("Short, about 150 words", 150, 700),
    "medium": Length("Medium, about 300 words", 300, 1_200),
    "long": Length("Long, about 700 words", 700, 2_400),
}


@dataclass(frozen=True, slots=True)
class Choice:
    """What a person picks, and what the model is told about it."""

    label: str
    instruction: str
    length_percent: int = 100  # how long a revision becomes, relative to the text before


REFINEMENTS: Mapping[str, Choice] = {
    "improve": Choice("Improve the writing", "Improve clarity, rhythm and choice of words. Keep the meaning."),
    "shorten": Choice("Make it shorter", "Make it about half as long. Keep what matters.", 50),
    "expand": Choice("Make it longer", "Expand it with details and examples, by about half.", 150),
    "proofread": Choice("Correct mistakes only", "Correct spelling, grammar and punctuation. Change nothing else."),
    "simplify": Choice("Use simpler words", "Use short sentences and everyday words."),
    "formal": Choice("Make it more formal", "Make the tone more formal."),
    "friendly": Choice("Make it friendlier", "Make the tone warmer and friendlier."),
}

TRANSFORMATIONS: Mapping[str, Choice] = {
    "newsletter": Choice("Newsletter", "an e-mail newsletter with a subject line, a short greeting and one link text"),
    "linkedin": Choice("LinkedIn post", "a LinkedIn post of at most 200 words that opens with a strong first line"),
    "thread": Choice("Thread of short posts", "a numbered thread of five to eight posts of at most 270 characters"),
    "summary": Choice("Summary", "a summary of at most 120 words"),
    "press": Choice("Press release", "a press release with a headline, a lead and a quotation to be approved"),
    "script": Choice("Video script", "a script for a video of about one minute, with scenes and spoken text"),
    "faq": Choice("Questions and answers", "five to eight questions with short answers"),
}

IMAGE_STYLES: Mapping[str, Choice] = {
    "": Choice("No particular style", ""),
    "photo": Choice("Photograph", "A photograph, natural light, realistic."),
    "illustration": Choice("Illustration", "A flat editorial illustration with clear shapes."),
    "watercolour": Choice("Watercolour", "A watercolour painting on textured paper."),
    "line": Choice("Line drawing", "A fine black line drawing on white."),
    "3d": Choice("3D render", "A soft three-dimensional render with studio lighting."),
}


@dataclass(frozen=True, slots=True)
class Prompt:
    system: str
    messages: tuple[Message, ...]

    @property
    def text(self) -> str:
        """All that the model reads, to count it."""
        return "\n".join((self.system, *(message.text for message in self.messages)))

    def continued(self, written: str) -> "Prompt":
        """The same, once `written` has been answered and more of it is wanted."""
        return Prompt(
            self.system,
            (
                *self.messages,
                Message("assistant", written),
                Message("user", "Continue exactly where your answer stopped. Repeat nothing."),
            ),
        )


def draft_prompt(*, title: str, topic: str, tone: str, length: str) -> Prompt:
    return Prompt(
        system=(
            "You write drafts for a content platform. Answer with the draft alone, in plain Markdown, without a "
            f"preface. Tone: {TONES[tone].lower()}. Length: about {LENGTHS[length].words} words."
        ),
        messages=(Message("user", f"Title: {title}\n\nWhat it is about:\n{topic}"),),
    )


def continuation_prompt(*, title: str, topic: str, written: str) -> Prompt:
    return Prompt(
        system="You write texts for a content platform, in plain Markdown. Answer with the text alone.",
        messages=(Message("user", f"Title: {title}\n\nWhat it is about:\n{topic}"),),
    ).continued(written)


def chat_prompt(*, history: Sequence[tuple[str, str]], question: str) -> Prompt:
    """`history` is the earlier questions with their answers, oldest first."""
    turns: list[Message] = []
    for asked, answered in history:
        turns += [Message("user", asked), Message("assistant", answered)]
    return Prompt(
        system=(
            "You help people who write for a living, in a conversation. Be brief and concrete. "
            "Say so when you do not know something."
        ),
        messages=(*turns, Message("user", question)),
    )


def refinement_prompt(*, text: str, refinement: str, wishes: str) -> Prompt:
    return Prompt(
        system=(
            "You revise texts for a content platform. Keep the language and the Markdown of the text. "
            "Answer with the revised text alone."
        ),
        messages=(Message("user", f"{_instruction(refinement, wishes)}\n\n<text>\n{text}\n</text>"),),
    )


def selection_prompt(*, before: str, selection: str, after: str, instruction: str) -> Prompt:
    return Prompt(
        system=(
            "You revise one passage of a text: the part between <selection> and </selection>. It must fit what "
            "stands around it. Answer with the revised text alone, that is the passage without the marks."
        ),
        messages=(
            Message("user", f"{instruction}\n\n<text>\n{before}<selection>{selection}</selection>{after}\n</text>"),
        ),
    )


def repurpose_prompt(*, title: str, text: str, transformation: str, wishes: str) -> Prompt:
    wish = f"\n{wishes}" if wishes else ""
    return Prompt(
        system=(
            "You turn texts into other formats for a content platform. Keep the facts and the language; invent "
            "nothing. Answer with the result alone, in plain Markdown."
        ),
        messages=(
            Message(
                "user",
                f"Turn this text into {TRANSFORMATIONS[transformation].instruction}.{wish}\n\n"
                f"Title: {title}\n\n<text>\n{text}\n</text>",
            ),
        ),
    )


def image_prompt_prompt(*, idea: str, style: str) -> Prompt:
    wish = f"\n\nStyle: {IMAGE_STYLES[style].instruction}" if style else ""
    return Prompt(
        system=(
            "You write an image prompt for a model that makes images: one paragraph of at most 90 words that names "
            "the subject, composition, light, colours and mood. Answer with the paragraph alone."
        ),
        messages=(Message("user", f"{idea}{wish}"),),
    )


def image_text(*, prompt: str, style: str) -> str:
    """What a model that makes images is asked."""
    return f"{prompt}\n\n{IMAGE_STYLES[style].instruction}" if style else prompt


def _instruction(refinement: str, wishes: str) -> str:
    return f"{REFINEMENTS[refinement].instruction} {wishes}".strip()
