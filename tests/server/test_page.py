"""The page, in a real browser: drawing, cancelling, painting, the gallery, a phone."""

import re
import shutil

import numpy as np
import pytest
from PIL import Image

from latentgen import metadata

sync_api = pytest.importorskip("playwright.sync_api")
BROWSER = shutil.which("chromium") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(BROWSER is None, reason="there is no Chromium here")
TIMEOUT = 30_000


@pytest.fixture(scope="module")
def browser():
    with sync_api.sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        yield chromium
        chromium.close()


@pytest.fixture
def page(browser, server):
    """The page, which must ask nobody else for anything and log no errors."""
    page = browser.new_page(viewport={"width": 1200, "height": 900})
    page.set_default_timeout(TIMEOUT)
    strangers, errors = [], []
    page.on("request", lambda asked: strangers.append(asked.url))
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.goto(server.url)
    page.wait_for_selector("#draw-button")
    yield page
    own = (server.url, "data:", "blob:")
    assert [url for url in strangers if not url.startswith(own)] == []
    assert errors == []
    page.close()


def open_settings(page):
    page.get_by_role("button", name="Settings", exact=False).first.click()


def draw(page, server, prompt: str = "a cat") -> dict:
    """Draw; the job that it was."""
    before = newest(server)
    page.fill("#prompt textarea", prompt)
    page.click("#draw-button")
    while newest(server) == before:
        page.wait_for_timeout(50)
    job = server.ended(newest(server)["id"])
    page.wait_for_selector(f"#told:has-text('seed {job['seeds'][0]}')")
    return job


def newest(server) -> dict | None:
    return next(iter(server.http.get("/jobs?limit=1").json()["jobs"]), None)


def test_a_picture_is_drawn_and_the_same_seed_draws_it_again(page, server):
    first = draw(page, server)
    assert page.locator("#results img").count() >= 1
    page.click("#again-button")
    sync_api.expect(page.get_by_label("Seed", exact=True)).to_have_value(str(first["seeds"][0]))
    second = draw(page, server)
    one, other = (server.http.get(job["images"][0]["url"]).content for job in (first, second))
    assert one == other


def test_a_model_brings_its_own_settings(page, server, tiny):
    shutil.copytree(tiny, server.home / "models" / "later")
    page.reload()
    open_settings(page)

    def choose(name):
        page.get_by_label("Model", exact=True).click()
        page.get_by_role("option", name=name, exact=True).click()

    def told(label, value):
        field = page.get_by_label(label, exact=True).first
        sync_api.expect(field).to_have_value(str(value), timeout=TIMEOUT)

    choose("latentgen-icons-128")
    told("Width", 128)
    request = draw(page, server)["request"]
    asked = {"num_inference_steps": 20, "guidance_scale": 2, "height": 128, "scheduler": "ddim"}
    assert request | asked == request
    choose("later")
    told("Width", 32)
    assert draw(page, server)["model"] == "later"
    shutil.rmtree(server.home / "models" / "later")


def test_progress_is_told_and_cancelling_stops_it(page, server):
    open_settings(page)
    for name in ("Width", "Height"):
        page.get_by_label(name, exact=True).fill("1024")
    page.fill("#prompt textarea", "a long one")
    page.keyboard.press("Tab")
    page.click("#draw-button")
    told = sync_api.expect(page.locator("#told"))
    told.to_have_text(re.compile(r"Step \d+ of 50"), timeout=TIMEOUT)
    page.click("#cancel-button")
    page.wait_for_selector("#told:has-text('Cancelled')")
    assert newest(server)["status"] == "cancelled"
    sync_api.expect(page.locator("#draw-button")).to_be_enabled()


