"""Writes docs/REFERENCE.md, the public functions, out of the sources: `make reference`."""

import ast
import inspect
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass

from tests.docs.pages import PROJECT

PAGE = "docs/REFERENCE.md"

# What other code of the platform may call: every function of these modules whose name has no underscore in front.
ROOMS = {
    "Balances": ["billing/ledger/__init__.py"],
    "Usage": ["billing/usage/__init__.py", "billing/usage/stats.py"],
    "What is on offer": [f"billing/catalogue/{name}.py" for name in ("packages", "__init__", "system_settings")],
    "Arithmetic": ["billing/pricing.py"],
    "Payments": [f"billing/payments/{name}.py" for name in
                 ("checkout", "purchases", "customers", "cards", "recharge_settings", "recharge", "confirmation",
                  "refunds", "refund_requests", "webhooks", "reconcile")],
    "History": [f"billing/history/{name}.py" for name in ("__init__", "exports", "statements", "receipts")],
    "What admins do": [f"billing/staff/{name}.py" for name in ("grants", "accounts", "bulk")],
    "What the business reads": [f"billing/figures/{name}.py" for name in
                                ("business", "customers", "liability", "sums", "roll_ups", "finance",
                                 "settings_preview")],
    "Upkeep": ["billing/upkeep/verification.py", "billing/upkeep/laws.py", "billing/upkeep/retention.py"],
    "AI operations": [f"ai_ops/{name}.py" for name in
                      ("operations", "pieces", "metering/quotes", "metering/text", "metering/images")],
    "A person's data": ["accounts/own_data.py", "billing/upkeep/own_data.py", "ai_ops/own_data.py"],
}  # fmt: skip

HEAD = """# Reference

<!-- Written by `make reference` out of the sources. Change the docstring there, then run it again. -->

Every function that other code of the platform may call. Tokens, cents, milliseconds and micro-dollars are whole
numbers; a name says its unit. An exception stands beside the function that raises it, and carries its `message` for
people and, where the HTTP API or a page can meet it, its `http_status`
([all of them](TOKEN_BILLING_USAGE.md#refusals)). [EXAMPLES](EXAMPLES.md) calls most of them, one after the other.
"""


@dataclass(frozen=True, slots=True)
class Function:
    name: str
    signature: str
    text: str


def functions_of(module: str) -> Iterator[Function]:
    """The public functions of a module, in their order there."""
    for node in ast.parse((PROJECT / module).read_text()).body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and not node.name.startswith("_"):
            yield Function(node.name, _signature(node), inspect.cleandoc(ast.get_docstring(node) or ""))


def _signature(node: ast.FunctionDef | ast.AsyncFunctionDef) -> str:
    start = "async def" if isinstance(node, ast.AsyncFunctionDef) else "def"
    returns = f" -> {ast.unparse(node.returns)}" if node.returns else ""
    return f"{start} {node.name}({ast.unparse(node.args)}){returns}: ..."


def page() -> str:
    parts = [HEAD]
    for room, modules in ROOMS.items():
        parts.append(f"\n## {room}\n")
        for module in modules:
            about = (ast.get_docstring(ast.parse((PROJECT / module).read_text())) or "").partition("\n\n")[0]
            parts.append(f"\n### `{module}`\n\n{about}\n")
            for function in functions_of(module):
                parts.append(f"\n#### `{function.name}`\n\n```python\n{function.signature}\n```\n\n{function.text}\n")
    ruff = [sys.executable, "-m", "ruff", "format", "--stdin-filename", PAGE, "-"]
    return subprocess.run(ruff, input="".join(parts), capture_output=True, check=True, text=True, cwd=PROJECT).stdout


if __name__ == "__main__":
    (PROJECT / PAGE).write_text(page())
