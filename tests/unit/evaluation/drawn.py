"""What a chart shows, as far as tests ask."""

from __future__ import annotations

import re
from collections.abc import Iterator
from xml.etree import ElementTree

__all__ = ["SVG", "XLINK", "Point", "boxes", "charts_of", "dots", "strokes", "texts", "told_aside"]

SVG = "{http://www.w3.org/2000/svg}"
XLINK = "{http://www.w3.org/1999/xlink}href"
Point = tuple[float, float]


def charts_of(page: str) -> list[str]:
    """The charts of a page."""
    return re.findall("<svg.*?</svg>", page, re.DOTALL)


def texts(chart: str) -> list[str]:
    """Each line of text."""
    return [element.text or "" for element in ElementTree.fromstring(chart).iter(f"{SVG}text")]


def told_aside(chart: str) -> tuple[str, str]:
    """The title and the description of those who cannot see the chart."""
    root = ElementTree.fromstring(chart)
    named = {element.get("id"): element.text for element in root if element.get("id")}
    title, described = (named[mark] or "" for mark in root.get("aria-labelledby", "").split())
    return title, described


def strokes(chart: str) -> list[tuple[list[Point], str]]:
    """Points and style of everything that is drawn as a line, of each piece of an interrupted one."""
    return [
        (_points(piece), path.get("style", ""))
        for path in _paths(chart)
        if "stroke:" in path.get("style", "")
        for piece in re.findall("M[^M]+", path.get("d", ""))
    ]


def boxes(chart: str) -> list[tuple[Point, Point]]:
    """Of each bar and column the corners that are least and greatest in both directions."""
    found = []
    for path in _paths(chart):
        if path.get("clip-path") and "z" in path.get("d", ""):
            places = list(zip(*_points(path.get("d", "")), strict=True))
            found.append(((min(places[0]), min(places[1])), (max(places[0]), max(places[1]))))
    return found


def dots(chart: str, colour: str) -> list[Point]:
    """Where there are markers of a colour."""
    return [
        (float(use.get("x", "")), float(use.get("y", "")))
        for use in ElementTree.fromstring(chart).iter(f"{SVG}use")
        if f"fill: {colour}" in use.get("style", "")
    ]


def _paths(chart: str) -> Iterator[ElementTree.Element]:
    return ElementTree.fromstring(chart).iter(f"{SVG}path")


def _points(drawn: str) -> list[Point]:
    return [(float(x), float(y)) for x, y in re.findall(r"[ML] ([-\d.]+) ([-\d.]+)", drawn)]
