"""Records of benchmarks that nobody ran."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from tests.benchmarks.conditions import Conditions, Machine
from tests.benchmarks.records import Benchmark, Figures, Records

__all__ = ["HERE", "THERE", "benchmark", "measured", "records"]

HERE = Conditions(machine=Machine(cpu="One", cores=2, memory_gib=8), versions={"python": "3.11.7"})
THERE = Conditions(
    machine=Machine(cpu="Other", cores=16, memory_gib=128, gpus=("H200",)), versions={"python": "3.12.1"}
)


def measured(**ratios: tuple[float, float | None]) -> Figures:
    """Ratios by name, each with its gate."""
    figures = Figures()
    for name, (value, gate) in ratios.items():
        figures.ratio(name, value, gate=gate)
    return figures


def benchmark(figures: Figures, under: Conditions = HERE, **more: Any) -> Benchmark:
    """One that ended on the first of May."""
    told = {"outcome": "passed", "commit": "abc", "seconds": 1.5, "quick": True} | more
    date = datetime(2026, 5, 1, tzinfo=UTC)
    return Benchmark(date=date, conditions=under.key, figures=figures.found, **told)


def records(**benchmarks: Benchmark) -> Records:
    """All of them measured here, in a file of tests called `test_it`."""
    found = Records()
    for name, one in benchmarks.items():
        found = found.replaced(f"test_it::test_{name}", one, HERE)
    return found
