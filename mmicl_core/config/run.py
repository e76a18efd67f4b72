"""One run: its sections, read from one YAML file, and the checks that span two of them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

import yaml
from pydantic import ValidationError, model_validator

from mmicl_core.config.base import Config, explain
from mmicl_core.config.corpus import ConceptConfig, CorpusConfig, EmbedderConfig, NeighbourConfig
from mmicl_core.config.episodes import EpisodeConfig
from mmicl_core.config.evaluate import EvaluateConfig
from mmicl_core.config.model import AimConfig, BackboneConfig, MethodConfig
from mmicl_core.config.serve import ServeConfig
from mmicl_core.config.train import TrainConfig
from mmicl_core.errors import ConfigError

__all__ = ["RunConfig", "load_run", "nested"]


class RunConfig(Config):
    """A complete run."""

    corpus: CorpusConfig = CorpusConfig()
    concepts: ConceptConfig = ConceptConfig()
    embedder: EmbedderConfig | None = None
    neighbours: NeighbourConfig = NeighbourConfig()
    episodes: EpisodeConfig = EpisodeConfig()
    backbone: BackboneConfig = BackboneConfig()
    method: MethodConfig = AimConfig()
    train: TrainConfig = TrainConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    serve: ServeConfig = ServeConfig()

    @model_validator(mode="after")
    def _comparing_has_an_embedder(self) -> Self:
        by_similarity = self.neighbours.by == "similarity"
        similar = any(task.type == "same_task" and task.choice == "similar" for task in self.episodes.tasks)
        clusters = self.concepts.by == "clusters"
        if self.embedder is None and (by_similarity or similar or clusters):
            what = "neighbours.by 'similarity'" if by_similarity else "concepts.by 'clusters'"
            what = what if by_similarity or clusters else "a task with choice 'similar'"
            raise ValueError(f"{what} compares embeddings, but embedder is none: name one")
        cross = by_similarity and self.neighbours.image_text != 0
        if cross and self.embedder is not None and self.embedder.type != "dual_encoder":
            raise ValueError(
                f"neighbours.image_text ({self.neighbours.image_text}) compares pictures with names, but "
                f"embedder {self.embedder.type} has no common space for them: set it to 0"
            )
        return self

    @model_validator(mode="after")
    def _every_turn_of_a_fused_episode_has_a_picture(self) -> Self:
        if self.method.type == "aim" and any(task.type == "instruction" for task in self.episodes.tasks):
            raise ValueError(
                "method aim fuses demonstrations, but episodes.tasks hold 'instruction', which has none and "
                "goes on about one picture over several turns: leave it out, or train another method"
            )
        return self

    @model_validator(mode="after")
    def _validation_has_episodes(self) -> Self:
        if self.train.validation.every is not None and self.method.type in ("supcon", "mtv"):
            raise ValueError(
                f"train.validation measures the loss on episodes, of which method {self.method.type} has "
                "none: set train.validation.every to None"
            )
        return self

    @model_validator(mode="after")
    def _pairs_stay_together(self) -> Self:
        train, (fewest, most) = self.train, self.train.worker_range
        if self.method.type != "supcon":
            return self
        if fewest != most:
            raise ValueError(
                "method supcon compares the pictures that one worker sees at once, which depends on how many "
                f"workers there are, but train.num_workers is {fewest} to {most}: set it to one number"
            )
        share, rest = divmod(train.global_batch, most)
        if rest or share % 2 or min(share, train.micro_batch) % 2:
            raise ValueError(
                f"method supcon learns from pairs, but train.global_batch ({train.global_batch}) gives "
                f"each of train.num_workers ({most}) {train.global_batch / most:g} pictures, in pieces of "
                f"train.micro_batch ({train.micro_batch}): both must be even"
            )
        return self


def load_run(
    recipe: Path | None = None, overrides: dict[str, Any] | None = None, told_by: str = "the command line"
) -> RunConfig:
    """Read a recipe, or the defaults where there is none, and lay `overrides` (nested alike) over it.

    Args:
        told_by: where the overrides come from, for errors.

    Raises:
        ConfigError: the file is missing, is not YAML, or holds a wrong setting.
    """
    settings = {} if recipe is None else _read(recipe)
    sources = [str(recipe)] if recipe else []
    where = " with ".join([*sources, told_by] if overrides else sources)
    # Sections left out take their defaults; so does the type of a method that says only other settings.
    settings = _overlay({"method": {"type": AimConfig().type}}, settings)
    try:
        return RunConfig.model_validate(_overlay(settings, overrides or {}))
    except ValidationError as error:
        raise explain(error, where) from error


def nested(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings by names as on the command line, `train.steps`, as a recipe has them: in sections."""
    sections: dict[str, Any] = {}
    for name, value in settings.items():
        for part in reversed(name.split(".")):
            value = {part: value}
        sections = _overlay(sections, value)
    return sections


def _read(recipe: Path) -> dict[str, Any]:
    if not recipe.is_file():
        raise ConfigError(f"recipe {recipe} does not exist: name a YAML file of settings")
    try:
        settings = yaml.safe_load(recipe.read_text(encoding="utf-8")) or {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"recipe {recipe} is not YAML: {reason}") from error
    if not isinstance(settings, dict):
        raise ConfigError(f"recipe {recipe} holds a {type(settings).__name__}, not sections of settings")
    return settings


def _overlay(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    merged = dict(below)
    for key, value in above.items():
        nested = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _overlay(merged[key], value) if nested else value
    return merged
