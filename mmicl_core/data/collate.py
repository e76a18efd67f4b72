"""Prompts -> tensors: the only place that pads.

Shapes: B prompts of at most L tokens. A picture takes the positions that its model gives it, a
demonstration's fused tokens as many as it had text tokens.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from mmicl_core.data.pictures import VISUAL, PreparedPicture
from mmicl_core.prompts import Prompt

__all__ = ["NOT_SCORED", "Packed", "pack", "stack"]

NOT_SCORED = -100


@dataclass(frozen=True)
class Packed:
    """Prompts of one batch, side by side."""

    ids_BL: Tensor
    """Token ids; the padding id under visual tokens, fused tokens and padding."""
    mask_BL: Tensor
    """1 where there is a token."""
    image_BL: Tensor
    """True where visual tokens go, prompt after prompt."""
    fused_BL: Tensor
    """True where fused tokens go, prompt after prompt."""
    text_BL: Tensor
    """True where there is text of a turn or of the prefix, and not what a model writes around pictures."""
    labels_BL: Tensor
    """Token ids where the loss counts, `NOT_SCORED` elsewhere."""
    grids_N3: Tensor
    """Frames, rows and columns of each picture, in the order of the prompts; (0, 3) where no model asks."""

    @property
    def num_scored(self) -> int:
        """Tokens that the loss counts."""
        return int((self.labels_BL != NOT_SCORED).sum())

    @property
    def answer_BL(self) -> Tensor:
        """True where the loss counts."""
        return self.labels_BL != NOT_SCORED

    def to(self, device: torch.device) -> Packed:
        """The same on a device."""
        return replace(self, **{name: tensor.to(device) for name, tensor in vars(self).items()})

    def widen(self, columns: int, padding_id: int) -> Packed:
        """The same in rows of at least so many columns, with padding on the right."""
        missing = max(columns - self.ids_BL.shape[1], 0)
        fills = {"ids_BL": padding_id, "labels_BL": NOT_SCORED}
        rows = {name: tensor for name, tensor in vars(self).items() if name != "grids_N3"}
        return replace(
            self, **{name: F.pad(rows[name], (0, missing), value=fills.get(name, 0)) for name in rows}
        )


def stack(batches: Sequence[Packed]) -> Packed:
    """Batches of equal width as one, with the pictures of all in the same order."""
    return Packed(**{name: torch.cat([vars(batch)[name] for batch in batches]) for name in vars(batches[0])})


@dataclass
class _Row:
    ids: list[int]
    image: list[bool]
    fused: list[bool]
    text: list[bool]
    labels: list[int]


def pack(
    prompts: Sequence[Prompt],
    *,
    pictures: Iterable[PreparedPicture] = (),
    fused_tokens: Iterable[int] = (),
    padding_id: int,
    side: Literal["left", "right"] = "right",
) -> Packed:
    """Lay prompts out in rows of equal length.

    Args:
        pictures: those of all prompts, in their order.
        fused_tokens: the length of each demonstration in the order of the pieces of all prompts.
        padding_id: fills what is not text.
        side: `right` pads for training, `left` for generation.
    """
    given, lengths = list(pictures), iter(fused_tokens)
    order = iter(given)
    rows = []
    for prompt in prompts:
        row = _Row([], [], [], [], [])
        for piece in prompt:
            if piece.kind == "text":
                ids: Sequence[int] = piece.ids
            else:
                ids = next(order).ids if piece.kind == "image" else [VISUAL] * next(lengths)
            row.ids += [padding_id if token == VISUAL else token for token in ids]
            row.image += [piece.kind == "image" and token == VISUAL for token in ids]
            row.fused += [piece.kind == "fused"] * len(ids)
            row.text += [piece.kind == "text"] * len(ids)
            row.labels += ids if piece.scored else [NOT_SCORED] * len(ids)
        rows.append(row)
    longest = max((len(row.ids) for row in rows), default=0)
    fills = {"ids": padding_id, "image": False, "fused": False, "text": False, "labels": NOT_SCORED}
    padded = {
        name: _pad([vars(row)[name] for row in rows], longest, fill, side) for name, fill in fills.items()
    }
    mask_BL = _pad([[1] * len(row.ids) for row in rows], longest, 0, side)
    grids = [picture.grid for picture in given if picture.grid]
    return Packed(
        padded["ids"],
        mask_BL,
        padded["image"],
        padded["fused"],
        padded["text"],
        padded["labels"],
        torch.tensor(grids, dtype=torch.long).reshape(-1, 3),
    )


def _pad(rows: Sequence[Sequence[int]], longest: int, fill: int, side: str) -> Tensor:
    padded = np.full((len(rows), longest), fill)
    for number, row in enumerate(rows):
        padded[number, slice(longest - len(row), None) if side == "left" else slice(len(row))] = row
    return torch.from_numpy(padded)
