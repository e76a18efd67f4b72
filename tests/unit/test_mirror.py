from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch

from mmicl_core.errors import ConfigError
from mmicl_core.training.checkpoint import Checkpoints, Moments, TrainState, load_state
from pipelines.mirror import Mirror

SHAPES = {"w": (3,)}


def _state(step: int, **facts: object) -> TrainState:
    value = torch.full((3,), float(step))
    return TrainState(step, {"w": Moments(value, {"exp_avg": value.clone()})}, facts)


def _run(root: Path, place: str, steps: int, keep_last: int = 1) -> Checkpoints:
    """A run that writes and mirrors so many checkpoints."""
    checkpoints = Checkpoints(root / "checkpoint", keep_last)
    mirror = Mirror.of(place, "train-aim-1.work", checkpoints)
    for step in range(1, steps + 1):
        mirror.send(checkpoints.save(_state(step)))
    mirror.close()
    return checkpoints


@pytest.mark.parametrize("scheme", ["", "file://"])
def test_mirror_holds_what_the_run_keeps_and_a_run_without_any_goes_on_from_there(
    tmp_path: Path, scheme: str
) -> None:
    place = scheme + str(tmp_path / "elsewhere")
    _run(tmp_path / "here", place, 5, keep_last=2)
    copied = sorted(path.name for path in (tmp_path / "elsewhere" / "train-aim-1.work").iterdir())
    assert copied == ["step-00000004", "step-00000005"]
    fresh = Checkpoints(tmp_path / "there" / "checkpoint")
    fetched = Mirror.of(place, "train-aim-1.work", fresh).fetch()
    assert fetched == fresh.newest() and fetched is not None
    state = load_state(fetched, SHAPES)
    assert state.step == 5 and torch.equal(state.parameters["w"].value, torch.full((3,), 5.0))


def test_run_that_has_a_checkpoint_of_its_own_fetches_none(tmp_path: Path) -> None:
    own = _run(tmp_path / "here", str(tmp_path / "elsewhere"), 2)
    assert Mirror.of(str(tmp_path / "elsewhere"), "train-aim-1.work", own).fetch() is None


def test_checkpoint_that_is_only_half_there_is_not_fetched(tmp_path: Path) -> None:
    _run(tmp_path / "here", str(tmp_path / "elsewhere"), 2, keep_last=2)
    (tmp_path / "elsewhere" / "train-aim-1.work" / "step-00000002" / "state.json").unlink()
    fresh = Checkpoints(tmp_path / "there" / "checkpoint")
    fetched = Mirror.of(str(tmp_path / "elsewhere"), "train-aim-1.work", fresh).fetch()
    assert fetched is not None and fetched.name == "step-00000001"


def test_mirror_of_another_run_is_empty(tmp_path: Path) -> None:
    _run(tmp_path / "here", str(tmp_path / "elsewhere"), 1)
    fresh = Checkpoints(tmp_path / "there")
    assert Mirror.of(str(tmp_path / "elsewhere"), "train-lcl-2.work", fresh).fetch() is None
    assert Mirror.of(None, "train-aim-1.work", fresh).fetch() is None


def test_place_that_vanishes_is_warned_of_and_does_not_stop_the_run(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoints = Checkpoints(tmp_path / "here")
    mirror = Mirror.of(str(tmp_path / "elsewhere"), "run", checkpoints)

    def gone(*_: object, **__: object) -> None:
        raise OSError("no route to host")

    monkeypatch.setattr(mirror, "_filesystem", type("Gone", (), {"create_dir": gone})())
    with caplog.at_level(logging.WARNING, logger="mmicl"):
        for step in (1, 2):
            mirror.send(checkpoints.save(_state(step)))
        mirror.close()
    assert mirror.failed >= 1
    assert "no route to host" in caplog.text
    assert f"{mirror.failed} of 2 checkpoints did not reach" in caplog.text
    assert checkpoints.newest() is not None


def test_place_that_no_filesystem_opens_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"train\.checkpoints\.mirror nowhere://x cannot be opened"):
        Mirror.of("nowhere://x", "run", Checkpoints(tmp_path))
