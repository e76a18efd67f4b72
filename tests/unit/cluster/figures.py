"""Dashboards and alerts as their tests see them: expressions of PromQL, and the names that they ask for."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

FOLDER = Path(__file__).parents[3] / "cluster" / "dashboards"
BOARDS = {path.stem: path for path in sorted(FOLDER.glob("*.json"))}
ALERTS = FOLDER / "alerts.yaml"

# What expressions call; histogram_quantile and the like take numbers and sums.
AGGREGATIONS = {"sum", "min", "max", "avg", "count"}
FUNCTIONS = {
    "rate",
    "increase",
    "delta",
    "histogram_quantile",
    "last_over_time",
    "max_over_time",
}
GROUPING = {"by", "without", "on", "ignoring"}
OPERATORS = {"and", "or", "unless"}
TOKEN = re.compile(
    r'(?P<space>\s+)|(?P<string>"(?:[^"\\]|\\.)*")|(?P<range>\[[^\]]*\])'
    r"|(?P<number>\d+(?:\.\d+)?(?:e\d+)?)|(?P<name>[A-Za-z_:][A-Za-z0-9_:]*)"
    r"|(?P<sign>=~|!~|!=|==|>=|<=|[-+*/%^<>=(){},])"
)
RANGE = re.compile(r"\[(\d+[smhd]|\$__rate_interval)\]")


@dataclass(frozen=True)
class Asked:
    """A metric that an expression asks for."""

    name: str
    labels: frozenset[str]
    """That it selects by."""
    ranged: bool


@dataclass(frozen=True)
class Query:
    """An expression, taken apart."""

    metrics: tuple[Asked, ...]
    grouped: frozenset[str]
    """Labels that it groups by."""


def parse(expression: str) -> Query:
    """The metrics and labels of an expression; knows of PromQL what is used here, and refuses more."""
    tokens = list(_tokens(expression))
    metrics: list[Asked] = []
    grouped: set[str] = set()
    place, open_brackets = 0, 0
    while place < len(tokens):
        kind, text = tokens[place]
        place += 1
        if text in "()":
            open_brackets += 1 if text == "(" else -1
            assert open_brackets >= 0, f"{expression}: a bracket closes that none opens"
        if kind != "name" or text in OPERATORS:
            continue
        after = tokens[place][1] if place < len(tokens) else ""
        if text in GROUPING:
            assert after == "(", f"{expression}: {text} without labels"
            place, labels = _labels(tokens, place)
            grouped |= labels
        elif after == "(" or after in GROUPING:
            assert text in AGGREGATIONS | FUNCTIONS, f"{expression}: no function is called {text}"
        else:
            place, selected = _matchers(tokens, place)
            ranged = place < len(tokens) and tokens[place][0] == "range"
            metrics.append(Asked(text, frozenset(selected), ranged))
    assert not open_brackets, f"{expression}: a bracket is not closed"
    return Query(tuple(metrics), frozenset(grouped))


def _tokens(expression: str) -> Iterator[tuple[str, str]]:
    place = 0
    while place < len(expression):
        found = TOKEN.match(expression, place)
        assert found and found.lastgroup, f"{expression}: nothing known at {expression[place:]!r}"
        if found.lastgroup == "range":
            assert RANGE.fullmatch(found[0]), f"{expression}: {found[0]} is no time"
        if found.lastgroup != "space":
            yield found.lastgroup, found[0]
        place = found.end()


def _labels(tokens: list[tuple[str, str]], place: int) -> tuple[int, set[str]]:
    end = tokens.index(("sign", ")"), place)
    inside = tokens[place + 1 : end]
    assert all(kind == "name" or text == "," for kind, text in inside), inside
    return end + 1, {text for kind, text in inside if kind == "name"}


def _matchers(tokens: list[tuple[str, str]], place: int) -> tuple[int, set[str]]:
    if place >= len(tokens) or tokens[place][1] != "{":
        return place, set()
    end = tokens.index(("sign", "}"), place)
    matchers = tokens[place + 1 : end]
    # Of label, sign, string, and a comma between them.
    for number in range(0, len(matchers), 4):
        (label, _), (_, sign), (kind, _), *_ = (*matchers[number : number + 3], ("", ""))
        assert label and sign in ("=", "=~", "!=", "!~") and kind == "string", matchers
    return end + 1, {text for kind, text in matchers if kind == "name"}


@functools.cache
def board(name: str) -> dict[str, Any]:
    return json.loads(BOARDS[name].read_text(encoding="utf-8"))


def panels(name: str) -> list[dict[str, Any]]:
    """All that show something, without the headings."""
    return [panel for panel in board(name)["panels"] if panel["type"] != "row"]


def variables(name: str) -> Mapping[str, dict[str, Any]]:
    return {one["name"]: one for one in board(name)["templating"]["list"]}


def values_of(variable: Mapping[str, Any]) -> tuple[str, str]:
    """The metric and the label whose values a variable takes."""
    found = re.fullmatch(r"label_values\((\w+), (\w+)\)", variable["query"]["query"])
    assert found, variable
    return found[1], found[2]


def rules() -> list[dict[str, Any]]:
    told = yaml.safe_load(ALERTS.read_text(encoding="utf-8"))
    return [rule for group in told["groups"] for rule in group["rules"]]


def expressions() -> Iterator[tuple[str, str]]:
    """Every expression, and where it stands."""
    for name in BOARDS:
        for panel in panels(name):
            for target in panel["targets"]:
                yield f"{name}: {panel['title']} {target['refId']}", target["expr"]
        for variable in variables(name).values():
            if variable["type"] == "query":
                yield f"{name}: ${variable['name']}", values_of(variable)[0]
    for rule in rules():
        yield rule["alert"], rule["expr"]


def asked_for() -> set[str]:
    """The names of all metrics that are asked for."""
    return {metric.name for _, expression in expressions() for metric in parse(expression).metrics}


def of_ray(name: str) -> bool:
    """Whether Ray tells it of itself."""
    return name.startswith("ray_") and not name.startswith("ray_mmicl_")
