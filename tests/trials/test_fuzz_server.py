"""The server against hostile clients: no request ends with a 5xx, none hangs, and none changes what the next
one is answered.

The whole application runs in this process, with real replicas around a tiny model, behind a real socket.

make trials
"""

from __future__ import annotations

import asyncio
import json
import random
import resource
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any

import httpx
import psutil
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from mmicl_core.backbones.hugging_face import load_backbone
from mmicl_core.config.model import AimConfig
from mmicl_core.methods.aim import Aim
from pipelines.serve.compressor import Compressor
from pipelines.serve.generator import Generator
from pipelines.serve.keys import add_key
from pipelines.serve.openai_api import build_api
from pipelines.serve.page import page_router
from tests.fakes import draw_picture, encode_picture, tiny_backbone
from tests.forged import FORGERIES, RAW, exchange, forged_pack
from tests.hostile import (
    CHAT,
    EMBEDDINGS,
    IMPORT,
    PACKS,
    TEXTS,
    HostileRequest,
    chat_body,
    data_uri,
    hostile_picture,
    hostile_request,
    picture_request,
)
from tests.hostile_files import PICTURES
from tests.served import make_services, served
from tests.walker import Operation, Request, Walker, mostly

# Pillow tells of notes that it cannot read by warnings.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:PIL")

BASE, FUSES = "tiny", "tiny@aim"
REQUEST_SECONDS = 10
"""After which the server itself would give up: nothing here may take so long."""
CLIENT_SECONDS = 60
SLOW_SECONDS = 2
LONGEST_ERROR = 4096
"""Bytes: an error that repeats what was sent makes a large answer of a large request."""
MIB = 2**20
MOST_GROWTH = 300 * MIB
"""Of memory after many requests."""
MOST_PEAK = 1500 * MIB
"""Of memory during one: the largest picture that is allowed takes 16 bytes a pixel on its way."""
GOOD = {seed: encode_picture(draw_picture(seed)) for seed in range(4)}


@dataclass
class Server:
    """A running server and a client of it."""

    url: str
    client: httpx.Client
    key: str
    pack: str = ""
    """The id of a pack."""
    exported: bytes = b""
    """Its file."""
    slow: tuple[str, ...] = ()
    """Requests that took long."""

    def ask(
        self,
        path: str,
        content: bytes | None = None,
        method: str = "POST",
        headers: Mapping[str, str] | None = None,
        name: str = "",
    ) -> httpx.Response:
        """Send a request and read the answer to its end."""
        # Headers are bytes, and not all of these are text.
        raw = {key.encode(): value.encode("latin-1") for key, value in (headers or {}).items()}
        began = time.monotonic()
        response = self.client.request(method, path, content=content, headers=raw)
        seconds = time.monotonic() - began
        if seconds > SLOW_SECONDS:
            self.slow = (*self.slow, f"{seconds:.1f} s: {name or path}")
        return response

    def send(self, request: HostileRequest) -> httpx.Response:
        return self.ask(request.path, request.content, request.method, request.headers, request.name)

    def post(self, path: str, body: Any) -> httpx.Response:
        return self.ask(path, json.dumps(body).encode(), headers={"content-type": "application/json"})

    def told(self, path: str, body: Any) -> Any:
        """The answer to a good request, without what differs from one time to the next."""
        answer = self.post(path, body)
        assert answer.status_code == HTTPStatus.OK, (answer.status_code, answer.text)
        told = answer.json()
        for name in ("id", "created", "mmicl"):
            told.pop(name, None)
        for name in ("cached_tokens", "prompt_tokens_details"):
            told["usage"].pop(name, None)
        return told

    def one_answer(self) -> Any:
        """To the simplest question."""
        return self.told(CHAT, chat_body(BASE, parts(0)))

    def all_answers(self) -> Any:
        """To a good request of each kind."""
        turns = [
            {"role": "user", "content": parts(1)},
            {"role": "assistant", "content": "bako"},
            {"role": "user", "content": parts(0)},
        ]
        return [
            self.one_answer(),
            self.told(CHAT, chat_body(BASE, messages=turns)),
            self.told(CHAT, chat_body(FUSES, messages=turns, demonstrations="fused")),
            self.told(CHAT, chat_body(FUSES, parts(0), demo_pack=self.pack)),
            self.told(CHAT, chat_body(FUSES, parts(0), demo_pack={"id": self.pack, "select": 1})),
            self.told(EMBEDDINGS, {"model": BASE, "input": data_uri(GOOD[0])}),
        ]


