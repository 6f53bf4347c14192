import json
import sys
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace
from datetime import date
from decimal import ROUND_HALF_UP, Decimal
from pathlib import Path
from typing import Any

from django.core.exceptions import ValidationError
from django.core.management.base import BaseCommand, CommandError, CommandParser
from django.db import transaction
from django.utils import timezone

from billing import catalogue
from billing.models import ModelPrice, ModelPriceChange

# What LiteLLM calls our providers. It lists the same models for other sellers, at other prices.
PROVIDERS = {"openai": "openai", "anthropic": "anthropic", "gemini": "google"}
KINDS = {"chat": "text", "responses": "text", "completion": "text", "image_generation": "image"}
SIX_PLACES = Decimal("0.000001")  # what the catalogue keeps
MAX_USD, MAX_LIMIT_TOKENS = Decimal(999_999), Decimal(2**31 - 1)
SUSPICIOUS_FACTOR = 3

Key = tuple[str, str]
"""Provider and model, as the catalogue names them."""


class BadFile(Exception):
    """The file cannot be used. The message is for the person who ran the command."""


@dataclass(frozen=True, slots=True)
class Listed:
    """What the file says about a model: the catalogue's fields, as far as it has them, and USD by image size."""

    kind: str
    fields: Mapping[str, Any] = field(default_factory=dict)
    image_usd_by_size: Mapping[str, Decimal] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Difference:
    model: str
    field: str
    size: str  # of image_usd_by_size
    old: Any
    new: Any

    @property
    def warning(self) -> str:
        if isinstance(self.new, date):
            return "it will be refused at once" if self.new <= timezone.now().date() else ""
        if not isinstance(self.new, Decimal) or not isinstance(self.old, Decimal) or self.old == 0:
            return ""
        if self.new == 0:
            return "it would cost nothing"
        if self.new > self.old * SUSPICIOUS_FACTOR:
            return f"more than {SUSPICIOUS_FACTOR} times the old price"
        if self.new * SUSPICIOUS_FACTOR < self.old:
            return f"less than 1/{SUSPICIOUS_FACTOR} of the old price"
        return ""


class Command(BaseCommand):
    help = (
        "Compare the catalogue with a price list in LiteLLM's format (model_prices_and_context_window.json), show what "
        "differs, and change it after a yes. Models that are not in the catalogue are left out unless they are asked "
        "for. Exits with 2 when it changed nothing although something differs."
    )

    def add_arguments(self, parser: CommandParser) -> None:
        parser.add_argument("file", type=Path)
        parser.add_argument("--apply", action="store_true", help="make the changes without asking")
        new = parser.add_mutually_exclusive_group()
        new.add_argument("--add", nargs="+", default=[], metavar="MODEL", help="add these models to the catalogue")
        new.add_argument("--add-new", action="store_true", help="add every text and image model of our providers")
        parser.add_argument("--activate", action="store_true", help="put the added models on offer at once")

    def handle(
        self, *args: Any, file: Path, apply: bool, add: list[str], add_new: bool, activate: bool, **options: Any
    ) -> None:
        prices = {(price.provider, price.model): price for price in ModelPrice.objects.all()}
        others = None if add_new else {_model_name(name) for name in add}
        try:
            listed = read_price_list(file, kinds={key: price.kind for key, price in prices.items()}, others=others)
        except BadFile as error:
            raise CommandError(f"{file}: {error} Nothing was changed.") from error
        changes = {
            key: _differences(key[1], listed[key], price=prices[key]) for key in sorted(prices.keys() & listed.keys())
        }
        added = {key: listed[key] for key in _to_add(others, listed, known=prices.keys())}
        differences = [difference for found in changes.values() for difference in found]
        for (_, model), entry in added.items():
            differences += _differences(model, entry, price=None)
        if not differences:
            self.stdout.write(f"The catalogue agrees with the file: {len(changes):,} models compared.")
            return
        self._show(differences)
        if not apply and not self._asked():
            raise CommandError("Nothing was changed.", returncode=2)
        self._apply(prices, changes, added, is_active=activate)
        changed = sum(1 for found in changes.values() if found)
        self.stdout.write(f"Models changed: {changed:,}. Models added: {len(added):,}.")

    def _show(self, differences: list[Difference]) -> None:
        rows = [
            (each.model, f"{each.field} {each.size}", f"{_as_text(each.old)} → {_as_text(each.new)}", each.warning)
            for each in differences
        ]
        widths = [max(len(row[column]) for row in rows) for column in range(3)]
        for *cells, warning in rows:
            line = "  ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True))
            self.stdout.write(f"{line}  {f'WARNING: {warning}' if warning else ''}".rstrip())
        if suspicious := sum(1 for each in differences if each.warning):
            self.stdout.write(f"Look twice at the {suspicious:,} marked with WARNING.")

    def _asked(self) -> bool:
        if not sys.stdin.isatty():
            return False
        self.stdout.write("Change the catalogue? Type yes: ", ending="")
        self.stdout.flush()
        return sys.stdin.readline().strip() == "yes"

    def _apply(
        self,
        prices: Mapping[Key, ModelPrice],
        changes: Mapping[Key, list[Difference]],
        added: Mapping[Key, Listed],
        *,
        is_active: bool,
    ) -> None:
        by: dict[str, Any] = {"changed_by_id": None, "source": ModelPriceChange.Source.IMPORT}
        key: Key = ("", "")
        try:
            with transaction.atomic():
                for key, found in changes.items():
                    if found:
                        fields = _fields(found, sizes=prices[key].image_usd_by_size)
                        catalogue.update_model_price(price_id=prices[key].pk, changes=fields, **by)
                for key, entry in added.items():
                    provider, model = key
                    fields = {"provider": provider, "model": model, "kind": entry.kind, "display_name": model}
                    fields |= _fields(_differences(model, entry, price=None), sizes={}) | {"is_active": is_active}
                    catalogue.create_model_price(fields=fields, **by)
        except ValidationError as error:
            raise CommandError(f"{key[1]}: {' '.join(error.messages)} Nothing was changed.") from error


