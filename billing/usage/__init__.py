"""What AI operations used: recording what another server has already run, and reading what a user ran."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from django.db.models import Q, QuerySet

from accounts.models import User
from billing import catalogue, ledger
from billing.catalogue import system_settings
from billing.models import ModelPrice, TokenTransaction, TokenUsage
from billing.pricing import MAX_POOL_TOKENS, TokenPools

MAX_IMAGES = 1_000  # of one operation, far above any model's

MAX_PAGE = 100


class InvalidUsage(ledger.LedgerError):
    """What is said to have been used contradicts itself, or the model."""

    code = "invalid_usage"


class UnknownCursor(ledger.LedgerError):
    code = "unknown_cursor"


@dataclass(frozen=True, slots=True)
class PricedOperation:
    """An operation at the prices of now, and the catalogue's row they came from."""

    operation: ledger.Operation
    price: ModelPrice

    def provider_cost_microusd(self, pools: TokenPools) -> int:
        return catalogue.provider_cost_microusd(
            self.price,
            pools,
            image_count=self.operation.image_count,
            image_size=self.operation.image_size,
            image_quality=self.operation.image_quality,
        )


def price_operation(
    *,
    operation_type: str,
    provider: str,
    model: str,
    image_count: int = 0,
    image_size: str = "",
    image_quality: str = "",
    project_id: int | None = None,
    content_id: int | None = None,
    chat_id: int | None = None,
    metadata: Mapping[str, Any] | None = None,
    is_already_done: bool = False,
) -> PricedOperation:
    """Take the operation's price from the catalogue and the settings: a multiplier, or tokens per image.

    A retired model has a price only for what `is_already_done`. Raises UnknownModel, RetiredModel, UnpricedModel, and
    InvalidUsage when images are asked of a text model or none of an image model.
    """
    find = catalogue.get_model if is_already_done else catalogue.get_active_model
    price = find(provider=provider, model=model)
    is_image = price.kind == ModelPrice.Kind.IMAGE
    if is_image and not 0 < image_count <= MAX_IMAGES:
        raise InvalidUsage(f"{price.display_name} makes images: their number must be from 1 to {MAX_IMAGES:,}.")
    if not is_image and image_count:
        raise InvalidUsage(f"{price.display_name} writes text: the number of images must be 0.")
    settings = system_settings.get_system_settings()
    operation = ledger.Operation(
        operation_type=operation_type,
        provider=provider,
        model=price.model,
        multiplier=None if is_image else catalogue.multiplier(price, settings),
        fixed_cost_tokens=(
            catalogue.image_cost_tokens(price, settings, size=image_size, quality=image_quality) if is_image else None
        ),
        image_count=image_count,
        image_size=image_size,
        image_quality=image_quality,
        project_id=project_id,
        content_id=content_id,
        chat_id=chat_id,
        metadata=metadata or {},
        is_free=not settings.billing_enabled,
    )
    return PricedOperation(operation, price)


# --- Records ------------------------------------------------------------------------------------------------

_PRICED_BY = (
    "operation_type", "provider", "model", "image_count", "image_size", "image_quality", "project_id", "content_id",
    "chat_id", "metadata",
)  # fmt: skip


