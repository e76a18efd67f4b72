"""The optimiser step: mean loss over the scored targets of all workers, whatever their share.

    vote: what each worker's micro-batches call and score
    forward, backward of each micro-batch: its losses over the targets of all workers
    update, unless the gradient is not finite

The vote keeps workers from waiting for each other for ever: where parameters are spread over them (ZeRO stage
3), all have to call the same modules in the same order.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from mmicl_core.errors import DataError, TrainingError
from mmicl_core.methods.base import ONE_BY_ONE, Batch

__all__ = ["Engine", "MicroBatch", "StepMetrics", "mean_loss", "train_step"]


class Engine(Protocol):
    """What takes gradients: DeepSpeed in `pipelines.zero`, a few lines of torch in tests."""

    rank: int
    world_size: int
    micro_batches: int
    """Micro-batches of each worker in a step."""
    spreads_parameters: bool
    """Whether modules exchange their parameters when they are called."""

    def forward(self, batch: Any) -> Tensor:
        """Negative log-likelihood of every scored target."""
        ...

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of one micro-batch; averages over workers and micro-batches."""
        ...

    def step(self, rate: float) -> float:
        """Update the parameters at a share of their peak rates and forget the gradient; gives its norm. One
        that is not finite updates nothing."""
        ...

    def gather(self, values: Sequence[float]) -> list[list[float]]:
        """Every worker's numbers, by rank; all have to give as many."""
        ...


@dataclass(frozen=True)
class MicroBatch:
    """What one worker puts through the model at once.

    Where workers have unequal shares, the last one of a smaller share is there to keep step with the others,
    and does not count.
    """

    batch: Any
    counts: bool = True
    episodes: tuple[str, ...] = ()
    """Names of the rows, to tell which ones went wrong."""

    @property
    def scored(self) -> int:
        """Targets that count."""
        batch: Batch = self.batch
        return batch.num_scored if self.counts else 0

    @property
    def tokens(self) -> int:
        """Positions of the prompts, without padding, that count; of what is no prompt, none."""
        packed = getattr(self.batch, "packed", None)
        return int(packed.mask_BL.sum()) if packed is not None and self.counts else 0


@dataclass(frozen=True)
class StepMetrics:
    """What one step measured; one without a finite gradient was skipped."""

    loss: float
    targets: int
    gradient_norm: float
    tokens: int = 0
    """Positions of all prompts, without padding."""
    skipped: bool = False
    bad_episodes: tuple[str, ...] = ()
    """Of this worker, those in micro-batches whose loss was not finite."""


def train_step(
    engine: Engine,
    micro_batches: Sequence[MicroBatch],
    calls: Sequence[Mapping[str, int]],
    rate: float,
    at: Callable[[str], None] = lambda _: None,
) -> StepMetrics:
    """One optimiser step over the micro-batches of this worker.

    The loss is the mean over all targets of the step on all workers, so neither padding nor an uneven
    split changes the gradient. The engine averages over workers and micro-batches; the scale undoes it.

    Args:
        calls: what each micro-batch puts through the parts that not every batch needs, `Method.calls`.
        rate: share of the peak learning rates.
        at: told of what comes next.

    Raises:
        DataError: no worker has anything to score.
        TrainingError: the workers would call different modules.
    """
    if len(micro_batches) != engine.micro_batches:
        raise TrainingError(
            f"{len(micro_batches)} micro-batches of a step in which every worker takes {engine.micro_batches}"
        )
    targets = _vote(engine, micro_batches, calls)
    scale = engine.world_size * len(micro_batches) / targets
    loss_sum, bad = 0.0, list[str]()
    for micro in micro_batches:
        at("forward")
        nll = engine.forward(micro.batch)
        loss = float(nll.detach().sum())
        weight = scale if micro.counts else 0.0
        if not math.isfinite(loss):
            # An infinite loss may have a finite gradient, which must not count either.
            weight = math.nan
            bad += micro.episodes
        at("backward")
        engine.backward(nll.sum() * weight)
        loss_sum += loss if micro.counts else 0.0
    at("the update")
    norm = engine.step(rate)
    found = engine.gather([loss_sum, sum(micro.tokens for micro in micro_batches)])
    mean, tokens = sum(loss for loss, _ in found) / targets, int(sum(count for _, count in found))
    return StepMetrics(mean, int(targets), norm, tokens, not math.isfinite(norm), tuple(bad))


@torch.no_grad()
def mean_loss(
    engine: Engine, steps: Iterable[tuple[Sequence[MicroBatch], Sequence[Mapping[str, int]]]]
) -> float:
    """Mean loss over the targets of all workers in several steps, without gradients. Raises as
    `train_step`."""
    loss_sum = targets = 0.0
    for micro_batches, calls in steps:
        targets += _vote(engine, micro_batches, calls)
        for micro in micro_batches:
            nll = engine.forward(micro.batch)
            loss_sum += float(nll.sum()) if micro.counts else 0.0
    return sum(loss for (loss,) in engine.gather([loss_sum])) / targets


def _vote(engine: Engine, micro_batches: Sequence[MicroBatch], calls: Sequence[Mapping[str, int]]) -> float:
    """The targets of all workers, once it is sure that they call the same modules."""
    scored = float(sum(micro.scored for micro in micro_batches))
    given = engine.gather([scored, *(float(count) for called in calls for count in called.values())])
    if engine.spreads_parameters:
        _refuse_different_calls([counts for _, *counts in given], calls)
    targets = sum(told[0] for told in given)
    if not targets:
        raise DataError(
            "no episode of a step has an answer to score "
            f"({', '.join(_names(micro_batches)) or 'none named'})"
        )
    return targets


def _refuse_different_calls(by_rank: Sequence[Sequence[float]], calls: Sequence[Mapping[str, int]]) -> None:
    names = [(number, name) for number, called in enumerate(calls) for name in called]
    for place, (number, name) in enumerate(names):
        counts = [int(counts[place]) for counts in by_rank]
        if min(counts) == 0 < max(counts):
            none, some = counts.index(0), counts.index(max(counts))
            raise TrainingError(
                f"micro-batch {number}: worker {none} has no {name} where worker {some} has "
                f"{counts[some]}. Under ZeRO stage 3 all workers have to call the same modules, or they "
                f"wait for each other for ever: train on episodes that all have {name}, or set "
                "train.zero.stage to 2"
            )
        if name == ONE_BY_ONE and min(counts) < max(counts):
            few, many = counts.index(min(counts)), counts.index(max(counts))
            raise TrainingError(
                f"micro-batch {number}: worker {few} has {counts[few]} pictures where worker {many} has "
                f"{counts[many]}, and this model's vision tower is called for each of them. Under ZeRO stage "
                "3 all workers have to call the same modules, or they wait for each other for ever: train on "
                "written episodes, whose pictures are encoded beforehand, or set train.zero.stage to 2"
            )


def _names(micro_batches: Sequence[MicroBatch]) -> list[str]:
    return [name for micro in micro_batches for name in micro.episodes]
