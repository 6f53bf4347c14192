"""What becomes of what a provider says it counted (rows 49, 52 and 109): pure, so every combination can be tried."""

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ai_ops.providers.counts import COUNTS, Said, count_call
from billing.pricing import MAX_POOL_TOKENS, TokenPools, calculate_llm_billable_tokens

PROMPT, TEXT = 51, 280  # our own counts

NOTHING: tuple[Any, ...] = (None, 0, -5, True, 280.0, "280", 2**63, [280], {}, float("nan"))


def openai(prompt: Any = None, completion: Any = None, total: Any = None, **details: Any) -> Said:
    return Said(input=prompt, output=completion, total=total, is_cache_in_input=True, **details)


def anthropic(fresh: Any = None, output: Any = None, **details: Any) -> Said:
    return Said(input=fresh, output=output, **details)


def google(prompt: Any = None, candidates: Any = None, total: Any = None, **details: Any) -> Said:
    flags = {"is_cache_in_input": True, "is_reasoning_in_output": False}
    return Said(input=prompt, output=candidates, total=total, **details, **flags)


def billed(pools: TokenPools) -> int:
    return calculate_llm_billable_tokens(pools.actual_tokens - pools.output_tokens, pools.output_tokens).billable_tokens


@pytest.mark.parametrize(
    ("said", "pools", "is_estimated"),
    [
        # Taken at its word, each as its provider means it.
        (openai(100, 280, 380, cached_input=60, cache_write=30, reasoning=80), (10, 60, 30, 280, 80), False),
        (anthropic(100, 280, cached_input=60, cache_write=30, reasoning=80), (100, 60, 30, 280, 80), False),
        (google(100, 280, 460, cached_input=60, reasoning=80), (40, 60, 0, 360, 80), False),
        (google(100, 280, 410, tool_input=30), (130, 0, 0, 280, 0), False),
        (anthropic(0, 280, cached_input=500), (0, 500, 0, 280, 0), False),
        (anthropic(100, 280, cache_write_5m=20, cache_write_1h=10), (100, 0, 30, 280, 0), False),
        # The total says where the reasoning is.
        (openai(100, 280, 1_180, reasoning=800), (100, 0, 0, 1_080, 800), False),
        (openai(100, 900, 1_300, reasoning=300), (100, 0, 0, 1_200, 300), False),
        (openai(100, 1_080, 1_180, reasoning=800), (100, 0, 0, 1_080, 800), False),
        (google(10, 1_080, 1_090, reasoning=800), (10, 0, 0, 1_080, 800), False),
        # … unless it has only left it out: the text is as long as all candidates.
        (google(10, 280, 290, reasoning=200), (10, 0, 0, 480, 200), False),
        (google(10, 280, 290, reasoning=800), (10, 0, 0, 1_080, 800), False),
        # What cannot be is cut.
        (openai(100, 280, 380, reasoning=800), (100, 0, 0, 280, 280), True),
        (openai(100, 280, reasoning=281), (100, 0, 0, 280, 280), True),
        (anthropic(100, 280, reasoning=800), (100, 0, 0, 280, 280), True),
        (openai(100, 280, 380, cached_input=600), (0, 100, 0, 280, 0), True),
        (openai(100, 280, 380, cached_input=60, cache_write=60), (0, 60, 40, 280, 0), True),
        (google(100, 280, 380, cached_input=101), (0, 100, 0, 280, 0), True),
        # Nonsense in a detail costs the detail alone.
        (openai(100, 280, 380, reasoning=-3), (100, 0, 0, 280, 0), True),
        (openai(100, 280, 380, cached_input="60"), (100, 0, 0, 280, 0), True),
        (openai(100, 280, "380"), (100, 0, 0, 280, 0), False),  # we keep no total
        # Each half stands for itself.
        (openai(100, 0, 100), (100, 0, 0, TEXT, 0), True),
        (openai(0, 280, 280), (PROMPT, 0, 0, 280, 0), True),
        (openai(0, 0, 0), (PROMPT, 0, 0, TEXT, 0), True),
        (openai(None, None, 331), (PROMPT, 0, 0, TEXT, 0), True),
        (openai(None, 0, reasoning=40), (PROMPT, 0, 0, TEXT + 40, 40), True),
        (anthropic(None, 280, cached_input=40), (PROMPT - 40, 40, 0, 280, 0), True),
        (google(None, None, reasoning=40), (PROMPT, 0, 0, TEXT + 40, 40), True),
        (google(100, None, 900, reasoning=800), (100, 0, 0, TEXT + 800, 800), True),
        (openai(), (PROMPT, 0, 0, TEXT, 0), True),
        # Next to nothing is as good as nothing: the count of one piece, or a default.
        (openai(100, 93, 193), (100, 0, 0, TEXT, 0), True),
        (openai(100, 94, 194), (100, 0, 0, 94, 0), False),
        (anthropic(100, 1), (100, 0, 0, TEXT, 0), True),
        (google(100, 1, 901, reasoning=800), (100, 0, 0, TEXT + 800, 800), True),
        (openai(1, 280, 281), (PROMPT, 0, 0, 280, 0), True),
        (openai(2, 280, 282, cached_input=1), (1, 1, 0, 280, 0), False),
        (anthropic(0, 280, cached_input=1), (PROMPT - 1, 1, 0, 280, 0), True),
        (None, (PROMPT, 0, 0, TEXT, 0), True),
        *((openai(bad, bad, bad), (PROMPT, 0, 0, TEXT, 0), True) for bad in NOTHING),
        *((anthropic(bad, 280), (PROMPT, 0, 0, 280, 0), True) for bad in NOTHING),
        *((google(100, bad), (100, 0, 0, TEXT, 0), True) for bad in NOTHING),
    ],
)
def test_a_whole_text_is_counted(said: Said | None, pools: tuple[int, ...], is_estimated: bool) -> None:
    counted = count_call(said, prompt_tokens=PROMPT, text_tokens=TEXT)
    made = counted.pools
    assert (
        made.input_tokens,
        made.cached_input_tokens,
        made.cache_write_tokens,
        made.output_tokens,
        made.reasoning_tokens,
    ) == pools
    assert counted.is_estimated is is_estimated


