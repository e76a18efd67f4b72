"""Ray Data: what frozen parts give is computed once, by a pool of actors, and kept.

pictures --vision tower--> (V, W) of each picture
pictures --teacher--> (E,) of each picture
demonstrations --frozen backbone, each read alone--> (T, D) of each demonstration
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch
from PIL import Image

from mmicl_core.backbones.hugging_face import backbone_identity, load_for_inference
from mmicl_core.data.arrow_files import read_arrow
from mmicl_core.data.augment import augment_versions, variant_key
from mmicl_core.data.embedding import ImageTeacher
from mmicl_core.data.images import decode
from mmicl_core.data.store import STORE, store_columns
from mmicl_core.methods.aim import read_demonstrations
from mmicl_core.prompts import ChatFormat, Turn
from pipelines.catalogue import Described
from pipelines.parts import Counts, Pool
from pipelines.stages import Stage, read_manifest
from pipelines.wanted import KEY, Pick, catalogued_pictures, demonstrations, encode_parts, shown_pictures

__all__ = ["encode_demonstrations", "encode_pictures", "teach_pictures"]

ROWS_OF_A_BATCH = 64

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
    wanted = partial(shown_pictures, queries_only=queries_only)
    return _encode_turns(stage, "Encoding pictures", episodes, wanted, pool)


def teach_pictures(described: Described, teacher: Path, side: int, catalogue: Stage, root: Path) -> Stage:
    """A teacher's features of the pictures of a catalogue that training may see."""
    about = [backbone_identity(teacher), side]
    stage = Stage(root, "teacher", catalogue=catalogue.fingerprint, about=about)
    pool = Pool(_Encoder, (_Teacher, teacher, described, side), gpu=True)
    most = read_manifest(catalogue.folder)["kept"]
    return encode_parts(
        stage, "Asking the teacher", catalogue, "pictures-*.arrow", catalogued_pictures, pool, most=most
    )


def encode_demonstrations(described: Described, backbone: Path, episodes: Stage, root: Path) -> Stage:
    """Frozen states of every demonstration of episodes, by `demonstration_key`."""
    identity = backbone_identity(backbone)
    stage = Stage(root, "states", episodes=episodes.fingerprint, backbone=identity)
    pool = Pool(_Encoder, (_DemonstrationReader, backbone, described), gpu=True)
    return _encode_turns(stage, "Reading demonstrations", episodes, demonstrations, pool)


def _encode_turns(stage: Stage, title: str, episodes: Stage, pick: Pick, pool: Pool) -> Stage:
    turns = read_manifest(episodes.folder)["turns"]
    return encode_parts(stage, title, episodes, "episodes-*.parquet", pick, pool, most=turns)


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


def _as_turns(rows: pa.Table) -> list[Turn]:
    columns = (rows.column(name).to_pylist() for name in ("picture", "question", "answer"))
    return [Turn(*row) for row in zip(*columns, strict=True)]
