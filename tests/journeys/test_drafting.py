"""The Studio: quote, stream, charge, and every way a draft can go wrong."""

import re

import pytest
from playwright.sync_api import Locator, Page, expect

from accounts.models import User
from ai_ops.models import ContentPiece
from billing import ledger
from billing.models import TokenTransaction, TokenUsage
from tests.conftest import PASSWORD, MakeUser
from tests.journeys.conftest import OpenContext, shoot, sign_in

SLOW = "A letter about green tea. [[fault:slow]]"
STALLED = "A letter about green tea. [[fault:stall]]"


def fill(page: Page, *, title: str = "Green tea", topic: str = "A letter about green tea.") -> None:
    page.get_by_label("Title").fill(title)
    page.get_by_label("What it is about").fill(topic)


def write(page: Page) -> None:
    page.get_by_role("button", name="Write the draft").click()


def status(page: Page) -> Locator:
    return page.locator("#draft-panel [data-operation-status]")


def written(page: Page) -> Locator:
    return page.locator("#draft-panel [data-operation-text]")


def result(page: Page) -> Locator:
    return page.locator("#draft-panel [data-operation-result]")


def alert(page: Page) -> Locator:
    return page.locator("#draft-form [data-operation-alert]")


def after_the_first_words(page: Page, do: str) -> None:
    """Have the page run the JavaScript `do` before each part of the next operation's stream that follows on words.

    `await gate` holds it back until `openGate()`.
    """
    page.evaluate(
        """() => {
            window.gate = new Promise(open => { window.openGate = open });
            const fetch = window.fetch;
            window.fetch = async (...request) => {
                window.fetch = fetch;
                const answer = await fetch(...request);
                let hasWords = false;
                const stream = new TransformStream({
                    async transform(chunk, controller) {
                        if (hasWords) DO;
                        hasWords ||= new TextDecoder().decode(chunk).includes("event: text");
                        controller.enqueue(chunk);
                    },
                });
                return new Response(answer.body.pipeThrough(stream), { headers: answer.headers });
            };
        }""".replace("DO", do)
    )


def balance(page: Page) -> int:
    return int(page.locator("#balance .balance-number").inner_text().replace(",", ""))


def test_draft_from_quote_to_ledger(alice: User, open_context: OpenContext) -> None:
    context = open_context()
    page, other_tab = sign_in(context.new_page(), "alice"), context.new_page()
    other_tab.goto("/tokens/")
    fill(page, topic=SLOW)
    quote = page.locator("#quote .quote-number")
    expect(quote).to_have_text(re.compile(r"^[\d,]+ tokens$"))
    shoot(page, "studio-quote")
    expect(other_tab.locator("#transactions tbody tr")).to_have_count(1)

    after_the_first_words(page, "await gate")
    write(page)
    text = written(page)
    expect(text).to_have_text(re.compile("Green|green"))
    expect(status(page)).to_have_text(re.compile(r"^Writing\. [\d,]+ tokens are reserved"))
    expect(page.get_by_role("button", name="Stop")).to_be_visible()
    page.evaluate("openGate()")
    expect(status(page)).to_have_text(re.compile(r"^Done\. "), timeout=30_000)
    expect(page.get_by_role("button", name="Stop")).to_be_hidden()
    usage = TokenUsage.objects.get(user=alice)
    cost, left = usage.billable_tokens, 10_000 - usage.billable_tokens
    expect(result(page)).to_contain_text(f"It cost {cost:,} tokens.")
    for tab in (page, other_tab):
        expect(tab.locator("#balance .balance-number")).to_have_text(f"{left:,}")
    expect(page.locator("#quote")).to_contain_text(f"{left:,}")  # what is available now
    expect(page.locator("#pieces")).to_contain_text("Green tea")
    shoot(page, "studio-done")

    page.get_by_role("link", name="Open the piece").click()
    expect(page.get_by_label("Text", exact=True)).to_have_value(ContentPiece.objects.get(author=alice).body)
    arithmetic = f"({usage.input_tokens:,} + {usage.output_tokens:,}) × 1.5 = {cost:,}"
    expect(page.get_by_role("cell", name=arithmetic)).to_be_visible()
    shoot(page, "content")

    # Nobody has reloaded it.
    expect(other_tab.locator(".overview-balance")).to_contain_text(f"{left:,}")
    expect(other_tab.locator("#account-now")).to_contain_text("Nothing is reserved")
    newest = other_tab.locator("#transactions tbody tr").first
    expect(newest).to_contain_text("Usage")
    expect(newest).to_contain_text(f"-{cost:,}")
    expect(newest).to_contain_text(f"{left:,}")
    shoot(other_tab, "tokens-after-draft")


