"""The customer at Stripe behind an account: made once, told what changes here, forgotten when Stripe has forgotten
them, and none left when the person goes."""

from typing import Any

import structlog
from django.db import transaction
from django.db.models import Exists, F, OuterRef, Q, QuerySet
from django.db.models.fields.json import KT

from billing import ledger
from billing.models import Installation, Purchase, TokenAccount
from billing.models.installation import stripe_key
from billing.payments import gateway
from billing.payments.objects import PaymentIntent
from billing.payments.recharge_settings import switch_off
from kit.database import repeated_after_conflicts
from kit.on_commit import enqueue_on_commit

logger = structlog.get_logger(__name__)


def update_stripe_customer(
    *, user_id: int | None = None, account_id: int | None = None, stripe_customer_id: str
) -> None:
    """Remember the customer at Stripe of an account, or of the user's own. The first one stays: two checkouts begun at
    once share it."""
    payer = ledger.Party(user_id, account_id)
    TokenAccount.objects.filter(**payer.of_account, stripe_customer_id=None).update(
        stripe_customer_id=stripe_customer_id
    )


def ensure_customer(account: TokenAccount) -> str:
    """The id of the account's customer at Stripe, made if there is none.

    Two tabs that make one at once send the same key, and get the same customer. One whose e-mail address Stripe does
    not take has none there: its page asks for one. Calls Stripe: never inside a transaction (law 7). Raises
    GatewayError; after one that Stripe would repeat for a day the next call has a new key.
    """
    if account.stripe_customer_id:
        return account.stripe_customer_id
    try:
        return _make_customer(account, account.receipts_email)
    except gateway.GatewayRefused as error:
        if error.parameter != "email":
            raise
        account.refresh_from_db(fields=["stripe_customer_tries"])
        return _make_customer(account, "")


def _make_customer(account: TokenAccount, email: str) -> str:
    name = account.name
    installation = Installation.read_name()
    tries = account.stripe_customer_tries
    same_try = TokenAccount.objects.filter(pk=account.pk, stripe_customer_tries=tries)
    try:
        customer_id = gateway.create_customer(
            email=email,
            name=name,
            account_id=account.pk,
            installation=installation,
            idempotency_key=stripe_key(installation, "customer", account.pk, tries),
        )
    except (gateway.GatewayBroken, gateway.GatewayRefused, gateway.GatewayKeyConflict):
        same_try.update(stripe_customer_tries=F("stripe_customer_tries") + 1)
        raise
    update_stripe_customer(account_id=account.pk, stripe_customer_id=customer_id)
    account.refresh_from_db(fields=["stripe_customer_id"])
    if account.stripe_customer_id == customer_id:
        _note_told(account.pk, customer_id, account.receipts_email, name)
    else:
        # Another key, after a fault: theirs stays, and nobody has been sent anywhere with ours.
        logger.warning("A second customer was made at Stripe", account_id=account.pk)
        try:
            gateway.delete_customer(customer_id)
        except gateway.GatewayError as error:  # `find_customers` finds it when the person goes
            logger.warning("It was not deleted", account_id=account.pk, error=error.__cause__ or error)
    return str(account.stripe_customer_id)


# --- What changes here ----------------------------------------------------------------------------------------------


def _note_told(account_id: int, customer_id: str, email: str, name: str) -> None:
    TokenAccount.objects.filter(pk=account_id, stripe_customer_id=customer_id).update(
        stripe_email=email, stripe_name=name
    )


def tell_changes(*, account_id: int) -> bool:
    """Tell Stripe the e-mail address and name that the account's owner has now. Returns whether it knows them.

    Calls Stripe. Until it has confirmed, it counts as untold: an answer that is lost, or a crash, may have changed it
    there. Of two calls at once nobody knows which one Stripe has taken last: the sweep tells it anew.
    """
    account = TokenAccount.objects.select_related("user", "workspace").get(pk=account_id)
    customer_id, email, name = account.stripe_customer_id, account.receipts_email, account.name
    same_customer = TokenAccount.objects.filter(pk=account_id, stripe_customer_id=customer_id).exclude(
        status_reason=TokenAccount.ANONYMISED
    )
    is_told = (account.stripe_email, account.stripe_name) == (email, name)
    if not customer_id or is_told or account.status_reason == TokenAccount.ANONYMISED:
        return True
    same_customer.update(stripe_email="", stripe_name="")
    try:
        try:
            gateway.update_customer(customer_id, email=email, name=name)
        except gateway.GatewayRefused as error:
            if error.parameter != "email":
                raise
            # One that Stripe does not take: no receipt is better than one at the address of before.
            gateway.update_customer(customer_id, email="", name=name)
    except gateway.GatewayMissing:
        forget_customer(customer_id=customer_id)
        return True
    except gateway.GatewayError as error:
        logger.warning("Stripe was not told yet", account_id=account_id, error=error.__cause__ or error)
        return False
    if same_customer.filter(stripe_email="", stripe_name="").update(stripe_email=email, stripe_name=name):
        return True
    same_customer.update(stripe_email="", stripe_name="")
    return False


