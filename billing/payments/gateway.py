"""The only importer of `stripe`. Plain dataclasses come out; an error says whether Stripe may have done the thing.

Long, since all that is asked of Stripe stands here, a few lines for each call; `objects.py` reads the answers.
"""

import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from datetime import datetime
from email.utils import parsedate_to_datetime
from functools import cache
from typing import Any, TypeVar

import stripe
from django.conf import settings
from stripe.params import PaymentIntentRetrieveParams
from stripe.params.checkout import SessionCreateParams, SessionCreateParamsLineItem

from billing.payments.objects import (
    Access,
    CheckoutSession,
    Customer,
    Dispute,
    Event,
    FraudWarning,
    PaymentIntent,
    Refund,
    SavedCard,
    WebhookEndpoint,
    id_of,
    inner,
    read_checkout_session,
    read_dispute,
    read_event,
    read_fraud_warning,
    read_payment_intent,
    read_refund,
    read_saved_card,
)
from kit.refusal import Refusal
from kit.text import require_storable

API_VERSION: str = stripe.api_version
SIGNATURE_TOLERANCE_SECONDS = 300
CARD_CONSENT = "Your card is kept for auto-recharge, which stays off until you switch it on."
CLOCK_SKEW_SECONDS = 60  # how far ahead of ours Stripe's clock may be
MAX_EVENT_DEPTH = 50  # several times what Stripe sends

Result = TypeVar("Result")


class GatewayError(Refusal):
    """`message` is for the person who pays."""

    http_status = 502


class GatewayUnavailable(GatewayError):
    """No answer (time-out, no connection, 429, a refused API key, the same call still running). It may have happened:
    the same idempotency key again tells."""

    http_status = 503


class GatewayBroken(GatewayError):
    """Stripe answered with a fault of its own. It keeps that answer under the key: asking again needs a new one."""

    http_status = 503


class GatewayRefused(GatewayError):
    """Stripe understood and said no. It did not happen. `parameter` is what it did not like, "" where it does not
    say."""

    def __init__(self, message: str, *, parameter: str = "") -> None:
        super().__init__(message)
        self.parameter = parameter


class GatewayMissing(GatewayRefused):
    """Stripe does not know an id that we named: deleted there, or of the other mode. `parameter` named it; it is "id"
    for the thing that was asked for itself."""


class GatewayKeyConflict(GatewayError):
    """The idempotency key was used for another request. This one did not happen; one of ours before it may have."""

    http_status = 503


class CardDeclined(GatewayError):
    """The card's bank said no, or wants to see its owner first. Nothing was charged."""

    http_status = 402

    def __init__(self, message: str, *, code: str, payment_intent: PaymentIntent | None) -> None:
        super().__init__(message)
        self.code = code
        self.payment_intent = payment_intent


class InvalidEvent(Exception):
    """Not an event that Stripe has signed for us, just now."""


@cache
def _client() -> stripe.StripeClient:
    return stripe.StripeClient(
        settings.STRIPE_SECRET_KEY,
        base_addresses={"api": settings.STRIPE_API_BASE} if settings.STRIPE_API_BASE else {},
        max_network_retries=2,  # with our idempotency key where there is one, else with the SDK's own
        http_client=stripe.RequestsClient(timeout=settings.STRIPE_TIMEOUT_SECONDS),
    )


def is_live_mode() -> bool:
    """Whether our key moves real money."""
    return settings.STRIPE_SECRET_KEY.startswith(("sk_live_", "rk_live_"))


