"""The optimiser step: mean loss over the scored targets of all workers, whatever their share."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from mmicl_core.methods.base import Batch

__all__ = ["Engine", "StepMetrics", "learning_rate", "train_step"]


class Engine(Protocol):
    """What takes gradients: DeepSpeed in `pipelines.zero3`, ten lines of torch in tests."""

    world_size: int

    def forward(self, batch: Any) -> Tensor:
        """Negative log-likelihood of every scored target."""
        ...

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of one micro-batch; averages over workers and micro-batches."""
        ...

    def step(self, learning_rate: float) -> float:
        """Update the parameters and forget the gradient; gives the gradient's norm."""
        ...

    def sum_over_workers(self, value: float) -> float:
        """Sum a number over all workers."""
        ...


@dataclass(frozen=True)
class StepMetrics:
    """What one step measured."""

    loss: float
    targets: int
    gradient_norm: float


def train_step(engine: Engine, micro_batches: Sequence[Batch], rate: float) -> StepMetrics:
    """One optimiser step over the micro-batches of this worker.

    The loss is the mean over all targets of the step on all workers, so neither padding nor an uneven
    split changes the gradient. The engine averages over workers and micro-batches; the scale undoes it.
    """
    targets = engine.sum_over_workers(float(sum(batch.num_scored for batch in micro_batches)))
    scale = engine.world_size * len(micro_batches) / targets
    loss_sum = 0.0
    for batch in micro_batches:
        nll = engine.forward(batch)
        engine.backward(nll.sum() * scale)
        loss_sum += float(nll.detach().sum())
    norm = engine.step(rate)
    return StepMetrics(engine.sum_over_workers(loss_sum) / targets, int(targets), norm)


def learning_rate(step: int, steps: int, warmup: int, peak: float) -> float:
    """Linear rise over `warmup` steps, then a cosine down to a hundredth of the peak."""
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    return peak * (0.01 + 0.99 * (1 + math.cos(math.pi * progress)) / 2)
