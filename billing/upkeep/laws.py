"""The laws of docs/ARCHITECTURE.md as questions to the whole database: each check's SQL returns the rows that break it.

A long module on purpose: one tuple of checks for each law, all in one place, in their order. A new law is a new row of
`LAWS`; `tests/billing/upkeep/test_verify_ledger.py` wants a way to break each check.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from django.apps import apps

from billing.figures.roll_ups import RAW_USAGE_SUMS, USAGE_DIMENSIONS, USAGE_SUMS
from billing.ledger import WELCOME_BONUS_KEY
from billing.models import PaymentReversal

# Tasks run every 30 s (reservations) and 60 s (purchases): what they have not closed by then, nobody will.
RESERVATION_GRACE = "15 minutes"
PURCHASE_GRACE = "1 hour"
EXPIRY_GRACE = "1 day"  # of a dead worker: nobody loses or gains by it
CHECKOUT_LIFETIME = "24 hours"  # Stripe's own limit, where a purchase names no expiry
DELAYED_PAYMENT_LIFETIME = "14 days"
STRIPE_RETRIES = "3 days"


@dataclass(frozen=True, slots=True)
class Check:
    name: str
    rows: str  # what is looked at: a FROM clause, to be counted
    sql: str  # returns the rows that break the law, the ids first
    waits_for_stripe: bool = False  # time alone brings violations about where Stripe is not asked, after a restore
    law: str = ""  # its number in docs/ARCHITECTURE.md, given by `LAWS`


ACCOUNTS = "billing_tokenaccount"
LEDGER = "billing_tokentransaction"
USAGE = "billing_tokenusage"
PURCHASES = "billing_purchase"
CREDITS = "billing_tokentransaction WHERE type IN ('purchase', 'auto_recharge')"
GRANT_REQUESTS = "billing_grantrequest"
BY_ADMINS = "billing_tokentransaction WHERE type IN ('admin_grant', 'admin_deduction')"


def _total_check(name: str, column: str, sum_sql: str) -> Check:
    """The account's `column` is the aggregate `sum_sql` over its ledger rows."""
    return Check(
        name,
        ACCOUNTS,
        f"""SELECT account.id AS account, account.{column}, coalesce(ledger.total, 0) AS ledger
              FROM billing_tokenaccount AS account
              LEFT JOIN (
                SELECT account_id, {sum_sql} AS total FROM billing_tokentransaction GROUP BY account_id
              ) AS ledger ON ledger.account_id = account.id
             WHERE account.{column} <> coalesce(ledger.total, 0)""",  # noqa: S608 – our own names and constants, no input
    )


def _roll_up_check(name: str, table: str, keys: str, sums: Sequence[str], raw_sql: str) -> Check:
    """The roll-up `table` has the rows that `raw_sql` finds, by the same keys and with the same sums."""
    rolled, raw = (", ".join(f"{side}.{column}" for column in sums) for side in ("rolled", "raw"))
    return Check(
        name,
        table,
        f"""SELECT {keys}, {", ".join(f"rolled.{c} AS rolled_{c}, raw.{c} AS raw_{c}" for c in sums)}
              FROM {table} AS rolled
              FULL JOIN ({raw_sql}) AS raw USING ({keys})
             WHERE ({rolled}) IS DISTINCT FROM ({raw})""",  # noqa: S608 – our own names and constants, no input
    )


def _constraint_names() -> str:
    """The names of the constraints that the models declare, as rows of SQL's VALUES."""
    models = apps.get_app_config("billing").get_models()
    return ", ".join(f"('{constraint.name}')" for model in models for constraint in model._meta.constraints)


def _taken_cents() -> str:
    """SQL: what of a payment is, or may be, gone from us by a refund or dispute."""
    by_status = " OR ".join(
        f"reversal.kind = '{kind.value}' AND reversal.status IN ({', '.join(repr(status) for status in statuses)})"
        for kind, statuses in PaymentReversal.TAKING_STATUSES.items()
    )
    return f"coalesce(reversal.withdrawn_cents, CASE WHEN {by_status} THEN reversal.amount_cents ELSE 0 END)"


_UNTIL = "(SELECT rolled_until FROM billing_rollup)"  # the roll-ups' end

