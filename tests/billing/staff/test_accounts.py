"""Accounts as admins see them: status with a reason, and search."""

from collections.abc import Callable
from datetime import timedelta
from decimal import Decimal
from typing import Any, cast

import pytest
from django.utils import timezone

from accounts.models import AuditEntry, User
from billing import ledger
from billing.catalogue import system_settings
from billing.ledger import Operation
from billing.models import Notification, Purchase, TokenAccount
from billing.pricing import TokenPools
from billing.staff import accounts
from billing.staff.accounts import AccountError
from tests.conftest import MakeUser

pytestmark = [pytest.mark.django_db, pytest.mark.usefixtures("books_stay_in_order")]

CHAT = Operation("chat", "openai", "gpt-6-luna", multiplier=Decimal(1))


def account_of(user: User) -> TokenAccount:
    return TokenAccount.objects.get(user=user)


def use_beyond(user: User, tokens: int) -> None:
    """After-the-fact usage, which may leave a debt."""
    pools = TokenPools(output_tokens=tokens)
    ledger.deduct_tokens(user_id=user.pk, tokens=tokens, operation=CHAT, pools=pools, may_leave_debt=True)


def give(user: User, tokens: int, key: str) -> None:
    ledger.add_tokens(user_id=user.pk, tokens=tokens, type="bonus", description="Test", idempotency_key=key)


# --- Status ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("act", "status"), [(accounts.suspend_account, "suspended"), (accounts.block_account, "blocked")]
)
def test_an_account_is_closed_and_opened_with_a_reason(
    susan: User, alice: User, act: Callable[..., TokenAccount], status: str
) -> None:
    """Row 60: no new operation starts."""
    account = act(superadmin=susan, user_id=alice.pk, reason="Under review")
    assert (account.status, account.status_reason) == (status, "Under review")
    assert account.status_changed_at is not None
    entry = AuditEntry.objects.latest("pk")
    assert (entry.action, entry.actor, entry.subject, entry.reason) == ("account_status", susan, alice, "Under review")
    assert entry.before == {"status": "active", "status_reason": ""}
    assert entry.after == {"status": status, "status_reason": "Under review"}
    told = Notification.objects.get(user=alice)
    assert (told.kind, status in told.title, "Under review" in told.body) == ("account_status_changed", True, True)
    with pytest.raises(ledger.AccountNotActive):
        ledger.reserve_tokens(user_id=alice.pk, tokens=5, operation=CHAT, idempotency_key="k", lifetime_seconds=60)

    count = AuditEntry.objects.count()
    act(superadmin=susan, user_id=alice.pk, reason="Under review")  # once more changes nothing and says nothing
    assert (AuditEntry.objects.count(), Notification.objects.filter(user=alice).count()) == (count, 1)

    account = accounts.reactivate_account(superadmin=susan, user_id=alice.pk, reason="All is well")
    assert (account.status, account.status_reason) == ("active", "")
    with pytest.raises(accounts.StatusNotPossible, match="is open"):
        accounts.reactivate_account(superadmin=susan, user_id=alice.pk, reason="Again")


def test_a_payment_lifts_no_suspension_but_the_one_for_debt(susan: User, alice: User, bob: User) -> None:
    """Law 12."""
    use_beyond(alice, 10_500)
    use_beyond(bob, 10_500)
    assert account_of(alice).has_debt
    accounts.suspend_account(superadmin=susan, user_id=alice.pk, reason="Under review")
    for user in (alice, bob):
        give(user, 5_000, "paid")
    assert (account_of(alice).status, account_of(bob).status) == ("suspended", "active")


def test_reactivated_with_a_debt_the_account_waits_for_its_payment(susan: User, alice: User) -> None:
    """Laws 4 and 12."""
    accounts.block_account(superadmin=susan, user_id=alice.pk, reason="Under review")
    use_beyond(alice, 10_500)
    account = accounts.reactivate_account(superadmin=susan, user_id=alice.pk, reason="All is well")
    assert (account.status, account.has_debt) == ("suspended", True)
    with pytest.raises(accounts.StatusNotPossible, match="debt is paid"):
        accounts.reactivate_account(superadmin=susan, user_id=alice.pk, reason="Again")
    give(alice, 5_000, "paid")
    assert account_of(alice).status == "active"


@pytest.mark.parametrize("reason", ["", " ", "\x00", "debt", " Debt ", "ANONYMISED", "x" * 201])
def test_a_reason_is_in_words_of_ones_own(susan: User, alice: User, reason: str) -> None:
    """Law 12: "debt" would be a suspension that lifts itself."""
    for act in (accounts.suspend_account, accounts.block_account, accounts.reactivate_account):
        with pytest.raises(accounts.StatusNotPossible):
            act(superadmin=susan, user_id=alice.pk, reason=reason)
    assert account_of(alice).status == "active"


@pytest.mark.parametrize("who", ["alice", "bob", "adam"])
def test_only_superadmins_change_a_status(request: pytest.FixtureRequest, alice: User, who: str) -> None:
    """Row 64."""
    user = request.getfixturevalue(who)
    user.role = "superadmin"  # the object says so, the database does not
    for act in (accounts.suspend_account, accounts.block_account, accounts.reactivate_account):
        with pytest.raises(accounts.StatusNotAllowed):
            act(superadmin=user, user_id=alice.pk, reason="Because")
    assert account_of(alice).status == "active"
    assert AuditEntry.objects.filter(actor=user, outcome="refused", subject=alice).count() == 3


