"""The only code that writes a balance, a reservation or a ledger row (law 1).

Every operation is one SQL statement: it locks the account's row, checks, writes the account, the operation and the
ledger row, and returns what happened. Standing alone it commits by itself; inside the caller's `atomic()` it commits
with it. Either all of it is there afterwards or nothing, so a crash on any line leaves the books whole. The statement
computes from the row it has locked: take the FOR UPDATE away and two operations spend the same tokens
(tests/concurrency shows it). What is left of the account's lots stands on that row, too; which of them pays, and what
of them ends, `billing_move_lots` decides (migration 0026): the one that ends soonest, then in the order of `LotKind`,
then the older, then plain tokens.

Locks are taken in one order: purchase, account, operation.
"""

from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from functools import partial
from hashlib import sha256
from typing import Any, cast

import structlog
from django.core.serializers.json import DjangoJSONEncoder
from django.db import IntegrityError, connection, transaction

from accounts import mailboxes
from accounts.models import User, Workspace
from billing.catalogue import system_settings
from billing.ledger import statements, welcome
from billing.ledger.posting import leave_lost_connection, post, post_once
from billing.ledger.types import (
    MAX_TOKENS,
    WELCOME_BONUS_KEY,
    AccountNotActive,
    AccountNotFound,
    ActorRequired,
    BalanceCheck,
    IdempotencyConflict,
    InsufficientTokens,
    InvalidAmount,
    InvalidExpiry,
    LedgerError,
    Operation,
    Party,
    Posting,
    Type,
    UsageAlreadyClosed,
    UsageNotFound,
)
from billing.models import TokenAccount, TokenTransaction, TokenUsage
from billing.models.account import WithheldBonus
from billing.models.fields import ClockTimestamp
from billing.models.lot import LotKind
from billing.models.system_settings import DisposableBonus
from billing.pricing import TokenPools
from kit import database
from kit.database import DATABASE_AWAY, repeated_after_conflicts

logger = structlog.get_logger(__name__)

__all__ = [
    "MAX_TOKENS",
    "WELCOME_BONUS_KEY",
    "AccountNotActive",
    "AccountNotFound",
    "ActorRequired",
    "BalanceCheck",
    "IdempotencyConflict",
    "InsufficientTokens",
    "InvalidAmount",
    "InvalidExpiry",
    "LedgerError",
    "Operation",
    "Party",
    "Posting",
    "UsageAlreadyClosed",
    "UsageNotFound",
    "add_tokens",
    "check_balance",
    "deduct_tokens",
    "expire_lots",
    "expire_reservations",
    "extend_reservation",
    "find_recorded",
    "find_reservation",
    "get_account",
    "has_had_bonus",
    "initialize_account",
    "note_use",
    "open_team_account",
    "outcome_of",
    "record_unpaid",
    "release_usage",
    "reserve_tokens",
    "settle_usage",
]


# --- Accounts -------------------------------------------------------------------------------------------------------


@repeated_after_conflicts
def initialize_account(*, user_id: int, may_be_disposable: bool = False) -> TokenAccount:
    """Open the user's account and give the welcome bonus, each once, however often and in parallel it is called.

    The bonus waits until the e-mail address is verified where that is required; call again then. It comes once for a
    mailbox, too, whoever has it now and however its address is spelled, and to disposable addresses as the settings
    say, unless an admin lets it through: `may_be_disposable`. `bonus_withheld` of the account says why there is none.
    """
    with transaction.atomic():
        account = _locked_account(user_id)
        _give_welcome_bonus(account, may_be_disposable=may_be_disposable)
        account.refresh_from_db()
    return account


def _locked_account(user_id: int) -> TokenAccount:
    locked = TokenAccount.objects.select_for_update()
    if (account := locked.filter(user_id=user_id).first()) is None:
        workspace = Workspace.objects.filter(owner_id=user_id).order_by("id").first()
        if workspace is None:
            raise AccountNotFound("There is no such user.")
        TokenAccount.objects.bulk_create([TokenAccount(user_id=user_id, workspace=workspace)], ignore_conflicts=True)
        account = locked.get(user_id=user_id)
    return account


