"""The AI stand-in speaks each provider's protocol to its unmodified SDK, and is as strict as the service."""

import json
import zlib
from collections.abc import Callable, Iterator
from typing import Any

import anthropic
import httpx2
import openai
import pytest
from anthropic.types.message_count_tokens_params import MessageCountTokensParams
from anthropic.types.message_create_params import MessageCreateParamsStreaming
from google import genai
from google.genai import errors as google_errors
from google.genai import types as google_types
from openai.types.chat.completion_create_params import CompletionCreateParamsStreaming
from openai.types.image_generate_params import ImageGenerateParamsStreaming
from openai.types.responses.response_create_params import ResponseCreateParamsStreaming

from standins.ai import count_tokens, split_tokens
from standins.ai.anthropic import Anthropic
from standins.ai.openai import OpenAI, OpenAIImages, OpenAIResponses
from standins.ai.painting import paint
from standins.ai.writing import Turn, write, write_article
from tests.standins.ai_server import AiServer, running_ai_standin

PROMPTS = [
    "Write a short article about spring tea",
    "Topic: bicycle repair for beginners\nTone: friendly",
    "Please summarise this: our new office in Lisbon opens in May with forty desks and a roof garden.",
    "hello",
    "",
    "Schreibe über Gärten und Kräuter",
    "{curly} 100% %s \ud800 about {braces}",
]


@pytest.fixture(scope="module")
def server() -> Iterator[AiServer]:
    with running_ai_standin() as running:
        yield running


@pytest.fixture
def openai_client(server: AiServer) -> openai.OpenAI:
    return openai.OpenAI(api_key="any", base_url=f"{server.address}/openai/v1", max_retries=0)


@pytest.fixture
def anthropic_client(server: AiServer) -> anthropic.Anthropic:
    return anthropic.Anthropic(api_key="any", base_url=f"{server.address}/anthropic", max_retries=0)


@pytest.fixture
def google_client(server: AiServer) -> genai.Client:
    options = google_types.HttpOptions(base_url=f"{server.address}/google")
    return genai.Client(vertexai=False, api_key="any", http_options=options)


@pytest.mark.parametrize("prompt", PROMPTS)
def test_article_is_readable_and_the_same_each_time(prompt: str) -> None:
    article = write_article(prompt)

    assert article == write_article(prompt)
    assert article.startswith("# ")
    assert article.count("\n## ") == 4
    assert 250 <= len(article.split()) <= 400


def test_article_is_about_the_prompt() -> None:
    article = write_article("Write a short article about spring tea. Mention harvest and Yorkshire. [[fault:slow]]")

    assert article.startswith("# Spring tea\n")
    assert article.count("spring tea") >= 5
    assert "harvest" in article
    assert "Yorkshire" in article
    assert "fault" not in article


def test_different_prompts_give_different_articles() -> None:
    assert len({write_article(f"Article about tea number {number}") for number in range(20)}) == 20


def test_tokens_are_words_and_signs_and_join_to_the_text() -> None:
    text = "Tea, hot & snake_case\n\n## 42!"

    assert split_tokens(text) == ["Tea", ",", " hot", " &", " snake_case", "\n\n#", "#", " 42", "!"]
    assert count_tokens(text) == 9
    assert count_tokens(" \n") == 0


def test_openai_answers_whole(openai_client: openai.OpenAI) -> None:
    prompt = "An article about spring tea"
    completion = openai_client.chat.completions.create(
        model="gpt-5-mini",
        messages=[{"role": "system", "content": "Be kind."}, {"role": "user", "content": prompt}],
    )

    assert completion.choices[0].message.content == write_article(prompt)
    assert completion.choices[0].finish_reason == "stop"
    assert completion.usage is not None
    assert completion.usage.prompt_tokens == count_tokens("Be kind.") + count_tokens(prompt)
    assert completion.usage.completion_tokens == count_tokens(write_article(prompt))


def test_openai_lists_models(openai_client: openai.OpenAI) -> None:
    assert "gpt-5-mini" in {model.id for model in openai_client.models.list()}


def test_openai_sends_usage_only_when_asked(openai_client: openai.OpenAI) -> None:
    stream = openai_client.chat.completions.create(
        model="o4-mini", messages=[{"role": "user", "content": "tea"}], stream=True
    )

    assert [chunk.usage for chunk in stream if chunk.usage] == []


