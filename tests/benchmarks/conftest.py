"""Benchmarks record what they measure, by the fixture `figures`, in one file: runs/benchmarks.json.

Each benchmark is written as soon as it has ended, also where it failed or was skipped, so that an interrupted
run keeps what it has measured; `--record FILE` names another file. Measured on a quiet machine into
tests/benchmarks/baseline.json, figures become what `tests.benchmarks.compare` holds others against.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator
from datetime import UTC, datetime
from pathlib import Path

import pytest

from mmicl_core.errors import DataError
from pipelines.environment import code_revision
from tests.benchmarks.conditions import Conditions
from tests.benchmarks.records import RESULTS, Benchmark, Figures, Outcome, Records

MARK, QUICK = "bench", "gate"
Phase = tuple[pytest.TestReport, pytest.CallInfo[None]]


class Recorder:
    """Writes benchmarks of this session into a file."""

    def __init__(self, file: Path) -> None:
        self._file, self._conditions, self._commit = file, Conditions.here(), code_revision()
        # What cannot be written to is found out before anything is measured.
        self._known()

    def add(self, item: pytest.Item, phases: list[Phase], figures: Figures) -> None:
        """Write what came of a benchmark."""
        outcome, reason = _ended(phases)
        benchmark = Benchmark(
            outcome=outcome,
            reason=reason,
            date=datetime.now(UTC).replace(microsecond=0),
            commit=self._commit,
            conditions=self._conditions.key,
            seconds=round(sum(report.duration for report, _ in phases), 1),
            quick=item.get_closest_marker(QUICK) is not None,
            figures=figures.found,
        )
        name = f"{item.path.stem}::{item.name}"
        self._known().replaced(name, benchmark, self._conditions).write(self._file)

    def _known(self) -> Records:
        return Records.read(self._file) if self._file.exists() else Records()


RECORDER = pytest.StashKey[Recorder]()
PHASES, FIGURES = pytest.StashKey[list[Phase]](), pytest.StashKey[Figures]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--record", type=Path, default=RESULTS, metavar="FILE", help="where benchmarks write their figures"
    )


def pytest_collection_finish(session: pytest.Session) -> None:
    # Where a session is not told to come here, this file is read after its options.
    file = session.config.getoption("record", RESULTS)
    if any(item.get_closest_marker(MARK) for item in session.items):
        try:
            session.config.stash[RECORDER] = Recorder(file)
        except DataError as error:
            raise pytest.UsageError(str(error)) from error


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    phases = item.stash.setdefault(PHASES, [])
    phases.append((report, call))
    if report.when == "teardown" and item.get_closest_marker(MARK):
        item.config.stash[RECORDER].add(item, phases, item.stash.get(FIGURES, Figures()))
    return report


@pytest.fixture
def figures(request: pytest.FixtureRequest) -> Iterator[Figures]:
    """Takes what a benchmark measures; it is printed when the benchmark has ended."""
    found = request.node.stash[FIGURES] = Figures()
    yield found
    print(f"\n{request.node.name}", *found.lines(), sep="\n")


def _ended(phases: list[Phase]) -> tuple[Outcome, str]:
    """How a benchmark ended, and why it did not pass; a failure in any phase outweighs a skip."""
    worst: tuple[Outcome, Outcome] = ("failed", "skipped")
    for outcome in worst:
        for report, call in phases:
            if report.outcome == outcome and call.excinfo is not None:
                return outcome, call.excinfo.exconly().splitlines()[0]
    return "passed", ""
