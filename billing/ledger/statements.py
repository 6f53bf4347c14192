"""The SQL of the ledger: one statement for each operation. Nothing else writes a balance, a hold or a ledger row."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

# Each operation puts its own `posting` between these parts: one row (the account as locked, `amount`,
# `reserved_change`, `usage_id`, and who acted: `actor_id`, `api_key_id`), or none when the operation is refused.

LOCKED_ACCOUNT = """
WITH account AS MATERIALIZED (
    SELECT id, user_id, workspace_id, balance, reserved, sequence, status, status_reason
      FROM billing_tokenaccount
     WHERE id = coalesce(
               %(account_id)s::bigint,
               (SELECT id FROM billing_tokenaccount WHERE user_id = %(user_id)s::bigint)
           )
       FOR UPDATE
)"""

# Nobody named: the account's own user. A team's has none.
ACTOR = "coalesce(%(actor_id)s::bigint, user_id) AS actor_id, %(api_key_id)s::bigint AS api_key_id"

ENTRY = """, entry AS (
    INSERT INTO billing_tokentransaction (
        account_id, user_id, api_key_id, workspace_id, sequence, type, amount, balance_before, balance_after, usage_id,
        purchase_id, admin_id, paid_cents, currency, stripe_payment_intent_id,
        idempotency_key, request_fingerprint, description, metadata
    )
    SELECT id, actor_id, api_key_id, workspace_id, sequence + 1, %(type)s::text, amount, balance, balance + amount,
           usage_id,
           %(purchase_id)s::bigint, %(admin_id)s::bigint, %(paid_cents)s::bigint, %(currency)s::text,
           %(stripe_payment_intent_id)s::text, %(entry_key)s::text, %(entry_fingerprint)s::text,
           %(description)s::text, %(metadata)s::jsonb
      FROM posting
     WHERE amount <> 0
    RETURNING id
)"""

UPDATED_ACCOUNT = """, updated AS (
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

OUTCOME = """
SELECT account.id AS account_id, account.user_id, account.balance, account.reserved, account.status,
       account.status_reason, updated.balance AS new_balance, updated.reserved AS new_reserved,
       updated.status AS new_status, updated.needs_recharge, posting.amount, posting.usage_id,
       entry.id AS transaction_id
  FROM account
  LEFT JOIN posting ON true
  LEFT JOIN updated ON true
  LEFT JOIN entry ON true
"""

NEW_USAGE_COLUMNS = (
    "status", "operation_type", "provider", "model", "input_tokens", "cached_input_tokens", "cache_write_tokens",
    "output_tokens", "reasoning_tokens", "image_count", "image_size", "image_quality", "actual_tokens",
    "billable_tokens", "reserved_tokens", "charge_type", "multiplier", "fixed_cost_tokens", "provider_cost_microusd",
    "is_estimated", "is_free", "duration_ms", "idempotency_key", "request_fingerprint", "project_id", "content_id",
    "chat_id",
)  # fmt: skip
TEXT_COLUMNS = {
    "status", "operation_type", "provider", "model", "image_size", "image_quality", "charge_type", "idempotency_key",
    "request_fingerprint",
}  # fmt: skip
OTHER_COLUMN_TYPES = {"multiplier": "numeric", "is_estimated": "boolean", "is_free": "boolean", "image_count": "int"}


def cast(column: str) -> str:
    return "text" if column in TEXT_COLUMNS else OTHER_COLUMN_TYPES.get(column, "bigint")


# The names above, no input. Law 16: somebody began it, and with a personal account its owner.
NEW_USAGE = f""", usage AS (
    INSERT INTO billing_tokenusage (
        account_id, user_id, api_key_id, workspace_id, {", ".join(NEW_USAGE_COLUMNS)}, metadata, created_at,
        completed_at, expires_at
    )
    SELECT id, actor_id, api_key_id, workspace_id, {", ".join(f"%({c})s::{cast(c)}" for c in NEW_USAGE_COLUMNS)},
           %(usage_metadata)s::jsonb, clock_timestamp(),
           CASE WHEN %(lifetime_seconds)s::int IS NULL THEN clock_timestamp() END,
           clock_timestamp() + %(lifetime_seconds)s::int * interval '1 second'
      FROM allowed
     WHERE actor_id = coalesce(user_id, actor_id)
    RETURNING id AS usage_id
)"""  # noqa: S608 – our own names and constants, no input


@dataclass(frozen=True, slots=True)
class Statement:
    """SQL whose `%(name)s` are turned into PostgreSQL's `$1` once. psycopg would do it on each call for a text over
    4,096 characters, at a third of a debit's time."""

    sql: str
    names: tuple[str, ...]
    needs_actor: bool = False  # it begins an operation

    @classmethod
    def of(cls, *parts: str) -> "Statement":
        text = " ".join(" ".join(parts).split())
        names = tuple(dict.fromkeys(re.findall(r"%\((\w+)\)s", text)))
        return cls(
            re.sub(r"%\((\w+)\)s", lambda match: f"${names.index(match[1]) + 1}", text), names, NEW_USAGE in parts
        )


RESERVE = Statement.of(
    LOCKED_ACCOUNT,
    # What costs nothing needs no balance, and no debt stands in its way.
    f""", allowed AS MATERIALIZED (
    SELECT *, {ACTOR}, 0::bigint AS amount, %(reserved_tokens)s::bigint AS reserved_change
      FROM account
     WHERE (status = 'active' AND balance - reserved >= %(reserved_tokens)s::bigint)
        OR (%(is_free)s::boolean AND (status = 'active' OR status_reason = 'debt'))
)""",  # noqa: S608 – our own names, no input
    NEW_USAGE,
    """, posting AS MATERIALIZED (
    SELECT allowed.*, usage_id FROM allowed, usage
), entry AS (
    SELECT NULL::bigint AS id
)""",
    UPDATED_ACCOUNT,
    OUTCOME,
)

ALLOWED_DEBIT = f""", allowed AS MATERIALIZED (
    SELECT *, {ACTOR}, -%(tokens)s::bigint AS amount, 0::bigint AS reserved_change
      FROM account
     WHERE %(may_leave_debt)s::boolean OR balance - reserved >= %(tokens)s::bigint
)"""  # noqa: S608 – our own names, no input

DEBIT_WITH_USAGE = Statement.of(
    LOCKED_ACCOUNT,
    ALLOWED_DEBIT,
    NEW_USAGE,
    """, posting AS MATERIALIZED (
    SELECT allowed.*, usage_id FROM allowed, usage
)""",
    ENTRY,
    UPDATED_ACCOUNT,
    OUTCOME,
)

DEBIT_OR_CREDIT = Statement.of(
    LOCKED_ACCOUNT,
    ALLOWED_DEBIT,
    """, posting AS MATERIALIZED (
    SELECT allowed.*, NULL::bigint AS usage_id FROM allowed
)""",
    ENTRY,
    UPDATED_ACCOUNT,
    OUTCOME,
)

HOLD = """, hold AS MATERIALIZED (
    SELECT usage.id, usage.reserved_tokens, usage.user_id AS actor_id, usage.api_key_id
      FROM billing_tokenusage AS usage
      JOIN account ON account.id = usage.account_id
     WHERE usage.id = %(usage_id)s::bigint AND usage.status = 'reserved'
       FOR UPDATE OF usage
)"""

EXTEND = Statement.of(
    LOCKED_ACCOUNT,
    HOLD,
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
    UPDATED_ACCOUNT,
    OUTCOME,
)

SETTLE = Statement.of(
    LOCKED_ACCOUNT,
    HOLD,
    """, posting AS MATERIALIZED (
    SELECT account.*, -least(%(billable_tokens)s::bigint, hold.reserved_tokens) AS amount,
           -hold.reserved_tokens AS reserved_change, hold.id AS usage_id, hold.actor_id, hold.api_key_id
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
    ENTRY,
    UPDATED_ACCOUNT,
    OUTCOME,
)

# What a usage row keeps of `TokenPools`.
COUNTS = (
    "input_tokens", "cached_input_tokens", "cache_write_tokens", "output_tokens", "reasoning_tokens", "actual_tokens",
)  # fmt: skip

# With no cost given, what was noted at the beginning stands: nobody knows better.
RELEASE = Statement.of(
    LOCKED_ACCOUNT,
    HOLD,
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
    UPDATED_ACCOUNT,
    OUTCOME,
)


# What a posting other than a purchase or a grant leaves empty in its ledger row.
NO_ENTRY: Mapping[str, Any] = {
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