def sweep_changes(*, limit: int = 100) -> int:
    """Tell Stripe what a lost task or its absence has left untold. Returns how many customers it knows better now."""
    known = Q(stripe_email=F("user__email"), stripe_name=F("user__name")) | Q(
        user=None, stripe_email=F("billing_email"), stripe_name=F("workspace__name")
    )
    stale = TokenAccount.objects.filter(~known, stripe_customer_id__isnull=False).exclude(
        status_reason=TokenAccount.ANONYMISED
    )
    return sum(tell_changes(account_id=pk) for pk in stale.order_by("pk").values_list("pk", flat=True)[:limit])


# --- What is gone ---------------------------------------------------------------------------------------------------


def forget_card(*, payment_method_id: str) -> None:
    """The card was removed: forget it, and switch auto-recharge off with a notice."""
    if payment_method_id:
        _forget(TokenAccount.objects.filter(stripe_payment_method_id=payment_method_id), cause=payment_method_id)


def forget_customer(*, customer_id: str) -> None:
    """Stripe does not have the customer any more, nor their card. The next Checkout makes a new one, under a new key:
    the old one's would give the old customer again."""
    _forget(
        TokenAccount.objects.filter(stripe_customer_id=customer_id),
        cause=customer_id,
        stripe_customer_id=None,
        stripe_email="",
        stripe_name="",
        stripe_customer_tries=F("stripe_customer_tries") + 1,
    )


@repeated_after_conflicts
def _forget(accounts: QuerySet[TokenAccount], *, cause: str, **changes: Any) -> None:
    with transaction.atomic():
        account = accounts.select_for_update().first()
        if account is None:
            return
        TokenAccount.objects.filter(pk=account.pk).update(
            stripe_payment_method_id="", card_brand="", card_last4="", card_fingerprint="", **changes
        )
        switch_off(account_id=account.pk, reason="The saved card was removed.", key=cause)


# --- A card that is not trusted -------------------------------------------------------------------------------------


def is_distrusted(fingerprint: str | OuterRef, payment_method_id: str | OuterRef) -> Q:
    """Whether a card's bank, or a dispute, said that its owner knew nothing of a payment: under any id at Stripe, with
    whatever account it is saved. In a query over accounts, with `OuterRef`s for their columns."""
    distrusted = Purchase.objects.filter(is_card_distrusted=True)
    by_number = distrusted.filter(card_fingerprint=fingerprint).exclude(card_fingerprint="")
    by_id = distrusted.alias(card=KT("metadata__distrusted_card")).filter(
        account=OuterRef("pk"), card=payment_method_id
    )
    return Q(Exists(by_number)) | Q(Exists(by_id))


def distrust_card(purchase: Purchase, *, key: str, payment: PaymentIntent | None = None) -> bool:
    """The card's owner knows nothing of a locked purchase: nothing is charged by itself any more, and the card is kept
    for nobody, whoever saves its number anew. In the caller's transaction; `key` names the warning or the dispute.
    Which card it was `payment` tells, where Stripe was asked; else the row does, or a worker asks.

    Returns whether that is news: told again, it does not touch another card that its owner has charged since.
    """
    if purchase.is_card_distrusted:
        return False
    payment_method_id = payment.payment_method_id if payment else purchase.metadata.get("payment_method_id", "")
    purchase.is_card_distrusted = True
    purchase.metadata = {**purchase.metadata, "distrusted_card": payment_method_id}
    if payment is not None and payment.card_fingerprint:
        purchase.card_fingerprint = payment.card_fingerprint
    if not purchase.card_fingerprint:
        purchase.checked_at = None  # the sweep asks, should the task be lost
        enqueue_on_commit("billing.tasks.remember_card", purchase.pk)
    purchase.save(update_fields=["is_card_distrusted", "metadata", "card_fingerprint", "checked_at"])
    account = TokenAccount.objects.select_for_update().get(pk=purchase.account_id)  # whoever keeps a card now waits
    switch_off(account_id=account.pk, reason="Your bank reported a payment as made without your consent.", key=key)
    drop_distrusted(account_id=account.pk, fingerprint=purchase.card_fingerprint, key=key)
    if account.stripe_payment_method_id and not account.card_fingerprint:  # kept by an earlier release
        enqueue_on_commit("billing.tasks.refresh_card", None, account.pk)
    return True


