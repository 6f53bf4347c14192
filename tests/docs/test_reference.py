"""The reference of the public functions is what the sources say, and the examples do what they show.

Also the tables of variables and commands of the set-up page, which list what there is: no more, no less.
"""

import ast
import doctest
import importlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from django.core.management import get_commands
from pytest_django.fixtures import Settings

from accounts.models import User
from billing.models import Purchase
from postmate.web.logs import OURS
from tests.conftest import MakeUser
from tests.docs import reference
from tests.docs.pages import PROJECT, blocks, pages, table_rows
from tests.payments import verify_books
from tests.servers import Server, StripeStandIn

SETUP, USAGE, EXAMPLES = "docs/TOKEN_BILLING_SETUP.md", "docs/TOKEN_BILLING_USAGE.md", "docs/EXAMPLES.md"

# The public vocabulary: names that other code of the platform counts on.
VOCABULARY = """
    initialize_account get_account check_balance deduct_tokens add_tokens update_auto_recharge get_transactions
    update_stripe_customer record_usage get_user_usage list_active_packages get_package_by_id create_package
    update_package seed_default_packages get_system_settings initialize_default_settings update_system_settings
    get_token_stats get_model_usage_stats get_operation_stats get_user_accounts grant_tokens create_checkout_session
    trigger_auto_recharge calculate_llm_billable_tokens calculate_image_billable_tokens
    generate_draft generate_chat_response refine_content refine_selection repurpose_content generate_image_prompt
    generate_images
"""


def public_functions() -> dict[str, str]:
    """Name → module, of all that docs/REFERENCE.md lists."""
    modules = [module for room in reference.ROOMS.values() for module in room]
    return {function.name: module for module in modules for function in reference.functions_of(module)}


def test_reference_is_what_the_sources_say() -> None:
    assert pages()[reference.PAGE] == reference.page(), "make reference"


def test_every_public_function_says_what_it_does() -> None:
    modules = [module for room in reference.ROOMS.values() for module in room]
    assert [f.name for module in modules for f in reference.functions_of(module) if not f.text] == []


def test_vocabulary() -> None:
    """Every name of the public vocabulary is there, and is called in an example."""
    called = "".join(block.text for block in blocks("python") if block.page == EXAMPLES)
    for name in VOCABULARY.split():
        assert name in public_functions()
        assert f"{name}(" in called, name


def _module(cell: str) -> str:
    return cell.strip("`").removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def test_index() -> None:
    """The table of the functions that are wanted most names them where they are."""
    listed = {
        (name, _module(module))
        for names, module in table_rows(USAGE, "### Where each function lives")[1:]
        for name in re.findall(r"`(\w+)`", names)
    }
    there = {(name, _module(module)) for name, module in public_functions().items()}
    assert {name for name, _ in listed} >= set(VOCABULARY.split())
    assert listed - there == set()


def test_errors() -> None:
    """The table of refusals names classes that are there, with their status."""
    rows = table_rows(USAGE, "### Refusals")[1:]
    assert len(rows) > 20
    for names, module, status, *_ in rows:
        for name in re.findall(r"`(\w+)`", names):
            error = getattr(importlib.import_module(_module(module)), name)
            assert (name, str(getattr(error, "http_status", "–"))) == (name, status)


