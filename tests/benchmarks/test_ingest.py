"""How fast pictures come out of tar shards as arrays, held against a bare loop and against webdataset.

    make bench

Records pictures a second of each way once it runs, the seconds it takes to start, and the ratios in one run.
Every way reads the same shards and ends with 224 x 224 arrays; ours also checks,
hashes and writes down every picture.

    bare            one process: tarfile, Pillow, resize
    bare_reduced    the same, and JPEGs are decoded at a reduced size, as ours are
    bare_reduced_2  two of these, which share nothing: what the second core of the machine is worth
    webdataset      `webdataset` in a torch DataLoader of as many processes
"""

from __future__ import annotations

import io
import tarfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
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
from tests.benchmarks.corpora import write_photographs
from tests.benchmarks.records import Figures

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


def bare_in_two(shards: Sequence[Path], decode: Callable[[bytes], np.ndarray]) -> int:
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        return sum(pool.map(partial(bare, decode=decode), (shards[::2], shards[1::2])))


def with_webdataset(shards: Sequence[Path], workers: int) -> int:
    samples = webdataset.WebDataset([str(shard) for shard in shards], shardshuffle=False)
    arrays = samples.to_tuple("jpg").map_tuple(decode_plainly).batched(BATCH)
    loader = DataLoader(arrays, batch_size=None, num_workers=workers)
    return sum(len(batch) for (batch,) in loader)


def with_ours(shards: Sequence[Path], root: Path) -> int:
    folder = root / f"corpus-{len(shards)}"
    folder.mkdir(parents=True)
    for shard in shards:
        (folder / shard.name).hardlink_to(shard)
    corpus = open_corpus(CorpusConfig(path=str(folder)), ConceptConfig())
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


def measure(make: Callable[[Sequence[Path]], int], shards: Sequence[Path]) -> tuple[float, float]:
    """Pictures a second once it runs, and the seconds before: a corpus is read for hours, processes start in
    seconds, and neither may hide in the other."""
    some = shards[: len(shards) // 4]
    few, all_of_them = _seconds(make, some), _seconds(make, shards)
    rate = (len(shards) - len(some)) * PICTURES / (all_of_them - few)
    return rate, all_of_them - len(shards) * PICTURES / rate


def _seconds(make: Callable[[Sequence[Path]], int], shards: Sequence[Path]) -> float:
    start = time.perf_counter()
    count = make(shards)
    assert count == len(shards) * PICTURES
    return time.perf_counter() - start


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    written = write_photographs(tmp_path_factory.mktemp("bench") / "photographs", SHARDS, PICTURES)
    # Read once, so that the first way measured does not pay for all others.
    assert all(shard.read_bytes() for shard in written)
    return written


def on_a_cluster(cpus: int) -> Iterator[None]:
    ray.init(address="local", num_cpus=cpus, include_dashboard=False, log_to_driver=False)
    try:
        yield
    finally:
        ray.shutdown()


@pytest.mark.bench
def test_pictures_become_arrays_at_the_speed_of_decoding(
    shards: list[Path], tmp_path: Path, figures: Figures
) -> None:
    ways: dict[str, tuple[float, float]] = {
        "bare": measure(partial(bare, decode=decode_plainly), shards),
        "bare_reduced": measure(partial(bare, decode=decode_reduced), shards),
        "bare_reduced_2": measure(partial(bare_in_two, decode=decode_reduced), shards),
    }
    for workers in (1, 2):
        ways[f"webdataset_{workers}"] = measure(partial(with_webdataset, workers=workers), shards)
        for _ in on_a_cluster(workers):
            ways[f"ours_{workers}"] = measure(partial(with_ours, root=tmp_path / f"on-{workers}"), shards)
    rates = {name: rate for name, (rate, _) in ways.items()}
    ratios = {
        "ours_1 / bare": rates["ours_1"] / rates["bare"],
        "ours_1 / bare_reduced": rates["ours_1"] / rates["bare_reduced"],
        "ours_1 / webdataset_1": rates["ours_1"] / rates["webdataset_1"],
        "ours_2 / webdataset_2": rates["ours_2"] / rates["webdataset_2"],
        "ours_2 / ours_1": rates["ours_2"] / rates["ours_1"],
        "bare_reduced_2 / bare_reduced": rates["bare_reduced_2"] / rates["bare_reduced"],
    }
    size = sum(shard.stat().st_size for shard in shards) / (SHARDS * PICTURES)
    figures.absolute("a picture", size, "bytes")
    for name, (rate, seconds) in ways.items():
        figures.absolute(name, rate, "pictures a second")
        figures.absolute(f"{name}, until it runs", seconds, "s")
    for name, ratio in ratios.items():
        figures.ratio(name, ratio)
    assert ratios["ours_1 / bare"] >= LEAST_OF_BARE
    assert ratios["ours_1 / webdataset_1"] >= LEAST_OF_WEBDATASET
    assert ratios["ours_2 / webdataset_2"] >= LEAST_OF_WEBDATASET
    assert ratios["ours_2 / ours_1"] >= LEAST_FOR_TWO
