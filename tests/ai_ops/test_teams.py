"""The Studio in a team's workspace, over real HTTP. Numbers in docstrings are rows of FAULTS.md."""

from collections.abc import Iterator

import httpx2
import pytest

from accounts import teams
from accounts.models import Membership, User
from ai_ops.models import ContentVersion
from billing import ledger, payer
from billing.models import TokenAccount, TokenTransaction
from tests.ai_ops.studio import Writer, events_of
from tests.payments import verify_books
from tests.servers import Server


@pytest.fixture
def acme(alice: User, bob: User, no_thinking: None) -> TokenAccount:
    """A team of Alice's with 9,000 tokens, in which Bob is a member."""
    team = payer.found_team(founder=alice, name="Acme")
    Membership.objects.create(workspace=team, user=bob, role="member")
    account = payer.account_of_workspace(team)
    ledger.add_tokens(account_id=account.pk, tokens=9_000, type="bonus", description="Test", idempotency_key="test")
    return account


def names_of(stream: httpx2.Response) -> Iterator[str]:
    return (event.name for event in events_of(stream.iter_lines()))


def test_the_workspace_of_the_form_pays_until_its_member_is_removed(
    web: Server, ai: Server, acme: TokenAccount, alice: User, bob: User
) -> None:
    """92: what runs when somebody is removed settles to the team, their open balance stream ends, each later request
    is refused; and nothing of it touches their own balance."""
    here = {"workspace": acme.workspace_id}
    writer, own_tokens = Writer(bob, web), ledger.get_account(user_id=bob.pk).balance
    quote = writer.quote("draft", **writer.form(**here))
    assert "Acme pays, at most" in quote
    assert "Acme" not in writer.quote("draft", **writer.form())

    balance = httpx2.Client(base_url=web.url, cookies=writer.http.cookies, timeout=30)
    with balance.stream("GET", f"/live/balance/?workspace={acme.workspace_id}") as badge:
        seen = (line for line in badge.iter_lines() if line.startswith("event"))
        assert next(seen) == "event: balance"
        with writer.open_draft(**here) as draft:
            events = names_of(draft)
            assert next(events) == "started"
            teams.remove_member(by=alice, workspace_id=acme.workspace_id, user_id=bob.pk)
            payer.announce_members_change(acme.workspace_id)
            assert list(events)[-1] == "done"
        assert len(list(seen)) <= 3  # those of the hold, at most; then it has ended by itself

    usage, entry = writer.usage, TokenTransaction.objects.get(usage=writer.usage)
    assert (usage.status, usage.account_id, usage.user_id) == ("succeeded", acme.pk, bob.pk)
    assert (entry.account_id, entry.user_id, entry.workspace_id) == (acme.pk, bob.pk, acme.workspace_id)
    assert ContentVersion.objects.get(usage_id=usage.pk).author_id == bob.pk
    assert writer.draft(**here).status_code == 403
    assert writer.http.post("/studio/quote/draft/", data=writer.form(**here)).status_code == 403
    edit = {"content_id": usage.content_id, "base_number": 1, "body": "Mine", "refinement": "improve", "wishes": ""}
    assert writer.run("refinement", **edit).status_code == 404
    assert ledger.get_account(user_id=bob.pk).balance == own_tokens
    # It is a text of the team's, and no other account can be made to pay for work on it.
    assert Writer(alice, web).run("refinement", **edit).status_code == 409
    verify_books()
