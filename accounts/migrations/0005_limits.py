"""The table of Django's database cache, as `createcachetable` makes it. It holds the counts of limits alone."""

from django.db import migrations


class Migration(migrations.Migration):
    dependencies = [("accounts", "0004_audit_log")]

    operations = [
        migrations.RunSQL(
            sql=[
                """CREATE TABLE accounts_limit (
                       cache_key varchar(255) NOT NULL PRIMARY KEY,
                       value text NOT NULL,
                       expires timestamp with time zone NOT NULL
                   )""",
                "CREATE INDEX accounts_limit_expires ON accounts_limit (expires)",
            ],
            reverse_sql="DROP TABLE accounts_limit",
        )
    ]
