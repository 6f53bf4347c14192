"""A draft over HTTP, from the form to the ledger, with each provider and each way to fail (rows 49–53, 55–60)."""

import asyncio
import re
import signal
from collections.abc import Iterator
from contextlib import ExitStack
from datetime import timedelta
from decimal import Decimal
from functools import partial
from http.client import HTTPConnection
from typing import Any, cast

import httpx2
import pytest
from django.db import connection, transaction
from django.http import StreamingHttpResponse
from django.test import AsyncClient
from django.utils import timezone
from pytest_django.fixtures import Settings

from accounts.models import User
from ai_ops import counting, metering, operations, prompts, streams
from ai_ops.metering import Finished
from ai_ops.models import ContentPiece, ImageBatch, Project
from ai_ops.operations import LEFT_AT_MOST, LEFT_WITHIN, Started
from ai_ops.providers import TextDelta
from ai_ops.requests import DraftRequest
from billing import catalogue, ledger
from billing.catalogue import system_settings
from billing.models import ModelPrice, TokenAccount, TokenTransaction, TokenUsage
from billing.pricing import TokenPools, ceil_multiply
from standins.ai import count_tokens as count_as_the_provider
from tests import servers
from tests.ai_ops.studio import ANTHROPIC, GOOGLE, OPENAI, Writer, asked, each_provider, events_of, until
from tests.conftest import MakeUser
from tests.environment import free_port
from tests.servers import Server

pytestmark = pytest.mark.usefixtures("books_and_holds_stay_in_order")


def nothing_was_written(before: tuple[int, ...]) -> bool:
    return rows() == before


def rows() -> tuple[int, ...]:
    return tuple(model.objects.count() for model in (TokenUsage, TokenTransaction, ContentPiece, Project))


# --- It works -------------------------------------------------------------------------------------------------------


@each_provider
def test_draft_is_streamed_and_charged_as_counted(writer: Writer, ai: Server, model: str) -> None:
    title = f"Charged as counted by {model}"
    answer = writer.draft(title=title, model=model)
    assert answer.names == ["started", "text", "done"]

    (request,) = asked(ai, title)
    usage = writer.usage
    assert (usage.provider, usage.model) == tuple(model.split(":"))
    assert (usage.input_tokens, usage.output_tokens) == (request["input_tokens"], request["output_tokens_sent"])
    assert usage.actual_tokens == usage.input_tokens + usage.output_tokens
    assert usage.status == TokenUsage.Status.SUCCEEDED
    assert not usage.is_estimated
    assert usage.billable_tokens == ceil_multiply(usage.actual_tokens, Decimal("1.5"))
    assert answer.last.data["billable_tokens"] == usage.billable_tokens < answer.events[0].data["held_tokens"]
    assert usage.provider_cost_microusd > 0
    assert usage.duration_ms is not None

    entry = TokenTransaction.objects.get(usage=usage)
    assert (entry.amount, entry.balance_before, entry.balance_after) == (
        -usage.billable_tokens,
        10_000,
        10_000 - usage.billable_tokens,
    )
    assert writer.account.balance == entry.balance_after

    piece = writer.piece
    assert (piece.body, piece.state) == (answer.text, ContentPiece.State.READY)
    assert piece.project.name == "Tea shop"
    assert piece.project.workspace.owner == writer.user
    assert (usage.content_id, usage.project_id) == (piece.pk, piece.project_id)
    assert answer.events[0].data["result_url"] == piece.get_absolute_url()
    page = writer.http.get(piece.get_absolute_url())
    assert page.status_code == 200
    assert f"{usage.billable_tokens:,}" in page.text


@each_provider
def test_every_pool_is_kept_apart(writer: Writer, model: str) -> None:
    """Cache reads, cache writes and reasoning: exclusive pools, whatever the provider calls them."""
    assert writer.draft(topic="Tea. [[fault:pools]]", model=model).last.name == "done"
    usage = writer.usage
    assert usage.cached_input_tokens > 0
    assert usage.reasoning_tokens == 64
    assert usage.output_tokens > usage.reasoning_tokens
    assert (usage.cache_write_tokens > 0) == (model != GOOGLE)
    inputs = usage.input_tokens + usage.cached_input_tokens + usage.cache_write_tokens
    assert usage.actual_tokens == inputs + usage.output_tokens


def test_project_is_made_once_per_workspace(writer: Writer, bob: User, web: Server) -> None:
    for person in (writer, writer, Writer(bob, web)):
        assert person.draft(length="short").last.name == "done"
    assert Project.objects.filter(name="Tea shop").count() == 2


