"""Everything that belongs to a person, in all layers: as a ZIP to download, and to be anonymised."""

import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from io import TextIOWrapper
from itertools import chain
from shutil import copyfileobj
from typing import IO, Any
from zipfile import ZIP_DEFLATED, ZIP_STORED, ZipFile, ZipInfo

import structlog
from django.core.cache import cache
from django.core.serializers.json import DjangoJSONEncoder
from django.db import transaction
from django.utils import timezone

from accounts import own_data as accounts_data
from accounts import teams
from accounts.models import User
from ai_ops.models import Chat, ContentPiece, GeneratedImage, ImageBatch, ImagePrompt, Project
from ai_ops.operations import FILE_ENDINGS
from billing.history.exports import csv_lines
from billing.upkeep import own_data as billing_data
from billing.upkeep.own_data import NotNow
from kit.refusal import Refusal

logger = structlog.get_logger(__name__)

DOWNLOADS_A_DAY = 5
DAY_SECONDS = 86_400
ROWS_AT_A_TIME = 500  # texts are long

Row = Mapping[str, Any]

README = """What Postmate keeps about {email}, made on {now:%-d %B %Y at %H:%M} UTC.

profile.json                 who you are: name, addresses, workspaces, two-factor, signed-in browsers
account.json                 your token account and your e-mail preferences
api-keys.json                your API keys by name; the keys themselves are kept nowhere
ledger, tokens-with-an-end, usage, purchases, refunds-and-disputes, notifications
                             each as .json and as .csv; times are UTC, tokens and cents are whole numbers
projects.json, pieces.json   your projects; your texts with all their versions
chats.json                   your chats, with each question and answer
image-prompts.json           the descriptions of images that were written for you
images.json, images/         your images: how each was asked for, and the files

In the .csv files, a text that a spreadsheet would take for a formula begins with an apostrophe.
Passwords, keys and codes are not in here, nor is your card: Stripe keeps it, we know its last four digits.
"""


class TooManyDownloads(Refusal):
    """Nothing was made. `message` is for the person."""

    http_status = 429


# --- To take along --------------------------------------------------------------------------------------------------


def take_download(*, user_id: int) -> None:
    """Count a download against the day's limit. Raises TooManyDownloads, also while nobody can count."""
    key = f"data-downloads:{user_id}:{timezone.now():%Y-%m-%d}"
    try:
        # `add` takes a key once, however many ask for it at the same moment.
        is_taken = any(cache.add(f"{key}:{number}", 1, DAY_SECONDS) for number in range(DOWNLOADS_A_DAY))
    except Exception as error:  # whatever the cache raises
        logger.warning("A download could not be counted", user_id=user_id, error=error)
        raise TooManyDownloads("We cannot make it just now. Try again in a few minutes.") from error
    if not is_taken:
        raise TooManyDownloads(f"You made {DOWNLOADS_A_DAY} downloads today. Tomorrow you can make another one.")


def write_archive(user: User, file: IO[bytes]) -> None:
    """Write everything that is the user's to `file`, as a ZIP. Memory stays small however much it is."""
    with ZipFile(file, "w", ZIP_DEFLATED) as archive:
        archive.writestr("README.txt", README.format(email=user.email, now=timezone.now()))
        _write_json(archive, "profile", accounts_data.describe_person(user))
        _write_json(archive, "account", billing_data.describe_account(user))
        _write_rows(archive, "api-keys", accounts_data.list_api_keys(user))
        for as_csv in (False, True):  # read twice: a row of a million is kept nowhere
            for name, (columns, rows) in billing_data.list_tables(user).items():
                if as_csv:
                    _write_csv(archive, name, columns, rows)
                else:
                    _write_rows(archive, name, rows)
        for name, content in _list_content(user).items():
            _write_rows(archive, name, content)
        for image in GeneratedImage.objects.filter(batch__author=user).order_by("pk").iterator(ROWS_AT_A_TIME):
            _write_image(archive, image)


def _list_content(user: User) -> dict[str, Iterator[Row]]:
    return {
        "projects": _flat(Project.objects.filter(workspace__owner=user), "id", "name", "created_at"),
        "pieces": _nested(
            ContentPiece.objects.filter(author=user),
            ("id", "project_id", "source_id", "title", "topic", "body", "state", "created_at", "updated_at"),
            "versions",
            ("number", "origin", "note", "body", "is_used", "usage_id", "created_at"),
        ),
        "chats": _nested(
            Chat.objects.filter(author=user),
            ("id", "project_id", "title", "created_at", "updated_at"),
            "turns",
            ("id", "question", "answer", "state", "usage_id", "created_at"),
        ),
        "image-prompts": _flat(
            ImagePrompt.objects.filter(author=user),
            *("id", "project_id", "idea", "style", "text", "state", "usage_id", "created_at"),
        ),
        "images": _flat(
            ImageBatch.objects.filter(author=user),
            *("id", "project_id", "prompt", "style", "size", "quality", "count", "state", "usage_id", "created_at"),
        ),
    }


def _flat(rows: Any, *fields: str) -> Iterator[Row]:
    return rows.order_by("pk").values(*fields).iterator(ROWS_AT_A_TIME)


def _nested(rows: Any, fields: tuple[str, ...], inner: str, inner_fields: tuple[str, ...]) -> Iterator[Row]:
    for row in rows.order_by("pk").iterator(ROWS_AT_A_TIME):
        yield {
            **{field: getattr(row, field) for field in fields},
            inner: list(getattr(row, inner).order_by("pk").values(*inner_fields)),
        }