def _give_welcome_bonus(account: TokenAccount, *, may_be_disposable: bool) -> None:
    """In the transaction that holds the account's lock: entry, marks and state are all there afterwards, or none."""
    addresses = User.objects.get(pk=account.user_id or 0).proven_addresses
    if not addresses:
        return
    if has_had_bonus(account):
        welcome.remember(addresses)  # an address that was added since
        return
    settings = system_settings.get_system_settings()
    if not settings.welcome_bonus_tokens:
        return
    try:
        withheld = _withheld_bonus(
            addresses, DisposableBonus.GIVE if may_be_disposable else settings.welcome_bonus_disposable
        )
    except welcome.KeyLost:
        logger.exception("No welcome bonus is given", user_id=account.user_id)
        return
    if withheld != account.bonus_withheld:
        TokenAccount.objects.filter(pk=account.pk).update(bonus_withheld=withheld)
    if not withheld:
        add_tokens(
            account_id=account.pk,
            tokens=settings.welcome_bonus_tokens,
            type=Type.BONUS,
            description="Welcome bonus",
            idempotency_key=WELCOME_BONUS_KEY,
            expires_at=database.now() + timedelta(days=days) if (days := settings.welcome_bonus_days) else None,
            lot_kind=LotKind.BONUS,
        )


def has_had_bonus(account: TokenAccount) -> bool:
    """Whether the welcome bonus is in the account's ledger, or was refused since its owner had it elsewhere."""
    given = TokenTransaction.objects.filter(account=account, idempotency_key=WELCOME_BONUS_KEY)
    return account.bonus_withheld == WithheldBonus.GIVEN_BEFORE or given.exists()


def _withheld_bonus(addresses: set[str], for_disposable: str) -> str:
    """Why there is no bonus for these addresses; "" when there is: then they have had it from now on."""
    if (
        for_disposable != DisposableBonus.GIVE
        and all(map(mailboxes.is_disposable, addresses))
        and not welcome.had_bonus(addresses)
    ):
        return WithheldBonus.WAITS if for_disposable == DisposableBonus.WAIT else WithheldBonus.DISPOSABLE
    return "" if welcome.claim(addresses) else WithheldBonus.GIVEN_BEFORE


def get_account(*, user_id: int | None = None, account_id: int | None = None) -> TokenAccount:
    """The account, or the user's own; the latter is opened now when sign-up was interrupted before it was. Raises
    AccountNotFound."""
    payer = Party(user_id=user_id, account_id=account_id)
    account = TokenAccount.objects.filter(**payer.of_account).first()
    if account is None and user_id is None:
        raise AccountNotFound("There is no such token account.")
    return account or initialize_account(user_id=cast(int, user_id))


def open_team_account(*, workspace_id: int) -> TokenAccount:
    """The account of a team's workspace, made if there is none; however often and in parallel it is called."""
    if not Workspace.objects.filter(pk=workspace_id, kind=Workspace.Kind.TEAM).exists():
        raise AccountNotFound("There is no such team.")
    TokenAccount.objects.bulk_create([TokenAccount(workspace_id=workspace_id)], ignore_conflicts=True)
    return TokenAccount.objects.get(workspace_id=workspace_id)


def check_balance(*, user_id: int | None = None, account_id: int | None = None, tokens: int) -> BalanceCheck:
    """Whether `tokens` are available now. A hint for pages: only `reserve_tokens` decides."""
    _require_amount(tokens)
    available_tokens = get_account(user_id=user_id, account_id=account_id).available
    return BalanceCheck(available_tokens >= tokens, available_tokens, max(0, tokens - available_tokens))


# --- Reserve, settle, release ---------------------------------------------------------------------------------------


