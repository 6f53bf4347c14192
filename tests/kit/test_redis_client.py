"""What asks Redis something, from many threads."""

import sys
import threading
from collections.abc import Iterator

import pytest

from kit import redis_client

THREADS, ROUNDS = 8, 20


@pytest.fixture
def _threads_take_turns_often() -> Iterator[None]:
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(interval)


@pytest.mark.usefixtures("_threads_take_turns_often")
def test_threads_that_begin_together_share_one_client() -> None:
    """As after a start, when the first calls come at once: none may find its connection closed by another."""
    failures: list[Exception] = []

    def ask(barrier: threading.Barrier) -> None:
        barrier.wait()
        try:
            for _ in range(3):
                with redis_client.client().pipeline(transaction=False) as pipeline:
                    pipeline.ping()
                    pipeline.execute()
        except Exception as error:
            failures.append(error)

    for _ in range(ROUNDS):
        redis_client._client_of.cache_clear()
        barrier = threading.Barrier(THREADS)
        threads = [threading.Thread(target=ask, args=[barrier]) for _ in range(THREADS)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert failures == []
