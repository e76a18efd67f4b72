"""A training run as a page to look at: its curves, and the numbers that its log does not repeat.

A line of the log holds `step`, and of the following what was measured; what is None or missing is left out,
what is not finite interrupts its curve:

    loss, validation_loss           mean over the targets of a step, or over held-out episodes
    learning_rate, gradient_norm
    data_seconds, compute_seconds   of one step: waiting for its batches, and the rest
    tokens_per_second, episodes_per_second
                                    over all workers
    skipped                         steps since the line before whose gradient was not finite
    mappings                        what was counted so far, by reason
"""

from __future__ import annotations

import json
import math
from bisect import bisect_left, insort
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from mmicl_core.data.files import write_atomic
from mmicl_core.evaluation.page_charts import Line, line_chart
from mmicl_core.evaluation.pages import facts_table, render_page, text

__all__ = ["render_training", "write_training_page"]

Points = list[tuple[int, float]]

UNDER = "step"
# A curve is summed up by medians over this share of it to both sides.
SMOOTHED_SHARE, LEAST_SMOOTHED = 0.025, 12
BYTES = ("bytes", "KiB", "MiB", "GiB", "TiB")
LABELS = {
    "world_size": "workers",
    "zero_stage": "ZeRO stage",
    "global_batch": "episodes of a step",
    "micro_batch": "episodes at once, on a worker",
    "micro_batches": "micro-batches of a step, on a worker",
    "trained_parameters": "trained parameters",
    "parameters": "parameters",
    "peak_memory_bytes": "peak memory of a worker",
}


def write_training_page(metrics_file: Path, about: Mapping[str, Any], page: Path) -> None:
    """Write the page of a run that has ended or goes on.

    Args:
        metrics_file: the log, a JSON object a line; a last line without an end is still being written.
        about: see `render_training`.
    """
    whole, _, _ = metrics_file.read_text(encoding="utf-8").rpartition("\n")
    lines = [json.loads(line) for line in whole.splitlines()]
    write_atomic(page, render_training(lines, about))


def render_training(lines: Sequence[Mapping[str, Any]], about: Mapping[str, Any]) -> str:
    """The page as HTML.

    Args:
        lines: of the log, by step.
        about: facts of the run by name. `name` is its title, `steps` how many were asked for; names ending in
            `_bytes` are sizes; all others are shown as they are.
    """
    title = f"Training {about['name']}" if "name" in about else "Training"
    parts = [f"<h1>{text(title)}</h1>"]
    if lines:
        parts += _charts(lines)
    else:
        parts.append("<p class=lead>No step has been logged.</p>")
    facts = _measured(lines, about.get("steps")) | _told(about)
    if facts:
        parts += ["<h2>The run</h2>", facts_table(facts)]
    return render_page(title, parts)


def _charts(lines: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    loss = [
        *_summed_up("loss", _points(lines, "loss")),
        Line("validation loss", _points(lines, "validation_loss")),
    ]
    seconds = [
        *_summed_up("waiting for data", _points(lines, "data_seconds")),
        *_summed_up("computing", _points(lines, "compute_seconds")),
    ]
    norm = _summed_up("gradient norm", _points(lines, "gradient_norm"))
    speed = _summed_up("tokens", _points(lines, "tokens_per_second"))
    if loss[0].faint:
        yield "<p class=soft>Thin: lines of the log. Thick: their running median.</p>"
    yield from _chart("Loss", loss, logarithmic=True)
    yield from _chart("Learning rate", [Line("learning rate", _points(lines, "learning_rate"))])
    yield from _chart("Gradient norm", norm, logarithmic=True)
    yield from _chart("Seconds of a step", seconds)
    yield from _chart("Tokens per second", speed)


def _chart(title: str, lines: Sequence[Line], *, logarithmic: bool = False) -> Iterator[str]:
    shown = [line for line in lines if _finite(line.points)]
    if shown:
        yield f"<h2>{title}</h2>"
        yield line_chart(title, shown, UNDER, logarithmic=logarithmic)


def _points(lines: Sequence[Mapping[str, Any]], name: str) -> Points:
    return [(line["step"], float(line[name])) for line in lines if line.get(name) is not None]


def _finite(points: Sequence[tuple[int, float]]) -> list[float]:
    return [value for _, value in points if math.isfinite(value)]


def _summed_up(name: str, points: Points) -> list[Line]:
    """A curve, with its running median where it is long enough to need one."""
    if len(points) < LEAST_SMOOTHED:
        return [Line(name, points)]
    return [Line(name, points, faint=True), Line(name, _smooth(points))]


def _smooth(points: Points) -> Points:
    reach = max(1, round(SMOOTHED_SHARE * len(points)))
    medians: Points = []
    window: list[float] = []
    start = end = 0
    for place, (step, _) in enumerate(points):
        # As far to one side as to the other, so that the ends of a slope stay where they are.
        near = min(reach, place, len(points) - 1 - place)
        while end <= place + near:
            if math.isfinite(points[end][1]):
                insort(window, points[end][1])
            end += 1
        while start < place - near:
            if math.isfinite(points[start][1]):
                del window[bisect_left(window, points[start][1])]
            start += 1
        middle = len(window) // 2
        medians.append((step, (window[middle] + window[~middle]) / 2 if window else math.nan))
    return medians


def _measured(lines: Sequence[Mapping[str, Any]], asked: int | None) -> dict[str, str]:
    """What the log says in numbers."""
    if not lines:
        return {}
    facts = {"steps": f"{lines[-1]['step']:,}" + (f" of {asked:,}" if asked is not None else "")}
    losses = _points(lines, "loss")
    if losses:
        facts["loss"] = f"{losses[0][1]:.3f} at first, {losses[-1][1]:.3f} at last"
    scores = [point for point in _points(lines, "validation_loss") if math.isfinite(point[1])]
    if scores:
        step, best = min(scores, key=lambda point: point[1])
        facts["validation loss"] = f"lowest {best:.3f}, at step {step:,}; {scores[-1][1]:.3f} at last"
    speeds = [
        f"{median(values):,.4g} {unit}" if median(values) < 1000 else f"{median(values):,.0f} {unit}"
        for unit in ("tokens", "episodes")
        if (values := _finite(_points(lines, f"{unit}_per_second")))
    ]
    if speeds:
        facts["median speed"] = " or ".join(speeds) + " per second"
    waited, computed = (sum(_finite(_points(lines, f"{kind}_seconds"))) for kind in ("data", "compute"))
    if waited + computed > 0:
        facts["waiting for data"] = f"{100 * waited / (waited + computed):.3g} % of the time of a step"
    skipped = sum(_finite(_points(lines, "skipped")))
    if skipped:
        facts["skipped steps"] = f"{skipped:.0f}, whose gradient was not finite"
    counted = {
        name: _value(value) for name, value in lines[-1].items() if isinstance(value, Mapping) and value
    }
    return facts | counted


def _told(about: Mapping[str, Any]) -> dict[str, str]:
    facts = {}
    for name, value in about.items():
        if name not in ("name", "steps") and value is not None:
            label = LABELS.get(name, name.removesuffix("_bytes").replace("_", " "))
            facts[label] = _size(value) if name.endswith("_bytes") else _value(value)
    return facts


def _value(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {_value(below)}" for name, below in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(map(_value, value))
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _size(count: float) -> str:
    power = min(int(math.log2(max(count, 1)) // 10), len(BYTES) - 1)
    return f"{count / 1024**power:.4g} {BYTES[power]}"