def drop_distrusted(*, account_id: int, fingerprint: str, key: str) -> None:
    """Forget a distrusted card wherever it is kept, in the caller's transaction. One that is kept a moment later is
    never charged: whoever opens an attempt looks again."""
    same_number = Q(card_fingerprint=fingerprint) & ~Q(card_fingerprint="")
    keeping = TokenAccount.objects.filter(
        Q(pk=account_id) | same_number,
        is_distrusted(OuterRef("card_fingerprint"), OuterRef("stripe_payment_method_id")),
    ).exclude(stripe_payment_method_id="")
    for account in keeping.select_for_update().order_by("pk"):
        switch_off(
            account_id=account.pk, reason="The saved card's bank reported a payment as made without consent.", key=key
        )
        TokenAccount.objects.filter(pk=account.pk).update(
            stripe_payment_method_id="", card_brand="", card_last4="", card_fingerprint=""
        )


# --- When the person goes -------------------------------------------------------------------------------------------


def find_customers(account: TokenAccount) -> None:
    """Note all customers at Stripe that were ever made for the account: those that rows name, that its e-mail address
    still finds, and that name the account, as one does whose making was not answered before the address changed.

    Calls Stripe. Raises GatewayError.
    """
    purchases = Purchase.objects.filter(account=account)
    named = set(purchases.filter(metadata__has_key="customer_id").values_list("metadata__customer_id", flat=True))
    if account.stripe_customer_id or named or purchases.exists():
        ours = (str(account.pk), Installation.read_name())
        addresses = {account.receipts_email, account.stripe_email} - {""}
        for found in (
            *(gateway.list_customers(email=email) for email in addresses),
            gateway.search_customers(account_id=account.pk, installation=ours[1]),
        ):
            try:
                # Those of before installations had names carry none.
                named |= {each.id for each in found if (each.account_id, each.installation or ours[1]) == ours}
            except gateway.GatewayRefused as error:  # no address to Stripe, or a search not offered in every country
                logger.warning("Customers were not looked up", account_id=account.pk, error=error.__cause__)
    TokenAccount.objects.filter(pk=account.pk).update(stripe_customers_left=sorted(named))


def erase_customers(*, account_id: int) -> bool:
    """Delete an anonymised account's customers at Stripe, their saved cards with them. Returns whether it is done.

    Stripe keeps the payments themselves, without a customer. Calls Stripe; again after a failure, or twice, it
    changes nothing more: the ids stay on the account until Stripe has confirmed.
    """
    anonymised = TokenAccount.objects.filter(pk=account_id).filter(_LEFT)
    account = anonymised.first()
    if account is None:
        return True
    try:
        for customer_id in {account.stripe_customer_id, *account.stripe_customers_left} - {None}:
            gateway.delete_customer(str(customer_id))
    except gateway.GatewayError as error:
        cause = error.__cause__ or error
        logger.warning("A customer was not deleted at Stripe yet", account_id=account_id, error=cause)
        return False
    # A click that was under way when its owner left may have made another one meanwhile: the sweep deletes it.
    return bool(
        anonymised.filter(
            stripe_customer_id=account.stripe_customer_id, stripe_customers_left=account.stripe_customers_left
        ).update(stripe_customer_id=None, stripe_customers_left=[])
    )


def sweep_erased(*, limit: int = 100) -> int:
    """Delete at Stripe what a lost task or Stripe's absence has left there. Returns of how many accounts."""
    return sum(
        erase_customers(account_id=pk)
        for pk in TokenAccount.objects.filter(_LEFT).order_by("pk").values_list("pk", flat=True)[:limit]
    )


_LEFT = Q(status=TokenAccount.Status.BLOCKED, status_reason=TokenAccount.ANONYMISED) & (
    Q(stripe_customer_id__isnull=False) | ~Q(stripe_customers_left=[])
)
