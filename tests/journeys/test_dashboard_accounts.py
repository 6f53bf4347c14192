"""Admins look people up, give them tokens, decide on requests, read the audit log and change the settings."""

from decimal import Decimal

from django.test import Client
from playwright.sync_api import Page, expect

from accounts.models import User
from billing import ledger, usage
from billing.catalogue import system_settings
from billing.models import BulkJob, TokenAccount
from billing.pricing import TokenPools
from billing.staff import accounts, bulk, grants
from tests.conftest import MakeUser
from tests.journeys.conftest import OpenContext, shoot, sign_in
from tests.payments import STARTER_TOKENS, begin_checkout, buy, deliver, event_of
from tests.servers import StripeStandIn


def balance(user: User) -> int:
    return TokenAccount.objects.get(user=user).balance


def test_finding_an_account_and_giving_tokens(
    page: Page, stripe: StripeStandIn, client: Client, alice: User, susan: User, make_user: MakeUser
) -> None:
    client.force_login(alice)
    stripe.control("deliveries/hold")
    purchase = buy(stripe, client)
    deliver(event_of(stripe, "checkout.session.completed"))
    for number in range(28):
        make_user(f"reader{number:02}", tokens=number * 997)
    blocked = make_user("a-rather-long-address-of-somebody-who-likes-long-addresses", tokens=20)
    accounts.block_account(superadmin=susan, user_id=blocked.pk, reason="Stolen cards")

    sign_in(page, "susan", "/admin/tokens/accounts/")
    page.get_by_role("link", name="Next").click()
    expect(page.get_by_role("link", name="First page")).to_be_visible()
    shoot(page, "dashboard-accounts-page-2")
    page.goto("/admin/tokens/accounts/")
    shoot(page, "dashboard-accounts")
    page.get_by_label("Email, name, id").fill("nobody@")
    expect(page.get_by_role("heading", name="No account matches")).to_be_visible()
    shoot(page, "dashboard-accounts-empty")
    page.get_by_label("Email, name, id").fill("alice")
    expect(page.get_by_role("link", name="alice@example.com")).to_be_visible()
    expect(page.get_by_role("row")).to_have_count(2)
    page.get_by_role("button", name="Look at the account of alice@example.com").click()
    drawer = page.get_by_role("dialog", name="Account")
    expect(drawer).to_contain_text(f"{10_000 + STARTER_TOKENS:,}")
    shoot(page, "dashboard-account-drawer", whole=False)
    drawer.get_by_role("button", name="Close").click()
    expect(drawer).to_be_hidden()
    page.get_by_role("button", name="Look at the account of alice@example.com").click()
    drawer.get_by_role("link", name="Open the account").click()
    expect(page.get_by_role("heading", name="alice@example.com")).to_be_visible()
    expect(page.get_by_role("link", name=f"Purchase {purchase.pk}")).to_be_visible()

    page.get_by_role("button", name="Go on").click()
    expect(page.get_by_text("This field is required.")).to_have_count(2)
    shoot(page, "dashboard-grant-refused")
    page.get_by_label("Tokens", exact=True).fill("2500")
    page.get_by_label("Reason").fill("Sorry for the outage on Monday")
    page.get_by_role("button", name="Go on").click()
    expect(page.get_by_role("heading", name="Give 2,500 tokens to alice@example.com?")).to_be_visible()
    expect(page.get_by_text(f"{10_000 + STARTER_TOKENS + 2_500:,} tokens")).to_be_visible()
    shoot(page, "dashboard-grant-confirm")
    page.get_by_role("button", name="Change it").click()
    expect(page.get_by_label("Reason")).to_have_value("Sorry for the outage on Monday")
    page.get_by_role("button", name="Go on").click()
    page.get_by_role("button", name="Give 2,500 tokens").click()
    expect(page.get_by_text("Done: 2,500 tokens for alice@example.com.")).to_be_visible()
    assert balance(alice) == 10_000 + STARTER_TOKENS + 2_500

    page.get_by_label("Suspend: nothing new").check()
    page.get_by_role("button", name="Change the status").click()
    expect(page.get_by_text("This field is required.")).to_be_visible()
    expect(page.get_by_label("Suspend: nothing new")).to_be_checked()
    page.locator("#id_status_reason").fill("Many chargebacks")
    page.get_by_role("button", name="Change the status").click()
    expect(page.get_by_text("The account of alice@example.com is now suspended.")).to_be_visible()
    shoot(page, "dashboard-account")


