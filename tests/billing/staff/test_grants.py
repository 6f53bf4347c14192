"""Grants and deductions: who may give what at once, what waits, and who decides."""

from typing import Any

import pytest
from django.db import transaction
from django.db.models import Sum
from django.utils import timezone

from accounts import roles
from accounts.models import AuditEntry, User
from billing import ledger
from billing.models import GrantRequest, Notification, TokenAccount, TokenTransaction
from billing.notifications import messages
from billing.staff import grants
from billing.upkeep import verification
from tests.conftest import MakeUser, change_settings

pytestmark = [pytest.mark.django_db, pytest.mark.usefixtures("books_stay_in_order")]

State = GrantRequest.State


@pytest.fixture
def sandra(make_user: MakeUser) -> User:
    """Another superadmin."""
    return make_user("sandra", role="superadmin")


@pytest.fixture
def sven(make_user: MakeUser) -> User:
    """A third one."""
    return make_user("sven", role="superadmin")


def grant(admin: User, user: User, tokens: Any = 500, **fields: Any) -> GrantRequest:
    values = {"reason": "Sorry for the outage", "request_key": f"key-{GrantRequest.objects.count()}"} | fields
    return grants.grant_tokens(admin=admin, user_id=user.pk, tokens=tokens, **values)


def deduct(admin: User, user: User, tokens: Any = 500, **fields: Any) -> GrantRequest:
    values = {"reason": "Granted twice", "request_key": f"key-{GrantRequest.objects.count()}"} | fields
    return grants.deduct_granted_tokens(admin=admin, user_id=user.pk, tokens=tokens, **values)


def balance(user: User) -> int:
    return TokenAccount.objects.get(user=user).balance


def newest_entry() -> AuditEntry:
    return AuditEntry.objects.latest("pk")


def nothing_moved(*people: User) -> bool:
    moved = TokenTransaction.objects.filter(type__in=("admin_grant", "admin_deduction"))
    return not moved.exists() and all(balance(person) == 10_000 for person in people)


# --- Superadmins ----------------------------------------------------------------------------------------------------


def test_a_superadmin_grants_at_once(susan: User, alice: User) -> None:
    request = grant(susan, alice, 500)
    assert (request.state, request.requested_by, request.decided_by) == ("done", susan, susan)
    entry = TokenTransaction.objects.get(type="admin_grant")
    assert (entry.account.user, entry.amount, entry.admin, entry.description) == (
        alice, 500, susan, "Sorry for the outage",
    )  # fmt: skip
    assert request.transaction == entry
    account = TokenAccount.objects.get(user=alice)
    assert (account.balance, account.lifetime_granted_tokens) == (10_500, 10_500)
    told = Notification.objects.get(user=alice)
    assert (told.kind, "Sorry for the outage" in told.body) == ("grant_received", True)
    written = newest_entry()
    assert (written.action, written.actor, written.subject, written.outcome) == ("grant", susan, alice, "done")
    assert (written.before, written.after) == ({"balance_tokens": 10_000}, {"balance_tokens": 10_500})
    assert written.reason == "Sorry for the outage"


def test_a_superadmin_deducts_at_once(susan: User, alice: User) -> None:
    assert deduct(susan, alice, 10_000).state == "done"
    entry = TokenTransaction.objects.get(type="admin_deduction")
    assert (entry.amount, entry.admin, entry.balance_after) == (-10_000, susan, 0)
    assert Notification.objects.get(user=alice).kind == "tokens_deducted"
    assert newest_entry().action == "deduction"


@pytest.mark.parametrize("suspended", [False, True])
def test_a_deduction_leaves_no_debt(susan: User, alice: User, suspended: bool) -> None:
    """Law 4."""
    if suspended:
        TokenAccount.objects.filter(user=alice).update(status="suspended", status_reason="Checking")
    with pytest.raises(grants.GrantNotPossible, match="Only 10,000 tokens are available"):
        deduct(susan, alice, 10_001)
    assert nothing_moved(alice)
    assert not GrantRequest.objects.exists()
    assert deduct(susan, alice, 10_000).state == "done"  # and no suspension stands in its way


