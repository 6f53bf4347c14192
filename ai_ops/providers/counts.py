"""What a provider says that a call used, and what is made of it: the one place where counts become fit for the books.

A provider may leave a count out, say null or nonsense, contradict itself or the text that it sent. None of that may
keep an operation from closing, make a finished text free, or charge for what cannot be. Pure: no database, no clock.
"""

from dataclasses import dataclass, fields, replace
from typing import Any

from billing.pricing import MAX_POOL_TOKENS, TokenPools

# No tokenizer makes so many times fewer tokens than we count: a number below that is of one piece of a stream, or a
# default. What was asked is judged more mildly, for a server may count less of it, as without our system prompt.
TIMES_TOO_FEW_WRITTEN = 3
TIMES_TOO_FEW_READ = 32
# Nor so many times more; of what was asked, a server may read much that we do not know of, as instructions of its own.
TIMES_TOO_MANY_WRITTEN = 2
TIMES_TOO_MANY_READ = 32
UNKNOWN_READ_TOKENS = 16_384
MOST_IMAGE_TOKENS = 32_768  # an image, with all that is thought and said about it


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
        """With what the provider said `later`, which replaces an estimate of before.

        Pools of what was read that exclude one another are replaced together, zeros and all, for those of two
        statements do not add up; a statement without a word on the cache, where an earlier one had, replaces
        nothing. Else neither silence, zero nor nonsense takes back a number.
        """
        return replace(
            self, **self._half(later, READ, is_whole=not self.is_cache_in_input), **self._half(later, WRITTEN)
        )

    def _half(self, later: "Said", names: tuple[str, ...], *, is_whole: bool = False) -> dict[str, Any]:
        heard = {name: new for name in names if (new := getattr(later, name)) is not None}
        known = {name for name in names if _count(getattr(self, name))}
        says_something = any(_count(new) for new in heard.values()) and _count(heard.get(names[0])) is not None
        is_silent = is_whole and not known.isdisjoint(CACHES) and heard.keys().isdisjoint(CACHES)
        if says_something and not is_silent:
            zero = 0 if is_whole else 1
            return {n: new for n, new in heard.items() if n not in known or (_count(new) or -zero) >= zero}
        return {name: new for name, new in heard.items() if name not in known}

    @property
    def has_output(self) -> bool:
        return bool(_count(self.output))

    def is_below(self, earlier: "Said | None") -> bool:
        """Whether this counts less output than was counted `earlier`."""
        return earlier is not None and (_count(self.output) or 0) < (_count(earlier.output) or 0)


COUNTS = tuple(field.name for field in fields(Said) if not field.name.startswith("is_"))
CACHES = ("cached_input", "cache_write", "cache_write_5m", "cache_write_1h")
READ = ("input", "tool_input", *CACHES, "image_input", "audio_input")
WRITTEN = ("output", "reasoning", "text_output", "audio_output", "total")


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
    most_read_tokens: int = MAX_POOL_TOKENS,
    most_written_tokens: int = MAX_POOL_TOKENS,
) -> Counted:
    """What a call used, by the provider's word as far as it can be true and by our own count where it cannot.

    `prompt_tokens` and `text_tokens` are our own counts of what was asked and of all that was written,
    `later_text_tokens` of that part of it which came after the provider had last counted its output, `thought_tokens`
    of what it told of its thoughts, where it has not counted them: they are reasoning, and at least so much.
    `most_read_tokens` is what the model reads at once, `most_written_tokens` the limit that was sent with the call.

    - Each half stands for itself. A half that was not said, or is zero or next to nothing beside a text, is counted by
      us; one that was said is kept, also beside one that was not.
    - Reasoning is a part of the output, or comes on top, as the provider has it; where its total contradicts that and
      agrees with the other, as the total has it. More than there is of the whole is cut to it.
    - A number that no call can have (negative, broken, no number, above its limit and far above our own count) was not
      said.
    """
    said = said or Said()
    raw = {name: getattr(said, name) for name in COUNTS}
    unknown = TIMES_TOO_MANY_READ * prompt_tokens + UNKNOWN_READ_TOKENS
    most_read = max(TIMES_TOO_MANY_WRITTEN * prompt_tokens, min(most_read_tokens, unknown))
    most_written = TIMES_TOO_MANY_WRITTEN * (text_tokens + thought_tokens) + most_written_tokens
    most = dict.fromkeys(READ, most_read) | dict.fromkeys(WRITTEN, most_written) | {"total": MAX_POOL_TOKENS}
    number = {name: _count(value, most[name]) or 0 for name, value in raw.items()}
    # The total is no count that we keep: it may be any nonsense.
    is_estimated = any(
        _count(value, most[name]) is None for name, value in raw.items() if value is not None and name != "total"
    )
    if not said.is_cache_in_input and sum(number[name] for name in READ[:4]) > most_read:
        number |= dict.fromkeys(READ, 0)

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
    elif _count(said.input, most_read) is None or (read + cached + written) * TIMES_TOO_FEW_READ < max(
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
    is_estimated |= reasoning > output or output > most_written
    output = min(output, most_written)
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
