"""Reading the ledger as its owner sees it."""

from datetime import datetime

from billing import ledger
from billing.models import TokenTransaction

MAX_PAGE = 100


def get_transactions(
    *,
    user_id: int,
    type: str | None = None,
    since: datetime | None = None,
    until: datetime | None = None,
    before_sequence: int | None = None,
    limit: int = 25,
) -> list[TokenTransaction]:
    """The entries of the user's ledger, newest first: at most `limit` (up to 101), those before `before_sequence`.

    `since` (included) and `until` (not included) bound the time. Costs the same on every page and for every range,
    however long the ledger is. Raises AccountNotFound.
    """
    account = ledger.get_account(user_id=user_id)
    entries = TokenTransaction.objects.filter(account=account)
    # The ledger's order is its sequence. The times are turned into places in it by the index (user, created_at):
    # a filter on the time would walk over every entry that is newer than the range.
    by_time = TokenTransaction.objects.filter(account=account, user_id=account.user_id)
    if since is not None:
        first = by_time.filter(created_at__gte=since).order_by("created_at", "id").values_list("sequence").first()
        if first is None:
            return []
        entries = entries.filter(sequence__gte=first[0])
    if until is not None:
        last = by_time.filter(created_at__lt=until).order_by("-created_at", "-id").values_list("sequence").first()
        if last is None:
            return []
        entries = entries.filter(sequence__lte=last[0])
    if type is not None:
        entries = entries.filter(type=type)
    if before_sequence is not None:
        entries = entries.filter(sequence__lt=before_sequence)
    return list(entries.order_by("-sequence")[: max(1, min(limit, MAX_PAGE + 1))])