def test_a_superadmin_does_not_lock_themselves_out(susan: User) -> None:
    with pytest.raises(accounts.StatusNotAllowed):
        accounts.block_account(superadmin=susan, user_id=susan.pk, reason="Oops")
    assert account_of(susan).status == "active"


def test_an_anonymised_account_stays_blocked(susan: User, alice: User) -> None:
    TokenAccount.objects.filter(user=alice).update(status="blocked", status_reason="anonymised")
    for act in (accounts.suspend_account, accounts.reactivate_account):
        with pytest.raises(accounts.StatusNotPossible, match="anonymised"):
            act(superadmin=susan, user_id=alice.pk, reason="Because")


# --- Search ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def crowd(make_user: MakeUser, susan: User) -> dict[str, User]:
    """One in each band: critical below 100, low to 1,000, high from 100,000."""
    balances = {"deb": 50, "crit": 99, "low": 1_000, "fine": 1_001, "rich": 100_000}
    people = {name: make_user(name, tokens=tokens) for name, tokens in balances.items()}
    use_beyond(people["deb"], 60)
    people["susan"] = susan
    return people


def found(**filters: Any) -> list[str]:
    return [account.holder.partition("@")[0] for account in accounts.get_user_accounts(**filters).accounts]


@pytest.mark.parametrize(
    ("band", "names"),
    [
        ("debt", ["deb"]),
        ("critical", ["crit"]),
        ("low", ["low"]),
        ("healthy", ["susan", "fine"]),
        ("high", ["rich"]),
        ("", ["rich", "susan", "fine", "low", "crit", "deb"]),
    ],
)
def test_bands(crowd: dict[str, User], band: str, names: list[str]) -> None:
    assert found(band=band) == names


def test_bands_follow_the_settings(crowd: dict[str, User], susan: User) -> None:
    changes = {"low_balance_tokens": 1_001, "critical_balance_tokens": 1_000}
    system_settings.update_system_settings(changes=changes, changed_by_id=susan.pk)
    assert (found(band="critical"), found(band="low")) == (["crit"], ["fine", "low"])
    bands = accounts.bands(system_settings.get_system_settings())
    edges = [edge for pair in bands.values() for edge in pair]
    assert edges[1:-1:2] == edges[2:-1:2]  # each begins where the one before it ends


def test_search_and_status(crowd: dict[str, User]) -> None:
    rich = crowd["rich"]
    TokenAccount.objects.filter(user=rich).update(stripe_customer_id="cus_1", status="blocked", status_reason="x")
    account = account_of(rich)
    Purchase.objects.create(
        account=account, user=rich, workspace=account.workspace, kind="checkout", package_name="Starter",
        tokens=5, amount_cents=500, currency="usd", state="failed", stripe_payment_intent_id="pi_1",
        stripe_session_id="cs_1",
    )  # fmt: skip
    for search in ("RICH@ex", "Rich", str(rich.pk), "cus_1", "pi_1", "cs_1", " rich "):
        assert "rich" in found(search=search), search
    for search in ("cus_", "pi_2", "nobody", "\x00", "%", "_", "9" * 40, "²"):
        assert found(search=search) == [], search
    assert found(status="blocked") == ["rich"]
    assert found(status="suspended") == ["deb"]
    assert found(status="blocked", search="deb") == []
    wrongs: list[dict[str, Any]] = [{"status": "open"}, {"band": "rich"}, {"sort": "email; DROP"}, {"cursor": "x"}]
    for wrong in [*wrongs, {"cursor": "W10="}]:
        with pytest.raises(AccountError):
            accounts.get_user_accounts(**wrong)


def test_order(crowd: dict[str, User]) -> None:
    assert found(sort="balance") == ["deb", "crit", "low", "fine", "susan", "rich"]
    # The bonus was 10,000: what is missing of it was used.
    assert found(sort="-usage", limit=4) == ["deb", "crit", "low", "fine"]
    assert found(sort="joined") == ["susan", "deb", "crit", "low", "fine", "rich"]
    now = timezone.now()
    for name, days in (("low", 3), ("rich", 1), ("low", 9)):
        account = account_of(crowd[name])
        Purchase.objects.create(
            account=account, user=crowd[name], workspace=account.workspace, kind="checkout", package_name="Starter",
            tokens=5, amount_cents=500, currency="usd", state="review", paid_at=now - timedelta(days=days),
        )  # fmt: skip
    assert [row.last_purchase_at for row in cast(Any, accounts.get_user_accounts().accounts)] == [None] * 6
    Purchase.objects.update(state="paid")
    try:
        assert found(sort="-last_purchase")[:2] == ["rich", "low"]
        page = accounts.get_user_accounts(sort="-last_purchase", limit=2)
        assert [row.last_purchase_at for row in cast(Any, page.accounts)] == [
            now - timedelta(days=1), now - timedelta(days=3),
        ]  # fmt: skip
    finally:
        Purchase.objects.update(state="review")  # nothing was credited for them


@pytest.mark.parametrize(
    "sort", ["balance", "-balance", "usage", "-usage", "last_purchase", "-last_purchase", "joined"]
)
def test_pages_hold_everybody_once(crowd: dict[str, User], make_user: MakeUser, sort: str) -> None:
    for number in range(5):
        make_user(f"same-{number}", tokens=1_000)  # of one value, to be told apart by their ids
    everybody = found(sort=sort, limit=100)
    pages, cursor = [], ""
    while True:
        page = accounts.get_user_accounts(sort=sort, limit=3, cursor=cursor)
        pages += [account.holder.partition("@")[0] for account in page.accounts]
        cursor = page.next_cursor
        if not cursor:
            break
    assert pages == everybody
    assert len(set(everybody)) == len(everybody) == 11
