"""The AI models on offer: what an image costs by size and quality, what a model costs us, and who changed a price."""

from datetime import UTC, date, datetime
from decimal import Decimal
from importlib import import_module
from typing import Any

import pytest
import time_machine
from django.apps import apps
from django.core.exceptions import ValidationError
from django.db import DatabaseError, connection, transaction
from django.test import Client
from django.urls import reverse

from accounts.models import User
from billing import catalogue, ledger, usage
from billing.catalogue import ImageOption, system_settings
from billing.models import ModelPrice, ModelPriceChange, SystemSettings, TokenUsage
from billing.pricing import TokenPools

pytestmark = [pytest.mark.django_db, pytest.mark.usefixtures("seeded")]


@pytest.fixture
def settings() -> SystemSettings:
    return system_settings.get_system_settings()


def model(name: str) -> ModelPrice:
    return ModelPrice.objects.get(model=name)


# --- What an image costs the user -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "size", "quality", "cost_tokens"),
    [
        ("gpt-image-2", "1024x1024", "low", 1_500),
        ("gpt-image-2", "1024x1024", "high", 20_000),
        ("gpt-image-2", "1024x1536", "high", 16_000),
        ("gpt-image-2", "1024x1024", "", 6_000),
        ("gpt-image-2", "1024x1024", "a quality nobody knows", 6_000),
        ("gpt-image-2", "a size nobody knows", "high", 6_000),
        ("gemini-3.1-flash-image", "1536x1024", "", 4_500),
        ("gemini-3-pro-image", "1024x1024", "", 9_000),
        # Without costs of their own: the settings'.
        ("dall-e-3", "1024x1024", "hd", 6_000),
        ("dall-e-2", "256x256", "", 3_000),
        ("imagen-4.0-generate-001", "1024x1024", "", 4_500),
    ],
)
def test_an_image_costs_what_its_size_and_quality_cost(
    settings: SystemSettings, name: str, size: str, quality: str, cost_tokens: int
) -> None:
    assert catalogue.image_cost_tokens(model(name), settings, size=size, quality=quality) == cost_tokens


def test_the_settings_cost_counts_for_a_model_without_one(settings: SystemSettings, susan: User) -> None:
    changed = system_settings.update_system_settings(changes={"imagen_cost_tokens": 5_000}, changed_by_id=susan.pk)
    assert catalogue.image_cost_tokens(model("imagen-4.0-generate-001"), changed, size="1024x1024") == 5_000
    assert catalogue.image_cost_tokens(model("gemini-3.1-flash-image"), changed, size="1024x1024") == 4_500


def test_the_options_of_a_model_are_its_sizes_and_qualities(settings: SystemSettings) -> None:
    assert catalogue.image_options(model("gpt-image-2"), settings) == [
        ImageOption("1024x1024", "low", 1_500),
        ImageOption("1024x1024", "medium", 6_000),
        ImageOption("1024x1024", "high", 20_000),
        ImageOption("1536x1024", "low", 1_500),
        ImageOption("1536x1024", "medium", 5_000),
        ImageOption("1536x1024", "high", 16_000),
        ImageOption("1024x1536", "low", 1_500),
        ImageOption("1024x1536", "medium", 5_000),
        ImageOption("1024x1536", "high", 16_000),
    ]
    assert catalogue.image_options(model("gemini-3.1-flash-image"), settings) == [
        ImageOption("1024x1024", "", 4_500),
        ImageOption("1536x1024", "", 4_500),
        ImageOption("1024x1536", "", 4_500),
    ]


def test_a_model_without_costs_of_its_own_offers_every_size_at_the_settings_cost(settings: SystemSettings) -> None:
    assert catalogue.image_options(model("dall-e-3"), settings) == [
        ImageOption(size, "", 6_000) for size in catalogue.IMAGE_SIZES
    ]


