"""Redis gone, and Redis that hangs. Row 73 of FAULTS.md: no process of the product is restarted."""

import json
from collections.abc import Iterator
from typing import Any

import pytest
import redis
from playwright.sync_api import Browser, Page, expect

from billing.announcements import BALANCE_CHANNEL
from billing.demo import DEMO_PASSWORD
from tests.faults.pair import Pair, until
from tests.faults.people import USER, Person, call, new_key, usage_of
from tests.payments import sign

SUPERADMIN = "superadmin@postmate.example"


@pytest.fixture
def user_id(pair: Pair) -> int:
    (user,) = pair.postgres.ask("SELECT id FROM accounts_user WHERE email = %s", USER)
    # The guesses of other tests are not counted here.
    pair.postgres.ask("DELETE FROM accounts_limit")
    return int(user["id"])


def balance_of(pair: Pair, user_id: int) -> int:
    (account,) = pair.postgres.ask("SELECT balance FROM billing_tokenaccount WHERE user_id = %s", user_id)
    return int(account["balance"])


@pytest.fixture
def gone(pair: Pair) -> Iterator[None]:
    """Redis is killed; after the test it is back, empty."""
    pair.redis.kill()
    yield
    if pair.redis.process is None:
        pair.redis.start()


@pytest.fixture
def hanging(pair: Pair) -> Iterator[None]:
    pair.redis.hang()
    yield
    pair.redis.go_on()


def work_of_everyone(pair: Pair, user_id: int) -> int:
    """What people, services and Stripe do in one minute. Returns what it cost. Raises when one of them is refused."""
    person = Person(pair.live)
    assert person.sign_in().status_code == 302
    for path in ("/studio/", "/tokens/", "/tokens/history/", "/tokens/usage/", "/tokens/balance/", "/healthz"):
        assert person.get(path).status_code == 200, path
    before = balance_of(pair, user_id)
    assert call(pair.web, "usage", usage_of(user_id), new_key()).status_code == 201
    key = new_key()
    assert person.draft(key, title=f"Green tea {key}").status_code == 302
    cost = before - balance_of(pair, user_id)
    (draft,) = pair.postgres.ask(
        "SELECT status, billable_tokens FROM billing_tokenusage WHERE idempotency_key = %s", key
    )
    assert draft["status"] == "succeeded"
    assert cost == 3 + draft["billable_tokens"] > 3

    (package,) = pair.postgres.ask("SELECT id FROM billing_tokenpricing WHERE name = 'Starter'")
    checkout = person.post("/tokens/checkout/", package_id=package["id"], checkout_key=new_key())
    pair.stripe.pay(checkout.headers["location"])
    for event in pair.stripe.state()["events"]:
        if event["type"] == "checkout.session.completed":
            payload = json.dumps({name: event[name] for name in event if name != "deliveries"}).encode()
            headers = {"stripe-signature": sign(payload), "content-type": "application/json"}
            answer = pair.web.post("/stripe/webhook/", content=payload, headers=headers, timeout=30)
            assert answer.status_code == 200
    assert balance_of(pair, user_id) == before - cost + 150_000
    return cost


@pytest.mark.usefixtures("gone")
def test_everything_goes_on_without_it(pair: Pair, user_id: int) -> None:
    """Row 73: pages, sign-in, debits, drafts, checkouts and webhooks."""
    work_of_everyone(pair, user_id)
    # The control: it is away.
    assert pair.web.get("/readyz").json() == {"database": True, "redis": False}


@pytest.mark.usefixtures("hanging")
def test_everything_goes_on_while_it_hangs(pair: Pair, user_id: int) -> None:
    """Row 73: after one socket time-out nobody asks it for a while; many debits take no longer than one."""
    work_of_everyone(pair, user_id)
    paused_at = len(pair.logged())
    for _ in range(20):
        assert call(pair.web, "usage", usage_of(user_id), new_key()).status_code == 201
    # A line is written by whoever waited. Without the pause it would be each of them, for two seconds each.
    waited = pair.logged()[paused_at:].count("Calls of the API are not counted")
    assert waited < 5


