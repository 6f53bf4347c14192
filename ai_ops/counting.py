"""How many tokens a text is, counted here: for quotes, and for what a provider did not count.

OpenAI's tokenizer comes with its vocabulary in a package. Anthropic and Google publish none, so a text is taken apart
by OpenAI's, and each of its tokens counts as what the other tokenizer makes of the same characters: alone, or inside
a longer word, which takes more. `token_costs.xz` holds these counts; `make bench-tokens` makes them anew and prints how
they fare. They are upper bounds of what both say about the pieces, so the whole is rarely below the truth, and a quote
adds a margin.
"""

import lzma
import re
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from bpe_openai import Encoding

ENCODING = "o200k_base"
COSTS_FILE = Path(__file__).with_name("token_costs.xz")

# What a token of ENCODING begins and ends with: the first column of COSTS_FILE.
BEGINS_WITH_LETTER, ENDS_WITH_LETTER = 1, 2
BEGINS_WITH_SIGN, ENDS_WITH_SIGN = 4, 8
BEGINS_WITH_SPACE = 16
TAKES_SPACE = 32  # a space after it is no token of its own

FAMILIES = ("claude", "claude-4.7", "gemini")
_CLAUDE = re.compile(r"claude-(?:[a-z]+-)?(\d{1,2})(?:[-.](\d{1,2}))?(?!\d)")


@dataclass(frozen=True, slots=True)
class _Costs:
    """By the number of a token of ENCODING."""

    edges: bytes
    alone: bytes
    inside: bytes


def count_tokens(text: str, *, provider: str, model: str) -> int:
    """About how many tokens of the model `text` is; rather too many than too few. A millisecond for 20,000 characters.

    What is around a text in a request is not counted.
    """
    tokens = _encoding().encode_ordinary(text.encode(errors="replace").decode())
    family = _family(provider, model)
    if family is None:
        return len(tokens)
    costs = _costs()[family]
    edges, alone, inside = costs.edges, costs.alone, costs.inside
    total, was_glued = 0, False
    for token, following in pairwise([*tokens, 0]):
        end, begin = edges[token], edges[following]
        is_glued = bool(
            (end & ENDS_WITH_LETTER and begin & BEGINS_WITH_LETTER)
            or (end & ENDS_WITH_SIGN and begin & BEGINS_WITH_SIGN)
        )
        total += inside[token] if is_glued or was_glued else alone[token]
        total += begin & BEGINS_WITH_SPACE and not end & TAKES_SPACE
        was_glued = is_glued
    return total


def load() -> None:
    """Read the vocabularies now (a second, 150 MB), so that nobody waits for it."""
    _encoding()
    _costs()


def _family(provider: str, model: str) -> str | None:
    """Whose tokenizer the model has: one of FAMILIES, None for OpenAI's."""
    if provider == "openai":
        return None
    if provider == "google":
        return "gemini"
    version = _CLAUDE.match(model)
    is_older = version is not None and (int(version[1]), int(version[2] or 0)) < (4, 7)
    return "claude" if is_older else "claude-4.7"


@cache
def _encoding() -> "Encoding":
    # As the package is imported it reads all vocabularies that it has: what does not count shall not wait for that.
    from bpe_openai import get_encoding

    return get_encoding(ENCODING)


@cache
def _costs() -> dict[str, _Costs]:
    data = lzma.decompress(COSTS_FILE.read_bytes())
    size = len(data) // (1 + 2 * len(FAMILIES))
    edges, *columns = (data[start : start + size] for start in range(0, len(data), size))
    return {family: _Costs(edges, *columns[2 * place : 2 * place + 2]) for place, family in enumerate(FAMILIES)}
