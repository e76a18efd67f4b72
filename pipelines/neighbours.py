"""Ray Data: the concepts of a catalogue -> their neighbours, from which hard negatives are drawn.

    catalogue --average pictures, embed names--> prototypes (C, E) --compare blocks of rows--> neighbours

Where no embedder is asked for, the taxonomy of the corpus takes the place of the prototypes.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from mmicl_core.config.corpus import EmbedderConfig, NeighbourConfig
from mmicl_core.data.catalogue import Catalogue
from mmicl_core.data.inverted_file import InvertedFile
from mmicl_core.data.neighbours import NEIGHBOURS
from mmicl_core.data.prototypes import mean_pictures, read_prototypes
from mmicl_core.data.similarity import Weights, rank_block
from mmicl_core.data.taxonomy import rank_by_taxonomy
from pipelines.pairs import read_embedding_files
from pipelines.parts import Counts, Pool, finish_parts, make_parts, reuse_finished, run_parts
from pipelines.stages import Stage

__all__ = ["find_neighbours"]

ROWS_OF_A_BLOCK = 512
CONCEPTS_OF_A_PART = 1024


def find_neighbours(
    catalogue: Stage,
    looked: Stage,
    config: NeighbourConfig,
    embedder: EmbedderConfig | None,
    backbone: Path,
    root: Path,
) -> Stage:
    """The neighbours of every concept of a catalogue: NEIGHBOURS rows in Parquet."""
    settings = config.model_dump(mode="json")
    if config.by == "taxonomy":
        settings = {"by": "taxonomy", "count": config.count}
    stage = Stage(root, "neighbours", catalogue=catalogue.fingerprint, settings=settings)
    if reuse_finished(stage):
        return stage
    concepts = len(Catalogue(catalogue.folder))
    if config.by == "taxonomy":
        parts = [{"name": "all", "size": concepts}]
        work = partial(_rank_by_taxonomy, catalogue=catalogue.folder, count=config.count)
        run_parts(stage, parts, work, title="Finding neighbours", total=concepts)
        return stage
    pieces = _pieces("prototypes", concepts, CONCEPTS_OF_A_PART)
    average: Any = partial(_average, catalogue=catalogue.folder, looked=looked.folder, config=config)
    if config.text_text or config.image_text:
        assert embedder is not None
        average = Pool(_Averager, (catalogue.folder, looked.folder, config, embedder, backbone), gpu=True)
    folder = make_parts(stage, pieces, average, title="Averaging concepts", total=concepts)
    index = [{"name": "index", "size": concepts}] if config.search == "approximate" else []
    known: dict[str, Any] = {"catalogue": catalogue.folder, "partial_folder": folder, "config": config}
    make_parts(stage, index, partial(_build_index, **known), title="Sorting concepts", total=concepts)
    blocks = _pieces("neighbours", concepts, ROWS_OF_A_BLOCK)
    make_parts(stage, blocks, partial(_rank_block, **known), title="Finding neighbours", total=concepts)
    finish_parts(stage, [*pieces, *index, *blocks])
    return stage


def _pieces(kind: str, total: int, size: int) -> list[dict[str, Any]]:
    starts = range(0, total, size)
    return [
        {"name": f"{kind}-{number:05d}", "start": start, "size": min(size, total - start)}
        for number, start in enumerate(starts)
    ]


def _average(
    part: Mapping[str, Any],
    folder: Path,
    *,
    catalogue: Path,
    looked: Path,
    config: NeighbourConfig,
    embedder: Any = None,
) -> tuple[dict[str, int], Counts]:
    opened = Catalogue(catalogue)
    groups = range(part["start"], part["start"] + part["size"])
    images = None
    if config.image_image or config.image_text:
        images = mean_pictures(
            opened, groups, read_embedding_files(looked), config.prototype_pictures, config.seed
        )
    texts = None if embedder is None else embedder.texts([opened.names[group] for group in groups])
    files = {}
    for kind, vectors in (("images", images), ("texts", texts)):
        if vectors is not None:
            file = f"{kind}-{part['start']:08d}.npy"
            np.save(folder / file, vectors.astype(np.float32))
            files[file] = len(vectors)
    return files, {}


class _Averager:
    """Averages concepts and embeds their names with one embedder, which is loaded once."""

    def __init__(
        self,
        catalogue: Path,
        looked: Path,
        config: NeighbourConfig,
        embedder: EmbedderConfig,
        backbone: Path,
    ) -> None:
        import torch

        from mmicl_core.embedders import build_embedder

        torch.set_num_threads(1)
        loaded = build_embedder(embedder, backbone)
        self._average = partial(_average, catalogue=catalogue, looked=looked, config=config, embedder=loaded)

    def __call__(self, part: Mapping[str, Any], folder: Path) -> tuple[dict[str, int], Counts]:
        return self._average(part, folder)


def _build_index(
    part: Mapping[str, Any], folder: Path, *, catalogue: Path, partial_folder: Path, config: NeighbourConfig
) -> tuple[dict[str, int], Counts]:
    held_out = Catalogue(catalogue).held_out
    images, texts = read_prototypes(partial_folder)
    InvertedFile.build(images, texts, held_out, Weights.of(config), config.seed).save(folder)
    return {file.name: int(part["size"]) for file in sorted(folder.iterdir())}, {}


def _rank_block(
    part: Mapping[str, Any], folder: Path, *, catalogue: Path, partial_folder: Path, config: NeighbourConfig
) -> tuple[dict[str, int], Counts]:
    opened = Catalogue(catalogue)
    images, texts = read_prototypes(partial_folder)
    rows = range(part["start"], part["start"] + part["size"])
    if config.search == "approximate":
        index, weights = InvertedFile.open(partial_folder), Weights.of(config)
        near = index.search(rows, images, texts, opened.held_out, weights, config.count)
    else:
        near = rank_block(rows, images, texts, opened.held_out, opened.ids, config)
    return _write(folder, part, rows, *near)


def _rank_by_taxonomy(
    part: Mapping[str, Any], folder: Path, *, catalogue: Path, count: int
) -> tuple[dict[str, int], Counts]:
    neighbours, similarity = rank_by_taxonomy(Catalogue(catalogue).groups, count)
    return _write(folder, part, range(len(neighbours)), neighbours, similarity)


def _write(
    folder: Path, part: Mapping[str, Any], groups: range, neighbours: Any, similarity: Any
) -> tuple[dict[str, int], Counts]:
    table = pa.table(
        {"group": list(groups), "neighbours": neighbours, "similarity": similarity}, schema=NEIGHBOURS
    )
    file = f"{part['name'].replace('all', 'neighbours-00000')}.parquet"
    pq.write_table(table, folder / file)
    return {file: table.num_rows}, {"concepts": table.num_rows}
