"""Settings of evaluation."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from mmicl_core.config.base import Config
from mmicl_core.config.episodes import Part

__all__ = ["ADAPTED", "Condition", "EvaluateConfig"]

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
ASKED_OF_ANY_TASK: tuple[Condition, ...] = ("zero_shot", "full", "adapted_zero_shot", "adapted")
ADAPTED: tuple[Condition, ...] = (
    "adapted_zero_shot",
    "adapted",
    "adapted_swapped",
    "adapted_kind",
    "mixed",
)
"""Conditions that ask the model with its adapter."""


class EvaluateConfig(Config):
    """Answering from demonstrations."""

    task: Literal["two_way", "kind"] = "two_way"
    """What is asked: which of two made-up names a novel concept has, or what kind of thing a picture shows,
    where one demonstration is of its kind."""

    queries: int = Field(default=200, ge=1)
    """Episodes asked."""

    shots_per_class: tuple[int, ...] = (4,)
    """Demonstrations of each of two classes, or half of all those of `kind`; one table row for each
    number."""

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
    def _task_has_the_conditions(self) -> Self:
        others = [condition for condition in self.conditions if condition not in ASKED_OF_ANY_TASK]
        if self.task != "two_way" and others:
            raise ValueError(
                f"conditions {others} are of the task 'two_way', but task is {self.task!r}: ask "
                f"{', '.join(ASKED_OF_ANY_TASK)}"
            )
        return self

    @model_validator(mode="after")
    def _adapted_has_an_adapter(self) -> Self:
        if self.adapter is None and any(condition in ADAPTED for condition in self.conditions):
            raise ValueError(
                f"conditions {list(self.conditions)} ask the model with its adapter, but adapter is None: "
                f"name the folder of one, or leave {', '.join(ADAPTED)} out"
            )
        return self
