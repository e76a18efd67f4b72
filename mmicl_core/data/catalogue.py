"""Pictures in groups, on disk, mapped into memory: what episodes are drawn from.

A group is a concept, a document or a task. Its pictures lie side by side, first those that may be shown in
training (`open` of them), then those kept back; so a draw is a number, and reading a picture's row touches
only the page that it lies on. Any number of workers of a machine share the pages.

A catalogue is a folder of buckets, pairs of Arrow IPC files: `pictures-NNNNN.arrow` (CATALOGUED rows) and
`groups-NNNNN.arrow` (GROUP rows). Which bucket a group lies in is decided by a hash of its id. Groups and
pictures are numbered through all buckets in order.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from mmicl_core.data import reasons
from mmicl_core.data.arrow_files import read_arrow, write_arrow
from mmicl_core.data.schema import IMAGE, PAIR
from mmicl_core.errors import DataError

__all__ = ["CATALOGUED", "GROUP", "Catalogue", "make_bucket", "write_bucket"]

CATALOGUED = pa.schema(
    [
        ("group", pa.string()),
        ("picture", pa.string()),
        ("image", IMAGE),
        *(PAIR.field(name) for name in ("text", "turns", "task", "document", "position")),
        *(PAIR.field(name) for name in ("concept", "name", "keywords", "category", "subcategory", "style")),
        ("sha256", pa.binary(32)),
        ("perceptual_hash", pa.uint64()),
        # Kept back from training; it stands behind those that are not.
        ("kept_back", pa.bool_()),
        # A held-out group as a whole: a concept of the split.
        ("held_out", pa.bool_()),
        # Where the embedding of the picture lies: the file of its stage, and the row in it.
        ("embedding_file", pa.int32()),
        ("embedding_row", pa.int32()),
    ]
)

GROUP = pa.schema(
    [
        ("group", pa.string()),
        ("name", pa.string()),
        ("keywords", pa.list_(pa.string())),
        ("category", pa.string()),
        ("subcategory", pa.string()),
        ("held_out", pa.bool_()),
        # Number of its first picture in its bucket; pictures that training may show; all pictures.
        ("first", pa.int64()),
        ("open", pa.int32()),
        ("total", pa.int32()),
    ]
)

Numbers = np.ndarray[Any, np.dtype[np.int64]]


def make_bucket(rows: pa.Table, min_pictures: int) -> tuple[pa.Table, pa.Table, pa.Table]:
    """The pictures and groups of a bucket, and what is left out, as SKIPPED rows.

    Left out are pictures that a group holds already, byte for byte, and groups of fewer than `min_pictures`
    distinct ones. Documents keep the order of their positions, other groups that of their pictures' keys.

    Args:
        rows: CATALOGUED rows of whole groups, in any order.
    """
    rows = rows.combine_chunks()
    order = pc.sort_indices(
        rows,
        sort_keys=[(key, "ascending") for key in ("group", "kept_back", "position", "picture")],
    )
    rows = rows.take(order)
    reason = np.full(rows.num_rows, None, dtype=object)
    groups = rows.column("group").combine_chunks()
    reason[_repeated(rows)] = reasons.REPEATED_PICTURE
    kept = reason == None  # noqa: E711  elementwise
    numbers = groups.dictionary_encode().indices.to_numpy()
    counts = np.bincount(numbers[kept], minlength=1 + numbers.max(initial=-1))
    reason[kept & (counts[numbers] < min_pictures)] = reasons.RARE_CONCEPT
    left_out = _left_out(rows, reason)
    pictures = rows.filter(pa.array(reason == None))  # noqa: E711
    return pictures, _groups(pictures), left_out


def write_bucket(folder: Path, number: int, pictures: pa.Table, groups: pa.Table) -> None:
    """Write the two files of a bucket, each as one record batch."""
    write_arrow(folder / f"pictures-{number:05d}.arrow", pictures)
    write_arrow(folder / f"groups-{number:05d}.arrow", groups)


class Catalogue:
    """An open catalogue. Groups are numbered from 0, and so are pictures."""

    def __init__(self, folder: Path) -> None:
        files = sorted(folder.glob("pictures-*.arrow"))
        if not files:
            raise DataError(f"{folder} holds no catalogue: it has no pictures-*.arrow")
        self._pictures = [read_arrow(file) for file in files]
        self._scanned: dict[str, pa.ChunkedArray] = {}
        groups = [read_arrow(folder / file.name.replace("pictures", "groups")) for file in files]
        # Where each bucket's pictures begin; the last number is the end.
        self._starts = np.cumsum([0, *(table.num_rows for table in self._pictures)])
        self.groups = pa.concat_tables(groups)
        """GROUP rows of all buckets; `first` counts within the bucket, so use `self.first`."""
        begins = np.repeat(self._starts[:-1], [table.num_rows for table in groups])
        self.first: Numbers = self._numbers("first") + begins
        self.open: Numbers = self._numbers("open")
        self.total: Numbers = self._numbers("total")
        self.held_out: np.ndarray[Any, np.dtype[np.bool_]] = self._numbers("held_out").astype(bool)

    def __len__(self) -> int:
        """Groups."""
        return int(self.groups.num_rows)

    @property
    def num_pictures(self) -> int:
        """Pictures of all groups."""
        return int(self._starts[-1])

    @cached_property
    def ids(self) -> list[str]:
        """The ids of the groups, in order."""
        return list(self.groups.column("group").to_pylist())

    @cached_property
    def names(self) -> list[str]:
        """The names of the groups, in order."""
        return list(self.groups.column("name").to_pylist())

    def pictures(self, group: int, *, kept_back: bool = False) -> range:
        """The numbers of a group's pictures: those that training may show, or those kept back."""
        first, middle = int(self.first[group]), int(self.first[group] + self.open[group])
        return range(middle, first + int(self.total[group])) if kept_back else range(first, middle)

    def take(self, numbers: Sequence[int] | Numbers, columns: Sequence[str]) -> pa.Table:
        """The rows of pictures, in the order of `numbers`, which may repeat."""
        wanted = np.asarray(numbers, dtype=np.int64)
        bucket = np.searchsorted(self._starts, wanted, side="right") - 1
        pieces, places = [], []
        for number in np.unique(bucket):
            here = np.flatnonzero(bucket == number)
            table = self._pictures[number].select(list(columns))
            pieces.append(table.take(pa.array(wanted[here] - self._starts[number])))
            places.append(here)
        if not pieces:
            return pa.schema([CATALOGUED.field(name) for name in columns]).empty_table()
        back = np.argsort(np.concatenate(places), kind="stable")
        return pa.concat_tables(pieces).combine_chunks().take(pa.array(back))

    def column(self, name: str, numbers: Sequence[int] | Numbers) -> Any:
        """One column of pictures, as a NumPy array."""
        return self.take(numbers, [name]).column(name).to_numpy(zero_copy_only=False)

    def scan(self, name: str) -> pa.ChunkedArray:
        """One column of all pictures, where it lies; for single cells it is quicker than `take`."""
        if name not in self._scanned:
            chunks = [chunk for table in self._pictures for chunk in table.column(name).chunks]
            self._scanned[name] = pa.chunked_array(chunks, type=CATALOGUED.field(name).type)
        return self._scanned[name]

    def fingerprint(self, number: int) -> tuple[bytes, int]:
        """The SHA-256 and the perceptual hash of a picture.

        Raises:
            DataError: the catalogue holds pictures that have none.
        """
        starts, views = self._fingerprints
        batch = bisect_right(starts, number) - 1
        digests, hashes = views[batch]
        place = number - starts[batch]
        return digests[32 * place : 32 * (place + 1)].tobytes(), hashes[place]

    @cached_property
    def _fingerprints(self) -> tuple[list[int], list[tuple[memoryview, memoryview]]]:
        # Read by the thousand, one by one; Arrow would make an object for each.
        starts, views, start = [], [], 0
        columns = (self.scan(name).chunks for name in ("sha256", "perceptual_hash"))
        for digests, hashes in zip(*columns, strict=True):
            if digests.null_count or hashes.null_count:
                raise DataError(
                    f"the catalogue holds {digests.null_count} pictures without sha256 and "
                    f"{hashes.null_count} without perceptual hash: catalogue pictures that were looked at"
                )
            if len(digests):
                starts.append(start)
                views.append((_view(digests, 32), _view(hashes, 8).cast("Q")))
            start += len(digests)
        return starts, views

    def _numbers(self, column: str) -> Numbers:
        values: Numbers = self.groups.column(column).to_numpy().astype(np.int64)
        return values