def _call(request: Callable[[], Result]) -> Result:
    try:
        return request()
    except stripe.CardError as error:
        raise _declined(error) from error
    except (
        stripe.APIConnectionError,
        stripe.RateLimitError,
        # A wrong API key says nothing about the payment. It is the operator's to put right.
        stripe.AuthenticationError,
        stripe.PermissionError,
    ) as error:
        raise GatewayUnavailable("Stripe cannot be reached just now. Try again in a moment.") from error
    except stripe.APIError as error:
        if error.http_status == 409:  # the key is in use by a call that still runs: the other half of a double click
            raise GatewayUnavailable("Stripe is still at work on this. Try again in a moment.") from error
        raise GatewayBroken("Stripe has a problem just now. Try again in a moment.") from error
    except stripe.IdempotencyError as error:
        raise GatewayKeyConflict("Stripe took this for another request. Try again in a moment.") from error
    except stripe.InvalidRequestError as error:
        if error.code == "resource_missing":
            raise GatewayMissing("Stripe refused this.", parameter=error.param or "id") from error
        raise GatewayRefused("Stripe refused this.", parameter=error.param or "") from error
    except stripe.StripeError as error:
        raise GatewayRefused("Stripe refused this.") from error


def _declined(error: stripe.CardError) -> CardDeclined:
    body = error.json_body if isinstance(error.json_body, Mapping) else {}
    details = body.get("error", {})
    payment_intent = details.get("payment_intent")
    return CardDeclined(
        error.user_message or "The card was declined.",
        code=details.get("decline_code") or error.code or "card_declined",
        payment_intent=read_payment_intent(payment_intent) if payment_intent else None,
    )


def check_access() -> Access:
    """Whether our key opens Stripe, and what time it is there. Raises GatewayError; its cause says what Stripe said."""
    # Whoever asks wants to know how it is now: no retries.
    balance = _call(lambda: _client().v1.balance.retrieve(options={"max_network_retries": 0}))
    if balance.last_response is None:
        raise TypeError("An answer has its headers.")
    return Access(balance.livemode, parsedate_to_datetime(balance.last_response.headers["Date"]))


def list_webhook_endpoints() -> list[WebhookEndpoint]:
    """The addresses that Stripe sends our account's events to. Raises GatewayError."""
    return list(
        _listed(
            lambda: _client().v1.webhook_endpoints.list({"limit": 100}),
            lambda endpoint: WebhookEndpoint(
                url=endpoint["url"],
                is_enabled=endpoint["status"] == "enabled",
                api_version=endpoint.get("api_version") or "",
                event_types=frozenset(endpoint["enabled_events"]),
            ),
        )
    )


def create_customer(*, email: str, name: str, account_id: int, installation: str, idempotency_key: str) -> str:
    """Make the customer at Stripe and return its id. Raises GatewayError."""
    customer = _call(
        lambda: _client().v1.customers.create(
            {
                "email": email,
                "name": name,
                "metadata": {"account_id": str(account_id), "installation": installation},
            },
            {"idempotency_key": idempotency_key},
        )
    )
    return customer.id


def update_customer(customer_id: str, *, email: str, name: str) -> None:
    """Tell Stripe what its customer is called and where their receipts go. Raises GatewayError."""
    _call(lambda: _client().v1.customers.update(customer_id, {"email": email, "name": name}))


def list_customers(*, email: str) -> Iterator[Customer]:
    """All customers with this e-mail address, also of other products. Raises GatewayError while it is read."""
    return _listed(lambda: _client().v1.customers.list({"email": email, "limit": 100}), _read_customer)


def _read_customer(customer: Mapping[str, Any]) -> Customer:
    return Customer(
        id=customer["id"],
        account_id=str((customer.get("metadata") or {}).get("account_id", "")),
        installation=str((customer.get("metadata") or {}).get("installation", "")),
    )


def search_customers(*, account_id: int, installation: str) -> Iterator[Customer]:
    """All customers that an installation has made for an account, whatever their e-mail address is by now. Stripe finds
    those of the last minute only later. Raises GatewayError while it is read; GatewayRefused where Stripe does not
    offer the search."""
    query = f"metadata['account_id']:'{account_id}' AND metadata['installation']:'{installation}'"
    return _listed(lambda: _client().v1.customers.search({"query": query, "limit": 100}), _read_customer)


def delete_customer(customer_id: str) -> None:
    """Delete the customer at Stripe, their saved cards with them; payments stay. One who is gone already stays gone.

    Raises GatewayError.
    """
    with suppress(GatewayMissing):
        _call(lambda: _client().v1.customers.delete(customer_id))


