"""Who may see what."""

import logging
from collections.abc import Callable
from functools import wraps
from typing import Any

from django.contrib.auth.decorators import login_required
from django.core.exceptions import PermissionDenied
from django.http import HttpRequest, HttpResponse

from accounts import audit
from accounts.models import User

logger = logging.getLogger(__name__)


class SignedInRequest(HttpRequest):
    """A request behind `login_required`, to the type checker: somebody is signed in."""

    user: User


View = Callable[..., HttpResponse]


def admin_required(view: View) -> View:
    """For admins and superadmins. Others are refused with 403, who is not signed in is asked to."""
    return _require(view, lambda user: user.is_admin)


def superadmin_required(view: View) -> View:
    """For superadmins alone."""
    return _require(view, lambda user: user.is_superadmin)


def _require(view: View, may: Callable[[User], bool]) -> View:
    @login_required
    @wraps(view)
    def guarded(request: SignedInRequest, *args: Any, **kwargs: Any) -> HttpResponse:
        if not may(request.user):
            logger.warning(
                "User %s (%s) was refused %s %s", request.user.pk, request.user.role, request.method, request.path
            )
            audit.write_refusal(
                action=audit.Action.ACCESS,
                summary=f"Was refused {request.method} {request.path}",
                actor=request.user,
            )
            raise PermissionDenied
        return view(request, *args, **kwargs)

    return guarded
