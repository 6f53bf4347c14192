"""The AI models on offer: what their providers charge us, and what is special about selling them.

Every change of a price goes through `create_model_price` and `update_model_price`, which keep its history.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import date, timedelta
from decimal import Decimal
from typing import Any

from django.core.exceptions import ValidationError
from django.db import transaction
from django.db.models import Q, QuerySet
from django.utils import timezone

from accounts import audit
from accounts.models import User
from billing import pricing
from billing.models import ModelPrice, ModelPriceChange, SystemSettings
from billing.models.model_price import PriceChangeSource
from billing.pricing import TokenPools
from kit.refusal import Refusal

PRICE_FIELDS = tuple(field.name for field in ModelPrice._meta.concrete_fields if field.name not in ("id", "updated_at"))
# What a row is about. Usage and its costs name it for ever, so another model is another row.
IDENTITY_FIELDS = ("provider", "model", "kind")

RETIRING_DAYS = 30  # before its end a model is no default any more

IMAGE_SIZES = ("1024x1024", "1536x1024", "1024x1536")


class CatalogueError(Refusal):
    """The model cannot be used; the provider was not called. `message` is for the person."""

    http_status = 422


class UnknownModel(CatalogueError):
    pass


class RetiredModel(CatalogueError):
    pass


class UnpricedModel(CatalogueError):
    """Nobody has set the prices that it would be sold by."""


# What the models on offer read and write at once, as their providers say.
_LIMITS: Mapping[str, Mapping[str, int]] = {
    "openai": {"max_input_tokens": 272_000, "max_output_tokens": 128_000},
    "anthropic": {"max_input_tokens": 1_000_000, "max_output_tokens": 128_000},
    "google": {"max_input_tokens": 1_048_576, "max_output_tokens": 65_536},
}


def _text(provider: str, model: str, name: str, *usd_per_million: str, **fields: Any) -> dict[str, Any]:
    names = ("input", "cached_input", "cache_write", "output")
    prices = {f"{pool}_usd_per_million": Decimal(usd) for pool, usd in zip(names, usd_per_million, strict=True) if usd}
    about = {"provider": provider, "model": model, "display_name": name, "kind": "text"}
    return {**about, **prices, **_LIMITS[provider], **fields}


def _dearer_above(tokens: int, *usd_per_million: str) -> dict[str, str]:
    """Prices of calls that read more: input, cached input, cache write, output ("": the model has none)."""
    names = ("input", "cached_input", "cache_write", "output")
    return {f"{name}_above_{tokens}": usd for name, usd in zip(names, usd_per_million, strict=True) if usd}


def _special(**usd_per_million: str) -> dict[str, Any]:
    return {"special_usd_per_million": usd_per_million}


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
                  "output_usd_per_million": Decimal(30), **_special(image_input="8")}  # fmt: skip
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
    _text("openai", "gpt-6.1-terra", "GPT-6.1 Terra", "1", "0.05", "1.25", "5",
          **_special(**_dearer_above(272_000, "2", "0.10", "2.50", "7.50"))),
    _text("openai", "gpt-6.1-sol", "GPT-6.1 Sol", "2", "0.10", "2.50", "10",
          **_special(**_dearer_above(272_000, "4", "0.20", "5", "15"))),
    _text("openai", "gpt-6-luna", "GPT-6 Luna", "0.10", "0.01", "0.125", "0.50",
          **_special(**_dearer_above(272_000, "0.20", "0.02", "0.25", "0.75"))),
    _text("anthropic", "claude-sonnet-5-5", "Claude Sonnet 5.5", "2", "0.10", "2.50", "10",
          **_special(cache_write_1h="4")),
    _text("anthropic", "claude-opus-5-5", "Claude Opus 5.5", "4", "0.20", "5", "20", **_special(cache_write_1h="8")),
    _text("anthropic", "claude-haiku-5-5", "Claude Haiku 5.5", "0.10", "0.01", "0.125", "0.50",
          **_special(cache_write_1h="0.20", cache_write_1h_above_100000="1",
                     **_dearer_above(100_000, "0.50", "0.05", "0.625", "2.50"))),
    _text("google", "gemini-3.8-flash", "Gemini 3.8 Flash", "0.75", "0.075", "", "3.75"),
    _text("google", "gemini-3.5-flash-lite", "Gemini 3.5 Flash-Lite", "0.30", "0.03", "", "2.50"),
    _text("google", "gemini-2.5-pro", "Gemini 2.5 Pro", "1.25", "0.125", "", "10",
          **_special(**_dearer_above(200_000, "2.50", "0.25", "", "15")),
          **_retires("2026-12-01", "gemini-3.8-flash")),
    _text("google", "gemini-2.5-flash", "Gemini 2.5 Flash", "0.30", "0.03", "", "2.50",
          **_special(audio_input="1"), **_retires("2026-12-01", "gemini-3.5-flash-lite")),
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
          max_input_tokens=200_000, max_output_tokens=32_000, **_special(cache_write_1h="30"),
          **_retired("2026-06-15", "claude-opus-5-5")),
    _text("anthropic", "claude-sonnet-4-20250514", "Claude Sonnet 4", "3", "0.30", "3.75", "15",
          max_input_tokens=200_000, max_output_tokens=64_000, **_special(cache_write_1h="6"),
          **_retired("2026-06-15", "claude-sonnet-5-5")),
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
    return json.dumps(value, sort_keys=True) if isinstance(value, dict | list) else str(value)


# --- Reads --------------------------------------------------------------------------------------------------


def _active() -> QuerySet[ModelPrice]:
    """A model stops on the day of its retirement by itself, whether or not somebody switches it off."""
    return ModelPrice.objects.filter(Q(retired_on=None) | Q(retired_on__gt=_today()), is_active=True)


def _today() -> date:
    return timezone.now().date()


def list_active_models(kind: str) -> list[ModelPrice]:
    """The models on offer today of a kind, `text` or `image`, in their order on the page. The first is the default.

    One that retires within a month stands last, so that nobody begins with it; one without prices is not on offer.
    """
    soon = _today() + timedelta(days=RETIRING_DAYS)
    on_offer = [price for price in _active().filter(kind=kind) if not price.missing_prices]
    return sorted(on_offer, key=lambda price: price.retired_on is not None and price.retired_on <= soon)


def get_active_model(*, provider: str, model: str) -> ModelPrice:
    """The model's prices. Raises UnknownModel, RetiredModel naming the replacement, or UnpricedModel."""
    price = get_model(provider=provider, model=model)
    is_past = price.retired_on is not None and price.retired_on <= _today()
    if is_past or not price.is_active:
        when = f"was retired on {price.retired_on:%-d %B %Y}" if is_past else "is not on offer any more"
        replacement = _replacement(price)
        instead = f" Use {replacement} instead." if replacement else " Choose another one."
        raise RetiredModel(f"{price.display_name} {when}.{instead}")
    return price


