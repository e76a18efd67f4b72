"""The HTTP API in front of fakes that keep the replicas' contracts."""

from __future__ import annotations

import asyncio
import base64
import json
import threading

import httpx
import numpy as np
import pytest

from mmicl_core.bank import Pack, PackEntry, UnknownPackError
from mmicl_core.config.serve import ServeConfig
from mmicl_core.errors import BankError, DataError
from mmicl_core.prompts import Turn
from pipelines.serve import openai_api
from pipelines.serve.contracts import Answer
from pipelines.serve.openai_api import build_api

CONFIG = ServeConfig(model_name="nano", max_images=3, max_image_bytes=1024, max_new_tokens=17)
PICTURE, OTHER_PICTURE = b"the bytes of a picture", b"those of another"
URI, OTHER_URI = (
    f"data:image/png;base64,{base64.b64encode(picture).decode()}" for picture in (PICTURE, OTHER_PICTURE)
)
ENTRY = PackEntry("pack-" + "1" * 32, tokens_full=(30, 31), tokens_fused=(5, 6))
FUSED = (np.zeros((5, 4), np.float32), np.ones((6, 4), np.float32))
ANSWER = Answer("bako mute", "stop", prompt_tokens=40, completion_tokens=2, ttft_ms=12.5)


class FakeCompressor:
    """Knows one pack and remembers what it was asked to fuse."""

    def __init__(self):
        self.demonstrations = None

    async def register(self, demonstrations):
        self.demonstrations = demonstrations
        return ENTRY

    async def describe(self, pack_id):
        return (await self.load(pack_id)).entry

    async def load(self, pack_id):
        if pack_id == "pack-foreign":
            raise BankError("made for another backbone")
        if pack_id != ENTRY.id:
            raise UnknownPackError(f"no pack {pack_id}")
        return Pack(ENTRY, FUSED)


class FakeGenerator:
    """Answers the same to everything, or fails, and remembers the question."""

    def __init__(self, error=None, pieces=("bako", " mute")):
        self.question = None
        self.error = error
        self.pieces = pieces

    async def answer(self, question):
        self.question = question
        if self.error is not None:
            raise self.error
        return ANSWER

    async def stream(self, question):
        self.question = question
        for piece in self.pieces:
            yield piece
        if self.error is not None:
            raise self.error
        yield ANSWER


