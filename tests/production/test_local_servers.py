"""The servers that come out of wheels: they change nothing outside their data, let nobody else in, and end.

Where the tests are root's, two other users are tried at once, one of whom the system has no name for.
"""

import os
import pwd
import shutil
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import unquote, urlsplit

import psycopg
import pytest
import redis

from postmate.local import keeper
from tests.production.conftest import SHELL, wait_until
from tests.servers import PROJECT

IS_ROOT = os.geteuid() == 0
NAMELESS, NAMED = (20_001, pwd.getpwnam("daemon").pw_uid) if IS_ROOT else (os.geteuid(), os.geteuid())
# Everything is imported before the user changes, who may not be allowed to read this Python.
USE = """
import os, secrets, sys, psutil, psycopg, redis
from postmate.local import embedded
uid, sys.executable = int(sys.argv[1]), sys.argv[2]
if uid != os.geteuid():
    os.setgroups([]); os.setgid(uid); os.setuid(uid)
exec(sys.argv[3])
embedded.configure_environment()
print(os.environ["DATABASE_URL"], os.environ["REDIS_URL"], flush=True)
input()
"""
NO_NAMESPACES = """
reach = embedded._reach
embedded._reach = lambda who, *rest: (False, "") if who.startswith("namespace") else reach(who, *rest)
"""


def python_of_all() -> str:
    """One that every user may run."""
    real = Path(sys.executable).resolve()
    is_open = all(folder.stat().st_mode & 0o001 for folder in real.parents)
    return sys.executable if is_open else shutil.which("python3", path="/usr/bin:/usr/local/bin") or sys.executable


class User:
    """Somebody whose process uses the servers on the data in `directory`."""

    def __init__(self, directory: Path, uid: int, before: str = "") -> None:
        self.directory = directory
        command = [sys.executable, "-c", USE, str(uid), python_of_all(), before]
        environment = SHELL | {"POSTMATE_DATA_DIR": str(directory)}
        self.process = subprocess.Popen(
            command, cwd=PROJECT, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=subprocess.PIPE, text=True, umask=0o022,
        )  # fmt: skip

    def urls(self) -> tuple[str, str]:
        """Of the database and of Redis, as soon as they run."""
        assert self.process.stdout
        line = self.process.stdout.readline()
        assert line, self.process.communicate()[1]
        database, memory = line.split()
        return database, memory

    def leave(self) -> None:
        _, said = self.process.communicate("\n", timeout=60)
        assert self.process.returncode == 0, said

    def refused(self) -> str:
        """What is said to somebody who does not get in."""
        _, said = self.process.communicate(timeout=60)
        assert self.process.returncode == 1
        assert "Traceback" not in said
        return said


@pytest.fixture
def place() -> Iterator[Path]:
    """A directory that every user can reach; pytest's own are its user's alone."""
    with tempfile.TemporaryDirectory(prefix="postmate-place-") as directory:
        Path(directory).chmod(0o755)
        yield Path(directory)


def runs(directory: Path) -> bool:
    return any(keeper.is_running(directory, name) for name in keeper.ENDINGS)


def modes_above(directory: Path) -> dict[Path, tuple[int, int]]:
    return {each: (each.stat().st_mode, each.stat().st_uid) for each in directory.parents}


def open_to_others(directory: Path) -> list[Path]:
    """What is there, the directory itself included, and not for its owner alone."""
    return [each for each in (directory, *directory.rglob("*")) if each.lstat().st_mode & 0o077]


@contextmanager
def as_user(uid: int) -> Iterator[None]:
    """This process, for a moment."""
    if IS_ROOT:
        os.seteuid(uid)
    try:
        yield
    finally:
        if IS_ROOT:
            os.seteuid(0)


