"""A person takes along what is theirs, or is made nobody (row 70)."""

import csv
import io
import json
import zipfile
from decimal import Decimal
from io import StringIO
from typing import Any
from urllib.parse import urlencode

import pytest
from allauth.account.models import EmailAddress
from allauth.mfa.models import Authenticator
from allauth.usersessions.models import UserSession
from django.contrib.admin.models import CHANGE, LogEntry
from django.core.files.base import ContentFile
from django.core.management import CommandError, call_command
from django.db import connection
from django.db.models import ProtectedError
from django.test import Client
from django.urls import reverse
from pytest_django.fixtures import Settings

from accounts import api_keys
from accounts.models import AuditEntry, User, UserKept, Workspace
from ai_ops import own_data, tasks
from ai_ops.models import Chat, ContentPiece, GeneratedImage, ImageBatch, ImagePrompt, Project
from billing import ledger
from billing import tasks as billing_tasks
from billing.catalogue import packages, system_settings
from billing.models import (
    Drift,
    Notification,
    Purchase,
    StripeEvent,
    TokenAccount,
    TokenPricing,
    TokenTransaction,
)
from billing.payments import gateway, objects, webhooks
from billing.pricing import TokenPools
from billing.staff import bulk, grants
from billing.staff.accounts import AccountFilter
from billing.upkeep.own_data import NotNow
from tests.conftest import PASSWORD, MakeUser
from tests.payments import begin_checkout, deliver, event_of, events_of, verify_books
from tests.servers import StripeStandIn

pytestmark = [pytest.mark.django_db(transaction=True), pytest.mark.usefixtures("fresh_limits")]

OPERATION = ledger.Operation(
    "chat", "openai", "gpt-6-luna", multiplier=Decimal(1), metadata={"note": "about my aunt Polly"}
)
HER_WORD = "Polly"  # what only Alice's own words hold


@pytest.fixture
def confirmed(buyer: Client) -> Client:
    """Alice, who has just entered her password once more."""
    buyer.post(reverse("account_reauthenticate"), {"password": PASSWORD})
    return buyer


@pytest.fixture
def work(alice: User) -> GeneratedImage:
    """Alice has made one of everything."""
    EmailAddress.objects.create(user=alice, email=alice.email, verified=True, primary=True)
    Authenticator.objects.create(user=alice, type="totp", data={"secret": "not to be told"})
    api_keys.make_key(user_id=alice.pk, name="=cmd()", scopes=["usage:read"])
    project = Project.objects.create(workspace=alice.workspaces.get(), name=f"{HER_WORD}'s project")
    piece = ContentPiece.objects.create(project=project, author=alice, title=HER_WORD, body="Two", state="ready")
    for number, body in ((1, "One"), (2, "Two")):
        piece.versions.create(number=number, body=body, origin="edit")
    chat = Chat.objects.create(project=project, author=alice, title=HER_WORD)
    chat.turns.create(question=f"Who is {HER_WORD}?", answer="An aunt.", state="ready")
    ImagePrompt.objects.create(project=project, author=alice, idea=HER_WORD, text="A kind aunt", state="ready")
    batch = ImageBatch.objects.create(
        project=project, author=alice, prompt=HER_WORD, size="1024x1024", count=1, state="ready"
    )
    ledger.deduct_tokens(
        user_id=alice.pk, tokens=100, operation=OPERATION, pools=TokenPools(input_tokens=100), idempotency_key="k"
    )
    return GeneratedImage.objects.create(
        batch=batch, position=1, file=ContentFile(b"picture", name="1.png"), media_type="image/png"
    )


def archive_of(user: User) -> zipfile.ZipFile:
    file = io.BytesIO()
    own_data.write_archive(user, file)
    return zipfile.ZipFile(file)


def read(archive: zipfile.ZipFile, name: str) -> Any:
    return json.loads(archive.read(f"{name}.json"))


# --- Taking it along ------------------------------------------------------------------------------------------------


def test_everything_is_in_the_archive(alice: User, bob: User, work: GeneratedImage) -> None:
    archive = archive_of(alice)
    assert archive.testzip() is None
    profile = read(archive, "profile")
    assert (profile["email"], profile["two_factor"][0]["type"]) == ("alice@example.com", "totp")
    assert (read(archive, "account")["balance"], read(archive, "account")["bonus_withheld"]) == (9_900, "")
    assert [(row["type"], row["amount"]) for row in read(archive, "ledger")] == [("bonus", 10_000), ("usage", -100)]
    assert [row["billable_tokens"] for row in read(archive, "usage")] == [100]
    assert read(archive, "purchases") == []
    assert [version["body"] for version in read(archive, "pieces")[0]["versions"]] == ["One", "Two"]
    assert read(archive, "chats")[0]["turns"][0]["answer"] == "An aunt."
    assert read(archive, "image-prompts")[0]["text"] == "A kind aunt"
    assert [name for name in archive.namelist() if name.startswith("images/")] == [f"images/{work.batch_id}-1.png"]
    assert archive.read(f"images/{work.batch_id}-1.png") == b"picture"


