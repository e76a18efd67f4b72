"""What can be trained: one file a method, one row each here."""

from __future__ import annotations

from mmicl_core.backbones.hugging_face import HuggingFaceBackbone
from mmicl_core.config.model import AimConfig, LclConfig, MethodConfig
from mmicl_core.methods.aim import Aim
from mmicl_core.methods.base import Method
from mmicl_core.methods.lcl import Lcl
from mmicl_core.methods.supcon import SupCon

__all__ = ["METHODS", "build_method"]

METHODS: dict[str, type[Method]] = {"aim": Aim, "lcl": Lcl, "supcon": SupCon}


def build_method(backbone: HuggingFaceBackbone, config: MethodConfig) -> Method:
    """The method that `config` asks for, around `backbone`."""
    if isinstance(config, AimConfig):
        return Aim(backbone, config)
    if isinstance(config, LclConfig):
        return Lcl(backbone, config)
    return SupCon(backbone, config)
