"""The eight operations over HTTP with every provider they can use, from the form to the ledger."""

import asyncio
import struct
from decimal import Decimal
from functools import partial
from typing import Any

import pytest
from pytest_django.fixtures import Settings

from accounts.models import User
from ai_ops import operations, pieces
from ai_ops.metering import Finished
from ai_ops.models import Chat, ChatTurn, ContentPiece, ContentVersion, GeneratedImage, ImageBatch, ImagePrompt
from ai_ops.requests import DraftRequest, ImageRequest
from billing import ledger
from billing.catalogue import system_settings
from billing.models import ModelPrice, TokenAccount, TokenTransaction, TokenUsage
from billing.pricing import ceil_multiply
from kit.database import in_thread
from tests.ai_ops.studio import OPENAI, Answer, Writer, asked, each_provider, events_of, until
from tests.conftest import MakeUser
from tests.servers import Server

pytestmark = pytest.mark.usefixtures("books_and_holds_stay_in_order")

OPENAI_IMAGES, GOOGLE_IMAGES = "openai:gpt-image-2", "google:gemini-3.1-flash-image"
each_image_maker = pytest.mark.parametrize("model", [OPENAI_IMAGES, GOOGLE_IMAGES])


def text_form(writer: Writer, piece: ContentPiece, **fields: Any) -> dict[str, Any]:
    """What the forms of a piece's page have in common."""
    return {
        "content_id": piece.pk,
        "base_number": pieces.newest_number(piece),
        "body": piece.body,
    } | fields


def image_form(**fields: Any) -> dict[str, Any]:
    return {
        "prompt": "A teapot on a window sill",
        "size": "1024x1024",
        "quality": "medium",
        "count": 2,
        "style": "",
        "project": "Tea shop",
    } | fields


def assert_charged_as_counted(writer: Writer, answer: Answer, operation: str) -> TokenUsage:
    """The newest usage row says what ran, costs what was counted, and has its one debit."""
    assert answer.names == ["started", "text", "done"], answer
    usage = writer.usage
    assert (usage.status, usage.is_estimated, usage.metadata["operation"]) == ("succeeded", False, operation)
    assert usage.actual_tokens > 0
    assert (
        usage.billable_tokens
        == ceil_multiply(usage.actual_tokens, Decimal("1.5"))
        == answer.last.data["billable_tokens"]
    )
    assert usage.billable_tokens <= (usage.reserved_tokens or 0)
    assert usage.provider_cost_microusd > 0
    assert writer.entry.usage_id == usage.pk
    assert writer.entry.amount == -usage.billable_tokens
    return usage


def newest_request(ai: Server) -> dict[str, Any]:
    request: dict[str, Any] = ai.get("/control/requests").raise_for_status().json()["requests"][-1]
    return request


@pytest.fixture
def draft(writer: Writer) -> ContentPiece:
    assert writer.draft(length="short").last.name == "done"
    return writer.piece


# --- Texts ------------------------------------------------------------------------------------------------------------


@each_provider
def test_chat_knows_what_was_said_before(writer: Writer, model: str) -> None:
    first = writer.run("chat", question="What is green tea?", project="Tea shop", model=model)
    usage = assert_charged_as_counted(writer, first, "generate_chat_response")
    turn = ChatTurn.objects.get()
    assert (turn.question, turn.answer, turn.state) == ("What is green tea?", first.text, "ready")
    assert (usage.operation_type, usage.chat_id, turn.usage_id) == ("chat", turn.chat_id, usage.pk)
    assert usage.project_id == turn.chat.project_id
    assert first.last.data["result_url"] == turn.get_absolute_url()

    second = writer.run("chat", chat_id=turn.chat_id, question="And black tea?", project="Tea shop", model=model)
    continued = assert_charged_as_counted(writer, second, "generate_chat_response")
    assert continued.metadata["history_turns"] == 1
    assert continued.input_tokens > usage.input_tokens + usage.output_tokens  # all that was said was read again
    assert Chat.objects.count() == 1
    page = writer.http.get(turn.chat.get_absolute_url()).text
    assert "And black tea?" in page
    assert f"{continued.billable_tokens:,}" in page


