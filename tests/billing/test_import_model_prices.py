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
        "claude-haiku-5-5  max_output_tokens                128000 → 64000",
        "gemini-3.8-flash  input_usd_per_million            0.75 → 3.75     WARNING: more than 3 times the old price",
        "gemini-3.8-flash  cached_input_usd_per_million     0.075 → 0       WARNING: it would cost nothing",
        "gemini-3.8-flash  output_usd_per_million           3.75 → 1        WARNING: less than 1/3 of the old price",
        "gemini-3.8-flash  retired_on                       – → 2099-12-01",
        "gpt-6-luna        input_usd_per_million            0.1 → 0.12",
        "gpt-image-2       reasoning_usd_per_million        – → 10",
        "gpt-image-2       image_usd_by_size 1024x1024/low  0.006 → 0.007",
        "gpt-image-2       image_usd_by_size 2048x2048      – → 0.079692",
        "Look twice at the 3 marked with WARNING.",
    ]
    for answer in ("no\n", "y\n", "\n", ""):
        monkeypatch.setattr("sys.stdin", Terminal(answer))
        assert run_refused()[1].returncode == 2
    assert everything() == before


@pytest.mark.parametrize("by", ["typing yes", "--apply"])
def test_the_changes_are_made_with_their_history(by: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if by == "--apply":
        told = run(apply=True)
    else:
        monkeypatch.setattr("sys.stdin", Terminal("yes\n"))
        told = run()
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
    told = run(apply=True, add=["gpt-7", "gemini/gemini-4-image"])
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
    run(apply=True, add_new=True, activate=True)
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
        ({"gpt-6-luna": {**LUNA, "output_cost_per_token": 5}}, "12 digits"),
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
    content = {"gpt-6-luna": LUNA, "gpt-9": {**LUNA, "max_output_tokens": "many"}}
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
