from django.db import migrations, models


class Migration(migrations.Migration):

    dependencies = [
        ('billing', '0003_model_price_history'),
    ]

    operations = [
        migrations.AddIndex(
            model_name='tokentransaction',
            index=models.Index(condition=models.Q(('type', 'usage'), _negated=True), fields=['account', 'type', 'sequence'], include=('amount',), name='ledger_other_than_usage'),
        ),
    ]