def test_nothing_that_opens_a_door_is_in_it(alice: User, work: GeneratedImage) -> None:
    archive = archive_of(alice)
    everything = b"".join(archive.read(name) for name in archive.namelist())
    for secret in ("not to be told", alice.password, api_keys.list_keys(user_id=alice.pk)[0].token_hash):
        assert secret.encode() not in everything


def test_nothing_of_others_is_in_it(alice: User, bob: User, work: GeneratedImage) -> None:
    """Row 63."""
    archive = archive_of(bob)
    everything = b"".join(archive.read(name) for name in archive.namelist())
    assert b"alice" not in everything
    assert HER_WORD.encode() not in everything
    assert [row["amount"] for row in read(archive, "ledger")] == [10_000]


def test_a_lost_image_file_keeps_nobody_from_the_rest(alice: User, work: GeneratedImage) -> None:
    work.file.storage.delete(str(work.file.name))
    archive = archive_of(alice)
    assert read(archive, "images")[0]["prompt"] == HER_WORD
    assert archive.testzip() is None


@pytest.mark.parametrize("text", ["=1+1", "+1", "-1", "@sum", "\t=1", "\r=1"])
def test_csv_holds_no_formulas(alice: User, text: str) -> None:
    """Row 67: a text that a spreadsheet would calculate is made a text; a number stays one."""
    ledger.add_tokens(user_id=alice.pk, tokens=5, type="bonus", description=text, idempotency_key="bonus")
    ledger.deduct_tokens(user_id=alice.pk, tokens=7, operation=OPERATION, pools=TokenPools(input_tokens=7))
    rows = list(csv.DictReader(StringIO(archive_of(alice).read("ledger.csv").decode("utf-8-sig"), newline="")))
    kept = rows[1]["description"]
    assert kept.startswith("'")
    assert kept.replace("'", "") == text
    assert [row["amount"] for row in rows] == ["10000", "5", "-7"]


def test_download_wants_the_password_once_more(buyer: Client) -> None:
    page = reverse("data-download")
    for answer in (buyer.get(page), buyer.post(page, follow=True)):
        assert "postmate-data" not in answer.get("Content-Disposition", "")
    assert buyer.get(page)["Location"] == f"{reverse('account_reauthenticate')}?{urlencode({'next': page})}"
    assert buyer.post(page)["Location"] == page
    answer = buyer.post(f"{reverse('account_reauthenticate')}?next={page}", {"password": "wrong horse", "next": page})
    assert answer.status_code == 200
    answer = buyer.post(reverse("account_reauthenticate"), {"password": PASSWORD, "next": page}, follow=True)
    assert answer.redirect_chain[-1][0] == page
    assert buyer.get(page).status_code == 200


def test_downloads_are_few_a_day(confirmed: Client, alice: User) -> None:
    for _ in range(own_data.DOWNLOADS_A_DAY):
        answer = confirmed.post(reverse("data-download"))
        assert answer["Content-Type"] == "application/zip"
        archive = zipfile.ZipFile(io.BytesIO(answer.getvalue()))
        assert read(archive, "profile")["email"] == alice.email
    answer = confirmed.post(reverse("data-download"), follow=True)
    assert "You made 5 downloads today" in answer.content.decode()


def test_downloads_are_refused_while_nobody_counts(confirmed: Client, alice: User, settings: Settings) -> None:
    """Row 73: a sensitive limit fails closed."""
    settings.CACHES = {
        "default": {"BACKEND": "django.core.cache.backends.redis.RedisCache", "LOCATION": "redis://127.0.0.1:1/0"}
    }
    with pytest.raises(own_data.TooManyDownloads, match="just now"):
        own_data.take_download(user_id=alice.pk)


# --- Being made nobody ----------------------------------------------------------------------------------------------


def rows_with(text: str) -> list[str]:
    """The tables of the whole database in which a row holds `text`."""
    with connection.cursor() as cursor:
        cursor.execute("SELECT tablename FROM pg_tables WHERE schemaname = 'public'")
        found = []
        for (table,) in cursor.fetchall():
            cursor.execute(f'SELECT count(*) FROM "{table}" AS r WHERE r::text ILIKE %s', [f"%{text}%"])  # noqa: S608 – our own names and constants, no input
            (count,) = cursor.fetchone()
            if count:
                found.append(table)
    return found


