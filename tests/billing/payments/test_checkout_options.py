"""Custom amounts, currencies, the options of the payment page, and receipts."""

from decimal import Decimal
from typing import Any

import pytest
from django.test import Client
from django.urls import reverse
from pytest_django.fixtures import Settings

from accounts.models import User
from billing import ledger, tasks
from billing.catalogue import packages, system_settings
from billing.history import receipts
from billing.models import Notification, Purchase, TokenAccount, TokenPricing
from billing.payments import checkout, purchases
from kit.pdf import Document
from tests.payments import begin_checkout, checkout_form, deliver, event_of, purchase_state, verify_books
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
    system_settings.update_system_settings(changes={"tokens_per_usd": Decimal("10000.9")}, changed_by_id=susan.pk)
    purchase = begin_checkout(buyer, amount_form("25.55"))
    # The rate that applied when the checkout was opened is the one that counts (law 11).
    system_settings.update_system_settings(changes={"tokens_per_usd": Decimal(1)}, changed_by_id=susan.pk)
    pay(stripe, purchase)
    assert purchase.state == "paid"
    assert (purchase.tokens, purchase.amount_cents, purchase.currency) == (255_522, 2_555, "usd")
    assert ledger.get_account(user_id=alice.pk).balance == 10_000 + 255_522


@pytest.mark.parametrize(
    ("amount", "currency", "tokens", "rate_of"),
    [
        ("5", "usd", 50_000, ""),
        ("64.99", "usd", 649_900, ""),
        ("65", "usd", 750_000, "Pro"),
        ("130", "usd", 1_500_000, "Pro"),
        ("175.00", "usd", 2_250_000, "Business"),
        ("500", "usd", 7_500_000, "Enterprise"),
        ("10000", "usd", 150_000_000, "Enterprise"),
        ("5", "eur", 53_571, "Starter"),  # below every package: the smallest one's rate
        ("14", "eur", 150_000, "Starter"),
        ("60", "eur", 750_000, "Pro"),
        ("99.99", "eur", 1_249_875, "Pro"),
        ("20", "gbp", None, ""),  # nothing is sold in it
    ],
)
def test_nobody_pays_more_for_less(
    buyer: Client, stripe: StripeStandIn, amount: str, currency: str, tokens: int | None, rate_of: str
) -> None:
    """An amount gets the price per token of the best package that it reaches, in each currency, and says so before."""
    TokenPricing.objects.filter(name="Starter").update(price_eur_cents=1_400)
    TokenPricing.objects.filter(name="Pro").update(price_eur_cents=6_000)
    preview = buyer.get(reverse("tokens:price"), {"amount": amount, "currency": currency}).content.decode()
    form = amount_form(amount) | {"currency": currency}
    if tokens is None:
        assert "Nothing is sold" in preview
        assert buyer.post(reverse("tokens:checkout"), form).status_code == 400
        return
    assert f"{tokens:,} tokens" in preview
    assert ("at the price per token of" in preview, rate_of in preview) == (bool(rate_of), True)
    purchase = begin_checkout(buyer, form)
    assert (purchase.tokens, purchase.amount_cents, purchase.currency) == (
        tokens, int(Decimal(amount) * 100), currency,
    )  # fmt: skip
    assert stripe.state()["sessions"][0]["amount_total"] == purchase.amount_cents


def test_more_money_never_buys_fewer_tokens(seeded: None) -> None:
    """Also from one cent to the next, where a package begins to be reached."""
    prices = TokenPricing.objects.values_list("price_usd_cents", flat=True)
    around = {cents for price in prices for cents in range(price - 20, price + 20)}
    amounts = sorted(around.union(range(500, 60_000, 97)))
    bought = [checkout.terms_of_amount(cents).tokens for cents in amounts]
    assert bought == sorted(bought)
    for package in TokenPricing.objects.all():
        for more_cents in (0, 1, 100):
            assert checkout.terms_of_amount(package.price_usd_cents + more_cents).tokens >= package.tokens


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
    assert "Amount in euros" in page
    assert "Amount in US dollars" not in page
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
    other_tab, open_purchase = Client(), checkout._open_purchase
    other_tab.force_login(alice)

    def open_after_the_other_tab(*arguments: Any) -> Any:
        monkeypatch.setattr(checkout, "_open_purchase", open_purchase)
        begin_checkout(other_tab, checkout_form("Pro", currency="usd"))
        return open_purchase(*arguments)

    monkeypatch.setattr(checkout, "_open_purchase", open_after_the_other_tab)
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
    assert checkout.why_currency_is_fixed(ledger.get_account(user_id=alice.pk)) == ""


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


