"""Reading the ledger as its owner sees it: any part of it, as quickly with a million entries as with ten.

The entries of an account are numbered without a gap. A range of time is therefore a pair of numbers, found by the index
(account, created_at); how many entries it has is their difference, and what it changed is the difference of two
balances. Nothing here counts or adds up usage row by row, except what a search has found. Entries that are not usage
are few and have an index of their own (ledger_other_than_usage).
"""

from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any

from django.db.models import Count, Q, QuerySet, Sum, prefetch_related_objects

from billing import ledger
from billing.models import TokenAccount, TokenLot, TokenTransaction
from kit.text import read_id

Type = TokenTransaction.Type

MAX_PAGE = 100
# No index can help with these two: an index on words or on amounts would cost every debit more than it may.
SEARCHED_ENTRIES = 100_000
SORTED_ENTRIES = 10_000
EXPORT_BATCH = 2_000

NEWEST_FIRST = "-created_at"
ORDERS = tuple(sign + field for field in ("created_at", "type", "amount", "balance_after") for sign in ("", "-"))


@dataclass(frozen=True, slots=True)
class Selection:
    """A part of one account's ledger: entries with `after` < sequence ≤ `upto`, of these types, with these words."""

    account_id: int
    after: int
    upto: int
    types: frozenset[str] = frozenset(Type)
    search: str = ""
    # Words are looked for among the newest SEARCHED_ENTRIES of what was asked for, and that was more.
    is_search_bounded: bool = False

    @property
    def entries(self) -> QuerySet[TokenTransaction]:
        entries = TokenTransaction.objects.filter(
            account_id=self.account_id, sequence__gt=self.after, sequence__lte=self.upto
        )
        if self.types != frozenset(Type):
            entries = entries.filter(type__in=self.types)
        if Type.USAGE not in self.types:
            entries = entries.exclude(type=Type.USAGE)  # the words of the partial index
        if self.search:
            entries = entries.filter(description__icontains=self.search)
        return entries

    @property
    def is_empty(self) -> bool:
        """Whether nothing can be in it; that nothing is in it may be found out only by reading."""
        return self.after >= self.upto

    def oldest_moment(self) -> datetime | None:
        """When its time begins: that of the first entry of any type."""
        entry = _entry(self.account_id, self.after + 1)
        return entry.created_at if entry else None

    def newest(self, count: int) -> "Selection":
        """The newest `count` entries of it."""
        if self.upto - self.after <= count:
            return self
        oldest = self.entries.order_by("-sequence").values_list("sequence", flat=True)[count - 1 : count].first()
        return self if oldest is None else replace(self, after=oldest - 1)


def select_transactions(
    *,
    user_id: int | None = None,
    account_id: int | None = None,
    types: Collection[str] = (),
    since: datetime | None = None,
    until: datetime | None = None,
    search: str = "",
) -> Selection:
    """The entries of an account, or of the user's own, from `since` (included) to `until` (not included), of `types`
    (none: of all), whose description contains `search`, in any case. Raises AccountNotFound."""
    account = ledger.get_account(user_id=user_id, account_id=account_id)
    chosen = frozenset(types) or frozenset(Type)
    after = 0 if since is None else _last_sequence_before(account, since)
    upto = account.sequence if until is None else _last_sequence_before(account, until)
    is_search_bounded = bool(search) and Type.USAGE in chosen and upto - after > SEARCHED_ENTRIES
    return Selection(
        account_id=account.pk,
        after=upto - SEARCHED_ENTRIES if is_search_bounded else after,
        upto=upto,
        types=chosen,
        search=search,
        is_search_bounded=is_search_bounded,
    )


def _last_sequence_before(account: TokenAccount, moment: datetime) -> int:
    entries = TokenTransaction.objects.filter(account=account, created_at__lt=moment)
    return entries.order_by("-created_at", "-id").values_list("sequence", flat=True).first() or 0


