from django.apps.registry import Apps
from django.db import migrations, models
from django.db.backends.base.schema import BaseDatabaseSchemaEditor

# What the providers say of the models that the product is delivered with: all of them stood at 8,192.
LIMITS = {
    "openai": (272_000, 128_000, ("gpt-6.1-terra", "gpt-6.1-sol", "gpt-6-luna")),
    "anthropic": (1_000_000, 128_000, ("claude-sonnet-5-5", "claude-opus-5-5", "claude-haiku-5-5")),
    "google": (
        1_048_576,
        65_536,
        ("gemini-3.8-flash", "gemini-3.5-flash-lite", "gemini-2.5-pro", "gemini-2.5-flash"),
    ),
}


def tell_true_limits(apps: Apps, schema_editor: BaseDatabaseSchemaEditor) -> None:
    """What somebody has set stays; so does everything about models that were added."""
    model_price = apps.get_model("billing", "ModelPrice")
    for provider, (max_input_tokens, max_output_tokens, names) in LIMITS.items():
        rows = model_price.objects.filter(provider=provider, model__in=names)
        rows.update(max_input_tokens=max_input_tokens)
        rows.filter(max_output_tokens=8_192).exclude(changes__field="max_output_tokens").update(
            max_output_tokens=max_output_tokens
        )


class Migration(migrations.Migration):
    dependencies = [("billing", "0009_refund_refused_and_a_label")]

    operations = [
        migrations.AddField(
            "modelprice",
            "max_input_tokens",
            models.IntegerField(default=128_000, verbose_name="most it reads at once (tokens)"),
        ),
        migrations.AddField(
            "modelprice",
            "thinking_tokens",
            models.IntegerField(
                default=2_000,
                help_text="Held on top of the text, charged as far as it is used. 0 for a model that does not think.",
                verbose_name="room for thinking (tokens)",
            ),
        ),
        migrations.AlterField(
            "modelprice",
            "max_output_tokens",
            models.IntegerField(
                default=8_192, verbose_name="most it writes at once, thinking included (tokens)"
            ),
        ),
        migrations.RunPython(tell_true_limits, migrations.RunPython.noop),
        migrations.AddConstraint(
            "modelprice",
            models.CheckConstraint(
                condition=models.Q(("max_input_tokens__gt", 0), ("thinking_tokens__gte", 0)),
                name="model_price_limits_sane",
            ),
        ),
    ]