def create_checkout_session(
    *,
    purchase_id: int,
    customer_id: str,
    product_name: str,
    amount_cents: int,
    currency: str,
    stripe_price_id: str,
    installation: str,
    options: Sequence[str],
    success_url: str,
    cancel_url: str,
    idempotency_key: str,
) -> CheckoutSession:
    """Open a Checkout page for one purchase, with its `checkout_options`. The card is kept for auto-recharge. Raises
    GatewayError."""
    line_item: SessionCreateParamsLineItem = {"quantity": 1}
    if stripe_price_id:
        line_item["price"] = stripe_price_id
    else:
        line_item["price_data"] = {
            "currency": currency,
            "unit_amount": amount_cents,
            "product_data": {"name": product_name},
        }
    metadata = {"purchase_id": str(purchase_id), "installation": installation}
    parameters: SessionCreateParams = {
        "mode": "payment",
        "customer": customer_id,
        "client_reference_id": str(purchase_id),
        "line_items": [line_item],
        "success_url": success_url,
        "cancel_url": cancel_url,
        "metadata": metadata,
        # A session's metadata is not copied to its payment intent.
        "payment_intent_data": {"setup_future_usage": "off_session", "metadata": metadata},
        "custom_text": {"submit": {"message": CARD_CONSENT}},
    }
    if "automatic_tax" in options:
        parameters["automatic_tax"] = {"enabled": True}
        parameters["customer_update"] = {"address": "auto"}
    if "company" in options:
        parameters["tax_id_collection"] = {"enabled": True}
        parameters["billing_address_collection"] = "required"
        # Stripe asks for a customer's tax number only where it may keep their name as well.
        parameters["customer_update"] = {"address": "auto", "name": "auto"}
    if "promotion_codes" in options:
        parameters["allow_promotion_codes"] = True
    if "invoices" in options:
        parameters["invoice_creation"] = {"enabled": True}
    session = _call(lambda: _client().v1.checkout.sessions.create(parameters, {"idempotency_key": idempotency_key}))
    return read_checkout_session(session.to_dict())


def checkout_options(*, is_for_team: bool) -> list[str]:
    """What a payment page that is made now has beside the price: by the settings, and for a team the company's name,
    address and tax number."""
    wanted = {
        "company": is_for_team,
        "automatic_tax": settings.STRIPE_AUTOMATIC_TAX,
        "promotion_codes": settings.STRIPE_PROMOTION_CODES,
        "invoices": settings.STRIPE_INVOICES,
    }
    return [option for option, is_wanted in wanted.items() if is_wanted]


def retrieve_checkout_session(session_id: str) -> CheckoutSession:
    """Ask Stripe how a session stands. Raises GatewayError."""
    return read_checkout_session(_call(lambda: _client().v1.checkout.sessions.retrieve(session_id)).to_dict())


def expire_checkout_session(session_id: str) -> None:
    """Close a session, so that it cannot be paid any more. Raises GatewayRefused when it is not open."""
    _call(lambda: _client().v1.checkout.sessions.expire(session_id))


_PAYMENT_DETAILS: PaymentIntentRetrieveParams = {"expand": ["payment_method", "latest_charge"]}


def retrieve_payment_intent(payment_intent_id: str) -> PaymentIntent:
    """Ask Stripe how a payment stands, with its card and receipt. Raises GatewayError."""
    payment_intent = _call(lambda: _client().v1.payment_intents.retrieve(payment_intent_id, _PAYMENT_DETAILS))
    return read_payment_intent(payment_intent.to_dict())


