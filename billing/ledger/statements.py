"""The SQL of the ledger: one statement for each operation. Nothing else writes a balance, a hold or a ledger row."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

# Each operation puts its own `posting` between these parts: one row (the account as locked, `amount`,
# `reserved_change`, `usage_id`, who acted: `actor_id`, `api_key_id`, and what becomes of the account's lots), or none
# when the operation is refused.
#
# Each has two forms, for most accounts have no lots and shall not pay for those that do: what stands in « » is in the
# form for accounts with lots alone, what stands in ‹ › in the other alone. That one finds no account which has lots,
# also when it got them while the statement waited for the lock.

# `at` is read after the wait for the lock, and is the moment of the whole operation (law 15).
LOCKED_ACCOUNT = """
WITH «locked»‹account› AS MATERIALIZED (
    SELECT id, user_id, workspace_id, balance, reserved, sequence, status, status_reason
           «, lots, next_lot_ends_at»‹, balance - reserved AS available›
      FROM billing_tokenaccount
     WHERE id = coalesce(
               %(account_id)s::bigint,
               (SELECT id FROM billing_tokenaccount WHERE user_id = %(user_id)s::bigint)
           ) ‹AND lots IS NULL›
       FOR UPDATE
)«, account AS MATERIALIZED (
    SELECT locked.*, at,
           CASE WHEN next_lot_ends_at <= at THEN balance - billing_ended_tokens(lots, at) ELSE balance END
               - reserved AS available
      FROM locked, LATERAL (SELECT clock_timestamp() AS at) AS clock
)»"""


def lots_moved(verb: str, tokens: str, holds: str = "'{}'") -> str:
    """The account's lots after a `verb` of so many tokens."""
    return f"«, LATERAL billing_move_lots('{verb}', lots, balance, {tokens}, {holds}, at) AS moved»"


# Nobody named: the account's own user. A team's has none.
ACTOR = "coalesce(%(actor_id)s::bigint, user_id) AS actor_id, %(api_key_id)s::bigint AS api_key_id"

ENTRY = """, entry AS (
    INSERT INTO billing_tokentransaction (
        account_id, user_id, api_key_id, workspace_id, sequence, type, amount, balance_before, balance_after, usage_id,
        purchase_id, admin_id, paid_cents, currency, stripe_payment_intent_id,
        idempotency_key, request_fingerprint, description, metadata «, lot_amounts, created_at»
    )
    SELECT id, actor_id, api_key_id, workspace_id, sequence + 1 «+ coalesce(expiry_count, 0)», %(type)s::text, amount,
           balance «- coalesce(expired_tokens, 0)», balance «- coalesce(expired_tokens, 0)» + amount, usage_id,
           %(purchase_id)s::bigint, %(admin_id)s::bigint, %(paid_cents)s::bigint, %(currency)s::text,
           %(stripe_payment_intent_id)s::text, %(entry_key)s::text, %(entry_fingerprint)s::text,
           %(description)s::text, %(metadata)s::jsonb «, amounts, at»
      FROM posting
     WHERE amount <> 0
    RETURNING id
)"""

# What is left of lots that have ended, and that nothing held can claim any more, leaves the balance: a row for each,
# before that of the operation, which so tells where the balance stands at the end (a repetition is answered from it).
EXPIRIES = """«, expiry AS (
    INSERT INTO billing_tokentransaction (
        account_id, user_id, workspace_id, sequence, type, amount, balance_before, balance_after, lot_id, lot_amounts,
        description, created_at
    )
    SELECT id, user_id, workspace_id, sequence + number, 'expiry', -tokens, balance - before, balance - before - tokens,
           lot_id, jsonb_build_object(lot_id, -tokens), 'Ended without being used', at
      FROM (
        SELECT posting.*, lot_id, tokens, row_number() OVER by_lot AS number,
               coalesce(sum(tokens) OVER (by_lot ROWS BETWEEN UNBOUNDED PRECEDING AND 1 PRECEDING), 0) AS before
          FROM posting, jsonb_to_recordset(expiries) AS ended(lot_id bigint, tokens bigint)
        WINDOW by_lot AS (ORDER BY lot_id)
      ) AS ended
    RETURNING id
)»"""

