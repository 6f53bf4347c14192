"""Auto-recharge: a package bought with the saved card while its owner is away, when the balance runs low.

An attempt is a purchase, committed before Stripe is called. Whatever happens then, a crash on any line or a time-out
after the money has moved, the attempt stays under way, and the sweep takes it up with the same idempotency key: Stripe
answers what it did. Only an attempt whose outcome is known makes room for another one (law 13, kept by the account's
lock and a unique index).

What may follow an attempt that brought no money is decided in `_fail` alone.
"""

from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import partial

import structlog
from django.core.exceptions import ValidationError
from django.db import IntegrityError, transaction
from django.db.models import Exists, F, OuterRef, Q, QuerySet, Sum

from billing.catalogue import packages
from billing.models import Installation, Purchase, TokenAccount, TokenPricing
from billing.notifications import messages
from billing.payments import customers, gateway, purchases
from billing.payments.customers import switch_off
from billing.payments.gateway import (
    Asked,
    CardDeclined,
    GatewayBroken,
    GatewayError,
    GatewayKeyConflict,
    GatewayMissing,
    GatewayRefused,
    GatewayUnavailable,
    PaymentIntent,
)
from billing.payments.purchases import claim, set_state
from billing.pricing import display_price
from kit import database
from kit.database import repeated_after_conflicts
from kit.on_commit import enqueue_on_commit

logger = structlog.get_logger(__name__)

State = Purchase.State

# After the first and the second decline in a row. The third one switches auto-recharge off.
RETRY_AFTER_DECLINE = (timedelta(hours=1), timedelta(hours=24))
# After a fault of Stripe's own, which is no decline.
RETRY_AFTER_FAULT = timedelta(minutes=10)
# After a refusal that is not about the card, such as of an account that may not charge: an operator has to mend it.
RETRY_AFTER_REFUSAL = timedelta(hours=1)
# Codes of a card that no patience helps: https://docs.stripe.com/declines/codes
HOPELESS_CODES = frozenset(
    {
        "card_not_supported", "currency_not_supported", "expired_card", "fraudulent", "incorrect_number",
        "invalid_account", "lost_card", "merchant_blacklist", "new_account_information_available", "pickup_card",
        "restricted_card", "revocation_of_all_authorizations", "revocation_of_authorization", "security_violation",
        "stolen_card", "stop_payment_order", "transaction_not_allowed",
    }
)  # fmt: skip

# An unanswered attempt is left to the worker that began it for longer than its call can last.
RESUME_AFTER = timedelta(seconds=90)
# Ways to pay that are not kept, as people call them.
METHOD_NAMES = {
    "link": "Link", "us_bank_account": "bank debit", "sepa_debit": "bank debit", "acss_debit": "bank debit",
    "bacs_debit": "bank debit", "paypal": "PayPal", "amazon_pay": "Amazon Pay", "ideal": "iDEAL",
}  # fmt: skip
CONFIRM_WITHIN = timedelta(hours=24)
# How long the sweep looks for the card and the receipt of a payment.
DETAILS_WITHIN = timedelta(days=7)


# --- Settings -------------------------------------------------------------------------------------------------------


@repeated_after_conflicts
def update_auto_recharge(
    *,
    user_id: int,
    enabled: bool,
    threshold_tokens: int,
    package_id: int | None,
    monthly_cap_cents: int | None = None,
) -> TokenAccount:
    """Save the user's settings: buy the package when fewer than `threshold_tokens` are available, for at most
    `monthly_cap_cents` in a calendar month (UTC). The package's tokens and price of now are what they agree to.

    Raises ValidationError naming each wrong field; then nothing is changed. Switching it off lets a charge under way
    come to its end. Switched on below the threshold, it recharges at once. The owner is told of what is on.
    """
    with transaction.atomic():
        account = TokenAccount.objects.select_for_update().get(user_id=user_id)
        package = check_settings(
            account,
            enabled=enabled,
            threshold_tokens=threshold_tokens,
            package_id=package_id,
            monthly_cap_cents=monthly_cap_cents,
        )
        is_new = (enabled, package_id, monthly_cap_cents) != (
            account.auto_recharge_enabled,
            account.auto_recharge_package_id,
            account.auto_recharge_monthly_cap_cents,
        )
        is_changed = is_new or threshold_tokens != account.auto_recharge_threshold_tokens
        account.auto_recharge_enabled = enabled
        account.auto_recharge_threshold_tokens = threshold_tokens
        account.auto_recharge_package = package
        account.auto_recharge_price_cents = package.price_cents(account.currency) if package else None
        account.auto_recharge_package_tokens = package.tokens if package else None
        account.auto_recharge_monthly_cap_cents = monthly_cap_cents
        if is_new:
            # Declines and waits belong to the settings before.
            account.auto_recharge_failures = 0
            account.auto_recharge_retry_at = None
            account.auto_recharge_last_outcome = ""
        account.save(
            update_fields=[
                "auto_recharge_enabled", "auto_recharge_threshold_tokens", "auto_recharge_package",
                "auto_recharge_price_cents", "auto_recharge_package_tokens", "auto_recharge_monthly_cap_cents",
                "auto_recharge_failures", "auto_recharge_retry_at", "auto_recharge_last_outcome",
            ]
        )  # fmt: skip
        if enabled and is_changed:
            messages.auto_recharge_switched_on(account, key=database.now().isoformat())
        if enabled and account.available < threshold_tokens:
            enqueue_on_commit("billing.tasks.auto_recharge", user_id)
    return account


