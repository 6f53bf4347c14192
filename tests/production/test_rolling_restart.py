"""Everything is restarted while people work, and nobody notices; a process that is killed is noticed, and replaced."""

import os
import signal

import pytest

from tests.production.conftest import Production, wait_until
from tests.production.load import Crowd, read_books

pytestmark = pytest.mark.storm


@pytest.fixture(scope="module")
def crowd(production: Production) -> Crowd:
    return Crowd(production)


def test_restarting_everything_under_load(production: Production, crowd: Crowd) -> None:
    before = production.processes()
    with crowd.at_work():
        crowd.wait_for_more_of_everything()
        restarted = production.run("restart")
        assert restarted.returncode == 0, restarted.stderr
        crowd.wait_for_more_of_everything()

    after = production.processes()
    replaced = {name for name in before if before[name] != after[name]}
    assert replaced == {"web1", "web2", "live1", "live2", "worker", "beat"}
    assert crowd.failures == []
    assert crowd.done["reconnect"] >= 1  # the balance stream did live through the end of its process

    # Whoever asks again is answered what was booked the first time.
    with crowd.server() as http:
        for key, body in crowd.usage_keys.items():
            assert http.post("/api/v1/usage", json=body, headers={"Idempotency-Key": key}).status_code == 200
    keys = [*crowd.usage_keys, *crowd.settled_keys, *crowd.draft_keys]
    assert read_books(production, keys) == {key: [["succeeded", 1]] for key in keys}  # and they are in order
    assert len(crowd.usage_keys) >= 40
    assert len(crowd.settled_keys) >= 20
    assert len(crowd.draft_keys) >= 4


def test_killing_is_noticed(production: Production, crowd: Crowd) -> None:
    """The control: without a graceful end requests do fail, and the crowd says so. Even then the books are right."""
    crowd.failures.clear()
    before, killed = production.processes(), ("web1", "live1", "live2")
    with crowd.at_work():
        crowd.wait_for_more_of_everything()
        begun = crowd.done["draft begun"]
        wait_until(lambda: crowd.done["draft begun"] > begun, "somebody reads the beginning of a draft")
        for name in killed:
            os.killpg(before[name], signal.SIGKILL)
        wait_until(lambda: any("_write_drafts" in failure for failure in crowd.failures), "they noticed")
        wait_until(
            lambda: all(production.processes()[name] not in (None, before[name]) for name in killed), "a new start"
        )
    booked = read_books(production, list(crowd.usage_keys))
    assert all(len(operations) == 1 for operations in booked.values())
