from __future__ import annotations

import pytest

from mmicl_core.config.model import AimConfig, LclConfig, SupConConfig
from mmicl_core.methods import METHODS, build_method
from mmicl_core.methods.lcl import Lcl
from tests.fakes import tiny_backbone

ROWS = [{"shots_of_both_classes": shots} for shots in (1, 1, 1, 4, 4, 2, 2, 2, 2, 1)]


def test_first_pass_keeps_the_curriculum_and_later_ones_move_equal_shots_together() -> None:
    method = Lcl(tiny_backbone(), LclConfig())
    assert method.epoch_order(ROWS, 0, seed=0) == list(range(10))
    later = [method.epoch_order(ROWS, epoch, seed=0) for epoch in range(1, 6)]
    for order in later:
        assert sorted(order) == list(range(10))
        assert {tuple(order[n : n + 3]) for n in range(8)} >= {(0, 1, 2)}
        assert {tuple(order[n : n + 4]) for n in range(7)} >= {(5, 6, 7, 8)}
    assert len({tuple(order) for order in later}) > 1
    assert method.epoch_order(ROWS, 1, seed=0) == later[0]


@pytest.mark.parametrize("config", [AimConfig(), LclConfig(), SupConConfig()])
def test_every_method_config_builds_the_method_of_its_row(
    config: AimConfig | LclConfig | SupConConfig,
) -> None:
    assert type(build_method(tiny_backbone(), config)) is METHODS[config.type]
