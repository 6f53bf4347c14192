"""`manage.py import_model_prices`: the catalogue and a price list in LiteLLM's format."""

import io
import json
from datetime import date
from decimal import Decimal
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from django.core.management import CommandError, call_command

from billing import catalogue
from billing.models import ModelPrice, ModelPriceChange
from billing.pricing import TokenPools

pytestmark = [pytest.mark.django_db, pytest.mark.usefixtures("seeded")]

PRICE_LIST = Path(__file__).parent / "price_list.json"


class Terminal(io.StringIO):
    """Somebody who sits there and types."""

    def isatty(self) -> bool:
        return True


def run(file: Path = PRICE_LIST, **options: Any) -> str:
    out = StringIO()
    call_command("import_model_prices", str(file), stdout=out, **options)
    return out.getvalue()


def run_refused(file: Path = PRICE_LIST, **options: Any) -> tuple[str, CommandError]:
    out = StringIO()
    with pytest.raises(CommandError) as refusal:
        call_command("import_model_prices", str(file), stdout=out, **options)
    return out.getvalue(), refusal.value


def a_list(directory: Path, content: Any) -> Path:
    file = directory / "prices.json"
    file.write_text(content if isinstance(content, str) else json.dumps(content))
    return file


def everything() -> list[Any]:
    return [*ModelPrice.objects.order_by("pk").values(), ModelPriceChange.objects.count()]


def test_the_differences_are_shown_and_nothing_is_changed_without_a_yes(monkeypatch: pytest.MonkeyPatch) -> None:
    """A program that is not asked to apply exits with 2; so does a person who does not type yes."""
    before = everything()
    shown, refusal = run_refused()
    assert refusal.returncode == 2
    assert shown.splitlines() == [
        "WARNING: gemini-3.8-flash: 0 is no price, left as it is: cache_read_input_token_cost",
        "claude-haiku-5-5  max_output_tokens                128000 → 64000",
        "gemini-3.8-flash  input_usd_per_million            0.75 → 3.75     WARNING: a change by +400 %",
        "gemini-3.8-flash  output_usd_per_million           3.75 → 1        WARNING: a change by -73 %",
        "gemini-3.8-flash  retired_on                       – → 2099-12-01",
        "gpt-6-luna        input_usd_per_million            0.1 → 0.12",
        "gpt-image-2       reasoning_usd_per_million        – → 10",
        "gpt-image-2       image_usd_by_size 1024x1024/low  0.006 → 0.007",
        "gpt-image-2       image_usd_by_size 2048x2048      – → 0.079692",
        "Look twice at the 2 marked with WARNING.",
    ]
    for answer in ("no\n", "y\n", "\n", ""):
        monkeypatch.setattr("sys.stdin", Terminal(answer))
        assert run_refused()[1].returncode == 2
    assert everything() == before