def test_an_admin_asks_and_a_superadmin_decides(
    open_context: OpenContext, adam: User, susan: User, alice: User, bob: User
) -> None:
    """Without scripts, as far as the admin is concerned."""
    asking = sign_in(open_context(java_script_enabled=False).new_page(), "adam", "/admin/tokens/grants/new/")
    asking.get_by_label("Whose balance?").fill("alice")
    asking.get_by_role("button", name="Search").click()
    asking.get_by_role("link", name="Choose alice@example.com").click()
    asking.get_by_label("Tokens", exact=True).fill("4000")
    asking.get_by_label("Reason").fill("First prize of <b>June</b>")
    asking.get_by_role("button", name="Go on").click()
    expect(asking.get_by_text("This becomes a request.")).to_be_visible()
    asking.get_by_role("button", name="Send the request").click()
    expect(asking.get_by_text("No token moves until a superadmin has approved it.")).to_be_visible()
    grants.grant_tokens(admin=adam, user_id=bob.pk, tokens=9_000, reason="Second prize", request_key="adams-second")

    page = sign_in(open_context().new_page(), "susan", "/admin/tokens/requests/")
    expect(page.get_by_text("First prize of <b>June</b>")).to_be_visible()
    bobs = page.get_by_role("listitem").filter(has_text="bob@example.com")
    bobs.get_by_role("button", name="Decline").click()
    expect(page.get_by_text("Enter a reason.")).to_be_visible()
    shoot(page, "dashboard-requests")
    bobs.get_by_label("Why it is declined").fill("There was one prize")
    bobs.get_by_role("button", name="Decline").click()
    expect(page.get_by_text("Declined: 9,000 tokens for bob@example.com.")).to_be_visible()
    page.get_by_role("button", name="Approve").click()
    expect(page.get_by_text("Approved and done: 4,000 tokens for alice@example.com.")).to_be_visible()
    shoot(page, "dashboard-requests-decided")
    assert (balance(alice), balance(bob)) == (14_000, 10_000)

    page.goto("/admin/tokens/audit/")
    page.get_by_label("Whose account").fill("alice")
    page.get_by_role("button", name="Search").click()
    expect(page.get_by_role("row").filter(has_text="carried out")).to_be_visible()
    expect(page.get_by_role("row")).to_have_count(3)
    shoot(page, "dashboard-audit")


def test_changing_the_settings(page: Page, open_context: OpenContext, adam: User, susan: User) -> None:
    sign_in(page, "susan", "/admin/tokens/settings/")
    page.get_by_label("Multiplier").fill("0")
    page.get_by_label("Welcome bonus", exact=True).fill("12000")
    page.get_by_role("button", name="Preview the change").click()
    expect(page.get_by_text("Ensure this value is greater than or equal to 0.0001.")).to_be_visible()
    expect(page.get_by_label("Welcome bonus", exact=True)).to_have_value("12000")
    shoot(page, "dashboard-settings-refused")
    page.get_by_label("Multiplier").fill("1.7")
    page.get_by_role("button", name="Preview the change").click()
    expect(page.get_by_role("heading", name="Preview: nothing is saved yet")).to_be_visible()
    shoot(page, "dashboard-settings-preview")
    assert system_settings.get_system_settings().welcome_bonus_tokens == 10_000
    page.get_by_role("button", name="Save these settings").click()
    expect(page.get_by_text("Saved. Operations that are running keep their prices.")).to_be_visible()
    expect(page.get_by_role("row", name="Welcome bonus")).to_be_visible()
    shoot(page, "dashboard-settings")
    assert system_settings.get_system_settings().welcome_bonus_tokens == 12_000

    looking = sign_in(open_context().new_page(), "adam", "/admin/tokens/settings/")
    expect(looking.get_by_text("Superadmins change these settings.")).to_be_visible()
    expect(looking.get_by_role("textbox")).to_have_count(0)
    shoot(looking, "dashboard-settings-admin")


