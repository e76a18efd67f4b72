"""Settings of the corpus and of the episodes drawn from it."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from mmicl_core.config.base import Config

__all__ = ["CorpusConfig", "EpisodeConfig", "Part", "ShotStage"]

Part = Literal["train", "known_concepts", "held_out_concepts", "held_out_style"]


class CorpusConfig(Config):
    """Where the image-text pairs come from."""

    path: str = "embedded:open_emoji"
    """Folder of webdataset tar shards with a `split.json`; `embedded:NAME` is one inside the package."""


class ShotStage(Config):
    """A stretch of an episode file with its own range of shots, easiest first."""

    episodes: int = Field(gt=0)
    """Episodes of this stage."""

    min_shots: int = Field(default=1, ge=1, le=64)
    """Fewest demonstrations of each of the two classes."""

    max_shots: int = Field(default=4, ge=1, le=64)
    """Most demonstrations of each class; the number is drawn evenly between both."""

    @model_validator(mode="after")
    def _range_is_not_empty(self) -> Self:
        if self.min_shots > self.max_shots:
            raise ValueError(f"min_shots ({self.min_shots}) is above max_shots ({self.max_shots}): swap them")
        return self


class EpisodeConfig(Config):
    """How 2-way episodes are drawn (link-context learning, arXiv:2308.07891, section 3.2).

    An episode names two concepts with made-up names, shows both, and asks about one more picture.
    """

    part: Part = "train"
    """Pictures to draw from: training ones; concepts trained on, asked in the held-out style; held-out
    concepts; or held-out concepts asked in the held-out style. Training takes `train` alone."""

    stages: tuple[ShotStage, ...] = (ShotStage(episodes=512, min_shots=4, max_shots=4),)
    """Stretches of the file, in order: a curriculum of shots, or a single stage."""

    same_shots_in_a_row: int = Field(default=16, ge=1)
    """Neighbouring episodes that share their number of shots, so that a batch needs little padding."""

    neighbours: int = Field(default=100, ge=1)
    """Neighbour concepts kept for each concept, nearest first: the pool of hard negatives."""

    hard_negative_share: float = Field(default=1.0, ge=0, le=1)
    """Share of episodes whose second class is a neighbour; the others take any concept."""

    caption_share: float = Field(default=0.0, ge=0, le=1)
    """Share of episodes that ask for true names and descriptions instead of made-up names."""

    answers_scored: Literal["last", "dense"] = "last"
    """`last` scores the query alone, as the paper does; `dense` also every demonstration whose class
    was shown before it, which gives many times the signal from the same tokens."""

    questions: tuple[str, ...] = Field(default=("This is",), min_length=1)
    """What stands beside every picture of an episode; one is drawn for each episode."""

    seed: int = 0
    """An episode is a function of this seed and its own number, whatever the number of workers."""

    @property
    def total(self) -> int:
        """Episodes of all stages together."""
        return sum(stage.episodes for stage in self.stages)
