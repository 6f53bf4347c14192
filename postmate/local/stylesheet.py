"""`make css`: Tabler's style sheet without the rules that no page of ours can use.

The whole one, vendor/tabler-…/tabler.min.css, has 635 kB and would hold up the first paint of every page, on a slow
phone by 0.4 s of 1.2 (`python -m tests.benchmarks.first_paint`). A rule
stays when each class of one of its selectors is a word somewhere in our templates, scripts or Python files; words, not
class attributes, so that a class which is put together from whole names in a condition or a script is found, too. One
that is glued together from parts (`btn-{{ size }}`) is not: write it out.
"""

import re
import sys
from collections.abc import Iterable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

from tinycss2 import parse_blocks_contents, parse_rule_list, parse_stylesheet, serialize

PROJECT = Path(__file__).resolve().parents[2]
WHOLE = PROJECT / "vendor" / "tabler-1.6.1" / "tabler.min.css"
USED = PROJECT / "static" / "css" / "tabler.css"
OWN = PROJECT / "static" / "css" / "postmate.css"
# Whole folders: a file that was moved within them is read wherever it lies.
PAGES = ["templates/**/*.html", "templates/**/*.svg", "static/js/**/*.js"]
PAGES += [f"{folder}/**/*.py" for folder in ("accounts", "ai_ops", "billing", "kit")]

CONDITIONS = ("media", "supports", "layer", "container")

# (selector or condition, what is in it: rules, (name, declaration)s, or the steps of an animation)
Rule = tuple[str, Any]


def build() -> str:
    """The style sheet that the pages need, from the files as they are."""
    whole = WHOLE.read_text()
    licence = whole[whole.index("/*!") : whole.index("*/") + 2]
    words = _words()
    rules = list(_used_rules(parse_stylesheet(whole, skip_comments=True, skip_whitespace=True), words))
    rules = _without_unused_names(rules, words, OWN.read_text())
    head = "/* Made by `make css` from vendor/tabler-1.6.1/tabler.min.css: the rules that our pages use. */\n"
    return head + licence + "\n" + "\n".join(map(_text, rules)) + "\n"


def _words() -> set[str]:
    words: set[str] = set()
    for pattern in PAGES:
        for path in PROJECT.glob(pattern):
            words.update(re.findall(r"[\w-]+", path.read_text()))
    return words


def _used_rules(nodes: Iterable[Any], words: set[str]) -> Iterator[Rule]:
    for node in nodes:
        if node.type == "error":
            raise ValueError(f"The style sheet cannot be read: {node.message}")
        if node.type == "at-rule":
            head = f"@{node.at_keyword}{serialize(node.prelude)}".strip()
            if node.at_keyword in CONDITIONS and node.content is not None:
                inner = parse_rule_list(node.content, skip_comments=True, skip_whitespace=True)
                yield head, list(_used_rules(inner, words))
            elif node.content is not None:
                yield head, serialize(node.content)
        elif selectors := [one for one in _selectors(node.prelude) if _needed_classes(one) <= words]:
            declarations = parse_blocks_contents(node.content, skip_comments=True, skip_whitespace=True)
            yield (
                ",".join(serialize(one).strip() for one in selectors),
                [(each.name, each.serialize()) for each in declarations],
            )


def _selectors(tokens: list[Any]) -> list[list[Any]]:
    selectors: list[list[Any]] = [[]]
    for part in tokens:
        if part == ",":
            selectors.append([])
        else:
            selectors[-1].append(part)
    return selectors


def _needed_classes(selector: list[Any]) -> set[str]:
    """The classes without which it matches nothing; those in :not(), :is() … are no condition, or one of several."""
    return {name.value for dot, name in pairwise(selector) if dot == "." and name.type == "ident"}


def _without_unused_names(rules: list[Rule], words: set[str], own: str) -> list[Rule]:
    """Leave out custom properties and animations that nothing names any more, and what is empty, until none is left."""
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
        if (kind == "@keyframes" and name not in animated) or (kind == "@property" and name not in properties):
            continue
        if isinstance(content, list) and head.startswith("@"):
            content = list(_named_rules(content, properties, animated))
        elif isinstance(content, list):
            content = [(name, text) for name, text in content if not name.startswith("--") or name in properties]
        if content:
            yield head, content


def _text(rule: Rule) -> str:
    head, content = rule
    if isinstance(content, str):
        return f"{head}{{{content}}}"
    if head.startswith("@"):
        return f"{head}{{{''.join(map(_text, content))}}}"
    return f"{head}{{{';'.join(text for _, text in content)}}}"


def main() -> None:
    css = build()
    USED.write_text(css)
    sys.stdout.write(f"{USED.relative_to(PROJECT)}: {len(css):,} of {WHOLE.stat().st_size:,} bytes\n")


if __name__ == "__main__":
    main()
