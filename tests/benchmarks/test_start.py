"""How soon the command line answers.

    make bench

Prints the median time of `mmicl --help` and of a mistake in a run's settings, as whole processes.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from statistics import median

import pytest

ROOT = Path(__file__).parents[2]
REPETITIONS = 7


@pytest.mark.bench
@pytest.mark.parametrize("arguments", [["--help"], ["train", "--train.steps", "many"]])
def test_command_line_answers_within_a_second(arguments):
    seconds = []
    for _ in range(REPETITIONS):
        start = time.perf_counter()
        command = [sys.executable, "-m", "pipelines.cli", *arguments]
        subprocess.run(command, cwd=ROOT, capture_output=True, check=False, timeout=60)
        seconds.append(time.perf_counter() - start)
    print(json.dumps({"command": " ".join(arguments), "median_seconds": round(median(seconds), 3)}))
    assert median(seconds) < 1
