"""The editor of a piece: what models do with a text, its versions, and nothing typed that is lost."""

import base64
import re

import pytest
from django.core.files.base import ContentFile
from playwright.sync_api import Locator, Page, expect

from accounts.models import User
from ai_ops import pieces
from ai_ops.models import Chat, ContentPiece, ContentVersion, GeneratedImage, ImageBatch, Project
from billing import ledger
from billing.catalogue import system_settings
from billing.models import TokenTransaction, TokenUsage
from tests.conftest import PASSWORD, MakeUser
from tests.journeys.conftest import OpenContext, shoot, sign_in

BODY = "# Green tea\n\nA good cup begins with fresh water. 🍵 Many people let it boil.\n\nIt is easy to show."
PASSAGE = "Many people let it boil."


def make_piece(user: User, *, title: str = "Green tea", body: str = BODY) -> ContentPiece:
    project, _ = Project.objects.get_or_create(workspace=user.workspaces.get(), name="Tea")
    piece = ContentPiece.objects.create(project=project, author=user, title=title, body=body, state="ready")
    ContentVersion.objects.create(piece=piece, number=1, body=body, origin="draft")
    return piece


def open_piece(page: Page, piece: ContentPiece) -> Page:
    sign_in(page, User.objects.get(pk=piece.author_id).email.partition("@")[0], piece.get_absolute_url())
    return page


def editor(page: Page) -> Locator:
    return page.get_by_role("textbox", name="Text", exact=True)


def choose(page: Page, title: str) -> Locator:
    """Open an operation and return its part of the page."""
    choice = page.locator(".choice").filter(has_text=title)
    if choice.get_attribute("open") is None:
        choice.locator("summary").click()
    return choice


def status(page: Page) -> Locator:
    return page.locator("#panel [data-operation-status]")


def result(page: Page) -> Locator:
    return page.locator("#panel [data-operation-result]")


def body_of(piece: ContentPiece) -> str:
    piece.refresh_from_db()
    return piece.body


def test_refine_the_whole_text_with_what_was_just_typed(alice: User, page: Page) -> None:
    piece = make_piece(alice)
    open_piece(page, piece)
    editor(page).fill(f"{BODY}\n\nThis is important.")
    expect(page.locator("#editor-state")).to_have_text("Unsaved changes")
    refine = choose(page, "Refine the whole text")
    refine.get_by_label("What to do").select_option(label="Make it longer")
    refine.get_by_label("Anything else").fill("Mention cups.")
    expect(refine.locator(".quote-number")).to_have_text(re.compile(r"^[\d,]+ tokens$"))
    shoot(page, "piece-unsaved")
    refine.get_by_role("button", name="Refine the text").click()
    expect(status(page)).to_have_text(re.compile(r"^Done\. It cost [\d,]+ tokens\.$"))

    usage = TokenUsage.objects.get(user=alice)
    expect(result(page)).to_contain_text("It is version 3 of the text.")
    expect(result(page)).to_contain_text(f"It cost {usage.billable_tokens:,} tokens.")
    revised = body_of(piece)
    assert list(piece.versions.values_list("number", "origin", "body"))[1:] == [
        (2, "edit", f"{BODY}\n\nThis is important."),
        (1, "draft", BODY),
    ]
    expect(page.locator("#panel [data-operation-text]")).to_have_text(revised)
    expect(editor(page)).to_have_value(revised)
    expect(page.locator("#editor-state")).to_have_text("")
    expect(page.locator("#versions li").first).to_contain_text("Version 3 · Refined: Make it longer")
    expect(page.locator("#balance .balance-number")).to_have_text(f"{10_000 - usage.billable_tokens:,}")
    arithmetic = f"({usage.input_tokens:,} + {usage.output_tokens:,}) × 1.5 = {usage.billable_tokens:,}"
    expect(page.get_by_role("cell", name=arithmetic)).to_be_visible()
    shoot(page, "piece-refined")

    # What is typed now is over the newest version.
    editor(page).press("Control+End")
    editor(page).press_sequentially(" The end.")
    editor(page).press("Control+s")
    expect(page.get_by_text("Your changes are saved.")).to_be_visible()
    assert body_of(piece) == f"{revised} The end."
    assert piece.versions.count() == 4


