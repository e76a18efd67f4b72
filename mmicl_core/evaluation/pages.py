"""Pieces of a page that needs nothing else: its frame, its colours, pictures as data URIs, tables.

Hazard: captions and names of a web corpus are hostile input. Whatever is not made here goes through `text`
or `escape`, and the frame forbids its page to run a script or to load anything, should one slip through.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable, Mapping
from html import escape

from mmicl_core.data.images import examine

__all__ = [
    "BLUE",
    "GREEN",
    "INK",
    "RED",
    "RULE",
    "SOFT",
    "THUMBNAIL",
    "VERMILION",
    "data_uri",
    "facts_table",
    "picture",
    "render_page",
    "text",
    "thumbnail",
]

THUMBNAIL = 128
MOST_TEXT = 1000

INK, SOFT, RULE = "#1c2430", "#536072", "#dde3ea"
# What is right, what is wrong.
GREEN, RED = "#1a7f37", "#b42318"
# The first two of the palette of Okabe and Ito (2008), which the colour-blind tell apart.
BLUE, VERMILION = "#0072b2", "#d55e00"

POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
VARIABLES = (
    f":root{{--ink:{INK};--soft:{SOFT};--rule:{RULE};--right:{GREEN};--wrong:{RED};"
    f"--first:{BLUE};--second:{VERMILION}}}"
)
STYLE = """
:root{color-scheme:light}
body{font:16px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem}
body{color:var(--ink);background:#fff}
h1{font-size:1.6rem;margin-bottom:.2rem}
h2{font-size:1.15rem;margin-top:2.2rem}
p.lead{margin-top:0}
p.lead,.soft{color:var(--soft)}
.row{display:flex;flex-wrap:wrap;gap:.6rem}
figure{margin:0;text-align:center;border:1px solid var(--rule);border-radius:8px;padding:.5rem .7rem}
figure.query{border:2px solid var(--first)}
figcaption{font-size:.9rem}
table{border-collapse:collapse}
td,th{padding:.25rem .9rem .25rem 0;text-align:left;vertical-align:top;font-variant-numeric:tabular-nums}
td{min-width:4rem}
th{font-weight:600;border-bottom:1px solid var(--rule)}
.told{unicode-bidi:isolate;overflow-wrap:anywhere}
.right{color:var(--right)}
.wrong{color:var(--wrong)}
svg{display:block;width:100%;height:auto;max-width:40rem}
@media print{svg{break-inside:avoid}h2{break-after:avoid}}
"""


def render_page(title: str, parts: Iterable[str], style: str = "") -> str:
    """A whole page.

    Args:
        parts: HTML, which may hold no text that was not escaped.
        style: CSS beside that of all pages.
    """
    head = (
        "<!doctype html><html lang=en><meta charset=utf-8>"
        f'<meta http-equiv=Content-Security-Policy content="{POLICY}"><title>{escape(title)}</title>'
        "<meta name=viewport content='width=device-width,initial-scale=1'>"
        f"<style>{VARIABLES}{STYLE}{style}</style>"
    )
    return "\n".join([head, *parts, "</html>"])


def text(told: str, kind: str = "") -> str:
    """Text of a corpus, cut if very long; it keeps to itself whatever letters and directions it has.

    Args:
        kind: a class of the page's style, which may show less of it; on hover all is shown.
    """
    shown = escape(told if len(told) <= MOST_TEXT else told[:MOST_TEXT] + "\u2026")
    return f'<span class="told {kind}" dir=auto title="{shown}">{shown}</span>'


def picture(data: bytes) -> str:
    """An encoded PNG or WebP picture."""
    return f"<img alt='' src='{data_uri(data)}'>"


def data_uri(data: bytes) -> str:
    """An encoded PNG or WebP picture as a URL that holds it."""
    kind = "png" if data.startswith(b"\x89PNG") else "webp"
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def thumbnail(data: bytes, max_pixels: int) -> bytes:
    """A WebP of at most `THUMBNAIL` pixels in both directions.

    Args:
        data: an encoded picture of any kind that is read.
        max_pixels: larger ones are not decoded.

    Raises:
        PictureError: it cannot be decoded.
    """
    small = examine(data, max_pixels=max_pixels, side=THUMBNAIL).picture
    small.thumbnail((THUMBNAIL, THUMBNAIL))
    buffer = io.BytesIO()
    small.save(buffer, "WEBP", quality=75)
    return buffer.getvalue()


def facts_table(facts: Mapping[str, str]) -> str:
    """Names and what they are, as text."""
    rows = "".join(f"<tr><th>{escape(key)}</th><td>{text(value)}</td></tr>" for key, value in facts.items())
    return f"<table>{rows}</table>"
