from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import replace
from itertools import pairwise
from xml.etree import ElementTree

import matplotlib
import pytest

from mmicl_core.evaluation.charts import (
    Control,
    Mark,
    Series,
    compression_chart,
    controls_chart,
    shots_chart,
)
from mmicl_core.evaluation.drawing import Measure
from tests.unit.evaluation.drawn import SVG, XLINK, boxes, strokes, texts, told_aside
from tests.unit.evaluation.markup import parse

HOSTILE = "</text></svg><script>alert(1)</script>&amp;'\"]]><!-- $\\frac{1$ \x00\x1b\u202e\ud800 _"
LONG = "checkpoints/lcl-2026-05-11T08-13-55/step-00012000/" * 8
ACCURACY = Measure("accuracy \u00d7 100", chance=50.0)
CONTROL = Control(
    "4 shots, lcl", "names exchanged", "falls", 21.5, 17.0, 26.0, 82.5, -61.0, -66.0, -55.0, True
)


def series(name: str = "lcl", *values: float, width: float = 3.0) -> Series:
    marks = [
        Mark(place, value, value - width, value + width, label=f"{place}")
        for place, value in zip((1, 2, 4, 8, 16), values or (52.0, 60.0, 70.0), strict=False)
    ]
    return Series(name, marks)


def charts(name: str) -> list[str]:
    lines, measure = [series(name), series("base", 50.0, 51.0)], replace(ACCURACY, name=name)
    controls = [replace(CONTROL, group=name, label=name), replace(CONTROL, met=None)]
    return [
        shots_chart(name, lines, measure),
        compression_chart(name, lines, measure),
        controls_chart(name, controls, measure),
    ]


def bars(chart: str, colour: str = "#0072b2") -> list[list[tuple[float, float]]]:
    """The intervals of one colour, each from its low to its high end."""
    return [
        points
        for points, style in strokes(chart)
        if colour in style and len(points) == 2 and points[0][0] == points[1][0]
    ]


@pytest.mark.parametrize("name", ["lcl", HOSTILE, "", "_hidden", LONG, "\u6a21\u578b" * 40, "two\nlines"])
def test_charts_of_any_name_are_sound_xml_and_nothing_but_drawing(name: str) -> None:
    for chart in charts(name):
        ElementTree.fromstring(chart)
        assert not {"script", "style", "image", "img"} & {element for element, _ in parse(chart)}


def test_text_stays_text_and_is_told_whole_to_those_who_cannot_see_the_chart() -> None:
    for chart in charts("$lcl$ <b>"):
        assert any("$lcl$ <b>" in text for text in texts(chart))
        title, described = told_aside(chart)
        assert ElementTree.fromstring(chart).get("role") == "img" and title == "$lcl$ <b>"
        assert "$lcl$ <b>" in described and ("52.0 [49.0, 55.0]" in described or "-61.0" in described)


def test_name_that_begins_like_a_hidden_one_stands_in_the_legend() -> None:
    assert all("_hidden" in texts(chart) for chart in charts("_hidden"))


def test_same_numbers_give_the_same_bytes_whatever_the_settings_of_the_process() -> None:
    before = charts("lcl")
    settings = dict(matplotlib.rcParams)
    with matplotlib.rc_context({"font.size": 30, "svg.fonttype": "path", "lines.linewidth": 9}):
        assert charts("lcl") == before
    assert dict(matplotlib.rcParams) == settings
    assert charts("aim") != before


