"""Chats: question after question, what each costs, and every way an answer can go wrong."""

import re

import pytest
from playwright.sync_api import Locator, Page, expect

from accounts.models import User
from ai_ops import pieces
from ai_ops.models import Chat, ChatTurn, Project
from billing import ledger
from billing.models import TokenTransaction, TokenUsage
from tests.conftest import MakeUser
from tests.journeys.conftest import OpenContext, shoot, sign_in
from tests.journeys.test_drafting import after_the_first_words

FIRST = "How do I brew green tea for twelve guests?"
SECOND = "And which cups would suit the occasion?"
LONG = "Tell me about the forgotten island gardens of the cold northern lakes, please."
EARLIER = "This fits what you said before about brew green tea"  # the stand-in says so when it knows the first question


def open_chat(page: Page, name: str = "alice") -> Page:
    sign_in(page, name, "/studio/chats/")
    return page


def ask(page: Page, question: str) -> None:
    page.get_by_label("Your message").fill(question)
    page.get_by_role("button", name="Send").click()


def answered(page: Page) -> Locator:
    """The turns as the server shows them, with their cost."""
    return page.locator("#turns .turn")


@pytest.mark.parametrize("scripts", [True, False])
def test_two_turns_and_what_they_cost(alice: User, open_context: OpenContext, scripts: bool) -> None:
    page = open_chat(open_context(java_script_enabled=scripts).new_page())
    kind = "js" if scripts else "nojs"
    shoot(page, f"chat-new-{kind}", whole=False)
    if scripts:
        expect(page.locator("#quote")).to_contain_text(re.compile(r"At most\s+[\d,]+ tokens"))
    ask(page, FIRST)
    expect(answered(page)).to_have_count(1)
    chat = Chat.objects.get(author=alice)
    expect(page).to_have_url(re.compile(rf"/studio/chats/{chat.pk}/#turn-\d+$"))
    expect(page.get_by_label("Project")).to_be_hidden()

    ask(page, SECOND)
    expect(answered(page)).to_have_count(2)
    first, second = chat.turns.all()
    usages = list(TokenUsage.objects.filter(user=alice).order_by("id"))
    assert [usage.pk for usage in usages] == [first.usage_id, second.usage_id]
    assert [usage.chat_id for usage in usages] == [chat.pk, chat.pk]
    assert usages[1].input_tokens > usages[0].input_tokens  # the second read the first
    assert EARLIER in second.answer
    expect(answered(page).last).to_contain_text(SECOND)
    expect(answered(page).last).to_contain_text(EARLIER)

    paid = sum(usage.billable_tokens for usage in usages)
    expect(page.locator("#chat-total")).to_contain_text(f"2 questions · {paid:,} tokens paid for this chat")
    expect(page.locator("#balance .balance-number")).to_have_text(f"{10_000 - paid:,}")
    cost = answered(page).last.locator("summary")
    expect(cost).to_contain_text(f"{usages[1].billable_tokens:,} tokens")
    cost.click()
    arithmetic = f"({usages[1].input_tokens:,} + {usages[1].output_tokens:,}) × 1.5 = {usages[1].billable_tokens:,}"
    expect(answered(page).last).to_contain_text(arithmetic)
    expect(page.locator(".chat-list")).to_contain_text(FIRST)
    shoot(page, f"chat-two-turns-{kind}", whole=False)

    page.reload()
    expect(answered(page)).to_have_count(2)
    expect(page.get_by_role("heading", level=1)).to_have_text(FIRST)


def test_question_stands_at_once_and_the_answer_streams(alice: User, page: Page) -> None:
    open_chat(page)
    after_the_first_words(page, "await gate")
    message = page.get_by_label("Your message")
    message.press_sequentially("Tea [[fault:slow]]")
    message.press("Shift+Enter")
    message.press_sequentially("and cups <b>for</b> guests, please, in detail.")
    message.press("Enter")
    panel = page.locator("#chat-panel")
    expect(panel.locator("[data-chat-question]")).to_have_text(
        "Tea [[fault:slow]]\nand cups <b>for</b> guests, please, in detail."
    )
    text = panel.locator("[data-operation-text]")
    expect(text).to_have_text(re.compile(r"\w{3}"))
    expect(panel.locator("[role=status]")).to_have_text(re.compile(r"^Writing\. [\d,]+ tokens are reserved"))
    expect(message).to_have_value("")
    expect(panel).to_be_visible()
    page.evaluate("openGate()")
    expect(answered(page)).to_have_count(1)
    expect(panel).to_be_hidden()
    expect(page.locator("#chat-said")).to_have_text(re.compile(r"^Done\. It cost [\d,]+ tokens\.$"))
    expect(message).to_be_focused()
    turn = ChatTurn.objects.get()
    expect(answered(page).locator(".turn-question .turn-text")).to_have_text(turn.question.replace("\r", ""))
    expect(answered(page).locator(".turn-answer .turn-text")).to_have_text(turn.answer)


