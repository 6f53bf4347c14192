"""Whatever a provider counts and wherever a text ends, its hold is closed, its text kept and its price right.

Rows 49–53, 101 and 109, with answers as they were recorded, from the operation to the ledger.
"""

import asyncio
import json
from collections.abc import Iterator
from contextlib import aclosing, contextmanager, suppress
from datetime import timedelta
from decimal import Decimal
from typing import Any

import pytest
from django.db import connection
from django.db.models import F
from django.utils import timezone
from pytest_django.fixtures import Settings

from accounts.models import User
from ai_ops import counting, metering, operations
from ai_ops.models import ContentPiece, GeneratedImage, ImageBatch
from ai_ops.operations import LEFT_AT_MOST
from ai_ops.providers import ProviderError, TextDelta
from ai_ops.requests import DraftRequest, ImageRequest
from billing import catalogue, ledger
from billing.figures import roll_ups
from billing.models import ModelPrice, Notification, RollUp, TokenAccount, TokenTransaction, TokenUsage, UsageDay
from billing.pricing import TokenPools, ceil_multiply
from billing.upkeep.verification import verify
from kit.database import in_thread
from tests.conftest import MakeUser
from tests.standins.ai_server import AiServer, running_ai_standin

MODELS = {"openai": "gpt-6-luna", "anthropic": "claude-haiku-5-5", "google": "gemini-3.8-flash"}
TEXT = "Ten words of tea. " * 62 + "Ends"  # 1,120 bytes


@pytest.fixture(scope="module")
def server() -> Iterator[AiServer]:
    with running_ai_standin() as running:
        yield running


@pytest.fixture(autouse=True)
def standin_settings(settings: Settings, server: AiServer) -> None:
    settings.OPENAI_API_KEY = settings.ANTHROPIC_API_KEY = settings.GOOGLE_API_KEY = "any"
    settings.OPENAI_BASE_URL = f"{server.address}/openai/v1"
    settings.ANTHROPIC_BASE_URL = f"{server.address}/anthropic"
    settings.GOOGLE_GEMINI_BASE_URL = f"{server.address}/google"


@pytest.fixture(autouse=True)
def nothing_stays_open(transactional_db: None) -> Iterator[None]:
    """Whatever a test did, all laws hold after it and nothing is reserved any more."""
    yield
    assert [finding for finding in verify() if finding.violations] == []
    assert not TokenAccount.objects.exclude(reserved=0).exists()


def sse(*events: dict[str, Any]) -> str:
    return "".join(
        (f"event: {event['type']}\n" if "type" in event else "") + f"data: {json.dumps(event)}\n\n" for event in events
    )


def write(
    server: AiServer,
    user: User,
    provider: str,
    body: str,
    *,
    leaves: int = 0,
    key: str = "key-of-test",
    **options: Any,
) -> str:
    """Write a draft, perhaps leave it at so many pieces, and return the message of its failure, or ""."""
    marker = server.play(f"settling-{provider}", body, **options)
    request = DraftRequest("Tea", f"Tea. {marker}", "Letters", provider, MODELS[provider], "neutral", "medium")
    failure = ""

    async def read() -> None:
        nonlocal failure
        pieces = 0
        draft = operations.generate_draft(user_id=user.pk, request=request, idempotency_key=key)
        try:
            async with aclosing(draft):
                async for event in draft:
                    pieces += isinstance(event, TextDelta)
                    if leaves and pieces == leaves:
                        return
        except ProviderError as error:
            failure = error.message

    asyncio.run(read())
    return failure


def outcome(user: User) -> tuple[TokenUsage, ContentPiece, int]:
    """The operation, its piece, and how many tokens its user paid."""
    paid = 10_000 - TokenAccount.objects.get(user=user).balance
    return TokenUsage.objects.get(), ContentPiece.objects.get(), paid


def our_prompt_count(usage: TokenUsage) -> int:
    piece = ContentPiece.objects.get()
    request = DraftRequest(piece.title, piece.topic, "Letters", usage.provider, usage.model, "neutral", "medium")
    return our_count(usage, request.ask(piece.author_id).prompt.text)


def our_count(usage: TokenUsage, text: str) -> int:
    return counting.count_tokens(text, provider=usage.provider, model=usage.model)