def test_nothing_names_the_person_any_more(
    stripe: StripeStandIn, confirmed: Client, bought: Purchase, alice: User, susan: User, work: GeneratedImage
) -> None:
    """Row 70: the ledger stays to the last row; the person is in no table of the database, nor on the disk."""
    LogEntry.objects.log_actions(susan.pk, User.objects.filter(pk=alice.pk), CHANGE)
    UserSession.objects.create(user=alice, ip="192.0.2.7", session_key="k", user_agent="Alice's browser")
    UserSession.objects.create(user=alice, ip="192.0.2.7", session_key=confirmed.session.session_key, user_agent="-")
    entries = list(TokenTransaction.objects.filter(account__user=alice).order_by("sequence").values())
    before = TokenAccount.objects.get(user=alice)
    assert rows_with("alice")
    assert rows_with(HER_WORD)
    file, storage = str(work.file.name), work.file.storage

    answer = confirmed.post(reverse("anonymise"), {"confirmation": "anonymise me"})
    assert answer.status_code == 302
    assert rows_with("alice@") == rows_with("Alice") == rows_with(HER_WORD) == rows_with("192.0.2.7") == []
    assert not storage.exists(file)
    assert list(TokenTransaction.objects.filter(account__user=alice).order_by("sequence").values()) == entries
    account, user = TokenAccount.objects.get(user=alice), User.objects.get(pk=alice.pk)
    assert (account.balance, account.sequence) == (before.balance, before.sequence)
    assert (account.status, account.status_reason) == ("blocked", "anonymised")
    assert (account.card_last4, account.auto_recharge_enabled) == ("", False)
    assert (user.is_active, user.has_usable_password(), user.display_name) == (False, False, f"anonymised-{user.pk}")
    for model in (Project, ContentPiece, Chat, ImagePrompt, ImageBatch, GeneratedImage, Notification):
        assert not model.objects.exists()
    verify_books()

    # Signed out everywhere, for ever.
    assert "_auth_user_id" not in confirmed.session
    again = Client()
    again.post(reverse("account_login"), {"login": "alice@example.com", "password": PASSWORD})
    assert "_auth_user_id" not in again.session
    assert confirmed.get(reverse("studio:home")).status_code == 302


def test_nothing_names_who_worked_here_either(
    make_user: MakeUser, bob: User, susan: User, stripe: StripeStandIn
) -> None:
    """Row 70, of whom the audit log and others' rows tell: what they did names them by their number alone."""
    zoe = make_user("zoe", role=User.Role.SUPERADMIN)
    User.objects.filter(pk=zoe.pk).update(name="Zoe Quux")
    zoe.refresh_from_db()
    hers = Client()
    hers.force_login(zoe)
    drift = Drift.objects.create(kind="unknown_payment", stripe_id="pi_1", description="A payment")
    event = StripeEvent.objects.create(event_id="evt_1", type="x", livemode=False, payload={}, state="aside")
    hers.post(reverse("dashboard:resolve-drift", args=[drift.pk]), {"resolution": "Asked them"})
    webhooks.settle_by_hand(event, by=zoe)
    edit = {"role": "user", "time_zone": "", "is_active": "on"}
    hers.post(reverse("admin:accounts_user_change", args=[bob.pk]), {"name": "Bobby", **edit})
    system_settings.update_system_settings(changes={"low_balance_tokens": 2_000}, changed_by_id=zoe.pk)
    packages.update_package(TokenPricing.objects.earliest("pk").pk, changed_by_id=zoe.pk, description="New words")
    grants.grant_tokens(admin=zoe, user_id=bob.pk, tokens=5, reason="A gift", request_key="k")
    bulk.start_bulk_job(admin=zoe, kind="export", filter=AccountFilter(search="", status="", band=""), request_key="b")
    theirs = Client()
    theirs.force_login(susan)
    theirs.post(reverse("admin:accounts_user_change", args=[zoe.pk]), {"name": "Zoe Quux", **edit})
    drift.refresh_from_db()
    assert (drift.resolution, AuditEntry.objects.filter(actor=zoe).count() > 5) == ("Asked them", True)
    assert rows_with("zoe")
    own_data.anonymize_user(user_id=zoe.pk)
    assert rows_with("zoe") == rows_with("quux") == []