def check_settings(
    account: TokenAccount,
    *,
    enabled: bool,
    threshold_tokens: int,
    package_id: int | None,
    monthly_cap_cents: int | None = None,
) -> TokenPricing | None:
    """The package of settings that can be saved. Raises ValidationError naming each wrong field."""
    package = packages.get_package_by_id(package_id) if package_id is not None else None
    errors = {}
    price_cents = package.price_cents(account.currency) if package and package.is_active else None
    if enabled and not account.stripe_payment_method_id:
        errors["enabled"] = f"There is no saved card yet. {why_no_card(account)}"
    # Switching it off must always work, also when the package has gone meanwhile.
    if price_cents is None and (enabled or package is None is not account.auto_recharge_package_id):
        errors["package_id"] = "Choose a package that is on sale."
    if type(threshold_tokens) is not int or threshold_tokens < 1:
        errors["threshold_tokens"] = "Enter a whole number of tokens, 1 or more."
    elif package and threshold_tokens > package.tokens:
        errors["threshold_tokens"] = (
            f"One {package.name} package has {package.tokens:,} tokens: the threshold cannot be above that."
        )
    if monthly_cap_cents is not None and monthly_cap_cents <= 0:
        errors["monthly_cap_cents"] = "Enter an amount above zero, or leave it empty for no limit."
    elif monthly_cap_cents is not None and price_cents is not None and monthly_cap_cents < price_cents:
        errors["monthly_cap_cents"] = (
            f"The package costs {display_price(price_cents, account.currency)}: with a lower limit it is never bought."
        )
    if errors:
        raise ValidationError(errors)
    return package


def why_no_card(account: TokenAccount) -> str:
    """How an account without a saved card gets one, for its owner, who may have paid in a way that is not kept."""
    paid_by = (
        Purchase.objects.filter(account=account, kind=Purchase.Kind.CHECKOUT, state=State.PAID)
        .order_by("-paid_at")
        .values_list("payment_method_type", flat=True)
        .first()
    )
    if paid_by in (None, "", "card"):
        return "Buy a package once: its card is kept, and you can switch auto-recharge on here."
    return (
        f"You paid by {METHOD_NAMES.get(paid_by, paid_by.replace('_', ' '))}, which auto-recharge cannot charge while "
        "you are away. Pay by card once: the card is kept, and you can switch auto-recharge on here."
    )


@dataclass(frozen=True, slots=True)
class Overview:
    """How auto-recharge stands, as its owner sees it."""

    state: str  # no_card, off, on, charging, confirm, waiting (see `retry_at`), switched_off
    under_way: Purchase | None
    attempts: list[Purchase]  # the newest ones


def get_overview(account: TokenAccount, *, attempts: int = 10) -> Overview:
    """What the page of auto-recharge shows: its state, and the newest attempts."""
    newest = list(
        Purchase.objects.filter(account=account, kind=Purchase.Kind.AUTO_RECHARGE).order_by("-created_at", "-id")[
            :attempts
        ]
    )
    under_way = next((purchase for purchase in newest if purchase.is_pending), None)
    if under_way is not None:
        state = "confirm" if under_way.state == State.ACTION_REQUIRED else "charging"
    elif account.auto_recharge_enabled:
        retry_at = account.auto_recharge_retry_at
        state = "waiting" if retry_at is not None and retry_at > database.now() else "on"
    elif account.auto_recharge_last_outcome:
        state = "switched_off"
    else:
        state = "off" if account.stripe_payment_method_id else "no_card"
    return Overview(state, under_way, newest)