def test_plain_form_leads_to_the_finished_piece(writer: Writer) -> None:
    response = writer.http.post("/live/draft/", data=writer.form())
    assert response.status_code == 302
    assert response.headers["Location"] == writer.piece.get_absolute_url()
    assert writer.piece.state == ContentPiece.State.READY


@pytest.mark.usefixtures("no_thinking")
def test_output_limit_fits_a_small_balance(make_user: MakeUser, web: Server, ai: Server) -> None:
    writer = Writer(make_user("carol", tokens=600), web)
    quote = writer.http.post("/studio/quote/draft/", data=writer.form()).text
    assert "Your balance is small" in quote
    assert writer.draft(title="Small balance").last.name == "done"
    usage = writer.usage
    assert usage.reserved_tokens is not None
    assert usage.billable_tokens <= usage.reserved_tokens <= 600
    (request,) = asked(ai, "Small balance")
    assert 100 <= request["output_tokens_sent"] < 400
    assert writer.account.balance == 600 - usage.billable_tokens


def test_too_small_balance_says_what_is_missing(make_user: MakeUser, web: Server, ai: Server) -> None:
    writer = Writer(make_user("dora", tokens=50), web)
    before = rows()
    answer = writer.draft(title="Too small")
    assert answer.status_code == 402
    assert "are missing" in answer.refusal["message"]
    assert "tokens are missing" in writer.http.post("/studio/quote/draft/", data=writer.form()).text
    page = writer.http.post("/live/draft/", data=writer.form(title="Kept as typed"))
    assert page.status_code == 402
    assert "Kept as typed" in page.text
    assert nothing_was_written(before)
    assert asked(ai, "Too small") == []


# --- The provider fails ---------------------------------------------------------------------------------------------


@each_provider
def test_usage_above_the_quote_is_not_billed(writer: Writer, model: str) -> None:
    """Row 49: the quote is charged, the rest is kept as unbilled."""
    answer = writer.draft(topic="Tea. [[fault:overrun]]", model=model)
    usage = writer.usage
    assert usage.billable_tokens == usage.reserved_tokens == answer.events[0].data["held_tokens"]
    assert usage.unbilled_tokens == ceil_multiply(usage.actual_tokens, Decimal("1.5")) - usage.billable_tokens > 0
    assert writer.account.balance == 10_000 - usage.billable_tokens
    assert "limited to the quote" in writer.http.get(writer.piece.get_absolute_url()).text


@each_provider
def test_no_usage_is_counted_by_us(writer: Writer, model: str) -> None:
    """Row 52."""
    answer = writer.draft(topic="Tea. [[fault:no-usage]]", model=model)
    assert answer.last.name == "done"
    usage = writer.usage
    assert usage.is_estimated
    assert usage.input_tokens > 0
    our_count = counting.count_tokens(answer.text, provider=usage.provider, model=usage.model)
    assert usage.output_tokens == our_count
    assert writer.account.balance == 10_000 - usage.billable_tokens < 10_000


@each_provider
@pytest.mark.parametrize("fault", ["401", "429", "500", "garbage", "cut", "stream-error"])
def test_failed_provider_costs_nothing(writer: Writer, ai: Server, model: str, fault: str) -> None:
    """Row 53: released, a clear message, and the next attempt holds tokens once."""
    title = f"Failing {fault} {model}"
    answer = writer.draft(title=title, topic=f"Tea. [[fault:{fault}]]", model=model)
    assert answer.last.name == "failed"
    assert answer.last.data["message"].startswith(("OpenAI", "Anthropic", "Google"))
    assert "cost nothing" in answer.last.data["html"]
    usage = writer.usage
    assert (usage.status, usage.billable_tokens) == (TokenUsage.Status.FAILED, 0)
    assert usage.error_message == answer.last.data["message"]
    assert writer.piece.body == answer.text
    state = ContentPiece.State.CUT_SHORT if answer.text else ContentPiece.State.FAILED
    assert writer.piece.state == state
    assert (writer.account.balance, writer.account.reserved) == (10_000, 0)
    assert len(asked(ai, title)) == 1  # no retry behind the user's back

    assert writer.draft(title=title, model=model, length="short").last.name == "done"
    assert writer.account.balance == 10_000 - writer.usage.billable_tokens


@each_provider
def test_refusal_costs_nothing(writer: Writer, model: str) -> None:
    """Row 53: a model that declines has written nothing."""
    answer = writer.draft(topic="Tea. [[fault:refused]]", model=model)
    assert answer.names == ["started", "failed"]
    assert "refused this request" in answer.last.data["message"]
    assert (writer.usage.status, writer.piece.state) == ("failed", "failed")
    assert writer.usage.provider_cost_microusd > 0  # we pay for what it read
    assert writer.account.balance == 10_000


