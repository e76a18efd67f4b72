from __future__ import annotations

import asyncio
import json
import logging
import socket
import threading
import time
from contextlib import contextmanager

import httpx
import pytest
from fastapi import APIRouter, FastAPI, Request
from fastapi.responses import StreamingResponse

from mmicl_core.config.serve import ServeConfig
from mmicl_core.errors import DataError
from pipelines.serve import middleware
from pipelines.serve.errors import OverloadedError, install_error_handlers
from pipelines.serve.health import router
from pipelines.serve.keys import add_key
from pipelines.serve.limits import SMALL_BODY_BYTES, body_limit
from pipelines.serve.middleware import install
from tests.served import make_services, served

SMALL = {"max_images": 1, "max_image_bytes": 1024}
SECRET = "a question that nobody else may read"


ROUTES = APIRouter()


@ROUTES.post("/v1/echo")
async def echo(request: Request) -> dict[str, object]:
    state = request.state
    return {"bytes": len(await request.body()), "tenant": state.tenant, "request_id": state.request_id}


@ROUTES.get("/v1/things/{name}")
async def thing(name: str, request: Request) -> dict[str, str]:
    request.state.model, request.state.prompt_tokens, request.state.ttft_ms = "nano", 30, 12.5
    if name == "broken":
        raise RuntimeError(f"a mistake about {SECRET}")
    if name == "wrong":
        raise DataError("the thing is wrong")
    if name == "busy":
        raise OverloadedError("too many wait", 2.5)
    return {"name": name}


@ROUTES.get("/v1/stream")
async def stream(parts: int = 3, seconds: float = 0, broken: bool = False) -> StreamingResponse:
    async def events():
        for number in range(parts):
            yield f"data: {number}\n\n"
            await asyncio.sleep(seconds)
        if broken:
            raise RuntimeError("the stream broke")

    return StreamingResponse(events(), media_type="text/event-stream")


@ROUTES.get("/")
@ROUTES.get("/playground/{name}")
async def page(request: Request, name: str = "index.html") -> dict[str, str]:
    return {"page": name, "tenant": request.state.tenant}


def make_app(services) -> FastAPI:
    """Routes of every kind behind the middleware."""
    app = FastAPI()
    install_error_handlers(app)
    app.include_router(router(services))
    app.include_router(ROUTES)
    install(app, services)
    return app


@pytest.fixture
def serve(tmp_path):
    """Serves the routes with these settings; gives the address."""

    @contextmanager
    def start(**settings):
        with (
            served(make_app(make_services(tmp_path, **settings))) as url,
            httpx.Client(base_url=url) as client,
        ):
            yield client

    return start


@pytest.fixture
def lines(caplog):
    """What is logged of requests, as it is logged."""
    caplog.set_level(logging.INFO, "ray.serve")

    def read(count: int) -> list[dict]:
        deadline = time.monotonic() + 5
        # A request is told of once its answer is sent, which may be after the client has it.
        while len(found := [message for message in caplog.messages if '"event"' in message]) < count:
            assert time.monotonic() < deadline, caplog.messages
            time.sleep(0.005)
        return [json.loads(message) for message in found]

    return read


def error_of(response: httpx.Response) -> dict:
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return error


@pytest.fixture
def key_file(tmp_path):
    return tmp_path / "keys"


KEYED = [
    ("POST", "/v1/echo"),
    ("GET", "/v1/things/cat"),
    ("GET", "/v1/stream"),
    ("GET", "/v1/nothing"),
    ("DELETE", "/v1/echo"),
    ("OPTIONS", "/v1/echo"),
    ("GET", "/metrics"),
    ("GET", "/openapi.json"),
    ("GET", "/healthz/"),
    ("GET", "/healthz/more"),
    ("GET", "/x//healthz"),
    ("GET", "/HEALTHZ"),
    ("GET", "/playground"),
    ("GET", "/v1/things/%2e%2e%2fhealthz"),
    ("GET", "/healthz/%2e%2e/v1/things/cat"),
    ("GET", "/readyz%00"),
]


