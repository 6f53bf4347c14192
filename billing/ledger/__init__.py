"""The only code that writes a balance, a reservation or a ledger row (law 1).

Every operation is one SQL statement: it locks the account's row, checks, writes the account, the operation and the
ledger row, and returns what happened. Standing alone it commits by itself; inside the caller's `atomic()` it commits
with it. Either all of it is there afterwards or nothing, so a crash on any line leaves the books whole. The statement
computes from the row it has locked: take the FOR UPDATE away and two operations spend the same tokens
(tests/concurrency shows it).

Locks are taken in one order: purchase, account, operation.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from decimal import Decimal
from functools import partial
from hashlib import sha256
from typing import Any

import psycopg
import structlog
from django.core.serializers.json import DjangoJSONEncoder
from django.db import IntegrityError, connection, transaction
from psycopg.rows import namedtuple_row

from accounts import mailboxes
from accounts.models import User, Workspace
from billing import announcements
from billing.catalogue import system_settings
from billing.ledger import welcome
from billing.models import TokenAccount, TokenTransaction, TokenUsage
from billing.models.account import WithheldBonus
from billing.models.system_settings import DisposableBonus
from billing.pricing import (
    TokenPools,
    calculate_image_billable_tokens,
    calculate_llm_billable_tokens,
)
from kit.database import DATABASE_AWAY, repeated_after_conflicts
from kit.refusal import Refusal

logger = structlog.get_logger(__name__)

MAX_TOKENS = 10**15  # per posting; far above any sale, far below what a bigint sum can hold
WELCOME_BONUS_KEY = "welcome-bonus"

logger = structlog.get_logger(__name__)

Type = TokenTransaction.Type


class LedgerError(Refusal):
    """Refused; nothing was written. `message` is for the person, `http_status` for the API, `code` for programs."""

    code = "refused"


class InvalidAmount(LedgerError):
    code = "invalid_amount"


class AccountNotFound(LedgerError):
    http_status = 404
    code = "account_not_found"


class InsufficientTokens(LedgerError):
    """The available tokens do not cover the amount; `missing_tokens` says by how much."""

    http_status = 402
    code = "insufficient_tokens"

    def __init__(self, *, needed_tokens: int, available_tokens: int) -> None:
        self.needed_tokens = needed_tokens
        self.available_tokens = available_tokens
        self.missing_tokens = needed_tokens - available_tokens
        super().__init__(
            f"This needs {needed_tokens:,} tokens and {max(available_tokens, 0):,} are available: "
            f"{self.missing_tokens:,} are missing. Buy tokens and try again."
        )


class AccountNotActive(LedgerError):
    """The account is suspended or blocked: no new operation starts."""

    http_status = 403
    code = "account_not_active"

    def __init__(self, *, status: str, reason: str) -> None:
        self.status = status
        if reason == TokenAccount.DEBT:
            message = "The balance is below zero. Buy tokens to go on; they pay the debt first."
        else:
            message = f"This account is {status}. Contact support to have it reopened."
        super().__init__(message)


class IdempotencyConflict(LedgerError):
    http_status = 409
    code = "idempotency_conflict"

    def __init__(self) -> None:
        super().__init__("This idempotency key was used before with other contents. Use a new key.")


class UsageNotFound(LedgerError):
    http_status = 404
    code = "usage_not_found"


class UsageAlreadyClosed(LedgerError):
    """The reservation was already released or has expired; nothing is charged any more."""

    http_status = 409
    code = "usage_already_closed"


@dataclass(frozen=True, slots=True)
class Operation:
    """What an AI operation is, and the price that applies to it from beginning to end."""

    operation_type: str
    provider: str
    model: str
    multiplier: Decimal | None = None  # text: ceil(actual × multiplier)
    fixed_cost_tokens: int | None = None  # images: tokens per image
    image_count: int = 0
    image_size: str = ""
    image_quality: str = ""
    project_id: int | None = None
    content_id: int | None = None
    chat_id: int | None = None
    metadata: Mapping[str, Any] = field(default_factory=dict)
    is_free: bool = False  # billing is switched off: the operation is recorded and nothing is held or charged

    @property
    def charge_type(self) -> str:
        charge_type = TokenUsage.ChargeType
        return charge_type.MULTIPLIER if self.fixed_cost_tokens is None else charge_type.FIXED

    def billable_tokens(self, pools: TokenPools) -> int:
        """What the user pays for `pools` (text) or for the images, before the quote's ceiling."""
        if self.is_free:
            return 0
        if self.fixed_cost_tokens is not None:
            return calculate_image_billable_tokens(
                self.model, self.image_size, self.image_count, self.fixed_cost_tokens
            ).billable_tokens
        if self.multiplier is None:
            raise ValueError("A text operation needs a multiplier.")
        return calculate_llm_billable_tokens(
            pools.actual_tokens - pools.output_tokens, pools.output_tokens, self.multiplier
        ).billable_tokens


