"""What the ledger is asked with and answers with, and why it refuses."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Any

from billing.models import TokenAccount, TokenTransaction, TokenUsage
from billing.pricing import (
    TokenPools,
    calculate_image_billable_tokens,
    calculate_llm_billable_tokens,
)
from kit.refusal import Refusal

MAX_TOKENS = 10**15  # per posting; far above any sale, far below what a bigint sum can hold
WELCOME_BONUS_KEY = "welcome-bonus"

Type = TokenTransaction.Type


class LedgerError(Refusal):
    """Refused; nothing was written. `message` is for the person, `http_status` for the API, `code` for programs."""

    code = "refused"


class InvalidAmount(LedgerError):
    code = "invalid_amount"


class InvalidExpiry(LedgerError):
    code = "invalid_expiry"


class AccountNotFound(LedgerError):
    http_status = 404
    code = "account_not_found"


class ActorRequired(LedgerError):
    """A team's account pays, and nobody was named who acted; or a personal one, and it was not its owner (law 16)."""

    http_status = 422
    code = "actor_required"

    def __init__(self, *, is_team: bool = True) -> None:
        if is_team:
            super().__init__("A team pays for this: say who of its members acted.")
        else:
            super().__init__("A personal account pays for what its owner does, and for nobody else.")


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
class Party:
    """Who pays and who acts (law 16). Either `account_id` names the payer, or `user_id` the person whose personal
    account pays. Without `actor_id` the account's own user acts."""

    user_id: int | None = None
    account_id: int | None = None
    actor_id: int | None = None
    api_key_id: int | None = None

    def __post_init__(self) -> None:
        if (self.user_id is None) == (self.account_id is None):
            raise TypeError("Name the payer by either user_id or account_id.")

    @property
    def of_account(self) -> dict[str, int | None]:
        """The payer's account, to filter accounts by."""
        return {"user_id": self.user_id} if self.account_id is None else {"pk": self.account_id}

    @property
    def of_rows(self) -> dict[str, int | None]:
        """The payer's account, to filter what belongs to accounts by."""
        return {"account__user_id": self.user_id} if self.account_id is None else {"account_id": self.account_id}

    def require_same_actor(self, row: TokenUsage | TokenTransaction) -> None:
        """Keys are scoped to who uses them (law 8): what a colleague did under one is nobody else's to know. `row` with
        its account. Raises IdempotencyConflict."""
        if row.user_id != (self.actor_id or row.account.user_id):
            raise IdempotencyConflict


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
    user_id: int | None  # whose account it is; a team's is nobody's
    amount_tokens: int  # signed change of the balance
    balance_tokens: int
    reserved_tokens: int
    available_tokens: int
    status: str
    usage_id: int | None = None
    transaction_id: int | None = None
    is_replay: bool = False
    expired_tokens: int = 0  # of lots that had ended, booked away beside it
    needs_recharge: bool = False  # auto-recharge is on and the available tokens are below its threshold


@dataclass(frozen=True, slots=True)
class BalanceCheck:
    has_enough: bool
    available_tokens: int
    missing_tokens: int
