"""Everybody's accounts as admins see them: found, sorted, and suspended, blocked or reactivated by superadmins."""

import json
from base64 import urlsafe_b64decode, urlsafe_b64encode
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Literal, cast, get_args

from django.db import transaction
from django.db.models import F, Max, OuterRef, Q, QuerySet, Subquery, Value
from django.db.models.functions import Coalesce

from accounts import audit, roles, teams
from accounts.models import User
from billing.catalogue import system_settings
from billing.ledger import Party
from billing.models import Purchase, SystemSettings, TokenAccount
from billing.models.account import AVAILABLE_TOKENS
from billing.models.account import AccountStatus as Status
from billing.models.fields import ClockTimestamp
from billing.notifications import messages
from kit.refusal import Refusal
from kit.text import one_line, read_id

MAX_REASON_LENGTH = 200
RESERVED_REASONS = (TokenAccount.DEBT, TokenAccount.ANONYMISED, TokenAccount.CLOSED)
HIGH_BALANCE_FACTOR = 100  # of the low balance: 100,000 tokens by default

Band = Literal["debt", "critical", "low", "healthy", "high"]
Sort = Literal["balance", "usage", "last_purchase", "joined"]


class AccountError(Refusal):
    """Refused; nothing was changed. `message` is for the person."""


class StatusNotAllowed(AccountError):
    """Not by this person; the attempt is in the audit log."""

    http_status = 403


class StatusNotPossible(AccountError):
    """The account or the reason does not allow it."""


class InvalidSearch(AccountError):
    """An unknown filter, or the address of a page that does not exist."""


# --- Status ---------------------------------------------------------------------------------------------------------


def suspend_account(
    *, superadmin: User, user_id: int | None = None, account_id: int | None = None, reason: str
) -> TokenAccount:
    """No new operation starts until a superadmin reactivates the account; a payment does not (law 12).

    Running operations settle, and money arriving is recorded. Raises StatusNotAllowed, StatusNotPossible.
    """
    return _set_status(superadmin, Party(user_id, account_id), Status.SUSPENDED, reason)


def block_account(
    *, superadmin: User, user_id: int | None = None, account_id: int | None = None, reason: str
) -> TokenAccount:
    """As `suspend_account`, for good."""
    return _set_status(superadmin, Party(user_id, account_id), Status.BLOCKED, reason)


def reactivate_account(
    *, superadmin: User, user_id: int | None = None, account_id: int | None = None, reason: str
) -> TokenAccount:
    """Take a suspension or a block back. With a debt the account stays suspended for that, until it is paid."""
    return _set_status(superadmin, Party(user_id, account_id), Status.ACTIVE, reason)


