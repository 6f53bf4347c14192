"""What one machine serves: pages, API calls, webhooks, open streams and tasks, and who uses its cores meanwhile.

    .venv/bin/python -m tests.benchmarks.serving

The processes are those of docker-compose.yml, with production's settings, on a scratch database of the configured
server: `web` with two workers of eight threads, `live`, a Celery worker of eight threads. There is no proxy in front
and no TLS; Stripe's events are signed here, the AI provider is the stand-in. The load comes from one asyncio process,
which sends requests made beforehand over connections that stay open and reads no more of an answer than its length.
It shares the machine with everything else, so each line says what each party took of the cores, and "core ms" what one
item took of a core in the product, PostgreSQL and Redis together, which is the figure to plan with. It ends by itself
in under three minutes where nothing else runs, after `verify_ledger` has gone over all of it.
"""

# ruff: noqa: T201  (its output is what it is for)

import asyncio
import json
import os
import random
import re
import resource
import statistics
import subprocess
import sys
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import ExitStack, asynccontextmanager, contextmanager, suppress
from datetime import timedelta
from decimal import Decimal
from io import StringIO
from pathlib import Path
from typing import IO, Any
from urllib.parse import urlencode

import psutil  # type: ignore[import-untyped]
import redis
from celery import Celery
from django.conf import settings
from django.contrib.auth import BACKEND_SESSION_KEY, HASH_SESSION_KEY, SESSION_KEY
from django.contrib.sessions.backends.db import SessionStore
from django.contrib.sessions.models import Session
from django.core.management import call_command
from django.db import connection
from django.utils import timezone

from accounts.models import User
from ai_ops.models import ContentPiece, Project
from billing import announcements, ledger
from billing.models import TokenAccount
from billing.payments import gateway
from billing.pricing import TokenPools
from tests import environment, servers
from tests.benchmarks import scratch_database
from tests.benchmarks.debit import ACCOUNTS, SEED
from tests.payments import sign
from tests.standins.ai_server import running_ai_standin

REDIS_DATABASE = 14  # of nobody else: a worker of `make run` must not find our tasks
WEB_PORT, LIVE_PORT = environment.free_port(), environment.free_port()
CLIENTS, SECONDS, WARM_UP_SECONDS, ALONE_SECONDS = 16, 4.0, 1.0, 1.0
HISTORY_ENTRIES, PIECES = 200, 8
PURCHASES = 10_000  # more than can be paid while it lasts
TABS, OPENED_AT_ONCE = 2, 50  # balance streams of each person
PACED_DEBITS, DEBITS_PER_SECOND = 300, 50
AI_STREAMS, AI_TOKENS_PER_SECOND = 100, 100
TASKS = 2_000
CSRF_TOKEN = "c" * 32
LOG = Path(__file__).parents[2] / "artifacts" / "serving.log"

# Read by the processes that are started, after tests.environment has set what tests need.
os.environ |= {
    "DEBUG": "false",
    "SECRET_KEY": "benchmark-" + "0123456789abcdefghijklmnopqrstuvwxyz" * 2,
    "SITE_URL": f"http://127.0.0.1:{WEB_PORT}",
    "REDIS_URL": environment.redis_database(settings.REDIS_URL, REDIS_DATABASE),
    "DATABASE_POOL_SIZE": "20",
    "EMAIL_URL": "dummymail://",
    "STRIPE_API_BASE": "http://127.0.0.1:9",  # nobody there, and nobody asks
    "API_SERVICE_CALLS_PER_MINUTE": "100000000",
    "DRAIN_SECONDS": "0.1",  # no proxy has to learn that a server stops
}
settings.SECRET_KEY = os.environ["SECRET_KEY"]  # the sessions made here are read there

SEED_PURCHASES = f"""
INSERT INTO billing_purchase (account_id, user_id, workspace_id, kind, state, package_name, tokens, amount_cents,
       currency, discount_cents, stripe_price_id, stripe_session_id, checkout_url, receipt_url, failure_code, message,
       created_at)
SELECT account.id, user_id, workspace_id, 'checkout', 'open', 'Bench', 150000, 1500,
       'usd', 0, '', 'cs_' || n, '', '', '', '', now()
  FROM generate_series(1, {PURCHASES}) AS n JOIN billing_tokenaccount AS account ON account.user_id = 1 + n % {ACCOUNTS}
"""  # noqa: S608 – our own names and constants, no input


