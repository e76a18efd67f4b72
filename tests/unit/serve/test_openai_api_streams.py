"""Answers as they grow, and what becomes of work that nobody waits for."""

from __future__ import annotations

import asyncio
import json
import time

import httpx
import pytest

from mmicl_core.errors import BankError, DataError
from pipelines.serve import waiting
from pipelines.serve.openai_api import build_api
from tests.served import (
    FakeCompressor,
    FakeGenerator,
    ask,
    assistant,
    call,
    data_uri,
    error_of,
    events_of,
    make_services,
    png,
    served,
    user,
)

USAGE = {"stream": True, "stream_options": {"include_usage": True}}
REQUEST = {"model": "nano@aim", "messages": [user("This is")]}
MOMENT = 0.05


def services_of(folder, *, bank_errors=(), fusing=0.0, **generator):
    services = make_services(folder, generator=FakeGenerator(**generator))
    services.compressor._errors, services.compressor._seconds = list(bank_errors), fusing
    return services


def wait_for(condition, seconds=5.0) -> bool:
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.01)
    return condition()


def test_stream_sends_each_piece_then_the_reason_then_usage_then_done(tmp_path):
    *chunks, done = events_of(ask(make_services(tmp_path), **USAGE))
    assert done == "[DONE]"
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
    assert len({(chunk["id"], chunk["created"], chunk["model"]) for chunk in chunks}) == 1
    *grown, ended, usage = chunks
    deltas = [chunk["choices"][0]["delta"] for chunk in grown]
    assert deltas == [{"role": "assistant", "content": ""}, {"content": "bako"}, {"content": " mute"}]
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks[:-1]] == [None, None, None, "stop"]
    assert ended["choices"][0]["delta"] == {}
    assert usage["choices"] == []
    assert (usage["usage"]["prompt_tokens"], usage["usage"]["completion_tokens"]) == (30, 2)
    assert all(chunk["usage"] is None for chunk in chunks[:-1])
    assert ended["mmicl"] == usage["mmicl"] == {"ttft_ms": 12.5, "queued_ms": 1.5}


def test_stream_without_options_has_no_usage_and_the_time_in_its_last_chunk(tmp_path):
    *chunks, done = events_of(ask(make_services(tmp_path), stream=True))
    assert done == "[DONE]"
    assert not any("usage" in chunk for chunk in chunks)
    assert [chunk.get("mmicl", {}).get("ttft_ms") for chunk in chunks] == [None, None, None, 12.5]


@pytest.mark.parametrize(
    "piece", ['"quotes" \\ and \n lines', "\u2028 data: [DONE]\n\n", "\ud83d\ude00", "caf\u00e9", "\0"]
)
def test_stream_and_whole_say_the_same_text_whatever_is_in_it(tmp_path, piece):
    services = make_services(
        tmp_path,
        generator=FakeGenerator(pieces=(piece.encode("utf-16", "surrogatepass").decode("utf-16"), "!")),
    )
    whole = ask(services).json()["choices"][0]["message"]["content"]
    *chunks, _ = events_of(ask(services, stream=True))
    grown = [chunk["choices"][0]["delta"].get("content", "") for chunk in chunks]
    assert "".join(grown) == whole == "".join(services.generator.pieces)


def test_pieces_without_text_are_not_sent(tmp_path):
    services = make_services(tmp_path, generator=FakeGenerator(pieces=("", "a", "")))
    *chunks, _ = events_of(ask(services, stream=True))
    assert [chunk["choices"][0]["delta"].get("content") for chunk in chunks] == ["", "a", None]


def test_choices_of_a_stream_tell_their_index_and_what_happened_together_comes_together(tmp_path):
    services = services_of(tmp_path, pieces=("a", "b"), seconds=MOMENT)
    with (
        served(build_api(services)) as url,
        httpx.stream(
            "POST", f"{url}/v1/chat/completions", json=REQUEST | {"n": 2, "stream": True, "logprobs": True}
        ) as response,
    ):
        parts = list(response.iter_raw())
    groups = [part.decode().strip().split("\n\n") for part in parts]
    assert [len(group) for group in groups[:3]] == [2, 2, 2]
    *chunks, done = [line.removeprefix("data: ") for group in groups for line in group]
    assert done == "[DONE]"
    choices = [json.loads(chunk)["choices"][0] for chunk in chunks]
    assert [choice["index"] for choice in choices] == [0, 1] * 4
    assert [choice["logprobs"]["content"][0]["token"] for choice in choices[2:6]] == ["a", "a", "b", "b"]


@pytest.mark.parametrize(
    ("error", "status"), [(DataError("too long"), 400), (BankError("damaged"), 409), (RuntimeError("x"), 500)]
)
def test_stream_that_cannot_begin_is_an_error_with_its_status(tmp_path, error, status):
    told = error_of(ask(services_of(tmp_path, errors=[error]), stream=True), status)
    assert (told["message"] == str(error)) == (status < 500)


def test_stream_that_breaks_off_ends_with_an_error_event_and_no_done(tmp_path):
    services = services_of(tmp_path, break_off=DataError("a picture is broken"))
    *_, grown, last = events_of(ask(services, stream=True))
    assert grown["choices"][0]["delta"] == {"content": " mute"}
    assert last["error"]["message"] == "a picture is broken"
    assert set(last["error"]) == {"message", "type", "param", "code"}


