"""Questions of held-out concepts as requests, and how long a server takes to answer them."""

from __future__ import annotations

import base64
import json
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from mmicl_core.assets import resolve
from mmicl_core.config.episodes import EpisodeConfig, ShotStage
from mmicl_core.config.run import RunConfig
from mmicl_core.config.serve import ReplicasConfig, ServeConfig
from pipelines.serve import app
from tests.corpora import drawn_episodes, open_shards
from tests.serving import free_port

__all__ = [
    "served",
    "BASE",
    "CLIENTS",
    "FUSES",
    "QUERIES",
    "Asked",
    "Episode",
    "ask",
    "episodes",
    "interleaved",
    "percentiles",
    "side_by_side",
]

BASE, FUSES = "nano", "nano@aim"
QUERIES, CLIENTS = 60, 16
SHOTS_PER_CLASS = 8

Body = Mapping[str, Any]


@dataclass(frozen=True)
class Episode:
    """Demonstrations and a query, as messages."""

    shown: list[tuple[dict[str, Any], dict[str, Any]]]
    query: dict[str, Any]
    answer: str

    def body(self, model: str, *, shown: bool = True, reordered: int | None = None, **more: Any) -> Body:
        """A request that is answered with a name."""
        turns = list(self.shown) if shown else []
        if reordered is not None:
            random.Random(reordered).shuffle(turns)
        messages = [message for turn in turns for message in turn]
        return {"model": model, "messages": [*messages, self.query], "max_tokens": 8, "stream": True, **more}

    def pack(self) -> Body:
        """The demonstrations as a pack."""
        return {
            "model": FUSES,
            "demonstrations": [
                {
                    "image_url": asked["content"][0]["image_url"],
                    "question": asked["content"][1]["text"],
                    "answer": told["content"],
                }
                for asked, told in self.shown
            ],
        }


@dataclass(frozen=True)
class Asked:
    """What came of one request; milliseconds, seen by the client."""

    ttft_ms: float
    replica_ms: float
    """The same as the replica tells it, from when the question came there."""
    whole_ms: float
    text: str
    usage: Mapping[str, Any]


def episodes(count: int, work: Path) -> list[Episode]:
    """Two-way questions with 8 demonstrations of each class, of the corpus that is shipped."""
    corpus = open_shards(resolve("embedded:open_emoji"), work)
    both = 2 * SHOTS_PER_CLASS
    # Not every number has an episode.
    stage = ShotStage(
        episodes=count + count // 2, min_shots_of_both_classes=both, max_shots_of_both_classes=both
    )
    rows = drawn_episodes(corpus, EpisodeConfig(part="held_out_concepts", stages=(stage,), seed=1))

    def message(turn: Mapping[str, Any]) -> dict[str, Any]:
        uri = f"data:image/webp;base64,{base64.b64encode(corpus.encoded[turn['picture']]).decode()}"
        picture = {"type": "image_url", "image_url": {"url": uri}}
        return {"role": "user", "content": [picture, {"type": "text", "text": turn["question"]}]}

    made = []
    for row in rows[:count]:
        *turns, query = row["turns"]
        shown = [(message(turn), {"role": "assistant", "content": turn["answer"]}) for turn in turns]
        made.append(Episode(shown, message(query), row["answer"]))
    return made


def ask(client: httpx.Client, body: Body) -> Asked:
    """Send a request and follow its stream to the end."""
    content = json.dumps({**body, "stream_options": {"include_usage": True}}).encode()
    begun, first, text, usage, told = time.perf_counter(), 0.0, "", dict[str, Any](), dict[str, Any]()
    headers = {"content-type": "application/json"}
    with client.stream("POST", "/v1/chat/completions", content=content, headers=headers) as response:
        if response.status_code != httpx.codes.OK:
            raise AssertionError(f"{response.status_code} {response.read().decode()}")
        for line in response.iter_lines():
            if not line.startswith("data: {"):
                continue
            event = json.loads(line.removeprefix("data: "))
            assert "error" not in event, event
            usage, told = event.get("usage") or usage, event.get("mmicl") or told
            piece = "".join(choice["delta"].get("content") or "" for choice in event["choices"])
            first = first or (time.perf_counter() if piece else 0.0)
            text += piece
    ended = time.perf_counter()
    return Asked(((first or ended) - begun) * 1000, told["ttft_ms"], (ended - begun) * 1000, text, usage)


def side_by_side(url: str, bodies: Sequence[Body], clients: int) -> tuple[list[Asked], float]:
    """All requests by so many clients at a time, and the seconds that it took."""
    with httpx.Client(base_url=url, timeout=120, limits=httpx.Limits(max_connections=clients)) as client:
        begun = time.perf_counter()
        with ThreadPoolExecutor(clients) as pool:
            answers = list(pool.map(lambda body: ask(client, body), bodies))
        return answers, time.perf_counter() - begun


def percentiles(milliseconds: Sequence[float]) -> dict[str, float]:
    """p50, p95 and p99."""
    found = np.percentile(np.asarray(milliseconds), [50, 95, 99])
    return {f"p{name}": round(float(value), 1) for name, value in zip((50, 95, 99), found, strict=True)}


def interleaved(calls: Mapping[str, Callable[[int], Any]], rounds: int) -> dict[str, list[Any]]:
    """What each call gives in every round, in turns: what slows the machine down slows all of them."""
    found: dict[str, list[Any]] = {name: [] for name in calls}
    for number in range(rounds):
        for name, call in calls.items():
            found[name].append(call(number))
    return found


@contextmanager
def served(folder: Path, **settings: Any) -> Iterator[str]:
    """The address of nano's server, which leaves nothing on a Ray that goes on without it."""
    replicas = ReplicasConfig(at_once=2 * CLIENTS, requests_each=CLIENTS, queued=1024)
    config = ServeConfig(
        port=free_port(),
        bank=str(folder),
        compressor=replicas,
        generator=replicas,
        max_packs=10 * QUERIES,
        **settings,
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_ADDRESS", "auto")
        try:
            yield app.start(RunConfig(serve=config))
        finally:
            app.stop()
