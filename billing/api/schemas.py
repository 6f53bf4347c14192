"""What may be sent, and what is answered."""

import json
import math
import re
from datetime import UTC, datetime
from decimal import Decimal
from typing import Annotated, Any, NoReturn, Self, cast

from django.http import HttpRequest
from ninja import Header
from ninja.parser import Parser
from pydantic import (
    AfterValidator,
    AwareDatetime,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    StrictBool,
    StrictInt,
    ValidationInfo,
    WithJsonSchema,
    field_validator,
    model_validator,
)

from billing import ledger, pricing, usage
from billing.catalogue.packages import Offer
from billing.models import TokenAccount, TokenTransaction, TokenUsage
from billing.models.account import AccountStatus
from billing.models.fields import Currency, Provider
from billing.models.lot import LotKind
from billing.models.transaction import TransactionType
from billing.models.usage import ChargeType, OperationType, UsageStatus
from kit.text import require_storable

MAX_BIGINT = 2**63 - 1
MAX_RESERVATION_SECONDS = 86_400

# --- What may be sent ---------------------------------------------------------------------------------------


class StrictJSONParser(Parser):
    """A JSON object in UTF-8, without the extensions of Python's parser (NaN, Infinity, other encodings)."""

    def parse_body(self, request: HttpRequest) -> dict[str, Any]:
        body = json.loads(request.body.decode(), parse_constant=_refuse_constant, parse_float=_finite_float)
        if not isinstance(body, dict):
            raise ValueError("not an object")
        return body


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a number")


def _finite_float(digits: str) -> float:
    number = float(digits)
    if not math.isfinite(number):
        raise ValueError(f"{digits} is out of range")
    return number


def _digits(value: object) -> object:
    """Addresses are text: only plain ASCII digits become a number there, not "+1", "1.0" or "１２"."""
    return int(value) if isinstance(value, str) and re.fullmatch(r"[0-9]{1,19}", value) else value


def _moment(value: object) -> object:
    """A moment with its zone, as RFC 3339 writes it; a bare number or date would be read one way or another."""
    if not isinstance(value, str) or not re.fullmatch(
        r"[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}:[0-9]{2}(\.[0-9]{1,6})?(Z|[+-][0-9]{2}:[0-9]{2})", value
    ):
        raise ValueError("write a moment with its zone, such as 2026-11-21T09:30:00Z")
    return value


def _in_utc(moment: datetime) -> datetime:
    # PostgreSQL takes no zone as far away as Python's go.
    try:
        return moment.astimezone(UTC)
    except OverflowError:
        raise ValueError("the moment is out of range") from None


_Text = Annotated[str, AfterValidator(require_storable), Field(json_schema_extra={"pattern": r"^[^\x00]*$"})]
_Id = Annotated[int, Field(ge=1, le=MAX_BIGINT)]
_Tokens = Annotated[int, Field(ge=0, le=pricing.MAX_POOL_TOKENS)]
Moment = Annotated[AwareDatetime, BeforeValidator(_moment), AfterValidator(_in_utc)]
AddressId = Annotated[int, Field(strict=True, ge=1, le=MAX_BIGINT), BeforeValidator(_digits)]
PageSize = Annotated[int, Field(strict=True, ge=1, le=usage.MAX_PAGE), BeforeValidator(_digits)]
_ProviderName = Annotated[Provider, Field(strict=False)]
_OperationTypeName = Annotated[OperationType, Field(strict=False)]
_ModelName = Annotated[_Text, Field(min_length=1, max_length=100)]
_ImageWord = Annotated[_Text, Field(max_length=20)]
_DurationMs = Annotated[int, Field(ge=0, le=10**12)]
_Metadata = Annotated[
    dict[
        Annotated[_Text, Field(min_length=1, max_length=64)],
        Annotated[_Text, Field(max_length=500)]
        | Annotated[StrictInt, Field(ge=-MAX_BIGINT, le=MAX_BIGINT)]
        | StrictBool
        | None,
    ],
    Field(max_length=50, description="Flat: texts, whole numbers, booleans and nulls."),
]
IdempotencyKey = Annotated[
    str,
    Header(
        alias="Idempotency-Key",
        pattern=r"^[!-~]([ -~]{0,198}[!-~])?$",
        description="1 to 200 printable ASCII characters, one per account and request. A retry repeats it.",
    ),
]


