"""Settings of the episodes that are drawn from a corpus."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from mmicl_core.config.base import Config

__all__ = [
    "PRESETS",
    "CaptionConfig",
    "EpisodeConfig",
    "InstructionConfig",
    "InterleavedConfig",
    "KindConfig",
    "Part",
    "SameTaskConfig",
    "ShotStage",
    "TaskConfig",
    "TwoWayConfig",
]

Part = Literal["train", "known_concepts", "held_out_concepts", "held_out_style"]
Naming = Literal["made_up", "random_letters", "true_name"]


class ShotStage(Config):
    """A stretch of an episode file with its own numbers of shots, easiest first."""

    episodes: int = Field(gt=0)
    """Episodes of this stage."""

    min_shots_of_both_classes: int = Field(default=2, ge=2, le=128)
    """Fewest demonstrations of an episode, those of both classes together: the paper's k."""

    max_shots_of_both_classes: int = Field(default=8, ge=2, le=128)
    """Most demonstrations of an episode, those of both classes together."""

    odd_shots: bool = False
    """Draw odd numbers too; one of the classes, by chance, then has one demonstration more."""

    growth: float = 0.0
    """A number k has the weight exp(growth * k): 0 draws evenly, 1 is the paper's [2-way-weight]."""

    @model_validator(mode="after")
    def _range_is_not_empty(self) -> Self:
        low, high = self.min_shots_of_both_classes, self.max_shots_of_both_classes
        if low > high:
            raise ValueError(
                f"min_shots_of_both_classes ({low}) is above max_shots_of_both_classes ({high}): swap them"
            )
        if not self.odd_shots and (low % 2 or high % 2):
            raise ValueError(
                f"min_shots_of_both_classes ({low}) and max_shots_of_both_classes ({high}) must be even, as "
                "both classes have the same number: or set odd_shots to true"
            )
        return self


class TwoWayConfig(Config):
    """2-way episodes with hard negatives (LCL, arXiv:2308.07891, section 3.2)."""

    type: Literal["two_way"] = "two_way"

    weight: float = Field(default=1.0, gt=0)
    """Share of the mixture, in relation to the other tasks' weights."""

    hard_negative_share: float = Field(default=1.0, ge=0, le=1)
    """Share of episodes whose second class is a neighbour; the others take any concept."""

    positive_name: Naming = "made_up"
    """What the first class is called: two syllables, 1 to 10 random letters, or its true name."""

    negative_name: Naming = "made_up"
    """What its neighbour is called."""

    answers_scored: Literal["last", "dense"] = "last"
    """`last` scores the query alone, as the paper does; `dense` also every demonstration whose class
    was shown before it, which gives many times the signal from the same tokens."""

    questions: tuple[str, ...] = Field(default=("This is",), min_length=1)
    """What stands beside every picture of an episode; one is drawn for each episode."""

    wording: Literal["plain", "released"] = "plain"
    """`plain` asks `questions` and answers with names alone; `released` has the sentences of the released
    code, see `mmicl_core.data.wordings`."""

    varied: bool = True
    """Under wordings with many phrasings of the query, draw one; otherwise the first."""


class CaptionConfig(Config):
    """True names and descriptions of as many pictures as a 2-way episode of the same row shows."""

    type: Literal["caption"] = "caption"

    weight: float = Field(default=1.0, gt=0)
    """Share of the mixture, in relation to the other tasks' weights."""


class InterleavedConfig(Config):
    """A web document as it lies: its earlier pairs before, its last one asked (for AIM, arXiv:2406.07588)."""

    type: Literal["interleaved"] = "interleaved"

    weight: float = Field(default=1.0, gt=0)
    """Share of the mixture, in relation to the other tasks' weights."""

    max_demonstrations: int = Field(default=8, ge=1)
    """Pairs kept before the target, those next to it."""

    question: str = "Describe it:"
    """What stands beside every picture."""


class SameTaskConfig(Config):
    """Demonstrations of the query's own task (MMICT, arXiv:2312.06363)."""

    type: Literal["same_task"] = "same_task"

    weight: float = Field(default=1.0, gt=0)
    """Share of the mixture, in relation to the other tasks' weights."""

    demonstrations: int = Field(default=2, ge=1)
    """Demonstrations of an episode."""

    choice: Literal["random", "similar"] = "random"
    """`similar` takes the pictures nearest to the query's, the most similar one last (RICES)."""

    pool: int = Field(default=2048, ge=2)
    """Most pictures of a task that are looked through for demonstrations, chosen by hash."""

    question: str = "Describe it:"
    """What stands beside a picture that has a caption and no question of its own."""


