"""The finance export: each day's books as a file that is written in the night and kept.

A day is one in UTC, whatever anybody's time zone, so that each entry is in exactly one file and one day ends with what
the next begins with.
"""

import os
import re
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any, BinaryIO
from zipfile import ZIP_DEFLATED, ZipFile, ZipInfo

from django.conf import settings
from django.db.models import Min

from billing.figures.liability import LiabilityDoesNotBalance, LiabilityRow, liability_entries, liability_roll_forward
from billing.history.exports import Cell, csv_lines
from billing.models import PaymentReversal, TokenAccount, TokenTransaction
from kit import database
from kit.database import one_snapshot
from kit.periods import midnight

Type = TokenTransaction.Type

ROWS_AT_ONCE = 2_000
MAX_DAYS_LATE = 7  # that the nightly task makes up for
ABANDONED_AFTER_SECONDS = 24 * 3_600  # no export takes that long
FILE_NAME = re.compile(r"postmate-(\d{4}-\d{2}-\d{2})\.zip", re.ASCII)


class DayNotOver(Exception):
    """Its books are still being written."""


@dataclass(frozen=True, slots=True)
class File:
    """One day's export."""

    day: date
    path: Path
    size_bytes: int
    written_at: datetime


def folder() -> Path:
    """Where the finance export of each day lies."""
    return Path(settings.MEDIA_ROOT) / "finance"


def path_of(day: date) -> Path:
    """The finance export of a day, whether or not it was written."""
    return folder() / f"postmate-{day.isoformat()}.zip"


def list_files() -> list[File]:
    """The days that are there, newest first."""
    if not folder().is_dir():
        return []
    files = []
    for entry in os.scandir(folder()):
        if name := FILE_NAME.fullmatch(entry.name):
            status = entry.stat()
            written_at = datetime.fromtimestamp(status.st_mtime, UTC)
            files.append(File(date.fromisoformat(name[1]), Path(entry.path), status.st_size, written_at))
    return sorted(files, key=lambda file: file.day, reverse=True)


def export_missing() -> list[Path]:
    """Write the days of the last week that have no file yet: yesterday, and those of nights without a worker."""
    first_at = TokenAccount.objects.aggregate(at=Min("created_at"))["at"]
    if first_at is None:
        return []
    today = database.now().astimezone(UTC).date()
    days = [today - timedelta(days=late) for late in range(MAX_DAYS_LATE, 0, -1)]
    first_day = first_at.astimezone(UTC).date()
    return [export_day(day) for day in days if day >= first_day and not path_of(day).exists()]


def export_day(day: date) -> Path:
    """Write the day's file and return its path; one that is there is replaced.

    The same books give the same bytes. It holds what finance needs: ledger.csv, purchases.csv, refunds.csv,
    reversals.csv and liability.csv. All of them look at one moment, and they balance to the token or
    LiabilityDoesNotBalance is raised and nothing is written. Raises DayNotOver.
    """
    since, until = midnight(day, UTC), midnight(day + timedelta(days=1), UTC)
    if until > database.now():
        raise DayNotOver(f"{day.isoformat()} is not over yet in UTC.")
    folder().mkdir(mode=0o700, parents=True, exist_ok=True)
    _remove_abandoned()
    # Nobody ever sees half a file under its name: it is given to the whole one.
    descriptor, name = tempfile.mkstemp(dir=folder(), prefix=".", suffix=".unfinished")
    unfinished = Path(name)
    try:
        with os.fdopen(descriptor, "wb") as file:
            with one_snapshot():
                _write(file, day, since, until)
            file.flush()
            os.fsync(file.fileno())
        unfinished.replace(path_of(day))
    except BaseException:
        unfinished.unlink()
        raise
    return path_of(day)


def _remove_abandoned() -> None:
    """What runs that were killed have left."""
    for path in folder().glob(".*.unfinished"):
        with suppress(FileNotFoundError):  # another run has just finished with it
            if path.stat().st_mtime < time.time() - ABANDONED_AFTER_SECONDS:
                path.unlink()


def _write(file: BinaryIO, day: date, since: datetime, until: datetime) -> None:
    [liability] = liability_roll_forward(edges=[since, until])
    tokens: dict[str, int] = defaultdict(int)
    with ZipFile(file, "w", ZIP_DEFLATED) as archive:
        for name, rows in (
            ("ledger", _ledger(since, until, tokens)),
            ("purchases", _purchases(since, until)),
            ("refunds", _refunds(since, until)),
            ("reversals", _reversals(since, until)),
            ("liability", _liability(day, liability)),
        ):
            # Of the day, not of the moment of writing: a repetition gives the same bytes.
            member = ZipInfo(f"{name}.csv", date_time=(day.year, day.month, day.day, 0, 0, 0))
            member.compress_type = ZIP_DEFLATED
            with archive.open(member, "w", force_zip64=True) as part:
                for line in csv_lines(rows):
                    part.write(line.encode())
    _check(day, liability, tokens)


def _check(day: date, liability: LiabilityRow, tokens: dict[str, int]) -> None:
    """The rows that were written come to what the roll-forward says. Raises LiabilityDoesNotBalance."""
    listed = (
        tokens[Type.PURCHASE] + tokens[Type.AUTO_RECHARGE],
        tokens[Type.ADMIN_GRANT] + tokens[Type.BONUS],
        -tokens[Type.USAGE],
        -tokens[Type.REFUND],
        -tokens[Type.ADMIN_DEDUCTION],
        -tokens[Type.EXPIRY],
    )
    rolled = (
        liability.sold_tokens,
        liability.granted_tokens,
        liability.used_tokens,
        liability.refunded_tokens,
        liability.deducted_tokens,
        liability.ended_tokens,
    )
    sold, granted, used, refunded, deducted, ended = listed
    closing = liability.opening_tokens + sold + granted - used - refunded - deducted - ended
    if listed != rolled or closing != liability.closing_tokens:
        raise LiabilityDoesNotBalance(
            f"The ledger of {day.isoformat()} comes to {closing:,} tokens at its end, the roll-forward to "
            f"{liability.closing_tokens:,}. Run manage.py verify_ledger."
        )


