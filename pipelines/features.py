"""Ray Data: what frozen parts give is computed once, by a pool of actors, and kept.

pictures --vision tower--> (V, W) of each picture
pictures --teacher--> (E,) of each picture
demonstrations --frozen backbone, each read alone--> (T, D) of each demonstration

    files of episodes --what they show, by bucket--> buckets --each once, sorted--> lists --encode--> features

What is to be encoded is gathered by files, as a catalogue is: nothing that grows with the corpus passes
through the driver.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from PIL import Image

from mmicl_core.backbones.hugging_face import backbone_identity, load_for_inference
from mmicl_core.data.arrow_files import read_arrow, write_arrow
from mmicl_core.data.augment import augment_versions, variant_key
from mmicl_core.data.embedding import ImageTeacher
from mmicl_core.data.exchange import read_exchange, write_exchange
from mmicl_core.data.images import decode
from mmicl_core.data.store import STORE, store_columns
from mmicl_core.methods.aim import demonstration_key, read_demonstrations
from mmicl_core.prompts import ChatFormat, Turn
from pipelines.catalogue import ROWS_OF_A_BUCKET, Described
from pipelines.parts import Counts, Pool, finish_parts, is_finished, make_parts
from pipelines.stages import Stage, read_manifest

__all__ = ["encode_demonstrations", "encode_pictures", "teach_pictures"]

ROWS_OF_A_BATCH = 64
# Enough to keep every actor busy; a kill costs no more than this.
ROWS_OF_A_PART, MOST_PARTS = 256, 4096
KEY = "key"

Encode = Callable[[pa.Table], pa.RecordBatch]
"""Rows that are wanted -> rows of a store."""


def encode_pictures(
    described: Described, backbone: Path, episodes: Stage, variants: int, root: Path, *, queries_only: bool
) -> Stage:
    """Vision-tower output of the pictures of episodes and of their augmented versions, by `variant_key`."""
    stage = Stage(
        root,
        "vision",
        episodes=episodes.fingerprint,
        backbone=backbone_identity(backbone),
        variants=variants,
        queries_only=queries_only,
    )
    pool = Pool(_Encoder, (_PictureEncoder, backbone, described, variants), gpu=True)
    wanted = partial(_shown_pictures, queries_only=queries_only)
    return _encode(stage, "Encoding pictures", episodes, "episodes-*.parquet", wanted, pool)


def teach_pictures(described: Described, teacher: Path, side: int, catalogue: Stage, root: Path) -> Stage:
    """A teacher's features of the pictures of a catalogue that training may see."""
    about = [backbone_identity(teacher), side]
    stage = Stage(root, "teacher", catalogue=catalogue.fingerprint, about=about)
    pool = Pool(_Encoder, (_Teacher, teacher, described, side), gpu=True)
    return _encode(stage, "Asking the teacher", catalogue, "pictures-*.arrow", _catalogued_pictures, pool)


def encode_demonstrations(described: Described, backbone: Path, episodes: Stage, root: Path) -> Stage:
    """Frozen states of every demonstration of episodes, by `demonstration_key`."""
    identity = backbone_identity(backbone)
    stage = Stage(root, "states", episodes=episodes.fingerprint, backbone=identity)
    pool = Pool(_Encoder, (_DemonstrationReader, backbone, described), gpu=True)
    title = "Reading demonstrations"
    return _encode(stage, title, episodes, "episodes-*.parquet", _demonstrations, pool)


