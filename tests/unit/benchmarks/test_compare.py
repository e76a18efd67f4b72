from __future__ import annotations

import pytest

from tests.benchmarks.compare import BASELINE, compare, main
from tests.benchmarks.records import Figures, Records
from tests.unit.benchmarks.made import benchmark, measured, records


def verdicts(now: Records, baseline: Records) -> list[str]:
    return [row.verdict for rows in compare(now, baseline).rows.values() for row in rows]


def one(value: float, gate: float | None) -> Records:
    return records(fast=benchmark(measured(speed=(value, gate))))


@pytest.mark.parametrize(
    ("now", "gate", "verdict"),
    [
        (1.6, 0.8, "holds (at least 0.8 of the baseline)"),
        (1.59, 0.8, "REGRESSED (at least 0.8 of the baseline)"),
        (9.0, 0.8, "holds (at least 0.8 of the baseline)"),
        (2.2, 1.1, "holds (at most 1.1 of the baseline)"),
        (2.21, 1.1, "REGRESSED (at most 1.1 of the baseline)"),
        (0.1, 1.1, "holds (at most 1.1 of the baseline)"),
        (0.1, None, "not gated"),
    ],
)
def test_ratio_is_judged_by_the_gate_that_it_names_now(now, gate, verdict):
    assert verdicts(one(now, gate), one(2.0, 0.99)) == [verdict]


def test_figures_of_a_machine_are_shown_and_never_judged():
    slow, fast = Figures(), Figures()
    slow.absolute("time", 60.0, "s")
    fast.absolute("time", 1.0, "s")
    found = compare(records(it=benchmark(slow)), records(it=benchmark(fast)))
    ((row,),) = found.rows.values()
    assert row.cells == ("time", "1 s", "60 s", "60.000", "not gated")
    assert not found.regressed


def test_figure_that_the_baseline_lacks_is_new_unless_it_gates():
    found = compare(one(2.0, None), records(fast=benchmark(Figures())))
    assert [row.verdict for rows in found.rows.values() for row in rows] == ["new"]
    assert found.missing == []
    (missing,) = compare(one(2.0, 0.8), records()).missing
    assert missing == "'speed' of test_it::test_fast is gated and not in the baseline"


def test_benchmark_and_figure_that_were_not_measured_are_missing():
    assert compare(records(), one(2.0, None)).missing == ["test_it::test_fast was not measured"]
    less = records(fast=benchmark(Figures()))
    assert compare(less, one(2.0, None)).missing == ["'speed' of test_it::test_fast was not measured"]


@pytest.mark.parametrize("outcome", ["failed", "skipped"])
def test_benchmark_that_did_not_pass_tells_why_and_may_lack_what_does_not_gate(outcome):
    now = records(fast=benchmark(Figures(), outcome=outcome, reason="no second core"))
    found = compare(now, one(2.0, None))
    assert found.missing == []
    assert f"test_it: fast -- {outcome}: no second core" in found.lines(now)
    assert [row.verdict for rows in found.rows.values() for row in rows] == ["not measured"]
    assert compare(now, one(2.0, 0.8)).missing == ["'speed' of test_it::test_fast was not measured"]


def test_figure_in_another_unit_is_not_compared():
    seconds, milliseconds = Figures(), Figures()
    seconds.absolute("time", 1.0, "s")
    milliseconds.absolute("time", 1.0, "ms")
    (missing,) = compare(records(it=benchmark(seconds)), records(it=benchmark(milliseconds))).missing
    assert missing == "'time' of test_it::test_it is in s and in the baseline in ms"


def test_quick_comparison_leaves_out_what_takes_long():
    slow = benchmark(measured(speed=(2.0, 0.8)), quick=False)
    fast = benchmark(measured(speed=(2.0, 0.8)))
    found = compare(records(fast=fast), records(fast=fast, slow=slow), quick=True)
    assert (list(found.rows), found.missing) == (["test_it::test_fast"], [])


def test_two_files_without_benchmarks_are_no_comparison():
    assert compare(records(), records()).missing == ["neither holds a benchmark"]


@pytest.fixture
def status(tmp_path):
    """The exit status of comparing two records."""

    def run(now: Records, baseline: Records) -> int:
        files = tmp_path / "now.json", tmp_path / "baseline.json"
        now.write(files[0])
        baseline.write(files[1])
        return main([str(files[0]), "--baseline", str(files[1])])

    return run


def test_comparison_in_which_everything_holds_ends_with_zero(status, capsys):
    assert status(one(1.9, 0.8), one(2.0, 0.8)) == 0
    assert capsys.readouterr().out.splitlines() == [
        "baseline  One, 2 cores, 8 GiB, no GPU; python 3.11.7",
        "now       One, 2 cores, 8 GiB, no GPU; python 3.11.7",
        "  figure  baseline         now  now/baseline  verdict",
        "test_it: fast",
        "  speed    2 times  1.90 times         0.950  holds (at least 0.8 of the baseline)",
    ]


def test_regression_ends_with_one(status, capsys):
    assert status(one(1.0, 0.8), one(2.0, 0.8)) == 1
    assert "REGRESSED" in capsys.readouterr().out


def test_what_is_missing_ends_with_two_and_a_sentence(status, tmp_path, capsys):
    two = records(fast=benchmark(Figures()), slow=benchmark(Figures()))
    assert status(records(), two) == 2
    told = capsys.readouterr().err
    assert told.count("\n") == 1
    assert "test_it::test_fast was not measured (and 1 more)" in told
    assert "`make bench`" in told
    assert f"`cp {tmp_path / 'now.json'} {tmp_path / 'baseline.json'}`" in told


def test_baseline_that_is_committed_has_a_gate_in_every_quick_benchmark():
    baseline = Records.read(BASELINE)
    found = compare(baseline, baseline, quick=True)
    assert (found.missing, found.regressed) == ([], False)
    assert all(any(row.verdict != "not gated" for row in rows) for rows in found.rows.values())


@pytest.mark.parametrize("baseline", [None, "[]"])
def test_baseline_that_cannot_be_read_ends_with_two_and_a_sentence(tmp_path, capsys, baseline):
    one(2.0, None).write(tmp_path / "now.json")
    if baseline is not None:
        (tmp_path / "baseline.json").write_text(baseline, encoding="utf-8")
    given = [str(tmp_path / "now.json"), "--baseline", str(tmp_path / "baseline.json")]
    assert main(given) == 2
    told = capsys.readouterr()
    assert told.out == ""
    assert told.err.startswith(str(tmp_path / "baseline.json"))
    assert told.err.count("\n") == 1
