"""The Celery application: `celery -A postmate worker` and `celery -A postmate beat`."""

import os
from pathlib import Path
from typing import Any

import structlog
from celery import Celery, Task
from celery.signals import after_task_publish, beat_init, heartbeat_sent, setup_logging, task_success, worker_ready
from django.dispatch import receiver
from django_structlog.celery.signals import bind_extra_task_metadata, modify_context_before_task_publish
from django_structlog.celery.steps import DjangoStructLogInitStep

os.environ.setdefault("DJANGO_SETTINGS_MODULE", "postmate.settings")

app = Celery("postmate")
app.config_from_object("django.conf:settings", namespace="CELERY")
app.autodiscover_tasks()
app.steps["worker"].add(DjangoStructLogInitStep)


@setup_logging.connect
def _leave_logs_to_django(**options: Any) -> None:
    """That somebody listens keeps Celery from configuring loggers of its own."""


@task_success.connect
def _note_success(sender: Task, **options: Any) -> None:
    from postmate.web import metrics  # the models are there only once the worker has begun

    metrics.note_success(sender.name)


@worker_ready.connect
@heartbeat_sent.connect
def _show_life(**options: Any) -> None:
    """Every two seconds, while the worker is connected. Asking workers through Redis would cost a process each time."""
    if file := os.environ.get("WORKER_SIGN_OF_LIFE"):
        Path(file).touch()


@beat_init.connect
def _watch_beat(**options: Any) -> None:
    after_task_publish.connect(_note_beat)


def _note_beat(**options: Any) -> None:
    from postmate.web import metrics

    metrics.note_beat()


@receiver(bind_extra_task_metadata)
def _name_task(sender: Any, task: Task, **options: Any) -> None:
    structlog.contextvars.bind_contextvars(task=task.name)


@receiver(modify_context_before_task_publish)
def _send_ids_along(sender: Any, context: dict[str, Any], **options: Any) -> None:
    for name in context.keys() - {"request_id", "parent_task_id"}:
        del context[name]