UPDATED_ACCOUNT = """, updated AS (
    UPDATE billing_tokenaccount AS target
       SET balance = posting.balance + amount «- coalesce(expired_tokens, 0)»,
           reserved = posting.reserved + reserved_change,
           sequence = posting.sequence + (amount <> 0)::int «+ coalesce(expiry_count, 0)»,
           «lots = lots_after,
           next_lot_ends_at = next_end,»
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
             AND posting.balance + amount «- coalesce(expired_tokens, 0) - coalesce(ended_tokens, 0)»
                 < posting.reserved + reserved_change THEN 'suspended'
            WHEN posting.status = 'suspended' AND posting.status_reason = 'debt'
             AND posting.balance + amount «- coalesce(expired_tokens, 0) - coalesce(ended_tokens, 0)» > 0
             AND posting.balance + amount «- coalesce(expired_tokens, 0) - coalesce(ended_tokens, 0)»
                 >= posting.reserved + reserved_change THEN 'active'
            ELSE posting.status
        END AS status
     ) AS new
     WHERE target.id = posting.id
    RETURNING target.balance, target.reserved, target.status,
              target.balance - target.reserved «- coalesce(ended_tokens, 0)» AS available,
              target.auto_recharge_enabled
              AND target.balance - target.reserved «- coalesce(ended_tokens, 0)»
                  < target.auto_recharge_threshold_tokens AS needs_recharge
)"""

OUTCOME = """
SELECT account.id AS account_id, account.user_id, account.available, account.status,
       account.status_reason, updated.balance AS new_balance, updated.reserved AS new_reserved,
       updated.available AS new_available, updated.status AS new_status, updated.needs_recharge, posting.amount,
       «coalesce(posting.expired_tokens, 0)»‹0› AS expired_tokens, posting.usage_id, entry.id AS transaction_id
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
        account_id, user_id, api_key_id, workspace_id, {", ".join(NEW_USAGE_COLUMNS)}, metadata, «lot_holds,»
        created_at, completed_at, expires_at
    )
    SELECT id, actor_id, api_key_id, workspace_id, {", ".join(f"%({c})s::{cast(c)}" for c in NEW_USAGE_COLUMNS)},
           %(usage_metadata)s::jsonb, «holds_after,» clock_timestamp(),
           CASE WHEN %(lifetime_seconds)s::int IS NULL THEN clock_timestamp() END,
           clock_timestamp() + %(lifetime_seconds)s::int * interval '1 second'
      FROM allowed
     WHERE actor_id = coalesce(user_id, actor_id)
    RETURNING id AS usage_id
)"""  # noqa: S608 – our own names and constants, no input


@dataclass(frozen=True, slots=True)
class Form:
    """SQL whose `%(name)s` are turned into PostgreSQL's `$1` once. psycopg would do it on each call for a text over
    4,096 characters, at a third of a debit's time."""

    sql: str
    names: tuple[str, ...]

    @classmethod
    def of(cls, text: str) -> "Form":
        names = tuple(dict.fromkeys(re.findall(r"%\((\w+)\)s", text)))
        return cls(re.sub(r"%\((\w+)\)s", lambda match: f"${names.index(match[1]) + 1}", text), names)


@dataclass(frozen=True, slots=True)
class Statement:
    """An operation of the ledger: its form for accounts without lots, which most are, and the one for all."""

    without_lots: Form | None
    with_lots: Form
    needs_actor: bool  # it begins an operation

    @classmethod
    def of(cls, *parts: str, for_lots_alone: bool = False) -> "Statement":
        text = " ".join(" ".join(parts).split())
        return cls(
            without_lots=None if for_lots_alone else Form.of(re.sub("«[^»]*»|[‹›]", "", text)),
            with_lots=Form.of(re.sub("‹[^›]*›|[«»]", "", text)),
            needs_actor=NEW_USAGE in parts,
        )


NO_ENTRY_ROW = """, entry AS (
    SELECT NULL::bigint AS id
)"""

