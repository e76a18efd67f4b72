from __future__ import annotations

from pathlib import Path

import pytest
import torch

from mmicl_core.errors import CheckpointError
from mmicl_core.training import checkpoint
from mmicl_core.training.checkpoint import Checkpoints, Moments, TrainState, load_state

SHAPES = {"layer.weight": (3, 4), "layer.bias": (4,), "scale": ()}


def _newest(folder: Path) -> Path:
    newest = Checkpoints(folder).newest()
    assert newest is not None
    return newest


def _names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def _state(step: int = 7, seed: int = 0, **facts: object) -> TrainState:
    generator = torch.Generator().manual_seed(seed)
    parameters = {
        name: Moments(
            torch.randn(shape, generator=generator),
            {kind: torch.randn(shape, generator=generator) for kind in ("exp_avg", "exp_avg_sq")},
        )
        for name, shape in SHAPES.items()
    }
    return TrainState(step, parameters, facts)


def _same(one: TrainState, other: TrainState) -> bool:
    return (one.step, one.facts) == (other.step, other.facts) and all(
        torch.equal(moments.value, other.parameters[name].value)
        and moments.states.keys() == other.parameters[name].states.keys()
        and all(
            torch.equal(tensor, other.parameters[name].states[kind])
            for kind, tensor in moments.states.items()
        )
        for name, moments in one.parameters.items()
    )


def test_checkpoint_is_read_back_as_it_was_written(tmp_path: Path) -> None:
    state = _state(rows=224, validation_loss=0.25)
    Checkpoints(tmp_path / "checkpoint").save(state)
    assert _same(load_state(_newest(tmp_path / "checkpoint"), SHAPES), state)


def test_checkpoint_of_tensors_that_share_memory_or_are_transposed_is_read_back(tmp_path: Path) -> None:
    shared = torch.arange(12.0).reshape(4, 3).T
    state = TrainState(1, {"layer.weight": Moments(shared, {"exp_avg": shared})})
    Checkpoints(tmp_path / "checkpoint").save(state)
    assert _same(load_state(_newest(tmp_path / "checkpoint"), {"layer.weight": (3, 4)}), state)


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        (SHAPES | {"layer.weight": (4, 3)}, r"layer\.weight is \(3, 4\) there and \(4, 3\) in this run"),
        (SHAPES | {"extra": (1,)}, r"extra is absent there and \(1,\) in this run"),
        ({"layer.weight": (3, 4)}, r"layer\.bias is \(4,\) there and absent in this run"),
    ],
)
def test_checkpoint_that_does_not_fit_names_the_first_mismatch(
    shapes: dict[str, tuple[int, ...]], message: str, tmp_path: Path
) -> None:
    Checkpoints(tmp_path / "checkpoint").save(_state())
    with pytest.raises(CheckpointError, match=message):
        load_state(_newest(tmp_path / "checkpoint"), shapes)


def test_a_crash_in_the_middle_of_saving_leaves_the_old_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Checkpoints(tmp_path / "checkpoint").save(_state(step=1))
    whole = checkpoint.save_file

    def crash(tensors: dict[str, torch.Tensor], path: Path) -> None:
        whole(tensors, path)
        raise OSError("no space left")

    monkeypatch.setattr(checkpoint, "save_file", crash)
    with pytest.raises(OSError, match="no space"):
        Checkpoints(tmp_path / "checkpoint").save(_state(step=2, seed=1))
    assert _same(load_state(_newest(tmp_path / "checkpoint"), SHAPES), _state(step=1))
    assert [path.name for path in (tmp_path / "checkpoint").iterdir()] == ["step-00000001"]


def test_a_worker_killed_while_saving_leaves_the_old_checkpoint_and_the_next_removes_its_rest(
    tmp_path: Path,
) -> None:
    folder = tmp_path / "checkpoint"
    Checkpoints(folder).save(_state(step=1))
    (folder / ".step-00000002.abc").mkdir()
    assert load_state(_newest(folder), SHAPES).step == 1
    Checkpoints(folder).save(_state(step=3, seed=1))
    assert [path.name for path in folder.iterdir()] == ["step-00000003"]
    assert _same(load_state(_newest(folder), SHAPES), _state(step=3, seed=1))


def test_folder_with_nothing_whole_in_it_holds_no_checkpoint(tmp_path: Path) -> None:
    assert Checkpoints(tmp_path / "absent").newest() is None
    (tmp_path / ".step-00000002.abc").mkdir()
    assert Checkpoints(tmp_path).newest() is Checkpoints(tmp_path).best() is None


def test_a_torn_or_missing_checkpoint_is_refused_by_name(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint"
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_state(folder, SHAPES)
    for name, content in (("state.safetensors", None), ("state.json", b"{"), ("state.json", b"{}")):
        Checkpoints(folder).save(_state())
        path = folder / "step-00000007" / name
        path.write_bytes(path.read_bytes()[:-20] if content is None else content)
        with pytest.raises(CheckpointError, match="cannot be read"):
            load_state(_newest(folder), SHAPES)


def test_newest_checkpoints_and_those_of_lowest_validation_loss_are_kept(tmp_path: Path) -> None:
    kept = Checkpoints(tmp_path, keep_last=2, keep_best=1)
    for step, loss in enumerate([0.9, 0.4, None, 0.4, 0.7, float("nan")], start=1):
        kept.save(_state(step) if loss is None else _state(step, validation_loss=loss))
    # Of two alike, the earlier one is the best.
    assert _names(tmp_path) == ["step-00000002", "step-00000005", "step-00000006"]
    best, newest = kept.best(), kept.newest()
    assert best is not None and newest is not None
    assert (best.name, newest.name) == ("step-00000002", "step-00000006")


def test_without_validation_the_newest_checkpoint_is_the_best(tmp_path: Path) -> None:
    kept = Checkpoints(tmp_path)
    for step in (1, 2, 3):
        kept.save(_state(step))
    assert _names(tmp_path) == ["step-00000003"]
    assert kept.best() == kept.newest()