# --- An attempt -----------------------------------------------------------------------------------------------------


def trigger_auto_recharge(*, user_id: int) -> Purchase | None:
    """Buy the user's package with the saved card, if it is time for that. Returns the attempt, None when it is not.

    Safe to call whenever and as often as one likes: two calls at the same moment make one attempt,
    and the monthly cap holds. Calls Stripe, so never call it inside a transaction. Raises PurchaseNotFound
    when Stripe's answer is not about our attempt.
    """
    purchase = _open_attempt(user_id)
    if purchase is not None:
        _charge(purchase)
        purchase.refresh_from_db()
    return purchase


def _due_accounts(now: datetime) -> QuerySet[TokenAccount]:
    """The accounts that want a recharge now, the monthly cap and the package's price aside."""
    under_way = Purchase.objects.filter(
        account=OuterRef("pk"), kind=Purchase.Kind.AUTO_RECHARGE, state__in=Purchase.PENDING_STATES
    )
    return TokenAccount.objects.filter(
        ~Exists(under_way),
        TokenAccount.MAY_BUY,
        Q(auto_recharge_retry_at=None) | Q(auto_recharge_retry_at__lte=now),
        auto_recharge_enabled=True,
        auto_recharge_threshold_tokens__gt=F("balance") - F("reserved"),
        stripe_customer_id__isnull=False,
    ).exclude(stripe_payment_method_id="")


@repeated_after_conflicts
def _open_attempt(user_id: int) -> Purchase | None:
    """Commit an attempt that Stripe does not know of yet, if the account wants one and may have it."""
    now = database.now()
    # Without the lock first: most debits below the threshold find an attempt under way.
    if not _due_accounts(now).filter(user_id=user_id).exists():
        return None
    installation = Installation.read_name()  # before the transaction, which would hold up others while it is made
    try:
        with transaction.atomic(durable=True):
            account = (
                TokenAccount.objects.select_for_update(of=("self",))
                .select_related("auto_recharge_package")
                .get(user_id=user_id)
            )
            # Asked again, in a statement of its own: it sees what the lock's last holder has committed.
            if not _due_accounts(now).filter(pk=account.pk).exists():
                return None
            return _new_attempt(account, now, installation)
    except IntegrityError:
        return None  # another one was quicker, and the unique index saw what a lock did not


def _new_attempt(account: TokenAccount, now: datetime, installation: str) -> Purchase | None:
    package = account.auto_recharge_package
    price_cents = package.price_cents(account.currency) if package and package.is_active else None
    if package is None or price_cents is None:
        _switch_off_for_package(account, "The package is not on sale any more. Choose another one to go on.")
        return None
    if not _is_agreed(account, package, price_cents):
        now_words = f"The package is now {package.tokens:,} tokens for {display_price(price_cents, account.currency)}."
        agreed_words = f" You agreed to {account.auto_recharge_terms}." if account.auto_recharge_terms else ""
        _switch_off_for_package(account, f"{now_words}{agreed_words} Choose again to go on.")
        return None
    cap_cents = account.auto_recharge_monthly_cap_cents
    if cap_cents is not None and _spent_this_month_cents(account, now) + price_cents > cap_cents:
        cap = display_price(cap_cents, account.currency)
        account.auto_recharge_retry_at = _next_month(now)
        account.auto_recharge_last_outcome = f"This month's limit of {cap} leaves no room for another package."
        account.save(update_fields=["auto_recharge_retry_at", "auto_recharge_last_outcome"])
        return None
    return Purchase.objects.create(
        account=account,
        user_id=account.user_id,
        workspace_id=account.workspace_id,
        kind=Purchase.Kind.AUTO_RECHARGE,
        package=package,
        package_name=package.name,
        tokens=package.tokens,
        amount_cents=price_cents,
        currency=account.currency,
        checked_at=now,
        installation=installation,
        # A retry must send what was sent the first time, also when the card has changed meanwhile.
        metadata={
            "customer_id": account.stripe_customer_id,
            "payment_method_id": account.stripe_payment_method_id,
        },
    )


def _switch_off_for_package(account: TokenAccount, reason: str) -> None:
    switch_off(account_id=account.pk, reason=reason, key=f"package-{account.pk}-{account.sequence}")


