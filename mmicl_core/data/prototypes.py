"""One vector of pictures and one of its name for each concept.

Shapes: C concepts of width E. A picture prototype is the mean of at most `prototype_pictures` embeddings
(link-context learning averages 100, arXiv:2308.07891, section 3.2), normalised; which ones, a hash of the
pictures' keys decides.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mmicl_core.data.catalogue import Catalogue

__all__ = ["gather_embeddings", "mean_pictures", "read_prototypes"]

Vectors = np.ndarray[Any, np.dtype[np.float32]]


def mean_pictures(
    catalogue: Catalogue, groups: range, files: Sequence[np.ndarray[Any, Any]], most: int, seed: int
) -> Vectors:
    """Normalised means of the pictures that training may show, (C, E); zeros where there is none.

    Args:
        files: the embeddings of each file of pairs, (N, E).
        most: pictures averaged for one concept.
    """
    chosen, owners = [], []
    for owner, group in enumerate(groups):
        numbers = _choose(catalogue, group, most, seed)
        chosen += numbers
        owners += [owner] * len(numbers)
    width = files[0].shape[1] if files else 0
    sums = np.zeros((len(groups), width), np.float32)
    if chosen:
        vectors = gather_embeddings(catalogue, chosen, files)
        # Added in the order of the pictures, whoever adds: sums of floats depend on it.
        np.add.at(sums, np.array(owners), vectors)
    return _normalised(sums)


def read_prototypes(folder: Path) -> tuple[Vectors | None, Vectors | None]:
    """Pictures and names of all concepts, in their order, (C, E); None where nothing was averaged."""
    return _read(folder, "images"), _read(folder, "texts")


def _choose(catalogue: Catalogue, group: int, most: int, seed: int) -> list[int]:
    numbers = catalogue.pictures(group)
    if len(numbers) <= most:
        return list(numbers)
    keys = catalogue.column("picture", list(numbers))
    ranked = sorted(zip((zlib.crc32(f"{seed}/{key}".encode()) for key in keys), numbers, strict=True))
    return sorted(number for _, number in ranked[:most])


def gather_embeddings(
    catalogue: Catalogue, numbers: Sequence[int], files: Sequence[np.ndarray[Any, Any]]
) -> Vectors:
    """The embeddings of pictures, (N, E), each read where it lies."""
    table = catalogue.take(numbers, ["embedding_file", "embedding_row"])
    file, row = (table.column(name).to_numpy() for name in table.column_names)
    vectors = np.empty((len(numbers), files[0].shape[1]), np.float32)
    for number in np.unique(file):
        here = np.flatnonzero(file == number)
        vectors[here] = files[number][row[here]]
    return vectors


def _normalised(vectors: Vectors) -> Vectors:
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    result: Vectors = (vectors / np.where(lengths == 0, 1, lengths)).astype(np.float32)
    return result


def _read(folder: Path, kind: str) -> Vectors | None:
    files = sorted(folder.glob(f"{kind}-*.npy"))
    return np.concatenate([np.load(file) for file in files]).astype(np.float32) if files else None
