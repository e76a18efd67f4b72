"""Replicas behind handles, by fakes of Ray's handles that answer, die, refuse and dawdle as they are told."""

from __future__ import annotations

import asyncio
import pickle
import threading
import time

import numpy as np
import pytest
import ray
from ray.exceptions import ActorDiedError, OwnerDiedError, RayTaskError, TaskCancelledError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError, RayServeException

from mmicl_core.bank import Demonstration
from mmicl_core.config.serve import ServeConfig
from mmicl_core.errors import DataError
from mmicl_core.prompts import Turn
from mmicl_core.serving.sampling import Sampling
from pipelines.serve import remote
from pipelines.serve.contracts import (
    Finished,
    Fusion,
    PackReference,
    Piece,
    Question,
    ServedModel,
    Started,
    TokenLogprob,
)
from pipelines.serve.errors import DeadlineError, OverloadedError, RequestError, UnavailableError
from pipelines.serve.remote import RemoteCompressor, RemoteGenerator
from pipelines.serve.replay import Replay

CONFIG = ServeConfig(request_seconds=5)
STARTED = Started(10, 0, 0, 0, 0.5, 1)
HELLO = (STARTED, Piece(0, "he"), Piece(0, "llo"), Finished(0, "stop", 2, 3.0))
DEAD = ActorDiedError()


class Handle:
    """What `remote` of each method gives, one after the other: a result, or an error, or a list of parts."""

    def __init__(self, *script, method=None, stream=False, shared=None):
        self.method, self.streams = method, stream
        self.shared = shared or {"script": list(script), "sent": [], "cancelled": 0}

    def options(self, method_name, stream=False):
        return Handle(method=method_name, stream=stream, shared=self.shared)

    def remote(self, *arguments):
        self.shared["sent"].append((self.method, *arguments))
        script = self.shared["script"]
        return Response(script.pop(0) if len(script) > 1 else script[0], self)

    @property
    def sent(self):
        return self.shared["sent"]

    @property
    def cancelled(self):
        return self.shared["cancelled"]


class Response:
    def __init__(self, outcome, handle):
        self._outcome, self._handle = outcome, handle
        self._parts = iter(outcome) if handle.streams and isinstance(outcome, list) else None

    def __await__(self):
        return self._settle(self._outcome).__await__()

    async def __anext__(self):
        if self._parts is None:
            return await self._settle(self._outcome)
        try:
            part = next(self._parts)
        except StopIteration:
            raise StopAsyncIteration from None
        return await self._settle(part)

    async def _settle(self, outcome):
        await asyncio.sleep(0)
        if isinstance(outcome, BaseException):
            raise outcome
        if outcome == "never":
            await asyncio.sleep(60)
        return outcome

    def cancel(self):
        self._handle.shared["cancelled"] += 1


def raised(cause):
    """An error as Ray gives it to a caller: of both classes."""
    return RayTaskError("answer", "Traceback ...", cause).as_instanceof_cause()


def lost():
    return raised(OwnerDiedError("00" * 28, None, ""))


def question(seconds=5.0, fusion=None):
    return Question("nano", (Turn((), "hi", ""),), {}, (Sampling(4),), seconds, fusion)


def answer(handle, asked=None):
    async def ask():
        return await RemoteGenerator(handle, CONFIG).answer(asked or question())

    return asyncio.run(ask())


def stream(handle, asked=None):
    async def ask():
        return [events async for events in RemoteGenerator(handle, CONFIG).stream(asked or question())]

    return asyncio.run(ask())


def fusion(name="f"):
    return Fusion(name, (30,), (5,), 0, (np.zeros((5, 8), np.float32),))


def demonstrations():
    return (Demonstration((b"picture",), "This is", "bako"),)


