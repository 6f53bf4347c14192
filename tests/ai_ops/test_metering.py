"""Quotes: what an operation can cost at most, and how much text a balance allows."""

from dataclasses import replace
from decimal import Decimal

import pytest

from accounts.models import User
from ai_ops import metering, prompts
from ai_ops.metering import MIN_OUTPUT_TOKENS, Ask, Quote, TooLongForModel
from ai_ops.prompts import LENGTHS, TONES, Prompt, draft_prompt
from billing import ledger
from billing.catalogue import RetiredModel, UnknownModel, system_settings
from billing.ledger import AccountNotActive, InsufficientTokens
from billing.models import ModelPrice, TokenAccount, TokenUsage
from standins.ai import count_tokens as count_as_the_provider
from tests.conftest import MakeUser

pytestmark = pytest.mark.django_db

PROMPT = draft_prompt(title="Green tea", topic="A letter about green tea.", tone="friendly", length="medium")


def quote(
    user: User, *, prompt: Prompt = PROMPT, wanted: int = 1_200, model: str = "gpt-6-luna", provider: str = "openai"
) -> Quote:
    return metering.quote_text(
        user_id=user.pk,
        ask=Ask(
            operation_type=TokenUsage.OperationType.GENERATION,
            provider=provider,
            model=model,
            prompt=prompt,
            wanted_output_tokens=wanted,
        ),
    )


