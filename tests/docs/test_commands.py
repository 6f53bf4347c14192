"""Every command that the documentation names is run, or, where that cannot be done here, looked at for a reason.

A command that nothing below covers fails the test: add it to what runs, or to ELSEWHERE with the reason and a check.
"""

# ruff: noqa: S607  (make, bash and sh are those of the machine, as for whoever reads the pages)

import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from functools import cache
from io import StringIO
from pathlib import Path

import django.core.management
import pytest
import yaml
from django.core.management import CommandError, call_command, load_command_class
from django.urls import Resolver404, resolve
from pytest_django.fixtures import Settings

from accounts import api_keys
from accounts.models import ApiKey, User
from billing.payments.webhooks import HANDLERS
from postmate.celery import app
from postmate.ops.doctor.outside import OLDER_NAMES
from tests.docs.pages import PROJECT, Command, blocks, commands, pages
from tests.environment import BILLING_SECRET
from tests.servers import Server, StripeStandIn

COMMANDS = commands()
RUN_ELSEWHERE = {"docs/API.md": "tests/api/test_docs.py"}  # pages whose blocks a test of their own runs


def of_program(*programs: str) -> list[Command]:
    return [command for command in COMMANDS if command.program in programs and command.page not in RUN_ELSEWHERE]


# --- make -------------------------------------------------------------------------------------------------------------


def test_make_targets() -> None:
    """`make -n` knows each, with the variables it is given, and `make help` lists it; none is left undocumented."""
    told = subprocess.run(["make", "help"], cwd=PROJECT, capture_output=True, text=True, check=True).stdout
    listed = set(re.findall(r"^ +make ([a-z-]+)", told, re.MULTILINE))
    named = set()
    failed = []
    for words in {command.words for command in of_program("make")}:
        named |= {word for word in words[1:] if "=" not in word}
        result = subprocess.run(["make", "-n", *words[1:]], cwd=PROJECT, capture_output=True, text=True)
        if result.returncode:
            failed.append((words, result.stderr))
    assert failed == []
    assert named <= listed
    assert listed <= named


# --- manage.py --------------------------------------------------------------------------------------------------------

# What stands for something in the documentation, and what takes its place here.
PLACEHOLDERS = {
    "EMAIL": "bob@example.com",
    "FILE": "tests/billing/price_list.json",
    "MODEL": "gpt-6-luna",
    "1000000": "200",
    "evt_…": "evt_unknown",
    "DAY": "2026-11-01",
    "ID": "1",
}
# What a person would be asked, and what keeps a run short.
ALSO = {
    "anonymize_user": ["--yes"],
    "createsuperuser": ["--noinput", "--email", "root@example.com"],
    "collectstatic": ["--noinput"],
    "make_demo_history": ["--users", "10", "--months", "1", "--force"],
    "shell": ["-c", "pass"],
}
# Run by a test of their own, since they need more than a database: their options alone are checked here.
OWN_TESTS = {
    "approve_change": "tests/accounts/test_audit.py",
    "changepassword": "tests/accounts/test_access.py",
    "check": "tests/test_checks.py",
    "doctor": "tests/test_doctor.py",
    "restore": "tests/test_backup.py",
}
# These say by their exit code that there is something to do, and here there is.
MAY_SAY_NO = {"import_model_prices": "the list differs from the catalogue"}


def manage_commands() -> Iterator[tuple[Command, str, list[str]]]:
    """Each call of manage.py, also within `docker compose exec`: its command and arguments."""
    seen = set()
    for command in COMMANDS:
        index = next((i for i, word in enumerate(command.words) if word.endswith("manage.py")), None)
        if index is None or len(command.words) < index + 2:
            continue
        name, *arguments = command.words[index + 1 :]
        arguments = [argument for argument in arguments if argument != "…"]
        if (name, *arguments) not in seen:
            seen.add((name, *arguments))
            yield command, name, arguments