def get_model(*, provider: str, model: str) -> ModelPrice:
    """The model's prices, whether it is still sold or not: for work that has been done.

    Raises UnknownModel, also for a name that several models could have, and UnpricedModel.
    """
    price = find_model(provider=provider, model=model)
    if price.missing_prices:
        raise UnpricedModel(f"{price.display_name} has no price yet. Choose another one.")
    return price


# What stands before a model's name in the addresses and libraries of its own provider. Other sellers have other prices.
_PREFIXES: Mapping[str, frozenset[str]] = {
    "openai": frozenset({"openai", "models"}),
    "anthropic": frozenset({"anthropic", "models"}),
    "google": frozenset({"google", "gemini", "vertex_ai", "publishers", "models"}),
}
# A model of a day: gpt-6-luna-2026-09-01, claude-haiku-5-5-20261001 or @20261001, gemini-3.8-flash-001, -latest.
_SNAPSHOT = re.compile(
    r"(?P<name>.+?)(?:[-@](?P<day>20\d\d-?(?:0[1-9]|1[0-2])-?(?:0[1-9]|[12]\d|3[01])|0\d\d)|[-@:](?:latest|default))"
)


def find_model(*, provider: str, model: str) -> ModelPrice:
    """The model that a name means: its own, one of its other names, or one of its snapshots, with or without a prefix.

    A name without a day means the model of any day, when there is only one. Raises UnknownModel saying what to use.
    """
    exact = ModelPrice.objects.filter(provider=provider, model=model).first()
    if exact is not None:
        return exact
    unknown = f"There is no model “{model[:100]}” here."
    *prefixes, plain = model.lower().split("/")
    if theirs := sorted(set(prefixes) - _PREFIXES.get(provider, frozenset())):
        raise UnknownModel(f"{unknown} Send its provider, and its name without “{theirs[0][:100]}/”.")
    rows = list(ModelPrice.objects.filter(provider=provider))
    for names in ([each for each in rows if plain in (each.model.lower(), *each.other_names)],
                  _of_snapshot(rows, plain)):  # fmt: skip
        if len(names) == 1:
            return names[0]
        if names:
            raise UnknownModel(f"“{model[:100]}” could be any of {', '.join(each.model for each in names)}. Send one.")
    raise UnknownModel(f"{unknown} Choose another one.")


