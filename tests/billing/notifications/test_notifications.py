"""What users are told: each message once, in the product and by e-mail, whatever fails on the way."""

import smtplib
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from email import message_from_bytes, policy
from email.message import EmailMessage
from functools import partial
from html.parser import HTMLParser
from pathlib import Path
from threading import Barrier, BrokenBarrierError, Event, Thread
from typing import Any

import pytest
from django.conf import settings as project_settings
from django.core import mail
from django.core.mail.backends.locmem import EmailBackend as MemoryBackend
from django.db import connection, transaction
from django.db.models import QuerySet
from django.test import Client
from django.urls import reverse
from django.utils import timezone
from pytest_django.fixtures import Settings

from accounts.models import User
from billing import ledger, tasks
from billing.models import (
    Notification,
    NotificationPreference,
    PaymentReversal,
    Purchase,
    TokenAccount,
    TokenPricing,
    TokenUsage,
)
from billing.notifications import inbox, messages, outbox, weekly
from billing.payments import purchases
from billing.pricing import TokenPools
from tests.conftest import MakeUser
from tests.environment import free_port

pytestmark = pytest.mark.django_db

Kind = Notification.Kind
NASTY = '<b onclick="steal()">Eve</b> & "friends"'
NOW = datetime(2026, 11, 23, 7, 0, tzinfo=UTC)  # a Monday


def make_purchase(user: User, *, kind: str = "checkout", **fields: Any) -> Purchase:
    account = ledger.get_account(user_id=user.pk)
    package = TokenPricing.objects.get(name="Starter")
    values: dict[str, Any] = {
        "package": package,
        "package_name": package.name,
        "tokens": package.tokens,
        "amount_cents": 1_500,
        "currency": "usd",
        "state": "expired",
    }
    return Purchase.objects.create(
        account=account, user=user, workspace=account.workspace, kind=kind, **(values | fields)
    )


def make_reversal(purchase: Purchase | None, *, kind: str = "refund", **fields: Any) -> PaymentReversal:
    values: dict[str, Any] = {
        "stripe_id": f"re_{PaymentReversal.objects.count()}",
        "stripe_payment_intent_id": "pi_1",
        "amount_cents": 1_500,
        "currency": "usd",
        "status": "succeeded" if kind == "refund" else "needs_response",
    }
    return PaymentReversal.objects.create(purchase=purchase, kind=kind, **(values | fields))


def tell_everything(user: User) -> None:
    """Every message there is."""
    account = ledger.get_account(user_id=user.pk)
    purchase = make_purchase(user, package_name=NASTY)
    recharge = make_purchase(user, kind="auto_recharge", package_name=NASTY, message=f"Declined by {NASTY}")
    refund, dispute = make_reversal(purchase), make_reversal(purchase, kind="dispute", stripe_id="dp_1")
    refused = make_reversal(purchase, status="refused", requested_by=user)
    messages.purchase_confirmed(purchase)
    messages.auto_recharge_succeeded(recharge)
    messages.auto_recharge_failed(recharge, retry_at=NOW)
    messages.auto_recharge_needs_confirmation(recharge)
    messages.auto_recharge_switched_off(account, reason=f"Declined by {NASTY}", key="1")
    messages.auto_recharge_switched_on(account, key="1")
    messages.saved_card_changed(account, key="1")
    messages.low_balance(account, key="1")
    messages.critical_balance(account, key="1")
    messages.grant_received(account, tokens=5_000, reason=NASTY, key="1")
    messages.tokens_deducted(account, tokens=5_000, reason=NASTY, key="1")
    messages.account_status_changed(account, reason=NASTY, key="1")
    messages.refund_applied(refund, tokens=150_000)
    messages.refund_failed(refund, tokens=150_000)
    messages.refund_refused(refused, reason=NASTY)
    messages.dispute_opened(dispute, tokens=150_000)
    messages.dispute_moved(dispute, tokens=0)
    messages.provider_refuses_us(provider=NASTY, model=NASTY, why=NASTY)
    weekly.weekly_summary(now=NOW)


def told(user: User) -> Counter[str]:
    return Counter(Notification.objects.filter(user=user).values_list("kind", flat=True))


def the_only(user: User) -> Notification:
    return Notification.objects.get(user=user)


def make_due() -> None:
    """As if all waits were over."""
    Notification.objects.filter(email_next_at__isnull=False).update(email_next_at=timezone.now())


# --- Messages -------------------------------------------------------------------------------------------------------