# --- What there is --------------------------------------------------------------------------------------------------


def seed() -> dict[int, str]:
    """People with accounts, sessions and purchases; the first of them with a past. Returns the session key of each."""
    call_command("seed_billing", stdout=StringIO())
    with connection.cursor() as cursor:
        cursor.execute(SEED)
        cursor.execute(SEED_PURCHASES)
    person = User.objects.get(pk=1)
    for _ in range(HISTORY_ENTRIES):
        ledger.deduct_tokens(
            user_id=person.pk,
            tokens=2_250,
            operation=ledger.Operation("generation", "openai", "gpt-6-luna", multiplier=Decimal("1.5")),
            pools=TokenPools(input_tokens=1_000, output_tokens=500),
        )
    project = Project.objects.create(workspace=person.workspaces.get(), name="Bench")
    for number in range(PIECES):
        ContentPiece.objects.create(project=project, author=person, title=f"Text {number}", body="Words. " * 300)
    keys = {}
    rows = []
    for user in User.objects.filter(token_account__isnull=False):
        data = {
            SESSION_KEY: str(user.pk),
            BACKEND_SESSION_KEY: settings.AUTHENTICATION_BACKENDS[0],
            HASH_SESSION_KEY: user.get_session_auth_hash(),
        }
        keys[user.pk] = f"{user.pk:032}"
        expire_date = timezone.now() + timedelta(days=1)
        rows.append(
            Session(session_key=keys[user.pk], session_data=SessionStore().encode(data), expire_date=expire_date)
        )
    Session.objects.bulk_create(rows)
    with connection.cursor() as cursor:
        cursor.execute("VACUUM ANALYZE")
    return keys


@contextmanager
def running_product(log: IO[str]) -> Iterator[dict[str, psutil.Process]]:
    """The processes of production, until the end of the context, and those they work with, by name."""
    with ExitStack() as stack:
        standin = stack.enter_context(running_ai_standin(tokens_per_second=AI_TOKENS_PER_SECOND))
        os.environ["OPENAI_BASE_URL"] = f"{standin.address}/openai/v1"
        [standin_process] = [each for each in psutil.Process().children() if "standins.ai" in each.cmdline()]
        collect = [sys.executable, "manage.py", "collectstatic", "--noinput", "--verbosity=0"]
        subprocess.run(collect, cwd=servers.PROJECT, check=True)
        web = stack.enter_context(_server("web --workers 2 --threads 8", WEB_PORT, log))
        live_server = stack.enter_context(_server("live", LIVE_PORT, log))
        celery = "celery -A postmate worker --pool threads --concurrency 8 --loglevel WARNING"
        worker = subprocess.Popen([sys.executable, "-m", *celery.split()], cwd=servers.PROJECT, stdout=log, stderr=log)
        stack.callback(worker.wait, 20)
        stack.callback(worker.terminate)
        with connection.cursor() as cursor:
            cursor.execute("SELECT pg_backend_pid()")
            postgres = psutil.Process(cursor.fetchone()[0]).parent()
        with redis.Redis.from_url(os.environ["REDIS_URL"]) as client:
            redis_process = psutil.Process(client.info("server")["process_id"])
        yield {
            "web": psutil.Process(web.process.pid),
            "live": psutil.Process(live_server.process.pid),
            "worker": psutil.Process(worker.pid),
            "postgres": postgres,
            "redis": redis_process,
            "load": psutil.Process(),
            "ai": standin_process,
        }


def _server(options: str, port: int, log: IO[str]) -> Any:
    command = ["-m", "postmate.serving", *options.split(), "--port", str(port)]
    return servers.running(command, url=f"http://127.0.0.1:{port}", ready_path="/readyz", log=log)


# --- Who uses the cores ---------------------------------------------------------------------------------------------


