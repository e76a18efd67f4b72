"""Replicas come with load and go without it, down to none, and no request is lost on the way."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager

import httpx
import openai
import pytest

from mmicl_core.config.run import RunConfig
from mmicl_core.config.serve import ReplicasConfig
from pipelines.serve import app
from tests.serving import BASE, FUSES, address_of, asked, replica_states, tiny_run, told

SECONDS = 60
RUNNING = "RUNNING"


@pytest.fixture(scope="module")
def run(ray_cluster: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunConfig]:
    scaled = {"requests_each": 1, "at_once": 2, "upscale_seconds": 0.5, "downscale_seconds": 3, "cpus": 0.1}
    run = tiny_run(
        tmp_path_factory.mktemp("scaled"),
        compressor=ReplicasConfig(fewest=0, most=1, **scaled),
        generator=ReplicasConfig(fewest=1, most=2, **scaled),
    )
    with pytest.MonkeyPatch.context() as patch:
        # Ray outlives this server, which must leave nothing on it.
        patch.setenv("RAY_ADDRESS", "auto")
        app.start(run)
        yield run
        app.stop()


def running(deployment: str) -> int:
    return replica_states()[deployment].get(RUNNING, 0)


def wait_until(is_so: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + SECONDS
    while not is_so():
        assert time.monotonic() < deadline, f"after {SECONDS} s still not so: {what}; {replica_states()}"
        time.sleep(0.2)


@contextmanager
def load(run: RunConfig, clients: int) -> Iterator[list[Future[int]]]:
    """Clients that ask one question after the other; each ends as the number of its answers."""
    ended = threading.Event()

    def ask(number: int) -> int:
        with openai.OpenAI(base_url=f"{address_of(run)}/v1", api_key="none", max_retries=0) as client:
            asked_times = 0
            while not ended.is_set():
                reply = client.chat.completions.create(
                    model=BASE, messages=[asked(number)], max_tokens=200, temperature=1.0, seed=number
                )
                assert reply.choices[0].finish_reason in ("length", "stop")
                asked_times += 1
        return asked_times

    with ThreadPoolExecutor(clients) as pool:
        asking = [pool.submit(ask, number) for number in range(clients)]
        try:
            yield asking
        finally:
            ended.set()


def test_generator_has_more_replicas_under_load_and_fewer_without_and_loses_no_request(
    run: RunConfig,
) -> None:
    assert running(app.GENERATOR) == 1
    with load(run, 4) as asking:
        wait_until(lambda: running(app.GENERATOR) == 2, "two generators under load")
        # Long enough that both answer.
        time.sleep(1)
    assert all(future.result() > 0 for future in asking)
    # The load goes slowly, so that a replica that ends has answers under way.
    with load(run, 1) as asking:
        wait_until(lambda: running(app.GENERATOR) == 1, "one generator for one client")
    assert all(future.result() > 0 for future in asking)


def test_compressor_comes_from_none_when_it_is_asked_and_goes_back_to_none(run: RunConfig) -> None:
    assert running(app.COMPRESSOR) == 0
    for round_of in range(2):
        seeds = range(10 * round_of, 10 * round_of + 2)
        body = {"model": FUSES, "messages": [*told(*seeds), asked()], "demonstrations": "fused"}
        reply = httpx.post(f"{address_of(run)}/v1/chat/completions", json=body, timeout=SECONDS)
        assert reply.is_success, reply.text
        assert reply.json()["usage"]["demo_tokens_fused"] > 0
        assert running(app.COMPRESSOR) == 1
        wait_until(lambda: running(app.COMPRESSOR) == 0, "no compressor without a request")
    assert httpx.get(f"{address_of(run)}/readyz").is_success
