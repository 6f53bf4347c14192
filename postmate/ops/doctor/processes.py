"""Redis, the worker, beat and the site."""

from time import time
from typing import Any

import httpx2
import redis
from celery import current_app
from django.conf import settings

from kit import redis_client
from postmate.ops.doctor.findings import Outcomes, count, get_page, ok, problem, short, warning
from postmate.web import metrics

OLDEST_REDIS = (6, 2)
LONG_QUEUE = 500
WORKER_SECONDS = 2.0  # for the answers of all workers
BEAT_SILENT_SECONDS = 120  # it hands over e-mails every ten


def redis_answers() -> Outcomes:
    try:
        facts: dict[str, Any] = redis_client.client().info()
    except redis.RedisError as error:
        yield problem(
            f"Redis does not answer: {short(error)}",
            "Is it running, and is REDIS_URL right? Until then: no e-mails, no auto-recharge, no sweeps; payments and "
            "debits go on.",
        )
        return
    # Valkey names the Redis whose protocol it speaks, too.
    name = f"Valkey {facts['valkey_version']}" if "valkey_version" in facts else f"Redis {facts['redis_version']}"
    version = tuple(int(part) for part in facts["redis_version"].split(".")[:2])
    if version < OLDEST_REDIS:
        yield problem(f"{name} is too old.", f"Upgrade to {'.'.join(map(str, OLDEST_REDIS))}, or to Valkey.")
    elif facts.get("maxmemory") and facts.get("maxmemory_policy") != "noeviction":
        yield problem(
            f"Redis throws entries away when its memory is full ({facts['maxmemory_policy']}): tasks would be lost.",
            "Set maxmemory-policy noeviction, and give it memory enough.",
        )
    elif not facts.get("aof_enabled") and not settings.DEBUG:
        yield warning(
            f"{name} keeps no append-only file: its restart loses the tasks in the queue.",
            "Set appendonly yes. Sweeps do again what is lost, minutes later.",
        )
    else:
        yield ok(f"{name} answers and evicts nothing.")


def queue() -> Outcomes:
    client = redis_client.client()
    number = sum(int(client.llen(name)) for name in current_app.amqp.queues)
    text = f"{count(number, 'task')} waiting."
    if number > LONG_QUEUE:
        yield warning(text, "Start more workers, or find out in their log what keeps them.")
    else:
        yield ok(text)


def worker_lives() -> Outcomes:
    """Some worker answers for each queue."""
    answers = current_app.control.inspect(timeout=WORKER_SECONDS).active_queues() or {}
    served = {queue["name"] for queues in answers.values() for queue in queues}
    unserved = sorted(current_app.amqp.queues.keys() - served)
    if not answers:
        yield problem(
            "No worker answers.",
            "Start it: `celery -A postmate worker`. Until then: no e-mails, no auto-recharge, no sweeps.",
        )
    elif unserved:
        yield problem(
            f"No worker serves the queue {' or '.join(unserved)}: its tasks wait for ever.",
            "Start a worker for it, or one without `--queues`, which serves all.",
        )
    else:
        yield ok(f"{count(len(answers), 'worker')} answered, and all queues are served.")


def beat_lives() -> Outcomes:
    stamp = redis_client.client().get(metrics.BEAT_KEY)
    seconds = time() - float(stamp) if stamp else None
    if seconds is not None and seconds < BEAT_SILENT_SECONDS:
        yield ok(f"Beat handed a task over {max(seconds, 0):.0f} s ago.")
    else:
        since = f"for {seconds:.0f} s" if seconds is not None else "since Redis began"
        yield problem(
            f"Beat has handed nothing over {since}.",
            "Start it, once: `celery -A postmate beat`. Without it holds are not released and no e-mail goes out. Just "
            "started? Then ask again in half a minute.",
        )


def site_answers() -> Outcomes:
    try:
        answer = get_page("/readyz")
    except httpx2.TransportError as error:
        if settings.DEBUG:
            yield problem(f"Nothing answers at {settings.SITE_URL}.", "`make run` starts everything.")
        else:
            yield problem(
                f"{settings.SITE_URL} cannot be reached from here: {short(error)}",
                "Are proxy and web running, does the name lead here, is the certificate good?",
            )
        return
    if answer.status_code == 200:
        yield ok(f"{settings.SITE_URL} answers and is ready.")
    else:
        yield problem(
            f"{settings.SITE_URL}/readyz answers {answer.status_code}.",
            "A redirect, 400 or 404: SITE_URL, ALLOWED_HOSTS and the proxy do not fit together. 503: see the database.",
        )