@pytest.mark.parametrize("by", ["typing yes", "--apply"])
def test_the_changes_are_made_with_their_history(by: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if by == "--apply":
        told = run(apply=True, accept_large_changes=True)
    else:
        monkeypatch.setattr("sys.stdin", Terminal("yes\n"))
        told = run(accept_large_changes=True)
    assert "Models changed: 4. Models added: 0." in told
    luna, flash, image = (
        ModelPrice.objects.get(model=model) for model in ("gpt-6-luna", "gemini-3.8-flash", "gpt-image-2")
    )
    assert luna.input_usd_per_million == Decimal("0.12")  # the noise of a float is gone
    assert (flash.output_usd_per_million, flash.retired_on) == (1, date(2099, 12, 1))
    assert image.image_usd_by_size["1024x1024/low"] == "0.007"
    assert image.image_usd_by_size["2048x2048"] == "0.079692"
    assert image.image_usd_by_size["1024x1024/high"] == "0.211"  # not in the file: stays
    change = luna.changes.get()
    assert (change.field, change.old_value, change.new_value, change.changed_by, change.source) == (
        "input_usd_per_million",
        "0.1",
        "0.12",
        None,
        "import",
    )
    assert "The catalogue agrees with the file" in run()
    assert luna.changes.count() == 1


def test_models_are_added_when_they_are_named() -> None:
    told = run(apply=True, add=["gpt-7", "gemini/gemini-4-image"], accept_large_changes=True)
    assert "Models added: 2." in told
    gpt, gemini = ModelPrice.objects.get(model="gpt-7"), ModelPrice.objects.get(model="gemini-4-image")
    assert (gpt.provider, gpt.kind, gpt.is_active, gpt.max_output_tokens) == ("openai", "text", False, 128_000)
    assert (gpt.input_usd_per_million, gpt.output_usd_per_million) == (4, 20)
    assert (gemini.provider, gemini.kind, gemini.image_usd) == ("google", "image", Decimal("0.05"))
    assert gpt not in catalogue.list_active_models("text")
    first = gpt.changes.get(field="output_usd_per_million")
    assert (first.old_value, first.new_value, first.source) == ("", "20", "import")


def test_every_current_model_of_our_providers_is_added_and_put_on_offer() -> None:
    known = set(ModelPrice.objects.values_list("model", flat=True))
    run(apply=True, add_new=True, activate=True, accept_large_changes=True)
    added = ModelPrice.objects.exclude(model__in=known)
    assert {price.model for price in added} == {"gpt-7", "gemini-4-image"}  # gpt-3 is gone, an embedding is no text
    assert all(price.is_active for price in added)


def test_a_model_that_the_file_does_not_have_is_not_added() -> None:
    before = everything()
    _, refusal = run_refused(apply=True, add=["gpt-7", "gpt-8"])
    assert "The file has no gpt-8" in str(refusal)
    assert everything() == before


LUNA = {"litellm_provider": "openai", "mode": "chat", "input_cost_per_token": 1e-06}


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("", "no JSON"),
        ("{", "no JSON"),
        pytest.param("[" * 20_000, "no JSON", id="deep"),
        ("[]", "no price list"),
        ('{"gpt-6-luna": 5}', "no price list"),
        ({"gpt-6-luna": {**LUNA, "output_cost_per_token": "0.1"}}, "gpt-6-luna: output_cost_per_token"),
        ({"gpt-6-luna": {**LUNA, "output_cost_per_token": True}}, "gpt-6-luna: output_cost_per_token"),
        ({"gpt-6-luna": {**LUNA, "output_cost_per_token": -1}}, "gpt-6-luna: output_cost_per_token"),
        ({"gpt-6-luna": {**LUNA, "output_cost_per_token": float("nan")}}, "NaN is no price"),
        ('{"gpt-6-luna": {"litellm_provider": "openai", "input_cost_per_token": 1e999999}}', "input_cost_per_token"),
        ({"gpt-6-luna": {**LUNA, "input_cost_per_token_above_200k_tokens": -1}}, "input_cost_per_token_above_200k"),
        ({"gpt-6-luna": {**LUNA, "cache_creation_input_token_cost_above_1hr": "1"}}, "above_1hr"),
        ({"gpt-6-luna": {**LUNA, "cache_read_input_token_cost": 5}}, "cache_read_input_token_cost is 5"),
        ({"gpt-6-luna": {**LUNA, "max_output_tokens": 0}}, "max_output_tokens"),
        ({"gpt-6-luna": {**LUNA, "max_output_tokens": 1.5}}, "max_output_tokens"),
        ({"gpt-6-luna": {**LUNA, "deprecation_date": "soon"}}, "deprecation_date"),
        ({"gpt-6-luna": LUNA, "gpt-\0": LUNA}, "no name of a model"),
    ],
)
def test_a_bad_file_changes_nothing(tmp_path: Path, content: Any, told: str) -> None:
    """Rows 56 and 57: also what is right in it is left alone."""
    before = everything()
    _, refusal = run_refused(a_list(tmp_path, content), apply=True)
    assert told in str(refusal)
    assert "Nothing was changed." in str(refusal)
    assert everything() == before


def test_what_is_wrong_with_a_model_that_nobody_asked_for_does_no_harm(tmp_path: Path) -> None:
    content = {"gpt-6-luna": LUNA | {"input_cost_per_token": 1.1e-7}, "gpt-9": {**LUNA, "max_output_tokens": "many"}}
    file = a_list(tmp_path, content)
    assert "Models changed: 1." in run(file, apply=True)
    for options in ({"add": ["gpt-9"]}, {"add_new": True}):
        assert "gpt-9: max_output_tokens" in str(run_refused(file, apply=True, **options)[1])


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    _, refusal = run_refused(tmp_path / "none.json")
    assert "cannot be read" in str(refusal)


