"""Checkpoints of what is trained: full 32-bit parameters and optimiser states, whatever the world size.

A checkpoint is a folder, named by its step, with `state.safetensors` (for each parameter: the value and
the optimiser's moments) and `state.json` (step, names and shapes). Nothing frozen is in it, so it is
small and fits any number of workers. The one before goes only when the next is whole under its own name.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from mmicl_core.data.files import atomic_directory
from mmicl_core.errors import CheckpointError

__all__ = ["Moments", "TrainState", "has_state", "load_state", "save_state"]

TENSORS_FILE = "state.safetensors"
ABOUT_FILE = "state.json"
VALUE = "value"
STEP = "step-{:08d}"
WHOLE = "step-*"


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


def has_state(folder: Path) -> bool:
    """Whether `folder` holds a whole checkpoint."""
    return any(folder.glob(WHOLE))


def save_state(folder: Path, state: TrainState) -> None:
    """Write a checkpoint into `folder`, whole or not at all, and remove what it replaces."""
    tensors = {}
    for name, moments in state.parameters.items():
        for kind, tensor in {VALUE: moments.value, **moments.states}.items():
            tensors[f"{kind}/{name}"] = tensor.detach().cpu().float().contiguous()
    shapes = {name: list(moments.value.shape) for name, moments in state.parameters.items()}
    target = folder / STEP.format(state.step)
    with atomic_directory(target) as temporary:
        save_file(tensors, temporary / TENSORS_FILE)
        about = {"step": state.step, "parameters": shapes}
        (temporary / ABOUT_FILE).write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")
    for other in folder.iterdir():
        # Also what a killed worker left half written.
        if other != target:
            shutil.rmtree(other, ignore_errors=True)


def load_state(folder: Path, shapes: Mapping[str, tuple[int, ...]]) -> TrainState:
    """Read the last checkpoint in `folder`, for parameters of these names and shapes.

    Raises:
        CheckpointError: there is none, or it holds other parameters; names the first that differs.
    """
    newest = max(folder.glob(WHOLE), default=folder)
    try:
        about = json.loads((newest / ABOUT_FILE).read_text(encoding="utf-8"))
        step, found = int(about["step"]), {name: tuple(s) for name, s in about["parameters"].items()}
        tensors = load_file(newest / TENSORS_FILE)
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise CheckpointError(f"checkpoint {newest} cannot be read: {error!r}") from error
    for name in sorted(found.keys() | shapes.keys()):
        if found.get(name) != shapes.get(name):
            raise CheckpointError(
                f"checkpoint {newest} does not fit: {name} is {found.get(name, 'absent')} there and "
                f"{shapes.get(name, 'absent')} in this run; start with another output folder"
            )
    by_name: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        kind, _, name = key.partition("/")
        by_name.setdefault(name, {})[kind] = tensor
    parameters = {name: Moments(kinds.pop(VALUE), kinds) for name, kinds in by_name.items()}
    return TrainState(step, parameters)