def _set_status(superadmin: User, payer: Party, status: Status, reason: str) -> TokenAccount:
    reason = clean_reason(reason)
    actor = roles.find_superadmin(superadmin.pk)
    found = TokenAccount.objects.select_related("workspace").filter(**payer.of_account).first()
    if actor is None or (found is not None and actor.pk in teams.member_ids(found.workspace)):
        audit.write_refusal(
            action=audit.Action.ACCOUNT_STATUS,
            summary=f"Was refused to make an account {status}",
            actor=superadmin,
            subject_id=found.user_id if found else None,
        )
        whose = "Only superadmins change" if actor is None else "Nobody changes"
        raise StatusNotAllowed(f"{whose} the status of {'an account' if actor is None else 'their own account'}.")
    with transaction.atomic():
        # The ledger's lock: whether there is a debt must not change between the look and the write.
        account = TokenAccount.objects.select_for_update().filter(**payer.of_account).first()
        if account is None:
            raise StatusNotPossible("There is no such token account.")
        if account.status_reason in (TokenAccount.ANONYMISED, TokenAccount.CLOSED):
            raise StatusNotPossible(f"This account was {account.status_reason} and stays blocked for ever.")
        if status == Status.BLOCKED and account.user_id is not None:
            try:
                teams.require_no_last_owner(user_id=account.user_id, who="They are")
            except teams.TeamError as error:
                raise StatusNotPossible(error.message) from error
        before = {"status": account.status, "status_reason": account.status_reason}
        kept_reason = reason
        if status == Status.ACTIVE:
            if account.status == Status.ACTIVE or account.has_debt:
                raise StatusNotPossible(
                    "The account is open." if account.status == Status.ACTIVE else "It opens when the debt is paid."
                )
            # Law 4: a debt suspends. Law 12: such a suspension lifts itself, so it bears the debt's own reason.
            has_debt = account.available < 0
            status, kept_reason = (Status.SUSPENDED, TokenAccount.DEBT) if has_debt else (Status.ACTIVE, "")
        elif (account.status, account.status_reason) == (status, reason):
            return account
        TokenAccount.objects.filter(pk=account.pk).update(
            status=status, status_reason=kept_reason, status_changed_at=ClockTimestamp()
        )
        account.refresh_from_db()
        entry = audit.write(
            action=audit.Action.ACCOUNT_STATUS,
            summary=f"Account made {account.status}" + (", for its debt" if account.has_debt else ""),
            actor=actor,
            subject_id=account.user_id,
            about=("account", account.pk),
            before=before,
            after={"status": account.status, "status_reason": account.status_reason},
            reason=reason,
        )
        messages.account_status_changed(account, reason=reason, key=str(entry.pk))
    return account


def clean_reason(reason: str) -> str:
    """One line of readable text. Raises StatusNotPossible."""
    reason = one_line(reason)
    if not reason or reason.casefold() in RESERVED_REASONS:
        # Law 12: a suspension with the reason of a debt would lift itself with the next payment.
        raise StatusNotPossible("Enter a reason, in words of your own.")
    if len(reason) > MAX_REASON_LENGTH:
        raise StatusNotPossible(f"Enter a reason of at most {MAX_REASON_LENGTH} characters.")
    return reason


# --- Search ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class AccountFilter:
    """Which accounts. `search` is a part of an e-mail address or name, of a person or a team, a user's id, or an id of
    Stripe's."""

    search: str = ""
    status: str = ""
    band: str = ""


@dataclass(frozen=True, slots=True)
class AccountPage:
    """Accounts with `user`, `workspace` and `last_purchase_at`; `next_cursor` leads on, empty at the end."""

    accounts: list[TokenAccount]
    next_cursor: str


def get_user_accounts(
    *,
    search: str = "",
    status: str = "",
    band: str = "",
    sort: str = "-balance",
    cursor: str = "",
    limit: int = 50,
) -> AccountPage:
    """Find accounts, a page at a time. `sort` is one of Sort, with "-" for the largest or newest first.

    There is no index on balance or usage (they would slow each debit): the accounts are sorted as they are found.
    Raises InvalidSearch.
    """
    name = sort.removeprefix("-")
    if name not in get_args(Sort):
        raise InvalidSearch("There is no such order.")
    found = filter_accounts(AccountFilter(search=search, status=status, band=band))
    is_descending = sort.startswith("-")
    key, found = _with_sort_key(found, cast(Sort, name))
    if cursor:
        value, account_id = _read_cursor(cursor, is_time=name in ("last_purchase", "joined"))
        beyond = "lt" if is_descending else "gt"
        found = found.filter(Q(**{f"{key}__{beyond}": value}) | Q(**{key: value, f"pk__{beyond}": account_id}))
    order = [F(each).desc() if is_descending else F(each).asc() for each in (key, "pk")]
    # By id first, the rest for the page alone: what is sorted stays narrow.
    rows = list(found.order_by(*order).values_list("pk", key)[: limit + 1])
    is_more = len(rows) > limit
    rows = rows[:limit]
    accounts = _in_order([pk for pk, _ in rows])
    return AccountPage(accounts, _write_cursor(rows[-1][1], rows[-1][0]) if is_more else "")


