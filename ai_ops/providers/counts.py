"""What a provider says that a call used, and what is made of it: the one place where counts become fit for the books.

A provider may leave a count out, say null or nonsense, contradict itself or the text that it sent. None of that may
keep an operation from closing, make a finished text free, or charge for what cannot be. Pure: no database, no clock.
"""

from dataclasses import dataclass, fields, replace
from typing import Any

from billing.pricing import MAX_POOL_TOKENS, TokenPools

# No tokenizer makes so many times fewer tokens than we count: a number below that is of one piece of a stream, or a
# default. What was asked is judged more mildly, for a server may count less of it, as without our system prompt.
TIMES_TOO_FEW_WRITTEN = 8
TIMES_TOO_FEW_READ = 32


@dataclass(frozen=True, slots=True)
class Said:
    """What a provider said that a call has used so far, as it said it: nothing is checked yet, None is not said.

    Providers cut the same work differently: the two flags say how this one does.
    """

    input: Any = None
    tool_input: Any = None  # read besides the prompt, never counted in `input`
    cached_input: Any = None
    cache_write: Any = None
    cache_write_5m: Any = None  # parts of `cache_write`, by how long they are kept
    cache_write_1h: Any = None
    output: Any = None
    reasoning: Any = None
    total: Any = None  # of everything; settles whether the reasoning is in the output
    image_input: Any = None  # parts of `input` and `output`
    audio_input: Any = None
    text_output: Any = None
    audio_output: Any = None
    is_cache_in_input: bool = False
    is_reasoning_in_output: bool = True

    def updated(self, later: "Said") -> "Said":
        """With what the provider said `later`. Counts of a stream are running totals, which never fall: the highest
        stands, and neither silence nor nonsense takes back a number that was said before."""
        heard = {name: new for name in COUNTS if (new := getattr(later, name)) is not None}
        return replace(
            self,
            **{name: new for name, new in heard.items() if (_count(new) or 0) >= (_count(getattr(self, name)) or 0)},
        )

    @property
    def has_output(self) -> bool:
        return bool(_count(self.output))


COUNTS = tuple(field.name for field in fields(Said) if not field.name.startswith("is_"))


@dataclass(frozen=True, slots=True)
class Counted:
    """Pools that satisfy every constraint of the books. `is_estimated`: some of them are our own decision."""

    pools: TokenPools
    is_estimated: bool


def count_call(
    said: Said | None,
    *,
    prompt_tokens: int,
    text_tokens: int,
    later_text_tokens: int = 0,
    thought_tokens: int = 0,
    most_tokens: int = MAX_POOL_TOKENS,
) -> Counted:
    """What a call used, by the provider's word as far as it can be true and by our own count where it cannot.

    `prompt_tokens` and `text_tokens` are our own counts of what was asked and of all that was written,
    `later_text_tokens` of that part of it which came after the provider had last counted its output, `thought_tokens`
    of what it told of its thoughts, where it has not counted them: they are reasoning, and at least so much.

    - Each half stands for itself. A half that was not said, or is zero or next to nothing beside a text, is counted by
      us; one that was said is kept, also beside one that was not.
    - Reasoning is a part of the output, or comes on top, as the provider has it; where its total contradicts that and
      agrees with the other, as the total has it. More than there is of the whole is cut to it.
    - A number that no call can have (negative, broken, no number, above `most_tokens`) was not said.
    """
    said = said or Said()
    raw = {name: getattr(said, name) for name in COUNTS}
    number = {name: _count(value, most_tokens) or 0 for name, value in raw.items()}
    # The total is no count that we keep: it may be any nonsense.
    is_estimated = any(
        _count(value, most_tokens) is None for name, value in raw.items() if value is not None and name != "total"
    )

    cached = number["cached_input"]
    written = number["cache_write"] or number["cache_write_5m"] + number["cache_write_1h"]
    read = number["input"] + number["tool_input"]
    if said.is_cache_in_input:
        if not number["input"] or number["input"] * TIMES_TOO_FEW_READ < prompt_tokens:
            read, is_estimated = prompt_tokens, True
        is_estimated |= cached + written > read
        cached = min(cached, read)
        written = min(written, read - cached)
        read -= cached + written
    elif _count(said.input, most_tokens) is None or (read + cached + written) * TIMES_TOO_FEW_READ < max(
        1, prompt_tokens
    ):
        read, is_estimated = max(0, prompt_tokens - cached - written), True

    if number["output"] * TIMES_TOO_FEW_WRITTEN < text_tokens - later_text_tokens:
        number["output"] = 0
    output, reasoning = number["output"], max(number["reasoning"], thought_tokens)
    is_estimated |= reasoning > number["reasoning"]
    if not output:
        is_estimated |= bool(text_tokens or (reasoning and said.is_reasoning_in_output))
        output = text_tokens + reasoning
    elif _is_reasoning_on_top(said, number, text_tokens):
        output += reasoning
    if (later_text_tokens or thought_tokens) and number["output"]:
        # A count that came before the first word, as Anthropic's does, is of that word at most.
        begun = later_text_tokens == text_tokens
        ours = text_tokens + reasoning if begun else output + later_text_tokens
        is_estimated |= ours > output
        output = max(output, ours)
    is_estimated |= reasoning > output
    reasoning = min(reasoning, output)

    # Parts for the cost alone: they are cut to what there is, and change nothing of what is charged.
    words = min(number["text_output"], output - reasoning)
    image_input = min(number["image_input"], read)
    return Counted(
        TokenPools(
            input_tokens=read,
            cached_input_tokens=cached,
            cache_write_tokens=written,
            output_tokens=output,
            reasoning_tokens=reasoning,
            text_output_tokens=words,
            audio_output_tokens=min(number["audio_output"], output - reasoning - words),
            image_input_tokens=image_input,
            audio_input_tokens=min(number["audio_input"], read - image_input),
            cache_write_1h_tokens=min(number["cache_write_1h"], written),
        ),
        is_estimated,
    )


def _is_reasoning_on_top(said: Said, number: dict[str, int], text_tokens: int) -> bool:
    output, reasoning = number["output"], number["reasoning"]
    whole = number["input"] + number["tool_input"] + output
    if said.is_reasoning_in_output:
        return number["input"] > 0 and number["total"] == whole + reasoning
    # A total without the reasoning may mean that it is in the output, or that it was left out of the total. The text
    # tells: it is about as long as what the output is without its reasoning.
    is_inside = number["total"] == whole and reasoning <= output and 2 * text_tokens <= 2 * output - reasoning
    return not is_inside


def _count(value: Any, most: int = MAX_POOL_TOKENS) -> int | None:
    """`value` if it can be a count: a whole number (True is none) within bounds."""
    return value if type(value) is int and 0 <= value <= most else None
