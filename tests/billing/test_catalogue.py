"""The AI models on offer: what an image costs by size and quality, what a model costs us, and who changed a price."""

from datetime import UTC, date, datetime
from decimal import Decimal
from typing import Any

import pytest
import time_machine
from django.core.exceptions import ValidationError
from django.db import DatabaseError, transaction
from django.test import Client
from django.urls import reverse

from accounts.models import User
from billing import catalogue, system_settings
from billing.catalogue import ImageOption
from billing.models import ModelPrice, ModelPriceChange, SystemSettings
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
        "output_usd_per_million": Decimal(20),
    }
    price = catalogue.create_model_price(fields=fields, changed_by_id=None, source="import")
    assert history(price) == [
        ("display_name", "", "GPT-7", None, "import"),
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
    assert submit(client, address, **fields, output_usd_per_million="20").status_code == 302
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
