"""The product on servers of its own, and a browser."""

from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from tests.faults import pair as pairs
from tests.faults.pair import Pair
from tests.journeys.conftest import browser

__all__ = ["browser"]


@pytest.fixture(scope="session")
def _pair() -> Iterator[Pair]:
    # pytest's own directory is root's alone, and PostgreSQL does not run as root.
    with TemporaryDirectory(prefix="postmate-faults-", ignore_cleanup_errors=True) as directory:
        Path(directory).chmod(0o755)
        with pairs.running(Path(directory)) as pair:
            yield pair


@pytest.fixture
def pair(_pair: Pair) -> Iterator[Pair]:
    """Everything runs, before and after. After each test every law holds."""
    yield _pair
    _pair.manage("verify_ledger")