def _of_snapshot(rows: Sequence[ModelPrice], plain: str) -> list[ModelPrice]:
    """The rows of the model that `plain` is a snapshot of: of the same day, else of no day, else of any if it has none.

    The snapshot of a day may have another price than that of another day.
    """
    name, day = _name_and_day(plain)
    of_name: dict[str, list[ModelPrice]] = {"same": [], "none": [], "other": []}
    for row in rows:
        for known in (row.model.lower(), *row.other_names):
            its_name, its_day = _name_and_day(known)
            if its_name == name:
                of_name["same" if its_day == day else "other" if its_day else "none"].append(row)
                break
    return of_name["same"] or of_name["none"] or ([] if day else of_name["other"])


def _name_and_day(name: str) -> tuple[str, str]:
    found = _SNAPSHOT.fullmatch(name)
    return (found["name"], (found["day"] or "").replace("-", "")) if found else (name, "")


def _replacement(price: ModelPrice) -> str:
    """The model to use instead that is on sale itself: replacements retire, too. "" when there is none."""
    seen = {price.model}
    while price.replacement and price.replacement not in seen:
        seen.add(price.replacement)
        following = ModelPrice.objects.filter(model=price.replacement).first()
        if following is None or following in list_active_models(following.kind):
            return price.replacement
        price = following
    return ""


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

    A size that has qualities is offered in these alone: its cost without one is for callers that name none.
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
    price: ModelPrice, *calls: TokenPools, image_count: int = 0, image_size: str = "", image_quality: str = ""
) -> int:
    """What the provider charges us for the calls of an operation, in micro-dollars, rounded up once.

    By the tokens that it reported, where the model has prices for these; images by the image where no token of them was
    reported, beside what was for words. Each call has the prices of the length of what it read, and the price of a call
    if there is one.
    """
    reported = [pools for pools in calls if pools.actual_tokens]
    total = price.request_usd * 1_000_000 * (len(reported) or min(image_count, 1))
    has_token_prices = price.kind != ModelPrice.Kind.IMAGE or _has_token_prices(price)
    if price.kind == ModelPrice.Kind.IMAGE and not (
        has_token_prices and any(pools.picture_tokens for pools in reported)
    ):
        total += image_count * 1_000_000 * _image_usd(price, size=image_size, quality=image_quality)
    if has_token_prices:
        total += sum(pricing.exact_cost_microusd(pools, _usd_per_million(price, pools)) for pools in reported)
    return pricing.ceil_multiply(1, total)


def _usd_per_million(price: ModelPrice, pools: TokenPools) -> dict[str, Decimal]:
    """The prices of a call that read and wrote `pools`.

    What has no price of its own for this length has that of a shorter one. What has none at all costs what its pool
    does, and the cache what input does.
    """
    usd = {"input": price.input_usd_per_million, "output": price.output_usd_per_million}
    for name, own in (
        ("cached_input", price.cached_input_usd_per_million),
        ("cache_write", price.cache_write_usd_per_million),
        ("reasoning", price.reasoning_usd_per_million),
    ):
        if own is not None:
            usd[name] = own
    read_tokens = pools.actual_tokens - pools.output_tokens
    reached: dict[str, int] = {}
    for key, special in price.special_usd_per_million.items():
        name, _, digits = key.partition("_above_")
        above = int(digits or 0)
        if above >= reached.get(name, 0) and (not above or read_tokens > above):
            usd[name], reached[name] = Decimal(special), above
    usd.setdefault("cached_input", usd["input"])
    usd.setdefault("cache_write", usd["input"])
    if price.kind == ModelPrice.Kind.IMAGE and "reasoning" in usd:
        usd["text_output"] = usd["reasoning"]  # what it writes costs what it thinks: both are words, not a picture
    return usd


def _has_token_prices(price: ModelPrice) -> bool:
    return bool(price.input_usd_per_million and price.output_usd_per_million)


def _image_usd(price: ModelPrice, *, size: str, quality: str) -> Decimal:
    """Of a size that has no price, when there is none for all of them: that of the dearest, never nothing."""
    by_size = price.image_usd_by_size
    usd = _by_size(by_size, size=size, quality=quality)
    if usd is not None:
        return Decimal(usd)
    return price.image_usd or max(map(Decimal, by_size.values()), default=Decimal(0))


def _by_size(values: Mapping[str, Any], *, size: str, quality: str) -> Any:
    """The value of "SIZE/QUALITY", else of "SIZE", else None."""
    return values.get(f"{size}/{quality}", values.get(size))
