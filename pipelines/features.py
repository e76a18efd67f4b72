"""Ray Data: what frozen parts give is computed once, by a pool of actors, and kept.

pictures --vision tower, projector--> (V, D) of each picture, or --vision tower--> (R, W)
pictures --teacher--> (E,) of each picture
demonstrations --frozen backbone, each read alone--> (T, D) of each demonstration
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.compute as pc
import torch
from PIL import Image

from mmicl_core.backbones.hugging_face import backbone_identity, load_for_inference, outline_backbone
from mmicl_core.backbones.vision import join
from mmicl_core.config.model import AimConfig
from mmicl_core.data.arrow_files import read_arrow
from mmicl_core.data.augment import variant_key
from mmicl_core.data.embedding import ImageTeacher
from mmicl_core.data.images import decode
from mmicl_core.data.pictures import VISUAL, PreparedPicture, change_version, usual_picture
from mmicl_core.data.store import STORE, store_columns
from mmicl_core.methods.aim import Reader
from mmicl_core.prompts import Turn
from pipelines.catalogue import Described
from pipelines.parts import Counts, Pool
from pipelines.stages import Stage, read_manifest
from pipelines.wanted import (
    KEY,
    Pick,
    RowBytes,
    as_turn,
    catalogued_pictures,
    demonstrations,
    encode_parts,
    shown_pictures,
)

__all__ = ["encode_demonstrations", "encode_pictures", "teach_pictures"]

ROWS_OF_A_BATCH = 64
# Features are kept in 16 bits.
HALF = 2
# One embedding of a picture, as teachers give.
TEACHER_BYTES = 4096

Takes = Literal["visual_tokens", "tower_states"]
Encode = Callable[[pa.Table], pa.RecordBatch]
"""Rows that are wanted -> rows of a store."""


def encode_pictures(
    described: Described,
    backbone: Path,
    episodes: Stage,
    root: Path,
    *,
    takes: Takes,
    variants: int,
    queries_only: bool,
) -> Stage:
    """Visual tokens, or states of the vision tower, of the pictures of episodes and of their augmented
    versions, by `variant_key`."""
    stage = Stage(
        root,
        "vision",
        takes=takes,
        episodes=episodes.fingerprint,
        backbone=backbone_identity(backbone),
        variants=variants,
        queries_only=queries_only,
    )
    pool = Pool(_Encoder, (_PictureEncoder, backbone, described, takes, variants), gpu=True)
    wanted = partial(shown_pictures, queries_only=queries_only)
    cost = partial(_picture_bytes, backbone, takes, variants)
    return _encode_turns(stage, "Encoding pictures", episodes, wanted, pool, cost)


def teach_pictures(described: Described, teacher: Path, side: int, catalogue: Stage, root: Path) -> Stage:
    """A teacher's features of the pictures of a catalogue that training may see."""
    about = [backbone_identity(teacher), side]
    stage = Stage(root, "teacher", catalogue=catalogue.fingerprint, about=about)
    pool = Pool(_Encoder, (_Teacher, teacher, described, side), gpu=True)
    most = read_manifest(catalogue.folder)["kept"]
    return encode_parts(
        stage,
        "Asking the teacher",
        catalogue,
        "pictures-*.arrow",
        catalogued_pictures,
        pool,
        most=most,
        row_bytes=lambda _: TEACHER_BYTES,
    )


def encode_demonstrations(
    described: Described, backbone: Path, episodes: Stage, root: Path, config: AimConfig
) -> Stage:
    """Frozen states of every demonstration of episodes, by `demonstration_key`."""
    stage = Stage(
        root,
        "states",
        episodes=episodes.fingerprint,
        backbone=backbone_identity(backbone),
        reads=[config.layer, config.text],
    )
    pool = Pool(_Encoder, (_DemonstrationReader, backbone, described, config), gpu=True)
    cost = partial(_demonstration_bytes, backbone, config)
    return _encode_turns(stage, "Reading demonstrations", episodes, demonstrations, pool, cost)


