"""What things cost: the settings of the installation, with who changed them, and the packages on sale."""

from decimal import Decimal
from typing import Any

import pytest
from django.core.exceptions import ValidationError

from accounts.models import User
from billing.catalogue import packages, system_settings
from billing.models import SettingChange, SystemSettings, TokenPricing

pytestmark = pytest.mark.django_db


def test_the_defaults_are_the_products() -> None:
    settings = system_settings.get_system_settings()
    assert {name: getattr(settings, name) for name in system_settings.EDITABLE_FIELDS} == {
        "billing_enabled": True,
        "token_multiplier": Decimal("1.5"),
        "dalle3_cost_tokens": 6_000,
        "dalle2_cost_tokens": 3_000,
        "imagen_cost_tokens": 4_500,
        "tokens_per_usd": Decimal(10_000),
        "minimum_purchase_cents": 500,
        "welcome_bonus_tokens": 10_000,
        "welcome_bonus_days": None,
        "welcome_bonus_disposable": "wait",
        "low_balance_tokens": 1_000,
        "critical_balance_tokens": 100,
        "admin_grant_limit_tokens": 0,
        "grant_approval_tokens": None,
    }
    system_settings.initialize_default_settings()
    assert SystemSettings.objects.count() == 1


def test_a_change_is_kept_with_who_made_it_from_what_to_what(susan: User) -> None:
    system_settings.update_system_settings(
        changes={"token_multiplier": Decimal("2"), "low_balance_tokens": 1_000}, changed_by_id=susan.pk
    )
    assert system_settings.get_system_settings().token_multiplier == 2
    change = SettingChange.objects.get()  # what stayed the same is no change
    assert (change.field, Decimal(change.old_value), Decimal(change.new_value), change.changed_by) == (
        "token_multiplier",
        Decimal("1.5"),
        Decimal(2),
        susan,
    )
    assert change.changed_at is not None


@pytest.mark.parametrize(
    "changes",
    [
        {"token_multiplier": Decimal(0)},
        {"token_multiplier": Decimal("-1")},
        {"token_multiplier": "much"},
        {"welcome_bonus_tokens": -1},
        {"minimum_purchase_cents": 0},
        {"critical_balance_tokens": 2_000},  # above low
        {"key": "other"},
        {"no_such_setting": 1},
    ],
)
def test_a_wrong_setting_changes_nothing(susan: User, changes: dict[str, Any]) -> None:
    before = system_settings.get_system_settings()
    with pytest.raises(ValidationError):
        system_settings.update_system_settings(changes={"imagen_cost_tokens": 1, **changes}, changed_by_id=susan.pk)
    after = system_settings.get_system_settings()
    assert [getattr(after, name) for name in system_settings.EDITABLE_FIELDS] == [
        getattr(before, name) for name in system_settings.EDITABLE_FIELDS
    ]
    assert not SettingChange.objects.exists()


def test_the_four_default_packages_are_seeded_once() -> None:
    assert packages.seed_default_packages() == 4
    assert packages.seed_default_packages() == 0
    assert [
        (package.name, package.tokens, package.price_usd_cents, package.is_popular)
        for package in packages.list_active_packages()
    ] == [
        ("Starter", 150_000, 1_500, False),
        ("Pro", 750_000, 6_500, True),
        ("Business", 2_250_000, 17_500, False),
        ("Enterprise", 7_500_000, 50_000, False),
    ]


def test_an_offer_shows_its_price_per_token_and_what_it_saves(seeded: None) -> None:
    assert [(offer.price_display, offer.per_1k_display, offer.savings_percent) for offer in packages.list_offers()] == [
        ("$15.00", "$0.100", 0),
        ("$65.00", "$0.087", 13),
        ("$175.00", "$0.078", 22),
        ("$500.00", "$0.067", 33),
    ]


def test_a_package_is_offered_only_in_the_currencies_it_has_a_price_in(seeded: None) -> None:
    assert packages.list_offers("eur") == []
    pro = TokenPricing.objects.get(name="Pro")
    packages.update_package(pro.pk, price_eur_cents=6_000)
    (offer,) = packages.list_offers("eur")
    assert (offer.package, offer.price_display, offer.savings_percent) == (pro, "€60.00", 0)


def test_a_package_taken_off_sale_is_still_found_by_its_id(seeded: None) -> None:
    pro = TokenPricing.objects.get(name="Pro")
    packages.update_package(pro.pk, is_active=False)
    assert pro not in packages.list_active_packages()
    assert packages.get_package_by_id(pro.pk) == pro
    assert packages.get_package_by_id(0) is None


@pytest.mark.parametrize(
    "wrong",
    [
        {"tokens": 0},
        {"tokens": -1},
        {"tokens": "many"},
        {"price_usd_cents": 0},
        {"price_eur_cents": -5},
        {"name": ""},
    ],
)
def test_a_package_sells_something_for_something(wrong: dict[str, Any]) -> None:
    fields: dict[str, Any] = {"name": "Small", "tokens": 1_000, "price_usd_cents": 500}
    with pytest.raises(ValidationError):
        packages.create_package(**{**fields, **wrong})
    package = packages.create_package(**fields)
    with pytest.raises(ValidationError):
        packages.update_package(package.pk, **wrong)
    assert TokenPricing.objects.values("name", "tokens", "price_usd_cents").get() == fields
