"""A database that is away. Under load, with a real one: tests/faults/test_postgres.py."""

from typing import Any

import pytest
from django.db import OperationalError, connections
from django.test import Client
from pytest_django.fixtures import Settings


@pytest.mark.parametrize("debug", [True, False])
def test_a_page_asks_a_database_that_is_away_once(
    buyer: Client, settings: Settings, monkeypatch: pytest.MonkeyPatch, debug: bool
) -> None:
    """74: each question waits for a time-out, and Django's own page about an exception has many."""
    settings.DEBUG = debug
    buyer.raise_request_exception = False
    asked = []

    def away(*arguments: Any) -> None:
        asked.append(arguments)
        raise OperationalError("There is no server.")

    with monkeypatch.context() as patch:
        patch.setattr(connections["default"], "_cursor", away)
        answer = buyer.get("/tokens/")
    assert answer.status_code == 503
    assert "We will be back in a moment" in answer.content.decode()
    assert len(asked) == 1