def test_chat_leaves_out_what_is_too_long_ago(writer: Writer) -> None:
    writer.run("chat", question="First", project="Tea shop")
    chat = Chat.objects.get()
    ChatTurn.objects.create(chat=chat, question="Long", answer="tea " * 2_990, state="ready")
    ChatTurn.objects.create(chat=chat, question="Failed", state="failed")
    ChatTurn.objects.create(chat=chat, question="Left at a blank", answer="\n ", state="ready")
    answer = writer.run("chat", chat_id=chat.pk, question="Now", project="Tea shop")
    assert answer.last.name == "done"
    assert writer.usage.metadata["history_turns"] == 1
    assert 2_990 < writer.usage.input_tokens < 3_100


@each_provider
def test_refinement_is_the_next_version(writer: Writer, draft: ContentPiece, model: str) -> None:
    edited = draft.body + "\n\nTyped by hand."
    form = text_form(writer, draft, body=edited, refinement="shorten", wishes="Keep the title.", model=model)
    answer = writer.run("refinement", **form)
    usage = assert_charged_as_counted(writer, answer, "refine_content")
    assert (usage.operation_type, usage.content_id) == ("refinement", draft.pk)
    assert usage.metadata["refinement"] == "shorten"
    draft.refresh_from_db()
    assert draft.body == answer.text != edited
    versions = draft.versions.values_list("number", "origin", "is_used", "usage_id", "body")
    assert list(versions[:2]) == [
        (3, "refinement", True, usage.pk, answer.text),
        (2, "edit", True, None, edited),  # what was typed is kept, though nobody pressed "Save"
    ]


@each_provider
def test_only_the_selection_is_refined(writer: Writer, draft: ContentPiece, model: str) -> None:
    body = "Good morning. Tea is nice. Good night. 🍵 Tea is nice."
    form = text_form(writer, draft, body=body, selection=" Tea is nice.", instruction="Say why.", model=model)
    form["start"] = body.rindex(" Tea")
    answer = writer.run("selection", **form)
    usage = assert_charged_as_counted(writer, answer, "refine_selection")
    draft.refresh_from_db()
    assert draft.body == f"Good morning. Tea is nice. Good night. 🍵 {answer.text.strip()}"
    assert (usage.metadata["selection_characters"], usage.metadata["text_characters"]) == (13, len(body))
    assert draft.versions.first().note == "Say why."  # type: ignore[union-attr]


@each_provider
def test_repurposed_piece_names_its_source(writer: Writer, draft: ContentPiece, model: str) -> None:
    answer = writer.run("repurpose", content_id=draft.pk, transformation="newsletter", wishes="", model=model)
    usage = assert_charged_as_counted(writer, answer, "repurpose_content")
    derived = draft.derived.get()
    assert (derived.body, derived.state, derived.project_id) == (answer.text, "ready", draft.project_id)
    assert (usage.operation_type, usage.content_id) == ("repurpose", derived.pk)
    assert usage.metadata["source_content_id"] == draft.pk
    assert answer.last.data["result_url"] == derived.get_absolute_url()


@each_provider
def test_image_prompt_is_kept(writer: Writer, model: str) -> None:
    answer = writer.run("image-prompt", idea="A teapot in the rain", style="photo", project="Tea shop", model=model)
    usage = assert_charged_as_counted(writer, answer, "generate_image_prompt")
    prompt = ImagePrompt.objects.get()
    assert (prompt.text, prompt.usage_id, usage.operation_type) == (answer.text, usage.pk, "prompt")
    assert usage.metadata["template"] == "photo"


@pytest.mark.parametrize(
    ("operation", "fields"),
    [
        ("refinement", {"refinement": "improve", "wishes": "[[fault:500]]"}),
        ("selection", {"instruction": "Better. [[fault:500]]"}),
        ("repurpose", {"transformation": "faq", "wishes": "[[fault:500]]"}),
        ("chat", {"question": "Why? [[fault:500]]", "project": "Tea shop"}),
        ("image-prompt", {"idea": "Rain [[fault:500]]", "project": "Tea shop"}),
        ("images", image_form(prompt="Rain [[fault:500]]", model=OPENAI_IMAGES)),
    ],
)
def test_failed_operation_costs_nothing_and_changes_no_text(
    writer: Writer, draft: ContentPiece, operation: str, fields: dict[str, Any]
) -> None:
    """Row 53, for all of them."""
    ModelPrice.objects.filter(kind="image").update(image_cost_tokens={"1024x1024": 1_000})
    balance = writer.account.balance
    answer = writer.run(operation, **text_form(writer, draft, selection=draft.body[:20]) | fields)
    assert answer.last.name == "failed"
    assert "is not answering properly" in answer.last.data["message"]
    assert (writer.usage.status, writer.usage.billable_tokens) == ("failed", 0)
    assert (writer.account.balance, writer.account.reserved) == (balance, 0)
    body = draft.body
    draft.refresh_from_db()
    assert draft.body == body