@dataclass(frozen=True, slots=True)
class Posting:
    """The outcome: the account right after it, and the rows that belong to it.

    `is_replay` says that the same key had done this before and nothing was written now.
    """

    account_id: int
    user_id: int
    amount_tokens: int  # signed change of the balance
    balance_tokens: int
    reserved_tokens: int
    status: str
    usage_id: int | None = None
    transaction_id: int | None = None
    is_replay: bool = False
    needs_recharge: bool = False  # auto-recharge is on and the available tokens are below its threshold

    @property
    def available_tokens(self) -> int:
        return self.balance_tokens - self.reserved_tokens


@dataclass(frozen=True, slots=True)
class BalanceCheck:
    has_enough: bool
    available_tokens: int
    missing_tokens: int


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
    addresses = User.objects.get(pk=account.user_id).proven_addresses
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
            user_id=account.user_id,
            tokens=settings.welcome_bonus_tokens,
            type=Type.BONUS,
            description="Welcome bonus",
            idempotency_key=WELCOME_BONUS_KEY,
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


def get_account(*, user_id: int) -> TokenAccount:
    """The user's account; opened now when sign-up was interrupted before it was."""
    account = TokenAccount.objects.filter(user_id=user_id).first()
    return account or initialize_account(user_id=user_id)


def check_balance(*, user_id: int, tokens: int) -> BalanceCheck:
    """Whether `tokens` are available now. A hint for pages: only `reserve_tokens` decides."""
    _require_amount(tokens)
    available_tokens = get_account(user_id=user_id).available
    return BalanceCheck(available_tokens >= tokens, available_tokens, max(0, tokens - available_tokens))


# --- The statement --------------------------------------------------------------------------------------------------
# Each operation puts its own `posting` between these parts: one row (the account as locked, `amount`,
# `reserved_change`, `usage_id`), or none when the operation is refused.

_LOCKED_ACCOUNT = """
WITH account AS MATERIALIZED (
    SELECT id, user_id, workspace_id, balance, reserved, sequence, status, status_reason
      FROM billing_tokenaccount
     WHERE user_id = %(user_id)s::bigint
       FOR UPDATE
)"""

_ENTRY = """, entry AS (
    INSERT INTO billing_tokentransaction (
        account_id, user_id, workspace_id, sequence, type, amount, balance_before, balance_after, usage_id,
        purchase_id, admin_id, paid_cents, currency, stripe_payment_intent_id,
        idempotency_key, request_fingerprint, description, metadata
    )
    SELECT id, user_id, workspace_id, sequence + 1, %(type)s::text, amount, balance, balance + amount, usage_id,
           %(purchase_id)s::bigint, %(admin_id)s::bigint, %(paid_cents)s::bigint, %(currency)s::text,
           %(stripe_payment_intent_id)s::text, %(entry_key)s::text, %(entry_fingerprint)s::text,
           %(description)s::text, %(metadata)s::jsonb
      FROM posting
     WHERE amount <> 0
    RETURNING id
)"""

