"""How many calls a minute: counted in Redis, for each credential, and for each address that calls without one.

Redis may be away. What a right credential asks for is done all the same (debits work); a wrong one is
refused whether it is counted or not.
"""

import time
from dataclasses import dataclass

import redis
import structlog
from django.conf import settings

from kit import redis_client

logger = structlog.get_logger(__name__)

WINDOW_SECONDS = 60
KNOWN_FOR_SECONDS = 86_400


@dataclass(frozen=True, slots=True)
class Allowance:
    """What is left of this minute's calls."""

    limit: int
    used: int
    reset_seconds: int  # until the next minute, when the count begins anew

    @property
    def remaining(self) -> int:
        return max(0, self.limit - self.used)

    @property
    def is_exceeded(self) -> bool:
        return self.used > self.limit

    @property
    def headers(self) -> dict[str, str]:
        return {
            "RateLimit-Limit": str(self.limit),
            "RateLimit-Remaining": str(self.remaining),
            "RateLimit-Reset": str(self.reset_seconds),
        }


def take_for_credential(credential: str, *, limit: int, address: str) -> Allowance | None:
    """Count a call with a right credential; None when Redis does not answer.

    From an address that failed too often in this minute, a right credential is answered like a wrong one, or
    guessing would cost nothing. But not one that the address has used before: nobody is locked out by a neighbour.
    """
    minute, reset_seconds = _now()
    count_key, known_key = _key(minute, credential), f"{_PREFIX}:known:{credential}:{address}"
    try:
        with redis_client.asking():
            with redis_client.client().pipeline(transaction=False) as pipeline:
                pipeline.incr(count_key)
                pipeline.expire(count_key, 2 * WINDOW_SECONDS)
                pipeline.get(_key(minute, f"address:{address}"))
                pipeline.exists(known_key)
                used, _, failures, is_known = pipeline.execute()
            if not is_known:
                of_address = Allowance(settings.API_ANONYMOUS_CALLS_PER_MINUTE, int(failures or 0), reset_seconds)
                if of_address.used >= of_address.limit:
                    return Allowance(of_address.limit, of_address.used + 1, reset_seconds)
                redis_client.client().set(known_key, 1, ex=KNOWN_FOR_SECONDS)
    except redis_client.RedisPaused:
        return None
    except redis.RedisError as error:
        logger.warning("Calls of the API are not counted", error=error)
        return None
    return Allowance(limit, used, reset_seconds)


def take_for_address(address: str) -> Allowance | None:
    """Count a call without a right credential; None when Redis does not answer."""
    minute, reset_seconds = _now()
    key = _key(minute, f"address:{address}")
    try:
        with redis_client.asking(), redis_client.client().pipeline(transaction=False) as pipeline:
            pipeline.incr(key)
            pipeline.expire(key, 2 * WINDOW_SECONDS)
            used, _ = pipeline.execute()
    except redis_client.RedisPaused:
        return None
    except redis.RedisError as error:
        logger.warning("Calls of the API are not counted", error=error)
        return None
    return Allowance(settings.API_ANONYMOUS_CALLS_PER_MINUTE, used, reset_seconds)


_PREFIX = "postmate:api-calls"


def _key(minute: int, who: str) -> str:
    return f"{_PREFIX}:{minute}:{who}"


def _now() -> tuple[int, int]:
    minute, second = divmod(int(time.time()), WINDOW_SECONDS)
    return minute, WINDOW_SECONDS - second
