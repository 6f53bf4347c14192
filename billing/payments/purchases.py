"""Buying tokens: from the click on "Buy" to the one credit.

What a payment needs to be resumed is committed before Stripe is called (law 7); what is credited comes from our own
row (law 6). A crash after any line leaves a purchase that the next click, the webhook, the success page or the sweeper
takes up where it stands.
"""

from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime, timedelta
from functools import partial

import structlog
from django.conf import settings
from django.db import IntegrityError, transaction
from django.db.models import F, Max, Q
from django.urls import reverse

from billing import ledger
from billing.catalogue import packages, system_settings
from billing.models import Installation, Purchase, TokenAccount, TokenPricing, TokenTransaction
from billing.models.fields import Currency
from billing.notifications import messages
from billing.payments import customers, gateway, refunds
from billing.payments.gateway import AskAgain, Asked, CheckoutSession, PaymentIntent
from billing.pricing import display_price, tokens_for_cents
from kit import database
from kit.database import repeated_after_conflicts
from kit.locks import lock_until_commit
from kit.on_commit import enqueue_on_commit
from kit.refusal import Refusal

logger = structlog.get_logger(__name__)

State = Purchase.State

# Stripe keeps an idempotency key for at least 24 hours. After that the same key could make a second session, so an
# unanswered purchase is given up before.
RETRY_WITHIN = timedelta(hours=20)
# The webhook gets this long before the sweeper asks Stripe, and this long again between two questions.
WEBHOOK_GRACE = timedelta(minutes=2)
ASK_AGAIN_AFTER = timedelta(minutes=10)
PAGE_ASKS_AGAIN_AFTER = timedelta(seconds=2)

OPEN_TRIES = 6  # the customer, the price and a few keys may be given up for new ones

MAX_AMOUNT_CENTS = 1_000_000  # of a custom purchase
CHECKOUTS_PER_HOUR = 60  # of one account: each is a call of Stripe's, which counts the calls of all of us together


def log_ids(purchase: Purchase) -> dict[str, int]:
    """What a line of the log about a purchase names."""
    return {"purchase_id": purchase.pk, "account_id": purchase.account_id, "user_id": purchase.user_id}


class PurchaseError(Refusal):
    """Nothing was charged. `message` is for the person."""


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


class AccountMayNotBuy(PurchaseError):
    """A person's block or suspension ends buying; who only has a debt pays it by buying."""

    http_status = 403


class PurchaseNotFound(PurchaseError):
    """An event or a page names a purchase that is not ours, or not this one."""

    http_status = 404


class NotOurPayment(PurchaseNotFound):
    """It carries no reference like ours: another product sells on the same Stripe account."""


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


def create_checkout_session(*, user_id: int, terms: Terms, checkout_key: str) -> Purchase:
    """Open a Checkout page and return the purchase, whose `checkout_url` leads there.

    The same form sent twice, or a second click while a checkout of the package is open, gives the same page. The terms
    come from `terms_of_package` or `terms_of_amount`, never from the browser. Buying in a currency makes it the
    account's, until the first payment fixes it. Raises AccountMayNotBuy, CurrencyNotChanged, CheckoutKeyConflict,
    GatewayError. When Stripe did not answer, the next click resumes the purchase with the same key.
    """
    require_may_buy(ledger.get_account(user_id=user_id))
    account = update_currency(user_id=user_id, currency=terms.currency)
    purchase, replaced = _open_purchase(account, terms, checkout_key)
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


def require_may_buy(account: TokenAccount) -> None:
    """Raises AccountMayNotBuy. Of a payment that is under way nothing is refused: it is credited (law 12)."""
    if not account.may_buy:
        raise AccountMayNotBuy(
            f"Your account is {account.get_status_display().lower()}: it cannot buy tokens. Please contact support."
        )


