"""How many tokens a text is, counted here: for quotes, and for what a provider did not count.

OpenAI's tokenizer comes with its vocabulary in a package. Anthropic and Google publish none, so a text is taken apart
by OpenAI's, and each of its tokens counts as what the other tokenizer makes of the same characters: alone, or inside
a longer word, which takes more. `token_costs.xz` holds these counts; `make bench-tokens` makes them anew and prints how
they fare. They are upper bounds of what both say about the pieces, so the whole is rarely below the truth, and a quote
adds a margin.

OpenAI's vocabulary knows some scripts by their bytes alone, and such sums come to several times the truth. In these
words are counted by the very pieces of Gemma, whose vocabulary Gemini's is: `gemini_pieces.xz` has them by their rank.
"""

import lzma
import re
import unicodedata
from dataclasses import dataclass
from functools import cache, lru_cache
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from bpe_openai import Encoding

ENCODING = "o200k_base"
COSTS_FILE = Path(__file__).with_name("token_costs.xz")

PIECES_FILE = COSTS_FILE.with_name("gemini_pieces.xz")
# Hangul's conjoining letters, Indic scripts from Bengali to Sinhala, Lao, Tibetan, Burmese, Georgian, Ethiopic, Khmer.
PIECED = "\u1100-\u11ff\u0980-\u0dff\u0e80-\u0fff\u1000-\u10ff\u1200-\u139f\u1780-\u17ff"
LONGEST_WORD = 64  # of them: pieces are joined in a time that grows with the square
_WORD = re.compile(f"( ?[{PIECED}]{{1,{LONGEST_WORD}}})")

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
    text = text.encode(errors="replace").decode()
    family = _family(provider, model)
    if family is None:
        return len(_encoding().encode_ordinary(text))
    if family != "gemini":
        return _sum_costs(unicodedata.normalize("NFC", text), family)  # as Anthropic's tokenizer does
    rest, words = _WORD.split(text)[::2], _WORD.findall(text)
    return sum(map(_count_rest, rest)) + sum(map(_count_pieces, words))


def _count_rest(text: str) -> int:
    return _count_signs(text) if len(text) < 4 else _sum_costs(text, "gemini")


@lru_cache(maxsize=4_096)
def _count_signs(text: str) -> int:
    """What stands between two words that are counted by their pieces: always the same few."""
    return _sum_costs(text, "gemini")


@lru_cache(maxsize=4_096)
def _count_pieces(word: str) -> int:
    """As a tokenizer of this kind does: of all neighbours that make a piece, those of the lowest rank are joined."""
    ranks = _pieces()
    parts = list(word.replace(" ", "▁"))
    while len(parts) > 1:
        joined = [ranks.get(left + right, len(ranks)) for left, right in pairwise(parts)]
        rank = min(joined)
        if rank == len(ranks):
            break
        place = joined.index(rank)
        parts[place : place + 2] = [parts[place] + parts[place + 1]]
    return sum(1 if part in ranks or part == "▁" else len(part.encode()) for part in parts)


def _sum_costs(text: str, family: str) -> int:
    tokens = _encoding().encode_ordinary(text)
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
    _pieces()


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


@cache
def _pieces() -> dict[str, int]:
    pieces = lzma.decompress(PIECES_FILE.read_bytes()).decode().split("\n")
    return {piece: rank for rank, piece in enumerate(pieces)}
