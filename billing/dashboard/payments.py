"""/admin/tokens/: what admins see of purchases, of differences with Stripe and of its events. Superadmins act on it."""

from typing import Any
from uuid import uuid4

from django.contrib import messages
from django.core.paginator import Paginator
from django.http import HttpResponse
from django.shortcuts import get_object_or_404, redirect, render
from django.views.decorators.http import require_GET, require_http_methods, require_POST

from accounts.permissions import SignedInRequest, admin_required, superadmin_required
from billing.dashboard.lists import choices_of
from billing.forms import RefundConfirmationForm, RefundForm, ResolutionForm
from billing.models import Drift, PaymentReversal, Purchase, StripeEvent, TokenAccount, TokenTransaction
from billing.payments import gateway, reconcile, refund_requests, refunds, webhooks

ROWS_PER_PAGE = 25
MAX_OPEN_DRIFTS = 200


@require_http_methods(["GET", "HEAD", "POST"])
@admin_required
def purchase(request: SignedInRequest, pk: int) -> HttpResponse:
    """One purchase with all that became of it. Superadmins refund it here: asked for, then confirmed."""
    purchase = get_object_or_404(Purchase.objects.select_related("user", "account__user", "account__workspace"), pk=pk)
    if request.method != "POST":
        return _render_purchase(request, purchase)
    return _refund(request, pk=purchase.pk)


@superadmin_required
def _refund(request: SignedInRequest, pk: int) -> HttpResponse:
    purchase = Purchase.objects.select_related("user", "account__user", "account__workspace").get(pk=pk)
    if "confirmed" in request.POST:
        return _refund_confirmed(request, purchase)
    form = RefundForm(request.POST, purchase=purchase)
    if not form.is_valid():
        return _render_purchase(request, purchase, form=form, status=400)
    amount_cents = form.cleaned_data["amount_cents"]
    clawback_tokens = refund_requests.clawback_tokens(purchase, amount_cents=amount_cents)
    confirmation = {
        "amount_cents": amount_cents,
        "amount": purchase.money(amount_cents),
        "reason": form.cleaned_data["reason"],
        "request_key": form.cleaned_data["request_key"],
        "clawback_tokens": clawback_tokens,
        "new_balance": purchase.account.balance - clawback_tokens,
    }
    return _render_purchase(request, purchase, confirmation=confirmation)


def _refund_confirmed(request: SignedInRequest, purchase: Purchase) -> HttpResponse:
    form = RefundConfirmationForm(request.POST)
    if not form.is_valid():
        messages.error(request, "Nothing was refunded: the form was not complete. Start again.")
        return redirect("dashboard:purchase", purchase.pk)
    try:
        reversal = refund_requests.request_refund(
            purchase_id=purchase.pk, requested_by_id=request.user.pk, **form.cleaned_data
        )
    except refund_requests.RefundUnanswered as error:
        messages.warning(request, error.message)
    except (refund_requests.RefundError, gateway.GatewayError) as error:
        messages.error(request, error.message)
    else:
        messages.success(request, f"{reversal.amount_display} were refunded to {purchase.account.holder}.")
    return redirect("dashboard:purchase", purchase.pk)


def _render_purchase(
    request: SignedInRequest,
    purchase: Purchase,
    *,
    form: RefundForm | None = None,
    confirmation: dict[str, Any] | None = None,
    status: int = 200,
) -> HttpResponse:
    refundable_cents = refund_requests.refundable_cents(purchase)
    if form is None and refundable_cents and request.user.is_superadmin:
        form = RefundForm(initial={"what": "unused", "request_key": uuid4().hex}, purchase=purchase)
    context = {
        "purchase": purchase,
        "account": TokenAccount.objects.get(pk=purchase.account_id),
        "entries": TokenTransaction.objects.filter(purchase=purchase).order_by("sequence"),
        "reversals": PaymentReversal.objects.filter(purchase=purchase).select_related("requested_by").order_by("pk"),
        "refundable": purchase.money(refundable_cents),
        "refundable_cents": refundable_cents,
        "taken_tokens": refunds.taken_tokens(purchase),
        "drifts": Drift.objects.filter(purchase=purchase),
        "form": form,
        "confirmation": confirmation,
    }
    return render(request, "dashboard/purchase.html", context, status=status)


@require_GET
@admin_required
def drifts(request: SignedInRequest) -> HttpResponse:
    """Where our books and Stripe's differ, and what became of it."""
    resolved = (
        Drift.objects.filter(resolved_at__isnull=False).select_related("purchase").order_by("-resolved_at", "-id")
    )
    context = {
        "open_drifts": Drift.objects.filter(resolved_at=None).select_related("purchase")[:MAX_OPEN_DRIFTS],
        "page": Paginator(resolved, ROWS_PER_PAGE).get_page(request.GET.get("page")),
    }
    return render(request, "dashboard/drifts.html", context)


@require_POST
@superadmin_required
def resolve_drift(request: SignedInRequest, pk: int) -> HttpResponse:
    """A superadmin says what they did about a drift."""
    drift = get_object_or_404(Drift, pk=pk)
    form = ResolutionForm(request.POST)
    if not form.is_valid():
        messages.error(request, "Say what was done about it.")
    elif reconcile.resolve_drift(drift, resolution=form.cleaned_data["resolution"], by=request.user):
        messages.success(request, "Noted as resolved.")
    else:
        messages.info(request, "It was resolved already.")
    return redirect("dashboard:drifts")


@require_GET
@admin_required
def events(request: SignedInRequest) -> HttpResponse:
    """Stripe's events that are not dealt with yet: those that failed, and those that wait for a person."""
    labels = {"": "All", "aside": "Set aside", "failed": "To repeat", "received": "Waiting"}  # as on the overview
    chosen = request.GET.get("state", "")
    chosen = chosen if chosen in labels else ""
    found = StripeEvent.objects.filter(state__in=[chosen] if chosen else webhooks.OPEN).defer("payload")
    context = {
        "page": Paginator(found.order_by("-received_at", "-id"), ROWS_PER_PAGE).get_page(request.GET.get("page")),
        "choices": choices_of(request, "state", labels, chosen=chosen),
    }
    return render(request, "dashboard/events.html", context)


@require_POST
@superadmin_required
def handle_event(request: SignedInRequest, pk: int) -> HttpResponse:
    """A superadmin has an event handled once more, or says that they dealt with it."""
    event = get_object_or_404(StripeEvent, pk=pk)
    decision = request.POST.get("decision")
    if decision not in ("again", "settle"):
        messages.error(request, "Choose whether to handle it again or to note it as dealt with.")
    elif decision == "settle":
        if webhooks.settle_by_hand(event, by=request.user):
            messages.success(request, f"{event.event_id} is noted as dealt with.")
        else:
            messages.info(request, "It does not wait for a person any more.")
    else:
        _handle_event_again(request, event)
    return redirect("dashboard:events")


def _handle_event_again(request: SignedInRequest, event: StripeEvent) -> None:
    try:
        handled = webhooks.handle_again(event, by=request.user)
    except webhooks.EventNotHandled as error:
        messages.error(request, f"{event.event_id} failed again: {error.__cause__!r}")
    else:
        tell = messages.warning if handled.state == StripeEvent.State.ASIDE else messages.success
        tell(request, f"{event.event_id}: {handled.get_state_display()}. {handled.message}")
