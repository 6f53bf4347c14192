"""Where a request comes from."""

from allauth.account.adapter import get_adapter
from allauth.core.internal.ratelimit import truncate_ip
from django.core.exceptions import PermissionDenied
from django.http import HttpRequest


def address_of(request: HttpRequest) -> str | None:
    """The client's IP address; None when it cannot be told."""
    try:
        return str(get_adapter().get_client_ip(request))  # knows how many proxies to trust
    except PermissionDenied:
        return None


def network_of(request: HttpRequest) -> str:
    """What counts as one caller: the address, of IPv6 its /64, in which one machine has as many as it likes."""
    return truncate_ip(address_of(request) or "unknown")
