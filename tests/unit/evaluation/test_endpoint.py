from __future__ import annotations

import base64
import io
import json
import math
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from PIL import Image

from mmicl_core.errors import BackboneError
from mmicl_core.evaluation.answering import Request
from mmicl_core.evaluation.controls import BLANK
from mmicl_core.evaluation.endpoint import AT_ONCE, RETRIES, EndpointAnswerer
from mmicl_core.prompts import Turn
from tests.fakes import draw_picture, encode_picture

SECONDS_OF_A_PIECE = 0.05
KINDS = {"a.png": "PNG", "b.jpg": "JPEG", "c.gif": "GIF", "d.webp": "WEBP", "e.bmp": "BMP"}
PICTURES = {
    name: encode_picture(draw_picture(number).resize((40, 24)), kind)
    for number, (name, kind) in enumerate(KINDS.items())
}


class Encoded:
    """Pictures in memory."""

    def read(self, key: str) -> bytes:
        return PICTURES[key]


@dataclass
class Answer:
    """What the server sends."""

    body: bytes
    status: int = 200
    kind: str = "application/json"
    pieces: Sequence[bytes] = ()
    """What is streamed instead, one after the other."""
    breaks_off: bool = False


@dataclass
class Server:
    """Answers chat completions on this machine, and remembers what it was asked."""

    answer: Callable[[Mapping[str, Any]], Answer]
    asked: list[dict[str, Any]] = field(default_factory=list)
    paths: list[tuple[str, str]] = field(default_factory=list)
    """Where it was asked, by whom."""
    url: str = ""

    def handle(self, handler: BaseHTTPRequestHandler) -> None:
        body = json.loads(handler.rfile.read(int(handler.headers["Content-Length"])))
        self.asked.append(body)
        self.paths.append((handler.path, handler.headers["Authorization"]))
        told = self.answer(body)
        handler.send_response(told.status)
        handler.send_header("Content-Type", told.kind)
        # The client waits as long as it is told to.
        handler.send_header("Retry-After-Ms", "1")
        # Said, or a client that asks again on the closing connection spends a retry that nothing here sees.
        handler.send_header("Connection", "close")
        if not told.pieces:
            handler.send_header("Content-Length", str(len(told.body)))
        else:
            handler.send_header("Transfer-Encoding", "chunked")
        handler.end_headers()
        handler.wfile.write(told.body)
        for piece in told.pieces:
            handler.wfile.write(b"%x\r\n%s\r\n" % (len(piece), piece))
            handler.wfile.flush()
            time.sleep(SECONDS_OF_A_PIECE)
        if told.pieces and not told.breaks_off:
            handler.wfile.write(b"0\r\n\r\n")


@pytest.fixture(name="serve")
def _serve(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Server]]:
    monkeypatch.setenv("NO_PROXY", "*")
    running = list[ThreadingHTTPServer]()

    def start(answer: Callable[[Mapping[str, Any]], Answer]) -> Server:
        server = Server(answer)

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            timeout = 10

            def do_POST(self) -> None:
                server.handle(self)

            def log_message(self, *_: Any) -> None:
                pass

        http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        http.daemon_threads = True
        server.url = f"http://127.0.0.1:{http.server_address[1]}/v1"
        threading.Thread(target=http.serve_forever, args=(0.01,), daemon=True).start()
        running.append(http)
        return server

    yield start
    for http in running:
        http.shutdown()
        http.server_close()


def _completion(text: str | None = "bako", **more: Any) -> Answer:
    choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": text}, **more}
    usage = {"prompt_tokens": 321, "completion_tokens": 2, "total_tokens": 323}
    told = {"id": "1", "object": "chat.completion", "created": 0, "model": "m"}
    return Answer(json.dumps({**told, "choices": [choice], "usage": usage}).encode())


def _with_tops(tops: Sequence[tuple[str, float]] | None) -> Answer:
    """A completion with the likeliest first tokens."""
    if tops is None:
        return _completion(logprobs=None)
    listed = [{"token": token, "logprob": value, "bytes": None} for token, value in tops]
    first = {"token": "yes", "logprob": -0.5, "bytes": None, "top_logprobs": listed}
    later = {"token": ".", "logprob": -0.1, "bytes": None, "top_logprobs": [{**first, "top_logprobs": None}]}
    return _completion(logprobs={"content": [first, later]})


def _failed(status: int) -> Answer:
    return Answer(json.dumps({"error": {"message": "the server says why"}}).encode(), status)


def _in_turn(*answers: Answer) -> Callable[[Mapping[str, Any]], Answer]:
    """One after the other, the last one again and again."""
    left = list(answers)
    return lambda _: left.pop(0) if len(left) > 1 else left[0]


def _answerer(server: Server) -> EndpointAnswerer:
    return EndpointAnswerer(server.url, "served", "secret")


def _request(question: str = "What?", choices: tuple[str, ...] = ()) -> Request:
    return Request((Turn(("a.png",), question, None),), 9, choices)