def test_a_model_whose_end_has_come_is_pointed_out(tmp_path: Path) -> None:
    ended = {"gpt-6-luna": {"litellm_provider": "openai", "mode": "chat", "deprecation_date": "2026-11-01"}}
    assert "WARNING: it will be refused at once" in run(a_list(tmp_path, ended), apply=True)
    with pytest.raises(catalogue.RetiredModel, match="was retired on 1 November 2026"):
        catalogue.get_active_model(provider="openai", model="gpt-6-luna")


# --- Nothing is dropped in silence ----------------------------------------------------------------------------------


def listed(name: str, kind: str = "chat", **prices: Any) -> dict[str, Any]:
    provider = {"gpt": "openai", "cla": "anthropic", "gem": "gemini"}[name[:3]]
    prefix = "gemini/" if provider == "gemini" else ""
    return {prefix + name: {"litellm_provider": provider, "mode": kind, **prices}}


@pytest.mark.parametrize(
    ("name", "prices", "pools", "cost_microusd"),
    [
        ("gemini-2.5-pro", {"input_cost_per_token_above_200k_tokens": 2.5e-6,
                            "output_cost_per_token_above_200k_tokens": 15e-6},
         {"input_tokens": 300_000, "output_tokens": 10_000}, 900_000),
        ("gemini-3.8-flash", {"input_cost_per_token_above_128k_tokens": 1.5e-6},
         {"input_tokens": 128_001, "output_tokens": 1_000}, 192_002 + 3_750),
        ("claude-opus-5-5", {"cache_read_input_token_cost_above_512k_tokens": 4e-7},
         {"input_tokens": 500_000, "cached_input_tokens": 12_001}, 2_000_000 + 4_801),
        ("claude-opus-5-5", {"cache_creation_input_token_cost_above_1hr": 9e-6,
                             "cache_creation_input_token_cost_above_1hr_above_100000_tokens": 18e-6},
         {"cache_write_tokens": 100_001, "cache_write_1h_tokens": 100_001}, 1_800_018),
        ("gemini-3.8-flash", {"input_cost_per_audio_token": 2e-6, "output_cost_per_audio_token": 9e-6},
         {"input_tokens": 10, "audio_input_tokens": 10, "output_tokens": 10, "audio_output_tokens": 10}, 110),
        # As dear as all input is no price of its own: it goes with the length.
        ("gemini-2.5-pro", {"input_cost_per_token": 1.25e-6, "input_cost_per_audio_token": 1.25e-6},
         {"input_tokens": 200_001, "audio_input_tokens": 200_001}, 500_003),
        ("gpt-6-luna", {"input_cost_per_request": 0.005}, {"input_tokens": 10}, 5_001),
    ],
)  # fmt: skip
def test_prices_by_length_lifetime_and_part_are_kept(
    tmp_path: Path, name: str, prices: dict[str, Any], pools: dict[str, int], cost_microusd: int
) -> None:
    """Row 116."""
    ModelPrice.objects.update(special_usd_per_million={})
    if name == "gemini-2.5-pro":
        ModelPrice.objects.filter(model=name).update(special_usd_per_million={"input_above_200000": "2.5"})
    file = a_list(tmp_path, listed(name, **prices))
    call_command("import_model_prices", str(file), apply=True, accept_large_changes=True, stdout=StringIO())
    price = ModelPrice.objects.get(model=name)
    assert catalogue.provider_cost_microusd(price, TokenPools(**pools)) == cost_microusd
    assert "The catalogue agrees" in run(file)


