"""Prompt tuning: soft tokens before every prompt (Lester et al., EMNLP 2021, arXiv:2104.08691).

    [P; prompt],  P of n vectors of width D, trained; everything else frozen

A baseline: it trains on the same episodes as the other methods, with demonstrations written out in full. The
soft tokens themselves are `peft`'s.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import torch
from peft import PromptEmbedding
from peft import PromptTuningConfig as PeftPromptTuningConfig
from torch import Tensor

from mmicl_core.backbones.hugging_face import HuggingFaceBackbone
from mmicl_core.config.model import PromptTuningConfig
from mmicl_core.methods.adapter import load_parameters
from mmicl_core.methods.base import Method

__all__ = ["PromptTuning"]

INITIAL = {"vocabulary": "SAMPLE_VOCAB", "random": "RANDOM"}


class PromptTuning(Method):
    """Trains soft tokens on whole episodes."""

    writes_turns_apart: ClassVar[bool] = True

    def __init__(self, backbone: HuggingFaceBackbone, config: PromptTuningConfig) -> None:
        super().__init__(backbone)
        self.config = config
        settings = PeftPromptTuningConfig(
            num_virtual_tokens=config.tokens,
            token_dim=backbone.width,
            num_transformer_submodules=1,
            prompt_tuning_init=INITIAL[config.initial],
        )
        embedding: Any = PromptEmbedding
        self.soft_tokens = embedding(settings, backbone.model.get_input_embeddings())
        if config.start is not None:
            load_parameters(self, Path(config.start))

    def opening(self) -> tuple[Tensor, None]:
        """All soft tokens."""
        numbers = torch.arange(self.config.tokens, device=self.backbone.device)
        return self.soft_tokens(numbers), None
