"""Files on their way out: no process waits for whoever takes one slowly.

A process has few threads, and an answer keeps one until all of it is taken. So what is asked for is written to the
disk first, as fast as the database gives it, and a proxy sends it from there: it says with each request that it does
(`X-Sendfile-Type`, docker/Caddyfile), and is told the place (`X-Accel-Redirect`). Without one, as in development, the
process sends the file itself.

One person makes few of them at a time, however often they click: the others' pages need the threads, too.
"""

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import partial, wraps
from pathlib import Path
from tempfile import NamedTemporaryFile, TemporaryFile
from typing import IO, Any, TypeVar, cast
from urllib.parse import quote

import structlog
from django.conf import settings
from django.core.cache import cache
from django.db.models.fields.files import FieldFile
from django.http import FileResponse, HttpRequest, HttpResponse
from django.http.response import HttpResponseBase
from django.shortcuts import render
from django.utils.http import content_disposition_header

from kit.refusal import Refusal

logger = structlog.get_logger(__name__)

PLACE = "/_files/"  # what the proxy takes for MEDIA_ROOT
FOLDER = ".outgoing"  # in MEDIA_ROOT, which the proxy reads; hidden from backups
KEPT_SECONDS = 600  # the proxy opens a file at once, and may go on reading one that has no name any more
FILES_PER_PERSON = 5
TAKEN_SECONDS = 60  # the proxy has opened a file by then
AT_ONCE = 2  # that one person has made at the same moment, over all processes
LONGEST_SECONDS = 600  # a process that dies in the middle gives its place back after so long

View = TypeVar("View", bound=Callable[..., HttpResponseBase])


class TooManyAtOnce(Refusal):
    """Nothing was made. `message` is for the person."""

    http_status = 429


def limited(view: View) -> View:
    """Around each view that makes a file, whatever it is: a person has AT_ONCE of them made at a time. The others are
    answered with 429, at once and in words. While nobody can count, all are made."""

    @wraps(view)
    def guarded(request: HttpRequest, *args: Any, **kwargs: Any) -> HttpResponseBase:
        try:
            with _place_of(request.user.pk):
                return view(request, *args, **kwargs)
        except TooManyAtOnce as error:
            answer = render(request, "429.html", {"message": error.message}, status=error.http_status)
            answer.headers["Retry-After"] = "60"
            return answer

    return cast(View, guarded)


@contextmanager
def _place_of(user_id: int | None) -> Iterator[None]:
    places = [] if user_id is None else [f"making-files:{user_id}:{number}" for number in range(AT_ONCE)]
    try:
        # `add` takes a key once, however many ask for it at the same moment.
        taken = next((place for place in places if cache.add(place, 1, LONGEST_SECONDS)), None)
        is_full = bool(places) and taken is None
    except Exception as error:  # whatever the cache raises
        logger.warning("Files that are made could not be counted", user_id=user_id, error=error)
        taken, is_full = None, False
    if is_full:
        raise TooManyAtOnce(f"{AT_ONCE} files are being made for you already. Try again when they are here.")
    try:
        yield
    finally:
        if taken is not None:
            with suppress(Exception):
                cache.delete(taken)


def send(
    request: HttpRequest, file: Path | FieldFile, *, filename: str, content_type: str, as_attachment: bool = True
) -> HttpResponseBase:
    """Answer with a file that lies in MEDIA_ROOT. Whether they may have it is asked before.

    A file that Django keeps elsewhere, as in object storage, the process sends itself. Raises FileNotFoundError.
    """
    path = _path_of(file)
    if path is None or not _is_sent_by_proxy(request):
        content = file.open("rb")
        return FileResponse(content, as_attachment=as_attachment, filename=filename, content_type=content_type)
    path.stat()
    answer = HttpResponse(content_type=content_type)
    if disposition := content_disposition_header(as_attachment, filename):
        answer.headers["Content-Disposition"] = disposition
    inside = path.absolute().relative_to(Path(settings.MEDIA_ROOT).absolute())
    answer.headers["X-Accel-Redirect"] = PLACE + quote(inside.as_posix())
    return answer


def send_new(
    request: HttpRequest, write: Callable[[IO[bytes]], None], *, filename: str, content_type: str
) -> HttpResponseBase:
    """Have `write` write a file, and answer with it. It is gone from the disk within minutes of being taken."""
    if not _is_sent_by_proxy(request):
        file = TemporaryFile()  # noqa: SIM115  (the answer closes it)
        try:
            write(file)
            file.seek(0)
        except BaseException:
            file.close()
            raise
        return FileResponse(file, as_attachment=True, filename=filename, content_type=content_type)
    folder, owner = Path(settings.MEDIA_ROOT) / FOLDER, f"{request.user.pk}-"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    sweep_outgoing()
    _make_room(folder, owner)
    # Under another name until it is whole: what is still written makes room for nothing.
    with NamedTemporaryFile(prefix=f".{owner}", dir=folder, delete=False) as new:
        try:
            write(new)
            new.flush()
            path = Path(new.name).rename(folder / Path(new.name).name.removeprefix("."))
        except BaseException:
            Path(new.name).unlink(missing_ok=True)
            raise
    return send(request, path, filename=filename, content_type=content_type)


def _make_room(folder: Path, owner: str) -> None:
    """Delete the person's oldest files but the last few; none that may not have been taken yet. Raises TooManyAtOnce
    when there are too many of those."""
    oldest_first = sorted(folder.glob(f"{owner}*"), key=_written_at)
    surplus = oldest_first[: max(0, len(oldest_first) + 1 - FILES_PER_PERSON)]
    if any(_written_at(path) > time.time() - TAKEN_SECONDS for path in surplus):
        raise TooManyAtOnce("You had several files made in this minute. Try again when it is over.")
    for path in surplus:
        path.unlink(missing_ok=True)


def send_lines(request: HttpRequest, lines: Iterable[str], *, filename: str) -> HttpResponseBase:
    """Answer with the lines of a CSV file, written while they are read."""
    content_type = "text/csv; charset=utf-8"
    return send_new(request, partial(_write_lines, lines), filename=filename, content_type=content_type)


def sweep_outgoing() -> int:
    """Delete the files that were taken, or given up, some minutes ago. Returns how many."""
    swept = 0
    for path in (Path(settings.MEDIA_ROOT) / FOLDER).glob("*"):
        with suppress(FileNotFoundError):  # two sweeps at once
            if _written_at(path) < time.time() - KEPT_SECONDS:
                path.unlink()
                swept += 1
    return swept


def _path_of(file: Path | FieldFile) -> Path | None:
    if isinstance(file, Path):
        return file
    try:
        return Path(file.path)
    except NotImplementedError:  # it is on no disk
        return None


def _is_sent_by_proxy(request: HttpRequest) -> bool:
    return request.headers.get("X-Sendfile-Type") == "X-Accel-Redirect"


def _written_at(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except FileNotFoundError:
        return 0


def _write_lines(lines: Iterable[str], file: IO[bytes]) -> None:
    for line in lines:
        file.write(line.encode())
