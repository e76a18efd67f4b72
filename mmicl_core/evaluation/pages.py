"""Pieces of a page that needs nothing else: its frame, pictures as data URIs, charts as SVG.

Hazard: captions and names of a web corpus are hostile input. Whatever is not made here goes through `text`
or `escape`, and the frame forbids its page to run a script or to load anything, should one slip through.
"""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape

from mmicl_core.data.images import examine

__all__ = [
    "BLUE",
    "ORANGE",
    "THUMBNAIL",
    "Bar",
    "Line",
    "bar_chart",
    "column_chart",
    "data_uri",
    "facts_table",
    "line_chart",
    "picture",
    "render_page",
    "text",
    "thumbnail",
]

THUMBNAIL = 128
MOST_TEXT = 1000
BLUE, ORANGE, INK = "#2a6fdb", "#d9772b", "#1c2430"

POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
STYLE = """
:root{color-scheme:light}
body{font:16px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem}
body{color:#1c2430;background:#fff}
h1{font-size:1.6rem;margin-bottom:.2rem}
h2{font-size:1.15rem;margin-top:2.2rem}
p.lead{margin-top:0}
p.lead,.soft{color:#536072}
.row{display:flex;flex-wrap:wrap;gap:.6rem}
figure{margin:0;text-align:center;border:1px solid #dde3ea;border-radius:8px;padding:.5rem .7rem}
figure.query{border:2px solid #2a6fdb}
figcaption{font-size:.9rem}
table{border-collapse:collapse}
td,th{padding:.25rem .9rem .25rem 0;text-align:left;vertical-align:top;font-variant-numeric:tabular-nums}
td{min-width:4rem}
th{font-weight:600;border-bottom:1px solid #dde3ea}
.told{unicode-bidi:isolate;overflow-wrap:anywhere}
.right{color:#1a7f37}
.wrong{color:#b42318}
.chart{overflow-x:auto}
.chart svg{display:block;width:100%;min-width:36rem}
svg text{font:13px system-ui,sans-serif;fill:#1c2430}
svg .soft{fill:#536072}
"""

# Pixels of the charts' own coordinates.
BAR, ROW, LETTER, LEAST_LABEL, MOST_LABEL, NUMBER = 420, 34, 7.2, 120, 300, 110
COLUMNS_WIDE, COLUMNS_HIGH, AXIS, MOST_TICKS = 640, 160, 60, 10
SCALE = 1.2
# Of longer lines, what a pixel's width cannot show is left out.
MOST_POINTS, MOST_MARKERS = 900, 40
WIDE_RANGE = 30


def render_page(title: str, parts: Iterable[str], style: str = "") -> str:
    """A whole page.

    Args:
        parts: HTML, which may hold no text that was not escaped.
        style: CSS beside that of all pages.
    """
    head = (
        "<!doctype html><html lang=en><meta charset=utf-8>"
        f'<meta http-equiv=Content-Security-Policy content="{POLICY}"><title>{escape(title)}</title>'
        f"<meta name=viewport content='width=device-width,initial-scale=1'><style>{STYLE}{style}</style>"
    )
    return "\n".join([head, *parts, "</html>"])


def text(told: str, kind: str = "") -> str:
    """Text of a corpus, cut if very long; it keeps to itself whatever letters and directions it has.

    Args:
        kind: a class of the page's style, which may show less of it; on hover all is shown.
    """
    shown = escape(told if len(told) <= MOST_TEXT else told[:MOST_TEXT] + "\u2026")
    return f'<span class="told {kind}" dir=auto title="{shown}">{shown}</span>'


def picture(data: bytes) -> str:
    """An encoded PNG or WebP picture."""
    return f"<img alt='' src='{data_uri(data)}'>"


def data_uri(data: bytes) -> str:
    """An encoded PNG or WebP picture as a URL that holds it."""
    kind = "png" if data.startswith(b"\x89PNG") else "webp"
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def thumbnail(data: bytes, max_pixels: int) -> bytes:
    """A WebP of at most `THUMBNAIL` pixels in both directions.

    Args:
        data: an encoded picture of any kind that is read.
        max_pixels: larger ones are not decoded.

    Raises:
        PictureError: it cannot be decoded.
    """
    small = examine(data, max_pixels=max_pixels, side=THUMBNAIL).picture
    small.thumbnail((THUMBNAIL, THUMBNAIL))
    buffer = io.BytesIO()
    small.save(buffer, "WEBP", quality=75)
    return buffer.getvalue()


def facts_table(facts: Mapping[str, str]) -> str:
    """Names and what they are, as text."""
    rows = "".join(f"<tr><th>{escape(key)}</th><td>{text(value)}</td></tr>" for key, value in facts.items())
    return f"<table>{rows}</table>"


@dataclass(frozen=True)
class Bar:
    """One line of a bar chart."""

    label: str
    length: float
    """From 0 to 1, the whole width."""
    shown: str
    """What stands behind the bar."""
    interval: tuple[float, float] | None = None
    """Its bounds, from 0 to 1."""
    colour: str = BLUE


