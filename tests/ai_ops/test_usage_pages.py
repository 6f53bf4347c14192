"""The usage pages over HTTP: whose figures they show, and what they do with addresses that nobody clicked."""

from datetime import date, timedelta
from html import unescape
from zoneinfo import ZoneInfo

import pytest
from django.test import Client
from django.utils import timezone

from accounts.models import User, Workspace
from ai_ops.models import Chat, ChatTurn, Project
from billing.usage import charts, stats
from kit import periods
from tests.billing.usage.test_stats import add_usage

PAGES = ["/tokens/usage/", "/tokens/usage/log/"]


@pytest.fixture
def reader(client: Client, alice: User) -> Client:
    """Alice, signed in."""
    client.force_login(alice)
    return client


def page(client: Client, address: str, status: int = 200) -> str:
    response = client.get(address)
    assert response.status_code == status, address
    return unescape(response.content.decode())


@pytest.mark.parametrize("address", [*PAGES, "/tokens/usage/1/"])
def test_pages_are_for_who_is_signed_in(client: Client, address: str, db: None) -> None:
    response = client.get(address)
    assert (response.status_code, response.headers["Location"]) == (302, f"/accounts/login/?next={address}")


def test_nobody_sees_what_another_used(reader: Client, alice: User, bob: User) -> None:
    """Row 63: B's operation and its result are not there; B's project is not named, whatever the row says."""
    theirs = Project.objects.create(workspace=Workspace.objects.get(owner=bob), name="Bob's secret plan")
    chat = Chat.objects.create(project=theirs, author=bob, title="Secret")
    usage = add_usage(bob, timezone.now(), billable_tokens=777_777, chat_id=chat.pk, project_id=theirs.pk)
    ChatTurn.objects.create(chat=chat, question="?", usage_id=usage.pk)
    page(reader, f"/tokens/usage/{usage.pk}/", 404)
    page(reader, f"/tokens/usage/log/?before={usage.pk}", 200)  # nothing used yet, nothing to page through
    own = add_usage(alice, timezone.now(), billable_tokens=5, project_id=theirs.pk)
    for cursor in ("before", "after"):
        page(reader, f"/tokens/usage/log/?{cursor}={usage.pk}", 404)
    for address in (*PAGES, f"/tokens/usage/{own.pk}/"):
        text = page(reader, address)
        assert "777,777" not in text
        assert "secret plan" not in text
    reader.force_login(bob)
    assert "secret plan" in page(reader, "/tokens/usage/")
    assert f'href="/studio/chats/{chat.pk}/' in page(reader, f"/tokens/usage/{usage.pk}/")


def test_result_that_is_gone_is_not_linked(reader: Client, alice: User) -> None:
    usage = add_usage(alice, timezone.now(), content_id=99)
    assert "/studio/content/99/" not in page(reader, f"/tokens/usage/{usage.pk}/")


@pytest.mark.parametrize("address", PAGES)
@pytest.mark.parametrize(
    "query",
    [
        "period=nonsense", "from=2026-02-30", "from=2026-03-02&to=2026-03-01", "from=2099-01-01", "to=0000-01-01",
        "from=%00", "period=%00", "from=%EF%BC%92%EF%BC%90",
    ],
)  # fmt: skip
def test_wrong_period_is_told_and_the_last_days_are_shown(
    reader: Client, alice: User, address: str, query: str
) -> None:
    """Row 56, 57."""
    add_usage(alice, timezone.now(), billable_tokens=4_321)
    text = page(reader, f"{address}?{query}")
    assert 'id="period-error"' in text
    assert "4,321" in text


@pytest.mark.parametrize(
    "query",
    [
        "period=all", "period=12m", "from=2000-01-01", "to=2099-12-31", "to=2001-01-01",
        "from=2001-01-01&to=2012-01-01", "by=hour&period=all", "by=nonsense&split=nonsense",
        "split=%00&by=%00", "split=model", "split=project&by=week",
    ],
)  # fmt: skip
def test_any_period_has_a_page_of_bounded_size(reader: Client, alice: User, query: str) -> None:
    add_usage(alice, timezone.now() - timedelta(days=700), billable_tokens=1)
    add_usage(alice, timezone.now(), billable_tokens=1)
    assert page(reader, f"/tokens/usage/?{query}").count("<tr") < 1_500


