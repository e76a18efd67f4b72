"""What tests of tasks share: answers -> statistics -> numbers, and what weights have to mean."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mmicl_core.evaluation.tasks.base import Columns, Item, Metric, Prediction, Task

__all__ = ["columns_of", "numbers_of", "weights_repeat_items", "write_json_lines"]


def columns_of(task: Task, items: Sequence[Item], said: Sequence[str | Prediction]) -> Columns:
    """Statistics of all answers by name."""
    predictions = [Prediction(answer) if isinstance(answer, str) else answer for answer in said]
    scores = task.score_all(items, predictions)
    names = scores[0].keys()
    assert all(score.keys() == names for score in scores)
    return {name: np.array([score[name] for score in scores]) for name in names}


def numbers_of(metrics: Sequence[Metric], columns: Columns) -> dict[str, float]:
    """Metrics by name, every answer with the weight 1, before scaling; those that are not defined are nan."""
    ones = np.ones(len(next(iter(columns.values()))))
    with np.errstate(invalid="ignore"):
        return {metric.name: metric.of(columns, ones) for metric in metrics}


def weights_repeat_items(metrics: Sequence[Metric], columns: Columns, groups: Sequence[str]) -> None:
    """Check that an answer of the weight n counts as n answers of the weight 1, and of 0 as none.

    Args:
        groups: which answers have the same weight; empty stands for one of its own.
    """
    rng = np.random.default_rng(5)
    numbers = {group or str(place): int(rng.integers(4)) for place, group in enumerate(groups)}
    weights = np.array([numbers[group or str(place)] for place, group in enumerate(groups)])
    repeated = {name: np.repeat(column, weights) for name, column in columns.items()}
    assert 0 in weights and weights.max() > 1
    for metric in metrics:
        with np.errstate(invalid="ignore"):
            expected = metric.of(repeated, np.ones(int(weights.sum())))
            assert metric.of(columns, weights.astype(float)) == pytest.approx(expected, nan_ok=True)


def write_json_lines(path: Path, records: Sequence[Mapping[str, Any]]) -> None:
    """A file with a record a line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
