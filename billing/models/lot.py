from datetime import datetime
from typing import Any, NamedTuple

import pgtrigger
from django.db import models
from django.db.models import F, Q

from .fields import choices_constraint, created_at_field


class LotKind(models.TextChoices):
    """In the order in which lots that end at the same moment are spent."""

    ROLLOVER = "rollover", "Rolled over"
    ALLOWANCE = "allowance", "Monthly allowance"
    PROMOTION = "promotion", "Promotion"
    REFERRAL = "referral", "Referral"
    BONUS = "bonus", "Bonus"
    GRANT = "grant", "Grant"

    @property
    def rank(self) -> int:
        return list(type(self)).index(self)


class TokenLot(models.Model):
    """Tokens with an end, as they were given: never changed, never deleted. Written by billing/ledger/ alone.

    What a lot has left stands on its account's row, where a debit reads it under the account's lock (`TokenAccount.
    lots`); what it gave to whom is the sum of the ledger's `lot_amounts` (law 14). Plain tokens are in no lot.
    """

    Kind = LotKind

    account = models.ForeignKey("billing.TokenAccount", on_delete=models.PROTECT, related_name="all_lots")
    kind = models.CharField(max_length=10, choices=Kind)
    tokens = models.BigIntegerField("tokens given")
    expires_at = models.DateTimeField("ends at")  # this moment is too late (law 15)
    # What it was given for: nothing is given twice.
    source = models.CharField(max_length=250, unique=True)
    created_at = created_at_field()

    class Meta:
        indexes = [models.Index(fields=["expires_at"], name="lot_by_end")]
        constraints = [
            models.CheckConstraint(condition=Q(tokens__gt=0), name="lot_gives_something"),
            models.CheckConstraint(condition=Q(expires_at__gt=F("created_at")), name="lot_ends_after_it_began"),
            choices_constraint("kind", LotKind, "lot_kind_known"),
        ]
        triggers = [pgtrigger.Protect(name="lot_append_only", operation=pgtrigger.Update | pgtrigger.Delete)]

    def __str__(self) -> str:
        return f"{self.get_kind_display()}, {self.tokens:,} tokens until {self.expires_at:%Y-%m-%d %H:%M} UTC"


class LotBalance(NamedTuple):
    """What a lot still has, as the account's row says it."""

    id: int
    kind: LotKind
    given_tokens: int
    remaining_tokens: int
    held_tokens: int  # of those, what running operations may still take, also after the end
    expires_at: datetime

    @classmethod
    def of(cls, lot: dict[str, Any]) -> "LotBalance":
        return cls(
            id=lot["id"],
            kind=list(LotKind)[lot["rank"]],
            given_tokens=lot["given"],
            remaining_tokens=lot["remaining"],
            held_tokens=lot["held"],
            expires_at=datetime.fromisoformat(lot["ends"]),
        )