def why_currency_is_fixed(account: TokenAccount) -> str:
    """Why the account's currency cannot be changed, for its owner; empty when it can.

    What was spent in all, auto-recharge's price and its monthly limit are in that currency: after a payment, another
    one would make sums of unlike amounts.
    """
    paid = Purchase.objects.filter(account=account, state__in=(State.PAID, State.REVIEW))
    if account.lifetime_spent_cents or paid.exists():
        return "It was fixed by your first payment: what you spent and auto-recharge's limit are counted in it."
    # One that was given up here is still paid on its page, should Stripe not have heard that it is to be closed.
    is_open = Q(state__in=Purchase.PENDING_STATES) | Q(state=State.EXPIRED, expires_at__gt=database.now())
    if Purchase.objects.filter(is_open, account=account).exists():
        return "A payment page of yours is open. Once it is paid or closed, within a day, this is settled."
    return ""


@repeated_after_conflicts
def update_currency(*, user_id: int, currency: str) -> TokenAccount:
    """Show prices and sell in another currency. Raises CurrencyNotChanged once there was a payment, or for a currency
    in which nothing is sold; the same currency again changes nothing."""
    ledger.get_account(user_id=user_id)
    with transaction.atomic():
        # The lock that a credit takes, too: a first payment comes before this or after it, never in between.
        account = TokenAccount.objects.select_for_update().get(user_id=user_id)
        if currency == account.currency:
            return account
        if reason := why_currency_is_fixed(account):
            raise CurrencyNotChanged(reason)
        if currency not in (Currency.USD, *packages.list_currencies()):
            raise CurrencyNotChanged("Nothing is sold in this currency just now. Choose another one.")
        account.currency = currency
        account.save(update_fields=["currency"])
    return account


def close_checkout(purchase: Purchase) -> Purchase:
    """Close a purchase's payment page at Stripe, and take over how it ended: closed, or paid a moment ago.

    Calls Stripe. Raises GatewayError, PurchaseNotFound.
    """
    with suppress(gateway.GatewayRefused):  # it is paid or closed already
        gateway.expire_checkout_session(str(purchase.stripe_session_id))
    return _ask_stripe(str(purchase.stripe_session_id))


@repeated_after_conflicts
def _open_purchase(account: TokenAccount, terms: Terms, checkout_key: str) -> tuple[Purchase, list[Purchase]]:
    """The purchase of this form, else the open one of this package on the same terms, else a new one.

    Beside it the purchases that the new one replaces, whose pages are to be closed at Stripe.
    """
    now = database.now()
    installation = (
        Installation.read_name()
    )  # made now, if at all: in a transaction its first buyer would hold up others
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
                    user_id=account.user_id,
                    workspace_id=account.workspace_id,
                    kind=Purchase.Kind.CHECKOUT,
                    package=terms.package,
                    package_name=terms.package_name,
                    tokens=terms.tokens,
                    amount_cents=terms.amount_cents,
                    currency=terms.currency,
                    stripe_price_id=terms.stripe_price_id,
                    installation=installation,
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
    account = TokenAccount.objects.select_related("user").get(pk=purchase.account_id)
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


# --- What Stripe says about it --------------------------------------------------------------------------------------


@repeated_after_conflicts
def apply_checkout_session(session: CheckoutSession, *, asked: Asked | None = None) -> Purchase:
    """Bring our purchase up to what Stripe says of its session: credit it, fail it, or note that it runs.

    Raises PurchaseNotFound when no purchase of ours is behind it; AskAgain when an event (`asked`: what Stripe was
    asked about since) closes the page of a purchase whose payment is under way.
    """
    with transaction.atomic():
        purchase = _locked_purchase_of(session)
        if asked is not None and _is_settled(purchase):
            return purchase
        if session.is_paid:
            _credit(
                purchase,
                amount_cents=session.amount_subtotal_cents,
                currency=session.currency,
                payment_intent_id=session.payment_intent_id,
                charged_cents=session.amount_total_cents,
                discount_cents=session.discount_cents,
                tax_cents=session.tax_cents,
            )
        elif session.status == "expired" and purchase.may_be_paid:
            if purchase.state == State.PROCESSING:
                require_asked(purchase, session.id, asked)
            if purchase.is_pending:
                set_state(purchase, State.EXPIRED, "The payment page was not used in time.")
            purchase.expires_at = database.now()  # its page is closed, perhaps before its time
            purchase.save(update_fields=["expires_at"])
        elif session.status == "complete" and purchase.state in (*Purchase.UNPAID_STATES, State.EXPIRED):
            set_state(purchase, State.PROCESSING, "Your bank needs a while to confirm the payment.")
    return purchase