def test_refine_a_passage_by_selecting_it(alice: User, page: Page) -> None:
    piece = make_piece(alice, body=f"{PASSAGE}\n\n{BODY}")  # it occurs twice; the second one is meant
    open_piece(page, piece)
    start = editor(page).evaluate("text => text.value.lastIndexOf('Many people')")
    editor(page).focus()
    editor(page).evaluate(f"text => text.setSelectionRange({start}, {start})")
    for _ in range(len(PASSAGE)):
        page.keyboard.press("Shift+ArrowRight")
    page.get_by_role("button", name="Refine the 5 selected words").click()
    passage = choose(page, "Refine a passage")
    expect(passage.get_by_label("Passage")).to_have_value(PASSAGE)
    expect(passage.get_by_label("What to change")).to_be_focused()
    page.keyboard.type("Make it longer.")
    expect(passage.locator(".quote-number")).to_have_text(re.compile(r"^[\d,]+ tokens$"))
    shoot(page, "piece-passage")
    passage.get_by_role("button", name="Refine the passage").click()
    expect(result(page)).to_contain_text("It is version 2 of the text.")

    revised = page.locator("#panel [data-operation-text]").inner_text()
    assert revised.startswith(PASSAGE)
    assert len(revised) > len(PASSAGE)
    expected = f"{PASSAGE}\n\n{BODY.replace(PASSAGE, revised)}"
    assert body_of(piece) == expected
    expect(editor(page)).to_have_value(expected)
    expect(passage.get_by_label("Passage")).to_have_value("")
    assert TokenUsage.objects.get(user=alice).metadata["operation"] == "refine_selection"


def test_repurpose_makes_a_piece_of_its_own(alice: User, page: Page) -> None:
    piece = make_piece(alice)
    open_piece(page, piece)
    repurpose = choose(page, "Repurpose it")
    editor(page).press_sequentially("Not saved yet. ")
    expect(repurpose.get_by_text("Save your changes first")).to_be_visible()
    expect(repurpose.get_by_role("button", name="Make a new piece")).to_be_disabled()
    page.get_by_role("button", name="Save", exact=True).click()
    expect(page.get_by_text("Your changes are saved.")).to_be_visible()

    repurpose = choose(page, "Repurpose it")
    repurpose.get_by_label("Turn it into").select_option(label="LinkedIn post")
    repurpose.get_by_role("button", name="Make a new piece").click()
    expect(status(page)).to_have_text(re.compile(r"^Done\. "))
    expect(page.locator("#derived")).to_contain_text("LinkedIn post: Green tea")
    expect(editor(page)).to_have_value(f"Not saved yet. {BODY}")
    shoot(page, "piece-repurposed")
    result(page).get_by_role("link", name="Open the piece").click()
    expect(page.get_by_role("heading", name="LinkedIn post: Green tea")).to_be_visible()
    page.get_by_role("link", name="Green tea", exact=True).click()
    expect(page).to_have_url(re.compile(rf"{piece.get_absolute_url()}$"))
    derived = ContentPiece.objects.get(source=piece)
    assert derived.state == "ready"
    assert TokenUsage.objects.get(user=alice).content_id == derived.pk


@pytest.mark.usefixtures("no_thinking")
def test_balance_runs_out_then_the_text_is_continued(make_user: MakeUser, page: Page) -> None:
    nora = make_user("nora", tokens=420)
    sign_in(page, "nora")
    page.get_by_label("Title").fill("Green tea")
    page.get_by_label("What it is about").fill("A letter about green tea.")
    expect(page.locator("#quote")).to_contain_text("can be reserved now, so the text may end early")
    page.get_by_role("button", name="Write the draft").click()
    outcome = page.locator("#draft-panel [data-operation-result]")
    expect(outcome).to_contain_text("Your balance ran out before the text was finished.")
    expect(page.locator("#draft-panel [data-operation-status]")).to_contain_text("Your balance ran out.")
    expect(outcome.get_by_role("link", name="Buy tokens")).to_have_attribute("href", "/tokens/#packages")
    expect(page.locator("#pieces")).to_contain_text("Cut short")
    shoot(page, "studio-balance-ran-out")
    piece = ContentPiece.objects.get(author=nora)
    beginning = piece.body
    assert piece.state == "cut_short"

    outcome.get_by_role("link", name="Continue").click()
    carry_on = page.locator("#continuation")
    expect(carry_on).to_have_attribute("open", "")
    expect(carry_on).to_contain_text("tokens are missing")
    shoot(page, "piece-cut-short")
    ledger.add_tokens(user_id=nora.pk, tokens=5_000, type="bonus", description="Test", idempotency_key="more")
    carry_on.get_by_label("Model").dispatch_event("change")
    expect(carry_on.locator(".quote-number")).to_be_visible()
    carry_on.get_by_role("button", name="Continue").click()
    expect(result(page)).to_contain_text("It is version 2 of the text.")
    expect(carry_on).to_be_hidden()
    whole = body_of(piece)
    assert whole.startswith(beginning)
    assert (piece.state, len(whole) > len(beginning)) == ("ready", True)
    expect(editor(page)).to_have_value(whole)
    shoot(page, "piece-continued")