def call(method, path, generator=None, compressor=None, config=CONFIG, **more) -> httpx.Response:
    async def request():
        api = build_api(config, compressor or FakeCompressor(), generator or FakeGenerator())
        # An unexpected error is answered with 500; the transport would raise it here as well.
        transport = httpx.ASGITransport(api, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            return await client.request(method, path, **more)

    return asyncio.run(request())


def ask(messages=None, **fields) -> httpx.Response:
    boundary = {key: fields.pop(key) for key in ("generator", "compressor", "config") if key in fields}
    body = {"model": "nano", "messages": [user("This is")] if messages is None else messages} | fields
    return call("POST", "/v1/chat/completions", json=body, **boundary)


def user(text, *urls):
    pictures = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
    return {"role": "user", "content": [{"type": "text", "text": text}, *pictures]}


def assistant(content):
    return {"role": "assistant", "content": content}


def error_of(response, status) -> dict:
    assert response.status_code == status, response.text
    assert list(response.json()) == ["error"]
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return error


def events(response) -> list:
    assert response.headers["content-type"].startswith("text/event-stream")
    lines = [line.removeprefix("data: ") for line in response.text.split("\n\n") if line]
    return [line if line == "[DONE]" else json.loads(line) for line in lines]


def test_conversation_reaches_the_generator_as_turns_with_the_bytes_of_their_pictures():
    generator = FakeGenerator()
    messages = [user("This is", URI), assistant("bako"), {"role": "user", "content": "Why?"}]
    messages += [assistant([{"type": "text", "text": "Because."}]), user("This is", URI)]
    assert ask(messages, generator=generator).status_code == 200
    question = generator.question
    assert question.turns == (
        Turn(("0.0",), "This is", "bako"),
        Turn((), "Why?", "Because."),
        Turn(("4.0",), "This is", None),
    )
    assert question.pictures == {"0.0": PICTURE, "4.0": PICTURE}
    assert (question.max_new_tokens, question.fused) == (17, ())


def test_all_pictures_of_one_message_reach_the_generator_in_their_order():
    generator = FakeGenerator()
    between = [
        {"type": "image_url", "image_url": {"url": OTHER_URI}},
        {"type": "text", "text": "Are these"},
        {"type": "image_url", "image_url": {"url": URI}},
        {"type": "text", "text": "alike?"},
    ]
    messages = [user("This is", URI, OTHER_URI), assistant("no"), {"role": "user", "content": between}]
    config = CONFIG.model_copy(update={"max_images": 4})
    assert ask(messages, generator=generator, config=config).status_code == 200
    asked = generator.question
    first, second = asked.turns
    assert (first.question, first.answer) == ("This is", "no")
    assert (second.question, second.answer) == ("Are these\nalike?", None)
    shown = [[asked.pictures[key] for key in turn.pictures] for turn in asked.turns]
    assert shown == [[PICTURE, OTHER_PICTURE], [OTHER_PICTURE, PICTURE]]
    assert len(asked.pictures) == 4


@pytest.mark.parametrize("field", ["max_tokens", "max_completion_tokens"])
def test_limit_of_the_request_replaces_the_default(field):
    generator = FakeGenerator()
    ask(generator=generator, **{field: 5})
    assert generator.question.max_new_tokens == 5


def test_completion_has_openai_fields_and_counts_what_a_pack_saves():
    generator = FakeGenerator()
    reply = ask(demo_pack=ENTRY.id, generator=generator).json()
    message = {"role": "assistant", "content": "bako mute"}
    assert reply["object"] == "chat.completion"
    assert reply["model"] == "nano"
    assert reply["choices"] == [{"index": 0, "message": message, "finish_reason": "stop"}]
    assert reply["usage"] == {
        "prompt_tokens": 40,
        "completion_tokens": 2,
        "total_tokens": 42,
        "demo_tokens_full": 61,
        "demo_tokens_fused": 11,
    }
    assert reply["mmicl"] == {"ttft_ms": 12.5}
    assert generator.question.fused is FUSED


def test_completion_without_a_pack_counts_no_demonstrations():
    usage = ask().json()["usage"]
    assert (usage["demo_tokens_full"], usage["demo_tokens_fused"]) == (0, 0)


def test_every_completion_has_an_id_of_its_own():
    assert ask().json()["id"] != ask().json()["id"]


def test_stream_sends_each_piece_then_the_reason_then_usage_then_done():
    *chunks, done = events(ask(stream=True, stream_options={"include_usage": True}, demo_pack=ENTRY.id))
    assert done == "[DONE]"
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
    assert len({chunk["id"] for chunk in chunks}) == 1
    first, *pieces, last, usage = chunks
    assert first["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert [piece["choices"][0]["delta"] for piece in pieces] == [{"content": "bako"}, {"content": " mute"}]
    assert {piece["choices"][0]["finish_reason"] for piece in pieces} == {None}
    assert (last["choices"][0]["finish_reason"], last["mmicl"]) == ("stop", {"ttft_ms": 12.5})
    assert (usage["choices"], usage["usage"]["demo_tokens_full"]) == ([], 61)


def test_stream_tells_usage_only_where_it_was_asked_for():
    *chunks, _ = events(ask(stream=True))
    assert not any("usage" in chunk for chunk in chunks)


def test_stream_of_an_empty_answer_ends_with_done():
    *chunks, done = events(ask(stream=True, generator=FakeGenerator(pieces=())))
    assert (len(chunks), done) == (2, "[DONE]")


def test_stream_that_cannot_begin_is_an_error_with_its_status():
    refusing = FakeGenerator(error=DataError("the prompt is too long"), pieces=())
    error = error_of(ask(stream=True, generator=refusing), 400)
    assert error["message"] == "the prompt is too long"


def test_stream_that_breaks_off_says_so_and_is_not_done():
    *_, last = events(ask(stream=True, generator=FakeGenerator(error=RuntimeError("secret"))))
    assert last["error"]["type"] == "server_error"
    assert "secret" not in last["error"]["message"]


@pytest.mark.parametrize(
    ("url", "remedy"),
    [
        ("https://example.org/cat.png", "this server fetches nothing, send the picture itself as data:image"),
        ("http://169.254.169.254/latest/meta-data", "this server fetches nothing"),
        ("file:///etc/passwd", "this server fetches nothing"),
        ("/etc/passwd", "this server fetches nothing"),
        ("data:text/html;base64,PGI+", "send the picture itself as data:image"),
        ("data:image/png,raw", "send the picture itself as data:image/png;base64"),
        ("data:image/png;base64,not base64!", "is not base64"),
        ("data:image/png;base64,abc", "is not base64"),
        ("data:image/png;base64," + "A" * 1400, "1050 bytes, 1024 are allowed"),
        ("data:image/png;base64," + "A" * 100_000, "75000 bytes, 1024 are allowed"),
    ],
)
def test_picture_that_is_no_small_data_uri_is_refused_with_its_place_and_a_remedy(url, remedy):
    error = error_of(ask([user("This is", url)]), 400)
    assert error["type"] == "invalid_request_error"
    assert error["param"] == "messages.0.content.1.image_url.url"
    assert remedy in error["message"]


@pytest.mark.parametrize(
    ("size", "status"), [(1022, 200), (1023, 200), (1024, 200), (1025, 400), (1026, 400), (1027, 400)]
)
def test_picture_is_taken_up_to_the_size_limit_and_not_a_byte_over(size, status):
    data = base64.b64encode(b"x" * size).decode()
    response = ask([user("This is", f"DATA:image/PNG;base64,{data}")])
    assert response.status_code == status
    assert status == 200 or f"{size} bytes, 1024 are allowed" in response.text


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"temperature": 0.7}, "temperature"),
        ({"top_p": 0.9}, "top_p"),
        ({"n": 2}, "n"),
        ({"presence_penalty": 0.5}, "presence_penalty"),
        ({"frequency_penalty": 0.5}, "frequency_penalty"),
        ({"tools": []}, "tools"),
        ({"stop": ["."]}, "stop"),
        ({"logprobs": True}, "logprobs"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": "5"}, "max_tokens"),
        ({"max_tokens": 5, "max_completion_tokens": 5}, None),
        ({"stream_options": {"include_usage": True}}, None),
        ({"stream": "yes"}, "stream"),
        ({"demo_pack": 7}, "demo_pack"),
        ({"messages": []}, "messages"),
        ({"messages": "This is"}, "messages"),
    ],
)
def test_field_that_cannot_be_honoured_is_refused_by_name(fields, param):
    error = error_of(ask(**fields), 400)
    assert error["param"] == param
    assert all(name in error["message"] for name in (fields if param is None else [param]))