@pytest.mark.parametrize("cause", [DataError("too dark"), RequestError("no", "messages"), KeyError("bug")])
def test_error_of_a_replica_arrives_as_it_was_raised(cause):
    for ask, script in ((answer, raised(cause)), (stream, [(STARTED,), raised(cause)])):
        handle = Handle(script)
        with pytest.raises(type(cause)) as caught:
            ask(handle)
        assert type(caught.value) is type(cause)
        assert caught.value.args == cause.args
        assert len(handle.sent) == 1


@pytest.mark.parametrize("ask", [answer, stream])
def test_full_queue_is_told_with_the_time_to_come_again(ask):
    full = BackPressureError(num_queued_requests=4, max_queued_requests=4)
    with pytest.raises(OverloadedError) as caught:
        ask(Handle(full))
    assert caught.value.retry_after > 0


@pytest.mark.parametrize("ask", [answer, stream])
def test_deployment_that_is_gone_is_unavailable_at_once(ask):
    gone = DeploymentUnavailableError(ray.serve._private.common.DeploymentID("generator", "mmicl"))
    with pytest.raises(UnavailableError):
        ask(Handle(gone))


@pytest.mark.parametrize("death", [DEAD, TaskCancelledError(), asyncio.CancelledError()])
def test_question_whose_replica_dies_is_asked_again(death):
    handle = Handle(death, death, HELLO)
    assert answer(handle) == HELLO
    assert len(handle.sent) == 3
    assert handle.sent[2][1].seconds < handle.sent[0][1].seconds


def test_question_that_outlives_too_many_replicas_is_given_up(monkeypatch):
    monkeypatch.setattr(remote, "FIRST_PAUSE_SECONDS", 0.001)
    handle = Handle(DEAD)
    with pytest.raises(UnavailableError, match="5 replicas died"):
        answer(handle)
    assert len(handle.sent) == remote.MOST_DEATHS


@pytest.mark.parametrize("script", ["never", DEAD])
def test_answer_that_does_not_come_is_late_and_its_replica_is_stopped(monkeypatch, script):
    monkeypatch.setattr(remote, "MOST_DEATHS", 1000)
    for ask in (answer, stream):
        handle, began = Handle(script), time.monotonic()
        with pytest.raises(DeadlineError, match="within 0.2 seconds"):
            ask(handle, question(seconds=0.2))
        assert time.monotonic() - began < 2
        assert handle.cancelled == (script == "never")


def test_caller_that_leaves_stops_the_replica():
    handle = Handle("never")

    async def leave():
        task = asyncio.create_task(RemoteGenerator(handle, CONFIG).answer(question()))
        await asyncio.sleep(0.05)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(leave())
    assert handle.cancelled == 1


def test_stream_that_is_closed_stops_the_replica_and_one_that_ends_does_not():
    handle = Handle([(STARTED,), (Piece(0, "he"),), "never"])

    async def leave():
        parts = RemoteGenerator(handle, CONFIG).stream(question())
        await anext(parts)
        await parts.aclose()

    asyncio.run(leave())
    assert handle.cancelled == 1
    done = Handle([HELLO])
    assert stream(done) == [HELLO]
    assert done.cancelled == 0


def test_stream_goes_on_behind_what_was_passed_on_before_its_replica_died():
    first = [(STARTED,), (Piece(0, "hel"), Piece(1, "x")), DEAD]
    second = [(STARTED, Piece(0, "he")), (Piece(1, "xy"), Finished(1, "stop", 2, 1.0)), DEAD]
    third = [(STARTED, Piece(1, "xy"), Finished(1, "stop", 2, 2.0), Piece(0, "hello")), (HELLO[-1],)]
    events = [event for group in stream(Handle(first, second, third)) for event in group]
    assert sum(isinstance(event, Started) for event in events) == 1
    for index, text in ((0, "hello"), (1, "xy")):
        said = [event for event in events if not isinstance(event, Started) and event.index == index]
        assert "".join(event.text for event in said if isinstance(event, Piece)) == text
        assert [type(event) for event in said].count(Finished) == 1
        assert isinstance(said[-1], Finished)