def test_manage_commands(
    transactional_db: None,
    stripe: StripeStandIn,
    ai: Server,
    alice: User,
    bob: User,
    susan: User,
    settings: Settings,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Each takes the options that the documentation names, and does its work."""
    settings.DEBUG = True  # the demo's commands insist
    settings.STATIC_ROOT = tmp_path / "static"
    settings.MEDIA_ROOT = str(tmp_path / "media")
    settings.BACKUP_DIR = tmp_path / "backups"
    monkeypatch.setenv("DJANGO_SUPERUSER_PASSWORD", "correct horse battery")
    apps = django.core.management.get_commands()
    count, failed = 0, []
    for command, name, documented in sorted(manage_commands(), key=lambda each: each[1] == "make_demo_history"):
        if name not in apps:
            failed.append(f"{command}: there is no such command")
            continue
        arguments = [PLACEHOLDERS.get(argument, argument) for argument in documented]
        out = StringIO()
        try:
            parser = load_command_class(apps[name], name).create_parser("manage.py", name)
            parser.parse_args(arguments)
            if name not in OWN_TESTS:
                call_command(name, *arguments, *ALSO.get(name, []), stdout=out, stderr=out)
        except (CommandError, SystemExit) as error:
            is_mention = not documented and "are required" in str(error)
            if name not in MAY_SAY_NO and not is_mention:
                failed.append(f"{command}: {error} {out.getvalue()[-500:]}")
        count += 1
    assert failed == []
    assert count > 10
    for name, file in OWN_TESTS.items():
        assert re.search(rf'"{name}"', (PROJECT / file).read_text()), f"{file} does not run {name}"


# --- curl -------------------------------------------------------------------------------------------------------------

ADDRESSES = re.compile(r"https?://(localhost|127\.0\.0\.1|tokens\.example\.com)(:\d+)?")


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is missing: the calls of the documentation are NOT run")
def test_calls(web: Server, stripe: StripeStandIn, alice: User) -> None:
    """Each address answers, with the methods, headers and bodies that are shown."""
    _, key = api_keys.make_key(user_id=alice.pk, name="Docs", scopes=ApiKey.Scope.values)
    environment = os.environ | {
        "BASE": f"{web.url}/api/v1",
        "BILLING_SECRET": BILLING_SECRET,
        "POSTMATE_API_KEY": key,
        "METRICS_TOKEN": "tests",
        "USER_ID": str(alice.pk),
    }
    calls = {command.script for command in of_program("curl")}
    failed = []
    for script in calls:
        script = ADDRESSES.sub(web.url, script).replace("curl ", "curl --silent --show-error --max-time 60 --fail ", 1)
        result = subprocess.run(["bash", "-c", script], env=environment, capture_output=True, text=True)
        if result.returncode:
            failed.append((script, result.stderr))
    assert failed == []
    assert calls


# --- Python -----------------------------------------------------------------------------------------------------------


def test_python_examples_parse() -> None:
    """Those of the reference and of the API are run by tests of their own; the others at least compile."""
    for block in blocks("python"):
        if ">>>" not in block.text:
            compile(block.text, f"{block.page}:{block.line}", "exec")


# --- What cannot be run here ------------------------------------------------------------------------------------------


def _compose(words: list[str]) -> None:
    """`docker compose …`: there is no container engine here. The services that it names are in the compose file."""
    services = yaml.safe_load((PROJECT / "docker-compose.yml").read_text())["services"]
    assert words[1] == "compose"
    rest = [word for word in words[2:] if not word.startswith("-")]
    action, *named = rest
    assert action in {"build", "up", "down", "exec", "run", "logs", "ps", "pull", "restart", "stop", "start", "cp"}
    if action in {"exec", "run"}:
        assert named, "a service is missing"
        named = named[:1]
    for word in named:
        name = re.split(r"[=:]", word)[0]
        assert name in services or action == "cp", f"there is no service {name}"


def _stripe(words: list[str]) -> None:
    """Stripe's own program needs an account there. Where it forwards to is ours, and the events are handled."""
    for word in words[1:]:
        if word.startswith("localhost:"):
            resolve("/" + word.partition("/")[2])
    if words[1] == "trigger":
        assert words[2] in HANDLERS


def _copy(words: list[str]) -> None:
    """It would change the project; what is copied is there."""
    assert (PROJECT / next(word for word in words[1:] if not word.startswith("-"))).exists()


def _secrets(words: list[str]) -> None:
    """`sh docker/secrets.sh`, in a copy: it makes up what can be made up, and says what is missing."""
    with tempfile.TemporaryDirectory() as folder:
        script = Path(folder, words[1])
        script.parent.mkdir()
        shutil.copy(PROJECT / words[1], script)
        told = subprocess.run(["sh", str(script)], capture_output=True, text=True, check=True).stdout
        assert len(Path(folder, "secrets", "secret_key").read_text()) == 64
        assert "stripe_secret_key" in told


def _pytest(words: list[str]) -> None:
    """Tests do not run tests; the files are there, and the tests in them."""
    for word in words:
        if word.startswith("tests"):
            path, *names = word.split("::")
            file = PROJECT / path
            assert file.exists()
            assert all(f"def {name}(" in file.read_text() for name in names)


@cache
def _help_of(*program: str) -> str:
    command = [sys.executable, *program, "--help"]
    return subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, check=True).stdout


