"""Opening Stripe's page: what is sold for how much, in which currency, and one page for each wish.

What a payment needs to be resumed is committed before Stripe is called (law 7), with a key from our own row. A crash
after any line leaves a purchase that the next click or the sweep takes up where it stands (`purchases.py`).
"""

from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta

import structlog
from django.conf import settings
from django.db import IntegrityError, transaction
from django.db.models import F, Q
from django.urls import reverse

from billing import ledger
from billing.catalogue import packages, system_settings
from billing.models import Installation, Purchase, TokenAccount, TokenPricing
from billing.models.fields import Currency
from billing.payments import customers, gateway
from billing.payments.purchases import (
    RETRY_WITHIN,
    PurchaseError,
    close_checkout,
    log_ids,
    refresh_from_stripe,
    require_may_buy,
)
from billing.pricing import display_price, tokens_for_cents
from kit import database
from kit.database import repeated_after_conflicts
from kit.locks import lock_until_commit

logger = structlog.get_logger(__name__)

State = Purchase.State

OPEN_TRIES = 6  # the customer, the price and a few keys may be given up for new ones
MAX_AMOUNT_CENTS = 1_000_000  # of a custom purchase
CHECKOUTS_PER_HOUR = 60  # of one account: each is a call of Stripe's, which counts the calls of all of us together


class PackageNotSold(PurchaseError):
    http_status = 404


class AmountNotSold(PurchaseError):
    pass


class CheckoutKeyConflict(PurchaseError):
    http_status = 409


class TooManyCheckouts(PurchaseError):
    http_status = 429


class CurrencyNotChanged(PurchaseError):
    http_status = 409


@dataclass(frozen=True, slots=True)
class Terms:
    """What is sold for how much: the snapshot that a purchase keeps."""

    package: TokenPricing | None
    package_name: str
    tokens: int
    amount_cents: int
    currency: str
    stripe_price_id: str = ""
    rate_of: str = ""  # the package whose price per token an amount gets; empty: the exchange rate


def terms_of_package(package_id: int, *, currency: str) -> Terms:
    """Raises PackageNotSold when the package is off sale, or has no price in the currency."""
    package = TokenPricing.objects.filter(pk=package_id, is_active=True).first()
    price_cents = package.price_cents(currency) if package else None
    if package is None or price_cents is None:
        raise PackageNotSold("This package is not on sale any more. Choose another one.")
    return Terms(package, package.name, package.tokens, price_cents, currency, package.stripe_price_id(currency))