def _example(**fields: Any) -> ConfigDict:
    return ConfigDict(json_schema_extra={"examples": [fields]})


class _Body(BaseModel):
    # A misspelled count must not become a zero: unknown fields are refused.
    model_config = ConfigDict(extra="forbid", strict=True, use_enum_values=True)


class _Pools(_Body):
    """What the provider counted, in pools that exclude one another; reasoning is a part of the output."""

    input_tokens: _Tokens = 0
    cached_input_tokens: _Tokens = 0
    cache_write_tokens: _Tokens = 0
    output_tokens: _Tokens = 0
    reasoning_tokens: _Tokens = 0

    @model_validator(mode="after")
    def _reasoning_is_output(self) -> Self:
        if self.reasoning_tokens > self.output_tokens:
            raise ValueError("reasoning_tokens cannot exceed output_tokens")
        return self


class _Images(_Body):
    image_count: Annotated[int, Field(ge=0, le=usage.MAX_IMAGES)] = 0
    image_size: _ImageWord = ""
    image_quality: _ImageWord = ""


class _Links(_Body):
    project_id: _Id | None = None
    content_id: _Id | None = None
    chat_id: _Id | None = None
    metadata: _Metadata = {}


class _Payer(_Body):
    """Who pays: the personal account of a user, or any account."""

    account_id: Annotated[_Id | None, Field(description="This account pays.")] = None
    user_id: Annotated[
        _Id | None, Field(description="Instead of account_id: the user's personal account pays.", validate_default=True)
    ] = None

    @field_validator("user_id")
    @classmethod
    def _one_payer(cls, user_id: int | None, info: ValidationInfo) -> int | None:
        if (user_id is None) == (info.data.get("account_id") is None):
            raise ValueError("send either user_id or account_id")
        return user_id


class _Party(_Payer):
    """Who pays, and who acted."""

    actor_id: Annotated[_Id | None, Field(description="The user who acted; with a team's account it must be said.")] = (
        None
    )


class QuoteRequest(_Images, _Payer):
    """A text operation names its tokens, an image operation its images."""

    model_config = _example(user_id=1, provider="openai", model="gpt-6-luna", input_tokens=400, max_output_tokens=600)

    provider: _ProviderName
    model: _ModelName
    input_tokens: _Tokens = 0
    max_output_tokens: _Tokens = 0


class ReservationRequest(QuoteRequest, _Party, _Links):
    """What is to be held: `tokens` themselves, or what a quote for these counts says."""

    model_config = _example(
        user_id=1, operation_type="chat", provider="openai", model="gpt-6-luna", input_tokens=400, max_output_tokens=600
    )

    operation_type: _OperationTypeName
    tokens: Annotated[int, Field(ge=1, le=ledger.MAX_TOKENS)] | None = None
    lifetime_seconds: Annotated[int, Field(ge=1, le=MAX_RESERVATION_SECONDS)] | None = None

    @model_validator(mode="after")
    def _tokens_or_counts(self) -> Self:
        if self.tokens is not None and (self.input_tokens or self.max_output_tokens):
            raise ValueError("send either tokens, or input_tokens and max_output_tokens")
        return self


class SettleRequest(_Pools):
    model_config = _example(input_tokens=400, output_tokens=250, duration_ms=1800)

    image_count: Annotated[int, Field(ge=1, le=usage.MAX_IMAGES, description="How many came, if fewer.")] | None = None
    is_estimated: StrictBool = False
    duration_ms: _DurationMs | None = None