def test_failed_provider_at_the_plain_form(writer: Writer) -> None:
    """Row 53, without a script: the form comes back as it was typed, with the message."""
    page = writer.http.post("/live/draft/", data=writer.form(title="Kept", topic="Tea. [[fault:500]]"))
    assert page.status_code == 502
    assert "OpenAI is not answering properly" in page.text
    assert 'value="Kept"' in page.text
    assert "[[fault:500]]" in page.text
    assert writer.account.balance == 10_000


@pytest.fixture(scope="module")
def impatient_web(_web_process: Server, django_db_blocker: Any) -> Iterator[Server]:
    """A process that waits two seconds for a provider, and three for an answer. It has the SDKs imported before."""
    with (
        django_db_blocker.unblock(),
        servers.running_live(port=free_port(), AI_TIMEOUT_SECONDS="2", AI_MAX_DURATION_SECONDS="3") as process,
    ):
        yield process


@each_provider
@pytest.mark.parametrize("fault", ["timeout", "stall"])
def test_silent_provider_costs_nothing(alice: User, impatient_web: Server, ai: Server, model: str, fault: str) -> None:
    """Row 53: no answer, or none any more, within AI_TIMEOUT_SECONDS; the call is ended."""
    writer, title = Writer(alice, impatient_web), f"Silent {fault} {model}"
    answer = writer.draft(title=title, topic=f"Tea. [[fault:{fault}]]", model=model)
    assert answer.last.name == "failed"
    assert "took too long" in answer.last.data["message"]
    assert bool(answer.text) == (fault == "stall")
    assert writer.piece.body == answer.text
    assert (writer.usage.status, writer.account.balance) == (TokenUsage.Status.FAILED, 10_000)
    assert until(lambda: asked(ai, title)[0]["disconnected"])


def test_endless_answer_is_ended(alice: User, impatient_web: Server, ai: Server) -> None:
    """Row 53: a provider that always sends a little more is stopped after AI_MAX_DURATION_SECONDS."""
    writer = Writer(alice, impatient_web)
    answer = writer.draft(title="Endless", topic="Tea. [[fault:slow]]")
    assert "took too long" in answer.last.data["message"]
    assert writer.account.balance == 10_000
    assert until(lambda: asked(ai, "Endless")[0]["disconnected"])


@pytest.fixture
def web_of_two_connections(_web_process: Server, django_db_blocker: Any) -> Iterator[Server]:
    with (
        django_db_blocker.unblock(),
        servers.running_web(port=free_port(), DATABASE_POOL_SIZE="2") as process,
    ):
        yield process


def test_open_streams_keep_no_connection(alice: User, web_of_two_connections: Server, ai: Server) -> None:
    """A text streams for minutes: were a connection its own so long, a few writers would use up the pool."""
    writer = Writer(alice, web_of_two_connections)
    with ExitStack() as stack:
        for number in range(3):
            draft = writer.open_draft(title=f"One of three {number}", topic="Tea. [[fault:slow]]", length="short")
            events = events_of(stack.enter_context(draft).iter_lines())
            assert [next(events).name, next(events).name] == ["started", "text"]
        assert writer.http.get("/tokens/").status_code == 200
    until(lambda: not TokenUsage.objects.filter(status=TokenUsage.Status.RESERVED).exists())


# --- The reader or the process goes away ----------------------------------------------------------------------------


@each_provider
def test_reader_who_leaves_pays_for_what_was_written(writer: Writer, ai: Server, model: str) -> None:
    """Rows 51 and 101: the provider is stopped, its text is kept and charged."""
    title = f"Left by its reader {model}"
    with writer.open_draft(title=title, topic="Tea. [[fault:stall]]", model=model) as response:
        read = ""
        for event in events_of(response.iter_lines()):
            read += event.data.get("text", "")
            if len(read) > 50:
                break
    until(lambda: asked(ai, title)[0]["disconnected"])
    until(lambda: writer.usage.status != TokenUsage.Status.RESERVED)
    usage, piece = writer.usage, writer.piece
    assert usage.status == TokenUsage.Status.SUCCEEDED
    assert usage.is_estimated
    assert piece.body.startswith(read)
    assert piece.state == ContentPiece.State.CUT_SHORT
    # What the provider had counted by then, and our own count where it had said nothing.
    (request,) = asked(ai, title)
    assert (usage.input_tokens == request["input_tokens"]) or model == OPENAI
    by_us = counting.count_tokens(piece.body, provider=usage.provider, model=usage.model)
    assert usage.output_tokens == (count_as_the_provider(piece.body) if model == GOOGLE else by_us)
    assert 0 < usage.billable_tokens == 10_000 - writer.account.balance
    assert asked(ai, title)[0]["output_tokens_sent"] < 200


