"""/accounts/settings/: who a person is, their time zone, and in which currency they buy."""

from django.contrib import messages
from django.contrib.auth.decorators import login_required
from django.http import HttpResponse
from django.shortcuts import redirect, render
from django.views.decorators.http import require_http_methods

from accounts.models import User
from accounts.permissions import SignedInRequest
from billing import ledger
from billing.forms import SettingsForm
from billing.payments import checkout


@require_http_methods(["GET", "POST"])
@login_required
def profile(request: SignedInRequest) -> HttpResponse:
    account = ledger.get_account(user_id=request.user.pk)
    # A copy: a refused form must not rename the person in the page's header.
    person = User.objects.get(pk=request.user.pk)
    form = SettingsForm(request.POST or None, instance=person, account=account)
    if request.method == "POST" and form.is_valid():
        try:
            checkout.update_currency(user_id=person.pk, currency=form.cleaned_data["currency"])
        except checkout.CurrencyNotChanged as error:
            form.add_error("currency", error.message)
        else:
            form.save()
            messages.success(request, "Your settings were saved.")
            return redirect("settings")
    return render(request, "accounts/settings.html", {"form": form}, status=400 if form.errors else 200)
