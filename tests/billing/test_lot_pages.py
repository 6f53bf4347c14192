"""Tokens with an end, where people see them."""

from datetime import timedelta

import pytest
from django.test import Client
from django.utils import timezone

from accounts import api_keys
from accounts.models import ApiKey, User
from billing import ledger
from billing.models import TokenAccount
from billing.models.lot import LotKind
from billing.upkeep import own_data
from tests.billing.ledger.test_ledger import record, reserve
from tests.billing.ledger.test_lots import end, give_lot
from tests.conftest import MakeUser

pytestmark = pytest.mark.django_db


def test_lots_are_seen_in_the_order_of_spending_and_no_more_after_their_end(
    make_user: MakeUser, susan: User, client: Client
) -> None:
    payer = make_user("payer")
    client.force_login(payer)
    plain_page = client.get("/tokens/").content.decode()
    assert "Tokens with an end" not in plain_page
    assert "end within a week" not in plain_page
    late = give_lot(payer, 700, days=30, kind=LotKind.BONUS)
    soon = give_lot(payer, 500, days=2, kind=LotKind.GRANT)
    record(payer, 120)
    reserve(payer, 30)

    page = client.get("/tokens/").content.decode()
    assert "What ends soonest is spent first; bought tokens never end." in page
    lots = page[page.index('id="lots-title"') : page.index('id="packages"')]
    assert lots.index("Grant") < lots.index("380 <") < lots.index("Bonus") < lots.index("700 <")
    assert "350 of them end within a week" in page  # the header's, without what an operation holds
    entries = page[page.index("Newest entries") :]
    assert " ".join(entries.split()).count("From grant, ends") == 1
    assert entries.count("Bonus, ends") == 1

    _, key = api_keys.make_key(user_id=payer.pk, name="Reader", scopes=[ApiKey.Scope.BALANCE_READ])
    balance = client.get("/api/v1/me/balance", headers={"Authorization": f"Bearer {key}"}).json()
    assert [(lot["kind"], lot["given_tokens"], lot["remaining_tokens"]) for lot in balance["lots"]] == [
        ("grant", 500, 380),
        ("bonus", 700, 700),
    ]
    assert balance["lots"][0]["expires_at"][:19] == soon.expires_at.isoformat()[:19]
    fields, rows = own_data.list_tables(payer)["tokens-with-an-end"]
    assert [row["tokens"] for row in rows] == [700, 500]
    assert "expires_at" in fields

    end(late)  # and nobody has booked it yet
    page = client.get("/tokens/").content.decode()
    assert "700 of them have ended" in page
    assert "700 <" not in page[page.index('id="lots-title"') : page.index('id="packages"')]
    ledger.expire_lots()
    history = client.get("/tokens/history/?type=expiry").content.decode()
    assert "Ended without being used" in history
    assert "Bonus, ended" in history

    client.force_login(susan)
    account = TokenAccount.objects.get(user=payer)
    assert account.next_lot_ends_at is not None
    assert account.next_lot_ends_at > timezone.now() + timedelta(days=1)
    shown = " ".join(client.get(f"/admin/tokens/accounts/{payer.pk}/").content.decode().split())
    assert "380 of 500 tokens left, until" in shown
