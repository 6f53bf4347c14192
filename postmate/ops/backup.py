"""One file with everything that cannot be made again: the database, the images, and a manifest of what they held.

Dump, counts and the ledger's hash are of one moment: pg_dump reads the snapshot that the counting transaction exports.
The files of images are written before the commit that names them and never change, so copying them after that moment
misses none.
"""

import json
import os
import shutil
import subprocess
import tarfile
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime, timedelta
from datetime import time as datetime_time
from hashlib import file_digest, sha256
from io import BufferedReader, BytesIO
from pathlib import Path
from typing import IO, Any, cast

import psycopg
from django.conf import settings
from django.core.management import call_command
from django.db import connection
from django.db.migrations.executor import MigrationExecutor
from django.db.migrations.recorder import MigrationRecorder

from billing import ledger
from billing.models import RollUp
from billing.upkeep import verification
from kit.database import one_snapshot
from postmate.local import embedded

NAME_PATTERN = "postmate-*.tar"
MANIFEST, DUMP, MEDIA = "manifest.json", "database.dump", "media"
UNFINISHED = ".unfinished-"
ABANDONED_AFTER_SECONDS = 24 * 3_600  # no backup takes that long
# Stripe remembers purchases, and the keys of calls, by ids that were given after the backup. No row may get them again.
LEFT_OUT_IDS = 1_000_000


class BackupError(Exception):
    """It was not made, or not restored; the text says what to do."""


@dataclass(frozen=True, slots=True)
class Manifest:
    """What a backup holds, as it was at `made_at`."""

    made_at: str
    server_version: int  # of PostgreSQL, such as 180001
    migrations: list[str]  # applied ones, "billing.0001_initial"
    rows: dict[str, int]  # by table
    ledger_sha256: str
    dump_sha256: str
    media_files: int
    media_bytes: int


@dataclass(frozen=True, slots=True)
class Restored:
    manifest: Manifest
    is_migrated: bool  # the backup was of an older release
    expired_holds: int
    findings: list[verification.Finding]  # those with violations


def list_backups(folder: Path) -> list[Path]:
    """The finished backups, oldest first."""
    return sorted(folder.glob(NAME_PATTERN)) if folder.is_dir() else []


def is_due(folder: Path, *, at: datetime_time, now: datetime) -> bool:
    """Whether no backup was made since it was last `at` (a time of day in UTC)."""
    last = datetime.combine(now.date(), at, UTC)
    if last > now:
        last -= timedelta(days=1)
    newest = list_backups(folder)[-1:]
    return not newest or newest[0].stat().st_mtime < last.timestamp()


def write_backup(folder: Path, *, with_media: bool = True) -> tuple[Path, Manifest]:
    """Write a backup into `folder` and return where. Nobody ever sees half of one under its name.

    Only its owner may read the file: whoever has it has all personal data. Raises BackupError.
    """
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    _remove_abandoned(folder)
    work = Path(tempfile.mkdtemp(dir=folder, prefix=UNFINISHED))
    try:
        dump = work / DUMP
        facts = _dump_database(dump)
        media = list(_media_files(folder)) if with_media else []
        with dump.open("rb") as file:
            dump_sha256 = file_digest(file, "sha256").hexdigest()
        unfinished = work / "backup.tar"
        with unfinished.open("xb") as file:
            unfinished.chmod(0o600)
            manifest = _write_archive(file, dump, media, facts | {"dump_sha256": dump_sha256})
            file.flush()
            os.fsync(file.fileno())
        path = folder / f"postmate-{datetime.fromisoformat(manifest.made_at):%Y%m%dT%H%M%SZ}.tar"
        unfinished.replace(path)
        _sync_folder(folder)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return path, manifest


def remove_old_backups(folder: Path, *, keep: int) -> list[Path]:
    """Delete all but the newest `keep`; returns what is gone."""
    old = list_backups(folder)[:-keep]
    for path in old:
        path.unlink()
    return old


def read_manifest(path: Path) -> Manifest:
    """What a backup says of itself. Raises BackupError when it is not a backup, or not whole."""
    try:
        with tarfile.open(path, "r:") as archive:
            return Manifest(**json.load(_member(archive, MANIFEST)))
    except (OSError, tarfile.TarError, KeyError, ValueError, TypeError) as error:
        raise BackupError(f"{path} is no whole backup: {error}") from error


