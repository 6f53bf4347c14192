"""How a request asks Redis for something: without retries, and not at all for a while after it did not answer.

Redis may be away or hang, and everything that is asked of it here can be left out. Whoever finds it silent waits for
one socket time-out; for the next seconds the others of the process do not ask at all.
"""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import redis
from django.conf import settings
from redis.backoff import NoBackoff
from redis.retry import Retry

PAUSE_SECONDS = 5

_one_at_a_time = threading.Lock()
_paused_until: dict[str, float] = {}  # by address, on the monotonic clock


class RedisPaused(redis.ConnectionError):
    """It did not answer a moment ago, so it was not asked."""


def client() -> redis.Redis:
    # Threads that begin together would make one each, and one that nobody keeps closes its connections under its user.
    with _one_at_a_time:
        return _client_of(settings.REDIS_URL)


@cache
def _client_of(address: str) -> redis.Redis:
    return redis.Redis.from_url(address, retry=Retry(NoBackoff(), 0), **settings.REDIS_OPTIONS)


@contextmanager
def asking() -> Iterator[None]:
    """Around each question to Redis, also one that a library asks. Raises RedisPaused while it is not to be asked.

    Any error inside begins a pause. When it is over, one caller tries, and the pause goes on for the others meanwhile.
    """
    address = settings.REDIS_URL
    paused_until = _paused_until.get(address)
    if paused_until is not None:
        if time.monotonic() < paused_until:
            raise RedisPaused("Redis did not answer a moment ago.")
        _pause(address)
    try:
        yield
    except Exception:
        _pause(address)
        raise
    if paused_until is not None:
        _paused_until.pop(address, None)


def _pause(address: str) -> None:
    _paused_until[address] = time.monotonic() + PAUSE_SECONDS