def test_broken_off_revision_is_kept_aside(writer: Writer, draft: ContentPiece) -> None:
    """Row 51: what was written is kept and charged, but half a text does not replace a whole one."""
    form = text_form(writer, draft, refinement="improve", wishes="[[fault:stall]]")
    with writer.open("refinement", **form) as response:
        for event in events_of(response.iter_lines()):
            if len(event.data.get("text", "")) > 5:
                break
    until(lambda: writer.usage.status != TokenUsage.Status.RESERVED)
    body = draft.body
    draft.refresh_from_db()
    assert draft.body == body
    aside = draft.versions.get(is_used=False)
    assert body != aside.body != ""
    assert writer.usage.billable_tokens > 0

    assert writer.http.post(f"/studio/content/{draft.pk}/versions/{aside.number}/restore/").status_code == 302
    draft.refresh_from_db()
    assert draft.body == aside.body


@each_provider
def test_revision_that_the_provider_ended_half_way_is_kept_aside(
    writer: Writer, draft: ContentPiece, model: str
) -> None:
    """Row 53: half a sentence would become the text otherwise, and be called done."""
    form = text_form(writer, draft, refinement="improve", wishes="[[fault:half-refused]]", model=model)
    answer = writer.run("refinement", **form)
    assert (answer.last.name, answer.last.data["stopped_by"]) == ("done", "provider")
    assert "The provider broke off before the text was finished." in answer.last.data["html"]
    body = draft.body
    draft.refresh_from_db()
    assert draft.body == body
    assert draft.versions.get(is_used=False).body == answer.text
    assert 0 < writer.usage.billable_tokens == answer.last.data["billable_tokens"]


def test_continuation_of_a_text_that_was_changed_meanwhile_is_kept_aside(writer: Writer, draft: ContentPiece) -> None:
    ContentPiece.objects.update(topic="Tea. [[fault:slow]]")
    with writer.open("continuation", content_id=draft.pk) as response:
        events = events_of(response.iter_lines())
        assert next(events).name == "started"
        edit = {"body": "Written in another window.", "base_number": 1}
        assert writer.http.post(f"/studio/content/{draft.pk}/save/", data=edit).status_code == 302
        answer = "".join(event.data.get("text", "") for event in events)
    body = draft.body
    draft.refresh_from_db()
    assert draft.body == "Written in another window."
    assert draft.versions.get(is_used=False).body == body + answer


def test_text_changed_meanwhile_is_not_overwritten(writer: Writer, draft: ContentPiece) -> None:
    form = text_form(writer, draft, refinement="improve", wishes="[[fault:slow]]")
    with writer.open("refinement", **form) as response:
        events = events_of(response.iter_lines())
        assert next(events).name == "started"
        edit = {"body": "Written in another window.", "base_number": form["base_number"]}
        assert writer.http.post(f"/studio/content/{draft.pk}/save/", data=edit).status_code == 302
        answer = "".join(event.data.get("text", "") for event in events)
    draft.refresh_from_db()
    assert draft.body == "Written in another window."
    assert draft.versions.get(is_used=False).body == answer

    # Who had not seen that either is told, before anybody is asked, and keeps what they typed.
    stale = writer.run("refinement", **form)
    assert stale.status_code == 409
    assert "changed in another window" in stale.refusal["message"]
    page = writer.http.post("/live/refinement/", data=form | {"model": OPENAI, "idempotency_key": "without-scripts"})
    assert page.status_code == 409
    assert f'value="{form["base_number"]}" id="edit_base_number"' in page.text  # so that Save tells them, too
    page = writer.http.post(f"/studio/content/{draft.pk}/save/", data=edit | {"body": "Mine & yours"})
    assert page.status_code == 409
    assert "Mine &amp; yours" in page.text


@pytest.mark.parametrize(
    ("selection", "message"),
    [("nowhere to be found", "not in the text any more"), ("tea", "occurs more than once"), (" ", "no text")],
)
def test_unclear_selection_is_refused(writer: Writer, draft: ContentPiece, selection: str, message: str) -> None:
    before = TokenUsage.objects.count()
    form = text_form(writer, draft, body="tea and tea", selection=selection, instruction="Better.")
    answer = writer.run("selection", **form)
    assert answer.status_code in (409, 422)
    assert message in answer.refusal["message"]
    assert TokenUsage.objects.count() == before