def test_reader_who_stalls_pays_for_what_was_written(alice: User, ai: Server, settings: Settings) -> None:
    """Row 51: to read so slowly that the hold expires is no way to a free text. Here every wait is too long."""
    settings.AI_MAX_DURATION_SECONDS = settings.RESERVATION_SECONDS
    request = DraftRequest("Stalled", "Tea.", "Letters", "openai", "gpt-6-luna", "neutral", "long")

    async def read() -> list[operations.Event]:
        draft = operations.generate_draft(user_id=alice.pk, request=request, idempotency_key="stalled-reader")
        return [event async for event in draft]

    events = asyncio.run(read())
    assert [type(event) for event in events] == [Started, TextDelta, Finished]
    usage, piece = TokenUsage.objects.get(), ContentPiece.objects.get()
    assert (usage.status, usage.is_estimated) == (TokenUsage.Status.SUCCEEDED, True)
    assert piece.state == ContentPiece.State.CUT_SHORT
    assert 0 < usage.billable_tokens == 10_000 - TokenAccount.objects.get(user=alice).balance


def test_reader_who_leaves_while_tokens_are_held_pays_nothing(writer: Writer) -> None:
    """Row 51: the hold is made in a thread, which goes on; nobody would run the operation that it is for."""
    request = writer.http.build_request("POST", "/live/draft/", data=writer.form())
    browser = HTTPConnection(writer.http.base_url.host, writer.http.base_url.port or 0)
    with transaction.atomic():
        TokenAccount.objects.select_for_update().get(user=writer.user)
        browser.request("POST", "/live/draft/", body=request.content, headers=dict(request.headers))
        until(somebody_waits_for_a_lock)
        browser.close()
        assert writer.http.get("/tokens/").status_code == 200  # by now the server has seen that they left
    until(lambda: TokenUsage.objects.filter(status=TokenUsage.Status.FAILED).exists())
    assert (writer.account.balance, writer.account.reserved) == (10_000, 0)
    assert writer.piece.state == ContentPiece.State.FAILED


def somebody_waits_for_a_lock() -> bool:
    with connection.cursor() as cursor:
        cursor.execute(
            "SELECT FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'",
        )
        return cursor.fetchone() is not None


