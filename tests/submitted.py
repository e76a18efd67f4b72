"""Small runs as jobs on a cluster of `tests.nodes`, and what came out of them."""

from __future__ import annotations

import json
import secrets
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Self

import pytest

from mmicl_core.data.files import file_digest
from pipelines.stages import read_manifest
from pipelines.train import METRICS_FILE, RESULT
from tests.fakes import write_corpus, write_materials
from tests.nodes import Cluster

__all__ = [
    "EPISODES",
    "Job",
    "digests",
    "drawing",
    "losses",
    "metrics",
    "parts_made",
    "results",
    "same_training",
    "steps_done",
    "training",
]

POLL_SECONDS = 0.02
END_SECONDS = 400
EPISODES, MANY = 60, 24_000
Flags = Mapping[str, Any]


class Job:
    """`mmicl submit VERB` on the laptop of a cluster, under way; `say` goes on while it does."""

    def __init__(self, cluster: Cluster, log: Path, verb: str, flags: Flags, output: Path) -> None:
        self._cluster, self._path, self.output = cluster, log, output
        self._name = f"job-{secrets.token_hex(4)}"
        given = [verb, "--name", self._name, "--shared", tempfile.gettempdir(), "--output", str(output)]
        for name, value in flags.items():
            given += [f"--{name}", value if isinstance(value, str) else json.dumps(value)]
        with log.open("w", encoding="utf-8") as file:
            self._process = cluster.start_submit(*given, log=file)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._process.poll() is None:
            # A test has failed; those that follow shall not share the cluster with its job.
            self._cluster.submit("stop", self._name)
            self._process.wait(END_SECONDS)

    @property
    def log(self) -> str:
        return self._path.read_text(encoding="utf-8")

    def when(self, is_so: Callable[[], bool], what: str) -> None:
        """Wait for a moment of the job, which it must not end before."""
        deadline = time.monotonic() + END_SECONDS
        while not is_so():
            assert self._process.poll() is None, f"it ended before {what}:\n{self.log}"
            assert time.monotonic() < deadline, f"it never came to {what}:\n{self.log}"
            time.sleep(POLL_SECONDS)

    def end(self) -> list[dict[str, Any]]:
        """What it printed at the end of each of its stages."""
        try:
            code = self._process.wait(END_SECONDS)
        except subprocess.TimeoutExpired:
            pytest.fail(f"it goes on for ever:\n{self.log}")
        assert code == 0, self.log
        return results(self.log)


def results(log: str) -> list[dict[str, Any]]:
    """The JSON documents among the lines of a log."""
    decoder, found, at = json.JSONDecoder(), [], 0
    while (at := log.find("{\n", at)) >= 0:
        result, at = decoder.raw_decode(log, at)
        found.append(result)
    return found


def drawing(folder: Path, *, many: bool = True) -> Flags:
    """The settings of a run that draws episodes: a few, or for long enough to be disturbed."""
    if not (folder / "corpus").is_dir():
        write_corpus(folder / "corpus", shards=8)
    shots = {"min_shots_of_both_classes": 2, "max_shots_of_both_classes": 6}
    return {
        "corpus.path": str(folder / "corpus"),
        "corpus.rows_per_file": 2,
        "corpus.reader.type": "webdataset",
        "episodes.episodes_per_file": 250 if many else 10,
        "episodes.stages": [{"episodes": MANY if many else EPISODES} | shots],
    }


def training(folder: Path, workers: Any, steps: int, checkpoint_every: int = 20) -> Flags:
    """The settings of a run that trains AIM around a tiny backbone with ZeRO-3."""
    if not (folder / "backbone").is_dir():
        write_materials(folder)
    shots = {"min_shots_of_both_classes": 2, "max_shots_of_both_classes": 4}
    return {
        "corpus.path": str(folder / "corpus"),
        "backbone.path": str(folder / "backbone"),
        "episodes.stages": [{"episodes": 6} | shots],
        "method.type": "aim",
        "train.steps": steps,
        "train.global_batch": 4,
        "train.micro_batch": 2,
        "train.learning_rate": 0.01,
        "train.zero.stage": 3,
        "train.num_workers": workers,
        "train.checkpoints.every": checkpoint_every,
        "train.log_every": 1,
    }


def digests(root: Path) -> dict[str, str]:
    """Every file of every stage, hidden ones too: nothing half made may be left."""
    return {str(path.relative_to(root)): file_digest(path) for path in root.rglob("*") if path.is_file()}


def parts_made(root: Path) -> int:
    """Parts that are made, of all stages."""
    notes = sum(1 for _ in root.glob("*.partial/.notes/*.json"))
    for manifest in root.glob("*/_manifest.json"):
        with suppress(FileNotFoundError):
            notes += len(json.loads(manifest.read_text(encoding="utf-8")).get("files", {}))
    return notes


def steps_done(root: Path) -> int:
    """Steps that a training has written down while it goes on."""
    lines = [file.read_text(encoding="utf-8").count("\n") for file in root.glob("train-*.work/metrics.jsonl")]
    return max(lines, default=0)


def metrics(folder: Path) -> list[dict[str, Any]]:
    """What a finished training has written down of each step, each of which it took once."""
    rows = [json.loads(line) for line in (folder / METRICS_FILE).read_text(encoding="utf-8").splitlines()]
    assert [row["step"] for row in rows] == list(range(1, read_manifest(folder)["steps"] + 1))
    return rows


def losses(folder: Path) -> list[float]:
    """The loss of each step of a finished training."""
    return [row["loss"] for row in metrics(folder)]


def same_training(found: Path, wanted: Path) -> None:
    """Both trainings took the same steps to the bit."""
    assert losses(found) == losses(wanted)
    mine, theirs = ((folder / RESULT / "adapter_model.safetensors") for folder in (found, wanted))
    assert mine.read_bytes() == theirs.read_bytes()
