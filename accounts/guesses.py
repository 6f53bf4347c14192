"""How often somebody may guess a password or a code, and have mails sent to an address.

What counts is who guesses, not whose account it is: a stranger who guesses wrong uses up their own attempts. Browsers
that a person has signed in with before have attempts of their own. Very many wrong guesses from everywhere slow
unknown browsers down to one attempt each; nobody who tries for the first time is refused.
"""

import secrets
from typing import cast

from allauth.account.internal.userkit import filter_users_by_email
from allauth.core.exceptions import ImmediateHttpResponse
from allauth.core.internal import ratelimit
from allauth.core.internal.ratelimit import RateLimitUsage
from django.conf import settings
from django.contrib.auth.base_user import AbstractBaseUser
from django.core import signing
from django.http import HttpRequest, HttpResponse

COOKIE = "known_device"
COOKIE_SECONDS = 365 * 24 * 60 * 60
MAX_PEOPLE_OF_A_DEVICE = 5

RATES = {
    "origin": "5/5m/key",  # one address of the internet, one person
    "device": "5/5m/key",  # a browser that the person has signed in with, wherever it is
    "network": "30/5m/ip",  # one address of the internet, whoever is tried
    "everywhere": "20/5m/key",  # one person, from unknown browsers of all the world; above it:
    "slowed": "1/5m/key",  # one address of the internet, one person
    "mail": "5/m/key",  # of one kind to one address, asked for by one address of the internet
    "mails": "20/5m/key",  # of one kind to one address, asked for from everywhere
}


def take_password_guess(request: HttpRequest, address: str) -> RateLimitUsage | None:
    """Count an attempt before it is made; None refuses it. `rollback` gives it back when it was right.

    A flood from one address of the internet raises ImmediateHttpResponse, with 429.
    """
    address = address.lower()
    people = {user.pk for user in filter_users_by_email(address, for_login=True)} if _read_cookie(request) else set()
    device = next((device for pk, device in _read_cookie(request) if pk in people), "")
    return _take(request, f"password {address}", device)


def take_code_guess(request: HttpRequest, user: AbstractBaseUser) -> RateLimitUsage | None:
    """As `take_password_guess`, of a second factor. Few codes are possible, so the limit from everywhere is hard for
    unknown browsers: whoever gets there has the password, which its owner resets."""
    device = next((device for pk, device in _read_cookie(request) if pk == user.pk), "")
    return _take(request, f"code {user.pk}", device, may_slow=False)


def forget(request: HttpRequest, address: str) -> None:
    """Forget the attempts for the account of that address, which its owner has just proven."""
    names = [f"password {address.lower()}"]
    names += [f"code {user.pk}" for user in filter_users_by_email(address, for_login=True)]
    for name in names:
        for action, key in (
            ("origin", _of_origin(request, name)),
            ("slowed", _of_origin(request, name)),
            ("everywhere", name),
        ):
            ratelimit.clear(request, app="accounts", action=action, config=RATES, key=key)


def may_send_mail(request: HttpRequest, address: str, *, what: str) -> bool:
    """Count a mail that anybody can have sent to the address. One address of the internet cannot use all of them up.

    Each kind is counted by itself: twenty of one must not keep another from the owner, who cannot use them in its
    place.
    """
    name = f"mail {what} {address.lower()}"
    return all(_consume(request, *each) for each in (("mail", _of_origin(request, name)), ("mails", name)))


def remember_device(request: HttpRequest, response: HttpResponse, user: AbstractBaseUser) -> None:
    """Let the browser show next time that this person has signed in with it. It opens nothing."""
    others = [(pk, device) for pk, device in _read_cookie(request) if pk != user.pk]
    known = [(user.pk, secrets.token_urlsafe(9)), *others][:MAX_PEOPLE_OF_A_DEVICE]
    response.set_cookie(
        COOKIE,
        signing.dumps(known, salt=COOKIE),
        max_age=COOKIE_SECONDS,
        secure=settings.SESSION_COOKIE_SECURE,
        httponly=True,
        samesite="Lax",
    )


def _take(request: HttpRequest, name: str, device: str, *, may_slow: bool = True) -> RateLimitUsage | None:
    if device:
        return _consume(request, "device", f"{name} {device}")
    taken = RateLimitUsage(usage=[])
    for action, key in (("network", ""), ("origin", _of_origin(request, name)), ("everywhere", name)):
        usage = _consume(request, action, key)
        if usage is None and action == "everywhere" and may_slow:
            usage = _consume(request, "slowed", _of_origin(request, name))
        if usage is None and action == "network":
            raise ImmediateHttpResponse(ratelimit.respond_429(request))  # a flood, whoever it pretends to be
        if usage is None:
            return None
        taken.usage += usage.usage
    return taken


def _consume(request: HttpRequest, action: str, key: str) -> RateLimitUsage | None:
    return ratelimit.consume(request, app="accounts", action=action, config=RATES, key=key, limit_get=True)


def _of_origin(request: HttpRequest, name: str) -> str:
    return f"{name} {ratelimit.get_ip(request)}"


def _read_cookie(request: HttpRequest) -> list[tuple[int, str]]:
    """Whom the browser knows, by their id, and what it is called with each."""
    try:
        known = signing.loads(request.COOKIES.get(COOKIE, ""), salt=COOKIE, max_age=COOKIE_SECONDS)
    except signing.BadSignature:
        return []
    return [(pk, device) for pk, device in cast(list[tuple[int, str]], known)]
