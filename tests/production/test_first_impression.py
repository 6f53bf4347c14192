"""What a newcomer reads when `make run` cannot begin: what is the matter, and what to do."""

import ast
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.production.conftest import SHELL, row_of_free_ports
from tests.servers import PROJECT

INSTALL = PROJECT / "postmate" / "local" / "install.py"


def refused(*arguments: str, **environment: str) -> str:
    """What a program says that leaves with an error."""
    done = subprocess.run(
        [sys.executable, *arguments], cwd=PROJECT, env=SHELL | environment, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    return done.stderr


def test_old_pythons_can_read_the_installation() -> None:
    ast.parse(INSTALL.read_text(), feature_version=(3, 6))


LINUX = "platform.system = lambda: 'Linux'; platform.machine = lambda: 'x86_64'; sys.version_info = (3, 11, 2)"
MAC = f"{LINUX}; sys.platform = 'darwin'; platform.system = lambda: 'Darwin'; platform.machine = lambda: 'arm64'"
NO_PROGRAMS = "os.environ['PATH'] = ''"


@pytest.mark.parametrize(
    ("machine", "advice"),
    [
        (f"{NO_PROGRAMS}; sys.version_info = (3, 9, 2)", "make run PYTHON="),
        (f"{NO_PROGRAMS}; sys.version_info = (3, 15, 0)", "3.11 to 3.14 is needed"),
        (f"{NO_PROGRAMS}; sys.implementation.name = 'pypy'", "CPython is needed"),
        (f"{LINUX}; sys.modules['ensurepip'] = None", "-venv"),
        ("sys.platform = 'win32'", "WSL"),
        (f"{LINUX}; platform.machine = lambda: 'riscv64'", "no builds for Linux riscv64"),
        (f"{LINUX}; os.confstr = lambda name: None", "not Alpine"),
        (f"{LINUX}; os.confstr = lambda name: 'glibc 2.17'", "glibc 2.28 or newer"),
        (f"{MAC}; {NO_PROGRAMS}; platform.machine = lambda: 'x86_64'", "brew install rust"),
        (
            f"{LINUX}; import shutil; shutil.disk_usage = lambda path: type('Usage', (), {{'free': 10 * 2**20}})",
            "Make room",
        ),
        (f"{LINUX}; os.access = lambda path, mode: False", "Clone the project"),
    ],
)
def test_installation_says_what_is_wrong_with_the_machine(machine: str, advice: str) -> None:
    """Row 78: before anything is installed."""
    program = (
        "import os, platform, runpy, subprocess, sys, sysconfig; sysconfig.get_config_vars(); sys.argv[1:] = ['local'];"
        f"os.environ.pop('REDIS_URL', None); subprocess.check_output = lambda *command, **options: b''; {machine};"
        f"runpy.run_path({str(INSTALL)!r}, None, '__main__')"
    )
    assert advice in refused("-c", program)


def test_port_in_use(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        said = refused("-m", "postmate.local.run", PORT=str(port), POSTMATE_DATA_DIR=str(tmp_path))
    assert f"Port {port} is in use" in said
    assert "make run" in said


def test_port_that_is_none(tmp_path: Path) -> None:
    for port in ("eighty", "80", "-1", "70000"):
        assert "PORT is" in refused("-m", "postmate.local.run", PORT=port, POSTMATE_DATA_DIR=str(tmp_path))


def test_database_that_does_not_answer(tmp_path: Path) -> None:
    own = {"DATABASE_URL": "postgresql://nobody:sesame@127.0.0.1:1/none", "REDIS_URL": os.environ["REDIS_URL"]}
    said = refused("-m", "postmate.local.run", **own, PORT=str(row_of_free_ports(3)), POSTMATE_DATA_DIR=str(tmp_path))
    assert "DATABASE_URL" in said
    assert "sesame" not in said


def test_data_directory_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    said = refused(
        "-m", "postmate.local.run", PORT=str(row_of_free_ports(3)), POSTMATE_DATA_DIR=str(tmp_path / "file" / "inside")
    )
    assert "POSTMATE_DATA_DIR names another place" in said
