"""Workers killed in the middle of training: nothing is lost, nothing counts twice.

One kill runs with the tests, more of them with `make trials`.
"""

from __future__ import annotations

import json
import shutil
import threading
import time
from pathlib import Path

import numpy as np
import psutil
import pytest

from mmicl_core.config.episodes import EpisodeConfig, ShotStage
from mmicl_core.config.model import AimConfig
from mmicl_core.config.run import RunConfig
from mmicl_core.config.train import TrainConfig
from pipelines.train import METRICS_FILE, train
from tests.fakes import reading, write_materials

pytestmark = pytest.mark.usefixtures("ray_cluster")

STEPS, CHECKPOINT_EVERY = 200, 20
WORKER = "ray::RayTrainWorker"
POLL_SECONDS = 0.02


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    return RunConfig(
        **reading(write_materials(tmp_path_factory.mktemp("chaos"))),
        episodes=EpisodeConfig(
            stages=(ShotStage(episodes=6, min_shots_of_both_classes=2, max_shots_of_both_classes=4),)
        ),
        method=AimConfig(),
        train=TrainConfig(
            steps=STEPS,
            global_batch=4,
            micro_batch=2,
            learning_rate=0.01,
            checkpoint_every=CHECKPOINT_EVERY,
            log_every=1,
        ),
    )


@pytest.fixture(scope="module")
def undisturbed(run: RunConfig, tmp_path_factory: pytest.TempPathFactory, ray_cluster: None) -> Path:
    return train(run, tmp_path_factory.mktemp("undisturbed")).folder


class Killer(threading.Thread):
    """Kills one worker each time another tenth of the training is done."""

    def __init__(self, root: Path, kills: int) -> None:
        super().__init__(daemon=True)
        self._root, self._left, self.killed = root, kills, 0

    def run(self) -> None:
        while self._left:
            if self._steps() >= STEPS // 10 * (self.killed + 1) and (workers := self._workers()):
                workers[self.killed % len(workers)].kill()
                self.killed, self._left = self.killed + 1, self._left - 1
            time.sleep(POLL_SECONDS)

    def _steps(self) -> int:
        lines = [file.read_text(encoding="utf-8").count("\n") for file in self._root.glob("*.work/*.jsonl")]
        return max(lines, default=0)

    @staticmethod
    def _workers() -> list[psutil.Process]:
        found = []
        for process in psutil.Process().children(recursive=True):
            try:
                if process.cmdline()[:1] == [WORKER]:
                    found.append(process)
            except psutil.Error:
                continue
        return found


@pytest.mark.timeout(400)
@pytest.mark.parametrize("kills", [1, pytest.param(3, marks=pytest.mark.trial)])
def test_training_whose_workers_are_killed_says_so_and_ends_like_an_undisturbed_one(
    run, undisturbed, tmp_path, kills, caplog
):
    root = tmp_path / "killed"
    # What training reads is there already; the training itself is not.
    shutil.copytree(undisturbed.parent, root, ignore=shutil.ignore_patterns("train-*"))
    killer = Killer(root, kills)
    killer.start()
    with caplog.at_level("INFO", logger="mmicl"):
        losses = _losses(train(run, root).folder)
    assert killer.killed == kills
    assert caplog.text.count("goes on from its last checkpoint") == kills
    np.testing.assert_allclose(losses, _losses(undisturbed), rtol=1e-6)


def _losses(folder: Path) -> list[float]:
    rows = [json.loads(line) for line in (folder / METRICS_FILE).read_text(encoding="utf-8").splitlines()]
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    return [row["loss"] for row in rows]
