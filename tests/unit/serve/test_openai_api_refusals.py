"""What the API refuses, how it says so, and what it takes without effect."""

from __future__ import annotations

import pytest

from mmicl_core.errors import BankError, CheckpointError, DataError
from pipelines.serve.errors import DeadlineError, OverloadedError, UnavailableError, UnknownModelError
from tests.served import FakeGenerator, ask, assistant, call, error_of, make_services, png, user


@pytest.fixture
def services(tmp_path):
    return make_services(tmp_path, max_choices=3)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": 2.1}, "temperature"),
        ({"temperature": "0"}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"top_p": 1.1}, "top_p"),
        ({"n": 0}, "n"),
        ({"n": 4}, "n"),
        ({"n": True}, "n"),
        ({"stop": [".", ",", ";", ":", "!"]}, "stop"),
        ({"stop": ""}, "stop.0"),
        ({"stop": 3}, "stop"),
        ({"seed": 2**63}, "seed"),
        ({"seed": 1.5}, "seed"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"presence_penalty": 0.5}, "presence_penalty"),
        ({"frequency_penalty": -0.5}, "frequency_penalty"),
        ({"tools": []}, "tools"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools"),
        ({"tool_choice": "auto"}, "tool_choice"),
        ({"functions": []}, "functions"),
        ({"logit_bias": {"5": 1}}, "logit_bias"),
        ({"audio": {"voice": "alloy", "format": "mp3"}}, "audio"),
        ({"reasoning_effort": "low"}, "reasoning_effort"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "a"}}}, "response_format"),
        ({"store": True}, "store"),
        ({"modalities": ["text", "audio"]}, "modalities.1"),
        ({"service_tier": "priority"}, "service_tier"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": "5"}, "max_tokens"),
        ({"max_tokens": 10**30}, "max_tokens"),
        ({"max_completion_tokens": -1}, "max_completion_tokens"),
        ({"timeout_seconds": 0}, "timeout_seconds"),
        ({"stream": "yes"}, "stream"),
        ({"demo_pack": 7}, "demo_pack"),
        ({"demo_pack": {"id": "pack-1", "select": 0}}, "demo_pack.select"),
        ({"demonstrations": "some"}, "demonstrations"),
        ({"best_of": 2}, "best_of"),
        ({"messages": []}, "messages"),
        ({"messages": "This is"}, "messages"),
        ({"messages": [{"role": "tool", "content": "a"}]}, "messages.0.role"),
        ({"messages": [{"role": "user", "content": []}]}, "messages.0.content"),
        ({"messages": [{"role": "user", "content": None}]}, "messages.0.content"),
        ({"messages": [{"role": "user"}]}, "messages.0.content"),
        ({"messages": [{"role": "user", "content": "a", "name": "b"}]}, "messages.0.name"),
        ({"messages": [{"role": "user", "content": [{"type": "input_audio"}]}]}, "messages.0.content.0.type"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages.0.content.0"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
            "messages.0.content.0.image_url.url",
        ),
        ({"model": None}, "model"),
    ],
)
def test_field_that_cannot_be_honoured_is_refused_by_name(services, fields, param):
    error = error_of(ask(services, **fields), 400)
    assert (error["param"], error["type"]) == (param, "invalid_request_error")
    assert error["message"].startswith(f"{param}") or param in error["message"]
    assert services.generator.questions == []


@pytest.mark.parametrize(
    ("fields", "names"),
    [
        ({"max_tokens": 5, "max_completion_tokens": 5}, ["max_tokens", "max_completion_tokens"]),
        ({"stream_options": {"include_usage": True}}, ["stream_options", "stream"]),
        ({"top_logprobs": 3}, ["top_logprobs", "logprobs"]),
    ],
)
def test_fields_that_contradict_each_other_are_refused_by_their_names(services, fields, names):
    message = error_of(ask(services, **fields), 400)["message"]
    assert all(name in message for name in names)


@pytest.mark.parametrize(
    ("fields", "word"),
    [
        ({"response_format": {"type": "json_object"}}, "ask for JSON in the prompt"),
        ({"tools": []}, "this server calls no functions"),
        ({"best_of": 2}, "best_of is not supported: leave it out"),
    ],
)
def test_field_that_is_not_supported_is_refused_with_the_reason(services, fields, word):
    assert word in error_of(ask(services, **fields), 400)["message"]


@pytest.mark.parametrize(
    "fields",
    [
        {"temperature": 0, "top_p": 1, "n": 1, "presence_penalty": 0, "frequency_penalty": 0.0},
        {"temperature": None, "max_tokens": None, "stream": None, "stop": None, "seed": None, "n": None},
        {"user": "somebody", "metadata": {"a": "b"}, "safety_identifier": "x", "prompt_cache_key": "y"},
        {"response_format": {"type": "text"}, "modalities": ["text"], "store": False, "service_tier": "auto"},
        {"tools": None, "tool_choice": None, "logit_bias": None, "response_format": None, "demo_pack": None},
        {"stop": [], "logprobs": False, "demonstrations": None},
    ],
)
def test_fields_without_effect_are_taken(services, fields):
    assert ask(services, **fields).status_code == 200


