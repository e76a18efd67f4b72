"""How charts look, and how they become SVG that stands in a page or in a file of its own.

Text stays text. The same figure gives the same bytes: there is no date, and what matplotlib names at random
is named after the title and the description. Its settings are ours while a chart is drawn, and no longer.

Hazard: names are hostile input. Matplotlib is told to take no text for a formula, and escapes what it writes;
letters that XML forbids are replaced here.
"""

from __future__ import annotations

import hashlib
import io
import re
import textwrap
import unicodedata
import warnings
from contextlib import AbstractContextManager
from dataclasses import dataclass
from html import escape

from matplotlib import style
from matplotlib.figure import Figure

__all__ = ["INK", "SOFT", "Measure", "lines_of", "look", "to_svg"]

INK, SOFT, GRID = "#1c2430", "#536072", "#dde3ea"
UNITS = 72
MOST_LINES = 3

STYLE = {
    "svg.fonttype": "none",
    "text.parse_math": False,
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 9.5,
    "text.color": INK,
    "axes.edgecolor": SOFT,
    "axes.labelcolor": SOFT,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "xtick.color": SOFT,
    "ytick.color": SOFT,
    "legend.frameon": False,
    "legend.handlelength": 3.2,
    "legend.borderpad": 0,
    "legend.borderaxespad": 0,
    "hatch.linewidth": 0.8,
}


@dataclass(frozen=True)
class Measure:
    """What the values of a chart are."""

    name: str
    chance: float | None = None
    """What guessing would give, as it is shown: scaled."""
    digits: int = 1
    """Behind the point."""

    def tell(self, value: float) -> str:
        """A value as it is shown."""
        return f"{value:.{self.digits}f}"

    def tell_interval(self, value: float, low: float, high: float) -> str:
        """A value with its bounds as it is shown."""
        return f"{self.tell(value)} [{self.tell(low)}, {self.tell(high)}]"


def look() -> AbstractContextManager[None]:
    """In this context figures are made with these settings, whatever those of the process are."""
    return style.context(["default", STYLE])


def lines_of(name: str, letters: int) -> list[str]:
    """A name in lines of at most so many letters, cut if it is very long."""
    plain = _plain(name)
    # Letters of East Asia are about twice as wide.
    if any(unicodedata.east_asian_width(letter) in "WF" for letter in plain):
        letters //= 2
    return textwrap.wrap(plain, letters, max_lines=MOST_LINES, placeholder=" \u2026") or [""]


def _plain(words: str) -> str:
    """Words on one line, of letters that may be written."""
    return "".join(letter if letter.isprintable() else "\ufffd" for letter in " ".join(words.split()))


def to_svg(figure: Figure, title: str, described: str) -> str:
    """The figure, made in `look`, as an element.

    Args:
        title: what the chart shows.
        described: what there is to see, with all numbers, for those who cannot.
    """
    buffer = io.BytesIO()
    # Names of what is defined once differ between charts, which may stand on one page.
    title, described = _plain(title), _plain(described)
    mark = hashlib.sha256(f"{title}\n{described}".encode()).hexdigest()[:12]
    with style.context({"svg.hashsalt": mark}), warnings.catch_warnings():
        # The reader's fonts have letters that the font used for measuring lacks.
        warnings.filterwarnings("ignore", "Glyph")
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    drawn = buffer.getvalue().decode()
    inside = drawn[drawn.index(">", drawn.index("<svg")) + 1 :]
    # Its style sheet and the names of its groups would be those of the whole page.
    inside = re.sub(
        r"<metadata>.*?</metadata>|<defs>\s*<style.*?</style>\s*</defs>", "", inside, flags=re.DOTALL
    )
    inside = re.sub(r'<g id="[^"]*"', "<g", inside).replace(
        "'DejaVu Sans', sans-serif", "system-ui, sans-serif"
    )
    wide, high = (UNITS * inches for inches in figure.get_size_inches())
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" role="img" '
        f'aria-labelledby="t{mark} d{mark}" viewBox="0 0 {wide:.1f} {high:.1f}" '
        f'style="stroke-linejoin:round;stroke-linecap:butt"><title id="t{mark}">{escape(title)}</title>'
        f'<desc id="d{mark}">{escape(described)}</desc>{inside}'
    )
