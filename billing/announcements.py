"""What the live processes hear of through Redis: whose balance has changed, and which stream is one too many.

Redis may be away: pages then fall back on polling, and each process counts streams for itself. A message about a
balance names the account and nothing else. Who hears it reads the balance from the database, so a message that comes
late, twice or out of order cannot show a wrong number.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar
from uuid import uuid4

import redis
import redis.asyncio
import structlog
from django.conf import settings

from kit import redis_client
from kit.database import in_thread

logger = structlog.get_logger(__name__)
Result = TypeVar("Result")

BALANCE_CHANNEL = "postmate:account-changed"
DISPLACED_CHANNEL = "postmate:stream-displaced"
RECONNECT_SECONDS = 2
STREAMS_PER_USER = 20  # in all processes together; a browser keeps one, for the tab that is seen
STREAM_SECONDS = 600  # then the browser asks anew, and whoever was signed out meanwhile is told to stop
# Those of a process that died are counted for so long. They are the oldest by then: no other is displaced for them.
COUNTED_SECONDS = STREAM_SECONDS + 60


def announce_balance_change(account_id: int) -> None:
    """Tell every open page that shows the account that its balance changed, or who may see it. Call it after the
    commit. Never raises."""
    try:
        with redis_client.asking():
            redis_client.client().publish(BALANCE_CHANNEL, str(account_id))
    except redis_client.RedisPaused:
        pass  # the first one of the pause has said so
    except redis.RedisError as error:
        logger.warning("A live balance was not announced", account_id=account_id, error=error)


def count_stream(user_id: int, stream_id: str) -> None:
    """Count an open stream among its user's, in whichever process, and tell the oldest beyond STREAMS_PER_USER to end.

    Never raises. It is one transaction of Redis: two that open at once displace two, and none twice.
    """
    key, now = _streams_key(user_id), time.time()
    try:
        with redis_client.asking():
            client = redis_client.client()
            with client.pipeline(transaction=True) as pipe:
                pipe.zadd(key, {stream_id: now})
                pipe.zremrangebyscore(key, "-inf", now - COUNTED_SECONDS)
                pipe.zrange(key, 0, -STREAMS_PER_USER - 1)
                pipe.zremrangebyrank(key, 0, -STREAMS_PER_USER - 1)
                pipe.expire(key, COUNTED_SECONDS)
                _, _, displaced, _, _ = pipe.execute()
            for oldest in displaced:
                client.publish(DISPLACED_CHANNEL, f"{user_id} {oldest.decode()}")
    except redis_client.RedisPaused:
        pass  # the first one of the pause has said so
    except redis.RedisError as error:
        logger.warning("A live stream was not counted", user_id=user_id, error=error)


def discount_streams(ended: Iterable[tuple[int, str]]) -> None:
    """Count these no more (user and stream). Never raises: what is left is forgotten after COUNTED_SECONDS."""
    try:
        with redis_client.asking(), redis_client.client().pipeline(transaction=False) as pipe:
            for user_id, stream_id in ended:
                pipe.zrem(_streams_key(user_id), stream_id)
            pipe.execute()
    except redis_client.RedisPaused:
        pass
    except redis.RedisError as error:
        logger.warning("Ended live streams are still counted", error=error)


def _streams_key(user_id: int) -> str:
    return f"postmate:streams:{user_id}"


class Stream:
    """One open page of a user, which shows an account: `changed` is set when the balance has changed, or when the
    stream is to end."""

    def __init__(self, account_id: int) -> None:
        self.id = uuid4().hex
        self.account_id = account_id
        self.counting: asyncio.Future[None] | None = None
        self.changed = asyncio.Event()
        self.is_displaced = False  # by a newer one of the same user


class BalanceListener:
    """Hears the channel once per process and wakes the open streams of the account it names."""

    def __init__(self) -> None:
        self._streams: dict[int, list[Stream]] = {}  # of each user, the oldest first
        self._watchers: dict[int, set[Stream]] = {}  # of each account
        self._reads: dict[int, asyncio.Task[str]] = {}  # those under way that began after the last change
        self._task: asyncio.Task[None] | None = None
        self._ended: list[tuple[int, Stream]] = []  # which are still counted
        self._discounting: asyncio.Task[None] | None = None
        self.is_closed = False

    @contextmanager
    def stream_of(self, user_id: int, account_id: int) -> Iterator[Stream]:
        """A stream of the user that hears of the account's changes for as long as the context lasts.

        Of more than STREAMS_PER_USER the oldest is displaced: it is told, and ends. `count` it, too, so that those of
        the other processes are known.
        """
        stream = Stream(account_id)
        streams = self._streams.setdefault(user_id, [])
        streams.append(stream)
        watchers = self._watchers.setdefault(account_id, set())
        watchers.add(stream)
        self._displace(user_id, streams[:-STREAMS_PER_USER])
        if self._task is None or self._task.done():
            self._task = asyncio.create_task(self._listen())
        try:
            yield stream
        finally:
            if stream in streams:
                streams.remove(stream)
            if not streams and self._streams.get(user_id) is streams:
                del self._streams[user_id]
            watchers.remove(stream)
            if not watchers and self._watchers.get(account_id) is watchers:
                del self._watchers[account_id]
            self._discount(user_id, stream)

    async def count(self, user_id: int, stream: Stream) -> None:
        """Count the stream among those of its user in all processes."""
        stream.counting = asyncio.ensure_future(_awaited(in_thread(count_stream)(user_id, stream.id)))
        await asyncio.shield(stream.counting)

    def _displace(self, user_id: int, oldest: list[Stream]) -> None:
        for stream in oldest:
            stream.is_displaced = True
            stream.changed.set()
            self._streams[user_id].remove(stream)

    def _discount(self, user_id: int, stream: Stream) -> None:
        """Together with the others that end at this moment: thousands do when a process stops."""
        self._ended.append((user_id, stream))
        if self._discounting is None or self._discounting.done():
            self._discounting = asyncio.create_task(self._discount_all())

    async def _discount_all(self) -> None:
        while self._ended:
            ended, self._ended = self._ended, []
            if counting := [stream.counting for _, stream in ended if stream.counting]:
                await asyncio.wait(counting)  # a thread cannot be stopped: first in, then out
            await in_thread(discount_streams)([(user_id, stream.id) for user_id, stream in ended])

    async def read_once(self, account_id: int, read: Callable[[int], Awaitable[str]]) -> str:
        """What `read` says of the account; streams that ask at once share one reading. It began after the last
        change."""
        task = self._reads.get(account_id)
        if task is None:
            task = self._reads[account_id] = asyncio.ensure_future(_awaited(read(account_id)))
            task.add_done_callback(lambda done: self._forget_read(account_id, done))
        return await asyncio.shield(task)  # whoever leaves does not end it for the others

    def _forget_read(self, account_id: int, read: asyncio.Task[str]) -> None:
        if self._reads.get(account_id) is read:
            del self._reads[account_id]

    def close(self) -> None:
        """The process stops: wake all streams, which end. Call it in the event loop's thread."""
        self.is_closed = True
        self.wake(*self._watchers)

    async def _listen(self) -> None:
        while True:
            try:
                async with (
                    redis.asyncio.Redis.from_url(settings.REDIS_URL) as client,
                    client.pubsub() as channel,
                ):
                    await channel.subscribe(BALANCE_CHANNEL, DISPLACED_CHANNEL)
                    # Whatever was said while nobody listened is made up for.
                    self.wake(*self._watchers)
                    async for message in channel.listen():
                        if message["type"] != "message":
                            continue
                        if message["channel"] == BALANCE_CHANNEL.encode():
                            self.wake(int(message["data"]))
                        else:
                            self._end_stream(*message["data"].decode().split())
            except (redis.RedisError, OSError) as error:
                logger.warning("Live balances are off until Redis answers again", error=error)
                await asyncio.sleep(RECONNECT_SECONDS)

    def _end_stream(self, user_id: str, stream_id: str) -> None:
        streams = self._streams.get(int(user_id), ())
        self._displace(int(user_id), [stream for stream in streams if stream.id == stream_id])

    def wake(self, *account_ids: int) -> None:
        """The balance of these accounts has changed. Call it in the event loop's thread."""
        for account_id in account_ids:
            self._reads.pop(account_id, None)
            for stream in self._watchers.get(account_id, ()):
                stream.changed.set()


async def _awaited(result: Awaitable[Result]) -> Result:
    return await result


listener = BalanceListener()
