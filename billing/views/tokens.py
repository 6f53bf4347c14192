"""/tokens/: what a person has, what it cost, and how to get more."""

from dataclasses import replace
from email.utils import parseaddr
from uuid import uuid4

from allauth.account.decorators import reauthentication_required
from allauth.account.models import EmailAddress
from django.conf import settings
from django.contrib import messages
from django.contrib.auth.decorators import login_required
from django.core.exceptions import PermissionDenied, ValidationError
from django.db import transaction
from django.db.models import QuerySet
from django.http import HttpRequest, HttpResponse
from django.middleware.csrf import get_token
from django.shortcuts import get_object_or_404, redirect, render
from django.urls import reverse
from django.views.decorators.http import require_GET, require_http_methods, require_POST

from accounts.permissions import SignedInRequest
from accounts.workspaces import enter, place_of, visible_to
from billing import history, payer
from billing.catalogue import packages, system_settings
from billing.forms import AmountForm, AutoRechargeForm, CheckoutForm, ConfirmForm
from billing.history import receipts
from billing.models import Purchase, TokenAccount, TokenUsage
from billing.models.account import WithheldBonus
from billing.models.fields import Currency
from billing.payments import cards, confirmation, gateway, purchases, recharge_settings
from billing.payments.checkout import AmountNotSold, create_checkout_session, terms_of_amount, why_currency_is_fixed
from billing.payments.gateway import GatewayUnavailable
from billing.usage import stats
from kit import outgoing

NEWEST_ENTRIES = 8
# The unit in which packages are explained to people: tokens say little.
WORTH = {
    TokenUsage.OperationType.GENERATION: "drafts",
    TokenUsage.OperationType.CHAT: "chat answers",
    TokenUsage.OperationType.IMAGE: "images",
}


@require_GET
@login_required
def home(request: SignedInRequest) -> HttpResponse:
    return _render_home(request)