def test_only_what_was_painted_on_changes(page, server, tmp_path):
    grey = Image.new("RGB", (128, 128), "grey")
    grey.save(tmp_path / "grey.png")
    page.get_by_text("Start from a picture").click()
    page.wait_for_timeout(1500)  # the editor sets itself up
    page.locator("#editor input[type=file]").first.set_input_files(tmp_path / "grey.png")
    canvas = page.locator("#editor canvas").first
    canvas.wait_for()
    page.wait_for_timeout(1500)
    canvas.scroll_into_view_if_needed()
    box = canvas.bounding_box()
    x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    page.mouse.move(x - 15, y)
    page.mouse.down()
    page.mouse.move(x + 15, y, steps=8)
    page.mouse.up()
    page.wait_for_timeout(1000)
    job = draw(page, server)
    assert job["request"]["strength"] == 0.8
    drawn = Image.open(server.home / "outputs" / job["images"][0]["url"].removeprefix("/images/"))
    changed = (np.asarray(drawn.convert("RGB")) != 128).any(-1)
    assert drawn.size == (128, 128)
    assert 0 < changed.mean() < 0.5


def test_a_mask_may_be_a_picture_too(page, server, tmp_path):
    Image.new("RGB", (32, 32), "grey").save(tmp_path / "grey.png")
    mask = Image.new("L", (32, 32))
    mask.paste(255, (0, 0, 16, 32))
    mask.save(tmp_path / "mask.png")
    page.get_by_text("Start from a picture").click()
    page.wait_for_timeout(1500)
    page.locator("#editor input[type=file]").first.set_input_files(tmp_path / "grey.png")
    page.locator("#mask input[type=file]").set_input_files(tmp_path / "mask.png")
    page.locator("#mask img").wait_for()
    page.wait_for_timeout(1500)
    job = draw(page, server)
    drawn = Image.open(server.home / "outputs" / job["images"][0]["url"].removeprefix("/images/"))
    changed = (np.asarray(drawn.convert("RGB")) != 128).any(-1)
    assert changed[:, :12].any()
    assert not changed[:, 16:].any()


def test_the_gallery_has_all_that_was_made(page, server):
    folder = server.home / "outputs" / "2026-01-01"
    folder.mkdir(parents=True, exist_ok=True)
    for k in range(70):
        name = f"00000000-0000-4000-8000-{k:012d}-1.png"
        Image.new("RGB", (8, 8), "red").save(folder / name)
    page.get_by_role("tab", name="Gallery").click()
    shown = page.locator("#gallery .thumbnail-item")
    sync_api.expect(shown).to_have_count(60)
    page.click("#more-button")
    page.wait_for_function("document.querySelectorAll('#gallery .thumbnail-item').length >= 70")
    shutil.rmtree(folder)


def test_the_gallery_gives_settings_back_and_deletes(page, server):
    job = draw(page, server, "something to find again")
    page.get_by_role("tab", name="Gallery").click()
    page.locator("#gallery img").first.click()
    facts = page.get_by_label("Its settings").first
    sync_api.expect(facts).to_have_value(re.compile("something to find again"))
    page.click("#use-button")
    page.get_by_role("tab", name="Draw").click()
    sync_api.expect(page.locator("#prompt textarea")).to_have_value("something to find again")
    sync_api.expect(page.get_by_label("Seed", exact=True)).to_have_value(str(job["seeds"][0]))
    page.get_by_role("tab", name="Gallery").click()
    page.get_by_role("button", name="Delete").click()
    sync_api.expect(facts).to_have_value("")
    assert server.http.get(f"/jobs/{job['id']}").status_code == 404
    assert server.http.get(job["images"][0]["url"]).status_code == 404


def test_a_dropped_picture_fills_the_form(page, server, tmp_path):
    text = "a dropped one\nNegative prompt: red\nSteps: 7, Sampler: Euler a, CFG scale: 4, Seed: 5"
    data = metadata.encode(Image.new("RGB", (32, 32)), "PNG", text + ", Size: 40x32", None, 95)
    (tmp_path / "dropped.png").write_bytes(data)
    page.get_by_role("tab", name="Settings of a picture").click()
    page.locator("#dropped input[type=file]").set_input_files(tmp_path / "dropped.png")
    page.get_by_role("button", name="Use these settings").last.click()
    page.get_by_role("tab", name="Draw").click()
    sync_api.expect(page.locator("#prompt textarea")).to_have_value("a dropped one")
    request = draw(page, server, "a dropped one")["request"]
    assert (request["num_inference_steps"], request["guidance_scale"]) == (7, 4)
    assert (request["seed"], request["width"], request["height"]) == (5, 40, 32)
    assert (request["scheduler"], request["negative_prompt"]) == ("euler_a", ["red"])


