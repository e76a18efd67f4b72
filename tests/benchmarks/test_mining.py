"""Neighbours and episodes of a million pairs in ten thousand concepts: how long, and where the time goes.

    make bench

Records seconds of each stage, episodes a second and the peak of memory. The pairs have no pictures: their
embeddings are drawn from a fixed seed around the direction of their concept. Everything behind the looks is
the real thing, with the similarity of link-context learning in full.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mmicl_core.config.corpus import ConceptConfig, CorpusConfig, DualEncoderConfig, NeighbourConfig
from mmicl_core.config.episodes import EpisodeConfig
from mmicl_core.data.schema import LOOKED, PAIR
from mmicl_core.data.splits import Split
from mmicl_core.data.storage import Location
from pipelines.catalogue import assign
from pipelines.environment import cluster
from pipelines.episodes import Source, build_episodes
from pipelines.pairs import Corpus
from pipelines.parts import Counts, run_parts
from pipelines.stages import Stage, read_manifest
from tests.benchmarks.records import Figures
from tests.benchmarks.test_memory import Peak
from tests.unit.test_embedders import save_clip

PAIRS, CONCEPTS, WIDTH, EPISODES = 1_000_000, 10_000, 512, 100_000
PAIRS_OF_A_FILE = 4096
SPREAD = 0.8
MOST_SECONDS, MOST_MEBIBYTES = 1800, 6 * 1024


def write_pairs(part: Mapping[str, Any], folder: Path) -> tuple[dict[str, int], Counts]:
    numbers, concepts, _ = draw(part)
    rows = [
        {
            "picture": f"shard-{part['name']}/{number:09d}",
            "image": {"path": "corpus:none.tar", "member": f"{number}.jpg", "offset": 0, "size": 47_000},
            "text": f"a thing of kind {concept}",
            "concept": f"concept-{concept}",
        }
        for number, concept in zip(numbers, concepts, strict=True)
    ]
    file = f"pairs-{part['name']}.parquet"
    pq.write_table(pa.Table.from_pylist(rows, schema=PAIR), folder / file)
    return {file: len(rows)}, {"read": len(rows), "kept": len(rows), "skipped": {}}


def write_looks(part: Mapping[str, Any], folder: Path) -> tuple[dict[str, int], Counts]:
    numbers, _, vectors = draw(part)
    rng = np.random.default_rng([1, part["start"]])
    digests = rng.bytes(32 * len(numbers))
    looked = pa.table(
        {
            "picture": [f"shard-{part['name']}/{number:09d}" for number in numbers],
            "sha256": [digests[start : start + 32] for start in range(0, len(digests), 32)],
            "perceptual_hash": rng.integers(0, 2**64, len(numbers), dtype=np.uint64),
            "width": pa.nulls(len(numbers), pa.int32()),
            "height": pa.nulls(len(numbers), pa.int32()),
            "format": pa.nulls(len(numbers), pa.string()),
            "remark": [""] * len(numbers),
            "skipped": pa.nulls(len(numbers), pa.string()),
            "detail": pa.nulls(len(numbers), pa.string()),
        },
        schema=LOOKED,
    )
    with pa.ipc.new_file(str(folder / f"looked-{part['name']}.arrow"), LOOKED) as writer:
        writer.write_table(looked)
    np.save(folder / f"embedded-{part['name']}.npy", vectors.astype(np.float16))
    files = {f"looked-{part['name']}.arrow": len(numbers), f"embedded-{part['name']}.npy": len(numbers)}
    return files, {"read": len(numbers), "kept": len(numbers), "skipped": {}}


def draw(part: Mapping[str, Any]) -> tuple[range, Any, Any]:
    """Numbers, concepts and embeddings of the pairs of a file."""
    numbers = range(part["start"], part["start"] + part["size"])
    rng = np.random.default_rng([0, part["start"]])
    concepts = rng.integers(0, CONCEPTS, len(numbers))
    centres = np.random.default_rng(2).standard_normal((CONCEPTS, WIDTH), dtype=np.float32)
    vectors = centres[concepts] + SPREAD * rng.standard_normal((len(numbers), WIDTH), dtype=np.float32)
    return numbers, concepts, vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


@pytest.mark.bench
def test_a_million_pairs_become_episodes_within_minutes(tmp_path: Path, figures: Figures) -> None:
    seconds: dict[str, float] = {}

    def timed(name: str, make: Any) -> Any:
        start = time.perf_counter()
        result = make()
        seconds[name] = round(time.perf_counter() - start, 1)
        return result

    parts = [
        {"name": f"{start:08d}", "start": start, "size": min(PAIRS_OF_A_FILE, PAIRS - start)}
        for start in range(0, PAIRS, PAIRS_OF_A_FILE)
    ]
    encoder = DualEncoderConfig(path=str(save_clip(tmp_path / "encoder", WIDTH)))
    episodes = EpisodeConfig(preset="2-way-weight", count=EPISODES)
    with cluster():
        pairs, looked = (Stage(tmp_path, name, bench=1) for name in ("pairs", "looked"))
        for stage, write in ((pairs, write_pairs), (looked, write_looks)):
            run_parts(stage, parts, write, title="Drawing embeddings", total=PAIRS)
        corpus = Corpus(CorpusConfig(), Location(str(tmp_path)), None, Split(held_out_share=0.1))
        peak = Peak(psutil.Process())
        peak.start()
        described = timed("concepts", lambda: assign(corpus, pairs, looked, ConceptConfig(), tmp_path))
        neighbours = NeighbourConfig(by="similarity", preset="paper")
        source = Source(described, ConceptConfig(), neighbours, encoder, Path(), tmp_path)
        timed("catalogue", lambda: source.catalogue("concept"))
        timed("neighbours", source.neighbour_concepts)
        stage = timed("episodes", lambda: build_episodes(source, episodes, tmp_path))
        mebibytes = peak.end()
    manifest = read_manifest(stage.folder)
    assert manifest["built"] > 0.99 * EPISODES
    total = sum(seconds.values())
    for name, took in seconds.items():
        figures.absolute(name, took, "s")
        figures.ratio(f"{name}, of all the time", took / total, "share")
    figures.absolute("all of them", total, "s")
    figures.absolute("episodes drawn", EPISODES / seconds["episodes"], "episodes a second")
    figures.absolute("peak of memory", mebibytes, "MiB")
    assert total < MOST_SECONDS
    assert mebibytes < MOST_MEBIBYTES
