"""Making an API key, using it, revoking it."""

import pytest
from playwright.sync_api import Page, expect

from accounts.models import User
from tests.conftest import PASSWORD
from tests.journeys.conftest import OpenContext, shoot, sign_in
from tests.servers import Server


def confirm_password(page: Page) -> None:
    expect(page.get_by_role("heading", level=1)).to_have_text("Confirm that it is you")
    page.get_by_label("Password").fill(PASSWORD)
    page.get_by_role("button", name="Confirm").click()


@pytest.mark.parametrize("java_script", [True, False])
def test_key_from_making_to_revoking(alice: User, web: Server, open_context: OpenContext, java_script: bool) -> None:
    page = sign_in(open_context(java_script_enabled=java_script).new_page(), "alice", "/accounts/email/")
    page.get_by_role("link", name="API keys").click()
    expect(page.get_by_role("heading", level=1)).to_have_text("API keys")
    if java_script:
        shoot(page, "api-keys-none")

    page.get_by_label("Name").fill("My notebook")
    page.get_by_label("Packages and prices").uncheck()
    page.get_by_label("Valid for").select_option("A year")
    page.get_by_role("button", name="Make a key").click()
    confirm_password(page)
    notice = page.locator("#new-key")
    expect(notice).to_contain_text("not shown again")
    token = notice.locator("[data-token]").inner_text()
    if java_script:
        shoot(page, "api-keys-made")

    headers = {"Authorization": f"Bearer {token}"}
    answer = web.get("/api/v1/me/balance", headers=headers)
    assert (answer.status_code, answer.json()["available_tokens"]) == (200, 10_000)
    assert web.get("/api/v1/me/packages", headers=headers).status_code == 403

    page.goto("/accounts/api-keys/")
    key = page.get_by_role("list", name="Keys in use").get_by_role("listitem")
    expect(key).to_contain_text("My notebook")
    expect(key).to_contain_text("Balance, Transactions, Usage")
    expect(key).to_contain_text("last used")
    expect(page.get_by_text(token)).to_have_count(0)
    key.get_by_text("Revoke", exact=True).click()
    if java_script:
        shoot(page, "api-keys-revoke")
    key.get_by_role("button", name="Revoke My notebook").click()
    expect(page.get_by_role("region", name="Messages")).to_contain_text("My notebook is revoked")
    expect(page.get_by_role("list", name="Keys of the past")).to_contain_text("Revoked")
    assert web.get("/api/v1/me/balance", headers=headers).status_code == 401


def test_page_that_describes_the_api(alice: User, open_context: OpenContext) -> None:
    """Under the policy that forbids scripts of the page and of other hosts."""
    page = sign_in(open_context().new_page(), "alice", "/accounts/api-keys/")
    page.get_by_role("link", name="How to call the API").click()
    for path in ("/api/v1/me/transactions", "/api/v1/reservations/{usage_id}/settle"):
        expect(page.locator(f'[data-path="{path}"]')).to_be_visible()
    shoot(page, "api-docs")


def test_key_that_may_read_nothing(alice: User, open_context: OpenContext) -> None:
    """The error stands at the field, and what was filled in stays."""
    page = sign_in(open_context().new_page(), "alice", "/accounts/api-keys/")
    page.get_by_label("Name").fill("My notebook")
    for label in ("Balance", "Transactions", "Usage", "Packages and prices"):
        page.get_by_label(label, exact=True).uncheck()
    page.get_by_role("button", name="Make a key").click()
    confirm_password(page)
    expect(page.locator(".field-error")).to_contain_text("Choose at least one")
    expect(page.get_by_label("Name")).to_have_value("My notebook")
    shoot(page, "api-keys-error")