def parts(*seeds: int) -> list[dict[str, Any]]:
    pictures = [{"type": "image_url", "image_url": {"url": data_uri(GOOD[seed])}} for seed in seeds]
    return [*pictures, {"type": "text", "text": "This is"}]


def shown(*seeds: int) -> list[dict[str, Any]]:
    return [
        {"image_url": data_uri(GOOD[seed]), "question": "This is", "answer": "bako mute"[5 * (seed % 2) :]}
        for seed in seeds
    ]


@pytest.fixture(scope="module")
def server(tmp_path_factory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("server")
    tiny_backbone().save(folder / "backbone")
    Aim(load_backbone(folder / "backbone"), AimConfig()).save(folder / "adapter", {})
    key = add_key(folder / "keys", "tester")
    config: dict[str, Any] = {
        "model_name": BASE,
        "adapters": {"aim": str(folder / "adapter")},
        "keys": str(folder / "keys"),
        "request_seconds": REQUEST_SECONDS,
        # Little is kept, so that memory that grows is memory that leaks.
        "bank_memory_bytes": MIB,
        "prefix_bytes": 4 * MIB,
        "max_new_tokens": 4,
    }
    settings = make_services(folder, **config).config
    compressor = Compressor(folder / "backbone", settings)
    generator = Generator(folder / "backbone", settings)
    adapters = {"adapters": {"aim": {"folder": str(folder / "adapter"), "identity": "1"}}}
    asyncio.run(compressor.reconfigure(adapters))
    asyncio.run(generator.reconfigure(adapters))
    services = make_services(folder, compressor=compressor, generator=generator, **config)
    app = build_api(services, [page_router(services.config)])
    headers = {"authorization": f"Bearer {key}"}
    with served(app) as url, httpx.Client(base_url=url, headers=headers, timeout=CLIENT_SECONDS) as client:
        running = Server(url, client, key)
        made = running.post(PACKS, {"model": FUSES, "demonstrations": shown(1, 2, 3)})
        assert made.status_code == HTTPStatus.OK, made.text
        running.pack = made.json()["id"]
        running.exported = running.ask(f"{PACKS}/{running.pack}/export", method="GET").content
        yield running
    generator.close()
    compressor.close()
    services.media.close()


@pytest.fixture
def steady(server: Server) -> Iterator[Server]:
    """The server, which answers good requests afterwards as before."""
    before = server.all_answers()
    server.slow = ()
    yield server
    for line in server.slow:
        print(line)
    assert server.all_answers() == before


def fault(response: httpx.Response, allowed: tuple[int, ...] = ()) -> str | None:
    """What is wrong with an answer to a hostile request; None if it is fine."""
    status = response.status_code
    if status >= HTTPStatus.INTERNAL_SERVER_ERROR and status not in allowed:
        return f"status {status}: {response.text[:300]}"
    if "x-request-id" not in response.headers:
        return f"status {status} without an id: {response.text[:300]}"
    if status >= HTTPStatus.BAD_REQUEST and response.request.method != "HEAD":
        error = response.json()["error"]
        if not error["message"] or not error["code"]:
            return f"an error that says nothing: {error}"
        return None if len(response.content) < LONGEST_ERROR else f"an error of {len(response.content)} bytes"
    if response.text.startswith("data: ") and '"server_error"' in response.text:
        return f"a stream ended with {response.text[-300:]}"
    return None


def memory() -> tuple[int, int]:
    """Bytes of this process, and the most that it ever had."""
    return psutil.Process().memory_info().rss, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def try_pictures(server: Server, seeds: Sequence[int]) -> None:
    before = server.one_answer()
    problems, statuses = [], Counter[int]()
    for seed in seeds:
        picture = hostile_picture(seed)
        request = picture_request(picture.url, FUSES, random.Random(seed))
        response = server.ask(request.path, request.content, headers=request.headers, name=picture.name)
        statuses[response.status_code] += 1
        if problem := fault(response):
            problems.append(f"{picture.name}, {request.path}: {problem}")
        if server.one_answer() != before:
            problems.append(f"{picture.name}: what came after it was answered otherwise")
    print(dict(statuses))
    assert not problems, "\n".join(problems)
    assert statuses[HTTPStatus.OK] and statuses[HTTPStatus.BAD_REQUEST]


def test_one_hostile_picture_of_each_kind_is_refused_or_answered(steady: Server):
    # The last two: notes that Pillow cannot write again, and many scans of a large picture.
    try_pictures(steady, [*range(len(PICTURES)), 338, 832])


@pytest.mark.trial
def test_two_thousand_hostile_pictures_are_refused_or_answered_within_bounded_memory(steady: Server):
    # Until then, memory fills with what is kept, and with what the allocator keeps free.
    try_pictures(steady, range(20 * len(PICTURES)))
    rss, _ = memory()
    try_pictures(steady, range(20 * len(PICTURES), 2000))
    after, peak = memory()
    print(f"{rss / MIB:.0f} MiB, then {after / MIB:.0f}, at most {peak / MIB:.0f}")
    assert after - rss < MOST_GROWTH
    assert peak - rss < MOST_PEAK


def try_requests(server: Server, seeds: range) -> None:
    before = server.one_answer()
    problems, statuses = [], Counter[int]()
    for seed in seeds:
        request = hostile_request(seed, FUSES)
        # The time that the request itself asks for may be too short.
        too_short = (HTTPStatus.GATEWAY_TIMEOUT,) if b"timeout_seconds" in request.content else ()
        response = server.send(request)
        statuses[response.status_code] += 1
        if problem := fault(response, too_short):
            problems.append(f"{request.name}: {problem}")
        if seed % 10 == 0 and server.one_answer() != before:
            problems.append(f"{request.name}: what came after it was answered otherwise")
    print(dict(statuses))
    assert not problems, "\n".join(problems)


def test_a_hundred_hostile_requests_are_refused_or_answered(steady: Server):
    try_requests(steady, range(100))


@pytest.mark.trial
def test_two_thousand_hostile_requests_are_refused_or_answered(steady: Server):
    try_requests(steady, range(100, 2100))


def try_forgeries(server: Server, seeds: range) -> None:
    """Whatever is taken in is then used in every way."""
    problems, taken = [], Counter[str]()
    kind = {"content-type": "application/octet-stream"}
    for seed in seeds:
        name, data = forged_pack(seed, server.exported)
        response = server.ask(IMPORT, data, headers=kind, name=name)
        answers = [response]
        if response.status_code == HTTPStatus.OK:
            taken[name.partition(": ")[2]] += 1
            place = f"{PACKS}/{response.json()['id']}"
            pack = response.json()["id"]
            answers += [
                server.ask(place, method="GET"),
                server.ask(f"{place}/export", method="GET"),
                server.ask(PACKS, method="GET"),
                server.post(CHAT, chat_body(FUSES, parts(0), demo_pack=pack)),
                server.post(CHAT, chat_body(FUSES, parts(0), demo_pack=pack, stream=True)),
                server.post(CHAT, chat_body(FUSES, parts(0), demo_pack={"id": pack, "select": 1})),
            ]
            if pack != server.pack:
                answers.append(server.ask(place, method="DELETE"))
        problems += [f"{name}, {one.request.url.path}: {fault(one)}" for one in answers if fault(one)]
    print(dict(taken))
    assert not problems, "\n".join(problems)


def test_forged_packs_are_refused_or_harmless(steady: Server):
    try_forgeries(steady, range(5 * len(FORGERIES)))


@pytest.mark.trial
def test_a_thousand_forged_packs_are_refused_or_harmless(steady: Server):
    try_forgeries(steady, range(1000))


def authorized(sent: bytes, key: str) -> bytes:
    """The same with a key, where it has headers."""
    return sent.replace(b"\r\n", f"\r\nauthorization: Bearer {key}\r\n".encode(), 1)


@pytest.mark.parametrize("name", RAW)
def test_bytes_that_are_no_request_end_in_a_refusal_or_a_closed_connection(steady: Server, name: str):
    answer = exchange(steady.url, authorized(RAW[name], steady.key), REQUEST_SECONDS)
    statuses = [int(line.split()[1]) for line in answer.split(b"\r\n") if line.startswith(b"HTTP/1.1 ")]
    assert (statuses or not answer) and max(statuses, default=0) < HTTPStatus.INTERNAL_SERVER_ERROR, answer


@pytest.mark.trial
@pytest.mark.parametrize(
    "name", ["a body that does not come", "a body that is shorter", "chunks without an end"]
)
def test_a_body_that_stops_coming_is_given_up(steady: Server, name: str):
    began = time.monotonic()
    answer = exchange(steady.url, authorized(RAW[name], steady.key), 2 * REQUEST_SECONDS, ends=False)
    assert answer.startswith((b"HTTP/1.1 408", b"HTTP/1.1 413"))
    assert time.monotonic() - began < REQUEST_SECONDS + SLOW_SECONDS


def walker_of(server: Server) -> Walker:
    """A walker that knows names, pictures and packs of this server, and is modest in what it asks for."""
    document = server.ask("/openapi.json", method="GET").json()
    pictures = st.sampled_from([data_uri(data) for data in GOOD.values()])
    packs = st.sampled_from((server.pack, "pack-" + "0" * 32))
    texts = mostly(st.sampled_from(("This is", "bako", "a cat")), st.sampled_from(TEXTS))
    questions = st.sampled_from(([*parts(0)], parts(1, 2), "This is", "bako"))
    question = st.fixed_dictionaries({"role": st.just("user"), "content": questions | texts})
    answer = st.fixed_dictionaries({"role": st.just("assistant"), "content": st.just("bako") | texts})
    seconds = st.floats(0.5, 100) | st.floats(1e-300, 0.01)
    known = {
        "model": st.sampled_from((BASE, FUSES, FUSES)),
        "messages": st.tuples(question) | st.tuples(question, answer, question),
        "url": pictures,
        "image_url": pictures | st.fixed_dictionaries({"url": pictures}),
        "image": pictures.map(lambda uri: uri.partition(",")[2]),
        "images": st.lists(pictures, min_size=1, max_size=3),
        "input": pictures | st.lists(pictures, min_size=1, max_size=3),
        "question": texts,
        "answer": texts,
        "id": packs,
        "pack_id": packs,
        "demo_pack": packs | st.fixed_dictionaries({"id": packs, "select": st.integers(1, 4)}),
        "max_tokens": st.integers(1, 5),
        "max_completion_tokens": st.integers(1, 5),
        "n": st.integers(1, 4),
        "top_logprobs": st.integers(0, 5),
        "timeout_seconds": seconds,
    }
    forged = st.integers(0, 200).map(lambda seed: forged_pack(seed, server.exported)[1])
    return Walker(document, known, st.just(server.exported) | forged | st.binary(max_size=100))


def walk(server: Server, walker: Walker, operation: Operation, examples: int) -> Counter[int]:
    """Send requests to one operation, each judged by the document; gives how often came which status."""
    statuses = Counter[int]()

    @settings(
        max_examples=examples,
        deadline=None,
        database=None,
        derandomize=True,
        suppress_health_check=list(HealthCheck),
        phases=(Phase.explicit, Phase.generate, Phase.shrink),
    )
    @given(walker.requests(operation))
    def every_answer_is_as_documented(request: Request) -> None:
        response = server.ask(request.path, request.content, operation.method.upper(), request.headers)
        statuses[response.status_code] += 1
        too_late = request.content is not None and b"timeout_seconds" in request.content
        problem = fault(response, (HTTPStatus.GATEWAY_TIMEOUT,) if too_late else ())
        assert problem is None, problem
        problem = walker.problem(request, response)
        assert problem is None, problem

    every_answer_is_as_documented()
    return statuses


def walk_all(server: Server, examples: int) -> None:
    """Operations with a body have the most that can go wrong; what deletes comes last."""
    walker = walker_of(server)
    for operation in sorted(walker.operations, key=lambda one: one.method == "delete"):
        with_body = bool(operation.bodies)
        statuses = walk(server, walker, operation, examples if with_body else max(5, examples // 10))
        print(operation, dict(sorted(statuses.items())))
        assert statuses[HTTPStatus.OK], f"{operation} never did what it is for"
    made = server.post(PACKS, {"model": FUSES, "demonstrations": shown(1, 2, 3)})
    assert made.json()["id"] == server.pack


def test_every_operation_keeps_to_its_document(steady: Server):
    walk_all(steady, 20)


@pytest.mark.trial
def test_every_operation_keeps_to_its_document_for_long(steady: Server):
    walk_all(steady, 1000)
