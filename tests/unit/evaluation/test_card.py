from __future__ import annotations

import copy
import re
from collections import Counter
from typing import Any

import pytest

from mmicl_core.evaluation.card import render_card
from tests.fakes import draw_picture, encode_picture
from tests.unit.evaluation.markup import parse, told

HOSTILE = "<script>alert(1)</script><img src=x onerror='alert(1)'>\"</style></svg><!--"
LONG = "checkpoints/lcl-2026-05-11T08-13-55/step-00012000/" * 8


def point(shots: int, value: float, **changed: Any) -> dict[str, Any]:
    bounds = {"low": value - 0.03, "high": value + 0.028}
    return {"shots": shots, "value": value, **bounds, "seeds": [value], "note": None, **changed}


def control(label: str, met: bool | None, **changed: Any) -> dict[str, Any]:
    return {
        "model": "lcl",
        "shots": 4,
        "control": label,
        "label": label,
        "expected": "falls",
        "value": 0.233,
        "low": 0.193,
        "high": 0.273,
        "unchanged": 0.716,
        "difference": -0.483,
        "difference_low": -0.523,
        "difference_high": -0.443,
        "met": met,
        **changed,
    }


def example(right: bool) -> dict[str, Any]:
    shown = [
        {"pictures": ["a"], "question": "What is it?", "answer": "bako"},
        {"pictures": ["b"], "question": "What is it?", "answer": "mute"},
    ]
    query = {"pictures": ["c"], "question": "What is it?"}
    said = "bako" if right else "tiki"
    return {
        "demonstrations": shown,
        "query": query,
        "model": "lcl",
        "answer": said,
        "expected": "bako",
        "right": right,
    }


def compressed(model: str, shots: int, tokens: int | None) -> dict[str, Any]:
    score = {"task": "2-way naming", "model": model, "shots": shots, "value": 0.6, "low": 0.55, "high": 0.65}
    cost = {"kv_bytes": 3 * 2**20, "ttft_ms": 58.4, "tokens_per_second": None}
    return {**score, "prompt_tokens": tokens, **cost}


@pytest.fixture
def card() -> dict[str, Any]:
    comparison = {
        "first": "base",
        "second": "lcl",
        "shots": 4,
        "difference": -0.025,
        "low": -0.051,
        "high": 0.002,
        "p_value": 0.0721,
        "method": "exact McNemar test",
        "smallest_difference": 0.0374,
    }
    task = {
        "task": "two_way",
        "label": "2-way naming",
        "metric": "accuracy",
        "scale": 100.0,
        "chance": 0.5,
        "queries": 1200,
        "curves": [
            {"model": "base", "points": [point(0, 0.47), point(4, 0.49)]},
            {"model": "lcl", "points": [point(0, 0.505), point(4, 0.716)]},
        ],
        "controls": [
            control("names exchanged", True),
            control("other pictures", False),
            control("order", None),
        ],
        "comparisons": [comparison],
        "examples": [example(True), example(False)],
    }
    return {
        "title": "In-context learning of lcl",
        "verdict": {"learns": True, "why": "it gains 21.1 points from 0 to 4 shots."},
        "tasks": [task],
        "compression": [compressed("raw", 4, 3768), compressed("fused", 4, 852)],
        "facts": {"command": "mmicl evaluate recipe.yaml", "hardware": "8 x H100"},
    }


@pytest.fixture(scope="module")
def pictures() -> dict[str, bytes]:
    return {key: encode_picture(draw_picture(number)) for number, key in enumerate("abc")}


def drawn(page: str) -> list[str]:
    """The titles of the charts of a page."""
    return re.findall(r'<title id="[^"]+">([^<]*)', page)


def with_words(told: Any, words: str) -> Any:
    """The same with all words changed but those that name what the page knows."""
    if isinstance(told, dict):
        kept = ("task", "expected", "pictures")
        return {
            key: value if key in kept and value in ("two_way", "falls") else with_words(value, words)
            for key, value in told.items()
        }
    if isinstance(told, list):
        return [with_words(value, words) for value in told]
    return words if isinstance(told, str) else told


@pytest.mark.parametrize(
    ("learns", "words"),
    [
        (True, "Learns in context:"),
        (False, "Does not learn in context:"),
        (None, "Cannot be told whether it learns in context:"),
    ],
)
def test_verdict_stands_before_everything_else_in_words(card, pictures, learns, words) -> None:
    card["verdict"] = {"learns": learns, "why": "because <of> it."}
    said = told(render_card(card, pictures))
    assert words in said and "because <of> it." in said
    assert said.index(words) < said.index("because <of> it.") < said.index("base")