def test_every_option_of_every_seeded_model_sells_above_what_it_costs_us(settings: SystemSettings) -> None:
    """At the dearest discount: Enterprise sells 15,000 tokens for a dollar."""
    for price in catalogue.list_active_models("image"):
        for option in catalogue.image_options(price, settings):
            cost_microusd = catalogue.provider_cost_microusd(
                price, TokenPools(), image_count=1, image_size=option.size, image_quality=option.quality
            )
            assert 0 < cost_microusd < option.cost_tokens * 1_000_000 / 15_000


# --- What it costs us -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "size", "quality", "count", "cost_microusd"),
    [
        ("gpt-image-2", "1024x1024", "low", 1, 6_000),
        ("gpt-image-2", "1536x1024", "high", 3, 495_000),
        ("gpt-image-2", "1024x1024", "", 2, 106_000),
        ("gpt-image-2", "a size nobody knows", "low", 1, 53_000),
        ("gemini-3.1-flash-lite-image", "1024x1024", "", 1, 33_600),
        ("dall-e-3", "1024x1024", "", 2, 80_000),
    ],
)
def test_an_image_without_reported_usage_costs_us_its_price(
    name: str, size: str, quality: str, count: int, cost_microusd: int
) -> None:
    price = model(name)
    cost = catalogue.provider_cost_microusd(
        price, TokenPools(), image_count=count, image_size=size, image_quality=quality
    )
    assert cost == cost_microusd


def test_an_image_with_reported_usage_costs_us_its_tokens_and_not_its_price_too() -> None:
    pools = TokenPools(input_tokens=20, output_tokens=1_756)
    assert catalogue.provider_cost_microusd(model("gpt-image-2"), pools, image_count=1) == 20 * 5 + 1_756 * 30
    # A model that is sold by the image alone, whatever it reports.
    assert catalogue.provider_cost_microusd(model("dall-e-3"), pools, image_count=1) == 40_000


def test_an_image_models_thoughts_are_text_and_cost_what_text_costs() -> None:
    pools = TokenPools(input_tokens=100, output_tokens=1_120 + 300, reasoning_tokens=300)
    cost = catalogue.provider_cost_microusd(model("gemini-3.1-flash-image"), pools, image_count=1)
    assert cost == 100 // 2 + 1_120 * 60 + 300 * 3


def test_words_of_an_image_model_cost_what_words_cost() -> None:
    """Pictures, words and thoughts: each modality its price, where the model has one for it."""
    counted = TokenPools(
        input_tokens=326, output_tokens=2_340 + 337, reasoning_tokens=337, text_output_tokens=2_340 - 2_000
    )
    assert catalogue.provider_cost_microusd(model("gemini-3-pro-image"), counted, image_count=1) == 248_776
    words = TokenPools(input_tokens=10, output_tokens=1_120 + 346, text_output_tokens=346)
    assert catalogue.provider_cost_microusd(model("gemini-3.1-flash-image"), words, image_count=1) == 5 + 67_200 + 1_038
    # OpenAI's list has one price for all output of its image models.
    assert catalogue.provider_cost_microusd(model("gpt-image-2"), words, image_count=1) == 50 + 1_466 * 30


def test_a_text_models_reasoning_costs_what_output_costs() -> None:
    pools = TokenPools(output_tokens=1_000, reasoning_tokens=900)
    assert catalogue.provider_cost_microusd(model("gpt-6.1-sol"), pools) == 10_000


READ = {"input_tokens": 300_000, "output_tokens": 10_000}