def test_customer_is_deleted_at_stripe(stripe: StripeStandIn, bought: Purchase, alice: User) -> None:
    """Law 7: after the commit. Stripe away: the sweep does it, and nothing is lost."""
    customer_id = TokenAccount.objects.get(user=alice).stripe_customer_id
    assert customer_id
    own_data.anonymize_user(user_id=alice.pk)  # tests have no worker: the task waits
    assert TokenAccount.objects.get(user=alice).stripe_customer_id == customer_id
    stripe.control("faults", kind="429", path_prefix="/v1/customers", method="DELETE", count=3)
    assert billing_tasks.sweep_customers() == 0
    stripe.control("faults/clear")
    assert billing_tasks.sweep_customers() == 1
    assert TokenAccount.objects.get(user=alice).stripe_customer_id is None
    with pytest.raises(gateway.GatewayRefused):
        gateway.create_portal_session(customer_id=customer_id, return_url="http://127.0.0.1/")
    gateway.delete_customer(customer_id)  # gone stays gone
    deleted = event_of(stripe, "customer.deleted")
    assert deleted["data"]["object"]["email"] == "alice@example.com"
    assert deliver(deleted).status_code == 200
    assert rows_with("alice@") == []
    verify_books()


def test_money_that_goes_back_later_is_booked_and_told_nobody(
    stripe: StripeStandIn, bought: Purchase, alice: User
) -> None:
    """Law 12: the books go on for an account that nobody has."""
    own_data.anonymize_user(user_id=alice.pk)
    billing_tasks.sweep_customers()
    stripe.control(f"payments/{bought.stripe_payment_intent_id}/refund")
    for event in events_of(stripe, "refund.created"):
        assert deliver(event).status_code == 200
    account = TokenAccount.objects.get(user=alice)
    assert account.balance == 10_000
    assert account.status == "blocked"
    assert not Notification.objects.exists()
    verify_books()


def test_not_while_an_operation_runs(confirmed: Client, alice: User) -> None:
    posting = ledger.reserve_tokens(
        user_id=alice.pk, tokens=500, operation=OPERATION, idempotency_key="op", lifetime_seconds=600
    )
    answer = confirmed.post(reverse("anonymise"), {"confirmation": "anonymise me"})
    assert answer.status_code == 400
    assert "An operation of yours is still running" in answer.content.decode()
    assert User.objects.get(pk=alice.pk).email == alice.email
    assert posting.usage_id
    ledger.release_usage(usage_id=posting.usage_id)
    own_data.anonymize_user(user_id=alice.pk)


@pytest.mark.parametrize("state", ["processing", "action_required", "review"])
def test_not_while_a_payment_is_under_way(bought: Purchase, alice: User, state: str) -> None:
    Purchase.objects.filter(pk=bought.pk).update(state=state)
    with pytest.raises(NotNow, match="payment of yours is under way"):
        own_data.anonymize_user(user_id=alice.pk)
    assert User.objects.get(pk=alice.pk).is_active


def test_open_payment_pages_are_closed_first(stripe: StripeStandIn, buyer: Client, alice: User) -> None:
    """Nobody can pay afterwards for an account that nobody has."""
    purchase = begin_checkout(buyer)
    payment_page = purchase.checkout_url
    own_data.anonymize_user(user_id=alice.pk)
    purchase.refresh_from_db()
    assert purchase.state == "expired"
    assert stripe.pay(payment_page).status_code != 303
    assert stripe.state()["succeeded_charges"] == 0


def test_nothing_is_changed_while_stripe_cannot_close_a_page(stripe: StripeStandIn, buyer: Client, alice: User) -> None:
    begin_checkout(buyer)
    stripe.control("faults", kind="429", path_prefix="/v1/checkout", count=9)
    with pytest.raises(NotNow, match="Try again in a few minutes"):
        own_data.anonymize_user(user_id=alice.pk)
    assert User.objects.get(pk=alice.pk).is_active
    stripe.control("faults/clear")
    own_data.anonymize_user(user_id=alice.pk)


def test_page_paid_a_moment_ago_is_credited_first(stripe: StripeStandIn, paid: Purchase, alice: User) -> None:
    """Law 12."""
    own_data.anonymize_user(user_id=alice.pk)
    paid.refresh_from_db()
    assert paid.state == "paid"
    assert TokenAccount.objects.get(user=alice).balance == 160_000
    verify_books()


def test_admins_stay(susan: User, adam: User) -> None:
    """The ledger names them for their grants, and `verify_ledger` asks for a superadmin."""
    for admin in (susan, adam):
        with pytest.raises(NotNow, match="admin"):
            own_data.anonymize_user(user_id=admin.pk)
        assert User.objects.get(pk=admin.pk).is_active


