"""Charts of an evaluation as SVG: accuracy over shots, controls, compression against accuracy.

Series differ by marker and line style beside a colour of the palette of Okabe and Ito (2008), which the
colour-blind tell apart; a title and a description with all numbers stand for the picture where it cannot be
seen.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from matplotlib.artist import Artist
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
    Measure,
    framed,
    lines_of,
    log_ticks,
    look,
    looks_of,
    to_svg,
)
from mmicl_core.evaluation.pages import GREEN, INK, RED, SOFT

__all__ = [
    "Control",
    "Expected",
    "Mark",
    "Series",
    "compression_chart",
    "controls_chart",
    "shots_chart",
]

Expected = Literal["falls", "stays", "chance"]

# Inches.
PLOT, ABOVE = 2.7, 0.35
# Points of the picture between labels that say the same.
NEAR = 20
# A row of the controls: its words, its two bars.
VALUES, WORDS_HIGH, BAR_HIGH, GAP, AXIS_HIGH = 1.75, 0.2, 0.17, 0.16, 0.58

EXPECTED = {"falls": "\u2193 should fall", "stays": "= should stay", "chance": "\u2193 should fall to chance"}
MET = {True: ("\u2713 does", GREEN), False: ("\u2717 does not", RED), None: ("? cannot be told", SOFT)}


@dataclass(frozen=True)
class Mark:
    """A value where it was measured, as it is shown: scaled."""

    place: float
    """Shots, or what a prompt costs."""
    value: float
    low: float
    high: float
    label: str = ""
    """What stands beside it."""
    seeds: Sequence[float] = ()
    """The value of each seed, drawn as a small tick."""


@dataclass(frozen=True)
class Series:
    """The values of one model, joined in the order of their places."""

    name: str
    marks: Sequence[Mark]


@dataclass(frozen=True)
class Control:
    """A score with something in the prompt changed, as it is shown: scaled."""

    group: str
    """The model and its shots; controls of one group stand together."""
    label: str
    """What was changed."""
    expected: Expected
    value: float
    low: float
    high: float
    unchanged: float
    """The score of the prompts as they are."""
    difference: float
    """From `unchanged` to `value`."""
    difference_low: float
    difference_high: float
    met: bool | None
    """Whether it does as expected; None where the sample is too small to tell."""


def shots_chart(title: str, series: Sequence[Series], measure: Measure) -> str:
    """Values over the number of demonstrations, each with its interval.

    Shots are as far apart as their binary logarithms, and 0 is one step before 1.

    Args:
        series: at least one, each with at least one mark; their places are shots.
    """
    shots = sorted({mark.place for line in series for mark in line.marks})
    with look():
        figure, axes = _frame(series)
        step = 0.02 * max(_step(shots[-1]) - _step(shots[0]), 1)
        for number, line in enumerate(series):
            # Intervals at the same shots stand beside each other.
            beside = step * (number - (len(series) - 1) / 2)
            _draw(axes, number, line, [_step(mark.place) + beside for mark in line.marks])
        _set_heights(axes, series, measure)
        room = step * (4 + len(series) / 2)
        axes.set_xlim(_step(shots[0]) - room, _step(shots[-1]) + room)
        shown = _apart([_step(shot) for shot in shots], 1.6 * step)
        axes.set_xticks([_step(shots[place]) for place in shown], [f"{shots[place]:g}" for place in shown])
        axes.set_xlabel("shots")
        return to_svg(figure, title, _described(series, measure, "shots"))


def compression_chart(
    title: str, series: Sequence[Series], measure: Measure, unit: str = "tokens", of: str = "the prompt"
) -> str:
    """Values over what a prompt costs, on a logarithmic axis; each mark has its label, the shots.

    Args:
        series: at least one, each with at least one mark; their places are costs, above 0.
        unit: of the costs.
        of: what they are the costs of.
    """
    costs = [mark.place for line in series for mark in line.marks]
    low, high = min(costs) / 1.2, max(costs) * 1.2
    with look():
        figure, axes = _frame(series)
        axes.set_xscale("log")
        axes.set_xlim(low, high)
        for number, line in enumerate(series):
            _draw(axes, number, line, [mark.place for mark in line.marks])
        _set_heights(axes, series, measure)
        _label(axes, series)
        ticks = log_ticks(low, high)
        axes.set_xticks(ticks, [f"{tick:,.10g}" for tick in ticks])
        axes.set_xticks([], minor=True)
        axes.set_xlabel(f"{unit} of {of}, logarithmic; beside each point its shots")
        return to_svg(figure, title, _described(series, measure, unit))


def controls_chart(title: str, controls: Sequence[Control], measure: Measure) -> str:
    """For each control its bar below that of the unchanged prompts, and whether it does as expected.

    Args:
        controls: at least one; those of one group one after the other.
    """
    rows = [lines_of(control.label, 34) for control in controls]
    heads = [
        lines_of(control.group, LETTERS) if place == 0 or control.group != controls[place - 1].group else []
        for place, control in enumerate(controls)
    ]
    heights = [
        WORDS_HIGH * (len(head) + len(words)) + 2 * BAR_HIGH + GAP
        for head, words in zip(heads, rows, strict=True)
    ]
    with look():
        high = sum(heights) + AXIS_HIGH + 2 * LINE_HIGH
        figure = Figure(figsize=(WIDE, high))
        axes = figure.add_axes(
            (0.02, (AXIS_HIGH + 2 * LINE_HIGH) / high, (WIDE - VALUES) / WIDE - 0.02, sum(heights) / high)
        )
        axes.set_ylim(sum(heights), 0)
        top = 0.0
        for control, head, words, height in zip(controls, heads, rows, heights, strict=True):
            _draw_control(axes, control, measure, top, head, words)
            top += height
        _set_lengths(axes, controls, measure)
        looks: list[Artist] = [
            Patch(facecolor="white", edgecolor=INK, label="prompts as they are"),
            Patch(facecolor=COLOURS[0], hatch="////", edgecolor="white", label="with the control"),
        ]
        if measure.chance is not None:
            label = f"chance, {measure.tell(measure.chance)}"
            looks.append(Line2D([], [], color=SOFT, linestyle=DOTS, label=label))
        figure.legend(handles=looks, loc="lower left", bbox_to_anchor=(0.02, 0.02), ncols=3)
        return to_svg(figure, title, " ".join(_told(control, measure) for control in controls))


def _frame(series: Sequence[Series]) -> tuple[Figure, Axes]:
    return framed([(looks_of(number), line.name) for number, line in enumerate(series)], PLOT, ABOVE)


def _draw(axes: Axes, number: int, line: Series, places: Sequence[float]) -> None:
    looks = looks_of(number)
    colour = COLOURS[number % len(COLOURS)]
    order = sorted(range(len(places)), key=lambda place: places[place])
    for place, mark in zip(places, line.marks, strict=True):
        axes.plot(
            [place, place], [mark.low, mark.high], color=colour, linewidth=1.2, marker="_", markersize=5
        )
        dots = [place] * len(mark.seeds)
        axes.plot(
            dots, mark.seeds, color=colour, linestyle="none", marker=0, markersize=3, markeredgewidth=0.6
        )
    looks.set_data([places[place] for place in order], [line.marks[place].value for place in order])
    axes.add_line(looks)


def _label(axes: Axes, series: Sequence[Series]) -> None:
    """Write what stands beside each mark, on the side that its line leaves free."""
    written: list[tuple[str, float, float]] = []
    for line in series:
        marks = sorted(line.marks, key=lambda mark: mark.place)
        for mark, after in zip(marks, [*marks[1:], marks[-1]], strict=True):
            x, y = axes.transData.transform((mark.place, mark.value))
            # Models often share their first point, where one label is enough.
            if any(
                mark.label == other and math.hypot(x - far, y - high) < NEAR for other, far, high in written
            ):
                continue
            written.append((mark.label, x, y))
            # Not among the numbers of the axis.
            below = after.value >= mark.value and y - axes.bbox.y0 > NEAR
            beside = (5, -10) if below else (5, 4)
            place = (mark.place, mark.value)
            axes.annotate(mark.label, place, beside, textcoords="offset points", fontsize=8)


def _set_heights(axes: Axes, series: Sequence[Series], measure: Measure) -> None:
    marks = [mark for line in series for mark in line.marks]
    chance = [] if measure.chance is None else [measure.chance]
    shown = [*chance, *(value for mark in marks for value in (mark.value, mark.low, mark.high, *mark.seeds))]
    low, high = min(shown), max(shown)
    room = 0.08 * (high - low) or 0.1 * abs(high) or 1.0
    axes.set_ylim(max(low - room, 0.0) if low >= 0 else low - room, high + room)
    axes.yaxis.set_major_locator(MaxNLocator(6, steps=ROUND))
    # What the heights are, level above their axis.
    axes.text(-0.06, 1.05, lines_of(measure.name, LETTERS)[0], transform=axes.transAxes, color=SOFT)
    for height in chance:
        axes.axhline(height, color=SOFT, linewidth=1, linestyle=DOTS)
        told = f"chance\n{measure.tell(height)}"
        axes.text(1.015, height, told, transform=axes.get_yaxis_transform(), va="center", color=SOFT)


def _step(shots: float) -> float:
    return math.log2(shots) + 1 if shots >= 1 else shots


def _apart(places: Sequence[float], least: float) -> list[int]:
    """Indices of ascending places of which no two are closer than `least`."""
    kept: list[int] = []
    for number, place in enumerate(places):
        if not kept or place - places[kept[-1]] >= least:
            kept.append(number)
    return kept


def _draw_control(
    axes: Axes, control: Control, measure: Measure, top: float, head: Sequence[str], words: Sequence[str]
) -> None:
    """Draw a row below `top`: the lines of a heading, those of the control, its two bars."""
    aside = axes.get_yaxis_transform()
    outcome, colour = MET[control.met]
    for number, line in enumerate([*head, *words]):
        top += WORDS_HIGH
        axes.text(0, top - 0.05, line, transform=aside, weight="bold" if number < len(head) else "normal")
    axes.text(1.0, top - 0.05, EXPECTED[control.expected], transform=aside, ha="right", color=SOFT)
    axes.text(1.03, top - 0.05, outcome, transform=aside, color=colour, weight="bold")
    first, second, thick = top + 0.5 * BAR_HIGH, top + 1.5 * BAR_HIGH, 0.86 * BAR_HIGH
    axes.barh(first, control.unchanged, thick, facecolor="white", edgecolor=INK, linewidth=0.9)
    axes.barh(second, control.value, thick, color=COLOURS[0], edgecolor="white", hatch="////", linewidth=0)
    bounds = [control.low, control.high]
    axes.plot(bounds, [second, second], color=INK, linewidth=1.5, marker="|", markersize=7)
    axes.text(1.03, first, measure.tell(control.unchanged), transform=aside, va="center")
    interval = measure.tell_interval(control.value, *bounds)
    axes.text(1.03, second, interval, transform=aside, va="center")
    if measure.chance is not None:
        across = [measure.chance, measure.chance]
        axes.plot(across, [top, top + 2 * BAR_HIGH], color=SOFT, linewidth=1, linestyle=DOTS)


def _set_lengths(axes: Axes, controls: Sequence[Control], measure: Measure) -> None:
    ends = [0.0 if measure.chance is None else measure.chance]
    ends += [end for control in controls for end in (control.unchanged, control.high, control.low)]
    axes.set_xlim(min(0.0, *ends), max(ends) * 1.02 or 1.0)
    axes.xaxis.set_major_locator(MaxNLocator(6, steps=ROUND))
    axes.set_yticks([])
    axes.spines["left"].set_visible(False)
    axes.tick_params(length=3)
    axes.set_xlabel(lines_of(measure.name, LETTERS)[0], loc="left")


def _described(series: Sequence[Series], measure: Measure, unit: str) -> str:
    """All numbers in words."""
    told = [f"{measure.name} over {unit}, with 95 % intervals."]
    if measure.chance is not None:
        told.append(f"Chance: {measure.tell(measure.chance)}.")
    for line in series:
        values = [
            f"{mark.place:g} {unit} {measure.tell_interval(mark.value, mark.low, mark.high)}"
            for mark in line.marks
        ]
        told.append(f"{line.name}: {'; '.join(values)}.")
    return " ".join(told)


def _told(control: Control, measure: Measure) -> str:
    difference = (control.difference, control.difference_low, control.difference_high)
    return (
        f"{control.group}, {control.label}: "
        f"{measure.tell_interval(control.value, control.low, control.high)}, unchanged "
        f"{measure.tell(control.unchanged)}, difference {measure.tell_interval(*difference)}; "
        f"{EXPECTED[control.expected]}: {MET[control.met][0]}."
    )
