import json
import re
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
from billing.pricing import POOL_OF_PART

# What LiteLLM calls our providers. It lists the same models for other sellers, at other prices.
PROVIDERS = {"openai": "openai", "anthropic": "anthropic", "gemini": "google"}
KINDS = {"chat": "text", "responses": "text", "completion": "text", "image_generation": "image"}
SIX_PLACES = Decimal("0.000001")  # what the catalogue keeps
MAX_USD, MAX_LIMIT_TOKENS = Decimal(999_999), Decimal(2**31 - 1)
LARGE_CHANGE_PERCENT = 20

# The list's prices of tokens, and the pools and parts that they are for.
POOLS = {
    "input_cost_per_token": "input",
    "cache_read_input_token_cost": "cached_input",
    "cache_creation_input_token_cost": "cache_write",
    "cache_creation_input_token_cost_above_1hr": "cache_write_1h",
    "input_cost_per_image_token": "image_input",
    "input_cost_per_audio_token": "audio_input",
    "output_cost_per_audio_token": "audio_output",
    "input_cost_per_request": "request_usd",
}
USD_FIELDS = ("request_usd", "image_usd")
TEXT_OUTPUT = {"output_cost_per_token": "output", "output_cost_per_reasoning_token": "reasoning"}
# What an image model writes and thinks is text.
IMAGE_OUTPUT = {"output_cost_per_image_token": "output", "output_cost_per_token": "reasoning"}
COLUMNS = ("input", "cached_input", "cache_write", "output", "reasoning")
SPECIAL, BY_SIZE = "special_usd_per_million", "image_usd_by_size"
PER_IMAGE, PER_PIXEL = ("output_cost_per_image", "input_cost_per_image"), "input_cost_per_pixel"
ABOVE = re.compile(r"(.+)_above_([1-9][0-9]*)(k?)_tokens")
# What looks like a price must be kept or named, whatever the list calls it.
PRICE_WORD = re.compile(r"cost|pric|fee|charge|credit|discount|uplift|multiplier|usd|dbu|provider_specific_entry")
NOT_KEPT, NO_PRICE = "not kept", "0 is no price, left as it is"

Key = tuple[str, str]
"""Provider and model, as the catalogue names them."""


class BadFile(Exception):
    """The file cannot be used. The message is for the person who ran the command."""


@dataclass(frozen=True, slots=True)
class Listed:
    """What the file says about a model: the catalogue's fields, as far as it has them, and those of several prices.

    In these None means that there is no price of its own. `left_out` are the list's fields that did not find a place,
    with why.
    """

    kind: str
    fields: Mapping[str, Any] = field(default_factory=dict)
    tables: Mapping[str, Mapping[str, Decimal | None]] = field(default_factory=dict)
    left_out: Mapping[str, str] = field(default_factory=dict)
    is_of_other_kind: bool = False  # than the catalogue's

    def with_prices(self, table: str, prices: Mapping[str, Decimal | None]) -> "Listed":
        return replace(self, tables={**self.tables, table: {**self.tables.get(table, {}), **prices}})

    def without(self, names: Mapping[str, str]) -> "Listed":
        return replace(self, left_out={**self.left_out, **names})


@dataclass(frozen=True, slots=True)
class Difference:
    model: str
    field: str
    key: str  # in a field of several prices
    old: Any
    new: Any
    meaning: str = ""  # why the two are not prices of the same thing

    @property
    def is_large(self) -> bool:
        """Not made without --accept-large-changes."""
        if not isinstance(self.old, Decimal) or not isinstance(self.new, Decimal) or not self.old:
            return False
        return bool(self.meaning) or abs(self.new - self.old) * 100 > self.old * LARGE_CHANGE_PERCENT

    @property
    def warning(self) -> str:
        if isinstance(self.new, date):
            return "it will be refused at once" if self.new <= timezone.now().date() else ""
        if not self.is_large:
            return ""
        change = f"a change by {(self.new - self.old) * 100 / self.old:+.0f} %"
        return f"{change}: {self.meaning}" if self.meaning else change


