"""How much memory a corpus ten times larger takes: from files to episodes, the whole tree of processes.

    make bench

Records the peak for both sizes, in MiB, and their ratio. Counted is what cannot be dropped:
anonymous and shared memory, shared pages once (the object store among them); pages of files are not.
"""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path

import psutil
import pytest

from mmicl_core.config.run import load_run
from tests.benchmarks.corpora import write_photographs
from tests.benchmarks.records import Figures

ROOT = Path(__file__).parents[2]
SHARDS, PICTURES, TIMES = 2, 500, 10
OBJECT_STORE_BYTES = 100 * 2**20
POLL_SECONDS = 0.2
MOST = 1.15
PROGRAM = """
import sys
from pathlib import Path
import ray
from mmicl_core.config.run import RunConfig
from pipelines.episodes import build_episodes, describe
run, root = RunConfig.model_validate_json(sys.argv[1]), Path(sys.argv[2])
ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False,
         object_store_memory=int(sys.argv[3]))
build_episodes(describe(run, root), run.episodes, root)
"""


class Peak(threading.Thread):
    """Watches a process and all that it started."""

    def __init__(self, process: psutil.Process) -> None:
        super().__init__(daemon=True)
        self._process, self.mebibytes, self._done = process, 0.0, threading.Event()

    def run(self) -> None:
        while not self._done.wait(POLL_SECONDS):
            self.mebibytes = max(self.mebibytes, self._now())

    def end(self) -> float:
        self._done.set()
        self.join()
        return self.mebibytes

    def _now(self) -> float:
        try:
            tree = [self._process, *self._process.children(recursive=True)]
        except psutil.Error:
            return 0.0
        return sum(_held(process.pid) for process in tree) / 1024


def _held(pid: int) -> int:
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text(encoding="utf-8").splitlines()
    except OSError:
        return 0
    sizes = dict(line.split(":") for line in lines if line.startswith(("Pss_Anon", "Pss_Shmem")))
    return sum(int(size.split()[0]) for size in sizes.values())


def peak_of(corpus: Path, root: Path) -> float:
    run = load_run(
        None,
        {
            "corpus": {"path": str(corpus)},
            "neighbours": {"by": "similarity", "image_text": 0, "text_text": 0},
            "embedder": {"type": "vision_tower"},
            "episodes": {"stages": [{"episodes": 4096}]},
        },
    )
    command = [sys.executable, "-c", PROGRAM, run.model_dump_json(), str(root), str(OBJECT_STORE_BYTES)]
    with subprocess.Popen(command, cwd=ROOT, env=os.environ, stderr=subprocess.DEVNULL) as process:
        peak = Peak(psutil.Process(process.pid))
        peak.start()
        assert process.wait() == 0
        return peak.end()


@pytest.mark.bench
def test_memory_does_not_grow_with_the_corpus(tmp_path: Path, figures: Figures) -> None:
    peaks = {}
    for times in (1, TIMES):
        shards = write_photographs(tmp_path / f"{times}", SHARDS * times, PICTURES)
        size = sum(shard.stat().st_size for shard in shards)
        peaks[times] = peak_of(tmp_path / f"{times}", tmp_path / f"run-{times}")
    assert size > OBJECT_STORE_BYTES
    ratio = peaks[TIMES] / peaks[1]
    for times, mebibytes in peaks.items():
        figures.absolute(f"peak, {SHARDS * PICTURES * times:,} pictures", mebibytes, "MiB")
    figures.ratio("peak, ten times as many pictures over as many", ratio)
    assert ratio <= MOST