@pytest.mark.parametrize(
    ("name", "special", "pools", "cost_microusd"),
    [
        # The whole call costs what its length costs, and the cache counts for the length.
        ("gemini-2.5-pro", None, READ, 900_000),
        ("gemini-2.5-pro", None, READ | {"input_tokens": 200_000}, 250_000 + 100_000),
        ("gemini-2.5-pro", None, READ | {"input_tokens": 200_001}, 500_003 + 150_000),
        ("gemini-2.5-pro", None, {"input_tokens": 150_000, "cached_input_tokens": 50_001}, 375_000 + 12_501),
        ("claude-haiku-5-5", None, READ, 150_000 + 25_000),
        ("claude-haiku-5-5", None, {"cache_write_tokens": 101_000, "cache_write_1h_tokens": 1_000}, 62_500 + 1_000),
        ("gpt-6.1-sol", None, READ, 1_200_000 + 150_000),
        ("gpt-6.1-sol", None, {"input_tokens": 272_000, "output_tokens": 10_000}, 544_000 + 100_000),
        # Several lengths, and what has a price for one of them only.
        ("gpt-6.1-sol", {"input_above_128000": "3", "input_above_512000": "6", "output_above_128000": "12"},
         READ | {"input_tokens": 512_001}, 512_001 * 6 + 120_000),
        ("gpt-6.1-sol", {"input_above_512000": "6", "input_above_128000": "3"}, READ, 900_000 + 100_000),
        ("gpt-6.1-sol", {"audio_output": "40"}, {"output_tokens": 1_000, "audio_output_tokens": 100}, 9_000 + 4_000),
        # Missing is not free: the cache costs what input costs, by its length.
        ("gemini-3.8-flash", None, {"cache_write_tokens": 4_000}, 3_000),
        ("gemini-2.5-pro", None, {"cache_write_tokens": 300_000}, 750_000),
        # Each part its price.
        ("claude-sonnet-5-5", None, {"cache_write_tokens": 1_000, "cache_write_1h_tokens": 400}, 1_500 + 1_600),
        ("gemini-2.5-flash", None, {"input_tokens": 1_000, "audio_input_tokens": 400}, 180 + 400),
        ("gpt-image-2", None, {"input_tokens": 1_000, "image_input_tokens": 900, "output_tokens": 1_756},
         500 + 7_200 + 52_680),
    ],
)  # fmt: skip
def test_a_call_costs_what_its_length_and_its_parts_cost(
    name: str, special: dict[str, str] | None, pools: dict[str, int], cost_microusd: int
) -> None:
    """Row 116."""
    price = model(name)
    if special is not None:
        price.special_usd_per_million = special
    assert catalogue.provider_cost_microusd(price, TokenPools(**pools)) == cost_microusd


def test_each_call_of_an_operation_has_the_prices_of_its_own_length() -> None:
    """Row 116: two calls of 150,000 are none of 300,000, and each has the price of a call. Rounded once."""
    price = model("gemini-2.5-pro")
    price.request_usd = Decimal("0.01")
    call = TokenPools(input_tokens=150_001)
    assert catalogue.provider_cost_microusd(price, call, call) == 375_003 + 20_000  # 375,002.5
    assert catalogue.provider_cost_microusd(price, TokenPools()) == 0
    assert catalogue.provider_cost_microusd(price) == 0


def test_an_image_of_a_size_without_a_price_is_not_free() -> None:
    """Row 117."""
    price = model("gpt-image-2")
    price.image_usd, price.image_usd_by_size = Decimal(0), {"1024x1024": "0.02", "1536x1024": "0.03"}
    assert catalogue.provider_cost_microusd(price, TokenPools(), image_count=2, image_size="2048x2048") == 60_000
    # Tokens that are read have no price: the image's counts.
    price.input_usd_per_million = Decimal(0)
    pools = TokenPools(input_tokens=900, output_tokens=100)
    assert catalogue.provider_cost_microusd(price, pools, image_count=1, image_size="1024x1024") == 20_000


# --- No price is no price of zero -----------------------------------------------------------------------------------

FREE = {"input_usd_per_million": Decimal(0), "output_usd_per_million": Decimal(0)}


