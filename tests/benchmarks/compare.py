"""Figures of benchmarks beside those of the baseline, by ratio.

    python -m tests.benchmarks.compare [runs/benchmarks.json] [--baseline FILE] [--quick]

Only ratios that name a gate can regress; figures of a machine are shown, and differ on another one. Ends with
1 where a ratio regressed, and with 2 where something is missing on either side: nothing passes unseen. What a
benchmark itself asserts, it asserts when it is run.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path

from mmicl_core.errors import DataError
from tests.benchmarks.page import sentence
from tests.benchmarks.records import RESULTS, Benchmark, Figure, Records, shown

__all__ = ["BASELINE", "Comparison", "Row", "compare", "main"]

SUMMARY = "Hold figures of benchmarks against the baseline."
BASELINE = Path(__file__).parent / "baseline.json"
HEAD = ("figure", "baseline", "now", "now/baseline", "verdict")
REGRESSED, HOLDS, NEW, NOT_GATED, NOT_MEASURED = "REGRESSED", "holds", "new", "not gated", "not measured"


@dataclass(frozen=True)
class Row:
    """One figure, before and now."""

    figure: str
    baseline: Figure | None
    now: Figure | None
    verdict: str

    @property
    def cells(self) -> tuple[str, ...]:
        """As the table shows it."""
        values = (f"{shown(one.value)} {one.unit}" if one else "" for one in (self.baseline, self.now))
        ratio = ""
        if self.now and self.baseline and self.baseline.value != 0:
            ratio = f"{self.now.value / self.baseline.value:.3f}"
        return self.figure, *values, ratio, self.verdict


@dataclass
class Comparison:
    """All figures, and what keeps some of them from being compared."""

    rows: dict[str, list[Row]] = field(default_factory=dict)
    """Figures of each benchmark."""

    missing: list[str] = field(default_factory=list)
    """What is missing, and where."""

    @property
    def regressed(self) -> bool:
        """Whether a ratio left what its gate allows."""
        return any(row.verdict.startswith(REGRESSED) for rows in self.rows.values() for row in rows)

    def lines(self, now: Records) -> Iterator[str]:
        """The table, under each benchmark its figures."""
        table = {name: [row.cells for row in rows] for name, rows in self.rows.items()}
        widths = [max(map(len, column)) for column in zip(HEAD, *chain(*table.values()), strict=True)]
        yield _line(HEAD, widths)
        for name, rows in table.items():
            benchmark = now.benchmarks[name]
            trouble = f" -- {benchmark.outcome}: {benchmark.reason}" if benchmark.reason else ""
            yield f"{name.partition('::')[0]}: {sentence(name)}{trouble}"
            yield from (_line(row, widths) for row in rows)


def compare(now: Records, baseline: Records, *, quick: bool = False) -> Comparison:
    """Hold figures against those of the baseline.

    Args:
        quick: only the benchmarks that `make bench-gate` runs.
    """
    both = {**baseline.benchmarks, **now.benchmarks}
    wanted = {name: one for name, one in sorted(both.items()) if one.quick or not quick}
    found = Comparison(missing=[] if wanted else ["neither holds a benchmark"])
    for name, benchmark in wanted.items():
        if name not in now.benchmarks:
            found.missing.append(f"{name} was not measured")
            continue
        found.rows[name] = []
        before = baseline.benchmarks[name].figures if name in baseline.benchmarks else {}
        for figure in {**before, **benchmark.figures}:
            _judge(found, name, figure, benchmark, before.get(figure))
    return found


def _judge(found: Comparison, name: str, figure: str, benchmark: Benchmark, before: Figure | None) -> None:
    now = benchmark.figures.get(figure)
    told = now or before
    assert told is not None
    if before is None and told.gate:
        found.missing.append(f"{figure!r} of {name} is gated and not in the baseline")
    elif now is None and (told.gate or benchmark.outcome == "passed"):
        found.missing.append(f"{figure!r} of {name} was not measured")
    elif before is not None and now is not None and before.unit != now.unit:
        found.missing.append(f"{figure!r} of {name} is in {now.unit} and in the baseline in {before.unit}")
    else:
        found.rows[name].append(Row(figure, before, now, _verdict(now, before)))


def _verdict(now: Figure | None, before: Figure | None) -> str:
    if now is None:
        return NOT_MEASURED
    if before is None:
        return NEW
    if now.gate is None:
        return NOT_GATED
    return f"{HOLDS if now.lets_pass(before.value) else REGRESSED} ({now.bounds})"


def _line(cells: Sequence[str], widths: Sequence[int]) -> str:
    name, *middle, verdict = cells
    padded = (cell.rjust(width) for cell, width in zip(middle, widths[1:-1], strict=True))
    return "  ".join(("", name.ljust(widths[0]), *padded, verdict))


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the comparison; gives the exit status."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.compare", description=SUMMARY)
    parser.add_argument("results", nargs="?", type=Path, default=RESULTS)
    parser.add_argument("--baseline", type=Path, default=BASELINE)
    parser.add_argument("--quick", action="store_true", help="only what `make bench-gate` runs")
    given = parser.parse_args(arguments)
    try:
        now, baseline = Records.read(given.results), Records.read(given.baseline)
    except DataError as error:
        print(error, file=sys.stderr)
        return 2
    found = compare(now, baseline, quick=given.quick)
    for side, records in (("baseline", baseline), ("now", now)):
        for conditions in records.conditions.values():
            print(f"{side:<8}  {conditions}")
    print(*found.lines(now), sep="\n")
    if found.missing:
        more = f" (and {len(found.missing) - 1} more)" if len(found.missing) > 1 else ""
        print(
            f"{given.results} cannot be held against {given.baseline}: {found.missing[0]}{more}; "
            "measure all of it with `make bench`, or let what a quiet machine measured be the baseline "
            f"(`cp {given.results} {given.baseline}`)",
            file=sys.stderr,
        )
        return 2
    return int(found.regressed)


if __name__ == "__main__":
    sys.exit(main())
