"""`mmicl` as a process of its own, with everything that it starts under watch."""

from __future__ import annotations

import os
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Self

import psutil
import pytest

__all__ = ["Command"]

ROOT = Path(__file__).parents[1]
MARK = "MMICL_TEST_MARK"
END_SECONDS = 30
LIMIT_SECONDS = 240


class Command:
    """A `mmicl` process whose descendants can be told by a mark in their environment."""

    def __init__(self, *arguments: str, **environment: str) -> None:
        self._mark = uuid.uuid4().hex
        self.process = subprocess.Popen(
            [sys.executable, "-m", "pipelines.cli", *arguments],
            cwd=ROOT,
            env=os.environ | environment | {MARK: self._mark},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.process.terminate()
        # Waits for the end and closes the pipes.
        self.process.__exit__(None, None, None)

    def end(self) -> tuple[int, str, str]:
        out, err = self.process.communicate(timeout=LIMIT_SECONDS)
        return self.process.returncode, out, err

    def wait_for_line(self, text: str) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            if text in line:
                return
        pytest.fail(f"it ended without saying {text!r}")

    def descendants(self) -> list[str]:
        return [process.name() for process in self._marked()]

    def _marked(self) -> Iterator[psutil.Process]:
        for process in psutil.process_iter():
            try:
                if process.environ().get(MARK) == self._mark and process.status() != psutil.STATUS_ZOMBIE:
                    yield process
            except (psutil.NoSuchProcess, psutil.AccessDenied):
                continue

    def wait_until_nothing_is_left(self) -> None:
        # Ray's processes notice the end of their parent one after another.
        deadline = time.monotonic() + END_SECONDS
        while (left := self.descendants()) and time.monotonic() < deadline:
            time.sleep(0.2)
        assert left == []
