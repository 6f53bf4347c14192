"""Servers that outlive who started them, and their end: run as a program of its own, with the standard library alone.

`run` and `become` turn into a program and into a server, as an ordinary user where root may not be one. As long as any
process of a server lives, the kernel keeps a lock on a file that has its number. `watch` and `guard` wait, without
asking, until those who hold a lock are gone, also by kill -9, and then end what they have left.
"""

import ctypes
import fcntl
import json
import os
import signal
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import IO

CLONE_NEWUSER = 0x10000000
# How each server is asked to end, and how it is made to. PostgreSQL: "fast", then "immediate".
ENDINGS = {"postgresql": (signal.SIGINT, signal.SIGQUIT), "redis": (signal.SIGTERM, signal.SIGKILL)}
PATIENCE_SECONDS = 20
GUARD_PATIENCE_SECONDS = 6


def main() -> None:
    os.umask(0o077)
    match sys.argv[1:]:
        case ["reach", who, *paths]:
            reach(who, *paths)
        case ["run", who, *command]:
            enter(who)
            os.execv(command[0], command)  # noqa: S606 – without a shell, on purpose
        case ["become", directory, name, who, *command]:
            become(Path(directory), name, who, command)
        case ["watch", directory, name]:
            watch(Path(directory), Path(name))
        case ["guard", directory]:
            guard(Path(directory))


# --- Who ------------------------------------------------------------------------------------------------------------


def enter(who: str) -> None:
    """Become `who`: "" (as now), "UID:GID" (root alone may), or "namespace:UID", a user namespace in which the present
    user has that number: the kernel goes on treating it as the present one, without root's power. Raises OSError."""
    if who.startswith("namespace:"):
        inner, uid, gid = int(who.partition(":")[2]), os.geteuid(), os.getegid()
        if ctypes.CDLL(None, use_errno=True).unshare(CLONE_NEWUSER):
            raise OSError(ctypes.get_errno(), "no user namespace")
        for file, text in (("setgroups", "deny"), ("uid_map", f"{inner} {uid} 1"), ("gid_map", f"{inner} {gid} 1")):
            Path("/proc/self", file).write_text(text)
    elif who:
        uid, gid = map(int, who.split(":"))
        os.setgroups([])
        os.setgid(gid)
        os.setuid(uid)


def reach(who: str, *paths: str) -> None:
    """Print the first directory or program that `who` cannot get into or run. Exit code 3: one cannot be `who` here."""
    try:
        enter(who)
    except OSError as error:
        sys.stdout.write(str(error.strerror))
        sys.exit(3)
    for path in map(Path, paths):
        for each in (*reversed(path.parents), path):
            if not os.access(each, os.X_OK):
                sys.stdout.write(str(each))
                sys.exit(4)


# --- Servers --------------------------------------------------------------------------------------------------------


def is_running(directory: Path, name: str) -> bool:
    """Whether any process of that server lives."""
    try:
        with (directory / f"{name}.lock").open() as lock:
            return is_held(lock)
    except FileNotFoundError:
        return False


def is_held(lock: IO[str]) -> bool:
    try:
        fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    fcntl.flock(lock, fcntl.LOCK_UN)
    return False


def become(directory: Path, name: str, who: str, command: list[str]) -> None:
    """Run a server that nobody waits for; its words go to NAME.log. Does nothing when it runs already."""
    os.chdir(directory)
    lock = os.open(f"{name}.lock", os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return
    log = os.open(f"{name}.log", os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    leave_who_started()
    os.ftruncate(lock, 0)
    os.write(lock, str(os.getpid()).encode())
    os.set_inheritable(lock, True)  # it and all its children hold the lock
    os.dup2(log, 1)
    os.dup2(log, 2)
    try:
        enter(who)
        os.execv(command[0], command)  # noqa: S606
    except OSError as error:
        os.write(2, f"{command[0]} cannot be run: {error.strerror}\n".encode())
        os._exit(1)


def leave_who_started() -> None:
    """Go on in a process of its own that is nobody's child, in no terminal's group, with nobody's input and output."""
    if os.fork():
        os._exit(0)
    os.setsid()
    nothing = os.open(os.devnull, os.O_RDWR)
    for number in (0, 1, 2):
        os.dup2(nothing, number)


def locks(directory: Path) -> dict[str, IO[str]]:
    """Those of the servers, open: good also when somebody has removed the directory."""
    return {name: (directory / f"{name}.lock").open("a+") for name in ENDINGS}


def end_servers(directory: Path, name: Path, opened: dict[str, IO[str]]) -> None:
    """Stop PostgreSQL and Redis, and wait until they have ended. For whoever has services.lock for themselves."""
    for server, lock in opened.items():
        end(lock, *ENDINGS[server])
    if name != directory:
        name.unlink(missing_ok=True)


def end(lock: IO[str], *signs: int) -> None:
    """Stop the server that holds that lock by the first sign that helps."""
    for sign in signs:
        if not is_held(lock):
            return
        with suppress(OSError, ValueError):
            lock.seek(0)
            os.kill(int(lock.read()), sign)
        wait(lambda: not is_held(lock), PATIENCE_SECONDS)


def wait(condition: Callable[[], bool], seconds: float) -> bool:
    """Whether it came true in time."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True


# --- Those who wait -------------------------------------------------------------------------------------------------


def watch(directory: Path, name: Path) -> None:
    """End the servers of a data directory as soon as nobody uses it. One process for each directory does.

    `name` is the directory itself, or the link that is its name for sockets, which then goes as well.
    """
    mine = (directory / "watch.lock").open("a")
    users, opened = (directory / "services.lock").open("a"), locks(directory)
    try:
        fcntl.flock(mine, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return
    leave_who_started()
    fcntl.flock(users, fcntl.LOCK_EX)
    end_servers(directory, name, opened)
    mine.close()  # first: whoever gets the other lock next starts the next watch


def guard(directory: Path) -> None:
    """End what `make run` or `make run-production` has left, should it be killed. The servers stay until then, for it
    inherits the runner's hold on them."""
    runner = (directory / "runner.lock").open("a")
    leave_who_started()
    fcntl.flock(runner, fcntl.LOCK_EX)
    state = directory / "running.json"
    try:
        groups = json.loads(state.read_text())["processes"].values()
    except (OSError, ValueError):
        return  # it has ended as it should
    end_groups([group for group in groups if group], GUARD_PATIENCE_SECONDS)
    state.unlink(missing_ok=True)


def end_groups(groups: list[int], seconds: float) -> None:
    """Ask process groups to end, and after some seconds make them."""
    for sign in (signal.SIGTERM, signal.SIGKILL):
        groups = [group for group in groups if signalled(group, sign)]
        wait(lambda: not any(signalled(group, 0) for group in groups), seconds)  # noqa: B023 – called in this round


def signalled(group: int, sign: int) -> bool:
    """Send it to a process group; 0 only asks. False when the group is gone."""
    try:
        os.killpg(group, sign)
    except (ProcessLookupError, PermissionError):
        return False
    return True


if __name__ == "__main__":
    main()
