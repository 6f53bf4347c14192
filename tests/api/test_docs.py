"""docs/API.md does as it says: every example on it runs, in its order, against the product."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from accounts import api_keys
from accounts.models import ApiKey, User
from billing.api.problems import CODES
from tests.environment import BILLING_SECRET
from tests.servers import Server

PAGE = (Path(__file__).parents[2] / "docs" / "API.md").read_text()
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", PAGE, re.DOTALL)


@pytest.fixture
def environment(web: Server, alice: User) -> dict[str, str]:
    _, token = api_keys.make_key(user_id=alice.pk, name="Docs", scopes=ApiKey.Scope.values)
    return os.environ | {
        "BASE": f"{web.url}/api/v1",
        "BILLING_SECRET": BILLING_SECRET,
        "POSTMATE_API_KEY": token,
        "USER_ID": str(alice.pk),
    }


def shape(value: Any) -> Any:
    """What a document is made of: its keys, and the kinds of its leaves; a list by its first entry."""
    if isinstance(value, dict):
        return {key: shape(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [shape(value[0])] if value else []
    return type(value)


def run_quietly(script: str, environment: dict[str, str]) -> str:
    script = script.replace("curl ", "curl --silent --show-error --max-time 60 ", 1)
    command = [str(shutil.which("bash")), "-euo", "pipefail", "-c", script]
    return subprocess.run(command, env=environment, capture_output=True, check=True, text=True).stdout


@pytest.mark.skipif(
    shutil.which("curl") is None, reason="curl is missing: the bash examples of docs/API.md are NOT run"
)
def test_bash_examples(environment: dict[str, str]) -> None:
    """Each gives JSON; where the page shows the answer, it has exactly those fields; only the last is a refusal."""
    answers: list[Any] = []
    expected = None
    for language, script in BLOCKS:
        if language == "bash" and "curl" in script:
            answers.append(json.loads(run_quietly(script, environment)))
            if "usage" in answers[-1]:
                environment["USAGE_ID"] = str(answers[-1]["usage"]["usage_id"])
        elif language == "json":
            expected = json.loads(script)
            assert shape(expected) == shape(answers[-1])
    assert len(answers) == PAGE.count("\ncurl ") == 13
    assert all("code" not in answer for answer in answers[:-1]), answers
    assert answers[-1] == expected


def test_python_examples(environment: dict[str, str]) -> None:
    script = "\n".join(block for language, block in BLOCKS if language == "python")
    result = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (0, "")
    lines = result.stdout.splitlines()
    assert lines[0] == "10000"
    assert lines[1] == "1500 True"
    assert lines[2] == "975 9025"  # ceil(650 × 1.5)
    assert lines[3] == "failed"
    assert lines[4] == "201 2250"
    assert "-3225" in lines  # what was used, summed over the ledger
    assert lines[-4:] == [
        "Starter 150000 15.0 usd",
        "Pro 750000 65.0 usd",
        "Business 2250000 175.0 usd",
        "Enterprise 7500000 500.0 usd",
    ]


def test_table_of_errors() -> None:
    """It lists every code there is, with its status."""
    rows = re.findall(r"^\| (\d{3}) \| `(\w+)` \|", PAGE, re.MULTILINE)
    assert {code: int(status) for status, code in rows} == {code: status for code, (status, _) in CODES.items()}
