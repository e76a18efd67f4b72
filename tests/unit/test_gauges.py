from __future__ import annotations

import math

import pytest

from mmicl_core.training.step import StepMetrics
from pipelines import gauges
from pipelines.gauges import FIGURES, TrainingGauges, tell_part


class Told:
    """Takes the place of Ray's metrics: keeps what is told, by name and labels."""

    def __init__(self) -> None:
        self.sums: dict[tuple[str, ...], float] = {}
        self.present: dict[tuple[str, ...], float] = {}

    def counter(self, name: str, about: str, labels: tuple[str, ...]):
        told = self.sums

        class Counter:
            def inc(self, value: float, tags: dict[str, str]) -> None:
                # As Ray's own.
                assert value > 0 and tags.keys() == set(labels)
                told[name, *tags.values()] = told.get((name, *tags.values()), 0) + value

        return Counter()

    def gauge(self, name: str, about: str, labels: tuple[str, ...]):
        told = self.present
        made = self.Gauge()

        def keep(value: float, tags: dict[str, str]) -> None:
            assert tags.keys() == set(labels)
            told[name, *tags.values()] = value

        made.set = keep
        return made

    class Gauge:
        pass


@pytest.fixture
def told(monkeypatch) -> Told:
    made = Told()

    def metric(name: str):
        figure = FIGURES[name]
        make = made.counter if figure.adds_up else made.gauge
        return make(name, figure.about, figure.labels)

    monkeypatch.setattr(gauges, "Gauge", Told.Gauge)
    monkeypatch.setattr(gauges, "_metric", metric)
    return made


def take(run: TrainingGauges, number: int, metrics: StepMetrics) -> None:
    run.step(
        number,
        metrics,
        episodes=32,
        data_seconds=0.25,
        compute_seconds=1.5,
        operations=1e12,
        learning_rate=1e-4,
    )


def test_steps_add_up_and_the_last_one_is_told(told):
    run = TrainingGauges("train-aim-1", steps=10, workers=2)
    for number, loss in ((1, 3.0), (2, 2.0)):
        take(run, number, StepMetrics(loss, 64, 0.5, tokens=1000))
    sums = {name.removeprefix("mmicl_train_"): value for (name, _), value in told.sums.items()}
    assert sums == {
        "steps": 2,
        "episodes": 64,
        "tokens": 2000,
        "data_seconds": 0.5,
        "compute_seconds": 3.0,
        "operations": 2e12,
    }
    present = {name.removeprefix("mmicl_train_"): value for (name, _), value in told.present.items()}
    assert present == {
        "step": 2,
        "steps_asked": 10,
        "workers": 2,
        "loss": 2.0,
        "gradient_norm": 0.5,
        "learning_rate": 1e-4,
    }
    assert {run for _, run in [*told.sums, *told.present]} == {"train-aim-1"}


@pytest.mark.parametrize(("loss", "reason"), [(math.nan, "loss not finite"), (2.0, "gradient not finite")])
def test_skipped_step_is_told_by_its_reason_and_its_numbers_are_not(told, loss, reason):
    run = TrainingGauges("train-aim-1", steps=10, workers=2)
    take(run, 1, StepMetrics(loss, 64, math.inf, tokens=1000, skipped=True))
    assert told.sums["mmicl_train_skipped_steps", "train-aim-1", reason] == 1
    assert ("mmicl_train_gradient_norm", "train-aim-1") not in told.present
    assert (("mmicl_train_loss", "train-aim-1") in told.present) is math.isfinite(loss)


def test_validation_is_told_beside_the_loss_of_training(told):
    TrainingGauges("train-aim-1", steps=10, workers=2).validation(1.25)
    assert told.present == {("mmicl_train_validation_loss", "train-aim-1"): 1.25}


def test_parts_of_a_stage_add_up_by_reason(told):
    tell_part("pairs", {"read": 10, "kept": 7, "skipped": {"no picture": 3}}, left=1)
    tell_part("pairs", {"read": 5, "kept": 5, "skipped": {"no picture": 0}}, left=0)
    tell_part(
        "episodes", {"read": 8, "built": 6, "turns": 60, "skipped_by_reason": {"names clash": 2}}, left=4
    )
    assert told.sums == {
        ("mmicl_data_parts", "pairs"): 2,
        ("mmicl_data_rows_read", "pairs"): 15,
        ("mmicl_data_rows_kept", "pairs"): 12,
        ("mmicl_data_rows_skipped", "pairs", "no picture"): 3,
        ("mmicl_data_parts", "episodes"): 1,
        ("mmicl_data_rows_read", "episodes"): 8,
        ("mmicl_data_rows_kept", "episodes"): 6,
        ("mmicl_data_rows_skipped", "episodes", "names clash"): 2,
    }
    assert told.present == {
        ("mmicl_data_parts_left", "pairs"): 0,
        ("mmicl_data_parts_left", "episodes"): 4,
    }


def test_stage_that_counts_no_rows_tells_its_parts_alone(told):
    tell_part("neighbours", {}, left=2)
    assert told.sums == {("mmicl_data_parts", "neighbours"): 1}


def test_names_are_those_that_ray_makes_of_them():
    assert FIGURES["mmicl_train_steps"].exported("mmicl_train_steps") == "ray_mmicl_train_steps_total"
    assert FIGURES["mmicl_train_loss"].exported("mmicl_train_loss") == "ray_mmicl_train_loss"