# --- Images -----------------------------------------------------------------------------------------------------------


def size_of(png: bytes) -> tuple[int, int]:
    assert png[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = struct.unpack(">II", png[16:24])
    return width, height


@each_image_maker
@pytest.mark.parametrize("size", ["1024x1024", "1536x1024"])
def test_images_are_kept_and_cost_the_same_each(make_user: MakeUser, web: Server, model: str, size: str) -> None:
    writer = Writer(make_user("irene", tokens=100_000), web)
    answer = writer.run("images", **image_form(model=model, size=size))
    assert answer.names == ["started", "done"]
    usage, batch = writer.usage, ImageBatch.objects.get()
    assert (usage.operation_type, usage.charge_type, usage.image_count, usage.image_size) == ("image", "fixed", 2, size)
    assert usage.metadata["operation"] == "generate_images"
    assert usage.billable_tokens == usage.reserved_tokens == 2 * (usage.fixed_cost_tokens or 0) > 0
    assert usage.provider_cost_microusd > 0
    assert writer.account.balance == 100_000 - usage.billable_tokens
    assert (batch.usage_id, batch.state, batch.count) == (usage.pk, "ready", 2)

    pictures = []
    for image in batch.images.all():
        response = writer.http.get(image.get_absolute_url())
        assert response.headers["Content-Type"] == image.media_type
        assert response.headers["X-Content-Type-Options"] == "nosniff"
        pictures.append(response.content)
    width, height = map(int, size.split("x"))
    # Google answers in its own resolution of the same proportions.
    assert {round(w / h, 1) for w, h in map(size_of, pictures)} == {round(width / height, 1)}
    assert pictures[0] != pictures[1]


@each_image_maker
def test_images_that_did_not_come_are_not_charged(writer: Writer, model: str) -> None:
    ModelPrice.objects.filter(kind="image").update(image_cost_tokens={"1024x1024": 3_000})
    answer = writer.run("images", **image_form(model=model, prompt=f"Rain by {model} [[fault:fewer]]"))
    assert answer.last.name == "done"
    usage = writer.usage
    assert (usage.image_count, usage.billable_tokens, usage.reserved_tokens) == (1, 3_000, 6_000)
    assert GeneratedImage.objects.count() == 1
    assert writer.account.balance == 7_000


@each_image_maker
@pytest.mark.parametrize("fault", ["401", "429", "500", "garbage", "refused"])
def test_failed_images_cost_nothing(writer: Writer, model: str, fault: str) -> None:
    """Row 53."""
    ModelPrice.objects.filter(kind="image").update(image_cost_tokens={"1024x1024": 3_000})
    answer = writer.run("images", **image_form(model=model, prompt=f"Rain [[fault:{fault}]]"))
    assert answer.last.name == "failed"
    assert (writer.usage.status, writer.account.balance, writer.account.reserved) == ("failed", 10_000, 0)
    assert ImageBatch.objects.get().state == "failed"
    assert not GeneratedImage.objects.exists()


def test_reader_who_leaves_before_the_images_pays_for_them(writer: Writer, ai: Server) -> None:
    """Row 102: the provider is stopped, and has begun what it is paid for."""
    ModelPrice.objects.filter(kind="image").update(image_cost_tokens={"1024x1024": 3_000})
    with writer.open("images", **image_form(model=OPENAI_IMAGES, prompt="Rain [[fault:timeout]]")) as response:
        events = events_of(response.iter_lines())  # a reader that is let go of closes the connection
        assert next(events).name == "started"
        assert writer.account.reserved == 6_000
    until(lambda: writer.usage.status != TokenUsage.Status.RESERVED)
    usage = writer.usage
    assert (usage.status, usage.is_estimated, usage.billable_tokens) == ("succeeded", True, 6_000)
    assert usage.provider_cost_microusd > 0
    assert writer.account.balance == 4_000
    assert ImageBatch.objects.get().state == "failed"


def test_too_small_balance_for_images(writer: Writer) -> None:
    form = image_form(model=OPENAI_IMAGES, count=4)
    ModelPrice.objects.filter(kind="image").update(image_cost_tokens={"1024x1024": 3_000})
    assert "2,000 tokens are missing" in writer.quote("images", **form)
    answer = writer.run("images", **form)
    assert answer.status_code == 402
    assert "2,000 are missing" in answer.refusal["message"]
    assert not ImageBatch.objects.exists()


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("size", "2048x2048"),
        ("quality", "ultra"),
        ("count", "0"),
        ("count", "5"),
        ("count", "１"),
        ("count", "1.5"),
        ("model", "openai:dall-e-3"),
        ("model", OPENAI),
        ("style", "\x00"),
        ("prompt", "A\x00B"),
    ],
)
def test_wrong_field_of_images_is_named(writer: Writer, field: str, value: str) -> None:
    """Rows 56–58."""
    answer = writer.run("images", **image_form(model=OPENAI_IMAGES) | {field: value})
    assert answer.status_code == 400
    assert list(answer.refusal["fields"]) == [field]
    assert not TokenUsage.objects.exists()