def test_a_suspended_account_is_granted_tokens(susan: User, alice: User) -> None:
    """Law 12."""
    TokenAccount.objects.filter(user=alice).update(status="blocked", status_reason="Fraud")
    assert grant(susan, alice).state == "done"
    assert TokenAccount.objects.get(user=alice).status == "blocked"


def test_a_grant_sent_twice_is_one(susan: User, alice: User, bob: User) -> None:
    """Row 65."""
    first = grant(susan, alice, request_key="form-1")
    entries = AuditEntry.objects.count()
    assert grant(susan, alice, request_key="form-1") == first
    assert (balance(alice), AuditEntry.objects.count()) == (10_500, entries)
    others: list[dict[str, Any]] = [{"tokens": 501}, {"reason": "Another"}, {"user": bob}]
    for other in others:
        values: dict[str, Any] = {"admin": susan, "user": alice, "request_key": "form-1"}
        with pytest.raises(grants.GrantKeyConflict):
            grant(**values | other)
    with pytest.raises(grants.GrantKeyConflict):
        deduct(susan, alice, request_key="form-1", reason="Sorry for the outage")
    assert balance(alice) == 10_500


def test_keys_are_their_owners(susan: User, sandra: User, alice: User) -> None:
    """Law 8: another superadmin's form of the same key is another grant."""
    grant(susan, alice, request_key="form-1")
    grant(sandra, alice, request_key="form-1")
    assert balance(alice) == 11_000


@pytest.mark.parametrize("tokens", [0, -1, True, 1.5, "500", None, 10**15 + 1, 2**63, float("nan")])
def test_tokens_are_whole_numbers(susan: User, alice: User, tokens: Any) -> None:
    """Row 56."""
    with pytest.raises(grants.GrantNotPossible):
        grant(susan, alice, tokens)
    with pytest.raises(grants.GrantNotPossible):
        grants.preview(admin=susan, user_id=alice.pk, tokens=tokens)
    assert nothing_moved(alice)


@pytest.mark.parametrize("reason", ["", "  ", "\x00", "\u200b\n", "x" * 501])
def test_a_reason_is_needed(susan: User, alice: User, reason: str) -> None:
    with pytest.raises(grants.GrantNotPossible, match="reason"):
        grant(susan, alice, reason=reason)
    assert nothing_moved(alice)


def test_a_reason_of_any_kind_is_kept_as_text(susan: User, alice: User) -> None:
    """Rows 57 and 72."""
    request = grant(susan, alice, reason=" <b>\x00Sorry\ud800</b>\r\n& thanks ")
    assert request.reason == "<b> Sorry </b> & thanks"
    assert TokenTransaction.objects.get(type="admin_grant").description == request.reason


def test_an_unknown_or_anonymised_person_is_granted_nothing(susan: User, alice: User) -> None:
    with pytest.raises(grants.GrantNotPossible):
        grants.grant_tokens(admin=susan, user_id=0, tokens=5, reason="x", request_key="k")
    TokenAccount.objects.filter(user=alice).update(status="blocked", status_reason="anonymised")
    with pytest.raises(grants.GrantNotPossible, match="anonymised"):
        grant(susan, alice)
    assert nothing_moved(alice)


# --- Admins ---------------------------------------------------------------------------------------------------------