LAWS: Mapping[str, tuple[Check, ...]] = {
    "1": (
        Check(
            "Each grant and deduction names a reason, and a superadmin or an admin within the limit, as they were then",
            BY_ADMINS,
            # The entry itself keeps role and limit (grants.py): who is demoted later was right then. An entry that
            # keeps none is judged by the role of today.
            """SELECT entry.id AS transaction, entry.type, entry.amount, entry.admin_id AS admin, past.role,
                      past.limit_tokens, entry.description AS reason
                 FROM billing_tokentransaction AS entry
                 LEFT JOIN accounts_user AS admin ON admin.id = entry.admin_id
                CROSS JOIN LATERAL (
                  SELECT coalesce(entry.metadata ->> 'admin_role', admin.role) AS role,
                         coalesce((entry.metadata ->> 'admin_limit_tokens')::bigint, 0) AS limit_tokens
                ) AS past
                WHERE entry.type IN ('admin_grant', 'admin_deduction')
                  AND (admin.id IS NULL OR btrim(entry.description) = ''
                       OR (past.role = 'superadmin'
                           OR past.role = 'admin' AND entry.amount BETWEEN 1 AND past.limit_tokens) IS NOT TRUE)""",
        ),
    ),
    "2": (
        _total_check("Each sequence is the number of ledger rows", "sequence", "count(*)"),
        Check(
            "Ledger rows are numbered from 1 without a gap",
            LEDGER,
            """SELECT * FROM (
                SELECT account_id AS account, id AS transaction, sequence,
                       row_number() OVER (PARTITION BY account_id ORDER BY sequence, id) AS expected
                  FROM billing_tokentransaction
               ) AS numbered WHERE sequence <> expected""",
        ),
        Check(
            "Each ledger row starts where the one before it ended, the first at 0",
            LEDGER,
            """SELECT * FROM (
                SELECT account_id AS account, id AS transaction, sequence, balance_before,
                       lag(balance_after, 1, 0::bigint) OVER (PARTITION BY account_id ORDER BY sequence, id)
                       AS expected
                  FROM billing_tokentransaction
               ) AS chain WHERE balance_before <> expected""",
        ),
        Check(
            "Each ledger row ends at its start plus its amount",
            LEDGER,
            """SELECT account_id AS account, id AS transaction, balance_before, amount, balance_after
                 FROM billing_tokentransaction WHERE balance_after <> balance_before + amount""",
        ),
        Check(
            "Time never runs backwards along an account's ledger",
            LEDGER,
            """SELECT * FROM (
                SELECT account_id AS account, id AS transaction, sequence, created_at,
                       lag(created_at) OVER (PARTITION BY account_id ORDER BY sequence, id) AS before
                  FROM billing_tokentransaction
               ) AS timeline WHERE created_at < before""",
        ),
        Check(
            "Every constraint that guards the laws is in place",
            f"(VALUES {_constraint_names()}) AS expected (name)",
            f"""SELECT expected.name AS missing
                  FROM (VALUES {_constraint_names()}) AS expected (name)
                 WHERE NOT EXISTS (SELECT FROM pg_constraint WHERE conname = expected.name AND convalidated)
                   AND NOT EXISTS (
                     SELECT FROM pg_class JOIN pg_index ON pg_index.indexrelid = pg_class.oid
                      WHERE pg_class.relname = expected.name AND pg_index.indisunique AND pg_index.indisvalid
                   )""",  # noqa: S608 – our own names and constants, no input
        ),
    ),
    "3": (
        Check(
            "Triggers refuse UPDATE, DELETE and TRUNCATE of the ledger and the audit log",
            "(VALUES (1), (2), (3), (4), (5), (6)) AS guarded",
            # pg_trigger.tgtype: 8 = DELETE, 16 = UPDATE, 32 = TRUNCATE. `tgqual` would make one conditional.
            """SELECT guarded.name AS of_table, operation.name AS unguarded
                 FROM (VALUES ('billing_tokentransaction'), ('accounts_auditentry')) AS guarded (name)
                CROSS JOIN (VALUES ('UPDATE', 16), ('DELETE', 8), ('TRUNCATE', 32)) AS operation (name, bit)
                WHERE NOT EXISTS (
                  SELECT FROM pg_trigger AS trigger JOIN pg_proc AS function ON function.oid = trigger.tgfoid
                   WHERE trigger.tgrelid = guarded.name::regclass
                     AND trigger.tgtype & operation.bit <> 0
                     AND trigger.tgenabled IN ('O', 'A')
                     AND trigger.tgqual IS NULL
                     AND function.prosrc LIKE '%RAISE EXCEPTION%'
                )""",
        ),
    ),
    "4": (
        _total_check("Each balance is the sum of its ledger rows", "balance", "sum(amount)"),
        Check(
            "Reserved is the sum of the open reservations",
            ACCOUNTS,
            """SELECT account.id AS account, account.reserved, coalesce(open.total, 0) AS open_reservations
                 FROM billing_tokenaccount AS account
                 LEFT JOIN (
                   SELECT account_id, sum(reserved_tokens) AS total
                     FROM billing_tokenusage WHERE status = 'reserved' GROUP BY account_id
                 ) AS open ON open.account_id = account.id
                WHERE account.reserved <> coalesce(open.total, 0)""",
        ),
        Check(
            "No active account is in debt",
            ACCOUNTS,
            """SELECT id AS account, balance, reserved FROM billing_tokenaccount
                WHERE status = 'active' AND balance < reserved""",
        ),
        Check(
            "Every debt began with a clawback or an after-the-fact usage record",
            ACCOUNTS,
            """SELECT account.id AS account, account.balance, account.reserved, account.status
                 FROM billing_tokenaccount AS account
                WHERE account.balance < account.reserved
                  AND NOT EXISTS (
                    SELECT FROM billing_tokentransaction AS entry
                      LEFT JOIN billing_tokenusage AS usage ON usage.id = entry.usage_id
                     WHERE entry.account_id = account.id AND entry.amount < 0
                       AND (entry.type = 'refund' OR entry.type = 'usage' AND usage.reserved_tokens IS NULL)
                  )""",
        ),
        _total_check(
            "Lifetime purchased is the sum of purchases and auto-recharges",
            "lifetime_purchased_tokens",
            "sum(amount) FILTER (WHERE type IN ('purchase', 'auto_recharge'))",
        ),
        _total_check(
            "Lifetime granted is the sum of grants and bonuses",
            "lifetime_granted_tokens",
            "sum(amount) FILTER (WHERE type IN ('admin_grant', 'bonus'))",
        ),
        _total_check(
            "Lifetime used is the sum of usage",
            "lifetime_used_tokens",
            "-sum(amount) FILTER (WHERE type = 'usage')",
        ),
        _total_check("Lifetime spent is the sum of cents paid", "lifetime_spent_cents", "sum(paid_cents)"),
        _roll_up_check(
            "The hours of the roll-up are the sums of their operations",
            "billing_usagehour",
            f"hour, {USAGE_DIMENSIONS}",
            USAGE_SUMS,
            f"""SELECT date_trunc('hour', completed_at, 'UTC') AS hour, {USAGE_DIMENSIONS}, {RAW_USAGE_SUMS}
                  FROM billing_tokenusage WHERE completed_at < {_UNTIL} GROUP BY 1, {USAGE_DIMENSIONS}""",  # noqa: S608 – our own names and constants, no input
        ),
        _roll_up_check(
            "The days of the roll-up are the sums of their hours",
            "billing_usageday",
            f"day, {USAGE_DIMENSIONS}",
            USAGE_SUMS,
            f"""SELECT date_trunc('day', hour, 'UTC') AS day, {USAGE_DIMENSIONS},
                       {", ".join(f"sum({column}) AS {column}" for column in USAGE_SUMS)}
                  FROM billing_usagehour WHERE hour < date_trunc('day', {_UNTIL}, 'UTC')
                 GROUP BY 1, {USAGE_DIMENSIONS}""",  # noqa: S608 – our own names and constants, no input
        ),
        _roll_up_check(
            "The hours of the ledger's roll-up are the sums of their entries",
            "billing_ledgerhour",
            "hour, type, currency",
            ("transactions", "tokens", "paid_cents"),
            f"""SELECT date_trunc('hour', at, 'UTC') AS hour, type, currency, count(*) AS transactions,
                       sum(amount) AS tokens, coalesce(sum(paid_cents), 0) AS paid_cents
                  FROM (
                    SELECT created_at AS at, type, currency, amount, paid_cents
                      FROM billing_tokentransaction WHERE type <> 'usage'
                    UNION ALL
                    SELECT completed_at, entry.type, entry.currency, entry.amount, entry.paid_cents
                      FROM billing_tokentransaction AS entry JOIN billing_tokenusage AS usage
                        ON usage.id = entry.usage_id
                     WHERE entry.type = 'usage'
                  ) AS entry WHERE at < {_UNTIL} GROUP BY 1, 2, 3""",  # noqa: S608 – our own names and constants, no input
        ),
    ),
    "5": (
        Check(
            "No operation costs more than its quote; the rest is unbilled",
            USAGE,
            """SELECT usage.id AS usage, usage.account_id AS account, usage.reserved_tokens,
                      cost.tokens AS cost, usage.billable_tokens, usage.unbilled_tokens
                 FROM billing_tokenusage AS usage
                CROSS JOIN LATERAL (
                  SELECT CASE
                         WHEN usage.is_free THEN 0
                         WHEN usage.charge_type = 'fixed' THEN usage.fixed_cost_tokens * usage.image_count
                         ELSE ceil(usage.actual_tokens * usage.multiplier) END AS tokens
                ) AS cost
                WHERE usage.status = 'succeeded' AND usage.reserved_tokens IS NOT NULL
                  AND (usage.billable_tokens <> least(cost.tokens, usage.reserved_tokens)
                       OR usage.unbilled_tokens <> cost.tokens - usage.billable_tokens)""",
        ),
    ),
    "6": (
        Check(
            "A payment intent credits at most once",
            CREDITS,
            """SELECT min(id) AS transaction, stripe_payment_intent_id AS payment_intent, count(*) AS credits
                 FROM billing_tokentransaction
                WHERE type IN ('purchase', 'auto_recharge') AND stripe_payment_intent_id IS NOT NULL
                GROUP BY stripe_payment_intent_id HAVING count(*) > 1""",
        ),
        Check(
            "Each paid purchase has exactly one credit, any other none",
            PURCHASES,
            """SELECT purchase.id AS purchase, purchase.state, count(entry.id) AS credits
                 FROM billing_purchase AS purchase
                 LEFT JOIN billing_tokentransaction AS entry
                   ON entry.purchase_id = purchase.id AND entry.type IN ('purchase', 'auto_recharge')
                GROUP BY purchase.id
               HAVING count(entry.id) <> (purchase.state = 'paid')::int""",
        ),
        Check(
            "Each credit is what its purchase agreed: tokens, price, currency, account, payment",
            CREDITS,
            """SELECT entry.id AS transaction, purchase.id AS purchase, entry.amount, purchase.tokens,
                      entry.paid_cents, purchase.amount_cents, purchase.discount_cents, purchase.tax_cents,
                      purchase.charged_cents, entry.currency,
                      purchase.currency AS agreed_currency, entry.account_id AS account,
                      purchase.account_id AS agreed_account
                 FROM billing_tokentransaction AS entry
                 LEFT JOIN billing_purchase AS purchase ON purchase.id = entry.purchase_id
                WHERE entry.type IN ('purchase', 'auto_recharge')
                  AND ((entry.amount, entry.paid_cents, entry.currency, entry.account_id, entry.type)
                       IS DISTINCT FROM
                       (purchase.tokens,
                        -- Without the tax that the price includes: what was charged of it was not added to the price.
                        purchase.amount_cents - purchase.discount_cents
                        - greatest(0, least(purchase.tax_cents, purchase.tax_cents
                            - (coalesce(purchase.charged_cents, purchase.amount_cents)
                               - (purchase.amount_cents - purchase.discount_cents)))),
                        purchase.currency,
                        purchase.account_id,
                        CASE purchase.kind WHEN 'checkout' THEN 'purchase' ELSE 'auto_recharge' END)
                       OR entry.stripe_payment_intent_id IS NOT NULL
                       AND entry.stripe_payment_intent_id
                           IS DISTINCT FROM purchase.stripe_payment_intent_id)""",
        ),
        Check(
            "Refunds and disputes take back at most what their purchase credited, from the same account",
            PURCHASES,
            """SELECT purchase.id AS purchase,
                      coalesce(sum(entry.amount) FILTER (WHERE entry.type <> 'refund'), 0) AS credited,
                      -sum(entry.amount) FILTER (WHERE entry.type = 'refund') AS taken_back
                 FROM billing_tokentransaction AS entry
                 JOIN billing_purchase AS purchase ON purchase.id = entry.purchase_id
                GROUP BY purchase.id
               HAVING -sum(entry.amount) FILTER (WHERE entry.type = 'refund')
                      NOT BETWEEN 0 AND coalesce(sum(entry.amount) FILTER (WHERE entry.type <> 'refund'), 0)
                   OR bool_or(entry.account_id <> purchase.account_id)""",
        ),
        Check(
            "Refunds and disputes of a payment are in the ledger to the token",
            "billing_paymentreversal",
            f"""SELECT purchase.id AS purchase, due.tokens AS due, coalesce(taken.tokens, 0) AS taken_back
                  FROM billing_purchase AS purchase
                  LEFT JOIN (
                    SELECT stripe_payment_intent_id, sum(cents) FILTER (WHERE of_purchase) AS cents,
                           bool_or(NOT of_purchase AND kind = 'dispute' AND cents > 0) AS is_all
                      FROM (
                        SELECT reversal.stripe_payment_intent_id, reversal.kind, {_taken_cents()} AS cents,
                               reversal.currency = owner.currency AS of_purchase
                          FROM billing_paymentreversal AS reversal
                          JOIN billing_purchase AS owner
                            ON owner.stripe_payment_intent_id = reversal.stripe_payment_intent_id
                      ) AS each
                     GROUP BY stripe_payment_intent_id
                  ) AS returned ON returned.stripe_payment_intent_id = purchase.stripe_payment_intent_id
                  LEFT JOIN (
                    SELECT purchase_id, -sum(amount) AS tokens
                      FROM billing_tokentransaction WHERE type = 'refund' GROUP BY purchase_id
                  ) AS taken ON taken.purchase_id = purchase.id
                 CROSS JOIN LATERAL (
                    SELECT coalesce(purchase.charged_cents, purchase.amount_cents) AS cents
                  ) AS paid
                 CROSS JOIN LATERAL (
                    SELECT CASE WHEN purchase.state <> 'paid' THEN 0
                           WHEN returned.is_all THEN purchase.tokens
                           ELSE div(purchase.tokens * least(coalesce(returned.cents, 0), paid.cents), paid.cents)
                           END AS tokens
                  ) AS due
                 WHERE due.tokens <> coalesce(taken.tokens, 0)""",  # noqa: S608 – our own names and constants, no input
        ),
    ),
    "7": (
        Check(
            "No purchase is left open beyond its expiry",
            PURCHASES,
            f"""SELECT id AS purchase, state, created_at, expires_at FROM billing_purchase
                 WHERE state IN ('created', 'open')
                   AND coalesce(expires_at, created_at + interval '{CHECKOUT_LIFETIME}')
                       < clock_timestamp() - interval '{PURCHASE_GRACE}'
                    OR state = 'processing'
                   AND created_at < clock_timestamp() - interval '{DELAYED_PAYMENT_LIFETIME}'""",  # noqa: S608 – our own names and constants, no input
            waits_for_stripe=True,
        ),
    ),
    "8": (
        Check(
            "Each request for tokens that is done has its one ledger entry, approved by others where it must be",
            GRANT_REQUESTS,
            """SELECT request.id AS request, request.state, request.kind, request.tokens, entry.id AS transaction,
                      entry.amount, entry.admin_id AS admin, request.requested_by_id AS requested_by,
                      request.approved_by_id AS approved_by, request.decided_by_id AS decided_by
                 FROM billing_grantrequest AS request
                 LEFT JOIN billing_tokentransaction AS entry ON entry.id = request.transaction_id
                WHERE (request.state = 'done') <> (entry.id IS NOT NULL)
                   OR entry.id IS NOT NULL AND (
                      (entry.type, entry.amount, entry.account_id, entry.admin_id, entry.description,
                       (entry.metadata ->> 'grant_request_id')::bigint)
                      IS DISTINCT FROM
                      ('admin_' || request.kind,
                       CASE request.kind WHEN 'grant' THEN request.tokens ELSE -request.tokens END,
                       request.account_id, request.decided_by_id, request.reason, request.id)
                      OR request.decided_by_id = request.user_id
                      OR request.needs_two AND (request.approved_by_id IS NULL
                         OR request.approved_by_id = request.decided_by_id)
                      OR request.decided_by_id = request.requested_by_id AND request.requested_by_role = 'admin'
                         AND (request.kind <> 'grant' OR request.tokens > request.admin_limit_tokens))""",
        ),
        Check(
            "The welcome bonus comes once per user",
            f"{LEDGER} WHERE idempotency_key = '{WELCOME_BONUS_KEY}'",
            f"""SELECT user_id AS user, count(*) AS bonuses FROM billing_tokentransaction
                 WHERE idempotency_key = '{WELCOME_BONUS_KEY}' GROUP BY user_id HAVING count(*) > 1""",  # noqa: S608 – our own names and constants, no input
        ),
        Check(
            "An account whose welcome bonus is withheld has had none",
            f"{ACCOUNTS} WHERE bonus_withheld <> ''",
            f"""SELECT account.id AS account, bonus_withheld FROM billing_tokenaccount AS account
                 WHERE bonus_withheld <> '' AND EXISTS (
                   SELECT FROM billing_tokentransaction AS entry
                    WHERE entry.account_id = account.id AND entry.idempotency_key = '{WELCOME_BONUS_KEY}')""",  # noqa: S608 – our own names and constants, no input
        ),
    ),
    "9": (
        Check(
            "Each succeeded operation that costs has one debit of that cost",
            USAGE,
            """SELECT usage.id AS usage, usage.account_id AS account, usage.billable_tokens,
                      entry.id AS transaction, entry.account_id AS debited_account, entry.amount
                 FROM billing_tokenusage AS usage
                 LEFT JOIN billing_tokentransaction AS entry
                   ON entry.usage_id = usage.id AND entry.type = 'usage'
                WHERE usage.status = 'succeeded' AND usage.billable_tokens > 0
                  AND (entry.amount, entry.account_id)
                      IS DISTINCT FROM (-usage.billable_tokens, usage.account_id)""",
        ),
        Check(
            "Each debit for usage belongs to an operation that succeeded",
            LEDGER,
            """SELECT entry.id AS transaction, entry.type, entry.amount, usage.id AS usage, usage.status
                 FROM billing_tokentransaction AS entry
                 LEFT JOIN billing_tokenusage AS usage ON usage.id = entry.usage_id
                WHERE entry.type = 'usage' AND usage.status IS DISTINCT FROM 'succeeded'
                   OR entry.type <> 'usage' AND entry.usage_id IS NOT NULL""",
        ),
        Check(
            "An operation that did not succeed costs nothing",
            USAGE,
            """SELECT id AS usage, status, billable_tokens, unbilled_tokens FROM billing_tokenusage
                WHERE status <> 'succeeded' AND (billable_tokens <> 0 OR unbilled_tokens <> 0)""",
        ),
        Check(
            "Closed operations say when they were completed, running ones do not",
            USAGE,
            """SELECT id AS usage, status, completed_at FROM billing_tokenusage
                WHERE (status = 'reserved') <> (completed_at IS NULL)""",
        ),
        Check(
            f"No reservation is open {RESERVATION_GRACE} after its expiry",
            f"{USAGE} WHERE status = 'reserved'",
            f"""SELECT id AS usage, account_id AS account, reserved_tokens, expires_at FROM billing_tokenusage
                 WHERE status = 'reserved'
                   AND expires_at < clock_timestamp() - interval '{RESERVATION_GRACE}'""",  # noqa: S608 – our own names and constants, no input
        ),
    ),
    "10": (
        Check(
            "Actual tokens are the sum of their pools",
            USAGE,
            """SELECT usage.id AS usage, usage.actual_tokens, pools.total AS pools
                 FROM billing_tokenusage AS usage
                CROSS JOIN LATERAL (
                  SELECT input_tokens + cached_input_tokens + cache_write_tokens + output_tokens AS total
                ) AS pools
                WHERE usage.actual_tokens <> pools.total""",
        ),
    ),
    "12": (
        Check(
            "No account is suspended for a debt that is paid",
            ACCOUNTS,
            """SELECT id AS account, balance, reserved FROM billing_tokenaccount
                WHERE status = 'suspended' AND status_reason = 'debt'
                  AND balance > 0 AND balance >= reserved""",
        ),
        Check(
            "No event of Stripe is left unhandled after its last delivery",
            "billing_stripeevent",
            f"""SELECT id AS event, event_id AS stripe_event, type, state, received_at
                  FROM billing_stripeevent
                 WHERE state IN ('received', 'failed')
                   AND received_at < clock_timestamp() - interval '{STRIPE_RETRIES}'""",  # noqa: S608 – our own names and constants, no input
            waits_for_stripe=True,
        ),
    ),
    "13": (
        Check(
            "One auto-recharge is under way at most",
            PURCHASES,
            """SELECT account_id AS account, count(*) AS under_way FROM billing_purchase
                WHERE kind = 'auto_recharge' AND state IN ('created', 'open', 'processing', 'action_required')
                GROUP BY account_id HAVING count(*) > 1""",
        ),
    ),
    "14": (
        Check(
            "What each lot has left is what the ledger moved of it",
            "billing_tokenlot",
            """WITH moved AS (
                SELECT account_id, key::bigint AS lot_id, sum(value::bigint) AS tokens
                  FROM billing_tokentransaction, jsonb_each_text(lot_amounts)
                 WHERE lot_amounts IS NOT NULL GROUP BY 1, 2
            ), remaining AS (
                SELECT account.id AS account_id, lot.id AS lot_id, lot.remaining AS tokens, lot.given, lot.ends
                  FROM billing_tokenaccount AS account, jsonb_to_recordset(account.lots)
                       AS lot(id bigint, remaining bigint, given bigint, ends timestamptz)
                 WHERE account.lots IS NOT NULL
            )
            SELECT coalesce(moved.account_id, remaining.account_id) AS account, lot_id AS lot, lot.tokens AS given,
                   moved.tokens AS ledger, remaining.tokens AS remaining
              FROM moved FULL JOIN remaining USING (lot_id) LEFT JOIN billing_tokenlot AS lot ON lot.id = lot_id
             WHERE coalesce(moved.tokens, 0) <> coalesce(remaining.tokens, 0)
                OR lot.id IS NULL OR moved.account_id IS DISTINCT FROM lot.account_id
                OR remaining.account_id <> lot.account_id OR coalesce(moved.tokens, 0) NOT BETWEEN 0 AND lot.tokens
                OR remaining.given <> lot.tokens OR remaining.ends <> lot.expires_at""",
        ),
        Check(
            "No lot gave more than it was given, at any time",
            "billing_tokenlot",
            """SELECT * FROM (
                SELECT entry.account_id AS account, entry.id AS transaction, key::bigint AS lot, lot.tokens AS given,
                       sum(value::bigint) OVER (PARTITION BY key ORDER BY entry.sequence) AS remaining
                  FROM billing_tokentransaction AS entry, jsonb_each_text(lot_amounts)
                  LEFT JOIN billing_tokenlot AS lot ON lot.id = key::bigint
                 WHERE lot_amounts IS NOT NULL
               ) AS course WHERE remaining NOT BETWEEN 0 AND given""",
        ),
        Check(
            "A ledger row moves no more of lots than it moves at all",
            f"{LEDGER} WHERE lot_amounts IS NOT NULL",
            """SELECT account_id AS account, id AS transaction, amount, lot_amounts
                 FROM billing_tokentransaction, LATERAL (
                   SELECT sum(value::bigint) AS total, bool_and(sign(value::bigint) = sign(amount)) AS same_way
                     FROM jsonb_each_text(lot_amounts)
                 ) AS lots
                WHERE lot_amounts IS NOT NULL AND (NOT same_way OR abs(total) > abs(amount)
                      OR type = 'expiry' AND (total <> amount OR NOT lot_amounts ? lot_id::text))""",
        ),
        Check(
            "What is held of lots is what open reservations hold of them",
            ACCOUNTS,
            """SELECT account.id AS account, lot.id AS lot, lot.held, coalesce(open.held, 0) AS open_reservations
                 FROM billing_tokenaccount AS account
                CROSS JOIN LATERAL jsonb_to_recordset(account.lots) AS lot(id bigint, held bigint)
                 LEFT JOIN (
                   SELECT key::bigint AS lot_id, sum(value::bigint) AS held
                     FROM billing_tokenusage, jsonb_each_text(lot_holds)
                    WHERE status = 'reserved' AND lot_holds IS NOT NULL GROUP BY 1
                 ) AS open ON open.lot_id = lot.id
                WHERE account.lots IS NOT NULL AND lot.held <> coalesce(open.held, 0)""",
        ),
        Check(
            "Plain tokens are below zero only when no lot is left",
            ACCOUNTS,
            """SELECT id AS account, balance, lots FROM billing_tokenaccount
                WHERE lots IS NOT NULL AND NOT billing_lots_are_sound(lots, balance)""",
        ),
        Check(
            "Lots stand in the order of spending, and the first one's end beside them",
            ACCOUNTS,
            """SELECT account.id AS account, next_lot_ends_at, lots FROM billing_tokenaccount AS account, LATERAL (
                   SELECT min(ends) AS first_end,
                          array_agg(id ORDER BY place) = array_agg(id ORDER BY ends, rank, id) AS is_ordered,
                          bool_or(ended AND ends > clock_timestamp() + interval '1 hour') AS ended_early
                     FROM ROWS FROM (jsonb_to_recordset(lots) AS (id bigint, rank integer, ends timestamptz,
                                                                  ended boolean))
                          WITH ORDINALITY AS lot(id, rank, ends, ended, place)
                 ) AS course
                WHERE lots IS NOT NULL AND (first_end <> next_lot_ends_at OR NOT is_ordered OR ended_early)""",
        ),
        Check(
            "Each lot came with a ledger row",
            "billing_tokenlot",
            """SELECT lot.account_id AS account, lot.id AS lot FROM billing_tokenlot AS lot
                WHERE NOT EXISTS (
                  SELECT FROM billing_tokentransaction AS entry
                   WHERE entry.account_id = lot.account_id
                     AND lot.source = entry.account_id || ':' || entry.idempotency_key
                     AND entry.amount = lot.tokens)""",
        ),
    ),
    "15": (
        Check(
            "After its end a lot pays for nothing but operations held before",
            "billing_tokenlot",
            """SELECT entry.account_id AS account, entry.id AS transaction, lot.id AS lot, lot.expires_at,
                      entry.created_at
                 FROM billing_tokentransaction AS entry
                CROSS JOIN LATERAL jsonb_each_text(lot_amounts)
                 JOIN billing_tokenlot AS lot ON lot.id = key::bigint
                 LEFT JOIN billing_tokenusage AS usage ON usage.id = entry.usage_id
                WHERE entry.lot_amounts IS NOT NULL AND value::bigint < 0 AND entry.type <> 'expiry'
                  AND entry.created_at > lot.expires_at + interval '1 second'
                  AND NOT coalesce(usage.lot_holds ? key AND usage.created_at < lot.expires_at
                                    AND -value::bigint <= (usage.lot_holds ->> key)::bigint, false)""",
        ),
        Check(
            "No lot was booked as ended before its end",
            f"{LEDGER} WHERE type = 'expiry'",
            """SELECT entry.account_id AS account, entry.id AS transaction, lot.id AS lot, lot.expires_at
                 FROM billing_tokentransaction AS entry JOIN billing_tokenlot AS lot ON lot.id = entry.lot_id
                WHERE entry.type = 'expiry'
                  AND (entry.created_at < lot.expires_at OR entry.account_id <> lot.account_id)""",
        ),
        Check(
            "What has ended is booked, unless an operation still holds it",
            ACCOUNTS,
            f"""SELECT account.id AS account, lot.id AS lot, lot.remaining, lot.ends
                  FROM billing_tokenaccount AS account
                 CROSS JOIN LATERAL jsonb_to_recordset(account.lots)
                       AS lot(id bigint, remaining bigint, held bigint, ends timestamptz)
                 WHERE account.lots IS NOT NULL AND lot.held = 0
                   AND lot.ends < clock_timestamp() - interval '{EXPIRY_GRACE}'""",  # noqa: S608 – our own names and constants, no input
        ),
    ),
    "16": (
        Check(
            "A personal account is its workspace's owner's, a team's is nobody's",
            ACCOUNTS,
            """SELECT account.id AS account, account.user_id AS user, workspace.id AS workspace, workspace.kind
                 FROM billing_tokenaccount AS account
                 JOIN accounts_workspace AS workspace ON workspace.id = account.workspace_id
                WHERE account.user_id IS DISTINCT FROM workspace.owner_id""",
        ),
        Check(
            "Each operation names its payer's workspace, and in a personal one its owner acted",
            USAGE,
            """SELECT usage.id AS usage, account.id AS account, usage.workspace_id AS workspace, usage.user_id AS user
                 FROM billing_tokenusage AS usage
                 JOIN billing_tokenaccount AS account ON account.id = usage.account_id
                WHERE usage.workspace_id <> account.workspace_id OR usage.user_id <> account.user_id""",
        ),
        Check(
            "Each ledger row names its payer's workspace, and who acted as its operation or purchase says",
            LEDGER,
            """SELECT entry.id AS transaction, entry.account_id AS account, entry.workspace_id AS workspace,
                      entry.user_id AS user, entry.api_key_id AS api_key
                 FROM billing_tokentransaction AS entry
                 JOIN billing_tokenaccount AS account ON account.id = entry.account_id
                 LEFT JOIN billing_tokenusage AS usage ON usage.id = entry.usage_id
                 LEFT JOIN billing_purchase AS purchase
                        ON purchase.id = entry.purchase_id AND entry.type IN ('purchase', 'auto_recharge')
                WHERE entry.workspace_id <> account.workspace_id
                   OR account.user_id IS NOT NULL AND entry.user_id IS DISTINCT FROM account.user_id
                   OR usage.id IS NOT NULL AND (usage.account_id, usage.user_id, usage.api_key_id)
                      IS DISTINCT FROM (entry.account_id, entry.user_id, entry.api_key_id)
                   OR purchase.id IS NOT NULL AND (purchase.account_id, purchase.user_id)
                      IS DISTINCT FROM (entry.account_id, entry.user_id)""",
        ),
    ),
}


def checks() -> list[Check]:
    """Every law as questions to the database; each row that one finds breaks that law."""
    return [replace(check, law=law) for law, of_law in LAWS.items() for check in of_law]