def reserve_tokens(
    *,
    user_id: int | None = None,
    account_id: int | None = None,
    actor_id: int | None = None,
    api_key_id: int | None = None,
    tokens: int,
    operation: Operation,
    idempotency_key: str,
    lifetime_seconds: int,
    request: Mapping[str, Any] | None = None,
    read_pools: TokenPools | None = None,
    provider_cost_microusd: int = 0,
) -> Posting:
    """Hold `tokens`, the most the operation can cost, until it is settled, released, or `lifetime_seconds` are over.

    The account of `account_id` pays, or the personal one of `user_id`; `actor_id` acts with the key `api_key_id`, and
    without it the account's own user. So it is with each function here that takes these.

    Writes the operation's `TokenUsage` row. Raises InsufficientTokens, AccountNotActive, AccountNotFound,
    ActorRequired, InvalidAmount, or IdempotencyConflict when the key stands for something else. With a key used before
    for the same, the first reservation is returned with `is_replay`: do not run the operation again.

    `request` is what the person or service asked for, when tokens and prices were worked out from it: a retry after
    a change of price is still the same request. A free operation holds nothing, whatever `tokens` says.

    `read_pools` and `provider_cost_microusd` are what the provider will have read and cost us as soon as it is asked,
    by our own count. They stand on the row from now on, so that a crash cannot lose them (law 9): whoever closes the
    operation puts what is known better in their place, and the expiry of the hold leaves them.
    """
    if operation.is_free:
        tokens = 0
    else:
        _require_amount(tokens)
    party = Party(user_id, account_id, actor_id, api_key_id)
    fingerprint = _fingerprint(kind="reserve", request=request or {"tokens": tokens, "operation": _fields(operation)})
    parameters = (
        _usage_parameters(operation, read_pools or TokenPools(), idempotency_key, fingerprint)
        | _fields(party)
        | {
            "status": TokenUsage.Status.RESERVED,
            "provider_cost_microusd": provider_cost_microusd,
            "is_estimated": read_pools is not None,
            "billable_tokens": 0,
            "reserved_tokens": tokens,
            "lifetime_seconds": lifetime_seconds,
            "type": "",
            "paid_cents": None,
        }
    )
    return post_once(
        statements.RESERVE,
        parameters,
        partial(_replayed_usage, party, idempotency_key, fingerprint),
        needed_tokens=tokens,
    )


def find_reservation(
    *,
    user_id: int | None = None,
    account_id: int | None = None,
    actor_id: int | None = None,
    idempotency_key: str,
    request: Mapping[str, Any],
) -> Posting | None:
    """What `reserve_tokens` did with this key and `request` before, or None.

    To be asked before prices are worked out anew: a retry must not fail because its model was retired or the balance
    spent in the meantime. Raises IdempotencyConflict when the key stands for something else.
    """
    party = Party(user_id, account_id, actor_id)
    return _replayed_usage(party, idempotency_key, _fingerprint(kind="reserve", request=request))


def extend_reservation(*, usage_id: int, tokens: int) -> Posting:
    """Hold `tokens` more for an operation that is running and needs more than was held at first.

    No balance moves, so there is no ledger row (laws 1 and 4 hold as with `reserve_tokens`); whoever dies afterwards
    leaves a larger hold, which expires as the smaller one would have. Raises InsufficientTokens, AccountNotActive,
    UsageAlreadyClosed, UsageNotFound; then the hold is as it was.
    """
    _require_amount(tokens)
    usage = _get_usage(usage_id)
    parameters = _payer_of(usage) | {
        "usage_id": usage_id,
        "tokens": tokens,
        "type": "",
        "paid_cents": None,
    }
    try:
        return post(statements.EXTEND, parameters, needed_tokens=tokens)
    except (InsufficientTokens, AccountNotActive):
        _require_open(_get_usage(usage_id))
        raise


