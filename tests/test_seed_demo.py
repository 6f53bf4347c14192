"""`manage.py seed_demo --past`: a year to look at, in which every law holds, and which Stripe's stand-in knows."""

from datetime import timedelta
from io import StringIO
from pathlib import Path

import pytest
import time_machine
from django.core.management import CommandError, call_command
from django.db import transaction
from django.test import Client, override_settings
from django.utils import timezone
from pytest_django.fixtures import Settings

from accounts.models import User
from ai_ops.models import Chat, ChatTurn, ContentPiece, ContentVersion, GeneratedImage
from billing.demo import DEMO_PASSWORD, DEMO_PEOPLE
from billing.figures import roll_ups
from billing.models import Drift, GrantRequest, Notification, Purchase, TokenTransaction, TokenUsage, UsageHour
from billing.payments import gateway, reconcile
from postmate.local import demo
from tests import servers
from tests.environment import free_port
from tests.payments import verify_books
from tests.production.conftest import wait_until


@pytest.fixture(autouse=True)
def development(settings: Settings) -> None:
    settings.DEBUG = True


def rows() -> list[tuple[object, ...]]:
    """What is to be the same again."""
    entries = TokenTransaction.objects.order_by("user__email", "sequence")
    return [
        *entries.values_list("user__email", "sequence", "type", "amount", "description", "created_at"),
        *ContentVersion.objects.order_by("created_at", "pk").values_list("piece__title", "number", "created_at"),
    ]


@pytest.mark.django_db(transaction=True)
def test_a_year_in_order(tmp_path: Path, settings: Settings) -> None:
    """The books hold, every part of the Studio has its operation, charts have their roll-ups, nothing waits to be sent,
    and a comparison with Stripe finds no difference, neither in payments nor in what was given back."""
    settings.MEDIA_ROOT = str(tmp_path / "media")
    data = tmp_path / "stripe.sqlite3"
    demo.make_past(stripe_data=data)
    verify_books()
    assert set(User.objects.exclude(email__endswith="@example.com").values_list("email", flat=True)) == set(DEMO_PEOPLE)
    used = {*ContentVersion.objects.exclude(origin="edit").values_list("usage_id", flat=True)}
    used |= {*ChatTurn.objects.values_list("usage_id", flat=True)}
    mine = TokenUsage.objects.filter(user__email="user@postmate.example")
    assert None not in used
    assert mine.filter(pk__in=[each for each in used if each], status="succeeded").count() == len(used) > 15
    assert not mine.filter(project_id=None).exists()
    oldest, newest = mine.earliest("completed_at"), mine.latest("completed_at")
    assert oldest.completed_at
    assert newest.completed_at
    assert oldest.completed_at < timezone.now() - timedelta(days=300)
    assert newest.completed_at < timezone.now()
    assert ContentPiece.objects.count() == 8
    assert Chat.objects.count() == 3
    assert GeneratedImage.objects.count() == 5
    assert set(Purchase.objects.filter(state="paid").values_list("currency", flat=True)) == {"usd", "eur", "gbp"}
    assert GrantRequest.objects.filter(state="requested").count() == 2
    # Hours are sealed when no transaction of the server is older: tests beside this one have theirs.
    wait_until(lambda: UsageHour.objects.exists() or roll_ups.roll_up(), "the roll-ups reach so far")
    assert UsageHour.objects.exists()
    assert Notification.objects.exists()
    assert not Notification.objects.exclude(email_next_at=None).exists()

    client = Client()
    assert client.login(username="user@postmate.example", password=DEMO_PASSWORD)
    picture = GeneratedImage.objects.earliest("pk")
    assert b"".join(client.get(picture.get_absolute_url())).startswith(b"\x89PNG")

    with servers.running_stripe(port=free_port(), data=str(data)) as stripe:
        settings.STRIPE_API_BASE = stripe.url
        gateway._client.cache_clear()
        try:
            report = reconcile.reconcile(since=timezone.now() - timedelta(days=400))
        finally:
            gateway._client.cache_clear()
    assert report.payments == Purchase.objects.filter(state="paid").count() > 5
    assert report.refunds + report.disputes > 0
    assert not Drift.objects.exists()


@pytest.mark.django_db
@pytest.mark.parametrize("moment", ["2028-02-29T23:50:00Z", "2027-03-28T01:10:00Z"])
def test_the_same_on_any_day(moment: str, tmp_path: Path, settings: Settings) -> None:
    """A leap day, and the night in which the clocks change: the books hold, and the same moment makes the same year.
    Without a stand-in no payment of it can be looked for at Stripe."""
    settings.MEDIA_ROOT = str(tmp_path)
    made = []
    for _ in range(2):
        with time_machine.travel(moment, tick=False), transaction.atomic():
            demo.make_past(people=40, entries=900)
            made.append(rows())
            verify_books()
            assert not Purchase.objects.exclude(stripe_payment_intent_id=None).exists()
            transaction.set_rollback(True)
    assert made[0] == made[1]
    assert len(made[0]) > 900


@pytest.mark.django_db
def test_only_for_an_empty_database_in_development() -> None:
    with pytest.raises(CommandError, match="development only"), override_settings(DEBUG=False):
        call_command("seed_demo", past=True)
    User.objects.create_user("alice@example.com", "a password of her own")
    with override_settings(DEBUG=True):
        call_command("seed_demo", past=True, stdout=StringIO())
    assert User.objects.count() == 1 + len(DEMO_PEOPLE)
    assert TokenTransaction.objects.count() == len(DEMO_PEOPLE)
