"""Figures of benchmarks as a page of Markdown.

python -m tests.benchmarks.page [runs/benchmarks.json [runs/benchmarks.md]]
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path

from mmicl_core.data.files import write_atomic
from mmicl_core.errors import DataError
from tests.benchmarks.conditions import Conditions
from tests.benchmarks.records import RESULTS, Benchmark, Figure, Records, shown

__all__ = ["main", "render", "sentence"]

INTRODUCTION = """# Benchmarks

Where a figure was measured several times, this is the median; the spread goes from the least to the most.
Ratios say the same on any machine. Those with a gate may not fall below, or rise above, a part of the
baseline, `tests/benchmarks/baseline.json`."""
SUMMARY = "Figures of benchmarks as a page of Markdown."
HEAD = ("| figure | median | spread | kind |", "|---|---:|---|---|")


def render(records: Records) -> str:
    """The page, grouped by file and benchmark."""
    several = len(records.conditions) > 1
    lines = [INTRODUCTION, ""]
    for key, conditions in records.conditions.items():
        lines += [*_conditions(key if several else "", conditions), ""]
    for file, group in groupby(records.benchmarks.items(), lambda item: item[0].partition("::")[0]):
        lines += [f"## `tests/benchmarks/{file}.py`", ""]
        for name, benchmark in group:
            lines += [*_section(name, benchmark, several=several), ""]
    return "\n".join(lines)


def sentence(name: str) -> str:
    """The name of a benchmark, as words."""
    test, bracket, case = name.partition("::")[2].partition("[")
    words = test.removeprefix("test_").replace("_", " ")
    return words + (f" ({case.removesuffix(']')})" if bracket else "")


def _conditions(key: str, conditions: Conditions) -> Iterator[str]:
    machine = conditions.machine
    yield f"| conditions {key} | |" if key else "| | |"
    yield "|---|---|"
    yield f"| machine | {_cell(str(machine))} |"
    yield f"| versions | {', '.join(f'{name} {found}' for name, found in conditions.versions.items())} |"


def _section(name: str, benchmark: Benchmark, *, several: bool) -> Iterator[str]:
    yield f"### {sentence(name)}"
    yield ""
    under = f", conditions {benchmark.conditions}" if several else ""
    commit = (benchmark.commit or "unknown").replace("-dirty", " with changes")
    yield (
        f"{benchmark.outcome} in {benchmark.seconds:g} s on {benchmark.date:%Y-%m-%d %H:%M} UTC, "
        f"commit {commit}{under}"
    )
    if benchmark.reason:
        yield ""
        yield f"Why: `{benchmark.reason}`"
    if benchmark.figures:
        yield ""
        yield from HEAD
        yield from (_row(name, figure) for name, figure in benchmark.figures.items())


def _row(name: str, figure: Figure) -> str:
    spread = ""
    if figure.spread:
        least, most = map(shown, figure.spread)
        spread = f"{least} to {most}, {figure.repetitions} times"
    kind = "ratio" if figure.ratio else "of this machine"
    kind += f", gate {figure.bounds}" if figure.gate else ""
    return f"| {_cell(name)} | {shown(figure.value)} {_cell(figure.unit)} | {spread} | {kind} |"


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the page."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.page", description=SUMMARY)
    parser.add_argument("results", nargs="?", type=Path, default=RESULTS)
    parser.add_argument("page", nargs="?", type=Path, default=RESULTS.with_suffix(".md"))
    given = parser.parse_args(arguments)
    try:
        write_atomic(given.page, render(Records.read(given.results)))
    except DataError as error:
        print(error, file=sys.stderr)
        return 2
    print(given.page)
    return 0


if __name__ == "__main__":
    sys.exit(main())
