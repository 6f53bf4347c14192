"""The AI models on offer: what their providers charge us, and what is special about selling them.

Every change of a price goes through `create_model_price` and `update_model_price`, which keep its history.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from decimal import Decimal
from typing import Any

from django.core.exceptions import ValidationError
from django.db import transaction
from django.db.models import Q, QuerySet
from django.utils import timezone

from accounts import audit
from accounts.models import User
from accounts.refusal import Refusal
from billing import pricing
from billing.models import ModelPrice, ModelPriceChange, SystemSettings
from billing.models.model_price import PriceChangeSource
from billing.pricing import TokenPools

PRICE_FIELDS = tuple(field.name for field in ModelPrice._meta.concrete_fields if field.name not in ("id", "updated_at"))
# What a row is about. Usage and its costs name it for ever, so another model is another row.
IDENTITY_FIELDS = ("provider", "model", "kind")

IMAGE_SIZES = ("1024x1024", "1536x1024", "1024x1536")


class CatalogueError(Refusal):
    """The model cannot be used; the provider was not called. `message` is for the person."""

    http_status = 422


class UnknownModel(CatalogueError):
    pass


class RetiredModel(CatalogueError):
    pass


# What the models on offer read and write at once, as their providers say.
_LIMITS: Mapping[str, Mapping[str, int]] = {
    "openai": {"max_input_tokens": 272_000, "max_output_tokens": 128_000},
    "anthropic": {"max_input_tokens": 1_000_000, "max_output_tokens": 128_000},
    "google": {"max_input_tokens": 1_048_576, "max_output_tokens": 65_536},
}


def _text(provider: str, model: str, name: str, *usd_per_million: str, **fields: Any) -> dict[str, Any]:
    names = ("input", "cached_input", "cache_write", "output")
    prices = {f"{pool}_usd_per_million": Decimal(usd) for pool, usd in zip(names, usd_per_million, strict=True)}
    about = {"provider": provider, "model": model, "display_name": name, "kind": "text"}
    return {**about, **prices, **_LIMITS[provider], **fields}


def _image(provider: str, model: str, name: str, image_usd: str, **fields: Any) -> dict[str, Any]:
    model_fields = {"provider": provider, "model": model, "display_name": name, "kind": "image"}
    return model_fields | {"image_usd": Decimal(image_usd)} | fields


def _gpt_image_2(model: str, name: str) -> dict[str, Any]:
    """The family has one price list. Wide and tall images take fewer tokens of the provider than square ones."""
    usd, cost_tokens = {}, {}
    for sizes, by_quality, middle_tokens in (
        (("1024x1024",), {"low": ("0.006", 1_500), "medium": ("0.053", 6_000), "high": ("0.211", 20_000)}, 6_000),
        (IMAGE_SIZES[1:], {"low": ("0.005", 1_500), "medium": ("0.041", 5_000), "high": ("0.165", 16_000)}, 5_000),
    ):
        for size in sizes:
            for quality, (image_usd, image_tokens) in by_quality.items():
                usd[f"{size}/{quality}"], cost_tokens[f"{size}/{quality}"] = image_usd, image_tokens
            cost_tokens[size] = middle_tokens
    tokens_usd = {"input_usd_per_million": Decimal(5), "cached_input_usd_per_million": Decimal("1.25"),
                  "output_usd_per_million": Decimal(30)}  # fmt: skip
    return _image("openai", model, name, "0.053", image_usd_by_size=usd, image_cost_tokens=cost_tokens, **tokens_usd)


def _gemini_image(
    model: str, name: str, image_usd: str, cost_tokens: int, *, input_usd: str, image_tokens_usd: str, text_usd: str
) -> dict[str, Any]:
    """Gemini's image models know no quality, and an image of any shape takes the same number of tokens."""
    return _image(
        "google",
        model,
        name,
        image_usd,
        image_cost_tokens=dict.fromkeys(IMAGE_SIZES, cost_tokens),
        input_usd_per_million=Decimal(input_usd),
        output_usd_per_million=Decimal(image_tokens_usd),
        reasoning_usd_per_million=Decimal(text_usd),
    )


def _retired(on: str, replacement: str) -> dict[str, Any]:
    return {"is_active": False} | _retires(on, replacement)