def test_reader_hears_that_the_operation_is_still_there(
    alice: User, ai: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A proxy ends what is silent for a minute. Who leaves in the middle of the silence has stopped the provider."""
    monkeypatch.setattr(streams, "KEEP_ALIVE_SECONDS", 0.1)
    client = AsyncClient()
    client.force_login(alice)
    form = Writer.form(title="Silent", topic="Tea. [[fault:stall]]")

    parts: list[str] = []

    async def read() -> None:
        response = await client.post("/live/draft/", form, headers={"accept": "text/event-stream"})
        async for part in cast(StreamingHttpResponse, response):
            parts.append(part.decode())
            if "event: text" in "".join(parts) and parts[-1] == ": still here\n\n":
                is_silent.set()

    async def leave_in_silence() -> None:
        reader = asyncio.ensure_future(read())
        await is_silent.wait()
        reader.cancel()  # as Django does when the connection is closed
        await asyncio.wait({reader})

    is_silent = asyncio.Event()
    asyncio.run(leave_in_silence())
    assert parts[0].startswith("event: started\n")
    until(lambda: asked(ai, "Silent")[0]["disconnected"])
    usage = TokenUsage.objects.get()
    assert (usage.status, usage.is_estimated) == (TokenUsage.Status.SUCCEEDED, True)
    assert 0 < usage.billable_tokens == 10_000 - TokenAccount.objects.get(user=alice).balance


@each_provider
def test_reader_who_leaves_before_the_first_word_pays_for_what_was_read(writer: Writer, ai: Server, model: str) -> None:
    """Row 102: again and again is no way to free work. Who goes on with it waits, and loses nothing by that."""
    topic = "Tea for people who drink coffee. " * 40 + "[[fault:timeout]]"
    for number in range(LEFT_AT_MOST):
        title, balance_tokens = f"Left at once {model} {number}", writer.account.balance
        with writer.open_draft(title=title, topic=topic, model=model) as response:
            events = events_of(response.iter_lines())
            assert next(events).name == "started"
            until(partial(asked, ai, title))
        until(lambda: writer.usage.status != TokenUsage.Status.RESERVED)
        usage = writer.usage
        assert (usage.status, usage.is_estimated, usage.output_tokens) == ("succeeded", True, 0)
        assert usage.input_tokens > 240
        assert usage.billable_tokens == -(-usage.input_tokens * 3 // 2) == balance_tokens - writer.account.balance
        assert usage.provider_cost_microusd > 0
        assert usage.error_message == metering.LEFT_BEFORE_A_WORD
        assert writer.piece.state == ContentPiece.State.FAILED
    refused = writer.draft(title="Once more")
    assert (refused.status_code, asked(ai, "Once more")) == (429, [])
    assert "Please wait" in refused.refusal["message"]
    TokenUsage.objects.update(created_at=timezone.now() - LEFT_WITHIN)
    assert writer.draft(title="Later").last.name == "done"


@each_provider
@pytest.mark.usefixtures("no_thinking")
def test_a_model_that_only_thinks_is_no_free_work(writer: Writer, ai: Server, model: str) -> None:
    """Row 102: to its limit, which costs the user nothing, or until the reader leaves, which costs what we heard of it.
    Both cost us, and both count: who goes on with it waits."""
    for number in range(LEFT_AT_MOST):
        title, balance_tokens = f"Only thinks {model} {number}", writer.account.balance
        if number % 2 == 0:
            answer = writer.draft(title=title, topic="Tea. [[fault:think]]", model=model, length="short")
            assert answer.names == ["started", "failed"]
            assert "thought until nothing was left to write with. You were not charged." in answer.last.data["message"]
            assert "This cost nothing." in answer.last.data["html"]
            usage = writer.usage
            assert (usage.status, usage.billable_tokens) == ("failed", 0)
            assert usage.error_message == answer.last.data["message"]
            cost_of_limit_microusd = usage.provider_cost_microusd
        else:
            with writer.open_draft(title=title, topic="Tea. [[fault:think-on]]", model=model) as response:
                events = events_of(response.iter_lines())
                assert next(events).name == "started"
                until(lambda title=title: asked(ai, title) and asked(ai, title)[0]["thought_tokens"] == 256)  # type: ignore[misc]
            until(lambda: writer.usage.status != TokenUsage.Status.RESERVED)
            usage = writer.usage
            assert (usage.status, usage.is_estimated) == ("succeeded", True)
            assert usage.error_message == metering.LEFT_BEFORE_A_WORD
            # Anthropic tells what it thinks, the others keep silent meanwhile.
            assert (usage.output_tokens > 100) == (usage.reasoning_tokens > 100) == (model == ANTHROPIC)
            assert usage.input_tokens > 0
            assert usage.billable_tokens == ceil_multiply(usage.actual_tokens, Decimal("1.5")) > 0
            assert 0 < usage.provider_cost_microusd < cost_of_limit_microusd
        assert usage.provider_cost_microusd > 0
        assert writer.account.balance == balance_tokens - usage.billable_tokens
        assert (writer.piece.body, writer.piece.state) == ("", ContentPiece.State.FAILED)
    refused = writer.draft(title="Once more")
    assert (refused.status_code, asked(ai, "Once more")) == (429, [])
    assert "the model only thought" in refused.refusal["message"]


@pytest.mark.usefixtures("no_thinking")
def test_a_small_balance_that_is_thought_away(make_user: MakeUser, web: Server) -> None:
    """Row 102: the words say what would help."""
    writer = Writer(make_user("carol", tokens=600), web)
    answer = writer.draft(topic="Tea. [[fault:think]]", length="long")
    assert "Your balance is too small for this model" in answer.last.data["message"]
    assert (writer.usage.status, writer.account.balance, writer.account.reserved) == ("failed", 600, 0)
    assert writer.usage.provider_cost_microusd > 0


def test_killed_process_charges_nothing(alice: User, web: Server, ai: Server) -> None:
    """Rows 50 and 102: kill -9 in the middle of a text, before its first word, and while images are made. The holds
    expire, the results are closed, the user pays nothing; what the provider had begun is our cost, and stays."""
    ModelPrice.objects.filter(kind="image").update(image_cost_tokens={"1024x1024": 100})
    titles = ("Killed in the middle", "Killed before a word")
    with servers.running_web(port=free_port()) as doomed, ExitStack() as stack:
        writer = Writer(alice, doomed)
        forms: list[tuple[str, dict[str, Any]]] = [
            ("draft", writer.form(title=titles[0], length="short", topic="Tea. [[fault:stall]]")),
            ("draft", writer.form(title=titles[1], length="short", topic="Tea. [[fault:timeout]]", model=ANTHROPIC)),
            ("images", IMAGES),
        ]
        streams = []
        for operation, form in forms:
            streams.append(events_of(stack.enter_context(writer.open(operation, **form)).iter_lines()))
            assert next(streams[-1]).name == "started"
        assert next(streams[0]).name == "text"
        until(lambda: asked(ai, titles[1]) and painted(ai))
        doomed.process.send_signal(signal.SIGKILL)
        doomed.process.wait()
        for events in streams:
            with pytest.raises(httpx2.TransportError):
                list(events)
    until(lambda: all(asked(ai, title)[0]["disconnected"] for title in titles))
    held = TokenUsage.objects.filter(status=TokenUsage.Status.RESERVED)
    assert writer.account.reserved == sum(usage.reserved_tokens or 0 for usage in held) > 0
    assert ledger.expire_reservations() == 0  # its time is not over

    with connection.cursor() as cursor:
        cursor.execute("UPDATE billing_tokenusage SET expires_at = clock_timestamp() - interval '1 second'")
    assert ledger.expire_reservations() == 3
    assert (writer.account.balance, writer.account.reserved) == (10_000, 0)
    assert TokenTransaction.objects.filter(account__user=alice).count() == 1  # the bonus
    for usage, (operation, form) in zip(TokenUsage.objects.order_by("id"), forms, strict=True):
        assert (usage.status, usage.billable_tokens, usage.is_estimated) == ("expired", 0, True)
        assert (usage.actual_tokens, usage.output_tokens) == (usage.input_tokens, 0)
        price = ModelPrice.objects.get(provider=usage.provider, model=usage.model)
        if operation == "images":
            cost_microusd = catalogue.provider_cost_microusd(
                price, image_count=2, image_size=usage.image_size, image_quality=usage.image_quality
            )
        else:
            prompt = prompts.draft_prompt(**{name: form[name] for name in ("title", "topic", "tone", "length")}).text
            read_tokens = counting.count_tokens(prompt, provider=usage.provider, model=usage.model)
            assert usage.input_tokens == read_tokens
            cost_microusd = catalogue.provider_cost_microusd(price, TokenPools(input_tokens=read_tokens))
        assert usage.provider_cost_microusd == cost_microusd > 0

    assert operations.close_abandoned_results() == 0
    ContentPiece.objects.update(updated_at=timezone.now() - timedelta(hours=1))
    ImageBatch.objects.update(updated_at=timezone.now() - timedelta(hours=1))
    assert operations.close_abandoned_results() == 3
    assert {piece.state for piece in ContentPiece.objects.all()} == {ContentPiece.State.FAILED}


IMAGES = {
    "prompt": "Rain on the day of the crash [[fault:timeout]]",
    "model": "openai:gpt-image-2",
    "size": "1024x1024",
    "quality": "low",
    "count": 2,
    "style": "",
    "project": "Tea shop",
}


def painted(ai: Server) -> bool:
    requests = ai.get("/control/requests").raise_for_status().json()["requests"]
    return any("the day of the crash" in request["prompt"] for request in requests)


# --- Sent twice -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fault", ["", "[[fault:500]]"])
def test_same_key_gives_the_first_result(writer: Writer, ai: Server, fault: str) -> None:
    """Row 55: nothing runs a second time, whether the first time went well or not."""
    form = writer.form(title=f"Sent twice{fault[8:-2]}", topic=f"Tea. {fault}")
    first = writer.draft(**form)
    before, balance = rows(), writer.account.balance
    second = writer.draft(**form)
    assert second.text == first.text
    assert second.last == first.last
    assert nothing_was_written(before)
    assert writer.account.balance == balance
    assert len(asked(ai, form["title"])) == 1
    # The plain form, sent again, leads to the same.
    page = writer.http.post("/live/draft/", data=form, follow_redirects=True)
    assert nothing_was_written(before)
    assert page.url.path == writer.piece.get_absolute_url()
    assert ("The draft ended before anything was written." in page.text) == bool(fault)


def test_same_key_while_it_runs(writer: Writer, ai: Server) -> None:
    """Row 55: the second half of a double click is told that it is being written."""
    form = writer.form(title="Double click", topic="Tea. [[fault:stall]]")
    with writer.open_draft(**form) as response:
        events = events_of(response.iter_lines())
        assert next(events).name == "started"
        second = writer.draft(**form)
        assert second.names == ["failed"]
        assert "already under way" in second.last.data["message"]
    until(lambda: writer.usage.status != TokenUsage.Status.RESERVED)
    assert TokenUsage.objects.count() == ContentPiece.objects.count() == 1
    assert len(asked(ai, "Double click")) <= 1


def test_same_key_for_another_draft(writer: Writer, ai: Server) -> None:
    """Row 55: 409, nothing written."""
    form = writer.form()
    writer.draft(**form)
    before = rows()
    answer = writer.draft(**form | {"title": "Another body"})
    assert answer.status_code == 409
    assert "sent before, with other contents" in answer.refusal["message"]
    assert nothing_was_written(before)
    assert asked(ai, "Another body") == []
    page = writer.http.post("/live/draft/", data=form | {"title": "Another body"})
    assert page.status_code == 409
    assert "Another body" in page.text


def test_same_key_of_another_user(writer: Writer, bob: User, web: Server) -> None:
    """Row 55: keys are their owner's; nothing of one is shown to the other."""
    form = writer.form(title="A secret of Alice")
    first = writer.draft(**form)
    other = Writer(bob, web)
    second = other.draft(**form)
    assert second.last.name == "done"
    assert second.events[0].data["usage_id"] != first.events[0].data["usage_id"]
    assert writer.piece.pk != other.piece.pk
    assert other.account.balance == 10_000 - other.usage.billable_tokens


# --- Wrong input ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("title", ""),
        ("title", "A\x00B"),
        ("title", "x" * 201),
        ("topic", "A\x00B"),
        ("topic", " \n "),
        ("topic", "x" * 20_001),
        ("project", "A\x00B"),
        ("project", "x" * 151),
        ("model", ""),
        ("model", "openai:gpt-0"),
        ("model", "openai:gpt\x000"),
        ("model", "nobody:gpt-6-luna"),
        ("model", "gpt-6-luna"),
        ("model", "openai:gpt-image-2"),
        ("tone", "shouting"),
        ("tone", "friendly\x00"),
        ("length", "1e400"),
        ("length", "-1"),
        ("length", "１２"),
        ("length", "medium\x00"),
    ],
)
def test_wrong_field_is_named(writer: Writer, ai: Server, name: str, value: str) -> None:
    """Rows 56–58: an error at the field, nothing written, no provider called."""
    before = rows()
    form = writer.form(**{name: value})
    answer = writer.draft(**form)
    assert answer.status_code == 400
    assert list(answer.refusal["fields"]) == [name]
    page = writer.http.post("/live/draft/", data=form)
    assert page.status_code == 400
    assert f'id="id_{name}_error"' in page.text
    assert writer.http.post("/studio/quote/draft/", data=form).status_code == 200
    assert nothing_was_written(before)
    assert asked(ai, form["title"]) == []


