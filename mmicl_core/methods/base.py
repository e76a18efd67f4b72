"""What every method is: a module around a backbone that scores the answers of a batch.

A method turns rows (episodes or pictures) into a batch, gives the negative log-likelihood of every
scored token, and saves what it trained. Nothing here knows how gradients are taken or where.
"""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mmicl_core.backbones.hugging_face import HuggingFaceBackbone
from mmicl_core.data.collate import NOT_SCORED, Packed
from mmicl_core.prompts import ChatFormat, Turn

__all__ = ["Batch", "Lookup", "Method", "answer_nll", "episode_turns", "prompt_embeddings", "stack"]

PIXEL_AXES = 4


class Batch(Protocol):
    """What `Method.collate` makes and `Method.forward` takes."""

    @property
    def num_scored(self) -> int:
        """Targets of the batch, over which the loss is a mean."""
        ...


class Lookup(Protocol):
    """Features or pixels by key: an `ArrayStore`, or a dict."""

    def __getitem__(self, key: str) -> Any:
        """The array of a key."""
        ...


class Method(nn.Module, ABC):
    """A way to learn from demonstrations, around one backbone."""

    reads: ClassVar[Literal["episodes", "pictures"]] = "episodes"
    """What one row of training data is."""
    needs_states: ClassVar[bool] = False
    """Whether the frozen states of every demonstration are computed before training."""

    def __init__(self, backbone: HuggingFaceBackbone) -> None:
        super().__init__()
        self.backbone = backbone
        self.chat = ChatFormat(backbone.processor)

    @abstractmethod
    def collate(self, rows: Sequence[Mapping[str, Any]], features: Lookup, states: Lookup | None) -> Batch:
        """Rows -> a batch.

        Args:
            features: of each picture vision-tower output, or pixels where that is not kept.
            states: frozen states by demonstration; None where they were not kept, or are not needed.
        """

    def epoch_order(self, rows: Sequence[Mapping[str, Any]], epoch: int, seed: int) -> list[int]:
        """The order in which one pass reads its rows; each pass after the first is shuffled.

        The first pass keeps the rows' own order, so that a curriculum stays one. Later ones move
        stretches of equal shots as a whole, so that a batch needs little padding.
        """
        runs: list[list[int]] = []
        for number, row in enumerate(rows):
            if not runs or rows[runs[-1][0]]["shots_of_both_classes"] != row["shots_of_both_classes"]:
                runs.append([])
            runs[-1].append(number)
        if epoch:
            random.Random(f"{seed}/order/{epoch}").shuffle(runs)
        return [number for run in runs for number in run]

    @abstractmethod
    def forward(self, batch: Any) -> Tensor:
        """Negative log-likelihood of every scored target of a batch, one vector."""

    @abstractmethod
    def save(self, folder: Path) -> None:
        """Write what was trained, in the form that is used afterwards."""

    def trainable(self) -> dict[str, nn.Parameter]:
        """The parameters that training changes, by name."""
        return {name: p for name, p in self.named_parameters() if p.requires_grad}


def episode_turns(row: Mapping[str, Any]) -> list[Turn]:
    """The turns of an EPISODE row."""
    return [Turn(turn["picture"], turn["question"], turn["answer"], turn["scored"]) for turn in row["turns"]]


def stack(features: Lookup, keys: Sequence[str | None]) -> Tensor:
    """Look N pictures up: (N, V, W), or (N, 3, height, width) where pixels are kept."""
    return torch.from_numpy(np.stack([features[str(key)] for key in keys]))


def prompt_embeddings(
    backbone: HuggingFaceBackbone,
    packed: Packed,
    pictures: Tensor,
    fused_TD: Sequence[Tensor] = (),
) -> Tensor:
    """Input embeddings of a batch: text by id, pictures and fused tokens at their places, (B, L, D).

    Args:
        pictures: in the order of the prompts, vision-tower output (N, V, W) where that is kept, or pixels
            (N, 3, height, width).
        fused_TD: fused tokens of the demonstrations, in the order of the prompts.
    """
    embeds_BLD = backbone.embed(packed.ids_BL)
    if len(pictures):
        vision_NVW = backbone.tower_states(pictures) if pictures.ndim == PIXEL_AXES else pictures
        image_NVD = backbone.project(vision_NVW).to(embeds_BLD.dtype)
        embeds_BLD = embeds_BLD.masked_scatter(packed.image_BL[..., None], image_NVD)
    if fused_TD:
        fused = torch.cat(list(fused_TD)).to(embeds_BLD.dtype)
        embeds_BLD = embeds_BLD.masked_scatter(packed.fused_BL[..., None], fused)
    return embeds_BLD


def answer_nll(backbone: HuggingFaceBackbone, embeds_BLD: Tensor, packed: Packed) -> Tensor:
    """Negative log-likelihood of each scored token, in the order of the prompts.

    Only scored positions meet the vocabulary: the others would cost most of the memory for nothing.
    """
    hidden_BLD = backbone.hidden(embeds_BLD, packed.mask_BL)
    labels = packed.labels_BL[:, 1:]
    scored = labels != NOT_SCORED
    logits = backbone.logits(hidden_BLD[:, :-1][scored])
    return F.cross_entropy(logits.float(), labels[scored], reduction="none")
