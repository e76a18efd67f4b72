from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from mmicl_core.data.augment import augment_versions, variant_key
from mmicl_core.data.pictures import PixelStore, images_of
from mmicl_core.data.storage import CORPUS, Location, PictureReader
from mmicl_core.errors import DataError
from tests.fakes import draw_picture, encode_picture


def _store(folder: Path, keys: Sequence[str]) -> PixelStore:
    images: dict[str, Any] = {}
    for number, key in enumerate(keys):
        data = encode_picture(draw_picture(number))
        (folder / f"{number}.png").write_bytes(data)
        images[key] = {"path": f"corpus:{number}.png", "member": "", "offset": 0, "size": len(data)}
    return PixelStore(PictureReader({CORPUS: Location(str(folder))}), images, _prepare)


def _prepare(pictures: Sequence[Image.Image]) -> torch.Tensor:
    arrays = [np.asarray(picture, dtype=np.float32) / 127.5 - 1 for picture in pictures]
    return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2)


def test_pixel_store_gives_a_picture_as_it_is_and_its_versions_augmented(tmp_path: Path) -> None:
    store = _store(tmp_path, ["a", "b"])
    plain = _prepare([draw_picture(1)]).half().float()
    np.testing.assert_array_equal(store["b"], plain[0].numpy())
    version = variant_key("b", 3)
    np.testing.assert_array_equal(store[version], augment_versions(plain, [version])[0].numpy())
    assert not np.array_equal(store[version], store["b"])


def test_pixel_store_reads_a_mark_inside_a_key_as_part_of_the_key(tmp_path: Path) -> None:
    store = _store(tmp_path, ["red#1"])
    assert store["red#1"].shape == store[variant_key("red#1", 2)].shape
    with pytest.raises(DataError, match="no picture 'dog'"):
        store[variant_key("dog", 2)]


def test_images_of_episodes_are_those_of_all_turns_that_have_a_picture() -> None:
    turns = [{"picture": key, "image": {"path": key}} for key in ("a", "b", "a")]
    episodes = [{"turns": turns}, {"turns": [{"picture": None, "image": None}]}]
    assert images_of(episodes) == {"a": {"path": "a"}, "b": {"path": "b"}}