class ReleaseRequest(_Body):
    model_config = _example(error_message="The provider did not answer.")

    error_message: Annotated[_Text, Field(max_length=2_000)] = ""
    duration_ms: _DurationMs | None = None


class UsageRequest(_Pools, _Images, _Links, _Party):
    model_config = _example(
        user_id=1, operation_type="chat", provider="openai", model="gpt-6-luna", input_tokens=1000, output_tokens=500
    )

    operation_type: _OperationTypeName
    provider: _ProviderName
    model: _ModelName
    success: StrictBool = True
    error_message: Annotated[_Text, Field(max_length=2_000)] = ""
    duration_ms: _DurationMs | None = None


IMAGE_FIELDS = set(_Images.model_fields)
PAYER_FIELDS = {"user_id", "account_id"}
LINK_FIELDS = set(_Links.model_fields)
POOL_FIELDS = set(_Pools.model_fields)


# --- What is answered ---------------------------------------------------------------------------------------

# To the microsecond, unlike Django's JSON: what was answered can be sent back as `since` and finds the same entries.
_Stamp = Annotated[
    datetime,
    PlainSerializer(lambda moment: moment.astimezone(UTC).isoformat().replace("+00:00", "Z"), return_type=str),
    WithJsonSchema({"type": "string", "format": "date-time"}, mode="serialization"),
]


class Balance(BaseModel):
    account_id: int
    user_id: int | None = Field(description="Whose account it is; null: a team's.")
    balance_tokens: int = Field(description="Tokens owned; negative while there is a debt.")
    reserved_tokens: int = Field(description="The part held by operations that are running.")
    available_tokens: int = Field(
        description="What a new operation may reserve: balance − reserved, without what has ended."
    )
    status: AccountStatus

    @classmethod
    def of(cls, account: TokenAccount) -> Self:
        return cls(
            account_id=account.pk,
            user_id=account.user_id,
            balance_tokens=account.balance,
            reserved_tokens=account.reserved,
            available_tokens=account.available,
            status=AccountStatus(account.status),
        )


class Lot(BaseModel):
    """Tokens with an end, a part of the balance. What ends soonest is spent first; bought tokens never end."""

    kind: LotKind
    given_tokens: int
    remaining_tokens: int = Field(description="What is left, held by running operations or not.")
    expires_at: _Stamp = Field(description="From this moment on they cannot be spent.")


class BalanceWithLots(Balance):
    lots: list[Lot] = Field(description="Those that have not ended, in the order of spending.")

    @classmethod
    def of(cls, account: TokenAccount) -> Self:
        lots = [
            Lot(
                kind=lot.kind,
                given_tokens=lot.given_tokens,
                remaining_tokens=lot.remaining_tokens,
                expires_at=lot.expires_at,
            )
            for lot in account.live_lots
        ]
        return cls(**Balance.of(account).model_dump(), lots=lots)


class Quote(BaseModel):
    max_billable_tokens: int = Field(description="The most that the operation can cost; a reservation holds it.")
    available_tokens: int
    missing_tokens: int
    fits: bool = Field(description="Whether a reservation would be accepted now.")


class UsageItem(BaseModel):
    """One AI operation."""

    model_config = ConfigDict(from_attributes=True)

    usage_id: int = Field(validation_alias="pk")
    account_id: int = Field(description="Who paid.")
    user_id: int = Field(description="Who acted.")
    status: UsageStatus
    operation_type: OperationType
    provider: Provider
    model: str
    input_tokens: int
    cached_input_tokens: int
    cache_write_tokens: int
    output_tokens: int
    reasoning_tokens: int
    image_count: int
    image_size: str
    image_quality: str
    actual_tokens: int = Field(description="What the provider counted.")
    billable_tokens: int = Field(description="What the user was charged.")
    reserved_tokens: int | None = Field(description="The hold; null when recorded after the fact.")
    unbilled_tokens: int = Field(description="Used beyond the hold, not charged.")
    charge_type: ChargeType
    multiplier: Decimal | None = Field(description="Text: charged is ceil(actual_tokens × multiplier).")
    fixed_cost_tokens: int | None = Field(description="Images: the cost of one.")
    is_estimated: bool
    is_free: bool = Field(description="Recorded while billing was switched off; nothing was charged.")
    error_message: str
    duration_ms: int | None
    project_id: int | None
    content_id: int | None
    chat_id: int | None
    metadata: dict[str, Any]
    created_at: _Stamp
    completed_at: _Stamp | None
    expires_at: _Stamp | None


