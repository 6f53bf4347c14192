"""Loaded with `-p tests.all_ran`: a run that lost a test fails, and names it.

A test is lost when it was collected and did not finish: its id is another's, too (parallel workers then keep one of
each), or its worker died, or something took it off the list. The command line may do that, and the marker `storm`.
"""

from collections import Counter
from collections.abc import Generator
from typing import Any

import pytest

_collected: list[str] = []
_finished: set[str] = set()
_lost = pytest.StashKey[list[str]]()


@pytest.hookimpl(wrapper=True, tryfirst=True)  # around all who take items off
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> Generator[None]:
    every = list(items)
    yield
    option = config.option
    selected = option.keyword or option.deselect or option.markexpr not in ("", "not storm")
    if selected or getattr(option, "lf", False) or getattr(option, "stepwise", False):
        every = items
    taken_off = (item for item in every if item not in items and not item.get_closest_marker("storm"))
    _collected.extend(item.nodeid for item in (*items, *taken_off))


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.when == "teardown":
        _finished.add(report.nodeid)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """A worker of a parallel run has ended. One that died tells nothing; the others have collected the same."""
    _collected[:] = getattr(node, "workeroutput", {}).get("collected", _collected)


@pytest.hookimpl(tryfirst=True)
def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    if (told := getattr(session.config, "workeroutput", None)) is not None:
        told["collected"] = _collected
        return
    whole = exitstatus in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED) and not session.shouldfail
    if not whole or session.config.option.collectonly or session.config.option.setupplan:
        return
    lost = [f"ID OF MORE THAN ONE {nodeid}" for nodeid, times in Counter(_collected).items() if times > 1]
    lost += [f"DID NOT FINISH {nodeid}" for nodeid in _collected if nodeid not in _finished]
    session.config.stash[_lost] = lost
    if lost:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    if lost := config.stash.get(_lost, []):
        terminalreporter.section("Tests were lost", red=True, bold=True)
        for line in lost:
            terminalreporter.line(line)
