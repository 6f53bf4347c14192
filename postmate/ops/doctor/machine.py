"""This machine: Python, settings, disks, the backup."""

import shutil
import sys
from importlib import metadata
from pathlib import Path

from django.conf import settings
from django.core import checks
from django.utils import timezone
from packaging.requirements import Requirement

from postmate.ops import backup
from postmate.ops.checks import existing, is_writable
from postmate.ops.doctor.findings import Outcomes, ok, problem, warning

LOW_DISK, LOW_DISK_BYTES = 0.10, 1 << 30


def python_and_packages() -> Outcomes:
    """The interpreter, and each package in the version that was locked and tested."""
    lock = settings.BASE_DIR / "requirements" / "production.txt"
    wanted = [
        Requirement(line.rstrip("\\ "))
        for line in lock.read_text().splitlines()
        if line and line[0] not in "# " and "==" in line
    ]
    other = []
    for requirement in wanted:
        if requirement.marker is None or requirement.marker.evaluate():
            version = next(iter(requirement.specifier)).version
            installed = _installed_version(requirement.name)
            if installed != version:
                other.append(f"{requirement.name} {installed or 'missing'} instead of {version}")
    if other:
        yield warning(
            f"Not the locked versions: {', '.join(other[:5])}{' …' if other[5:] else ''}.",
            "pip install --require-hashes -r requirements/production.txt, then restart.",
        )
    else:
        yield ok(f"Python {sys.version.split()[0]}, {len(wanted)} packages as locked.")


def _installed_version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def mode() -> Outcomes:
    if settings.DEBUG:
        yield ok("Development (DEBUG=true).")
    elif settings.REHEARSAL:
        yield ok("Rehearsal: production's rules, no real money.")
    else:
        yield ok("Production.")


def settings_are_sound() -> Outcomes:
    """What `manage.py check --deploy` says; in development without the rules of production."""
    found = checks.run_checks(include_deployment_checks=not settings.DEBUG)
    for message in found:
        if message.level >= checks.WARNING and not message.is_silenced():
            make = problem if message.level >= checks.ERROR else warning
            yield make(f"{message.msg} ({message.id})", message.hint or "docs/SECURITY.md says more.")
    if not any(message.level >= checks.WARNING and not message.is_silenced() for message in found):
        yield ok("The checks of settings find nothing." if settings.DEBUG else "check --deploy finds nothing.")


def disks() -> Outcomes:
    """Space where we write: data, images, backups."""
    seen = set()
    for folder in (settings.DATA_DIR, Path(settings.MEDIA_ROOT), settings.BACKUP_DIR):
        there = existing(folder)
        if there.stat().st_dev in seen:
            continue
        seen.add(there.stat().st_dev)
        usage = shutil.disk_usage(there)
        text = f"{usage.free / (1 << 30):.1f} GiB of {usage.total / (1 << 30):.1f} are free under {there}."
        if usage.free < LOW_DISK_BYTES:
            yield problem(text, "Make room now: without it images, exports and backups fail.")
        elif usage.free < LOW_DISK * usage.total:
            yield warning(text, "Make room, or give it a larger disk.")
        else:
            yield ok(text)


def images_can_be_written() -> Outcomes:
    folder = Path(settings.MEDIA_ROOT)
    if is_writable(folder):
        yield ok(f"{folder} can be written.")
    else:
        yield problem(f"{folder} cannot be written by this user.", "Give it to the user that the servers run as.")


def last_backup() -> Outcomes:
    if settings.BACKUP_MAX_AGE_HOURS == 0:
        yield ok("Backups are made by other means (BACKUP_MAX_AGE_HOURS=0).")
        return
    backups = backup.list_backups(settings.BACKUP_DIR)
    hours = (timezone.now().timestamp() - backups[-1].stat().st_mtime) / 3_600 if backups else None
    if hours is not None and hours <= settings.BACKUP_MAX_AGE_HOURS:
        yield ok(f"{backups[-1].name} is {hours:.0f} hours old.")
        return
    text = f"The newest backup is {hours:.0f} hours old." if hours is not None else "There is no backup."
    if settings.DEBUG:
        yield ok(f"{text} Development needs none.")
    else:
        yield warning(
            f"{text} ({settings.BACKUP_DIR})",
            "Run `manage.py backup --keep 14` every night, and rehearse a restore (docs/OPERATIONS.md).",
        )