@pytest.mark.parametrize("typed", ["", "yes", "anonymise"])
def test_confirmation_is_typed(confirmed: Client, alice: User, typed: str) -> None:
    assert confirmed.post(reverse("anonymise"), {"confirmation": typed}).status_code == 400
    assert User.objects.get(pk=alice.pk).email == alice.email


def test_anonymising_wants_the_password_once_more(buyer: Client, alice: User) -> None:
    buyer.post(reverse("anonymise"), {"confirmation": "anonymise me"})
    assert User.objects.get(pk=alice.pk).email == alice.email


def test_twice_changes_nothing_more(alice: User, work: GeneratedImage) -> None:
    own_data.anonymize_user(user_id=alice.pk)
    once = User.objects.filter(pk=alice.pk).values().get()
    own_data.anonymize_user(user_id=alice.pk)
    again = User.objects.filter(pk=alice.pk).values().get()
    assert {**again, "password": ""} == {**once, "password": ""}


def test_interrupted_erasure_is_finished_by_the_sweep(
    alice: User, work: GeneratedImage, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_disk(*args: object, **kwargs: object) -> None:
        raise OSError("The disk is away.")

    with monkeypatch.context() as patch:
        patch.setattr(work.file.storage.__class__, "delete", no_disk)
        own_data.anonymize_user(user_id=alice.pk)
    assert GeneratedImage.objects.exists()  # the row stays for as long as its file does
    assert not User.objects.get(pk=alice.pk).is_active
    assert tasks.sweep_content() == 1
    assert not Project.objects.exists()
    assert not work.file.storage.exists(str(work.file.name))
    assert tasks.sweep_content() == 0


def test_others_keep_everything(alice: User, bob: User, work: GeneratedImage) -> None:
    own_data.anonymize_user(user_id=bob.pk)
    assert rows_with(HER_WORD)
    assert work.file.storage.exists(str(work.file.name))
    assert User.objects.get(pk=alice.pk).email == "alice@example.com"


def test_the_address_is_free_again(alice: User, make_user: MakeUser) -> None:
    own_data.anonymize_user(user_id=alice.pk)
    newcomer = make_user("alice")
    assert newcomer.pk != alice.pk
    assert ledger.get_account(user_id=newcomer.pk).balance == 0  # the mailbox had the welcome bonus


def test_operators_do_the_same(alice: User, susan: User) -> None:
    out = StringIO()
    call_command("anonymize_user", "ALICE@example.com", "--yes", stdout=out)
    assert "is anonymised" in out.getvalue()
    assert User.objects.get(pk=alice.pk).anonymised_at is not None
    for address in ("alice@example.com", "nobody@example.com"):
        with pytest.raises(CommandError, match="Nobody signs in"):
            call_command("anonymize_user", address, "--yes")
    with pytest.raises(CommandError, match="admin"):
        call_command("anonymize_user", susan.email, "--yes")


# --- Being deleted, which does not happen ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "delete",
    [
        pytest.param(lambda user: user.delete(), id="the row"),
        pytest.param(lambda user: User.objects.filter(pk=user.pk).delete(), id="by a query"),
        pytest.param(lambda user: Workspace.objects.filter(owner=user).delete(), id="their workspace"),
    ],
)
def test_people_with_a_ledger_are_not_deleted(alice: User, delete: Any) -> None:
    """Row 70: refused, in words that say what to do instead."""
    with pytest.raises(ProtectedError) as refused:
        delete(alice)
    if refused.type is UserKept:
        assert "manage.py anonymize_user" in str(refused.value)
    else:
        assert Workspace.objects.filter(owner=alice).exists()
    assert User.objects.filter(pk=alice.pk).exists()


def test_django_admin_deletes_nobody(client: Client, susan: User, alice: User) -> None:
    """Row 70: nor does a superadmin at the page."""
    client.force_login(susan)
    answer = client.post(reverse("admin:accounts_user_delete", args=[alice.pk]), {"post": "yes"}, follow=True)
    assert "Anonymise them instead" in answer.content.decode()
    client.post(reverse("admin:accounts_user_changelist"), {"action": "delete_selected", "_selected_action": alice.pk})
    assert User.objects.filter(pk=alice.pk).exists()


# --- The inbox ------------------------------------------------------------------------------------------------------


def test_the_inbox_keeps_no_names(stripe: StripeStandIn, bought: Purchase, alice: User) -> None:
    """Stripe's events are kept to be handled again, which needs no addresses."""
    event = event_of(stripe, "checkout.session.completed")
    kept = StripeEvent.objects.get(event_id=event["id"])
    assert "alice" not in json.dumps(kept.payload)
    session = objects.read_checkout_session(kept.payload["data"]["object"])
    assert session == objects.read_checkout_session(event["data"]["object"])