def settle_usage(
    *,
    usage_id: int,
    pools: TokenPools,
    image_count: int | None = None,
    is_estimated: bool = False,
    provider_cost_microusd: int = 0,
    duration_ms: int | None = None,
    error_message: str = "",
) -> Posting:
    """Charge what the operation cost, at most what was reserved (law 5), and give the rest of the hold back.

    What was used beyond the quote is kept as `unbilled_tokens`. `image_count` is how many images came, when they are
    fewer than were asked for. Settling twice changes nothing and returns the first outcome. Raises
    UsageAlreadyClosed after a release or an expiry, UsageNotFound.
    """
    usage = _get_usage(usage_id)
    if image_count is not None:
        usage.image_count = min(image_count, usage.image_count)
    parameters = (
        dict(statements.NO_ENTRY)
        | _fields(pools)
        | _payer_of(usage)
        | {
            "usage_id": usage_id,
            "image_count": usage.image_count,
            "actual_tokens": pools.actual_tokens,
            "billable_tokens": _operation_of(usage).billable_tokens(pools),
            "provider_cost_microusd": provider_cost_microusd,
            "is_estimated": is_estimated,
            "error_message": error_message,
            "duration_ms": duration_ms,
            "description": f"{usage.get_operation_type_display()} · {usage.model}",
        }
    )
    return _close(statements.SETTLE, parameters, closed_as=TokenUsage.Status.SUCCEEDED)


def release_usage(
    *,
    usage_id: int,
    status: str = TokenUsage.Status.FAILED,
    error_message: str = "",
    provider_cost_microusd: int | None = None,
    duration_ms: int | None = None,
) -> Posting:
    """Give the whole hold back: the operation failed or expired and costs its user nothing (law 9).

    `provider_cost_microusd` is what it cost us; None leaves what was noted when it began. Releasing twice changes
    nothing. Raises UsageAlreadyClosed when it was settled, UsageNotFound.
    """
    usage = _get_usage(usage_id)
    parameters = _payer_of(usage) | {
        "usage_id": usage_id,
        "status": status,
        "provider_cost_microusd": provider_cost_microusd,
        "error_message": error_message,
        "duration_ms": duration_ms,
        "type": "",
        "paid_cents": None,
    }
    return _close(statements.RELEASE, parameters, closed_as=status)


def expire_reservations(*, limit: int = 1_000) -> int:
    """Release the reservations whose time is over by the database's clock, oldest first. Returns how many.

    Their process died, or could not reach the database any more. Nothing of what they made is known, so their users
    pay nothing; what they have cost us, as far as it was noted, stays on their rows (law 9) and is logged.
    """
    with connection.cursor() as cursor:
        cursor.execute(
            """SELECT id FROM billing_tokenusage
                WHERE status = 'reserved' AND expires_at < clock_timestamp()
                ORDER BY expires_at LIMIT %s""",
            [limit],
        )
        usage_ids = [usage_id for (usage_id,) in cursor.fetchall()]
    expired = 0
    for usage_id in usage_ids:
        try:
            posting = release_usage(
                usage_id=usage_id,
                status=TokenUsage.Status.EXPIRED,
                error_message="The operation did not finish in time. Nothing was charged.",
            )
        except UsageAlreadyClosed:  # it finished between the look and the lock
            continue
        if not posting.is_replay:
            expired += 1
            logger.warning(
                "An operation was cut off and its hold expired", usage_id=usage_id, account_id=posting.account_id
            )
    return expired


def note_use(*, usage_id: int, pools: TokenPools, provider_cost_microusd: int) -> None:
    """Note what a running operation has used so far and cost us, as `reserve_tokens` does for its beginning.

    No balance and no hold moves. Nothing happens when it is closed.
    """
    TokenUsage.objects.filter(pk=usage_id, status=TokenUsage.Status.RESERVED).update(
        **{name: getattr(pools, name) for name in statements.COUNTS},
        provider_cost_microusd=provider_cost_microusd,
        is_estimated=True,
    )