def test_anthropic_answers_whole_and_counts(anthropic_client: anthropic.Anthropic) -> None:
    prompt = "An article about spring tea"
    arguments: dict[str, Any] = {
        "model": "claude-haiku-5",
        "system": "Be kind.",
        "messages": [{"role": "user", "content": [{"type": "text", "text": prompt}]}],
    }
    counted = anthropic_client.messages.count_tokens(**arguments).input_tokens
    message = anthropic_client.messages.create(**arguments, max_tokens=50)

    assert message.content[0].type == "text"
    assert write_article(prompt).startswith(message.content[0].text)
    assert message.stop_reason == "max_tokens"
    assert message.usage.output_tokens == 50
    assert message.usage.input_tokens == counted == count_tokens("Be kind.") + count_tokens(prompt)


def test_anthropic_stream_helper_understands_it(anthropic_client: anthropic.Anthropic) -> None:
    with anthropic_client.messages.stream(
        model="claude-haiku-5", max_tokens=1000, messages=[{"role": "user", "content": "about tea"}]
    ) as stream:
        message = stream.get_final_message()

    assert message.content[0].type == "text"
    assert message.content[0].text == write_article("about tea")
    assert message.usage.output_tokens == count_tokens(message.content[0].text)


@pytest.mark.parametrize("version", ["v1", "v1beta"])
def test_google_answers_whole_and_counts(server: AiServer, version: str) -> None:
    options = google_types.HttpOptions(base_url=f"{server.address}/google", api_version=version)
    client = genai.Client(vertexai=False, api_key="any", http_options=options)
    prompt = "An article about spring tea"
    counted = client.models.count_tokens(model="gemini-3-flash", contents=prompt).total_tokens
    config = google_types.GenerateContentConfig(max_output_tokens=50, temperature=0.5)
    response = client.models.generate_content(model="gemini-3-flash", contents=prompt, config=config)

    assert response.text is not None
    assert write_article(prompt).startswith(response.text)
    assert response.candidates is not None
    assert response.candidates[0].finish_reason == google_types.FinishReason.MAX_TOKENS
    assert response.usage_metadata is not None
    assert response.usage_metadata.candidates_token_count == 50
    assert response.usage_metadata.prompt_token_count == counted == count_tokens(prompt)


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("/openai/v1/chat/completions", {"type": "invalid_request_error", "code": "invalid_api_key"}),
        ("/anthropic/v1/messages", {"type": "authentication_error"}),
        ("/google/v1/models/gemini-3-flash:generateContent", {"code": 401, "status": "UNAUTHENTICATED"}),
    ],
)
def test_missing_key_is_an_error_in_the_providers_shape(
    server: AiServer, path: str, expected: dict[str, object]
) -> None:
    response = httpx2.post(f"{server.address}{path}", json={}, timeout=30)

    assert response.status_code == 401
    error = response.json()["error"]
    assert {key: error[key] for key in expected} == expected
    assert error["message"]


def test_misspelt_parameters_are_refused(
    openai_client: openai.OpenAI, anthropic_client: anthropic.Anthropic, google_client: genai.Client
) -> None:
    misspelt = {"max_tokns": 5}
    with pytest.raises(openai.BadRequestError) as from_openai:
        openai_client.chat.completions.create(
            model="gpt-5", messages=[{"role": "user", "content": "tea"}], extra_body=misspelt
        )
    with pytest.raises(anthropic.BadRequestError) as from_anthropic:
        anthropic_client.messages.create(
            model="claude-haiku-5",
            max_tokens=5,
            messages=[{"role": "user", "content": "tea"}],
            extra_body=misspelt,
        )
    with pytest.raises(google_errors.ClientError) as from_google:
        google_client.models.generate_content(
            model="gemini-3-flash",
            contents="tea",
            config=google_types.GenerateContentConfig(
                http_options=google_types.HttpOptions(extra_body={"generationConfig": misspelt})
            ),
        )

    assert from_openai.value.param == "max_tokns"
    assert from_anthropic.value.type == "invalid_request_error"
    assert from_google.value.code == 400
    for error in (from_openai, from_anthropic, from_google):
        assert "max_tokns" in str(error.value)


