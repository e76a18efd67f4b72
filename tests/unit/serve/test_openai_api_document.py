"""What the API says of itself, held against what it does."""

from __future__ import annotations

import json

import jsonschema
import pytest
from fastapi.routing import APIRoute

from mmicl_core.errors import BankError, DataError
from pipelines.serve.errors import DeadlineError, OverloadedError, UnavailableError
from pipelines.serve.keys import add_key
from pipelines.serve.openai_api import build_api
from tests.served import (
    AIM,
    BASE,
    FakeGenerator,
    assistant,
    call,
    data_uri,
    events_of,
    make_services,
    png,
    user,
)

SHOT = {"image_url": data_uri(png()), "question": "This is", "answer": "bako"}
ASKED = {"model": AIM.id, "messages": [user("a", png()), assistant("b"), user("c", png(1))]}
CHAT, PACKS, EMBEDDINGS = "/v1/chat/completions", "/v1/demo_packs", "/v1/embeddings"


@pytest.fixture
def services(tmp_path):
    return make_services(tmp_path)


def document_of(services):
    response = call(services, "GET", "/openapi.json")
    assert response.status_code == 200
    return response.json()


def validator(document, schema):
    return jsonschema.Draft202012Validator(schema | {"components": document["components"]})


def routes_of(app):
    """Every address and method of an application, also of routers that it includes."""
    found, waiting = set(), list(app.routes)
    while waiting:
        route = waiting.pop()
        if isinstance(route, APIRoute):
            found |= {(route.path_format, method.lower()) for method in route.methods}
        else:
            waiting += getattr(route, "routes", None) or route.original_router.routes
    return found


def hold(document, template, method, response):
    """A response is one of those that the document tells of."""
    told = document["paths"][template][method.lower()]["responses"]
    assert str(response.status_code) in told, f"{method} {template} answers {response.status_code}"
    told = told[str(response.status_code)]
    kind = response.headers["content-type"].partition(";")[0]
    assert kind in told["content"]
    for name, header in told["headers"].items():
        value = response.headers[name]
        validator(document, header["schema"]).validate(
            int(value) if header["schema"]["type"] == "integer" else value
        )
    if kind == "application/json":
        validator(document, told["content"][kind]["schema"]).validate(response.json())


def test_every_route_is_told_and_no_other(services):
    told = {(path, method) for path, item in document_of(services)["paths"].items() for method in item}
    assert told == routes_of(build_api(services))
    assert (CHAT, "post") in told and ("/openapi.json", "get") in told


def test_document_is_openapi_without_a_dangling_reference(services):
    document = document_of(services)
    assert document["openapi"].startswith("3.1")
    names = {line.split('"')[0] for line in json.dumps(document).split('"#/components/schemas/')[1:]}
    assert names <= set(document["components"]["schemas"])
    for schema in document["components"]["schemas"].values():
        jsonschema.Draft202012Validator.check_schema(schema)
    operations = [one for item in document["paths"].values() for one in item.values()]
    assert len({one["operationId"] for one in operations}) == len(operations)
    assert all(one["description"] for one in operations)


def test_document_names_keys_where_they_are_needed_and_only_there(tmp_path):
    keys = tmp_path / "keys"
    header = {"authorization": f"Bearer {add_key(keys, 'me')}"}
    services = make_services(tmp_path, keys=str(keys))
    document = call(services, "GET", "/openapi.json", headers=header).json()
    assert document["security"] == [{"key": []}]
    paths = document["paths"]
    assert {
        path
        for path, item in paths.items()
        if "401" not in item.get("get", {"responses": "401"})["responses"]
    } == {
        "/healthz",
        "/readyz",
    }
    for path, method in routes_of(build_api(services)):
        response = call(services, method, path.replace("{model}", "x").replace("{pack_id}", "x"))
        if path not in ("/healthz", "/readyz"):
            assert response.status_code == 401
        hold(document, path, method, response)
    assert "security" not in document_of(make_services(tmp_path))


