"""A year of the demo: what `manage.py seed_demo --past` makes beside the people, so that there is something to see.

The books are invented by postmate/local/invented_past.py. Here the first of its people gets what they made in the
Studio, each piece, chat and image beside the operation that paid for it; and the Stripe stand-in is told of the
payments, so that receipts, refunds and the comparison of the books work for them as for any other.
"""

from collections.abc import Iterator
from contextlib import closing
from datetime import datetime, timedelta
from decimal import Decimal
from pathlib import Path

from django.contrib.auth.hashers import make_password
from django.core.files.base import ContentFile
from django.core.files.storage import default_storage
from django.db import connection, transaction
from django.db.models import F
from django.utils import timezone

from accounts.models import User
from ai_ops.models import (
    Chat,
    ChatTurn,
    ContentPiece,
    ContentVersion,
    GeneratedImage,
    ImageBatch,
    ImagePrompt,
    Project,
    ResultState,
)
from billing import catalogue
from billing.catalogue import packages, system_settings
from billing.demo import DEMO_NAMES, DEMO_PASSWORD, DEMO_PEOPLE
from billing.models import (
    Notification,
    PaymentReversal,
    Purchase,
    TokenAccount,
    TokenPricing,
    TokenTransaction,
    TokenUsage,
)
from billing.notifications import messages, weekly
from billing.staff import grants
from postmate.local import invented_past
from postmate.local.demo_texts import CHATS, HAIKU, PICTURES, PIECES, PROJECTS, Conversation, Pictures, Piece
from postmate.local.invented_past import Cast, History, Planned
from standins.ai.painting import paint

OPERATION_OF = {"draft": "generation"}  # of a version, where it is not called the same
SIZE = "1024x1024"
OTHER_CURRENCIES = (("eur", "0.92"), ("gbp", "0.79"))


def make_past(*, people: int = 140, entries: int = 7_000, seed: int = 4, stripe_data: Path | None = None) -> History:
    """Make the demo people and twelve months of their and of other people's life, for an empty database.

    All of it in one transaction, but for the files of the images. `stripe_data` is the file of a Stripe stand-in that
    does not run now; without it the purchases name no payment. The same seed and moment make the same past.
    """
    now = timezone.now()
    studio = Studio(now)
    password = make_password(DEMO_PASSWORD)
    with transaction.atomic():
        system_settings.initialize_default_settings()
        packages.seed_default_packages()
        catalogue.seed_default_models()
        _price_in_other_currencies()
        history = History(
            transactions=entries,
            users=people,
            months=12,
            seed=seed,
            cast=[
                Cast(email, DEMO_NAMES[email], role, password, weight=7 if role == "user" else 0)
                for email, role in DEMO_PEOPLE.items()
            ],
            plan=list(studio.plan()),
            has_payments=stripe_data is not None,
            reversed_every=22,
            grant_share=0.08,
            size=2,
        )
        for _ in history.make():
            pass
        user, admin, _ = (User.objects.get(email=email) for email in DEMO_PEOPLE)
        studio.fill(user)
        _say_what_was_said(user)
        _leave_something_to_decide(admin)
        if stripe_data:
            _tell_stand_in(stripe_data)
        invented_past.prove()
    invented_past.roll_up()
    return history


def _price_in_other_currencies() -> None:
    for package in TokenPricing.objects.filter(price_eur_cents=None, price_gbp_cents=None):
        # As shops price: whole units, 65 dollars are 60 euros.
        prices = {
            f"price_{currency}_cents": int((package.price_usd_cents * Decimal(rate) / 100).to_integral_value()) * 100
            for currency, rate in OTHER_CURRENCIES
            if package.price_usd_cents
        }
        packages.update_package(package.pk, **prices)


def _say_what_was_said(user: User) -> None:
    """The messages that came with the newest of it: all read but the last."""
    for purchase in reversed(Purchase.objects.filter(user=user, state="paid").order_by("-paid_at")[:4]):
        messages.purchase_confirmed(purchase)
        _said(purchase.paid_at)
    for entry in TokenTransaction.objects.filter(user=user, type="admin_grant"):
        account = TokenAccount(user=user, balance=entry.balance_after)
        messages.grant_received(account, tokens=entry.amount, reason=entry.description, key=str(entry.pk))
        _said(entry.created_at)
    weekly.weekly_summary()
    _said(timezone.now())
    newest = Notification.objects.filter(user=user).order_by("-created_at").values("pk")[:1]
    Notification.objects.filter(user=user).exclude(pk__in=newest).update(read_at=F("created_at"))


def _said(at: datetime | None) -> None:
    """Whatever waits to be sent was sent then."""
    Notification.objects.filter(email_next_at__isnull=False).update(
        created_at=at, email_sent_at=at, email_attempts=1, email_next_at=None
    )


