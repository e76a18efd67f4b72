from __future__ import annotations

import asyncio
import re

import pytest

from pipelines.serve.contracts import Finished, Fusion, Piece, Started
from pipelines.serve.metrics import Metrics

STARTED = Started(
    prompt_tokens=40, cached_tokens=30, demo_tokens_full=160, demo_tokens=20, queued_ms=50.0, batch=4
)


def samples(metrics: Metrics, **replicas: int) -> dict[str, float]:
    """Every sample of the page."""
    page, kind = metrics.page(replicas)
    assert kind.startswith("text/plain; version=0.0.4")
    found = {}
    for line in page.decode().splitlines():
        if not line.startswith("#"):
            name, value = re.fullmatch(r"(\S+(?:\{.*\})?) (\S+)", line).groups()
            found[name] = float(value)
    return found


async def groups(*events, error: Exception | None = None):
    for group in events:
        await asyncio.sleep(0.01)
        yield group
    if error is not None:
        raise error


def follow(metrics: Metrics, events) -> list:
    async def run() -> list:
        return [group async for group in metrics.follow("nano", events)]

    return asyncio.run(run())


def test_stream_is_passed_on_as_it_is_and_observed():
    metrics = Metrics()
    events = [(STARTED,), (Piece(0, "a"),), (Piece(0, "b"),), (Piece(0, "c"), Finished(0, "stop", 3, 200.0))]
    assert follow(metrics, groups(*events)) == events
    told = samples(metrics)
    assert told['mmicl_tokens_total{kind="prompt",model="nano"}'] == 40
    assert told['mmicl_tokens_total{kind="cached",model="nano"}'] == 30
    assert told['mmicl_tokens_total{kind="completion",model="nano"}'] == 3
    assert told['mmicl_demonstration_tokens_saved_total{model="nano"}'] == 140
    assert told['mmicl_queue_seconds_sum{model="nano"}'] == pytest.approx(0.05)
    assert told['mmicl_batch_size_bucket{le="2.0",model="nano"}'] == 0
    assert told['mmicl_batch_size_bucket{le="4.0",model="nano"}'] == 1
    assert told['mmicl_time_to_first_token_seconds_sum{model="nano"}'] == pytest.approx(0.2)
    assert told['mmicl_inter_token_seconds_count{model="nano"}'] == 2
    assert 0.015 < told['mmicl_inter_token_seconds_sum{model="nano"}'] < 0.5


def test_times_between_tokens_are_those_of_each_answer():
    metrics = Metrics()
    both = (Piece(0, "a"), Piece(1, "b"))
    follow(metrics, groups((STARTED,), both, (Piece(0, "c"),), (Piece(1, "d"),)))
    assert samples(metrics)['mmicl_inter_token_seconds_count{model="nano"}'] == 2


def test_whole_answer_is_observed_with_the_mean_of_its_times():
    metrics = Metrics()
    ended = (Finished(0, "length", 5, 200.0), Finished(1, "stop", 1, 300.0))
    metrics.observe_answer("nano", (STARTED, Piece(0, "abc"), Piece(1, "d"), *ended), 1.0)
    told = samples(metrics)
    assert told['mmicl_tokens_total{kind="completion",model="nano"}'] == 6
    assert told['mmicl_time_to_first_token_seconds_count{model="nano"}'] == 2
    assert told['mmicl_time_to_first_token_seconds_sum{model="nano"}'] == pytest.approx(0.5)
    # One second less 0.2 for the first token, over the four tokens after it.
    assert told['mmicl_inter_token_seconds_sum{model="nano"}'] == pytest.approx(0.2)


def test_stream_that_is_given_up_closes_what_it_follows():
    closed = []

    async def source():
        try:
            while True:
                yield (Piece(0, "a"),)
        finally:
            closed.append(True)

    async def give_up() -> None:
        following = Metrics().follow("nano", source())
        await anext(following)
        await following.aclose()
        assert closed == [True]

    asyncio.run(give_up())


def test_error_of_a_stream_passes():
    metrics = Metrics()
    with pytest.raises(KeyError, match="died"):
        follow(metrics, groups((STARTED,), error=KeyError("the replica died")))
    assert samples(metrics)['mmicl_tokens_total{kind="prompt",model="nano"}'] == 40


def test_bank_hits_and_misses_are_counted_by_demonstration():
    metrics = Metrics()
    metrics.observe_fusion(Fusion("x", (20, 20, 20), (4, 4, 4), 2, ()))
    metrics.observe_fusion(Fusion("y", (20,), (4,), 0, ()))
    told = samples(metrics)
    assert told['mmicl_bank_demonstrations_total{result="hit"}'] == 2
    assert told['mmicl_bank_demonstrations_total{result="miss"}'] == 2


def test_replicas_that_are_gone_are_told_no_more():
    metrics = Metrics()
    told = samples(metrics, compressor=2, generator=1)
    assert told['mmicl_replicas{deployment="compressor"}'] == 2
    told = samples(metrics, generator=3)
    assert {name: value for name, value in told.items() if name.startswith("mmicl_replicas")} == {
        'mmicl_replicas{deployment="generator"}': 3
    }


def test_models_and_methods_that_there_are_not_make_no_time_series():
    metrics = Metrics()
    for number in range(100):
        metrics.request_started()
        metrics.request_finished("POST", "/v1/chat/completions", 404, 0.1, f"made-up-{number}")
    metrics.request_started()
    metrics.request_finished("POST", "/v1/chat/completions", 200, 0.1, "nano")
    metrics.request_started()
    metrics.request_finished("POST", "/v1/chat/completions", 400, 0.1, "nano")
    metrics.request_started()
    metrics.request_finished("MADEUP", "unknown", 404, 0.1)
    counted = {name: value for name, value in samples(metrics).items() if "requests_total" in name}
    start = 'mmicl_requests_total{method="POST",model='
    assert counted == {
        'mmicl_requests_total{method="other",model="",route="unknown",status="404"}': 1,
        f'{start}"",route="/v1/chat/completions",status="404"}}': 100,
        f'{start}"nano",route="/v1/chat/completions",status="200"}}': 1,
        f'{start}"nano",route="/v1/chat/completions",status="400"}}': 1,
    }


def test_metrics_of_two_servers_in_one_process_do_not_meet():
    first, second = Metrics(), Metrics()
    first.request_started()
    assert (samples(first)["mmicl_requests_in_flight"], samples(second)["mmicl_requests_in_flight"]) == (1, 0)


def test_replicas_behind_one_address_are_told_apart():
    told = {}
    for name in ("a", "b"):
        metrics = Metrics(name)
        metrics.observe_answer("nano", [STARTED, Finished(0, "stop", 3, 200.0)], 1.0)
        told |= samples(metrics, generator=1)
    assert told['mmicl_tokens_total{kind="prompt",model="nano",replica="a"}'] == 40
    assert told['mmicl_tokens_total{kind="prompt",model="nano",replica="b"}'] == 40
    assert all('replica="' in name for name in told)
