from django.db import migrations


class Migration(migrations.Migration):
    """What was dealt with by hand says so without an address: the audit log knows who it was."""

    dependencies = [("billing", "0016_prices_by_length_and_part")]

    operations = [
        migrations.RunSQL(
            r"""
            UPDATE billing_stripeevent
               SET message = regexp_replace(message, ' Dealt with by \S+@\S+\.$', ' Dealt with by hand.')
             WHERE message ~ ' Dealt with by \S+@\S+\.$'
            """,
            migrations.RunSQL.noop,
        )
    ]