@repeated_after_conflicts
def apply_payment_failure(session: CheckoutSession) -> Purchase:
    """A delayed payment did not come. Raises PurchaseNotFound."""
    with transaction.atomic():
        purchase = _locked_purchase_of(session)
        if purchase.is_pending:
            set_state(purchase, State.FAILED, "The bank did not confirm the payment. You were not charged.")
    return purchase


@repeated_after_conflicts
def apply_payment_intent(payment_intent: PaymentIntent, *, asked: Asked | None = None) -> Purchase:
    """Credit a succeeded payment whose session's event has not come, or will not come. Raises PurchaseNotFound.

    With tax or promotion codes a Checkout payment's amount is not the price, which only the session tells: it is left
    to the session's event, the success page or the sweeper.
    """
    with transaction.atomic():
        purchase = lock_purchase_behind(payment_intent)
        if asked is not None and _is_settled(purchase):
            return purchase
        amount_is_price = purchase.kind != Purchase.Kind.CHECKOUT or not gateway.amounts_may_differ()
        if payment_intent.status == "succeeded" and amount_is_price:
            _credit(
                purchase,
                amount_cents=payment_intent.amount_received_cents,
                currency=payment_intent.currency,
                payment_intent_id=payment_intent.id,
            )
    return purchase


def refresh_from_stripe(purchase: Purchase) -> Purchase:
    """Ask Stripe how a purchase stands that may be paid, at most every two seconds, for the page that waits for it.

    Stripe out of reach is no error: the page goes on waiting, and the webhook or the sweeper will come.
    """
    if not purchase.may_be_paid or not purchase.stripe_session_id:
        return purchase
    if not claim(purchase, database.now(), again_after=PAGE_ASKS_AGAIN_AFTER):
        return purchase
    try:
        return _ask_stripe(purchase.stripe_session_id)
    except gateway.GatewayError as error:
        logger.warning("A purchase could not be looked up", **log_ids(purchase), error=error.__cause__ or error)
        return purchase


def sweep_purchases(*, limit: int = 200) -> int:
    """Finish the purchases whose webhook never came, by asking Stripe. Returns how many came to an end."""
    now = database.now()
    Purchase.objects.filter(
        state=State.CREATED,
        kind=Purchase.Kind.CHECKOUT,
        stripe_session_id=None,
        created_at__lt=now - RETRY_WITHIN,
    ).update(state=State.EXPIRED, message="The payment page could not be opened.")
    waiting = Purchase.objects.filter(
        Q(checked_at=None) | Q(checked_at__lt=now - ASK_AGAIN_AFTER),
        state__in=Purchase.PENDING_STATES,
        stripe_session_id__isnull=False,
        created_at__lt=now - WEBHOOK_GRACE,
    ).order_by("checked_at", "id")
    ended = 0
    for purchase in waiting[:limit]:
        Purchase.objects.filter(pk=purchase.pk).update(checked_at=now)
        try:
            ended += not _ask_stripe(str(purchase.stripe_session_id)).is_pending
        except (gateway.GatewayError, PurchaseError) as error:
            logger.warning("A purchase was not finished", **log_ids(purchase), error=error.__cause__ or error)
    return ended


def _ask_stripe(session_id: str) -> Purchase:
    try:
        session = gateway.retrieve_checkout_session(session_id)
    except gateway.GatewayMissing:
        return _close_unknown(session_id)
    # A delayed payment: the session never says that it failed, only its payment does.
    is_delayed = session.status == "complete" and not session.is_paid and session.payment_intent_id is not None
    if is_delayed and gateway.retrieve_payment_intent(str(session.payment_intent_id)).has_failed:
        return apply_payment_failure(session)
    return apply_checkout_session(session)


