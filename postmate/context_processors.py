from django.conf import settings
from django.http import HttpRequest


def rehearsal(request: HttpRequest) -> dict[str, bool]:
    """`is_rehearsal`: whether pages say that no real money moves here."""
    return {"is_rehearsal": settings.REHEARSAL}
