"""The middleware without a server around it: what no client of HTTP can send, and what it costs."""

from __future__ import annotations

import asyncio
import time

import pytest

from pipelines.serve.keys import add_key
from pipelines.serve.middleware import Gate
from tests.served import make_services

START = {"type": "http.response.start", "status": 200, "headers": []}
GONE = {"type": "http.disconnect"}


def call(app, *messages, **scope) -> list[dict]:
    """What an application sends after it was sent `messages`."""
    sent, left = [], list(messages) or [{"type": "http.request", "body": b"x", "more_body": False}]

    async def receive():
        return left.pop(0)

    async def send(message):
        sent.append(message)

    scope = {"type": "http", "method": "POST", "path": "/v1/echo", "headers": []} | scope
    asyncio.run(app(scope, receive, send))
    return sent


@pytest.fixture
def gate(tmp_path):
    def make(app, **settings) -> Gate:
        return Gate(app, make_services(tmp_path, **settings))

    return make


async def answer(scope, receive, send):
    await receive()
    await send(START)
    await send({"type": "http.response.body", "body": b"x"})


@pytest.mark.parametrize("path", ["/", "/v1/echo", "/playground/x", "/healthz"])
def test_websocket_is_closed_before_any_route_sees_it(gate, path):
    async def fail(scope, receive, send):
        raise AssertionError("it was passed on")

    assert [message["type"] for message in call(gate(fail), type="websocket", path=path)] == [
        "websocket.close"
    ]


def test_start_and_end_of_the_server_pass(gate):
    seen = []

    async def note(scope, receive, send):
        seen.append(scope["type"])

    call(gate(note), type="lifespan")
    assert seen == ["lifespan"]


def test_error_after_the_first_byte_goes_on_to_the_server_which_breaks_the_answer_off(gate):
    async def break_off(scope, receive, send):
        await send(START)
        raise RuntimeError("the stream broke")

    with pytest.raises(RuntimeError, match="the stream broke"):
        call(gate(break_off))


@pytest.mark.parametrize("started", [True, False])
def test_error_after_the_client_has_gone_is_nobodys(gate, started):
    async def notice(scope, receive, send):
        if started:
            await send(START)
        await receive()
        raise OSError("nobody reads this")

    assert len(call(gate(notice), GONE)) == int(started)


@pytest.mark.parametrize("size", ["9" * 5000, str(2**63), "1" + "0" * 18])
def test_absurd_declared_size_is_refused(gate, size):
    start, *_ = call(gate(answer), headers=[(b"content-length", size.encode())])
    assert start["status"] == 413


@pytest.mark.parametrize(
    ("path", "status"), [("/below/healthz", 200), ("/below/v1/echo", 401), ("/healthz", 200)]
)
def test_path_is_taken_below_where_the_server_is_mounted(gate, tmp_path, path, status):
    add_key(tmp_path / "keys", "anna")
    start, *_ = call(gate(answer, keys=str(tmp_path / "keys")), path=path, root_path="/below")
    assert start["status"] == status


def test_gate_adds_less_than_a_third_of_a_millisecond(gate, tmp_path):
    for number in range(20):
        key = add_key(tmp_path / "keys", f"tenant{number}")
    headers = [(b"host", b"x"), (b"authorization", f"Bearer {key}".encode())]
    guarded = gate(answer, keys=str(tmp_path / "keys"), requests_per_minute=10**9, requests_at_once=10)

    async def seconds(app) -> float:
        async def receive():
            return {"type": "http.request", "body": b"x", "more_body": False}

        async def send(message):
            pass

        times = []
        for _ in range(300):
            scope = {"type": "http", "method": "POST", "path": "/v1/echo", "headers": headers}
            began = time.perf_counter()
            await app(scope, receive, send)
            times.append(time.perf_counter() - began)
        return sorted(times)[len(times) // 2]

    assert asyncio.run(seconds(guarded)) - asyncio.run(seconds(answer)) < 0.0003