ANSWERS = [
    ("GET", "/v1/things/cat", 200),
    ("GET", "/v1/things/wrong", 400),
    ("GET", "/v1/things/broken", 500),
    ("GET", "/nothing", 404),
    ("PUT", "/v1/echo", 405),
    ("GET", "/healthz", 200),
    ("GET", "/v1/stream", 200),
]


def test_every_route_but_health_and_page_needs_a_key_unknown_ones_too(serve, key_file):
    key = add_key(key_file, "anna")
    with serve(keys=str(key_file)) as client:
        for method, path in KEYED:
            for header in ({}, {"authorization": "Bearer mmicl-wrong"}, {"authorization": key}):
                response = client.request(method, path, headers=header)
                assert response.status_code == 401, path
                assert error_of(response)["code"] == "invalid_api_key"
                assert response.headers["www-authenticate"] == "Bearer"
                assert response.headers["x-request-id"]
            with_key = client.request(method, path, headers={"authorization": f"Bearer {key}"})
            assert with_key.status_code != 401, path
        for path in ("/healthz", "/readyz", "/", "/playground/app.js"):
            assert client.get(path).status_code == 200


def test_page_that_is_not_served_needs_a_key_like_any_unknown_route(serve, key_file):
    add_key(key_file, "anna")
    with serve(keys=str(key_file), playground=False) as client:
        assert [client.get(path).status_code for path in ("/", "/playground/app.js")] == [401, 401]


def test_tenant_is_the_name_of_the_key_and_public_without_keys(serve, key_file):
    key = add_key(key_file, "anna")
    with serve(keys=str(key_file)) as client:
        headers = {"authorization": f"Bearer {key}"}
        assert client.post("/v1/echo", headers=headers).json()["tenant"] == "anna"
        assert client.get("/").json()["tenant"] == "public"
    with serve() as client:
        assert client.post("/v1/echo").json()["tenant"] == "public"


def test_request_id_is_taken_where_it_is_well_formed_and_replaced_where_not(serve):
    with serve() as client:
        for asked in ("a", "req_1.2-X", "f" * 64):
            response = client.post("/v1/echo", headers={"x-request-id": asked})
            assert response.headers.get_list("x-request-id") == [asked] == [response.json()["request_id"]]
        for asked in ("", "f" * 65, "a b", "a,b", "<script>", "\u00e4", "../x", "a;b=c"):
            response = client.post("/v1/echo", headers={b"x-request-id": asked.encode()})
            (given,) = response.headers.get_list("x-request-id")
            assert given == response.json()["request_id"]
            assert len(given) == 32 and given != asked


def test_every_answer_has_a_request_id_of_its_own(serve):
    with serve() as client:
        for method, path, status in ANSWERS:
            given = [client.request(method, path) for _ in range(2)]
            assert [response.status_code for response in given] == [status] * 2
            assert len({response.headers["x-request-id"] for response in given}) == 2
            if status >= 400:
                error_of(given[0])


def test_id_is_left_to_a_proxy_that_writes_it(tmp_path):
    app = make_app(make_services(tmp_path))
    app.state.proxied = True
    with served(app) as url:
        response = httpx.post(f"{url}/v1/echo", headers={"x-request-id": "of-the-proxy"})
        assert "x-request-id" not in response.headers
        assert response.json()["request_id"] == "of-the-proxy"


def test_mistake_of_the_server_is_answered_in_the_shape_of_the_api_and_not_told(serve, lines):
    with serve() as client:
        response = client.get("/v1/things/broken")
        assert SECRET not in response.text
        assert client.get("/v1/things/cat").status_code == 200
    assert [line["status"] for line in lines(2)] == [500, 200]