def filter_accounts(filter: AccountFilter) -> QuerySet[TokenAccount]:
    """The accounts that a filter names, in no order. Raises InvalidSearch."""
    accounts = TokenAccount.objects.all()
    if filter.status:
        if filter.status not in Status.values:
            raise InvalidSearch("There is no such status.")
        accounts = accounts.filter(status=filter.status)
    if filter.band:
        accounts = accounts.annotate(available_tokens=AVAILABLE_TOKENS).filter(_in_band(filter.band))
    search = filter.search.strip()
    if search:
        accounts = accounts.filter(_matches(search)) if search.isprintable() else accounts.none()
    return accounts


def bands(settings: SystemSettings) -> dict[Band, tuple[int | None, int | None]]:
    """Each band's available tokens: from (included) and to (not included); None means unbounded."""
    critical, low = settings.critical_balance_tokens, settings.low_balance_tokens + 1
    high = max(low, HIGH_BALANCE_FACTOR * settings.low_balance_tokens)
    return {
        "debt": (None, 0),
        "critical": (0, critical),
        "low": (critical, low),
        "healthy": (low, high),
        "high": (high, None),
    }


def _in_band(band: str) -> Q:
    bounds = bands(system_settings.get_system_settings())
    if band not in bounds:
        raise InvalidSearch("There is no such range of balances.")
    low, high = bounds[band]
    condition = Q() if low is None else Q(available_tokens__gte=low)
    return condition if high is None else condition & Q(available_tokens__lt=high)


def _matches(search: str) -> Q:
    if search.startswith("cus_"):
        return Q(stripe_customer_id=search)
    if search.startswith(("pi_", "cs_")):
        payment = Q(stripe_payment_intent_id=search) | Q(stripe_session_id=search)
        return Q(pk__in=list(Purchase.objects.filter(payment).values_list("account_id", flat=True)))
    matches = Q(user__email__icontains=search) | Q(user__name__icontains=search)
    matches |= Q(user=None, workspace__name__icontains=search) | Q(user=None, billing_email__icontains=search)
    if (user_id := read_id(search)) is not None:
        matches |= Q(user_id=user_id)
    return matches


_LONG_AGO = datetime(1970, 1, 1, tzinfo=UTC)


def _with_sort_key(accounts: QuerySet[TokenAccount], name: Sort) -> tuple[str, QuerySet[TokenAccount]]:
    if name == "last_purchase":
        return "sort_key", accounts.annotate(sort_key=Coalesce(_last_purchase_at(), Value(_LONG_AGO)))
    fields = {"balance": "balance", "usage": "lifetime_used_tokens", "joined": "created_at"}
    return fields[name], accounts


def _last_purchase_at() -> Subquery:
    paid = Purchase.objects.filter(account=OuterRef("pk"), state=Purchase.State.PAID).order_by().values("account")
    return Subquery(paid.annotate(newest=Max("paid_at")).values("newest"))


def _in_order(account_ids: list[int]) -> list[TokenAccount]:
    accounts = TokenAccount.objects.select_related("user", "workspace", "auto_recharge_package").annotate(
        last_purchase_at=_last_purchase_at()
    )
    by_id = accounts.in_bulk(account_ids)
    return [by_id[pk] for pk in account_ids if pk in by_id]


def _write_cursor(value: int | datetime, account_id: int) -> str:
    text = value.isoformat() if isinstance(value, datetime) else value
    return urlsafe_b64encode(json.dumps([text, account_id]).encode()).decode()


def _read_cursor(cursor: str, *, is_time: bool) -> tuple[int | datetime, int]:
    try:
        value, account_id = json.loads(urlsafe_b64decode(cursor.encode()))
        value = datetime.fromisoformat(value) if is_time else value
        numbers = [account_id] if is_time else [account_id, value]
        if any(type(number) is not int or abs(number) >= 2**63 for number in numbers):
            raise InvalidSearch("There is no such page.")
        if is_time and value.tzinfo is None:
            raise InvalidSearch("There is no such page.")
    except (ValueError, TypeError, RecursionError) as error:
        raise InvalidSearch("There is no such page.") from error
    return value, account_id
