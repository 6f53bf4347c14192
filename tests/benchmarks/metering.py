"""What metering adds to an AI call: quote, hold and settlement around a provider that answers at once.

    .venv/bin/python -m tests.benchmarks.metering

The provider is the AI stand-in, over HTTP on the loopback interface, through the real SDK, without the pauses between
tokens that a model makes. Its stream is read to the end, bare and metered in turn, one call at a time. The metered one
quotes, holds the quote, settles and announces the balance, each as a request of the Studio does.
"""

# ruff: noqa: T201  (its output is what it is for)

import asyncio
import statistics
import time
import uuid
from contextlib import aclosing

from django.conf import settings

from accounts.models import User
from ai_ops import metering, providers
from ai_ops.metering import Ask, Quote
from ai_ops.prompts import Prompt
from ai_ops.providers import Message
from billing import catalogue, ledger
from kit.database import in_thread
from tests.benchmarks import scratch_database
from tests.standins.ai_server import running_ai_standin

PROVIDER, MODEL = "openai", "gpt-6-luna"
OUTPUT_TOKENS = 100
CALLS, WARM_UP_CALLS = 400, 40
PROMPT = Prompt("You write short texts.", (Message("user", "Three sentences about tea."),))


async def call_bare() -> None:
    stream = providers.stream_text(
        provider=PROVIDER,
        model=MODEL,
        system=PROMPT.system,
        messages=PROMPT.messages,
        max_output_tokens=OUTPUT_TOKENS,
    )
    async with aclosing(stream):
        async for _ in stream:
            pass


async def call_metered(user_id: int) -> float:
    """Returns how long quote and hold took, in seconds."""
    ask = Ask(
        operation_type="generation",
        provider=PROVIDER,
        model=MODEL,
        prompt=PROMPT,
        wanted_output_tokens=OUTPUT_TOKENS,
    )

    def hold() -> tuple[Quote, int]:
        quote = metering.quote_text(user_id=user_id, ask=ask)
        posting = metering.reserve_quote(quote, idempotency_key=str(uuid.uuid4()), request={})
        assert posting.usage_id is not None
        return quote, posting.usage_id

    began = time.perf_counter()
    quote, usage_id = await in_thread(hold)()
    held = time.perf_counter()
    stream = metering.stream_text(quote=quote, usage_id=usage_id, keep=lambda text, is_complete: None)
    async with aclosing(stream):
        async for _ in stream:
            pass
    return held - began


async def measure(user_id: int) -> tuple[list[float], list[float], list[float]]:
    """Milliseconds of each call: bare, metered, and of the latter its quote and hold."""
    bare, metered, holds = [], [], []
    for _ in range(WARM_UP_CALLS + CALLS):
        began = time.perf_counter()
        await call_bare()
        between = time.perf_counter()
        hold_seconds = await call_metered(user_id)
        bare.append((between - began) * 1_000)
        metered.append((time.perf_counter() - between) * 1_000)
        holds.append(hold_seconds * 1_000)
    return bare[WARM_UP_CALLS:], metered[WARM_UP_CALLS:], holds[WARM_UP_CALLS:]


def show(name: str, milliseconds: list[float]) -> None:
    percentiles = statistics.quantiles(milliseconds, n=20)
    print(f"{name:<32}{statistics.median(milliseconds):10.2f}{percentiles[18]:10.2f}")


def main() -> None:
    with scratch_database(), running_ai_standin(tokens_per_second=1_000_000) as standin:
        settings.OPENAI_API_KEY, settings.OPENAI_BASE_URL = "sk-bench", f"{standin.address}/openai/v1"
        catalogue.seed_default_models()
        user = User.objects.create_user("bench@example.com")
        ledger.initialize_account(user_id=user.pk)
        ledger.add_tokens(
            user_id=user.pk, tokens=10**9, type="bonus", description="Benchmark", idempotency_key="benchmark"
        )
        bare, metered, holds = asyncio.run(measure(user.pk))
        added = [after - before for before, after in zip(bare, metered, strict=True)]
        print(f"{'milliseconds':<32}{'median':>10}{'p95':>10}   {CALLS} calls, one at a time")
        show("bare provider call", bare)
        show("metered", metered)
        show("added by metering", added)
        show("  of it quote and hold", holds)
        ratio = statistics.median(metered) / statistics.median(bare)
        print(f"\na metered call takes {ratio:.2f} times as long as a bare one to a provider that answers at once")


if __name__ == "__main__":
    main()
