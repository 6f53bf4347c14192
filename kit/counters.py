"""Counts of what no table knows: requests and how long they took, and what went wrong at the AI providers.

A process adds to numbers in its memory, which costs a request some microseconds and never waits. Every two seconds a
thread of its own adds them to one hash in Redis, so that all processes of all machines count together and each of them
can tell the sums to /metrics. While Redis is away the numbers wait; a process that is killed loses two seconds of them.
"""

import threading
import time
from bisect import bisect_left

import redis

from kit import redis_client

KEY = "postmate:counts"  # a hash: a count's name and labels, joined, → a whole number
FLUSH_SECONDS = 2.0

REQUESTS = "requests"  # by route and class of status: "2xx"
REQUESTS_UNDER = "requests_under"  # by route and the bucket they fell into: BUCKET_SECONDS, or "+Inf"
REQUEST_MICROSECONDS = "request_microseconds"  # by route
PROVIDER_ERRORS = "provider_errors"  # by provider and kind

BUCKET_SECONDS = (0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
BUCKETS = (*(str(seconds) for seconds in BUCKET_SECONDS), "+Inf")

Name = tuple[str, ...]

_pending: dict[Name, int] = {}
_lock = threading.Lock()
_flushing = False


def count_request(*, route: str, status: int, seconds: float) -> None:
    """Count a request by the route it took, never by its address. Of a stream `seconds` end when it begins."""
    bucket = BUCKETS[bisect_left(BUCKET_SECONDS, seconds)]
    _add(
        ((REQUESTS, route, f"{status // 100}xx"), 1),
        ((REQUESTS_UNDER, route, bucket), 1),
        ((REQUEST_MICROSECONDS, route), int(seconds * 1e6)),
    )


def count_provider_error(*, provider: str, kind: str) -> None:
    """Count a call to an AI provider that failed; `kind` is that of the ProviderError."""
    _add(((PROVIDER_ERRORS, provider, kind), 1))


def _add(*counts: tuple[Name, int]) -> None:
    global _flushing
    with _lock:
        for name, number in counts:
            _pending[name] = _pending.get(name, 0) + number
        is_first, _flushing = not _flushing, True
    if is_first:
        threading.Thread(target=_flush_for_ever, name="counters", daemon=True).start()


def _flush_for_ever() -> None:
    while True:
        time.sleep(FLUSH_SECONDS)
        flush()


def flush() -> None:
    """Add what was counted here to the sums in Redis, in one piece. Without Redis it waits for the next time."""
    global _pending
    with _lock:
        counted, _pending = _pending, {}
    if not counted:
        return
    try:
        with redis_client.asking(), redis_client.client().pipeline(transaction=True) as pipeline:
            for name, number in counted.items():
                pipeline.hincrby(KEY, "\n".join(name), number)
            pipeline.execute()
    except redis.RedisError:
        with _lock:
            for name, number in counted.items():
                _pending[name] = _pending.get(name, 0) + number


def parse(found: dict[bytes, bytes]) -> dict[Name, int]:
    """The sums of all processes, out of what the hash holds."""
    return {tuple(name.decode().split("\n")): int(number) for name, number in found.items()}