_UPDATED_ACCOUNT = """, updated AS (
    UPDATE billing_tokenaccount AS target
       SET balance = posting.balance + amount,
           reserved = posting.reserved + reserved_change,
           sequence = posting.sequence + (amount <> 0)::int,
           lifetime_purchased_tokens = lifetime_purchased_tokens
               + CASE WHEN %(type)s::text IN ('purchase', 'auto_recharge') THEN amount ELSE 0 END,
           lifetime_granted_tokens = lifetime_granted_tokens
               + CASE WHEN %(type)s::text IN ('admin_grant', 'bonus') THEN amount ELSE 0 END,
           lifetime_used_tokens = lifetime_used_tokens
               - CASE WHEN %(type)s::text = 'usage' THEN amount ELSE 0 END,
           lifetime_spent_cents = lifetime_spent_cents + coalesce(%(paid_cents)s::bigint, 0),
           status = new.status,
           status_reason = CASE
               WHEN new.status = posting.status THEN posting.status_reason
               WHEN new.status = 'suspended' THEN 'debt'
               ELSE ''
           END,
           status_changed_at = CASE
               WHEN new.status = posting.status THEN status_changed_at ELSE clock_timestamp()
           END
      FROM posting
     CROSS JOIN LATERAL (
        SELECT CASE
            WHEN posting.status = 'active'
             AND posting.balance + amount < posting.reserved + reserved_change THEN 'suspended'
            WHEN posting.status = 'suspended' AND posting.status_reason = 'debt'
             AND posting.balance + amount > 0
             AND posting.balance + amount >= posting.reserved + reserved_change THEN 'active'
            ELSE posting.status
        END AS status
     ) AS new
     WHERE target.id = posting.id
    RETURNING target.balance, target.reserved, target.status,
              target.auto_recharge_enabled
              AND target.balance - target.reserved < target.auto_recharge_threshold_tokens AS needs_recharge
)"""

_OUTCOME = """
SELECT account.id AS account_id, account.user_id, account.balance, account.reserved, account.status,
       account.status_reason, updated.balance AS new_balance, updated.reserved AS new_reserved,
       updated.status AS new_status, updated.needs_recharge, posting.amount, posting.usage_id,
       entry.id AS transaction_id
  FROM account
  LEFT JOIN posting ON true
  LEFT JOIN updated ON true
  LEFT JOIN entry ON true
"""

_NEW_USAGE_COLUMNS = (
    "status", "operation_type", "provider", "model", "input_tokens", "cached_input_tokens", "cache_write_tokens",
    "output_tokens", "reasoning_tokens", "image_count", "image_size", "image_quality", "actual_tokens",
    "billable_tokens", "reserved_tokens", "charge_type", "multiplier", "fixed_cost_tokens", "provider_cost_microusd",
    "is_estimated", "is_free", "duration_ms", "idempotency_key", "request_fingerprint", "project_id", "content_id",
    "chat_id",
)  # fmt: skip
_TEXT_COLUMNS = {
    "status", "operation_type", "provider", "model", "image_size", "image_quality", "charge_type", "idempotency_key",
    "request_fingerprint",
}  # fmt: skip
_OTHER_COLUMN_TYPES = {"multiplier": "numeric", "is_estimated": "boolean", "is_free": "boolean", "image_count": "int"}


def _cast(column: str) -> str:
    return "text" if column in _TEXT_COLUMNS else _OTHER_COLUMN_TYPES.get(column, "bigint")


# The names above, no input.
_NEW_USAGE = f""", usage AS (
    INSERT INTO billing_tokenusage (
        account_id, user_id, workspace_id, {", ".join(_NEW_USAGE_COLUMNS)}, metadata, created_at, completed_at,
        expires_at
    )
    SELECT id, user_id, workspace_id, {", ".join(f"%({c})s::{_cast(c)}" for c in _NEW_USAGE_COLUMNS)},
           %(usage_metadata)s::jsonb, clock_timestamp(),
           CASE WHEN %(lifetime_seconds)s::int IS NULL THEN clock_timestamp() END,
           clock_timestamp() + %(lifetime_seconds)s::int * interval '1 second'
      FROM allowed
    RETURNING id AS usage_id
)"""  # noqa: S608 – our own names and constants, no input


@dataclass(frozen=True, slots=True)
class _Statement:
    """SQL whose `%(name)s` are turned into PostgreSQL's `$1` once. psycopg would do it on each call for a text over
    4,096 characters, at a third of a debit's time."""

    sql: str
    names: tuple[str, ...]

    @classmethod
    def of(cls, *parts: str) -> "_Statement":
        text = " ".join(" ".join(parts).split())
        names = tuple(dict.fromkeys(re.findall(r"%\((\w+)\)s", text)))
        return cls(re.sub(r"%\((\w+)\)s", lambda match: f"${names.index(match[1]) + 1}", text), names)