# --- Rows -------------------------------------------------------------------------------------------------------------


def _ledger(since: datetime, until: datetime, tokens: dict[str, int]) -> Iterator[list[Cell]]:
    """Every entry that the day's roll-forward counts; adds them up by type in `tokens`."""
    yield [
        "Entry", "Account", "User", "Number in account", "Counted at", "Written at", "Type", "Tokens",
        "Balance before", "Balance after", "Paid", "Currency", "Operation", "Purchase", "Admin", "Description",
    ]  # fmt: skip
    entries = liability_entries(since=since, until=until).order_by("pk")
    rows: Iterable[tuple[Any, ...]] = entries.values_list(
        "pk", "account_id", "user_id", "sequence", "booked_at", "created_at", "type", "amount",
        "balance_before", "balance_after", "paid_cents", "currency", "usage_id", "purchase_id", "admin_id",
        "description",
    ).iterator(chunk_size=ROWS_AT_ONCE)  # fmt: skip
    for (
        pk,
        account,
        user,
        sequence,
        booked_at,
        created_at,
        type,
        amount,
        before,
        after,
        cents,
        currency,
        *others,
    ) in rows:
        tokens[type] += amount
        yield [
            pk, account, user, sequence, _moment(booked_at), _moment(created_at), type, amount,
            before, after, _money(cents), currency.upper(), *others,
        ]  # fmt: skip


def _purchases(since: datetime, until: datetime) -> Iterator[list[Cell]]:
    """The sales whose tokens were credited on the day."""
    yield [
        "Purchase", "Account", "User", "Entry", "Credited at", "Kind", "Package", "Tokens", "Price", "Discount",
        "Revenue", "Charged with tax", "Tax", "Currency", "Payment at Stripe", "Receipt",
    ]  # fmt: skip
    entries = TokenTransaction.objects.filter(
        type__in=TokenTransaction.CREDITS_FOR_MONEY, created_at__gte=since, created_at__lt=until
    ).select_related("purchase")
    for entry in entries.order_by("pk").iterator(chunk_size=ROWS_AT_ONCE):
        purchase = entry.purchase
        if purchase is None:  # a constraint says that it is there
            continue
        yield [
            purchase.pk, entry.account_id, entry.user_id, entry.pk, _moment(entry.created_at), purchase.kind,
            purchase.package_name, entry.amount, _money(purchase.amount_cents), _money(purchase.discount_cents),
            _money(purchase.revenue_cents), _money(purchase.charged_cents), _money(purchase.tax_cents),
            purchase.currency.upper(), purchase.stripe_payment_intent_id, purchase.receipt_number,
        ]  # fmt: skip


def _refunds(since: datetime, until: datetime) -> Iterator[list[Cell]]:
    """What refunds and disputes took from balances on the day, and what was given back when one came to nothing."""
    yield ["Entry", "Account", "User", "Written at", "Tokens", "Money", "Currency", "Purchase", "Description"]
    entries = TokenTransaction.objects.filter(type=Type.REFUND, created_at__gte=since, created_at__lt=until)
    for entry in entries.order_by("pk").iterator(chunk_size=ROWS_AT_ONCE):
        yield [
            entry.pk, entry.account_id, entry.user_id, _moment(entry.created_at), entry.amount,
            _money(entry.paid_cents), entry.currency.upper(), entry.purchase_id, entry.description,
        ]  # fmt: skip


def _reversals(since: datetime, until: datetime) -> Iterator[list[Cell]]:
    """Refunds and disputes at Stripe that began on the day, as Stripe sees them when the file is written."""
    yield [
        "Reversal", "Kind", "At Stripe", "Payment at Stripe", "Purchase", "Began at", "Amount", "Currency", "Status",
        "Reason", "Asked for by",
    ]  # fmt: skip
    # Without a purchase they are of another product on the same Stripe account.
    reversals = PaymentReversal.objects.filter(purchase__isnull=False, created_at__gte=since, created_at__lt=until)
    for each in reversals.order_by("pk").iterator(chunk_size=ROWS_AT_ONCE):
        yield [
            each.pk, each.kind, each.stripe_id, each.stripe_payment_intent_id, each.purchase_id,
            _moment(each.created_at), _money(each.amount_cents), each.currency.upper(), each.status, each.reason,
            each.requested_by_id,
        ]  # fmt: skip


def _liability(day: date, row: LiabilityRow) -> Iterator[list[Cell]]:
    yield ["Day", "Opening", "Sold", "Granted", "Used", "Refunded", "Deducted", "Ended", "Closing"]
    yield [
        day.isoformat(), row.opening_tokens, row.sold_tokens, row.granted_tokens, row.used_tokens,
        row.refunded_tokens, row.deducted_tokens, row.ended_tokens, row.closing_tokens,
    ]  # fmt: skip


def _moment(moment: datetime) -> str:
    return moment.astimezone(UTC).isoformat(timespec="microseconds")


def _money(cents: int | None) -> Decimal | None:
    return None if cents is None else Decimal(cents) / 100
