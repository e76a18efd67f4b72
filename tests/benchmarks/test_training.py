"""What training costs beside its arithmetic: waiting for data, DeepSpeed and Ray, checkpoints.

    make bench

Records the share of a step that waits for data; steps a second with kept states of demonstrations over
without, with Ray Train and ZeRO-3 on one worker over a bare loop of torch, and on two workers over one; and
what a checkpoint took. All of it on nano, one thread a worker.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from statistics import median
from typing import Any

import pytest
import torch

from mmicl_core.backbones.hugging_face import load_backbone
from mmicl_core.config.run import RunConfig, load_run
from mmicl_core.methods import build_method
from mmicl_core.training.step import MicroBatch
from pipelines.arguments import RECIPES
from pipelines.feed import Feed
from pipelines.materials import Materials, prepare
from pipelines.stages import read_manifest
from pipelines.train import METRICS_FILE, train
from tests.benchmarks.records import Figures

pytestmark = pytest.mark.usefixtures("ray_cluster")

Trained = tuple[list[dict[str, Any]], dict[str, Any]]
"""The log after warming up, and the manifest."""

STEPS, WARM = 40, 10
# So many that a step is arithmetic: what travels between workers does not grow with them.
EPISODES, EPISODES_AT_ONCE = 64, 32
DEMONSTRATIONS = 8


def _run(**train: Any) -> RunConfig:
    stage = {
        "episodes": 512,
        "min_shots_of_both_classes": DEMONSTRATIONS,
        "max_shots_of_both_classes": DEMONSTRATIONS,
    }
    settings = {
        "steps": STEPS,
        "global_batch": EPISODES,
        "micro_batch": EPISODES_AT_ONCE,
        "log_every": 1,
        "checkpoints": {"every": STEPS},
        **train,
    }
    changes = {"corpus": {"path": "embedded:open_emoji"}, "episodes": {"stages": [stage]}, "train": settings}
    return load_run(RECIPES / "nano_4_aim.yaml", changes)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("training")


def _trained(run: RunConfig, root: Path, name: str) -> Trained:
    """The log after warming up, and the manifest, of a training in a folder of its own."""
    folder = root / name
    folder.mkdir()
    for stage in root.glob("*-*"):
        if stage.is_dir() and not stage.name.startswith("train-"):
            (folder / stage.name).symlink_to(stage, target_is_directory=True)
    result = train(run, folder).folder
    lines = [json.loads(line) for line in (result / METRICS_FILE).read_text(encoding="utf-8").splitlines()]
    return lines[WARM:], read_manifest(result)


def _seconds(lines: list[dict[str, Any]]) -> float:
    return median(line["data_seconds"] + line["compute_seconds"] for line in lines)


@pytest.fixture(scope="module")
def materials(root: Path) -> Materials:
    return prepare(_run(), root)


@pytest.fixture(scope="module")
def on_one(root: Path, materials: Materials) -> Trained:
    return _trained(_run(num_workers=1), root, "one")


@pytest.fixture(scope="module")
def on_two(root: Path, materials: Materials) -> Trained:
    return _trained(_run(num_workers=2), root, "two")


def _bare(batches: list[list[MicroBatch]], method: Any) -> list[float]:
    """Seconds of each step of a plain loop."""
    torch.set_num_threads(1)
    optimizer = torch.optim.AdamW(method.trainable().values(), betas=(0.9, 0.98))
    seconds = []
    for step in batches:
        begun = time.perf_counter()
        for micro in step:
            (method(micro.batch).mean() / len(step)).backward()
        torch.nn.utils.clip_grad_norm_(list(method.trainable().values()), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        seconds.append(time.perf_counter() - begun)
    return seconds


@pytest.mark.bench
def test_steps_hardly_wait_for_their_data(on_two: Trained, figures: Figures) -> None:
    lines, _ = on_two
    waited = sum(line["data_seconds"] for line in lines)
    share = waited / sum(line["data_seconds"] + line["compute_seconds"] for line in lines)
    figures.ratio("waiting for data, of a step", share, "share")
    assert share < 0.05


@pytest.mark.bench
def test_kept_states_of_demonstrations_make_steps_faster_by_a_ratio(
    root: Path, on_one: Trained, figures: Figures
) -> None:
    run = _run(num_workers=1, steps=STEPS // 2)
    streamed = run.model_copy(update={"episodes": run.episodes.model_copy(update={"streamed": True})})
    # Streamed episodes are not known before, so nothing of their demonstrations is kept.
    unkept, _ = _trained(streamed, root, "unkept")
    ratio = _seconds(unkept) / _seconds(on_one[0])
    figures.ratio("steps a second, kept states over states read in the step", ratio)
    assert ratio > 3


@pytest.mark.bench
def test_ray_and_zero_cost_little_beside_a_bare_loop(
    materials: Materials, on_one: Trained, figures: Figures
) -> None:
    run = _run()
    method = build_method(load_backbone(materials.backbone), run.method)
    feed = Feed(run, method, materials)
    bare = median(_bare([feed.micro_batches(step, 0, 1) for step in range(STEPS)], method)[WARM:])
    ratio = bare / _seconds(on_one[0])
    figures.absolute("a step on one worker", _seconds(on_one[0]), "s")
    figures.ratio("steps a second, Ray Train with ZeRO-3 over a bare loop", ratio)
    assert ratio > 0.85


@pytest.mark.bench
def test_two_workers_are_faster_than_one_by_a_ratio(
    on_one: Trained, on_two: Trained, figures: Figures
) -> None:
    ratio = _seconds(on_one[0]) / _seconds(on_two[0])
    figures.ratio("steps a second, two workers over one", ratio)
    assert ratio > 1.5


@pytest.mark.bench
def test_checkpoint_of_two_workers_gathers_only_what_is_trained(on_two: Trained, figures: Figures) -> None:
    _, manifest = on_two
    cost = manifest["checkpoint"]
    figures.absolute("checkpoint", cost["seconds"], "s")
    figures.absolute("what it weighs", cost["bytes"], "bytes")
    figures.absolute("what it gathered", cost["gathered"], "numbers")
    figures.absolute("trained parameters", manifest["trained_parameters"], "numbers")
    assert cost["gathered"] == 3 * manifest["trained_parameters"]
    assert cost["bytes"] < 13 * manifest["trained_parameters"] + 4096