def _close(statement: statements.Statement, parameters: Mapping[str, Any], *, closed_as: str) -> Posting:
    try:
        return post(statement, parameters)
    except (InsufficientTokens, AccountNotActive, *DATABASE_AWAY) as error:
        # Closing never lacks tokens: the statement found no open hold, so somebody closed it before. Perhaps it was
        # this call, whose connection was lost before the answer came.
        leave_lost_connection(error)
        usage = _get_usage(parameters["usage_id"])
        if usage.status == closed_as:
            return _replay(usage)
        _require_open(usage)
        raise


def _require_open(usage: TokenUsage) -> None:
    if usage.status != TokenUsage.Status.RESERVED:
        raise UsageAlreadyClosed(
            f"This operation was already closed as {usage.get_status_display().lower()}."
        ) from None


# --- Debits and credits ---------------------------------------------------------------------------------------------


def deduct_tokens(
    *,
    user_id: int | None = None,
    account_id: int | None = None,
    actor_id: int | None = None,
    api_key_id: int | None = None,
    tokens: int,
    type: str = Type.USAGE,
    operation: Operation | None = None,
    pools: TokenPools | None = None,
    idempotency_key: str | None = None,
    may_leave_debt: bool = False,
    is_estimated: bool = False,
    provider_cost_microusd: int = 0,
    duration_ms: int | None = None,
    purchase_id: int | None = None,
    admin_id: int | None = None,
    paid_cents: int | None = None,
    currency: str = "",
    stripe_payment_intent_id: str | None = None,
    description: str = "",
    metadata: Mapping[str, Any] | None = None,
    request: Mapping[str, Any] | None = None,
) -> Posting:
    """Lower the balance by `tokens`, and append the ledger row.

    With `operation` it also writes the `TokenUsage` row of something that has already run (`type` usage needs it). A
    debit is refused with InsufficientTokens unless it `may_leave_debt` (after-the-fact usage, clawbacks): then the
    account is suspended until the debt is paid. Lots pay first, what ends soonest before the others; a clawback
    (`type` refund) takes plain tokens first. Debits are recorded for suspended and blocked accounts too.
    `request` is what was asked for under the key, when tokens and prices were worked out from it.
    """
    _require_amount(tokens)
    fingerprint = _fingerprint(kind="record", request=request) if request is not None else _fingerprint(
        kind="deduct", tokens=tokens, type=type, operation=operation and _fields(operation), purchase_id=purchase_id,
        admin_id=admin_id, pools=pools and _fields(pools), description=description,
    )  # fmt: skip
    party = Party(user_id, account_id, actor_id, api_key_id)
    parameters: dict[str, Any] = (
        dict(statements.NO_ENTRY)
        | _fields(party)
        | {
            "tokens": tokens,
            "may_leave_debt": may_leave_debt,
            "type": type,
            "purchase_id": purchase_id,
            "admin_id": admin_id,
            "paid_cents": paid_cents,
            "currency": currency,
            "stripe_payment_intent_id": stripe_payment_intent_id,
            "description": description,
            "metadata": _metadata(metadata),
        }
    )
    if operation is None:
        parameters |= {"entry_key": idempotency_key, "entry_fingerprint": fingerprint}
        replay = partial(_replayed_transaction, party, idempotency_key, fingerprint)
        statement = statements.CLAW_BACK if type == Type.REFUND else statements.DEBIT_OR_CREDIT
        return post_once(statement, parameters, replay, needed_tokens=tokens)
    # The operation's row carries the key; the ledger row hangs on it by a unique reference.
    operation_label = TokenUsage.OperationType(operation.operation_type).label
    parameters |= _usage_parameters(operation, pools or TokenPools(), idempotency_key, fingerprint) | {
        "status": TokenUsage.Status.SUCCEEDED,
        "billable_tokens": tokens,
        "reserved_tokens": None,
        "lifetime_seconds": None,
        "is_estimated": is_estimated,
        "provider_cost_microusd": provider_cost_microusd,
        "duration_ms": duration_ms,
        "description": description or f"{operation_label} · {operation.model}",
    }
    replay = partial(_replayed_usage, party, idempotency_key, fingerprint)
    return post_once(statements.DEBIT_WITH_USAGE, parameters, replay, needed_tokens=tokens)


