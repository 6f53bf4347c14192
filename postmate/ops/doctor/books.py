"""What the tables say: what is on sale, what waits for somebody, whether the laws hold."""

from datetime import UTC, timedelta

from allauth.mfa.models import Authenticator
from django.conf import settings
from django.db.models import Min, Q
from django.utils import timezone

from accounts.models import User
from billing.figures import finance
from billing.ledger import welcome
from billing.models import (
    Drift,
    ModelPrice,
    Notification,
    Purchase,
    RollUp,
    StripeEvent,
    SystemSettings,
    TokenAccount,
    TokenPricing,
    TokenUsage,
)
from billing.models.account import WithheldBonus
from billing.upkeep.verification import verify
from kit.database import now
from postmate.ops.doctor.findings import RETIRING_DAYS, Outcomes, ago, count, ok, problem, warning


def sale() -> Outcomes:
    """System settings, packages and models: what people can buy, and spend it on."""
    if not SystemSettings.objects.filter(key="global").exists():
        yield problem("The system settings are missing.", "Run `manage.py seed_billing`.")
    elif not SystemSettings.objects.get(key="global").billing_enabled:
        yield warning(
            "Billing is switched off: AI operations cost nothing.", "Switch it on under /admin/tokens/settings/."
        )
    on_sale = TokenPricing.objects.filter(is_active=True).count()
    if on_sale == 0:
        yield problem("No package is on sale.", "Make one active on the dashboard, or run `manage.py seed_billing`.")
    else:
        yield ok(f"{count(on_sale, 'package')} on sale.")


def models_on_offer() -> Outcomes:
    today = timezone.now().date()
    active = list(ModelPrice.objects.filter(is_active=True).order_by("provider", "model"))
    offered = [price for price in active if price.retired_on is None or price.retired_on > today]
    if not any(price.kind == "text" for price in offered):
        yield problem(
            "No model for texts is on offer.", "Run `manage.py seed_billing`, or make one active in Django admin."
        )
    for price in offered:
        if price.retired_on and price.retired_on <= today + timedelta(days=RETIRING_DAYS):
            replacement = f" Its replacement is {price.replacement}." if price.replacement else ""
            yield warning(
                f"{price.model} is refused from {price.retired_on} on.{replacement}",
                "See that the replacement is on offer, and tell people who use the model.",
            )
    for price in ModelPrice.objects.filter(Q(retired_on=None) | Q(retired_on__gt=today)).order_by("provider", "model"):
        if price.missing_prices:
            yield warning(
                f"{price.model} has no price, so it is not sold.",
                "Enter its provider's prices in Django admin, or run `manage.py import_model_prices`.",
            )
    yield ok(f"{count(len(offered), 'model')} on offer.")


def superadmins() -> Outcomes:
    people = User.objects.filter(role=User.Role.SUPERADMIN, is_active=True)
    number = people.count()
    if number == 0:
        yield problem("There is no superadmin.", "Run `manage.py createsuperuser`.")
        return
    secured = (
        Authenticator.objects.filter(user__in=people, type=Authenticator.Type.TOTP).values("user").distinct().count()
    )
    text = f"{count(number, 'superadmin')}, {secured} of them with a second factor."
    if secured == number or not settings.ADMIN_MFA_REQUIRED:
        yield ok(text)
    else:
        make = problem if secured == 0 else warning
        yield make(text, "Without one they cannot open the admin side. They set it up under /accounts/2fa/.")


def welcome_bonus() -> Outcomes:
    try:
        welcome.read_key()
    except welcome.KeyLost:
        yield problem(
            "Nobody can tell who had the welcome bonus, so nobody gets it: the key of these marks is encrypted with a "
            "SECRET_KEY that is not set any more.",
            "Run `SECRET_KEY=new,old manage.py seed_billing` once, then `manage.py initialize_accounts`.",
        )
        return
    waiting = TokenAccount.objects.filter(bonus_withheld=WithheldBonus.WAITS).count()
    yield ok(f"It comes once for a mailbox. {count(waiting, 'account')} of disposable addresses waiting for an admin.")


