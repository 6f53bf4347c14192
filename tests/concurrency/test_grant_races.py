"""Grants, requests and bulk jobs at the same moment, each on a connection of their own."""

from contextlib import contextmanager, suppress
from functools import partial
from threading import Barrier, BrokenBarrierError
from typing import Any

import pytest
from django.db.models import Sum
from django.utils import timezone

from accounts import audit
from accounts.models import AuditEntry, User
from billing.models import GrantRequest, TokenAccount, TokenTransaction
from billing.staff import bulk, grants
from billing.staff.accounts import AccountFilter
from tests.concurrency.test_ledger_races import all_at_once, kinds, verify_ledger
from tests.conftest import MakeUser, change_settings

pytestmark = pytest.mark.django_db(transaction=True)

RACERS = 8


@pytest.fixture
def superadmins(make_user: MakeUser) -> list[User]:
    return [make_user(f"super-{number}", role="superadmin") for number in range(RACERS)]


def granted(user: User) -> int:
    rows = TokenTransaction.objects.filter(user=user, type="admin_grant")
    return int(rows.aggregate(tokens=Sum("amount", default=0))["tokens"])


def ask(adam: User, alice: User, tokens: int = 500, key: str = "form") -> GrantRequest:
    return grants.grant_tokens(admin=adam, user_id=alice.pk, tokens=tokens, reason="Sorry", request_key=key)


def test_a_form_sent_many_times_at_once_is_one_grant(susan: User, alice: User) -> None:
    """Row 65."""
    outcomes = all_at_once([partial(ask, susan, alice)] * RACERS)
    assert kinds(outcomes) == {"GrantRequest": RACERS}
    assert len({outcome.pk for outcome in outcomes if isinstance(outcome, GrantRequest)}) == 1
    assert granted(alice) == 500
    assert AuditEntry.objects.filter(action="grant", outcome="done").count() == 1
    verify_ledger()


def storm_of_decisions(request: GrantRequest, superadmins: list[User]) -> Any:
    approve = [partial(grants.approve_request, superadmin=each, request_id=request.pk) for each in superadmins[::2]]
    decline = [
        partial(grants.decline_request, superadmin=each, request_id=request.pk, reason="No")
        for each in superadmins[1::2]
    ]
    return kinds(all_at_once([*approve, *decline]))


def test_one_decision_counts(adam: User, alice: User, superadmins: list[User]) -> None:
    """Row 64: approvals and refusals of one request at once."""
    request = ask(adam, alice)
    assert storm_of_decisions(request, superadmins) == {"GrantRequest": 1, "GrantAlreadyDecided": RACERS - 1}
    request.refresh_from_db()
    assert granted(alice) == (500 if request.state == "done" else 0)
    assert AuditEntry.objects.filter(action__in=("grant_approved", "grant_declined")).count() == 1
    verify_ledger()


