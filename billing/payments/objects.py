"""What Stripe's objects are to us: plain dataclasses, and how each is read from the API's or an event's JSON."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from decimal import Decimal
from itertools import accumulate
from typing import Any

# The bank wants the card's owner, or did not recognise them: they may try again.
AUTHENTICATION_CODES = ("authentication_required", "payment_intent_authentication_failure")


class AskAgain(Exception):
    """What Stripe says contradicts what we know of the thing `stripe_id`, which was `held` by our row: how it stands
    must be asked for anew, outside the transaction. Nothing was written."""

    def __init__(self, stripe_id: str, held: "Held") -> None:
        super().__init__(f"What is told of {stripe_id} contradicts what is known of it.")
        self.stripe_id = stripe_id
        self.held = held


# What our row knew when Stripe was asked, by the thing's id: while it is the same, Stripe's answer is the newer word.
Held = tuple[object, ...]
Asked = Mapping[str, Held]


@dataclass(frozen=True, slots=True)
class Buyer:
    name: str
    address: str  # in lines; empty where none was asked for
    tax_ids: str  # "DE123456789", more than one with commas between them


@dataclass(frozen=True, slots=True)
class CheckoutSession:
    id: str
    url: str
    status: str  # open, complete, expired
    payment_status: str  # paid, unpaid, no_payment_required
    client_reference_id: str
    customer_id: str
    payment_intent_id: str | None
    # Before tax and promotions: what our snapshot is compared with.
    amount_subtotal_cents: int
    currency: str
    expires_at: datetime | None
    installation: str = ""  # whose purchase; empty before payments named it
    # What the buyer pays in the end, after both.
    amount_total_cents: int | None = None
    discount_cents: int = 0  # by promotion codes
    tax_cents: int = 0  # in the price or on top of it
    # Who bought, as they wrote it on the page: the name of a person or a company, the lines of an address, tax numbers.
    buyer: "Buyer | None" = None

    @property
    def is_paid(self) -> bool:
        return self.payment_status in ("paid", "no_payment_required")


@dataclass(frozen=True, slots=True)
class PaymentIntent:
    id: str
    status: str
    customer_id: str
    amount_received_cents: int
    currency: str
    purchase_id: str  # as our metadata says; whoever edits metadata at Stripe can change it
    installation: str = ""  # whose purchase; empty before payments named it
    payment_method_id: str = ""
    action_url: str = ""  # where the card's owner confirms, when the bank wants that
    # Only where the payment was retrieved with its details:
    payment_method_type: str = ""  # card, link, us_bank_account …
    card_brand: str = ""
    card_last4: str = ""
    card_fingerprint: str = ""
    is_card_saved: bool = False  # it may be charged later, while its owner is away
    receipt_url: str = ""
    # Why the last try to pay failed:
    failure_code: str = ""
    failure_message: str = ""

    @property
    def needs_authentication(self) -> bool:
        """Whether the bank wants to see the card's owner before it pays."""
        return self.status == "requires_action" or (
            self.status == "requires_payment_method" and self.failure_code in AUTHENTICATION_CODES
        )

    @property
    def has_failed(self) -> bool:
        """Whether the last attempt to pay is over, without money."""
        return self.status in ("requires_payment_method", "canceled")


@dataclass(frozen=True, slots=True)
class Customer:
    id: str
    account_id: str  # as our metadata says
    installation: str  # that made it; empty before installations had names


@dataclass(frozen=True, slots=True)
class SavedCard:
    payment_method_id: str
    brand: str
    last4: str
    fingerprint: str = ""  # the number's: the same under whatever id it is saved


@dataclass(frozen=True, slots=True)
class Refund:
    id: str
    payment_intent_id: str
    amount_cents: int
    currency: str
    status: str  # pending, requires_action, succeeded, failed, canceled
    reason: str
    reversal_id: str = ""  # the row that asked for it, as our metadata says


@dataclass(frozen=True, slots=True)
class Dispute:
    id: str
    payment_intent_id: str
    amount_cents: int
    currency: str
    status: str  # needs_response, under_review, won, lost, warning_…, prevented
    reason: str
    # What Stripe has taken for it and not given back, in the dispute's currency; None: it does not say yet.
    withdrawn_cents: int | None = None
    bookings: int = 0  # the lines of our balance that it comes from; they only become more


@dataclass(frozen=True, slots=True)
class FraudWarning:
    id: str
    payment: PaymentIntent | None  # None for a charge made without one
    fraud_type: str


@dataclass(frozen=True, slots=True)
class Access:
    """What a call that costs nothing tells of our access to Stripe."""

    is_live: bool
    answered_at: datetime  # by Stripe's clock, to the second