class Meter:
    """Processor seconds and memory, by party. What is none of ours on the machine is "other"."""

    def __init__(self, processes: dict[str, psutil.Process]) -> None:
        self.processes = processes

    def seconds(self) -> dict[str, float]:
        used = {name: self._seconds_of(name) for name in self.processes}
        machine = psutil.cpu_times()
        busy = machine.user + machine.nice + machine.system + machine.irq + machine.softirq
        return used | {"other": busy - sum(used.values())}

    def _seconds_of(self, name: str) -> float:
        times = [process.cpu_times() for process in self.family(name)]
        used = sum(each.user + each.system for each in times)
        if name == "postgres":  # whose connections come and go
            used += times[0].children_user + times[0].children_system
        return float(used)

    def family(self, name: str) -> list[psutil.Process]:
        process = self.processes[name]
        return [process] if name == "load" else [process, *process.children(recursive=True)]

    def rss_mib(self, name: str) -> float:
        return float(self.processes[name].memory_info().rss / 2**20)

    def show_memory(self) -> None:
        print(f"\n{'memory, MiB':<34}{'resident':>10}{'its own':>10}")
        for name in self.processes:
            family = self.family(name)
            for number, process in enumerate(family if name == "web" else family[:1]):
                label = f"web, worker {number}" if number else name + (", which starts them" if name == "web" else "")
                memory = process.memory_full_info()
                print(f"{label:<34}{memory.rss / 2**20:10.0f}{memory.uss / 2**20:10.0f}")
        connections = self.family("postgres")[1:]
        own = sum(process.memory_full_info().uss for process in connections) / 2**20
        print(f"{f'postgres, its {len(connections)} other processes':<34}{'':>10}{own:10.0f}")


OWN_PARTIES = ("web", "live", "worker", "postgres", "redis")
PARTIES = (*OWN_PARTIES, "load", "ai", "other")


def show_heading(text: str) -> None:
    parties = "".join(f"{name:>9}" for name in PARTIES)
    print(f"\n{text:<42}{'per s':>8}{'p50 ms':>8}{'p99 ms':>8}{'alone':>8}{'core ms':>9}  cores:{parties}", flush=True)


def show(
    name: str, per_second: float, latencies_ms: list[float], cores: dict[str, float], *, alone_ms: float | None = None
) -> None:
    percentiles = statistics.quantiles(latencies_ms, n=100) if len(latencies_ms) > 1 else None
    shown = f"{percentiles[49]:8.1f}{percentiles[98]:8.1f}" if percentiles else f"{'':16}"
    alone = f"{alone_ms:8.1f}" if alone_ms is not None else f"{'':8}"
    used = "".join(f"{cores[party]:9.2f}" for party in PARTIES)
    core_ms = sum(cores[party] for party in OWN_PARTIES) / per_second * 1_000
    print(f"{name:<42}{per_second:8,.0f}{shown}{alone}{core_ms:9.1f}        {used}", flush=True)


@asynccontextmanager
async def metered(meter: Meter, cores: dict[str, float]) -> AsyncIterator[None]:
    """Fill `cores` with what each party used of them during the context."""
    before, began = meter.seconds(), time.perf_counter()
    yield
    after, seconds = meter.seconds(), time.perf_counter() - began
    cores |= {name: max(0.0, (after[name] - before[name]) / seconds) for name in after}


# --- The load -------------------------------------------------------------------------------------------------------

_LENGTH = re.compile(rb"\r\ncontent-length: *(\d+)", re.IGNORECASE)


