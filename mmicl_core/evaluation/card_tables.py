"""The tables of a card: every number of its charts, and those that have no chart.

All cells that are words of a card go through `text`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from html import escape
from typing import Any

from mmicl_core.evaluation.drawing import Measure
from mmicl_core.evaluation.pages import text

__all__ = [
    "Told",
    "at_a_glance",
    "comparisons_table",
    "compression_table",
    "controls_table",
    "curves_of",
    "difference_told",
    "interval_told",
    "measure_of",
    "number_told",
    "probability_told",
    "shots_of",
    "values_table",
]

Told = Mapping[str, Any]
"""A part of a card, as `render_card` takes it."""

MINUS, DASH = "\u2212", "\u2013"
EXPECTED = {"falls": "falls", "stays": "stays", "chance": "falls to chance"}
MET = {True: ("right", "\u2713 yes"), False: ("wrong", "\u2717 no"), None: ("soft", "? cannot be told")}


def at_a_glance(tasks: Sequence[Told]) -> Iterator[str]:
    """Of several tasks the ends of all curves; of one, its chart says it."""
    rows = []
    for task in tasks:
        for curve in curves_of(task):
            points = sorted(curve["points"], key=lambda point: point["shots"])
            ends = [
                f"{shots_of(point['shots'])}: {_stacked(point, task)}" for point in (points[0], points[-1])
            ]
            met = _counted([control for control in task["controls"] if control["model"] == curve["model"]])
            rows.append([text(task["label"]), text(curve["model"]), *ends, _chance(task), met])
    if not rows:
        yield "<p class=lead>No task was measured.</p>"
    if len(tasks) > 1 and rows:
        heads = ("task", "model", "fewest shots", "most shots", "chance", "controls as expected")
        yield _table(heads, rows, (2, 3, 4))


def values_table(task: Told, curves: Sequence[Told]) -> str:
    """Values and intervals of a task by model and shots."""
    shots = sorted({point["shots"] for curve in curves for point in curve["points"]})
    rows = []
    for curve in curves:
        values = {point["shots"]: _stacked(point, task) for point in curve["points"]}
        rows.append([text(curve["model"]), *(values.get(count, DASH) for count in shots)])
    return _table(("model", *map(shots_of, shots)), rows, range(1, len(shots) + 1))


def controls_table(controls: Sequence[Told], task: Told) -> str:
    """What controls change, and whether it was expected."""
    rows = []
    for control in controls:
        kind, met = MET[control["met"]]
        asked = [text(control["model"]), text(control["label"]), str(control["shots"])]
        found = [difference_told(control, task, "difference_"), EXPECTED[control["expected"]]]
        rows.append([*asked, *found, f"<span class={kind}>{met}</span>"])
    return _table(("model", "control", "shots", "difference", "expected", "met"), rows, (2, 3))


def compression_table(rows: Sequence[Told], task: Told) -> str:
    """Score and cost of a task's prompts by model and shots."""
    heads = ("model", "shots", task["metric"], "prompt tokens", "KV cache, MiB", "first token, ms")
    told = [
        [
            text(row["model"]),
            str(row["shots"]),
            DASH if row["value"] is None else interval_told(row, task),
            number_told(row["prompt_tokens"], "{:,.0f}"),
            number_told(row["kv_bytes"], "{:,.1f}", 1 / 2**20),
            number_told(row["ttft_ms"], "{:,.0f}"),
            number_told(row["tokens_per_second"], "{:,.1f}"),
        ]
        for row in rows
    ]
    return _table((*heads, "tokens per second"), told, range(1, 7))


def comparisons_table(tasks: Sequence[Told]) -> Iterator[str]:
    """All comparisons of all tasks, with what has to be known to read them."""
    rows = [
        [
            text(task["label"]),
            text(found["first"]) + _other(found),
            _compared_shots(found),
            difference_told(found, task),
            escape(probability_told(found["p_value"])),
            _smallest(found, task),
            text(found["method"]),
        ]
        for task in tasks
        for found in task["comparisons"]
    ]
    if rows:
        yield "<h2>All comparisons</h2>"
        told = (
            "Differences are the second minus the first on the same questions, with 95 % intervals. Each "
            f"p-value stands for itself: of {len(rows)} comparisons, those below {0.05 / len(rows):.2g} are "
            "significant at 5 % among all (Bonferroni). Smallest: the true difference that as many questions "
            "would show with a power of 80 %."
        )
        if any(found.get("best_of_each") for task in tasks for found in task["comparisons"]):
            told += " Best: each at its best number of shots, which these same answers chose."
        yield f"<p class=soft>{told}</p>"
        heads = ("task", "first \u2192 second", "shots", "difference", "p", "smallest", "test")
        yield _table(heads, rows, (2, 3, 4, 5))


