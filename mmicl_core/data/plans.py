"""Plans of episodes, and the EPISODE rows that they become.

A plan holds numbers and words: which pictures of a catalogue, what is asked about each, what is answered.
What the pictures are called, and where their bytes lie, is looked up for many plans at once, column by
column; a row of a batch is the same whatever else is in the batch.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from mmicl_core.data.catalogue import CATALOGUED
from mmicl_core.data.pool import GROUPINGS, Pool
from mmicl_core.data.schema import EPISODE, TURN
from mmicl_core.errors import DataError

__all__ = ["NO_PICTURE", "Plan", "Slot", "episode_id", "parse_id", "render"]

NO_PICTURE = -1
"""In place of a picture's number, in a turn that goes on about the picture before."""

LOOKED_UP = ("picture", "image", "sha256", "concept")
ID = re.compile(r"(-?\d{1,19})-(\d{1,18})", re.ASCII)


class Slot(NamedTuple):
    """The place that an episode is drawn for."""

    seed: int
    number: int
    shots: int
    """What a 2-way episode there shows, of both classes together."""


@dataclass(frozen=True, slots=True)
class Plan:
    """An episode, before its pictures are looked up. One entry of each list is a turn, the query last."""

    slot: Slot
    task: str
    pictures: Sequence[int]
    """Numbers in the catalogue that the task draws from, or `NO_PICTURE`."""
    questions: Sequence[str]
    answers: Sequence[str]
    scored: Sequence[bool]
    demonstrations: int
    other: str = ""
    """The wrong name."""
    concepts: tuple[int, ...] = ()
    """Group numbers of the classes."""
    names: tuple[str, ...] = ()
    rank: int | None = None
    similarity: float | None = None


def episode_id(seed: int, number: int) -> str:
    """What an episode can be drawn again by."""
    return f"{seed}-{number}"


def parse_id(text: str) -> tuple[int, int]:
    """The seed and the number of an episode.

    Raises:
        DataError: it is no id.
    """
    match = ID.fullmatch(text)
    if match is None:
        raise DataError(f"{text!r} is not the id of an episode: it is SEED-NUMBER, as in 0-17")
    return int(match[1]), int(match[2])


def render(plans: Sequence[Plan], pool: Pool) -> pa.Table:
    """EPISODE rows, one for each plan, in their order."""
    columns = {
        "episode": [plan.slot.number for plan in plans],
        "id": [episode_id(plan.slot.seed, plan.slot.number) for plan in plans],
        "task": [plan.task for plan in plans],
        "shots_of_both_classes": [plan.demonstrations for plan in plans],
        "concepts": _concepts(plans, pool),
        "names": [plan.names for plan in plans],
        "rank": [plan.rank for plan in plans],
        "similarity": [plan.similarity for plan in plans],
        "turns": _turns(plans, pool),
        "answer": [plan.answers[-1] for plan in plans],
        "other": [plan.other for plan in plans],
    }
    return pa.table(columns, schema=EPISODE)


def _turns(plans: Sequence[Plan], pool: Pool) -> pa.Array:
    looked_up = _look_up(plans, pool)
    told = {
        "question": pa.array(_chain(plan.questions for plan in plans), pa.string()),
        "answer": pa.array(_chain(plan.answers for plan in plans), pa.string()),
        "scored": pa.array(_chain(plan.scored for plan in plans), pa.bool_()),
    }
    arrays = [
        told[field.name] if field.name in told else looked_up.column(field.name).combine_chunks()
        for field in TURN
    ]
    turns = pa.StructArray.from_arrays(arrays, fields=list(TURN))
    return pa.ListArray.from_arrays(_offsets(len(plan.pictures) for plan in plans), turns)


def _look_up(plans: Sequence[Plan], pool: Pool) -> pa.Table:
    pictures = np.array(_chain(plan.pictures for plan in plans), dtype=np.int64)
    tasks = [plan.task for plan in plans]
    # One catalogue after the other; then every turn finds its row, or none.
    rows, start = np.full(len(pictures), NO_PICTURE), 0
    pieces = [pa.schema([CATALOGUED.field(name) for name in LOOKED_UP]).empty_table()]
    for grouping in sorted({GROUPINGS[task] for task in tasks}):
        here = np.repeat(
            [GROUPINGS[task] == grouping for task in tasks], [len(plan.pictures) for plan in plans]
        )
        here = np.flatnonzero(here & (pictures != NO_PICTURE))
        task = next(task for task in tasks if GROUPINGS[task] == grouping)
        pieces.append(pool.section(task).catalogue.take(pictures[here], LOOKED_UP))
        rows[here] = np.arange(start, start + len(here))
        start += len(here)
    table = pa.concat_tables(pieces)
    if (rows == np.arange(len(rows))).all():
        return table
    return table.combine_chunks().take(pa.array(rows, mask=rows == NO_PICTURE))


def _concepts(plans: Sequence[Plan], pool: Pool) -> pa.Array:
    groups = _chain(plan.concepts for plan in plans)
    ids = pa.array([], pa.string())
    if groups:
        ids = pool.section("two_way").catalogue.groups.column("group").take(pa.array(groups, pa.int64()))
        ids = ids.combine_chunks()
    return pa.ListArray.from_arrays(_offsets(len(plan.concepts) for plan in plans), ids)


def _chain(lists: Iterable[Sequence[Any]]) -> list[Any]:
    return list(chain.from_iterable(lists))


def _offsets(lengths: Iterable[int]) -> Any:
    return np.cumsum([0, *lengths], dtype=np.int32)