@pytest.mark.parametrize(
    "fields",
    [
        {"kind": "text", "input_usd_per_million": Decimal(2)},
        {"kind": "text", "output_usd_per_million": Decimal(2)},
        {"kind": "text", **FREE},
        {"kind": "text", "input_usd_per_million": Decimal(2), "output_usd_per_million": Decimal(-2)},
        {"kind": "text", "image_usd": Decimal(2)},
        {"kind": "image", "input_usd_per_million": Decimal(2), "output_usd_per_million": Decimal(2)},
        {"kind": "image", "image_usd": Decimal(1), "cached_input_usd_per_million": Decimal(0)},
    ],
)
def test_no_model_is_sold_without_a_price(fields: dict[str, Any]) -> None:
    """Row 117: by the catalogue and by the database. A superadmin may call a model free."""
    new = {"provider": "openai", "model": "music-1", "display_name": "Music", **fields}
    for is_active in (True, False):
        with pytest.raises(ValidationError):
            catalogue.create_model_price(fields=new | {"is_active": is_active}, changed_by_id=None, source="import")
    with pytest.raises(DatabaseError, match="model_price_"), transaction.atomic():
        ModelPrice.objects.create(**new)
    if all(value >= 0 for name, value in fields.items() if name != "kind"):
        free = catalogue.create_model_price(fields=new | {"is_free": True}, changed_by_id=None, source="admin")
        assert catalogue.get_active_model(provider="openai", model="music-1") == free


def test_a_model_that_lost_its_price_is_refused_also_for_work_that_was_done() -> None:
    """Row 117."""
    ModelPrice.objects.filter(model="gpt-6-luna").update(is_active=False, output_usd_per_million=0)
    for find in (catalogue.get_model, catalogue.get_active_model):
        with pytest.raises(catalogue.UnpricedModel, match="GPT-6 Luna has no price yet"):
            find(provider="openai", model="gpt-6-luna")


def test_upgrade_tells_missing_prices_from_prices_of_zero() -> None:
    """Row 117: the first edition kept a missing price as 0."""
    with connection.cursor() as cursor:
        cursor.execute("SET CONSTRAINTS ALL IMMEDIATE")
        cursor.execute("ALTER TABLE billing_modelprice DROP CONSTRAINT model_price_sold_at_a_price")
    rows = ModelPrice.objects
    rows.update(special_usd_per_million={})
    rows.filter(model="gpt-6-luna").update(cached_input_usd_per_million=0, cache_write_usd_per_million=0)
    rows.filter(model="gpt-6.1-sol").update(output_usd_per_million=0)
    rows.filter(model="gemini-2.5-pro").update(input_usd_per_million=Decimal(3))
    rows.filter(model="gpt-image-2").update(image_usd=0, image_usd_by_size={"1024x1024": "0", "1536x1024": "0.05"})
    import_module("billing.migrations.0016_prices_by_length_and_part").set_missing_prices(
        apps, connection.schema_editor()
    )
    luna, sol, edited, image = map(model, ("gpt-6-luna", "gpt-6.1-sol", "gemini-2.5-pro", "gpt-image-2"))
    assert (luna.cached_input_usd_per_million, luna.cache_write_usd_per_million, luna.is_active) == (None, None, True)
    assert luna.special_usd_per_million["output_above_272000"] == "0.75"
    assert luna.changes.get(field="cached_input_usd_per_million").source == "upgrade"
    assert (sol.is_active, edited.special_usd_per_million) == (False, {})
    assert (image.is_active, image.image_usd_by_size) == (True, {"1536x1024": "0.05"})


# --- Retirement -----------------------------------------------------------------------------------------------------


def test_a_model_is_refused_from_the_day_of_its_retirement_on() -> None:
    """Row 58, without anybody switching it off."""
    with time_machine.travel(datetime(2026, 11, 30, 23, 59, tzinfo=UTC), tick=False):
        assert catalogue.get_active_model(provider="google", model="gemini-2.5-flash").is_active
    with time_machine.travel(datetime(2026, 12, 1, tzinfo=UTC), tick=False):
        assert "gemini-2.5-flash" not in {price.model for price in catalogue.list_active_models("text")}
        with pytest.raises(
            catalogue.RetiredModel, match=r"retired on 1 December 2026\. Use gemini-3.5-flash-lite instead"
        ):
            catalogue.get_active_model(provider="google", model="gemini-2.5-flash")