def test_stopped_revision_is_kept_aside_and_can_be_restored(alice: User, page: Page) -> None:
    body = "\n\n".join(f"The cup number {number} is good because it is small." for number in range(40))
    piece = make_piece(alice, body=body)
    open_piece(page, piece)
    refine = choose(page, "Refine the whole text")
    refine.get_by_label("Anything else").fill("Slowly. [[fault:stall]]")
    refine.get_by_role("button", name="Refine the text").click()
    expect(page.locator("#panel [data-operation-text]")).not_to_be_empty()
    expect(page.locator("#editor-state")).to_contain_text("Being revised.")
    expect(editor(page)).to_have_attribute("readonly", "")
    # One at a time: the panel is taken.
    choose(page, "Repurpose it").get_by_role("button", name="Make a new piece").click()
    expect(page.locator("#repurpose-form [data-operation-alert]")).to_contain_text("still running")
    shoot(page, "piece-being-refined")
    page.get_by_role("button", name="Stop").click()
    aside = page.locator("#versions li").filter(has_text="Kept aside")
    expect(aside).to_be_visible()
    expect(editor(page)).to_have_value(body)
    expect(editor(page)).to_be_editable()
    # That version has a number, too: what is typed now is no conflict.
    editor(page).press_sequentially("Still here. ")
    page.get_by_role("button", name="Save", exact=True).click()
    expect(page.get_by_text("Your changes are saved.")).to_be_visible()

    aside.get_by_role("link").first.click()
    expect(page.get_by_text("This version is not the text")).to_be_visible()
    kept = piece.versions.get(is_used=False)
    expect(page.locator(".prose")).to_have_text(kept.body)
    page.get_by_text("Restore this version").click()
    shoot(page, "version")
    page.get_by_role("button", name="Restore it").click()
    expect(page.get_by_text("Version 2 is the text again.")).to_be_visible()
    expect(editor(page)).to_have_value(kept.body)
    expect(page.locator("#versions li").first).to_contain_text("Version 4 · Restored: Version 2")


def test_revision_of_a_text_that_changes_meanwhile_is_kept_aside(alice: User, page: Page) -> None:
    piece = make_piece(alice, body="\n\n".join(f"The cup number {number} is good." for number in range(80)))
    open_piece(page, piece)
    refine = choose(page, "Refine the whole text")
    refine.get_by_label("Anything else").fill("Slowly. [[fault:slow]]")
    refine.get_by_role("button", name="Refine the text").click()
    expect(page.locator("#panel [data-operation-text]")).not_to_be_empty()
    pieces.save_edit(user_id=alice.pk, content_id=piece.pk, base_number=1, body="From another window.")
    expect(result(page)).to_contain_text("The text was changed meanwhile", timeout=30_000)
    expect(result(page)).to_contain_text("kept aside as version 3")
    expect(editor(page)).to_have_value("From another window.")
    shoot(page, "piece-changed-meanwhile")
    result(page).get_by_role("link", name="Open version 3").click()
    expect(page.get_by_role("heading", name="Green tea: version 3")).to_be_visible()


def test_billing_switched_off(alice: User, page: Page) -> None:
    row = system_settings.get_system_settings()
    row.billing_enabled = False
    row.save()
    piece = make_piece(alice)
    open_piece(page, piece)
    refine = choose(page, "Refine the whole text")
    expect(refine.locator(".quote-region")).to_contain_text("Free: billing is switched off.")
    refine.get_by_role("button", name="Refine the text").click()
    expect(result(page)).to_contain_text("Free: billing is switched off.")
    expect(status(page)).to_have_text("Done. It cost nothing.")
    expect(page.locator("#costs")).to_contain_text("Free: billing was switched off")
    expect(page.locator("#balance .balance-number")).to_have_text("10,000")