_RESERVE = _Statement.of(
    _LOCKED_ACCOUNT,
    # What costs nothing needs no balance, and no debt stands in its way.
    """, allowed AS MATERIALIZED (
    SELECT *, 0::bigint AS amount, %(reserved_tokens)s::bigint AS reserved_change
      FROM account
     WHERE (status = 'active' AND balance - reserved >= %(reserved_tokens)s::bigint)
        OR (%(is_free)s::boolean AND (status = 'active' OR status_reason = 'debt'))
)""",
    _NEW_USAGE,
    """, posting AS MATERIALIZED (
    SELECT allowed.*, usage_id FROM allowed, usage
), entry AS (
    SELECT NULL::bigint AS id
)""",
    _UPDATED_ACCOUNT,
    _OUTCOME,
)

_ALLOWED_DEBIT = """, allowed AS MATERIALIZED (
    SELECT *, -%(tokens)s::bigint AS amount, 0::bigint AS reserved_change
      FROM account
     WHERE %(may_leave_debt)s::boolean OR balance - reserved >= %(tokens)s::bigint
)"""

_DEBIT_WITH_USAGE = _Statement.of(
    _LOCKED_ACCOUNT,
    _ALLOWED_DEBIT,
    _NEW_USAGE,
    """, posting AS MATERIALIZED (
    SELECT allowed.*, usage_id FROM allowed, usage
)""",
    _ENTRY,
    _UPDATED_ACCOUNT,
    _OUTCOME,
)

_DEBIT_OR_CREDIT = _Statement.of(
    _LOCKED_ACCOUNT,
    _ALLOWED_DEBIT,
    """, posting AS MATERIALIZED (
    SELECT allowed.*, NULL::bigint AS usage_id FROM allowed
)""",
    _ENTRY,
    _UPDATED_ACCOUNT,
    _OUTCOME,
)

_HOLD = """, hold AS MATERIALIZED (
    SELECT usage.id, usage.reserved_tokens
      FROM billing_tokenusage AS usage
      JOIN account ON account.id = usage.account_id
     WHERE usage.id = %(usage_id)s::bigint AND usage.status = 'reserved'
       FOR UPDATE OF usage
)"""

_EXTEND = _Statement.of(
    _LOCKED_ACCOUNT,
    _HOLD,
    """, posting AS MATERIALIZED (
    SELECT account.*, 0::bigint AS amount, %(tokens)s::bigint AS reserved_change, hold.id AS usage_id
      FROM account, hold
     WHERE account.status = 'active' AND account.balance - account.reserved >= %(tokens)s::bigint
), extended AS (
    UPDATE billing_tokenusage AS usage
       SET reserved_tokens = usage.reserved_tokens + %(tokens)s::bigint
      FROM posting
     WHERE usage.id = posting.usage_id
), entry AS (
    SELECT NULL::bigint AS id
)""",
    _UPDATED_ACCOUNT,
    _OUTCOME,
)

_SETTLE = _Statement.of(
    _LOCKED_ACCOUNT,
    _HOLD,
    """, posting AS MATERIALIZED (
    SELECT account.*, -least(%(billable_tokens)s::bigint, hold.reserved_tokens) AS amount,
           -hold.reserved_tokens AS reserved_change, hold.id AS usage_id
      FROM account, hold
), settled AS (
    UPDATE billing_tokenusage AS usage
       SET status = 'succeeded',
           input_tokens = %(input_tokens)s::bigint,
           cached_input_tokens = %(cached_input_tokens)s::bigint,
           cache_write_tokens = %(cache_write_tokens)s::bigint,
           output_tokens = %(output_tokens)s::bigint,
           reasoning_tokens = %(reasoning_tokens)s::bigint,
           image_count = %(image_count)s::int,
           actual_tokens = %(actual_tokens)s::bigint,
           billable_tokens = -posting.amount,
           unbilled_tokens = %(billable_tokens)s::bigint + posting.amount,
           provider_cost_microusd = %(provider_cost_microusd)s::bigint,
           is_estimated = %(is_estimated)s::boolean,
           error_message = %(error_message)s::text,
           duration_ms = %(duration_ms)s::bigint,
           completed_at = clock_timestamp()
      FROM posting
     WHERE usage.id = posting.usage_id
)""",
    _ENTRY,
    _UPDATED_ACCOUNT,
    _OUTCOME,
)

# What a usage row keeps of `TokenPools`.
COUNTS = (
    "input_tokens", "cached_input_tokens", "cache_write_tokens", "output_tokens", "reasoning_tokens", "actual_tokens",
)  # fmt: skip

