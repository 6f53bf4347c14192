"""/accounts/data/ and /accounts/anonymise/: a person downloads what is theirs, or leaves."""

from collections.abc import Callable
from functools import partial, wraps
from typing import Any

from allauth.account.decorators import reauthentication_required
from allauth.core.exceptions import ReauthenticationRequired
from django import forms
from django.contrib import messages
from django.contrib.auth import logout
from django.contrib.auth.decorators import login_required
from django.http import HttpResponse
from django.http.response import HttpResponseBase
from django.shortcuts import redirect, render
from django.utils import timezone
from django.views.decorators.cache import never_cache
from django.views.decorators.http import require_GET, require_http_methods

from accounts.permissions import SignedInRequest
from ai_ops import own_data
from billing import ledger
from billing.upkeep.own_data import NotNow
from kit import outgoing

CONFIRMATION = "anonymise me"

View = Callable[..., HttpResponseBase]


def confirmed_person_required(view: View) -> View:
    """Who signed in some time ago shows once more that it is them, and comes back to this page.

    A form that is sent too late comes back to its page, too: what it does should be looked at again.
    """

    @wraps(view)
    def guarded(request: SignedInRequest, *args: Any, **kwargs: Any) -> HttpResponseBase:
        try:
            return reauthentication_required(view)(request, *args, **kwargs)
        except ReauthenticationRequired:
            if request.method == "POST":
                return redirect(request.path)
            raise

    return guarded


class AnonymiseForm(forms.Form):
    confirmation = forms.CharField(
        label=f"Type “{CONFIRMATION}”",
        max_length=100,
        widget=forms.TextInput(attrs={"autocomplete": "off", "autocapitalize": "none", "spellcheck": "false"}),
        error_messages={"required": f"Type “{CONFIRMATION}” to go on."},
    )

    def clean_confirmation(self) -> str:
        typed = " ".join(str(self.cleaned_data["confirmation"]).lower().split())
        if typed != CONFIRMATION:
            raise forms.ValidationError(f"That is not it. Type “{CONFIRMATION}” to go on.")
        return typed


@require_GET
@login_required
def data(request: SignedInRequest) -> HttpResponse:
    return render(request, "accounts/data.html")


@require_http_methods(["GET", "POST"])
@login_required
@confirmed_person_required
@never_cache
@outgoing.limited
def download(request: SignedInRequest) -> HttpResponseBase:
    """GET: what is in it. POST: the ZIP."""
    if request.method == "GET":
        return render(request, "accounts/download.html", {"downloads_a_day": own_data.DOWNLOADS_A_DAY})
    try:
        own_data.take_download(user_id=request.user.pk)
    except own_data.TooManyDownloads as error:
        messages.error(request, error.message)
        return redirect("data-download")
    name = f"postmate-data-{timezone.localdate():%Y-%m-%d}.zip"
    write = partial(own_data.write_archive, request.user)
    return outgoing.send_new(request, write, filename=name, content_type="application/zip")


@require_http_methods(["GET", "POST"])
@login_required
@confirmed_person_required
@never_cache
def anonymise(request: SignedInRequest) -> HttpResponse:
    form = AnonymiseForm(request.POST or None)
    if request.method == "POST" and form.is_valid():
        try:
            own_data.anonymize_user(user_id=request.user.pk)
        except NotNow as error:
            form.add_error(None, error.message)
        else:
            logout(request)
            messages.success(request, "Your account is anonymised. Thank you for having been here.")
            return redirect("home")
    context = {"form": form, "account": ledger.get_account(user_id=request.user.pk), "confirmation": CONFIRMATION}
    return render(request, "accounts/anonymise.html", context, status=400 if form.errors else 200)
