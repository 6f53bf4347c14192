"""Lots: tokens with an end.

Nobody has one yet, so nothing is rewritten: the new columns are empty, and the checks of the large tables are added
without a look at their rows; the next migration looks, and builds the indexes, while everybody goes on working.
"""

import billing.models.fields
import django.db.models.deletion
import pgtrigger.compiler
import pgtrigger.migrations
from django.conf import settings
from django.contrib.postgres.operations import AddConstraintNotValid
from django.db import migrations, models


# `lots` of an account is an array in the order of spending:
#   id, rank (of its kind), given, remaining, held (by operations; more than remains after a debt took it), ends,
#   ended (met after its end while something is still held of it)
FUNCTIONS = r"""
CREATE FUNCTION billing_ended_tokens(lots jsonb, at timestamptz) RETURNS bigint
LANGUAGE sql STABLE STRICT PARALLEL SAFE
BEGIN ATOMIC
    SELECT coalesce(sum(greatest(remaining - held, 0)), 0)::bigint
      FROM jsonb_to_recordset(lots) AS lot(remaining bigint, held bigint, ends timestamptz)
     WHERE ends <= at;
END;

CREATE FUNCTION billing_lots_are_sound(lots jsonb, balance bigint) RETURNS boolean
LANGUAGE sql IMMUTABLE STRICT PARALLEL SAFE
BEGIN ATOMIC
    SELECT bool_and(coalesce(0 <= held AND 0 <= remaining AND remaining <= given AND 0 < remaining + held, false))
           AND (balance >= sum(remaining) OR bool_and(remaining = 0 OR coalesce(ended, false)))
      FROM jsonb_to_recordset(lots) AS lot(given bigint, remaining bigint, held bigint, ended boolean);
END;

CREATE FUNCTION billing_move_lots(
    verb text, lots jsonb, balance bigint, tokens bigint, holds jsonb, at timestamptz,
    OUT lots_after jsonb, OUT amounts jsonb, OUT holds_after jsonb, OUT expiries jsonb, OUT expired_tokens bigint,
    OUT expiry_count integer, OUT ended_tokens bigint, OUT next_end timestamptz
)
LANGUAGE plpgsql STABLE STRICT PARALLEL SAFE AS $$
DECLARE
    own_hold CONSTANT integer := 1;  -- of the operation that is settled or released, also of lots that have ended
    free CONSTANT integer := 2;  -- of live lots, what nobody holds
    plain CONSTANT integer := 3;
    others_hold CONSTANT integer := 4;  -- of live lots; only a debt takes it, and their holds stay as they are
    steps integer[] := CASE verb  -- who pays, in this order; what is missing then is a debt
        WHEN 'hold' THEN ARRAY[free]
        WHEN 'debit' THEN ARRAY[free, plain, others_hold]
        WHEN 'settle' THEN ARRAY[own_hold, plain, free, others_hold]
        WHEN 'clawback' THEN ARRAY[plain, free, others_hold]
        ELSE '{}' END;  -- 'release'
    spends boolean := verb <> 'hold';
    lot_count integer := jsonb_array_length(lots);
    ids text[];
    ends timestamptz[];
    remaining bigint[];
    held bigint[];
    own bigint[];
    moved bigint[];
    ended boolean[];
    plain_tokens bigint := balance;
    lot jsonb;
    step integer;
    part bigint;
BEGIN
    FOR i IN 1 .. lot_count LOOP
        lot := lots -> (i - 1);
        ids[i] := lot ->> 'id';
        ends[i] := (lot ->> 'ends')::timestamptz;
        remaining[i] := (lot -> 'remaining')::bigint;
        held[i] := (lot -> 'held')::bigint;
        ended[i] := ends[i] <= at OR coalesce((lot -> 'ended')::boolean, false);  -- also when the clock steps back
        own[i] := 0;
        IF verb IN ('settle', 'release') THEN
            own[i] := coalesce((holds -> ids[i])::bigint, 0);
            held[i] := held[i] - own[i];
        END IF;
        moved[i] := 0;
        plain_tokens := plain_tokens - remaining[i];
    END LOOP;

    FOREACH step IN ARRAY steps LOOP
        IF step = plain THEN
            tokens := tokens - least(tokens, greatest(plain_tokens, 0));
            CONTINUE;
        END IF;
        FOR i IN 1 .. lot_count LOOP
            EXIT WHEN tokens = 0;
            CONTINUE WHEN step <> own_hold AND ended[i];
            part := least(tokens, CASE step
                WHEN own_hold THEN least(own[i], remaining[i])
                WHEN free THEN greatest(remaining[i] - held[i], 0)
                ELSE remaining[i] END);
            tokens := tokens - part;
            moved[i] := moved[i] + part;
            IF spends THEN
                remaining[i] := remaining[i] - part;
            ELSE
                held[i] := held[i] + part;
            END IF;
        END LOOP;
    END LOOP;

    expired_tokens := 0;
    expiry_count := 0;
    ended_tokens := 0;
    FOR i IN 1 .. lot_count LOOP
        IF NOT spends AND (moved[i] > 0 OR holds ? ids[i]) THEN
            holds_after := coalesce(holds_after, '{}')
                || jsonb_build_object(ids[i], moved[i] + coalesce((holds -> ids[i])::bigint, 0));
        ELSIF spends AND moved[i] > 0 THEN
            amounts := coalesce(amounts, '{}') || jsonb_build_object(ids[i], -moved[i]);
        END IF;
        CONTINUE WHEN remaining[i] = 0 AND held[i] = 0;
        IF ended[i] AND held[i] = 0 THEN
            expiries := coalesce(expiries, '[]')
                || jsonb_build_object('lot_id', ids[i]::bigint, 'tokens', remaining[i]);
            expired_tokens := expired_tokens + remaining[i];
            expiry_count := expiry_count + 1;
            CONTINUE;
        END IF;
        lots_after := coalesce(lots_after, '[]') || (lots -> (i - 1) || jsonb_build_object(
            'remaining', remaining[i], 'held', held[i], 'ended', ended[i]));
        next_end := least(next_end, ends[i]);
        IF ended[i] THEN
            ended_tokens := ended_tokens + greatest(remaining[i] - held[i], 0);
        END IF;
    END LOOP;
END $$;

CREATE FUNCTION billing_raise_lots(lots jsonb, raised jsonb, tokens bigint, OUT lots_after jsonb, OUT amounts jsonb,
                                   OUT next_end timestamptz)
LANGUAGE plpgsql STABLE STRICT PARALLEL SAFE AS $$
BEGIN
    WITH lot AS (
        SELECT id, coalesce(lot.rank, new.rank) AS rank, coalesce(lot.given, new.given) AS given,
               coalesce(remaining, 0) AS remaining, coalesce(held, 0) AS held, coalesce(lot.ends, new.ends) AS ends,
               coalesce(ended, false) AS ended, coalesce(new.tokens, 0) AS asked
          FROM jsonb_to_recordset(lots) AS lot(id bigint, rank integer, given bigint, remaining bigint, held bigint,
                                               ends timestamptz, ended boolean)
          FULL JOIN jsonb_to_recordset(raised) AS new(id bigint, rank integer, given bigint, ends timestamptz,
                                                      tokens bigint) USING (id)
    ), raising AS (
        SELECT *, greatest(0, least(asked, given - remaining, billing_raise_lots.tokens - coalesce(sum(asked) OVER (
                      ORDER BY ends DESC, rank DESC, id DESC ROWS BETWEEN UNBOUNDED PRECEDING AND 1 PRECEDING
                   ), 0)))::bigint AS amount
          FROM lot
    )
    SELECT jsonb_agg(jsonb_build_object('id', id, 'rank', rank, 'given', given, 'remaining', remaining + amount,
                                        'held', held, 'ends', ends, 'ended', ended) ORDER BY ends, rank, id)
               FILTER (WHERE remaining + amount + held > 0),
           jsonb_object_agg(id, amount) FILTER (WHERE amount > 0),
           min(ends) FILTER (WHERE remaining + amount + held > 0)
      INTO lots_after, amounts, next_end
      FROM raising;
END $$;
"""
NO_FUNCTIONS = """
DROP FUNCTION billing_raise_lots;
DROP FUNCTION billing_move_lots;
DROP FUNCTION billing_lots_are_sound;
DROP FUNCTION billing_ended_tokens;
"""


