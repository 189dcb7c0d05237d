"""The page in a real Chromium: from a picture to a scene that turns, and a training that is watched and stopped.

Skipped where there is no Chromium or no playwright. With MIDILITE_SCREENSHOTS=FOLDER the scenes are made by the shipped
model instead of the golden one, in its own number of steps, and the pages are pictured there.
"""

import re
import shutil
import time

import numpy as np
import pytest
import trimesh
from benchmarks.studio_journey import places, travel
from browsing import LONG, PICTURES, address, mark_objects, picture, pixels, say, seg
from PIL import Image

from midilite.commands.infer import EXAMPLE
from midilite.mesh.scene import build_scene
from midilite.render.scene_page import scene_page
from midilite.training.checkpoint import list_checkpoints

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")


def trained(forks, flags, studio, tmp_path) -> None:
    run = studio.start / "run"
    assert forks.run_group("train", tmp_path / "log", 1, arguments=flags(run, "--max_train_steps", 1)) == [0]


def choose_model(page) -> None:
    page.click("#tab-scene")
    if not PICTURES:  # which show the shipped model, sampled as it is unless asked otherwise
        page.select_option("#model", "model")


def test_from_a_picture_to_scenes_that_turn_and_a_file(page, studio, forks, flags, tmp_path):
    trained(forks, flags, studio, tmp_path)
    page.goto(address(studio))
    mark_objects(page)
    picture(page, "picture")
    choose_model(page)
    page.click("#tab-picture")
    page.fill("#objects li:nth-child(1) input", "table")
    page.click("#make")
    rows = page.locator("#stage .objects li")
    rows.first.wait_for()
    count = rows.count()
    assert count >= 1
    before = pixels(page, "#stage canvas")
    frame = page.locator("#stage canvas").bounding_box()
    page.mouse.move(frame["x"] + 200, frame["y"] + 200)
    page.mouse.down()
    page.mouse.move(frame["x"] + 330, frame["y"] + 180, steps=5)
    page.mouse.up()
    turned = pixels(page, "#stage canvas")
    assert np.abs(turned - before).mean() > 0.5, "it turns"
    picture(page, "scene")
    rows.first.locator("input").uncheck()
    page.mouse.move(5, 5)
    hidden = pixels(page, "#stage canvas")
    assert np.abs(hidden - turned).mean() > 0.1, "one object is hidden"
    page.click("text=Wireframe")
    assert np.abs(pixels(page, "#stage canvas") - hidden).mean() > 0.05
    with page.expect_download() as waiting:
        page.click("#get")
    waiting.value.save_as(tmp_path / "scene.glb")
    assert len(trimesh.load(tmp_path / "scene.glb").geometry) == count
    if not PICTURES:  # the shipped model does not fit the golden one's adapter
        page.select_option("#adapter", "run/lora-final")
    page.select_option("#beside", "base" if not PICTURES else "seed")
    page.click("#wish button.main")
    playwright.expect(page.locator("#stage canvas")).to_have_count(2, timeout=LONG)
    titles = page.locator("#stage figcaption").all_inner_texts()
    assert len(set(titles)) == 2 and ("run/lora-final 1" in titles[1] or PICTURES)
    first = pixels(page, "#stage figure:nth-child(1) canvas")
    page.locator("#stage figure:nth-child(2) canvas").focus()
    page.keyboard.press("ArrowLeft")
    page.keyboard.press("ArrowLeft")
    assert np.abs(pixels(page, "#stage figure:nth-child(1) canvas") - first).mean() > 0.1, "both have one camera"
    picture(page, "compare")
    assert page.locator("#results li").count() == 3


def test_a_photograph_becomes_a_scene_in_less_than_a_minute_of_a_person(page, studio, tmp_path):
    """By the estimate of the script that says what the actions are."""
    shutil.copy(EXAMPLE / "rgb.png", tmp_path / "holiday.png")
    page.goto(address(studio))
    journey = travel(page, tmp_path / "holiday.png", places(seg()), "model")
    assert [row["action"].partition(" ")[0] for row in journey.rows] == [
        "choose", "click", "click", "click", "choose", "Make", "drag",
    ]  # fmt: skip
    assert journey.sums()["clicks"] == 11 and 20 < journey.sums()["person"] < 60