def _write_json(archive: ZipFile, name: str, value: Row) -> None:
    archive.writestr(f"{name}.json", json.dumps(value, cls=DjangoJSONEncoder, ensure_ascii=False, indent=2))


def _write_rows(archive: ZipFile, name: str, rows: Iterable[Row]) -> None:
    """A JSON list with a row on each line."""
    with _text_file(archive, f"{name}.json") as file:
        separator = "[\n"
        for row in rows:
            file.write(separator + json.dumps(row, cls=DjangoJSONEncoder, ensure_ascii=False))
            separator = ",\n"
        file.write("\n]\n" if separator == ",\n" else "[]\n")


def _write_csv(archive: ZipFile, name: str, columns: tuple[str, ...], rows: Iterable[Row]) -> None:
    cells = ([_cell(row[column]) for column in columns] for row in rows)
    with _text_file(archive, f"{name}.csv") as file:
        file.writelines(csv_lines(chain([columns], cells)))


def _text_file(archive: ZipFile, name: str) -> TextIOWrapper:
    # force_zip64: how large it becomes is known at its end.
    return TextIOWrapper(archive.open(name, "w", force_zip64=True), encoding="utf-8", newline="")


def _cell(value: Any) -> Any:
    if isinstance(value, dict | list):
        return json.dumps(value, cls=DjangoJSONEncoder, ensure_ascii=False) if value else ""
    return value


def _write_image(archive: ZipFile, image: GeneratedImage) -> None:
    name = f"images/{image.batch_id}-{image.position}.{FILE_ENDINGS[image.media_type]}"
    entry = ZipInfo(name, date_time=timezone.now().timetuple()[:6])
    entry.compress_type = ZIP_STORED  # images are compressed already
    with (
        suppress(FileNotFoundError),  # a lost file keeps nobody from the others
        image.file.open("rb") as source,
        archive.open(entry, "w", force_zip64=True) as target,
    ):
        copyfileobj(source, target)


# --- Anonymising ----------------------------------------------------------------------------------------------------


def anonymize_user(*, user_id: int) -> None:
    """Close the user's account for ever and take the person out of everything that stays.

    What goes: name, addresses, password, sessions, keys, two-factor, notifications, projects with all texts, chats and
    images, the card and the customer at Stripe. What stays, of nobody: the ledger, purchases and usage in numbers, and
    the balance, which nobody can spend any more.

    Raises NotNow while operations run or a payment is under way, and for admins, whom the ledger names for their
    grants; then nothing is changed, except that payment pages nobody paid on may have been closed. Calls Stripe:
    never inside a transaction (law 7). Once it has returned, the person is gone; what Stripe or the disk has not
    deleted by then, the sweeps delete. Twice changes nothing more.
    """
    _require_plain_user(User.objects.get(pk=user_id))
    _require_no_last_owner(user_id)
    billing_data.close_open_checkouts(user_id=user_id)
    billing_data.find_customers(user_id=user_id)
    with transaction.atomic(durable=True):
        # Under the account's lock no operation begins: the balance and what is running cannot change meanwhile.
        account = billing_data.lock_account(user_id=user_id)
        user = User.objects.select_for_update().get(pk=user_id)
        _require_plain_user(user)
        try:
            teams.leave_all(user=user)  # while somebody still knows their addresses
        except teams.TeamError as error:
            raise NotNow(error.message) from error
        billing_data.anonymize_account(account)
        accounts_data.anonymize_person(user)
    logger.info("A person was anonymised", user_id=user_id)
    try:
        erase_content(user_id=user_id)
    except Exception:  # the person is gone already; their work follows with the next sweep
        logger.exception("Content was not erased yet", user_id=user_id)


def _require_no_last_owner(user_id: int) -> None:
    try:
        teams.require_no_last_owner(user_id=user_id)
    except teams.TeamError as error:
        raise NotNow(error.message) from error


def _require_plain_user(user: User) -> None:
    if user.is_admin:
        raise NotNow(
            "You are an admin: the ledger names who gave tokens to whom. "
            "Have a superadmin take that role from you first."
        )


def erase_content(*, user_id: int) -> None:
    """Delete an anonymised user's projects with all that is in them, image files first, and their chats in teams. What
    else they made in a team is the team's.

    A file goes before the row that names it: interrupted anywhere, the next call finds what is left.
    """
    user = User.objects.get(pk=user_id, anonymised_at__isnull=False)
    for model in (Chat, ImagePrompt):
        model.objects.filter(author=user).delete()
    own_images = GeneratedImage.objects.filter(batch__author=user, batch__project__workspace__owner=user)
    for image in own_images.iterator(ROWS_AT_A_TIME):
        image.file.delete(save=False)
        image.delete()
    ContentPiece.objects.filter(author=user, project__workspace__owner=user).delete()
    ImageBatch.objects.filter(author=user, project__workspace__owner=user).delete()
    Project.objects.filter(workspace__owner=user).delete()


def sweep_content(*, limit: int = 20) -> int:
    """Erase what was left of anonymised users when it was interrupted. Returns for how many people."""
    left = User.objects.filter(anonymised_at__isnull=False, workspaces__projects__isnull=False).distinct()
    user_ids = list(left.values_list("pk", flat=True)[:limit])
    for user_id in user_ids:
        erase_content(user_id=user_id)
    return len(user_ids)
