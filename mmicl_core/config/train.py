"""Settings of training and of evaluation."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from mmicl_core.config.base import Config
from mmicl_core.config.episodes import Part

__all__ = ["ADAPTED", "Condition", "EvaluateConfig", "TrainConfig"]

Condition = Literal[
    "zero_shot",
    "full",
    "swapped",
    "true_name",
    "kind",
    "adapted_zero_shot",
    "adapted",
    "adapted_swapped",
    "adapted_kind",
    "mixed",
]
ADAPTED: tuple[Condition, ...] = (
    "adapted_zero_shot",
    "adapted",
    "adapted_swapped",
    "adapted_kind",
    "mixed",
)
"""Conditions that ask the model with its adapter."""


class TrainConfig(Config):
    """One training run. What follows from the hardware is derived and printed, not set here."""

    steps: int = Field(default=600, ge=1)
    """Optimiser steps."""

    global_batch: int = Field(default=32, ge=1)
    """Episodes (or pictures) of one optimiser step, over all workers."""

    micro_batch: int = Field(default=16, ge=1)
    """Most episodes that one worker puts through the model at once."""

    learning_rate: float = Field(default=3e-3, gt=0)
    """Peak learning rate of AdamW; it falls to a hundredth of this along a cosine."""

    muon_learning_rate: float | None = Field(default=None, gt=0)
    """Peak learning rate of Muon, which then takes all matrices but embeddings; None leaves them to
    AdamW. From nothing, Muon needs several times fewer pictures; an aggregator needs none of it."""

    warmup_steps: int = Field(default=50, ge=0)
    """Steps over which the learning rate rises from 0."""

    weight_decay: float = Field(default=0.0, ge=0)
    """AdamW weight decay of matrices; vectors have none."""

    gradient_clip: float = Field(default=1.0, gt=0)
    """Largest norm of the gradient; without effect where Muon trains."""

    num_workers: int = Field(default=2, ge=1)
    """Processes that train together, with parameters partitioned over them (ZeRO-3); one GPU each
    where there are GPUs."""

    threads_per_worker: int = Field(default=1, ge=1)
    """CPU threads of one worker's arithmetic, reserved in the cluster as CPUs."""

    autocast: bool | Literal["auto"] = False
    """Without a GPU, multiply matrices in bf16 and keep everything else in 32 bits; `auto` does so where the
    processor multiplies bf16 in hardware (AMX), as one without takes many times longer for it. On a GPU
    training is in bf16 anyway."""

    attention: Literal["sdpa", "eager", "flash_attention_2"] = "sdpa"
    """The attention code of transformers that training runs; beside `autocast`, `eager` takes less time for
    prompts of a few hundred tokens."""

    picture_variants: int = Field(default=1, ge=1)
    """Versions of each training picture whose features are computed once: the picture itself and
    augmented ones."""

    checkpoint_every: int = Field(default=200, ge=1)
    """Steps between checkpoints."""

    log_every: int = Field(default=10, ge=1)
    """Steps between lines of the training log."""

    seed: int = 0
    """Seeds the order of the episodes, augmentation and initialisation."""

    @model_validator(mode="after")
    def _batch_is_divisible(self) -> Self:
        if self.global_batch % self.num_workers:
            raise ValueError(
                f"global_batch ({self.global_batch}) must be a multiple of num_workers "
                f"({self.num_workers}): every worker takes the same share of a step"
            )
        return self


class EvaluateConfig(Config):
    """Naming concepts from demonstrations."""

    queries: int = Field(default=200, ge=1)
    """Episodes asked."""

    shots_per_class: tuple[int, ...] = (4,)
    """Demonstrations of each class; one table row for each number."""

    part: Part = "held_out_concepts"
    """Pictures that the queries come from."""

    conditions: tuple[Condition, ...] = ("zero_shot", "full", "adapted", "swapped")
    """What the model is shown: nothing, full demonstrations, or these with the two names swapped. `true_name`
    and `kind` show nothing and ask what the model knows the picture as. With an adapter: `adapted_zero_shot`,
    `adapted`, `adapted_swapped` and `adapted_kind`, the same as the adapter takes them, and `mixed`, the last
    demonstration written out in full behind the others."""

    adapter: str | None = "embedded:nano_aim"
    """Folder of the adapter behind the adapted conditions."""

    max_new_tokens: int = Field(default=12, ge=1)
    """Tokens of an answer, greedily chosen, before it is cut."""

    batch: int = Field(default=32, ge=1)
    """Queries answered at once."""

    num_workers: int = Field(default=2, ge=1)
    """Processes that evaluate side by side."""

    seed: int = 1
    """Seeds the episodes."""

    @model_validator(mode="after")
    def _adapted_has_an_adapter(self) -> Self:
        if self.adapter is None and any(condition in ADAPTED for condition in self.conditions):
            raise ValueError(
                f"conditions {list(self.conditions)} ask the model with its adapter, but adapter is None: "
                f"name the folder of one, or leave {', '.join(ADAPTED)} out"
            )
        return self
