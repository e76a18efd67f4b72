"""Ray Data: what frozen parts give is computed once, by a pool of actors, and kept.

pictures --vision tower--> (V, W) of each picture
pictures --teacher--> (E,) of each picture
demonstrations --frozen backbone, each read alone--> (T, D) of each demonstration
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import ray
import torch
from PIL import Image

from mmicl_core.backbones.hugging_face import backbone_identity, load_for_inference
from mmicl_core.config.base import fingerprint
from mmicl_core.data.augment import augment_versions, variant_key
from mmicl_core.data.embedding import ImageTeacher
from mmicl_core.data.images import decode
from mmicl_core.data.storage import PictureReader
from mmicl_core.data.store import store_columns
from mmicl_core.methods.aim import demonstration_key, read_demonstrations
from mmicl_core.prompts import ChatFormat, Turn
from pipelines.catalogue import Described
from pipelines.pairs import Corpus
from pipelines.progress import counting
from pipelines.stages import Stage

__all__ = ["encode_demonstrations", "encode_pictures", "teach_pictures"]

PICTURES_PER_BATCH = 64
DEMONSTRATIONS_PER_BATCH = 128
# Encoders that took every CPU would wait for ever for the tasks that feed them and write for them.
CPUS_OF_AN_ENCODER = 0.5

Images = Mapping[str, Mapping[str, Any]]
"""IMAGE references by the key of the picture."""


def encode_pictures(described: Described, backbone: Path, images: Images, variants: int, root: Path) -> Stage:
    """Vision-tower output of pictures and of their augmented versions, by `variant_key`."""
    identity = backbone_identity(backbone)
    stage = Stage(
        root,
        "vision",
        pairs=described.pairs.fingerprint,
        backbone=identity,
        pictures=fingerprint(sorted(images)),
        variants=variants,
    )
    return _encode(
        stage,
        "Encoding pictures",
        _rows(images),
        PICTURES_PER_BATCH,
        _PictureEncoder,
        (backbone, described.corpus, described.pairs.folder, variants),
    )


def teach_pictures(described: Described, teacher: Path, side: int, images: Images, root: Path) -> Stage:
    """A teacher's features of pictures."""
    about = [backbone_identity(teacher), side, fingerprint(sorted(images))]
    stage = Stage(root, "teacher", pairs=described.pairs.fingerprint, about=about)
    arguments = (teacher, described.corpus, described.pairs.folder, side)
    return _encode(stage, "Asking the teacher", _rows(images), PICTURES_PER_BATCH, _Teacher, arguments)


def encode_demonstrations(
    described: Described, backbone: Path, episodes: Sequence[Mapping[str, Any]], name: str, root: Path
) -> Stage:
    """Frozen states of every demonstration of `episodes`, by `demonstration_key`; `name` names those."""
    identity = backbone_identity(backbone)
    pairs = described.pairs.fingerprint
    stage = Stage(root, "states", pairs=pairs, backbone=identity, episodes=name)
    rows = {
        (turn["picture"], turn["question"], turn["answer"]): turn["image"]
        for episode in episodes
        for turn in episode["turns"][:-1]
    }
    columns = [
        dict(zip(("picture", "question", "answer"), row, strict=True)) | {"image": image}
        for row, image in rows.items()
    ]
    return _encode(
        stage,
        "Reading demonstrations",
        columns,
        DEMONSTRATIONS_PER_BATCH,
        _DemonstrationReader,
        (backbone, described.corpus, described.pairs.folder),
    )


def _encode(
    stage: Stage,
    title: str,
    rows: list[dict[str, Any]],
    batch: int,
    encoder: Callable[..., Any],
    arguments: tuple[Any, ...],
) -> Stage:
    def build(folder: Path) -> dict[str, Any]:
        cpus = int(ray.cluster_resources().get("CPU", 1))
        gpus = int(ray.cluster_resources().get("GPU", 0))
        actors = max(1, min(gpus or cpus, -(-len(rows) // batch)))
        with counting(title, len(rows)) as counter:
            table = pa.Table.from_pylist(rows)
            ray.data.from_arrow(table).repartition(-(-len(rows) // batch)).map_batches(
                encoder,
                batch_size=batch,
                batch_format="pyarrow",
                fn_constructor_args=(*arguments, counter),
                compute=ray.data.ActorPoolStrategy(size=actors),
                num_cpus=CPUS_OF_AN_ENCODER,
                num_gpus=1 if gpus else 0,
            ).write_parquet(str(folder))
        return {"rows": len(rows)}

    stage.run(build)
    return stage


def _rows(images: Images) -> list[dict[str, Any]]:
    return [{"picture": picture, "image": images[picture]} for picture in sorted(images)]


def _decode(batch: pa.Table, reader: PictureReader) -> list[Image.Image]:
    return [decode(reader.read(image)) for image in batch.column("image").to_pylist()]


class _PictureEncoder:
    def __init__(self, backbone: Path, corpus: Corpus, pairs: Path, variants: int, counter: Any) -> None:
        torch.set_num_threads(1)
        self._backbone = load_for_inference(backbone)
        self._reader, self._variants, self._counter = corpus.pictures(pairs), variants, counter

    def __call__(self, batch: pa.Table) -> pa.Table:
        keys = batch.column("picture").to_pylist()
        pixels = self._backbone.pixels(_decode(batch, self._reader))
        tables = []
        for variant in range(self._variants):
            names = [variant_key(key, variant) for key in keys]
            seen = augment_versions(pixels, names) if variant else pixels
            vision_NVW = self._backbone.encode_pixels(seen).float().cpu().numpy()
            tables.append(store_columns(names, list(vision_NVW)))
        ray.get(self._counter.add.remote(len(keys)))
        return pa.concat_tables(tables)


class _Teacher:
    def __init__(self, teacher: Path, corpus: Corpus, pairs: Path, side: int, counter: Any) -> None:
        torch.set_num_threads(1)
        self._teacher = ImageTeacher(teacher, side)
        self._reader, self._counter = corpus.pictures(pairs), counter

    def __call__(self, batch: pa.Table) -> pa.Table:
        keys = batch.column("picture").to_pylist()
        features = self._teacher(_decode(batch, self._reader))
        ray.get(self._counter.add.remote(len(keys)))
        return store_columns(keys, list(features))


class _DemonstrationReader:
    def __init__(self, backbone: Path, corpus: Corpus, pairs: Path, counter: Any) -> None:
        torch.set_num_threads(1)
        self._backbone = load_for_inference(backbone)
        self._chat = ChatFormat(self._backbone.processor)
        self._reader, self._counter = corpus.pictures(pairs), counter

    def __call__(self, batch: pa.Table) -> pa.Table:
        turns = [Turn(row["picture"], row["question"], row["answer"]) for row in batch.to_pylist()]
        pixels = self._backbone.pixels(_decode(batch, self._reader))
        vision_NVW = self._backbone.encode_pixels(pixels)
        states: list[np.ndarray] = [
            state.float().cpu().numpy()
            for state in read_demonstrations(self._backbone, self._chat, turns, vision_NVW)
        ]
        ray.get(self._counter.add.remote(len(turns)))
        return store_columns([demonstration_key(turn) for turn in turns], states)
