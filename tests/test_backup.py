"""Backup and restore, rehearsed: into an empty database of another server, with the commands that an operator types."""

import json
import os
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from datetime import datetime, time, timedelta
from decimal import Decimal
from io import BytesIO, StringIO
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit
from uuid import uuid4

import psycopg
import pytest
from django.core.management import CommandError, call_command
from django.db import connection
from django.test import Client, override_settings
from django.utils import timezone
from pytest_django.fixtures import Settings

from accounts.models import User
from billing import ledger
from billing.models import Purchase, RollUp, TokenAccount, TokenTransaction, TokenUsage
from billing.pricing import TokenPools
from billing.staff import grants
from postmate.ops import backup
from tests import databases
from tests.billing.figures.test_rollups import roll_up_until
from tests.payments import (
    BONUS_TOKENS,
    STARTER_TOKENS,
    begin_checkout,
    checkout_form,
    deliver,
    event_of,
    events_of,
    purchase_state,
    verify_books,
)
from tests.servers import PROJECT, StripeStandIn, _test_database_url

pytestmark = [pytest.mark.django_db(transaction=True), pytest.mark.usefixtures("events_wait")]

TEXT = ledger.Operation("chat", "openai", "gpt-6-luna", multiplier=Decimal("1.5"))
HOLD_SERVER = """
import os
from postmate.local import embedded
embedded.configure_environment()
print(os.environ["DATABASE_URL"], flush=True)
input()
"""