def facts_of(purchase: Purchase, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """What the receipt prints, row by row."""
    printed: dict[str, str] = {}
    fact = Document.fact

    def keep(self: Document, label: str, value: str, **options: Any) -> None:
        printed[label] = value
        fact(self, label, value, **options)

    with monkeypatch.context() as patch:
        patch.setattr(Document, "fact", keep)
        purchase.refresh_from_db()
        assert receipts.render_receipt(purchase).startswith(b"%PDF-")
    return printed


def test_receipt_says_all(
    buyer: Client, stripe: StripeStandIn, settings: Settings, alice: User, monkeypatch: pytest.MonkeyPatch
) -> None:
    """41: seller, buyer, card, tax, what went back; numbers without a gap; the history says it, too."""
    settings.SELLER_NAME, settings.SELLER_ADDRESS = "Postmate GmbH", ["1 Main Street", "Berlin"]
    settings.SELLER_TAX_ID = "DE123456789"
    given_up = begin_checkout(buyer, checkout_form("Pro"))
    first, second = begin_checkout(buyer), None
    pay(stripe, first)
    tasks.remember_card(first.pk)
    second = begin_checkout(buyer)
    pay(stripe, second)
    assert (first.receipt_number, second.receipt_number, given_up.receipt_number) == (1, 2, None)
    printed = facts_of(first, monkeypatch)
    assert printed["Sold by"] == "Postmate GmbH\n1 Main Street\nBerlin"
    assert printed["Tax ID"] == "DE123456789"
    assert printed["Paid by"] == "Alice\nalice@example.com"
    assert printed["Paid with"] == "Visa ending in 4242 (Checkout)"
    assert printed["Paid"] == "$15.00 USD"
    assert not any("Refunded" in label for label in printed)
    history = buyer.get(reverse("tokens:history")).content.decode()
    assert "efunded" not in history

    stripe.control(f"payments/{first.stripe_payment_intent_id}/refund", amount=500)
    deliver_all(stripe)
    printed = facts_of(first, monkeypatch)
    assert [value for label, value in printed.items() if label.startswith("Refunded on")] == ["−$5.00"]
    assert printed["Paid in the end"] == "$10.00 USD"
    assert "Partly refunded" in buyer.get(reverse("tokens:history")).content.decode()
    stripe.control(f"payments/{first.stripe_payment_intent_id}/refund")
    deliver_all(stripe)
    assert facts_of(first, monkeypatch)["Paid in the end"] == "$0.00 USD"
    assert ">Refunded<" in buyer.get(reverse("tokens:history")).content.decode()


@pytest.mark.parametrize(
    ("included", "charged_cents", "revenue_cents", "label"),
    [(1, 1_500, 1_250, "Tax, in the price"), (0, 1_750, 1_500, "Tax")],
)
def test_revenue_is_without_tax(
    buyer: Client,
    stripe: StripeStandIn,
    settings: Settings,
    alice: User,
    monkeypatch: pytest.MonkeyPatch,
    included: int,
    charged_cents: int,
    revenue_cents: int,
    label: str,
) -> None:
    """21, 41: in the price or on top of it; refunds are parts of what was paid, and of what it brought."""
    settings.STRIPE_AUTOMATIC_TAX = True
    purchase = begin_checkout(buyer)
    settings.STRIPE_AUTOMATIC_TAX = False  # for the next one: this page has it (law 11)
    stripe.control(f"sessions/{stripe.state()['sessions'][0]['id']}/tax", amount=250, included=included)
    assert stripe.pay(purchase.checkout_url).status_code == 303
    assert deliver(event_of(stripe, "payment_intent.succeeded")).status_code == 200
    assert purchase_state(purchase) == "open"  # what is tax only the session tells
    deliver_all(stripe)
    purchase.refresh_from_db()
    assert (purchase.state, purchase.tax_cents, purchase.paid_total_cents) == ("paid", 250, charged_cents)
    account = ledger.get_account(user_id=alice.pk)
    assert (account.balance, account.lifetime_spent_cents) == (160_000, revenue_cents)
    assert facts_of(purchase, monkeypatch)[label] == "$2.50"
    stripe.control(f"payments/{purchase.stripe_payment_intent_id}/refund", amount=charged_cents // 2)
    deliver_all(stripe)
    verify_books()
    account.refresh_from_db()
    assert (account.balance, account.lifetime_spent_cents) == (85_000, revenue_cents // 2)
    stripe.control(f"payments/{purchase.stripe_payment_intent_id}/refund")
    deliver_all(stripe)
    verify_books()
    account.refresh_from_db()
    assert (account.balance, account.lifetime_spent_cents) == (10_000, 0)


@pytest.mark.parametrize(("paid_by", "words"), [("link", "You paid by Link"), ("bank_debit", "You paid by bank debit")])
def test_who_paid_in_a_way_that_is_not_kept(
    buyer: Client, stripe: StripeStandIn, alice: User, paid_by: str, words: str
) -> None:
    """37: they read why there is no saved card although they have bought."""
    purchase = begin_checkout(buyer)
    assert stripe.pay(purchase.checkout_url, paid_by).status_code == 303
    if paid_by == "bank_debit":
        (intent,) = stripe.state()["payment_intents"]
        stripe.control(f"payments/{intent['id']}/settle")
    deliver_all(stripe)
    tasks.remember_card(purchase.pk)
    assert ledger.get_account(user_id=alice.pk).stripe_payment_method_id == ""
    assert words in buyer.get(reverse("tokens:home")).content.decode()
    Purchase.objects.filter(pk=purchase.pk).update(payment_method_type="card")
    assert words not in buyer.get(reverse("tokens:home")).content.decode()


def test_who_was_refused_has_a_way_on(buyer: Client, stripe: StripeStandIn, settings: Settings) -> None:
    """27: what to do, and whom to write to; after no answer, the next click."""
    settings.SITE_URL = "ftp://nowhere"  # an address that Stripe refuses
    answer = buyer.post(reverse("tokens:checkout"), checkout_form(), follow=True).content.decode()
    assert "You were not charged. Try again, or another package or amount." in answer
    assert "write to billing@" in answer
    stripe.control("faults", kind="429", path_prefix="/v1/checkout", count=3)
    answer = buyer.post(reverse("tokens:checkout"), checkout_form(), follow=True).content.decode()
    assert "You were not charged. Your next click goes on" in answer