def guess(pair: Pair, email: str, password: str) -> int:
    person = Person(pair.web)
    answer = person.sign_in(email, password)
    return 429 if "Too many failed login attempts" in answer.text else answer.status_code


@pytest.mark.usefixtures("gone")
def test_sensitive_limits_hold_without_it(pair: Pair, user_id: int) -> None:
    """Row 73: guesses at a password are counted in the database; so are password resets and checkouts."""
    assert [guess(pair, SUPERADMIN, f"wrong {number}") for number in range(7)] == [200] * 5 + [429] * 2
    assert guess(pair, SUPERADMIN, DEMO_PASSWORD) == 429
    # The control: it is this person who may not guess on, and nobody else.
    assert guess(pair, USER, DEMO_PASSWORD) == 302
    pair.postgres.ask("DELETE FROM accounts_limit")
    person = Person(pair.web)
    person.get("/accounts/password/reset/")
    resets = [person.post("/accounts/password/reset/", email=USER).status_code for _ in range(22)]
    assert resets == [302] * 20 + [429] * 2


def test_it_comes_back(pair: Pair, user_id: int, gone: None) -> None:
    """Row 73: worker and beat connect again by themselves, and do what could not be handed to them meanwhile."""
    # A hold that is over while nobody can be told to sweep.
    about = usage_of(user_id)
    about["max_output_tokens"] = about.pop("output_tokens")
    held = call(pair.web, "reservations", about, new_key()).json()["usage"]["usage_id"]
    pair.postgres.ask("UPDATE billing_tokenusage SET expires_at = clock_timestamp() WHERE id = %s", held)
    pids = {name: process.pid for name, process in pair.crew.items()}
    pair.redis.start()

    def is_expired() -> bool:
        (usage,) = pair.postgres.ask("SELECT status FROM billing_tokenusage WHERE id = %s", held)
        return usage["status"] == "expired"

    until(is_expired, seconds=60)
    assert {name: process.pid for name, process in pair.crew.items() if process.poll() is None} == pids
    until(lambda: call(pair.web, "usage", usage_of(user_id), new_key()).headers.get("RateLimit-Limit"))


# --- In a browser ---------------------------------------------------------------------------------------------------


@pytest.fixture
def page(pair: Pair, browser: Browser, user_id: int) -> Iterator[Page]:
    """The Studio, signed in. The browser's clock is ours."""
    context = browser.new_context(base_url=pair.live.url)
    page = context.new_page()
    page.clock.install()
    page.goto("/accounts/login/")
    page.locator("input[name=login]").fill(USER)
    page.locator("input[name=password]").fill(DEMO_PASSWORD)
    page.get_by_role("button", name="Sign in").click()
    page.wait_for_url("**/studio/**")
    yield page
    context.close()


def shown_balance(page: Page) -> Any:
    return expect(page.locator("#balance .balance-number"))


def debit(pair: Pair, user_id: int) -> str:
    """Another server of the platform uses tokens. Returns what the header shall show."""
    assert call(pair.web, "usage", usage_of(user_id, output_tokens=999), new_key()).status_code == 201
    return f"{balance_of(pair, user_id):,}"


def test_the_header_without_it(pair: Pair, user_id: int, page: Page) -> None:
    """Row 73: the balance is pushed; while Redis is away the page asks once a minute; then it is pushed again."""
    shown_balance(page).to_have_text(debit(pair, user_id))
    pair.redis.kill()
    shown = page.locator("#balance .balance-number").inner_text()
    expected = debit(pair, user_id)
    # The control: nobody has told the page.
    assert page.locator("#balance .balance-number").inner_text() == shown != expected
    page.clock.fast_forward(61_000)
    shown_balance(page).to_have_text(expected)
    pair.redis.start()
    with redis.Redis.from_url(pair.redis.url) as client:
        until(lambda: client.pubsub_numsub(BALANCE_CHANNEL)[0][1])
    # The process that debits may still be in its pause.
    until(lambda: "RateLimit-Limit" in call(pair.web, "usage", usage_of(user_id), new_key()).headers)
    shown_balance(page).to_have_text(debit(pair, user_id))
