from __future__ import annotations

import base64
import io

import pytest
from PIL import Image

from mmicl_core.data.images import PictureError
from mmicl_core.evaluation.pages import (
    MOST_TEXT,
    facts_table,
    picture,
    render_page,
    text,
    thumbnail,
)
from tests.fakes import draw_picture, encode_picture
from tests.unit.evaluation.markup import parse, told

HOSTILE = "<script>alert(1)</script><img src=x onerror=alert(1)>'\"</style><!--&amp;"


@pytest.mark.parametrize(
    "page",
    [
        text(HOSTILE, "name"),
        facts_table({HOSTILE: HOSTILE}),
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