def test_charts_leave_the_plotting_state_of_matplotlib_alone() -> None:
    code = (
        "import sys; from tests.unit.evaluation.test_charts import charts; charts('lcl');"
        "print('matplotlib.pyplot' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout.strip() == "False"


def test_charts_of_one_page_share_no_name() -> None:
    names = [found for chart in charts("lcl") for found in re.findall(r' id="([^"]+)"', chart)]
    assert names and len(names) == len(set(names))


def test_intervals_stand_where_their_numbers_are() -> None:
    chart = shots_chart("title", [series("lcl", 60.0, 70.0, 90.0, width=5.0)], Measure("accuracy"))
    (low, high), (next_low, _), (last_low, _) = bars(chart)
    # Ten points are as high as the interval of five to both sides.
    assert low[1] - next_low[1] == pytest.approx(low[1] - high[1], abs=0.01)
    assert next_low[1] - last_low[1] == pytest.approx(2 * (low[1] - high[1]), abs=0.01)


def test_each_doubling_of_shots_is_one_step_and_so_is_the_first_demonstration() -> None:
    marks = [Mark(shots, 50.0 + shots, 49.0 + shots, 51.0 + shots) for shots in (0, 1, 2, 4, 16)]
    places = [low[0] for low, _ in bars(shots_chart("title", [Series("lcl", marks)], Measure("accuracy")))]
    steps = [after - before for before, after in pairwise(places)]
    assert steps == pytest.approx([steps[0], steps[0], steps[0], 2 * steps[0]], abs=0.01)
    assert {"0", "1", "2", "4", "16"} <= set(texts(shots_chart("title", [Series("lcl", marks)], ACCURACY)))


def test_intervals_of_models_with_the_same_score_do_not_hide_each_other() -> None:
    chart = shots_chart("title", [series("lcl"), series("aim")], ACCURACY)
    for one, other in zip(bars(chart), bars(chart, "#d55e00"), strict=True):
        assert one[0][0] < other[0][0]


def test_models_differ_by_marker_and_line_beside_their_colour() -> None:
    chart = shots_chart(
        "title", [series(f"model {number}", 50.0, 60.0 + number) for number in range(12)], ACCURACY
    )
    root = ElementTree.fromstring(chart)
    curves = [style for points, style in strokes(chart) if "stroke-width: 1.6" in style and len(points) == 2]
    dashes = [re.findall("stroke-dasharray: ([^;]+)", style) for style in curves]
    colours = [re.findall("stroke: ([^;]+)", style) for style in curves]
    shapes = {path.get("id"): path.get("d") for path in root.iter(f"{SVG}path")}
    markers = {shapes[(use.get(XLINK) or "")[1:]] for use in root.iter(f"{SVG}use")}
    assert len(curves) == 12 == len(set(map(str, zip(dashes, colours, strict=True))))
    assert all(one != other for one, other in pairwise(dashes))
    assert len(markers) >= 8


def test_long_name_is_wrapped_inside_the_chart_and_cut_where_it_does_not_end() -> None:
    lines = [
        text for text in texts(shots_chart("title", [series(LONG), series("b")], ACCURACY)) if "lcl" in text
    ]
    assert len(lines) == 3 and lines[-1].endswith("\u2026")
    assert all(len(line) <= 58 for line in lines)
    whole = texts(shots_chart("title", [series(LONG[:100]), series("b")], ACCURACY))
    assert "".join(whole[: whole.index("b")]).endswith(LONG[:100])


def test_chance_is_drawn_and_told_only_where_there_is_one() -> None:
    lines = [series()]
    assert {"chance", "50.0"} <= set(texts(shots_chart("title", lines, ACCURACY)))
    assert "chance" not in shots_chart("title", lines, Measure("CIDEr"))
    assert "chance, 50.0" in texts(controls_chart("title", [CONTROL], ACCURACY))
    assert "chance, " not in controls_chart("title", [CONTROL], Measure("CIDEr"))


def test_seeds_are_drawn_beside_their_mean() -> None:
    mark = Mark(1, 50.0, 45.0, 55.0, seeds=(48.0, 50.0, 52.0))
    with_seeds = shots_chart("title", [Series("lcl", [mark])], ACCURACY)
    without = shots_chart("title", [Series("lcl", [replace(mark, seeds=())])], ACCURACY)
    assert with_seeds.count("<use") == without.count("<use") + 3


@pytest.mark.parametrize("value", [0.0, 1.0, -0.5, 2800.0])
def test_single_value_without_a_width_has_a_chart(value: float) -> None:
    lines = [Series("lcl", [Mark(4, value, value, value, label="4")])]
    control = replace(CONTROL, value=value, low=value, high=value, unchanged=value)
    for chart in (
        shots_chart("title", lines, Measure("score")),
        compression_chart("title", lines, Measure("score")),
        controls_chart("title", [control], Measure("score")),
    ):
        assert "nan" not in chart and "inf" not in chart
        assert len(texts(chart)) > 3


def test_tokens_stand_on_a_logarithmic_axis_with_their_shots_beside_them() -> None:
    marks = [Mark(tokens, 50.0, 48.0, 52.0, label=f"{tokens} t") for tokens in (100, 1000, 10000)]
    chart = compression_chart("title", [Series("lcl", marks)], ACCURACY)
    first, second, third = (low[0] for low, _ in bars(chart))
    assert second - first == pytest.approx(third - second, abs=0.01)
    assert {"100 t", "1000 t", "10000 t", "1,000", "10,000"} <= set(texts(chart))


def test_point_that_models_share_is_labelled_once() -> None:
    shared = Mark(100, 50.0, 48.0, 52.0, label="no shots")
    lines = [Series(name, [shared, Mark(900, 60.0, 58.0, 62.0, label=name)]) for name in ("raw", "fused")]
    assert texts(compression_chart("title", lines, ACCURACY)).count("no shots") == 1


@pytest.mark.parametrize(
    ("expected", "met", "words"),
    [
        ("falls", True, ["\u2193 should fall", "\u2713 does"]),
        ("stays", False, ["= should stay", "\u2717 does not"]),
        ("chance", None, ["\u2193 should fall to chance", "? cannot be told"]),
    ],
)
def test_control_says_in_words_what_is_expected_and_whether_it_is_met(expected, met, words) -> None:
    found = texts(controls_chart("title", [replace(CONTROL, expected=expected, met=met)], ACCURACY))
    assert {*words, "names exchanged", "82.5", "21.5 [17.0, 26.0]"} <= set(found)


def test_controls_of_one_group_stand_below_one_heading() -> None:
    controls = [CONTROL, replace(CONTROL, label="order"), replace(CONTROL, group="8 shots, lcl")]
    found = texts(controls_chart("title", controls, ACCURACY))
    assert [text for text in found if "shots" in text] == ["4 shots, lcl", "8 shots, lcl"]


def test_bars_of_a_control_are_as_long_as_its_values() -> None:
    chart = controls_chart("title", [replace(CONTROL, value=20.0, unchanged=80.0)], Measure("accuracy"))
    unchanged, changed = (right - left for (left, _), (right, _) in boxes(chart))
    assert unchanged == pytest.approx(4 * changed, rel=0.01)
    (interval,) = (
        points for points, style in strokes(chart) if "stroke-width: 1.5" in style and len(points) == 2
    )
    assert interval[1][0] - interval[0][0] == pytest.approx((26.0 - 17.0) / 20.0 * changed, rel=0.01)


def test_scores_that_are_not_scaled_are_told_with_the_digits_asked_for() -> None:
    measure = Measure("ROC-AUC", chance=0.5, digits=3)
    control = replace(CONTROL, value=0.6128, low=0.55, high=0.675, unchanged=0.7)
    assert {"0.700", "0.613 [0.550, 0.675]"} <= set(texts(controls_chart("title", [control], measure)))
