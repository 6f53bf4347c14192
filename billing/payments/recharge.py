"""Auto-recharge: a package bought with the saved card while its owner is away, when the balance runs low.

An attempt is a purchase, committed before Stripe is called. Whatever happens then, a crash on any line or a time-out
after the money has moved, the attempt stays under way, and the sweep takes it up with the same idempotency key: Stripe
answers what it did. Only an attempt whose outcome is known makes room for another one (law 13, kept by the account's
lock and a unique index).

What may follow an attempt that brought no money is decided in `_fail` alone.
"""

from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from functools import partial

import structlog
from django.db import IntegrityError, transaction
from django.db.models import Exists, OuterRef, Q, QuerySet, Sum

from billing import ledger
from billing.models import Installation, Purchase, TokenAccount, TokenPricing
from billing.models.account import AVAILABLE_TOKENS
from billing.notifications import messages
from billing.payments import customers, gateway, purchases
from billing.payments.cards import refresh_card, sweep_details
from billing.payments.gateway import (
    CardDeclined,
    GatewayBroken,
    GatewayError,
    GatewayKeyConflict,
    GatewayMissing,
    GatewayRefused,
    GatewayUnavailable,
)
from billing.payments.objects import Asked, PaymentIntent
from billing.payments.purchases import claim, set_state
from billing.payments.recharge_settings import forget_declines, note_outcome, switch_off
from billing.pricing import display_price
from kit import database
from kit.database import repeated_after_conflicts

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
CONFIRM_WITHIN = timedelta(hours=24)


# --- An attempt -----------------------------------------------------------------------------------------------------


def trigger_auto_recharge(*, user_id: int | None = None, account_id: int | None = None) -> Purchase | None:
    """Buy the package of an account, or of the user's own, with its saved card and no other, if it is time for that.
    Returns the attempt, None when it is not.

    Safe to call at any time and any number of times: two calls at the same moment make one attempt,
    and the monthly cap holds. Calls Stripe, so never call it inside a transaction. Raises PurchaseNotFound
    when Stripe's answer is not about our attempt.
    """
    purchase = _open_attempt(ledger.Party(user_id, account_id))
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
        ~customers.is_distrusted(OuterRef("card_fingerprint"), OuterRef("stripe_payment_method_id")),
        TokenAccount.MAY_BUY,
        Q(auto_recharge_retry_at=None) | Q(auto_recharge_retry_at__lte=now),
        auto_recharge_enabled=True,
        auto_recharge_threshold_tokens__gt=AVAILABLE_TOKENS,
        stripe_customer_id__isnull=False,
    ).exclude(stripe_payment_method_id="")


@repeated_after_conflicts
def _open_attempt(payer: ledger.Party) -> Purchase | None:
    """Commit an attempt that Stripe does not know of yet, if the account wants one and may have it."""
    now = database.now()
    # Without the lock first: most debits below the threshold find an attempt under way.
    if not _due_accounts(now).filter(**payer.of_account).exists():
        return None
    installation = Installation.read_name()  # before the transaction, which would hold up others while it is made
    try:
        with transaction.atomic(durable=True):
            account = (
                TokenAccount.objects.select_for_update(of=("self",))
                .select_related("auto_recharge_package")
                .get(**payer.of_account)
            )
            # Asked again, in a statement of its own: it sees what the lock's last holder has committed.
            if not _due_accounts(now).filter(pk=account.pk).exists():
                return None
            return _new_attempt(account, now, installation)
    except IntegrityError:
        return None  # another one was quicker, and the unique index saw what a lock did not


def _new_attempt(account: TokenAccount, now: datetime, installation: str) -> Purchase | None:
    package = account.auto_recharge_package
    key = f"package-{account.pk}-{account.sequence}"
    price_cents = package.price_cents(account.currency) if package and package.is_active else None
    if package is None or price_cents is None:
        switch_off(
            account_id=account.pk, key=key, reason="The package is not on sale any more. Choose another one to go on."
        )
        return None
    if not _is_agreed(account, package, price_cents):
        now_words = f"The package is now {package.tokens:,} tokens for {display_price(price_cents, account.currency)}."
        agreed_words = f" You agreed to {account.auto_recharge_terms}." if account.auto_recharge_terms else ""
        switch_off(account_id=account.pk, key=key, reason=f"{now_words}{agreed_words} Choose again to go on.")
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
            installation=purchase.installation,
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
            apply_answer(error.payment_intent)
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
        apply_answer(payment)


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
        refresh_card(account_id=purchase.account_id)


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
        apply_answer(payment)
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
def apply_answer(payment: PaymentIntent) -> Purchase:
    """Bring the attempt behind a payment up to what Stripe has just answered. Raises PurchaseNotFound."""
    with transaction.atomic():
        purchase = purchases.lock_purchase_behind(payment)
        apply_payment(purchase, payment)
    return purchase


def apply_payment(purchase: Purchase, payment: PaymentIntent, *, asked: Asked | None = None) -> None:
    """Bring a locked attempt up to what Stripe says: credit it, fail it, or note what it waits for.

    Raises AskAgain when an event (`asked`: what Stripe was asked about since) would end an attempt that its owner may
    have taken up again.
    """
    if payment.status == "succeeded":
        if asked is None or not purchases.is_settled(purchase):
            purchases.credit(
                purchase,
                amount_cents=payment.amount_received_cents,
                currency=payment.currency,
                payment_intent_id=payment.id,
                after=_after_credit,
            )
        return
    if not purchase.is_pending:
        return
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


def _after_credit(purchase: Purchase) -> None:
    forget_declines(TokenAccount.objects.filter(pk=purchase.account_id))
    note_outcome(purchase.account_id, f"{purchase.tokens:,} tokens were bought for {purchase.price_display}.")
    messages.auto_recharge_succeeded(purchase)


def _await_confirmation(purchase: Purchase) -> None:
    # An old event that says so cannot take a payment back that the owner has confirmed meanwhile.
    if purchase.state == State.CREATED:
        set_state(purchase, State.ACTION_REQUIRED, "Your bank wants you to confirm this payment.")
        note_outcome(purchase.account_id, "Your bank wants you to confirm the payment.")
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
    for account_id in _due_accounts(now).order_by("pk").values_list("pk", flat=True)[:limit]:
        try:
            begun = trigger_auto_recharge(account_id=account_id)
        except Exception:
            logger.exception("An auto-recharge was not begun", account_id=account_id)
            continue
        moved += begun is not None
        if begun is not None and begun.state == State.CREATED:
            break  # Stripe is out of reach: the others are not helped by waiting for it one after another
    sweep_details(now, limit=limit)
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
        purchase = apply_answer(gateway.retrieve_payment_intent(payment_intent_id))
    except GatewayMissing:  # of the other mode: nothing is ever paid by it
        _end(purchase, _close_uncharged)
        return
    if purchase.state == State.ACTION_REQUIRED and (not is_on or purchase.created_at < now - CONFIRM_WITHIN):
        # Given up at Stripe first: what is closed here must not be paid there.
        try:
            payment = gateway.cancel_payment_intent(payment_intent_id)
        except GatewayRefused:  # its owner was quicker
            payment = gateway.retrieve_payment_intent(payment_intent_id)
        apply_answer(payment)
