"""What other settings would have meant: counted over real operations, and nothing is written."""

from datetime import timedelta
from decimal import Decimal
from typing import Any

import pytest
from django.core.exceptions import ValidationError
from django.utils import timezone

from accounts.models import User
from billing import ledger
from billing.catalogue import system_settings
from billing.figures import settings_preview
from billing.figures.settings_preview import SettingsPreview, preview_settings
from billing.ledger import Operation
from billing.models import ModelPrice, SettingChange, TokenAccount, TokenUsage
from billing.pricing import TokenPools

pytestmark = pytest.mark.django_db


def text(user: User, tokens: int, *, model: str = "gpt-6-luna", held: int = 5_000, cost: int = 0) -> None:
    """A text of so many actual tokens, at 1.5."""
    operation = Operation("chat", "openai", model, multiplier=Decimal("1.5"))
    key = f"key-{TokenUsage.objects.count()}"
    posting = ledger.reserve_tokens(
        user_id=user.pk, tokens=held, operation=operation, idempotency_key=key, lifetime_seconds=60
    )
    assert posting.usage_id
    ledger.settle_usage(usage_id=posting.usage_id, pools=TokenPools(output_tokens=tokens), provider_cost_microusd=cost)


def image(user: User, model: str, cost_tokens: int, provider: str = "openai") -> None:
    operation = Operation(
        "image", provider, model, fixed_cost_tokens=cost_tokens, image_count=1, image_size="1024x1024"
    )
    ledger.deduct_tokens(user_id=user.pk, tokens=cost_tokens, operation=operation, may_leave_debt=True)


def preview(**changes: Any) -> SettingsPreview:
    return preview_settings(changes)


def test_another_multiplier(alice: User, bob: User) -> None:
    for tokens in (101, 101, 1_000):  # 152 + 152 + 1,500 at 1.5; rounded up for each
        text(alice, tokens, cost=1_000)
    text(bob, 3_000, held=10_000)  # 4,500
    outcome = preview(token_multiplier=Decimal("1.7"))
    assert (outcome.days, outcome.operations) == (30, 4)
    assert outcome.now.billed_tokens == 152 + 152 + 1_500 + 4_500
    assert outcome.then.billed_tokens == 172 + 172 + 1_700 + 5_100
    # At 10,000 tokens a dollar, 100 micro-dollars a token.
    assert outcome.now.value_microusd == 630_400
    assert (outcome.then.provider_cost_microusd, outcome.then.margin_microusd) == (3_000, 714_400 - 3_000)
    assert outcome.then.margin_percent == Decimal("99.6")
    assert outcome.users_run_out == 0
    assert preview(token_multiplier=Decimal("3.5")).users_run_out == 1  # Bob: 5,500 left, 6,000 more
    assert preview(token_multiplier=Decimal("1.5")).then == preview().now
    assert not SettingChange.objects.exists()
    assert system_settings.get_system_settings().token_multiplier == Decimal("1.5")


def test_what_has_a_price_of_its_own_stays(alice: User) -> None:
    ModelPrice.objects.filter(model="gpt-6-luna").update(multiplier=Decimal("1.5"))
    text(alice, 100)
    image(alice, "gpt-image-2", 6_000)  # by the model's own list
    outcome = preview(token_multiplier=Decimal(9), dalle3_cost_tokens=1)
    assert outcome.then.billed_tokens == outcome.now.billed_tokens == 6_150


def test_images_by_family(alice: User) -> None:
    ModelPrice.objects.filter(kind="image").update(image_cost_tokens={})
    image(alice, "dall-e-2", 3_000)
    image(alice, "dall-e-3", 6_000)
    image(alice, "imagen-4.0-generate-001", 4_500, provider="google")
    for changes, billed in (
        ({"dalle2_cost_tokens": 1_000}, 11_500),
        ({"dalle3_cost_tokens": 7_000}, 14_500),
        ({"imagen_cost_tokens": 0}, 9_000),
        ({}, 13_500),
    ):
        assert preview(**changes).then.billed_tokens == billed, changes


def test_what_was_beyond_a_quote_stays_unbilled(alice: User) -> None:
    """Law 5: the quote would have grown with the multiplier."""
    text(alice, 1_000, held=150)  # 1,350 of it unbilled
    outcome = preview(token_multiplier=Decimal(3))
    assert (outcome.now.billed_tokens, outcome.then.billed_tokens) == (150, 300)


def test_billing_switched_off_and_on(alice: User, susan: User) -> None:
    text(alice, 100)
    assert preview(billing_enabled=False).then.billed_tokens == 0
    system_settings.update_system_settings(changes={"billing_enabled": False}, changed_by_id=susan.pk)
    free = Operation("chat", "openai", "gpt-6-luna", multiplier=Decimal("1.5"), is_free=True)
    posting = ledger.reserve_tokens(
        user_id=alice.pk, tokens=5, operation=free, idempotency_key="free", lifetime_seconds=60
    )
    assert posting.usage_id
    ledger.settle_usage(usage_id=posting.usage_id, pools=TokenPools(output_tokens=1_000))
    outcome = preview(billing_enabled=True)
    assert (outcome.now.billed_tokens, outcome.then.billed_tokens) == (150, 1_650)


def test_bonus_and_marks(alice: User, bob: User) -> None:
    TokenAccount.objects.filter(user=bob).update(balance=500)
    outcome = preview(welcome_bonus_tokens=2_000, low_balance_tokens=10_000, critical_balance_tokens=501)
    assert (outcome.now.bonus_tokens, outcome.then.bonus_tokens) == (20_000, 4_000)
    assert (outcome.now.low_accounts, outcome.now.critical_accounts) == (1, 0)
    assert (outcome.then.low_accounts, outcome.then.critical_accounts) == (2, 1)


def test_only_the_last_days_count(alice: User, monkeypatch: pytest.MonkeyPatch) -> None:
    text(alice, 100)
    TokenUsage.objects.update(created_at=timezone.now() - timedelta(days=31))
    assert preview().operations == 0
    assert preview().now.margin_percent is None
    for days in (5, 3, 1):
        text(alice, 100)
        TokenUsage.objects.filter(pk=TokenUsage.objects.latest("pk").pk).update(
            created_at=timezone.now() - timedelta(days=days, hours=-1)
        )
    monkeypatch.setattr(
        settings_preview, "MAX_OPERATIONS", 2
    )  # a busy installation: it goes back less far, and says so
    outcome = preview()
    assert (outcome.operations, outcome.days) == (2, 5)


@pytest.mark.parametrize(
    "changes",
    [
        {"token_multiplier": Decimal(0)},
        {"token_multiplier": Decimal("NaN")},
        {"token_multiplier": Decimal("1.23456")},
        {"tokens_per_usd": Decimal(0)},
        {"minimum_purchase_cents": 0},
        {"welcome_bonus_tokens": -1},
        {"welcome_bonus_tokens": 2**63},
        {"critical_balance_tokens": 5_000},
        {"admin_grant_limit_tokens": -1},
        {"grant_approval_tokens": -1},
        {"no_such_setting": 1},
    ],
)
def test_wrong_settings_have_no_preview(seeded: None, changes: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        preview_settings(changes)
