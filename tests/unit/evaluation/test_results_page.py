from __future__ import annotations

import copy
import json
from typing import Any
from xml.etree import ElementTree

import pytest

from mmicl_core.evaluation.results_page import PLOTS, render_results
from tests.unit.evaluation.drawn import told_aside

LABEL = "two_way held_out_concepts"
COMMIT, OTHER = "0123456789" * 4, "abcdefabcd" * 4
SHOTS = (0, 2, 8)


def point(shots: int, value: float, deviation: float | None = None) -> dict[str, Any]:
    return {
        "shots": shots,
        "value": value,
        "low": max(value - 0.03, 0.0),
        "high": value + 0.02,
        "seeds": [] if deviation is None else [value - deviation, value + deviation],
        "deviation": deviation,
        "note": None,
        "prompt_tokens": 29.0 + 31 * shots,
    }


def comparison(second: str, difference: float, p_value: float, **changed: Any) -> dict[str, Any]:
    return {
        "first": "full",
        "second": second,
        "shots": 8,
        "first_shots": 8,
        "best_of_each": False,
        "difference": difference,
        "low": difference - 0.02,
        "high": difference + 0.03,
        "p_value": p_value,
        "smallest_difference": 0.04,
        "method": "exact McNemar test",
        **changed,
    }


def control(model: str, kind: str, met: bool | None, value: float = 0.2) -> dict[str, Any]:
    return {
        "model": model,
        "shots": 8,
        "control": kind,
        "label": {"shuffled": "answers dealt out anew", "swapped": "the two names swapped"}[kind],
        "expected": "falls",
        "value": value,
        "difference": value - 0.8,
        "difference_low": value - 0.85,
        "difference_high": value - 0.75,
        "met": met,
    }


def cost(model: str, shots: int, kv_bytes: float | None) -> dict[str, Any]:
    score = {"value": 0.6, "low": 0.55, "high": 0.65, "shots": shots, "model": model, "task": LABEL}
    return {**score, "kv_bytes": kv_bytes, "ttft_ms": 20.0 + shots}


def model(name: str, **changed: Any) -> dict[str, Any]:
    nothing = {"recipe": None, "settings": {}, "train_seeds": [], "training": None, "endpoint": None}
    return {"name": name, "backbone": "embedded:nano", **nothing, **changed}


@pytest.fixture
def results() -> dict[str, Any]:
    training = {"method": "aim", "trained_parameters": 66304, "steps": [400, 400], "seconds": [50.0, 60.0]}
    aim = model(
        "AIM",
        recipe="nano_4_aim",
        settings={"train.steps": 400, "method.layer": None, "episodes.stages": [{"odd_shots": True}]},
        train_seeds=[0, 1],
        training={**training, "code": [OTHER, OTHER]},
    )
    task = {
        "task": "two_way",
        "label": LABEL,
        "metric": "accuracy",
        "scale": 100.0,
        "chance": 0.5,
        "queries": 1200,
        "left_out": {},
        "curves": [
            {"model": "full", "points": [point(shots, 0.1 * shots) for shots in SHOTS]},
            {"model": "AIM", "points": [point(shots, 0.09 * shots, 0.012) for shots in SHOTS]},
        ],
        "controls": [
            control("full", "shuffled", None, 0.7),
            control("full", "swapped", True),
            control("AIM", "swapped", False),
        ],
        "comparisons": [
            comparison("full", 0.8, 1e-9, first_shots=0),
            comparison("AIM", 0.0, 1.0, shots=0, first_shots=0),
            comparison("AIM", -0.08, 1e-4),
            comparison("AIM", -0.08, 1e-4, best_of_each=True),
        ],
    }
    costs = [cost(name, shots, 2**20 * (1 + shots)) for name in ("full", "AIM") for shots in SHOTS]
    facts = {"command": "mmicl evaluate --recipe results_table", "code": f"{COMMIT}-dirty"}
    return {"tasks": [task], "models": [model("full"), aim], "compression": costs, "facts": facts}