def test_a_model_that_was_switched_off_was_not_retired() -> None:
    """Row 58."""
    ModelPrice.objects.filter(model="gpt-6-luna").update(is_active=False)
    with pytest.raises(catalogue.RetiredModel, match=r"GPT-6 Luna is not on offer any more\. Choose another one"):
        catalogue.get_active_model(provider="openai", model="gpt-6-luna")


def test_every_replacement_is_on_offer() -> None:
    with time_machine.travel(datetime(2026, 12, 2, tzinfo=UTC), tick=False):
        on_offer = {price.model for kind in ("text", "image") for price in catalogue.list_active_models(kind)}
    assert set(ModelPrice.objects.exclude(replacement="").values_list("replacement", flat=True)) <= on_offer


def test_a_model_is_no_default_in_its_last_month() -> None:
    """Row 79: nobody begins with what ends soon, and a replacement that is gone itself is never the advice."""
    terra = ModelPrice.objects.get(model="gpt-6.1-terra")
    assert catalogue.list_active_models("text")[0] == terra
    ends = date(2028, 3, 1)
    ModelPrice.objects.filter(pk=terra.pk).update(retired_on=ends, replacement="gpt-6-luna")
    ModelPrice.objects.filter(model="gpt-6-luna").update(retired_on=ends, replacement="claude-haiku-5-5")
    for day, first, last in (
        (date(2028, 1, 30), "gpt-6.1-terra", "gemini-3.5-flash-lite"),
        (date(2028, 2, 1), "gpt-6.1-sol", "gpt-6-luna"),
        (date(2028, 3, 1), "gpt-6.1-sol", "gemini-3.5-flash-lite"),
    ):
        with time_machine.travel(datetime(day.year, day.month, day.day, 12, tzinfo=UTC), tick=False):
            names = [price.model for price in catalogue.list_active_models("text")]
            assert (names[0], names[-1]) == (first, last), day
    with time_machine.travel(datetime(2028, 3, 1, 12, tzinfo=UTC), tick=False):
        with pytest.raises(catalogue.RetiredModel, match=r"Use claude-haiku-5-5 instead\."):
            catalogue.get_active_model(provider="openai", model="gpt-6.1-terra")
        ModelPrice.objects.filter(model="claude-haiku-5-5").update(is_active=False)
        with pytest.raises(catalogue.RetiredModel, match="Choose another one"):
            catalogue.get_active_model(provider="openai", model="gpt-6.1-terra")


# --- Other names ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("provider", "name", "found"),
    [
        ("openai", "gpt-6-luna", "gpt-6-luna"),
        ("openai", "gpt-6-luna-2026-09-01", "gpt-6-luna"),
        ("openai", "openai/gpt-6-luna", "gpt-6-luna"),
        ("openai", "openai/gpt-6.1-sol-2026-10-31", "gpt-6.1-sol"),
        ("openai", "gpt-6.1-terra-latest", "gpt-6.1-terra"),
        ("openai", "GPT-Image-2-2026-04-21", "gpt-image-2"),
        ("google", "models/gemini-3.8-flash", "gemini-3.8-flash"),
        ("google", "publishers/google/models/gemini-3.5-flash-lite-001", "gemini-3.5-flash-lite"),
        ("google", "gemini/gemini-3-pro-image", "gemini-3-pro-image"),
        ("google", "imagen-4.0-generate", "imagen-4.0-generate-001"),
        ("anthropic", "claude-haiku-5-5@20261001", "claude-haiku-5-5"),
        ("anthropic", "anthropic/claude-sonnet-5-5-20260930", "claude-sonnet-5-5"),
        ("anthropic", "claude-opus-5-5@latest", "claude-opus-5-5"),
        ("anthropic", "claude-opus-4@20250514", "claude-opus-4-20250514"),
        ("anthropic", "claude-sonnet-4-latest", "claude-sonnet-4-20250514"),
        ("openai", "luna", "gpt-6-luna"),
        ("openai", "openai/luna-2026-09-01", "gpt-6-luna"),
    ],
)
def test_a_models_other_names_mean_it(provider: str, name: str, found: str) -> None:
    """Row 119."""
    if "luna" in name:
        changes = {"other_names": ["luna"]}
        luna = model("gpt-6-luna")
        catalogue.update_model_price(price_id=luna.pk, changes=changes, changed_by_id=None, source="admin")
        assert history(luna) == [("other_names", "[]", '["luna"]', None, "admin")]
    assert catalogue.find_model(provider=provider, model=name).model == found