def test_stop_charges_what_was_written(alice: User, page: Page) -> None:
    """Row 51: the provider's call is stopped and what was produced is charged; the chat goes on from there."""
    open_chat(page)
    ask(page, "What should I know about green tea and its cups? [[fault:stall]]")
    expect(page.locator("#chat-panel [data-operation-text]")).not_to_be_empty()
    page.get_by_role("button", name="Stop").click()
    turn = answered(page)
    expect(turn).to_contain_text("Cut short")
    usage, row = TokenUsage.objects.get(user=alice), ChatTurn.objects.get()
    assert (usage.status, usage.is_estimated, row.state) == ("succeeded", True, "cut_short")
    expect(turn.locator(".turn-answer .turn-text")).to_have_text(row.answer)
    assert usage.reserved_tokens is not None
    assert 0 < usage.billable_tokens < usage.reserved_tokens
    expect(turn.locator("summary")).to_contain_text(f"{usage.billable_tokens:,} tokens")
    expect(page.locator("#balance .balance-number")).to_have_text(f"{10_000 - usage.billable_tokens:,}")
    expect(page.locator("#chat-total")).to_contain_text(f"{usage.billable_tokens:,} tokens paid")
    shoot(page, "chat-stopped", whole=False)

    page.get_by_label("Your message").fill("What I was about to ask")
    page.get_by_role("button", name="Go on").click()
    expect(answered(page)).to_have_count(2)
    expect(answered(page).last).to_contain_text("Go on where you stopped.")
    expect(page.get_by_label("Your message")).to_have_value("What I was about to ask")
    assert Chat.objects.count() == 1


def test_stalled_answer_can_be_stopped(alice: User, page: Page) -> None:
    open_chat(page)
    ask(page, "What should I know about green tea? [[fault:stall]]")
    panel = page.locator("#chat-panel")
    expect(panel.locator("[data-operation-text]")).not_to_be_empty()
    shoot(page, "chat-streaming", whole=False)
    page.get_by_role("button", name="Stop").click()
    expect(answered(page)).to_contain_text("Cut short")
    expect(panel).to_be_hidden()
    assert TokenUsage.objects.get(user=alice).status == "succeeded"


@pytest.mark.parametrize("scripts", [True, False])
def test_failed_answer_costs_nothing_and_keeps_the_question(
    alice: User, open_context: OpenContext, scripts: bool
) -> None:
    """Row 53: the hold is released, the words are clear and nothing typed is lost."""
    page = open_chat(open_context(java_script_enabled=scripts).new_page())
    ask(page, "Why does tea fail? [[fault:400]]")
    expect(page.get_by_role("alert")).to_contain_text("refused this request")
    expect(page.get_by_label("Your message")).to_have_value("Why does tea fail? [[fault:400]]")
    if scripts:
        expect(answered(page)).to_contain_text("It cost nothing.")
    shoot(page, f"chat-failed-{'js' if scripts else 'nojs'}", whole=False)
    expect(page.locator("#balance .balance-number")).to_have_text("10,000")
    assert TokenUsage.objects.get().status == "failed"

    ask(page, "Why does tea not fail?")
    expect(answered(page).last.locator("summary")).to_contain_text("tokens")
    expect(page.get_by_role("alert")).to_be_hidden()
    assert [usage.status for usage in TokenUsage.objects.order_by("id")] == ["failed", "succeeded"]
    assert TokenTransaction.objects.filter(user=alice, type="usage").count() == 1


def test_broken_answer_is_kept_and_costs_nothing(alice: User, page: Page) -> None:
    open_chat(page)
    ask(page, "Tell me all there is about green tea and cups. [[fault:cut]]")
    expect(page.get_by_role("alert")).to_be_visible()
    expect(answered(page)).to_contain_text("It cost nothing.")
    expect(answered(page).locator(".turn-answer .turn-text")).to_have_text(ChatTurn.objects.get().answer)
    expect(page.locator("#balance .balance-number")).to_have_text("10,000")