def test_failing_provider_keeps_what_was_typed(alice: User, page: Page) -> None:
    sign_in(page, "alice")
    fill(page, title="Kept", topic="Tea that fails. [[fault:500]]")
    write(page)
    expect(alert(page)).to_contain_text("is not answering properly. Please try again")
    expect(page.get_by_label("Title")).to_have_value("Kept")
    expect(page.get_by_label("What it is about")).to_have_value("Tea that fails. [[fault:500]]")
    expect(page.locator("#balance .balance-number")).to_have_text("10,000")
    shoot(page, "studio-failed")

    page.get_by_label("What it is about").fill("Tea that does not fail.")
    write(page)
    expect(status(page)).to_have_text(re.compile(r"^Done\. "))
    expect(alert(page)).to_be_hidden()
    assert [usage.status for usage in TokenUsage.objects.order_by("id")] == ["failed", "succeeded"]


def test_broken_stream_keeps_its_text_and_costs_nothing(alice: User, page: Page) -> None:
    sign_in(page, "alice")
    fill(page, topic="Tea. [[fault:cut]]")
    write(page)
    expect(alert(page)).to_contain_text("is not answering properly")
    expect(result(page)).to_contain_text("This cost nothing")
    expect(written(page)).not_to_be_empty()
    expect(page.locator("#balance .balance-number")).to_have_text("10,000")
    shoot(page, "studio-cut")


def test_stop_charges_what_was_written(alice: User, page: Page) -> None:
    sign_in(page, "alice")
    fill(page, topic=STALLED)
    write(page)
    expect(written(page)).to_have_text(re.compile(r"^[\s\S]{80,}$"))
    page.get_by_role("button", name="Stop").click()
    expect(status(page)).to_have_text(re.compile(r"^Stopped\. It cost [\d,]+ tokens\.$"))
    expect(result(page).get_by_role("link", name="Open the piece")).to_be_visible()
    text = written(page).inner_text()
    shoot(page, "studio-stopped")
    # No more is reserved, and a part of the quote is gone.
    expect(page.locator("#balance .balance")).to_have_attribute("title", re.compile(r", 0 of them reserved"))
    usage, piece = TokenUsage.objects.get(user=alice), ContentPiece.objects.get(author=alice)
    assert (usage.status, usage.is_estimated) == ("succeeded", True)
    assert 0 < usage.billable_tokens < 400
    assert balance(page) == 10_000 - usage.billable_tokens
    expect(status(page)).to_contain_text(f"It cost {usage.billable_tokens:,} tokens.")
    assert piece.body.startswith(text[:100])
    assert piece.state == ContentPiece.State.CUT_SHORT
    page.goto("/studio/")
    expect(page.locator(".piece-list")).to_contain_text("Cut short")


def test_stalled_stream_can_be_stopped(alice: User, page: Page) -> None:
    sign_in(page, "alice")
    fill(page, topic=STALLED)
    write(page)
    expect(written(page)).not_to_be_empty()
    expect(page.locator("#balance .balance")).to_have_attribute("title", re.compile("10,000 tokens .*, [1-9]"))
    shoot(page, "studio-streaming")
    page.get_by_role("button", name="Stop").click()
    expect(page.locator("#balance .balance")).to_have_attribute("title", re.compile(", 0 of them reserved"))
    assert TokenUsage.objects.get(user=alice).status == "succeeded"


def test_connection_that_breaks_amid_the_text(alice: User, page: Page) -> None:
    sign_in(page, "alice")
    after_the_first_words(page, "throw new TypeError('network error')")
    fill(page, topic=SLOW)
    write(page)
    expect(alert(page)).to_contain_text(re.compile(r"What was written is kept\. It cost [\d,]+ tokens\."))
    usage = TokenUsage.objects.get(user=alice)
    assert usage.status == "succeeded"
    expect(result(page)).to_contain_text(f"It cost {usage.billable_tokens:,} tokens.")
    expect(page.locator("#balance .balance")).to_have_attribute("title", re.compile(", 0 of them reserved"))


def test_answer_that_is_lost_is_not_paid_for_twice(alice: User, page: Page) -> None:
    """The operation ends and nothing of it arrives: who sends again gets it, who stops and sends again another one."""
    sign_in(page, "alice")
    page.route(
        "**/live/draft/", lambda route: (route.fetch(), route.fulfill(content_type="text/event-stream")), times=1
    )
    fill(page)
    write(page)
    expect(alert(page)).to_contain_text("Everything you typed is still here.")
    write(page)
    expect(result(page)).to_contain_text("It cost")
    assert TokenUsage.objects.count() == 1

    page.route("**/live/draft/", lambda route: route.fetch(), times=1)
    write(page)
    page.get_by_role("button", name="Stop").click()
    fill(page, title="Black tea")
    write(page)
    expect(result(page)).to_contain_text("It cost")
    assert ContentPiece.objects.filter(title="Black tea").exists()