@contextmanager
def without_the_lock(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Nobody waits for the request's row, and all look before any of them writes."""
    from django.db.models import QuerySet

    barrier, require_open = Barrier(RACERS), grants._require_open

    def wait_for_the_others(request: GrantRequest) -> None:
        require_open(request)
        with suppress(BrokenBarrierError):
            barrier.wait(timeout=20)

    with monkeypatch.context() as patch:
        patch.setattr(QuerySet, "select_for_update", lambda queryset, *args, **kwargs: queryset)
        patch.setattr(grants, "_require_open", wait_for_the_others)
        yield


def test_without_the_lock_more_than_one_decision_counts(
    adam: User, alice: User, superadmins: list[User], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The control of the one above. The ledger's key still lets the tokens move only once (law 8)."""
    request = ask(adam, alice)
    with without_the_lock(monkeypatch):
        assert storm_of_decisions(request, superadmins)["GrantRequest"] > 1
    assert AuditEntry.objects.filter(action__in=("grant_approved", "grant_declined")).count() > 1
    assert granted(alice) <= 500


def test_two_superadmins_are_two(adam: User, alice: User, superadmins: list[User]) -> None:
    change_settings(superadmins[0], grant_approval_tokens=100)
    request = ask(adam, alice)
    outcomes = all_at_once([partial(grants.approve_request, superadmin=superadmins[0], request_id=request.pk)] * RACERS)
    assert kinds(outcomes) == {"GrantRequest": RACERS}
    assert granted(alice) == 0  # one person is one, however often
    outcomes = all_at_once(
        [partial(grants.approve_request, superadmin=each, request_id=request.pk) for each in superadmins]
    )
    assert granted(alice) == 500
    verify_ledger()


def test_an_admins_limit_holds_for_all_grants_at_once(adam: User, susan: User, alice: User) -> None:
    """Row 64: the rest of the limit is counted by one at a time."""
    change_settings(susan, admin_grant_limit_tokens=1_000)
    outcomes = all_at_once([partial(ask, adam, alice, 400, f"form-{number}") for number in range(RACERS)])
    assert kinds(outcomes) == {"GrantRequest": RACERS}
    assert granted(alice) == 800
    verify_ledger()


def test_without_the_lock_the_limit_is_passed(
    adam: User, susan: User, alice: User, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The control of the one above."""
    change_settings(susan, admin_grant_limit_tokens=1_000)
    barrier, is_at_once = Barrier(RACERS), grants._is_at_once

    def look_together(*args: Any, **kwargs: Any) -> bool:
        answer = is_at_once(*args, **kwargs)
        barrier.wait(timeout=20)
        return answer

    monkeypatch.setattr(grants, "_one_at_a_time", lambda *args: None)
    monkeypatch.setattr(grants, "_is_at_once", look_together)
    all_at_once([partial(ask, adam, alice, 400, f"form-{number}") for number in range(RACERS)])
    assert granted(alice) > 1_000


@pytest.mark.parametrize("with_lock", [True, False])
def test_the_rule_of_two_holds_for_all_grants_at_once(
    alice: User, bob: User, superadmins: list[User], monkeypatch: pytest.MonkeyPatch, with_lock: bool
) -> None:
    """One person's word for two people, and two persons' words for one, are counted by one at a time. Without the
    lock both are passed: the control."""
    change_settings(superadmins[0], grant_approval_tokens=1_000)
    if not with_lock:
        barrier, needs_two = Barrier(RACERS), grants._needs_two

        def look_together(*args: Any, **kwargs: Any) -> bool:
            answer = needs_two(*args, **kwargs)
            with suppress(BrokenBarrierError):
                barrier.wait(timeout=20)
            return answer

        monkeypatch.setattr(grants, "_one_at_a_time", lambda *args: None)
        monkeypatch.setattr(grants, "_needs_two", look_together)
    by_one = [partial(ask, superadmins[0], who, 400, f"one-{n}") for n, who in enumerate([alice, bob] * (RACERS // 2))]
    all_at_once(by_one)
    GrantRequest.objects.filter(state="done").update(decided_at=timezone.now() - grants.LIMIT_SPAN)
    assert (granted(alice) + granted(bob) == 800) == with_lock
    before = granted(alice)
    all_at_once([partial(ask, superadmins[n % 2], alice, 400, f"many-{n}") for n in range(RACERS)])
    assert (granted(alice) - before == 800) == with_lock
    verify_ledger()


def test_refusals_are_bounded_in_parallel(alice: User) -> None:
    attempt = partial(audit.write_refusal, action=audit.Action.ACCESS, summary="Was refused GET /", actor=alice)
    outcomes = all_at_once([attempt] * 25)
    assert outcomes.count(True) == audit.REFUSALS_PER_MINUTE
    assert AuditEntry.objects.filter(actor=alice).count() == audit.REFUSALS_PER_MINUTE


def test_workers_of_one_job_share_its_rows(make_user: MakeUser, susan: User) -> None:
    team = [make_user(f"team-{number}") for number in range(12)]
    job = bulk.start_bulk_job(
        admin=susan, kind="grant", filter=AccountFilter(search="team-"), request_key="f", tokens=100, reason="Sorry"
    )
    outcomes = all_at_once([partial(bulk.run_bulk_job, job_id=job.pk)] * 4)
    assert sum(outcome for outcome in outcomes if isinstance(outcome, int)) == 12
    job.refresh_from_db()
    assert job.state == "done"
    balances = TokenAccount.objects.filter(user__in=team).values_list("balance", flat=True)
    assert list(balances) == [10_100] * 12
    verify_ledger()
