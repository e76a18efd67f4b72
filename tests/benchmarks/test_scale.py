"""What a larger corpus costs beside time: bytes of each stage, and seconds to find what is done already.

    make bench

Pairs are those of `test_mining`, with short texts and embeddings of 512 numbers.
A stage that is started again asks for the note of every part, and at its end reads all of them.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from mmicl_core.config.corpus import ConceptConfig, CorpusConfig, DualEncoderConfig, NeighbourConfig
from mmicl_core.config.episodes import EpisodeConfig
from mmicl_core.data.catalogue import CATALOGUED
from mmicl_core.data.exchange import write_exchange
from mmicl_core.data.splits import Split
from mmicl_core.data.storage import Location
from pipelines.catalogue import assign
from pipelines.environment import cluster
from pipelines.episodes import Source, build_episodes
from pipelines.pairs import Corpus
from pipelines.parts import NOTES, finish_parts, make_parts, run_parts
from pipelines.stages import Stage, read_manifest
from tests.benchmarks.records import Figures
from tests.benchmarks.test_mining import PAIRS_OF_A_FILE, WIDTH, write_looks, write_pairs
from tests.unit.test_embedders import save_clip

PAIRS, EPISODES = 200_000, 4096
PARTS = (1_000, 10_000, 100_000)
# Rows of a file, and buckets of 10^9 rows.
EXCHANGED = ((4_096, 15_259), (100_000, 15_259))
SHA256 = "0" * 64
COUNTED = 0.95


def weight(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


@pytest.mark.bench
def test_stages_keep_a_few_hundred_bytes_of_a_pair_beside_its_embedding(
    tmp_path: Path, figures: Figures
) -> None:
    parts = [
        {"name": f"{start:08d}", "start": start, "size": min(PAIRS_OF_A_FILE, PAIRS - start)}
        for start in range(0, PAIRS, PAIRS_OF_A_FILE)
    ]
    encoder = DualEncoderConfig(path=str(save_clip(tmp_path / "encoder", WIDTH)))
    with cluster():
        pairs, looked = (Stage(tmp_path, name, bench=1) for name in ("pairs", "looked"))
        for stage, write in ((pairs, write_pairs), (looked, write_looks)):
            run_parts(stage, parts, write, title="Drawing embeddings", total=PAIRS)
        corpus = Corpus(CorpusConfig(), Location(str(tmp_path)), None, Split(held_out_share=0.1))
        described = assign(corpus, pairs, looked, ConceptConfig(), tmp_path)
        source = Source(
            described, ConceptConfig(), NeighbourConfig(by="similarity"), encoder, Path(), tmp_path
        )
        catalogue, neighbours = source.catalogue("concept"), source.neighbour_concepts()
        config = EpisodeConfig(preset="2-way-weight", count=EPISODES)
        episodes = build_episodes(source, config, tmp_path)
    stages = {"pairs": pairs, "looked": looked, "concepts": described.concepts, "catalogue": catalogue}
    of_a_pair = {name: round(weight(stage.folder) / PAIRS, 1) for name, stage in stages.items()}
    concepts = read_manifest(catalogue.folder)["groups"]
    for name, size in of_a_pair.items():
        figures.absolute(f"a pair in {name}", size, "bytes")
    figures.absolute("a concept's neighbours", weight(neighbours.folder) / concepts, "bytes")
    built = read_manifest(episodes.folder)["built"]
    figures.absolute("an episode", weight(episodes.folder) / built, "bytes")
    assert sum(of_a_pair.values()) < 2 * WIDTH + 1000


@pytest.mark.bench
def test_finding_what_is_done_takes_seconds_for_a_hundred_thousand_parts(
    tmp_path: Path, figures: Figures
) -> None:
    seconds: dict[int, Any] = {}
    for count in PARTS:
        stage = Stage(tmp_path, "pairs", parts=count)
        parts = [{"name": f"{number:06d}", "size": 1} for number in range(count)]
        notes = tmp_path / f"{stage.folder.name}.partial" / NOTES
        notes.mkdir(parents=True)
        for part in parts:
            files = {f"pairs-{part['name']}.parquet": {"rows": 10_000, "sha256": SHA256}}
            told = {"files": files, "counts": {"read": 10_000, "kept": 9_900, "skipped": {"no picture": 100}}}
            (notes / f"{part['name']}.json").write_text(json.dumps(told), encoding="utf-8")
        start = time.perf_counter()
        make_parts(stage, parts, _never, title="Reading", total=count)
        asked = time.perf_counter() - start
        finish_parts(stage, parts)
        seconds[count] = {"asking": round(asked, 2), "ending": round(time.perf_counter() - start - asked, 2)}
    for count, of_both in seconds.items():
        for name, took in of_both.items():
            figures.absolute(f"{name}, {count:,} parts", took, "s")
    assert sum(seconds[PARTS[-1]].values()) < 120


def _never(part: Any, folder: Path) -> Any:
    raise AssertionError(f"{part} was made again")


@pytest.mark.bench
@pytest.mark.gate
def test_rows_of_a_billion_on_their_way_to_buckets(tmp_path: Path, figures: Figures) -> None:
    found = []
    for count, buckets in EXCHANGED:
        rows = pa.Table.from_pylist(
            [
                {
                    "group": f"concept-{number}",
                    "picture": f"shard/{number:09d}",
                    "image": {
                        "path": "corpus:00000.tar",
                        "member": f"{number}.jpg",
                        "offset": 0,
                        "size": 47_000,
                    },
                    "text": f"a thing of kind {number}",
                    "sha256": bytes(32),
                    "perceptual_hash": number,
                    "kept_back": False,
                    "held_out": False,
                    "embedding_file": 0,
                    "embedding_row": number,
                }
                for number in range(count)
            ],
            schema=CATALOGUED,
        )
        start = time.perf_counter()
        write_exchange(tmp_path / "exchange.arrow", rows, buckets, "group")
        seconds = round(time.perf_counter() - start, 1)
        size = (tmp_path / "exchange.arrow").stat().st_size
        found.append(
            {"rows": count, "buckets": buckets, "megabytes": round(size / 1e6, 1), "seconds": seconds}
        )
    for one in found:
        figures.absolute(f"a file of {one['rows']:,} rows", one["megabytes"], "MB")
        figures.absolute(f"writing a file of {one['rows']:,} rows", one["seconds"], "s")
    of_a_row = [one["megabytes"] / one["rows"] for one in found]
    figures.ratio("bytes of a row, small file over large one", of_a_row[0] / of_a_row[1], gate=COUNTED)
    # Larger files carry more rows for the same batches.
    assert found[1]["megabytes"] / EXCHANGED[1][0] < found[0]["megabytes"] / EXCHANGED[0][0] / 4
