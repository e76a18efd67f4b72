"""Checkpoints of what is trained: full 32-bit parameters and optimiser states, whatever the world size.

A checkpoint is a folder, named by its step, with `state.safetensors` (for each parameter: the value and the
optimiser's moments) and `state.json` (step, names and shapes, and where the run stood). Nothing frozen is in
it, so it is small and fits any number of workers. One that is replaced goes only when the next is whole under
its own name.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from mmicl_core.data.files import atomic_directory
from mmicl_core.errors import CheckpointError

__all__ = ["ABOUT_FILE", "TENSORS_FILE", "Checkpoints", "Moments", "TrainState", "load_state"]

TENSORS_FILE = "state.safetensors"
ABOUT_FILE = "state.json"
VALUE = "value"
STEP = "step-{:08d}"
WHOLE = "step-*"
SCORE = "validation_loss"


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
    facts: Mapping[str, Any] = field(default_factory=dict)
    """Whatever else decides how it goes on, in plain values: `validation_loss` where it was measured."""


class Checkpoints:
    """The checkpoints of one run: the newest ones, and those of lowest validation loss.

    Args:
        folder: where they lie; it need not exist.
        keep_last: newest ones that stay.
        keep_best: best ones that stay beside them.
    """

    def __init__(self, folder: Path, keep_last: int = 1, keep_best: int = 1) -> None:
        self.folder, self._keep_last, self._keep_best = folder, keep_last, keep_best

    def newest(self) -> Path | None:
        """The last whole checkpoint."""
        return max(self.folder.glob(WHOLE), default=None)

    def best(self) -> Path | None:
        """The one of lowest validation loss, the earlier of two alike; the newest where none was measured."""
        by_loss = self._by_loss()
        return by_loss[0] if by_loss else self.newest()

    def save(self, state: TrainState) -> Path:
        """Write a checkpoint, whole or not at all, and remove what it replaces. Raises OSError."""
        tensors = {}
        for name, moments in state.parameters.items():
            for kind, tensor in {VALUE: moments.value, **moments.states}.items():
                tensors[f"{kind}/{name}"] = tensor.detach().cpu().float().contiguous()
        shapes = {name: list(moments.value.shape) for name, moments in state.parameters.items()}
        target = self.folder / STEP.format(state.step)
        with atomic_directory(target) as temporary:
            save_file(tensors, temporary / TENSORS_FILE)
            about = {"step": state.step, "facts": dict(state.facts), "parameters": shapes}
            (temporary / ABOUT_FILE).write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")
        self._tidy()
        return target

    def _tidy(self) -> None:
        kept = {*sorted(self.folder.glob(WHOLE))[-self._keep_last :], *self._by_loss()[: self._keep_best]}
        for other in self.folder.iterdir():
            # Also what a killed worker left half written.
            if other not in kept:
                shutil.rmtree(other, ignore_errors=True)

    def _by_loss(self) -> list[Path]:
        losses = {path: _read_about(path).get("facts", {}).get(SCORE) for path in self.folder.glob(WHOLE)}
        measured = {path: loss for path, loss in losses.items() if loss is not None and math.isfinite(loss)}
        return sorted(measured, key=lambda path: (measured[path], path))


def load_state(checkpoint: Path, shapes: Mapping[str, tuple[int, ...]]) -> TrainState:
    """Read a checkpoint, for parameters of these names and shapes.

    Raises:
        CheckpointError: it cannot be read, or holds other parameters; names the first that differs.
    """
    about = _read_about(checkpoint)
    try:
        step, found = int(about["step"]), {name: tuple(s) for name, s in about["parameters"].items()}
        tensors = load_file(checkpoint / TENSORS_FILE)
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise CheckpointError(f"checkpoint {checkpoint} cannot be read: {error!r}") from error
    for name in sorted(found.keys() | shapes.keys()):
        if found.get(name) != shapes.get(name):
            raise CheckpointError(
                f"checkpoint {checkpoint} does not fit: {name} is {found.get(name, 'absent')} there and "
                f"{shapes.get(name, 'absent')} in this run; start with another output folder"
            )
    by_name: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        kind, _, name = key.partition("/")
        by_name.setdefault(name, {})[kind] = tensor
    parameters = {name: Moments(kinds.pop(VALUE), kinds) for name, kinds in by_name.items()}
    return TrainState(step, parameters, about.get("facts", {}))


def _read_about(checkpoint: Path) -> dict[str, Any]:
    try:
        about: dict[str, Any] = json.loads((checkpoint / ABOUT_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"checkpoint {checkpoint} cannot be read: {error!r}") from error
    return about