def _retires(on: str, replacement: str) -> dict[str, Any]:
    return {"retired_on": date.fromisoformat(on), "replacement": replacement}


# USD per million tokens: input, cached input, cache write, output; USD per image. As of November 2026; providers
# change their prices, so a superadmin compares them with the providers' lists (`manage.py import_model_prices` helps)
# and edits them in Django admin. For the GPT Image 2.5 models OpenAI gives prices per token and none per image: those
# of GPT Image 2 stand in, and count only when no usage was reported.
DEFAULT_MODELS: Sequence[dict[str, Any]] = (
    _text("openai", "gpt-6.1-terra", "GPT-6.1 Terra", "1", "0.05", "1.25", "5"),
    _text("openai", "gpt-6.1-sol", "GPT-6.1 Sol", "2", "0.10", "2.50", "10"),
    _text("openai", "gpt-6-luna", "GPT-6 Luna", "0.10", "0.01", "0.125", "0.50"),
    _text("anthropic", "claude-sonnet-5-5", "Claude Sonnet 5.5", "2", "0.10", "2.50", "10"),
    _text("anthropic", "claude-opus-5-5", "Claude Opus 5.5", "4", "0.20", "5", "20"),
    _text("anthropic", "claude-haiku-5-5", "Claude Haiku 5.5", "0.10", "0.01", "0.125", "0.50"),
    _text("google", "gemini-3.8-flash", "Gemini 3.8 Flash", "0.75", "0.075", "0", "3.75"),
    _text("google", "gemini-3.5-flash-lite", "Gemini 3.5 Flash-Lite", "0.30", "0.03", "0", "2.50"),
    _text("google", "gemini-2.5-pro", "Gemini 2.5 Pro", "1.25", "0.125", "0", "10",
          **_retires("2026-12-01", "gemini-3.8-flash")),
    _text("google", "gemini-2.5-flash", "Gemini 2.5 Flash", "0.30", "0.03", "0", "2.50",
          **_retires("2026-12-01", "gemini-3.5-flash-lite")),
    _gpt_image_2("gpt-image-2", "GPT Image 2"),
    _gpt_image_2("gpt-image-2.5-flare", "GPT Image 2.5 Flare"),
    _gpt_image_2("gpt-image-2.5-sunburst", "GPT Image 2.5 Sunburst"),
    _gemini_image("gemini-3.1-flash-image", "Gemini 3.1 Flash Image", "0.0672", 4_500,
                  input_usd="0.50", image_tokens_usd="60", text_usd="3"),
    _gemini_image("gemini-3.1-flash-lite-image", "Gemini 3.1 Flash-Lite Image", "0.0336", 3_000,
                  input_usd="0.25", image_tokens_usd="30", text_usd="1.50"),
    _gemini_image("gemini-3-pro-image", "Gemini 3 Pro Image", "0.1344", 9_000,
                  input_usd="2", image_tokens_usd="120", text_usd="12"),
    # Retired: they refuse with their replacement. Without a cost of their own the system settings' one applies.
    _image("openai", "dall-e-3", "DALL-E 3", "0.040", **_retired("2026-05-12", "gpt-image-2")),
    _image("openai", "dall-e-2", "DALL-E 2", "0.020", **_retired("2026-05-12", "gpt-image-2")),
    _image("openai", "gpt-image-1", "GPT Image 1", "0.042", image_cost_tokens={"1024x1024": 6_000},
           **_retired("2026-10-23", "gpt-image-2")),
    _image("google", "gemini-2.5-flash-image", "Gemini 2.5 Flash Image", "0.039",
           image_cost_tokens={"1024x1024": 4_500}, **_retired("2026-10-02", "gemini-3.1-flash-image")),
    _image("google", "imagen-4.0-generate-001", "Imagen 4", "0.040",
           **_retired("2026-08-17", "gemini-3.1-flash-image")),
    _text("anthropic", "claude-opus-4-20250514", "Claude Opus 4", "15", "1.50", "18.75", "75",
          max_input_tokens=200_000, max_output_tokens=32_000, **_retired("2026-06-15", "claude-opus-5-5")),
    _text("anthropic", "claude-sonnet-4-20250514", "Claude Sonnet 4", "3", "0.30", "3.75", "15",
          max_input_tokens=200_000, max_output_tokens=64_000, **_retired("2026-06-15", "claude-sonnet-5-5")),
)  # fmt: skip