def test_an_admins_grant_waits(adam: User, susan: User, alice: User) -> None:
    """Row 64."""
    request = grant(adam, alice)
    assert (request.state, request.requested_by_role) == ("requested", "admin")
    assert nothing_moved(alice)
    assert not Notification.objects.filter(user=alice).exists()
    assert (newest_entry().action, newest_entry().outcome) == ("grant", "requested")
    assert list(grants.list_open_requests()) == [request]

    approved = grants.approve_request(superadmin=susan, request_id=request.pk)
    assert (approved.state, approved.decided_by, balance(alice)) == ("done", susan, 10_500)
    assert TokenTransaction.objects.get(type="admin_grant").admin == susan
    assert (newest_entry().action, newest_entry().actor) == ("grant_approved", susan)
    assert Notification.objects.get(user=alice).kind == "grant_received"
    assert not grants.list_open_requests().exists()

    entries = AuditEntry.objects.count()
    assert grants.approve_request(superadmin=susan, request_id=request.pk).state == "done"  # twice is once
    assert (balance(alice), AuditEntry.objects.count()) == (10_500, entries)
    with pytest.raises(grants.GrantAlreadyDecided):
        grants.decline_request(superadmin=susan, request_id=request.pk, reason="Too late")


def test_a_request_is_declined_with_a_reason(adam: User, susan: User, sandra: User, alice: User) -> None:
    request = grant(adam, alice)
    with pytest.raises(grants.GrantNotPossible, match="reason"):
        grants.decline_request(superadmin=susan, request_id=request.pk, reason=" ")
    grants.decline_request(superadmin=susan, request_id=request.pk, reason="Not our fault")
    request.refresh_from_db()
    assert (request.state, request.decided_by, request.decision_reason) == ("declined", susan, "Not our fault")
    assert (newest_entry().action, newest_entry().reason) == ("grant_declined", "Not our fault")
    with pytest.raises(grants.GrantAlreadyDecided):
        grants.approve_request(superadmin=sandra, request_id=request.pk)
    assert nothing_moved(alice)


def test_within_the_limit_an_admin_grants_at_once(adam: User, susan: User, alice: User, bob: User) -> None:
    change_settings(susan, admin_grant_limit_tokens=1_000)
    assert grant(adam, alice, 600).state == "done"
    assert TokenTransaction.objects.get(type="admin_grant").admin == adam
    # Row 64: the limit is for a day, not to be passed in pieces.
    assert grant(adam, bob, 401).state == "requested"
    assert grant(adam, bob, 400).state == "done"
    assert grant(adam, bob, 1).state == "requested"
    assert (balance(alice), balance(bob)) == (10_600, 10_400)
    GrantRequest.objects.update(created_at=timezone.now() - grants.LIMIT_SPAN)
    assert grant(adam, bob, 1_000).state == "done"


def test_what_was_right_stays_right(adam: User, susan: User, sandra: User, alice: User) -> None:
    """A later demotion or a lower limit breaks no books: `books_stay_in_order` looks at the end."""
    change_settings(susan, admin_grant_limit_tokens=1_000)
    grant(adam, alice, 1_000)
    grant(sandra, alice, 5_000)
    change_settings(susan, admin_grant_limit_tokens=0)
    User.objects.filter(pk__in=(adam.pk, sandra.pk)).update(role="user")


def test_an_admins_deduction_always_waits(adam: User, susan: User, alice: User) -> None:
    change_settings(susan, admin_grant_limit_tokens=1_000)
    request = deduct(adam, alice, 10_000)
    assert (request.state, nothing_moved(alice)) == ("requested", True)
    with pytest.raises(grants.GrantNotPossible):
        deduct(adam, alice, 10_001)
    ledger.deduct_tokens(
        user_id=alice.pk, tokens=1, operation=_CHAT, idempotency_key="used meanwhile"
    )  # fmt: skip
    with pytest.raises(grants.GrantNotPossible, match="9,999"):
        grants.approve_request(superadmin=susan, request_id=request.pk)
    request.refresh_from_db()
    assert (request.state, balance(alice)) == ("requested", 9_999)  # it waits on


_CHAT = ledger.Operation("chat", "openai", "gpt-6-luna", fixed_cost_tokens=1)


