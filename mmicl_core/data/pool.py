"""The part of a corpus that a run draws from: which groups, and which of their pictures.

    part                 concepts        shown           asked about
    train                trained on      open            open
    known_concepts       trained on      open            kept back
    held_out_concepts    held out        open            open
    held_out_style       held out        open            kept back

Documents and tasks mix concepts. Of them `train` has the open pictures of those that are not held out, and
every other part all that `train` does not have.

Groups are handed out in the order of their ids, so nothing depends on how many buckets a catalogue has. A
pool maps files into memory and is never sent anywhere: each worker opens its own.
"""

from __future__ import annotations

import random
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from heapq import nsmallest
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from mmicl_core.config.episodes import EpisodeConfig, Part, SameTaskConfig, TwoWayConfig
from mmicl_core.data.catalogue import Catalogue
from mmicl_core.data.grouping import Grouping
from mmicl_core.data.neighbours import Neighbours
from mmicl_core.errors import DataError

__all__ = [
    "GROUPINGS",
    "Able",
    "Catalogues",
    "DuplicateGuard",
    "Embed",
    "Pool",
    "Section",
    "needed_groupings",
    "open_pool",
    "shuffled",
]

GROUPINGS: Mapping[str, Grouping] = {
    "two_way": "concept",
    "caption": "concept",
    "interleaved": "document",
    "same_task": "task",
    "instruction": "task",
}
"""Task -> what its pictures are grouped by."""

# 64 tasks of 2,048 embeddings, 768 wide, are 0.4 GB.
MOST_EMBEDDED_TASKS = 64

Numbers = np.ndarray[Any, np.dtype[np.int64]]
Flags = np.ndarray[Any, np.dtype[np.bool_]]
Vectors = np.ndarray[Any, np.dtype[np.float32]]
Embed = Callable[[Sequence[int] | Numbers], Vectors]
"""Numbers of pictures in the catalogue by task -> (N, E) embeddings."""


@dataclass(frozen=True)
class Catalogues:
    """One corpus, grouped in up to three ways; None where no task needs it."""

    concept: Catalogue | None = None
    document: Catalogue | None = None
    task: Catalogue | None = None


class Able(NamedTuple):
    """The groups that an episode can be about."""

    groups: Numbers
    """Their numbers, in the order of their ids."""
    among: Flags
    """For every group of the catalogue, whether it is one of them."""


class Spans(NamedTuple):
    """For every group, a stretch of its pictures, from `begin` up to `end`."""

    begin: Numbers
    end: Numbers

    def of(self, group: int) -> range:
        return range(int(self.begin[group]), int(self.end[group]))

    @property
    def counts(self) -> Numbers:
        return self.end - self.begin


