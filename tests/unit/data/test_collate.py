from __future__ import annotations

from typing import Literal

import pytest
import torch

from mmicl_core.data.collate import NOT_SCORED, Packed, pack
from mmicl_core.prompts import IMAGE, Piece, Prompt

PADDING = 0
VISUAL = 3
LONG: Prompt = [
    Piece("text", ids=(1,)),
    Piece(IMAGE, reference="a"),
    Piece("text", ids=(7, 8)),
    Piece("text", ids=(9, 2), scored=True),
    Piece(IMAGE, reference="b"),
    Piece("text", ids=(7,)),
]
SHORT: Prompt = [
    Piece("text", ids=(1,)),
    Piece("fused", reference="0"),
    Piece("fused", reference="1"),
    Piece("text", ids=(5, 6), scored=True),
]
SHORT_FUSED = (2, 1)


def _pack(prompts: list[Prompt], fused: list[tuple[int, ...]], side: Literal["left", "right"]) -> Packed:
    return pack(prompts, visual_tokens=VISUAL, fused_tokens=fused, padding_id=PADDING, side=side)


def test_one_prompt_is_laid_out_as_written() -> None:
    packed = _pack([LONG], [()], "right")
    assert packed.ids_BL.tolist() == [[1, 0, 0, 0, 7, 8, 9, 2, 0, 0, 0, 7]]
    assert packed.image_BL.int().tolist() == [[0, 1, 1, 1, 0, 0, 0, 0, 1, 1, 1, 0]]
    assert packed.mask_BL.tolist() == [[1] * 12]
    assert packed.labels_BL.tolist() == [[-100] * 6 + [9, 2] + [-100] * 4]
    assert not packed.fused_BL.any()


def test_fused_tokens_take_the_length_of_their_own_demonstration() -> None:
    packed = _pack([SHORT], [SHORT_FUSED], "right")
    assert packed.fused_BL.int().tolist() == [[0, 1, 1, 1, 0, 0]]
    assert packed.ids_BL.tolist() == [[1, 0, 0, 0, 5, 6]]
    assert packed.num_scored == 2


@pytest.mark.parametrize("side", ["left", "right"])
def test_rows_of_a_batch_equal_single_rows_beside_padding_that_nothing_reads(
    side: Literal["left", "right"],
) -> None:
    batch = _pack([LONG, SHORT], [(), SHORT_FUSED], side)
    singles = [_pack([LONG], [()], side), _pack([SHORT], [SHORT_FUSED], side)]
    for row, single in enumerate(singles):
        length = single.ids_BL.shape[1]
        width = batch.ids_BL.shape[1]
        here = slice(width - length, width) if side == "left" else slice(0, length)
        padding = torch.ones(width, dtype=torch.bool)
        padding[here] = False
        for name, tensor in vars(batch).items():
            assert torch.equal(tensor[row, here], getattr(single, name)[0]), name
        assert not batch.mask_BL[row, padding].any()
        assert not batch.image_BL[row, padding].any() and not batch.fused_BL[row, padding].any()
        assert (batch.labels_BL[row, padding] == NOT_SCORED).all()
        assert (batch.ids_BL[row, padding] == PADDING).all()
    assert batch.num_scored == sum(single.num_scored for single in singles)
