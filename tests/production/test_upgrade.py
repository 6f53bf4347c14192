"""A database that the release before wrote is carried on by this one."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from django.core.management import call_command
from django.db import connection

from billing import ledger
from billing.models import Purchase, StripeEvent, TokenAccount, TokenUsage
from billing.payments import webhooks
from billing.pricing import TokenPools
from tests import databases
from tests.payments import verify_books
from tests.servers import StripeStandIn

RELEASES = Path(__file__).with_name("releases")
LAST_MIGRATIONS = {"0.1.0": {"accounts": "0005_limits", "ai_ops": "0002_chats_images_versions",
                             "billing": "0009_refund_refused_and_a_label"}}  # fmt: skip


@pytest.fixture(params=LAST_MIGRATIONS)
def upgraded(request: pytest.FixtureRequest, django_db_setup: None, django_db_blocker: Any) -> Iterator[None]:
    """The rows of that release in tables of that release, then migrated. The hold that was open still is."""
    name = f"{connection.settings_dict['NAME']}_upgraded"
    with django_db_blocker.unblock():
        with connection._nodb_cursor() as server:
            server.execute(f'CREATE DATABASE "{name}"')
        try:
            with databases.connected_to(name):
                for app, migration in LAST_MIGRATIONS[request.param].items():
                    call_command("migrate", app, migration, verbosity=0)
                with connection.cursor() as cursor:
                    cursor.execute("SET session_replication_role = replica")  # rows as they are, without triggers
                    cursor.execute((RELEASES / f"{request.param}.sql").read_text())
                    cursor.execute("RESET session_replication_role; SET search_path TO DEFAULT")
                    cursor.execute("UPDATE billing_tokenusage SET expires_at = now() + interval '1 hour' "
                                   "WHERE status = 'reserved'")  # fmt: skip
                call_command("migrate", verbosity=0)
                yield
        finally:
            with connection._nodb_cursor() as server:
                server.execute(f'DROP DATABASE "{name}" WITH (FORCE)')


def test_what_the_release_before_had_begun_is_finished_by_this_one(upgraded: None, stripe: StripeStandIn) -> None:
    verify_books()
    running = TokenUsage.objects.get(status=TokenUsage.Status.RESERVED)
    before = TokenAccount.objects.get(pk=running.account_id)
    posting = ledger.settle_usage(usage_id=running.pk, pools=TokenPools(input_tokens=100, output_tokens=300))
    assert (posting.amount_tokens, posting.reserved_tokens) == (-600, 0)
    assert posting.balance_tokens == before.balance - 600

    event = webhooks.handle_again(StripeEvent.objects.get(state=StripeEvent.State.FAILED))
    assert event.state == StripeEvent.State.PROCESSED
    assert set(Purchase.objects.values_list("state", flat=True)) == {Purchase.State.PAID}
    assert TokenAccount.objects.get(pk=before.pk).balance == posting.balance_tokens + 150_000
    verify_books()