def _is_agreed(account: TokenAccount, package: TokenPricing, price_cents: int) -> bool:
    """Whether the package is at least as good for its buyer as when they chose it."""
    agreed_cents, agreed_tokens = account.auto_recharge_price_cents, account.auto_recharge_package_tokens
    return (
        agreed_cents is not None
        and agreed_tokens is not None
        and price_cents <= agreed_cents
        and package.tokens >= agreed_tokens
    )


def _month_of(now: datetime) -> datetime:
    return now.astimezone(UTC).replace(day=1, hour=0, minute=0, second=0, microsecond=0)


def _next_month(now: datetime) -> datetime:
    return _month_of(_month_of(now) + timedelta(days=32))


def _spent_this_month_cents(account: TokenAccount, now: datetime) -> int:
    """What auto-recharge took this month, or may be taking. Money given back later was taken all the same."""
    counted = Purchase.objects.filter(
        Q(state__in=Purchase.PENDING_STATES)
        | Q(paid_at__gte=_month_of(now))
        | Q(state=State.REVIEW, created_at__gte=_month_of(now)),
        account=account,
        kind=Purchase.Kind.AUTO_RECHARGE,
    )
    return counted.aggregate(total=Sum("amount_cents"))["total"] or 0


def _charge(purchase: Purchase) -> None:
    """Ask for the money under the attempt's own key, and write down what came of it. No answer leaves it as it is."""
    try:
        payment = gateway.charge_saved_card(
            purchase_id=purchase.pk,
            customer_id=purchase.metadata["customer_id"],
            payment_method_id=purchase.metadata["payment_method_id"],
            amount_cents=purchase.amount_cents,
            currency=purchase.currency,
            description=f"{purchase.package_name}: {purchase.tokens:,} tokens",
            # One key for the attempt's whole life. While Stripe may have charged, there is no other one.
            idempotency_key=purchase.stripe_key("recharge"),
        )
    except CardDeclined as error:
        if error.payment_intent is not None:
            apply_payment_intent(error.payment_intent)
        else:
            _end(purchase, partial(_fail, code=error.code, message=error.message))
    except GatewayUnavailable as error:
        logger.warning("An auto-recharge has no answer yet", **purchases.log_ids(purchase), error=error.__cause__)
    except (GatewayBroken, GatewayKeyConflict) as error:
        # Under the key there is another answer for good. What became of the attempt, only Stripe's list tells.
        logger.error("An auto-recharge met a fault of Stripe's", **purchases.log_ids(purchase), error=error.__cause__)
        _look_up(purchase, or_else=_close_uncharged)
    except GatewayRefused as error:
        logger.error("An auto-recharge was refused", **purchases.log_ids(purchase), error=error.__cause__)
        _end_refused(purchase)
    else:
        apply_payment_intent(payment)


def _end_refused(purchase: Purchase) -> None:
    """Close an attempt that Stripe does not carry out: for the card or customer that it does not have any more, which
    their owner can mend, or for a reason of our own, which they cannot. Out of reach, it stays as it is."""
    try:
        has_card = gateway.has_card(purchase.metadata["customer_id"], purchase.metadata["payment_method_id"])
    except GatewayError as error:
        ids, cause = purchases.log_ids(purchase), error.__cause__ or error
        logger.warning("A card could not be looked up", **ids, error=cause)
        return
    if has_card:
        _look_up(purchase, or_else=partial(_close_uncharged, retry_after=RETRY_AFTER_REFUSAL))
    else:
        _look_up(purchase, or_else=_refuse)
        refresh_card(user_id=purchase.user_id)


def _look_up(purchase: Purchase, *, or_else: Callable[[Purchase], None]) -> None:
    """Apply the attempt's payment if Stripe has one, `or_else` close the attempt. Out of reach, it stays as it is."""
    try:
        payment = gateway.find_payment_intent(
            purchase_id=purchase.pk, customer_id=purchase.metadata["customer_id"], since=purchase.created_at
        )
        if payment is not None and payment.status == "requires_confirmation":  # made, and nobody was asked for money
            payment = gateway.cancel_payment_intent(payment.id)
    except GatewayRefused:
        payment = None  # no such customer, hence no such payment
    except GatewayError as error:
        ids, cause = purchases.log_ids(purchase), error.__cause__ or error
        logger.warning("An auto-recharge could not be looked up", **ids, error=cause)
        return
    if payment is not None:
        apply_payment_intent(payment)
    else:
        _end(purchase, or_else)


@repeated_after_conflicts
def _end(purchase: Purchase, close: Callable[[Purchase], None]) -> None:
    """Run `close` on the locked attempt, unless it has come to an end meanwhile."""
    with transaction.atomic():
        locked = Purchase.objects.select_for_update().get(pk=purchase.pk)
        if locked.is_pending:
            close(locked)


