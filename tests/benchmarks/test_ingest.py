"""How fast pictures come out of tar shards as arrays, held against a bare loop and against webdataset.

    make bench

Prints one JSON object: pictures a second of each way, their ratios in one run, and the machine. Every way
reads the same shards and ends with 224 x 224 arrays; ours also checks, hashes and writes down every picture.

    bare            one process: tarfile, Pillow, resize
    bare_reduced    the same, and JPEGs are decoded at a reduced size, as ours are
    webdataset      `webdataset` in a torch DataLoader of as many processes
"""

from __future__ import annotations

import io
import json
import tarfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
import webdataset
from PIL import Image
from torch.utils.data import DataLoader

from mmicl_core.config.corpus import ConceptConfig, CorpusConfig
from pipelines.pairs import Corpus, look_at_part, open_corpus, read_pairs
from pipelines.parts import Counts, Pool, run_parts
from pipelines.stages import Stage, read_manifest
from tests.benchmarks.corpora import machine, write_photographs

SIDE = 224
SHARDS, PICTURES = 16, 500
BATCH = 64
LEAST_OF_BARE, LEAST_OF_WEBDATASET, LEAST_FOR_TWO = 0.85, 1.0, 1.7


class Arrays:
    """An embedder that makes the array that a model would take, and keeps its mean."""

    width, side, embeds_pictures = 1, SIDE, True

    def pictures(self, pictures: Sequence[Image.Image]) -> np.ndarray:
        return np.stack([to_array(picture) for picture in pictures]).mean((1, 2, 3))[:, None] / 255


class ArrayLook:
    """Looks at parts and makes arrays."""

    def __init__(self, corpus: Corpus, pairs: Path) -> None:
        self._look = partial(look_at_part, corpus=corpus, pairs=pairs, embedder=Arrays())

    def __call__(self, part: Mapping[str, Any], folder: Path) -> tuple[dict[str, int], Counts]:
        return self._look(part, folder)


def to_array(picture: Image.Image) -> np.ndarray:
    return np.asarray(picture.resize((SIDE, SIDE), Image.Resampling.BICUBIC))


def decode_plainly(data: bytes) -> np.ndarray:
    with Image.open(io.BytesIO(data)) as picture:
        return to_array(picture.convert("RGB"))


def decode_reduced(data: bytes) -> np.ndarray:
    with Image.open(io.BytesIO(data)) as picture:
        picture.draft("RGB", (SIDE, SIDE))
        return to_array(picture.convert("RGB"))


def bare(shards: Sequence[Path], decode: Callable[[bytes], np.ndarray]) -> int:
    count = 0
    for shard in shards:
        with tarfile.open(shard) as archive:
            for member in archive:
                if member.name.endswith(".jpg"):
                    content = archive.extractfile(member)
                    assert content is not None
                    decode(content.read())
                    count += 1
    return count


def with_webdataset(shards: Sequence[Path], workers: int) -> int:
    samples = webdataset.WebDataset([str(shard) for shard in shards], shardshuffle=False)
    arrays = samples.to_tuple("jpg").map_tuple(decode_plainly).batched(BATCH)
    loader = DataLoader(arrays, batch_size=None, num_workers=workers)
    return sum(len(batch) for (batch,) in loader)


def with_ours(corpus: Corpus, root: Path) -> int:
    pairs = read_pairs(corpus, root)
    parts = [
        {"name": name[len("pairs-") : -len(".parquet")], "file": name, "size": about["rows"]}
        for name, about in read_manifest(pairs.folder)["files"].items()
    ]
    stage = Stage(root, "arrays", pairs=pairs.fingerprint)
    total = sum(part["size"] for part in parts)
    return run_parts(
        stage, parts, Pool(ArrayLook, (corpus, pairs.folder)), title="Making arrays", total=total
    )["kept"]


def rate(make: Callable[[], int]) -> float:
    start = time.perf_counter()
    count = make()
    assert count == SHARDS * PICTURES
    return count / (time.perf_counter() - start)


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return write_photographs(tmp_path_factory.mktemp("bench") / "photographs", SHARDS, PICTURES)


def on_a_cluster(cpus: int) -> Iterator[None]:
    ray.init(address="local", num_cpus=cpus, include_dashboard=False, log_to_driver=False)
    try:
        yield
    finally:
        ray.shutdown()


@pytest.mark.bench
def test_pictures_become_arrays_at_the_speed_of_decoding(shards: list[Path], tmp_path: Path) -> None:
    corpus = open_corpus(CorpusConfig(path=str(shards[0].parent)), ConceptConfig())
    rates = {
        "bare": rate(lambda: bare(shards, decode_plainly)),
        "bare_reduced": rate(lambda: bare(shards, decode_reduced)),
    }
    for workers in (1, 2):
        rates[f"webdataset_{workers}"] = rate(lambda: with_webdataset(shards, workers))  # noqa: B023
        for _ in on_a_cluster(workers):
            # Processes that are there already: a corpus is read for hours, and they start in seconds.
            ray.get([ray.remote(abs).remote(number) for number in range(workers)])
            root = tmp_path / f"on-{workers}"
            rates[f"ours_{workers}"] = rate(lambda: with_ours(corpus, root))  # noqa: B023
    ratios = {
        "ours_1 / bare": rates["ours_1"] / rates["bare"],
        "ours_1 / bare_reduced": rates["ours_1"] / rates["bare_reduced"],
        "ours_1 / webdataset_1": rates["ours_1"] / rates["webdataset_1"],
        "ours_2 / webdataset_2": rates["ours_2"] / rates["webdataset_2"],
        "ours_2 / ours_1": rates["ours_2"] / rates["ours_1"],
    }
    size = sum(shard.stat().st_size for shard in shards) / (SHARDS * PICTURES)
    result = {
        "pictures": SHARDS * PICTURES,
        "bytes_a_picture": round(size),
        "pictures_a_second": {name: round(value) for name, value in rates.items()},
        "ratios": {name: round(value, 2) for name, value in ratios.items()},
        "machine": machine(),
    }
    print(json.dumps(result))
    assert ratios["ours_1 / bare"] >= LEAST_OF_BARE
    assert ratios["ours_1 / webdataset_1"] >= LEAST_OF_WEBDATASET
    assert ratios["ours_2 / webdataset_2"] >= LEAST_OF_WEBDATASET
    assert ratios["ours_2 / ours_1"] >= LEAST_FOR_TWO