# --- A small balance --------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("no_thinking")
def test_hold_is_extended_when_more_is_available(make_user: MakeUser, web: Server, ai: Server) -> None:
    """The text begins with what 600 tokens allow; topped up meanwhile, it goes on, up to its quote (law 5)."""
    writer = Writer(make_user("nora", tokens=600), web)
    with writer.open_draft(title="Topped up", topic="Tea. [[fault:slow]]", length="long") as response:
        events = events_of(response.iter_lines())
        started = next(events)
        held_tokens = started.data["held_tokens"]
        assert writer.account.reserved == held_tokens <= 600
        ledger.add_tokens(
            user_id=writer.user.pk, tokens=9_000, type="bonus", description="Test", idempotency_key="top-up"
        )
        rest = list(events)
    assert (rest[-1].name, rest[-1].data["stopped_by"]) == ("done", "")
    (first,) = asked(ai, "Topped up")
    second = newest_request(ai)
    assert second["prompt"].startswith("Continue exactly where")
    usage = writer.usage
    assert (usage.reserved_tokens or 0) > held_tokens
    assert usage.input_tokens == first["input_tokens"] + second["input_tokens"]
    assert usage.output_tokens == first["output_tokens_sent"] + second["output_tokens_sent"]
    assert not usage.is_estimated
    assert usage.unbilled_tokens == 0
    assert held_tokens < usage.billable_tokens <= (usage.reserved_tokens or 0)
    assert writer.account.balance == 9_600 - usage.billable_tokens
    assert writer.piece.body == "".join(event.data["text"] for event in rest[:-1])
    assert writer.piece.state == "ready"


@each_provider
@pytest.mark.usefixtures("no_thinking")
def test_text_ends_cleanly_when_the_balance_does_and_goes_on_after_a_top_up(
    make_user: MakeUser, web: Server, model: str
) -> None:
    writer = Writer(make_user("nora", tokens=450), web)
    answer = writer.draft(length="long", model=model)
    assert (answer.last.name, answer.last.data["stopped_by"]) == ("done", "balance")
    assert "balance ran out" in answer.last.data["html"]
    assert "/tokens/" in answer.last.data["html"]
    usage, piece = writer.usage, writer.piece
    assert (usage.status, usage.is_estimated, usage.unbilled_tokens) == ("succeeded", False, 0)
    assert usage.billable_tokens <= 450
    assert (piece.body, piece.state) == (answer.text, "cut_short")

    refused = writer.run("continuation", content_id=piece.pk, model=model)
    assert refused.status_code == 402
    ledger.add_tokens(user_id=writer.user.pk, tokens=9_000, type="bonus", description="Test", idempotency_key="more")
    rest = writer.run("continuation", content_id=piece.pk, model=model)
    assert rest.last.name == "done"
    piece.refresh_from_db()
    assert piece.body == answer.text + rest.text
    assert piece.state == "ready"
    assert list(piece.versions.values_list("origin", flat=True)) == ["continuation", "draft"]
    assert TokenUsage.objects.filter(content_id=piece.pk).count() == 2


