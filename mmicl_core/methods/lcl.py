"""Link-context learning: the model learns to follow demonstrations (Tai et al., CVPR 2024, 2308.07891).

Episodes give two look-alike concepts made-up names, and the language model and the projector are trained to
use the right one for the query; the vision tower is frozen unless asked for. The paper trains all weights on
the query's answer alone (`answers_scored: last`); `dense` also scores every demonstration whose name has
been given before, the same task with fewer shots at no further cost, and `lora_rank` trains low-rank updates
of the language model's matrices instead (Hu et al., 2021, arXiv:2106.09685). Between parts that have not met,
the projector is trained alone first (`train_language_model: false`).

    loss = -log p(answer | demonstrations, query), demonstrations written out in full

The paper's negative keeps its true name (presets `released-*`); by default both names are made up, so that a
model trained from nothing cannot tell the classes apart by which name it knows. Every turn is tokenised and
cut (`longest_turn`) on its own, so an episode of any number of shots keeps its query.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal

from mmicl_core.backbones.hugging_face import HuggingFaceBackbone
from mmicl_core.config.model import LclConfig
from mmicl_core.methods.adapter import load_parameters
from mmicl_core.methods.base import Method
from mmicl_core.methods.lora import add_lora
from mmicl_core.prompts import Prompt, Turn

__all__ = ["Lcl"]


class Lcl(Method):
    """Trains language model, projector and head on whole episodes."""

    takes: ClassVar[Literal["pixels"]] = "pixels"
    writes_turns_apart: ClassVar[bool] = True
    changes_backbone: ClassVar[bool] = True

    def __init__(self, backbone: HuggingFaceBackbone, config: LclConfig) -> None:
        super().__init__(backbone)
        self.config = config
        self._cut_turns = 0
        whole = config.train_language_model and not config.lora_rank
        roles = ["projector", *(["language_model", "head"] if whole else [])]
        for role in [*roles, "vision_tower"] if config.train_vision_tower else roles:
            backbone.unfreeze(role)
        if config.lora_rank:
            add_lora(backbone, rank=config.lora_rank, alpha=config.lora_alpha)
        if config.start is not None:
            load_parameters(self, Path(config.start))

    def write_turn(self, turn: Turn) -> Prompt:
        """A turn that is no longer than `longest_turn`."""
        pieces, cut = self.chat.cut(turn, self.config.longest_turn)
        self._cut_turns += cut
        return pieces

    @property
    def cut(self) -> Mapping[str, int]:
        """Turns that lost the end of their question."""
        return {"turns": self._cut_turns} if self._cut_turns else {}

    def save(self, folder: Path, about: Mapping[str, Any]) -> None:
        """Write low-rank updates and the projector; of a model trained whole, model and processor, as Hugging
        Face does."""
        if self.config.lora_rank:
            super().save(folder, about)
        else:
            self.backbone.save(folder)
