from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from mmicl_core.data.pictures import VISUAL, PreparedPicture
from mmicl_core.data.store import STORE, ArrayStore, PictureStore, store_columns
from mmicl_core.errors import DataError


def _write(file: Path, *batches: pa.RecordBatch) -> None:
    with pa.ipc.new_file(str(file), STORE) as writer:
        for batch in batches:
            writer.write_batch(batch)


def test_store_gives_back_arrays_of_different_shapes_from_several_files(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    shapes = [(3, 4), (5, 4), (1, 4), (7,)]
    arrays = [rng.normal(size=shape).astype(np.float32) for shape in shapes]
    keys = [f"key {number}" for number in range(len(arrays))]
    _write(tmp_path / "a.arrow", store_columns(keys[:2], arrays[:2]))
    # A slice of a transposed array is not contiguous in memory.
    _write(tmp_path / "b.arrow", store_columns(keys[2:], [arrays[2], arrays[3]]))
    store = ArrayStore(tmp_path)
    assert len(store) == 4 and "key 0" in store and "key 9" not in store
    for key, array in zip(keys, arrays, strict=True):
        assert np.array_equal(store[key], array.astype(np.float16))


def test_store_keeps_the_order_of_axes_of_a_transposed_array(tmp_path: Path) -> None:
    array = np.arange(12, dtype=np.float32).reshape(3, 4).T
    _write(tmp_path / "a.arrow", store_columns(["t"], [array]))
    assert np.array_equal(ArrayStore(tmp_path)["t"], array)


def test_store_refuses_values_that_16_bits_cannot_hold() -> None:
    # An infinite feature would turn the loss of a long training into NaN far from here.
    with pytest.raises(DataError, match="'big'"):
        store_columns(["small", "big"], [np.ones(2), np.array([1.0, 1e6])])


def test_store_names_the_key_that_it_has_not_and_a_missing_folder(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="the stage before did not run"):
        ArrayStore(tmp_path)
    _write(tmp_path / "a.arrow", store_columns(["t"], [np.ones(2)]))
    with pytest.raises(DataError, match="has no 'other' among its 1 keys"):
        ArrayStore(tmp_path)["other"]


def test_picture_store_gives_back_features_with_the_place_of_each_picture_in_a_prompt(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    pictures = [
        PreparedPicture((5, VISUAL, VISUAL, 6), grid=(1, 2, 4)),
        PreparedPicture((VISUAL,)),
        PreparedPicture((VISUAL, VISUAL, VISUAL), grid=(1, 6, 2)),
    ]
    arrays = [rng.normal(size=(number, 4)).astype(np.float16) for number in (2, 1, 3)]
    _write(tmp_path / "a.arrow", store_columns(["p0", "p1"], arrays[:2], pictures[:2]))
    _write(tmp_path / "b.arrow", store_columns(["p2"], arrays[2:], pictures[2:]))
    store = PictureStore(tmp_path)
    assert (len(store), sorted(store), "p3" in store) == (3, ["p0", "p1", "p2"], False)
    for key, picture, array in zip(("p0", "p1", "p2"), pictures, arrays, strict=True):
        found = store[key]
        assert (found.ids, found.grid, found.inputs) == (picture.ids, picture.grid, {})
        assert found.features is not None and np.array_equal(found.features, array)
    with pytest.raises(DataError, match="has no 'p3' among its 3 keys"):
        store["p3"]