@pytest.mark.usefixtures("no_thinking")
def test_an_extended_operation_has_noted_what_all_its_calls_use(make_user: MakeUser, ai: Server) -> None:
    """Row 50: should a crash cut the second call, the row keeps what the first one used and this one reads."""
    nora = make_user("nora", tokens=600)
    request = DraftRequest("Noted", "Tea.", "Letters", "openai", "gpt-6-luna", "neutral", "long")
    noted: list[TokenUsage] = []

    async def read() -> None:
        async for event in operations.generate_draft(user_id=nora.pk, request=request, idempotency_key="noted-use"):
            if isinstance(event, operations.Started):
                top_up = partial(ledger.add_tokens, user_id=nora.pk, tokens=9_000, type="bonus", description="Test")
                await in_thread(top_up)(idempotency_key="top-up")
            if not isinstance(event, Finished):
                noted.append(await in_thread(TokenUsage.objects.latest)("id"))

    asyncio.run(read())
    first, last, end = noted[0], noted[-1], TokenUsage.objects.latest("id")
    assert (first.status, last.status, first.is_estimated, last.is_estimated) == (*["reserved"] * 2, True, True)
    assert first.provider_cost_microusd > first.output_tokens == 0
    assert 2 * first.input_tokens < last.input_tokens
    assert 0 < last.output_tokens < end.output_tokens
    assert first.provider_cost_microusd < last.provider_cost_microusd < end.provider_cost_microusd


@pytest.mark.usefixtures("no_thinking")
def test_failure_after_an_extension_costs_what_came_before_it(
    make_user: MakeUser, settings: Settings, ai: Server
) -> None:
    """The first call was good: its text is kept and paid for. Here the key is taken away before the second one."""
    nora = make_user("nora", tokens=600)
    request = DraftRequest("Half", "Tea.", "Letters", "openai", "gpt-6-luna", "neutral", "long")

    async def read() -> list[operations.Event]:
        events = []
        async for event in operations.generate_draft(user_id=nora.pk, request=request, idempotency_key="half-good"):
            if isinstance(event, operations.Started):
                top_up = partial(ledger.add_tokens, user_id=nora.pk, tokens=9_000, type="bonus", description="Test")
                await in_thread(top_up)(idempotency_key="top-up")
            else:
                settings.OPENAI_API_KEY = ""
            events.append(event)
        return events

    *_, last = asyncio.run(read())
    assert isinstance(last, Finished)
    assert last.stopped_by == "provider"
    usage = TokenUsage.objects.latest("id")
    assert (usage.status, usage.is_estimated) == ("succeeded", False)
    assert usage.error_message == "The provider broke off before the text was finished."
    assert 0 < usage.billable_tokens == ceil_multiply(usage.actual_tokens, Decimal("1.5")) <= 600
    assert ContentPiece.objects.get().state == "cut_short"


# --- Billing switched off ---------------------------------------------------------------------------------------------


def switch_billing(superadmin: User, *, on: bool) -> None:
    system_settings.update_system_settings(changes={"billing_enabled": on}, changed_by_id=superadmin.pk)


def test_operations_run_free_while_billing_is_switched_off(make_user: MakeUser, susan: User, web: Server) -> None:
    """Recorded, nothing held and nothing charged, also for who has no tokens at all."""
    switch_billing(susan, on=False)
    writer = Writer(make_user("nora", tokens=1), web)
    before = TokenTransaction.objects.count()
    form = writer.form()
    assert "Free" in writer.quote("draft", **form)
    answer = writer.run("draft", **form)
    assert answer.names == ["started", "text", "done"]
    assert (answer.events[0].data["held_tokens"], answer.last.data["billable_tokens"]) == (0, 0)
    usage = writer.usage
    assert (usage.status, usage.is_free, usage.billable_tokens, usage.unbilled_tokens) == ("succeeded", True, 0, 0)
    assert usage.actual_tokens > 0
    assert usage.provider_cost_microusd > 0  # we pay for it all the same
    images = writer.run("images", **image_form(model=OPENAI_IMAGES))
    assert images.last.name == "done"
    assert GeneratedImage.objects.count() == 2
    assert (writer.account.balance, writer.account.reserved) == (1, 0)
    assert TokenTransaction.objects.count() == before


def test_debt_stands_in_the_way_of_nothing_that_is_free(writer: Writer, susan: User) -> None:
    """And a block does."""
    ledger.deduct_tokens(
        user_id=writer.user.pk,
        tokens=10_500,
        operation=ledger.Operation("chat", "openai", "gpt-6-luna", multiplier=Decimal(1)),
        may_leave_debt=True,
    )
    assert writer.draft().status_code == 403
    switch_billing(susan, on=False)
    assert writer.draft(length="short").last.name == "done"
    assert writer.account.balance == -500
    TokenAccount.objects.filter(user=writer.user).update(status="blocked", status_reason="Under review.")
    assert writer.draft().status_code == 403


