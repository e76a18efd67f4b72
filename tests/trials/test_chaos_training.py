"""Workers, controllers and drivers killed in the middle of training, some in the middle of a checkpoint:
nothing is lost, nothing counts twice. Machines that come and go, and a disk that fills up.

A worker that is killed once is part of the tests of training; these run with `make trials`.
"""

from __future__ import annotations

import contextlib
import json
import random
import shutil
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import ray
from ray.cluster_utils import Cluster

from mmicl_core.config.episodes import EpisodeConfig, ShotStage
from mmicl_core.config.model import AimConfig
from mmicl_core.config.run import RunConfig
from mmicl_core.config.train import CheckpointConfig, ElasticWorkers, TrainConfig
from mmicl_core.errors import TrainingError, find_mistake
from mmicl_core.training.checkpoint import Checkpoints
from pipelines.journal import CHECKPOINT
from pipelines.materials import prepare
from pipelines.stages import read_manifest
from pipelines.train import METRICS_FILE, RESULT, train, training_stage
from tests.commands import Command
from tests.fakes import reading, write_materials
from tests.killer import WORKER, Killer, processes_called

STEPS, CHECKPOINT_EVERY = 400, 20
KILLS = 3
DRIVER_KILLS = 4
CONTROLLER = "ray::TrainController"
POLL_SECONDS = 0.005
LIMIT_SECONDS = 300
# Sums of gradients in another order, over some hundred steps.
ELASTIC_LOSS = 0.02


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_materials(tmp_path_factory.mktemp("chaos"))


@pytest.fixture(scope="module")
def run(folder: Path) -> RunConfig:
    return RunConfig(
        **reading(folder),
        episodes=EpisodeConfig(
            stages=(ShotStage(episodes=6, min_shots_of_both_classes=2, max_shots_of_both_classes=4),)
        ),
        method=AimConfig(),
        train=TrainConfig(
            steps=STEPS,
            global_batch=4,
            micro_batch=2,
            learning_rate=0.01,
            checkpoints=CheckpointConfig(every=CHECKPOINT_EVERY),
            log_every=1,
        ),
    )


@pytest.fixture(scope="module")
def undisturbed(run: RunConfig, tmp_path_factory: pytest.TempPathFactory, ray_cluster: None) -> Path:
    return train(run, tmp_path_factory.mktemp("undisturbed")).folder


def _untrained(undisturbed: Path, root: Path) -> Path:
    """A folder in which what training reads is there already; the training itself is not."""
    shutil.copytree(undisturbed.parent, root, ignore=shutil.ignore_patterns("train-*"))
    return root


def _losses(folder: Path) -> list[float]:
    rows = [json.loads(line) for line in (folder / METRICS_FILE).read_text(encoding="utf-8").splitlines()]
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    return [row["loss"] for row in rows]


def _same(result: Path, undisturbed: Path) -> None:
    np.testing.assert_array_equal(_losses(result), _losses(undisturbed))
    (mine,), (theirs,) = ((one / RESULT).glob("*.safetensors") for one in (result, undisturbed))
    assert mine.read_bytes() == theirs.read_bytes()


def _lines(work: Path) -> list[dict[str, Any]]:
    path = work / METRICS_FILE
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    return [json.loads(line) for line in text.rpartition("\n")[0].splitlines()]


