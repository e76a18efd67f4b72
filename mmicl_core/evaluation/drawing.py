"""How charts look, and how they become SVG that stands in a page or in a file of its own.

Text stays text. The same figure gives the same bytes: there is no date, and what matplotlib names at random
is named after the title and the description. Its settings are ours while a chart is drawn, and no longer.

Hazard: names are hostile input. Matplotlib is told to take no text for a formula, and escapes what it writes;
letters that XML forbids are replaced here.
"""

from __future__ import annotations

import hashlib
import io
import math
import re
import textwrap
import unicodedata
import warnings
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from html import escape
from typing import Literal

from matplotlib import style
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from mmicl_core.evaluation.pages import BLUE, INK, RULE, SOFT, VERMILION

__all__ = [
    "COLOURS",
    "DOTS",
    "LETTERS",
    "LINE_HIGH",
    "ROUND",
    "WIDE",
    "Measure",
    "framed",
    "lines_of",
    "log_ticks",
    "look",
    "looks_of",
    "to_svg",
]

# Of the same palette then green, purple, orange, sky blue, black; yellow is too light for lines on white.
COLOURS = (BLUE, VERMILION, "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
DOTS = (0, (1, 1.5))
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
DASHES: tuple[Literal["-", "--", "-.", ":"], ...] = ("-", "--", "-.", ":")

# Inches; matplotlib's SVG has 72 units in each. Narrow, so that letters stay readable on a telephone.
WIDE, LEFT, RIGHT, BELOW = 5.7, 0.6, 0.6, 0.45
UNITS = 72
LINE_HIGH, LETTERS = 0.17, 58
MOST_LINES, MOST_TICKS = 3, 7
ROUND = (1, 2, 2.5, 5, 10)

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
    "grid.color": RULE,
    "xtick.color": SOFT,
    "ytick.color": SOFT,
    "legend.frameon": False,
    "legend.handlelength": 3.2,
    "legend.borderpad": 0,
    "legend.borderaxespad": 0,
    "hatch.linewidth": 0.8,
    # Units of the picture: of a long line, what cannot be seen is left out.
    "path.simplify_threshold": 0.5,
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


def looks_of(number: int) -> Line2D:
    """A line without points that looks like the series of this number.

    Its colour, marker and dashes all change with the number, in cycles of different lengths.
    """
    return Line2D(
        [],
        [],
        color=COLOURS[number % len(COLOURS)],
        marker=MARKERS[number % len(MARKERS)],
        linestyle=DASHES[number % len(DASHES)],
        markersize=6,
        markeredgecolor="white",
        markeredgewidth=0.6,
        linewidth=1.6,
    )


def framed(legend: Sequence[tuple[Artist, str]], plot_high: float, above: float) -> tuple[Figure, Axes]:
    """A frame over the whole width, with a legend below it, a line for each name and more for long ones.

    Args:
        plot_high: inches, of the frame alone.
        above: inches, for what stands on top of it.
    """
    names = ["\n".join(lines_of(name, LETTERS)) for _, name in legend]
    below = LINE_HIGH * (sum(name.count("\n") + 1 for name in names) + 0.3 * len(names)) + 0.1
    high = above + plot_high + BELOW + below
    figure = Figure(figsize=(WIDE, high))
    if legend:
        looks = [shown for shown, _ in legend]
        figure.legend(looks, names, loc="lower left", bbox_to_anchor=(0.02, 0.05 / high))
    wide = WIDE - LEFT - RIGHT
    axes = figure.add_axes((LEFT / WIDE, (BELOW + below) / high, wide / WIDE, plot_high / high))
    axes.grid(axis="y")
    axes.tick_params(length=3)
    return figure, axes


def log_ticks(low: float, high: float) -> list[float]:
    """A few round numbers from `low` to `high`, both above 0, for a logarithmic axis."""
    powers = [10.0**power for power in range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)]
    inside = [digit * power for power in powers for digit in (1, 2, 5) if low <= digit * power <= high]
    if len(inside) > MOST_TICKS:
        inside = [power for power in powers if low <= power <= high]
    if len(inside) < 3:
        inside = [tick for tick in MaxNLocator(4, steps=ROUND).tick_values(low, high) if low <= tick <= high]
    return inside[:: -(-len(inside) // MOST_TICKS)]


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
