from __future__ import annotations

from typing import Literal

import pytest
import torch

from mmicl_core.data.collate import NOT_SCORED, Packed, pack, stack
from mmicl_core.data.pictures import VISUAL, PreparedPicture
from mmicl_core.prompts import IMAGE, Piece, Prompt

PADDING = 0
PLAIN = PreparedPicture((VISUAL,) * 3)
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
LONG_PICTURES = (PLAIN, PLAIN)


def _pack(
    prompts: list[Prompt],
    fused: tuple[int, ...],
    side: Literal["left", "right"],
    pictures: tuple[PreparedPicture, ...] = LONG_PICTURES,
) -> Packed:
    return pack(prompts, pictures=pictures, fused_tokens=fused, padding_id=PADDING, side=side)


def test_one_prompt_is_laid_out_as_written() -> None:
    packed = _pack([LONG], (), "right")
    assert packed.ids_BL.tolist() == [[1, 0, 0, 0, 7, 8, 9, 2, 0, 0, 0, 7]]
    assert packed.image_BL.int().tolist() == [[0, 1, 1, 1, 0, 0, 0, 0, 1, 1, 1, 0]]
    assert packed.mask_BL.tolist() == [[1] * 12]
    assert packed.labels_BL.tolist() == [[-100] * 6 + [9, 2] + [-100] * 4]
    assert packed.text_BL.int().tolist() == [[1, 0, 0, 0, 1, 1, 1, 1, 0, 0, 0, 1]]
    assert packed.answer_BL.int().tolist() == [[0] * 6 + [1, 1] + [0] * 4]
    assert not packed.fused_BL.any()
    assert packed.grids_N3.shape == (0, 3)


def test_picture_takes_the_place_that_its_model_gives_it_and_only_its_visual_tokens_are_visual() -> None:
    # What a model writes around and between the visual tokens of a picture, as rows of them.
    wide = PreparedPicture((50, VISUAL, VISUAL, 51, VISUAL, VISUAL, 52), grid=(1, 4, 4))
    small = PreparedPicture((50, VISUAL, 52), grid=(1, 2, 2))
    packed = _pack([LONG], (), "right", (wide, small))
    assert packed.ids_BL.tolist() == [[1, 50, 0, 0, 51, 0, 0, 52, 7, 8, 9, 2, 50, 0, 52, 7]]
    assert packed.image_BL.int().tolist() == [[0, 0, 1, 1, 0, 1, 1, 0, 0, 0, 0, 0, 0, 1, 0, 0]]
    assert packed.text_BL.int().tolist() == [[1, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 0, 0, 0, 1]]
    assert packed.labels_BL.tolist() == [[-100] * 10 + [9, 2] + [-100] * 4]
    assert packed.mask_BL.all()
    assert packed.grids_N3.tolist() == [[1, 4, 4], [1, 2, 2]]


def test_fused_tokens_take_the_length_of_their_own_demonstration() -> None:
    packed = _pack([SHORT], SHORT_FUSED, "right", ())
    assert packed.fused_BL.int().tolist() == [[0, 1, 1, 1, 0, 0]]
    assert packed.ids_BL.tolist() == [[1, 0, 0, 0, 5, 6]]
    assert packed.text_BL.int().tolist() == [[1, 0, 0, 0, 1, 1]]
    assert not packed.image_BL.any()
    assert packed.num_scored == 2


@pytest.mark.parametrize("side", ["left", "right"])
def test_rows_of_a_batch_equal_single_rows_beside_padding_that_nothing_reads(
    side: Literal["left", "right"],
) -> None:
    other = PreparedPicture((60, VISUAL, 61), grid=(1, 1, 1))
    mixed: Prompt = [Piece("fused", reference="0"), Piece(IMAGE, reference="c"), *SHORT[3:]]
    prompts, pictures = [LONG, SHORT, mixed], (LONG_PICTURES, (), (other,))
    lengths: tuple[tuple[int, ...], ...] = ((), SHORT_FUSED, (4,))
    # Pictures and lengths follow each other through all prompts.
    batch = _pack(prompts, sum(lengths, ()), side, sum(pictures, ()))
    singles = [
        _pack([prompt], fused, side, shown)
        for prompt, fused, shown in zip(prompts, lengths, pictures, strict=True)
    ]
    for row, single in enumerate(singles):
        length = single.ids_BL.shape[1]
        width = batch.ids_BL.shape[1]
        here = slice(width - length, width) if side == "left" else slice(0, length)
        padding = torch.ones(width, dtype=torch.bool)
        padding[here] = False
        for name, tensor in vars(batch).items():
            if name != "grids_N3":
                assert torch.equal(tensor[row, here], getattr(single, name)[0]), name
        assert not batch.mask_BL[row, padding].any()
        for places in (batch.image_BL, batch.fused_BL, batch.text_BL):
            assert not places[row, padding].any()
        assert (batch.labels_BL[row, padding] == NOT_SCORED).all()
        assert (batch.ids_BL[row, padding] == PADDING).all()
    assert batch.num_scored == sum(single.num_scored for single in singles)
    assert torch.equal(batch.grids_N3, torch.cat([single.grids_N3 for single in singles]))


def test_prompts_packed_apart_and_stacked_are_as_if_packed_together():
    apart = [_pack([LONG], (), "right"), _pack([SHORT], SHORT_FUSED, "right", ())]
    columns = apart[0].ids_BL.shape[1]
    stacked = stack([one.widen(columns, PADDING) for one in apart])
    together = _pack([LONG, SHORT], SHORT_FUSED, "right")
    assert all(torch.equal(vars(stacked)[name], tensor) for name, tensor in vars(together).items())
    assert all(vars(stacked)[name].dtype == tensor.dtype for name, tensor in vars(together).items())


def test_rows_that_are_wide_enough_stay_as_they_are():
    packed = _pack([SHORT], SHORT_FUSED, "right", ())
    assert torch.equal(packed.widen(1, PADDING).ids_BL, packed.ids_BL)