def restore(path: Path, *, with_media: bool = True) -> Restored:
    """Fill the empty database and MEDIA_ROOT from a backup, release holds that are over, and check the books.

    Nothing is overwritten: a database with tables is refused, a file that is there stays. The database comes in one
    transaction: killed, it is empty again and the same call begins anew. Speaks to nobody. Raises BackupError.
    """
    manifest = read_manifest(path)
    _require_known_migrations(manifest)
    _require_empty_database()
    with tarfile.open(path, "r:") as archive:
        if file_digest(_member(archive, DUMP), "sha256").hexdigest() != manifest.dump_sha256:
            raise BackupError(f"The database in {path} is not what was written there: the file is damaged.")
        if with_media:
            _extract_media(archive)
        _load_database(_member(archive, DUMP))
    with one_snapshot():
        if (_count_rows(), _ledger_sha256()) != (manifest.rows, manifest.ledger_sha256):
            raise BackupError("What was restored is not what the manifest says. Empty the database and do it again.")
    with connection.cursor() as cursor:
        cursor.execute(
            """SELECT setval(format('%%I.%%I', schemaname, sequencename)::regclass, coalesce(last_value, 0) + %s)
                 FROM pg_sequences""",
            [LEFT_OUT_IDS],
        )
        cursor.execute("ANALYZE")
    is_older = bool(pending_migrations())
    if is_older:
        call_command("migrate", interactive=False, verbosity=0)
    # Transaction ids were those of the other server: a new one is at a low number, and would wait for years.
    RollUp.objects.update(sealing_until=None, sealing_xid=None)
    # Their operations ended long ago, here or not at all. Law 9; killed in between, beat's task does the rest.
    expired_holds = 0
    while expired := ledger.expire_reservations():
        expired_holds += expired
    findings = [finding for finding in verification.verify() if finding.violations]
    return Restored(manifest, is_older, expired_holds, findings)


# --- PostgreSQL -----------------------------------------------------------------------------------------------------


def _program(name: str) -> str:
    """pg_dump or pg_restore: the embedded server's, whose version is the server's, else the PATH's."""
    path = embedded.postgres_program(name) or shutil.which(name)
    if path is None:
        raise BackupError(
            f"There is no {name} on the PATH. Install PostgreSQL's client programs, as new as its server."
        )
    return path


def _environment() -> dict[str, str]:
    """How to reach the database, in the variables of PostgreSQL's programs: a command line would show the password."""
    variables = {
        option.keyword.decode(): option.envvar.decode()
        for option in psycopg.pq.Conninfo.get_defaults()
        if option.envvar is not None and option.keyword != b"options"  # ours are for short transactions
    }
    parameters = connection.get_connection_params()
    given = {variables[name]: str(parameters[name]) for name in parameters.keys() & variables if parameters[name]}
    return {**os.environ, **given}


def _dump_database(path: Path) -> dict[str, Any]:
    """Dump the database into `path`; returns the manifest's facts about it."""
    with one_snapshot():
        with connection.cursor() as cursor:
            cursor.execute("SET LOCAL idle_in_transaction_session_timeout TO 0")  # pg_dump may take hours
            cursor.execute("SELECT pg_export_snapshot(), clock_timestamp(), current_setting('server_version_num')::int")
            snapshot, made_at, server_version = cursor.fetchone()
        command = [_program("pg_dump"), "--format=custom", "--no-owner", "--no-privileges", f"--snapshot={snapshot}"]
        _run(command, f"--file={path}")
        return {
            "made_at": made_at.astimezone(UTC).isoformat(timespec="seconds"),
            "server_version": server_version,
            "migrations": sorted(f"{app}.{name}" for app, name in MigrationRecorder(connection).applied_migrations()),
            "rows": _count_rows(),
            "ledger_sha256": _ledger_sha256(),
        }


def _load_database(dump: IO[bytes]) -> None:
    command = [_program("pg_restore"), "--single-transaction", "--exit-on-error", "--no-owner", "--no-privileges"]
    _run(command, f"--dbname={connection.settings_dict['NAME']}", stdin=dump)


def _run(command: list[str], *arguments: str, stdin: IO[bytes] | None = None) -> None:
    process = subprocess.Popen(
        [*command, *arguments],
        env=_environment(),
        stdin=subprocess.PIPE if stdin else subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )
    with process:
        if stdin and process.stdin:
            with suppress(BrokenPipeError):  # it gave up, and says why
                shutil.copyfileobj(stdin, process.stdin, 1 << 20)
            with suppress(BrokenPipeError):
                process.stdin.close()
        complaint = process.stderr.read().decode(errors="replace") if process.stderr else ""
    if process.returncode:
        raise BackupError(f"{Path(command[0]).name} failed: {complaint.strip()}")