class Client:
    """A connection that stays open."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader, self._writer = reader, writer

    @classmethod
    async def connect(cls, port: int) -> "Client":
        return cls(*await asyncio.open_connection("127.0.0.1", port))

    async def send(self, request: bytes) -> bytes:
        """Send a request; the body of its answer, which must be a success."""
        await self.begin(request)
        return self._body

    async def begin(self, request: bytes) -> None:
        """Send a request and read the head of its answer, which must be a success, and its body if it has a length."""
        self._writer.write(request)
        head = await self._reader.readuntil(b"\r\n\r\n")
        length = _LENGTH.search(head)
        self._body = await self._reader.readexactly(int(length[1])) if length else b""
        if head[9:11] != b"20":
            raise RuntimeError(f"{request[:200]!r} was answered\n{head.decode()}{self._body[:2_000].decode()}")

    async def next_event(self) -> bytes:
        """The next message of an event stream, comments included; between two there may be the framing of chunks."""
        return await self._reader.readuntil(b"\n\n")

    def close(self) -> None:
        self._writer.close()


def _request(method: str, path: str, port: int, body: bytes = b"", **headers: str) -> bytes:
    lines = [f"{method} {path} HTTP/1.1", f"Host: 127.0.0.1:{port}"]
    lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
    if body:
        lines.append(f"Content-Length: {len(body)}")
    return "\r\n".join([*lines, "", ""]).encode() + body


def _api(path: str, **fields: Any) -> bytes:
    return _request(
        *("POST", f"/api/v1/{path}", WEB_PORT, json.dumps(fields).encode()),
        Authorization=f"Bearer {environment.BILLING_SECRET}",
        Content_Type="application/json",
        Idempotency_Key=str(uuid.uuid4()),
    )


def _anybody() -> int:
    return random.randint(1, ACCOUNTS)  # noqa: S311 – chance, no secret


def _usage(user_id: int) -> bytes:
    return _api(
        "usage", user_id=user_id, operation_type="chat", provider="openai", model="gpt-6-luna",
        input_tokens=1_000, output_tokens=500,
    )  # fmt: skip


def _paid_session(number: int) -> bytes:
    """Stripe's event that purchase `number` is paid."""
    session = {
        "id": f"cs_{number}", "object": "checkout.session", "status": "complete", "payment_status": "paid",
        "client_reference_id": str(number), "customer": None, "payment_intent": f"pi_{number}",
        "amount_subtotal": 1_500, "amount_total": 1_500, "currency": "usd",
    }  # fmt: skip
    event = {
        "id": f"evt_{number}", "object": "event", "type": "checkout.session.completed", "livemode": False,
        "api_version": gateway.API_VERSION, "created": int(time.time()), "data": {"object": session},
    }  # fmt: skip
    body = json.dumps(event).encode()
    return _request("POST", "/stripe/webhook/", WEB_PORT, body, Stripe_Signature=sign(body))


Step = Callable[[Client], Awaitable[Any]]


async def repeat(step: Step, *, clients: int, seconds: float) -> tuple[float, list[float]]:
    """Steps per second when each of `clients` begins the next as soon as one is done; milliseconds of each."""
    latencies_ms: list[float] = []
    began = time.perf_counter()

    async def run() -> None:
        client = await Client.connect(WEB_PORT)
        before = time.perf_counter()
        while before - began < seconds:
            await step(client)
            after = time.perf_counter()
            latencies_ms.append((after - before) * 1_000)
            before = after
        client.close()

    await asyncio.gather(*(run() for _ in range(clients)))
    return len(latencies_ms) / (time.perf_counter() - began), latencies_ms


async def measure(meter: Meter, name: str, step: Step) -> None:
    await repeat(step, clients=CLIENTS, seconds=WARM_UP_SECONDS)
    _, alone = await repeat(step, clients=1, seconds=ALONE_SECONDS)
    cores: dict[str, float] = {}
    async with metered(meter, cores):
        rate, latencies_ms = await repeat(step, clients=CLIENTS, seconds=SECONDS)
    show(name, rate, latencies_ms, cores, alone_ms=statistics.median(alone))


# --- The measurements -----------------------------------------------------------------------------------------------


async def measure_web(meter: Meter, sessions: dict[int, str]) -> None:
    show_heading(f"web, {CLIENTS} clients")
    for path in ("/healthz", "/tokens/balance/", "/tokens/", "/tokens/history/", "/studio/"):
        request = _request("GET", path, WEB_PORT, Cookie=f"sessionid={sessions[1]}")
        await measure(meter, path, lambda client, request=request: client.send(request))  # type: ignore[misc]
    await measure(meter, "usage recorded and charged", lambda client: client.send(_usage(_anybody())))
    await measure(meter, "the same, all of one account", lambda client: client.send(_usage(2)))

    async def reserve_and_settle(client: Client) -> None:
        answer = await client.send(
            _api(
                "reservations", user_id=_anybody(), operation_type="chat", provider="openai", model="gpt-6-luna",
                input_tokens=400, max_output_tokens=600,
            )
        )  # fmt: skip
        usage_id = json.loads(answer)["usage"]["usage_id"]
        await client.send(_api(f"reservations/{usage_id}/settle", input_tokens=400, output_tokens=250))

    await measure(meter, "pairs of reserve and settle", reserve_and_settle)
    numbers = iter(range(1, PURCHASES))

    async def pay(client: Client) -> None:
        await client.send(_paid_session(next(numbers)))

    await measure(meter, "webhooks, each the credit of a purchase", pay)


