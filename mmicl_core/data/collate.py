"""Prompts -> tensors: the only place that pads.

Shapes: B prompts of at most L tokens. A picture takes V positions, a demonstration's fused tokens as
many as it had text tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from mmicl_core.prompts import Prompt

__all__ = ["NOT_SCORED", "Packed", "pack"]

NOT_SCORED = -100


@dataclass(frozen=True)
class Packed:
    """Prompts of one batch, side by side."""

    ids_BL: Tensor
    """Token ids; the padding id under pictures, fused tokens and padding."""
    mask_BL: Tensor
    """1 where there is a token."""
    image_BL: Tensor
    """True where a picture's visual tokens go, prompt after prompt."""
    fused_BL: Tensor
    """True where fused tokens go, prompt after prompt."""
    labels_BL: Tensor
    """Token ids where the loss counts, `NOT_SCORED` elsewhere."""

    @property
    def num_scored(self) -> int:
        """Tokens that the loss counts."""
        return int((self.labels_BL != NOT_SCORED).sum())

    def to(self, device: torch.device) -> Packed:
        """The same on a device."""
        return Packed(*(tensor.to(device) for tensor in vars(self).values()))


def pack(
    prompts: Sequence[Prompt],
    *,
    visual_tokens: int,
    fused_tokens: Sequence[Sequence[int]] = (),
    padding_id: int,
    side: Literal["left", "right"] = "right",
) -> Packed:
    """Lay prompts out in rows of equal length.

    Args:
        visual_tokens: V.
        fused_tokens: for each prompt, the length of each demonstration, in the order of its pieces.
        padding_id: fills what is not text.
        side: `right` pads for training, `left` for generation.
    """
    rows = []
    for number, prompt in enumerate(prompts):
        lengths = iter(fused_tokens[number] if fused_tokens else ())
        ids: list[int] = []
        image: list[bool] = []
        fused: list[bool] = []
        labels: list[int] = []
        for piece in prompt:
            text = piece.kind == "text"
            count = len(piece.ids) if text else visual_tokens if piece.kind == "image" else next(lengths)
            ids += piece.ids if text else [padding_id] * count
            image += [piece.kind == "image"] * count
            fused += [piece.kind == "fused"] * count
            labels += piece.ids if piece.scored else [NOT_SCORED] * count
        rows.append((ids, [1] * len(ids), image, fused, labels))
    longest = max(len(ids) for ids, *_ in rows)
    columns = zip(*rows, strict=True)
    fills = (padding_id, 0, False, False, NOT_SCORED)
    return Packed(*(_pad(column, longest, fill, side) for column, fill in zip(columns, fills, strict=True)))


def _pad(rows: Sequence[Sequence[int]], longest: int, fill: int, side: str) -> Tensor:
    padded = np.full((len(rows), longest), fill)
    for number, row in enumerate(rows):
        padded[number, slice(longest - len(row), None) if side == "left" else slice(len(row))] = row
    return torch.from_numpy(padded)
