from celery import shared_task

from ai_ops import operations, own_data


@shared_task
def close_abandoned_results() -> int:
    return operations.close_abandoned_results()


@shared_task
def sweep_content() -> int:
    return own_data.sweep_content()
