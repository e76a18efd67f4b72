from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from mmicl_core.data.augment import augment_versions, variant_key
from mmicl_core.data.pictures import PictureStore, PixelStore, read_metadata
from mmicl_core.data.schema import PAIR
from mmicl_core.errors import DataError
from tests.fakes import draw_picture, encode_picture, pair_rows


def _write(folder: Path) -> list[str]:
    rows = pair_rows(("red-cat", "blue-cat"), ("ink", "oil"))
    for number, row in enumerate(rows):
        row |= {"image": encode_picture(draw_picture(number)), "skipped": None}
    empty = dict.fromkeys(PAIR.names)
    # The metadata of a sample may lie apart from its picture and then be a second, unusable sample.
    unusable = [empty | {"picture": rows[0]["picture"], "skipped": "no picture"}]
    schema = PAIR.append(pa.field("skipped", pa.string()))
    for name, part in (("a", rows[:3]), ("b", [*rows[3:], *unusable])):
        pq.write_table(pa.Table.from_pylist(part, schema=schema), folder / f"{name}.parquet")
    return [row["picture"] for row in rows]


def test_picture_store_finds_every_usable_picture_over_all_files(tmp_path: Path) -> None:
    keys = _write(tmp_path)
    store = PictureStore(tmp_path)
    for number, key in enumerate(keys):
        assert np.array_equal(np.asarray(store.picture(key)), np.asarray(draw_picture(number)))


def test_picture_store_names_the_picture_that_it_has_not(tmp_path: Path) -> None:
    _write(tmp_path)
    with pytest.raises(DataError, match="no picture 'dog__ink'"):
        PictureStore(tmp_path).encoded("dog__ink")


def _prepare(pictures: Sequence[Image.Image]) -> torch.Tensor:
    arrays = [np.asarray(picture, dtype=np.float32) / 127.5 - 1 for picture in pictures]
    return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2)


def test_pixel_store_gives_a_picture_as_it_is_and_its_versions_augmented(tmp_path: Path) -> None:
    key = _write(tmp_path)[2]
    pictures = PictureStore(tmp_path)
    store = PixelStore(pictures, _prepare)
    plain = _prepare([pictures.picture(key)]).half().float()
    np.testing.assert_array_equal(store[key], plain[0].numpy())
    version = variant_key(key, 3)
    np.testing.assert_array_equal(store[version], augment_versions(plain, [version])[0].numpy())
    assert not np.array_equal(store[version], store[key])


def test_pixel_store_reads_a_mark_inside_a_key_as_part_of_the_key(tmp_path: Path) -> None:
    row = pair_rows(("red#1",), ("ink",))[0] | {"image": encode_picture(draw_picture(0)), "skipped": None}
    schema = PAIR.append(pa.field("skipped", pa.string()))
    pq.write_table(pa.Table.from_pylist([row], schema=schema), tmp_path / "a.parquet")
    store = PixelStore(PictureStore(tmp_path), _prepare)
    assert store[row["picture"]].shape == store[variant_key(row["picture"], 2)].shape
    with pytest.raises(DataError, match="no picture 'dog'"):
        store[variant_key("dog", 2)]


def test_metadata_holds_the_usable_rows_in_key_order_without_images(tmp_path: Path) -> None:
    keys = _write(tmp_path)
    rows = read_metadata(tmp_path)
    assert [row["picture"] for row in rows] == sorted(keys)
    assert all("image" not in row for row in rows)


def test_a_folder_without_pictures_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="holds no Parquet file"):
        read_metadata(tmp_path)