def openai_text(usage: Any) -> str:
    chunk = {"choices": [{"index": 0, "delta": {"content": TEXT}, "finish_reason": "stop"}], "usage": None}
    return sse(chunk, {"choices": [], "usage": usage})


OURS = "ours"


@pytest.mark.parametrize(
    ("counts", "read", "written", "reasoning"),
    [
        ((100, 280, 1_180, 800), 100, 1_080, 800),
        ((100, 280, 380, 800), 100, 280, 280),
        ((0, 0, 0, 0), OURS, OURS, 0),
        ((None, None, 331, None), OURS, OURS, 0),
        ((100, 0, 100, 0), 100, OURS, 0),
        ((100, 12, 112, 0), 100, OURS, 0),
        ((0, 280, 280, 0), OURS, 280, 0),
        ((-100, -280, -380, -1), OURS, OURS, 0),
        ((2**63, 2**63, 2**64, 2**63), OURS, OURS, 0),
        ((100, 500_000_000, 500_000_100, 0), 100, OURS, 0),  # more than the model can write
        (("100", 280.0, True, [1]), OURS, OURS, 0),
        (None, OURS, OURS, 0),
    ],
)
def test_no_count_keeps_an_operation_from_closing(
    alice: User, server: AiServer, counts: tuple[Any, ...] | None, read: Any, written: Any, reasoning: int
) -> None:
    said: dict[str, Any] = {}
    if counts:
        said = dict(zip(("prompt_tokens", "completion_tokens", "total_tokens"), counts, strict=False))
        said["completion_tokens_details"] = {"reasoning_tokens": counts[3]}
    assert write(server, alice, "openai", openai_text(said)) == ""
    usage, piece, paid = outcome(alice)
    assert (usage.status, piece.body, piece.state) == ("succeeded", TEXT, "ready")
    assert usage.input_tokens == (our_prompt_count(usage) if read == OURS else read)
    assert usage.output_tokens == (our_count(usage, TEXT) if written == OURS else written)
    assert usage.reasoning_tokens == reasoning
    assert paid == usage.billable_tokens == ceil_multiply(usage.actual_tokens, Decimal("1.5"))
    assert usage.is_estimated is (counts != (100, 280, 1_180, 800))
    assert usage.provider_cost_microusd > 0
    if counts and counts[3] == 800 and counts[2] == 1_180:
        assert paid == 1_770


FORTY_WORDS = "word " * 40


def anthropic_start(input_tokens: int) -> str:
    return sse(
        {"type": "message_start", "message": {"usage": {"input_tokens": input_tokens, "output_tokens": 1}}},
        {"type": "content_block_delta", "delta": {"type": "text_delta", "text": FORTY_WORDS}},
    )


def google_chunk(prompt: int, candidates: int, thoughts: int) -> str:
    usage = {"promptTokenCount": prompt, "candidatesTokenCount": candidates, "thoughtsTokenCount": thoughts}
    candidate = {"content": {"role": "model", "parts": [{"text": FORTY_WORDS}]}}
    return sse({"candidates": [candidate], "usageMetadata": usage})


def openai_chunk(prompt: int, completion: int) -> str:
    usage = {"prompt_tokens": prompt, "completion_tokens": completion}
    return sse({"choices": [{"index": 0, "delta": {"content": FORTY_WORDS}}], "usage": usage})


