"""Pages as people see them: in a headless Chromium, that of the system, driven by Playwright.

Playwright fetches no browser here. As long as Chromium runs, the thread that started it counts as one inside
an event loop: what starts a loop of its own there, such as a server, must start before.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from playwright.sync_api import Browser, ConsoleMessage, Page, Route, sync_playwright

__all__ = ["PHONE", "SCREEN", "chromium", "cut_texts", "overlapping_texts", "too_wide", "watched"]

NAMES = ("chromium", "chromium-browser", "google-chrome")
SCREEN, PHONE = (1280, 800), (390, 844)
SECONDS = 20
# Pixels by which boxes of letters may touch: they are higher than the letters in them.
TOUCH = 1.0

# What is hidden on purpose has no box. Boxes that scroll by themselves hold what is in them.
TOO_WIDE = """() => {
  const scrolls = box => box && (/auto|scroll|hidden/.test(getComputedStyle(box).overflowX)
    || scrolls(box.parentElement))
  const wide = document.documentElement.clientWidth
  const outside = [...document.body.querySelectorAll('*')].filter(box => {
    const {left, right, width} = box.getBoundingClientRect()
    return width && (left < -1 || right > wide + 1) && !scrolls(box.parentElement)
  })
  const told = outside.map(box => `${box.tagName} ${box.textContent.trim().slice(0, 60)}`)
  const whole = document.documentElement.scrollWidth
  return whole > wide ? [...told, `the page: ${whole} of ${wide}`] : told
}"""
TEXTS = """svg => {
  const boxed = box => { const {left, right, top, bottom} = box.getBoundingClientRect()
    return {left, right, top, bottom} }
  return [boxed(svg), [...svg.querySelectorAll('text')].map(text => [text.textContent, boxed(text)])]
}"""


@contextmanager
def chromium() -> Iterator[Browser]:
    """A headless Chromium; where there is none, the test is skipped."""
    found = next(filter(None, map(shutil.which, NAMES)), None)
    if found is None:
        pytest.skip(f"there is none of {', '.join(NAMES)} here: apt-get install chromium")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=found)
        try:
            yield browser
        finally:
            browser.close()


class Watched:
    """A page whose requests and errors are kept. What is not asked of `origin` is refused.

    Args:
        origin: what the addresses begin with that the page may ask.
        size: of the window, in pixels.
    """

    def __init__(self, browser: Browser, origin: str, size: tuple[int, int]) -> None:
        self.requests: list[str] = []
        """The addresses that were asked for, also those that were refused."""
        self.errors: list[str] = []
        """What the console calls an error, and exceptions that nothing caught."""
        self._origin = origin
        wide, high = size
        self.context = browser.new_context(viewport={"width": wide, "height": high})
        self.context.set_default_timeout(1000 * SECONDS)
        self.context.route("**/*", self._let_through)
        self.page: Page = self.context.new_page()
        self.page.on("console", self._hear)
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))

    def _let_through(self, route: Route) -> None:
        self.requests.append(route.request.url)
        if route.request.url.startswith(self._origin):
            route.continue_()
        else:
            route.abort()

    def _hear(self, message: ConsoleMessage) -> None:
        if message.type == "error":
            self.errors.append(message.text)


@contextmanager
def watched(
    browser: Browser, url: str, size: tuple[int, int] = SCREEN, origin: str = ""
) -> Iterator[Watched]:
    """A page that has loaded `url`.

    Args:
        origin: see `Watched`; the address alone where it is empty.
    """
    seen = Watched(browser, origin or url, size)
    try:
        seen.page.goto(url)
        yield seen
    finally:
        seen.context.close()


def too_wide(page: Page) -> list[str]:
    """What reaches beyond the window sideways, so that a reader has to scroll the page."""
    told: list[str] = page.evaluate(TOO_WIDE)
    return told


def overlapping_texts(page: Page) -> list[tuple[str, str]]:
    """Pairs of texts of one chart that are drawn over each other."""
    return [
        (one, other)
        for _, texts in _charts(page)
        for number, (one, box) in enumerate(texts)
        for other, beside in texts[:number]
        if _shared(box, beside, "left", "right") > TOUCH and _shared(box, beside, "top", "bottom") > TOUCH
    ]


def cut_texts(page: Page) -> list[str]:
    """Texts that reach beyond the chart that they belong to."""
    return [
        text
        for chart, texts in _charts(page)
        for text, box in texts
        if box["left"] < chart["left"] - TOUCH
        or box["right"] > chart["right"] + TOUCH
        or box["top"] < chart["top"] - TOUCH
        or box["bottom"] > chart["bottom"] + TOUCH
    ]


def _charts(page: Page) -> list[tuple[dict[str, float], list[tuple[str, dict[str, float]]]]]:
    """The box of each chart, with its texts and theirs."""
    told: Any = [chart.evaluate(TEXTS) for chart in page.locator("svg").all()]
    return told


def _shared(box: dict[str, float], other: dict[str, float], low: str, high: str) -> float:
    return min(box[high], other[high]) - max(box[low], other[low])