def curves_of(task: Told) -> list[Told]:
    """The curves of a task that have a point."""
    return [curve for curve in task["curves"] if curve["points"]]


def measure_of(task: Told) -> Measure:
    """What the values of a task are."""
    scale = task["scale"]
    name = task["metric"] if scale == 1 else f"{task['metric']} \u00d7 {scale:g}"
    # A share that is not scaled says little with one digit.
    digits = 1 if scale >= 10 else 3
    return Measure(name, None if task["chance"] is None else task["chance"] * scale, digits)


def shots_of(count: int) -> str:
    """So many shots, in words."""
    return f"{count} shot" + "s" * (count != 1)


def _chance(task: Told) -> str:
    measure = measure_of(task)
    return DASH if measure.chance is None else measure.tell(measure.chance)


def _counted(controls: Sequence[Told]) -> str:
    if not controls:
        return "none made"
    met = [control["met"] for control in controls]
    unknown = f", {met.count(None)} cannot be told" if None in met else ""
    return f"{met.count(True)} of {len(met)}{unknown}"


def number_told(value: float | None, form: str, factor: float = 1) -> str:
    """A number in a form, or a dash where there is none."""
    return DASH if value is None else form.format(value * factor)


def _other(found: Told) -> str:
    return text(f"\u2192 {found['second']}") if found["second"] != found["first"] else ""


def _compared_shots(found: Told) -> str:
    first, second = found.get("first_shots", found["shots"]), found["shots"]
    best = "best: " if found.get("best_of_each") else ""
    return f"{best}{second}" if first == second else f"{best}{first} \u2192 {second}"


def _smallest(found: Told, task: Told) -> str:
    least = found["smallest_difference"]
    return DASH if least is None else measure_of(task).tell(least * task["scale"])


def probability_told(value: float) -> str:
    """A p-value."""
    return "< 0.001" if value < 0.001 else f"{value:.3f}"


def interval_told(told: Told, task: Told) -> str:
    """A value of a task with its bounds."""
    return measure_of(task).tell_interval(*(told[name] * task["scale"] for name in ("value", "low", "high")))


def _stacked(told: Told, task: Told) -> str:
    value, bounds = interval_told(told, task).split(" ", 1)
    return f"{value}<br><span class=soft>{bounds}</span>"


def difference_told(told: Told, task: Told, bounds: str = "") -> str:
    """A difference with its bounds, each with its sign."""
    digits = measure_of(task).digits
    value, low, high = (
        f"{told[name] * task['scale']:+.{digits}f}".replace("-", MINUS)
        for name in ("difference", f"{bounds}low", f"{bounds}high")
    )
    return f"{value} [{low}, {high}]"


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]], numbers: Sequence[int]) -> str:
    """A table of cells that are HTML.

    Args:
        numbers: columns of numbers, which stand right. Before them stand names, each told once for the rows
            that share it.
    """
    kinds = [" class=number" if place in numbers else "" for place in range(len(heads))]
    first = "".join(f"<th{kind}>{escape(head)}</th>" for kind, head in zip(kinds, heads, strict=True))
    body = []
    for number, row in enumerate(rows):
        body.append("<tr>")
        for place, (kind, cell) in enumerate(zip(kinds, row, strict=True)):
            span = _span(rows, number, place) if place < numbers[0] else 1
            body.append(f"<td{kind} rowspan={span}>{cell}</td>" if span else "")
        body.append("</tr>")
    return f"<div class=wide><table><tr>{first}</tr>{''.join(body)}</table></div>"


def _span(rows: Sequence[Sequence[str]], number: int, place: int) -> int:
    """How many rows share a name and all names before it; 0 where a row above tells it."""
    names = [list(row[: place + 1]) for row in rows]
    if number and names[number - 1] == names[number]:
        return 0
    others = (other for other in range(number, len(rows)) if names[other] != names[number])
    return next(others, len(rows)) - number