# --- What Stripe says about it --------------------------------------------------------------------------------------


@repeated_after_conflicts
def apply_payment_intent(payment: PaymentIntent, *, asked: Asked | None = None) -> Purchase:
    """Bring the attempt behind a payment up to what Stripe says: credit it, fail it, or note what it waits for.

    A purchase by Checkout is credited too, but never failed: its page lets the buyer try again. Raises
    PurchaseNotFound when no purchase of ours is behind the payment; AskAgain when an event (`asked`: what Stripe was
    asked about since) would end an attempt that its owner may have taken up again.
    """
    with transaction.atomic():
        purchase = purchases.apply_payment_intent(payment, asked=asked)
        if purchase.kind != Purchase.Kind.AUTO_RECHARGE or not purchase.is_pending:
            return purchase
        if purchase.stripe_payment_intent_id is None:
            purchase.stripe_payment_intent_id = payment.id
            purchase.save(update_fields=["stripe_payment_intent_id"])
        if payment.status == "requires_payment_method" and purchase.state != State.CREATED:
            purchases.require_asked(purchase, payment.id, asked)
        if payment.needs_authentication:
            _await_confirmation(purchase)
        elif payment.status == "processing":
            set_state(purchase, State.PROCESSING, "Your bank needs a while to confirm the payment.")
        elif payment.status == "canceled" and purchase.state == State.CREATED:
            _close_uncharged(purchase)
        elif payment.status == "canceled":
            _fail(purchase, state=State.EXPIRED, message="The payment was not confirmed in time.")
        elif payment.status == "requires_payment_method":
            message = payment.failure_message or "The card was declined."
            _fail(purchase, code=payment.failure_code or "card_declined", message=message)
    return purchase


def _await_confirmation(purchase: Purchase) -> None:
    # An old event that says so cannot take a payment back that the owner has confirmed meanwhile.
    if purchase.state == State.CREATED:
        set_state(purchase, State.ACTION_REQUIRED, "Your bank wants you to confirm this payment.")
        _note_outcome(purchase, "Your bank wants you to confirm the payment.")
        messages.auto_recharge_needs_confirmation(purchase)


def _fail(purchase: Purchase, *, message: str, code: str = "", state: str = State.FAILED) -> None:
    """Close a locked attempt that brought no money and count it: try again later, or switch off, and tell the user."""
    set_state(purchase, state, message, failure_code=code)
    account = TokenAccount.objects.select_for_update().get(pk=purchase.account_id)
    account.auto_recharge_failures += 1
    failures = account.auto_recharge_failures
    is_last = failures > len(RETRY_AFTER_DECLINE) or code in HOPELESS_CODES
    will_retry = account.auto_recharge_enabled and not is_last
    account.auto_recharge_retry_at = database.now() + RETRY_AFTER_DECLINE[failures - 1] if will_retry else None
    if account.auto_recharge_enabled:
        account.auto_recharge_last_outcome = message[:200]
    account.save(
        update_fields=["auto_recharge_failures", "auto_recharge_retry_at", "auto_recharge_last_outcome"],
    )
    if account.auto_recharge_enabled and is_last:
        tries = "" if failures == 1 else f"{failures} payments in a row failed, the last one with: "
        switch_off(account_id=account.pk, reason=tries + message, key=str(purchase.pk))
    else:
        messages.auto_recharge_failed(purchase, retry_at=account.auto_recharge_retry_at)


def _close_uncharged(purchase: Purchase, *, retry_after: timedelta = RETRY_AFTER_FAULT) -> None:
    """Close a locked attempt that never reached the card: no decline, so it does not count as one."""
    message = "The payment service had a problem. Your card was not charged."
    set_state(purchase, State.FAILED, message)
    TokenAccount.objects.filter(pk=purchase.account_id, auto_recharge_enabled=True).update(
        auto_recharge_retry_at=database.now() + retry_after, auto_recharge_last_outcome=message
    )


def _refuse(purchase: Purchase) -> None:
    """Close a locked attempt whose card or customer Stripe does not have any more."""
    message = "The saved card cannot be charged any more."
    set_state(purchase, State.FAILED, message)
    switch_off(account_id=purchase.account_id, reason=message, key=str(purchase.pk))


def _note_outcome(purchase: Purchase, outcome: str) -> None:
    TokenAccount.objects.filter(pk=purchase.account_id, auto_recharge_enabled=True).update(
        auto_recharge_last_outcome=outcome
    )


