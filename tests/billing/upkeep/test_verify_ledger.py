"""`manage.py verify_ledger`: clean on clean books, and each way of breaking them is found by the check for it."""

# ruff: noqa: S608  (it tampers with the books in SQL of its own)

from datetime import timedelta
from decimal import Decimal
from io import StringIO
from threading import Thread

import pgtrigger
import pytest
from django.core.management import CommandError, call_command
from django.db import connection
from django.utils import timezone

from accounts.models import User
from billing import ledger
from billing.ledger import Operation
from billing.models import PaymentReversal, Purchase, StripeEvent, TokenAccount, TokenTransaction
from billing.pricing import TokenPools
from billing.staff import grants
from billing.upkeep import laws, verification
from tests.billing.figures.test_rollups import roll_up_until
from tests.conftest import MakeUser

pytestmark = pytest.mark.django_db

DRAFT = Operation("generation", "openai", "gpt-6.1-terra", multiplier=Decimal("1.5"))


def make_purchase(user: User, *, state: str = "paid", kind: str = "checkout") -> Purchase:
    account = TokenAccount.objects.get(user=user)
    return Purchase.objects.create(
        account=account,
        user=user,
        workspace_id=account.workspace_id,
        kind=kind,
        state=state,
        paid_at=timezone.now() if state == "paid" else None,
        package_name="Test",
        tokens=5_000,
        amount_cents=500,
        currency="usd",
        stripe_payment_intent_id=f"pi_{Purchase.objects.count()}" if state == "paid" else None,
    )


def reserve(user: User, key: str) -> int:
    posting = ledger.reserve_tokens(
        user_id=user.pk, tokens=300, operation=DRAFT, idempotency_key=key, lifetime_seconds=600
    )
    assert posting.usage_id is not None
    return posting.usage_id


@pytest.fixture
def busy(db: None) -> User:
    """Has done a bit of everything: bonus, purchase, refund, grant, operations of every outcome."""
    user, idle, susan = (
        User.objects.create(email=f"{name}@example.com", role=role)
        for name, role in (("busy", "user"), ("idle", "user"), ("susan", "superadmin"))
    )
    for each in (user, idle, susan):
        ledger.initialize_account(user_id=each.pk)
    for kind, type in (("checkout", "purchase"), ("auto_recharge", "auto_recharge")):
        purchase = make_purchase(user, kind=kind)
        ledger.add_tokens(
            user_id=user.pk,
            tokens=purchase.tokens,
            type=type,
            description="Test",
            idempotency_key=f"purchase-{purchase.pk}",
            purchase_id=purchase.pk,
            paid_cents=purchase.amount_cents,
            currency=purchase.currency,
            stripe_payment_intent_id=purchase.stripe_payment_intent_id,
        )
    PaymentReversal.objects.create(
        kind="refund",
        stripe_id="re_1",
        stripe_payment_intent_id=str(purchase.stripe_payment_intent_id),
        purchase=purchase,
        amount_cents=100,
        currency="usd",
        status="succeeded",
    )
    ledger.deduct_tokens(user_id=user.pk, tokens=1_000, type="refund", purchase_id=purchase.pk, may_leave_debt=True)
    grants.grant_tokens(admin=susan, user_id=user.pk, tokens=50, reason="Sorry", request_key="sorry")
    User.objects.filter(pk=susan.pk).update(role="user")  # who gave them is no superadmin any more
    ledger.settle_usage(usage_id=reserve(user, "settled"), pools=TokenPools(output_tokens=100))
    ledger.settle_usage(usage_id=reserve(user, "beyond its quote"), pools=TokenPools(output_tokens=1_000))
    ledger.release_usage(usage_id=reserve(user, "failed"))
    ledger.release_usage(usage_id=reserve(user, "expired"), status="expired")
    ledger.deduct_tokens(user_id=user.pk, tokens=20, operation=DRAFT, pools=TokenPools(output_tokens=9))
    for number in (1, 2):
        ledger.add_tokens(
            user_id=user.pk, tokens=100, type="bonus", description="Test", idempotency_key=f"lot-{number}",
            expires_at=timezone.now() + timedelta(days=number),
        )  # fmt: skip
    ledger.deduct_tokens(user_id=user.pk, tokens=120, operation=DRAFT, pools=TokenPools(output_tokens=80))
    make_purchase(user, state="open")
    reserve(user, "running")
    roll_up_until(timezone.now() + timedelta(days=2))
    return user


