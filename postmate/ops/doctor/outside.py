"""What lies elsewhere: Stripe, the AI providers, the mail server."""

import asyncio
import ipaddress
import re
from datetime import UTC, datetime, timedelta
from urllib.parse import urlsplit

from django.conf import settings
from django.core.mail import EmailMessage, get_connection
from django.urls import reverse
from django.utils import timezone

from ai_ops import providers
from billing.models import (
    ModelPrice,
)
from billing.models.fields import Provider
from billing.payments import gateway, webhooks
from postmate.ops.doctor.findings import (
    RETIRING_DAYS,
    TIMEOUT_SECONDS,
    Outcomes,
    clock,
    count,
    http_client,
    ok,
    problem,
    short,
    warning,
)

OLDER_NAMES = frozenset({"charge.refund.updated"})  # of events that newer API versions send under another one


def stripe_lets_us_in() -> Outcomes:
    try:
        access = gateway.check_access()
    except gateway.GatewayError as error:
        if getattr(error.__cause__, "http_status", None) in (401, 403):
            yield problem(
                f"Stripe does not accept our key: {short(error.__cause__)}",
                "Take the secret key from Stripe's dashboard (Developers, API keys) and set STRIPE_SECRET_KEY.",
            )
        else:
            yield problem(
                f"Stripe does not answer: {short(error.__cause__)}",
                "Look at Stripe's status page, and whether this machine may reach Stripe.",
            )
        return
    if access.is_live != gateway.is_live_mode():
        yield problem("Stripe's mode is not the one that the key names.", "Set the key of the mode that is meant.")
    else:
        yield ok("Live mode: real money." if access.is_live else "Test mode: no real money.")
    yield clock("Stripe", access.answered_at + timedelta(seconds=0.5) - datetime.now(UTC), precision_seconds=1.5)


def webhook_is_registered() -> Outcomes:
    """Stripe knows our address, and sends all that we handle in the version that we read."""
    ours = settings.SITE_URL + reverse("stripe-webhook")
    here = [each for each in gateway.list_webhook_endpoints() if same_address(each.url, ours)]
    how = "In Stripe's dashboard (Developers, Webhooks)"
    if not here:
        yield problem(
            f"Stripe sends no events to {ours}: payments are credited minutes late, refunds hours late.",
            f"{how} add it with the events of docs/TOKEN_BILLING_SETUP.md and set STRIPE_WEBHOOK_SECRET.",
        )
        return
    enabled = [each for each in here if each.is_enabled]
    if not enabled:
        yield problem(
            f"The webhook to {ours} is disabled.", f"{how} enable it; Stripe switches it off after days of errors."
        )
        return
    types = frozenset[str]().union(*(each.event_types for each in enabled))
    missing = sorted(webhooks.HANDLERS.keys() - types - OLDER_NAMES)
    if missing and "*" not in types:
        yield problem(f"Stripe does not send {', '.join(missing)}.", f"{how} add these events to the endpoint.")
    elif others := {each.api_version or "the account's default" for each in enabled} - {gateway.API_VERSION}:
        yield warning(
            f"Events come in API version {', '.join(sorted(others))}; this release reads {gateway.API_VERSION}.",
            f"{how} make an endpoint in that version and remove the old one. Till then each costs a call to Stripe.",
        )
    else:
        yield ok(f"Stripe sends its events to {ours}.")


def webhook_answers() -> Outcomes:
    path = reverse("stripe-webhook")
    with http_client() as client:
        status = client.post(settings.SITE_URL + path, content=b"{}").status_code
    text = f"Without a signature it answers {status}"
    if status == 400:
        yield ok(f"{text}, as it must.")
    elif status == 404:
        yield problem(f"{text}.", "STRIPE_WEBHOOK_SECRET is not set where `web` runs, or the proxy leads elsewhere.")
    elif 300 <= status < 400:
        yield problem(f"{text}, a redirect, which Stripe does not follow.", "Set SITE_URL to the address it leads to.")
    elif status in (401, 403, 405):
        yield problem(f"{text}.", f"Something in front refuses it: let POST {path} through.")
    else:
        yield problem(f"{text} instead of 400.", "See the log of `web`.")


