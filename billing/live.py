"""One Redis channel that says whose balance has changed. Redis may be away: pages then fall back on polling.

A message names the user and nothing else. Who hears it reads the balance from the database, so a message that comes
late, twice or out of order cannot show a wrong number.
"""

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager

import redis
import redis.asyncio
import structlog
from django.conf import settings

from billing import redis_client

logger = structlog.get_logger(__name__)

BALANCE_CHANNEL = "postmate:balance-changed"
RECONNECT_SECONDS = 2


def announce_balance_change(user_id: int) -> None:
    """Tell every open page of the user that the balance changed. Call it after the commit. Never raises."""
    try:
        with redis_client.asking():
            redis_client.client().publish(BALANCE_CHANNEL, str(user_id))
    except redis_client.RedisPaused:
        pass  # the first one of the pause has said so
    except redis.RedisError as error:
        logger.warning("A live balance was not announced", user_id=user_id, error=error)


class BalanceListener:
    """Hears the channel once per process and wakes the open streams of the user it names."""

    def __init__(self) -> None:
        self._streams: dict[int, set[asyncio.Event]] = {}
        self._task: asyncio.Task[None] | None = None
        self.is_closed = False

    @contextmanager
    def changes_of(self, user_id: int) -> Iterator[asyncio.Event]:
        """An event that is set whenever the user's balance has changed, for as long as the context lasts."""
        changed = asyncio.Event()
        self._streams.setdefault(user_id, set()).add(changed)
        if self._task is None or self._task.done():
            self._task = asyncio.create_task(self._listen())
        try:
            yield changed
        finally:
            streams = self._streams[user_id]
            streams.discard(changed)
            if not streams:
                del self._streams[user_id]

    def close(self) -> None:
        """The process stops: wake all streams, which end. Call it in the event loop's thread."""
        self.is_closed = True
        self._wake(*self._streams)

    async def _listen(self) -> None:
        while True:
            try:
                async with (
                    redis.asyncio.Redis.from_url(settings.REDIS_URL) as client,
                    client.pubsub() as channel,
                ):
                    await channel.subscribe(BALANCE_CHANNEL)
                    # Whatever was said while nobody listened is made up for.
                    self._wake(*self._streams)
                    async for message in channel.listen():
                        if message["type"] == "message":
                            self._wake(int(message["data"]))
            except (redis.RedisError, OSError) as error:
                logger.warning("Live balances are off until Redis answers again", error=error)
                await asyncio.sleep(RECONNECT_SECONDS)

    def _wake(self, *user_ids: int) -> None:
        for user_id in user_ids:
            for changed in self._streams.get(user_id, ()):
                changed.set()


listener = BalanceListener()
