"""What can be trained: one file a method, one row each here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from mmicl_core.backbones.hugging_face import HuggingFaceBackbone
from mmicl_core.config.model import MethodConfig
from mmicl_core.errors import CheckpointError
from mmicl_core.methods.adapter import read_about
from mmicl_core.methods.aim import Aim
from mmicl_core.methods.base import Method
from mmicl_core.methods.lcl import Lcl
from mmicl_core.methods.lora import Lora
from mmicl_core.methods.m2pt import M2pt
from mmicl_core.methods.mmict import Mmict
from mmicl_core.methods.mtv import Mtv
from mmicl_core.methods.prompt_tuning import PromptTuning
from mmicl_core.methods.supcon import SupCon

__all__ = ["METHODS", "build_method", "default_settings", "load_method", "read_settings"]

METHODS: dict[str, type[Method]] = {
    "aim": Aim,
    "mmict": Mmict,
    "m2pt": M2pt,
    "lcl": Lcl,
    "lora": Lora,
    "prompt_tuning": PromptTuning,
    "mtv": Mtv,
    "supcon": SupCon,
}


def build_method(backbone: HuggingFaceBackbone, config: MethodConfig) -> Method:
    """The method that `config` asks for, around `backbone`."""
    build: Any = METHODS[config.type]
    method: Method = build(backbone, config)
    return method


def default_settings(name: str) -> MethodConfig:
    """The settings of a method where a run says nothing else."""
    config: MethodConfig = TypeAdapter(MethodConfig).validate_python({"type": name})
    return config


def read_settings(folder: Path) -> MethodConfig:
    """The method of a saved adapter, with its settings, to start from that adapter.

    Raises:
        CheckpointError: there is no adapter, or it is of no method that is known here.
    """
    settings = {**read_about(folder).get("settings", {}), "start": str(folder)}
    try:
        config: MethodConfig = TypeAdapter(MethodConfig).validate_python(settings)
    except ValidationError as error:
        raise CheckpointError(f"the adapter in {folder} has settings of no known method: {error}") from error
    return config


def load_method(folder: Path, backbone: HuggingFaceBackbone) -> Method:
    """A method as it was saved, frozen, around the model that it was trained with.

    Raises:
        CheckpointError: there is none, or it is of another model; names the first difference.
    """
    method = build_method(backbone, read_settings(folder))
    method.to(backbone.device).requires_grad_(requires_grad=False)
    return method.eval()
