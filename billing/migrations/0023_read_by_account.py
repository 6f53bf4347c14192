import django.db.models.deletion
from django.contrib.postgres.operations import (
    AddConstraintNotValid,
    AddIndexConcurrently,
    RemoveIndexConcurrently,
    ValidateConstraint,
)
from django.db import migrations, models


class Migration(migrations.Migration):
    """History and use are read by account, no longer by user; one account for a workspace.

    Indexes are built and dropped beside running writes; constraints are added without reading, then validated under a
    lock that holds up neither reading nor writing. Interrupted, an invalid index is left: drop it and run it again.
    """

    atomic = False

    dependencies = [("billing", "0022_payer_and_actor")]

    operations = [
        AddIndexConcurrently(
            model_name="tokentransaction",
            index=models.Index(fields=["account", "created_at"], name="ledger_by_account_and_time"),
        ),
        AddIndexConcurrently(
            model_name="tokenusage",
            index=models.Index(fields=["account", "created_at", "user"], name="usage_by_account_and_time"),
        ),
        RemoveIndexConcurrently(model_name="tokentransaction", name="ledger_by_user_and_time"),
        RemoveIndexConcurrently(model_name="tokenusage", name="usage_by_user_and_time"),
        migrations.SeparateDatabaseAndState(
            database_operations=[
                migrations.RunSQL(
                    "CREATE UNIQUE INDEX CONCURRENTLY account_one_per_workspace "
                    "ON billing_tokenaccount (workspace_id)",
                    "DROP INDEX IF EXISTS account_one_per_workspace",
                ),
                migrations.RunSQL(
                    "ALTER TABLE billing_tokenaccount ADD CONSTRAINT account_one_per_workspace "
                    "UNIQUE USING INDEX account_one_per_workspace",
                    "ALTER TABLE billing_tokenaccount DROP CONSTRAINT account_one_per_workspace",
                ),
            ],
            state_operations=[
                migrations.AddConstraint(
                    model_name="tokenaccount",
                    constraint=models.UniqueConstraint(fields=("workspace",), name="account_one_per_workspace"),
                ),
            ],
        ),
        # The index that the constraint's has made superfluous.
        migrations.AlterField(
            model_name="tokenaccount",
            name="workspace",
            field=models.ForeignKey(db_index=False, on_delete=django.db.models.deletion.PROTECT, related_name="token_accounts", to="accounts.workspace"),
        ),
        AddConstraintNotValid(
            model_name="purchase",
            constraint=models.CheckConstraint(condition=models.Q(("kind", "auto_recharge"), ("user__isnull", False), _connector="OR"), name="purchase_names_its_buyer"),
        ),
        ValidateConstraint(model_name="purchase", name="purchase_names_its_buyer"),
        AddConstraintNotValid(
            model_name="tokentransaction",
            constraint=models.CheckConstraint(condition=models.Q(models.Q(("type", "usage"), _negated=True), ("user__isnull", False), _connector="OR"), name="ledger_usage_names_actor"),
        ),
        ValidateConstraint(model_name="tokentransaction", name="ledger_usage_names_actor"),
    ]
