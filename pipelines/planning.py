"""What a training would take, counted on paper."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Any

from mmicl_core.assets import resolve
from mmicl_core.backbones.hugging_face import outline_backbone
from mmicl_core.config.run import RunConfig
from mmicl_core.data.pictures import usual_picture
from mmicl_core.data.tasks.caption import NAME_QUESTION
from mmicl_core.errors import ConfigError
from mmicl_core.methods import build_method
from mmicl_core.methods.base import Method
from mmicl_core.training.hardware import Hardware
from mmicl_core.training.memory import PromptShape
from mmicl_core.training.plan import make_plan
from pipelines.materials import NEW_NANO

__all__ = ["plan"]

log = logging.getLogger("mmicl")

# Of the usual length; what a corpus really holds is known once it is read.
NAME = "golden retriever"


def plan(run: RunConfig, gpus: int | None, memory: str | None, tokens: int | None) -> dict[str, Any]:
    """Parameters by role, bytes of each worker by ZeRO stage, hazards and advice; told, and given as plain
    values. Nothing is loaded and nothing is started.

    Args:
        gpus: of a cluster that is not here; None plans for this machine.
        memory: of each of them, `80GB`.
        tokens: of the longest prompt; None lays one out with as many demonstrations as the run draws.

    Raises:
        ConfigError: there is nothing to plan for.
    """
    if run.backbone.path == NEW_NANO or run.method.type == "supcon":
        what = f"backbone.path {NEW_NANO!r}" if run.backbone.path == NEW_NANO else "method supcon"
        raise ConfigError(
            f"{what} cannot be planned: the plan is of a model in a folder, trained on episodes"
        )
    if (gpus is None) != (memory is None):
        raise ConfigError("--gpus and --memory belong together: --gpus 8 --memory 80GB")
    method = build_method(outline_backbone(resolve(run.backbone.path)), run.method)
    workers = run.train.worker_range[1]
    hardware = Hardware.here(workers) if gpus is None or memory is None else Hardware.described(gpus, memory)
    longest = _longest_prompt(run, method)
    if tokens is not None:
        longest = replace(longest, tokens=tokens)
    made = make_plan(method, run.train, hardware, longest)
    for line in made.lines():
        log.info("%s", line)
    return made.as_json()


def _longest_prompt(run: RunConfig, method: Method) -> PromptShape:
    """With as many demonstrations as the run draws."""
    shots = max(stage.max_shots_of_both_classes for stage in run.episodes.stages)
    (prepared,) = method.backbone.prepare([usual_picture()])
    turns = [
        {"picture": "it", "question": NAME_QUESTION, "answer": NAME, "scored": number == shots}
        for number in range(shots + 1)
    ]
    row = {"turns": turns, "shots_of_both_classes": shots}
    batch = method.collate([row], {"it": prepared}, None)
    seen = len(batch.pictures) if hasattr(batch, "pictures") else 1
    return PromptShape(batch.packed.ids_BL.shape[1], batch.num_scored, seen, prepared.patches_in_rows)
