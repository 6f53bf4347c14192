"""For the platform's other servers: balances, quotes, reservations, usage."""

from django.conf import settings
from django.http import HttpRequest
from ninja import Router, Status

from accounts import teams
from billing import ledger, usage
from billing.api.access import BillingSecret
from billing.api.problems import EVERY_BODY, refusals
from billing.api.schemas import (
    IMAGE_FIELDS,
    LINK_FIELDS,
    PAYER_FIELDS,
    POOL_FIELDS,
    AddressId,
    BalanceWithLots,
    IdempotencyKey,
    Outcome,
    PageSize,
    Quote,
    QuoteRequest,
    ReleaseRequest,
    ReservationRequest,
    SettleRequest,
    UsagePage,
    UsageRequest,
)
from billing.models.usage import OperationType, UsageStatus
from billing.pricing import TokenPools
from billing.usage import after_debit

_NO_BODY = ReleaseRequest()
_MODEL_REFUSED = ("unknown_model", "retired_model", "unpriced_model")

router = Router(auth=BillingSecret(), tags=["Services"])


@router.get(
    "/accounts/{user_id}/balance",
    response=BalanceWithLots,
    openapi_extra=refusals("invalid_request", "account_not_found"),
)
def get_balance(request: HttpRequest, user_id: AddressId) -> BalanceWithLots:
    """What the user owns, what is held, what is available. A hint: only a reservation decides."""
    return BalanceWithLots.of(ledger.get_account(user_id=user_id))


@router.get(
    "/token-accounts/{account_id}/balance",
    response=BalanceWithLots,
    openapi_extra=refusals("invalid_request", "account_not_found"),
)
def get_account_balance(request: HttpRequest, account_id: AddressId) -> BalanceWithLots:
    """The same of any account, such as a team's."""
    return BalanceWithLots.of(ledger.get_account(account_id=account_id))


@router.post(
    "/quotes",
    response=Quote,
    openapi_extra=refusals(*EVERY_BODY, "invalid_usage", "account_not_found", *_MODEL_REFUSED),
)
def make_quote(request: HttpRequest, body: QuoteRequest) -> Quote:
    """The most that an operation can cost now, and whether the payer can afford it. Holds nothing."""
    account = ledger.get_account(**body.model_dump(include=PAYER_FIELDS))
    priced = usage.price_operation(operation_type=OperationType.GENERATION, **body.model_dump(include=_PRICED_FIELDS))
    tokens, is_free = _quoted_tokens(priced.operation, body), priced.operation.is_free
    missing_tokens = 0 if is_free else max(0, tokens - account.available)
    return Quote(
        max_billable_tokens=tokens,
        available_tokens=account.available,
        missing_tokens=missing_tokens,
        fits=account.may_operate(is_free=is_free) and not missing_tokens,
    )


@router.post(
    "/reservations",
    response={200: Outcome, 201: Outcome},
    openapi_extra=refusals(
        *EVERY_BODY,
        "invalid_usage",
        "invalid_amount",
        "insufficient_tokens",
        "account_not_active",
        "account_not_found",
        "actor_required",
        "idempotency_conflict",
        *_MODEL_REFUSED,
    ),
)
def reserve(request: HttpRequest, body: ReservationRequest, idempotency_key: IdempotencyKey) -> Status:
    """Hold the most that an operation can cost, before it runs.

    Answers 201, and 200 when this key did it before: then do not run the operation again. A hold that is
    neither settled nor released in time expires.
    """
    account = ledger.get_account(**body.model_dump(include=PAYER_FIELDS))
    asked_for = body.model_dump(exclude_defaults=True)
    posting = ledger.find_reservation(
        account_id=account.pk, actor_id=body.actor_id, idempotency_key=idempotency_key, request=asked_for
    )
    if posting is None:
        if account.user_id is None and body.actor_id not in teams.member_ids(account.workspace):
            raise ledger.ActorRequired
        operation = usage.price_operation(
            **body.model_dump(include=_PRICED_FIELDS | LINK_FIELDS | {"operation_type"})
        ).operation
        posting = ledger.reserve_tokens(
            account_id=account.pk,
            actor_id=body.actor_id,
            tokens=body.tokens or _quoted_tokens(operation, body),
            operation=operation,
            idempotency_key=idempotency_key,
            lifetime_seconds=body.lifetime_seconds or settings.RESERVATION_SECONDS,
            request=asked_for,
        )
    return Status(200 if posting.is_replay else 201, Outcome.of(posting))


