"""Who may see what."""

from collections.abc import Callable
from functools import wraps
from typing import Any

import structlog
from allauth.account.authentication import get_authentication_records
from allauth.mfa.models import Authenticator
from allauth.mfa.utils import is_mfa_enabled
from django.conf import settings
from django.contrib import messages
from django.contrib.auth.decorators import login_required
from django.core.exceptions import PermissionDenied
from django.http import HttpRequest, HttpResponse
from django.shortcuts import redirect
from django.urls import reverse

from accounts import audit
from accounts.models import User

logger = structlog.get_logger(__name__)


class SignedInRequest(HttpRequest):
    """A request behind `login_required`, to the type checker: somebody is signed in."""

    user: User


View = Callable[..., HttpResponse]


def admin_required(view: View) -> View:
    """For admins and superadmins. Others are refused with 403; people who are not signed in are asked to."""
    return _require(view, lambda user: user.is_admin)


def superadmin_required(view: View) -> View:
    """For superadmins alone."""
    return _require(view, lambda user: user.is_superadmin)


def lacks_second_factor(request: HttpRequest) -> bool:
    """Whether the admin side is closed to this session until it has shown a second factor that its owner has now.

    That the account has one says nothing about who sits here. In development nobody needs it.
    """
    if not settings.ADMIN_MFA_REQUIRED:
        return False
    shown = {each.get("id") for each in get_authentication_records(request, request.user) if each["method"] == "mfa"}
    return not shown or not Authenticator.objects.filter(user=request.user, pk__in=shown).exists()


def may_enter_django_admin(request: HttpRequest) -> bool:
    """Whom Django admin sends to its sign-in instead, which `superadmin_required` guards: it says what is missing."""
    user = request.user
    return isinstance(user, User) and user.is_active and user.is_superadmin and not lacks_second_factor(request)


def _require(view: View, may: Callable[[User], bool]) -> View:
    @login_required
    @wraps(view)
    def guarded(request: SignedInRequest, *args: Any, **kwargs: Any) -> HttpResponse:
        if not may(request.user):
            logger.warning("A page was refused", user_id=request.user.pk, role=request.user.role, method=request.method)
            audit.write_refusal(
                action=audit.Action.ACCESS,
                summary=f"Was refused {request.method} {request.path}",
                actor=request.user,
            )
            raise PermissionDenied
        if lacks_second_factor(request):
            if is_mfa_enabled(request.user):
                return redirect(reverse("mfa_reauthenticate", query={"next": request.get_full_path()}))
            messages.warning(request, "Set up two-factor authentication first: the admin side needs it.")
            return redirect("mfa_index")
        return view(request, *args, **kwargs)

    return guarded