@pytest.mark.parametrize("on", [True, False])
def test_switch_in_the_middle_of_an_operation_changes_nothing_of_it(writer: Writer, susan: User, on: bool) -> None:
    """Row 59."""
    switch_billing(susan, on=on)
    with writer.open_draft(topic="Tea. [[fault:slow]]", length="short") as response:
        events = events_of(response.iter_lines())
        assert next(events).name == "started"
        switch_billing(susan, on=not on)
        assert list(events)[-1].name == "done"
    assert writer.usage.is_free == (not on)
    assert (writer.usage.billable_tokens > 0) == on
    assert writer.account.balance == 10_000 - writer.usage.billable_tokens


# --- Who may ask ------------------------------------------------------------------------------------------------------


def test_nothing_of_another_user_can_be_worked_on(
    make_user: MakeUser, writer: Writer, draft: ContentPiece, web: Server
) -> None:
    """Row 63: 404, nothing written, nobody asked."""
    writer.run("chat", question="A secret?", project="Tea shop")
    ModelPrice.objects.filter(kind="image").update(image_cost_tokens={"1024x1024": 1_000})
    writer.run("images", **image_form(model=OPENAI_IMAGES, count=1))
    image = GeneratedImage.objects.get()
    other = Writer(make_user("oscar"), web)
    before = TokenUsage.objects.count()
    for operation, form in {
        "continuation": {"content_id": draft.pk},
        "refinement": text_form(writer, draft, refinement="improve"),
        "selection": text_form(writer, draft, selection=draft.body[:30], instruction="Better."),
        "repurpose": {"content_id": draft.pk, "transformation": "faq"},
        "chat": {"chat_id": Chat.objects.get().pk, "question": "What did she say?", "project": "Tea shop"},
    }.items():
        assert other.run(operation, **form).status_code == 404, operation
        quote = other.quote(operation, **form)
        assert "There is no such" in quote
        assert draft.title not in quote
    for address in (
        draft.get_absolute_url(),
        f"/studio/content/{draft.pk}/versions/1/",
        Chat.objects.get().get_absolute_url(),
        draft.project.get_absolute_url(),
        image.batch.get_absolute_url(),
        image.get_absolute_url(),
    ):
        assert writer.http.get(address).status_code == 200, address
        assert other.http.get(address).status_code == 404, address
    for address in (f"/studio/content/{draft.pk}/save/", f"/studio/content/{draft.pk}/versions/1/restore/"):
        assert other.http.post(address, data={"body": "Mine", "base_number": 1}).status_code == 404, address
    assert TokenUsage.objects.count() == before
    assert ContentVersion.objects.filter(piece=draft).count() == 1


def test_same_key_gives_the_same_images(writer: Writer) -> None:
    """Row 55."""
    ModelPrice.objects.filter(kind="image").update(image_cost_tokens={"1024x1024": 3_000})
    form = image_form(model=OPENAI_IMAGES, idempotency_key="images-sent-twice")
    first, second = writer.run("images", **form), writer.run("images", **form)
    assert first.last == second.last
    assert (ImageBatch.objects.count(), GeneratedImage.objects.count()) == (1, 2)
    assert writer.account.balance == 4_000
    assert all(image.file.storage.exists(str(image.file.name)) for image in GeneratedImage.objects.all())


def test_retry_finds_its_first_outcome_although_it_would_be_refused_now(writer: Writer) -> None:
    """Row 55: the balance is spent and the model retired by then."""
    form = writer.form(idempotency_key="first-outcome")
    first = writer.run("draft", **form)
    ledger.deduct_tokens(
        user_id=writer.user.pk,
        tokens=writer.account.balance,
        operation=ledger.Operation("chat", "openai", "gpt-6-luna", multiplier=Decimal(1)),
    )
    assert writer.run("draft", **form).last == first.last
    assert writer.draft().status_code == 402


def test_image_request_is_what_the_model_is_asked(alice: User) -> None:
    request = ImageRequest("A teapot", "photo", "Tea shop", "openai", "gpt-image-2", "1024x1024", "high", 3)
    ask = request.ask(alice.pk)
    assert ask.prompt.messages[-1].text == "A teapot\n\nA photograph, natural light, realistic."
    assert (ask.image_size, ask.image_quality, ask.image_count) == ("1024x1024", "high", 3)
