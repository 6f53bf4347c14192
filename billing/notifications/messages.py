"""What there is to tell: one function per message."""

from datetime import UTC, datetime
from typing import Any

from django.urls import reverse
from django.utils import timezone

from accounts import teams
from accounts.models import User
from accounts.time_zones import zone_of
from billing.models import (
    PaymentReversal,
    Purchase,
    TokenAccount,
    TokenTransaction,
)
from billing.models.notification import NotificationKind as Kind
from billing.notifications.inbox import Facts, notify
from billing.pricing import display_price
from kit.text import one_line


def purchase_confirmed(purchase: Purchase) -> None:
    """A purchase by Checkout was paid and credited."""
    what = f"the {purchase.package_name} package" if purchase.package_id else token_words(purchase.tokens)
    _tell(
        purchase.account,
        kind=Kind.PURCHASE_CONFIRMED,
        key=str(purchase.pk),
        title=f"{token_words(purchase.tokens)} were added",
        body=f"You paid {purchase.paid_display} for {what}. The tokens are in your balance and do not expire.",
        link=_tokens_page("transactions"),
        action="See it in your history",
        facts=_facts_of(purchase),
        second_link=("Receipt (PDF)", reverse("tokens:receipt", args=[purchase.pk])),
    )


def auto_recharge_succeeded(purchase: Purchase) -> None:
    """Auto-recharge charged the saved card and credited the tokens."""
    card = _card_of(purchase.account)
    _tell(
        purchase.account,
        kind=Kind.AUTO_RECHARGE_SUCCEEDED,
        key=str(purchase.pk),
        title=f"Auto-recharge added {token_words(purchase.tokens)}",
        body=(
            f"Your balance had fallen below the limit you set, so we bought the {purchase.package_name} package for "
            f"{purchase.price_display} with {f'your card, {card}' if card else 'your saved card'}."
        ),
        link=_tokens_page("transactions"),
        action="See it in your history",
        facts=[*_facts_of(purchase), *([("Card", card)] if card else [])],
        second_link=("Receipt (PDF)", reverse("tokens:receipt", args=[purchase.pk])),
    )


def auto_recharge_failed(purchase: Purchase, *, retry_at: datetime | None) -> None:
    """The saved card was not charged. `retry_at` is when it is tried again by itself, None when it is not."""
    card = _card_of(purchase.account)
    retry_words = _moment(retry_at, purchase.user) if retry_at else ""
    next_step = f"We will try again on {retry_words}." if retry_at else "We will not try again by ourselves."
    _tell(
        purchase.account,
        kind=Kind.AUTO_RECHARGE_FAILED,
        key=str(purchase.pk),
        title=f"We could not buy {token_words(purchase.tokens)} for you",
        body=" ".join(
            [
                f"Auto-recharge tried to pay {purchase.price_display} for the {purchase.package_name} package "
                f"with {f'your card, {card}' if card else 'your saved card'}, and the payment failed.",
                *([_sentence(purchase.message)] if purchase.message else []),
                f"Nothing was added. {next_step} You can use another card or buy tokens yourself.",
            ]
        ),
        link=_tokens_page("auto-recharge"),
        action="Check your card",
        facts=[
            *_facts_of(purchase, paid="Amount"),
            *([("Card", card)] if card else []),
            ("Next attempt", retry_words or "None planned"),
        ],
    )


def auto_recharge_needs_confirmation(purchase: Purchase) -> None:
    """The bank wants to see the card's owner before it pays."""
    card = _card_of(purchase.account)
    _tell(
        purchase.account,
        kind=Kind.AUTO_RECHARGE_NEEDS_CONFIRMATION,
        key=str(purchase.pk),
        title=f"Please confirm a payment of {purchase.price_display}",
        body=(
            f"Auto-recharge wanted to buy {token_words(purchase.tokens)} for you, and your bank asks you to confirm "
            "the payment first. It takes a minute. The tokens are added as soon as you have confirmed."
        ),
        link=reverse("tokens:confirm", args=[purchase.pk]),
        action="Confirm the payment",
        facts=[*_facts_of(purchase, paid="Amount"), *([("Card", card)] if card else [])],
    )


def auto_recharge_switched_off(account: TokenAccount, *, reason: str, key: str) -> None:
    """Auto-recharge is off now, and not because its owner switched it off. `reason` is for the person."""
    _tell(
        account,
        kind=Kind.AUTO_RECHARGE_SWITCHED_OFF,
        key=key,
        title="Auto-recharge was switched off",
        body=(
            f"{_sentence(reason)} Your card will not be charged again until you switch auto-recharge back on. "
            f"{_left_sentence(account)}"
        ),
        link=_tokens_page("auto-recharge"),
        action="Look at auto-recharge",
    )


