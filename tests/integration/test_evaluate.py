"""Evaluation as a command, on a real Ray, of models behind a server that remembers what it was asked; and of
one model at home and behind this project's own server."""

from __future__ import annotations

import json
import random
import re
import socket
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import psutil
import pyarrow.parquet as pq
import pytest

from mmicl_core.assets import resolve
from mmicl_core.backbones.hugging_face import load_for_inference
from mmicl_core.config.corpus import CorpusConfig, NeighbourConfig
from mmicl_core.config.evaluate import AskedModel, EvaluateConfig
from mmicl_core.config.evaluation_tasks import NamingConfig
from mmicl_core.config.run import RunConfig
from mmicl_core.config.serve import ServeConfig
from mmicl_core.evaluation.endpoint import AT_ONCE
from pipelines.compare import compare
from pipelines.evaluate import evaluate
from pipelines.serve import app
from tests.chat_server import ChatServer
from tests.commands import Command
from tests.fakes import tiny_backbone, write_corpus
from tests.methods import make_method

QUERIES, BATCH, WORKERS = 24, 4, 2
NAMES = ("copies", "the same under another name")
CELLS = 4
"""Of 0 and 4 shots, and the two controls."""


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_corpus(tmp_path_factory.mktemp("corpus")))


def _arguments(corpus: str, root: Path, url: str) -> list[str]:
    models = [{"name": name, "endpoint": url, "served_model": "copies"} for name in NAMES]
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
    assert f"Asking: {len(server.asked)} to do" in err
    assert (root / "answers.sqlite").exists()
    for name in ("card.html", "card.json", "results.json", "results.md"):
        assert list(root.glob(f"evaluate-*/{name}")), name
    return _results(out)


def test_model_that_copies_its_last_demonstration_is_found_out(undisturbed: Any) -> None:
    task, rows = undisturbed
    assert len(rows) == len(NAMES) * CELLS * QUERIES
    curve, same = task["curves"]
    assert curve["points"] == same["points"]
    none, some = curve["points"]
    assert none["value"] == 0
    # It is one of two classes, by chance that of the query.
    assert 0.1 < some["value"] < 0.9
    controls = {one["control"]: one for one in task["controls"]}
    assert controls["swapped"]["value"] == pytest.approx(1 - some["value"])
    assert controls["swapped"]["met"] is not True