# --- The owner confirms ---------------------------------------------------------------------------------------------


def start_confirmation(purchase: Purchase, *, return_url: str, confirm_key: str) -> str:
    """Try the payment again with the card's owner present. Returns the address of the bank's page, "" when there is
    none to visit (it was paid at once, or nothing waits for a confirmation).

    `confirm_key` is the form's: sent twice, it is one try. A card declined now ends the attempt. Raises GatewayError,
    AccountMayNotBuy.
    """
    if purchase.state != State.ACTION_REQUIRED:
        return ""
    account = TokenAccount.objects.get(pk=purchase.account_id)
    purchases.require_may_buy(account)
    try:
        payment = _confirm(purchase, account, return_url, confirm_key)
    except CardDeclined as error:
        if error.payment_intent is not None:
            apply_payment_intent(error.payment_intent)
        raise
    except GatewayRefused:
        # An earlier try may have paid it without an answer that reached us.
        payment = gateway.retrieve_payment_intent(str(purchase.stripe_payment_intent_id))
        if payment.status != "succeeded":
            raise
    finally:
        # The page that follows asks anew, however quick its owner is and whatever came of this.
        Purchase.objects.filter(pk=purchase.pk).update(checked_at=None)
    apply_payment_intent(payment)
    return payment.action_url


def _confirm(purchase: Purchase, account: TokenAccount, return_url: str, confirm_key: str) -> PaymentIntent:
    """Confirm with the card that is saved now. One that Stripe does not have any more makes room for the one it has."""
    for key in (confirm_key, f"{confirm_key}-2"):
        payment_method_id = account.stripe_payment_method_id or purchase.metadata["payment_method_id"]
        try:
            return gateway.confirm_payment_intent(
                str(purchase.stripe_payment_intent_id),
                payment_method_id=payment_method_id,
                return_url=return_url,
                idempotency_key=purchase.stripe_key("confirm", key),
            )
        except GatewayMissing as error:
            if error.parameter != "payment_method" or key != confirm_key:
                raise
            refresh_card(user_id=account.user_id)
            account.refresh_from_db()
            if account.stripe_payment_method_id in ("", payment_method_id):
                raise
    raise AssertionError


def refresh_from_stripe(purchase: Purchase) -> Purchase:
    """Ask Stripe how an attempt stands, at most every two seconds, for the page that waits for it.

    Stripe out of reach is no error: the page goes on waiting, and the webhook or the sweep will come.
    """
    if not purchase.is_pending or not purchase.stripe_payment_intent_id:
        return purchase
    if not claim(purchase, database.now(), again_after=purchases.PAGE_ASKS_AGAIN_AFTER):
        return purchase
    try:
        return apply_payment_intent(gateway.retrieve_payment_intent(purchase.stripe_payment_intent_id))
    except GatewayError as error:
        ids, cause = purchases.log_ids(purchase), error.__cause__ or error
        logger.warning("An auto-recharge could not be looked up", **ids, error=cause)
        return purchase


# --- The sweep ------------------------------------------------------------------------------------------------------


def sweep_auto_recharges(*, limit: int = 100) -> int:
    """Take up what was left lying: attempts without an answer, payments that wait, accounts whose trigger was lost.

    Returns how many attempts came to an end or were begun. Calls Stripe. May run twice at once.
    """
    now = database.now()
    # A question each, not a lock: whoever claims it first asks Stripe, and asking twice would do no harm.
    waiting = Purchase.objects.filter(
        Q(checked_at=None)
        | Q(state=State.CREATED, checked_at__lt=now - RESUME_AFTER)
        | Q(checked_at__lt=now - purchases.ASK_AGAIN_AFTER),
        kind=Purchase.Kind.AUTO_RECHARGE,
        state__in=Purchase.PENDING_STATES,
    ).order_by("checked_at", "id")
    moved = 0
    for purchase in waiting[:limit]:
        if not claim(purchase, now, again_after=RESUME_AFTER):
            continue
        try:
            _take_up(purchase, now)
        except GatewayError as error:
            ids, cause = purchases.log_ids(purchase), error.__cause__ or error
            logger.warning("An auto-recharge was not finished", **ids, error=cause)
        except Exception:  # one that cannot be read must not keep the others waiting
            logger.exception("An auto-recharge was not finished", **purchases.log_ids(purchase))
        purchase.refresh_from_db()
        moved += not purchase.is_pending
    for user_id in _due_accounts(now).order_by("pk").values_list("user_id", flat=True)[:limit]:
        try:
            begun = trigger_auto_recharge(user_id=user_id)
        except Exception:
            logger.exception("An auto-recharge was not begun", user_id=user_id)
            continue
        moved += begun is not None
        if begun is not None and begun.state == State.CREATED:
            break  # Stripe is out of reach: the others are not helped by waiting for it one after another
    _sweep_details(now, limit=limit)
    return moved