@pytest.mark.parametrize("key", ["", "short", "a" * 101, "with space", "new\nline-key", "tests-key\x00"])
def test_wrong_key_is_refused(writer: Writer, key: str) -> None:
    """Rows 56 and 57: the key of a tampered form."""
    before = rows()
    answer = writer.draft(idempotency_key=key)
    assert answer.status_code == 400
    assert "out of date" in answer.refusal["message"]
    assert nothing_was_written(before)


def test_half_a_character_is_no_fault_of_ours(writer: Writer) -> None:
    """Row 57: what is no UTF-8 reaches no column; Django has replaced it before."""
    form = writer.form()
    for raw in (b"%ED%A0%80", b"%FF"):
        body = b"&".join(f"{name}={value}".encode() for name, value in form.items() if name != "title")
        response = writer.http.post(
            "/studio/quote/draft/",
            content=body + b"&title=" + raw,
            headers={"Content-Type": "application/x-www-form-urlencoded"},
        )
        assert response.status_code == 200


def test_retired_model_names_its_replacement(writer: Writer, ai: Server) -> None:
    """Row 58: refused before the provider is called."""
    before = rows()
    answer = writer.draft(title="Retired", model="anthropic:claude-opus-4-20250514")
    assert answer.status_code == 400
    (message,) = answer.refusal["fields"]["model"]
    assert "was retired on 15 June 2026" in message
    assert "claude-opus-5-5" in message
    assert nothing_was_written(before)
    assert asked(ai, "Retired") == []


