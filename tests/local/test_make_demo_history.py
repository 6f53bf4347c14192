"""`manage.py make_demo_history`: an invented past in which every law of the books holds."""

from datetime import timedelta
from io import StringIO
from typing import Any

import pytest
import time_machine
from django.core.management import CommandError, call_command
from django.db.models import Count
from django.test import override_settings
from django.utils import timezone

from accounts.models import User
from billing import ledger
from billing.models import PaymentReversal, Purchase, TokenAccount, TokenTransaction, TokenUsage
from postmate.local import invented_past
from tests.conftest import MakeUser
from tests.payments import verify_books

pytestmark = pytest.mark.django_db


def make(**options: int | bool) -> str:
    told = StringIO()
    with override_settings(DEBUG=True):
        call_command("make_demo_history", stdout=told, stderr=StringIO(), **options)
    return told.getvalue()


def test_the_books_are_in_order(seeded: None) -> None:
    """Two thousand entries over three months, of all kinds, and everybody at example.com."""
    told = make(transactions=2_000, users=80, months=3, seed=5)
    verify_books()
    assert "80 people" in told or "81 people" in told
    assert abs(TokenTransaction.objects.count() - 2_000) < 40
    assert TokenAccount.objects.count() == 80
    assert not User.objects.exclude(email__endswith="@example.com").exists()
    types = dict(TokenTransaction.objects.values_list("type").annotate(Count("pk")).order_by())
    assert {"usage", "purchase", "auto_recharge", "bonus"} <= set(types)
    states = set(TokenUsage.objects.values_list("status", flat=True))
    assert {"succeeded", "failed"} <= states <= {"succeeded", "failed", "expired"}
    currencies = set(Purchase.objects.filter(state="paid").values_list("currency", flat=True))
    assert {"usd"} < currencies <= {"usd", "eur", "gbp"}
    oldest = TokenUsage.objects.order_by("created_at").first()
    assert oldest is not None
    assert timezone.now() - timedelta(days=93) < oldest.created_at < timezone.now() - timedelta(days=60)
    assert not TokenTransaction.objects.filter(created_at__gt=timezone.now()).exists()


@time_machine.travel("2026-11-15T12:00:00Z", tick=False)  # the seed and the day make the history
def test_money_that_went_back_is_in_order_too(seeded: None) -> None:
    """Enough purchases that some are refunded or disputed."""
    make(transactions=6_000, users=150, months=6, seed=2)
    assert PaymentReversal.objects.exists()
    assert Purchase.objects.filter(state="failed").exists()
    assert TokenTransaction.objects.filter(type="refund").exists()
    verify_books()


def test_what_happens_afterwards_goes_on(seeded: None) -> None:
    """Ids, sequences and balances lie where the product's own writing takes them up."""
    make(transactions=300, users=10, months=1)
    account = TokenAccount.objects.filter(status="active").first()
    assert account is not None
    ledger.add_tokens(user_id=account.user_id, tokens=5, type="bonus", description="Test", idempotency_key="test")
    new = User.objects.create(email="new@example.com")
    assert ledger.initialize_account(user_id=new.pk).balance == 10_000
    again = User.objects.create(email=account.holder.replace("@", "+again@"))
    assert ledger.initialize_account(user_id=again.pk).balance == 0  # the mailbox had its bonus in that past
    verify_books()


def test_a_past_that_breaks_a_law_is_not_kept(seeded: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody is there afterwards, and what breaks is named."""
    original = invented_past.History._post

    def post(*args: Any, **options: Any) -> int:
        args[1].balance += args[2] == "usage"  # a token from nowhere before each operation
        return original(*args, **options)

    monkeypatch.setattr(invented_past.History, "_post", post)
    with pytest.raises(invented_past.LawBroken, match="balance"):
        make(transactions=100, users=5)
    assert not User.objects.exists()
    assert not TokenTransaction.objects.exists()


def test_not_in_production_and_not_on_a_real_past(make_user: MakeUser) -> None:
    with pytest.raises(CommandError, match="development only"), override_settings(DEBUG=False):
        call_command("make_demo_history", transactions=100, force=True)
    make_user("alice")
    with pytest.raises(CommandError, match="past of its own"):
        make(transactions=100, users=5)
    make(transactions=100, users=5, force=True)
    verify_books()