# With no cost given, what was noted at the beginning stands: nobody knows better.
_RELEASE = _Statement.of(
    _LOCKED_ACCOUNT,
    _HOLD,
    f""", posting AS MATERIALIZED (
    SELECT account.*, 0::bigint AS amount, -hold.reserved_tokens AS reserved_change, hold.id AS usage_id
      FROM account, hold
), released AS (
    UPDATE billing_tokenusage AS usage
       SET status = %(status)s::text,
           provider_cost_microusd = coalesce(%(provider_cost_microusd)s::bigint, usage.provider_cost_microusd),
           {", ".join(f"{c} = usage.{c} * (%(provider_cost_microusd)s::bigint IS NULL)::int" for c in COUNTS)},
           is_estimated = usage.is_estimated AND %(provider_cost_microusd)s::bigint IS NULL,
           error_message = %(error_message)s::text,
           duration_ms = %(duration_ms)s::bigint,
           completed_at = clock_timestamp()
      FROM posting
     WHERE usage.id = posting.usage_id
), entry AS (
    SELECT NULL::bigint AS id
)""",  # noqa: S608 – our own names, no input
    _UPDATED_ACCOUNT,
    _OUTCOME,
)


# What a posting other than a purchase or a grant leaves empty in its ledger row.
_NO_ENTRY: Mapping[str, Any] = {
    "type": "usage",
    "purchase_id": None,
    "admin_id": None,
    "paid_cents": None,
    "currency": "",
    "stripe_payment_intent_id": None,
    "entry_key": None,
    "entry_fingerprint": "",
    "description": "",
    "metadata": "{}",
}


@repeated_after_conflicts
def _execute(statement: _Statement, parameters: Mapping[str, Any]) -> Any:
    """Run one statement, bound on the server (so that PostgreSQL prepares it), and return its only row or None.

    Inside the caller's transaction it gets a savepoint: a refused key must not cost the caller their work.
    """
    if connection.in_atomic_block:
        with transaction.atomic():
            return _execute_bare(statement, parameters)
    return _execute_bare(statement, parameters)


def _execute_bare(statement: _Statement, parameters: Mapping[str, Any]) -> Any:
    connection.ensure_connection()
    with (
        connection.wrap_database_errors,
        psycopg.RawCursor(connection.connection, row_factory=namedtuple_row) as cursor,
    ):
        return cursor.execute(statement.sql, [parameters[name] for name in statement.names]).fetchone()


def _post(statement: _Statement, parameters: Mapping[str, Any], *, needed_tokens: int = 0) -> Posting:
    """Run the statement; raise what refused it, or say after the commit that the balance changed."""
    row = _execute(statement, parameters)
    if row is None:
        raise AccountNotFound("This user has no token account.")
    if row.new_balance is None:
        if row.status != TokenAccount.Status.ACTIVE:
            raise AccountNotActive(status=row.status, reason=row.status_reason)
        raise InsufficientTokens(needed_tokens=needed_tokens, available_tokens=row.balance - row.reserved)
    transaction.on_commit(partial(announcements.announce_balance_change, row.user_id))
    return Posting(
        account_id=row.account_id,
        user_id=row.user_id,
        amount_tokens=row.amount,
        balance_tokens=row.new_balance,
        reserved_tokens=row.new_reserved,
        status=row.new_status,
        usage_id=row.usage_id,
        transaction_id=row.transaction_id,
        needs_recharge=row.needs_recharge,
    )


def _post_once(
    statement: _Statement,
    parameters: Mapping[str, Any],
    replay: Callable[[], Posting | None],
    *,
    needed_tokens: int = 0,
) -> Posting:
    """Post; when a unique key refuses it, `replay` the outcome which that key already has (law 8).

    A retry may also be refused for what its first time did: it spent the balance, or left a debt. And when the
    connection was lost, only what stands under the key says whether it was committed. Nothing there: the error goes
    on, and the caller may repeat it with the same key, also while the lost statement still waits for a lock.
    """
    try:
        return _post(statement, parameters, needed_tokens=needed_tokens)
    except (IntegrityError, InsufficientTokens, AccountNotActive, *DATABASE_AWAY) as error:
        _leave_lost_connection(error)
        outcome = replay()
        if outcome is None:
            raise
        return outcome


def _leave_lost_connection(error: Exception) -> None:
    """After an error that says the connection was lost, have the next query open another one. Inside a transaction
    the error goes on: all of that is lost or committed, and its caller knows what to ask for."""
    if isinstance(error, DATABASE_AWAY):
        if connection.in_atomic_block:
            raise error
        connection.close()


