"""Files leave without a process of ours waiting for their reader (row 131); the proxy is in tests/production."""

import os
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from django.test import Client
from django.urls import reverse
from pytest_django.fixtures import Settings

from accounts.models import User
from billing import tasks
from kit import outgoing
from tests.conftest import show_password
from tests.servers import PROJECT

EXPORT = "/tokens/export.csv"
BY_PROXY = {"X-Sendfile-Type": "X-Accel-Redirect"}

pytestmark = [pytest.mark.django_db, pytest.mark.usefixtures("fresh_limits")]


@pytest.fixture
def folder(settings: Settings, tmp_path: Path) -> Path:
    settings.MEDIA_ROOT = str(tmp_path / "media")
    return tmp_path / "media" / outgoing.FOLDER


def test_the_proxy_is_told_where_the_file_is(client: Client, alice: User, folder: Path) -> None:
    """The same file as without one; its owner's last few stay for some minutes, the others go."""
    client.force_login(alice)
    alone: Any = client.get(EXPORT)
    assert not folder.exists()
    places = []
    for _ in range(outgoing.FILES_PER_PERSON + 2):
        told = client.get(EXPORT, headers=BY_PROXY)
        assert (told.status_code, told.content) == (200, b"")
        for name in ("Content-Type", "Content-Disposition"):
            assert told[name] == alone[name]
        places.append(folder.parent / told["X-Accel-Redirect"].removeprefix(outgoing.PLACE))
        os.utime(places[-1], times=(0, time.time() - outgoing.TAKEN_SECONDS - 100 + len(places)))
    assert places[-1].read_bytes() == b"".join(alone.streaming_content)
    assert set(folder.iterdir()) == set(places[-outgoing.FILES_PER_PERSON :])
    assert folder.stat().st_mode & 0o777 == 0o700
    assert places[-1].stat().st_mode & 0o777 == 0o600

    assert tasks.sweep_outgoing() == 0
    os.utime(places[-1], times=(0, time.time() - outgoing.KEPT_SECONDS - 1))
    assert tasks.sweep_outgoing() == 1
    assert not places[-1].exists()


def test_what_fails_while_it_is_written_leaves_no_file(
    client: Client, alice: User, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def half(*_: Any) -> Iterator[str]:
        yield "half"
        raise RuntimeError("the other half")

    monkeypatch.setattr("billing.history.exports.export_transactions", half)
    client.force_login(alice)
    for headers in (BY_PROXY, {}):
        with pytest.raises(RuntimeError, match="the other half"):
            client.get(EXPORT, headers=headers)
    assert list(folder.iterdir()) == []


def test_what_may_not_have_been_taken_makes_no_room(client: Client, alice: User, bob: User, folder: Path) -> None:
    """Whoever clicks again and again is refused in words before a file of theirs is deleted under its reader, and fills
    no disk; what is still written is deleted for nobody."""
    client.force_login(alice)
    folder.mkdir(parents=True)
    being_written = folder / f".{alice.pk}-abc"
    being_written.touch()
    os.utime(being_written, times=(0, time.time() - outgoing.TAKEN_SECONDS - 1))
    answers = [client.get(EXPORT, headers=BY_PROXY) for _ in range(outgoing.FILES_PER_PERSON + 3)]
    assert [answer.status_code for answer in answers] == [200] * outgoing.FILES_PER_PERSON + [429] * 3
    assert "in this minute" in answers[-1].content.decode()
    assert len(list(folder.iterdir())) == outgoing.FILES_PER_PERSON + 1
    other = Client()
    other.force_login(bob)
    assert other.get(EXPORT, headers=BY_PROXY).status_code == 200


def test_one_person_has_few_files_made_at_a_time(alice: User, susan: User, monkeypatch: pytest.MonkeyPatch) -> None:
    """Row 136: while the most are being made, every other file of hers is refused at once; another's is made."""
    hers, anothers = Client(), Client()
    hers.force_login(susan)
    anothers.force_login(alice)
    show_password(hers)
    refused: dict[str, Any] = {
        EXPORT: hers.get,
        reverse("tokens:statement", args=["2026", "01"]): hers.get,
        reverse("tokens:receipt", args=[1]): hers.get,
        reverse("dashboard:figures-export", args=["revenue"]): hers.get,
        reverse("dashboard:figures-pdf", args=["revenue"]): hers.get,
        reverse("dashboard:bulk-job-export", args=[1]): hers.get,
        reverse("data-download"): hers.post,
    }
    depth, looked_at = 0, []

    def while_it_is_written(*_: Any) -> Iterator[str]:
        nonlocal depth
        depth += 1
        if depth < outgoing.AT_ONCE:
            assert hers.get(EXPORT).status_code == 200
        elif depth == outgoing.AT_ONCE:
            for address, ask in refused.items():
                answer = ask(address)
                assert (answer.status_code, "Retry-After" in answer) == (429, True), address
                assert "are being made for you already" in answer.content.decode()
                looked_at.append(address)
            assert anothers.get(EXPORT).status_code == 200
        yield "a line"

    monkeypatch.setattr("billing.history.exports.export_transactions", while_it_is_written)
    assert hers.get(EXPORT).status_code == 200
    assert looked_at == list(refused)
    assert hers.get(EXPORT).status_code == 200


def test_every_file_goes_this_way() -> None:
    """An answer of Django's own that is read from an iterator holds a thread. Under /live/ there are no threads."""
    files = (
        path
        for folder in ("accounts", "billing", "ai_ops", "kit", "postmate")
        for path in (PROJECT / folder).rglob("*.py")
    )
    users = {
        str(path.relative_to(PROJECT))
        for path in files
        if re.search(r"\b(StreamingHttpResponse|FileResponse)\(", path.read_text())
    }
    assert users == {"kit/outgoing.py", "billing/views/live.py", "ai_ops/views.py"}
    assert "FileResponse" not in (PROJECT / "ai_ops/views.py").read_text()