def test_answer_that_is_lost_is_not_paid_for_twice(alice: User, page: Page) -> None:
    """The connection breaks before a byte of the answer comes, and who asks again is shown it."""
    open_chat(page)
    page.route("**/live/chat/", lambda route: (route.fetch(), route.fulfill(content_type="text/event-stream")), times=1)
    ask(page, FIRST)
    expect(page.get_by_role("alert")).to_contain_text("Everything you typed is still here.")
    page.get_by_role("button", name="Send").click()
    expect(answered(page)).to_contain_text("tokens")
    expect(page.get_by_label("Your message")).to_have_value("")
    ask(page, SECOND)
    expect(answered(page).last).to_contain_text(EARLIER)
    assert TokenUsage.objects.filter(chat_id=Chat.objects.get().pk).count() == 2


@pytest.mark.usefixtures("no_thinking")
def test_small_balance(make_user: MakeUser, page: Page) -> None:
    nora = make_user("nora", tokens=60)
    open_chat(page, "nora")
    page.get_by_label("Your message").fill(LONG)
    expect(page.locator("#quote")).to_contain_text("tokens are missing")
    shoot(page, "chat-too-small", whole=False)
    page.get_by_role("button", name="Send").click()
    refusal = page.get_by_role("alert")
    expect(refusal).to_contain_text("are missing")
    missing_tokens = int(re.findall(r"\d+", refusal.inner_text())[-1])
    expect(page.get_by_label("Your message")).to_have_value(LONG)
    assert not Chat.objects.exists()

    # Enough for a beginning: it is kept, and the page offers to buy tokens and to go on.
    ledger.add_tokens(user_id=nora.pk, tokens=missing_tokens, type="bonus", description="Test", idempotency_key="more")
    ask(page, LONG)
    turn = answered(page)
    expect(turn).to_contain_text("The balance ran out before the text was finished. What was written is kept.")
    expect(page.locator("#chat-next").get_by_role("link", name="Buy tokens")).to_be_visible()
    expect(page.get_by_role("button", name="Go on")).to_be_visible()
    usage = TokenUsage.objects.get(user=nora, chat_id__isnull=False)
    assert usage.reserved_tokens is not None
    assert 0 < usage.billable_tokens <= usage.reserved_tokens <= 60 + missing_tokens
    shoot(page, "chat-ran-out", whole=False)


def test_answer_written_in_another_window_appears(alice: User, page: Page) -> None:
    project = pieces.get_project(user_id=alice.pk, name="Tea")
    chat = Chat.objects.create(project=project, author=alice, title="Tea")
    turn = ChatTurn.objects.create(chat=chat, question=FIRST)
    open_chat(page)
    page.get_by_role("link", name=re.compile("^Tea")).click()
    expect(answered(page)).to_contain_text("Being written")
    ChatTurn.objects.filter(pk=turn.pk).update(answer="With water.", state="ready")
    expect(answered(page)).to_contain_text("With water.")
    expect(answered(page)).not_to_contain_text("Being written")


def test_long_chat_and_hostile_texts(alice: User, page: Page) -> None:
    """Row 72: what a model or a person wrote is text, whatever it looks like."""
    project = Project.objects.create(workspace=alice.workspaces.get(), name="P" * 150)
    chat = Chat.objects.create(project=project, author=alice, title="T" * 200)
    code = 'Use this:\n\n```python\ndef brew(grams: float) -> str:\n    return f"{grams:.1f} g"  ' + "x" * 200 + "\n```"
    ChatTurn.objects.bulk_create(
        ChatTurn(chat=chat, question=f"Question {number}", answer=code, state="ready") for number in range(1, 100)
    )
    html = "<script>document.title = 'owned'</script><img src=x onerror=alert(1)>"
    ChatTurn.objects.create(chat=chat, question=html, answer=html, state="ready")
    sign_in(page, "alice", chat.get_absolute_url())
    expect(answered(page)).to_have_count(100)
    expect(answered(page).last.locator(".turn-answer .turn-text")).to_have_text(html)
    expect(page.get_by_label("Your message")).to_be_in_viewport()
    assert "owned" not in page.title()
    for width in (390, 1440):
        page.set_viewport_size({"width": width, "height": 844})
        assert page.evaluate("document.documentElement.scrollWidth") <= width
    shoot(page, "chat-long", whole=False)
    page.goto("/studio/chats/999999/")
    expect(page.get_by_role("heading", level=1)).not_to_have_text(chat.title)
