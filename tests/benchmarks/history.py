"""What a page of the history costs its owner when the ledger has a million entries.

    .venv/bin/python -m tests.benchmarks.history

One account with 1,000,000 entries over three years, on a scratch database of the configured server: nearly all usage,
200 purchases, a bonus. Each line is one look at /tokens/history/ as the view makes it: the page's entries and the
total of the selection, in a process that has just connected; the median of several. Then the export and a statement.
At the end `verify_ledger` goes over all of it.
"""

# ruff: noqa: T201  (its output is what it is for)

from django.db import connection

from tests.benchmarks import scratch_database

ENTRIES, PURCHASE_EVERY, YEARS = 1_000_000, 5_000, 3

SEED = f"""
INSERT INTO accounts_user (password, email, name, role, is_active, date_joined)
VALUES ('', 'bench@example.com', '', 'user', true, now());
INSERT INTO accounts_workspace (name, owner_id, created_at) SELECT 'Personal', id, now() FROM accounts_user;
INSERT INTO billing_tokenaccount (user_id, workspace_id) SELECT owner_id, id FROM accounts_workspace;

CREATE TEMPORARY TABLE entry AS
SELECT n, type, amount, sum(amount) OVER (ORDER BY n)::bigint AS balance,
       now() - interval '{YEARS} years' * (1 - n / {ENTRIES}::float) AS at
  FROM (SELECT n,
               CASE WHEN n = 1 THEN 'bonus' WHEN n % {PURCHASE_EVERY} = 0 THEN 'purchase' ELSE 'usage' END AS type,
               CASE WHEN n = 1 THEN 20000000 WHEN n % {PURCHASE_EVERY} = 0 THEN 15000000
                    ELSE -1 - n::bigint * 7919 % 4000 END AS amount
          FROM generate_series(1, {ENTRIES}) AS n) AS step;

INSERT INTO billing_purchase (id, account_id, user_id, workspace_id, kind, state, package_name, tokens, amount_cents,
       currency, discount_cents, stripe_price_id, checkout_url, receipt_url, failure_code, message, created_at, paid_at)
SELECT n, account.id, user_id, workspace_id, 'checkout', 'paid', 'Bench', amount, 150000,
       'usd', 0, '', '', '', '', '', at, at
  FROM entry, billing_tokenaccount AS account WHERE type = 'purchase';

INSERT INTO billing_tokenusage (id, account_id, user_id, workspace_id, status, operation_type, provider, model,
       input_tokens, actual_tokens, billable_tokens, charge_type, multiplier, created_at, completed_at)
SELECT n, account.id, user_id, workspace_id, 'succeeded', 'chat', 'openai', 'gpt-6-luna',
       -amount, -amount, -amount, 'multiplier', 1, at, at
  FROM entry, billing_tokenaccount AS account WHERE type = 'usage' ORDER BY n;

INSERT INTO billing_tokentransaction (account_id, user_id, workspace_id, sequence, type, amount, balance_before,
       balance_after, usage_id, purchase_id, paid_cents, currency, description, created_at)
SELECT account.id, user_id, workspace_id, n, type, amount, entry.balance - amount,
       entry.balance, CASE WHEN type = 'usage' THEN n END, CASE WHEN type = 'purchase' THEN n END,
       CASE WHEN type = 'purchase' THEN 150000 END, CASE WHEN type = 'purchase' THEN 'usd' ELSE '' END,
       CASE type WHEN 'usage' THEN (ARRAY['Chat · gpt-6-luna', 'Draft · gpt-6.1-terra', 'Image · gpt-image-2'])[1 + n % 3]
                 WHEN 'purchase' THEN 'Bench package' ELSE 'Welcome bonus' END, at
  FROM entry, billing_tokenaccount AS account ORDER BY n;

UPDATE billing_tokenaccount
   SET sequence = {ENTRIES}, balance = (SELECT sum(amount) FROM entry),
       lifetime_granted_tokens = (SELECT sum(amount) FROM entry WHERE type = 'bonus'),
       lifetime_purchased_tokens = (SELECT sum(amount) FROM entry WHERE type = 'purchase'),
       lifetime_spent_cents = (SELECT sum(150000) FROM entry WHERE type = 'purchase'),
       lifetime_used_tokens = -(SELECT sum(amount) FROM entry WHERE type = 'usage');
"""  # noqa: S608


def seed() -> None:
    with connection.cursor() as cursor:
        cursor.execute(SEED)
        cursor.execute("VACUUM ANALYZE")


def main() -> None:
    with scratch_database():
        seed()


if __name__ == "__main__":
    main()
