"""/tokens/notifications/: what a person was told, and what they are told by e-mail."""

from django.contrib import messages
from django.contrib.auth.decorators import login_required
from django.http import HttpRequest, HttpResponse
from django.shortcuts import redirect, render
from django.views.decorators.http import require_GET, require_http_methods, require_POST

from accounts.permissions import SignedInRequest
from billing.models.notification import NotificationKind as Kind
from billing.notifications import inbox
from kit.text import read_id

MESSAGES_PER_PAGE = 25

GROUPS = {
    "Payments": (
        Kind.PURCHASE_CONFIRMED,
        Kind.REFUND_APPLIED,
        Kind.REFUND_FAILED,
        Kind.DISPUTE_OPENED,
        Kind.DISPUTE_CLOSED,
    ),
    "Auto-recharge": (
        Kind.AUTO_RECHARGE_SUCCEEDED,
        Kind.AUTO_RECHARGE_FAILED,
        Kind.AUTO_RECHARGE_NEEDS_CONFIRMATION,
        Kind.AUTO_RECHARGE_SWITCHED_OFF,
        Kind.AUTO_RECHARGE_SWITCHED_ON,
        Kind.SAVED_CARD_CHANGED,
    ),
    "Your balance": (Kind.LOW_BALANCE, Kind.CRITICAL_BALANCE, Kind.GRANT_RECEIVED, Kind.TOKENS_DEDUCTED),
    "Your account": (Kind.ACCOUNT_STATUS_CHANGED,),
    "For admins": (Kind.WEEKLY_SUMMARY, Kind.REFUND_REFUSED, Kind.PROVIDER_REFUSES_US),
}


@require_GET
@login_required
def home(request: SignedInRequest) -> HttpResponse:
    """The messages, newest first. Those shown are read afterwards."""
    user_id = request.user.pk
    before_id = _before_id(request)
    # One more than is shown tells whether there are older ones.
    found = inbox.list_notifications(user_id=user_id, before_id=before_id, limit=MESSAGES_PER_PAGE + 1)
    shown = found[:MESSAGES_PER_PAGE]
    # A browser that loads pages ahead of a click has shown nothing yet.
    is_prefetch = "prefetch" in request.headers.get("Sec-Purpose", "")
    new_ids = [] if is_prefetch else [notification.pk for notification in shown if notification.read_at is None]
    unread_elsewhere = inbox.count_unread(user_id, except_ids=new_ids)
    context = {
        "notifications": shown,
        "before_id": before_id,
        "older_before_id": shown[-1].pk if len(found) > len(shown) else None,
        "has_unread": bool(new_ids or unread_elsewhere),
        "unread_notifications": unread_elsewhere,
    }
    response = render(request, "billing/notifications.html", context)
    if new_ids:
        inbox.mark_read(user_id=user_id, notification_ids=new_ids)
    return response


@require_GET
def bell(request: HttpRequest) -> HttpResponse:
    """The bell again, when its number is another than the page shows."""
    if not request.user.is_authenticated:
        return HttpResponse(status=401)  # a redirect would bring the sign-in page into the header
    unread = inbox.count_unread(request.user.pk)
    if request.GET.get("shown") == str(unread):
        return HttpResponse(status=204)
    return render(request, "billing/_bell.html", {"unread_notifications": unread})


@require_POST
@login_required
def mark_all_read(request: SignedInRequest) -> HttpResponse:
    inbox.mark_read(user_id=request.user.pk)
    messages.success(request, "All notifications are marked as read.")
    return redirect("tokens:notifications")


@require_http_methods(["GET", "POST"])
@login_required
def settings(request: SignedInRequest) -> HttpResponse:
    """Which messages are sent by e-mail, too."""
    if request.method == "POST":
        inbox.update_emailed_kinds(request.user, kinds=request.POST.getlist("email"))
        messages.success(request, "Your choice was saved.")
        return redirect("tokens:notification_settings")
    offered, emailed = inbox.kinds_for(request.user), inbox.get_emailed_kinds(request.user)
    groups = []
    for group, kinds in GROUPS.items():
        rows = [
            {
                "value": kind.value,
                "label": kind.label,
                "is_emailed": kind in emailed,
                "may_be_muted": inbox.may_be_muted(kind),
            }
            for kind in kinds
            if kind in offered
        ]
        if rows:
            groups.append((group, rows))
    return render(request, "billing/notification_settings.html", {"groups": groups})


def _before_id(request: HttpRequest) -> int | None:
    """Where the page begins; anything but a number in the address is the newest page."""
    return read_id(request.GET.get("before", ""))