@pytest.fixture(scope="module")
def other_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The URL of a database on a PostgreSQL that has nothing to do with that of the tests."""
    folder = str(tmp_path_factory.mktemp("other"))
    environment = {name: value for name, value in os.environ.items() if name != "DATABASE_URL"}
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD_SERVER],
        cwd=PROJECT,
        env=environment | {"POSTMATE_DATA_DIR": folder},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert holder.stdout
    yield holder.stdout.readline().strip()
    holder.communicate("\n", timeout=120)  # it ends, and being the last stops the server
    shutil.rmtree(folder)


@pytest.fixture
def empty_database(other_server: str) -> str:
    """The URL of a new database there."""
    name = f"restored_{uuid4().hex}"
    with psycopg.connect(other_server, autocommit=True) as server:
        server.execute(f"CREATE DATABASE {name}")
    return f"{other_server.rpartition('/')[0]}/{name}"


@pytest.fixture
def elsewhere(empty_database: str, tmp_path: Path) -> Callable[[], AbstractContextManager[None]]:
    """Within the context this process works on the other database, and on other files."""

    @contextmanager
    def there() -> Iterator[None]:
        url = urlsplit(empty_database)
        server = {"HOST": unquote(url.hostname or ""), "PORT": url.port or ""}
        server |= {"USER": unquote(url.username or ""), "PASSWORD": unquote(url.password or "")}
        with (
            databases.connected_to(url.path[1:], **server),
            override_settings(MEDIA_ROOT=str(tmp_path / "restored-media")),
        ):
            yield

    return there


Manage = Callable[..., tuple[int, str, str]]


@pytest.fixture
def manage(elsewhere: Callable[[], AbstractContextManager[None]]) -> Manage:
    """What `manage.py …` does there: exit code, stdout, stderr. In this process, which costs a tenth of another."""

    def call(*arguments: str) -> tuple[int, str, str]:
        code, stdout, stderr = 0, StringIO(), StringIO()
        with elsewhere():
            try:
                call_command(*arguments, stdout=stdout, stderr=stderr)
            except CommandError as error:
                code = error.returncode
                stderr.write(str(error))
        return code, stdout.getvalue(), stderr.getvalue()

    return call


@pytest.fixture
def media(settings: Settings, tmp_path: Path) -> Path:
    settings.MEDIA_ROOT = str(tmp_path / "media")
    image = tmp_path / "media" / "images" / "2026" / "11" / "sea.png"
    image.parent.mkdir(parents=True)
    image.write_bytes(b"an image")
    (tmp_path / "media" / ".half.unfinished").write_bytes(b"half a file")
    return image


def write_backup(folder: Path) -> Path:
    before = set(backup.list_backups(folder))
    with connection.cursor() as cursor:
        # A transaction that waits for pg_dump must outlive what other transactions are ended for.
        cursor.execute("SET idle_in_transaction_session_timeout TO '20ms'")
        call_command("backup", "--to", str(folder), stdout=StringIO())
        cursor.execute("RESET idle_in_transaction_session_timeout")
    (path,) = set(backup.list_backups(folder)) - before
    return path


def use(user: User, tokens: int) -> ledger.Posting:
    return ledger.deduct_tokens(
        user_id=user.pk, tokens=tokens, operation=TEXT, pools=TokenPools(input_tokens=tokens * 2 // 3)
    )


def hold(user: User, tokens: int, *, seconds: int) -> ledger.Posting:
    key = uuid4().hex
    return ledger.reserve_tokens(
        user_id=user.pk, tokens=tokens, operation=TEXT, idempotency_key=key, lifetime_seconds=seconds
    )


def test_a_restored_server_is_the_one_that_was_backed_up(
    stripe: StripeStandIn, bought: Purchase, buyer: Client, susan: User, bob: User, media: Path, tmp_path: Path,
    empty_database: str, manage: Manage, elsewhere: Callable[[], AbstractContextManager[None]],
) -> None:  # fmt: skip
    """A month of everything, and of each kind something running: row by row the same, and it goes on working."""
    with override_settings(DEBUG=True):
        call_command(
            "make_demo_history", transactions=300, users=12, months=1, force=True, stdout=StringIO(), stderr=StringIO()
        )
    alice = bought.user
    assert alice is not None
    stripe.control(f"payments/{bought.stripe_payment_intent_id}/refund", amount=300)
    assert deliver(event_of(stripe, "charge.refunded")).status_code == 200
    grants.grant_tokens(admin=susan, user_id=bob.pk, tokens=777, reason="For the test", request_key="1")
    use(alice, 300)
    hold(alice, 4_000, seconds=3_600)
    hold(bob, 500, seconds=1)
    begin_checkout(buyer)
    roll_up_until(timezone.now())
    # As an older server leaves it, whose transactions are numbered far above those of a fresh one.
    RollUp.objects.update(sealing_until=timezone.now(), sealing_xid=10**12)
    verify_books()

    path = write_backup(tmp_path / "backups")
    assert path.stat().st_mode & 0o077 == 0, "It has everybody's data: nobody else may read it."
    TokenUsage.objects.filter(status="reserved", reserved_tokens=500).update(
        expires_at=timezone.now() - timedelta(hours=1)
    )  # what is written after the snapshot is in no backup
    account = TokenAccount.objects.get(user=alice)

    restored = subprocess.run(
        [sys.executable, "manage.py", "restore", str(path)], cwd=PROJECT, capture_output=True, text=True, timeout=120,
        env=os.environ | {"DATABASE_URL": empty_database, "MEDIA_ROOT": str(tmp_path / "restored-media")},
    )  # fmt: skip
    assert restored.returncode == 0, restored.stderr
    assert "The books are in order" in restored.stdout
    assert (tmp_path / "restored-media" / "images" / "2026" / "11" / "sea.png").read_bytes() == b"an image"
    assert not list((tmp_path / "restored-media").rglob("*unfinished"))

    manifest = backup.read_manifest(path)
    assert manifest.rows["billing_tokentransaction"] == TokenTransaction.objects.count() > 300
    with psycopg.connect(empty_database, autocommit=True) as there:
        for table in manifest.rows:
            counted = [
                connection_.execute(f'SELECT count(*) FROM "{table}"').fetchone()  # noqa: S608 – our own names and constants, no input
                for connection_ in (connection.cursor(), there)
            ]
            assert counted[0] == counted[1], table
        ours, theirs = (
            cursor.execute(
                "SELECT md5(string_agg(entry::text, ',' ORDER BY id)) FROM billing_tokentransaction AS entry"
            ).fetchone()
            for cursor in (connection.cursor(), there)
        )
        assert ours == theirs
        found = there.execute("SELECT balance, reserved FROM billing_tokenaccount WHERE id = %s", [account.pk])
        assert found.fetchone() == (account.balance, account.reserved) == (account.balance, 4_000)
        assert there.execute("SELECT sealing_until, sealing_xid FROM billing_rollup").fetchone() == (None, None)
        for statement in (
            "UPDATE billing_tokentransaction SET amount = 1",
            "DELETE FROM billing_tokentransaction",
            "TRUNCATE billing_tokentransaction CASCADE",
            "DELETE FROM accounts_auditentry",
        ):
            with pytest.raises(psycopg.errors.RaiseException):
                there.execute(statement)

    with elsewhere():
        assert use(alice, 3).balance_tokens == account.balance - 3
    assert manage("verify_ledger")[0] == 0

    code, _, stderr = manage("restore", str(path))
    assert code == 1
    assert "a backup goes into an empty one" in stderr


def test_what_was_paid_since_the_backup_comes_back_once(
    stripe: StripeStandIn, bought: Purchase, buyer: Client, media: Path, tmp_path: Path, empty_database: str,
    manage: Manage,
) -> None:  # fmt: skip
    """The database is lost, and the backup knows of a payment page that was open, not of the one opened after it."""
    alice = bought.user
    assert alice is not None
    hold(alice, 5_000, seconds=1)
    open_page = begin_checkout(buyer)
    path = write_backup(tmp_path / "backups")
    stripe.pay(open_page.checkout_url)
    unknown = begin_checkout(buyer, checkout_form("Pro"))
    stripe.pay(unknown.checkout_url)
    for event in events_of(stripe, "checkout.session.completed"):
        deliver(event)
    assert [purchase_state(each) for each in (bought, open_page, unknown)] == ["paid"] * 3

    with psycopg.connect(empty_database, autocommit=True) as there:
        while there.execute("SELECT clock_timestamp() < %s", [_expiry_of_hold(alice)]).fetchone() == (True,):
            pass
        code, stdout, stderr = manage("restore", str(path))
        assert code == 0, stderr
        assert "Holds that were over, and are released: 1." in stdout

        def account() -> Any:
            return there.execute(
                "SELECT balance, reserved, lifetime_purchased_tokens FROM billing_tokenaccount WHERE user_id = %s",
                [alice.pk],
            ).fetchone()

        assert account() == (BONUS_TOKENS + STARTER_TOKENS, 0, STARTER_TOKENS)
        code, stdout, _ = manage("reconcile_stripe", "--since", "35d")
        assert "missing_credit" in stdout
        # No row of ours says what was sold for the other payment (law 6): a person decides.
        assert f"unknown_payment {_payment_of(unknown)}" in stdout
        assert code == 1
        assert account() == (BONUS_TOKENS + 2 * STARTER_TOKENS, 0, 2 * STARTER_TOKENS)
        assert "missing_credit" not in manage("reconcile_stripe", "--since", "35d")[1]
        assert account() == (BONUS_TOKENS + 2 * STARTER_TOKENS, 0, 2 * STARTER_TOKENS)
        assert manage("verify_ledger")[0] == 0
        # Stripe knows the lost purchase by its id, and answers its keys: no new one may have them.
        row = there.execute("SELECT nextval(pg_get_serial_sequence('billing_purchase', 'id'))").fetchone()
        assert row is not None
        assert row[0] > unknown.pk + 1_000


def _expiry_of_hold(user: User) -> Any:
    return TokenUsage.objects.get(user=user, reserved_tokens=5_000).expires_at


def _payment_of(purchase: Purchase) -> str:
    purchase.refresh_from_db()
    return str(purchase.stripe_payment_intent_id)


@pytest.fixture
def small_backup(alice: User, media: Path, tmp_path: Path) -> Path:
    return write_backup(tmp_path / "backups")


def _damage(path: Path) -> None:
    content = bytearray(path.read_bytes())
    with tarfile.open(path) as archive:
        place = archive.getmember(backup.DUMP)
        content[place.offset_data + place.size // 2] ^= 1
    path.write_bytes(content)


def _cut_off(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])


def _make_newer(path: Path) -> None:
    with tarfile.open(path) as archive:
        parts = {member.name: archive.extractfile(member).read() for member in archive}  # type: ignore[union-attr]
    manifest = json.loads(parts[backup.MANIFEST])
    manifest["migrations"].append("billing.9999_of_tomorrow")
    parts[backup.MANIFEST] = json.dumps(manifest).encode()
    with tarfile.open(path, "w") as archive:
        for name, content in parts.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, BytesIO(content))


def test_a_bad_file_writes_nothing(small_backup: Path, tmp_path: Path, empty_database: str, manage: Manage) -> None:
    for spoil, message in (
        (_damage, "is damaged"),
        (_cut_off, "is no whole backup"),
        (_make_newer, "billing.9999_of_tomorrow"),
    ):
        bad = tmp_path / f"{spoil.__name__}.tar"
        shutil.copy(small_backup, bad)
        spoil(bad)
        code, _, stderr = manage("restore", str(bad))
        assert code == 1
        assert message in stderr
    with psycopg.connect(empty_database) as there:
        assert there.execute("SELECT count(*) FROM pg_tables WHERE schemaname = 'public'").fetchone() == (0,)
    assert not (tmp_path / "restored-media").exists()


def test_old_backups_go_and_a_failed_one_leaves_nothing(
    alice: User, media: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "backups"
    folder.mkdir()
    for day in ("01", "02", "03"):
        (folder / f"postmate-202611{day}T000000Z.tar").touch()
    call_command("backup", "--to", str(folder), "--keep", "2", stdout=StringIO())
    kept = backup.list_backups(folder)
    assert len(kept) == 2
    assert kept[0].name == "postmate-20261103T000000Z.tar"

    monkeypatch.setenv("PGOPTIONS", "-c no_such_setting=1")  # pg_dump cannot connect
    with pytest.raises(CommandError, match="pg_dump failed"):
        call_command("backup", "--to", str(folder))
    assert sorted(folder.iterdir()) == kept


# --- Every night ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("newest", "now", "is_due"),
    [
        (None, "21T13:00", True),  # a new installation
        ("21T02:07", "21T13:00", False),
        ("20T02:07", "21T02:06", False),
        ("20T02:07", "21T02:08", True),
        ("19T23:00", "20T13:00", True),  # it was not running at night
        ("20T13:00", "21T02:08", True),  # one by hand is no substitute for the next night's
    ],
)
def test_a_nightly_backup_is_due_once_after_its_time(
    tmp_path: Path, newest: str | None, now: str, is_due: bool
) -> None:
    def moment(text: str) -> datetime:
        return datetime.fromisoformat(f"2026-11-{text}:00+00:00")

    for day in ("18T02:07", newest) if newest else ():
        file = tmp_path / f"postmate-202611{day[:2]}T{day[3:5]}{day[6:]}00Z.tar"
        file.touch()
        os.utime(file, (moment(day).timestamp(),) * 2)
    assert backup.is_due(tmp_path, at=time(2, 7), now=moment(now)) == is_due


def test_the_service_makes_one_by_itself_and_ends_when_it_is_told(alice: User, tmp_path: Path) -> None:
    command = [sys.executable, "manage.py", "backup", "--to", str(tmp_path), "--keep", "2", "--every-night", "02:07"]
    environment = {**os.environ, "DATABASE_URL": _test_database_url()}
    process = subprocess.Popen(command, cwd=PROJECT, env=environment, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout
        assert "ledger entries" in process.stdout.readline()
        [made] = backup.list_backups(tmp_path)
        assert backup.read_manifest(made).rows["billing_tokenaccount"] == 1
        process.terminate()
        assert process.wait(20) == 0
        assert backup.list_backups(tmp_path) == [made]
    finally:
        process.kill()
        process.wait()