def test_two_users_in_strange_places(place: Path) -> None:
    """A space, signs that mean something in URLs and lists, other alphabets, more than a socket's address holds."""
    long, strange = place / ("l" * 90) / ("m" * 90), place / "Ä b, c;%41'\"#?@数 $HOME"
    users = []
    for directory, uid in ((long, NAMELESS), (strange, NAMED)):
        directory.mkdir(parents=True)
        directory.parent.chmod(0o755)
        directory.chmod(0o755)  # as an older edition has left it
        (directory / "services.lock").touch()
        (directory / "services.lock").chmod(0o644)
        for path in (directory, directory / "services.lock"):
            os.chown(path, uid, uid if IS_ROOT else -1)
        users.append((modes_above(directory), User(directory, uid)))
    for (above, user), uid, other in zip(users, (NAMELESS, NAMED), (NAMED, NAMELESS), strict=True):
        database, memory = user.urls()
        with as_user(uid), psycopg.connect(database) as connection:
            row = connection.execute("SELECT current_setting('data_directory'), upper('ä')").fetchone()
            assert row == (str(user.directory / "postgresql"), "Ä")
        with as_user(uid), redis.Redis.from_url(memory) as client:
            assert client.config_get("dir") == {"dir": str(user.directory)}
        assert modes_above(user.directory) == above
        assert open_to_others(user.directory) == []
        if IS_ROOT:
            with as_user(other), pytest.raises(psycopg.OperationalError, match="Permission denied"):
                psycopg.connect(database)
            with as_user(other), pytest.raises(redis.ConnectionError), redis.Redis.from_url(memory) as client:
                client.ping()
    (_, killed), (_, leaving) = users
    name = Path(unquote(urlsplit(database).hostname or "")).parent
    leaving.leave()
    assert not runs(strange), "The last one to leave has stopped them."
    assert not name.is_symlink()
    killed.process.kill()
    wait_until(lambda: not runs(long), "the servers end although nobody was left to stop them")


@pytest.mark.skipif(not IS_ROOT, reason="NOT TESTED: root alone can become another user, and is not here.")
def test_root_without_namespaces(place: Path) -> None:
    """A container may forbid them. Where it allows them again, what another user has made (as older editions did) is
    used on, and what cannot be used is refused for its true reason."""
    data, above = place / "data", modes_above(place / "data")
    first = User(data, 0, NO_NAMESPACES)
    database, _ = first.urls()
    with psycopg.connect(database, autocommit=True) as connection:
        connection.execute("CREATE TABLE kept AS SELECT 7 AS number")
    assert (data / "postgresql").stat().st_uid == pwd.getpwnam("nobody").pw_uid
    assert stat.S_IMODE(data.stat().st_mode) == 0o710
    assert [each for each in open_to_others(data) if each != data] == []
    first.leave()
    closed = place / "closed"
    closed.mkdir(mode=0o700)
    assert f"cannot reach {closed}" in User(closed / "data", 0, NO_NAMESPACES).refused()

    (data / "postgresql" / "postmaster.pid").write_text(f"{os.getpid()}\n")  # left by a crash; the number is ours now
    second = User(data, 0)
    database, _ = second.urls()
    with psycopg.connect(database) as connection:
        assert connection.execute("SELECT number FROM kept").fetchone() == (7,)
    assert (data / "postgresql" / "base").stat().st_uid == 0
    second.leave()
    assert modes_above(data) == above

    for spoil, advice in (
        (lambda: (data / "postgresql" / "PG_VERSION").write_text("16\n"), "was made by PostgreSQL 16"),
        (lambda: (data / "postgresql" / "PG_VERSION").unlink(), "is no PostgreSQL's data"),
        (lambda: os.chown(data, NAMED, -1), "belongs to daemon"),
        (lambda: os.chown(data, 0, -1) or data.chmod(0o1777), "a place of its own"),  # type: ignore[func-returns-value]
    ):
        spoil()
        assert advice in User(data, 0).refused()
    (place / "mine").touch()
    place_mode = place.stat().st_mode
    assert "a place of its own" in User(place, 0).refused()
    assert place.stat().st_mode == place_mode


def test_the_log_says_why(tmp_path: Path) -> None:
    """Its end is shown, and advice where its words are known."""
    user = User(tmp_path, os.geteuid())
    user.urls()
    user.leave()
    configuration = tmp_path / "postgresql" / "postgresql.auto.conf"
    configuration.write_text("no_such_setting = 1\n")
    said = User(tmp_path, os.geteuid()).refused()
    assert 'unrecognized configuration parameter "no_such_setting"' in said
    assert "disk" not in said
    configuration.write_text("")
    next((tmp_path / "postgresql" / "pg_wal").glob("0*")).write_bytes(b"")
    assert "Restore the last backup" in User(tmp_path, os.geteuid()).refused()
