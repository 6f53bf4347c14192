from django.apps.registry import Apps
from django.db import migrations, models
from django.db.backends.base.schema import BaseDatabaseSchemaEditor
from django.db.models import Case, OuterRef, Subquery, When


def agree_to_prices_of_today(apps: Apps, schema_editor: BaseDatabaseSchemaEditor) -> None:
    """Who chose a package before we kept what they agreed to agreed to what it costs now."""
    account, package = apps.get_model("billing", "TokenAccount"), apps.get_model("billing", "TokenPricing")
    chosen = package.objects.filter(pk=OuterRef("auto_recharge_package_id"))
    price_cents = Case(
        When(currency="eur", then=Subquery(chosen.values("price_eur_cents"))),
        When(currency="gbp", then=Subquery(chosen.values("price_gbp_cents"))),
        default=Subquery(chosen.values("price_usd_cents")),
    )
    account.objects.filter(auto_recharge_package__isnull=False).update(
        auto_recharge_price_cents=price_cents, auto_recharge_package_tokens=Subquery(chosen.values("tokens"))
    )


class Migration(migrations.Migration):

    dependencies = [
        ('billing', '0007_bulk_row_requested'),
    ]

    operations = [
        migrations.AddField(
            model_name='tokenaccount',
            name='auto_recharge_package_tokens',
            field=models.BigIntegerField(blank=True, null=True),
        ),
        migrations.AddField(
            model_name='tokenaccount',
            name='auto_recharge_price_cents',
            field=models.BigIntegerField(blank=True, null=True),
        ),
        migrations.RunPython(agree_to_prices_of_today, migrations.RunPython.noop),
    ]
