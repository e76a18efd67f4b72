"""What can be trained: one file a method, one row each here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from mmicl_core.backbones.hugging_face import HuggingFaceBackbone
from mmicl_core.config.model import MethodConfig
from mmicl_core.errors import CheckpointError
from mmicl_core.methods.adapter import load_parameters, read_about
from mmicl_core.methods.aim import Aim
from mmicl_core.methods.base import Method
from mmicl_core.methods.lcl import Lcl
from mmicl_core.methods.lora import Lora
from mmicl_core.methods.prompt_tuning import PromptTuning
from mmicl_core.methods.supcon import SupCon

__all__ = ["METHODS", "build_method", "load_method", "read_settings"]

METHODS: dict[str, type[Method]] = {
    "aim": Aim,
    "lcl": Lcl,
    "lora": Lora,
    "prompt_tuning": PromptTuning,
    "supcon": SupCon,
}


def build_method(backbone: HuggingFaceBackbone, config: MethodConfig) -> Method:
    """The method that `config` asks for, around `backbone`."""
    build: Any = METHODS[config.type]
    method: Method = build(backbone, config)
    return method


def read_settings(folder: Path) -> MethodConfig:
    """The method of a saved adapter, with its settings.

    Raises:
        CheckpointError: there is no adapter, or it is of no method that is known here.
    """
    settings = {**read_about(folder).get("settings", {}), "start": None}
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
    load_parameters(method, folder)
    method.to(backbone.device).requires_grad_(requires_grad=False)
    return method.eval()