def bar_chart(bars: Sequence[Bar], mark: tuple[float, str] | None = None) -> str:
    """Bars one below the other.

    Args:
        mark: a place from 0 to 1 and what it means, drawn through all bars.
    """
    longest = max((len(bar.label) for bar in bars), default=0)
    left = min(max(LETTER * longest + 16, LEAST_LABEL), MOST_LABEL)
    drawn = [_bar(bar, number * ROW, left) for number, bar in enumerate(bars)]
    height = len(bars) * ROW
    if mark is not None:
        place, bottom = left + BAR * mark[0], height
        drawn.append(
            f"<line x1={place:.1f} x2={place:.1f} y1=0 y2={bottom} stroke='#8a95a5' stroke-dasharray='4 4'/>"
            f"<text class=soft x={place:.1f} y={bottom + 15} text-anchor=middle>{escape(mark[1])}</text>"
        )
        height += 22
    return _svg(left + BAR + NUMBER, height, drawn)


def column_chart(groups: Sequence[str], series: Mapping[str, Sequence[float]], under: str = "") -> str:
    """Columns side by side, a group for each of `groups`, with a legend where there are several series.

    Args:
        groups: what stands below each group; of many, some are left out.
        series: heights by name, one for each group, as shares of 1.
        under: what the groups are, below all of them.
    """
    highest = max((height for heights in series.values() for height in heights), default=0) or 1.0
    wide = (COLUMNS_WIDE - AXIS) / max(len(groups), 1)
    bottom = COLUMNS_HIGH + 24
    drawn = [
        f"<text class=soft x={AXIS - 6} y=28 text-anchor=end>{100 * highest:.3g} %</text>"
        f"<text class=soft x={AXIS - 6} y={bottom + 4} text-anchor=end>0</text>"
        f"<line x1={AXIS} x2={COLUMNS_WIDE} y1={bottom} y2={bottom} stroke='#8a95a5'/>"
    ]
    every = -(-len(groups) // MOST_TICKS) or 1
    for number, group in enumerate(groups):
        left = AXIS + number * wide
        for place, (name, heights) in enumerate(series.items()):
            tall = COLUMNS_HIGH * heights[number] / highest
            narrow = wide * 0.86 / len(series)
            drawn.append(
                f"<rect x={left + wide * 0.07 + place * narrow:.1f} y={bottom - tall:.1f} width={narrow:.1f} "
                f"height={tall:.1f} fill='{(BLUE, ORANGE)[place % 2]}'>"
                f"<title>{escape(name)}, {escape(group)}: {100 * heights[number]:.2f} %</title></rect>"
            )
        if number % every == 0:
            drawn.append(
                f"<text class=soft x={left + wide / 2:.1f} y={bottom + 18} text-anchor=middle>"
                f"{escape(group)}</text>"
            )
    drawn.append(f"<text class=soft x={COLUMNS_WIDE} y={bottom + 38} text-anchor=end>{escape(under)}</text>")
    drawn += _legend([(name, (BLUE, ORANGE)[place % 2]) for place, name in enumerate(series)])
    return _svg(COLUMNS_WIDE + 10, bottom + 46, drawn)


@dataclass(frozen=True)
class Line:
    """One line of a line chart."""

    name: str
    points: Sequence[tuple[float, float]]
    """Places along the axis, ascending, with heights; one that is not finite interrupts the line."""
    colour: str = BLUE
    faint: bool = False
    """Drawn thin, behind a line that sums it up."""


def line_chart(lines: Sequence[Line], under: str = "", *, logarithmic: bool = False) -> str:
    """Lines over one axis, with a legend where there are several.

    Args:
        under: what the axis is, in a short word.
        logarithmic: heights may be drawn by their powers of ten, if they are positive and far apart.
    """
    points = [point for line in lines for point in line.points if math.isfinite(point[1])]
    if not points:
        return _svg(COLUMNS_WIDE + 10, COLUMNS_HIGH, [])
    heights = [height for _, height in points]
    low, high = min(heights), max(heights)
    powers = logarithmic and low > 0 and high / low > WIDE_RANGE
    marks = _powers(low, high) if powers else _ticks(low if low > high / 2 else min(low, 0.0), high)
    first, last = min(x for x, _ in points), max(x for x, _ in points)
    legend = _legend([(line.name, line.colour) for line in lines if not line.faint])
    top = 24.0 if legend else 8.0
    bottom = top + COLUMNS_HIGH

    def across(x: float) -> float:
        share = (x - first) / (last - first) if last > first else 0.5
        return AXIS + (COLUMNS_WIDE - AXIS) * share

    def down(y: float) -> float:
        tall = math.log10 if powers else float
        share = (tall(y) - tall(marks[0])) / (tall(marks[-1]) - tall(marks[0]))
        return bottom - (bottom - top) * share

    drawn = [
        f"<line x1={AXIS} x2={COLUMNS_WIDE} y1={down(mark):.1f} y2={down(mark):.1f} stroke='#dde3ea'/>"
        f"<text class=soft x={AXIS - 6} y={down(mark) + 4:.1f} text-anchor=end>{mark:.6g}</text>"
        for mark in marks
    ]
    drawn += [
        f"<text class=soft x={across(mark):.1f} y={bottom + 18} text-anchor=middle>{mark:.9g}</text>"
        for mark in (_ticks(first, last) if last > first else [first])
        if first <= mark <= last
    ]
    drawn.append(f"<text class=soft x={AXIS - 6} y={bottom + 18} text-anchor=end>{escape(under)}</text>")
    drawn += [
        _polyline(line, [(across(x), down(y) if math.isfinite(y) else y) for x, y in _thin(line.points)])
        for line in sorted(lines, key=lambda line: not line.faint)
    ]
    return _svg(COLUMNS_WIDE + 24, bottom + 26, drawn + legend)


def _ticks(low: float, high: float) -> list[float]:
    """A few round numbers, the first of them not above `low` and the last not below `high`."""
    if low == high:
        low, high = low - abs(low) / 2, high + (abs(high) / 2 or 1.0)
    rough = (high - low) / 5
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [number * step for number in range(first, last + 1)]


def _powers(low: float, high: float) -> list[float]:
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    every = -(-(last - first) // 6)
    return [10.0**power for power in range(first, last + every, every)]


def _thin(points: Sequence[tuple[float, float]]) -> Sequence[tuple[float, float]]:
    """Of each of many pieces of a long line the lowest and the highest point, and one that interrupts it."""
    size = -(-3 * len(points) // MOST_POINTS)
    if size <= 3:
        return points
    kept: list[tuple[float, float]] = []
    for start in range(0, len(points), size):
        piece = points[start : start + size]
        finite = sorted((point for point in piece if math.isfinite(point[1])), key=lambda point: point[1])
        gaps = [point for point in piece if not math.isfinite(point[1])]
        kept += sorted({*finite[:1], *finite[-1:], *gaps[:1]}, key=lambda point: point[0])
    return kept


def _polyline(line: Line, places: Sequence[tuple[float, float]]) -> str:
    pieces: list[list[tuple[float, float]]] = [[]]
    for place in places:
        if math.isfinite(place[1]):
            pieces[-1].append(place)
        elif pieces[-1]:
            pieces.append([])
    style = f"stroke='{line.colour}' " + ("stroke-width=1 opacity=0.35" if line.faint else "stroke-width=2")
    drawn = [
        f"<polyline fill=none stroke-linejoin=round {style} points='"
        + " ".join(f"{x:.1f},{y:.1f}" for x, y in piece)
        + "'/>"
        for piece in pieces
        if len(piece) > 1
    ]
    few = not line.faint and sum(map(len, pieces)) <= MOST_MARKERS
    drawn += [
        f"<circle cx={x:.1f} cy={y:.1f} r=2.5 fill='{line.colour}'/>"
        for piece in pieces
        for x, y in piece
        if few or len(piece) == 1
    ]
    return f"<g><title>{escape(line.name)}</title>{''.join(drawn)}</g>"


def _bar(bar: Bar, top: float, left: float) -> str:
    end = left + BAR * bar.length
    line = ""
    if bar.interval is not None:
        low, high = (left + BAR * bound for bound in bar.interval)
        end = max(high, left)
        line = (
            f"<line x1={low:.1f} x2={high:.1f} y1={top + 17} y2={top + 17} stroke='{INK}' stroke-width=2 />"
        )
    room = int((left - 16) / LETTER)
    label = bar.label if len(bar.label) <= room else bar.label[: room - 1] + "\u2026"
    return (
        f"<text x=0 y={top + 21}><title>{escape(bar.label)}</title>{escape(label)}</text>"
        f"<rect x={left:.1f} y={top + 8} width={BAR * bar.length:.1f} height=18 fill='{bar.colour}'/>{line}"
        f"<text x={end + 8:.1f} y={top + 21}>{escape(bar.shown)}</text>"
    )


def _legend(names: Sequence[tuple[str, str]]) -> list[str]:
    if len(names) < 2:
        return []
    drawn, left = [], float(AXIS)
    for name, colour in names:
        drawn.append(
            f"<rect x={left:.0f} y=2 width=11 height=11 fill='{colour}'/>"
            f"<text x={left + 16:.0f} y=12>{escape(name)}</text>"
        )
        left += LETTER * len(name) + 44
    return drawn


def _svg(width: float, height: float, drawn: Iterable[str]) -> str:
    # The letters of all charts of a page have one size, however wide the charts are.
    size = f"viewBox='0 0 {width:.0f} {height:.0f}' style='max-width:{SCALE * width:.0f}px'"
    return f"<div class=chart><svg {size}>{''.join(drawn)}</svg></div>"
