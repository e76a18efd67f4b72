"""Floating-point operations of a step, and what share of the hardware's they are.

A matrix of P parameters takes 2 P operations of a token forward, 2 P to pass a gradient through and 2 P for
its own gradient (Kaplan et al., arXiv:2001.08361, section 2.1); a frozen one has none of its own. Counted are
the language model's matrices at every position of the prompts, padding left out, and the head at scored
positions. Not counted: attention's own products, which grow with the square of the length, the vision tower,
and what is read under `no_grad`; so the share is a lower bound.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from mmicl_core.methods.base import Method

__all__ = ["Arithmetic", "arithmetic_of", "peak_of_device"]

# Dense bf16 operations a second, by a part of the name that CUDA gives; from the makers' data sheets. Longer
# names first, as one may lie in another.
PEAKS = {
    "H100 PCIe": 756e12,
    "RTX 4090": 165e12,
    "A100": 312e12,
    "A10G": 70e12,
    "B200": 2250e12,
    "H100": 989e12,
    "H200": 989e12,
    "L40S": 362e12,
    "A10": 125e12,
    "L4": 121e12,
}


@dataclass(frozen=True)
class Arithmetic:
    """Operations of one token, forward and back."""

    position: float
    """Of a position of a prompt."""
    target: float
    """Of a scored position beside that."""

    def of(self, tokens: int, targets: int) -> float:
        """Operations of a step."""
        return self.position * tokens + self.target * targets


def arithmetic_of(method: Method, *, recomputes: bool) -> Arithmetic:
    """What a method computes, by its parameters; spread ones count whole.

    Args:
        recomputes: layers are computed again on the way back.
    """
    backbone = method.backbone
    words = {id(p) for m in backbone.model.modules() if isinstance(m, nn.Embedding) for p in m.parameters()}
    body = [p for _, p in backbone.role_parameters("language_model") if id(p) not in words]
    head = list(backbone.head.parameters())
    passes = 3 if recomputes else 2
    position = 2 * passes * _count(body) + 2 * _count(p for p in body if p.requires_grad)
    target = 4 * _count(head) + 2 * _count(p for p in head if p.requires_grad)
    return Arithmetic(float(position), float(target))


def peak_of_device() -> float | None:
    """Dense bf16 operations a second of this process's GPU; None where there is none, or an unknown one."""
    if not torch.cuda.is_available():
        return None
    name = torch.cuda.get_device_name()
    return next((peak for part, peak in PEAKS.items() if part in name), None)


def _count(parameters: Iterable[Any]) -> int:
    return sum(int(getattr(p, "ds_numel", p.numel())) for p in parameters)