def _render_home(
    request: SignedInRequest,
    *,
    amount_form: CheckoutForm | None = None,
    recharge_form: AutoRechargeForm | None = None,
    status: int = 200,
) -> HttpResponse:
    account = payer.account_of(request)
    if not place_of(request).manages:
        return render(request, "billing/tokens_of_member.html", {"account": account}, status=status)
    currencies = [account.currency] if why_currency_is_fixed(account) else packages.list_currencies()
    asked_currency = request.POST.get("currency") or request.GET.get("currency", account.currency)
    currency = asked_currency if asked_currency in currencies else next(iter(currencies), Currency.USD)
    averages = stats.average_tokens_by_operation(account)
    context = {
        "account": account,
        "lots": account.live_lots,
        "ended_tokens": account.ended_tokens,
        "withheld_bonus": _withheld_bonus(account),
        "contact_address": _contact_address(),
        "average_tokens_per_operation": stats.average_tokens_per_operation(account),
        "runway": stats.runway(account),
        "offers": [
            replace(
                offer, worth=[(name, offer.package.tokens // averages[type].tokens) for type, name in WORTH.items()]
            )
            for offer in packages.list_offers(currency)
        ],
        # The weakest of the three: own < everyone < default.
        "worth_basis": max((averages[type].basis for type in WORTH), key=("own", "everyone", "default").index),
        "currencies": currencies,
        "currency": currency,
        "amount_form": amount_form or CheckoutForm(currency=currency),
        "recharge": recharge_settings.get_overview(account),
        "why_no_card": recharge_settings.why_no_card(account),
        "recharge_form": recharge_form or AutoRechargeForm(account=account),
        "system_settings": system_settings.get_system_settings(),
        "checkout_key": uuid4().hex,
        "entries": history.get_page(history.select_transactions(account_id=account.pk), limit=NEWEST_ENTRIES).entries,
    }
    return render(request, "billing/tokens.html", context, status=status)


def _withheld_bonus(account: TokenAccount) -> str:
    """Why there is no welcome bonus; until it waits no more, or the first entry is there. Told to nobody who has not
    shown that the mailbox is theirs: it says that somebody with it was here."""
    is_told = account.bonus_withheld == WithheldBonus.WAITS or (account.bonus_withheld and not account.sequence)
    if is_told and EmailAddress.objects.filter(user_id=account.user_id, verified=True).exists():
        return account.bonus_withheld
    return ""


def _contact_address() -> str:
    return parseaddr(settings.DEFAULT_FROM_EMAIL)[1]


@require_GET
def balance(request: HttpRequest) -> HttpResponse:
    """The badge in the header, for pages whose live stream is down; and a token for the forms of a page that a sign-in
    elsewhere has outdated: no script can read it from the cookie. X-Reader says who is signed in by now."""
    if not request.user.is_authenticated:
        return HttpResponse(status=401)  # a redirect would bring the sign-in page into the header
    place_of(request)  # refused to who is in the workspace no more
    response = render(request, "billing/_balance.html")
    response["X-CSRFToken"] = get_token(request)
    response["X-Reader"] = str(request.user.pk)
    return response


@require_GET
@login_required
def price(request: SignedInRequest) -> HttpResponse:
    """What the amount that is being typed buys, as a partial."""
    form = AmountForm(request.GET)
    context: dict[str, object] = {}
    if form.is_valid() and form.cleaned_data["amount"]:
        try:
            currency = form.cleaned_data["currency"] or Currency.USD
            context["terms"] = terms_of_amount(form.cleaned_data["amount"], currency=currency)
        except AmountNotSold as error:
            context["refusal"] = error.message
    return render(request, "billing/_amount_price.html", context)


@require_POST
@login_required
@payer.manager_required
def checkout(request: SignedInRequest) -> HttpResponse:
    form = CheckoutForm(request.POST)
    if not form.is_valid():
        return _render_home(request, amount_form=form, status=400)
    try:
        purchase = create_checkout_session(
            account_id=payer.account_of(request).pk,
            actor_id=request.user.pk,
            terms=form.terms,
            checkout_key=form.cleaned_data["checkout_key"],
        )
    except AmountNotSold as error:
        form.add_error("amount", error.message)
        return _render_home(request, amount_form=form, status=400)
    except purchases.PurchaseError as error:
        messages.error(request, error.message)
        return redirect("tokens:home")
    except gateway.GatewayError as error:
        # Opening a payment page moves no money, whatever became of the request.
        messages.error(request, f"{error.message} You were not charged. {_way_on(error)}")
        return redirect("tokens:home")
    if purchase.checkout_url and purchase.state == Purchase.State.OPEN:
        return redirect(purchase.checkout_url)
    return redirect("tokens:success", purchase.pk)


def _way_on(error: gateway.GatewayError) -> str:
    """What somebody can do whose payment page did not open."""
    if error.http_status == GatewayUnavailable.http_status:
        return "Your next click goes on where this one stopped."
    return (
        "Try again, or another package or amount. If it happens again, write to "
        f"{_contact_address()} and tell us when it was."
    )


@require_GET
@login_required
def success(request: SignedInRequest, pk: int) -> HttpResponse:
    """Where Stripe sends the buyer back to. It says what Stripe says, and asks Stripe when the webhook is late."""
    return render(request, "billing/checkout_success.html", {"purchase": _own_purchase(request, pk)})


@require_GET
@login_required
def cancelled(request: SignedInRequest, pk: int) -> HttpResponse:
    return render(request, "billing/checkout_cancelled.html", {"purchase": _own_purchase(request, pk)})


@require_GET
@login_required
@outgoing.limited
def receipt(request: SignedInRequest, pk: int) -> HttpResponse:
    """Our receipt for a paid purchase, as a PDF."""
    paid = Purchase.objects.select_related("user", "account__workspace").filter(state=Purchase.State.PAID)
    purchase = _purchase_here(request, paid, pk)
    if purchase.receipt_number is None:  # paid before receipts had numbers
        with transaction.atomic():
            purchases.number_receipt(purchase)
    return HttpResponse(
        receipts.render_receipt(purchase),
        content_type="application/pdf",
        headers={"Content-Disposition": f'inline; filename="postmate-receipt-{purchase.receipt_number}.pdf"'},
    )


def _own_purchase(request: SignedInRequest, pk: int) -> Purchase:
    return purchases.refresh_from_stripe(_purchase_here(request, Purchase.objects.all(), pk))


def _purchase_here(request: SignedInRequest, purchases_of_a_kind: QuerySet[Purchase], pk: int) -> Purchase:
    """The purchase, and its workspace entered, of which it is: Stripe and mails lead here, wherever somebody works."""
    visible = purchases_of_a_kind.filter(workspace__in=visible_to(request.user.pk))
    purchase = get_object_or_404(visible, pk=pk)
    if not enter(request, purchase.workspace_id).manages:
        raise PermissionDenied
    return purchase


# --- Auto-recharge --------------------------------------------------------------------------------------------------


def _to_recharge_panel() -> HttpResponse:
    return redirect(reverse("tokens:home") + "#auto-recharge")


@reauthentication_required  # type: ignore[untyped-decorator]
def _require_password(request: SignedInRequest) -> None:
    """A session alone, which may be stolen, spends nobody's money: unless the password was given lately, this leads to
    where it is asked for, and from there back to the same request."""


@require_POST
@login_required
@payer.manager_required
def auto_recharge(request: SignedInRequest) -> HttpResponse:
    account = payer.account_of(request)
    form = AutoRechargeForm(request.POST, account=account)
    if form.is_valid():
        try:
            if form.cleaned_data["enabled"]:
                recharge_settings.check_settings(account, **form.cleaned_data)  # before the password is asked for
                _require_password(request)
            account = recharge_settings.update_auto_recharge(account_id=account.pk, **form.cleaned_data)
        except ValidationError as error:
            form.add_error(None, error)
        else:
            is_on = account.auto_recharge_enabled
            messages.success(
                request, f"Saved. Auto-recharge is {f'on: {account.auto_recharge_terms}' if is_on else 'off'}."
            )
            return _to_recharge_panel()
    return _render_home(request, recharge_form=form, status=400)


@require_http_methods(["GET", "POST"])
@login_required
@payer.manager_required
def card(request: SignedInRequest) -> HttpResponse:
    """POST leads to Stripe's page where the saved card is changed or removed; GET is where that page leads back."""
    if request.method == "GET":
        cards.refresh_card(account_id=payer.account_of(request).pk)
        return _to_recharge_panel()
    _require_password(request)
    try:
        url = cards.open_card_page(
            account_id=payer.account_of(request).pk, return_url=f"{settings.SITE_URL}{reverse('tokens:card')}"
        )
    except gateway.GatewayRefused:  # it will be each time
        messages.error(
            request,
            "Stripe's page for your card is not available here. To change the card, buy a package with another one: it "
            "takes this one's place. Until then, switching auto-recharge off keeps this one from being charged.",
        )
        return redirect(reverse("tokens:home") + "#packages")
    except gateway.GatewayError:
        messages.error(
            request,
            "Stripe's page for your card could not be opened. Try again in a moment, or buy a package with another "
            "card: it takes this one's place.",
        )
        return _to_recharge_panel()
    if not url:
        messages.info(request, recharge_settings.why_no_card(payer.account_of(request)))
        return _to_recharge_panel()
    return redirect(url)


@require_http_methods(["GET", "POST"])
@login_required
def confirm(request: SignedInRequest, pk: int) -> HttpResponse:
    """An auto-recharge whose bank wants to see the card's owner. POST leads to the bank; GET says what Stripe says."""
    purchase = _purchase_here(request, Purchase.objects.filter(kind=Purchase.Kind.AUTO_RECHARGE), pk)
    if request.method == "GET":
        context = {"purchase": confirmation.refresh_from_stripe(purchase), "confirm_key": uuid4().hex}
        return render(request, "billing/confirm_payment.html", context)
    form = ConfirmForm(request.POST)
    bank_url = ""
    if form.is_valid():
        return_url = f"{settings.SITE_URL}{reverse('tokens:confirm', args=[pk])}"
        try:
            bank_url = confirmation.start_confirmation(purchase, return_url=return_url, **form.cleaned_data)
        except gateway.GatewayRefused as error:
            messages.error(
                request, f"{error.message} You were not charged. Change your card under Tokens, or buy a package there."
            )
        except (gateway.GatewayError, purchases.AccountMayNotBuy) as error:
            messages.error(request, error.message)
    return redirect(bank_url or request.path)
