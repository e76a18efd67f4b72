"""LoRA: low-rank updates of the language model's matrices (Hu et al., ICLR 2022, arXiv:2106.09685).

    W x + (alpha / rank) B A x,  A random, B zero at the start; W frozen

A baseline: it trains on the same episodes as the other methods, with demonstrations written out in full. The
updates themselves are `peft`'s.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

from peft import LoraConfig as PeftLoraConfig
from peft import inject_adapter_in_model
from torch import nn

from mmicl_core.backbones.hugging_face import HuggingFaceBackbone
from mmicl_core.config.model import LoraConfig
from mmicl_core.errors import ConfigError
from mmicl_core.methods.adapter import load_parameters
from mmicl_core.methods.base import Method

__all__ = ["Lora", "add_lora"]


class Lora(Method):
    """Trains low-rank updates on whole episodes."""

    changes_backbone: ClassVar[bool] = True
    writes_turns_apart: ClassVar[bool] = True

    def __init__(self, backbone: HuggingFaceBackbone, config: LoraConfig) -> None:
        super().__init__(backbone)
        self.config = config
        add_lora(backbone, rank=config.rank, alpha=config.alpha, targets=config.targets)
        if config.start is not None:
            load_parameters(self, Path(config.start))


def add_lora(backbone: HuggingFaceBackbone, *, rank: int, alpha: int, targets: Sequence[str] = ()) -> None:
    """Put trainable updates into the language model; vision tower, projector and head stay as they are.

    Args:
        targets: last parts of the names of matrices; none takes every linear layer.

    Raises:
        ConfigError: a target is nowhere in the language model.
    """
    module = backbone.language_side
    linear = [
        name
        for name, layer in module.named_modules()
        if isinstance(layer, nn.Linear) and layer is not backbone.head
    ]
    for target in targets:
        if not any(name.rpartition(".")[2] == target for name in linear):
            known = sorted({name.rpartition(".")[2] for name in linear})
            raise ConfigError(f"method.targets names {target!r}, the language model's matrices are {known}")
    chosen = [name for name in linear if not targets or name.rpartition(".")[2] in targets]
    inject_adapter_in_model(PeftLoraConfig(r=rank, lora_alpha=alpha, target_modules=chosen), module)
