"""What can be trained: one file a method, one row each here."""

from __future__ import annotations

from collections.abc import Sequence

from mmicl_core.backbones.hugging_face import HuggingFaceBackbone
from mmicl_core.config.model import AimConfig, LclConfig, MethodConfig
from mmicl_core.methods.aim import Aim
from mmicl_core.methods.base import Method
from mmicl_core.methods.lcl import Lcl
from mmicl_core.methods.proxy import Proxy

__all__ = ["METHODS", "build_method"]

METHODS: dict[str, type[Method]] = {"aim": Aim, "lcl": Lcl, "proxy": Proxy}


def build_method(
    backbone: HuggingFaceBackbone, config: MethodConfig, concepts: Sequence[str], seed: int
) -> Method:
    """The method that `config` asks for; `concepts` are the training concepts of the corpus."""
    if isinstance(config, AimConfig):
        return Aim(backbone, config)
    if isinstance(config, LclConfig):
        return Lcl(backbone, config)
    return Proxy(backbone, config, concepts, seed)
