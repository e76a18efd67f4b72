"""The engine on real workers, without Ray: the same gradient and the same run, however it is spread."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from mmicl_core.training.step import StepMetrics, mean_loss, train_step
from tests.fakes import PlainEngine
from tests.ranks import EPISODES, Case, build, gradient, micro_batches, run_cases, tensors_of

CLIP = 1e9
STAGES = (0, 1, 2, 3)
# Sums of 32-bit numbers of the order of 1, in another order.
GRADIENT = {"rtol": 1e-3, "atol": 1e-5}


def _case(name: str, stage: int, micro_batch: int, method: str = "lcl", **more: object) -> Case:
    train = {"micro_batch": micro_batch, "gradient_clip": CLIP, "zero": {"stage": stage}}
    return Case(name, method, train | dict(more.pop("train", {})), **more)  # type: ignore[arg-type, call-overload]


WHOLE = [_case(f"stage {stage}", stage, EPISODES) for stage in STAGES]
UNEVEN = [_case(f"stage {stage} by {micro}", stage, micro) for stage in STAGES for micro in (1, 2, 4)]


@pytest.fixture(scope="module")
def expected() -> tuple[StepMetrics, dict[str, torch.Tensor]]:
    """One step of plain torch, in one process."""
    method = build(WHOLE[0])
    engine = PlainEngine(method)
    metrics = train_step(engine, micro_batches(method, 0, 1, EPISODES), [{}], 1.0)
    return metrics, dict(engine.gradients)


@pytest.mark.parametrize(("workers", "cases"), [(1, WHOLE), (2, UNEVEN)], ids=["one worker", "two workers"])
def test_gradient_is_that_of_plain_torch_under_every_stage_and_split(
    workers: int, cases: list[Case], expected: tuple[StepMetrics, dict[str, torch.Tensor]], tmp_path: Path
) -> None:
    plain, wanted = expected
    found = run_cases(tmp_path, cases, workers)
    for case in cases:
        (metrics,) = found[case.name]
        assert (metrics.targets, metrics.tokens) == (plain.targets, plain.tokens)
        assert metrics.loss == pytest.approx(plain.loss, rel=1e-5)
        assert metrics.gradient_norm == pytest.approx(plain.gradient_norm, rel=1e-4)
        gradients = gradient(tmp_path, case)
        assert gradients.keys() == wanted.keys()
        for name, values in gradients.items():
            torch.testing.assert_close(values, wanted[name], **GRADIENT, msg=f"{case.name}: {name}")


BEFORE, AFTER = 3, 2
# The other stages, precisions and places resume among the trials.
SPREAD = [
    _case("fp32 1", 1, 2),
    _case("fp32 3", 3, 2),
    _case("bf16 2", 2, 2, train={"precision": "bf16"}),
    _case("muon", 3, 2, train={"muon_learning_rate": 0.02}),
    _case("average", 3, 2, "aim", train={"ema": 0.9}),
    _case(
        "offloaded",
        3,
        2,
        "aim",
        train={"zero": {"stage": 3, "offload_optimizer": "cpu", "offload_parameters": "cpu"}},
    ),
]
# Gradients are summed in another order on another number of workers; bf16 rounds them to 8 bits, and Muon
# multiplies in bf16.
RESUMED = {"fp32": 1e-5, "bf16": 3e-2, "muon": 5e-3}


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, list[StepMetrics]]]:
    folder = tmp_path_factory.mktemp("uninterrupted")
    return folder, run_cases(folder, [replace(case, steps=BEFORE + AFTER) for case in SPREAD], 2)


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("stopped")
    run_cases(folder, [replace(case, steps=BEFORE) for case in SPREAD], 2)
    return folder


def _resumed(stopped: Path, folder: Path, workers: int, steps: int) -> dict[str, list[StepMetrics]]:
    cases = [replace(case, start=str(stopped / case.name), steps=steps) for case in SPREAD]
    return run_cases(folder, cases, workers)


def test_run_stopped_and_resumed_on_as_many_workers_is_the_same_to_the_bit(
    uninterrupted: tuple[Path, dict[str, list[StepMetrics]]], stopped: Path, tmp_path: Path
) -> None:
    folder, whole = uninterrupted
    resumed = _resumed(stopped, tmp_path, 2, AFTER)
    for case in SPREAD:
        assert resumed[case.name] == whole[case.name][BEFORE:], case.name
        wanted, found = tensors_of(folder, case), tensors_of(tmp_path, case)
        assert wanted.keys() == found.keys()
        different = [name for name in wanted if not torch.equal(wanted[name], found[name])]
        assert not different, (case.name, different)


def test_run_resumed_on_one_worker_and_then_on_two_goes_on_as_an_uninterrupted_one(
    uninterrupted: tuple[Path, dict[str, list[StepMetrics]]], stopped: Path, tmp_path: Path
) -> None:
    _, whole = uninterrupted
    alone = _resumed(stopped, tmp_path / "alone", 1, 1)
    together = _resumed(tmp_path / "alone", tmp_path / "together", 2, 1)
    for case in SPREAD:
        tolerance = RESUMED.get(case.name.split()[0], RESUMED["fp32"])
        losses = [step.loss for step in [*alone[case.name], *together[case.name]]]
        assert losses == pytest.approx([step.loss for step in whole[case.name][BEFORE:]], rel=tolerance), (
            case.name
        )


def test_bf16_keeps_32_bits_of_what_is_trained(stopped: Path) -> None:
    for case in SPREAD:
        if case.name.startswith("bf16"):
            values = {n: t for n, t in tensors_of(stopped, case).items() if n.startswith("value/")}
            kept = [
                name for name, value in values.items() if not torch.equal(value, value.bfloat16().float())
            ]
            assert len(kept) > len(values) / 2, case.name


def test_checkpoint_gathers_what_is_trained_and_nothing_frozen(stopped: Path) -> None:
    for case in SPREAD:
        method = build(case)
        trained = sum(parameter.numel() for parameter in method.trainable().values())
        gathered = int(load_file(stopped / f"{case.name}.count")["gathered"])
        # The value and two moments; Muon has one for what it trains; an average is gathered too.
        assert gathered <= (4 if case.name == "average" else 3) * trained
        assert gathered == sum(tensor.numel() for tensor in tensors_of(stopped, case).values())


def test_validation_measures_the_average_and_leaves_training_as_it_was(tmp_path: Path) -> None:
    ways = [("fp32", 0), ("fp32", 1), ("fp32", 2), ("fp32", 3), ("bf16", 3)]
    plain = [
        _case(f"{precision} {stage}", stage, 2, steps=3, train={"ema": 0.5, "precision": precision})
        for precision, stage in ways
    ]
    validated = [replace(case, name=f"{case.name} validated", validated=True) for case in plain]
    found = run_cases(tmp_path, [*plain, *validated], 2)
    for case, seen in zip(plain, validated, strict=True):
        assert found[seen.name] == found[case.name], case.name
        wanted, kept = tensors_of(tmp_path, case), tensors_of(tmp_path, seen)
        assert all(torch.equal(wanted[name], kept[name]) for name in wanted), case.name
        losses = [_loss_with(kind, kept) for kind in ("ema", "value")]
        last = float(load_file(tmp_path / f"{seen.name}.count")["losses"][-1])
        tolerance = 1e-2 if "bf16" in case.name else 1e-5
        assert last == pytest.approx(losses[0], rel=tolerance), case.name
        assert abs(losses[1] - losses[0]) > 2 * tolerance * losses[0], "a test that cannot fail"


def _loss_with(kind: str, tensors: dict[str, torch.Tensor]) -> float:
    """The loss of all episodes, in one process, with the values or the averages of a checkpoint."""
    method = build(WHOLE[0])
    with torch.no_grad():
        for name, parameter in method.trainable().items():
            parameter.copy_(tensors[f"{kind}/{name}"])
    method.looks = True
    return mean_loss(PlainEngine(method), [(micro_batches(method, 0, 1, EPISODES), [{}])])


def test_layers_that_are_computed_again_give_the_same_gradient(
    expected: tuple[StepMetrics, dict[str, torch.Tensor]], tmp_path: Path
) -> None:
    case = _case("again", 3, 2, recompute=True)
    run_cases(tmp_path, [case], 2)
    for name, values in gradient(tmp_path, case).items():
        torch.testing.assert_close(values, expected[1][name], **GRADIENT)


@pytest.mark.parametrize("workers", [1, 2])
def test_step_without_a_finite_loss_is_skipped_and_the_next_goes_on_from_where_it_was(
    workers: int, tmp_path: Path
) -> None:
    broken = [_case(f"broken {stage}", stage, 2, broken="0-1", broken_at=1, steps=3) for stage in (0, 1, 3)]
    # The step that is skipped is as if it had never been taken.
    whole = [_case(f"whole {stage}", stage, 2, steps=2) for stage in (0, 1, 3)]
    found = run_cases(tmp_path, [*broken, *whole], workers)
    for spoilt, clean in zip(broken, whole, strict=True):
        first, bad, last = found[spoilt.name]
        assert bad.skipped and not math.isfinite(bad.gradient_norm)
        assert bad.bad_episodes == ["0-0", "0-1"]
        assert not first.skipped and not last.skipped
        assert [first.loss, last.loss] == [step.loss for step in found[clean.name]]