@dataclass(frozen=True, slots=True)
class WebhookEndpoint:
    """An address that Stripe sends events to."""

    url: str
    is_enabled: bool
    api_version: str  # empty: the account's default one
    event_types: frozenset[str]  # "*": all


@dataclass(frozen=True, slots=True)
class Event:
    id: str
    type: str
    api_version: str
    livemode: bool
    account: str  # a connected account's; empty for our own
    object: Mapping[str, Any]
    payload: Mapping[str, Any]
    asked: Asked = field(default_factory=dict)  # `object` is how the thing stood after this was known


# --- Reading what Stripe sends --------------------------------------------------------------------------------------


def read_checkout_session(session: Mapping[str, Any]) -> CheckoutSession:
    """From the API's or an event's JSON. Raises KeyError or TypeError on another shape."""
    expires_at = session.get("expires_at")
    return CheckoutSession(
        id=session["id"],
        url=session.get("url") or "",
        status=session.get("status") or "",
        payment_status=session["payment_status"],
        client_reference_id=session.get("client_reference_id") or "",
        customer_id=id_of(session.get("customer")) or "",
        payment_intent_id=id_of(session.get("payment_intent")),
        amount_subtotal_cents=session["amount_subtotal"],
        currency=session["currency"],
        expires_at=datetime.fromtimestamp(expires_at, UTC) if expires_at else None,
        installation=str(inner(session, "metadata").get("installation", "")),
        amount_total_cents=session.get("amount_total"),
        discount_cents=inner(session, "total_details").get("amount_discount") or 0,
        tax_cents=inner(session, "total_details").get("amount_tax") or 0,
        buyer=_read_buyer(session),
    )


def _read_buyer(session: Mapping[str, Any]) -> Buyer | None:
    details, address = inner(session, "customer_details"), inner(session, "customer_details", "address")
    tax_ids = ", ".join(str(each.get("value") or "") for each in details.get("tax_ids") or [])
    place = " ".join(str(address.get(name) or "") for name in ("postal_code", "city", "state")).strip()
    lines = (address.get("line1"), address.get("line2"), place, address.get("country"))
    if not (tax_ids or any(lines)):
        return None
    name = details.get("business_name") or details.get("name") or ""
    return Buyer(str(name)[:200], "\n".join(str(line) for line in lines if line)[:500], tax_ids[:200])


def read_payment_intent(payment_intent: Mapping[str, Any]) -> PaymentIntent:
    """From the API's or an event's JSON. Raises KeyError or TypeError on another shape."""
    failure = inner(payment_intent, "last_payment_error")
    # The charge keeps it, whatever became of the payment method.
    cards = [
        inner(payment_intent, *path, "card")
        for path in (("latest_charge", "payment_method_details"), ("payment_method",))
    ]
    return PaymentIntent(
        id=payment_intent["id"],
        status=payment_intent["status"],
        customer_id=id_of(payment_intent.get("customer")) or "",
        amount_received_cents=payment_intent["amount_received"],
        currency=payment_intent["currency"],
        purchase_id=str(inner(payment_intent, "metadata").get("purchase_id", "")),
        installation=str(inner(payment_intent, "metadata").get("installation", "")),
        payment_method_id=id_of(payment_intent.get("payment_method")) or "",
        action_url=inner(payment_intent, "next_action", "redirect_to_url").get("url") or "",
        payment_method_type=inner(payment_intent, "payment_method").get("type") or "",
        card_brand=inner(payment_intent, "payment_method", "card").get("brand") or "",
        card_last4=inner(payment_intent, "payment_method", "card").get("last4") or "",
        card_fingerprint=next((card["fingerprint"] for card in cards if card.get("fingerprint")), ""),
        is_card_saved=bool(inner(payment_intent, "payment_method").get("customer")),
        receipt_url=inner(payment_intent, "latest_charge").get("receipt_url") or "",
        failure_code=failure.get("decline_code") or failure.get("code") or "",
        failure_message=failure.get("message") or "",
    )


def read_saved_card(payment_method: Mapping[str, Any]) -> SavedCard:
    """From the API's or an event's JSON. Raises KeyError on another shape."""
    card = inner(payment_method, "card")
    return SavedCard(
        payment_method["id"],
        brand=card.get("brand") or "",
        last4=card.get("last4") or "",
        fingerprint=card.get("fingerprint") or "",
    )