@pytest.mark.timeout(400)
@pytest.mark.trial
def test_training_whose_workers_are_killed_says_so_and_ends_like_an_undisturbed_one(
    run, undisturbed, tmp_path, caplog
):
    root = _untrained(undisturbed, tmp_path / "killed")
    killer = Killer(root, [STEPS // 10 * (number + 1) for number in range(KILLS)])
    killer.start()
    with caplog.at_level("INFO", logger="mmicl"):
        result = train(run, root).folder
    assert killer.killed == KILLS
    assert caplog.text.count("goes on from its last checkpoint") == KILLS
    _same(result, undisturbed)


def _kill_once(when: Callable[[], bool], victims: Callable[[], list[psutil.Process]]) -> threading.Thread:
    def work() -> None:
        deadline = time.monotonic() + LIMIT_SECONDS
        while time.monotonic() < deadline:
            if when() and (found := victims()):
                found[0].kill()
                return
            time.sleep(POLL_SECONDS)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    return thread


def _quarter_done(work: Path) -> bool:
    return len(_lines(work)) > STEPS // 4


def _writes_checkpoint(work: Path) -> bool:
    return any((work / CHECKPOINT).glob(".step-*"))


@pytest.mark.timeout(400)
@pytest.mark.trial
@pytest.mark.parametrize(
    ("victim", "when"),
    [(CONTROLLER, _quarter_done), (WORKER, _writes_checkpoint)],
    ids=["controller", "worker that writes a checkpoint"],
)
def test_training_of_which_a_part_is_killed_ends_like_an_undisturbed_one(
    run, undisturbed, tmp_path, victim, when
):
    root = _untrained(undisturbed, tmp_path / "killed")
    work = root / f"{undisturbed.name}.work"
    killer = _kill_once(lambda: when(work), lambda: processes_called(victim))
    result = train(run, root).folder
    assert not killer.is_alive()
    _same(result, undisturbed)


@pytest.mark.timeout(900)
@pytest.mark.trial
def test_driver_killed_at_random_moments_and_started_again_ends_like_an_undisturbed_one(
    run, undisturbed, tmp_path
):
    root = _untrained(undisturbed, tmp_path / "killed")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(json.dumps(run.model_dump(mode="json", exclude_defaults=True)), encoding="utf-8")
    arguments = ["train", "--recipe", str(recipe), "--output", str(root)]
    rng, killed = random.Random(0), 0
    work = root / f"{undisturbed.name}.work"
    for number in range(DRIVER_KILLS):
        least = rng.randrange(STEPS // DRIVER_KILLS) + STEPS * number // DRIVER_KILLS
        with Command(*arguments) as command:
            while command.process.poll() is None and len(_lines(work)) < least:
                time.sleep(POLL_SECONDS)
            if command.process.poll() is None:
                command.process.kill()
                killed += 1
            command.process.communicate()
            command.wait_until_nothing_is_left()
    with Command(*arguments) as command:
        code, out, err = command.end()
    assert code == 0, err
    assert killed >= DRIVER_KILLS - 1
    _same(Path(json.loads(out)["folder"]), undisturbed)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of a few MiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(disk)], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("mounting a small disk takes root's rights")
    yield disk
    subprocess.run(["umount", "--lazy", str(disk)], check=True)


@pytest.mark.timeout(400)
@pytest.mark.trial
def test_disk_that_fills_up_ends_training_with_the_last_good_checkpoint_which_it_goes_on_from(
    run, undisturbed, small_disk, tmp_path
):
    root = _untrained(undisturbed, tmp_path / "materials")
    # What outlives a failure lies on the small disk.
    work = root / f"{undisturbed.name}.work"
    work.symlink_to(small_disk, target_is_directory=True)

    def fill() -> None:
        while len(_lines(work)) < STEPS // 4:
            time.sleep(POLL_SECONDS)
        # The small disk has a few MiB.
        with contextlib.suppress(OSError), (small_disk / "other").open("wb", buffering=0) as file:
            while True:
                file.write(b"x" * 4096)

    threading.Thread(target=fill, daemon=True).start()
    with pytest.raises(Exception) as caught:  # noqa: PT011
        train(run, root)
    mistake = find_mistake(caught.value)
    assert isinstance(mistake, TrainingError), caught.value
    assert "No space left" in str(mistake)
    last = Checkpoints(small_disk / CHECKPOINT).newest()
    assert last is not None
    if "checkpoint" in str(mistake):
        assert str(work / CHECKPOINT / last.name) in str(mistake)
    (small_disk / "other").unlink()
    _same(train(run, root).folder, undisturbed)


@pytest.fixture
def cluster_of_two(no_ray_cluster: None) -> Iterator[Cluster]:
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    ray.init(address=cluster.address)
    yield cluster
    ray.shutdown()
    cluster.shutdown()


@pytest.mark.timeout(900)
@pytest.mark.trial
def test_training_goes_on_with_fewer_workers_when_a_machine_is_lost_and_takes_it_back(
    run, folder, cluster_of_two, tmp_path
):
    elastic = ElasticWorkers(min=1, max=2, look_every_seconds=1)
    steps = 900
    train_config = run.train.model_copy(
        update={"num_workers": elastic, "steps": steps, "checkpoints": CheckpointConfig(every=10)}
    )
    run = run.model_copy(update={"train": train_config})
    node = cluster_of_two.add_node(num_cpus=1)
    stage = training_stage(run, prepare(run, tmp_path), tmp_path)[1]
    work = tmp_path / f"{stage.folder.name}.work"

    done = list[Path]()
    training = threading.Thread(target=lambda: done.append(train(run, tmp_path).folder), daemon=True)
    training.start()
    # Ray starts and stops nodes in the main thread alone.
    _wait(work, 2)
    cluster_of_two.remove_node(node, allow_graceful=False)
    _wait(work, 1)
    cluster_of_two.add_node(num_cpus=1)
    training.join()
    (result,) = done
    rows = [json.loads(line) for line in (result / METRICS_FILE).read_text(encoding="utf-8").splitlines()]
    assert [row["step"] for row in rows] == list(range(1, steps + 1))
    workers = [row["workers"] for row in rows]
    changes = [
        workers[0],
        *(later for before, later in zip(workers, workers[1:], strict=False) if before != later),
    ]
    assert changes == [2, 1, 2], changes
    assert read_manifest(result)["world_size"] == 2


def _wait(work: Path, workers: int, steps: int = 30) -> None:
    deadline = time.monotonic() + LIMIT_SECONDS
    while time.monotonic() < deadline:
        last = _lines(work)[-steps:]
        if len(last) == steps and {line["workers"] for line in last} == {workers}:
            return
        time.sleep(0.05)
