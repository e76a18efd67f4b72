"""What a registered pack is worth to whoever asks, and what the server adds, by nano behind Ray Serve.

    make bench

Records times to the first token of one client at a time with p50, p95 and p99, beside each the accuracy of
its answers; requests a second of 16 clients; and what the way through HTTP and the ingress adds. Opponents of
a pack are no demonstrations, demonstrations written out, those behind a warm cache of exactly their keys and
values, and those that come in another order each time, where such a cache cannot help; fused ones in another
order each time come out of the bank.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable, Iterator, Mapping
from statistics import median

import httpx
import pytest
from ray.serve.handle import DeploymentHandle

from mmicl_core.prompts import Turn
from mmicl_core.serving.sampling import Sampling
from pipelines.serve import app
from pipelines.serve.contracts import Question
from tests.benchmarks.asked import (
    BASE,
    CLIENTS,
    FUSES,
    QUERIES,
    Asked,
    Episode,
    ask,
    episodes,
    interleaved,
    percentiles,
    served,
    side_by_side,
)
from tests.benchmarks.records import Figures

WARM_UP = 5

pytestmark = [pytest.mark.bench, pytest.mark.alone]


@pytest.fixture(scope="module")
def asked_episodes(tmp_path_factory: pytest.TempPathFactory) -> list[Episode]:
    return episodes(QUERIES, tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module")
def url(ray_cluster: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    # Keys and values of all that is asked have room, so that each opponent finds its own.
    with served(tmp_path_factory.mktemp("bank"), rows=CLIENTS, prefix_bytes=2**30) as address:
        yield address


@pytest.fixture(scope="module")
def packs(url: str, asked_episodes: list[Episode]) -> list[str]:
    with httpx.Client(base_url=url, timeout=60) as client:
        made = [client.post("/v1/demo_packs", json=one.pack()) for one in asked_episodes]
    return [response.raise_for_status().json()["id"] for response in made]


Ways = Mapping[str, Callable[[int], Asked]]


def ways_to_ask(client: httpx.Client, shown: list[Episode], packs: list[str]) -> Ways:
    """Each answers the question of a round."""

    # In each round, what fills a cache comes before what finds it filled.
    return {
        "no demonstrations": lambda n: ask(client, shown[n].body(BASE, shown=False)),
        "pack, for the first time": lambda n: ask(
            client, shown[n].body(FUSES, shown=False, demo_pack=packs[n])
        ),
        "pack": lambda n: ask(client, shown[n].body(FUSES, shown=False, demo_pack=packs[n])),
        "written out, another order each time": lambda n: ask(client, shown[n].body(BASE, reordered=n)),
        "written out, for the first time": lambda n: ask(client, shown[n].body(BASE)),
        "written out, warm cache of exactly these": lambda n: ask(client, shown[n].body(BASE)),
        "fused, another order each time": lambda n: ask(
            client, shown[n].body(FUSES, reordered=n, demonstrations="fused")
        ),
    }


def keep_percentiles(figures: Figures, name: str, milliseconds: list[float]) -> None:
    """The median and its spread, p95 and p99."""
    figures.absolute(name, milliseconds, "ms")
    told = percentiles(milliseconds)
    for percentile in ("p95", "p99"):
        figures.absolute(f"{name}, {percentile}", told[percentile], "ms")


def accuracy(answers: list[Asked], shown: list[Episode]) -> float:
    right = [answer.text.strip() == one.answer for answer, one in zip(answers, shown, strict=True)]
    return round(sum(right) / len(right), 3)


def test_first_token_comes_sooner_behind_a_pack_than_behind_written_demonstrations(
    url: str, asked_episodes: list[Episode], packs: list[str], figures: Figures
) -> None:
    with httpx.Client(base_url=url, timeout=60) as client:
        ways = ways_to_ask(client, asked_episodes, packs)
        interleaved({"no demonstrations": ways["no demonstrations"]}, WARM_UP)
        found = interleaved(ways, QUERIES)
    told = {
        name: percentiles([one.ttft_ms for one in answers])
        | {
            "in the generator, p50": round(median(one.replica_ms for one in answers), 1),
            "accuracy": accuracy(answers, asked_episodes),
            "prompt tokens": round(median(one.usage["prompt_tokens"] for one in answers)),
        }
        for name, answers in found.items()
    }
    for name, row in told.items():
        keep_percentiles(figures, f"{name}: first token", [one.ttft_ms for one in found[name]])
        figures.absolute(f"{name}: the same in the generator", row["in the generator, p50"], "ms")
        figures.ratio(f"{name}: accuracy", row["accuracy"], "share")
        figures.absolute(f"{name}: prompt", row["prompt tokens"], "tokens")
    p50 = {name: row["p50"] for name, row in told.items()}
    full, pack, alone = (
        p50[name] for name in ("written out, another order each time", "pack", "no demonstrations")
    )
    replica = {name: row["in the generator, p50"] for name, row in told.items()}
    in_replica = replica["written out, another order each time"] / replica["pack"]
    figures.ratio("first token, written out over pack", full / pack)
    figures.ratio("first token, pack over no demonstrations", pack / alone)
    figures.ratio("in the generator, written out over pack", in_replica)
    assert replica["written out, another order each time"] >= 5 * replica["pack"]
    assert full >= 5 * pack
    assert pack <= 1.3 * alone


def test_many_clients_are_answered_four_times_as_often_behind_packs(
    url: str, asked_episodes: list[Episode], packs: list[str], figures: Figures
) -> None:
    fused = [
        one.body(FUSES, shown=False, demo_pack=pack) for one, pack in zip(asked_episodes, packs, strict=True)
    ]
    full = [one.body(BASE, reordered=100 + number) for number, one in enumerate(asked_episodes)]
    warm = [one.body(BASE) for one in asked_episodes]
    side_by_side(url, [*fused, *warm], CLIENTS)
    bodies = {"pack": fused * 4, "written out, another order": full * 2, "written out, warm cache": warm * 2}
    rates = {}
    for name, wanted in bodies.items():
        answers, seconds = side_by_side(url, wanted, CLIENTS)
        rates[name] = len(wanted) / seconds
        figures.absolute(f"{name}: answers", rates[name], "requests a second")
        keep_percentiles(figures, f"{name}: first token", [one.ttft_ms for one in answers])
    ratio = rates["pack"] / rates["written out, another order"]
    figures.ratio("answers, packs over written out", ratio)
    assert ratio >= 4


def test_http_and_ingress_add_less_than_five_milliseconds(
    url: str, asked_episodes: list[Episode], figures: Figures
) -> None:
    # Not Serve's own, which it would close in a loop that has ended.
    handle = DeploymentHandle(app.GENERATOR, app.APPLICATION)
    one = asked_episodes[0]
    body = {**one.body(BASE, shown=False), "stream": False, "max_tokens": 4}
    content = json.dumps(body).encode()
    question = _as_question(one)

    async def measure() -> tuple[list[float], list[float]]:
        direct, through = [], []
        async with httpx.AsyncClient(base_url=url, timeout=60) as client:
            for number in range(WARM_UP + 3 * QUERIES):
                begun = time.perf_counter()
                await handle.answer.remote(question)
                between = time.perf_counter()
                response = await client.post(
                    "/v1/chat/completions", content=content, headers={"content-type": "application/json"}
                )
                ended = time.perf_counter()
                response.raise_for_status()
                if number >= WARM_UP:
                    direct.append((between - begun) * 1000)
                    through.append((ended - between) * 1000)
        return direct, through

    direct, through = asyncio.run(measure())
    added = median(through) - median(direct)
    for name, milliseconds in {"handle": direct, "HTTP": through}.items():
        keep_percentiles(figures, name, milliseconds)
    figures.absolute("added", added, "ms")
    assert added < 5


def _as_question(one: Episode) -> Question:
    import base64

    picture, words = one.query["content"]
    encoded = base64.b64decode(picture["image_url"]["url"].partition(",")[2])
    turn = Turn(("0.0",), words["text"], None)
    return Question(BASE, (turn,), {"0.0": encoded}, (Sampling(4),), 60.0)