RESERVE = Statement.of(
    LOCKED_ACCOUNT,
    # What costs nothing needs no balance, and no debt stands in its way.
    f""", allowed AS MATERIALIZED (
    SELECT account.*, {ACTOR}, «moved.*,» 0::bigint AS amount, %(reserved_tokens)s::bigint AS reserved_change
      FROM account {lots_moved("hold", "%(reserved_tokens)s::bigint")}
     WHERE (status = 'active' AND available >= %(reserved_tokens)s::bigint)
        OR (%(is_free)s::boolean AND (status = 'active' OR status_reason = 'debt'))
)""",  # noqa: S608 – our own names, no input
    NEW_USAGE,
    """, posting AS MATERIALIZED (
    SELECT allowed.*, usage_id FROM allowed, usage
)""",
    NO_ENTRY_ROW,
    EXPIRIES,
    UPDATED_ACCOUNT,
    OUTCOME,
)


def allowed_debit(verb: str) -> str:
    return f""", allowed AS MATERIALIZED (
    SELECT account.*, {ACTOR}, «moved.*,» -%(tokens)s::bigint AS amount, 0::bigint AS reserved_change
      FROM account {lots_moved(verb, "greatest(%(tokens)s::bigint, 0)")}
     WHERE %(may_leave_debt)s::boolean OR available >= %(tokens)s::bigint
)"""  # noqa: S608 – our own names, no input


DEBIT_WITH_USAGE = Statement.of(
    LOCKED_ACCOUNT,
    allowed_debit("debit"),
    NEW_USAGE,
    """, posting AS MATERIALIZED (
    SELECT allowed.*, usage_id FROM allowed, usage
)""",
    ENTRY,
    EXPIRIES,
    UPDATED_ACCOUNT,
    OUTCOME,
)

POSTING_WITHOUT_USAGE = """, posting AS MATERIALIZED (
    SELECT allowed.*, NULL::bigint AS usage_id FROM allowed
)"""

# A credit is a debit of less than nothing.
DEBIT_OR_CREDIT = Statement.of(
    LOCKED_ACCOUNT, allowed_debit("debit"), POSTING_WITHOUT_USAGE, ENTRY, EXPIRIES, UPDATED_ACCOUNT, OUTCOME
)

# What money that went back takes: plain tokens first, then lots, then a debt.
CLAW_BACK = Statement.of(
    LOCKED_ACCOUNT, allowed_debit("clawback"), POSTING_WITHOUT_USAGE, ENTRY, EXPIRIES, UPDATED_ACCOUNT, OUTCOME
)


def credit_into_lots(raised: str, tokens: str) -> str:
    """A debt is paid first: plain tokens are below zero only while no lot has any."""
    return f""", posting AS MATERIALIZED (
    SELECT account.*, {ACTOR}, %(tokens)s::bigint AS amount, 0::bigint AS reserved_change, NULL::bigint AS usage_id,
           lots_after, amounts, next_end, NULL::jsonb AS expiries, 0::bigint AS expired_tokens, 0 AS expiry_count,
           billing_ended_tokens(lots_after, at) AS ended_tokens
      FROM account, LATERAL (
        SELECT sum(remaining)::bigint AS lot_tokens
          FROM jsonb_to_recordset(lots) AS lot(remaining bigint)
      ) AS sums, LATERAL billing_raise_lots(
        coalesce(lots, '[]'), {raised},
        least({tokens}, greatest(0, %(tokens)s::bigint + least(0, balance - coalesce(lot_tokens, 0))))
      ) AS moved
)"""  # noqa: S608 – our own constants, no input


ADD_LOT = Statement.of(
    LOCKED_ACCOUNT,
    """, lot AS (
    INSERT INTO billing_tokenlot (account_id, kind, tokens, expires_at, source)
    SELECT id, %(lot_kind)s::text, %(tokens)s::bigint, %(lot_expires_at)s::timestamptz,
           id || ':' || %(entry_key)s::text
      FROM account
    RETURNING id AS lot_id, tokens AS given, expires_at AS ends
)""",
    credit_into_lots(
        """(SELECT jsonb_build_array(jsonb_build_object('id', lot_id, 'rank', %(lot_rank)s::int, 'given', given,
                                                        'ends', ends, 'tokens', given)) FROM lot)""",
        "%(tokens)s::bigint",
    ),
    ENTRY,
    UPDATED_ACCOUNT,
    OUTCOME,
    for_lots_alone=True,
)

