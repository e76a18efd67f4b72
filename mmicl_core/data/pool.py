"""What a run draws from: one section for each way of grouping that its tasks need, and neighbours.

A pool maps files into memory and is never sent anywhere: each worker opens its own.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from heapq import nsmallest
from typing import Any

import numpy as np

from mmicl_core.config.episodes import EpisodeConfig, SameTaskConfig, TwoWayConfig
from mmicl_core.data.catalogue import Catalogue
from mmicl_core.data.grouping import Grouping
from mmicl_core.data.neighbours import Neighbours
from mmicl_core.data.sections import Numbers, Section
from mmicl_core.errors import DataError

__all__ = [
    "GROUPINGS",
    "Catalogues",
    "DuplicateGuard",
    "Embed",
    "Pool",
    "needed_groupings",
    "open_pool",
]

GROUPINGS: Mapping[str, Grouping] = {
    "two_way": "concept",
    "caption": "concept",
    "interleaved": "document",
    "same_task": "task",
    "instruction": "task",
    "kind": "concept",
}
"""Task -> what its pictures are grouped by."""

# 128 tasks of 2,048 embeddings, 512 wide; those asked for longest ago are read again.
MOST_EMBEDDED_BYTES = 2**29

Vectors = np.ndarray[Any, np.dtype[np.float32]]
Embed = Callable[[Sequence[int] | Numbers], Vectors]
"""Numbers of pictures in the catalogue by task -> (N, E) embeddings."""


@dataclass(frozen=True)
class Catalogues:
    """One corpus, grouped in up to three ways; None where no task needs it."""

    concept: Catalogue | None = None
    document: Catalogue | None = None
    task: Catalogue | None = None


class Pool:
    """What a run draws from; `open_pool` makes it.

    Args:
        sections: by grouping.
        neighbours: of the concepts, by group number.
        near_duplicate_bits: see `EpisodeConfig`.
        embed: gives embeddings of pictures, for demonstrations chosen by similarity.
    """

    def __init__(
        self,
        sections: dict[Grouping, Section],
        neighbours: Neighbours | None,
        near_duplicate_bits: int,
        embed: Embed | None = None,
    ) -> None:
        self._sections = sections
        self._neighbours = neighbours
        self._bits = near_duplicate_bits
        self._embed = embed
        self._chosen: dict[tuple[int, int], Numbers] = {}
        self._embedded = OrderedDict[tuple[int, int], Vectors]()

    def section(self, task: str) -> Section:
        """The catalogue that a task draws from."""
        return self._sections[GROUPINGS[task]]

    def neighbours(self, concept: int) -> tuple[Any, Any]:
        """Numbers and similarities of the neighbours of a concept, nearest first; none without any."""
        if self._neighbours is None:
            return np.array([], dtype=np.int32), np.array([], dtype=np.float32)
        return self._neighbours.of(concept)

    def guard(self, section: Section, query: int) -> DuplicateGuard:
        """What keeps a query's picture out of its demonstrations."""
        return DuplicateGuard(section.catalogue, query, self._bits)

    def nearest(self, query: int, group: int, pictures: Sequence[int] | Numbers, most: int) -> Iterator[int]:
        """A task's pictures by the similarity of their embeddings to the query's, most similar first.

        Args:
            pictures: of the task.
            most: so many of them are compared, those whose SHA-256 is smallest.
        """
        key = (group, most)
        if key not in self._chosen:
            self._chosen[key] = _by_digest(self._sections["task"].catalogue, pictures, most)
        if key not in self._embedded:
            self._embedded[key] = self._vectors(self._chosen[key])
            while len(self._embedded) > 1 and _bytes(self._embedded.values()) > MOST_EMBEDDED_BYTES:
                self._embedded.popitem(last=False)
        self._embedded.move_to_end(key)
        similarity = self._embedded[key] @ self._vectors([query])[0]
        return iter(self._chosen[key][np.argsort(-similarity, kind="stable")].tolist())

    def _vectors(self, pictures: Sequence[int] | Numbers) -> Vectors:
        assert self._embed is not None, "open_pool lets no task that needs embeddings pass without"
        vectors = np.asarray(self._embed(pictures), dtype=np.float32)
        lengths = np.sqrt(np.einsum("NE,NE->N", vectors, vectors))
        normalised: Vectors = vectors / np.maximum(lengths, np.finfo(np.float32).tiny)[:, None]
        return normalised