def test_settings_between_the_marks_of_a_slider_survive_the_browser(page, server):
    odd = {"scheduler": "ddim", "guidance_scale": 7.53, "eta": 0.123, "guidance_rescale": 0.7}
    first = server.ended(server.submit(prompt="an odd one", seed=2**50 + 1, **odd))
    page.get_by_role("tab", name="Gallery").click()
    page.locator("#gallery img").first.click()
    page.click("#use-button")
    page.get_by_role("tab", name="Draw").click()
    sync_api.expect(page.locator("#prompt textarea")).to_have_value("an odd one")
    second = draw(page, server, "an odd one")
    assert second["request"] == first["request"]
    one, other = (server.http.get(job["images"][0]["url"]).content for job in (first, second))
    assert one == other


def test_pictures_are_shown_and_saved_from_where_they_are(page, server):
    job = draw(page, server)
    shown = page.locator(f"#results img[src$='{job['images'][0]['url']}']").first
    page.wait_for_function("document.querySelector('#results img').naturalWidth == 32")
    shown.click()
    with page.expect_download() as saved:
        page.locator("#results [aria-label='Download']").first.click()
    data = server.http.get(job["images"][0]["url"]).content
    assert saved.value.path().read_bytes() == data
    assert saved.value.suggested_filename == job["images"][0]["url"].rpartition("/")[2]


def test_what_a_picture_tells_is_text(page, tmp_path):
    text = "a cat\nSteps: 7, Sampler: Euler a, CFG scale: 4, Seed: 5, Clip skip: <b id=evil>2</b>"
    data = metadata.encode(Image.new("RGB", (32, 32)), "PNG", text, None, 95)
    (tmp_path / "dropped.png").write_bytes(data)
    page.get_by_role("tab", name="Settings of a picture").click()
    page.locator("#dropped input[type=file]").set_input_files(tmp_path / "dropped.png")
    page.get_by_role("button", name="Use these settings").last.click()
    page.get_by_text("Clip skip: <b id=evil>2</b>").wait_for()
    assert page.locator("#evil").count() == 0
    page.get_by_role("tab", name="Draw").click()
    page.fill("#prompt textarea", "a <lora:<b id=evil>:1>")
    page.click("#draw-button")
    page.get_by_text("'<lora:<b id=evil>:1>': its > is missing").wait_for()
    assert page.locator("#evil").count() == 0


def test_wrong_input_is_told_in_a_sentence(page):
    page.click("#draw-button")
    page.get_by_text("say what to draw").wait_for()
    page.fill("#prompt textarea", "a cat")
    page.get_by_label("Seed", exact=True).fill("seven")
    page.click("#draw-button")
    page.get_by_text("a whole number").wait_for()
    assert "Traceback" not in page.content()


def test_the_keyboard_is_enough(page, server):
    page.locator("#prompt textarea").focus()
    page.keyboard.type("by keyboard")
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    page.wait_for_selector("#told:has-text('Done')")
    assert newest(server)["request"]["prompt"] == ["by keyboard"]


def test_it_fits_a_phone_in_the_dark(browser, server):
    phone = browser.new_page(viewport={"width": 360, "height": 740}, color_scheme="dark")
    phone.set_default_timeout(TIMEOUT)
    phone.goto(server.url)
    phone.wait_for_selector("#draw-button")
    assert phone.evaluate("document.documentElement.scrollWidth") <= 360
    colour = phone.evaluate("getComputedStyle(document.body).backgroundColor")
    assert max(int(part) for part in re.findall(r"\d+", colour)[:3]) < 80
    phone.close()