# Of what a refund or a dispute had taken from lots, those that have ended meanwhile get nothing: it comes back plain.
GIVE_BACK = Statement.of(
    LOCKED_ACCOUNT,
    credit_into_lots(
        """coalesce((
            SELECT jsonb_agg(jsonb_build_object('id', lot.id, 'rank', (%(lot_ranks)s::jsonb ->> kind)::int,
                                                'given', lot.tokens, 'ends', expires_at, 'tokens', value::bigint))
              FROM jsonb_each_text(%(from_lots)s::jsonb), billing_tokenlot AS lot
             WHERE lot.id = key::bigint AND lot.account_id = account.id AND expires_at > at
        ), '[]')""",
        "%(tokens)s::bigint",
    ),
    ENTRY,
    UPDATED_ACCOUNT,
    OUTCOME,
    for_lots_alone=True,
)

# Nothing moves but what has ended.
EXPIRE = Statement.of(
    LOCKED_ACCOUNT,
    f""", posting AS MATERIALIZED (
    SELECT account.*, «moved.*,» 0::bigint AS amount, 0::bigint AS reserved_change, NULL::bigint AS usage_id
      FROM account {lots_moved("release", "0")}
)""",  # noqa: S608 – our own constants, no input
    EXPIRIES,
    """, entry AS (
    SELECT max(id) AS id FROM expiry
)""",
    UPDATED_ACCOUNT,
    OUTCOME,
    for_lots_alone=True,
)

HOLD = """, hold AS MATERIALIZED (
    SELECT usage.id, usage.reserved_tokens, usage.user_id AS actor_id, usage.api_key_id
           «, coalesce(usage.lot_holds, '{}') AS lot_holds»
      FROM billing_tokenusage AS usage
      JOIN account ON account.id = usage.account_id
     WHERE usage.id = %(usage_id)s::bigint AND usage.status = 'reserved'
       FOR UPDATE OF usage
)"""

EXTEND = Statement.of(
    LOCKED_ACCOUNT,
    HOLD,
    f""", posting AS MATERIALIZED (
    SELECT account.*, «moved.*,» 0::bigint AS amount, %(tokens)s::bigint AS reserved_change, hold.id AS usage_id
      FROM account, hold {lots_moved("hold", "%(tokens)s::bigint", "lot_holds")}
     WHERE status = 'active' AND available >= %(tokens)s::bigint
), extended AS (
    UPDATE billing_tokenusage AS usage
       SET «lot_holds = coalesce(holds_after, usage.lot_holds),»
           reserved_tokens = usage.reserved_tokens + %(tokens)s::bigint
      FROM posting
     WHERE usage.id = posting.usage_id
)""",  # noqa: S608 – our own constants, no input
    NO_ENTRY_ROW,
    EXPIRIES,
    UPDATED_ACCOUNT,
    OUTCOME,
)

SETTLE = Statement.of(
    LOCKED_ACCOUNT,
    HOLD,
    f""", posting AS MATERIALIZED (
    SELECT account.*, «moved.*,» -least(%(billable_tokens)s::bigint, hold.reserved_tokens) AS amount,
           -hold.reserved_tokens AS reserved_change, hold.id AS usage_id, hold.actor_id, hold.api_key_id
      FROM account, hold {lots_moved("settle", "least(%(billable_tokens)s::bigint, hold.reserved_tokens)", "lot_holds")}
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
)""",  # noqa: S608 – our own constants, no input
    ENTRY,
    EXPIRIES,
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
    SELECT account.*, «moved.*,» 0::bigint AS amount, -hold.reserved_tokens AS reserved_change, hold.id AS usage_id
      FROM account, hold {lots_moved("release", "0", "lot_holds")}
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
)""",  # noqa: S608 – our own names, no input
    NO_ENTRY_ROW,
    EXPIRIES,
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