@pytest.mark.parametrize(
    ("provider", "body", "read", "written"),
    [
        ("anthropic", anthropic_start(9_000), 9_000, OURS),
        ("anthropic", anthropic_start(400), 400, OURS),
        ("google", google_chunk(400, 44, 100), 400, 144),
        ("openai", openai_chunk(400, 44), 400, 44),
    ],
)
@pytest.mark.parametrize("how", ["leaves", "stalls", "time limit", "cut"])
def test_what_the_provider_had_counted_is_kept_when_it_ends_early(
    alice: User, server: AiServer, settings: Settings, provider: str, body: str, read: int, written: Any, how: str
) -> None:
    """Row 101: its count as far as it went; never above the hold (law 5), and what is beyond it is not lost."""
    if how == "stalls":
        settings.AI_MAX_DURATION_SECONDS = settings.RESERVATION_SECONDS  # every wait of the reader is too long
    if how == "time limit":
        settings.AI_MAX_DURATION_SECONDS = 1.5
    failure = write(server, alice, provider, body, leaves=int(how == "leaves"), then="cut" if how == "cut" else "stall")
    usage, piece, paid = outcome(alice)
    output = our_count(usage, FORTY_WORDS) if written == OURS else written
    assert piece.body == FORTY_WORDS
    cost = {
        "anthropic": read / 10 + output / 2,
        "google": read * 0.75 + output * 3.75,
        "openai": read / 10 + output / 2,
    }
    assert usage.provider_cost_microusd == pytest.approx(cost[provider], abs=1)
    if how in ("time limit", "cut"):  # a failure costs its user nothing (law 9)
        assert failure
        assert (usage.status, paid) == ("failed", 0)
        return
    billable = ceil_multiply(read + output, Decimal("1.5"))
    assert (usage.input_tokens, usage.output_tokens, usage.is_estimated) == (read, output, True)
    assert paid == usage.billable_tokens == min(billable, usage.reserved_tokens or 0)
    assert usage.unbilled_tokens == billable - paid


def test_a_count_that_fell_is_no_proof_of_what_was_written(alice: User, server: AiServer) -> None:
    """Row 52: of a text that is left then, all is counted by us."""
    body = openai_chunk(400, 80) + openai_chunk(400, 60)
    write(server, alice, "openai", body, leaves=2, then="stall")
    usage, piece, _ = outcome(alice)
    assert piece.body == FORTY_WORDS * 2
    assert (usage.input_tokens, usage.output_tokens) == (400, our_count(usage, FORTY_WORDS * 2))


@pytest.mark.parametrize("number", ["n/a", 12.5, [40], {"x": 1}, 2**70])
@pytest.mark.parametrize("provider", MODELS)
def test_a_count_of_the_wrong_type_makes_no_text_free(
    alice: User, server: AiServer, provider: str, number: Any
) -> None:
    """Row 52: also in the chunk that has the last words, and where the SDK checks its types."""
    if provider == "openai":
        body = openai_text({"prompt_tokens": number, "completion_tokens": number, "completion_tokens_details": number})
    elif provider == "anthropic":
        body = sse(
            {"type": "message_start", "message": {"usage": {"input_tokens": number, "cache_creation": number}}},
            anthropic_delta("text", text=TEXT),
            {"type": "message_delta", "delta": {"stop_reason": "end_turn"}, "usage": {"output_tokens": number}},
            {"type": "message_stop"},
        )
    else:
        names = ("promptTokenCount", "candidatesTokenCount", "thoughtsTokenCount", "candidatesTokensDetails")
        candidate = {"content": {"role": "model", "parts": [{"text": TEXT}]}, "finishReason": "STOP"}
        body = sse({"candidates": [candidate | {"tokenCount": number}], "usageMetadata": dict.fromkeys(names, number)})
    assert write(server, alice, provider, body) == ""
    usage, piece, paid = outcome(alice)
    assert (piece.body, piece.state, usage.is_estimated) == (TEXT, "ready", True)
    assert (usage.input_tokens, usage.output_tokens) == (our_prompt_count(usage), our_count(usage, TEXT))
    assert paid == ceil_multiply(usage.actual_tokens, Decimal("1.5"))


def openai_delta(**delta: Any) -> dict[str, Any]:
    return {"choices": [{"index": 0, "delta": delta}]}


def test_an_answer_that_shows_nothing_is_none(alice: User, server: AiServer) -> None:
    """Rows 102 and 109: it costs its user nothing, and us what stands on its row; not again and again."""
    answers = [
        ("\n\u200b\0 ", "length"),
        ("\n\u200b\0 ", "stop"),
        ("", "stop"),
        (None, "tomorrow"),
        ("", "content_filter"),
    ]
    words = dict.fromkeys(("stop", "tomorrow"), metering.NOTHING_TO_READ)
    words |= {"length": metering.ONLY_THOUGHT, "content_filter": "refused this request"}
    assert len(answers) == LEFT_AT_MOST
    for number, (answer, reason) in enumerate(answers):
        end = {"choices": [{"index": 0, "delta": {}, "finish_reason": reason}]}
        count = {"choices": [], "usage": {"prompt_tokens": 100, "completion_tokens": 1_200}}
        body = sse(openai_delta(content=answer), end, count)
        failure = write(server, alice, "openai", body, key=f"nothing-{number}")
        usage, piece = TokenUsage.objects.latest("id"), ContentPiece.objects.latest("id")
        assert words[reason] in failure
        assert (usage.status, piece.body, usage.provider_cost_microusd) == ("failed", "", 610)
    assert TokenAccount.objects.get(user=alice).balance == 10_000
    with pytest.raises(operations.LeftTooOften):
        write(server, alice, "openai", "", key="nothing-more")