def record_usage(
    *,
    user_id: int | None = None,
    account_id: int | None = None,
    actor_id: int | None = None,
    api_key_id: int | None = None,
    operation_type: str,
    provider: str,
    model: str,
    input_tokens: int,
    output_tokens: int,
    cached_input_tokens: int = 0,
    cache_write_tokens: int = 0,
    reasoning_tokens: int = 0,
    image_count: int = 0,
    image_size: str = "",
    image_quality: str = "",
    success: bool = True,
    error_message: str = "",
    idempotency_key: str,
    project_id: int | None = None,
    content_id: int | None = None,
    chat_id: int | None = None,
    metadata: Mapping[str, Any] | None = None,
    duration_ms: int | None = None,
) -> ledger.Posting:
    """Record an operation that another server has already run, and charge it at the prices of now. Who pays and who
    acted is said as to the ledger.

    Token counts are the provider's, in pools that do not overlap (`reasoning_tokens` is a part of
    `output_tokens`). The work has been done: it is charged also for a retired model and for a suspended
    account, and may leave a debt, which suspends the account. A failed operation is recorded and costs
    nothing (law 9). With a key used before for the same, the first outcome is returned with `is_replay`,
    whatever the prices are by now.

    Raises InvalidUsage, UnknownModel, UnpricedModel, AccountNotFound, ActorRequired, IdempotencyConflict; then nothing
    is written.
    """
    pools = TokenPools(
        input_tokens=input_tokens,
        cached_input_tokens=cached_input_tokens,
        cache_write_tokens=cache_write_tokens,
        output_tokens=output_tokens,
        reasoning_tokens=reasoning_tokens,
    )
    _require_sound(pools, operation_type=operation_type, success=success, error_message=error_message)
    account = ledger.get_account(user_id=user_id, account_id=account_id)
    party = ledger.Party(account_id=account.pk, actor_id=actor_id or account.user_id, api_key_id=api_key_id)
    if account.user_id is None and not User.objects.filter(pk=actor_id or 0).exists():
        raise ledger.ActorRequired
    requested = {
        "status": TokenUsage.Status.SUCCEEDED if success else TokenUsage.Status.FAILED,
        "operation_type": operation_type,
        "provider": provider,
        "model": model,
        "input_tokens": input_tokens,
        "cached_input_tokens": cached_input_tokens,
        "cache_write_tokens": cache_write_tokens,
        "output_tokens": output_tokens,
        "reasoning_tokens": reasoning_tokens,
        "image_count": image_count,
        "image_size": image_size,
        "image_quality": image_quality,
        "error_message": error_message,
        "project_id": project_id,
        "content_id": content_id,
        "chat_id": chat_id,
        "metadata": dict(metadata or {}),
        "duration_ms": duration_ms,
        "reserved_tokens": None,  # a reservation under this key is something else
    }
    try:
        first = ledger.find_recorded(
            account_id=account.pk, actor_id=party.actor_id, idempotency_key=idempotency_key, request=requested
        )
        return first or _record(party, requested, pools, idempotency_key)
    except ledger.IdempotencyConflict:
        usage = TokenUsage.objects.select_related("account").get(account=account, idempotency_key=idempotency_key)
        party.require_same_actor(usage)
        if not _is_same_by_fields(usage, requested):
            raise
        return ledger.outcome_of(usage.account, TokenTransaction.objects.filter(usage=usage).first(), usage.pk)


def _record(
    party: ledger.Party, requested: Mapping[str, Any], pools: TokenPools, idempotency_key: str
) -> ledger.Posting:
    priced = price_operation(**{name: requested[name] for name in _PRICED_BY}, is_already_done=True)
    is_success = requested["status"] == TokenUsage.Status.SUCCEEDED
    if is_success:
        _require_tokens_of_text(pools, priced.operation.fixed_cost_tokens)
    provider_cost_microusd = priced.provider_cost_microusd(pools)
    billable_tokens = priced.operation.billable_tokens(pools) if is_success else 0
    if not billable_tokens:
        return ledger.record_unpaid(
            account_id=party.account_id,
            actor_id=party.actor_id,
            api_key_id=party.api_key_id,
            operation=priced.operation,
            pools=pools,
            idempotency_key=idempotency_key,
            request=requested,
            status=requested["status"],
            error_message=requested["error_message"],
            provider_cost_microusd=provider_cost_microusd,
            duration_ms=requested["duration_ms"],
        )
    return ledger.deduct_tokens(
        account_id=party.account_id,
        actor_id=party.actor_id,
        api_key_id=party.api_key_id,
        tokens=billable_tokens,
        operation=priced.operation,
        pools=pools,
        idempotency_key=idempotency_key,
        request=requested,
        may_leave_debt=True,
        provider_cost_microusd=provider_cost_microusd,
        duration_ms=requested["duration_ms"],
    )


def _is_same_by_fields(usage: TokenUsage, requested: Mapping[str, Any]) -> bool:
    """Whether a row with another fingerprint is of the same request all the same.

    0.1 kept a fingerprint of what was charged, and an anonymised account's rows have none: needed until the first
    release that does not upgrade from 0.1. And the fingerprint has the model's name as it was sent: it is the same
    request by another of its names.
    """
    for name, value in requested.items():
        stored = getattr(usage, name)
        if name == "metadata":
            # As JSON, where `true` is not 1.
            stored, value = json.dumps(stored, sort_keys=True), json.dumps(value, sort_keys=True)
        if stored != value and not (name == "model" and stored == _name_of(usage.provider, value)):
            return False
    return True


def _require_tokens_of_text(pools: TokenPools, fixed_cost_tokens: int | None) -> None:
    if fixed_cost_tokens is None and pools.actual_tokens == 0:
        raise InvalidUsage("A successful text operation used at least one token.")


def _require_sound(pools: TokenPools, *, operation_type: str, success: bool, error_message: str) -> None:
    if operation_type not in TokenUsage.OperationType.values:
        raise InvalidUsage("There is no such type of operation.")
    counts = (
        pools.input_tokens,
        pools.cached_input_tokens,
        pools.cache_write_tokens,
        pools.output_tokens,
        pools.reasoning_tokens,
    )
    if any(type(count) is not int or not 0 <= count <= MAX_POOL_TOKENS for count in counts):
        raise InvalidUsage(f"Token counts must be whole numbers from 0 to {MAX_POOL_TOKENS:,}.")
    if pools.reasoning_tokens > pools.output_tokens:
        raise InvalidUsage("Reasoning tokens are a part of the output tokens and cannot exceed them.")
    if success and error_message:
        raise InvalidUsage("Only a failed operation has an error message.")


