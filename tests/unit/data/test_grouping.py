from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from mmicl_core.data import reasons
from mmicl_core.data.catalogue import CATALOGUED
from mmicl_core.data.grouping import (
    Grouping,
    assign_concepts,
    catalogued,
    find_repeats,
    hashes_of_sides,
    in_range,
)
from mmicl_core.data.schema import LOOKED, PAIR
from mmicl_core.data.splits import Split

SPLIT = Split(frozenset({"owl"}), "ink")
NOTHING = np.array([], dtype=np.uint64)


def _digest(content: str) -> bytes:
    return hashlib.sha256(content.encode()).digest()


def _tables(*rows: dict[str, Any]) -> tuple[pa.Table, pa.Table]:
    pairs = [{"picture": f"p{number}"} | row for number, row in enumerate(rows)]
    looked = [
        {
            "picture": row["picture"],
            "sha256": None if row.get("bad") else _digest(row.get("bytes", row["picture"])),
            "skipped": "not a picture" if row.get("bad") else None,
        }
        for row in pairs
    ]
    return pa.Table.from_pylist(pairs, schema=PAIR), pa.Table.from_pylist(looked, schema=LOOKED)


def _catalogued(
    *rows: dict[str, Any], grouping: Grouping = "concept", most: int = 100, split: Split = SPLIT
) -> tuple[dict[str, dict[str, Any]], dict[str, str]]:
    pairs, looked = _tables(*rows)
    concepts = assign_concepts(pairs, looked, split, None)
    shown, held = hashes_of_sides(concepts)
    kept, left_out = catalogued(
        pairs, looked, concepts, grouping, split, *find_repeats([shown], [held], most), file=7
    )
    assert kept.schema == CATALOGUED
    reasons_by_key = {row["picture"]: row["skipped"] for row in left_out.to_pylist()}
    return {row["picture"]: row for row in kept.to_pylist()}, reasons_by_key


def test_every_usable_pair_is_kept_or_left_out_with_one_reason() -> None:
    kept, left_out = _catalogued(
        {"concept": "cat"}, {"concept": None}, {"concept": "cat", "bad": True}, {"concept": "owl"}
    )
    # What could not be looked at was counted where it was looked at.
    assert kept.keys() == {"p0", "p3"} and left_out == {"p1": reasons.NO_CONCEPT}


def test_held_out_concepts_and_styles_are_marked_apart() -> None:
    kept, _ = _catalogued(
        {"concept": "cat", "style": "ink"},
        {"concept": "cat"},
        {"concept": "owl"},
        {"concept": "owl", "style": "ink"},
    )
    flags = {key: (row["held_out"], row["kept_back"]) for key, row in kept.items()}
    assert flags == {"p0": (False, True), "p1": (False, False), "p2": (True, False), "p3": (True, True)}


def test_a_picture_of_a_held_out_concept_leaves_training_under_any_other_name() -> None:
    kept, left_out = _catalogued(
        {"concept": "owl", "bytes": "same"}, {"concept": "cat", "bytes": "same"}, {"concept": "cat"}
    )
    assert kept.keys() == {"p0", "p2"} and left_out == {"p1": reasons.TWIN_OF_HELD_OUT}


def test_a_picture_that_stands_for_many_is_taken_for_a_placeholder() -> None:
    rows = [{"concept": f"c{number}", "bytes": "not found"} for number in range(4)]
    kept, left_out = _catalogued(*rows, {"concept": "cat"}, most=3)
    assert kept.keys() == {"p4"} and set(left_out.values()) == {reasons.PLACEHOLDER}
    kept, left_out = _catalogued(*rows, {"concept": "cat"}, most=4)
    assert len(kept) == 5 and not left_out


def test_documents_keep_their_pairs_and_hold_back_those_of_held_out_concepts() -> None:
    kept, left_out = _catalogued(
        {"document": "d", "position": 1, "concept": "owl"},
        {"document": "d", "position": 0},
        {"concept": "cat"},
        grouping="document",
    )
    assert {key: (row["group"], row["kept_back"]) for key, row in kept.items()} == {
        "p0": ("d", True),
        "p1": ("d", False),
    }
    assert left_out == {"p2": reasons.NO_GROUP}


def test_pairs_without_a_task_share_one_with_their_like() -> None:
    turns = [{"question": "q", "answer": "a"}]
    kept, _ = _catalogued({"turns": turns}, {"turns": turns, "task": "vqa"}, {"text": "t"}, grouping="task")
    assert [row["group"] for row in kept.values()] == ["instruction", "vqa", "caption"]


def test_a_share_of_documents_is_held_out_where_no_split_names_concepts() -> None:
    rows = [{"document": f"d{number}", "position": 0} for number in range(200)]
    kept, _ = _catalogued(*rows, grouping="document", split=Split(held_out_share=0.5))
    assert 60 < sum(row["held_out"] for row in kept.values()) < 140


def test_rows_remember_where_their_embedding_lies() -> None:
    kept, _ = _catalogued({"concept": "cat"}, {"concept": None}, {"concept": "cat"})
    assert [(row["embedding_file"], row["embedding_row"]) for row in kept.values()] == [(7, 0), (7, 2)]


@pytest.mark.parametrize("ranges", [1, 3, 16])
def test_ranges_of_hashes_lose_nothing_and_overlap_nowhere(ranges: int) -> None:
    rng = np.random.default_rng(0)
    edges = [number * 2**64 // ranges for number in range(ranges)] + [2**64 - 1]
    hashes = np.sort(np.append(rng.integers(0, 2**64, 1000, dtype=np.uint64), np.array(edges, np.uint64)))
    cut = [in_range(hashes, number, ranges) for number in range(ranges)]
    np.testing.assert_array_equal(np.concatenate(cut), hashes)


def test_repeats_are_counted_over_all_files_and_both_sides() -> None:
    a, b, c = (np.uint64(number) for number in (5, 6, 2**64 - 1))
    shown = [np.array([a, b], np.uint64), np.array([a, c], np.uint64)]
    held = [np.array([a, c], np.uint64)]
    placeholders, twins = find_repeats(shown, held, most=2)
    assert placeholders.tolist() == [a] and twins.tolist() == [a, c]
    assert [found.tolist() for found in find_repeats([], [], 1)] == [[], []]


def test_hashes_keep_all_their_bits() -> None:
    pairs, looked = _tables(*({"concept": "cat"} for _ in range(50)), {"concept": "cat", "bad": True})
    shown, held = hashes_of_sides(assign_concepts(pairs, looked, SPLIT, None))
    digests = [digest for digest in looked.column("sha256").to_pylist() if digest]
    assert shown.tolist() == sorted(int.from_bytes(digest[:8], "big") for digest in digests)
    assert held.tolist() == []