def charge_saved_card(
    *,
    purchase_id: int,
    installation: str,
    customer_id: str,
    payment_method_id: str,
    amount_cents: int,
    currency: str,
    description: str,
    idempotency_key: str,
) -> PaymentIntent:
    """Charge a saved card while its owner is away. The answer's status may also be processing or requires_action.

    Raises CardDeclined; GatewayUnavailable when it may have been charged and the same key again will tell;
    GatewayBroken when only `find_payment_intent` can tell; GatewayRefused when it cannot be done.
    """
    payment_intent = _call(
        lambda: _client().v1.payment_intents.create(
            {
                "amount": amount_cents,
                "currency": currency,
                "customer": customer_id,
                "payment_method": payment_method_id,
                "off_session": True,
                "confirm": True,
                # The saved card and nothing else: without these Stripe takes all that the account allows into account,
                # of which some send their owner to another page, and refuses where no such way is given.
                "allowed_payment_method_types": ["card"],
                "automatic_payment_methods": {"enabled": True, "allow_redirects": "never"},
                "description": description,
                "metadata": {"purchase_id": str(purchase_id), "installation": installation},
            },
            {"idempotency_key": idempotency_key},
        )
    )
    return read_payment_intent(payment_intent.to_dict())


def find_payment_intent(*, purchase_id: int, customer_id: str, since: datetime) -> PaymentIntent | None:
    """The customer's payment that names the purchase, if Stripe has one. Raises GatewayError."""
    not_before = int(since.timestamp()) - CLOCK_SKEW_SECONDS
    payments = _listed(
        lambda: _client().v1.payment_intents.list(
            {"customer": customer_id, "created": {"gte": not_before}, "limit": 100}
        ),
        read_payment_intent,
    )
    return next((each for each in payments if each.purchase_id == str(purchase_id)), None)


def confirm_payment_intent(
    payment_intent_id: str, *, payment_method_id: str, return_url: str, idempotency_key: str
) -> PaymentIntent:
    """Try a payment again with its owner present; `action_url` then leads to the bank. Raises GatewayError."""
    payment_intent = _call(
        lambda: _client().v1.payment_intents.confirm(
            payment_intent_id,
            {"payment_method": payment_method_id, "return_url": return_url},
            {"idempotency_key": idempotency_key},
        )
    )
    return read_payment_intent(payment_intent.to_dict())


def cancel_payment_intent(payment_intent_id: str) -> PaymentIntent:
    """Give a payment up, so that it cannot succeed later. Raises GatewayRefused when it has succeeded already."""
    return read_payment_intent(_call(lambda: _client().v1.payment_intents.cancel(payment_intent_id)).to_dict())


def create_refund(
    *, payment_intent_id: str, amount_cents: int, purchase_id: int, reversal_id: int, idempotency_key: str
) -> Refund:
    """Send money back to the buyer. Raises GatewayError."""
    refund = _call(
        lambda: _client().v1.refunds.create(
            {
                "payment_intent": payment_intent_id,
                "amount": amount_cents,
                "reason": "requested_by_customer",
                "metadata": {"purchase_id": str(purchase_id), "reversal_id": str(reversal_id)},
            },
            {"idempotency_key": idempotency_key},
        )
    )
    return read_refund(refund.to_dict())


def create_portal_session(*, customer_id: str, return_url: str) -> str:
    """The address of Stripe's page where the customer changes or removes their card. Raises GatewayError."""
    return _call(
        lambda: _client().v1.billing_portal.sessions.create({"customer": customer_id, "return_url": return_url})
    ).url


def list_saved_cards(customer_id: str, *, preferred_id: str) -> list[SavedCard]:
    """The customer's cards, first the one to charge while its owner is away: their default one, else `preferred_id` if
    they still have it, else their newest. Raises GatewayMissing when they are gone, GatewayError."""
    customer = _call(lambda: _client().v1.customers.retrieve(customer_id)).to_dict()
    if customer.get("deleted"):
        raise GatewayMissing("Stripe refused this.", parameter="id")
    default_id = id_of(inner(customer, "invoice_settings").get("default_payment_method"))
    cards = list(
        _listed(
            lambda: _client().v1.customers.payment_methods.list(customer_id, {"type": "card", "limit": 100}),
            read_saved_card,
        )
    )
    ranks = {preferred_id: 1, default_id: 0}
    return sorted(cards, key=lambda card: ranks.get(card.payment_method_id, 2))


