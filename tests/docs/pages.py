"""The documentation as a program reads it: its pages, fenced blocks, commands, headings and links."""

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

PROJECT = Path(__file__).parents[2]
SHELLS = ("console", "bash", "sh", "shell")
FENCE = re.compile(r"^(?P<indent> *)```(?P<language>\w*)\n(?P<text>.*?)^(?P=indent)```$", re.MULTILINE | re.DOTALL)
INLINE_CODE = re.compile(r"(?<!`)`([^`\n]+)`(?!`)")
INLINE_COMMAND = re.compile(
    r"([A-Z_]+=\S* )*(make [a-z]|celery -|docker compose |stripe [a-z]+ |curl )|(\S+ )*(\S*/)?manage\.py [a-z]"
)
OPERATORS = ("|", "||", "&&", ";")


@dataclass(frozen=True, slots=True)
class Block:
    page: str
    line: int
    language: str
    text: str


@dataclass(frozen=True, slots=True)
class Command:
    """One command of a page: its words, and the variables set in front of them, as in `PORT=8100 make run`."""

    page: str
    line: int
    script: str  # the whole line that it stands in
    variables: tuple[str, ...]
    words: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.page}:{self.line}: {shlex.join(self.words)}"

    @property
    def program(self) -> str:
        return self.words[0].removeprefix(".venv/bin/")


@cache
def pages() -> dict[str, str]:
    """Path in the project → text."""
    files = [*sorted(PROJECT.glob("*.md")), *sorted((PROJECT / "docs").glob("**/*.md"))]
    return {str(file.relative_to(PROJECT)): file.read_text() for file in files}


def blocks(*languages: str) -> Iterator[Block]:
    for page, text in pages().items():
        for match in FENCE.finditer(text):
            if match["language"] in languages:
                yield Block(page, text[: match.start()].count("\n") + 2, match["language"], match["text"])


def without_blocks(text: str) -> str:
    """The text with its fenced blocks blanked out, line by line."""
    return FENCE.sub(lambda match: "\n" * match[0].count("\n"), text)


def commands() -> list[Command]:
    """Every command of the pages: those of shell blocks, and `make …`, `manage.py …` and a few others in the text."""
    found: list[Command] = []
    for block in blocks(*SHELLS):
        for offset, script in _scripts(block):
            found += _split(block.page, block.line + offset, script)
    for page, text in pages().items():
        for number, line in enumerate(without_blocks(text).splitlines(), 1):
            for code in INLINE_CODE.findall(line):
                if INLINE_COMMAND.match(code):
                    found += _split(page, number, code)
    return found


def _scripts(block: Block) -> Iterator[tuple[int, str]]:
    """The commands of a shell block with the number of their line; in a console those behind `$ `."""
    lines = block.text.splitlines()
    number = 0
    while number < len(lines):
        begins_at, line = number, lines[number].strip()
        number += 1
        if block.language == "console":
            if not line.startswith("$ "):
                continue
            line = line[2:]
        while number < len(lines) and (line.endswith("\\") or line.count("'") % 2):
            line = line.removesuffix("\\") + ("" if line.endswith("\\") else "\n") + lines[number]
            number += 1
        if line and not line.startswith("#"):
            yield begins_at, line


def _split(page: str, line: int, script: str) -> Iterator[Command]:
    """The commands of a line: those of a pipe and of a chain each for itself, without their redirections."""
    lexer = shlex.shlex(script, posix=True, punctuation_chars=True)
    lexer.whitespace_split = True
    words: list[str] = []
    is_target = False
    for word in [*lexer, ";"]:
        if word in OPERATORS:
            if words:
                count = next((i for i, word in enumerate(words) if not re.match(r"[A-Z_0-9]+=", word)), len(words))
                yield Command(page, line, script, tuple(words[:count]), tuple(words[count:]) or ("true",))
            words = []
        elif re.fullmatch(r"\d?[<>]+&?", word):
            is_target = True
        elif is_target:
            is_target = False
        else:
            words.append(word)


def anchors(text: str) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    found: dict[str, int] = {}
    for heading in re.findall(r"^#{1,6} (.+)$", without_blocks(text), re.MULTILINE):
        plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).lower()
        slug = re.sub(r"[^\w\- ]", "", plain).replace(" ", "-")
        count = found.get(slug, 0)
        found[slug] = count + 1
        if count:
            found[f"{slug}-{count}"] = 1
    return set(found)


def table_rows(page: str, heading: str) -> list[list[str]]:
    """The cells of the rows of the tables below a heading, up to the next heading of its rank or above."""
    rank, text = heading.count("#"), pages()[page]
    section = text.split(f"\n{heading}\n", 1)[1]
    section = re.split(rf"^#{{1,{rank}}} ", section, maxsplit=1, flags=re.MULTILINE)[0]
    rows = [line for line in section.splitlines() if line.startswith("|") and not re.match(r"\|[ :|-]+$", line)]
    return [[cell.strip() for cell in row.strip("|").split(" | ")] for row in rows]
