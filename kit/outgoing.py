"""Files on their way out: no process waits for whoever takes one slowly.

A process has few threads, and an answer keeps one until all of it is taken. So what is asked for is written to the
disk first, as fast as the database gives it, and a proxy sends it from there: it says with each request that it does
(`X-Sendfile-Type`, docker/Caddyfile), and is told the place (`X-Accel-Redirect`). Without one, as in development, the
process sends the file itself.
"""

import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from functools import partial
from pathlib import Path
from tempfile import NamedTemporaryFile, TemporaryFile
from typing import IO
from urllib.parse import quote

from django.conf import settings
from django.db.models.fields.files import FieldFile
from django.http import FileResponse, HttpRequest, HttpResponse
from django.http.response import HttpResponseBase
from django.utils.http import content_disposition_header

PLACE = "/_files/"  # what the proxy takes for MEDIA_ROOT
FOLDER = ".outgoing"  # in MEDIA_ROOT, which the proxy reads; hidden from backups
KEPT_SECONDS = 600  # the proxy opens a file at once, and may go on reading one that has no name any more
FILES_PER_PERSON = 5


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
    for older in sorted(folder.glob(f"{owner}*"), key=_written_at)[: 1 - FILES_PER_PERSON]:
        older.unlink(missing_ok=True)
    with NamedTemporaryFile(prefix=owner, dir=folder, delete=False) as new:
        try:
            write(new)
        except BaseException:
            Path(new.name).unlink(missing_ok=True)
            raise
    return send(request, Path(new.name), filename=filename, content_type=content_type)


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
