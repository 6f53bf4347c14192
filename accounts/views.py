"""/accounts/: a person's keys to their own data over the HTTP API, and the page of a reset."""

from allauth.account.adapter import get_adapter
from allauth.account.decorators import reauthentication_required
from allauth.account.views import PasswordResetFromKeyView
from django.contrib import messages
from django.contrib.auth.decorators import login_required
from django.http import HttpRequest, HttpResponse
from django.http.response import HttpResponseBase
from django.shortcuts import get_object_or_404, redirect, render
from django.views.decorators.cache import never_cache
from django.views.decorators.http import require_http_methods, require_POST

from accounts import access, api_keys
from accounts.forms import ApiKeyForm
from accounts.models import ApiKey
from accounts.permissions import SignedInRequest


@require_http_methods(["GET", "POST"])
@login_required
@reauthentication_required(allow_get=True)  # type: ignore[untyped-decorator]  # a key outlives the session that made it, which may be a stolen one
@never_cache  # the answer to POST holds the token
def keys(request: SignedInRequest) -> HttpResponse:
    """The keys, and the form for a new one, of which its owner is told by e-mail.

    A new key's token is in the answer to the POST and nowhere else.
    """
    form = ApiKeyForm(request.POST or None)
    made, token = None, ""
    if request.method == "POST" and form.is_valid():
        try:
            made, token = api_keys.make_key(
                user_id=request.user.pk,
                name=form.cleaned_data["name"],
                scopes=form.cleaned_data["scopes"],
                expires_at=form.expires_at,
            )
        except api_keys.TooManyKeys as error:
            form.add_error(None, error.message)
        else:
            get_adapter().send_notification_mail("account/email/api_key_made", request.user, {"key": made})
            form = ApiKeyForm()
    return _render(request, form, made=made, token=token)


def _render(request: SignedInRequest, form: ApiKeyForm, *, made: ApiKey | None, token: str) -> HttpResponse:
    found = api_keys.list_keys(user_id=request.user.pk)
    context = {
        "form": form,
        "made": made,
        "token": token,
        "live_keys": [key for key in found if key.is_live],
        "past_keys": [key for key in found if not key.is_live],
    }
    return render(request, "accounts/api_keys.html", context, status=400 if form.errors else 200)


@require_POST
@login_required
def revoke_key(request: SignedInRequest, pk: int) -> HttpResponse:
    key = get_object_or_404(ApiKey, pk=pk, user=request.user)
    api_keys.revoke_key(key)
    messages.success(request, f"{key.name} is revoked. What still uses it is refused from now on.")
    return redirect("api-keys")


class ResetFromKeyView(PasswordResetFromKeyView):
    """allauth's, which also remembers where the link was sent: the page's own address shows neither."""

    def dispatch(self, request: HttpRequest, uidb36: str, key: str, **kwargs: object) -> HttpResponseBase:
        if access.SENT_TO in request.GET:
            request.session[access.SENT_TO] = request.GET[access.SENT_TO]
        answer: HttpResponseBase = super().dispatch(request, uidb36, key, **kwargs)
        return answer

    def get_context_data(self, **kwargs: object) -> dict[str, object]:
        context: dict[str, object] = super().get_context_data(**kwargs)
        if self.reset_user is not None:
            context["openers"] = access.list_openers(self.reset_user)
        return context