@pytest.mark.parametrize(
    "fields",
    [
        {"temperature": 0},
        {"temperature": 0.0, "top_p": 1.0, "n": 1, "presence_penalty": 0, "frequency_penalty": 0},
        {"temperature": None, "max_tokens": None, "stream": False, "seed": 3, "user": "somebody"},
    ],
)
def test_fields_that_greedy_decoding_honours_are_taken(fields):
    assert ask(**fields).status_code == 200


@pytest.mark.parametrize(
    ("messages", "param", "reason"),
    [
        ([{"role": "system", "content": "Be brief."}], "messages.0.role", "into the text of a user message"),
        ([assistant("bako")], "messages.0.role", "'user' belongs"),
        ([user("a"), user("b")], "messages.1.role", "'assistant' belongs"),
        ([user("a"), assistant("bako")], "messages", "end with a user message"),
        ([user("a", URI, "cat.png")], "messages.0.content.2.image_url.url", "this server fetches nothing"),
        ([user("a", *[URI] * 4)], "messages", "4 pictures, 3 are allowed"),
        (
            [user("a"), user("", URI) | {"role": "assistant"}],
            "messages.1.content.1.image_url.url",
            "assistant",
        ),
        ([user("")], "messages.0.content", "says nothing"),
        ([{"role": "user", "content": []}], "messages.0.content", "at least 1 item"),
        ([{"role": "user", "content": None}], "messages.0.content", "array"),
        ([{"role": "user", "content": [{"type": "input_audio"}]}], "messages.0.content.0.type", "image_url"),
        ([{"role": "user", "content": [{"type": "text"}]}], "messages.0.content.0", "'text'"),
        ([{"role": "user", "content": "a", "name": "b"}], "messages.0.name", "leave it out"),
        ([user("a", URI), assistant("b")] * 3 + [user("a", URI)], "messages", "4 pictures, 3 are allowed"),
    ],
)
def test_conversation_that_is_none_is_refused_with_its_place(messages, param, reason):
    error = error_of(ask(messages), 400)
    assert error["param"] == param
    assert reason in error["message"]


@pytest.mark.parametrize(
    ("error", "status", "code"),
    [
        (DataError("the bytes are not a readable picture"), 400, "invalid_value"),
        (BankError("damaged"), 409, "demo_pack_unusable"),
    ],
)
def test_error_of_a_replica_is_told_with_its_status(error, status, code):
    told = error_of(ask(generator=FakeGenerator(error=error)), status)
    assert (told["message"], told["code"], told["type"]) == (str(error), code, "invalid_request_error")


