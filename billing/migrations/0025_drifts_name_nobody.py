from django.db import migrations


class Migration(migrations.Migration):
    """Who resolved a drift, the audit log says: a person who is anonymised is not to stay here by their address."""

    dependencies = [
        ('billing', '0024_cards_and_checkout_options'),
    ]

    operations = [
        migrations.RunSQL(
            r"""UPDATE billing_drift SET resolution = regexp_replace(resolution, ' \([^ ()]+@[^ ()]+\)$', '')
                 WHERE resolution ~ ' \([^ ()]+@[^ ()]+\)$'""",
            migrations.RunSQL.noop,
        ),
    ]
