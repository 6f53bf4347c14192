"""Each provider file speaks the protocol of `ai_ops.providers`, through its SDK, to the AI stand-in.

Rows of the list of faults: 51 (the call is stopped when the reader leaves), 52 (no usage) and 53 (errors).
"""

import asyncio
import socket
import struct
from collections.abc import Callable, Iterator
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

import pytest
from pytest_django.fixtures import Settings

from ai_ops import providers
from ai_ops.providers import Images, Message, TextDelta, TextEnd, TextStream
from ai_ops.providers.counts import Said, count_call
from billing.pricing import TokenPools
from standins.ai import count_tokens
from standins.ai.writing import write_article
from tests.servers import Server
from tests.standins.ai_server import AiServer, running_ai_standin

MODELS = {"openai": "gpt-5-mini", "anthropic": "claude-haiku-5", "google": "gemini-3-flash"}
SYSTEM = "You write for a tea shop. Be brief, be kind."
each_provider = pytest.mark.parametrize("provider", MODELS)
IMAGE_MODELS = {"openai": "gpt-image-2", "google": "gemini-3.1-flash-image"}
each_image_provider = pytest.mark.parametrize("provider", IMAGE_MODELS)
each_fault = pytest.mark.parametrize(
    ("fault", "expected", "http_status"),
    [
        ("400", providers.ProviderRefused, 422),
        ("401", providers.ProviderMisconfigured, 502),
        ("403", providers.ProviderMisconfigured, 502),
        ("404", providers.ProviderMisconfigured, 502),
        ("413", providers.ProviderRefused, 422),
        ("429", providers.ProviderBusy, 503),
        ("500", providers.ProviderUnavailable, 502),
        ("503", providers.ProviderUnavailable, 502),
        ("504", providers.ProviderTimedOut, 504),
        ("garbage", providers.ProviderUnavailable, 502),
    ],
)


@pytest.fixture(scope="module")
def server() -> Iterator[AiServer]:
    with running_ai_standin() as running:
        yield running


@pytest.fixture(autouse=True)
def standin_settings(settings: Settings, server: AiServer) -> None:
    settings.OPENAI_API_KEY = settings.ANTHROPIC_API_KEY = settings.GOOGLE_API_KEY = "any"
    send_to(server.address, settings)
    settings.AI_TIMEOUT_SECONDS = settings.AI_IMAGE_TIMEOUT_SECONDS = 10.0


def send_to(address: str, settings: Settings) -> None:
    settings.OPENAI_BASE_URL = f"{address}/openai/v1"
    settings.ANTHROPIC_BASE_URL = f"{address}/anthropic"
    settings.GOOGLE_GEMINI_BASE_URL = f"{address}/google"


@dataclass(slots=True)
class Outcome:
    """What came out of one stream."""

    deltas: list[str] = field(default_factory=list)
    said: Said | None = None
    end: TextEnd | None = None
    error: providers.ProviderError | None = None

    @property
    def text(self) -> str:
        return "".join(self.deltas)

    @property
    def usage(self) -> TokenPools | None:
        """What the provider counted, taken at its word: our own counts are none."""
        return count_call(self.said, prompt_tokens=0, text_tokens=0).pools if self.said else None


def open_stream(provider: str, prompt: str, *, limit: int = 2_000, model: str = "") -> TextStream:
    return providers.stream_text(
        provider=provider,
        model=model or MODELS[provider],
        system=SYSTEM,
        messages=[Message("user", "Hello."), Message("assistant", "Hello!"), Message("user", prompt)],
        max_output_tokens=limit,
    )


def run(provider: str, prompt: str, *, limit: int = 2_000, model: str = "") -> Outcome:
    async def read() -> Outcome:
        outcome = Outcome()
        try:
            async with aclosing(open_stream(provider, prompt, limit=limit, model=model)) as stream:
                async for item in stream:
                    assert outcome.end is None, "TextEnd must be the last item"
                    if isinstance(item, TextDelta):
                        assert item.text or item.said
                        outcome.deltas += [item.text] if item.text else []
                        if item.said:
                            outcome.said = outcome.said.updated(item.said) if outcome.said else item.said
                    else:
                        outcome.end = item
        except providers.ProviderError as error:
            outcome.error = error
        return outcome

    return asyncio.run(read())