def test_model_retired_while_the_form_was_open(writer: Writer) -> None:
    """Row 58."""
    form = writer.form()
    ModelPrice.objects.filter(model="gpt-6-luna").update(is_active=False, replacement="gpt-6.1-terra")
    assert "gpt-6.1-terra" in writer.draft(**form).refusal["fields"]["model"][0]


# --- What changes while it runs -------------------------------------------------------------------------------------


def test_price_that_rose_since_the_quote_is_not_charged_unseen(writer: Writer, susan: User) -> None:
    """The page sends the price that it showed; who sends none, as without scripts, pays the price of now."""

    def with_price_shown(form: dict[str, Any]) -> dict[str, Any]:
        shown = re.findall(r'name="(quoted_\w+)"\s+value="([^"]*)"', writer.quote("draft", **form))
        assert len(shown) == 2
        return form | dict(shown)

    form = with_price_shown(writer.form(length="short"))
    system_settings.update_system_settings(changes={"token_multiplier": Decimal(2)}, changed_by_id=susan.pk)
    before = rows()
    refused = writer.draft(**form)
    assert refused.status_code == 409
    (tokens,) = re.findall(r"this now costs at most ([\d,]+) tokens", refused.refusal["message"])
    assert f"{tokens} tokens</div>" in writer.quote("draft", **form)
    assert nothing_was_written(before)
    # Who has typed on since, or was shown the price of another model, is asked nothing.
    agreed = with_price_shown(form)
    assert writer.draft(**agreed | {"topic": "Much more about tea. " * 50}).last.name == "done"
    assert (
        writer.draft(**writer.form() | {"quoted_unit": "openai gpt-5-mini", "quoted_price": "0.1"}).last.name == "done"
    )
    assert writer.draft(**writer.form()).last.name == "done"
    # A retry gets its first outcome, whatever the price is by now (law 8).
    system_settings.update_system_settings(changes={"token_multiplier": Decimal(3)}, changed_by_id=susan.pk)
    again = writer.draft(**agreed | {"topic": "Much more about tea. " * 50})
    assert again.last.name == "done"
    assert TokenUsage.objects.count() == 3


