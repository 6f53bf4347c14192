"""What is owed to users: the roll-forward of their tokens, and the entries that it is made of. Pure reads."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from typing import Any

from django.db.models import Case, F, Sum, When

from billing.figures.sums import BEGINNING, sum_ledger
from billing.models import TokenAccount, TokenTransaction
from kit.database import one_snapshot

Type = TokenTransaction.Type


class LiabilityDoesNotBalance(Exception):
    """The roll-forward and the balances differ: the books are broken. `manage.py verify_ledger` says where."""


@dataclass(frozen=True, slots=True)
class LiabilityRow:
    """Tokens owed to users over one span: opening + sold + granted − used − refunded − deducted − ended = closing."""

    since: datetime
    until: datetime
    opening_tokens: int
    sold_tokens: int  # purchases and auto-recharges
    granted_tokens: int  # grants and bonuses
    used_tokens: int
    refunded_tokens: int  # taken back by refunds and disputes, less what was given back
    deducted_tokens: int
    ended_tokens: int  # of lots, unspent at their end
    closing_tokens: int


def liability_roll_forward(*, edges: Sequence[datetime]) -> list[LiabilityRow]:
    """What is owed to users at the beginning and the end of each span between two neighbouring edges, and what
    changed it.

    The openings are added up from the first entry on, the last closing is calculated back from the balances that the
    accounts have now: the two ways meet to the token, or LiabilityDoesNotBalance is raised. A debit counts when its
    operation ended; `liability_entries` lists the very rows.
    """
    with one_snapshot():
        sums = sum_ledger(edges=[BEGINNING, *edges, datetime.max.replace(tzinfo=UTC) - timedelta(days=1)])
        balances_tokens = TokenAccount.objects.aggregate(tokens=Sum("balance", default=0))["tokens"]

    tokens: dict[tuple[int, str], int] = defaultdict(int)
    for (number, type, _), each in sums.items():
        tokens[number, type] += each.tokens
    opening = sum(tokens[0, type] for type in Type.values)
    rows = []
    for number, (since, until) in enumerate(pairwise(edges), start=1):
        row = LiabilityRow(
            since=since,
            until=until,
            opening_tokens=opening,
            sold_tokens=tokens[number, Type.PURCHASE] + tokens[number, Type.AUTO_RECHARGE],
            granted_tokens=tokens[number, Type.ADMIN_GRANT] + tokens[number, Type.BONUS],
            used_tokens=-tokens[number, Type.USAGE],
            refunded_tokens=-tokens[number, Type.REFUND],
            deducted_tokens=-tokens[number, Type.ADMIN_DEDUCTION],
            ended_tokens=-tokens[number, Type.EXPIRY],
            closing_tokens=opening + sum(tokens[number, type] for type in Type.values),
        )
        rows.append(row)
        opening = row.closing_tokens
    later = sum(tokens[len(edges), type] for type in Type.values)
    if opening != int(balances_tokens) - later:
        raise LiabilityDoesNotBalance(
            f"The entries come to {opening:,} tokens at the end of {edges[-1]:%Y-%m-%d %H:%M}, the balances to "
            f"{int(balances_tokens) - later:,}. Run manage.py verify_ledger."
        )
    return rows


def liability_entries(*, since: datetime, until: datetime) -> Any:
    """The ledger's rows that the roll-forward of a span is made of; `booked_at` is the moment it counts them at."""
    booked_at = Case(When(type=Type.USAGE, then=F("usage__completed_at")), default=F("created_at"))
    usage = TokenTransaction.objects.filter(
        type=Type.USAGE, usage__completed_at__gte=since, usage__completed_at__lt=until
    )
    others = TokenTransaction.objects.exclude(type=Type.USAGE).filter(created_at__gte=since, created_at__lt=until)
    # Each by its own index. With OR between them, PostgreSQL reads the whole history beside all of its operations.
    booked = usage.values("pk").union(others.values("pk"), all=True)
    return TokenTransaction.objects.filter(pk__in=booked).annotate(booked_at=booked_at)
