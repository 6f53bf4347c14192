"""What other settings would have meant for the last 30 days: counted over the real rows, before anything is saved."""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from decimal import Decimal
from typing import Any

from django.db import connection
from django.db.models import Count, Q
from django.utils import timezone

from billing.catalogue import system_settings
from billing.models import Purchase, SystemSettings, TokenAccount, TokenTransaction, TokenUsage
from billing.models.account import AVAILABLE_TOKENS

PREVIEW_DAYS = 30
MAX_OPERATIONS = 300_000  # more are not looked at: the preview goes back fewer days then


@dataclass(frozen=True, slots=True)
class Outcome:
    """The period under one set of settings."""

    billed_tokens: int
    bonus_tokens: int  # welcome bonuses of those who got one
    provider_cost_microusd: int
    value_microusd: int  # of what was billed, at the exchange rate (tokens per USD)
    low_accounts: int  # now, by these marks: low and worse
    critical_accounts: int

    @property
    def margin_microusd(self) -> int:
        return self.value_microusd - self.provider_cost_microusd

    @property
    def margin_percent(self) -> Decimal | None:
        """Of the value of what was billed, to a tenth; None when nothing was."""
        if not self.value_microusd:
            return None
        return (Decimal(100 * self.margin_microusd) / self.value_microusd).quantize(Decimal("0.1"))


@dataclass(frozen=True, slots=True)
class SettingsPreview:
    """The days before now, as they were billed and as they would have been."""

    days: int  # 30, or as many as hold no more than MAX_OPERATIONS operations; rounded up
    operations: int
    now: Outcome
    then: Outcome
    # People whose balance covers what they used, but not what it would have cost.
    users_run_out: int
    purchases_below_minimum: int  # of custom amounts: below the new minimum, and paid