def _celery(words: list[str]) -> None:
    """Workers are started by other tests; the options are those that the program knows, and so are the tasks."""
    action = next(word for word in words[1:] if word in {"worker", "beat", "inspect", "call"})
    if action == "call":
        app.loader.import_default_modules()
        assert words[-1] in app.tasks
        return
    told = _help_of("-m", "celery", "-A", "postmate", action)
    after = words[words.index(action) :]
    assert all(word.partition("=")[0] in told for word in after if word.startswith("--"))


def _serving(words: list[str]) -> None:
    """The servers of production are run by tests/production; the options are those that they know."""
    told = _help_of(*words[1:4])
    assert all(word in told for word in words if word.startswith("--"))


def _nothing(words: list[str]) -> None:
    """Needs a machine of the operator's; here is known only that we name it on purpose."""


ELSEWHERE: dict[str, Callable[[list[str]], None]] = {
    "docker": _compose,
    "stripe": _stripe,
    "cp": _copy,
    "sh": _secrets,
    "celery": _celery,
    "apt": _nothing,  # installs on the machine
    "createdb": _nothing,  # PostgreSQL's own, of a server of the operator's
    "dropdb": _nothing,
}
RUN_ABOVE = ("make", "curl", "manage.py")
HARMLESS = ("true", "echo", "openssl", "python3", "export")  # these are run as they stand


def test_events_of_stripe() -> None:
    """Who follows SETUP has Stripe send all that is handled, and nothing else."""
    named = re.search(
        r"Its signing secret is .*?Events:\n(.*?)\n4\.", pages()["docs/TOKEN_BILLING_SETUP.md"], re.DOTALL
    )
    assert named is not None
    assert set(re.findall(r"`([a-z_.]+)`", named[1])) == HANDLERS.keys() - OLDER_NAMES


def test_every_command_is_covered() -> None:
    """What no test runs is on a list, with the reason why not, and what can be looked at is."""
    failed = []
    for command in COMMANDS:
        words = list(command.words)
        program = Path(command.program).name
        if command.page in RUN_ELSEWHERE:
            assert Path(command.page).name in (PROJECT / RUN_ELSEWHERE[command.page]).read_text()
            continue
        try:
            if program in ELSEWHERE:
                ELSEWHERE[program](words)
            elif "pytest" in words:
                _pytest(words)
            elif "postmate.serving" in words:
                _serving(words)
            elif "manage.py" in {Path(word).name for word in words[:2]} or program in RUN_ABOVE:
                continue
            elif program in HARMLESS:
                if shutil.which(program) is None:
                    continue  # not on this machine
                subprocess.run(["bash", "-c", shlex.join(words)], cwd=PROJECT, check=True, capture_output=True)
            else:
                failed.append(f"{command}: nothing runs it")
        except (AssertionError, Resolver404, StopIteration, subprocess.CalledProcessError) as error:
            failed.append(f"{command}: {error!r}")
    assert failed == []
