from __future__ import annotations

import math
import random
from itertools import pairwise
from xml.etree import ElementTree

import matplotlib
import pytest

from mmicl_core.evaluation.page_charts import Bar, Line, bar_chart, column_chart, line_chart
from mmicl_core.evaluation.pages import BLUE, INK, SOFT, VERMILION
from tests.unit.evaluation.drawn import Point, boxes, dots, strokes, texts, told_aside
from tests.unit.evaluation.markup import parse
from tests.unit.evaluation.test_charts import HOSTILE, LONG

Points = list[tuple[int, float]]

NUMBERS = [(0, 2.0), (5, 1.0), (10, 4.0)]
TALL, WIDE = 300.0, 410.4


def charts(name: str) -> list[str]:
    return [
        bar_chart(name, [Bar(name, 0.5, name, (0.4, 0.6)), Bar("b", 1.0, "1")], (0.5, name)),
        column_chart(name, [name, "b"], {name: [0.5, 0.25], "other": [0.1, 0.0]}, name),
        line_chart(name, [Line(name, NUMBERS), Line("other", NUMBERS[1:])], name),
    ]


def lines(chart: str, colour: str = BLUE, width: float = 1.6) -> list[list[Point]]:
    """The pieces of lines of a colour."""
    return [
        points for points, style in strokes(chart) if colour in style and f"stroke-width: {width}" in style
    ]


def marks(chart: str) -> list[list[Point]]:
    return [points for points, style in strokes(chart) if INK in style and "stroke-dasharray" in style]


def axis(chart: str) -> list[Point]:
    """The ends of the line along which a chart goes."""
    frame = [points for points, style in strokes(chart) if SOFT in style and len(points) == 2]
    return max((points for points in frame if points[0][1] == points[1][1]), key=lambda ends: ends[1][0])


@pytest.mark.parametrize("name", ["loss", HOSTILE, "", "_hidden", LONG, "\u6a21\u578b" * 40, "two\nlines"])
def test_charts_of_any_name_are_sound_xml_and_nothing_but_drawing(name: str) -> None:
    for chart in charts(name):
        ElementTree.fromstring(chart)
        elements = parse(chart)
        assert not {"script", "style", "image", "img"} & {element for element, _ in elements}
        assert not any(key.startswith("on") for _, attributes in elements for key in attributes)


def test_text_stays_text_and_is_told_to_those_who_cannot_see_the_chart() -> None:
    for chart in charts("$loss$ <b>"):
        title, described = told_aside(chart)
        assert title == "$loss$ <b>" and described.startswith("$loss$ <b>")
        assert any("$loss$ <b>" in text for text in texts(chart))


def test_same_numbers_give_the_same_bytes_whatever_the_settings_of_the_process() -> None:
    before = charts("loss")
    with matplotlib.rc_context(
        {"font.size": 30, "path.simplify": False, "axes.prop_cycle": "cycler(lw=[9])"}
    ):
        assert charts("loss") == before
    assert charts("score") != before


def test_bars_are_as_long_as_their_numbers_and_intervals_lie_where_they_belong() -> None:
    chart = bar_chart("title", [Bar("all", 1.0, "1 of 1"), Bar("some", 0.25, "1 of 4", (0.2, 0.5))])
    (begin, _), (end, _) = boxes(chart)[0]
    (quarter_begin, top), (quarter_end, bottom) = boxes(chart)[1]
    assert quarter_begin == begin
    assert quarter_end - begin == pytest.approx((end - begin) / 4, abs=0.01)
    (interval,) = lines(chart, INK, 1.5)
    places = [(place - begin) / (end - begin) for place, _ in interval]
    assert (min(places), max(places)) == pytest.approx((0.2, 0.5), abs=0.001)
    assert all(top < height < bottom for _, height in interval)
    assert texts(chart) == ["all", "1 of 1", "some", "1 of 4"]
    assert told_aside(chart) == ("title", "all: 1 of 1; some: 1 of 4")


def test_bars_have_the_colours_asked_for() -> None:
    chart = bar_chart("title", [Bar("kept", 0.5, "1"), Bar("lost", 0.5, "1", colour=VERMILION)])
    found = [attributes["style"] or "" for name, attributes in parse(chart) if "clip-path" in attributes]
    assert [colour for style in found for colour in (BLUE, VERMILION) if colour in style] == [BLUE, VERMILION]


@pytest.mark.parametrize("place", [0.0, 0.5, 1.0])
def test_mark_goes_through_all_bars_and_is_told_below_them(place: float) -> None:
    bars = [Bar("all", 1.0, "1"), Bar(LONG, 1.0, "1")]
    chart = bar_chart("title", bars, (place, "chance"))
    (begin, _), (end, _) = boxes(chart)[0]
    *through, legend = marks(chart)
    assert len(through) == len(bars)
    for points, ((_, top), (_, bottom)) in zip(through, boxes(chart), strict=True):
        assert [x for x, _ in points] == pytest.approx([begin + place * (end - begin)] * 2, abs=0.01)
        assert min(y for _, y in points) < top and max(y for _, y in points) > bottom
    assert "chance" in texts(chart) and told_aside(chart)[1].endswith("; dotted line: chance")
    assert min(y for _, y in legend) > max(y for _, y in through[-1])
    assert not marks(bar_chart("title", bars))


