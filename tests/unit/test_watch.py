from __future__ import annotations

import time
from dataclasses import replace
from threading import Event
from unittest.mock import MagicMock

import pytest
from ray import exceptions
from torch import nn

from mmicl_core.errors import DataError, TrainingError
from pipelines.watch import LONGEST_SILENCE, Beat, Place, Watch, naming_the_worker, watching

SECONDS = 10.0


class _Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> _Clock:
    return _Clock()


@pytest.fixture
def watch(clock: _Clock) -> Watch:
    watch = Watch(SECONDS, clock)
    assert watch.begin() == 1
    return watch


def _beat(rank: int, moves: int, worker: str = "") -> Beat:
    return Beat(
        1, rank, 2, worker or f"node/{rank}", moves, moves // 10, f"layers.{rank}", {"pictures": rank}
    )


def test_workers_that_move_go_on_however_long_it_takes(watch: Watch, clock: _Clock) -> None:
    for moves in range(100):
        clock.now += 0.9 * SECONDS
        assert watch.beat(_beat(0, moves)) and watch.beat(_beat(1, moves))
    assert watch.stall() is None


def test_worker_that_beats_without_moving_stalls_and_where_all_are_is_told(
    watch: Watch, clock: _Clock
) -> None:
    watch.beat(_beat(0, 31))
    watch.beat(_beat(1, 30))
    clock.now += 0.6 * SECONDS
    assert watch.beat(_beat(1, 31)) and watch.beat(_beat(0, 31))
    clock.now += 0.6 * SECONDS
    assert not watch.beat(_beat(1, 32))
    assert watch.stall() == (
        "worker 0 did nothing new for 10 s (train.stall_seconds). worker 0: step 3, in layers.0, with "
        "nothing to look at; worker 1: step 3, in layers.1, with 1 pictures"
    )


def test_worker_that_says_nothing_any_more_stalls_too(watch: Watch, clock: _Clock) -> None:
    watch.beat(_beat(0, 1))
    clock.now += 1.1 * SECONDS
    stall = watch.stall()
    assert stall is not None and stall.startswith("worker 0 did nothing new")


def test_worker_that_has_ended_may_be_silent(watch: Watch, clock: _Clock) -> None:
    watch.beat(_beat(0, 1))
    watch.leave(_beat(0, 2))
    clock.now += 2 * SECONDS
    assert watch.stall() is None


def test_workers_that_start_again_are_others_even_where_they_are_as_far(watch: Watch, clock: _Clock) -> None:
    watch.beat(_beat(0, 5))
    clock.now += 0.9 * SECONDS
    assert watch.beat(_beat(0, 5, worker="node/other"))
    clock.now += 0.9 * SECONDS
    assert watch.stall() is None


def test_workers_that_a_smaller_training_has_not_are_forgotten(watch: Watch, clock: _Clock) -> None:
    watch.beat(_beat(1, 5))
    clock.now += 0.9 * SECONDS
    watch.beat(replace(_beat(0, 1), world_size=1))
    clock.now += 0.9 * SECONDS
    assert watch.stall() is None


def test_watch_that_begins_again_knows_of_no_stall(watch: Watch, clock: _Clock) -> None:
    watch.beat(_beat(0, 1))
    clock.now += 2 * SECONDS
    assert watch.stall()
    assert watch.begin() == 2
    assert watch.stall() is None and watch.beat(replace(_beat(0, 1), attempt=2))


def test_worker_that_outlived_an_earlier_attempt_is_told_to_end(watch: Watch) -> None:
    assert watch.beat(_beat(0, 1))
    watch.begin()
    assert not watch.beat(_beat(0, 2))
    assert watch.beat(replace(_beat(0, 1), attempt=2))


def test_worker_begins_when_those_on_a_lost_node_have_ended_and_at_once_otherwise(clock: _Clock) -> None:
    nodes = {"lost", "left"}
    watch = Watch(SECONDS, clock, lambda: nodes)
    watch.begin()
    watch.beat(_beat(0, 1, "lost/0"))
    watch.beat(_beat(1, 1, "left/1"))
    clock.now += 1
    # Ray ends what it can reach.
    assert watch.wait() == 0
    watch.begin()
    nodes.remove("lost")
    assert watch.wait() == LONGEST_SILENCE - 1
    clock.now += 2
    watch.beat(replace(_beat(1, 1, "left/2"), attempt=2))
    assert watch.wait() == LONGEST_SILENCE - 3
    # It could still reach the watch, which tells it to end.
    assert not watch.beat(_beat(0, 2, "lost/0"))
    assert watch.wait() == LONGEST_SILENCE
    clock.now += LONGEST_SILENCE
    assert watch.wait() == 0


def test_worker_that_has_ended_is_not_waited_for(clock: _Clock) -> None:
    watch = Watch(SECONDS, clock, set)
    watch.begin()
    watch.beat(_beat(0, 1, "lost/0"))
    watch.leave(_beat(0, 2, "lost/0"))
    assert watch.wait() == 0


def test_worker_ends_when_the_watch_is_out_of_reach_for_so_long_that_another_may_be_in_its_place(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    begun, ended, beats = time.monotonic(), Event(), list[float]()

    def lose(_: object, timeout: float | None = None) -> float:
        if timeout is None:
            return 0.0
        beats.append(time.monotonic() - begun)
        raise exceptions.GetTimeoutError

    monkeypatch.setattr("pipelines.watch.ray", MagicMock(exceptions=exceptions, get=lose))
    monkeypatch.setattr("pipelines.watch.os._exit", lambda _: ended.set())
    monkeypatch.setattr("pipelines.watch.BEAT_SECONDS", 0.01)
    monkeypatch.setattr("pipelines.watch.LONGEST_SILENCE", 0.2)
    with watching(MagicMock(), 1, 0, 1, nn.Linear(1, 1), Place()):
        assert ended.wait(10)
    # The first ones that got no answer were none to end for.
    assert beats[1] < 0.2 <= beats[-1]


def test_error_says_which_worker_met_it_and_where_and_stays_of_its_kind() -> None:
    place = Place()
    place.step = 7
    place.at("backbone.vision_tower")
    torn = r"^worker 1, step 7, in backbone\.vision_tower: a\.jpg is torn$"
    with pytest.raises(DataError, match=torn), naming_the_worker(1, place):
        raise DataError("a.jpg is torn")
    out = r"vision_tower: IndexError: out of range$"
    with pytest.raises(TrainingError, match=out), naming_the_worker(1, place):
        raise IndexError("out of range")


@pytest.mark.parametrize(
    "error",
    [RuntimeError("[gloo/transport/tcp/pair.cc:547] Connection closed by peer"), ConnectionResetError()],
)
def test_loss_of_another_worker_is_no_mistake_of_this_one(error: Exception) -> None:
    with pytest.raises(type(error)) as caught, naming_the_worker(0, Place()):
        raise error
    assert caught.value is error