def test_each_message_is_said_once_per_event(adam: User) -> None:
    tell_everything(adam)
    assert told(adam) == dict.fromkeys(Kind.values, 1)
    account = ledger.get_account(user_id=adam.pk)
    for purchase in Purchase.objects.filter(user=adam):
        messages.purchase_confirmed(purchase)
    messages.low_balance(account, key="1")
    weekly.weekly_summary(now=NOW)
    assert told(adam) == {**dict.fromkeys(Kind.values, 1), "purchase_confirmed": 2}
    messages.low_balance(account, key="2")
    weekly.weekly_summary(now=NOW + timedelta(days=7))
    assert (told(adam)["low_balance"], told(adam)["weekly_summary"]) == (2, 2)


def test_message_goes_with_its_transaction(alice: User) -> None:
    account = ledger.get_account(user_id=alice.pk)
    with transaction.atomic():
        messages.low_balance(account, key="1")
        assert told(alice) == {"low_balance": 1}
        transaction.set_rollback(True)
    assert not told(alice)


def test_key_is_each_users_own(alice: User, bob: User) -> None:
    for user in (alice, bob):
        messages.low_balance(ledger.get_account(user_id=user.pk), key="1")
    assert told(alice) == told(bob) == {"low_balance": 1}


@pytest.mark.parametrize(
    ("tell", "title", "words"),
    [
        (
            lambda user: messages.purchase_confirmed(make_purchase(user)),
            "150,000 tokens were added",
            ["$15.00", "the Starter package"],
        ),
        (
            lambda user: messages.purchase_confirmed(
                make_purchase(user, package=None, package_name="Custom amount", tokens=250_000, amount_cents=2_500)
            ),
            "250,000 tokens were added",
            ["You paid $25.00 for 250,000 tokens."],
        ),
        (
            lambda user: messages.auto_recharge_succeeded(make_purchase(user, kind="auto_recharge")),
            "Auto-recharge added 150,000 tokens",
            ["$15.00", "Visa ending in 4242"],
        ),
        (
            lambda user: messages.auto_recharge_failed(
                make_purchase(user, kind="auto_recharge", message="Your card was declined"), retry_at=NOW
            ),
            "We could not buy 150,000 tokens for you",
            ["Your card was declined.", "try again on 23 November 2026 at 07:00 UTC."],
        ),
        (
            lambda user: messages.auto_recharge_failed(
                make_purchase(user, kind="auto_recharge", message=""), retry_at=None
            ),
            "We could not buy 150,000 tokens for you",
            ["We will not try again by ourselves."],
        ),
        (
            lambda user: messages.auto_recharge_needs_confirmation(make_purchase(user, kind="auto_recharge")),
            "Please confirm a payment of $15.00",
            ["your bank asks you to confirm"],
        ),
        (
            lambda user: messages.auto_recharge_switched_off(
                ledger.get_account(user_id=user.pk), reason="The card was removed", key="1"
            ),
            "Auto-recharge was switched off",
            ["The card was removed.", "You have 10,000 tokens left."],
        ),
        (
            lambda user: messages.auto_recharge_switched_off(
                TokenAccount(user=user, balance=-145_000, reserved=0), reason="A payment was refunded", key="1"
            ),
            "Auto-recharge was switched off",
            ["Your balance is 145,000 tokens below zero."],
        ),
        (
            lambda user: messages.refund_applied(make_reversal(make_purchase(user)), tokens=150_000),
            "$15.00 is on its way back to you",
            ["150,000 tokens were taken back from your balance"],
        ),
        (
            lambda user: messages.refund_failed(make_reversal(make_purchase(user), status="failed"), tokens=60),
            "The refund of $15.00 did not go through",
            ["60 tokens are back in your balance", "Contact support"],
        ),
        (
            lambda user: messages.dispute_opened(make_reversal(make_purchase(user), kind="dispute"), tokens=9),
            "Your payment of $15.00 is disputed",
            ["9 tokens are held back", "auto-recharge is off"],
        ),
        (
            lambda user: messages.dispute_moved(
                make_reversal(make_purchase(user), kind="dispute", status="won"), tokens=1_000
            ),
            "The dispute about $15.00 is closed",
            ["The payment of $15.00 stands, and 1,000 tokens are back in your balance."],
        ),
        (
            lambda user: messages.dispute_moved(
                make_reversal(make_purchase(user), kind="dispute", status="lost"), tokens=0
            ),
            "The dispute about $15.00 is closed",
            ["The bank returned $15.00 to you."],
        ),
    ],
)
def test_words(alice: User, tell: Callable[[User], None], title: str, words: list[str]) -> None:
    TokenAccount.objects.filter(user=alice).update(card_brand="visa", card_last4="4242")
    tell(alice)
    notification = the_only(alice)
    assert notification.title == title
    for each in words:
        assert each in notification.body


