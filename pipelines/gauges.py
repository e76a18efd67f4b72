"""What Prometheus is told of training and of stages, beside what Ray tells of itself.

    first worker, driver --sums, gauges--> Ray on the same node --/metrics, names behind `ray_`--> Prometheus

Ray passes figures on every ten seconds and drops a gauge that is not set again within twenty. A sum stays, so
whatever can be is one: the time of a step is the rate of the seconds over that of the steps. What was
told in the last seconds of a process may be missing; the log of a run and the manifests of its stages are
complete.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

from ray.util.metrics import Counter, Gauge

if TYPE_CHECKING:
    # Every worker that makes parts of a stage tells figures, and would wait for PyTorch.
    from mmicl_core.training.step import StepMetrics

__all__ = ["FIGURES", "Figure", "TrainingGauges", "tell_part"]


@dataclass(frozen=True)
class Figure:
    """One of our names at Ray's address."""

    about: str
    labels: tuple[str, ...]
    adds_up: bool = True

    def exported(self, name: str) -> str:
        """The name that Prometheus reads."""
        return f"ray_{name}_total" if self.adds_up else f"ray_{name}"


RUN, STAGE, REASON = "run", "stage", "reason"

FIGURES: Mapping[str, Figure] = {
    "mmicl_train_steps": Figure("Optimiser steps.", (RUN,)),
    "mmicl_train_skipped_steps": Figure("Steps that updated nothing.", (RUN, REASON)),
    "mmicl_train_episodes": Figure("Episodes trained on.", (RUN,)),
    "mmicl_train_tokens": Figure("Positions of prompts, without padding.", (RUN,)),
    "mmicl_train_data_seconds": Figure("That the first worker waited for its data.", (RUN,)),
    "mmicl_train_compute_seconds": Figure("That its steps took beside that.", (RUN,)),
    "mmicl_train_operations": Figure("Floating-point operations, at least.", (RUN,)),
    "mmicl_train_step": Figure("The step that was taken last.", (RUN,), adds_up=False),
    "mmicl_train_steps_asked": Figure("Steps that the run asks for.", (RUN,), adds_up=False),
    "mmicl_train_workers": Figure("Workers that take the steps.", (RUN,), adds_up=False),
    "mmicl_train_loss": Figure("Mean loss over the targets of a step.", (RUN,), adds_up=False),
    "mmicl_train_validation_loss": Figure("The same of what is held out.", (RUN,), adds_up=False),
    "mmicl_train_gradient_norm": Figure("Norm of the gradient.", (RUN,), adds_up=False),
    "mmicl_train_learning_rate": Figure("Learning rate.", (RUN,), adds_up=False),
    "mmicl_data_parts": Figure("Parts of a stage that were made.", (STAGE,)),
    "mmicl_data_parts_left": Figure("Parts that are still to be made.", (STAGE,), adds_up=False),
    "mmicl_data_rows_read": Figure("Rows that a stage took in.", (STAGE,)),
    "mmicl_data_rows_kept": Figure("Rows that it gave.", (STAGE,)),
    "mmicl_data_rows_skipped": Figure("Rows that it left out.", (STAGE, REASON)),
}

# Why a step is skipped.
LOSS, GRADIENT = "loss not finite", "gradient not finite"


class TrainingGauges:
    """Tells of a training, on its first worker.

    Args:
        run: name of its stage, as its folder has it.
    """

    def __init__(self, run: str, steps: int, workers: int) -> None:
        self._run = {RUN: run}
        self._steps, self._workers = steps, workers

    def step(
        self,
        number: int,
        metrics: StepMetrics,
        *,
        episodes: int,
        data_seconds: float,
        compute_seconds: float,
        operations: float,
        learning_rate: float,
    ) -> None:
        """Tell of a step, the first of which is number 1."""
        added = {
            "steps": 1,
            "episodes": episodes,
            "tokens": metrics.tokens,
            "data_seconds": data_seconds,
            "compute_seconds": compute_seconds,
            "operations": operations,
        }
        present = {
            "step": number,
            "steps_asked": self._steps,
            "workers": self._workers,
            "loss": metrics.loss,
            "gradient_norm": metrics.gradient_norm,
            "learning_rate": learning_rate,
        }
        for name, value in (added | present).items():
            _tell(f"mmicl_train_{name}", value, self._run)
        if metrics.skipped:
            reason = GRADIENT if math.isfinite(metrics.loss) else LOSS
            _tell("mmicl_train_skipped_steps", 1, self._run | {REASON: reason})

    def validation(self, loss: float) -> None:
        """Tell of the loss on what is held out."""
        _tell("mmicl_train_validation_loss", loss, self._run)


def tell_part(stage: str, counts: Mapping[str, Any], left: int) -> None:
    """Tell of a part of a stage that was made.

    Args:
        counts: of this part, as its stage sums them up.
        left: parts that are still to be made.
    """
    about = {STAGE: stage}
    _tell("mmicl_data_parts", 1, about)
    _tell("mmicl_data_parts_left", left, about)
    _tell("mmicl_data_rows_read", counts.get("read", 0), about)
    _tell("mmicl_data_rows_kept", counts.get("kept", counts.get("built", 0)), about)
    for reason, count in counts.get("skipped", counts.get("skipped_by_reason", {})).items():
        _tell("mmicl_data_rows_skipped", count, about | {REASON: reason})


def _tell(name: str, value: float, labels: Mapping[str, str]) -> None:
    metric = _metric(name)
    if isinstance(metric, Gauge):
        if math.isfinite(value):
            metric.set(value, dict(labels))
    elif value > 0:
        metric.inc(value, dict(labels))


@cache
def _metric(name: str) -> Counter | Gauge:
    figure = FIGURES[name]
    kind = Counter if figure.adds_up else Gauge
    return kind(name, figure.about, figure.labels)
