"""What Celery runs. Each task calls one domain function and may be delivered twice."""

import time
from datetime import timedelta
from functools import partial

import structlog
from celery import shared_task
from django.db import transaction
from django.utils import timezone

from billing import (
    bulk,
    finance,
    grants,
    ledger,
    notifications,
    own_data,
    purchases,
    recharge,
    reconcile,
    refunds,
    retention,
    rollups,
    system_settings,
    verification,
)
from billing.background import enqueue_on_commit
from billing.gateway import GatewayError
from billing.ledger import Posting
from billing.models import TokenAccount

logger = structlog.get_logger(__name__)

THRESHOLDS_KEPT_SECONDS = 30


@shared_task
def expire_reservations() -> int:
    return ledger.expire_reservations()


@shared_task
def sweep_purchases() -> int:
    return purchases.sweep_purchases()


@shared_task
def resume_refunds() -> int:
    return refunds.resume_requests()


@shared_task
def reconcile_stripe(days: int) -> None:
    reconcile.reconcile(since=timezone.now() - timedelta(days=days))


@shared_task
def auto_recharge(user_id: int) -> None:
    recharge.trigger_auto_recharge(user_id=user_id)


@shared_task
def sweep_auto_recharges() -> int:
    return recharge.sweep_auto_recharges()


@shared_task
def roll_up_usage() -> None:
    rollups.roll_up()


@shared_task
def check_books() -> int:
    return verification.check_books()


@shared_task
def send_notifications() -> int:
    return notifications.send_pending_emails()


@shared_task
def weekly_summary() -> int:
    return notifications.weekly_summary()


@shared_task(autoretry_for=(GatewayError,), retry_backoff=True, max_retries=3)
def remember_card(purchase_id: int) -> None:
    recharge.remember_card(purchase_id=purchase_id)


@shared_task
def erase_customer(account_id: int) -> None:
    own_data.erase_customer(account_id=account_id)


@shared_task
def sweep_customers() -> int:
    return own_data.sweep_customers()


@shared_task
def expire_grant_requests() -> int:
    return grants.expire_requests()


@shared_task
def run_bulk_job(job_id: int) -> None:
    bulk.run_bulk_job(job_id=job_id)


@shared_task
def sweep_bulk_jobs() -> int:
    return bulk.sweep_bulk_jobs()


@shared_task
def export_finance() -> None:
    finance.export_missing()


@shared_task
def apply_retention() -> None:
    retention.apply_retention()


@shared_task
def refresh_card(user_id: int) -> None:
    recharge.refresh_card(user_id=user_id)


# --- What follows a debit -------------------------------------------------------------------------------------------


def follow_debit(posting: Posting) -> None:
    """After the commit of a debit: start an auto-recharge, say that the balance runs low. Call it in the debit's
    transaction or after it. It never raises, never waits for the broker, and costs no query unless a threshold was
    crossed. Repeated, it says nothing twice."""
    if posting.needs_recharge:
        enqueue_on_commit("billing.tasks.auto_recharge", posting.user_id)
    if posting.amount_tokens < 0 and posting.transaction_id is not None:
        transaction.on_commit(partial(_notice_crossing, posting))


def _notice_crossing(posting: Posting) -> None:
    before_tokens, after_tokens = posting.balance_tokens - posting.amount_tokens, posting.balance_tokens
    try:
        low_tokens, critical_tokens = _thresholds()
        if before_tokens >= critical_tokens > after_tokens:
            tell = notifications.critical_balance
        elif before_tokens > low_tokens >= after_tokens:
            tell = notifications.low_balance
        else:
            return
        account = TokenAccount.objects.select_related("user").get(pk=posting.account_id)
        tell(account, key=str(posting.transaction_id))
    except Exception:  # the debit is done; its answer must not depend on a notice
        logger.exception(
            "A low balance was not noticed",
            user_id=posting.user_id,
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
