import django.db.models.deletion
from django.conf import settings
from django.db import migrations, models


class Migration(migrations.Migration):
    """Accounts belong to workspaces; entries and operations name who acted, and with which key.

    Columns lose NOT NULL or are added empty, without a table being read or rewritten: each waits for a moment in which
    nobody else uses its table, and holds it for milliseconds.
    """

    dependencies = [
        ("accounts", "0009_owners_of_workspaces"),
        ("billing", "0021_notices_of_who_may_charge"),
        migrations.swappable_dependency(settings.AUTH_USER_MODEL),
    ]

    operations = [
        migrations.AddField(
            model_name="tokentransaction",
            name="api_key",
            field=models.ForeignKey(blank=True, db_index=False, null=True, on_delete=django.db.models.deletion.PROTECT, related_name="+", to="accounts.apikey"),
        ),
        migrations.AddField(
            model_name="tokenusage",
            name="api_key",
            field=models.ForeignKey(blank=True, db_index=False, null=True, on_delete=django.db.models.deletion.PROTECT, related_name="+", to="accounts.apikey"),
        ),
        migrations.AddField(
            model_name="tokenaccount",
            name="billing_email",
            field=models.EmailField(blank=True, db_default="", default="", max_length=254, verbose_name="where a team's receipts go"),
        ),
        migrations.AlterField(
            model_name="grantrequest",
            name="user",
            field=models.ForeignKey(blank=True, db_index=False, null=True, on_delete=django.db.models.deletion.PROTECT, related_name="+", to=settings.AUTH_USER_MODEL),
        ),
        migrations.AlterField(
            model_name="purchase",
            name="user",
            field=models.ForeignKey(blank=True, null=True, on_delete=django.db.models.deletion.PROTECT, related_name="purchases", to=settings.AUTH_USER_MODEL),
        ),
        migrations.AlterField(
            model_name="tokenaccount",
            name="user",
            field=models.OneToOneField(blank=True, null=True, on_delete=django.db.models.deletion.PROTECT, related_name="token_account", to=settings.AUTH_USER_MODEL),
        ),
        migrations.AlterField(
            model_name="tokentransaction",
            name="user",
            field=models.ForeignKey(blank=True, db_index=False, null=True, on_delete=django.db.models.deletion.PROTECT, to=settings.AUTH_USER_MODEL),
        ),
    ]
