"""The product on servers of its own, and a browser."""

import shutil
from collections.abc import Iterator

import pytest

from tests.faults import pair as pairs
from tests.faults.pair import Pair
from tests.journeys.conftest import browser

__all__ = ["browser"]


@pytest.fixture(scope="session")
def _pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    directory = tmp_path_factory.mktemp("faults")
    with pairs.running(directory) as pair:
        yield pair
    shutil.rmtree(directory, ignore_errors=True)


@pytest.fixture
def pair(_pair: Pair) -> Iterator[Pair]:
    """Everything runs, before and after. After each test every law holds."""
    yield _pair
    _pair.manage("verify_ledger")
