"""`mmicl` as a process of its own, with a real Ray: what it prints, how it ends, what it leaves."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from pipelines.episodes import read_episodes
from tests.commands import Command
from tests.fakes import TINY_HELD_OUT, pair_rows, write_corpus

SMALL = [
    "--episodes.stages",
    '[{"episodes": 6, "min_shots_of_both_classes": 2, "max_shots_of_both_classes": 2}]',
    "--neighbours.count",
    "2",
]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> str:
    return str(write_corpus(tmp_path_factory.mktemp("corpus")))


def test_episodes_verb_prints_its_manifest_and_leaves_no_process(corpus, tmp_path):
    with Command("episodes", "--corpus.path", corpus, "--output", str(tmp_path), *SMALL) as command:
        code, out, err = command.end()
        assert code == 0, err
        manifest = json.loads(out)
        assert manifest["built"] == 6
        assert Path(manifest["folder"]).parent == tmp_path
        assert "Drawing train episodes: 6 to do" in err
        titles = {line.partition(":")[0] for line in err.splitlines()}
        assert titles == {
            "Reading the corpus",
            "Looking at pictures",
            "Finding concepts",
            "Finding repeated pictures",
            "Sorting by concept",
            "Gathering concepts",
            "Finding neighbours",
            "Drawing train episodes",
        }
        command.wait_until_nothing_is_left()


def test_evaluate_verb_asks_what_the_model_knows_a_picture_as(corpus, tmp_path):
    asked = ["--evaluate.tasks", '[{"type": "true_name", "part": "train"}]', "--evaluate.queries", "4"]
    few = ["--evaluate.shots", "[0]", "--evaluate.adapter", "none", "--output", str(tmp_path)]
    with Command("evaluate", "--corpus.path", corpus, *asked, *few) as command:
        code, out, err = command.end()
        assert code == 0, err
    results = json.loads(out)
    (task,) = results["tasks"]
    assert (task["task"], task["queries"], [curve["model"] for curve in task["curves"]]) == (
        "true_name",
        4,
        ["full"],
    )
    (episodes,) = tmp_path.glob("episodes-*")
    true_name = {
        pair["picture"]: pair["name"] for pair in pair_rows() if pair["concept"] not in TINY_HELD_OUT
    }
    predictions = pq.read_table(Path(results["folder"]) / "predictions.parquet").to_pylist()
    answers = {answer["question"]: answer for answer in predictions}
    for episode in read_episodes(episodes):
        answer, query = answers.pop(episode["id"]), episode["turns"][-1]["picture"]
        assert answer["expected"] == [true_name[query.partition("/")[2]]]
    assert not answers


def test_interrupted_training_ends_with_130_and_leaves_no_process(corpus, tmp_path):
    endless = ["--backbone.path", "new:nano", "--train.steps", "100000", "--train.global_batch", "2"]
    with Command("train", "--corpus.path", corpus, "--output", str(tmp_path), *SMALL, *endless) as command:
        command.wait_for_line("Training: 100000 to do")
        assert command.descendants()
        command.process.send_signal(signal.SIGINT)
        code, out, err = command.end()
        assert (code, out) == (130, ""), err
        assert "Traceback" not in err
        assert err.splitlines()[-1] == "mmicl: stopped"
        command.wait_until_nothing_is_left()