def _name_of(provider: str, model: str) -> str:
    try:
        return catalogue.find_model(provider=provider, model=model).model
    except catalogue.UnknownModel:
        return model


def settle_reservation(
    *,
    usage_id: int,
    pools: TokenPools,
    image_count: int | None = None,
    is_estimated: bool = False,
    duration_ms: int | None = None,
) -> ledger.Posting:
    """Settle what another server reserved, with what its provider counted.

    Charges at most the hold (law 5); what the provider charges us comes from the catalogue. `image_count` is how many
    images came, when they are fewer than were reserved. Settling twice changes nothing. Raises UsageNotFound,
    UsageAlreadyClosed, InvalidUsage.
    """
    usage = TokenUsage.objects.filter(pk=usage_id).first()
    if usage is None:
        raise ledger.UsageNotFound("There is no such operation.")
    _require_sound(pools, operation_type=usage.operation_type, success=True, error_message="")
    if usage.status == TokenUsage.Status.RESERVED:  # else the ledger tells what became of it
        if not usage.is_free:
            _require_tokens_of_text(pools, usage.fixed_cost_tokens)
        if image_count is not None and not 0 < image_count <= usage.image_count:
            raise InvalidUsage(f"{usage.image_count:,} images were reserved: fewer may come, not none and not more.")
    price = ModelPrice.objects.filter(provider=usage.provider, model=usage.model).first()
    return ledger.settle_usage(
        usage_id=usage_id,
        pools=pools,
        image_count=image_count,
        is_estimated=is_estimated,
        duration_ms=duration_ms,
        provider_cost_microusd=(
            catalogue.provider_cost_microusd(
                price,
                pools,
                image_count=usage.image_count if image_count is None else image_count,
                image_size=usage.image_size,
                image_quality=usage.image_quality,
            )
            if price
            else 0
        ),
    )


# --- Reads --------------------------------------------------------------------------------------------------


def get_user_usage(
    *,
    user_id: int | None = None,
    account_id: int | None = None,
    actor_id: int | None = None,
    operation_type: str | None = None,
    status: str | None = None,
    provider: str | None = None,
    model: str | None = None,
    since: datetime | None = None,
    until: datetime | None = None,
    before_id: int | None = None,
    after_id: int | None = None,
    limit: int = 25,
) -> list[TokenUsage]:
    """The operations that an account paid for, or the user's own; with `actor_id` what one person did of them. Newest
    first: at most `limit` (up to 101), from the one after `before_id` on.

    With `after_id` instead, those next to it that are newer. `since` (included) and `until` (not included) bound the
    time. Costs the same on every page, however long the history is. Raises AccountNotFound, and UnknownCursor when an
    id is no operation among these.
    """
    rows = all_rows = operations_of(ledger.get_account(user_id=user_id, account_id=account_id).pk, actor_id)
    if since is not None:
        rows = rows.filter(created_at__gte=since)
    if until is not None:
        rows = rows.filter(created_at__lt=until)
    if provider is not None:
        rows = rows.filter(provider=provider)
    if model is not None:
        rows = rows.filter(model=model)
    if operation_type is not None:
        rows = rows.filter(operation_type=operation_type)
    if status is not None:
        rows = rows.filter(status=status)
    count = max(1, min(limit, MAX_PAGE + 1))
    # The first condition bounds the index (account, created_at), the second parts rows of one moment.
    if after_id is not None:
        after_at = _moment_of(all_rows, after_id)
        rows = rows.filter(created_at__gte=after_at).exclude(Q(created_at=after_at, id__lte=after_id))
        return list(rows.order_by("created_at", "id")[:count])[::-1]
    if before_id is not None:
        before_at = _moment_of(all_rows, before_id)
        rows = rows.filter(created_at__lte=before_at).exclude(Q(created_at=before_at, id__gte=before_id))
    return list(rows.order_by("-created_at", "-id")[:count])


def operations_of(account_id: int, actor_id: int | None = None) -> QuerySet[TokenUsage]:
    """What the account paid for; with `actor_id` what one person did of it."""
    rows = TokenUsage.objects.filter(account_id=account_id)
    return rows if actor_id is None else rows.filter(user_id=actor_id)


def _moment_of(rows: QuerySet[TokenUsage], usage_id: int) -> datetime:
    moment = rows.filter(pk=usage_id).values_list("created_at", flat=True).first()
    if moment is None:
        raise UnknownCursor("There is no such page. Start again at the first one.")
    return moment