@pytest.mark.parametrize(
    ("error", "status", "code", "headers"),
    [
        (DataError("the bytes are not a readable picture"), 400, "invalid_value", {}),
        (UnknownModelError("gone", "model"), 404, "model_not_found", {}),
        (BankError("damaged"), 409, "demo_pack_unusable", {"x-should-retry": "false"}),
        (OverloadedError("too many wait", 2.2), 429, "server_overloaded", {"retry-after": "3"}),
        (UnavailableError("starting"), 503, "no_replica", {"retry-after": "1"}),
        (DeadlineError("late"), 504, "deadline_exceeded", {}),
    ],
)
def test_error_of_a_replica_is_told_with_its_status_and_what_clients_do_by(
    tmp_path, error, status, code, headers
):
    services = make_services(tmp_path, generator=FakeGenerator(errors=[error]))
    response = ask(services)
    told = error_of(response, status)
    assert told["code"] == code
    assert told["message"] == str(error)
    assert (told["type"] == "server_error") == (status >= 500)
    found = {name: response.headers.get(name) for name in ("retry-after", "x-should-retry")}
    assert {name: value for name, value in found.items() if value is not None} == headers


@pytest.mark.parametrize("error", [RuntimeError("secret path"), CheckpointError("secret path")])
def test_unexpected_error_is_told_as_the_fault_of_the_server_and_keeps_its_secrets(tmp_path, error):
    services = make_services(tmp_path, generator=FakeGenerator(errors=[error]))
    told = error_of(ask(services), 500)
    assert (told["type"], told["code"]) == ("server_error", "internal_error")
    assert "secret" not in told["message"]


def test_long_text_is_not_told_back_as_a_whole(tmp_path):
    services = make_services(tmp_path, generator=FakeGenerator(errors=[DataError("x" * 100_000)]))
    assert len(error_of(ask(services), 400)["message"]) < 3000
    assert len(error_of(ask(services, seed="x" * 100_000), 400)["message"]) < 300
    assert len(error_of(ask(services, model="x" * 100_000), 404)["message"]) < 3000
    assert len(error_of(ask(services, **{"x" * 100_000: 1}), 400)["message"]) < 3000


def test_model_that_is_not_served_is_not_found_and_the_served_ones_named(services):
    error = error_of(ask(services, model="gpt-4o"), 404)
    assert (error["code"], error["param"]) == ("model_not_found", "model")
    assert all(name in error["message"] for name in ("'gpt-4o'", "'nano'", "'nano@aim'"))


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b"\xff\xfe",
        b'{"model": "nano", "messages": [{"role": "user", "content": "\\ud800"}]}',
        b'{"model": "nano", "messages": ' + b"[" * 100_000,
        b'{"model": "nano", "temperature": NaN, "messages": [{"role": "user", "content": "a"}]}',
    ],
)
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/demo_packs", "/v1/embeddings"])
def test_body_that_is_no_json_object_is_refused(services, path, body):
    response = call(services, "POST", path, content=body, headers={"content-type": "application/json"})
    assert error_of(response, 400)["type"] == "invalid_request_error"


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", None])
@pytest.mark.parametrize(
    "path", ["/v1/chat/completions", "/v1/demo_packs", "/v1/demo_packs/import", "/v1/embeddings"]
)
def test_body_that_any_web_page_may_send_is_refused(services, path, kind):
    headers = {} if kind is None else {"content-type": kind}
    error = error_of(call(services, "POST", path, content=b"{}", headers=headers), 415)
    assert "content-type: application/" in error["message"]


def test_body_over_the_limit_is_refused_before_it_is_read_to_its_end(tmp_path):
    services, sent = make_services(tmp_path, max_images=1, max_image_bytes=1024), 0

    async def endless():
        nonlocal sent
        while True:
            sent += 2**20
            yield b" " * 2**20

    headers = {"content-type": "application/json"}
    response = call(services, "POST", "/v1/chat/completions", content=endless(), headers=headers)
    assert error_of(response, 413)["code"] == "request_too_large"
    assert sent < 2**23


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/v1/nothing", 404),
        ("GET", "/v1/chat/completions", 405),
        ("GET", "/docs", 404),
        ("GET", "/redoc", 404),
    ],
)
def test_address_that_is_not_there_is_an_error_in_openai_shape(services, method, path, status):
    response = call(services, method, path)
    assert path in error_of(response, status)["message"]
    assert (response.headers.get("allow") == "POST") == (status == 405)


def test_first_wrong_message_is_told_and_nothing_is_asked(services):
    error = error_of(ask(services, [user("a", png()), assistant("b"), user("c", "cat.png")]), 400)
    assert error["param"] == "messages.2.content.1.image_url.url"
    assert (services.generator.questions, services.compressor.asked) == ([], [])