def _is_settled(purchase: Purchase) -> bool:
    """Whether another amount was paid, and a person has settled it or all of it was sent back: events that come late
    change nothing of that, while reconciliation sees what Stripe has now."""
    return purchase.state == State.FAILED and purchase.paid_at is not None


def _close_unknown(session_id: str) -> Purchase:
    """A payment page that Stripe does not know, say of the other mode: nobody pays on it."""
    with transaction.atomic():
        purchase = Purchase.objects.select_for_update().get(stripe_session_id=session_id)
        if purchase.is_pending:
            set_state(purchase, State.EXPIRED, "The payment page is not there any more.")
            purchase.expires_at = database.now()
            purchase.save(update_fields=["expires_at"])
    return purchase


def require_asked(purchase: Purchase, stripe_id: str, asked: Asked | None) -> None:
    """Raises AskAgain for what an event tells, until Stripe was asked while the purchase stood as it does. `asked` is
    None for what Stripe has just answered."""
    held = (purchase.state,)
    if asked is not None and asked.get(stripe_id) != held:
        raise AskAgain(stripe_id, held)


def lock_purchase_behind(payment_intent: PaymentIntent) -> Purchase:
    """Our purchase that a payment is for, also before we know its id, locked. Raises PurchaseNotFound."""
    by_intent = Purchase.objects.filter(stripe_payment_intent_id=payment_intent.id).values_list("pk").first()
    purchase = _lock(by_intent[0] if by_intent else payment_intent.purchase_id)
    if not by_intent:
        # Metadata can be edited at Stripe. It only helps to find our row; customer and amount must be the row's.
        _require_customer(purchase, payment_intent.customer_id)
    return purchase


def _locked_purchase_of(session: CheckoutSession) -> Purchase:
    """Our purchase behind a session, locked. By the session's id; by our reference only while we do not know the id
    yet (Stripe answered, and we crashed before storing it)."""
    known = Purchase.objects.filter(stripe_session_id=session.id).values_list("pk").first()
    purchase = _lock(known[0] if known else session.client_reference_id)
    if purchase.stripe_session_id is None:
        # Another product on our Stripe account may count its orders, too, and reach the same number.
        _require_customer(purchase, session.customer_id)
        purchase.stripe_session_id = session.id
        purchase.save(update_fields=["stripe_session_id"])
    if purchase.stripe_session_id != session.id:
        raise PurchaseNotFound(f"Session {session.id} is not the one of purchase {purchase.pk}.")
    return purchase


def _lock(purchase_id: int | str) -> Purchase:
    try:
        return Purchase.objects.select_for_update().get(pk=int(purchase_id))
    except ValueError:
        raise NotOurPayment(f"{purchase_id!r} is no reference of ours.") from None
    except (OverflowError, Purchase.DoesNotExist):
        raise PurchaseNotFound(f"There is no purchase {purchase_id!r}.") from None


def _require_customer(purchase: Purchase, customer_id: str) -> None:
    ours = TokenAccount.objects.values_list("stripe_customer_id", flat=True).get(pk=purchase.account_id)
    # An auto-recharge keeps whom it charged: the customer may have been deleted since.
    if not customer_id or customer_id not in (ours, purchase.metadata.get("customer_id")):
        raise PurchaseNotFound(f"Customer {customer_id!r} is not the one of purchase {purchase.pk}.")


def claim(purchase: Purchase, now: datetime, *, again_after: timedelta) -> bool:
    """Whether the caller may ask Stripe about it: nobody has done so for `again_after`. It counts as asked then."""
    due = Q(checked_at=None) | Q(checked_at__lt=now - again_after)
    return bool(Purchase.objects.filter(due, pk=purchase.pk).update(checked_at=now))


def set_state(purchase: Purchase, state: str, message: str, *, failure_code: str = "") -> None:
    """Write where a locked purchase stands, and in words why."""
    purchase.state = state
    purchase.message = message[:500]
    purchase.failure_code = failure_code[:100]
    purchase.save(update_fields=["state", "message", "failure_code"])


