"""A server on two nodes, of which one is lost under load: no request is lost within its deadline, and no
answer is another one.

The clients sit on a laptop outside of the cluster, and ask the node that is left.
"""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from pipelines.serve import app
from tests.nodes import BIN, ROOT, Cluster, Host, wait_until
from tests.serving import BASE, FUSES, asked, tiny_run, told

pytestmark = [pytest.mark.trial, pytest.mark.alone, pytest.mark.timeout(900)]

PORT = 8000
CLIENTS, LONG, SHOTS = 4, 60, 3
DEADLINE_SECONDS, READY_SECONDS = 120.0, 180
# Of a stock client: what an ingress that is lost was about to say is asked for again, and one that is cut off
# says nothing any more.
RETRIES, PATIENCE_SECONDS = 2, 30.0
EACH = {"fewest": 2, "most": 2, "queued": 256, "at_once": 16, "requests_each": 8}
# As much of a node's one CPU as two of a kind on the same one do not find.
CPUS = {app.COMPRESSOR: 0.3, app.GENERATOR: 0.6}

Request = Mapping[str, Any]


@pytest.fixture
def cluster(no_ray_cluster: None) -> Iterator[Cluster]:
    with Cluster() as cluster:
        yield cluster


def mmicl(*arguments: str) -> str:
    command = [sys.executable, "-m", "pipelines.cli", *arguments]
    return subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout


@pytest.fixture
def key(tmp_path: Path) -> str:
    told = json.loads(mmicl("serve", "keys", "add", "laptop", "--file", str(tmp_path / "keys")))
    return str(told["key"])


@pytest.fixture
def nodes(cluster: Cluster, key: str, tmp_path: Path) -> list[Host]:
    """Two nodes, each with a compressor and a generator, and with a proxy that answers."""
    nodes = [cluster.add("one"), cluster.add("two")]
    run = tiny_run(tmp_path)
    file = tmp_path / "serve.yaml"
    flags = {
        "backbone.path": run.backbone.path,
        "serve.adapters": json.dumps(dict(run.serve.adapters)),
        "serve.bank": run.serve.bank,
        "serve.keys": str(tmp_path / "keys"),
        "serve.host": "0.0.0.0",
        "serve.port": str(PORT),
        "serve.model_name": BASE,
        "serve.ingress_replicas": "2",
        "serve.ingress_per_node": "1",
        "serve.request_seconds": str(DEADLINE_SECONDS),
    } | {f"serve.{kind}": json.dumps(EACH | {"cpus": cpus}) for kind, cpus in CPUS.items()}
    mmicl("serve", "build", "--out", str(file), *itertools.chain(*((f"--{n}", v) for n, v in flags.items())))
    env = cluster.laptop_environment()
    with cluster.laptop.start(
        str(BIN / "serve"), "deploy", str(file), "--address", cluster.address, env=env
    ) as deploy:
        assert deploy.wait(READY_SECONDS) == 0
    for node in nodes:
        wait_until(lambda node=node: models(cluster, node, key) == [BASE, FUSES], node.name, READY_SECONDS, 1)
        for kind in (app.COMPRESSOR, app.GENERATOR):
            wait_until(
                lambda node=node, kind=kind: replicas(node, kind) == 1,
                f"{kind} on {node.name}",
                READY_SECONDS,
            )
    return nodes


def replicas(node: Host, kind: str) -> int:
    return len(node.processes(f"ray::ServeReplica:{app.APPLICATION}:{kind}"))


def models(cluster: Cluster, node: Host, key: str) -> list[str]:
    def ask() -> list[str]:
        headers = {"Authorization": f"Bearer {key}"}
        try:
            reply = httpx.get(f"http://{node.address}:{PORT}/v1/models", headers=headers, timeout=10)
        except httpx.TransportError:
            return []
        return [model["id"] for model in reply.json()["data"]] if reply.is_success else []

    return cluster.laptop.call(ask)


class Load:
    """Clients on the laptop that ask one question after the other, and what they were told."""

    def __init__(self, cluster: Cluster, node: Host, key: str) -> None:
        self._cluster, self._url, self._key = cluster, f"http://{node.address}:{PORT}/v1", key
        self.told: list[tuple[Request, str]] = []
        self.slowest = 0.0
        self._ended = threading.Event()

    @contextmanager
    def going(self) -> Iterator[None]:
        with ThreadPoolExecutor(CLIENTS, initializer=self._cluster.laptop.enter) as pool:
            asking = [pool.submit(self._ask_on, number) for number in range(CLIENTS)]
            try:
                yield
            finally:
                self._ended.set()
            for future in asking:
                future.result()

    def more(self) -> None:
        """Wait until a few more questions are answered."""
        count = len(self.told) + 2 * CLIENTS
        wait_until(lambda: len(self.told) >= count, "further answers", DEADLINE_SECONDS)

    def asked_again(self) -> list[str]:
        """What is answered to the same questions now."""

        def ask() -> list[str]:
            with self._client() as client:
                return [answer(client, request, stream=False) for request, _ in self.told]

        return self._cluster.laptop.call(ask)

    def _ask_on(self, number: int) -> None:
        with self._client() as client:
            for turn in itertools.count():
                for request in questions(10_000 * number + SHOTS * turn):
                    if self._ended.is_set():
                        return
                    began = time.monotonic()
                    self.told.append((request, answer(client, request, stream=bool(turn % 2))))
                    self.slowest = max(self.slowest, time.monotonic() - began)

    def _client(self) -> openai.OpenAI:
        return openai.OpenAI(
            base_url=self._url, api_key=self._key, max_retries=RETRIES, timeout=PATIENCE_SECONDS
        )


def questions(first: int) -> list[Request]:
    """Questions for both kinds of replicas, other ones for each `first`."""
    shown = [*told(*range(first, first + SHOTS)), asked(first)]
    return [
        {"model": BASE, "messages": [asked(first)], "max_tokens": LONG, "temperature": 1.0, "seed": first},
        {"model": FUSES, "messages": shown, "max_tokens": LONG, "extra_body": {"demonstrations": "fused"}},
    ]


def answer(client: openai.OpenAI, request: Request, *, stream: bool) -> str:
    """What is answered; a stream that breaks off with the node that sent it is asked for once more."""
    if stream:
        with suppress(httpx.TransportError, openai.APIConnectionError):
            return streamed(client, request)
    return client.chat.completions.create(**request).choices[0].message.content


def streamed(client: openai.OpenAI, request: Request) -> str:
    chunks = list(client.chat.completions.create(**request, stream=True))
    assert chunks[-1].choices[0].finish_reason in ("length", "stop")
    return "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)


@pytest.mark.parametrize("lose", [Host.kill, Host.cut], ids=["killed", "cut off"])
def test_node_that_is_lost_under_load_costs_no_request_and_changes_no_answer(
    cluster: Cluster, nodes: list[Host], key: str, lose: Callable[[Host], None]
) -> None:
    left, lost = nodes
    load = Load(cluster, left, key)
    with load.going():
        load.more()
        lose(lost)
        wait_until(lambda: cluster.alive() == 2, "Ray notices it")
        load.more()
        # What was on the lost node finds room on another one.
        new = cluster.add("three")
        for kind in CPUS:
            wait_until(lambda kind=kind: replicas(new, kind) == 1, f"a {kind} on the new node", READY_SECONDS)
        load.more()
    print(f"{len(load.told)} answers, the slowest after {load.slowest:.1f} s")
    assert load.slowest < DEADLINE_SECONDS
    assert load.asked_again() == [text for _, text in load.told]