class BalanceStream:
    """A tab that watches the balance. `arrivals` gets the time of each event but the first."""

    def __init__(self, user_id: int) -> None:
        self.user_id = user_id
        self.arrivals: asyncio.Queue[float] = asyncio.Queue()

    async def open(self, session_key: str) -> None:
        self.client = await Client.connect(LIVE_PORT)
        await self.client.begin(
            _request("GET", "/live/balance/", LIVE_PORT, Accept="text/event-stream", Cookie=f"sessionid={session_key}")
        )
        await self.client.next_event()
        self._task = asyncio.create_task(self._listen())

    async def _listen(self) -> None:
        while True:
            if b"event: balance" in await self.client.next_event():
                self.arrivals.put_nowait(time.perf_counter())

    def close(self) -> None:
        self._task.cancel()
        self.client.close()


async def measure_balance_streams(meter: Meter, sessions: dict[int, str]) -> None:
    show_heading("live, the balance in open tabs")
    streams = [BalanceStream(user_id) for user_id in sessions for _ in range(TABS)]
    before_mib, cores = meter.rss_mib("live"), dict[str, float]()
    gate = asyncio.Semaphore(OPENED_AT_ONCE)
    opening_ms: list[float] = []

    async def open_one(stream: BalanceStream) -> None:
        async with gate:
            began = time.perf_counter()
            await stream.open(sessions[stream.user_id])
            opening_ms.append((time.perf_counter() - began) * 1_000)

    began = time.perf_counter()
    async with metered(meter, cores):
        await asyncio.gather(*map(open_one, streams))
    show("streams opened", len(streams) / (time.perf_counter() - began), opening_ms, cores)
    added_mib, threads = meter.rss_mib("live") - before_mib, meter.processes["live"].num_threads()

    by_user: dict[int, list[BalanceStream]] = {}
    for stream in streams:
        by_user.setdefault(stream.user_id, []).append(stream)
    clients: asyncio.Queue[Client] = asyncio.Queue()
    for _ in range(CLIENTS):
        clients.put_nowait(await Client.connect(WEB_PORT))
    arriving_ms: list[float] = []

    async def debit(position: int, user_id: int) -> None:
        await asyncio.sleep(position / DEBITS_PER_SECOND)
        client = await clients.get()
        sent = time.perf_counter()
        await client.send(_usage(user_id))
        clients.put_nowait(client)
        for stream in by_user[user_id]:
            with suppress(TimeoutError):  # Redis did not answer in time: then nobody is told, and pages ask later
                arriving_ms.append((await asyncio.wait_for(stream.arrivals.get(), 20) - sent) * 1_000)

    began = time.perf_counter()
    async with metered(meter, cores):
        people = random.sample(sorted(by_user), PACED_DEBITS)
        await asyncio.gather(*(debit(position, user_id) for position, user_id in enumerate(people)))
    show("events, from request to tab, paced", len(arriving_ms) / (time.perf_counter() - began), arriving_ms, cores)
    if lost := PACED_DEBITS * TABS - len(arriving_ms):
        print(f"{lost} events did not come")

    began, arrived = time.perf_counter(), []
    async with metered(meter, cores):
        with redis.Redis.from_url(os.environ["REDIS_URL"]) as publisher, publisher.pipeline() as pipeline:
            for user_id in by_user:
                pipeline.publish(announcements.BALANCE_CHANNEL, user_id)
            pipeline.execute()
        arrived = [await asyncio.wait_for(stream.arrivals.get(), 60) - began for stream in streams]
    show("events, all tabs at once", len(arrived) / max(arrived), [each * 1_000 for each in arrived], cores)
    print(f"{len(streams):,} open streams: {added_mib * 1_024 / len(streams):.0f} KiB each, {threads:,} threads in all")
    began = time.perf_counter()
    for stream in streams:
        stream.close()
    # Another process: there is nothing to be woken by.
    while meter.processes["live"].num_threads() > threads - len(streams):
        if time.perf_counter() - began > 60:
            raise RuntimeError("The live process does not notice that its readers have gone.")
        await asyncio.sleep(0.02)
    print(f"all of them closed at once: {time.perf_counter() - began:.1f} s until the process is done with that")
    for _ in range(CLIENTS):
        clients.get_nowait().close()