def test_what_was_recorded_by_another_name_is_repeated_without_it(alice: User) -> None:
    """Law 8: the key stands for what was asked for, not for what the catalogue calls it by now."""
    luna = model("gpt-6-luna")

    def change(names: list[str]) -> None:
        catalogue.update_model_price(
            price_id=luna.pk, changes={"other_names": names}, changed_by_id=None, source="admin"
        )

    def record(model: str, *, success: bool, key: str) -> ledger.Posting:
        return usage.record_usage(
            user_id=alice.pk, operation_type="chat", provider="openai", model=model, input_tokens=100,
            output_tokens=20, success=success, idempotency_key=key,
        )  # fmt: skip

    change(["our-luna"])
    first = {success: record("our-luna", success=success, key=f"key-{success}") for success in (True, False)}
    change([])
    for success, posting in first.items():
        again = record("our-luna", success=success, key=f"key-{success}")
        assert (again.usage_id, again.is_replay) == (posting.usage_id, True)
        with pytest.raises(ledger.IdempotencyConflict):
            record("gpt-6.1-sol", success=success, key=f"key-{success}")
    # One that was recorded before is compared field by field.
    TokenUsage.objects.update(request_fingerprint="")
    assert record("gpt-6-luna", success=True, key="key-True").is_replay


@pytest.mark.parametrize(
    ("provider", "name", "told"),
    [
        ("openai", "gpt-6-luna-mini", "There is no model"),
        ("openai", "gpt-6-luna-2026-13-01", "There is no model"),
        ("openai", "ft:gpt-6-luna", "There is no model"),
        ("openai", "azure/gpt-6-luna", "Send its provider, and its name without “azure/”"),
        ("openai", "anthropic/claude-haiku-5-5", "Send its provider"),
        ("anthropic", "claude-haiku-5-5/", "There is no model"),
        # Another day may have another price.
        ("anthropic", "claude-opus-4-20260101", "There is no model"),
        # Two days and none without.
        ("openai", "gpt-8", "could be any of gpt-8-2027-01-01, gpt-8-2027-06-01. Send one"),
        ("openai", "openai/gpt-8-latest", "could be any of gpt-8-2027-01-01, gpt-8-2027-06-01. Send one"),
        ("openai", "", "There is no model"),
    ],
)
def test_a_name_that_means_no_one_model_is_refused(provider: str, name: str, told: str) -> None:
    """Row 119."""
    for day in ("2027-01-01", "2027-06-01"):
        price = model("gpt-6-luna")
        price.pk, price.model = None, f"gpt-8-{day}"
        price.save()
    assert catalogue.find_model(provider="openai", model="openai/gpt-8-2027-06-01").model == "gpt-8-2027-06-01"
    with pytest.raises(catalogue.UnknownModel) as refusal:
        catalogue.get_active_model(provider=provider, model=name)
    assert told in refusal.value.message