class Command(BaseCommand):
    help = (
        "Compare the catalogue with a price list in LiteLLM's format (model_prices_and_context_window.json), show what "
        "differs, and change it after a yes. Models that are not in the catalogue are left out unless they are asked "
        "for. A price that changes much or means another thing is changed only with --accept-large-changes; what of "
        "the list finds no place in the catalogue is named. Exits with 2 when it left something as it was that differs."
    )

    def add_arguments(self, parser: CommandParser) -> None:
        parser.add_argument("file", type=Path)
        parser.add_argument("--apply", action="store_true", help="make the changes without asking")
        parser.add_argument(
            "--accept-large-changes",
            action="store_true",
            help=f"also change prices by more than {LARGE_CHANGE_PERCENT} per cent, or to those of something else",
        )
        new = parser.add_mutually_exclusive_group()
        new.add_argument("--add", nargs="+", default=[], metavar="MODEL", help="add these models to the catalogue")
        new.add_argument("--add-new", action="store_true", help="add every text and image model of our providers")
        parser.add_argument("--activate", action="store_true", help="put the added models on offer at once")

    def handle(
        self,
        *args: Any,
        file: Path,
        apply: bool,
        accept_large_changes: bool,
        add: list[str],
        add_new: bool,
        activate: bool,
        **options: Any,
    ) -> None:
        prices = {(price.provider, price.model): price for price in ModelPrice.objects.all()}
        others = None if add_new else {_model_name(name) for name in add}
        try:
            listed = read_price_list(file, kinds={key: price.kind for key, price in prices.items()}, others=others)
        except BadFile as error:
            raise CommandError(f"{file}: {error} Nothing was changed.") from error
        compared = sorted(prices.keys() & listed.keys())
        added = {key: listed[key] for key in _to_add(others, listed, known=prices.keys())}
        unpriced = [key for key in added if add_new and _new_model(key, added[key], is_active=False).missing_prices]
        for key in [*compared, *added]:
            self._warn_of_left_out(key[1], listed[key])
        for key in unpriced:
            self.stdout.write(f"WARNING: {key[1]} has no price that it could be sold by, and is not added.")
            del added[key]

        changes = {key: _differences(key[1], listed[key], price=prices[key]) for key in compared}
        differences = [difference for found in changes.values() for difference in found]
        for (_, model), entry in added.items():
            differences += _differences(model, entry, price=None)
        if not differences:
            self.stdout.write(f"The catalogue agrees with the file: {len(changes):,} models compared.")
            return
        self._show(differences)
        left = [] if accept_large_changes else [each for each in differences if each.is_large]
        changes = {key: [each for each in found if each not in left] for key, found in changes.items()}
        if not apply and not self._asked():
            raise CommandError("Nothing was changed.", returncode=2)
        self._apply(prices, changes, added, is_active=activate)
        changed = sum(1 for found in changes.values() if found)
        self.stdout.write(f"Models changed: {changed:,}. Models added: {len(added):,}.")
        if left:
            raise CommandError(
                f"Large changes left as they are: {len(left):,}. Look at the provider's own list, then run this again "
                "with --accept-large-changes, or enter the prices in Django admin.",
                returncode=2,
            )

    def _warn_of_left_out(self, model: str, entry: Listed) -> None:
        for why in sorted(set(entry.left_out.values())):
            names = ", ".join(sorted(name for name, its_why in entry.left_out.items() if its_why == why))
            self.stdout.write(f"WARNING: {model}: {why}: {names}")

    def _show(self, differences: list[Difference]) -> None:
        rows = [
            (each.model, f"{each.field} {each.key}", f"{_as_text(each.old)} → {_as_text(each.new)}", each.warning)
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
                        fields = _fields(found, price=prices[key])
                        catalogue.update_model_price(price_id=prices[key].pk, changes=fields, **by)
                for key, entry in added.items():
                    fields = _new_fields(key, entry, is_active=is_active)
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


def _new_fields(key: Key, entry: Listed, *, is_active: bool) -> dict[str, Any]:
    provider, model = key
    fields = {"provider": provider, "model": model, "kind": entry.kind, "display_name": model, "is_active": is_active}
    return fields | _fields(_differences(model, entry, price=None), price=None)


def _new_model(key: Key, entry: Listed, *, is_active: bool) -> ModelPrice:
    return ModelPrice(**_new_fields(key, entry, is_active=is_active))


def _differences(model: str, entry: Listed, *, price: ModelPrice | None) -> list[Difference]:
    """What the file has and the price has not; all of it where there is no price yet. What it lacks stays."""
    found = [
        Difference(model, name, "", getattr(price, name) if price else None, new) for name, new in entry.fields.items()
    ]
    for table, listed in entry.tables.items():
        prices = getattr(price, table) if price else {}
        found += [
            Difference(model, table, key, Decimal(prices[key]) if key in prices else None, new)
            for key, new in listed.items()
        ]
    return [replace(each, meaning=_meaning(each, entry, price)) for each in found if each.old != each.new]


def _meaning(difference: Difference, entry: Listed, price: ModelPrice | None) -> str:
    """Why the file's price is not one of the same thing, as far as can be told."""
    if price is None or not isinstance(difference.new, Decimal):
        return ""
    if entry.is_of_other_kind:
        return f"the file does not list it as a model of {price.get_kind_display().lower()}"
    token_usd = entry.fields.get("output_usd_per_million", price.output_usd_per_million)
    if difference.field == "image_usd" and difference.old and price.output_usd_per_million and token_usd:
        old_tokens = difference.old * 1_000_000 / price.output_usd_per_million
        new_tokens = difference.new * 1_000_000 / token_usd
        if abs(new_tokens - old_tokens) * 100 > old_tokens * LARGE_CHANGE_PERCENT:
            return f"the price of an image of {new_tokens:,.0f} tokens, not of {old_tokens:,.0f}, so of another size"
    return ""


def _fields(found: list[Difference], *, price: ModelPrice | None) -> dict[str, Any]:
    """The catalogue's fields after the change."""
    fields = {each.field: each.new for each in found if not each.key}
    for each in found:
        if each.key:
            prices = fields.setdefault(each.field, dict(getattr(price, each.field)) if price else {})
            prices.pop(each.key, None)
            if each.new is not None:
                prices[each.key] = _as_text(each.new)
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
        mode = KINDS.get(str(entry.get("mode")))
        kind = kinds.get(key) or mode
        is_asked_for = key in kinds or others is None or model in others
        if kind is None or not model or not is_asked_for:
            continue
        listed = found.get(key, Listed(kind))
        found[key] = _with_size(listed, name, entry, details) if details else _with_model(listed, name, entry, mode)
    return {key: listed for key, listed in found.items() if listed.fields or listed.tables or listed.left_out}


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


def _with_model(listed: Listed, name: str, entry: Mapping[str, Any], mode: str | None) -> Listed:
    is_image = listed.kind == "image"
    pools = POOLS | (IMAGE_OUTPUT if is_image else TEXT_OUTPUT)
    if is_image and entry.get("output_cost_per_image_token") is None:
        pools = pools | {"output_cost_per_token": "output"}
    if is_image:
        pools = pools | {PER_IMAGE[0]: "image_usd"}
    usd: dict[str, Decimal] = {}
    left_out: dict[str, str] = {}
    for listed_as, value in entry.items():
        place = _place(listed_as, pools)
        if place is None:
            if PRICE_WORD.search(listed_as) and _says_something(value):
                left_out[listed_as] = NOT_KEPT
        elif (number := _number(name, entry, listed_as)) is not None:
            price = _rounded(number if place in USD_FIELDS else number * 1_000_000)
            if price > MAX_USD:
                raise BadFile(f"{name}: {listed_as} is {number}, which cannot be.")
            if price:
                usd[place] = price
            else:
                left_out[listed_as] = NO_PRICE

    fields: dict[str, Any] = {place: usd.pop(place) for place in USD_FIELDS if place in usd}
    special = {
        # As dear as its pool is no price of its own: above a length it goes with it.
        place: None if price == usd.get(POOL_OF_PART.get(place, "")) else price
        for place, price in usd.items()
        if place not in COLUMNS
    }
    for column in COLUMNS:
        if column in usd:
            fields[f"{column}_usd_per_million"] = usd[column]
    if "reasoning" in usd and usd["reasoning"] == usd.get("output"):
        fields["reasoning_usd_per_million"] = None
    if not is_image:
        fields |= _limit(name, entry)
    fields |= _retirement(name, entry)
    listed = replace(listed, fields=fields, is_of_other_kind=mode is not None and mode != listed.kind)
    return (listed.with_prices(SPECIAL, special) if special else listed).without(left_out)


def _place(listed_as: str, pools: Mapping[str, str]) -> str | None:
    """ "input_above_200000" of input_cost_per_token_above_200k_tokens; None for what the catalogue has no place for."""
    if listed_as in pools:
        return pools[listed_as]
    above = ABOVE.fullmatch(listed_as)
    if above is None or above[1] not in pools or pools[above[1]] in USD_FIELDS:
        return None
    tokens = int(above[2]) * (1_000 if above[3] else 1)
    return f"{pools[above[1]]}_above_{tokens}" if 100 <= tokens < 10**9 else None


def _with_size(listed: Listed, name: str, entry: Mapping[str, Any], details: list[str]) -> Listed:
    used = {*PER_IMAGE, PER_PIXEL}
    size = _size_and_quality(details)
    usd = None if size is None else _usd_per_image(name, entry, size)
    left_out = {
        f"{name} {each}": NOT_KEPT
        for each, value in entry.items()
        if PRICE_WORD.search(each) and _says_something(value) and (usd is None or each not in used)
    }
    if size is None or usd is None:
        return listed.without(left_out)
    if not usd:
        return listed.without({name: NO_PRICE})
    return listed.with_prices(BY_SIZE, {size: usd}).without(left_out)


def _says_something(value: Any) -> bool:
    """Whether there is a number in it other than zero."""
    if isinstance(value, dict | list):
        return any(map(_says_something, value.values() if isinstance(value, dict) else value))
    return isinstance(value, Decimal) and value != 0


def _limit(name: str, entry: Mapping[str, Any]) -> dict[str, Any]:
    tokens = _number(name, entry, "max_output_tokens", most=MAX_LIMIT_TOKENS)
    if tokens is None:
        return {}
    if not tokens or tokens != int(tokens):
        raise BadFile(f"{name}: max_output_tokens is {tokens}, which is not a number of tokens.")
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
    for listed in PER_IMAGE:
        if (usd := _number(name, entry, listed)) is not None:
            return _rounded(usd)
    per_pixel = _number(name, entry, PER_PIXEL)
    if per_pixel is None:
        return None
    width, height = map(int, size_and_quality.partition("/")[0].split("x"))
    return _rounded(per_pixel * width * height)


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