def test_long_label_is_wrapped_above_its_bar_and_moves_those_below_down() -> None:
    short, long = (bar_chart("title", [Bar(name, 1.0, "1"), Bar("b", 1.0, "1")]) for name in ("a", LONG))
    assert len([text for text in texts(long) if "lcl" in text]) == 3
    (first, second), (moved, last) = boxes(short), boxes(long)
    assert moved[0][1] - first[0][1] == pytest.approx(last[0][1] - second[0][1], abs=0.01)
    assert moved[0][1] > first[1][1]


def test_columns_are_as_high_as_their_shares_and_stand_side_by_side_on_one_line() -> None:
    chart = column_chart("title", ["1", "2"], {"observed": [0.4, 0.1], "expected": [0.2, 0.3]})
    columns = boxes(chart)
    heights = [bottom - top for (_, top), (_, bottom) in columns]
    assert [height / heights[0] for height in heights] == pytest.approx([1, 0.25, 0.5, 0.75], abs=0.001)
    assert len({bottom for _, (_, bottom) in columns}) == 1
    one, next_one, other, next_other = columns
    for left, right in pairwise([one, other, next_one, next_other]):
        assert left[1][0] <= right[0][0] + 0.01
    begin, end = min(x for x, _ in axis(chart)), max(x for x, _ in axis(chart))
    assert one[0][0] - begin == pytest.approx(end - next_other[1][0], abs=0.01)
    assert {"observed", "expected", "1", "2", "40 %", "0 %"} <= set(texts(chart))
    assert "observed, 2: 10.00 %; expected, 1: 20.00 %" in told_aside(chart)[1]


def test_series_of_columns_differ_in_black_and_white_too() -> None:
    chart = column_chart("title", ["1"], {"observed": [0.4], "expected": [0.2]})
    assert "pattern" in {name for name, _ in parse(chart)}
    alone = column_chart("title", ["1"], {"observed": [0.4]})
    assert "pattern" not in {name for name, _ in parse(alone)} and "observed" not in texts(alone)


def test_highest_column_fills_the_chart_however_small_its_share() -> None:
    one, other = (
        column_chart("title", ["1", "2"], {"observed": [share, share / 2]}) for share in (0.5, 1e-5)
    )
    assert [place for corners in boxes(one) for place in corners] == [
        pytest.approx(place) for corners in boxes(other) for place in corners
    ]
    assert len(set(texts(other))) == len(texts(other))


@pytest.mark.parametrize("groups", [[], ["1"], ["1"] * 3])
def test_columns_without_height_leave_the_chart_empty(groups: list[str]) -> None:
    chart = column_chart("title", groups, {"observed": [0.0] * len(groups)})
    assert not [corners for corners in boxes(chart) if corners[0][1] < corners[1][1]]
    assert "nan" not in chart and "inf" not in chart


def test_names_of_many_groups_are_left_out_evenly_so_that_they_do_not_touch() -> None:
    names = [f"{number}-{number + 99}" for number in range(1, 4000, 100)]
    chart = column_chart("title", names, {"observed": [0.1] * len(names)})
    shown = [names.index(text) for text in texts(chart) if text in names]
    assert shown[0] == 0 and len(shown) > 3
    (every,) = {after - before for before, after in pairwise(shown)}
    assert shown[-1] + every >= len(names)
    assert sum(len(names[place]) * 6 for place in shown) < WIDE


def test_line_goes_through_its_points_and_lines_share_their_axes() -> None:
    points: Points = [(0, 0.0), (5, 5.0), (10, 10.0)]
    chart = line_chart("title", [Line("a", points), Line("b", [(5, 5.0), (10, 0.0)])], "step")
    one, other = lines(chart)[0], lines(chart, VERMILION)[0]
    assert one[1] == pytest.approx(((one[0][0] + one[2][0]) / 2, (one[0][1] + one[2][1]) / 2), abs=0.01)
    assert other == [one[1], (one[2][0], one[0][1])]
    assert {"a", "b", "step", "0", "10"} <= set(texts(chart))
    assert told_aside(chart)[1].startswith(
        "a: first 0 at step 0, last 10 at step 10, lowest 0 at step 0, highest 10 at step 10; b: first 5 at"
    )


def test_lines_of_one_name_look_alike_and_the_faint_one_lies_behind() -> None:
    behind = Line("b", NUMBERS, faint=True)
    chart = line_chart("title", [Line("a", NUMBERS), behind, Line("b", NUMBERS)])
    (faint,), (shown, _) = lines(chart, VERMILION, 0.7), lines(chart, VERMILION)
    assert faint == shown and texts(chart).count("b") == 1
    # What is drawn first lies behind what is drawn later.
    widths = [style for points, style in strokes(chart) if points == faint]
    assert ["stroke-width: 0.7" in style for style in widths] == [True, False, False]


