from collections.abc import Iterator

import pytest

from accounts.models import User
from billing.models import TokenAccount
from billing.upkeep.verification import verify
from tests.ai_ops.studio import Writer
from tests.servers import Server


@pytest.fixture
def books_and_holds_stay_in_order(web: Server, ai: Server) -> Iterator[None]:
    """Whatever a test did, all laws hold after it and nothing is reserved any more."""
    yield
    assert [finding for finding in verify() if finding.violations] == []
    assert not TokenAccount.objects.exclude(reserved=0).exists()


@pytest.fixture
def writer(books_and_holds_stay_in_order: None, alice: User, web: Server) -> Writer:
    return Writer(alice, web)