class DuplicateGuard:
    """Admits pictures that may stand before a query: each one once, and none that looks like the query's.

    Pictures are the same if their bytes are, and look alike if their perceptual hashes, of 64 bits, differ
    in few of them.
    """

    def __init__(self, catalogue: Catalogue, query: int, bits: int) -> None:
        self._fingerprint = catalogue.fingerprint
        digest, self._hash = catalogue.fingerprint(query)
        self._met = {digest}
        self._bits = bits

    def admits(self, picture: int) -> bool:
        """Whether the picture may be shown; it is then counted as shown."""
        digest, perceptual_hash = self._fingerprint(picture)
        if digest in self._met or (perceptual_hash ^ self._hash).bit_count() <= self._bits:
            return False
        self._met.add(digest)
        return True

    def first(self, pictures: Iterator[int], count: int) -> list[int] | None:
        """The first `count` that may be shown; None if there are fewer."""
        chosen: list[int] = []
        while len(chosen) < count:
            picture = next(pictures, None)
            if picture is None:
                return None
            if self.admits(picture):
                chosen.append(picture)
        return chosen


def needed_groupings(config: EpisodeConfig) -> tuple[Grouping, ...]:
    """What the pictures have to be grouped by."""
    needed = {GROUPINGS[task.type] for task in config.tasks}
    return tuple(grouping for grouping in dict.fromkeys(GROUPINGS.values()) if grouping in needed)


def open_pool(
    catalogues: Catalogues, neighbours: Neighbours | None, config: EpisodeConfig, embed: Embed | None = None
) -> Pool:
    """Gather what the tasks of `config` draw from.

    Args:
        neighbours: needed where a 2-way task takes hard negatives.
        embed: needed where a same-task episode takes similar demonstrations.

    Raises:
        DataError: the neighbours are those of another catalogue.
    """
    sections: dict[Grouping, Section] = {}
    for grouping in needed_groupings(config):
        catalogue: Catalogue | None = vars(catalogues)[grouping]
        assert catalogue is not None, f"{grouping} is among needed_groupings"
        sections[grouping] = Section(catalogue, grouping, config.part)
    hard = any(isinstance(task, TwoWayConfig) and task.hard_negative_share for task in config.tasks)
    similar = any(isinstance(task, SameTaskConfig) and task.choice == "similar" for task in config.tasks)
    assert neighbours is not None or not hard, "hard negatives need neighbours"
    assert embed is not None or not similar, "similar demonstrations need embeddings"
    if neighbours is not None and catalogues.concept is not None:
        ours, theirs = len(catalogues.concept), len(neighbours)
        if ours != theirs:
            raise DataError(
                f"the catalogue has {ours} concepts and the neighbours are those of {theirs}: they were made "
                "from different corpora"
            )
    return Pool(sections, neighbours, config.near_duplicate_bits, embed)


def _by_digest(catalogue: Catalogue, pictures: Sequence[int] | Numbers, most: int) -> Numbers:
    numbers = np.asarray(pictures, dtype=np.int64)
    if len(numbers) > most:
        chosen = nsmallest(most, numbers.tolist(), key=lambda number: catalogue.fingerprint(number)[0])
        numbers = np.sort(np.array(chosen, dtype=np.int64))
    return numbers


def _bytes(arrays: Iterable[np.ndarray[Any, Any]]) -> int:
    return sum(array.nbytes for array in arrays)