@pytest.mark.parametrize(
    "names", [["gpt-6.1-sol"], ["Luna"], ["a b"], ["a", "a"], [1], [[1]], 5, "luna", {"luna": 1}, [""]]
)
def test_a_name_belongs_to_one_model(names: Any) -> None:
    """Row 119."""
    with pytest.raises(ValidationError):
        catalogue.update_model_price(
            price_id=model("gpt-6-luna").pk, changes={"other_names": names}, changed_by_id=None, source="admin"
        )


# --- History --------------------------------------------------------------------------------------------------------


def history(price: ModelPrice) -> list[tuple[Any, ...]]:
    return list(price.changes.order_by("field").values_list("field", "old_value", "new_value", "changed_by", "source"))


def test_a_change_is_kept_with_who_made_it_from_what_to_what(susan: User) -> None:
    luna = model("gpt-6-luna")
    catalogue.update_model_price(
        price_id=luna.pk,
        changes={
            "input_usd_per_million": Decimal("0.20"),
            "output_usd_per_million": Decimal("0.5"),  # what stayed the same is no change
            "multiplier": Decimal(2),
            "retired_on": date(2027, 1, 1),
            "is_active": False,
        },
        changed_by_id=susan.pk,
        source="admin",
    )
    luna.refresh_from_db()
    assert (luna.input_usd_per_million, luna.multiplier, luna.is_active) == (Decimal("0.2"), Decimal(2), False)
    assert history(luna) == [
        ("input_usd_per_million", "0.1", "0.2", susan.pk, "admin"),
        ("is_active", "True", "False", susan.pk, "admin"),
        ("multiplier", "", "2", susan.pk, "admin"),
        ("retired_on", "", "2027-01-01", susan.pk, "admin"),
    ]


def test_a_new_model_begins_its_history_with_its_first_prices() -> None:
    fields = {
        "provider": "openai",
        "model": "gpt-7",
        "display_name": "GPT-7",
        "kind": "text",
        "input_usd_per_million": Decimal(4),
        "output_usd_per_million": Decimal(20),
    }
    price = catalogue.create_model_price(fields=fields, changed_by_id=None, source="import")
    assert history(price) == [
        ("display_name", "", "GPT-7", None, "import"),
        ("input_usd_per_million", "", "4", None, "import"),
        ("kind", "", "text", None, "import"),
        ("model", "", "gpt-7", None, "import"),
        ("output_usd_per_million", "", "20", None, "import"),
        ("provider", "", "openai", None, "import"),
    ]
    with pytest.raises(ValidationError):
        catalogue.create_model_price(fields=fields, changed_by_id=None, source="import")


@pytest.mark.parametrize(
    "wrong",
    [
        {"output_usd_per_million": Decimal(-1)},
        {"output_usd_per_million": Decimal("NaN")},
        {"output_usd_per_million": Decimal("0.0000001")},
        {"output_usd_per_million": Decimal(0)},
        {"cached_input_usd_per_million": Decimal(0)},
        {"cache_write_usd_per_million": Decimal(0), "is_active": False},
        {"reasoning_usd_per_million": Decimal(0)},
        {"request_usd": Decimal(-1)},
        {"special_usd_per_million": {"audio_input": "0"}},
        {"special_usd_per_million": {"input_above_200000": 2.5}},
        {"special_usd_per_million": {"input_above_200k": "2.5"}},
        {"special_usd_per_million": {"input": "2.5"}},
        {"multiplier": Decimal(0)},
        {"max_output_tokens": 0},
        {"max_input_tokens": 0},
        {"thinking_tokens": -1},
        {"model": "gpt-7"},
        {"updated_at": None},
        {"no_such_field": 1},
    ],
)
def test_a_wrong_price_changes_nothing(wrong: dict[str, Any]) -> None:
    luna = model("gpt-6-luna")
    before = ModelPrice.objects.values().get(pk=luna.pk)
    with pytest.raises(ValidationError):
        catalogue.update_model_price(
            price_id=luna.pk,
            changes={"input_usd_per_million": Decimal(1), **wrong},
            changed_by_id=None,
            source="import",
        )
    assert ModelPrice.objects.values().get(pk=luna.pk) == before
    assert history(luna) == []