def terms_of_amount(amount_cents: int, *, currency: str = Currency.USD) -> Terms:
    """What a custom amount buys: at the exchange rate, or at that of the package which gives the most for it among
    those that the amount reaches, so that nobody pays more for less. In another currency than US dollars, an amount
    below all packages buys at the smallest one's rate.

    Raises AmountNotSold below the minimum purchase, which has the same number in each currency, and where nothing is
    sold in the currency.
    """
    settings = system_settings.get_system_settings()
    if not settings.minimum_purchase_cents <= amount_cents <= MAX_AMOUNT_CENTS:
        smallest = display_price(settings.minimum_purchase_cents, currency)
        raise AmountNotSold(f"The amount must be between {smallest} and {display_price(MAX_AMOUNT_CENTS, currency)}.")
    offers = packages.list_offers(currency)
    reached = [offer for offer in offers if offer.price_cents <= amount_cents]
    if currency != Currency.USD and not reached:
        reached = sorted(offers, key=lambda offer: offer.price_cents)[:1]
    # Rounded down, as the exchange rate is; at a package's own price it comes to the package.
    rates = [(amount_cents * each.package.tokens // each.price_cents, each.package.name) for each in reached]
    if currency == Currency.USD:
        rates.insert(0, (tokens_for_cents(amount_cents=amount_cents, tokens_per_usd=settings.tokens_per_usd), ""))
    tokens, rate_of = max(rates, key=lambda rate: rate[0], default=(0, ""))
    if tokens < 1:
        raise AmountNotSold("Nothing is sold for such an amount in this currency.")
    return Terms(None, "Custom amount", tokens, amount_cents, currency, rate_of=rate_of)


def create_checkout_session(
    *,
    user_id: int | None = None,
    account_id: int | None = None,
    actor_id: int | None = None,
    terms: Terms,
    checkout_key: str,
) -> Purchase:
    """Open a Checkout page and return the purchase, whose `checkout_url` leads there. The account, or the user's own,
    gets the tokens; `actor_id` buys them, and without it the account's own user.

    The same form sent twice, or a second click while a checkout of the package is open, gives the same page. The terms
    come from `terms_of_package` or `terms_of_amount`, never from the browser. Buying in a currency makes it the
    account's, until the first payment fixes it. Raises AccountMayNotBuy, CurrencyNotChanged, CheckoutKeyConflict,
    GatewayError. When Stripe did not answer, the next click resumes the purchase with the same key.
    """
    account = ledger.get_account(user_id=user_id, account_id=account_id)
    buyer_id = actor_id or account.user_id
    if buyer_id is None or account.user_id not in (None, buyer_id):
        raise ledger.ActorRequired(is_team=account.user_id is None)
    require_may_buy(account)
    account = update_currency(account_id=account.pk, currency=terms.currency)
    purchase, replaced = _open_purchase(account, buyer_id, terms, checkout_key)
    if purchase.state == State.OPEN:
        # Its page may be paid, closed, or of another mode by now. Stripe out of reach: the page is there all the same.
        purchase = refresh_from_stripe(purchase)
        if purchase.state == State.EXPIRED or (purchase.state == State.PAID and purchase.checkout_key != checkout_key):
            purchase, replaced = _open_purchase(account, buyer_id, terms, checkout_key)
    for each in replaced:
        try:
            close_checkout(each)
        except (gateway.GatewayError, PurchaseError) as error:
            logger.warning("A checkout was not closed", **log_ids(each), error=error.__cause__ or error)
    if purchase.state == State.CREATED:
        try:
            _open_session(purchase)
        except (gateway.GatewayBroken, gateway.GatewayRefused, gateway.GatewayKeyConflict) as error:
            # Stripe would give the same answer to this purchase's key for a day; the next click gets a new one. A
            # session that we never heard of has no payer: nobody was sent to it.
            logger.error("A checkout was not opened", **log_ids(purchase), error=error.__cause__)
            Purchase.objects.filter(pk=purchase.pk, state=State.CREATED).update(
                state=State.FAILED, message="The payment page could not be opened."
            )
            raise
    return purchase


def why_currency_is_fixed(account: TokenAccount) -> str:
    """Why the account's currency cannot be changed, for its owner; empty when it can.

    What was spent in all, auto-recharge's price and its monthly limit are in that currency: after a payment, another
    one would make sums of unlike amounts.
    """
    paid = Purchase.objects.filter(account=account, state__in=(State.PAID, State.REVIEW))
    if account.lifetime_spent_cents or paid.exists():
        return "It was fixed by your first payment: what you spent and auto-recharge's limit are counted in it."
    # One that was given up here is still paid on its page, should Stripe not have heard that it is to be closed.
    is_open = Q(state__in=Purchase.PENDING_STATES) | Purchase.which_page_is_left()
    if Purchase.objects.filter(is_open, account=account).exists():
        return "A payment page of yours is open. Once it is paid or closed, within a day, this is settled."
    return ""


@repeated_after_conflicts
def update_currency(*, user_id: int | None = None, account_id: int | None = None, currency: str) -> TokenAccount:
    """Show prices and sell in another currency. Raises CurrencyNotChanged once there was a payment, or for a currency
    in which nothing is sold; the same currency again changes nothing."""
    account_id = ledger.get_account(user_id=user_id, account_id=account_id).pk
    with transaction.atomic():
        # The lock that a credit takes, too: a first payment comes before this or after it, never in between.
        account = TokenAccount.objects.select_for_update().get(pk=account_id)
        if currency == account.currency:
            return account
        if reason := why_currency_is_fixed(account):
            raise CurrencyNotChanged(reason)
        if currency not in (Currency.USD, *packages.list_currencies()):
            raise CurrencyNotChanged("Nothing is sold in this currency just now. Choose another one.")
        account.currency = currency
        account.save(update_fields=["currency"])
    return account


@repeated_after_conflicts
def _open_purchase(
    account: TokenAccount, buyer_id: int, terms: Terms, checkout_key: str
) -> tuple[Purchase, list[Purchase]]:
    """The purchase of this form, else the open one of this package on the same terms, else a new one.

    Beside it the purchases that the new one replaces, whose pages are to be closed at Stripe.
    """
    now = database.now()
    installation = Installation.read_name()  # made now, if at all: in a transaction it would hold up others
    is_usable = Q(state=State.CREATED, created_at__gt=now - RETRY_WITHIN) | Q(state=State.OPEN, expires_at__gt=now)
    same_price = Q(tokens=terms.tokens, amount_cents=terms.amount_cents, currency=terms.currency)
    open_ones = Purchase.objects.filter(
        account=account,
        package=terms.package,
        package__isnull=False,
        kind=Purchase.Kind.CHECKOUT,
        state__in=Purchase.UNPAID_STATES,
    )
    for _ in range(3):
        sent_before = Purchase.objects.filter(account=account, checkout_key=checkout_key)
        other_package = sent_before.exclude(package=terms.package)
        other_amount = sent_before.filter(package=None).exclude(same_price)
        if other_package.exists() or other_amount.exists():
            raise CheckoutKeyConflict("This form was already sent for something else. Reload the page.")
        pending = sent_before.filter(is_usable | Q(state=State.PROCESSING)).first()
        if purchase := pending or open_ones.filter(is_usable & same_price).first():
            return purchase, []
        lately = Purchase.objects.filter(
            account=account, kind=Purchase.Kind.CHECKOUT, created_at__gt=now - timedelta(hours=1)
        )
        try:
            with transaction.atomic():
                # One at a time, each counted when the ones before it have been written.
                lock_until_commit(f"checkouts of account {account.pk}")
                if lately.count() >= CHECKOUTS_PER_HOUR:
                    raise TooManyCheckouts("You opened very many payment pages. Try again in an hour.")
                # On other terms, or too old. Should it be paid all the same, it is still credited: paid wins.
                replaced = list(open_ones.exclude(is_usable & same_price))
                Purchase.objects.filter(pk__in=[each.pk for each in replaced], state__in=Purchase.UNPAID_STATES).update(
                    state=State.EXPIRED, message="Replaced by a newer checkout."
                )
                purchase = Purchase.objects.create(
                    account=account,
                    user_id=buyer_id,
                    workspace_id=account.workspace_id,
                    kind=Purchase.Kind.CHECKOUT,
                    package=terms.package,
                    package_name=terms.package_name,
                    tokens=terms.tokens,
                    amount_cents=terms.amount_cents,
                    currency=terms.currency,
                    stripe_price_id=terms.stripe_price_id,
                    installation=installation,
                    checkout_options=gateway.checkout_options(is_for_team=account.user_id is None),
                    # A form that is sent again after its purchase has ended begins a new one.
                    checkout_key=None if sent_before.exists() else checkout_key,
                )
                # Two tabs in two currencies: the other one finds this purchase, or we find its currency here. The lock
                # comes after the purchases', as in a credit.
                locked = TokenAccount.objects.select_for_update().get(pk=account.pk)
                if locked.currency != terms.currency:
                    raise CurrencyNotChanged("Your currency was changed in another window. Reload the page.")
                return purchase, [each for each in replaced if each.stripe_session_id]
        except IntegrityError:
            continue  # the second half of a double click: the first one's purchase is found in the next round
    raise CheckoutKeyConflict("Several checkouts were opened at once. Try again.")


def _open_session(purchase: Purchase) -> None:
    """Make the customer and the session at Stripe, with keys that come from our rows, and store them.

    An id that Stripe does not know any more is forgotten, and so is a price that it does not sell at, or not at what we
    sell for; a key that is taken is given up; and it goes on.
    """
    for tries_left in reversed(range(OPEN_TRIES)):
        try:
            _try_to_open_session(purchase)
        except gateway.GatewayKeyConflict as error:
            if not tries_left:
                raise
            logger.warning("A key at Stripe was taken", **log_ids(purchase), error=error.__cause__)
        except gateway.GatewayRefused as error:
            if not tries_left or not _forget_refused(purchase, error):
                raise
            logger.error("Stripe refused an id of ours", **log_ids(purchase), error=error.__cause__ or error)
        else:
            return
        # Committed before Stripe is asked again: the old key would give the same answer for a day.
        Purchase.objects.filter(pk=purchase.pk, stripe_tries=purchase.stripe_tries).update(
            stripe_tries=F("stripe_tries") + 1, stripe_price_id=purchase.stripe_price_id
        )
        purchase.refresh_from_db()
        if purchase.state != State.CREATED:
            return


def _forget_refused(purchase: Purchase, error: gateway.GatewayRefused) -> bool:
    """Forget the id that Stripe refuses. Returns whether there is a way without it."""
    if isinstance(error, gateway.GatewayMissing) and error.parameter == "customer":
        customers.forget_customer(customer_id=purchase.metadata["customer_id"])
        return True
    if purchase.stripe_price_id:  # gone, archived, for subscriptions … Stripe does not always say that it is the price
        if error.parameter.startswith("line_items"):
            packages.forget_stripe_price(purchase.stripe_price_id)
        purchase.stripe_price_id = ""  # the price is given inline, as agreed
        return True
    return False


def _try_to_open_session(purchase: Purchase) -> None:
    account = TokenAccount.objects.select_related("user", "workspace").get(pk=purchase.account_id)
    customer_id = customers.ensure_customer(account)
    if purchase.metadata.get("customer_id") != customer_id:
        # Who pays here, should the account have another customer by then.
        purchase.metadata = {**purchase.metadata, "customer_id": customer_id}
        purchase.save(update_fields=["metadata"])
    session = gateway.create_checkout_session(
        purchase_id=purchase.pk,
        customer_id=customer_id,
        product_name=f"{purchase.package_name}: {purchase.tokens:,} tokens",
        amount_cents=purchase.amount_cents,
        currency=purchase.currency,
        stripe_price_id=purchase.stripe_price_id,
        installation=purchase.installation,
        options=gateway.checkout_options(is_for_team=purchase.account.user_id is None)
        if purchase.checkout_options is None
        else purchase.checkout_options,
        # Each line of the key's parameters is a snapshot, so that a retry sends the same and gets the same session.
        success_url=f"{settings.SITE_URL}{reverse('tokens:success', args=[purchase.pk])}",
        cancel_url=f"{settings.SITE_URL}{reverse('tokens:cancelled', args=[purchase.pk])}",
        idempotency_key=purchase.stripe_key("checkout"),
    )
    if purchase.stripe_price_id and (session.amount_subtotal_cents, session.currency) != (
        purchase.amount_cents,
        purchase.currency,
    ):
        # What was paid on that page would not be what was agreed, and nothing would be credited. Nobody was sent there.
        with suppress(gateway.GatewayError):
            gateway.expire_checkout_session(session.id)
        raise gateway.GatewayRefused("The price at Stripe is another one than ours.", parameter="line_items")
    purchase.stripe_session_id = session.id
    purchase.checkout_url = session.url
    purchase.expires_at = session.expires_at
    # The webhook may have been quicker than this line; then its state stays.
    stored = Purchase.objects.filter(pk=purchase.pk, state=State.CREATED).update(
        state=State.OPEN,
        stripe_session_id=session.id,
        checkout_url=session.url,
        expires_at=session.expires_at,
    )
    if stored:
        purchase.state = State.OPEN
    else:
        purchase.refresh_from_db()