def test_multiplier_is_a_snapshot(writer: Writer, susan: User) -> None:
    """Row 59: what applied at the beginning applies at the end."""
    with writer.open_draft(topic="Tea. [[fault:slow]]", length="short") as response:
        events = events_of(response.iter_lines())
        assert next(events).name == "started"
        system_settings.update_system_settings(changes={"token_multiplier": Decimal(9)}, changed_by_id=susan.pk)
        assert list(events)[-1].name == "done"
    usage = writer.usage
    assert usage.multiplier == Decimal("1.5")
    assert usage.billable_tokens == ceil_multiply(usage.actual_tokens, Decimal("1.5"))
    assert usage.unbilled_tokens == 0


@pytest.mark.parametrize("status", ["suspended", "blocked"])
def test_account_that_is_not_active_starts_nothing(writer: Writer, ai: Server, status: str) -> None:
    """Row 60: 403 for what is new; what runs is settled."""
    title = f"Not active: {status}"
    with writer.open_draft(topic="Tea. [[fault:slow]]", length="short") as response:
        events = events_of(response.iter_lines())
        assert next(events).name == "started"
        TokenAccount.objects.filter(user=writer.user).update(status=status, status_reason="Under review.")

        answer = writer.draft(title=title)
        assert answer.status_code == 403
        assert f"This account is {status}" in answer.refusal["message"]
        assert f"This account is {status}" in writer.http.post("/studio/quote/draft/", data=writer.form()).text
        assert asked(ai, title) == []

        assert list(events)[-1].name == "done"
    assert writer.account.balance == 10_000 - writer.usage.billable_tokens < 10_000
    assert TokenUsage.objects.count() == 1


# --- Who may ask ----------------------------------------------------------------------------------------------------


def test_content_is_its_authors(writer: Writer, bob: User, web: Server) -> None:
    """Row 63: 404 for everybody else."""
    writer.draft(length="short")
    address = writer.piece.get_absolute_url()
    assert writer.http.get(address).status_code == 200
    assert Writer(bob, web).http.get(address).status_code == 404
    assert web.get(address).status_code == 302


@pytest.mark.parametrize("path", ["/live/draft/", "/studio/quote/draft/"])
def test_form_of_another_site_is_refused(writer: Writer, path: str) -> None:
    """Row 62: 403 without the token, nothing written."""
    before = rows()
    del writer.http.headers["X-CSRFToken"]
    assert writer.http.post(path, data=writer.form()).status_code == 403
    assert nothing_was_written(before)


def test_who_comes_from_the_sign_in_finds_the_page_of_the_form(writer: Writer) -> None:
    assert writer.http.get("/studio/quote/draft/").status_code == 405
    for address, page in {
        "/live/draft/": "/studio/",
        "/live/chat/": "/studio/chats/",
        "/studio/content/5/save/": "/studio/content/5/",
        "/studio/content/5/versions/2/restore/": "/studio/content/5/versions/2/",
    }.items():
        assert writer.http.get(address).headers["Location"] == page
