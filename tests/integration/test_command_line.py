"""`mmicl` as a process of its own, with a real Ray: what it prints, how it ends, what it leaves."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Self

import psutil
import pytest

from tests.fakes import write_corpus

ROOT = Path(__file__).parents[2]
MARK = "MMICL_TEST_MARK"
END_SECONDS = 30
LIMIT_SECONDS = 240
SMALL = [
    "--episodes.stages",
    '[{"episodes": 6, "min_shots": 1, "max_shots": 1}]',
    "--episodes.neighbours",
    "2",
]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> str:
    return str(write_corpus(tmp_path_factory.mktemp("corpus")))


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


def test_episodes_verb_prints_its_manifest_and_leaves_no_process(corpus, tmp_path):
    with Command("episodes", "--corpus.path", corpus, "--output", str(tmp_path), *SMALL) as command:
        code, out, err = command.end()
        assert code == 0, err
        manifest = json.loads(out)
        assert manifest["built"] == 6
        assert Path(manifest["folder"]).parent == tmp_path
        assert "Drawing train episodes: 6 to do" in err
        assert all(
            line.startswith(("Reading the corpus: ", "Drawing train episodes: ")) for line in err.splitlines()
        )
        command.wait_until_nothing_is_left()


def test_interrupted_training_ends_with_130_and_leaves_no_process(corpus, tmp_path):
    endless = ["--backbone.path", "new:nano", "--train.steps", "100000", "--train.global_batch", "2"]
    with Command("train", "--corpus.path", corpus, "--output", str(tmp_path), *SMALL, *endless) as command:
        command.wait_for_line("Training: 100000 to do")
        assert command.descendants()
        command.process.send_signal(signal.SIGINT)
        code, out, err = command.end()
        assert (code, out) == (130, ""), err
        assert "Traceback" not in err
        assert err.splitlines()[-1] == "mmicl: stopped"
        command.wait_until_nothing_is_left()
