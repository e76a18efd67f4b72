"""Pretrains a vision tower: pictures of one concept by different hands attract each other.

Supervised contrastive learning (Khosla et al., NeurIPS 2020, arXiv:2004.11362): in a batch of pairs,
each of two pictures of a concept, a picture shall be nearest to its partner. Pairs of one subcategory
stand in a batch together, so that what pushes apart is a look-alike; the tower then tells apart the
concepts that an episode contrasts. Where a teacher is given, the mean visual token also predicts the
teacher's features of the unchanged picture, which carries over what the teacher knows.

Shapes: the tower's output is (N, V, W) and its mean over V is what is compared; the teacher's features
are (N, E). Held-out pictures are never read.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from mmicl_core.backbones.hugging_face import (
    HuggingFaceBackbone,
    backbone_identity,
    is_model_folder,
    load_backbone,
)
from mmicl_core.config.model import SupConConfig
from mmicl_core.data.augment import augment
from mmicl_core.data.files import file_digest
from mmicl_core.errors import CheckpointError
from mmicl_core.methods.base import Method, Pictures, Side, States

__all__ = ["SupCon", "SupConBatch", "load_vision_tower", "tower_identity"]

TOWER_FILE = "vision_tower.safetensors"


@dataclass(frozen=True)
class SupConBatch:
    """Pairs of pictures, one pair after the other, with the numbers of their concepts, (N,)."""

    pixels: Tensor
    concepts: Tensor
    teacher: Tensor | None

    @property
    def num_scored(self) -> int:
        """Pictures."""
        return len(self.concepts)


class SupCon(Method):
    """Trains the vision tower; its heads are thrown away afterwards."""

    reads: ClassVar[Literal["episodes", "pictures"]] = "pictures"

    def __init__(self, backbone: HuggingFaceBackbone, config: SupConConfig) -> None:
        super().__init__(backbone)
        backbone.unfreeze("vision_tower")
        width = backbone.vision_width
        self.config = config
        self.head = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, config.embedding_width))
        if config.teacher is not None:
            self.student = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, config.teacher_width))

    def epoch_order(self, rows: Sequence[Mapping[str, Any]], epoch: int, seed: int) -> list[int]:
        """Pairs of pictures of a concept, `pairs_in_a_row` of the same subcategory at a time.

        A concept's odd picture out waits for another epoch's pairing, as do pairs that fill no row.
        """
        rng = random.Random(f"{seed}/pairs/{epoch}")
        by_concept: dict[tuple[str, str], list[int]] = {}
        for number, row in enumerate(rows):
            by_concept.setdefault((row["subcategory"], row["concept"]), []).append(number)
        pairs: dict[str, list[tuple[int, int]]] = {}
        for (subcategory, _), numbers in sorted(by_concept.items()):
            rng.shuffle(numbers)
            made = zip(numbers[::2], numbers[1::2], strict=False)
            pairs.setdefault(subcategory, []).extend(made)
        groups = list(pairs.values())
        rng.shuffle(groups)
        line: list[tuple[int, int]] = []
        for group in groups:
            rng.shuffle(group)
            line += group
        length = self.config.pairs_in_a_row
        runs = [line[start : start + length] for start in range(0, len(line) - length + 1, length)]
        rng.shuffle(runs)
        return [number for run in runs for pair in run for number in pair]

    def collate(
        self,
        rows: Sequence[Mapping[str, Any]],
        pictures: Pictures,
        states: States | None,
        side: Side = "right",
    ) -> SupConBatch:
        """Prepared `pixels` of each row -> augmented ones; `states` hold the teacher's view, if any."""
        pixels = torch.cat([row["pixels"] for row in rows])
        # A picture looks different at every visit, and the same at that visit in every run.
        generator = torch.Generator().manual_seed(hash(tuple(row["visit"] for row in rows)))
        numbers: dict[str, int] = {}
        concepts = [numbers.setdefault(row["concept"], len(numbers)) for row in rows]
        teacher = None
        if states is not None:
            # Arrays are mapped from disk, read-only, which torch insists on copying.
            teacher = torch.stack([torch.tensor(states[row["picture"]]) for row in rows]).float()
        return SupConBatch(augment(pixels, generator), torch.tensor(concepts), teacher)

    def forward(self, batch: SupConBatch) -> Tensor:
        """Contrastive loss of each picture, plus its distance from the teacher, (N,)."""
        pooled_NW = self.backbone.vision.tower_states_of(batch.pixels).mean(1)
        concepts = batch.concepts.to(pooled_NW.device)
        itself = torch.eye(len(concepts), dtype=torch.bool, device=pooled_NW.device)
        partner = (concepts[:, None] == concepts[None]) & ~itself
        embedding = F.normalize(self.head(pooled_NW), dim=1)
        likeness = (embedding @ embedding.T / self.config.temperature).masked_fill(itself, -torch.inf)
        log_chance = likeness.log_softmax(dim=1).masked_fill(~partner, 0)
        loss = -log_chance.sum(1) / partner.sum(1).clamp(min=1)
        if batch.teacher is not None:
            # What all pictures share would make any two alike; only what sets them apart is taught.
            teacher = batch.teacher.to(pooled_NW.device)
            teacher = teacher - teacher.mean(0)
            cosine = F.cosine_similarity(self.student(pooled_NW), teacher, dim=1)
            loss = loss + self.config.teacher_weight * (1 - cosine)
        return loss

    def save(self, folder: Path, about: Mapping[str, Any]) -> None:
        """Write the vision tower's weights alone."""
        folder.mkdir(parents=True, exist_ok=True)
        weights = self.backbone.vision_tower.state_dict()
        save_file({name: w.detach().float().contiguous() for name, w in weights.items()}, folder / TOWER_FILE)


def tower_identity(folder: Path) -> str:
    """Digest of a trained tower, or of the model that it is in.

    Raises:
        CheckpointError: there is none.
    """
    if is_model_folder(folder):
        return backbone_identity(folder)
    return file_digest(_tower_file(folder))


def load_vision_tower(folder: Path, backbone: HuggingFaceBackbone) -> None:
    """Put a trained tower, or that of another model, into a backbone.

    Raises:
        CheckpointError: there is none, or it does not fit.
    """
    try:
        if is_model_folder(folder):
            weights = load_backbone(folder).vision_tower.state_dict()
        else:
            weights = load_file(_tower_file(folder))
        backbone.vision_tower.load_state_dict(weights)
    except (RuntimeError, SafetensorError) as error:
        raise CheckpointError(f"the vision tower in {folder} does not fit the model: {error}") from error


def _tower_file(folder: Path) -> Path:
    path = folder / TOWER_FILE
    if not path.is_file():
        raise CheckpointError(f"{folder} holds no vision tower: it has no {TOWER_FILE}")
    return path