@pytest.mark.parametrize("who", ["alice", "bob"])
@pytest.mark.parametrize("act", [grant, deduct])
def test_users_give_and_take_nothing(request: pytest.FixtureRequest, alice: User, who: str, act: Any) -> None:
    """Row 64: not even a request is made, and the attempt is written."""
    user = request.getfixturevalue(who)
    user.role = "superadmin"  # forged: the object says so, the database does not
    with pytest.raises(grants.GrantNotAllowed):
        act(user, alice)
    assert not GrantRequest.objects.exists()
    assert (newest_entry().actor, newest_entry().outcome) == (user, "refused")


def test_who_is_not_active_gives_nothing(susan: User, alice: User) -> None:
    User.objects.filter(pk=susan.pk).update(is_active=False)
    with pytest.raises(grants.GrantNotAllowed):
        grant(susan, alice)
    assert nothing_moved(alice)


# --- Deciding -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("decide", [grants.approve_request, grants.decline_request])
@pytest.mark.parametrize("who", ["alice", "adam", "bob"])
def test_only_superadmins_decide(
    request: pytest.FixtureRequest, adam: User, alice: User, who: str, decide: Any
) -> None:
    """Row 64: the admin who asked neither."""
    wish = grant(adam, alice)
    decider = request.getfixturevalue(who)
    extra = {"reason": "No"} if decide is grants.decline_request else {}
    with pytest.raises(grants.GrantNotAllowed):
        decide(superadmin=decider, request_id=wish.pk, **extra)
    wish.refresh_from_db()
    assert (wish.state, nothing_moved(alice)) == ("requested", True)
    assert (newest_entry().actor, newest_entry().outcome, newest_entry().subject) == (decider, "refused", alice)


def test_nobody_approves_their_own_request(adam: User, sandra: User, alice: User) -> None:
    """Row 64: also when they have become a superadmin since."""
    wish = grant(adam, alice)
    User.objects.filter(pk=adam.pk).update(role="superadmin")
    adam.refresh_from_db()
    with pytest.raises(grants.GrantNotAllowed, match="own request"):
        grants.approve_request(superadmin=adam, request_id=wish.pk)
    assert not grants.may_decide(wish, adam)
    assert nothing_moved(alice)
    assert grants.may_decide(wish, sandra)


@pytest.mark.parametrize("who", ["adam", "susan"])
def test_what_is_for_oneself_waits_for_another_superadmin(
    request: pytest.FixtureRequest, susan: User, sandra: User, who: str
) -> None:
    asker = request.getfixturevalue(who)
    change_settings(susan, admin_grant_limit_tokens=1_000)
    wish = grant(asker, asker)
    assert (wish.state, nothing_moved(asker)) == ("requested", True)
    with pytest.raises(grants.GrantNotAllowed):
        grants.approve_request(superadmin=asker, request_id=wish.pk)
    assert grants.approve_request(superadmin=sandra, request_id=wish.pk).state == "done"
    assert balance(asker) == 10_500


def test_nobody_approves_what_is_for_themselves(adam: User, susan: User) -> None:
    wish = grant(adam, susan)
    with pytest.raises(grants.GrantNotAllowed, match="tokens of their own"):
        grants.approve_request(superadmin=susan, request_id=wish.pk)
    assert nothing_moved(susan)


def test_many_tokens_need_two_superadmins(susan: User, sandra: User, alice: User) -> None:
    change_settings(susan, grant_approval_tokens=1_000)
    assert grant(susan, alice, 1_000).state == "done"
    wish = grant(susan, alice, 1_001)
    assert (wish.state, wish.approved_by, balance(alice)) == ("approved", susan, 11_000)
    with pytest.raises(grants.GrantNotAllowed):
        grants.approve_request(superadmin=susan, request_id=wish.pk)
    assert grants.approve_request(superadmin=sandra, request_id=wish.pk).state == "done"
    assert balance(alice) == 12_001