class Migration(migrations.Migration):

    dependencies = [
        ('accounts', '0007_two_persons'),
        ('billing', '0025_drifts_name_nobody'),
        migrations.swappable_dependency(settings.AUTH_USER_MODEL),
    ]

    operations = [
        migrations.RunSQL(FUNCTIONS, NO_FUNCTIONS),
        migrations.CreateModel(
            name='TokenLot',
            fields=[
                ('id', models.BigAutoField(auto_created=True, primary_key=True, serialize=False, verbose_name='ID')),
                ('kind', models.CharField(choices=[('rollover', 'Rolled over'), ('allowance', 'Monthly allowance'), ('promotion', 'Promotion'), ('referral', 'Referral'), ('bonus', 'Bonus'), ('grant', 'Grant')], max_length=10)),
                ('tokens', models.BigIntegerField(verbose_name='tokens given')),
                ('expires_at', models.DateTimeField(verbose_name='ends at')),
                ('source', models.CharField(max_length=250, unique=True)),
                ('created_at', models.DateTimeField(db_default=billing.models.fields.ClockTimestamp(), editable=False)),
            ],
        ),
        migrations.RemoveConstraint(
            model_name='tokentransaction',
            name='ledger_sign_fits_type',
        ),
        migrations.RemoveConstraint(
            model_name='tokentransaction',
            name='ledger_type_known',
        ),
        migrations.AddField(
            model_name='tokenaccount',
            name='lots',
            field=models.JSONField(blank=True, editable=False, null=True),
        ),
        migrations.AddField(
            model_name='tokenaccount',
            name='next_lot_ends_at',
            field=models.DateTimeField(blank=True, editable=False, null=True),
        ),
        migrations.AddField(
            model_name='tokentransaction',
            name='lot_amounts',
            field=models.JSONField(blank=True, null=True),
        ),
        migrations.AddField(
            model_name='tokenusage',
            name='lot_holds',
            field=models.JSONField(blank=True, null=True),
        ),
        migrations.AlterField(
            model_name='tokentransaction',
            name='type',
            field=models.CharField(choices=[('purchase', 'Purchase'), ('usage', 'Usage'), ('admin_grant', 'Grant'), ('admin_deduction', 'Deduction'), ('refund', 'Refund'), ('bonus', 'Bonus'), ('auto_recharge', 'Auto-recharge'), ('expiry', 'Ended')], max_length=15),
        ),
        AddConstraintNotValid(
            model_name='tokenaccount',
            constraint=models.CheckConstraint(condition=models.Func(models.F('lots'), models.F('balance'), function='billing_lots_are_sound', output_field=models.BooleanField()), name='account_lots_are_sound'),
        ),
        AddConstraintNotValid(
            model_name='tokenaccount',
            constraint=models.CheckConstraint(condition=models.Q(models.Q(('lots__isnull', True), ('next_lot_ends_at__isnull', True)), models.Q(('lots__isnull', False), ('next_lot_ends_at__isnull', False)), _connector='OR'), name='account_lots_have_an_end'),
        ),
        migrations.AddField(
            model_name='tokenlot',
            name='account',
            field=models.ForeignKey(on_delete=django.db.models.deletion.PROTECT, related_name='all_lots', to='billing.tokenaccount'),
        ),
        migrations.AddField(
            model_name='tokentransaction',
            name='lot',
            field=models.ForeignKey(blank=True, db_index=False, null=True, on_delete=django.db.models.deletion.PROTECT, related_name='expiries', to='billing.tokenlot'),
        ),
        AddConstraintNotValid(
            model_name='tokentransaction',
            constraint=models.CheckConstraint(condition=models.Q(models.Q(('lot__isnull', False), ('type', 'expiry')), models.Q(models.Q(('type', 'expiry'), _negated=True), ('lot__isnull', True)), _connector='OR'), name='ledger_expiry_names_its_lot'),
        ),
        AddConstraintNotValid(
            model_name='tokentransaction',
            constraint=models.CheckConstraint(condition=models.Q(models.Q(('amount__gt', 0), ('type__in', ['purchase', 'auto_recharge', 'admin_grant', 'bonus'])), models.Q(('amount__lt', 0), ('type__in', ['usage', 'admin_deduction', 'expiry'])), ('type', 'refund'), _connector='OR'), name='ledger_sign_fits_type'),
        ),
        AddConstraintNotValid(
            model_name='tokentransaction',
            constraint=models.CheckConstraint(condition=models.Q(('type__in', ['purchase', 'usage', 'admin_grant', 'admin_deduction', 'refund', 'bonus', 'auto_recharge', 'expiry'])), name='ledger_type_known'),
        ),
        migrations.AddIndex(
            model_name='tokenlot',
            index=models.Index(fields=['expires_at'], name='lot_by_end'),
        ),
        migrations.AddConstraint(
            model_name='tokenlot',
            constraint=models.CheckConstraint(condition=models.Q(('tokens__gt', 0)), name='lot_gives_something'),
        ),
        migrations.AddConstraint(
            model_name='tokenlot',
            constraint=models.CheckConstraint(condition=models.Q(('expires_at__gt', models.F('created_at'))), name='lot_ends_after_it_began'),
        ),
        migrations.AddConstraint(
            model_name='tokenlot',
            constraint=models.CheckConstraint(condition=models.Q(('kind__in', ['rollover', 'allowance', 'promotion', 'referral', 'bonus', 'grant'])), name='lot_kind_known'),
        ),
        pgtrigger.migrations.AddTrigger(
            model_name='tokenlot',
            trigger=pgtrigger.compiler.Trigger(name='lot_append_only', sql=pgtrigger.compiler.UpsertTriggerSql(func="RAISE EXCEPTION 'pgtrigger: Cannot update or delete rows from % table', TG_TABLE_NAME;", hash='115e97b90e50299fdcf14c8e67ce4c3792eb6b1b', operation='UPDATE OR DELETE', pgid='pgtrigger_lot_append_only_0c28a', table='billing_tokenlot', when='BEFORE')),
        ),
    ]
