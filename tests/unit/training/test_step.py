from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from mmicl_core.config.model import LclConfig
from mmicl_core.data.pictures import PreparedPicture
from mmicl_core.methods.lcl import Lcl
from mmicl_core.training.step import StepMetrics, learning_rate, train_step
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
    batches = [method.collate([next(rows) for _ in range(size)], pictures, None) for size in sizes]
    engine = PlainEngine(method)
    return train_step(engine, batches, 1e-3), dict(engine.gradients)


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


class _TwoWorkers(PlainEngine):
    """One of two workers, whose other half scored `targets` targets with a loss of `loss` each."""

    world_size = 2

    def __init__(self, method: Lcl, targets: int, loss: float) -> None:
        super().__init__(method)
        self._others = iter((float(targets), targets * loss))

    def sum_over_workers(self, value: float) -> float:
        return value + next(self._others)


def test_gradient_of_a_worker_is_weighted_by_the_targets_of_all_workers() -> None:
    method = Lcl(tiny_backbone(), LclConfig())
    pictures = _prepared(method)
    batch = method.collate(_rows()[:2], pictures, None)
    mine = batch.num_scored
    alone = PlainEngine(method)
    first = train_step(alone, [batch], 0.0)
    beside = _TwoWorkers(method, targets=3 * mine, loss=1.0)
    metrics = train_step(beside, [batch], 0.0)
    assert metrics.targets == 4 * mine
    assert metrics.loss == pytest.approx((first.loss * mine + 3 * mine) / (4 * mine), rel=1e-5)
    for name, gradient in alone.gradients.items():
        # The engine will average over two workers; a quarter of all targets then weighs a quarter.
        torch.testing.assert_close(beside.gradients[name] / 2, gradient / 4, atol=1e-6, rtol=1e-3)


def test_learning_rate_rises_to_the_peak_and_ends_at_a_hundredth() -> None:
    rates = [learning_rate(step, 100, 10, 1.0) for step in range(101)]
    assert rates[:10] == pytest.approx([(step + 1) / 10 for step in range(10)])
    assert max(rates) == rates[9] == rates[10] == 1.0
    assert rates[100] == pytest.approx(0.01)
    assert rates[55] == pytest.approx((1 + 0.01) / 2)
    assert all(later < earlier for earlier, later in zip(rates[10:], rates[11:], strict=False))
    # The last step that is taken is one step of the cosine before its end.
    assert rates[99] < 0.011


def test_learning_rate_without_warmup_or_without_a_fall_stays_finite() -> None:
    assert learning_rate(0, 10, 0, 1.0) == 1.0
    assert learning_rate(4, 5, 5, 1.0) == 1.0
    assert all(math.isfinite(learning_rate(step, 5, 50, 1.0)) for step in range(5))
