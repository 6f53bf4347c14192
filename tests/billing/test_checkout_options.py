"""Custom amounts, currencies, the options of the payment page, and receipts."""

from decimal import Decimal
from typing import Any

import pytest
from django.test import Client
from django.urls import reverse
from pytest_django.fixtures import Settings

from accounts.models import User
from billing import ledger, packages, purchases, system_settings, tasks
from billing.models import Notification, Purchase, TokenAccount, TokenPricing
from tests.payments import begin_checkout, checkout_form, deliver, verify_books
from tests.servers import StripeStandIn

pytestmark = [pytest.mark.django_db, pytest.mark.usefixtures("events_wait")]


def amount_form(amount: str, key: str = "amount-form-1") -> dict[str, str]:
    return {"amount": amount, "checkout_key": key}


def deliver_all(stripe: StripeStandIn) -> None:
    """Every event of the stand-in, oldest first, as Stripe sends them."""
    for event in reversed(stripe.state()["events"]):
        assert deliver({name: event[name] for name in event if name != "deliveries"}).status_code == 200


def pay(stripe: StripeStandIn, purchase: Purchase) -> None:
    assert stripe.pay(purchase.checkout_url).status_code == 303
    deliver_all(stripe)
    purchase.refresh_from_db()
    verify_books()


def test_custom_amount_buys_at_the_exchange_rate(
    buyer: Client, stripe: StripeStandIn, alice: User, susan: User
) -> None:
    system_settings.update_system_settings(changes={"tokens_per_usd": Decimal("9999.9")}, changed_by_id=susan.pk)
    purchase = begin_checkout(buyer, amount_form("25.55"))
    # The rate that applied when the checkout was opened is the one that counts (law 11).
    system_settings.update_system_settings(changes={"tokens_per_usd": Decimal(1)}, changed_by_id=susan.pk)
    pay(stripe, purchase)
    assert purchase.state == "paid"
    assert (purchase.tokens, purchase.amount_cents, purchase.currency) == (255_497, 2_555, "usd")
    assert ledger.get_account(user_id=alice.pk).balance == 10_000 + 255_497


def test_custom_amount_sent_twice_opens_one_checkout(buyer: Client, stripe: StripeStandIn) -> None:
    first, second = begin_checkout(buyer, amount_form("25")), begin_checkout(buyer, amount_form("25"))
    assert first == second
    assert len(stripe.state()["sessions"]) == 1
    assert buyer.post(reverse("tokens:checkout"), amount_form("26")).status_code == 302  # back, with a message
    assert Purchase.objects.count() == 1


@pytest.mark.parametrize(
    "amount", ["4.99", "10000.01", "-5", "0", "1.999", "NaN", "Infinity", "1e400", "２５", "true", "ten", "\0", ""]
)
def test_amounts_that_are_not_sold(buyer: Client, amount: str) -> None:
    """56: said at the field, nothing typed is lost, nothing is written."""
    answer = buyer.post(reverse("tokens:checkout"), amount_form(amount))
    assert answer.status_code == 400
    assert "field-error" in answer.content.decode()
    if amount == "4.99":
        assert 'value="4.99"' in answer.content.decode()
    assert not Purchase.objects.exists()


def test_other_currency(buyer: Client, stripe: StripeStandIn) -> None:
    """Sold in euros where the package has a price in euros, and only then."""
    starter, pro = TokenPricing.objects.order_by("sort_order")[:2]
    packages.update_package(starter.pk, price_eur_cents=1_400)
    page = buyer.get(reverse("tokens:home"), {"currency": "eur"}).content.decode()
    assert "€14.00" in page
    assert page.count('class="package-price"') == 1
    purchase = begin_checkout(buyer, checkout_form(package_id=str(starter.pk), currency="eur"))
    assert (purchase.amount_cents, purchase.currency) == (1_400, "eur")
    assert stripe.state()["sessions"][0]["currency"] == "eur"
    pay(stripe, purchase)
    assert purchase.state == "paid"
    account = TokenAccount.objects.get()
    assert (account.currency, account.lifetime_spent_cents) == ("eur", 1_400)
    refused = buyer.post(
        reverse("tokens:checkout"), checkout_form(package_id=str(pro.pk), currency="eur", checkout_key="another-form"),
    )  # fmt: skip
    assert refused.status_code == 302
    assert Purchase.objects.count() == 1


def test_the_first_payment_fixes_the_currency(buyer: Client, stripe: StripeStandIn) -> None:
    """What was spent in all is one number, in one currency."""
    starter = TokenPricing.objects.order_by("sort_order")[0]
    packages.update_package(starter.pk, price_eur_cents=1_400)
    pay(stripe, begin_checkout(buyer, checkout_form(package_id=str(starter.pk), currency="eur")))
    page = buyer.get(reverse("tokens:home"), {"currency": "usd"}).content.decode()
    assert "€14.00" in page
    assert "$15.00" not in page
    assert "Another amount" not in page
    for form in (
        checkout_form(package_id=str(starter.pk), currency="usd", checkout_key="in-dollars"),
        checkout_form(amount="25", package_id="", checkout_key="an-amount-in-dollars"),
    ):
        answer = buyer.post(reverse("tokens:checkout"), form, follow=True)
        assert "It was fixed by your first payment" in answer.content.decode()
    assert Purchase.objects.count() == 1


