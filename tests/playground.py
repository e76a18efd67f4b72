"""The playground as a person uses it, and what is looked at on the page afterwards."""

from __future__ import annotations

import base64
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from playwright.sync_api import Browser, Page, expect

from tests.browser import SCREEN, Watched, watched

__all__ = ["Playground", "cut_words", "low_contrast", "nameless", "opened", "overlaps", "too_small"]

# Rounded corners and outlines may touch.
TOUCH = 1.0

DROP = """([data, names]) => {
  const files = new DataTransfer()
  for (const [place, name] of names.entries()) {
    const bytes = Uint8Array.from(atob(data[place]), letter => letter.charCodeAt(0))
    files.items.add(new File([bytes], name, {type: name.endsWith('.svg') ? 'image/svg+xml'
      : name.endsWith('.txt') ? 'text/plain' : 'image/png'}))
  }
  return files
}"""
# Each box that holds words or takes a press, by itself.
BOXES = """() => {
  const seen = box => box.checkVisibility({opacityProperty: true, visibilityProperty: true})
    && box.getClientRects().length && !box.matches('.unseen, .unseen *')
  const pressed = 'button, select, input, img, label.button'
  const worded = box => [...box.childNodes].some(node => node.nodeType === 3 && node.data.trim())
  const boxes = [...document.body.querySelectorAll('*')].filter(box => seen(box)
    && (box.matches(pressed) || worded(box)) && !box.parentElement.closest('button, label.button, option'))
  return boxes.filter(box => box.tagName !== 'OPTION')
}"""
OVERLAPS = f"""touch => {{
  const boxes = ({BOXES})()
  const told = box => `${{box.tagName}} ${{(box.value ?? box.textContent ?? '').trim().slice(0, 40)}}`
  const pairs = []
  for (const [place, one] of boxes.entries()) for (const other of boxes.slice(place + 1)) {{
    if (one.contains(other) || other.contains(one)) continue
    for (const a of one.getClientRects()) for (const b of other.getClientRects()) {{
      const wide = Math.min(a.right, b.right) - Math.max(a.left, b.left)
      const high = Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top)
      // Lines of one paragraph have boxes that are higher than their letters.
      const inline = [one, other].some(box => getComputedStyle(box).display === 'inline')
      if (wide > touch && high > (inline ? 4 : touch)) pairs.push(`${{told(one)}} | ${{told(other)}}`)
    }}
  }}
  return pairs
}}"""
CUT = f"""() => ({BOXES})()
  .filter(box => !box.matches('input, select, img') && getComputedStyle(box).display !== 'inline'
    && (box.scrollWidth > box.clientWidth + 1 || box.scrollHeight > box.clientHeight + 1))
  .map(box => `${{box.tagName}} ${{box.textContent.trim().slice(0, 40)}}`)"""
# Of the letters against what is painted behind them (WCAG 2.2, 1.4.3).
CONTRAST = f"""() => {{
  const canvas = new OffscreenCanvas(1, 1).getContext('2d', {{willReadFrequently: true}})
  const parsed = colour => {{
    canvas.clearRect(0, 0, 1, 1)
    canvas.fillStyle = colour
    canvas.fillRect(0, 0, 1, 1)
    return [...canvas.getImageData(0, 0, 1, 1).data].map(one => one / 255)
  }}
  const behind = box => {{
    const [r, g, b, a] = parsed(getComputedStyle(box).backgroundColor)
    if (a === 1 || !box.parentElement) return [r, g, b]
    return behind(box.parentElement).map((one, place) => one * (1 - a) + [r, g, b][place] * a)
  }}
  const light = colour => colour.slice(0, 3)
    .map(one => one <= 0.04045 ? one / 12.92 : ((one + 0.055) / 1.055) ** 2.4)
    .reduce((sum, one, place) => sum + one * [0.2126, 0.7152, 0.0722][place], 0)
  return ({BOXES})().filter(box => box.tagName !== 'IMG').flatMap(box => {{
    const style = getComputedStyle(box)
    const [one, other] = [light(parsed(style.color)), light(behind(box))].sort((a, b) => a - b)
    const ratio = (other + 0.05) / (one + 0.05)
    const large = parseFloat(style.fontSize) >= (style.fontWeight >= 700 ? 18.66 : 24)
    const told = `${{ratio.toFixed(2)}}: ${{box.textContent.trim().slice(0, 40)}}`
    return ratio < (large ? 3 : 4.5) ? [told] : []
  }})
}}"""
NAMELESS = """() => [...document.querySelectorAll('button, input, select')]
  .filter(one => one.checkVisibility() && !one.ariaLabel && !one.labels?.length && !one.textContent.trim())
  .map(one => one.outerHTML)"""
