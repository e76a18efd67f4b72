from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors import SafetensorError

from mmicl_core.config.train import CheckpointConfig, TrainConfig
from mmicl_core.errors import TrainingError
from mmicl_core.training.checkpoint import Moments, TrainState
from pipelines.journal import ENGINE_FILE, METRICS_FILE, Journal


@pytest.fixture
def journal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Journal:
    return _open(tmp_path, 0, monkeypatch)


def _open(work: Path, first: int, monkeypatch: pytest.MonkeyPatch) -> Journal:
    monkeypatch.setattr("ray.get", lambda answer: answer)
    said = SimpleNamespace(remote=lambda *_: None)
    counter: Any = SimpleNamespace(resume=said, add=said)
    return Journal(work, first, TrainConfig(checkpoints=CheckpointConfig(every=1)), {}, counter)


def _state(step: int) -> TrainState:
    return TrainState(step, {"w": Moments(torch.ones(2), {})})


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), SafetensorError("os error 28")])
def test_checkpoint_that_cannot_be_written_names_the_last_good_one(
    journal: Journal, error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise error

    good = journal.checkpoint(_state(3))
    monkeypatch.setattr("mmicl_core.training.checkpoint.save_file", full)
    with pytest.raises(TrainingError, match=rf"step 5 cannot be written .*last good checkpoint is {good}"):
        journal.checkpoint(_state(5))
    assert good.is_dir()


def test_lines_after_the_last_checkpoint_go_when_a_run_goes_on(
    journal: Journal, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for step in (1, 2, 3):
        journal.note({"step": step, "loss": 0.0, "gradient_norm": float("inf")})
    _open(tmp_path, 2, monkeypatch).note({"step": 3, "loss": 1.0})
    lines = [json.loads(line) for line in (tmp_path / METRICS_FILE).read_text(encoding="utf-8").splitlines()]
    assert [(line["step"], line["loss"]) for line in lines] == [(1, 0.0), (2, 0.0), (3, 1.0)]
    assert lines[0]["gradient_norm"] is None


def test_what_an_earlier_attempt_found_of_the_engine_stays(journal: Journal, tmp_path: Path) -> None:
    journal.describe({"world_size": 2, "peak_host_bytes": [1, 2]})
    journal.describe({"world_size": 1})
    told = json.loads((tmp_path / ENGINE_FILE).read_text(encoding="utf-8"))
    assert told == {"world_size": 1, "peak_host_bytes": [1, 2]}
