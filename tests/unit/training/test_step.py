from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import pytest
import torch
from torch import Tensor

from mmicl_core.config.model import LclConfig
from mmicl_core.data.pictures import PreparedPicture
from mmicl_core.errors import DataError, TrainingError
from mmicl_core.methods.base import ONE_BY_ONE
from mmicl_core.methods.lcl import Lcl
from mmicl_core.training.step import MicroBatch, StepMetrics, mean_loss, train_step
from tests.fakes import PlainEngine, draw_picture, episode_row, tiny_backbone

PICTURES = [f"p{number}" for number in range(7)]
NAMES = ["bako", "mute", "sidu", "goma"]


def _rows() -> list[dict]:
    """Episodes of different lengths and of different numbers of scored tokens."""
    rng = np.random.default_rng(0)
    rows = []
    for number in range(6):
        pictures = list(rng.permutation(PICTURES)[: 3 + 2 * (number % 3)])
        one, other = rng.choice(NAMES, 2, replace=False)
        names = [one, other] * (len(pictures) // 2) + [one]
        rows.append(episode_row(pictures, names))
        for place in range(2, number + 1):
            rows[-1]["turns"][min(place, len(pictures) - 1)]["scored"] = True
    return rows


def _prepared(method: Lcl) -> dict[str, PreparedPicture]:
    pictures = [draw_picture(number) for number in range(len(PICTURES))]
    return dict(zip(PICTURES, method.backbone.prepare(pictures), strict=True))


def _step(sizes: list[int]) -> tuple[StepMetrics, dict[str, Tensor]]:
    method = Lcl(tiny_backbone(), LclConfig())
    pictures = _prepared(method)
    rows = iter(_rows())
    batches = [
        MicroBatch(method.collate([next(rows) for _ in range(size)], pictures, None)) for size in sizes
    ]
    engine = PlainEngine(method, len(batches))
    return train_step(engine, batches, [{}] * len(batches), 1.0), dict(engine.gradients)


def test_gradient_is_equal_for_one_large_and_many_small_micro_batches() -> None:
    whole, expected = _step([6])
    for sizes in ([1] * 6, [4, 2], [1, 5], [2, 2, 2]):
        metrics, gradients = _step(sizes)
        assert metrics.targets == whole.targets
        # Sums of 32-bit gradients of the order of 1, in another order.
        assert metrics.loss == pytest.approx(whole.loss, rel=1e-5)
        assert metrics.gradient_norm == pytest.approx(whole.gradient_norm, rel=1e-4)
        for name, gradient in gradients.items():
            torch.testing.assert_close(gradient, expected[name], atol=1e-5, rtol=1e-3)


def test_loss_is_the_mean_over_all_targets_and_not_over_micro_batches() -> None:
    method = Lcl(tiny_backbone(), LclConfig())
    pictures = _prepared(method)
    nll = torch.cat([method(method.collate([row], pictures, None)).detach() for row in _rows()])
    metrics, _ = _step([5, 1])
    assert metrics.targets == len(nll)
    assert metrics.loss == pytest.approx(float(nll.mean()), rel=1e-5)


def test_a_micro_batch_that_keeps_step_with_others_counts_for_nothing() -> None:
    method = Lcl(tiny_backbone(), LclConfig())
    pictures, rows = _prepared(method), _rows()
    counted = MicroBatch(method.collate(rows[:2], pictures, None))
    beside = MicroBatch(method.collate(rows[2:3], pictures, None), counts=False)
    alone, both = PlainEngine(method), PlainEngine(method, 2)
    one = train_step(alone, [counted], [{}], 0.0)
    two = train_step(both, [counted, beside], [{}, {}], 0.0)
    assert (two.loss, two.targets, two.tokens) == (pytest.approx(one.loss), one.targets, one.tokens)
    for name, gradient in alone.gradients.items():
        torch.testing.assert_close(both.gradients[name], gradient, atol=1e-6, rtol=1e-4)


class _TwoWorkers(PlainEngine):
    """The first of two workers, beside another one that says `others`, exchange after exchange."""

    world_size = 2
    spreads_parameters = True

    def __init__(self, method: Lcl, *others: Sequence[float]) -> None:
        super().__init__(method)
        self._others = iter(others)

    def gather(self, values: Sequence[float]) -> list[list[float]]:
        return [list(values), list(next(self._others))]


def _beside(calls: Mapping[str, int], *others: Sequence[float]) -> tuple[StepMetrics, StepMetrics, int]:
    """The metrics of a step alone, and of the same beside another worker, with the targets of the first."""
    method = Lcl(tiny_backbone(), LclConfig())
    batch = MicroBatch(method.collate(_rows()[:2], _prepared(method), None))
    first = train_step(PlainEngine(method), [batch], [calls], 0.0)
    return first, train_step(_TwoWorkers(method, *others), [batch], [calls], 0.0), batch.scored


def test_gradient_of_a_worker_is_weighted_by_the_targets_of_all_workers() -> None:
    method = Lcl(tiny_backbone(), LclConfig())
    batch = MicroBatch(method.collate(_rows()[:2], _prepared(method), None))
    mine = batch.scored
    alone = PlainEngine(method)
    first = train_step(alone, [batch], [{}], 0.0)
    # The other half scored three times as many targets, with a loss of 1 each.
    beside = _TwoWorkers(method, [3 * mine], [3 * mine, 40])
    metrics = train_step(beside, [batch], [{}], 0.0)
    assert metrics.targets == 4 * mine
    assert metrics.tokens == first.tokens + 40
    assert metrics.loss == pytest.approx((first.loss * mine + 3 * mine) / (4 * mine), rel=1e-5)
    for name, gradient in alone.gradients.items():
        # The engine will average over two workers; a quarter of all targets then weighs a quarter.
        torch.testing.assert_close(beside.gradients[name] / 2, gradient / 4, atol=1e-6, rtol=1e-3)


def test_workers_that_would_call_different_modules_are_stopped_before_they_do() -> None:
    with pytest.raises(TrainingError, match="worker 1 has no pictures where worker 0 has 5"):
        _beside({"pictures": 5}, [7, 0])
    with pytest.raises(TrainingError, match=r"worker 0 has no demonstrations .* worker 1 has 2"):
        _beside({"pictures": 5, "demonstrations": 0}, [7, 3, 2])
    with pytest.raises(TrainingError, match=r"worker 1 has 4 pictures where worker 0 has 5.*each of them"):
        _beside({ONE_BY_ONE: 5}, [7, 4])
    # Whatever they look at, how much of it may differ.
    first, beside, mine = _beside({"pictures": 5}, [7, 1], [0, 0])
    assert beside.targets == first.targets + 7 == mine + 7
    _, beside, mine = _beside({ONE_BY_ONE: 5}, [7, 5], [0, 0])
    assert beside.targets == mine + 7


def test_a_step_of_another_number_of_micro_batches_than_was_agreed_is_refused() -> None:
    method = Lcl(tiny_backbone(), LclConfig())
    batch = MicroBatch(method.collate(_rows()[:2], _prepared(method), None))
    with pytest.raises(TrainingError, match="1 micro-batches of a step in which every worker takes 2"):
        train_step(PlainEngine(method, 2), [batch], [{}], 1.0)


def test_a_step_without_anything_to_score_names_its_episodes() -> None:
    method = Lcl(tiny_backbone(), LclConfig())
    row = _rows()[0]
    for turn in row["turns"]:
        turn["scored"] = False
    batch = MicroBatch(method.collate([row], _prepared(method), None), episodes=("3-17",))
    with pytest.raises(DataError, match="an answer to score.*3-17"):
        train_step(PlainEngine(method), [batch], [{}], 1.0)


class _Infinite(Lcl):
    def forward(self, batch: object) -> Tensor:
        # Infinite, with a gradient that is not.
        return super().forward(batch) + math.inf


def test_an_infinite_loss_updates_nothing_and_names_its_episodes_even_where_its_gradient_is_finite() -> None:
    method = _Infinite(tiny_backbone(), LclConfig())
    batch = MicroBatch(method.collate(_rows()[:2], _prepared(method), None), episodes=("0-1", "0-2"))
    before = {name: p.detach().clone() for name, p in method.trainable().items()}
    metrics = train_step(PlainEngine(method), [batch], [{}], 1.0)
    assert metrics.skipped and metrics.bad_episodes == ("0-1", "0-2")
    assert all(torch.equal(p, before[name]) for name, p in method.trainable().items())


def test_mean_loss_is_that_of_all_targets_of_all_steps_and_takes_no_gradient() -> None:
    method = Lcl(tiny_backbone(), LclConfig())
    pictures = _prepared(method)
    batches = [MicroBatch(method.collate([row], pictures, None)) for row in _rows()]
    nll = torch.cat([method(batch.batch).detach() for batch in batches])
    steps = [([batches[0], batches[1]], [{}, {}]), (batches[2:], [{}] * 4)]
    assert mean_loss(PlainEngine(method), steps) == pytest.approx(float(nll.mean()), rel=1e-5)
    assert all(parameter.grad is None for parameter in method.parameters())
