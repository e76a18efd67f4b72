"""Kills the workers of a training as it goes."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from pathlib import Path

import psutil

__all__ = ["WORKER", "Killer", "processes_called", "workers_of_training"]

WORKER = "ray::RayTrainWorker"
POLL_SECONDS = 0.02


class Killer(threading.Thread):
    """Kills one worker of the training below `root` each time that many steps are written down."""

    def __init__(self, root: Path, steps: Sequence[int]) -> None:
        super().__init__(daemon=True)
        self._root, self._steps, self.killed = root, list(steps), 0

    def run(self) -> None:
        while self._steps:
            if self._done() >= self._steps[0] and (workers := workers_of_training()):
                workers[self.killed % len(workers)].kill()
                self._steps.pop(0)
                self.killed += 1
            time.sleep(POLL_SECONDS)

    def _done(self) -> int:
        lines = [file.read_text(encoding="utf-8").count("\n") for file in self._root.glob("*.work/*.jsonl")]
        return max(lines, default=0)


def workers_of_training() -> list[psutil.Process]:
    """The processes below this one that train."""
    return processes_called(WORKER)


def processes_called(name: str) -> list[psutil.Process]:
    """The processes below this one of that name."""
    found = []
    for process in psutil.Process().children(recursive=True):
        try:
            if process.cmdline()[:1] == [name]:
                found.append(process)
        except psutil.Error:
            continue
    return found