def _to_add(names: Collection[str] | None, listed: Mapping[Key, Listed], *, known: Collection[Key]) -> list[Key]:
    """The models to add: those of these names, or all that are not retired. Raises CommandError for a missing one."""
    new = sorted(key for key in listed if key not in known)
    if names is None:
        today = timezone.now().date()
        return [key for key in new if listed[key].fields.get("retired_on", date.max) > today]
    if missing := set(names) - {model for _, model in listed}:
        raise CommandError(f"The file has no {', '.join(sorted(missing))} of a provider of ours. Nothing was changed.")
    return [key for key in new if key[1] in names]


def _differences(model: str, entry: Listed, *, price: ModelPrice | None) -> list[Difference]:
    """What the file has and the price has not; all of it where there is no price yet. What it lacks stays."""
    found = [
        Difference(model, name, "", getattr(price, name) if price else None, new) for name, new in entry.fields.items()
    ]
    sizes = price.image_usd_by_size if price else {}
    found += [
        Difference(model, "image_usd_by_size", size, Decimal(sizes[size]) if size in sizes else None, new)
        for size, new in entry.image_usd_by_size.items()
    ]
    return [each for each in found if each.old != each.new]


def _fields(found: list[Difference], *, sizes: Mapping[str, str]) -> dict[str, Any]:
    """The catalogue's fields after the change."""
    fields = {each.field: each.new for each in found if not each.size}
    if changed := {each.size: _as_text(each.new) for each in found if each.size}:
        fields["image_usd_by_size"] = {**sizes, **changed}
    return fields


def _as_text(value: Any) -> str:
    if value is None:
        return "–"
    return f"{value.normalize():f}" if isinstance(value, Decimal) else str(value)


# --- LiteLLM's format ---------------------------------------------------------------------------------------


def read_price_list(file: Path, *, kinds: Mapping[Key, str], others: Collection[str] | None) -> dict[Key, Listed]:
    """The text and image models of our providers, with their prices in the catalogue's fields and units.

    `kinds` are those of the models that the catalogue has; of `others` (names, or None for all that there are) the
    file's `mode` tells. The list is long: what is wrong with a model that nobody asked for does no harm. Numbers are
    exact: no float is made of them. Raises BadFile.
    """
    found: dict[Key, Listed] = {}
    for name, entry in _entries(file):
        provider = PROVIDERS.get(str(entry.get("litellm_provider")))
        if provider is None:
            continue
        if not name.isascii() or not name.isprintable():
            raise BadFile(f"{name!r} is no name of a model.")
        # Of images OpenAI's prices stand under low/1024-x-1024/gpt-image-1 and 256-x-256/dall-e-2.
        *details, model = _model_name(name).split("/")
        key = (provider, model)
        kind = kinds.get(key) or KINDS.get(str(entry.get("mode")))
        is_asked_for = key in kinds or others is None or model in others
        if kind is None or not model or not is_asked_for:
            continue
        listed = found.get(key, Listed(kind))
        if not details:
            fields = _image_fields(name, entry) if kind == "image" else _text_fields(name, entry)
            found[key] = replace(listed, fields=fields)
        elif (size := _size_and_quality(details)) and (usd := _usd_per_image(name, entry, size)) is not None:
            found[key] = replace(listed, image_usd_by_size={**listed.image_usd_by_size, size: usd})
    return {key: listed for key, listed in found.items() if listed.fields or listed.image_usd_by_size}


