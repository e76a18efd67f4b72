"""Charts of pages beside the card, as SVG: bars, columns side by side, lines over the steps of a run.

Series differ by hatching or dashes beside their colour; a title and a description with the numbers stand for
the picture where it cannot be seen.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from mmicl_core.evaluation.drawing import (
    COLOURS,
    DOTS,
    LETTERS,
    LINE_HIGH,
    ROUND,
    WIDE,
    framed,
    lines_of,
    log_ticks,
    look,
    looks_of,
    to_svg,
)
from mmicl_core.evaluation.pages import BLUE, INK

__all__ = ["Bar", "Line", "bar_chart", "column_chart", "line_chart"]

# Inches: columns and lines; bars, the caps of their intervals, what lies between and around them.
PLOT, ABOVE = 1.9, 0.2
BAR_HIGH, CAP, GAP, EDGE, SHOWN = 0.17, 0.1, 0.1, 0.05, 2.0
SHOWN_LETTERS, GROUP_LETTERS = 24, 12
# Of a group's width, what its columns take.
COLUMNS = 0.86
# Inches that a letter below columns takes.
LETTER = 0.09
# Powers of ten are drawn where heights differ by more than this factor.
WIDE_RANGE = 30
MOST_MARKERS = 40


@dataclass(frozen=True)
class Bar:
    """One row of a bar chart."""

    label: str
    length: float
    """From 0 to 1, the whole width."""
    shown: str
    """What stands behind the bar."""
    interval: tuple[float, float] | None = None
    """Its bounds, from 0 to 1."""
    colour: str = BLUE


@dataclass(frozen=True)
class Line:
    """One line of a line chart."""

    name: str
    """Lines of one name look alike."""
    points: Sequence[tuple[int, float]]
    """Steps, ascending, with heights; one that is not finite interrupts the line."""
    faint: bool = False
    """Drawn thin, behind a line that sums it up."""


def bar_chart(title: str, bars: Sequence[Bar], mark: tuple[float, str] | None = None) -> str:
    """Bars one below the other, each below its label.

    Args:
        bars: at least one.
        mark: a place from 0 to 1 and what it means, drawn through all bars.
    """
    labels = [lines_of(bar.label, LETTERS) for bar in bars]
    rows = [LINE_HIGH * len(label) + BAR_HIGH + GAP for label in labels]
    meaning = [] if mark is None else lines_of(mark[1], LETTERS)
    below = LINE_HIGH * len(meaning) + 2 * EDGE
    high = EDGE + sum(rows) + below
    with look():
        figure = Figure(figsize=(WIDE, high))
        box = (0.02, below / high, (WIDE - SHOWN) / WIDE - 0.02, sum(rows) / high)
        axes = figure.add_axes(box, xlim=(0, 1), ylim=(sum(rows), 0))
        axes.set_axis_off()
        for bar, label, row, end in zip(bars, labels, rows, accumulate(rows), strict=True):
            axes.text(0, end - row, "\n".join(label), va="top")
            _draw_bar(axes, bar, end - GAP - BAR_HIGH / 2)
        told = [f"{bar.label}: {bar.shown}" for bar in bars]
        if mark is not None:
            tops = [end - GAP - 1.2 * BAR_HIGH for end in accumulate(rows)]
            bottoms = [top + 1.4 * BAR_HIGH for top in tops]
            lines = axes.vlines([mark[0]] * len(bars), tops, bottoms, colors=INK, linestyles=DOTS)
            place = (0.02, EDGE / high)
            figure.legend([lines], ["\n".join(meaning)], loc="lower left", bbox_to_anchor=place)
            told.append(f"dotted line: {mark[1]}")
        return to_svg(figure, title, "; ".join(told))


def column_chart(
    title: str, groups: Sequence[str], series: Mapping[str, Sequence[float]], under: str = ""
) -> str:
    """Columns side by side, a group for each of `groups`, with a legend where there are several series.

    Args:
        groups: what stands below each group; of many, some are left out.
        series: heights by name, one for each group, as shares of 1.
        under: what the groups are, below all of them.
    """
    wide = COLUMNS / len(series)
    highest = max((height for heights in series.values() for height in heights), default=0.0)
    told = [
        f"{name}, {group}: {100 * height:.2f} %"
        for name, heights in series.items()
        for group, height in zip(groups, heights, strict=True)
    ]
    with look():
        legend = [(Patch(**_column_looks(number)), name) for number, name in enumerate(series)]
        figure, axes = framed(legend if len(legend) > 1 else [], PLOT, ABOVE)
        for number, heights in enumerate(series.values()):
            begin = number * wide - COLUMNS / 2
            places = [group + begin for group in range(len(groups))]
            axes.bar(places, heights, wide, align="edge", **_column_looks(number))
        axes.set_xlim(-0.5, max(len(groups), 1) - 0.5)
        axes.set_ylim(0, 1.05 * highest or 1.0)
        axes.yaxis.set_major_locator(MaxNLocator(5, steps=ROUND))
        axes.yaxis.set_major_formatter(lambda share, _: f"{100 * share:.6g} %")
        _name_groups(axes, [lines_of(group, GROUP_LETTERS)[0] for group in groups])
        axes.set_xlabel(lines_of(under, LETTERS)[0])
        return to_svg(figure, title, "; ".join(told))


def line_chart(title: str, lines: Sequence[Line], under: str = "", *, logarithmic: bool = False) -> str:
    """Lines over one axis, with a legend where there are several names.

    Args:
        lines: at least one, each with a finite height.
        under: what the axis is, in a short word.
        logarithmic: heights may be drawn by their powers of ten, if they are positive and far apart.
    """
    numbers = {name: number for number, name in enumerate(dict.fromkeys(line.name for line in lines))}
    points = [point for line in lines for point in line.points if math.isfinite(point[1])]
    first, last = min(step for step, _ in points), max(step for step, _ in points)
    with look():
        drawn = [_drawn(line, numbers[line.name]) for line in lines]
        legend = [(shown, line.name) for line, shown in zip(lines, drawn, strict=True) if not line.faint]
        figure, axes = framed(legend if len(numbers) > 1 else [], PLOT, ABOVE)
        for shown in drawn:
            axes.add_line(shown)
        room = 0.02 * (last - first) or 0.5
        axes.set_xlim(first - room, last + room)
        axes.xaxis.set_major_locator(MaxNLocator(6, steps=ROUND, integer=True, min_n_ticks=1))
        axes.xaxis.set_major_formatter("{x:,.0f}")
        axes.set_xlabel(lines_of(under, LETTERS)[0])
        _set_heights(axes, [height for _, height in points], logarithmic=logarithmic)
        return to_svg(figure, title, _described(lines, under))


def _draw_bar(axes: Axes, bar: Bar, middle: float) -> None:
    axes.barh(middle, bar.length, BAR_HIGH, color=bar.colour, linewidth=0)
    if bar.interval is not None:
        low, high = bar.interval
        cap = [middle - CAP / 2, middle + CAP / 2]
        places, heights = [low, low, low, high, high, high], [*cap, middle, middle, *cap]
        axes.plot(places, heights, color=INK, linewidth=1.5, clip_on=False)
    shown = "\n".join(lines_of(bar.shown, SHOWN_LETTERS))
    axes.text(1.03, middle, shown, va="center")


def _column_looks(number: int) -> dict[str, Any]:
    hatch = "////" if number % 2 else None
    return {"facecolor": COLOURS[number % len(COLOURS)], "hatch": hatch, "edgecolor": "white", "linewidth": 0}


def _name_groups(axes: Axes, names: Sequence[str]) -> None:
    """Write the names below their groups, evenly left out where there is no room for all of them."""
    longest = max(map(len, names), default=0)
    room = axes.bbox.width / axes.figure.dpi
    every = math.ceil(len(names) * (LETTER * longest + LETTER) / room) or 1
    axes.set_xticks(range(0, len(names), every), names[::every])


def _drawn(line: Line, number: int) -> Line2D:
    heights = [height if math.isfinite(height) else math.nan for _, height in line.points]
    shown = looks_of(number)
    shown.set_data([step for step, _ in line.points], heights)
    if line.faint:
        shown.set(linewidth=0.7, linestyle="-", alpha=0.4, zorder=1.5)
    around = [math.nan, *heights, math.nan]
    few = not line.faint and len(heights) <= MOST_MARKERS
    marked = [
        place
        for place, height in enumerate(heights)
        # Between two interruptions there is no line, only its point.
        if math.isfinite(height) and (few or math.isnan(around[place]) and math.isnan(around[place + 2]))
    ]
    shown.set(marker=shown.get_marker() if marked else "None", markevery=marked, markersize=4, clip_on=False)
    return shown


def _set_heights(axes: Axes, heights: Sequence[float], *, logarithmic: bool) -> None:
    low, high = min(heights), max(heights)
    if logarithmic and low > 0 and high / low > WIDE_RANGE:
        low, high = low / 1.2, high * 1.2
        ticks = log_ticks(low, high)
        axes.set_yscale("log")
        axes.set_ylim(low, high)
        axes.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
        axes.set_yticks([], minor=True)
        return
    # Heights that are close together are told apart, all others are compared with 0.
    low = low if low > high / 2 else min(low, 0.0)
    room = 0.05 * (high - low) or 0.1 * abs(high) or 1.0
    axes.set_ylim(low - room if low else low, high + room)
    axes.yaxis.set_major_locator(MaxNLocator(6, steps=ROUND))
    axes.ticklabel_format(axis="y", scilimits=(-3, 6))


def _described(lines: Sequence[Line], under: str) -> str:
    """The ends and the extremes of the first line of each name."""
    first: dict[str, Line] = {}
    for line in lines:
        first.setdefault(line.name, line)
    told = []
    for name, line in first.items():
        points = [point for point in line.points if math.isfinite(point[1])]
        ends = {
            "first": points[0],
            "last": points[-1],
            "lowest": min(points, key=lambda point: point[1]),
            "highest": max(points, key=lambda point: point[1]),
        }
        places = [f"{end} {height:.6g} at {under} {step:,}" for end, (step, height) in ends.items()]
        told.append(f"{name}: {', '.join(places)}")
    return "; ".join(told)