def test_failing_revision_leaves_the_text_and_costs_nothing(alice: User, page: Page) -> None:
    piece = make_piece(alice)
    open_piece(page, piece)
    refine = choose(page, "Refine the whole text")
    refine.get_by_label("Anything else").fill("[[fault:500]]")
    refine.get_by_role("button", name="Refine the text").click()
    expect(refine.locator("[data-operation-alert]")).to_contain_text("is not answering properly")
    expect(result(page)).to_contain_text("This cost nothing.")
    expect(editor(page)).to_have_value(BODY)
    expect(page.locator("#costs")).to_contain_text("Costs nothing")
    shoot(page, "piece-failed")
    assert body_of(piece) == BODY
    assert ledger.get_account(user_id=alice.pk).balance == 10_000


def test_two_windows_lose_nothing(alice: User, open_context: OpenContext) -> None:
    piece = make_piece(alice)
    context = open_context()
    first, second = open_piece(context.new_page(), piece), context.new_page()
    second.goto(piece.get_absolute_url())
    editor(first).fill("Typed in the first window.")
    first.get_by_role("button", name="Save", exact=True).click()
    expect(first.get_by_text("Your changes are saved.")).to_be_visible()

    editor(second).fill("Typed in the second window.")
    refine = choose(second, "Refine the whole text")
    refine.get_by_role("button", name="Refine the text").click()
    expect(refine.locator("[data-operation-alert]")).to_contain_text("changed in another window")
    expect(editor(second)).to_have_value("Typed in the second window.")
    second.get_by_role("button", name="Save", exact=True).click()
    expect(second.get_by_role("alert").first).to_contain_text("changed in another window")
    expect(editor(second)).to_have_value("Typed in the second window.")
    shoot(second, "piece-conflict")
    second.get_by_text("The text as it is saved now").click()
    expect(second.locator(".saved-text")).to_have_text("Typed in the first window.")
    assert body_of(piece) == "Typed in the first window."

    second.get_by_role("button", name="Save mine as the newest").click()
    expect(second.get_by_text("Your changes are saved.")).to_be_visible()
    assert body_of(piece) == "Typed in the second window."
    assert piece.versions.get(number=2).body == "Typed in the first window."
    assert not TokenUsage.objects.exists()


def test_text_typed_before_a_sign_in_is_put_back(alice: User, page: Page) -> None:
    piece = make_piece(alice)
    open_piece(page, piece)
    page.on("dialog", lambda dialog: dialog.accept())  # leaves the page, unsaved
    put_back = page.get_by_text("It is back in the editor, still unsaved.")
    unsaved = page.get_by_text("Unsaved changes", exact=True)  # the page's scripts have seen it
    editor(page).fill("Typed for an hour.")
    expect(unsaved).to_be_visible()
    page.context.clear_cookies(name="sessionid")
    page.get_by_role("button", name="Save", exact=True).click()
    page.get_by_label("Email").fill("alice@example.com")
    page.get_by_label("Password").fill(PASSWORD)
    page.get_by_role("button", name="Sign in", exact=True).click()
    expect(put_back).to_be_visible()
    expect(editor(page)).to_have_value("Typed for an hour.")
    shoot(page, "piece-put-back")
    page.get_by_role("button", name="Save", exact=True).click()
    expect(page.get_by_text("Your changes are saved.")).to_be_visible()
    expect(put_back).to_be_hidden()
    assert body_of(piece) == "Typed for an hour."

    # What another window saved meanwhile is not overwritten unseen.
    editor(page).fill("Typed on.")
    expect(unsaved).to_be_visible()
    pieces.save_edit(user_id=alice.pk, content_id=piece.pk, base_number=2, body="From another window.")
    page.reload()
    expect(editor(page)).to_have_value("Typed on.")
    page.get_by_role("button", name="Save", exact=True).click()
    expect(page.get_by_role("alert").first).to_contain_text("changed in another window")
    page.goto(piece.get_absolute_url())
    expect(editor(page)).to_have_value("Typed on.")
    page.get_by_role("button", name="Use the saved text instead").click()
    expect(editor(page)).to_have_value("From another window.")
    expect(put_back).to_be_hidden()

    editor(page).fill("Nobody else's.")
    expect(unsaved).to_be_visible()
    page.locator("details.menu summary").click()
    page.get_by_role("button", name="Sign out").click()
    expect(page.get_by_role("link", name="Sign in")).to_be_visible()
    assert page.evaluate("sessionStorage.length") == 0


