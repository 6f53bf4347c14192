"""Pure arithmetic of tokens and money: no database, no settings, no clock.

Tokens and cents are integers. Multipliers and exchange rates are `Decimal`. Every result is rounded once, up, at the
end (law 10). Nothing here accepts a float.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from decimal import ROUND_CEILING, Decimal
from types import MappingProxyType

DEFAULT_TOKEN_MULTIPLIER = Decimal("1.5")

# What one image costs the user, by model and size, in tokens. For callers that pass no cost; the product always does.
IMAGE_COSTS: Mapping[str, Mapping[str, int]] = MappingProxyType(
    {
        "dall-e-3": {"1024x1024": 6_000, "1024x1792": 6_000, "1792x1024": 6_000},
        "dall-e-2": {"256x256": 3_000, "512x512": 3_000, "1024x1024": 3_000},
        "imagen": {"1024x1024": 4_500},
    }
)
DEFAULT_IMAGE_COST_TOKENS = 6_000

CURRENCY_SYMBOLS = MappingProxyType({"usd": "$", "eur": "€", "gbp": "£"})


# Above what any one operation uses, and small enough that no product of it leaves a bigint.
MAX_POOL_TOKENS = 10**9


@dataclass(frozen=True, slots=True)
class TokenPools:
    """What a provider counted, in pools that exclude one another, so that each can carry its own price.

    The fields under "parts" name tokens that are counted in a pool already, because a provider may charge another
    price for them. They are never added to it. Only `reasoning_tokens` is kept on the usage row; the others are for
    the cost alone.
    """

    input_tokens: int = 0
    cached_input_tokens: int = 0
    cache_write_tokens: int = 0
    output_tokens: int = 0
    # Parts.
    reasoning_tokens: int = 0  # of the output: thought and not shown
    text_output_tokens: int = 0  # of the output: words, where an image model says which they are
    audio_output_tokens: int = 0  # of the output
    image_input_tokens: int = 0  # of the input
    audio_input_tokens: int = 0  # of the input
    cache_write_1h_tokens: int = 0  # of the cache writes: kept for an hour

    @property
    def actual_tokens(self) -> int:
        return self.input_tokens + self.cached_input_tokens + self.cache_write_tokens + self.output_tokens

    @property
    def picture_tokens(self) -> int:
        """Of the output of an image model: what is neither thought, written nor spoken."""
        return self.output_tokens - self.reasoning_tokens - self.text_output_tokens - self.audio_output_tokens

    def __add__(self, other: "TokenPools") -> "TokenPools":
        """The pools of two calls that one operation made."""
        return TokenPools(**{name: getattr(self, name) + getattr(other, name) for name in self.__slots__})


# Which pool each part is counted in.
POOL_OF_PART: Mapping[str, str] = MappingProxyType(
    {
        "reasoning": "output",
        "text_output": "output",
        "audio_output": "output",
        "image_input": "input",
        "audio_input": "input",
        "cache_write_1h": "cache_write",
    }
)


@dataclass(frozen=True, slots=True)
class BillableTokens:
    """What an operation counted (`actual_tokens`) and what it costs the user (`billable_tokens`)."""

    actual_tokens: int
    billable_tokens: int


def ceil_multiply(amount: int, factor: Decimal) -> int:
    """`amount` × `factor`, rounded up to a whole number."""
    return int((Decimal(amount) * factor).to_integral_value(rounding=ROUND_CEILING))


def calculate_llm_billable_tokens(
    input_tokens: int, output_tokens: int, multiplier: Decimal = DEFAULT_TOKEN_MULTIPLIER
) -> BillableTokens:
    """The cost of a text operation: ceil((input + output) × multiplier) tokens.

    >>> calculate_llm_billable_tokens(1000, 500)
    BillableTokens(actual_tokens=1500, billable_tokens=2250)

    Raises ValueError on a negative count or a multiplier that is not positive.
    """
    if input_tokens < 0 or output_tokens < 0:
        raise ValueError("Token counts cannot be negative.")
    if multiplier <= 0:
        raise ValueError("The multiplier must be positive.")
    actual_tokens = input_tokens + output_tokens
    return BillableTokens(actual_tokens, ceil_multiply(actual_tokens, multiplier))


def calculate_image_billable_tokens(
    model: str, size: str = "1024x1024", count: int = 1, cost_per_image_tokens: int | None = None
) -> BillableTokens:
    """The cost of `count` images: cost per image × count, in tokens.

    The cost per image is `cost_per_image_tokens` when the caller knows it (catalogue, settings), else the one of
    `IMAGE_COSTS`, else `DEFAULT_IMAGE_COST_TOKENS`. Images have no provider tokens here: actual equals billable.

    >>> calculate_image_billable_tokens("dall-e-3", "1024x1024", 2).billable_tokens
    12000
    """
    if count < 1:
        raise ValueError("At least one image must be asked for.")
    if cost_per_image_tokens is None:
        costs = next((costs for name, costs in IMAGE_COSTS.items() if model.startswith(name)), {})
        cost_per_image_tokens = costs.get(size, max(costs.values(), default=DEFAULT_IMAGE_COST_TOKENS))
    billable_tokens = cost_per_image_tokens * count
    return BillableTokens(billable_tokens, billable_tokens)


def affordable_output_tokens(*, available_tokens: int, input_tokens: int, multiplier: Decimal) -> int:
    """The most output tokens whose quote, input included, fits into `available_tokens`. Never negative."""
    affordable_actual_tokens = int(Decimal(available_tokens) / multiplier)
    return max(0, affordable_actual_tokens - input_tokens)


def provider_cost_microusd(pools: TokenPools, *, usd_per_million: Mapping[str, Decimal]) -> int:
    """What the provider charges us for `pools`, in micro-dollars (1 USD = 1,000,000), rounded up.

    `usd_per_million` gives the price of each pool, and of each part that has a price of its own, in USD per million
    tokens, which is micro-dollars per token. A part without one costs what its pool does.
    """
    return ceil_multiply(1, exact_cost_microusd(pools, usd_per_million))


def exact_cost_microusd(pools: TokenPools, usd_per_million: Mapping[str, Decimal]) -> Decimal:
    """The same before it is rounded, for a sum of several."""
    total = Decimal(0)
    for name in ("input", "cached_input", "cache_write", "output"):
        total += getattr(pools, f"{name}_tokens") * usd_per_million.get(name, Decimal(0))
    for part, pool in POOL_OF_PART.items():
        pool_usd = usd_per_million.get(pool, Decimal(0))
        total += getattr(pools, f"{part}_tokens") * (usd_per_million.get(part, pool_usd) - pool_usd)
    return total


def price_per_1k_cents(*, tokens: int, price_cents: int) -> Decimal:
    """The price of 1,000 tokens in cents, exact."""
    return Decimal(price_cents) * 1000 / Decimal(tokens)


def savings_percent(*, tokens: int, price_cents: int, base_tokens: int, base_price_cents: int) -> int:
    """By how many whole per cent a token is cheaper than in the base package, rounded down (never overstated)."""
    base_cost_cents = Decimal(base_price_cents) * tokens / base_tokens
    return max(0, int((base_cost_cents - price_cents) * 100 / base_cost_cents))


def tokens_for_cents(*, amount_cents: int, tokens_per_usd: Decimal) -> int:
    """How many tokens a custom amount buys at the exchange rate, rounded down: the rate is never undercut."""
    return int(Decimal(amount_cents) * tokens_per_usd / 100)


def display_price(amount_cents: int, currency: str = "usd") -> str:
    """A price for people: `$15.00`."""
    return f"{CURRENCY_SYMBOLS.get(currency, currency.upper() + ' ')}{amount_cents // 100:,}.{amount_cents % 100:02d}"
