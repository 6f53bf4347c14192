"""Who may call, and how often."""

import hmac
from collections.abc import Callable
from functools import wraps
from hashlib import sha256
from http import HTTPStatus
from typing import Any

from django.conf import settings
from django.http import Http404, HttpRequest, HttpResponse, HttpResponseNotAllowed
from django.views.decorators.csrf import csrf_exempt
from ninja.security import HttpBearer

from accounts import api_keys
from accounts.models import ApiKey, User
from billing.api import limits
from billing.api.problems import MissingScope, TooManyCalls, method_problem, not_found_problem, too_many_problem
from kit.addresses import network_of

View = Callable[..., HttpResponse]


class PersonRequest(HttpRequest):
    """A request with a right personal key, to the type checker."""

    auth: User


class BillingSecret(HttpBearer):
    """`Authorization: Bearer <BILLING_SECRET>`. Without a configured secret the API is closed."""

    openapi_description = "The secret that the platform's servers share (`BILLING_SECRET`)."

    def authenticate(self, request: HttpRequest, token: str) -> str | None:
        if not token or not token.isascii():
            return None
        offered = token.encode()
        # All of them are compared, so that the time tells nothing about which one was nearly right.
        matches = [hmac.compare_digest(offered, secret.encode()) for secret in settings.BILLING_SECRETS]
        if not any(matches):
            return None
        _count(request, f"secret:{sha256(offered).hexdigest()}", settings.API_SERVICE_CALLS_PER_MINUTE)
        return "service"


class PersonalKey(HttpBearer):
    """`Authorization: Bearer pm_…`, a key that may read what `scope` names. The caller is its owner."""

    openapi_description = (
        "A personal API key (`pm_…`), made under Settings → API keys. Each call needs one scope: "
        "`balance:read`, `transactions:read`, `usage:read` or `packages:read`."
    )

    def __init__(self, scope: ApiKey.Scope) -> None:
        super().__init__()
        self.scope = scope

    def authenticate(self, request: HttpRequest, token: str) -> User | None:
        key = api_keys.find_live_key(token)
        if key is None:
            return None
        _count(request, f"key:{key.token_hash}", settings.API_USER_CALLS_PER_MINUTE)
        if self.scope not in key.scopes:
            raise MissingScope(self.scope)
        api_keys.note_use(key)
        return key.user


def _count(request: HttpRequest, credential: str, limit: int) -> None:
    allowance = limits.take_for_credential(credential, limit=limit, address=network_of(request))
    request.allowance = allowance  # type: ignore[attr-defined]
    if allowance is not None and allowance.is_exceeded:
        raise TooManyCalls


def api_view(view: View) -> View:
    """What all addresses of the API share: problems instead of Django's pages, calls counted, and told how many."""

    @csrf_exempt  # no cookie opens anything here
    @wraps(view)
    def counted(request: HttpRequest, *args: Any, **kwargs: Any) -> HttpResponse:
        try:
            response = view(request, *args, **kwargs)
        except Http404:
            response = not_found_problem()
        if isinstance(response, HttpResponseNotAllowed):
            response = method_problem(response["Allow"])
        if hasattr(request, "allowance"):
            allowance = request.allowance
        elif response.status_code == HTTPStatus.SERVICE_UNAVAILABLE:
            allowance = None  # the database could not say whether the credential was right
        else:
            allowance = limits.take_for_address(network_of(request))
            if allowance is not None and allowance.is_exceeded:
                response = too_many_problem()
        if allowance is not None:
            for name, value in allowance.headers.items():
                response[name] = value
            if response.status_code == HTTPStatus.TOO_MANY_REQUESTS:
                response["Retry-After"] = str(allowance.reset_seconds)
        return response

    return counted


@api_view
def not_found(request: HttpRequest) -> HttpResponse:
    """Every unknown address under the API's."""
    return not_found_problem()
