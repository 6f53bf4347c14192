"""Tokens that are given with an end: by grants and by the welcome bonus."""

from datetime import timedelta

import pytest
from django.core.exceptions import ValidationError
from django.core.management import call_command
from django.test import Client
from django.utils import timezone

from accounts.models import User
from billing.catalogue import system_settings
from billing.models import GrantRequest, SettingChange, TokenAccount, TokenLot
from billing.staff import grants
from kit.periods import midnight
from tests.conftest import MakeUser

pytestmark = pytest.mark.django_db


def test_a_grant_ends_on_the_day_that_was_asked_for_also_when_it_is_approved_later(
    susan: User, adam: User, alice: User, client: Client
) -> None:
    account = TokenAccount.objects.get(user=alice)
    today = timezone.localdate()
    last_day = today + timedelta(days=20)
    form = {"account_id": account.pk, "kind": "grant", "tokens": "500", "reason": "A prize", "request_key": "a" * 32}
    client.force_login(adam)
    for wrong in ({"last_day": today - timedelta(days=1)}, {"last_day": "9999-12-31"}, {"kind": "deduction"}):
        answer = client.post("/admin/tokens/grants/new/", form | {"last_day": last_day, "confirmed": "yes"} | wrong)
        assert answer.status_code == 400, wrong
    page = client.post("/admin/tokens/grants/new/", form | {"last_day": last_day}).content.decode()
    assert f'name="last_day" value="{last_day.isoformat()}"' in page
    assert (
        client.post("/admin/tokens/grants/new/", form | {"last_day": last_day, "confirmed": "yes"}).status_code == 302
    )
    asked = GrantRequest.objects.get()
    assert asked.is_open
    assert asked.tokens_end_at == midnight(last_day + timedelta(days=1))
    with pytest.raises(grants.GrantKeyConflict):  # another end is another grant
        grants.grant_tokens(admin=adam, user_id=alice.pk, tokens=500, reason="A prize", request_key="a" * 32)

    grants.approve_request(superadmin=susan, request_id=asked.pk)
    grants.approve_request(superadmin=susan, request_id=asked.pk)
    lot = TokenLot.objects.get()
    assert (lot.tokens, lot.kind, lot.expires_at) == (500, "grant", asked.tokens_end_at)
    account.refresh_from_db()
    assert (account.balance, account.plain_tokens) == (10_500, 10_000)

    late = grants.grant_tokens(
        admin=adam, user_id=alice.pk, tokens=5, reason="Late", request_key="late",
        expires_at=timezone.now() + timedelta(days=1),
    )  # fmt: skip
    GrantRequest.objects.filter(pk=late.pk).update(tokens_end_at=timezone.now() - timedelta(days=1))
    with pytest.raises(grants.GrantNotPossible, match="ended already"):
        grants.approve_request(superadmin=susan, request_id=late.pk)
    assert TokenLot.objects.count() == 1
    call_command("verify_ledger")


def test_the_welcome_bonus_ends_as_the_setting_says(susan: User, make_user: MakeUser) -> None:
    for wrong in (0, -1, 3_651):
        with pytest.raises(ValidationError):
            system_settings.update_system_settings(changes={"welcome_bonus_days": wrong}, changed_by_id=susan.pk)
    system_settings.update_system_settings(changes={"welcome_bonus_days": 90}, changed_by_id=susan.pk)
    change = SettingChange.objects.get()
    assert (change.field, change.old_value, change.new_value) == ("welcome_bonus_days", "", "90")

    newcomer = make_user("newcomer")
    account = TokenAccount.objects.get(user=newcomer)
    [lot] = account.live_lots
    assert (lot.kind, lot.remaining_tokens, account.plain_tokens) == ("bonus", 10_000, 0)
    assert lot.expires_at - TokenLot.objects.get().created_at <= timedelta(days=90)
    assert lot.expires_at > timezone.now() + timedelta(days=89)
    system_settings.update_system_settings(changes={"welcome_bonus_days": None}, changed_by_id=susan.pk)
    assert TokenAccount.objects.get(user=make_user("later")).lots is None
    call_command("verify_ledger")