async def measure_ai_streams(meter: Meter, sessions: dict[int, str]) -> None:
    show_heading(f"live, {AI_STREAMS} drafts at once")
    first_ms: list[float] = []
    all_ms: list[float] = []

    async def draft(user_id: int) -> None:
        body = urlencode(
            {
                "title": "Tea", "topic": "Green and black tea, for beginners.", "project": "Bench", "tone": "neutral",
                "model": "openai:gpt-6-luna", "length": "long", "idempotency_key": uuid.uuid4().hex,
            }
        ).encode()  # fmt: skip
        client = await Client.connect(LIVE_PORT)
        began = time.perf_counter()
        await client.begin(
            _request(
                *("POST", "/live/draft/", LIVE_PORT, body),
                Accept="text/event-stream",
                Content_Type="application/x-www-form-urlencoded",
                Cookie=f"sessionid={sessions[user_id]}; csrftoken={CSRF_TOKEN}",
                X_CSRFToken=CSRF_TOKEN,
            )
        )
        is_first = True
        while b"event: done" not in (event := await client.next_event()):
            if b"event: failed" in event:
                raise RuntimeError(event.decode())
            if is_first and b"event: text" in event:
                first_ms.append((time.perf_counter() - began) * 1_000)
                is_first = False
        all_ms.append((time.perf_counter() - began) * 1_000)
        client.close()

    await asyncio.gather(*(draft(user_id) for user_id in range(1, 11)))  # which imports what is needed first
    first_ms.clear()
    all_ms.clear()
    cores: dict[str, float] = {}
    began = time.perf_counter()
    async with metered(meter, cores):
        await asyncio.gather(*(draft(user_id) for user_id in range(1, AI_STREAMS + 1)))
    seconds = time.perf_counter() - began
    show("until the first words", AI_STREAMS / seconds, first_ms, cores)
    show("until the draft is paid", AI_STREAMS / seconds, all_ms, cores)
    print(f"one draft: {cores['live'] * seconds / AI_STREAMS * 1_000:.0f} ms of a core in the live process")


async def measure_tasks(meter: Meter) -> None:
    show_heading("worker, 8 threads")
    url = os.environ["REDIS_URL"]
    broker = Celery(broker=url.replace("unix://", "redis+socket://").replace("?db=", "?virtual_host="))
    with redis.Redis.from_url(url) as client:
        client.flushdb()  # what the webhooks left to do asks Stripe

        async def run(number: int) -> float:
            def send() -> None:
                with broker.connection_for_write() as channel:
                    for user_id in range(number):
                        broker.send_task("billing.tasks.auto_recharge", [1 + user_id % ACCOUNTS], connection=channel)

            began = time.perf_counter()
            await asyncio.to_thread(send)
            while client.llen("celery") or client.hlen("unacked"):
                if time.perf_counter() - began > 60:
                    raise RuntimeError("The worker does not get through its tasks.")
                await asyncio.sleep(0.02)
            return time.perf_counter() - began

        await run(100)
        cores: dict[str, float] = {}
        async with metered(meter, cores):
            seconds = await run(TASKS)
    show("tasks of two queries", TASKS / seconds, [], cores)


async def measure_all(meter: Meter, sessions: dict[int, str]) -> None:
    await measure_web(meter, sessions)
    await measure_balance_streams(meter, sessions)
    await measure_ai_streams(meter, sessions)
    await measure_tasks(meter)


def main() -> None:
    _, most_files = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most_files, most_files))
    LOG.parent.mkdir(parents=True, exist_ok=True)
    one, five, _ = os.getloadavg()
    print(
        f"{os.cpu_count()} cores, shared by the product, PostgreSQL, Redis, the AI stand-in and the load;\n"
        f"load average before: {one:.1f} in the last minute, {five:.1f} in the last five"
    )
    began = time.perf_counter()
    with scratch_database(), LOG.open("w") as log:
        sessions = seed()
        with running_product(log) as processes:
            meter = Meter(processes)
            asyncio.run(measure_all(meter, sessions))
            meter.show_memory()
        if TokenAccount.objects.filter(reserved__gt=0).exists():
            raise SystemExit("Holds are left open.")
    print(f"{time.perf_counter() - began:.0f} s in all; what the processes said is in {LOG}")


if __name__ == "__main__":
    main()
