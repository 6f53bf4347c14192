from django.conf import settings
from django.db import migrations, models


class Migration(migrations.Migration):

    dependencies = [
        ('accounts', '0007_two_persons'),
        ('billing', '0018_dispute_bookings'),
        migrations.swappable_dependency(settings.AUTH_USER_MODEL),
    ]

    operations = [
        migrations.CreateModel(
            name='BonusKey',
            fields=[
                ('secret_id', models.CharField(max_length=16, primary_key=True, serialize=False)),
                ('encrypted', models.CharField(max_length=200)),
            ],
        ),
        migrations.CreateModel(
            name='BonusMark',
            fields=[
                ('digest', models.CharField(max_length=32, primary_key=True, serialize=False)),
            ],
        ),
        migrations.AddField(
            model_name='systemsettings',
            name='welcome_bonus_disposable',
            field=models.CharField(choices=[('wait', 'An admin gives it'), ('none', 'There is none'), ('give', 'It is given')], default='wait', max_length=4, verbose_name='the bonus for disposable addresses'),
        ),
        migrations.AddField(
            model_name='tokenaccount',
            name='bonus_withheld',
            field=models.CharField(blank=True, choices=[('given_before', 'Given before to this mailbox'), ('waits', 'Waits for an admin: a disposable address'), ('disposable', 'None for a disposable address')], db_default='', max_length=12, verbose_name='no welcome bonus'),
        ),
        migrations.AddIndex(
            model_name='tokenaccount',
            index=models.Index(condition=models.Q(('bonus_withheld', 'waits')), fields=['id'], name='account_bonus_waits'),
        ),
        migrations.AddConstraint(
            model_name='systemsettings',
            constraint=models.CheckConstraint(condition=models.Q(('welcome_bonus_disposable__in', ['wait', 'none', 'give'])), name='settings_disposable_bonus_known'),
        ),
        migrations.AddConstraint(
            model_name='tokenaccount',
            constraint=models.CheckConstraint(condition=models.Q(('bonus_withheld__in', ['', 'given_before', 'waits', 'disposable'])), name='account_bonus_withheld_known'),
        ),
    ]