def test_another_draft_after_going_back(alice: User, page: Page) -> None:
    sign_in(page, "alice")
    fill(page)
    write(page)
    page.get_by_role("link", name="Open the piece").click()
    page.wait_for_url("**/studio/content/*/")
    page.go_back()
    fill(page, title="Black tea")
    write(page)
    expect(status(page)).to_have_text(re.compile(r"^Done\. "))
    assert ContentPiece.objects.filter(title="Black tea").exists()


def test_signed_out_elsewhere(alice: User, make_user: MakeUser, page: Page) -> None:
    """One message, nothing typed is lost, and after a sign-in in another tab the page goes on."""
    sign_in(page, "alice")
    fill(page)
    expect(page.locator("#quote .quote-number")).to_be_visible()
    page.context.clear_cookies(name="sessionid")
    write(page)
    notice = page.locator("#toasts .notice")
    expect(notice).to_contain_text("You have been signed out. What you typed is still here.")
    page.get_by_label("Length").select_option("long")  # asks for a quote, which says the same again
    expect(page.locator("#quote .quote-number")).to_be_visible()
    expect(alert(page)).to_be_hidden()
    expect(notice).to_have_count(1)
    shoot(page, "studio-signed-out")

    with page.expect_popup() as opened:
        page.get_by_role("link", name="Sign in, in another tab").click()
    tab = opened.value
    tab.get_by_label("Email").fill("alice@example.com")
    tab.get_by_label("Password").fill(PASSWORD)
    with tab.expect_event("close"):
        tab.get_by_role("button", name="Sign in", exact=True).click()
    expect(notice).to_have_text(re.compile("You are signed in again"))
    expect(page.get_by_label("Title")).to_have_value("Green tea")
    write(page)
    expect(status(page)).to_have_text(re.compile(r"^Done\. "))

    # Signed out and in without a word here: the form's token is of the sign-in before.
    sign_in_elsewhere = page.context.new_page()
    page.context.clear_cookies()
    sign_in(sign_in_elsewhere, "alice")
    write(page)
    expect(status(page)).to_have_text(re.compile(r"^Done\. "))
    assert TokenUsage.objects.filter(user=alice, status="succeeded").count() == 2

    make_user("bob")
    page.context.clear_cookies()
    sign_in(sign_in_elsewhere, "bob")
    expect(notice.last).to_contain_text("Somebody else has signed in here.")


@pytest.mark.usefixtures("no_thinking")
def test_too_small_balance(make_user: MakeUser, page: Page) -> None:
    nora = make_user("nora", tokens=60)
    sign_in(page, "nora")
    fill(page)
    expect(page.locator("#quote")).to_contain_text("tokens are missing")
    shoot(page, "studio-too-small")
    write(page)
    expect(alert(page)).to_contain_text("are missing")
    expect(page.get_by_label("Title")).to_have_value("Green tea")

    ledger.add_tokens(user_id=nora.pk, tokens=500, type="bonus", description="Test", idempotency_key="more")
    page.get_by_label("Title").fill("Green tea, again")
    expect(page.locator("#quote")).to_contain_text("Your balance is small")
    shoot(page, "studio-reduced")


@pytest.mark.parametrize("scripts", [True, False])
def test_wrong_input_is_shown_at_its_field(alice: User, open_context: OpenContext, scripts: bool) -> None:
    page = sign_in(open_context(java_script_enabled=scripts).new_page(), "alice")
    fill(page)
    # What the browser would have caught itself.
    page.get_by_label("Title").fill("")
    page.locator("#draft-form button[type=submit]").evaluate("button => button.formNoValidate = true")
    write(page)
    error = page.locator("#id_title_error")
    expect(error).to_have_text("This field is required.")
    expect(page.get_by_label("Title")).to_have_attribute("aria-invalid", "true")
    expect(page.get_by_label("What it is about")).to_have_value("A letter about green tea.")
    shoot(page, f"studio-field-error-{'js' if scripts else 'nojs'}")
    fill(page)
    write(page)
    if scripts:
        expect(error).to_have_count(0)
        expect(status(page)).to_have_text(re.compile(r"^Done\. "))
    else:
        page.wait_for_url("**/studio/content/*/")
    assert TokenUsage.objects.count() == 1


def test_draft_without_scripts(alice: User, open_context: OpenContext) -> None:
    page = sign_in(open_context(java_script_enabled=False).new_page(), "alice")
    shoot(page, "studio-nojs")
    fill(page)
    write(page)
    page.wait_for_url("**/studio/content/*/")
    usage = TokenUsage.objects.get(user=alice)
    expect(page.get_by_label("Text", exact=True)).to_have_value(ContentPiece.objects.get(author=alice).body)
    expect(page.locator("#balance .balance-number")).to_have_text(f"{10_000 - usage.billable_tokens:,}")
    page.goto("/tokens/")
    expect(page.locator("#transactions tbody tr").first).to_contain_text(f"-{usage.billable_tokens:,}")
    assert TokenTransaction.objects.filter(user=alice, type="usage").count() == 1