def ai_providers() -> Outcomes:
    """Each key opens its provider, and the models on offer are still served there."""
    configured = [provider for provider in Provider.values if providers.is_configured(provider)]
    if not configured:
        yield problem("There is no key of an AI provider.", "Set OPENAI_API_KEY, ANTHROPIC_API_KEY or GOOGLE_API_KEY.")
    today = timezone.now().date()
    for provider in configured:
        name = Provider(provider).label
        try:
            served = asyncio.run(providers.list_models(provider))
        except providers.ProviderMisconfigured:
            yield problem(
                f"{name} does not accept our key.", f"Make a new one there and set {provider.upper()}_API_KEY."
            )
            continue
        except providers.ProviderError as error:
            yield warning(f"{name}: {short(error)}", "Look at its status page. Its models fail meanwhile; nobody pays.")
            continue
        offered = ModelPrice.objects.filter(provider=provider, is_active=True).order_by("model")
        gone = []
        for price in offered:
            if price.retired_on and price.retired_on <= today:
                continue
            # Some lists name the dated version behind a name alone.
            ends = [end for id, end in served.items() if re.fullmatch(rf"{re.escape(price.model)}(-\d{{8}})?", id)]
            if not ends:
                gone.append(price.model)
            elif (end := ends[-1]) and end <= today + timedelta(days=RETIRING_DAYS):
                yield warning(
                    f"{name} ends {price.model} on {end}.",
                    "Enter the day and a replacement in Django admin (model prices).",
                )
        if gone:
            yield problem(
                f"{name} does not serve {', '.join(gone)}, on offer here: operations with it fail.",
                "Enter its retirement and a replacement in Django admin (model prices), or make it inactive.",
            )
        else:
            yield ok(f"{name} accepts our key and serves what is on offer here ({count(len(offered), 'model')}).")


def mail_server() -> Outcomes:
    """It lets us in. Nothing is sent."""
    if settings.EMAIL_BACKEND.rpartition(".")[0].endswith(("filebased", "console", "dummy", "locmem")):
        text = "E-mails are not sent, but written to files or nowhere."
        if settings.DEBUG or settings.REHEARSAL:
            yield ok(text)
        else:
            yield problem(text, "Set EMAIL_URL to a mail server.")
        return
    try:
        mails = get_connection(timeout=TIMEOUT_SECONDS)
        mails.open()
        mails.close()
    except (OSError, ValueError) as error:  # what smtplib raises is an OSError
        yield problem(
            f"The mail server does not let us in: {short(error)}", "Mend EMAIL_URL: host, port, user, password."
        )
    else:
        yield ok("The mail server lets us in.")


def send_test_mail(address: str) -> Outcomes:
    message = EmailMessage(
        "A test from Postmate", f"{settings.SITE_URL} can send e-mails.", to=[address], connection=get_connection()
    )
    try:
        message.send()
    except (OSError, ValueError) as error:
        yield problem(f"It was not sent: {short(error)}", "Mend EMAIL_URL and DEFAULT_FROM_EMAIL.")
    else:
        yield ok(f"Handed over for {address}. See that it arrives, and not among the spam.")


def same_address(one: str, other: str) -> bool:
    return _address(one) == _address(other)


def _address(url: str) -> tuple[str, str, int | None, str]:
    """In parts, this machine under one name."""
    parts = urlsplit(url)
    host = parts.hostname or ""
    try:
        is_here = ipaddress.ip_address(host).is_loopback
    except ValueError:
        is_here = host == "localhost"
    return parts.scheme, "localhost" if is_here else host, parts.port, parts.path