FAULT = {"error": {"message": "…", "type": "server_error"}}


def openai_end(reason: str, *count: int) -> str:
    end = {"choices": [{"index": 0, "delta": {}, "finish_reason": reason}], "usage": None}
    counts = {"prompt_tokens": count[0], "completion_tokens": count[1]} if count else {}
    return sse(end, {"choices": [], "usage": counts})


def test_an_extension_is_paid_for_when_it_brought_something(
    make_user: MakeUser, no_thinking: None, server: AiServer
) -> None:
    """Law 9, row 53: a second call that breaks off keeps its words, their price and their cost; one that brings none
    costs its user nothing, and us what it read and thought."""
    begun = sse(openai_delta(content=FORTY_WORDS))
    beginning = begun + openai_end("length", 70, 140)
    ours = "ours"
    table: list[tuple[str, str, tuple[Any, Any], bool, bool, str]] = [
        # what the second call plays, how that ends, what it used, whether its user and we pay, why the text ends
        (sse(openai_delta(content=TEXT)), "cut", (ours, TEXT), True, True, "provider"),
        (sse(openai_delta(content=TEXT), FAULT), "end", (ours, TEXT), True, True, "provider"),
        (openai_chunk(400, 44) + sse(FAULT), "end", (400, 44), True, True, "provider"),
        (begun + openai_end("stop", 400, 44), "end", (400, 44), True, True, ""),
        (sse(FAULT), "end", (0, 0), False, False, "provider"),
        (sse(openai_delta(reasoning_content=TEXT)), "cut", (ours, TEXT), False, True, "provider"),
        (openai_end("length", 400, 300), "end", (400, 300), False, True, "length"),
        (sse(openai_delta(content="\n\0")) + openai_end("length", 400, 300), "end", (400, 300), False, True, "length"),
        (openai_end("stop", 400, 300), "end", (400, 300), False, True, ""),
        (openai_end("content_filter", 400, 300), "end", (400, 300), False, True, "provider"),
    ]
    for number, (body, then, used, user_pays, we_pay, stopped_by) in enumerate(table):
        user = make_user(f"nora{number}", tokens=450)
        marker = server.play("extended", beginning)
        request = DraftRequest("Tea", f"Tea. {marker}", "Letters", "openai", MODELS["openai"], "neutral", "medium")
        items: list[Any] = []

        async def read(
            user: User = user,
            request: DraftRequest = request,
            items: list[Any] = items,
            body: str = body,
            then: str = then,
        ) -> None:
            draft = operations.generate_draft(user_id=user.pk, request=request, idempotency_key="key-of-test")
            async with aclosing(draft):
                async for item in draft:
                    items.append(item)
                    if sum(isinstance(each, TextDelta) for each in items) == 1 and isinstance(item, TextDelta):
                        await in_thread(top_up)(user)
                        await in_thread(server.play)("extended", body, then=then)

        asyncio.run(read())
        usage, piece = TokenUsage.objects.filter(user=user).latest("id"), ContentPiece.objects.get(author=user)
        prompt = request.ask(user.pk).prompt.continued(FORTY_WORDS)
        read_tokens = our_count(usage, prompt.text) if used[0] == ours else used[0]
        written_tokens = our_count(usage, used[1]) if isinstance(used[1], str) else used[1]
        paid, cost = (70, 140), 7.0 + 70
        if user_pays:
            paid = (70 + read_tokens, 140 + written_tokens)
        if we_pay:
            cost = (70 + read_tokens) / 10 + (140 + written_tokens) / 2
        assert (usage.status, usage.input_tokens, usage.output_tokens) == ("succeeded", *paid), number
        assert usage.billable_tokens == min(ceil_multiply(sum(paid), Decimal("1.5")), usage.reserved_tokens or 0)
        assert usage.billable_tokens == 20_450 - TokenAccount.objects.get(user=user).balance
        assert usage.provider_cost_microusd == pytest.approx(cost, abs=1), number
        assert (items[-1].stopped_by, usage.is_estimated) == (stopped_by, user_pays and stopped_by == "provider"), (
            number
        )
        assert piece.body.startswith(FORTY_WORDS.strip())


