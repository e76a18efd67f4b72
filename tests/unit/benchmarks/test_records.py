from __future__ import annotations

import json
import math

import pytest

from mmicl_core.errors import DataError
from tests.benchmarks.conditions import Conditions
from tests.benchmarks.records import Figures, Records, shown
from tests.unit.benchmarks.made import HERE, THERE, benchmark, measured, records


def test_repetitions_are_kept_as_their_median_and_spread():
    figures = Figures()
    figures.absolute("time", [3.0, 1.0, 2.0, 9.0], "s")
    (time,) = figures.found.values()
    assert (time.value, time.spread, time.repetitions, time.ratio) == (2.5, (1.0, 9.0), 4, False)


def test_one_number_has_no_spread():
    figures = Figures()
    figures.ratio("length", 4.2)
    (length,) = figures.found.values()
    assert (length.value, length.spread, length.repetitions, length.ratio) == (4.2, None, 1, True)


def test_measured_numbers_are_rounded_and_counted_ones_are_not():
    figures = Figures()
    figures.absolute("time", 1 / 3, "s")
    figures.absolute("bytes", 2_039_808, "bytes")
    assert [figure.value for figure in figures.found.values()] == [0.33333, 2_039_808]


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_number_that_is_none_is_refused(value):
    with pytest.raises(ValueError, match="finite"):
        Figures().ratio("speed", value)


@pytest.mark.parametrize(
    ("value", "gate", "why"), [(2.0, 1.0, "no room"), (2.0, -0.5, "no room"), (0.0, 0.8, "cannot gate")]
)
def test_gate_that_could_not_judge_is_refused(value, gate, why):
    with pytest.raises(ValueError, match=why):
        Figures().ratio("speed", value, gate=gate)


def test_figure_is_recorded_once():
    figures = measured(speed=(2.0, None))
    with pytest.raises(AssertionError, match="'speed' is recorded twice"):
        figures.ratio("speed", 3.0)


def test_figures_are_told_in_a_line_each():
    figures = measured(speed=(2.5, None))
    figures.absolute("time to start", [0.1234, 0.2, 0.3], "s")
    assert list(figures.lines()) == [
        "  speed          2.50 times",
        "  time to start  0.200 s  (0.123 to 0.300)",
    ]


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.0, "0"), (5.0, "5"), (0.000123, "0.000123"), (22.53, "22.5"), (999.96, "1,000"), (1573.4, "1,573")],
)
def test_numbers_are_shown_with_three_digits_and_never_fewer_than_before_the_point(value, text):
    assert shown(value) == text


def test_file_holds_what_was_written(tmp_path):
    file = tmp_path / "runs" / "benchmarks.json"
    written = records(fast=benchmark(measured(speed=(2.0, 0.8))), slow=benchmark(Figures(), outcome="failed"))
    written.write(file)
    assert Records.read(file) == written
    assert list(file.parent.iterdir()) == [file]


def test_part_that_is_measured_again_leaves_the_others_as_they_were():
    before = records(fast=benchmark(measured(speed=(2.0, None))), slow=benchmark(measured(speed=(1.0, None))))
    again = benchmark(measured(speed=(3.0, None)), THERE, commit="def")
    after = before.replaced("test_it::test_fast", again, THERE)
    assert after.benchmarks == before.benchmarks | {"test_it::test_fast": again}
    assert after.benchmarks["test_it::test_slow"].commit == "abc"
    assert after.conditions == {HERE.key: HERE, THERE.key: THERE}


def test_conditions_under_which_nothing_is_left_are_dropped():
    before = records(fast=benchmark(Figures()))
    after = before.replaced("test_it::test_fast", benchmark(Figures(), THERE), THERE)
    assert after.conditions == {THERE.key: THERE}


def test_file_that_is_not_there_is_named_with_a_remedy(tmp_path):
    with pytest.raises(DataError, match=r"none\.json cannot be read .*make bench"):
        Records.read(tmp_path / "none.json")


@pytest.mark.parametrize(
    ("change", "where"),
    [
        ({"form": 2}, "form"),
        ({"extra": 1}, "extra"),
        ({"conditions": {}}, "its beginning: .* are named and not told"),
    ],
)
def test_file_of_another_form_is_refused_and_says_where(tmp_path, change, where):
    file = tmp_path / "benchmarks.json"
    told = records(fast=benchmark(Figures())).model_dump(mode="json")
    file.write_text(json.dumps(told | change), encoding="utf-8")
    with pytest.raises(DataError, match=f"has not the form of benchmarks .*{where}.*make bench"):
        Records.read(file)


def test_file_that_is_no_json_is_refused(tmp_path):
    file = tmp_path / "benchmarks.json"
    file.write_bytes(b"\xff{")
    with pytest.raises(DataError, match="has not the form"):
        Records.read(file)


def test_conditions_of_this_machine_name_it_and_its_versions():
    here = Conditions.here()
    assert here.machine.cores >= 1
    assert here.machine.memory_gib > 0
    assert here.versions.keys() == {"python", "torch", "ray", "transformers", "deepspeed", "mmicl"}
    assert here.key == Conditions.here().key != HERE.key


def test_gpus_are_those_that_their_tool_lists(tmp_path, monkeypatch):
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho NVIDIA H200\necho NVIDIA H200\n", encoding="utf-8")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert Conditions.here().machine.gpus == ("NVIDIA H200", "NVIDIA H200")