# What a finger still meets (WCAG 2.2, 2.5.8).
TOO_SMALL = """() => [...document.querySelectorAll('button, select')].filter(one => {
  const {width, height} = one.getBoundingClientRect()
  return one.checkVisibility() && Math.min(width, height) < 24
}).map(one => one.outerHTML)"""
FOCUS_RING = """() => {
  const ringed = box => box && getComputedStyle(box).outlineStyle !== 'none'
    && parseFloat(getComputedStyle(box).outlineWidth) >= 2
  const focused = document.activeElement
  const box = focused.closest('.drop, .button') ?? focused
  return Boolean(ringed(focused) || ringed(box)) && box.checkVisibility()
}"""


class Playground:
    """A page that is watched, and what people do on it."""

    def __init__(self, seen: Watched, url: str) -> None:
        self.seen, self.url = seen, url
        self.page: Page = seen.page
        # Chromium has to know that somebody listens before the first press, not with it.
        self.page.on("filechooser", lambda _: None)

    def drop(self, zone: str, *pictures: bytes, names: Sequence[str] = ()) -> None:
        """Let picture files fall on a place of the page."""
        names = names or [f"{place}.png" for place in range(len(pictures))]
        data = [base64.b64encode(picture).decode() for picture in pictures]
        files = self.page.evaluate_handle(DROP, [data, list(names)])
        for event in ("dragenter", "dragover", "drop"):
            self.page.dispatch_event(zone, event, {"dataTransfer": files})

    def show(self, *named: tuple[bytes, str], names: Sequence[str] = ()) -> None:
        """Drop pictures as demonstrations and name them."""
        before = self.page.locator("#demonstrations li").count()
        self.drop("#drop-demonstrations", *(picture for picture, _ in named), names=names)
        for place, (_, name) in enumerate(named, start=before + 1):
            self.page.get_by_label(f"Name of picture {place}", exact=True).fill(name)

    def make(self) -> str:
        """Make a pack of what is shown; what the page says of it."""
        self.page.get_by_role("button", name="Make a pack").click()
        expect(self.page.locator("#made p")).to_be_visible()
        return self.page.inner_text("#made p")

    def ask(self, picture: bytes, question: str | None = None) -> None:
        """Ask about a picture, and wait for both answers."""
        self.drop("#drop-query", picture)
        expect(self.page.locator("#query")).to_be_visible()
        if question is not None:
            self.page.get_by_label("Question", exact=True).fill(question)
        self.page.get_by_role("button", name="Ask", exact=True).click()
        expect(self.page.get_by_role("button", name="Stop")).to_be_hidden()

    def answer(self, way: str) -> str:
        """Of `pack` or `full`, what was answered."""
        return self.page.inner_text(f"#{way}-answer .text")

    def facts(self, way: str) -> dict[str, str]:
        """What an answer cost."""
        lines = self.page.locator(f"#{way}-answer .facts div").all()
        return {line.locator("dt").inner_text(): line.locator("dd").inner_text() for line in lines}

    def bars(self) -> dict[str, tuple[str, str]]:
        """What the comparison shows, by measure: with the pack, and written out."""
        rows = self.page.locator("#bars li").all()
        values = [[bar.inner_text() for bar in row.locator(".bar-value").all()] for row in rows]
        names = [row.locator(".measure span").inner_text() for row in rows]
        return {name: (pack, full) for name, (pack, full) in zip(names, values, strict=True)}

    def error(self, place: str) -> str:
        """What is said to be wrong there, once it is."""
        expect(self.page.locator(place)).to_be_visible()
        return self.page.inner_text(place)

    def tab_to(self, element_id: str) -> None:
        """Press Tab until an element has the focus; each that has it on the way is seen to."""
        for _ in range(60):
            self.page.keyboard.press("Tab")
            if self.page.evaluate("document.activeElement === document.body"):
                continue
            assert self.page.evaluate(FOCUS_RING), self.page.evaluate("document.activeElement.outerHTML")
            if self.page.evaluate("document.activeElement.id") == element_id:
                return
        raise AssertionError(f"Tab never reaches #{element_id}")


@contextmanager
def opened(browser: Browser, url: str, size: tuple[int, int] = SCREEN) -> Iterator[Playground]:
    """The playground of the server at `url`, which is all that it may ask."""
    with watched(browser, f"{url}/", size) as seen:
        yield Playground(seen, url)


def overlaps(page: Page) -> list[str]:
    """Words, pictures and controls that lie over each other."""
    told: list[str] = page.evaluate(OVERLAPS, TOUCH)
    return told


def cut_words(page: Page) -> list[str]:
    """Words that do not fit into their box."""
    told: list[str] = page.evaluate(CUT)
    return told


def low_contrast(page: Page) -> list[str]:
    """Words that are hard to tell from what is behind them, with their contrast."""
    told: list[str] = page.evaluate(CONTRAST)
    return told


def nameless(page: Page) -> list[str]:
    """Controls that a screen reader has no name for."""
    told: list[str] = page.evaluate(NAMELESS)
    return told


def too_small(page: Page) -> list[str]:
    """Controls that a finger misses."""
    told: list[str] = page.evaluate(TOO_SMALL)
    return told
