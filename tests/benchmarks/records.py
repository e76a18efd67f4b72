"""What benchmarks measured, as one file: figures, how each benchmark ended, when, of which commit, and where.

    {"form": 1,
     "conditions": {"3f2a9c1e": {"machine": {"cpu": ...}, "versions": {"python": ...}}},
     "benchmarks": {"test_scale::test_rows...": {"outcome": "passed", "conditions": "3f2a9c1e",
                                                 "figures": {"bytes of a row": {"value": ...}}}}}

A benchmark replaces what the file holds of it and nothing else, so that a part can be measured again. What
stays keeps its own date, commit and conditions.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import Literal, Self

from pydantic import AwareDatetime, BaseModel, ConfigDict, ValidationError, model_validator

from mmicl_core.data.files import write_atomic
from mmicl_core.errors import DataError
from tests.benchmarks.conditions import Conditions

__all__ = ["RESULTS", "ROOT", "Benchmark", "Figure", "Figures", "Outcome", "Records", "shown"]

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "runs" / "benchmarks.json"
DIGITS = 5
Outcome = Literal["passed", "failed", "skipped"]


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Figure(_Strict):
    """One number that was measured: the median where it was measured several times."""

    value: float
    unit: str
    ratio: bool
    """It says the same on any machine; what does not never gates."""

    gate: float | None = None
    """Below 1, how much of the baseline's value it may fall to; above 1, what it may rise to."""

    spread: tuple[float, float] | None = None
    """The least and the most of its repetitions."""

    repetitions: int = 1

    @model_validator(mode="after")
    def _gates_by_a_ratio(self) -> Self:
        if self.gate is None:
            return self
        if not self.ratio:
            raise ValueError(f"a figure in {self.unit} gates ({self.gate}): only ratios hold on any machine")
        if self.gate <= 0 or self.gate == 1:
            raise ValueError(
                f"gate {self.gate} leaves no room for noise: below 1 it is a floor, above a roof"
            )
        if self.value <= 0:
            raise ValueError(f"{self.value} cannot gate: nothing is a share of it")
        return self

    @property
    def bounds(self) -> str:
        """What the gate lets pass, in words."""
        if self.gate is None:
            return ""
        return f"at {'least' if self.gate < 1 else 'most'} {self.gate:g} of the baseline"

    def lets_pass(self, baseline: float) -> bool:
        """Whether it is within what its gate allows of the baseline."""
        if self.gate is None:
            return True
        allowed = self.gate * baseline
        return self.value >= allowed if self.gate < 1 else self.value <= allowed

    def __str__(self) -> str:
        spread = f"  ({shown(self.spread[0])} to {shown(self.spread[1])})" if self.spread else ""
        return f"{shown(self.value)} {self.unit}{spread}"


class Figures:
    """What a benchmark has measured so far, by name."""

    def __init__(self) -> None:
        self.found: dict[str, Figure] = {}

    def absolute(self, name: str, values: float | Sequence[float], unit: str) -> None:
        """Keep a figure that belongs to this machine.

        Args:
            values: one number, or all repetitions.
        """
        self._keep(name, values, unit, ratio=False, gate=None)

    def ratio(
        self, name: str, values: float | Sequence[float], unit: str = "times", gate: float | None = None
    ) -> None:
        """Keep a figure that says the same on any machine.

        Args:
            values: one number, or all repetitions.
            gate: below 1, how much of the baseline's value it may fall to; above 1, what it may rise to. Only
                for what is stable on two cores that others use too.
        """
        self._keep(name, values, unit, ratio=True, gate=gate)

    def _keep(
        self, name: str, values: float | Sequence[float], unit: str, *, ratio: bool, gate: float | None
    ) -> None:
        assert name not in self.found, f"{name!r} is recorded twice"
        all_of_them = [values] if isinstance(values, int | float) else list(values)
        self.found[name] = Figure(
            value=_rounded(median(all_of_them)),
            unit=unit,
            ratio=ratio,
            gate=gate,
            spread=(_rounded(min(all_of_them)), _rounded(max(all_of_them))) if len(all_of_them) > 1 else None,
            repetitions=len(all_of_them),
        )

    def lines(self) -> Iterator[str]:
        """For people, one line a figure."""
        width = max(map(len, self.found), default=0)
        for name, figure in self.found.items():
            yield f"  {name:<{width}}  {figure}"


class Benchmark(_Strict):
    """How one benchmark ended, and what it measured until then."""

    outcome: Outcome
    reason: str = ""
    """Why it did not pass."""

    date: AwareDatetime
    commit: str | None
    """None outside of a checkout."""

    conditions: str
    """Key of what it ran under."""

    seconds: float
    quick: bool
    """Whether `make bench-gate` runs it."""

    figures: dict[str, Figure]


class Records(_Strict):
    """All that was measured."""

    form: Literal[1] = 1
    conditions: dict[str, Conditions] = {}
    benchmarks: dict[str, Benchmark] = {}

    @model_validator(mode="after")
    def _conditions_are_told(self) -> Self:
        unknown = {one.conditions for one in self.benchmarks.values()} - self.conditions.keys()
        if unknown:
            raise ValueError(f"conditions {sorted(unknown)} are named and not told")
        return self

    @classmethod
    def read(cls, file: Path) -> Records:
        """Read a file.

        Raises:
            DataError: there is none, or it has another form.
        """
        try:
            return cls.model_validate_json(file.read_bytes())
        except OSError as error:
            raise DataError(
                f"{file} cannot be read ({error.strerror}): measure with `make bench`, or name another file"
            ) from error
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"])) or "its beginning"
            raise DataError(
                f"{file} has not the form of benchmarks ({where}: {first['msg']}): "
                "measure anew with `make bench`"
            ) from error

    def replaced(self, name: str, benchmark: Benchmark, conditions: Conditions) -> Records:
        """With this benchmark in the place of what was known of it, under these conditions."""
        benchmarks = dict(sorted({**self.benchmarks, name: benchmark}.items()))
        used = {one.conditions for one in benchmarks.values()}
        known = {**self.conditions, conditions.key: conditions}
        return Records(conditions={key: known[key] for key in sorted(used)}, benchmarks=benchmarks)

    def write(self, file: Path) -> None:
        """Write the file, whole or not at all."""
        text = json.dumps(self.model_dump(mode="json", exclude_none=True), indent=1, ensure_ascii=False)
        write_atomic(file, text + "\n")


def shown(value: float) -> str:
    """Three digits, and all of those before the point; numbers that are whole stay so."""
    if value.is_integer():
        return f"{value:,.0f}"
    return f"{value:,.{max(0, 2 - math.floor(math.log10(abs(value))))}f}"


def _rounded(value: float) -> float:
    # What was counted stays as it is.
    return value if float(value).is_integer() else float(f"{value:.{DIGITS}g}")