def test_undo_tools_and_a_mask_that_is_there(page, studio):
    page.goto(address(studio))
    mark_objects(page)
    page.keyboard.press("Control+z")
    assert page.locator("#objects li").count() == 2
    page.click("#open")
    playwright.expect(page.locator("#objects li")).to_have_count(3)
    page.locator("#objects li").nth(0).get_by_text("edit").click()
    page.click("[data-tool=box]")
    frame = page.locator("#canvas").bounding_box()
    page.mouse.move(frame["x"] + frame["width"] / 2 - 100, frame["y"] + 20)
    page.mouse.down()
    page.mouse.move(frame["x"] + frame["width"] / 2 + 100, frame["y"] + 120)
    page.mouse.up()
    before = np.asarray(Image.open(studio.start / "seg.png"))
    page.click("#savemask")
    say(page, "saved as seg.png")
    after = Image.open(studio.start / "seg.png")
    assert after.mode == "P" and (np.asarray(after) == 1).sum() > (before == 1).sum() + 1000
    assert (np.asarray(after) == 3).sum() == (before == 3).sum()


def test_a_live_training_is_watched_saved_and_stopped(page, studio, forks, flags, tmp_path):
    run = studio.start / "live"
    more = ["--max_train_steps", 1000, "--preview_every", 0]
    pid = forks.start("train_slowly", tmp_path / "log", arguments=flags(run, *more), seconds=0.3)
    end = time.monotonic() + 60
    while not (run / "metrics.jsonl").exists():
        assert time.monotonic() < end
        time.sleep(0.05)
    page.goto(address(studio, "/#runs"))
    state = page.locator("#runstate")
    playwright.expect(state).to_contain_text("running", timeout=LONG)
    first = int(re.search(r"step (\d+)", state.inner_text())[1])
    playwright.expect(state).not_to_contain_text(f"step {first},", timeout=LONG)
    assert page.locator(".chart").count() >= 3
    page.wait_for_timeout(15_000 if PICTURES else 0)
    picture(page, "runs")
    page.click("#savenow")
    playwright.expect(state).to_contain_text("saved: checkpoint-", timeout=LONG)
    page.click("#stopnow")
    assert forks.wait(pid, timeout=60) == 0
    playwright.expect(state).to_contain_text("ended", timeout=LONG)
    assert len(list_checkpoints(run)) >= 1 and page.locator("#stopnow").is_disabled()


def test_a_page_of_one_file_turns_without_a_server(page, tmp_path):
    scene = build_scene([trimesh.creation.box((1, 0.4, 0.6)), trimesh.creation.icosphere(2, 0.3)], [1, 2])
    points = [mesh.sample(2000, seed=0) for mesh in scene.geometry.values()]
    shown = {"input": Image.new("RGB", (40, 30)), "here": scene, "none": build_scene([None], [1]), "truth": points}
    (tmp_path / "scene.html").write_bytes(scene_page(shown))
    page.route("**/*", lambda route: route.continue_() if route.request.url.startswith("file:") else route.abort())
    page.goto(f"file://{tmp_path}/scene.html")
    assert page.locator(".objects li").count() == 2 and page.locator("figure img").count() == 1
    picture(page, "comparison")
    panes = {name: f'canvas[aria-label^="{name}:"]' for name in ("here", "none", "truth")}
    before = {name: pixels(page, pane) for name, pane in panes.items()}
    colors = {name: len({tuple(c) for c in seen.reshape(-1, 3)[::7]}) for name, seen in before.items()}
    assert colors["here"] > 50 and colors["truth"] > colors["none"], "something is drawn"
    page.locator(panes["none"]).focus()
    page.keyboard.press("ArrowRight")
    for name, pane in panes.items():
        assert np.abs(pixels(page, pane) - before[name]).mean() > 0.2, f"{name} turns with the others"
    turned = pixels(page, panes["truth"])
    page.get_by_role("checkbox").first.uncheck()
    assert np.abs(pixels(page, panes["truth"]) - turned).mean() > 0.1, "an object is hidden everywhere"


def test_pages_of_other_sites_cannot_ask(page, studio, tmp_path):
    (tmp_path / "evil.html").write_text("<p>elsewhere</p>")
    page.goto(f"file://{tmp_path}/evil.html")
    ask = (
        "url => fetch(url, {method: 'POST', headers: {'X-Studio': '1'}, body: '{}'}).then(() => 'read', () => 'failed')"
    )
    assert page.evaluate(ask, address(studio, "/api/job")) == "failed"
    plain = "url => fetch(url, {mode: 'no-cors'}).then(() => 'sent', () => 'failed')"
    page.evaluate(plain, address(studio, "/api/home"))
    assert not studio.server.studio.jobs.jobs
