"""Models of an evaluation that a recipe trains: which runs that takes.

A model names its recipe and what it sets otherwise, a few plain words in the settings of its evaluation. What
they come to is found here, once when settings are read, so that a mistake in them is told before anything
starts, and again when there is something to train.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmicl_core.config.evaluate import AskedModel
from mmicl_core.config.run import RunConfig, load_run, nested
from mmicl_core.errors import ConfigError
from pipelines.arguments import find_recipe

__all__ = ["Trained", "trainings_of"]

# Of no influence on a training: whoever sets them means something else.
NOT_TRAINED = ("evaluate", "serve")


@dataclass(frozen=True)
class Trained:
    """What a training left to be asked."""

    run: RunConfig
    """By which it was trained."""
    folder: Path
    """Of the adapter, or of the whole model."""


def trainings_of(model: AskedModel) -> tuple[RunConfig, ...]:
    """The trainings that a model takes, one for each of its seeds; none where it has no recipe.

    Raises:
        ConfigError: the recipe does not exist, or together with the settings it is none of a training; names
            the model.
    """
    if model.recipe is None:
        return ()
    try:
        recipe = find_recipe(model.recipe)
        return tuple(_training(model, recipe, own) for own in _own(model))
    except ConfigError as error:
        told = (f"evaluate.models: {model.name!r}: {sentence}" for sentence in str(error).splitlines())
        # Of errors that wrap each other, people are told the innermost.
        raise ConfigError("\n".join(told)) from None


def _own(model: AskedModel) -> list[dict[str, Any]]:
    """What the model's own fields set, for each of its trainings."""
    backbone: dict[str, Any] = {}
    if model.backbone is not None:
        # A tower of the recipe's would be that of another model.
        backbone = {"backbone.path": model.backbone, "backbone.vision_tower": None}
    seeds = [{"train.seed": seed, "episodes.seed": seed} for seed in model.train_seeds]
    return [backbone | seed for seed in seeds or [{}]]


def _training(model: AskedModel, recipe: Path, own: Mapping[str, Any]) -> RunConfig:
    for name in model.settings:
        section, point, setting = name.partition(".")
        if not point or not setting or section in NOT_TRAINED:
            raise ConfigError(f"settings: {name} is no setting of a training: write SECTION.SETTING")
        if name in own:
            raise ConfigError(f"settings: {name} is set by train_seeds or backbone already: leave one out")
    run = load_run(recipe, nested({**model.settings, **own}), "its settings")
    if run.method.type == "supcon":
        raise ConfigError(f"recipe {recipe} trains a vision tower (method supcon), which answers nothing")
    if model.raw and run.method.type != "aim":
        raise ConfigError(
            f"raw is {model.raw}, demonstrations written out behind fused ones, but method "
            f"{run.method.type!r} fuses none: set raw to 0"
        )
    return run