NOT_YOU = "If this was not you, switch it off, change your password and write to us."


def auto_recharge_switched_on(account: TokenAccount, *, key: str) -> None:
    """Somebody signed in as the account's owner has switched auto-recharge on, or changed it. `key` names the save."""
    card = _card_of(account)
    cap_cents = account.auto_recharge_monthly_cap_cents
    limit = f"for at most {display_price(cap_cents, account.currency)} a month" if cap_cents else "without a limit"
    _tell(
        account,
        kind=Kind.AUTO_RECHARGE_SWITCHED_ON,
        key=key,
        title="Auto-recharge is on",
        body=(
            f"When fewer than {token_words(account.auto_recharge_threshold_tokens)} are available, we buy "
            f"{account.auto_recharge_terms} with {f'your card, {card}' if card else 'your saved card'}, {limit}. "
            f"{NOT_YOU}"
        ),
        link=_tokens_page("auto-recharge"),
        action="Look at auto-recharge",
    )


def saved_card_changed(account: TokenAccount, *, key: str) -> None:
    """The card that auto-recharge charges was replaced at Stripe. `key` names the change: back to a card of before is
    told, too."""
    _tell(
        account,
        kind=Kind.SAVED_CARD_CHANGED,
        key=key,
        title="Your saved card was replaced",
        body=f"Auto-recharge, where it is on, now charges {_card_of(account)}. {NOT_YOU}",
        link=_tokens_page("auto-recharge"),
        action="Look at your card",
    )


def low_balance(account: TokenAccount, *, key: str) -> None:
    """The available tokens have fallen to the low mark. `key` names the crossing, so that it is said once."""
    _tell(
        account,
        kind=Kind.LOW_BALANCE,
        key=key,
        title="Your balance is running low",
        body=f"{_left_sentence(account)} Buy more in time, so that your work can go on.",
        link=_tokens_page("packages"),
        action="Buy tokens",
    )


def critical_balance(account: TokenAccount, *, key: str) -> None:
    """The available tokens have fallen below the critical mark. `key` names the crossing, so that it is said once."""
    _tell(
        account,
        kind=Kind.CRITICAL_BALANCE,
        key=key,
        title="Your tokens are almost used up" if account.available > 0 else "Your tokens are used up",
        body=f"{_left_sentence(account)} Drafts and images will not start until you buy more.",
        link=_tokens_page("packages"),
        action="Buy tokens",
    )


def grant_received(account: TokenAccount, *, tokens: int, reason: str, key: str) -> None:
    """An admin gave tokens; `account` is the one after it."""
    _tell(
        account,
        kind=Kind.GRANT_RECEIVED,
        key=key,
        title=f"You received {token_words(tokens)}",
        body=f"The Postmate team added them to your balance. The reason they gave: {_sentence(reason)}",
        link=_tokens_page("transactions"),
        action="See your balance",
        facts=[("Tokens", f"{tokens:,}"), ("Reason", reason), ("Balance now", f"{account.balance:,}")],
    )


def tokens_deducted(account: TokenAccount, *, tokens: int, reason: str, key: str) -> None:
    """An admin took tokens; `account` is the one after it."""
    _tell(
        account,
        kind=Kind.TOKENS_DEDUCTED,
        key=key,
        title=f"{token_words(tokens)} were taken from your balance",
        body=f"The Postmate team took them. The reason they gave: {_sentence(reason)} Contact support if it is wrong.",
        link=_tokens_page("transactions"),
        action="See your balance",
        facts=[("Tokens", f"{tokens:,}"), ("Reason", reason), ("Balance now", f"{account.balance:,}")],
    )


def account_status_changed(account: TokenAccount, *, reason: str, key: str) -> None:
    """A superadmin suspended, blocked or reactivated the account; `account` is the one after it."""
    if account.has_debt:
        title, body = (
            "Your account is open again, once the debt is paid",
            "Buy tokens to go on; they pay the debt first.",
        )
    elif account.status == TokenAccount.Status.ACTIVE:
        title, body = "Your account is open again", "Drafts and images start as before."
    else:
        title = f"Your account was {account.status}"
        body = "New drafts and images do not start. Your tokens stay yours. Contact support to have it reopened."
    _tell(
        account,
        kind=Kind.ACCOUNT_STATUS_CHANGED,
        key=key,
        title=title,
        body=f"{body} The reason the Postmate team gave: {_sentence(reason)}",
        link=_tokens_page("transactions"),
        action="See your balance",
        facts=[("Reason", reason), ("Balance", f"{account.balance:,}")],
    )