def test_parameters_are_those_of_the_sdks() -> None:
    assert OpenAI.parameters == CompletionCreateParamsStreaming.__annotations__.keys()
    assert OpenAIResponses.parameters == ResponseCreateParamsStreaming.__annotations__.keys()
    assert OpenAIImages.parameters == ImageGenerateParamsStreaming.__annotations__.keys()
    assert Anthropic.count_parameters == MessageCountTokensParams.__annotations__.keys()
    # What the SDK calls deprecated and hides behind a class of its own is still part of the service.
    assert Anthropic.parameters >= MessageCreateParamsStreaming.__annotations__.keys()


def test_models_of_another_family_do_not_exist(
    openai_client: openai.OpenAI, anthropic_client: anthropic.Anthropic, google_client: genai.Client
) -> None:
    with pytest.raises(openai.NotFoundError):
        openai_client.chat.completions.create(model="claude-haiku-5", messages=[{"role": "user", "content": "tea"}])
    with pytest.raises(anthropic.NotFoundError):
        anthropic_client.messages.create(model="gpt-5", max_tokens=5, messages=[{"role": "user", "content": "tea"}])
    with pytest.raises(google_errors.ClientError, match="NOT_FOUND"):
        google_client.models.generate_content(model="gpt-5", contents="tea")


@pytest.mark.parametrize("limit", [0, -1, 1.5, True, "5"])
def test_limits_that_are_no_positive_integer_are_refused(server: AiServer, limit: object) -> None:
    body = {
        "model": "gpt-5",
        "messages": [{"role": "user", "content": "tea"}],
        "max_completion_tokens": limit,
    }
    response = httpx2.post(
        f"{server.address}/openai/v1/chat/completions",
        json=body,
        headers={"authorization": "Bearer any"},
        timeout=30,
    )

    assert response.status_code == 400
    assert response.json()["error"]["param"] == "max_completion_tokens"


@pytest.mark.parametrize("body", ["", "[]", "null", "{", json.dumps({"model": "gpt-5", "messages": "tea"})])
def test_nonsense_is_refused(server: AiServer, body: str) -> None:
    response = httpx2.post(
        f"{server.address}/openai/v1/chat/completions",
        content=body,
        headers={"authorization": "Bearer any"},
        timeout=30,
    )

    assert response.status_code == 400


def test_unknown_fault_is_refused_by_name(openai_client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="no-such-thing"):
        openai_client.chat.completions.create(
            model="gpt-5", messages=[{"role": "user", "content": "tea [[fault:no-such-thing]]"}]
        )


def test_only_the_newest_message_fails(openai_client: openai.OpenAI) -> None:
    completion = openai_client.chat.completions.create(
        model="gpt-5",
        messages=[{"role": "user", "content": "[[fault:500]]"}, {"role": "user", "content": "once more"}],
    )

    assert completion.choices[0].message.content


@pytest.mark.parametrize("fault", ["cut", "garbage"])
def test_whole_answers_break_too(openai_client: openai.OpenAI, fault: str) -> None:
    with pytest.raises((openai.APIConnectionError, ValueError)):
        openai_client.chat.completions.create(
            model="gpt-5", messages=[{"role": "user", "content": f"tea [[fault:{fault}]]"}]
        )


def test_slow_takes_ten_times_as_long(server: AiServer, openai_client: openai.OpenAI) -> None:
    for prompt in ("pace of tea", "pace of tea, slowly [[fault:slow]]"):
        list(
            openai_client.chat.completions.create(
                model="gpt-5", messages=[{"role": "user", "content": prompt}], stream=True
            )
        )

    entry = server.wait_for("pace of tea, slowly", lambda entry: entry["finished"] is not None)
    assert entry["finished"] - entry["started"] >= entry["output_tokens_sent"] / 2_000
    assert entry["output_tokens_sent"] > 250
    assert entry["disconnected"] is False


