"""Roll-ups for the dashboard, kept by billing/figures/roll_ups.py: sums over many raw rows, hour by hour.

Their size follows the calendar and the catalogue, not the history, so a dashboard over years stays quick. Hours are
UTC's. All of them are made from the raw rows and can be made again from them.
"""

from django.db import models

from .fields import Provider


class _UsageSums(models.Model):
    """Sums over finished operations: by provider, model, operation type, status, and whether billing was off."""

    provider = models.CharField(max_length=20, choices=Provider)
    model = models.CharField(max_length=100)
    operation_type = models.CharField(max_length=10)
    status = models.CharField(max_length=10)
    is_free = models.BooleanField(db_default=False)
    operations = models.BigIntegerField()
    actual_tokens = models.BigIntegerField()
    billable_tokens = models.BigIntegerField()
    unbilled_tokens = models.BigIntegerField()
    provider_cost_microusd = models.BigIntegerField()
    timed_operations = models.BigIntegerField("operations whose duration is known", db_default=0)
    duration_ms = models.BigIntegerField("sum of durations (ms)")

    class Meta:
        abstract = True


class UsageHour(_UsageSums):
    """The operations that ended in an hour (by `completed_at`); those that are running are in none."""

    hour = models.DateTimeField()

    class Meta:
        # The unique one begins with it too, and is eight times as wide: a year was read in 5 times the time.
        indexes = [models.Index(fields=["hour"], name="usage_hour_by_time")]
        constraints = [
            models.UniqueConstraint(
                fields=["hour", "provider", "model", "operation_type", "status", "is_free"], name="usage_hour_once"
            )
        ]

    def __str__(self) -> str:
        return f"{self.hour:%Y-%m-%d %H}:00 {self.model} {self.operation_type}"


class UsageDay(_UsageSums):
    """The same for whole days of UTC: a year by the hour has more rows than a page can wait for."""

    day = models.DateTimeField()

    class Meta:
        indexes = [models.Index(fields=["day"], name="usage_day_by_time")]
        constraints = [
            models.UniqueConstraint(
                fields=["day", "provider", "model", "operation_type", "status", "is_free"], name="usage_day_once"
            )
        ]

    def __str__(self) -> str:
        return f"{self.day:%Y-%m-%d} {self.model} {self.operation_type}"


class LedgerHour(models.Model):
    """The ledger's entries of an hour, by type and currency.

    A debit for usage counts when its operation ended (`completed_at`), so that tokens used agree with UsageHour to
    the token; every other entry when it was written (`created_at`).
    """

    hour = models.DateTimeField()
    type = models.CharField(max_length=15)
    currency = models.CharField(max_length=3, blank=True)
    transactions = models.BigIntegerField()
    tokens = models.BigIntegerField("sum of amounts (tokens, signed)")
    paid_cents = models.BigIntegerField("sum of cents paid, signed, after discounts")
    discount_cents = models.BigIntegerField("taken off the prices of what was bought")

    class Meta:
        indexes = [models.Index(fields=["hour"], name="ledger_hour_by_time")]
        constraints = [models.UniqueConstraint(fields=["hour", "type", "currency"], name="ledger_hour_once")]

    def __str__(self) -> str:
        return f"{self.hour:%Y-%m-%d %H}:00 {self.type} {self.tokens:+,}"


class RollUp(models.Model):
    """How far the roll-ups reach: one row. Whatever ended before `rolled_until` is in them, nothing else is."""

    key = models.CharField(max_length=20, unique=True, default="global", editable=False)
    rolled_until = models.DateTimeField(null=True, blank=True)
    # The next end: reached once every transaction older than `sealing_xid` is over (figures/roll_ups.py says why).
    sealing_until = models.DateTimeField(null=True, blank=True)
    sealing_xid = models.BigIntegerField(null=True, blank=True)
    updated_at = models.DateTimeField(auto_now=True)

    class Meta:
        constraints = [models.CheckConstraint(condition=models.Q(key="global"), name="roll_up_one_row")]

    def __str__(self) -> str:
        return f"Rolled up until {self.rolled_until}"
