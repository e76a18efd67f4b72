"""The learning rate of a step: a function of the step and the settings, so that nothing of it is kept."""

from __future__ import annotations

import math

from mmicl_core.config.train import TrainConfig

__all__ = ["rate_of_step"]


def rate_of_step(step: int, train: TrainConfig) -> float:
    """The share of the peak rates, 0 to 1, that step number `step` (from 0) takes.

    A line up over `warmup_steps`, then along a cosine or a line down to `final_rate`, or constant.
    """
    if step < train.warmup_steps:
        return (step + 1) / train.warmup_steps
    if train.schedule == "constant":
        return 1.0
    progress = (step - train.warmup_steps) / max(1, train.steps - train.warmup_steps)
    left = 1 - progress if train.schedule == "linear" else (1 + math.cos(math.pi * progress)) / 2
    return train.final_rate + (1 - train.final_rate) * left
