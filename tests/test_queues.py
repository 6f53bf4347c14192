"""Which queue a task waits in: a slow one must not stand before a payment."""

import pytest
import redis
from django.conf import settings

from postmate.celery import app
from tests import servers
from tests.ai_ops.studio import until


def test_every_route_leads_from_a_task_to_a_queue_that_workers_take_from() -> None:
    routes = app.conf.task_routes
    app.loader.import_default_modules()
    assert set(routes) <= set(app.tasks)
    assert {route["queue"] for route in routes.values()} | {app.conf.task_default_queue} == set(app.amqp.queues)


def test_queues_share_nothing() -> None:
    """With one exchange and key between them each task would be put into all."""
    queues = app.amqp.queues.values()
    assert len({(queue.exchange.name, queue.routing_key) for queue in queues}) == len(list(queues)) == 4
    sent_to = app.amqp.router.route({}, "billing.tasks.auto_recharge")["queue"]
    assert sent_to.name == "payments"


@pytest.mark.django_db(transaction=True)
def test_one_worker_takes_from_all_queues() -> None:
    tasks = ("expire_reservations", "sweep_purchases", "send_notifications", "sweep_bulk_jobs")
    with redis.Redis.from_url(settings.REDIS_URL) as client, servers.running_worker():
        client.delete(*app.amqp.queues, "unacked", "unacked_index")
        for task in tasks:
            app.send_task(f"billing.tasks.{task}")
        assert sum(client.llen(queue) for queue in app.amqp.queues) + client.hlen("unacked") > 0
        until(
            lambda: not any(client.llen(queue) for queue in app.amqp.queues) and not client.hlen("unacked"), seconds=30
        )