def test_page_of_a_piece_that_is_gone_asks_no_more(alice: User, open_context: OpenContext) -> None:
    piece = make_piece(alice, body="")
    ContentPiece.objects.update(state="writing")
    page = open_context().new_page()
    page.clock.install()
    open_piece(page, piece)
    ContentPiece.objects.all().delete()
    with page.expect_response(lambda response: response.status == 404):
        page.clock.run_for(2_000)
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    page.evaluate("fetch('/healthz')")
    page.clock.run_for(10_000)
    page.evaluate("fetch('/healthz')")
    assert not [url for url in asked if url.endswith(piece.get_absolute_url())]


def test_editor_without_scripts(alice: User, open_context: OpenContext) -> None:
    piece = make_piece(alice)
    page = open_piece(open_context(java_script_enabled=False).new_page(), piece)
    shoot(page, "piece-nojs")
    editor(page).fill(f"{BODY}\n\nSaved by hand.")
    page.get_by_role("button", name="Save", exact=True).click()
    expect(page.get_by_text("Your changes are saved.")).to_be_visible()
    assert body_of(piece) == f"{BODY}\n\nSaved by hand."

    choose(page, "Refine the whole text").get_by_role("button", name="Refine the text").click()
    expect(page.locator("#versions li")).to_have_count(3)
    expect(editor(page)).to_have_value(body_of(piece))
    assert piece.versions.first().origin == "refinement"  # type: ignore[union-attr]

    passage = choose(page, "Refine a passage")
    passage.get_by_label("Passage").fill("no such words")
    passage.get_by_label("What to change").fill("Make it longer.")
    passage.get_by_role("button", name="Refine the passage").click()
    expect(passage.get_by_role("alert")).to_contain_text("This passage is not in the text")
    expect(passage.get_by_label("What to change")).to_have_value("Make it longer.")
    passage.get_by_label("Passage").fill("Green tea")
    passage.get_by_role("button", name="Refine the passage").click()
    expect(page.locator("#versions li").first).to_contain_text("Passage refined: Make it longer.")

    choose(page, "Repurpose it").get_by_role("button", name="Make a new piece").click()
    expect(page.get_by_role("heading", name="Newsletter: Green tea")).to_be_visible()
    assert TokenTransaction.objects.filter(user=alice, type="usage").count() == 3


PNG = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNkiNjyHwAEQwIoR4mbSgAAAABJRU5ErkJggg=="
)
LONG = "Donaudampfschifffahrtsgesellschaftskapitän " * 4


@pytest.mark.parametrize("is_full", [False, True])
def test_projects(alice: User, page: Page, is_full: bool) -> None:
    if is_full:
        for number in range(30):
            make_piece(alice, title=f"{LONG}{number}" if number == 29 else f"Piece number {number}")
        tea = Project.objects.get(name="Tea")
        for count in range(3):
            state = "ready" if count else "failed"
            batch = ImageBatch.objects.create(
                project=tea, author=alice, prompt=LONG, size="1024x1024", count=count, state=state
            )
            for position in range(1, count + 1):
                file = ContentFile(PNG, name=f"tea-{position}.png")
                GeneratedImage.objects.create(batch=batch, position=position, file=file, media_type="image/png")
        Chat.objects.create(project=tea, author=alice, title=LONG)
        Project.objects.create(workspace=alice.workspaces.get(), name=(LONG * 2)[:150])
    sign_in(page, "alice")
    page.get_by_role("navigation", name="Studio").get_by_role("link", name="Projects").click()
    shoot(page, f"projects-{'full' if is_full else 'empty'}")
    if not is_full:
        expect(page.get_by_text("A project is made by its name")).to_be_visible()
        return
    page.get_by_role("link", name="Tea").click()
    expect(page.get_by_role("heading", name="Tea", exact=True)).to_be_visible()
    expect(page.get_by_role("region", name="Pieces").locator(".piece-list li")).to_have_count(24)
    expect(page.locator(".thumbs li")).to_have_count(3)
    page.locator(".thumbs img").last.scroll_into_view_if_needed()  # it is loaded when it comes into sight
    expect(page.locator(".thumbs img").last).to_have_js_property("naturalWidth", 1)
    shoot(page, "project")
    page.get_by_role("link", name=LONG[:40]).first.click()
    expect(editor(page)).to_have_value(BODY)
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    shoot(page, "piece-long-title")
    page.go_back()
    page.get_by_role("link", name="Next").click()
    expect(page.get_by_text("Page 2 of 2")).to_be_visible()
    page.get_by_role("link", name="Piece number 3", exact=False).first.click()
    expect(editor(page)).to_have_value(BODY)
