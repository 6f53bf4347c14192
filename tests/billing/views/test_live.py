"""The balance streams of one person: how many there are, and what a change costs (row 130)."""

import asyncio
import threading
from collections.abc import Callable
from contextlib import suppress

import httpx2
from django.test import Client

from accounts import access
from accounts.models import User
from billing import announcements, ledger
from kit import redis_client
from tests import servers
from tests.ai_ops.studio import until
from tests.environment import free_port
from tests.servers import Server


class Reader(threading.Thread):
    """An open page."""

    def __init__(self, web: Server, session: str) -> None:
        super().__init__(daemon=True)
        self.web, self.session = web, session
        self.lines: list[str] = []
        self.start()

    def run(self) -> None:
        headers = {"Cookie": f"sessionid={self.session}"}
        with (
            suppress(httpx2.TransportError),  # the server stops before this test's last readers have gone
            httpx2.stream("GET", f"{self.web.url}/live/balance/", headers=headers, timeout=60) as stream,
        ):
            for line in stream.iter_lines():
                self.lines.append(line)

    def waits_for(self, text: str) -> Callable[[], bool]:
        return lambda: any(text in line for line in self.lines)


def test_the_oldest_of_too_many_streams_is_told_to_close(web: Server, alice: User, bob: User) -> None:
    """In whichever process it is. A page that is told so opens none anew; those of other people go on, and all that are
    left hear of a change. What a process counted that died is displaced first, and forgotten in time."""
    sessions = []
    for person in (alice, bob):
        client = Client()
        client.force_login(person)
        sessions.append(str(client.session.session_key))

    def opened(server: Server, session: str, number: int = 1) -> list[Reader]:
        readers = []
        for _ in range(number):
            readers.append(Reader(server, session))
            until(readers[-1].waits_for("event: balance"))
        return readers

    def were_told(readers: list[Reader]) -> None:
        for reader in readers:
            until(lambda reader=reader: not reader.is_alive())  # type: ignore[misc]
            assert "event: closed" in reader.lines

    others = opened(web, sessions[1])
    readers = opened(web, sessions[0], 2)
    with servers.running_live(port=free_port()) as second:
        readers += opened(second, sessions[0], 10)
        readers += opened(web, sessions[0], announcements.STREAMS_PER_USER - 9)
        were_told(readers[:3])
        for person in (alice, bob):
            ledger.add_tokens(user_id=person.pk, tokens=5, type="bonus", description="Test", idempotency_key="five")
        for reader in [*readers[3:], *others]:
            until(reader.waits_for("10,005"))
            assert "event: closed" not in reader.lines
        second.process.kill()
        second.process.wait()
    counted = redis_client.client().zcard(f"postmate:streams:{alice.pk}")
    assert counted == announcements.STREAMS_PER_USER  # nine of them of the process that died
    more = opened(web, sessions[0], 9)
    assert all(reader.is_alive() for reader in [*readers[12:], *more])
    were_told_before = set(readers[:12])
    assert not any(reader.is_alive() for reader in were_told_before)
    more += opened(web, sessions[0])
    were_told([readers[12]])
    for reader in [*readers[13:], *more]:
        assert reader.is_alive()


def test_who_is_signed_out_hears_nothing_more(web: Server, alice: User) -> None:
    """135: by themselves, from elsewhere, or switched off: a stream that is open tells of no change after that."""

    def opened() -> tuple[Client, Reader]:
        client = Client()
        client.force_login(alice)
        reader = Reader(web, str(client.session.session_key))
        until(reader.waits_for("event: balance"))
        return client, reader

    def pays(tokens: int) -> None:
        ledger.add_tokens(
            user_id=alice.pk, tokens=tokens, type="bonus", description="Test", idempotency_key=f"{tokens}"
        )

    (out, left), (_, stays) = opened(), opened()
    out.logout()
    pays(5)
    until(stays.waits_for("10,005"))
    until(lambda: not left.is_alive())
    access.end_sessions(alice)
    _, last = opened()
    pays(50)
    until(last.waits_for("10,055"))
    until(lambda: not stays.is_alive())
    User.objects.filter(pk=alice.pk).update(is_active=False)
    pays(500)
    until(lambda: not last.is_alive())
    for reader, amount in ((left, "10,005"), (stays, "10,055"), (last, "10,555")):
        assert not reader.waits_for(amount)()


def test_a_change_is_read_once_for_all_streams_of_a_person_and_never_from_before_it() -> None:
    async def scenario() -> tuple[list[str], list[str], int]:
        listener, readings, gate = announcements.BalanceListener(), 0, asyncio.Event()

        async def read(user_id: int) -> str:
            nonlocal readings
            readings += 1
            mine = f"{user_id}, reading {readings}"
            await gate.wait()
            return mine

        async def ask(user_id: int, number: int) -> list[asyncio.Task[str]]:
            asked = [asyncio.create_task(listener.read_once(user_id, read)) for _ in range(number)]
            await asyncio.sleep(0)
            return asked

        before = await ask(7, 20)
        before[0].cancel()  # the one who began the reading leaves
        listener.wake(7)
        after = [*await ask(7, 20), *await ask(8, 1)]
        gate.set()
        return await asyncio.gather(*before[1:]), await asyncio.gather(*after), readings

    before, after, readings = asyncio.run(scenario())
    assert set(before) == {"7, reading 1"}
    assert after == ["7, reading 2"] * 20 + ["8, reading 3"]
    assert readings == 3
