"""A stand-in for OpenAI, Anthropic and Google: their wire protocols on a loopback port, without an account.

    python -m standins.ai --port 8011

The unmodified SDKs are pointed at it: OpenAI to `http://127.0.0.1:8011/openai/v1`, Anthropic to `…/anthropic`
and Google to `…/google`; any key will do. It answers with a short article about whatever the prompt is about,
always the same one for the same prompt, streaming or not. It is as strict as the real services about keys,
parameters and models, so that a mistake shows here and not in production. Conversations, continuations and
revisions are answered as such, and image models paint landscapes. Nothing is kept between requests but how often a
prompt was painted, so that its next image is another one, and a log of the last 200, at `/control/requests`, where
a test can see that a call was stopped.

It fails on demand: write `[[fault:429]]` into the last user message or the image prompt; `FAULTS` in `protocols`
lists what it knows. An answer that somebody recorded can be put to `/control/recordings/NAME` and is then played, byte
for byte, to `[[fault:recorded NAME]]`.
"""

import re

# Counting: one token for each run of letters, digits and underscores, and one for each other visible sign.
# White space belongs to the token after it.

TOKEN = re.compile(r"\s*(?:\w+|[^\w\s])")


def split_tokens(text: str) -> list[str]:
    """The tokens of `text` with the white space before them: joined, they are the text again."""
    return TOKEN.findall(text)


def count_tokens(text: str) -> int:
    return len(split_tokens(text))