def test_one_person_with_two_accounts_counts_once(
    adam: User, susan: User, sandra: User, sven: User, alice: User
) -> None:
    """134: whose addresses lead to one mailbox; neither as the second, nor for what is their own."""
    for person, address in ((susan, "susan@gmail.com"), (sandra, "su.san+2@googlemail.com")):
        person.email = address
        person.save()
    change_settings(sven, grant_approval_tokens=1_000)
    wish = grant(adam, alice, 5_000)
    assert grants.approve_request(superadmin=susan, request_id=wish.pk).state == "approved"
    own = grant(susan, sandra, 5)
    assert own.state == "requested"
    for request, who in ((wish, sandra), (own, sandra), (grant(susan, alice, 5_000), sandra)):
        with pytest.raises(grants.GrantNotAllowed):
            grants.approve_request(superadmin=who, request_id=request.pk)
    assert nothing_moved(alice, sandra)
    assert grants.approve_request(superadmin=sven, request_id=wish.pk).state == "done"


def test_a_word_counts_while_its_giver_is_superadmin(susan: User, sandra: User, sven: User, alice: User) -> None:
    """134: else one approval would do where two are needed."""
    change_settings(susan, grant_approval_tokens=1_000)
    request = grant(susan, alice, 5_000)
    roles.change_role(user_id=susan.pk, role="admin", changed_by=sven)
    assert grants.approve_request(superadmin=sandra, request_id=request.pk).state == "approved"
    assert balance(alice) == 10_000
    assert grants.approve_request(superadmin=sven, request_id=request.pk).state == "done"
    assert balance(alice) == 15_000


@pytest.mark.parametrize("kind", ["grant", "deduction"])
def test_many_tokens_in_pieces_need_two_superadmins(
    kind: str, adam: User, susan: User, sandra: User, alice: User, bob: User
) -> None:
    """What one person's word moved in a day counts together, for whomever, also what an admin asked them for; and so
    does what one person got, from whomever."""
    act = grant if kind == "grant" else deduct
    change_settings(susan, grant_approval_tokens=1_000)
    assert act(susan, alice, 600).state == "done"
    assert grants.preview(admin=susan, user_id=bob.pk, tokens=401, kind=kind).approvals_needed == 1
    assert act(susan, bob, 401).state == "approved"
    assert act(sandra, alice, 401).state == "approved"
    wish = act(adam, bob, 401)
    assert grants.approve_request(superadmin=susan, request_id=wish.pk).state == "approved"
    wish.refresh_from_db()
    assert (wish.needs_two, wish.approved_by) == (True, susan)
    assert grants.approve_request(superadmin=sandra, request_id=wish.pk).state == "done"
    # What two have approved uses up nobody's word, and a day later all begins anew.
    assert act(sandra, bob, 1_000).state == "done"
    assert act(susan, alice, 400).state == "done"
    assert act(susan, alice, 1).state == "approved"
    GrantRequest.objects.filter(state="done").update(decided_at=timezone.now() - grants.LIMIT_SPAN)
    assert act(susan, alice, 1_000).state == "done"


def test_an_admins_wish_for_many_tokens_needs_two_superadmins(
    adam: User, susan: User, sandra: User, alice: User
) -> None:
    change_settings(susan, grant_approval_tokens=1_000, admin_grant_limit_tokens=5_000)
    wish = grant(adam, alice, 1_001)
    assert wish.state == "requested"  # the limit for admins is no way round
    assert grants.approve_request(superadmin=susan, request_id=wish.pk).state == "approved"
    assert grants.approve_request(superadmin=susan, request_id=wish.pk).state == "approved"  # is still one
    assert nothing_moved(alice)
    change_settings(susan, grant_approval_tokens=None)  # law 11: what was asked for under the rule keeps it
    assert grants.approve_request(superadmin=sandra, request_id=wish.pk).state == "done"
    assert balance(alice) == 11_001