@pytest.mark.parametrize("cursor", ["x", "-1", "1.5", "%00", "９", "9" * 30, "999999999"])
def test_wrong_cursor_is_not_found(reader: Client, alice: User, cursor: str) -> None:
    add_usage(alice, timezone.now())
    page(reader, f"/tokens/usage/log/?before={cursor}", 404)


def test_log_shows_each_operation_once(reader: Client, alice: User) -> None:
    """Also of those that began in the same moment, forwards and back."""
    at = timezone.now()
    expected = sorted((add_usage(alice, at).pk for _ in range(60)), reverse=True)
    rows, query = [], ""
    while True:
        context = reader.get(f"/tokens/usage/log/?period=7d{query}").context
        rows.append([row.pk for row, _ in context["rows"]])
        if context["older_id"] is None:
            break
        query = f"&before={context['older_id']}"
    assert [pk for shown in rows for pk in shown] == expected
    back = reader.get(f"/tokens/usage/log/?after={context['newer_id']}").context
    assert [row.pk for row, _ in back["rows"]] == rows[1]
    first = reader.get(f"/tokens/usage/log/?after={back['newer_id']}").context
    assert ([row.pk for row, _ in first["rows"]], first["newer_id"]) == (rows[0], None)


def test_more_operations_than_are_added_up(reader: Client, alice: User, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stats.newest_operations_since, "__kwdefaults__", {"limit": 3})
    for hours in range(5):
        add_usage(alice, timezone.now() - timedelta(hours=hours), billable_tokens=10)
    context = reader.get("/tokens/usage/").context
    assert context["total"].billable_tokens == 30
    assert context["span"].cut_at is not None
    assert "The figures cover the newest" in page(reader, "/tokens/usage/")


def test_entry_spells_its_price_out(reader: Client, alice: User) -> None:
    usage = add_usage(
        alice, timezone.now(), input_tokens=812, output_tokens=1_205, actual_tokens=2_017, reserved_tokens=3_000,
        billable_tokens=3_000, unbilled_tokens=26, is_estimated=True, metadata={"tone": "<b>calm</b>"},
        request_fingerprint="f1f2", idempotency_key="key-12345", duration_ms=1_234, provider_cost_microusd=4_321,
    )  # fmt: skip
    text = page(reader, f"/tokens/usage/{usage.pk}/")
    for part in (
        "(812 + 1,205) × 1.5, limited to the quote of 3,000", "rounded up from 3,025.5", "3,026", "−26",
        "counted by us", "3,000 tokens were reserved", "f1f2", "key-12345", "1,234 ms",
        "openai:gpt-6-luna",
    ):  # fmt: skip
        assert part in text, part
    assert "0.004321" not in text  # what the provider charges us is between us and them
    assert b"<b>calm" not in reader.get(f"/tokens/usage/{usage.pk}/").content  # row 72


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"is_free": True, "reserved_tokens": 0}, "nothing: billing was switched off"),
        ({"status": "failed", "error_message": "It broke."}, "nothing: it did not succeed"),
        ({"status": "reserved"}, "it is still running"),
        ({"operation_type": "image", "image_count": 2, "billable_tokens": 20}, "2 × 10 = 20"),
        ({}, "it was recorded after it ran"),
    ],
)
def test_entry_of_every_kind(reader: Client, alice: User, fields: dict[str, object], words: str) -> None:
    assert words in page(reader, f"/tokens/usage/{add_usage(alice, timezone.now(), **fields).pk}/")


def test_hour_that_comes_twice_is_told_apart() -> None:
    berlin = ZoneInfo("Europe/Berlin")
    day = date(2026, 10, 25)
    edges = stats.time_edges(
        since=periods.midnight(day, berlin), until=periods.midnight(day + timedelta(days=1), berlin), bucket="hour"
    )
    labels = charts.bucket_labels(edges, "hour")
    assert labels[1:5] == ["01:00", "02:00 CEST", "02:00 CET", "03:00"]
    assert len(set(labels)) == 25
