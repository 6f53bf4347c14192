"""Who the pages are looked at as, and what has happened to them: made through the product itself."""

from decimal import Decimal
from typing import Any

from allauth.account.models import EmailAddress
from django.contrib.auth.hashers import make_password
from django.test import Client
from django.utils import timezone

from accounts import api_keys
from accounts.models import User
from ai_ops import pieces
from ai_ops.models import Chat, ContentPiece, ImageBatch
from billing import ledger, tasks
from billing.models import BulkJob, Drift, Purchase, StripeEvent, TokenPricing, TokenUsage
from billing.payments import recharge_settings
from billing.pricing import TokenPools
from billing.staff import accounts, bulk
from tests.ai_ops.studio import Writer
from tests.conftest import PASSWORD
from tests.payments import begin_checkout, deliver, event_of
from tests.servers import Server, StripeStandIn

PROJECT = "Tea shop"
IMAGE_MODEL = "openai:gpt-image-2"
CARD_WITH_CONFIRMATION = "4000002760003184"  # each off-session payment, too
GOOD_CARD = "4242424242424242"


def make_everyone(server: Server, stripe: StripeStandIn) -> None:
    """A newcomer without anything, a writer with everything, an admin and a superadmin."""
    stripe.control("deliveries/hold")
    _make_user("newcomer")
    _make_user("admin", role=User.Role.ADMIN)
    _make_user("superadmin", role=User.Role.SUPERADMIN)
    writer = _make_user("writer")
    _work(Writer(writer, server))
    _pay(writer, stripe)
    _make_keys(writer)
    for number, kind in enumerate(("unknown_payment", "missing_credit")):
        Drift.objects.create(
            kind=kind,
            stripe_id=f"pi_3AuditDrift{number}",
            purchase=Purchase.objects.filter(user=writer).first(),
            description="A customer of ours paid $15.00 for nothing we know of.",
            resolution="Healed" if number else "",
        )
    StripeEvent.objects.create(
        event_id="evt_3AuditAside", type="radar.early_fraud_warning.created", livemode=False, payload={},
        state="aside", message="The card's bank warns of fraud in $15.00 of a purchase.",
    )  # fmt: skip
    _export_accounts()


def _export_accounts() -> None:
    superadmin = User.objects.get(email="superadmin@example.com")
    job = bulk.start_bulk_job(
        admin=superadmin, kind="export", filter=accounts.AccountFilter(), request_key="audit-export"
    )
    bulk.run_bulk_job(job_id=job.pk)


def _make_user(name: str, *, role: str = User.Role.USER) -> User:
    email = f"{name}@example.com"
    user = User.objects.create(email=email, password=make_password(PASSWORD), name=name.title(), role=role)
    EmailAddress.objects.create(user=user, email=email, primary=True, verified=True)
    ledger.initialize_account(user_id=user.pk)
    return user


def _work(writer: Writer) -> None:
    """Texts, chats and images: finished, failed, and revised."""
    ledger.add_tokens(
        user_id=writer.user.pk, tokens=400_000, type="bonus", description="Welcome back", idempotency_key="audit"
    )
    writer.draft(project=PROJECT, title="A text that fails", topic="[[fault:500]]")
    for title in ("Why tea is not coffee", "Green tea"):
        _ask(writer, "draft", **writer.form(project=PROJECT, title=title))
    piece = writer.piece
    text = {"content_id": piece.pk, "base_number": pieces.newest_number(piece), "body": piece.body}
    _ask(writer, "refinement", refinement="shorten", wishes="", **text)
    _ask(writer, "repurpose", content_id=piece.pk, transformation="newsletter", wishes="")
    _ask(writer, "chat", question="What is green tea?", project=PROJECT)
    chat = Chat.objects.get(author=writer.user)
    _ask(writer, "chat", chat_id=chat.pk, question="And black tea?", project=PROJECT)
    writer.run("chat", chat_id=chat.pk, question="White tea? [[fault:500]]", project=PROJECT)
    _ask(writer, "image-prompt", idea="A teapot in the rain", style="photo", project=PROJECT)
    image = {"size": "1024x1024", "quality": "low", "style": "", "project": PROJECT, "model": IMAGE_MODEL}
    _ask(writer, "images", prompt="A teapot on a window sill", count=2, **image)
    writer.run("images", prompt="Rain [[fault:500]]", count=1, **image)