def test_a_request_expires(adam: User, susan: User, alice: User) -> None:
    """Row 76: by the database's clock."""
    wish = grant(adam, alice)
    assert grants.expire_requests() == 0
    GrantRequest.objects.update(expires_at=timezone.now() - grants.REQUEST_LIFETIME)
    with pytest.raises(grants.GrantAlreadyDecided, match="expired"):
        grants.approve_request(superadmin=susan, request_id=wish.pk)
    assert grants.expire_requests() == 1
    with pytest.raises(grants.GrantAlreadyDecided, match="nobody decided"):
        grants.approve_request(superadmin=susan, request_id=wish.pk)
    assert nothing_moved(alice)


def test_the_preview_says_what_would_happen(adam: User, susan: User, alice: User) -> None:
    def preview(admin: User, tokens: int, user: User = alice, kind: str = "grant") -> tuple[int, int]:
        outcome = grants.preview(admin=admin, user_id=user.pk, tokens=tokens, kind=kind)
        return outcome.new_balance_tokens, outcome.approvals_needed

    change_settings(susan, grant_approval_tokens=1_000, admin_grant_limit_tokens=10)
    assert preview(susan, 1_000) == (11_000, 0)
    assert preview(susan, 1_001) == (11_001, 1)
    assert preview(susan, 5, user=susan) == (10_005, 1)
    assert preview(susan, 1_001, user=susan) == (11_001, 2)
    assert preview(adam, 10) == (10_010, 0)
    assert preview(adam, 11) == (10_011, 1)
    assert preview(adam, 1_001) == (11_001, 2)
    assert preview(adam, 10, kind="deduction") == (9_990, 1)
    with pytest.raises(grants.GrantNotPossible):
        preview(susan, 10_001, kind="deduction")
    assert nothing_moved(alice)


# --- When things go wrong -------------------------------------------------------------------------------------------


def test_a_crash_on_the_way_leaves_nothing_and_the_form_can_be_sent_again(
    susan: User, alice: User, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Law 2: tokens, request, notice and audit entry are one."""
    entries = AuditEntry.objects.count()

    def crash(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("killed")

    with monkeypatch.context() as patch:
        patch.setattr(messages, "grant_received", crash)
        with pytest.raises(RuntimeError), transaction.atomic():
            grant(susan, alice, request_key="form-1")
    assert nothing_moved(alice)
    assert not GrantRequest.objects.exists()
    assert AuditEntry.objects.count() == entries
    assert grant(susan, alice, request_key="form-1").state == "done"
    assert balance(alice) == 10_500


def test_books_without_a_superadmin_behind_a_grant_are_broken(susan: User, alice: User, bob: User) -> None:
    """The check behind `what_was_right_stays_right` still finds what was never right."""
    with transaction.atomic():
        ledger.add_tokens(
            user_id=alice.pk, tokens=5, type="admin_grant", admin_id=bob.pk, description="Hi", idempotency_key="forged"
        )
        broken = [finding.check.name for finding in verification.verify() if finding.violations]
        transaction.set_rollback(True)
    assert len(broken) == 1
    assert broken[0].startswith("Each grant and deduction names a reason")


def test_the_ledger_knows_every_granted_token(adam: User, susan: User, alice: User) -> None:
    for tokens in (1, 20, 300):
        grant(susan, alice, tokens)
    deduct(susan, alice, 4_000)
    grants.approve_request(superadmin=susan, request_id=grant(adam, alice, 50_000).pk)
    moved = TokenTransaction.objects.filter(user=alice).aggregate(tokens=Sum("amount"))["tokens"]
    assert balance(alice) == moved == 10_000 + 321 - 4_000 + 50_000


def test_the_database_refuses_an_approval_of_ones_own(adam: User, alice: User) -> None:
    """A request is done with an entry, and by others: not even SQL by hand says otherwise."""
    wish = grant(adam, alice)
    for change in ({"state": "done"}, {"state": "done", "decided_by": adam}, {"state": "declined"}):
        with pytest.raises(Exception, match="grant_request_"), transaction.atomic():
            GrantRequest.objects.filter(pk=wish.pk).update(**change)
