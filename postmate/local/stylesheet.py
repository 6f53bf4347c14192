"""`make css`: Tabler's style sheet without the rules that no page of ours can use.

The whole one, vendor/tabler-…/tabler.min.css, has 635 kB and would hold up the first paint of every page. A rule
stays when each class of one of its selectors is a word somewhere in our templates, scripts or Python files; words, not
class attributes, so that a class which is put together from whole names in a condition or a script is found, too. One
that is glued together from parts (`btn-{{ size }}`) is not: write it out.
"""

import re
import sys
from collections.abc import Iterator
from pathlib import Path

PROJECT = Path(__file__).resolve().parents[2]
WHOLE = PROJECT / "vendor" / "tabler-1.6.1" / "tabler.min.css"
USED = PROJECT / "static" / "css" / "tabler.css"
OWN = PROJECT / "static" / "css" / "postmate.css"
# Whole folders: a file that was moved within them is read wherever it lies.
PAGES = ["templates/**/*.html", "templates/**/*.svg", "static/js/**/*.js"]
PAGES += [f"{folder}/**/*.py" for folder in ("accounts", "ai_ops", "billing", "kit")]

STRING = r'"(?:[^"\\]|\\.)*"|\'(?:[^\'\\]|\\.)*\''
COMMENT = re.compile(r"/\*.*?\*/", re.DOTALL)
PIECE = re.compile(rf"{STRING}|[^{{}};\"']+|[{{}};]")
CLASS = re.compile(r"\.(-?[A-Za-z_](?:[\w-]|\\.)*)")
CONDITIONS = ("@media", "@supports", "@layer", "@container")

Rule = tuple[str, "list[Rule] | str"]  # (selector, declarations), or (condition, rules)


def build() -> str:
    """The style sheet that the pages need, from the files as they are."""
    whole = WHOLE.read_text()
    licence = whole[whole.index("/*!") : whole.index("*/") + 2]
    words = _words()
    rules = list(_used_rules(_parse(COMMENT.sub("", whole)), words))
    rules = _without_unused_names(rules, words, OWN.read_text())
    head = "/* Made by `make css` from vendor/tabler-1.6.1/tabler.min.css: the rules that our pages use. */\n"
    return head + licence + "\n" + "\n".join(map(_text, rules)) + "\n"


def _words() -> set[str]:
    words: set[str] = set()
    for pattern in PAGES:
        for path in PROJECT.glob(pattern):
            words.update(re.findall(r"[\w-]+", path.read_text()))
    return words


def _parse(css: str) -> list[Rule]:
    """Rules in their order. Tabler nests nothing but rules in conditions."""
    css = re.sub(r"@charset[^;]*;", "", css)
    rules: list[Rule] = []
    open_blocks: list[tuple[str, list[Rule]]] = [("", rules)]
    text = ""
    for piece in PIECE.findall(css):
        if piece == "{" and text.strip().startswith(CONDITIONS):
            open_blocks.append((text.strip(), []))
            text = ""
        elif piece == "{" and text.strip().startswith("@keyframes"):
            text += piece
        elif piece == "}" and "{" not in text and not text.strip():
            condition, inner = open_blocks.pop()
            open_blocks[-1][1].append((condition, inner))
        elif piece == "}" and text.count("{") > text.count("}") + 1:
            text += piece  # a step of keyframes
        elif piece == "}":
            selector, _, declarations = text.partition("{")
            open_blocks[-1][1].append((selector.strip(), declarations))
            text = ""
        else:
            text += piece
    if len(open_blocks) != 1 or text.strip():
        raise ValueError("The style sheet ends in the middle of a block.")
    return rules


def _used_rules(rules: list[Rule], words: set[str]) -> Iterator[Rule]:
    for head, content in rules:
        if not isinstance(content, str):
            if inner := list(_used_rules(content, words)):
                yield head, inner
        elif head.startswith("@"):
            yield head, content
        elif selectors := [one for one in _split(head, ",") if _needed_classes(one) <= words]:
            yield ",".join(selectors), content


def _needed_classes(selector: str) -> set[str]:
    """The classes without which it matches nothing; those in :not(), :is() … are no condition, or one of several."""
    depth, plain = 0, ""
    for character in selector:
        depth += (character in "([") - (character in ")]")
        plain += character if depth == 0 else " "
    return {name.replace("\\", "") for name in CLASS.findall(plain)}


def _split(text: str, separator: str) -> list[str]:
    """Split where no bracket or string is open."""
    parts, depth = [""], 0
    for piece in re.findall(rf"{STRING}|.", text, re.DOTALL):
        depth += (piece in "([") - (piece in ")]")
        if piece == separator and depth == 0:
            parts.append("")
        else:
            parts[-1] += piece
    return [part.strip() for part in parts if part.strip()]


def _without_unused_names(rules: list[Rule], words: set[str], own: str) -> list[Rule]:
    """Leave out custom properties and animations that nothing names any more, until there are none."""
    while True:
        text = own + "\n".join(map(_text, rules))
        properties = words.union(re.findall(r"var\(\s*(--[\w-]+)", text))
        animated = set(re.findall(r"[\w-]+", " ".join(re.findall(r"animation(?:-name)?\s*:([^;}]*)", text))))
        kept = list(_named_rules(rules, properties, animated))
        if kept == rules:
            return kept
        rules = kept


def _named_rules(rules: list[Rule], properties: set[str], animated: set[str]) -> Iterator[Rule]:
    for head, content in rules:
        kind, _, name = head.partition(" ")
        if not isinstance(content, str):
            if inner := list(_named_rules(content, properties, animated)):
                yield head, inner
        elif kind == "@keyframes":
            if name in animated:
                yield head, content
        elif kind == "@property":
            if name in properties:
                yield head, content
        else:
            declarations = [
                one
                for one in _split(content, ";")
                if not one.startswith("--") or one.partition(":")[0].strip() in properties
            ]
            if declarations:
                yield head, ";".join(declarations)


def _text(rule: Rule) -> str:
    head, content = rule
    inner = content if isinstance(content, str) else "".join(map(_text, content))
    return f"{head}{{{inner}}}"


def main() -> None:
    css = build()
    USED.write_text(css)
    sys.stdout.write(f"{USED.relative_to(PROJECT)}: {len(css):,} of {WHOLE.stat().st_size:,} bytes\n")


if __name__ == "__main__":
    main()