@router.post(
    "/reservations/{usage_id}/settle",
    response=Outcome,
    openapi_extra=refusals(*EVERY_BODY, "invalid_usage", "usage_not_found", "usage_already_closed"),
)
def settle(request: HttpRequest, usage_id: AddressId, body: SettleRequest) -> Outcome:
    """Charge what the operation used, at most its hold, and give back the rest. Twice changes nothing."""
    pools = TokenPools(**body.model_dump(include=POOL_FIELDS))
    posting = usage.settle_reservation(
        usage_id=usage_id, pools=pools, **body.model_dump(include={"image_count", "is_estimated", "duration_ms"})
    )
    after_debit.follow_debit(posting)
    return Outcome.of(posting)


@router.post(
    "/reservations/{usage_id}/release",
    response=Outcome,
    openapi_extra=refusals(*EVERY_BODY, "usage_not_found", "usage_already_closed"),
)
def release(request: HttpRequest, usage_id: AddressId, body: ReleaseRequest = _NO_BODY) -> Outcome:
    """Give back the whole hold: the operation failed and costs nothing. Twice changes nothing."""
    return Outcome.of(ledger.release_usage(usage_id=usage_id, **body.model_dump()))


@router.post(
    "/usage",
    response={200: Outcome, 201: Outcome},
    openapi_extra=refusals(
        *EVERY_BODY,
        "invalid_usage",
        "invalid_amount",
        "account_not_found",
        "actor_required",
        "idempotency_conflict",
        "unknown_model",
        "unpriced_model",
    ),
)
def record_usage(request: HttpRequest, body: UsageRequest, idempotency_key: IdempotencyKey) -> Status:
    """Record an operation that has already run and charge it; a failed one is recorded and costs nothing.

    May leave a debt, which suspends the account. Answers 201, and 200 when this key did it before.
    """
    posting = usage.record_usage(**body.model_dump(), idempotency_key=idempotency_key)
    after_debit.follow_debit(posting)
    return Status(200 if posting.is_replay else 201, Outcome.of(posting))


@router.get(
    "/accounts/{user_id}/usage",
    response=UsagePage,
    openapi_extra=refusals("invalid_request", "unknown_cursor", "account_not_found"),
)
def list_usage(
    request: HttpRequest,
    user_id: AddressId,
    cursor: AddressId | None = None,
    limit: PageSize = 25,
    operation_type: OperationType | None = None,
    status: UsageStatus | None = None,
) -> UsagePage:
    """What the user's personal account paid for, newest first."""
    rows = usage.get_user_usage(
        user_id=user_id, operation_type=operation_type, status=status, before_id=cursor, limit=limit + 1
    )
    return UsagePage.of(rows, limit=limit)


@router.get(
    "/token-accounts/{account_id}/usage",
    response=UsagePage,
    openapi_extra=refusals("invalid_request", "unknown_cursor", "account_not_found"),
)
def list_account_usage(
    request: HttpRequest,
    account_id: AddressId,
    cursor: AddressId | None = None,
    limit: PageSize = 25,
    actor_id: AddressId | None = None,
    operation_type: OperationType | None = None,
    status: UsageStatus | None = None,
) -> UsagePage:
    """What any account, such as a team's, paid for, newest first; with `actor_id` what one user did of it."""
    rows = usage.get_user_usage(
        account_id=account_id, actor_id=actor_id, operation_type=operation_type, status=status, before_id=cursor,
        limit=limit + 1,
    )  # fmt: skip
    return UsagePage.of(rows, limit=limit)


_PRICED_FIELDS = {"provider", "model"} | IMAGE_FIELDS


def _quoted_tokens(operation: ledger.Operation, body: QuoteRequest) -> int:
    pools = TokenPools(input_tokens=body.input_tokens, output_tokens=body.max_output_tokens)
    if operation.fixed_cost_tokens is None and pools.actual_tokens == 0:
        raise usage.InvalidUsage("Say how many input_tokens and max_output_tokens the operation may use.")
    return operation.billable_tokens(pools)
