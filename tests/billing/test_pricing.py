"""Arithmetic of tokens and money: whole numbers, rounded once, up (law 10)."""

from decimal import Decimal
from fractions import Fraction
from math import ceil

import pytest
from hypothesis import given
from hypothesis import strategies as st

from billing import pricing
from billing.pricing import TokenPools

counts = st.integers(0, 10**12)
multipliers = st.decimals("0.0001", "1000", places=4)
usd_prices = st.decimals("0", "999999", places=6)


@pytest.mark.parametrize(
    ("input_tokens", "output_tokens", "multiplier", "billable_tokens"),
    [
        (1_000, 500, "1.5", 2_250),
        (1, 0, "1.5", 2),
        (0, 0, "1.5", 0),
        (1, 2, "1", 3),
        (10, 0, "1.0001", 11),
        (3, 0, "0.3333", 1),
        # A float would make 3 × 1.1 = 3.3000000000000003 and 10 × 1.1 = 11.000000000000002, which is 12.
        (10, 0, "1.1", 11),
    ],
)
def test_text_costs_what_was_counted_times_the_multiplier(
    input_tokens: int, output_tokens: int, multiplier: str, billable_tokens: int
) -> None:
    billed = pricing.calculate_llm_billable_tokens(input_tokens, output_tokens, Decimal(multiplier))
    assert (billed.actual_tokens, billed.billable_tokens) == (input_tokens + output_tokens, billable_tokens)


@given(counts, counts, multipliers)
def test_the_cost_is_the_exact_product_rounded_up_once(
    input_tokens: int, output_tokens: int, multiplier: Decimal
) -> None:
    billed = pricing.calculate_llm_billable_tokens(input_tokens, output_tokens, multiplier)
    assert billed.billable_tokens == ceil(Fraction(input_tokens + output_tokens) * Fraction(multiplier))
    assert type(billed.billable_tokens) is int


@given(counts, counts, counts, multipliers, multipliers)
def test_more_never_costs_less_and_splitting_never_saves(
    tokens: int, more_tokens: int, output_tokens: int, multiplier: Decimal, other_multiplier: Decimal
) -> None:
    def cost(tokens: int, multiplier: Decimal = multiplier) -> int:
        return pricing.calculate_llm_billable_tokens(tokens, output_tokens, multiplier).billable_tokens

    assert 0 <= cost(tokens) <= cost(tokens + more_tokens)
    low, high = sorted((multiplier, other_multiplier))
    assert cost(tokens, low) <= cost(tokens, high)
    together = pricing.calculate_llm_billable_tokens(tokens, more_tokens, multiplier).billable_tokens
    parts = [
        pricing.calculate_llm_billable_tokens(part, 0, multiplier).billable_tokens for part in (tokens, more_tokens)
    ]
    assert together <= sum(parts) <= together + 1  # each part is rounded up by less than one


@pytest.mark.parametrize(
    ("input_tokens", "output_tokens", "multiplier"), [(-1, 0, "1"), (0, -1, "1"), (1, 1, "0"), (1, 1, "-1")]
)
def test_impossible_counts_and_multipliers_are_refused(input_tokens: int, output_tokens: int, multiplier: str) -> None:
    with pytest.raises(ValueError, match=r"negative|positive"):
        pricing.calculate_llm_billable_tokens(input_tokens, output_tokens, Decimal(multiplier))


@pytest.mark.parametrize(
    ("model", "size", "count", "cost_per_image_tokens", "billable_tokens"),
    [
        ("dall-e-3", "1024x1024", 2, None, 12_000),
        ("dall-e-3", "1792x1024", 1, None, 6_000),
        ("dall-e-2", "1024x1024", 1, None, 3_000),
        ("dall-e-2", "256x256", 3, None, 9_000),
        ("imagen-4.0-generate-001", "1024x1024", 1, None, 4_500),
        ("dall-e-3", "an unknown size", 1, None, 6_000),
        ("an unknown model", "1024x1024", 1, None, 6_000),
        ("gpt-image-2", "1024x1024", 4, 7_000, 28_000),
        ("gpt-image-2", "1024x1024", 4, 0, 0),
    ],
)
def test_images_cost_their_fixed_price(
    model: str, size: str, count: int, cost_per_image_tokens: int | None, billable_tokens: int
) -> None:
    billed = pricing.calculate_image_billable_tokens(model, size, count, cost_per_image_tokens)
    assert billed.billable_tokens == billable_tokens


@given(count=st.integers(1, 1_000), more=st.integers(1, 1_000), cost_tokens=st.integers(0, 10**12))
def test_images_cost_their_price_times_their_number(count: int, more: int, cost_tokens: int) -> None:
    def cost(count: int) -> int:
        return pricing.calculate_image_billable_tokens("any", "any", count, cost_tokens).billable_tokens

    assert cost(1) == cost_tokens
    assert cost(count + more) == cost(count) + cost(more)


