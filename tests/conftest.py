"""The cast of people and the servers that tests share."""

import gc
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from decimal import Decimal
from typing import Any

import hypothesis
import pgtrigger
import pytest
import time_machine
from allauth.account.models import EmailAddress
from django.contrib.auth.hashers import make_password
from django.core.cache import cache
from django.db import IntegrityError, OperationalError, connection, transaction
from django.test import Client, TransactionTestCase
from django.urls import reverse
from pytest_django.fixtures import Settings
from xdist.scheduler import LoadFileScheduling

from accounts import two_persons
from accounts.models import User
from billing import catalogue, ledger
from billing.catalogue import packages, system_settings
from billing.models import ModelPrice, Purchase
from billing.payments import gateway
from billing.pricing import TokenPools
from kit import redis_client
from tests import databases, servers
from tests.payments import buy, deliver, event_of, verify_books
from tests.servers import Server, StripeStandIn

PASSWORD = "correct horse battery"  # noqa: S105 – of the tests alone

# How long an example takes depends on what else the machine does.
hypothesis.settings.register_profile("tests", hypothesis.settings.default, deadline=None)
hypothesis.settings.load_profile("tests")

BEGUN_FIRST = ("tests/faults", "tests/production", "tests/test_permissions.py", "tests/journeys")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files begin first, so that no process is alone with one at the end."""
    items.sort(key=lambda item: not item.nodeid.startswith(BEGUN_FIRST))


def pytest_collection_finish() -> None:
    """What was imported and collected stays, so the garbage collector need not look at it again for each new page:
    a twentieth of the work."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(10_000, 20, 20)


# Files that run in one process, one after the other, since what they share takes half a minute to start.
SHARING = {
    "tests/faults/test_postgres.py": "faults",
    "tests/faults/test_redis.py": "faults",
    "tests/production/test_slow_callers.py": "production",
    "tests/production/test_start.py": "production",
}


class _ByFile(LoadFileScheduling):
    def _split_scope(self, nodeid: str) -> str:
        file = super()._split_scope(nodeid)
        return SHARING.get(file, file)


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> _ByFile:
    """How the files are shared out among the processes."""
    return _ByFile(config, log)


@pytest.fixture(scope="session")
def django_db_setup(
    django_test_environment: None, django_db_blocker: Any, django_db_modify_db_settings: None
) -> Iterator[None]:
    with django_db_blocker.unblock(), databases.copied():
        yield


@pytest.fixture(autouse=True, scope="session")
def _tests_may_empty_the_ledger() -> Iterator[None]:
    """The one sanctioned switch of law 3: a test that commits has its tables emptied afterwards."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TransactionTestCase, "_fixture_teardown", lambda self: _empty_tables())
        yield


def _empty_tables() -> None:
    """Delete the few rows that are there. Django's flush truncates all tables, whose files PostgreSQL makes anew, and
    makes the content types anew, too: a fifth of a second for each of hundreds of tests."""
    kept = {"django_content_type", "auth_permission"}
    tables = sorted(set(connection.introspection.django_table_names(only_existing=True)) - kept)
    for tries_left in (2, 1, 0):
        try:
            with transaction.atomic(), pgtrigger.ignore(), connection.cursor() as cursor:
                filled = (f"SELECT '{table}' WHERE EXISTS (SELECT 1 FROM {table})" for table in tables)  # noqa: S608
                cursor.execute(" UNION ALL ".join(filled))
                for (table,) in cursor.fetchall():
                    cursor.execute(f"DELETE FROM {table}")  # noqa: S608 – our own names
            return
        except (IntegrityError, OperationalError):  # a server of the test was still writing
            if not tries_left:
                raise


@pytest.fixture
def seeded(db: None) -> None:
    """Packages and models on sale."""
    packages.seed_default_packages()
    catalogue.seed_default_models()


@pytest.fixture
def no_thinking(seeded: None) -> None:
    """Models that do not think, as the stand-in's do not: what is held is for the text alone."""
    ModelPrice.objects.update(thinking_tokens=0)


MakeUser = Callable[..., User]


@pytest.fixture
def make_user(seeded: None) -> MakeUser:
    """Makes a user with an open account: `make_user("eve", tokens=500)`. Without `tokens` the bonus stays, 10,000."""

    def make(name: str, *, tokens: int | None = None, role: str = User.Role.USER) -> User:
        user = User.objects.create(
            email=f"{name}@example.com", password=make_password(PASSWORD), name=name.title(), role=role
        )
        account = ledger.initialize_account(user_id=user.pk)
        change_tokens = 0 if tokens is None else tokens - account.balance
        if change_tokens > 0:
            ledger.add_tokens(
                user_id=user.pk,
                tokens=change_tokens,
                type="bonus",
                description="Test",
                idempotency_key="test",
            )
        elif change_tokens < 0:
            ledger.deduct_tokens(
                user_id=user.pk,
                tokens=-change_tokens,
                operation=ledger.Operation("chat", "openai", "gpt-6-luna", multiplier=Decimal(1)),
                pools=TokenPools(input_tokens=-change_tokens),
            )
        return user

    return make


