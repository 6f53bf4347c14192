"""Our count of tokens against what the tokenizers say, which `make bench-tokens` has written to true_counts.json."""

import json
from pathlib import Path

import pytest

from ai_ops import counting
from ai_ops.metering import QUOTE_MARGIN
from billing.pricing import ceil_multiply
from tests.tokens.texts import LANGUAGES, TEXTS

TRUE_COUNTS: dict[str, dict[str, int]] = json.loads(Path(__file__).with_name("true_counts.json").read_text())
MODELS = {
    "gpt": ("openai", "gpt-6-luna"),
    "claude": ("anthropic", "claude-opus-4-20250514"),
    "claude-4.7": ("anthropic", "claude-haiku-5-5"),
    "gemini": ("google", "gemini-3.8-flash"),
}
# Languages that the vocabularies know least: there the bound is wide.
RARE_LANGUAGES = {"Amharic", "Burmese", "Khmer", "Telugu"}


@pytest.mark.parametrize("tokenizer", MODELS)
def test_a_quote_is_above_the_true_count_and_not_far_above(tokenizer: str) -> None:
    """Row 49: whatever is pasted; the languages that people write in are not quoted at twice what they take."""
    provider, model = MODELS[tokenizer]
    ratios = {}
    for name, text in TEXTS.items():
        count = counting.count_tokens(text, provider=provider, model=model)
        ratios[name] = ceil_multiply(count, QUOTE_MARGIN) / TRUE_COUNTS[name][tokenizer]
    assert len(ratios) >= 45
    assert {name: ratio for name, ratio in ratios.items() if ratio < 1} == {}
    assert ratios["English"] <= 1.6
    main = {name: ratios[name] for name in LANGUAGES if name not in RARE_LANGUAGES}
    assert {name: ratio for name, ratio in main.items() if ratio > 2} == {}


@pytest.mark.parametrize(
    ("model", "is_older"),
    [
        ("claude-3-5-sonnet-20241022", True),
        ("claude-opus-4-20250514", True),
        ("claude-sonnet-4-6", True),
        ("claude-opus-4-7", False),
        ("claude-opus-4.10", False),
        ("claude-sonnet-5-5", False),
        ("claude-sonnet-5", False),
        ("claude-of-tomorrow", False),
    ],
)
def test_newer_models_of_anthropic_count_more(model: str, is_older: bool) -> None:
    older, newer = (
        counting.count_tokens(TEXTS["English"], provider="anthropic", model=name)
        for name in ("claude-3-opus-20240229", "claude-opus-4-8")
    )
    assert older < newer
    count = counting.count_tokens(TEXTS["English"], provider="anthropic", model=model)
    assert count == (older if is_older else newer)


def test_any_text_has_a_count() -> None:
    """Also one with special tokens, what is no character, or nothing in it."""
    for provider, model in MODELS.values():
        assert counting.count_tokens("", provider=provider, model=model) == 0
        assert counting.count_tokens("<|endoftext|>\ud800\0", provider=provider, model=model) > 5
