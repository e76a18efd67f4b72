"""A client that knows nothing but an OpenAPI document: it makes requests out of it, and holds answers to it.

schema --values-->  JSON that fits, but for rules that no schema can say
       --nearly-->  the same with a few changes
       --anything-> any JSON
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, reduce
from typing import Any
from urllib.parse import quote

import httpx
import jsonschema
from hypothesis import strategies as st

__all__ = ["Operation", "Request", "Walker", "anything", "mostly"]

JSON, EVENTS = "application/json", "text/event-stream"
ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
BEYOND_THE_DOCUMENT = (404, 405)
"""What a path answers with that is none of the document's."""

Strategy = st.SearchStrategy[Any]

odd_text = st.text(max_size=20) | st.sampled_from(("", "\0", "\ud800", "<image>", "</s>", "..", "a/b", "%00"))
numbers = st.integers() | st.floats() | st.sampled_from((0, -1, 1, 2**31, 2**63, 10**400, 0.5))
anything: Strategy = st.recursive(
    st.none() | st.booleans() | numbers | odd_text,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(odd_text, inner, max_size=4),
    max_leaves=8,
)
"""Any JSON, and what Python writes in its place."""


@dataclass(frozen=True)
class Operation:
    """A method of a path."""

    method: str
    path: str
    about: Mapping[str, Any]

    @property
    def parameters(self) -> Sequence[Mapping[str, Any]]:
        """Those in the path."""
        return [one for one in self.about.get("parameters", ()) if one["in"] == "path"]

    @property
    def bodies(self) -> Mapping[str, Any]:
        """Schemas by media type."""
        content = self.about.get("requestBody", {}).get("content", {})
        return {kind: one["schema"] for kind, one in content.items()}

    def __str__(self) -> str:
        return f"{self.method.upper()} {self.path}"


@dataclass(frozen=True)
class Request:
    """What a walker sends."""

    operation: Operation
    path: str
    headers: Mapping[str, str]
    content: bytes | None
    is_on_its_path: bool
    """Whether the parameters leave the path what it is."""


class Walker:
    """Makes requests, and judges answers.

    Args:
        document: of the server.
        known: values that mean something, by the names of properties and parameters.
        files: bodies that are no JSON.
    """

    def __init__(self, document: Mapping[str, Any], known: Mapping[str, Strategy], files: Strategy) -> None:
        self._document, self._known, self._files = document, known, files
        self._validators: dict[str, Any] = {}

    @cached_property
    def operations(self) -> list[Operation]:
        """All that the document tells of."""
        return [
            Operation(method, path, about)
            for path, methods in self._document["paths"].items()
            for method, about in methods.items()
        ]

    # Making.

    def requests(self, operation: Operation) -> Strategy:
        """Requests to an operation."""

        @st.composite
        def make(draw: st.DrawFn) -> Request:
            path, is_on_its_path = operation.path, True
            for parameter in operation.parameters:
                value = str(draw(self._value(parameter["schema"], parameter["name"])))
                is_on_its_path &= bool(value) and "/" not in value and value not in (".", "..")
                escaped = quote(value.encode("utf-8", "surrogatepass"), safe="")
                path = path.replace(f"{{{parameter['name']}}}", escaped)
            odd = st.dictionaries(st.sampled_from(list(HEADERS)), st.integers(), min_size=1, max_size=2)
            headers = draw(mostly(st.just({}), odd))
            headers = {name: HEADERS[name][number % len(HEADERS[name])] for name, number in headers.items()}
            if draw(st.integers(0, 9)) == 0:
                path += "?" + quote(draw(odd_text).encode("utf-8", "surrogatepass"), safe="=&")
            content = None
            if operation.bodies:
                kind = draw(st.sampled_from(list(operation.bodies)))
                headers = {"content-type": kind} | headers
                content = draw(self._body(operation.bodies[kind]) if kind == JSON else self._files)
            return Request(operation, path, headers, content, is_on_its_path)

        return make()

    def _body(self, schema: Mapping[str, Any]) -> Strategy:
        fits = self.values(schema)
        return mostly(fits, mostly(nearly(fits), anything)).map(lambda value: json.dumps(value).encode())

    def values(self, schema: Mapping[str, Any]) -> Strategy:
        """Values that fit a schema."""
        return st.deferred(lambda: self._make(schema))

    def _value(self, schema: Mapping[str, Any], name: str) -> Strategy:
        values = self.values(schema)
        return mostly(self._known[name], values) if name in self._known else values

    def _make(self, schema: Mapping[str, Any]) -> Strategy:
        if "$ref" in schema:
            return self.values(self._resolve(schema["$ref"]))
        if "const" in schema:
            return st.just(schema["const"])
        if "enum" in schema:
            return st.sampled_from(schema["enum"])
        if "oneOf" in schema and "properties" in schema:
            return st.one_of([self._object(_joined(schema, branch)) for branch in schema["oneOf"]])
        for several in ("anyOf", "oneOf"):
            if several in schema:
                return st.one_of([self.values(one) for one in schema[several]])
        return self._of_type(schema)

    def _of_type(self, schema: Mapping[str, Any]) -> Strategy:
        kind = schema.get("type")
        if kind == "object":
            return self._object(schema)
        if kind == "array":
            least, most = schema.get("minItems", 0), schema.get("maxItems", 4)
            return st.lists(self.values(schema.get("items", {})), min_size=least, max_size=min(4, most))
        if kind == "string":
            return st.text(min_size=schema.get("minLength", 0), max_size=min(12, schema.get("maxLength", 12)))
        if kind in ("integer", "number"):
            return _number(schema)
        return {"boolean": st.booleans(), "null": st.none(), None: anything}[kind]

    def _object(self, schema: Mapping[str, Any]) -> Strategy:
        fields = {name: self._value(one, name) for name, one in schema.get("properties", {}).items()}
        required = schema.get("required", ())
        more = schema.get("additionalProperties")
        if not fields and isinstance(more, Mapping):
            return st.dictionaries(st.text(max_size=5), self.values(more), max_size=3)

        @st.composite
        def make(draw: st.DrawFn) -> dict[str, Any]:
            optional = [name for name in fields if name not in required]
            some = draw(st.lists(st.sampled_from(optional), max_size=3, unique=True)) if optional else []
            return {name: draw(fields[name]) for name in (*required, *some)}

        return make()

    def _resolve(self, reference: str) -> Mapping[str, Any]:
        found: Mapping[str, Any] = reduce(lambda at, name: at[name], reference[2:].split("/"), self._document)
        return found

    # Judging.

    def problem(self, request: Request, response: httpx.Response) -> str | None:
        """What the document does not allow in an answer; None where it allows it."""
        responses = request.operation.about["responses"]
        status = response.status_code
        if not ID.fullmatch(response.headers.get("x-request-id", "")):
            return f"there is no request id among {dict(response.headers)}"
        if str(status) not in responses:
            if request.is_on_its_path or status not in BEYOND_THE_DOCUMENT:
                return f"status {status} is none of {list(responses)}"
            return self._misfit({"$ref": "#/components/schemas/ErrorBody"}, response.json())
        about = responses[str(status)]
        kind = response.headers.get("content-type", "").partition(";")[0]
        if kind not in about.get("content", {}):
            return f"content type {kind!r} is none of {list(about.get('content', {}))}"
        missing = [name for name in about.get("headers", {}) if name not in response.headers]
        if missing:
            return f"headers {missing} are missing"
        if kind == EVENTS:
            return self._problem_of_events(about["content"][EVENTS]["x-itemSchema"], response.text)
        return self._misfit(about["content"][kind]["schema"], response.json()) if kind == JSON else None

    def _problem_of_events(self, schema: Mapping[str, Any], text: str) -> str | None:
        *events, last = [event.removeprefix("data: ") for event in text.strip().split("\n\n")]
        if last != "[DONE]":
            return self._misfit({"$ref": "#/components/schemas/ErrorBody"}, json.loads(last))
        return next(filter(None, (self._misfit(schema, json.loads(event)) for event in events)), None)

    def _misfit(self, schema: Mapping[str, Any], value: Any) -> str | None:
        key = json.dumps(schema)
        if key not in self._validators:
            whole = {**schema, "components": self._document["components"]}
            self._validators[key] = jsonschema.Draft202012Validator(whole)
        error = next(self._validators[key].iter_errors(value), None)
        return None if error is None else f"{error.json_path}: {error.message[:500]}"


