"""Workers killed in the middle of training: nothing is lost, nothing counts twice.

A single kill is part of the tests of training; these run with `make trials`.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from mmicl_core.config.episodes import EpisodeConfig, ShotStage
from mmicl_core.config.model import AimConfig
from mmicl_core.config.run import RunConfig
from mmicl_core.config.train import CheckpointConfig, TrainConfig
from pipelines.train import METRICS_FILE, train
from tests.fakes import reading, write_materials
from tests.killer import Killer

pytestmark = pytest.mark.usefixtures("ray_cluster")

STEPS, CHECKPOINT_EVERY = 400, 20
KILLS = 3


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
            checkpoints=CheckpointConfig(every=CHECKPOINT_EVERY),
            log_every=1,
        ),
    )


@pytest.fixture(scope="module")
def undisturbed(run: RunConfig, tmp_path_factory: pytest.TempPathFactory, ray_cluster: None) -> Path:
    return train(run, tmp_path_factory.mktemp("undisturbed")).folder


@pytest.mark.timeout(400)
@pytest.mark.trial
def test_training_whose_workers_are_killed_says_so_and_ends_like_an_undisturbed_one(
    run, undisturbed, tmp_path, caplog
):
    root = tmp_path / "killed"
    # What training reads is there already; the training itself is not.
    shutil.copytree(undisturbed.parent, root, ignore=shutil.ignore_patterns("train-*"))
    killer = Killer(root, [STEPS // 10 * (number + 1) for number in range(KILLS)])
    killer.start()
    with caplog.at_level("INFO", logger="mmicl"):
        losses = _losses(train(run, root).folder)
    assert killer.killed == KILLS
    assert caplog.text.count("goes on from its last checkpoint") == KILLS
    np.testing.assert_allclose(losses, _losses(undisturbed), rtol=1e-6)


def _losses(folder: Path) -> list[float]:
    rows = [json.loads(line) for line in (folder / METRICS_FILE).read_text(encoding="utf-8").splitlines()]
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    return [row["loss"] for row in rows]