def top_up(user: User) -> None:
    ledger.add_tokens(user_id=user.pk, tokens=20_000, type="bonus", description="Test", idempotency_key="top-up")


def anthropic_delta(type: str, **delta: Any) -> dict[str, Any]:
    return {"type": "content_block_delta", "delta": {"type": f"{type}_delta", **delta}}


@pytest.mark.parametrize(
    ("provider", "body", "said", "by_our_count", "status"),
    [
        (  # counted with its first words, and never again
            "openai",
            openai_chunk(400, 44)
            + sse({"choices": [{"index": 0, "delta": {"content": TEXT}, "finish_reason": "stop"}]}),
            *((400, 44), [TEXT], "succeeded"),
        ),
        (  # counted before its first thought
            "anthropic",
            sse(
                {"type": "message_start", "message": {"usage": {"input_tokens": 400, "output_tokens": 1}}},
                anthropic_delta("thinking", thinking=TEXT),
                anthropic_delta("text", text=FORTY_WORDS),
                {"type": "message_delta", "delta": {"stop_reason": "end_turn"}},
                {"type": "message_stop"},
            ),
            *((400, 0), [TEXT, FORTY_WORDS], "succeeded"),
        ),
        (  # begun, and failed
            "openai",
            sse(openai_delta(role="assistant"), {"error": {"message": "…", "type": "server_error"}}),
            *((None, 0), [], "failed"),
        ),
        (  # thought, and failed
            "openai",
            sse(openai_delta(reasoning_content=TEXT), {"error": {"message": "…", "type": "server_error"}}),
            *((None, 0), [TEXT], "failed"),
        ),
    ],
)
def test_what_came_after_the_last_count_is_counted_by_us(
    alice: User,
    server: AiServer,
    provider: str,
    body: str,
    said: tuple[int | None, int],
    by_our_count: list[str],
    status: str,
) -> None:
    write(server, alice, provider, body)
    usage, _, paid = outcome(alice)
    read = said[0] or our_prompt_count(usage)
    written = said[1] + sum(our_count(usage, text) for text in by_our_count)
    assert usage.status == status
    assert usage.provider_cost_microusd == pytest.approx(read / 10 + written / 2, abs=1)
    if status == "succeeded":
        assert (usage.input_tokens, usage.output_tokens, usage.is_estimated) == (read, written, True)
        assert paid == ceil_multiply(read + written, Decimal("1.5"))
    else:
        assert paid == 0


def test_what_the_operator_alone_can_mend_alarms_the_operator(alice: User, susan: User, server: AiServer) -> None:
    """Row 53: the user reads that it is not their fault, admins what to mend."""
    credit = "Your credit balance is too low to access the Anthropic API. Please go to Plans & Billing."
    error = {"type": "error", "error": {"type": "invalid_request_error", "message": credit}}
    failure = write(server, alice, "anthropic", json.dumps(error), status=400, type="application/json")
    assert "not your fault, and you were not charged" in failure
    usage, _, paid = outcome(alice)
    assert (usage.status, usage.error_message, paid) == ("failed", failure, 0)
    (alarm,) = Notification.objects.filter(kind="provider_refuses_us")
    assert alarm.user == susan
    assert "credit there is used up" in alarm.body