def test_two_tabs_in_two_currencies(
    buyer: Client, stripe: StripeStandIn, alice: User, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other tab buys after this one's currency was accepted and before its purchase is there: one is opened."""
    packages.update_package(TokenPricing.objects.get(name="Starter").pk, price_eur_cents=1_400)
    other_tab, open_purchase = Client(), purchases._open_purchase
    other_tab.force_login(alice)

    def open_after_the_other_tab(*arguments: Any) -> Any:
        monkeypatch.setattr(purchases, "_open_purchase", open_purchase)
        begin_checkout(other_tab, checkout_form("Pro", currency="usd"))
        return open_purchase(*arguments)

    monkeypatch.setattr(purchases, "_open_purchase", open_after_the_other_tab)
    answer = buyer.post(reverse("tokens:checkout"), checkout_form(currency="eur"), follow=True)
    assert "Your currency was changed in another window." in answer.content.decode()
    assert Purchase.objects.get().currency == TokenAccount.objects.get().currency == "usd"


def test_changed_price_closes_the_page_that_was_open(buyer: Client, stripe: StripeStandIn) -> None:
    """The old page cannot be paid by mistake beside the new one."""
    starter = TokenPricing.objects.order_by("sort_order")[0]
    old = begin_checkout(buyer, checkout_form(package_id=str(starter.pk)))
    packages.update_package(starter.pk, price_usd_cents=1_600)
    new = begin_checkout(buyer, checkout_form(package_id=str(starter.pk), checkout_key="a-later-form"))
    old.refresh_from_db()
    assert (old.state, new.state, new.amount_cents) == ("expired", "open", 1_600)
    assert stripe.pay(old.checkout_url).status_code == 409
    pay(stripe, new)
    assert new.state == "paid"


def test_closed_pages_fix_no_currency(buyer: Client, stripe: StripeStandIn, alice: User) -> None:
    """Closed before their time, for a newer one or by hand, they are over for us, too."""
    old = begin_checkout(buyer)
    packages.update_package(old.package_id or 0, price_usd_cents=1_600)
    purchases.close_checkout(begin_checkout(buyer))
    assert list(Purchase.objects.values_list("state", flat=True)) == ["expired"] * 2
    assert purchases.why_currency_is_fixed(ledger.get_account(user_id=alice.pk)) == ""


@pytest.mark.parametrize(("code", "spent_cents", "paid"), [("SAVE20", 1_200, "$12.00"), ("FREE100", 0, "$0.00")])
def test_promotion_code_is_our_discount(
    buyer: Client,
    stripe: StripeStandIn,
    settings: Settings,
    alice: User,
    adam: User,
    client: Client,
    code: str,
    spent_cents: int,
    paid: str,
) -> None:
    """7: less is paid, or nothing, and the tokens of the package come all the same, once."""
    settings.STRIPE_PROMOTION_CODES = True
    purchase = begin_checkout(buyer, checkout_form())
    answer = stripe.post(
        purchase.checkout_url.removeprefix(stripe.url),
        data={"test_card": "4242424242424242", "promotion_code": code},
    )
    assert answer.status_code == 303
    for _ in range(2):
        deliver_all(stripe)
    purchase.refresh_from_db()
    assert purchase.state == "paid"
    account = ledger.get_account(user_id=alice.pk)
    assert (account.balance, account.lifetime_spent_cents) == (160_000, spent_cents)
    verify_books()
    # Wherever it says what was paid.
    assert f"You paid {paid}." in buyer.get(reverse("tokens:success", args=[purchase.pk])).content.decode()
    notice = Notification.objects.get(kind="purchase_confirmed")
    assert f"You paid {paid} for" in notice.body
    assert ["Paid", paid] in notice.context["facts"]
    client.force_login(adam)
    page = client.get(reverse("dashboard:purchase", args=[purchase.pk])).content.decode()
    assert f"<dd>{paid}</dd>" in page


def test_tax_and_invoices_are_asked_for(buyer: Client, stripe: StripeStandIn, settings: Settings) -> None:
    settings.STRIPE_AUTOMATIC_TAX = settings.STRIPE_INVOICES = True
    purchase = begin_checkout(buyer, checkout_form())
    (session,) = stripe.state()["sessions"]
    assert session["automatic_tax"]["enabled"]
    assert session["invoice_creation"]["enabled"]
    pay(stripe, purchase)
    assert purchase.state == "paid"


def test_receipt(buyer: Client, stripe: StripeStandIn, client: Client, bob: User) -> None:
    """63: a PDF for who paid, and for nobody else; none before it is paid."""
    purchase = begin_checkout(buyer, checkout_form())
    address = reverse("tokens:receipt", args=[purchase.pk])
    assert buyer.get(address).status_code == 404
    pay(stripe, purchase)
    receipt = buyer.get(address)
    assert (receipt.status_code, receipt["Content-Type"]) == (200, "application/pdf")
    assert receipt.content.startswith(b"%PDF-")
    tasks.remember_card(purchase.pk)  # the worker's part
    purchase.refresh_from_db()
    assert stripe.get(purchase.receipt_url.removeprefix(stripe.url)).status_code == 200
    page = buyer.get(reverse("tokens:home")).content.decode()
    assert address in page
    assert f'href="{purchase.receipt_url}"' in page
    client.force_login(bob)
    assert client.get(address).status_code == 404