def holds() -> Outcomes:
    held = TokenUsage.objects.filter(status=TokenUsage.Status.RESERVED)
    if overdue := held.filter(expires_at__lt=now() - timedelta(minutes=5)).count():
        yield problem(
            f"{count(overdue, 'hold')} past expiry and not released: these tokens cannot be spent.",
            "Worker and beat release them every 30 s: see that both run.",
        )
    else:
        yield ok(f"{count(held.count(), 'running operation')}, none beyond its time.")


def events() -> Outcomes:
    state = StripeEvent.State
    failed = StripeEvent.objects.filter(state__in=(state.FAILED, state.RECEIVED)).count()
    aside = StripeEvent.objects.filter(state=state.ASIDE).count()
    last_at = StripeEvent.objects.order_by("-id").values_list("received_at", flat=True).first()
    if failed:
        yield problem(
            f"{count(failed, 'event')} of Stripe could not be handled.",
            "Django admin (Stripe events) says why; then `manage.py replay_stripe_events`.",
        )
    if aside:
        yield warning(
            f"{count(aside, 'event')} kept aside for a person.",
            "Read why in Django admin (Stripe events), act, and mark them as dealt with.",
        )
    if not (failed or aside):
        yield ok(f"None waits; the last one came {ago(last_at)}." if last_at else "None has come yet.")


def money_to_look_at() -> Outcomes:
    drifts = Drift.objects.filter(resolved_at=None).count()
    review = Purchase.objects.filter(state=Purchase.State.REVIEW).count()
    if drifts:
        yield warning(f"{count(drifts, 'open drift')} between Stripe and the books.", "Look at /admin/tokens/drifts/.")
    if review:
        yield warning(
            f"{count(review, 'payment')} under review: not what was agreed, and not credited.",
            "Look at them under /admin/tokens/drifts/ and in Django admin (purchases).",
        )
    if not (drifts or review):
        yield ok("No drift is open, no payment waits for review.")


def roll_ups() -> Outcomes:
    until = RollUp.objects.values_list("rolled_until", flat=True).first()
    oldest = TokenUsage.objects.order_by("id").values_list("created_at", flat=True).first()
    late_from = timezone.now() - timedelta(hours=3)
    if oldest is None or oldest > late_from:
        yield ok("There is no finished hour to add up yet.")
    elif until is None or until < late_from:
        yield warning(
            f"The dashboard's figures are added up until {until or 'never'} only, and get slow.",
            "See that worker and beat run; a transaction open for hours in the database also holds them up.",
        )
    else:
        yield ok(f"Figures are added up until {until:%Y-%m-%d %H:%M} UTC.")


def outbox() -> Outcomes:
    late = Notification.objects.filter(email_next_at__lt=timezone.now() - timedelta(minutes=15)).count()
    given_up = Notification.objects.filter(
        email_wanted=True, email_sent_at=None, email_next_at=None, created_at__gt=timezone.now() - timedelta(days=7)
    ).count()
    if late:
        yield warning(
            f"{count(late, 'e-mail')} waiting for more than a quarter of an hour.", "See that worker and beat run."
        )
    if given_up:
        yield warning(
            f"{count(given_up, 'e-mail')} given up this week.",
            "Django admin (notifications, e-mail: given up) says why; mend EMAIL_URL.",
        )
    if not (late or given_up):
        yield ok("No e-mail waits for long.")


def finance_exports() -> Outcomes:
    first_at = TokenAccount.objects.aggregate(at=Min("created_at"))["at"]
    due = (timezone.now() - timedelta(hours=3)).date() - timedelta(days=1)  # written at 01:23
    if first_at is None or first_at.astimezone(UTC).date() > due:
        yield ok("None is due yet.")
    elif finance.path_of(due).exists():
        yield ok(f"That of {due} is there.")
    else:
        yield warning(
            f"That of {due} is not in {finance.folder()}.",
            f"Run `manage.py export_finance --day {due}`; where the books do not balance, it says so.",
        )


def books() -> Outcomes:
    number = 0
    violations = []
    for finding in verify():
        number += 1
        if finding.violations:
            violations.append(f"{finding.check.name} (law {finding.check.law}): {finding.violations:,}")
    if violations:
        yield problem(
            f"The books are broken. {'; '.join(violations)}.",
            "Run `manage.py verify_ledger` for the rows. docs/OPERATIONS.md says what to do.",
        )
    else:
        yield ok(f"In order: {number} checks over all rows, no violation.")
