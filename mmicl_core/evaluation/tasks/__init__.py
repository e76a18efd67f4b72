"""Evaluation tasks, one small file each: load, ask, score."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from mmicl_core.evaluation.tasks.base import Task
from mmicl_core.evaluation.tasks.captions import CaptionsTask
from mmicl_core.evaluation.tasks.classification import ClassificationTask
from mmicl_core.evaluation.tasks.hateful_memes import HatefulMemesTask
from mmicl_core.evaluation.tasks.imagenet_pairs import ImageNetPairsTask
from mmicl_core.evaluation.tasks.isekai import IsekaiTask
from mmicl_core.evaluation.tasks.mme import MmeTask
from mmicl_core.evaluation.tasks.pope import PopeTask
from mmicl_core.evaluation.tasks.snli_ve import SnliVeTask
from mmicl_core.evaluation.tasks.vl_icl import VlIclTask
from mmicl_core.evaluation.tasks.vqa import VqaTask
from mmicl_core.evaluation.tasks.vsr import VsrTask

__all__ = ["FILE_TASKS"]

FILE_TASKS: Mapping[str, Callable[[Any], Task]] = {
    "captions": CaptionsTask,
    "classification": ClassificationTask,
    "hateful_memes": HatefulMemesTask,
    "imagenet_pairs": ImageNetPairsTask,
    "isekai": IsekaiTask,
    "mme": MmeTask,
    "pope": PopeTask,
    "snli_ve": SnliVeTask,
    "vl_icl": VlIclTask,
    "vqa": VqaTask,
    "vsr": VsrTask,
}
"""Tasks that are read from files, by the type of their settings."""
