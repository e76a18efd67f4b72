"""Any corpus -> pairs -> looks -> concepts -> catalogues -> episodes, on real Ray clusters."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from mmicl_core.config.run import RunConfig, load_run
from mmicl_core.data import reasons
from mmicl_core.data.files import file_digest
from mmicl_core.data.images import decode
from mmicl_core.errors import DataError
from pipelines.episodes import (
    build_episodes,
    corpus_counts,
    describe,
    read_episodes,
    redraw,
    stream_episodes,
)
from pipelines.stages import Stage, read_manifest
from tests.fakes import draw_picture, encode_picture, write_corpus, write_tar

ROOT = Path(__file__).parents[2]
EPISODES = 600

ON_A_CLUSTER = """
import json, sys
from pathlib import Path
import ray
from mmicl_core.config.run import RunConfig
from pipelines.episodes import build_episodes, describe
run, root = RunConfig.model_validate_json(sys.argv[1]), Path(sys.argv[2])
ray.init(address="local", num_cpus=int(sys.argv[3]), include_dashboard=False, log_to_driver=False)
print(build_episodes(describe(run, root), run.episodes, root).folder)
ray.shutdown()
"""


def _run(folder: Path, count: int = EPISODES, **sections: Any) -> RunConfig:
    stage = {"episodes": count, "min_shots_of_both_classes": 2, "max_shots_of_both_classes": 6}
    drawn = {
        "stages": [stage],
        "tasks": [{"type": "two_way"}, {"type": "caption", "weight": 0.2}],
        "episodes_per_file": 128,
        **sections.pop("episodes", {}),
    }
    read = {"path": str(folder), "rows_per_file": 7, **sections.pop("corpus", {})}
    return load_run(None, {"corpus": read, "episodes": drawn, **sections})


def _on_a_cluster_of(cpus: int, run: RunConfig, root: Path) -> Path:
    command = [sys.executable, "-c", ON_A_CLUSTER, run.model_dump_json(), str(root), str(cpus)]
    done = subprocess.run(command, check=True, capture_output=True, text=True, cwd=ROOT)
    return Path(done.stdout.splitlines()[-1])


def digests(root: Path) -> dict[str, str]:
    """SHA-256 of every file of every stage, by its path below the folder of the run."""
    files = (path for path in sorted(root.rglob("*")) if path.is_file())
    return {str(path.relative_to(root)): file_digest(path) for path in files}


def _stages(run: RunConfig, root: Path) -> tuple[Stage, Stage, Stage, Stage]:
    source = describe(run, root)
    described = source.described
    return (
        described.pairs,
        described.looked,
        source.catalogue("concept"),
        build_episodes(source, run.episodes, root),
    )


def test_every_file_is_the_same_whether_one_worker_or_two_make_it(tmp_path: Path) -> None:
    run = _run(write_corpus(tmp_path / "corpus", shards=5))
    folders = [_on_a_cluster_of(cpus, run, tmp_path / f"on-{cpus}") for cpus in (1, 2)]
    one, two = (digests(folder.parent) for folder in folders)
    assert one == two
    manifest = read_manifest(folders[0])
    assert len([name for name in manifest["files"] if name.startswith("episodes-")]) == 5
    for name, about in manifest["files"].items():
        assert about["sha256"] == one[f"{folders[0].name}/{name}"]
    # Three training styles: three demonstrations of a class and a query are too many for every concept.
    reason = "two_way: fewer than two concepts have 4 pictures"
    assert manifest["skipped_by_reason"].keys() == {reason}
    assert manifest["read"] == EPISODES == manifest["built"] + sum(manifest["skipped_by_reason"].values())


@pytest.mark.usefixtures("ray_cluster")
def test_episodes_are_the_same_in_files_and_blocks_of_any_size_streamed_or_drawn_alone(
    tmp_path: Path,
) -> None:
    corpus = write_corpus(tmp_path / "corpus")
    whole = _run(corpus)
    written = read_episodes(_stages(whole, tmp_path)[3].folder)
    for size in (64, 1000):
        run = _run(corpus, episodes={"episodes_per_file": size})
        source = describe(run, tmp_path)
        assert read_episodes(build_episodes(source, run.episodes, tmp_path).folder) == written
        streamed = stream_episodes(source, run.episodes).take_all()
        assert sorted(streamed, key=lambda row: row["episode"]) == written
    for row in written[::97]:
        assert redraw(source, run.episodes, row["episode"]) == row
        assert row["id"] == f"0-{row['episode']}"


def _bad_corpus(folder: Path) -> Path:
    corpus = write_corpus(folder)
    good, page = encode_picture(draw_picture(99)), b"<html>gone</html>"
    placeholder = encode_picture(draw_picture(98))
    about = json.dumps({"concept": "red-cat", "style": "ink"}).encode()
    write_tar(
        corpus / "bad.tar",
        [
            ("a.json", about),
            ("b.png", good),
            ("c.json", b"{"),
            ("c.png", good),
            ("d.json", about),
            ("d.png", page),
            ("e.json", about),
            ("e.jpg", b""),
            ("f.json", about),
            ("f.jpg", encode_picture(draw_picture(97, side=200), "JPEG")[:500]),
            ("g.json", about),
            ("g.jpg", good),
            *[member for n in range(4) for member in ((f"h{n}.json", about), (f"h{n}.png", placeholder))],
        ],
    )
    (corpus / "torn.tar").write_bytes((corpus / "tiny-0.tar").read_bytes()[:700])
    return corpus


@pytest.mark.usefixtures("ray_cluster")
def test_every_sample_is_kept_or_counted_with_its_reason_and_written_aside(tmp_path: Path) -> None:
    run = _run(_bad_corpus(tmp_path / "corpus"), corpus={"max_skipped_share": 0.5, "max_repeats": 3})
    source = describe(run, tmp_path / "run")
    pairs, looked = source.described.pairs, source.described.looked
    concepts = source.catalogue("concept")
    read, seen, kept = (read_manifest(stage.folder) for stage in (pairs, looked, concepts))
    assert read["skipped"] == {
        reasons.NO_PICTURE: 1,
        reasons.NO_TEXT: 1,
        reasons.BROKEN_METADATA: 1,
        reasons.BROKEN_FILE: 1,
    }
    assert seen["skipped"] == {reasons.WEB_PAGE: 1, reasons.EMPTY_PICTURE: 1, reasons.TRUNCATED_PICTURE: 1}
    assert seen["remarks"] == {"wrong extension": 1}
    assert kept["skipped"] == {reasons.PLACEHOLDER: 4}
    for manifest in (read, seen, kept):
        assert manifest["read"] == manifest["kept"] + sum(manifest["skipped"].values())
    assert (read["kept"], seen["kept"], kept["kept"]) == (seen["read"], kept["read"], 33)
    aside = [
        row for file in pairs.folder.glob("skipped-*.parquet") for row in pq.read_table(file).to_pylist()
    ]
    assert len(aside) == 4 and all(row["picture"] and row["skipped"] for row in aside)
    counts = corpus_counts(concepts)
    assert counts == {"images": 33, "concepts": 8, "held_out_concepts": 4}
    reader = source.described.corpus.pictures(pairs.folder)
    for episode in read_episodes(build_episodes(source, run.episodes, tmp_path / "run").folder)[:20]:
        for turn in episode["turns"]:
            assert decode(reader.read(turn["image"])).size == (72, 72)


@pytest.mark.usefixtures("ray_cluster")
def test_a_corpus_with_more_faults_than_allowed_stops_and_tells_them_all(tmp_path: Path) -> None:
    run = _run(_bad_corpus(tmp_path / "corpus"), corpus={"max_skipped_share": 0.05})
    with pytest.raises(DataError, match=r"4 of 44 samples .*1 broken file.*max_skipped_share \(0.05\)"):
        describe(run, tmp_path / "run")
    assert not [path for path in (tmp_path / "run").iterdir() if not path.name.endswith(".partial")]
    # Reading and looking have one share between them: each leaves out less than a tenth, both more.
    run = _run(tmp_path / "corpus", corpus={"max_skipped_share": 0.1})
    with pytest.raises(
        DataError, match=r"7 of 44 samples .*1 web page instead of a picture.*max_skipped_share \(0.1\)"
    ):
        describe(run, tmp_path / "run")


@pytest.mark.usefixtures("ray_cluster")
def test_rerun_of_the_stages_makes_only_what_is_missing(tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path / "corpus")
    root = tmp_path / "run"

    def make(**sections: Any) -> dict[str, int]:
        _stages(_run(corpus, 20, **sections), root)
        return {path.name: path.stat().st_mtime_ns for path in root.iterdir()}

    first = make()
    assert make() == first and len(first) == 6
    second = make(episodes={"seed": 1})
    assert len(second) == 7 and first.items() < second.items()
    third = make(neighbours={"count": 2})
    assert len(third) == 9 and second.items() < third.items()
    # Another time of a file is another corpus; told by content, another byte is, and another time is not.
    shard = corpus / "tiny-0.tar"
    os.utime(shard, ns=(0, 0))
    fourth = make()
    assert len(fourth) == 15 and third.items() < fourth.items()
    fifth = make(corpus={"identity": "content"})
    content = bytearray(shard.read_bytes())
    os.utime(shard, ns=(5, 5))
    assert make(corpus={"identity": "content"}) == fifth
    content[content.index(b"IDAT") + 20] ^= 1
    shard.write_bytes(content)
    os.utime(shard, ns=(5, 5))
    assert len(make(corpus={"identity": "content", "max_skipped_share": 0.5})) == len(fifth) + 6


@pytest.mark.usefixtures("ray_cluster")
def test_a_part_that_was_lost_is_made_again_and_nothing_else(tmp_path: Path) -> None:
    run = _run(write_corpus(tmp_path / "corpus"))
    *_, episodes = _stages(run, tmp_path / "run")
    before = digests(episodes.folder)
    # As a driver leaves it that is killed before the last part.
    partial = episodes.folder.with_name(f"{episodes.folder.name}.partial")
    episodes.folder.rename(partial)
    manifest = json.loads((partial / "_manifest.json").read_text(encoding="utf-8"))
    (partial / ".notes").mkdir()
    for number in range(4):
        name = f"episodes-{number:05d}.parquet"
        files = {
            key: about for key, about in manifest["files"].items() if key.split("-")[1] == name.split("-")[1]
        }
        rows = manifest["files"][name]["rows"]
        turns = sum(map(len, pq.read_table(partial / name).column("turns").to_pylist()))
        tally = _reasons(partial, number)
        counts = {"read": 128, "built": rows, "turns": turns, "skipped_by_reason": tally}
        note = json.dumps({"files": files, "counts": counts})
        (partial / ".notes" / f"{number:05d}.json").write_text(note, encoding="utf-8")
    times = {path.name: path.stat().st_mtime_ns for path in partial.glob("*-0000[0-3].parquet")}
    for path in (*partial.glob("*-00004.parquet"), *partial.glob("_*.json")):
        path.unlink()
    build_episodes(describe(run, tmp_path / "run"), run.episodes, tmp_path / "run")
    assert digests(episodes.folder) == before
    assert {name: (episodes.folder / name).stat().st_mtime_ns for name in times} == times


def _reasons(folder: Path, number: int) -> dict[str, int]:
    file = folder / f"skipped-{number:05d}.parquet"
    tally: dict[str, int] = {}
    for row in pq.read_table(file).to_pylist() if file.exists() else []:
        tally[row["skipped"]] = tally.get(row["skipped"], 0) + 1
    return tally


@pytest.mark.usefixtures("ray_cluster")
def test_split_that_names_a_concept_which_is_not_there_is_refused_by_name(tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path / "corpus")
    (corpus / "split.json").write_text(json.dumps({"held_out_concepts": ["red-dog"]}), encoding="utf-8")
    with pytest.raises(DataError, match="concept 'red-dog'"):
        describe(_run(corpus), tmp_path / "run")


@pytest.mark.usefixtures("ray_cluster")
def test_run_without_a_single_episode_stops_with_the_reasons(tmp_path: Path) -> None:
    stage = {"episodes": 4, "min_shots_of_both_classes": 16, "max_shots_of_both_classes": 16}
    run = _run(
        write_corpus(tmp_path / "corpus"), episodes={"stages": [stage], "tasks": [{"type": "two_way"}]}
    )
    with pytest.raises(DataError, match=r"no episode could be drawn .*4 x two_way: .* have 9 pictures"):
        build_episodes(describe(run, tmp_path / "run"), run.episodes, tmp_path / "run")
