"""What an evaluation found: scores of all cells as curves, controls, comparisons, and a verdict.

A score is computed from the statistics of all answers of a cell, of several seeds together; its bounds and
every comparison draw and exchange whole questions. Values are between 0 and 1; `scale` makes them what papers
show.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Any

import numpy as np

from mmicl_core.config.evaluate import Control
from mmicl_core.evaluation.cells import Cell, Layout
from mmicl_core.evaluation.controls import CONTROLS, expected
from mmicl_core.evaluation.statistics import Comparison, compare, interval_of, over_seeds
from mmicl_core.evaluation.tasks.base import Columns, Metric, Numbers

__all__ = ["Scored", "judge", "summarise"]

SIGNIFICANT = 0.05
MARGIN = 0.1
"""A score that changes by less than this stays, and a score that falls by less has not fallen."""


@dataclass(frozen=True)
class Scored:
    """What the answers of one model to one cell are worth."""

    cell: Cell
    statistics: tuple[tuple[Mapping[str, float], ...], ...]
    """Of each seed's model, of each query."""
    prompt_tokens: float | None = None
    """Positions of a prompt, on average; None where nobody says."""

    def columns(self, metric_columns: Sequence[int] | None = None, copies: int = 1) -> Columns:
        """By name, one seed after the other.

        Args:
            metric_columns: places of the queries that are taken; None takes all.
            copies: how often the whole is repeated, to stand beside as many seeds.
        """
        rows = [
            row
            for of_seed in self.statistics
            for row in (
                [of_seed[place] for place in metric_columns] if metric_columns is not None else of_seed
            )
        ] * copies
        return {name: np.array([row[name] for row in rows]) for name in rows[0]}

    @property
    def ids(self) -> list[str]:
        """The queries."""
        return [shown.query.id for shown in self.cell.shown]

    def groups(self, seeds: int) -> list[str]:
        """What is drawn together; of several seeds, all answers to one question."""
        named = [shown.query.group for shown in self.cell.shown]
        if seeds == 1:
            return named
        return [group or name for group, name in zip(named, self.ids, strict=True)] * seeds


Scores = Mapping[tuple[str, int, Control | None], Scored]
"""By model, shots and control."""


def summarise(layout: Layout, scores: Scores, label: str, seed: int) -> dict[str, Any]:
    """The results of one task, as plain values.

    Args:
        label: what people call the task.
        seed: of the bootstrap.
    """
    metric, task = layout.task.metrics[0], layout.task
    models = list(dict.fromkeys(model for model, _, _ in scores))
    plain = [cell for cell in layout.cells if cell.control is None]
    return {
        "task": task.name,
        "label": label,
        "source": task.source,
        "metric": metric.name,
        "scale": metric.scale,
        "chance": metric.chance,
        "queries": len(layout.questions.queries),
        "left_out": dict(layout.left_out),
        "curves": [
            {
                "model": model,
                "points": [_point(task.metrics, scores[model, cell.shots, None], seed) for cell in plain],
            }
            for model in models
        ],
        "controls": [
            _control(layout, metric, scores, model, cell, seed)
            for model in models
            for cell in layout.cells
            if cell.control is not None
        ],
        "comparisons": [_compare(metric, scores, *pair, seed=seed) for pair in _pairs(models, plain)],
    }


def _point(metrics: Sequence[Metric], scored: Scored, seed: int) -> dict[str, Any]:
    columns, seeds = scored.columns(), len(scored.statistics)
    interval = interval_of(_mean_of_seeds(metrics[0], seeds), columns, scored.groups(seeds), seed)
    by_seed = [_value(metrics[0], of_seed) for of_seed in scored.statistics]
    spread = over_seeds(by_seed)
    return {
        "shots": scored.cell.shots,
        "value": spread.mean,
        "low": interval.low,
        "high": interval.high,
        "seeds": by_seed if seeds > 1 else [],
        "deviation": spread.deviation,
        "note": scored.cell.note or None,
        "prompt_tokens": scored.prompt_tokens,
        "metrics": {
            metric.name: over_seeds([_value(metric, of_seed) for of_seed in scored.statistics]).mean
            for metric in metrics
        },
    }


def _mean_of_seeds(metric: Metric, seeds: int) -> Metric:
    """A metric of each seed's answers, averaged over seeds that stand one after the other."""

    def of(columns: Columns, weights: Numbers) -> float:
        parts = np.split(np.arange(len(weights)), seeds)
        return fmean(
            metric.of({name: column[part] for name, column in columns.items()}, weights[part])
            for part in parts
        )

    return metric if seeds == 1 else replace(metric, of=of)


def _value(metric: Metric, statistics: Sequence[Mapping[str, float]]) -> float:
    columns = {name: np.array([row[name] for row in statistics]) for name in statistics[0]}
    return metric.of(columns, np.ones(len(statistics)))