def test_stream_that_ends_too_early_says_so_and_nothing_of_what_is_inside(tmp_path):
    class Short(FakeGenerator):
        async def stream(self, question):
            yield (self._started(question),)

    *_, last = events_of(ask(make_services(tmp_path, generator=Short()), stream=True))
    assert last["error"]["code"] == "internal_error"


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize(
    ("settings", "fields"), [({}, {"timeout_seconds": MOMENT}), ({"request_seconds": MOMENT}, {})]
)
def test_request_that_takes_too_long_ends_with_504_and_the_work_with_it(tmp_path, stream, settings, fields):
    services = make_services(tmp_path, generator=FakeGenerator(begin=60), **settings)
    error = error_of(ask(services, stream=stream, **fields), 504)
    assert (error["code"], error["param"]) == ("deadline_exceeded", "timeout_seconds")
    assert services.generator.cancelled == 1
    assert services.generator.question.seconds <= MOMENT


def test_request_cannot_ask_for_more_time_than_the_server_gives(tmp_path):
    services = make_services(tmp_path, request_seconds=3)
    ask(services, timeout_seconds=60)
    assert 2 < services.generator.question.seconds <= 3


def test_stream_that_takes_too_long_says_so_in_its_last_event(tmp_path):
    services = services_of(tmp_path, seconds=60)
    *_, last = events_of(ask(services, stream=True, timeout_seconds=4 * MOMENT))
    assert last["error"]["code"] == "deadline_exceeded"
    assert services.generator.cancelled == 1


def test_fusing_counts_for_the_deadline_of_the_request(tmp_path):
    services = services_of(tmp_path, fusing=60)
    messages = [user("This is", png()), assistant("bako"), user("This is", png(1))]
    assert error_of(ask(services, messages, timeout_seconds=MOMENT), 504)["code"] == "deadline_exceeded"
    assert services.compressor.cancelled == 1
    assert services.generator.questions == []


SHOT = {"image_url": data_uri(png()), "question": "This is", "answer": "bako"}


@pytest.mark.parametrize(
    ("path", "body", "worker"),
    [
        ("/v1/chat/completions", REQUEST, "generator"),
        ("/v1/chat/completions", REQUEST | {"stream": True}, "generator"),
        (
            "/v1/chat/completions",
            REQUEST | {"messages": [user("a", png()), assistant("b"), user("c")]},
            "compressor",
        ),
        ("/v1/demo_packs", {"demonstrations": [SHOT]}, "compressor"),
        ("/v1/embeddings", {"model": "nano", "input": data_uri(png())}, "compressor"),
    ],
)
def test_client_that_hangs_up_before_the_answer_cancels_the_work(tmp_path, path, body, worker):
    services = services_of(tmp_path, begin=60, fusing=60)
    with served(build_api(services)) as url:
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(url + path, json=body, timeout=4 * MOMENT)
        assert wait_for(lambda: getattr(services, worker).cancelled == 1)
        page = httpx.get(f"{url}/metrics").text
        assert "mmicl_requests_in_flight 1.0" in page
        assert 'status="499"' in page


def test_client_that_hangs_up_in_the_middle_of_a_stream_cancels_the_work(tmp_path):
    services = services_of(tmp_path, pieces=["a"] * 1000, seconds=MOMENT)
    with served(build_api(services)) as url:
        with httpx.stream("POST", f"{url}/v1/chat/completions", json=REQUEST | {"stream": True}) as response:
            next(response.iter_lines())
        assert wait_for(lambda: services.generator.cancelled == 1)
        assert services.generator.ended == 1


def test_client_that_does_not_read_its_stream_loses_it_some_time_after_the_deadline(tmp_path, monkeypatch):
    monkeypatch.setattr(waiting, "SENDING_SECONDS", MOMENT)
    services = services_of(tmp_path, pieces=["a" * 100_000] * 1000)
    with (
        served(build_api(services)) as url,
        httpx.stream(
            "POST",
            f"{url}/v1/chat/completions",
            json=REQUEST | {"stream": True, "timeout_seconds": 4 * MOMENT},
        ),
    ):
        assert wait_for(lambda: services.generator.ended == 1)


def test_work_of_a_stream_ends_even_if_the_stream_was_never_begun():
    class Source:
        closed = False

        async def aclose(self):
            self.closed = True

    async def never():
        raise AssertionError("nobody asks for it")
        yield b""

    async def gone():
        return {"type": "http.disconnect"}

    async def send(message):
        await asyncio.sleep(60)

    async def run():
        source = Source()
        await waiting.EventStream(never(), source, waiting.Deadline(5))({}, gone, send)
        assert source.closed

    asyncio.run(run())


@pytest.mark.parametrize("path", ["/v1/demo_packs", "/v1/embeddings"])
def test_error_of_the_compressor_is_told_with_its_status(tmp_path, path):
    services = services_of(tmp_path, bank_errors=[DataError("the bytes are not a readable picture")])
    body = (
        {"demonstrations": [SHOT]} if path.endswith("packs") else {"model": "nano", "input": data_uri(png())}
    )
    assert error_of(call(services, "POST", path, json=body), 400)["message"].startswith("the bytes")
    assert isinstance(services.compressor, FakeCompressor)
