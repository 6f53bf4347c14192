"""What follows a debit that is committed: an auto-recharge, and a notice that the balance runs low."""

import time
from functools import partial

import structlog
from django.db import transaction

from billing.catalogue import system_settings
from billing.ledger import Posting
from billing.models import TokenAccount
from billing.notifications import messages
from kit.on_commit import enqueue_on_commit

logger = structlog.get_logger(__name__)

THRESHOLDS_KEPT_SECONDS = 30


def follow_debit(posting: Posting) -> None:
    """After the commit of a debit: start an auto-recharge, say that the balance runs low. Call it in the debit's
    transaction or after it. It never raises, never waits for the broker, and costs no query unless a threshold was
    crossed. Repeated, it says nothing twice."""
    if posting.needs_recharge:
        enqueue_on_commit("billing.tasks.auto_recharge", None, posting.account_id)
    if (posting.amount_tokens < 0 and posting.transaction_id is not None) or posting.expired_tokens:
        transaction.on_commit(partial(_notice_crossing, posting))


def _notice_crossing(posting: Posting) -> None:
    after_tokens = posting.available_tokens + posting.reserved_tokens  # the balance without what has ended
    before_tokens = after_tokens - min(posting.amount_tokens, 0) + posting.expired_tokens
    try:
        low_tokens, critical_tokens = _thresholds()
        if before_tokens >= critical_tokens > after_tokens:
            tell = messages.critical_balance
        elif before_tokens > low_tokens >= after_tokens:
            tell = messages.low_balance
        else:
            return
        account = TokenAccount.objects.select_related("user", "workspace").get(pk=posting.account_id)
        tell(account, key=str(posting.transaction_id or f"usage-{posting.usage_id}"))
    except Exception:  # the debit is done; its answer must not depend on a notice
        logger.exception(
            "A low balance was not noticed",
            account_id=posting.account_id,
            transaction_id=posting.transaction_id,
        )


_known_thresholds: tuple[float, int, int] | None = None


def _thresholds() -> tuple[int, int]:
    """The low and the critical balance, read again every half minute: a debit waits for no query of ours."""
    global _known_thresholds
    if _known_thresholds is None or _known_thresholds[0] < time.monotonic():
        known = system_settings.get_system_settings()
        valid_until = time.monotonic() + THRESHOLDS_KEPT_SECONDS
        _known_thresholds = valid_until, known.low_balance_tokens, known.critical_balance_tokens
    return _known_thresholds[1:]
