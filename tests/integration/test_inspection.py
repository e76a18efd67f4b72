"""What `mmicl corpus` and `mmicl episodes` tell of a small corpus with faults, on a real Ray."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from mmicl_core.config.run import RunConfig, load_run
from mmicl_core.errors import DataError
from pipelines.episodes import describe, read_episodes
from pipelines.inspection import (
    corpus_stats,
    lint_corpus,
    preview_corpus,
    preview_episodes,
    show_episode,
)
from pipelines.stages import read_manifest
from tests.fakes import draw_picture, encode_picture, metadata, tiny_backbone, write_corpus, write_tar
from tests.unit.evaluation.markup import parse, told

pytestmark = pytest.mark.usefixtures("ray_cluster")

HOSTILE = "a red cat <script>alert(1)</script>"
EPISODES = 40


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of 36 samples two cannot be read, one cannot be decoded, and one is a PNG that is called a JPEG."""
    folder = write_corpus(tmp_path_factory.mktemp("materials") / "corpus")
    cut = encode_picture(draw_picture(90))[:200]
    caption = metadata("blue-cat", "ink") | {"caption": HOSTILE}
    members = [
        ("a.json", b"{}"),
        ("b.json", b"{"),
        ("b.png", encode_picture(draw_picture(91))),
        ("c.json", json.dumps(metadata("red-cup", "ink")).encode()),
        ("c.png", cut),
        ("d\x1b[2J.json", json.dumps(caption).encode()),
        ("d\x1b[2J.jpg", encode_picture(draw_picture(92))),
    ]
    write_tar(folder / "worse.tar", members)
    return folder


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output folder of all tests, so that the stages are made once."""
    return tmp_path_factory.mktemp("run")


def _run(folder: Path, **sections: Mapping[str, Any]) -> RunConfig:
    stages = [{"episodes": EPISODES, "min_shots_of_both_classes": 2, "max_shots_of_both_classes": 2}]
    given: dict[str, Any] = {
        "corpus": {"path": str(folder)} | dict(sections.pop("corpus", {})),
        "episodes": {"stages": stages, "episodes_per_file": 16},
    }
    return load_run(None, given | sections)


def test_lint_counts_every_sample_and_names_the_faulty_ones(
    corpus: Path, root: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "mmicl"):
        found = lint_corpus(_run(corpus), root)
    assert found["read"] == 36 and found["passed"]
    by_stage = {
        stage: sum(reason["count"] for reason in found["reasons"] if reason["stage"] == stage)
        for stage in found["kept"]
    }
    left = 36
    for stage, kept in found["kept"].items():
        left -= by_stage[stage]
        assert kept == left
    faults = {reason["reason"]: reason for reason in found["reasons"] if reason["fault"]}
    assert {name: reason["count"] for name, reason in faults.items()} == {
        "no picture": 1,
        "broken metadata": 1,
        "truncated picture": 1,
    }
    (cut,) = faults["truncated picture"]["examples"]
    assert cut["picture"] == "worse/c" and cut["image"]["path"] == "corpus:worse.tar"
    assert found["fault_share"] == pytest.approx(3 / 36)
    (unusual,) = found["remarks"]["wrong extension"]["examples"]
    assert unusual["image"]["member"].endswith(".jpg")
    assert json.loads(json.dumps(found)) == found
    # Names of a stranger's files move no cursor.
    assert "worse/c in corpus:worse.tar" in caplog.text and "\x1b" not in caplog.text


def test_lint_reaches_the_end_of_a_corpus_that_a_run_refuses(corpus: Path, tmp_path: Path) -> None:
    strict = _run(corpus, corpus={"max_skipped_share": 0.05})
    with pytest.raises(DataError, match="corpus lint"):
        describe(strict, tmp_path)
    found = lint_corpus(strict, tmp_path)
    assert found["read"] == 36 and found["passed"] is False
    assert found["max_skipped_share"] == 0.05


def test_lint_of_a_corpus_without_a_usable_sample_ends_with_the_reading(tmp_path: Path) -> None:
    (tmp_path / "corpus").mkdir()
    write_tar(tmp_path / "corpus" / "worse.tar", [("a.json", b"{}")])
    found = lint_corpus(_run(tmp_path / "corpus"), tmp_path / "run")
    assert (found["read"], found["kept"], found["passed"]) == (1, {"reading": 0}, False)
    assert [(reason["reason"], reason["count"]) for reason in found["reasons"]] == [("no picture", 1)]


def test_stats_tell_the_numbers_of_what_was_kept(corpus: Path, root: Path) -> None:
    found = corpus_stats(_run(corpus), root)
    assert (found["read"], found["pictures"]) == (36, 33)
    assert found["formats"] == {"PNG": 33}
    assert found["licences"] == {"CC0-1.0": 33}
    assert found["shorter_side"]["min"] == found["longer_side"]["max"] == 72
    assert found["caption_characters"]["max"] == len(HOSTILE)
    concepts = found["groups"]["concept"]
    assert (concepts["groups"], concepts["held_out"], concepts["pictures"]) == (8, 4, 33)
    assert concepts["largest"][0] == {"group": "blue-cat", "name": "blue cat", "pictures": 5}
    assert json.loads(json.dumps(found)) == found


def test_corpus_page_holds_pictures_and_captions_as_text(corpus: Path, root: Path) -> None:
    made = preview_corpus(_run(corpus), root, most=100)
    page = Path(made["file"]).read_text(encoding="utf-8")
    elements = [element for element, _ in parse(page)]
    assert made["pictures"] == 33 == elements.count("img") - made["left_out"]
    assert HOSTILE in told(page) and "script" not in elements
    # The sample of broken metadata has a picture all the same; the one that is cut has none to show.
    assert made["left_out"] == 1 and "broken metadata" in told(page)
    other = root / "other.html"
    fewer = preview_corpus(_run(corpus), root, most=5, page=other)
    assert (fewer["file"], fewer["pictures"]) == (str(other), 5)
    assert [element for element, _ in parse(other.read_text(encoding="utf-8"))].count("img") == 5 + 1


def test_episode_is_shown_again_and_held_against_what_is_written(corpus: Path, tmp_path: Path) -> None:
    run = _run(corpus)
    shown = show_episode(run, tmp_path, "0-20")
    assert (shown["written"], shown["equals_written"]) == (None, None)
    assert shown["episode"]["id"] == "0-20"
    digests = [turn["sha256"] for turn in shown["episode"]["turns"]]
    assert all(len(bytes.fromhex(digest)) == 32 for digest in digests)

    folder = Path(preview_episodes(run, tmp_path, most=3)["folder"])
    again = show_episode(run, tmp_path, "0-20")
    assert again == shown | {"written": str(folder), "equals_written": True}
    assert json.loads(json.dumps(again)) == again

    file = folder / "episodes-00001.parquet"
    table = pq.read_table(file)
    place = table.column_names.index("answer")
    forged = table.set_column(place, "answer", [["forged"] * table.num_rows])
    pq.write_table(forged, file)
    differing = show_episode(run, tmp_path, "0-20")
    assert (differing["equals_written"], differing["differs_in"]) == (False, ["answer"])
    assert show_episode(run, tmp_path, "0-3")["equals_written"] is True


@pytest.mark.parametrize(
    ("episode", "told_of"),
    [
        ("7-3", r"seed 7.*episodes\.seed 0"),
        (f"0-{EPISODES}", f"beyond the {EPISODES}"),
        ("three", "SEED-NUMBER"),
    ],
)
def test_id_that_is_none_of_the_recipe_is_refused_before_the_corpus_is_read(
    tmp_path: Path, episode: str, told_of: str
) -> None:
    with pytest.raises(DataError, match=told_of):
        show_episode(_run(tmp_path / "nowhere"), tmp_path, episode)


def test_episodes_page_shows_a_spread_of_them_with_how_hard_they_are(corpus: Path, tmp_path: Path) -> None:
    tiny_backbone().save(tmp_path / "backbone")
    run = _run(
        corpus, backbone={"path": str(tmp_path / "backbone")}, embedder={"type": "vision_tower", "batch": 8}
    )
    made = preview_episodes(run, tmp_path, most=4)
    rows = read_episodes(Path(made["folder"]))
    assert len(rows) == read_manifest(Path(made["folder"]))["built"]
    page = Path(made["file"]).read_text(encoding="utf-8")
    elements = [element for element, _ in parse(page)]
    assert elements.count("article") == made["shown"] == 4
    assert elements.count("img") == 4 * 3 and "script" not in elements
    assert f"0-{rows[0]['episode']}" in told(page)

    report = made["difficulty"]
    assert report["embedder"] == "vision_tower" and report["episodes"] == len(rows)
    # One demonstration of each class makes one pair, and it is of both.
    assert report["picture_similarity"]["positive"] is None
    assert sum(report["picture_similarity"]["negative"]["counts"]) == len(rows)
    assert sum(report["ranks"]["observed"]) == pytest.approx(1)
    captions = report["false_negatives"]["caption"]
    negatives = [
        {turn["picture"] for turn in row["turns"] if turn["concept"] != row["concepts"][0]} for row in rows
    ]
    with_caption = [
        row
        for row, pictures in zip(rows, negatives, strict=True)
        if any("worse/d" in key for key in pictures)
    ]
    assert captions["episodes"] == len(with_caption) > 0
    assert captions["agreeing"] == sum(row["concepts"][0] == "red-cat" for row in with_caption)
    assert json.loads(json.dumps(made)) == made