def _take_up(purchase: Purchase, now: datetime) -> None:
    """Bring one attempt nearer to its end. Raises GatewayError, PurchaseNotFound."""
    is_on = TokenAccount.objects.filter(
        TokenAccount.MAY_BUY, pk=purchase.account_id, auto_recharge_enabled=True
    ).exists()
    if purchase.state == State.CREATED:
        if is_on and purchase.created_at > now - purchases.RETRY_WITHIN:
            _charge(purchase)
        else:  # not wanted any more, or too old for its key: only what Stripe has done counts
            _look_up(purchase, or_else=_close_uncharged)
        return
    payment_intent_id = str(purchase.stripe_payment_intent_id)
    try:
        purchase = apply_payment_intent(gateway.retrieve_payment_intent(payment_intent_id))
    except GatewayMissing:  # of the other mode: nothing is ever paid by it
        _end(purchase, _close_uncharged)
        return
    if purchase.state == State.ACTION_REQUIRED and (not is_on or purchase.created_at < now - CONFIRM_WITHIN):
        # Given up at Stripe first: what is closed here must not be paid there.
        try:
            payment = gateway.cancel_payment_intent(payment_intent_id)
        except GatewayRefused:  # its owner was quicker
            payment = gateway.retrieve_payment_intent(payment_intent_id)
        apply_payment_intent(payment)


# --- The saved card -------------------------------------------------------------------------------------------------


def remember_card(*, purchase_id: int) -> None:
    """Fetch a paid purchase's receipt, and keep the card of a Checkout for later, if Stripe has saved it.

    Calls Stripe. Raises GatewayError; the sweep comes back to it.
    """
    purchase = Purchase.objects.filter(pk=purchase_id, state=State.PAID, stripe_payment_intent_id__isnull=False).first()
    if purchase is None:
        return
    _keep_details(purchase, gateway.retrieve_payment_intent(str(purchase.stripe_payment_intent_id)))


@repeated_after_conflicts
def _keep_details(purchase: Purchase, payment: PaymentIntent) -> None:
    with transaction.atomic():
        # Its row first: whoever anonymises the account meanwhile clears it before this, or after it.
        Purchase.objects.select_for_update().get(pk=purchase.pk)
        is_anonymised = TokenAccount.objects.filter(
            pk=purchase.account_id, status_reason=TokenAccount.ANONYMISED
        ).exists()
        Purchase.objects.filter(pk=purchase.pk).update(
            checked_at=database.now(),
            payment_method_type=payment.payment_method_type,
            **dict.fromkeys(("receipt_url", "card_brand", "card_last4"), "")
            if is_anonymised
            else {
                "receipt_url": payment.receipt_url,
                "card_brand": payment.card_brand,
                "card_last4": payment.card_last4,
            },
        )
        bought_again = Purchase.objects.filter(
            account=purchase.account_id, kind=Purchase.Kind.CHECKOUT, paid_at__gt=purchase.paid_at
        )
        is_theirs = TokenAccount.objects.filter(
            pk=purchase.account_id, stripe_customer_id__isnull=False, stripe_customer_id=payment.customer_id
        )
        if (
            purchase.kind == Purchase.Kind.CHECKOUT
            and payment.is_card_saved
            and payment.card_last4  # a bank account is no card
            and is_theirs.exists()
            and not bought_again.exists()
        ):
            card = gateway.SavedCard(payment.payment_method_id, payment.card_brand, payment.card_last4)
            _keep_card(purchase.account_id, card)


def _keep_card(account_id: int, card: gateway.SavedCard) -> tuple[str, TokenAccount]:
    """Store the card, unless its owner is nobody by now or its bank has warned of it. Another one than before starts
    without the declines of the one before. Returns the id of the one before, and the account as it is now.

    In the caller's transaction, with the account locked first: a warning that came meanwhile is seen by what follows.
    """
    was = TokenAccount.objects.select_for_update().get(pk=account_id).stripe_payment_method_id
    is_distrusted = Purchase.objects.filter(account=OuterRef("pk"), metadata__distrusted_card=card.payment_method_id)
    accounts = TokenAccount.objects.filter(~Exists(is_distrusted), pk=account_id).exclude(
        status_reason=TokenAccount.ANONYMISED
    )
    accounts.exclude(stripe_payment_method_id=card.payment_method_id).update(
        auto_recharge_failures=0, auto_recharge_retry_at=None
    )
    accounts.update(stripe_payment_method_id=card.payment_method_id, card_brand=card.brand, card_last4=card.last4)
    return was, TokenAccount.objects.get(pk=account_id)


