"""A piece of a corpus -> files of PAIR rows, whatever the corpus is.

Readers say what lies where; here their rows are written. What cannot be read by its place is copied, still
encoded, into a plain tar beside the rows and referenced there, so that whoever needs pixels finds every
picture in the same way: by file, offset and size.
"""

from __future__ import annotations

import io
import tarfile
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from mmicl_core.data import reasons
from mmicl_core.data.fetch import Fetcher
from mmicl_core.data.readers.base import Row, image_at
from mmicl_core.data.schema import PAIR, SKIPPED
from mmicl_core.data.storage import COPY

__all__ = ["write_pairs"]

# Pictures loaded together lie in memory together, each as large as `corpus.fetch.max_bytes`.
ROWS_AT_ONCE = 32


def write_pairs(
    rows: Iterable[Row], name: str, folder: Path, rows_per_file: int, fetcher: Fetcher | None = None
) -> tuple[dict[str, int], dict[str, Any]]:
    """Write `pairs-NAME-NNN.parquet`, and where there is need `skipped-NAME.parquet` and `copied-NAME.tar`.

    Args:
        rows: of one piece of the corpus.
        rows_per_file: PAIR rows of one file, at most.
        fetcher: loads pictures by URL; without one, a row that needs it is skipped.

    Returns:
        Rows of each file, and the counts `read`, `kept` and `skipped` by reason.
    """
    files: dict[str, int] = {}
    skipped: list[dict[str, Any]] = []
    kept: list[dict[str, Any]] = []
    number = 0
    with _Copies(folder / f"copied-{name}.tar") as copies:
        for row in _with_pictures(rows, fetcher):
            if row.skipped is not None:
                told = {"picture": row.pair["picture"], "image": row.pair["image"]}
                skipped.append(told | {"skipped": row.skipped, "detail": row.detail})
                continue
            if row.encoded is not None:
                row.pair["image"] = copies.add(row.pair["picture"], row.encoded)
            kept.append(row.pair)
            if len(kept) == rows_per_file:
                files |= _write(folder, f"pairs-{name}-{number:03d}.parquet", kept, PAIR)
                kept, number = [], number + 1
    if copies.count:
        files[f"copied-{name}.tar"] = copies.count
    if kept:
        files |= _write(folder, f"pairs-{name}-{number:03d}.parquet", kept, PAIR)
    if skipped:
        files |= _write(folder, f"skipped-{name}.parquet", skipped, SKIPPED)
    total = sum(count for file, count in files.items() if file.startswith("pairs-"))
    tally = dict(sorted(Counter(row["skipped"] for row in skipped).items()))
    return files, {"read": total + len(skipped), "kept": total, "skipped": tally}


def _with_pictures(rows: Iterable[Row], fetcher: Fetcher | None) -> Iterator[Row]:
    """The same rows with what came by URL, in the same order."""
    remaining = iter(rows)
    while chunk := list(islice(remaining, ROWS_AT_ONCE)):
        needs = [row for row in chunk if row.skipped is None and row.url and not _has_picture(row)]
        found = map(_not_fetched, needs) if fetcher is None else _load(needs, fetcher)
        loaded = {id(row): result for row, result in zip(needs, found, strict=True)}
        yield from (loaded.get(id(row), row) for row in chunk)


def _has_picture(row: Row) -> bool:
    return row.encoded is not None or row.pair["image"] is not None


def _not_fetched(row: Row) -> Row:
    return replace(row, skipped=reasons.URL_REFUSED, detail="corpus.fetch.enabled is false")


def _load(rows: Sequence[Row], fetcher: Fetcher) -> Iterator[Row]:
    found = fetcher.fetch_many([str(row.url) for row in rows])
    for row, fetched in zip(rows, found, strict=True):
        yield replace(row, encoded=fetched.data, skipped=fetched.skipped, detail=fetched.detail)


def _write(folder: Path, name: str, rows: list[dict[str, Any]], schema: pa.Schema) -> dict[str, int]:
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), folder / name)
    return {name: len(rows)}


class _Copies:
    """A plain tar of encoded pictures; it is there once a picture is."""

    def __init__(self, path: Path) -> None:
        self._path, self.count = path, 0
        self._archive: tarfile.TarFile | None = None

    def __enter__(self) -> _Copies:
        return self

    def __exit__(self, *_: object) -> None:
        if self._archive is not None:
            self._archive.close()

    def add(self, key: str, data: bytes) -> dict[str, Any]:
        if self._archive is None:
            self._archive = tarfile.open(self._path, "w", format=tarfile.PAX_FORMAT)  # noqa: SIM115
        member = tarfile.TarInfo(key)
        member.size = len(data)
        self._archive.addfile(member, io.BytesIO(data))
        self.count += 1
        padded = -(-len(data) // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
        offset = self._archive.offset - padded
        return image_at(COPY + self._path.name, member=key, offset=offset, size=len(data))