def seed_default_models() -> int:
    """Add the default models that are missing; models already there keep their edited prices. Returns how many."""
    known = set(ModelPrice.objects.values_list("provider", "model"))
    missing = [
        ModelPrice(sort_order=position, **fields)
        for position, fields in enumerate(DEFAULT_MODELS, start=1)
        if (fields["provider"], fields["model"]) not in known
    ]
    return len(ModelPrice.objects.bulk_create(missing, ignore_conflicts=True))


# --- Changes ------------------------------------------------------------------------------------------------


def create_model_price(*, fields: Mapping[str, Any], changed_by_id: int | None, source: str) -> ModelPrice:
    """Add a model, and keep its first prices as the beginning of its history. Raises ValidationError."""
    _require_price_fields(fields)
    price = ModelPrice(**fields)
    with transaction.atomic():
        price.full_clean()
        price.save()
        price.refresh_from_db()  # numbers as they are stored
        _keep_changes(price, dict.fromkeys(fields), changed_by_id=changed_by_id, source=source)
    return price


def update_model_price(
    *, price_id: int, changes: Mapping[str, Any], changed_by_id: int | None, source: str
) -> ModelPrice:
    """Change a model's prices and keep who changed what, from which value to which. Running operations keep theirs.

    `source` is one of ModelPriceChange.Source. Raises ValidationError naming each wrong field; then nothing is changed.
    """
    _require_price_fields(changes)
    if identity := set(changes).intersection(IDENTITY_FIELDS):
        raise ValidationError(dict.fromkeys(sorted(identity), "Another model is another row: add it."))
    with transaction.atomic():
        price = ModelPrice.objects.select_for_update().get(pk=price_id)
        before = {name: getattr(price, name) for name in changes}
        for name, value in changes.items():
            setattr(price, name, value)
        price.full_clean()
        if any(getattr(price, name) != value for name, value in before.items()):
            price.save()
            price.refresh_from_db()
            _keep_changes(price, before, changed_by_id=changed_by_id, source=source)
    return price


def _require_price_fields(names: Mapping[str, Any]) -> None:
    if unknown := set(names) - set(PRICE_FIELDS):
        raise ValidationError(f"A model has no {', '.join(sorted(unknown))}.")


def _keep_changes(price: ModelPrice, before: Mapping[str, Any], *, changed_by_id: int | None, source: str) -> None:
    values = [(name, _as_text(old), _as_text(getattr(price, name))) for name, old in before.items()]
    ModelPriceChange.objects.bulk_create(
        ModelPriceChange(
            price=price, field=name, old_value=old, new_value=new, changed_by_id=changed_by_id, source=source
        )
        for name, old, new in values
        if old != new
    )
    if changed := {name: (old, new) for name, old, new in values if old != new}:
        audit.write(
            action=audit.Action.PRICE_CHANGED,
            summary=f"Price of {price.display_name}: {', '.join(changed)} ({PriceChangeSource(source).label.lower()})",
            actor=None if changed_by_id is None else User.objects.get(pk=changed_by_id),
            about=("model_price", price.pk),
            before={name: old for name, (old, _) in changed.items()},
            after={name: new for name, (_, new) in changed.items()},
        )


def _as_text(value: Any) -> str:
    """A value as the history shows it: 2.500000 is "2.5", nothing is ""."""
    if value is None:
        return ""
    if isinstance(value, Decimal):
        return f"{value.normalize():f}"
    return json.dumps(value, sort_keys=True) if isinstance(value, dict) else str(value)


# --- Reads --------------------------------------------------------------------------------------------------


def _active() -> QuerySet[ModelPrice]:
    """A model stops on the day of its retirement by itself, whether or not somebody switches it off."""
    return ModelPrice.objects.filter(Q(retired_on=None) | Q(retired_on__gt=_today()), is_active=True)


def _today() -> date:
    return timezone.now().date()