def _count_rows() -> dict[str, int]:
    rows = {}
    with connection.cursor() as cursor:
        for table in sorted(connection.introspection.table_names(cursor)):
            cursor.execute(f"SELECT count(*) FROM {connection.ops.quote_name(table)}")  # noqa: S608 – names of tables
            rows[table] = cursor.fetchone()[0]
    return rows


def _ledger_sha256() -> str:
    """Of all ledger rows in the order of their ids. Call it in a snapshot."""
    digest = sha256()
    with connection.cursor() as cursor:
        cursor.execute("SET LOCAL DateStyle TO 'ISO'")  # the text of a row is the same on every server
        with cursor.copy("COPY (SELECT * FROM billing_tokentransaction ORDER BY id) TO STDOUT") as rows:
            for block in rows:
                digest.update(block)
    return digest.hexdigest()


def _require_empty_database() -> None:
    with connection.cursor() as cursor:
        tables = connection.introspection.table_names(cursor)
    if tables:
        raise BackupError(
            f"The database {connection.settings_dict['NAME']!r} has {len(tables)} tables; a backup goes into an empty "
            "one. Make a new database and name it in DATABASE_URL."
        )


def _require_known_migrations(manifest: Manifest) -> None:
    known = {f"{app}.{name}" for app, name in MigrationExecutor(None).loader.disk_migrations}
    applied_apps = {name.partition(".")[0] for name in known}
    unknown = [name for name in manifest.migrations if name not in known and name.partition(".")[0] in applied_apps]
    if unknown:
        raise BackupError(f"The backup is of a newer release ({', '.join(unknown)}). Install that one first.")


def pending_migrations() -> list[str]:
    executor = MigrationExecutor(connection)
    plan = executor.migration_plan(executor.loader.graph.leaf_nodes())
    return [f"{migration.app_label}.{migration.name}" for migration, _ in plan]


# --- Files ----------------------------------------------------------------------------------------------------------


def _media_files(backups: Path) -> Iterator[Path]:
    root = Path(settings.MEDIA_ROOT)
    for path in sorted(root.rglob("*")):
        is_hidden = any(part.startswith(".") for part in path.relative_to(root).parts)  # unfinished ones
        if path.is_file() and not is_hidden and backups.resolve() not in path.resolve().parents:
            yield path


def _write_archive(file: IO[bytes], dump: Path, media: list[Path], facts: dict[str, Any]) -> Manifest:
    """Write the dump, the files of images and, last of all, the manifest: an archive that was cut off has none."""
    files = size_bytes = 0
    with tarfile.open(fileobj=file, mode="w") as archive:
        archive.add(dump, DUMP)
        for path in media:
            with suppress(FileNotFoundError):  # somebody has deleted their piece since we looked
                with path.open("rb") as content:
                    member = archive.gettarinfo(
                        arcname=str(Path(MEDIA) / path.relative_to(settings.MEDIA_ROOT)), fileobj=content
                    )
                    archive.addfile(member, content)
                files += 1
                size_bytes += member.size
        manifest = Manifest(**facts, media_files=files, media_bytes=size_bytes)
        text = json.dumps(asdict(manifest), indent=2).encode()
        member = tarfile.TarInfo(MANIFEST)
        member.size, member.mtime, member.mode = len(text), int(time.time()), 0o600
        archive.addfile(member, BytesIO(text))
    return manifest


def _member(archive: tarfile.TarFile, name: str) -> BufferedReader:
    member = archive.extractfile(name)
    if member is None:
        raise KeyError(name)
    return cast(BufferedReader, member)  # typeshed promises less


def _extract_media(archive: tarfile.TarFile) -> None:
    root = Path(settings.MEDIA_ROOT)
    for member in archive:
        inner = Path(member.name)
        if inner.parts[:1] == (MEDIA,) and member.isfile() and not (root / inner.relative_to(MEDIA)).exists():
            member.name = str(inner.relative_to(MEDIA))
            archive.extract(member, root, filter="data")


def _sync_folder(folder: Path) -> None:
    """So that the new name, too, outlives a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove_abandoned(folder: Path) -> None:
    """What runs that were killed have left."""
    for path in folder.glob(f"{UNFINISHED}*"):
        if path.stat().st_mtime < time.time() - ABANDONED_AFTER_SECONDS:
            shutil.rmtree(path, ignore_errors=True)