def get_transactions(
    *,
    user_id: int | None = None,
    account_id: int | None = None,
    type: str | None = None,
    since: datetime | None = None,
    until: datetime | None = None,
    before_sequence: int | None = None,
    limit: int = 25,
) -> list[TokenTransaction]:
    """The entries of an account, or of the user's own, newest first: at most `limit` (up to 101), those before
    `before_sequence`.

    `since` (included) and `until` (not included) bound the time. Costs the same on every page and for every range,
    however long the ledger is. Raises AccountNotFound.
    """
    selection = select_transactions(
        user_id=user_id, account_id=account_id, types=[type] if type else [], since=since, until=until
    )
    return _walk(selection, NEWEST_FIRST, past=before_sequence, limit=max(1, min(limit, MAX_PAGE + 1)))


# --- Pages ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Cursor:
    """Where a page begins: the entry `sequence` is the last one before it, or (`is_backward`) the first one behind it.

    In addresses it is written `after-123` or `before-123`.
    """

    sequence: int
    is_backward: bool = False

    def __str__(self) -> str:
        return f"{'before' if self.is_backward else 'after'}-{self.sequence}"

    @classmethod
    def parse(cls, text: str) -> "Cursor | None":
        """Anything else is not a cursor, and leads to the first page."""
        direction, _, number = text.partition("-")
        sequence = read_id(number)
        if direction not in ("after", "before") or sequence is None:
            return None
        return cls(sequence, is_backward=direction == "before")


@dataclass(frozen=True, slots=True)
class Page:
    entries: list[TokenTransaction]
    previous: Cursor | None = None
    next: Cursor | None = None
    # Sorted by amount or balance, and there was more than the newest SORTED_ENTRIES to sort.
    is_sort_bounded: bool = False


def get_page(selection: Selection, *, order: str = NEWEST_FIRST, cursor: Cursor | None = None, limit: int = 25) -> Page:
    """One page of the selection in one of ORDERS, as quickly wherever it is. Entries that are alike in what they are
    sorted by come newest first. Sorted by amount or balance are the newest SORTED_ENTRIES. Each entry has its purchase
    and its `moved_lots`."""
    is_sort_bounded = False
    if order.lstrip("-") in ("amount", "balance_after"):
        newest = selection.newest(SORTED_ENTRIES)
        selection, is_sort_bounded = newest, newest != selection
    if cursor and cursor.is_backward:
        entries = _walk(selection, order, past=cursor.sequence, limit=limit + 1, is_backward=True)[:limit][::-1]
        if len(entries) == limit:
            before_it = _walk(selection, order, past=entries[0].sequence, limit=1, is_backward=True)
            previous = Cursor(entries[0].sequence, is_backward=True) if before_it else None
            _complete(entries)
            return Page(entries, previous, Cursor(entries[-1].sequence), is_sort_bounded)
        cursor = None  # back at the beginning, where new entries may have come
    entries = _walk(selection, order, past=cursor.sequence if cursor else None, limit=limit + 1)
    _complete(entries)
    return Page(
        entries[:limit],
        Cursor(entries[0].sequence, is_backward=True) if cursor and entries else None,
        Cursor(entries[limit - 1].sequence) if len(entries) > limit else None,
        is_sort_bounded,
    )


def _complete(entries: list[TokenTransaction]) -> None:
    """What a page says of each entry, in one query for all of them where there is any."""
    prefetch_related_objects(entries, "purchase__reversals")
    lot_ids = {int(lot_id) for entry in entries for lot_id in entry.lot_amounts or ()}
    lots = TokenLot.objects.in_bulk(lot_ids) if lot_ids else {}
    for entry in entries:
        entry.moved_lots = sorted(
            (lots[int(lot_id)] for lot_id in entry.lot_amounts or ()), key=lambda lot: (lot.expires_at, lot.pk)
        )


