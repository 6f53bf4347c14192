"""The check at the end of every run: what was collected has finished, however a test is lost."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.servers import PROJECT

TESTS = """
import os, pytest

@pytest.mark.parametrize("number", range(3))
def test_number(number): ...

@pytest.mark.storm
def test_storm(): ...

def test_other(): ...

def test_killer():
    if "PYTEST_XDIST_WORKER" in os.environ:
        os._exit(1)
"""
LOSING = """
def pytest_collection_modifyitems(items):
    del items[1]  # takes one off
    items.append(items[0])  # has the id of another

def pytest_runtest_protocol(item):
    return "other" in item.name or None  # ends without a word
"""
LOST = [
    "DID NOT FINISH test_it.py::test_number[1]",
    "DID NOT FINISH test_it.py::test_other",
    "ID OF MORE THAN ONE test_it.py::test_number[0]",
]


@pytest.mark.parametrize(
    ("conftest", "arguments", "exit_code", "lost"),
    [
        ("", "-n 0", 0, []),
        ("", "-n 2 -k number", 0, []),
        (LOSING, "-n 0", 1, LOST),
        (LOSING, "-n 2 --max-worker-restart 1", 1, ["DID NOT FINISH test_it.py::test_killer", *LOST]),
    ],
)
def test_a_lost_test_fails_the_run(
    tmp_path: Path, conftest: str, arguments: str, exit_code: int, lost: list[str]
) -> None:
    (tmp_path / "conftest.py").write_text(conftest)
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = storm\n")
    (tmp_path / "test_it.py").write_text(TESTS)
    command = [sys.executable, "-m", "pytest", "-p", "xdist", "-p", "tests.all_ran", "-m", "not storm"]
    done = subprocess.run(
        [*command, *arguments.split()],
        cwd=tmp_path,
        env={"PATH": "/usr/bin:/bin", "PYTHONPATH": str(PROJECT), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"},
        capture_output=True,
        text=True,
    )
    said = [line for line in done.stdout.splitlines() if line.startswith(("DID NOT FINISH", "ID OF MORE THAN ONE"))]
    assert (done.returncode, sorted(said)) == (exit_code, lost), done.stdout
