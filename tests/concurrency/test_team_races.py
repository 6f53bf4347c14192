"""Many at once on one team, each on a connection of their own. Numbers in docstrings are rows of FAULTS.md."""

from threading import Barrier
from typing import Any

import pytest
from allauth.account.adapter import get_adapter
from django.db.models import QuerySet

from accounts import teams
from accounts.models import Invitation, Membership, User, Workspace
from billing import payer
from tests.concurrency.test_ledger_races import all_at_once, kinds
from tests.conftest import MakeUser

pytestmark = pytest.mark.django_db(transaction=True)


@pytest.fixture
def owned_by_two(make_user: MakeUser) -> tuple[Workspace, User, User]:
    alice, bob = make_user("alice"), make_user("bob")
    team = payer.found_team(founder=alice, name="Acme")
    Membership.objects.create(workspace=team, user=bob, role="owner")
    return team, alice, bob


def both_leave(team: Workspace, *people: User) -> list[object]:
    return list(
        all_at_once(
            [lambda user=user: teams.remove_member(by=user, workspace_id=team.pk, user_id=user.pk) for user in people]  # type: ignore[misc]
        )
    )


def test_of_two_owners_who_leave_at_once_one_stays(owned_by_two: tuple[Workspace, User, User]) -> None:
    """98: whoever comes second is told that the team would be left without one."""
    team, alice, bob = owned_by_two
    assert kinds(both_leave(team, alice, bob)) == {"NoneType": 1, "TeamError": 1}
    assert Membership.objects.get(workspace=team).role == "owner"


def test_without_the_lock_nobody_is_left(
    owned_by_two: tuple[Workspace, User, User], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The control: each has seen the other before either is gone."""
    team, alice, bob = owned_by_two
    barrier, remove = Barrier(2, timeout=20), teams._remove

    def meet(*arguments: Any) -> None:
        barrier.wait()
        remove(*arguments)

    monkeypatch.setattr(QuerySet, "select_for_update", lambda self, **options: self)
    monkeypatch.setattr(teams, "_remove", meet)
    assert kinds(both_leave(team, alice, bob)) == {"NoneType": 2}
    assert not Membership.objects.filter(workspace=team).exists()


def test_an_invitation_opened_many_times_at_once_is_one_member(
    owned_by_two: tuple[Workspace, User, User], make_user: MakeUser, monkeypatch: pytest.MonkeyPatch
) -> None:
    """91: one of the clicks joins, the others find it used."""
    team, alice, _ = owned_by_two
    carol = make_user("carol")
    mails: list[str] = []
    adapter = get_adapter()
    monkeypatch.setattr(
        type(adapter), "send_mail", lambda self, prefix, email, said: mails.append(said["invitation_url"])
    )
    teams.invite(by=alice, workspace_id=team.pk, email=carol.email, role="member")
    teams.send_invitations()
    token = mails[-1].split("/")[3]
    outcomes = all_at_once([lambda: teams.accept_invitation(user=carol, token=token)] * 8)
    assert kinds(outcomes) == {"Membership": 1, "NotInvited": 7}
    assert Membership.objects.filter(workspace=team, user=carol).count() == 1
    assert Invitation.objects.get(email=carol.email).accepted_by == carol