def _credit(
    purchase: Purchase,
    *,
    amount_cents: int,
    currency: str,
    payment_intent_id: str | None,
    charged_cents: int | None = None,
    discount_cents: int = 0,
    tax_cents: int = 0,
) -> None:
    """Credit a locked purchase once, if what was paid is what was agreed. Paid wins over expired and failed.

    `charged_cents` is what the buyer paid in the end, where that may differ: the whole that refunds are parts of.
    `discount_cents` of it promotion codes took off the price: they lower what we earn, not what is credited. So does
    the part of `tax_cents` that the price includes.
    """
    if purchase.state == State.PAID:
        if payment_intent_id and purchase.stripe_payment_intent_id is None:
            purchase.stripe_payment_intent_id = payment_intent_id
            purchase.save(update_fields=["stripe_payment_intent_id"])
            refunds.apply_parked(purchase)
        if payment_intent_id and purchase.stripe_payment_intent_id != payment_intent_id:
            raise PurchaseNotFound(f"Purchase {purchase.pk} was paid by another payment than {payment_intent_id}.")
        return
    if (amount_cents, currency) != (purchase.amount_cents, purchase.currency):
        logger.error(
            "A purchase was paid with another amount and is kept for review",
            **log_ids(purchase),
            paid_cents=amount_cents,
            paid_currency=currency,
            amount_cents=purchase.amount_cents,
            currency=purchase.currency,
        )
        set_state(purchase, State.REVIEW, "The amount paid differs from the price. We are looking into it.")
        return
    purchase.discount_cents = discount_cents
    purchase.tax_cents = tax_cents
    purchase.charged_cents = charged_cents or None
    ledger.add_tokens(
        user_id=purchase.user_id,
        tokens=purchase.tokens,
        type=(
            TokenTransaction.Type.PURCHASE
            if purchase.kind == Purchase.Kind.CHECKOUT
            else TokenTransaction.Type.AUTO_RECHARGE
        ),
        description=f"{purchase.package_name} package" if purchase.package_id else purchase.package_name,
        idempotency_key=f"purchase-{purchase.pk}",
        purchase_id=purchase.pk,
        paid_cents=purchase.revenue_cents,
        currency=purchase.currency,
        stripe_payment_intent_id=payment_intent_id,
    )
    purchase.state = State.PAID
    purchase.message = ""
    purchase.paid_at = database.now()
    purchase.stripe_payment_intent_id = payment_intent_id
    purchase.save(
        update_fields=[
            "state", "message", "paid_at", "stripe_payment_intent_id", "charged_cents", "discount_cents", "tax_cents",
        ]
    )  # fmt: skip
    _after_credit(purchase)
    refunds.apply_parked(purchase)
    number_receipt(purchase)
    transaction.on_commit(
        partial(logger.info, "A purchase was credited", **log_ids(purchase), tokens=purchase.tokens, kind=purchase.kind)
    )


def number_receipt(purchase: Purchase) -> None:
    """Give a paid purchase the next number of the receipts, in the caller's transaction; one that has one keeps it.

    Whoever numbers waits for the one before to commit, so that the series has no gap; it is the last lock of a credit.
    """
    lock_until_commit("receipt numbers")
    highest = Purchase.objects.aggregate(number=Max("receipt_number"))["number"] or 0
    Purchase.objects.filter(pk=purchase.pk, receipt_number=None).update(receipt_number=highest + 1)
    purchase.refresh_from_db(fields=["receipt_number"])


def _after_credit(purchase: Purchase) -> None:
    """What a credit brings with it: the notice, the end of earlier declines, the card and the receipt."""
    if purchase.kind == Purchase.Kind.AUTO_RECHARGE:
        accounts = TokenAccount.objects.filter(pk=purchase.account_id)
        accounts.update(auto_recharge_failures=0, auto_recharge_retry_at=None)
        # Where it is off by now, why it is off stays there to be read.
        accounts.filter(auto_recharge_enabled=True).update(
            auto_recharge_last_outcome=f"{purchase.tokens:,} tokens were bought for {purchase.price_display}."
        )
        messages.auto_recharge_succeeded(purchase)
    else:
        messages.purchase_confirmed(purchase)
    enqueue_on_commit("billing.tasks.remember_card", purchase.pk)
