from django.conf import settings
from django.http import HttpRequest
from django.utils.crypto import salted_hmac


def rehearsal(request: HttpRequest) -> dict[str, bool]:
    """`is_rehearsal`: whether pages say that no real money moves here."""
    return {"is_rehearsal": settings.REHEARSAL}


def sign_in(request: HttpRequest) -> dict[str, str]:
    """`sign_in` for signed-in people: names their session without giving it away; a page notices another one by it."""
    if not getattr(request, "user", None) or not request.user.is_authenticated:
        return {}
    return {"sign_in": salted_hmac("postmate.sign_in", request.session.session_key or "").hexdigest()[:16]}
