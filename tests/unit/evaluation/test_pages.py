from __future__ import annotations

import base64
import io
import math

import pytest
from PIL import Image

from mmicl_core.data.images import PictureError
from mmicl_core.evaluation.pages import (
    MOST_POINTS,
    MOST_TEXT,
    Bar,
    Line,
    bar_chart,
    column_chart,
    facts_table,
    line_chart,
    picture,
    render_page,
    text,
    thumbnail,
)
from tests.fakes import draw_picture, encode_picture
from tests.unit.evaluation.markup import Element, parse, told

HOSTILE = "<script>alert(1)</script><img src=x onerror=alert(1)>'\"</style><!--&amp;"


@pytest.mark.parametrize(
    "page",
    [
        text(HOSTILE, "name"),
        facts_table({HOSTILE: HOSTILE}),
        bar_chart([Bar(HOSTILE, 0.5, HOSTILE)], (0.5, HOSTILE)),
        column_chart([HOSTILE], {HOSTILE: [0.5], "other": [0.1]}, HOSTILE),
        line_chart([Line(HOSTILE, [(1, 2.0)]), Line("other", [(1, 1.0)])], HOSTILE),
        render_page(HOSTILE, []),
    ],
)
def test_text_stays_text_wherever_it_stands(page: str) -> None:
    elements = parse(page)
    assert not {"script", "img"} & {element for element, _ in elements}
    assert not any(name.startswith("on") for _, attributes in elements for name in attributes)
    assert "&lt;script&gt;" in page


def test_text_is_shown_whole_and_cut_only_where_it_is_very_long() -> None:
    assert told(text(HOSTILE)) == HOSTILE
    ((_, attributes),) = parse(text("x" * 10 * MOST_TEXT))
    assert len(told(text("x" * 10 * MOST_TEXT))) == MOST_TEXT + 1 == len(attributes["title"] or "")


def test_page_forbids_itself_to_run_or_load_anything() -> None:
    policies = [
        attributes["content"] or ""
        for element, attributes in parse(render_page("title", ["<p>part</p>"]))
        if (attributes.get("http-equiv") or "").lower() == "content-security-policy"
    ]
    assert len(policies) == 1 and "default-src 'none'" in policies[0]
    assert "script-src" not in policies[0] and "img-src data:" in policies[0]


def test_bars_are_as_long_as_their_numbers_and_intervals_lie_where_they_belong() -> None:
    chart = parse(bar_chart([Bar("all", 1.0, "1"), Bar("a quarter", 0.25, "1/4", (0.2, 0.5))]))
    whole, quarter = (attributes for element, attributes in chart if element == "rect")
    assert float(quarter["width"] or 0) == pytest.approx(float(whole["width"] or 0) / 4, abs=0.1)
    (line,) = (attributes for element, attributes in chart if element == "line")
    begin, length = float(quarter["x"] or 0), float(whole["width"] or 0)
    places = [(float(line[end] or 0) - begin) / length for end in ("x1", "x2")]
    assert places == pytest.approx([0.2, 0.5], abs=0.001)


def test_columns_are_as_high_as_their_shares_and_stand_on_one_line() -> None:
    chart = parse(column_chart(["1", "2"], {"observed": [0.4, 0.1], "expected": [0.2, 0.0]}))
    columns = [attributes for element, attributes in chart if element == "rect"][:4]
    heights = [float(column["height"] or 0) for column in columns]
    assert [height / heights[0] for height in heights] == pytest.approx([1, 0.5, 0.25, 0], abs=0.01)
    assert (
        len({float(column["y"] or 0) + height for column, height in zip(columns, heights, strict=True)}) == 1
    )
    places = [float(column["x"] or 0) for column in columns]
    assert places == sorted(places) and len(set(places)) == 4


def test_highest_column_fills_the_chart_however_small_its_share() -> None:
    charts = [parse(column_chart(["1", "2"], {"observed": [share, share / 2]})) for share in (0.5, 0.001)]
    heights = [
        [attributes["height"] for element, attributes in chart if element == "rect"] for chart in charts
    ]
    assert heights[0] == heights[1] and float(heights[0][0] or 0) > 100


def test_chart_of_nothing_is_drawn_empty() -> None:
    assert "<rect" not in column_chart([], {"observed": []}) + bar_chart([])
    assert "height=0.0" in column_chart(["1"], {"observed": [0.0]})


def drawn(chart: str) -> list[list[tuple[float, float]]]:
    """Where the lines of a chart go."""
    return [
        [
            (float(x), float(y))
            for x, y in (place.split(",") for place in (attributes["points"] or "").split())
        ]
        for element, attributes in parse(chart)
        if element == "polyline"
    ]


def circles(chart: str) -> list[Element]:
    return [element for element in parse(chart) if element[0] == "circle"]


