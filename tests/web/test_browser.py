"""Test the page in headless Chromium, driven by Playwright."""

import shutil

import numpy as np
import pytest
from helpers.web_server import Gate, demo_config, serving, write_run
from PIL import Image

from moh_dit.checkpoints.opening import load_pipeline
from moh_dit.web.service import ImageService

CHROMIUM = shutil.which("chromium")
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
         "--disable-background-networking", "--disable-component-update",
         "--disable-sync"]  # fmt: skip
PATIENCE = 120_000  # ms

sync_api = pytest.importorskip("playwright.sync_api", reason="needs pip install playwright")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium: apt-get install chromium")


@pytest.fixture(scope="module")
def service(tmp_path_factory):
    run = write_run(tmp_path_factory.mktemp("runs") / "digits")
    return ImageService(load_pipeline(run), demo_config(run, max_images=20, previews=2))


@pytest.fixture(scope="module")
def gate(service):
    return Gate(service.pipeline.transformer)


@pytest.fixture(scope="module")
def browser():
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS, timeout=PATIENCE)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def address(service, gate):
    with serving(service) as address:
        yield address


@pytest.fixture
def visit(browser, address):
    """Return a function that opens the page as a new user; check for page errors at the end."""
    contexts, problems, asked_for = [], [], []

    def open_page(**options):
        contexts.append(browser.new_context(**options))
        page = contexts[-1].new_page()
        page.set_default_timeout(PATIENCE)
        page.on("pageerror", lambda error: problems.append(error.message))
        page.on("request", lambda request: asked_for.append(request.url))
        page.goto(address)
        page.locator("#names label").nth(9).wait_for()
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert not problems
    assert all(url.removeprefix("blob:").startswith(address) for url in asked_for)


def expect(locator):
    sync_api.expect.set_options(timeout=PATIENCE)
    return sync_api.expect(locator)


def choose(page, *names):
    page.click("#none")
    for name in names:
        page.get_by_label(name, exact=True).check()


def generate(page):
    page.click("#make")
    expect(page.locator("#status")).to_have_text("Done.")


def test_generate_a_digit_and_change_a_setting(visit, service, tmp_path):
    page = visit()
    choose(page, "3", "8")
    page.fill("[name=images_per_class]", "2")
    expect(page.locator("#count")).to_have_text("4 of at most 20 images")
    sheets = []
    for seed in ("1", "1", "2"):
        page.fill("[name=seed]", seed)
        generate(page)
        with page.expect_download() as download:
            page.click("#download")
        assert download.value.suggested_filename == f"digits-step-00000002-seed{seed}.png"
        download.value.save_as(tmp_path / "sheet.png")
        with Image.open(tmp_path / "sheet.png") as sheet:
            assert f"seed: {seed}" in sheet.text["settings"]
            assert "class_labels: 3,8" in sheet.text["settings"]
            sheets.append(np.asarray(sheet))
    assert np.array_equal(sheets[0], sheets[1])
    assert not np.array_equal(sheets[1], sheets[2])
    cells = page.locator(".cell")
    assert cells.count() == 4
    assert cells.nth(3).get_attribute("aria-label") == "8, image 2"
    assert 'url("blob:' in cells.nth(3).evaluate("cell => cell.style.backgroundImage")
    shares = page.locator("#heat td:not(.even)").all_text_contents()[1:]
    assert sum(map(int, shares)) == pytest.approx(100, abs=1)
    page.select_option("#view", label="8")
    assert page.locator("#heat td:not(.even)").all_text_contents()[1:] != shares
    assert page.locator("#heat th[scope=col]").first.text_content() == "head 2"
    # The gallery has the results; one of them is sampled again with another seed.
    expect(page.locator("#made button")).to_have_count(3)
    page.locator("#made button").nth(2).click()
    expect(page.locator("#caption")).to_contain_text("seed 1")
    page.click("#again")
    expect(page.locator("#made button")).to_have_count(4)
    assert page.input_value("[name=seed]") not in ("1", "2")
    expect(page.locator("#status")).to_have_text("Done.")


