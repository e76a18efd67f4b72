"""What ends a training, and what does not: each says which worker, where and why."""

from __future__ import annotations

import json
import shutil
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray
from ray.train.torch import TorchConfig

from mmicl_core.config.episodes import EpisodeConfig, ShotStage
from mmicl_core.config.model import AimConfig, LclConfig, MethodConfig
from mmicl_core.config.run import RunConfig
from mmicl_core.config.train import CheckpointConfig, TrainConfig, ValidationConfig
from mmicl_core.errors import ConfigError, DataError, MmiclError, TrainingError, find_mistake
from pipelines import train as training
from pipelines.materials import prepare
from pipelines.stages import read_manifest
from pipelines.train import METRICS_FILE, PAGE, train, training_stage, try_out
from tests.fakes import reading, write_materials
from tests.killer import workers_of_training

pytestmark = pytest.mark.usefixtures("ray_cluster")

STALL_SECONDS = 4.0


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_materials(tmp_path_factory.mktemp("survival"))


def _run(folder: Path, method: MethodConfig | None = None, **train: Any) -> RunConfig:
    settings = {
        "steps": 8,
        "global_batch": 4,
        "micro_batch": 1,
        "learning_rate": 0.05,
        "warmup_steps": 0,
        "log_every": 1,
        "checkpoints": CheckpointConfig(every=4),
    }
    return RunConfig(
        **reading(folder),
        episodes=EpisodeConfig(
            stages=(ShotStage(episodes=6, min_shots_of_both_classes=2, max_shots_of_both_classes=4),),
            same_shots_in_a_row=2,
            streamed=method is not None,
        ),
        method=method or AimConfig(),
        train=TrainConfig.model_validate(settings | train),
    )


def _mistake(run: RunConfig, root: Path) -> MmiclError:
    with pytest.raises(Exception) as caught:  # noqa: PT011
        train(run, root)
    mistake = find_mistake(caught.value)
    assert mistake is not None, caught.value
    return mistake


def _lines(result: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (result / METRICS_FILE).read_text(encoding="utf-8").splitlines()]


def _work(run: RunConfig, root: Path) -> Path:
    stage = training_stage(run, prepare(run, root), root)[1]
    return root / f"{stage.folder.name}.work"


def test_loss_on_held_out_episodes_chooses_the_checkpoint_and_ends_training(
    folder: Path, tmp_path: Path
) -> None:
    # So large a rate that what was learnt is soon lost again.
    asked = ValidationConfig(every=2, episodes=5, patience=2)
    run = _run(folder, steps=40, learning_rate=0.5, validation=asked)
    result = train(run, tmp_path).folder
    manifest, lines = read_manifest(result), _lines(result)
    measured = {line["step"]: line["validation_loss"] for line in lines if "validation_loss" in line}
    best = min(measured, key=lambda step: (measured[step], step))
    assert list(measured) == list(range(2, best + 5, 2))
    assert (manifest["steps"], manifest["validation_loss"]) == (best, measured[best])
    assert "validation" in (result / PAGE).read_text(encoding="utf-8")


def test_step_whose_loss_is_no_number_is_skipped_and_too_many_in_a_row_name_their_episodes(
    folder: Path, tmp_path: Path
) -> None:
    run = _run(folder, learning_rate=1e30, gradient_clip=1e30, bad_steps=3)
    mistake = _mistake(run, tmp_path)
    assert isinstance(mistake, TrainingError)
    told = str(mistake)
    assert "not finite in 3 steps in a row (train.bad_steps)" in told
    assert "the last with episodes 0-" in told
    lines = _lines(_work(run, tmp_path))
    assert [line.get("skipped", False) for line in lines] == [False, True, True, True]
    # What is no number in JSON is null.
    assert all(line["gradient_norm"] is None for line in lines[1:])


def test_worker_that_cannot_read_its_data_ends_training_and_says_which_and_where(
    folder: Path, tmp_path: Path
) -> None:
    copied = tmp_path / "copied"
    shutil.copytree(folder, copied)
    run = _run(copied, LclConfig())
    work = _work(run, tmp_path)

    def cut() -> None:
        # After the driver has looked at it, and before the workers do.
        while not work.exists():
            time.sleep(0.01)
        for shard in (copied / "corpus").glob("*.tar"):
            shard.write_bytes(shard.read_bytes()[:600])

    threading.Thread(target=cut, daemon=True).start()
    begun = time.monotonic()
    mistake = _mistake(run, tmp_path)
    assert isinstance(mistake, DataError)
    assert str(mistake).startswith(("worker 0, step 1, in the wait", "worker 1, step 1, in the wait"))
    assert "was changed or cut after the corpus was read" in str(mistake)
    assert time.monotonic() - begun < 120


class _Freezer(threading.Thread):
    """Stops a worker, without ending it, once the training has taken a step."""

    def __init__(self, work: Path) -> None:
        super().__init__(daemon=True)
        self._work, self.frozen = work, list[psutil.Process]()

    def run(self) -> None:
        while not self.frozen:
            log = self._work / METRICS_FILE
            if log.exists() and log.read_text(encoding="utf-8").count("\n") >= 2:
                self.frozen = workers_of_training()[:1]
                for process in self.frozen:
                    process.send_signal(signal.SIGSTOP)
            time.sleep(0.02)


@pytest.fixture
def thawed() -> Iterator[list[psutil.Process]]:
    frozen = list[psutil.Process]()
    yield frozen
    for process in frozen:
        if process.is_running():
            process.kill()


def test_worker_that_stalls_ends_training_with_where_every_worker_is(
    folder: Path, tmp_path: Path, thawed: list[psutil.Process]
) -> None:
    run = _run(
        folder,
        LclConfig(),
        steps=100_000,
        stall_seconds=STALL_SECONDS,
        checkpoints=CheckpointConfig(every=10**6),
    )
    freezer = _Freezer(_work(run, tmp_path))
    freezer.start()
    begun = time.monotonic()
    mistake = _mistake(run, tmp_path)
    thawed += freezer.frozen
    assert isinstance(mistake, TrainingError)
    told = str(mistake)
    assert f"did nothing new for {STALL_SECONDS:g} s (train.stall_seconds)" in told
    assert "worker 0: step" in told and "worker 1: step" in told
    assert "pictures" in told
    assert time.monotonic() - begun < 120


def test_workers_that_cannot_be_started_once_leave_the_next_ones_their_cpus(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    every = int(ray.cluster_resources()["CPU"])
    broken = [TorchConfig(backend="gloo", init_method="nowhere"), TorchConfig(backend="gloo")]
    monkeypatch.setattr(training, "TorchConfig", lambda **_: broken.pop(0))
    result = train(_run(folder, num_workers=every, global_batch=2 * every), tmp_path)
    assert not broken
    assert read_manifest(result.folder)["world_size"] == every


def test_dry_run_takes_one_step_and_keeps_nothing_of_it(folder: Path, tmp_path: Path) -> None:
    told = try_out(_run(folder, steps=500, validation=ValidationConfig(every=100)), tmp_path)
    assert (told["steps"], told["world_size"], told["micro_batches"]) == (1, 2, 2)
    assert told["validation_loss"] > 0
    assert len(told["peak_host_bytes"]) == 2
    assert not list(tmp_path.glob("train-*"))


def test_output_without_room_for_checkpoints_is_refused_before_training(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = _run(folder)
    prepare(run, tmp_path)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(ConfigError, match=r"1,000 bytes free, but what the checkpoints .* takes? [\d,]+"):
        train(run, tmp_path)
    assert not list(tmp_path.glob("*.work"))