def refund_applied(reversal: PaymentReversal, *, tokens: int) -> None:
    """Money went back to the buyer, and `tokens` were taken back for it. Without a purchase there is nobody to tell."""
    if reversal.purchase is None:
        return
    amount, balance_tokens = _amount_of(reversal), _balance_of(reversal.purchase)
    taken = f"{token_words(tokens)} were taken back from your balance" if tokens > 0 else "no tokens were taken back"
    _tell(
        reversal.purchase.account,
        kind=Kind.REFUND_APPLIED,
        key=str(reversal.pk),
        title=f"{amount} is on its way back to you",
        body=f"We refunded {amount} of your purchase, and {taken} for it. Most banks show a refund within 5 to 10 days."
        + _debt_sentence(balance_tokens),
        link=_tokens_page("transactions"),
        action="See it in your history",
        facts=[("Refunded", amount), *_facts_of_clawback(reversal.purchase, tokens, balance_tokens)],
    )


def refund_failed(reversal: PaymentReversal, *, tokens: int) -> None:
    """A refund that the buyer was told of came back to us, and `tokens` were given back."""
    if reversal.purchase is None:
        return
    amount = _amount_of(reversal)
    returned = f"{token_words(tokens)} are back in your balance" if tokens > 0 else "your balance stays as it is"
    _tell(
        reversal.purchase.account,
        kind=Kind.REFUND_FAILED,
        key=str(reversal.pk),
        title=f"The refund of {amount} did not go through",
        body=f"Your bank did not take the refund, so {returned}. Contact support to get the money another way.",
        link=_tokens_page("transactions"),
        action="See it in your history",
        facts=[("Refund", amount), ("Tokens given back", f"{tokens:,}")],
    )


def refund_refused(reversal: PaymentReversal, *, reason: str) -> None:
    """Stripe did not carry out what a superadmin had asked for, who may have left the page long ago."""
    if reversal.requested_by_id is None:
        return
    amount = _amount_of(reversal)
    notify(
        user_id=reversal.requested_by_id,
        kind=Kind.REFUND_REFUSED,
        key=str(reversal.pk),
        title=f"The refund of {amount} was not made",
        body=f"{_sentence(reason)} The buyer's tokens stay as they are.",
        link=reverse("dashboard:purchase", args=[reversal.purchase_id]),
        action="See the purchase",
        facts=[("Refund", amount), ("Purchase number", str(reversal.purchase_id))],
    )


def dispute_opened(reversal: PaymentReversal, *, tokens: int) -> None:
    """The buyer's bank disputes a payment, and `tokens` were taken back until it has decided."""
    if reversal.purchase is None:
        return
    amount, balance_tokens = _amount_of(reversal), _balance_of(reversal.purchase)
    taken = f"{token_words(tokens)} are held back" if tokens > 0 else "no tokens are held back"
    _tell(
        reversal.purchase.account,
        kind=Kind.DISPUTE_OPENED,
        key=f"{reversal.pk}-{reversal.status}-{_postings_of(reversal.purchase)}",
        title=f"Your payment of {amount} is disputed",
        body=(
            f"Your bank told us that this payment is disputed. Until it has decided, {taken} and auto-recharge is off. "
            "If this is a mistake, ask your bank to withdraw the dispute." + _debt_sentence(balance_tokens)
        ),
        link=_tokens_page("transactions"),
        action="See the payment",
        facts=[("Disputed", amount), *_facts_of_clawback(reversal.purchase, tokens, balance_tokens)],
    )


def dispute_moved(reversal: PaymentReversal, *, tokens: int) -> None:
    """The bank has decided, or money came back, which may be long after. `tokens` were given back; the rest of the
    payment's money is with the buyer, or on its way."""
    if reversal.purchase is None:
        return
    amount, balance_tokens = _amount_of(reversal), _balance_of(reversal.purchase)
    is_decided = reversal.status in PaymentReversal.DECIDED_STATUSES
    given_back = f"{token_words(tokens)} are back in your balance" if tokens else "your balance stays as it is"
    if not reversal.takes_money and is_decided:
        outcome = f"The payment of {amount} stands, and {given_back}."
    elif not is_decided:
        outcome = f"Money of it came back to us, and {given_back}."
    elif reversal.status == "won":
        outcome = f"The payment of {amount} stands, but {reversal.taken_display} of it have not come back to us yet. "
        outcome += f"Their tokens follow when they have; now {given_back}."
    elif reversal.taken_cents < reversal.amount_cents:
        outcome = f"The bank returned {reversal.taken_display} of {amount} to you, and {given_back}. "
        outcome += "The tokens of what it returned stay taken back."
    else:
        outcome = f"The bank returned {amount} to you. The tokens of that payment stay taken back."
    _tell(
        reversal.purchase.account,
        kind=Kind.DISPUTE_CLOSED,
        key=f"{reversal.pk}-{reversal.status}-{reversal.taken_cents}-{_postings_of(reversal.purchase)}",
        title=f"The dispute about {amount} is closed" if is_decided else f"The dispute about {amount} has moved",
        body=outcome + _debt_sentence(balance_tokens),
        link=_tokens_page("transactions"),
        action="See the payment",
        facts=[
            ("Disputed", amount),
            ("Tokens given back", f"{tokens:,}"),
            ("Balance now", f"{balance_tokens:,}"),
        ],
    )