def broken_laws() -> set[str]:
    return {finding.check.name for finding in verification.verify() if finding.violations}


def test_clean_books(busy: User) -> None:
    output = StringIO()
    call_command("verify_ledger", stdout=output)
    lines = output.getvalue().splitlines()
    assert "Each balance is the sum of its ledger rows (law 4): 3 rows, ok" in lines
    assert all(line.endswith("ok") for line in lines[:-1])
    assert lines[-1] == f"The books are in order: {len(lines) - 1} checks, no violation."


def test_no_books() -> None:
    call_command("verify_ledger", stdout=StringIO())


def test_a_violation_is_shown_with_its_figures_and_fails_the_command(busy: User) -> None:
    account = TokenAccount.objects.get(user=busy)
    TokenAccount.objects.update(balance=account.balance + 1)
    output = StringIO()
    with pytest.raises(CommandError, match=r"broken: 3 violations in \d+ checks") as failed:
        call_command("verify_ledger", stdout=output)
    assert failed.value.returncode == 1
    report = output.getvalue()
    assert "Each balance is the sum of its ledger rows (law 4): 3 rows, 3 VIOLATIONS" in report
    assert f"account {account.pk}, balance {account.balance + 1}, ledger {account.balance}" in report


# The check that must find it, and how to break the law behind the ledger's back. `{busy}`, `{idle}`: their accounts.
OF_TYPE = "(SELECT id FROM billing_tokentransaction WHERE account_id = {busy} AND type = '%s' ORDER BY id LIMIT 1)"
BY_KEY = "(SELECT id FROM billing_tokenusage WHERE account_id = {busy} AND idempotency_key = '%s')"
A_KEY = """WITH key AS (
    INSERT INTO accounts_apikey (user_id, name, scopes, token_start, token_hash)
    SELECT min(id), 'x', '{{usage:read}}', 'x', 'x' FROM accounts_user RETURNING id
)"""
OTHERS = "(SELECT %s FROM billing_tokenaccount WHERE id = {idle})"
TAMPERING: list[tuple[str, str]] = [
    (
        "What each lot has left is what the ledger moved of it",
        """UPDATE billing_tokenaccount SET lots = jsonb_set(lots, '{{0,remaining}}', '81'), balance = balance + 1
            WHERE id = {busy}""",
    ),
    ("No lot gave more than it was given, at any time", "UPDATE billing_tokenlot SET tokens = 90"),
    (
        "A ledger row moves no more of lots than it moves at all",
        "UPDATE billing_tokentransaction SET amount = -90, balance_after = balance_before - 90 WHERE amount = -120",
    ),
    (
        "What is held of lots is what open reservations hold of them",
        "UPDATE billing_tokenusage SET lot_holds = NULL WHERE status = 'reserved'",
    ),
    (
        "Lots stand in the order of spending, and the first one's end beside them",
        "UPDATE billing_tokenaccount SET next_lot_ends_at = next_lot_ends_at + interval '1 year'",
    ),
    (
        "Lots stand in the order of spending, and the first one's end beside them",
        "UPDATE billing_tokenaccount SET lots = jsonb_set(lots, '{{0,ended}}', 'true') WHERE id = {busy}",
    ),
    (
        "Each lot came with a ledger row",
        "UPDATE billing_tokentransaction SET idempotency_key = 'x' WHERE idempotency_key = 'lot-2'",
    ),
    (
        "What is held of lots is what open reservations hold of them",
        "UPDATE billing_tokenaccount SET lots = jsonb_set(lots, '{{0,held}}', '0') WHERE id = {busy}",
    ),
    (
        "After its end a lot pays for nothing but operations held before",
        """UPDATE billing_tokenlot SET expires_at = now() - interval '1 minute', created_at = now() - interval '1 day';
           UPDATE billing_tokenusage SET lot_holds = '{{}}' WHERE status = 'reserved'""",
    ),
    (
        "Plain tokens are below zero only when no lot is left",
        "UPDATE billing_tokenaccount SET balance = 79, reserved = 0 WHERE id = {busy}",
    ),
    (
        "After its end a lot pays for nothing but operations held before",
        "UPDATE billing_tokenlot SET expires_at = now() - interval '1 minute', created_at = now() - interval '1 day'",
    ),
    (
        "No lot was booked as ended before its end",
        """INSERT INTO billing_tokentransaction (account_id, user_id, workspace_id, sequence, type, amount,
               balance_before, balance_after, lot_id)
           SELECT account.id, user_id, workspace_id, sequence + 1, 'expiry', -1, balance, balance - 1, lot.id
             FROM billing_tokenaccount AS account JOIN billing_tokenlot AS lot ON lot.account_id = account.id
            LIMIT 1""",
    ),
    (
        "What has ended is booked, unless an operation still holds it",
        """UPDATE billing_tokenaccount
              SET lots = jsonb_set(jsonb_set(lots, '{{0,ends}}', '"2026-01-01T00:00:00+00:00"'), '{{0,held}}', '0')
            WHERE id = {busy}""",
    ),
    (
        "A personal account is its workspace's owner's, a team's is nobody's",
        "UPDATE accounts_workspace SET kind = 'team', owner_id = NULL WHERE id = " + OTHERS % "workspace_id",
    ),
    (
        "Each operation names its payer's workspace, and in a personal one its owner acted",
        f"UPDATE billing_tokenusage SET workspace_id = {OTHERS % 'workspace_id'} WHERE id = {BY_KEY % 'failed'}",
    ),
    (
        "Each operation names its payer's workspace, and in a personal one its owner acted",
        f"UPDATE billing_tokenusage SET user_id = {OTHERS % 'user_id'} WHERE id = {BY_KEY % 'failed'}",
    ),
    *(
        (
            "Each ledger row names its payer's workspace, and who acted as its operation or purchase says",
            f"{A_KEY} UPDATE {change} WHERE id = {OF_TYPE % type}",
        )
        for change, type in (
            (f"billing_tokentransaction SET workspace_id = {OTHERS % 'workspace_id'}", "bonus"),
            (f"billing_tokentransaction SET user_id = {OTHERS % 'user_id'}", "admin_grant"),
            ("billing_tokentransaction SET user_id = NULL", "purchase"),
            ("billing_tokentransaction SET api_key_id = (SELECT id FROM key)", "usage"),
        )
    ),
    ("Each balance is the sum of its ledger rows", "UPDATE billing_tokenaccount SET balance = balance + 1"),
    ("Each sequence is the number of ledger rows", "UPDATE billing_tokenaccount SET sequence = sequence + 1"),
    (
        "Ledger rows are numbered from 1 without a gap",
        "UPDATE billing_tokentransaction SET sequence = 99 WHERE account_id = {busy} AND sequence = 2",
    ),
    (
        "Each ledger row starts where the one before it ended, the first at 0",
        "UPDATE billing_tokentransaction SET balance_before = balance_before + 1, balance_after = balance_after + 1 "
        "WHERE account_id = {busy} AND sequence = 1",
    ),
    (
        "Each ledger row ends at its start plus its amount",
        "UPDATE billing_tokentransaction SET balance_after = balance_after + 1 WHERE sequence = 2",
    ),
    (
        "Time never runs backwards along an account's ledger",
        "UPDATE billing_tokentransaction SET created_at = created_at - interval '1 day' WHERE sequence = 2",
    ),
    ("Reserved is the sum of the open reservations", "UPDATE billing_tokenaccount SET reserved = reserved + 1"),
    ("No active account is in debt", "UPDATE billing_tokenaccount SET reserved = 90000 WHERE id = {busy}"),
    (
        "No account is suspended for a debt that is paid",
        "UPDATE billing_tokenaccount SET status = 'suspended', status_reason = 'debt' WHERE id = {busy}",
    ),
    (
        "Every debt began with a clawback or an after-the-fact usage record",
        "UPDATE billing_tokenaccount SET balance = -1, status = 'suspended', status_reason = 'debt' WHERE id = {idle}",
    ),
    (
        "Lifetime purchased is the sum of purchases and auto-recharges",
        "UPDATE billing_tokenaccount SET lifetime_purchased_tokens = 1 WHERE id = {busy}",
    ),
    (
        "Lifetime granted is the sum of grants and bonuses",
        "UPDATE billing_tokenaccount SET lifetime_granted_tokens = 1 WHERE id = {busy}",
    ),
    (
        "Lifetime used is the sum of usage",
        "UPDATE billing_tokenaccount SET lifetime_used_tokens = 1 WHERE id = {busy}",
    ),
    (
        "Lifetime spent is the sum of cents paid",
        "UPDATE billing_tokenaccount SET lifetime_spent_cents = 1 WHERE id = {busy}",
    ),
    (
        "A payment intent credits at most once",
        "DROP INDEX ledger_one_credit_per_payment_intent; UPDATE billing_tokentransaction "
        "SET stripe_payment_intent_id = 'pi_0' WHERE type = 'auto_recharge'",
    ),
    (
        "Each paid purchase has exactly one credit, any other none",
        "UPDATE billing_purchase SET state = 'failed' WHERE stripe_payment_intent_id = 'pi_0'",
    ),
    (
        "Each paid purchase has exactly one credit, any other none",
        "UPDATE billing_purchase SET state = 'paid', paid_at = now() WHERE state = 'open'",
    ),
    (
        "Each paid purchase has exactly one credit, any other none",
        "DROP INDEX ledger_one_credit_per_purchase; UPDATE billing_tokentransaction SET type = 'purchase', "
        "purchase_id = (SELECT id FROM billing_purchase WHERE stripe_payment_intent_id = 'pi_0') "
        "WHERE type = 'admin_grant'",
    ),
    *(
        (
            "Each credit is what its purchase agreed: tokens, price, currency, account, payment",
            f"UPDATE billing_purchase SET {change} WHERE stripe_payment_intent_id = 'pi_0'",
        )
        for change in (
            "tokens = 4000",
            "amount_cents = 400",
            "currency = 'eur'",
            "account_id = {idle}",
            "stripe_payment_intent_id = 'pi_other'",
            "kind = 'auto_recharge'",
        )
    ),
    (
        "Refunds and disputes take back at most what their purchase credited, from the same account",
        "UPDATE billing_tokentransaction SET amount = -5001 WHERE type = 'refund'",
    ),
    (
        "Refunds and disputes take back at most what their purchase credited, from the same account",
        "UPDATE billing_tokentransaction SET amount = 1000 WHERE type = 'refund'",  # given back, never taken
    ),
    *(
        ("Refunds and disputes of a payment are in the ledger to the token", sql)
        for sql in (
            "UPDATE billing_paymentreversal SET amount_cents = 101",
            "UPDATE billing_paymentreversal SET status = 'failed'",
            "UPDATE billing_purchase SET charged_cents = 600",
            "INSERT INTO billing_paymentreversal (kind, stripe_id, stripe_payment_intent_id, amount_cents, currency, "
            "status, reason, updated_at) VALUES ('dispute', 'du_1', 'pi_0', 1, 'usd', 'lost', '', now())",
        )
    ),
    (
        "One auto-recharge is under way at most",
        "DROP INDEX purchase_one_auto_recharge_under_way; "
        "UPDATE billing_purchase SET kind = 'auto_recharge', state = 'open'",
    ),
    (
        "No purchase is left open beyond its expiry",
        "UPDATE billing_purchase SET expires_at = now() - interval '2 hours' WHERE state = 'open'",
    ),
    (
        "No purchase is left open beyond its expiry",
        "UPDATE billing_purchase SET created_at = now() - interval '26 hours' WHERE state = 'open'",
    ),
    (
        "No purchase is left open beyond its expiry",
        "UPDATE billing_purchase SET state = 'processing', created_at = now() - interval '15 days' "
        "WHERE state = 'open'",
    ),
    (
        "Each succeeded operation that costs has one debit of that cost",
        "UPDATE billing_tokenusage SET billable_tokens = billable_tokens - 1 WHERE id = " + BY_KEY % "settled",
    ),
    (
        "Each succeeded operation that costs has one debit of that cost",
        "UPDATE billing_tokentransaction SET account_id = {idle}, sequence = 99 WHERE id = " + OF_TYPE % "usage",
    ),
    (
        "Each succeeded operation that costs has one debit of that cost",
        "DELETE FROM billing_tokentransaction WHERE id = " + OF_TYPE % "usage",
    ),
    (
        "Each debit for usage belongs to an operation that succeeded",
        "UPDATE billing_tokenusage SET status = 'failed', billable_tokens = 0, unbilled_tokens = 0 "
        "WHERE id = " + BY_KEY % "settled",
    ),
    (
        "Each debit for usage belongs to an operation that succeeded",
        "UPDATE billing_tokentransaction SET usage_id = " + BY_KEY % "failed" + " WHERE id = " + OF_TYPE % "usage",
    ),
    (
        "Each debit for usage belongs to an operation that succeeded",
        "UPDATE billing_tokentransaction SET usage_id = "
        + BY_KEY % "failed"
        + " WHERE id = "
        + OF_TYPE % "refund",
    ),
    (
        "No operation costs more than its quote; the rest is unbilled",
        "UPDATE billing_tokenusage SET unbilled_tokens = 0 WHERE id = " + BY_KEY % "beyond its quote",
    ),
    (
        "No operation costs more than its quote; the rest is unbilled",
        "UPDATE billing_tokenusage SET reserved_tokens = 149 WHERE id = " + BY_KEY % "settled",
    ),
    (
        "An operation that did not succeed costs nothing",
        "UPDATE billing_tokenusage SET unbilled_tokens = 1 WHERE id = " + BY_KEY % "failed",
    ),
    (
        "Actual tokens are the sum of their pools",
        "UPDATE billing_tokenusage SET input_tokens = 1 WHERE id = " + BY_KEY % "settled",
    ),
    (
        "Closed operations say when they were completed, running ones do not",
        "UPDATE billing_tokenusage SET completed_at = NULL WHERE id = " + BY_KEY % "failed",
    ),
    (
        "Closed operations say when they were completed, running ones do not",
        "UPDATE billing_tokenusage SET completed_at = now() WHERE id = " + BY_KEY % "running",
    ),
    (
        "No reservation is open 15 minutes after its expiry",
        "UPDATE billing_tokenusage SET expires_at = now() - interval '16 minutes' WHERE id = " + BY_KEY % "running",
    ),
    *(
        (
            "Each grant and deduction names a reason, and a superadmin or an admin within the limit, as they were then",
            f"UPDATE billing_tokentransaction SET {change} WHERE type = 'admin_grant'",
        )
        for change in (
            "description = ' '",
            "admin_id = NULL",
            "metadata = metadata || '{{\"admin_role\": \"admin\"}}'",
            "metadata = metadata || '{{\"admin_role\": \"admin\", \"admin_limit_tokens\": 49}}'",
            "metadata = '{{}}', admin_id = user_id",
        )
    ),
    *(
        (
            "Each request for tokens that is done has its one ledger entry, approved by others where it must be",
            f"UPDATE billing_grantrequest SET {change}",
        )
        for change in (
            "tokens = 51",
            "kind = 'deduction'",
            "state = 'requested'",
            "transaction_id = NULL",
            "account_id = {idle}",
            "reason = 'Another'",
            "needs_two = true",
            "requested_by_role = 'admin'",
            "decided_by_id = user_id",
        )
    ),
    (
        "The welcome bonus comes once per user",
        "DROP INDEX ledger_once_per_idempotency_key; "
        "UPDATE billing_tokentransaction SET idempotency_key = 'welcome-bonus' WHERE type = 'admin_grant'",
    ),
    (
        "An account whose welcome bonus is withheld has had none",
        "UPDATE billing_tokenaccount SET bonus_withheld = 'waits' WHERE id = {idle}",
    ),
    (
        "Triggers refuse UPDATE, DELETE and TRUNCATE of the ledger and the audit log",
        "ALTER TABLE billing_tokentransaction DISABLE TRIGGER USER",
    ),
    (
        "Triggers refuse UPDATE, DELETE and TRUNCATE of the ledger and the audit log",
        "ALTER TABLE accounts_auditentry DISABLE TRIGGER USER",
    ),
    (
        "The hours of the roll-up are the sums of their operations",
        "UPDATE billing_usagehour SET unbilled_tokens = unbilled_tokens + 1",
    ),
    (
        "The hours of the roll-up are the sums of their operations",
        "UPDATE billing_tokenusage SET provider_cost_microusd = provider_cost_microusd + 1 WHERE status = 'succeeded'",
    ),
    (
        "The days of the roll-up are the sums of their hours",
        "DELETE FROM billing_usageday WHERE id = (SELECT min(id) FROM billing_usageday)",
    ),
    (
        "The hours of the ledger's roll-up are the sums of their entries",
        "UPDATE billing_ledgerhour SET tokens = tokens + 1 WHERE type = 'bonus'",
    ),
    (
        "Every constraint that guards the laws is in place",
        "ALTER TABLE billing_tokenaccount DROP CONSTRAINT account_reserved_not_negative",
    ),
    (
        "Every constraint that guards the laws is in place",
        "DROP INDEX ledger_one_credit_per_payment_intent",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("check", "sql"), TAMPERING)
def test_a_broken_law_is_found(busy: User, check: str, sql: str) -> None:
    assert broken_laws() == set()
    names = {name: TokenAccount.objects.get(user__email=f"{name}@example.com").pk for name in ("busy", "idle")}
    with connection.cursor() as cursor, pgtrigger.ignore():
        cursor.execute("SET CONSTRAINTS ALL IMMEDIATE")
        if check != "Every constraint that guards the laws is in place":
            # The database itself would refuse most of this.
            for table, name in _check_constraints():
                cursor.execute(f'ALTER TABLE {table} DROP CONSTRAINT "{name}"')
        cursor.execute(sql.format(**names))
    assert check in broken_laws()


def _check_constraints() -> list[tuple[str, str]]:
    with connection.cursor() as cursor:
        cursor.execute(
            """SELECT conrelid::regclass::text, conname FROM pg_constraint
                WHERE contype = 'c' AND conrelid IN (
                    'billing_tokenaccount'::regclass, 'billing_tokentransaction'::regclass,
                    'billing_tokenusage'::regclass, 'billing_grantrequest'::regclass,
                    'billing_tokenlot'::regclass, 'accounts_workspace'::regclass)"""
        )
        return cursor.fetchall()


def test_an_event_that_nobody_handled_is_found(busy: User) -> None:
    event = StripeEvent.objects.create(
        event_id="evt_1", type="charge.refunded", livemode=False, payload={}, state="failed"
    )
    assert broken_laws() == set()
    StripeEvent.objects.filter(pk=event.pk).update(received_at=timezone.now() - timedelta(days=4))
    assert broken_laws() == {"No event of Stripe is left unhandled after its last delivery"}


def test_every_check_is_known_to_find_something() -> None:
    tried = {check for check, _ in TAMPERING} | {"No event of Stripe is left unhandled after its last delivery"}
    assert tried == {check.name for check in laws.checks()}


@pytest.mark.django_db(transaction=True)
def test_what_happens_meanwhile_does_not_look_broken(make_user: MakeUser) -> None:
    """All checks see one moment: a change that commits between two of them is seen by none."""
    user = make_user("alice")

    def debit_elsewhere() -> None:
        ledger.deduct_tokens(user_id=user.pk, tokens=10, operation=DRAFT, pools=TokenPools(output_tokens=5))
        TokenAccount.objects.update(lifetime_spent_cents=1)
        connection.close()

    findings = verification.verify()
    assert next(findings).check.law == "1"
    thread = Thread(target=debit_elsewhere)
    thread.start()
    thread.join()
    later = list(findings)
    assert {finding.rows for finding in later if finding.check.rows == laws.LEDGER} == {1}
    assert not any(finding.violations for finding in later)
    assert TokenTransaction.objects.count() == 2
    assert broken_laws() == {"Lifetime spent is the sum of cents paid"}
