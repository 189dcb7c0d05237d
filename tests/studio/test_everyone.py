"""The page for everyone: a tablet and fingers, names and order for keyboards and screen readers, contrast.

In Chromium; the limits are those of WCAG 2.2: contrast 1.4.3 and 1.4.11, focus order 2.4.3, targets 2.5.8, names 4.1.2.
"""

import re

import numpy as np
import pytest
from browsing import address, mark_objects, pixels

from midilite.mesh.glb import linear_light

TABS = ("picture", "scene", "runs", "data")
TABLET = pytest.mark.parametrize(
    "page", [{"viewport": {"width": 1024, "height": 768}, "has_touch": True}], indirect=True, ids=["tablet"]
)
SEEN = """
[...document.querySelectorAll("button, input, select, canvas, [tabindex]")].filter((one) => one.checkVisibility())"""
NAMELESS = f"""{SEEN}
  .filter((one) => ![one.ariaLabel, one.labels?.[0]?.innerText, one.innerText].some((text) => text?.trim()))
  .map((one) => one.outerHTML)"""
SMALL = f"""{SEEN}
  .map((one) => [one, (one.type === "checkbox" ? one.closest("label") : one).getBoundingClientRect()])
  .filter(([one, box]) => box.height < 24 || box.width < 24 || box.left < 0 || box.right > innerWidth)
  .map(([one, box]) => [one.outerHTML, box.width, box.height, box.right])"""
REACHED = f"""{SEEN}
  .filter((one) => !one.disabled && one.tabIndex >= 0)
  .map((one) => [...document.querySelectorAll("*")].indexOf(one))"""
ORDER = "[...document.querySelectorAll('*')].indexOf(document.activeElement)"
COLORS = """
[...document.querySelectorAll("body *")].filter((one) => one.checkVisibility() && !one.disabled).map((one) => {
  const style = getComputedStyle(one), behind = [];
  for (let host = one; host; host = host.parentElement) behind.push(getComputedStyle(host).backgroundColor);
  return {
    what: one.outerHTML.slice(0, 90), color: style.color, edge: style.borderColor, behind,
    has_words: one.matches("input, select") || [...one.childNodes].some((node) => node.data?.trim()),
    has_edge: one.matches("button, input, select") && style.borderStyle !== "none" && !one.matches("[type=range]"),
  };
})"""


def light(color: str) -> float:
    """The relative luminance of a CSS colour rgb(..)."""
    red, green, blue = linear_light(np.array([float(part) for part in re.findall(r"[\d.]+", color)[:3]]) / 255)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def contrast(one: str, two: str) -> float:
    darker, lighter = sorted((light(one), light(two)))
    return (lighter + 0.05) / (darker + 0.05)


def first_opaque(colors: list[str]) -> str:
    """The background that is seen; colours that are half transparent are not used for one."""
    return next((color for color in colors if not color.endswith(", 0)")), "rgb(255, 255, 255)")


def open_filled(page, studio, press=None) -> None:
    """The page with three objects, so that lists have rows."""
    page.goto(address(studio))
    mark_objects(page, press)


def test_every_control_has_a_name_and_the_keyboard_reaches_all_in_the_order_of_the_page(page, studio):
    open_filled(page, studio)
    for tab in TABS:
        page.click(f"#tab-{tab}")
        assert page.evaluate(NAMELESS) == [], tab
        expected = page.evaluate(REACHED)
        page.evaluate("document.activeElement.blur()")
        page.locator("h1").click()
        visited = []
        for _ in range(len(expected)):
            page.keyboard.press("Tab")
            visited.append(page.evaluate(ORDER))
            outline = page.evaluate("parseFloat(getComputedStyle(document.activeElement).outlineWidth)")
            assert outline >= 2, (tab, page.evaluate("document.activeElement.outerHTML"))
        assert visited == expected == sorted(expected), tab


def test_tabs_turn_by_arrow_keys_and_say_which_is_open(page, studio):
    page.goto(address(studio))
    page.locator("#tab-picture").focus()
    page.keyboard.press("ArrowRight")
    assert page.evaluate("document.activeElement.id") == "tab-scene" and page.locator("#scene").is_visible()
    assert page.locator("[role=tab][aria-selected=true]").all_inner_texts() == ["2 Scene"]
    assert page.locator("[role=tabpanel]:visible").get_attribute("aria-labelledby") == "tab-scene"


def test_words_and_edges_stand_out(page, studio):
    open_filled(page, studio)
    for tab in TABS:
        page.click(f"#tab-{tab}")
        page.evaluate("document.getElementById('message').classList.add('bad')")
        found = page.evaluate(COLORS)
        words = {one["what"]: contrast(one["color"], first_opaque(one["behind"])) for one in found if one["has_words"]}
        assert len(words) > 8 and {what: ratio for what, ratio in words.items() if ratio < 4.5} == {}, tab
        for one in [one for one in found if one["has_edge"]]:
            own, outside = first_opaque(one["behind"]), first_opaque(one["behind"][1:])
            assert max(contrast(one["edge"], outside), contrast(own, outside)) >= 3, (tab, one["what"])


@TABLET
def test_a_finger_marks_makes_and_turns_on_a_tablet(page, studio):
    open_filled(page, studio, page.touchscreen.tap)
    for tab in TABS:
        page.locator(f"#tab-{tab}").tap()
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), tab
        found = page.evaluate(SMALL)
        assert found == [], (tab, found)
    page.locator("#tab-scene").tap()
    page.select_option("#model", "model")
    page.locator("#tab-picture").tap()
    page.locator("#make").tap()
    page.locator("#stage .objects li").first.wait_for()
    before, frame = pixels(page, "#stage canvas"), page.locator("#stage canvas").bounding_box()
    assert frame["width"] > 300 and frame["height"] > 300
    fingers = page.context.new_cdp_session(page)

    def touch(kind: str, *points: tuple[float, float]) -> None:
        spots = [{"x": frame["x"] + x, "y": frame["y"] + y, "id": i} for i, (x, y) in enumerate(points)]
        fingers.send("Input.dispatchTouchEvent", {"type": kind, "touchPoints": spots})

    touch("touchStart", (100, 200))
    touch("touchMove", (160, 210))
    touch("touchEnd")
    turned = pixels(page, "#stage canvas")
    assert np.abs(turned - before).mean() > 0.5, "one finger turns"
    touch("touchStart", (100, 200), (200, 200))
    touch("touchMove", (60, 200), (260, 200))
    touch("touchEnd")
    assert np.abs(pixels(page, "#stage canvas") - turned).mean() > 0.5, "two fingers come nearer"