def test_rate_of_a_key_is_held_and_says_when_to_come_again(serve, key_file):
    anna, ben = add_key(key_file, "anna"), add_key(key_file, "ben")
    with serve(keys=str(key_file), requests_per_minute=2) as client:
        headers = {"authorization": f"Bearer {anna}"}
        statuses = [client.get("/v1/things/cat", headers=headers).status_code for _ in range(3)]
        assert statuses == [200, 200, 429]
        refused = client.get("/v1/nothing", headers=headers)
        assert error_of(refused)["code"] == "rate_limit_exceeded"
        assert 28 <= int(refused.headers["retry-after"]) <= 30
        others = {"authorization": f"Bearer {ben}"}
        assert client.get("/v1/things/cat", headers=others).status_code == 200
        for path in ("/healthz", "/readyz", "/", "/metrics"):
            assert client.get(path, headers=headers).status_code == 200
        told = client.get("/metrics", headers=headers).text
        assert 'mmicl_rate_limited_total{by="key"} 2.0' in told


def test_stream_counts_as_under_way_until_its_last_byte(serve):
    with serve(requests_at_once=1) as client:
        with client.stream("GET", "/v1/stream?parts=40&seconds=0.05") as streaming:
            # Held, because a reader that is let go closes the stream.
            reader = streaming.iter_lines()
            next(reader)
            assert client.get("/v1/things/cat").status_code == 429
        deadline = time.monotonic() + 5
        while client.get("/v1/things/cat").status_code == 429:
            assert time.monotonic() < deadline, "a stream that was broken off still counts"
            time.sleep(0.02)


def test_declared_size_over_the_limit_is_refused_before_anything_is_read(serve, lines):
    limit = body_limit(ServeConfig(**SMALL))
    with serve(**SMALL) as client:
        head = f"POST /v1/echo HTTP/1.1\r\nHost: x\r\nContent-Length: {limit + 1}\r\n\r\n"
        assert "413" in talk(client, head.encode())
        assert client.post("/v1/echo", content=bytes(limit)).json()["bytes"] == limit
        refused = client.post("/v1/echo", content=bytes(limit + 1))
        assert (refused.status_code, error_of(refused)["code"]) == (413, "request_too_large")
        unexpected = client.post("/nothing", content=bytes(SMALL_BODY_BYTES + 1))
        assert (unexpected.status_code, "none is expected" in unexpected.text) == (413, True)
    assert [line["bytes_in"] for line in lines(4)] == [0, limit, 0, 0]


def test_body_without_a_size_is_cut_at_the_limit(serve, lines):
    limit = body_limit(ServeConfig(**SMALL))
    sent = 0

    def pieces():
        nonlocal sent
        for _ in range(200):
            sent += 2**16
            yield bytes(2**16)

    with serve(**SMALL) as client:
        refused = client.post("/v1/echo", content=pieces())
        assert (refused.status_code, error_of(refused)["code"]) == (413, "request_too_large")
        assert client.post("/v1/echo", content=iter([b"12", b"3"])).json()["bytes"] == 3
    assert limit < lines(2)[0]["bytes_in"] < limit + 2**18 < sent


@pytest.mark.parametrize("per_byte", [None, 0.02])
def test_body_that_does_not_come_is_given_up(serve, monkeypatch, lines, per_byte):
    monkeypatch.setattr(middleware, "IDLE_SECONDS", 0.2)
    with serve(request_seconds=0.5) as client:
        head = b"POST /v1/echo HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\n"
        began = time.monotonic()
        answer = talk(client, head, per_byte)
        took = time.monotonic() - began
    assert answer.startswith("HTTP/1.1 408 ")
    assert '"code":"request_timeout"' in answer
    assert "connection: close" in answer.lower()
    assert (0.2 if per_byte is None else 0.5) <= took < 2
    assert lines(1)[0]["status"] == 408


def talk(client: httpx.Client, head: bytes, per_byte: float | None = None) -> str:
    """What comes back on a connection of its own, on which a body then trickles, or does not come at all."""
    with socket.create_connection((client.base_url.host, client.base_url.port), 5) as connection:
        connection.sendall(head)
        over = threading.Event()

        def trickle() -> None:
            while per_byte is not None and not over.wait(per_byte):
                try:
                    connection.sendall(b"x")
                except OSError:
                    return

        thread = threading.Thread(target=trickle)
        thread.start()
        answer = b""
        try:
            while b"}}" not in answer and (piece := connection.recv(2**16)):
                answer += piece
        finally:
            over.set()
            thread.join()
    return answer.decode()


