"""Link-context learning: the model learns to follow demonstrations (Tai et al., CVPR 2024, 2308.07891).

Episodes give two look-alike concepts made-up names, and the language model and the projector are
trained to use the right one for the query; the vision tower is frozen unless asked for. The paper
trains on the query's answer alone (`answers_scored: last`); `dense` also scores every demonstration
whose name has been given before, the same task with fewer shots at no further cost.

The paper's negative keeps its true name; here both names are made up, so that a model trained from
nothing cannot tell the classes apart by which name it knows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from mmicl_core.backbones.hugging_face import HuggingFaceBackbone
from mmicl_core.config.model import LclConfig
from mmicl_core.data.collate import Packed, pack
from mmicl_core.methods.base import Lookup, Method, answer_nll, episode_turns, prompt_embeddings, stack
from mmicl_core.prompts import ChatFormat, Prompt, Turn

__all__ = ["Lcl", "LclBatch", "full_prompt"]


@dataclass(frozen=True)
class LclBatch:
    """Whole conversations with their pictures as `prompt_embeddings` takes them."""

    packed: Packed
    pictures: Tensor

    @property
    def num_scored(self) -> int:
        """Answer tokens."""
        return self.packed.num_scored


class Lcl(Method):
    """Trains language model, projector and head on whole episodes."""

    def __init__(self, backbone: HuggingFaceBackbone, config: LclConfig) -> None:
        super().__init__(backbone)
        roles = [backbone.language_model, backbone.projector, backbone.head]
        for role in [*roles, backbone.vision_tower] if config.train_vision_tower else roles:
            role.requires_grad_(requires_grad=True)

    def collate(self, rows: Sequence[Mapping[str, Any]], features: Lookup, states: Lookup | None) -> LclBatch:
        """Episodes -> conversations with every picture in its place; a vision tower that is trained needs
        `features` that are pixels."""
        prompts, pictures = [], []
        for row in rows:
            turns = episode_turns(row)
            prompts.append(full_prompt(self.chat, turns))
            pictures += [turn.picture for turn in turns if turn.picture is not None]
        packed = pack(
            prompts,
            visual_tokens=self.backbone.visual_tokens,
            padding_id=self.backbone.tokenizer.pad_token_id,
        )
        return LclBatch(packed, stack(features, pictures))

    def forward(self, batch: LclBatch) -> Tensor:
        """Negative log-likelihood of the scored answer tokens."""
        packed = batch.packed.to(self.backbone.device)
        embeds_BLD = prompt_embeddings(self.backbone, packed, batch.pictures)
        return answer_nll(self.backbone, embeds_BLD, packed)

    def save(self, folder: Path) -> None:
        """Write the whole model and its processor, as Hugging Face does."""
        self.backbone.save(folder)


def full_prompt(chat: ChatFormat, turns: Sequence[Turn]) -> Prompt:
    """The prefix and all turns, pictures included."""
    return [*chat.prefix(), *(piece for turn in turns for piece in chat.turn(turn))]