HEADERS: Mapping[str, tuple[str, ...]] = {
    "authorization": ("", "Bearer", "Bearer wrong", "Basic YTpi", "Bearer \xff", "Bearer " + "a" * 5000),
    "x-request-id": ("ok-1", "", "a" * 65, "\xff", "a b"),
    "content-type": ("text/plain", "", "application/json; charset=latin-1", "APPLICATION/JSON", "a/b"),
    "accept": ("text/html", "*/*;q=0", "\xff"),
    "content-encoding": ("gzip", "x"),
    "if-none-match": ("*",),
}


def mostly(one: Strategy, other: Strategy) -> Strategy:
    """`other` in one of eight times."""
    return st.sampled_from((one,) * 7 + (other,)).flatmap(lambda chosen: chosen)


@st.composite
def nearly(draw: st.DrawFn, values: Strategy) -> Any:
    """Values of a strategy with one to three changes somewhere in them."""
    holder = [json.loads(json.dumps(draw(values)))]
    for _ in range(draw(st.integers(1, 3))):
        inside, key = draw(st.sampled_from(list(_places(holder))))
        change = draw(st.sampled_from(("replace", "drop", "add", "double", "wrap")))
        if change == "drop" and inside is not holder:
            del inside[key]
        elif change == "add" and isinstance(inside[key], dict):
            inside[key][draw(odd_text)] = draw(anything)
        elif change == "double" and isinstance(inside[key], (list, str)):
            inside[key] *= draw(st.sampled_from((0, 2, 70)))
        elif change == "wrap":
            inside[key] = [inside[key]]
        else:
            inside[key] = draw(anything)
    return holder[0]


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    keys = value if isinstance(value, dict) else range(len(value))
    for key in keys:
        yield value, key
        if isinstance(value[key], (dict, list)):
            yield from _places(value[key])


def _joined(schema: Mapping[str, Any], branch: Mapping[str, Any]) -> dict[str, Any]:
    """An object that has to fit a branch as well."""
    properties = dict(schema["properties"])
    for name, more in branch.get("properties", {}).items():
        properties[name] = more
    for name in branch.get("required", ()):
        options = properties[name].get("anyOf", [])
        properties[name] = {"anyOf": [one for one in options if one.get("type") != "null"]}
    return {"properties": properties, "required": [*schema.get("required", ()), *branch.get("required", ())]}


def _number(schema: Mapping[str, Any]) -> Strategy:
    whole = schema["type"] == "integer"
    least, most = schema.get("minimum"), schema.get("maximum")
    above, below = schema.get("exclusiveMinimum"), schema.get("exclusiveMaximum")
    if whole:
        least = above + 1 if above is not None else least
        most = below - 1 if below is not None else most
        return st.integers(least, most)
    ends: dict[str, Any] = {"exclude_min": above is not None, "exclude_max": below is not None}
    return st.floats(
        least if above is None else above,
        most if below is None else below,
        allow_nan=False,
        allow_infinity=False,
        **ends,
    )