def _leave_something_to_decide(admin: User) -> None:
    """Two requests of an admin that wait for a superadmin."""
    others = TokenAccount.objects.filter(status="active").exclude(user__email__in=DEMO_PEOPLE).order_by("-sequence")
    wishes = (
        (50_000, "Pilot of the translation workflow, agreed with sales until the end of the quarter"),
        (15_000, "Lost two long drafts when the provider was down"),
    )
    for number, (account, (tokens, reason)) in enumerate(zip(others[:2], wishes, strict=False)):
        grants.grant_tokens(
            admin=admin, user_id=account.user_id, tokens=tokens, reason=reason, request_key=f"demo-{number}"
        )


class Studio:
    """What the demo user made. First it is planned, so that the books have an operation for each part of it; then the
    parts are written, with the numbers and times of these operations."""

    def __init__(self, now: datetime) -> None:
        self.now = now
        self.operations: dict[tuple[object, ...], Planned] = {}

    def plan(self) -> Iterator[Planned]:
        for piece in PIECES:
            previous = ""
            for number, version in enumerate(piece.versions):
                body = piece.body(version.paragraphs)
                if version.model:
                    operation = OPERATION_OF.get(version.origin, version.origin)
                    planned = self._text(piece.days_ago, number * 47, operation, version.model, previous, body)
                    yield self._keep(planned, piece.title, number)
                previous = body
        for chat in CHATS:
            context = ""
            for number, (question, answer) in enumerate(chat.turns):
                context += question
                planned = self._text(chat.days_ago, number * 3, "chat", chat.model, context, answer)
                yield self._keep(planned, chat.title, number)
                context += answer
        for pictures in PICTURES:
            if pictures.idea:
                planned = self._text(pictures.days_ago, 0, "prompt", HAIKU, pictures.idea, pictures.prompt)
                yield self._keep(planned, pictures.idea)
            planned = Planned(self._at(pictures.days_ago, 5), "image", pictures.model, images=pictures.count)
            yield self._keep(planned, pictures.prompt)

    def _at(self, days_ago: int, minutes: int) -> datetime:
        morning = (self.now - timedelta(days=days_ago)).replace(hour=9, minute=12, second=40, microsecond=0)
        return morning + timedelta(minutes=minutes)

    def _text(self, days_ago: int, minutes: int, operation: str, model: str, asked: str, answer: str) -> Planned:
        # Four characters a token, and 180 tokens of instructions.
        at = self._at(days_ago, minutes)
        return Planned(at, operation, model, input_tokens=180 + len(asked) // 4, output_tokens=len(answer) // 4 + 1)

    def _keep(self, planned: Planned, *key: object) -> Planned:
        self.operations[key] = planned
        return planned

    def fill(self, user: User) -> None:
        workspace = user.workspaces.get()
        self.user = user
        self.projects = {name: Project.objects.create(workspace=workspace, name=name) for name in PROJECTS}
        begun_at = self.now - timedelta(days=364)
        Project.objects.filter(workspace=workspace).update(created_at=begun_at)
        made: dict[str, ContentPiece] = {}
        for piece in PIECES:
            made[piece.title] = self._write_piece(piece, made.get(piece.source))
        for chat in CHATS:
            self._hold_chat(chat)
        for pictures in PICTURES:
            self._paint(pictures)
        # What else they did belongs to one of their projects, too.
        ids = [project.pk for project in self.projects.values()]
        with connection.cursor() as cursor:
            cursor.execute(
                "UPDATE billing_tokenusage SET project_id = (%s::bigint[])[1 + id %% %s]"
                " WHERE user_id = %s AND project_id IS NULL",
                [ids, len(ids), user.pk],
            )

    def _link(self, planned: Planned, project: str, **links: int) -> None:
        links["project_id"] = self.projects[project].pk
        TokenUsage.objects.filter(pk=planned.usage_id).update(**links)

    def _write_piece(self, piece: Piece, source: ContentPiece | None) -> ContentPiece:
        written = ContentPiece.objects.create(
            project=self.projects[piece.project], author=self.user, source=source, title=piece.title, topic=piece.topic,
            body=piece.body(piece.versions[-1].paragraphs), state=ResultState.READY,
        )  # fmt: skip
        begun_at, at = self._at(piece.days_ago, 0), None
        for number, version in enumerate(piece.versions):
            planned = self.operations.get((piece.title, number))
            at = self._at(piece.days_ago, number * 47)
            if planned and planned.begun_at and planned.ended_at:
                self._link(planned, piece.project, content_id=written.pk)
                at, begun_at = planned.ended_at, begun_at if number else planned.begun_at
            kept = ContentVersion.objects.create(
                piece=written, number=number + 1, body=piece.body(version.paragraphs), origin=version.origin,
                note=version.note, usage_id=planned.usage_id if planned else None,
            )  # fmt: skip
            ContentVersion.objects.filter(pk=kept.pk).update(created_at=at)
        ContentPiece.objects.filter(pk=written.pk).update(created_at=begun_at, updated_at=at)
        return written

    def _hold_chat(self, conversation: Conversation) -> None:
        project = self.projects[conversation.project]
        chat = Chat.objects.create(project=project, author=self.user, title=conversation.title)
        for number, (question, answer) in enumerate(conversation.turns):
            planned = self.operations[conversation.title, number]
            self._link(planned, conversation.project, chat_id=chat.pk)
            turn = ChatTurn.objects.create(
                chat=chat, question=question, answer=answer, state=ResultState.READY, usage_id=planned.usage_id
            )
            ChatTurn.objects.filter(pk=turn.pk).update(created_at=planned.begun_at, updated_at=planned.ended_at)
            Chat.objects.filter(pk=chat.pk).update(updated_at=planned.ended_at)
        Chat.objects.filter(pk=chat.pk).update(created_at=self.operations[conversation.title, 0].begun_at)

    def _paint(self, pictures: Pictures) -> None:
        common = {"project": self.projects[pictures.project], "author": self.user, "state": ResultState.READY}
        if pictures.idea:
            planned = self.operations[pictures.idea,]
            self._link(planned, pictures.project)
            prompt = ImagePrompt.objects.create(
                idea=pictures.idea, text=pictures.prompt, usage_id=planned.usage_id, **common
            )
            ImagePrompt.objects.filter(pk=prompt.pk).update(created_at=planned.begun_at, updated_at=planned.ended_at)
        planned = self.operations[pictures.prompt,]
        self._link(planned, pictures.project)
        batch = ImageBatch.objects.create(
            prompt=pictures.prompt, size=SIZE, count=pictures.count, usage_id=planned.usage_id, **common
        )
        ImageBatch.objects.filter(pk=batch.pk).update(created_at=planned.begun_at, updated_at=planned.ended_at)
        side = int(SIZE.partition("x")[0])
        for position in range(1, pictures.count + 1):
            file = ContentFile(paint(pictures.prompt, position, side, side))
            name = default_storage.save(f"images/{planned.at:%Y/%m}/demo-{batch.pk}-{position}.png", file)
            GeneratedImage.objects.create(batch=batch, position=position, file=name, media_type="image/png")


def _tell_stand_in(data: Path) -> None:
    """Write the payments, refunds and disputes of the past into the stand-in's file, as having happened then. It has
    told of them already: no event of them waits."""
    from standins.stripe import CARDS, Account, Store

    class Past(Account):
        wanted: str = ""  # the id that the next object of a kind gets

        def new_id(self, prefix: str) -> str:
            if self.wanted.startswith(prefix):
                wanted, self.wanted = self.wanted, ""
                return wanted
            return super().new_id(prefix)

    store = Store(str(data))
    with closing(store.db), store.transaction():
        past = Past(store, lambda: None, webhook_url="", seed=None)
        newest = 0

        def happened(at: datetime) -> None:
            """Whatever was written since the last time happened at that moment."""
            nonlocal newest
            seconds = int(at.timestamp())
            store.rows(
                "UPDATE objects SET created = ?, json = json_set(json, '$.created', ?) WHERE seq > ?",
                seconds, seconds, newest,
            )  # fmt: skip
            newest = store.rows("SELECT max(seq) FROM objects")[0][0]

        newest = store.rows("SELECT coalesce(max(seq), 0) FROM objects")[0][0]
        methods = {}
        accounts = TokenAccount.objects.filter(stripe_customer_id__startswith="cus_demo").select_related("user")
        for account in accounts:
            past.wanted = str(account.stripe_customer_id)
            customer = past.create_customer(
                {"email": account.receipts_email, "metadata": {"user_id": str(account.user_id)}}
            )
            methods[account.pk] = method = past.new_method(CARDS["4242424242424242"], account.name)
            past.attach(method, customer["id"], set_up=True)
            account.stripe_payment_method_id = method["id"]
            happened(account.created_at)
        TokenAccount.objects.bulk_update(accounts, ["stripe_payment_method_id"])
        paid = Purchase.objects.filter(stripe_payment_intent_id__startswith="pi_demo_").select_related("account")
        for purchase in paid.order_by("paid_at"):
            past.wanted = str(purchase.stripe_payment_intent_id)
            intent = past.new_intent(
                {
                    "amount": purchase.paid_total_cents, "currency": purchase.currency,
                    "customer": purchase.account.stripe_customer_id, "metadata": {"purchase_id": str(purchase.pk)},
                },
                methods[purchase.account_id],
            )  # fmt: skip
            past.succeed(intent, methods[purchase.account_id])
            happened(purchase.paid_at or purchase.created_at)
        for reversal in PaymentReversal.objects.filter(stripe_payment_intent_id__startswith="pi_demo_"):
            past.wanted = reversal.stripe_id
            if reversal.kind == PaymentReversal.Kind.REFUND:
                past.create_refund(
                    {"payment_intent": reversal.stripe_payment_intent_id, "amount": reversal.amount_cents}
                )
            else:
                dispute = past.open_dispute(
                    reversal.stripe_payment_intent_id, status="needs_response", amount=None, reason=reversal.reason,
                    currency="", withdraws=True, bare=False,
                )  # fmt: skip
                past.close_dispute({}, dispute["id"], reversal.status)
            happened(reversal.created_at)