@pytest.mark.parametrize(
    ("method", "template", "path", "more", "status"),
    [
        ("POST", CHAT, CHAT, {"json": ASKED}, 200),
        ("POST", CHAT, CHAT, {"json": ASKED | {"n": 2, "logprobs": True, "top_logprobs": 2}}, 200),
        ("POST", CHAT, CHAT, {"json": ASKED | {"stream": True}}, 200),
        ("POST", CHAT, CHAT, {"json": ASKED | {"n": "x"}}, 400),
        ("POST", CHAT, CHAT, {"json": ASKED | {"model": "x"}}, 404),
        ("POST", CHAT, CHAT, {"json": ASKED | {"demo_pack": "x"}}, 404),
        ("POST", CHAT, CHAT, {"content": b"{}"}, 415),
        ("GET", "/v1/models", "/v1/models", {}, 200),
        ("GET", "/v1/models/{model}", "/v1/models/nano@aim", {}, 200),
        ("GET", "/v1/models/{model}", "/v1/models/x", {}, 404),
        ("POST", PACKS, PACKS, {"json": {"demonstrations": [SHOT]}}, 200),
        ("POST", PACKS, PACKS, {"json": {"demonstrations": []}}, 400),
        ("POST", PACKS, PACKS, {"json": {"demonstrations": [SHOT], "model": "x"}}, 404),
        ("GET", PACKS, PACKS, {}, 200),
        ("GET", PACKS + "/{pack_id}", PACKS + "/x", {}, 404),
        ("DELETE", PACKS + "/{pack_id}", PACKS + "/x", {}, 404),
        ("GET", PACKS + "/{pack_id}/export", PACKS + "/x/export", {}, 404),
        ("POST", PACKS + "/import", PACKS + "/import", {"content": b"x"}, 415),
        (
            "POST",
            PACKS + "/import",
            PACKS + "/import",
            {"content": b"x", "headers": {"content-type": "application/octet-stream"}},
            409,
        ),
        ("POST", EMBEDDINGS, EMBEDDINGS, {"json": {"model": "nano", "input": data_uri(png())}}, 200),
        (
            "POST",
            EMBEDDINGS,
            EMBEDDINGS,
            {"json": {"model": "nano", "input": data_uri(png()), "encoding_format": "base64"}},
            200,
        ),
        ("POST", EMBEDDINGS, EMBEDDINGS, {"json": {"model": "nano", "input": "a"}}, 400),
        ("GET", "/healthz", "/healthz", {}, 200),
        ("GET", "/readyz", "/readyz", {}, 200),
        ("GET", "/metrics", "/metrics", {}, 200),
        ("GET", "/openapi.json", "/openapi.json", {}, 200),
    ],
)
def test_answers_are_as_the_document_says(services, method, template, path, more, status):
    response = call(services, method, path, **more)
    assert response.status_code == status, response.text
    hold(document_of(services), template, method, response)


@pytest.mark.parametrize("path", [PACKS, PACKS + "/{pack_id}", PACKS + "/{pack_id}/export"])
@pytest.mark.parametrize("method", ["GET", "DELETE"])
def test_answers_about_a_pack_are_as_the_document_says(services, path, method):
    name = call(services, "POST", PACKS, json={"demonstrations": [SHOT]}).json()["id"]
    document = document_of(services)
    if method.lower() in document["paths"][path]:
        response = call(services, method, path.format(pack_id=name))
        assert response.status_code == 200
        hold(document, path, method, response)


@pytest.mark.parametrize("fields", [{}, {"logprobs": True, "top_logprobs": 1, "n": 2}])
def test_events_of_a_stream_are_as_the_document_says(services, fields):
    document = document_of(services)
    content = document["paths"][CHAT]["post"]["responses"]["200"]["content"]["text/event-stream"]
    options = {"stream": True, "stream_options": {"include_usage": True}}
    *chunks, _ = events_of(call(services, "POST", CHAT, json=ASKED | options | fields))
    assert len(chunks) > 4
    for chunk in chunks:
        validator(document, content["x-itemSchema"]).validate(chunk)
    services.generator._break_off = DataError("broken")
    *_, last = events_of(call(services, "POST", CHAT, json=ASKED | options | fields))
    validator(document, {"$ref": "#/components/schemas/ErrorBody"}).validate(last)


@pytest.mark.parametrize(
    "error",
    [
        DataError("x"),
        BankError("x"),
        OverloadedError("x", 2),
        UnavailableError("x"),
        DeadlineError("x"),
        RuntimeError("x"),
    ],
)
def test_failures_of_replicas_are_as_the_document_says(tmp_path, error):
    services = make_services(tmp_path, generator=FakeGenerator(errors=[error] * 2))
    document = document_of(services)
    for stream in (True, False):
        hold(document, CHAT, "POST", call(services, "POST", CHAT, json=ASKED | {"stream": stream}))
    bodies = {PACKS: {"demonstrations": [SHOT]}, EMBEDDINGS: {"model": "nano", "input": data_uri(png())}}
    for path, body in bodies.items():
        if path == PACKS or not isinstance(error, BankError):
            services.compressor._errors.append(error)
            hold(document, path, "POST", call(services, "POST", path, json=body))