@contextmanager
def refused_by_the_database(table: str, when: str) -> Iterator[None]:
    """Rows of `table` are refused when they are written so: a fault that nobody has thought of."""
    with connection.cursor() as cursor:
        cursor.execute(
            "CREATE FUNCTION refuse_for_test() RETURNS trigger LANGUAGE plpgsql AS "
            "$$BEGIN RAISE EXCEPTION 'refused by the test' USING ERRCODE = 'check_violation'; END$$"
        )
        cursor.execute(
            f"CREATE TRIGGER refuse_for_test BEFORE INSERT OR UPDATE ON {table} FOR EACH ROW WHEN ({when}) "
            "EXECUTE FUNCTION refuse_for_test()"
        )
    try:
        yield
    finally:
        with connection.cursor() as cursor:
            cursor.execute("DROP FUNCTION refuse_for_test() CASCADE")


@pytest.mark.parametrize(
    ("table", "when", "status", "body"),
    [
        # The provider's count cannot be booked: ours is.
        ("billing_tokenusage", "NEW.status = 'succeeded' AND NOT NEW.is_estimated", "succeeded", TEXT),
        # No count can: the text is kept all the same, and costs nothing.
        ("billing_tokenusage", "NEW.status = 'succeeded'", "failed", TEXT),
        # Not even the text can be kept.
        ("ai_ops_contentversion", "true", "failed", ""),
    ],
)
def test_a_settlement_that_fails_leaves_no_hold(
    alice: User, server: AiServer, table: str, when: str, status: str, body: str
) -> None:
    with refused_by_the_database(table, when):
        write(server, alice, "openai", openai_text({"prompt_tokens": 100, "completion_tokens": 280}))
    usage, piece, paid = outcome(alice)
    assert (usage.status, piece.body) == (status, body)
    if status == "succeeded":
        assert usage.is_estimated
        assert paid == ceil_multiply(usage.actual_tokens, Decimal("1.5")) > 0
    else:
        assert (paid, usage.error_message) == (0, metering.SETTLEMENT_FAILED)
        assert not TokenTransaction.objects.filter(usage=usage).exists()


def expire_the_hold(user: User) -> None:
    """As it happens to who is suspended for hours, with the process: the hold is swept, what it held is spent, and the
    hour of its end is rolled up."""
    usage = TokenUsage.objects.filter(status="reserved")
    usage.update(expires_at=F("created_at") - timedelta(seconds=1))
    assert ledger.expire_reservations() == 1
    long_ago = timezone.now() - timedelta(days=2)
    TokenUsage.objects.update(created_at=long_ago, completed_at=long_ago)
    RollUp.objects.update_or_create(defaults={"sealing_until": roll_ups.hour_of(timezone.now()), "sealing_xid": 1})
    roll_ups.roll_up()
    assert UsageDay.objects.get().status == "expired"
    chat = ledger.Operation("chat", "openai", "gpt-6-luna", multiplier=Decimal(1))
    pools = TokenPools(output_tokens=10_000)
    ledger.deduct_tokens(user_id=user.pk, tokens=10_000, operation=chat, pools=pools)


TWO_HALVES = sse(
    {"choices": [{"index": 0, "delta": {"content": TEXT}}], "usage": None},
    {"choices": [{"index": 0, "delta": {"content": TEXT}, "finish_reason": "stop"}], "usage": None},
    {"choices": [], "usage": {"prompt_tokens": 100, "completion_tokens": 560}},
)