def test_line_goes_through_its_points_and_lines_share_their_axes() -> None:
    one, other = drawn(
        line_chart([Line("a", [(0, 0.0), (5, 5.0), (10, 10.0)]), Line("b", [(5, 5.0), (10, 0.0)])])
    )
    assert one[1][0] == pytest.approx((one[0][0] + one[2][0]) / 2, abs=0.1)
    assert one[1][1] == pytest.approx((one[0][1] + one[2][1]) / 2, abs=0.1)
    assert other == [one[1], (one[2][0], one[0][1])]


def test_powers_of_ten_are_equally_far_apart_where_heights_are() -> None:
    points = [(1, 0.1), (2, 1.0), (3, 10.0), (4, 100.0)]
    ((*_, highest),) = (logarithmic,) = drawn(line_chart([Line("a", points)], logarithmic=True))
    steps = [after[1] - before[1] for before, after in zip(logarithmic, logarithmic[1:], strict=False)]
    assert steps == pytest.approx([steps[0]] * 3, abs=0.2)
    assert highest[1] == min(y for _, y in logarithmic)
    (linear,) = drawn(line_chart([Line("a", points)]))
    assert linear[0][1] - linear[1][1] < 2 < linear[2][1] - linear[3][1]


@pytest.mark.parametrize("points", [[(1, 0.0), (2, 100.0)], [(1, -1.0), (2, 100.0)], [(1, 1.0), (2, 2.0)]])
def test_heights_without_powers_or_close_together_are_drawn_as_they_are(points) -> None:
    lines = [Line("a", points)]
    assert line_chart(lines, logarithmic=True) == line_chart(lines)


@pytest.mark.parametrize("gap", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_interrupts_a_line(gap: float) -> None:
    chart = line_chart(
        [Line("a", [(0, 1.0), (1, 2.0), (2, gap), (3, 2.0), (4, 1.0), (5, gap), (6, 1.0)], faint=True)]
    )
    assert [len(piece) for piece in drawn(chart)] == [2, 2]
    # A piece of one point is no line.
    assert len(circles(chart)) == 1
    assert "nan" not in chart and "inf" not in chart


@pytest.mark.parametrize("height", [0.0, -3.0, 1e-7, 1e12])
def test_single_point_has_a_place(height: float) -> None:
    chart = line_chart([Line("a", [(7, height)])], logarithmic=True)
    ((_, place),) = circles(chart)
    assert 0 < float(place["cx"] or 0) < 664 and 0 <= float(place["cy"] or 0) <= 200
    assert ">7<" in chart


def test_chart_of_no_finite_point_is_drawn_empty() -> None:
    for points in ([], [(1, math.nan)]):
        chart = line_chart([Line("a", points)])
        assert not drawn(chart) and not circles(chart)


def test_long_line_keeps_its_extremes_and_its_gaps_and_grows_no_further() -> None:
    heights = [1.0 + (number % 7) / 7 for number in range(100_000)]
    heights[31_415], heights[27_182], heights[70_000] = 50.0, -50.0, math.nan
    chart = line_chart([Line("a", list(enumerate(heights)))])
    pieces = drawn(chart)
    assert len(pieces) == 2
    assert sum(map(len, pieces)) <= MOST_POINTS
    places = [place for piece in pieces for place in piece]
    assert places == sorted(places, key=lambda place: place[0])
    (short,) = drawn(line_chart([Line("a", [(0, 1.0), (27_182, -50.0), (31_415, 50.0), (99_999, 1.0)])]))
    assert {short[1], short[2]} <= set(places)


@pytest.mark.parametrize(
    ("size", "expected"), [((300, 200), (128, 85)), ((40, 30), (40, 30)), ((3000, 6), (128, 1))]
)
def test_thumbnail_keeps_its_shape_and_fits(size: tuple[int, int], expected: tuple[int, int]) -> None:
    small = thumbnail(encode_picture(draw_picture(0).resize(size)), max_pixels=10**6)
    with Image.open(io.BytesIO(small)) as opened:
        assert opened.format == "WEBP"
        assert opened.size == expected


def test_thumbnail_of_what_is_no_picture_or_too_large_is_refused() -> None:
    with pytest.raises(PictureError, match="empty"):
        thumbnail(b"", max_pixels=10)
    with pytest.raises(PictureError, match="72 x 72"):
        thumbnail(encode_picture(draw_picture(0)), max_pixels=100)


@pytest.mark.parametrize(("kind", "media"), [("PNG", "image/png"), ("WEBP", "image/webp")])
def test_picture_lies_inside_the_page_under_its_own_type(kind: str, media: str) -> None:
    data = encode_picture(draw_picture(0), kind)
    ((_, attributes),) = parse(picture(data))
    head, _, body = (attributes["src"] or "").partition(";base64,")
    assert head == f"data:{media}"
    assert base64.b64decode(body) == data