def test_page_runs_and_loads_nothing_whatever_is_told(card, pictures) -> None:
    page = render_card(with_words(card, HOSTILE), {HOSTILE: pictures["a"]})
    elements = parse(page)
    assert not {"script", "iframe", "link"} & {element for element, _ in elements}
    assert not any(name.startswith("on") for _, attributes in elements for name in attributes)
    sources = [attributes["src"] or "" for element, attributes in elements if element == "img"]
    assert sources and all(source.startswith("data:image/webp;base64,") for source in sources)
    assert Counter(element for element, _ in elements)["svg"] == 3
    assert "default-src 'none'" in page and HOSTILE in told(page)


def test_scores_are_shown_scaled_with_their_intervals(card, pictures) -> None:
    page = render_card(card, pictures)
    said = told(page)
    for value, bounds in (("47.0", "[44.0, 49.8]"), ("71.6", "[68.6, 74.4]")):
        assert value in said and bounds in said
    assert "lcl: 0 shots 50.5 [47.5, 53.3]; 4 shots 71.6 [68.6, 74.4]." in said
    assert "\u221248.3 [\u221252.3, \u221244.3]" in said
    assert "60.0 [55.0, 65.0]" in said
    assert "chance" in said and "1,200 questions" in said


def test_score_that_is_not_scaled_is_shown_with_three_digits(card, pictures) -> None:
    card["tasks"][0] |= {"scale": 1.0, "metric": "ROC-AUC"}
    said = told(render_card(card, pictures))
    assert "0.716" in said and "[0.686, 0.744]" in said
    assert "ROC-AUC \u00d7" not in said


def test_charts_come_in_the_order_in_which_they_are_asked_for(card, pictures) -> None:
    assert drawn(render_card(card, pictures)) == [
        "2-way naming: accuracy over shots",
        "2-way naming: controls",
        "2-way naming: accuracy over tokens of the prompt",
    ]


def test_card_of_nothing_is_a_verdict_and_says_so() -> None:
    verdict = {"learns": None, "why": "nothing was asked."}
    page = render_card({"title": "t", "verdict": verdict, "tasks": [], "compression": [], "facts": {}}, {})
    assert "nothing was asked." in told(page) and "No task was measured." in told(page)
    assert not {"svg", "table", "img"} & {element for element, _ in parse(page)}


@pytest.mark.parametrize("empty", ["curves", "controls", "comparisons", "examples"])
def test_what_was_not_measured_has_no_place_on_the_page(card, pictures, empty) -> None:
    without = copy.deepcopy(card)
    without["tasks"][0][empty] = []
    page = render_card(without, pictures)
    heads = ["over shots", "learns from?", "All comparisons", "Examples:"]
    shown = [head in page for head in heads]
    assert shown == [empty != name for name in ("curves", "controls", "comparisons", "examples")]


def test_curve_without_points_is_left_out(card, pictures) -> None:
    card["tasks"][0]["curves"][0]["points"] = []
    assert "base: " not in told(render_card(card, pictures))


def test_long_names_are_shown_whole(card, pictures) -> None:
    card["tasks"][0]["curves"][1]["model"] = LONG
    card["tasks"][0]["controls"][0]["model"] = LONG
    assert told(render_card(card, pictures)).count(LONG) >= 3


def test_several_tasks_are_summed_up_on_top(card, pictures) -> None:
    other = copy.deepcopy(card["tasks"][0]) | {
        "task": "vqa",
        "label": "VQAv2",
        "chance": None,
        "controls": [],
    }
    card["tasks"].append(other)
    page = render_card(card, pictures)
    summary = told(page[: page.index("<h2>")])
    assert "4 shots: 71.6" in summary and "[68.6, 74.4]" in summary
    assert "1 of 3, 1 cannot be told" in summary and "none made" in summary
    names = re.findall(r' id="([^"]+)"', page)
    assert len(names) == len(set(names))


def test_controls_of_a_model_stand_together_however_they_come(card, pictures) -> None:
    controls = [control("one", True), control("two", True, model="aim"), control("three", True)]
    card["tasks"][0]["controls"] = controls
    page = render_card(card, pictures)
    chart = page[page.index("2-way naming: controls") :]
    assert chart[: chart.index("</svg>")].count(">4 shots, lcl</text>") == 1


def test_note_is_told_once_for_all_models_that_share_it(card, pictures) -> None:
    for curve in card["tasks"][0]["curves"]:
        curve["points"][0]["note"] = "two text-only examples"
    assert told(render_card(card, pictures)).count("two text-only examples") == 1


