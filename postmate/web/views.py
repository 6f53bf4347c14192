"""The front door, and what machines ask about."""

import hmac
from email import message_from_bytes, policy
from email.message import EmailMessage
from pathlib import Path

import redis
from csp.constants import SELF, UNSAFE_INLINE
from csp.decorators import csp_replace
from django.conf import settings
from django.db import DatabaseError, connection
from django.http import Http404, HttpRequest, HttpResponse, JsonResponse
from django.shortcuts import redirect, render
from django.views.decorators.clickjacking import xframe_options_sameorigin
from django.views.decorators.http import require_GET, require_safe
from psycopg_pool import PoolTimeout

from billing.catalogue import packages, system_settings
from kit import redis_client
from postmate import serving
from postmate.web import metrics


@require_safe
def home(request: HttpRequest) -> HttpResponse:
    """Signed out: what it is and the prices. Signed in: the Studio."""
    if request.user.is_authenticated:
        return redirect("studio:home")
    context = {
        "offers": packages.list_offers(),
        "welcome_bonus_tokens": welcome_bonus_tokens(),
    }
    return render(request, "home.html", context)


def welcome_bonus_tokens() -> int:
    """What a new account begins with."""
    return system_settings.get_system_settings().welcome_bonus_tokens


@require_safe
def healthz(request: HttpRequest) -> HttpResponse:
    """The process lives and takes requests. One that is about to stop says so, and the proxy goes elsewhere."""
    if serving.is_draining():
        return HttpResponse("stopping", content_type="text/plain", status=503)
    return HttpResponse("ok", content_type="text/plain")


@require_safe
def readyz(request: HttpRequest) -> JsonResponse:
    """The process can work: the database answers, and it is not about to stop.

    Whether Redis answers is told, too, and turns nobody away: pages, debits and webhooks do without it, and a load
    balancer that took every process out at once would make an outage of it.
    """
    if serving.is_draining():
        return JsonResponse({"stopping": True}, status=503)
    answers = {"database": _database_answers(), "redis": _redis_answers()}
    return JsonResponse(answers, status=200 if answers["database"] else 503)


@require_GET
def prometheus_metrics(request: HttpRequest) -> HttpResponse:
    """For Prometheus, with `Authorization: Bearer <METRICS_TOKEN>`. For anybody else it does not exist."""
    if not _may_read_metrics(request):
        raise Http404
    return HttpResponse(metrics.render(), content_type=metrics.CONTENT_TYPE)


def _may_read_metrics(request: HttpRequest) -> bool:
    if not settings.METRICS_TOKENS:
        return settings.DEBUG and request.META.get("REMOTE_ADDR") in ("127.0.0.1", "::1")
    scheme, _, offered = request.headers.get("Authorization", "").partition(" ")
    # All of them are compared, so that the time tells nothing about which one was nearly right.
    matches = [hmac.compare_digest(offered.encode(), token.encode()) for token in settings.METRICS_TOKENS]
    return scheme.lower() == "bearer" and any(matches)


def _database_answers() -> bool:
    try:
        with connection.cursor() as cursor:
            cursor.execute("SELECT 1")
    except (DatabaseError, PoolTimeout):
        return False
    return True


def _redis_answers() -> bool:
    try:
        return bool(redis_client.client().ping())
    except redis.RedisError:
        return False


# --- For development: the e-mails that were written to files, since there is no mail server ----------------------

MAILS_LISTED = 100
MAIL_FILES = "*.log"  # as Django's file backend names them
BETWEEN_MAILS = b"\n" + b"-" * 79 + b"\n"

# What a mail program would show, and nothing that it would not: no scripts, nothing loaded, no forms.
MAIL_POLICY = {
    "default-src": ["'none'"],
    "style-src": [UNSAFE_INLINE],
    "img-src": ["data:"],
    "frame-ancestors": [SELF],
    "form-action": ["'none'"],
    "sandbox": ["allow-popups", "allow-popups-to-escape-sandbox"],
}


@require_GET
def mails(request: HttpRequest) -> HttpResponse:
    """The latest e-mails, newest first."""
    files = sorted(_mail_directory().glob(MAIL_FILES), key=lambda path: path.stat().st_mtime, reverse=True)
    found = [
        {"file": path.name, "number": number, "mail": mail}
        for path in files[:MAILS_LISTED]
        for number, mail in reversed(list(enumerate(_read_mails(path))))
    ]
    return render(request, "dev/mails.html", {"mails": found[:MAILS_LISTED], "directory": settings.EMAIL_FILE_PATH})


@require_GET
def mail(request: HttpRequest, file: str, number: int) -> HttpResponse:
    found = _find_mail(file, number)
    context = {"mail": found, "text": _body(found, "plain"), "has_html": bool(_body(found, "html"))}
    return render(request, "dev/mail.html", context | {"file": file, "number": number})


@require_GET
@xframe_options_sameorigin
@csp_replace(MAIL_POLICY)  # type: ignore[arg-type] # its types know no views with arguments
def mail_html(request: HttpRequest, file: str, number: int) -> HttpResponse:
    """The mail as a mail program shows it; its links open a new tab."""
    html = _body(_find_mail(file, number), "html")
    return HttpResponse(html.replace("<head>", '<head><base target="_blank">', 1))


def _mail_directory() -> Path:
    if not settings.DEBUG or not getattr(settings, "EMAIL_FILE_PATH", None):
        raise Http404
    return Path(settings.EMAIL_FILE_PATH)


def _read_mails(path: Path) -> list[EmailMessage]:
    parts = path.read_bytes().split(BETWEEN_MAILS)[:-1]
    return [message_from_bytes(part, policy=policy.default) for part in parts]


def _find_mail(file: str, number: int) -> EmailMessage:
    # Looked for among the names, so that no path leads out of the directory.
    for path in _mail_directory().glob(MAIL_FILES):
        if path.name == file and number < len(mails := _read_mails(path)):
            return mails[number]
    raise Http404


def _body(mail: EmailMessage, kind: str) -> str:
    part = mail.get_body((kind,))
    return str(part.get_content()) if part else ""
