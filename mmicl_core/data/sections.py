"""A catalogue as a part of the corpus sees it: which groups, and which of their pictures.

    part                 concepts        shown           asked about
    train                trained on      open            open
    known_concepts       trained on      open            kept back
    held_out_concepts    held out        open            open
    held_out_style       held out        open            kept back

Documents and tasks mix concepts. Of them `train` has the open pictures of those that are not held out, and
every other part all that `train` does not have.

Groups are handed out in the order of their ids, so nothing depends on how many buckets a catalogue has.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from mmicl_core.config.episodes import Part
from mmicl_core.data.catalogue import Catalogue
from mmicl_core.data.grouping import Grouping

__all__ = ["Able", "Numbers", "Section", "shuffled"]

Numbers = np.ndarray[Any, np.dtype[np.int64]]
Flags = np.ndarray[Any, np.dtype[np.bool_]]


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
        if not len(ends):
            return None
        return int(groups[np.searchsorted(ends, rng.randrange(ends[-1]), side="right")])

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
