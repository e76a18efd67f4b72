"""Drivers and workers killed while a corpus is read and episodes are drawn: the result is the same bytes.

One kill of each kind runs with the tests, more of them with `make trials`.
"""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from mmicl_core.data.files import file_digest
from tests.commands import Command
from tests.fakes import write_corpus

EPISODES = 6000
SETTINGS = {
    "corpus.rows_per_file": 2,
    "corpus.reader.type": "webdataset",
    "episodes.episodes_per_file": 250,
    "episodes.stages": [
        {"episodes": EPISODES, "min_shots_of_both_classes": 2, "max_shots_of_both_classes": 6}
    ],
}
PARTS_OF_A_RUN = 60
POLL_SECONDS = 0.01
LIMIT_SECONDS = 200


@pytest.fixture(scope="module")
def arguments(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    corpus = write_corpus(tmp_path_factory.mktemp("chaos") / "corpus", shards=8)
    flags = {"corpus.path": str(corpus)} | SETTINGS
    given = ["episodes"]
    for name, value in flags.items():
        given += [f"--{name}", value if isinstance(value, str) else json.dumps(value)]
    return given


@pytest.fixture(scope="module")
def undisturbed(arguments: list[str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    root = tmp_path_factory.mktemp("undisturbed")
    _finish(arguments, root)
    return _digests(root)


def _finish(arguments: list[str], root: Path) -> None:
    with Command(*arguments, "--output", str(root)) as command:
        code, out, err = command.end()
        assert code == 0, err
        manifest = json.loads(out)
        assert manifest["read"] == EPISODES == manifest["built"] + sum(manifest["skipped_by_reason"].values())


def _digests(root: Path) -> dict[str, str]:
    """Every file of every stage, hidden ones too: nothing half made may be left."""
    return {str(path.relative_to(root)): file_digest(path) for path in root.rglob("*") if path.is_file()}


def _done(root: Path) -> int:
    """Parts that are made, of all stages."""
    notes = sum(1 for _ in root.glob("*.partial/.notes/*.json"))
    for manifest in root.glob("*/_manifest.json"):
        notes += len(json.loads(manifest.read_text(encoding="utf-8"))["files"])
    return notes


def _kill_when(command: Command, root: Path, parts: int, victims: Callable[[], list[psutil.Process]]) -> bool:
    """Kill one victim once so many parts are made; False if the run ended before."""
    deadline = time.monotonic() + LIMIT_SECONDS
    while command.process.poll() is None and time.monotonic() < deadline:
        if _done(root) >= parts and (found := victims()):
            found[0].kill()
            return True
        time.sleep(POLL_SECONDS)
    return False


def _workers(command: Command) -> list[psutil.Process]:
    found = []
    for process in psutil.Process(command.process.pid).children(recursive=True):
        try:
            title = process.cmdline()[:1]
        except psutil.Error:
            continue
        if title and title[0].startswith("ray::MapBatches"):
            found.append(process)
    return found


@pytest.mark.timeout(900)
@pytest.mark.parametrize("seed", [0, *(pytest.param(n, marks=pytest.mark.trial) for n in range(1, 6))])
def test_run_whose_driver_is_killed_reuse_finished_by_the_next_with_the_same_bytes(
    arguments: list[str], undisturbed: dict[str, str], tmp_path: Path, seed: int
) -> None:
    rng = random.Random(seed)
    kills = 0
    for moment in sorted(rng.sample(range(1, PARTS_OF_A_RUN), 1 if seed == 0 else 3)):
        with Command(*arguments, "--output", str(tmp_path)) as command:
            kills += _kill_when(
                command,
                tmp_path,
                moment,
                lambda: [psutil.Process(command.process.pid)],  # noqa: B023
            )
            command.wait_until_nothing_is_left()
    assert kills
    _finish(arguments, tmp_path)
    assert _digests(tmp_path) == undisturbed


@pytest.mark.timeout(900)
@pytest.mark.parametrize("seed", [0, *(pytest.param(n, marks=pytest.mark.trial) for n in range(1, 6))])
def test_run_whose_worker_is_killed_goes_on_and_ends_with_the_same_bytes(
    arguments: list[str], undisturbed: dict[str, str], tmp_path: Path, seed: int
) -> None:
    moment = random.Random(seed).randrange(1, PARTS_OF_A_RUN)
    with Command(*arguments, "--output", str(tmp_path)) as command:
        assert _kill_when(command, tmp_path, moment, lambda: _workers(command))
        code, _, err = command.end()
        assert code == 0, err
    assert _digests(tmp_path) == undisturbed