def test_what_it_costs_the_user() -> None:
    def bill(said: Said | None) -> int:
        return billed(count_call(said, prompt_tokens=PROMPT, text_tokens=TEXT).pools)

    assert bill(openai(100, 280, 1_180, reasoning=800)) == 1_770
    assert bill(openai(0, 0, 0)) == bill(openai()) == bill(None) == 497


@pytest.mark.parametrize(
    ("said", "text", "later", "thought", "output", "reasoning"),
    [
        (anthropic(400, 1), 50, 50, 0, 50, 0),  # said before the first word, of that word
        (anthropic(400, 300, reasoning=300), 50, 50, 0, 350, 300),  # … or of what was thought before it
        (anthropic(400, 1), 0, 0, 0, 1, 0),
        (google(400, 30), 50, 0, 0, 30, 0),  # said with the last word
        (google(400, 30), 50, 20, 0, 50, 0),
        (google(400, 30, reasoning=100), 50, 20, 0, 150, 100),
        (google(400), 50, 50, 0, 50, 0),
        (openai(400, 30), 50, 20, 0, 50, 0),
        (openai(400, 3), 50, 20, 0, 50, 0),  # next to nothing beside what it had written by then
        (None, 50, 50, 0, 50, 0),
        # Thoughts that were heard and not counted, and such as were counted better.
        (anthropic(400, 1), 0, 0, 90, 90, 90),
        (anthropic(400, 1), 50, 50, 90, 140, 90),
        (google(400, None, reasoning=200), 0, 0, 90, 200, 200),
        (google(400), 0, 0, 90, 90, 90),
        (None, 0, 0, 90, 90, 90),
        (None, 50, 50, 90, 140, 90),
    ],
)
def test_a_text_that_was_left_is_counted_from_where_the_provider_stopped(
    said: Said | None, text: int, later: int, thought: int, output: int, reasoning: int
) -> None:
    counted = count_call(said, prompt_tokens=PROMPT, text_tokens=text, later_text_tokens=later, thought_tokens=thought)
    assert (counted.pools.output_tokens, counted.pools.reasoning_tokens) == (output, reasoning)
    assert counted.pools.input_tokens == (400 if said else PROMPT)


def test_running_totals_are_never_taken_back() -> None:
    said = anthropic(9_000, 1, cached_input=50).updated(anthropic(0, 40)).updated(anthropic(None, -1, cached_input=0))
    assert said == anthropic(9_000, 40, cached_input=50)
    assert openai("?", None).updated(openai(None, 7)) == openai("?", 7)
    assert openai("?", 7).updated(openai(5, "?")) == openai(5, 7)
    # What was estimated at the start is replaced, as one set: pools of two statements do not add up.
    assert google(1_318, 40).updated(google(60, 28)) == google(60, 28)
    assert openai(9_000, 400, cached_input=60).updated(openai(90, 280)) == openai(90, 280, cached_input=60)
    start = anthropic(400, 1, cache_write_1h=5, cache_write=5)
    end = anthropic(20, 280, cached_input=380, cache_write=0, cache_write_1h=0)
    assert start.updated(end) == end
    assert start.updated(anthropic(20, 280, cached_input=380)) == replace(end, cache_write=5, cache_write_1h=5)
    assert anthropic(20, 1, cached_input=380).updated(anthropic(400, 9)) == anthropic(20, 9, cached_input=380)
    assert google(60, 280, reasoning=90).updated(google(60, 0, reasoning=0)) == google(60, 280, reasoning=90)
    said = anthropic(0, 5).updated(anthropic(None, 6))
    assert count_call(said, prompt_tokens=PROMPT, text_tokens=0).pools.input_tokens == PROMPT


