"""Corpus -> pairs -> episodes on real Ray clusters."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from mmicl_core.config.data import EpisodeConfig, ShotStage
from mmicl_core.data.episodes import build_pool, draw_episode
from mmicl_core.data.pictures import PictureStore, read_metadata
from mmicl_core.data.splits import Split
from mmicl_core.errors import DataError
from pipelines.episodes import build_episodes, corpus_counts, read_episodes, read_pairs
from pipelines.stages import read_manifest
from tests.fakes import write_corpus, write_tar

# Ray Data cuts 600 episodes into several tasks, which several workers take.
CONFIG = EpisodeConfig(stages=(ShotStage(episodes=600, min_shots=1, max_shots=3),), caption_share=0.2)

ON_A_CLUSTER = """
import sys
from pathlib import Path
import ray
from mmicl_core.config.data import EpisodeConfig
from mmicl_core.data.splits import Split
from pipelines.episodes import build_episodes, read_pairs
corpus, root = Path(sys.argv[1]), Path(sys.argv[2])
ray.init(address="local", num_cpus=int(sys.argv[3]), include_dashboard=False, log_to_driver=False)
config = EpisodeConfig.model_validate_json(sys.argv[4])
print(build_episodes(read_pairs(corpus, root), Split.load(corpus), config, root).folder)
ray.shutdown()
"""


def _on_a_cluster_of(cpus: int, corpus: Path, root: Path) -> Path:
    command = [
        sys.executable,
        "-c",
        ON_A_CLUSTER,
        str(corpus),
        str(root),
        str(cpus),
        CONFIG.model_dump_json(),
    ]
    done = subprocess.run(command, check=True, capture_output=True, text=True, cwd=Path(__file__).parents[2])
    return Path(done.stdout.splitlines()[-1])


def test_episodes_are_identical_for_one_and_four_workers_and_a_plain_loop(tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path / "corpus")
    folders = [_on_a_cluster_of(cpus, corpus, tmp_path / f"on-{cpus}") for cpus in (1, 4)]
    one, four = (read_episodes(folder) for folder in folders)
    assert folders[0].name == folders[1].name
    assert read_manifest(folders[0]) == read_manifest(folders[1])
    pairs = next(folders[0].parent.glob("pairs-*"))
    pool = build_pool(read_metadata(pairs), Split.load(corpus), CONFIG.part, CONFIG.neighbours)
    drawn = [draw_episode(number, pool, CONFIG) for number in range(CONFIG.total)]
    assert one == four == [episode for episode in drawn if not isinstance(episode, str)]
    reasons = [episode for episode in drawn if isinstance(episode, str)]
    manifest = read_manifest(folders[0])
    # Three training styles: three shots and a query are too many for every concept.
    assert manifest["skipped_by_reason"] == {"fewer than two concepts have 4 pictures": len(reasons)}
    assert 0 < len(reasons) == CONFIG.total - manifest["built"]


@pytest.mark.usefixtures("ray_cluster")
def test_every_sample_of_a_corpus_is_kept_or_counted_with_its_reason(tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path / "corpus")
    bad: list[tuple[str, bytes]] = [("a.json", b"{}"), ("b.png", b"x"), ("c.json", b"{"), ("c.png", b"x")]
    write_tar(corpus / "bad.tar", bad)
    (corpus / "torn.tar").write_bytes((corpus / "tiny-0.tar").read_bytes()[:700])
    stage = read_pairs(corpus, tmp_path / "run")
    manifest = read_manifest(stage.folder)
    assert manifest["skipped_by_reason"] == {
        "no picture": 2,
        "no metadata": 1,
        "broken metadata": 1,
        "broken shard: ReadError": 1,
    }
    assert manifest["kept"] == 32 == len(read_metadata(stage.folder))
    assert manifest["read"] == manifest["kept"] + sum(manifest["skipped_by_reason"].values())
    store = PictureStore(stage.folder)
    assert all(store.picture(row["picture"]).size == (72, 72) for row in read_metadata(stage.folder))
    counts = corpus_counts(stage, Split.load(corpus))
    assert counts == {"images": 32, "concepts": 8, "held_out_concepts": 4}


@pytest.mark.usefixtures("ray_cluster")
def test_rerun_of_the_stages_makes_only_what_is_missing(tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path / "corpus")
    split, root = Split.load(corpus), tmp_path / "run"

    def run(config: EpisodeConfig) -> dict[str, int]:
        build_episodes(read_pairs(corpus, root), split, config, root)
        return {path.name: path.stat().st_mtime_ns for path in root.iterdir()}

    config = EpisodeConfig(stages=(ShotStage(episodes=20, min_shots=1, max_shots=2),))
    first = run(config)
    assert run(config) == first and len(first) == 2
    second = run(config.model_copy(update={"seed": 1}))
    assert len(second) == 3 and first.items() < second.items()

    # The same names, sizes and times with another byte in a picture are another corpus.
    shard = corpus / "tiny-0.tar"
    content, times = bytearray(shard.read_bytes()), shard.stat()
    place = content.index(b"IDAT") + 20
    content[place] ^= 1
    shard.write_bytes(content)
    os.utime(shard, ns=(times.st_atime_ns, times.st_mtime_ns))
    third = run(config)
    assert len(third) == 5 and second.items() < third.items()


@pytest.mark.usefixtures("ray_cluster")
def test_corpus_that_uses_a_key_twice_is_refused_by_its_name(tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path / "corpus")
    (corpus / "again.tar").write_bytes((corpus / "tiny-1.tar").read_bytes())
    with pytest.raises(DataError, match="blue-cat__chalk"):
        read_pairs(corpus, tmp_path / "run")
    assert _folders(tmp_path / "run") == []


@pytest.mark.usefixtures("ray_cluster")
def test_run_without_a_single_episode_stops_with_the_reasons(tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path / "corpus")
    config = EpisodeConfig(stages=(ShotStage(episodes=4, min_shots=8, max_shots=8),))
    pairs = read_pairs(corpus, tmp_path / "run")
    with pytest.raises(DataError, match=r"no episode could be drawn .* have 9 pictures': 4"):
        build_episodes(pairs, Split.load(corpus), config, tmp_path / "run")
    assert _folders(tmp_path / "run") == [pairs.folder.name]


def _folders(root: Path) -> list[Any]:
    return [path.name for path in root.iterdir()]
