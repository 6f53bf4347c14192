"""Handing work to Celery once what it is about is committed. The broker may be away: then a sweep finds the work."""

from functools import partial

import structlog
from celery import current_app
from django.db import transaction

from kit import redis_client

logger = structlog.get_logger(__name__)


def enqueue_on_commit(task: str, *arguments: int | None) -> None:
    """Have a worker run `task` ("billing.tasks.…") after the commit. Never raises; it waits for a silent broker
    once, not for each task.

    By name, so that domain code can ask for what stands above it.
    """
    transaction.on_commit(partial(_enqueue, task, *arguments))


def _enqueue(task: str, *arguments: int | None) -> None:
    try:
        with redis_client.asking():
            current_app.send_task(task, args=arguments, retry=False)
    except Exception as error:  # whatever the broker's client raises: the caller's work is done and committed
        logger.warning("A task was not enqueued, a sweep will do it", task=task, arguments=arguments, error=error)