def _sent(message: Mapping[str, Any]) -> list[tuple[str, bytes]]:
    """Kind and bytes of the pictures of a message."""
    urls = [part["image_url"]["url"] for part in message["content"] if part["type"] == "image_url"]
    found = []
    for url in urls:
        head, _, data = url.partition(";base64,")
        found.append((head.removeprefix("data:image/"), base64.b64decode(data, validate=True)))
    return found


def test_conversation_is_asked_greedily_with_pictures_before_the_words_of_their_turn(serve) -> None:
    server = serve(_in_turn(_completion(" bako\n")))
    turns = (
        Turn(("a.png", "b.jpg"), "Is it?", "yes"),
        Turn((), "And now?", "no"),
        Turn(("c.gif",), "Now?", None),
    )
    (reply,) = _answerer(server).answer([Request(turns, 5)], Encoded())
    assert (reply.text, reply.prompt_tokens, reply.log_probabilities) == (" bako\n", 321, {})
    (asked,) = server.asked
    messages = asked.pop("messages")
    assert asked == {"model": "served", "temperature": 0, "max_tokens": 5}
    assert server.paths == [("/v1/chat/completions", "Bearer secret")]
    assert [message["role"] for message in messages] == ["user", "assistant", "user", "assistant", "user"]
    assert [message["content"] for message in messages[1::2]] == ["yes", "no"]
    kinds = [[part["type"] for part in message["content"]] for message in messages[::2]]
    assert kinds == [["image_url", "image_url", "text"], ["text"], ["image_url", "text"]]
    assert [message["content"][-1]["text"] for message in messages[::2]] == ["Is it?", "And now?", "Now?"]
    assert _sent(messages[0]) == [("png", PICTURES["a.png"]), ("jpeg", PICTURES["b.jpg"])]
    assert _sent(messages[4]) == [("gif", PICTURES["c.gif"])]


def test_pictures_that_not_every_server_reads_and_blank_ones_are_sent_as_png(serve) -> None:
    server = serve(_in_turn(_completion()))
    turns = (Turn(("d.webp", "e.bmp", f"{BLANK}b.jpg"), "What?", None),)
    _answerer(server).answer([Request(turns, 5)], Encoded())
    sent = _sent(server.asked[0]["messages"][0])
    assert [kind for kind, _ in sent] == ["png"] * 3
    webp, bmp, blank = (Image.open(io.BytesIO(data)) for _, data in sent)
    assert [picture.format for picture in (webp, bmp, blank)] == ["PNG"] * 3
    for picture, name in ((webp, "d.webp"), (bmp, "e.bmp")):
        assert picture.tobytes() == Image.open(io.BytesIO(PICTURES[name])).convert("RGB").tobytes()
    assert blank.size == (40, 24)
    assert blank.getcolors() == [(40 * 24, (128, 128, 128))]


def test_several_are_asked_at_once_and_replies_keep_the_order_of_requests(serve) -> None:
    together = threading.Barrier(AT_ONCE, timeout=20)

    def answer(body: Mapping[str, Any]) -> Answer:
        question = body["messages"][0]["content"][-1]["text"]
        together.wait()
        # The first is answered last.
        time.sleep(0.02 * (AT_ONCE - int(question) % AT_ONCE))
        return _completion(f"answer {question}")

    server = serve(answer)
    replies = _answerer(server).answer([_request(str(number)) for number in range(2 * AT_ONCE)], Encoded())
    assert [reply.text for reply in replies] == [f"answer {number}" for number in range(2 * AT_ONCE)]


@pytest.mark.parametrize("status", [429, 500, 503])
def test_what_fails_for_a_moment_is_tried_again(serve, status: int) -> None:
    server = serve(_in_turn(_failed(status), _failed(500), _completion("after all")))
    (reply,) = _answerer(server).answer([_request()], Encoded())
    assert reply.text == "after all"
    assert len(server.asked) == 3
    assert server.asked[0] == server.asked[2]


def test_server_that_stays_busy_is_given_up_and_named(serve) -> None:
    server = serve(_in_turn(_failed(429)))
    with pytest.raises(BackboneError, match=rf"{server.url} did not answer as 'served': .*says why"):
        _answerer(server).answer([_request()], Encoded())
    assert len(server.asked) == RETRIES + 1


@pytest.mark.parametrize("status", [400, 401, 404])
@pytest.mark.parametrize("timed", [False, True])
def test_refusal_is_told_with_the_server_and_its_reason_and_not_tried_again(
    serve, status: int, timed: bool
) -> None:
    server = serve(_in_turn(_failed(status)))
    answerer = _answerer(server)
    with pytest.raises(BackboneError, match=rf"{server.url} did not answer as 'served': .*says why"):
        answerer.time(_request(), Encoded()) if timed else answerer.answer([_request()] * 2, Encoded())
    assert len(server.asked) == 2 - timed