def test_a_busy_provider_says_when_to_come_back(server: AiServer) -> None:
    for path, body in (
        ("chat/completions", {"model": "gpt-5", "messages": [{"role": "user", "content": "[[fault:429]]"}]}),
        ("images/generations", {"model": "gpt-image-2", "prompt": "[[fault:429]]"}),
    ):
        response = httpx2.post(
            f"{server.address}/openai/v1/{path}", json=body, headers={"authorization": "Bearer any"}, timeout=30
        )

        assert response.status_code == 429
        assert int(response.headers["retry-after"]) > 0


# OpenAI's Responses


def test_openai_responds_whole(openai_client: openai.OpenAI) -> None:
    prompt = "An article about spring tea"
    response = openai_client.responses.create(model="gpt-5-mini", instructions="Be kind.", input=prompt)

    assert response.status == "completed"
    assert response.output_text == write_article(prompt)
    assert response.usage is not None
    assert response.usage.input_tokens == count_tokens("Be kind.") + count_tokens(prompt)
    assert response.usage.output_tokens == count_tokens(response.output_text)


def test_openai_responds_as_a_stream(openai_client: openai.OpenAI) -> None:
    prompt = "And what about spring tea? [[fault:pools]]"
    stream = openai_client.responses.create(
        model="gpt-5-mini",
        input=[
            {"role": "user", "content": "Hello."},
            {"role": "assistant", "content": "Hello!"},
            {"role": "user", "content": [{"type": "input_text", "text": prompt}]},
        ],
        stream=True,
    )
    events = list(stream)

    assert [event.sequence_number for event in events] == list(range(len(events)))
    kinds = [event.type for event in events]
    assert kinds[:2] == ["response.created", "response.in_progress"]
    deltas = "".join(event.delta for event in events if event.type == "response.output_text.delta")
    end = events[-1]
    assert end.type == "response.completed"
    assert deltas == end.response.output_text == write_article(prompt)
    usage = end.response.usage
    assert usage is not None
    assert usage.input_tokens == sum(map(count_tokens, ("Hello.", "Hello!", prompt)))
    assert usage.input_tokens_details.cached_tokens == usage.input_tokens // 2
    assert usage.output_tokens == count_tokens(deltas) + usage.output_tokens_details.reasoning_tokens


def test_openai_response_helper_understands_the_stream(openai_client: openai.OpenAI) -> None:
    with openai_client.responses.stream(model="gpt-5", input="about tea") as stream:
        response = stream.get_final_response()

    assert response.output_text == write_article("about tea")


def test_openai_response_says_why_it_is_incomplete(openai_client: openai.OpenAI) -> None:
    *_, end = openai_client.responses.create(model="gpt-5", input="about tea", max_output_tokens=50, stream=True)

    assert end.type == "response.incomplete"
    assert end.response.incomplete_details is not None
    assert end.response.incomplete_details.reason == "max_output_tokens"
    assert count_tokens(end.response.output_text) == 50


def test_openai_response_reports_an_error_inside_the_stream(openai_client: openai.OpenAI) -> None:
    *_, end = openai_client.responses.create(model="gpt-5", input="tea [[fault:stream-error]]", stream=True)

    assert end.type == "error"
    assert end.code == "server_error"


@pytest.mark.parametrize(
    ("fault", "error"),
    [
        ("401", openai.AuthenticationError),
        ("429", openai.RateLimitError),
        ("500", openai.InternalServerError),
        ("cut", openai.APIConnectionError),
        ("garbage", ValueError),
    ],
)
def test_openai_responses_fail_on_demand(openai_client: openai.OpenAI, fault: str, error: type[Exception]) -> None:
    with pytest.raises(error):
        list(openai_client.responses.create(model="gpt-5", input=f"tea [[fault:{fault}]]", stream=True))


