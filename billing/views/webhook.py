"""/stripe/webhook/"""

from django.conf import settings
from django.core.exceptions import RequestDataTooBig
from django.http import Http404, HttpRequest, HttpResponse
from django.views.decorators.csrf import csrf_exempt
from django.views.decorators.http import require_POST

from billing.payments import webhooks
from billing.payments.gateway import InvalidEvent


@csrf_exempt
@require_POST
def stripe_webhook(request: HttpRequest) -> HttpResponse:
    """Take in an event. 2xx: done or kept for a person. 400: not from Stripe. 500, or 503 while the
    database is away: Stripe will send it again."""
    if not settings.STRIPE_WEBHOOK_SECRETS:
        raise Http404  # never open: without a secret anybody could credit themselves
    try:
        payload = request.body
    except RequestDataTooBig:
        return HttpResponse("The body is too large.", status=413, content_type="text/plain")
    try:
        webhooks.receive_event(payload=payload, signature_header=request.headers.get("Stripe-Signature", ""))
    except InvalidEvent as error:
        return HttpResponse(str(error), status=400, content_type="text/plain")
    except webhooks.EventNotHandled:
        return HttpResponse("Not handled; send it again.", status=500, content_type="text/plain")
    return HttpResponse("ok", content_type="text/plain")
