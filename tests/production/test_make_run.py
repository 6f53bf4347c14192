"""`make run`: once on its data, known to the commands beside it, and gone when it is gone, however it ends."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from postmate.local import keeper, running
from tests.production.conftest import SHELL, _is_free, row_of_free_ports, wait_until
from tests.production.test_first_impression import refused
from tests.production.test_local_servers import open_to_others, runs
from tests.servers import PROJECT

ADDRESSES = "from django.conf import settings as s; print(s.SITE_URL, s.STRIPE_API_BASE, s.OPENAI_BASE_URL)"


def start(directory: Path, port: int) -> "subprocess.Popen[bytes]":
    with (directory.parent / "terminal.txt").open("wb") as output:
        return subprocess.Popen(
            [sys.executable, "-m", "postmate.local.run"], cwd=PROJECT, stdout=output, stderr=output,
            env=SHELL | {"POSTMATE_DATA_DIR": str(directory), "PORT": str(port)},
        )  # fmt: skip


def is_gone(directory: Path, groups: list[int], port: int) -> bool:
    """Its processes, its servers, its ports, and who waits for its end."""
    return (
        not any(keeper.signalled(group, 0) for group in groups)
        and not runs(directory)
        and not keeper.is_running(directory, "watch")
        and all(_is_free(each) for each in range(port, port + 3))
    )


def test_make_run(tmp_path: Path) -> None:
    directory, port = tmp_path / "data", row_of_free_ports(3)
    here = {"POSTMATE_DATA_DIR": str(directory)}
    runner, output = start(directory, port), tmp_path / "terminal.txt"
    try:
        wait_until(lambda: runner.poll() is not None or "Ctrl-C stops" in output.read_text(), "it runs", 120)
        assert runner.poll() is None, output.read_text()
        groups = list(running.read(directory)["processes"].values())
        assert len(groups) == 5
        for command in ("postmate.local.run", "postmate.local.run_production"):
            said = refused("-m", command, **here, PORT=str(row_of_free_ports(8)))
            assert f"http://localhost:{port}" in said
            assert f"POSTMATE_DATA_DIR={directory} make stop" in said
        beside = subprocess.run(
            [sys.executable, "manage.py", "shell", "--no-imports", "-c", ADDRESSES],
            cwd=PROJECT, env=SHELL | here, capture_output=True, text=True, check=True,
        )  # fmt: skip
        assert beside.stdout.split() == [
            f"http://localhost:{port}", f"http://localhost:{port + 1}", f"http://127.0.0.1:{port + 2}/openai/v1",
        ]  # fmt: skip
        assert open_to_others(directory) == []
        runner.kill()
        wait_until(lambda: is_gone(directory, groups, port), "nothing is left of what was killed")
    finally:
        runner.kill()
        runner.wait()


@pytest.mark.parametrize(("how", "code"), [("make stop", 0), ("Ctrl-C", 0), ("by itself", 1), ("kill -9", -9)])
def test_every_end_is_one_for_all(tmp_path: Path, how: str, code: int) -> None:
    """Also for one that does not listen, and for our children's children."""
    deaf = "trap '' TERM; " if how == "Ctrl-C" else ""
    last = "sleep 0.5" if how == "by itself" else "sleep 600 & wait"
    commands = {"first": ["sh", "-c", f"{deaf}echo up; sleep 600 & wait"], "last": ["sh", "-c", last]}
    program = (
        "from postmate.local import embedded, run, running; run.STOP_SECONDS = 0.5\n"
        "running.hold('make run', address='here', port=1); embedded.guard()\n"
        f"raise SystemExit(run.run_together({commands}))"
    )
    here = SHELL | {"POSTMATE_DATA_DIR": str(tmp_path)}
    runner = subprocess.Popen(
        [sys.executable, "-c", program],
        cwd=PROJECT,
        env=here,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    assert runner.stdout
    assert runner.stdout.readline() == "first  | up\n"
    groups = list(running.read(tmp_path)["processes"].values())
    if how == "make stop":
        stopped = subprocess.run(
            [sys.executable, "-m", "postmate.local.running"], cwd=PROJECT, env=here, capture_output=True
        )
        assert b"`make run` at here has ended" in stopped.stdout
    elif how != "by itself":
        runner.send_signal(signal.SIGINT if how == "Ctrl-C" else signal.SIGKILL)
    said, _ = runner.communicate(timeout=60)
    assert runner.returncode == code
    assert ("last (code 0) ended by itself" in said) == (how == "by itself")
    wait_until(lambda: not any(keeper.signalled(group, 0) for group in groups), "nothing is left")
    wait_until(lambda: not running.read(tmp_path), "nothing is said to run")
