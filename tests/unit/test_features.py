from __future__ import annotations

import torch

from pipelines.features import _augmented


def test_versions_of_a_picture_do_not_depend_on_how_batches_are_cut() -> None:
    pixels = torch.rand(5, 3, 20, 20, generator=torch.Generator().manual_seed(0)) * 2 - 1
    keys = [f"cat__{style}" for style in "abcde"]
    whole = _augmented(pixels, keys, 1)
    order = [3, 0, 4]
    # Sums of one picture may be taken in another order than those of five.
    torch.testing.assert_close(_augmented(pixels[order], [keys[n] for n in order], 1), whole[order])
    other = _augmented(pixels, keys, 2)
    assert all(not torch.allclose(one, two) for one, two in zip(whole, other, strict=True))
    same = _augmented(pixels[:1].expand(5, -1, -1, -1), keys, 1)
    assert all(not torch.allclose(same[0], changed) for changed in same[1:])
