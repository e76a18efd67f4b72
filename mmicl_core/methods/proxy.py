"""Pretrains a vision tower: pictures of a concept, in whatever style, meet at the concept's proxy.

A proxy is a trained vector for each training concept; the loss is a softmax over cosines between a
picture's mean visual token and all proxies (normalised softmax, Zhai & Wu, BMVC 2019,
arXiv:1811.12649). Where a teacher is given, the mean token also predicts the teacher's features of the
unchanged picture, which carries over what the teacher knows of concepts that few pictures show.

Shapes: the tower's output is (N, V, W); its mean over V is what is compared. Proxies are (C, E') with
E' = `embedding_width`. Held-out concepts have no proxy: their pictures are never read.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from mmicl_core.backbones.hugging_face import HuggingFaceBackbone
from mmicl_core.config.model import ProxyConfig
from mmicl_core.data.augment import augment
from mmicl_core.data.images import decode
from mmicl_core.methods.base import Lookup, Method, stack

__all__ = ["Proxy", "ProxyBatch"]

LABEL_SMOOTHING = 0.05
TOWER_FILE = "vision_tower.safetensors"


@dataclass(frozen=True)
class ProxyBatch:
    """Pictures with the numbers of their concepts, and the teacher's view of them, (N, E)."""

    pixels: Tensor
    concepts: Tensor
    teacher: Tensor | None

    @property
    def num_scored(self) -> int:
        """Pictures."""
        return len(self.concepts)


class Proxies(nn.Module):
    """Cosines between embeddings (N, E') and a trained vector for each concept, (N, C)."""

    def __init__(self, width: int, concepts: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(concepts, width) / width**0.5)

    def forward(self, embeddings: Tensor) -> Tensor:
        """(N, E') -> (N, C)."""
        return F.normalize(embeddings, dim=1) @ F.normalize(self.weight, dim=1).T


class Proxy(Method):
    """Trains the vision tower; proxies and heads are thrown away afterwards.

    Args:
        concepts: ids of the training concepts, in the order of their proxies.
    """

    reads: ClassVar[Literal["episodes", "pictures"]] = "pictures"

    def __init__(
        self, backbone: HuggingFaceBackbone, config: ProxyConfig, concepts: Sequence[str], seed: int
    ) -> None:
        super().__init__(backbone)
        backbone.vision_tower.requires_grad_(requires_grad=True)
        width = backbone.vision_width
        self._number = {concept: number for number, concept in enumerate(concepts)}
        self._temperature = config.temperature
        self._teacher_weight = config.teacher_weight
        self._seed = seed
        self.head = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, config.embedding_width))
        self.proxies = Proxies(config.embedding_width, len(concepts))
        self.student = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, config.teacher_width))

    def collate(self, rows: Sequence[Mapping[str, Any]], features: Lookup, states: Lookup) -> ProxyBatch:
        """Pictures -> augmented pixels; `features` hold the teacher's view, if there is a teacher."""
        pixels = self.backbone.pixels([decode(row["image"]) for row in rows])
        # A picture looks different in every epoch, and the same in the same epoch of every run.
        generator = torch.Generator().manual_seed(hash((self._seed, *(row["visit"] for row in rows))))
        concepts = torch.tensor([self._number[row["concept"]] for row in rows])
        teacher = stack(features, [row["picture"] for row in rows]).float() if len(features) else None
        return ProxyBatch(augment(pixels, generator), concepts, teacher)

    def forward(self, batch: ProxyBatch) -> Tensor:
        """Cross-entropy of each picture against the proxies, plus its distance from the teacher."""
        pooled_NW = self.backbone.tower_states(batch.pixels).mean(1)
        device = pooled_NW.device
        loss = F.cross_entropy(
            self.proxies(self.head(pooled_NW)) / self._temperature,
            batch.concepts.to(device),
            label_smoothing=LABEL_SMOOTHING,
            reduction="none",
        )
        if batch.teacher is not None:
            likeness = F.cosine_similarity(self.student(pooled_NW), batch.teacher.to(device), dim=1)
            loss = loss + self._teacher_weight * (1 - likeness)
        return loss

    def save(self, folder: Path) -> None:
        """Write the vision tower's weights alone."""
        folder.mkdir(parents=True, exist_ok=True)
        weights = self.backbone.vision_tower.state_dict()
        save_file({name: w.detach().float().contiguous() for name, w in weights.items()}, folder / TOWER_FILE)