def test_giving_tokens_to_many(page: Page, susan: User, alice: User, bob: User) -> None:
    sign_in(page, "susan", "/admin/tokens/accounts/?search=example")
    page.get_by_role("link", name="Grant to, suspend or export all that were found").click()
    page.get_by_label("Grant tokens").check()
    page.get_by_role("button", name="Go on").click()
    expect(page.get_by_text("Enter how many tokens each of them gets.")).to_be_visible()
    page.get_by_label("Tokens for each").fill("750")
    page.get_by_label("Reason").fill("Ten years of Postmate")
    page.get_by_role("button", name="Go on").click()
    expect(page.get_by_role("heading", name="Give 750 tokens to each of 3 accounts?")).to_be_visible()
    shoot(page, "dashboard-bulk-confirm")
    page.get_by_role("button", name="Start").click()
    expect(page.get_by_role("progressbar")).to_be_visible()
    for job in BulkJob.objects.all():
        bulk.run_bulk_job(job_id=job.pk)
    expect(page.get_by_role("heading", name="Done, 100 %")).to_be_visible()
    expect(page.get_by_role("cell", name="750 tokens granted")).to_have_count(2)
    own = page.get_by_role("row", name="susan@example.com")
    expect(own).to_contain_text("Waits for approval")
    expect(own).to_contain_text("another superadmin decides")
    shoot(page, "dashboard-bulk")
    assert (balance(alice), balance(bob)) == (10_750, 10_750)

    page.get_by_role("link", name="Done (2)").click()
    expect(own).to_have_count(0)
    page.get_by_role("link", name="All", exact=True).click()
    own.get_by_role("link", name="Request").click()
    expect(page.get_by_text("Your own request: another superadmin decides.")).to_be_visible()
    shoot(page, "dashboard-request")
    page.get_by_role("navigation", name="Dashboard").get_by_role("link", name="Bulk actions").click()
    expect(page.get_by_role("row", name="Ten years of Postmate")).to_contain_text("750 tokens for each")
    shoot(page, "dashboard-bulk-jobs")


def test_reading_all_about_an_account(
    page: Page, stripe: StripeStandIn, client: Client, adam: User, alice: User
) -> None:
    client.force_login(alice)
    stripe.control("deliveries/hold")
    buy(stripe, client)
    deliver(event_of(stripe, "checkout.session.completed"))
    begin_checkout(client)
    operation = ledger.Operation("chat", "openai", "gpt-6-luna", multiplier=Decimal(2))
    for number in range(23):
        ledger.deduct_tokens(
            user_id=alice.pk, tokens=4 + 2 * number, operation=operation, pools=TokenPools(input_tokens=2 + number)
        )
    usage.record_usage(
        user_id=alice.pk, operation_type="chat", provider="openai", model="gpt-6-luna", input_tokens=0,
        output_tokens=0, success=False, error_message="The provider is overloaded", idempotency_key="failed",
    )  # fmt: skip
    sign_in(page, "adam", f"/admin/tokens/accounts/{alice.pk}/")
    shoot(page, "dashboard-account-admin")
    operations = page.locator("#usage")
    operations.get_by_role("link", name="Next").click()
    expect(operations.get_by_role("link", name="First page")).to_be_visible()
    operations.get_by_role("link", name="Next").click()
    expect(operations.get_by_role("row")).to_have_count(1 + 4)
    page.reload()  # the address knows the page
    expect(operations.get_by_role("row")).to_have_count(1 + 4)
    operations.get_by_role("link", name="Failed").click()
    expect(operations.get_by_role("row")).to_have_count(1 + 1)
    expect(operations.get_by_role("row").nth(1)).to_contain_text("Failed")
    expect(operations.get_by_text("The provider is overloaded")).to_have_count(0)  # it may repeat a prompt
    operations.get_by_role("link", name="Running").click()
    expect(operations.get_by_text("No AI operations.")).to_be_visible()
    purchases = page.locator("#purchases")
    purchases.get_by_role("link", name="Under way").click()
    expect(purchases.get_by_role("row")).to_have_count(1 + 1)
    expect(purchases.get_by_role("row", name="Starter")).to_contain_text("Waiting for payment")
    purchases.get_by_role("link", name="Paid").click()
    expect(purchases.get_by_role("row", name="Starter")).to_contain_text("$15.00")
    expect(purchases.get_by_text("Waiting for payment")).to_have_count(0)
    purchases.get_by_role("link", name="Starter").click()
    expect(page.get_by_role("navigation", name="Dashboard").get_by_role("link", name="Accounts")).to_have_attribute(
        "aria-current", "page"
    )
    shoot(page, "dashboard-purchase-admin")
    page.get_by_role("link", name="alice@example.com").click()
    expect(page.get_by_role("heading", name="alice@example.com")).to_be_visible()
