# ruff: noqa: T201 – a table for people; ctok shows what is needed here nowhere else
"""Our count of tokens and what a quote makes of it, against every tokenizer whose vocabulary a package carries.

`make bench-tokens` runs this outside of the project's environment, where those packages are; none is in our locks. It
needs Python 3.12 and npm. With `--write` it first makes `ai_ops/token_costs.xz` and `tests/ai_ops/true_counts.json`
anew (ten minutes): what each token of OpenAI's vocabulary is in the others', alone and inside a longer word.

Anthropic's: ctok, which was measured against its own counts. Google's: the vocabularies of Gemini and of Gemma 3, the
larger count of the two.
"""

import json
import lzma
import sys
from collections.abc import Callable, Iterable, Iterator
from functools import cache
from multiprocessing import Pool
from pathlib import Path
from typing import Any

import ctok
from bpe_openai import get_encoding
from ctok import constants, engine, main
from tokenizers import Tokenizer

from ai_ops import counting
from tests.tokens.texts import TEXTS

QUOTE_MARGIN = 1.14  # that of `ai_ops.metering`, which needs all of Django; tests hold the table to the real one
NODE_MODULES = Path("artifacts/tokenizers/node_modules/@lenml")
COUNTS_FILE = Path("tests/ai_ops/true_counts.json")
FRAME_TOKENS = 6  # that ctok adds around a message

MODELS = {
    "gpt": ("openai", "gpt-6-luna"),
    "claude": ("anthropic", "claude-opus-4-20250514"),
    "claude-4.7": ("anthropic", "claude-haiku-5-5"),
    "gemini": ("google", "gemini-3.8-flash"),
}
# What stands before and after a token: nothing that touches it, or more of the same word in small letters or capitals.
SPACED = ("\nq", " q")
GLUED = ("q", "QQQ")

_normalize = sys.modules["ctok.normalize"]  # the package has a function of the same name
_ordinary = get_encoding(counting.ENCODING)


@cache
def _google() -> tuple[Any, ...]:
    return tuple(
        Tokenizer.from_file(str(NODE_MODULES / f"tokenizer-{name}/models/tokenizer.json"))
        for name in ("gemini", "gemma3")
    )


def true_count(text: str, tokenizer: str) -> int:
    """How many tokens the text is, without what a request has around it."""
    if tokenizer == "gpt":
        return len(_ordinary.encode_ordinary(text))
    if tokenizer == "gemini":
        return max(len(each.encode(text, add_special_tokens=False).ids) for each in _google())
    return int(ctok.token_count(text, "3.0" if tokenizer == "claude" else "4.8")) - FRAME_TOKENS


# --- The table of costs -----------------------------------------------------------------------------------------------


def _texts_of_tokens() -> Iterator[str | bytes]:
    """The text of each token by its number, its bytes where it is a part of a character."""
    for number in range(_ordinary.max_token_value + 1):
        try:
            data = _ordinary.decode_single_token_bytes(number)
        except (KeyError, ValueError):
            data = b""
        try:
            yield data.decode() or data
        except UnicodeDecodeError:
            yield data


def _is_letter(character: str) -> bool:
    return bool(_normalize.classify(character) == constants.WORDY or _normalize._is_upper(character))


def _is_sign(character: str) -> bool:
    return bool(_normalize.classify(character) == constants.PUNCT or _normalize._marks_like_punct(character))


def _edges(text: str | bytes) -> int:
    if isinstance(text, bytes):
        return counting.TAKES_SPACE
    first, last = text[0], text[-1]
    return (
        counting.BEGINS_WITH_LETTER * _is_letter(first)
        | counting.ENDS_WITH_LETTER * _is_letter(last)
        | counting.BEGINS_WITH_SIGN * _is_sign(first)
        | counting.ENDS_WITH_SIGN * _is_sign(last)
        | counting.BEGINS_WITH_SPACE * (first == " ")
        | counting.TAKES_SPACE * (_is_letter(last) or _is_sign(last) or last == " ")
    )


def _claude_costs(family: str, text: str | bytes) -> tuple[int, int]:
    """What the token costs at most alone, and inside a longer word: Claude's marks of words and capitals differ."""
    if isinstance(text, bytes):
        return len(text), len(text)
    edges = _edges(text)
    before = "a" if text[0] == " " else "a\n"
    alone = {_stream(family, before, text, after) for after in SPACED}
    inside = {
        _stream(family, left, text, right)
        for left in (before, *(GLUED if edges & counting.BEGINS_WITH_LETTER else ()))
        for right in (*SPACED, *(GLUED if edges & counting.ENDS_WITH_LETTER else ()))
    }
    least = max(1, *(_cost(family, stream) for stream in alone))
    return least, max(least, *(_cost(family, stream) for stream in inside))


