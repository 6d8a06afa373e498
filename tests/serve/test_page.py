"""The page in a real browser: search, classify and map by mouse and keys, wide and narrow; nothing fails, and nobody else is asked."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, Page, expect, sync_playwright

from serve.run import Server
from tests.serve.test_endpoints import picture

WIDE, NARROW = {"width": 1280, "height": 900}, {"width": 390, "height": 844}
VIEWS = ("search", "classify", "map", "model")


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """
    Skips where there is none.
    """
    names = ("chromium", "chromium-browser", "google-chrome")
    found = next((path for name in names if (path := shutil.which(name))), None)
    if found is None:
        pytest.skip("no Chromium on this machine: .ci/debian-packages installs one on Debian")
    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=found, args=["--no-sandbox"])
        yield started
        started.close()


@pytest.fixture
def page(browser: Browser, server: Server) -> Iterator[Page]:
    """
    Fails on what the page's console or network shows to be wrong.
    """
    context = browser.new_context(viewport=WIDE, base_url=server.url)
    wrong, asked = list[str](), set[str]()
    opened = context.new_page()
    opened.on("console", lambda message: wrong.append(message.text) if message.type in ("error", "warning") else None)
    opened.on("pageerror", lambda error: wrong.append(str(error)))
    opened.on("request", lambda request: asked.add(request.url))
    opened.set_default_timeout(20_000)
    yield opened
    context.close()
    assert wrong == []
    assert {url for url in asked if not url.startswith((server.url, "data:", "blob:"))} == set()


def shot(page: Page, name: str) -> None:
    """For a person to look at, where MM_SCREENSHOTS names a folder."""
    if folder := os.environ.get("MM_SCREENSHOTS"):
        page.screenshot(path=f"{folder}/{name}.png", full_page=True)


def until(page: Page, condition: str) -> None:
    """The page's own rules forbid that it evaluates strings, which Playwright's waiting does at each look but the first."""
    end = time.monotonic() + 120
    while not page.evaluate(condition):
        assert time.monotonic() < end, condition
        page.wait_for_timeout(50)


def search(page: Page, words: str) -> None:
    page.goto("/")
    page.get_by_label("Words", exact=False).first.fill(words)
    page.keyboard.press("Enter")
    expect(page.locator("#gallery img")).to_have_count(24)


def test_words_find_pictures_and_pictures_find_pictures(page: Page) -> None:
    search(page, "a red circle")
    assert page.title() == "mm: tiny"
    until(page, "[...document.images].filter(i => i.closest('#gallery')).slice(0, 6).every(i => i.complete && i.naturalWidth)")
    scores = [float(text) for text in page.locator("#gallery .score").all_inner_texts()]
    assert scores == sorted(scores, reverse=True)
    shot(page, "search-wide")
    page.get_by_role("button", name="More results").click()
    expect(page.locator("#gallery img")).to_have_count(48)
    page.locator("#gallery a").nth(2).click()
    expect(page.locator("#gallery img")).to_have_count(24)
    assert page.locator("#gallery .score").first.inner_text() == "1.000"
    page.get_by_label("Find").select_option("texts")
    page.get_by_role("button", name="Search", exact=True).click()
    expect(page.locator("#status")).to_contain_text("24 results")


def test_a_dropped_picture_is_searched_with_words_and_a_filter(page: Page) -> None:
    page.goto("/#search")
    make = "bytes => { const all = new DataTransfer(); all.items.add(new File([Uint8Array.from(bytes)], 'a.jpg')); return all }"
    expect(page.locator("#view-search")).to_be_visible()
    page.dispatch_event("#h-search", "drop", {"dataTransfer": page.evaluate_handle(make, list(picture(1)))})
    expect(page.locator("#search-picture")).to_be_visible()
    expect(page.locator("#weight")).to_be_visible()
    page.locator("#words").fill("star")
    page.locator("summary", has_text="Filter").click()
    page.locator("#filter-field").select_option("width")
    page.locator("#filter-op").select_option(">")
    page.locator("#filter-value").fill("10000")
    page.get_by_role("button", name="Search", exact=True).click()
    expect(page.locator("#status")).to_have_text("Nothing is found.")
    page.get_by_role("button", name="Remove the picture").click()
    expect(page.locator("#search-picture")).to_be_hidden()
    page.locator("#words").fill("")
    page.get_by_role("button", name="Search", exact=True).click()
    expect(page.locator("#status")).to_have_class("bad")


def test_keys_alone_are_enough(page: Page) -> None:
    page.goto("/#model")
    page.locator("#cards table").first.wait_for()
    page.keyboard.press("/")
    expect(page.locator("#words")).to_be_focused()
    page.keyboard.type("a star")
    page.keyboard.press("Enter")
    expect(page.locator("#gallery img")).to_have_count(24)
    page.locator("#gallery a").first.focus()
    page.keyboard.press("ArrowRight")
    expect(page.locator("#gallery a").nth(1)).to_be_focused()
    page.keyboard.press("End")
    expect(page.locator("#gallery a").last).to_be_focused()
    page.keyboard.press("Enter")
    until(page, "location.hash.startsWith('#search/')")
    expect(page.locator("#gallery .score").first).to_have_text("1.000")


def test_a_picture_is_classified_with_bars(page: Page, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(picture(2, "PNG"))
    page.goto("/#classify")
    page.locator("#labels").fill("red circle\nblue square\nstar")
    page.locator("#classify-file").set_input_files(tmp_path / "a.png")
    expect(page.locator("#bars li")).to_have_count(3)
    shares = [float(text.removesuffix(" %")) for text in page.locator("#bars .score").all_inner_texts()]
    assert sum(shares) == pytest.approx(100, abs=0.2)
    assert shares == sorted(shares, reverse=True)
    widths = page.locator("#bars .bar").evaluate_all("bars => bars.map(bar => bar.getBoundingClientRect().width)")
    assert widths == sorted(widths, reverse=True)
    shot(page, "classify-wide")
    page.locator("#label-set").select_option("shapes")
    page.get_by_role("button", name="Classify").click()
    expect(page.locator("#status")).to_contain_text("%")


def test_the_map_is_walked_with_keys_and_mouse(page: Page) -> None:
    page.goto("/#map")
    canvas = page.locator("#canvas[data-points]")
    canvas.focus()
    page.keyboard.press("ArrowRight")
    expect(page.locator("#map-card")).to_be_visible()
    first = page.locator("#map-picture").get_attribute("src")
    moved = False
    for key in ("ArrowRight", "ArrowDown", "ArrowLeft", "ArrowUp"):
        page.keyboard.press(key)
        moved = moved or page.locator("#map-picture").get_attribute("src") != first
    assert moved
    page.get_by_role("button", name="Zoom in").click()
    until(page, "document.querySelector('#map-picture').naturalWidth > 0")
    shot(page, "map-wide")
    canvas.focus()
    page.keyboard.press("+")
    page.keyboard.press("Enter")
    expect(page.locator("#gallery .score").first).to_have_text("1.000")


@pytest.mark.parametrize(("size", "scheme"), [(WIDE, "light"), (NARROW, "dark")], ids=["wide and light", "narrow and dark"])
def test_every_view_fits_and_is_accessible(page: Page, size: dict[str, int], scheme: str) -> None:
    page.set_viewport_size(size)  # type: ignore[arg-type]
    page.emulate_media(color_scheme=scheme)  # type: ignore[arg-type]
    search(page, "a star")
    for view in VIEWS:
        page.evaluate("view => { location.hash = view }", view)
        expect(page.locator(f"#view-{view}")).to_be_visible()
        shot(page, f"{view}-{size['width']}-{scheme}")
        found = page.evaluate("[document.documentElement.scrollWidth, document.documentElement.clientWidth]")
        assert found[0] <= found[1], f"{view} is wider than {size['width']}"
        results = Axe().run(page, options={"runOnly": ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa"]})
        assert results.violations_count == 0, results.generate_report()


def test_what_is_refused_is_said(page: Page, tmp_path: Path) -> None:
    page.goto("/#classify")
    page.get_by_role("button", name="Classify").click()
    expect(page.locator("#status")).to_have_text("Choose a picture first.")