def _control(
    layout: Layout, metric: Metric, scores: Scores, model: str, cell: Cell, seed: int
) -> dict[str, Any]:
    assert cell.control is not None
    changed, whole = scores[model, cell.shots, cell.control], scores[model, cell.shots, None]
    # A control may not apply to all queries: both are scored on those it does.
    at = {name: place for place, name in enumerate(whole.ids)}
    places, seeds = [at[name] for name in changed.ids], len(changed.statistics)
    before, after, groups = whole.columns(places), changed.columns(), changed.groups(seeds)
    metric = _mean_of_seeds(metric, seeds)
    interval, compared = (
        interval_of(metric, after, groups, seed),
        compare(metric, before, after, groups, seed),
    )
    direction = expected(cell.control, own=layout.task.needs_its_own)
    return {
        "model": model,
        "shots": cell.shots,
        "control": cell.control,
        "label": CONTROLS[cell.control],
        "expected": direction,
        "queries": len(places),
        "value": interval.value,
        "low": interval.low,
        "high": interval.high,
        "unchanged": interval_of(metric, before, groups, seed).value,
        "difference": compared.difference,
        "difference_low": compared.low,
        "difference_high": compared.high,
        "p_value": compared.p_value,
        "met": _is_met(direction, compared),
    }


def _is_met(direction: str, compared: Comparison) -> bool | None:
    """Whether the score went where it should; None where the sample cannot tell."""
    if direction == "falls":
        if compared.low > -MARGIN:
            return False
        return True if compared.high < 0 and compared.p_value < SIGNIFICANT else None
    if compared.low > -MARGIN and compared.high < MARGIN:
        return True
    return False if compared.high < 0 or compared.low > 0 else None


Pair = tuple[tuple[str, int], tuple[str, int]]


def _pairs(models: Sequence[str], plain: Sequence[Cell]) -> Iterator[Pair]:
    """Each model with more shots beside itself with none, and beside the first model at the same number."""
    shots = [cell.shots for cell in plain]
    for model in models:
        yield from (((model, shots[0]), (model, count)) for count in shots[1:])
    for model in models[1:]:
        yield from (((models[0], count), (model, count)) for count in shots)
    yield from (((models[0], -1), (model, -1)) for model in models[1:])


def _compare(
    metric: Metric, scores: Scores, first: tuple[str, int], second: tuple[str, int], *, seed: int
) -> dict[str, Any]:
    best = first[1] < 0
    (one, shots_of_one), (other, shots_of_other) = (_best(metric, scores, *pair) for pair in (first, second))
    mine, theirs = scores[one, shots_of_one, None], scores[other, shots_of_other, None]
    seeds = math.lcm(len(mine.statistics), len(theirs.statistics))
    compared = compare(
        _mean_of_seeds(metric, seeds),
        mine.columns(copies=seeds // len(mine.statistics)),
        theirs.columns(copies=seeds // len(theirs.statistics)),
        mine.groups(seeds),
        seed,
    )
    told = vars(compared) | {"first": one, "second": other, "shots": shots_of_other}
    return told | {"first_shots": shots_of_one, "best_of_each": best}


def _best(metric: Metric, scores: Scores, model: str, shots: int) -> tuple[str, int]:
    """The model at this number of shots, or, below 0, at the number where it is best."""
    if shots >= 0:
        return model, shots
    values = {
        count: over_seeds([_value(metric, of_seed) for of_seed in scored.statistics]).mean
        for (name, count, control), scored in scores.items()
        if name == model and control is None
    }
    return model, max(values, key=lambda count: (values[count], -count))


def judge(summary: Mapping[str, Any], model: str) -> dict[str, Any]:
    """Whether a model learns in context, by one task: it gains by demonstrations, and loses that where a
    control takes away what they say.

    Returns:
        `learns`, None where the sample cannot tell, and `why` in a sentence.
    """
    gains = [
        one
        for one in summary["comparisons"]
        if one["first"] == one["second"] == model and not one["first_shots"] and not one["best_of_each"]
    ]
    mine = [one for one in summary["controls"] if one["model"] == model]
    falling = [one for one in mine if one["expected"] == "falls"]
    # The demonstrations of another query do not even hold the answer that could be copied.
    controls = [one for one in falling if one["control"] != "other"]
    turned = [one for one in mine if one["control"] == "query_rule"]
    scale, metric = summary["scale"], summary["metric"]
    if not gains:
        return {"learns": None, "why": f"{model} was not asked with and without demonstrations."}
    last = gains[-1]
    told = (
        f"{last['shots']} demonstrations change the {metric} of {model} by {scale * last['difference']:+.1f} "
        f"({scale * last['low']:+.1f} to {scale * last['high']:+.1f})"
    )
    ignored = [one["label"] for one in falling if one["met"] is False]
    if last["high"] < MARGIN:
        return {"learns": False, "why": f"{told}."}
    # What is answered without a look at the query loses more than half of what it gained; a demonstration
    # less, that of the other class, may cost a model that learns a little.
    if any(one["difference_high"] < -last["difference"] / 2 for one in turned):
        return {"learns": False, "why": f"{told}, but it falls with {turned[0]['label']}."}
    if ignored:
        return {"learns": False, "why": f"{told}, but it does not fall with {', '.join(ignored)}."}
    if last["low"] <= 0 or last["p_value"] >= SIGNIFICANT:
        return {"learns": None, "why": f"{told}: too few questions to tell."}
    if not controls:
        return {"learns": None, "why": f"{told}, but no control says whether that is learning."}
    if any(one["met"] is None for one in controls):
        return {"learns": None, "why": f"{told}, but the sample is too small for the controls."}
    names = ", ".join(one["label"] for one in controls)
    return {"learns": True, "why": f"{told}, and it falls with {names}."}