def prove_address(user: User) -> None:
    """The address is confirmed."""
    EmailAddress.objects.create(user=user, email=user.email, verified=True, primary=True)


def show_password(client: Client) -> None:
    """The client's person, who is signed in, has just given their password again."""
    client.post(reverse("account_reauthenticate"), {"password": PASSWORD})


def change_settings(by: User, **changes: Any) -> None:
    """Also those that two superadmins change."""
    system_settings.update_system_settings(changes=changes, changed_by_id=by.pk)
    for request in two_persons.list_open():
        two_persons.approve(request_id=request.pk, by=None)


@pytest.fixture
def alice(make_user: MakeUser) -> User:
    return make_user("alice")


@pytest.fixture
def bob(make_user: MakeUser) -> User:
    return make_user("bob")


@pytest.fixture
def adam(make_user: MakeUser) -> User:
    return make_user("adam", role=User.Role.ADMIN)


@pytest.fixture
def susan(make_user: MakeUser) -> User:
    return make_user("susan", role=User.Role.SUPERADMIN)


@pytest.fixture(scope="session")
def _stripe_process() -> Iterator[StripeStandIn]:
    with servers.running_stripe() as stripe:
        yield stripe


@pytest.fixture
def stripe(request: pytest.FixtureRequest, _stripe_process: StripeStandIn) -> StripeStandIn:
    """The Stripe stand-in, empty. Its events go to `web`; in a test without it they wait until the test delivers them,
    for a `web` that is still there from another test would take them, and commit that it did."""
    _stripe_process.control("reset")
    if "_web_process" not in request.fixturenames:
        _stripe_process.control("deliveries/hold")
    return _stripe_process


@pytest.fixture(scope="session")
def ai() -> Iterator[Server]:
    """The AI stand-in."""
    with servers.running_ai() as ai:
        yield ai


@pytest.fixture(scope="session")
def _web_process(django_db_setup: None, django_db_blocker: Any) -> Iterator[Server]:
    with django_db_blocker.unblock(), servers.running_web() as web:
        yield web


@pytest.fixture
def web(transactional_db: None, _web_process: Server) -> Server:
    """The product as a process of its own, on the (committed) test database."""
    return _web_process


# --- Payments -------------------------------------------------------------------------------------------------------


@pytest.fixture
def books_stay_in_order(db: None) -> Iterator[None]:
    """After the test every law holds."""
    yield
    verify_books()


@pytest.fixture
def events_wait(stripe: StripeStandIn) -> None:
    """Stripe's events wait until the test delivers or releases them."""
    stripe.control("deliveries/hold")


@pytest.fixture
def impatient(settings: Settings) -> Iterator[None]:
    """Stripe has a second to answer: enough for all that shall succeed, also on a busy machine."""
    settings.STRIPE_TIMEOUT_SECONDS = 1.0
    gateway._client.cache_clear()
    yield
    gateway._client.cache_clear()


@pytest.fixture
def fresh_limits(db: None) -> None:
    """Sign-ins and sign-ups are limited by address; the tests that commit leave their counts."""
    cache.clear()


@pytest.fixture
def stopped_clock() -> Iterator[None]:
    """Limits and codes are by the minute or less, and a busy machine may take that long for a test."""
    redis_client._paused_until.clear()  # a limit is not counted while Redis, too slow for a test before, is not asked
    with time_machine.travel(datetime(2026, 11, 21, 12, tzinfo=UTC), tick=False):
        yield


@pytest.fixture
def buyer(client: Client, alice: User) -> Client:
    """Alice, signed in."""
    client.force_login(alice)
    return client


@pytest.fixture
def paid(stripe: StripeStandIn, buyer: Client) -> Purchase:
    """Alice has paid for the Starter package; no event has come yet."""
    return buy(stripe, buyer)


@pytest.fixture
def bought(stripe: StripeStandIn, paid: Purchase) -> Purchase:
    """Alice has the Starter package: 150,000 tokens for $15."""
    assert deliver(event_of(stripe, "checkout.session.completed")).status_code == 200
    paid.refresh_from_db()
    return paid
