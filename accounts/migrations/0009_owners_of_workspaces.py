from django.contrib.postgres.operations import AddConstraintNotValid, ValidateConstraint
from django.db import migrations, models


class Migration(migrations.Migration):
    """A personal workspace has an owner, a team's has none. Added without reading the table, then validated under a lock
    that holds up neither reading nor writing; interrupted, it is run again."""

    atomic = False

    dependencies = [("accounts", "0008_teams")]

    operations = [
        AddConstraintNotValid(
            model_name="workspace",
            constraint=models.CheckConstraint(condition=models.Q(models.Q(('closed_at', None), ('kind', 'personal'), ('owner__isnull', False)), models.Q(('kind', 'team'), ('owner', None)), _connector='OR'), name='workspace_owner_of_personal_alone'),
        ),
        ValidateConstraint(model_name="workspace", name="workspace_owner_of_personal_alone"),
    ]