def test_no_image_is_no_operation() -> None:
    with pytest.raises(ValueError, match="At least one image"):
        pricing.calculate_image_billable_tokens("dall-e-3", "1024x1024", 0)


@given(available_tokens=counts, input_tokens=counts, multiplier=multipliers)
def test_the_affordable_output_is_the_most_that_fits(
    available_tokens: int, input_tokens: int, multiplier: Decimal
) -> None:
    output_tokens = pricing.affordable_output_tokens(
        available_tokens=available_tokens, input_tokens=input_tokens, multiplier=multiplier
    )

    def quote(output_tokens: int) -> int:
        return pricing.calculate_llm_billable_tokens(input_tokens, output_tokens, multiplier).billable_tokens

    assert output_tokens >= 0
    assert output_tokens == 0 or quote(output_tokens) <= available_tokens
    assert quote(output_tokens + 1) > available_tokens


def test_the_providers_cost_prices_each_pool_and_counts_reasoning_once() -> None:
    pools = TokenPools(
        input_tokens=1_000,
        cached_input_tokens=10_000,
        cache_write_tokens=100,
        output_tokens=500,
        reasoning_tokens=400,
    )
    prices = {"input": "2", "cached_input": "0.2", "cache_write": "2.5", "output": "10"}
    assert pools.actual_tokens == 11_600
    assert (
        pricing.provider_cost_microusd(pools, usd_per_million={pool: Decimal(usd) for pool, usd in prices.items()})
        == 2_000 + 2_000 + 250 + 5_000
    )
    assert pricing.provider_cost_microusd(TokenPools(input_tokens=1), usd_per_million={"input": Decimal("0.05")}) == 1


def test_a_part_with_a_price_of_its_own_is_taken_out_of_its_pool() -> None:
    pools = TokenPools(
        input_tokens=1_000,
        image_input_tokens=200,
        audio_input_tokens=300,
        cache_write_tokens=100,
        cache_write_1h_tokens=40,
        output_tokens=2_677,
        reasoning_tokens=337,
        text_output_tokens=340,
        audio_output_tokens=100,
    )
    usd = {"input": 2, "cache_write": 2, "output": 120, "reasoning": 12, "text_output": 12, "audio_output": 60}
    usd |= {"image_input": 8, "audio_input": 4, "cache_write_1h": 4}
    cost = pricing.provider_cost_microusd(pools, usd_per_million={name: Decimal(price) for name, price in usd.items()})
    words, pictures = 337 + 340, 2_677 - 337 - 340 - 100
    assert cost == 500 * 2 + 200 * 8 + 300 * 4 + 60 * 2 + 40 * 4 + pictures * 120 + words * 12 + 100 * 60


@given(
    tokens=st.tuples(counts, counts, counts, counts),
    reasoning_share=st.fractions(0, 1),
    usd=st.tuples(usd_prices, usd_prices, usd_prices, usd_prices),
    reasoning_usd=st.none() | usd_prices,
)
def test_the_providers_cost_is_exact_and_rounded_up_once(
    tokens: tuple[int, int, int, int],
    reasoning_share: Fraction,
    usd: tuple[Decimal, ...],
    reasoning_usd: Decimal | None,
) -> None:
    reasoning_tokens = int(tokens[3] * reasoning_share)
    prices = dict(zip(("input", "cached_input", "cache_write", "output"), usd, strict=True))
    exact = sum(Fraction(price) * count for count, price in zip(tokens, usd, strict=True))
    if reasoning_usd is not None:
        prices["reasoning"] = reasoning_usd
        exact += reasoning_tokens * (Fraction(reasoning_usd) - Fraction(usd[3]))
    pools = TokenPools(*tokens, reasoning_tokens=reasoning_tokens)
    cost = pricing.provider_cost_microusd(pools, usd_per_million=prices)
    assert cost == ceil(exact) >= 0
    assert type(cost) is int


def test_savings_are_never_overstated() -> None:
    starter = {"base_tokens": 150_000, "base_price_cents": 1_500}
    assert pricing.savings_percent(tokens=750_000, price_cents=6_500, **starter) == 13  # 13.33
    assert pricing.savings_percent(tokens=2_250_000, price_cents=17_500, **starter) == 22  # 22.22
    assert pricing.savings_percent(tokens=7_500_000, price_cents=50_000, **starter) == 33  # 33.33
    assert pricing.savings_percent(tokens=150_000, price_cents=1_500, **starter) == 0
    assert pricing.savings_percent(tokens=150_000, price_cents=9_900, **starter) == 0


def test_prices_and_exchange() -> None:
    assert pricing.price_per_1k_cents(tokens=150_000, price_cents=1_500) == 10
    assert pricing.tokens_for_cents(amount_cents=500, tokens_per_usd=Decimal(10_000)) == 50_000
    assert pricing.tokens_for_cents(amount_cents=1, tokens_per_usd=Decimal("9999.9999")) == 99
    assert pricing.display_price(1_500) == "$15.00"
    assert pricing.display_price(123_456_05, "eur") == "€123,456.05"
