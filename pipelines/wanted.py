"""What there is to encode, each once: listed by files, as a catalogue is made.

    files of episodes --what they show, by bucket--> buckets --each once, sorted--> lists --cut--> parts

Nothing that grows with the corpus passes through the driver, and nothing here needs a model: the tasks that
make these lists start in a moment.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from mmicl_core.data.arrow_files import read_arrow, write_arrow
from mmicl_core.data.exchange import read_exchange, write_exchange
from mmicl_core.prompts import Turn, demonstration_key
from pipelines.catalogue import ROWS_OF_A_BUCKET
from pipelines.parts import Counts, Pool, finish_parts, make_parts, reuse_finished
from pipelines.preflight import check_room
from pipelines.stages import Stage, read_manifest

__all__ = [
    "KEY",
    "Pick",
    "RowBytes",
    "as_turn",
    "catalogued_pictures",
    "demonstrations",
    "encode_parts",
    "shown_pictures",
]

log = logging.getLogger("mmicl")

# Enough to keep every worker busy; a kill costs no more than this.
ROWS_OF_A_PART, MOST_PARTS = 256, 4096
ROWS_OF_A_SAMPLE = 64
KEY = "key"

Pick = Callable[[Path], pa.Table]
"""A file -> what of it is to be encoded, each row under its `KEY`."""
RowBytes = Callable[[pa.Table], int]
"""Some of what is to be encoded -> the mean bytes that one of them takes when it is."""


def encode_parts(
    stage: Stage,
    title: str,
    source: Stage,
    files: str,
    pick: Pick,
    pool: Pool,
    *,
    most: int,
    row_bytes: RowBytes,
) -> Stage:
    """Fill a stage with what a pool of processes makes of each thing that `pick` finds in `source`.

    A part names the `list` that its things stand in, as an Arrow file, and which: `size` from `start` on.

    Args:
        files: a glob of the files of `source` that `pick` looks into.
        most: how many things `pick` can find, those found twice counted twice.
        row_bytes: what one thing will take on the disk, by a few of them; told before it is spent.

    Raises:
        ConfigError: all of them together have no room there.
    """
    if reuse_finished(stage):
        return stage
    names = sorted(name for name in read_manifest(source.folder)["files"] if fnmatchcase(name, files))
    buckets = -(-most // ROWS_OF_A_BUCKET) or 1
    given = [
        {"name": f"wanted-from-{number:05d}", "file": str(source.folder / name), "size": 1}
        for number, name in enumerate(names)
    ]
    give = partial(_give, pick=pick, buckets=buckets)
    folder = make_parts(stage, given, give, title="Listing what to encode", total=len(given))
    lists = [{"name": f"wanted-in-{number:05d}", "bucket": number, "size": 1} for number in range(buckets)]
    gather = partial(_gather, partial_folder=folder)
    make_parts(stage, lists, gather, title="Listing what to encode", total=len(lists))
    files_of_lists = [folder / f"{part['name']}.arrow" for part in lists]
    parts = list(_slices(files_of_lists))
    _tell_cost(title, folder, files_of_lists, sum(part["size"] for part in parts), row_bytes)
    make_parts(stage, parts, pool, title=title, total=sum(part["size"] for part in parts))
    finish_parts(stage, [*given, *lists, *parts], drop="wanted-*")
    return stage


def _tell_cost(title: str, folder: Path, lists: Sequence[Path], total: int, row_bytes: RowBytes) -> None:
    if not total:
        return
    some = pa.concat_tables([read_arrow(file).slice(0, ROWS_OF_A_SAMPLE) for file in lists])
    needed = row_bytes(some.slice(0, ROWS_OF_A_SAMPLE)) * total
    log.info("%s: %s of them take about %s MiB", title, f"{total:,}", f"{needed / 2**20:,.1f}")
    check_room(folder, needed, f"what {title[0].lower()}{title[1:]} keeps")


def shown_pictures(file: Path, *, queries_only: bool) -> pa.Table:
    """The pictures of EPISODE rows, `picture` and `image`: of queries, or of demonstrations too."""
    turns = _turns(file, queries=True, demonstrations=not queries_only)
    shown = turns.filter(pc.is_valid(turns.column("picture")))
    return shown.select(["picture", "image"]).append_column(KEY, shown.column("picture"))


def demonstrations(file: Path) -> pa.Table:
    """The demonstrations of EPISODE rows: `picture`, `image`, `question`, `answer`."""
    turns = _turns(file, queries=False, demonstrations=True)
    texts = (turns.column(name).to_pylist() for name in ("picture", "question", "answer"))
    keys = [demonstration_key(as_turn(*said)) for said in zip(*texts, strict=True)]
    columns = turns.select(["picture", "image", "question", "answer"])
    return columns.append_column(KEY, pa.array(keys, type=pa.string()))


def as_turn(picture: str | None, question: str, answer: str) -> Turn:
    """A demonstration as the columns of episodes hold it."""
    return Turn(() if picture is None else (picture,), question, answer)


def catalogued_pictures(file: Path) -> pa.Table:
    """The pictures of a bucket of a catalogue that training may see: `picture` and `image`."""
    rows = read_arrow(file)
    rows = rows.filter(pc.invert(pc.or_(rows.column("kept_back"), rows.column("held_out"))))
    return rows.select(["picture", "image"]).append_column(KEY, rows.column("picture"))


def _give(
    part: Mapping[str, Any], folder: Path, *, pick: Pick, buckets: int
) -> tuple[dict[str, int], Counts]:
    rows = _distinct(pick(Path(part["file"])))
    file = f"{part['name']}.arrow"
    write_exchange(folder / file, rows, buckets, KEY)
    return {file: rows.num_rows}, {}


def _gather(part: Mapping[str, Any], folder: Path, *, partial_folder: Path) -> tuple[dict[str, int], Counts]:
    files = sorted(partial_folder.glob("wanted-from-*.arrow"))
    rows = _distinct(read_exchange(files, part["bucket"]))
    file = f"{part['name']}.arrow"
    write_arrow(folder / file, rows)
    return {file: rows.num_rows}, {}


def _distinct(rows: pa.Table) -> pa.Table:
    rows = rows.sort_by(KEY)
    keys = rows.column(KEY).to_numpy(zero_copy_only=False)
    return rows.filter(pa.array(np.append([True], keys[1:] != keys[:-1])[: len(keys)]))


def _slices(lists: Sequence[Path]) -> Iterator[dict[str, Any]]:
    lengths = [read_arrow(file).num_rows for file in lists]
    size = max(ROWS_OF_A_PART, -(-sum(lengths) // MOST_PARTS))
    for file, length in zip(lists, lengths, strict=True):
        # An empty list gives an empty store: nothing to encode is not the same as nothing encoded.
        for start in range(0, max(1, length), size):
            name = f"features-{file.stem[-5:]}-{start:08d}"
            yield {"name": name, "list": str(file), "start": start, "size": min(size, length - start)}


def _turns(file: Path, *, queries: bool, demonstrations: bool) -> pa.Table:
    """The turns of the episodes of a file; the last one of each is its query."""
    lists = pq.read_table(file, columns=["turns"]).column("turns").combine_chunks()
    turns = pa.Table.from_struct_array(lists.flatten())
    is_query = np.zeros(turns.num_rows, dtype=bool)
    is_query[np.cumsum(pc.list_value_length(lists).to_numpy(zero_copy_only=False)) - 1] = True
    return turns.filter(pa.array((is_query & queries) | (~is_query & demonstrations)))
