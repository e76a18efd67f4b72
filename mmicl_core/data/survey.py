"""What a corpus holds and what was left out of it, told by the files of its stages, one at a time.

    counts and examples    `skipped-*.parquet` (SKIPPED), `looked-*.arrow` beside `pairs-*.parquet`
    sizes, captions, terms `pairs-*.parquet` and `looked-*.arrow`
    groups                 a catalogue

Quantiles are exact: what is counted are whole numbers, of which there are few different ones.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from mmicl_core.data.arrow_files import read_arrow
from mmicl_core.data.catalogue import Catalogue

__all__ = [
    "find_examples",
    "iter_left_out",
    "iter_remarkable",
    "name_groups",
    "survey_groups",
    "survey_pairs",
]

QUANTILES = {"min": 0.0, "p10": 0.1, "median": 0.5, "p90": 0.9, "max": 1.0}
ROWS_AT_ONCE = 4096
MOST_LISTED = 20
# A licence is free text of a stranger; each value beyond these is counted as `other`.
MOST_VALUES = 1000
OTHER = "other values"


def iter_left_out(folder: Path) -> Iterator[pa.Table]:
    """SKIPPED rows of a finished stage."""
    for file in sorted(folder.glob("skipped-*.parquet")):
        with pq.ParquetFile(file) as parquet:
            for batch in parquet.iter_batches(ROWS_AT_ONCE):
                yield pa.Table.from_batches([batch])


def iter_remarkable(pairs: Path, looked: Path, parts: Iterable[str], column: str) -> Iterator[pa.Table]:
    """Rows with `picture`, `image`, `detail` and `column`, of the pictures for which LOOKED tells the latter.

    Args:
        pairs, looked: folders of the two stages.
        parts: the names of their files.
        column: `skipped` or `remark`.
    """
    for part in parts:
        table = read_arrow(looked / f"looked-{part}.arrow").select(["picture", "detail", column])
        told = pc.greater(pc.fill_null(pc.binary_length(table.column(column)), 0), 0)
        if pc.any(told).as_py():
            images = pq.read_table(pairs / f"pairs-{part}.parquet", columns=["image"])
            yield table.append_column("image", images.column("image")).filter(told)


def find_examples(
    tables: Iterable[pa.Table], column: str, counts: Mapping[str, int], most: int
) -> dict[str, list[dict[str, Any]]]:
    """The first `most` rows for each value of a column; reading stops when there are enough.

    Args:
        counts: how many rows have each value. A cell may hold several, joined by commas.
    """
    missing = {value: min(most, count) for value, count in counts.items()}
    found: dict[str, list[dict[str, Any]]] = {value: [] for value in counts}
    for table in tables:
        for cell in pc.unique(table.column(column)).to_pylist():
            for value in (cell or "").split(", "):
                if missing.get(value):
                    rows = table.filter(pc.equal(table.column(column), cell)).slice(0, missing[value])
                    found[value] += rows.to_pylist()
                    missing[value] -= rows.num_rows
        if not any(missing.values()):
            break
    return found


def survey_pairs(pairs: Path, looked: Path, parts: Iterable[str]) -> dict[str, Any]:
    """Sizes in pixels, lengths of captions in characters, formats and licences of the usable pictures.

    Args:
        pairs, looked: folders of the two stages.
        parts: the names of their files.
    """
    shorter, longer, captions, formats, licences = (Counter[Any]() for _ in range(5))
    for part in parts:
        seen = read_arrow(looked / f"looked-{part}.arrow")
        usable = pc.is_null(seen.column("skipped"))
        seen = seen.filter(usable)
        said = pq.read_table(pairs / f"pairs-{part}.parquet", columns=["text", "licence"]).filter(usable)
        sides = seen.column("width"), seen.column("height")
        _count(shorter, pc.min_element_wise(*sides))
        _count(longer, pc.max_element_wise(*sides))
        _count(captions, pc.fill_null(pc.utf8_length(said.column("text")), 0))
        _count(formats, seen.column("format"))
        _count(licences, said.column("licence"), MOST_VALUES)
    without = {"without_caption": captions.pop(0, 0), "without_licence": licences.pop(None, 0)}
    return {
        "pictures": sum(shorter.values()),
        "shorter_side": _quantiles(shorter),
        "longer_side": _quantiles(longer),
        "caption_characters": _quantiles(captions),
        "formats": _most_common(formats),
        "licences": _most_common(licences),
    } | without


def survey_groups(catalogue: Catalogue) -> dict[str, Any]:
    """How many groups there are, their sizes in pictures, and the largest ones."""
    total = catalogue.total
    largest = np.argsort(-total, kind="stable")[:MOST_LISTED]
    names = catalogue.groups.select(["group", "name"]).take(pa.array(largest)).to_pylist()
    return {
        "groups": len(catalogue),
        "held_out": int(catalogue.held_out.sum()),
        "pictures": catalogue.num_pictures,
        "pictures_per_group": _quantiles(Counter(total.tolist())),
        "largest": [row | {"pictures": int(total[place])} for row, place in zip(names, largest, strict=True)],
    }


def name_groups(catalogue: Catalogue, ids: Iterable[str]) -> dict[str, str]:
    """The names of groups by their ids; the id where there is no name."""
    wanted = pa.array(sorted(set(ids)), pa.string())
    groups = catalogue.groups.select(["group", "name"])
    rows = groups.filter(pc.is_in(groups.column("group"), value_set=wanted)).to_pylist()
    return {row["group"]: row["name"] or row["group"] for row in rows}


def _count(counter: Counter[Any], column: pa.ChunkedArray, most: int | None = None) -> None:
    for row in pc.value_counts(column).to_pylist():
        value = row["values"]
        if most is not None and value not in counter and len(counter) >= most:
            value = OTHER
        counter[value] += row["counts"]


def _quantiles(counter: Counter[int]) -> dict[str, int] | None:
    if not counter:
        return None
    values = sorted(counter)
    ends = np.cumsum([counter[value] for value in values])
    # The value of the picture at that place in the order of all; none is made up between two.
    places = {name: round(share * (int(ends[-1]) - 1)) for name, share in QUANTILES.items()}
    return {name: values[int(np.searchsorted(ends, place, side="right"))] for name, place in places.items()}


def _most_common(counter: Counter[Any]) -> dict[str, int]:
    """The most frequent values, then all the others together."""
    ranked = sorted(counter.items(), key=lambda item: (-item[1], str(item[0])))
    listed = [item for item in ranked if item[0] != OTHER][:MOST_LISTED]
    others = counter.total() - sum(count for _, count in listed)
    return dict(listed) | ({OTHER: others} if others else {})