def test_quote_is_the_most_it_can_cost(alice: User) -> None:
    """ceil((input + text + room for thinking) × multiplier), and nothing is held by asking."""
    answer = quote(alice)
    assert (answer.text_tokens, answer.thinking_tokens, answer.output_limit_tokens) == (1_200, 2_000, 3_200)
    assert answer.max_billable_tokens == -(-(answer.input_tokens + 3_200) * 3 // 2)
    assert (answer.multiplier, answer.available_tokens, answer.is_reduced) == (Decimal("1.5"), 10_000, False)
    assert not TokenUsage.objects.exists()
    assert ledger.get_account(user_id=alice.pk).reserved == 0


@pytest.mark.parametrize("tone", TONES)
@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize(
    "topic",
    [
        "Tea.",
        "A long letter about green tea, its harvest and its friends. " * 200,
        "抹茶について書いてください。" * 40,
        "🍵" * 90,
    ],
)
def test_quoted_input_covers_what_a_provider_counts(alice: User, tone: str, length: str, topic: str) -> None:
    prompt = draft_prompt(title="Green tea", topic=topic, tone=tone, length=length)
    assert quote(alice, prompt=prompt).input_tokens >= count_as_the_provider(prompt.text)


def test_prompt_says_what_was_asked_for() -> None:
    prompt = prompts.draft_prompt(title="T1", topic="T2", tone="playful", length="long")
    assert "playful" in prompt.system
    assert "700 words" in prompt.system
    assert (prompt.messages[-1].role, prompt.messages[-1].text) == ("user", "Title: T1\n\nWhat it is about:\nT2")


def test_small_balance_lowers_the_limit_and_never_below_the_least(make_user: MakeUser) -> None:
    """Every balance gets the longest text it can pay for, or is told exactly what the shortest one lacks."""
    nora = make_user("nora", tokens=1)
    full = quote(make_user("rich", tokens=100_000))
    least_output_tokens = MIN_OUTPUT_TOKENS + full.thinking_tokens // 4
    least_tokens = -(-(full.input_tokens + least_output_tokens) * 3 // 2)
    for tokens in (1, least_tokens - 1, least_tokens, least_tokens + 1, 1_700, full.max_billable_tokens - 1):
        TokenAccount.objects.filter(user=nora).update(balance=tokens)  # rolled back; the ledger is not the subject
        if tokens < least_tokens:
            with pytest.raises(InsufficientTokens) as refusal:
                quote(nora)
            assert refusal.value.missing_tokens == least_tokens - tokens
            assert refusal.value.http_status == 402
            continue
        answer = quote(nora)
        assert answer.is_reduced
        assert least_output_tokens <= answer.output_limit_tokens < 3_200
        assert answer.held_tokens <= tokens < answer.held_tokens + 3  # one token more would not fit
        assert answer.max_billable_tokens == full.max_billable_tokens  # the quote stays the quote


def test_what_is_reserved_is_not_offered_twice(alice: User) -> None:
    before = quote(alice)
    metering.reserve_quote(before, idempotency_key="first-one", request={"n": 1})
    assert quote(alice).available_tokens == 10_000 - before.max_billable_tokens


def test_limit_of_the_model_applies(alice: User) -> None:
    ModelPrice.objects.filter(model="gpt-6-luna").update(max_output_tokens=300)
    answer = quote(alice)
    assert (answer.output_limit_tokens, answer.thinking_tokens, answer.is_reduced) == (300, 0, False)


@pytest.mark.parametrize(
    ("limits", "prompt", "least_tokens", "words"),
    [
        ({"max_output_tokens": 8_192}, PROMPT, 20_000, "writes at most 8,192 tokens at once.*20,5"),
        ({"max_output_tokens": 8_192}, PROMPT, 8_192, "writes at most 8,192"),  # without room for thinking
        ({"max_input_tokens": 4_000}, draft_prompt(title="T", topic="tea " * 5_000, tone="neutral", length="short"), 0,
         "reads at most 4,000 tokens at once"),
    ],
)  # fmt: skip
def test_what_the_model_cannot_do_is_refused_before_anything_is_held(
    make_user: MakeUser, limits: dict[str, int], prompt: Prompt, least_tokens: int, words: str
) -> None:
    rich = make_user("rich", tokens=1_000_000)
    ask = Ask(TokenUsage.OperationType.REFINEMENT, "openai", "gpt-6-luna", prompt, 40_000, least_tokens)
    metering.quote_text(user_id=rich.pk, ask=ask)
    ModelPrice.objects.filter(model="gpt-6-luna").update(**limits)
    with pytest.raises(TooLongForModel, match=words) as refusal:
        metering.quote_text(user_id=rich.pk, ask=ask)
    assert refusal.value.http_status == 422


def test_a_revision_that_the_balance_would_cut_short_is_refused(make_user: MakeUser) -> None:
    """A text may end early; a revision that does changes nothing, and would be paid for all the same."""
    poor = make_user("poor", tokens=4_000)
    ask = Ask(TokenUsage.OperationType.REFINEMENT, "openai", "gpt-6-luna", PROMPT, 6_000)
    assert metering.quote_text(user_id=poor.pk, ask=ask).is_reduced
    with pytest.raises(InsufficientTokens):
        metering.quote_text(user_id=poor.pk, ask=replace(ask, least_output_tokens=3_000))


def test_multiplier_of_the_model_goes_before_the_settings(alice: User, susan: User) -> None:
    system_settings.update_system_settings(changes={"token_multiplier": Decimal("2.5")}, changed_by_id=susan.pk)
    assert quote(alice).multiplier == Decimal("2.5")
    ModelPrice.objects.filter(model="gpt-6-luna").update(multiplier=Decimal(4))
    assert quote(alice).multiplier == Decimal(4)


def test_model_that_cannot_be_used(alice: User) -> None:
    """Row 58."""
    with pytest.raises(UnknownModel, match="no model “gpt-0”"):
        quote(alice, model="gpt-0")
    with pytest.raises(RetiredModel, match="Use claude-opus-5-5 instead"):
        quote(alice, provider="anthropic", model="claude-opus-4-20250514")


@pytest.mark.parametrize("status", ["suspended", "blocked"])
def test_account_that_is_not_active_gets_no_quote(alice: User, status: str) -> None:
    """Row 60."""
    TokenAccount.objects.filter(user=alice).update(status=status, status_reason="Under review.")
    with pytest.raises(AccountNotActive, match=status):
        quote(alice)