@pytest.mark.django_db(transaction=True)
def test_examples(
    stripe: StripeStandIn,
    ai: Server,
    alice: User,
    bob: User,
    make_user: MakeUser,
    adam: User,
    susan: User,
    settings: Settings,
    tmp_path: Path,
) -> None:
    """All of them, in their order, in one go; and the books are in order after them."""
    settings.MEDIA_ROOT = str(tmp_path)
    stripe.control("deliveries/hold")

    def pay_at_stripe(purchase: Purchase) -> None:
        stripe.pay(purchase.checkout_url)

    def dispute_at_stripe(purchase: Purchase) -> None:
        stripe.control(f"payments/{purchase.stripe_payment_intent_id}/dispute", status="needs_response")

    known: dict[str, Any] = {
        "alice": alice,
        "bob": bob,
        "carol": make_user("carol"),
        "adam": adam,
        "susan": susan,
        "pay_at_stripe": pay_at_stripe,
        "dispute_at_stripe": dispute_at_stripe,
    }
    runner = doctest.DocTestRunner(verbose=False, optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    parser = doctest.DocTestParser()
    told: list[str] = []
    for block in blocks("python"):
        if block.page == EXAMPLES and ">>>" in block.text:
            test = parser.get_doctest(block.text, known, f"{EXAMPLES}:{block.line}", EXAMPLES, block.line)
            runner.run(test, out=told.append, clear_globs=False)
            known = test.globs
    assert runner.failures == 0, "".join(told)
    assert runner.tries > 100
    verify_books()


# --- The set-up page --------------------------------------------------------------------------------------------------


def _calls(tree: ast.Module) -> Iterator[tuple[str, str]]:
    """(what is called, its first argument where that is a text)."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            if isinstance(node.args[0].value, str):
                yield ast.unparse(node.func), node.args[0].value
        elif isinstance(node, ast.Subscript) and isinstance(node.slice, ast.Constant):
            yield ast.unparse(node.value), str(node.slice.value)


READS = re.compile(r"\benv\.|os\.environ|_secret\(")  # what a function of the settings does that reads a variable


def read_by_the_code() -> set[str]:
    """The variables that the settings, the programs and the container files read."""
    tree = ast.parse((PROJECT / "postmate" / "settings.py").read_text())
    # Also those read through a function of the settings' own.
    readers = {node.name for node in tree.body if isinstance(node, ast.FunctionDef) and READS.search(ast.unparse(node))}
    found = {name for call, name in _calls(tree) if call.startswith("env.") or call in readers}
    for file in [file for folder in OURS for file in PROJECT.glob(f"{folder}/**/*.py")]:
        found |= {
            name
            for call, name in _calls(ast.parse(file.read_text()))
            if call in ("os.environ", "os.environ.get", "os.getenv", "os.environ.setdefault")
        }
    compose = (PROJECT / "docker-compose.yml").read_text()
    found |= set(re.findall(r"\$\{([A-Z_]+)", compose))
    found = {name for name in found if re.fullmatch(r"[A-Z][A-Z0-9_]+", name)} - NOT_OURS
    return {name for name in found if name.removesuffix("_FILE") == name or name.removesuffix("_FILE") not in found}


# Of Django, Python and the machine.
NOT_OURS = {"DJANGO_SETTINGS_MODULE", "FORCE_COLOR", "HOME", "PATH", "PYTHONUNBUFFERED"}


def variables_in_table() -> set[str]:
    return {
        name for row in table_rows(SETUP, "### Every variable") for name in re.findall(r"`([A-Z][A-Z0-9_]+)`", row[0])
    }


def test_variables() -> None:
    """What is read is in the table of the set-up page and in .env.example, and nothing else is."""
    example = re.findall(r"^#? ?([A-Z][A-Z0-9_]+)=", (PROJECT / ".env.example").read_text(), re.MULTILINE)
    assert sorted(example) == sorted(set(example))
    read = read_by_the_code()
    assert len(read) > 30
    assert variables_in_table() == read
    assert set(example) == read


def test_management_commands() -> None:
    """The table of the set-up page lists every command of ours."""
    ours = {name for name, app in get_commands().items() if app in {"accounts", "billing", "ai_ops", "postmate"}}
    listed = {name for row in table_rows(SETUP, "### Commands") for name in re.findall(r"`manage\.py (\w+)", row[0])}
    assert listed == ours


def test_compose_file_is_what_the_pages_say() -> None:
    """Every service of the compose file is named on the set-up page or in ARCHITECTURE."""
    services = yaml.safe_load((PROJECT / "docker-compose.yml").read_text())["services"]
    text = pages()[SETUP] + pages()["docs/ARCHITECTURE.md"]
    assert {name for name in services if f"`{name}`" not in text} == set()
