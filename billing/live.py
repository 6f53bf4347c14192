"""One Redis channel that says whose balance has changed. Redis may be away: pages then fall back on polling.

A message names the user and nothing else. Who hears it reads the balance from the database, so a message that comes
late, twice or out of order cannot show a wrong number.
"""

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager

import redis
import redis.asyncio
import structlog
from django.conf import settings

from billing import redis_client

logger = structlog.get_logger(__name__)

BALANCE_CHANNEL = "postmate:balance-changed"
RECONNECT_SECONDS = 2
STREAMS_PER_USER = 20  # in each process; a browser keeps one, for the tab that is seen


def announce_balance_change(user_id: int) -> None:
    """Tell every open page of the user that the balance changed. Call it after the commit. Never raises."""
    try:
        with redis_client.asking():
            redis_client.client().publish(BALANCE_CHANNEL, str(user_id))
    except redis_client.RedisPaused:
        pass  # the first one of the pause has said so
    except redis.RedisError as error:
        logger.warning("A live balance was not announced", user_id=user_id, error=error)


class Stream:
    """One open page: `changed` is set when the balance has changed, or when the stream is to end."""

    def __init__(self) -> None:
        self.changed = asyncio.Event()
        self.is_displaced = False  # by a newer one of the same user


class BalanceListener:
    """Hears the channel once per process and wakes the open streams of the user it names."""

    def __init__(self) -> None:
        self._streams: dict[int, list[Stream]] = {}  # of each user, the oldest first
        self._reads: dict[int, asyncio.Task[str]] = {}  # those under way that began after the last change
        self._task: asyncio.Task[None] | None = None
        self.is_closed = False

    @contextmanager
    def stream_of(self, user_id: int) -> Iterator[Stream]:
        """A stream that hears of the user's changes for as long as the context lasts.

        Of more than STREAMS_PER_USER the oldest is displaced: it is told, and ends.
        """
        stream = Stream()
        streams = self._streams.setdefault(user_id, [])
        streams.append(stream)
        for oldest in streams[:-STREAMS_PER_USER]:
            oldest.is_displaced = True
            oldest.changed.set()
            streams.remove(oldest)
        if self._task is None or self._task.done():
            self._task = asyncio.create_task(self._listen())
        try:
            yield stream
        finally:
            if stream in streams:
                streams.remove(stream)
            if not streams and self._streams.get(user_id) is streams:
                del self._streams[user_id]

    async def read_once(self, user_id: int, read: Callable[[int], Awaitable[str]]) -> str:
        """What `read` says of the user; streams that ask at once share one reading. It began after the last change."""
        task = self._reads.get(user_id)
        if task is None:
            task = self._reads[user_id] = asyncio.ensure_future(_awaited(read(user_id)))
            task.add_done_callback(lambda done: self._forget_read(user_id, done))
        return await asyncio.shield(task)  # whoever leaves does not end it for the others

    def _forget_read(self, user_id: int, read: asyncio.Task[str]) -> None:
        if self._reads.get(user_id) is read:
            del self._reads[user_id]

    def close(self) -> None:
        """The process stops: wake all streams, which end. Call it in the event loop's thread."""
        self.is_closed = True
        self.wake(*self._streams)

    async def _listen(self) -> None:
        while True:
            try:
                async with (
                    redis.asyncio.Redis.from_url(settings.REDIS_URL) as client,
                    client.pubsub() as channel,
                ):
                    await channel.subscribe(BALANCE_CHANNEL)
                    # Whatever was said while nobody listened is made up for.
                    self.wake(*self._streams)
                    async for message in channel.listen():
                        if message["type"] == "message":
                            self.wake(int(message["data"]))
            except (redis.RedisError, OSError) as error:
                logger.warning("Live balances are off until Redis answers again", error=error)
                await asyncio.sleep(RECONNECT_SECONDS)

    def wake(self, *user_ids: int) -> None:
        """The balance of these users has changed. Call it in the event loop's thread."""
        for user_id in user_ids:
            self._reads.pop(user_id, None)
            for stream in self._streams.get(user_id, ()):
                stream.changed.set()


async def _awaited(result: Awaitable[str]) -> str:
    return await result


listener = BalanceListener()
