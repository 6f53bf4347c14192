from celery import shared_task

from ai_ops import operations


@shared_task
def close_abandoned_results() -> int:
    return operations.close_abandoned_results()