# --- Reserve, settle, release ---------------------------------------------------------------------------------------


def reserve_tokens(
    *,
    user_id: int,
    tokens: int,
    operation: Operation,
    idempotency_key: str,
    lifetime_seconds: int,
    request: Mapping[str, Any] | None = None,
    read_pools: TokenPools | None = None,
    provider_cost_microusd: int = 0,
) -> Posting:
    """Hold `tokens`, the most the operation can cost, until it is settled, released, or `lifetime_seconds` are over.

    Writes the operation's `TokenUsage` row. Raises InsufficientTokens, AccountNotActive, AccountNotFound,
    InvalidAmount, or IdempotencyConflict when the key stands for something else. With a key used before for the same,
    the first reservation is returned with `is_replay`: do not run the operation again.

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
    fingerprint = _request_fingerprint(request or {"tokens": tokens, "operation": _fields(operation)})
    parameters = _usage_parameters(operation, read_pools or TokenPools(), idempotency_key, fingerprint) | {
        "user_id": user_id,
        "status": TokenUsage.Status.RESERVED,
        "provider_cost_microusd": provider_cost_microusd,
        "is_estimated": read_pools is not None,
        "billable_tokens": 0,
        "reserved_tokens": tokens,
        "lifetime_seconds": lifetime_seconds,
        "type": "",
        "paid_cents": None,
    }
    return _post_once(
        _RESERVE,
        parameters,
        partial(_replayed_usage, user_id, idempotency_key, fingerprint),
        needed_tokens=tokens,
    )


def find_reservation(*, user_id: int, idempotency_key: str, request: Mapping[str, Any]) -> Posting | None:
    """What `reserve_tokens` did with this key and `request` before, or None.

    To be asked before prices are worked out anew: a retry must not fail because its model was retired or the balance
    spent in the meantime. Raises IdempotencyConflict when the key stands for something else.
    """
    return _replayed_usage(user_id, idempotency_key, _request_fingerprint(request))


def extend_reservation(*, usage_id: int, tokens: int) -> Posting:
    """Hold `tokens` more for an operation that is running and needs more than was held at first.

    No balance moves, so there is no ledger row (laws 1 and 4 hold as with `reserve_tokens`); whoever dies afterwards
    leaves a larger hold, which expires as the smaller one would have. Raises InsufficientTokens, AccountNotActive,
    UsageAlreadyClosed, UsageNotFound; then the hold is as it was.
    """
    _require_amount(tokens)
    usage = _get_usage(usage_id)
    parameters = {
        "user_id": usage.account.user_id,
        "usage_id": usage_id,
        "tokens": tokens,
        "type": "",
        "paid_cents": None,
    }
    try:
        return _post(_EXTEND, parameters, needed_tokens=tokens)
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
        dict(_NO_ENTRY)
        | _fields(pools)
        | {
            "user_id": usage.account.user_id,
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
    return _close(_SETTLE, parameters, closed_as=TokenUsage.Status.SUCCEEDED)


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
    parameters = {
        "user_id": usage.account.user_id,
        "usage_id": usage_id,
        "status": status,
        "provider_cost_microusd": provider_cost_microusd,
        "error_message": error_message,
        "duration_ms": duration_ms,
        "type": "",
        "paid_cents": None,
    }
    return _close(_RELEASE, parameters, closed_as=status)


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
            logger.warning("An operation was cut off and its hold expired", usage_id=usage_id, user_id=posting.user_id)
    return expired


def note_use(*, usage_id: int, pools: TokenPools, provider_cost_microusd: int) -> None:
    """Note what a running operation has used so far and cost us, as `reserve_tokens` does for its beginning.

    No balance and no hold moves. Nothing happens when it is closed.
    """
    TokenUsage.objects.filter(pk=usage_id, status=TokenUsage.Status.RESERVED).update(
        **{name: getattr(pools, name) for name in COUNTS},
        provider_cost_microusd=provider_cost_microusd,
        is_estimated=True,
    )


def _close(statement: _Statement, parameters: Mapping[str, Any], *, closed_as: str) -> Posting:
    try:
        return _post(statement, parameters)
    except (InsufficientTokens, AccountNotActive, *DATABASE_AWAY) as error:
        # Closing never lacks tokens: the statement found no open hold, so somebody closed it before. Perhaps it was
        # this call, whose connection was lost before the answer came.
        _leave_lost_connection(error)
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
    user_id: int,
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
) -> Posting:
    """Lower the balance by `tokens`, and append the ledger row.

    With `operation` it also writes the `TokenUsage` row of something that has already run (`type` usage needs it). A
    debit is refused with InsufficientTokens unless it `may_leave_debt` (after-the-fact usage, clawbacks): then the
    account is suspended until the debt is paid. Debits are recorded for suspended and blocked accounts too.
    """
    _require_amount(tokens)
    fingerprint = _fingerprint(
        kind="deduct", tokens=tokens, type=type, operation=operation and _fields(operation), purchase_id=purchase_id,
        admin_id=admin_id, pools=pools and _fields(pools), description=description,
    )  # fmt: skip
    parameters: dict[str, Any] = dict(_NO_ENTRY) | {
        "user_id": user_id,
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
    if operation is None:
        parameters |= {"entry_key": idempotency_key, "entry_fingerprint": fingerprint}
        replay = partial(_replayed_transaction, user_id, idempotency_key, fingerprint)
        return _post_once(_DEBIT_OR_CREDIT, parameters, replay, needed_tokens=tokens)
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
    replay = partial(_replayed_usage, user_id, idempotency_key, fingerprint)
    return _post_once(_DEBIT_WITH_USAGE, parameters, replay, needed_tokens=tokens)


def add_tokens(
    *,
    user_id: int,
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
) -> Posting:
    """Raise the balance by `tokens` and append the ledger row: a purchase, a grant, a bonus, a clawback given back.

    Money arriving is recorded whatever the account's status (law 12); a debt's suspension lifts itself once the
    balance is positive again. The same key and contents give the first outcome again, other contents raise
    IdempotencyConflict. A second credit for one payment intent or one purchase raises IntegrityError: the caller
    holds the purchase's lock and has looked.
    """
    _require_amount(tokens)
    fingerprint = _fingerprint(
        kind="add", tokens=tokens, type=type, purchase_id=purchase_id, admin_id=admin_id, paid_cents=paid_cents,
        currency=currency, stripe_payment_intent_id=stripe_payment_intent_id, description=description,
    )  # fmt: skip
    parameters = dict(_NO_ENTRY) | {
        "user_id": user_id,
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
    replay = partial(_replayed_transaction, user_id, idempotency_key, fingerprint)
    return _post_once(_DEBIT_OR_CREDIT, parameters, replay)


# --- Helpers --------------------------------------------------------------------------------------------------------


def _require_amount(tokens: Any) -> None:
    # `True` is an int to Python and 1.5 an int to an IntegerField: neither is an amount.
    if type(tokens) is not int or not 0 < tokens <= MAX_TOKENS:
        raise InvalidAmount(f"The number of tokens must be a whole number from 1 to {MAX_TOKENS:,}.")


def _fields(instance: Operation | TokenPools) -> dict[str, Any]:
    # Flat, unlike `asdict`, which copies deeply and costs as much as the database's part of a debit.
    return {name: getattr(instance, name) for name in type(instance).__slots__}


_json = DjangoJSONEncoder(sort_keys=True).encode


def _metadata(value: Mapping[str, Any] | None) -> str:
    return _json(value) if value else "{}"


def _fingerprint(**request: Any) -> str:
    return sha256(_json(request).encode()).hexdigest()


def _request_fingerprint(request: Mapping[str, Any]) -> str:
    return _fingerprint(kind="reserve", request=request)


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


def _replayed_usage(user_id: int, idempotency_key: str | None, fingerprint: str) -> Posting | None:
    usage = (
        TokenUsage.objects.select_related("account")
        .filter(account__user_id=user_id, idempotency_key=idempotency_key)
        .first()
    )
    if idempotency_key is None or usage is None:  # without a key, Django would look for rows without one
        return None
    if usage.request_fingerprint != fingerprint:
        raise IdempotencyConflict
    return _replay(usage)


def _replayed_transaction(user_id: int, idempotency_key: str | None, fingerprint: str) -> Posting | None:
    entry = (
        TokenTransaction.objects.select_related("account")
        .filter(account__user_id=user_id, idempotency_key=idempotency_key)
        .first()
    )
    if idempotency_key is None or entry is None:
        return None
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
        status=account.status,
        usage_id=usage_id or (entry.usage_id if entry else None),
        transaction_id=entry.pk if entry else None,
        is_replay=is_replay,
    )
