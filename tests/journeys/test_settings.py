"""The settings: one page after the other, with scripts and without."""

import io
import json
import time
import zipfile

import pytest
from allauth.account.models import EmailAddress
from allauth.mfa.totp.internal.auth import format_hotp_value, hotp_value, yield_hotp_counters_from_time
from playwright.sync_api import Page, expect

from accounts.models import User
from billing.models import TokenAccount
from tests.conftest import PASSWORD
from tests.journeys.conftest import OpenContext, shoot, sign_in

PAGES = {
    "Profile": "Profile and region",
    "Email": "Email Addresses",
    "Password": "Change Password",
    "Two-factor": "Two-factor authentication",
    "Sessions": "Sessions",
    "Notifications": "Notifications",
    "API keys": "API keys",
    "Your data": "Your data",
}


def confirm_password(page: Page) -> None:
    page.get_by_label("Password").fill(PASSWORD)
    page.get_by_role("button", name="Confirm").click()


def test_every_settings_page_is_in_the_list(alice: User, page: Page) -> None:
    sign_in(page, "alice")
    page.locator("details.menu summary").click()
    page.get_by_role("link", name="Settings", exact=True).click()
    navigation = page.get_by_role("navigation", name="Settings")
    for link, heading in PAGES.items():
        navigation.get_by_role("link", name=link, exact=True).click()
        expect(page.get_by_role("heading", level=1)).to_contain_text(heading)
        expect(navigation.locator("[aria-current=page]")).to_have_text(link)
        shoot(page, f"settings-{link.lower().replace(' ', '-')}")


@pytest.mark.parametrize("with_scripts", [True, False])
def test_time_zone_and_name(alice: User, open_context: OpenContext, with_scripts: bool) -> None:
    page = open_context(java_script_enabled=with_scripts, timezone_id="Asia/Tokyo").new_page()
    sign_in(page, "alice", "/accounts/settings/")
    page.goto("/accounts/settings/")  # the browser's zone is known from the second page on
    expect(page.locator("main")).to_contain_text("(Asia/Tokyo)" if with_scripts else "(UTC)")
    page.get_by_label("Name").fill("Alice Liddell")
    page.get_by_label("Time zone").select_option("America/New_York")
    page.get_by_role("button", name="Save").click()
    expect(page.locator("[data-message=ok]")).to_contain_text("saved")
    expect(page.locator("main")).to_contain_text("(America/New_York)")
    alice.refresh_from_db()
    assert (alice.name, alice.time_zone) == ("Alice Liddell", "America/New_York")

    page.goto("/accounts/sessions/")
    moment = page.locator("main time").first
    title = moment.get_attribute("title") or ""
    assert any(zone in title for zone in ("EST", "EDT", "GMT-4", "GMT-5")), title


def test_other_sessions_are_ended(alice: User, open_context: OpenContext) -> None:
    here, there = open_context().new_page(), open_context().new_page()
    sign_in(there, "alice")
    sign_in(here, "alice", "/accounts/sessions/")
    expect(here.locator(".session")).to_have_count(2)
    expect(here.locator(".session").filter(has_text="This one")).to_have_count(1)
    shoot(here, "settings-two-sessions")
    here.get_by_role("button", name="Sign out the others").click()
    expect(here.locator(".session")).to_have_count(1)
    there.goto("/tokens/")
    there.wait_for_url("**/accounts/login/**")


def test_data_is_downloaded(alice: User, page: Page) -> None:
    sign_in(page, "alice", "/accounts/data/")
    page.get_by_role("link", name="Download my data").click()
    shoot(page, "settings-confirm-password")
    confirm_password(page)
    expect(page.get_by_role("heading", level=1)).to_have_text("Download my data")
    shoot(page, "settings-download")
    with page.expect_download() as download:
        page.get_by_role("button", name="Download the ZIP").click()
    archive = zipfile.ZipFile(io.BytesIO(download.value.path().read_bytes()))
    assert json.loads(archive.read("profile.json"))["email"] == "alice@example.com"
    assert [row["amount"] for row in json.loads(archive.read("ledger.json"))] == [10_000]


@pytest.mark.parametrize("with_scripts", [True, False])
def test_account_is_anonymised(alice: User, open_context: OpenContext, with_scripts: bool) -> None:
    """Row 70."""
    page = open_context(java_script_enabled=with_scripts).new_page()
    sign_in(page, "alice", "/accounts/data/")
    page.get_by_role("link", name="Anonymise my account").click()
    confirm_password(page)
    expect(page.get_by_role("heading", level=1)).to_have_text("Anonymise my account")
    expect(page.locator("main")).to_contain_text("The 10,000 tokens you have left are lost")
    if with_scripts:
        shoot(page, "settings-anonymise")
    page.get_by_label("Type “anonymise me”").fill("yes")
    page.get_by_role("button", name="Anonymise my account for ever").click()
    expect(page.locator(".field-error")).to_contain_text("That is not it")
    if with_scripts:
        shoot(page, "settings-anonymise-error")
    page.get_by_label("Type “anonymise me”").fill("Anonymise me")
    page.get_by_role("button", name="Anonymise my account for ever").click()
    expect(page.locator("[data-message=ok]")).to_contain_text("Your account is anonymised")
    expect(page.get_by_role("link", name="Sign in")).to_be_visible()

    assert not User.objects.filter(email="alice@example.com").exists()
    assert TokenAccount.objects.get(user=alice).status == TokenAccount.Status.BLOCKED
    page.goto("/accounts/login/")
    page.get_by_label("Email").fill("alice@example.com")
    page.get_by_label("Password").fill(PASSWORD)
    page.get_by_role("button", name="Sign in", exact=True).click()
    expect(page.get_by_role("alert")).to_contain_text("not correct")


def test_two_factor_is_set_up(alice: User, page: Page) -> None:
    EmailAddress.objects.create(user=alice, email=alice.email, verified=True, primary=True)
    sign_in(page, "alice", "/accounts/2fa/")
    page.get_by_role("link", name="Set up an app").click()
    confirm_password(page)
    secret = page.get_by_label("Authenticator secret").input_value()
    shoot(page, "settings-two-factor-set-up")
    page.get_by_label("Authenticator code").fill("000000")
    page.get_by_role("button", name="Activate").click()
    expect(page.locator(".field-error")).to_be_visible()
    while time.time() % 30 > 15:  # a code is good for half a minute, and no longer
        page.wait_for_timeout(500)
    page.get_by_label("Authenticator code").fill(
        format_hotp_value(hotp_value(secret, next(yield_hotp_counters_from_time())))
    )
    page.get_by_role("button", name="Activate").click()
    expect(page.get_by_role("heading", level=1)).to_contain_text("Recovery Codes")
    shoot(page, "settings-recovery-codes")
    page.goto("/accounts/2fa/")
    expect(page.locator("main")).to_contain_text("10 of 10 codes are unused")
    expect(page.locator("main time")).to_have_count(1)
    shoot(page, "settings-two-factor-on")