def preview_settings(changes: Mapping[str, Any]) -> SettingsPreview:
    """What the last 30 days would have been like with `changes`. Writes nothing.

    Operations at a price of their own (a model's multiplier, an image model's price list) stay as they are. What was
    beyond a quote stays unbilled: the quote would have been larger by as much. Nobody is thought to have worked less
    for a higher price. Raises ValidationError naming each wrong field.
    """
    current = system_settings.get_system_settings()
    changed = system_settings.with_changes(current, changes)
    now = timezone.now()
    since = _since(now)
    tokens_now, tokens_then, users_run_out, operations, cost_microusd = _billed(since, current, changed)
    bonuses = TokenTransaction.objects.filter(type=TokenTransaction.Type.BONUS, created_at__gte=since)
    bonus_now = sum(bonuses.values_list("amount", flat=True))
    bonus_then = bonuses.count() * changed.welcome_bonus_tokens
    if changed.welcome_bonus_tokens == current.welcome_bonus_tokens:
        bonus_then = bonus_now  # of which some may have been given before the setting changed

    def outcome(settings: SystemSettings, billed_tokens: int, bonus_tokens: int) -> Outcome:
        value_microusd = int(billed_tokens * 1_000_000 / settings.tokens_per_usd)
        return Outcome(billed_tokens, bonus_tokens, cost_microusd, value_microusd, *_low_accounts(settings))

    return SettingsPreview(
        days=max(1, -(-(now - since) // timedelta(days=1))),
        operations=operations,
        now=outcome(current, tokens_now, bonus_now),
        then=outcome(changed, tokens_then, bonus_then),
        users_run_out=users_run_out,
        purchases_below_minimum=Purchase.objects.filter(
            state=Purchase.State.PAID,
            package=None,
            created_at__gte=since,
            amount_cents__lt=changed.minimum_purchase_cents,
        ).count(),
    )


def _since(now: datetime) -> datetime:
    since = now - timedelta(days=PREVIEW_DAYS)
    rows = TokenUsage.objects.filter(created_at__gte=since).order_by("-created_at")
    beyond = rows.values_list("created_at", flat=True)[MAX_OPERATIONS : MAX_OPERATIONS + 1].first()
    return since if beyond is None else beyond + timedelta(microseconds=1)


# What an operation would have cost: `price` is the catalogue's row, where the model has one.
_BILLED = """
WITH operation AS (
    SELECT usage.account_id, usage.billable_tokens, usage.provider_cost_microusd,
           CASE
               WHEN NOT %(billing_enabled)s THEN 0
               WHEN usage.is_free AND %(was_enabled)s THEN 0
               WHEN usage.charge_type = 'multiplier' THEN
                   CASE
                       WHEN price.multiplier IS NOT NULL AND NOT usage.is_free
                         OR %(multiplier)s = %(old_multiplier)s AND NOT usage.is_free THEN usage.billable_tokens
                       WHEN usage.unbilled_tokens > 0 AND usage.multiplier > 0
                       THEN ceil(usage.billable_tokens * %(multiplier)s / usage.multiplier)
                       ELSE ceil(usage.actual_tokens * coalesce(price.multiplier, %(multiplier)s))
                   END
               WHEN price.image_cost_tokens <> '{}' AND NOT usage.is_free THEN usage.billable_tokens
               WHEN price.image_cost_tokens <> '{}' THEN usage.fixed_cost_tokens * usage.image_count
               WHEN usage.model LIKE 'dall-e-2%%' THEN
                   CASE WHEN %(dalle2)s = %(old_dalle2)s AND NOT usage.is_free THEN usage.billable_tokens
                        ELSE %(dalle2)s * usage.image_count END
               WHEN usage.provider = 'google' THEN
                   CASE WHEN %(imagen)s = %(old_imagen)s AND NOT usage.is_free THEN usage.billable_tokens
                        ELSE %(imagen)s * usage.image_count END
               WHEN %(dalle3)s = %(old_dalle3)s AND NOT usage.is_free THEN usage.billable_tokens
               ELSE %(dalle3)s * usage.image_count
           END AS would_be_tokens
      FROM billing_tokenusage AS usage
      LEFT JOIN billing_modelprice AS price ON price.provider = usage.provider AND price.model = usage.model
     WHERE usage.created_at >= %(since)s AND usage.status = 'succeeded'
), by_account AS (
    SELECT account_id, count(*) AS operations, sum(billable_tokens) AS billed, sum(would_be_tokens) AS would_be,
           sum(provider_cost_microusd) AS cost
      FROM operation GROUP BY account_id
)
SELECT coalesce(sum(billed), 0)::bigint, coalesce(sum(would_be), 0)::bigint,
       count(*) FILTER (WHERE account.balance >= account.reserved
                          AND account.balance - account.reserved < would_be - billed),
       coalesce(sum(operations), 0)::bigint, coalesce(sum(cost), 0)::bigint
  FROM by_account JOIN billing_tokenaccount AS account ON account.id = account_id
"""


def _billed(since: datetime, current: SystemSettings, changed: SystemSettings) -> tuple[int, int, int, int, int]:
    """Tokens billed, tokens that would have been, people who would have run out, operations, provider cost."""
    parameters: dict[str, Any] = {
        "since": since,
        "was_enabled": current.billing_enabled,
        "billing_enabled": changed.billing_enabled,
        "old_multiplier": current.token_multiplier,
        "multiplier": changed.token_multiplier,
    }
    for name in ("dalle2", "dalle3", "imagen"):
        parameters[f"old_{name}"] = getattr(current, f"{name}_cost_tokens")
        parameters[name] = getattr(changed, f"{name}_cost_tokens")
    with connection.cursor() as cursor:
        cursor.execute(_BILLED, parameters)
        return cursor.fetchone()


def _low_accounts(settings: SystemSettings) -> tuple[int, int]:
    available = TokenAccount.objects.annotate(available_tokens=AVAILABLE_TOKENS)
    counts = available.aggregate(
        low=Count("pk", filter=Q(available_tokens__lte=settings.low_balance_tokens)),
        critical=Count("pk", filter=Q(available_tokens__lt=settings.critical_balance_tokens)),
    )
    return counts["low"], counts["critical"]
