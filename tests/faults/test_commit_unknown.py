"""The connection is lost at the commit. Row 75 of FAULTS.md, over HTTP, with a proxy before the real PostgreSQL."""

import json
from collections.abc import Iterator
from typing import Any

import httpx2
import pytest
from django.test import Client

from accounts.models import User
from billing import ledger
from billing.models import TokenAccount, TokenTransaction, TokenUsage
from tests import servers
from tests.environment import BILLING_SECRET, free_port
from tests.faults import proxy as proxies
from tests.faults.proxy import Proxy, When
from tests.payments import BONUS_TOKENS, ONE_STARTER, buy, credits_of, event_of, purchase_state, sign, verify_books
from tests.servers import Server, StripeStandIn

pytestmark = pytest.mark.django_db(transaction=True)

# In the one statement that does the work, and in no other.
WRITES_USAGE = b"INSERT INTO billing_tokenusage"
CLOSES_HOLD = b"FOR UPDATE OF usage"

lost = pytest.mark.parametrize("when", ["before", "after"])


@pytest.fixture(scope="module")
def behind_proxy(django_db_setup: None, django_db_blocker: Any) -> Iterator[tuple[Server, Proxy]]:
    with django_db_blocker.unblock(), proxies.running() as proxy:
        port, url = free_port(), proxy.database_url
        with servers.running_web(port=port, DATABASE_URL=url) as web:
            yield web, proxy


@pytest.fixture
def web(transactional_db: None, behind_proxy: tuple[Server, Proxy]) -> Server:
    return behind_proxy[0]


@pytest.fixture
def proxy(behind_proxy: tuple[Server, Proxy]) -> Proxy:
    proxy = behind_proxy[1]
    proxy.cuts = 0
    return proxy


def call(web: Server, path: str, body: dict[str, Any], *, key: str = "one") -> httpx2.Response:
    headers = {"authorization": f"Bearer {BILLING_SECRET}", "idempotency-key": key}
    return web.post(f"/api/v1/{path}", json=body, headers=headers, timeout=30)


def usage_of(user: User) -> dict[str, Any]:
    pools = {"input_tokens": 1_000, "output_tokens": 500}
    return {"user_id": user.pk, "operation_type": "chat", "provider": "openai", "model": "gpt-6-luna"} | pools


def hold_of(user: User) -> dict[str, Any]:
    about = {"user_id": user.pk, "operation_type": "chat", "provider": "openai", "model": "gpt-6-luna"}
    return about | {"input_tokens": 1_000, "max_output_tokens": 500}


def is_clean_refusal(answer: httpx2.Response) -> bool:
    return (
        answer.status_code == 503
        and answer.json()["code"] == "unavailable"
        and answer.headers["content-type"] == "application/problem+json"
        and int(answer.headers["retry-after"]) > 0
    )


@lost
def test_debit(alice: User, web: Server, proxy: Proxy, when: When) -> None:
    """Row 75: committed, it is re-read under its key; not committed, it is refused; the repetition settles it."""
    proxy.cut(WRITES_USAGE, when)
    first = call(web, "usage", usage_of(alice))
    assert proxy.cuts == 1
    if when == "after":
        assert first.json()["usage"]["billable_tokens"] == 2_250
    else:
        assert is_clean_refusal(first)
    assert TokenUsage.objects.filter(user=alice).count() == (when == "after")
    again = call(web, "usage", usage_of(alice))
    assert again.status_code == (200 if when == "after" else 201)
    assert TokenTransaction.objects.filter(user=alice, type="usage").count() == 1
    assert again.json()["account"]["balance_tokens"] == BONUS_TOKENS - 2_250
    verify_books()


def test_without_the_key_it_would_be_charged_twice(alice: User, web: Server, proxy: Proxy) -> None:
    """Control of row 75: the lost answer is of something that is done."""
    proxy.cut(WRITES_USAGE, "after")
    call(web, "usage", usage_of(alice))
    call(web, "usage", usage_of(alice), key="another")
    assert TokenTransaction.objects.filter(user=alice, type="usage").count() == 2


@lost
def test_reservation(alice: User, web: Server, proxy: Proxy, when: When) -> None:
    """Row 75: one hold, however often it is asked for."""
    proxy.cut(WRITES_USAGE, when)
    first = call(web, "reservations", hold_of(alice))
    assert proxy.cuts == 1
    assert first.json()["usage"]["status"] == "reserved" if when == "after" else is_clean_refusal(first)
    assert call(web, "reservations", hold_of(alice)).json()["usage"]["status"] == "reserved"
    account = TokenAccount.objects.get(user=alice)
    assert (account.balance, account.reserved) == (BONUS_TOKENS, 2_250)
    verify_books()


@lost
def test_settlement(alice: User, web: Server, proxy: Proxy, when: When) -> None:
    """Row 75: charged once, and the answer tells the charge."""
    usage_id = call(web, "reservations", hold_of(alice)).json()["usage"]["usage_id"]
    used = {"input_tokens": 1_000, "output_tokens": 100}
    proxy.cut(CLOSES_HOLD, when)
    first = call(web, f"reservations/{usage_id}/settle", used)
    assert proxy.cuts == 1
    assert first.json()["usage"]["billable_tokens"] == 1_650 if when == "after" else is_clean_refusal(first)
    assert call(web, f"reservations/{usage_id}/settle", used).json()["usage"]["billable_tokens"] == 1_650
    account = TokenAccount.objects.get(user=alice)
    assert (account.balance, account.reserved) == (BONUS_TOKENS - 1_650, 0)
    verify_books()


@lost
def test_release(alice: User, web: Server, proxy: Proxy, when: When) -> None:
    """Row 75: given back once."""
    usage_id = call(web, "reservations", hold_of(alice)).json()["usage"]["usage_id"]
    proxy.cut(CLOSES_HOLD, when)
    first = call(web, f"reservations/{usage_id}/release", {})
    assert proxy.cuts == 1
    assert first.json()["usage"]["status"] == "failed" if when == "after" else is_clean_refusal(first)
    assert call(web, f"reservations/{usage_id}/release", {}).json()["usage"]["status"] == "failed"
    assert TokenAccount.objects.get(user=alice).reserved == 0
    verify_books()


@lost
def test_credit_of_a_purchase(
    alice: User, buyer: Client, stripe: StripeStandIn, events_wait: None, web: Server, proxy: Proxy, when: When
) -> None:
    """Row 75: Stripe is told to send its event again, and finds it done or has it done."""
    purchase = buy(stripe, buyer)
    payload = json.dumps(event_of(stripe, "checkout.session.completed")).encode()

    def deliver() -> httpx2.Response:
        headers = {"stripe-signature": sign(payload), "content-type": "application/json"}
        return web.post("/stripe/webhook/", content=payload, headers=headers, timeout=30)

    proxy.cut(b"COMMIT", when)
    first = deliver()
    assert proxy.cuts == 1
    assert first.status_code == 503
    assert purchase_state(purchase) == ("paid" if when == "after" else "open")
    assert deliver().status_code == 200
    assert deliver().status_code == 200
    assert purchase_state(purchase) == "paid"
    assert credits_of(alice) == ONE_STARTER
    assert ledger.get_account(user_id=alice.pk).lifetime_spent_cents == 1_500
    verify_books()