def _entries(file: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    def refuse(constant: str) -> None:
        raise BadFile(f"{constant} is no price.")

    try:
        content = json.loads(file.read_text(encoding="utf-8"), parse_float=Decimal, parse_int=Decimal,
                             parse_constant=refuse)  # fmt: skip
    except OSError as error:
        raise BadFile(f"It cannot be read: {error.strerror}.") from error
    except (ValueError, RecursionError, ArithmeticError) as error:
        raise BadFile(f"This is no JSON: {error}.") from error
    if not isinstance(content, dict) or not all(isinstance(entry, dict) for entry in content.values()):
        raise BadFile("This is no price list: it does not map models to their prices.")
    yield from content.items()


def _model_name(name: str) -> str:
    """The name without LiteLLM's prefix: gemini/gemini-3.8-flash is gemini-3.8-flash."""
    prefix, _, rest = name.partition("/")
    return rest if prefix in PROVIDERS else name


def _text_fields(name: str, entry: Mapping[str, Any]) -> dict[str, Any]:
    fields = _token_fields(name, entry)
    output, reasoning = (
        _usd_per_million(name, entry, f"output_cost_per_{each}") for each in ("token", "reasoning_token")
    )
    if output is not None:
        fields["output_usd_per_million"] = output
    return fields | _reasoning(output, reasoning) | _limit(name, entry) | _retirement(name, entry)


def _image_fields(name: str, entry: Mapping[str, Any]) -> dict[str, Any]:
    fields = _token_fields(name, entry)
    image_tokens, text = (_usd_per_million(name, entry, f"output_cost_per_{each}") for each in ("image_token", "token"))
    output = text if image_tokens is None else image_tokens
    if output is not None:
        fields["output_usd_per_million"] = output
    image_usd = _number(name, entry, "output_cost_per_image")
    if image_usd is not None:
        fields["image_usd"] = _rounded(image_usd)
    return fields | _reasoning(output, text) | _retirement(name, entry)


def _token_fields(name: str, entry: Mapping[str, Any]) -> dict[str, Any]:
    names = {
        "input_usd_per_million": "input_cost_per_token",
        "cached_input_usd_per_million": "cache_read_input_token_cost",
        "cache_write_usd_per_million": "cache_creation_input_token_cost",
    }
    prices = {field: _usd_per_million(name, entry, listed) for field, listed in names.items()}
    return {field: usd for field, usd in prices.items() if usd is not None}


def _reasoning(output: Decimal | None, reasoning: Decimal | None) -> dict[str, Any]:
    """A price of its own only where it differs."""
    if reasoning is None:
        return {}
    return {"reasoning_usd_per_million": None if reasoning == output else reasoning}


def _limit(name: str, entry: Mapping[str, Any]) -> dict[str, Any]:
    tokens = _number(name, entry, "max_output_tokens", most=MAX_LIMIT_TOKENS)
    if tokens is None:
        return {}
    if not tokens or tokens != int(tokens):
        raise BadFile(f"{name}: max_output_tokens is {tokens}, which is no number of tokens.")
    return {"max_output_tokens": int(tokens)}


def _retirement(name: str, entry: Mapping[str, Any]) -> dict[str, Any]:
    day = entry.get("deprecation_date")
    if not day:
        return {}
    try:
        return {"retired_on": date.fromisoformat(day)}
    except (TypeError, ValueError):
        raise BadFile(f"{name}: deprecation_date is {day!r}, which is no day such as 2026-12-01.") from None


def _size_and_quality(details: list[str]) -> str | None:
    """ "1024x1024/low" of low/1024-x-1024/gpt-image-1; None for what the catalogue does not tell apart."""
    *before, size = details
    width, separator, height = size.partition("-x-")
    if not separator or not (width + height).isdecimal() or len(before) > 1:
        return None
    return "/".join([f"{width}x{height}", *before])


def _usd_per_image(name: str, entry: Mapping[str, Any], size_and_quality: str) -> Decimal | None:
    for listed in ("output_cost_per_image", "input_cost_per_image"):
        if (usd := _number(name, entry, listed)) is not None:
            return _rounded(usd)
    per_pixel = _number(name, entry, "input_cost_per_pixel")
    if per_pixel is None:
        return None
    width, height = map(int, size_and_quality.partition("/")[0].split("x"))
    return _rounded(per_pixel * width * height)


def _usd_per_million(name: str, entry: Mapping[str, Any], listed: str) -> Decimal | None:
    usd = _number(name, entry, listed)
    return None if usd is None else _rounded(usd * 1_000_000)


def _number(name: str, entry: Mapping[str, Any], listed: str, *, most: Decimal = MAX_USD) -> Decimal | None:
    """The entry's number, or None when it has none. Raises BadFile."""
    number = entry.get(listed)
    if number is None:
        return None
    if not isinstance(number, Decimal) or not 0 <= number <= most:
        raise BadFile(f"{name}: {listed} is {str(number)[:50]!r}, which cannot be.")
    return number


def _rounded(usd: Decimal) -> Decimal:
    """To what the catalogue keeps; it also takes the noise off a number that was a float once."""
    return usd.quantize(SIX_PLACES, rounding=ROUND_HALF_UP)