def input_tokens(prompt: str) -> int:
    return sum(map(count_tokens, (SYSTEM, "Hello.", "Hello!", prompt)))


@each_provider
def test_text_streams_and_usage_is_what_the_provider_counted(provider: str) -> None:
    prompt = "An article about spring tea"
    outcome = run(provider, prompt)

    assert outcome.error is None
    assert outcome.text == write_article(prompt)
    assert len(outcome.deltas) > 20
    usage = TokenPools(input_tokens=input_tokens(prompt), output_tokens=count_tokens(outcome.text))
    assert (outcome.end, outcome.usage) == (TextEnd("stop"), usage)


@each_provider
def test_output_limit_is_kept_and_said(provider: str) -> None:
    outcome = run(provider, "about tea", limit=40)

    assert count_tokens(outcome.text) == 40
    assert outcome.end == TextEnd("length")
    assert outcome.usage == TokenPools(input_tokens("about tea"), output_tokens=40)


@each_provider
def test_pools_exclude_one_another(provider: str) -> None:
    prompt = "[[fault:pools]] about green tea, black tea, white tea and the weather"
    outcome = run(provider, prompt)

    assert outcome.end is not None
    usage = outcome.usage
    assert usage is not None
    assert usage.actual_tokens == input_tokens(prompt) + count_tokens(outcome.text) + usage.reasoning_tokens
    assert usage.cached_input_tokens == input_tokens(prompt) // 2
    # Google has no pool for cache writes: they are plain input.
    assert usage.cache_write_tokens == (0 if provider == "google" else input_tokens(prompt) // 4)
    assert usage.reasoning_tokens > 0
    assert usage.output_tokens == count_tokens(outcome.text) + usage.reasoning_tokens


@each_provider
def test_more_than_allowed_is_reported_as_it_is(provider: str) -> None:
    outcome = run(provider, "[[fault:overrun]] about tea", limit=100)

    assert outcome.end is not None
    assert outcome.usage is not None
    assert outcome.usage.output_tokens > 200


@each_provider
def test_no_usage_is_none(provider: str) -> None:
    """Row 52."""
    outcome = run(provider, "[[fault:no-usage]] about tea")

    assert (outcome.end, outcome.usage) == (TextEnd("stop"), None if provider == "google" else TokenPools())
    assert outcome.text


@each_provider
def test_refusal_ends_the_stream(provider: str) -> None:
    outcome = run(provider, "[[fault:refused]] about tea")

    assert outcome.deltas == []
    assert outcome.end is not None
    assert outcome.end.finish_reason == "refused"


@each_provider
@each_fault
def test_fault_becomes_its_error_and_is_not_retried(
    server: AiServer, provider: str, fault: str, expected: type[providers.ProviderError], http_status: int
) -> None:
    """Row 53."""
    prompt = f"[[fault:{fault}]] {provider} only once"
    outcome = run(provider, prompt)

    assert type(outcome.error) is expected
    assert outcome.error.http_status == http_status
    assert outcome.usage is None
    assert outcome.error.message == str(outcome.error)
    assert outcome.error.message.endswith(".")
    assert outcome.error.__cause__ is not None
    assert outcome.deltas == []
    assert len(server.requests(prompt)) == 1


@each_provider
def test_unknown_model_is_our_mistake(provider: str) -> None:
    outcome = run(provider, "about tea", model="no-such-model")

    assert type(outcome.error) is providers.ProviderMisconfigured


@each_provider
@pytest.mark.parametrize("fault", ["cut", "stream-error"])
def test_deltas_before_a_break_arrive(server: AiServer, provider: str, fault: str) -> None:
    prompt = f"[[fault:{fault}]] {provider} about tea"
    outcome = run(provider, prompt)

    assert outcome.end is None
    busy = provider == "anthropic" and fault == "stream-error"  # it says `overloaded_error`
    assert type(outcome.error) is (providers.ProviderBusy if busy else providers.ProviderUnavailable)
    entry = server.wait_for(prompt, lambda entry: entry["finished"] is not None)
    assert count_tokens(outcome.text) == entry["output_tokens_sent"] > 100
    assert write_article(prompt).startswith(outcome.text)


@each_provider
def test_broken_stream_carries_the_usage_known_so_far(provider: str) -> None:
    prompt = "[[fault:cut]] about tea"
    outcome = run(provider, prompt)

    assert outcome.error is not None
    # OpenAI says at first that it has begun and counts at the end, Anthropic the input at the start, Google as it goes.
    expected = {
        "openai": TokenPools(),
        "anthropic": TokenPools(input_tokens(prompt), output_tokens=1),
        "google": TokenPools(input_tokens(prompt), output_tokens=count_tokens(outcome.text)),
    }
    assert outcome.usage == expected[provider]


@each_provider
@pytest.mark.parametrize(("fault", "has_deltas"), [("timeout", False), ("stall", True)])
def test_silence_times_out_and_stops_the_provider(
    server: AiServer, settings: Settings, provider: str, fault: str, has_deltas: bool
) -> None:
    """Row 53."""
    settings.AI_TIMEOUT_SECONDS = 2
    prompt = f"[[fault:{fault}]] {provider} keeps silent"
    outcome = run(provider, prompt)

    assert type(outcome.error) is providers.ProviderTimedOut
    assert outcome.error.http_status == 504
    assert bool(outcome.deltas) is has_deltas
    server.wait_for(prompt, lambda entry: entry["disconnected"])


@each_provider
def test_slow_answers_do_not_time_out(settings: Settings, ai: Server, provider: str) -> None:
    """The time-out is the wait for the next piece, not for the whole answer, which takes three seconds here."""
    send_to(ai.url, settings)
    settings.AI_TIMEOUT_SECONDS = 2
    outcome = run(provider, "[[fault:slow]] about tea")

    assert outcome.end is not None


@each_provider
def test_closing_the_generator_stops_the_provider(server: AiServer, provider: str) -> None:
    """Row 51."""
    prompt = f"[[fault:stall]] {provider} is left"

    async def leave_after_one_delta() -> None:
        stream = open_stream(provider, prompt)
        while not (isinstance(item := await anext(stream), TextDelta) and item.text):
            pass
        await stream.aclose()
        # Seen while the loop still runs: it is the closing that stops the provider, not the loop's end.
        await asyncio.to_thread(server.wait_for, prompt, lambda entry: entry["disconnected"])

    asyncio.run(leave_after_one_delta())


@each_provider
@pytest.mark.parametrize("fault", ["timeout", "stall"])
def test_cancelling_stops_the_provider(server: AiServer, provider: str, fault: str) -> None:
    """Row 51: also while no headers have come yet."""
    prompt = f"[[fault:{fault}]] {provider} is cancelled"

    async def read() -> None:
        async with aclosing(open_stream(provider, prompt)) as stream:
            async for _ in stream:
                pass

    async def cancel() -> None:
        task = asyncio.create_task(read())
        await asyncio.to_thread(server.wait_for, prompt, lambda entry: entry["finished"] is None)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await asyncio.to_thread(server.wait_for, prompt, lambda entry: entry["disconnected"])

    asyncio.run(cancel())


@each_provider
def test_nobody_listening_is_unavailable(settings: Settings, provider: str) -> None:
    with socket.socket() as deaf:
        deaf.bind(("127.0.0.1", 0))
        send_to(f"http://127.0.0.1:{deaf.getsockname()[1]}", settings)

        assert type(run(provider, "about tea").error) is providers.ProviderUnavailable


@each_provider
def test_without_a_key_nothing_is_sent(server: AiServer, settings: Settings, provider: str) -> None:
    settings.OPENAI_API_KEY = settings.ANTHROPIC_API_KEY = settings.GOOGLE_API_KEY = ""
    outcome = run(provider, f"{provider} without a key")

    assert type(outcome.error) is providers.ProviderMisconfigured
    assert server.requests(f"{provider} without a key") == []


def test_unknown_provider_is_our_mistake() -> None:
    with pytest.raises(providers.ProviderMisconfigured):
        providers.stream_text(provider="nobody", model="x", system="", messages=[], max_output_tokens=1)


# Images


async def ask_for_images(
    provider: str, prompt: str, *, size: str = "1024x1024", quality: str = "", count: int = 1, model: str = ""
) -> Images:
    return await providers.generate_images(
        provider=provider,
        model=model or IMAGE_MODELS[provider],
        prompt=prompt,
        size=size,
        quality=quality,
        count=count,
    )


def make_images(provider: str, prompt: str, **options: Any) -> Images:
    return asyncio.run(ask_for_images(provider, prompt, **options))


def image_error(provider: str, prompt: str, **options: Any) -> providers.ProviderError:
    with pytest.raises(providers.ProviderError) as caught:
        make_images(provider, prompt, **options)
    return caught.value


def png_size(data: bytes) -> tuple[int, int]:
    """Width and height in pixels, as the file says."""
    width, height = struct.unpack(">II", data[16:24])
    return width, height


@pytest.mark.parametrize(
    ("provider", "size", "quality", "expected_size", "tokens_per_image"),
    [
        ("openai", "1024x1024", "", (1024, 1024), 1767),
        ("openai", "1536x1024", "low", (1536, 1024), 167),
        ("openai", "1024x1536", "high", (1024, 1536), 5500),
        ("google", "1024x1024", "", (1024, 1024), 1120),
        ("google", "1536x1024", "", (1264, 848), 1120),
        ("google", "1024x1536", "high", (848, 1264), 1120),
    ],
)
def test_images_come_as_asked_and_are_counted(
    server: AiServer, provider: str, size: str, quality: str, expected_size: tuple[int, int], tokens_per_image: int
) -> None:
    prompt = f"{provider} paints a harbour, {size}"
    made = make_images(provider, prompt, size=size, quality=quality, count=3)

    assert len({image.data for image in made.images}) == 3
    assert {image.media_type for image in made.images} == {"image/png"}
    assert {png_size(image.data) for image in made.images} == {expected_size}
    # OpenAI reads the prompt once for all images, Google once for each.
    requests = {"openai": 1, "google": 3}[provider]
    assert len(server.requests(prompt)) == requests
    assert made.usage == TokenPools(count_tokens(prompt) * requests, output_tokens=tokens_per_image * 3)


@each_image_provider
@each_fault
def test_image_fault_becomes_its_error_and_is_not_retried(
    server: AiServer, provider: str, fault: str, expected: type[providers.ProviderError], http_status: int
) -> None:
    """Row 53."""
    prompt = f"[[fault:{fault}]] {provider} paints only once"
    error = image_error(provider, prompt)

    assert type(error) is expected
    assert error.http_status == http_status
    assert error.usage is None
    assert error.__cause__ is not None
    assert len(server.requests(prompt)) == 1


@each_image_provider
@pytest.mark.parametrize("fault", ["not-an-image", "not-base64"])
def test_what_is_no_image_is_not_delivered(provider: str, fault: str) -> None:
    """Row 53."""
    error = image_error(provider, f"[[fault:{fault}]] {provider} paints tea", count=2)

    assert type(error) is providers.ProviderUnavailable


@each_image_provider
def test_images_that_came_are_delivered(provider: str) -> None:
    prompt = f"[[fault:fewer]] {provider} paints tea"
    made = make_images(provider, prompt, count=3)

    assert len(made.images) == 2
    # What the image that did not come has cost is known, and counted.
    requests, tokens_per_image = {"openai": (1, 1767), "google": (3, 1120)}[provider]
    assert made.usage == TokenPools(count_tokens(prompt) * requests, output_tokens=tokens_per_image * 2)


@each_image_provider
def test_no_image_at_all_is_an_error(provider: str) -> None:
    prompt = f"[[fault:fewer]] {provider} paints a single tea"
    error = image_error(provider, prompt)

    assert type(error) is providers.ProviderUnavailable
    assert error.usage == TokenPools(count_tokens(prompt))


@each_image_provider
@pytest.mark.parametrize("fault", ["no-usage", "first-no-usage"])
def test_images_without_usage(provider: str, fault: str) -> None:
    """Row 52: neither does the usage of some images pass for that of all."""
    made = make_images(provider, f"[[fault:{fault}]] {provider} paints tea", count=2)

    assert len(made.images) == 2
    assert made.usage is None or made.usage.picture_tokens == 0


@each_image_provider
def test_refused_images(provider: str) -> None:
    error = image_error(provider, f"[[fault:refused]] {provider} paints tea", count=2)

    assert type(error) is providers.ProviderRefused
    # Google counts the prompt that it refuses.
    assert (error.usage is None) is (provider == "openai")


def test_sketches_are_counted_and_not_delivered() -> None:
    prompt = "[[fault:pools]] tea, painted after some thought and a sketch"
    made = make_images("google", prompt)

    assert [png_size(image.data) for image in made.images] == [(1024, 1024)]
    assert made.usage is not None
    assert made.usage.cached_input_tokens == count_tokens(prompt) // 2
    assert made.usage.input_tokens + made.usage.cached_input_tokens == count_tokens(prompt)
    assert made.usage.output_tokens == 1120 + made.usage.reasoning_tokens > 1120


@each_image_provider
def test_images_time_out_by_a_limit_of_their_own(server: AiServer, settings: Settings, provider: str) -> None:
    """Row 53."""
    settings.AI_IMAGE_TIMEOUT_SECONDS = 0.5
    prompt = f"[[fault:timeout]] {provider} paints for ever"
    error = image_error(provider, prompt)

    assert type(error) is providers.ProviderTimedOut
    server.wait_for(prompt, lambda entry: entry["disconnected"])
    assert len(server.requests(prompt)) == 1


@each_image_provider
def test_images_may_take_longer_than_text(settings: Settings, provider: str) -> None:
    settings.AI_TIMEOUT_SECONDS = 0.05
    made = make_images(provider, f"[[fault:slow]] {provider} paints with care")

    assert len(made.images) == 1


@each_image_provider
def test_cancelling_stops_the_painters(server: AiServer, provider: str) -> None:
    """Row 51."""
    prompt = f"[[fault:timeout]] {provider} is told to stop painting"
    requests = {"openai": 1, "google": 3}[provider]

    def wait_for_all(condition: Callable[[dict[str, Any]], bool]) -> None:
        server.wait_for(prompt, lambda _: sum(map(condition, server.requests(prompt))) == requests)

    async def cancel() -> None:
        task = asyncio.create_task(ask_for_images(provider, prompt, count=3))
        await asyncio.to_thread(wait_for_all, lambda entry: entry["finished"] is None)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        # Seen while the loop still runs: it is the cancelling that stops the provider, not the loop's end.
        await asyncio.to_thread(wait_for_all, lambda entry: entry["disconnected"])

    asyncio.run(cancel())


@pytest.mark.parametrize(
    ("provider", "model"),
    [
        ("openai", "no-such-model"),
        ("openai", "dall-e-3"),
        ("openai", "gpt-image-1"),
        ("google", "imagen-4.0-generate-001"),
        ("google", "gemini-2.5-flash-image"),
        ("anthropic", "claude-haiku-5"),
    ],
)
def test_models_that_make_no_images_are_our_mistake(provider: str, model: str) -> None:
    error = image_error(provider, "tea", model=model)

    assert type(error) is providers.ProviderMisconfigured


@each_image_provider
def test_images_without_a_key_are_not_asked_for(server: AiServer, settings: Settings, provider: str) -> None:
    settings.OPENAI_API_KEY = settings.GOOGLE_API_KEY = ""
    prompt = f"{provider} paints without a key"

    assert type(image_error(provider, prompt)) is providers.ProviderMisconfigured
    assert server.requests(prompt) == []


@pytest.mark.parametrize(
    ("data", "media_type"),
    [
        (b"\x89PNG\r\n\x1a\n and more", "image/png"),
        (b"\xff\xd8\xff\xe0 and more", "image/jpeg"),
        (b"RIFF\x10\x00\x00\x00WEBPVP8 ", "image/webp"),
        (b"RIFF\x10\x00\x00\x00WAVEfmt ", None),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", None),
        (b"", None),
    ],
)
def test_the_bytes_say_what_kind_of_image_it_is(data: bytes, media_type: str | None) -> None:
    image = providers.image_file(data)

    assert (image and image.media_type) == media_type
