from __future__ import annotations

import ast
from pathlib import Path

import pytest

from pipelines.environment import code_revision
from tests.benchmarks.records import Records

pytest_plugins = ["pytester"]

FOLDER = Path(__file__).parents[2] / "benchmarks"

BENCHMARKS = """
import pytest
pytestmark = pytest.mark.bench

@pytest.mark.gate
def test_speed_holds(figures):
    figures.ratio("speed", [2.0, 3.0, 4.0], gate=0.8)

def test_speed_fails(figures):
    figures.ratio("speed", 1.0)
    assert 1 > 2, "too slow"

def test_speed_is_skipped(figures):
    pytest.skip("no second core")

@pytest.fixture
def broken():
    raise OSError("no disk")

def test_speed_of_nothing(broken, figures):
    pass

@pytest.fixture
def untidy():
    yield
    raise OSError("does not end")

def test_speed_is_skipped_untidily(untidy):
    pytest.skip("no second core")
"""


@pytest.fixture
def session(pytester: pytest.Pytester) -> pytest.Pytester:
    """Where benchmarks that measure nothing can be run."""
    pytester.makeini("[pytest]\nmarkers =\n bench:\n gate:\n")
    pytester.makeconftest("from tests.benchmarks.conftest import *")
    pytester.makepyfile(test_it=BENCHMARKS, test_other="def test_no_benchmark():\n    pass\n")
    return pytester


def read(session: pytest.Pytester) -> Records:
    return Records.read(session.path / "found.json")


def test_benchmarks_are_recorded_however_they_end(session):
    session.runpytest_inprocess("--record", "found.json").assert_outcomes(
        passed=2, failed=1, skipped=2, errors=2
    )
    found = read(session)
    ends = {name: (one.outcome, one.reason, one.quick) for name, one in found.benchmarks.items()}
    assert ends == {
        "test_it::test_speed_holds": ("passed", "", True),
        "test_it::test_speed_fails": ("failed", "AssertionError: too slow", False),
        "test_it::test_speed_is_skipped": ("skipped", "Skipped: no second core", False),
        "test_it::test_speed_is_skipped_untidily": ("failed", "OSError: does not end", False),
        "test_it::test_speed_of_nothing": ("failed", "OSError: no disk", False),
    }
    # What was measured before the bar was missed is kept.
    assert found.benchmarks["test_it::test_speed_fails"].figures["speed"].value == 1.0
    assert {one.commit for one in found.benchmarks.values()} == {code_revision()}


def test_part_of_the_benchmarks_keeps_the_others(session):
    session.runpytest_inprocess("--record", "found.json")
    before = read(session).benchmarks
    session.makepyfile(test_it=BENCHMARKS.replace("[2.0, 3.0, 4.0]", "[5.0]"))
    session.runpytest_inprocess("--record", "found.json", "-m", "gate")
    after = read(session).benchmarks
    assert after.pop("test_it::test_speed_holds").figures["speed"].value == 5.0
    assert after.items() <= before.items()
    assert len(after) == len(before) - 1


@pytest.mark.parametrize("file", sorted(FOLDER.glob("test_*.py")), ids=lambda file: file.stem)
def test_every_benchmark_of_ours_records_figures(file):
    body = ast.parse(file.read_text(encoding="utf-8")).body
    tests = [node for node in body if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")]
    assert tests
    assert [test.name for test in tests if "figures" not in {arg.arg for arg in test.args.args}] == []


def test_session_without_benchmarks_writes_nothing(session):
    session.runpytest_inprocess("--record", "found.json", "test_other.py").assert_outcomes(passed=1)
    assert not (session.path / "found.json").exists()


def test_file_of_another_form_is_told_before_anything_is_measured(session):
    (session.path / "found.json").write_text("{}[]", encoding="utf-8")
    result = session.runpytest_inprocess("--record", "found.json")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    assert "found.json has not the form of benchmarks" in result.stderr.str()
    assert (session.path / "found.json").read_text(encoding="utf-8") == "{}[]"


def test_figures_are_printed_when_their_benchmark_has_ended(session):
    result = session.runpytest_inprocess("-s", "--record", "found.json", "-m", "gate")
    result.stdout.fnmatch_lines(["test_speed_holds", "  speed  3 times  (2 to 4)"])
