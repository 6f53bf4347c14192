"""What its owner has set of auto-recharge, how it stands, and what switches it off.

Its fields of the account are written here and by its attempts (`recharge.py`), and by nothing else.
"""

from dataclasses import dataclass

from django.core.exceptions import ValidationError
from django.db import transaction
from django.db.models import QuerySet

from billing import ledger
from billing.catalogue import packages
from billing.models import Purchase, TokenAccount, TokenPricing
from billing.notifications import messages
from billing.pricing import display_price
from kit import database
from kit.database import repeated_after_conflicts
from kit.on_commit import enqueue_on_commit

State = Purchase.State

# Ways to pay that are not kept, as people call them.
METHOD_NAMES = {
    "link": "Link", "us_bank_account": "bank debit", "sepa_debit": "bank debit", "acss_debit": "bank debit",
    "bacs_debit": "bank debit", "paypal": "PayPal", "amazon_pay": "Amazon Pay", "ideal": "iDEAL",
}  # fmt: skip


@repeated_after_conflicts
def update_auto_recharge(
    *,
    user_id: int | None = None,
    account_id: int | None = None,
    enabled: bool,
    threshold_tokens: int,
    package_id: int | None,
    monthly_cap_cents: int | None = None,
) -> TokenAccount:
    """Save the settings of an account, or of the user's own: buy the package when fewer than `threshold_tokens` are
    available, for at most `monthly_cap_cents` in a calendar month (UTC). The package's tokens and price of now are what
    they agree to.

    Raises ValidationError naming each wrong field; then nothing is changed. Switching it off lets a charge under way
    come to its end. Switched on below the threshold, it recharges at once. The owner is told of what is on.
    """
    with transaction.atomic():
        payer = ledger.Party(user_id, account_id)
        account = TokenAccount.objects.select_for_update().get(**payer.of_account)
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
            enqueue_on_commit("billing.tasks.auto_recharge", None, account.pk)
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


def switch_off(*, account_id: int, reason: str, key: str) -> bool:
    """Switch auto-recharge off and tell the user why, in the caller's transaction. `key` names what caused it.

    Returns whether it was on. A charge under way comes to its end.
    """
    was_on = TokenAccount.objects.filter(pk=account_id, auto_recharge_enabled=True).update(
        auto_recharge_enabled=False, auto_recharge_retry_at=None, auto_recharge_last_outcome=reason[:200]
    )
    if was_on:
        account = TokenAccount.objects.select_related("user", "workspace").get(pk=account_id)
        messages.auto_recharge_switched_off(account, reason=reason, key=key)
    return bool(was_on)


def forget_declines(accounts: QuerySet[TokenAccount]) -> None:
    """Begin anew: the declines and waits of before belong to another card, or to a payment that has come since."""
    accounts.update(auto_recharge_failures=0, auto_recharge_retry_at=None)


def note_outcome(account_id: int, outcome: str) -> None:
    """Where it is off by now, why it is off stays there to be read."""
    TokenAccount.objects.filter(pk=account_id, auto_recharge_enabled=True).update(auto_recharge_last_outcome=outcome)