class Outcome(BaseModel):
    """The operation as it now stands, and the account with it."""

    usage: UsageItem
    account: Balance

    @classmethod
    def of(cls, posting: ledger.Posting) -> Self:
        usage_id = cast(int, posting.usage_id)  # every call here is about an operation
        return cls(
            usage=UsageItem.model_validate(TokenUsage.objects.get(pk=usage_id)),
            account=Balance(
                account_id=posting.account_id,
                user_id=posting.user_id,
                balance_tokens=posting.balance_tokens,
                reserved_tokens=posting.reserved_tokens,
                available_tokens=posting.available_tokens,
                status=AccountStatus(posting.status),
            ),
        )


class UsagePage(BaseModel):
    items: list[UsageItem]
    next_cursor: int | None = Field(description="Send it as `cursor` for the next page; null on the last one.")

    @classmethod
    def of(cls, rows: list[TokenUsage], *, limit: int) -> Self:
        """The page of the first `limit` rows; one more in `rows` says that there is a next page."""
        items = [UsageItem.model_validate(row) for row in rows[:limit]]
        return cls(items=items, next_cursor=items[-1].usage_id if len(rows) > limit else None)


class TransactionItem(BaseModel):
    """One entry of the ledger: a change of the balance."""

    model_config = ConfigDict(from_attributes=True)

    transaction_id: int = Field(validation_alias="pk")
    sequence: int = Field(description="1 for the account's first entry, and on without a gap.")
    type: TransactionType
    amount_tokens: int = Field(validation_alias="amount", description="Positive: a credit. Negative: a debit.")
    balance_before_tokens: int = Field(validation_alias="balance_before")
    balance_after_tokens: int = Field(validation_alias="balance_after")
    description: str
    usage_id: int | None = Field(description="The AI operation that was paid.")
    purchase_id: int | None
    paid_cents: int | None = Field(description="What was paid, or went back, in cents of `currency`.")
    currency: Currency | None
    created_at: _Stamp

    @field_validator("currency", mode="before")
    @classmethod
    def _none_is_null(cls, value: str) -> str | None:
        return value or None


class TransactionPage(BaseModel):
    items: list[TransactionItem]
    next_cursor: int | None = Field(description="Send it as `cursor` for the next page; null on the last one.")

    @classmethod
    def of(cls, rows: list[TokenTransaction], *, limit: int) -> Self:
        """The page of the first `limit` rows; one more in `rows` says that there is a next page."""
        items = [TransactionItem.model_validate(row) for row in rows[:limit]]
        return cls(items=items, next_cursor=items[-1].sequence if len(rows) > limit else None)


class PackageItem(BaseModel):
    """A package on sale."""

    package_id: int
    name: str
    description: str
    features: list[str]
    tokens: int
    price_cents: int
    is_popular: bool
    savings_percent: int = Field(description="By how much a token is cheaper than in the smallest package.")

    @classmethod
    def of(cls, offer: Offer) -> Self:
        package = offer.package
        return cls(
            package_id=package.pk,
            name=package.name,
            description=package.description,
            features=package.features,
            tokens=package.tokens,
            price_cents=offer.price_cents,
            is_popular=package.is_popular,
            savings_percent=offer.savings_percent,
        )


class PackageList(BaseModel):
    currency: Currency = Field(description="Of all prices in the list.")
    items: list[PackageItem]