def _repeated(rows: pa.Table) -> Any:
    met, repeated = set[tuple[str, bytes]](), []
    keys = zip(rows.column("group").to_pylist(), rows.column("sha256").to_pylist(), strict=True)
    for number, key in enumerate(keys):
        if key in met:
            repeated.append(number)
        met.add(key)
    return np.array(repeated, dtype=np.int64)


def _left_out(rows: pa.Table, reason: Any) -> pa.Table:
    told = pa.array(list(reason), type=pa.string())
    table = rows.select(["picture", "image"]).append_column("skipped", told)
    detail = pc.binary_join_element_wise("group ", rows.column("group").cast(pa.string()), "")
    table = table.append_column("detail", detail)
    return table.filter(pc.is_valid(told))


def _groups(pictures: pa.Table) -> pa.Table:
    ids = pictures.column("group").to_numpy(zero_copy_only=False)
    firsts = np.flatnonzero(np.append([True], ids[1:] != ids[:-1])) if len(ids) else np.array([], dtype=int)
    ends = np.append(firsts[1:], len(ids)).astype(np.int64)
    kept_back = pictures.column("kept_back").to_numpy(zero_copy_only=False).astype(np.int64)
    sums = np.append([0], np.cumsum(kept_back))
    described = ("group", "name", "keywords", "category", "subcategory", "held_out")
    table = pictures.select(list(described)).take(pa.array(firsts))
    total = ends - firsts
    numbers = {"first": firsts, "open": total - (sums[ends] - sums[firsts]), "total": total}
    for name, values in numbers.items():
        table = table.append_column(name, pa.array(values, type=GROUP.field(name).type))
    return table.cast(GROUP)


def _view(array: pa.Array, size: int) -> memoryview:
    values = memoryview(array.buffers()[1])
    return values[size * array.offset : size * (array.offset + len(array))]
