"""Settings of evaluation."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, Self

from pydantic import Field, model_validator

from mmicl_core.config.base import Config
from mmicl_core.config.evaluation_tasks import NamingConfig, TaskSettings

__all__ = ["PRESETS", "AskedModel", "Choice", "Control", "EvaluateConfig"]

Control = Literal["shuffled", "swapped", "blank", "other", "reversed", "query_rule"]
Choice = Literal["random", "fixed", "similar", "hard"]

PRESETS: Mapping[str, Mapping[str, Any]] = {
    "open_flamingo": {
        "shots": (0, 4, 8, 16, 32),
        "seed": 42,
        "pool": 2048,
        "style": "open_flamingo",
        "beams": 3,
    },
}


SHIPPED = "embedded:nano_aim"


class AskedModel(Config):
    """A model that is asked, beside others on the same questions."""

    name: str
    """What tables and charts call it."""

    adapter: str | None = None
    """Folder of what was trained; None asks the backbone as it is, with demonstrations written out."""

    seeds: tuple[str, ...] = ()
    """Folders of the same, trained from other seeds: scores are means over all of them, with their spread."""

    recipe: str | None = None
    """Recipe that it is trained by before it is asked, where that is not done yet: a file, or the name of one
    that comes along. Its own section `evaluate` is not read."""

    settings: dict[str, Any] = Field(default_factory=dict)
    """What is set otherwise than in the recipe, by names as on the command line: `{train.steps: 400}`."""

    train_seeds: tuple[int, ...] = ()
    """Seeds that it is trained from, once each, as `train.seed` and `episodes.seed`; none takes those of the
    recipe. Scores are means over all of them, with their spread."""

    backbone: str | None = None
    """Folder of the model to ask, or to train around, or `embedded:NAME`; None takes that of the recipe, or,
    where there is none, of this run."""

    raw: int = Field(default=0, ge=0)
    """Of a method that fuses demonstrations, how many of the last ones are written out behind the others."""

    endpoint: str | None = None
    """An OpenAI-compatible server to ask in place of the backbone, such as `http://localhost:8000/v1`; the
    environment variable OPENAI_API_KEY holds its key."""

    served_model: str | None = None
    """What the server calls the model."""

    @model_validator(mode="after")
    def _is_asked_in_one_way(self) -> Self:
        if (self.endpoint is None) != (self.served_model is None):
            raise ValueError(
                f"model {self.name!r}: endpoint ({self.endpoint!r}) and served_model ({self.served_model!r}) "
                "belong together: give both, or neither"
            )
        if self.endpoint is not None and (self.adapter or self.recipe or self.backbone or self.raw):
            raise ValueError(
                f"model {self.name!r} is asked at {self.endpoint}, which applies its own adapter to its own "
                "model: leave adapter, recipe, backbone and raw out"
            )
        if self.adapter is None and (self.seeds or self.raw and self.recipe is None):
            raise ValueError(
                f"model {self.name!r} has seeds or raw, which are of an adapter, but adapter is None: name "
                "its folder"
            )
        return self

    @model_validator(mode="after")
    def _is_trained_or_was(self) -> Self:
        if self.recipe is not None and self.adapter is not None:
            raise ValueError(
                f"model {self.name!r} is trained by recipe {self.recipe}, but adapter names {self.adapter}, "
                "which was trained before: leave one of them out"
            )
        if self.recipe is None and (self.settings or self.train_seeds):
            raise ValueError(
                f"model {self.name!r} has settings or train_seeds, which are of a training, but recipe is "
                "None: name one"
            )
        if len(set(self.train_seeds)) < len(self.train_seeds):
            raise ValueError(
                f"model {self.name!r} has train_seeds {list(self.train_seeds)}: name each of them once"
            )
        return self


class EvaluateConfig(Config):
    """Answering from demonstrations."""

    preset: Literal["open_flamingo"] | None = None
    """OpenFlamingo's shots, wording, seed, pool of 2,048 and three beams; its 0 shots are two demonstrations
    without their pictures. What is given beside it goes first."""

    tasks: tuple[TaskSettings, ...] = Field(default=(NamingConfig(),), min_length=1)
    """What is asked."""

    adapter: str | None = SHIPPED
    """Folder of what was trained, asked as `adapted` beside the backbone as it is, which is `full`."""

    models: tuple[AskedModel, ...] = ()
    """Who is asked instead, where that is not enough: each on the same questions with the same
    demonstrations."""

    shots: tuple[int, ...] = Field(default=(0, 8), min_length=1)
    """Demonstrations of a prompt, all classes together; each number is asked."""

    demonstrations: Choice = "random"
    """How they are chosen where a task leaves it open: `random` for each query, `fixed` for all, the most
    `similar` pictures with the nearest last (RICES), or `hard`, similar ones with other answers. The last two
    compare pictures by the run's embedder."""

    controls: tuple[Control, ...] = ("swapped",)
    """Changes of the demonstrations that tell learning from formatting, each at the largest number of
    shots."""

    style: Literal["chat", "open_flamingo"] = "chat"
    """Whose wording tasks have."""

    beams: int = Field(default=1, ge=1)
    """Of the search for an answer; 1 is greedy. Servers have none to ask for."""

    queries: int = Field(default=200, ge=1)
    """Questions of each task, drawn by the seed where it has more."""

    pool: int | None = Field(default=None, ge=1)
    """Answered items that random demonstrations are drawn from, drawn by the seed; None takes all."""

    timed: int = Field(default=8, ge=0)
    """Questions that are asked once more, one at a time, to measure time and memory; 0 measures none."""

    batch: int = Field(default=32, ge=1)
    """Questions answered at once."""

    num_workers: int = Field(default=2, ge=1)
    """Processes that evaluate side by side."""

    seed: int = 1
    """Seeds questions, demonstrations, controls and the bootstrap."""

    @property
    def asked(self) -> tuple[AskedModel, ...]:
        """Everybody who is asked."""
        adapted = (AskedModel(name="adapted", adapter=self.adapter),) if self.adapter is not None else ()
        return self.models or (AskedModel(name="full"), *adapted)

    @model_validator(mode="after")
    def _adapter_is_asked(self) -> Self:
        if self.models and self.adapter not in (SHIPPED, None):
            raise ValueError(
                f"evaluate.adapter is {self.adapter!r}, but evaluate.models say who is asked: put it there"
            )
        return self

    @model_validator(mode="after")
    def _servers_are_asked_without_beams(self) -> Self:
        served = [model.name for model in self.asked if model.endpoint is not None]
        if served and self.beams > 1:
            raise ValueError(
                f"evaluate.beams is {self.beams}, but the protocol by which {', '.join(served)} is asked has "
                "none: set beams to 1"
            )
        return self

    @model_validator(mode="before")
    @classmethod
    def _preset_comes_first(cls, given: Any) -> Any:
        if isinstance(given, Mapping) and given.get("preset") in PRESETS:
            return {**PRESETS[given["preset"]], **given}
        return given

    @model_validator(mode="after")
    def _names_are_unique(self) -> Self:
        names = [model.name for model in self.asked]
        if len(set(names)) < len(names):
            raise ValueError(f"evaluate.models are called {names}: give each its own name")
        return self

    @model_validator(mode="after")
    def _shots_ascend(self) -> Self:
        if list(self.shots) != sorted(set(self.shots)) or self.shots[0] < 0:
            raise ValueError(
                f"evaluate.shots are {list(self.shots)}: name each number once, in order, from 0"
            )
        return self
