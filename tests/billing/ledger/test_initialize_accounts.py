"""`manage.py initialize_accounts`: accounts and the welcome bonus for the users who were there before billing was."""

import os
import signal
import subprocess
import sys
import time
from io import StringIO
from typing import Any
from urllib.parse import quote

import pytest
from allauth.account.models import EmailAddress
from django.core.management import call_command
from django.db import connection, transaction
from pytest_django.fixtures import Settings

from accounts.models import User, Workspace
from billing import ledger
from billing.catalogue import system_settings
from billing.management.commands import initialize_accounts
from billing.models import BonusKey, TokenAccount, TokenTransaction
from tests.payments import verify_books
from tests.servers import PROJECT

DEADLINE_SECONDS = 30


def bring_in(count: int) -> list[User]:
    """Users from before billing: rows of the table, without an account."""
    users = User.objects.bulk_create(User(email=f"old{number}@example.com") for number in range(count))
    Workspace.objects.bulk_create(Workspace(owner=user, name="Personal") for user in users)
    return users


def initialize(**options: Any) -> str:
    out = StringIO()
    call_command("initialize_accounts", stdout=out, **options)
    return out.getvalue()


def bonuses(user: User) -> list[int]:
    return list(
        TokenTransaction.objects.filter(user=user, idempotency_key=ledger.WELCOME_BONUS_KEY).values_list(
            "amount", flat=True
        )
    )


@pytest.mark.django_db
def test_everybody_gets_an_account_and_the_bonus_once(
    alice: User, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Row 61. More users than a batch holds; Alice had hers at sign-up."""
    monkeypatch.setattr(initialize_accounts, "BATCH_USERS", 3)
    users = bring_in(8)
    # The marks' key is to be encrypted with this one, too, but not by a dry run.
    settings.SECRET_KEY, settings.SECRET_KEY_FALLBACKS = "another", [settings.SECRET_KEY]
    assert initialize(dry_run=True) == (
        "Accounts to open: 8. Welcome bonuses of 10,000 tokens to give at most: 8. "
        "Bonuses that wait until the e-mail address is verified: 0. Users: 9.\n"
    )
    assert (TokenAccount.objects.count(), BonusKey.objects.count()) == (1, 1)
    assert "Accounts opened: 8. Welcome bonuses of 10,000 tokens given: 8." in initialize()
    assert "Accounts opened: 0. Welcome bonuses of 10,000 tokens given: 0." in initialize()
    assert [bonuses(user) for user in (alice, *users)] == [[10_000]] * 9
    assert set(TokenAccount.objects.values_list("balance", flat=True)) == {10_000}
    verify_books()


@pytest.mark.django_db
def test_a_user_without_a_workspace_gets_one() -> None:
    users = bring_in(2)
    Workspace.objects.filter(owner=users[0]).delete()
    initialize()
    assert Workspace.objects.filter(owner=users[0]).count() == Workspace.objects.filter(owner=users[1]).count() == 1
    assert bonuses(users[0]) == [10_000]


@pytest.mark.django_db
def test_the_bonus_waits_for_the_email_address(settings: Settings) -> None:
    settings.ACCOUNT_EMAIL_VERIFICATION = "mandatory"
    users = bring_in(3)
    EmailAddress.objects.create(user=users[0], email=users[0].email, verified=True)
    EmailAddress.objects.create(user=users[1], email=users[1].email, verified=False)
    told = initialize()
    assert "Accounts opened: 3. Welcome bonuses of 10,000 tokens given: 1." in told
    assert "wait until the e-mail address is verified: 2." in told
    assert [bonuses(user) for user in users] == [[10_000], [], []]
    EmailAddress.objects.filter(user=users[1]).update(verified=True)
    told = initialize()
    assert "Accounts opened: 0. Welcome bonuses of 10,000 tokens given: 1." in told
    assert "wait until the e-mail address is verified: 1." in told
    assert [bonuses(user) for user in users] == [[10_000], [10_000], []]


@pytest.mark.django_db
def test_without_a_welcome_bonus_accounts_are_opened(susan: User) -> None:
    system_settings.update_system_settings(changes={"welcome_bonus_tokens": 0}, changed_by_id=susan.pk)
    users = bring_in(2)
    assert "Accounts opened: 2. Welcome bonuses of 0 tokens given: 0." in initialize()
    assert [ledger.get_account(user_id=user.pk).balance for user in users] == [0, 0]


@pytest.mark.django_db(transaction=True)
def test_killed_in_the_middle_it_goes_on_and_gives_nothing_twice() -> None:
    """Row 61: kill -9 while the bonus of the eleventh of twenty users is being given."""
    users = bring_in(20)
    account = TokenAccount.objects.create(user=users[10], workspace=users[10].workspaces.get())
    with transaction.atomic():
        # The process stops in front of this row: that makes it certain where it is killed.
        TokenAccount.objects.select_for_update().get(pk=account.pk)
        process = subprocess.Popen(
            [sys.executable, "manage.py", "initialize_accounts"],
            cwd=PROJECT,
            env={**os.environ, "DATABASE_URL": database_url()},
        )
        try:
            deadline = time.monotonic() + DEADLINE_SECONDS
            while not is_somebody_waiting_for_a_lock():
                assert process.poll() is None
                assert time.monotonic() < deadline
                time.sleep(0.02)
        finally:
            process.send_signal(signal.SIGKILL)
            assert process.wait() == -signal.SIGKILL
        assert [bonuses(user) for user in users] == [[10_000]] * 10 + [[]] * 10
    # The dead process's statement has the lock now and may still commit: that, too, must count once.
    assert "Accounts opened: 9." in initialize()
    assert [bonuses(user) for user in users] == [[10_000]] * 20
    assert set(TokenAccount.objects.values_list("balance", flat=True)) == {10_000}
    verify_books()


def is_somebody_waiting_for_a_lock() -> bool:
    with connection.cursor() as cursor:
        # Not pg_stat_activity: within a transaction that shows the same moment again and again. In other databases
        # other tests run; whoever waits in this one has locks of its tables.
        cursor.execute("""
            SELECT EXISTS (
                SELECT FROM pg_locks AS waiting JOIN pg_locks AS other USING (pid)
                 WHERE NOT waiting.granted
                   AND other.database = (SELECT oid FROM pg_database WHERE datname = current_database())
            )
        """)
        return bool(cursor.fetchone()[0])


def database_url() -> str:
    database = connection.settings_dict
    password = f":{quote(database['PASSWORD'], safe='')}" if database["PASSWORD"] else ""
    host = quote(database["HOST"], safe="")
    return f"postgresql://{database['USER']}{password}@{host}:{database['PORT'] or 5432}/{database['NAME']}"