@pytest.mark.parametrize(
    "named",
    [
        {"input_cost_per_token_batches": 5e-8},
        {"output_cost_per_token_above_272k_tokens_priority": 5e-8},
        {"cache_creation_input_token_cost_above_12hr": 5e-8},
        {"cache_read_input_audio_token_cost": 5e-8},
        {"search_context_cost_per_query": {"search_context_size_low": 0.01}},
        {"input_cost_per_second": 0.01},
        {"output_cost_per_character_above_128k_tokens": 1e-6},
        {"tiered_pricing": [{"range": [0, 32000], "input_cost_per_token": 1e-7}]},
        {"regional_processing_uplift_multiplier_eu": 1.1},
        {"provider_specific_entry": {"us": 1.1}},
        {"surcharge_nobody_has_thought_of": 2},
    ],
    ids=lambda named: next(iter(named)),
)
def test_a_price_that_finds_no_place_is_named(tmp_path: Path, named: dict[str, Any]) -> None:
    """Row 116."""
    told = run(a_list(tmp_path, listed("gpt-6-luna", output_cost_per_token=5e-7, max_tokens=9, **named)))
    assert told.splitlines()[0] == f"WARNING: gpt-6-luna: not kept: {next(iter(named))}"
    silent = {name: type(value)() for name, value in named.items() if not isinstance(value, str)}
    assert "WARNING" not in run(a_list(tmp_path, listed("gpt-6-luna", output_cost_per_token=5e-7, **silent)))


def test_a_missing_price_is_none_of_zero(tmp_path: Path) -> None:
    """Row 117: the cache costs what input costs; a model without a price for its output is not added."""
    content = {
        **listed("gpt-music", "chat", input_cost_per_token=2e-6),
        **listed("gpt-free", "chat", input_cost_per_token=0, output_cost_per_token=0),
        **listed("gpt-image-9", "image_generation", output_cost_per_image=0),
        **listed("gpt-9", "chat", input_cost_per_token=2e-6, output_cost_per_token=4e-6),
    }
    file = a_list(tmp_path, content)
    told = run(file, apply=True, add_new=True, activate=True)
    assert "Models added: 1." in told
    for name in ("gpt-music", "gpt-free", "gpt-image-9"):
        assert f"WARNING: {name} has no price that it could be sold by" in told
        assert not ModelPrice.objects.filter(model=name).exists()
    price = ModelPrice.objects.get(model="gpt-9")
    assert catalogue.provider_cost_microusd(price, TokenPools(cached_input_tokens=10, cache_write_tokens=10)) == 40
    assert "Nothing was changed" in str(run_refused(file, apply=True, add=["gpt-music"])[1])


@pytest.mark.parametrize(
    ("name", "kind", "prices", "field", "told"),
    [
        # The price of a smaller image.
        ("gemini-3.1-flash-image", "image_generation",
         {"output_cost_per_image": 0.045, "output_cost_per_image_token": 6e-5, "output_cost_per_token": 3e-6},
         "image_usd", "the price of an image of 750 tokens, not of 1,120, so of another size"),
        ("gemini-3-pro-image", "image_generation",
         {"output_cost_per_image": 0.24, "output_cost_per_image_token": 12e-5}, "image_usd", "2,000 tokens, not of"),
        # The price of words instead of images.
        ("gemini-3-pro-image", "image_generation", {"output_cost_per_token": 12e-6}, "output_usd_per_million", "-90 %"),
        ("gemini-3-pro-image", "chat", {"output_cost_per_image_token": 11.9e-5}, "output_usd_per_million",
         "does not list it as a model of images"),
        ("gpt-6-luna", "chat", {"cache_read_input_token_cost": 1.3e-8}, "cached_input_usd_per_million", "+30 %"),
        ("claude-haiku-5-5", "chat", {"input_cost_per_token_above_100k_tokens": 3e-7}, "special_usd_per_million",
         "-40 %"),
    ],
)  # fmt: skip
def test_a_large_change_or_one_of_meaning_needs_a_flag(
    tmp_path: Path, name: str, kind: str, prices: dict[str, Any], field: str, told: str
) -> None:
    """Row 118. What else differs is changed."""
    file = a_list(tmp_path, listed(name, kind, deprecation_date="2099-01-01", **prices))
    before = getattr(ModelPrice.objects.get(model=name), field)
    shown, refusal = run_refused(file, apply=True)
    assert (refusal.returncode, "--accept-large-changes" in str(refusal)) == (2, True)
    assert told in shown
    price = ModelPrice.objects.get(model=name)
    assert (getattr(price, field), price.retired_on) == (before, date(2099, 1, 1))
    run(file, apply=True, accept_large_changes=True)
    assert getattr(ModelPrice.objects.get(model=name), field) != before
