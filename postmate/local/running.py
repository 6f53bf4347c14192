"""What runs on a data directory: one `make run` or `make run-production` at a time, and what others must know of it.

The runner holds a lock on `runner.lock` for as long as it lives; `running.json` says who it is, where it can be
reached and which processes are its own. Should it be killed, `keeper.py guard` ends these.
"""

import fcntl
import json
import os
import shlex
import signal
import sys
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

import environ

from postmate.local import embedded, keeper
from postmate.local.embedded import PROJECT

DEVELOPMENT, PRODUCTION = PROJECT / ".postmate", PROJECT / ".postmate" / "production"
STOP_SECONDS = 120  # production lets texts come to their end

_lock: IO[str] | None = None
_state: dict[str, Any] = {}


def main() -> None:
    """`make stop`: end what runs, on the data that POSTMATE_DATA_DIR names or else on both of the usual ones."""
    environ.Env.read_env(PROJECT / ".env")
    named = os.environ.get("POSTMATE_DATA_DIR")
    directories = [Path(named).absolute()] if named else [DEVELOPMENT, PRODUCTION]
    stopped = [directory for directory in directories if stop(directory)]
    if not stopped:
        sys.stdout.write(f"Nothing runs on the data in {' or '.join(map(str, directories))}.\n")


def hold(command: str, *, address: str, port: int) -> None:
    """Be the only one that runs here, until the end of this process. Leaves with the other's address if there is one.

    Files are made for their owner alone from then on.
    """
    global _lock
    os.umask(0o077)
    directory = embedded.data_dir()
    _lock = lock = (directory / "runner.lock").open("w")
    # Free, or kept for a moment by whatever clears up after one that was killed.
    keeper.wait(lambda: _take(lock) or _lives(_read(directory)), 2 * keeper.GUARD_PATIENCE_SECONDS)
    if not _take(lock):
        other = _read(directory)
        sys.exit(
            f"`{other.get('command', 'make run')}` runs already on the data in {directory}:\n"
            f"  {other.get('address', '')}  (process {other.get('pid')})\n"
            f"Ctrl-C there ends it, or `{with_place('make stop')}`. Another beside it needs its own data and ports:\n"
            f"  POSTMATE_DATA_DIR={shlex.quote(f'{directory}-2')} PORT={port + 100} {command}"
        )
    tell(command=command, address=address, port=port, pid=os.getpid(), processes={})


def _take(lock: IO[str]) -> bool:
    with suppress(BlockingIOError):
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    return False


def _lives(state: dict[str, Any]) -> bool:
    with suppress(KeyError, ProcessLookupError):
        os.kill(state["pid"], 0)
        return True
    return False


def tell(**changes: Any) -> None:
    """Write down, for its owner alone, what has changed: `processes` has the numbers of process groups by name."""
    _state.update(changes)
    file = embedded.data_dir() / "running.json"
    new = file.with_suffix(".new")
    new.write_text(json.dumps(_state))
    new.replace(file)


def forget() -> None:
    """All has ended as it should; nothing is left to be cleared up."""
    (embedded.data_dir() / "running.json").unlink(missing_ok=True)


def read(directory: Path | None = None) -> dict[str, Any]:
    """What runs on that data, by default on ours: `command`, `address`, `port`, `pid`, `processes`. Empty: nothing."""
    directory = directory or embedded.data_dir()
    try:
        with (directory / "runner.lock").open() as lock:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return _read(directory)
    except OSError:
        pass
    return {}


def _read(directory: Path) -> dict[str, Any]:
    with suppress(OSError, ValueError):
        return dict(json.loads((directory / "running.json").read_text()))
    return {}


def stop(directory: Path) -> bool:
    """Ask what runs there to end, and wait for it. False when nothing does."""
    state = read(directory)
    if not state:
        return False
    with suppress(ProcessLookupError):
        os.kill(state["pid"], signal.SIGTERM)
    if not keeper.wait(lambda: not read(directory), STOP_SECONDS):
        sys.exit(f"`{state['command']}` (process {state['pid']}) has not ended within {STOP_SECONDS} s.")
    sys.stdout.write(f"`{state['command']}` at {state['address']} has ended.\n")
    return True


def with_place(command: str) -> str:
    """A command as it has to be typed to reach this data."""
    directory = embedded.data_dir()
    is_usual = directory in (DEVELOPMENT, PRODUCTION)
    return command if is_usual else f"POSTMATE_DATA_DIR={shlex.quote(str(directory))} {command}"


if __name__ == "__main__":
    main()