def test_stream_whose_second_replica_says_something_else_ends_with_an_error():
    handle = Handle([(STARTED, Piece(0, "hel")), DEAD], [(STARTED, Piece(0, "hollow"))])
    with pytest.raises(UnavailableError, match="answers otherwise"):
        stream(handle)


def test_replay_keeps_probabilities_and_empty_pieces_and_repeats_neither():
    def token(text):
        return TokenLogprob(text, -0.5, ((text, -0.5),))

    replay = Replay()
    first = (STARTED, Piece(0, "", (token("a"),)), Piece(0, "ab", (token("b"),)))
    assert replay.rest(first) == first
    replay.restart()
    again = (STARTED, Piece(0, "", (token("a"),)), Piece(0, "abc", (token("b"), token("c"))), Piece(0, ""))
    assert replay.rest(again) == (Piece(0, "c", (token("c"),)), Piece(0, ""))


def test_lost_fused_tokens_are_made_again_by_whoever_made_them():
    compressor, generator = Handle(fusion("first"), fusion("second")), Handle(lost(), DEAD, HELLO)

    async def ask():
        made = await RemoteCompressor(compressor, CONFIG).fuse("nano@aim", "ann", demonstrations())
        return await RemoteGenerator(generator, CONFIG).answer(question(fusion=made))

    assert asyncio.run(ask()) == HELLO
    assert [sent[0] for sent in compressor.sent] == ["fuse", "fuse"]
    assert compressor.sent[1][1:] == ("nano@aim", "ann", demonstrations())
    assert [sent[1].fusion.name for sent in generator.sent] == ["first", "second", "second"]


def test_fusion_is_sent_without_what_makes_it_again():
    generator = Handle(HELLO)

    async def ask():
        made = await RemoteCompressor(Handle(fusion()), CONFIG).select(
            "m", PackReference("ann", "p"), [b""], 1
        )
        return await RemoteGenerator(generator, CONFIG).answer(question(fusion=made))

    asyncio.run(ask())
    ((_, sent),) = generator.sent
    assert type(sent.fusion) is Fusion
    assert pickle.loads(pickle.dumps(sent.fusion)).name == "f"


def test_death_that_serve_wraps_is_a_death():
    wrapped = RayServeException("an upstream actor died")
    wrapped.__cause__ = DEAD
    assert answer(Handle(wrapped, HELLO)) == HELLO


def served(*names):
    return tuple(ServedModel(name, "base", False, {}, 100) for name in names)


def test_models_are_remembered_and_asked_again_in_the_background(monkeypatch):
    handle = Handle(served("nano", "nano@aim"))

    async def look():
        generator = RemoteGenerator(handle, CONFIG)
        for _ in range(3):
            assert await generator.models() == served("nano", "nano@aim")
        assert len(handle.sent) == 1
        monkeypatch.setattr(remote, "MODELS_SECONDS", 0.0)
        handle.shared["script"][0] = "never"
        assert await generator.models() == served("nano", "nano@aim")
        await asyncio.sleep(0.05)
        assert len(handle.sent) == 2

    asyncio.run(look())


def test_models_that_are_expected_and_missing_are_asked_for_at_once():
    handle = Handle(served("nano", "nano@aim"), served("nano", "nano@new"))

    async def look():
        generator = RemoteGenerator(handle, CONFIG)
        await generator.models()
        generator.expect({"new": {}})
        return await generator.models()

    assert asyncio.run(look()) == served("nano", "nano@new")


def test_models_that_cannot_be_had_are_an_error_each_time_and_no_stray_one():
    before = threading.active_count()

    async def look():
        generator = RemoteGenerator(Handle(raised(DataError("broken"))), CONFIG)
        for _ in range(2):
            with pytest.raises(DataError, match="broken"):
                await generator.models()

    asyncio.run(look())
    assert threading.active_count() == before