class InstructionConfig(Config):
    """One picture with its whole conversation and no demonstration (M2PT, arXiv:2409.15657)."""

    type: Literal["instruction"] = "instruction"

    weight: float = Field(default=1.0, gt=0)
    """Share of the mixture, in relation to the other tasks' weights."""


class KindConfig(Config):
    """What kind of thing a picture shows, by the corpus's own taxonomy."""

    type: Literal["kind"] = "kind"

    weight: float = Field(default=1.0, gt=0)
    """Share of the mixture, in relation to the other tasks' weights."""

    demonstrations: int = Field(default=0, ge=0)
    """Demonstrations of an episode, one of them of the query's kind; none makes it an instruction."""


TaskConfig = Annotated[
    TwoWayConfig | CaptionConfig | InterleavedConfig | SameTaskConfig | InstructionConfig | KindConfig,
    Field(discriminator="type"),
]

# The released code counts shots for each class: its s is half of the paper's k.
_RELEASED = {"positive_name": "random_letters", "negative_name": "true_name", "wording": "released"}
PRESETS: Mapping[str, Mapping[str, Any]] = {
    "2-way": {"min_shots_of_both_classes": 16, "max_shots_of_both_classes": 16},
    "2-way-random": {
        "min_shots_of_both_classes": 2,
        "max_shots_of_both_classes": 16,
        "odd_shots": True,
    },
    "2-way-weight": {
        "min_shots_of_both_classes": 2,
        "max_shots_of_both_classes": 16,
        "odd_shots": True,
        "growth": 1.0,
    },
    "mix": {"min_shots_of_both_classes": 16, "max_shots_of_both_classes": 16},
    "released-2way-weight": {"min_shots_of_both_classes": 2, "max_shots_of_both_classes": 2},
    "released-2way-random-shot": {
        "min_shots_of_both_classes": 2,
        "max_shots_of_both_classes": 32,
        "growth": 0.25,
    },
}


class EpisodeConfig(Config):
    """How episodes are drawn. An episode is a function of the seed and its own number."""

    preset: str | None = None
    """A named set of shots and tasks of link-context learning: `2-way`, `2-way-random`, `2-way-weight` and
    `mix` as in the paper, `released-2way-weight` and `released-2way-random-shot` as in its code. It decides
    `stages` (with `count` episodes) and `tasks`, where these are not given."""

    count: int = Field(default=512, ge=1)
    """Episodes under a preset."""

    part: Part = "train"
    """Pictures to draw from: training ones; concepts trained on, asked in the held-out style; held-out
    concepts; or held-out concepts asked in the held-out style. Training takes `train` alone."""

    stages: tuple[ShotStage, ...] = (
        ShotStage(episodes=512, min_shots_of_both_classes=8, max_shots_of_both_classes=8),
    )
    """Stretches of the file, in order: a curriculum of shots, or a single stage."""

    same_shots_in_a_row: int = Field(default=16, ge=1)
    """Neighbouring episodes that share their number of shots, so that a batch needs little padding."""

    tasks: tuple[TaskConfig, ...] = Field(default=(TwoWayConfig(),), min_length=1)
    """What an episode may be; each one's chance is its weight."""

    near_duplicate_bits: int = Field(default=4, ge=0, le=32)
    """A picture whose perceptual hash (64 bits) differs from the query's in so many bits or fewer is never
    among the query's demonstrations."""

    seed: int = 0
    """An episode is a function of this seed and its own number, whatever the number of workers."""

    streamed: bool = False
    """Draw the training episodes when a step reads them and write none."""

    episodes_per_file: int = Field(default=4096, ge=1)
    """Episodes of one output file, and so of one piece of work."""

    @model_validator(mode="before")
    @classmethod
    def _fill_from_preset(cls, given: Any) -> Any:
        if not isinstance(given, dict) or given.get("preset") is None:
            return given
        name = given["preset"]
        if name not in PRESETS:
            raise ValueError(f"preset {name!r} is unknown: choose one of {', '.join(PRESETS)}")
        count = given.get("count", cls.model_fields["count"].default)
        stages = [{"episodes": count, **PRESETS[name]}]
        two_way = {"type": "two_way", **(_RELEASED if name.startswith("released") else {})}
        others = [{"type": "caption"}] if name == "mix" else []
        filled = {"stages": stages, "tasks": [two_way, *others], "same_shots_in_a_row": 1}
        return filled | given

    @property
    def total(self) -> int:
        """Episodes of all stages together."""
        return sum(stage.episodes for stage in self.stages)