def list_active_models(kind: str) -> list[ModelPrice]:
    """The models on offer today of a kind, `text` or `image`, in their order on the page."""
    return list(_active().filter(kind=kind))


def get_active_model(*, provider: str, model: str) -> ModelPrice:
    """The model's prices. Raises UnknownModel, or RetiredModel naming the replacement (row 58)."""
    price = ModelPrice.objects.filter(provider=provider, model=model).first()
    if price is None:
        raise UnknownModel(f"There is no model “{model[:100]}” here. Choose another one.")
    is_past = price.retired_on is not None and price.retired_on <= _today()
    if is_past or not price.is_active:
        when = f"was retired on {price.retired_on:%-d %B %Y}" if is_past else "is not on offer any more"
        instead = f" Use {price.replacement} instead." if price.replacement else " Choose another one."
        raise RetiredModel(f"{price.display_name} {when}.{instead}")
    return price


def multiplier(price: ModelPrice, settings: SystemSettings) -> Decimal:
    """The model's own multiplier, else the settings'."""
    return price.multiplier or settings.token_multiplier


def image_cost_tokens(price: ModelPrice, settings: SystemSettings, *, size: str, quality: str = "") -> int:
    """What one image costs the user: by size and quality, by size, else the settings' cost of the model's family."""
    cost_tokens = _by_size(price.image_cost_tokens, size=size, quality=quality)
    if cost_tokens is not None:
        return int(cost_tokens)
    if price.model.startswith("dall-e-2"):
        return settings.dalle2_cost_tokens
    if price.provider == "google":
        return settings.imagen_cost_tokens
    return settings.dalle3_cost_tokens


@dataclass(frozen=True, slots=True)
class ImageOption:
    """A size and quality in which a model makes images (quality "": it knows none), and what one costs the user."""

    size: str
    quality: str
    cost_tokens: int


def image_options(price: ModelPrice, settings: SystemSettings) -> list[ImageOption]:
    """What the model offers: the usual sizes first, each from the cheapest quality to the dearest.

    A size that has qualities is offered in these alone: its cost without one is for whoever names none.
    """
    keys = price.image_cost_tokens or IMAGE_SIZES
    choices = [key.partition("/")[::2] for key in keys]
    in_qualities = {size for size, quality in choices if quality}
    options = [
        ImageOption(size, quality, image_cost_tokens(price, settings, size=size, quality=quality))
        for size, quality in choices
        if quality or size not in in_qualities
    ]
    places = {size: place for place, size in enumerate(IMAGE_SIZES)}
    return sorted(options, key=lambda it: (places.get(it.size, len(places)), it.size, it.cost_tokens, it.quality))


def provider_cost_microusd(
    price: ModelPrice, pools: TokenPools, *, image_count: int = 0, image_size: str = "", image_quality: str = ""
) -> int:
    """What the provider charges us, in micro-dollars, rounded up once.

    By the tokens that it reported, where the model has prices for these; else by the image. Never both.
    """
    if price.kind == ModelPrice.Kind.IMAGE and not (pools.actual_tokens and _has_token_prices(price)):
        usd = _by_size(price.image_usd_by_size, size=image_size, quality=image_quality)
        return pricing.ceil_multiply(image_count * 1_000_000, price.image_usd if usd is None else Decimal(usd))
    usd_per_million = {
        "input": price.input_usd_per_million,
        "cached_input": price.cached_input_usd_per_million,
        "cache_write": price.cache_write_usd_per_million,
        "output": price.output_usd_per_million,
    }
    if price.reasoning_usd_per_million is not None:
        usd_per_million["reasoning"] = price.reasoning_usd_per_million
        if price.kind == ModelPrice.Kind.IMAGE:  # what it writes costs what it thinks: both are words, no picture
            usd_per_million["text_output"] = price.reasoning_usd_per_million
    return pricing.provider_cost_microusd(pools, usd_per_million=usd_per_million)


def _has_token_prices(price: ModelPrice) -> bool:
    return bool(price.output_usd_per_million)


def _by_size(values: Mapping[str, Any], *, size: str, quality: str) -> Any:
    """The value of "SIZE/QUALITY", else of "SIZE", else None."""
    return values.get(f"{size}/{quality}", values.get(size))
