from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from mmicl_core.data.augment import augment_versions, variant_key
from mmicl_core.data.pictures import VISUAL, PixelStore, PreparedPicture, change_version, images_of
from mmicl_core.data.storage import CORPUS, Location, PictureReader
from mmicl_core.errors import ConfigError
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


IDS, GRID = (5, VISUAL, VISUAL), (1, 2, 4)


def _pixels(picture: Image.Image) -> Tensor:
    return torch.from_numpy(np.asarray(picture, dtype=np.float32) / 127.5 - 1).permute(2, 0, 1)[None]


def _prepare(pictures: Sequence[Image.Image]) -> list[PreparedPicture]:
    return [PreparedPicture(IDS, GRID, {"pixel_values": _pixels(picture)}) for picture in pictures]


def _prepare_for_another(pictures: Sequence[Image.Image]) -> list[PreparedPicture]:
    """As a model does that reads a grid beside patches."""
    grid = torch.tensor([[1, 70_001, 4]])
    return [
        PreparedPicture(IDS, GRID, {"pixel_values": _pixels(picture), "image_grid_thw": grid})
        for picture in pictures
    ]


def test_pixel_store_gives_a_picture_as_it_is_and_its_versions_augmented(tmp_path: Path) -> None:
    turns = _turns(tmp_path, ["a", "b"])
    version = variant_key("b", 3)
    store = PixelStore(_CountingReader(tmp_path), _prepare)
    seen = store.look([*turns, {"picture": None}, turns[1] | {"picture": version, "version": 3}])
    assert seen.keys() == {"a", "b", version}
    plain = _pixels(draw_picture(1)).half().float()
    found = {key: seen[key].inputs["pixel_values"] for key in seen}
    assert torch.equal(found["b"], plain)
    assert torch.equal(found[version], augment_versions(plain, [version]))
    assert not torch.equal(found[version], found["b"])
    # A version stands in the prompt where the picture does.
    assert all((one.ids, one.grid, one.features) == (IDS, GRID, None) for one in seen.values())


def test_pixel_store_keeps_whole_numbers_that_16_bits_would_change(tmp_path: Path) -> None:
    store = PixelStore(_CountingReader(tmp_path), _prepare_for_another)
    turns = _turns(tmp_path, ["a"])
    for _ in range(2):
        inputs = store.look(turns)["a"].inputs
        assert inputs["image_grid_thw"].tolist() == [[1, 70_001, 4]]
        assert torch.equal(inputs["pixel_values"], _pixels(draw_picture(0)).half().float())


def test_pixel_store_refuses_versions_for_a_model_that_reads_more_than_pixels(tmp_path: Path) -> None:
    store = PixelStore(_CountingReader(tmp_path), _prepare_for_another)
    (turn,) = _turns(tmp_path, ["a"])
    with pytest.raises(
        ConfigError, match=r"train\.picture_variants .* 'image_grid_thw': \(1, 3\)}: set it to 1"
    ):
        store.look([turn | {"picture": variant_key("a", 1), "version": 1}])


@pytest.mark.parametrize(
    "inputs",
    [{"pixel_values": (6, 1176)}, {"pixel_values": (2, 3, 8, 8)}, {"pixel_values": (1, 2, 3, 8, 8)}, {}],
    ids=["patches", "tiles", "tiles of one", "nothing"],
)
def test_version_of_a_picture_that_is_not_plain_pixels_is_refused(
    inputs: Mapping[str, tuple[int, ...]],
) -> None:
    picture = PreparedPicture(IDS, GRID, {name: torch.zeros(shape) for name, shape in inputs.items()})
    with pytest.raises(ConfigError, match="changes pictures as .3, height, width., but the model reads"):
        change_version(picture, variant_key("a", 1))


def test_pixel_store_reads_a_mark_inside_a_key_as_part_of_the_key(tmp_path: Path) -> None:
    turns = _turns(tmp_path, ["red#1"])
    seen = PixelStore(_CountingReader(tmp_path), _prepare).look(turns)
    assert torch.equal(seen["red#1"].inputs["pixel_values"], _pixels(draw_picture(0)).half().float())


def test_pixel_store_keeps_pictures_up_to_its_limit_and_lets_the_longest_unseen_go(tmp_path: Path) -> None:
    turns, reader = _turns(tmp_path, ["a", "b", "c"]), _CountingReader(tmp_path)
    of_one = _pixels(draw_picture(0)).half().nbytes
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