def read_refund(refund: Mapping[str, Any]) -> Refund:
    """From the API's or an event's JSON. Raises KeyError or TypeError on another shape."""
    return Refund(
        id=refund["id"],
        payment_intent_id=id_of(refund.get("payment_intent")) or "",
        amount_cents=refund["amount"],
        currency=refund["currency"],
        status=refund.get("status") or "pending",
        reason=refund.get("reason") or "",
        reversal_id=str((refund.get("metadata") or {}).get("reversal_id", "")),
    )


def read_dispute(dispute: Mapping[str, Any]) -> Dispute:
    """From the API's or an event's JSON. Raises KeyError or TypeError on another shape."""
    return Dispute(
        id=dispute["id"],
        payment_intent_id=id_of(dispute.get("payment_intent")) or "",
        amount_cents=dispute["amount"],
        currency=dispute["currency"],
        status=dispute["status"],
        reason=dispute.get("reason") or "",
        withdrawn_cents=_withdrawn_cents(dispute),
        bookings=len(_bookings(dispute)),
    )


def _bookings(dispute: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """In the order in which they were made."""
    lines = [line for line in dispute.get("balance_transactions") or () if isinstance(line, Mapping)]
    return sorted(lines, key=lambda line: line.get("created") or 0)


def _withdrawn_cents(dispute: Mapping[str, Any]) -> int | None:
    """What the lines of our balance at Stripe come to, without fees; None where there is no line yet."""
    lines = _bookings(dispute)
    if not lines:
        return None
    if all(line.get("currency", dispute["currency"]) == dispute["currency"] for line in lines):
        return max(0, -sum(line["amount"] for line in lines))
    # Booked in the currency that we are paid out in, each line at the rate of its own day: before that rate, they are
    # the same parts of what is disputed.
    gone = list(accumulate(-line["amount"] / Decimal(str(line.get("exchange_rate") or 1)) for line in lines))
    most = max(gone)  # what is disputed; it may have been withdrawn more than once, and in parts
    return max(0, round(gone[-1] * dispute["amount"] / most)) if most > 0 else 0


def read_fraud_warning(warning: Mapping[str, Any]) -> FraudWarning:
    """From an event's JSON `with_warned_payment`. Raises KeyError or TypeError on another shape."""
    payment = warning.get("payment_intent")
    return FraudWarning(
        id=warning["id"],
        payment=read_payment_intent(payment) if payment else None,
        fraud_type=warning.get("fraud_type") or "",
    )


def read_event(event: Mapping[str, Any]) -> Event:
    """From an event's JSON, which has been verified. A thin one names its object alone, and no version: the object is
    to be asked for. Raises KeyError, TypeError or ValueError on another shape."""
    is_thin = event.get("object") == "v2.core.event"
    if is_thin:
        related = event.get("related_object")  # a ping is about nothing
        object = {"object": _text(related["type"]), "id": _text(related["id"])} if related else {}
    else:
        object = dict(event["data"]["object"])
    return Event(
        id=_text(event["id"]),
        type=_text(event["type"]).removeprefix("v1.") if is_thin else _text(event["type"]),
        api_version=_text(event.get("api_version") or ""),
        livemode=event["livemode"] is True,
        account=_text(event.get("context" if is_thin else "account") or ""),
        object=object,
        payload=event,
    )


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError("Expected text.")
    return value


# Where Stripe's objects name people, their whereabouts, or addresses at which a page about them opens.
PERSONAL_FIELDS = frozenset(
    {
        "address", "billing_details", "client_secret", "collected_information", "custom_fields", "customer_address",
        "customer_details", "customer_email", "customer_name", "customer_phone", "customer_shipping", "email",
        "evidence", "fingerprint", "hosted_invoice_url", "individual_name", "invoice_pdf", "ip_address", "name",
        "owner", "payment_method_details", "phone", "receipt_email", "receipt_url", "shipping", "shipping_details",
        "tax_ids",
    }
)  # fmt: skip


def without_personal_data(value: Any) -> Any:
    """A copy of an event's JSON in which nobody is named; all that the `read_…` functions need stays."""
    if isinstance(value, Mapping):
        return {name: None if name in PERSONAL_FIELDS else without_personal_data(each) for name, each in value.items()}
    return [without_personal_data(each) for each in value] if isinstance(value, list) else value


def inner(value: Mapping[str, Any], *names: str) -> Mapping[str, Any]:
    """What lies under `names`; empty where Stripe sent nothing, or an id that was not expanded."""
    for name in names:
        inner = value.get(name)
        value = inner if isinstance(inner, Mapping) else {}
    return value


def id_of(reference: Any) -> str | None:
    """The id of a reference, which Stripe sends as an id or, expanded, as the object."""
    return reference["id"] if isinstance(reference, Mapping) else reference