def has_card(customer_id: str, payment_method_id: str) -> bool:
    """Whether Stripe still has a card of the customer's. Raises GatewayError."""
    try:
        method = _call(lambda: _client().v1.payment_methods.retrieve(payment_method_id)).to_dict()
    except GatewayMissing:
        return False
    return id_of(method.get("customer")) == customer_id


def list_payment_intents(*, since: datetime) -> Iterator[PaymentIntent]:
    """All payments made since, newest first. Raises GatewayError while it is read."""
    not_before = int(since.timestamp())
    return _listed(
        lambda: _client().v1.payment_intents.list({"created": {"gte": not_before}, "limit": 100}), read_payment_intent
    )


def list_refunds(*, since: datetime) -> Iterator[Refund]:
    """All refunds made since, newest first. Raises GatewayError while it is read."""
    not_before = int(since.timestamp())
    return _listed(
        lambda: _client().v1.refunds.list({"created": {"gte": not_before}, "limit": 100}),
        lambda refund: read_refund(_with_payment(refund)),
    )


def list_refunds_of(payment_intent_id: str) -> Iterator[Refund]:
    """All refunds of one payment, newest first. Raises GatewayError while it is read."""
    return _listed_refunds_of(payment_intent_id, read=read_refund)


def _listed_refunds_of(payment_intent_id: str, *, read: Callable[[Mapping[str, Any]], Result]) -> Iterator[Result]:
    return _listed(lambda: _client().v1.refunds.list({"payment_intent": payment_intent_id, "limit": 100}), read)


def retrieve_refund(refund_id: str) -> Refund:
    """Ask Stripe how a refund stands. Raises GatewayError."""
    return read_refund(_with_payment(_call(lambda: _client().v1.refunds.retrieve(refund_id)).to_dict()))


def retrieve_dispute(dispute_id: str) -> Dispute:
    """Ask Stripe how a dispute stands. Raises GatewayError."""
    return read_dispute(_with_payment(_call(lambda: _client().v1.disputes.retrieve(dispute_id)).to_dict()))


def list_disputes(*, since: datetime) -> Iterator[Dispute]:
    """All disputes opened since, newest first. Raises GatewayError while it is read."""
    not_before = int(since.timestamp())
    return _listed(
        lambda: _client().v1.disputes.list({"created": {"gte": not_before}, "limit": 100}),
        lambda dispute: read_dispute(_with_payment(dispute)),
    )


def list_fraud_warnings(*, since: datetime) -> Iterator[FraudWarning]:
    """All early fraud warnings made since, newest first. Raises GatewayError while it is read."""
    not_before = int(since.timestamp())
    return _listed(
        lambda: _client().v1.radar.early_fraud_warnings.list({"created": {"gte": not_before}, "limit": 100}),
        lambda warning: read_fraud_warning(_with_warned_payment(warning)),
    )


def _listed(request: Callable[[], Any], read: Callable[[Mapping[str, Any]], Result]) -> Iterator[Result]:
    pages = _call(lambda: request().auto_paging_iter())
    while (each := _call(lambda: next(pages, None))) is not None:
        yield read(each.to_dict())


_RETRIEVE: Mapping[str, Callable[[str], stripe.StripeObject]] = {
    "checkout.session": lambda session_id: _client().v1.checkout.sessions.retrieve(session_id),
    "payment_intent": lambda payment_intent_id: _client().v1.payment_intents.retrieve(payment_intent_id),
    "payment_method": lambda payment_method_id: _client().v1.payment_methods.retrieve(payment_method_id),
    "charge": lambda charge_id: _client().v1.charges.retrieve(charge_id),
    "refund": lambda refund_id: _client().v1.refunds.retrieve(refund_id),
    "dispute": lambda dispute_id: _client().v1.disputes.retrieve(dispute_id),
    "radar.early_fraud_warning": lambda warning_id: _client().v1.radar.early_fraud_warnings.retrieve(warning_id),
}


def in_our_version(event: Event) -> Event:
    """The event in our API version: its object, if sent in another one, is asked for anew and is as it stands now.

    An object of a kind that we do not ask for stays as it is, with its version. Raises GatewayError.
    """
    return event if event.api_version == API_VERSION else as_it_stands(event)


