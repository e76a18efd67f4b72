"""From looked-at pairs to groups: concepts, what is held out, pictures met too often.

A group is what an episode draws pictures from: a concept, a document or a task. Each pair says its concept
(or a caption or a cluster does), and with it whether training may see it.

Whether a picture stands on both sides, or everywhere, only all pairs together can tell. Of every file of
pairs the first eight bytes of the SHA-256 of its pictures are kept as two sorted arrays, one for each side;
so whoever counts a range of them reads only that range of each file.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from mmicl_core.data import reasons
from mmicl_core.data.catalogue import CATALOGUED
from mmicl_core.data.splits import Split, share_of

__all__ = [
    "CONCEPT",
    "Grouping",
    "Hashes",
    "assign_concepts",
    "catalogued",
    "find_repeats",
    "hashes_of_sides",
    "in_range",
]

Grouping = Literal["concept", "document", "task"]
Hashes = np.ndarray[Any, np.dtype[np.uint64]]
Namer = Callable[[pa.Table], Sequence[str | None]]

CONCEPT = pa.schema(
    [
        # As LOOKED, one row for each pair of a file. Null: it has none, or cannot be used.
        ("concept", pa.string()),
        ("name", pa.string()),
        # The concept is held out; the picture is, for its style.
        ("held_out", pa.bool_()),
        ("kept_back", pa.bool_()),
        ("hash", pa.uint64()),
        ("usable", pa.bool_()),
    ]
)


def assign_concepts(pairs: pa.Table, looked: pa.Table, split: Split, namer: Namer | None) -> pa.Table:
    """CONCEPT rows of a file.

    Args:
        namer: PAIR rows -> concepts; None takes the corpus's own.
    """
    usable = pc.is_null(looked.column("skipped"))
    concepts = pairs.column("concept").to_pylist() if namer is None else namer(pairs)
    names = pairs.column("name").to_pylist() if namer is None else concepts
    styles = pairs.column("style").to_pylist()
    held_out = {concept: split.holds_out(concept) for concept in set(concepts) if concept is not None}
    hashes = [
        int.from_bytes(digest[:8], "big") if digest is not None else None
        for digest in looked.column("sha256").to_pylist()
    ]
    rows = {
        "concept": concepts,
        "name": [name or concept for name, concept in zip(names, concepts, strict=True)],
        "held_out": [held_out.get(concept, False) if concept else False for concept in concepts],
        "kept_back": [style is not None and style == split.held_out_style for style in styles],
        "hash": hashes,
        "usable": usable.combine_chunks() if isinstance(usable, pa.ChunkedArray) else usable,
    }
    return pa.table(rows, schema=CONCEPT)


def hashes_of_sides(concepts: pa.Table) -> tuple[Hashes, Hashes]:
    """Sorted hashes of the pictures that training may see, and of those that it may not."""
    hashes, held = _hashes(concepts), _held(concepts)
    usable = concepts.column("usable").to_numpy(zero_copy_only=False)
    return np.sort(hashes[usable & ~held]), np.sort(hashes[usable & held])


def in_range(hashes: Hashes, number: int, ranges: int) -> Hashes:
    """The stretch of sorted hashes that falls into range `number` of `ranges` equal ones."""
    first = number * 2**64 // ranges
    last = (number + 1) * 2**64 // ranges - 1
    low = np.searchsorted(hashes, np.uint64(first), side="left")
    high = np.searchsorted(hashes, np.uint64(last), side="right")
    return hashes[low:high]


def find_repeats(shown: Sequence[Hashes], held: Sequence[Hashes], most: int) -> tuple[Hashes, Hashes]:
    """Pictures that stand in the corpus more than `most` times, and those on both sides; both sorted."""
    nothing = np.array([], dtype=np.uint64)
    one, other = (np.concatenate([nothing, *side]) for side in (shown, held))
    values, counts = np.unique(np.concatenate([one, other]), return_counts=True)
    return values[counts > most], np.intersect1d(one, other)


def catalogued(
    pairs: pa.Table,
    looked: pa.Table,
    concepts: pa.Table,
    grouping: Grouping,
    split: Split,
    placeholders: Hashes,
    twins: Hashes,
    file: int,
) -> tuple[pa.Table, pa.Table]:
    """CATALOGUED rows of a file, and SKIPPED rows of what is left out of this grouping.

    Args:
        placeholders, twins: sorted hashes from `find_repeats`.
        file: number of the file, by which its embeddings are found.
    """
    groups = _groups(pairs, concepts, grouping)
    usable = concepts.column("usable").to_numpy(zero_copy_only=False)
    hashes = _hashes(concepts)
    held = _held(concepts)
    reason = np.full(pairs.num_rows, None, dtype=object)
    missing = np.array([group is None for group in groups], dtype=bool)
    reason[missing] = reasons.NO_CONCEPT if grouping == "concept" else reasons.NO_GROUP
    reason[np.isin(hashes, twins) & ~held] = reasons.TWIN_OF_HELD_OUT
    reason[np.isin(hashes, placeholders)] = reasons.PLACEHOLDER
    kept = usable & (reason == None)  # noqa: E711  elementwise
    told = pa.array(list(reason), type=pa.string())
    left_out = pairs.select(["picture", "image"]).append_column("skipped", told)
    left_out = left_out.append_column("detail", pa.array([""] * pairs.num_rows))
    left_out = left_out.filter(pa.array(usable & ~kept))
    columns = _columns(pairs, looked, concepts, groups, grouping, split)
    columns["embedding_file"] = pa.array(np.full(pairs.num_rows, file), pa.int32())
    columns["embedding_row"] = pa.array(np.arange(pairs.num_rows), pa.int32())
    rows = pa.table([columns[name] for name in CATALOGUED.names], schema=CATALOGUED)
    return rows.filter(pa.array(kept)), left_out


def _hashes(concepts: pa.Table) -> Hashes:
    # Floats in between would lose the low bits; what has no hash is not usable, and looks like 0.
    hashes: Hashes = pc.fill_null(concepts.column("hash"), pa.scalar(0, pa.uint64())).to_numpy()
    return hashes


def _held(concepts: pa.Table) -> Any:
    held_out, kept_back = (
        concepts.column(name).to_numpy(zero_copy_only=False) for name in CONCEPT.names[2:4]
    )
    return held_out | kept_back


def _groups(pairs: pa.Table, concepts: pa.Table, grouping: Grouping) -> list[str | None]:
    if grouping == "concept":
        return list(concepts.column("concept").to_pylist())
    if grouping == "document":
        return list(pairs.column("document").to_pylist())
    # Pairs that name no task share one: they are all captions, or all instructions.
    return [
        task or ("instruction" if turns else "caption")
        for task, turns in zip(
            pairs.column("task").to_pylist(), pairs.column("turns").to_pylist(), strict=True
        )
    ]


def _columns(
    pairs: pa.Table,
    looked: pa.Table,
    concepts: pa.Table,
    groups: Sequence[str | None],
    grouping: Grouping,
    split: Split,
) -> dict[str, Any]:
    columns = {name: pairs.column(name) for name in pairs.column_names}
    columns |= {name: looked.column(name) for name in ("sha256", "perceptual_hash")}
    columns |= {name: concepts.column(name) for name in ("concept", "name", "held_out", "kept_back")}
    columns["group"] = pa.array(groups, pa.string())
    if grouping != "concept":
        # A document or a task mixes concepts; those held out are kept back inside it.
        columns["kept_back"] = pa.array(_held(concepts))
        whole = {group: _holds_out_document(group, grouping, split) for group in set(groups)}
        columns["held_out"] = pa.array([whole[group] for group in groups], pa.bool_())
        columns["name"] = columns["group"]
    return columns


def _holds_out_document(group: str | None, grouping: Grouping, split: Split) -> bool:
    if group is None or grouping != "document":
        return False
    return share_of(group, split.seed) < split.held_out_share
