"""/tokens/ at a glance: what there is, how long it lasts, what a package is worth, what an amount buys."""

import re
from decimal import Decimal

import pytest
from playwright.sync_api import Page, expect

from accounts.models import User
from billing import ledger
from billing.models import Purchase, TokenUsage
from billing.pricing import TokenPools
from tests.journeys.conftest import OpenContext, shoot, sign_in
from tests.servers import StripeStandIn


def use(user: User, operation_type: str, tokens: int, *, times: int = 3) -> None:
    for _ in range(times):
        ledger.deduct_tokens(
            user_id=user.pk,
            tokens=tokens,
            operation=ledger.Operation(operation_type, "openai", "gpt-6-luna", multiplier=Decimal(1)),
            pools=TokenPools(input_tokens=tokens),
        )


def test_overview_and_what_a_package_is_worth(alice: User, page: Page) -> None:
    sign_in(page, "alice", "/tokens/")
    expect(page.get_by_text("Nothing used in 30 days")).to_be_visible()
    expect(page.get_by_text("from typical costs, until there are averages of your own")).to_be_visible()
    shoot(page, "tokens-fresh")

    use(alice, "generation", 1_500)
    use(alice, "chat", 500)
    page.reload()
    expect(page.locator(".overview-balance")).to_contain_text("4,000")
    expect(page.locator(".figures")).to_contain_text("at your pace: 6,000 tokens a day in the last 1 day")
    starter = page.locator(".package").filter(has_text="Starter")
    expect(starter.locator(".package-worth")).to_have_text(
        re.compile(r"Enough for about\s+100\s+drafts,\s+300\s+chat answers\s+or\s+\d+\s+images")
    )
    assert TokenUsage.objects.count() == 6
    shoot(page, "tokens-used")


@pytest.mark.parametrize("scripts", [True, False])
def test_own_amount(alice: User, open_context: OpenContext, stripe: StripeStandIn, scripts: bool) -> None:
    page = sign_in(open_context(java_script_enabled=scripts).new_page(), "alice", "/tokens/")
    amount = page.get_by_label("Amount in US dollars")
    if scripts:
        amount.press_sequentially("4.99")
        expect(page.get_by_text("The amount must be between $5.00 and")).to_be_visible()
        amount.fill("12.50")
        expect(page.locator(".custom-amount")).to_contain_text("125,000 tokens")
        shoot(page, "tokens-own-amount")
    amount.fill("12.50")
    page.locator(".custom-amount").get_by_role("button", name="Buy tokens").click()
    page.wait_for_url(re.compile("/pay/|checkout"))
    purchase = Purchase.objects.get()
    assert (purchase.tokens, purchase.amount_cents) == (125_000, 1_250)
