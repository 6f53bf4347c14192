"""What 0026 left for a time when nobody has to wait: the new checks look at the rows, the indexes are built."""

from django.contrib.postgres.operations import AddIndexConcurrently, ValidateConstraint
from django.db import migrations, models


class Migration(migrations.Migration):

    atomic = False

    dependencies = [
        ("billing", "0026_lots"),
    ]

    operations = [
        # What an interrupted run has left of an index is made anew.
        migrations.RunSQL("DROP INDEX CONCURRENTLY IF EXISTS account_by_next_lot_end", migrations.RunSQL.noop),
        AddIndexConcurrently(
            model_name="tokenaccount",
            index=models.Index(
                condition=models.Q(("next_lot_ends_at__isnull", False)),
                fields=["next_lot_ends_at"],
                name="account_by_next_lot_end",
            ),
        ),
        migrations.SeparateDatabaseAndState(
            database_operations=[
                migrations.RunSQL("DROP INDEX CONCURRENTLY IF EXISTS ledger_one_expiry_per_lot", migrations.RunSQL.noop),
                migrations.RunSQL(
                    """CREATE UNIQUE INDEX CONCURRENTLY ledger_one_expiry_per_lot
                           ON billing_tokentransaction (lot_id) WHERE type = 'expiry'""",
                    "DROP INDEX CONCURRENTLY ledger_one_expiry_per_lot",
                ),
            ],
            state_operations=[
                migrations.AddConstraint(
                    model_name="tokentransaction",
                    constraint=models.UniqueConstraint(
                        condition=models.Q(("type", "expiry")), fields=("lot",), name="ledger_one_expiry_per_lot"
                    ),
                ),
            ],
        ),
        ValidateConstraint("tokentransaction", "ledger_expiry_names_its_lot"),
        ValidateConstraint("tokentransaction", "ledger_sign_fits_type"),
        ValidateConstraint("tokentransaction", "ledger_type_known"),
        ValidateConstraint("tokenaccount", "account_lots_are_sound"),
        ValidateConstraint("tokenaccount", "account_lots_have_an_end"),
    ]