def _walk(
    selection: Selection, order: str, *, past: int | None, limit: int, is_backward: bool = False
) -> list[TokenTransaction]:
    """At most `limit` entries behind the entry with the number `past`, along an index; backward: those before it."""
    if selection.is_empty:
        return []
    field, is_descending = order.lstrip("-"), order.startswith("-") != is_backward
    entries = selection.entries
    if field == "created_at":
        return list(_in_sequence(entries, past, is_descending=is_descending)[:limit])

    reached = None if past is None else _entry(selection.account_id, past)
    if past is not None and reached is None:
        return []
    if field == "type":
        found: list[TokenTransaction] = []
        types = sorted(selection.types, key=lambda name: Type(name).label, reverse=is_descending)
        if reached is not None and reached.type in types:
            types = types[types.index(reached.type) :]
        for type in types:
            # One type after the other, each in its own index: sorting a million rows is not needed.
            behind = past if reached is not None and reached.type == type else None
            one_type = replace(selection, types=frozenset([type])).entries
            found += _in_sequence(one_type, behind, is_descending=not is_backward)[: limit - len(found)]
            if len(found) == limit:
                break
        return found
    if reached is not None:
        value = getattr(reached, field)
        behind_it = Q(**{f"{field}__{'lt' if is_descending else 'gt'}": value})
        among_its_like = Q(**{field: value, f"sequence__{'gt' if is_backward else 'lt'}": past})
        entries = entries.filter(behind_it | among_its_like)
    return list(
        entries.order_by(f"-{field}" if is_descending else field, "sequence" if is_backward else "-sequence")[:limit]
    )


def _in_sequence(
    entries: QuerySet[TokenTransaction], past: int | None, *, is_descending: bool
) -> QuerySet[TokenTransaction]:
    if past is not None:
        entries = entries.filter(sequence__lt=past) if is_descending else entries.filter(sequence__gt=past)
    return entries.order_by("-sequence" if is_descending else "sequence")


def _entry(account_id: int, sequence: int) -> TokenTransaction | None:
    return TokenTransaction.objects.filter(account_id=account_id, sequence=sequence).first()


def iterate(selection: Selection) -> Iterator[TokenTransaction]:
    """All entries of the selection, newest first, read in batches: no memory that grows with them, and no cursor or
    transaction that stays open while a slow reader reads. Entries never change, so the batches fit together."""
    past = None
    while batch := _walk(selection, NEWEST_FIRST, past=past, limit=EXPORT_BATCH):
        yield from batch
        past = batch[-1].sequence


# --- Totals ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Totals:
    """What a selection adds up to, exactly. Tokens."""

    entries: int = 0
    tokens_in: int = 0
    tokens_out: int = 0  # not negative

    @property
    def net_tokens(self) -> int:
        return self.tokens_in - self.tokens_out


def balance_at(account_id: int, sequence: int) -> int:
    """The balance after the entry with this number; before the first one it was 0."""
    entry = _entry(account_id, sequence)
    return entry.balance_after if entry else 0


def get_totals(selection: Selection) -> Totals:
    """The exact totals. Usage is what the few other entries leave of the whole change, unless words were looked for."""
    if selection.is_empty:
        return Totals()
    if selection.search or Type.USAGE not in selection.types:
        return _add_up(selection.entries)
    others = replace(selection, types=frozenset(Type) - {Type.USAGE})
    all_others = _add_up(others.entries)
    change_tokens = balance_at(selection.account_id, selection.upto) - balance_at(selection.account_id, selection.after)
    usage_tokens = all_others.net_tokens - change_tokens
    usage_entries = selection.upto - selection.after - all_others.entries
    chosen_types = selection.types - {Type.USAGE}
    if chosen_types == others.types:
        chosen = all_others
    else:
        chosen = _add_up(others.entries.filter(type__in=chosen_types)) if chosen_types else Totals()
    return Totals(
        entries=chosen.entries + usage_entries,
        tokens_in=chosen.tokens_in,
        tokens_out=chosen.tokens_out + usage_tokens,
    )


def _add_up(entries: QuerySet[TokenTransaction]) -> Totals:
    found: dict[str, Any] = entries.aggregate(
        entries=Count("pk"),
        tokens_in=Sum("amount", filter=Q(amount__gt=0), default=0),
        tokens_out=Sum("amount", filter=Q(amount__lt=0), default=0),
    )
    return Totals(found["entries"], int(found["tokens_in"]), -int(found["tokens_out"]))
