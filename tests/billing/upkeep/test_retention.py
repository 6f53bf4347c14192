"""What goes after its days, what stays for ever, and that nothing that was done is done again."""

from datetime import timedelta
from io import StringIO

import pytest
from allauth.usersessions.models import UserSession
from django.contrib.sessions.models import Session
from django.core.management import call_command
from django.test import Client
from django.utils import timezone
from pytest_django.fixtures import Settings

from accounts.models import AuditEntry, User
from billing import tasks
from billing.models import BulkJob, Notification, Purchase, StripeEvent, TokenTransaction
from billing.staff import bulk
from billing.staff.accounts import AccountFilter
from billing.upkeep import retention
from tests.payments import ONE_STARTER, changed, credits_of, deliver, event_of, state_of
from tests.servers import StripeStandIn

pytestmark = [pytest.mark.django_db, pytest.mark.usefixtures("events_wait")]

COMPLETED = "checkout.session.completed"
YEARS_AGO = timezone.now() - timedelta(days=2_000)


def dry_run() -> str:
    output = StringIO()
    call_command("apply_retention", dry_run=True, stdout=output)
    return output.getvalue()


@pytest.mark.usefixtures("books_stay_in_order")
def test_an_old_event_that_comes_again_is_known(stripe: StripeStandIn, bought: Purchase, alice: User) -> None:
    """Its payload is gone, its row is not: nothing is credited, said or kept a second time (law 6)."""
    event = event_of(stripe, COMPLETED)
    StripeEvent.objects.update(received_at=YEARS_AGO)
    Notification.objects.update(read_at=YEARS_AGO, email_next_at=None)
    before = TokenTransaction.objects.count(), StripeEvent.objects.count()
    assert "1 would go" in dry_run()
    assert StripeEvent.objects.get(event_id=event["id"]).payload != {}, "A dry run deletes nothing."

    tasks.apply_retention()

    assert StripeEvent.objects.get(event_id=event["id"]).payload == {}
    assert not Notification.objects.filter(user=bought.user).exists()
    assert deliver(event).status_code == 200
    assert (TokenTransaction.objects.count(), StripeEvent.objects.count()) == before
    assert credits_of(alice) == ONE_STARTER
    assert state_of(event) == "processed"
    assert not Notification.objects.filter(user=bought.user).exists()
    # The same payment under a new event id, too: what guards it is the purchase, not the inbox.
    assert deliver(changed(event)).status_code == 200
    assert credits_of(alice) == ONE_STARTER
    assert "1 would go" not in dry_run(), "The next night does not do it again."


def test_what_waits_for_somebody_stays(alice: User) -> None:
    """Events that were not handled can be handled again for ever; a message is kept until it is read and mailed."""
    for state in ("received", "failed", "aside", "processed", "ignored"):
        StripeEvent.objects.create(
            event_id=f"evt_{state}", type="refund.created", livemode=False, payload={"id": state}, state=state
        )
    StripeEvent.objects.update(received_at=YEARS_AGO)
    StripeEvent.objects.create(
        event_id="evt_new", type="refund.created", livemode=False, payload={"id": "new"}, state="processed"
    )
    old = {"user": alice, "kind": "grant_received", "title": "Tokens"}
    for key, fields in {
        "read": {"read_at": YEARS_AGO},
        "unread": {},
        "unsent": {"read_at": YEARS_AGO, "email_next_at": YEARS_AGO},
        "new": {"read_at": timezone.now()},
    }.items():
        Notification.objects.create(key=key, **old, **fields)

    retention.apply_retention()

    kept = StripeEvent.objects.exclude(payload={}).values_list("event_id", flat=True)
    assert set(kept) == {"evt_received", "evt_failed", "evt_aside", "evt_new"}
    assert StripeEvent.objects.count() == 6
    assert set(Notification.objects.values_list("key", flat=True)) == {"unread", "unsent", "new"}


@pytest.mark.usefixtures("books_stay_in_order")
def test_exports_go_and_grants_stay(susan: User, alice: User, monkeypatch: pytest.MonkeyPatch) -> None:
    """In batches, each person's row first. What a grant did to whom is part of the books."""
    monkeypatch.setattr(retention, "BATCH_ROWS", 1)
    everybody = AccountFilter()
    export = bulk.start_bulk_job(admin=susan, kind="export", filter=everybody, request_key="1")
    grant = bulk.start_bulk_job(
        admin=susan, kind="grant", filter=everybody, tokens=5, reason="For the test", request_key="2"
    )
    for job in (export, grant):
        while bulk.run_bulk_job(job_id=job.pk):
            pass
    assert export.rows.count() == 2
    audited = AuditEntry.objects.count()
    retention.apply_retention()
    assert BulkJob.objects.count() == 2, "Of today: they stay."

    BulkJob.objects.update(finished_at=YEARS_AGO)
    retention.apply_retention()

    assert list(BulkJob.objects.all()) == [grant]
    assert grant.rows.count() == 2
    assert AuditEntry.objects.count() == audited


def test_ended_sessions_go_with_their_addresses(client: Client, alice: User, bob: User) -> None:
    client.force_login(alice)
    live = client.session.session_key
    Session.objects.create(session_key="ended", session_data="", expire_date=YEARS_AGO)
    for key, user in ((live, alice), ("ended", bob)):
        UserSession.objects.update_or_create(
            session_key=key, defaults={"user": user, "ip": "192.0.2.1", "last_seen_at": YEARS_AGO}
        )

    retention.apply_retention()

    assert list(Session.objects.values_list("session_key", flat=True)) == [live]
    assert list(UserSession.objects.values_list("session_key", flat=True)) == [live]
    assert client.get("/tokens/").status_code == 200


def test_zero_days_keep_it_for_ever(settings: Settings, alice: User) -> None:
    settings.RETENTION_NOTIFICATION_DAYS = 0
    Notification.objects.create(user=alice, kind="grant_received", key="1", title="Tokens", read_at=YEARS_AGO)
    assert "notifications that were read (RETENTION_NOTIFICATION_DAYS): kept for ever" in dry_run()
    retention.apply_retention()
    assert Notification.objects.count() == 1
