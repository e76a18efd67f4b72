from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from mmicl_core.data.augment import augment_versions, variant_key
from mmicl_core.data.pictures import PixelStore, images_of
from mmicl_core.data.storage import CORPUS, Location, PictureReader
from tests.fakes import draw_picture, encode_picture


class _CountingReader(PictureReader):
    def __init__(self, folder: Path) -> None:
        super().__init__({CORPUS: Location(str(folder))})
        self.reads = 0

    def read(self, image: Mapping[str, Any]) -> bytes:
        self.reads += 1
        return super().read(image)


def _turns(folder: Path, keys: Sequence[str]) -> list[dict[str, Any]]:
    turns = []
    for number, key in enumerate(keys):
        data = encode_picture(draw_picture(number))
        (folder / f"{number}.png").write_bytes(data)
        image = {"path": f"corpus:{number}.png", "member": "", "offset": 0, "size": len(data)}
        turns.append({"picture": key, "image": image})
    return turns


def _prepare(pictures: Sequence[Image.Image]) -> torch.Tensor:
    arrays = [np.asarray(picture, dtype=np.float32) / 127.5 - 1 for picture in pictures]
    return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2)


def test_pixel_store_gives_a_picture_as_it_is_and_its_versions_augmented(tmp_path: Path) -> None:
    turns = _turns(tmp_path, ["a", "b"])
    version = variant_key("b", 3)
    store = PixelStore(_CountingReader(tmp_path), _prepare)
    seen = store.look([*turns, {"picture": None}, turns[1] | {"picture": version, "version": 3}])
    assert seen.keys() == {"a", "b", version}
    plain = _prepare([draw_picture(1)]).half().float()
    np.testing.assert_array_equal(seen["b"], plain[0].numpy())
    np.testing.assert_array_equal(seen[version], augment_versions(plain, [version])[0].numpy())
    assert not np.array_equal(seen[version], seen["b"])


def test_pixel_store_reads_a_mark_inside_a_key_as_part_of_the_key(tmp_path: Path) -> None:
    turns = _turns(tmp_path, ["red#1"])
    seen = PixelStore(_CountingReader(tmp_path), _prepare).look(turns)
    np.testing.assert_array_equal(seen["red#1"], _prepare([draw_picture(0)])[0].half().float().numpy())


def test_pixel_store_keeps_pictures_up_to_its_limit_and_lets_the_longest_unseen_go(tmp_path: Path) -> None:
    turns, reader = _turns(tmp_path, ["a", "b", "c"]), _CountingReader(tmp_path)
    of_one = _prepare([draw_picture(0)]).half().nbytes
    store = PixelStore(reader, _prepare, most_bytes=2 * of_one)
    store.look(turns[:2])
    store.look(turns[:2])
    assert reader.reads == 2
    store.look([turns[0], turns[2]])
    assert reader.reads == 3
    store.look([turns[0], turns[2]])
    assert reader.reads == 3
    store.look([turns[1]])
    assert reader.reads == 4


def test_images_of_episodes_are_those_of_all_turns_that_have_a_picture() -> None:
    turns = [{"picture": key, "image": {"path": key}} for key in ("a", "b", "a")]
    episodes = [{"turns": turns}, {"turns": [{"picture": None, "image": None}]}]
    assert images_of(episodes) == {"a": {"path": "a"}, "b": {"path": "b"}}
