from __future__ import annotations

import pytest
import torch

from mmicl_core.config.model import AimConfig, LclConfig
from mmicl_core.methods import build_method
from mmicl_core.training.flops import arithmetic_of, peak_of_device
from tests.fakes import tiny_backbone

# Of each of two layers: four square matrices of attention, three of 32 by 64, two norms; and the last norm.
LAYERS = 2 * (4 * 32 * 32 + 3 * 32 * 64 + 2 * 32) + 32


@pytest.mark.parametrize(("recomputes", "passes"), [(False, 2), (True, 3)])
def test_frozen_model_takes_two_operations_of_a_parameter_each_way_and_again(
    recomputes: bool, passes: int
) -> None:
    method = build_method(tiny_backbone(), AimConfig())
    found = arithmetic_of(method, recomputes=recomputes)
    assert found.position == 2 * passes * LAYERS
    words = method.backbone.model.get_input_embeddings().weight
    assert found.target == 4 * words.numel()
    assert found.of(10, 3) == 10 * found.position + 3 * found.target


def test_trained_model_takes_two_more_for_its_own_gradient() -> None:
    method = build_method(tiny_backbone(), LclConfig())
    assert arithmetic_of(method, recomputes=False).position == 6 * LAYERS


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA A10G", 70e12),
        ("Tesla T4", None),
    ],
)
def test_peak_is_that_of_the_device_by_its_name(
    name: str, peak: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: name)
    assert peak_of_device() == peak


def test_machine_without_a_gpu_has_no_known_peak() -> None:
    assert torch.cuda.is_available() or peak_of_device() is None