def provider_refuses_us(*, provider: str, model: str, why: str) -> None:
    """Tell every admin, once a day for each reason, that a provider (by its name for people) does not accept our access
    to a model: nobody else can mend it. `why` is a sentence of ours, "" when the provider's words are not known."""
    reason = why or "It did not say why in words that are known here: the log has its status."
    for user_id in admin_ids():
        notify(
            user_id=user_id,
            kind=Kind.PROVIDER_REFUSES_US,
            key=f"{provider}:{timezone.now():%Y-%m-%d}:{reason}"[:150],
            title=f"{provider} does not accept our access",
            body=f"{reason} Until that is mended, what people ask of {model} fails. They are not charged.",
            link=reverse("tokens:notifications"),
            action="Open it in Postmate",
            facts=[("Provider", provider), ("Model", model)],
        )


def admin_ids() -> list[int]:
    admins = User.objects.filter(is_active=True, role__in=(User.Role.ADMIN, User.Role.SUPERADMIN))
    return list(admins.values_list("pk", flat=True))


# --- Helpers --------------------------------------------------------------------------------------------------------


def _tell(account: TokenAccount, *, kind: Kind, title: str, link: str, **message: Any) -> None:
    """Tell those who look after the account: its user, or a team's owners and admins, whom the title tells which team
    it is and the link takes there."""
    if account.user_id is None:
        title = f"{account.workspace.name}: {title}"
        link = reverse("team:enter", args=[account.workspace_id], query={"next": link})
    told = [account.user_id] if account.user_id else teams.manager_ids(account.workspace)
    for user_id in told:
        notify(user_id=user_id, kind=kind, title=title, link=link, **message)


def _sentence(text: str) -> str:
    text = one_line(text)
    return text if text.endswith((".", "!", "?", "…")) else f"{text}."


def count_words(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def token_words(number: int) -> str:
    return count_words(number, "token")


def _moment(at: datetime, user: User | None) -> str:
    """By the user's own clock, with its zone: "23 November 2026 at 08:00 CET". A team lives by no clock of its own."""
    return f"{at.astimezone(zone_of(user) if user else UTC):%-d %B %Y at %H:%M %Z}"


def _tokens_page(section: str) -> str:
    return f"{reverse('tokens:home')}#{section}"


def _card_of(account: TokenAccount) -> str:
    return f"{account.card_brand.title()} ending in {account.card_last4}" if account.card_last4 else ""


def _amount_of(reversal: PaymentReversal) -> str:
    return display_price(reversal.amount_cents, reversal.currency)


def _postings_of(purchase: Purchase) -> int:
    """How often tokens were taken back or given back for it: another round of a dispute is told anew."""
    return TokenTransaction.objects.filter(purchase=purchase, type=TokenTransaction.Type.REFUND).count()


def _balance_of(purchase: Purchase) -> int:
    """As it is now: the caller's account may be from before the posting."""
    return TokenAccount.objects.values_list("balance", flat=True).get(pk=purchase.account_id)


def _left_sentence(account: TokenAccount) -> str:
    if account.available < 0:
        return f"Your balance is {token_words(-account.available)} below zero."
    return f"You have {token_words(account.available) if account.available else 'no tokens'} left."


def _debt_sentence(balance_tokens: int) -> str:
    if balance_tokens >= 0:
        return ""
    return f" Your balance is {-balance_tokens:,} tokens below zero: your next purchase pays that first."


def _facts_of(purchase: Purchase, *, paid: str = "Paid") -> Facts:
    return [
        ("Package", purchase.package_name),
        ("Tokens", f"{purchase.tokens:,}"),
        (paid, purchase.paid_display),
        ("Purchase number", str(purchase.pk)),
    ]


def _facts_of_clawback(purchase: Purchase, tokens: int, balance_tokens: int) -> Facts:
    return [
        ("Tokens taken back", f"{max(tokens, 0):,}"),
        ("Balance now", f"{balance_tokens:,}"),
        ("Purchase number", str(purchase.pk)),
    ]