def test_seeds_are_explained_only_where_there_are_several(card, pictures) -> None:
    assert "single seeds" not in render_card(card, pictures)
    card["tasks"][0]["curves"][0]["points"][0]["seeds"] = [0.46, 0.48]
    assert "single seeds" in render_card(card, pictures)


def test_comparison_tells_its_sign_its_test_and_what_it_could_have_found(card, pictures) -> None:
    said = told(render_card(card, pictures))
    for words in ("\u22122.5 [\u22125.1, +0.2]", "0.072", "exact McNemar test", "3.7", "\u2192 lcl"):
        assert words in said
    card["tasks"][0]["comparisons"][0] |= {"p_value": 1e-9, "smallest_difference": None}
    said = told(render_card(card, pictures))
    assert "< 0.001" in said and "3.7" not in said


def test_comparison_of_two_numbers_of_shots_tells_both(card, pictures) -> None:
    found = card["tasks"][0]["comparisons"]
    found.append(found[0] | {"first": "lcl", "first_shots": 0})
    found.append(found[0] | {"first_shots": 8, "best_of_each": True})
    said = told(render_card(card, pictures))
    assert "0 \u2192 4" in said and "best: 8 \u2192 4" in said
    assert said.count("\u2192 lcl") == 2


def test_what_was_left_out_is_told_with_its_reason(card, pictures) -> None:
    card["tasks"][0]["left_out"] = {"swapped does not apply": 1012}
    said = told(render_card(card, pictures)).replace("\n", "")
    assert "Left out: swapped does not apply (1,012)." in said


def test_comparisons_are_told_how_many_they_are(card, pictures) -> None:
    card["tasks"][0]["comparisons"] *= 10
    assert "of 10 comparisons, those below 0.005" in told(render_card(card, pictures))


def test_name_that_rows_share_is_told_once_beside_all_of_them(card, pictures) -> None:
    card["compression"] = [compressed("raw", shots, 100 * shots) for shots in (1, 2, 4)]
    page = render_card(card, pictures)
    table = page[page.index("prompt tokens</th>") :]
    rows = [
        attributes
        for element, attributes in parse(table[: table.index("</table>")])
        if "rowspan" in attributes
    ]
    assert [row["rowspan"] for row in rows if row["rowspan"] != "1"] == ["3"]


def test_cost_that_was_not_measured_is_a_dash_and_no_point(card, pictures) -> None:
    said = told(render_card(card, pictures))
    assert "3,768" in said and "852" in said and "3.0" in said and "58" in said
    card["compression"] = [compressed("raw", 4, None) | {"kv_bytes": None, "ttft_ms": None}]
    page = render_card(card, pictures)
    assert "over tokens" not in " ".join(drawn(page))
    table = page[page.index("prompt tokens</th>") :]
    assert table[: table.index("</table>")].count("\u2013") == 4


def test_examples_show_their_pictures_and_say_which_are_wrong(card, pictures) -> None:
    page = render_card(card, pictures)
    said = told(page)
    assert "\u2713 right" in said and "\u2717 wrong" in said
    assert "tiki" in said and "bako" in said
    assert page.count("<img") == 6
    # Asked of all alike, it is told once for each example.
    assert said.count("What is it?") == 2


def test_questions_that_differ_stand_below_their_pictures(card, pictures) -> None:
    card["tasks"][0]["examples"] = [example(True)]
    card["tasks"][0]["examples"][0]["query"]["question"] = "And this?"
    said = told(render_card(card, pictures))
    assert said.count("What is it?") == 2 and said.count("And this?") == 1


def test_answer_of_nothing_is_said_to_be_nothing(card, pictures) -> None:
    card["tasks"][0]["examples"] = [example(False) | {"answer": ""}]
    assert "(nothing)" in told(render_card(card, pictures))


def test_picture_that_is_missing_or_broken_leaves_an_empty_frame(card, pictures) -> None:
    card["tasks"][0]["examples"] = [example(True)]
    page = render_card(card, {"a": pictures["a"], "b": b"\x89PNG no picture"})
    assert page.count("<img") == 1
    assert told(page).count("no picture") == 2


def test_large_picture_is_shown_small(card) -> None:
    large = encode_picture(draw_picture(0).resize((2000, 1500)))
    page = render_card(card, dict.fromkeys("abc", large))
    assert len(re.findall(r"base64,([^']+)", page)[0]) < 20_000


def test_facts_are_told_with_their_names(card, pictures) -> None:
    said = told(render_card(card, pictures))
    assert "mmicl evaluate recipe.yaml" in said and "hardware" in said
