"""What the first worker of a training writes down: metrics, progress, checkpoints."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ray
from safetensors import SafetensorError

from mmicl_core.config.train import TrainConfig
from mmicl_core.data.files import write_atomic
from mmicl_core.errors import TrainingError
from mmicl_core.training.checkpoint import Checkpoints, TrainState
from pipelines.mirror import Mirror
from pipelines.trackers import open_trackers

__all__ = ["CHECKPOINT", "ENGINE_FILE", "METRICS_FILE", "Journal", "checkpoints_in"]

CHECKPOINT = "checkpoint"
METRICS_FILE = "metrics.jsonl"
ENGINE_FILE = "engine.json"
# Not below what goes when training ends.
TRACKED = "tracked"


def checkpoints_in(work: Path, train: TrainConfig) -> Checkpoints:
    """The checkpoints of a run that goes on in `work`."""
    return Checkpoints(work / CHECKPOINT, train.checkpoints.keep_last, train.checkpoints.keep_best)


class Journal:
    """Writes for one run; on workers other than the first it does nothing.

    Args:
        work: folder of what outlives a failure.
        first: steps that are done already.
        counter: shows progress.
    """

    def __init__(
        self, work: Path, first: int, train: TrainConfig, settings: Mapping[str, Any], counter: Any
    ) -> None:
        self._work, self._train, self._counter = work, train, counter
        self._checkpoints = checkpoints_in(work, train)
        self._mirror = Mirror.of(train.checkpoints.mirror, work.name, self._checkpoints)
        self._path = work / METRICS_FILE
        # Steps after the last checkpoint are taken again: their lines go.
        old = self._path.read_text(encoding="utf-8").splitlines() if self._path.exists() else []
        kept = [line for line in old if json.loads(line)["step"] <= first]
        write_atomic(self._path, "".join(line + "\n" for line in kept))
        self._trackers = open_trackers(train.trackers, dict(settings), work.parent / TRACKED, work.stem)
        ray.get(counter.resume.remote(first))

    def describe(self, facts: Mapping[str, Any]) -> None:
        """Keep what is known of the engine, beside what an earlier attempt found."""
        path = self._work / ENGINE_FILE
        known = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        write_atomic(path, json.dumps(known | dict(facts), indent=1) + "\n")

    def count(self, loss: float) -> None:
        """Show that a step is done."""
        self._counter.add.remote(1, f"loss {loss:.3f}")

    def note(self, line: Mapping[str, Any]) -> None:
        """Write down what was measured at `step`."""
        told = {name: None if _is_odd(value) else value for name, value in line.items()}
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(told) + "\n")
        for tracker in self._trackers:
            tracker.log(int(line["step"]), {name: value for name, value in told.items() if value is not None})

    def checkpoint(self, state: TrainState) -> Path:
        """Add a checkpoint.

        Raises:
            TrainingError: it cannot be written; names the last good one.
        """
        last = self._checkpoints.newest()
        try:
            path = self._checkpoints.save(state)
        except (OSError, SafetensorError) as error:
            good = f"the last good checkpoint is {last}" if last else "there is no checkpoint yet"
            raise TrainingError(
                f"the checkpoint of step {state.step} cannot be written to {self._work}: {error}; {good}. "
                "Make room there, then start the same command again: it goes on from the last good "
                "checkpoint"
            ) from error
        self._mirror.send(path)
        return path

    def close(self) -> None:
        """Wait until all steps are counted and everything has arrived."""
        self._mirror.close()
        for tracker in self._trackers:
            tracker.close()
        ray.get(self._counter.add.remote(0))


def _is_odd(value: Any) -> bool:
    return isinstance(value, float) and not math.isfinite(value)
