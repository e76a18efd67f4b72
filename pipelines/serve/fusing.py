"""Demonstrations as a frozen model reads them, many side by side in one pass.

    Demonstration --lay_out--> Laid (pixels, one row of tokens) --read_demonstrations--> Known (T, D)

Whoever is beside a demonstration, its fused tokens are the same bytes. Sums of floats end differently in
another order, and libraries choose the order by the sizes of what they multiply. On a CPU, these hold it:

    one thread                  several split one sum among them where there are few rows
    16 columns and more         so many rows are summed alike, however many there are; fewer are not
    padding in every row        so that attention has a mask, and takes one path, whoever needs it
    pictures of one shape       so that none is padded
    fused tokens one by one     a demonstration has few of them

A GPU promises nothing of this: the last bits may depend on the neighbours, and the bank keeps what came
first.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from mmicl_core.backbones.hugging_face import HuggingFaceBackbone
from mmicl_core.backbones.vision import PictureBatch, join
from mmicl_core.bank import Demonstration, Fused, Known
from mmicl_core.data.collate import Packed, stack
from mmicl_core.data.pictures import VISUAL, PreparedPicture
from mmicl_core.errors import DataError
from mmicl_core.methods.aim import Aim, Demonstrations
from mmicl_core.prompts import Turn, count_text
from pipelines.serve.loaded import Loaded
from pipelines.serve.pictures import prepare_picture, prepare_pictures

__all__ = ["Laid", "Shown", "lay_out", "read_demonstrations", "read_pictures", "show", "unit_mean"]

# As many rows libraries sum alike. Rows grow longer by blocks: larger ones waste columns, smaller ones find
# fewer demonstrations to read together.
FEWEST_COLUMNS, BLOCK = 16, 8
SMALLEST_LENGTH = 1e-12


@dataclass(frozen=True, eq=False)
class Laid:
    """A demonstration that is ready to be read."""

    method: Aim
    pictures: tuple[PreparedPicture, ...]
    asked: str
    """The question, where what the model sees in a picture depends on it."""
    packed: Packed
    """Of one row."""
    kept: int
    """T."""
    tokens_full: int

    @property
    def shape(self) -> Hashable:
        """Demonstrations of equal shapes can be read side by side without a change."""
        sizes = frozenset(_size(picture) for picture in self.pictures)
        return self.method, self.packed.ids_BL.shape[1], sizes, self.asked

    @property
    def cost(self) -> int:
        """Its visual tokens, or its text where that is more."""
        visual = sum(map(_visual_tokens, self.pictures))
        return max(visual, self.tokens_full - visual)


@dataclass(frozen=True, eq=False)
class Shown:
    """A picture that is ready to be looked at."""

    backbone: HuggingFaceBackbone
    picture: PreparedPicture

    @property
    def shape(self) -> Hashable:
        """Pictures of equal shapes can be looked at side by side without a change."""
        return self.backbone, _size(self.picture)

    @property
    def cost(self) -> int:
        """Its visual tokens."""
        return _visual_tokens(self.picture)


def lay_out(loaded: Loaded, demonstration: Demonstration, max_image_pixels: int) -> Laid:
    """Prepare a demonstration for a model that fuses.

    Raises:
        DataError: a picture cannot be read, or a text holds control tokens or is too long.
    """
    method = loaded.method
    assert isinstance(method, Aim), method
    pictures = prepare_pictures(method.backbone, demonstration.images, max_image_pixels)
    keys = tuple(str(number) for number in range(len(pictures)))
    turn = Turn(keys, demonstration.question, demonstration.answer)
    shown = method.reader.pack([turn], dict(zip(keys, pictures, strict=True)))
    length = shown.packed.ids_BL.shape[1]
    if length > loaded.served.context_length:
        raise DataError(
            f"it takes {length} tokens, the model reads {loaded.served.context_length}: shorten its question "
            "or its answer, or show fewer pictures"
        )
    columns = max((length // BLOCK + 1) * BLOCK, FEWEST_COLUMNS)
    return Laid(
        method,
        tuple(pictures),
        demonstration.question if method.backbone.family.instructed else "",
        shown.packed.widen(columns, method.padding_id),
        shown.kept[0],
        length - count_text(method.chat.prefix()),
    )


def show(backbone: HuggingFaceBackbone, image: bytes, max_image_pixels: int) -> Shown:
    """Prepare a picture.

    Raises:
        DataError: it cannot be read.
    """
    return Shown(backbone, prepare_picture(backbone, image, max_image_pixels))


@torch.no_grad()
def read_demonstrations(laid: Sequence[Laid]) -> list[Known]:
    """Read demonstrations of one shape in one pass."""
    method = laid[0].method
    questions = [one.asked for one in laid for _ in one.pictures]
    seen = _see(method.backbone, [picture for one in laid for picture in one.pictures], questions)
    features = PictureBatch(tuple(len(visual) for visual in seen), {}, seen, tuple(questions))
    kept = tuple(one.kept for one in laid)
    states = method.reader.read(Demonstrations(stack([one.packed for one in laid]), features, kept))
    vectors = iter([_vector(visual, method.backbone.width) for visual in seen])
    return [
        Known(
            method.fuse_to_keep([states_TD])[0].float().cpu().numpy(),
            one.tokens_full,
            unit_mean([next(vectors) for _ in one.pictures]) if one.pictures else None,
        )
        for one, states_TD in zip(laid, states, strict=True)
    ]


@torch.no_grad()
def read_pictures(shown: Sequence[Shown]) -> list[Fused]:
    """Look at pictures of one shape in one pass: a vector of length 1 for each, (E,), near to those of others
    that look alike."""
    backbone = shown[0].backbone
    seen = _see(backbone, [one.picture for one in shown], [""] * len(shown))
    return [_vector(visual, backbone.width) for visual in seen]


def unit_mean(vectors: Sequence[Fused]) -> Fused:
    """The mean of vectors of length 1, (E,), at that length."""
    if len(vectors) == 1:
        return vectors[0]
    mean = np.mean(vectors, axis=0, dtype=np.float64)
    return np.asarray(mean / max(float(np.linalg.norm(mean)), SMALLEST_LENGTH), dtype=np.float32)


def _see(
    backbone: HuggingFaceBackbone, pictures: Sequence[PreparedPicture], questions: Sequence[str]
) -> tuple[Tensor, ...]:
    """Visual tokens of each picture, (V, D + K D)."""
    batch = join(pictures, questions)
    visual = backbone.see(batch)
    return () if visual is None else torch.split(visual, list(batch.visual_tokens))


def _vector(visual_VD: Tensor, width: int) -> Fused:
    # Behind the width come features for later layers.
    mean = visual_VD[:, :width].float().mean(0)
    vector: Fused = F.normalize(mean, dim=0).cpu().numpy()
    return vector


def _size(picture: PreparedPicture) -> Hashable:
    return picture.grid, tuple((name, tuple(tensor.shape)) for name, tensor in picture.inputs.items())


def _visual_tokens(picture: PreparedPicture) -> int:
    return sum(token == VISUAL for token in picture.ids)