def as_it_stands(event: Event) -> Event:
    """The event with its object as Stripe has it now, in our API version. Raises GatewayError."""
    retrieve = _RETRIEVE.get(event.object.get("object", ""))
    if retrieve is None:
        return event
    current = _call(lambda: retrieve(event.object["id"]))
    return replace(event, api_version=API_VERSION, object=current.to_dict())


def with_payment(event: Event) -> Event:
    """The event of a refund or dispute with its payment intent, which its charge names where it does not.

    Raises GatewayError.
    """
    return replace(event, object=_with_payment(event.object))


def _with_payment(object: Mapping[str, Any]) -> Mapping[str, Any]:
    charge_id = id_of(object.get("charge"))
    if object.get("payment_intent") or not charge_id:
        return object
    charge = _call(lambda: _client().v1.charges.retrieve(charge_id)).to_dict()
    return {**object, "payment_intent": id_of(charge.get("payment_intent"))}


def with_warned_payment(event: Event) -> Event:
    """The event of a fraud warning with its payment in it: it tells whose it is before we have heard of it otherwise.

    Raises GatewayError.
    """
    return replace(event, object=_with_warned_payment(event.object))


def _with_warned_payment(warning: Mapping[str, Any]) -> Mapping[str, Any]:
    payment_intent_id = id_of(_with_payment(warning).get("payment_intent"))
    if not payment_intent_id:
        return warning
    payment = _call(lambda: _client().v1.payment_intents.retrieve(payment_intent_id, _PAYMENT_DETAILS)).to_dict()
    return {**warning, "payment_intent": payment}


def with_refunds(event: Event) -> Event:
    """The event of a charge with all refunds of its payment in it, as Stripe has them now. Raises GatewayError.

    Since API version 2022-11-15 a charge comes without its refunds, and says no more than their sum.
    """
    payment_intent_id = id_of(event.object.get("payment_intent"))
    if not payment_intent_id:  # a charge made without one: not by us
        return event
    refunds = _listed_refunds_of(payment_intent_id, read=dict)
    return replace(event, object={**event.object, "refunds": {"data": list(refunds)}})


def verify_event(payload: bytes, signature_header: str) -> Event:
    """The event in a webhook's body, if one of our secrets signed it within the last five minutes.

    Raises InvalidEvent on anything else, however hostile: nothing in the body is looked at before it is authentic.
    """
    if not any(_is_signed(payload, signature_header, secret) for secret in settings.STRIPE_WEBHOOK_SECRETS):
        raise InvalidEvent("The signature does not match.")
    try:
        event = json.loads(payload)
        _require_storable_json(event)
        return read_event(event)
    # RecursionError: the SDK's and our parser alike give up on thousands of nested brackets.
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise InvalidEvent("The body is no event.") from error


def _require_storable_json(value: Any, depth: int = 0) -> None:
    # PostgreSQL's JSON keeps no NUL, no half of a surrogate pair and no infinity, all of which our parser lets pass.
    if isinstance(value, str):
        require_storable(value)
    elif isinstance(value, float) and not math.isfinite(value):
        raise ValueError("Not a number.")
    elif isinstance(value, dict | list):
        if depth == MAX_EVENT_DEPTH:
            raise ValueError("Nested too deeply.")
        for item in (*value, *value.values()) if isinstance(value, dict) else value:
            _require_storable_json(item, depth + 1)


def _is_signed(payload: bytes, signature_header: str, secret: str) -> bool:
    try:
        stripe.WebhookSignature.verify_header(payload, signature_header, secret, SIGNATURE_TOLERANCE_SECONDS)
        # The first `t`, as the SDK reads it.
        signed_at = next(int(part[2:]) for part in signature_header.split(",") if part.startswith("t="))
    # The SDK raises more than its own error on headers and bodies that are not text.
    except (stripe.SignatureVerificationError, ValueError, TypeError, AttributeError, StopIteration):
        return False
    # It accepts any time in the future; a signature made for then could be replayed until then.
    return signed_at <= time.time() + CLOCK_SKEW_SECONDS
