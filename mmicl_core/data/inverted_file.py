"""Nearest concepts without comparing all pairs: an inverted file (Faiss) of what `similarity` compares.

The keys f of C concepts lie in about 2 sqrt(C) lists around the centroids of a k-means. A question q is
compared with the centroids and then with the keys of the nearest lists, a sixteenth of them. Each side of
the split has lists of its own, so that a search finds as many as there are.

Some of the nearest are missed: those in lists that are not looked through. What is found is the same for any
cut of the questions into blocks, and has the similarities of the exact search.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np

from mmicl_core.data.concepts import Clusters, faiss_on_one_thread
from mmicl_core.data.similarity import (
    Numbers,
    Sides,
    Vectors,
    Weights,
    as_keys,
    as_questions,
    class_similarity,
)
from mmicl_core.errors import DataError

__all__ = ["InvertedFile"]

SHARE_OF_LISTS = 1 / 16
FEWEST_LISTS = 16
KEYS_OF_A_LIST = 64
FILES = ("shown.faiss", "held_out.faiss")


class InvertedFile:
    """The concepts of both sides in lists of what lies together.

    Args:
        sides: Faiss indexes of the concepts that are shown and of those held out; None where there are none.
    """

    def __init__(self, sides: Sequence[Any]) -> None:
        self._sides = sides

    @classmethod
    def build(
        cls, images: Vectors | None, texts: Vectors | None, held_out: Sides, weights: Weights, seed: int
    ) -> Self:
        """Sort all concepts into lists.

        Args:
            images, texts: (C, E) of all concepts, as `similarity` takes them.
            held_out: (C,), the side of each concept.
            seed: of the k-means that finds the lists.

        Raises:
            ConfigError: as `class_similarity`.
        """
        sides = []
        for side in (False, True):
            numbers = np.flatnonzero(held_out == side)
            keys = as_keys(_take(images, numbers), _take(texts, numbers), weights).astype(np.float32)
            sides.append(_fill(keys, numbers, seed) if len(numbers) else None)
        return cls(sides)

    def save(self, folder: Path) -> None:
        """Write a file for each side that has concepts."""
        with faiss_on_one_thread() as faiss:
            for index, name in zip(self._sides, FILES, strict=True):
                if index is not None:
                    faiss.write_index(index, str(folder / name))

    @classmethod
    def open(cls, folder: Path) -> Self:
        """Map into memory what `save` wrote; the processes of a machine share it.

        Raises:
            DataError: there is none, or it is damaged.
        """
        paths = [folder / name for name in FILES]
        if not any(path.is_file() for path in paths):
            raise DataError(f"{folder} holds no inverted file: it has neither of {', '.join(FILES)}")
        with faiss_on_one_thread() as faiss:
            how = faiss.IO_FLAG_MMAP | faiss.IO_FLAG_READ_ONLY
            try:
                return cls([faiss.read_index(str(path), how) if path.is_file() else None for path in paths])
            except RuntimeError as error:
                raise DataError(f"the inverted file in {folder} is damaged: {error}") from error

    def search(
        self,
        rows: Sequence[int],
        images: Vectors | None,
        texts: Vectors | None,
        held_out: Sides,
        weights: Weights,
        count: int,
    ) -> tuple[list[Numbers], list[Vectors]]:
        """The `count` most similar others of each row that are found, nearest first, and their similarities.

        A row whose lists hold too few is compared with all concepts of its side.

        Args:
            rows: numbers of concepts.
            images, texts, held_out, weights: what `build` was given.
        """
        found: list[Numbers] = []
        similarities: list[Vectors] = []
        questions = as_questions(_take(images, rows), _take(texts, rows), weights)
        for row, candidates in zip(
            rows, self._candidates(questions, held_out[list(rows)], count + 1), strict=True
        ):
            side = np.flatnonzero(held_out == held_out[row])
            others = np.sort(candidates[(candidates >= 0) & (candidates != row)])
            if len(others) < min(count, len(side) - 1):
                others = side[side != row]
            one = (_take(images, [row]), _take(texts, [row]))
            similar = class_similarity(*one, _take(images, others), _take(texts, others), weights)[0]
            order = np.argsort(-similar, kind="stable")[:count]
            found.append(others[order].astype(np.int32))
            similarities.append(similar[order])
        return found, similarities

    def _candidates(self, questions: Any, held_out: Sides, count: int) -> Iterator[Any]:
        """For each question, (count,) numbers of concepts of its side, -1 for none."""
        candidates = np.full((len(questions), count), -1, np.int64)
        with faiss_on_one_thread():
            for side, index in enumerate(self._sides):
                here = np.flatnonzero(held_out == bool(side))
                if index is not None and len(here):
                    centroids = index.quantizer.reconstruct_n(0, index.nlist)
                    # Faiss compares few questions in another way than many, and may choose other lists.
                    near = np.argsort(-(questions[here] @ centroids.T.astype(np.float64)), kind="stable")
                    lists = near[:, : index.nprobe]
                    asked = questions[here].astype(np.float32)
                    candidates[here] = index.search_preassigned(asked, count, lists, None)[1]
        return iter(candidates)


def _take(vectors: Vectors | None, numbers: Any) -> Vectors | None:
    return None if vectors is None else vectors[np.asarray(numbers, dtype=np.int64)]


def _fill(keys: Vectors, numbers: Any, seed: int) -> Any:
    lists = min(len(keys), int(2 * len(keys) ** 0.5))
    rng = np.random.default_rng(seed % 2**63)
    sample = np.sort(rng.permutation(len(keys))[: KEYS_OF_A_LIST * lists])
    centroids = Clusters.fit(keys[sample], lists, seed).centroids
    with faiss_on_one_thread() as faiss:
        quantizer = faiss.IndexFlatIP(keys.shape[1])
        quantizer.add(centroids)
        index = faiss.IndexIVFFlat(quantizer, keys.shape[1], lists, faiss.METRIC_INNER_PRODUCT)
        index.nprobe = min(lists, max(FEWEST_LISTS, int(lists * SHARE_OF_LISTS)))
        index.train(keys)
        index.add_with_ids(keys, numbers.astype(np.int64))
        return index