def _encode_turns(
    stage: Stage, title: str, episodes: Stage, pick: Pick, pool: Pool, row_bytes: RowBytes
) -> Stage:
    turns = read_manifest(episodes.folder)["turns"]
    return encode_parts(
        stage, title, episodes, "episodes-*.parquet", pick, pool, most=turns, row_bytes=row_bytes
    )


def _picture_bytes(backbone: Path, takes: Takes, variants: int, _: pa.Table) -> int:
    """By a picture of the usual size; models that take any size make more of larger ones."""
    outline = outline_backbone(backbone)
    (prepared,) = outline.prepare([usual_picture()])
    if takes == "visual_tokens":
        return HALF * variants * outline.width * sum(token == VISUAL for token in prepared.ids)
    pixels, side = prepared.inputs["pixel_values"], outline.model.config.vision_config.patch_size
    patches = prepared.patches_in_rows or pixels.shape[-1] * pixels.shape[-2] // side**2
    return HALF * variants * outline.vision_width * patches


def _demonstration_bytes(backbone: Path, config: AimConfig, rows: pa.Table) -> int:
    outline = outline_backbone(backbone)
    reader = Reader(outline, config)
    lengths = [reader.fused_tokens(turn) for turn in _as_turns(rows)]
    return HALF * outline.width * -(-sum(lengths) // len(lengths))


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
    def __init__(self, backbone: Path, described: Described, takes: Takes, variants: int) -> None:
        self._backbone = load_for_inference(backbone)
        self._pictures, self._takes, self._variants = _Pictures(described), takes, variants

    @torch.no_grad()
    def __call__(self, rows: pa.Table) -> pa.RecordBatch:
        keys = rows.column(KEY).to_pylist()
        pictures = self._backbone.prepare(self._pictures(rows))
        names, shown = list(keys), list(pictures)
        for variant in range(1, self._variants):
            versions = [variant_key(key, variant) for key in keys]
            names += versions
            shown += [change_version(one, key) for one, key in zip(pictures, versions, strict=True)]
        arrays = [array.float().cpu().numpy() for array in self._features(shown)]
        return store_columns(names, arrays, shown)

    def _features(self, pictures: list[PreparedPicture]) -> Sequence[torch.Tensor]:
        if self._takes == "tower_states":
            return self._backbone.vision.tower_states(pictures)
        batch = join(pictures)
        return torch.split(self._backbone.vision.see(batch), list(batch.visual_tokens))


class _Teacher:
    def __init__(self, teacher: Path, described: Described, side: int) -> None:
        self._teacher, self._pictures = ImageTeacher(teacher, side), _Pictures(described)

    def __call__(self, rows: pa.Table) -> pa.RecordBatch:
        return store_columns(rows.column(KEY).to_pylist(), list(self._teacher(self._pictures(rows))))


class _DemonstrationReader:
    def __init__(self, backbone: Path, described: Described, config: AimConfig) -> None:
        self._backbone, self._pictures = load_for_inference(backbone), _Pictures(described)
        self._reader = Reader(self._backbone, config)

    def __call__(self, rows: pa.Table) -> pa.RecordBatch:
        shown = rows.filter(pc.is_valid(rows.column("picture")))
        prepared = self._backbone.prepare(self._pictures(shown)) if shown.num_rows else []
        pictures = dict(zip(shown.column("picture").to_pylist(), prepared, strict=True))
        states = self._reader.read(self._reader.pack(_as_turns(rows), pictures))
        arrays = [state.float().cpu().numpy() for state in states]
        return store_columns(rows.column(KEY).to_pylist(), arrays)


def _as_turns(rows: pa.Table) -> list[Turn]:
    columns = (rows.column(name).to_pylist() for name in ("picture", "question", "answer"))
    return [as_turn(*row) for row in zip(*columns, strict=True)]