def test_client_that_leaves_in_its_body_is_told_of_as_gone_and_breaks_nothing(serve, lines, caplog):
    with serve() as client:
        with socket.create_connection((client.base_url.host, client.base_url.port), 5) as connection:
            connection.sendall(b"POST /v1/echo HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\n12345")
        (line,) = lines(1)
        assert (line["status"], line["bytes_in"], line["complete"]) == (499, 5, False)
        assert client.post("/v1/echo", content=b"1").json()["bytes"] == 1
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR]


def test_client_that_leaves_a_stream_is_told_of_as_incomplete_and_breaks_nothing(serve, lines, caplog):
    with serve() as client:
        with client.stream("GET", "/v1/stream?parts=1000&seconds=0.02") as streaming:
            next(streaming.iter_lines())
        (line,) = lines(1)
        assert (line["status"], line["complete"], line["route"]) == (200, False, "/v1/stream")
        assert line["seconds"] < 5
        assert client.get("/healthz").status_code == 200
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR]


def test_stream_passes_piece_by_piece(serve):
    with serve() as client, client.stream("GET", "/v1/stream?parts=3&seconds=0.2") as streaming:
        came = [time.monotonic() for line in streaming.iter_lines() if line]
    assert len(came) == 3
    assert all(later - earlier > 0.1 for earlier, later in zip(came, came[1:], strict=False))


def test_stream_that_breaks_is_broken_off_and_not_ended(serve, lines):
    with serve() as client:
        with pytest.raises(httpx.RemoteProtocolError):
            client.get("/v1/stream?broken=true")
        (line,) = lines(1)
        assert (line["status"], line["complete"]) == (200, False)


def test_log_tells_of_a_request_and_neither_its_content_nor_its_key(serve, key_file, lines, caplog):
    key = add_key(key_file, "anna")
    headers = {"authorization": f"Bearer {key}", "x-request-id": "mine", "cookie": SECRET}
    with serve(keys=str(key_file)) as client:
        client.post("/v1/echo", content=SECRET, headers=headers)
        client.get("/v1/things/secret-name", params={"q": SECRET}, headers=headers)
        client.get(f"/v1/{SECRET}", headers=headers)
        client.get("/v1/things/cat", headers={"authorization": f"Bearer {SECRET}"})
        first, second, third, refused = lines(4)
    assert first.pop("seconds") > 0
    assert first == {
        "event": "request",
        "request_id": "mine",
        "method": "POST",
        "tenant": "anna",
        "route": "/v1/echo",
        "status": 200,
        "bytes_in": len(SECRET),
        "bytes_out": first["bytes_out"],
        "complete": True,
    }
    assert first["bytes_out"] > 10
    assert (second["route"], second["model"]) == ("/v1/things/{name}", "nano")
    assert (second["prompt_tokens"], second["ttft_ms"]) == (30, 12.5)
    assert (third["route"], third["status"]) == ("unknown", 404)
    assert (refused["status"], "tenant" in refused) == (401, False)
    assert not any(private in caplog.text for private in (key, SECRET, "secret-name"))


def test_metrics_count_requests_by_what_there_is_and_not_by_what_callers_write(serve):
    with serve() as client:
        for path in ("cat", "dog", "wrong"):
            client.get(f"/v1/things/{path}")
        assert client.get("/v1/things/busy").headers["retry-after"] == "3"
        for number in range(5):
            client.get(f"/nothing/{number}")
            client.request(f"ODD{number}", "/healthz")
        told = client.get("/metrics").text
    samples = [line for line in told.splitlines() if line.startswith("mmicl_requests_total{")]
    assert (
        'mmicl_requests_total{method="GET",model="nano",route="/v1/things/{name}",status="200"} 2.0'
        in samples
    )
    assert 'mmicl_requests_total{method="GET",model="",route="unknown",status="404"} 5.0' in samples
    assert not any("ODD" in sample for sample in samples)
    assert 'mmicl_rate_limited_total{by="queue"} 1.0' in told
    assert "mmicl_requests_in_flight 1.0" in told