@pytest.mark.timeout(900)
@pytest.mark.parametrize("seed", [0, *(pytest.param(n, marks=pytest.mark.trial) for n in range(1, 6))])
def test_evaluation_killed_at_any_moment_asks_nothing_twice_and_ends_with_the_same_results(
    corpus: str, undisturbed: Any, tmp_path: Path, seed: int
) -> None:
    kills = [CELLS * QUERIES // 2]
    if seed:
        kills = sorted(random.Random(seed).sample(range(1, CELLS * QUERIES), 3))
    with ChatServer(seconds=0.2) as server:
        arguments = _arguments(corpus, tmp_path, server.url)
        for moment in kills:
            with Command(*arguments) as command:
                _wait_until_asked(command, server, moment)
                command.process.kill()
                command.process.communicate()
                command.wait_until_nothing_is_left()
        before = len(server.asked)
        with Command(*arguments) as command:
            code, out, err = command.end()
        assert code == 0, err
    again = sum(count - 1 for count in Counter(server.asked).values())
    # What was on its way when a kill came, and what had come back and was not kept yet.
    assert again <= 2 * WORKERS * max(BATCH, AT_ONCE) * len(kills)
    assert before < len(server.asked) <= CELLS * QUERIES + again
    assert _results(out) == undisturbed


@pytest.mark.trial
@pytest.mark.timeout(900)
@pytest.mark.parametrize("seed", range(3))
def test_evaluation_whose_worker_is_killed_goes_on_and_ends_with_the_same_results(
    corpus: str, undisturbed: Any, tmp_path: Path, seed: int
) -> None:
    moment = random.Random(seed).randrange(8, CELLS * QUERIES // 2)
    with (
        ChatServer(seconds=0.2) as server,
        Command(*_arguments(corpus, tmp_path, server.url)) as command,
    ):
        _wait_until_asked(command, server, moment)
        workers = [
            process
            for process in psutil.Process(command.process.pid).children(recursive=True)
            if process.cmdline()[:1] and process.cmdline()[0].startswith("ray::MapWorker")
        ]
        workers[0].kill()
        code, out, err = command.end()
    assert code == 0, err
    assert _results(out) == undisturbed


def _wait_until_asked(command: Command, server: ChatServer, count: int) -> None:
    while command.process.poll() is None and len(server.asked) < count:
        time.sleep(0.01)
    assert command.process.poll() is None, "it ended before the kill"


def test_method_trained_from_three_seeds_is_told_with_its_mean_and_spread(
    ray_cluster: None, corpus: str, tmp_path: Path
) -> None:
    adapters = []
    for seed in range(3):
        method = make_method("aim", load_for_inference(resolve("embedded:nano")), seed)
        method.save(tmp_path / f"seed-{seed}", {})
        adapters.append(str(tmp_path / f"seed-{seed}"))
    run = RunConfig(
        corpus=CorpusConfig(path=corpus),
        neighbours=NeighbourConfig(count=2),
        evaluate=EvaluateConfig(
            tasks=(NamingConfig(part="train"),),
            models=(AskedModel(name="aim", adapter=adapters[0], seeds=tuple(adapters[1:])),),
            shots=(4,),
            controls=(),
            queries=QUERIES,
            num_workers=1,
            timed=0,
        ),
    )
    results = evaluate(run, tmp_path)
    rows = pq.read_table(Path(results["folder"]) / "predictions.parquet").to_pylist()
    by_seed = [
        fmean(json.loads(row["statistics"])["right"] for row in rows if row["seed"] == seed)
        for seed in range(3)
    ]
    answers = {tuple(row["answer"] for row in rows if row["seed"] == seed) for seed in range(3)}
    assert len(answers) == 3 and len(rows) == 3 * QUERIES
    (point,) = results["tasks"][0]["curves"][0]["points"]
    assert point["seeds"] == pytest.approx(by_seed)
    assert point["value"] == pytest.approx(fmean(by_seed))
    assert point["deviation"] == pytest.approx(stdev(by_seed))
    for adapter in adapters:
        assert (Path(adapter) / "card.html").is_file()


def _recipe(folder: Path, corpus: str, **settings: Any) -> str:
    """A training of seconds on the tiny corpus, around a tiny model."""
    shots = {"min_shots_of_both_classes": 2, "max_shots_of_both_classes": 2}
    recipe = {
        "corpus": {"path": corpus},
        "neighbours": {"count": 2},
        "backbone": {"path": str(folder / "backbone")},
        "episodes": {"stages": [{"episodes": 8, **shots}]},
        "train": {"global_batch": 4, "micro_batch": 4, "num_workers": 1, "steps": 1},
        **settings,
    }
    path = folder / f"{settings['method']['type']}.yaml"
    path.write_text(json.dumps(recipe), encoding="utf-8")
    return str(path)


def test_models_of_recipes_are_trained_once_each_from_every_seed_and_asked(
    ray_cluster: None, corpus: str, tmp_path: Path
) -> None:
    tiny_backbone().save(tmp_path / "backbone")
    fitted = _recipe(tmp_path, corpus, method={"type": "mtv", "prompts": 3, "shots": 2, "samples": 2})
    whole = _recipe(tmp_path, corpus, method={"type": "lcl"})
    models = (
        AskedModel(name="plain", backbone=str(tmp_path / "backbone")),
        AskedModel(name="fitted", recipe=fitted, settings={"method.steps": 2}, train_seeds=(0, 1)),
        AskedModel(name="whole", recipe=whole, settings={"train.steps": 2}),
    )
    run = RunConfig(
        corpus=CorpusConfig(path=corpus),
        neighbours=NeighbourConfig(count=2),
        evaluate=EvaluateConfig(
            tasks=(NamingConfig(part="train"),),
            models=models,
            shots=(0, 2),
            queries=4,
            num_workers=1,
            timed=0,
        ),
    )
    root = tmp_path / "runs"
    results = compare(run, root)
    assert len(list(root.glob("train-mtv-*"))) == 2 and len(list(root.glob("train-lcl-*"))) == 1
    plain, mtv, lcl = results["models"]
    assert plain["training"] is None and plain["backbone"] == mtv["backbone"] == str(tmp_path / "backbone")
    assert (mtv["training"]["method"], mtv["training"]["trained_parameters"]) == ("mtv", 0)
    assert len(mtv["training"]["seconds"]) == 2 and mtv["train_seeds"] == [0, 1]
    assert lcl["training"]["steps"] == [2] and lcl["training"]["seconds"][0] > 0
    assert lcl["training"]["trained_parameters"] > 10_000
    points = {curve["model"]: curve["points"] for curve in results["tasks"][0]["curves"]}
    assert [len(points[name][-1]["seeds"]) for name in ("plain", "fitted", "whole")] == [0, 2, 0]
    page = (Path(results["folder"]) / "results.md").read_text(encoding="utf-8")
    assert "| fitted |" in page and "lcl.yaml" in page
    shown = re.findall(r"\]\((plots/[^)]+)\)", page)
    assert shown and all((Path(results["folder"]) / plot).is_file() for plot in shown)

    before = {made: made.stat().st_mtime_ns for made in root.glob("*/_manifest.json")}
    assert compare(run, root) == results
    assert {made: made.stat().st_mtime_ns for made in root.glob("*/_manifest.json")} == before


@pytest.fixture
def own_server(ray_cluster: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The address of nano behind this project's server."""
    # Ray outlives the server, which must leave nothing on it.
    monkeypatch.setenv("RAY_ADDRESS", "auto")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    yield app.start(RunConfig(serve=ServeConfig(port=port, bank=str(tmp_path / "bank")))) + "/v1"
    app.stop()


def test_model_answers_and_scores_behind_the_projects_own_server_as_it_does_at_home(
    corpus: str, own_server: str, tmp_path: Path
) -> None:
    names = ("at home", "served")
    models = (AskedModel(name=names[0]), AskedModel(name=names[1], endpoint=own_server, served_model="nano"))
    run = RunConfig(
        corpus=CorpusConfig(path=corpus),
        neighbours=NeighbourConfig(count=2),
        evaluate=EvaluateConfig(
            tasks=(NamingConfig(part="train"),),
            models=models,
            shots=(0, 4),
            controls=("swapped", "blank"),
            queries=8,
            batch=BATCH,
            num_workers=1,
            timed=1,
        ),
    )
    results = evaluate(run, tmp_path)
    rows = pq.read_table(Path(results["folder"]) / "predictions.parquet").to_pylist()
    home, served = ([{**row, "model": None} for row in rows if row["model"] == name] for name in names)
    assert served == home
    assert len({row["answer"] for row in home}) > 2 and None not in {row["prompt_tokens"] for row in home}
    first, second = results["tasks"][0]["curves"]
    assert second["points"] == first["points"]
    lengths = {
        name: [row["prompt_tokens"] for row in results["compression"] if row["model"] == name]
        for name in names
    }
    assert lengths[names[0]] == lengths[names[1]] and None not in lengths[names[0]]
