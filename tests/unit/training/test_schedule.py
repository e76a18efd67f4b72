from __future__ import annotations

import pytest

from mmicl_core.config.train import TrainConfig
from mmicl_core.training.schedule import rate_of_step


def _rates(**settings: object) -> list[float]:
    train = TrainConfig.model_validate({"steps": 100, "warmup_steps": 10, **settings})
    return [rate_of_step(step, train) for step in range(101)]


def test_rate_rises_to_the_peak_and_falls_along_a_cosine_to_a_hundredth() -> None:
    rates = _rates()
    assert rates[:10] == pytest.approx([(step + 1) / 10 for step in range(10)])
    assert max(rates) == rates[9] == rates[10] == 1.0
    assert rates[100] == pytest.approx(0.01)
    assert rates[55] == pytest.approx((1 + 0.01) / 2)
    assert all(later < earlier for earlier, later in zip(rates[10:], rates[11:], strict=False))
    # The last step that is taken is one step of the cosine before its end.
    assert rates[99] < 0.011


def test_rate_falls_along_a_line_or_stays_where_asked() -> None:
    line = _rates(schedule="linear", final_rate=0.2)
    assert line[10:] == pytest.approx([1 - 0.8 * step / 90 for step in range(91)])
    assert set(_rates(schedule="constant")[9:]) == {1.0}


def test_rate_without_a_rise_or_without_a_fall_stays_finite() -> None:
    assert _rates(warmup_steps=0)[0] == 1.0
    train = TrainConfig(steps=5, warmup_steps=5)
    assert rate_of_step(4, train) == 1.0
    short = TrainConfig(steps=5, warmup_steps=50)
    assert all(0 < rate_of_step(step, short) < 1 for step in range(5))