def record_unpaid(
    *,
    user_id: int | None = None,
    account_id: int | None = None,
    actor_id: int | None = None,
    api_key_id: int | None = None,
    operation: Operation,
    pools: TokenPools,
    idempotency_key: str,
    request: Mapping[str, Any],
    status: str,
    error_message: str = "",
    provider_cost_microusd: int = 0,
    duration_ms: int | None = None,
) -> Posting:
    """Record an operation that has already run and costs its user nothing: it failed (law 9), or is free.

    No balance moves, so there is no ledger row. `request` and the key are those of `deduct_tokens`. Raises
    AccountNotFound, ActorRequired, IdempotencyConflict.
    """
    account = get_account(user_id=user_id, account_id=account_id)
    actor_id = actor_id or account.user_id
    if actor_id is None or account.user_id not in (None, actor_id):
        raise ActorRequired(is_team=account.user_id is None)
    party = Party(account_id=account.pk, actor_id=actor_id, api_key_id=api_key_id)
    fingerprint = _fingerprint(kind="record", request=request)
    fields = _usage_parameters(operation, pools, idempotency_key, fingerprint) | {
        "status": status,
        "billable_tokens": 0,
        "reserved_tokens": None,
        "provider_cost_microusd": provider_cost_microusd,
        "duration_ms": duration_ms,
    }
    try:
        with transaction.atomic():
            usage = TokenUsage.objects.create(
                account=account,
                user_id=actor_id,
                api_key_id=api_key_id,
                workspace_id=account.workspace_id,
                error_message=error_message,
                metadata=dict(operation.metadata),
                completed_at=ClockTimestamp(),
                **{name: fields[name] for name in statements.NEW_USAGE_COLUMNS},
            )
    except IntegrityError:
        outcome = _replayed_usage(party, idempotency_key, fingerprint)
        if outcome is None:
            raise
        return outcome
    return outcome_of(account, None, usage.pk, is_replay=False)


def find_recorded(
    *,
    user_id: int | None = None,
    account_id: int | None = None,
    actor_id: int | None = None,
    idempotency_key: str,
    request: Mapping[str, Any],
) -> Posting | None:
    """What `deduct_tokens` or `record_unpaid` did with this key and `request` before, or None. To be asked when
    `find_reservation` is, and raises the same."""
    party = Party(user_id, account_id, actor_id)
    return _replayed_usage(party, idempotency_key, _fingerprint(kind="record", request=request))