def test_blend_and_guidance_sweep(visit):
    page = visit()
    expect(page.locator("#first-image")).to_be_visible()
    choose(page, "3", "8")
    page.select_option("#mode", "interpolate")
    page.fill("[name=interpolate]", "3")
    generate(page)
    expect(page.locator("#first-image")).to_be_hidden()
    cells = page.locator(".cell")
    assert [cells.nth(i).get_attribute("aria-label") for i in range(3)] == [
        "3, 0 %", "3, 50 %", "3, 100 %"
    ]  # fmt: skip
    page.select_option("#mode", "sweep")
    page.fill("[name=guidance_scales]", "1, 4")
    expect(page.locator("#count")).to_have_text("4 of at most 20 images")
    page.press("[name=guidance_scales]", "Enter")  # the keyboard suffices
    expect(page.locator("#caption")).to_contain_text("guidance 1, 4")
    assert cells.nth(3).get_attribute("aria-label") == "8, guidance 4"


def test_a_model_without_samples_makes_a_first_grid(browser, tmp_path):
    run = write_run(tmp_path / "digits")
    (run / "samples" / "step-00000002.png").unlink()
    with serving(ImageService(load_pipeline(run), demo_config(run))) as address:
        page = browser.new_page()
        page.goto(address)
        expect(page.locator("#status")).to_have_text("Done.")
        assert page.locator(".cell").count() == 4
        assert page.input_value("[name=images_per_class]") == "4"
        page.close()


def test_a_wrong_value_is_reported_at_the_button(visit):
    page = visit()
    generate(page)
    for name, value, message in (
        ("seed", "-1", "seed is -1; it must be between 0"),
        ("num_inference_steps", "9999", "at most 250"),
        ("images_per_class", "21", "at most 20 are allowed per request"),
    ):
        field = page.locator(f"[name={name}]")
        before = field.input_value()
        field.fill(value)
        page.click("#make")
        expect(page.locator("form").get_by_role("alert")).to_contain_text(message)
        assert page.locator("#download").is_hidden()
        assert page.locator(".cell").count() == 0
        field.fill(before)
    page.click("#none")
    page.click("#make")
    expect(page.get_by_role("alert")).to_contain_text("choose at least one")
    page.locator("#made button").click()  # earlier images remain in the gallery
    expect(page.locator("#download")).to_be_visible()
    page.click("#all")
    page.fill("[name=images_per_class]", "1")
    generate(page)
    expect(page.get_by_role("alert")).to_be_hidden()


def test_two_users_queue_and_one_cancels(visit, gate):
    first, second = visit(), visit()
    with gate.closed():
        first.click("#make")
        expect(first.locator("#cancel")).to_be_enabled()
        gate.wait()
        second.click("#make")
        expect(second.locator("#status")).to_have_text("Waiting: 1 request ahead of yours.")
        with first.expect_response(lambda response: response.request.method == "DELETE"):
            first.click("#cancel")
        before = gate.evaluations
    expect(first.locator("#status")).to_have_text("Cancelled.")
    expect(second.locator("#status")).to_have_text("Done.")
    assert gate.evaluations == before + 4  # those of the second; the first ended within its step
    assert first.locator("#download").is_hidden()
    assert first.locator(".cell").count() == 0
    generate(first)


def test_previews_appear_during_sampling(visit, gate):
    page = visit()
    with page.expect_request("**/preview.jpg?1"):
        page.click("#make")
    expect(page.locator("#status")).to_have_text("Done.")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_fits_a_phone(visit, scheme):
    page = visit(viewport={"width": 360, "height": 740}, color_scheme=scheme)
    page.click("#all")
    page.fill("[name=images_per_class]", "2")
    generate(page)
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    # The minimum contrast of WCAG for text, on the button and on the panel.
    for selector, ground in (
        ("#make", "#make"),
        ("#download", "#download"),
        ("#status", "#result"),
    ):
        ink = page.locator(selector).evaluate("e => getComputedStyle(e).color")
        paper = page.locator(ground).evaluate("e => getComputedStyle(e).backgroundColor")
        assert contrast(ink, paper) >= 4.5


def contrast(*colours):
    """Return the contrast ratio of two CSS colours ``rgb(r, g, b)`` (WCAG 2)."""
    bright, dim = sorted((luminance(colour) for colour in colours), reverse=True)
    return (bright + 0.05) / (dim + 0.05)


def luminance(colour):
    channels = np.array([int(part) for part in colour[4:-1].split(",")[:3]]) / 255
    linear = np.where(channels <= 0.04045, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4)
    return linear @ (0.2126, 0.7152, 0.0722)
