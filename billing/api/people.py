"""For people's own programs: what they have, what became of it, and what more costs. They only read."""

from ninja import Router

from accounts.models import ApiKey
from billing import history, ledger, usage
from billing.api.access import PersonalKey, PersonRequest
from billing.api.problems import refusals
from billing.api.schemas import (
    AddressId,
    BalanceWithLots,
    Moment,
    PackageItem,
    PackageList,
    PageSize,
    TransactionPage,
    UsagePage,
)
from billing.catalogue import packages
from billing.models.fields import Currency
from billing.models.transaction import TransactionType
from billing.models.usage import OperationType, UsageStatus

router = Router(tags=["People"])


@router.get(
    "/balance",
    auth=PersonalKey(ApiKey.Scope.BALANCE_READ),
    response=BalanceWithLots,
    openapi_extra=refusals("missing_scope"),
)
def get_own_balance(request: PersonRequest) -> BalanceWithLots:
    """What you own, what running operations hold, what is available. Scope `balance:read`."""
    return BalanceWithLots.of(ledger.get_account(user_id=request.auth.pk))


@router.get(
    "/transactions",
    auth=PersonalKey(ApiKey.Scope.TRANSACTIONS_READ),
    response=TransactionPage,
    openapi_extra=refusals("invalid_request", "missing_scope"),
)
def list_own_transactions(
    request: PersonRequest,
    type: TransactionType | None = None,
    since: Moment | None = None,
    until: Moment | None = None,
    cursor: AddressId | None = None,
    limit: PageSize = 25,
) -> TransactionPage:
    """Every change of your balance, newest first. Scope `transactions:read`.

    `since` is included, `until` is not; both are moments with their zone, such as `2026-11-21T09:30:00Z`.
    """
    rows = history.get_transactions(
        user_id=request.auth.pk, type=type, since=since, until=until, before_sequence=cursor, limit=limit + 1
    )
    return TransactionPage.of(rows, limit=limit)


@router.get(
    "/usage",
    auth=PersonalKey(ApiKey.Scope.USAGE_READ),
    response=UsagePage,
    openapi_extra=refusals("invalid_request", "unknown_cursor", "missing_scope"),
)
def list_own_usage(
    request: PersonRequest,
    cursor: AddressId | None = None,
    limit: PageSize = 25,
    operation_type: OperationType | None = None,
    status: UsageStatus | None = None,
) -> UsagePage:
    """Your AI operations, newest first. Scope `usage:read`."""
    rows = usage.get_user_usage(
        user_id=request.auth.pk, operation_type=operation_type, status=status, before_id=cursor, limit=limit + 1
    )
    return UsagePage.of(rows, limit=limit)


@router.get(
    "/packages",
    auth=PersonalKey(ApiKey.Scope.PACKAGES_READ),
    response=PackageList,
    openapi_extra=refusals("invalid_request", "missing_scope"),
)
def list_packages(request: PersonRequest, currency: Currency | None = None) -> PackageList:
    """The packages on sale, in `currency` or else in your account's. Scope `packages:read`."""
    chosen = currency or Currency(ledger.get_account(user_id=request.auth.pk).currency)
    if currency is None and chosen not in packages.list_currencies():
        chosen = Currency.USD
    return PackageList(currency=chosen, items=[PackageItem.of(offer) for offer in packages.list_offers(chosen)])