@pytest.mark.parametrize(
    ("said", "pools"),
    [
        (openai(100, 39_340), (100, 0, TEXT, 0)),  # the sum of running totals
        (openai(100, 280, 5_280, reasoning=5_000), (100, 0, 280, 0)),
        (google(100, 1_700, reasoning=1_700), (100, 0, 1_760, 1_700)),  # together more than the limit
        (openai(100, 1_300), (100, 0, 1_300, 0)),  # somewhat above the limit: it thought for too long
        (anthropic(1_500_000, 280), (PROMPT, 0, 280, 0)),
        (anthropic(15_000, 280, cached_input=15_000), (PROMPT, 0, 280, 0)),
        (openai(100, 280, cached_input=200_000), (100, 0, 280, 0)),
        (google(100, 280, tool_input=200_000), (100, 0, 280, 0)),
        (anthropic(9_000, 280), (9_000, 0, 280, 0)),  # with instructions of the server's own
    ],
)
def test_no_call_uses_more_than_its_limits(said: Said, pools: tuple[int, ...]) -> None:
    made = count_call(
        said, prompt_tokens=PROMPT, text_tokens=TEXT, most_read_tokens=200_000, most_written_tokens=1_200
    ).pools
    assert (made.input_tokens, made.cached_input_tokens, made.output_tokens, made.reasoning_tokens) == pools


def test_parts_are_cut_to_their_pools() -> None:
    said = google(100, 2_340, 2_777, reasoning=337, text_output=340, image_input=900, audio_output=9_999)
    pools = count_call(said, prompt_tokens=0, text_tokens=0).pools
    assert (pools.output_tokens, pools.reasoning_tokens, pools.text_output_tokens) == (2_677, 337, 340)
    assert (pools.image_input_tokens, pools.audio_output_tokens) == (100, 2_000)
    written = anthropic(0, 1, cache_write=30, cache_write_1h=50)
    assert count_call(written, prompt_tokens=0, text_tokens=1).pools.cache_write_1h_tokens == 30


def values(*, sane: int = 10**6) -> st.SearchStrategy[Any]:
    anything = st.none() | st.booleans() | st.floats() | st.text(max_size=3) | st.integers() | st.lists(st.integers())
    return st.integers(0, sane) | st.sampled_from((0, None, MAX_POOL_TOKENS, MAX_POOL_TOKENS + 1, 2**63)) | anything


anything_said = st.builds(
    Said,
    **dict.fromkeys(COUNTS, values()),
    is_cache_in_input=st.booleans(),
    is_reasoning_in_output=st.booleans(),
)


@given(
    said=st.none() | st.lists(anything_said, min_size=1, max_size=3),
    prompt=st.integers(0, 10**6),
    texts=st.tuples(st.integers(0, 10**6), st.integers(0, 10**6)),
    thought=st.integers(0, 10**6),
)
def test_whatever_is_said_the_books_can_keep_it(
    said: list[Said] | None, prompt: int, texts: tuple[int, int], thought: int
) -> None:
    """Each constraint of the usage row, for any value in any field, in any order."""
    heard = None
    for each in said or ():
        heard = heard.updated(each) if heard else each
    text, later = sum(texts), texts[1]
    pools = count_call(
        heard, prompt_tokens=prompt, text_tokens=text, later_text_tokens=later, thought_tokens=thought
    ).pools
    for name in TokenPools.__slots__:
        assert type(getattr(pools, name)) is int
        assert 0 <= getattr(pools, name) <= 4 * MAX_POOL_TOKENS
    assert pools.reasoning_tokens + pools.text_output_tokens + pools.audio_output_tokens <= pools.output_tokens
    assert pools.image_input_tokens + pools.audio_input_tokens <= pools.input_tokens
    assert pools.cache_write_1h_tokens <= pools.cache_write_tokens
    # No text is free, and no prompt was unread.
    assert pools.output_tokens > 0 or text + thought == 0
    assert pools.actual_tokens - pools.output_tokens > 0 or prompt == 0