def test_the_history_is_append_only() -> None:
    luna = model("gpt-6-luna")
    catalogue.update_model_price(
        price_id=luna.pk, changes={"multiplier": Decimal(2)}, changed_by_id=None, source="import"
    )
    for attempt in (lambda: luna.changes.update(new_value="3"), lambda: luna.changes.all().delete()):
        with pytest.raises(DatabaseError, match="Cannot"), transaction.atomic():
            attempt()
    assert history(luna) == [("multiplier", "", "2", None, "import")]


# --- Django admin ---------------------------------------------------------------------------------------------------


def submit(client: Client, address: str, **changes: Any) -> Any:
    form = client.get(address).context["adminform"].form
    fields = {name: form[name].value() for name in form.fields}
    return client.post(
        address, {name: value for name, value in (fields | changes).items() if value is not None and value is not False}
    )


def test_a_superadmins_edit_is_kept_and_shown(client: Client, susan: User) -> None:
    client.force_login(susan)
    image = model("gpt-image-2")
    address = reverse("admin:billing_modelprice_change", args=[image.pk])
    sizes = '{"1024x1024/low": "0.0065", "1024x1536": "0.04"}'
    assert submit(client, address, image_usd="0.05", image_usd_by_size=sizes).status_code == 302
    image.refresh_from_db()
    assert (image.image_usd, image.image_usd_by_size["1024x1024/low"]) == (Decimal("0.05"), "0.0065")
    changes = dict(image.changes.filter(changed_by=susan, source="admin").values_list("field", "new_value"))
    assert changes == {"image_usd": "0.05", "image_usd_by_size": '{"1024x1024/low": "0.0065", "1024x1536": "0.04"}'}

    page = client.get(address).content.decode()
    assert "0.053 → 0.05" in page
    assert susan.email in page
    listed = client.get(reverse("admin:billing_modelprice_changelist"))
    dates = {price.model: price.repriced_at for price in listed.context["cl"].result_list}
    assert dates["gpt-image-2"] == image.changes.latest("id").changed_at
    assert dates["gpt-6-luna"] is None


def test_a_superadmin_adds_a_model(client: Client, susan: User) -> None:
    client.force_login(susan)
    address = reverse("admin:billing_modelprice_add")
    fields = {"provider": "openai", "model": "gpt-7", "display_name": "GPT-7", "kind": "text"}
    prices = {"input_usd_per_million": "4", "output_usd_per_million": "20"}
    assert submit(client, address, **fields, **prices).status_code == 302
    price = model("gpt-7")
    assert price.output_usd_per_million == 20
    first = ModelPriceChange.objects.get(price=price, field="output_usd_per_million")
    assert (first.old_value, first.new_value, first.changed_by) == ("", "20", susan)
    # What it is about stays: usage names it.
    assert submit(client, reverse("admin:billing_modelprice_change", args=[price.pk]), model="gpt-8").status_code == 302
    assert model("gpt-7") == price


@pytest.mark.parametrize(
    "prices",
    ["[1]", '{"1024x1024": 0.05}', '{"1024x1024": "-1"}', '{"1024x1024": "NaN"}', '{"1024x1024": "1e400"}',
     '{"1024x1024": "１"}', '{"big": "1"}', '{"1024x1024/": "1"}', '{"1024x1024": "0.0000001"}'],
)  # fmt: skip
def test_prices_by_size_are_exact_amounts(client: Client, susan: User, prices: str) -> None:
    """Row 56."""
    client.force_login(susan)
    image = model("gpt-image-2")
    before = ModelPrice.objects.values().get(pk=image.pk)
    address = reverse("admin:billing_modelprice_change", args=[image.pk])
    assert submit(client, address, image_usd_by_size=prices).status_code == 200
    assert ModelPrice.objects.values().get(pk=image.pk) == before