def test_server_that_is_not_there_is_named(serve, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("openai._base_client.INITIAL_RETRY_DELAY", 0.001)
    server = serve(_in_turn(_completion()))
    server.url = "http://127.0.0.1:9/v1"
    with pytest.raises(BackboneError, match="http://127.0.0.1:9/v1 did not answer as 'served'"):
        _answerer(server).answer([_request()], Encoded())


@pytest.mark.parametrize("timed", [False, True])
def test_address_of_something_else_is_named(serve, timed: bool) -> None:
    server = serve(_in_turn(Answer(b"<html>welcome</html>", kind="text/html")))
    answerer = _answerer(server)
    with pytest.raises(BackboneError, match=server.url):
        answerer.time(_request(), Encoded()) if timed else answerer.answer([_request()], Encoded())


def test_reply_without_a_text_is_an_empty_answer(serve) -> None:
    (reply,) = _answerer(serve(_in_turn(_completion(None)))).answer([_request()], Encoded())
    assert reply.text == ""


def test_log_probabilities_of_choices_are_those_of_first_tokens_that_they_begin_with(serve) -> None:
    tops = [("Yes", -0.5), (" yes", -2.0), ("ye", -3.0), ("No", -1.5), ("\n", -4.0), ("maybe", -5.0)]
    server = serve(_in_turn(_with_tops(tops)))
    (reply,) = _answerer(server).answer([_request(choices=("yes", "No", "cat"))], Encoded())
    assert {"logprobs": True, "top_logprobs": 20}.items() <= server.asked[0].items()
    assert reply.log_probabilities == pytest.approx(
        {
            "yes": math.log(math.exp(-0.5) + math.exp(-2) + math.exp(-3)),
            "No": -1.5,
            # No likelier than the least likely that is told.
            "cat": -5.0,
        }
    )


def test_choice_that_is_as_good_as_impossible_has_a_log_probability(serve) -> None:
    server = serve(_in_turn(_with_tops([("yes", 0.0), ("no", -9999.0)])))
    (reply,) = _answerer(server).answer([_request(choices=("yes", "no"))], Encoded())
    assert reply.log_probabilities == pytest.approx({"yes": 0.0, "no": -9999.0})


@pytest.mark.parametrize("tops", [None, []])
def test_server_without_log_probabilities_is_told(serve, tops: list[tuple[str, float]] | None) -> None:
    server = serve(_in_turn(_with_tops(tops)))
    with pytest.raises(BackboneError, match=f"{server.url} gives no log-probabilities"):
        _answerer(server).answer([_request(choices=("yes", "no"))], Encoded())


def _stream(*texts: str, usage: bool = True, breaks_off: bool = False) -> Answer:
    told = {"id": "1", "object": "chat.completion.chunk", "created": 0, "model": "m"}
    deltas = [{"role": "assistant", "content": ""}, *({"content": text} for text in texts)]
    pieces = [{**told, "choices": [{"index": 0, "delta": delta, "finish_reason": None}]} for delta in deltas]
    if usage:
        counts = {"prompt_tokens": 50, "completion_tokens": 13, "total_tokens": 63}
        pieces.append({**told, "choices": [], "usage": counts})
    lines = [b"data: %s\n\n" % json.dumps(piece).encode() for piece in pieces]
    sent = lines[:2] if breaks_off else [*lines, b"data: [DONE]\n\n"]
    return Answer(b"", kind="text/event-stream", pieces=sent, breaks_off=breaks_off)


def test_time_of_an_answer_is_until_its_first_piece_and_its_speed_that_of_the_rest(serve) -> None:
    server = serve(_in_turn(_stream("ba", "ko", " mute")))
    cost = _answerer(server).time(_request(), Encoded())
    assert server.asked[0].pop("messages")
    assert server.asked[0] == {
        "model": "served",
        "temperature": 0,
        "max_tokens": 9,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    assert (cost.prompt_tokens, cost.kv_bytes) == (50, None)
    # A piece without words comes first, and two more follow the first words.
    assert 1000 * SECONDS_OF_A_PIECE <= cost.ttft_ms < 5000
    assert cost.tokens_per_second is not None
    assert 1 < cost.tokens_per_second <= 12 / (2 * SECONDS_OF_A_PIECE * 0.9)


@pytest.mark.parametrize(("texts", "usage"), [(["bako"], True), (["ba", "ko"], False), ([], True)])
def test_speed_is_not_known_of_one_piece_or_without_a_count_of_tokens(
    serve, texts: Sequence[str], usage: bool
) -> None:
    cost = _answerer(serve(_in_turn(_stream(*texts, usage=usage)))).time(_request(), Encoded())
    assert cost.tokens_per_second is None
    assert cost.ttft_ms > 0
    assert cost.prompt_tokens == (50 if usage else None)


def test_stream_that_breaks_off_is_told(serve) -> None:
    server = serve(_in_turn(_stream("ba", "ko", breaks_off=True)))
    with pytest.raises(BackboneError, match=server.url):
        _answerer(server).time(_request(), Encoded())