def test_unexpected_error_is_told_as_the_fault_of_the_server_and_keeps_its_secrets():
    error = error_of(ask(generator=FakeGenerator(error=RuntimeError("secret path"))), 500)
    assert (error["type"], error["code"]) == ("server_error", "internal_error")
    assert "secret" not in error["message"]


@pytest.mark.parametrize(("pack", "status"), [("pack-unknown", 404), ("pack-foreign", 409)])
def test_pack_that_cannot_be_used_is_refused_in_chat_and_by_itself(pack, status):
    assert error_of(ask(demo_pack=pack), status) == error_of(call("GET", f"/v1/demo_packs/{pack}"), status)


def test_model_that_is_not_served_is_not_found_and_the_served_one_named():
    error = error_of(ask(model="gpt-4o"), 404)
    assert (error["code"], error["param"]) == ("model_not_found", "model")
    assert "'gpt-4o'" in error["message"]
    assert "'nano'" in error["message"]


def test_models_lists_the_served_model_alone():
    (model,) = call("GET", "/v1/models").json()["data"]
    assert model == call("GET", "/v1/models/nano").json()
    assert (model["id"], model["object"]) == ("nano", "model")
    assert error_of(call("GET", "/v1/models/org/other"), 404)["code"] == "model_not_found"


def register(demonstrations, **boundary) -> httpx.Response:
    return call("POST", "/v1/demo_packs", json={"demonstrations": demonstrations}, **boundary)


@pytest.mark.parametrize(
    "picture",
    [
        {"image_url": {"url": URI}},
        {"image_url": URI},
        {"image": base64.b64encode(PICTURE).decode()},
    ],
)
def test_pack_is_registered_from_any_form_of_picture(picture):
    compressor = FakeCompressor()
    reply = register([picture | {"question": "This is", "answer": "bako"}] * 2, compressor=compressor)
    assert reply.json() == {
        "id": ENTRY.id,
        "object": "demo_pack",
        "demonstrations": 2,
        "tokens_full": 61,
        "tokens_fused": 11,
    }
    assert reply.json() == call("GET", f"/v1/demo_packs/{ENTRY.id}").json()
    first, second = compressor.demonstrations
    assert first == second
    assert (first.images, first.question, first.answer) == ((PICTURE,), "This is", "bako")


@pytest.mark.parametrize(
    ("demonstrations", "param"),
    [
        ([], "demonstrations"),
        ([{"question": "This is", "answer": "bako"}], "demonstrations.0"),
        ([{"image": "aa==", "image_url": URI, "question": "a", "answer": "b"}], "demonstrations.0"),
        ([{"image_url": URI, "question": "This is"}], "demonstrations.0.answer"),
        ([{"image_url": URI, "question": "This is", "answer": ""}], "demonstrations.0.answer"),
        (
            [{"image_url": "https://x.org/a.png", "question": "a", "answer": "b"}],
            "demonstrations.0.image_url.url",
        ),
        ([{"image": "?", "question": "a", "answer": "b"}], "demonstrations.0.image"),
        ([{"image_url": URI, "question": "a", "answer": "b"}] * 4, "demonstrations"),
    ],
)
def test_pack_with_a_wrong_demonstration_is_refused_with_its_place(demonstrations, param):
    compressor = FakeCompressor()
    assert error_of(register(demonstrations, compressor=compressor), 400)["param"] == param
    assert compressor.demonstrations is None


def test_body_over_the_limit_is_refused_before_it_is_read_to_its_end():
    sent = 0

    async def endless():
        nonlocal sent
        while True:
            sent += 2**20
            yield b" " * 2**20

    error = error_of(call("POST", "/v1/chat/completions", content=endless()), 413)
    assert error["code"] == "request_too_large"
    assert sent < 2**24


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"\xff\xfe"])
def test_body_that_is_no_json_object_is_refused(body):
    assert (
        error_of(call("POST", "/v1/chat/completions", content=body), 400)["type"] == "invalid_request_error"
    )


@pytest.mark.parametrize(
    ("method", "path", "status"), [("GET", "/v1/nothing", 404), ("GET", "/v1/chat/completions", 405)]
)
def test_address_that_is_not_there_is_an_error_in_openai_shape(method, path, status):
    assert path in error_of(call(method, path), status)["message"]


def test_health_is_answered():
    assert call("GET", "/healthz").json() == {"status": "ok"}


def test_taking_a_request_apart_leaves_the_event_loop_free(monkeypatch):
    threads = []
    read = openai_api.read_conversation

    def note(*arguments):
        threads.append(threading.current_thread())
        return read(*arguments)

    monkeypatch.setattr(openai_api, "read_conversation", note)
    assert ask().status_code == 200
    assert threads != [threading.main_thread()]
