from __future__ import annotations

import pytest

from tests.benchmarks.page import main, render, sentence
from tests.benchmarks.records import Figures
from tests.unit.benchmarks.made import THERE, benchmark, measured, records


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("test_it::test_answers_come_soon", "answers come soon"),
        ("test_it::test_answers_come_soon[names, 8 shots]", "answers come soon (names, 8 shots)"),
    ],
)
def test_name_of_a_benchmark_is_a_sentence(name, words):
    assert sentence(name) == words


def test_page_opens_with_machine_and_versions_and_groups_figures_by_benchmark():
    figures = measured(speed=(2.0, 0.8))
    figures.absolute("time", [1.0, 2.0, 4.0], "s")
    lines = render(records(answers_come_soon=benchmark(figures))).splitlines()
    assert lines[0] == "# Benchmarks"
    start = lines.index("| | |")
    assert lines[start + 2 :] == [
        "| machine | One, 2 cores, 8 GiB, no GPU |",
        "| versions | python 3.11.7 |",
        "",
        "## `tests/benchmarks/test_it.py`",
        "",
        "### answers come soon",
        "",
        "passed in 1.5 s on 2026-05-01 00:00 UTC, commit abc",
        "",
        "| figure | median | spread | kind |",
        "|---|---:|---|---|",
        "| speed | 2 times |  | ratio, gate at least 0.8 of the baseline |",
        "| time | 2 s | 1 to 4, 3 times | of this machine |",
    ]


def test_benchmark_that_did_not_pass_says_why_on_the_page():
    page = render(records(it=benchmark(Figures(), outcome="skipped", reason="Skipped: no second core")))
    assert "skipped in 1.5 s" in page
    assert "Why: `Skipped: no second core`" in page


def test_figures_of_two_machines_say_which_is_theirs():
    both = records(one=benchmark(Figures()))
    both = both.replaced("test_it::test_two", benchmark(Figures(), THERE), THERE)
    page = render(both)
    assert f"| conditions {THERE.key} | |" in page
    assert "| machine | Other, 16 cores, 128 GiB, H200 |" in page
    assert f"commit abc, conditions {THERE.key}" in page


def test_name_with_a_bar_stays_one_cell():
    assert r"| one \| two |" in render(records(it=benchmark(measured(**{"one | two": (2.0, None)}))))


def test_page_is_written_beside_its_records(tmp_path, capsys):
    source, page = tmp_path / "benchmarks.json", tmp_path / "benchmarks.md"
    written = records(it=benchmark(measured(speed=(2.0, None))))
    written.write(source)
    assert main([str(source), str(page)]) == 0
    assert page.read_text(encoding="utf-8") == render(written)
    assert capsys.readouterr().out == f"{page}\n"


def test_records_that_are_not_there_end_with_two_and_a_sentence(tmp_path, capsys):
    assert main([str(tmp_path / "none.json"), str(tmp_path / "page.md")]) == 2
    assert "none.json cannot be read" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
