"""How soon the command line answers.

    make bench

Records the time of `mmicl --help` and of a mistake in a run's settings, as whole processes.
"""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path
from statistics import median

import pytest

from tests.benchmarks.records import Figures

ROOT = Path(__file__).parents[2]
REPETITIONS = 7


@pytest.mark.bench
@pytest.mark.parametrize(
    "arguments", [["--help"], ["train", "--train.steps", "many"]], ids=["help", "a mistake"]
)
def test_command_line_answers_within_a_second(arguments: list[str], figures: Figures) -> None:
    seconds = []
    for _ in range(REPETITIONS):
        start = time.perf_counter()
        command = [sys.executable, "-m", "pipelines.cli", *arguments]
        subprocess.run(command, cwd=ROOT, capture_output=True, check=False, timeout=60)
        seconds.append(time.perf_counter() - start)
    figures.absolute("time to the answer", seconds, "s")
    assert median(seconds) < 1
