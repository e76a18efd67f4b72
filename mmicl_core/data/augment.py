"""Changes of a picture that leave its concept: what training may see in place of the original."""

from __future__ import annotations

import random
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["augment", "augment_versions", "variant_key", "vary_turns"]

# Mild: some drawings differ in details alone.
TURN_RADIANS = 0.09
SCALE = 0.07
SHIFT = 0.04
GAIN = 0.1
GREY_SHARE = 0.07
VARIANT_MARK = "#"


def augment(pixels: Tensor, generator: torch.Generator) -> Tensor:
    """Flip, turn, scale, shift, tint and sometimes grey each picture.

    Args:
        pixels: (N, 3, height, width), normalised to -1 (black) .. 1 (white); drawn on white.
        generator: where the chance comes from.
    """
    count = len(pixels)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(count, *shape, generator=generator) * 2 - 1

    angle, scale = uniform() * TURN_RADIANS, torch.exp(uniform() * SCALE)
    flip = torch.where(uniform() < 0, -1.0, 1.0)
    shift = uniform(2) * SHIFT
    cosine, sine = torch.cos(angle) * scale, torch.sin(angle) * scale
    rows = (
        torch.stack([cosine * flip, -sine, shift[:, 0]], dim=1),
        torch.stack([sine * flip, cosine, shift[:, 1]], dim=1),
    )
    grid = F.affine_grid(torch.stack(rows, dim=1), list(pixels.shape), align_corners=False)
    # What comes in from outside is zero; on the ink, zero is white.
    ink = F.grid_sample(1 - pixels, grid, align_corners=False)
    ink = ink * (1 + uniform(3, 1, 1) * GAIN)
    grey = ink.mean(1, keepdim=True).expand_as(ink)
    return 1 - torch.where(uniform(1, 1, 1) < 2 * GREY_SHARE - 1, grey, ink)


def augment_versions(pixels: Tensor, keys: Sequence[str]) -> Tensor:
    """Each picture changed as its `variant_key` says, (N, 3, height, width), whatever else is beside it."""
    generators = [torch.Generator().manual_seed(zlib.crc32(key.encode())) for key in keys]
    changed = [augment(pixels[number : number + 1], chance) for number, chance in enumerate(generators)]
    return torch.cat(changed)


def variant_key(picture: str, variant: int) -> str:
    """Names a version of a picture: 0 is the picture itself."""
    return f"{picture}{VARIANT_MARK}{variant}" if variant else picture


def vary_turns(
    row: Mapping[str, Any], visit: int, variants: int, *, query_only: bool = False
) -> dict[str, Any]:
    """An EPISODE row whose turns name a `version` of their pictures, drawn by the number of the visit.

    Args:
        query_only: leave the demonstrations as they are, because their states are kept for the pictures
            themselves.
    """
    rng = random.Random(f"variants/{visit}")
    turns = [_version(turn, rng.randrange(variants)) for turn in row["turns"]]
    if query_only:
        turns[:-1] = row["turns"][:-1]
    return dict(row) | {"turns": turns}


def _version(turn: Mapping[str, Any], variant: int) -> dict[str, Any]:
    # One without a picture goes on about the picture before it.
    if turn["picture"] is None or not variant:
        return dict(turn)
    return dict(turn) | {"picture": variant_key(turn["picture"], variant), "version": variant}
