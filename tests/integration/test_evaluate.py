"""Evaluation as a command, on a real Ray, of models behind a server that remembers what it was asked."""

from __future__ import annotations

import json
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from mmicl_core.evaluation.endpoint import AT_ONCE
from tests.chat_server import ChatServer
from tests.commands import Command
from tests.fakes import write_corpus

QUERIES, BATCH, WORKERS = 24, 4, 2
CELLS = 4
"""Of 0 and 4 shots, and the two controls."""


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_corpus(tmp_path_factory.mktemp("corpus")))


def _arguments(corpus: str, root: Path, url: str) -> list[str]:
    models = [{"name": "copies", "endpoint": url, "served_model": "copies"}]
    settings = {
        "tasks": [{"type": "two_way", "part": "train"}],
        "models": models,
        "shots": [0, 4],
        "controls": ["reversed", "swapped"],
    }
    numbers = {"queries": QUERIES, "batch": BATCH, "num_workers": WORKERS, "timed": 0}
    given = ["evaluate", "--corpus.path", corpus, "--neighbours.count", "2", "--output", str(root)]
    for name, value in (settings | numbers).items():
        given += [f"--evaluate.{name}", json.dumps(value)]
    return given


def _results(out: str) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    results = json.loads(out)
    rows = pq.read_table(Path(results.pop("folder")) / "predictions.parquet").to_pylist()
    return results["tasks"][0], rows


@pytest.fixture(scope="module")
def undisturbed(
    corpus: str, tmp_path_factory: pytest.TempPathFactory
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    root = tmp_path_factory.mktemp("undisturbed")
    with ChatServer() as server, Command(*_arguments(corpus, root, server.url)) as command:
        code, out, err = command.end()
    assert code == 0, err
    assert max(Counter(server.asked).values()) == 1
    assert (root / "answers.sqlite").exists()
    for name in ("card.html", "card.json", "results.json"):
        assert list(root.glob(f"evaluate-*/{name}")), name
    return _results(out)


def test_model_that_copies_its_last_demonstration_is_found_out(undisturbed: Any) -> None:
    task, rows = undisturbed
    assert len(rows) == CELLS * QUERIES
    (curve,) = task["curves"]
    none, some = curve["points"]
    assert none["value"] == 0
    # It is one of two classes, by chance that of the query.
    assert 0.1 < some["value"] < 0.9
    controls = {one["control"]: one for one in task["controls"]}
    assert controls["swapped"]["value"] == pytest.approx(1 - some["value"])
    assert controls["swapped"]["met"] is not True


def test_evaluation_killed_at_any_moment_asks_nothing_twice_and_ends_with_the_same_results(
    corpus: str, undisturbed: Any, tmp_path: Path
) -> None:
    with ChatServer(seconds=0.2) as server:
        arguments = _arguments(corpus, tmp_path, server.url)
        with Command(*arguments) as command:
            while command.process.poll() is None and len(server.asked) < CELLS * QUERIES // 2:
                time.sleep(0.01)
            command.process.kill()
            command.process.communicate()
            command.wait_until_nothing_is_left()
        before = Counter(server.asked)
        with Command(*arguments) as command:
            code, out, err = command.end()
        assert code == 0, err
    asked = Counter(server.asked)
    again = [digest for digest, count in asked.items() if count > 1]
    # What was on its way when the kill came, and what had come back and was not kept yet.
    assert len(again) <= 2 * WORKERS * max(BATCH, AT_ONCE)
    assert max(asked.values()) <= 2
    assert sum(before.values()) < sum(asked.values())
    task, rows = _results(out)
    whole, all_rows = undisturbed
    assert rows == all_rows
    assert task == whole