def test_debt_is_named(make_user: MakeUser) -> None:
    nora = make_user("nora", tokens=100)
    ledger.deduct_tokens(
        user_id=nora.pk,
        tokens=1_600,
        operation=ledger.Operation("chat", "openai", "gpt-6-luna", multiplier=Decimal(1)),
        pools=TokenPools(input_tokens=1_600),
        may_leave_debt=True,
    )
    messages.refund_applied(make_reversal(make_purchase(nora)), tokens=1_500)
    assert "1,500 tokens below zero: your next purchase pays that first." in the_only(nora).body


def test_reversal_of_a_payment_we_do_not_know_tells_nobody(seeded: None) -> None:
    for tell in (messages.refund_applied, messages.dispute_opened, messages.dispute_moved):
        tell(make_reversal(None), tokens=0)
    assert not Notification.objects.exists()


credit = partial(purchases.credit, after=messages.purchase_confirmed)


def test_credit_of_a_checkout_is_announced_with_it(alice: User) -> None:
    purchase = make_purchase(alice, state="open")
    with transaction.atomic():
        for _ in range(2):
            credit(purchase, amount_cents=1_500, currency="usd", payment_intent_id="pi_1")
        assert told(alice) == {"purchase_confirmed": 1}
        transaction.set_rollback(True)
    assert not told(alice)


def test_link_to_confirm_names_the_purchase(alice: User) -> None:
    purchase = make_purchase(alice, kind="auto_recharge")
    messages.auto_recharge_needs_confirmation(purchase)
    assert the_only(alice).link == f"/tokens/confirm/{purchase.pk}/"


@pytest.mark.parametrize(
    ("tokens", "words"), [(99, "You have 99 tokens left."), (1, "You have 1 token left."), (0, "You have no tokens")]
)
def test_critical_balance_says_what_is_left(make_user: MakeUser, tokens: int, words: str) -> None:
    nora = make_user("nora", tokens=tokens)
    messages.critical_balance(ledger.get_account(user_id=nora.pk), key="1")
    assert words in the_only(nora).body


# --- The weekly summary ---------------------------------------------------------------------------------------------


def test_weekly_summary(make_user: MakeUser, alice: User, bob: User, adam: User, susan: User) -> None:
    operation = ledger.Operation("chat", "openai", "gpt-6-luna", multiplier=Decimal(1))

    def use(tokens: int) -> None:
        ledger.deduct_tokens(
            user_id=alice.pk, tokens=tokens, operation=operation, pools=TokenPools(input_tokens=tokens)
        )

    def pay(cents: int, currency: str) -> None:
        purchase = make_purchase(alice, state="open", amount_cents=cents, currency=currency)
        with transaction.atomic():
            credit(purchase, amount_cents=cents, currency=currency, payment_intent_id=f"pi_{purchase.pk}")

    use(1_000)
    use(234)
    hold = ledger.reserve_tokens(
        user_id=alice.pk, tokens=5, operation=operation, idempotency_key="failed", lifetime_seconds=60
    )
    ledger.release_usage(usage_id=hold.usage_id or 0)
    pay(1_500, "usd")
    pay(100_000, "usd")
    pay(1_400, "eur")
    make_purchase(alice, state="failed")
    make_purchase(alice, state="expired")
    purchase = make_purchase(alice)
    make_reversal(purchase, kind="dispute", stripe_id="dp_1")
    make_reversal(purchase, kind="dispute", stripe_id="dp_2", status="lost")
    make_reversal(None, kind="dispute", stripe_id="dp_3")  # of another product
    debtor = make_user("dora", tokens=0)
    ledger.deduct_tokens(
        user_id=debtor.pk,
        tokens=5,
        operation=operation,
        pools=TokenPools(input_tokens=5),
        may_leave_debt=True,
    )
    # The cast's own debits of `make_user` count as usage too.
    used = TokenUsage.objects.filter(status="succeeded").exclude(user=alice)
    others, other_tokens = used.count(), sum(used.values_list("billable_tokens", flat=True))

    tomorrow = timezone.now() + timedelta(days=1)
    figures = weekly.WeeklyFigures.of_week_before(tomorrow)
    assert figures.operations == 2 + others
    assert figures.billable_tokens == 1_234 + other_tokens
    assert figures.revenue_cents == {"usd": 101_500, "eur": 1_400}
    assert (figures.failed_payments, figures.open_disputes, figures.accounts_in_debt) == (1, 1, 1)
    assert figures.until - figures.since == timedelta(days=7)
    later = weekly.WeeklyFigures.of_week_before(tomorrow + timedelta(days=8))
    assert (later.operations, later.billable_tokens, later.revenue_cents, later.failed_payments) == (0, 0, {}, 0)
    today = weekly.WeeklyFigures.of_week_before(timezone.now())
    assert today.operations == 0

    assert weekly.weekly_summary(now=tomorrow) == 2
    assert [told(user)["weekly_summary"] for user in (alice, bob, adam, susan)] == [0, 0, 1, 1]
    body = the_only(adam).body
    assert f"{2 + others} operations used {1_234 + other_tokens:,} tokens." in body
    assert "Payments brought €14.00 and $1,015.00, and 1 payment failed." in body
    assert "Open disputes: 1. Accounts in debt: 1." in body