def _stream(family: str, before: str, text: str, after: str) -> str:
    """The text between the two as Claude's tokenizer sees it."""
    model = main._model(family)
    normal = _normalize.nfc(before + text + after, fold_quotes=model.fold_quotes)
    stream = _normalize.stream_norm(normal.translate(constants.LITERAL_MARKER_ESCAPE_TABLE), model)
    start = stream.find("\n") + 1 if before == "a\n" else stream.lower().find(before.lower()) + len(before)
    stream = stream[start:]
    if before == "a":
        stream = stream.removeprefix(constants.EOW_G)
    stream = stream[: stream.lower().rfind("\n" if after == "\nq" else after.strip().lower())]
    return stream.removesuffix(constants.BOW_G).removesuffix(" ") if after == " q" else stream


def _cost(family: str, stream: str) -> int:
    model = main._model(family)

    def of_character(place: int) -> int:
        is_mark = stream[place] in constants.MARKER_GLYPHS
        return 1 if is_mark else int(engine.char_cost(model, stream[place]))

    return int(engine.min_vocab_tile(stream, model.trie, of_character)[0])


def _claude_part(job: tuple[str, list[str | bytes]]) -> list[tuple[int, int]]:
    family, texts = job
    return [_claude_costs(family, text) for text in texts]


def _google_costs(texts: list[str | bytes]) -> list[tuple[int, int]]:
    words = [text if isinstance(text, str) else "" for text in texts]
    alone, inside = [1] * len(texts), [1] * len(texts)
    for tokenizer in _google():

        def counts(change: Callable[[str], str], tokenizer: Any = tokenizer) -> list[int]:
            return [
                len(each.ids)
                for start in range(0, len(words), 5_000)
                for each in tokenizer.encode_batch(
                    [change(word) for word in words[start : start + 5_000]], add_special_tokens=False
                )
            ]

        alone = list(map(max, alone, counts(str)))
        inside = list(map(max, inside, (-(-count // 8) for count in counts(lambda word: word * 8))))
        for letter in "aensT":
            inside = list(map(max, inside, (count - 1 for count in counts(lambda word, x=letter: x + word))))  # type: ignore[misc]
            inside = list(map(max, inside, (count - 1 for count in counts(lambda word, x=letter: word + x))))  # type: ignore[misc]
    return [
        (len(text), len(text)) if isinstance(text, bytes) else (least, max(least, most))
        for text, least, most in zip(texts, alone, inside, strict=True)
    ]


def write() -> None:
    texts = list(_texts_of_tokens())
    columns = [bytes(map(_edges, texts))]
    parts = [texts[start : start + 5_000] for start in range(0, len(texts), 5_000)]
    families: list[list[tuple[int, int]]] = []
    with Pool() as pool:
        for family in ("v3", "v4.7"):
            families.append(
                [pair for part in pool.map(_claude_part, [(family, each) for each in parts]) for pair in part]
            )
    for pairs in (*families, _google_costs(texts)):
        columns += [_column(least for least, _ in pairs), _column(most for _, most in pairs)]
    counting.COSTS_FILE.write_bytes(lzma.compress(b"".join(columns), preset=9 | lzma.PRESET_EXTREME))
    lines = (
        f"  {json.dumps(name, ensure_ascii=False)}: "
        + json.dumps({tokenizer: true_count(text, tokenizer) for tokenizer in MODELS})
        for name, text in TEXTS.items()
    )
    COUNTS_FILE.write_text("{\n" + ",\n".join(lines) + "\n}\n")


def _column(costs: Iterable[int]) -> bytes:
    return bytes(min(cost, 255) for cost in costs)


# --- The table of texts -----------------------------------------------------------------------------------------------


def report() -> None:
    """True tokens ÷ quoted tokens: 1.00 and less is covered. Before it the true count, then our count ÷ true."""
    print(f"{'':26}" + "".join(f"{tokenizer:>24}" for tokenizer in MODELS))
    print(f"{'':26}" + f"{'true':>8}{'ours':>8}{'÷ quote':>8}" * len(MODELS))
    highest = dict.fromkeys(MODELS, 0.0)
    for name, text in TEXTS.items():
        cells = ""
        for tokenizer, (provider, model) in MODELS.items():
            true, ours = true_count(text, tokenizer), counting.count_tokens(text, provider=provider, model=model)
            share = true / (ours * QUOTE_MARGIN)
            highest[tokenizer] = max(highest[tokenizer], share)
            cells += f"{true:8,}{ours / true:8.2f}{share:8.2f}"
        print(f"{name:26}{cells}")
    print(f"{'highest':26}" + "".join(f"{share:24.2f}" for share in highest.values()))
    others = {name: get_encoding(name) for name in ("cl100k_base", "voyage3_base")}
    others_line = ", ".join(
        f"{name} {sum(len(each.encode_ordinary(text)) for text in TEXTS.values()):,}" for name, each in others.items()
    )
    print(f"All texts in other vocabularies, which no model on offer has: {others_line}")


if __name__ == "__main__":
    if "--write" in sys.argv:
        write()
    report()
