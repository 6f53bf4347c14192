"""Auto-recharge as its owner sees it, over Stripe's page for the card and the bank's page."""

from decimal import Decimal

import pytest
from playwright.sync_api import Page, expect

from accounts.models import User
from billing import ledger, tasks
from billing.models import Purchase, TokenAccount
from billing.pricing import TokenPools
from tests.journeys.conftest import OpenContext, shoot, sign_in
from tests.journeys.test_api_keys import confirm_password
from tests.journeys.test_buying import buy_starter, expect_paid, pay


def spend_all(user: User) -> None:
    tokens = TokenAccount.objects.get(user=user).available - 500
    ledger.deduct_tokens(
        user_id=user.pk,
        tokens=tokens,
        operation=ledger.Operation("chat", "openai", "gpt-6-luna", multiplier=Decimal(1)),
        pools=TokenPools(input_tokens=tokens),
    )


def panel_of(page: Page) -> Page:
    page.goto("/tokens/")
    return page


def buy_with(page: Page, number: str) -> None:
    buy_starter(page)
    pay(page, number)
    if number.endswith("3184"):
        page.get_by_role("button", name="Complete").click()
    expect_paid(page)
    tasks.remember_card(Purchase.objects.get(kind="checkout").pk)


@pytest.mark.parametrize("scripts", [True, False])
def test_switched_on_and_recharged(alice: User, open_context: OpenContext, scripts: bool) -> None:
    page = sign_in(open_context(java_script_enabled=scripts).new_page(), "alice")
    panel_of(page)
    expect(page.locator("#auto-recharge")).to_contain_text("There is no saved card yet")
    shoot(page, f"recharge-no-card-{scripts}")
    buy_with(page, "4242 4242 4242 4242")
    panel_of(page)
    expect(page.locator("#auto-recharge")).to_contain_text("Visa ending 4242")
    page.get_by_label("Buy tokens automatically").check()
    page.get_by_label("When fewer tokens than this are available").fill("150001")
    page.get_by_label("Most to spend in a month").fill("3")
    page.get_by_role("button", name="Save", exact=True).click()
    expect(page.get_by_text("the threshold cannot be above that")).to_be_visible()
    expect(page.get_by_text("with a lower limit it is never bought")).to_be_visible()
    shoot(page, f"recharge-errors-{scripts}")
    page.get_by_label("When fewer tokens than this are available").fill("2000")
    page.get_by_label("Most to spend in a month").fill("40")
    page.get_by_role("button", name="Save", exact=True).click()
    confirm_password(page)
    expect(page.get_by_text("Saved. Auto-recharge is on: 150,000 tokens for $15.00.")).to_be_visible()
    shoot(page, f"recharge-on-{scripts}")
    spend_all(alice)
    tasks.auto_recharge(alice.pk)
    panel_of(page)
    expect(page.locator("#auto-recharge tbody tr")).to_contain_text("Paid")

    page.get_by_role("button", name="Change or remove card").click()
    page.wait_for_url("**/p/session/**")


def test_the_bank_wants_to_see_the_owner(alice: User, page: Page) -> None:
    """35"""
    sign_in(page, "alice")
    buy_with(page, "4000 0027 6000 3184")
    panel_of(page)
    page.get_by_label("Buy tokens automatically").check()
    page.get_by_role("button", name="Save", exact=True).click()
    confirm_password(page)
    spend_all(alice)
    tasks.auto_recharge(alice.pk)
    panel_of(page)
    shoot(page, "recharge-needs-confirmation")
    page.get_by_role("link", name="Confirm the payment").click()
    shoot(page, "recharge-confirm")
    page.get_by_role("button", name="Confirm with your bank").click()
    page.get_by_role("button", name="Complete").click()
    expect(page.get_by_role("heading", name="150,000 tokens were added")).to_be_visible()


def test_a_card_that_is_declined(alice: User, page: Page) -> None:
    """34"""
    sign_in(page, "alice")
    buy_with(page, "4000 0000 0000 0341")
    panel_of(page)
    page.get_by_label("Buy tokens automatically").check()
    page.get_by_role("button", name="Save", exact=True).click()
    confirm_password(page)
    spend_all(alice)
    tasks.auto_recharge(alice.pk)
    panel_of(page)
    expect(page.locator("#auto-recharge")).to_contain_text("The last recharge failed.")
    shoot(page, "recharge-failed")
    for _ in range(2):
        TokenAccount.objects.update(auto_recharge_retry_at=None)
        tasks.auto_recharge(alice.pk)
    panel_of(page)
    expect(page.locator("#auto-recharge")).to_contain_text("Auto-recharge was switched off.")
    shoot(page, "recharge-switched-off")