def _encode(
    stage: Stage, title: str, source: Stage, files: str, wanted: Callable[[Path], pa.Table], pool: Pool
) -> Stage:
    """Fill a stage with the features of what `wanted` finds in the files of `source`."""
    if is_finished(stage):
        return stage
    manifest = read_manifest(source.folder)
    names = sorted(name for name in manifest["files"] if fnmatchcase(name, files))
    buckets = -(-manifest["turns" if "turns" in manifest else "kept"] // ROWS_OF_A_BUCKET) or 1
    given = [
        {"name": f"wanted-from-{number:05d}", "file": str(source.folder / name), "size": 1}
        for number, name in enumerate(names)
    ]
    give = partial(_give, wanted=wanted, buckets=buckets)
    folder = make_parts(stage, given, give, title="Listing what to encode", total=len(given))
    lists = [{"name": f"wanted-in-{number:05d}", "bucket": number, "size": 1} for number in range(buckets)]
    gather = partial(_gather, partial_folder=folder)
    make_parts(stage, lists, gather, title="Listing what to encode", total=len(lists))
    parts = list(_slices([folder / f"{part['name']}.arrow" for part in lists]))
    make_parts(stage, parts, pool, title=title, total=sum(part["size"] for part in parts))
    finish_parts(stage, [*given, *lists, *parts], drop="wanted-*")
    return stage


def _give(
    part: Mapping[str, Any], folder: Path, *, wanted: Callable[[Path], pa.Table], buckets: int
) -> tuple[dict[str, int], Counts]:
    rows = _distinct(wanted(Path(part["file"])))
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


def _shown_pictures(file: Path, *, queries_only: bool) -> pa.Table:
    turns = _turns(file, queries=True, demonstrations=not queries_only)
    shown = turns.filter(pc.is_valid(turns.column("picture")))
    return shown.select(["picture", "image"]).append_column(KEY, shown.column("picture"))


def _demonstrations(file: Path) -> pa.Table:
    turns = _turns(file, queries=False, demonstrations=True)
    keys = [demonstration_key(turn) for turn in _as_turns(turns)]
    columns = turns.select(["picture", "image", "question", "answer"])
    return columns.append_column(KEY, pa.array(keys, type=pa.string()))


def _turns(file: Path, *, queries: bool, demonstrations: bool) -> pa.Table:
    """The turns of the episodes of a file; the last one of each is its query."""
    lists = pq.read_table(file, columns=["turns"]).column("turns").combine_chunks()
    turns = pa.Table.from_struct_array(lists.flatten())
    is_query = np.zeros(turns.num_rows, dtype=bool)
    is_query[np.cumsum(pc.list_value_length(lists).to_numpy(zero_copy_only=False)) - 1] = True
    return turns.filter(pa.array((is_query & queries) | (~is_query & demonstrations)))


def _catalogued_pictures(file: Path) -> pa.Table:
    rows = read_arrow(file)
    rows = rows.filter(pc.invert(pc.or_(rows.column("kept_back"), rows.column("held_out"))))
    return rows.select(["picture", "image"]).append_column(KEY, rows.column("picture"))


def _as_turns(rows: pa.Table) -> list[Turn]:
    columns = (rows.column(name).to_pylist() for name in ("picture", "question", "answer"))
    return [Turn(*row) for row in zip(*columns, strict=True)]


class _Encoder:
    """Makes parts of a stage of features with one model, which is loaded once."""

    def __init__(self, make: Callable[..., Encode], *arguments: Any) -> None:
        torch.set_num_threads(1)
        self._encode = make(*arguments)

    def __call__(self, part: Mapping[str, Any], folder: Path) -> tuple[dict[str, int], Counts]:
        rows = read_arrow(Path(part["list"])).slice(part["start"], part["size"])
        file, written = f"{part['name']}.arrow", 0
        with pa.ipc.new_file(str(folder / file), STORE) as writer:
            for batch in rows.to_batches(max_chunksize=ROWS_OF_A_BATCH):
                features = self._encode(pa.Table.from_batches([batch]))
                writer.write_batch(features)
                written += features.num_rows
        return {file: written}, {"rows": rows.num_rows}


class _Pictures:
    """Decodes the pictures of a corpus."""

    def __init__(self, described: Described) -> None:
        self._reader = described.corpus.pictures(described.pairs.folder)

    def __call__(self, rows: pa.Table) -> list[Image.Image]:
        return [decode(self._reader.read(image)) for image in rows.column("image").to_pylist()]


class _PictureEncoder:
    def __init__(self, backbone: Path, described: Described, variants: int) -> None:
        self._backbone = load_for_inference(backbone)
        self._pictures, self._variants = _Pictures(described), variants

    def __call__(self, rows: pa.Table) -> pa.RecordBatch:
        keys = rows.column(KEY).to_pylist()
        pixels = self._backbone.pixels(self._pictures(rows))
        names, arrays = list[str](), list[Any]()
        for variant in range(self._variants):
            versions = [variant_key(key, variant) for key in keys]
            seen = augment_versions(pixels, versions) if variant else pixels
            names += versions
            arrays += list(self._backbone.encode_pixels(seen).float().cpu().numpy())
        return store_columns(names, arrays)


class _Teacher:
    def __init__(self, teacher: Path, described: Described, side: int) -> None:
        self._teacher, self._pictures = ImageTeacher(teacher, side), _Pictures(described)

    def __call__(self, rows: pa.Table) -> pa.RecordBatch:
        return store_columns(rows.column(KEY).to_pylist(), list(self._teacher(self._pictures(rows))))


class _DemonstrationReader:
    def __init__(self, backbone: Path, described: Described) -> None:
        self._backbone, self._pictures = load_for_inference(backbone), _Pictures(described)
        self._chat = ChatFormat(self._backbone.processor)

    def __call__(self, rows: pa.Table) -> pa.RecordBatch:
        vision_NVW = self._backbone.encode_pixels(self._backbone.pixels(self._pictures(rows)))
        states = read_demonstrations(self._backbone, self._chat, _as_turns(rows), vision_NVW)
        arrays = [state.float().cpu().numpy() for state in states]
        return store_columns(rows.column(KEY).to_pylist(), arrays)