def test_one_name_has_no_legend() -> None:
    chart = line_chart("title", [Line("a", NUMBERS, faint=True), Line("a", NUMBERS)])
    assert "a" not in texts(chart) and "a: first" in told_aside(chart)[1]


def test_powers_of_ten_are_equally_far_apart_where_heights_are() -> None:
    points: Points = [(1, 0.1), (2, 1.0), (3, 10.0), (4, 100.0)]
    chart = line_chart("title", [Line("a", points)], logarithmic=True)
    (places,) = lines(chart)
    steps = [before[1] - after[1] for before, after in pairwise(places)]
    assert steps == pytest.approx([steps[0]] * 3, abs=0.01) and steps[0] > 10
    assert {"0.1", "1", "10", "100"} <= set(texts(chart))
    ((low, one, ten, high),) = lines(line_chart("title", [Line("a", points)]))
    assert low[1] - one[1] < 2 < ten[1] - high[1]


@pytest.mark.parametrize("points", [[(1, 0.0), (2, 100.0)], [(1, -1.0), (2, 100.0)], [(1, 1.0), (2, 2.0)]])
def test_heights_without_powers_or_close_together_are_drawn_as_they_are(points: Points) -> None:
    shown = [Line("a", points)]
    assert line_chart("title", shown, logarithmic=True) == line_chart("title", shown)


@pytest.mark.parametrize("gap", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("faint", [False, True])
def test_what_is_not_finite_interrupts_a_line(gap: float, faint: bool) -> None:
    heights = [1.0, 2.0, gap, 2.0, 1.0, gap, 1.0] + [gap, 1.0, 1.5] * 20
    chart = line_chart("title", [Line("a", list(enumerate(heights)), faint)])
    pieces = [piece for piece in lines(chart, width=0.7 if faint else 1.6) if len(piece) > 1]
    assert len(pieces) == 22
    # A piece of one point is no line.
    assert len(dots(chart, BLUE)) == 1
    assert "nan" not in chart and "inf" not in chart


def test_points_of_a_short_line_are_marked_and_those_of_a_long_one_are_not() -> None:
    short, long = (
        line_chart("title", [Line("a", [(n, 1.0 + n % 3) for n in range(count)])]) for count in (9, 99)
    )
    assert len(dots(short, BLUE)) == 9 and not dots(long, BLUE)
    assert [place for line in lines(short) for place in line] == dots(short, BLUE)


@pytest.mark.parametrize("height", [0.0, -3.0, 1e-7, 1e12])
@pytest.mark.parametrize("faint", [False, True])
def test_single_point_has_a_place(height: float, faint: bool) -> None:
    chart = line_chart("title", [Line("a", [(7, height)], faint)], logarithmic=True)
    ((x, y),) = dots(chart, BLUE)
    assert 0 < x < WIDE and 0 < y < TALL
    assert texts(chart).count("7") == 1


@pytest.mark.parametrize(
    "heights",
    [
        [1e6 + 0.1, 1e6 + 0.2],
        [1e-12, 1e12],
        [5e-6, 6e-6],
        [0.1, 0.1 + 1e-9],
        [-2e7, 3e7],
        [3.0, 95.0],
        [-5.0, -3.0],
        [1e-5, 2e-4],
    ],
)
def test_numbers_along_the_axes_never_repeat_and_stay_short(heights: list[float]) -> None:
    for count in (1, 2, 3):
        points = [(step, heights[step % 2]) for step in range(1, count + 1)]
        for logarithmic in (False, True):
            shown = texts(line_chart("title", [Line("a", points)], "step", logarithmic=logarithmic))
            across, down = shown[: shown.index("step")], shown[shown.index("step") + 1 :]
            assert len(set(across)) == len(across)
            assert len(set(down)) == len(down)
            assert max(map(len, down)) <= 9 and len(down) <= 9


def test_long_line_keeps_its_extremes_and_its_gaps_and_grows_no_further() -> None:
    draw = random.Random(0)
    heights = [draw.gauss(0, 1) for _ in range(100_000)]
    heights[31_415], heights[27_182], heights[70_000] = 50.0, -50.0, math.nan
    chart = line_chart("title", [Line("a", list(enumerate(heights)))])
    pieces = lines(chart)
    assert len(pieces) == 2 and len(chart) < 100_000
    ends: Points = [(0, heights[0]), (27_182, -50.0), (31_415, 50.0), (99_999, heights[-1])]
    (short,) = lines(line_chart("title", [Line("a", ends)]))
    for wanted in short:
        # Half a unit of the picture is what a line may be off.
        assert min(math.dist(wanted, place) for piece in pieces for place in piece) < 0.5