def test_openai_responses_have_a_least_limit(openai_client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        openai_client.responses.create(model="gpt-5", input="tea", max_output_tokens=15)

    assert caught.value.param == "max_output_tokens"


# Images


@pytest.mark.parametrize(
    ("parameters", "param"),
    [
        ({"style": "vivid"}, "style"),
        ({"response_format": "b64_json"}, "response_format"),
        ({"size": "512x512x1"}, "size"),
        ({"size": "1000x1000"}, "size"),
        ({"size": "3840x1024"}, "size"),
        ({"quality": "hd"}, "quality"),
        ({"n": 11}, "n"),
        ({"n": 0}, "n"),
        ({"prompt": ""}, "prompt"),
        ({"prompt": "x" * 32_001}, "prompt"),
        ({"model": "gpt-5"}, "model"),
        ({"seed": 7}, "seed"),
    ],
)
def test_openai_image_parameters_are_checked(
    openai_client: openai.OpenAI, parameters: dict[str, Any], param: str
) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        openai_client.images.generate(model="gpt-image-2", prompt="tea", extra_body=parameters)

    assert caught.value.param == param


@pytest.mark.parametrize("model", ["dall-e-2", "dall-e-3", "gpt-image-1"])
def test_retired_image_models_are_gone(openai_client: openai.OpenAI, model: str) -> None:
    with pytest.raises(openai.NotFoundError, match="deprecated"):
        openai_client.images.generate(model=model, prompt="tea")


def test_sizes_are_free_with_newer_models_only(openai_client: openai.OpenAI) -> None:
    assert openai_client.images.generate(model="gpt-image-2", prompt="tea", size="512x768").size == "512x768"
    with pytest.raises(openai.BadRequestError):
        openai_client.images.generate(model="gpt-image-1.5", prompt="tea", size="512x768")


@pytest.mark.parametrize(
    ("model", "config", "message"),
    [
        ("gemini-3-flash", {"response_modalities": ["IMAGE"]}, "modalities"),
        ("gemini-3.1-flash-image", {"response_modalities": ["AUDIO"]}, "modalities"),
        ("gemini-3.1-flash-image", {"image_config": {"aspect_ratio": "4:7"}}, "aspect ratio"),
        ("gemini-3.1-flash-image", {"image_config": {"image_size": "8K"}}, "image size"),
    ],
)
def test_google_image_parameters_are_checked(
    google_client: genai.Client, model: str, config: dict[str, Any], message: str
) -> None:
    with pytest.raises(google_errors.ClientError, match=message) as caught:
        google_client.models.generate_content(
            model=model, contents="tea", config=google_types.GenerateContentConfig(**config)
        )

    assert caught.value.code == 400


def test_google_image_models_write_and_paint_by_default(google_client: genai.Client) -> None:
    response = google_client.models.generate_content(model="gemini-3.1-flash-image", contents="tea, not told how")

    assert response.parts is not None
    assert [bool(part.inline_data) for part in response.parts] == [False, True]
    assert response.usage_metadata is not None
    assert response.usage_metadata.candidates_tokens_details is not None
    assert response.usage_metadata.candidates_tokens_details[0].modality == google_types.MediaModality.IMAGE


def test_images_are_real_and_the_same_each_time() -> None:
    image = paint("tea", 0, 320, 160)
    header, _, rest = image[8:].partition(b"IDAT")

    assert image == paint("tea", 0, 320, 160)
    assert image != paint("tea", 1, 320, 160)
    assert image != paint("coffee", 0, 320, 160)
    length = int.from_bytes(header[-4:], "big")
    rows = zlib.decompress(rest[:length])
    assert int.from_bytes(rest[length : length + 4], "big") == zlib.crc32(b"IDAT" + rest[:length])
    assert len(rows) == 160 * (1 + 320)
    assert len(set(rows)) > 100  # shades


# Other kinds of text than articles

CHAT = "You help people in a conversation."
REVISE = "You revise texts. Answer with the revised text alone."
TEXT = "# Tea\n\nTea is a small pleasure. Many people begin the day with it. It warms the hands.\n\n- black\n- green"


def user(text: str) -> Turn:
    return Turn("user", text)


@pytest.mark.parametrize("cut_at", [40, 600, 900])
@pytest.mark.parametrize("marker", ["", " [[fault:slow]]"])
def test_a_text_is_continued_where_it_stopped(cut_at: int, marker: str) -> None:
    asked = user(f"Title: Spring tea{marker}")
    article = write("You write drafts.", [asked])
    turns = [asked, Turn("assistant", article[:cut_at]), user("Continue exactly where your answer stopped.")]

    assert write("You write texts.", turns) == article[cut_at:]


def test_a_continuation_can_be_continued() -> None:
    asked, further = user("Title: Spring tea"), user("Continue exactly where your answer stopped.")
    article = write("", [asked])
    turns = [asked, Turn("assistant", article[:300]), further, Turn("assistant", article[300:700]), further]

    assert write("", turns) == article[700:]


@pytest.mark.parametrize(("written", "start"), [("Tea is", " "), ("Tea is good.", "\n\n"), ("Tea.\n\n", "")])
def test_a_text_of_somebody_else_is_continued_without_a_heading(written: str, start: str) -> None:
    turns = [user("about spring tea"), Turn("assistant", written), user("Continue exactly where you stopped.")]
    text = write("", turns)

    assert text.startswith(start)
    assert text == start + text.lstrip()
    assert "#" not in text
    assert "spring tea" in text
    assert text not in (write("", turns[:1]), written)


def test_a_complete_text_can_still_be_continued() -> None:
    article = write("", [user("about spring tea")])
    turns = [user("about spring tea"), Turn("assistant", article), user("Continue exactly where you stopped.")]
    text = write("", turns)

    assert len(text.split()) > 50
    assert text.strip() not in article


@pytest.mark.parametrize(
    ("question", "topic"),
    [
        ("Tell me about sourdough bread", "sourdough bread"),
        ("What makes oolong tea taste so different from green tea in spring?", "oolong tea taste"),
        ("Is it worth it? [[fault:slow]]", "sourdough bread"),
    ],
)
def test_a_conversation_is_answered_briefly(question: str, topic: str) -> None:
    turns = [user("Tell me about sourdough bread"), Turn("assistant", "Gladly."), user(question)]
    reply = write(CHAT, turns)

    assert reply == write(CHAT, turns)
    assert topic in reply
    assert "#" not in reply
    assert "[[" not in reply
    assert 1 <= len(reply.split("\n\n")) <= 3
    assert 15 <= len(reply.split()) <= 180


@pytest.mark.parametrize(
    ("instruction", "compare"),
    [
        ("Make it about half as long. Keep what matters.", lambda words, given: words < given),
        ("Expand it with details and examples, by about half.", lambda words, given: words > given),
        ("Correct spelling, grammar and punctuation.", lambda words, given: words >= given),
        ("Make the tone warmer and friendlier.", lambda words, given: words >= given),
    ],
)
def test_a_text_is_revised_as_told(instruction: str, compare: Callable[[int, int], bool]) -> None:
    revised = write(REVISE, [user(f"{instruction}\n\n<text>\n{TEXT}\n</text>")])

    assert revised != TEXT
    assert compare(len(revised.split()), len(TEXT.split()))
    assert revised.startswith("# Tea\n\n")
    assert "- black\n- green" in revised
    assert "<" not in revised
    assert instruction not in revised


def test_only_the_selection_is_revised() -> None:
    given = "Many people begin the day with it."
    text = TEXT.replace(given, f"<selection>{given}</selection>")
    revised = write(REVISE, [user(f"Say it differently. [[fault:slow]]\n\n<text>\n{text}\n</text>")])

    assert revised not in ("", given)
    assert "people" in revised
    assert "warms the hands" not in revised
    assert "[[" not in revised


def test_an_image_prompt_is_one_paragraph_about_the_idea() -> None:
    text = write("You write an image prompt for a model.", [user("A lighthouse in winter\n\nStyle: A watercolour.")])

    assert "lighthouse" in text
    assert "\n" not in text
    assert 40 <= len(text.split()) <= 110


def test_kinds_of_text_come_through_each_protocol(
    openai_client: openai.OpenAI, anthropic_client: anthropic.Anthropic, google_client: genai.Client
) -> None:
    question = "Tell me about sourdough bread"
    expected = write(CHAT, [user(question)])
    completion = openai_client.chat.completions.create(
        model="gpt-5", messages=[{"role": "system", "content": CHAT}, {"role": "user", "content": question}]
    )
    message = anthropic_client.messages.create(
        model="claude-haiku-5", max_tokens=900, system=CHAT, messages=[{"role": "user", "content": question}]
    )
    config = google_types.GenerateContentConfig(system_instruction=CHAT)
    response = google_client.models.generate_content(model="gemini-3-flash", contents=question, config=config)

    assert completion.choices[0].message.content == expected
    assert message.content[0].type == "text"
    assert message.content[0].text == expected
    assert response.text == expected
