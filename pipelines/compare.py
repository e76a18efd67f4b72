"""Evaluation of models that are trained for it: what was not trained yet is, and then all are asked.

    recipes, seeds --train--> adapters, whole models --evaluate--> results, card, page

A training is a stage in the folder of the evaluation, as `mmicl train` makes it there: none is made twice,
and one that was stopped goes on.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from mmicl_core.config.run import RunConfig
from pipelines.evaluate import evaluate
from pipelines.train import RESULT, train
from pipelines.trainings import Trained, trainings_of

__all__ = ["compare"]

log = logging.getLogger("mmicl")


def compare(run: RunConfig, root: Path) -> dict[str, Any]:
    """Train whatever of `evaluate.models` names a recipe, then `evaluate`, whose results it gives.

    Raises:
        ConfigError: models, recipes and tasks do not fit.
        TrainingError: a training cannot go on.
        DataError, BackboneError: as `evaluate`.
    """
    trainings = [(model.name, one) for model in run.evaluate.asked for one in trainings_of(model)]
    trained: dict[str, list[Trained]] = {}
    for number, (name, one) in enumerate(trainings, 1):
        log.info("Training %d of %d: %s, seed %d", number, len(trainings), name, one.train.seed)
        trained.setdefault(name, []).append(Trained(one, train(one, root).folder / RESULT))
    return evaluate(run, root, trained)