def add_tokens(
    *,
    user_id: int | None = None,
    account_id: int | None = None,
    actor_id: int | None = None,
    api_key_id: int | None = None,
    tokens: int,
    type: str,
    description: str,
    idempotency_key: str,
    purchase_id: int | None = None,
    admin_id: int | None = None,
    paid_cents: int | None = None,
    currency: str = "",
    stripe_payment_intent_id: str | None = None,
    metadata: Mapping[str, Any] | None = None,
    expires_at: datetime | None = None,
    lot_kind: LotKind = LotKind.GRANT,
    from_lots: Mapping[int, int] | None = None,
) -> Posting:
    """Raise the balance by `tokens` and append the ledger row: a purchase, a grant, a bonus, a clawback given back.

    With `expires_at` they are a lot of `lot_kind`, spent before plain tokens and gone at that moment; one that is no
    moment to come raises InvalidExpiry. A debt is paid out of it first. `from_lots` says of tokens given back what
    had been taken from which lot ({lot id: tokens}): they return there, and as plain tokens where the lot has ended.

    Money arriving is recorded whatever the account's status (law 12); a debt's suspension lifts itself once the
    balance is positive again. The same key and contents give the first outcome again, other contents raise
    IdempotencyConflict. A second credit for one payment intent or one purchase raises IntegrityError: the caller
    holds the purchase's lock and has looked.
    """
    _require_amount(tokens)
    fingerprint = _fingerprint(
        kind="add", tokens=tokens, type=type, purchase_id=purchase_id, admin_id=admin_id, paid_cents=paid_cents,
        currency=currency, stripe_payment_intent_id=stripe_payment_intent_id, description=description,
        **({"expires_at": expires_at.astimezone(UTC).isoformat(), "lot_kind": lot_kind} if expires_at else {}),
    )  # fmt: skip
    party = Party(user_id, account_id, actor_id, api_key_id)
    parameters = (
        dict(statements.NO_ENTRY)
        | _fields(party)
        | {
            "tokens": -tokens,
            "may_leave_debt": True,  # a credit never makes one
            "type": type,
            "purchase_id": purchase_id,
            "admin_id": admin_id,
            "paid_cents": paid_cents,
            "currency": currency,
            "stripe_payment_intent_id": stripe_payment_intent_id,
            "entry_key": idempotency_key,
            "entry_fingerprint": fingerprint,
            "description": description,
            "metadata": _metadata(metadata),
        }
    )
    replay = partial(_replayed_transaction, party, idempotency_key, fingerprint)
    if expires_at is None and not from_lots:
        return post_once(statements.DEBIT_OR_CREDIT, parameters, replay)
    parameters["tokens"] = tokens
    if expires_at is None:
        ranks = {kind.value: kind.rank for kind in LotKind}
        parameters |= {"from_lots": _json(from_lots), "lot_ranks": _json(ranks)}
        return post_once(statements.GIVE_BACK, parameters, replay)
    if expires_at <= database.now():
        if (earlier := replay()) is not None:
            return earlier
        raise InvalidExpiry("The end of these tokens must lie in the future.")
    parameters |= {"lot_kind": lot_kind.value, "lot_rank": lot_kind.rank, "lot_expires_at": expires_at}
    try:
        return post_once(statements.ADD_LOT, parameters, replay)
    except IntegrityError as error:
        if "lot_ends_after_it_began" in str(error):  # while it waited for the account's lock
            raise InvalidExpiry("The end of these tokens must lie in the future.") from error
        raise


def expire_lots(*, limit: int = 1_000) -> list[Posting]:
    """Book away what is left of the lots that have ended (law 15), the longest ended first, of `limit` accounts at
    most. Returns a posting for each.

    One ledger row for each lot, also when two sweeps or a settlement meet: each statement of the ledger books what it
    finds ended. What a running operation still holds stays with it, and the last one to close books the rest. An
    account that cannot be booked is logged, and the others go on.
    """
    now = database.now()
    ended = TokenAccount.objects.filter(next_lot_ends_at__lte=now).order_by("next_lot_ends_at").only("lots")
    postings: list[Posting] = []
    for account in ended.iterator():
        if len(postings) == limit:
            break
        try:
            if any(lot.expires_at <= now and not lot.held_tokens for lot in account.lot_balances):
                postings.append(
                    post(statements.EXPIRE, _fields(Party(account_id=account.pk)) | {"type": "", "paid_cents": None})
                )
        except DATABASE_AWAY:
            raise
        except Exception:
            logger.exception("What has ended of an account's lots cannot be booked", account_id=account.pk)
    return postings


# --- Helpers --------------------------------------------------------------------------------------------------------


def _require_amount(tokens: Any) -> None:
    # `True` is an int to Python and 1.5 an int to an IntegerField: neither is an amount.
    if type(tokens) is not int or not 0 < tokens <= MAX_TOKENS:
        raise InvalidAmount(f"The number of tokens must be a whole number from 1 to {MAX_TOKENS:,}.")


def _fields(instance: Operation | TokenPools | Party) -> dict[str, Any]:
    # Flat, unlike `asdict`, which copies deeply and costs as much as the database's part of a debit.
    return {name: getattr(instance, name) for name in type(instance).__slots__}


_json = DjangoJSONEncoder(sort_keys=True).encode


def _metadata(value: Mapping[str, Any] | None) -> str:
    return _json(value) if value else "{}"