def rows(page: str, head: str) -> dict[str, list[str]]:
    """The cells of the table below a head, by the first of each row."""
    lines = page[page.index(f"| {head}") :].split("\n\n")[0].splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]
    assert len({len(row) for row in cells}) == 1
    return {row[0]: row[1:] for row in cells}


def test_row_tells_scores_by_shots_and_what_they_cost(results: dict[str, Any]) -> None:
    table = rows(render_results(results).markdown, "model | 0 shots")
    assert table["model"][:3] == ["0 shots", "2 shots", "8 shots"]
    assert table["model"][3:] == [
        "trained parameters",
        "prompt tokens",
        "first token",
        "training",
        "recipe",
        "commit",
    ]
    assert table["full"] == [
        "0.0 [0.0, 2.0]",
        "20.0 [17.0, 22.0]",
        "80.0 [77.0, 82.0]",
        *("\u2013", "277", "28 ms", "\u2013", "\u2013", "0123456789 with changes"),
    ]
    assert table["AIM"][2:] == [
        "72.0 [69.0, 74.0] \u00b1 1.2",
        *("66,304", "277", "28 ms", "55 s", "nano_4_aim", "abcdefabcd"),
    ]


def test_training_of_minutes_is_told_in_minutes_and_none_where_nobody_took_the_time(results: Any) -> None:
    training = results["models"][1]["training"]
    training["seconds"] = [540.0, 660.0]
    assert rows(render_results(results).markdown, "model | 0 shots")["AIM"][6] == "10 min"
    training["seconds"] = [None, None]
    assert rows(render_results(results).markdown, "model | 0 shots")["AIM"][6] == "\u2013"


@pytest.mark.parametrize(
    ("difference", "p_value", "told"),
    [
        (-0.08, 1e-4, "**AIM** loses to full with 8 shots: \u22128.0 [\u221210.0, \u22125.0], p < 0.001."),
        (0.08, 0.01, "**AIM** beats full with 8 shots: +8.0 [+6.0, +11.0], p 0.010."),
        (0.01, 0.3, "**AIM** cannot be told from full with 8 shots: +1.0 [\u22121.0, +4.0], p 0.300."),
    ],
)
def test_each_model_is_compared_with_the_first_in_a_sentence(
    results: dict[str, Any], difference: float, p_value: float, told: str
) -> None:
    results["tasks"][0]["comparisons"][2] = comparison("AIM", difference, p_value)
    page = render_results(results).markdown
    assert f"- {told}\n" in page
    assert page.count("\n- ") == 1
    assert "A p below 0.05 counts" in page and "best" not in page


def test_best_of_each_is_told_where_it_is_at_other_shots(results: dict[str, Any]) -> None:
    best = comparison("AIM", 0.05, 0.02, best_of_each=True, shots=2)
    results["tasks"][0]["comparisons"][3] = best
    page = render_results(results).markdown
    assert "Each at its best number of shots, 2 and 8: +5.0 [+3.0, +8.0], p 0.020.\n" in page
    assert "A p below 0.025 counts" in page and "chosen by these same answers" in page


def test_more_comparisons_ask_more_of_each(results: dict[str, Any]) -> None:
    results["models"].append(model("LoRA"))
    found = results["tasks"][0]["comparisons"]
    found += [comparison("LoRA", 0.05, 0.04)]
    page = render_results(results).markdown
    assert "**LoRA** cannot be told from full" in page and "A p below 0.025 counts" in page


def test_controls_stand_side_by_side_with_whether_they_do_as_they_should(results: dict[str, Any]) -> None:
    table = rows(render_results(results).markdown, "model | answers")
    assert table["model"] == ["answers dealt out anew (falls)", "the two names swapped (falls)"]
    assert table["full"] == [
        "70.0 (\u221210.0 [\u221215.0, \u22125.0]) ?",
        "20.0 (\u221260.0 [\u221265.0, \u221255.0]) \u2713",
    ]
    assert table["AIM"] == ["\u2013", "20.0 (\u221260.0 [\u221265.0, \u221255.0]) \u2717"]


