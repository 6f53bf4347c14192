"""Images: from an idea to a description, to images, to the gallery, and every way they can fail."""

import re
import struct
from pathlib import Path

import pytest
from playwright.sync_api import Locator, Page, expect

from accounts.models import User
from ai_ops import pieces
from ai_ops.models import GeneratedImage, ImageBatch, ImagePrompt
from billing.models import TokenTransaction, TokenUsage
from tests.conftest import MakeUser
from tests.journeys.conftest import OpenContext, shoot, sign_in

TEAPOT = "A green teapot on a wooden table by the window"
GOOGLE = "google:gemini-3.1-flash-image"


def open_images(page: Page, name: str = "alice") -> Page:
    sign_in(page, name, "/studio/images/")
    return page


def make(page: Page, prompt: str = TEAPOT, **choices: str) -> None:
    form = page.locator("#images-form")
    form.get_by_label("What to show").fill(prompt)
    for name, value in choices.items():
        form.locator(f"[name={name}]").select_option(value)
    form.get_by_role("button", name="Make the images").click()


def tiles(page: Page) -> Locator:
    return page.locator(".gallery-tile")


def png_size(data: bytes) -> tuple[int, int]:
    assert data.startswith(b"\x89PNG\r\n\x1a\n")
    width, height = struct.unpack(">II", data[16:24])
    return width, height


def downloaded_size(page: Page, position: int = 1) -> tuple[int, int]:
    with page.expect_download() as download:
        page.get_by_role("link", name="Download").nth(position - 1).click()
    assert re.fullmatch(rf"postmate-\d+-{position}\.png", download.value.suggested_filename)
    return png_size(Path(download.value.path()).read_bytes())


@pytest.mark.parametrize("scripts", [True, False])
def test_idea_to_description_to_images(alice: User, open_context: OpenContext, scripts: bool) -> None:
    page = open_images(open_context(java_script_enabled=scripts).new_page())
    kind = "js" if scripts else "nojs"
    page.get_by_text("Only an idea yet?").click()
    idea = page.locator("#image-prompt-form")
    idea.get_by_label("Your idea").fill("A teapot in the morning sun")
    idea.get_by_label("Style").select_option("Watercolour")
    shoot(page, f"images-idea-{kind}")
    idea.get_by_role("button", name="Write the description").click()
    if scripts:
        panel = page.locator("#image-prompt-panel")
        expect(panel.locator("[role=status]")).to_have_text(re.compile(r"^Done\. It cost [\d,]+ tokens\.$"))
        shoot(page, "images-description")
        panel.get_by_role("link", name="Use this description").click()
    else:
        page.wait_for_url("**/studio/images/?prompt=*")
    prompt = ImagePrompt.objects.get(author=alice)
    written = TokenUsage.objects.get(operation_type="prompt")
    form = page.locator("#images-form")
    expect(form.get_by_label("What to show")).to_have_value(prompt.text.strip())
    expect(form.get_by_label("Style")).to_have_value("watercolour")
    expect(page.locator("#prompts")).to_contain_text(f"{written.billable_tokens:,} tokens")

    # Two cheap ones: 2 × 1,500.
    form.get_by_label("Quality").select_option("low")
    form.get_by_label("Size").select_option("1536x1024")
    form.get_by_label("How many").select_option("2")
    if scripts:
        expect(page.locator("#quote")).to_contain_text("3,000 tokens")
        expect(page.locator("#quote")).to_contain_text("2 × 1,500")
    form.get_by_role("button", name="Make the images").click()
    if scripts:
        result = page.locator("#images-panel")
        expect(result.get_by_role("img")).to_have_count(2)
        expect(result).to_contain_text("It cost 3,000 tokens.")
        expect(tiles(page)).to_have_count(1)
        expect(page.locator(".image-awaited")).to_have_count(0)
        shoot(page, "images-made")
        page.locator(".gallery-tile a").click()
    page.wait_for_url("**/studio/images/*/")
    batch = ImageBatch.objects.get(author=alice)
    usage = TokenUsage.objects.get(operation_type="image")
    assert (usage.billable_tokens, usage.image_count, usage.image_size, usage.image_quality) == (
        3_000,
        2,
        "1536x1024",
        "low",
    )
    left = 10_000 - 3_000 - written.billable_tokens
    expect(page.locator("#balance .balance-number")).to_have_text(f"{left:,}")
    expect(page.locator(".facts")).to_contain_text("2 × 1,500 = 3,000")
    expect(page.locator(".facts")).to_contain_text("Watercolour")
    shown = page.locator(".image-grid img")
    expect(shown).to_have_count(2)
    assert (
        shown.first.evaluate("image => image.decode().then(() => [image.naturalWidth, image.naturalHeight])")
        == [
            1536,
            1024,
        ]
        if scripts
        else True
    )
    assert (shown.first.get_attribute("alt") or "").startswith(batch.prompt[:60])
    shoot(page, f"images-batch-{kind}")
    assert [downloaded_size(page, position) for position in (1, 2)] == [(1536, 1024)] * 2

    page.get_by_role("link", name="Make more like this").click()
    expect(page.locator("#images-form").get_by_label("What to show")).to_have_value(batch.prompt)
    expect(page.locator("#images-form").get_by_label("Size")).to_have_value("1536x1024")
    expect(page.locator("#images-form").get_by_label("Quality")).to_have_value("low")
    expect(page.locator("#images-form").get_by_label("How many")).to_have_value("2")


