"""What must hold after a storm: our books beside what the stand-in itself has."""

from collections import Counter, defaultdict
from collections.abc import Iterator
from datetime import timedelta
from io import StringIO
from typing import Any

import httpx2
from django.core.management import CommandError, call_command
from django.db import connection
from django.db.models import Q, Sum
from django.utils import timezone

from billing.models import Drift, PaymentReversal, Purchase, StripeEvent, TokenTransaction, TokenUsage
from billing.payments import reconcile
from tests.storms.buyers import read_all
from tests.storms.programs import STRIPE_URL

TAKING_REFUNDS = ("pending", "requires_action", "succeeded")
TAKING_DISPUTES = ("needs_response", "under_review", "lost")


def ledger_rows() -> dict[int, str]:
    """Each ledger row's hash, by its id."""
    with connection.cursor() as cursor:
        cursor.execute("SELECT id, md5(entry::text) FROM billing_tokentransaction AS entry")
        return dict(cursor.fetchall())


def breaks(http: httpx2.Client) -> Iterator[str]:
    """What does not hold, in words; nothing when all is well. Stripe is reconciled with once more."""
    yield from _broken_laws()
    report = reconcile.reconcile(since=timezone.now() - timedelta(days=2))
    for drift in (*report.healed, *report.differing, *Drift.objects.filter(resolved_at=None)):
        yield f"reconcile found {drift.kind} {drift.stripe_id}: {drift.description}"
    yield from _open_ends(http)
    yield from _money(http)


def _broken_laws() -> Iterator[str]:
    output = StringIO()
    try:
        call_command("verify_ledger", stdout=output)
    except CommandError as error:
        lines = output.getvalue().splitlines()
        details = [line for line in lines if "VIOLATIONS" in line or line.startswith("    ")]
        yield "\n".join([f"verify_ledger: {error}", *details])


def _open_ends(http: httpx2.Client) -> Iterator[str]:
    """What should have come to an end and has not."""
    for purchase in Purchase.objects.filter(state__in=(*Purchase.PENDING_STATES, Purchase.State.REVIEW)):
        yield f"purchase {purchase.pk} ({purchase.kind}) is still {purchase.state}"
    for reversal in PaymentReversal.objects.filter(Q(status=PaymentReversal.REQUESTED) | Q(purchase=None)):
        yield f"{reversal} is not finished (purchase {reversal.purchase_id})"
    for event in StripeEvent.objects.filter(state__in=("received", "failed", "aside")):
        yield f"event {event.event_id} ({event.type}) is {event.state}: {event.message}"
    if running := TokenUsage.objects.filter(status="reserved").count():
        yield f"{running} reservations are open"
    deliveries = http.get(f"{STRIPE_URL}/control/state", params={"limit": 1}).json()["deliveries"]
    if undelivered := deliveries.get("pending", 0) + deliveries.get("failed", 0):
        yield f"{undelivered} deliveries have not arrived"


def _money(http: httpx2.Client) -> Iterator[str]:
    """Tokens in the ledger beside charges, refunds and disputes of the stand-in."""
    charges = [
        charge
        for charge in read_all(http, "charges")
        if charge["status"] == "succeeded" and charge["metadata"].get("purchase_id")
    ]
    returned_cents: Counter[str] = Counter()
    for kind, taking in (("refunds", TAKING_REFUNDS), ("disputes", TAKING_DISPUTES)):
        for each in read_all(http, kind):
            returned_cents[each["payment_intent"]] += each["amount"] if each["status"] in taking else 0

    by_purchase: dict[int, list[dict[str, Any]]] = defaultdict(list)
    for charge in charges:
        by_purchase[int(charge["metadata"]["purchase_id"])].append(charge)
    for purchase_id, several in by_purchase.items():
        if len(several) > 1:
            yield f"purchase {purchase_id} was charged {len(several)} times"

    purchases = {purchase.pk: purchase for purchase in Purchase.objects.filter(pk__in=by_purchase)}
    due_tokens: dict[int, int] = {}
    for purchase_id, (charge, *_) in by_purchase.items():
        purchase = purchases.get(purchase_id)
        if purchase is None or purchase.stripe_payment_intent_id != charge["payment_intent"]:
            yield f"charge {charge['id']} belongs to purchase {purchase_id}, which does not know it"
            continue
        returned = min(returned_cents[charge["payment_intent"]], charge["amount"])
        due_tokens[purchase_id] = purchase.tokens - purchase.tokens * returned // charge["amount"]

    posted = TokenTransaction.objects.filter(purchase__isnull=False).values("purchase_id")
    posted_tokens = {row["purchase_id"]: row["tokens"] for row in posted.annotate(tokens=Sum("amount"))}
    for purchase_id in due_tokens.keys() | posted_tokens.keys():
        due, credited = due_tokens.get(purchase_id, 0), posted_tokens.get(purchase_id, 0)
        if due != credited:
            yield f"purchase {purchase_id}: Stripe's state implies {due:,} tokens, the ledger has {credited:,}"
    if sum(due_tokens.values()) != sum(posted_tokens.values()):
        yield f"Σ tokens: Stripe implies {sum(due_tokens.values()):,}, the ledger has {sum(posted_tokens.values()):,}"
    credits = TokenTransaction.objects.filter(type__in=TokenTransaction.CREDITS_FOR_MONEY).count()
    if credits != len(charges):
        yield f"{credits} credits beside {len(charges)} succeeded charges"
    yield from _exceeded_caps()


def _exceeded_caps() -> Iterator[str]:
    recharges = Purchase.objects.filter(
        kind=Purchase.Kind.AUTO_RECHARGE,
        state=Purchase.State.PAID,
        account__auto_recharge_monthly_cap_cents__isnull=False,
    )
    by_account = recharges.values("account_id", "account__auto_recharge_monthly_cap_cents")
    for row in by_account.annotate(cents=Sum("amount_cents")):
        if row["cents"] > row["account__auto_recharge_monthly_cap_cents"]:
            yield f"account {row['account_id']} was recharged for {row['cents']} cents, beyond its cap"


def sums() -> str:
    """What the ledger has, in a line."""
    rows = TokenTransaction.objects.filter(purchase__isnull=False).values("type")
    tokens = {row["type"]: row["tokens"] for row in rows.annotate(tokens=Sum("amount"))}
    bought = tokens.get("purchase", 0) + tokens.get("auto_recharge", 0)
    taken_back = -tokens.get("refund", 0)
    return f"tokens: {bought:,} credited for money, {taken_back:,} taken back, {bought - taken_back:,} left"