@pytest.mark.parametrize(
    ("how", "body", "options", "text", "state", "counts"),
    [
        ("ends", TWO_HALVES, {}, 2 * TEXT, "ready", (100, 560, False)),
        ("leaves", openai_chunk(400, 44), {"then": "stall"}, FORTY_WORDS, "cut_short", (400, 44, True)),
        ("breaks off", openai_chunk(400, 44), {"then": "cut"}, FORTY_WORDS, "cut_short", (400, 44, True)),
    ],
)
def test_a_text_whose_hold_has_expired_is_kept(
    alice: User, server: AiServer, how: str, body: str, options: Any, text: str, state: str, counts: tuple[Any, ...]
) -> None:
    """Row 54: what came is its user's, what it cost us is on its row; nothing is held any more, so nothing is charged
    (law 5), whatever else became of the balance."""
    marker = server.play(f"expired-{how.replace(' ', '-')}", body, **options)
    request = DraftRequest("Tea", f"Tea. {marker}", "Letters", "openai", MODELS["openai"], "neutral", "medium")

    async def read() -> None:
        draft = operations.generate_draft(user_id=alice.pk, request=request, idempotency_key=f"key-{how[:4]}-of-test")
        async with aclosing(draft):
            async for event in draft:
                if isinstance(event, TextDelta):
                    if await in_thread(TokenUsage.objects.filter(status="reserved").exists)():
                        await in_thread(expire_the_hold)(alice)
                    if how == "leaves":
                        return

    with suppress(ProviderError):
        asyncio.run(read())
    usage, piece = TokenUsage.objects.get(status="expired"), ContentPiece.objects.get()
    assert (piece.body, piece.state) == (text, state)
    assert piece.versions.get().usage_id == usage.pk
    assert (usage.input_tokens, usage.output_tokens, usage.is_estimated) == counts
    assert usage.provider_cost_microusd == -(-(counts[0] + 5 * counts[1]) // 10)
    assert (usage.billable_tokens, usage.error_message) == (0, metering.ENDED_TOO_LATE)
    assert usage.duration_ms is not None
    assert not TokenTransaction.objects.filter(usage=usage).exists()
    assert TokenAccount.objects.get(user=alice).balance == 0
    day = UsageDay.objects.get(status="expired")
    assert (day.provider_cost_microusd, day.actual_tokens) == (usage.provider_cost_microusd, usage.actual_tokens)


@pytest.mark.parametrize(
    ("body", "options", "made"),
    [
        # As servers that resemble OpenAI send them: an address in place of the file.
        (json.dumps({"data": [{"url": "https://example.com/1.png"}]}), {}, 1),
        (json.dumps({"data": [{"b64_json": "?"}] * 2, "usage": {"input_tokens": 0, "output_tokens": 0}}), {}, 2),
        ("", {"then": "stall"}, 2),  # begun, as when its reader leaves
        (json.dumps({"data": []}), {}, 0),
        (json.dumps({"error": {"message": "…", "type": "server_error"}}), {"status": 500}, 0),
    ],
)
def test_images_that_cannot_be_shown_cost_us_and_not_their_user(
    alice: User, server: AiServer, settings: Settings, body: str, options: dict[str, Any], made: int
) -> None:
    """Row 53: what it cost us stands on the row of a failure (law 9)."""
    settings.AI_IMAGE_TIMEOUT_SECONDS = 1.0
    ModelPrice.objects.filter(kind="image").update(image_cost_tokens={"1024x1024": 3_000})
    price = ModelPrice.objects.get(model="gpt-image-2")
    each_microusd = catalogue.provider_cost_microusd(
        price, TokenPools(), image_count=1, image_size="1024x1024", image_quality="low"
    )
    marker = server.play("spoilt-images", body, type="application/json", **options)
    request = ImageRequest(f"Rain {marker}", "", "Letters", "openai", "gpt-image-2", "1024x1024", "low", 2)

    async def read() -> None:
        async for _ in operations.generate_images(user_id=alice.pk, request=request, idempotency_key="spoilt-images"):
            pass

    with pytest.raises(ProviderError):
        asyncio.run(read())
    usage = TokenUsage.objects.get()
    assert usage.status == "failed"
    assert usage.provider_cost_microusd == pytest.approx(made * each_microusd, abs=1)
    assert each_microusd > 0
    assert TokenAccount.objects.get(user=alice).balance == 10_000


def test_images_whose_hold_has_expired_are_kept(alice: User, settings: Settings) -> None:
    """Row 54, for images."""
    ModelPrice.objects.filter(kind="image").update(image_cost_tokens={"1024x1024": 3_000})
    request = ImageRequest("Rain", "", "Letters", "openai", "gpt-image-2", "1024x1024", "low", 2)

    async def read() -> None:
        async for event in operations.generate_images(user_id=alice.pk, request=request, idempotency_key="late-images"):
            if isinstance(event, operations.Started):
                await in_thread(expire_the_hold)(alice)

    asyncio.run(read())
    usage = TokenUsage.objects.get(status="expired")
    assert ImageBatch.objects.get().state == "ready"
    assert GeneratedImage.objects.count() == usage.image_count == 2
    assert usage.provider_cost_microusd > 0
    assert (usage.billable_tokens, usage.error_message) == (0, metering.ENDED_TOO_LATE)
    assert TokenAccount.objects.get(user=alice).balance == 0
