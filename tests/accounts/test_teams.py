"""Teams: founded, joined, handed over, left, closed. Numbers in docstrings are rows of FAULTS.md."""

import re
from collections.abc import Callable
from datetime import timedelta

import pytest
from django.core import mail
from django.test import Client
from django.urls import reverse
from django.utils import timezone

from accounts import teams
from accounts.models import AuditEntry, Invitation, Membership, User, Workspace
from accounts.workspaces import visible_to
from ai_ops import own_data
from ai_ops.models import Chat, ContentPiece, Project
from billing import ledger, payer
from billing.models import TokenAccount
from billing.staff import accounts
from billing.upkeep.own_data import NotNow
from tests.conftest import MakeUser, prove_address

pytestmark = pytest.mark.django_db


@pytest.fixture
def acme(alice: User, bob: User) -> Workspace:
    """Alice owns it, Bob is a member."""
    prove_address(bob)
    team = payer.found_team(founder=alice, name="Acme")
    Membership.objects.create(workspace=team, user=bob, role="member")
    return team


def link_of(*, to: str) -> str:
    """The path of the newest invitation that was mailed to an address."""
    teams.send_invitations()
    text = next(str(message.body) for message in reversed(mail.outbox) if message.to == [to])
    found = re.search(r"/team/join/\S+", text)
    assert found, text
    return found[0]


def signed_in(user: User) -> Client:
    client = Client()
    client.force_login(user)
    return client


def roles(team: Workspace) -> dict[str, str]:
    return {each.user.name: each.role for each in team.memberships.select_related("user")}


def test_a_team_from_its_first_page_on(alice: User, make_user: MakeUser) -> None:
    """91: the link admits whom it was sent to, once: nobody it was forwarded to, and not after it was taken back."""
    owner, eve, carol = signed_in(alice), make_user("eve"), make_user("carol")
    prove_address(carol)
    assert owner.get("/").status_code == 302
    assert b"workspaces" not in owner.get(reverse("team:home")).content  # no switcher without a team
    answer = owner.post(reverse("team:found"), {"name": " Acme\n"}, follow=True)
    team = Workspace.objects.get(kind="team")
    assert (team.name, roles(team), b'class="workspaces' in answer.content) == ("Acme", {"Alice": "owner"}, True)
    assert owner.post(reverse("team:found"), {"name": "Acme"}).status_code == 302
    assert Workspace.objects.filter(kind="team").count() == 1  # a double click

    invite = reverse("team:invite", args=[team.pk])
    for _ in range(2):
        owner.post(invite, {"email": "Carol@Example.com", "role": "member"})
    link = link_of(to="carol@example.com")
    assert Invitation.objects.filter(revoked_at=None).count() == 1
    assert signed_in(eve).post(link).status_code == 404
    assert signed_in(eve).get(reverse("team:members", args=[team.pk])).status_code == 403
    assert Client().get(link).status_code == 302
    assert b"Join Acme" in signed_in(carol).get(link).content
    assert signed_in(carol).post(link).status_code == 302
    assert signed_in(carol).post(link).status_code == 404
    assert roles(team) == {"Alice": "owner", "Carol": "member"}
    assert owner.post(invite, {"email": "carol@example.com", "role": "admin"}).status_code == 400

    owner.post(invite, {"email": "eve@example.com", "role": "admin"})
    link = link_of(to="eve@example.com")
    assert str(Invitation.objects.get(email="eve@example.com").token_hash) not in link
    assert signed_in(eve).get(link[:-9] + "/").status_code == 404
    owner.post(reverse("team:revoke", args=[team.pk, Invitation.objects.get(email="eve@example.com").pk]))
    assert signed_in(eve).post(link).status_code == 404
    owner.post(invite, {"email": "eve@example.com", "role": "admin"})
    link = link_of(to="eve@example.com")
    Invitation.objects.update(expires_at=timezone.now() - timedelta(seconds=1))
    assert signed_in(eve).post(link).status_code == 404
    # Whoever is removed does not come back by what lies about.
    Invitation.objects.update(expires_at=timezone.now() + timedelta(days=1))
    signed_in(eve).post(link)
    Invitation.objects.create(workspace=team, email="eve@example.com", role="admin", invited_by=alice,
                              expires_at=timezone.now() + timedelta(days=1))  # fmt: skip
    link = link_of(to="eve@example.com")
    owner.post(reverse("team:remove", args=[team.pk, eve.pk]))
    assert signed_in(eve).post(link).status_code == 404
    assert "carol@example.com" not in str(list(AuditEntry.objects.values_list("summary", "reason", "after")))
    assert AuditEntry.objects.filter(action="team", object_id=str(team.pk)).count() >= 8