class Section:
    """One catalogue as a part of the corpus sees it."""

    def __init__(self, catalogue: Catalogue, grouping: Grouping, part: Part) -> None:
        self.catalogue = catalogue
        spans = _concept_spans if grouping == "concept" else _mixed_spans
        self._shown, self._asked = spans(catalogue, part)
        ids = catalogue.groups.column("group")
        self._order: Numbers = pc.sort_indices(ids).to_numpy().astype(np.int64)
        self._able: dict[tuple[int | None, bool], Able] = {}
        self._worded: dict[tuple[int, tuple[str, ...]], Sequence[int] | Numbers] = {}

    def shown(self, group: int) -> range:
        """The numbers of a group's pictures that may be demonstrations."""
        return self._shown.of(group)

    def asked(self, group: int) -> range:
        """The numbers of a group's pictures that may be queries."""
        return self._asked.of(group)

    def able(self, shots: int, *, named: bool = False) -> Able:
        """The groups that can show `shots` pictures and ask about another one; named ones alone if asked."""
        key = (shots, named)
        if key not in self._able:
            self._able[key] = self._select((self._most_shots() >= shots) & (self._asked.counts > 0), named)
        return self._able[key]

    def showing(self, *, named: bool = False) -> Able:
        """The groups that have a picture to show."""
        key = (None, named)
        if key not in self._able:
            self._able[key] = self._select(self._shown.counts > 0, named)
        return self._able[key]

    def draw_by_pictures(self, rng: random.Random) -> int | None:
        """A group, the more likely the more pictures it has to ask about; None if there are none."""
        groups, ends = self.able(0).groups, self._ends
        return (
            int(groups[np.searchsorted(ends, rng.randrange(ends[-1]), side="right")]) if len(ends) else None
        )

    def worded(self, group: int, columns: tuple[str, ...]) -> Sequence[int] | Numbers:
        """The numbers of a group's pictures that have something in one of `columns`, lists or texts."""
        key = (group, columns)
        if key not in self._worded:
            self._worded[key] = _worded(self.catalogue, self.asked(group), columns)
        return self._worded[key]

    @cached_property
    def _ends(self) -> Numbers:
        return np.cumsum(self._asked.counts[self.able(0).groups])

    def _most_shots(self) -> Numbers:
        # Of a picture that may be both shown and asked about, only one can come true.
        both = self._shown is self._asked
        return self._shown.counts - 1 if both else self._shown.counts

    def _select(self, among: Flags, named: bool) -> Able:
        if named:
            length = pc.utf8_length(pc.utf8_trim_whitespace(self.catalogue.groups.column("name")))
            among = among & (pc.fill_null(length, 0).to_numpy() > 0)
        return Able(self._order[among[self._order]], among)


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

    def embed(self, pictures: Sequence[int] | Numbers) -> Vectors:
        """Embeddings of pictures in the catalogue by task, (N, E), of length 1."""
        assert self._embed is not None, "open_pool lets no task that needs embeddings pass without"
        vectors = np.asarray(self._embed(pictures), dtype=np.float32)
        lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
        normalised: Vectors = vectors / np.maximum(lengths, np.finfo(np.float32).tiny)
        return normalised

    def embedded(self, group: int, pictures: Sequence[int] | Numbers, most: int) -> tuple[Numbers, Vectors]:
        """At most `most` of a task's pictures, those whose SHA-256 is smallest, and their embeddings."""
        key = (group, most)
        if key not in self._chosen:
            self._chosen[key] = _by_digest(self._sections["task"].catalogue, pictures, most)
        if key not in self._embedded:
            self._embedded[key] = self.embed(self._chosen[key])
            if len(self._embedded) > MOST_EMBEDDED_TASKS:
                self._embedded.popitem(last=False)
        self._embedded.move_to_end(key)
        return self._chosen[key], self._embedded[key]


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


def shuffled(pictures: Sequence[int] | Numbers, rng: random.Random) -> Iterator[int]:
    """Every picture once, in random order, at the cost of those that are asked for."""
    moved: dict[int, int] = {}
    count = len(pictures)
    for place in range(count):
        other = place + int(rng.random() * (count - place))
        yield int(pictures[moved.get(other, other)])
        moved[other] = moved.get(place, place)


def _worded(catalogue: Catalogue, span: range, columns: Sequence[str]) -> Sequence[int] | Numbers:
    told = np.zeros(len(span), dtype=bool)
    for name in columns:
        column = catalogue.scan(name).slice(span.start, len(span))
        length = pc.list_value_length if pa.types.is_list(column.type) else pc.binary_length
        told |= pc.fill_null(length(column), 0).to_numpy() > 0
    # Most often all of them, and a range takes no memory.
    return span if told.all() else span.start + np.flatnonzero(told)


def _concept_spans(catalogue: Catalogue, part: Part) -> tuple[Spans, Spans]:
    first, middle, end = _bounds(catalogue)
    begin = np.where(catalogue.held_out == (part in ("held_out_concepts", "held_out_style")), first, end)
    shown = Spans(begin, np.maximum(begin, middle))
    if part in ("known_concepts", "held_out_style"):
        return shown, Spans(np.maximum(begin, middle), end)
    return shown, shown


def _mixed_spans(catalogue: Catalogue, part: Part) -> tuple[Spans, Spans]:
    first, middle, end = _bounds(catalogue)
    held_out = catalogue.held_out
    train = part == "train"
    spans = Spans(first, np.where(held_out, first, middle))
    if not train:
        spans = Spans(np.where(held_out, first, middle), end)
    return spans, spans


def _bounds(catalogue: Catalogue) -> tuple[Numbers, Numbers, Numbers]:
    return catalogue.first, catalogue.first + catalogue.open, catalogue.first + catalogue.total


def _by_digest(catalogue: Catalogue, pictures: Sequence[int] | Numbers, most: int) -> Numbers:
    numbers = np.asarray(pictures, dtype=np.int64)
    if len(numbers) > most:
        chosen = nsmallest(most, numbers.tolist(), key=lambda number: catalogue.fingerprint(number)[0])
        numbers = np.sort(np.array(chosen, dtype=np.int64))
    return numbers
