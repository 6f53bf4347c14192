"""What Celery runs. Each task calls one domain function and may be delivered twice."""

from datetime import timedelta

from celery import shared_task
from django.utils import timezone

from billing import ledger
from billing.figures import finance, roll_ups
from billing.notifications import outbox, weekly
from billing.payments import cards, customers, purchases, recharge, reconcile, refund_requests
from billing.payments.gateway import GatewayError
from billing.staff import bulk, grants
from billing.upkeep import retention, verification
from billing.usage.after_debit import follow_debit
from kit import outgoing


@shared_task
def expire_reservations() -> int:
    return ledger.expire_reservations()


@shared_task
def expire_lots() -> int:
    postings = ledger.expire_lots()
    for posting in postings:
        follow_debit(posting)
    return len(postings)


@shared_task
def sweep_purchases() -> int:
    return purchases.sweep_purchases()


@shared_task
def resume_refunds() -> int:
    return refund_requests.resume_requests()


@shared_task
def reconcile_stripe(days: int) -> None:
    reconcile.reconcile(since=timezone.now() - timedelta(days=days))


@shared_task
def auto_recharge(user_id: int | None, account_id: int | None = None) -> None:
    recharge.trigger_auto_recharge(user_id=user_id, account_id=account_id)


@shared_task
def sweep_auto_recharges() -> int:
    return recharge.sweep_auto_recharges()


@shared_task
def roll_up_usage() -> None:
    roll_ups.roll_up()


@shared_task
def check_books() -> int:
    return verification.check_books()


@shared_task
def send_notifications() -> int:
    return outbox.send_pending_emails()


@shared_task
def weekly_summary() -> int:
    return weekly.weekly_summary()


@shared_task(autoretry_for=(GatewayError,), retry_backoff=True, max_retries=3)
def remember_card(purchase_id: int) -> None:
    cards.remember_card(purchase_id=purchase_id)


@shared_task
def erase_customer(account_id: int) -> None:
    customers.erase_customers(account_id=account_id)


@shared_task
def sweep_customers() -> int:
    return customers.sweep_erased()


@shared_task
def tell_customer(account_id: int) -> None:
    customers.tell_changes(account_id=account_id)


@shared_task
def tell_customers() -> int:
    return customers.sweep_changes()


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
def sweep_outgoing() -> int:
    return outgoing.sweep_outgoing()


@shared_task
def apply_retention() -> None:
    retention.apply_retention()


@shared_task
def refresh_card(user_id: int | None, account_id: int | None = None) -> None:
    cards.refresh_card(user_id=user_id, account_id=account_id)