def test_limits_and_sizes_are_told_where_they_are_met(tmp_path):
    services = make_services(tmp_path, requests_per_minute=1, max_images=1, max_image_bytes=1024)
    document = document_of(services)
    for path, method in routes_of(build_api(services)) - {
        ("/healthz", "get"),
        ("/readyz", "get"),
        ("/metrics", "get"),
    }:
        hold(document, path, method, call(services, method, path))
    roomy = make_services(tmp_path, max_images=1, max_image_bytes=1024)
    document = document_of(roomy)
    for path, method in routes_of(build_api(roomy)) - {
        ("/healthz", "get"),
        ("/readyz", "get"),
        ("/metrics", "get"),
    }:
        headers = {"content-length": str(10**9), "content-type": "application/json"}
        response = call(roomy, method, path, headers=headers)
        assert response.status_code == 413
        hold(document, path, method, response)


BODIES = [
    (CHAT, ASKED),
    (CHAT, ASKED | {"stop": "a", "demo_pack": "x", "temperature": 1.5, "tools": None}),
    (CHAT, ASKED | {"stop": ["a"] * 4, "demo_pack": {"id": "x", "select": 2}, "presence_penalty": 0}),
    (CHAT, ASKED | {"stop": ["a"] * 5}),
    (CHAT, ASKED | {"presence_penalty": 1}),
    (CHAT, ASKED | {"tools": []}),
    (CHAT, ASKED | {"response_format": {"type": "json_object"}}),
    (CHAT, ASKED | {"unknown": 1}),
    (CHAT, ASKED | {"top_logprobs": 21, "logprobs": True}),
    (CHAT, ASKED | {"messages": []}),
    (CHAT, ASKED | {"top_logprobs": 2}),
    (CHAT, ASKED | {"top_logprobs": 2, "logprobs": True}),
    (CHAT, ASKED | {"stream_options": {}}),
    (CHAT, ASKED | {"stream_options": {}, "stream": True}),
    (CHAT, ASKED | {"max_tokens": 2, "max_completion_tokens": 2}),
    (CHAT, ASKED | {"max_tokens": 2, "max_completion_tokens": None}),
    (CHAT, ASKED | {"messages": [user("a", "cat.png")]}),
    (CHAT, ASKED | {"messages": [{"role": "user", "content": "a"}]}),
    (CHAT, ASKED | {"messages": [{"role": "user", "content": []}]}),
    (CHAT, ASKED | {"messages": [{"role": "user", "content": [{"type": "text"}]}]}),
    (
        CHAT,
        ASKED
        | {"messages": [{"role": "user", "content": [{"type": "text", "text": "a", "image_url": "b"}]}]},
    ),
    (
        CHAT,
        ASKED
        | {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": data_uri(png())}]}]},
    ),
    (PACKS, {"demonstrations": [SHOT]}),
    (PACKS, {"demonstrations": [{**SHOT, "image_url": {"url": data_uri(png()), "detail": "low"}}]}),
    (PACKS, {"demonstrations": [{"question": "a", "answer": "b"}]}),
    (PACKS, {"demonstrations": [SHOT | {"image": "aa=="}]}),
    (PACKS, {"demonstrations": []}),
    (EMBEDDINGS, {"model": "nano", "input": data_uri(png())}),
    (EMBEDDINGS, {"model": "nano", "input": [{"image_url": data_uri(png())}, data_uri(png())]}),
    (EMBEDDINGS, {"model": "nano", "input": []}),
    (EMBEDDINGS, {"model": "nano", "input": "a text"}),
    (EMBEDDINGS, {"model": "nano", "input": data_uri(png()), "dimensions": 3}),
]


@pytest.mark.parametrize(("path", "body"), BODIES)
def test_bodies_that_are_taken_and_refused_are_those_that_the_document_says(services, path, body):
    document = document_of(services)
    schema = document["paths"][path]["post"]["requestBody"]["content"]["application/json"]["schema"]
    response = call(services, "POST", path, json=body)
    assert validator(document, schema).is_valid(body) == (response.status_code != 400), response.text


def test_base_model_alone_has_the_same_document(tmp_path):
    base = make_services(tmp_path, generator=FakeGenerator(models=(BASE,)))
    assert document_of(base)["paths"].keys() == document_of(make_services(tmp_path))["paths"].keys()