def test_models_are_told_by_what_trained_them(results: dict[str, Any]) -> None:
    table = rows(render_results(results).markdown, "model | around")
    assert table["full"] == ["embedded:nano", *["\u2013"] * 5]
    settings = r"train.steps 400, method.layer none, episodes.stages \[{odd_shots: true}\]"
    assert table["AIM"] == ["embedded:nano", "aim", "nano_4_aim", settings, "0, 1", "400"]


def test_plots_are_those_that_the_page_shows(results: dict[str, Any]) -> None:
    page = render_results(results)
    assert list(page.plots) == [
        "1-two-way-held-out-concepts-shots.svg",
        "1-two-way-held-out-concepts-memory.svg",
    ]
    for name, chart in page.plots.items():
        ElementTree.fromstring(chart)
        assert f"]({PLOTS}/{name})" in page.markdown
    shots, memory = (told_aside(chart)[1] for chart in page.plots.values())
    assert "AIM: 0 shots 0.0 [0.0, 2.0]; 2 shots 18.0 [15.0, 20.0]" in shots
    assert "full: 1 MiB 60.0 [55.0, 65.0]; 3 MiB 60.0" in memory


def test_each_backbone_has_its_own_plots_and_all_share_a_table(results: dict[str, Any]) -> None:
    results["models"][1]["backbone"] = "runs/smol/"
    page = render_results(results)
    assert [name.removeprefix("1-two-way-held-out-concepts-") for name in page.plots] == [
        f"{backbone}-{kind}.svg" for backbone in ("nano", "smol") for kind in ("shots", "memory")
    ]
    for name, chart in page.plots.items():
        title, described = told_aside(chart)
        assert ("smol" in title) == ("AIM" in described) == ("smol" in name)
    assert {"full", "AIM"} <= rows(page.markdown, "model | 0 shots").keys()


def test_what_was_not_measured_has_no_place(results: dict[str, Any]) -> None:
    results["compression"] = []
    task = results["tasks"][0]
    task |= {"controls": [], "comparisons": [], "chance": None}
    for curve in task["curves"]:
        curve["points"] = curve["points"][-1:]
    page = render_results(results)
    assert page.plots == {} and "![" not in page.markdown
    assert "counts" not in page.markdown and "in brackets" not in page.markdown
    assert "chance" not in page.markdown
    assert rows(page.markdown, "model | 8 shots")["full"][3] == "\u2013"


def test_model_behind_a_server_is_told_by_its_address(results: dict[str, Any]) -> None:
    results["models"][0] |= {"backbone": None, "endpoint": "http://far/v1"}
    results["compression"] = [row | {"kv_bytes": None} for row in results["compression"]]
    page = render_results(results)
    assert rows(page.markdown, "model | around")["full"][0] == "http://far/v1"
    assert not any("memory" in name for name in page.plots)


def test_words_are_never_taken_for_markdown(results: dict[str, Any]) -> None:
    hostile = "a | b\n# c <script>alert(1)</script> ![x](http://far) `d` *e*"
    told = json.loads(json.dumps(results).replace('"AIM"', json.dumps(hostile)))
    page = render_results(told)
    (row,) = [line for line in page.markdown.splitlines() if line.startswith("| a") and "66,304" in line]
    assert row.startswith(r"| a \| b # c \<script\>alert(1)\</script\> !\[x\](http://far) \`d\` \*e\* | 0.0")
    assert "<script" not in page.markdown.replace(r"\<script", "")
    assert all("<script" not in chart for chart in page.plots.values())


def test_same_results_give_the_same_page_after_a_round_trip(results: dict[str, Any]) -> None:
    assert render_results(json.loads(json.dumps(results))) == render_results(copy.deepcopy(results))


def test_what_was_left_out_and_how_to_do_it_again_are_told(results: dict[str, Any]) -> None:
    results["tasks"][0]["left_out"] = {"swapped does not apply": 1012}
    page = render_results(results).markdown
    assert "Left out: swapped does not apply (1,012)." in page
    assert "| command | mmicl evaluate --recipe results_table |" in page