def _fingerprint(**request: Any) -> str:
    """Of what is asked for under a key: it stands beside the key, and tells a repetition from another wish (law 8)."""
    return sha256(_json(request).encode()).hexdigest()


def _usage_parameters(
    operation: Operation, pools: TokenPools, idempotency_key: str | None, fingerprint: str
) -> dict[str, Any]:
    return _fields(pools) | {
        "operation_type": operation.operation_type,
        "provider": operation.provider,
        "model": operation.model,
        "image_count": operation.image_count,
        "image_size": operation.image_size,
        "image_quality": operation.image_quality,
        "actual_tokens": pools.actual_tokens,
        "charge_type": operation.charge_type,
        "multiplier": operation.multiplier,
        "fixed_cost_tokens": operation.fixed_cost_tokens,
        "provider_cost_microusd": 0,
        "is_estimated": False,
        "is_free": operation.is_free,
        "duration_ms": None,
        "idempotency_key": idempotency_key,
        "request_fingerprint": fingerprint,
        "project_id": operation.project_id,
        "content_id": operation.content_id,
        "chat_id": operation.chat_id,
        "usage_metadata": _metadata(operation.metadata),
    }


def _operation_of(usage: TokenUsage) -> Operation:
    """The operation with the prices it began with (law 11)."""
    return Operation(
        operation_type=usage.operation_type,
        provider=usage.provider,
        model=usage.model,
        multiplier=usage.multiplier,
        fixed_cost_tokens=usage.fixed_cost_tokens,
        image_count=usage.image_count,
        image_size=usage.image_size,
        image_quality=usage.image_quality,
        is_free=usage.is_free,
    )


def _get_usage(usage_id: int) -> TokenUsage:
    usage = TokenUsage.objects.select_related("account").filter(pk=usage_id).first()
    if usage is None:
        raise UsageNotFound("There is no such operation.")
    return usage


def _payer_of(usage: TokenUsage) -> dict[str, Any]:
    """Who acted stands on its row."""
    return {"account_id": usage.account_id, "user_id": None}


def _replayed_usage(party: Party, idempotency_key: str | None, fingerprint: str) -> Posting | None:
    usage = (
        TokenUsage.objects.select_related("account").filter(**party.of_rows, idempotency_key=idempotency_key).first()
    )
    if idempotency_key is None or usage is None:  # without a key, Django would look for rows without one
        return None
    party.require_same_actor(usage)
    if usage.request_fingerprint != fingerprint:
        raise IdempotencyConflict
    return _replay(usage)


def _replayed_transaction(party: Party, idempotency_key: str | None, fingerprint: str) -> Posting | None:
    entry = (
        TokenTransaction.objects.select_related("account")
        .filter(**party.of_rows, idempotency_key=idempotency_key)
        .first()
    )
    if idempotency_key is None or entry is None:
        return None
    party.require_same_actor(entry)
    if entry.request_fingerprint != fingerprint:
        raise IdempotencyConflict
    return outcome_of(entry.account, entry)


def _replay(usage: TokenUsage) -> Posting:
    entry = TokenTransaction.objects.filter(usage=usage).first()
    return outcome_of(usage.account, entry, usage_id=usage.pk)


def outcome_of(
    account: TokenAccount, entry: TokenTransaction | None, usage_id: int | None = None, *, is_replay: bool = True
) -> Posting:
    """What the operation or the ledger row `entry` left, as a posting."""
    return Posting(
        account_id=account.pk,
        user_id=account.user_id,
        amount_tokens=entry.amount if entry else 0,
        balance_tokens=entry.balance_after if entry else account.balance,
        reserved_tokens=account.reserved,
        available_tokens=(entry.balance_after if entry else account.balance) - account.reserved - account.ended_tokens,
        status=account.status,
        usage_id=usage_id or (entry.usage_id if entry else None),
        transaction_id=entry.pk if entry else None,
        is_replay=is_replay,
    )