def _sweep_details(now: datetime, *, limit: int) -> None:
    """Fetch the receipts and cards whose task was lost: `checked_at` tells whether Stripe was asked since."""
    missing = Purchase.objects.filter(
        Q(checked_at=None) | Q(checked_at__lt=F("paid_at")),
        state=State.PAID,
        stripe_payment_intent_id__isnull=False,
        created_at__gt=now - DETAILS_WITHIN,
        paid_at__lt=now - purchases.WEBHOOK_GRACE,
    )
    for purchase_id in missing.values_list("pk", flat=True)[:limit]:
        try:
            remember_card(purchase_id=purchase_id)
        except GatewayError as error:
            logger.warning("A card was not fetched", purchase_id=purchase_id, error=error.__cause__ or error)
            return


def refresh_card(*, user_id: int) -> None:
    """Ask Stripe which card the customer has now: after their visit to its page, or when a charge was refused.

    Without a card, auto-recharge is switched off with a notice. Stripe out of reach is no error: what we know stays.
    """
    account = TokenAccount.objects.get(user_id=user_id)
    if not account.stripe_customer_id:
        return
    try:
        card = gateway.retrieve_saved_card(account.stripe_customer_id, preferred_id=account.stripe_payment_method_id)
    except GatewayMissing:
        customers.forget_customer(customer_id=account.stripe_customer_id)
        return
    except GatewayError as error:
        logger.warning("A card could not be looked up", user_id=user_id, error=error.__cause__ or error)
        return
    if card is None:
        customers.forget_card(payment_method_id=account.stripe_payment_method_id)
    else:
        with transaction.atomic():
            was, account = _keep_card(account.pk, card)
            if was not in ("", account.stripe_payment_method_id):
                messages.saved_card_changed(account, key=database.now().isoformat())


def open_card_page(*, user_id: int, return_url: str) -> str:
    """The address of Stripe's page where the user changes or removes their card, "" when they have none to change.

    Raises GatewayError.
    """
    account = TokenAccount.objects.get(user_id=user_id)
    if not account.stripe_customer_id:
        return ""
    try:
        return gateway.create_portal_session(customer_id=account.stripe_customer_id, return_url=return_url)
    except GatewayMissing:
        customers.forget_customer(customer_id=account.stripe_customer_id)
        return ""


def distrust_card(purchase: Purchase, payment_method_id: str, *, key: str) -> bool:
    """A bank says that the card's owner knows nothing of a locked purchase: nothing is charged by itself any more, and
    the card is not kept for it, whoever switches it on again. In the caller's transaction; `key` names the warning.

    Returns whether that is news: told again, it does not touch another card that its owner has charged since.
    """
    if "distrusted_card" in purchase.metadata:
        return False
    TokenAccount.objects.select_for_update().get(pk=purchase.account_id)  # whoever keeps the card now is done, or waits
    purchase.metadata = {**purchase.metadata, "distrusted_card": payment_method_id}
    purchase.save(update_fields=["metadata"])
    reason = "Your bank reported a payment as made without your consent."
    switch_off(account_id=purchase.account_id, reason=reason, key=key)
    TokenAccount.objects.filter(pk=purchase.account_id, stripe_payment_method_id=payment_method_id).exclude(
        stripe_payment_method_id=""
    ).update(stripe_payment_method_id="", card_brand="", card_last4="")
    return True


def update_card(card: gateway.SavedCard) -> None:
    """The bank has sent its owner a new card under the same contract: only what is shown of it changes."""
    TokenAccount.objects.filter(stripe_payment_method_id=card.payment_method_id).update(
        card_brand=card.brand, card_last4=card.last4
    )


def refresh_card_of(*, customer_id: str) -> None:
    """Have a worker look up the customer's card after the commit."""
    user_id = TokenAccount.objects.filter(stripe_customer_id=customer_id).values_list("user_id", flat=True).first()
    if user_id is not None:
        enqueue_on_commit("billing.tasks.refresh_card", user_id)