@pytest.mark.parametrize("scripts", [True, False])
def test_images_of_googles(alice: User, open_context: OpenContext, scripts: bool) -> None:
    page = open_images(open_context(java_script_enabled=scripts).new_page())
    make(page, model=GOOGLE, count="2", size="1024x1536")
    if scripts:
        page.locator("#images-panel").get_by_role("link", name="Open the images").click()
    page.wait_for_url("**/studio/images/*/")
    expect(page.locator(".facts")).to_contain_text("2 × 4,500 = 9,000")
    expect(page.locator(".facts")).to_contain_text("gemini-3.1-flash-image")
    expect(page.locator("#balance .balance-number")).to_have_text("1,000")
    usage = TokenUsage.objects.get(user=alice)
    assert (usage.provider, usage.billable_tokens, usage.image_count, usage.image_quality) == ("google", 9_000, 2, "")
    width, height = downloaded_size(page)
    assert abs(width / height - 2 / 3) < 0.02


@pytest.mark.parametrize("model", ["openai:gpt-image-2", GOOGLE])
def test_fewer_images_than_asked_for(alice: User, page: Page, model: str) -> None:
    """Law 5: each image that came is charged, and no other."""
    open_images(page)
    quality = {} if model == GOOGLE else {"quality": "low"}
    make(page, f"{TEAPOT}, for {model} [[fault:fewer]]", model=model, count="2", **quality)
    page.locator("#images-panel").get_by_role("link", name="Open the images").click()
    expect(page.locator("#batch")).to_contain_text("1 of 2 images came. You paid only for this one.")
    each = 4_500 if model == GOOGLE else 1_500
    expect(page.locator(".facts")).to_contain_text(f"1 × {each:,} = {each:,}")
    expect(page.locator("#balance .balance-number")).to_have_text(f"{10_000 - each:,}")
    assert GeneratedImage.objects.count() == 1
    shoot(page, "images-fewer")


@pytest.mark.parametrize("fault", ["refused", "500"])
def test_failed_images_cost_nothing(alice: User, page: Page, fault: str) -> None:
    """Row 53: the hold is released, the words are clear and nothing typed is lost."""
    open_images(page)
    make(page, f"{TEAPOT} [[fault:{fault}]]")
    expect(page.locator("#images-form [role=alert]")).to_be_visible()
    expect(page.locator("#images-panel")).to_contain_text("This cost nothing.")
    expect(page.get_by_label("What to show")).to_have_value(f"{TEAPOT} [[fault:{fault}]]")
    expect(tiles(page)).to_contain_text("Not made")
    expect(page.locator("#balance .balance-number")).to_have_text("10,000")
    shoot(page, f"images-failed-{fault}")
    page.locator(".gallery-tile a").click()
    expect(page.locator("#batch")).to_contain_text("These images cost nothing.")
    assert not TokenTransaction.objects.filter(user=alice, type="usage").exists()