def test_roles(acme: Workspace, alice: User, bob: User, make_user: MakeUser) -> None:
    """What admins and members may not do is refused and changes nothing, whatever the page offers."""
    carol, dave = make_user("carol"), make_user("dave")
    Membership.objects.create(workspace=acme, user=carol, role="admin")
    Membership.objects.create(workspace=acme, user=dave, role="admin")
    before = roles(acme)
    refused: list[Callable[[], object]] = [
        lambda: teams.invite(by=bob, workspace_id=acme.pk, email="x@example.com", role="member"),
        lambda: teams.invite(by=carol, workspace_id=acme.pk, email="x@example.com", role="admin"),
        lambda: teams.invite(by=carol, workspace_id=acme.pk, email=bob.email, role="owner"),
        lambda: teams.change_role(by=carol, workspace_id=acme.pk, user_id=bob.pk, role="admin"),
        lambda: teams.change_role(by=alice, workspace_id=acme.pk, user_id=bob.pk, role="owner"),
        lambda: teams.remove_member(by=bob, workspace_id=acme.pk, user_id=carol.pk),
        lambda: teams.remove_member(by=carol, workspace_id=acme.pk, user_id=dave.pk),
        lambda: teams.remove_member(by=carol, workspace_id=acme.pk, user_id=alice.pk),
        lambda: teams.rename_team(by=bob, workspace_id=acme.pk, name="Mine"),
        lambda: payer.close_team(by=carol, workspace_id=acme.pk),
        lambda: teams.remove_member(by=make_user("eve"), workspace_id=acme.pk, user_id=bob.pk),
        lambda: teams.invite(by=alice, workspace_id=acme.pk, email="stranger@example.com", role="owner"),
    ]
    for each in refused:
        with pytest.raises(teams.TeamError):
            each()
    assert (roles(acme), Invitation.objects.count()) == (before, 0)
    teams.remove_member(by=carol, workspace_id=acme.pk, user_id=bob.pk)
    teams.change_role(by=alice, workspace_id=acme.pk, user_id=carol.pk, role="member")
    assert roles(acme) == {"Alice": "owner", "Carol": "member", "Dave": "admin"}


def test_the_last_owner_is_told_what_to_do_first(
    acme: Workspace, alice: User, bob: User, susan: User, stripe: object
) -> None:
    """98: leaving, demoting, anonymising, blocking; then the team is handed over, and all of it goes."""
    for by in (alice,):
        with pytest.raises(teams.TeamError, match="without an owner"):
            teams.remove_member(by=by, workspace_id=acme.pk, user_id=alice.pk)
        with pytest.raises(teams.TeamError, match="without an owner"):
            teams.change_role(by=by, workspace_id=acme.pk, user_id=alice.pk, role="admin")
    with pytest.raises(NotNow, match="last owner of Acme"):
        own_data._require_no_last_owner(alice.pk)
    with pytest.raises(accounts.StatusNotPossible, match="last owner of Acme"):
        accounts.block_account(superadmin=susan, user_id=alice.pk, reason="Test")
    page = reverse("admin:accounts_user_change", args=[alice.pk])
    answer = signed_in(susan).post(page, {"name": "Alice", "role": "user", "time_zone": ""}, follow=True)
    assert User.objects.get(pk=alice.pk).is_active, answer.content.decode()[:2_000]

    signed_in(alice).post(reverse("team:hand-over", args=[acme.pk]), {"receiver": bob.pk})
    assert roles(acme) == {"Alice": "owner", "Bob": "member"}  # until he accepts
    link = link_of(to=bob.email)
    signed_in(bob).post(link)
    assert roles(acme) == {"Alice": "admin", "Bob": "owner"}
    own_data._require_no_last_owner(alice.pk)
    teams.leave_all(user=alice)
    assert roles(acme) == {"Bob": "owner"}
    assert accounts.block_account(superadmin=susan, user_id=alice.pk, reason="Test").status == "blocked"