def _ask(writer: Writer, operation: str, **form: Any) -> None:
    answer = writer.run(operation, **form)
    if not answer.events or answer.last.name != "done":
        raise RuntimeError(f"{operation}: {answer}")


def _pay(user: User, stripe: StripeStandIn) -> None:
    """A paid purchase, a cancelled one, a refund, and an auto-recharge that waits for its owner."""
    client = Client()
    client.force_login(user)
    purchase = begin_checkout(client)
    stripe.pay(purchase.checkout_url, CARD_WITH_CONFIRMATION)
    (intent,) = [each for each in stripe.state()["payment_intents"] if each["status"] == "requires_action"]
    stripe.post(f"/authenticate/{intent['id']}", data={"outcome": "complete"}, follow_redirects=False)
    deliver(event_of(stripe, "checkout.session.completed"))
    tasks.remember_card(purchase.pk)
    stripe.control(f"payments/{intent['id']}/refund", amount=500)
    deliver(event_of(stripe, "refund.created"))
    begin_checkout(client)
    account = recharge_settings.update_auto_recharge(
        user_id=user.pk,
        enabled=True,
        threshold_tokens=5_000,
        package_id=TokenPricing.objects.get(name="Starter").pk,
        monthly_cap_cents=4_000,
    )
    ledger.deduct_tokens(
        user_id=user.pk,
        tokens=account.available - 2_000,
        operation=ledger.Operation("chat", "openai", "gpt-6-luna", multiplier=Decimal(1)),
        pools=TokenPools(input_tokens=account.available - 2_000),
    )
    tasks.auto_recharge(user.pk)


def _make_keys(user: User) -> None:
    key, _ = api_keys.make_key(user_id=user.pk, name="Notebook", scopes=["balance:read"])
    api_keys.revoke_key(key)
    api_keys.make_key(user_id=user.pk, name="Phone", scopes=["balance:read", "usage:read"])


def samples() -> dict[str, list[dict[str, Any]]]:
    """For each address with a parameter, by its name: what to put there."""
    writer = User.objects.get(email="writer@example.com")
    pieces = list(ContentPiece.objects.filter(author=writer).order_by("pk"))
    revised = next(piece for piece in pieces if piece.versions.count() > 1)
    purchases = Purchase.objects.filter(user=writer)
    checkouts = [{"pk": purchase.pk} for purchase in purchases.filter(kind="checkout")]
    batches = ImageBatch.objects.filter(author=writer).order_by("pk")
    rows = TokenUsage.objects.filter(user=writer).order_by("pk")
    kinds = {(usage.operation_type, usage.status): usage for usage in rows}
    usages = [{"pk": usage.pk} for usage in kinds.values()]
    now = timezone.now()
    return {
        "studio:project": [{"pk": revised.project_id}],
        "studio:content": [{"pk": piece.pk} for piece in pieces],
        "studio:save-content": [{"pk": revised.pk}],
        "studio:version": [{"pk": revised.pk, "number": 1}],
        "studio:restore": [{"pk": revised.pk, "number": 1}],
        "studio:chat": [{"pk": chat.pk} for chat in Chat.objects.filter(author=writer)],
        "studio:image-batch": [{"pk": batch.pk} for batch in batches],
        "studio:image-file": [{"pk": batches[0].images.all()[0].pk}],
        "tokens:usage-entry": usages,
        "tokens:statement": [{"year": f"{now:%Y}", "month": f"{now:%m}"}],
        "tokens:success": checkouts,
        "tokens:cancelled": checkouts,
        "tokens:receipt": checkouts[:1],
        "tokens:confirm": [{"pk": purchase.pk} for purchase in purchases.filter(kind="auto_recharge")],
        "dashboard:purchase": checkouts,
        "dashboard:account": [{"user_id": writer.pk}],
        "dashboard:bulk-job": [{"pk": job.pk} for job in BulkJob.objects.all()],
        "dashboard:bulk-job-export": [{"pk": job.pk} for job in BulkJob.objects.all()],
        "dashboard:section": [{"name": "system"}],
        "dashboard:figures-export": [{"name": "system"}],
        "dashboard:figures-pdf": [{"name": "system"}],
        "dashboard:finance-file": [{"day": "2000-01-01"}],
        "account_confirm_email": [{"key": "no-such-key"}],
        "account_reset_password_from_key": [{"uidb36": "1", "key": "no-such-key"}],
    }