def test_a_provider_that_refuses_us_is_told_to_admins_once_a_day(alice: User, adam: User, susan: User) -> None:
    """Row 53."""
    for why in ("Our credit there is used up.", "Our credit there is used up.", ""):
        messages.provider_refuses_us(provider="OpenAI", model="gpt-6-luna", why=why)
    assert [told(user)["provider_refuses_us"] for user in (alice, adam, susan)] == [0, 2, 2]
    message = Notification.objects.filter(user=susan).earliest("id")
    assert message.title == "OpenAI does not accept our access"
    assert message.body.startswith("Our credit there is used up. Until")


def test_weekly_summary_of_a_quiet_week(adam: User) -> None:
    tasks.weekly_summary()
    assert "No payments came in, and 0 payments failed." in the_only(adam).body


def test_weekly_summary_is_not_for_people_who_left(adam: User) -> None:
    User.objects.filter(pk=adam.pk).update(is_active=False)
    assert weekly.weekly_summary() == 0


# --- E-mails --------------------------------------------------------------------------------------------------------


class _Tags(HTMLParser):
    """What a reader of the HTML sees: its words, its links, and every tag's name and attributes."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.attributes: set[str] = set()
        self.links: list[str] = []
        self.words = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attrs}
        self.links += [value or "" for name, value in attrs if name == "href"]

    def handle_data(self, data: str) -> None:
        self.words += data


def html_of(message: mail.EmailMultiAlternatives) -> str:
    (alternative,) = message.alternatives
    return str(alternative[0])


def test_every_kind_is_mailed_as_text_and_html(adam: User) -> None:
    adam.name = NASTY
    adam.save()
    tell_everything(adam)
    assert outbox.send_pending_emails() == len(Kind.values)
    assert outbox.send_pending_emails() == 0
    assert len(mail.outbox) == len(Kind.values)
    by_subject = {notification.title: notification for notification in Notification.objects.filter(user=adam)}
    for message in mail.outbox:
        assert isinstance(message, mail.EmailMultiAlternatives)
        notification = by_subject[str(message.subject)]
        text, html = str(message.body), html_of(message)
        seen = _Tags(html)
        address = project_settings.SITE_URL
        # The text has all that the HTML has; only there is nothing to be escaped.
        for each in (NASTY, notification.title, notification.body, f"{address}/tokens/notifications/settings/"):
            assert each in text
        for words in (NASTY, notification.title, notification.body):
            assert " ".join(words.split()) in " ".join(seen.words.split())
        assert "<b onclick" not in html
        assert not {"b", "script", "img", "link"} & seen.tags
        assert not [name for name in seen.attributes if name.startswith("on")]
        assert f"{address}{notification.link}" in seen.links
        assert f"{address}{notification.link}" in text
        assert all(link.startswith(f"{address}/") for link in seen.links)
        for name, value in notification.context["facts"]:
            assert f"{name}: {value}" in text
            assert value in seen.words
        assert message.to == [adam.email]
        raw = message_from_bytes(message.message().as_bytes(), policy=policy.default)
        assert raw["Message-ID"].startswith(f"<notification-{notification.pk}@")


def test_nothing_in_a_message_becomes_a_header(alice: User) -> None:
    messages.purchase_confirmed(make_purchase(alice, package_name="Fine\r\nBcc: eve@example.com\x07"))
    account = ledger.get_account(user_id=alice.pk)
    messages.grant_received(account, tokens=5, reason="Thanks\r\nBcc: eve@example.com\x07", key="1")
    assert outbox.send_pending_emails() == Notification.objects.count()
    for message in mail.outbox:
        assert "Bcc" not in message.message()
        assert message.recipients() == [alice.email]


def test_muted_kind_is_shown_and_not_mailed(alice: User) -> None:
    account = ledger.get_account(user_id=alice.pk)
    inbox.update_emailed_kinds(alice, kinds=["purchase_confirmed"])
    messages.low_balance(account, key="1")
    messages.purchase_confirmed(make_purchase(alice))
    messages.auto_recharge_switched_off(account, reason="Three declines", key="1")
    assert outbox.send_pending_emails() == 2
    assert sorted(message.subject for message in mail.outbox) == [
        "150,000 tokens were added",
        "Auto-recharge was switched off",
    ]
    assert told(alice)["low_balance"] == 1
    assert Notification.objects.get(kind="low_balance").email_state == "not wanted"
    inbox.update_emailed_kinds(alice, kinds=["low_balance"])
    messages.low_balance(account, key="2")
    assert outbox.send_pending_emails() == 1


def test_muting_a_problem_in_the_database_changes_nothing(alice: User) -> None:
    for kind in inbox.ALWAYS_EMAILED:
        NotificationPreference.objects.create(user=alice, kind=kind, wants_email=False)
    messages.auto_recharge_needs_confirmation(make_purchase(alice, kind="auto_recharge"))
    assert outbox.send_pending_emails() == 1


# --- The outbox -----------------------------------------------------------------------------------------------------


@pytest.fixture
def no_mail_server(settings: Settings) -> None:
    settings.EMAIL_BACKEND = "django.core.mail.backends.smtp.EmailBackend"
    settings.EMAIL_HOST, settings.EMAIL_PORT = "127.0.0.1", free_port()


def low(user: User, *keys: str) -> None:
    account = ledger.get_account(user_id=user.pk)
    for key in keys:
        messages.low_balance(account, key=key)


def test_mail_server_away_and_back(alice: User, no_mail_server: None, settings: Settings) -> None:
    low(alice, "1")
    assert outbox.send_pending_emails() == 0
    waiting = the_only(alice)
    assert (waiting.email_state, waiting.email_attempts) == ("waiting", 1)
    assert "ConnectionRefusedError" in waiting.email_error
    assert waiting.email_next_at is not None
    assert waiting.email_next_at > timezone.now() + outbox.FIRST_EMAIL_WAIT / 2
    assert outbox.send_pending_emails() == 0  # not due yet
    assert the_only(alice).email_attempts == 1

    settings.EMAIL_BACKEND = "django.core.mail.backends.locmem.EmailBackend"
    make_due()
    assert tasks.send_notifications() == 1
    sent = the_only(alice)
    assert (sent.email_state, sent.email_attempts, sent.email_error, sent.email_next_at) == ("sent", 2, "", None)
    assert len(mail.outbox) == 1


def test_given_up_after_the_last_attempt_and_seen_in_django_admin(
    alice: User, susan: User, no_mail_server: None, client: Client
) -> None:
    low(alice, "1")
    waits = []
    for _ in range(outbox.MAX_EMAIL_ATTEMPTS + 3):
        make_due()
        outbox.send_pending_emails()
        at = the_only(alice).email_next_at
        waits.append(round((at - timezone.now()) / timedelta(minutes=1)) if at else None)
    assert waits[:8] == [2, 6, 18, 54, 162, 486, 1458, None]
    given_up = the_only(alice)
    assert (given_up.email_state, given_up.email_attempts) == ("given up", outbox.MAX_EMAIL_ATTEMPTS)
    client.force_login(susan)
    changelist = reverse("admin:billing_notification_changelist")
    assert "given up" in client.get(changelist, {"email": "given-up"}).content.decode()
    assert "0 notifications" in client.get(changelist, {"email": "waiting"}).content.decode()


def test_server_that_is_away_is_asked_once(alice: User, no_mail_server: None) -> None:
    low(alice, "1", "2", "3")
    outbox.send_pending_emails()
    assert sorted(Notification.objects.values_list("email_attempts", flat=True)) == [0, 0, 1]


class RefusingBackend(MemoryBackend):
    """A server that refuses the mails to one person."""

    def send_messages(self, messages: Any) -> int:
        for message in messages:
            if message.to == ["alice@example.com"]:
                raise smtplib.SMTPRecipientsRefused({"alice@example.com": (550, b"No such user")})
        return super().send_messages(messages)


def test_refused_mail_does_not_hold_up_the_others(alice: User, bob: User, settings: Settings) -> None:
    settings.EMAIL_BACKEND = f"{__name__}.RefusingBackend"
    low(alice, "1", "2")
    low(bob, "1")
    assert outbox.send_pending_emails() == 1
    assert mail.outbox[0].to == [bob.email]
    assert Counter(Notification.objects.values_list("email_attempts", flat=True)) == {1: 3}
    assert "No such user" in Notification.objects.filter(user=alice)[0].email_error


def test_row_that_cannot_be_written_out_does_not_hold_up_the_others(alice: User, bob: User) -> None:
    low(alice, "1")
    low(bob, "1")
    Notification.objects.filter(user=alice).update(title="Two\nlines")
    assert outbox.send_pending_emails() == 1
    assert "BadHeaderError" in the_only(alice).email_error


def test_no_more_than_the_limit(alice: User) -> None:
    low(alice, *"12345")
    assert [outbox.send_pending_emails(limit=2) for _ in range(4)] == [2, 2, 1, 0]


def test_crash_after_sending_brings_one_mail_more(alice: User, monkeypatch: pytest.MonkeyPatch) -> None:
    low(alice, "1")

    class Killed(BaseException):
        pass

    with monkeypatch.context() as patch:
        send = MemoryBackend.send_messages

        def send_and_die(self: MemoryBackend, messages: Any) -> int:
            send(self, messages)
            raise Killed

        patch.setattr(MemoryBackend, "send_messages", send_and_die)
        with pytest.raises(Killed):
            outbox.send_pending_emails()
    assert outbox.send_pending_emails() == 0  # still claimed
    make_due()
    assert outbox.send_pending_emails() == 1
    make_due()
    assert outbox.send_pending_emails() == 0
    first, second = (message.message()["Message-ID"] for message in mail.outbox)
    assert first == second


class CountingBackend(MemoryBackend):
    """Counts what is sent, and notes whether a transaction was open meanwhile."""

    sent: Counter[str] = Counter()
    was_in_transaction: list[bool] = []

    def send_messages(self, messages: Any) -> int:
        CountingBackend.was_in_transaction.append(connection.in_atomic_block)
        CountingBackend.sent.update(message.message()["Message-ID"] for message in messages)
        return len(messages)


@pytest.fixture
def two_workers(alice: User, settings: Settings, monkeypatch: pytest.MonkeyPatch) -> Callable[[], int]:
    """Runs the outbox of 20 mails twice at once; both take their first mail at the same moment."""
    settings.EMAIL_BACKEND = f"{__name__}.CountingBackend"
    CountingBackend.sent, CountingBackend.was_in_transaction = Counter(), []
    low(alice, *(str(number) for number in range(20)))
    both_have_chosen, save = Barrier(2), Notification.save

    def save_together(self: Notification, **options: Any) -> None:
        if not CountingBackend.sent:
            with suppress(BrokenBarrierError):
                both_have_chosen.wait(20)
        save(self, **options)

    monkeypatch.setattr(Notification, "save", save_together)

    def run() -> int:
        counts: list[int] = []

        def work() -> None:
            try:
                counts.append(outbox.send_pending_emails())
            finally:
                connection.close()

        workers = [Thread(target=work) for _ in range(2)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        assert len(counts) == 2
        return sum(counts)

    return run


@pytest.mark.django_db(transaction=True)
def test_two_workers_at_once_send_each_mail_once(two_workers: Callable[[], int]) -> None:
    assert two_workers() == 20
    assert len(CountingBackend.sent) == 20
    assert set(CountingBackend.sent.values()) == {1}
    assert not any(CountingBackend.was_in_transaction)  # law 7
    assert {each.email_state for each in Notification.objects.all()} == {"sent"}
    assert {each.email_attempts for each in Notification.objects.all()} == {1}


@pytest.mark.django_db(transaction=True)
def test_without_the_lock_a_mail_is_sent_twice(two_workers: Callable[[], int], monkeypatch: pytest.MonkeyPatch) -> None:
    """The control: the race of the test above does happen."""
    monkeypatch.setattr(QuerySet, "select_for_update", lambda self, **options: self)
    two_workers()
    assert max(CountingBackend.sent.values()) == 2


@pytest.mark.django_db(transaction=True)
def test_claim_does_not_wait_for_a_locked_row(alice: User) -> None:
    low(alice, "1", "2")
    locked, done = Event(), Event()

    def hold() -> None:
        try:
            with transaction.atomic():
                Notification.objects.select_for_update().get(key="low_balance:1")
                locked.set()
                done.wait(60)
        finally:
            connection.close()

    holder = Thread(target=hold)
    holder.start()
    try:
        assert locked.wait(60)
        assert outbox.send_pending_emails() == 1
    finally:
        done.set()
        holder.join()


# --- The bell and the pages -----------------------------------------------------------------------------------------


@pytest.fixture
def signed_in(client: Client, alice: User) -> Client:
    client.force_login(alice)
    return client


def page(client: Client, name: str = "tokens:notifications", **query: Any) -> str:
    response = client.get(reverse(name), query)
    assert response.status_code == 200
    return response.content.decode()


def bell_words(html: str) -> str:
    words = _Tags(html[html.index('id="bell"') :].partition("</a>")[0]).words
    return " ".join(words.split())


def test_bell_counts_what_is_unread(signed_in: Client, alice: User, bob: User) -> None:
    assert bell_words(page(signed_in, "tokens:home")).endswith("Notifications")
    low(bob, "1")
    low(alice, "1", "2", "3")
    assert "3 Notifications, 3 unread" in bell_words(page(signed_in, "tokens:home"))
    low(alice, *(str(number) for number in range(4, 100)))
    assert "99 Notifications, 99 unread" in bell_words(page(signed_in, "tokens:home"))
    low(alice, "100")
    assert "99+ Notifications, more than 99 unread" in bell_words(page(signed_in, "tokens:home"))


def test_bell_answers_when_there_is_news(signed_in: Client, alice: User) -> None:
    low(alice, "1")
    assert signed_in.get(reverse("tokens:bell"), {"shown": "1"}).status_code == 204
    fresh = signed_in.get(reverse("tokens:bell"), {"shown": "0"})
    assert "1 Notifications, 1 unread" in bell_words(fresh.content.decode())
    assert b"shown=1" in fresh.content
    assert Client().get(reverse("tokens:bell")).status_code == 401


def test_page_lists_newest_first_and_marks_what_it_showed(signed_in: Client, alice: User) -> None:
    assert "Nothing yet" in page(signed_in)
    account = ledger.get_account(user_id=alice.pk)
    for number in range(30):
        messages.grant_received(account, tokens=5, reason=f"Number {number}.", key=str(number))
    first = page(signed_in)
    assert first.index("Number 29.") < first.index("Number 5.")
    assert "Number 4." not in first
    assert first.count("is-new") == 25
    assert "5 Notifications, 5 unread" in bell_words(first)
    assert inbox.count_unread(alice.pk) == 5
    again = page(signed_in)
    assert "is-new" not in again
    assert "Mark all as read" in again

    oldest_shown = Notification.objects.order_by("-id")[24].pk
    assert f"?before={oldest_shown}" in again
    second = page(signed_in, before=oldest_shown)
    assert second.count("is-new") == 5
    assert second.index("Number 4.") < second.index("Number 0.")
    assert "Mark all as read" not in page(signed_in)
    assert "Nothing older" in page(signed_in, before=1)


@pytest.mark.parametrize("before", ["", "x", "-1", "0x1", "١٢", "9" * 30, "1 OR 1=1"])
def test_page_from_anywhere(signed_in: Client, alice: User, before: str) -> None:
    low(alice, "1")
    assert "Your balance is running low" in page(signed_in, before=before)


def test_page_loaded_ahead_marks_nothing(signed_in: Client, alice: User) -> None:
    low(alice, "1")
    assert signed_in.get(reverse("tokens:notifications"), headers={"Sec-Purpose": "prefetch"}).status_code == 200
    assert inbox.count_unread(alice.pk) == 1


def test_mark_all_as_read(signed_in: Client, alice: User, bob: User) -> None:
    low(alice, "1", "2")
    low(bob, "1")
    assert signed_in.get(reverse("tokens:notifications_read")).status_code == 405
    answer = signed_in.post(reverse("tokens:notifications_read"), follow=True)
    assert "All notifications are marked as read." in answer.content.decode()
    assert (inbox.count_unread(alice.pk), inbox.count_unread(bob.pk)) == (0, 1)


def test_another_users_notifications_are_out_of_reach(signed_in: Client, alice: User, bob: User) -> None:
    account = ledger.get_account(user_id=bob.pk)
    messages.grant_received(account, tokens=5, reason="For Bob alone.", key="1")
    theirs = the_only(bob)
    assert "For Bob alone" not in page(signed_in)
    assert "For Bob alone" not in page(signed_in, before=theirs.pk + 1)
    assert inbox.mark_read(user_id=alice.pk, notification_ids=[theirs.pk]) == 0
    assert the_only(bob).read_at is None


def test_nasty_words_are_words(signed_in: Client, alice: User) -> None:
    account = ledger.get_account(user_id=alice.pk)
    messages.grant_received(account, tokens=5, reason=NASTY, key="1")
    html = page(signed_in)
    assert "<b onclick" not in html
    assert NASTY in _Tags(html).words


@pytest.mark.parametrize("name", ["notifications", "notifications_read", "notification_settings"])
def test_pages_are_for_people_who_are_signed_in(client: Client, db: None, name: str) -> None:
    method = client.post if name == "notifications_read" else client.get
    assert method(reverse(f"tokens:{name}"))["Location"].startswith("/accounts/login/")


def checked(html: str) -> set[str]:
    found: set[str] = set()

    class Boxes(HTMLParser):
        def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            values = dict(attrs)
            if tag == "input" and values.get("name") == "email" and "checked" in values:
                found.add(str(values["value"]))

    Boxes().feed(html)
    return found


def test_choosing_the_emails(signed_in: Client, alice: User) -> None:
    everything = set(Kind.values) - {"weekly_summary", "refund_refused", "provider_refuses_us"}
    assert checked(page(signed_in, "tokens:notification_settings")) == everything
    answer = signed_in.post(
        reverse("tokens:notification_settings"),
        {"email": ["low_balance", "weekly_summary", "no_such_kind"]},
        follow=True,
    )
    html = answer.content.decode()
    assert "Your choice was saved." in html
    assert checked(html) == {
        "low_balance",
        "auto_recharge_needs_confirmation",
        "auto_recharge_switched_off",
        "auto_recharge_switched_on",
        "saved_card_changed",
        "account_status_changed",
    }
    assert not NotificationPreference.objects.filter(kind__in=["weekly_summary", "no_such_kind"]).exists()
    signed_in.post(reverse("tokens:notification_settings"), {"email": sorted(everything)})
    assert checked(page(signed_in, "tokens:notification_settings")) == everything


def test_admins_choose_the_weekly_summary_too(client: Client, adam: User) -> None:
    client.force_login(adam)
    assert "weekly_summary" in checked(page(client, "tokens:notification_settings"))
    client.post(reverse("tokens:notification_settings"), {"email": []})
    weekly.weekly_summary(now=NOW)
    assert not the_only(adam).email_wanted


# --- The page of a development machine ------------------------------------------------------------------------------


@pytest.fixture
def mail_files(settings: Settings, tmp_path: Path) -> Path:
    settings.EMAIL_BACKEND = "django.core.mail.backends.filebased.EmailBackend"
    settings.EMAIL_FILE_PATH = tmp_path / "mails"
    settings.DEBUG = True
    return tmp_path / "mails"


def test_mails_without_a_mail_server(client: Client, alice: User, mail_files: Path) -> None:
    assert "No emails yet" in page(client, "mails")
    low(alice, "1")
    messages.purchase_confirmed(make_purchase(alice))
    assert outbox.send_pending_emails() == 2
    listed = page(client, "mails")
    assert listed.index("150,000 tokens were added") < listed.index("Your balance is running low")
    (file,) = (path.name for path in mail_files.iterdir())
    shown = client.get(reverse("mail", args=[file, 1])).content.decode()
    assert "Hello Alice" in shown
    assert reverse("mail-html", args=[file, 1]) in shown
    html = client.get(reverse("mail-html", args=[file, 1]))
    assert "150,000 tokens were added" in html.content.decode()
    assert html["X-Frame-Options"] == "SAMEORIGIN"
    assert "default-src 'none'" in html["Content-Security-Policy"]
    assert "sandbox" in html["Content-Security-Policy"]
    for wrong in ((file, 2), ("other.log", 0), ("..", 0)):
        assert client.get(reverse("mail", args=wrong)).status_code == 404


def test_mails_are_not_shown_in_production(client: Client, alice: User, mail_files: Path, settings: Settings) -> None:
    low(alice, "1")
    outbox.send_pending_emails()
    (file,) = (path.name for path in mail_files.iterdir())
    settings.DEBUG = False
    for address in (reverse("mails"), reverse("mail", args=[file, 0]), reverse("mail-html", args=[file, 0])):
        assert client.get(address).status_code == 404


def test_file_of_the_mail_backend_reads_back_whole(alice: User, mail_files: Path) -> None:
    """Its mails are told apart by a line of dashes; none of ours may contain one."""
    low(alice, "1")
    assert outbox.send_pending_emails() == 1
    (path,) = mail_files.iterdir()
    message = message_from_bytes(path.read_bytes(), policy=policy.default)
    assert isinstance(message, EmailMessage)
    text = message.get_body(("plain",))
    assert text is not None
    assert "-" * 79 not in text.get_content()
