"""Checkpoints of what is trained: full 32-bit parameters and optimiser states, whatever the world size.

A checkpoint is `state.safetensors` (for each parameter: the value and the optimiser's moments) and
`state.json` (step, names and shapes). Nothing frozen is in it, so it is small and fits any number of
workers.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from mmicl_core.data.files import atomic_directory
from mmicl_core.errors import CheckpointError

__all__ = ["Moments", "TrainState", "load_state", "save_state"]

TENSORS_FILE = "state.safetensors"
ABOUT_FILE = "state.json"
VALUE = "value"


@dataclass(frozen=True)
class Moments:
    """One parameter with its optimiser states by name, all of full size and 32 bits."""

    value: Tensor
    states: Mapping[str, Tensor]


@dataclass(frozen=True)
class TrainState:
    """Where a run stands after `step` optimiser steps."""

    step: int
    parameters: Mapping[str, Moments]


def save_state(folder: Path, state: TrainState) -> None:
    """Write a checkpoint, whole or not at all."""
    tensors = {}
    for name, moments in state.parameters.items():
        for kind, tensor in {VALUE: moments.value, **moments.states}.items():
            tensors[f"{kind}/{name}"] = tensor.detach().cpu().float().contiguous()
    shapes = {name: list(moments.value.shape) for name, moments in state.parameters.items()}
    with atomic_directory(folder) as target:
        save_file(tensors, target / TENSORS_FILE)
        about = {"step": state.step, "parameters": shapes}
        (target / ABOUT_FILE).write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")


def load_state(folder: Path, shapes: Mapping[str, tuple[int, ...]]) -> TrainState:
    """Read a checkpoint for parameters of these names and shapes.

    Raises:
        CheckpointError: it holds other parameters; names the first that differs.
    """
    try:
        about = json.loads((folder / ABOUT_FILE).read_text(encoding="utf-8"))
        step, found = int(about["step"]), {name: tuple(s) for name, s in about["parameters"].items()}
        tensors = load_file(folder / TENSORS_FILE)
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise CheckpointError(f"checkpoint {folder} cannot be read: {error!r}") from error
    for name in sorted(found.keys() | shapes.keys()):
        if found.get(name) != shapes.get(name):
            raise CheckpointError(
                f"checkpoint {folder} does not fit: {name} is {found.get(name, 'absent')} there and "
                f"{shapes.get(name, 'absent')} in this run; start with another output folder"
            )
    by_name: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        kind, _, name = key.partition("/")
        by_name.setdefault(name, {})[kind] = tensor
    parameters = {name: Moments(kinds.pop(VALUE), kinds) for name, kinds in by_name.items()}
    return TrainState(step, parameters)