def test_stopped_images_are_charged_as_the_page_says(alice: User, page: Page) -> None:
    """Row 102: the provider is stopped; it had begun, and is paid for it."""
    open_images(page)
    make(page, f"{TEAPOT} [[fault:timeout]]", count="2", size="1536x1024", quality="low")
    panel = page.locator("#images-panel")
    expect(panel.locator("[role=status]")).to_have_text("Making your images. 3,000 tokens are reserved for it.")
    expect(panel.locator(".image-awaited")).to_have_count(2)
    box = panel.locator(".image-awaited").first.bounding_box()
    assert box is not None
    assert abs(box["width"] / box["height"] - 1.5) < 0.05
    shoot(page, "images-being-made")
    panel.get_by_role("button", name="Stop").click()
    expect(panel.locator("[role=status]")).to_have_text("Stopped. It cost 3,000 tokens.")
    expect(panel.locator(".image-awaited")).to_have_count(0)
    expect(tiles(page)).to_contain_text("Not made")
    expect(page.locator("#balance .balance-number")).to_have_text("7,000")
    assert TokenUsage.objects.get(user=alice).status == "succeeded"


@pytest.mark.parametrize("scripts", [True, False])
def test_too_small_balance(make_user: MakeUser, open_context: OpenContext, scripts: bool) -> None:
    make_user("nora", tokens=2_000)
    page = open_images(open_context(java_script_enabled=scripts).new_page(), "nora")
    make(page, quality="medium")
    expect(page.locator("#images-form [role=alert]")).to_contain_text("4,000 are missing")
    if scripts:
        expect(page.locator("#quote")).to_contain_text("4,000 tokens are missing")
    expect(page.get_by_label("What to show")).to_have_value(TEAPOT)
    shoot(page, f"images-too-small-{'js' if scripts else 'nojs'}")
    assert not ImageBatch.objects.exists()


def test_images_made_in_another_window_appear(alice: User, page: Page) -> None:
    project = pieces.get_project(user_id=alice.pk, name="Tea")
    batch = ImageBatch.objects.create(project=project, author=alice, prompt=TEAPOT, size="1024x1024", count=1)
    open_images(page)
    expect(tiles(page)).to_contain_text("Being made")
    page.goto(batch.get_absolute_url())
    expect(page.locator("#batch")).to_contain_text("The images are being made.")
    ImageBatch.objects.update(state="failed")
    expect(page.locator("#batch")).to_contain_text("These images cost nothing.")


def test_impossible_quality_is_shown_at_its_field(alice: User, page: Page) -> None:
    """Row 58: what the model does not make is refused before the provider is called."""
    open_images(page)
    page.locator("#images-form [name=quality]").evaluate(
        "select => select.append(new Option('Ultra', 'ultra', true, true))"
    )
    make(page)
    expect(page.locator("#id_quality_error")).to_be_visible()
    expect(page.locator("#id_quality")).to_have_attribute("aria-invalid", "true")
    assert not TokenUsage.objects.exists()


def test_gallery_pages_and_strangers(alice: User, bob: User, page: Page) -> None:
    """Row 63: an image is served to its author alone."""
    open_images(page)
    shoot(page, "images-empty")
    make(page, quality="low")
    expect(page.locator("#images-panel").get_by_role("img")).to_have_count(1)
    image, batch = GeneratedImage.objects.get(), ImageBatch.objects.get()
    ImageBatch.objects.bulk_create(
        ImageBatch(project=batch.project, author=alice, prompt="Long " * 800, size="1024x1024", count=1, state=state)
        for state in ["failed"] * 24
    )
    page.goto("/studio/images/")
    expect(tiles(page)).to_have_count(24)
    page.get_by_text("What images cost").click()
    expect(page.get_by_role("row", name=re.compile("GPT Image 2 Low"))).to_contain_text("1,500")
    shoot(page, "images-gallery")
    page.get_by_role("link", name="Older").click()
    expect(tiles(page)).to_have_count(1)
    expect(page.get_by_role("link", name="Newer")).to_be_visible()
    page.goto(f"/studio/images/{ImageBatch.objects.latest('id').pk}/")
    shoot(page, "images-batch-failed")

    page.context.clear_cookies()
    sign_in(page, "bob")
    for address in (image.get_absolute_url(), batch.get_absolute_url()):
        answer = page.request.get(address)
        assert answer.status == 404
    page.goto(f"/studio/images/?like={batch.pk}")
    expect(page.get_by_label("What to show")).to_have_value("")