def test_what_is_made_in_a_team_is_the_teams(acme: Workspace, alice: User, bob: User, make_user: MakeUser) -> None:
    """92, of pages: members edit pieces, versions say by whom; chats are their author's; who is removed is out."""
    project = Project.objects.create(workspace=acme, name="Launch")
    piece = ContentPiece.objects.create(project=project, author=bob, title="Plan", body="One", state="ready")
    chat = Chat.objects.create(project=project, author=bob, title="Bob’s own")
    owner, member, other = signed_in(alice), signed_in(bob), signed_in(make_user("eve"))
    assert other.get(piece.get_absolute_url()).status_code == 404
    page = owner.get(piece.get_absolute_url())
    assert (page.status_code, f'value="{acme.pk}"'.encode() in page.content) == (200, True)
    assert owner.get(chat.get_absolute_url()).status_code == 404
    assert "Bob’s own" not in owner.get(reverse("studio:chats")).content.decode()
    assert "Bob’s own" in member.get(reverse("studio:chats") + f"?workspace={acme.pk}").content.decode()
    save = reverse("studio:save-content", args=[piece.pk])
    assert owner.post(save, {"base_number": 0, "body": "Two"}).status_code == 302
    assert [each.author for each in piece.versions.all()] == [alice]
    # What is made elsewhere is not here.
    own = ContentPiece.objects.create(
        project=Project.objects.create(workspace=Workspace.objects.get(owner=bob), name="Own"), author=bob, title="Mine"
    )
    assert "Mine" not in member.get(reverse("studio:home") + f"?workspace={acme.pk}").content.decode()
    assert owner.get(own.get_absolute_url()).status_code == 404

    teams.remove_member(by=alice, workspace_id=acme.pk, user_id=bob.pk)
    for path in (piece.get_absolute_url(), chat.get_absolute_url(), project.get_absolute_url()):
        assert member.get(path).status_code == 404
    assert member.get(reverse("tokens:balance") + f"?workspace={acme.pk}").status_code == 403
    assert member.get(reverse("team:members", args=[acme.pk])).status_code == 403
    assert member.get(own.get_absolute_url()).status_code == 200
    # The anonymised leave their work to the team, and take their chats along.
    Membership.objects.create(workspace=acme, user=bob, role="member")
    User.objects.filter(pk=bob.pk).update(anonymised_at=timezone.now())
    own_data.erase_content(user_id=bob.pk)
    assert list(ContentPiece.objects.all()) == [piece]
    assert not Chat.objects.exists()


def test_pages_about_money_are_for_those_who_look_after_the_team(acme: Workspace, alice: User, bob: User) -> None:
    account = payer.account_of_workspace(acme)
    ledger.add_tokens(account_id=account.pk, tokens=777, type="bonus", description="Test", idempotency_key="test")
    here = f"?workspace={acme.pk}"
    for path in ("tokens:history", "tokens:statements"):
        assert signed_in(alice).get(reverse(path) + here).status_code == 200
        assert signed_in(bob).get(reverse(path) + here).status_code == 403
    form = {"workspace": acme.pk, "package_id": 1, "checkout_key": "12345678", "currency": "usd"}
    for path in ("tokens:checkout", "tokens:auto-recharge", "tokens:card"):
        assert signed_in(bob).post(reverse(path), form).status_code == 403
    assert b"777" in signed_in(bob).get(reverse("tokens:home") + here).content
    assert b"Another amount" not in signed_in(bob).get(reverse("tokens:home") + here).content
    assert b"777" in signed_in(alice).get(reverse("tokens:home") + here).content


def test_a_team_is_closed_by_its_owner_in_plain_words(acme: Workspace, alice: User, bob: User) -> None:
    account = payer.account_of_workspace(acme)
    ledger.add_tokens(account_id=account.pk, tokens=1_234, type="bonus", description="Test", idempotency_key="test")
    close = reverse("team:close", args=[acme.pk])
    assert signed_in(bob).get(close).status_code == 403
    page = signed_in(alice).get(close).content.decode()
    assert "1,234 tokens of the team are lost" in page
    assert signed_in(alice).post(close, {"typed_name": "acme"}).status_code == 400
    held = ledger.reserve_tokens(
        account_id=account.pk, actor_id=bob.pk, tokens=5, idempotency_key="h", lifetime_seconds=60,
        operation=ledger.Operation("chat", "openai", "gpt-6-luna", fixed_cost_tokens=1),
    )  # fmt: skip
    answer = signed_in(alice).post(close, {"typed_name": "Acme"})
    assert "is still running" in str(answer.context["form"].errors)
    ledger.release_usage(usage_id=held.usage_id or 0)
    assert signed_in(alice).post(close, {"typed_name": "Acme"}).status_code == 302
    assert not visible_to(alice.pk).filter(pk=acme.pk).exists()
    account = TokenAccount.objects.get(pk=account.pk)
    assert (account.status, account.balance) == ("blocked", 1_234)
    with pytest.raises(ledger.AccountNotActive):
        ledger.reserve_tokens(
            account_id=account.pk, actor_id=alice.pk, tokens=5, idempotency_key="i", lifetime_seconds=60,
            operation=ledger.Operation("chat", "openai", "gpt-6-luna", fixed_cost_tokens=1),
        )  # fmt: skip
    own_data._require_no_last_owner(alice.pk)
